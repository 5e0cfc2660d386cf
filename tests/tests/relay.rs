//! Frames that reach a VM's former place when it has left: they are carried to it, once and in order.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use dunlin::migrate::Strategy;
use dunlin::model::MacAddress;
use dunlin::net::pnet::PnetPort;
use dunlin::port::FramePort as _;
use dunlin_tests::capture::Capture;
use dunlin_tests::client::{PingReport, Pinger};
use dunlin_tests::rig::Side;
use dunlin_tests::topology::TAP;
use dunlin_tests::wait::wait_for;
use dunlin_tests::wire::FrameKind;
use dunlin_tests::{Hop, HopOptions, Rig, VmSpec, guest, rig};

const LIMIT: Duration = Duration::from_secs(30);
/// Frames come this often; none fits into no blackout.
const EVERY: Duration = Duration::from_millis(1);

/// Moves a VM that is pinged all the time; what became of the pings.
fn hop(strategy: Strategy, more: &[&str]) -> (PingReport, Hop) {
    hop_to(&[], strategy, more)
}

/// The same to a receiver with further options.
fn hop_to(receiver: &[&str], strategy: Strategy, more: &[&str]) -> (PingReport, Hop) {
    let spec = VmSpec { guest: "dunlin.wl0=ws:8M,rate:1000,fill:random".to_owned(), ..VmSpec::default() };
    let owned = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
    let mut rig = Rig::boot(&spec).unwrap();
    rig.receive_more = owned(receiver);
    let pinger = rig.client.enter(|| Pinger::start(Rig::guest_ip(), EVERY)).unwrap();
    wait_for("some answers", LIMIT, || (pinger.report().answered > 200).then_some(())).unwrap();
    let more = owned(more);
    let options = HopOptions { strategy, more, ..HopOptions::default() };
    let hop = rig.hop(&options).unwrap();
    assert_eq!(hop.exit_code, Some(0), "{hop:#?}");
    let so_far = pinger.report().answered;
    wait_for("answers from there", LIMIT, || (pinger.report().answered > so_far + 200).then_some(())).unwrap();
    let report = pinger.finish(Duration::from_secs(2));
    assert_eq!(guest::errors(&rig.counters().unwrap()), Vec::<String>::new());
    assert!(rig.stop().unwrap().success());
    (report, hop)
}

/// Whatever way it moves, and for however long it stands: what it uses takes half a second at 400 Mbit/s, within which half as many frames come as a tap holds.
#[test]
fn no_frame_is_lost_doubled_or_turned_round() {
    let ways = [
        (Strategy::StopAndCopy, &["--bandwidth", "400Mbit"][..]),
        (Strategy::PreCopy, &[]),
        (Strategy::PostCopy, &["--bandwidth", "400Mbit"]),
        (Strategy::PostCopy, &["--bandwidth", "400Mbit", "--safe-post-copy"]),
    ];
    for (strategy, more) in ways {
        let (pings, hop) = hop(strategy, more);
        let relay = hop.report.relay.clone().unwrap();
        println!(
            "shows {strategy} {more:?}: {} pings, blackout {:.1} ms, relayed {relay:?}; {} unanswered, {} doubled, {} out of order",
            pings.sent,
            hop.report.blackout_ns as f64 / 1e6,
            pings.unanswered.len(),
            pings.duplicates,
            pings.reordered
        );
        assert!(relay.frames > 0 && relay.dropped_frames == 0 && relay.error.is_empty(), "{relay:?}");
        assert_eq!((&pings.unanswered, pings.duplicates, pings.reordered), (&Vec::new(), 0, 0), "{strategy}");
    }
}

/// What the relay is for: the same without it.
#[test]
fn without_it_what_comes_while_the_vm_stands_is_lost() {
    let (pings, hop) = hop(Strategy::StopAndCopy, &["--bandwidth", "400Mbit", "--relay", "0s"]);
    let stood_ms = hop.report.blackout_ns / 1_000_000;
    println!("shows {} of {} pings unanswered, blackout {stood_ms} ms", pings.unanswered.len(), pings.sent);
    assert_eq!(hop.report.relay, None);
    assert!(pings.unanswered.len() as u64 > stood_ms / 2, "{} unanswered in {stood_ms} ms", pings.unanswered.len());
}

/// Where somebody else announces VMs, nothing of that kind is sent, by the host or by the guest; what a silent switch still sends to the former place is relayed, and the answers teach it.
#[test]
fn where_nobody_announces_what_is_relayed_is_answered_and_the_switch_learns_of_that() {
    let (pings, hop) = hop_to(&["--no-announce"], Strategy::PreCopy, &[]);
    let (network, relay) = (hop.report.network.unwrap(), hop.report.relay.unwrap());
    println!("shows {network:?}; relayed {relay:?}; {} of {} pings unanswered", pings.unanswered.len(), pings.sent);
    assert_eq!((network.rounds_sent, network.frames_sent), (0, 0));
    assert!(hop.frames.iter().all(|frame| frame.kind == FrameKind::Traffic), "{:?}", hop.frames);
    assert!(hop.relearned_at_monotonic_ns.is_some() && relay.frames > 0);
    // Some may overtake those that are on their way by the relay at the very time when the switch learns.
    assert_eq!((pings.unanswered, pings.duplicates), (Vec::new(), 0));
}

/// A second opinion on all that passes a move, from both hosts' cables: Wireshark knows each frame, finds none malformed, and sees the guest's own answers, each once.
#[test]
fn whole_captures_hold_no_unknown_and_no_malformed_frame() {
    let mut rig = Rig::boot(&VmSpec::default()).unwrap();
    let captures = ["host-a", "host-b"].map(|port| Capture::start(&rig.switch, port).unwrap());
    let udp = SocketAddr::new(Rig::guest_ip6(), 7);
    let pinger = rig.client.enter(|| Pinger::start(Rig::guest_ip(), EVERY)).unwrap();
    let packets = rig.client.enter(|| Pinger::start_udp(udp, EVERY)).unwrap();
    let answered = || pinger.report().answered.min(packets.report().answered);
    wait_for("some answers", LIMIT, || (answered() > 100).then_some(())).unwrap();
    rig.hop(&HopOptions::default()).unwrap();
    let so_far = answered();
    wait_for("answers from there", LIMIT, || (answered() > so_far + 1000).then_some(()))
        .unwrap_or_else(|error| panic!("{error}: {:?} {:?}; {}", pinger.report(), packets.report(), rig.words()));
    let reports = [pinger, packets].map(|client| client.finish(Duration::from_secs(2)));
    let last = b"the last frame of all";
    rig.client.enter(|| {
        let socket = UdpSocket::bind("10.77.0.1:0").unwrap();
        socket.set_broadcast(true).unwrap();
        socket.send_to(last, "10.77.0.255:9").unwrap();
    });
    let [before, after] = captures.map(|capture| capture.finish(last).unwrap());
    for captured in [&before, &after] {
        let wrong = "_ws.malformed || _ws.expert.severity == \"Error\" || eth.type && !(arp || ip || ipv6)";
        assert_eq!(captured.read(wrong, &["frame.number", "frame.protocols"]).unwrap(), Vec::<String>::new());
    }
    let own = format!("eth.src == {} && (icmp.type == 0 || udp.srcport == 7)", rig::MAC);
    let answers: usize =
        [&before, &after].map(|captured| captured.read(&own, &["frame.number"]).unwrap().len()).iter().sum();
    let sum: u64 = reports.iter().map(|report| report.answered).sum();
    assert_eq!((answers as u64, reports.each_ref().map(|report| report.duplicates)), (sum, [0, 0]));
    // In their order: the announcement of each kind, before anything that the guest itself says there.
    let first = after.read(&format!("eth.src == {}", rig::MAC), &["eth.type", "arp.opcode", "icmpv6.type"]).unwrap();
    assert_eq!(first[..4], ["0x8035;3;", "0x0806;1;", "0x0806;2;", "0x86dd;;136"], "{:?}", &first[..8]);
    println!(
        "shows {answers} answers of a guest in two captures, {} frames of it at its new place, none unknown or malformed",
        first.len()
    );
    assert!(rig.stop().unwrap().success());
}

/// Frames of a protocol that nobody speaks, each millisecond so many, until it is dropped.
struct Flood {
    stop: Arc<AtomicBool>,
    sender: Option<JoinHandle<u64>>,
}

impl Flood {
    const FRAME_BYTES: usize = 1400;

    /// From the only interface of the namespace that it is called in.
    fn start(from: MacAddress, to: MacAddress, frames_per_ms: u64) -> Self {
        // 0x88b5 is for local experiments (IEEE 802-2014, 9.2.3).
        let mut frame = [&to.bytes()[..], &from.bytes(), &[0x88, 0xb5]].concat();
        frame.resize(Self::FRAME_BYTES, 0);
        let mut port = PnetPort::open("eth0").unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let sender = thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                let (began, mut sent) = (Instant::now(), 0);
                while !stop.load(Ordering::Acquire) {
                    if sent < began.elapsed().as_millis() as u64 * frames_per_ms {
                        port.send(&frame).unwrap();
                        sent += 1;
                    } else {
                        thread::sleep(Duration::from_micros(500));
                    }
                }
                sent
            }
        });
        Self { stop, sender: Some(sender) }
    }

    /// Ends it; how many frames it has sent.
    fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Release);
        self.sender.take().map_or(0, |sender| sender.join().unwrap())
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

/// A switch that never relearns, and a sender that does not care: the relay carries what it may, counts the rest, and ends in its time.
#[test]
fn a_flood_is_bounded_and_counted() {
    const MOST_BYTES: u64 = 32 << 20;
    let spec = VmSpec { guest: "dunlin.wl0=ws:8M,rate:1000,fill:random".to_owned(), ..VmSpec::default() };
    let mut rig = Rig::boot(&spec).unwrap();
    // Both bridges on the way to the former place.
    let places = [(&rig.switch, "host-a"), (&rig.host(Side::A).netns, TAP)];
    for (bridge, port) in places {
        bridge.run(&format!("bridge fdb replace {} dev {port} master static sticky", rig::MAC)).unwrap();
    }
    let client = "02:00:00:00:00:c1".parse().unwrap();
    let flood = rig.client.enter(|| Flood::start(client, Rig::mac(), 30));
    let hop = rig.hop(&HopOptions::default()).unwrap();
    let sent = flood.end();
    let relay = hop.report.relay.clone().unwrap();
    println!(
        "shows {sent} frames sent at 336 Mbit/s, relayed {relay:?}, blackout {} us",
        hop.report.blackout_ns / 1000
    );
    assert!(relay.bytes <= MOST_BYTES && relay.bytes > MOST_BYTES - Flood::FRAME_BYTES as u64, "{relay:?}");
    assert!(relay.dropped_frames > 1000 && relay.error.is_empty(), "{relay:?}");
    assert!((2_000_000_000..3_000_000_000).contains(&relay.lasted_ns), "{relay:?}");
    for (bridge, port) in [(&rig.switch, "host-a"), (&rig.host(Side::A).netns, TAP)] {
        bridge.run(&format!("bridge fdb del {} dev {port} master", rig::MAC)).unwrap();
    }
    let pinger = rig.client.enter(|| Pinger::start(Rig::guest_ip(), EVERY)).unwrap();
    wait_for("answers from there", LIMIT, || (pinger.report().answered > 20).then_some(())).unwrap();
    assert_eq!(guest::errors(&rig.counters().unwrap()), Vec::<String>::new());
    assert!(rig.stop().unwrap().success());
}
