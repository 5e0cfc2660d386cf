//! The guest's side of a virtio device, as small as it can be: for tests and for the fuzz entry.
//!
//! Owns the layout of rings as a driver writes them (virtio 1.2, 2.7), independently of the device's own code, so that the
//! two check each other. Must not know the device beyond its registers.

use vm_memory::{Bytes, GuestAddress};

use super::mmio::{register, status};
use crate::kvm::bus::MmioDevice;
use crate::kvm::memory::GuestRam;

/// `VIRTQ_DESC_F_NEXT`: another descriptor follows.
pub(super) const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`: the device writes there.
pub(super) const WRITE: u16 = 2;

/// Where queue `n` lies: `(n + 1) * QUEUE_STRIDE`, its parts at these offsets.
const QUEUE_STRIDE: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;

/// One piece of a request: address, length, whether the device writes it.
pub(super) type Piece = (u64, u32, bool);

/// A descriptor (virtio 1.2, 2.7.5).
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    /// Guest-physical address.
    pub(super) address: u64,
    /// Bytes.
    pub(super) len: u32,
    /// [`NEXT`], [`WRITE`].
    pub(super) flags: u16,
    /// Which one follows.
    pub(super) next: u16,
}

/// A driver of one device. Writes that miss RAM are lost, as on real hardware.
pub(super) struct Driver<'a> {
    device: &'a dyn MmioDevice,
    ram: &'a GuestRam,
    size: u16,
    /// For each queue: next descriptor to use, available index, used index seen.
    queues: Vec<(u16, u16, u16)>,
}

impl<'a> Driver<'a> {
    /// A driver that uses `queues` queues of `size` entries.
    pub(super) fn new(device: &'a dyn MmioDevice, ram: &'a GuestRam, queues: usize, size: u16) -> Self {
        Self { device, ram, size, queues: vec![(0, 0, 0); queues] }
    }

    /// The same driver after its device moved: it goes on with the rings as they are in `ram`.
    #[cfg(test)]
    pub(super) fn moved_to(&self, device: &'a dyn MmioDevice, ram: &'a GuestRam) -> Self {
        Self { device, ram, size: self.size, queues: self.queues.clone() }
    }

    /// Loads a register.
    pub(super) fn load(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Stores a register.
    pub(super) fn store(&self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    /// What the device offers.
    pub(super) fn offered(&self) -> u64 {
        self.store(register::DEVICE_FEATURES_SELECT, 1);
        let high = self.load(register::DEVICE_FEATURES);
        self.store(register::DEVICE_FEATURES_SELECT, 0);
        u64::from(high) << 32 | u64::from(self.load(register::DEVICE_FEATURES))
    }

    /// Steps 1 to 6 of virtio 1.2, 3.1.1, accepting `features`; returns the status the device shows then.
    pub(super) fn negotiate(&self, features: u64) -> u32 {
        self.store(register::STATUS, 0);
        self.store(register::STATUS, u32::from(status::ACKNOWLEDGE));
        self.store(register::STATUS, u32::from(status::ACKNOWLEDGE | status::DRIVER));
        for select in [0, 1] {
            self.store(register::DRIVER_FEATURES_SELECT, select);
            self.store(register::DRIVER_FEATURES, (features >> (32 * select)) as u32);
        }
        self.store(register::STATUS, u32::from(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK));
        self.load(register::STATUS)
    }

    /// Programs a queue and makes it ready; returns whether the device took it.
    pub(super) fn set_up(&self, queue: u32, size: u32, [descriptors, available, used]: [u64; 3]) -> bool {
        self.store(register::QUEUE_SELECT, queue);
        self.store(register::QUEUE_SIZE, size);
        for (low, address) in [
            (register::QUEUE_DESCRIPTORS_LOW, descriptors),
            (register::QUEUE_AVAILABLE_LOW, available),
            (register::QUEUE_USED_LOW, used),
        ] {
            self.store(low, address as u32);
            self.store(low + 4, (address >> 32) as u32);
        }
        self.store(register::QUEUE_READY, 1);
        self.load(register::QUEUE_READY) == 1
    }

    /// Where this driver puts the parts of a queue.
    pub(super) fn place(queue: usize) -> [u64; 3] {
        let base = (queue as u64 + 1) * QUEUE_STRIDE;
        [base, base + AVAILABLE, base + USED]
    }

    /// All steps of virtio 1.2, 3.1.1; returns the final status.
    pub(super) fn start(&mut self, features: u64) -> u32 {
        self.negotiate(features);
        for queue in 0..self.queues.len() {
            self.set_up(queue as u32, u32::from(self.size), Self::place(queue));
            self.queues[queue] = (0, 0, 0);
            for part in Self::place(queue) {
                let _ = self.ram.write_obj(0u32, GuestAddress(part));
            }
        }
        let all = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        self.store(register::STATUS, u32::from(all));
        self.load(register::STATUS)
    }

    /// Writes a descriptor.
    pub(super) fn describe(&self, queue: usize, index: u16, descriptor: Descriptor) {
        let at = GuestAddress(Self::place(queue)[0] + 16 * u64::from(index));
        let Descriptor { address, len, flags, next } = descriptor;
        let raw = u128::from(address) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        let _ = self.ram.write_slice(&raw.to_le_bytes(), at);
    }

    /// Makes the chain that starts at `head` available, without a notification.
    pub(super) fn publish(&mut self, queue: usize, head: u16) {
        let available = Self::place(queue)[1];
        let index = &mut self.queues[queue].1;
        let entry = available + 4 + 2 * u64::from(*index % self.size);
        *index = index.wrapping_add(1);
        let index = *index;
        let _ = self.ram.write_obj(head.to_le(), GuestAddress(entry));
        let _ = self.ram.store(index.to_le(), GuestAddress(available + 2), std::sync::atomic::Ordering::Release);
    }

    /// Queues one request; returns its head.
    pub(super) fn post(&mut self, queue: usize, pieces: &[Piece]) -> u16 {
        let head = self.queues[queue].0;
        for (index, &(address, len, writable)) in pieces.iter().enumerate() {
            let number = self.queues[queue].0;
            let next = (number + 1) % self.size;
            let last = index + 1 == pieces.len();
            let flags = if last { 0 } else { NEXT } | if writable { WRITE } else { 0 };
            self.describe(queue, number, Descriptor { address, len, flags, next });
            self.queues[queue].0 = next;
        }
        self.publish(queue, head);
        head
    }

    /// Notifies.
    pub(super) fn kick(&self, queue: usize) {
        self.store(register::QUEUE_NOTIFY, queue as u32);
    }

    /// Takes what the device completed next: head and length.
    #[cfg(test)]
    pub(super) fn completed(&mut self, queue: usize) -> Option<(u32, u32)> {
        let used = Self::place(queue)[2];
        let index: u16 = self.ram.load(GuestAddress(used + 2), std::sync::atomic::Ordering::Acquire).unwrap();
        let seen = &mut self.queues[queue].2;
        if u16::from_le(index) == *seen {
            return None;
        }
        let entry = used + 4 + 8 * u64::from(*seen % self.size);
        *seen = seen.wrapping_add(1);
        let id: u32 = self.ram.read_obj(GuestAddress(entry)).unwrap();
        let len: u32 = self.ram.read_obj(GuestAddress(entry + 4)).unwrap();
        Some((u32::from_le(id), u32::from_le(len)))
    }

    /// Waits for the next completion, at most five seconds.
    #[cfg(test)]
    pub(super) fn wait(&mut self, queue: usize) -> (u32, u32) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        loop {
            if let Some(done) = self.completed(queue) {
                return done;
            }
            assert!(std::time::Instant::now() < deadline, "queue {queue}: nothing was completed");
            std::thread::sleep(std::time::Duration::from_micros(100));
        }
    }
}
