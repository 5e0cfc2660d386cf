//! Reading a recording, and giving it again as an event source.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::format::{RecordedLine, RecordedSample, RecordingHeader, take_runs};
use super::{MAX_LINE_BYTES, RecordingError};
use crate::model::{GuestWrite, PageBitmap, PageCount};
use crate::port::{Arm, ArmError, Clock, EventHook, EventSample, EventSource, EventSourceError};

/// The look that is shown at present.
#[derive(Debug, Default)]
struct Shown {
    at: Duration,
    sample: EventSample,
    runs: Vec<u64>,
    writes: Vec<GuestWrite>,
}

/// A recording that is being read.
#[derive(Debug)]
pub struct Replay {
    file: BufReader<File>,
    path: String,
    line: u64,
    header: RecordingHeader,
    shown: Arc<Mutex<Shown>>,
    broke_off: bool,
}

/// What is known of a look besides what its source shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replayed {
    /// When it was taken, after the first.
    pub at: Duration,
    /// Whether someone else had the dirty log on.
    pub logged: bool,
    /// The names that threads had.
    pub names: BTreeMap<u32, String>,
}

impl Replay {
    /// Opens a recording and reads its header.
    ///
    /// # Errors
    /// The file cannot be read, or is no recording.
    pub fn open(path: &Path) -> Result<Self, RecordingError> {
        let shown = path.display().to_string();
        let file = File::open(path).map_err(|source| RecordingError::Io { path: shown.clone(), source })?;
        let mut file = BufReader::new(file);
        let line = next_line(&mut file).map_err(|source| RecordingError::Io { path: shown.clone(), source })?;
        let line = line.unwrap_or_default();
        let header = RecordingHeader::parse(&line.bytes).map_err(|problem| RecordingError::Damaged {
            path: shown.clone(),
            line: 1,
            problem,
        })?;
        Ok(Self { file, path: shown, line: 1, header, shown: Arc::default(), broke_off: false })
    }

    /// The first line.
    pub fn header(&self) -> &RecordingHeader {
        &self.header
    }

    /// The source, which shows the look that was read last.
    pub fn source(&self) -> ReplaySource {
        let hooks = self.header.sources.iter().map(|source| EventHook {
            name: source.name.clone(),
            gives: source.gives.clone(),
            missing: source.missing.clone(),
        });
        ReplaySource { hooks: hooks.collect(), frames: PageCount(self.header.frames), shown: Arc::clone(&self.shown) }
    }

    /// The clock that stands at the time of that look.
    pub fn clock(&self) -> ReplayClock {
        ReplayClock(Arc::clone(&self.shown))
    }

    /// What stands for the write protection that there was; none where there was none.
    pub fn arm(&self) -> Option<Box<dyn Arm>> {
        self.header.armed.then(|| Box::new(NoArm) as Box<dyn Arm>)
    }

    /// Reads the next look and has the source show it; none at the end.
    ///
    /// # Errors
    /// A damaged line with others behind it, or the file cannot be read any more.
    pub fn advance(&mut self) -> Result<Option<Replayed>, RecordingError> {
        let mut writes = Vec::new();
        let Some(sample) = self.next_sample(&mut writes)? else { return Ok(None) };
        let at = Duration::from_nanos(sample.at_ns);
        let mut shown = lock(&self.shown);
        let before = &shown.sample.threads;
        let threads = sample.threads.iter().map(|new| (new.thread_id, new.onto(before.get(&new.thread_id)))).collect();
        shown.sample.threads = threads;
        sample.lost.add_to(&mut shown.sample.lost);
        shown.at = at;
        shown.runs = sample.pages;
        shown.writes = writes;
        let names = sample.threads.into_iter().filter_map(|thread| Some((thread.thread_id, thread.name?))).collect();
        Ok(Some(Replayed { at, logged: sample.logged, names }))
    }

    /// Reads on to the next look; the single writes before it go into `writes`.
    fn next_sample(&mut self, writes: &mut Vec<GuestWrite>) -> Result<Option<RecordedSample>, RecordingError> {
        let before_ns = lock(&self.shown).at.as_nanos() as u64;
        loop {
            let line =
                next_line(&mut self.file).map_err(|source| RecordingError::Io { path: self.path.clone(), source })?;
            let Some(line) = line else { return Ok(None) };
            self.line += 1;
            let read = RecordedLine::parse(&line.bytes, self.header.frames, before_ns);
            let read = read.and_then(|line| match line {
                RecordedLine::Sample(sample) => Ok(Some(sample)),
                RecordedLine::Writes(more) => more.add_to(writes).map(|()| None),
            });
            match read {
                Ok(Some(sample)) => return Ok(Some(sample)),
                Ok(None) => {}
                Err(_) if !line.is_whole => {
                    self.broke_off = true;
                    return Ok(None);
                }
                Err(problem) => {
                    return Err(RecordingError::Damaged { path: self.path.clone(), line: self.line, problem });
                }
            }
        }
    }

    /// Whether the recording ended within a line, which was skipped.
    pub fn broke_off(&self) -> bool {
        self.broke_off
    }
}

fn lock(shown: &Mutex<Shown>) -> MutexGuard<'_, Shown> {
    shown.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Default)]
struct Line {
    bytes: Vec<u8>,
    /// Whether its end was there.
    is_whole: bool,
}

/// The next line without its end; never more than a line may have. None at the end of the file.
fn next_line(file: &mut impl BufRead) -> io::Result<Option<Line>> {
    let mut bytes = Vec::new();
    file.by_ref().take(MAX_LINE_BYTES as u64 + 1).read_until(b'\n', &mut bytes)?;
    if bytes.is_empty() {
        return Ok(None);
    }
    // A line that is too long is no cut-off one: there is more of it.
    let is_whole = bytes.pop_if(|byte| *byte == b'\n').is_some() || bytes.len() > MAX_LINE_BYTES;
    Ok(Some(Line { bytes, is_whole }))
}

/// The events of a recording.
#[derive(Debug)]
pub struct ReplaySource {
    hooks: Vec<EventHook>,
    frames: PageCount,
    shown: Arc<Mutex<Shown>>,
}

impl EventSource for ReplaySource {
    fn hooks(&self) -> &[EventHook] {
        &self.hooks
    }

    fn empty_pages(&self) -> PageBitmap {
        PageBitmap::new(self.frames)
    }

    fn sample(&mut self, pages: &mut PageBitmap) -> Result<EventSample, EventSourceError> {
        let shown = lock(&self.shown);
        take_runs(&shown.runs, pages);
        Ok(shown.sample.clone())
    }

    fn take_writes(&mut self, into: &mut Vec<GuestWrite>) {
        into.extend_from_slice(&lock(&self.shown).writes);
    }

    fn armed(&mut self, _: bool) {}
}

/// The time of a recording. Nothing waits by it.
#[derive(Debug)]
pub struct ReplayClock(Arc<Mutex<Shown>>);

impl Clock for ReplayClock {
    fn now(&self) -> Duration {
        lock(&self.0).at
    }

    fn sleep(&self, _: Duration) {}
}

/// The VM was protected when it was recorded; there is nothing to protect now.
struct NoArm;

impl Arm for NoArm {
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
