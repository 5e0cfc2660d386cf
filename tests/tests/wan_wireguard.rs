//! A VM that goes to another subnet by `--tunnel wireguard`: what passes between the hosts is WireGuard's alone; where the kernel has none, or its port is taken, nothing is moved and nothing stays.
//!
//! What a tunnel does for the VM is asked by `wan.rs`; here is what lies under it.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use dunlin::net::listen::Listener;
use dunlin_tests::client::EchoClient;
use dunlin_tests::client::gap::monotonic_ns;
use dunlin_tests::rig::Side;
use dunlin_tests::topology::BRIDGE;
use dunlin_tests::wait::wait_for;
use dunlin_tests::wan::{self, all_answer, assert_nothing, refused, tunnels, wires};
use dunlin_tests::{HopOptions, Netns, Rig, guest};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);
/// How often one who counts looks whether to go on.
const TICK: Duration = Duration::from_millis(100);
/// Its usual UDP port.
const PORT: u16 = 51_820;
/// The largest packet in such a tunnel over IPv4 and an MTU of 1500.
const MTU: u32 = 1390;

/// The UDP packets that pass a port of the router, by what they are.
#[derive(Clone, Copy, Debug, Default)]
struct Passed {
    /// WireGuard's.
    wireguard: u64,
    /// The largest of these, in bytes, from the IP header on.
    largest_bytes: usize,
    /// VXLAN's.
    vxlan: u64,
    /// Parts of packets.
    fragments: u64,
}

impl Passed {
    /// Counts an Ethernet frame, if it is IPv4.
    fn count(&mut self, frame: &[u8]) {
        let word = |at: usize| frame.get(at..at + 2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
        if word(12) != Some(0x0800) {
            return;
        }
        // More fragments, or an offset.
        self.fragments += u64::from(word(20).is_some_and(|word| word & 0x3fff != 0));
        if frame.get(23) != Some(&17) {
            return;
        }
        let ports = [word(34), word(36)];
        self.vxlan += u64::from(ports.contains(&Some(4789)));
        if ports.contains(&Some(PORT)) {
            self.wireguard += 1;
            self.largest_bytes = self.largest_bytes.max(word(16).unwrap_or_default().into());
        }
    }
}

/// Counts until it is dropped.
struct Watch {
    over: Arc<AtomicBool>,
    passed: Arc<Mutex<Passed>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    fn start(netns: &Netns, interface: &str) -> Self {
        let (over, passed) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Passed::default())));
        let mut listener = netns.enter(|| Listener::open(interface)).unwrap();
        let (until, counts) = (Arc::clone(&over), Arc::clone(&passed));
        let thread = std::thread::spawn(move || {
            while !until.load(Ordering::Acquire) {
                if let Some(passing) = listener.next(Duration::from_nanos(monotonic_ns()) + TICK).unwrap() {
                    counts.lock().unwrap().count(passing.frame);
                }
            }
        });
        Self { over, passed, thread: Some(thread) }
    }

    fn passed(&self) -> Passed {
        *self.passed.lock().unwrap()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _panicked_and_printed = thread.join();
        }
    }
}

/// Whether this kernel has WireGuard.
fn has_wireguard() -> bool {
    Netns::new("probe").unwrap().ip("link add wg0 type wireguard").is_ok()
}

#[test]
fn whatever_keeps_wireguard_from_being_nothing_is_moved_and_nothing_stays() {
    let (mut rig, _beyond) = wan::rig();
    if has_wireguard() {
        for side in [Side::A, Side::B] {
            let other = rig.host(side).netns.enter(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 51_999))).unwrap();
            refused(&mut rig, "wireguard,port=51999", &["UDP port 51999 is in use", "port="]);
            drop(other);
        }
    } else {
        println!("shows a kernel without WireGuard");
        refused(&mut rig, "wireguard", &["kernel of this host has no WireGuard", "5.6"]);
    }
    refused(&mut rig, "wireguard,remote=10.77.0.11", &["is this host itself"]);
    assert!(rig.stop().unwrap().success());
}

#[test]
#[ignore = "needs WireGuard: `cargo xtask test-vm` runs it"]
fn a_vm_moves_over_a_wan_through_wireguard() {
    let (mut rig, beyond) = wan::rig();
    let watch = Watch::start(&rig.switch, rig.host(Side::B).switch_port);
    let every = Duration::from_millis(20);
    let begin = |netns: &Netns| netns.enter(|| EchoClient::start(Rig::echo_address(), every)).unwrap();
    let connections = [begin(&rig.client), begin(&beyond.near), begin(&beyond.far)];
    all_answer(&connections, 20);

    let hop = rig.hop(&wan::tunnelled("wireguard", &[])).unwrap();
    let report = hop.report.tunnel.clone().unwrap();
    println!("shows {report:?}; blackout {:.1} ms", hop.report.blackout_ns as f64 / 1e6);
    assert_eq!((hop.exit_code, report.kind.as_str(), report.mtu_bytes), (Some(0), "wireguard", MTU), "{report:?}");
    all_answer(&connections, 60);

    let [former] = &tunnels(&rig, Side::A)[..] else { panic!("not one tunnel") };
    let [new] = &tunnels(&rig, Side::B)[..] else { panic!("not one tunnel") };
    println!("shows {former}\nshows {new}");
    for end in [former, new] {
        assert_eq!(
            (&end["kind"], &end["state"], &end["port"]),
            (&"wireguard".into(), &"carrying".into(), &PORT.into())
        );
        let traffic = &end["wireguard_traffic"];
        assert!(traffic["last_handshake_unix_ms"].as_u64() > Some(0), "{end}");
        assert!(traffic["received_bytes"].as_u64() > Some(10_000), "{end}");
        assert!(traffic["sent_bytes"].as_u64() > Some(10_000), "{end}");
    }
    assert_eq!(former["wireguard"]["local"], new["wireguard"]["remote"]);
    assert_eq!(wires(&rig.host(Side::A).netns).0.len(), 2);
    assert_eq!(wires(&rig.host(Side::B).netns).0.len(), 3);
    keys_are_nowhere(&rig);

    // Who sends what is too large for it is told by the former host.
    let guest = Rig::guest_ip();
    rig.client.enter(|| {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        socket.connect(SocketAddr::new(guest, 9)).unwrap();
        socket.send(&[0; 1472]).unwrap();
    });
    let told = || rig.client.run(&format!("ip route get {guest}")).is_ok_and(|way| way.contains(&format!("mtu {MTU}")));
    wait_for("the client to be told of the tunnel's MTU", LIMIT, || told().then_some(())).unwrap();

    let passed = watch.passed();
    println!("shows {passed:?} at {}", rig.host(Side::B).switch_port);
    assert!(passed.wireguard > 200, "{passed:?}");
    assert_eq!((passed.vxlan, passed.fragments, passed.largest_bytes), (0, 0, 1500), "{passed:?}");

    // Without the device nothing goes, and nothing goes plainly.
    let device = former["wireguard"]["device"].as_str().unwrap();
    let carried = passed.wireguard;
    rig.host(Side::A).netns.ip(&format!("link set {device} down")).unwrap();
    let lost = || tunnels(&rig, Side::A)[0]["traffic"]["lost_packets"].as_u64();
    wait_for("packets to be lost", LIMIT, || (lost() > Some(20)).then_some(())).unwrap();
    let passed = watch.passed();
    println!("shows {passed:?} with the device down; {carried} had passed before");
    assert_eq!((passed.vxlan, passed.fragments), (0, 0), "{passed:?}");

    // Home again, with no tunnel asked for: all of both ends goes.
    rig.receive_more.clear();
    rig.hop(&HopOptions::default()).unwrap();
    all_answer(&connections[..1], 60);
    wait_for("the end of the tunnel at the host that the VM came back from", LIMIT, || {
        tunnels(&rig, Side::B).is_empty().then_some(())
    })
    .unwrap();
    for side in [Side::A, Side::B] {
        assert_nothing(&rig, side);
        let routes = rig.host(side).netns.run("ip route show table all").unwrap();
        assert!(!routes.contains("169.254."), "{routes}");
    }
    assert_eq!(wires(&rig.host(Side::A).netns), (vec![], Some(BRIDGE.to_owned())));
    all_answer(&connections, 20);
    for connection in connections {
        assert_eq!(connection.finish(LIMIT).fault, None);
    }
    assert_eq!(guest::errors(&rig.counters().unwrap()), Vec::<String>::new());
    assert!(rig.stop().unwrap().success());
}

/// No file that a host keeps has a key in it.
fn keys_are_nowhere(rig: &Rig) {
    for side in [Side::A, Side::B] {
        let entries = rig.run_dir(side).join(".tunnels");
        for file in std::fs::read_dir(&entries).unwrap() {
            let entry: Value = serde_json::from_str(&std::fs::read_to_string(file.unwrap().path()).unwrap()).unwrap();
            let names: Vec<&String> = entry["wireguard"].as_object().unwrap().keys().collect();
            assert_eq!(names, ["device", "local", "mtu_bytes", "remote"]);
        }
    }
}
