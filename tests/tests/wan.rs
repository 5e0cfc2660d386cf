//! A VM that goes to a host in another subnet keeps its addresses and connections, by a tunnel.
//!
//! The real `dunlin` moves a real VM between two namespaces with a router between them; what the kernels at both ends do with packets of all sizes is looked at with a namespace in the VM's place, since the test
//! guest knows nothing of path MTUs.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dunlin::model::{Ending, MacAddress, MigrationId, TunnelOffer, VmId};
use dunlin::port::SourceTunnel;
use dunlin::service::interrupt::Interrupt;
use dunlin::service::machine::Places;
use dunlin::service::tunnel::former::{FormerEnd, FormerRequest};
use dunlin::service::tunnel::list::{self, DropOptions, TunnelState, Which};
use dunlin::service::tunnel::new::{Guest, NewEnd};
use dunlin_tests::client::{EchoClient, Pinger};
use dunlin_tests::linux;
use dunlin_tests::rig::Side;
use dunlin_tests::topology::{BRIDGE, TAP};
use dunlin_tests::wait::wait_for;
use dunlin_tests::wan::{
    self, Beyond, all_answer, assert_nothing, permanent_neighbours, refused, rig, rig_with, tunnel, tunnels, wires,
};
use dunlin_tests::{HopOptions, Lan, Netns, Rig, guest};
use rustix::process::Signal;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);
/// The largest packet in a tunnel over IPv4 and an MTU of 1500.
const MTU_V4: u32 = 1450;

fn tunnelled(more: &[&str]) -> HopOptions {
    wan::tunnelled("vxlan", more)
}

#[test]
fn a_vm_keeps_its_addresses_and_connections_in_another_subnet_and_on_its_way_back() {
    let (mut rig, beyond) = rig();
    let every = Duration::from_millis(5);
    let begin = |netns: &Netns| netns.enter(|| EchoClient::start(Rig::echo_address(), every)).unwrap();
    let connections = [begin(&rig.client), begin(&beyond.near), begin(&beyond.far)];
    let pinger = rig.client.enter(|| Pinger::start(Rig::guest_ip(), Duration::from_millis(2))).unwrap();
    all_answer(&connections, 50);

    let hop = rig.hop(&tunnelled(&[])).unwrap();
    let report = hop.report.tunnel.clone().unwrap();
    assert_eq!((hop.exit_code, report.mtu_bytes, report.stays), (Some(0), MTU_V4, true), "{report:?}");
    all_answer(&connections, 200);
    println!(
        "shows {report:?}; blackout {:.1} ms, relayed {:?}; longest gaps {:?}",
        hop.report.blackout_ns as f64 / 1e6,
        hop.report.relay,
        connections.each_ref().map(|connection| connection.report().largest_gap.length())
    );
    // New ones, too.
    let after = begin(&beyond.far);
    after.wait_answers(20, LIMIT).unwrap();
    assert_eq!(after.finish(LIMIT).fault, None);

    let [former] = &tunnels(&rig, Side::A)[..] else { panic!("not one tunnel") };
    let [new] = &tunnels(&rig, Side::B)[..] else { panic!("not one tunnel") };
    println!("shows {former}\nshows {new}");
    assert_eq!((&former["id"], &former["state"], &former["side"]), (&new["id"], &"carrying".into(), &"former".into()));
    assert_eq!((&new["state"], &new["side"]), (&"carrying".into(), &"new".into()));
    assert_eq!((&former["far_end_answers"], &former["vm_answers"]), (&true.into(), &true.into()), "{former}");
    assert!(former["traffic"]["received_packets"].as_u64() > Some(200), "{former}");
    assert_eq!(new["lines"][0]["taken_from"], BRIDGE);
    assert_eq!(wires(&rig.host(Side::A).netns).0.len(), 1);
    let (made, tap) = wires(&rig.host(Side::B).netns);
    assert!(made.len() == 2 && tap.is_some_and(|tap| made.contains(&tap)), "{made:?}");
    // The VM would be cut off.
    let (code, _, error) = tunnel(&rig, Side::B, &["drop", "--all"]);
    assert!(code == Some(3) && error.contains("--force"), "{code:?}: {error}");

    // Home again, with no tunnel asked for: both ends go by themselves.
    rig.receive_more.clear();
    rig.hop(&HopOptions::default()).unwrap();
    all_answer(&connections, 200);
    wait_for("the end of the tunnel at the host that the VM came back from", LIMIT, || {
        tunnels(&rig, Side::B).is_empty().then_some(())
    })
    .unwrap();
    assert_nothing(&rig, Side::A);
    assert_nothing(&rig, Side::B);
    for connection in connections {
        assert_eq!(connection.finish(LIMIT).fault, None);
    }
    let pings = pinger.finish(Duration::from_secs(2));
    println!(
        "shows {} pings, {} unanswered, {} doubled, {} out of order",
        pings.sent,
        pings.unanswered.len(),
        pings.duplicates,
        pings.reordered
    );
    assert_eq!((pings.unanswered, pings.duplicates, pings.reordered), (Vec::new(), 0, 0));
    assert_eq!(guest::errors(&rig.counters().unwrap()), Vec::<String>::new());
    assert!(rig.stop().unwrap().success());
}

#[test]
fn whatever_keeps_a_tunnel_from_being_nothing_is_moved_and_nothing_stays() {
    let (mut rig, _beyond) = rig();
    rig.receive_more.clear();
    refused(&mut rig, "vxlan", &["start it with --tunnel"]);
    rig.receive_more = vec!["--tunnel".to_owned()];
    refused(&mut rig, "vxlan,remote=10.79.0.99", &["10.79.0.99", "remote=IP"]);
    refused(&mut rig, "vxlan,remote=10.77.0.11", &["is this host itself"]);
    refused(&mut rig, "vxlan,local=192.0.2.1", &["192.0.2.1"]);
    // Answers to this address find no way.
    rig.host(Side::A).netns.ip("addr add 172.31.0.1/32 dev lo").unwrap();
    refused(&mut rig, "vxlan,local=172.31.0.1,port=4790", &["does not answer", "UDP port 4790"]);
    assert!(rig.stop().unwrap().success());
}

#[test]
fn a_tunnel_goes_with_a_migration_that_is_cancelled_and_what_a_killed_manager_leaves_is_dropped_by_hand() {
    let (mut rig, _beyond) = rig();
    let laid = |rig: &Rig, side: Side| {
        wait_for("a tunnel", LIMIT, || wires(&rig.host(side).netns).0.first().cloned()).unwrap()
    };
    let slow = tunnelled(&["--bandwidth", "8Mbit"]);
    let receiver = rig.receive().unwrap();
    let mut manager = rig.start_migration(&receiver.address, &slow).unwrap();
    laid(&rig, Side::B);
    assert_eq!(tunnels(&rig, Side::A)[0]["state"], "ready");
    let (code, _, error) = tunnel(&rig, Side::A, &["drop", "--all"]);
    assert!(code == Some(3) && error.contains("--cancel"), "{code:?}: {error}");
    manager.signal(Signal::INT).unwrap();
    let (report, code) = rig.end_of_migration(&mut manager).unwrap();
    assert_eq!((report.ending, code), (Ending::Cancelled, Some(6)), "{}", report.reason);
    assert_nothing(&rig, Side::A);
    wait_for("the target to let go", LIMIT, || tunnels(&rig, Side::B).is_empty().then_some(())).unwrap();
    assert_nothing(&rig, Side::B);

    let receiver = rig.receive().unwrap();
    let mut manager = rig.start_migration(&receiver.address, &slow).unwrap();
    laid(&rig, Side::B);
    manager.signal(Signal::KILL).unwrap();
    manager.wait_for(LIMIT).unwrap().unwrap();
    wait_for("the target to let go", LIMIT, || tunnels(&rig, Side::B).is_empty().then_some(())).unwrap();
    assert_nothing(&rig, Side::B);
    rig.counters().unwrap();
    let left = tunnels(&rig, Side::A);
    assert_eq!((left.len(), &left[0]["state"]), (1, &"ready".into()), "{left:?}");
    let (code, dropped, error) = tunnel(&rig, Side::A, &["drop", left[0]["id"].as_str().unwrap()]);
    assert_eq!((code, dropped.len(), &dropped[0]["left"]), (Some(0), 1, &Value::Array(vec![])), "{error}");
    assert_nothing(&rig, Side::A);
    let audit = std::fs::read_to_string(rig.state_dir(Side::A).join("audit.log")).unwrap();
    assert!(audit.contains("\"tunnel-lay\"") && audit.contains("\"tunnel-drop\""), "{audit}");
    assert!(rig.stop().unwrap().success());
}

/// Both ends of a tunnel, and a namespace in the VM's place behind it.
struct Stage {
    lan: Lan,
    beyond: Beyond,
    guest: Netns,
    former: Option<FormerEnd>,
    new: Option<NewEnd>,
    folders: [tempfile::TempDir; 2],
}

const PORT: &str = "vm0";
/// What a bulk transfer carries, each way.
const BULK_BYTES: usize = 4 << 20;

fn mac() -> MacAddress {
    Rig::mac()
}

impl Stage {
    /// The hosts speak to one another by IPv4 or IPv6.
    fn new(v4: bool) -> Self {
        let (lan, beyond) = wan::build().unwrap();
        let guest = Netns::new("guest").unwrap();
        let b = &lan.host_b.netns;
        b.ip_batch(&[
            format!("link add {PORT} type veth peer name eth0 netns {}", guest.name()),
            format!("link set {PORT} addrgenmode none master {BRIDGE} up"),
        ])
        .unwrap();
        let [ip4, ip6] = Lan::GUEST_IPS;
        guest
            .ip_batch(&[
                format!("link set eth0 address {} up", mac()),
                format!("addr add {ip4}/24 dev eth0"),
                format!("addr add {ip6}/64 dev eth0 nodad"),
                format!("route add default via {}", wan::GATEWAY),
                "route add ::/0 via fd77::fe".to_owned(),
            ])
            .unwrap();
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let (migration, vm_id) = (MigrationId::random(), VmId::random());
        let net = |tap: &str| format!("tap={tap},mac={},ip={ip4},ip={ip6}", mac()).parse().unwrap();
        let ends: [IpAddr; 2] = if v4 {
            [lan.host_a.ip.into(), lan.host_b.ip.into()]
        } else {
            ["fd77::1:1", "fd79::2:1"].map(|ip| ip.parse().unwrap())
        };
        let mut former = FormerEnd::new(FormerRequest {
            spec: format!("vxlan,remote={},local={}", ends[1], ends[0]).parse().unwrap(),
            to: "tcp://127.0.0.1:1".parse().unwrap(),
            migration,
            vm_id,
            vm_name: "vm".parse().unwrap(),
            nets: vec![net(TAP)],
            run_dir: folders[0].path().to_owned(),
            state_dir: folders[0].path().to_owned(),
        });
        let (offer, _): (TunnelOffer, _) = lan.host_a.netns.enter(|| former.open()).unwrap();
        let places = Places { run_dir: folders[1].path().to_owned(), state_dir: folders[1].path().to_owned() };
        let name = "vm".parse().unwrap();
        let nets = [net(PORT)];
        let vm = Guest { migration, vm_id, vm_name: &name, nets: &nets };
        let new = b.enter(|| NewEnd::open(&offer, None, &places, vm)).unwrap().0;
        let former = lan.host_a.netns.enter(|| {
            former.try_it(None).unwrap();
            former
        });
        Self { lan, beyond, guest, former: Some(former), new: Some(new), folders }
    }

    /// The VM has moved.
    fn moved(&mut self) {
        let former = self.former.take().unwrap();
        let report = self.lan.host_a.netns.enter(|| former.settle(Ending::Moved)).unwrap();
        assert!(report.stays && report.rtt_ns > 0, "{report:?}");
    }

    fn run_dir(&self, side: Side) -> &Path {
        self.folders[usize::from(side == Side::B)].path()
    }

    fn drop_both(&self) {
        for (side, host) in [(Side::A, &self.lan.host_a), (Side::B, &self.lan.host_b)] {
            let dropped =
                host.netns.enter(|| list::drop_tunnels(self.run_dir(side), &Which::All, DropOptions::default()));
            let dropped = dropped.unwrap();
            assert!(dropped.len() == 1 && dropped[0].left.is_empty(), "{dropped:?}");
            assert_eq!(wires(&host.netns), (vec![], Some(BRIDGE.to_owned())));
            assert_eq!(permanent_neighbours(&host.netns), "");
        }
        let links: Vec<Value> =
            serde_json::from_str(&self.lan.host_b.netns.run(&format!("ip -json link show {PORT}")).unwrap()).unwrap();
        assert_eq!(links[0]["master"], BRIDGE);
    }
}

/// Carries 4 MiB each way at a time between two namespaces, and returns the path MTUs that both knew at the end.
fn bulk(client: &Netns, host: &Netns, server: IpAddr) -> [String; 2] {
    let listener = host.enter(|| TcpListener::bind(SocketAddr::new(server, 0))).unwrap();
    let address = listener.local_addr().unwrap();
    let swap = |mut stream: TcpStream, seed: u8| {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut writer = stream.try_clone().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || writer.write_all(&vec![seed; BULK_BYTES]).unwrap());
            let mut all = vec![0; BULK_BYTES];
            stream.read_exact(&mut all).unwrap();
            assert!(all.iter().all(|&byte| byte == seed ^ 1));
        });
    };
    std::thread::scope(|scope| {
        scope.spawn(|| swap(listener.accept().unwrap().0, 4));
        let connect = || TcpStream::connect_timeout(&address, LIMIT);
        let stream = client.enter(connect).unwrap_or_else(|error| {
            let neighbours = client.run("ip neigh show").unwrap_or_default();
            panic!("{} to {address}: {error}; it knows:\n{neighbours}", client.name());
        });
        client.enter(|| swap(stream, 5));
    });
    let client_ip = client.enter(|| {
        let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind(SocketAddr::new(any, 0)).unwrap();
        socket.connect(address).unwrap();
        socket.local_addr().unwrap().ip()
    });
    [client.run(&format!("ip route get {server}")).unwrap(), host.run(&format!("ip route get {client_ip}")).unwrap()]
}

/// Of both protocols inside and outside, from each place, more than a packet can hold goes both ways: who sends too large a packet is told by the kernel of the host where the tunnel begins.
#[test]
fn packets_too_large_for_the_tunnel_are_told_their_senders() {
    for outer_v4 in [true, false] {
        let mut stage = Stage::new(outer_v4);
        stage.moved();
        let mtu = if outer_v4 { MTU_V4 } else { MTU_V4 - 20 };
        // No client may be saved by the segment's size that the other tests need.
        for (netns, net) in [(&stage.beyond.near, 79), (&stage.beyond.far, 80)] {
            netns
                .ip_batch(&[
                    format!("route replace default via 10.{net}.0.254"),
                    "route del ::/0".to_owned(),
                    format!("route add ::/0 via fd{net}::fe"),
                ])
                .unwrap();
        }
        let [v4, v6] = Lan::GUEST_IPS;
        stage
            .lan
            .client
            .ip_batch(&[format!("route del {v4}/32 dev eth0"), format!("route del {v6}/128 dev eth0")])
            .unwrap();
        for server in Lan::GUEST_IPS {
            for client in [&stage.lan.client, &stage.beyond.near, &stage.beyond.far] {
                let began = Instant::now();
                let known = bulk(client, &stage.guest, server);
                println!(
                    "shows {} to {server}: {:.2} s for 4 MiB each way",
                    client.name(),
                    began.elapsed().as_secs_f64()
                );
                assert!(known.iter().all(|known| known.contains(&format!("mtu {mtu}"))), "{server}: {known:?}");
            }
        }
        println!("shows 4 MiB each way from three clients by IPv4 and IPv6, all told of {mtu} bytes");
        stage.new.as_mut().unwrap().let_be();
        drop(stage.new.take());
        stage.drop_both();
    }
}

/// The kernel of the former host itself answers who asks for the VM's addresses: here the VM is not even there to do so.
#[test]
fn the_former_host_answers_for_the_vm() {
    let mut stage = Stage::new(true);
    let client = &stage.lan.client;
    let asks = |ip: IpAddr| {
        client.run("ip neigh flush all").unwrap();
        client.enter(|| {
            let any: IpAddr = if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            let socket = UdpSocket::bind(SocketAddr::new(any, 0)).unwrap();
            let _refused_where_nobody_answers = socket.send_to(b"?", SocketAddr::new(ip, 9));
        });
    };
    let known = |ip: IpAddr| client.run(&format!("ip neigh show {ip}")).unwrap();
    stage.guest.ip("link set eth0 down").unwrap();
    let former = stage.former.take().unwrap();
    stage.lan.host_a.netns.enter(|| former.settle(Ending::Moved)).unwrap();
    for ip in Lan::GUEST_IPS {
        asks(ip);
        let answer =
            wait_for("an answer", LIMIT, || Some(known(ip)).filter(|known| known.contains("REACHABLE"))).unwrap();
        println!("shows {}", answer.trim());
        assert!(answer.contains(&mac().to_string()), "{answer}");
    }
    drop(stage.new.take());
    stage
        .lan
        .host_a
        .netns
        .enter(|| list::drop_tunnels(stage.run_dir(Side::A), &Which::All, DropOptions::default()))
        .unwrap();
    assert_eq!(permanent_neighbours(&stage.lan.host_a.netns), "");
}

/// When the guest has other addresses, the tunnel goes; while it has one of them, or the tunnel does not work, it stays.
#[test]
fn a_tunnel_goes_when_the_addresses_have_moved() {
    let mut stage = Stage::new(true);
    stage.moved();
    let over = AtomicBool::new(false);
    let (interrupt, wake) = Interrupt::by_hand().unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let mut dropped = Vec::new();
            let result = stage.lan.host_a.netns.enter(|| {
                list::drop_when_moved(stage.run_dir(Side::A), &Which::All, &interrupt, |one| dropped.push(one))
            });
            over.store(true, Ordering::Release);
            (result, dropped)
        });
        let [v4, v6] = Lan::GUEST_IPS;
        stage.guest.ip(&format!("addr del {v4}/24 dev eth0")).unwrap();
        // Longer than it takes when both are gone.
        let until = Instant::now() + list::LOOK_EVERY * 6;
        while Instant::now() < until {
            assert!(!over.load(Ordering::Acquire), "dropped with an address still behind it");
            std::thread::sleep(Duration::from_millis(50));
        }
        stage.guest.ip(&format!("addr del {v6}/64 dev eth0")).unwrap();
        let since = Instant::now();
        let waited = wait_for("the tunnel to go", LIMIT, || over.load(Ordering::Acquire).then_some(()));
        drop(wake);
        let (result, dropped) = waiting.join().unwrap();
        waited.unwrap();
        result.unwrap();
        println!("shows dropped {:.0} s after the last address was gone: {dropped:?}", since.elapsed().as_secs_f64());
        assert_eq!(dropped.len(), 1);
    });
    assert_eq!(wires(&stage.lan.host_a.netns), (vec![], Some(BRIDGE.to_owned())));
    // The other end is this test's own.
    let new = stage.new.take().unwrap();
    let views = stage.lan.host_b.netns.enter(|| list::list(stage.run_dir(Side::B), true)).unwrap();
    assert_eq!((views.len(), views[0].state), (1, TunnelState::Stale));
    stage.lan.host_b.netns.enter(|| new.end());
    assert_eq!(wires(&stage.lan.host_b.netns).0, Vec::<String>::new());
}

/// Delay and loss of what leaves by the cable of the new host, both ways.
#[derive(Clone, Copy, Debug)]
struct Way {
    one_way_ms: u64,
    loss_percent: f64,
}

impl Way {
    /// From a cable to a continent away.
    const ALL: [Self; 4] = [
        Self { one_way_ms: 0, loss_percent: 0.0 },
        Self { one_way_ms: 10, loss_percent: 0.0 },
        Self { one_way_ms: 25, loss_percent: 0.1 },
        Self { one_way_ms: 50, loss_percent: 0.1 },
    ];

    fn lay(self, switch: &Netns, host_b: &Netns) {
        let Self { one_way_ms, loss_percent } = self;
        if one_way_ms > 0 {
            // The packets that are under way at 1 Gbit/s, twice: the device's own limit of 1000 is none of a way's.
            let words = format!("delay {one_way_ms}ms loss {loss_percent}% limit 20000");
            for (netns, device) in [(switch, "host-b"), (host_b, "up0")] {
                netns.run(&format!("tc qdisc replace dev {device} root netem {words}")).unwrap();
            }
        }
    }

    fn rtt_ns(self) -> u64 {
        2_000_000 * self.one_way_ms
    }

    /// What is lost last is sent again after the kernel's least time-out, 200 ms, and a round trip (`TCP_RTO_MIN`, tcp(7)): two of these.
    fn losses_ns(self) -> u64 {
        if self.loss_percent > 0.0 { 2 * (200_000_000 + self.rtt_ns()) } else { 0 }
    }
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RTT {} ms, loss {} %", 2 * self.one_way_ms, self.loss_percent)
    }
}

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}

/// Blackout ≤ what was left ÷ bandwidth + 2 round trips + what switching over costs this machine by a cable.
#[test]
#[ignore = "needs netem: `cargo xtask test-vm` runs it"]
fn a_vm_moves_over_a_wan_with_delay_and_loss() {
    let is_brief = linux::moves() as usize <= Way::ALL.len();
    let ways = if is_brief { &[Way::ALL[0], Way::ALL[2]][..] } else { &Way::ALL };
    let mut by_cable_ns = None;
    for &way in ways {
        // Few writes: a lost packet now and then leaves little of a long way's bandwidth.
        let (mut rig, beyond) = rig_with("ws:4M,rate:50,fill:random");
        way.lay(&rig.switch, &rig.host(Side::B).netns);
        let every = Duration::from_millis(20);
        let begin = |netns: &Netns| netns.enter(|| EchoClient::start(Rig::echo_address(), every)).unwrap();
        let connections = [begin(&rig.client), begin(&beyond.far)];
        let longest = |answers: u64| {
            connections[0].restart_measurement();
            connections[0].wait_answers(answers, LIMIT).unwrap();
            connections[0].report().largest_round_trip_ns
        };
        let before_ns = longest(50);
        connections[0].restart_measurement();
        let hop = rig.hop(&tunnelled(&["--downtime", "300ms"])).unwrap();
        all_answer(&connections, 20);
        let during_ns = connections[0].report().largest_round_trip_ns;
        let after_ns = longest(50);

        let (report, tunnel) = (&hop.report, hop.report.tunnel.clone().unwrap());
        let last = report.rounds.last().unwrap();
        let best = report.rounds.iter().filter(|round| !round.paused && round.duration_ns > 0);
        let best = best.map(|round| round.wire_bytes as f64 * 1e9 / round.duration_ns as f64).fold(0.0, f64::max);
        let moving_ns = (last.wire_bytes as f64 / best.max(1.0) * 1e9) as u64;
        let limit_ns = by_cable_ns.map(|ns: u64| moving_ns + 2 * way.rtt_ns() + 2 * ns + way.losses_ns());
        println!(
            "shows {way}: blackout {:.1} ms; {:.1} ms for {} bytes at {:.1} MB/s, {:.1} ms for 2 RTT, {:.1} ms otherwise; allowed {}",
            ms(report.blackout_ns),
            ms(moving_ns),
            last.wire_bytes,
            best / 1e6,
            ms(2 * way.rtt_ns()),
            ms(report.blackout_ns.saturating_sub(moving_ns + 2 * way.rtt_ns())),
            limit_ns.map_or("as it is: the measure".to_owned(), |ns| format!("{:.1} ms", ms(ns))),
        );
        println!(
            "shows {way}: longest round trip to the VM {:.1} ms before, {:.1} ms while it moved, {:.1} ms through the tunnel, which measured {:.1} ms",
            ms(before_ns),
            ms(during_ns),
            ms(after_ns),
            ms(tunnel.rtt_ns),
        );
        assert!(tunnel.rtt_ns >= way.rtt_ns() && tunnel.stays, "{tunnel:?}");
        assert!(report.blackout_ns <= limit_ns.unwrap_or(u64::MAX), "{way}: {report:#?}");
        by_cable_ns.get_or_insert(report.blackout_ns);
        for connection in connections {
            assert_eq!(connection.finish(LIMIT).fault, None);
        }
        assert_eq!(guest::errors(&rig.counters().unwrap()), Vec::<String>::new());
        assert!(rig.stop().unwrap().success());
        drop((beyond, rig));
        throughput(way);
    }
}

/// What the kernels carry, with a namespace in the VM's place: to the VM's host without a tunnel, and to the VM through it.
fn throughput(way: Way) {
    let mut stage = Stage::new(true);
    stage.moved();
    way.lay(&stage.lan.switch, &stage.lan.host_b.netns);
    let rate = |server: &Netns, ip: IpAddr| {
        let began = Instant::now();
        bulk(&stage.lan.client, server, ip);
        (2 * BULK_BYTES) as f64 / began.elapsed().as_secs_f64() / 1e6
    };
    let plain = rate(&stage.lan.host_b.netns, stage.lan.host_b.ip.into());
    let tunnelled = rate(&stage.guest, Rig::guest_ip());
    println!(
        "shows {way}: {tunnelled:.1} MB/s both ways together through the tunnel, {plain:.1} to the host itself: {:.2} of it",
        tunnelled / plain
    );
    stage.new.as_mut().unwrap().let_be();
    drop(stage.new.take());
    stage.drop_both();
}

#[test]
fn a_tunnel_that_cannot_be_meant_is_a_wrong_command_line() {
    for words in ["gre", "vxlan,vni=0", "vxlan,remote=nowhere", "vxlan,port=0"] {
        let mut command: Command = dunlin_tests::dunlin();
        command.args(["migrate", "vm", "--to", "tcp://127.0.0.1:1", "--tunnel", words]);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{words}");
    }
}
