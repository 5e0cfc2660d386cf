//! The lines of a recording. Counters are written as what was added since the look before, pages as runs.

use std::collections::{BTreeMap, BTreeSet};

use dunlin_ebpf::{FIRST_WRITE_BINS, MAX_CODE, MAX_EXITS, MAX_SPACES, MAX_THREADS};
use serde::{Deserialize, Serialize};

use super::{MAX_FRAMES, MAX_LINE_BYTES};
use crate::model::schema::Schema;
use crate::model::{AddressSpace, EXIT_TIME_BINS, ExitTimes, Gfn, GuestWrite, Gva, PageBitmap, VmId};
use crate::port::{EventHook, LostEvents, SpaceEvents, ThreadEvents};

/// The most that one counter may have been raised between two looks: far above what any host does in a day, and far below where sums
/// over all threads would overflow.
const MAX_COUNT: u64 = 1 << 50;
/// The longest time between two looks: a day.
const MAX_GAP_NS: u64 = 86_400_000_000_000;
/// The most sources of a header.
const MAX_SOURCES: usize = 64;
/// The most single writes between two looks, what the largest buffer holds; and pages that one covers: a mapping of 1 GiB.
const MAX_WRITES: usize = 20_000_000;
const MAX_PAGES_OF_WRITE: u64 = 1 << 18;
/// Single writes in a line: each takes less than 100 bytes.
pub(super) const WRITES_IN_LINE: usize = 1 << 16;
/// The longest word of a file that is shown: longer ones are cut.
const MAX_WORD: usize = 256;

/// The first line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordingHeader {
    /// Whose.
    pub vm: RecordedVm,
    /// When it began, by the host's clock.
    pub began_unix_ms: u64,
    /// The length that intervals were meant to have.
    pub interval_ns: u64,
    /// Whether every page was write-protected at the start of each interval.
    pub armed: bool,
    /// Whether single writes were kept.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub writes: bool,
    /// Guest frames that were told apart.
    pub frames: u64,
    /// What was listened to, and what not.
    pub sources: Vec<RecordedSource>,
}

/// The VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedVm {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub vm_id: VmId,
    /// Its process.
    pub pid: u32,
    /// When that process started, in clock ticks since boot.
    pub start_time_ticks: u64,
    /// Its vCPUs.
    pub cpus: u32,
}

/// One source of events.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedSource {
    /// Its name.
    pub name: String,
    /// What it sees.
    pub gives: String,
    /// Why it was not attached; absent when it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing: Option<String>,
}

impl From<&EventHook> for RecordedSource {
    fn from(hook: &EventHook) -> Self {
        Self { name: hook.name.clone(), gives: hook.gives.clone(), missing: hook.missing.clone() }
    }
}

impl Schema for RecordingHeader {
    const SCHEMA: &'static str = "dunlin.recording/v1";
}

/// Single writes since the look before: any number of lines before that of the look to which they belong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RecordedWrites {
    /// Of each: when, after the first look; which thread; the first page and how many; how many of them were not written since the look before;
    /// in which address space, and by which instruction. The last, or the last two, are left out where they are not known.
    pub(super) writes: Vec<Vec<u64>>,
}

impl Schema for RecordedWrites {
    const SCHEMA: &'static str = "dunlin.recorded-writes/v1";
}

impl RecordedWrites {
    /// `began_ns`: the first look, by the clock of the writes.
    pub(super) fn of(writes: &[GuestWrite], began_ns: u64) -> Self {
        let one = |write: &GuestWrite| {
            let GuestWrite { at_ns, thread_id, gfn, pages, fresh, address_space, instruction } = *write;
            let known = [at_ns.saturating_sub(began_ns), thread_id.into(), gfn.0, pages.into(), fresh.into()];
            let space = address_space.map(|space| space.0);
            // An instruction means nothing without its address space.
            let instruction = instruction.filter(|_| space.is_some()).map(|instruction| instruction.0);
            known.into_iter().chain(space).chain(instruction).collect()
        };
        Self { writes: writes.iter().map(one).collect() }
    }

    /// Adds them to those that belong to the same look.
    ///
    /// # Errors
    /// In words, what is wrong with one of them; or there are more than any buffer holds.
    pub(super) fn add_to(&self, writes: &mut Vec<GuestWrite>) -> Result<(), String> {
        if writes.len() + self.writes.len() > MAX_WRITES {
            return Err("there are more single writes than any buffer holds".to_owned());
        }
        for write in &self.writes {
            writes.push(write_of(write).ok_or("a write is none, or later, larger or farther than any can be")?);
        }
        Ok(())
    }
}

fn write_of(words: &[u64]) -> Option<GuestWrite> {
    let (&[at_ns, thread, gfn, pages, fresh], place) = words.split_first_chunk()?;
    let known = |index: usize| place.get(index).copied();
    let sound = at_ns <= MAX_COUNT && gfn <= MAX_COUNT && (1..=MAX_PAGES_OF_WRITE).contains(&pages) && fresh <= pages;
    (sound && place.len() <= 2).then_some(GuestWrite {
        at_ns,
        thread_id: thread.try_into().ok()?,
        gfn: Gfn(gfn),
        pages: pages as u32,
        fresh: fresh as u32,
        address_space: known(0).map(AddressSpace),
        instruction: known(1).map(Gva),
    })
}

/// A line behind the first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RecordedLine {
    Writes(RecordedWrites),
    Sample(RecordedSample),
}

impl RecordedLine {
    /// Reads and checks a line that follows a look of `before_ns` in a recording of `frames`.
    ///
    /// # Errors
    /// In words, what is wrong with it.
    pub(super) fn parse(line: &[u8], frames: u64, before_ns: u64) -> Result<Self, String> {
        if kind_of(line)? == RecordedWrites::SCHEMA {
            return read(line).map(Self::Writes);
        }
        RecordedSample::parse(line, frames, before_ns).map(Self::Sample)
    }
}

/// One look: all other lines but the first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RecordedSample {
    /// When, after the first look.
    pub(super) at_ns: u64,
    /// Whether someone else had the dirty log on.
    pub(super) logged: bool,
    /// All threads that have caused events, by number.
    pub(super) threads: Vec<RecordedThread>,
    /// What was lost since the look before.
    pub(super) lost: RecordedLost,
    /// Pages that turned writable since the look before: how many frames to skip, how many to take, and so on.
    pub(super) pages: Vec<u64>,
}

impl Schema for RecordedSample {
    const SCHEMA: &'static str = "dunlin.recorded-sample/v1";
}

/// What one thread did since the look before.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct RecordedThread {
    pub(super) thread_id: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) name: Option<String>,
    pub(super) pages_made_writable: u64,
    pub(super) huge_mappings: u64,
    pub(super) dirty_ring_pushes: u64,
    pub(super) pages_logged: u64,
    pub(super) guest_exits: u64,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) exits: BTreeMap<String, RecordedTimes>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) guest_exit_reasons: BTreeMap<String, RecordedTimes>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) first_writes: Vec<Bin>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) spaces: Vec<RecordedSpace>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) code: Vec<RecordedCode>,
}

/// A bin's number and what was added to it. Empty ones are left out.
pub(super) type Bin = (u32, u32);

/// Exits for one reason; `longest_ns` is since counting began.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RecordedTimes {
    pub(super) count: u64,
    pub(super) total_ns: u64,
    pub(super) longest_ns: u64,
    pub(super) bins: Vec<Bin>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RecordedSpace {
    pub(super) address_space: AddressSpace,
    pub(super) pages_made_writable: u64,
    pub(super) first_writes: Vec<Bin>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RecordedCode {
    pub(super) address_space: AddressSpace,
    pub(super) instruction: Gva,
    pub(super) pages: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RecordedLost {
    pub(super) out_of_range: u64,
    pub(super) threads_full: u64,
    pub(super) exits_full: u64,
    pub(super) too_large: u64,
    pub(super) unreadable: u64,
    pub(super) unattributed: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(super) writes_full: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's form")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl From<&LostEvents> for RecordedLost {
    fn from(lost: &LostEvents) -> Self {
        let LostEvents { out_of_range, threads_full, exits_full, too_large, unreadable, unattributed, writes_full } =
            *lost;
        Self { out_of_range, threads_full, exits_full, too_large, unreadable, unattributed, writes_full }
    }
}

impl RecordedLost {
    pub(super) fn add_to(&self, lost: &mut LostEvents) {
        let add = |sum: &mut u64, more: u64| *sum = sum.saturating_add(more);
        add(&mut lost.out_of_range, self.out_of_range);
        add(&mut lost.threads_full, self.threads_full);
        add(&mut lost.exits_full, self.exits_full);
        add(&mut lost.too_large, self.too_large);
        add(&mut lost.unreadable, self.unreadable);
        add(&mut lost.unattributed, self.unattributed);
        add(&mut lost.writes_full, self.writes_full);
    }

    fn counts(&self) -> [u64; 7] {
        let Self { out_of_range, threads_full, exits_full, too_large, unreadable, unattributed, writes_full } = *self;
        [out_of_range, threads_full, exits_full, too_large, unreadable, unattributed, writes_full]
    }
}

fn sparse(bins: &[u32]) -> Vec<Bin> {
    bins.iter().enumerate().filter(|(_, count)| **count > 0).map(|(bin, &count)| (bin as u32, count)).collect()
}

fn add_bins(bins: &mut [u32], more: &[Bin]) {
    for &(bin, count) in more {
        if let Some(sum) = bins.get_mut(bin as usize) {
            *sum = sum.wrapping_add(count);
        }
    }
}

impl RecordedTimes {
    fn of(times: &ExitTimes) -> Self {
        let ExitTimes { count, total_ns, longest_ns, ref bins } = *times;
        Self { count, total_ns, longest_ns: longest_ns.min(MAX_COUNT), bins: sparse(bins) }
    }

    fn add_to(&self, times: &mut ExitTimes) {
        times.count = times.count.saturating_add(self.count);
        times.total_ns = times.total_ns.saturating_add(self.total_ns);
        times.longest_ns = self.longest_ns;
        add_bins(&mut times.bins, &self.bins);
    }
}

impl RecordedThread {
    /// What a thread did, as [`ThreadEvents::since`] tells it.
    pub(super) fn of(thread_id: u32, name: Option<String>, new: &ThreadEvents) -> Self {
        let times = |all: &BTreeMap<String, ExitTimes>| {
            all.iter().map(|(reason, times)| (reason.clone(), RecordedTimes::of(times))).collect()
        };
        let space = |(&address_space, space): (&AddressSpace, &SpaceEvents)| RecordedSpace {
            address_space,
            pages_made_writable: space.pages_made_writable,
            first_writes: sparse(&space.first_writes),
        };
        let code = |(&(address_space, instruction), &pages): (&(AddressSpace, Gva), &u64)| RecordedCode {
            address_space,
            instruction,
            pages,
        };
        Self {
            thread_id,
            name,
            pages_made_writable: new.pages_made_writable,
            huge_mappings: new.huge_mappings,
            dirty_ring_pushes: new.dirty_ring_pushes,
            pages_logged: new.pages_logged,
            guest_exits: new.guest_exits,
            exits: times(&new.exits),
            guest_exit_reasons: times(&new.guest_exit_reasons),
            first_writes: sparse(&new.first_writes),
            spaces: new.spaces.iter().map(space).collect(),
            code: new.code.iter().map(code).collect(),
        }
    }

    /// The thread's counters, if they were `before` at the look before.
    pub(super) fn onto(&self, before: Option<&ThreadEvents>) -> ThreadEvents {
        let nothing = ThreadEvents::default();
        let before = before.unwrap_or(&nothing);
        let add = |sum: u64, more: u64| sum.saturating_add(more);
        let times = |before: &BTreeMap<String, ExitTimes>, new: &BTreeMap<String, RecordedTimes>| {
            let one = |(reason, new): (&String, &RecordedTimes)| {
                let mut times = before.get(reason).cloned().unwrap_or_default();
                new.add_to(&mut times);
                (reason.clone(), times)
            };
            new.iter().map(one).collect()
        };
        let bins = |before: &[u32], new: &[Bin]| {
            let mut bins = before.to_vec();
            bins.resize(FIRST_WRITE_BINS as usize, 0);
            add_bins(&mut bins, new);
            bins
        };
        // What is not listed any more was forgotten: if it comes back it counts from nothing.
        let spaces = self.spaces.iter().map(|new| {
            let old = before.spaces.get(&new.address_space).cloned().unwrap_or_default();
            let space = SpaceEvents {
                pages_made_writable: add(old.pages_made_writable, new.pages_made_writable),
                first_writes: bins(&old.first_writes, &new.first_writes),
            };
            (new.address_space, space)
        });
        let code = self.code.iter().map(|new| {
            let place = (new.address_space, new.instruction);
            (place, add(before.code.get(&place).copied().unwrap_or_default(), new.pages))
        });
        ThreadEvents {
            pages_made_writable: add(before.pages_made_writable, self.pages_made_writable),
            huge_mappings: add(before.huge_mappings, self.huge_mappings),
            dirty_ring_pushes: add(before.dirty_ring_pushes, self.dirty_ring_pushes),
            pages_logged: add(before.pages_logged, self.pages_logged),
            guest_exits: add(before.guest_exits, self.guest_exits),
            exits: times(&before.exits, &self.exits),
            guest_exit_reasons: times(&before.guest_exit_reasons, &self.guest_exit_reasons),
            first_writes: bins(&before.first_writes, &self.first_writes),
            spaces: spaces.collect(),
            code: code.collect(),
        }
    }

    fn check(&self) -> Result<(), &'static str> {
        let bins = |all: &[Bin], most: usize| all.len() <= most && all.iter().all(|&(bin, _)| (bin as usize) < most);
        let times = |times: &RecordedTimes| {
            let counts = [times.count, times.total_ns, times.longest_ns];
            counts.iter().all(|&count| count <= MAX_COUNT) && bins(&times.bins, EXIT_TIME_BINS)
        };
        let first = FIRST_WRITE_BINS as usize;
        let counts =
            [self.pages_made_writable, self.huge_mappings, self.dirty_ring_pushes, self.pages_logged, self.guest_exits];
        let reasons = self.exits.len() + self.guest_exit_reasons.len();
        let sound = counts.iter().all(|&count| count <= MAX_COUNT)
            && reasons <= MAX_EXITS as usize
            && self.exits.values().chain(self.guest_exit_reasons.values()).all(times)
            && bins(&self.first_writes, first)
            && self.spaces.len() <= MAX_SPACES as usize
            && self.spaces.iter().all(|s| s.pages_made_writable <= MAX_COUNT && bins(&s.first_writes, first))
            && self.code.len() <= MAX_CODE as usize
            && self.code.iter().all(|code| code.pages <= MAX_COUNT);
        if sound { Ok(()) } else { Err("a thread has more than any thread can have") }
    }
}

/// The set as frames to skip and frames to take, in turn.
pub(super) fn runs(pages: &PageBitmap) -> Vec<u64> {
    let mut all: Vec<u64> = Vec::new();
    let mut end = 0;
    for run in pages.runs(u32::MAX) {
        all.extend([run.first.0 - end, run.count.into()]);
        end = run.end();
    }
    all
}

/// Adds the runs, which were checked, to a set.
pub(super) fn take_runs(runs: &[u64], into: &mut PageBitmap) {
    let mut at = 0;
    for run in runs.chunks(2) {
        at += run[0];
        let end = at + run.get(1).copied().unwrap_or(0);
        while at < end {
            // Up to the end of the word that `at` is in.
            let (bit, left) = (at % 64, end - at);
            let take = left.min(64 - bit);
            let bits = if take == 64 { u64::MAX } else { ((1 << take) - 1) << bit };
            into.or_word((at / 64) as usize, bits);
            at += take;
        }
    }
}

/// The member that every line has.
#[derive(Deserialize)]
struct Kind {
    schema: String,
}

/// What a line says that it is.
fn kind_of(line: &[u8]) -> Result<String, String> {
    if line.len() > MAX_LINE_BYTES {
        return Err("it is too long".to_owned());
    }
    let kind: Kind = serde_json::from_slice(line).map_err(|error| format!("it is no line of a recording: {error}"))?;
    Ok(kind.schema)
}

/// Reads a line of one kind.
fn read<T: Schema + for<'de> Deserialize<'de>>(line: &[u8]) -> Result<T, String> {
    let kind = kind_of(line)?;
    if kind != T::SCHEMA {
        return Err(format!("its schema is `{}`, where `{}` belongs", shown(&kind), T::SCHEMA));
    }
    serde_json::from_slice(line).map_err(|error| error.to_string())
}

/// A word of a file, fit for a terminal.
fn shown(word: &str) -> String {
    word.chars().take(MAX_WORD).map(|c| if c.is_control() { '?' } else { c }).collect()
}

impl RecordingHeader {
    /// Reads and checks the first line.
    ///
    /// # Errors
    /// In words, what is wrong with it.
    pub(super) fn parse(line: &[u8]) -> Result<Self, String> {
        let mut header: Self = read(line)?;
        if header.frames == 0 || header.frames > MAX_FRAMES {
            return Err(format!("`frames` must be 1 to {MAX_FRAMES}"));
        }
        if header.interval_ns > MAX_GAP_NS || header.sources.len() > MAX_SOURCES {
            return Err("intervals of more than a day, or more sources than there are".to_owned());
        }
        header.vm.name = shown(&header.vm.name);
        for source in &mut header.sources {
            source.name = shown(&source.name);
            source.gives = shown(&source.gives);
            source.missing = source.missing.as_deref().map(shown);
        }
        Ok(header)
    }
}

impl RecordedSample {
    /// Reads and checks a line that follows one of `before_ns` in a recording of `frames`.
    ///
    /// # Errors
    /// In words, what is wrong with it.
    pub(super) fn parse(line: &[u8], frames: u64, before_ns: u64) -> Result<Self, String> {
        let mut sample: Self = read(line)?;
        if sample.at_ns.checked_sub(before_ns).is_none_or(|gap| gap > MAX_GAP_NS) {
            return Err("its time lies before that of the line above, or more than a day behind it".to_owned());
        }
        let ids: BTreeSet<u32> = sample.threads.iter().map(|thread| thread.thread_id).collect();
        if ids.len() != sample.threads.len() || ids.len() > MAX_THREADS as usize {
            return Err("a thread is there twice, or there are too many".to_owned());
        }
        sample.threads.iter().try_for_each(RecordedThread::check)?;
        if sample.lost.counts().iter().any(|&count| count > MAX_COUNT) {
            return Err("more events were lost than there can be".to_owned());
        }
        let total = sample.pages.iter().try_fold(0u64, |sum, &pages| sum.checked_add(pages));
        let gaps = sample.pages.iter().skip(1).all(|&pages| pages > 0);
        if !sample.pages.len().is_multiple_of(2) || !gaps || total.is_none_or(|total| total > frames) {
            return Err("its pages are no runs within the frames that the first line names".to_owned());
        }
        for thread in &mut sample.threads {
            thread.name = thread.name.as_deref().map(shown);
            for reasons in [&mut thread.exits, &mut thread.guest_exit_reasons] {
                *reasons = std::mem::take(reasons).into_iter().map(|(reason, times)| (shown(&reason), times)).collect();
            }
        }
        Ok(sample)
    }
}

/// For fuzzing: reads `input` as a whole recording, and what was taken must be written as it was read.
///
/// # Panics
/// If a promise is broken.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz(input: &[u8]) {
    /// Frames that are really kept: a bitmap of 128 KiB.
    const KEPT: u64 = 1 << 20;
    let mut lines = input.split(|&byte| byte == b'\n');
    let Ok(header) = RecordingHeader::parse(lines.next().unwrap_or_default()) else { return };
    let written = serde_json::to_vec(&header.tagged()).expect("what was read can be written");
    assert_eq!(RecordingHeader::parse(&written).as_ref(), Ok(&header));
    let (mut before_ns, mut threads) = (0, BTreeMap::<u32, ThreadEvents>::new());
    let mut lost = LostEvents::default();
    for line in lines {
        let Ok(read) = RecordedLine::parse(line, header.frames, before_ns) else { continue };
        let written = match &read {
            RecordedLine::Writes(writes) => serde_json::to_vec(&writes.tagged()),
            RecordedLine::Sample(sample) => serde_json::to_vec(&sample.tagged()),
        };
        let written = written.expect("what was read can be written");
        assert_eq!(RecordedLine::parse(&written, header.frames, before_ns).as_ref(), Ok(&read));
        let sample = match read {
            RecordedLine::Sample(sample) => sample,
            RecordedLine::Writes(writes) => {
                let mut told = Vec::new();
                if writes.add_to(&mut told).is_ok() {
                    assert_eq!(RecordedWrites::of(&told, 0), writes);
                }
                continue;
            }
        };
        before_ns = sample.at_ns;
        threads = sample.threads.iter().map(|new| (new.thread_id, new.onto(threads.get(&new.thread_id)))).collect();
        sample.lost.add_to(&mut lost);
        if header.frames <= KEPT {
            let mut pages = PageBitmap::new(crate::model::PageCount(header.frames));
            take_runs(&sample.pages, &mut pages);
            let taken: u64 = sample.pages.iter().skip(1).step_by(2).sum();
            assert_eq!(pages.count().0, taken);
        }
    }
    let _ = lost.total();
}

/// For the documentation's test and as seeds: a header and a sample with every member that they can have.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn samples() -> Vec<serde_json::Value> {
    let vm =
        RecordedVm { name: "web1".to_owned(), vm_id: VmId(uuid::Uuid::nil()), pid: 7, start_time_ticks: 9, cpus: 1 };
    let source = RecordedSource {
        name: "kvm_exit".to_owned(),
        gives: "exits".to_owned(),
        missing: Some("this kernel has no such tracepoint".to_owned()),
    };
    let header = RecordingHeader {
        vm,
        began_unix_ms: 1,
        interval_ns: 1_000_000_000,
        armed: true,
        writes: true,
        frames: 1 << 16,
        sources: vec![source],
    };
    let times = RecordedTimes { count: 2, total_ns: 3000, longest_ns: 2000, bins: vec![(9, 1), (10, 1)] };
    let space = RecordedSpace { address_space: AddressSpace(4096), pages_made_writable: 3, first_writes: vec![(1, 3)] };
    let code = RecordedCode { address_space: AddressSpace(4096), instruction: Gva(0x1000), pages: 3 };
    let thread = RecordedThread {
        thread_id: 8,
        name: Some("vcpu0".to_owned()),
        pages_made_writable: 3,
        huge_mappings: 0,
        dirty_ring_pushes: 0,
        pages_logged: 0,
        guest_exits: 2,
        exits: [("REASON".to_owned(), times.clone())].into(),
        guest_exit_reasons: [("REASON".to_owned(), times)].into(),
        first_writes: vec![(1, 3)],
        spaces: vec![space],
        code: vec![code],
    };
    let sample = RecordedSample {
        at_ns: 1_000_000_000,
        logged: false,
        threads: vec![thread],
        lost: RecordedLost { writes_full: 1, ..RecordedLost::default() },
        pages: vec![70, 2, 100, 1],
    };
    let writes = RecordedWrites { writes: vec![vec![999_000_000, 8, 70, 1, 1, 4096, 4096]] };
    let lines = [
        serde_json::to_value(header.tagged()),
        serde_json::to_value(writes.tagged()),
        serde_json::to_value(sample.tagged()),
    ];
    lines.into_iter().flatten().collect()
}

/// For fuzzing: a recording.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz_seeds() -> Vec<Vec<u8>> {
    let lines: Vec<String> = samples().iter().map(ToString::to_string).collect();
    vec![lines.join("\n").into_bytes()]
}
