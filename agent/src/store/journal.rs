//! The journal as files: one a migration, one JSON line a record, each line with its checksum.
//!
//! `append` returns after fsync of file and folder. A torn last line (power lost while it was written) was never
//! acknowledged and is skipped; a damaged line before it is an error.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::model::{MigrationId, VmId};
use crate::port::{Journal, JournalError, JournalRecord};

/// The longest line that is read: records are a few hundred bytes.
const MAX_LINE_BYTES: usize = 64 << 10;

/// The journals in one state folder.
#[derive(Clone, Debug)]
pub struct FileJournal {
    folder: PathBuf,
}

/// One line, as it is written. `schema` makes a file readable by itself.
#[derive(Serialize, Deserialize)]
struct Line {
    schema: String,
    unix_ms: u64,
    pid: u32,
    migration_id: MigrationId,
    vm_id: VmId,
    #[serde(flatten)]
    record: JournalRecord,
}

const SCHEMA: &str = "dunlin.journal/v1";

impl FileJournal {
    /// The journals below `state_dir`, which is made if it is absent.
    ///
    /// # Errors
    /// A folder that cannot be made or written.
    pub fn open(state_dir: &Path) -> Result<Self, JournalError> {
        let folder = state_dir.join("migrations");
        fs::create_dir_all(&folder).map_err(|source| io_failed(&folder, "making the folder", source))?;
        Ok(Self { folder })
    }

    fn path(&self, migration: MigrationId) -> PathBuf {
        self.folder.join(format!("{migration}.journal"))
    }

    /// All migrations that have a journal here, with their VM and last record; damaged files are reported and left out.
    pub fn all(&self) -> Result<Vec<(MigrationId, VmId, JournalRecord)>, JournalError> {
        let entries = fs::read_dir(&self.folder).map_err(|e| io_failed(&self.folder, "listing", e))?;
        let mut all = Vec::new();
        for entry in entries.flatten() {
            let name = entry.file_name();
            let id = name.to_str().and_then(|name| name.strip_suffix(".journal")).and_then(|id| id.parse().ok());
            let Some(id) = id.map(MigrationId) else { continue };
            match self.lines(id) {
                Ok(lines) => all.extend(lines.into_iter().next_back().map(|line| (id, line.vm_id, line.record))),
                Err(error) => tracing::warn!("{error}"),
            }
        }
        Ok(all)
    }

    fn lines(&self, migration: MigrationId) -> Result<Vec<Line>, JournalError> {
        let path = self.path(migration);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io_failed(&path, "reading", error)),
        };
        let mut lines = Vec::new();
        let mut damage = None;
        for (number, text) in BufReader::new(file).split(b'\n').enumerate() {
            let text = text.map_err(|error| io_failed(&path, "reading", error))?;
            if let Some(damage) = damage.take() {
                // Something follows the damaged line, so it was acknowledged once.
                return Err(damage);
            }
            match decode(&text) {
                Ok(line) if line.migration_id == migration => lines.push(line),
                Ok(_) => damage = Some(damaged(&path, number, "it names another migration")),
                Err(problem) => damage = Some(damaged(&path, number, &problem)),
            }
        }
        Ok(lines)
    }
}

fn io_failed(path: &Path, action: &'static str, source: io::Error) -> JournalError {
    JournalError::Io { path: path.display().to_string(), action, source }
}

fn damaged(path: &Path, number: usize, problem: &str) -> JournalError {
    JournalError::Damaged { path: path.display().to_string(), line: number + 1, problem: problem.to_owned() }
}

/// Cuts an unfinished last line off, so that the next record does not grow onto it. Returns the length that is left.
fn cut_torn_line(path: &Path, file: &File) -> io::Result<u64> {
    let bytes = fs::read(path)?;
    let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |last| last + 1);
    if whole < bytes.len() {
        file.set_len(whole as u64)?;
    }
    Ok(whole as u64)
}

fn encode(line: &Line) -> Result<String, serde_json::Error> {
    let json = serde_json::to_string(line)?;
    Ok(format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes())))
}

fn decode(text: &[u8]) -> Result<Line, String> {
    if text.len() > MAX_LINE_BYTES {
        return Err("it is too long".to_owned());
    }
    let text = std::str::from_utf8(text).map_err(|_| "it is no text".to_owned())?;
    let (crc, json) = text.split_once(' ').ok_or("it has no checksum")?;
    if u32::from_str_radix(crc, 16) != Ok(crc32fast::hash(json.as_bytes())) {
        return Err("its checksum is wrong".to_owned());
    }
    let line: Line = serde_json::from_str(json).map_err(|error| error.to_string())?;
    if line.schema == SCHEMA { Ok(line) } else { Err(format!("its schema is {}", line.schema)) }
}

/// For fuzzing: reads `bytes` as a line, and as the JSON of a line with a right checksum.
///
/// # Panics
/// If a line that was taken does not read again as it was written.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz_line(bytes: &[u8]) {
    let mut sound = format!("{:08x} ", crc32fast::hash(bytes)).into_bytes();
    sound.extend_from_slice(bytes);
    for text in [bytes, &sound] {
        let Ok(line) = decode(text) else { continue };
        let written = encode(&line).expect("what was read can be written");
        let again = decode(written.trim_end().as_bytes()).expect("what was written can be read");
        assert_eq!(encode(&again).expect("and again"), written);
    }
}

/// For fuzzing: lines as they are written, without their checksums.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz_seeds() -> Vec<Vec<u8>> {
    let nobody = uuid::Uuid::nil();
    let peer = "tcp://192.0.2.1:4460".to_owned();
    let records = [JournalRecord::Reserved, JournalRecord::Released { peer }, JournalRecord::Owner];
    let json = |record| {
        let schema = SCHEMA.to_owned();
        let (migration_id, vm_id) = (MigrationId(nobody), VmId(nobody));
        serde_json::to_vec(&Line { schema, unix_ms: 1, pid: 2, migration_id, vm_id, record }).unwrap_or_default()
    };
    records.into_iter().map(json).collect()
}

impl Journal for FileJournal {
    fn append(&mut self, migration: MigrationId, vm: VmId, record: JournalRecord) -> Result<(), JournalError> {
        let path = self.path(migration);
        let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let line = Line {
            schema: SCHEMA.to_owned(),
            unix_ms,
            pid: std::process::id(),
            migration_id: migration,
            vm_id: vm,
            record,
        };
        let text = encode(&line).map_err(|error| io_failed(&path, "encoding", io::Error::other(error)))?;
        let is_new = !path.exists();
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(|error| io_failed(&path, "opening", error))?;
        let before = cut_torn_line(&path, &file).map_err(|error| io_failed(&path, "opening", error))?;
        let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_data());
        if let Err(error) = written {
            // What may have reached the file must not be read as acknowledged later.
            let _ = file.set_len(before).and_then(|()| file.sync_data());
            return Err(io_failed(&path, "writing", error));
        }
        if is_new {
            let synced = File::open(&self.folder).and_then(|folder| folder.sync_all());
            synced.map_err(|error| io_failed(&self.folder, "writing", error))?;
        }
        Ok(())
    }

    fn last(&self, migration: MigrationId) -> Result<Option<JournalRecord>, JournalError> {
        Ok(self.lines(migration)?.pop().map(|line| line.record))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal() -> (tempfile::TempDir, FileJournal, MigrationId, VmId) {
        let folder = tempfile::tempdir().unwrap();
        let journal = FileJournal::open(folder.path()).unwrap();
        (folder, journal, MigrationId::random(), VmId::random())
    }

    #[test]
    fn the_last_record_decides() {
        let (_folder, mut journal, id, vm) = journal();
        assert_eq!(journal.last(id).unwrap(), None);
        let released = JournalRecord::Released { peer: "tcp://192.0.2.1:1".to_owned() };
        for record in [JournalRecord::Reserved, JournalRecord::Prepared, released.clone()] {
            journal.append(id, vm, record).unwrap();
        }
        assert_eq!(journal.last(id).unwrap(), Some(released.clone()));
        assert_eq!(journal.all().unwrap(), [(id, vm, released)]);
    }

    #[test]
    fn a_torn_last_line_was_never_acknowledged() {
        let (_folder, mut journal, id, vm) = journal();
        journal.append(id, vm, JournalRecord::Reserved).unwrap();
        journal.append(id, vm, JournalRecord::Owner).unwrap();
        let path = journal.path(id);
        let length = fs::metadata(&path).unwrap().len();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(length - 5).unwrap();
        assert_eq!(journal.last(id).unwrap(), Some(JournalRecord::Reserved));
        journal.append(id, vm, JournalRecord::NeverOwner).unwrap();
        assert_eq!(journal.last(id).unwrap(), Some(JournalRecord::NeverOwner));
    }

    #[test]
    fn damage_before_the_last_line_is_an_error() {
        let (_folder, mut journal, id, vm) = journal();
        journal.append(id, vm, JournalRecord::Reserved).unwrap();
        journal.append(id, vm, JournalRecord::Owner).unwrap();
        let path = journal.path(id);
        let mut bytes = fs::read(&path).unwrap();
        bytes[20] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(matches!(journal.last(id), Err(JournalError::Damaged { line: 1, .. })));
    }

    #[test]
    fn a_full_disk_leaves_the_record_before() {
        let (_folder, mut journal, id, vm) = journal();
        journal.append(id, vm, JournalRecord::Reserved).unwrap();
        let mut full = FileJournal { folder: PathBuf::from("/dev/full/none") };
        assert!(full.append(id, vm, JournalRecord::Owner).is_err());
        assert_eq!(journal.last(id).unwrap(), Some(JournalRecord::Reserved));
    }
}
