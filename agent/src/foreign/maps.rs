//! A process's mappings, as `/proc/PID/maps` and `/proc/PID/smaps` list them (Documentation/filesystems/proc.rst).
//!
//! Owns the reading of these texts. The names in them are chosen by the process: a line that cannot be read is left out, never
//! guessed at. Must not know what is in the mappings.

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;

/// One mapping.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mapping {
    /// Its first byte.
    pub start: u64,
    /// The first byte behind it; above [`Mapping::start`].
    pub end: u64,
    /// Whether the process may read it.
    pub readable: bool,
    /// Whether the process may write it.
    pub writable: bool,
    /// Whether it holds code.
    pub executable: bool,
    /// Whether what is written reaches the file behind it (anonymous shared memory is a file too).
    pub shared: bool,
    /// Where in the file it begins, in bytes.
    pub offset: u64,
    /// The major and minor number of the file's device.
    pub device: (u32, u32),
    /// The file's number; 0 for private memory with no file.
    pub inode: u64,
    /// The file's path, or the kernel's word for it.
    pub name: String,
}

impl Mapping {
    /// Its length in bytes, never 0.
    pub const fn bytes(&self) -> u64 {
        self.end - self.start
    }

    /// The part of it that lies in `range`; none if they do not meet.
    pub fn meet(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let meet = self.start.max(range.start)..self.end.min(range.end);
        (!meet.is_empty()).then_some(meet)
    }
}

/// What `smaps` says beside a mapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Detail {
    /// The size of its file's pages in bytes: above 4096 only for hugetlbfs.
    pub kernel_page_bytes: u64,
    /// Bytes of it that one entry of 2 MiB maps.
    pub huge_mapped_bytes: u64,
    /// Whether it is of hugetlbfs.
    pub is_hugetlb: bool,
    /// Whether new pages in it count as soft-dirty however they came: the kernel has made the mapping, or changed it, since they were last cleared.
    pub is_soft_dirty: bool,
}

/// Reads one line of `maps`.
pub fn parse_line(line: &str) -> Option<Mapping> {
    let mut rest = line;
    let mut word = || {
        let (word, after) = rest.split_once(' ').unwrap_or((rest, ""));
        rest = after.trim_start_matches(' ');
        word
    };
    let (start, end) = word().split_once('-')?;
    let (start, end) = (hexadecimal(start)?, hexadecimal(end)?);
    let rights = word().as_bytes();
    let offset = hexadecimal(word())?;
    let (major, minor) = word().split_once(':')?;
    let device = (hexadecimal(major)?.try_into().ok()?, hexadecimal(minor)?.try_into().ok()?);
    let inode = word().parse().ok()?;
    if end <= start || rights.len() != 4 {
        return None;
    }
    Some(Mapping {
        start,
        end,
        readable: rights[0] == b'r',
        writable: rights[1] == b'w',
        executable: rights[2] == b'x',
        shared: rights[3] == b's',
        offset,
        device,
        inode,
        name: rest.to_owned(),
    })
}

/// Hexadecimal digits only: the standard parser would take a sign.
fn hexadecimal(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_hexdigit()).then(|| u64::from_str_radix(text, 16).ok())?
}

/// All mappings of a process, in ascending order.
///
/// # Errors
/// What the kernel answered: the process is gone, or may not be looked at.
pub fn of(pid: u32) -> io::Result<Vec<Mapping>> {
    let bytes = fs::read(format!("/proc/{pid}/maps"))?;
    Ok(parse(&String::from_utf8_lossy(&bytes)))
}

/// All mappings in a text of `maps`, in ascending order, none overlapping another.
pub fn parse(text: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for mapping in text.lines().filter_map(parse_line) {
        if mappings.last().is_none_or(|last| last.end <= mapping.start) {
            mappings.push(mapping);
        }
    }
    mappings
}

/// The mappings that lie in any of `ranges`, with their details.
///
/// Costs the kernel a walk over the process's whole page table.
///
/// # Errors
/// As [`of`].
pub fn detailed(pid: u32, ranges: &[Range<u64>]) -> io::Result<Vec<(Mapping, Detail)>> {
    let file = BufReader::new(fs::File::open(format!("/proc/{pid}/smaps"))?);
    let mut all = parse_detailed(file)?;
    all.retain(|(mapping, _)| ranges.iter().any(|range| mapping.meet(range).is_some()));
    Ok(all)
}

/// All mappings of a text of `smaps`.
///
/// # Errors
/// It cannot be read.
pub fn parse_detailed(text: impl BufRead) -> io::Result<Vec<(Mapping, Detail)>> {
    let mut all: Vec<(Mapping, Detail)> = Vec::new();
    for line in text.split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        // A mapping's own line begins with an address, the others with a capital letter; addresses are in small letters.
        if let Some(mapping) = parse_line(&line) {
            all.push((mapping, Detail::default()));
            continue;
        }
        let (Some((_, detail)), Some((name, value))) = (all.last_mut(), line.split_once(':')) else { continue };
        let bytes = || {
            let number: Option<u64> = value.trim().strip_suffix(" kB").and_then(|number| number.trim().parse().ok());
            number.unwrap_or(0).saturating_mul(1024)
        };
        match name {
            "KernelPageSize" => detail.kernel_page_bytes = bytes(),
            "AnonHugePages" | "ShmemPmdMapped" | "FilePmdMapped" => {
                detail.huge_mapped_bytes = detail.huge_mapped_bytes.saturating_add(bytes());
            }
            "VmFlags" => {
                detail.is_hugetlb = value.split_ascii_whitespace().any(|flag| flag == "ht");
                detail.is_soft_dirty = value.split_ascii_whitespace().any(|flag| flag == "sd");
            }
            _ => {}
        }
    }
    Ok(all)
}

/// See [`crate::fuzz`].
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz(input: &[u8]) {
    let mappings = parse(&String::from_utf8_lossy(input));
    assert!(mappings.iter().all(|mapping| mapping.start < mapping.end));
    assert!(mappings.is_sorted_by_key(|mapping| mapping.start));
    for (mapping, _) in parse_detailed(input).unwrap_or_default() {
        assert!(mapping.meet(&(0..u64::MAX)).is_some_and(|meet| meet.end - meet.start == mapping.bytes()));
    }
}

/// See [`crate::fuzz`].
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz_seeds() -> Vec<Vec<u8>> {
    vec![SAMPLE.as_bytes().to_vec()]
}

#[cfg(any(test, feature = "fuzz"))]
const SAMPLE: &str = "\
7f1a3be00000-7f1a47e00000 rw-s 00001000 00:01 2054                       /memfd:a b (deleted)
Size:             196608 kB
KernelPageSize:        4 kB
ShmemPmdMapped:     4096 kB
VmFlags: rd wr sh mr mw me ms sd
7f1a47e00000-7f1a47e01000 rw-p 00000000 00:00 0 
KernelPageSize:     2048 kB
AnonHugePages:         0 kB
VmFlags: rd wr ht
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_with_their_names_and_details() {
        let all = parse_detailed(SAMPLE.as_bytes()).unwrap();
        assert_eq!(parse(SAMPLE), all.iter().map(|(mapping, _)| mapping.clone()).collect::<Vec<_>>());
        let [(file, detail), (private, hugetlb), (code, _)] = &all[..] else { panic!("{all:?}") };
        assert_eq!((file.bytes(), file.offset, file.inode), (192 << 20, 4096, 2054));
        assert_eq!(file.device, (0, 1));
        assert_eq!((file.shared, file.writable, &*file.name), (true, true, "/memfd:a b (deleted)"));
        assert_eq!((detail.kernel_page_bytes, detail.huge_mapped_bytes), (4096, 4 << 20));
        assert!(detail.is_soft_dirty && !detail.is_hugetlb && !hugetlb.is_soft_dirty && hugetlb.is_hugetlb);
        assert_eq!((private.shared, private.inode, &*private.name), (false, 0, ""));
        assert!(code.executable && !code.readable);
    }

    #[test]
    fn what_is_no_mapping_is_left_out() {
        for bad in [
            "",
            "2000-1000 rw-p 0 0:0 0",
            "1000-1000 rw-p 0 0:0 0",
            "1000-2000 rw 0 0:0 0",
            "+1000-2000 rw-p 0 0:0 0",
            "1000-2000 rw-p 0 0:0 x",
        ] {
            assert_eq!(parse_line(bad), None, "{bad}");
        }
        // One that lies in the one before.
        assert_eq!(parse("1000-3000 rw-p 0 0:0 0\n2000-4000 rw-p 0 0:0 0\n").len(), 1);
    }

    #[test]
    fn our_own_mappings_hold_our_own_variables() {
        let here = 5u64;
        let address = (&raw const here) as u64;
        let (maps, range) = (of(std::process::id()).unwrap(), address..address + 8);
        let stack = maps.iter().find(|mapping| mapping.meet(&range).is_some()).unwrap();
        assert!(stack.readable && stack.writable && !stack.shared);
        let detailed = detailed(std::process::id(), &[range]).unwrap();
        assert!(detailed.len() == 1 && detailed[0].1.kernel_page_bytes == 4096, "{detailed:?}");
    }
}
