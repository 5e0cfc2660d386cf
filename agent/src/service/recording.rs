//! Keeping what tracking sees of one VM in a file, and making the same figures of it again.
//!
//! Joins observing and the store's recordings: a replay runs the very policy code that made the figures of the live run, on the events and
//! times that the file holds.

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::interrupt::Interrupt;
use super::intervals::printed;
use super::inventory::HostVm;
use super::observe::{
    DirtyRateReport, Ended, ObserveRequest, ObserveVmError, Observed, missing_sources, observe_logged,
};
use crate::model::GuestWrite;
use crate::port::{EventSource, SampleLog};
use crate::probe::KernelCounters;
use crate::store::recording::{RecordedSource, RecordedVm, Recorder, RecordingError, RecordingHeader, Replay};
use crate::time::unix_ms;
use crate::track::{ObserveError, Observer};

/// What to record, and where.
#[derive(Clone, Debug)]
pub struct RecordRequest {
    /// What to observe.
    pub observe: ObserveRequest,
    /// The file, which must not exist.
    pub file: PathBuf,
    /// The most that it may hold.
    pub max_bytes: u64,
}

/// Observes as [`super::observe::observe`] does, and records what it sees.
///
/// # Errors
/// As there; or the file cannot be made or written, or has reached its size. What it holds by then can be replayed.
pub fn record(
    request: &RecordRequest,
    interrupt: &Interrupt,
    each: impl FnMut(&DirtyRateReport) -> io::Result<()>,
) -> Result<Ended, ObserveVmError> {
    let open = |vm: &HostVm, counters: &KernelCounters| -> Result<Option<Box<dyn SampleLog>>, RecordingError> {
        let header = RecordingHeader {
            vm: RecordedVm {
                name: vm.name.clone(),
                vm_id: vm.vm_id,
                pid: vm.pid,
                start_time_ticks: vm.start_time_ticks,
                cpus: vm.vcpus.len() as u32,
            },
            began_unix_ms: unix_ms(),
            interval_ns: request.observe.interval.as_nanos() as u64,
            armed: request.observe.arm,
            writes: request.observe.single_writes.is_some(),
            frames: counters.empty_pages().len().0,
            sources: counters.hooks().iter().map(RecordedSource::from).collect(),
        };
        let process = vm.process.clone();
        let name_of = move |thread| process.thread_name(thread);
        Ok(Some(Box::new(Recorder::create(&request.file, &header, request.max_bytes, name_of)?)))
    };
    observe_logged(&request.observe, interrupt, open, each)
}

/// What to replay.
#[derive(Clone, Debug)]
pub struct ReplayRequest {
    /// The recording.
    pub file: PathBuf,
    /// How many times faster than it was, at least [`SLOWEST`]; none for without waiting.
    pub speed: Option<f64>,
    /// Whether single writes are wanted, so that a recording without them is refused.
    pub writes: bool,
}

/// The slowest replay: an interval of a day, the longest that a recording may have, takes 100 days.
pub const SLOWEST: f64 = 0.01;

/// How a replay ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplayEnded {
    /// As an observation does.
    pub ended: Ended,
    /// Whether the recording ends within a line, which was left out.
    pub broke_off: bool,
}

/// Why there is nothing to report.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The file.
    #[error(transparent)]
    Recording(#[from] RecordingError),
    /// The observation broke off.
    #[error(transparent)]
    Track(#[from] ObserveError),
    /// A report could not be printed.
    #[error("a report could not be printed")]
    Print(#[from] io::Error),
    /// Nobody asked for them when it was made.
    #[error("{0} holds no single writes: it was recorded without `--writes`")]
    NoWrites(String),
}

/// Reports to `each` what was reported when the recording was made, and the single writes of each interval, if they were kept.
///
/// # Errors
/// The file cannot be read, or is damaged.
pub fn replay(
    request: &ReplayRequest,
    interrupt: &Interrupt,
    mut each: impl FnMut(&DirtyRateReport, &[GuestWrite]) -> io::Result<()>,
) -> Result<ReplayEnded, ReplayError> {
    let mut recording = Replay::open(&request.file)?;
    let has_writes = recording.header().writes;
    if request.writes && !has_writes {
        return Err(ReplayError::NoWrites(request.file.display().to_string()));
    }
    let vm = &recording.header().vm;
    let vm = Observed { name: vm.name.clone(), vm_id: Some(vm.vm_id), pid: vm.pid, cpus: vm.cpus };
    let began = Instant::now();
    if recording.advance()?.is_none() {
        return Ok(ReplayEnded { ended: Ended::Counted, broke_off: recording.broke_off() });
    }
    let mut observer = Observer::start(recording.source(), recording.clock(), recording.arm())?;
    let missing_sources = missing_sources(observer.hooks());
    let ended = loop {
        let Some(look) = recording.advance()? else { break Ended::Counted };
        let due = request.speed.map_or(Duration::ZERO, |speed| look.at.div_f64(speed.max(SLOWEST)));
        // A time that lies behind all instants is waited for as long as one can.
        let deadline = began.checked_add(due).unwrap_or_else(|| Instant::now() + Duration::from_hours(1));
        if interrupt.wait_until(deadline) {
            break Ended::Interrupted;
        }
        let mut rate = observer.measure(look.logged)?;
        for thread in &mut rate.threads {
            thread.name = look.names.get(&thread.thread_id).cloned();
        }
        let single_writes = has_writes.then(|| observer.writes().len() as u64);
        let missing_sources = missing_sources.clone();
        let report = DirtyRateReport { vm: vm.clone(), rate, missing_sources, single_writes };
        if let Some(ended) = printed(each(&report, observer.writes()))? {
            break ended;
        }
    };
    Ok(ReplayEnded { ended, broke_off: recording.broke_off() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::schema::Schema;
    use crate::model::{AddressSpace, ExitTimes, Gfn, Gva, PageBitmap, PageCount, Random, VmId};
    use crate::port::{Arm, ArmError, Clock, EventHook, EventSample, EventSourceError, LostEvents, ThreadEvents};

    const FRAMES: PageCount = PageCount(5000);

    /// Threads that come and start anew, pages, exits, losses: whatever a seed makes of them.
    struct Storm {
        dice: Random,
        sample: EventSample,
        hooks: Vec<EventHook>,
        writes: std::sync::Arc<std::sync::Mutex<Vec<GuestWrite>>>,
    }

    impl Storm {
        fn new(seed: u64) -> Self {
            let missing = Some("not here".to_owned());
            let hooks = vec![EventHook { name: "kvm_exit".to_owned(), gives: "exits".to_owned(), missing }];
            Self { dice: Random(seed), sample: EventSample::default(), hooks, writes: std::sync::Arc::default() }
        }
    }

    impl EventSource for Storm {
        fn hooks(&self) -> &[EventHook] {
            &self.hooks
        }

        fn empty_pages(&self) -> PageBitmap {
            PageBitmap::new(FRAMES)
        }

        fn sample(&mut self, pages: &mut PageBitmap) -> Result<EventSample, EventSourceError> {
            for _ in 0..self.dice.below(300) {
                pages.insert(self.dice.below(FRAMES.0));
            }
            for thread in 0..self.dice.below(4) as u32 {
                let events = self.sample.threads.entry(thread).or_default();
                if self.dice.below(5) == 0 {
                    *events = ThreadEvents::default();
                }
                events.pages_made_writable += self.dice.below(1000);
                events.dirty_ring_pushes += self.dice.below(100_000);
                events.guest_exits += self.dice.below(10);
                let count = self.dice.below(50);
                let times = ExitTimes { count, total_ns: 7 * count, ..ExitTimes::default() };
                events.exits.entry(format!("reason-{}", self.dice.below(3))).or_default().add(&times);
            }
            self.sample.lost =
                LostEvents { unreadable: self.sample.lost.unreadable + self.dice.below(3), ..LostEvents::default() };
            Ok(self.sample.clone())
        }

        fn take_writes(&mut self, into: &mut Vec<GuestWrite>) {
            // More than a line holds, once in a while.
            let most = if self.dice.below(20) == 0 { 100_000 } else { 50 };
            for _ in 0..self.dice.below(most) {
                let pages = 1 + self.dice.below(512) as u32;
                let address_space = (self.dice.below(2) == 0).then_some(AddressSpace(4096));
                into.push(GuestWrite {
                    at_ns: (1 << 40) + self.dice.below(1 << 40),
                    thread_id: self.dice.below(4) as u32,
                    gfn: Gfn(self.dice.below(FRAMES.0)),
                    pages,
                    fresh: self.dice.below(2) as u32 * pages,
                    address_space,
                    instruction: address_space.filter(|_| self.dice.below(2) == 0).map(|_| Gva(u64::MAX)),
                });
            }
            self.writes.lock().unwrap().extend_from_slice(into);
        }

        fn armed(&mut self, _: bool) {}
    }

    /// Time that passes unevenly, by a nanosecond and more.
    struct Uneven(std::sync::Mutex<(Random, u64)>);

    impl Clock for Uneven {
        fn now(&self) -> Duration {
            let mut inner = self.0.lock().unwrap();
            inner.1 += 1 + inner.0.below(3_000_000_007);
            Duration::from_nanos(inner.1)
        }

        fn sleep(&self, _: Duration) {}
    }

    struct Nothing;

    impl Arm for Nothing {
        fn arm(&mut self) -> Result<(), ArmError> {
            Ok(())
        }

        fn rearm(&mut self) -> Result<(), ArmError> {
            Ok(())
        }

        fn disarm(&mut self) -> Result<(), ArmError> {
            Ok(())
        }
    }

    fn line(report: &DirtyRateReport) -> String {
        serde_json::to_string(&report.tagged()).unwrap()
    }

    #[test]
    fn a_replay_prints_byte_for_byte_what_was_printed_live() {
        for seed in 0..20u64 {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("recording");
            let storm = Storm::new(seed);
            let told = std::sync::Arc::clone(&storm.writes);
            let armed = seed % 3 == 0;
            let vm = Observed { name: "a".to_owned(), vm_id: Some(VmId::random()), pid: 5, cpus: 2 };
            let header = RecordingHeader {
                vm: RecordedVm {
                    name: vm.name.clone(),
                    vm_id: vm.vm_id.unwrap(),
                    pid: vm.pid,
                    start_time_ticks: 1,
                    cpus: vm.cpus,
                },
                began_unix_ms: 0,
                interval_ns: 1,
                armed,
                writes: true,
                frames: FRAMES.0,
                sources: storm.hooks.iter().map(RecordedSource::from).collect(),
            };
            let recorder = Recorder::create(&file, &header, 1 << 30, |thread| Some(format!("vcpu{thread}"))).unwrap();
            let clock = Uneven(std::sync::Mutex::new((Random(seed), 1 << 40)));
            let arm = armed.then(|| Box::new(Nothing) as Box<dyn Arm>);
            let mut observer = Observer::start_logged(storm, clock, arm, Some(Box::new(recorder))).unwrap();
            let missing_sources = missing_sources(observer.hooks());
            let live: Vec<String> = (0..30)
                .map(|interval| {
                    let mut rate = observer.measure(interval % 4 == 0).unwrap();
                    rate.threads.iter_mut().for_each(|thread| thread.name = Some(format!("vcpu{}", thread.thread_id)));
                    let missing_sources = missing_sources.clone();
                    let single_writes = Some(observer.writes().len() as u64);
                    line(&DirtyRateReport { vm: vm.clone(), rate, missing_sources, single_writes })
                })
                .collect();
            let (never, _wake) = Interrupt::by_hand().unwrap();
            let mut replayed = Vec::new();
            let request = ReplayRequest { file, speed: None, writes: true };
            let mut writes = Vec::new();
            let ended = replay(&request, &never, |report, new| {
                replayed.push(line(report));
                writes.extend_from_slice(new);
                Ok(())
            });
            assert_eq!(ended.unwrap(), ReplayEnded { ended: Ended::Counted, broke_off: false });
            assert_eq!(replayed, live, "seed {seed}");
            // Those of the first look belong to no interval; all others are there, counted from that look on.
            let told = told.lock().unwrap();
            assert!(writes.len() > 300 && writes.len() <= told.len());
            let began_ns = told.last().unwrap().at_ns - writes.last().unwrap().at_ns;
            for (told, write) in told[told.len() - writes.len()..].iter().zip(&writes) {
                assert_eq!(*write, GuestWrite { at_ns: told.at_ns.saturating_sub(began_ns), ..*told }, "seed {seed}");
            }
        }
    }

    #[test]
    fn a_replay_takes_the_time_that_it_is_asked_to_take_and_can_be_interrupted() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("recording");
        let mut lines: Vec<String> = crate::store::recording::samples().iter().map(ToString::to_string).collect();
        lines.remove(1);
        let sample = lines.pop().unwrap();
        lines.extend(
            [0u64, 200_000_000, 400_000_000]
                .map(|at| sample.replace(":1000000000,\"logged", &format!(":{at},\"logged"))),
        );
        std::fs::write(&file, lines.join("\n")).unwrap();
        let (never, wake) = Interrupt::by_hand().unwrap();
        let began = Instant::now();
        let fast = ReplayRequest { file: file.clone(), speed: Some(4.0), writes: false };
        let ended = replay(&fast, &never, |_, _| Ok(())).unwrap();
        assert!(ended.ended == Ended::Counted && began.elapsed() >= Duration::from_millis(100));
        drop(wake);
        let slow = ReplayRequest { file, speed: Some(SLOWEST), writes: false };
        assert_eq!(replay(&slow, &never, |_, _| Ok(())).unwrap().ended, Ended::Interrupted);
    }
}
