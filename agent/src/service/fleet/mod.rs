//! All KVM VMs of this host, watched together: what `dunlin agent` and `dunlin top` stand on.
//!
//! Owns one set of BPF programs for all VMs, and a thread that looks every interval: who has come and gone, how each VM wrote, what
//! watching cost. While there is no VM nothing is loaded. Changes nothing in a VM, but for windows of write protection on hosted ones when asked.

mod capabilities;
mod census;
mod cost;
mod names;
mod throttles;
mod tracked;
mod view;
mod windows;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use census::Census;
use cost::Costs;
use names::Names;
use throttles::Throttles;
use tracked::{Key, Tracked};
pub use view::{
    ArmedView, ExitRate, FleetVcpu, FleetView, FleetVm, HISTORY, PastRate, ProgramView, RogueProcess, ShedView,
    Watching,
};
#[cfg(test)]
pub(crate) use view::{address_sample, sample, throttle_sample};
use windows::{Job, Windows};

use super::addresses::Kept;
use super::arm::ControlSocketArm;
use super::interrupt::{Interrupt, Wake};
use super::inventory;
use super::profile::{Single, may_read};
use super::registry::Registry;
use super::rogues::{named, ranked};
use super::sources::{self, SourceState};
use crate::model::{AddressSpace, KernelVm, PageCount, VcpuFacts, Writer};
use crate::port::LostEvents;
use crate::probe::{Backend, LoadOptions, ProbeError, Probes, SharedProbes};
use crate::time::{thread_cpu_time, unix_ms};
use crate::track::{DEFAULT_BUDGET, DEFAULT_MARGIN, Terms, TermsError, forecast};

/// Intervals shorter than this watch mostly the fleet itself.
pub const SHORTEST_INTERVAL: Duration = Duration::from_millis(50);
/// The bitmap has room for this part of the host's RAM: guests are overcommitted a little, and have holes in their addresses.
const CAPACITY: f64 = 1.25;
/// And for VMs of which only rates are counted, one word each.
const CAPACITY_OF_RATES: u64 = dunlin_ebpf::MAX_TRACKED as u64 * 64;
/// After a failure, programs are loaded again in so many looks.
const LOAD_AGAIN_IN: u64 = 10;
/// Writers of one VM that are shown.
const MOST_WRITERS: usize = 64;

/// When windows of write protection open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArmPlan {
    /// How long each is.
    pub window: Duration,
    /// How far apart two of one VM begin, at least. There is never more than one open, and not more than one begins in an interval of the
    /// fleet, so that with many VMs they are farther apart.
    pub every: Duration,
}

impl Default for ArmPlan {
    fn default() -> Self {
        Self { window: Duration::from_millis(320), every: Duration::from_secs(16) }
    }
}

/// What to watch and how.
#[derive(Clone, Debug)]
pub struct FleetOptions {
    /// Where hosted VMs are listed.
    pub run_dir: PathBuf,
    /// The time between two looks, at least [`SHORTEST_INTERVAL`].
    pub interval: Duration,
    /// Windows of write protection on hosted VMs; none: nothing is changed in any VM.
    pub arm: Option<ArmPlan>,
    /// The link that VMs would be moved over, for forecasts and rogues; none: curves alone.
    pub terms: Option<Terms>,
    /// The part of one core that all BPF programs may take.
    pub budget: f64,
    /// VMs of other VMMs whose memory may be read, as in `[track]` of the configuration.
    pub read_memory: Vec<String>,
    /// Whether VMs of this very process are watched too.
    pub watch_self: bool,
    /// Whether who has which addresses is kept, in the run folder.
    pub keep_addresses: bool,
}

impl FleetOptions {
    /// Passive watching of the VMs listed in `run_dir` and all foreign ones, once a second.
    pub fn new(run_dir: impl Into<PathBuf>) -> Self {
        Self {
            run_dir: run_dir.into(),
            interval: Duration::from_secs(1),
            arm: None,
            terms: None,
            budget: DEFAULT_BUDGET,
            read_memory: Vec::new(),
            watch_self: false,
            keep_addresses: false,
        }
    }
}

/// Why no fleet can be watched.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// This process may not.
    #[error("this process lacks {}: run as root, or grant {} (`setpriv`, or AmbientCapabilities= of the service)", .0.join(" and "), if .0.len() == 1 { "it" } else { "them" })]
    Capability(Vec<&'static str>),
    /// The programs cannot be loaded.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// No VM could be moved so.
    #[error(transparent)]
    Terms(#[from] TermsError),
    /// A thread could not be started.
    #[error("the fleet's thread could not be started")]
    Thread(#[from] io::Error),
}

/// The views, shared with the thread that makes them.
#[derive(Debug)]
struct Shared {
    view: Mutex<Arc<FleetView>>,
    news: Condvar,
}

/// The fleet under watch. Dropping it ends watching and detaches all programs.
#[derive(Debug)]
pub struct Fleet {
    shared: Arc<Shared>,
    wake: Option<Wake>,
    thread: Option<JoinHandle<()>>,
}

/// Reads the views of a fleet; outlives it.
#[derive(Clone, Debug)]
pub struct FleetReader(Arc<Shared>);

impl FleetReader {
    /// The newest view. Its `sequence` is 0 before the first look.
    pub fn view(&self) -> Arc<FleetView> {
        Arc::clone(&self.lock())
    }

    /// Waits for a view newer than that with `sequence`, `patience` at most; then the newest there is.
    pub fn next(&self, sequence: u64, patience: Duration) -> Arc<FleetView> {
        let guard = self.lock();
        let waited = self.0.news.wait_timeout_while(guard, patience, |view| view.sequence <= sequence);
        let (guard, _) = waited.unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&guard)
    }

    fn lock(&self) -> MutexGuard<'_, Arc<FleetView>> {
        self.0.view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Fleet {
    /// Starts watching. Loads the programs once to see that this host takes them; they go again until there is a VM.
    ///
    /// # Errors
    /// Rights that are missing, by name; a kernel that takes no programs; terms under which nothing could be moved.
    pub fn start(options: FleetOptions) -> Result<Self, FleetError> {
        let options = FleetOptions { interval: options.interval.max(SHORTEST_INTERVAL), ..options };
        if let Some(terms) = &options.terms {
            terms.memory_time()?;
        }
        let missing = capabilities::missing();
        if !missing.is_empty() {
            return Err(FleetError::Capability(missing));
        }
        capabilities::warn();
        drop(Probes::load(&LoadOptions { wanted: Vec::new(), ..load_options() })?);
        let mut core = Core::new(options)?;
        let interval = core.options.interval;
        let first = FleetView::before_the_first(interval.as_nanos() as u64, core.watching(LostEvents::default(), 0.0));
        let shared = Arc::new(Shared { view: Mutex::new(Arc::new(first)), news: Condvar::new() });
        let (interrupt, wake) = Interrupt::by_hand()?;
        let publish = FleetReader(Arc::clone(&shared));
        let thread = std::thread::Builder::new().name("fleet".into()).spawn(move || {
            let mut deadline = Instant::now();
            loop {
                let view = Arc::new(core.look());
                *publish.lock() = view;
                publish.0.news.notify_all();
                // Not behind time that a slow look took; and some of the time is always left to others.
                deadline = (deadline + interval).max(Instant::now() + interval / 4);
                if interrupt.wait_until(deadline) {
                    return;
                }
            }
        })?;
        Ok(Self { shared, wake: Some(wake), thread: Some(thread) })
    }

    /// Reads the views.
    pub fn reader(&self) -> FleetReader {
        FleetReader(Arc::clone(&self.shared))
    }

    /// The newest view. Its `sequence` is 0 before the first look.
    pub fn view(&self) -> Arc<FleetView> {
        self.reader().view()
    }

    /// Waits for a view newer than that with `sequence`, `patience` at most; then the newest there is.
    pub fn next(&self, sequence: u64, patience: Duration) -> Arc<FleetView> {
        self.reader().next(sequence, patience)
    }

    /// Whether it still watches: its thread may have failed.
    pub fn is_alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Ends watching: closes an open window and detaches all programs before it returns.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.wake = None;
        if let Some(thread) = self.thread.take() {
            // It has already said why, if it panicked.
            let _ = thread.join();
        }
    }
}

/// What the programs are loaded with: a bitmap for 1.25 times the host's RAM.
fn load_options() -> LoadOptions {
    let info = rustix::system::sysinfo();
    let ram_bytes = (info.totalram as u64).saturating_mul(u64::from(info.mem_unit));
    let frames = PageCount::covering((ram_bytes as f64 * CAPACITY) as u64).0;
    LoadOptions {
        only: None,
        capacity: PageCount(frames + CAPACITY_OF_RATES),
        wanted: sources::wanted(),
        attribute: false,
        single_writes: None,
        log: false,
    }
}

/// The programs while there is a VM.
struct Loaded {
    probes: SharedProbes,
    costs: Costs,
    lost: LostEvents,
    vcpus: Vec<(VcpuFacts, u64)>,
}

/// What the thread owns.
struct Core {
    options: FleetOptions,
    census: Census,
    loaded: Option<Loaded>,
    /// Why nothing is loaded, and since which look.
    problem: Option<(String, u64)>,
    vms: BTreeMap<Key, Tracked>,
    windows: Option<Windows>,
    names: Option<Names>,
    throttles: Throttles,
    tried: Vec<SourceState>,
    addresses: Option<Kept>,
    backend: &'static str,
    sequence: u64,
    lost_before: LostEvents,
    own: (Instant, Duration),
}

impl Core {
    fn new(options: FleetOptions) -> Result<Self, FleetError> {
        // Who wrote shows in windows alone.
        let (windows, names) = match options.arm {
            Some(_) => (Some(Windows::start()?), Some(Names::start()?)),
            None => (None, None),
        };
        let addresses = options.keep_addresses.then(|| Kept::start(&options.run_dir)).transpose()?;
        Ok(Self {
            addresses,
            options,
            census: Census::default(),
            loaded: None,
            problem: None,
            vms: BTreeMap::new(),
            windows,
            names,
            throttles: Throttles::start()?,
            tried: sources::try_others(),
            backend: match Backend::of_this_host() {
                Backend::Svm => "svm",
                Backend::Vmx => "vmx",
                Backend::Other => "other",
            },
            sequence: 0,
            lost_before: LostEvents::default(),
            own: (Instant::now(), thread_cpu_time()),
        })
    }

    /// One look at everything.
    fn look(&mut self) -> FleetView {
        self.sequence += 1;
        let me = (!self.options.watch_self).then(std::process::id);
        let processes = self.census.look(me);
        self.load_or_unload(!processes.is_empty());
        let found = {
            let mut locked = self.loaded.as_ref().map(|loaded| lock(&loaded.probes));
            inventory::of_processes(processes, &self.options.run_dir, locked.as_deref_mut())
        };
        let addresses = self.addresses.as_ref().and_then(|kept| kept.look(&found));
        self.come_and_go(found);
        self.look_at_throttles();
        let window = self.close_window();
        self.take_names();
        let lost = self.measure(window);
        self.open_window();
        let now = Instant::now();
        let (own, wall) = (thread_cpu_time(), now.saturating_duration_since(self.own.0));
        let share = own.saturating_sub(self.own.1).as_secs_f64() / wall.as_secs_f64().max(f64::MIN_POSITIVE);
        self.own = (now, own);
        let mut vms: Vec<FleetVm> = self.vms.values().map(Tracked::view).collect();
        vms.sort_by(|a, b| a.name.cmp(&b.name).then(a.pid.cmp(&b.pid)));
        FleetView {
            sequence: self.sequence,
            unix_ms: unix_ms(),
            interval_ns: self.options.interval.as_nanos() as u64,
            vms,
            watching: self.watching(lost, share),
            addresses,
        }
    }

    /// The programs are loaded when the first VM is there, and go with the last.
    fn load_or_unload(&mut self, needed: bool) {
        if !needed {
            if self.loaded.is_some() {
                self.vms.clear();
                if let Some(loaded) = self.loaded.take() {
                    self.lost_before = self.lost_before.plus(&loaded.lost);
                }
            }
            self.problem = None;
            return;
        }
        let wait = self.problem.as_ref().is_some_and(|(_, since)| self.sequence < since + LOAD_AGAIN_IN);
        if self.loaded.is_some() || wait {
            return;
        }
        match Probes::load(&load_options()) {
            Ok(probes) => {
                let costs = Costs::begin(self.options.budget, &probes);
                self.loaded = Some(Loaded {
                    probes: Arc::new(Mutex::new(probes)),
                    costs,
                    lost: LostEvents::default(),
                    vcpus: Vec::new(),
                });
                self.problem = None;
                // Those that were there without counters begin anew.
                self.vms.clear();
            }
            Err(error) => {
                tracing::error!("{error}");
                self.problem = Some((error.to_string(), self.sequence));
            }
        }
    }

    /// Ended VMs leave first: a process of the same number may have come.
    fn come_and_go(&mut self, found: Vec<inventory::HostVm>) {
        let mut found: BTreeMap<Key, inventory::HostVm> =
            found.into_iter().map(|vm| ((vm.pid, vm.start_time_ticks), vm)).collect();
        self.vms.retain(|key, tracked| match found.remove(key) {
            Some(vm) => {
                tracked.vm = vm;
                true
            }
            None => false,
        });
        for (key, vm) in found {
            let probes = self.loaded.as_ref().map(|loaded| &loaded.probes);
            self.vms.insert(key, Tracked::begin(vm, probes));
        }
        if let Some(loaded) = &mut self.loaded {
            let kernel: Vec<&KernelVm> = self.vms.values().filter_map(|vm| vm.vm.kernel.as_ref()).collect();
            let vcpus: Vec<_> = kernel.iter().flat_map(|vm| vm.vcpus.iter().cloned()).collect();
            if vcpus != loaded.vcpus {
                let all: Vec<KernelVm> = kernel.into_iter().cloned().collect();
                if let Err(error) = lock(&loaded.probes).replace_vcpus(&all) {
                    tracing::warn!("writes of some vCPUs will be nobody's: {error}");
                }
                loaded.vcpus = vcpus;
            }
        }
    }

    /// Shows what hosted VMs have said of their throttles since the last look, and asks them anew.
    fn look_at_throttles(&mut self) {
        for (key, view) in self.throttles.answered().into_iter().flatten() {
            if let Some(vm) = self.vms.get_mut(&key) {
                vm.throttle = view;
            }
        }
        let registry = Registry::new(&self.options.run_dir);
        let socket =
            |(key, vm): (&Key, &Tracked)| Some((*key, registry.socket(&vm.vm.entry.as_ref()?.name, "observe")));
        self.throttles.ask(self.vms.iter().filter_map(socket).collect());
    }

    /// Ends the interval: one sweep of the maps for all VMs, then the budget. Returns what was lost in it.
    fn measure(&mut self, window: bool) -> LostEvents {
        let Some(loaded) = &mut self.loaded else { return LostEvents::default() };
        let swept = lock(&loaded.probes).sweep_all();
        let now = Instant::now();
        match swept {
            Ok(mut samples) => {
                for vm in self.vms.values_mut() {
                    vm.measure(now, samples.remove(&vm.vm.pid).unwrap_or_default());
                }
            }
            Err(error) => tracing::warn!("{error}"),
        }
        let apart = self.options.arm.filter(|_| window).map(|plan| plan.every);
        let mut probes = lock(&loaded.probes);
        loaded.costs.after_interval(&mut probes, apart);
        let lost = probes.lost();
        lost.since(&std::mem::replace(&mut loaded.lost, lost))
    }

    /// Takes what a window showed, if one has closed. Whether one was open since the last look.
    fn close_window(&mut self) -> bool {
        let Some(windows) = &mut self.windows else { return false };
        let was_open = windows.is_open();
        if let Some((key, outcome)) = windows.closed()
            && let Some(vm) = self.vms.get_mut(&key)
        {
            vm.window_open = false;
            vm.window_closed = true;
            match outcome {
                Ok(single) => {
                    if let Some(names) = &self.names {
                        let may_read = may_read(&self.options.read_memory, &vm.vm);
                        names.ask(key, &vm.vm, may_read, &mut vm.names, &spaces(&single));
                    }
                    show(vm, single, self.options.terms.as_ref());
                }
                Err(problem) => {
                    // What was counted meanwhile belongs to no interval.
                    vm.before = None;
                    vm.armed_problem = Some(problem);
                }
            }
        }
        was_open
    }

    /// Shows names that have been found meanwhile. Those of a VM that has ended are nobody's.
    fn take_names(&mut self) {
        while let Some((key, found)) = self.names.as_ref().and_then(Names::answered) {
            if let Some(vm) = self.vms.get_mut(&key) {
                vm.names.take(found);
                vm.show_names();
            }
        }
    }

    /// Opens a window on the hosted VM that has waited longest, if it has waited long enough.
    fn open_window(&mut self) {
        let (Some(windows), Some(plan), Some(loaded)) = (&mut self.windows, self.options.arm, &mut self.loaded) else {
            return;
        };
        if windows.is_open() {
            return;
        }
        let now = Instant::now();
        let due = |vm: &Tracked| {
            vm.last_window.is_none_or(|last| now.saturating_duration_since(last) >= plan.every)
                && vm.rests_until.is_none_or(|until| now >= until)
        };
        let hosted = self.vms.iter_mut().filter(|(_, vm)| vm.vm.entry.is_some() && vm.before.is_some() && due(vm));
        let Some((&key, vm)) = hosted.min_by_key(|(_, vm)| vm.last_window) else { return };
        let (Some(counters), Some(entry)) = (&vm.counters, &vm.vm.entry) else { return };
        vm.last_window = Some(now);
        let (open, attribute) = loaded.costs.window();
        if !open {
            return;
        }
        vm.window_open = true;
        let socket = Registry::new(&self.options.run_dir).socket(&entry.name, "control");
        windows.open(Job {
            key,
            vm: vm.vm.clone(),
            counters: Arc::clone(counters),
            arm: Box::new(ControlSocketArm::new(socket)),
            attribute,
            window: plan.window,
        });
    }

    fn watching(&mut self, lost: LostEvents, own_share_of_core: f64) -> Watching {
        let loaded = self.loaded.as_ref();
        let locked = loaded.map(|loaded| lock(&loaded.probes));
        let missing = locked.as_ref().map(|probes| super::observe::missing_sources(&probes.hooks()));
        let total = loaded.map_or(self.lost_before, |loaded| self.lost_before.plus(&loaded.lost));
        let shown = loaded.map(|loaded| loaded.costs.shown.clone()).unwrap_or_default();
        Watching {
            loaded: loaded.is_some(),
            problem: self.problem.as_ref().map(|(problem, _)| problem.clone()),
            backend: self.backend,
            budget_share_of_core: self.options.budget,
            used_share_of_core: shown.used_share_of_core,
            cost_unknown: loaded.and_then(|loaded| loaded.costs.unknown().cloned()),
            above_budget: shown.above_budget,
            programs: shown.programs,
            shed: loaded.map(|loaded| loaded.costs.shed()).unwrap_or_default(),
            lost_events: lost.into(),
            lost_events_total: total.into(),
            missing_sources: missing.unwrap_or_default(),
            sources: sources::states(locked.as_deref(), &self.tried),
            own_share_of_core,
            armed_every_ns: self.options.arm.map(|plan| plan.every.as_nanos() as u64),
        }
    }
}

/// The address spaces that wrote in a window, those that wrote most first, each once.
fn spaces(single: &Single) -> Vec<AddressSpace> {
    let mut spaces = Vec::new();
    for part in &single.writers {
        if let Writer::AddressSpace { address_space, .. } = part.writer
            && !spaces.contains(&address_space)
        {
            spaces.push(address_space);
        }
    }
    spaces
}

/// Shows what a window of a VM showed; the VM's next interval begins behind it.
fn show(vm: &mut Tracked, single: Single, terms: Option<&Terms>) {
    vm.windows += 1;
    vm.armed_problem = None;
    vm.rests_until = Instant::now().checked_add(single.rest);
    let memory = PageCount::covering(vm.vm.memory_bytes.unwrap_or(0));
    let ranking = terms.and_then(|terms| ranked(&single.curve, &single.writers, terms, DEFAULT_MARGIN).ok());
    let ranking = ranking.map(|mut ranking| {
        vm.watch.observe(&ranking, &BTreeMap::new());
        ranking.writers.truncate(MOST_WRITERS);
        ranking
    });
    let seconds = single.length.as_secs_f64().max(f64::MIN_POSITIVE);
    vm.armed = Some(ArmedView {
        unix_ms: unix_ms(),
        window_ns: single.length.as_nanos() as u64,
        unique_pages: single.unique_pages,
        unique_bytes_per_second: PageCount(single.unique_pages).bytes() as f64 / seconds,
        forecast: terms.and_then(|terms| forecast(&single.curve, memory, terms).ok()),
        rogues: ranking.as_ref().map(|ranking| named(&vm.watch, ranking)).unwrap_or_default(),
        ranking,
        curve: single.curve,
        windows: vm.windows,
        names_missing: None,
        rogue_processes: Vec::new(),
    });
    vm.show_names();
    vm.before = Some(single.after);
}

/// A panic of another user leaves the maps as they are, and they are the kernel's.
fn lock(probes: &SharedProbes) -> MutexGuard<'_, Probes> {
    probes.lock().unwrap_or_else(PoisonError::into_inner)
}
