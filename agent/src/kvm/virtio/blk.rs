//! The virtio block device (virtio 1.2, 5.2): requests of one queue, done on a raw disk.
//!
//! Owns the request format, bounds of sectors, and when what was written must be durable. A request is done in pieces of
//! [`PIECE_BYTES`], each one system call straight from or into guest memory; between two pieces it can be given up, and is
//! then done again from its start after the pause, here or at the target: reads and writes of the same bytes, so nothing
//! is changed by doing some of it twice.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use super::device::VirtioDevice;
use super::mmio::{Backend, Pass, Served};
use super::queue::{Chain, Popped, RingFault, mark_written};
use crate::block::held::HeldWrites;
use crate::block::raw::{RawDisk, SECTOR_BYTES};
use crate::kvm::bus::DeviceError;
use crate::kvm::memory::GuestRam;
use crate::shm::{Sink, Source};

/// Device type of a disk (virtio 1.2, 5.2.1).
const DEVICE_ID: u32 = 2;
const QUEUE_SIZES: [u16; 1] = [256];
/// Feature bits (5.2.3).
const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_RO: u64 = 1 << 5;
const FEATURE_BLK_SIZE: u64 = 1 << 6;
const FEATURE_FLUSH: u64 = 1 << 9;
/// Data segments of one request: with header and status still a chain that fits into half the queue.
const SEG_MAX: u32 = 126;
/// `struct virtio_blk_config` up to `writeback` (5.2.4).
const CONFIG_BYTES: usize = 36;
/// `struct virtio_blk_req` before the data: type, reserved, sector (5.2.6).
const HEADER_BYTES: usize = 16;
/// Request types.
const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
/// Length of the answer to `TYPE_GET_ID`, padded with zeros.
const ID_BYTES: usize = 20;
/// Request status.
const STATUS_OK: u8 = 0;
const STATUS_IOERR: u8 = 1;
const STATUS_UNSUPP: u8 = 2;
/// What is moved before the next look at whether to pause: some 50 µs of copying.
const PIECE_BYTES: usize = 256 << 10;

/// A disk of the guest.
pub type VirtioBlk = VirtioDevice<BlkBackend>;

/// What a disk did since the machine started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DiskStats {
    /// Requests for data that were done.
    pub reads: u64,
    /// Their bytes.
    pub read_bytes: u64,
    /// Requests to store data that were done.
    pub writes: u64,
    /// Their bytes.
    pub written_bytes: u64,
    /// Flushes that the guest asked for.
    pub flushes: u64,
    /// Requests that failed, were malformed, or of a kind that is not offered.
    pub errors: u64,
}

#[derive(Debug, Default)]
struct Counters {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
    flushes: AtomicU64,
    errors: AtomicU64,
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// The device behind the transport.
pub struct BlkBackend {
    disk: RawDisk,
    id: [u8; ID_BYTES],
    counters: Arc<Counters>,
    /// Writes of a VM on loan.
    held: HeldWrites,
}

impl VirtioBlk {
    /// Disk number `index` of the machine: `disk0` and so on. The disk is locked while the VM runs, so from the first
    /// [`resume`](crate::kvm::bus::Device::resume).
    ///
    /// # Errors
    /// No thread or descriptor is left.
    pub fn new(index: usize, ram: Arc<GuestRam>, disk: RawDisk) -> Result<Self, DeviceError> {
        Self::assemble(&format!("disk{index}"), ram, BlkBackend::new(index, disk), None)
    }

    /// Writes back what is dirty so far while the VM runs on, so that the flush at the next pause has little to do. Call it
    /// before the vCPUs are stopped.
    ///
    /// # Errors
    /// What the kernel answered; the guest will hear of it at its next flush.
    pub fn flush_ahead(&self) -> io::Result<()> {
        let file = self.transport().with_backend(|backend| backend.disk.write_back_handle())?;
        file.sync_data().inspect_err(|error| self.transport().with_backend(|backend| backend.disk.owe(error)))
    }

    /// What it did.
    pub fn stats(&self) -> DiskStats {
        let counters = self.transport().with_backend(|backend| backend.counters.clone());
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DiskStats {
            reads: get(&counters.reads),
            read_bytes: get(&counters.read_bytes),
            writes: get(&counters.writes),
            written_bytes: get(&counters.written_bytes),
            flushes: get(&counters.flushes),
            errors: get(&counters.errors),
        }
    }
}

/// How a request ended.
enum Outcome {
    /// With a status, so many bytes of data given to the guest.
    Done(u8, usize),
    /// Not at all: the worker is wanted elsewhere.
    GivenUp,
    /// Not before what is held has gone out.
    Waits,
}

/// A request that failed, with the status for it.
struct Failure(u8, String);

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self(STATUS_IOERR, error.to_string())
    }
}

impl BlkBackend {
    pub(super) fn new(index: usize, disk: RawDisk) -> Self {
        let mut id = [0; ID_BYTES];
        // The same at both hosts, unlike the path.
        for (to, from) in id.iter_mut().zip(format!("dunlin-disk{index}").bytes()) {
            *to = from;
        }
        Self { disk, id, counters: Arc::default(), held: HeldWrites::default() }
    }

    /// Does one request. The driver's cut of header, data and status into descriptors is not looked at.
    fn perform(&mut self, chain: &Chain<'_>, pass: &Pass<'_>) -> Outcome {
        let result = self.attempt(chain, pass);
        let Failure(status, problem) = match result {
            Ok(outcome) => return outcome,
            Err(failure) => failure,
        };
        count(&self.counters.errors, 1);
        pass.complaints.warn(&format_args!("a request failed: {problem}"));
        Outcome::Done(status, 0)
    }

    fn attempt(&mut self, chain: &Chain<'_>, pass: &Pass<'_>) -> Result<Outcome, Failure> {
        let mut header = [0; HEADER_BYTES];
        if !chain.readable.read(0, &mut header) {
            return Err(Failure(STATUS_IOERR, format!("it has {} bytes of header", chain.readable.len())));
        }
        let [kind, _, sector_low, sector_high] =
            std::array::from_fn(|word| u32::from_le_bytes(std::array::from_fn(|byte| header[4 * word + byte])));
        let sector = u64::from(sector_high) << 32 | u64::from(sector_low);
        match kind {
            TYPE_IN => self.read(chain, sector, pass),
            TYPE_OUT => self.write(chain, sector, pass),
            // What was written before it must be durable at its end.
            TYPE_FLUSH if !self.held.is_empty() => Ok(Outcome::Waits),
            TYPE_FLUSH => {
                self.disk.flush()?;
                count(&self.counters.flushes, 1);
                Ok(Outcome::Done(STATUS_OK, 0))
            }
            TYPE_GET_ID => {
                let room = (chain.writable.len() - 1).min(ID_BYTES);
                chain.writable.write(0, &self.id[..room]);
                Ok(Outcome::Done(STATUS_OK, room))
            }
            other => Err(Failure(STATUS_UNSUPP, format!("type {other} is not offered"))),
        }
    }

    /// The byte offset of `len` bytes at `sector`, all of them on the disk.
    fn place(&self, sector: u64, len: usize) -> Result<u64, Failure> {
        let bytes = self.disk.sectors() * SECTOR_BYTES;
        let refuse = || Failure(STATUS_IOERR, format!("{len} bytes at sector {sector} of {}", self.disk.sectors()));
        let offset = sector.checked_mul(SECTOR_BYTES).ok_or_else(refuse)?;
        let fits = offset.checked_add(len as u64).is_some_and(|end| end <= bytes);
        if fits && (len as u64).is_multiple_of(SECTOR_BYTES) { Ok(offset) } else { Err(refuse()) }
    }

    fn read(&mut self, chain: &Chain<'_>, sector: u64, pass: &Pass<'_>) -> Result<Outcome, Failure> {
        // The last byte is the status.
        let len = chain.writable.len() - 1;
        let offset = self.place(sector, len)?;
        let mut done = 0;
        while done < len {
            if (pass.hold)() {
                return Ok(Outcome::GivenUp);
            }
            let piece = chain.writable.part(done, PIECE_BYTES.min(len - done));
            let got = self.disk.read(&mut Sink::default().guest(&piece), offset + done as u64)?;
            mark_written(&piece, got);
            if got == 0 {
                return Err(Failure(STATUS_IOERR, "the file is shorter than it was".to_owned()));
            }
            done += got;
        }
        for (held, bytes) in self.held.within(sector, len as u64 / SECTOR_BYTES) {
            chain.writable.write(((held - sector) * SECTOR_BYTES) as usize, bytes);
        }
        count(&self.counters.reads, 1);
        count(&self.counters.read_bytes, len as u64);
        Ok(Outcome::Done(STATUS_OK, len))
    }

    fn write(&mut self, chain: &Chain<'_>, sector: u64, pass: &Pass<'_>) -> Result<Outcome, Failure> {
        let len = chain.readable.len() - HEADER_BYTES;
        let offset = self.place(sector, len)?;
        if self.held.holds() {
            return self.hold(chain, sector, len);
        }
        let mut done = 0;
        while done < len {
            if (pass.hold)() {
                return Ok(Outcome::GivenUp);
            }
            let piece = chain.readable.part(HEADER_BYTES + done, PIECE_BYTES.min(len - done));
            match self.disk.write(&Source::default().guest(&piece), offset + done as u64)? {
                0 => return Err(Failure(STATUS_IOERR, "the file takes nothing".to_owned())),
                taken => done += taken,
            }
        }
        if pass.features & FEATURE_FLUSH == 0 {
            // A driver that cannot flush relies on each write being durable (5.2.6.2).
            self.disk.flush()?;
        }
        count(&self.counters.writes, 1);
        count(&self.counters.written_bytes, len as u64);
        Ok(Outcome::Done(STATUS_OK, 0))
    }
}

impl BlkBackend {
    /// Takes a write, and keeps it from the disk.
    fn hold(&mut self, chain: &Chain<'_>, sector: u64, len: usize) -> Result<Outcome, Failure> {
        if self.disk.readonly() {
            return Err(Failure(STATUS_IOERR, "the disk is read-only".to_owned()));
        }
        let sectors = len / SECTOR_BYTES as usize;
        // One that is longer than all that may be held goes alone.
        if !self.held.has_room(sectors) && !self.held.is_empty() {
            return Ok(Outcome::Waits);
        }
        for index in 0..sectors {
            let mut bytes = [0; SECTOR_BYTES as usize];
            chain.readable.read(HEADER_BYTES + index * SECTOR_BYTES as usize, &mut bytes);
            self.held.write(sector + index as u64, bytes);
        }
        count(&self.counters.writes, 1);
        count(&self.counters.written_bytes, len as u64);
        Ok(Outcome::Done(STATUS_OK, 0))
    }

    /// Writes what was held and may go, and makes it durable: only then is it held no more. False if it was given up.
    fn write_held(&mut self, pass: &Pass<'_>) -> bool {
        let mut from = 0;
        while let Some((first, bytes)) = self.held.next_free(from, PIECE_BYTES / SECTOR_BYTES as usize) {
            if (pass.hold)() {
                return false;
            }
            let mut done = 0;
            while done < bytes.len() {
                match self.disk.write(&Source::default().host(&bytes[done..]), first * SECTOR_BYTES + done as u64) {
                    Ok(taken) if taken > 0 => done += taken,
                    other => {
                        let error = other.err().unwrap_or_else(|| io::ErrorKind::WriteZero.into());
                        pass.complaints.warn(&format_args!("a write that was held failed: {error}"));
                        self.disk.owe(&error);
                        break;
                    }
                }
            }
            from = first + bytes.len() as u64 / SECTOR_BYTES;
        }
        if from > 0 {
            // Its error is told at the guest's next flush.
            let _ = self.disk.flush_for_handover();
            self.held.remove_free();
        }
        true
    }
}

impl Backend for BlkBackend {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let readonly = if self.disk.readonly() { FEATURE_RO } else { 0 };
        FEATURE_SEG_MAX | FEATURE_BLK_SIZE | FEATURE_FLUSH | readonly
    }

    /// `capacity` at 0, `seg_max` at 12, `blk_size` at 20 (5.2.4); the rest belongs to features that are not offered.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; CONFIG_BYTES];
        config[0..8].copy_from_slice(&self.disk.sectors().to_le_bytes());
        config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR_BYTES as u32).to_le_bytes());
        config
    }

    /// One request: the interrupt for it does not wait for the next.
    fn serve(&mut self, pass: &mut Pass<'_>) -> Result<Served, RingFault> {
        if !self.write_held(pass) {
            return Ok(Served { more: true, ..Served::default() });
        }
        let Some(mut ring) = pass.rings[0].take() else { return Ok(Served::default()) };
        let result = self.serve_one(&mut ring, pass);
        pass.rings[0] = Some(ring);
        result.map(|more| Served { more, ..Served::default() })
    }

    fn activate(&mut self) -> io::Result<()> {
        self.disk.lock().map_err(io::Error::other)
    }

    fn quiesce(&mut self) -> io::Result<()> {
        // Durable before it is anyone else's: another host reads it from the storage they share.
        self.disk.flush_for_handover()?;
        self.disk.unlock()
    }

    fn hold_output(&mut self, bytes: usize) {
        self.held.hold(bytes);
    }

    fn begin_increment(&mut self, number: u32) {
        self.held.begin(number);
    }

    fn let_out(&mut self, number: u32) {
        self.held.let_out(number);
    }

    fn end_holding(&mut self) {
        self.held.end();
    }

    fn held(&self) -> Vec<u8> {
        self.held.encode()
    }

    fn take_held(&mut self, held: &[u8]) -> bool {
        held.is_empty() || (!self.disk.readonly() && self.held.decode(held, self.disk.sectors()))
    }

    fn explain_config(&self, saved: &[u8]) -> String {
        let saved = saved.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let path = self.disk.path().display();
        format!("the guest knows a disk of {saved} sectors, {path} has {} (of 512 bytes)", self.disk.sectors())
    }
}

impl BlkBackend {
    /// Whether there is more.
    fn serve_one(&mut self, ring: &mut super::queue::Ring, pass: &Pass<'_>) -> Result<bool, RingFault> {
        ring.silence(pass.ram)?;
        match ring.pop(pass.ram)? {
            Popped::Empty => return ring.listen(pass.ram),
            Popped::Malformed(head, fault) => {
                pass.complaints.warn(&format_args!("dropped a request: {fault}"));
                count(&self.counters.errors, 1);
                ring.complete(pass.ram, head, 0)?;
            }
            Popped::Chain(chain) if chain.writable.is_empty() => {
                pass.complaints.warn(&"dropped a request with no place for its status");
                count(&self.counters.errors, 1);
                ring.complete(pass.ram, chain.head, 0)?;
            }
            Popped::Chain(chain) => match self.perform(&chain, pass) {
                Outcome::GivenUp => ring.put_back(),
                Outcome::Waits => {
                    ring.put_back();
                    return Ok(false);
                }
                Outcome::Done(status, data) => {
                    let last = chain.writable.len() - 1;
                    chain.writable.write(last, &[status]);
                    // What counts is what was filled from the start on, without a gap (2.7.8.2).
                    let written = if data == last { data + 1 } else { data };
                    ring.complete(pass.ram, chain.head, written as u32)?;
                }
            },
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io::Read;

    use vm_memory::{Bytes, GuestAddress};

    use super::super::driver::{Driver, Piece};
    use super::super::mmio::{Transport, feature, register};
    use super::*;
    use crate::kvm::bus::{Device, MmioDevice};
    use crate::kvm::memory::{Memory, MemoryOptions};
    use crate::model::{DiskSpec, PageBitmap};

    const SECTORS: u64 = 8192;
    const SIZE: u16 = 64;
    const FEATURES: u64 = feature::VERSION_1 | FEATURE_FLUSH;
    const HEADER: u64 = 4 << 20;
    const STATUS: u64 = HEADER + 64;
    const DATA: u64 = 5 << 20;

    fn memory() -> Memory {
        Memory::new(16 << 20, MemoryOptions { huge_pages: false }).unwrap()
    }

    fn image() -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(SECTORS * SECTOR_BYTES).unwrap();
        file
    }

    fn open(file: &tempfile::NamedTempFile, readonly: bool) -> RawDisk {
        RawDisk::open(&DiskSpec { path: file.path().to_owned(), readonly }).unwrap()
    }

    fn content(file: &tempfile::NamedTempFile) -> Vec<u8> {
        let mut bytes = Vec::new();
        std::fs::File::open(file.path()).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    }

    /// Queues one request and puts 0xaa where its status goes.
    fn post(driver: &mut Driver<'_>, memory: &Memory, kind: u32, sector: u64, data: &[Piece]) {
        let ram = memory.ram();
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        ram.write_slice(&header, GuestAddress(HEADER)).unwrap();
        ram.write_obj(0xaau8, GuestAddress(STATUS)).unwrap();
        driver.post(0, &[&[(HEADER, 16, false)], data, &[(STATUS, 1, true)]].concat());
    }

    /// Does one request on a running device: status and used length.
    fn request(driver: &mut Driver<'_>, memory: &Memory, kind: u32, sector: u64, data: &[Piece]) -> (u8, u32) {
        post(driver, memory, kind, sector, data);
        driver.kick(0);
        let (_, len) = driver.wait(0);
        (memory.ram().read_obj(GuestAddress(STATUS)).unwrap(), len)
    }

    /// Of a VM on loan: what it writes is read back and is not on the disk; a flush waits for it; whoever goes on from its state writes it.
    #[test]
    fn writes_of_a_vm_on_loan_reach_the_disk_when_they_are_safe() {
        let (memory, file) = (memory(), image());
        let device = VirtioBlk::new(0, memory.ram().clone(), open(&file, false)).unwrap();
        device.hold_output(1 << 20);
        device.resume().unwrap();
        let mut driver = Driver::new(&device, memory.ram(), 1, SIZE);
        driver.start(FEATURES);
        memory.ram().write_slice(&[7; 1024], GuestAddress(DATA)).unwrap();
        assert_eq!(request(&mut driver, &memory, TYPE_OUT, 5, &[(DATA, 1024, false)]), (STATUS_OK, 1));
        assert_eq!(request(&mut driver, &memory, TYPE_IN, 4, &[(DATA, 2048, true)]), (STATUS_OK, 2049));
        let read: Vec<u8> =
            [0, 512, 1535, 1536].map(|at| memory.ram().read_obj(GuestAddress(DATA + at)).unwrap()).into();
        assert_eq!(
            (read, content(&file)[2560]),
            (vec![0, 7, 7, 0], 0),
            "it is read where it will be, and is not there"
        );
        post(&mut driver, &memory, TYPE_FLUSH, 0, &[]);
        driver.kick(0);
        device.pause().unwrap();
        let held = device.held().unwrap();
        device.begin_increment(2);
        device.resume().unwrap();
        assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(STATUS)).unwrap(), 0xaa, "the flush waits");
        device.let_out(1);
        driver.wait(0);
        assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(STATUS)).unwrap(), STATUS_OK);
        assert_eq!(content(&file)[2560..3584], [7; 1024]);
        device.pause().unwrap();
        assert!(device.held().unwrap().is_empty());

        let (other_memory, other_file) = (self::memory(), image());
        let other = VirtioBlk::new(0, other_memory.ram().clone(), open(&other_file, false)).unwrap();
        assert!(other.take_held(&held[1..]).is_err());
        other.take_held(&held).unwrap();
        other.resume().unwrap();
        let mut driver = Driver::new(&other, other_memory.ram(), 1, SIZE);
        driver.start(FEATURES);
        assert_eq!(request(&mut driver, &other_memory, TYPE_FLUSH, 0, &[]), (STATUS_OK, 1));
        assert_eq!(content(&other_file)[2560..3584], [7; 1024]);
    }

    #[test]
    fn what_is_written_is_on_the_disk_and_comes_back() {
        let (memory, file) = (memory(), image());
        let device = VirtioBlk::new(3, memory.ram().clone(), open(&file, false)).unwrap();
        device.resume().unwrap();
        let mut driver = Driver::new(&device, memory.ram(), 1, SIZE);
        assert_eq!(driver.offered() & FEATURE_RO, 0);
        assert_eq!(driver.start(FEATURES), 15);
        let mut config = [0; 24];
        device.read(register::CONFIG, &mut config);
        assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), SECTORS);
        assert_eq!((config[12], config[20..].to_vec()), (126, vec![0, 2, 0, 0]));

        let data: Vec<u8> = (0..1024u32).map(|n| (n * 7 + n / 256) as u8).collect();
        memory.ram().write_slice(&data, GuestAddress(DATA)).unwrap();
        let pieces = [(DATA, 100, false), (DATA + 100, 924, false)];
        assert_eq!(request(&mut driver, &memory, TYPE_OUT, 5, &pieces), (STATUS_OK, 1));
        assert_eq!(content(&file)[2560..3584], data);
        assert_eq!(request(&mut driver, &memory, TYPE_FLUSH, 0, &[]), (STATUS_OK, 1));

        let mut dirty = PageBitmap::new(memory.pages());
        memory.dirty().take(&mut dirty);
        let back = DATA + 0x10_0e00;
        let pieces = [(back, 512, true), (back + 512, 512, true)];
        assert_eq!(request(&mut driver, &memory, TYPE_IN, 5, &pieces), (STATUS_OK, 1025));
        let mut got = vec![0; 1024];
        memory.ram().read_slice(&mut got, GuestAddress(back)).unwrap();
        assert_eq!(got, data);
        let mut dirty = PageBitmap::new(memory.pages());
        memory.dirty().take(&mut dirty);
        let dirty: Vec<u64> = dirty.runs(u32::MAX).flat_map(|run| run.indices()).collect();
        assert!([back / 4096, back / 4096 + 1].iter().all(|page| dirty.contains(page)), "{dirty:x?}");

        assert_eq!(request(&mut driver, &memory, TYPE_GET_ID, 0, &[(DATA, 20, true)]), (STATUS_OK, 21));
        let id: [u8; 20] = memory.ram().read_obj(GuestAddress(DATA)).unwrap();
        assert_eq!(&id, b"dunlin-disk3\0\0\0\0\0\0\0\0");
        let expected = DiskStats { reads: 1, read_bytes: 1024, writes: 1, written_bytes: 1024, flushes: 1, errors: 0 };
        assert_eq!(device.stats(), expected);
    }

    #[test]
    fn requests_that_cannot_be_fail_and_touch_nothing() {
        let (memory, file) = (memory(), image());
        let device = VirtioBlk::new(0, memory.ram().clone(), open(&file, false)).unwrap();
        device.resume().unwrap();
        let mut driver = Driver::new(&device, memory.ram(), 1, SIZE);
        driver.start(FEATURES);
        memory.ram().write_slice(&[0xee; 4096], GuestAddress(DATA)).unwrap();
        for (kind, sector, len, status) in [
            (TYPE_OUT, SECTORS, 512, STATUS_IOERR),
            (TYPE_OUT, SECTORS - 1, 1024, STATUS_IOERR),
            (TYPE_OUT, u64::MAX, 512, STATUS_IOERR),
            (TYPE_OUT, u64::MAX / 512, 512, STATUS_IOERR),
            (TYPE_OUT, 1 << 55, 512, STATUS_IOERR),
            (TYPE_OUT, 0, 511, STATUS_IOERR),
            (TYPE_IN, SECTORS, 512, STATUS_IOERR),
            (TYPE_IN, 0, 513, STATUS_IOERR),
            (TYPE_IN, 0, 8 << 20, STATUS_IOERR),
            (11, 0, 512, STATUS_UNSUPP),
            (u32::MAX, 0, 512, STATUS_UNSUPP),
        ] {
            let data = [(DATA, len, kind != TYPE_OUT)];
            assert_eq!(request(&mut driver, &memory, kind, sector, &data), (status, u32::from(kind == TYPE_OUT)));
        }
        assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(DATA)).unwrap(), 0xee, "a failed read wrote");
        // Nothing but a status; no place for one; too short a header; data on the wrong side of it.
        let cases: [(&[Piece], u32); 4] = [
            (&[(STATUS, 1, true)], 1),
            (&[(HEADER, 16, false), (DATA, 512, false)], 0),
            (&[(HEADER, 15, false), (STATUS, 1, true)], 1),
            (&[(STATUS, 1, true), (HEADER, 16, false)], 0),
        ];
        for (pieces, len) in cases {
            driver.post(0, pieces);
            driver.kick(0);
            assert_eq!(driver.wait(0).1, len, "{pieces:?}");
        }
        assert!(content(&file).iter().all(|byte| *byte == 0), "a failed request wrote to the disk");
        assert_eq!(request(&mut driver, &memory, TYPE_OUT, SECTORS - 1, &[(DATA, 512, false)]).0, STATUS_OK);
        assert_eq!(device.stats().errors, 15);
    }

    #[test]
    fn a_read_only_disk_says_so_and_is_not_written() {
        let (memory, file) = (memory(), image());
        let device = VirtioBlk::new(0, memory.ram().clone(), open(&file, true)).unwrap();
        device.resume().unwrap();
        let mut driver = Driver::new(&device, memory.ram(), 1, SIZE);
        assert_ne!(driver.offered() & FEATURE_RO, 0);
        driver.start(FEATURES | FEATURE_RO);
        memory.ram().write_slice(&[0xee; 512], GuestAddress(DATA)).unwrap();
        assert_eq!(request(&mut driver, &memory, TYPE_OUT, 0, &[(DATA, 512, false)]).0, STATUS_IOERR);
        assert_eq!(request(&mut driver, &memory, TYPE_FLUSH, 0, &[]).0, STATUS_OK);
        assert_eq!(request(&mut driver, &memory, TYPE_IN, 0, &[(DATA, 512, true)]).0, STATUS_OK);
        assert_eq!(content(&file)[..512], [0; 512]);
    }

    #[test]
    fn a_file_that_shrinks_under_the_guest_is_an_error_not_a_hang() {
        let (memory, file) = (memory(), image());
        let device = VirtioBlk::new(0, memory.ram().clone(), open(&file, false)).unwrap();
        device.resume().unwrap();
        let mut driver = Driver::new(&device, memory.ram(), 1, SIZE);
        driver.start(FEATURES);
        file.as_file().set_len(700).unwrap();
        assert_eq!(request(&mut driver, &memory, TYPE_IN, 0, &[(DATA, 1024, true)]).0, STATUS_IOERR);
        assert_eq!(request(&mut driver, &memory, TYPE_IN, 0, &[(DATA, 512, true)]).0, STATUS_OK);
    }

    #[test]
    fn one_machine_at_a_time_has_the_disk_and_a_pause_hands_it_over() {
        let (memory, file) = (memory(), image());
        let source = VirtioBlk::new(0, memory.ram().clone(), open(&file, false)).unwrap();
        let target = VirtioBlk::new(0, memory.ram().clone(), open(&file, false)).unwrap();
        source.resume().unwrap();
        let mut driver = Driver::new(&source, memory.ram(), 1, SIZE);
        driver.start(FEATURES);
        memory.ram().write_slice(&[0x11; 512], GuestAddress(DATA)).unwrap();
        assert_eq!(request(&mut driver, &memory, TYPE_OUT, 0, &[(DATA, 512, false)]).0, STATUS_OK);
        let error = target.resume().unwrap_err();
        let text = format!("{error}: {}", std::error::Error::source(&error).unwrap());
        assert!(text.contains("in use by another process") && text.contains("disk0"), "{text}");
        source.flush_ahead().unwrap();
        assert!(source.transport().with_backend(|backend| backend.disk.unflushed()));
        source.pause().unwrap();
        assert!(!source.transport().with_backend(|backend| backend.disk.unflushed()), "handed over before durable");
        target.restore(&source.save().unwrap()).unwrap();
        target.resume().unwrap();
        assert!(source.resume().is_err(), "two owners of one disk");
        let mut driver = driver.moved_to(&target, memory.ram());
        assert_eq!(request(&mut driver, &memory, TYPE_IN, 0, &[(DATA + 4096, 512, true)]), (STATUS_OK, 513));
        assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(DATA + 4096)).unwrap(), 0x11);
        target.pause().unwrap();
        target.pause().unwrap();
        source.resume().unwrap();
    }

    #[test]
    fn a_disk_of_another_size_is_refused_in_words() {
        let (memory, file, other) = (memory(), image(), image());
        other.as_file().set_len(512).unwrap();
        let device = |file| VirtioBlk::new(0, memory.ram().clone(), open(file, false)).unwrap();
        let error = device(&other).restore(&device(&file).save().unwrap()).unwrap_err().to_string();
        assert!(error.contains("8192 sectors") && error.contains("has 1 "), "{error}");
    }

    #[test]
    fn writes_are_durable_at_once_for_a_driver_that_cannot_flush() {
        for (features, unflushed) in [(FEATURES, true), (feature::VERSION_1, false)] {
            let (memory, file) = (memory(), image());
            let device = VirtioBlk::new(0, memory.ram().clone(), open(&file, false)).unwrap();
            device.resume().unwrap();
            let mut driver = Driver::new(&device, memory.ram(), 1, SIZE);
            driver.start(features);
            request(&mut driver, &memory, TYPE_OUT, 0, &[(DATA, 512, false)]);
            assert_eq!(device.transport().with_backend(|backend| backend.disk.unflushed()), unflushed);
        }
    }

    /// A pause in the middle of a long request: it stays the guest's and is done in full later.
    #[test]
    fn a_long_request_is_given_up_between_pieces_and_done_again() {
        let (memory, file) = (memory(), image());
        let transport = Transport::new("disk0", memory.ram().clone(), BlkBackend::new(0, open(&file, false))).unwrap();
        let mut driver = Driver::new(&transport, memory.ram(), 1, SIZE);
        driver.start(FEATURES);
        let len = 8 * PIECE_BYTES;
        memory.ram().write_slice(&vec![0x77; len], GuestAddress(DATA)).unwrap();
        post(&mut driver, &memory, TYPE_OUT, 0, &[(DATA, len as u32, false)]);
        let asked = Cell::new(0);
        let served = transport.serve(&|| {
            asked.set(asked.get() + 1);
            asked.get() > 4
        });
        assert!(served.more);
        assert_eq!(driver.completed(0), None);
        let written = content(&file).iter().position(|byte| *byte != 0x77).unwrap();
        assert!((PIECE_BYTES..len).contains(&written), "{written} bytes were written before the pause");
        let saved = transport.save();
        let target = Transport::new("disk0", memory.ram().clone(), BlkBackend::new(0, open(&file, false))).unwrap();
        target.restore(&saved).unwrap();
        target.serve(&|| false);
        let driver = &mut driver.moved_to(&target, memory.ram());
        assert_eq!(driver.completed(0), Some((0, 1)));
        assert!(content(&file)[..len].iter().all(|byte| *byte == 0x77));
        assert_eq!(driver.completed(0), None);
    }
}
