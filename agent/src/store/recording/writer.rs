//! Writing a recording.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use super::format::{
    RecordedLost, RecordedSample, RecordedThread, RecordedWrites, RecordingHeader, WRITES_IN_LINE, runs,
};
use super::{MAX_FRAMES, MAX_LINE_BYTES, RecordingError};
use crate::model::schema::Schema;
use crate::port::{EventSample, Look, SampleLog, SampleLogError, ThreadEvents};

/// A thread's name, while it lives.
type NameOf = Box<dyn Fn(u32) -> Option<String> + Send>;

/// Writes looks to a file.
pub struct Recorder {
    file: File,
    path: String,
    left_bytes: u64,
    began: Option<Duration>,
    before: EventSample,
    name_of: NameOf,
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorder")
            .field("path", &self.path)
            .field("left_bytes", &self.left_bytes)
            .finish_non_exhaustive()
    }
}

impl Recorder {
    /// Makes the file, which must not exist, of at most `max_bytes`.
    ///
    /// # Errors
    /// It exists, cannot be made, or the VM has more addresses than a recording can hold.
    pub fn create(
        path: &Path,
        header: &RecordingHeader,
        max_bytes: u64,
        name_of: impl Fn(u32) -> Option<String> + Send + 'static,
    ) -> Result<Self, RecordingError> {
        if header.frames > MAX_FRAMES {
            return Err(RecordingError::TooWide(header.frames));
        }
        let shown = path.display().to_string();
        let file =
            OpenOptions::new().write(true).create_new(true).open(path).map_err(|source| match source.kind() {
                io::ErrorKind::AlreadyExists => RecordingError::Exists(shown.clone()),
                _ => RecordingError::Io { path: shown.clone(), source },
            })?;
        let (before, name_of) = (EventSample::default(), Box::new(name_of) as NameOf);
        let mut recorder = Self { file, path: shown, left_bytes: max_bytes, began: None, before, name_of };
        recorder.write(header).map_err(|SampleLogError(problem)| RecordingError::Io {
            path: recorder.path.clone(),
            source: io::Error::other(problem),
        })?;
        Ok(recorder)
    }

    fn write(&mut self, line: &impl Schema) -> Result<(), SampleLogError> {
        let mut bytes = serde_json::to_vec(&line.tagged()).map_err(|error| SampleLogError(error.to_string()))?;
        bytes.push(b'\n');
        if bytes.len() > MAX_LINE_BYTES {
            return Err(SampleLogError(
                "one interval holds more runs of pages than a line may; take a shorter --interval".to_owned(),
            ));
        }
        self.left_bytes = self.left_bytes.checked_sub(bytes.len() as u64).ok_or_else(|| {
            SampleLogError(format!("{} has reached --max-size; what it holds can be replayed", self.path))
        })?;
        self.file.write_all(&bytes).map_err(|error| SampleLogError(format!("{}: {error}", self.path)))
    }
}

impl SampleLog for Recorder {
    fn look(&mut self, look: &Look<'_>) -> Result<(), SampleLogError> {
        let began = *self.began.get_or_insert(look.at);
        let nothing = ThreadEvents::default();
        let threads: BTreeMap<u32, ThreadEvents> = look
            .sample
            .threads
            .iter()
            .map(|(&thread, now)| (thread, now.since(self.before.threads.get(&thread).unwrap_or(&nothing))))
            .collect();
        let sample = RecordedSample {
            at_ns: look.at.saturating_sub(began).as_nanos() as u64,
            logged: look.logged,
            threads: threads
                .iter()
                .map(|(&thread, new)| RecordedThread::of(thread, (self.name_of)(thread), new))
                .collect(),
            lost: RecordedLost::from(&look.sample.lost.since(&self.before.lost)),
            pages: runs(look.pages),
        };
        self.before = look.sample.clone();
        for writes in look.writes.chunks(WRITES_IN_LINE) {
            self.write(&RecordedWrites::of(writes, began.as_nanos() as u64))?;
        }
        self.write(&sample)
    }
}
