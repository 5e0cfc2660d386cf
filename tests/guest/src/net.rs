//! Owns the virtio-net driver and its face to smoltcp.

use core::sync::atomic::Ordering::Relaxed;

use dunlin_guest::ledger::IrqLedger;
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

use crate::clock;
use crate::cpu;
use crate::once::Once;
use crate::virtio::{Queue, QueueMemory, Transport, WRITABLE};

const QUEUE: usize = 64;
const BUFFER_BYTES: usize = 2048;
const HEADER_BYTES: usize = 12;
const FRAME_BYTES: usize = 1514;
const FEATURE_MAC: u64 = 1 << 5;
/// Observed running time within which progress of a ring must be followed by its interrupt.
pub const IRQ_NS: u64 = 500_000_000;

type Buffers = [[u8; BUFFER_BYTES]; QUEUE];

static RECEIVE_QUEUE: Once<QueueMemory<QUEUE>> = Once::new(QueueMemory::new());
static SEND_QUEUE: Once<QueueMemory<QUEUE>> = Once::new(QueueMemory::new());
static RECEIVE_BUFFERS: Once<Buffers> = Once::new([[0; BUFFER_BYTES]; QUEUE]);
static SEND_BUFFERS: Once<Buffers> = Once::new([[0; BUFFER_BYTES]; QUEUE]);

/// A running network card.
pub struct NetDevice {
    transport: Transport,
    receive: Queue<QUEUE>,
    send: Queue<QUEUE>,
    receive_buffers: &'static mut Buffers,
    send_buffers: &'static mut Buffers,
    /// Send buffers that the device does not hold.
    free: [usize; QUEUE],
    free_count: usize,
    interrupt: usize,
    ledger: IrqLedger,
    taken_before: (u16, u16),
    /// Address of the card.
    pub mac: [u8; 6],
    /// Frames received and sent.
    pub frames: (u64, u64),
}

impl NetDevice {
    /// Starts the card behind `transport`; its interrupts are counted in slot `interrupt`.
    pub fn start(transport: Transport, interrupt: usize) -> Option<Self> {
        let features = transport.negotiate(FEATURE_MAC)?;
        let mut mac = [0x02, 0, 0, 0, 0, 0x02];
        if features & FEATURE_MAC != 0 {
            (0..6).for_each(|byte| mac[byte] = transport.config8(byte as u64));
        }
        let mut receive = Queue::new(transport, 0, RECEIVE_QUEUE.take())?;
        let mut send = Queue::new(transport, 1, SEND_QUEUE.take())?;
        let (receive_buffers, send_buffers) = (RECEIVE_BUFFERS.take(), SEND_BUFFERS.take());
        for (index, buffer) in receive_buffers.iter_mut().enumerate() {
            receive.describe(index, buffer.as_mut_ptr() as u64, BUFFER_BYTES, WRITABLE, 0);
            receive.offer(index);
        }
        send.silence();
        transport.start();
        receive.notify();
        Some(Self {
            transport,
            receive,
            send,
            receive_buffers,
            send_buffers,
            free: core::array::from_fn(|index| index),
            free_count: QUEUE,
            interrupt,
            ledger: IrqLedger::default(),
            taken_before: (0, 0),
            mac,
            frames: (0, 0),
        })
    }

    fn interrupts(&self) -> u64 {
        cpu::cpu(0).device_interrupts[self.interrupt].load(Relaxed)
    }

    /// Before the rings are read: acknowledges an interrupt that came. Returns the interrupt counter to pass to `settle`.
    pub fn begin(&mut self) -> u64 {
        let interrupts = self.interrupts();
        if self.ledger.is_new(interrupts) {
            self.transport.acknowledge();
        }
        interrupts
    }

    /// After the rings were read: books progress against interrupts and offers the device the buffers that are free again.
    pub fn settle(&mut self, interrupts: u64, run_cycles: u64) {
        self.reclaim();
        let taken = (self.receive.taken(), self.send.taken());
        let owed = taken.0 != self.taken_before.0;
        let any = taken != self.taken_before;
        self.taken_before = taken;
        self.ledger.look(interrupts, owed, any, run_cycles, clock::cycles(IRQ_NS));
        self.receive.notify();
    }

    /// Interrupts lost and spurious.
    pub fn interrupts_lost_spurious(&self) -> (u64, u64) {
        (self.ledger.lost, self.ledger.spurious)
    }

    fn reclaim(&mut self) {
        while let Some((index, _)) = self.send.take() {
            self.free[self.free_count] = index;
            self.free_count += 1;
        }
    }
}

/// A frame that was received.
pub struct Received {
    frame: [u8; FRAME_BYTES],
    len: usize,
}

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.frame[..self.len])
    }
}

/// The right to send one frame.
pub struct Sender<'a>(&'a mut NetDevice);

impl TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let device = self.0;
        device.free_count -= 1;
        let index = device.free[device.free_count];
        let buffer = &mut device.send_buffers[index];
        buffer[..HEADER_BYTES].fill(0);
        let result = f(&mut buffer[HEADER_BYTES..HEADER_BYTES + len]);
        let address = buffer.as_ptr() as u64;
        device.send.describe(index, address, HEADER_BYTES + len, 0, 0);
        device.send.offer(index);
        // At once, as a kernel's driver does: the first answer to what has come while the VM stood does not wait for the last.
        device.send.notify();
        device.frames.1 += 1;
        result
    }
}

impl Device for NetDevice {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sender<'_>)> {
        self.reclaim();
        if self.free_count == 0 {
            return None;
        }
        let (index, written) = self.receive.take()?;
        let len = written.saturating_sub(HEADER_BYTES).min(FRAME_BYTES);
        let mut received = Received { frame: [0; FRAME_BYTES], len };
        received.frame[..len].copy_from_slice(&self.receive_buffers[index][HEADER_BYTES..HEADER_BYTES + len]);
        self.receive.offer(index);
        self.frames.0 += 1;
        Some((received, Sender(self)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sender<'_>> {
        self.reclaim();
        (self.free_count > 0).then_some(Sender(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_BYTES;
        capabilities
    }
}
