//! The journal as files: one a migration, one JSON line a record, each line with its checksum.
//!
//! A new file is filled with empty lines and brought to disk as a whole, so that a record written later changes no size
//! and allocates nothing: it cannot meet a full disk, and its fsync is one write. `append` returns after that fsync. A torn
//! last line (power lost while it was written) was never acknowledged and is skipped, and the next record takes its place;
//! a damaged line before it is an error.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::{MigrationId, VmId};
use crate::port::{Journal, JournalError, JournalRecord};
use crate::time::unix_ms;

/// The longest line that is read: records are a few hundred bytes.
const MAX_LINE_BYTES: usize = 64 << 10;
/// Room for the records of one migration: each side writes at most five of about 300 bytes.
const ROOM_BYTES: usize = 4096;

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
                Ok((lines, _)) => all.extend(lines.into_iter().next_back().map(|line| (id, line.vm_id, line.record))),
                Err(error) => tracing::warn!("{error}"),
            }
        }
        Ok(all)
    }

    /// The records of a migration, and the offset behind the last of them.
    fn lines(&self, migration: MigrationId) -> Result<(Vec<Line>, usize), JournalError> {
        let path = self.path(migration);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), 0)),
            Err(error) => return Err(io_failed(&path, "reading", error)),
        };
        let mut lines = Vec::new();
        let (mut at, mut behind) = (0, 0);
        let mut damage = None;
        for (number, text) in bytes.split(|&byte| byte == b'\n').enumerate() {
            let next = at + text.len() + 1;
            if !text.is_empty() {
                if let Some(damage) = damage.take() {
                    // Something follows the damaged line, so it was acknowledged once.
                    return Err(damage);
                }
                match decode(text) {
                    Ok(line) if line.migration_id == migration => {
                        lines.push(line);
                        behind = next;
                    }
                    Ok(_) => damage = Some(damaged(&path, number, "it names another migration")),
                    Err(problem) => damage = Some(damaged(&path, number, &problem)),
                }
            }
            at = next;
        }
        Ok((lines, behind))
    }

    /// Opens the file of a migration; a new one is filled and on disk when this returns, or is not there.
    fn file(&self, path: &Path) -> Result<File, JournalError> {
        match OpenOptions::new().write(true).open(path) {
            Ok(file) => return Ok(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io_failed(path, "opening", error)),
        }
        let made = OpenOptions::new().write(true).create_new(true).open(path).and_then(|mut file| {
            file.write_all(&[b'\n'; ROOM_BYTES])?;
            file.sync_all()?;
            File::open(&self.folder)?.sync_all()?;
            Ok(file)
        });
        made.map_err(|error| {
            let _ = fs::remove_file(path);
            io_failed(path, "making the file", error)
        })
    }

    /// Removes journals that have said nothing new for `age` and that no question can be about any more.
    pub fn prune(&self, age: Duration) -> Result<(), JournalError> {
        for (migration, _, last) in self.all()? {
            let path = self.path(migration);
            let old = fs::metadata(&path)
                .and_then(|meta| meta.modified())
                .is_ok_and(|at| at.elapsed().is_ok_and(|a| a > age));
            if old && !last.leaves_doubt() {
                fs::remove_file(&path).map_err(|error| io_failed(&path, "removing", error))?;
            }
        }
        Ok(())
    }
}

fn io_failed(path: &Path, action: &'static str, source: io::Error) -> JournalError {
    JournalError::Io { path: path.display().to_string(), action, source }
}

fn damaged(path: &Path, number: usize, problem: &str) -> JournalError {
    JournalError::Damaged { path: path.display().to_string(), line: number + 1, problem: problem.to_owned() }
}

/// Empties what a torn write may have left behind the last record.
fn clear_from(file: &File, behind: usize) -> io::Result<()> {
    let length = file.metadata()?.len() as usize;
    file.write_all_at(&vec![b'\n'; length.saturating_sub(behind)], behind as u64)
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
        let unix_ms = unix_ms();
        let line = Line {
            schema: SCHEMA.to_owned(),
            unix_ms,
            pid: std::process::id(),
            migration_id: migration,
            vm_id: vm,
            record,
        };
        let text = encode(&line).map_err(|error| io_failed(&path, "encoding", io::Error::other(error)))?;
        let file = self.file(&path)?;
        let (_, behind) = self.lines(migration)?;
        let written = clear_from(&file, behind).and_then(|()| {
            file.write_all_at(text.as_bytes(), behind as u64)?;
            file.sync_data()
        });
        written.map_err(|error| {
            // What may have reached the file must not be read as acknowledged later.
            let _ = clear_from(&file, behind).and_then(|()| file.sync_data());
            io_failed(&path, "writing", error)
        })
    }

    fn last(&self, migration: MigrationId) -> Result<Option<JournalRecord>, JournalError> {
        Ok(self.lines(migration)?.0.pop().map(|line| line.record))
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
        let (_, behind) = journal.lines(id).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[b'\n'; 40], behind as u64 - 40).unwrap();
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
    fn records_need_no_new_space() {
        let (_folder, mut journal, id, vm) = journal();
        journal.append(id, vm, JournalRecord::Offered).unwrap();
        let size = fs::metadata(journal.path(id)).unwrap().len();
        for record in
            [JournalRecord::Released { peer: "x".repeat(300) }, JournalRecord::Owner, JournalRecord::Discarded]
        {
            journal.append(id, vm, record).unwrap();
        }
        assert_eq!(fs::metadata(journal.path(id)).unwrap().len(), size);
        assert_eq!(journal.last(id).unwrap(), Some(JournalRecord::Discarded));
        journal.prune(Duration::ZERO).unwrap();
        assert_eq!(journal.all().unwrap(), []);
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
