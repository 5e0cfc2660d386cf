//! One vCPU: its descriptor, the thread that runs it, and what is done when it leaves guest code.
//!
//! Owns the run loop. The thread holds the vCPU's lock while it runs, so whoever gets the lock finds it standing with
//! nothing pending. Must not know what a device does, nor the layout of any CPU state.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

use super::alarm::Alarm;
use super::bus::MmioBus;
use super::control::{Kick, MachineExit, RunControl};
use super::dirty::DirtyLogger;
use super::hurry;
use super::ports::{PortAction, Ports};
use super::sys::KvmError;
use super::throttle::Throttle;
use super::x86::timer::next_interrupt;
use crate::model::AddressSpace;

/// The signal that takes a vCPU out of guest code, counted from SIGRTMIN.
const KICK_SIGNAL: i32 = 0;

/// How long the vCPUs of a VM that has just come (or starts) are in front of ordinary threads: what reached it while it stood is answered before the migration goes on with the rest.
const CATCHES_UP: Duration = Duration::from_millis(2);

/// A vCPU.
pub(crate) struct Vcpu {
    index: u32,
    fd: Mutex<VcpuFd>,
    /// `kvm_run.immediate_exit` of `fd`.
    immediate_exit: NonNull<AtomicU8>,
    /// The kernel's number of the thread that runs it; zero while there is none.
    thread: AtomicI32,
    /// Whether its thread was put in front of others to answer a kick.
    hurried: AtomicBool,
    /// Whether its thread was put in front of others although it may have to wait.
    pressed: AtomicBool,
    /// Whether its thread was put in front of others for its first moment, which has not begun.
    hastened: AtomicBool,
    /// It may have to wait for a page of memory, and is put in front of others only to come to stand, and for moments.
    may_wait: AtomicBool,
}

// SAFETY: `immediate_exit` points into the mapping that `fd` owns, which lives as long as `self`, and is only accessed
// atomically; everything else is Send and Sync by itself.
unsafe impl Send for Vcpu {}
// SAFETY: as above.
unsafe impl Sync for Vcpu {}

/// The signal's handler: the signal only has to interrupt.
extern "C" fn on_kick(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Vcpu {
    /// Creates vCPU number `index`.
    pub(crate) fn new(vm: &VmFd, index: u32) -> Result<Self, KvmError> {
        let mut fd = vm.create_vcpu(u64::from(index)).map_err(KvmError::of("KVM_CREATE_VCPU"))?;
        let immediate_exit = NonNull::from(&mut fd.get_kvm_run().immediate_exit).cast();
        Ok(Self {
            index,
            fd: Mutex::new(fd),
            immediate_exit,
            thread: AtomicI32::new(0),
            hurried: AtomicBool::new(false),
            pressed: AtomicBool::new(false),
            hastened: AtomicBool::new(false),
            may_wait: AtomicBool::new(false),
        })
    }

    /// The descriptor; waits until the vCPU stands.
    pub(crate) fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its number.
    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    /// The kernel's number of its thread; zero before the thread has started.
    pub(crate) fn thread_id(&self) -> i32 {
        self.thread.load(Ordering::Acquire)
    }

    /// Has it come out of guest code once, if it is inside; it may go on at once.
    pub(super) fn nudge(&self) {
        self.signal();
    }

    /// Whether it may have to wait until somebody has brought a page. With a signal pending it does not sleep then: the kernel tries again and again, since only a fatal one ends an access of
    /// its own to memory (`fault_signal_pending`, include/linux/sched/signal.h). In front of all others it would keep its CPU from whoever brings the page.
    pub(super) fn pages_come_later(&self, whether: bool) {
        self.may_wait.store(whether, Ordering::SeqCst);
    }

    /// Puts its thread in front of others; whether it was moved.
    fn put_in_front(&self) -> bool {
        let thread = self.thread_id();
        thread != 0 && hurry::put_vcpu_in_front(thread)
    }

    fn may_wait(&self) -> bool {
        self.may_wait.load(Ordering::SeqCst)
    }

    fn signal(&self) {
        let thread = self.thread_id();
        if thread != 0 {
            // SAFETY: sends a signal whose handler does nothing to a thread of this process; a number that has ended is
            // refused by the kernel, and one that was reused meanwhile only sees an interrupted call.
            unsafe {
                libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, libc::SIGRTMIN() + KICK_SIGNAL);
            }
        }
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: see the impl of Send; AtomicU8 has the layout of u8, and the kernel only reads the byte.
        unsafe { self.immediate_exit.as_ref() }
    }
}

impl Kick for Vcpu {
    fn hasten(&self) {
        if !self.may_wait() && self.put_in_front() {
            self.hastened.store(true, Ordering::SeqCst);
        }
    }

    fn kick(&self) {
        // First the flag, then the signal: a vCPU that is about to enter sees the flag, one inside takes the signal.
        self.immediate_exit().store(1, Ordering::SeqCst);
        // On a busy host a pause does not wait for the thread's next turn.
        if !self.may_wait() && self.put_in_front() {
            self.hurried.store(true, Ordering::SeqCst);
        }
        self.signal();
    }

    fn press(&self) {
        if self.may_wait() && self.put_in_front() {
            self.pressed.store(true, Ordering::SeqCst);
        }
    }

    fn relent(&self) {
        if self.pressed.swap(false, Ordering::SeqCst) {
            hurry::put_back(self.thread_id());
        }
    }

    fn clear(&self) {
        if self.hurried.swap(false, Ordering::SeqCst) {
            hurry::put_back(self.thread_id());
        }
        self.immediate_exit().store(0, Ordering::SeqCst);
    }
}

/// What a vCPU reaches when it leaves guest code.
pub(crate) struct Surroundings {
    pub(crate) control: RunControl,
    pub(crate) bus: Arc<MmioBus>,
    pub(crate) ports: Arc<Ports>,
    pub(crate) log: Arc<DirtyLogger>,
    pub(super) throttle: Arc<Throttle>,
}

/// Starts the thread of `vcpu`. It stands until the control lets it run.
pub(crate) fn spawn(vcpu: Arc<Vcpu>, around: Arc<Surroundings>) -> Result<JoinHandle<()>, KvmError> {
    vmm_sys_util::signal::register_signal_handler(libc::SIGRTMIN() + KICK_SIGNAL, on_kick)
        .map_err(KvmError::of("signal handler of the vCPUs"))?;
    std::thread::Builder::new()
        .name(format!("vcpu{}", vcpu.index))
        .spawn(move || {
            let id = hurry::this_thread();
            vcpu.thread.store(id, Ordering::Release);
            let alarm = Alarm::for_this_thread(libc::SIGRTMIN() + KICK_SIGNAL);
            if let Err(error) = &alarm {
                tracing::warn!("vCPU {}: no timer, so a throttle holds it less finely: {error}", vcpu.index);
            }
            while around.control.enter(vcpu.as_ref()) {
                if let Some(exit) = run(&vcpu, &around, alarm.as_ref().ok()) {
                    around.control.end(exit);
                }
                around.control.left();
            }
        })
        .map_err(KvmError::of("thread of a vCPU"))
}

/// Runs guest code until the vCPU must stand. Returns why the machine ends, if it does.
///
/// A pending exit is completed before the vCPU stands: an order is looked at only when KVM has answered EINTR, which with
/// `immediate_exit` set it does after it has finished the instruction of the last exit.
fn run(vcpu: &Vcpu, around: &Surroundings, alarm: Option<&Alarm>) -> Option<MachineExit> {
    let mut fd = vcpu.fd();
    let mut first = FirstMoment::begin(vcpu, alarm);
    loop {
        let exit = fd.run();
        if first.as_ref().is_some_and(FirstMoment::is_over) {
            first = None;
        }
        match exit {
            Ok(VcpuExit::IoOut(port, data)) => match around.ports.write(port, data) {
                PortAction::None => {}
                PortAction::PowerOff => return Some(MachineExit::PowerOff),
                PortAction::Reset => around.control.request_reset(),
            },
            Ok(VcpuExit::IoIn(port, data)) => around.ports.read(port, data),
            Ok(VcpuExit::MmioWrite(address, data)) => around.bus.write(address, data),
            Ok(VcpuExit::MmioRead(address, data)) => around.bus.read(address, data),
            Ok(VcpuExit::Unsupported(kvm_bindings::KVM_EXIT_DIRTY_RING_FULL)) => {
                if let Err(e) = around.log.ring_full(vcpu.index) {
                    return Some(MachineExit::Error(format!("vCPU {}: dirty ring: {e}", vcpu.index)));
                }
            }
            Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => {}
            Ok(VcpuExit::Shutdown) => {
                return Some(MachineExit::Error(format!("vCPU {}: triple fault", vcpu.index)));
            }
            Ok(VcpuExit::InternalError) => {
                let text = internal_error(&mut fd);
                return Some(MachineExit::Error(format!("vCPU {}: {text}", vcpu.index)));
            }
            Ok(other) => {
                let text = format!("vCPU {}: unexpected exit {other:?}", vcpu.index);
                return Some(MachineExit::Error(text));
            }
            // EAGAIN: an application processor that waits for its start, or a page that is being fetched.
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {
                if e.errno() == libc::EINTR && (around.control.must_stand(vcpu) || held(vcpu, &fd, around, alarm)) {
                    return None;
                }
            }
            Err(e) => return Some(MachineExit::Error(format!("vCPU {}: KVM_RUN: {e}", vcpu.index))),
        }
    }
}

/// A vCPU's thread is in front of others until this is dropped.
struct FirstMoment {
    thread: i32,
    until: Instant,
}

impl FirstMoment {
    /// If the thread, the calling one, was put in front for that. Without an alarm nobody would take it out of guest code at its end.
    fn begin(vcpu: &Vcpu, alarm: Option<&Alarm>) -> Option<Self> {
        let is_hastened = vcpu.hastened.swap(false, Ordering::SeqCst);
        let moment = is_hastened.then(|| Self { thread: vcpu.thread_id(), until: Instant::now() + CATCHES_UP })?;
        alarm?.ring_in(CATCHES_UP);
        Some(moment)
    }

    fn is_over(&self) -> bool {
        self.until <= Instant::now()
    }
}

impl Drop for FirstMoment {
    fn drop(&mut self) {
        hurry::put_back(self.thread);
    }
}

/// Stands still for as long as the throttle says; whether an order came meanwhile.
fn held(vcpu: &Vcpu, fd: &VcpuFd, around: &Surroundings, alarm: Option<&Alarm>) -> bool {
    let lifts = around.throttle.lifts();
    let root = || fd.get_sregs().ok().map(|sregs| AddressSpace(sregs.cr3 & dunlin_ebpf::TABLE_ADDRESS));
    let Some(hold) = around.throttle.must_hold(vcpu.index, root, || next_interrupt(fd)) else { return false };
    if let Some(until) = hold.until {
        let began = Instant::now();
        around.control.hold(until, || around.throttle.lifts() != lifts);
        around.throttle.was_held(vcpu.index, hold, began.elapsed());
    }
    if let (Some(again), Some(alarm)) = (hold.again, alarm) {
        alarm.ring_in(again);
    }
    around.control.must_stand(vcpu)
}

/// What KVM says of an internal error: most often an instruction that it cannot emulate.
fn internal_error(fd: &mut VcpuFd) -> String {
    // SAFETY: the exit reason says that this member of the union is the valid one.
    let internal = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal };
    let registers = fd.get_regs().map_or_else(|e| format!("({e})"), |regs| format!("rip {:#x}", regs.rip));
    let count = (internal.ndata as usize).min(internal.data.len());
    format!("KVM internal error {}, {registers}, data {:x?}", internal.suberror, &internal.data[..count])
}
