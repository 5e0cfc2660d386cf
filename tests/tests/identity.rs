//! Who is where: somebody else who has the VM's addresses, what a migration proves of the network, and the way back of one that failed.

use std::net::IpAddr;
use std::time::Duration;

use dunlin::announce::frames;
use dunlin::model::network::{ConflictKind, Verdict};
use dunlin::model::{Ending, MacAddress, MigrationReport, NetworkReport, Step};
use dunlin::net::bridge;
use dunlin::net::fdb::FdbWatch;
use dunlin::port::FramePort;
use dunlin::service::machine::RunState;
use dunlin_tests::hosted::{self, HoldPoint, Receiver, Running, TestHost};
use dunlin_tests::tap::TestTap;
use dunlin_tests::topology::{BRIDGE, SWITCH, TAP, UPLINK};
use dunlin_tests::wait::wait_for;
use dunlin_tests::wire::{FrameKind, WireWatch};
use dunlin_tests::{Lan, LanConfig, Netns};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);
const VM: &str = "02:00:00:00:00:64";

fn mac() -> MacAddress {
    VM.parse().unwrap()
}

/// `--net` for the VM's card on a tap.
fn net(tap: &str) -> String {
    let [v4, v6] = Lan::GUEST_IPS;
    format!("tap={tap},mac={VM},ip={v4},ip={v6}")
}

/// A VM that runs on the first of two hosts on a LAN.
struct Pair {
    lan: Lan,
    source: TestHost,
    target: TestHost,
    _vm: Running,
}

impl Pair {
    fn boot() -> Self {
        let lan = Lan::new(LanConfig::default()).unwrap();
        let (source, target) = (TestHost::new().unwrap(), TestHost::new().unwrap());
        let vm = lan.host_a.netns.enter(|| {
            let [v4, _] = Lan::GUEST_IPS;
            let workload = format!("dunlin.ip={v4}/24 {}", hosted::WORKLOAD);
            let vm = source.boot_with("64MiB", &workload, &["--net", &net(TAP)]).unwrap();
            bridge::wait_forwarding(TAP, LIMIT).unwrap();
            vm
        });
        Self { lan, source, target, _vm: vm }
    }

    fn receive(&self, more: &[&str]) -> Receiver {
        let listen = format!("tcp://{}:0", self.lan.host_b.migration_ip);
        let card = net(TAP);
        let options = [&["--listen", &listen, "--net", &card], more].concat();
        self.lan.host_b.netns.enter(|| self.target.receive(&options).unwrap())
    }

    fn migrate(&self, to: &Receiver, more: &[&str]) -> Running {
        self.lan.host_a.netns.enter(|| self.source.migrate(&to.address, more).unwrap())
    }

    /// A migration to its end: exit code and report.
    fn moved(&self, to: &Receiver, more: &[&str]) -> (Option<i32>, MigrationReport) {
        let mut migration = self.migrate(to, more);
        let code = migration.exit_code(LIMIT).unwrap();
        let report = migration.report().unwrap_or_else(|| panic!("{}", migration.output.text()));
        (code, report)
    }

    /// A neighbour that has the VM's addresses.
    fn squat(&self) -> MacAddress {
        for (ip, bits) in Lan::GUEST_IPS.into_iter().zip([24, 64]) {
            let nodad = if ip.is_ipv6() { " nodad" } else { "" };
            self.lan.client.ip(&format!("addr add {ip}/{bits} dev eth0{nodad}")).unwrap();
        }
        self.lan.client.enter(|| bridge::link("eth0").unwrap().mac.unwrap())
    }
}

fn network(report: &MigrationReport) -> &NetworkReport {
    report.network.as_ref().unwrap_or_else(|| panic!("{report:#?}"))
}

/// What a receiver says when all announcements are sent.
fn receivers_word(receiver: &Receiver) -> Value {
    wait_for("the receiver's word", LIMIT, || {
        let text = receiver.running.output.text();
        text.lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .find(|line| line["schema"] == "dunlin.received-network/v1")
    })
    .unwrap()
}

/// Another station answers for the VM's addresses in the target's network.
#[test]
fn an_address_that_another_has_keeps_the_vm_where_it_is_or_is_said() {
    let pair = Pair::boot();
    let other = pair.squat();
    // Short and long migrations: who is to refuse does so before the VM stands.
    for strategy in ["pre-copy", "stop-and-copy", "post-copy"] {
        let receiver = pair.receive(&["--on-conflict", "refuse"]);
        let (code, report) = pair.moved(&receiver, &["--strategy", strategy]);
        assert_eq!((code, report.ending), (Some(3), Ending::Refused), "{report:#?}");
        assert_eq!(report.blackout_ns, 0, "{strategy}: it stood for it");
        for word in
            [Lan::GUEST_IPS[0].to_string(), other.to_string(), UPLINK.to_owned(), "--on-conflict warn".to_owned()]
        {
            assert!(report.reason.contains(&word), "{word}: {}", report.reason);
        }
        println!("shows {strategy}: {}", report.reason);
        let asked = network(&report).asked.as_ref().unwrap();
        let mut found: Vec<IpAddr> = asked.conflicts.iter().map(|conflict| conflict.ip.unwrap()).collect();
        found.sort();
        assert_eq!(found, Lan::GUEST_IPS, "{asked:#?}");
        assert!(asked.conflicts.iter().all(|one| one.kind == ConflictKind::Address && one.mac == other), "{asked:#?}");
        assert_eq!(pair.source.info().unwrap().state, RunState::Running);
        // The source hears of it before the target's machine has taken itself apart.
        wait_for("the target's machine gone", LIMIT, || pair.target.machine().is_none().then_some(())).unwrap();
        let audit = std::fs::read_to_string(pair.target.state_dir().join("audit.log")).unwrap();
        assert!(audit.contains("receive --on-conflict refuse") && audit.contains(&other.to_string()), "{audit}");
        drop(receiver);
    }
    let receiver = pair.receive(&[]);
    let (code, report) = pair.moved(&receiver, &[]);
    assert_eq!((code, report.ending), (Some(0), Ending::Moved), "{report:#?}");
    let asked = network(&report).asked.as_ref().unwrap();
    assert_eq!((asked.policy.as_str(), asked.conflicts.len(), asked.not_asked.len()), ("warn", 2, 0), "{asked:#?}");
}

/// Nobody asks, or nobody else is there: it moves; and both sides say what the bridges have done.
#[test]
fn a_move_says_when_the_bridges_relearned() {
    let pair = Pair::boot();
    let receiver = pair.receive(&["--on-conflict", "refuse"]);
    let (code, report) = pair.moved(&receiver, &[]);
    assert_eq!((code, report.ending), (Some(0), Ending::Moved), "{report:#?}");
    let found = network(&report);
    let asked = found.asked.as_ref().unwrap();
    assert_eq!((asked.addresses, asked.questions_sent, asked.conflicts.len()), (2, 6, 0), "{asked:#?}");
    assert!(found.rounds_sent >= 1 && found.frames_sent >= 4 && found.rounds_here == 0, "{found:#?}");
    let [there] = &found.target[..] else { panic!("{found:#?}") };
    assert_eq!((there.bridge.as_str(), there.port.as_deref()), (BRIDGE, Some(TAP)), "{found:#?}");
    assert_eq!((there.verdict, there.mac), (Verdict::Relearned, mac()), "{found:#?}");
    assert!(there.after_first_ns.unwrap() < 1_000_000_000, "{found:#?}");
    let [here] = &found.source[..] else { panic!("{found:#?}") };
    assert_eq!((here.verdict, here.port.as_deref()), (Verdict::Relearned, Some(UPLINK)), "{found:#?}");
    println!("shows {found:?}");
    let word = receivers_word(&receiver);
    assert_eq!(word["network"]["rounds_sent"], 5, "{word}");
    assert_eq!(word["network"]["target"][0]["verdict"], "relearned", "{word}");
    assert_eq!(word["migration_id"], report.migration_id.to_string());
}

/// A bridge that does not relearn is named by the source, too, with the cause.
#[test]
fn a_bridge_that_has_not_relearned_is_in_the_report() {
    let pair = Pair::boot();
    pair.lan.host_b.netns.run(&format!("bridge link set dev {TAP} learning off")).unwrap();
    let receiver = pair.receive(&["--on-conflict", "off"]);
    let (code, report) = pair.moved(&receiver, &["--relay", "0s"]);
    assert_eq!((code, report.ending), (Some(0), Ending::Moved), "{report:#?}");
    let found = network(&report);
    assert_eq!(found.asked, None, "nobody was to ask");
    let [there] = &found.target[..] else { panic!("{found:#?}") };
    assert_eq!(there.verdict, Verdict::NotRelearned, "{found:#?}");
    assert!(there.causes[0].sentence.contains("does not learn"), "{found:#?}");
}

/// A VM that moves within one host is behind another tap of the same bridge before: that is itself. A third tap with its address is not.
#[test]
fn a_former_tap_is_no_other_and_a_third_one_is() {
    let netns = Netns::new("within").unwrap();
    netns.ip_batch(&["link add br0 type bridge forward_delay 0", "link set br0 addrgenmode none up"]).unwrap();
    for tap in ["tap0", "tap1"] {
        netns
            .ip_batch(&[format!("tuntap add {tap} mode tap"), format!("link set {tap} master br0 addrgenmode none up")])
            .unwrap();
    }
    let (source, target) = (TestHost::new().unwrap(), TestHost::new().unwrap());
    netns.enter(|| {
        let _vm = source.boot(&["--net", &net("tap0")]).unwrap();
        bridge::wait_forwarding("tap0", LIMIT).unwrap();
        let mut third = TestTap::open("tap2").unwrap();
        netns.ip("link set tap2 master br0 addrgenmode none up").unwrap();
        bridge::wait_forwarding("tap2", LIMIT).unwrap();
        third.send(frames::rarp(mac()).bytes()).unwrap();
        FdbWatch::open("br0").unwrap().wait_behind(mac(), "tap2", LIMIT).unwrap();
        let attempt = || {
            let receiver = target.receive(&["--net", &net("tap1"), "--on-conflict", "refuse"]).unwrap();
            let mut migration = source.migrate(&receiver.address, &[]).unwrap();
            let code = migration.exit_code(LIMIT).unwrap();
            (code, migration.report().unwrap(), receiver)
        };
        let (code, report, receiver) = attempt();
        assert_eq!((code, report.ending), (Some(3), Ending::Refused), "{report:#?}");
        assert!(report.reason.contains(&format!("{VM} is behind `tap2`")), "{}", report.reason);
        println!("shows {}", report.reason);
        drop(receiver);
        netns.run(&format!("bridge fdb replace {VM} dev tap0 master dynamic")).unwrap();
        let (code, report, _receiver) = attempt();
        assert_eq!((code, report.ending), (Some(0), Ending::Moved), "{report:#?}");
        assert_eq!(network(&report).asked.as_ref().unwrap().conflicts, Vec::new(), "{report:#?}");
    });
}

/// A VM that has said nothing is in no table: its configuration tells.
#[test]
fn a_silent_vm_with_the_same_addresses_is_found_before_another_starts() {
    let netns = Netns::new("silent").unwrap();
    netns.ip_batch(&["link add br0 type bridge forward_delay 0", "link set br0 addrgenmode none up"]).unwrap();
    for tap in ["tap0", "tap1"] {
        netns
            .ip_batch(&[format!("tuntap add {tap} mode tap"), format!("link set {tap} master br0 addrgenmode none up")])
            .unwrap();
    }
    let host = TestHost::new().unwrap();
    netns.enter(|| {
        let _first = host.boot(&["--net", &net("tap0")]).unwrap();
        let [v4, v6] = Lan::GUEST_IPS;
        for (card, policy, code) in [
            (net("tap1"), "refuse", Some(3)),
            (format!("tap=tap1,mac=02:00:00:00:00:65,ip={v4}"), "refuse", Some(3)),
            (format!("tap=tap1,mac=02:00:00:00:00:65,ip={v6}"), "refuse", Some(3)),
        ] {
            let options = ["--net", &card, "--on-conflict", policy];
            let mut second = host.start_vm(&hosted::guest(), &options).unwrap();
            assert_eq!(second.exit_code(LIMIT).unwrap(), code, "{card}: {}", second.output.text());
            let text = second.output.text();
            assert!(text.contains("refused: ") && text.contains("`tap0`"), "{card}: {text}");
            println!("shows {}", text.trim());
        }
    });
}

/// The target has announced the VM and dies before it runs: the source says where it is, before the guest's first instruction and after, and the switch has it there.
#[test]
fn a_vm_that_comes_back_is_announced_again() {
    let pair = Pair::boot();
    let [at_source, at_target] = [pair.lan.host_a.switch_port, pair.lan.host_b.switch_port];
    let hold = HoldPoint::new(&pair.target, Step::Announced);
    let receiver = pair.receive(&["--hold-at", &hold.argument()]);
    let mut migration = pair.migrate(&receiver, &["--relay", "0s"]);
    hold.await_held().unwrap();
    let behind = |port| {
        pair.lan.switch.enter(|| FdbWatch::open(SWITCH).unwrap().wait_behind(mac(), port, LIMIT).unwrap());
    };
    behind(at_target);
    let wire = pair.lan.switch.enter(|| WireWatch::start(at_source, mac()).unwrap());
    pair.target.kill_machine().unwrap();
    hold.release().unwrap();
    let code = migration.exit_code(LIMIT).unwrap();
    let report = migration.report().unwrap_or_else(|| panic!("{}", migration.output.text()));
    assert_eq!((code, report.ending), (Some(4), Ending::Failed), "{report:#?}");
    assert_eq!(network(&report).rounds_here, 5, "{report:#?}");
    behind(at_source);
    assert_eq!(pair.source.info().unwrap().state, RunState::Running);
    // The manager has gone; the rounds go on: five of them.
    let rarps = || wire.frames().iter().filter(|frame| frame.kind == FrameKind::Rarp).count();
    wait_for("all rounds", LIMIT, || (rarps() >= 5).then_some(())).unwrap();
    let seen = wire.finish();
    assert_eq!(seen.first().unwrap().kind, FrameKind::Rarp, "{seen:#?}");
}

/// A VM that stood and was not taken is announced as well; one that never stood is not.
#[test]
fn only_a_vm_that_has_stood_is_announced_by_a_rollback() {
    let pair = Pair::boot();
    for (step, rounds) in [(Step::Reserved, 0), (Step::Prepared, 5)] {
        let receiver = pair.receive(&[]);
        let hold = HoldPoint::new(&pair.source, step);
        let mut migration = pair.migrate(&receiver, &["--hold-at", &hold.argument(), "--doubt", "1s"]);
        hold.await_held().unwrap();
        pair.target.kill_machine().unwrap();
        // Cancelled: it has not let go yet.
        migration.process.signal(rustix::process::Signal::INT).unwrap();
        hold.release().unwrap();
        let code = migration.exit_code(LIMIT).unwrap();
        let report = migration.report().unwrap();
        let here = report.network.as_ref().map_or(0, |network| network.rounds_here);
        assert_eq!(here, rounds, "{step}: exit {code:?}, {report:#?}");
        assert_eq!(pair.source.info().unwrap().state, RunState::Running, "{step}");
        std::fs::remove_file(pair.source.path(&format!("hold-{step}"))).unwrap();
    }
}
