//! I/O ports: the serial ports, and the ports by which a guest switches itself off or resets.
//!
//! Owns port numbers and dispatch. Must not know vCPUs or where the console goes.

use std::sync::Arc;

use super::serial::Serial;

/// First port of the serial console (COM1).
pub const SERIAL_PORT: u16 = 0x3f8;
/// Ports that a serial port has.
pub const SERIAL_PORTS: u8 = 8;
/// The interrupt of the serial console.
pub const SERIAL_IRQ: u32 = 4;
/// First port of the second serial port (COM2): see [`super::stun_port`].
pub const STUN_PORT: u16 = 0x2f8;
/// Its interrupt.
pub const STUN_IRQ: u32 = 3;
/// Writing [`POWER_OFF_BYTE`] here switches the machine off.
pub const POWER_PORT: u16 = 0x600;
/// See [`POWER_PORT`].
pub const POWER_OFF_BYTE: u8 = 5;
/// Writing [`RESET_BYTE`] here (the keyboard controller's command port) resets the machine.
pub const RESET_PORT: u16 = 0x64;
/// See [`RESET_PORT`].
pub const RESET_BYTE: u8 = 0xfe;
/// ACPI's sleep control register (ACPI 6.5, 4.8.3.7): [`SLEEP_TYPE_OFF`] written here with [`SLEEP_ENABLE`] switches the
/// machine off.
pub const SLEEP_CONTROL_PORT: u16 = 0x604;
/// ACPI's sleep status register: the machine never wakes, so no bit is ever set.
pub const SLEEP_STATUS_PORT: u16 = 0x605;
/// The sleep type of the state S5, in bits 2 to 4 of the register.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// The register's bit 5: go to sleep now.
pub const SLEEP_ENABLE: u8 = 1 << 5;
/// The register's bits that say what is to be done.
const SLEEP_ORDER: u8 = 0b111 << 2 | SLEEP_ENABLE;

/// What a write to a port asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PortAction {
    None,
    PowerOff,
    Reset,
}

/// The ports of a machine.
pub(crate) struct Ports {
    pub(crate) serial: Arc<Serial>,
    pub(crate) second: Arc<Serial>,
}

impl Ports {
    /// A write of one or more bytes (a repeated string instruction brings many) to `port`.
    pub(crate) fn write(&self, port: u16, data: &[u8]) -> PortAction {
        match port {
            SERIAL_PORT..=0x3ff => self.serial.write((port - SERIAL_PORT) as u8, data),
            STUN_PORT..=0x2ff => self.second.write((port - STUN_PORT) as u8, data),
            POWER_PORT if data.contains(&POWER_OFF_BYTE) => return PortAction::PowerOff,
            SLEEP_CONTROL_PORT if data.iter().any(|byte| byte & SLEEP_ORDER == SLEEP_ENABLE | SLEEP_TYPE_OFF << 2) => {
                return PortAction::PowerOff;
            }
            RESET_PORT if data.contains(&RESET_BYTE) => return PortAction::Reset,
            _ => {}
        }
        PortAction::None
    }

    /// A read from `port`; all ones where nothing answers.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        match port {
            SERIAL_PORT..=0x3ff => self.serial.read((port - SERIAL_PORT) as u8, data),
            STUN_PORT..=0x2ff => self.second.read((port - STUN_PORT) as u8, data),
            // The keyboard controller's status: ready to take a command. ACPI's: awake, and never asleep before.
            RESET_PORT | SLEEP_CONTROL_PORT | SLEEP_STATUS_PORT => data.fill(0),
            _ => data.fill(0xff),
        }
    }
}
