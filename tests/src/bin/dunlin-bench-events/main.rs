//! What the BPF programs cost for each event, by the kernel's own count of their run time, at rates of events that a VM of this process
//! makes: a handful of instructions, write-protected over and over.
//!
//! Started by `cargo xtask bench tracking`, which reads the lines that it prints and says what they mean. Apart from xtask so that a change in
//! the agent, or a broken one, never keeps xtask itself from building.

use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Parser;
use dunlin::model::{DirtyLogKind, KvmDescriptors, PageCount};
use dunlin::port::EventSource;
use dunlin::probe::syscall::{self, ProgramKind, RunStats};
use dunlin::probe::{Gives, KernelCounters, LoadOptions, Probes, SharedProbes};
use dunlin::trial::tiny_vm::TinyVm;

/// Pages that a pass writes, each once and each with an event.
const PAGES: u64 = 4096;
/// The tracepoint that each event passes on every KVM backend.
const EVENT: &str = "kvm_mmu_set_spte";

/// Measures what an event costs. Needs /dev/kvm and the right to use BPF.
#[derive(Debug, Parser)]
#[command(name = "dunlin-bench-events")]
struct Cli {
    /// How long each measurement lasts, in milliseconds.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u64).range(100..=60_000))]
    millis: u64,
    /// Events per second; as many as can be made where not given.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    rate: Option<u64>,
    /// VMs that make events, each on a thread of its own.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=64))]
    vms: u64,
    /// What is attached.
    #[arg(long, value_enum, default_value_t = What::Counting)]
    what: What,
}

/// What is attached while events are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// Nothing: how many events can be made at all is not known then, only how many pages are written.
    Nothing,
    /// A program of two instructions: what the counting of run times sees of itself.
    Empty,
    /// Ours, outside of a window and without attribution.
    Counting,
    /// Ours, in a window in which every write is the first to its page, so that its time is taken.
    FirstWrites,
    /// The same, with attribution to address spaces and instructions.
    Attributing,
    /// The same, each write told by itself too.
    SingleWrites,
}

/// Room for all single writes of a measurement of 2 s.
const SINGLE_WRITES_BYTES: u32 = 256 << 20;

/// What was attached, for as long as this lives.
enum Attached {
    Nothing,
    Empty { program: OwnedFd, _link: OwnedFd },
    Ours { counters: SharedCounters, in_window: bool },
}

/// Counters that the VMs' threads harvest.
type SharedCounters = Arc<Mutex<KernelCounters>>;

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let _counting = syscall::count_runs().context("the kernel does not count run times of BPF programs")?;
    let mut writers = (0..cli.vms).map(|_| Writer::start()).collect::<Result<Vec<Writer>>>()?;
    let mut attached = attach(cli.what, cli.vms)?;
    let before = totals(&mut attached)?;
    let began = Instant::now();
    let harvested = match &attached {
        Attached::Ours { counters, in_window: true } => Some(Arc::clone(counters)),
        _ => None,
    };
    let rate = cli.rate.map(|rate| rate as f64 / cli.vms as f64);
    let order = Order { time: Duration::from_millis(cli.millis), rate, harvested };
    writers.iter().try_for_each(|writer| writer.order.send(order.clone()).context("a VM's thread"))?;
    let written = writers.drain(..).map(Writer::finish).sum::<Result<u64>>()?;
    let elapsed = began.elapsed();
    let after = totals(&mut attached)?;
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "EVENTS elapsed_ns={} pages_written={written} events={} event_runs={} event_run_time_ns={} run_time_ns={} lost={}",
        elapsed.as_nanos(),
        after.events - before.events,
        after.of_events.run_count - before.of_events.run_count,
        after.of_events.run_time_ns - before.of_events.run_time_ns,
        after.run_time_ns - before.run_time_ns,
        after.lost - before.lost,
    )?;
    Ok(())
}

/// How a VM is to write.
#[derive(Clone, Debug)]
struct Order {
    time: Duration,
    /// Pages per second; as many as it can where not given.
    rate: Option<f64>,
    /// What takes the marks of all pages before each pass.
    harvested: Option<SharedCounters>,
}

/// A VM on a thread of its own, which it keeps: that is how the kernel knows a vCPU.
struct Writer {
    order: Sender<Order>,
    thread: JoinHandle<Result<u64>>,
}

impl Writer {
    /// Makes a VM whose pages are all mapped already and whose log is on.
    fn start() -> Result<Self> {
        let (order, orders) = channel::<Order>();
        let (ready, is_ready) = channel();
        let thread = std::thread::spawn(move || {
            let mut vm = TinyVm::new(PageCount(PAGES), DirtyLogKind::Bitmap).context("a VM of one vCPU")?;
            vm.write_pages(PageCount(PAGES))?;
            vm.set_logging(true)?;
            ready.send(())?;
            // No order: the measurement failed elsewhere.
            orders.recv().map_or(Ok(0), |order| write(&mut vm, &order))
        });
        match is_ready.recv() {
            Ok(()) => Ok(Self { order, thread }),
            Err(_) => Err(join(thread).err().unwrap_or_else(|| anyhow!("a VM's thread ended early"))),
        }
    }

    fn finish(self) -> Result<u64> {
        join(self.thread)
    }
}

fn join(thread: JoinHandle<Result<u64>>) -> Result<u64> {
    thread.join().map_err(|_| anyhow!("a VM's thread panicked"))?
}

fn attach(what: What, vms: u64) -> Result<Attached> {
    let attribute = match what {
        What::Nothing => return Ok(Attached::Nothing),
        What::Empty => {
            let program = syscall::load(ProgramKind::RawTracepoint).context("a BPF program")?;
            let link = syscall::attach(&program, Some(&std::ffi::CString::new(EVENT)?)).context(EVENT)?;
            return Ok(Attached::Empty { program, _link: link });
        }
        What::Counting | What::FirstWrites => false,
        What::Attributing | What::SingleWrites => true,
    };
    let pid = std::process::id();
    let frames = PageCount(2 * PAGES);
    let wanted = vec![Gives::Pages, Gives::RingPages, Gives::HardwareLog, Gives::VmmExits, Gives::GuestExits];
    let single_writes = (what == What::SingleWrites).then_some(SINGLE_WRITES_BYTES);
    let options = LoadOptions { only: Some(pid), capacity: frames, wanted, attribute, single_writes, log: false };
    let probes: SharedProbes = Arc::new(Mutex::new(Probes::load(&options)?));
    let mut counters = KernelCounters::track(&probes, pid, frames)?;
    if attribute {
        let mut probes = lock(&probes);
        let found = probes.inventory(&[own_descriptors()?])?.remove(0)?;
        ensure!(found.len() as u64 == vms, "{} VMs of {vms} were found in the kernel's structures", found.len());
        probes.set_vcpus(&found)?;
    }
    let in_window = what != What::Counting;
    counters.armed(in_window);
    Ok(Attached::Ours { counters: Arc::new(Mutex::new(counters)), in_window })
}

/// This process's KVM descriptors, as `/proc` shows them.
fn own_descriptors() -> Result<KvmDescriptors> {
    let mut descriptors = KvmDescriptors { pid: std::process::id(), machines: Vec::new(), vcpus: Vec::new() };
    for entry in std::fs::read_dir("/proc/self/fd")?.flatten() {
        let Ok(target) = std::fs::read_link(entry.path()) else { continue };
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok()).context("a descriptor's number")?;
        match target.to_str().unwrap_or_default() {
            name if name.starts_with("anon_inode:kvm-vm") => descriptors.machines.push(number),
            name if name.starts_with("anon_inode:kvm-vcpu") => descriptors.vcpus.push(number),
            _ => {}
        }
    }
    Ok(descriptors)
}

/// What has been counted so far.
#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    events: u64,
    lost: u64,
    of_events: RunStats,
    run_time_ns: u64,
}

fn totals(attached: &mut Attached) -> Result<Totals> {
    match attached {
        Attached::Nothing => Ok(Totals::default()),
        Attached::Empty { program, .. } => {
            let stats = syscall::run_stats(&*program)?;
            Ok(Totals { events: stats.run_count, lost: 0, of_events: stats, run_time_ns: stats.run_time_ns })
        }
        Attached::Ours { counters, .. } => {
            let mut counters = lock(counters);
            let mut pages = counters.empty_pages();
            let sample = counters.sample(&mut pages)?;
            let mut totals = Totals { lost: sample.lost.total() + sample.lost.writes_full, ..Totals::default() };
            totals.events = sample.threads.values().map(|thread| thread.pages_made_writable).sum();
            for cost in counters.probes().costs() {
                totals.run_time_ns += cost.stats.run_time_ns;
                if cost.hook.gives == Gives::Pages {
                    totals.of_events.run_time_ns += cost.stats.run_time_ns;
                    totals.of_events.run_count += cost.stats.run_count;
                }
            }
            Ok(totals)
        }
    }
}

/// Writes pages, protected anew each time. Returns how many.
fn write(vm: &mut TinyVm, order: &Order) -> Result<u64> {
    // A paced VM writes in many small passes, so that a pass is no burst.
    let pages = order.rate.map_or(PAGES, |rate| ((rate / 200.0) as u64).clamp(1, PAGES));
    let began = Instant::now();
    let mut written = 0;
    while began.elapsed() < order.time {
        if let Some(counters) = &order.harvested {
            lock(counters).count_pages();
        }
        vm.fetch_log()?;
        vm.write_pages(PageCount(pages))?;
        written += pages;
        if let Some(rate) = order.rate {
            let due = Duration::from_secs_f64(written as f64 / rate);
            std::thread::sleep(due.saturating_sub(began.elapsed()));
        }
    }
    Ok(written)
}
