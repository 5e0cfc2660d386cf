//! One host of a migration under test: its run and state folders, the machines and managers started on it, and what is
//! left of them.
//!
//! Dropping a [`TestHost`] ends every machine that its run folder still lists, also those that outlived their manager.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use dunlin::model::{MigrationId, MigrationReport};
use dunlin::port::{Journal, JournalRecord};
use dunlin::service::machine::VmInfo;
use dunlin::service::registry::{MachineEntry, Registry};
use dunlin::store::FileJournal;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tempfile::TempDir;

use crate::binary::dunlin;
use crate::process::OwnProcess;
use crate::serial::SerialLog;
use crate::wait::wait_for;

/// The VM's name on every host.
pub const VM: &str = "vm";
/// What the guest does meanwhile: enough to need several rounds, little enough for many guests side by side.
pub const WORKLOAD: &str = "dunlin.wl0=ws:16M,rate:2000";
/// Starting a process and hearing from it.
const START_LIMIT: Duration = Duration::from_secs(20);
/// The end of a process that was killed.
const DEATH_LIMIT: Duration = Duration::from_secs(10);

/// The test guest's ELF: `DUNLIN_TEST_GUEST`, or where `tests/guest` builds it.
///
/// # Panics
/// If it has not been built.
pub fn guest() -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/target/release/dunlin-guest");
    let path = std::env::var_os("DUNLIN_TEST_GUEST").map_or(built, PathBuf::from);
    assert!(path.is_file(), "{} is missing: run `cargo build --release` in tests/guest first", path.display());
    path
}

/// A host.
pub struct TestHost {
    folder: TempDir,
    state_dir: PathBuf,
    number: AtomicU32,
}

impl TestHost {
    /// Makes a host with folders of its own.
    ///
    /// # Errors
    /// No room for them.
    pub fn new() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("dunlin-host-").tempdir().context("a folder")?;
        let state_dir = folder.path().join("state");
        Ok(Self { folder, state_dir, number: AtomicU32::new(0) })
    }

    /// Keeps the journal elsewhere.
    #[must_use]
    pub fn with_state_dir(mut self, state_dir: PathBuf) -> Self {
        self.state_dir = state_dir;
        self
    }

    /// A path in the host's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Where its VMs are listed.
    pub fn run_dir(&self) -> PathBuf {
        self.path("run")
    }

    /// Where its journal is.
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// The console of the VM that runs or ran here.
    pub fn serial(&self) -> SerialLog {
        SerialLog::new(self.path("serial"))
    }

    /// A `dunlin` command on this host, its output kept in the folder.
    fn command(&self, label: &str, words: &[&str], state: bool) -> Result<(Command, Output)> {
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let output = Output {
            out: self.path(&format!("{label}-{number}.out")),
            err: self.path(&format!("{label}-{number}.err")),
        };
        let mut command = dunlin();
        command.args(words).arg("--run-dir").arg(self.run_dir());
        if state {
            command.arg("--state-dir").arg(self.state_dir());
        }
        command.stdin(Stdio::null()).stdout(File::create(&output.out)?).stderr(File::create(&output.err)?);
        Ok((command, output))
    }

    fn start(&self, label: &str, words: &[&str], state: bool) -> Result<Running> {
        let (mut command, output) = self.command(label, words, state)?;
        let child = command.spawn().with_context(|| format!("start dunlin {words:?}"))?;
        Ok(Running { process: OwnProcess::new(child), output })
    }

    /// Starts a machine with more options and returns at once.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_vm(&self, kernel: &Path, options: &[&str]) -> Result<Running> {
        self.start_vm_with(kernel, "64MiB", WORKLOAD, options)
    }

    fn start_vm_with(&self, kernel: &Path, memory: &str, workload: &str, options: &[&str]) -> Result<Running> {
        let (kernel, serial) = (kernel.display().to_string(), format!("file={}", self.serial().path().display()));
        let mut words =
            vec!["vm", "run", "--json", "--name", VM, "--kernel", &kernel, "--memory", memory, "--cpus", "1"];
        words.extend(["--cmdline", workload, "--serial", &serial]);
        words.extend(options);
        self.start("vm", &words, true)
    }

    /// Boots the test guest and waits until it works.
    ///
    /// # Errors
    /// It does not come up.
    pub fn boot(&self, options: &[&str]) -> Result<Running> {
        self.boot_with("64MiB", WORKLOAD, options)
    }

    /// The same with another size of RAM and another command line for the guest.
    ///
    /// # Errors
    /// It does not come up.
    pub fn boot_with(&self, memory: &str, workload: &str, options: &[&str]) -> Result<Running> {
        let vm = self.start_vm_with(&guest(), memory, workload, options)?;
        self.serial().await_ready().with_context(|| vm.output.text())?;
        Ok(vm)
    }

    /// Starts a receiver at an address of the caller's choice, and returns at once.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_receiver(&self, address: &str) -> Result<Running> {
        self.start("receive", &["vm", "receive", "--json", "--listen", address], true)
    }

    /// Starts a receiver, at an own port in the clear unless the options say where, and waits until it listens.
    ///
    /// # Errors
    /// It does not listen.
    pub fn receive(&self, options: &[&str]) -> Result<Receiver> {
        let serial = format!("file={}", self.serial().path().display());
        let mut words = vec!["vm", "receive", "--json", "--serial", &serial];
        if !options.contains(&"--listen") {
            words.extend(["--listen", "tcp://127.0.0.1:0"]);
        }
        words.extend(options);
        let running = self.start("receive", &words, true)?;
        let listening = wait_for("the receiver's address", START_LIMIT, || {
            let text = fs::read_to_string(&running.output.out).ok()?;
            serde_json::from_str::<serde_json::Value>(text.lines().next()?).ok()
        })
        .with_context(|| running.output.text())?;
        let address = listening["address"].as_str().context("no address")?.to_owned();
        Ok(Receiver { running, address })
    }

    /// Starts moving the VM to `to`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn migrate(&self, to: &str, options: &[&str]) -> Result<Running> {
        let mut words = vec!["migrate", VM, "--json", "--to", to];
        words.extend(options);
        self.start("migrate", &words, false)
    }

    /// Starts going on with a migration that was left in doubt, to where it was.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn recover(&self, options: &[&str]) -> Result<Running> {
        self.start("recover", &[&["migrate", VM, "--json", "--recover"], options].concat(), false)
    }

    /// Has a migration by demand-paging send everything; its exit code.
    ///
    /// # Errors
    /// It cannot be started, or hangs.
    pub fn finish_migration(&self) -> Result<i32> {
        Ok(self.ask(&["migrate", VM, "--finish", "--json"], false)?.0)
    }

    /// Cancels the migration; its exit code.
    ///
    /// # Errors
    /// It cannot be started, or hangs.
    pub fn cancel_migration(&self) -> Result<i32> {
        Ok(self.ask(&["migrate", VM, "--cancel", "--json"], false)?.0)
    }

    /// A short command, run to its end: exit code, and what it said.
    fn ask(&self, words: &[&str], state: bool) -> Result<(i32, Output)> {
        let Running { mut process, output } = self.start("ask", words, state)?;
        let status = process.wait_for(START_LIMIT)?.with_context(|| format!("dunlin {words:?} hangs"))?;
        Ok((status.code().context("it was killed")?, output))
    }

    /// `dunlin vm info`; `None` if there is no such VM.
    pub fn info(&self) -> Option<VmInfo> {
        let (code, output) = self.ask_info().ok()?;
        let text = fs::read_to_string(&output.out).ok()?;
        (code == 0).then(|| serde_json::from_str(&text).ok()).flatten()
    }

    /// `dunlin vm info`: exit code, and what it said.
    ///
    /// # Errors
    /// It cannot be started, or hangs.
    pub fn ask_info(&self) -> Result<(i32, Output)> {
        self.ask(&["vm", "info", VM, "--json"], false)
    }

    /// `dunlin resolve --owner here|there`.
    ///
    /// # Errors
    /// It was refused.
    pub fn resolve(&self, vm: &str, owner: &str) -> Result<()> {
        let (code, output) = self.ask(&["resolve", vm, "--owner", owner], true)?;
        ensure!(code == 0, "resolve {vm} --owner {owner}: exit {code}: {}", output.text());
        Ok(())
    }

    /// The machine that the run folder lists, if its process lives.
    pub fn machine(&self) -> Option<MachineEntry> {
        Registry::new(self.run_dir()).list().into_iter().next()
    }

    /// Kills the machine, and waits for its end.
    ///
    /// # Errors
    /// There is none, or it does not end.
    pub fn kill_machine(&self) -> Result<()> {
        let entry = self.machine().context("no machine to kill")?;
        kill(entry.pid)
    }

    /// What the journal says last of a migration, or of the only one if `None`.
    pub fn journal(&self, migration: Option<MigrationId>) -> Option<JournalRecord> {
        if !self.state_dir().join("migrations").is_dir() {
            return None;
        }
        let journal = FileJournal::open(self.state_dir()).ok()?;
        match migration {
            Some(migration) => journal.last(migration).ok()?,
            None => journal.all().ok()?.into_iter().next().map(|(_, _, record)| record),
        }
    }

    /// What is left here: names in the run folder, and records that keep a VM in doubt.
    pub fn leftovers(&self) -> Vec<String> {
        let mut left: Vec<String> = fs::read_dir(self.run_dir())
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| format!("run folder entry {}", entry.file_name().display()))
            .collect();
        if self.state_dir().join("migrations").is_dir() {
            let records = FileJournal::open(self.state_dir()).and_then(|journal| journal.all()).unwrap_or_default();
            let doubtful = records
                .into_iter()
                .filter(|(_, _, record)| matches!(record, JournalRecord::Prepared | JournalRecord::Released { .. }));
            left.extend(doubtful.map(|(migration, _, record)| format!("journal of {migration} in {record:?}")));
        }
        left
    }

    /// Everything that commands on this host have said, for a failure message.
    pub fn story(&self) -> String {
        let mut files: Vec<_> = fs::read_dir(self.folder.path()).into_iter().flatten().flatten().collect();
        files.sort_by_key(fs::DirEntry::file_name);
        let mut story = String::new();
        for file in files {
            let name = file.file_name().display().to_string();
            let text = fs::read_to_string(file.path()).unwrap_or_default();
            if name.starts_with("ask") || name == "serial" || text.trim().is_empty() || !file.path().is_file() {
                continue;
            }
            story += &format!("    {name}: {}\n", text.trim().replace('\n', "\n      "));
        }
        story
    }
}

impl Drop for TestHost {
    fn drop(&mut self) {
        // They were started on this host's behalf: the run folder is ours alone.
        for entry in Registry::new(self.run_dir()).list() {
            let _gone_already = kill(entry.pid);
        }
    }
}

/// Kills a process of ours that need not be our child, and waits for its end.
fn kill(pid: u32) -> Result<()> {
    let pid = Pid::from_raw(pid as i32).context("pid zero")?;
    let pidfd: OwnedFd = pidfd_open(pid, PidfdFlags::empty()).context("pidfd_open")?;
    pidfd_send_signal(&pidfd, Signal::KILL).context("kill")?;
    let limit = Timespec::try_from(DEATH_LIMIT).context("time limit")?;
    ensure!(poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit))? == 1, "process {pid:?} survives SIGKILL");
    Ok(())
}

/// Where a command's words are kept.
#[derive(Debug)]
pub struct Output {
    out: PathBuf,
    err: PathBuf,
}

impl Output {
    /// Both streams.
    pub fn text(&self) -> String {
        let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        format!("{}{}", read(&self.out), read(&self.err))
    }
}

/// A `dunlin` at work.
#[derive(Debug)]
pub struct Running {
    /// The process.
    pub process: OwnProcess,
    /// What it says.
    pub output: Output,
}

impl Running {
    /// Kills it with SIGKILL and waits for its end.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn kill(&mut self) -> Result<()> {
        self.process.signal(Signal::KILL)?;
        ensure!(self.process.wait_for(DEATH_LIMIT)?.is_some(), "it survives SIGKILL");
        Ok(())
    }

    /// Waits for its end; the exit code, `None` if a signal ended it.
    ///
    /// # Errors
    /// It goes on beyond `limit`.
    pub fn exit_code(&mut self, limit: Duration) -> Result<Option<i32>> {
        match self.process.wait_for(limit)? {
            Some(status) => Ok(status.code()),
            None => bail!("it still runs after {limit:?}: {}", self.output.text()),
        }
    }

    /// The report of a migration that has ended; `None` if it made none.
    pub fn report(&self) -> Option<MigrationReport> {
        let text = fs::read_to_string(&self.output.out).ok()?;
        serde_json::from_str(text.lines().last()?).ok()
    }
}

/// A receiver that listens.
#[derive(Debug)]
pub struct Receiver {
    /// The process.
    pub running: Running,
    /// `tcp://ADDR:PORT` or `tls://ADDR:PORT`
    pub address: String,
}

impl Receiver {
    /// The address as a socket address.
    ///
    /// # Panics
    /// If it is none.
    pub fn socket_address(&self) -> SocketAddr {
        self.address["tcp://".len()..].parse().expect("the receiver prints its address")
    }
}

/// Holds a manager at a step: `--hold-at` and the files behind it.
#[derive(Clone, Debug)]
pub struct HoldPoint {
    step: dunlin::model::Step,
    path: PathBuf,
}

impl HoldPoint {
    /// A hold at `step` of a manager on `host`.
    pub fn new(host: &TestHost, step: dunlin::model::Step) -> Self {
        Self { step, path: host.path(&format!("hold-{step}")) }
    }

    /// The option's value.
    pub fn argument(&self) -> String {
        format!("{}={}", self.step, self.path.display())
    }

    /// Waits until the manager is held there.
    ///
    /// # Errors
    /// It does not come so far.
    pub fn await_held(&self) -> Result<()> {
        let held = self.path.with_added_extension("held");
        wait_for(&format!("the hold at {}", self.step), START_LIMIT, || held.exists().then_some(()))
    }

    /// Lets the manager go on.
    ///
    /// # Errors
    /// No room for the file.
    pub fn release(&self) -> Result<()> {
        File::create(&self.path).map(drop).context("release a hold")
    }
}
