//! The manager at a source: finds the VM, dials the target, runs [`crate::migrate::source`], reports.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::announce::follow::Watching;
use super::audit::{self, Action};
use super::clock::MonotonicClock;
use super::config::{AnnounceConfig, names};
use super::events::{EventLog, Hold};
use super::foresight::{self, Experience, Foresee, Foresight};
use super::out::complain;
use super::profile::ProfileError;
use super::progress::{All, Plan, Progress};
use super::registry::{MachineEntry, Registry, RegistryError};
use super::session::RemoteMachine;
use super::steering::{self, Steered};
use super::traffic::Traffic;
use super::trust::{TlsOptions, tls_for};
use super::tunnel::former::{FormerEnd, FormerRequest};
use crate::link::{Address, TcpSource, TlsError};
use crate::migrate::source::{Heard, Source};
use crate::migrate::{CancelFlag, ControlMessage, Observer, OnStuck, Pace, SourceOptions};
use crate::model::id::VmName;
use crate::model::{
    Ending, LinkReport, MigrationId, MigrationRecord, MigrationReport, RoundReport, Step, TunnelSpec, VmRef, WriteCurve,
};
use crate::net::place;
use crate::port::{JournalError, JournalRecord, LinkError, MachineError, Region, SourceTunnel};
use crate::store::{FileJournal, HistoryLog};
use crate::time::unix_ms;

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
        "{0} would carry guest memory in the clear over a network; write tls:// at both ends (certificates by `dunlin pki`), \
         or add --insecure-plaintext if that network is trusted (allowed without it: loopback, and network namespaces other than the host's own)"
    )]
    Plaintext(Address),
    /// What the link is to be encrypted with.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Its writers must not be slowed.
    #[error(
        "the writers of `{0}` are never slowed: `never` in [stun] of the configuration names it; migrate it with another --on-stuck"
    )]
    NeverStunned(VmName),
    /// There is nothing to go on with.
    #[error("{0}")]
    NotInDoubt(String),
    /// A signal came before anything was moved.
    #[error("interrupted while the VM's writing was measured")]
    Interrupted,
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
    /// What is wanted to be known of it first.
    pub foresee: Foresee,
    /// When announcements are repeated of a VM that runs here again, and how many all VMs of the host may send.
    pub announce: AnnounceConfig,
    /// VMs whose writers are never slowed, as the configuration names them.
    pub never_stunned: Vec<String>,
    /// Where this host's VMs are.
    pub run_dir: PathBuf,
    /// Plain TCP beyond loopback is fine.
    pub insecure_plaintext: bool,
    /// What an encrypted link is made with.
    pub tls: TlsOptions,
    /// By what the VM is to keep its addresses in another subnet.
    pub tunnel: Option<TunnelSpec>,
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
    /// When announcements are repeated of a VM that runs here again, and how many all VMs of the host may send.
    pub announce: AnnounceConfig,
    /// Where this host's VMs are.
    pub run_dir: PathBuf,
    /// Plain TCP beyond loopback is fine.
    pub insecure_plaintext: bool,
    /// What an encrypted link is made with.
    pub tls: TlsOptions,
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
    /// The target's host.
    host: String,
    /// What is expected of it.
    foresight: Option<Foresight>,
    traffic: Option<Traffic>,
    announce: AnnounceConfig,
    /// This host's end of a tunnel.
    tunnel: Option<FormerEnd>,
    show_progress: bool,
}

/// From when on bridges here may have the VM elsewhere.
struct Leaving<'a>(&'a Watching);

impl Observer for Leaving<'_> {
    fn step(&self, step: Step, _detail: &str) {
        if matches!(step, Step::Released | Step::Lent) {
            self.0.begin();
        }
    }

    fn round(&self, _round: &RoundReport) {}

    fn progress(&self, _round: u32, _sent_pages: u64, _due_pages: u64) {}
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
    if allowed || address.is_encrypted() || address.is_loopback() || in_private_namespace() {
        Ok(())
    } else {
        Err(BeginError::Plaintext(address.clone()))
    }
}

/// The VM's curve, if it is asked for; why it could not be had, where it can go without.
fn measured(
    request: &MigrateRequest,
    entry: &MachineEntry,
) -> Result<Option<Result<WriteCurve, ProfileError>>, BeginError> {
    let (Foresee::Measure(config) | Foresee::Choose(config)) = &request.foresee else { return Ok(None) };
    match foresight::measure(&request.run_dir, &entry.state_dir, &VmRef::Name(entry.name.clone()), config) {
        Err(ProfileError::Interrupted) => Err(BeginError::Interrupted),
        Err(error) => {
            tracing::warn!(vm = %entry.name, "how it writes could not be measured: {error}");
            Ok(Some(Err(error)))
        }
        found => Ok(Some(found)),
    }
}

/// Adds a migration to the log of those that are over. A log that cannot be written is reported, and stops nothing.
fn keep(state_dir: &Path, report: &MigrationReport, peer: &str, options: &SourceOptions) {
    let unix_ms = unix_ms();
    let Some(record) = MigrationRecord::of(report, peer, options.bandwidth, unix_ms) else { return };
    if let Err(error) = HistoryLog::new(state_dir).append(&record) {
        tracing::warn!("the log of migrations in {}: {error}", state_dir.display());
    }
}

/// Moves a VM. Returns once its fate is known, whatever it is.
///
/// # Errors
/// What kept the migration from beginning.
pub fn migrate(request: MigrateRequest, cancel: CancelFlag) -> Result<MigrationReport, BeginError> {
    check_plaintext(&request.to, request.insecure_plaintext)?;
    let tls = tls_for(&request.to, &request.tls)?;
    let registry = Registry::new(&request.run_dir);
    let entry = registry.find(&request.vm)?;
    let never = names(&request.never_stunned, entry.name.as_str(), entry.vm_id, entry.pid);
    if request.options.on_stuck == OnStuck::Stun && never {
        return Err(BeginError::NeverStunned(entry.name));
    }
    let traffic = Traffic::toward(&request.to);
    let curve = measured(&request, &entry)?;
    let migration = MigrationId::random();
    let journal = FileJournal::open(&entry.state_dir)?;
    let events = request.events.as_deref();
    let log = EventLog::new(migration, "source", events, request.hold.clone())
        .map_err(|source| BeginError::Events { path: format!("{events:?}"), source })?;
    let machine = RemoteMachine::attach(&registry.served(&entry, "session"), migration, journal)?;
    let region = machine.region();
    let experience = Experience::read(&entry.state_dir, request.to.host());
    let (peer, place) = (request.to.to_string(), place::of_process(entry.pid));
    let mut options = SourceOptions { peer, place, ..request.options };
    options.fixed_cost = experience.fixed_cost(options.downtime).cost;
    let foresight = match (&request.foresee, &curve) {
        (Foresee::Choose(_), Some(Ok(curve))) => {
            Foresight::choose(&experience, &mut options, region.as_ref(), curve, !never)
        }
        (Foresee::Choose(_), other) => {
            let why = match other {
                Some(Err(error)) => format!("how the VM writes could not be measured ({error})"),
                _ => "how the VM writes is not known".to_owned(),
            };
            Foresight::unchosen(&experience, &mut options, region.as_ref(), &why)
        }
        (_, Some(Ok(curve))) => Foresight::with_curve(&experience, &options, region.as_ref(), curve),
        _ => Foresight::new(&experience, &options, region.as_ref()),
    };
    if request.show_progress
        && let Some(chosen) = foresight.chosen()
    {
        complain!("auto: {}: {}", chosen.plan, chosen.reason);
    }
    let unreachable = |source| BeginError::Link { address: request.to.clone(), source };
    let link =
        TcpSource::<ControlMessage>::dial(request.to.clone(), tls, migration, options.stall).map_err(unreachable)?;
    let kind = options.strategy.to_string();
    let host = request.to.host().to_owned();
    let foresight = Some(foresight);
    let (announce, show_progress) = (request.announce, request.show_progress);
    let tunnel = request.tunnel.map(|spec| {
        FormerEnd::new(FormerRequest {
            spec,
            to: request.to.clone(),
            migration,
            vm_id: entry.vm_id,
            vm_name: entry.name.clone(),
            nets: machine.shape().nets.clone(),
            run_dir: request.run_dir.clone(),
            state_dir: entry.state_dir.clone(),
        })
    });
    let begun = Begun {
        migration,
        entry,
        machine,
        link,
        log,
        options,
        kind,
        host,
        foresight,
        traffic,
        announce,
        tunnel,
        show_progress,
    };
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
    let left = journal.all()?.into_iter().find_map(|(migration, vm, record)| match record {
        JournalRecord::Released { peer } if vm == entry.vm_id => Some((migration, peer, None)),
        JournalRecord::Lent { peer, lease_ms } if vm == entry.vm_id => {
            Some((migration, peer, Some(Duration::from_millis(lease_ms))))
        }
        _ => None,
    });
    let Some((migration, peer, lease)) = left else {
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
    let tls = tls_for(&to, &request.tls)?;
    let events = request.events.as_deref();
    let log = EventLog::new(migration, "source", events, request.hold.clone())
        .map_err(|source| BeginError::Events { path: format!("{events:?}"), source })?;
    let machine = RemoteMachine::reattach(&registry.served(&entry, "session"), migration, journal)?;
    let unreachable = |source| BeginError::Link { address: to.clone(), source };
    let link =
        TcpSource::<ControlMessage>::dial(to.clone(), tls, migration, request.options.stall).map_err(unreachable)?;
    let options = SourceOptions { peer: to.to_string(), ..request.options };
    let kind = "recovery".to_owned();
    let (host, show_progress) = (to.host().to_owned(), request.show_progress);
    let (foresight, traffic, announce, tunnel) = (None, Traffic::toward(&to), request.announce, None);
    let begun = Begun {
        migration,
        entry,
        machine,
        link,
        log,
        options,
        kind,
        host,
        foresight,
        traffic,
        announce,
        tunnel,
        show_progress,
    };
    Ok(drive(begun, &registry, &cancel, "recover", |source| match lease {
        Some(lease) => source.recover_loan(lease),
        None => source.recover(),
    }))
}

/// What the network does when the source's end has done its work: whether bridges here have let go of a VM that has left, and the announcements that follow of one that runs here again.
fn complete_network(
    report: &mut MigrationReport,
    watching: Option<&Watching>,
    machine: &mut RemoteMachine,
    announce: &AnnounceConfig,
) {
    if report.ending == Ending::Moved {
        let source = watching.map(Watching::judge).unwrap_or_default();
        if !source.is_empty() {
            report.network.get_or_insert_default().source = source;
        }
        return;
    }
    let Some(network) = report.network.as_mut().filter(|network| network.rounds_here > 0) else { return };
    let schedule = announce.schedule.seeded(report.migration_id.0.as_u64_pair().1);
    match machine.repeat_announcements(schedule.instants().skip(1), announce.frames_per_second) {
        Ok(()) => network.rounds_here = schedule.rounds(),
        Err(error) => tracing::warn!("the VM is announced only once here: {error}"),
    }
}

/// Lets the source's end do its work, seen and steered from outside.
fn drive(
    begun: Begun,
    registry: &Registry,
    cancel: &CancelFlag,
    what: &'static str,
    go: impl FnOnce(Source<'_>) -> MigrationReport,
) -> MigrationReport {
    let Begun {
        migration,
        entry,
        mut machine,
        mut link,
        log,
        options,
        kind,
        host,
        foresight,
        mut traffic,
        announce,
        mut tunnel,
        show_progress,
    } = begun;
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
        encryption: link.encryption(),
        chosen: foresight.as_ref().and_then(|foresight| foresight.chosen().cloned()),
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
    if let Some(traffic) = &mut traffic {
        traffic.begin();
    }
    let mut observers: Vec<&dyn Observer> = vec![progress.as_ref(), &log];
    if let Some(foresight) = &foresight {
        observers.insert(0, foresight);
    }
    let watching = Watching::departure(&shape.nets)
        .inspect_err(|error| tracing::warn!("the bridges of the VM's taps are not watched: {error}"))
        .ok();
    let leaving = watching.as_ref().map(Leaving);
    if let Some(leaving) = &leaving {
        observers.push(leaving);
    }
    let mut report = go(Source {
        id: migration,
        options: &options,
        shape: &shape,
        region: region.as_ref() as &dyn Region,
        machine: &mut machine,
        link: &mut link,
        clock: &MonotonicClock,
        observer: &All(&observers),
        cancel: cancel.clone(),
        pace,
        heard: Heard::default(),
        tunnel: tunnel.as_mut().map(|tunnel| tunnel as &mut dyn SourceTunnel),
    });
    complete_network(&mut report, watching.as_ref(), &mut machine, &announce);
    report.tunnel = tunnel.and_then(|tunnel| tunnel.settle(report.ending));
    let seen = traffic.map(|traffic| traffic.report(report.wire_bytes)).unwrap_or_default();
    report.link = Some(LinkReport { encryption: link.encryption(), ..seen });
    if let Some(foresight) = &foresight {
        foresight.complete(&mut report);
        keep(&entry.state_dir, &report, &host, &options);
    }
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
