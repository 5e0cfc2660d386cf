//! The manager at a target: listens, starts a machine process for an offer, runs [`crate::migrate::target`], repeats the
//! announcements, and answers sources that ask later.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use super::addresses::Origin;
use super::announce::follow::Watching;
use super::announce::inquiry::{self, Inquiry, InquiryOrder};
use super::clock::MonotonicClock;
use super::config::AnnounceConfig;
use super::control::{ControlError, ask_info};
use super::events::{EventLog, Hold};
use super::machine::{Places, RunState};
use super::pacing::Pacer;
use super::registry::{MachineEntry, Registry, RegistryError};
use super::rounds;
use super::session::{Creation, RemoteMachine, SESSION_VERSION};
use super::tunnel::came_back;
use super::tunnel::new::{Guest, NewEnd};
use crate::announce::conflict::OnConflict;
use crate::link::{Arrival, Listener, TcpTarget};
use crate::migrate::target::{Arrived, Asked, Host, Orphan, RelayPhase, Reservation, Target, TargetError, Telling};
use crate::migrate::{AnswerError, CancelFlag, ControlMessage, Offer, answer};
use crate::model::id::VmName;
use crate::model::network::{Followed, Verdict};
use crate::model::{
    DiskSpec, MachineShape, MigrationId, NetSpec, NetworkPlace, NetworkReport, SerialSpec, TunnelOffer, VmRef,
    WaitReport, WireguardKey, WireguardOffer,
};
use crate::net::place;
use crate::net::tap::Tap;
use crate::port::{JournalError, LinkError, MachineError, Region, TargetLink};
use crate::service::out::complain;
use crate::shm::hugetlb;
use crate::store::FileJournal;

/// How often waits look at the cancel flag.
const TICK: Duration = Duration::from_millis(200);
/// How long a connected peer may take to say what it wants.
const GREETING_LIMIT: Duration = Duration::from_secs(5);
/// How long what is left here of the same VM's last move may take to be gone; the source waits for its answer meanwhile.
const GOING_LIMIT: Duration = Duration::from_secs(5);

/// A target that cannot listen, or lost what it received.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The link.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A late question.
    #[error(transparent)]
    Answer(#[from] AnswerError),
    /// The VM did not come.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// There is no such VM whose manager could be replaced.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Its process does not say what it is.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// Its process refuses another manager.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The event log.
    #[error("event log: {0}")]
    Events(std::io::Error),
}

/// What `dunlin vm receive` was asked.
#[derive(Debug)]
pub struct ReceiveRequest {
    /// The name that the VM gets here; its own if `None`.
    pub name: Option<VmName>,
    /// Network ports of this host, in the VM's order; the source's names if empty.
    pub nets: Vec<NetSpec>,
    /// Disks of this host, in the VM's order; all of them.
    pub disks: Vec<DiskSpec>,
    /// Where the console goes.
    pub serial: SerialSpec,
    /// Whether a source may have a tunnel made here.
    pub tunnel: bool,
    /// Where things are.
    pub places: Places,
    /// When announcements are repeated, and how many all VMs of the host may send.
    pub announce: AnnounceConfig,
    /// Whether a VM that comes is announced at all; else somebody else does.
    pub announces: bool,
    /// What is done when somebody else has the VM's addresses.
    pub on_conflict: OnConflict,
    /// Where events go.
    pub events: Option<PathBuf>,
    /// For tests: stop at a step.
    pub hold: Option<Hold>,
    /// Nothing moving for this long counts as a stalled peer.
    pub stall: Duration,
}

/// Starts machine processes.
struct LocalHost<'a> {
    request: &'a ReceiveRequest,
    child: Option<Child>,
    /// What the machine is called here, once one was asked for.
    name: Option<VmName>,
    /// Where the source is.
    peer: Option<IpAddr>,
    /// What is seen of the network meanwhile.
    seen: SeenOfNetwork,
    /// What it was made as, and by which migration.
    made: Option<(MigrationId, MachineShape)>,
    /// This host's end of its tunnel.
    tunnel: Option<NewEnd>,
}

/// What is asked of the network for a VM that comes, and what is seen of its bridges.
#[derive(Default)]
struct SeenOfNetwork {
    /// The VM's taps at its source.
    former: Vec<String>,
    inquiry: Option<Inquiry>,
    /// Whether what came of it was told.
    is_told: bool,
    watching: Option<Watching>,
    rounds: u32,
    frames: u32,
}

/// Watches the bridges of these ports' taps, if that can be done.
fn watch(nets: &[NetSpec]) -> Option<Watching> {
    Watching::arrival(nets)
        .inspect_err(|error| tracing::warn!("the bridges of the VM's taps are not watched: {error}"))
        .ok()
}

impl SeenOfNetwork {
    /// Begins: the machine of `shape` waits here, whose taps were `former`.
    fn begin(request: &ReceiveRequest, shape: &MachineShape, former: Vec<String>) -> Self {
        let nets = shape.nets.clone();
        let watching = watch(&nets);
        let inquiry = Inquiry::begin(InquiryOrder {
            policy: request.on_conflict,
            vm_id: shape.vm_id,
            nets,
            run_dir: request.places.run_dir.clone(),
        });
        Self { former, inquiry, watching, ..Self::default() }
    }

    /// What is known by now.
    fn report(&mut self) -> NetworkReport {
        NetworkReport {
            asked: self.inquiry.as_mut().and_then(|inquiry| inquiry.poll().cloned()),
            rounds_sent: self.rounds,
            frames_sent: self.frames,
            target: self.watching.as_ref().map(Watching::judge).unwrap_or_default(),
            ..NetworkReport::default()
        }
    }
}

impl<'a> LocalHost<'a> {
    fn new(request: &'a ReceiveRequest) -> Self {
        Self { request, child: None, name: None, peer: None, made: None, tunnel: None, seen: SeenOfNetwork::default() }
    }
}

impl LocalHost<'_> {
    /// The offered shape with this host's name, taps and disks.
    fn localise(&self, offered: &MachineShape) -> Result<MachineShape, String> {
        let mut shape = offered.clone();
        if let Some(name) = &self.request.name {
            shape.name = name.clone();
        }
        let (nets, disks) = (&self.request.nets, &self.request.disks);
        if !nets.is_empty() {
            if nets.len() != shape.nets.len() {
                return Err(format!("the VM has {} network ports, --net names {}", shape.nets.len(), nets.len()));
            }
            for net in &mut shape.nets {
                let Some(own) = nets.iter().find(|own| own.station.mac == net.station.mac) else {
                    return Err(format!("no --net here has the VM's MAC address {}", net.station.mac));
                };
                net.tap.clone_from(&own.tap);
                net.station.place_as(&own.station);
            }
        }
        // Whoever can reach this port could have any file of this host written to, with this process's rights.
        if disks.is_empty() && !shape.disks.is_empty() {
            return Err(format!(
                "the VM has {} disks, and no --disk here says which files they are: a peer may not choose them",
                shape.disks.len()
            ));
        }
        if !disks.is_empty() {
            if disks.len() != shape.disks.len() {
                return Err(format!("the VM has {} disks, --disk names {}", shape.disks.len(), disks.len()));
            }
            for (disk, own) in shape.disks.iter_mut().zip(disks) {
                if disk.readonly != own.readonly {
                    return Err(format!(
                        "disk {} and {} differ in `readonly`",
                        disk.path.display(),
                        own.path.display()
                    ));
                }
                disk.path.clone_from(&own.path);
            }
        }
        Ok(shape)
    }

    /// Starts a machine process in a session of its own: a signal to this manager's terminal, or its death, must not
    /// reach it.
    fn spawn(&self) -> std::io::Result<(Child, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        let theirs: OwnedFd = theirs.into();
        let number = theirs.as_raw_fd();
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["vm", "run", "--incoming-fd", &number.to_string()]);
        if self.request.serial != SerialSpec::Stdio {
            command.stdin(Stdio::null());
        }
        // SAFETY: between fork and exec only async-signal-safe calls are made (setsid, fcntl), and `number` stays open in
        // the parent until the child has been spawned.
        unsafe {
            command.pre_exec(move || {
                rustix::process::setsid()?;
                let kept = BorrowedFd::borrow_raw(number);
                Ok(rustix::io::fcntl_setfd(kept, rustix::io::FdFlags::empty())?)
            });
        }
        let child = command.spawn()?;
        Ok((child, ours))
    }

    /// Takes out of the run folder what a machine that was killed could not.
    fn sweep(&self) {
        if let Some(name) = &self.name {
            Registry::new(&self.request.places.run_dir).sweep(name);
        }
    }

    fn make(&mut self, offer: &Offer) -> Result<RemoteMachine, String> {
        let shape = self.localise(&offer.shape)?;
        let places = &self.request.places;
        let registry = Registry::new(&places.run_dir);
        if let Some(taken) = registry.list().into_iter().find(|entry| entry.name == shape.name)
            && !(taken.vm_id == shape.vm_id && leaves(&registry, &taken))
        {
            return Err(format!("a VM named `{}` runs here already (pid {})", taken.name, taken.pid));
        }
        if shape.hugepages {
            hugetlb::check(shape.memory_bytes).map_err(|error| format!("the VM runs with --hugepages: {error}"))?;
        } else {
            check_memory(shape.memory_bytes)?;
        }
        // One that was made for the VM would lead nowhere, and a peer must not make interfaces here.
        if let Some(net) = shape.nets.iter().find(|net| !Tap::exists(&net.tap)) {
            return Err(format!("there is no tap `{}` here; make it, or name another with --net", net.tap));
        }
        let journal = FileJournal::open(&places.state_dir).map_err(|error| error.to_string())?;
        self.made = Some((offer.migration_id, shape.clone()));
        let (child, stream) = self.spawn().map_err(|error| format!("starting a machine process: {error}"))?;
        let pid = child.id();
        self.child = Some(child);
        self.name = Some(shape.name.clone());
        let (own_shape, former) = (shape.clone(), offer.shape.nets.iter().map(|net| net.tap.clone()).collect());
        let creation = Creation {
            version: SESSION_VERSION,
            migration: offer.migration_id,
            shape,
            serial: self.request.serial.clone(),
            run_dir: places.run_dir.clone(),
            state_dir: places.state_dir.clone(),
        };
        let mut machine = RemoteMachine::create(stream, creation, journal).map_err(|error| error.to_string())?;
        machine.set_process(pid).map_err(|error| error.to_string())?;
        if let Some(peer) = self.peer {
            let origin = Origin { migration_id: offer.migration_id, host: peer.to_string() };
            origin.write(&Registry::new(&places.run_dir), &own_shape.name);
        }
        self.seen = SeenOfNetwork::begin(self.request, &own_shape, former);
        Ok(machine)
    }
}

/// Whether what is here of a VM goes, waited for as long as it may take: one that its source has given up, which its own receiver lets go, or one that has moved away. A machine that has the VM does not.
fn leaves(registry: &Registry, entry: &MachineEntry) -> bool {
    let has_vm = ask_info(&registry.socket(&entry.name, "observe")).is_ok_and(|info| {
        !matches!(info.state, RunState::Receiving | RunState::Prepared | RunState::Released | RunState::Ended)
    });
    if has_vm {
        return false;
    }
    complain!(
        "dunlin: what the last move of `{}` left here (pid {}) has not ended yet; waiting up to {GOING_LIMIT:?}",
        entry.name,
        entry.pid
    );
    entry.has_ended(GOING_LIMIT)
}

/// Refuses memory that this host does not have free, so that a VM is not received only to be killed.
fn check_memory(bytes: u64) -> Result<(), String> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(|error| error.to_string())?;
    let available = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB"));
    let Some(available) = available.and_then(|kib| kib.parse::<u64>().ok()) else { return Ok(()) };
    let available = available << 10;
    if bytes <= available {
        return Ok(());
    }
    Err(format!(
        "the VM has {}, this host has {} available",
        crate::model::units::display_bytes(bytes),
        crate::model::units::display_bytes(available)
    ))
}

impl Host for LocalHost<'_> {
    fn reserve(&mut self, offer: &Offer) -> Result<Reservation, String> {
        match self.make(offer) {
            Ok(machine) => {
                let region = machine.region() as Arc<dyn Region>;
                Ok(Reservation { machine: Box::new(machine), region })
            }
            Err(reason) => {
                // The process has nobody to serve: its session has ended, and it exits.
                if let Some(mut child) = self.child.take() {
                    let _ = child.kill();
                    let _ = child.wait();
                }
                self.sweep();
                Err(reason)
            }
        }
    }

    fn may_refuse(&self) -> bool {
        self.seen.inquiry.as_ref().is_some_and(Inquiry::may_refuse)
    }

    fn note_former_place(&mut self, place: NetworkPlace) {
        if place::own() == Some(place)
            && let Some(inquiry) = &mut self.seen.inquiry
        {
            inquiry.comes_from(self.seen.former.iter().cloned());
        }
    }

    fn asked(&mut self) -> Asked {
        let Some(inquiry) = self.seen.inquiry.as_mut().filter(|_| !self.seen.is_told) else { return Asked::Not };
        let Some(report) = inquiry.poll().cloned() else { return Asked::Pending };
        self.seen.is_told = true;
        let refusal = inquiry.refusal().map(|why| {
            format!("{why}; or have the VM taken all the same by `dunlin vm receive --on-conflict warn` there")
        });
        if let Some((_, shape)) = &self.made {
            inquiry::audit(&self.request.places.state_dir, "receive", shape.vm_id, &report, refusal.is_some());
        }
        Asked::Known { report, refusal }
    }

    fn may_announce(&self) -> bool {
        self.request.announces
    }

    fn announces(&mut self) {
        if let Some(watching) = &self.seen.watching {
            watching.begin();
        }
    }

    fn announced(&mut self, frames: u32) {
        // A VM without cards has nothing to say.
        self.seen.rounds += u32::from(frames > 0);
        self.seen.frames += frames;
    }

    fn network(&mut self, is_late: bool) -> Option<NetworkReport> {
        let has_asked = self.seen.inquiry.as_mut().is_none_or(|inquiry| inquiry.poll().is_some());
        let is_settled = has_asked && self.seen.watching.as_ref().is_none_or(Watching::is_settled);
        (is_settled || is_late).then(|| self.seen.report())
    }

    fn make_tunnel(
        &mut self,
        offer: &TunnelOffer,
        wireguard: Option<&WireguardOffer>,
    ) -> Result<Option<WireguardKey>, String> {
        if !self.request.tunnel {
            return Err("this receiver makes no tunnels for VMs from other subnets; start it with --tunnel".to_owned());
        }
        let Some((migration, shape)) = &self.made else { return Err("a tunnel for no VM".to_owned()) };
        if self.tunnel.is_some() {
            return Err("a second tunnel for one VM".to_owned());
        }
        let guest = Guest { migration: *migration, vm_id: shape.vm_id, vm_name: &shape.name, nets: &shape.nets };
        let opened = NewEnd::open(offer, wireguard, &self.request.places, guest);
        let (end, key) = opened.map_err(|error| error.to_string())?;
        self.tunnel = Some(end);
        Ok(key)
    }
}

/// A machine's process: a child of this manager, or of one before it.
pub enum MachineProcess {
    /// This manager's.
    Child(Child),
    /// Another's.
    Adopted(MachineEntry),
}

impl MachineProcess {
    /// Its number.
    pub fn id(&self) -> u32 {
        match self {
            Self::Child(child) => child.id(),
            Self::Adopted(entry) => entry.pid,
        }
    }

    /// Itself, if it is this manager's.
    pub fn into_child(self) -> Option<Child> {
        match self {
            Self::Child(child) => Some(child),
            Self::Adopted(_) => None,
        }
    }

    /// Whether it ended well, once it has ended. Of another's child only that it has.
    fn ended(&mut self) -> Option<bool> {
        match self {
            Self::Child(child) => child.try_wait().ok().flatten().map(|status| status.success()),
            Self::Adopted(entry) => (!entry.is_alive()).then_some(true),
        }
    }
}

/// A VM that runs here.
pub struct Received {
    /// The migration that brought it.
    pub migration_id: MigrationId,
    /// What it is called here.
    pub name: VmName,
    /// Its machine process.
    pub process: MachineProcess,
    /// Pages compared under `--verify`.
    pub verified_pages: u64,
    /// What the network had to do with it comes here when all announcements have been sent.
    network: mpsc::Receiver<NetworkReport>,
    /// This host's end of its tunnel; goes with the machine, and stays when only the manager goes.
    tunnel: Option<NewEnd>,
}

/// Waits for one VM. Attempts that fail before the VM is here are reported, and waited on for the next.
///
/// # Errors
/// What ended the waiting.
pub fn receive(
    request: &ReceiveRequest,
    listener: &Listener,
    cancel: &CancelFlag,
) -> Result<Option<Received>, ReceiveError> {
    let journal = FileJournal::open(&request.places.state_dir)?;
    while !cancel.is_set() {
        let Some(arrival) = listener.accept(TICK)? else { continue };
        match attempt(request, listener, arrival, &journal, cancel) {
            Ok(Some(received)) => return Ok(Some(received)),
            Ok(None) => {}
            Err(error @ ReceiveError::Target(TargetError::LostOwned(_) | TargetError::Owing { .. })) => {
                return Err(error);
            }
            Err(error) => {
                tracing::warn!("{error}");
                complain!("dunlin: no VM received: {error}; waiting for the next");
            }
        }
    }
    Ok(None)
}

fn attempt(
    request: &ReceiveRequest,
    listener: &Listener,
    arrival: Arrival,
    journal: &FileJournal,
    cancel: &CancelFlag,
) -> Result<Option<Received>, ReceiveError> {
    let (migration, peer) = (arrival.migration(), arrival.peer());
    let mut link = TcpTarget::<ControlMessage>::new(listener, arrival, request.stall)?;
    let control = link.control();
    let Some(first) = control.recv(GREETING_LIMIT)? else {
        return Err(LinkError::Stalled { doing: "waiting for an offer", after: GREETING_LIMIT }.into());
    };
    if let ControlMessage::Query(asked) = first {
        answer(journal, asked, control.as_ref())?;
        return Ok(None);
    }
    let observer = EventLog::new(migration, "target", request.events.as_deref(), request.hold.clone())
        .map_err(ReceiveError::Events)?;
    let mut host = LocalHost { peer, ..LocalHost::new(request) };
    let arrived = Target {
        link: &mut link,
        host: &mut host,
        clock: &MonotonicClock,
        observer: &observer,
        cancel: cancel.clone(),
        stall: request.stall,
        relay: RelayPhase::default(),
        telling: Telling::default(),
    }
    .run(first);
    let child = host.child.take();
    match (arrived, child.zip(host.name.clone())) {
        (Ok(arrived), Some((child, name))) => {
            let (migration_id, verified_pages) = (arrived.migration_id, arrived.verified_pages);
            let mut tunnel = host.tunnel.take();
            tunnel.iter_mut().for_each(NewEnd::let_be);
            came_back(&request.places.run_dir, arrived.vm_id);
            let network = repeat_announcements(arrived, request, host.seen);
            Ok(Some(Received {
                migration_id,
                name,
                process: MachineProcess::Child(child),
                verified_pages,
                network,
                tunnel,
            }))
        }
        (Ok(_), None) => unreachable!("a VM arrived without a machine process"),
        (Err(error), child) => {
            // Whatever machine there was has been told to end, or has died; nothing may stay behind. One that owns the
            // VM is no longer ours to end.
            let ours = !matches!(error, TargetError::LostOwned(_) | TargetError::Owing { .. });
            if let Some((mut child, _)) = child.filter(|_| ours) {
                end(&mut child);
            }
            // Where the VM runs on it needs its tunnel.
            if matches!(error, TargetError::Owing { .. }) {
                host.tunnel.iter_mut().for_each(NewEnd::let_be);
            }
            host.sweep();
            Err(error.into())
        }
    }
}

/// Takes the place of a manager that died: what the VM touches and is here it gets at once; for the rest the source of its migration is waited for.
///
/// # Errors
/// No such VM, or one that is not in doubt and is owed nothing; or what ended it.
pub fn recover(
    request: &ReceiveRequest,
    vm: &VmRef,
    listener: &Listener,
    cancel: &CancelFlag,
) -> Result<Received, ReceiveError> {
    let registry = Registry::new(&request.places.run_dir);
    let entry = registry.find(vm)?;
    let info = ask_info(&registry.served(&entry, "observe"))?;
    let Some(migration_id) = info.migration_id else {
        let reason = format!("`{}` was brought by no migration", entry.name);
        return Err(MachineError::Refused { action: "be taken over", reason }.into());
    };
    let journal = FileJournal::open(&entry.state_dir)?;
    let machine = RemoteMachine::reattach(&registry.served(&entry, "session"), migration_id, journal)?;
    let region = machine.region() as Arc<dyn Region>;
    let orphan = Orphan { migration_id, vm_id: entry.vm_id, machine: Box::new(machine), region, cpus: info.cpus };
    let observer = EventLog::new(migration_id, "target", request.events.as_deref(), request.hold.clone())
        .map_err(ReceiveError::Events)?;
    let mut link = TcpTarget::<ControlMessage>::unconnected(listener, migration_id, request.stall);
    // Its addresses are its own already; its bridges have perhaps not heard so.
    let mut host = LocalHost::new(request);
    host.seen.watching = watch(&info.nets);
    let arrived = Target {
        link: &mut link,
        host: &mut host,
        clock: &MonotonicClock,
        observer: &observer,
        cancel: cancel.clone(),
        stall: request.stall,
        relay: RelayPhase::default(),
        telling: Telling::default(),
    }
    .recover(orphan)?;
    let name = entry.name.clone();
    let network = repeat_announcements(arrived, request, host.seen);
    let tunnel = NewEnd::adopt(&request.places.run_dir, entry.vm_id);
    Ok(Received { migration_id, name, process: MachineProcess::Adopted(entry), verified_pages: 0, network, tunnel })
}

/// Sees a discarded machine process off.
fn end(child: &mut Child) {
    for _ in 0..50 {
        if matches!(child.try_wait(), Ok(Some(_))) {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    tracing::warn!(pid = child.id(), "a discarded machine did not end by itself; killed");
    let _ = child.kill();
    let _ = child.wait();
}

/// The rounds of announcements that follow the first one, which left before the guest ran, on a thread of their own. When they are over it says whether the bridges of the VM's taps have it there.
fn repeat_announcements(
    arrived: Arrived,
    request: &ReceiveRequest,
    mut seen: SeenOfNetwork,
) -> mpsc::Receiver<NetworkReport> {
    let (told, network) = mpsc::channel();
    let mut machine = arrived.machine;
    let migration = arrived.migration_id;
    let schedule = request.announce.schedule.seeded(migration.0.as_u64_pair().1);
    let pacer = Pacer::join(&request.places.run_dir, request.announce.frames_per_second);
    let announces = request.announces;
    let repeat = move || {
        // One that ran here before this manager came was announced by another.
        if let Some(watching) = &seen.watching {
            watching.begin();
        }
        let never = AtomicBool::new(false);
        let later = schedule.instants().skip(1);
        // Without announcements the bridges have as long to hear the VM itself.
        let mut round = || if announces { machine.announce() } else { Ok(0) };
        let sent = rounds::repeat(later, &pacer, &MonotonicClock, &never, &mut round);
        seen.rounds += if sent.frames > 0 { sent.rounds } else { 0 };
        seen.frames += sent.frames;
        let report = seen.report();
        report.target.iter().for_each(|one| tell_followed(migration, one));
        // Whoever asked for it may have gone.
        let _unheard = told.send(report);
    };
    if let Err(error) = std::thread::Builder::new().name("announce".into()).spawn(repeat) {
        tracing::warn!("no thread for repeated announcements: {error}");
    }
    network
}

fn tell_followed(migration: MigrationId, followed: &Followed) {
    let Followed { bridge, mac, expected_port, causes, .. } = followed;
    let port = expected_port.as_deref().unwrap_or_default();
    if followed.verdict != Verdict::NotRelearned {
        tracing::info!(%migration, "bridge `{bridge}` has {mac} behind `{port}`");
        return;
    }
    for cause in causes {
        tracing::warn!(%migration, "bridge `{bridge}` has not relearned {mac} behind `{port}`: {}: {}", cause.sentence, cause.remedy);
    }
}

/// Serves late questions on `listener` while the VM runs: a source that lost contact after `released` asks here. Returns
/// whether the machine ended well, or `None` when `cancel` asks this manager to go. `on_network` is told once what the network had to do with it.
pub fn answer_questions(
    request: &ReceiveRequest,
    listener: &Listener,
    received: &mut Received,
    cancel: &CancelFlag,
    on_network: &mut dyn FnMut(&NetworkReport),
) -> Result<Option<bool>, ReceiveError> {
    let journal = FileJournal::open(&request.places.state_dir)?;
    while !cancel.is_set() {
        if let Ok(report) = received.network.try_recv() {
            on_network(&report);
        }
        if let Some(well) = received.process.ended() {
            // One that was killed could not take itself out of the run folder.
            Registry::new(&request.places.run_dir).sweep(&received.name);
            if let Some(tunnel) = received.tunnel.take() {
                tunnel.end();
            }
            return Ok(Some(well));
        }
        let Some(arrival) = listener.accept(TICK)? else { continue };
        let answered = TcpTarget::<ControlMessage>::new(listener, arrival, request.stall)
            .map_err(ReceiveError::from)
            .and_then(|link| match link.control().recv(GREETING_LIMIT)? {
                Some(ControlMessage::Query(asked)) => Ok(answer(&journal, asked, link.control().as_ref())?),
                // Every page is here, and it has not heard so.
                Some(ControlMessage::Recover { migration, .. }) if migration == received.migration_id => {
                    Ok(link.control().send(&ControlMessage::Complete(WaitReport::default()))?)
                }
                Some(ControlMessage::Offer(_)) => {
                    let busy = "this receiver has its VM already; start another `dunlin vm receive`".to_owned();
                    Ok(link.control().send(&ControlMessage::Refuse(busy))?)
                }
                _ => Ok(()),
            });
        if let Err(error) = answered {
            tracing::warn!("a late question: {error}");
        }
    }
    Ok(None)
}
