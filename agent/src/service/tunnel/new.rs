//! The end of a tunnel at the host that the VM comes to.

use std::net::SocketAddr;
use std::path::Path;

use super::ask::Answering;
use super::former::device_name;
use super::{TunnelStore, inside_wireguard, is_of_this_boot, lay, namespace, take_down};
use crate::model::id::VmName;
use crate::model::tunnel::{VXLAN_PORT, overhead_bytes};
use crate::model::{
    MigrationId, NetSpec, TunnelEntry, TunnelLine, TunnelOffer, TunnelSide, VmId, Vni, WireguardKey, WireguardOffer,
};
use crate::net::wires::HostWires;
use crate::net::{bridge, inner, path};
use crate::port::{WireError, WireguardPeer, Wires};
use crate::service::machine::Places;
use crate::service::registry::boot_id;
use crate::time::unix_ms;

/// The VM that a tunnel is made for.
#[derive(Clone, Copy, Debug)]
pub struct Guest<'a> {
    /// The migration that brings it.
    pub migration: MigrationId,
    /// The VM.
    pub vm_id: VmId,
    /// What it is called here.
    pub vm_name: &'a VmName,
    /// Its network ports, with the taps of this host.
    pub nets: &'a [NetSpec],
}

/// The end itself, answering. Goes when it is dropped, unless it is let be.
#[derive(Debug)]
pub struct NewEnd {
    store: TunnelStore,
    entry: TunnelEntry,
    answering: Option<Answering>,
    stays: bool,
}

impl NewEnd {
    /// Makes this host's end of what a source offers; its key, if it is through WireGuard.
    ///
    /// # Errors
    /// It cannot be; nothing stays.
    pub fn open(
        offer: &TunnelOffer,
        wireguard: Option<&WireguardOffer>,
        places: &Places,
        guest: Guest<'_>,
    ) -> Result<(Self, Option<WireguardKey>), WireError> {
        offer.check().map_err(|error| WireError(error.to_string()))?;
        let store = TunnelStore::new(&places.run_dir);
        // What another manager has left of this VM, which is only coming now.
        for old in store.of_vm(guest.vm_id, TunnelSide::New) {
            take_down(&store, &old, "another one is made");
        }
        let way = path::to(offer.former, Some(offer.new)).map_err(|error| {
            WireError(format!(
                "{}; the source takes {} for this host's address: name the right one with --tunnel vxlan,remote=IP there",
                WireError::from(error),
                offer.new
            ))
        })?;
        let mut entry = plan(offer, way.mtu_bytes.saturating_sub(overhead_bytes(offer.former)), places, guest)?;
        if let Some(wireguard) = wireguard {
            if offer.port != VXLAN_PORT {
                return Err(WireError(format!("inside WireGuard the UDP port is {VXLAN_PORT}, not {}", offer.port)));
            }
            go_through(&mut entry, wireguard, way.mtu_bytes)?;
        }
        lay(&store, &entry)?;
        let mut end = Self { store, entry, answering: None, stays: false };
        let key = wireguard.map(|wireguard| end.meet(wireguard)).transpose()?;
        end.answering = Some(Answering::on(&end.entry.lines)?);
        tracing::info!(
            vm = %end.entry.vm_name, tunnel = end.entry.id, local = %end.entry.local, remote = %end.entry.remote,
            "this end of the tunnel is there"
        );
        Ok((end, key))
    }

    /// Has this end's WireGuard speak to that of the source; its own key.
    fn meet(&self, wireguard: &WireguardOffer) -> Result<WireguardKey, WireError> {
        let Some(end) = &self.entry.wireguard else { return Err(WireError("there is no WireGuard".to_owned())) };
        let endpoint = SocketAddr::new(self.entry.remote, wireguard.port);
        HostWires.meet(&end.device, &WireguardPeer { key: wireguard.key, endpoint, inner: wireguard.former })?;
        HostWires.key_of(&end.device)
    }

    /// Takes over what a manager that died has made for a VM that is here; none if it has not.
    pub fn adopt(run_dir: &Path, vm: VmId) -> Option<Self> {
        let store = TunnelStore::new(run_dir);
        let entry = store.of_vm(vm, TunnelSide::New).into_iter().find(is_of_this_boot)?;
        let answering = Answering::on(&entry.lines)
            .inspect_err(|error| tracing::warn!(tunnel = entry.id, "nobody answers in the tunnel: {error}"))
            .ok();
        // The VM is here already: without it nothing is undone by accident.
        Some(Self { store, entry, answering, stays: true })
    }

    /// The VM is here: the tunnel stays when this is dropped.
    pub fn let_be(&mut self) {
        self.stays = true;
    }

    /// The VM is here no more.
    pub fn end(mut self) {
        self.stays = false;
    }
}

impl Drop for NewEnd {
    fn drop(&mut self) {
        self.answering = None;
        if !self.stays {
            take_down(&self.store, &self.entry, "the VM is not here");
        }
    }
}

/// Has the tunnel of an entry go through WireGuard, on a way that carries packets of so many bytes.
fn go_through(entry: &mut TunnelEntry, wireguard: &WireguardOffer, way_mtu_bytes: u32) -> Result<(), WireError> {
    wireguard.check().map_err(|error| WireError(error.to_string()))?;
    let (local, remote) = (wireguard.new, wireguard.former);
    if inner::is_any_taken([remote, local])? {
        return Err(WireError(format!(
            "{remote} or {local}, which the tunnel would have inside, has a meaning at the target's host already; try once more, with other ones"
        )));
    }
    let (end, mtu_bytes) = inside_wireguard(&entry.id, [local, remote], entry.remote, way_mtu_bytes);
    (entry.port, entry.wireguard, entry.mtu_bytes) = (wireguard.port, Some(end), mtu_bytes);
    Ok(())
}

fn plan(offer: &TunnelOffer, mtu_bytes: u32, places: &Places, guest: Guest<'_>) -> Result<TunnelEntry, WireError> {
    let Some(first) = offer.lines.first().map(|line| line.vni) else {
        return Err(WireError("a tunnel for no network port".to_owned()));
    };
    if offer.lines.len() != guest.nets.len() {
        let (lines, nets) = (offer.lines.len(), guest.nets.len());
        return Err(WireError(format!("a tunnel for {lines} network ports of a VM with {nets}")));
    }
    let mut lines = Vec::new();
    for line in &offer.lines {
        let Some(net) = guest.nets.iter().find(|net| net.station.mac == line.mac) else {
            return Err(WireError(format!("a tunnel for {}, which the VM has not", line.mac)));
        };
        let taken_from = bridge::bridge_of(&net.tap)?.map(|bridge| bridge.name).unwrap_or_default();
        lines.push(TunnelLine {
            device: device_name(line.vni),
            vni: line.vni,
            tap: net.tap.clone(),
            bridge: bridge_name(line.vni),
            taken_from,
            mac: line.mac,
            ips: net.station.ips.clone(),
            lan_mtu_bytes: line.lan_mtu_bytes,
        });
    }
    Ok(TunnelEntry {
        id: format!("{:x}", first.get()),
        vm_id: guest.vm_id,
        vm_name: guest.vm_name.clone(),
        migration_id: guest.migration,
        side: TunnelSide::New,
        local: offer.new,
        remote: offer.former,
        port: offer.port,
        wireguard: None,
        mtu_bytes,
        since_unix_ms: unix_ms(),
        boot_id: boot_id(),
        namespace: namespace(),
        state_dir: places.state_dir.clone(),
        lines,
    })
}

/// What the bridge of an identifier is called.
fn bridge_name(vni: Vni) -> String {
    format!("dlb-{:x}", vni.get())
}
