//! Which hosted VMs run on this host: one folder a VM below the run folder.
//!
//! ```text
//! RUN_DIR/NAME/machine.json    who it is (schema dunlin.machine/v1)
//!              control.sock    HTTP: act on it
//!              observe.sock    HTTP: look at it
//!              session.sock    for one migration manager
//!              migrate.sock    HTTP: see and steer the migration that a manager does
//! ```
//! An entry counts only while its process lives: pid, start time and boot id must all fit, so a reused pid is no VM.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

pub use crate::foreign::process::start_time_ticks;
use crate::foreign::process::{self, has_ended};
use crate::model::id::VmName;
use crate::model::schema::Schema;
use crate::model::{VmId, VmRef};

/// Where VMs are listed unless told otherwise.
pub const DEFAULT_RUN_DIR: &str = "/run/dunlin";
/// Where the journal is unless told otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/dunlin";
/// How long a VM that lives may take from its entry to its sockets.
const SOCKETS_FOLLOW: Duration = Duration::from_secs(1);
/// How often it is looked for them.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Writes a file beside its place and renames it, so that a reader sees all of it or nothing.
///
/// # Errors
/// It cannot be written; what was there before stays.
pub(super) fn write_whole(path: &Path, text: &str) -> io::Result<()> {
    let draft = path.with_added_extension("new");
    fs::write(&draft, text)?;
    fs::rename(draft, path)
}

/// One hosted VM's entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineEntry {
    /// The VM's name.
    pub name: VmName,
    /// The VM's identity.
    pub vm_id: VmId,
    /// The machine's process.
    pub pid: u32,
    /// When that process started, in clock ticks since boot (field 22 of /proc/PID/stat).
    pub start_time_ticks: u64,
    /// The boot that pid and start time belong to.
    pub boot_id: String,
    /// Guest RAM.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Where the machine's journal is.
    pub state_dir: PathBuf,
}

impl Schema for MachineEntry {
    const SCHEMA: &'static str = "dunlin.machine/v1";
}

/// No VM answers to a name, or the run folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Nothing here has that name.
    #[error("no VM `{vm}` runs under {run_dir}; `dunlin vm list` shows those that do")]
    Unknown {
        /// What was asked for.
        vm: String,
        /// Where.
        run_dir: String,
    },
    /// A live VM has the name.
    #[error("a VM named `{name}` runs already (pid {pid}); stop it or choose another --name")]
    Taken {
        /// The name.
        name: VmName,
        /// Its process.
        pid: u32,
    },
    /// The folder.
    #[error("run folder {path}: {source}")]
    Io {
        /// Which.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Waits until something is at `path`, as long as that `may_come`.
fn await_path(path: &Path, mut may_come: impl FnMut() -> bool) {
    while !path.exists() && may_come() {
        std::thread::sleep(LOOK_EVERY);
    }
}

/// The entries below one run folder.
#[derive(Clone, Debug)]
pub struct Registry {
    run_dir: PathBuf,
}

/// This boot's id.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

impl MachineEntry {
    /// Whether its process is the one that wrote it.
    pub fn is_alive(&self) -> bool {
        self.boot_id == boot_id() && start_time_ticks(self.pid) == Some(self.start_time_ticks)
    }

    /// Whether its process has ended, waited for up to `limit`.
    pub fn has_ended(&self, limit: Duration) -> bool {
        let handle = process::handle(self.pid);
        !self.is_alive() || handle.is_some_and(|handle| has_ended(handle, limit))
    }
}

impl Registry {
    /// The registry of a run folder; it need not exist.
    pub fn new(run_dir: impl Into<PathBuf>) -> Self {
        Self { run_dir: run_dir.into() }
    }

    /// Its run folder.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// A VM's folder.
    pub fn folder(&self, name: &VmName) -> PathBuf {
        self.run_dir.join(name.as_str())
    }

    /// The socket of a VM.
    pub fn socket(&self, name: &VmName, which: &str) -> PathBuf {
        self.folder(name).join(format!("{which}.sock"))
    }

    /// The same, once it is there: the sockets of a VM follow its entry within moments. They are waited for as long as its process lives, a second at most; what is missing then
    /// whoever connects finds out.
    pub fn served(&self, entry: &MachineEntry, which: &str) -> PathBuf {
        let socket = self.socket(&entry.name, which);
        let until = Instant::now() + SOCKETS_FOLLOW;
        await_path(&socket, || entry.is_alive() && Instant::now() < until);
        socket
    }

    /// Enters a VM; an entry of a dead process gives way.
    ///
    /// # Errors
    /// A live VM of that name, or a folder that cannot be written.
    pub fn enter(&self, entry: &MachineEntry) -> Result<PathBuf, RegistryError> {
        let folder = self.folder(&entry.name);
        let failed = |source| RegistryError::Io { path: folder.display().to_string(), source };
        fs::create_dir_all(&self.run_dir).map_err(failed)?;
        let _alone = self.alone();
        if let Some(other) = Self::read(&folder).filter(MachineEntry::is_alive) {
            return Err(RegistryError::Taken { name: other.name, pid: other.pid });
        }
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).map_err(failed)?;
        let json = serde_json::to_string_pretty(&entry.tagged()).map_err(|error| failed(error.into()))?;
        write_whole(&folder.join("machine.json"), &json).map_err(failed)?;
        Ok(folder)
    }

    /// Takes a VM out.
    pub fn leave(&self, name: &VmName) {
        let _ = fs::remove_dir_all(self.folder(name));
    }

    /// Takes a VM out whose process has died without doing so itself.
    pub fn sweep(&self, name: &VmName) {
        let _alone = self.alone();
        if Self::read(&self.folder(name)).is_some_and(|entry| !entry.is_alive()) {
            self.leave(name);
        }
    }

    /// Keeps others from entering or sweeping until it is dropped: one that found a dead entry might else remove the entry that took its place. Where it cannot be had all goes on without.
    fn alone(&self) -> Option<fs::File> {
        let folder = fs::File::open(&self.run_dir).ok()?;
        flock(&folder, FlockOperation::LockExclusive).ok()?;
        Some(folder)
    }

    fn read(folder: &Path) -> Option<MachineEntry> {
        let text = fs::read_to_string(folder.join("machine.json")).ok()?;
        match serde_json::from_str(&text) {
            Ok(entry) => Some(entry),
            Err(error) => {
                tracing::warn!("{}: {error}", folder.join("machine.json").display());
                None
            }
        }
    }

    /// All live VMs, by name.
    pub fn list(&self) -> Vec<MachineEntry> {
        let folders = fs::read_dir(&self.run_dir).into_iter().flatten().flatten();
        let mut entries: Vec<_> =
            folders.filter_map(|folder| Self::read(&folder.path())).filter(MachineEntry::is_alive).collect();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        entries
    }

    /// The VM that an operator means.
    ///
    /// # Errors
    /// None, with the way to find those that there are.
    pub fn find(&self, vm: &VmRef) -> Result<MachineEntry, RegistryError> {
        let matches = |entry: &MachineEntry| match vm {
            VmRef::Name(name) => entry.name == *name,
            VmRef::Uuid(id) => entry.vm_id == *id,
            VmRef::Pid(pid) => entry.pid == *pid,
        };
        self.list()
            .into_iter()
            .find(matches)
            .ok_or_else(|| RegistryError::Unknown { vm: vm.to_string(), run_dir: self.run_dir.display().to_string() })
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_socket_that_follows_is_waited_for_and_one_that_cannot_come_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("observe.sock");
        let mut looks = 0;
        await_path(&path, || {
            looks += 1;
            if looks == 3 {
                fs::write(&path, "").unwrap();
            }
            true
        });
        assert_eq!(looks, 3);
        let mut asked = 0;
        await_path(&folder.path().join("control.sock"), || {
            asked += 1;
            asked < 2
        });
        assert_eq!(asked, 2);
        await_path(&path, || panic!("it is there"));
    }

    fn entry(name: &str, pid: u32) -> MachineEntry {
        MachineEntry {
            name: name.parse().unwrap(),
            vm_id: VmId::random(),
            pid,
            start_time_ticks: start_time_ticks(pid).unwrap_or(1),
            boot_id: boot_id(),
            memory_bytes: 1 << 20,
            cpus: 1,
            state_dir: PathBuf::from("/nowhere"),
        }
    }

    #[test]
    fn a_live_name_is_taken_and_a_dead_one_gives_way() {
        let folder = tempfile::tempdir().unwrap();
        let registry = Registry::new(folder.path());
        let mine = entry("a", std::process::id());
        registry.enter(&mine).unwrap();
        assert!(matches!(registry.enter(&mine), Err(RegistryError::Taken { .. })));
        assert_eq!(registry.find(&"a".parse().unwrap()).unwrap(), mine);
        assert_eq!(registry.find(&format!("pid:{}", mine.pid).parse().unwrap()).unwrap(), mine);
        let mut stale = entry("b", std::process::id());
        stale.start_time_ticks += 1;
        registry.enter(&stale).unwrap();
        assert!(registry.find(&"b".parse().unwrap()).is_err());
        registry.sweep(&stale.name);
        assert!(!registry.folder(&stale.name).exists());
        registry.sweep(&mine.name);
        assert!(registry.folder(&mine.name).exists());
        registry.enter(&entry("b", std::process::id())).unwrap();
        registry.leave(&mine.name);
        assert_eq!(registry.list().len(), 1);
    }

    #[test]
    fn an_end_is_waited_for_and_a_reused_number_is_one() {
        let (mut child, mine) =
            (Command::new("cat").stdin(Stdio::piped()).spawn().unwrap(), entry("a", std::process::id()));
        let other = entry("b", child.id());
        assert!(!other.has_ended(Duration::ZERO) && !mine.has_ended(Duration::ZERO));
        drop(child.stdin.take());
        assert!(other.has_ended(Duration::from_secs(10)));
        child.wait().unwrap();
        assert!(other.has_ended(Duration::ZERO));
        assert!(MachineEntry { start_time_ticks: mine.start_time_ticks + 1, ..mine }.has_ended(Duration::ZERO));
    }

    #[test]
    fn rubbish_in_the_run_folder_is_no_vm() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("x")).unwrap();
        fs::write(folder.path().join("x/machine.json"), "{").unwrap();
        assert!(Registry::new(folder.path()).list().is_empty());
    }
}
