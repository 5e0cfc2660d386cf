//! Owns the per-vCPU state that the CPL 0 code of `entry.rs` works on: saved tasks, the TSS, scheduling fields, counters.
//!
//! The layout is shared with assembly through `offset_of!`; every field is an atomic or is written only before the vCPU runs.
//! Each vCPU has three tasks: the service task (network, heartbeat, accounting), the writer task (memory workload, in an
//! address space of its own) and the idle task, which is the only one that runs at CPL 0.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};

use dunlin_guest::cmdline::MAX_CPUS;
use dunlin_guest::ledger::gap_cycles;

/// Bytes of a task's user stack.
pub const STACK_BYTES: usize = 32 << 10;
/// Offset of the saved registers in a task: 15 general registers and the 5 words of an interrupt frame end the task.
pub const FRAME_OFFSET: usize = TASK_BYTES - 20 * 8;
/// Bytes of a task; the interrupt stack of a task is its own end.
pub const TASK_BYTES: usize = 0x400;
/// Index of the service task.
pub const SERVICE: usize = 0;
/// Index of the writer task.
pub const WRITER: usize = 1;
/// Interrupt sources of devices that are counted one by one.
pub const DEVICE_VECTORS: usize = 8;

/// A task: what is kept of it while another runs.
#[repr(C, align(64))]
pub struct Task {
    /// FXSAVE area.
    pub fx: UnsafeCell<[u8; 512]>,
    /// Address of the `Cpu` it belongs to.
    pub cpu: AtomicU64,
    /// Root of its address space.
    pub cr3: AtomicU64,
    /// Time (TSC) at which it wants to run; 0 is now.
    pub deadline: AtomicU64,
    /// Set by an interrupt for it; makes the next wait return at once.
    pub wake: AtomicU64,
    free: [u64; 40],
    /// Saved registers: r15 .. rax (15 words), rip, cs, rflags, rsp, ss.
    pub frame: UnsafeCell<[u64; 20]>,
}

/// RFLAGS of CPL 3: interrupts on, and IOPL 3. The bitmap alone would do on a real CPU; QEMU's emulated ones (7.2, `check_io`) do
/// not look at it any more once a hypervisor inside has set TR, as it does after a move.
pub const USER_FLAGS: u64 = 0x3202;

/// The 64-bit task state segment with an I/O bitmap that opens ports 0 to 0x7ff to CPL 3.
#[repr(C, packed)]
pub struct Tss {
    reserved: u32,
    /// Interrupt stack of the running task.
    pub rsp0: u64,
    rest: [u64; 11],
    reserved2: u16,
    /// Offset of the I/O bitmap.
    pub bitmap_offset: u16,
    bitmap: [u8; 256],
    bitmap_end: u8,
}

/// Counters and settings that the tasks of a vCPU share with the service task of vCPU 0, all written at CPL 3.
#[derive(Default)]
pub struct Shared {
    /// Rounds of the service task's loop.
    pub rounds: AtomicU64,
    /// Interrupts sent to the next vCPU, lost, doubled.
    pub cross: [AtomicU64; 3],
    /// Interrupts sent to itself, lost, doubled.
    pub own: [AtomicU64; 3],
    /// Timers of this vCPU that did not fire.
    pub timer_stalls: AtomicU64,
    /// Times that a task of this vCPU found a foreign canary.
    pub address_space_mismatches: AtomicU64,
    /// Largest gap in cycles; set to 0 when the guest is ready and by `/reset-gap`.
    pub max_gap_cycles: AtomicU64,
    /// Time stamp at the end of the largest gap.
    pub max_gap_at: AtomicU64,
    /// Workload settings wanted: generation (odd while being written), bytes, rate, then pattern, share, fill.
    pub wanted_generation: AtomicU32,
    /// Working set in bytes.
    pub wanted_bytes: AtomicU64,
    /// Pages per second.
    pub wanted_rate: AtomicU64,
    /// Pattern, share and fill in the three low bytes.
    pub wanted_look: AtomicU32,
    /// Generation of the settings that the writer has taken over, its working set filled.
    pub settled_generation: AtomicU32,
    /// True while the writer may not halt between batches.
    pub spin: AtomicU8,
    /// Data pages that this vCPU was granted.
    pub granted_pages: AtomicU64,
    /// Pages of the working set that are filled.
    pub filled_pages: AtomicU64,
    /// Pages written, initial fill not counted.
    pub pages_written: AtomicU64,
    /// Pages whose writing was due but dropped after a pause.
    pub pages_dropped: AtomicU64,
    /// Pages that were not what they had to be.
    pub page_mismatches: AtomicU64,
    /// First mismatch: part (0 is none), page index, word, expected, found.
    pub first_mismatch: [AtomicU64; 5],
    /// Generation of the last verification done.
    pub verified_generation: AtomicU32,
    /// Pages checked by it.
    pub verified_pages: AtomicU64,
    /// Mismatches found by it.
    pub verified_mismatches: AtomicU64,
    /// Page to break on purpose, plus one.
    pub poison: AtomicU64,
    /// Time (TSC) up to which the host has asked that the writer stands.
    pub held_until: AtomicU64,
    /// How often it has asked.
    pub holds: AtomicU64,
}

/// A vCPU.
#[repr(C, align(4096))]
pub struct Cpu {
    /// Service, writer, idle.
    pub tasks: [Task; 3],
    /// Its TSS.
    pub tss: UnsafeCell<Tss>,
    /// Selector of the TSS.
    pub tss_selector: AtomicU64,
    /// CR3 that is loaded.
    pub current_cr3: AtomicU64,
    /// Task whose FPU state is in the registers.
    pub fp_owner: AtomicU64,
    /// LAPIC timer counts per TSC cycle, times 2^32.
    pub timer_multiplier: AtomicU64,
    /// Longest time to the next tick while a task runs, in cycles.
    pub tick_cycles: AtomicU64,
    /// Longest time to the next tick while idle, in cycles.
    pub idle_cycles: AtomicU64,
    /// Time (TSC) for which the timer is armed.
    pub armed_until: AtomicU64,
    /// Time (TSC) that a task of this vCPU last looked at.
    pub last_seen: AtomicU64,
    /// Timer interrupts.
    pub ticks: AtomicU64,
    /// Interrupts received from the previous vCPU.
    pub cross_received: AtomicU64,
    /// Interrupts received from itself.
    pub own_received: AtomicU64,
    /// Wake-ups received (not accounted).
    pub wakes: AtomicU64,
    /// Spurious LAPIC interrupts.
    pub spurious: AtomicU64,
    /// Interrupts of each device.
    pub device_interrupts: [AtomicU64; DEVICE_VECTORS],
    /// Set when the vCPU has arrived in the scheduler.
    pub online: AtomicU64,
    /// Index of the vCPU, which is its LAPIC id.
    pub index: AtomicU32,
    /// What CPL 3 code keeps.
    pub shared: Shared,
}

/// All vCPUs.
pub struct Cpus(UnsafeCell<[Cpu; MAX_CPUS]>);

// SAFETY: the fields of `Cpu` are atomics, except frames, FXSAVE areas and TSSs, which are written by `prepare` before the
// vCPU is started and after that only by the CPL 0 code of that vCPU.
unsafe impl Sync for Cpus {}

/// The vCPUs, zero at boot.
#[unsafe(no_mangle)]
pub static CPUS: Cpus = Cpus(UnsafeCell::new(
    // SAFETY: all fields are integers, atomics and arrays of them, for which zero is a value.
    unsafe { core::mem::zeroed() },
));

#[repr(C, align(4096))]
struct Stacks(UnsafeCell<[[[u8; STACK_BYTES]; 2]; MAX_CPUS]>);

// SAFETY: only addresses are taken; each stack is used by the one task that it is given to.
unsafe impl Sync for Stacks {}

#[unsafe(no_mangle)]
static STACKS: Stacks = Stacks(UnsafeCell::new([[[0; STACK_BYTES]; 2]; MAX_CPUS]));

/// The vCPU with this index.
pub fn cpu(index: usize) -> &'static Cpu {
    // SAFETY: the array lives for ever and is only used through shared references (see `Sync` above).
    unsafe { &(&*CPUS.0.get())[index] }
}

/// The first `count` vCPUs.
pub fn all(count: usize) -> &'static [Cpu] {
    // SAFETY: as in `cpu`.
    unsafe { &(&*CPUS.0.get())[..count] }
}

/// Top of the user stack of a task.
pub fn stack_top(cpu: usize, task: usize) -> u64 {
    // SAFETY: an address inside the static is computed, nothing is read.
    let stack = unsafe { &raw const (*STACKS.0.get())[cpu][task] };
    stack as u64 + STACK_BYTES as u64
}

impl Task {
    fn prepare(&self, cpu: &Cpu, entry: extern "sysv64" fn(&'static Cpu) -> !, stack_top: u64, deadline: u64) {
        let mut frame = [0u64; 20];
        frame[9] = cpu as *const Cpu as u64; // rdi, the argument
        frame[15] = entry as *const () as u64;
        frame[16] = 0x33; // user code
        frame[17] = USER_FLAGS;
        frame[18] = stack_top - 8; // as after a call
        frame[19] = 0x2b; // user data
        // SAFETY: the vCPU does not run yet, so nothing else touches the frame and the FXSAVE area.
        unsafe {
            *self.frame.get() = frame;
            let fx = &mut *self.fx.get();
            fx[0..2].copy_from_slice(&0x37fu16.to_le_bytes()); // x87 control word
            fx[24..28].copy_from_slice(&0x1f80u32.to_le_bytes()); // MXCSR: all masked
        }
        self.cpu.store(cpu as *const Cpu as u64, Relaxed);
        self.deadline.store(deadline, Relaxed);
    }
}

impl Cpu {
    /// Sets a vCPU up to run its tasks. The service task starts first; the writer is held until it is released.
    pub fn prepare(
        &'static self,
        index: usize,
        service: extern "sysv64" fn(&'static Cpu) -> !,
        writer: extern "sysv64" fn(&'static Cpu) -> !,
        roots: [u64; 2],
    ) {
        self.index.store(index as u32, Relaxed);
        self.tasks[SERVICE].prepare(self, service, stack_top(index, SERVICE), 0);
        self.tasks[WRITER].prepare(self, writer, stack_top(index, WRITER), u64::MAX);
        self.tasks[2].cpu.store(self as *const Cpu as u64, Relaxed);
        self.tasks[2].deadline.store(u64::MAX, Relaxed);
        self.tasks[SERVICE].cr3.store(roots[0], Relaxed);
        self.tasks[WRITER].cr3.store(roots[1], Relaxed);
        self.tasks[2].cr3.store(roots[0], Relaxed);
        self.fp_owner.store(&raw const self.tasks[SERVICE] as u64, Relaxed);
        self.tss_selector.store(u64::from(crate::entry::TSS_SELECTOR) + 16 * index as u64, Relaxed);
        self.idle_cycles.store(1 << 30, Relaxed);
        self.tick_cycles.store(1 << 20, Relaxed);
        // SAFETY: the vCPU does not run yet (vCPU 0: no interrupt is enabled yet), so nothing reads its TSS.
        unsafe {
            let tss = &mut *self.tss.get();
            tss.rsp0 = (&raw const self.tasks[SERVICE]) as u64 + TASK_BYTES as u64;
            tss.bitmap_offset = core::mem::offset_of!(Tss, bitmap) as u16;
            tss.bitmap_end = 0xff;
        }
    }

    /// Gives the vCPU to the other task until `deadline` (TSC) or until an interrupt for this task; returns the time after that.
    pub fn wait(&self, deadline: u64) -> u64 {
        gate(deadline, self.look(0));
        self.look(deadline)
    }

    /// Reads the time stamp counter and keeps the book of gaps. `planned` is the end of a sleep before this look, else 0.
    #[inline]
    pub fn look(&self, planned: u64) -> u64 {
        let now = crate::io::tsc();
        let gap = gap_cycles(self.last_seen.load(Relaxed), planned, now);
        if gap > self.shared.max_gap_cycles.load(Relaxed) {
            self.shared.max_gap_cycles.store(gap, Relaxed);
            self.shared.max_gap_at.store(now, Relaxed);
        }
        self.last_seen.store(now, Relaxed);
        now
    }

    /// Index of the vCPU.
    #[inline]
    pub fn number(&self) -> usize {
        self.index.load(Relaxed) as usize
    }
}

/// The wait gate of `entry.rs`: the running task sleeps until `deadline`; `now` is a fresh time stamp.
fn gate(deadline: u64, now: u64) {
    // SAFETY: the gate saves and restores all general registers; the vector registers are declared lost, as the other
    // task may use them, and memory may be changed by it.
    unsafe {
        core::arch::asm!(
            "ud2",
            inout("rax") crate::entry::GATE_MAGIC => _,
            in("rdi") deadline,
            in("rsi") now,
            clobber_abi("sysv64")
        );
    }
}

/// Stops the running task for ever; when no other task has work the vCPU halts.
pub fn halt_for_ever() -> ! {
    let scheduled = cpu(0).tasks[SERVICE].cr3.load(Relaxed) != 0;
    loop {
        if scheduled {
            gate(u64::MAX, crate::io::tsc());
        } else {
            crate::io::relax();
        }
    }
}
