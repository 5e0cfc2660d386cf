//! A serial port (16550A): registers between the guest and whoever takes its output.
//!
//! Owns the registers, the interrupt and the queue of input that does not fit the FIFO yet. Must not know what is said on it.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial as Registers, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::bus::DeviceError;
use super::console::Input;

/// Input that waits for room in the FIFO; more is dropped.
const MAX_WAITING_BYTES: usize = 64 << 10;
/// The register for data.
const DATA: u8 = 0;

/// Takes what the guest writes.
pub(crate) trait Output: Send + Sync {
    /// The bytes of one exit, in order. The port is locked meanwhile: nothing may be put into it.
    fn output(&self, bytes: &[u8]);
}

/// The interrupt line.
#[derive(Debug)]
struct Line(Arc<EventFd>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Collects output of one exit, so that it is passed on in one piece.
#[derive(Debug, Default)]
struct Collector(Vec<u8>);

impl Write for Collector {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Port {
    registers: Registers<Line, NoEvents, Collector>,
    waiting: VecDeque<u8>,
}

/// A serial port.
pub(crate) struct Serial {
    /// In errors.
    name: &'static str,
    port: Mutex<Port>,
    irq: Arc<EventFd>,
    output: Arc<dyn Output>,
}

impl Serial {
    /// A port in its state after power-on.
    pub(crate) fn new(name: &'static str, output: Arc<dyn Output>) -> io::Result<Self> {
        let irq = Arc::new(EventFd::new(0)?);
        let registers = Registers::new(Line(irq.clone()), Collector::default());
        Ok(Self { name, port: Mutex::new(Port { registers, waiting: VecDeque::new() }), irq, output })
    }

    /// Signalled to raise the interrupt.
    pub(crate) fn irq(&self) -> &EventFd {
        &self.irq
    }

    fn lock(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest stores bytes, one after the other, into one register.
    pub(crate) fn write(&self, register: u8, data: &[u8]) {
        let mut port = self.lock();
        for &byte in data {
            // Errors: an interrupt that could not be signalled, or a loop-back FIFO that is full; a real port drops too.
            let _ = port.registers.write(register, byte);
        }
        // Output stays in order: it is passed on under the port's lock.
        let output = std::mem::take(&mut port.registers.writer_mut().0);
        self.output.output(&output);
    }

    /// The guest loads bytes, one after the other, from one register.
    pub(crate) fn read(&self, register: u8, data: &mut [u8]) {
        let mut port = self.lock();
        for byte in data {
            *byte = port.registers.read(register);
            if register == DATA {
                port.refill();
            }
        }
    }

    /// The registers and the FIFO, and what waits for it.
    pub(crate) fn save(&self) -> Vec<u8> {
        let port = self.lock();
        let state = port.registers.state();
        let mut bytes = vec![
            state.baud_divisor_low,
            state.baud_divisor_high,
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.scratch,
            state.in_buffer.len() as u8,
        ];
        bytes.extend_from_slice(&state.in_buffer);
        bytes.extend(&port.waiting);
        bytes
    }

    /// Takes a saved state.
    pub(crate) fn restore(&self, bytes: &[u8]) -> Result<(), DeviceError> {
        let bad = |problem: &str| DeviceError::State { device: self.name.into(), problem: problem.into() };
        let (registers, rest) = bytes.split_first_chunk::<10>().ok_or_else(|| bad("it is too short"))?;
        let (fifo, waiting) = rest.split_at_checked(registers[9].into()).ok_or_else(|| bad("its FIFO is cut off"))?;
        if waiting.len() > MAX_WAITING_BYTES {
            return Err(bad("it has too much input"));
        }
        let state = SerialState {
            baud_divisor_low: registers[0],
            baud_divisor_high: registers[1],
            interrupt_enable: registers[2],
            interrupt_identification: registers[3],
            line_control: registers[4],
            line_status: registers[5],
            modem_control: registers[6],
            modem_status: registers[7],
            scratch: registers[8],
            in_buffer: fifo.to_vec(),
        };
        // This also signals an interrupt that the guest has not acknowledged.
        let registers = Registers::from_state(&state, Line(self.irq.clone()), NoEvents, Collector::default())
            .map_err(|e| bad(&format!("{e:?}")))?;
        *self.lock() = Port { registers, waiting: waiting.iter().copied().collect() };
        Ok(())
    }

    /// Back to the state after power-on.
    pub(crate) fn reset(&self) {
        let registers = Registers::new(Line(self.irq.clone()), Collector::default());
        *self.lock() = Port { registers, waiting: VecDeque::new() };
    }
}

impl Port {
    /// Moves waiting input into the FIFO as far as there is room.
    fn refill(&mut self) {
        let room = self.registers.fifo_capacity().min(self.waiting.len());
        if room > 0 {
            let bytes: Vec<u8> = self.waiting.drain(..room).collect();
            // There is room; an interrupt that could not be signalled comes with the next byte.
            let _ = self.registers.enqueue_raw_bytes(&bytes);
        }
    }
}

impl Input for Serial {
    fn input(&self, bytes: &[u8]) {
        let mut port = self.lock();
        let room = MAX_WAITING_BYTES - port.waiting.len().min(MAX_WAITING_BYTES);
        port.waiting.extend(&bytes[..bytes.len().min(room)]);
        port.refill();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kvm::console::Console;
    use crate::model::SerialSpec;

    fn serial_and_console() -> (Serial, Arc<Console>) {
        let console = Console::open(&SerialSpec::None).unwrap();
        (Serial::new("serial0", console.clone()).unwrap(), console)
    }

    fn serial() -> Serial {
        serial_and_console().0
    }

    #[test]
    fn output_of_a_string_instruction_reaches_the_console_and_its_history() {
        let (serial, console) = serial_and_console();
        serial.write(DATA, b"hello\n");
        serial.write(7, b"scratch");
        assert_eq!(console.history(), b"hello\n");
    }

    #[test]
    fn input_longer_than_the_fifo_waits_and_moves_with_the_state() {
        let first = serial();
        let text: Vec<u8> = (0..200).collect();
        first.input(&text);
        let mut head = [0; 3];
        first.read(DATA, &mut head);
        let second = serial();
        second.restore(&first.save()).unwrap();
        let mut tail = vec![0; 197];
        second.read(DATA, &mut tail);
        assert_eq!([head.to_vec(), tail].concat(), text);
        second.reset();
        assert_eq!(second.save(), serial().save());
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_restore_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = serial().restore(&bytes);
        }
    }
}
