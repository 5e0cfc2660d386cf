//! A device's interrupt line and the two registers behind it (virtio 1.2, 4.2.2: `InterruptStatus`, `InterruptACK`).
//!
//! Owns what was raised and not yet acknowledged, and `DEVICE_NEEDS_RESET`, which a worker sets while the registers
//! belong to the vCPUs. Atomics only: neither side waits for the other.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use crate::kvm::bus::IrqLine;

/// A used buffer was added (`InterruptStatus` bit 0).
pub(super) const USED_BUFFER: u32 = 1;
/// The configuration changed, or the device needs a reset (`InterruptStatus` bit 1).
pub(super) const CONFIGURATION: u32 = 2;

/// One interrupt line. At rest when made; until it is connected, nobody hears it.
#[derive(Default)]
pub(super) struct Interrupt {
    status: AtomicU32,
    needs_reset: AtomicBool,
    line: OnceLock<Arc<dyn IrqLine>>,
}

impl Interrupt {
    /// Connects it to the interrupt controllers. Only the first connection counts.
    pub(super) fn connect(&self, line: Arc<dyn IrqLine>) {
        let _connected_already = self.line.set(line);
    }

    /// Raised and not yet acknowledged.
    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    /// Sets a bit and signals the line.
    pub(super) fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::AcqRel);
        self.signal();
    }

    /// Clears the acknowledged bits.
    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Signals again what was not acknowledged: the signal itself may have been lost between two hosts.
    pub(super) fn repeat(&self) {
        if self.status() != 0 {
            self.signal();
        }
    }

    /// Whether the device gave up until the driver resets it.
    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// Gives up; tells a driver that is running (virtio 1.2, 2.1.2).
    pub(super) fn demand_reset(&self, driver_runs: bool) {
        self.needs_reset.store(true, Ordering::Release);
        if driver_runs {
            self.raise(CONFIGURATION);
        }
    }

    /// Takes both registers' values, without signalling.
    pub(super) fn set(&self, status: u32, needs_reset: bool) {
        self.status.store(status, Ordering::Release);
        self.needs_reset.store(needs_reset, Ordering::Release);
    }

    fn signal(&self) {
        if let Some(line) = self.line.get() {
            line.pulse();
        }
    }
}
