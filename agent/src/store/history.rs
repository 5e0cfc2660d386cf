//! The log of migrations that are over: one JSON object a line, bounded.
//!
//! Owns the two files and their sizes. What a line that cannot be read says is lost, and no other. Nothing is synced: a log that ends a line early is still one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::model::foretold::MigrationRecord;
use crate::model::schema::Schema;

/// The file's name in the state folder.
const NAME: &str = "migrations.jsonl";
/// What was before it.
const OLDER: &str = "migrations.jsonl.1";
/// A file that is as large is put aside: some 400 migrations.
const MOST_BYTES: u64 = 256 << 10;

/// The records that are kept, and what could not be read.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// The oldest first.
    pub records: Vec<MigrationRecord>,
    /// Lines that are no records.
    pub damaged_lines: u32,
}

/// The log in a state folder.
#[derive(Clone, Debug)]
pub struct HistoryLog {
    folder: PathBuf,
}

impl HistoryLog {
    /// The log in `folder`, which need not exist.
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// Adds a record.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn append(&self, record: &MigrationRecord) -> io::Result<()> {
        let path = self.folder.join(NAME);
        if fs::metadata(&path).is_ok_and(|file| file.len() >= MOST_BYTES) {
            fs::rename(&path, self.folder.join(OLDER))?;
        }
        let mut line = serde_json::to_string(&record.tagged())?;
        line.push('\n');
        let mut file = OpenOptions::new().create(true).append(true).open(path)?;
        file.write_all(line.as_bytes())
    }

    /// Everything that is kept; a folder without a log has none. Lines that are no records are counted, and said in a warning.
    pub fn read(&self) -> History {
        let mut history = History::default();
        for name in [OLDER, NAME] {
            let path = self.folder.join(name);
            match bytes(&path) {
                Ok(bytes) => parse(&bytes, &mut history),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => tracing::warn!("{}: {error}", path.display()),
            }
        }
        if history.damaged_lines > 0 {
            tracing::warn!(
                "{} lines of the log of migrations in {} cannot be read and are left out; delete them to be rid of this warning",
                history.damaged_lines,
                self.folder.display()
            );
        }
        history
    }
}

/// No more than two files' worth: whatever else it is, it is not what we wrote.
fn bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(2 * MOST_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[derive(Deserialize)]
struct Line {
    schema: String,
    #[serde(flatten)]
    record: MigrationRecord,
}

fn parse(bytes: &[u8], into: &mut History) {
    for line in bytes.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
        match serde_json::from_slice::<Line>(line) {
            Ok(line) if line.schema == MigrationRecord::SCHEMA => into.records.push(line.record),
            _ => into.damaged_lines += 1,
        }
    }
}

/// For fuzzing: any bytes give records and damaged lines.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz(input: &[u8]) {
    let mut history = History::default();
    parse(input, &mut history);
    let lines = input.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).count();
    assert_eq!(history.records.len() + history.damaged_lines as usize, lines);
}

/// A line with every member.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) const SAMPLE: &str = r#"{"schema":"dunlin.migration-record/v1","unix_ms":1,"migration_id":"1788fa1c-c161-4db4-a6d3-dfdbc3561926","vm_name":"web1","peer":"192.0.2.7","strategy":"pre-copy","memory_bytes":268435456,"limit_bytes_per_second":125000000,"goodput_bytes_per_second":124000000,"rtt_ns":80000,"fixed_cost_ns":2600000,"setup_ns":20000000,"total_ns":2500000000,"blackout_ns":5000000,"wire_bytes":270000000,"prediction":{"plan":"pre-copy","from":"curve","bandwidth_bytes_per_second":125000000,"fixed_cost_ns":3000000,"fixed_cost_from":"default","total_ns":2400000000,"blackout_ns":6000000,"wire_bytes":260000000,"rounds":2,"total_error_percent":-4.0,"blackout_error_percent":20.0,"wire_error_percent":-3.7}}"#;

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> MigrationRecord {
        serde_json::from_str::<Line>(SAMPLE).unwrap().record
    }

    #[test]
    fn what_was_appended_is_read_and_a_damaged_line_costs_itself() {
        let folder = tempfile::tempdir().unwrap();
        let log = HistoryLog::new(folder.path());
        assert_eq!(log.read().records, []);
        log.append(&sample()).unwrap();
        let path = folder.path().join(NAME);
        let line = fs::read_to_string(&path).unwrap();
        assert_eq!(line.trim_end(), SAMPLE, "the form is kept");
        // A line that was cut, one of another schema, and bytes that are no text.
        let other = SAMPLE.replace("migration-record/v1", "other/v1");
        let damaged = [line.as_bytes(), &SAMPLE.as_bytes()[..90], b"\n", other.as_bytes(), b"\n\xff\xfe\n\n"].concat();
        fs::write(&path, damaged).unwrap();
        log.append(&sample()).unwrap();
        let history = log.read();
        assert_eq!((history.records, history.damaged_lines), (vec![sample(), sample()], 3));
    }

    #[test]
    fn the_log_does_not_grow_without_end_and_keeps_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        let log = HistoryLog::new(folder.path());
        let many = 3 * MOST_BYTES / SAMPLE.len() as u64;
        for unix_ms in 0..many {
            log.append(&MigrationRecord { unix_ms, ..sample() }).unwrap();
        }
        let size = |name| fs::metadata(folder.path().join(name)).unwrap().len();
        assert!(size(NAME) + size(OLDER) <= 2 * (MOST_BYTES + 1024));
        let records = log.read().records;
        assert!(records.len() as u64 > MOST_BYTES / SAMPLE.len() as u64);
        let newest: Vec<u64> = records.iter().map(|record| record.unix_ms).collect();
        assert!(newest.is_sorted() && newest.last() == Some(&(many - 1)));
    }

    #[test]
    fn any_bytes_are_read() {
        for bytes in [&b""[..], b"\n\n", b"{", SAMPLE.as_bytes(), &[0xff; 99]] {
            fuzz(bytes);
        }
    }
}
