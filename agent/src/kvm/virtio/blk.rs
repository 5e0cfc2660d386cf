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
        Self { disk, id, counters: Arc::default() }
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
        count(&self.counters.reads, 1);
        count(&self.counters.read_bytes, len as u64);
        Ok(Outcome::Done(STATUS_OK, len))
    }

    fn write(&mut self, chain: &Chain<'_>, sector: u64, pass: &Pass<'_>) -> Result<Outcome, Failure> {
        let len = chain.readable.len() - HEADER_BYTES;
        let offset = self.place(sector, len)?;
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
        self.disk.flush()?;
        self.disk.unlock()
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
