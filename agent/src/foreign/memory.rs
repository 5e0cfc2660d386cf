//! The RAM of another process's VM, read while it runs: the real [`GuestMemory`].
//!
//! Owns the way from a guest's address to bytes: through the memory file where RAM is a shared one, else through the process's own
//! mapping. Reading does not make the VM use memory: a hole in a memory file is read through the file, which leaves it a hole
//! (reading it through the mapping would fill it), and anonymous memory that was never written shows the kernel's one zero page.
//! Must not know what the bytes are for, and never writes.
//!
//! Where RAM is, is asked once: when the VM's slots change (hotplug), or the process maps other memory in their place, open it anew.
//! While this lives it keeps the memory files open, so their memory outlives the VM that long.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use super::maps::{self, Mapping};
use super::process::{self, KvmProcess, has_ended, start_time_ticks};
use super::vm_read::{self, MOST_PIECES};
use crate::model::{Gpa, MemoryRange, PAGE_SIZE, RamSlot};
use crate::port::{GuestMemory, GuestMemoryError};

/// `TMPFS_MAGIC` (include/uapi/linux/magic.h): memfd, shared anonymous memory, /dev/shm.
const TMPFS: u32 = 0x0102_1994;
/// `HUGETLBFS_MAGIC`.
const HUGETLBFS: u32 = 0x9584_58f6;
/// In an entry of `/proc/PID/pagemap` (Documentation/admin-guide/mm/pagemap.rst): the page is in memory, or in swap.
const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
/// The smallest mapping that is guessed to be RAM.
const LEAST_RAM_BYTES: u64 = 1 << 20;

/// Why a VM's memory cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum MemoryOpenError {
    /// The process has ended.
    #[error("there is no process {0}: the VM has ended")]
    Gone(u32),
    /// Its mappings may not be looked at.
    #[error("the memory of process {pid} may not be looked at ({source}): run as root, or with CAP_SYS_PTRACE")]
    Refused {
        /// The process.
        pid: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A slot that no VM can have.
    #[error("memory slot {slot:?} is not whole pages, wraps, or lies over another: the VM's slots were read wrongly")]
    BadSlot {
        /// The slot.
        slot: RamSlot,
    },
    /// Nothing in it looks like a guest's RAM.
    #[error("process {0} has no writable mapping of 1 MiB or more: it holds no VM")]
    NoRam(u32),
}

/// Where the bytes of a piece of RAM are.
#[derive(Clone, Debug)]
enum Backing {
    /// In a shared memory file, from this offset on.
    File(Arc<File>, u64),
    /// In private memory of the process, over a memory file: pages that it has not written are in the file from this offset on.
    OverFile(Arc<File>, u64),
    /// In the process's memory.
    Process,
    /// Nowhere: the process has mapped nothing there.
    Missing,
}

/// A stretch of RAM with one backing.
#[derive(Clone, Debug)]
struct Piece {
    range: MemoryRange,
    host_address: u64,
    backing: Backing,
}

/// The RAM of one process's VM.
#[derive(Debug)]
pub struct ProcessMemory {
    pid: u32,
    handle: OwnedFd,
    pagemap: Option<File>,
    ranges: Vec<MemoryRange>,
    pieces: Vec<Piece>,
}

/// A part of a read that lies in one piece.
struct Part<'a> {
    at: Gpa,
    piece: usize,
    into: &'a mut [u8],
}

impl ProcessMemory {
    /// Opens the RAM in `slots` of a process's VM.
    ///
    /// # Errors
    /// The process has ended (another may have its number), may not be looked at, or the slots are none.
    pub fn of(process: &KvmProcess, slots: &[RamSlot]) -> Result<Self, MemoryOpenError> {
        let memory = Self::of_pid(process.pid, slots)?;
        // The handle is of the process that was meant if that one lives: both have the number, and neither has ended.
        if process.is_alive() && memory.is_alive() { Ok(memory) } else { Err(MemoryOpenError::Gone(process.pid)) }
    }

    /// The same for a process that need not hold a KVM machine (QEMU under TCG).
    ///
    /// # Errors
    /// As [`ProcessMemory::of`].
    pub fn of_pid(pid: u32, slots: &[RamSlot]) -> Result<Self, MemoryOpenError> {
        let handle = process::handle(pid).ok_or(MemoryOpenError::Gone(pid))?;
        let slots = sorted(slots)?;
        let mappings = mappings(pid)?;
        let mut pieces = Vec::new();
        for slot in &slots {
            add_pieces(pid, slot, &mappings, &mut pieces);
        }
        let pagemap = File::open(format!("/proc/{pid}/pagemap")).ok();
        let memory = Self { pid, handle, pagemap, ranges: merged(&slots), pieces };
        if memory.is_alive() { Ok(memory) } else { Err(MemoryOpenError::Gone(pid)) }
    }

    /// Whether the VM's process has not ended.
    pub fn is_alive(&self) -> bool {
        !has_ended(&self.handle, Duration::ZERO)
    }

    /// The piece that holds `at`.
    fn piece_at(&self, at: Gpa) -> Result<usize, GuestMemoryError> {
        let behind = self.pieces.partition_point(|piece| piece.range.start <= at);
        let index = behind.checked_sub(1).filter(|&index| self.pieces[index].range.contains(at, 1));
        index.ok_or(GuestMemoryError::NotRam(at))
    }

    /// Cuts a read at the ends of pieces.
    fn cut<'a>(&self, mut at: Gpa, mut into: &'a mut [u8], parts: &mut Vec<Part<'a>>) -> Result<(), GuestMemoryError> {
        while !into.is_empty() {
            let piece = self.piece_at(at)?;
            let room = self.pieces[piece].range.end().0 - at.0;
            let (now, later) = into.split_at_mut(into.len().min(usize::try_from(room).unwrap_or(usize::MAX)));
            let next = Gpa(at.0.saturating_add(now.len() as u64));
            parts.push(Part { at, piece, into: now });
            (at, into) = (next, later);
        }
        Ok(())
    }

    fn unreadable(&self, at: Gpa, error: &io::Error) -> GuestMemoryError {
        let reason = match error.raw_os_error() {
            Some(libc::ESRCH) => return GuestMemoryError::Gone,
            Some(libc::EFAULT) => {
                "the kernel lets no other process read it: secret memory, a guest_memfd, or memory of a device"
                    .to_owned()
            }
            Some(libc::EPERM | libc::EACCES) => format!("{error}: run as root, or with CAP_SYS_PTRACE"),
            _ => error.to_string(),
        };
        if self.is_alive() { GuestMemoryError::Unreadable { at, reason } } else { GuestMemoryError::Gone }
    }

    /// Reads parts that are in the process's memory, many a call.
    fn read_process(&self, parts: &mut [Part<'_>]) -> Result<(), GuestMemoryError> {
        // How much of the first part is there already.
        let (mut first, mut have) = (0, 0);
        while first < parts.len() {
            let end = parts.len().min(first + MOST_PIECES);
            let mut pieces: Vec<(u64, &mut [u8])> = parts[first..end]
                .iter_mut()
                .enumerate()
                .map(|(index, part)| {
                    let piece = &self.pieces[part.piece];
                    let skip = if index == 0 { have } else { 0 };
                    let address = piece.host_address + (part.at.0 - piece.range.start.0) + skip as u64;
                    (address, &mut part.into[skip..])
                })
                .collect();
            let mut got = match vm_read::read(self.pid, &mut pieces) {
                Ok(0) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
                other => other,
            }
            .map_err(|error| self.unreadable(Gpa(parts[first].at.0 + have as u64), &error))?;
            while first < end && got >= parts[first].into.len() - have {
                got -= parts[first].into.len() - have;
                (first, have) = (first + 1, 0);
            }
            have += got;
        }
        Ok(())
    }

    /// Reads a part that is in private memory over a file: what the process has written there from the process, else from the file.
    fn read_over_file(&self, file: &File, offset: u64, part: Part<'_>) -> Result<(), GuestMemoryError> {
        let Part { mut at, piece, mut into } = part;
        let base = self.pieces[piece].range.start;
        let host_address = self.pieces[piece].host_address;
        while !into.is_empty() {
            let inside = (at.0 % PAGE_SIZE as u64) as usize;
            let (now, later) = into.split_at_mut(into.len().min(PAGE_SIZE - inside));
            let next = Gpa(at.0 + now.len() as u64);
            let place = at.0 - base.0;
            if self.is_own_page(host_address + place) {
                self.read_process(&mut [Part { at, piece, into: now }])?;
            } else {
                file.read_exact_at(now, offset + place).map_err(|error| self.unreadable(at, &error))?;
            }
            (at, into) = (next, later);
        }
        Ok(())
    }

    /// Whether the process has a page of its own at an address; true if the kernel does not tell.
    fn is_own_page(&self, host_address: u64) -> bool {
        let mut entry = [0; 8];
        let offset = host_address / PAGE_SIZE as u64 * 8;
        let read = self.pagemap.as_ref().map(|file| file.read_exact_at(&mut entry, offset));
        !matches!(read, Some(Ok(()))) || u64::from_le_bytes(entry) & PRESENT_OR_SWAPPED != 0
    }

    fn read_parts(&self, parts: Vec<Part<'_>>) -> Result<(), GuestMemoryError> {
        let mut in_process = Vec::new();
        for part in parts {
            let piece = &self.pieces[part.piece];
            match &piece.backing {
                Backing::File(file, offset) => file
                    .read_exact_at(part.into, offset + (part.at.0 - piece.range.start.0))
                    .map_err(|error| self.unreadable(part.at, &error))?,
                Backing::OverFile(file, offset) => self.read_over_file(file, *offset, part)?,
                Backing::Process => in_process.push(part),
                Backing::Missing => {
                    let reason = "the VM's process has no memory mapped there".to_owned();
                    return Err(GuestMemoryError::Unreadable { at: part.at, reason });
                }
            }
        }
        self.read_process(&mut in_process)?;
        // A process that has not ended now had not ended while it was read by its number, and its files are its own.
        if self.is_alive() { Ok(()) } else { Err(GuestMemoryError::Gone) }
    }
}

impl GuestMemory for ProcessMemory {
    fn ranges(&self) -> &[MemoryRange] {
        &self.ranges
    }

    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), GuestMemoryError> {
        let mut parts = Vec::with_capacity(1);
        self.cut(at, into, &mut parts)?;
        self.read_parts(parts)
    }

    fn read_many(&self, what: &mut [(Gpa, &mut [u8])]) -> Result<(), GuestMemoryError> {
        let mut parts = Vec::with_capacity(what.len());
        for (at, into) in what {
            self.cut(*at, into, &mut parts)?;
        }
        self.read_parts(parts)
    }
}

fn mappings(pid: u32) -> Result<Vec<Mapping>, MemoryOpenError> {
    maps::of(pid).map_err(|source| match source.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => MemoryOpenError::Gone(pid),
        _ => MemoryOpenError::Refused { pid, source },
    })
}

/// The slots in ascending order, checked.
fn sorted(slots: &[RamSlot]) -> Result<Vec<RamSlot>, MemoryOpenError> {
    let mut slots = slots.to_vec();
    slots.sort_by_key(|slot| slot.start);
    if let Some(&slot) = slots.iter().find(|slot| !slot.is_sound()) {
        return Err(MemoryOpenError::BadSlot { slot });
    }
    match slots.windows(2).find(|pair| pair[0].range().end() > pair[1].start) {
        Some(pair) => Err(MemoryOpenError::BadSlot { slot: pair[1] }),
        None => Ok(slots),
    }
}

/// The guest's ranges, those that touch made one.
fn merged(slots: &[RamSlot]) -> Vec<MemoryRange> {
    let mut ranges: Vec<MemoryRange> = Vec::new();
    for slot in slots {
        match ranges.last_mut() {
            Some(last) if last.end() == slot.start => last.bytes += slot.bytes,
            _ => ranges.push(slot.range()),
        }
    }
    ranges
}

/// Finds what backs each part of a slot.
fn add_pieces(pid: u32, slot: &RamSlot, mappings: &[Mapping], pieces: &mut Vec<Piece>) {
    let end = slot.host_address + slot.bytes;
    let mut add = |from: u64, to: u64, backing: Backing| {
        if from < to {
            let start = Gpa(slot.start.0 + (from - slot.host_address));
            pieces.push(Piece { range: MemoryRange { start, bytes: to - from }, host_address: from, backing });
        }
    };
    let mut at = slot.host_address;
    for mapping in mappings {
        let Some(Range { start: from, end: to }) = mapping.meet(&(at..end)) else { continue };
        add(at, from, Backing::Missing);
        add(from, to, backing(pid, mapping, from));
        at = to;
    }
    add(at, end, Backing::Missing);
}

/// What backs `mapping` from the host's address `from` on.
fn backing(pid: u32, mapping: &Mapping, from: u64) -> Backing {
    let Some(offset) = mapping.offset.checked_add(from - mapping.start).filter(|_| mapping.inode != 0) else {
        return Backing::Process;
    };
    match memory_file(pid, mapping) {
        // Some files that the kernel calls memory cannot be read as files: try.
        Some(file) if file.read_exact_at(&mut [0], offset).is_ok() => {
            let make = if mapping.shared { Backing::File } else { Backing::OverFile };
            make(Arc::new(file), offset)
        }
        _ => Backing::Process,
    }
}

/// The file behind a mapping, opened for reading, if it is one of memory.
fn memory_file(pid: u32, mapping: &Mapping) -> Option<File> {
    let link = format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end);
    // Links of that folder take CAP_CHECKPOINT_RESTORE to follow; descriptors only what looking at the process takes.
    open_memory_file(Path::new(&link), mapping).or_else(|| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
        descriptors.flatten().find_map(|entry| open_memory_file(&entry.path(), mapping))
    })
}

/// Opens what `link` names, if that is the mapping's file and one of memory. It is looked at first with a handle that opens nothing: it may
/// be a device.
fn open_memory_file(link: &Path, mapping: &Mapping) -> Option<File> {
    let handle = rustix::fs::open(link, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let handle = File::from(handle);
    let about = handle.metadata().ok()?;
    let device = (rustix::fs::major(about.dev()), rustix::fs::minor(about.dev()));
    let kind = rustix::fs::fstatfs(handle.as_fd()).ok()?.f_type as u32;
    if !about.is_file()
        || (about.ino(), device) != (mapping.inode, mapping.device)
        || !matches!(kind, TMPFS | HUGETLBFS)
    {
        return None;
    }
    File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&handle))).ok()
}

/// What is taken for a VM's RAM where its slots are not known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuessedRam {
    /// The mappings, one after the other: their addresses count from 0.
    pub slots: Vec<RamSlot>,
    /// What the addresses are, to be printed beside every one of them.
    pub meaning: String,
}

/// Guesses a VM's RAM from its process's mappings, for a VMM without KVM (QEMU under TCG): the largest memory that it may write and that
/// holds no code (TCG's translations may be larger than RAM), and others at least half as large (one for each NUMA node).
///
/// # Errors
/// The process has ended, may not be looked at, or has nothing that may be RAM.
pub fn guess_ram(pid: u32) -> Result<GuessedRam, MemoryOpenError> {
    let began = start_time_ticks(pid).ok_or(MemoryOpenError::Gone(pid))?;
    let mappings = mappings(pid)?;
    if start_time_ticks(pid) != Some(began) {
        return Err(MemoryOpenError::Gone(pid));
    }
    guess(&mappings).ok_or(MemoryOpenError::NoRam(pid))
}

fn guess(mappings: &[Mapping]) -> Option<GuessedRam> {
    let may_be_ram = |mapping: &&Mapping| {
        let is_own = mapping.name.starts_with("[heap]") || mapping.name.starts_with("[stack");
        mapping.readable && mapping.writable && !mapping.executable && !is_own && !mapping.name.contains("jit")
    };
    // Advice or protection given to a part of it cuts a mapping: join what touches and has the same file.
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut last: Option<&Mapping> = None;
    for mapping in mappings.iter().filter(may_be_ram) {
        let goes_on = last.is_some_and(|last| {
            last.end == mapping.start
                && (last.shared, last.device, last.inode) == (mapping.shared, mapping.device, mapping.inode)
        });
        match runs.last_mut() {
            Some(run) if goes_on => run.end = mapping.end,
            _ => runs.push(mapping.start..mapping.end),
        }
        last = Some(mapping);
    }
    let largest = runs.iter().map(|run| run.end - run.start).max().filter(|&bytes| bytes >= LEAST_RAM_BYTES)?;
    runs.retain(|run| run.end - run.start >= largest.div_ceil(2));
    let mut next = 0;
    let mut slots = Vec::new();
    for run in &runs {
        let bytes = run.end - run.start;
        slots.push(RamSlot { start: Gpa(next), bytes, host_address: run.start });
        next += bytes;
    }
    let meaning = match slots.len() {
        1 => "addresses are offsets in the process's largest mapping".to_owned(),
        count => format!("addresses are offsets in the process's {count} largest mappings, one after the other"),
    };
    Some(GuessedRam { slots, meaning })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::model::PageCount;

    const PAGE: u64 = PAGE_SIZE as u64;

    /// Memory of this very process.
    struct Mapped {
        address: *mut u8,
        bytes: usize,
    }

    impl Mapped {
        fn new(pages: u64, flags: libc::c_int, file: Option<&File>) -> Self {
            let bytes = PageCount(pages).bytes() as usize;
            let file = file.map_or(-1, std::os::fd::AsRawFd::as_raw_fd);
            let rights = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: a new mapping at an address that the kernel chooses.
            let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, rights, flags, file, 0) };
            assert_ne!(address, libc::MAP_FAILED, "{}", io::Error::last_os_error());
            Self { address: address.cast(), bytes }
        }

        fn slot(&self, start: u64) -> RamSlot {
            RamSlot { start: Gpa(start), bytes: self.bytes as u64, host_address: self.address as u64 }
        }

        fn write(&self, page: u64, value: u8) {
            assert!((page * PAGE) < self.bytes as u64);
            // SAFETY: inside the mapping, which nobody else writes or refers to.
            unsafe { self.address.add((page * PAGE) as usize).write_bytes(value, PAGE_SIZE) };
        }
    }

    impl Drop for Mapped {
        fn drop(&mut self) {
            // SAFETY: our own mapping, which nothing refers to any more.
            unsafe { libc::munmap(self.address.cast(), self.bytes) };
        }
    }

    fn memfd(bytes: u64) -> File {
        let file = File::from(rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(bytes).unwrap();
        file
    }

    fn open(slots: &[RamSlot]) -> ProcessMemory {
        ProcessMemory::of_pid(std::process::id(), slots).unwrap()
    }

    fn page(memory: &ProcessMemory, at: u64) -> [u8; PAGE_SIZE] {
        let mut page = [0xee; PAGE_SIZE];
        memory.read(Gpa(at), &mut page).unwrap();
        page
    }

    #[test]
    fn holes_of_a_memory_file_read_as_zeros_and_stay_holes() {
        let file = memfd(256 * PAGE);
        let ram = Mapped::new(256, libc::MAP_SHARED, Some(&file));
        ram.write(3, 7);
        let memory = open(&[ram.slot(0x10_0000)]);
        assert!(matches!(memory.pieces[0].backing, Backing::File(_, 0)), "{:?}", memory.pieces);
        let before = file.metadata().unwrap().blocks();
        let mut all = vec![0xee; 256 * PAGE_SIZE];
        memory.read(Gpa(0x10_0000), &mut all).unwrap();
        assert!(all[..3 * PAGE_SIZE].iter().all(|&byte| byte == 0));
        assert!(all[3 * PAGE_SIZE..4 * PAGE_SIZE].iter().all(|&byte| byte == 7));
        assert!(all[4 * PAGE_SIZE..].iter().all(|&byte| byte == 0));
        assert_eq!(file.metadata().unwrap().blocks(), before, "reading has filled holes");
    }

    /// Resident bytes of one mapping.
    fn resident(ram: &Mapped) -> u64 {
        let text = fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = text.lines().skip_while(|line| !line.starts_with(&format!("{:x}-", ram.address as u64)));
        let line = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
    }

    #[test]
    fn anonymous_memory_that_was_never_written_reads_as_zeros_and_takes_none() {
        // A page on either side that is not to be had keeps it a mapping of its own.
        let around = Mapped::new(4098, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, None);
        for edge in [0, 4097] {
            // SAFETY: inside our own mapping, and nothing refers to it.
            let done =
                unsafe { libc::mprotect(around.address.add(edge * PAGE_SIZE).cast(), PAGE_SIZE, libc::PROT_NONE) };
            assert_eq!(done, 0);
        }
        let ram = std::mem::ManuallyDrop::new(Mapped {
            // SAFETY: inside the same mapping.
            address: unsafe { around.address.add(PAGE_SIZE) },
            bytes: 4096 * PAGE_SIZE,
        });
        ram.write(4095, 9);
        let memory = open(&[ram.slot(0)]);
        let before = resident(&ram);
        let mut pages = vec![[0xeeu8; PAGE_SIZE]; 4096];
        let mut what: Vec<(Gpa, &mut [u8])> =
            pages.iter_mut().enumerate().map(|(index, page)| (Gpa(index as u64 * PAGE), &mut page[..])).collect();
        memory.read_many(&mut what).unwrap();
        assert!(pages[..4095].iter().all(|page| page == &[0; PAGE_SIZE]) && pages[4095] == [9; PAGE_SIZE]);
        assert_eq!(resident(&ram), before, "reading has made the process use memory");
    }

    #[test]
    fn private_memory_over_a_file_shows_what_was_written_and_else_the_file() {
        let mut file = memfd(8 * PAGE);
        file.write_all(&[5; PAGE_SIZE]).unwrap();
        let ram = Mapped::new(8, libc::MAP_PRIVATE, Some(&file));
        ram.write(1, 6);
        let memory = open(&[ram.slot(0)]);
        assert!(matches!(memory.pieces[0].backing, Backing::OverFile(_, 0)));
        let before = file.metadata().unwrap().blocks();
        let mut all = [0xee; 4 * PAGE_SIZE];
        memory.read(Gpa(0), &mut all).unwrap();
        assert_eq!([all[0], all[PAGE_SIZE], all[2 * PAGE_SIZE], all[4 * PAGE_SIZE - 1]], [5, 6, 0, 0]);
        assert_eq!(file.metadata().unwrap().blocks(), before);
    }

    #[test]
    fn touching_slots_are_one_range_and_a_read_may_cross_them() {
        let file = memfd(2 * PAGE);
        let (low, high) = (
            Mapped::new(2, libc::MAP_SHARED, Some(&file)),
            Mapped::new(2, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None),
        );
        low.write(1, 1);
        high.write(0, 2);
        let far = Mapped::new(1, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None);
        far.write(0, 3);
        let memory = open(&[far.slot(64 * PAGE), high.slot(2 * PAGE), low.slot(0)]);
        let range = |start, pages| MemoryRange { start: Gpa(start), bytes: pages * PAGE };
        assert_eq!(memory.ranges(), [range(0, 4), range(64 * PAGE, 1)]);
        let mut across = [0; 20];
        memory.read(Gpa(2 * PAGE - 10), &mut across).unwrap();
        assert_eq!((across[..10].to_vec(), across[10..].to_vec()), (vec![1; 10], vec![2; 10]));
        assert_eq!(page(&memory, 64 * PAGE), [3; PAGE_SIZE]);
        let not_ram = memory.read(Gpa(4 * PAGE - 1), &mut across).unwrap_err();
        assert_eq!(not_ram, GuestMemoryError::NotRam(Gpa(4 * PAGE)));
        assert!(memory.read(Gpa(u64::MAX), &mut across).is_err());
    }

    #[test]
    fn what_cannot_be_read_is_said_where() {
        let ram = Mapped::new(4, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None);
        let slot = ram.slot(0);
        // SAFETY: a page of our own mapping that nothing refers to.
        assert_eq!(unsafe { libc::munmap(ram.address.add(2 * PAGE_SIZE).cast(), PAGE_SIZE) }, 0);
        let memory = open(&[slot]);
        let mut pages = [0; 4 * PAGE_SIZE];
        let Err(GuestMemoryError::Unreadable { at, .. }) = memory.read(Gpa(0), &mut pages) else { panic!() };
        assert_eq!(at, Gpa(2 * PAGE));
        // Gone since it was opened.
        // SAFETY: as above.
        assert_eq!(unsafe { libc::munmap(ram.address.add(PAGE_SIZE).cast(), PAGE_SIZE) }, 0);
        let error = memory.read(Gpa(0), &mut pages[..2 * PAGE_SIZE]).unwrap_err();
        assert!(matches!(&error, GuestMemoryError::Unreadable { at, .. } if *at == Gpa(PAGE)), "{error}");
    }

    #[test]
    fn secret_memory_is_unreadable() {
        // SAFETY: no pointers; the kernel makes a descriptor, or has no secret memory.
        let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
        if fd < 0 {
            return;
        }
        // SAFETY: the kernel has just made it for us.
        let file = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(fd as i32) };
        file.set_len(PAGE).unwrap();
        let ram = Mapped::new(1, libc::MAP_SHARED, Some(&file));
        ram.write(0, 1);
        let error = open(&[ram.slot(0)]).read(Gpa(0), &mut [0]).unwrap_err();
        assert!(error.to_string().contains("secret memory"), "{error}");
    }

    #[test]
    fn slots_that_no_vm_has_are_refused() {
        let slot = RamSlot { start: Gpa(0), bytes: 2 * PAGE, host_address: 1 << 30 };
        for bad in [
            vec![RamSlot { bytes: 1, ..slot }],
            vec![RamSlot { host_address: u64::MAX - 0xfff, ..slot }],
            vec![slot, RamSlot { start: Gpa(PAGE), ..slot }],
        ] {
            assert!(matches!(ProcessMemory::of_pid(std::process::id(), &bad), Err(MemoryOpenError::BadSlot { .. })));
        }
    }

    #[test]
    fn the_end_of_the_process_is_noticed() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let stack = crate::foreign::maps::of(child.id()).unwrap();
        let any = stack.iter().find(|mapping| mapping.readable).unwrap();
        let slot = RamSlot { start: Gpa(0), bytes: any.bytes(), host_address: any.start };
        let memory = ProcessMemory::of_pid(child.id(), &[slot]).unwrap();
        assert!(memory.is_alive());
        child.kill().unwrap();
        // Before it is reaped too: a zombie runs no guest.
        while memory.is_alive() {
            std::thread::yield_now();
        }
        assert_eq!(memory.read(Gpa(0), &mut [0]), Err(GuestMemoryError::Gone));
        child.wait().unwrap();
        assert!(matches!(ProcessMemory::of_pid(child.id(), &[slot]), Err(MemoryOpenError::Gone(_))));
        assert!(matches!(guess_ram(child.id()), Err(MemoryOpenError::Gone(_))));
    }

    #[test]
    fn ram_is_guessed_to_be_the_largest_memory_that_holds_no_code() {
        let text = "\
555500000000-555510000000 rw-p 00000000 00:00 0 [heap]
7f0000000000-7f0040000000 rwxp 00000000 00:00 0 
7f1000000000-7f1004000000 rw-p 00000000 00:00 0 
7f1004000000-7f1008000000 rw-p 00000000 00:00 0 
7f2000000000-7f2001000000 rw-p 00000000 00:00 0 
7f3000000000-7f3040000000 rw-s 00000000 00:01 9 /memfd:qemu-jit (deleted)
";
        let guess = super::guess(&maps::parse(text)).unwrap();
        let ram = RamSlot { start: Gpa(0), bytes: 128 << 20, host_address: 0x7f10_0000_0000 };
        assert_eq!(
            (guess.slots, &*guess.meaning),
            (vec![ram], "addresses are offsets in the process's largest mapping")
        );
        let nodes = "7f1000000000-7f1008000000 rw-p 0 00:00 0 \n7f2000000000-7f2008000000 rw-p 0 00:00 0 \n";
        let guess = super::guess(&maps::parse(nodes)).unwrap();
        assert_eq!((guess.slots.len(), guess.slots[1].start), (2, Gpa(128 << 20)));
        assert!(guess.meaning.contains("2 largest mappings"));
        assert!(super::guess(&[]).is_none());
    }
}
