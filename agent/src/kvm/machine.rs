//! A whole machine: memory, VM, vCPUs, devices, console, dirty log, and their state as one.
//!
//! Owns the order of things: what is made first, who stands before whom, what a reset is. Must not know migration, nor who
//! may run the VM: that gate is the service's.
//!
//! Two ways to be made: [`Machine::boot`] loads a guest; [`Machine::incoming`] makes everything, threads included, and
//! waits for memory (through [`Machine::memory`]) and [`Machine::restore_state`]. Either way it stands until
//! [`Machine::resume`].

use std::any::Any;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::{Cap, VcpuFd};
use vm_memory::GuestAddress;

use super::boot::{self, BootError, BootImage};
use super::bus::{BusFull, Device, DeviceError, MMIO_WINDOW_BYTES, MmioBus};
use super::console::{Console, ConsoleError};
use super::container::{self, Sections, StateError};
use super::control::{Kick, MachineExit, RunControl};
use super::dirty::DirtyLogger;
use super::hurry::Hurry;
use super::memory::{Memory, MemoryError, MemoryOptions};
use super::ports::{Ports, SERIAL_IRQ, STUN_IRQ};
use super::serial::Serial;
use super::stun_port::{self, StunPort};
use super::sys::KvmError;
use super::throttle::Throttle;
use super::vcpu::{self, Surroundings, Vcpu};
use super::virtio::VirtioBalloon;
use super::vm::Vm;
use super::x86::acpi::{Board, Window};
use super::x86::cpuid::{self, CpuidError};
use super::x86::essential::essential_pages;
use super::x86::start;
use super::x86::state::{self, RestoreError, StateSupport, VCPU_VERSION, VM_VERSION, VcpuState, VmState};
use super::x86::time::{CounterError, Frequency, FrequencyError, Now, TimeShift};
use crate::model::id::VmName;
use crate::model::shape::ShapeError;
use crate::model::{
    DirtyLogKind, DiskSpec, MachineShape, NetSpec, PageBitmap, PageCount, PageRun, RegionId, RelayedFrame, SerialSpec,
    ThrottleStatus, VcpuLimit, VmId, VmWrites, chain,
};
use crate::port::machine::PauseTiming;
use crate::port::{DirtyLog, MachineError, MachineState, Vcpus};

/// The section of what the vCPUs share.
const VM_TAG: &str = "vm";
/// The section of the serial port.
const SERIAL_TAG: &str = "serial0";
/// The newest version of the serial port's section; devices version their own payload and have this one too.
const DEVICE_VERSION: u32 = 1;
/// What all devices of a VM on loan may hold: it travels in the state.
const HELD_BYTES: usize = 24 << 20;

/// A machine could not be made, or could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum HostedError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest RAM could not be set up.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The guest could not be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Too many devices.
    #[error(transparent)]
    Bus(#[from] BusFull),
    /// A device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The console could not be opened.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The shape breaks a limit.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// More vCPUs than this host's KVM has room for.
    #[error("{asked} vCPUs are more than the {possible} that this host can run")]
    Cpus {
        /// What was asked for.
        asked: u32,
        /// What KVM allows, with the 8-bit APIC ids that guests are given.
        possible: u32,
    },
    /// This host cannot show the VM its CPU.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// The time-stamp counters differ and cannot be scaled.
    #[error(transparent)]
    TscFrequency(#[from] FrequencyError),
    /// The guest's time-stamp counter would jump.
    #[error(transparent)]
    TscCounter(#[from] CounterError),
    /// The saved state is none of this machine.
    #[error(transparent)]
    State(#[from] StateError),
    /// The machine runs, or has run, and must not.
    #[error("the machine {0}")]
    Phase(&'static str),
    /// The machine has ended.
    #[error("the machine has ended: {0:?}")]
    Ended(MachineExit),
}

impl From<RestoreError> for HostedError {
    fn from(error: RestoreError) -> Self {
        match error {
            RestoreError::State(e) => Self::State(e),
            RestoreError::Kvm(e) => Self::Kvm(e),
            RestoreError::Counter(e) => Self::TscCounter(e),
        }
    }
}

/// What a host adds to a machine's shape: nothing of it moves.
#[derive(Clone, Debug, Default)]
pub struct Hosting {
    /// Where the console goes.
    pub serial: SerialSpec,
    /// How memory is backed.
    pub memory: MemoryOptions,
}

/// A machine to be booted.
#[derive(Clone, Debug)]
pub struct BootConfig {
    /// Its identity.
    pub vm_id: VmId,
    /// Its name.
    pub name: VmName,
    /// Guest RAM in bytes, whole pages.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// How writes are logged.
    pub dirty_log: DirtyLogKind,
    /// Network ports, for the shape; the devices themselves come from the maker that is passed along.
    pub nets: Vec<NetSpec>,
    /// Disks, for the shape.
    pub disks: Vec<DiskSpec>,
    /// Whether there is a source of entropy, for the shape.
    pub rng: bool,
    /// Whether there is a balloon, for the shape.
    pub balloon: bool,
    /// Whether guest RAM is of huge pages that the host has set aside.
    pub hugepages: bool,
    /// The kernel, and the operator's part of the command line: the machine adds what the guest must know of it.
    pub image: BootImage,
}

/// Makes the devices of a machine in the order of their windows: it is given the machine's memory. Devices stand when they
/// are made.
pub type DeviceMaker<'a> = dyn FnOnce(&Memory) -> Result<Vec<Arc<dyn Device>>, DeviceError> + 'a;

/// What the machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing has run; a state may be restored.
    Fresh,
    Standing,
    Running,
}

/// A machine.
pub struct Machine {
    shape: MachineShape,
    memory: Memory,
    vm: Vm,
    vcpus: Vec<Arc<Vcpu>>,
    around: Arc<Surroundings>,
    serial: Arc<Serial>,
    stun_port: Arc<StunPort>,
    console: Arc<Console>,
    support: StateSupport,
    /// When it was made: no VM that comes here stood before.
    made: Instant,
    /// The vCPUs and what they share as KVM made them, before any start-up state.
    power_on: (Vec<VcpuState>, VmState),
    image: Mutex<Option<BootImage>>,
    /// Held through every change of phase, so that pause, resume, reset, save and restore exclude each other.
    phase: Mutex<Phase>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Machine {
    /// Makes a machine and loads a guest.
    pub fn boot(
        config: BootConfig,
        hosting: &Hosting,
        devices: Box<DeviceMaker<'_>>,
    ) -> Result<Arc<Self>, HostedError> {
        let shape = MachineShape {
            vm_id: config.vm_id,
            name: config.name,
            memory_bytes: config.memory_bytes,
            cpus: config.cpus,
            dirty_log: config.dirty_log,
            // Found below, on this host.
            tsc_khz: 0,
            cpuid: Vec::new(),
            nets: config.nets,
            disks: config.disks,
            rng: config.rng,
            balloon: config.balloon,
            hugepages: config.hugepages,
        };
        let machine = Self::build(shape, hosting, devices)?;
        let mut image = config.image;
        image.cmdline = machine.complete_cmdline(&image);
        machine.load(&image)?;
        machine.set_image(image);
        machine.start_threads()
    }

    /// Makes a machine of the `shape` that another host offers; it waits for memory and state. Until it is given what the
    /// source booted from ([`Machine::set_image`]), a reset asked for by the guest ends the machine.
    pub fn incoming(
        shape: MachineShape,
        hosting: &Hosting,
        devices: Box<DeviceMaker<'_>>,
    ) -> Result<Arc<Self>, HostedError> {
        Self::build(shape, hosting, devices)?.start_threads()
    }

    /// Whether this host could run a machine of `shape`, without making one: CPUID, counter, limits.
    pub fn check(shape: &MachineShape) -> Result<(), HostedError> {
        shape.check()?;
        let kvm = kvm_ioctls::Kvm::new().map_err(KvmError::of("opening /dev/kvm"))?;
        let vm = kvm.create_vm().map_err(KvmError::of("KVM_CREATE_VM"))?;
        vm.create_irq_chip().map_err(KvmError::of("KVM_CREATE_IRQCHIP"))?;
        super::dirty::prepare(&vm, shape.dirty_log)?;
        check_cpus(&kvm, shape.cpus)?;
        let vcpu = vm.create_vcpu(0).map_err(KvmError::of("KVM_CREATE_VCPU"))?;
        let host_khz = vcpu.get_tsc_khz().map_err(KvmError::of("KVM_GET_TSC_KHZ"))?;
        Frequency::fit(shape.tsc_khz, host_khz, vm.check_extension(Cap::TscControl))?;
        Ok(cpuid::check(&shape.cpuid, &cpuid::of_host(&kvm, host_khz)?)?)
    }

    /// Everything but a guest and threads. A shape without CPUID gets this host's.
    fn build(mut shape: MachineShape, hosting: &Hosting, devices: Box<DeviceMaker<'_>>) -> Result<Self, HostedError> {
        shape.check()?;
        let memory = if shape.hugepages {
            Memory::of_huge_pages(shape.memory_bytes)?
        } else {
            Memory::new(shape.memory_bytes, hosting.memory)?
        };
        let vm = Vm::new(&memory, shape.dirty_log)?;
        check_cpus(&vm.kvm, shape.cpus)?;
        let vcpus = (0..shape.cpus)
            .map(|index| Vcpu::new(&vm.fd, index).map(Arc::new))
            .collect::<Result<Vec<_>, KvmError>>()?;
        let host_khz = vcpus[0].fd().get_tsc_khz().map_err(KvmError::of("KVM_GET_TSC_KHZ"))?;
        let host_cpuid = cpuid::of_host(&vm.kvm, host_khz)?;
        let frequency = if shape.cpuid.is_empty() {
            (shape.cpuid, shape.tsc_khz) = (host_cpuid, host_khz);
            Frequency::of_host(host_khz)
        } else {
            cpuid::check(&shape.cpuid, &host_cpuid)?;
            Frequency::fit(shape.tsc_khz, host_khz, vm.fd.check_extension(Cap::TscControl))?
        };
        // Nothing of this host is touched for a VM that it cannot run.
        let mut bus = MmioBus::default();
        for device in devices(&memory)? {
            bus.attach(device)?;
        }
        let console = Console::open(&hosting.serial)?;
        let serial = Arc::new(Serial::new(SERIAL_TAG, console.clone()).map_err(KvmError::of("eventfd"))?);
        vm.connect_irq(serial.irq(), SERIAL_IRQ)?;
        let stun_port = Arc::new(StunPort::new().map_err(KvmError::of("eventfd"))?);
        vm.connect_irq(stun_port.serial().irq(), STUN_IRQ)?;
        vm.connect_bus(&bus)?;

        for vcpu in &vcpus {
            let fd = vcpu.fd();
            // CPUID before any register: it decides which of their bits are legal.
            let leaves = cpuid::of_vcpu(&shape.cpuid, vcpu.index(), shape.cpus)?;
            fd.set_cpuid2(&leaves).map_err(KvmError::of("KVM_SET_CPUID2"))?;
            if frequency.scaled {
                fd.set_tsc_khz(shape.tsc_khz).map_err(KvmError::of("KVM_SET_TSC_KHZ"))?;
            }
            start::power_on(&fd);
        }

        let fds: Vec<MutexGuard<'_, _>> = vcpus.iter().map(|vcpu| vcpu.fd()).collect();
        let log = DirtyLogger::new(vm.fd.clone(), &memory, vm.ring_bytes, &fds)?;
        let all: Vec<&_> = fds.iter().map(|fd| &**fd).collect();
        let support = StateSupport::by_trial(&vm.kvm, &vm.fd, &all, frequency)?;
        let (shared, now) = VmState::save(&vm.fd, &fds[0], &support)?;
        let states = fds.iter().map(|fd| VcpuState::save(fd, &support, &now)).collect::<Result<_, _>>()?;
        let power_on = (states, shared);
        drop(fds);

        let kicks = vcpus.iter().map(|vcpu| vcpu.clone() as Arc<dyn Kick>).collect();
        let log = Arc::new(log);
        let throttle = Arc::new(Throttle::new(Arc::clone(&log), &vcpus, stun_port.clone()));
        let around = Arc::new(Surroundings {
            control: RunControl::new(kicks),
            bus: Arc::new(bus),
            ports: Arc::new(Ports { serial: serial.clone(), second: stun_port.serial().clone() }),
            log,
            throttle,
        });
        Ok(Self {
            shape,
            memory,
            vm,
            vcpus,
            around,
            serial,
            stun_port,
            console,
            support,
            made: Instant::now(),
            power_on,
            image: Mutex::new(None),
            phase: Mutex::new(Phase::Fresh),
            threads: Mutex::new(Vec::new()),
        })
    }

    /// The operator's command line and what the guest must know of the machine. A bzImage is Linux, which reads it from the
    /// ACPI tables: told twice, it would find each device twice.
    fn complete_cmdline(&self, image: &BootImage) -> String {
        let own = image.cmdline.trim();
        if image.is_bzimage() {
            return own.to_owned();
        }
        let mut parts: Vec<String> = Vec::new();
        parts.extend((!own.is_empty()).then(|| own.to_owned()));
        parts.push(format!("dunlin.cpus={} dunlin.tsc_khz={}", self.shape.cpus, self.shape.tsc_khz));
        parts.extend((0..self.devices().len()).map(|index| {
            let (size, address) = (MMIO_WINDOW_BYTES >> 10, MmioBus::address(index));
            format!("virtio_mmio.device={size}K@{address:#x}:{}", MmioBus::irq(index))
        }));
        parts.join(" ")
    }

    /// What the ACPI tables tell of.
    fn board(&self) -> Board {
        let window = |index| Window {
            address: MmioBus::address(index) as u32,
            bytes: MMIO_WINDOW_BYTES as u32,
            irq: MmioBus::irq(index),
        };
        Board {
            // The 8-bit ids of local APICs bound it: see `check_cpus`.
            cpus: self.shape.cpus.min(254) as u8,
            windows: (0..self.devices().len()).map(window).collect(),
        }
    }

    /// Loads `image` into memory that is zero, and points the boot processor at it.
    fn load(&self, image: &BootImage) -> Result<(), HostedError> {
        let entry = boot::load(&self.memory, image, &self.board())?;
        Ok(start::set_up(&self.vcpus[0].fd(), entry)?)
    }

    fn start_threads(self) -> Result<Arc<Self>, HostedError> {
        let machine = Arc::new(self);
        machine.console.connect(&machine.serial)?;
        let mut threads = Vec::new();
        for vcpu in &machine.vcpus {
            threads.push(vcpu::spawn(vcpu.clone(), machine.around.clone())?);
        }
        let (around, weak) = (machine.around.clone(), Arc::downgrade(&machine));
        let keeper = std::thread::Builder::new()
            .name("machine".into())
            .spawn(move || keep(&around, &weak))
            .map_err(KvmError::of("thread of the machine"))?;
        threads.push(keeper);
        *machine.threads.lock().unwrap_or_else(PoisonError::into_inner) = threads;
        Ok(machine)
    }

    /// All vCPUs, when they stand.
    fn fds(&self) -> Vec<MutexGuard<'_, VcpuFd>> {
        self.vcpus.iter().map(|vcpu| vcpu.fd()).collect()
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the machine is made of.
    pub fn shape(&self) -> &MachineShape {
        &self.shape
    }

    /// Guest RAM, its file and the dirty bitmap that is shared with a migration manager.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The devices, in the order of their windows.
    pub fn devices(&self) -> &[Arc<dyn Device>] {
        self.around.bus.devices()
    }

    /// The balloon, if the machine has one.
    pub fn balloon(&self) -> Option<&VirtioBalloon> {
        self.devices().iter().find_map(|device| {
            let any: &dyn Any = device.as_ref();
            any.downcast_ref()
        })
    }

    /// The console's outside.
    pub fn console(&self) -> &Arc<Console> {
        &self.console
    }

    /// Types into the guest's console.
    pub fn console_input(&self, bytes: &[u8]) {
        super::console::Input::input(self.serial.as_ref(), bytes);
    }

    /// The dirty log.
    pub fn log(&self) -> &DirtyLogger {
        &self.around.log
    }

    /// Limits what vCPUs may write, for [`crate::port::THROTTLE_LEASE`]; says what they have written. See [`crate::port::Throttle`].
    ///
    /// # Errors
    /// The dirty log cannot be read, or there is no thread.
    pub fn throttle(&self, limits: &[Option<VcpuLimit>]) -> std::io::Result<VmWrites> {
        let writes = self.around.throttle.limit(limits);
        self.around.control.wake_held();
        writes
    }

    /// Lets all vCPUs write as they like.
    pub fn lift_throttle(&self) {
        self.around.throttle.lift();
        self.around.control.wake_held();
    }

    /// What the throttle does at present.
    pub fn throttle_status(&self) -> ThrottleStatus {
        self.around.throttle.status()
    }

    /// What the guest was booted from, command line complete: the target needs it for a reset.
    pub fn image(&self) -> Option<BootImage> {
        self.image.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the guest boots from when it resets.
    pub fn set_image(&self, image: BootImage) {
        *self.image.lock().unwrap_or_else(PoisonError::into_inner) = Some(image);
    }

    /// Whether a vCPU that touches memory may have to wait until somebody has brought a page.
    pub fn pages_come_later(&self, whether: bool) {
        self.vcpus.iter().for_each(|vcpu| vcpu.pages_come_later(whether));
    }

    /// The kernel's thread numbers of the vCPUs, in order; zero for one whose thread has only just been made.
    pub fn vcpu_threads(&self) -> Vec<i32> {
        self.vcpus.iter().map(|vcpu| vcpu.thread_id()).collect()
    }

    /// What this host's KVM lists and refuses, or has not: for `doctor`.
    pub fn shortcomings(&self) -> Vec<String> {
        let msrs = self.support.refused_msrs().iter().map(|index| format!("MSR {index:#x}"));
        msrs.chain(self.support.missing(&self.vm.fd).into_iter().map(str::to_owned)).collect()
    }

    /// Whether guest code runs.
    pub fn is_running(&self) -> bool {
        *self.phase() == Phase::Running && self.exit().is_none()
    }

    /// How the machine ended, if it has.
    pub fn exit(&self) -> Option<MachineExit> {
        self.around.control.exit()
    }

    /// Waits until the machine has ended, at most `timeout`.
    pub fn wait_exit(&self, timeout: Duration) -> Option<MachineExit> {
        self.around.control.wait_exit(timeout)
    }

    /// Ends the machine: [`MachineExit::Stopped`] unless it has ended otherwise.
    pub fn stop(&self) {
        self.around.control.end(MachineExit::Stopped);
    }

    /// Lets devices, then vCPUs go on (or start). Idempotent.
    pub fn resume(&self) -> Result<(), HostedError> {
        let mut phase = self.phase();
        self.resume_in(&mut phase)
    }

    fn resume_in(&self, phase: &mut Phase) -> Result<(), HostedError> {
        if let Some(exit) = self.exit() {
            return Err(HostedError::Ended(exit));
        }
        if *phase == Phase::Running {
            return Ok(());
        }
        self.tell_guest_that_it_stood()?;
        for device in self.devices() {
            if let Err(e) = device.resume() {
                let _ = self.pause_devices();
                return Err(e.into());
            }
        }
        let is_first = std::mem::replace(phase, Phase::Running) == Phase::Fresh;
        let control = &self.around.control;
        let goes = if is_first { control.start() } else { control.run() };
        if goes {
            return Ok(());
        }
        *phase = Phase::Standing;
        self.pause_devices()?;
        Err(HostedError::Ended(self.exit().unwrap_or(MachineExit::Stopped)))
    }

    /// Its time went on while it stood, so that its watchdogs would take a pause for a lockup. A guest that has not set up
    /// the KVM clock cannot be told (EINVAL). Documentation/virt/kvm/api.rst, KVM_KVMCLOCK_CTRL.
    fn tell_guest_that_it_stood(&self) -> Result<(), KvmError> {
        for vcpu in &self.vcpus {
            match vcpu.fd().kvmclock_ctrl() {
                Err(e) if e.errno() != libc::EINVAL => return Err(KvmError::of("KVM_KVMCLOCK_CTRL")(e)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Stops all vCPUs with nothing pending, then drains and mutes all devices. Idempotent. Who goes on with a blackout keeps a
    /// [`Hurry`] of its own, from before the pause to behind the resume: on a busy host the thread is set aside for
    /// milliseconds as soon as it is an ordinary one again.
    pub fn pause(&self) -> Result<Duration, HostedError> {
        let start = Instant::now();
        let _hurry = Hurry::here();
        let mut phase = self.phase();
        self.pause_in(&mut phase)?;
        Ok(start.elapsed())
    }

    fn pause_in(&self, phase: &mut Phase) -> Result<(), HostedError> {
        self.lift_throttle();
        self.around.control.stand();
        if *phase == Phase::Running {
            *phase = Phase::Standing;
            self.pause_devices()?;
        }
        // A reset that the guest asked for just now belongs to the state that is about to be looked at.
        if self.around.control.take_reset() { self.reset_in() } else { Ok(()) }
    }

    fn pause_devices(&self) -> Result<(), DeviceError> {
        self.devices().iter().map(|device| device.pause()).fold(Ok(()), Result::and)
    }

    /// Back to power-on, of a machine that stands: registers, interrupt controllers, devices, memory, guest loaded anew.
    fn reset_in(&self) -> Result<(), HostedError> {
        let image = self.image().ok_or(HostedError::Phase("cannot reset: it came without its boot image"))?;
        let (states, vm) = &self.power_on;
        let fds = self.fds();
        let time = TimeShift::none(vm.moment(), Now::read(&fds[0], self.support.counter())?);
        state::restore(&self.vm.fd, &fds, &self.support, (states, vm), &time)?;
        drop(fds);
        self.serial.reset();
        self.stun_port.reset();
        for device in self.devices() {
            device.reset()?;
        }
        self.memory.clear()?;
        self.load(&image)
    }

    /// The guest asked for a reset; it goes on running, if it was.
    fn reset_by_guest(&self) {
        let mut phase = self.phase();
        let was_running = *phase == Phase::Running;
        let done =
            self.pause_in(&mut phase).and_then(|()| if was_running { self.resume_in(&mut phase) } else { Ok(()) });
        match done {
            Ok(()) | Err(HostedError::Ended(_)) => {}
            Err(e) => self.around.control.end(MachineExit::Error(format!("reset: {}", chain(&e)))),
        }
    }

    /// CPU and device state of a machine that stands.
    pub fn save_state(&self) -> Result<Vec<u8>, HostedError> {
        let phase = self.phase();
        if *phase == Phase::Running {
            return Err(HostedError::Phase("runs: pause it before its state is saved"));
        }
        let mut writer = container::Writer::default();
        // The clock first: its moment is the one that the counters are reckoned from.
        let (vm, now) = VmState::save(&self.vm.fd, &self.vcpus[0].fd(), &self.support)?;
        writer.section(VM_TAG, VM_VERSION, &vm.to_bytes());
        for vcpu in &self.vcpus {
            let state = VcpuState::save(&vcpu.fd(), &self.support, &now)?;
            writer.section(&vcpu_tag(vcpu.index()), VCPU_VERSION, &state.to_bytes());
        }
        writer.section(SERIAL_TAG, DEVICE_VERSION, &self.serial.save());
        if let Some(state) = self.stun_port.save() {
            writer.section(stun_port::NAME, DEVICE_VERSION, &state);
        }
        for device in self.devices() {
            writer.section(&device.name(), DEVICE_VERSION, &device.save()?);
            let held = device.held()?;
            if !held.is_empty() {
                writer.section(&held_tag(&device.name()), DEVICE_VERSION, &held);
            }
        }
        Ok(writer.finish())
    }

    /// The pages of RAM without which a vCPU of the paused machine does not get through its next instruction.
    ///
    /// # Errors
    /// A machine that runs, or KVM.
    pub fn essential_pages(&self) -> Result<Vec<u64>, HostedError> {
        if *self.phase() == Phase::Running {
            return Err(HostedError::Phase("runs: pause it before one looks what it needs"));
        }
        let ram = self.memory().ram();
        let read = |address: u64| vm_memory::Bytes::read_obj::<u64>(ram.as_ref(), GuestAddress(address)).ok();
        let mut frames = BTreeSet::new();
        for vcpu in &self.vcpus {
            let fd = vcpu.fd();
            let regs = fd.get_regs().map_err(KvmError::of("KVM_GET_REGS"))?;
            let sregs = fd.get_sregs().map_err(KvmError::of("KVM_GET_SREGS"))?;
            essential_pages(&regs, &sregs, &read, &mut frames);
        }
        Ok(frames.into_iter().filter_map(|gfn| self.memory().page_of_gfn(gfn)).map(|page| page.0).collect())
    }

    /// Puts a state into a machine that has not run. All of it is checked before any of it is used; when KVM or a device
    /// refuses a part nevertheless, the machine must be thrown away.
    pub fn restore_state(&self, state: &[u8]) -> Result<(), HostedError> {
        let phase = self.phase();
        if *phase != Phase::Fresh {
            return Err(HostedError::Phase("has run: a state can only be restored before"));
        }
        self.restore_in(state, false)
    }

    /// Puts a state into a machine that stands, in the place of its own: one that it has come to elsewhere. All of it is checked before any of it is used.
    ///
    /// # Errors
    /// A machine that runs; a state that does not fit it.
    pub fn go_on_from(&self, state: &[u8]) -> Result<(), HostedError> {
        let phase = self.phase();
        if *phase == Phase::Running {
            return Err(HostedError::Phase("runs: pause it before another state is put in place"));
        }
        self.restore_in(state, true)
    }

    fn restore_in(&self, state: &[u8], is_used: bool) -> Result<(), HostedError> {
        let mut sections = Sections::parse(state, container::MAX_STATE_BYTES)?;
        let vm = VmState::from_bytes(sections.take(VM_TAG, VM_VERSION)?)?;
        let vcpus = self
            .vcpus
            .iter()
            .map(|vcpu| VcpuState::from_bytes(sections.take(&vcpu_tag(vcpu.index()), VCPU_VERSION)?))
            .collect::<Result<Vec<_>, StateError>>()?;
        let serial = sections.take(SERIAL_TAG, DEVICE_VERSION)?;
        let stun_port = sections.take_if_there(stun_port::NAME, DEVICE_VERSION)?;
        let devices = self
            .devices()
            .iter()
            .map(|device| {
                let held = sections.take_if_there(&held_tag(&device.name()), DEVICE_VERSION)?;
                Ok((device, sections.take(&device.name(), DEVICE_VERSION)?, held))
            })
            .collect::<Result<Vec<_>, StateError>>()?;
        sections.finish()?;
        if is_used {
            self.serial.reset();
            self.stun_port.reset();
            for device in self.devices() {
                device.reset()?;
            }
        }

        let fds = self.fds();
        let now = Now::read(&fds[0], self.support.counter())?;
        let time = TimeShift::since(vm.moment(), now, self.made.elapsed());
        state::restore(&self.vm.fd, &fds, &self.support, (&vcpus, &vm), &time)?;
        state::check_counters(&fds, &self.support, &vcpus, &time)?;
        drop(fds);
        // After the interrupt controllers: these may signal an interrupt again.
        self.serial.restore(serial)?;
        if let Some(state) = stun_port {
            self.stun_port.restore(state)?;
        }
        for (device, state, held) in devices {
            device.restore(state)?;
            device.take_held(held.unwrap_or_default())?;
        }
        Ok(())
    }

    /// No vCPU enters guest code any more, and no device begins anything; what is under way is not waited for: a vCPU may be waiting itself, for memory that does not come. [`Machine::pause`] follows.
    pub fn order_stand(&self) {
        self.around.control.order_stand();
        self.devices().iter().for_each(|device| device.order_pause());
    }

    /// What the guest sends and writes to disks stays in the machine from now on, as that of increment 1.
    pub fn hold_output(&self) {
        let share = HELD_BYTES / self.devices().len().max(1);
        self.devices().iter().for_each(|device| device.hold_output(share));
    }

    /// What it sends and writes from now on is that of increment `number`.
    ///
    /// # Errors
    /// A machine that runs.
    pub fn begin_increment(&self, number: u32) -> Result<(), HostedError> {
        if *self.phase() == Phase::Running {
            return Err(HostedError::Phase("runs: pause it before an increment ends"));
        }
        self.devices().iter().for_each(|device| device.begin_increment(number));
        Ok(())
    }

    /// What is that of increments up to `number` goes out.
    pub fn let_out(&self, number: u32) {
        self.devices().iter().for_each(|device| device.let_out(number));
    }

    /// Where frames for the guest come in, in the order of its ports.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn former_ports(&self) -> io::Result<Vec<OwnedFd>> {
        self.devices().iter().filter_map(|device| device.former_port().transpose()).collect()
    }

    /// What has come from the network so far is thrown away, and what comes waits for [`Machine::relay_caught_up`].
    pub fn await_relay(&self) {
        self.devices().iter().for_each(|device| device.await_relay());
    }

    /// Gives the guest frames that reached its former place, each at its port; those of no port are dropped. A port looks once for all of them: it would take turns with whoever
    /// brings them, and interrupt the guest for each.
    pub fn relay(&self, frames: Vec<RelayedFrame>) {
        let mut of_port: Vec<Vec<Vec<u8>>> = vec![Vec::new(); self.shape().nets.len()];
        for frame in frames {
            if let Some(of_port) = of_port.get_mut(usize::from(frame.port)) {
                of_port.push(frame.bytes);
            }
        }
        // Network ports are the first devices, in their order.
        for (port, frames) in self.devices().iter().zip(of_port).filter(|(_, frames)| !frames.is_empty()) {
            port.relay_frames(frames);
        }
    }

    /// What was at the former place when the VM ran here has been relayed.
    pub fn relay_caught_up(&self) {
        self.devices().iter().for_each(|device| device.relay_caught_up());
    }

    /// Nothing more is relayed.
    pub fn end_relay(&self) {
        self.devices().iter().for_each(|device| device.end_relay());
    }

    /// All that is held goes out, and nothing is held any more.
    pub fn end_holding(&self) {
        self.devices().iter().for_each(|device| device.end_holding());
    }
}

fn held_tag(device: &str) -> String {
    format!("{device}.held")
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
        self.around.throttle.lift();
        let threads = std::mem::take(self.threads.get_mut().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            // The keeper itself may have held the last reference.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
        let _ = self.pause_devices();
    }
}

/// The keeper's thread: resets when the guest asks, and stills the devices of a machine that has ended.
fn keep(around: &Surroundings, machine: &Weak<Machine>) {
    loop {
        let exit = around.control.wait_reset_or_exit();
        let Some(machine) = machine.upgrade() else { return };
        if exit.is_none() {
            machine.reset_by_guest();
            continue;
        }
        let mut phase = machine.phase();
        if let Err(e) = machine.pause_in(&mut phase) {
            tracing::warn!("a device of the ended machine did not stop: {}", chain(&e));
        }
        return;
    }
}

/// Refuses more vCPUs than KVM makes; ids of 255 and above would need another LAPIC format.
fn check_cpus(kvm: &kvm_ioctls::Kvm, asked: u32) -> Result<(), HostedError> {
    let possible = (kvm.get_max_vcpus() as u32).min(254);
    if asked <= possible { Ok(()) } else { Err(HostedError::Cpus { asked, possible }) }
}

fn vcpu_tag(index: u32) -> String {
    format!("vcpu{index}")
}

fn refused(action: &'static str) -> impl FnOnce(HostedError) -> MachineError {
    move |e| MachineError::Refused { action, reason: chain(&e) }
}

impl Vcpus for Arc<Machine> {
    fn pause(&mut self) -> Result<PauseTiming, MachineError> {
        Machine::pause(self).map(|pause| PauseTiming { pause }).map_err(refused("pause"))
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        Machine::resume(self).map_err(refused("resume"))
    }
}

impl DirtyLog for Arc<Machine> {
    fn start_log(&mut self) -> Result<(), MachineError> {
        self.log().start().map_err(|e| refused("start the dirty log")(e.into()))
    }

    fn harvest(&mut self, into: &mut PageBitmap) -> Result<PageCount, MachineError> {
        self.log().harvest().map_err(|e| refused("harvest the dirty log")(e.into()))?;
        Ok(self.memory().dirty().take(into))
    }

    fn protect(&mut self, region: RegionId, run: PageRun) -> Result<(), MachineError> {
        if region != RegionId::RAM {
            return Err(MachineError::Refused { action: "protect pages", reason: format!("{region:?} is not RAM") });
        }
        self.log().protect(run).map_err(|e| refused("protect pages")(e.into()))
    }

    fn disregard(&mut self, _region: RegionId, runs: &[PageRun]) -> Result<(), MachineError> {
        self.log().disregard(runs);
        Ok(())
    }

    fn stop_log(&mut self) -> Result<(), MachineError> {
        self.log().stop().map_err(|e| refused("stop the dirty log")(e.into()))
    }
}

impl MachineState for Arc<Machine> {
    fn save_state(&mut self) -> Result<Vec<u8>, MachineError> {
        Machine::save_state(self).map_err(refused("save its state"))
    }

    fn essential_pages(&mut self) -> Result<Vec<u64>, MachineError> {
        Machine::essential_pages(self).map_err(refused("say which pages it needs"))
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<(), MachineError> {
        Machine::restore_state(self, state).map_err(refused("restore a state"))
    }

    fn boot_image(&mut self) -> Result<Option<Vec<u8>>, MachineError> {
        Ok(self.image().map(|image| image.to_bytes()))
    }

    fn set_boot_image(&mut self, image: &[u8]) -> Result<(), MachineError> {
        let image = BootImage::from_bytes(image).map_err(|e| refused("take a boot image")(e.into()))?;
        self.set_image(image);
        Ok(())
    }
}
