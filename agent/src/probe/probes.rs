//! The BPF programs of one process of ours, and their maps: loaded once, attached as far as asked for, shared by all VMs that are
//! watched.
//!
//! Owns loading, attaching, who is tracked and in which window. Must not know what a rate means. Dropping it detaches everything.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use aya::maps::{HashMap, Map, MapData, MapError};
use aya::programs::raw_trace_point::RawTracePointLinkId;
use aya::programs::{KProbe, ProgramError, RawTracePoint, kprobe::KProbeLinkId};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use dunlin_ebpf::{
    Armed, CodeKey, ExitKey, ExitKind, ExitTimes as RawTimes, FIRST_WRITE_BINS, Loss, MAX_CODE, MAX_EXITS, MAX_SPACES,
    MAX_THREADS, MAX_TRACKED, Setting, SpaceCounters, SpaceKey, TrackedVm, attribute, constant, map, program,
};

use super::hook::{Attach, Faster, Gives, HOOKS, Hook};
use super::inventory::{self, InventoryError, Tasks};
use super::kernel_memory::KernelMemory;
use super::layout::{Backend, KernelLayout};
use super::log::ProbeLog;
use super::mapped::MappedArray;
use super::object::{NoObject, embedded_object};
use super::runs::settle;
use super::syscall::{self, RunStats};
use super::threads::ThreadRecords;
use super::windows::Windows;
use super::writes::{Writes, ring_bytes};
use super::{entry, exit_reason};
use crate::model::{AddressSpace, ExitTimes, GuestWrite, Gva, KernelVm, KvmDescriptors, PageBitmap, PageCount};
use crate::port::{EventHook, EventSample, EventSourceError, LostEvents, SpaceEvents, ThreadEvents};

/// The widest guest physical address space that is tracked: 16 TiB, a bitmap of 512 MiB.
pub(super) const MAX_FRAMES: u64 = 1 << 32;

/// What to load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// The only process that will ever be tracked, if that is known: the others' events cost least then.
    pub only: Option<u32>,
    /// Guest frames that can be told apart, of all VMs together.
    pub capacity: PageCount,
    /// What is wanted. Nothing else is attached, so nothing else costs anything.
    pub wanted: Vec<Gives>,
    /// Whether writes are attributed to address spaces and instructions from the start.
    pub attribute: bool,
    /// The size in bytes of the buffer in which each write is told by itself too; none: it is not.
    pub single_writes: Option<u32>,
    /// Whether the programs' own diagnostics are printed.
    pub log: bool,
}

/// Which ways of attaching are tried.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tiers {
    /// These are not.
    pub without: Vec<Attach>,
    /// Programs that tell nothing more than others do on this processor are attached too.
    pub useless_too: bool,
}

/// How a program is attached at present.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    /// Which.
    pub hook: &'static Hook,
    /// How.
    pub attach: Attach,
    /// Why not in the faster way, where there is one.
    pub slower_because: Option<String>,
}

/// Why there is nothing to count with.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// See [`NoObject`].
    #[error(transparent)]
    NoObject(#[from] NoObject),
    /// The policy forbids BPF to this process.
    #[error(
        "the kernel does not let this process use BPF: run as root, or give it CAP_BPF and CAP_PERFMON (`dunlin doctor` shows what is allowed)"
    )]
    Refused(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The kernel cannot load the object.
    #[error("the BPF object could not be loaded; `dunlin doctor` shows what this kernel lacks")]
    Load(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Nothing that brings what is wanted could be attached.
    #[error(
        "none of the tracepoints that are needed could be attached: {0}; `dunlin doctor` shows what this kernel lacks"
    )]
    NothingAttached(String),
    /// A map is not what this program wrote, or could not be mapped.
    #[error("BPF map {name}: {problem}")]
    Map {
        /// Its name.
        name: &'static str,
        /// What happened.
        problem: String,
    },
    /// There is no room for another VM.
    #[error("no room to track another VM: {0}")]
    Full(&'static str),
}

impl ProbeError {
    pub(super) fn map(name: &'static str, problem: impl ToString) -> Self {
        Self::Map { name, problem: problem.to_string() }
    }
}

/// A shared type as a map's key or value.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
struct Plain<T>(T);

macro_rules! plain {
    ($($shared:ty),*) => {$(
        // SAFETY: integers only, no padding (the shared crate's rule), any bits are valid.
        unsafe impl aya::Pod for Plain<$shared> {}
    )*};
}

plain!(ExitKey, RawTimes, SpaceKey, SpaceCounters, CodeKey, TrackedVm);

type SharedMap<K, V> = HashMap<MapData, Plain<K>, Plain<V>>;

/// How a program is attached at present.
#[derive(Debug)]
enum Link {
    Raw(RawTracePointLinkId),
    Probe(KProbeLinkId),
    /// Detached when dropped.
    Entry(OwnedFd),
}

impl Link {
    fn attach(&self) -> Attach {
        match self {
            Self::Raw(_) => Attach::RawTracepoint,
            Self::Probe(_) => Attach::KernelProbe,
            Self::Entry(_) => Attach::FunctionEntry,
        }
    }
}

/// One program's state.
#[derive(Debug)]
struct Attached {
    hook: &'static Hook,
    /// Whether it is to be attached at all.
    wanted: bool,
    /// While detached, the reason.
    link: Result<Link, String>,
    program: Option<OwnedFd>,
    /// Why it is not attached in the faster way.
    slower_because: Option<String>,
}

/// What one program has cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramCost {
    /// Which.
    pub hook: &'static Hook,
    /// Whether it is attached.
    pub attached: bool,
    /// Since its run time is counted.
    pub stats: RunStats,
}

/// One VM's place in the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) pid: u32,
    window: TrackedVm,
}

/// The two words of an [`Armed`] in its map.
const WORDS_OF_ARMED: usize = size_of::<Armed>() / size_of::<u64>();

/// The programs and their maps.
#[derive(Debug)]
pub struct Probes {
    attached: Vec<Attached>,
    threads: ThreadRecords,
    exits: SharedMap<ExitKey, RawTimes>,
    spaces: SharedMap<SpaceKey, SpaceCounters>,
    code: HashMap<MapData, Plain<CodeKey>, u64>,
    pages: MappedArray,
    armed: MappedArray,
    settings: MappedArray,
    losses: MappedArray,
    windows: Windows,
    slots: Vec<bool>,
    memory: Option<KernelMemory>,
    layout: KernelLayout,
    tiers: Tiers,
    /// The program at a function's entry, once it is loaded.
    entry: Option<OwnedFd>,
    log: Option<ProbeLog>,
    /// Where single writes are told, if they are.
    writes: Option<Writes>,
    /// Holds programs, links and the remaining maps.
    bpf: Ebpf,
}

impl Probes {
    /// Loads the object and attaches what is wanted.
    ///
    /// # Errors
    /// Each says whether the policy refuses or the kernel lacks something, and what to do. Whatever was attached by then is detached
    /// again.
    pub fn load(options: &LoadOptions) -> Result<Self, ProbeError> {
        Self::load_with(options, Tiers::default())
    }

    /// Likewise, in some ways only.
    ///
    /// # Errors
    /// As [`Probes::load`].
    pub fn load_with(options: &LoadOptions, tiers: Tiers) -> Result<Self, ProbeError> {
        let object = embedded_object()?;
        let words = options.capacity.0.clamp(64, MAX_FRAMES).div_ceil(64) as u32;
        let layout = KernelLayout::of_running_kernel();
        let log_level = if options.log { aya_log::Level::Debug as u8 } else { 0 };
        let only = options.only.unwrap_or(0);
        let offsets = layout.programs;
        let mut bpf = EbpfLoader::new()
            .verifier_log_level(VerifierLogLevel::STATS)
            .map_max_entries(map::PAGES, words)
            .map_max_entries(map::WRITES, ring_bytes(options.single_writes))
            .override_global(constant::ONLY_TGID, &only, true)
            .override_global(constant::PAGE_FAULT_GFN_OFFSET, &offsets.page_fault_gfn, true)
            .override_global(constant::VCPU_RIP_OFFSET, &offsets.vcpu_rip, true)
            .override_global(constant::VCPU_ROOT_OFFSET, &offsets.vcpu_root, true)
            .override_global(constant::VCPU_AREA_OFFSET, &offsets.vcpu_area, true)
            .override_global(constant::EXIT_REASON_OFFSET, &offsets.exit_reason, true)
            .override_global(aya_log::LEVEL, &log_level, true)
            .load(object)
            .map_err(classify)?;
        let log =
            if options.log { Some(ProbeLog::open(&mut bpf).map_err(|e| ProbeError::Load(Box::new(e)))?) } else { None };
        // The programs keep the map itself.
        let writes = match options.single_writes {
            Some(_) => Some(Writes::open(&mut bpf, ring_bytes(options.single_writes))?),
            None => None,
        };
        let mut probes = Self {
            threads: ThreadRecords::from(array(&bpf, map::THREADS, ThreadRecords::MAPPED_WORDS)?),
            exits: hash(&mut bpf, map::EXITS)?,
            spaces: hash(&mut bpf, map::SPACES)?,
            code: hash(&mut bpf, map::CODE)?,
            pages: array(&bpf, map::PAGES, words as usize)?,
            armed: array(&bpf, map::ARMED, MAX_TRACKED as usize * WORDS_OF_ARMED)?,
            settings: array(&bpf, map::SETTINGS, Setting::COUNT as usize)?,
            losses: array(&bpf, map::LOSSES, Loss::ALL.len())?,
            windows: Windows::new(words),
            slots: vec![false; MAX_TRACKED as usize],
            memory: None,
            attached: Vec::new(),
            layout,
            tiers,
            entry: None,
            log,
            writes,
            bpf,
        };
        probes.attribute(options.attribute);
        probes.memory = probes.kernel_memory();
        for hook in &HOOKS {
            let wanted = options.wanted.contains(&hook.gives) && probes.is_of_use(hook);
            let link = Err("not asked for".to_owned());
            probes.attached.push(Attached { hook, wanted, link, program: None, slower_because: None });
            if wanted {
                probes.attach(probes.attached.len() - 1);
            }
        }
        probes.check_attached(&options.wanted)?;
        Ok(probes)
    }

    /// Whether a program would tell anything that no other does, on this processor.
    fn is_of_use(&self, hook: &Hook) -> bool {
        hook.gives != Gives::HardwareLog || self.tiers.useless_too || self.logs_by_hardware()
    }

    fn logs_by_hardware(&self) -> bool {
        self.layout.backend == Backend::Vmx
            && std::fs::read_to_string("/sys/module/kvm_intel/parameters/pml").is_ok_and(|pml| pml.starts_with('Y'))
    }

    /// What is wanted above all must be there: pages, or exits where only those are asked for.
    fn check_attached(&self, wanted: &[Gives]) -> Result<(), ProbeError> {
        let needed = if wanted.contains(&Gives::Pages) { Gives::Pages } else { Gives::VmmExits };
        if !wanted.contains(&needed) || self.attached.iter().any(|a| a.hook.gives == needed && a.link.is_ok()) {
            return Ok(());
        }
        let reasons = self.attached.iter().filter(|a| a.hook.gives == needed);
        let reasons: Vec<String> =
            reasons.filter_map(|a| Some(format!("{}: {}", a.hook.place, a.link.as_ref().err()?))).collect();
        Err(ProbeError::NothingAttached(reasons.join("; ")))
    }

    /// What was asked for, and whether it is attached.
    pub fn hooks(&self) -> Vec<EventHook> {
        let hooks = self.attached.iter().filter(|attached| attached.wanted).map(|attached| EventHook {
            name: attached.hook.place.to_owned(),
            gives: attached.hook.what.to_owned(),
            missing: attached.link.as_ref().err().cloned(),
        });
        hooks.collect()
    }

    /// How each program that is attached is.
    pub fn ways(&self) -> Vec<Way> {
        let ways = self.attached.iter().filter_map(|attached| {
            let attach = attached.link.as_ref().ok()?.attach();
            Some(Way { hook: attached.hook, attach, slower_because: attached.slower_because.clone() })
        });
        ways.collect()
    }

    /// Whether anything that gives this is attached.
    ///
    /// # Errors
    /// Why nothing is.
    pub fn is_attached(&self, gives: Gives) -> Result<(), String> {
        let mut reasons = Vec::new();
        for attached in self.attached.iter().filter(|attached| attached.hook.gives == gives) {
            match &attached.link {
                Ok(_) => return Ok(()),
                Err(reason) if self.is_of_use(attached.hook) => {
                    reasons.push(format!("{}: {reason}", attached.hook.place));
                }
                Err(_) => reasons.push(format!("{}: tells nothing more on this processor", attached.hook.place)),
            }
        }
        Err(reasons.join("; "))
    }

    /// The processor's kind of virtualisation.
    pub fn backend(&self) -> Backend {
        self.layout.backend
    }

    /// What each program has cost since the kernel counts run times (see [`syscall::count_runs`]).
    pub fn costs(&self) -> Vec<ProgramCost> {
        let costs = self.attached.iter().map(|attached| ProgramCost {
            hook: attached.hook,
            attached: attached.link.is_ok(),
            stats: attached.program.as_ref().and_then(|fd| syscall::run_stats(fd).ok()).unwrap_or_default(),
        });
        costs.collect()
    }

    /// Detaches every program that gives this; `reason` is what is said of it from now on.
    pub fn shed(&mut self, gives: Gives, reason: &str) {
        let Self { attached, bpf, .. } = self;
        for attached in attached.iter_mut().filter(|a| a.hook.gives == gives) {
            let Ok(link) = std::mem::replace(&mut attached.link, Err(reason.to_owned())) else { continue };
            let Some(program) = bpf.program_mut(attached.hook.program) else { continue };
            // Fails only for a link that is none any more: then it is detached.
            let _ = match link {
                Link::Raw(id) => <&mut RawTracePoint>::try_from(program).map(|p| p.detach(id)).map(drop),
                Link::Probe(id) => <&mut KProbe>::try_from(program).map(|p| p.detach(id)).map(drop),
                Link::Entry(link) => {
                    drop(link);
                    Ok(())
                }
            };
        }
    }

    /// Attaches them again.
    pub fn restore(&mut self, gives: Gives) {
        for index in 0..self.attached.len() {
            let hook = self.attached[index].hook;
            if hook.gives == gives && self.attached[index].wanted && self.attached[index].link.is_err() {
                self.attach(index);
            }
        }
    }

    /// Whether writes are attributed to guest address spaces and instructions from now on.
    pub fn attribute(&mut self, on: bool) {
        let logged = if self.logs_by_hardware() { attribute::LOGGED_PAGES } else { 0 };
        let attributed = if on { attribute::SPACES | attribute::CODE } else { 0 };
        let single = if self.writes.is_some() { attribute::SINGLE_WRITES } else { 0 };
        self.settings.words()[Setting::Attribute as usize].store(attributed | logged | single, Ordering::Relaxed);
    }

    /// Moves the single writes of a process since they were last taken into `into`, if they were asked for.
    pub(super) fn take_writes(&mut self, place: &Place, into: &mut Vec<GuestWrite>) {
        if let Some(writes) = &mut self.writes {
            writes.take(place.pid, into);
        }
    }

    /// The VMs of some processes as the kernel has them; one answer a process, in order.
    ///
    /// # Errors
    /// The kernel's structures are not known, or cannot be read at all; a single process's trouble is in its own answer.
    pub fn inventory(
        &mut self,
        processes: &[KvmDescriptors],
    ) -> Result<Vec<Result<Vec<KernelVm>, InventoryError>>, InventoryError> {
        let at = self.layout.walk.as_ref().map_err(|why| InventoryError::NoLayout(why.clone()))?;
        let no_memory = || InventoryError::NoLayout("the program that reads kernel memory was not loaded".to_owned());
        let memory = self.memory.as_mut().ok_or_else(no_memory)?;
        let tasks = Tasks::walk(memory, at)?;
        Ok(processes.iter().map(|process| inventory::vms_of(memory, at, &tasks, process)).collect())
    }

    /// Tells the programs which vCPU each thread runs, so that writes can be attributed where no event says it.
    ///
    /// # Errors
    /// The map is full.
    pub fn set_vcpus(&mut self, vms: &[KernelVm]) -> Result<(), ProbeError> {
        let mut vcpus: HashMap<_, u32, u64> = self.map_mut(map::VCPUS)?;
        for (facts, address) in vms.iter().flat_map(|vm| &vm.vcpus) {
            if let Some(thread) = facts.thread_id {
                vcpus.insert(thread, *address, 0).map_err(|e| ProbeError::map(map::VCPUS, e))?;
            }
        }
        self.settings.words()[Setting::Vcpus as usize].fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Forgets threads that run no vCPU of these VMs any more, and tells of those that do, as [`Probes::set_vcpus`].
    ///
    /// # Errors
    /// The map is full.
    pub fn replace_vcpus(&mut self, vms: &[KernelVm]) -> Result<(), ProbeError> {
        let threads: BTreeSet<u32> =
            vms.iter().flat_map(|vm| &vm.vcpus).filter_map(|(facts, _)| facts.thread_id).collect();
        let mut vcpus: HashMap<_, u32, u64> = self.map_mut(map::VCPUS)?;
        let gone: Vec<u32> =
            vcpus.keys().take(2 * MAX_THREADS as usize).flatten().filter(|thread| !threads.contains(thread)).collect();
        for thread in gone {
            let _ = vcpus.remove(&thread);
        }
        self.set_vcpus(vms)
    }

    /// Gives a process its window of `frames` guest frames.
    pub(super) fn track(&mut self, pid: u32, frames: PageCount) -> Result<Place, ProbeError> {
        let slot = self.slots.iter().position(|used| !used).ok_or(ProbeError::Full("1024 VMs are tracked"))?;
        let words = frames.0.clamp(64, MAX_FRAMES).div_ceil(64) as u32;
        let first_word =
            self.windows.take(words).ok_or(ProbeError::Full("the bitmap was made for less guest memory"))?;
        let window = TrackedVm { first_word, words, slot: slot as u32, reserved: 0 };
        let mut tracked: HashMap<_, u32, Plain<TrackedVm>> = self.map_mut(map::TRACKED)?;
        if let Err(error) = tracked.insert(pid, Plain(window), 0) {
            self.windows.give_back(first_word, words);
            return Err(ProbeError::map(map::TRACKED, error));
        }
        self.slots[slot] = true;
        self.tracked_changed();
        Ok(Place { pid, window })
    }

    /// Has threads look again for the window of their VM.
    fn tracked_changed(&self) {
        self.settings.words()[Setting::Tracked as usize].fetch_add(1, Ordering::Release);
    }

    /// Forgets a process and all that was counted of it.
    pub(super) fn untrack(&mut self, place: &Place) {
        let mut others = BTreeSet::new();
        if let Ok(mut tracked) = self.map_mut::<u32, Plain<TrackedVm>>(map::TRACKED) {
            // A process that has the number by now has a window of its own, and keeps it.
            if tracked.get(&place.pid, 0).is_ok_and(|Plain(window)| window == place.window) {
                let _ = tracked.remove(&place.pid);
            }
            others.extend(tracked.keys().take(2 * MAX_TRACKED as usize).flatten());
        }
        self.tracked_changed();
        // A thread that is in the middle of an event may make its entry anew; it is forgotten with the next VM.
        let pid = place.pid;
        self.threads.forget(|tgid| tgid == pid || !others.contains(&tgid));
        forget(&mut self.exits, MAX_EXITS, |Plain(key)| key.tgid == pid);
        forget(&mut self.spaces, MAX_SPACES, |Plain(key)| key.tgid == pid);
        forget(&mut self.code, MAX_CODE, |Plain(key)| key.tgid == pid);
        self.disarm(place);
        for word in self.words(place) {
            word.store(0, Ordering::Relaxed);
        }
        self.windows.give_back(place.window.first_word, place.window.words);
        self.slots[place.window.slot as usize] = false;
    }

    /// Says when the VM's window of write protection begins, by the monotonic clock, and which pages it protects.
    pub(super) fn arm(&self, place: &Place, armed: Armed) {
        let [began, subset] = self.armed(place);
        // A program that sees the new begin sees the new subset.
        began.store(0, Ordering::Release);
        subset.store(armed.subset.raw(), Ordering::Release);
        began.store(armed.began_ns, Ordering::Release);
    }

    /// Says that the VM has no such window any more.
    pub(super) fn disarm(&self, place: &Place) {
        self.armed(place)[0].store(0, Ordering::Release);
    }

    /// The two words of an [`Armed`].
    fn armed(&self, place: &Place) -> [&AtomicU64; WORDS_OF_ARMED] {
        let first = place.window.slot as usize * WORDS_OF_ARMED;
        [0, 1].map(|word| &self.armed.words()[first + word])
    }

    /// Moves the bits that the programs set into `into`.
    pub(super) fn take_pages(&self, place: &Place, into: &mut PageBitmap) {
        for (index, word) in self.words(place).iter().enumerate() {
            // A plain load first: almost all words are zero, and a read does not take the line from the vCPUs.
            if word.load(Ordering::Relaxed) != 0 {
                into.or_word(index, word.swap(0, Ordering::AcqRel));
            }
        }
    }

    fn words(&self, place: &Place) -> &[AtomicU64] {
        let first = place.window.first_word as usize;
        &self.pages.words()[first..first + place.window.words as usize]
    }

    /// Takes the bits that the programs set, and says how many there were.
    pub(super) fn count_pages(&self, place: &Place) -> PageCount {
        let taken = self.words(place).iter().map(|word| match word.load(Ordering::Relaxed) {
            0 => 0,
            _ => u64::from(word.swap(0, Ordering::AcqRel).count_ones()),
        });
        PageCount(taken.sum())
    }

    /// Reads the counters of all tracked processes in one go: threads and their exits, but not what is attributed to address spaces and
    /// code, which is much and told for one VM at a time ([`crate::port::EventSource::sample`]). A process that has done nothing has no entry.
    ///
    /// # Errors
    /// A map cannot be read.
    pub fn sweep_all(&mut self) -> Result<BTreeMap<u32, EventSample>, EventSourceError> {
        self.sweep(None)
    }

    /// Reads the counters of all tracked processes, or everything of one.
    ///
    /// # Errors
    /// A map cannot be read.
    pub(super) fn sweep(&mut self, only: Option<u32>) -> Result<BTreeMap<u32, EventSample>, EventSourceError> {
        if let Some(log) = &mut self.log {
            log.print();
        }
        let mut samples: BTreeMap<u32, EventSample> = BTreeMap::new();
        let lost = self.lost();
        if let Some(pid) = only {
            samples.entry(pid).or_default().lost = lost;
        }
        let mut thread = |tgid: u32, tid: u32, fill: &mut dyn FnMut(&mut ThreadEvents)| {
            if only.is_none_or(|pid| pid == tgid) {
                let sample = samples.entry(tgid).or_default();
                sample.lost = lost;
                fill(sample.threads.entry(tid).or_default());
            }
        };
        let mut records = Vec::new();
        for (place, key, counters) in self.threads.all() {
            if only == Some(key.tgid) {
                records.push((place, key, counters.space, counters.code));
            }
            thread(key.tgid, key.tid, &mut |events| {
                events.pages_made_writable = counters.pages_made_writable;
                events.huge_mappings = counters.huge_mappings;
                events.dirty_ring_pushes = counters.dirty_ring_pushes;
                events.pages_logged = counters.pages_logged;
                events.guest_exits = counters.guest_exits;
                events.first_writes = counters.first_writes[..FIRST_WRITE_BINS as usize].to_vec();
            });
        }
        let backend = self.layout.backend;
        each(&self.exits, MAX_EXITS, |Plain(key), Plain(times)| {
            thread(key.tgid, key.tid, &mut |events| {
                if key.kind == ExitKind::Guest as u32 {
                    events.guest_exit_reasons.insert(exit_reason::guest(backend, key.reason), times_of(&times));
                } else {
                    events.exits.insert(exit_reason::name(key.reason), times_of(&times));
                }
            });
        })?;
        if only.is_none() {
            return Ok(samples);
        }
        let mut space = |key: SpaceKey, counters: &SpaceCounters| {
            thread(key.tgid, key.tid, &mut |events| {
                let space = SpaceEvents {
                    pages_made_writable: counters.pages_made_writable,
                    first_writes: counters.first_writes[..FIRST_WRITE_BINS as usize].to_vec(),
                };
                events.spaces.insert(AddressSpace(key.root), space);
            });
        };
        each(&self.spaces, MAX_SPACES, |Plain(key), Plain(counters)| space(key, &counters))?;
        for &(place, key, run, _) in &records {
            let sum = |key| self.spaces.get(&Plain(key), 0).ok().map(|Plain(sum)| sum);
            for (key, sum) in settle(key, run, || self.threads.get(place, key).map(|thread| thread.space), sum) {
                space(key, &sum);
            }
        }
        let mut code = |key: CodeKey, pages: u64| {
            thread(key.tgid, key.tid, &mut |events| {
                events.code.insert((AddressSpace(key.root), Gva(key.instruction)), pages);
            });
        };
        each(&self.code, MAX_CODE, |Plain(key), pages| code(key, pages))?;
        for &(place, key, _, run) in &records {
            let sum = |key| self.code.get(&Plain(key), 0).ok();
            for (key, pages) in settle(key, run, || self.threads.get(place, key).map(|thread| thread.code), sum) {
                code(key, pages);
            }
        }
        Ok(samples)
    }

    /// Events of all VMs together that were not counted in full since the programs were loaded.
    pub fn lost(&self) -> LostEvents {
        let count = |loss: Loss| self.losses.words()[loss as usize].load(Ordering::Relaxed);
        LostEvents {
            out_of_range: count(Loss::OutOfRange),
            threads_full: count(Loss::ThreadsFull),
            exits_full: count(Loss::ExitsFull),
            too_large: count(Loss::TooLarge),
            unreadable: count(Loss::Unreadable),
            unattributed: count(Loss::Unattributed),
            writes_full: count(Loss::WritesFull),
        }
    }

    /// Loads the program that reads kernel memory; none where the kernel does not take it.
    fn kernel_memory(&mut self) -> Option<KernelMemory> {
        let peek: &mut RawTracePoint = self.bpf.program_mut(program::PEEK)?.try_into().ok()?;
        peek.load().ok()?;
        let fd = self.program_fd(program::PEEK)?;
        let peeked = array(&self.bpf, map::PEEKED, dunlin_ebpf::PEEK_BYTES as usize / 8).ok()?;
        Some(KernelMemory::new(fd, peeked))
    }

    fn program_fd(&self, name: &str) -> Option<OwnedFd> {
        let fd = self.bpf.program(name)?.fd().ok()?;
        std::os::fd::AsFd::as_fd(fd).try_clone_to_owned().ok()
    }

    /// Attaches one program, in the faster way if there is one and it is possible.
    fn attach(&mut self, index: usize) {
        let hook = self.attached[index].hook;
        let faster = hook.faster.map(|faster| self.attach_faster(faster));
        let (link, slower_because) = match faster {
            Some(Ok(link)) => (Ok(link), None),
            Some(Err(why)) => (self.attach_one(hook), Some(why)),
            None => (self.attach_one(hook), None),
        };
        let program = match &link {
            Ok(Link::Entry(_)) => self.entry.as_ref().and_then(|program| program.try_clone().ok()),
            _ => self.program_fd(hook.program),
        };
        let attached = &mut self.attached[index];
        (attached.link, attached.program, attached.slower_because) = (link, program, slower_because);
    }

    /// Loads and attaches a program at a function's entry; the reason where that cannot be.
    fn attach_faster(&mut self, faster: Faster) -> Result<Link, String> {
        if self.tiers.without.contains(&faster.attach) {
            return Err("left out, as asked for".to_owned());
        }
        let function = self.layout.page_logged.ok_or("this kernel's type information does not have the function")?;
        let attempt = |program: Option<OwnedFd>| -> io::Result<(OwnedFd, OwnedFd)> {
            let program = match program {
                Some(program) => program,
                None => {
                    let object = embedded_object().map_err(io::Error::other)?;
                    entry::load(object, faster.program, &self.bpf, function)?
                }
            };
            let link = syscall::attach(&program, None)?;
            Ok((program, link))
        };
        let (program, link) = attempt(self.entry.take()).map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM) => "refused by the policy of this host".to_owned(),
            _ => error.to_string(),
        })?;
        self.entry = Some(program);
        Ok(Link::Entry(link))
    }

    /// Loads and attaches one program; a failure is a fact about this host, not an error.
    fn attach_one(&mut self, hook: &Hook) -> Result<Link, String> {
        if self.tiers.without.contains(&hook.attach) {
            return Err("left out, as asked for".to_owned());
        }
        let mut attempt = || -> Result<Link, ProgramError> {
            let program = self.bpf.program_mut(hook.program).ok_or(ProgramError::NotLoaded)?;
            match hook.attach {
                Attach::RawTracepoint => {
                    let program: &mut RawTracePoint = program.try_into()?;
                    loaded(program.load())?;
                    program.attach(hook.place).map(Link::Raw)
                }
                Attach::KernelProbe => {
                    let program: &mut KProbe = program.try_into()?;
                    loaded(program.load())?;
                    program.attach(hook.place, 0).map(Link::Probe)
                }
                // Only ever the faster way.
                Attach::FunctionEntry => Err(ProgramError::NotLoaded),
            }
        };
        attempt().map_err(|error| match errno(&error) {
            Some(libc::ENOENT) => match hook.attach {
                Attach::RawTracepoint => "this kernel has no such tracepoint (is KVM loaded?)".to_owned(),
                Attach::KernelProbe | Attach::FunctionEntry => {
                    "this kernel has no probes of functions, or no such function".to_owned()
                }
            },
            Some(libc::EPERM | libc::EACCES) if !matches!(error, ProgramError::LoadError { .. }) => {
                "refused by the policy of this host".to_owned()
            }
            Some(libc::EPERM) => {
                "the kernel does not let this process load programs: run as root, or give it CAP_PERFMON beside CAP_BPF"
                    .to_owned()
            }
            _ => error.to_string(),
        })
    }

    /// A map that stays with `bpf`: programs that are loaded later refer to its descriptor.
    fn map_mut<K: aya::Pod, V: aya::Pod>(
        &mut self,
        name: &'static str,
    ) -> Result<HashMap<&mut MapData, K, V>, ProbeError> {
        let map = self.bpf.map_mut(name).ok_or_else(|| ProbeError::map(name, "is not in the object"))?;
        HashMap::try_from(map).map_err(|e| ProbeError::map(name, e))
    }
}

/// Loading again what is loaded is no failure.
fn loaded(result: Result<(), ProgramError>) -> Result<(), ProgramError> {
    match result {
        Err(ProgramError::AlreadyLoaded) => Ok(()),
        other => other,
    }
}

fn times_of(raw: &RawTimes) -> ExitTimes {
    ExitTimes { count: raw.count, total_ns: raw.total_ns, longest_ns: raw.longest_ns, bins: raw.bins }
}

/// Visits the entries of a map that the kernel bounds; a walk that a concurrent insert restarts is bounded here too. An entry that
/// goes meanwhile ends nothing.
fn each<K: aya::Pod, V: aya::Pod>(
    map: &HashMap<MapData, K, V>,
    most: u32,
    mut visit: impl FnMut(K, V),
) -> Result<(), EventSourceError> {
    for entry in map.iter().take(2 * most as usize) {
        match entry {
            Ok((key, value)) => visit(key, value),
            Err(MapError::KeyNotFound) => {}
            Err(error) => return Err(EventSourceError(error.to_string())),
        }
    }
    Ok(())
}

fn forget<K: aya::Pod, V: aya::Pod>(map: &mut HashMap<MapData, K, V>, most: u32, which: impl Fn(&K) -> bool) {
    let keys: Vec<K> = map.keys().take(2 * most as usize).flatten().filter(which).collect();
    for key in keys {
        // What is gone already is forgotten.
        let _ = map.remove(&key);
    }
}

/// The errno at the bottom of an error chain.
fn errno(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return io.raw_os_error();
        }
        next = error.source();
    }
    None
}

fn classify(error: aya::EbpfError) -> ProbeError {
    match errno(&error) {
        Some(libc::EPERM) => ProbeError::Refused(Box::new(error)),
        _ => ProbeError::Load(Box::new(error)),
    }
}

fn hash<K: aya::Pod, V: aya::Pod>(bpf: &mut Ebpf, name: &'static str) -> Result<HashMap<MapData, K, V>, ProbeError> {
    let map = bpf.take_map(name).ok_or_else(|| ProbeError::map(name, "is not in the object"))?;
    HashMap::try_from(map).map_err(|e| ProbeError::map(name, e))
}

/// Maps an array. The map stays with `bpf`, as in [`Probes::map_mut`].
fn array(bpf: &Ebpf, name: &'static str, words: usize) -> Result<MappedArray, ProbeError> {
    match bpf.map(name).ok_or_else(|| ProbeError::map(name, "is not in the object"))? {
        Map::Array(data) => MappedArray::of(data.fd(), words).map_err(|e| ProbeError::map(name, format!("mmap: {e}"))),
        other => Err(ProbeError::map(name, format!("is no array but {other:?}"))),
    }
}
