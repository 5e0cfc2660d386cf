//! KVM's dirty log, both kinds: one bitmap a memory slot, or one ring a vCPU.
//!
//! Owns the logging flags of the slots, harvest into the shared bitmap, and re-protection. Must not know rounds, or who
//! reads the pages. What it promises, with either kind:
//!
//! - After [`DirtyLogger::start`] no page is marked; everything is to be sent once.
//! - [`DirtyLogger::protect`] is called for every page that is due, before it is read, in every round. The run may be larger
//!   than what is due: of its pages only those are re-armed that the last harvest found (at the start: all), so that a
//!   page which was clean then and has been written since stays logged.
//! - [`DirtyLogger::harvest`] marks, in the shared bitmap, every page that was written since it was last protected. A
//!   caller may take marks from the bitmap at any time; a write after the caller's `protect` is marked by a later harvest.
//! - After [`DirtyLogger::stop`] the guest takes no more faults for it.
//!
//! Bitmap: `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` with all bits initially set. Starting touches no page table; each `protect`
//! clears the bits of its run, and that protects the pages. A page whose bit is set is not protected, and each
//! harvest reports it again until it is. The bits that the last harvest reported and no `protect` has cleared are kept here. At the end of a round every page has been protected at least once, so what a harvest reports
//! was written; a harvest in the middle of round 1 also reports the pages that are not yet protected, which is harmless,
//! as they are still to be sent.
//!
//! Ring: all pages are protected when the log starts. Entries are collected, then `KVM_RESET_DIRTY_RINGS` protects their pages, and only then are they marked. What is
//! kept here is the same as with a bitmap: which pages are marked, or to be sent in round 1, and were not protected since. They are to be sent, whatever is written
//! to them, so their entries count for nothing; `protect` takes what entries there are, has their pages protected, and from then on its run counts again. A full
//! ring makes its vCPU exit and drain it.
//! KVM looks whether a ring is nearly full only when it enters guest code; a vCPU whose code it emulates can write more pages
//! between two looks than the ring keeps in reserve, and KVM then writes over the oldest entries. A ring found full to the
//! last entry therefore counts as overrun: the log is armed anew and all of memory is marked.
//!
//! Who only wants to know how much was written ([`DirtyLogger::written`]) changes nothing of that: a bitmap is fetched and compared with what was fetched
//! before, entries of rings are collected and wait for the next reset.

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_DIRTY_LOG_PAGE_OFFSET, KVM_MEM_LOG_DIRTY_PAGES, kvm_dirty_gfn,
    kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags};

use super::memory::{Memory, RamRange};
use super::sys::{self, KvmError};
use crate::model::{DirtyLogKind, PAGE_SIZE, PageCount, PageRun, PageSubset};
use crate::shm::SharedBitmap;

/// The most entries of a ring that Dunlin asks for; KVM may allow fewer.
const RING_ENTRIES: usize = 65536;

/// How often KVM is asked to reset what signals kept it from resetting.
const MAX_RESETS: u32 = 1000;

/// The flags of a ring entry (`KVM_DIRTY_GFN_F_*`).
const ENTRY_DIRTY: u32 = 1;
const ENTRY_HARVESTED: u32 = 2;

/// The dirty log of one VM.
pub struct DirtyLogger {
    vm: Arc<VmFd>,
    ranges: Vec<RamRange>,
    shared: Arc<SharedBitmap>,
    /// Serialises start, stop, harvest and protect, and holds what they need.
    inner: Mutex<Inner>,
    /// Entries harvested of each vCPU's ring since the VM was made; empty without rings.
    vcpu_pages: Vec<AtomicU64>,
    /// Of these, pages that were not known to be written since they were protected.
    vcpu_new_pages: Vec<AtomicU64>,
}

struct Inner {
    on: bool,
    /// By slot: what the last harvest found (at the start: all) and nobody has protected since.
    unprotected: Vec<Vec<u64>>,
    scratch: Vec<u64>,
    kind: Kind,
}

enum Kind {
    /// One a slot.
    Bitmap { seen: Option<Seen> },
    /// One a vCPU; pages that were collected and are not yet marked, and entries that were handed back and not yet reset.
    Rings { rings: Vec<Ring>, pending: Pending, unreset: u64 },
}

/// Pages that were collected from rings and are not protected yet.
#[derive(Debug, Default)]
struct Pending {
    /// As they came: KVM pushes a page again that it writes itself.
    pages: Vec<u64>,
    /// One bit a page: which are among them.
    known: Vec<u64>,
}

impl Pending {
    fn of(memory_pages: u64) -> Self {
        Self { pages: Vec::new(), known: vec![0; memory_pages.div_ceil(64) as usize] }
    }

    /// Adds a page; whether it is new.
    fn add(&mut self, page: u64) -> bool {
        let Some(word) = self.known.get_mut((page / 64) as usize) else { return false };
        let bit = 1 << (page % 64);
        let is_new = *word & bit == 0;
        if is_new {
            *word |= bit;
            self.pages.push(page);
        }
        is_new
    }

    /// Takes all of them.
    fn take(&mut self) -> impl Iterator<Item = u64> {
        let Self { pages, known } = self;
        pages.drain(..).inspect(|page| known[(page / 64) as usize] &= !(1 << (page % 64)))
    }
}

/// By slot, which bits were set when [`DirtyLogger::written`] looked last, less those that were cleared since.
type Seen = Vec<Vec<u64>>;

/// How much was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// By each vCPU since the VM was made.
    ByVcpu(Vec<u64>),
    /// By all together since the last look; nothing at the first.
    Together(u64),
}

/// Puts `vm`, which has no vCPU yet, into the mode that `kind` needs, and says how large its rings are in bytes.
///
/// # Errors
/// A host that has no dirty ring.
pub(crate) fn prepare(vm: &VmFd, kind: DirtyLogKind) -> Result<usize, KvmError> {
    let enable = |cap, argument: u64, action| {
        let mut request = kvm_enable_cap { cap, ..Default::default() };
        request.args[0] = argument;
        vm.enable_cap(&request).map_err(KvmError::of(action))
    };
    match kind {
        DirtyLogKind::Bitmap => {
            let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
            let offered = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
            if offered as u32 & wanted != wanted {
                let source = io::ErrorKind::Unsupported.into();
                return Err(KvmError { action: "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (Linux 5.7)", source });
            }
            enable(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, wanted.into(), "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")?;
            Ok(0)
        }
        DirtyLogKind::Ring => {
            let offered = vm.check_extension_raw(KVM_CAP_DIRTY_LOG_RING_ACQ_REL.into());
            let bytes = usize::try_from(offered).unwrap_or(0).min(RING_ENTRIES * size_of::<kvm_dirty_gfn>());
            if bytes == 0 {
                let source = io::ErrorKind::Unsupported.into();
                return Err(KvmError { action: "KVM_CAP_DIRTY_LOG_RING_ACQ_REL (use the bitmap)", source });
            }
            enable(KVM_CAP_DIRTY_LOG_RING_ACQ_REL, bytes as u64, "KVM_CAP_DIRTY_LOG_RING_ACQ_REL")?;
            Ok(bytes)
        }
    }
}

impl DirtyLogger {
    /// The log of a VM that [`prepare`] was called for and whose vCPUs exist; `ring_bytes` is what it said.
    pub(crate) fn new(
        vm: Arc<VmFd>,
        memory: &Memory,
        ring_bytes: usize,
        vcpus: &[impl std::ops::Deref<Target = VcpuFd>],
    ) -> Result<Self, KvmError> {
        let kind = if ring_bytes == 0 {
            Kind::Bitmap { seen: None }
        } else {
            let rings = vcpus.iter().map(|vcpu| Ring::map(vcpu, ring_bytes)).collect::<Result<_, _>>()?;
            Kind::Rings { rings, pending: Pending::of(memory.dirty().pages().0), unreset: 0 }
        };
        let vcpu_pages = match &kind {
            Kind::Bitmap { .. } => Vec::new(),
            Kind::Rings { rings, .. } => rings.iter().map(|_| AtomicU64::new(0)).collect(),
        };
        let (ranges, shared) = (memory.ranges().to_vec(), memory.dirty().clone());
        let vcpu_new_pages = vcpu_pages.iter().map(|_| AtomicU64::new(0)).collect();
        let unprotected = ranges.iter().map(|range| vec![0; range.pages.0.div_ceil(64) as usize]).collect();
        let inner = Mutex::new(Inner { on: false, unprotected, scratch: Vec::new(), kind });
        Ok(Self { vm, ranges, shared, inner, vcpu_pages, vcpu_new_pages })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which kind it is.
    pub fn kind(&self) -> DirtyLogKind {
        match self.lock().kind {
            Kind::Bitmap { .. } => DirtyLogKind::Bitmap,
            Kind::Rings { .. } => DirtyLogKind::Ring,
        }
    }

    /// Whether it is on.
    pub fn is_on(&self) -> bool {
        self.lock().on
    }

    /// Switches logging on; no page is marked then. If it is on already, it starts anew.
    pub fn start(&self) -> Result<(), KvmError> {
        let mut inner = self.lock();
        if inner.on {
            self.switch(&mut inner, false)?;
        }
        self.switch(&mut inner, true)?;
        // What was written before this moment belongs to the first round anyway.
        self.shared.clear();
        Ok(())
    }

    /// Switches logging off. Idempotent.
    pub fn stop(&self) -> Result<(), KvmError> {
        let mut inner = self.lock();
        if inner.on { self.switch(&mut inner, false) } else { Ok(()) }
    }

    fn switch(&self, inner: &mut Inner, on: bool) -> Result<(), KvmError> {
        for range in &self.ranges {
            set_slot(&self.vm, range, if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })?;
        }
        inner.on = on;
        for words in &mut inner.unprotected {
            words.fill(u64::MAX);
        }
        match &mut inner.kind {
            Kind::Bitmap { seen } => *seen = None,
            Kind::Rings { rings, pending, unreset } => {
                // Entries of the time before: with the log just on they are pages that round 1 sends, else nobody's.
                let collected: u64 = rings.iter_mut().map(|ring| ring.collect(|_, _| {}).entries).sum();
                pending.take().for_each(drop);
                self.reset_rings(collected + std::mem::take(unreset))?;
            }
        }
        Ok(())
    }

    /// Marks what was written since it was last protected. Does nothing while the log is off.
    pub fn harvest(&self) -> Result<(), KvmError> {
        let mut inner = self.lock();
        if !inner.on {
            return Ok(());
        }
        let Inner { unprotected, kind, .. } = &mut *inner;
        match kind {
            Kind::Bitmap { .. } => {
                for (range, words) in self.ranges.iter().zip(unprotected) {
                    sys::get_dirty_log(&self.vm, range.slot, range.pages.0, words)?;
                    self.shared.or_words(range.first_page.0, words);
                }
                Ok(())
            }
            Kind::Rings { rings, pending, unreset } => {
                let all = 0..rings.len();
                self.drain(rings, all, unprotected, pending, unreset)
            }
        }
    }

    /// vCPU thread: its ring is full.
    pub(crate) fn ring_full(&self, vcpu: u32) -> Result<(), KvmError> {
        let mut inner = self.lock();
        let index = vcpu as usize;
        let Inner { unprotected, kind, .. } = &mut *inner;
        match kind {
            Kind::Rings { rings, pending, unreset } if index < rings.len() => {
                self.drain(rings, index..index + 1, unprotected, pending, unreset)
            }
            _ => Ok(()),
        }
    }

    /// How much was written so far. Protects nothing and marks nothing; nothing while the log is off.
    pub(super) fn written(&self) -> Result<Written, KvmError> {
        let mut inner = self.lock();
        let Inner { on, unprotected, scratch, kind } = &mut *inner;
        match kind {
            Kind::Bitmap { .. } if !*on => Ok(Written::Together(0)),
            Kind::Bitmap { seen } => {
                let is_first = seen.is_none();
                let words = |range: &RamRange| vec![0; range.pages.0.div_ceil(64) as usize];
                let seen = seen.get_or_insert_with(|| self.ranges.iter().map(words).collect());
                let mut new = 0;
                for (range, seen) in self.ranges.iter().zip(seen) {
                    scratch.resize(seen.len(), 0);
                    sys::get_dirty_log(&self.vm, range.slot, range.pages.0, scratch)?;
                    for (seen, &now) in seen.iter_mut().zip(&*scratch) {
                        new += u64::from((now & !*seen).count_ones());
                        *seen = now;
                    }
                }
                Ok(Written::Together(if is_first { 0 } else { new }))
            }
            Kind::Rings { rings, pending, unreset } => {
                let all = 0..rings.len();
                let collected = self.collect(rings, all, unprotected, pending);
                *unreset += collected.entries;
                if collected.overrun {
                    self.protect_collected(&collected, unprotected, pending, unreset)?;
                }
                Ok(Written::ByVcpu(self.vcpu_new_pages.iter().map(|pages| pages.load(Ordering::Relaxed)).collect()))
            }
        }
    }

    /// Collects the entries of the rings `which`, has their pages and those that were collected before protected, and marks them.
    fn drain(
        &self,
        rings: &mut [Ring],
        which: std::ops::Range<usize>,
        unprotected: &mut [Vec<u64>],
        pending: &mut Pending,
        unreset: &mut u64,
    ) -> Result<(), KvmError> {
        let collected = self.collect(rings, which, unprotected, pending);
        *unreset += collected.entries;
        self.protect_collected(&collected, unprotected, pending, unreset)
    }

    /// Collects the entries of the rings `which`. Those of pages that are to be sent anyhow count for nothing.
    fn collect(
        &self,
        rings: &mut [Ring],
        which: std::ops::Range<usize>,
        unprotected: &[Vec<u64>],
        pending: &mut Pending,
    ) -> Collected {
        let (mut entries, mut overrun) = (0, false);
        for index in which {
            let mut new = 0;
            let collected = rings[index].collect(|slot, offset| {
                if let Some((range, unprotected)) =
                    self.ranges.iter().zip(unprotected).find(|(range, _)| range.slot == slot)
                    && offset < range.pages.0
                    && unprotected[(offset / 64) as usize] >> (offset % 64) & 1 == 0
                {
                    new += u64::from(pending.add(range.first_page.0 + offset));
                }
            });
            self.vcpu_new_pages[index].fetch_add(new, Ordering::Relaxed);
            self.vcpu_pages[index].fetch_add(collected.entries, Ordering::Relaxed);
            entries += collected.entries;
            if collected.overrun {
                tracing::warn!("the dirty ring of vCPU {index} overran; all of memory counts as written");
                overrun = true;
            }
        }
        Collected { entries, overrun }
    }

    /// Has the pages of all entries that were handed back protected, and marks them.
    fn protect_collected(
        &self,
        collected: &Collected,
        unprotected: &mut [Vec<u64>],
        pending: &mut Pending,
        unreset: &mut u64,
    ) -> Result<(), KvmError> {
        if *unreset == 0 {
            return Ok(());
        }
        let mut armed = self.reset_rings(std::mem::take(unreset));
        if collected.overrun {
            armed = armed.and_then(|()| self.arm_anew());
        }
        // Marked even if KVM fails: then the caller gives up, but no page has been forgotten.
        for page in pending.take() {
            self.shared.set(page);
            let slots = self.ranges.iter().zip(&mut *unprotected);
            for (range, unprotected) in slots.filter(|(range, _)| range.holds(page)) {
                let offset = page - range.first_page.0;
                unprotected[(offset / 64) as usize] |= 1 << (offset % 64);
            }
        }
        if collected.overrun {
            self.shared.set_run(0, self.shared.pages().0);
            for words in unprotected {
                words.fill(u64::MAX);
            }
        }
        armed
    }

    /// Has KVM protect the pages of the `entries` that were handed back. A signal makes it stop early, and it does not say
    /// so; what it has not done, it does when it is asked again.
    fn reset_rings(&self, entries: u64) -> Result<(), KvmError> {
        let mut done = 0;
        for _ in 0..MAX_RESETS {
            done += sys::reset_dirty_rings(&self.vm)?;
            if done >= entries {
                return Ok(());
            }
        }
        let source = io::Error::other(format!("{done} of {entries} entries were reset"));
        Err(KvmError { action: "KVM_RESET_DIRTY_RINGS", source })
    }

    /// Has KVM protect every page: those too whose entries were written over.
    fn arm_anew(&self) -> Result<(), KvmError> {
        for flags in [0, KVM_MEM_LOG_DIRTY_PAGES] {
            for range in &self.ranges {
                set_slot(&self.vm, range, flags)?;
            }
        }
        Ok(())
    }

    /// Re-arms the log for `run`, before its pages are read. A run that is not wholly RAM is cut to what is.
    pub fn protect(&self, run: PageRun) -> Result<(), KvmError> {
        self.protect_some(run, PageSubset::ALL)
    }

    /// As [`Self::protect`], but only the pages whose guest frame is in `subset`: the others go on as if the log were off.
    pub(crate) fn protect_some(&self, run: PageRun, subset: PageSubset) -> Result<(), KvmError> {
        let mut inner = self.lock();
        let Inner { on: true, unprotected, scratch, kind } = &mut *inner else { return Ok(()) };
        let mut is_collected = false;
        for (index, range) in self.ranges.iter().enumerate() {
            let start = run.first.0.max(range.first_page.0);
            let end = run.end().min(range.first_page.0 + range.pages.0);
            if start >= end {
                continue;
            }
            let inside = start - range.first_page.0..end - range.first_page.0;
            let Some(group) = Group::of(range, inside, subset, &unprotected[index], scratch) else { continue };
            match kind {
                Kind::Bitmap { seen } => {
                    sys::clear_dirty_log(&self.vm, range.slot, group.first, group.pages, scratch)?;
                    if let Some(seen) = seen {
                        group.take_out(&mut seen[index], scratch);
                    }
                }
                Kind::Rings { rings, pending, unreset } if !is_collected => {
                    // Their entries still count for nothing; those that come when this is done count.
                    let all = 0..rings.len();
                    self.drain(rings, all, unprotected, pending, unreset)?;
                    is_collected = true;
                }
                Kind::Rings { .. } => {}
            }
            group.take_out(&mut unprotected[index], scratch);
        }
        Ok(())
    }

    /// Counts the pages of `runs` as not protected: they are due, and what was written to them counts for nothing until [`Self::protect`] is called for them again. What is no RAM is left out.
    pub fn disregard(&self, runs: &[PageRun]) {
        let mut inner = self.lock();
        for (range, words) in self.ranges.iter().zip(&mut inner.unprotected) {
            let (begin, end) = (range.first_page.0, range.first_page.0 + range.pages.0);
            for run in runs {
                let (mut page, last) = (run.first.0.max(begin), run.end().min(end));
                while page < last {
                    let (offset, left) = (page - begin, last - page);
                    let count = left.min(64 - offset % 64);
                    words[(offset / 64) as usize] |= (u64::MAX >> (64 - count)) << (offset % 64);
                    page += count;
                }
            }
        }
    }

    /// How many entries each vCPU's ring has brought since the VM was made; empty with a bitmap, which does not say who
    /// wrote.
    pub fn vcpu_pages(&self) -> Vec<PageCount> {
        self.vcpu_pages.iter().map(|pages| PageCount(pages.load(Ordering::Relaxed))).collect()
    }
}

/// Tells KVM of a memory slot, or changes its flags.
pub(crate) fn set_slot(vm: &VmFd, range: &RamRange, flags: u32) -> Result<(), KvmError> {
    let region = kvm_userspace_memory_region {
        slot: range.slot,
        flags,
        guest_phys_addr: range.guest_address,
        memory_size: range.pages.bytes(),
        userspace_addr: range.host_address,
    };
    // SAFETY: the range is one of `Memory`, whose mapping outlives the VM's vCPUs (the machine owns both), and ranges do not
    // overlap.
    unsafe { vm.set_user_memory_region(region) }.map_err(KvmError::of("KVM_SET_USER_MEMORY_REGION"))
}

/// Whole groups of 64 pages of a slot, about which KVM wants to be asked.
struct Group {
    first: u64,
    pages: u32,
}

impl Group {
    /// Puts into `chosen` those pages `inside` of a slot that are `known` and in `subset`; the bits of their neighbours are zero. None if there is no such page.
    fn of(
        range: &RamRange,
        inside: std::ops::Range<u64>,
        subset: PageSubset,
        known: &[u64],
        chosen: &mut Vec<u64>,
    ) -> Option<Self> {
        let first = inside.start / 64 * 64;
        let end = inside.end.next_multiple_of(64).min(range.pages.0);
        chosen.clear();
        chosen.extend_from_slice(&known[(first / 64) as usize..end.div_ceil(64) as usize]);
        chosen[0] &= u64::MAX << (inside.start - first);
        let beyond = chosen.len() as u64 * 64 - (inside.end - first);
        if let Some(last) = chosen.last_mut() {
            *last &= u64::MAX >> beyond;
        }
        if subset != PageSubset::ALL {
            keep(chosen, range.guest_address / PAGE_SIZE as u64 + first, subset);
        }
        chosen.iter().any(|&bits| bits != 0).then_some(Self { first, pages: (end - first) as u32 })
    }

    /// Takes the `chosen` pages out of what is known of the slot.
    fn take_out(&self, known: &mut [u64], chosen: &[u64]) {
        for (known, chosen) in known[(self.first / 64) as usize..].iter_mut().zip(chosen) {
            *known &= !chosen;
        }
    }
}

/// Takes out of `words`, whose lowest bit is of guest frame `first`, every frame that is not in `subset`.
fn keep(words: &mut [u64], first: u64, subset: PageSubset) {
    let mut kept = vec![0u64; words.len()];
    let end = first + words.len() as u64 * 64;
    for group in first / subset.every()..end.div_ceil(subset.every()) {
        if let Some(bit) = subset.of_group(group).checked_sub(first)
            && bit < end - first
        {
            kept[(bit / 64) as usize] |= 1 << (bit % 64);
        }
    }
    words.iter_mut().zip(kept).for_each(|(word, kept)| *word &= kept);
}

/// One vCPU's ring, mapped.
struct Ring {
    entries: NonNull<kvm_dirty_gfn>,
    count: usize,
    /// The next entry to look at.
    next: usize,
    /// After an overrun KVM goes on somewhere behind `next`.
    lost_place: bool,
}

/// What one look at a ring brought.
struct Collected {
    entries: u64,
    /// Every entry was in use: KVM may have written over some.
    overrun: bool,
}

// SAFETY: the mapping is owned by the ring and used by one thread at a time (`&mut self`).
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: &VcpuFd, bytes: usize) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is open for the duration of the call.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(vcpu)) };
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE as u64;
        // SAFETY: a fresh mapping at an address of the kernel's choice; KVM backs exactly `bytes` from this offset.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd.as_fd(),
                offset,
            )
        }
        .map_err(KvmError::of("mapping a dirty ring"))?;
        let entries = NonNull::new(start.cast())
            .ok_or(KvmError { action: "mapping a dirty ring", source: io::ErrorKind::AddrNotAvailable.into() })?;
        Ok(Self { entries, count: bytes / size_of::<kvm_dirty_gfn>(), next: 0, lost_place: false })
    }

    /// Entry `index`, counted round and round.
    fn entry(&self, index: usize) -> NonNull<kvm_dirty_gfn> {
        // SAFETY: the index is below `count`, and the mapping holds `count` entries for as long as `self` lives.
        unsafe { self.entries.add(index % self.count) }
    }

    /// The flags of entry `index`.
    fn flags(&self, index: usize) -> &AtomicU32 {
        // SAFETY: an aligned u32 of the mapping that kernel and user space access atomically, alive as long as `self`.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.entry(index).as_ptr()).flags) }
    }

    /// Whether entry `index` is new. Acquire: slot and offset were written before the flag.
    fn is_new(&self, index: usize) -> bool {
        self.flags(index).load(Ordering::Acquire) & (ENTRY_DIRTY | ENTRY_HARVESTED) == ENTRY_DIRTY
    }

    /// Hands (slot, page within the slot) of every new entry to `take`, and the entries back to KVM, which protects their
    /// pages and uses them again after the next reset.
    fn collect(&mut self, mut take: impl FnMut(u32, u64)) -> Collected {
        if self.lost_place {
            self.find_place();
        }
        // At most one turn: a vCPU that goes on writing must not keep us here.
        for entries in 0..self.count as u64 {
            if !self.is_new(self.next) {
                return Collected { entries, overrun: false };
            }
            let entry = self.entry(self.next).as_ptr();
            // SAFETY: the kernel does not write an entry that is new and not yet handed back, unless the ring overruns; then
            // either content is a page.
            let (slot, offset) =
                unsafe { ((&raw const (*entry).slot).read_volatile(), (&raw const (*entry).offset).read_volatile()) };
            take(slot, offset);
            // Release: the entry was read before it is handed back.
            self.flags(self.next).store(ENTRY_HARVESTED, Ordering::Release);
            self.next = (self.next + 1) % self.count;
        }
        self.lost_place = true;
        Collected { entries: self.count as u64, overrun: true }
    }

    /// After an overrun by k entries KVM's next entry lies k behind ours, and its reset waits at ours. The k between are
    /// handed back as if they had been harvested: their pages are then protected once more.
    fn find_place(&mut self) {
        let Some(mut place) = (0..self.count).find(|&ahead| self.is_new(self.next + ahead)) else { return };
        // KVM writes entries in order: one that was still old when we passed it may be new by now.
        while place > 0 && self.is_new(self.next + place - 1) {
            place -= 1;
        }
        for between in 0..place {
            self.flags(self.next + between).store(ENTRY_HARVESTED, Ordering::Release);
        }
        self.next = (self.next + place) % self.count;
        self.lost_place = false;
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: exactly what `map` mapped.
        let _ = unsafe { rustix::mm::munmap(self.entries.as_ptr().cast(), self.count * size_of::<kvm_dirty_gfn>()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::Machine;
    use crate::kvm::machine::BootConfig;
    use crate::kvm::testing::{
        CODE, PAGES, boot, config, hosting, kvm_or_skip, printer, scatterer, wait_for, writer, written,
    };
    use crate::model::PageBitmap;

    const FIRST: u64 = PAGES as u64 / 4096;

    /// Harvests, and takes what is marked. Not the page of the guest's code: KVM may map a page that is only fetched as writable,
    /// and then logs it (`make_spte`, arch/x86/kvm/mmu/spte.c); whether it does differs by backend.
    fn harvest(machine: &Machine) -> Vec<u64> {
        machine.log().harvest().unwrap();
        let mut seen = PageBitmap::new(machine.memory().pages());
        machine.memory().dirty().take(&mut seen);
        let code = u64::from(CODE) / 4096;
        seen.runs(u32::MAX).flat_map(|run| run.indices()).filter(|&page| page != code).collect()
    }

    /// What round 1 does: every page once, in runs.
    fn protect_all(machine: &Machine) {
        let pages = machine.memory().pages().0;
        for first in (0..pages).step_by(512) {
            machine.log().protect(PageRun::new(first, (pages - first).min(512) as u32)).unwrap();
        }
    }

    proptest::proptest! {
        /// Of any words at any place only the frames of the subset are left.
        #[test]
        fn what_is_kept_is_what_the_subset_holds(
            words in proptest::collection::vec(proptest::prelude::any::<u64>(), 1..40), place in 0..1u64 << 30, shift in 1..=PageSubset::MAX_SHIFT, seed in proptest::prelude::any::<u64>(),
        ) {
            let (subset, first) = (PageSubset::one_in(shift, seed), place * 64);
            let mut kept = words.clone();
            keep(&mut kept, first, subset);
            for bit in 0..words.len() as u64 * 64 {
                let is_set = |words: &[u64]| words[(bit / 64) as usize] >> (bit % 64) & 1 == 1;
                proptest::prop_assert_eq!(is_set(&kept), is_set(&words) && subset.holds(first + bit), "frame {}", first + bit);
            }
        }
    }

    fn both(test: impl Fn(DirtyLogKind)) {
        if kvm_or_skip("a dirty log") {
            test(DirtyLogKind::Bitmap);
            test(DirtyLogKind::Ring);
        }
    }

    #[test]
    fn exactly_the_written_pages_are_marked() {
        both(|kind| {
            let machine = boot(writer(100), 2, kind);
            assert_eq!(machine.log().kind(), kind);
            assert!(harvest(&machine).len() > 2, "the loader's own writes are marked before the log starts");
            machine.log().start().unwrap();
            protect_all(&machine);
            assert_eq!(harvest(&machine), Vec::<u64>::new(), "{kind:?}: nothing has run");
            machine.resume().unwrap();
            wait_for("two rounds", || written(&machine, 99) > 200);
            machine.pause().unwrap();
            assert_eq!(harvest(&machine), (FIRST..FIRST + 100).collect::<Vec<_>>(), "{kind:?}");
            // A device's write is marked with no help from KVM.
            vm_memory::Bytes::write_obj(machine.memory().ram().as_ref(), 1u8, vm_memory::GuestAddress(0x5000)).unwrap();
            let seen = harvest(&machine);
            assert!(seen.contains(&5), "{kind:?}");
            machine.log().stop().unwrap();
            assert_eq!(harvest(&machine), Vec::<u64>::new(), "{kind:?}: off");
            let counted: u64 = machine.log().vcpu_pages().iter().map(|pages| pages.0).sum();
            assert_eq!(counted > 0, kind == DirtyLogKind::Ring);
        });
    }

    /// A page that is to be sent anyhow is not sent once more for what was written to it before.
    #[test]
    fn what_is_written_to_a_page_that_is_still_to_be_sent_counts_for_nothing() {
        both(|kind| {
            let machine = boot(writer(100), 1, kind);
            machine.log().start().unwrap();
            machine.resume().unwrap();
            let two_rounds = || {
                let before = written(&machine, 99);
                wait_for("two rounds", || written(&machine, 99) > before + 200);
            };
            two_rounds();
            machine.log().written().unwrap();
            machine.pause().unwrap();
            protect_all(&machine);
            assert_eq!(harvest(&machine), Vec::<u64>::new(), "{kind:?}: all of it is sent in round 1");
            machine.resume().unwrap();
            two_rounds();
            machine.pause().unwrap();
            assert_eq!(harvest(&machine).len(), 100, "{kind:?}: what is written afterwards is sent again");
            machine.resume().unwrap();
            two_rounds();
            machine.pause().unwrap();
            // Half of round 2.
            machine.log().protect(PageRun::new(FIRST, 50)).unwrap();
            machine.resume().unwrap();
            two_rounds();
            machine.pause().unwrap();
            machine.log().protect(PageRun::new(FIRST + 50, 50)).unwrap();
            assert_eq!(harvest(&machine), (FIRST..FIRST + 50).collect::<Vec<_>>(), "{kind:?}");
        });
    }

    #[test]
    fn what_is_disregarded_is_found_again_once_it_is_protected() {
        both(|kind| {
            let machine = boot(writer(200), 1, kind);
            machine.log().start().unwrap();
            protect_all(&machine);
            machine.resume().unwrap();
            let two_rounds = || {
                let before = written(&machine, 199);
                wait_for("two rounds", || written(&machine, 199) > before + 400);
            };
            two_rounds();
            machine.pause().unwrap();
            // Across words of the bitmap, twice, and beyond the end of RAM.
            let end = machine.memory().pages().0 as u32;
            machine.log().disregard(&[
                PageRun::new(FIRST + 60, 70),
                PageRun::new(FIRST + 100, 50),
                PageRun::new(end.into(), 9),
                PageRun::new(u64::MAX - 1, u32::MAX),
            ]);
            machine.resume().unwrap();
            two_rounds();
            machine.pause().unwrap();
            machine.log().protect(PageRun::new(FIRST, 200)).unwrap();
            let others: Vec<u64> = (FIRST..FIRST + 60).chain(FIRST + 150..FIRST + 200).collect();
            assert_eq!(harvest(&machine), others, "{kind:?}");
            machine.resume().unwrap();
            two_rounds();
            machine.pause().unwrap();
            let found = harvest(&machine);
            assert!((FIRST + 60..FIRST + 150).all(|page| found.contains(&page)), "{kind:?}: {found:?}");
        });
    }

    #[test]
    fn protecting_one_page_leaves_its_neighbours_marked() {
        if !kvm_or_skip("protecting_one_page_leaves_its_neighbours_marked") {
            return;
        }
        let machine = boot(writer(70), 1, DirtyLogKind::Bitmap);
        machine.log().start().unwrap();
        protect_all(&machine);
        machine.resume().unwrap();
        wait_for("two rounds", || written(&machine, 69) > 140);
        machine.pause().unwrap();
        assert_eq!(harvest(&machine).len(), 70);
        machine.log().protect(PageRun::new(FIRST + 3, 1)).unwrap();
        machine.log().protect(PageRun::new(FIRST + 60, 6)).unwrap();
        let kept: Vec<u64> =
            (0..70).filter(|page| *page != 3 && !(60..66).contains(page)).map(|page| FIRST + page).collect();
        // The bits that were not cleared are still KVM's, and come again.
        assert_eq!(harvest(&machine), kept);
        // Beyond the end of RAM there is nothing to protect.
        machine.log().protect(PageRun::new(machine.memory().pages().0 - 1, 10)).unwrap();
        machine.log().protect(PageRun::new(u64::MAX - 5, 5)).unwrap();
    }

    #[test]
    fn protecting_a_window_leaves_what_was_written_since_the_harvest_logged() {
        if !kvm_or_skip("protecting_a_window_leaves_what_was_written_since_the_harvest_logged") {
            return;
        }
        let machine = boot(writer(70), 1, DirtyLogKind::Bitmap);
        machine.log().start().unwrap();
        protect_all(&machine);
        assert_eq!(harvest(&machine), Vec::<u64>::new());
        machine.resume().unwrap();
        wait_for("two rounds", || written(&machine, 69) > 140);
        machine.pause().unwrap();
        // A window in which nothing was due, and one twice: neither may forget what no harvest has seen.
        protect_all(&machine);
        assert_eq!(harvest(&machine), (FIRST..FIRST + 70).collect::<Vec<_>>());
        protect_all(&machine);
        machine.resume().unwrap();
        let before = written(&machine, 69);
        wait_for("two rounds", || written(&machine, 69) > before + 140);
        machine.pause().unwrap();
        protect_all(&machine);
        assert_eq!(harvest(&machine), (FIRST..FIRST + 70).collect::<Vec<_>>());
    }

    /// Copies pages as a migration does, while the guest writes: whenever it stands, the copy must be equal once the last
    /// harvest is in. The guest writes at random, so that some write hits a page between any two steps of its copying.
    #[test]
    fn no_write_is_lost_between_harvest_protect_and_read() {
        both(|kind| {
            let machine = boot(scatterer(), 1, kind);
            let pages = machine.memory().pages();
            let mut copy = vec![0u8; pages.bytes() as usize];
            let read = |copy: &mut Vec<u8>, page: u64| {
                let start = page as usize * PAGE_SIZE;
                let address = vm_memory::GuestAddress(start as u64);
                let target = &mut copy[start..start + PAGE_SIZE];
                vm_memory::Bytes::read_slice(machine.memory().ram().as_ref(), target, address).unwrap();
            };
            let rounds = std::cell::Cell::new(0);
            let round = |copy: &mut Vec<u8>| {
                let mut due = PageBitmap::new(pages);
                machine.log().harvest().unwrap();
                machine.memory().dirty().take(&mut due);
                rounds.set(rounds.get() + 1);
                if rounds.get() % 2 == 0 {
                    // Logged ahead of time, as before a guest is asked for its free pages.
                    machine.log().protect(PageRun::new(0, pages.0 as u32)).unwrap();
                    let runs: Vec<PageRun> = due.runs(u32::MAX).collect();
                    machine.log().disregard(&runs);
                }
                for run in due.runs(64) {
                    machine.log().protect(run).unwrap();
                    run.indices().for_each(|page| read(copy, page));
                }
            };
            machine.log().start().unwrap();
            machine.resume().unwrap();
            for first in (0..pages.0).step_by(512) {
                machine.log().protect(PageRun::new(first, 512)).unwrap();
                (first..first + 512).for_each(|page| read(&mut copy, page));
            }
            for check in 0..60 {
                (0..40).for_each(|_| round(&mut copy));
                machine.pause().unwrap();
                round(&mut copy);
                let mut truth = vec![0u8; copy.len()];
                (0..pages.0).for_each(|page| read(&mut truth, page));
                let page = |bytes: &[u8], page: usize| bytes[page * PAGE_SIZE..][..PAGE_SIZE].to_vec();
                let lost: Vec<_> = (0..pages.0 as usize).filter(|&at| page(&copy, at) != page(&truth, at)).collect();
                assert!(lost.is_empty(), "{kind:?}: pages {lost:?} were lost at check {check}");
                machine.resume().unwrap();
            }
        });
    }

    /// More pages than the ring has entries, and nobody harvests: the vCPU must leave guest code and drain its ring.
    #[test]
    fn a_full_ring_is_drained_by_its_vcpu_and_nothing_is_lost() {
        if !kvm_or_skip("a_full_ring_is_drained_by_its_vcpu_and_nothing_is_lost") {
            return;
        }
        let pages = RING_ENTRIES as u32 + 5000;
        let config = BootConfig { memory_bytes: 512 << 20, ..config(writer(pages), 1, DirtyLogKind::Ring) };
        let machine = Machine::boot(config, &hosting(), Box::new(|_| Ok(Vec::new()))).unwrap();
        machine.log().start().unwrap();
        protect_all(&machine);
        machine.resume().unwrap();
        wait_for("the last page", || written(&machine, pages - 1) > 0);
        assert!(machine.log().vcpu_pages()[0].0 > 0, "nobody but the vCPU itself can have drained the ring");
        machine.pause().unwrap();
        let mut found = PageBitmap::new(machine.memory().pages());
        machine.log().harvest().unwrap();
        machine.memory().dirty().take(&mut found);
        let mut lost = PageBitmap::new(machine.memory().pages());
        (FIRST..FIRST + u64::from(pages)).filter(|page| !found.contains(*page)).for_each(|page| lost.insert(page));
        let lost: Vec<_> = lost.runs(u32::MAX).collect();
        assert!(lost.is_empty(), "lost {lost:?}; first {} last {}", written(&machine, 0), written(&machine, pages - 1));
    }

    #[test]
    fn a_reset_by_the_guest_marks_all_of_memory() {
        both(|kind| {
            // mov al, 0xfe; out 0x64, al
            let machine = boot(printer(b"x", &[0xb0, 0xfe, 0xe6, 0x64]), 1, kind);
            machine.log().start().unwrap();
            machine.resume().unwrap();
            wait_for("a reset", || machine.console().history().len() > 1);
            machine.pause().unwrap();
            machine.log().harvest().unwrap();
            let mut seen = PageBitmap::new(machine.memory().pages());
            assert_eq!(machine.memory().dirty().take(&mut seen), machine.memory().pages(), "{kind:?}");
        });
    }
}
