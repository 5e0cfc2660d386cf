//! `dunlin tunnel`: the tunnels of this host, shown and dropped.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::ask::{self, SMALL_BYTES};
use super::{TunnelStore, is_of_this_boot, namespace, take_down};
use crate::model::schema::Schema;
use crate::model::{TunnelEntry, TunnelKind, TunnelSide, TunnelTraffic, VmRef, WireguardTraffic};
use crate::net::{device, wireguard};
use crate::port::WireError;
use crate::service::interrupt::Interrupt;
use crate::service::registry::Registry;
use crate::service::steering::ask_status;
use crate::tunnel::moved::{LOOKS, Moved};

/// How long the other end may take to answer.
const FAR_END_LIMIT: Duration = Duration::from_secs(1);
/// How long the VM may take to answer, and others in its LAN.
const WHO_HAS_LIMIT: Duration = Duration::from_millis(1500);
/// How often it is looked whether the addresses have moved.
pub const LOOK_EVERY: Duration = Duration::from_secs(3);

/// Which tunnels are meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// Each.
    All,
    /// The one of that name, or those of that VM.
    One(String),
}

impl Which {
    fn matches(&self, entry: &TunnelEntry) -> bool {
        match self {
            Self::All => true,
            Self::One(word) => {
                let of_vm = match word.parse() {
                    Ok(VmRef::Name(name)) => entry.vm_name == name,
                    Ok(VmRef::Uuid(id)) => entry.vm_id == id,
                    Ok(VmRef::Pid(_)) | Err(_) => false,
                };
                entry.id == *word || of_vm
            }
        }
    }
}

/// What a tunnel does at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TunnelState {
    /// The VM is still, or again, at its former host.
    Ready,
    /// The VM is at its new host.
    Carrying,
    /// What it was made of is gone, or the VM is.
    Stale,
    /// It was made in another network namespace than the one that was looked at.
    Elsewhere,
}

impl TunnelState {
    /// In a word.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Carrying => "carrying",
            Self::Stale => "stale",
            Self::Elsewhere => "elsewhere",
        }
    }
}

/// A tunnel as it is now.
#[derive(Clone, Debug, Serialize)]
pub struct TunnelView {
    /// What was made.
    #[serde(flatten)]
    pub entry: TunnelEntry,
    /// What carries the packets.
    pub kind: TunnelKind,
    /// What it does.
    pub state: TunnelState,
    /// What is to be said of that; empty if nothing.
    pub note: String,
    /// What all its devices have carried.
    pub traffic: TunnelTraffic,
    /// What its WireGuard device has to say; absent where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wireguard_traffic: Option<WireguardTraffic>,
    /// At the former host: whether the manager at the other end answers through the tunnel; absent where nobody was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub far_end_answers: Option<bool>,
    /// How long that took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rtt_ns: Option<u64>,
    /// At the former host: whether the VM itself answers through the tunnel, for any of its addresses; absent where nobody was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm_answers: Option<bool>,
}

impl Schema for TunnelView {
    const SCHEMA: &'static str = "dunlin.tunnel/v1";
}

/// A tunnel that was dropped.
#[derive(Clone, Debug, Serialize)]
pub struct TunnelDropped {
    /// What it was called.
    pub id: String,
    /// The VM.
    pub vm_name: String,
    /// Which end.
    pub side: TunnelSide,
    /// What could not be taken down.
    pub left: Vec<String>,
    /// What there is to do at the other host.
    pub other_end: String,
}

impl Schema for TunnelDropped {
    const SCHEMA: &'static str = "dunlin.tunnel-dropped/v1";
}

/// What was asked for is not done.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// No such tunnel.
    #[error("no tunnel `{which}` under {run_dir}; `dunlin tunnel list` shows those that there are")]
    Unknown {
        /// What was asked for.
        which: String,
        /// Where.
        run_dir: String,
    },
    /// It is needed.
    #[error(
        "tunnel {id} is not dropped: VM `{vm}` is here by it, and would be cut off from its LAN. When it is to have other addresses here, or none: --force"
    )]
    Needed {
        /// The tunnel.
        id: String,
        /// Whose.
        vm: String,
    },
    /// Its migration is under way.
    #[error(
        "tunnel {id} is not dropped: VM `{vm}` is about to leave by it; `dunlin migrate {vm} --cancel` takes it down"
    )]
    InUse {
        /// The tunnel.
        id: String,
        /// Whose.
        vm: String,
    },
    /// It cannot be reached.
    #[error(
        "tunnel {id} was made in another network namespace: run this there (`ip netns exec`, or `nsenter -n -t` a process of it); if that is gone, --forget takes it off the list"
    )]
    Elsewhere {
        /// The tunnel.
        id: String,
    },
    /// Nobody can tell whether addresses have moved that nobody knows.
    #[error(
        "no address of the VM of tunnel {id} is known, so nobody can tell when they have moved: name them with `ip=` in --net of `dunlin vm run`"
    )]
    NoAddresses {
        /// The tunnel.
        id: String,
    },
    /// Only the former host can tell.
    #[error("tunnel {id}: whether the addresses have moved is seen at the former host, {former}: run this there")]
    NotHere {
        /// The tunnel.
        id: String,
        /// That host.
        former: String,
    },
    /// A signal came.
    #[error("interrupted; the tunnels are as they were")]
    Interrupted,
    /// The network.
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// The tunnels of this host, as they are. With `ask` their other ends and VMs are asked, which takes up to some seconds.
///
/// # Errors
/// The kernel does not answer.
pub fn list(run_dir: &Path, ask: bool) -> Result<Vec<TunnelView>, TunnelError> {
    let vms = Registry::new(run_dir).list();
    let look = |entry: TunnelEntry| view(entry, |id| vms.iter().any(|vm| vm.vm_id == id), ask);
    Ok(TunnelStore::new(run_dir).list().into_iter().map(look).collect::<Result<_, _>>()?)
}

fn view(
    entry: TunnelEntry,
    runs_here: impl Fn(crate::model::VmId) -> bool,
    ask: bool,
) -> Result<TunnelView, WireError> {
    let vm_is_here = runs_here(entry.vm_id);
    let here = entry.namespace == namespace();
    let mut traffic = TunnelTraffic::default();
    let mut wireguard_traffic = None;
    let mut gone = None;
    if here && is_of_this_boot(&entry) {
        if let Some(end) = &entry.wireguard {
            wireguard_traffic = wireguard::traffic(&end.device)?;
            gone = wireguard_traffic.is_none().then(|| end.device.clone());
        }
        for line in &entry.lines {
            match device::traffic(&line.device)? {
                Some(one) => {
                    traffic.received_bytes += one.received_bytes;
                    traffic.received_packets += one.received_packets;
                    traffic.sent_bytes += one.sent_bytes;
                    traffic.sent_packets += one.sent_packets;
                    traffic.lost_packets += one.lost_packets;
                }
                None => gone = gone.or_else(|| Some(line.device.clone())),
            }
        }
    }
    let (state, note) = if !is_of_this_boot(&entry) {
        (TunnelState::Stale, "made before this host was booted".to_owned())
    } else if !here {
        (TunnelState::Elsewhere, "made in another network namespace".to_owned())
    } else if let Some(device) = gone {
        (TunnelState::Stale, format!("there is no device `{device}` any more"))
    } else {
        match (entry.side, vm_is_here) {
            (TunnelSide::Former, true) => (TunnelState::Ready, "the VM is here".to_owned()),
            (TunnelSide::Former, false) | (TunnelSide::New, true) => (TunnelState::Carrying, String::new()),
            (TunnelSide::New, false) => (TunnelState::Stale, "the VM is not here".to_owned()),
        }
    };
    let kind = entry.kind();
    let mut view = TunnelView {
        entry,
        kind,
        state,
        note,
        traffic,
        wireguard_traffic,
        far_end_answers: None,
        rtt_ns: None,
        vm_answers: None,
    };
    if ask && view.state == TunnelState::Carrying && view.entry.side == TunnelSide::Former {
        let mut rtts = Vec::new();
        let mut behind = Vec::new();
        for line in &view.entry.lines {
            rtts.push(ask::far_end(&line.device, SMALL_BYTES, FAR_END_LIMIT)?);
            if !line.ips.is_empty() {
                behind.push(ask::who_has(line, WHO_HAS_LIMIT)?.values().any(|found| found.behind));
            }
        }
        view.far_end_answers = Some(rtts.iter().all(Option::is_some));
        view.rtt_ns = rtts.iter().flatten().max().map(|rtt| rtt.as_nanos() as u64);
        view.vm_answers = (!behind.is_empty()).then(|| behind.iter().all(|&is| is));
    }
    Ok(view)
}

/// How tunnels are dropped.
#[derive(Clone, Copy, Debug, Default)]
pub struct DropOptions {
    /// Also the one by which a VM of this host reaches its LAN.
    pub force: bool,
    /// Only take off the list what was made in another network namespace.
    pub forget: bool,
}

fn chosen(run_dir: &Path, which: &Which) -> Result<Vec<TunnelEntry>, TunnelError> {
    let mut entries = TunnelStore::new(run_dir).list();
    entries.retain(|entry| which.matches(entry));
    match which {
        Which::One(word) if entries.is_empty() => {
            Err(TunnelError::Unknown { which: word.clone(), run_dir: run_dir.display().to_string() })
        }
        _ => Ok(entries),
    }
}

/// Drops this host's ends of tunnels. Nothing is done if one of them may not be.
///
/// # Errors
/// There is none, or one must not be dropped.
pub fn drop_tunnels(run_dir: &Path, which: &Which, options: DropOptions) -> Result<Vec<TunnelDropped>, TunnelError> {
    let entries = chosen(run_dir, which)?;
    let vms = Registry::new(run_dir).list();
    for entry in entries.iter().filter(|entry| is_of_this_boot(entry)) {
        let is_here = vms.iter().any(|vm| vm.vm_id == entry.vm_id);
        if entry.side == TunnelSide::New && is_here && !options.force {
            return Err(TunnelError::Needed { id: entry.id.clone(), vm: entry.vm_name.to_string() });
        }
        let is_under_way = || {
            let status = ask_status(run_dir, &VmRef::Uuid(entry.vm_id));
            status.is_ok_and(|status| status.migration_id == entry.migration_id)
        };
        if entry.side == TunnelSide::Former && is_here && !options.force && is_under_way() {
            return Err(TunnelError::InUse { id: entry.id.clone(), vm: entry.vm_name.to_string() });
        }
        if entry.namespace != namespace() && !options.forget {
            return Err(TunnelError::Elsewhere { id: entry.id.clone() });
        }
    }
    Ok(entries.iter().map(|entry| dropped(run_dir, entry, "dunlin tunnel drop")).collect())
}

fn dropped(run_dir: &Path, entry: &TunnelEntry, why: &str) -> TunnelDropped {
    let store = TunnelStore::new(run_dir);
    let left = if is_of_this_boot(entry) && entry.namespace == namespace() {
        take_down(&store, entry, why)
    } else {
        store.leave(entry);
        Vec::new()
    };
    let force = if entry.side == TunnelSide::Former { " --force" } else { "" };
    let other_end = format!("at {}: dunlin tunnel drop {}{force}", entry.remote, entry.id);
    TunnelDropped { id: entry.id.clone(), vm_name: entry.vm_name.to_string(), side: entry.side, left, other_end }
}

/// Waits until the VM's addresses are no more behind the tunnels, and drops each when that is so for it (see [`crate::tunnel::moved`]). `told` hears of each that is dropped.
///
/// # Errors
/// It cannot be seen from here, or a signal came.
pub fn drop_when_moved(
    run_dir: &Path,
    which: &Which,
    interrupt: &Interrupt,
    mut told: impl FnMut(TunnelDropped),
) -> Result<(), TunnelError> {
    let entries = chosen(run_dir, which)?;
    let mut waiting = Vec::new();
    for entry in entries {
        let id = entry.id.clone();
        if entry.side == TunnelSide::New {
            return Err(TunnelError::NotHere { id, former: entry.remote.to_string() });
        }
        if entry.namespace != namespace() {
            return Err(TunnelError::Elsewhere { id });
        }
        if entry.lines.iter().all(|line| line.ips.is_empty()) {
            return Err(TunnelError::NoAddresses { id });
        }
        let moved = Moved::new(entry.lines.iter().flat_map(|line| line.ips.iter().copied()));
        waiting.push((entry, moved));
    }
    loop {
        let look_at = Instant::now() + LOOK_EVERY;
        let mut left = Vec::new();
        // What others have dropped meanwhile is not waited for.
        let there = TunnelStore::new(run_dir).list();
        waiting.retain(|(entry, _)| there.contains(entry));
        for (entry, mut moved) in waiting {
            if device::traffic(&entry.lines[0].device).map_err(WireError::from)?.is_none() {
                told(dropped(run_dir, &entry, "its device is gone"));
                continue;
            }
            let (works, found) = look(&entry)?;
            moved.look(works, &found);
            tracing::debug!(tunnel = entry.id, works, ?found, "looked, {LOOKS} looks in a row decide");
            if moved.is_over() {
                told(dropped(run_dir, &entry, "its addresses have moved"));
            } else {
                left.push((entry, moved));
            }
        }
        waiting = left;
        if waiting.is_empty() {
            return Ok(());
        }
        if interrupt.wait_until(look_at) {
            return Err(TunnelError::Interrupted);
        }
    }
}

type FoundByIp = BTreeMap<std::net::IpAddr, crate::tunnel::moved::Found>;

/// Whether a tunnel works, and where the addresses are that it is for.
fn look(entry: &TunnelEntry) -> Result<(bool, FoundByIp), TunnelError> {
    let (mut works, mut found) = (true, BTreeMap::new());
    for line in &entry.lines {
        works &= ask::far_end(&line.device, SMALL_BYTES, FAR_END_LIMIT)?.is_some();
        found.extend(ask::who_has(line, WHO_HAS_LIMIT)?);
    }
    Ok((works, found))
}

/// Objects with every member: for the test of the documentation.
#[cfg(test)]
pub(crate) fn samples() -> Vec<serde_json::Value> {
    let [local, remote] = crate::model::tunnel::inner_pair(0);
    let end = crate::model::WireguardEnd { device: "dlw-7".to_owned(), local, remote, mtu_bytes: 1440 };
    let entry = TunnelEntry { wireguard: Some(end), ..super::tests::entry("7", TunnelSide::New) };
    let view = TunnelView {
        entry: entry.clone(),
        kind: entry.kind(),
        state: TunnelState::Carrying,
        note: String::new(),
        traffic: TunnelTraffic::default(),
        wireguard_traffic: Some(WireguardTraffic { last_handshake_unix_ms: Some(0), ..WireguardTraffic::default() }),
        far_end_answers: Some(true),
        rtt_ns: Some(0),
        vm_answers: Some(true),
    };
    let gone = dropped(Path::new("/nonexistent"), &TunnelEntry { boot_id: String::new(), ..entry.clone() }, "");
    vec![
        serde_json::to_value(entry.tagged()).unwrap(),
        serde_json::to_value(view.tagged()).unwrap(),
        serde_json::to_value(gone.tagged()).unwrap(),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::tests::entry;
    use super::*;
    use crate::service::registry::{MachineEntry, boot_id, start_time_ticks};

    fn enter(run_dir: &Path, entry: &TunnelEntry) {
        TunnelStore::new(run_dir).enter(entry).unwrap();
    }

    #[test]
    fn what_is_gone_is_stale_and_dropped_without_fuss() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = folder.path();
        let mut old = entry("1", TunnelSide::Former);
        old.boot_id = "another".to_owned();
        let gone = entry("2", TunnelSide::New);
        let mut elsewhere = entry("3", TunnelSide::Former);
        elsewhere.namespace = 1;
        for entry in [&old, &gone, &elsewhere] {
            enter(run_dir, entry);
        }
        let states: Vec<_> = list(run_dir, true).unwrap().iter().map(|view| view.state).collect();
        assert_eq!(states, [TunnelState::Stale, TunnelState::Stale, TunnelState::Elsewhere]);

        let drop_one = |word: &str, options| drop_tunnels(run_dir, &Which::One(word.to_owned()), options);
        let error = drop_one("9", DropOptions::default()).unwrap_err();
        assert!(matches!(error, TunnelError::Unknown { .. }), "{error}");
        let error = drop_tunnels(run_dir, &Which::All, DropOptions::default()).unwrap_err();
        assert!(matches!(error, TunnelError::Elsewhere { .. }), "{error}");
        assert_eq!(list(run_dir, false).unwrap().len(), 3, "none was dropped");
        let dropped = drop_one("1", DropOptions::default()).unwrap();
        assert_eq!((dropped.len(), &dropped[0].left), (1, &Vec::new()));
        assert!(dropped[0].other_end.contains("at 198.51.100.1: dunlin tunnel drop 1 --force"), "{dropped:?}");
        drop_one(&format!("uuid:{}", gone.vm_id), DropOptions::default()).unwrap();
        drop_one("vm", DropOptions { forget: true, force: false }).unwrap();
        assert!(list(run_dir, false).unwrap().is_empty());
        assert!(drop_tunnels(run_dir, &Which::All, DropOptions::default()).unwrap().is_empty());
    }

    #[test]
    fn a_vm_is_not_cut_off_by_accident() {
        let folder = tempfile::tempdir().unwrap();
        let tunnel = entry("5", TunnelSide::New);
        enter(folder.path(), &tunnel);
        let pid = std::process::id();
        let vm = MachineEntry {
            name: tunnel.vm_name.clone(),
            vm_id: tunnel.vm_id,
            pid,
            start_time_ticks: start_time_ticks(pid).unwrap(),
            boot_id: boot_id(),
            memory_bytes: 1,
            cpus: 1,
            state_dir: "/nonexistent".into(),
        };
        Registry::new(folder.path()).enter(&vm).unwrap();
        let error = drop_tunnels(folder.path(), &Which::All, DropOptions::default()).unwrap_err();
        assert!(matches!(error, TunnelError::Needed { .. }), "{error}");
        drop_tunnels(folder.path(), &Which::All, DropOptions { force: true, forget: false }).unwrap();
    }

    #[test]
    fn who_cannot_tell_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let (interrupt, _wake) = Interrupt::by_hand().unwrap();
        let told = |_| panic!("dropped");
        enter(folder.path(), &entry("1", TunnelSide::New));
        let error = drop_when_moved(folder.path(), &Which::All, &interrupt, told).unwrap_err();
        assert!(matches!(error, TunnelError::NotHere { .. }), "{error}");
        drop_tunnels(folder.path(), &Which::All, DropOptions::default()).unwrap();
        enter(folder.path(), &entry("2", TunnelSide::Former));
        let error = drop_when_moved(folder.path(), &Which::All, &interrupt, told).unwrap_err();
        assert!(matches!(error, TunnelError::NoAddresses { .. }), "{error}");
    }
}
