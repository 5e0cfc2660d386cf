//! Page faults of another process, taken by this one: userfaultfd on shared memory (Documentation/admin-guide/mm/userfaultfd.rst, include/uapi/linux/userfaultfd.h).
//!
//! Owns the descriptor and its requests. The machine's process registers its mapping of guest RAM; its manager, which maps the same file elsewhere, fills pages there and
//! has them mapped where they are missed. A page that is in the file but not mapped faults as one that is not in the file does, so nothing need be punched out. Must not
//! know which pages are whose.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::bitmap::SharedBitmap;
use crate::model::{PAGE_SIZE, PageCount, PageRun};
use crate::port::{FaultError, Faults};

const API: u64 = 0xaa;
const FEATURE_MISSING_HUGETLB: u64 = 1 << 4;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const FEATURE_MINOR_HUGETLB: u64 = 1 << 9;
const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
const MODE_MISSING: u64 = 1 << 0;
const MODE_MINOR: u64 = 1 << 2;
const EVENT_PAGEFAULT: u8 = 0x12;
/// `struct uffd_msg`: its length; the event's kind is its first byte, and of a fault the address lies here.
const MESSAGE_BYTES: usize = 32;
const ADDRESS_AT: usize = 16;
/// Events taken with one read.
const MOST_EVENTS: usize = 64;

/// `_IOC` of asm-generic/ioctl.h: direction, size, type, number.
const fn request(direction: u64, size: usize, number: u64) -> u64 {
    direction << 30 | (size as u64) << 16 | API << 8 | number
}

const READ: u64 = 2;
const READ_WRITE: u64 = 3;
const UFFDIO_API: u64 = request(READ_WRITE, size_of::<ApiArgument>(), 0x3f);
const UFFDIO_REGISTER: u64 = request(READ_WRITE, size_of::<RegisterArgument>(), 0x00);
const UFFDIO_UNREGISTER: u64 = request(READ, size_of::<Range>(), 0x01);
const UFFDIO_WAKE: u64 = request(READ, size_of::<Range>(), 0x02);
const UFFDIO_ZEROPAGE: u64 = request(READ_WRITE, size_of::<FillArgument>(), 0x04);
const UFFDIO_CONTINUE: u64 = request(READ_WRITE, size_of::<FillArgument>(), 0x07);

#[repr(C)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct RegisterArgument {
    range: Range,
    mode: u64,
    ioctls: u64,
}

/// `uffdio_zeropage` and `uffdio_continue` are alike.
#[repr(C)]
struct FillArgument {
    range: Range,
    mode: u64,
    filled: i64,
}

/// Part of a memory file as the machine's process has it mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MappedAt {
    /// Its pages of the file.
    pub first_page: u64,
    /// How many.
    pub pages: u64,
    /// The address of the first in the machine's process.
    pub address: u64,
}

/// Faults at the mappings of one file in one process, and which of its pages are here.
#[derive(Debug)]
pub struct UserFaults {
    fd: OwnedFd,
    mapped: Vec<MappedAt>,
    /// Which pages are here.
    here: SharedBitmap,
    /// Pages that are mapped together.
    block_pages: u64,
}

/// The pages up to the last that is mapped.
fn pages_of(mapped: &[MappedAt]) -> PageCount {
    PageCount(mapped.iter().map(|part| part.first_page + part.pages).max().unwrap_or(0))
}

impl UserFaults {
    /// The machine's process: registers its own mappings, of a file whose pages are mapped in blocks of so many (1, or 512 where they are huge). From now on it waits wherever it
    /// meets a page that is not mapped.
    ///
    /// # Errors
    /// A kernel without userfaultfd for shared memory (Linux 5.13), or without the permission.
    pub fn register(mapped: Vec<MappedAt>, block_pages: u64) -> io::Result<Self> {
        // SAFETY: takes flags, returns a new descriptor or an error.
        let number = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, and owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(number as i32) };
        let here = SharedBitmap::named("dunlin-here", pages_of(&mapped))?;
        let faults = Self { fd, mapped, here, block_pages };
        let features = match block_pages {
            1 => FEATURE_MISSING_SHMEM | FEATURE_MINOR_SHMEM,
            _ => FEATURE_MISSING_HUGETLB | FEATURE_MINOR_HUGETLB,
        };
        faults.ask(UFFDIO_API, &mut ApiArgument { api: API, features, ioctls: 0 })?;
        for part in &faults.mapped {
            let range = Range { start: part.address, len: part.pages * PAGE_SIZE as u64 };
            let mode = MODE_MISSING | MODE_MINOR;
            faults.ask(UFFDIO_REGISTER, &mut RegisterArgument { range, mode, ioctls: 0 })?;
        }
        Ok(faults)
    }

    /// The manager: what a machine's process has registered and handed over: where, the descriptor of faults, and the file of marks.
    ///
    /// # Errors
    /// A file that is too short for the marks.
    pub fn adopt(fd: OwnedFd, here_file: OwnedFd, mapped: Vec<MappedAt>, block_pages: u64) -> io::Result<Self> {
        let here = SharedBitmap::open(here_file, pages_of(&mapped))?;
        Ok(Self { fd, mapped, here, block_pages })
    }

    /// The descriptors, for handing over: of faults, and of marks.
    pub fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.fd.as_fd(), self.here.as_fd()]
    }

    /// Where.
    pub fn mapped(&self) -> &[MappedAt] {
        &self.mapped
    }

    fn ask<T>(&self, request: u64, argument: &mut T) -> io::Result<()> {
        // SAFETY: the argument is the structure that the request's number names, alive and exclusive for the duration of the call. What is mapped by it is pages
        // of the registered file at the place where they belong.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), request as _, std::ptr::from_mut(argument)) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The parts of a run by where they are mapped.
    fn ranges(&self, run: PageRun) -> impl Iterator<Item = Range> + '_ {
        self.mapped.iter().filter_map(move |part| {
            let first = run.first.0.max(part.first_page);
            let end = run.end().min(part.first_page + part.pages);
            (first < end).then(|| Range {
                start: part.address + (first - part.first_page) * PAGE_SIZE as u64,
                len: (end - first) * PAGE_SIZE as u64,
            })
        })
    }

    /// Fills a range by `request`; pages that are mapped already are left as they are.
    fn fill(&self, request: u64, range: Range) -> Result<(), FaultError> {
        let page = self.block_pages * PAGE_SIZE as u64;
        let mut left = range;
        while left.len > 0 {
            let mut argument = FillArgument { range: left, mode: 0, filled: 0 };
            let error = match self.ask(request, &mut argument) {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let filled = argument.filled.max(0) as u64;
            left = Range { start: left.start + filled, len: left.len.saturating_sub(filled) };
            match error.raw_os_error() {
                Some(libc::EAGAIN) => {}
                Some(libc::EEXIST) => {
                    // Mapped already; somebody may have begun to wait before it was.
                    let mut one = Range { start: left.start, len: page.min(left.len) };
                    self.ask(UFFDIO_WAKE, &mut one).map_err(FaultError::Io)?;
                    left = Range { start: left.start + page, len: left.len.saturating_sub(page) };
                }
                Some(libc::EFAULT) => return Err(FaultError::NotThere),
                Some(libc::ESRCH) => return Err(FaultError::Gone),
                _ => return Err(FaultError::Io(error)),
            }
        }
        Ok(())
    }
}

impl Faults for UserFaults {
    fn next(&self, pages: &mut Vec<u64>, timeout: Duration) -> Result<(), FaultError> {
        pages.clear();
        let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
        match poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(FaultError::Io(error.into())),
        }
        let mut bytes = [0u8; MOST_EVENTS * MESSAGE_BYTES];
        let read = match rustix::io::read(&self.fd, &mut bytes[..]) {
            Ok(0) => return Err(FaultError::Gone),
            Ok(read) => read,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(FaultError::Io(error.into())),
        };
        for event in bytes[..read].chunks_exact(MESSAGE_BYTES) {
            let address = u64::from_le_bytes(std::array::from_fn(|index| event[ADDRESS_AT + index]));
            if event[0] != EVENT_PAGEFAULT {
                continue;
            }
            let part = self
                .mapped
                .iter()
                .find(|part| (part.address..part.address + part.pages * PAGE_SIZE as u64).contains(&address));
            if let Some(part) = part {
                pages.push(part.first_page + (address - part.address) / PAGE_SIZE as u64);
            }
        }
        Ok(())
    }

    fn block_pages(&self) -> u64 {
        self.block_pages
    }

    fn map(&self, run: PageRun) -> Result<(), FaultError> {
        self.ranges(run).try_for_each(|range| self.fill(UFFDIO_CONTINUE, range))
    }

    fn map_zero(&self, run: PageRun) -> Result<(), FaultError> {
        self.ranges(run).try_for_each(|range| self.fill(UFFDIO_ZEROPAGE, range))
    }

    fn here(&self) -> &[AtomicU64] {
        self.here.words()
    }

    fn end(&self) -> Result<(), FaultError> {
        for part in &self.mapped {
            let mut range = Range { start: part.address, len: part.pages * PAGE_SIZE as u64 };
            match self.ask(UFFDIO_UNREGISTER, &mut range) {
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Err(FaultError::Gone),
                other => other.map_err(FaultError::Io)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::shm::{Mapping, ram_file};

    const PAGES: u64 = 1024;

    /// A process' mapping that is registered, and the manager's.
    fn two() -> (Mapping, Mapping, UserFaults) {
        let file = ram_file(PAGES * PAGE_SIZE as u64).unwrap();
        let bytes = PAGES as usize * PAGE_SIZE;
        let (guest, ours) = (Mapping::of(&file, bytes).unwrap(), Mapping::of(&file, bytes).unwrap());
        let part = MappedAt { first_page: 0, pages: PAGES, address: guest.as_ptr() as u64 };
        let faults = UserFaults::register(vec![part], 1).unwrap();
        (guest, ours, faults)
    }

    fn fault(faults: &UserFaults) -> u64 {
        let mut pages = Vec::new();
        while pages.is_empty() {
            faults.next(&mut pages, Duration::from_secs(5)).unwrap();
        }
        assert_eq!(pages.len(), 1);
        pages[0]
    }

    #[test]
    fn a_page_is_waited_for_and_is_there_without_a_copy() {
        let (guest, ours, faults) = two();
        let read = |page: u64| guest.bytes()[page as usize * PAGE_SIZE].load(Ordering::Relaxed);
        std::thread::scope(|scope| {
            // Not in the file, in the file but not mapped, and zero.
            let waiting = scope.spawn(|| [read(700), read(3), read(900)]);
            assert_eq!(fault(&faults), 700);
            ours.bytes()[700 * PAGE_SIZE].store(7, Ordering::Relaxed);
            faults.map(PageRun::new(700, 1)).unwrap();
            assert_eq!(fault(&faults), 3);
            ours.bytes()[3 * PAGE_SIZE].store(9, Ordering::Relaxed);
            faults.map(PageRun::new(3, 1)).unwrap();
            assert_eq!(fault(&faults), 900);
            faults.map_zero(PageRun::new(900, 1)).or_else(|_| faults.map(PageRun::new(900, 1))).unwrap();
            assert_eq!(waiting.join().unwrap(), [7, 9, 0]);
        });
        // A run of which a part is mapped already.
        ours.bytes()[701 * PAGE_SIZE].store(8, Ordering::Relaxed);
        ours.bytes()[702 * PAGE_SIZE].store(8, Ordering::Relaxed);
        faults.map(PageRun::new(700, 3)).unwrap();
        assert_eq!([read(701), read(702)], [8, 8]);
        // Afterwards nobody waits.
        faults.end().unwrap();
        assert_eq!(read(1000), 0);
    }
}
