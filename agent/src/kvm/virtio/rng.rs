//! The virtio entropy device (virtio 1.2, 5.4): random bytes of the host's kernel for the guest.
//!
//! Owns how much one request gets. What the guest was given is nobody's state: after a move the next request is answered
//! from the new host's kernel. Must not know where a guest uses it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::rand::{GetRandomFlags, getrandom};
use serde::Serialize;

use super::device::VirtioDevice;
use super::mmio::{Backend, Pass, Served};
use super::queue::{Buffers, Popped, RingFault};
use crate::kvm::bus::DeviceError;
use crate::kvm::memory::GuestRam;

/// Device type of an entropy source (virtio 1.2, 5.4.1).
const DEVICE_ID: u32 = 4;
const QUEUE_SIZES: [u16; 1] = [64];
/// What one request gets at most, in bytes: some 10 µs of work. A device may fill less than it was given (5.4.6.2).
const MAX_REQUEST_BYTES: usize = 4096;
/// Requests in one pass.
const REQUESTS_PER_PASS: usize = 16;

/// The guest's source of entropy.
pub type VirtioRng = VirtioDevice<RngBackend>;

/// What the device did since the machine started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RngStats {
    /// Random bytes given to the guest.
    pub bytes: u64,
}

/// The device behind the transport.
#[derive(Debug, Default)]
pub struct RngBackend {
    bytes: Arc<AtomicU64>,
}

impl VirtioRng {
    /// The one of a machine: `rng0`.
    ///
    /// # Errors
    /// No thread or descriptor is left.
    pub fn new(ram: Arc<GuestRam>) -> Result<Self, DeviceError> {
        Self::assemble("rng0", ram, RngBackend::default(), None)
    }

    /// What it did.
    pub fn stats(&self) -> RngStats {
        let bytes = self.transport().with_backend(|backend| backend.bytes.clone());
        RngStats { bytes: bytes.load(Ordering::Relaxed) }
    }
}

/// Fills `into` from the host's kernel.
fn fill(mut into: &mut [u8]) -> io::Result<()> {
    while !into.is_empty() {
        match getrandom(&mut *into, GetRandomFlags::empty()) {
            Ok(got) => into = &mut into[got..],
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

impl RngBackend {
    /// Fills what it may of a request's buffers; returns how many bytes.
    fn answer(&self, buffers: &Buffers<'_>) -> io::Result<usize> {
        let mut random = [0; MAX_REQUEST_BYTES];
        let random = &mut random[..buffers.len().min(MAX_REQUEST_BYTES)];
        fill(random)?;
        buffers.write(0, random);
        self.bytes.fetch_add(random.len() as u64, Ordering::Relaxed);
        Ok(random.len())
    }
}

impl Backend for RngBackend {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    /// None are defined (5.4.3).
    fn features(&self) -> u64 {
        0
    }

    /// There is none (5.4.4).
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn serve(&mut self, pass: &mut Pass<'_>) -> Result<Served, RingFault> {
        let Some(ring) = &mut pass.rings[0] else { return Ok(Served::default()) };
        for _ in 0..REQUESTS_PER_PASS {
            if (pass.hold)() {
                break;
            }
            ring.silence(pass.ram)?;
            match ring.pop(pass.ram)? {
                Popped::Empty => {
                    if !ring.listen(pass.ram)? {
                        return Ok(Served::default());
                    }
                }
                Popped::Malformed(head, fault) => {
                    pass.complaints.warn(&format_args!("dropped a request: {fault}"));
                    ring.complete(pass.ram, head, 0)?;
                }
                Popped::Chain(chain) => {
                    let filled = self.answer(&chain.writable).unwrap_or_else(|error| {
                        pass.complaints.warn(&format_args!("no entropy: {error}"));
                        0
                    });
                    ring.complete(pass.ram, chain.head, filled as u32)?;
                }
            }
        }
        Ok(Served { more: true, ..Served::default() })
    }

    fn explain_config(&self, _: &[u8]) -> String {
        "an entropy source has no configuration, the saved one has".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::super::driver::Driver;
    use super::super::mmio::feature;
    use super::*;
    use crate::kvm::bus::Device;
    use crate::kvm::memory::{Memory, MemoryOptions};
    use crate::model::PageBitmap;

    const SIZE: u16 = 64;
    const DATA: u64 = 1 << 20;

    fn memory() -> Memory {
        Memory::new(4 << 20, MemoryOptions { huge_pages: false }).unwrap()
    }

    fn bytes(memory: &Memory, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.ram().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    #[test]
    fn requests_get_different_bytes_and_their_pages_are_marked() {
        let memory = memory();
        let device = VirtioRng::new(memory.ram().clone()).unwrap();
        device.resume().unwrap();
        let mut driver = Driver::new(&device, memory.ram(), 1, SIZE);
        assert_eq!(driver.start(feature::VERSION_1), 15);
        let mut ask = |pieces: &[(u64, u32, bool)]| {
            driver.post(0, pieces);
            driver.kick(0);
            driver.wait(0).1
        };
        assert_eq!(ask(&[(DATA, 64, true)]), 64);
        assert_eq!(ask(&[(DATA + 4090, 6, true), (DATA + 8192, 58, true)]), 64);
        let (first, second) = (bytes(&memory, DATA, 64), bytes(&memory, DATA + 8192, 58));
        assert!(first.iter().any(|byte| *byte != 0) && second.iter().any(|byte| *byte != 0));
        assert_ne!(first[6..], second[..]);
        assert_eq!(bytes(&memory, DATA + 64, 10), [0; 10], "more was written than was asked for");
        let mut dirty = PageBitmap::new(memory.pages());
        memory.dirty().take(&mut dirty);
        assert!([0, 2].iter().all(|page| dirty.contains(DATA / 4096 + page)));
        // A large request gets a part, one with no room nothing; memory that is none is not written.
        assert_eq!(ask(&[(DATA, 1 << 20, true)]), MAX_REQUEST_BYTES as u32);
        assert_eq!(bytes(&memory, DATA + MAX_REQUEST_BYTES as u64, 100), vec![0; 100]);
        assert_eq!(ask(&[(DATA, 100, false)]), 0);
        assert_eq!(ask(&[(64 << 20, 100, true)]), 0);
        assert_eq!(ask(&[(DATA, 8, true), (DATA, 8, false)]), 0);
        assert_eq!(device.stats().bytes, 128 + MAX_REQUEST_BYTES as u64);
    }

    #[test]
    fn a_request_that_was_not_served_is_served_where_the_device_moved_to() {
        let memory = memory();
        let (source, target) =
            (VirtioRng::new(memory.ram().clone()).unwrap(), VirtioRng::new(memory.ram().clone()).unwrap());
        let mut driver = Driver::new(&source, memory.ram(), 1, SIZE);
        driver.start(feature::VERSION_1);
        driver.post(0, &[(DATA, 64, true)]);
        driver.kick(0);
        assert_eq!(driver.completed(0), None, "it stands");
        target.restore(&source.save().unwrap()).unwrap();
        let mut driver = driver.moved_to(&target, memory.ram());
        target.resume().unwrap();
        assert_eq!(driver.wait(0), (0, 64));
    }
}
