//! Tunnels of this host: made for a migration, listed and dropped by hand, kept in the run folder.
//!
//! Joins [`crate::tunnel`] and [`crate::net`]. An entry is written before anything is made, so that whatever becomes of the manager, what it has made can be found and taken down.
//!
//! - [`former`] is the end at the host that the VM leaves, [`new`] the one where it comes to;
//! - [`ask`] asks and answers through a tunnel;
//! - [`list`] shows and drops.

pub mod ask;
pub mod former;
pub mod list;
pub mod new;

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use super::audit::{self, Action};
use super::registry::{boot_id, write_whole};
use crate::model::schema::Schema;
use crate::model::tunnel::{overhead_bytes, wireguard_overhead_bytes};
use crate::model::{TunnelEntry, TunnelSide, VmId, WireguardEnd};
use crate::net::place;
use crate::net::wires::HostWires;
use crate::port::WireError;
use crate::tunnel;

/// The folder below the run folder; no VM can be called so.
const FOLDER: &str = ".tunnels";

/// The entries below one run folder.
#[derive(Clone, Debug)]
pub struct TunnelStore {
    folder: PathBuf,
}

impl TunnelStore {
    /// The entries of a run folder; it need not exist.
    pub fn new(run_dir: &Path) -> Self {
        Self { folder: run_dir.join(FOLDER) }
    }

    fn path(&self, entry: &TunnelEntry) -> PathBuf {
        self.folder.join(format!("{}.{}.json", entry.id, entry.side))
    }

    fn enter(&self, entry: &TunnelEntry) -> io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        write_whole(&self.path(entry), &serde_json::to_string_pretty(&entry.tagged())?)
    }

    fn leave(&self, entry: &TunnelEntry) {
        let _gone_already = fs::remove_file(self.path(entry));
        // Only when it is empty.
        let _ = fs::remove_dir(&self.folder);
    }

    /// All entries, by their names. One that cannot be read is said in the log, and left out.
    pub fn list(&self) -> Vec<TunnelEntry> {
        let files = fs::read_dir(&self.folder).into_iter().flatten().flatten().map(|file| file.path());
        let read = |path: PathBuf| -> Option<TunnelEntry> {
            if path.extension().is_none_or(|extension| extension != "json") {
                return None;
            }
            let text = fs::read_to_string(&path).ok()?;
            serde_json::from_str(&text).inspect_err(|error| tracing::warn!("{}: {error}", path.display())).ok()
        };
        let mut entries: Vec<TunnelEntry> = files.filter_map(read).collect();
        entries.sort_by(|a, b| a.id.cmp(&b.id));
        entries
    }

    fn of_vm(&self, vm: VmId, side: TunnelSide) -> Vec<TunnelEntry> {
        self.list().into_iter().filter(|entry| entry.vm_id == vm && entry.side == side).collect()
    }
}

/// This thread's network namespace, by its inode's number; 0 where that is not told.
fn namespace() -> u64 {
    place::own().map_or(0, |place| place.inode)
}

/// The WireGuard device of the tunnel `id`, with these addresses inside (this host's first), on a way to `far_end` that carries packets of so many bytes; and the largest packet that goes through the tunnel then, in bytes.
fn inside_wireguard(id: &str, inside: [Ipv4Addr; 2], far_end: IpAddr, way_mtu_bytes: u32) -> (WireguardEnd, u32) {
    let [local, remote] = inside;
    let mtu_bytes = way_mtu_bytes.saturating_sub(wireguard_overhead_bytes(far_end));
    let end = WireguardEnd { device: format!("dlw-{id}"), local, remote, mtu_bytes };
    (end, mtu_bytes.saturating_sub(overhead_bytes(remote.into())))
}

/// Whether what an entry names may still be there: it was made since the last boot.
fn is_of_this_boot(entry: &TunnelEntry) -> bool {
    entry.boot_id == boot_id()
}

/// Makes what an entry says, and keeps the entry. On failure nothing stays.
fn lay(store: &TunnelStore, entry: &TunnelEntry) -> Result<(), WireError> {
    store.enter(entry).map_err(|error| {
        WireError(format!("the tunnel cannot be written down in {}: {error}", store.folder.display()))
    })?;
    let laid = tunnel::lay(&mut HostWires, entry);
    if laid.is_err() {
        store.leave(entry);
    }
    let result = laid.as_ref().map_or_else(ToString::to_string, |()| "ok".to_owned());
    note(entry, "tunnel-lay", "no tunnel", &format!("tunnel {} to {}", entry.id, entry.remote), result);
    laid
}

/// Takes down what an entry says, and the entry; what could not be taken down, in words.
fn take_down(store: &TunnelStore, entry: &TunnelEntry, why: &str) -> Vec<String> {
    let left = tunnel::take_down(&mut HostWires, entry);
    store.leave(entry);
    let result = if left.is_empty() { "ok".to_owned() } else { left.join("; ") };
    note(
        entry,
        "tunnel-drop",
        &format!("tunnel {} to {}", entry.id, entry.remote),
        "no tunnel",
        format!("{result} ({why})"),
    );
    for problem in &left {
        tracing::warn!(vm = %entry.vm_name, tunnel = entry.id, "left behind: {problem}");
    }
    left
}

fn note(entry: &TunnelEntry, what: &str, before: &str, after: &str, result: String) {
    let (before, after) = (before.to_owned(), after.to_owned());
    audit::record(&entry.state_dir, &Action { who: audit::me(), what, vm_id: entry.vm_id, before, after, result });
}

/// The VM is at this host again: what stood for it here is not needed any more.
pub fn came_back(run_dir: &Path, vm: VmId) {
    let store = TunnelStore::new(run_dir);
    for entry in store.of_vm(vm, TunnelSide::Former) {
        take_down(&store, &entry, "the VM has come back");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{MigrationId, TunnelLine, Vni};

    pub(super) fn entry(id: &str, side: TunnelSide) -> TunnelEntry {
        TunnelEntry {
            id: id.to_owned(),
            vm_id: VmId::random(),
            vm_name: "vm".parse().unwrap(),
            migration_id: MigrationId::random(),
            side,
            local: "192.0.2.1".parse().unwrap(),
            remote: "198.51.100.1".parse().unwrap(),
            port: 4789,
            wireguard: None,
            mtu_bytes: 1450,
            since_unix_ms: 0,
            boot_id: boot_id(),
            namespace: namespace(),
            state_dir: "/nonexistent".into(),
            lines: vec![TunnelLine {
                device: format!("dln-{id}"),
                vni: Vni::new(7).unwrap(),
                tap: "nonesuch0".to_owned(),
                bridge: "nonesuch1".to_owned(),
                taken_from: String::new(),
                mac: "02:00:00:00:00:01".parse().unwrap(),
                ips: Vec::new(),
                lan_mtu_bytes: 1500,
            }],
        }
    }

    #[test]
    fn entries_are_kept_and_rubbish_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let store = TunnelStore::new(folder.path());
        assert_eq!(store.list(), []);
        let both = [entry("7", TunnelSide::Former), entry("8", TunnelSide::New)];
        for entry in &both {
            store.enter(entry).unwrap();
        }
        fs::write(store.folder.join("9.new.json"), "{").unwrap();
        assert_eq!(store.list(), both);
        assert_eq!(store.of_vm(both[1].vm_id, TunnelSide::New), both[1..]);
        assert_eq!(store.of_vm(both[1].vm_id, TunnelSide::Former), []);
        store.leave(&both[0]);
        assert_eq!(store.list(), both[1..]);
    }
}
