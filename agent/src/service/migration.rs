//! The manager at a source: finds the VM, dials the target, runs [`crate::migrate::source`], reports.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use super::audit::{self, Action};
use super::clock::MonotonicClock;
use super::config::names;
use super::events::{EventLog, Hold};
use super::progress::{Both, Plan, Progress};
use super::registry::{Registry, RegistryError};
use super::session::RemoteMachine;
use super::steering::{self, Steered};
use crate::link::{Address, TcpSource};
use crate::migrate::source::Source;
use crate::migrate::{CancelFlag, ControlMessage, OnStuck, Pace, SourceOptions};
use crate::model::id::VmName;
use crate::model::{MigrationId, MigrationReport, VmRef};
use crate::port::{JournalError, LinkError, MachineError, Region};
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
    let mut machine = RemoteMachine::attach(&registry.socket(&entry.name, "session"), migration, journal)?;
    let unreachable = |source| BeginError::Link { address: request.to.clone(), source };
    let mut link =
        TcpSource::<ControlMessage>::dial(request.to.clone(), migration, request.options.stall).map_err(unreachable)?;
    let shape = machine.shape().clone();
    let region = machine.region();
    let options = SourceOptions { peer: request.to.to_string(), ..request.options };
    let pace = Pace::new(options.bandwidth);
    let plan = Plan {
        migration_id: migration,
        vm_id: entry.vm_id,
        vm_name: entry.name.clone(),
        target: options.peer.clone(),
        strategy: options.strategy.to_string(),
        memory_bytes: shape.memory_bytes,
        downtime: options.downtime,
        fixed_cost: options.fixed_cost,
    };
    let progress = Arc::new(Progress::new(plan, pace.clone(), request.show_progress));
    let steered = Steered {
        progress: Arc::clone(&progress),
        cancel: cancel.clone(),
        state_dir: entry.state_dir.clone(),
        streams: options.streams,
        throttle: (options.on_stuck == OnStuck::Stun).then(|| registry.socket(&entry.name, "observe")),
    };
    let socket = steering::path(&registry, &entry.name);
    let served = steering::serve(&socket, steered).inspect_err(|error| {
        tracing::warn!("{}: {error}: this migration can only be steered by signals", socket.display());
    });
    let report = Source {
        id: migration,
        options: &options,
        shape: &shape,
        region: region.as_ref() as &dyn Region,
        machine: &mut machine,
        link: &mut link,
        clock: &MonotonicClock,
        observer: &Both { events: &log, progress: &progress },
        cancel,
        pace,
    }
    .run();
    progress.end(report.clone());
    drop(served);
    // A machine that was killed could not take itself out of the run folder.
    registry.sweep(&entry.name);
    audit::record(
        &entry.state_dir,
        &Action {
            who: audit::me(),
            what: "migrate",
            vm_id: entry.vm_id,
            // One that does not run is refused by its machine, and nothing was done.
            before: "running here".to_owned(),
            after: report.owner.name().to_owned(),
            result: match report.reason.as_str() {
                "" => report.ending.name().to_owned(),
                reason => format!("{}: {reason}", report.ending.name()),
            },
        },
    );
    Ok(report)
}
