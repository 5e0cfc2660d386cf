//! Announcements on a real bridge: the switch relearns, neighbours are updated, and the frames and pace are QEMU's.
//!
//! Every wait is for an event of the kernel, with a deadline that only a failure reaches.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use dunlin::announce::{Announcer, Schedule, frames};
use dunlin::model::{MacAddress, Station};
use dunlin::net::fdb::{self, FdbKind, FdbWatch};
use dunlin::net::neighbour::NeighbourWatch;
use dunlin::net::pnet::PnetPort;
use dunlin::net::tap::{HEADER_BYTES, Tap};
use dunlin::net::{NetError, bridge};
use dunlin::port::FramePort;
use dunlin::service::clock::MonotonicClock;
use dunlin_tests::client::gap::monotonic_ns;
use dunlin_tests::tap::TestTap;
use dunlin_tests::topology::{BRIDGE, SWITCH, TAP, UPLINK};
use dunlin_tests::{Host, Lan, LanConfig, Netns, OwnProcess, dunlin as dunlin_command};
use rustix::process::Signal;

const LIMIT: Duration = Duration::from_secs(10);

fn mac(text: &str) -> MacAddress {
    text.parse().unwrap()
}

fn guest() -> Station {
    Station::new(mac("02:00:00:00:00:64"), Lan::GUEST_IPS.to_vec())
}

/// Opens the host's tap, as its VMM does, and waits until the bridge takes frames from it.
fn plug_in(host: &Host) -> TestTap {
    host.netns.enter(|| {
        let tap = TestTap::open(TAP).unwrap();
        bridge::wait_forwarding(TAP, LIMIT).unwrap();
        tap
    })
}

/// The tap as the machine holds it: each frame behind an empty virtio-net header.
struct MachineTap(Tap);

impl FramePort for MachineTap {
    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        let bytes = [&[0; HEADER_BYTES], frame].concat();
        let written = rustix::io::write(&self.0, &bytes)?;
        if written == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }
}

/// Sends one round; returns when it began (`CLOCK_MONOTONIC`).
fn announce_once(port: &mut dyn FramePort) -> Duration {
    let announcer = Announcer::new(&[guest()], Schedule::default()).unwrap();
    let began = Duration::from_nanos(monotonic_ns());
    let first = announcer.first_round(port, &MonotonicClock, &AtomicBool::new(false));
    assert_eq!((first.round.frames_failed, first.round.error), (0, None));
    began
}

/// The VM's frames come out of its tap, first at one host, then at the other: every switch on the way follows at once.
#[test]
fn switches_relearn_when_a_tap_announces() {
    let lan = Lan::new(LanConfig::default()).unwrap();
    let mut tap_a = plug_in(&lan.host_a);
    let mut tap_b = lan.host_b.netns.enter(|| {
        let tap = Tap::open(TAP).unwrap();
        bridge::wait_forwarding(TAP, LIMIT).unwrap();
        MachineTap(tap)
    });
    lan.switch.enter(|| {
        let mut switch = FdbWatch::open(SWITCH).unwrap();
        announce_once(&mut tap_a);
        switch.wait_behind(guest().mac, lan.host_a.switch_port, LIMIT).unwrap();

        let mut relearned_ns = Vec::new();
        for k in 0..20 {
            let (tap, host): (&mut dyn FramePort, _) =
                if k % 2 == 0 { (&mut tap_b, &lan.host_b) } else { (&mut tap_a, &lan.host_a) };
            let began = announce_once(tap);
            let learnt = switch.wait_behind(guest().mac, host.switch_port, LIMIT).unwrap();
            relearned_ns.push(learnt.seen_at.saturating_sub(began).as_nanos());
        }
        relearned_ns.sort_unstable();
        println!("relearned after {} µs (median), {} µs (worst)", relearned_ns[10] / 1000, relearned_ns[19] / 1000);
        let entries = switch.entries().unwrap();
        let entry: Vec<_> = entries.iter().filter(|entry| entry.mac == guest().mac).collect();
        assert_eq!(entry.len(), 1, "{entry:?}");
        assert_eq!((entry[0].kind, entry[0].vlan), (FdbKind::Learned, None));
        assert!(entries.iter().any(|entry| entry.kind == FdbKind::Local));
    });
    // The hosts' own bridges followed too: where the guest was last, it is behind the tap; elsewhere, behind the cable.
    let behind = |host: &Host| {
        host.netns.enter(|| fdb::entries(BRIDGE).unwrap().into_iter().find(|e| e.mac == guest().mac).unwrap().port)
    };
    assert_eq!((behind(&lan.host_a).as_str(), behind(&lan.host_b).as_str()), (TAP, UPLINK));
}

/// The same through pnet on the host's bridge, as for a VM that is not ours.
#[test]
fn switches_relearn_when_a_host_announces_on_its_bridge() {
    let lan = Lan::new(LanConfig::default()).unwrap();
    let open = |host: &Host| host.netns.enter(|| PnetPort::open(BRIDGE).unwrap());
    let (mut port_a, mut port_b) = (open(&lan.host_a), open(&lan.host_b));
    lan.switch.enter(|| {
        let mut switch = FdbWatch::open(SWITCH).unwrap();
        for (port, host) in [(&mut port_a, &lan.host_a), (&mut port_b, &lan.host_b)] {
            announce_once(port);
            switch.wait_behind(guest().mac, host.switch_port, LIMIT).unwrap();
        }
        assert!(switch.wait_behind(guest().mac, lan.host_b.switch_port, LIMIT).unwrap().already);

        // Nobody announces: the wait ends, and the error says where the station is.
        let error = switch.wait_behind(guest().mac, lan.host_a.switch_port, Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, NetError::TimedOut { .. }), "{error}");
        assert!(error.to_string().contains("`host-b` (Learned)"), "{error}");
        assert!(matches!(FdbWatch::open("lo"), Err(NetError::WrongKind { .. })));
    });
}

/// Changes come one by one, also when a port goes away under its entries.
#[test]
fn changes_of_the_table_are_told() {
    let lan = Lan::new(LanConfig::default()).unwrap();
    let mut port = lan.host_a.netns.enter(|| PnetPort::open(BRIDGE).unwrap());
    lan.switch.enter(|| {
        let mut switch = FdbWatch::open(SWITCH).unwrap();
        let mut next_of_guest = || loop {
            let change = switch.next_change(LIMIT).unwrap().expect("a change");
            if change.entry.mac == guest().mac {
                return (change.entry.port, change.removed);
            }
        };
        announce_once(&mut port);
        assert_eq!(next_of_guest(), ("host-a".to_owned(), false));
        lan.switch.ip("link set host-a nomaster").unwrap();
        assert_eq!(next_of_guest(), ("host-a".to_owned(), true));
    });
}

/// Neighbours that hold an old Ethernet address for the VM's IP addresses take the announced one.
#[test]
fn neighbours_take_the_announced_address() {
    let lan = Lan::new(LanConfig::default()).unwrap();
    let mut tap = plug_in(&lan.host_b);
    for ip in Lan::GUEST_IPS {
        lan.client.ip(&format!("neigh add {ip} lladdr 02:00:00:00:00:01 dev eth0 nud stale")).unwrap();
    }
    lan.client.enter(|| {
        let mut watch = NeighbourWatch::open().unwrap();
        for ip in Lan::GUEST_IPS {
            watch.wait_mac(ip, mac("02:00:00:00:00:01"), LIMIT).unwrap();
        }
        announce_once(&mut tap);
        for ip in Lan::GUEST_IPS {
            watch.wait_mac(ip, guest().mac, LIMIT).unwrap();
        }
        let nobody: IpAddr = "10.77.0.200".parse().unwrap();
        assert!(watch.wait_mac(nobody, guest().mac, Duration::from_millis(20)).is_err());
    });
    // Each ARP form is enough by itself: some stacks take only one of them.
    let [IpAddr::V4(v4), _] = Lan::GUEST_IPS else { unreachable!() };
    let forms: [fn(MacAddress, Ipv4Addr) -> frames::Frame; 2] =
        [frames::gratuitous_arp_request, frames::gratuitous_arp_reply];
    for (form, station) in forms.into_iter().zip(["02:00:00:00:00:05", "02:00:00:00:00:06"]) {
        lan.client.enter(|| {
            let mut watch = NeighbourWatch::open().unwrap();
            tap.send(form(mac(station), v4).bytes()).unwrap();
            watch.wait_mac(v4.into(), mac(station), LIMIT).unwrap();
        });
    }
}

/// `dunlin announce --interface TAP` sends on the tap's bridge and sets that bridge's own entry.
#[test]
fn the_command_finds_the_bridge_of_a_tap() {
    let lan = Lan::new(LanConfig::default()).unwrap();
    let (mut tap_a, _tap_b) = (plug_in(&lan.host_a), plug_in(&lan.host_b));
    // The guest was at host A: host B's bridge has it behind the cable.
    lan.host_b.netns.enter(|| {
        let mut watch = FdbWatch::open(BRIDGE).unwrap();
        announce_once(&mut tap_a);
        watch.wait_behind(guest().mac, UPLINK, LIMIT).unwrap();
    });

    let mac_text = guest().mac.to_string();
    let [v4, v6] = Lan::GUEST_IPS.map(|ip| ip.to_string());
    let mut command = dunlin_command();
    command.args(["announce", "--interface", TAP, "--mac", &mac_text, "--ip", &v4, "--ip", &v6, "--json"]).args([
        "--rounds",
        "3",
        "--initial",
        "1ms",
        "--step",
        "1ms",
        "--max",
        "1ms",
    ]);
    let output = lan.host_b.netns.output(&mut command).unwrap();
    assert!(output.status.success(), "{output:?}");
    lan.switch.enter(|| {
        FdbWatch::open(SWITCH).unwrap().wait_behind(guest().mac, lan.host_b.switch_port, LIMIT).unwrap();
    });
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 4, "three rounds and a report: {text}");
    assert!(lines[..3].iter().all(|line| line["schema"] == "dunlin.announce-round/v1" && line["frames_sent"] == 4));
    assert_eq!(lines[3]["schema"], "dunlin.announce/v1");
    assert_eq!((lines[3]["sent_on"].as_str(), lines[3]["frames_sent"].as_u64()), (Some(BRIDGE), Some(12)));
    let entry = lan.host_b.netns.enter(|| fdb::entries(BRIDGE).unwrap().into_iter().find(|e| e.mac == guest().mac));
    let entry = entry.unwrap();
    assert_eq!((entry.port.as_str(), entry.kind), (TAP, FdbKind::Learned));
}

/// Several stations, with tags and a router: each frame comes out of the bridge as it was built.
#[test]
fn the_command_announces_stations_with_their_tags() {
    let netns = Netns::new("tags").unwrap();
    netns.ip_batch(&["link add br0 type bridge mcast_snooping 0", "link set br0 addrgenmode none up"]).unwrap();
    let tap = netns.enter(|| TestTap::open(TAP).unwrap());
    netns.ip_batch(&[format!("link set {TAP} addrgenmode none"), format!("link set {TAP} master br0 up")]).unwrap();
    netns.enter(|| bridge::wait_forwarding(TAP, LIMIT).unwrap());
    let specs = [
        "mac=02:00:00:00:00:01,ip=10.0.0.1,router=fd00::1,vlan=100.42",
        "mac=02:00:00:00:00:02,ip=10.0.0.2",
        "mac=02:00:00:00:00:03,ip=10.0.0.3,ip=fd00::3,vlan=42",
    ];
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("stations");
    std::fs::write(&file, format!("# the third\n\n{}\n", specs[2])).unwrap();
    let mut command = dunlin_command();
    command.args(["announce", "--interface", "br0", "--rounds", "1", "--json"]);
    command.args(["--mac", "02:00:00:00:00:01", "--ip", "10.0.0.1", "--router", "fd00::1", "--vlan", "100.42"]);
    command.args(["--station", specs[1], "--stations"]).arg(&file);
    let output = netns.output(&mut command).unwrap();
    assert!(output.status.success(), "{output:?}");
    let report: serde_json::Value =
        serde_json::from_str(String::from_utf8(output.stdout).unwrap().lines().last().unwrap()).unwrap();
    assert_eq!((report["frames_sent"].as_u64(), report["stations"].as_array().unwrap().len()), (Some(11), 3));
    assert_eq!(report["stations"][0]["vlan"], "100.42");
    for spec in specs {
        for frame in frames::of_station(&spec.parse().unwrap()).unwrap() {
            // The host itself may report its groups (MLD) meanwhile.
            let heard = loop {
                let heard = tap.receive(LIMIT).unwrap().expect("a frame");
                if heard[6..11] == frame.bytes()[6..11] {
                    break heard;
                }
            };
            assert_eq!(heard, frame.bytes(), "{spec}: {}", frame.kind());
        }
    }

    std::fs::write(&file, "mac=02:00:00:00:00:01\nmac=nonsense\n").unwrap();
    let mut command = dunlin_command();
    command.args(["announce", "--interface", "br0", "--stations"]).arg(&file);
    let output = netns.output(&mut command).unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), error.contains("line 2")), (Some(2), true), "{error}");
}

/// A thousand network cards: every one is learnt.
#[test]
fn a_thousand_stations_are_relearned() {
    let lan = Lan::new(LanConfig::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("stations");
    let station =
        |k: usize| format!("mac=02:00:00:01:{:02x}:{:02x},ip=10.9.{}.{}\n", k >> 8, k & 0xff, k >> 8, k & 0xff);
    std::fs::write(&file, (0..1000).map(station).collect::<String>()).unwrap();
    let mut command = dunlin_command();
    command
        .args(["announce", "--interface", BRIDGE, "--rounds", "2", "--initial", "1ms", "--json", "--stations"])
        .arg(&file);
    let output = lan.host_b.netns.output(&mut command).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let behind_b = lan.switch.enter(|| {
        let mut watch = FdbWatch::open(SWITCH).unwrap();
        watch.wait_behind(mac("02:00:00:01:03:e7"), lan.host_b.switch_port, LIMIT).unwrap();
        watch.entries().unwrap().iter().filter(|entry| entry.port == lan.host_b.switch_port).count()
    });
    assert!(behind_b >= 1000, "{behind_b} of 1000 stations were learnt");
}

/// Several announcers of one host share its limit, whatever processes they are.
#[test]
fn announcers_of_one_host_share_its_limit() {
    let netns = Netns::new("pace").unwrap();
    netns.ip_batch(&["link add v0 type veth peer name v1", "link set v0 up", "link set v1 up"]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("stations");
    let stations: Vec<String> = (0..20).map(|k| format!("mac=02:00:00:01:00:{k:02x}")).collect();
    std::fs::write(&file, stations.join("\n")).unwrap();
    let began = Instant::now();
    let announcers: Vec<OwnProcess> = (0..3)
        .map(|_| {
            let mut command = dunlin_command();
            command.args([
                "announce",
                "--interface",
                "v0",
                "--rounds",
                "2",
                "--initial",
                "1ms",
                "--frames-per-second",
                "100",
            ]);
            command.arg("--run-dir").arg(folder.path()).arg("--stations").arg(&file).stdout(Stdio::null());
            netns.spawn(&mut command).unwrap()
        })
        .collect();
    for mut announcer in announcers {
        assert_eq!(announcer.wait_for(LIMIT).unwrap().unwrap().code(), Some(0));
    }
    // 120 frames at 100 a second, of which a burst of 16 costs no time, nor does the last one.
    let took = began.elapsed();
    assert!(took > Duration::from_millis(1000), "120 frames at 100 a second took {took:?}");
}

/// What cannot work is refused, by name, before a frame leaves.
#[test]
fn the_command_refuses_and_says_why() {
    let netns = Netns::new("refuse").unwrap();
    netns
        .ip_batch(&[
            "link add down0 type bridge",
            "link add br0 type bridge",
            "link set br0 up",
            "tuntap add lone0 mode tap",
            "link set lone0 up",
            "tuntap add dead0 mode tap",
            "link set dead0 master br0 up",
        ])
        .unwrap();
    let mac_text = guest().mac.to_string();
    for (interface, more, code, words) in [
        ("nonesuch0", vec![], 3, "no interface `nonesuch0`"),
        ("down0", vec![], 3, "`down0` is down"),
        ("lone0", vec![], 3, "tap under no bridge"),
        ("dead0", vec![], 3, "bridge `br0` takes no frames from tap `dead0`"),
        ("lo", vec!["--ip", "224.0.0.1"], 3, "cannot be announced"),
        ("lo", vec!["--rounds", "0"], 2, "rounds"),
        ("lo", vec!["--initial", "5"], 2, "duration"),
        ("lo", vec!["--ip", "nonsense"], 2, "nonsense"),
    ] {
        let mut command = dunlin_command();
        command.args(["announce", "--interface", interface, "--mac", &mac_text]).args(more);
        let output = netns.output(&mut command).unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{interface}: {error}");
        assert!(error.contains(words), "{interface}: `{error}` should say `{words}`");
        assert!(output.stdout.is_empty());
    }
}

/// Without the capability the refusal names it.
#[test]
fn the_command_without_permission_names_the_capability() {
    let netns = Netns::new("rights").unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-net_raw", "--inh-caps=-net_raw"]).arg(dunlin_command().get_program());
    command.args(["announce", "--interface", "lo", "--mac", &guest().mac.to_string()]);
    let output = netns.output(&mut command).unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{error}");
    assert!(error.contains("CAP_NET_RAW"), "{error}");
}

/// Ctrl-C ends a long schedule at once, with the exit code for it; a vanished interface is counted, not fatal.
#[test]
fn the_command_is_cancelled_by_ctrl_c_and_outlives_its_interface() {
    let netns = Netns::new("cancel").unwrap();
    netns.ip_batch(&["link add v0 type veth peer name v1", "link set v0 up", "link set v1 up"]).unwrap();
    let start = |gap: &str| {
        let mut command = dunlin_command();
        command
            .args(["announce", "--interface", "v0", "--mac", &guest().mac.to_string(), "--rounds", "2", "--json"])
            .args(["--initial", gap, "--max", gap])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut process = netns.spawn(&mut command).unwrap();
        // The first line says that the first round is out.
        let mut reader = BufReader::new(process.child_mut().stdout.take().unwrap());
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert!(line.contains(r#""frames_sent":1"#), "{line}");
        (process, reader)
    };

    let (mut process, _open) = start("100s");
    process.signal(Signal::INT).unwrap();
    assert_eq!(process.wait_for(LIMIT).unwrap().unwrap().code(), Some(6));

    let (mut process, mut rest) = start("300ms");
    netns.ip("link del v0").unwrap();
    assert_eq!(process.wait_for(LIMIT).unwrap().unwrap().code(), Some(1));
    let mut text = String::new();
    rest.read_to_string(&mut text).unwrap();
    assert!(text.contains(r#""frames_failed":1"#) && text.contains("v0"), "{text}");
}

/// The repetition keeps its times on a real clock.
#[test]
fn the_schedule_holds_on_a_real_clock() {
    let netns = Netns::new("clock").unwrap();
    let mut port = netns.enter(|| PnetPort::open("lo").unwrap());
    let announcer = Announcer::new(&[guest()], Schedule::default()).unwrap();
    let clock = MonotonicClock;
    let never = AtomicBool::new(false);
    let first = announcer.first_round(&mut port, &clock, &never);
    let mut times_ms = Vec::new();
    announcer.repeat(&first, &mut port, &clock, &never, &mut |r| times_ms.push(r.after_first_ns / 1_000_000));
    assert_eq!(times_ms.len(), 4);
    for (time_ms, due_ms) in times_ms.iter().zip([50, 200, 450, 800]) {
        // Never early; late only as far as a busy machine makes it.
        assert!((due_ms..due_ms + 250).contains(time_ms), "{times_ms:?}");
    }
}

/// QEMU's own `announce-self`, where QEMU is installed: the same RARP frame byte for byte, the same count and pace.
/// Its network card is joined to a UDP socket on loopback, so every frame arrives here as one datagram. The machine has to
/// run, if only its firmware: QEMU sends nothing for a stopped one.
#[test]
fn rarp_and_pace_are_those_of_qemu() {
    let here = UdpSocket::bind("127.0.0.1:0").unwrap();
    here.set_read_timeout(Some(LIMIT)).unwrap();
    let its_port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let netdev = format!("socket,id=n0,udp={},localaddr={its_port}", here.local_addr().unwrap());
    let station = mac("52:54:00:12:34:56");
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-machine", "microvm", "-accel", "tcg", "-m", "16", "-nodefaults", "-display", "none"])
        .args(["-netdev", &netdev, "-device", &format!("virtio-net-device,netdev=n0,mac={station}")])
        .args(["-qmp", "stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null());
    let Ok(child) = command.spawn() else {
        eprintln!("qemu-system-x86_64 is not installed: nothing compared");
        return;
    };
    let mut qemu = OwnProcess::new(child);
    let mut qmp = qemu.child_mut().stdin.take().unwrap();
    writeln!(qmp, r#"{{"execute":"qmp_capabilities"}}"#).unwrap();
    let arguments = r#"{"initial":50,"max":550,"rounds":5,"step":100}"#;
    writeln!(qmp, r#"{{"execute":"announce-self","arguments":{arguments}}}"#).unwrap();
    let mut times = Vec::new();
    let mut datagram = [0; 2048];
    while times.len() < 5 {
        // With a time limit on the socket the kernel does not restart the call after a signal.
        let length = match here.recv(&mut datagram) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result.expect("a frame of QEMU's"),
        };
        times.push(Instant::now());
        assert_eq!(&datagram[..length], frames::rarp(station).bytes(), "frame {}", times.len());
    }
    for (k, due) in Schedule::default().instants().enumerate() {
        let after = times[k] - times[0];
        assert!(after.abs_diff(due) < Duration::from_millis(250), "QEMU's round {k} came after {after:?}, not {due:?}");
    }
    println!("QEMU announced after {:?}", times.iter().map(|t| *t - times[0]).collect::<Vec<_>>());
    // A sixth round would come 450 ms after the fifth.
    here.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
    assert!(here.recv(&mut datagram).is_err(), "QEMU sent a sixth frame");
}
