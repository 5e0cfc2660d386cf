//! Whether the network follows: what is found out about a VM, what bridges relearn and why they do not, who else has the addresses.
//!
//! Every cause is made with the kernel's own means in a namespace of the test.

use std::fs::{self, File};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use dunlin::announce::frames::{self, RouterFlag};
use dunlin::announce::heard;
use dunlin::model::{MacAddress, Station};
use dunlin::net::bridge;
use dunlin::net::fdb::{self, FdbWatch};
use dunlin::net::listen::Listener;
use dunlin::port::FramePort;
use dunlin_tests::client::gap::monotonic_ns;
use dunlin_tests::hosted::{self, TestHost};
use dunlin_tests::monitor::Monitor;
use dunlin_tests::tap::TestTap;
use dunlin_tests::topology::{BRIDGE, SWITCH, TAP};
use dunlin_tests::wait::wait_for;
use dunlin_tests::{Lan, LanConfig, Netns, OwnProcess, dunlin as dunlin_command};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(10);
const VM: &str = "02:00:00:00:00:64";

fn mac(text: &str) -> MacAddress {
    text.parse().unwrap()
}

/// The JSON lines of a command, by schema.
struct Lines(Vec<Value>);

impl Lines {
    fn of(output: &Output) -> Self {
        let text = String::from_utf8_lossy(&output.stdout);
        Self(text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
    }

    fn all(&self, kind: &str) -> Vec<&Value> {
        let schema = format!("dunlin.announce{kind}/v1");
        self.0.iter().filter(|line| line["schema"] == schema).collect()
    }

    fn one(&self, kind: &str) -> &Value {
        let all = self.all(kind);
        assert_eq!(all.len(), 1, "{kind}: {:?}", self.0);
        all[0]
    }
}

/// A switch with two cables, whose other ends are free: the VM was behind `old` and is announced through `new-up`.
///
/// ```text
///   old-up ══ old ─ sw0 ─ new ══ new-up
/// ```
fn switch() -> Netns {
    let netns = Netns::new("follow").unwrap();
    let mut lines = vec![
        "link add sw0 type bridge stp_state 0 forward_delay 0".to_owned(),
        "link set sw0 addrgenmode none up".to_owned(),
    ];
    for cable in ["old", "new"] {
        lines.push(format!("link add {cable} type veth peer name {cable}-up"));
        lines.push(format!("link set {cable} master sw0 addrgenmode none up"));
        lines.push(format!("link set {cable}-up addrgenmode none up"));
    }
    netns.ip_batch(&lines).unwrap();
    netns.enter(|| ["old", "new"].iter().for_each(|port| bridge::wait_forwarding(port, LIMIT).unwrap()));
    netns.run(&format!("bridge fdb replace {VM} dev old master dynamic")).unwrap();
    netns
}

fn announce(netns: &Netns, more: &[&str]) -> Output {
    let mut command = dunlin_command();
    command.args(["announce", "--mac", VM, "--json", "--rounds", "2", "--initial", "1ms"]).args(more);
    netns.output(&mut command).unwrap()
}

#[test]
fn a_bridge_that_relearns_is_seen_to() {
    let netns = switch();
    let output = announce(&netns, &["--interface", "new-up", "--watch", "sw0=new", "--watch", "sw0"]);
    let lines = Lines::of(&output);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let seen = lines.all("-seen");
    assert!(seen.iter().any(|seen| seen["bridge"] == "sw0" && seen["port"] == "new" && seen["mac"] == VM), "{seen:?}");
    for followed in lines.all("-followed") {
        assert_eq!(
            (&followed["verdict"], &followed["port"], &followed["moves"]),
            (&json!("relearned"), &json!("new"), &json!(1))
        );
        assert!(followed["after_first_ns"].as_u64().unwrap() < 5_000_000_000 && followed["causes"] == json!([]));
    }
    // Once more: it is there already, and nothing moves.
    let output = announce(&netns, &["--interface", "new-up", "--watch", "sw0=new"]);
    let lines = Lines::of(&output);
    assert_eq!((output.status.code(), &lines.one("-followed")["verdict"]), (Some(0), &json!("was-there")));
    // Somebody else announces, and this one only watches.
    let output = announce(&netns, &["--watch", "sw0=old", "--within", "50ms"]);
    let followed = &Lines::of(&output).0[0];
    assert_eq!(
        (output.status.code(), &followed["verdict"], &followed["port"]),
        (Some(1), &json!("not-relearned"), &json!("new"))
    );
}

/// Each cause by itself, as the kernel makes it.
#[test]
fn a_bridge_that_does_not_relearn_is_diagnosed() {
    let cases: &[(&str, &[&str])] = &[
        ("learning-off", &["bridge link set dev new learning off"]),
        ("port-locked", &["bridge link set dev new locked on"]),
        ("not-forwarding", &["bridge link set dev new state 1"]),
        ("port-down", &["ip link set new down"]),
        ("sticky-entry", &["bridge fdb del VM dev old master", "bridge fdb add VM dev old master static sticky"]),
        ("own-address", &["bridge fdb del VM dev old master", "ip link set old address VM"]),
        ("no-such-port", &["ip link set new nomaster"]),
    ];
    for (cause, commands) in cases {
        let netns = switch();
        commands.iter().for_each(|command| drop(netns.run(&command.replace("VM", VM)).unwrap()));
        let output = announce(&netns, &["--interface", "new-up", "--watch", "sw0=new", "--within", "100ms"]);
        let lines = Lines::of(&output);
        let followed = lines.one("-followed");
        assert_eq!(
            (output.status.code(), &followed["verdict"]),
            (Some(1), &json!("not-relearned")),
            "{cause}: {followed}"
        );
        let causes: Vec<&str> =
            followed["causes"].as_array().unwrap().iter().map(|one| one["cause"].as_str().unwrap()).collect();
        assert!(causes.contains(cause), "{cause}: {followed}");
        assert!(!followed["causes"][0]["remedy"].as_str().unwrap().is_empty());
        println!("{cause}: {causes:?}, {}", followed["causes"][0]["sentence"]);
    }
    // Nothing forbids it, and nobody announced there.
    let netns = switch();
    let output = announce(&netns, &["--interface", "old-up", "--watch", "sw0=new", "--within", "100ms"]);
    let lines = Lines::of(&output);
    let followed = lines.one("-followed");
    assert_eq!((&followed["causes"][0]["cause"], &followed["port"]), (&json!("silence"), &json!("old")), "{followed}");
    let mut command = dunlin_command();
    command.args(["announce", "--interface", "old-up", "--mac", VM, "--watch", "sw0=new", "--within", "100ms"]);
    let output = netns.output(&mut command).unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        error.contains("sw0 has 02:00:00:00:00:64 behind old, not behind new") && error.contains("nothing forbids it"),
        "{error}"
    );
}

/// Entries that Linux moves in spite of their kind are no cause: the bridge has relearned.
#[test]
fn entries_that_move_all_the_same_are_no_cause() {
    for kind in ["static", "extern_learn", "dynamic"] {
        let netns = switch();
        netns.run(&format!("bridge fdb replace {VM} dev old master {kind}")).unwrap();
        let output = announce(&netns, &["--interface", "new-up", "--watch", "sw0=new", "--within", "200ms"]);
        let lines = Lines::of(&output);
        let followed = lines.one("-followed");
        println!("{kind}: {followed}");
        assert_eq!((output.status.code(), &followed["verdict"]), (Some(0), &json!("relearned")), "{kind}: {followed}");
    }
}

/// The bridge goes away under the watch: said, and no hang.
#[test]
fn a_bridge_that_goes_away_is_said() {
    use std::io::{BufRead, BufReader, Read};
    let netns = switch();
    let mut command = dunlin_command();
    command.args(["announce", "--mac", VM, "--json", "--rounds", "2", "--initial", "300ms", "--interface", "new-up"]);
    command.args(["--watch", "sw0=new", "--within", "500ms"]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut process = netns.spawn(&mut command).unwrap();
    let mut reader = BufReader::new(process.child_mut().stdout.take().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    netns.ip("link del sw0").unwrap();
    assert_eq!(process.wait_for(LIMIT).unwrap().unwrap().code(), Some(1));
    let mut rest = String::new();
    reader.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("no-such-port"), "{rest}");
}

/// The neighbour tables of the namespace are followed, too.
#[test]
fn neighbours_that_relearn_are_seen_to() {
    let lan = Lan::new(LanConfig::default()).unwrap();
    let [v4, v6] = Lan::GUEST_IPS;
    let host = &lan.host_b.netns;
    host.ip(&format!("neigh add {v4} lladdr 02:00:00:00:00:01 dev {BRIDGE} nud stale")).unwrap();
    let (v4_text, v6_text) = (v4.to_string(), v6.to_string());
    // The client announces: what host B sends itself it does not hear.
    let watcher = {
        let mut command = dunlin_command();
        command.args([
            "announce", "--mac", VM, "--ip", &v4_text, "--ip", &v6_text, "--json", "--watch", BRIDGE, "--within", "5s",
        ]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        host.spawn(&mut command).unwrap()
    };
    let mut watcher = watcher;
    // It is not told when the watch has begun: so the announcements go on until it ends.
    while watcher.wait_for(Duration::from_millis(50)).unwrap().is_none() {
        let station: Station = Station::new(mac(VM), vec![v4, v6]);
        let frames = frames::of_station(&station).unwrap();
        lan.client.enter(|| {
            let mut port = dunlin::net::pnet::PnetPort::open("eth0").unwrap();
            for frame in &frames {
                port.send(frame.bytes()).unwrap();
            }
        });
    }
    let mut text = String::new();
    std::io::Read::read_to_string(&mut watcher.child_mut().stdout.take().unwrap(), &mut text).unwrap();
    assert!(text.contains(&format!(r#""bridge":"{BRIDGE}""#)) && text.contains(r#""verdict":"relearned""#), "{text}");
    assert!(text.contains(&format!(r#""ip":"{v4_text}""#)), "{text}");
}

/// Somebody else has the address: found by asking, before a switch has heard of the VM.
#[test]
fn an_address_that_another_has_is_found() {
    let lan = Lan::new(LanConfig::default()).unwrap();
    let host = &lan.host_b.netns;
    let [v4, v6] = Lan::CLIENT_IPS.map(|ip| ip.to_string());
    let client = lan.client.enter(|| bridge::link("eth0").unwrap().mac.unwrap()).to_string();
    let probe = |more: &[&str]| {
        let mut command = dunlin_command();
        command.args(["announce", "--interface", BRIDGE, "--json", "--rounds", "1", "--probe-for", "1s"]).args(more);
        host.output(&mut command).unwrap()
    };
    let output = probe(&["--mac", VM, "--ip", &v4, "--ip", &v6, "--ip", "10.77.0.200", "--probe"]);
    let lines = Lines::of(&output);
    let report = lines.one("-probe");
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let conflicts = report["conflicts"].as_array().unwrap();
    let found: Vec<_> =
        conflicts.iter().map(|one| (one["kind"].as_str().unwrap(), one["ip"].as_str().unwrap())).collect();
    assert_eq!(found.len(), 2, "{report}");
    assert!(found.contains(&("address", v4.as_str())) && found.contains(&("address", v6.as_str())), "{report}");
    assert!(conflicts.iter().all(|conflict| conflict["mac"] == client), "{report}");
    assert_eq!((&report["addresses"], &report["questions_sent"]), (&json!(3), &json!(9)));

    // Refused: nothing was announced. Warned: it was.
    let vm_at_switch = || lan.switch.enter(|| fdb::entries(SWITCH).unwrap().iter().any(|entry| entry.mac == mac(VM)));
    let output = probe(&["--mac", VM, "--ip", &v4, "--on-conflict", "refuse"]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), error.contains("another station has that address")), (Some(3), true), "{error}");
    assert!(!vm_at_switch(), "the switch has heard of the VM");
    let output = probe(&["--mac", VM, "--ip", "10.77.0.200", "--on-conflict", "refuse"]);
    assert_eq!((output.status.code(), Lines::of(&output).one("-probe")["conflicts"].clone()), (Some(0), json!([])));
    lan.switch.enter(|| FdbWatch::open(SWITCH).unwrap().wait_behind(mac(VM), lan.host_b.switch_port, LIMIT).unwrap());
    let output = probe(&["--mac", VM, "--ip", &v4, "--on-conflict", "warn"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");

    // The VM itself is no other.
    let output = probe(&["--mac", &client, "--ip", &v4, "--ip", &v6, "--probe"]);
    let lines = Lines::of(&output);
    let report = lines.one("-probe");
    assert_eq!((output.status.code(), report["own_answers"].as_array().unwrap().len()), (Some(0), 2), "{report}");
    // The bridge's own Ethernet address.
    let own = host.enter(|| bridge::link(BRIDGE).unwrap().mac.unwrap()).to_string();
    let output = probe(&["--mac", &own, "--probe"]);
    assert_eq!(
        (output.status.code(), &Lines::of(&output).one("-probe")["conflicts"][0]["kind"]),
        (Some(3), &json!("mac"))
    );
}

/// Another VM of this host has the Ethernet address.
#[test]
fn an_ethernet_address_that_another_vm_has_is_found() {
    let netns = Netns::new("twin").unwrap();
    netns.ip_batch(&["link add br0 type bridge forward_delay 0", "link set br0 addrgenmode none up"]).unwrap();
    let mut taps = ["tap0", "tap1"].map(|name| {
        let tap = netns.enter(|| TestTap::open(name).unwrap());
        netns.ip(&format!("link set {name} master br0 addrgenmode none up")).unwrap();
        netns.enter(|| bridge::wait_forwarding(name, LIMIT).unwrap());
        tap
    });
    taps[1].send(frames::rarp(mac(VM)).bytes()).unwrap();
    netns.enter(|| FdbWatch::open("br0").unwrap().wait_behind(mac(VM), "tap1", LIMIT).unwrap());
    let output = announce(&netns, &["--interface", "tap0", "--probe", "--probe-for", "100ms"]);
    let lines = Lines::of(&output);
    let conflict = &lines.one("-probe")["conflicts"][0];
    assert_eq!(
        (output.status.code(), &conflict["kind"], &conflict["ports"]),
        (Some(3), &json!("mac"), &json!(["tap1"]))
    );
    let output = announce(&netns, &["--interface", "tap1", "--probe", "--probe-for", "100ms"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn asking_without_permission_names_the_capability() {
    let netns = Netns::new("asking").unwrap();
    netns.ip_batch(&["link add v0 type veth peer name v1", "link set v0 up", "link set v1 up"]).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-net_raw", "--inh-caps=-net_raw"]).arg(dunlin_command().get_program());
    command.args(["announce", "--interface", "v0", "--mac", VM, "--ip", "10.0.0.7", "--probe"]);
    let output = netns.output(&mut command).unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), error.contains("CAP_NET_RAW")), (Some(3), true), "{error}");
}

/// A KVM machine, which makes a VM of this process as far as others can see.
fn be_a_vm() -> OwnedFd {
    const KVM_CREATE_VM: libc::c_ulong = 0xae01;
    let kvm = File::open("/dev/kvm").unwrap();
    // SAFETY: the argument is a number; the kernel makes a descriptor.
    let fd = unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, 0) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the kernel has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A VM of another VMM (this process), of which nothing is known but its process: its tap is found among its descriptors, the rest is what it says.
#[test]
fn a_vms_addresses_are_learnt_from_its_traffic() {
    let lan = Lan::new(LanConfig::default()).unwrap();
    let host = &lan.host_b;
    let mut tap = host.netns.enter(|| TestTap::open(TAP).unwrap());
    host.netns.enter(|| bridge::wait_forwarding(TAP, LIMIT).unwrap());
    let _vm = be_a_vm();
    let (v4, v6): (Ipv4Addr, Ipv6Addr) = ("10.77.0.100".parse().unwrap(), "fe80::64".parse().unwrap());
    host.netns.ip(&format!("neigh add 10.77.0.101 lladdr {VM} dev {BRIDGE} nud stale")).unwrap();
    let state = tempfile::tempdir().unwrap();
    let mut command = dunlin_command();
    command.args(["announce", &format!("pid:{}", std::process::id()), "--listen", "1s", "--json", "--rounds", "1"]);
    command.args(["--watch", &format!("{BRIDGE}={TAP}"), "--state-dir"]).arg(state.path());
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut announcer = host.netns.spawn(&mut command).unwrap();
    // Frames of the VM, for as long as it is listened to. One is of another station behind it.
    let own = [frames::gratuitous_arp_request(mac(VM), v4), frames::unsolicited_na(mac(VM), v6, RouterFlag::Router)];
    while announcer.wait_for(Duration::from_millis(50)).unwrap().is_none() {
        for frame in &own {
            tap.send(frame.bytes()).unwrap();
        }
    }
    let mut text = String::new();
    std::io::Read::read_to_string(&mut announcer.child_mut().stdout.take().unwrap(), &mut text).unwrap();
    let lines = Lines(text.lines().map(|line| serde_json::from_str(line).unwrap()).collect());
    let found = lines.one("-found");
    let card = &found["cards"][0];
    assert_eq!((&card["tap"], &card["mac"]), (&json!(TAP), &json!(VM)), "{found}");
    let ips = card["ips"].as_array().unwrap();
    let from = |ip: &str| ips.iter().find(|found| found["ip"] == ip).map(|found| found["from"].clone());
    assert_eq!(from("10.77.0.100"), Some(json!("traffic")), "{found}");
    assert_eq!(from("10.77.0.101"), Some(json!("neighbour-table")), "{found}");
    assert_eq!(ips.iter().find(|found| found["ip"] == "fe80::64").unwrap()["router"], true, "{found}");
    let report = lines.one("");
    assert_eq!((&report["sent_on"], &report["interface"]), (&json!(BRIDGE), &json!(TAP)));
    assert_eq!(report["stations"][0]["routers"], json!(["fe80::64"]), "{report}");
    // RARP, two ARP for each IPv4 address, one advertisement.
    assert_eq!(report["frames_sent"], 6, "{report}");
    lan.switch.enter(|| FdbWatch::open(SWITCH).unwrap().wait_behind(mac(VM), host.switch_port, LIMIT).unwrap());
    let audit = fs::read_to_string(state.path().join("audit.log")).unwrap();
    assert!(audit.contains(r#""what":"announce""#), "{audit}");
}

/// The kernel takes the outer tag out of what it hands over: it is put back.
#[test]
fn tags_are_heard_as_they_were_sent() {
    let netns = Netns::new("heard").unwrap();
    let mut tap = netns.enter(|| TestTap::open(TAP).unwrap());
    netns.ip(&format!("link set {TAP} addrgenmode none up")).unwrap();
    let mut listener = netns.enter(|| Listener::open(TAP).unwrap());
    let deadline = Duration::from_nanos(monotonic_ns()) + LIMIT;
    for tags in [None, Some("42"), Some("100.42")] {
        let sent = frames::rarp(mac(VM)).tagged(tags.map(|tags| tags.parse().unwrap()));
        tap.send(sent.bytes()).unwrap();
        let passing = loop {
            let passing = listener.next(deadline).unwrap().expect("a frame");
            if !passing.outgoing {
                break passing.frame.to_vec();
            }
        };
        assert_eq!(passing, sent.bytes(), "{tags:?}");
        assert_eq!(heard::read(&passing).unwrap().vlan, tags.map(|tags| tags.parse().unwrap()));
    }
}

/// A VM that dunlin runs is known by its configuration; when it has been moved, the receiver says that its bridge has not relearned it, and why.
#[test]
fn a_receiver_says_that_its_bridge_has_not_relearned() {
    let netns = Netns::new("arrive").unwrap();
    netns.ip_batch(&["link add br0 type bridge forward_delay 0", "link set br0 addrgenmode none up"]).unwrap();
    for tap in ["tap0", "tap1"] {
        netns
            .ip_batch(&[format!("tuntap add {tap} mode tap"), format!("link set {tap} master br0 addrgenmode none up")])
            .unwrap();
    }
    netns.run("bridge link set dev tap1 learning off").unwrap();
    let (source, target) = (TestHost::new().unwrap(), TestHost::new().unwrap());
    netns.enter(|| {
        let net = |tap: &str| format!("tap={tap},mac={VM},ip=10.0.0.7");
        let _vm = source.boot(&["--net", &net("tap0")]).unwrap();
        bridge::wait_forwarding("tap0", LIMIT).unwrap();
        let mut command = dunlin_command();
        command.args(["announce", hosted::VM, "--listen", "0s", "--rounds", "1", "--watch", "br0=tap0", "--json"]);
        command.arg("--run-dir").arg(source.run_dir()).arg("--state-dir").arg(source.state_dir());
        let output = command.output().unwrap();
        let lines = Lines::of(&output);
        let card = &lines.one("-found")["cards"][0];
        assert_eq!(
            (&card["from"], &card["ips"][0]["from"]),
            (&json!("configuration"), &json!("configuration")),
            "{card}"
        );
        assert_eq!((output.status.code(), lines.one("")["frames_sent"].as_u64()), (Some(0), Some(3)));

        let receiver = target.receive(&["--net", &net("tap1")]).unwrap();
        let mut migration = source.migrate(&receiver.address, &["--strategy", "stop-and-copy"]).unwrap();
        assert_eq!(migration.exit_code(LIMIT * 3).unwrap(), Some(0), "{}", migration.output.text());
        wait_for("the receiver's warning", LIMIT, || {
            receiver.running.output.text().contains("the port does not learn addresses").then_some(())
        })
        .unwrap();
    });
}

/// A thousand stations are all followed.
#[test]
fn a_thousand_stations_are_followed() {
    let netns = switch();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("stations");
    let stations: Vec<String> = (0..1000).map(|k| format!("mac=02:00:00:01:{:02x}:{:02x}", k >> 8, k & 0xff)).collect();
    fs::write(&file, stations.join("\n")).unwrap();
    let file = file.to_string_lossy();
    let output = announce(&netns, &["--interface", "new-up", "--watch", "sw0=new", "--stations", &file]);
    let lines = Lines::of(&output);
    let followed = lines.all("-followed");
    let relearned = followed.iter().filter(|one| one["verdict"] == "relearned").count();
    assert_eq!((output.status.code(), followed.len(), relearned), (Some(0), 1001, 1001));
}

/// QEMU's cards are known by its command line and by its monitor; from another namespace it is refused.
#[test]
fn qemus_cards_are_found() {
    let lan = Lan::new(LanConfig::default()).unwrap();
    let host = &lan.host_b;
    let folder = tempfile::tempdir().unwrap();
    let (socket, errors) = (folder.path().join("qmp"), folder.path().join("errors"));
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-machine", "microvm", "-accel", "tcg", "-m", "16", "-nodefaults", "-display", "none"])
        .args(["-netdev", &format!("tap,id=n0,ifname={TAP},script=no,downscript=no")])
        .args(["-device", &format!("virtio-net-device,netdev=n0,mac={VM}")])
        .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&errors).unwrap());
    let Ok(qemu) = host.netns.spawn(&mut command) else {
        eprintln!("qemu-system-x86_64 is not installed: nothing tried");
        return;
    };
    let qemu: OwnProcess = qemu;
    // Its monitor answers when its tap is open.
    let mut monitor = Monitor::connect(&socket, errors).unwrap();
    host.netns.enter(|| {
        bridge::wait_forwarding(TAP, LIMIT).unwrap();
        // What it announces itself comes out of the tap, byte for byte as ours.
        let mut listener = Listener::open(TAP).unwrap();
        monitor.order("announce-self", json!({ "initial": 50, "max": 550, "rounds": 1, "step": 100 })).unwrap();
        let deadline = Duration::from_nanos(monotonic_ns()) + LIMIT;
        loop {
            let passing = listener.next(deadline).unwrap().expect("a frame of QEMU's");
            if !passing.outgoing {
                assert_eq!(passing.frame, frames::rarp(mac(VM)).bytes());
                break;
            }
        }
    });
    // It serves one client at a time.
    drop(monitor);
    let vm = format!("pid:{}", qemu.id());
    let state = tempfile::tempdir().unwrap();
    let announce = |netns: &Netns, more: &[&str]| {
        let mut command = dunlin_command();
        command.args(["announce", &vm, "--json", "--rounds", "1", "--listen", "0s", "--state-dir"]).arg(state.path());
        netns.output(command.args(more)).unwrap()
    };
    let monitor = socket.to_string_lossy().into_owned();
    for (more, from) in
        [(vec!["--ip", "10.77.0.100"], "command-line"), (vec!["--qmp", &monitor, "--vlan", "42"], "monitor")]
    {
        let output = announce(&host.netns, &more);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let lines = Lines::of(&output);
        let card = &lines.one("-found")["cards"][0];
        assert_eq!((&card["tap"], &card["mac"], &card["from"]), (&json!(TAP), &json!(VM), &json!(from)), "{card}");
    }
    lan.switch.enter(|| FdbWatch::open(SWITCH).unwrap().wait_behind(mac(VM), host.switch_port, LIMIT).unwrap());
    let output = announce(&lan.host_a.netns, &[]);
    let error = String::from_utf8_lossy(&output.stderr);
    // Host A has an interface of the same name, but nobody holds it open there.
    assert_eq!(output.status.code(), Some(3), "{error}");
    let output = announce(&lan.client, &[]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), error.contains("no tap in this network namespace")), (Some(3), true), "{error}");
}
