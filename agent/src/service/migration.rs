//! The manager at a source: finds the VM, dials the target, runs [`crate::migrate::source`], reports.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use super::audit::{self, Action};
use super::clock::MonotonicClock;
use super::config::names;
use super::events::{EventLog, Hold};
use super::progress::{Both, Plan, Progress};
use super::registry::{MachineEntry, Registry, RegistryError};
use super::session::RemoteMachine;
use super::steering::{self, Steered};
use crate::link::{Address, TcpSource};
use crate::migrate::source::Source;
use crate::migrate::{CancelFlag, ControlMessage, OnStuck, Pace, SourceOptions};
use crate::model::id::VmName;
use crate::model::{MigrationId, MigrationReport, VmRef};
use crate::port::{JournalError, JournalRecord, LinkError, MachineError, Region};
use crate::store::FileJournal;

/// A migration that could not even begin; the VM was not touched.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    /// No such VM.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The machine refuses a manager.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Nobody answers at the target.
    #[error("{address}: {source}")]
    Link {
        /// The target.
        address: Address,
        /// What went wrong.
        source: LinkError,
    },
    /// Plain TCP would leave this machine.
    #[error(
        "{0} would carry guest memory in the clear over a network; add --insecure-plaintext if that network is trusted \
         (allowed without it: loopback, and network namespaces other than the host's own)"
    )]
    Plaintext(Address),
    /// Its writers must not be slowed.
    #[error(
        "the writers of `{0}` are never slowed: `never` in [stun] of the configuration names it; migrate it with another --on-stuck"
    )]
    NeverStunned(VmName),
    /// There is nothing to go on with.
    #[error("{0}")]
    NotInDoubt(String),
    /// The event log.
    #[error("event log {path}: {source}")]
    Events {
        /// The file.
        path: String,
        /// What the kernel said.
        source: std::io::Error,
    },
}

/// What `dunlin migrate` was asked.
#[derive(Debug)]
pub struct MigrateRequest {
    /// Which VM.
    pub vm: VmRef,
    /// Where to.
    pub to: Address,
    /// How.
    pub options: SourceOptions,
    /// VMs whose writers are never slowed, as the configuration names them.
    pub never_stunned: Vec<String>,
    /// Where this host's VMs are.
    pub run_dir: PathBuf,
    /// Plain TCP beyond loopback is fine.
    pub insecure_plaintext: bool,
    /// Where events go, one JSON object a line.
    pub events: Option<PathBuf>,
    /// Show progress on a terminal.
    pub show_progress: bool,
    /// For tests: stop at a step.
    pub hold: Option<Hold>,
}

/// What `dunlin migrate --recover` was asked.
#[derive(Debug)]
pub struct RecoverRequest {
    /// Which VM.
    pub vm: VmRef,
    /// Where the target is; where the VM was released to if `None`.
    pub to: Option<Address>,
    /// How; the strategy is what it was.
    pub options: SourceOptions,
    /// Where this host's VMs are.
    pub run_dir: PathBuf,
    /// Plain TCP beyond loopback is fine.
    pub insecure_plaintext: bool,
    /// Where events go, one JSON object a line.
    pub events: Option<PathBuf>,
    /// Show progress on a terminal.
    pub show_progress: bool,
    /// For tests: stop at a step.
    pub hold: Option<Hold>,
}

/// A migration whose two ends are known to one another.
struct Begun {
    migration: MigrationId,
    entry: MachineEntry,
    machine: RemoteMachine,
    link: TcpSource<ControlMessage>,
    log: EventLog,
    options: SourceOptions,
    /// What it is called.
    kind: String,
    show_progress: bool,
}

/// Whether this process is in another network namespace than the host's first process: what it sends stays in what
/// its maker wired up.
///
/// Told by the inodes of a file that each namespace has of its own: `/proc/1/ns/net` would ask for the right to trace
/// process 1, which root without every capability lacks.
fn in_private_namespace() -> bool {
    let inode = |process: &str| std::fs::metadata(format!("/proc/{process}/net/dev")).map(|file| file.ino());
    matches!((inode("self"), inode("1")), (Ok(own), Ok(first)) if own != first)
}

/// Refuses an address that would carry memory in the clear where others may listen.
///
/// # Errors
/// [`BeginError::Plaintext`].
pub fn check_plaintext(address: &Address, allowed: bool) -> Result<(), BeginError> {
    if allowed || address.is_loopback() || in_private_namespace() {
        Ok(())
    } else {
        Err(BeginError::Plaintext(address.clone()))
    }
}

/// Moves a VM. Returns once its fate is known, whatever it is.
///
/// # Errors
/// What kept the migration from beginning.
pub fn migrate(request: MigrateRequest, cancel: CancelFlag) -> Result<MigrationReport, BeginError> {
    check_plaintext(&request.to, request.insecure_plaintext)?;
    let registry = Registry::new(&request.run_dir);
    let entry = registry.find(&request.vm)?;
    let never = names(&request.never_stunned, entry.name.as_str(), entry.vm_id, entry.pid);
    if request.options.on_stuck == OnStuck::Stun && never {
        return Err(BeginError::NeverStunned(entry.name));
    }
    let migration = MigrationId::random();
    let journal = FileJournal::open(&entry.state_dir)?;
    let events = request.events.as_deref();
    let log = EventLog::new(migration, "source", events, request.hold.clone())
        .map_err(|source| BeginError::Events { path: format!("{events:?}"), source })?;
    let machine = RemoteMachine::attach(&registry.socket(&entry.name, "session"), migration, journal)?;
    let unreachable = |source| BeginError::Link { address: request.to.clone(), source };
    let link =
        TcpSource::<ControlMessage>::dial(request.to.clone(), migration, request.options.stall).map_err(unreachable)?;
    let options = SourceOptions { peer: request.to.to_string(), ..request.options };
    let kind = options.strategy.to_string();
    let begun = Begun { migration, entry, machine, link, log, options, kind, show_progress: request.show_progress };
    Ok(drive(begun, &registry, &cancel, "migrate", |source| source.run()))
}

/// Goes on with a migration that was left in doubt: its manager died, or could not reach the target. Returns once the VM's fate is known, or in doubt again.
///
/// # Errors
/// What kept it from beginning; everything is as it was.
pub fn recover(request: RecoverRequest, cancel: CancelFlag) -> Result<MigrationReport, BeginError> {
    let registry = Registry::new(&request.run_dir);
    let entry = registry.find(&request.vm)?;
    let journal = FileJournal::open(&entry.state_dir)?;
    let released = journal.all()?.into_iter().find_map(|(migration, vm, record)| match record {
        JournalRecord::Released { peer } if vm == entry.vm_id => Some((migration, peer)),
        _ => None,
    });
    let Some((migration, peer)) = released else {
        let reason = format!("no migration of `{}` is in doubt here; `dunlin vm info {0}` tells its state", entry.name);
        return Err(BeginError::NotInDoubt(reason));
    };
    let to = match request.to {
        Some(to) => to,
        None => peer.parse().map_err(|error| {
            BeginError::NotInDoubt(format!("the journal names no address of the target ({error}); write it with --to"))
        })?,
    };
    check_plaintext(&to, request.insecure_plaintext)?;
    let events = request.events.as_deref();
    let log = EventLog::new(migration, "source", events, request.hold.clone())
        .map_err(|source| BeginError::Events { path: format!("{events:?}"), source })?;
    let machine = RemoteMachine::reattach(&registry.socket(&entry.name, "session"), migration, journal)?;
    let unreachable = |source| BeginError::Link { address: to.clone(), source };
    let link = TcpSource::<ControlMessage>::dial(to.clone(), migration, request.options.stall).map_err(unreachable)?;
    let options = SourceOptions { peer: to.to_string(), ..request.options };
    let kind = "recovery".to_owned();
    let begun = Begun { migration, entry, machine, link, log, options, kind, show_progress: request.show_progress };
    Ok(drive(begun, &registry, &cancel, "recover", |source| source.recover()))
}

/// Lets the source's end do its work, seen and steered from outside.
fn drive(
    begun: Begun,
    registry: &Registry,
    cancel: &CancelFlag,
    what: &'static str,
    go: impl FnOnce(Source<'_>) -> MigrationReport,
) -> MigrationReport {
    let Begun { migration, entry, mut machine, mut link, log, options, kind, show_progress } = begun;
    let shape = machine.shape().clone();
    let region = machine.region();
    let pace = Pace::new(options.bandwidth);
    let plan = Plan {
        migration_id: migration,
        vm_id: entry.vm_id,
        vm_name: entry.name.clone(),
        target: options.peer.clone(),
        strategy: kind,
        memory_bytes: shape.memory_bytes,
        downtime: options.downtime,
        fixed_cost: options.fixed_cost,
    };
    let progress = Arc::new(Progress::new(plan, pace.clone(), show_progress));
    let steered = Steered {
        progress: Arc::clone(&progress),
        cancel: cancel.clone(),
        state_dir: entry.state_dir.clone(),
        streams: options.streams,
        throttle: (options.on_stuck == OnStuck::Stun).then(|| registry.socket(&entry.name, "observe")),
    };
    let socket = steering::path(registry, &entry.name);
    let served = steering::serve(&socket, steered).inspect_err(|error| {
        tracing::warn!("{}: {error}: this migration can only be steered by signals", socket.display());
    });
    let report = go(Source {
        id: migration,
        options: &options,
        shape: &shape,
        region: region.as_ref() as &dyn Region,
        machine: &mut machine,
        link: &mut link,
        clock: &MonotonicClock,
        observer: &Both { events: &log, progress: &progress },
        cancel: cancel.clone(),
        pace,
    });
    progress.end(report.clone());
    drop(served);
    // A machine that was killed could not take itself out of the run folder.
    registry.sweep(&entry.name);
    audit::record(
        &entry.state_dir,
        &Action {
            who: audit::me(),
            what,
            vm_id: entry.vm_id,
            // One that does not run, or is not in doubt, is refused by its machine, and nothing was done.
            before: if what == "migrate" { "running here" } else { "in doubt" }.to_owned(),
            after: report.owner.name().to_owned(),
            result: match report.reason.as_str() {
                "" => report.ending.name().to_owned(),
                reason => format!("{}: {reason}", report.ending.name()),
            },
        },
    );
    report
}
