//! The maps. Their names are those of [`dunlin_ebpf::map`].

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap};
use dunlin_ebpf::{ExitKey, Loss, MAX_EXITS, MAX_THREADS, MAX_TRACKED, ThreadCounters, ThreadKey, TrackedVm};

#[map]
pub(crate) static TRACKED: HashMap<u32, TrackedVm> = HashMap::with_max_entries(MAX_TRACKED, BPF_F_NO_PREALLOC);

#[map]
pub(crate) static THREADS: HashMap<ThreadKey, ThreadCounters> =
    HashMap::with_max_entries(MAX_THREADS, BPF_F_NO_PREALLOC);

#[map]
pub(crate) static EXITS: HashMap<ExitKey, u64> = HashMap::with_max_entries(MAX_EXITS, BPF_F_NO_PREALLOC);

/// The loader sets its size.
#[map]
pub(crate) static PAGES: Array<u64> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map]
pub(crate) static LOSSES: Array<u64> = Array::with_max_entries(Loss::ALL.len() as u32, BPF_F_MMAPABLE);
