//! Who is where: keeps the map of this host's VMs to their addresses while an agent runs, and makes one in passing where none does.
//!
//! Joins the processes that hold VMs, what these were started with, the kernel's tables and the log of migrations with [`Directory`], which owns what is believed. A VM's process is looked at when
//! the VM is new, and not again: what comes later comes by the kernel's notifications. The map lies in the run folder, so that it outlives the agent, and goes with a boot, as the VMs do.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::announce::find;
use super::control::{ControlError, ask_info, blocking, request};
use super::inventory::{self, HostVm};
use super::machine::RunState;
use super::registry::{Registry, write_whole};
use crate::announce::directory::Directory;
use crate::model::addresses::{AddressBook, KnownCard, KnownVm, LeftVm, SharedAddress};
use crate::model::network::LearntFrom;
use crate::model::schema::Schema;
use crate::model::{MigrationId, VmId, chain};
use crate::net::bridge::{self, LinkKind};
use crate::net::changes::TableChanges;
use crate::net::neighbour::{self, Neighbour};
use crate::net::place;
use crate::store::HistoryLog;
use crate::time::unix_ms;

/// The map's file in the run folder.
const FILE: &str = "addresses.json";
/// A longer file is none of ours.
const MOST_FILE_BYTES: u64 = 64 << 20;
/// In how many looks one is looked at again whose cards could not be known.
const AGAIN_IN: u64 = 10;
/// A migration is logged so long after its VM's process has ended here, at most: what is relayed, and the target's last word.
const SETTLED_IN: Duration = Duration::from_secs(60);
/// Of a VM that waits for its memory.
const ARRIVING: &str = "it is arriving";
/// `USER_HZ`: what the kernel counts process times in, on every architecture that Linux has kept it for.
const TICKS_PER_SECOND: u64 = 100;

/// Whence a hosted VM came, as its receiver writes it beside its entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The migration.
    pub migration_id: MigrationId,
    /// The host that it came from, as its connection had it.
    pub host: String,
}

impl Schema for Origin {
    const SCHEMA: &'static str = "dunlin.origin/v1";
}

impl Origin {
    fn path(registry: &Registry, name: &crate::model::id::VmName) -> PathBuf {
        registry.folder(name).join("origin.json")
    }

    /// Writes it beside the VM's entry. One that cannot be written is only not known later.
    pub fn write(&self, registry: &Registry, name: &crate::model::id::VmName) {
        let path = Self::path(registry, name);
        let written = serde_json::to_string(&self.tagged()).map_err(io::Error::from);
        if let Err(error) = written.and_then(|text| fs::write(&path, text)) {
            tracing::warn!("{}: {error}", path.display());
        }
    }

    fn read(registry: &Registry, name: &crate::model::id::VmName) -> Option<Self> {
        serde_json::from_str(&fs::read_to_string(Self::path(registry, name)).ok()?).ok()
    }
}

/// A map that is kept by a thread of its own: a VM whose process does not answer holds up nobody else. Ends when it is dropped.
pub(super) struct Kept {
    looks: Option<SyncSender<Vec<HostVm>>>,
    book: Arc<Mutex<Option<Arc<AddressBook>>>>,
    thread: Option<JoinHandle<()>>,
}

impl Kept {
    /// Begins to keep the map of this run folder.
    ///
    /// # Errors
    /// No thread for it.
    pub(super) fn start(run_dir: &Path) -> io::Result<Self> {
        let (looks, at) = mpsc::sync_channel::<Vec<HostVm>>(1);
        let book = Arc::new(Mutex::new(None));
        let (run_dir, shown) = (run_dir.to_owned(), Arc::clone(&book));
        let thread = std::thread::Builder::new().name("addresses".into()).spawn(move || {
            let mut keeper = Keeper::open(&run_dir);
            for vms in at {
                let book = keeper.look(&vms);
                *shown.lock().unwrap_or_else(PoisonError::into_inner) = Some(book);
            }
        })?;
        Ok(Self { looks: Some(looks), book, thread: Some(thread) })
    }

    /// These VMs are here. The map as it is by now, once there is one.
    pub(super) fn look(&self, vms: &[HostVm]) -> Option<Arc<AddressBook>> {
        // While a look is going on another one waits, and a third is left out.
        if let Some(looks) = &self.looks {
            let _busy_or_failed = looks.try_send(vms.to_vec());
        }
        self.book.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.looks = None;
        if let Some(thread) = self.thread.take() {
            // It has said why, if it panicked.
            let _ended = thread.join();
        }
    }
}

/// The map, and what it is kept by. Who keeps it has it look now and then; what changes meanwhile the kernel tells.
pub struct Keeper {
    run_dir: PathBuf,
    host: String,
    directory: Directory,
    changes: Option<TableChanges>,
    looks: u64,
    /// Hosted VMs that have left, and of which it is not known yet whither: their migrations are logged when all is over.
    unsettled: Vec<(KnownVm, Instant)>,
    told: Vec<SharedAddress>,
    /// Whether conflicts are told in the log; else whoever reads the map does that.
    tells: bool,
    /// What the file has; none: it is not written.
    written: Option<AddressBook>,
}

impl Keeper {
    /// Begins with what the file in the run folder says, and keeps that up to date.
    pub fn open(run_dir: &Path) -> Self {
        let (keeper, book) = Self::begin(run_dir);
        // Where there is nothing to say nothing is written.
        let written = Some(AddressBook { host: keeper.host.clone(), ..book });
        Self { written, tells: true, ..keeper }
    }

    /// The same, and writes nothing.
    pub fn beside(run_dir: &Path) -> Self {
        Self::begin(run_dir).0
    }

    fn begin(run_dir: &Path) -> (Self, AddressBook) {
        let book = match read(&run_dir.join(FILE)) {
            Ok(book) => book,
            Err(error) if error.kind() == io::ErrorKind::NotFound => AddressBook::default(),
            Err(error) => {
                tracing::warn!("{}: {error}: who was here is forgotten", run_dir.join(FILE).display());
                AddressBook::default()
            }
        };
        let changes = TableChanges::open()
            .inspect_err(|error| {
                tracing::warn!("addresses of VMs are read from the tables at each look: {}", chain(error));
            })
            .ok();
        let keeper = Self {
            run_dir: run_dir.to_owned(),
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            directory: Directory::restore(book.clone()),
            changes,
            looks: 0,
            unsettled: Vec::new(),
            told: Vec::new(),
            tells: false,
            written: None,
        };
        (keeper, book)
    }

    /// One look at the VMs that are here now.
    pub fn look_around(&mut self) -> Arc<AddressBook> {
        let vms = inventory::all(&self.run_dir, None);
        self.look(&vms)
    }

    /// One look: `vms` are those that are here.
    fn look(&mut self, vms: &[HostVm]) -> Arc<AddressBook> {
        self.looks += 1;
        let changes = self.changes.as_mut().map(TableChanges::take);
        let mut neighbours = None;
        let mut bridges = false;
        match changes {
            Some(Ok(changes)) if !changes.lost && self.looks > 1 => {
                bridges = changes.bridges;
                neighbours = Some(changes.neighbours);
            }
            Some(Err(error)) => {
                tracing::warn!("{}", chain(&error));
                self.changes = None;
            }
            _ => {}
        }
        let came = self.take_vms(vms, bridges);
        // Of one that is new the tables may have known long before.
        let neighbours = match neighbours {
            Some(neighbours) if !came => neighbours,
            _ => neighbour::all().unwrap_or_else(|error| {
                tracing::warn!("{}", chain(&error));
                Vec::new()
            }),
        };
        for Neighbour { ip, mac, router, .. } in neighbours.into_iter().filter(|neighbour| !neighbour.doubtful) {
            self.directory.learn(mac, ip, LearntFrom::NeighbourTable, router.then_some(true));
        }
        let book = self.directory.book(unix_ms(), &self.host);
        for conflict in book.conflicts.iter().filter(|conflict| self.tells && !self.told.contains(conflict)) {
            tracing::warn!("{}", conflict.sentence());
        }
        self.told.clone_from(&book.conflicts);
        self.write(&book);
        Arc::new(book)
    }

    /// Who has come and gone. Whether anybody was looked at.
    fn take_vms(&mut self, vms: &[HostVm], bridges: bool) -> bool {
        // One that moves within this host has two processes, of which the older one counts until it ends.
        let mut by_age: Vec<&HostVm> = vms.iter().collect();
        by_age.sort_by_key(|vm| (vm.start_time_ticks, vm.pid));
        let mut present = BTreeSet::new();
        let mut came = false;
        for vm in by_age {
            if !present.insert(vm.vm_id) {
                continue;
            }
            let is_due = self.looks == 1 || self.looks.is_multiple_of(AGAIN_IN) || bridges;
            let is_known = self.directory.knows(vm.vm_id, vm.pid);
            let was_tried = self.directory.knows_process(vm.vm_id, vm.pid);
            if is_known || (was_tried && !is_due) {
                continue;
            }
            self.directory.arrive(known(vm, &self.run_dir));
            came = true;
        }
        for gone in self.directory.keep_only(&present) {
            // One that never arrived was never here.
            if gone.problem.as_deref() == Some(ARRIVING) {
                continue;
            }
            // One of which no address was known is not asked for, and would take the place of one that is.
            if gone.cards.is_empty() && !gone.is_hosted {
                continue;
            }
            let went = left(&gone);
            if gone.state_dir.is_some() && went.went_by.is_none() {
                self.unsettled.push((gone, Instant::now()));
            }
            self.directory.leave(went);
        }
        self.settle(&present);
        came
    }

    /// Whither those went of which it was not known.
    fn settle(&mut self, present: &BTreeSet<VmId>) {
        let directory = &mut self.directory;
        self.unsettled.retain(|(gone, since)| {
            if present.contains(&gone.vm_id) || since.elapsed() > SETTLED_IN {
                return false;
            }
            let went = left(gone);
            let is_known = went.went_by.is_some();
            if is_known {
                directory.leave(went);
            }
            !is_known
        });
    }

    fn write(&mut self, book: &AddressBook) {
        let Some(written) = &mut self.written else { return };
        let news = AddressBook { unix_ms: book.unix_ms, ..written.clone() } != *book;
        if !news {
            return;
        }
        let path = self.run_dir.join(FILE);
        let done = serde_json::to_string(&book.tagged()).map_err(io::Error::from).and_then(|text| {
            fs::create_dir_all(&self.run_dir)?;
            write_whole(&path, &text)
        });
        match done {
            Ok(()) => *written = book.clone(),
            Err(error) => {
                tracing::warn!("{}: {error}: who is where is forgotten when this ends", path.display());
                self.written = None;
            }
        }
    }
}

fn read(path: &Path) -> io::Result<AddressBook> {
    if fs::metadata(path)?.len() > MOST_FILE_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is too long"));
    }
    parse(&fs::read(path)?)
}

/// Reads a map that was written before, or that an agent tells.
pub(crate) fn parse(bytes: &[u8]) -> io::Result<AddressBook> {
    serde_json::from_slice(bytes).map_err(io::Error::from)
}

/// What can be said of a VM by looking at it.
fn known(vm: &HostVm, run_dir: &Path) -> KnownVm {
    let registry = Registry::new(run_dir);
    let origin = vm.entry.as_ref().and_then(|entry| Origin::read(&registry, &entry.name));
    let (cards, problem) = match cards(vm, run_dir) {
        Ok(cards) if is_arriving(vm, &registry) => (cards, Some(ARRIVING.to_owned())),
        Ok(cards) if cards.is_empty() && vm.entry.is_none() => (
            cards,
            Some(
                "no network card of it can be seen from here (its taps may be in another network namespace)".to_owned(),
            ),
        ),
        Ok(cards) => (cards, None),
        Err(problem) => (Vec::new(), Some(problem)),
    };
    KnownVm {
        vm_id: vm.vm_id,
        vm_name: vm.name.clone(),
        is_hosted: vm.entry.is_some(),
        pid: vm.pid,
        since_unix_ms: since_unix_ms(vm.start_time_ticks),
        came_by: origin.as_ref().map(|origin| origin.migration_id),
        came_from: origin.map(|origin| origin.host),
        state_dir: vm.entry.as_ref().map(|entry| entry.state_dir.clone()),
        cards,
        problem,
    }
}

/// Whether it waits here for its memory, and runs elsewhere.
fn is_arriving(vm: &HostVm, registry: &Registry) -> bool {
    let Some(entry) = &vm.entry else { return false };
    ask_info(&registry.socket(&entry.name, "observe"))
        .is_ok_and(|info| matches!(info.state, RunState::Receiving | RunState::Prepared))
}

fn cards(vm: &HostVm, run_dir: &Path) -> Result<Vec<KnownCard>, String> {
    let (mut learner, taps) = find::said_of(vm, run_dir, None).map_err(|error| chain(&error))?;
    let links = bridge::links().map_err(|error| chain(&error))?;
    // An interface of another namespace may have the name of one of this.
    let place = place::of_process(vm.pid);
    let is_near = place.is_none() || place == place::own();
    let is_here = |tap: &String| is_near && links.iter().any(|link| link.name == *tap && link.kind == LinkKind::Tap);
    let here: Vec<String> = taps.into_iter().filter(is_here).collect();
    find::take_behind(&mut learner, &here).map_err(|error| chain(&error))?;
    let bridge_of = |tap: &str| {
        let master = links.iter().find(|link| is_near && link.name == tap)?.master?;
        links.iter().find(|link| link.index == master && link.kind == LinkKind::Bridge).map(|link| link.name.clone())
    };
    let cards = learner.cards().iter().map(|card| KnownCard {
        tap: card.tap.clone(),
        bridge: bridge_of(&card.tap),
        mac: card.mac,
        from: card.from,
        vlan: card.vlan,
        ips: card.ips.clone(),
    });
    Ok(cards.collect())
}

/// What is known of a VM that is gone: where it went, by the log of migrations in its state folder.
fn left(vm: &KnownVm) -> LeftVm {
    let went = vm.state_dir.as_ref().and_then(|state_dir| {
        let is_it = |record: &&crate::model::MigrationRecord| {
            record.vm_name.as_str() == vm.vm_name && record.unix_ms >= vm.since_unix_ms
        };
        let history = HistoryLog::new(state_dir).read();
        history.records.iter().rev().find(is_it).map(|record| (record.migration_id, record.peer.clone()))
    });
    LeftVm {
        vm_id: vm.vm_id,
        vm_name: vm.vm_name.clone(),
        left_unix_ms: unix_ms(),
        went_by: went.as_ref().map(|(migration, _)| *migration),
        went_to: went.map(|(_, host)| host),
        macs: vm.cards.iter().map(|card| card.mac).collect(),
    }
}

/// When a process started that did so many ticks after the boot, in milliseconds since 1970.
fn since_unix_ms(start_time_ticks: u64) -> u64 {
    let boot_ms = {
        let up = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        unix_ms().saturating_sub(up.tv_sec as u64 * 1000 + up.tv_nsec as u64 / 1_000_000)
    };
    boot_ms + start_time_ticks * 1000 / TICKS_PER_SECOND
}

/// Who is where, as the agent of this run folder has it.
///
/// # Errors
/// No agent serves it, or it answers otherwise.
pub fn of_agent(run_dir: &Path) -> Result<AddressBook, ControlError> {
    let socket = run_dir.join(super::agent::SOCKET);
    let (_, body) = blocking(request(&socket, "GET", "/v1/addresses", "text/plain", Vec::new()))?;
    parse(&body)
        .map_err(|error| ControlError::Exchange { socket: socket.display().to_string(), problem: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_is_kept_and_rubbish_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let book = Keeper::open(folder.path()).look(&[]);
        assert_eq!((book.vms.len(), book.left.len()), (0, 0));
        let vm = KnownVm {
            vm_id: VmId::random(),
            vm_name: "gone".to_owned(),
            is_hosted: true,
            pid: 1,
            since_unix_ms: 1,
            came_by: None,
            came_from: None,
            state_dir: Some(folder.path().to_owned()),
            cards: Vec::new(),
            problem: None,
        };
        let before = AddressBook { vms: vec![vm.clone()], ..AddressBook::default() };
        let path = folder.path().join(FILE);
        fs::write(&path, serde_json::to_string(&before.tagged()).unwrap()).unwrap();
        // It was here when an agent last looked, and is not any more.
        let book = Keeper::open(folder.path()).look(&[]);
        assert_eq!((book.vms.len(), book.left[0].vm_id, book.left[0].went_by), (0, vm.vm_id, None));
        let kept = read(&path).unwrap();
        assert_eq!(kept.left, book.left);
        for rubbish in ["", "{}x", "[]"] {
            fs::write(&path, rubbish).unwrap();
            assert_eq!(Keeper::open(folder.path()).look(&[]).left, []);
        }
    }
}
