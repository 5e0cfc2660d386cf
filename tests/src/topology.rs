//! The LAN that the suites and the demo move VMs across.
//!
//! ```text
//!  host-a namespace            switch namespace            host-b namespace
//!  tap0 ─ br0 ─ up0 ══════ host-a ─ sw0 ─ host-b ══════ up0 ─ br0 ─ tap0
//!         └ mig0 ════════════════════│══════════════════════ mig0 ┘ (own link, not bridged)
//!                                  client
//!                                    ║
//!                               eth0 (client namespace)
//! ```
//!
//! Owns names and addresses. Must not know of migration, guests or announcements. Bridges run no STP and have no
//! forward delay; interfaces make no IPv6 link-local addresses of their own, so the only frames are those that a test
//! sends or provokes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};

use crate::netns::Netns;

/// The bridge of every host namespace.
pub const BRIDGE: &str = "br0";
/// The tap of every host namespace (exists, without a reader).
pub const TAP: &str = "tap0";
/// The host's cable to the switch.
pub const UPLINK: &str = "up0";
/// The host's own link to the other host, for migration streams.
pub const MIGRATION_LINK: &str = "mig0";
/// The bridge of the switch namespace; its ports are called as what is behind them: `host-a`, `host-b`, `client`.
pub const SWITCH: &str = "sw0";

/// What may differ between LANs.
#[derive(Clone, Copy, Debug)]
pub struct LanConfig {
    /// Maximum transmission unit of every interface, in bytes.
    pub mtu_bytes: u16,
}

impl Default for LanConfig {
    fn default() -> Self {
        Self { mtu_bytes: 1500 }
    }
}

/// A host: a namespace with a bridge, a tap and an uplink.
#[derive(Debug)]
pub struct Host {
    /// Its namespace.
    pub netns: Netns,
    /// Its address on the bridge.
    pub ip: Ipv4Addr,
    /// Its address on the link between the hosts.
    pub migration_ip: Ipv4Addr,
    /// The switch's port that leads to it.
    pub switch_port: &'static str,
}

/// Two hosts, a switch and a client; everything goes away on drop.
#[derive(Debug)]
pub struct Lan {
    /// The first host.
    pub host_a: Host,
    /// The second host.
    pub host_b: Host,
    /// The switch.
    pub switch: Netns,
    /// The client; its interface is `eth0`.
    pub client: Netns,
}

impl Lan {
    /// The client's addresses.
    pub const CLIENT_IPS: [IpAddr; 2] =
        [IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1)), IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1))];
    /// Addresses set aside for the guest.
    pub const GUEST_IPS: [IpAddr; 2] =
        [IpAddr::V4(Ipv4Addr::new(10, 77, 0, 100)), IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x100))];

    /// Builds it.
    ///
    /// # Errors
    /// No right to, or a kernel without veth, bridge or tun.
    pub fn new(config: LanConfig) -> Result<Self> {
        let LanConfig { mtu_bytes: mtu } = config;
        let switch = Netns::new("switch")?;
        let client = Netns::new("client")?;
        let host = |label: &'static str, number: u8| -> Result<Host> {
            Ok(Host {
                netns: Netns::new(label)?,
                ip: Ipv4Addr::new(10, 77, 0, 10 + number),
                migration_ip: Ipv4Addr::new(10, 78, 0, number),
                switch_port: label,
            })
        };
        let (host_a, host_b) = (host("host-a", 1)?, host("host-b", 2)?);

        switch.ip_batch(&bridge(SWITCH, mtu)).context("switch")?;
        cable(&switch, "client", &client, "eth0", mtu)?;
        switch.ip_batch(&port("client", SWITCH))?;
        for host in [&host_a, &host_b] {
            host.netns.ip_batch(&bridge(BRIDGE, mtu)).context("host bridge")?;
            cable(&switch, host.switch_port, &host.netns, UPLINK, mtu)?;
            switch.ip_batch(&port(host.switch_port, SWITCH))?;
            let mut lines =
                vec![format!("tuntap add {TAP} mode tap"), format!("link set {TAP} mtu {mtu} addrgenmode none")];
            lines.extend(port(UPLINK, BRIDGE));
            lines.extend(port(TAP, BRIDGE));
            lines.push(format!("addr add {}/24 dev {BRIDGE}", host.ip));
            host.netns.ip_batch(&lines).context("host ports")?;
        }
        cable(&host_a.netns, MIGRATION_LINK, &host_b.netns, MIGRATION_LINK, mtu)?;
        for host in [&host_a, &host_b] {
            host.netns.ip_batch(&[
                format!("addr add {}/24 dev {MIGRATION_LINK}", host.migration_ip),
                format!("link set {MIGRATION_LINK} up"),
            ])?;
        }
        let [v4, v6] = Self::CLIENT_IPS;
        client.ip_batch(&[
            "link set eth0 up".to_owned(),
            format!("addr add {v4}/24 dev eth0"),
            format!("addr add {v6}/64 dev eth0 nodad"),
        ])?;
        Ok(Self { host_a, host_b, switch, client })
    }

    /// The switch's forwarding table as `bridge fdb` prints it, for reports and failures.
    ///
    /// # Errors
    /// No `bridge` command.
    pub fn switch_table(&self) -> Result<String> {
        self.switch.run(&format!("bridge fdb show br {SWITCH} dynamic"))
    }
}

/// The `ip` lines that make a bridge.
pub(crate) fn bridge(name: &str, mtu_bytes: u16) -> Vec<String> {
    vec![
        format!("link add {name} mtu {mtu_bytes} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"),
        format!("link set {name} addrgenmode none"),
        format!("link set {name} up"),
    ]
}

/// The `ip` lines that put an interface under a bridge.
pub(crate) fn port(name: &str, bridge: &str) -> Vec<String> {
    vec![format!("link set {name} master {bridge}"), format!("link set {name} up")]
}

/// Lays a veth cable between two namespaces; both ends are down.
pub(crate) fn cable(one: &Netns, one_name: &str, other: &Netns, other_name: &str, mtu_bytes: u16) -> Result<()> {
    one.ip_batch(&[
        format!(
            "link add {one_name} mtu {mtu_bytes} type veth peer name {other_name} mtu {mtu_bytes} netns {}",
            other.name()
        ),
        format!("link set {one_name} addrgenmode none"),
    ])?;
    other.ip_batch(&[format!("link set {other_name} addrgenmode none")])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everyone_reaches_everyone() {
        let lan = Lan::new(LanConfig { mtu_bytes: 9000 }).unwrap();
        for target in [lan.host_a.ip, lan.host_b.ip] {
            lan.client.run(&format!("ping -c 1 -W 2 {target}")).unwrap();
            // A frame of the full MTU (20 bytes IP, 8 bytes ICMP header).
            lan.client.run(&format!("ping -c 1 -W 2 -M do -s 8972 {target}")).unwrap();
        }
        lan.host_a.netns.run(&format!("ping -c 1 -W 2 {}", lan.host_b.migration_ip)).unwrap();
        assert!(lan.switch_table().unwrap().contains("host-b"));
    }
}
