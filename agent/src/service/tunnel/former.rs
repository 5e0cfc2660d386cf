//! The end of a tunnel at the host that the VM leaves.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::ask::{self, SMALL_BYTES};
use super::{TunnelStore, inside_wireguard, lay, namespace, take_down};
use crate::link::Address;
use crate::model::id::VmName;
use crate::model::tunnel::{LAN_MTUS, LEAST_MTU, MOST_LINES, VXLAN_PORT, inner_pair, overhead_bytes};
use crate::model::{
    Ending, MigrationId, NetSpec, OfferedLine, TunnelEntry, TunnelKind, TunnelLine, TunnelOffer, TunnelReport,
    TunnelSide, TunnelSpec, VmId, Vni, WireguardKey, WireguardOffer,
};
use crate::net::wires::HostWires;
use crate::net::{bridge, device, inner, path};
use crate::port::{SourceTunnel, WireError, WireguardPeer, Wires};
use crate::service::registry::boot_id;
use crate::time::unix_ms;
use crate::tunnel;

/// How long the other end may take to answer; the first packets may have to find their way.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How long it may take to answer a large one.
const LARGE_LIMIT: Duration = Duration::from_secs(3);
/// How long the bridge may take to let the new port forward: without STP no time.
const FORWARDING_LIMIT: Duration = Duration::from_secs(5);
/// So many pairs of addresses are looked at for one that this host has no other use for.
const PAIRS_TRIED: u32 = 64;

/// What a tunnel is asked for with.
#[derive(Clone, Debug)]
pub struct FormerRequest {
    /// What the operator says of it.
    pub spec: TunnelSpec,
    /// Where the migration goes.
    pub to: Address,
    /// The migration.
    pub migration: MigrationId,
    /// The VM.
    pub vm_id: VmId,
    /// What it is called here.
    pub vm_name: VmName,
    /// Its network ports.
    pub nets: Vec<NetSpec>,
    /// Where entries are kept.
    pub run_dir: PathBuf,
    /// Where the audit log is.
    pub state_dir: PathBuf,
}

/// The end itself. Goes when it is dropped, unless the VM has.
#[derive(Debug)]
pub struct FormerEnd {
    request: FormerRequest,
    store: TunnelStore,
    entry: Option<TunnelEntry>,
    rtt: Duration,
    stays: bool,
}

impl FormerEnd {
    /// One that is not made yet.
    pub fn new(request: FormerRequest) -> Self {
        let store = TunnelStore::new(&request.run_dir);
        Self { request, store, entry: None, rtt: Duration::ZERO, stays: false }
    }

    /// The migration has ended so: the tunnel stays if the VM is, or may be, at the other end. What is to be reported of it; none if it was never made.
    pub fn settle(mut self, ending: Ending) -> Option<TunnelReport> {
        let entry = self.entry.clone()?;
        self.stays = matches!(ending, Ending::Moved | Ending::InDoubt);
        if ending == Ending::Moved
            && let Err(error) = tunnel::turn(&mut HostWires, &entry)
        {
            tracing::warn!(vm = %entry.vm_name, "the LAN finds the VM only when it sends something: {error}");
        }
        Some(TunnelReport {
            kind: entry.kind().to_string(),
            id: entry.id,
            local: entry.local.to_string(),
            remote: entry.remote.to_string(),
            mtu_bytes: entry.mtu_bytes,
            rtt_ns: self.rtt.as_nanos() as u64,
            stays: self.stays,
        })
    }

    fn plan(&self) -> Result<TunnelEntry, WireError> {
        let FormerRequest { spec, to, migration, vm_id, vm_name, nets, state_dir, .. } = &self.request;
        let refuse = |why: String| Err(WireError(why));
        if nets.is_empty() || nets.len() > MOST_LINES {
            return refuse(format!("the VM has {} network ports; a tunnel carries 1 to {MOST_LINES}", nets.len()));
        }
        let remote: IpAddr = match spec.remote {
            Some(remote) => remote,
            None => {
                let all = to.resolve().map_err(|error| WireError(error.to_string()))?;
                let first = all.first().ok_or_else(|| WireError(format!("{} has no address", to.host())))?;
                first.ip()
            }
        };
        let way = path::to(remote, spec.local)?;
        if way.local == remote {
            return refuse(format!("{remote} is this host itself: a tunnel leads to another one"));
        }
        let first = spec.vni.unwrap_or_else(|| Vni::of_migration(*migration));
        let id = format!("{:x}", first.get());
        let (wireguard, mtu_bytes) = match spec.kind {
            TunnelKind::Vxlan => (None, way.mtu_bytes.saturating_sub(overhead_bytes(remote))),
            TunnelKind::Wireguard => {
                let (end, mtu_bytes) = inside_wireguard(&id, free_pair(*migration)?, remote, way.mtu_bytes);
                (Some(end), mtu_bytes)
            }
        };
        if mtu_bytes < LEAST_MTU {
            return refuse(format!(
                "the way to {remote} carries packets of {} bytes: {mtu_bytes} would be left inside the tunnel, fewer than the {LEAST_MTU} that IPv6 wants",
                way.mtu_bytes
            ));
        }
        let tunnels = self.store.list();
        let mut lines = Vec::new();
        for (index, net) in nets.iter().enumerate() {
            let tap = &net.tap;
            let Some(lan) = bridge::bridge_of(tap)? else {
                return refuse(format!(
                    "tap `{tap}` is in no bridge, so nothing is there whose other ports a tunnel could lead to; put it into that of the VM's LAN (`ip link set {tap} master BRIDGE`)"
                ));
            };
            let behind = |entry: &&TunnelEntry| {
                entry.side == TunnelSide::New && entry.lines.iter().any(|line| line.bridge == lan.name)
            };
            if let Some(other) = tunnels.iter().find(behind) {
                return refuse(format!(
                    "tap `{tap}` is behind tunnel {} already: a second one behind it is not made. Move its addresses, drop that one, and then migrate it; or migrate it back to {}",
                    other.id, other.remote
                ));
            }
            let lan_mtu_bytes = device::mtu_bytes(&lan.name)?;
            if !LAN_MTUS.contains(&lan_mtu_bytes) {
                return refuse(format!(
                    "bridge `{}` has an MTU of {lan_mtu_bytes} bytes; it must be 1280 or more",
                    lan.name
                ));
            }
            let vni = first.line(index as u32);
            lines.push(TunnelLine {
                device: device_name(vni),
                vni,
                tap: tap.clone(),
                bridge: lan.name,
                taken_from: String::new(),
                mac: net.station.mac,
                ips: net.station.ips.clone(),
                lan_mtu_bytes,
            });
        }
        Ok(TunnelEntry {
            id,
            vm_id: *vm_id,
            vm_name: vm_name.clone(),
            migration_id: *migration,
            side: TunnelSide::Former,
            local: way.local,
            remote,
            port: spec.port,
            wireguard,
            mtu_bytes,
            since_unix_ms: unix_ms(),
            boot_id: boot_id(),
            namespace: namespace(),
            state_dir: state_dir.clone(),
            lines,
        })
    }
}

/// A pair of addresses inside WireGuard that this host has no other use for.
fn free_pair(migration: MigrationId) -> Result<[Ipv4Addr; 2], WireError> {
    // Other bits than those that make the identifier.
    let first = (migration.0.as_u64_pair().1 >> 24) as u32;
    for number in 0..PAIRS_TRIED {
        let pair = inner_pair(first.wrapping_add(number));
        if !inner::is_any_taken(pair)? {
            return Ok(pair);
        }
    }
    Err(WireError("no addresses of 169.254.0.0/16 are free at this host for the inside of a tunnel".to_owned()))
}

/// What the device of an identifier is called: at most 10 characters of the 15 that an interface's name may have.
pub(super) fn device_name(vni: Vni) -> String {
    format!("dln-{:x}", vni.get())
}

impl SourceTunnel for FormerEnd {
    fn open(&mut self) -> Result<(TunnelOffer, Option<WireguardOffer>), WireError> {
        // The VM is here: what stood for it, or was left by a manager that died, does no more.
        super::came_back(&self.request.run_dir, self.request.vm_id);
        let entry = self.plan()?;
        lay(&self.store, &entry)?;
        let entry = self.entry.insert(entry);
        for line in &entry.lines {
            bridge::wait_forwarding(&line.device, FORWARDING_LIMIT).map_err(|error| {
                WireError(format!(
                    "bridge `{}` does not let the tunnel forward ({error}); does it run STP? That takes it twice its forward delay, so switch STP off, or set a shorter delay",
                    line.bridge
                ))
            })?;
        }
        tracing::info!(
            vm = %entry.vm_name, tunnel = entry.id, local = %entry.local, remote = %entry.remote, mtu = entry.mtu_bytes,
            "this end of the tunnel is there"
        );
        let lines = entry.lines.iter().map(|line| OfferedLine {
            mac: line.mac,
            vni: line.vni,
            lan_mtu_bytes: line.lan_mtu_bytes,
        });
        let (former, new, lines) = (entry.local, entry.remote, lines.collect());
        let Some(end) = &entry.wireguard else {
            return Ok((TunnelOffer { former, new, port: entry.port, lines }, None));
        };
        let key = HostWires.key_of(&end.device)?;
        let wireguard = WireguardOffer { port: entry.port, key, former: end.local, new: end.remote };
        Ok((TunnelOffer { former, new, port: VXLAN_PORT, lines }, Some(wireguard)))
    }

    fn try_it(&mut self, key: Option<WireguardKey>) -> Result<(), WireError> {
        let Some(entry) = &self.entry else { return Err(WireError("there is no tunnel".to_owned())) };
        let mut inside = String::new();
        if let (Some(end), Some(key)) = (&entry.wireguard, key) {
            let endpoint = SocketAddr::new(entry.remote, entry.port);
            HostWires.meet(&end.device, &WireguardPeer { key, endpoint, inner: end.remote })?;
            inside = format!("; and each must let in what comes to UDP port {VXLAN_PORT} by `{}`", end.device);
        }
        for line in &entry.lines {
            let Some(rtt) = ask::far_end(&line.device, SMALL_BYTES, ANSWER_LIMIT)? else {
                return Err(WireError(format!(
                    "the other end of the tunnel, {remote}, does not answer through it within {ANSWER_LIMIT:?}: firewalls between the hosts must let UDP port {port} pass in both directions, from {local} to {remote} and back{inside}",
                    remote = entry.remote,
                    port = entry.port,
                    local = entry.local
                )));
            };
            self.rtt = self.rtt.max(rtt);
            let large = entry.mtu_bytes.min(line.lan_mtu_bytes) as usize;
            if ask::far_end(&line.device, large, LARGE_LIMIT)?.is_none() {
                return Err(WireError(format!(
                    "the tunnel to {remote} carries small packets, but none of {large} bytes: something on the way lets smaller ones through than this host knows of. Tell it: `ip route add {remote} … mtu BYTES`",
                    remote = entry.remote
                )));
            }
        }
        Ok(())
    }
}

impl Drop for FormerEnd {
    fn drop(&mut self) {
        if let Some(entry) = self.entry.take().filter(|_| !self.stays) {
            take_down(&self.store, &entry, "the VM has not left");
        }
    }
}
