//! One virtqueue: the guest's rings, walked so that nothing a guest writes there can hurt the host.
//!
//! Owns the checks of ring addresses, the walk of descriptor chains, and notification suppression (virtio 1.2, 2.7).
//! Ring layout is parsed by `virtio-queue`. Must not know what a request means, nor the transport's registers.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::kvm::memory::{DirtyMarks, GuestRam};

/// Descriptors that one chain may have. What a driver needs at most is `seg_max + 2`; beyond this limit a chain is
/// malformed, so one chain is a bounded piece of work.
pub(super) const MAX_CHAIN_DESCRIPTORS: usize = 256;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (virtio 1.2, 2.7.6).
const AVAIL_NO_INTERRUPT: u16 = 1;

/// Guest memory with its dirty marks.
pub(super) type RamSlice<'m> = VolatileSlice<'m, DirtyMarks>;

/// A queue's rings are broken: the device cannot go on until the driver resets it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RingFault {
    /// Size of zero, not a power of two, or above the maximum (virtio 1.2, 2.7).
    #[error("queue size {0} is not a power of two between 1 and {1}")]
    Size(u32, u16),
    /// A part of the queue is misaligned (virtio 1.2, 2.7), at address zero, or not all in RAM.
    #[error("the {part} at {address:#x} ({bytes} bytes) is misaligned or not in guest memory")]
    Place {
        /// Which part.
        part: &'static str,
        /// Where the driver put it.
        address: u64,
        /// How long it would be.
        bytes: u64,
    },
    /// The available index ran further ahead than the queue is long.
    #[error("the available ring cannot be read: {0}")]
    Available(String),
    /// An entry of the available ring names no descriptor.
    #[error("available descriptor {0} is outside the table of {1}")]
    Head(u16, u16),
    /// The used ring cannot be written.
    #[error("the used ring cannot be written: {0}")]
    Used(String),
    /// A saved position that no queue of this size can have.
    #[error("positions {next_avail} and {next_used} cannot both be of a queue of {size}")]
    Position {
        /// Where the device reads next.
        next_avail: u16,
        /// Where the device writes next.
        next_used: u16,
        /// The queue's size.
        size: u32,
    },
}

/// Why one chain is dropped; the queue goes on.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum ChainFault {
    /// The chain loops, names a descriptor outside its table, or its indirect table is malformed.
    #[error("a descriptor chain loops or leaves its table")]
    Broken,
    /// More than [`MAX_CHAIN_DESCRIPTORS`].
    #[error("a descriptor chain is longer than {MAX_CHAIN_DESCRIPTORS}")]
    TooLong,
    /// A buffer lies outside RAM.
    #[error("a descriptor points outside guest memory")]
    OutsideRam,
    /// A buffer for reading follows one for writing (virtio 1.2, 2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    Order,
}

/// Where the driver put a queue, as it wrote it: unchecked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Geometry {
    /// Entries.
    pub size: u32,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring (the "driver area").
    pub available: u64,
    /// Guest-physical address of the used ring (the "device area").
    pub used: u64,
}

impl Geometry {
    /// Whether a queue can lie there: size, alignment (16, 2, 4), all of it in RAM. Lengths as of virtio 1.2, 2.7:
    /// `16 n`, `6 + 2 n`, `6 + 8 n` bytes.
    ///
    /// # Errors
    /// The first rule it breaks.
    pub fn check(&self, max_size: u16, ram: &GuestRam) -> Result<(), RingFault> {
        if !self.size.is_power_of_two() || self.size > u32::from(max_size) {
            return Err(RingFault::Size(self.size, max_size));
        }
        let n = u64::from(self.size);
        for (part, address, align, bytes) in [
            ("descriptor table", self.descriptors, 16, 16 * n),
            ("available ring", self.available, 2, 6 + 2 * n),
            ("used ring", self.used, 4, 6 + 8 * n),
        ] {
            let in_ram = GuestMemoryBackend::check_range(ram, GuestAddress(address), bytes as usize);
            if address == 0 || !address.is_multiple_of(align) || !in_ram {
                return Err(RingFault::Place { part, address, bytes });
            }
        }
        Ok(())
    }
}

/// A run of buffers of one chain, all readable or all writable, seen as one string of bytes (virtio 1.2, 2.7.4: a
/// device must not depend on where the driver cut it).
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    slices: Vec<RamSlice<'m>>,
    places: Vec<Place>,
    len: usize,
}

/// Where in guest-physical space a buffer lies: all of it in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its first byte.
    pub address: u64,
    /// Its length.
    pub bytes: u64,
}

impl<'m> Buffers<'m> {
    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is not one byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the buffers lie, one entry a descriptor: for requests that are about the memory itself.
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// The part `[offset, offset + len)`, cut off where the buffers end.
    pub fn part(&self, offset: usize, len: usize) -> Vec<RamSlice<'m>> {
        let (mut skip, mut rest) = (offset, len);
        let mut part = Vec::with_capacity(self.slices.len());
        for slice in &self.slices {
            let begin = skip.min(slice.len());
            let take = rest.min(slice.len() - begin);
            skip -= begin;
            rest -= take;
            if take > 0
                && let Ok(piece) = slice.subslice(begin, take)
            {
                part.push(piece);
            }
        }
        part
    }

    /// Copies bytes out; false if there are fewer than asked for.
    pub fn read(&self, offset: usize, mut into: &mut [u8]) -> bool {
        for slice in self.part(offset, into.len()) {
            let taken = slice.copy_to(into);
            into = &mut into[taken..];
        }
        into.is_empty()
    }

    /// Copies bytes in and marks their pages; false if they do not all fit.
    pub fn write(&self, offset: usize, mut from: &[u8]) -> bool {
        for slice in self.part(offset, from.len()) {
            let (now, later) = from.split_at(slice.len());
            slice.copy_from(now);
            from = later;
        }
        from.is_empty()
    }

    fn push(&mut self, ram: &'m GuestRam, address: GuestAddress, len: usize) -> Result<(), ChainFault> {
        for slice in GuestMemoryBackend::get_slices(ram, address, len) {
            self.slices.push(slice.map_err(|_| ChainFault::OutsideRam)?);
        }
        self.places.push(Place { address: address.0, bytes: len as u64 });
        self.len += len;
        Ok(())
    }
}

/// Marks the pages of the first `written` bytes of `slices`. For bytes that a system call put there: those that a copy
/// put there are marked already.
pub(super) fn mark_written(slices: &[RamSlice<'_>], mut written: usize) {
    use vm_memory::bitmap::Bitmap;
    for slice in slices {
        let here = written.min(slice.len());
        slice.bitmap().mark_dirty(0, here);
        written -= here;
    }
}

/// One request of the driver: what the device may read, then what it may write.
#[derive(Debug)]
pub struct Chain<'m> {
    /// Its number, for [`Ring::complete`].
    pub head: u16,
    /// What the driver wrote for the device.
    pub readable: Buffers<'m>,
    /// Where the device answers.
    pub writable: Buffers<'m>,
}

/// What the available ring holds next.
#[derive(Debug)]
pub enum Popped<'m> {
    /// Nothing.
    Empty,
    /// A request.
    Chain(Chain<'m>),
    /// A request that makes no sense; complete it with length zero and go on.
    Malformed(u16, ChainFault),
}

/// A queue that the driver made ready.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    /// Whether the driver was last told to notify; `None` until told anything.
    wants_notification: Option<bool>,
    /// Completed since the last look at whether to interrupt.
    completed: bool,
}

impl Ring {
    /// The queue at `geometry`, going on at the given positions of the two rings.
    ///
    /// # Errors
    /// A geometry or positions that no queue can have.
    pub fn new(
        geometry: Geometry,
        max_size: u16,
        event_idx: bool,
        next_avail: u16,
        next_used: u16,
        ram: &GuestRam,
    ) -> Result<Self, RingFault> {
        geometry.check(max_size, ram)?;
        // In flight is what was taken and not yet answered: never more than the queue holds.
        if u32::from(next_avail.wrapping_sub(next_used)) > geometry.size {
            return Err(RingFault::Position { next_avail, next_used, size: geometry.size });
        }
        let refused = |_| RingFault::Size(geometry.size, max_size);
        let mut queue = Queue::new(max_size).map_err(refused)?;
        queue.try_set_size(geometry.size as u16).map_err(refused)?;
        queue.try_set_desc_table_address(GuestAddress(geometry.descriptors)).map_err(refused)?;
        queue.try_set_avail_ring_address(GuestAddress(geometry.available)).map_err(refused)?;
        queue.try_set_used_ring_address(GuestAddress(geometry.used)).map_err(refused)?;
        queue.set_event_idx(event_idx);
        queue.set_next_avail(next_avail);
        queue.set_next_used(next_used);
        queue.set_ready(true);
        Ok(Self { queue, wants_notification: None, completed: false })
    }

    /// Where the device reads the available ring next (free-running).
    pub fn next_avail(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Where the device writes the used ring next (free-running).
    pub fn next_used(&self) -> u16 {
        self.queue.next_used()
    }

    /// Takes the next request.
    ///
    /// # Errors
    /// The available ring makes no sense; nothing was taken.
    pub fn pop<'m>(&mut self, ram: &'m GuestRam) -> Result<Popped<'m>, RingFault> {
        let next = self.queue.iter(ram).map_err(|e| RingFault::Available(e.to_string()))?.next();
        let Some(descriptors) = next else { return Ok(Popped::Empty) };
        let head = descriptors.head_index();
        if head >= self.queue.size() {
            self.put_back();
            return Err(RingFault::Head(head, self.queue.size()));
        }
        match collect(head, descriptors, ram) {
            Ok(chain) => Ok(Popped::Chain(chain)),
            Err(fault) => Ok(Popped::Malformed(head, fault)),
        }
    }

    /// Undoes the last [`Ring::pop`]: the request stays the driver's, and whoever owns the VM next serves it.
    pub fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a request back, the first `written` bytes of its writable part filled.
    ///
    /// # Errors
    /// The used ring is not in RAM (which [`Ring::new`] had excluded).
    pub fn complete(&mut self, ram: &GuestRam, head: u16, written: u32) -> Result<(), RingFault> {
        self.completed = true;
        self.queue.add_used(ram, head, written).map_err(|e| RingFault::Used(e.to_string()))
    }

    /// Asks the driver not to notify: the device looks by itself.
    ///
    /// # Errors
    /// As for [`Ring::complete`].
    pub fn silence(&mut self, ram: &GuestRam) -> Result<(), RingFault> {
        if self.wants_notification != Some(false) {
            self.wants_notification = Some(false);
            self.queue.disable_notification(ram).map_err(|e| RingFault::Used(e.to_string()))?;
        }
        Ok(())
    }

    /// Asks the driver to notify of the next request. True if one came in the meantime: look again.
    ///
    /// # Errors
    /// As for [`Ring::complete`].
    pub fn listen(&mut self, ram: &GuestRam) -> Result<bool, RingFault> {
        self.wants_notification = Some(true);
        self.queue.enable_notification(ram).map_err(|e| RingFault::Used(e.to_string()))
    }

    /// Whether the driver wants an interrupt for what was completed since this was last asked (virtio 1.2, 2.7.7.2).
    ///
    /// # Errors
    /// As for [`Ring::complete`].
    pub fn interrupt_due(&mut self, ram: &GuestRam) -> Result<bool, RingFault> {
        if !std::mem::take(&mut self.completed) {
            return Ok(false);
        }
        let due = self.queue.needs_notification(ram).map_err(|e| RingFault::Used(e.to_string()))?;
        if self.queue.event_idx_enabled() {
            return Ok(due);
        }
        let flags: u16 = ram
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(|e| RingFault::Available(e.to_string()))?;
        Ok(u16::from_le(flags) & AVAIL_NO_INTERRUPT == 0)
    }
}

fn collect<'m>(
    head: u16,
    descriptors: virtio_queue::DescriptorChain<&'m GuestRam>,
    ram: &'m GuestRam,
) -> Result<Chain<'m>, ChainFault> {
    let mut chain = Chain { head, readable: Buffers::default(), writable: Buffers::default() };
    // The iterator ends silently where a chain breaks: then the last descriptor it gave says that another follows.
    let mut open = true;
    let mut seen_writable = false;
    for (index, descriptor) in descriptors.enumerate() {
        if index == MAX_CHAIN_DESCRIPTORS {
            return Err(ChainFault::TooLong);
        }
        open = descriptor.has_next();
        let buffers = if descriptor.is_write_only() {
            seen_writable = true;
            &mut chain.writable
        } else if seen_writable {
            return Err(ChainFault::Order);
        } else {
            &mut chain.readable
        };
        buffers.push(ram, descriptor.addr(), descriptor.len() as usize)?;
    }
    if open { Err(ChainFault::Broken) } else { Ok(chain) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::bus::MmioDevice;
    use crate::kvm::memory::{HIGH_RAM_START, HOLE_START, Memory, MemoryOptions};
    use crate::kvm::virtio::driver::{Descriptor, Driver, NEXT, Piece, WRITE};
    use crate::model::PageBitmap;

    /// `VIRTQ_DESC_F_INDIRECT`.
    const INDIRECT: u16 = 4;
    const SIZE: u16 = 8;

    /// The driver of these tests writes rings only.
    struct NoDevice;

    impl MmioDevice for NoDevice {
        fn read(&self, _: u64, _: &mut [u8]) {}

        fn write(&self, _: u64, _: &[u8]) {}
    }

    fn geometry() -> Geometry {
        let [descriptors, available, used] = Driver::place(0);
        Geometry { size: SIZE.into(), descriptors, available, used }
    }

    fn memory(bytes: u64) -> Memory {
        Memory::new(bytes, MemoryOptions { huge_pages: false }).unwrap()
    }

    fn with_ring(test: impl FnOnce(&mut Driver<'_>, &mut Ring, &Memory)) {
        let memory = memory(HOLE_START + (1 << 20));
        let mut driver = Driver::new(&NoDevice, memory.ram(), 1, SIZE);
        let mut ring = Ring::new(geometry(), SIZE, false, 0, 0, memory.ram()).unwrap();
        test(&mut driver, &mut ring, &memory);
    }

    #[test]
    fn queues_that_cannot_be_are_refused() {
        let memory = memory(HOLE_START + (1 << 20));
        let end = HIGH_RAM_START + (1 << 20);
        let good = geometry();
        assert_eq!(good.check(SIZE, memory.ram()), Ok(()));
        for size in [0, 3, 16, 7, 0x1_0008, u32::MAX] {
            let bad = Geometry { size, ..good };
            assert_eq!(bad.check(SIZE, memory.ram()), Err(RingFault::Size(size, SIZE)));
        }
        // Nowhere, misaligned, into the hole, up to the end and one too far, around the end of the address space.
        for address in [0, 1, 0x1001, HOLE_START - 2, HOLE_START, 0xd000_0000, end - 2, end, u64::MAX - 15, !15] {
            for bad in [
                Geometry { descriptors: address, ..good },
                Geometry { available: address, ..good },
                Geometry { used: address, ..good },
            ] {
                assert!(matches!(bad.check(SIZE, memory.ram()), Err(RingFault::Place { .. })), "{bad:x?}");
                assert!(Ring::new(bad, SIZE, true, 0, 0, memory.ram()).is_err());
            }
        }
        let last = Geometry { descriptors: end - 16 * 8, ..good };
        assert_eq!(last.check(SIZE, memory.ram()), Ok(()));
    }

    #[test]
    fn positions_wrap_and_must_belong_together() {
        let memory = memory(1 << 20);
        for (next_avail, next_used, fits) in
            [(0, 0, true), (8, 0, true), (3, 0xffff, true), (9, 0, false), (0, 1, false), (8, 0xffff, false)]
        {
            let ring = Ring::new(geometry(), SIZE, false, next_avail, next_used, memory.ram());
            assert_eq!(ring.is_ok(), fits, "{next_avail} {next_used}");
        }
    }

    fn fault(ring: &mut Ring, memory: &Memory) -> ChainFault {
        match ring.pop(memory.ram()).unwrap() {
            Popped::Malformed(_, fault) => fault,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn chains_that_make_no_sense_are_named_and_the_queue_goes_on() {
        with_ring(|driver, ring, memory| {
            let to = |next| Descriptor { address: 0x20_0000, len: 16, flags: NEXT, next };
            // 0 → 1 → 0.
            driver.describe(0, 0, to(1));
            driver.describe(0, 1, to(0));
            driver.publish(0, 0);
            assert_eq!(fault(ring, memory), ChainFault::Broken);
            // Past the table.
            driver.describe(0, 0, to(SIZE));
            driver.publish(0, 0);
            assert_eq!(fault(ring, memory), ChainFault::Broken);
            let cases: [(&[Piece], _); 6] = [
                (&[(HOLE_START, 1, false)], ChainFault::OutsideRam),
                (&[(HOLE_START - 8, 9, true)], ChainFault::OutsideRam),
                (&[(u64::MAX, 2, false)], ChainFault::OutsideRam),
                (&[(0x1000, u32::MAX, false)], ChainFault::OutsideRam),
                (&[(0x1000, 1, true), (0x2000, 1, false)], ChainFault::Order),
                // More than 2^32 bytes.
                (&[(0x1000, 1 << 31, false), (0x1000, 1 << 31, false)], ChainFault::Broken),
            ];
            for (index, (pieces, expected)) in cases.into_iter().enumerate() {
                driver.post(0, pieces);
                assert_eq!(fault(ring, memory), expected, "case {index}");
            }
            driver.post(0, &[(0x1000, 4, false), (0xffff_ffff_0000, 0, false), (0x2000, 4, true)]);
            let Popped::Chain(chain) = ring.pop(memory.ram()).unwrap() else { panic!("a good chain was refused") };
            assert_eq!((chain.readable.len(), chain.writable.len()), (4, 4));
            assert!(matches!(ring.pop(memory.ram()), Ok(Popped::Empty)));
        });
    }

    #[test]
    fn indirect_tables_are_followed_and_bounded() {
        with_ring(|driver, ring, memory| {
            let table = |at: u64, entries: u32, flags: fn(u32) -> u16| {
                for n in 0..entries {
                    let raw = 0x20_0000 | 16u128 << 64 | u128::from(flags(n)) << 96 | u128::from(n + 1) << 112;
                    memory.ram().write_slice(&raw.to_le_bytes(), GuestAddress(at + 16 * u64::from(n))).unwrap();
                }
                Descriptor { address: at, len: 16 * entries, flags: INDIRECT, next: 0 }
            };
            let good = table(0x30_0000, 256, |n| if n == 255 { WRITE } else { NEXT });
            let long = table(0x40_0000, 257, |n| if n == 256 { 0 } else { NEXT });
            let endless = table(0x50_0000, 4, |_| NEXT);
            let nested = table(0x60_0000, 1, |_| INDIRECT);
            for (index, descriptor) in [good, long, endless, nested].into_iter().enumerate() {
                driver.describe(0, index as u16, descriptor);
                driver.publish(0, index as u16);
            }
            driver.describe(0, 4, Descriptor { len: 17, ..good });
            driver.publish(0, 4);
            let Popped::Chain(chain) = ring.pop(memory.ram()).unwrap() else { panic!("a good table was refused") };
            assert_eq!((chain.readable.len(), chain.writable.len()), (255 * 16, 16));
            assert_eq!(fault(ring, memory), ChainFault::TooLong);
            assert_eq!(fault(ring, memory), ChainFault::Broken);
            assert_eq!(fault(ring, memory), ChainFault::Broken);
            assert_eq!(fault(ring, memory), ChainFault::Broken);
        });
    }

    #[test]
    fn rings_that_make_no_sense_are_faults_and_nothing_is_taken() {
        with_ring(|driver, ring, memory| {
            driver.publish(0, SIZE);
            assert_eq!(ring.pop(memory.ram()).unwrap_err(), RingFault::Head(SIZE, SIZE));
            assert_eq!(ring.next_avail(), 0);
        });
        with_ring(|driver, ring, memory| {
            (0..=SIZE).for_each(|_| driver.publish(0, 0));
            assert!(matches!(ring.pop(memory.ram()), Err(RingFault::Available(_))));
        });
    }

    #[test]
    fn buffers_are_one_string_of_bytes_and_writes_are_marked() {
        with_ring(|driver, ring, memory| {
            driver.post(0, &[(0x10_0ffe, 3, true), (0x20_0000, 0, true), (0x30_0000, 5, true)]);
            let Popped::Chain(chain) = ring.pop(memory.ram()).unwrap() else { panic!() };
            let mut dirty = PageBitmap::new(memory.pages());
            memory.dirty().take(&mut dirty);
            assert!(chain.writable.write(1, b"abcdef"));
            let mut back = [0; 6];
            assert!(chain.writable.read(1, &mut back));
            assert_eq!(&back, b"abcdef");
            assert!(!chain.writable.read(3, &mut back), "read past the end");
            assert!(!chain.writable.write(3, &back), "written past the end");
            let mut dirty = PageBitmap::new(memory.pages());
            memory.dirty().take(&mut dirty);
            let pages: Vec<_> = dirty.runs(u32::MAX).flat_map(|run| run.indices()).collect();
            assert_eq!(pages, [0x100, 0x101, 0x300]);
            mark_written(&chain.writable.part(0, 8), 2);
            let mut dirty = PageBitmap::new(memory.pages());
            memory.dirty().take(&mut dirty);
            assert_eq!(dirty.runs(u32::MAX).flat_map(|run| run.indices()).collect::<Vec<_>>(), [0x100]);
        });
    }

    #[test]
    fn what_is_put_back_comes_again() {
        with_ring(|driver, ring, memory| {
            let head = driver.post(0, &[(0x1000, 4, false)]);
            for _ in 0..3 {
                let Popped::Chain(chain) = ring.pop(memory.ram()).unwrap() else { panic!() };
                assert_eq!(chain.head, head);
                ring.put_back();
            }
            assert_eq!((ring.next_avail(), ring.next_used()), (0, 0));
            ring.pop(memory.ram()).unwrap();
            ring.complete(memory.ram(), head, 3).unwrap();
            assert_eq!(driver.completed(0), Some((head.into(), 3)));
        });
    }

    #[test]
    fn a_driver_that_wants_no_interrupt_gets_none() {
        with_ring(|driver, ring, memory| {
            let mut complete = |flags: u16| {
                memory.ram().write_obj(flags, GuestAddress(geometry().available)).unwrap();
                let head = driver.post(0, &[(0x1000, 4, false)]);
                ring.pop(memory.ram()).unwrap();
                assert!(!ring.interrupt_due(memory.ram()).unwrap(), "an interrupt for nothing");
                ring.complete(memory.ram(), head, 0).unwrap();
                ring.interrupt_due(memory.ram()).unwrap()
            };
            assert!(complete(0));
            assert!(!complete(AVAIL_NO_INTERRUPT));
        });
    }
}
