//! The counters of one VM: loads the object, attaches what can be attached, reads the maps.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::Ordering;

use aya::maps::{HashMap, Map, MapData};
use aya::programs::{ProgramError, RawTracePoint};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use dunlin_ebpf::{
    ExitKey, Loss, MAX_EXITS, MAX_THREADS, OFFSET_UNKNOWN, ThreadCounters, ThreadKey, TrackedVm, constant, map,
};

use super::exit_reason;
use super::hook::{HOOKS, Hook};
use super::log::ProbeLog;
use super::mapped::MappedArray;
use super::object::{NoObject, embedded_object};
use crate::btf::KernelTypes;
use crate::model::{PageBitmap, PageCount};
use crate::port::{EventHook, EventSample, EventSource, EventSourceError, LostEvents, ThreadEvents};

/// The widest guest physical address space that is tracked: 16 TiB, a bitmap of 512 MiB.
const MAX_FRAMES: u64 = 1 << 32;

/// Whom to count, and how far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeOptions {
    /// The process that holds the VM.
    pub pid: u32,
    /// Guest frames `[0, frames)` are told apart; the rest is counted and reported as lost.
    pub frames: PageCount,
    /// Whether the programs' own diagnostics are printed.
    pub log: bool,
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
    /// No tracepoint that brings pages could be attached.
    #[error(
        "none of the tracepoints that show pages turning writable could be attached: {0}; `dunlin doctor` shows what this kernel lacks"
    )]
    NoPages(String),
    /// A map is not what this program wrote, or could not be mapped.
    #[error("BPF map {name}: {problem}")]
    Map {
        /// Its name.
        name: &'static str,
        /// What happened.
        problem: String,
    },
}

/// A shared type as a map's key or value.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
struct Plain<T>(T);

// SAFETY: two u32, no padding, any bits are valid.
unsafe impl aya::Pod for Plain<ThreadKey> {}
// SAFETY: five u64, as above.
unsafe impl aya::Pod for Plain<ThreadCounters> {}
// SAFETY: three u32, as above.
unsafe impl aya::Pod for Plain<ExitKey> {}
// SAFETY: two u32, as above.
unsafe impl aya::Pod for Plain<TrackedVm> {}

/// The programs, attached, and their maps. Dropping it detaches them.
#[derive(Debug)]
pub struct KernelCounters {
    hooks: Vec<EventHook>,
    frames: PageCount,
    threads: HashMap<MapData, Plain<ThreadKey>, Plain<ThreadCounters>>,
    exits: HashMap<MapData, Plain<ExitKey>, u64>,
    pages: MappedArray,
    losses: MappedArray,
    log: Option<ProbeLog>,
    /// Holds programs, links and the remaining maps.
    _bpf: Ebpf,
}

impl KernelCounters {
    /// Loads the programs, tracks one process and attaches.
    ///
    /// # Errors
    /// Each says whether the policy refuses or the kernel lacks something, and what to do.
    pub fn attach(options: ProbeOptions) -> Result<Self, ProbeError> {
        let object = embedded_object()?;
        let frames = PageCount(options.frames.0.clamp(1, MAX_FRAMES));
        let words = frames.0.div_ceil(64) as u32;
        // Without type information, the lock-free path is counted as unreadable; everything else needs none.
        let gfn_offset = KernelTypes::with_module("kvm")
            .ok()
            .and_then(|types| types.member_offset("kvm_page_fault", "gfn"))
            .unwrap_or(OFFSET_UNKNOWN);
        let log_level = if options.log { aya_log::Level::Debug as u8 } else { 0 };
        let mut bpf = EbpfLoader::new()
            .verifier_log_level(VerifierLogLevel::STATS)
            .map_max_entries(map::PAGES, words)
            .override_global(constant::ONLY_TGID, &options.pid, true)
            .override_global(constant::PAGE_FAULT_GFN_OFFSET, &gfn_offset, true)
            .override_global(aya_log::LEVEL, &log_level, true)
            .load(object)
            .map_err(classify)?;

        let log =
            if options.log { Some(ProbeLog::open(&mut bpf).map_err(|e| ProbeError::Load(Box::new(e)))?) } else { None };
        let threads = hash(&mut bpf, map::THREADS)?;
        let exits = hash(&mut bpf, map::EXITS)?;
        let pages = array(&bpf, map::PAGES, words as usize)?;
        let losses = array(&bpf, map::LOSSES, Loss::ALL.len())?;
        track(&mut bpf, options.pid, TrackedVm { first_word: 0, words })?;

        let hooks: Vec<EventHook> = HOOKS.iter().map(|hook| attach_one(&mut bpf, hook)).collect();
        let sees_pages =
            HOOKS.iter().zip(&hooks).any(|(hook, state)| hook.sees_writable_pages && state.missing.is_none());
        if !sees_pages {
            let reasons: Vec<String> =
                hooks.iter().filter_map(|h| h.missing.as_ref().map(|why| format!("{}: {why}", h.name))).collect();
            return Err(ProbeError::NoPages(reasons.join("; ")));
        }
        Ok(Self { hooks, frames, threads, exits, pages, losses, log, _bpf: bpf })
    }

    /// Moves the bits that the programs set into `into`.
    fn take_pages(&self, into: &mut PageBitmap) {
        for (index, word) in self.pages.words().iter().enumerate() {
            // A plain load first: almost all words are zero, and a read does not take the line from the vCPUs.
            if word.load(Ordering::Relaxed) != 0 {
                into.or_word(index, word.swap(0, Ordering::AcqRel));
            }
        }
    }

    fn lost(&self) -> LostEvents {
        let count = |loss: Loss| self.losses.words()[loss as usize].load(Ordering::Relaxed);
        LostEvents {
            out_of_range: count(Loss::OutOfRange),
            threads_full: count(Loss::ThreadsFull),
            exits_full: count(Loss::ExitsFull),
            too_large: count(Loss::TooLarge),
            unreadable: count(Loss::Unreadable),
        }
    }
}

impl EventSource for KernelCounters {
    fn hooks(&self) -> &[EventHook] {
        &self.hooks
    }

    fn empty_pages(&self) -> PageBitmap {
        PageBitmap::new(self.frames)
    }

    fn sample(&mut self, pages: &mut PageBitmap) -> Result<EventSample, EventSourceError> {
        if let Some(log) = &mut self.log {
            log.print();
        }
        self.take_pages(pages);
        let mut threads: BTreeMap<u32, ThreadEvents> = BTreeMap::new();
        // The kernel bounds both maps; a walk that a concurrent insert restarts is bounded here too.
        for entry in self.threads.iter().take(2 * MAX_THREADS as usize) {
            let (Plain(key), Plain(counters)) = entry.map_err(|e| EventSourceError(e.to_string()))?;
            let thread = threads.entry(key.tid).or_default();
            thread.pages_made_writable = counters.pages_made_writable;
            thread.huge_mappings = counters.huge_mappings;
            thread.dirty_ring_pushes = counters.dirty_ring_pushes;
            thread.guest_exits = counters.guest_exits;
        }
        for entry in self.exits.iter().take(2 * MAX_EXITS as usize) {
            let (Plain(key), count) = entry.map_err(|e| EventSourceError(e.to_string()))?;
            threads.entry(key.tid).or_default().exits.insert(exit_reason::name(key.reason), count);
        }
        Ok(EventSample { threads, lost: self.lost() })
    }
}

/// Gives a process its window. The map stays with `bpf`: programs that are loaded later refer to its descriptor.
fn track(bpf: &mut Ebpf, pid: u32, window: TrackedVm) -> Result<(), ProbeError> {
    let failed = |problem: String| ProbeError::Map { name: map::TRACKED, problem };
    let tracked = bpf.map_mut(map::TRACKED).ok_or_else(|| failed("is not in the object".to_owned()))?;
    let mut tracked: HashMap<_, u32, Plain<TrackedVm>> =
        HashMap::try_from(tracked).map_err(|e| failed(e.to_string()))?;
    tracked.insert(pid, Plain(window), 0).map_err(|e| failed(e.to_string()))
}

/// Loads and attaches one program; a failure is a fact about this host, not an error.
fn attach_one(bpf: &mut Ebpf, hook: &Hook) -> EventHook {
    let mut attempt = || -> Result<(), ProgramError> {
        let program = bpf.program_mut(hook.program).ok_or(ProgramError::NotLoaded)?;
        let program: &mut RawTracePoint = program.try_into()?;
        program.load()?;
        program.attach(hook.tracepoint)?;
        Ok(())
    };
    let missing = attempt().err().map(|error| match errno(&error) {
        Some(libc::ENOENT) => "this kernel has no such tracepoint (is KVM loaded?)".to_owned(),
        Some(libc::EPERM | libc::EACCES) if !matches!(error, ProgramError::LoadError { .. }) => {
            "refused by the policy of this host".to_owned()
        }
        _ => error.to_string(),
    });
    EventHook { name: hook.tracepoint.to_owned(), gives: hook.gives.to_owned(), missing }
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
    let failed = |problem: String| ProbeError::Map { name, problem };
    let map = bpf.take_map(name).ok_or_else(|| failed("is not in the object".to_owned()))?;
    HashMap::try_from(map).map_err(|e| failed(e.to_string()))
}

/// Maps an array. The map stays with `bpf`, as in [`track`].
fn array(bpf: &Ebpf, name: &'static str, words: usize) -> Result<MappedArray, ProbeError> {
    let failed = |problem: String| ProbeError::Map { name, problem };
    match bpf.map(name).ok_or_else(|| failed("is not in the object".to_owned()))? {
        Map::Array(data) => MappedArray::of(data.fd(), words).map_err(|e| failed(format!("mmap: {e}"))),
        other => Err(failed(format!("is no array but {other:?}"))),
    }
}
