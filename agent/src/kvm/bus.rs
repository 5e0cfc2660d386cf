//! The MMIO bus, and what a device must be able to do: answer the guest, run and stand, and let its state move.
//!
//! Owns addresses, interrupt numbers and dispatch. Must not know what any device does, nor KVM.

use std::any::Any;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::model::network::PortCounters;

/// Guest-physical address of the first device's window.
pub const MMIO_BASE: u64 = 0xd000_0000;
/// Bytes of one device's window.
pub const MMIO_WINDOW_BYTES: u64 = 0x1000;
/// The interrupt of the first device; the following devices have the following ones.
pub const FIRST_IRQ: u32 = 5;
/// Devices that fit: interrupts 5 to 23 of the one I/O APIC.
pub const MAX_BUS_DEVICES: usize = 19;

/// A device could not do what the machine asked.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The kernel refused.
    #[error("{device}: {action} failed")]
    Io {
        /// The device's name.
        device: String,
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A saved state that is none of this device, or that its backend cannot take.
    #[error("{device}: the saved state does not fit: {problem}")]
    State {
        /// The device's name.
        device: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The device's worker is gone.
    #[error("{device}: {problem}")]
    Worker {
        /// The device's name.
        device: String,
        /// What is known of it.
        problem: String,
    },
}

/// What answers loads and stores in one window of guest-physical space. The guest chooses every offset and length;
/// none may make the device panic.
pub trait MmioDevice: Send + Sync {
    /// A load of `data.len()` bytes at `offset` of the window.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// A store of `data` at `offset` of the window.
    fn write(&self, offset: u64, data: &[u8]);
}

/// An edge-triggered interrupt line.
pub trait IrqLine: Send + Sync {
    /// Raises the interrupt; when it returns, the interrupt controllers have it.
    fn pulse(&self);
}

/// A line that a test listens to.
#[cfg(test)]
impl IrqLine for EventFd {
    fn pulse(&self) {
        self.write(1).expect("the counter of a non-blocking event is never full");
    }
}

/// A store that wakes a device's worker with no exit to user space (a queue notification): the guest writes the
/// 32-bit `value` at `offset` of the window, and KVM signals `event`.
#[derive(Clone, Copy, Debug)]
pub struct IoEvent<'a> {
    /// Where in the window.
    pub offset: u64,
    /// What is stored.
    pub value: u32,
    /// What is signalled.
    pub event: &'a EventFd,
}

/// A device that runs, stands, and whose state moves. Made standing; the machine resumes it before the first guest
/// instruction. Whoever made it can ask for what only its kind can do, by its type.
pub trait Device: MmioDevice + Any {
    /// Its name, `net0`, `disk0`: also the name of its section in the saved state. At most 32 bytes.
    fn name(&self) -> String;

    /// Stands still: returns when no worker touches guest memory or the backend any more, and nothing more leaves for the
    /// network. Called after the vCPUs stand. Idempotent.
    fn pause(&self) -> Result<(), DeviceError>;

    /// Goes on. Called before the vCPUs run. A notification that was signalled but not served before the pause (here, or
    /// at the host the state came from) is served now: every ready queue is looked at once. A device that was restored
    /// with an interrupt that the guest has not acknowledged signals it again, since a signal may have been on its way.
    fn resume(&self) -> Result<(), DeviceError>;

    /// The state, of a device that stands. Versioned by the device itself.
    fn save(&self) -> Result<Vec<u8>, DeviceError>;

    /// Takes a state, before the first [`Device::resume`]. The bytes are a peer's word: check them.
    fn restore(&self, state: &[u8]) -> Result<(), DeviceError>;

    /// Back to the state after power-on, of a device that stands (the guest asked for a reset of the machine).
    fn reset(&self) -> Result<(), DeviceError>;

    /// Begins nothing any more, and does not wait for what is under way: [`Device::pause`] follows.
    fn order_pause(&self) {}

    /// What the guest sends and writes is held in the machine from now on, at most so many bytes of it, as that of increment 1.
    fn hold_output(&self, bytes: usize) {
        let _ = bytes;
    }

    /// What it sends and writes from now on is that of increment `number`. Of a device that stands.
    fn begin_increment(&self, number: u32) {
        let _ = number;
    }

    /// What is that of increments up to `number` goes out.
    fn let_out(&self, number: u32) {
        let _ = number;
    }

    /// All that is held goes out, and nothing is held any more.
    fn end_holding(&self) {}

    /// What is held of a device that stands, and must not be lost with it: a part of its state. Empty if there is nothing.
    fn held(&self) -> Result<Vec<u8>, DeviceError> {
        Ok(Vec::new())
    }

    /// Takes what [`Device::held`] gave, of a device that stands; it goes out when that goes on. The bytes are a peer's word: check them.
    fn take_held(&self, held: &[u8]) -> Result<(), DeviceError> {
        let _ = held;
        Ok(())
    }

    /// What has come from the network so far is thrown away, and what comes waits for what is relayed from the VM's former place.
    fn await_relay(&self) {}

    /// Gives the guest frames that reached its former place, before those that wait.
    fn relay_frames(&self, frames: Vec<Vec<u8>>) {
        let _ = frames;
    }

    /// What was at the former place when the VM ran here has been relayed; what waited goes on.
    fn relay_caught_up(&self) {}

    /// Nothing more is relayed.
    fn end_relay(&self) {}

    /// Where frames for the guest come in: a descriptor of it. Only network devices have one.
    ///
    /// # Errors
    /// No descriptor is left.
    fn former_port(&self) -> io::Result<Option<OwnedFd>> {
        Ok(None)
    }

    /// What passed through a network port; none for another device.
    fn counters(&self) -> Option<PortCounters> {
        None
    }

    /// The guest is to announce itself, if its driver can be asked. Only network devices can.
    fn ask_to_announce(&self) {}

    /// Sends a frame into the network as if the guest had sent it, also while the device stands (announcements). Only
    /// network devices can.
    fn send_frame(&self, frame: &[u8]) -> io::Result<()> {
        let _ = frame;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The stores that KVM turns into signals.
    fn io_events(&self) -> Vec<IoEvent<'_>>;

    /// Gives the device its interrupt line, once, before it is resumed.
    fn connect_irq(&self, line: Arc<dyn IrqLine>);
}

/// The devices by address. Fixed once the machine is built, so dispatch takes no lock.
#[derive(Default)]
pub struct MmioBus {
    devices: Vec<Arc<dyn Device>>,
}

/// More devices than interrupts.
#[derive(Debug, thiserror::Error)]
#[error("a machine takes at most {MAX_BUS_DEVICES} devices")]
pub struct BusFull;

impl MmioBus {
    /// Puts a device into the next window.
    pub fn attach(&mut self, device: Arc<dyn Device>) -> Result<(), BusFull> {
        if self.devices.len() == MAX_BUS_DEVICES {
            return Err(BusFull);
        }
        self.devices.push(device);
        Ok(())
    }

    /// All devices, in the order of their windows.
    pub fn devices(&self) -> &[Arc<dyn Device>] {
        &self.devices
    }

    /// The guest-physical address of window `index`.
    pub const fn address(index: usize) -> u64 {
        MMIO_BASE + index as u64 * MMIO_WINDOW_BYTES
    }

    /// The interrupt of window `index`.
    pub const fn irq(index: usize) -> u32 {
        FIRST_IRQ + index as u32
    }

    /// Answers a load; an address where nothing lies reads as all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Takes a store; one where nothing lies is dropped.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(&dyn Device, u64)> {
        let inside = address.checked_sub(MMIO_BASE)?;
        let device = self.devices.get(usize::try_from(inside / MMIO_WINDOW_BYTES).ok()?)?;
        Some((device.as_ref(), inside % MMIO_WINDOW_BYTES))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// A device that keeps what it is told.
    struct Probe {
        written: Mutex<Vec<(u64, Vec<u8>)>>,
    }

    impl MmioDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.written.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    impl Device for Probe {
        fn name(&self) -> String {
            "probe0".into()
        }

        fn pause(&self) -> Result<(), DeviceError> {
            Ok(())
        }

        fn resume(&self) -> Result<(), DeviceError> {
            Ok(())
        }

        fn save(&self) -> Result<Vec<u8>, DeviceError> {
            Ok(Vec::new())
        }

        fn restore(&self, _: &[u8]) -> Result<(), DeviceError> {
            Ok(())
        }

        fn reset(&self) -> Result<(), DeviceError> {
            Ok(())
        }

        fn io_events(&self) -> Vec<IoEvent<'_>> {
            Vec::new()
        }

        fn connect_irq(&self, _: Arc<dyn IrqLine>) {}
    }

    #[test]
    fn loads_and_stores_find_their_window() {
        let probe = || Arc::new(Probe { written: Mutex::default() });
        let mut bus = MmioBus::default();
        let second = probe();
        bus.attach(probe()).unwrap();
        bus.attach(second.clone()).unwrap();
        bus.write(MmioBus::address(1) + 0x50, &[1, 2]);
        assert_eq!(*second.written.lock().unwrap(), [(0x50, vec![1, 2])]);
        let mut data = [0; 4];
        bus.read(MmioBus::address(0) + 7, &mut data);
        assert_eq!(data, [7; 4]);
        for nowhere in [0, MMIO_BASE - 1, MmioBus::address(2), u64::MAX] {
            bus.read(nowhere, &mut data);
            assert_eq!(data, [0xff; 4]);
            bus.write(nowhere, &data);
        }
        while bus.devices().len() < MAX_BUS_DEVICES {
            bus.attach(probe()).unwrap();
        }
        assert!(bus.attach(probe()).is_err());
        assert_eq!(MmioBus::irq(MAX_BUS_DEVICES - 1), 23);
    }
}
