//! A Linux kernel's image in a guest's memory, and the marks in it by which the rest is found.
//!
//! Owns where x86-64 Linux maps itself, and one pass over all of it. Must not know what follows from a mark: each is only bytes that look
//! like something, which whoever uses it checks.
//!
//! Addresses: Documentation/arch/x86/x86_64/mm.rst. Address randomisation moves the image within its window; modules lie behind it.

use std::ops::RangeInclusive;

use super::paging::{Stretch, Virtual};
use super::reader::{ReadError, Reader};
use crate::model::{Gpa, Gva, PAGE_SIZE};

/// Where the image may lie: `__START_KERNEL_map`, and `KERNEL_IMAGE_SIZE` with address randomisation.
pub(super) const WINDOW: RangeInclusive<u64> = 0xffff_ffff_8000_0000..=0xffff_ffff_bfff_ffff;
/// The most of an image that is looked through; kernels in use have 30 to 100 MiB.
const MAX_BYTES: u64 = 512 << 20;
/// Read at a time.
const CHUNK: usize = 1 << 20;
/// Of each kind of mark, how many are kept.
const MAX_MARKS: usize = 1024;
/// The first idle task's name as it is compiled in, and how `init_idle` completes it for its CPU.
const IDLE: &[u8] = b"swapper";
/// Magic number, version 1, no flags: see `btf`.
const TYPES: &[u8] = &[0x9f, 0xeb, 1, 0];
/// What `linux_banner` (init/version.c) begins with; the release follows, and a space.
const BANNER: &[u8] = b"Linux version ";
/// The longest release that is believed (`__NEW_UTS_LEN`).
const MAX_RELEASE: usize = 64;
/// Bytes of a chunk that are looked at again before the next: a mark may lie across.
const TAIL: usize = BANNER.len() + MAX_RELEASE + 1;
/// Address and presence in an entry; the others may differ between tables that map the same.
const ENTRY: u64 = 0x000f_ffff_ffff_f001;
/// Half a table: where the kernel's own part begins, in bytes and in entries.
const HALF: usize = PAGE_SIZE / 2;
/// Entries of the kernel's half that a process may have for itself (its local descriptor table, under page-table isolation).
const OWN_ENTRIES: usize = 2;

/// What the window holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Image {
    /// In order.
    pub(super) stretches: Vec<Stretch>,
}

/// Places in an image, each in order of address.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Marks {
    /// What looks like the beginning of type information.
    pub(super) types: Vec<Gva>,
    /// The name of the first idle task, not all of which are in a task.
    pub(super) idle_names: Vec<Gva>,
    /// The kernel's own root table (`swapper_pg_dir`): maps what the given one maps in the kernel's half, and nothing in the other.
    pub(super) root: Option<Gpa>,
    /// What the kernel says that it is: `6.12.117+deb12-cloud-amd64`.
    pub(super) release: Option<String>,
}

impl Image {
    /// What is mapped where a kernel would be; none if that is nothing.
    pub(super) fn of(space: &Virtual<'_>) -> Result<Option<Self>, ReadError> {
        let stretches = space.present(WINDOW)?;
        Ok((!stretches.is_empty()).then_some(Self { stretches }))
    }

    /// Its first address: that of the symbol `_text`.
    pub(super) fn start(&self) -> Gva {
        self.stretches.first().map_or(Gva(*WINDOW.end()), |stretch| stretch.start)
    }

    /// How many bytes are mapped without a gap from `address` on.
    pub(super) fn bytes_from(&self, address: Gva) -> u64 {
        let mut end = address.0;
        for stretch in &self.stretches {
            // The window ends before the last address: nothing overflows.
            if (stretch.start.0..stretch.start.0 + stretch.bytes).contains(&end) {
                end = stretch.start.0 + stretch.bytes;
            }
        }
        end - address.0
    }

    /// Looks through all of it. `space` is what it was found in. What cannot be read is left out: a guest may map there what it likes.
    pub(super) fn marks(&self, space: &Virtual<'_>) -> Result<Marks, ReadError> {
        let kernel_half = KernelHalf::of(space)?;
        let mut marks = Marks::default();
        let mut buffer: Vec<u8> = Vec::with_capacity(CHUNK + TAIL);
        let (mut next, mut left) = (0, MAX_BYTES);
        for stretch in &self.stretches {
            let mut done = 0;
            while done < stretch.bytes.min(left) {
                let address = stretch.start.0 + done;
                // Chunks are whole pages, so that tables are whole.
                let bytes = (stretch.bytes - done).min(CHUNK as u64) as usize;
                let kept = if address == next { buffer.len().min(TAIL) } else { 0 };
                buffer.drain(..buffer.len() - kept);
                buffer.resize(kept + bytes, 0);
                let at = Gpa(stretch.at.0 + done);
                match space.physical().read(at, &mut buffer[kept..]) {
                    Ok(()) => {
                        find(&buffer, TYPES, |found| note(&mut marks.types, address - kept as u64 + found as u64));
                        find(&buffer, IDLE, |found| {
                            if is_idle_name(&buffer[found..]) {
                                note(&mut marks.idle_names, address - kept as u64 + found as u64);
                            }
                        });
                        if marks.release.is_none() {
                            find(&buffer, BANNER, |found| {
                                marks.release = marks.release.take().or_else(|| release(&buffer[found..]));
                            });
                        }
                        if marks.root.is_none() {
                            let pages = buffer[kept..].chunks_exact(PAGE_SIZE);
                            let root = pages.enumerate().find(|(_, page)| kernel_half.is_root_of_kernel(page));
                            marks.root = root.map(|(index, _)| Gpa(at.0 + (index * PAGE_SIZE) as u64));
                        }
                        next = address + bytes as u64;
                    }
                    Err(ReadError::Unmapped) => buffer.clear(),
                    Err(error) => return Err(error),
                }
                done += bytes as u64;
            }
            left = left.saturating_sub(stretch.bytes);
        }
        Ok(marks)
    }
}

/// The entries of the given root table that every process has.
struct KernelHalf(Vec<u64>);

impl KernelHalf {
    fn of(space: &Virtual<'_>) -> Result<Self, ReadError> {
        let mut table = [0; PAGE_SIZE];
        space.physical().read(space.root(), &mut table)?;
        Ok(Self(entries(&table[HALF..]).collect()))
    }

    fn is_root_of_kernel(&self, page: &[u8]) -> bool {
        // The last maps the image itself.
        let last = entries(&page[PAGE_SIZE - 8..]).next();
        last == self.0.last().copied()
            && page[..HALF].iter().all(|&byte| byte == 0)
            && entries(&page[HALF..]).zip(&self.0).filter(|(one, other)| one != *other).count() <= OWN_ENTRIES
    }
}

/// Addresses that a table's bytes lead to.
fn entries(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).map(|entry| u64::from_le_bytes(entry.try_into().unwrap_or_default()) & ENTRY)
}

/// Whether two root tables are the pair of a process under page-table isolation: the same programs, mapped once for the kernel and once for
/// themselves (arch/x86/include/asm/pgtable.h, `kernel_to_user_pgdp`).
pub(super) fn are_twins(reader: &Reader<'_>, one: Gpa, other: Gpa) -> Result<bool, ReadError> {
    let (mut first, mut second) = ([0; HALF], [0; HALF]);
    reader.read_many(&mut [(one, &mut first), (other, &mut second)])?;
    Ok(first.iter().any(|&byte| byte != 0) && entries(&first).eq(entries(&second)))
}

/// `swapper`, or `swapper/0`, closed by a zero.
fn is_idle_name(bytes: &[u8]) -> bool {
    let rest = &bytes[IDLE.len()..];
    rest.starts_with(b"\0") || rest.starts_with(b"/0\0")
}

/// What a banner says: a word of printable ASCII that begins with a digit, as `uname -r` prints it.
fn release(banner: &[u8]) -> Option<String> {
    let word = banner[BANNER.len()..].iter().take(MAX_RELEASE + 1);
    let word: String = word.take_while(|byte| byte.is_ascii_graphic()).map(|&byte| char::from(byte)).collect();
    let ends = banner.get(BANNER.len() + word.len()) == Some(&b' ');
    (ends && word.starts_with(|c: char| c.is_ascii_digit())).then_some(word)
}

fn find(bytes: &[u8], wanted: &[u8], mut found: impl FnMut(usize)) {
    let mut at = 0;
    while let Some(offset) = bytes[at..].iter().position(|&byte| byte == wanted[0]) {
        at += offset;
        if bytes[at..].starts_with(wanted) {
            found(at);
        }
        at += 1;
    }
}

/// Keeps a place, unless it was found before at the end of the last chunk.
fn note(places: &mut Vec<Gva>, address: u64) {
    if places.len() < MAX_MARKS && places.last().is_none_or(|last| last.0 < address) {
        places.push(Gva(address));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_os::paging::Levels;
    use crate::guest_os::testing::{GuestRam, Tables};

    #[test]
    fn marks_are_found_across_chunks_and_pages_and_only_once() {
        let ram = GuestRam::new(8 << 20);
        let mut tables = Tables::new(Gpa(0x10000), Levels::Four);
        let base = *WINDOW.start() + (16 << 20);
        // A large page, and behind it small ones that lie elsewhere, in the wrong order.
        tables.map(&ram, base, 2 << 20, 2 << 20);
        tables.map(&ram, base + (2 << 20), 0x6000, 4096);
        tables.map(&ram, base + (2 << 20) + 4096, 0x5000, 4096);
        // In no RAM, and behind that again in some.
        tables.map(&ram, base + (2 << 20) + 8192, 1 << 40, 4096);
        tables.map(&ram, base + (2 << 20) + 12288, 0x7000, 4096);
        let put = |ram: &GuestRam, at: u64, bytes: &[u8]| {
            for (index, byte) in bytes.iter().enumerate() {
                let reader = Reader::new(ram, 1 << 20);
                let at = Virtual::new(&reader, tables.root, Levels::Four).translate(Gva(at + index as u64)).unwrap();
                ram.write(at.0, &[*byte]);
            }
        };
        let names = [base + 64, base + (1 << 20) - 32, base + (2 << 20) - 3, base + (2 << 20) + 4092];
        for at in names {
            put(&ram, at, b"swapper/0\0");
        }
        put(&ram, base + 128, b"swapper\0");
        put(&ram, base + 192, b"swapper/1\0swappers");
        put(&ram, base + (2 << 20) - 2, &[0x9f, 0xeb, 1, 0]);
        // In a format, without an end, and right.
        put(&ram, base + 256, b"Linux version %s (x)\0Linux version 5.4.0");
        put(&ram, base + (1 << 20) - 20, b"Linux version 6.1.0-9-amd64 (x)");
        let reader = Reader::new(&ram, 64 << 20);
        let space = Virtual::new(&reader, tables.root, Levels::Four);
        let image = Image::of(&space).unwrap().unwrap();
        assert_eq!((image.start(), image.stretches.len()), (Gva(base), 5));
        assert_eq!(image.bytes_from(Gva(base + 1)), (2 << 20) + 4 * 4096 - 1);
        assert_eq!(image.bytes_from(Gva(base - 1)), 0);
        let marks = image.marks(&space).unwrap();
        // The last of the names was overwritten by the type information.
        let mut wanted = vec![Gva(base + 64), Gva(base + 128), Gva(names[1]), Gva(names[3])];
        wanted.sort();
        assert_eq!(marks.idle_names, wanted);
        assert_eq!(marks.release.as_deref(), Some("6.1.0-9-amd64"));
        assert_eq!((marks.types, marks.root), (vec![Gva(base + (2 << 20) - 2)], None));
    }
}
