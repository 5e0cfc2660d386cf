//! What a VM is to be announced with: its taps and Ethernet addresses from its VMM, its IP addresses from the tables of this host and from its traffic.
//!
//! Nothing is asked of the guest and nothing is changed: its frames are listened to, for a bounded time, and only who sent them is kept.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv6Addr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::json;

use super::Place;
use crate::announce::heard;
use crate::announce::learn::{Learner, station_of};
use crate::foreign::nics::{self, Card};
use crate::foreign::qmp::{Qmp, QmpError};
use crate::foreign::vmm;
use crate::model::network::{FoundVm, LearntFrom};
use crate::model::{VlanTags, VmRef};
use crate::net::bridge::{self, LinkKind};
use crate::net::fdb::{self, FdbKind};
use crate::net::listen::Listener;
use crate::net::{NetError, neighbour};
use crate::service::control::{ControlError, ask_info};
use crate::service::inventory::{self, FindError, HostVm};
use crate::service::registry::Registry;
use crate::time::monotonic_now;

/// For how long a VM's taps are listened to, unless told otherwise.
pub const DEFAULT_LISTEN: Duration = Duration::from_secs(2);
/// A VM that floods its tap is not listened to for longer.
const MOST_FRAMES: u32 = 200_000;
/// How long a listening thread may take to notice that it is cancelled.
const CANCEL_LATENCY: Duration = Duration::from_millis(50);
/// How long a monitor may take to answer.
const MONITOR_LIMIT: Duration = Duration::from_secs(2);

/// Which VM, and what the operator knows of it.
#[derive(Clone, Debug)]
pub struct FindCards {
    /// Where hosted VMs are listed.
    pub run_dir: PathBuf,
    /// The VM.
    pub vm: VmRef,
    /// For how long its taps are listened to; zero: not at all.
    pub listen: Duration,
    /// Its QEMU's monitor, if it may be asked.
    pub qmp: Option<PathBuf>,
    /// Addresses of its one card.
    pub ips: Vec<IpAddr>,
    /// Those of them behind which a router is.
    pub routers: Vec<Ipv6Addr>,
    /// Tags of all its frames.
    pub vlan: Option<VlanTags>,
}

/// Nothing to announce was found.
#[derive(Debug, thiserror::Error)]
pub enum FindCardsError {
    /// There is no such VM.
    #[error(transparent)]
    Vm(#[from] FindError),
    /// A hosted VM does not answer.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// Its descriptors cannot be looked at.
    #[error("process {pid}: its taps cannot be looked at")]
    Taps {
        /// The process.
        pid: u32,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// Its monitor does not answer.
    #[error(transparent)]
    Monitor(#[from] QmpError),
    /// A table cannot be read, or a tap not listened to.
    #[error(transparent)]
    Net(#[from] NetError),
    /// It has no tap that can be seen from here.
    #[error(
        "VM `{vm}` has no tap in this network namespace ({seen}); run this in the one where its taps are (`ip netns exec`, or `nsenter -t {pid} -n`), or name --interface and --mac"
    )]
    NoTap {
        /// The VM.
        vm: String,
        /// Its process.
        pid: u32,
        /// What it has instead.
        seen: String,
    },
    /// Nobody says which address it has.
    #[error(
        "VM `{0}` has a tap, but no Ethernet address is known for it: it sent nothing meanwhile; listen longer (--listen), ask its monitor (--qmp), or name --interface and --mac"
    )]
    NoMac(String),
    /// Addresses that belong to no certain card.
    #[error(
        "VM `{vm}` has {cards} network cards, so --ip and --router do not say whose they are; write --station mac=M,ip=A with --interface"
    )]
    WhoseIp {
        /// The VM.
        vm: String,
        /// How many.
        cards: usize,
    },
}

/// Finds out what `order` asks, and where it is to be announced.
///
/// # Errors
/// No such VM, none of its taps is here, or it cannot be looked at.
pub fn find(order: &FindCards, cancel: &AtomicBool) -> Result<(FoundVm, Vec<Place>), FindCardsError> {
    let vm = match inventory::find(&order.run_dir, &order.vm, None) {
        Err(FindError::Process(error)) => inventory::emulated(&order.vm, error)?,
        found => found?,
    };
    let (mut learner, taps) = said_of(&vm, &order.run_dir, order.qmp.as_ref())?;
    if !shares_namespace(vm.pid) {
        tracing::warn!(
            "VM `{}` is in another network namespace than this command: its taps are looked for here by their names",
            vm.name
        );
    }
    let links = bridge::links()?;
    let is_here = |tap: &String| links.iter().any(|link| link.name == *tap && link.kind == LinkKind::Tap && link.up);
    let here: Vec<String> = taps.iter().filter(|tap| is_here(tap)).cloned().collect();
    if here.is_empty() {
        let names = taps.iter().map(|tap| format!("`{tap}`")).collect::<Vec<_>>().join(", ");
        let seen = if names.is_empty() { "it holds none open".to_owned() } else { format!("it holds {names} open") };
        return Err(FindCardsError::NoTap { vm: vm.name, pid: vm.pid, seen });
    }
    take_behind(&mut learner, &here)?;
    take_neighbours(&mut learner)?;
    give(order, &mut learner);
    let began = monotonic_now();
    if !order.listen.is_zero() {
        learner = listen(learner, &here, order.listen, cancel)?;
    }
    let listened = monotonic_now().saturating_sub(began);
    // A card that was known by its traffic alone is in the tables, too.
    take_neighbours(&mut learner)?;
    give(order, &mut learner);

    let mut cards: Vec<_> = learner.cards().iter().filter(|card| here.contains(&card.tap)).cloned().collect();
    for card in &mut cards {
        card.vlan = order.vlan.or(card.vlan);
    }
    if cards.is_empty() {
        return Err(FindCardsError::NoMac(vm.name));
    }
    if cards.len() > 1 && !(order.ips.is_empty() && order.routers.is_empty()) {
        return Err(FindCardsError::WhoseIp { vm: vm.name, cards: cards.len() });
    }
    let places = here
        .iter()
        .map(|tap| Place {
            interface: tap.clone(),
            stations: cards.iter().filter(|card| card.tap == *tap).map(station_of).collect(),
        })
        .filter(|place| !place.stations.is_empty())
        .collect();
    let listened_ns = if order.listen.is_zero() { 0 } else { listened.as_nanos() as u64 };
    let HostVm { name: vm_name, vm_id, pid, .. } = vm;
    Ok((FoundVm { vm_name, vm_id, pid, listened_ns, frames_heard: learner.frames_heard(), cards }, places))
}

/// The cards of a VM as its configuration or its VMM says them, and the taps that it has.
///
/// # Errors
/// It does not answer, or cannot be looked at.
pub(in crate::service) fn said_of(
    vm: &HostVm,
    run_dir: &Path,
    monitor: Option<&PathBuf>,
) -> Result<(Learner, BTreeSet<String>), FindCardsError> {
    let mut learner = Learner::default();
    let mut taps: BTreeSet<String> = BTreeSet::new();
    if let Some(entry) = &vm.entry {
        let info = ask_info(&Registry::new(run_dir).served(entry, "observe"))?;
        for net in &info.nets {
            taps.insert(net.tap.clone());
            let station = &net.station;
            learner.card(&net.tap, station.mac, LearntFrom::Configuration);
            learner.tags(station.mac, station.vlan);
            for ip in &station.ips {
                let routes = matches!(ip, IpAddr::V6(ip) if station.routers.contains(ip)).then_some(true);
                learner.ip(station.mac, *ip, LearntFrom::Configuration, routes);
            }
        }
    } else {
        for (card, from) in foreign_cards(vm, monitor, &mut taps)? {
            if let (Some(tap), Some(mac)) = (card.tap, card.mac) {
                learner.card(&tap, mac, from);
            }
        }
    }
    Ok((learner, taps))
}

/// Cards of which nobody has said the Ethernet address, by what the bridges have behind their taps.
///
/// # Errors
/// A table cannot be read.
pub(in crate::service) fn take_behind(learner: &mut Learner, taps: &[String]) -> Result<(), NetError> {
    for tap in taps.iter().filter(|tap| !learner.has_card(tap)).cloned().collect::<Vec<_>>() {
        if let Some(bridge) = bridge::bridge_of(&tap)? {
            let behind = fdb::entries(&bridge.name)?;
            for entry in behind.iter().filter(|entry| entry.port == tap && entry.kind == FdbKind::Learned) {
                learner.card(&tap, entry.mac, LearntFrom::ForwardingTable);
            }
        }
    }
    Ok(())
}

/// The cards that a VMM's command line and monitor name, and the taps that it holds open.
fn foreign_cards(
    vm: &HostVm,
    monitor: Option<&PathBuf>,
    taps: &mut BTreeSet<String>,
) -> Result<Vec<(Card, LearntFrom)>, FindCardsError> {
    let pid = vm.pid;
    let held = nics::taps(pid).map_err(|source| FindCardsError::Taps { pid, source })?;
    taps.extend(held.values().cloned());
    let mut cards = Vec::new();
    if let Some(path) = monitor {
        let mut qmp = Qmp::connect(path, MONITOR_LIMIT)?;
        let arguments = json!({ "command-line": "info network" });
        let answer = qmp.order("human-monitor-command", &arguments, MONITOR_LIMIT)?;
        let found = nics::of_info_network(answer.as_str().unwrap_or_default(), &held);
        cards.extend(found.into_iter().map(|card| (card, LearntFrom::Monitor)));
    }
    let facts = vmm::facts(&vm.process.name, &vm.process.command);
    let named = nics::of_command(&facts.vmm, &vm.process.command, &held);
    cards.extend(named.into_iter().map(|card| (card, LearntFrom::CommandLine)));
    // A name on a command line is only that: the process must hold the tap.
    cards.retain(|(card, _)| card.tap.as_ref().is_some_and(|tap| taps.contains(tap)));
    Ok(cards)
}

/// Whether a process is in this command's network namespace; true where that is not told.
fn shares_namespace(pid: u32) -> bool {
    let of = |path: String| fs::metadata(path).map(|namespace| (namespace.dev(), namespace.ino())).ok();
    let (own, other) = (of("/proc/thread-self/ns/net".to_owned()), of(format!("/proc/{pid}/ns/net")));
    own.is_none() || other.is_none() || own == other
}

/// What this host's neighbour tables have for the cards.
fn take_neighbours(learner: &mut Learner) -> Result<(), NetError> {
    for known in neighbour::all()?.iter().filter(|known| !known.doubtful) {
        // Without the flag it may only never have advertised itself to this host.
        let router = known.router.then_some(true);
        learner.ip(known.mac, known.ip, LearntFrom::NeighbourTable, router);
    }
    Ok(())
}

/// What the operator said of the only card.
fn give(order: &FindCards, learner: &mut Learner) {
    let [card] = learner.cards() else { return };
    let mac = card.mac;
    order.ips.iter().for_each(|ip| learner.ip(mac, *ip, LearntFrom::Given, None));
    order.routers.iter().for_each(|ip| learner.ip(mac, (*ip).into(), LearntFrom::Given, Some(true)));
}

/// Listens to all taps at once, until the time is over.
fn listen(learner: Learner, taps: &[String], time: Duration, cancel: &AtomicBool) -> Result<Learner, NetError> {
    let mut listeners = taps.iter().map(|tap| Listener::open(tap)).collect::<Result<Vec<_>, _>>()?;
    let learner = Mutex::new(learner);
    let deadline = monotonic_now() + time;
    std::thread::scope(|scope| {
        for listener in &mut listeners {
            let learner = &learner;
            scope.spawn(move || {
                let tap = listener.name().to_owned();
                let mut frames = 0;
                while frames < MOST_FRAMES && !cancel.load(Ordering::Acquire) {
                    let now = monotonic_now();
                    if now >= deadline {
                        break;
                    }
                    match listener.next(deadline.min(now + CANCEL_LATENCY)) {
                        Ok(None) => {}
                        Ok(Some(passing)) => {
                            frames += 1;
                            // What the host sends out of a tap goes to the VM.
                            if let Some(heard) = heard::read(passing.frame).filter(|_| !passing.outgoing) {
                                learner.lock().unwrap_or_else(PoisonError::into_inner).hear(&tap, &heard);
                            }
                        }
                        Err(error) => {
                            tracing::warn!("not listened to any more: {error}");
                            break;
                        }
                    }
                }
            });
        }
    });
    Ok(learner.into_inner().unwrap_or_else(PoisonError::into_inner))
}
