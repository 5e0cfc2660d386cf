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
//! Owns names and addresses, and what all tests of tunnels between the two ask. The guest's are those of [`Lan::GUEST_IPS`], with [`GATEWAY`] as its gateway.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Context, Result};
use dunlin::model::Ending;
use serde_json::Value;

use crate::client::EchoClient;
use crate::netns::Netns;
use crate::rig::Side;
use crate::topology::{BRIDGE, Host, Lan, SWITCH, TAP, UPLINK, bridge, cable, port};
use crate::wait::wait_for;
use crate::{HopOptions, Rig, VmSpec};

/// The guest's gateway, in its former subnet.
pub const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 254));
/// The bridge of the new subnet, in the router's namespace.
pub const OTHER_SWITCH: &str = "sw1";
/// A segment's size that fits through any tunnel: the test guest knows nothing of path MTUs.
const MSS_BYTES: u32 = 1300;
const LIMIT: Duration = Duration::from_secs(30);

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

/// A VM at the first host that writes a little, with receivers that allow tunnels.
///
/// # Panics
/// What could not be made.
pub fn rig() -> (Rig, Beyond) {
    rig_with("ws:8M,rate:1000,fill:random")
}

/// The same with a workload of its own.
///
/// # Panics
/// What could not be made.
pub fn rig_with(workload: &str) -> (Rig, Beyond) {
    let (lan, beyond) = build().unwrap();
    let guest = format!("dunlin.wl0={workload} dunlin.gw={GATEWAY}");
    let mut rig = Rig::boot_on(lan, &VmSpec { guest, ..VmSpec::default() }).unwrap();
    rig.receive_more = vec!["--tunnel".to_owned()];
    (rig, beyond)
}

/// A migration by such a tunnel, with further options.
pub fn tunnelled(tunnel: &str, more: &[&str]) -> HopOptions {
    let more = [&["--tunnel", tunnel], more].concat();
    HopOptions { more: more.into_iter().map(str::to_owned).collect(), ..HopOptions::default() }
}

/// A `dunlin tunnel` command at one host: its exit code, and the objects that it printed.
pub fn tunnel(rig: &Rig, side: Side, words: &[&str]) -> (Option<i32>, Vec<Value>, String) {
    let mut command = crate::dunlin();
    command.arg("tunnel").args(words).arg("--json").arg("--run-dir").arg(rig.run_dir(side));
    let output = rig.host(side).netns.output(&mut command).unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let objects = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    (output.status.code(), objects, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// The tunnels of one host, as `dunlin tunnel list` has them.
pub fn tunnels(rig: &Rig, side: Side) -> Vec<Value> {
    let (code, objects, errors) = tunnel(rig, side, &["list"]);
    assert_eq!(code, Some(0), "{errors}");
    objects
}

/// The interfaces of a namespace that a tunnel has made, and where the tap is.
pub fn wires(netns: &Netns) -> (Vec<String>, Option<String>) {
    let links: Vec<Value> = serde_json::from_str(&netns.run("ip -json link show").unwrap()).unwrap();
    let name = |link: &Value| link["ifname"].as_str().unwrap_or_default().to_owned();
    let made = links
        .iter()
        .map(name)
        .filter(|name| ["dln-", "dlb-", "dlw-"].iter().any(|made| name.starts_with(made)))
        .collect();
    let tap = links.iter().find(|link| name(link) == TAP).and_then(|tap| tap["master"].as_str().map(str::to_owned));
    (made, tap)
}

/// What a namespace has been told for good of its neighbours.
pub fn permanent_neighbours(netns: &Netns) -> String {
    netns.run("ip neigh show nud permanent").unwrap()
}

/// Nothing of a tunnel is at a host: no interface, no entry, no neighbour, and the tap is where it was.
pub fn assert_nothing(rig: &Rig, side: Side) {
    let netns = &rig.host(side).netns;
    assert_eq!(wires(netns), (vec![], Some(BRIDGE.to_owned())), "{side:?}");
    assert_eq!(permanent_neighbours(netns), "", "{side:?}");
    assert_eq!(tunnels(rig, side), Vec::<Value>::new(), "{side:?}");
    assert!(!rig.run_dir(side).join(".tunnels").exists(), "{side:?}");
}

/// A migration with this tunnel is refused with these words, before anything has moved, and nothing is left of it.
pub fn refused(rig: &mut Rig, tunnel: &str, words: &[&str]) {
    let receiver = rig.receive().unwrap();
    let mut manager = rig.start_migration(&receiver.address, &tunnelled(tunnel, &[])).unwrap();
    let (report, code) = rig.end_of_migration(&mut manager).unwrap();
    println!("shows {}", report.reason);
    assert_eq!((report.ending, code), (Ending::Refused, Some(3)), "{}", report.reason);
    assert!(words.iter().all(|word| report.reason.contains(word)), "{}", report.reason);
    assert_eq!(report.rounds.len(), 0);
    assert_nothing(rig, Side::A);
    // The receiver is told, and then waits for the next.
    let gone = || wires(&rig.host(Side::B).netns).0.is_empty() && !rig.run_dir(Side::B).join(".tunnels").exists();
    wait_for("the receiver's end of the tunnel to go", LIMIT, || gone().then_some(())).unwrap();
    assert_nothing(rig, Side::B);
    rig.counters().unwrap();
}

/// So many more answers come over each connection.
pub fn all_answer(connections: &[EchoClient], count: u64) {
    for connection in connections {
        connection.wait_answers(count, LIMIT).unwrap();
    }
}
