//! Owns virtio-mmio version 2: the transport's registers and a split virtqueue with descriptors that stay where they are.

use core::sync::atomic::{Ordering, fence};

use dunlin_guest::cmdline::Transport as Place;

use crate::io::{read32, write32};

const MAGIC: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SELECT: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SELECT: u64 = 0x024;
const QUEUE_SELECT: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESCRIPTORS: u64 = 0x080;
const QUEUE_DRIVER: u64 = 0x090;
const QUEUE_DEVICE: u64 = 0x0a0;
const CONFIG: u64 = 0x100;

const VERSION_1: u64 = 1 << 32;
const STATUS_ACKNOWLEDGE: u32 = 1;
const STATUS_DRIVER: u32 = 2;
const STATUS_DRIVER_OK: u32 = 4;
const STATUS_FEATURES_OK: u32 = 8;

/// Device id of a network card.
pub const ID_NET: u32 = 1;
/// Device id of a disk.
pub const ID_BLOCK: u32 = 2;
/// Device id of a balloon.
pub const ID_BALLOON: u32 = 5;

/// The next descriptor continues this one.
pub const NEXT: u16 = 1;
/// The device writes into this descriptor.
pub const WRITABLE: u16 = 2;

/// A virtio-mmio transport.
#[derive(Clone, Copy)]
pub struct Transport {
    base: u64,
}

impl Transport {
    /// Looks at a transport: its device id, or `None` when nothing usable is there.
    pub fn probe(place: &Place) -> Option<(Self, u32)> {
        let transport = Self { base: place.address };
        if place.bytes < CONFIG || transport.read(MAGIC) != 0x7472_6976 || transport.read(VERSION) != 2 {
            return None;
        }
        match transport.read(DEVICE_ID) {
            0 => None,
            id => Some((transport, id)),
        }
    }

    fn read(self, register: u64) -> u32 {
        // SAFETY: the command line names this page as a virtio-mmio transport; service spaces map it.
        unsafe { read32(self.base + register) }
    }

    fn write(self, register: u64, value: u32) {
        // SAFETY: as in `read`; the queues given to the device are statics that live for ever.
        unsafe { write32(self.base + register, value) }
    }

    /// Resets the device and negotiates features out of `wanted` and VERSION_1; `None` when the device refuses.
    pub fn negotiate(self, wanted: u64) -> Option<u64> {
        self.write(STATUS, 0);
        self.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
        let offered = (0..2).fold(0u64, |bits, half| {
            self.write(DEVICE_FEATURES_SELECT, half);
            bits | u64::from(self.read(DEVICE_FEATURES)) << (32 * half)
        });
        let features = offered & (wanted | VERSION_1);
        for half in 0..2 {
            self.write(DRIVER_FEATURES_SELECT, half);
            self.write(DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
        let accepted = self.read(STATUS) & STATUS_FEATURES_OK != 0 && features & VERSION_1 != 0;
        accepted.then_some(features)
    }

    /// Lets the device run.
    pub fn start(self) {
        self.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
    }

    /// Reads four bytes of the device's configuration.
    pub fn config32(self, offset: u64) -> u32 {
        self.read(CONFIG + offset)
    }

    /// Writes four bytes of the device's configuration.
    pub fn set_config32(self, offset: u64, value: u32) {
        self.write(CONFIG + offset, value);
    }

    /// Reads one byte of the device's configuration.
    pub fn config8(self, offset: u64) -> u8 {
        let value: u8;
        // SAFETY: a byte register of the same page as in `read`.
        unsafe { core::arch::asm!("mov {}, [{}]", out(reg_byte) value, in(reg) self.base + CONFIG + offset) }
        value
    }

    /// Acknowledges whatever interrupt the device shows.
    pub fn acknowledge(self) {
        let status = self.read(INTERRUPT_STATUS);
        if status != 0 {
            self.write(INTERRUPT_ACK, status);
        }
    }

    fn write64(self, register: u64, value: u64) {
        self.write(register, value as u32);
        self.write(register + 4, (value >> 32) as u32);
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct UsedElement {
    id: u32,
    len: u32,
}

/// Memory of a queue of `N` descriptors (a power of two).
#[repr(C, align(4096))]
pub struct QueueMemory<const N: usize> {
    descriptors: [Descriptor; N],
    available_flags: u16,
    available_index: u16,
    available: [u16; N],
    available_event: u16,
    used_flags: u32, // flags and index, aligned to four bytes
    used: [UsedElement; N],
    used_event: u16,
}

impl<const N: usize> QueueMemory<N> {
    /// An empty queue.
    pub const fn new() -> Self {
        const { assert!(N.is_power_of_two()) };
        Self {
            descriptors: [Descriptor { address: 0, len: 0, flags: 0, next: 0 }; N],
            available_flags: 0,
            available_index: 0,
            available: [0; N],
            available_event: 0,
            used_flags: 0,
            used: [UsedElement { id: 0, len: 0 }; N],
            used_event: 0,
        }
    }
}

/// A virtqueue in use.
pub struct Queue<const N: usize> {
    memory: *mut QueueMemory<N>,
    transport: Transport,
    index: u32,
    offered: u16,
    notified: u16,
    taken: u16,
}

impl<const N: usize> Queue<N> {
    /// Gives queue `index` of a device to it; `None` when the device's queue is too small.
    pub fn new(transport: Transport, index: u32, memory: &'static mut QueueMemory<N>) -> Option<Self> {
        transport.write(QUEUE_SELECT, index);
        if (transport.read(QUEUE_SIZE_MAX) as usize) < N {
            return None;
        }
        let memory: *mut QueueMemory<N> = memory;
        transport.write(QUEUE_SIZE, N as u32);
        // SAFETY: addresses inside the static are computed; statics are mapped one to one, so these are physical.
        let parts = unsafe {
            [
                (QUEUE_DESCRIPTORS, &raw const (*memory).descriptors as u64),
                (QUEUE_DRIVER, &raw const (*memory).available_flags as u64),
                (QUEUE_DEVICE, &raw const (*memory).used_flags as u64),
            ]
        };
        parts.into_iter().for_each(|(register, address)| transport.write64(register, address));
        transport.write(QUEUE_READY, 1);
        Some(Self { memory, transport, index, offered: 0, notified: 0, taken: 0 })
    }

    /// Asks the device for no interrupts of this queue.
    pub fn silence(&mut self) {
        // SAFETY: the field is only written here and read by the device.
        unsafe { (&raw mut (*self.memory).available_flags).write_volatile(1) }
    }

    /// Writes descriptor `index`, which the device must not own.
    pub fn describe(&mut self, index: usize, address: u64, len: usize, flags: u16, next: usize) {
        let descriptor = Descriptor { address, len: len as u32, flags, next: next as u16 };
        // SAFETY: inside the queue's memory (the index is bounds-checked by the array), not owned by the device by contract.
        unsafe { (&raw mut (*self.memory).descriptors[index % N]).write_volatile(descriptor) }
    }

    /// Offers the chain that starts at descriptor `head`.
    pub fn offer(&mut self, head: usize) {
        // SAFETY: inside the queue's memory; the device reads the slot only after the index has moved.
        unsafe {
            (&raw mut (*self.memory).available[usize::from(self.offered) % N]).write_volatile(head as u16);
            self.offered = self.offered.wrapping_add(1);
            fence(Ordering::Release);
            (&raw mut (*self.memory).available_index).write_volatile(self.offered);
        }
    }

    /// Tells the device about what was offered since the last time.
    pub fn notify(&mut self) {
        if self.notified == self.offered {
            return;
        }
        self.notified = self.offered;
        fence(Ordering::SeqCst);
        // SAFETY: reads a field that the device writes.
        let flags = unsafe { (&raw const (*self.memory).used_flags).read_volatile() } as u16;
        if flags & 1 == 0 {
            self.transport.write(QUEUE_NOTIFY, self.index);
        }
    }

    /// Takes the next chain that the device has used: its head and the number of bytes written.
    pub fn take(&mut self) -> Option<(usize, usize)> {
        // SAFETY: reads fields that the device writes; the element is read only after the index says it is there.
        unsafe {
            let index = ((&raw const (*self.memory).used_flags).read_volatile() >> 16) as u16;
            if index == self.taken {
                return None;
            }
            fence(Ordering::Acquire);
            let element = (&raw const (*self.memory).used[usize::from(self.taken) % N]).read_volatile();
            self.taken = self.taken.wrapping_add(1);
            Some((element.id as usize % N, element.len as usize))
        }
    }

    /// Chains that the device has used so far (wraps).
    pub fn taken(&self) -> u16 {
        self.taken
    }
}
