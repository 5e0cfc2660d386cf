//! The maps. Their names are those of [`dunlin_ebpf::map`].

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, RingBuf};
use dunlin_ebpf::{
    Armed, CodeKey, ExitKey, ExitTimes, Loss, MAX_CODE, MAX_EXITS, MAX_SPACES, MAX_THREADS, MAX_TRACKED, PEEK_BYTES,
    Setting, SpaceCounters, SpaceKey, Thread, TrackedVm,
};

#[map]
pub(crate) static TRACKED: HashMap<u32, TrackedVm> = HashMap::with_max_entries(MAX_TRACKED, BPF_F_NO_PREALLOC);

#[map]
pub(crate) static THREADS: Array<Thread> = Array::with_max_entries(MAX_THREADS, BPF_F_MMAPABLE);

#[map]
pub(crate) static VCPUS: HashMap<u32, u64> = HashMap::with_max_entries(MAX_THREADS, BPF_F_NO_PREALLOC);

#[map]
pub(crate) static EXITS: HashMap<ExitKey, ExitTimes> = HashMap::with_max_entries(MAX_EXITS, BPF_F_NO_PREALLOC);

#[map]
pub(crate) static SPACES: LruHashMap<SpaceKey, SpaceCounters> = LruHashMap::with_max_entries(MAX_SPACES, 0);

#[map]
pub(crate) static CODE: LruHashMap<CodeKey, u64> = LruHashMap::with_max_entries(MAX_CODE, 0);

/// The loader sets its size.
#[map]
pub(crate) static PAGES: Array<u64> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map]
pub(crate) static ARMED: Array<Armed> = Array::with_max_entries(MAX_TRACKED, BPF_F_MMAPABLE);

#[map]
pub(crate) static SETTINGS: Array<[u64; Setting::COUNT as usize]> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// The loader sets its size; the kernel wants a page at least.
#[map]
pub(crate) static WRITES: RingBuf = RingBuf::with_byte_size(4096, 0);

#[map]
pub(crate) static LOSSES: Array<u64> = Array::with_max_entries(Loss::ALL.len() as u32, BPF_F_MMAPABLE);

#[map]
pub(crate) static PEEKED: Array<[u8; PEEK_BYTES as usize]> = Array::with_max_entries(1, BPF_F_MMAPABLE);
