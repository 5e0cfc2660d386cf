//! The virtio-mmio transport, version 2 (virtio 1.2, 4.2): registers, status transitions, and the device's queues.
//!
//! Owns every register and what a guest may do to it in which state. Must not know threads (whoever calls
//! [`Transport::serve`] is the worker), KVM, or what the requests of a queue mean.
//!
//! Locks: `registers` before `engine` before `config`. Interrupt registers, notifications and loads from the configuration
//! space take neither of the first two, so a vCPU never waits there for a disk.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::interrupt::{self, Interrupt};
use super::queue::{Geometry, Ring, RingFault};
use super::state::{DeviceState, QueueState, StateError};
use super::warn::Complaints;
use crate::kvm::bus::MmioDevice;
use crate::kvm::memory::GuestRam;
use crate::model::network::PortCounters;

/// Register offsets (virtio 1.2, 4.2.2, table 4.1).
pub(super) mod register {
    /// "virt", little-endian.
    pub(crate) const MAGIC: u64 = 0x000;
    /// 2.
    pub(crate) const VERSION: u64 = 0x004;
    /// Device type.
    pub(crate) const DEVICE_ID: u64 = 0x008;
    /// Vendor.
    pub(crate) const VENDOR_ID: u64 = 0x00c;
    /// Offered features, 32 bits of them.
    pub(crate) const DEVICE_FEATURES: u64 = 0x010;
    /// Which 32 bits.
    pub(crate) const DEVICE_FEATURES_SELECT: u64 = 0x014;
    /// Accepted features, 32 bits of them.
    pub(crate) const DRIVER_FEATURES: u64 = 0x020;
    /// Which 32 bits.
    pub(crate) const DRIVER_FEATURES_SELECT: u64 = 0x024;
    /// The queue that the queue registers mean.
    pub(crate) const QUEUE_SELECT: u64 = 0x030;
    /// Its largest size; 0 if there is no such queue.
    pub(crate) const QUEUE_SIZE_MAX: u64 = 0x034;
    /// Its size.
    pub(crate) const QUEUE_SIZE: u64 = 0x038;
    /// Whether it is used.
    pub(crate) const QUEUE_READY: u64 = 0x044;
    /// "There are new buffers in this queue."
    pub(crate) const QUEUE_NOTIFY: u64 = 0x050;
    /// Why the interrupt was raised.
    pub(crate) const INTERRUPT_STATUS: u64 = 0x060;
    /// Which reasons were handled.
    pub(crate) const INTERRUPT_ACK: u64 = 0x064;
    /// Device status.
    pub(crate) const STATUS: u64 = 0x070;
    /// Descriptor table, low half.
    pub(crate) const QUEUE_DESCRIPTORS_LOW: u64 = 0x080;
    /// Descriptor table, high half.
    pub(crate) const QUEUE_DESCRIPTORS_HIGH: u64 = 0x084;
    /// Available ring, low half.
    pub(crate) const QUEUE_AVAILABLE_LOW: u64 = 0x090;
    /// Available ring, high half.
    pub(crate) const QUEUE_AVAILABLE_HIGH: u64 = 0x094;
    /// Used ring, low half.
    pub(crate) const QUEUE_USED_LOW: u64 = 0x0a0;
    /// Used ring, high half.
    pub(crate) const QUEUE_USED_HIGH: u64 = 0x0a4;
    /// Shared memory region; there is none.
    pub(crate) const SHM_SELECT: u64 = 0x0ac;
    /// First of the four registers of that region, which read as all ones: no such region.
    pub(crate) const SHM_FIRST: u64 = 0x0b0;
    /// Last of them.
    pub(crate) const SHM_LAST: u64 = 0x0bc;
    /// Changes with the configuration space.
    pub(crate) const CONFIG_GENERATION: u64 = 0x0fc;
    /// The configuration space starts here.
    pub(crate) const CONFIG: u64 = 0x100;
}

/// Device status bits (virtio 1.2, 2.1).
pub(super) mod status {
    /// The guest noticed the device.
    pub(crate) const ACKNOWLEDGE: u8 = 1;
    /// The guest has a driver for it.
    pub(crate) const DRIVER: u8 = 2;
    /// The driver is set up; queues work.
    pub(crate) const DRIVER_OK: u8 = 4;
    /// Features are agreed upon.
    pub(crate) const FEATURES_OK: u8 = 8;
    /// The device gave up; only the device sets it.
    pub(crate) const NEEDS_RESET: u8 = 64;
    /// The driver gave up.
    pub(crate) const FAILED: u8 = 128;
}

/// Feature bits of every device (virtio 1.2, 6), as masks.
pub(super) mod feature {
    /// Indirect descriptor tables (bit 28).
    pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
    /// Fewer notifications and interrupts by index (bit 29).
    pub(crate) const EVENT_IDX: u64 = 1 << 29;
    /// Not legacy (bit 32); a driver must accept it.
    pub(crate) const VERSION_1: u64 = 1 << 32;
    /// What the transport and its rings offer for any device.
    pub(crate) const TRANSPORT: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}

const MAGIC_VALUE: u32 = u32::from_le_bytes(*b"virt");
const VERSION_VALUE: u32 = 2;
const VENDOR_VALUE: u32 = u32::from_le_bytes(*b"dnln");

/// What a pass over the queues left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// There is more to do: come again at once (unless it was held).
    pub more: bool,
    /// Come again when the backend's descriptor can be read.
    pub readable: bool,
    /// Come again when the backend's descriptor can be written.
    pub writable: bool,
    /// A request has changed the configuration space; its driver knows.
    pub configured: bool,
}

/// One pass over the queues: what it may touch, and when it must stop.
pub struct Pass<'a> {
    /// Queues, `None` where the driver made none ready.
    pub rings: &'a mut [Option<Ring>],
    /// Guest memory.
    pub ram: &'a GuestRam,
    /// Features that the driver accepted.
    pub features: u64,
    /// For complaints about requests.
    pub complaints: &'a Complaints,
    /// True as soon as the worker is wanted elsewhere: asked before each piece of work, so that a pause is prompt.
    pub hold: &'a dyn Fn() -> bool,
}

/// What makes a device a network port or a disk.
pub trait Backend: Send + 'static {
    /// Device type (virtio 1.2, 5).
    fn device_id(&self) -> u32;

    /// The largest size of each queue, a power of two.
    fn queue_sizes(&self) -> &'static [u16];

    /// Features of this type of device; [`feature::TRANSPORT`] is added.
    fn features(&self) -> u64;

    /// The configuration space as it is now. Whoever changes it does so in [`Transport::with_backend`], and the driver is told.
    fn config(&self) -> Vec<u8>;

    /// A store by the driver into the configuration space; false if it changes nothing. The guest chooses both: beyond the
    /// end of [`Backend::config`], for instance.
    fn write_config(&mut self, offset: u64, data: &[u8]) -> bool {
        let _ = (offset, data);
        false
    }

    /// What of the backend moves. By default the configuration space, which then must be the same at both hosts.
    fn save(&self) -> Vec<u8> {
        self.config()
    }

    /// Whether [`Backend::restore`] can take what was saved. The bytes are a peer's word.
    fn fits(&self, saved: &[u8]) -> bool {
        saved == self.save()
    }

    /// Takes what fits, after a reset.
    fn restore(&mut self, saved: &[u8]) {
        let _ = saved;
    }

    /// Serves the queues: a bounded number of requests, each in bounded pieces between which it asks [`Pass::hold`].
    ///
    /// # Errors
    /// A broken ring: the device will demand a reset.
    fn serve(&mut self, pass: &mut Pass<'_>) -> Result<Served, RingFault>;

    /// The guest reset the device, or the machine was reset.
    fn reset(&mut self) {}

    /// The machine was reset: also what a driver's reset leaves is as after power-on. Follows [`Backend::reset`].
    fn power_on(&mut self) {}

    /// Before the device runs: takes what only the running VM may hold.
    ///
    /// # Errors
    /// It cannot be had; the device must not run.
    fn activate(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// After the worker stands: makes sure that another host would see what the guest was told is done, and gives up what
    /// [`Backend::activate`] took.
    ///
    /// # Errors
    /// It could not; nothing was given up.
    fn quiesce(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// What leaves the machine for the guest is held from now on, at most so many bytes: as that of increment 1.
    fn hold_output(&mut self, _bytes: usize) {}

    /// What leaves from now on is that of increment `number`.
    fn begin_increment(&mut self, _number: u32) {}

    /// What is that of increments up to `number` goes out, soon.
    fn let_out(&mut self, _number: u32) {}

    /// Nothing is held any more.
    fn end_holding(&mut self) {}

    /// What is held and must not be lost: with [`Backend::save`]d state whoever takes it goes on with both. Empty if there is nothing.
    fn held(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes what [`Backend::held`] gave: it goes out when the device goes on. The bytes are a peer's word; `false` if they are none.
    fn take_held(&mut self, held: &[u8]) -> bool {
        held.is_empty()
    }

    /// What has come from the network so far is thrown away, and what comes waits for what is relayed from the VM's former place.
    fn await_relay(&mut self) {}

    /// A frame that reached the VM's former place.
    fn relay_frame(&mut self, _frame: Vec<u8>) {}

    /// What was at the former place when the VM ran here has been relayed.
    fn relay_caught_up(&mut self) {}

    /// Nothing more is relayed.
    fn end_relay(&mut self) {}

    /// Where frames for the guest come in.
    fn former_port(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// What passed through a network port; none for another device.
    fn counters(&self) -> Option<PortCounters> {
        None
    }

    /// The guest is to say itself, to whom it knows, where it is: if its driver, which accepted `features`, can be asked.
    fn ask_to_announce(&mut self, _features: u64) {}

    /// Sends a frame as if the guest had.
    ///
    /// # Errors
    /// Not a network device, or what the interface answered.
    fn send_frame(&mut self, frame: &[u8]) -> io::Result<()> {
        let _ = frame;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// What about the saved backend and this one does not fit, in words; it does not.
    fn explain_config(&self, saved: &[u8]) -> String;
}

#[derive(Clone, Copy, Debug, Default)]
struct QueueRegisters {
    geometry: Geometry,
    ready: bool,
}

#[derive(Debug)]
struct Registers {
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    status: u8,
    queues: Vec<QueueRegisters>,
}

impl Registers {
    fn new(queue_sizes: &[u16]) -> Self {
        // A queue starts at its largest size, for drivers that do not write it.
        let queue = |&size: &u16| QueueRegisters {
            geometry: Geometry { size: u32::from(size), ..Geometry::default() },
            ready: false,
        };
        Self {
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            status: 0,
            queues: queue_sizes.iter().map(queue).collect(),
        }
    }

    fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(self.queue_select as usize)
    }
}

/// The part that a worker uses while vCPUs read registers.
struct Engine<B> {
    backend: B,
    /// `None` where the driver made none ready, and all of them while the device is not live.
    rings: Vec<Option<Ring>>,
    features: u64,
    /// The driver said `DRIVER_OK`, and nobody gave up since.
    live: bool,
}

/// The configuration space as vCPUs read it: they never wait for the worker.
struct ConfigSpace {
    bytes: Vec<u8>,
    /// `ConfigGeneration`: counts the changes (virtio 1.2, 2.5.2).
    generation: u32,
}

/// One device on the transport, without its thread.
pub(super) struct Transport<B> {
    device_id: u32,
    offered: u64,
    config: Mutex<ConfigSpace>,
    queue_sizes: &'static [u16],
    ram: Arc<GuestRam>,
    complaints: Complaints,
    interrupt: Interrupt,
    notifications: Vec<EventFd>,
    registers: Mutex<Registers>,
    engine: Mutex<Engine<B>>,
    /// vCPUs that wait for `engine`: the worker makes way.
    waiting: AtomicU32,
}

/// A state that does not fit this device.
#[derive(Debug, thiserror::Error)]
pub(super) enum RestoreError {
    /// The bytes are no state.
    #[error(transparent)]
    Format(#[from] StateError),
    /// Another type of device.
    #[error("it is of a device of type {0}, this is one of type {1}")]
    Device(u32, u32),
    /// The backends differ.
    #[error("{0}")]
    Config(String),
    /// Accepted features that this device does not offer.
    #[error("the driver accepted features {0:#x}, this device offers {1:#x}")]
    Features(u64, u64),
    /// A status that no sequence of register writes leads to.
    #[error("device status {0:#x} is not one that a device can be in")]
    Status(u8),
    /// Not this device's number of queues.
    #[error("it has {0} queues, this device has {1}")]
    Queues(usize, usize),
    /// A queue that cannot be.
    #[error("queue {0}: {1}")]
    Ring(usize, #[source] RingFault),
}

impl<B: Backend> Transport<B> {
    /// The device `name` after power-on.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub(super) fn new(name: &str, ram: Arc<GuestRam>, backend: B) -> io::Result<Self> {
        let queue_sizes = backend.queue_sizes();
        Ok(Self {
            device_id: backend.device_id(),
            offered: backend.features() | feature::TRANSPORT,
            config: Mutex::new(ConfigSpace { bytes: backend.config(), generation: 0 }),
            queue_sizes,
            ram,
            complaints: Complaints::new(name),
            interrupt: Interrupt::default(),
            notifications: queue_sizes
                .iter()
                .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
                .collect::<io::Result<_>>()?,
            registers: Mutex::new(Registers::new(queue_sizes)),
            engine: Mutex::new(Engine { backend, rings: no_rings(queue_sizes), features: 0, live: false }),
            waiting: AtomicU32::new(0),
        })
    }

    /// The device's name.
    pub(super) fn name(&self) -> &str {
        self.complaints.device()
    }

    /// What the device signals.
    pub(super) fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// What the driver signals, a queue each.
    pub(super) fn notifications(&self) -> &[EventFd] {
        &self.notifications
    }

    /// Uses the backend, making the worker stop after the piece it is at. If that changes the configuration space, the
    /// driver is told.
    pub(super) fn with_backend<T>(&self, action: impl FnOnce(&mut B) -> T) -> T {
        self.with_live(|backend, _| action(backend))
    }

    /// The same, with the features that the driver accepted; `None` while no driver runs the device.
    pub(super) fn with_live<T>(&self, action: impl FnOnce(&mut B, Option<u64>) -> T) -> T {
        let mut engine = self.engine();
        let features = engine.live.then_some(engine.features);
        let value = action(&mut engine.backend, features);
        if self.publish_config(&engine) && engine.live {
            self.interrupt.raise(interrupt::CONFIGURATION);
        }
        value
    }

    /// Shows the backend's configuration space to the guest. True if it changed.
    fn publish_config(&self, engine: &Engine<B>) -> bool {
        let bytes = engine.backend.config();
        let mut config = lock(&self.config);
        let changed = config.bytes != bytes;
        if changed {
            *config = ConfigSpace { bytes, generation: config.generation.wrapping_add(1) };
        }
        changed
    }

    /// One pass over the queues, if the device is live. `hold` is asked between pieces of work.
    pub(super) fn serve(&self, hold: &dyn Fn() -> bool) -> Served {
        let hold = || hold() || self.waiting.load(Ordering::Acquire) > 0;
        if hold() {
            std::thread::yield_now();
            return Served { more: true, ..Served::default() };
        }
        let mut engine = lock(&self.engine);
        let Engine { backend, rings, features, live } = &mut *engine;
        if !*live {
            return Served::default();
        }
        let mut pass = Pass { rings, ram: &self.ram, features: *features, complaints: &self.complaints, hold: &hold };
        let served = backend.serve(&mut pass).and_then(|served| {
            for ring in rings.iter_mut().flatten() {
                if ring.interrupt_due(&self.ram)? {
                    self.interrupt.raise(interrupt::USED_BUFFER);
                }
            }
            Ok(served)
        });
        if served.as_ref().is_ok_and(|served| served.configured) {
            self.publish_config(&engine);
        }
        let Engine { rings, live, .. } = &mut *engine;
        served.unwrap_or_else(|fault| {
            *live = false;
            *rings = no_rings(self.queue_sizes);
            self.complaints.warn(&format_args!("device needs a reset: {fault}"));
            self.interrupt.demand_reset(true);
            Served::default()
        })
    }

    /// Back to the state after power-on, backend included.
    pub(super) fn reset(&self) {
        let mut registers = lock(&self.registers);
        self.reset_registers(&mut registers);
        let mut engine = self.engine();
        engine.backend.power_on();
        self.publish_config(&engine);
    }

    /// The state, of a device that nobody uses at the moment.
    pub(super) fn save(&self) -> Vec<u8> {
        let registers = lock(&self.registers);
        let engine = self.engine();
        let queues = registers.queues.iter().zip(&engine.rings).map(|(queue, ring)| QueueState {
            size: queue.geometry.size,
            ready: queue.ready,
            descriptors: queue.geometry.descriptors,
            available: queue.geometry.available,
            used: queue.geometry.used,
            next_avail: ring.as_ref().map_or(0, Ring::next_avail),
            next_used: ring.as_ref().map_or(0, Ring::next_used),
        });
        DeviceState {
            device_id: self.device_id,
            config: engine.backend.save(),
            driver_features: registers.driver_features,
            device_features_select: registers.device_features_select,
            driver_features_select: registers.driver_features_select,
            queue_select: registers.queue_select,
            status: registers.status,
            needs_reset: self.interrupt.needs_reset(),
            interrupt_status: self.interrupt.status(),
            queues: queues.collect(),
        }
        .encode()
    }

    /// Takes a state; on error the device is as it was.
    ///
    /// # Errors
    /// What about the state does not fit.
    pub(super) fn restore(&self, bytes: &[u8]) -> Result<(), RestoreError> {
        let state = DeviceState::decode(bytes)?;
        if state.device_id != self.device_id {
            return Err(RestoreError::Device(state.device_id, self.device_id));
        }
        {
            let engine = self.engine();
            if !engine.backend.fits(&state.config) {
                return Err(RestoreError::Config(engine.backend.explain_config(&state.config)));
            }
        }
        // Before FEATURES_OK the driver may have written any features; they were not accepted.
        let agreed = state.status & status::FEATURES_OK != 0;
        if agreed && !self.acceptable(state.driver_features) {
            return Err(RestoreError::Features(state.driver_features, self.offered));
        }
        if !status_can_be(state.status)
            || state.interrupt_status & !(interrupt::USED_BUFFER | interrupt::CONFIGURATION) != 0
        {
            return Err(RestoreError::Status(state.status));
        }
        // A device of an earlier build has fewer where its type has learnt something: its driver knows of no more.
        if state.queues.is_empty() || state.queues.len() > self.queue_sizes.len() {
            return Err(RestoreError::Queues(state.queues.len(), self.queue_sizes.len()));
        }
        let live = status_is_live(state.status) && !state.needs_reset;
        let mut rings = no_rings(self.queue_sizes);
        for (index, (saved, &max_size)) in state.queues.iter().zip(self.queue_sizes).enumerate() {
            if !saved.ready {
                continue;
            }
            let event_idx = state.driver_features & feature::EVENT_IDX != 0;
            let geometry = saved.geometry();
            let ring = Ring::new(geometry, max_size, event_idx, saved.next_avail, saved.next_used, &self.ram);
            let ring = ring.map_err(|fault| RestoreError::Ring(index, fault))?;
            rings[index] = live.then_some(ring);
        }
        let mut registers = lock(&self.registers);
        let mut engine = self.engine();
        *registers = Registers {
            device_features_select: state.device_features_select,
            driver_features_select: state.driver_features_select,
            driver_features: state.driver_features,
            queue_select: state.queue_select,
            status: state.status,
            queues: (state.queues.iter().copied().chain(std::iter::repeat(QueueState::default())))
                .take(self.queue_sizes.len())
                .map(|queue| QueueRegisters { geometry: queue.geometry(), ready: queue.ready })
                .collect(),
        };
        engine.backend.reset();
        engine.backend.restore(&state.config);
        self.publish_config(&engine);
        engine.rings = rings;
        engine.features = state.driver_features;
        engine.live = live;
        self.interrupt.set(state.interrupt_status, state.needs_reset);
        Ok(())
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            register::MAGIC => return MAGIC_VALUE,
            register::VERSION => return VERSION_VALUE,
            register::DEVICE_ID => return self.device_id,
            register::VENDOR_ID => return VENDOR_VALUE,
            register::INTERRUPT_STATUS => return self.interrupt.status(),
            register::CONFIG_GENERATION => return lock(&self.config).generation,
            register::SHM_FIRST..=register::SHM_LAST => return u32::MAX,
            _ => (),
        }
        let registers = lock(&self.registers);
        match offset {
            register::DEVICE_FEATURES => half(self.offered, registers.device_features_select),
            register::QUEUE_SIZE_MAX => {
                self.queue_sizes.get(registers.queue_select as usize).map_or(0, |&size| u32::from(size))
            }
            register::QUEUE_READY => registers.queue().is_some_and(|queue| queue.ready).into(),
            register::STATUS => {
                let needs_reset = if self.interrupt.needs_reset() { status::NEEDS_RESET } else { 0 };
                u32::from(registers.status | needs_reset)
            }
            _ => {
                self.complaints.warn(&format_args!("guest read register {offset:#x}, which cannot be read"));
                0
            }
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            register::QUEUE_NOTIFY => {
                if let Some(notification) = self.notifications.get(value as usize) {
                    // It fails only when the counter is full, and then the worker is signalled anyway.
                    let _ = notification.write(1);
                }
                return;
            }
            register::INTERRUPT_ACK => return self.interrupt.acknowledge(value),
            _ => (),
        }
        let mut registers = lock(&self.registers);
        match offset {
            register::DEVICE_FEATURES_SELECT => registers.device_features_select = value,
            register::DRIVER_FEATURES_SELECT => registers.driver_features_select = value,
            register::DRIVER_FEATURES => {
                let agreed = registers.status & status::FEATURES_OK != 0;
                let select = registers.driver_features_select;
                if agreed || select > 1 {
                    // A driver writes the words it does not use as zero.
                    if value != 0 {
                        self.complaints.warn(&"guest changed features that are agreed upon, or do not exist");
                    }
                } else {
                    let shift = select * 32;
                    let others = registers.driver_features & !(u64::from(u32::MAX) << shift);
                    registers.driver_features = others | u64::from(value) << shift;
                }
            }
            register::QUEUE_SELECT => registers.queue_select = value,
            register::QUEUE_READY => self.write_queue_ready(&mut registers, value),
            register::STATUS => self.write_status(&mut registers, value),
            register::SHM_SELECT => (),
            _ => self.write_queue_register(&mut registers, offset, value),
        }
    }

    fn write_queue_register(&self, registers: &mut Registers, offset: u64, value: u32) {
        let select = registers.queue_select;
        let queue = registers.queues.get_mut(select as usize).filter(|queue| !queue.ready);
        let Some(QueueRegisters { geometry, .. }) = queue else {
            return self.complaints.warn(&format_args!("guest wrote register {offset:#x} of queue {select} in use"));
        };
        match offset {
            register::QUEUE_SIZE => geometry.size = value,
            register::QUEUE_DESCRIPTORS_LOW => set_low(&mut geometry.descriptors, value),
            register::QUEUE_DESCRIPTORS_HIGH => set_high(&mut geometry.descriptors, value),
            register::QUEUE_AVAILABLE_LOW => set_low(&mut geometry.available, value),
            register::QUEUE_AVAILABLE_HIGH => set_high(&mut geometry.available, value),
            register::QUEUE_USED_LOW => set_low(&mut geometry.used, value),
            register::QUEUE_USED_HIGH => set_high(&mut geometry.used, value),
            _ => self.complaints.warn(&format_args!("guest wrote register {offset:#x}, which cannot be written")),
        }
    }

    fn write_queue_ready(&self, registers: &mut Registers, value: u32) {
        let (index, state) = (registers.queue_select as usize, registers.status);
        let Some(queue) = registers.queues.get_mut(index) else {
            return self.complaints.warn(&format_args!("guest set up queue {index}, which does not exist"));
        };
        if value == 0 {
            // "Stops using the queue": on return the worker no longer does (virtio 1.2, 4.2.2, QueueReady).
            queue.ready = false;
            self.engine().rings[index] = None;
        } else if state & (status::FEATURES_OK | status::DRIVER_OK | status::FAILED) != status::FEATURES_OK {
            self.complaints.warn(&format_args!("guest set up queue {index} in device status {state:#x}"));
        } else {
            match queue.geometry.check(self.queue_sizes[index], &self.ram) {
                Ok(()) => queue.ready = true,
                Err(fault) => {
                    self.complaints.warn(&format_args!("guest set up queue {index}: {fault}"));
                    self.interrupt.demand_reset(false);
                }
            }
        }
    }

    fn write_status(&self, registers: &mut Registers, value: u32) {
        if value == 0 {
            return self.reset_registers(registers);
        }
        let old = registers.status;
        // NEEDS_RESET is ours; a driver that writes back what it read does no harm.
        let mut new = value as u8 & !status::NEEDS_RESET;
        if value > 0xff || old & !new != 0 || !status_can_be(new) {
            return self.complaints.warn(&format_args!("guest wrote status {value:#x} over {old:#x}"));
        }
        if new & status::FEATURES_OK & !old != 0 && !self.acceptable(registers.driver_features) {
            // The driver reads back whether we took them (virtio 1.2, 3.1.1, step 6). Nothing builds on them either.
            new &= !(status::FEATURES_OK | status::DRIVER_OK);
        }
        registers.status = new;
        let mut engine = self.engine();
        let live = status_is_live(new) && !self.interrupt.needs_reset();
        if live && !engine.live {
            engine.features = registers.driver_features;
            for (index, queue) in registers.queues.iter().enumerate().filter(|(_, queue)| queue.ready) {
                let event_idx = engine.features & feature::EVENT_IDX != 0;
                match Ring::new(queue.geometry, self.queue_sizes[index], event_idx, 0, 0, &self.ram) {
                    Ok(ring) => engine.rings[index] = Some(ring),
                    Err(fault) => {
                        self.complaints.warn(&format_args!("queue {index}: {fault}"));
                        engine.rings = no_rings(self.queue_sizes);
                        return self.interrupt.demand_reset(true);
                    }
                }
                // What lies there already was perhaps notified before we listened.
                let _ = self.notifications[index].write(1);
            }
        }
        if !live {
            engine.rings = no_rings(self.queue_sizes);
        }
        engine.live = live;
    }

    fn reset_registers(&self, registers: &mut Registers) {
        let mut engine = self.engine();
        *registers = Registers::new(self.queue_sizes);
        engine.rings = no_rings(self.queue_sizes);
        engine.features = 0;
        engine.live = false;
        engine.backend.reset();
        self.publish_config(&engine);
        self.interrupt.set(0, false);
    }

    fn acceptable(&self, features: u64) -> bool {
        features & !self.offered == 0 && features & feature::VERSION_1 != 0
    }

    /// The engine for anyone but the worker, which makes way.
    fn engine(&self) -> MutexGuard<'_, Engine<B>> {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let engine = lock(&self.engine);
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        engine
    }
}

impl<B: Backend> MmioDevice for Transport<B> {
    /// A load by the guest. Registers are 32 bits wide and aligned (virtio 1.2, 4.2.2.2); any other load of them reads
    /// zero. The configuration space can be read in any pieces; beyond its end is zero.
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(start) = offset.checked_sub(register::CONFIG) {
            let start = usize::try_from(start).unwrap_or(usize::MAX);
            for (byte, value) in data.iter_mut().zip(lock(&self.config).bytes.iter().skip(start)) {
                *byte = *value;
            }
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        } else {
            self.complaints.warn(&format_args!("guest read {} bytes at register {offset:#x}", data.len()));
        }
    }

    /// A store by the guest. One that is not allowed has no effect.
    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(inside) = offset.checked_sub(register::CONFIG) {
            let mut engine = self.engine();
            if engine.backend.write_config(inside, data) {
                self.publish_config(&engine);
                return;
            }
        }
        match data.try_into().map(u32::from_le_bytes) {
            Ok(value) if offset < register::CONFIG && offset.is_multiple_of(4) => self.write_register(offset, value),
            _ => self.complaints.warn(&format_args!("guest wrote {} bytes at {offset:#x}", data.len())),
        }
    }
}

impl QueueState {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.size, descriptors: self.descriptors, available: self.available, used: self.used }
    }
}

/// Whether a device can be in this status: each bit needs those before it (virtio 1.2, 3.1.1); a driver can fail at any
/// point.
fn status_can_be(value: u8) -> bool {
    let known = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK | status::FAILED;
    let needs = |bit, before| value & bit == 0 || value & before == before;
    value & !known == 0
        && needs(status::FEATURES_OK, status::ACKNOWLEDGE | status::DRIVER)
        && needs(status::DRIVER_OK, status::FEATURES_OK)
}

/// Whether queues work in this status.
fn status_is_live(value: u8) -> bool {
    value & (status::DRIVER_OK | status::FAILED) == status::DRIVER_OK
}

fn no_rings(queue_sizes: &[u16]) -> Vec<Option<Ring>> {
    queue_sizes.iter().map(|_| None).collect()
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & u64::from(u32::MAX) | u64::from(value) << 32;
}

/// A lock whose holder panicked still guards plain values, each of which is checked where it is used.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::driver::{Descriptor, Driver};
    use super::super::queue::Popped;
    use super::*;
    use crate::kvm::memory::{HOLE_START, Memory, MemoryOptions};

    const SIZE: u16 = 16;
    const EXTRA: u64 = 1 << 3;
    const ALL: u64 = feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC;
    const OK: u32 = 15;

    /// Completes every request with length zero.
    #[derive(Default)]
    struct Sink {
        resets: u32,
    }

    impl Backend for Sink {
        fn device_id(&self) -> u32 {
            42
        }

        fn queue_sizes(&self) -> &'static [u16] {
            &[SIZE, SIZE]
        }

        fn features(&self) -> u64 {
            EXTRA
        }

        fn config(&self) -> Vec<u8> {
            vec![1, 2, 3, 4, 5, 6, 7, 8, 9]
        }

        fn serve(&mut self, pass: &mut Pass<'_>) -> Result<Served, RingFault> {
            for ring in pass.rings.iter_mut().flatten() {
                while let Popped::Chain(chain) = ring.pop(pass.ram)? {
                    ring.complete(pass.ram, chain.head, 0)?;
                }
                ring.listen(pass.ram)?;
            }
            Ok(Served::default())
        }

        fn reset(&mut self) {
            self.resets += 1;
        }

        fn explain_config(&self, _: &[u8]) -> String {
            "it is another sink".to_owned()
        }
    }

    struct Bench {
        memory: Memory,
        transport: Transport<Sink>,
        irq: Arc<EventFd>,
    }

    /// A line that is connected to `transport`.
    fn listen(transport: &Transport<Sink>) -> Arc<EventFd> {
        let irq = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        transport.interrupt().connect(irq.clone());
        irq
    }

    impl Bench {
        fn new() -> Self {
            let memory = Memory::new(1 << 20, MemoryOptions { huge_pages: false }).unwrap();
            let transport = Transport::new("sink0", memory.ram().clone(), Sink::default()).unwrap();
            let irq = listen(&transport);
            Self { memory, transport, irq }
        }

        fn driver(&self) -> Driver<'_> {
            Driver::new(&self.transport, self.memory.ram(), 2, SIZE)
        }

        fn serve(&self) {
            self.transport.serve(&|| false);
        }

        fn signalled(&self) -> bool {
            self.irq.read().is_ok()
        }
    }

    #[test]
    fn the_device_says_who_it_is() {
        let bench = Bench::new();
        let driver = bench.driver();
        assert_eq!([0, 4, 8].map(|offset| driver.load(offset)), [0x7472_6976, 2, 42]);
        assert_eq!(driver.offered(), ALL | EXTRA);
        driver.store(register::DEVICE_FEATURES_SELECT, 2);
        assert_eq!(driver.load(register::DEVICE_FEATURES), 0);
        assert_eq!(driver.load(register::QUEUE_SIZE_MAX), u32::from(SIZE));
        for beyond in [2, u32::MAX] {
            driver.store(register::QUEUE_SELECT, beyond);
            assert_eq!(driver.load(register::QUEUE_SIZE_MAX), 0);
            assert_eq!(driver.load(register::QUEUE_READY), 0);
        }
        assert_eq!(driver.load(register::SHM_FIRST), u32::MAX);
    }

    #[test]
    fn loads_of_any_width_and_place_are_answered() {
        let bench = Bench::new();
        let load = |offset, width| {
            let mut data = vec![0xaa; width];
            bench.transport.read(offset, &mut data);
            data
        };
        assert_eq!(load(register::CONFIG, 8), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(load(register::CONFIG + 3, 1), [4]);
        assert_eq!(load(register::CONFIG + 7, 4), [8, 9, 0, 0]);
        assert_eq!(load(register::CONFIG + 9, 2), [0, 0]);
        assert_eq!(load(u64::MAX, 8), [0; 8]);
        for (offset, width) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4), (0xfe, 4), (0xfc, 8), (0, 0)] {
            assert_eq!(load(offset, width), vec![0; width], "{width} at {offset:#x}");
        }
        for offset in [0, 1, 0x70, 0x71, 0xff, 0x100, 0x104, 0xfff, u64::MAX] {
            for width in [0, 1, 2, 3, 4, 8, 16] {
                bench.transport.write(offset, &vec![0xff; width]);
            }
        }
        assert_eq!(load(register::CONFIG, 4), [1, 2, 3, 4]);
    }

    #[test]
    fn features_are_agreed_upon_or_not() {
        let bench = Bench::new();
        let driver = bench.driver();
        assert_eq!(driver.negotiate(feature::VERSION_1 | EXTRA), 11);
        // Agreed is agreed.
        driver.store(register::DRIVER_FEATURES_SELECT, 0);
        driver.store(register::DRIVER_FEATURES, 0);
        assert_eq!(lock(&bench.transport.registers).driver_features, feature::VERSION_1 | EXTRA);
        assert_eq!(driver.negotiate(EXTRA), 3, "without VERSION_1");
        assert_eq!(driver.negotiate(feature::VERSION_1 | 1 << 4), 3, "with what was not offered");
    }

    #[test]
    fn status_only_takes_legal_steps() {
        let bench = Bench::new();
        let driver = bench.driver();
        for bad in [4, 8, 9, 12, 16, 32, 0x101, 0xffff_ffff] {
            driver.store(register::STATUS, bad);
            assert_eq!(driver.load(register::STATUS), 0, "{bad:#x} over 0");
        }
        driver.negotiate(ALL);
        for bad in [1, 3, 9, 0x10b, 43] {
            driver.store(register::STATUS, bad);
            assert_eq!(driver.load(register::STATUS), 11, "{bad:#x} over 11");
        }
        // The driver cannot pretend the device's own bit.
        driver.store(register::STATUS, 0x4b);
        assert_eq!(driver.load(register::STATUS), 11);
        driver.store(register::STATUS, 0x8b);
        assert_eq!(driver.load(register::STATUS), 0x8b);
        driver.store(register::STATUS, 0);
        assert_eq!(driver.load(register::STATUS), 0);
    }

    #[test]
    fn queues_work_from_driver_ok_until_reset() {
        let bench = Bench::new();
        let mut driver = bench.driver();
        driver.negotiate(ALL);
        assert!(driver.set_up(0, SIZE.into(), Driver::place(0)));
        driver.post(0, &[(0x1000, 4, false)]);
        bench.serve();
        assert_eq!(driver.completed(0), None, "before DRIVER_OK");
        driver.store(register::STATUS, OK);
        // A queue in use cannot be moved.
        let before = bench.transport.save();
        driver.store(register::QUEUE_DESCRIPTORS_LOW, 0x5000);
        driver.store(register::QUEUE_SIZE, 4);
        assert_eq!(bench.transport.save(), before);
        assert!(!driver.set_up(1, SIZE.into(), Driver::place(1)), "a queue was set up while the device runs");
        bench.serve();
        assert_eq!(driver.completed(0), Some((0, 0)));
        assert_eq!(driver.load(register::INTERRUPT_STATUS), interrupt::USED_BUFFER);
        assert!(bench.signalled());
        driver.store(register::INTERRUPT_ACK, interrupt::USED_BUFFER);
        assert_eq!(driver.load(register::INTERRUPT_STATUS), 0);
        driver.store(register::STATUS, 0);
        driver.post(0, &[(0x1000, 4, false)]);
        bench.serve();
        assert_eq!(driver.completed(0), None, "after a reset");
        assert_eq!(bench.transport.with_backend(|sink| sink.resets), 2);
        driver.store(register::QUEUE_SELECT, 0);
        assert_eq!(driver.load(register::QUEUE_READY), 0);
    }

    #[test]
    fn a_queue_taken_away_is_left_alone_and_a_failed_driver_is_not_served() {
        let bench = Bench::new();
        let mut driver = bench.driver();
        assert_eq!(driver.start(ALL), OK);
        driver.store(register::QUEUE_SELECT, 0);
        driver.store(register::QUEUE_READY, 0);
        driver.post(0, &[(0x1000, 4, false)]);
        driver.post(1, &[(0x1000, 4, false)]);
        bench.serve();
        assert_eq!((driver.completed(0), driver.completed(1)), (None, Some((0, 0))));
        driver.store(register::STATUS, OK | 128);
        driver.post(1, &[(0x1000, 4, false)]);
        bench.serve();
        assert_eq!(driver.completed(1), None);
    }

    #[test]
    fn absurd_queues_are_refused_and_demand_a_reset() {
        let [descriptors, available, used] = Driver::place(0);
        for (size, place) in [
            (3, [descriptors, available, used]),
            (32, [descriptors, available, used]),
            (0, [descriptors, available, used]),
            (16, [HOLE_START, available, used]),
            (16, [descriptors, u64::MAX - 1, used]),
            (16, [descriptors, available, (1 << 20) - 4]),
            (16, [descriptors + 8, available, used]),
        ] {
            let bench = Bench::new();
            let driver = bench.driver();
            driver.negotiate(ALL);
            assert!(!driver.set_up(0, size, place), "{size} {place:x?}");
            assert_eq!(driver.load(register::STATUS), 0x4b);
            driver.store(register::STATUS, OK);
            bench.serve();
            assert_eq!(driver.load(register::STATUS), OK | 64);
            driver.store(register::STATUS, 0);
            assert_eq!(driver.load(register::STATUS), 0, "a reset did not help");
        }
    }

    #[test]
    fn a_broken_ring_demands_a_reset_and_says_so_once() {
        let bench = Bench::new();
        let mut driver = bench.driver();
        driver.start(ALL);
        driver.publish(0, SIZE);
        for _ in 0..3 {
            driver.kick(0);
            bench.serve();
        }
        assert_eq!(driver.load(register::STATUS), OK | 64);
        assert_eq!(driver.load(register::INTERRUPT_STATUS), interrupt::CONFIGURATION);
        assert!(bench.signalled() && !bench.signalled());
        assert_eq!(driver.start(ALL), OK);
        driver.post(0, &[(0x1000, 4, false)]);
        bench.serve();
        assert_eq!(driver.completed(0), Some((0, 0)));
    }

    #[test]
    fn notifications_reach_the_worker_and_wrong_ones_nobody() {
        let bench = Bench::new();
        let driver = bench.driver();
        let signalled = || bench.transport.notifications().iter().map(|n| n.read().ok()).collect::<Vec<_>>();
        driver.kick(1);
        driver.kick(1);
        assert_eq!(signalled(), [None, Some(2)]);
        for wrong in [2, 0xffff, u32::MAX] {
            driver.store(register::QUEUE_NOTIFY, wrong);
        }
        assert_eq!(signalled(), [None, None]);
    }

    #[test]
    fn event_indices_hold_interrupts_back_also_after_a_move() {
        let bench = Bench::new();
        let mut driver = bench.driver();
        driver.start(ALL);
        let used_event = GuestAddress(Driver::place(0)[1] + 4 + 2 * u64::from(SIZE));
        // Interrupt when entry 2 is used, so with the third.
        bench.memory.ram().write_obj(2u16, used_event).unwrap();
        let (mut transport, mut irq) = (&bench.transport, &bench.irq);
        let second = Transport::new("sink0", bench.memory.ram().clone(), Sink::default()).unwrap();
        let second_irq = listen(&second);
        for (round, expected) in [false, false, true, false].into_iter().enumerate() {
            if round == 1 {
                second.restore(&transport.save()).unwrap();
                (transport, irq) = (&second, &second_irq);
            }
            driver.post(0, &[(0x1000, 4, false)]);
            transport.serve(&|| false);
            assert_eq!(driver.completed(0), Some((round as u32, 0)));
            assert_eq!(irq.read().is_ok(), expected, "round {round}");
        }
        let avail_event = GuestAddress(Driver::place(0)[2] + 4 + 8 * u64::from(SIZE));
        assert_eq!(bench.memory.ram().read_obj::<u16>(avail_event).unwrap(), 4, "where the device wants its next kick");
    }

    /// A state as a running device has it, in the middle of things.
    fn running(bench: &Bench) -> Vec<u8> {
        let mut driver = bench.driver();
        driver.start(ALL);
        driver.post(1, &[(0x1000, 4, false)]);
        bench.serve();
        bench.transport.save()
    }

    #[test]
    fn a_state_goes_on_where_it_was_saved() {
        let bench = Bench::new();
        let state = running(&bench);
        let target = Transport::new("sink0", bench.memory.ram().clone(), Sink::default()).unwrap();
        let irq = listen(&target);
        target.restore(&state).unwrap();
        assert_eq!(target.save(), state);
        assert_eq!(target.interrupt().status(), interrupt::USED_BUFFER);
        target.interrupt().repeat();
        assert!(irq.read().is_ok(), "the interrupt was not signalled again");
    }

    #[test]
    fn states_of_other_devices_and_impossible_ones_are_refused() {
        let bench = Bench::new();
        let good = DeviceState::decode(&running(&bench)).unwrap();
        let before = bench.transport.save();
        let change = |change: fn(&mut DeviceState)| {
            let mut state = good.clone();
            change(&mut state);
            let refused = bench.transport.restore(&state.encode());
            assert_eq!(bench.transport.save(), before, "a refused state left traces");
            refused.unwrap_err()
        };
        assert!(matches!(change(|s| s.device_id = 1), RestoreError::Device(1, 42)));
        assert!(matches!(change(|s| s.config[0] = 9), RestoreError::Config(_)));
        assert!(matches!(change(|s| s.driver_features |= 1), RestoreError::Features(..)));
        assert!(matches!(change(|s| s.driver_features = 0), RestoreError::Features(..)));
        assert!(matches!(change(|s| s.status = 12), RestoreError::Status(12)));
        assert!(matches!(change(|s| s.status |= 64), RestoreError::Status(_)));
        assert!(matches!(change(|s| s.interrupt_status = 4), RestoreError::Status(_)));
        assert!(matches!(change(|s| s.queues.clear()), RestoreError::Queues(0, 2)));
        assert!(matches!(change(|s| s.queues.push(s.queues[1])), RestoreError::Queues(3, 2)));
        assert!(matches!(change(|s| s.queues[1].size = 5), RestoreError::Ring(1, RingFault::Size(5, SIZE))));
        assert!(matches!(change(|s| s.queues[0].used = 2 << 20), RestoreError::Ring(0, RingFault::Place { .. })));
        assert!(matches!(change(|s| s.queues[0].next_avail = 99), RestoreError::Ring(0, RingFault::Position { .. })));
        assert!(matches!(change(|s| s.queues[0].descriptors = u64::MAX), RestoreError::Ring(..)));
    }

    proptest! {
        #[test]
        fn mutated_states_are_refused_or_work(edits in proptest::collection::vec((any::<u16>(), any::<u8>()), 1..8)) {
            let bench = Bench::new();
            let mut state = running(&bench);
            for (at, value) in edits {
                let at = usize::from(at) % state.len();
                state[at] = value;
            }
            if bench.transport.restore(&state).is_ok() {
                let mut driver = bench.driver();
                driver.describe(0, 0, Descriptor { address: 0x1000, len: 1, flags: 0, next: 0 });
                for _ in 0..20 {
                    driver.publish(0, 0);
                    bench.serve();
                }
                bench.transport.save();
            }
        }
    }
}
