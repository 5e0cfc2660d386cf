//! One entry for fuzzing: bytes become what a hostile guest can do to a device, in order.
//!
//! Owns that encoding, and the promises that are checked after every step: no panic, no pass that does not end, a saved
//! state that its own device takes back. Runs without threads, KVM or privileges.

use std::cell::Cell;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::balloon::BalloonBackend;
use super::blk::BlkBackend;
use super::driver::{Descriptor, Driver};
use super::mmio::{Backend, Transport, register};
use super::net::NetBackend;
use super::rng::RngBackend;
use super::state::{DeviceState, QueueState};
use crate::block::raw::RawDisk;
use crate::kvm::bus::MmioDevice;
use crate::kvm::memory::{GuestRam, HIGH_RAM_START, HOLE_START, Memory, MemoryOptions};
use crate::model::{DiskSpec, MacAddress};
use crate::shm::memory_file;

/// Queue length of the driver that the bytes steer.
const QUEUE_SIZE: u16 = 8;
/// Guest RAM: all below the hole and a little above it, hardly any of it ever touched.
const RAM_BYTES: u64 = HOLE_START + (1 << 20);
const DISK_BYTES: u64 = 64 << 10;

/// Which device is attacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The network device.
    Net,
    /// The block device.
    Disk,
    /// The source of entropy.
    Rng,
    /// The balloon; some of its requests come in the midst of what a host asks of it.
    Balloon,
}

/// Runs `input` against a fresh device.
///
/// # Panics
/// If the device breaks a promise; that is what a fuzzer looks for. Also if the host has no memory or descriptor left.
pub fn drive(target: Target, input: &[u8]) {
    let memory = Memory::new(RAM_BYTES, MemoryOptions { huge_pages: false }).expect("guest memory");
    match target {
        Target::Net => {
            let (wire, network) = UnixDatagram::pair().expect("socket pair");
            wire.set_nonblocking(true).expect("nonblocking");
            network.set_nonblocking(true).expect("nonblocking");
            let mac = MacAddress::new([2, 0, 0, 0, 0, 1]).expect("MAC");
            attack(&memory, NetBackend::new(wire.into(), mac), input, &|_, frame| {
                let _ = network.send(frame);
                while network.recv(&mut [0; 16]).is_ok() {}
            });
        }
        Target::Disk => attack(&memory, BlkBackend::new(0, scratch_disk()), input, &|_, _| ()),
        Target::Rng => attack(&memory, RngBackend::default(), input, &|_, _| ()),
        Target::Balloon => {
            let backend = BalloonBackend::new(memory.clone(), Arc::default());
            attack(&memory, backend, input, &|transport, order| {
                transport.with_live(|balloon, _| balloon.order(order.len()));
            });
        }
    }
}

/// Reads `bytes` as a device's saved state.
///
/// # Panics
/// If a state that was taken is not written as it was read.
pub fn read_state(bytes: &[u8]) {
    if let Ok(state) = DeviceState::decode(bytes) {
        assert_eq!(DeviceState::decode(&state.encode()), Ok(state), "a state changed by being written");
    }
}

/// A state as a device saves it.
pub fn sample_state() -> Vec<u8> {
    let queues = vec![QueueState { size: 256, ready: true, descriptors: 0x1000, ..QueueState::default() }; 2];
    DeviceState { device_id: 1, config: vec![2, 0, 0, 0, 0, 1], status: 15, queues, ..DeviceState::default() }.encode()
}

fn scratch_disk() -> RawDisk {
    let file: OwnedFd = memory_file("fuzz-disk", DISK_BYTES).expect("disk");
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let disk = RawDisk::open(&DiskSpec { path: path.into(), readonly: false }).expect("disk");
    drop(File::from(file));
    disk
}

fn attack<B: Backend>(memory: &Memory, backend: B, input: &[u8], deliver: &dyn Fn(&Transport<B>, &[u8])) {
    let ram: Arc<GuestRam> = memory.ram().clone();
    let queues = backend.queue_sizes().len();
    let transport = Transport::new("fuzz0", ram.clone(), backend).expect("eventfd");
    let mut driver = Driver::new(&transport, &ram, queues, QUEUE_SIZE);
    let mut bytes = Bits(input);
    while !bytes.0.is_empty() {
        let queue = usize::from(bytes.byte()) % queues;
        match bytes.byte() % 12 {
            0 => driver.store(4 * u64::from(bytes.byte() % 64), bytes.word()),
            1 => {
                let width = 1 << (bytes.byte() % 4);
                transport.write(u64::from(bytes.half()) % 0x1100, &bytes.long().to_le_bytes()[..width]);
            }
            2 => {
                let width = usize::from(bytes.byte() % 17);
                transport.read(u64::from(bytes.half()) % 0x1100, &mut [0; 16][..width.min(16)]);
            }
            3 => {
                let address = bytes.address();
                let _ = ram.write_obj(bytes.long(), GuestAddress(address));
            }
            4 => {
                let index = u16::from(bytes.byte()) % QUEUE_SIZE;
                let (address, len) = (bytes.address(), bytes.length());
                let (flags, next) = (u16::from(bytes.byte()), u16::from(bytes.byte() % 10));
                driver.describe(queue, index, Descriptor { address, len, flags, next });
            }
            5 => driver.publish(queue, u16::from(bytes.byte() % 10)),
            6 => {
                driver.negotiate(u64::from(bytes.word()) | 1 << 32);
                driver.set_up(queue as u32, bytes.word() % 300, [bytes.address(), bytes.address(), bytes.address()]);
                driver.store(register::STATUS, u32::from(bytes.byte()));
            }
            7 => {
                // Only features that exist, so that the queues get to work.
                let wanted = u64::from(bytes.word()) & driver.offered();
                driver.start(wanted | 1 << 32);
            }
            8 => deliver(&transport, &[0xff; 1600][..usize::from(bytes.half()) % 1601]),
            9 => {
                // A request of the right shape with guest-chosen contents.
                let (header, data) = (0x10_0000, bytes.address());
                let _ = ram.write_obj(u64::from(bytes.byte() % 10), GuestAddress(header));
                let _ = ram.write_obj(u64::from(bytes.byte()), GuestAddress(header + 8));
                let len = bytes.length();
                driver.post(queue, &[(header, 16, false), (data, len, bytes.byte() & 1 == 1), (header + 64, 1, true)]);
            }
            10 => {
                let saved = transport.save();
                transport.restore(&saved).expect("its own state fits");
                assert_eq!(transport.save(), saved, "a state changed by being restored");
            }
            _ => {
                let mut state = transport.save();
                let at = usize::from(bytes.byte()) % state.len();
                state[at] ^= bytes.byte();
                // Taken or refused: either way the device goes on.
                let _ = transport.restore(&state);
            }
        }
        driver.kick(queue);
        // A pass is bounded by the queues' lengths; what it asks of `hold` tells how much it did.
        let pieces = Cell::new(0u32);
        transport.serve(&|| {
            pieces.set(pieces.get() + 1);
            false
        });
        assert!(pieces.get() < 1000, "a pass of {} pieces", pieces.get());
    }
}

/// Reads the input; zeros follow its end.
struct Bits<'a>(&'a [u8]);

impl Bits<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut taken = [0; N];
        let count = N.min(self.0.len());
        taken[..count].copy_from_slice(&self.0[..count]);
        self.0 = &self.0[count..];
        taken
    }

    fn byte(&mut self) -> u8 {
        let [byte] = self.take();
        byte
    }

    fn half(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn long(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    /// An address at one of the places where something can go wrong, or any.
    fn address(&mut self) -> u64 {
        let place = match self.byte() % 10 {
            0 => 0,
            1 => HOLE_START,
            2 => HIGH_RAM_START,
            3 => HIGH_RAM_START + (RAM_BYTES - HOLE_START),
            4 => u64::MAX - 0x1000,
            5..=7 => Driver::place(usize::from(self.byte() % 3))[usize::from(self.byte() % 3)],
            8 => 0x20_0000,
            _ => return self.long(),
        };
        let step = i64::from(self.half() as i16);
        place.wrapping_add_signed(step)
    }

    fn length(&mut self) -> u32 {
        match self.byte() % 6 {
            0 => 0,
            1 => u32::from(self.byte()),
            2 => 512 * u32::from(self.byte()),
            3 => 1514,
            4 => u32::MAX - u32::from(self.byte()),
            _ => self.word(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

        #[test]
        fn a_hostile_guest_of_a_network_device_hurts_nobody(input in proptest::collection::vec(any::<u8>(), 0..600)) {
            drive(Target::Net, &input);
        }

        #[test]
        fn a_hostile_guest_of_an_entropy_source_hurts_nobody(input in proptest::collection::vec(any::<u8>(), 0..600)) {
            drive(Target::Rng, &input);
        }

        #[test]
        fn a_hostile_guest_of_a_balloon_hurts_nobody(input in proptest::collection::vec(any::<u8>(), 0..600)) {
            drive(Target::Balloon, &input);
        }

        #[test]
        fn a_hostile_guest_of_a_disk_hurts_nobody(input in proptest::collection::vec(any::<u8>(), 0..600)) {
            drive(Target::Disk, &input);
        }
    }
}
