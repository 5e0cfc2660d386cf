//! Two subnets with a router between them, each with a host of VMs and a client, and a client beyond.
//!
//! ```text
//!  host-a namespace          router namespace                  host-b namespace
//!  tap0 ─ br0 ─ up0 ══ host-a ─ sw0 ┐         ┌ sw1 ─ host-b ══ up0 ─ br0 ─ tap0
//!         10.77.0.11      client ─ ─┤ routes  ├─ ─ client1        10.79.0.12
//!                            ║      └── far ──┘       ║
//!                 eth0 10.77.0.1    10.80.0.1     eth0 10.79.0.1
//! ```
//!
//! Owns names and addresses. The guest's are those of [`Lan::GUEST_IPS`], with [`GATEWAY`] as its gateway. Must not know of tunnels.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result};

use crate::netns::Netns;
use crate::topology::{BRIDGE, Host, Lan, SWITCH, TAP, UPLINK, bridge, cable, port};

/// The guest's gateway, in its former subnet.
pub const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 254));
/// The bridge of the new subnet, in the router's namespace.
pub const OTHER_SWITCH: &str = "sw1";
/// A segment's size that fits through any tunnel: the test guest knows nothing of path MTUs.
const MSS_BYTES: u32 = 1300;

/// Who is not in the VM's LAN.
#[derive(Debug)]
pub struct Beyond {
    /// A client in the new host's subnet; its interface is `eth0`.
    pub near: Netns,
    /// A client in a third subnet; its interface is `eth0`.
    pub far: Netns,
}

impl Beyond {
    /// The address of [`Beyond::near`].
    pub const NEAR: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 79, 0, 1));
    /// The address of [`Beyond::far`].
    pub const FAR: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 80, 0, 1));
}

/// Builds it. The LAN's switch is the router's namespace; the second host is in the other subnet, and its migration address too.
///
/// # Errors
/// No right to, or a kernel without veth, bridge or tun.
pub fn build() -> Result<(Lan, Beyond)> {
    const MTU: u16 = 1500;
    let (router, client) = (Netns::new("router")?, Netns::new("client")?);
    let (near, far) = (Netns::new("near")?, Netns::new("far")?);
    let mut lines = [bridge(SWITCH, MTU), bridge(OTHER_SWITCH, MTU)].concat();
    lines.extend([(SWITCH, 77), (OTHER_SWITCH, 79)].iter().flat_map(|(switch, net)| {
        [
            format!("addr add 10.{net}.0.254/24 dev {switch}"),
            format!("addr add fd{net}::fe/64 dev {switch} nodad"),
            // Who forwards asks for neighbours from such an address.
            format!("addr add fe80::fe/64 dev {switch} nodad"),
        ]
    }));
    router.ip_batch(&lines).context("router")?;
    let sysctl = |name: &str| fs::write(format!("/proc/sys/net/{name}"), "1");
    router.enter(|| sysctl("ipv4/ip_forward").and_then(|()| sysctl("ipv6/conf/all/forwarding"))).context("routing")?;

    let host = |label: &'static str, switch: &str, net: u8, number: u8| -> Result<Host> {
        let netns = Netns::new(label)?;
        let ip = Ipv4Addr::new(10, net, 0, 10 + number);
        cable(&router, label, &netns, UPLINK, MTU)?;
        router.ip_batch(&port(label, switch))?;
        let mut lines = bridge(BRIDGE, MTU);
        lines.extend([format!("tuntap add {TAP} mode tap"), format!("link set {TAP} addrgenmode none")]);
        lines.extend(port(UPLINK, BRIDGE));
        lines.extend(port(TAP, BRIDGE));
        lines.extend([
            format!("addr add {ip}/24 dev {BRIDGE}"),
            format!("addr add fd{net}::{number}:1/64 dev {BRIDGE} nodad"),
            format!("route add default via 10.{net}.0.254"),
            format!("route add ::/0 via fd{net}::fe"),
        ]);
        netns.ip_batch(&lines).with_context(|| format!("host {label}"))?;
        Ok(Host { netns, ip, migration_ip: ip, switch_port: label })
    };
    let (host_a, host_b) = (host("host-a", SWITCH, 77, 1)?, host("host-b", OTHER_SWITCH, 79, 2)?);

    for (name, netns, switch, net) in [("client", &client, SWITCH, 77), ("client1", &near, OTHER_SWITCH, 79)] {
        cable(&router, name, netns, "eth0", MTU)?;
        router.ip_batch(&port(name, switch))?;
        end(netns, net)?;
    }
    let [v4, v6] = Lan::GUEST_IPS;
    client.ip_batch(&[
        format!("route add {v4}/32 dev eth0 advmss {MSS_BYTES}"),
        format!("route add {v6}/128 dev eth0 advmss {MSS_BYTES}"),
    ])?;
    cable(&router, "far", &far, "eth0", MTU)?;
    router.ip_batch(&[
        "addr add 10.80.0.254/24 dev far".to_owned(),
        "addr add fd80::fe/64 dev far nodad".to_owned(),
        "addr add fe80::fe/64 dev far nodad".to_owned(),
        "link set far up".to_owned(),
    ])?;
    end(&far, 80)?;
    Ok((Lan { host_a, host_b, switch: router, client }, Beyond { near, far }))
}

/// One host of a subnet, with its router as gateway.
fn end(netns: &Netns, net: u8) -> Result<()> {
    netns.ip_batch(&[
        "link set eth0 up".to_owned(),
        format!("addr add 10.{net}.0.1/24 dev eth0"),
        format!("addr add fd{net}::1/64 dev eth0 nodad"),
        format!("route add default via 10.{net}.0.254 advmss {MSS_BYTES}"),
        format!("route add ::/0 via fd{net}::fe advmss {MSS_BYTES}"),
    ])
}
