//! `dunlin agent` on this host: VMs that come and go, what it says of them, what it costs, and what it leaves behind.
#![cfg(target_arch = "x86_64")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use dunlin_tests::agent::{Agent, Role, TinyVmProcess};
use dunlin_tests::bpf::{self, Kind};
use dunlin_tests::dunlin;
use dunlin_tests::hosted::TestHost;
use dunlin_tests::wait::wait_for;
use rustix::process::Signal;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);
/// Pages a second that the guests are told to write.
const TOLD: f64 = 2000.0;
/// A budget that nothing reaches: the tests of one host share its processors.
const GENEROUS: f64 = 1.0;

/// Processes of the tests below that hold a VM.
#[test]
#[ignore = "is no test but a process that other tests start"]
fn tiny_vm() {
    dunlin_tests::agent::tiny_vm_process();
}

fn start(role: Role) -> TinyVmProcess {
    TinyVmProcess::start("tiny_vm", role).unwrap()
}

#[test]
fn vms_appear_with_their_rates_and_disappear_when_they_end() {
    // The agent's own host has one; to it, the other host's VM is a foreign one.
    let (mine, others) = (TestHost::new().unwrap(), TestHost::new().unwrap());
    let arm = ["--arm", "--window", "300ms", "--every", "600ms", "--bandwidth", "100Mbit", "--vcpu-metrics"];
    let agent = Agent::start(&mine.run_dir(), "200ms", GENEROUS, &arm).unwrap();
    let hosted = mine.boot(&[]).unwrap();
    let mut foreign = others.boot(&[]).unwrap();
    let (a, b) = (hosted.process.id(), foreign.process.id());

    // Several windows: a busy host may hold one up.
    let vm = wait_for("windows of the hosted VM", LIMIT, || {
        agent.vm(a).filter(|vm| vm["armed"]["windows"].as_u64() >= Some(6))
    })
    .unwrap();
    assert_eq!((vm["host"].as_str(), vm["vmm"].as_str()), (Some("hosted"), Some("dunlin")), "{vm}");
    assert_eq!(vm["memory_bytes"], 64 << 20);
    assert!(vm["vcpus"][0]["thread_id"].is_u64() && vm["vcpus"][0]["cpu_share"].as_f64() <= Some(1.0), "{vm}");
    assert_eq!(vm["armed_problem"], Value::Null);
    let mut rates = Vec::new();
    let mut seen = 0;
    while rates.len() < 5 {
        let armed = wait_for("another window", LIMIT, || {
            agent.vm(a).map(|vm| vm["armed"].clone()).filter(|armed| armed["windows"].as_u64() > Some(seen))
        })
        .unwrap();
        seen = armed["windows"].as_u64().unwrap();
        // Our own window is nobody else's log.
        let rate = agent.vm(a).map(|vm| vm["rate"].clone()).unwrap();
        assert!(rate.is_null() || rate["regime"] == "passive", "{rate}");
        rates.push(armed["unique_pages"].as_f64().unwrap() / (armed["window_ns"].as_f64().unwrap() / 1e9));
        // Two thousand pages a second do not fit through 100 Mbit/s with little downtime; or they do, and then it says so.
        assert!(armed["forecast"]["expected"]["converges"].is_boolean() && armed["ranking"].is_object(), "{armed}");
    }
    rates.sort_by(f64::total_cmp);
    // Beside what it is told to write the guest writes some pages of its own.
    assert!((TOLD * 0.9..TOLD * 1.2 + 150.0).contains(&rates[2]), "{rates:?}");

    let vm = wait_for("the foreign VM's rate", LIMIT, || agent.vm(b).filter(|vm| vm["rate"].is_object())).unwrap();
    assert_eq!((vm["host"].as_str(), vm["armed"].is_null()), (Some("foreign"), true), "{vm}");
    assert_eq!((vm["rate"]["regime"].as_str(), vm["rate"]["is_lower_bound"].as_bool()), (Some("passive"), Some(true)));

    // By every name, with its metrics; and not otherwise.
    let uuid = vm["vm_id"].as_str().unwrap().to_owned();
    for id in [format!("pid:{b}"), uuid.clone(), format!("uuid:{uuid}")] {
        let (status, found) = agent.get(&format!("/v1/vms/{id}")).unwrap();
        assert_eq!(
            (status, found["pid"].as_u64(), &found["schema"]),
            (200, Some(b.into()), &"dunlin.fleet-vm/v1".into())
        );
    }
    let (status, answer) = agent.get("/v1/vms/nobody").unwrap();
    assert_eq!((status, &answer["schema"]), (404, &"dunlin.outcome/v1".into()));
    assert!(answer["error"].as_str().unwrap().contains("nobody"));
    let (status, all) = agent.get("/v1/vms").unwrap();
    assert!(status == 200 && all.as_array().unwrap().iter().any(|vm| vm["pid"] == a));
    let scrape = agent.scrape().unwrap();
    assert!(
        scrape.contains(&uuid) && scrape.ends_with("# EOF\n") && scrape.contains("dunlin_vcpu_cpu_ratio"),
        "{scrape}"
    );
    let armed = agent.metric("dunlin_vm_dirty_bytes_per_second", &["regime=\"armed\""]).unwrap().unwrap();
    assert!((TOLD * 0.5..TOLD * 2.0).contains(&(armed / 4096.0)), "{armed}");

    foreign.kill().unwrap();
    wait_for("the end of the VM", LIMIT, || agent.vm(b).is_none().then_some(())).unwrap();
    assert!(!agent.scrape().unwrap().contains(&uuid));
    assert!(agent.vm(a).is_some());
}

#[test]
fn nothing_is_loaded_before_a_vm_and_nothing_stays() {
    let folder = tempfile::tempdir().unwrap();
    let mut agent = Agent::start(folder.path(), "100ms", GENEROUS, &[]).unwrap();
    let vm = start(Role::Rest);
    wait_for("the VM", LIMIT, || agent.vm(vm.0.id())).unwrap();
    let held: Vec<(Kind, BTreeSet<u32>)> =
        Kind::ALL.into_iter().map(|kind| (kind, bpf::held_by(agent.process.id(), kind))).collect();
    for (kind, ids) in &held {
        assert!(!ids.is_empty() && ids.iter().all(|&id| bpf::exists(*kind, id).unwrap()), "{kind:?}");
    }
    // Whoever has the socket keeps it.
    let second = Agent::start(folder.path(), "100ms", GENEROUS, &[]).unwrap_err();
    assert!(format!("{second:#}").contains("another agent"), "{second:#}");

    agent.process.signal(Signal::KILL).unwrap();
    agent.process.wait_for(LIMIT).unwrap().unwrap();
    // The kernel frees what nobody holds a little later.
    for (kind, ids) in &held {
        let gone = || ids.iter().all(|&id| !bpf::exists(*kind, id).unwrap()).then_some(());
        wait_for(&format!("the end of each {kind:?}"), LIMIT, gone).unwrap();
    }
    // The socket of one that was killed gives way; one that ends takes it along.
    let mut next = Agent::start(folder.path(), "100ms", GENEROUS, &[]).unwrap();
    assert!(next.socket().exists());
    next.process.signal(Signal::TERM).unwrap();
    assert_eq!(next.process.wait_for(LIMIT).unwrap().unwrap().code(), Some(0), "{}", next.log());
    assert!(!next.socket().exists());
}

#[test]
fn without_a_vm_no_program_is_attached() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), "50ms", GENEROUS, &[]).unwrap();
    // Other tests of this host may have a VM at any time: what is looked for is a look without one.
    let idle = |fleet: &Value| fleet["vms"].as_array().is_some_and(Vec::is_empty) && fleet["sequence"] != 0;
    let Ok(fleet) = wait_for("a host without VMs", Duration::from_secs(5), || agent.fleet().ok().filter(idle)) else {
        return;
    };
    assert_eq!(fleet["watching"]["loaded"], false);
    assert!(fleet["watching"]["programs"].as_array().unwrap().is_empty());
}

/// How many of these processes the agent shows.
fn shown(agent: &Agent, pids: &BTreeSet<u64>) -> usize {
    let Ok(fleet) = agent.fleet() else { return 0 };
    let vms = fleet["vms"].as_array().cloned().unwrap_or_default();
    vms.iter().filter(|vm| vm["pid"].as_u64().is_some_and(|pid| pids.contains(&pid))).count()
}

#[test]
fn two_hundred_vms_come_and_go() {
    const VMS: usize = 200;
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), "500ms", GENEROUS, &[]).unwrap();
    // One stays: with the last VM everything would be forgotten anyway.
    let stays = start(Role::Rest);
    let vms: Vec<TinyVmProcess> = (0..VMS).map(|_| start(Role::Rest)).collect();
    let pids: BTreeSet<u64> = vms.iter().map(|vm| vm.0.id().into()).collect();
    wait_for("all of them", LIMIT, || (shown(&agent, &pids) == VMS).then_some(())).unwrap();
    let fleet = wait_for("their rates", LIMIT, || {
        let fleet = agent.fleet().ok()?;
        let mine =
            fleet["vms"].as_array()?.iter().filter(|vm| vm["pid"].as_u64().is_some_and(|pid| pids.contains(&pid)));
        (mine.filter(|vm| vm["rate"].is_object() && vm["unique_known"] == true).count() == VMS).then_some(fleet)
    })
    .unwrap();
    let own = fleet["watching"]["own_share_of_core"].as_f64().unwrap();
    println!(
        "shows looking at {VMS} VMs every 500 ms takes {:.1} % of a core, {} bytes resident",
        own * 100.0,
        agent.resident_bytes().unwrap()
    );
    assert_eq!(fleet["watching"]["lost_events_total"]["total"], 0, "{}", fleet["watching"]);
    assert!(agent.resident_bytes().unwrap() < 256 << 20);
    assert_eq!(
        agent.scrape().unwrap().lines().filter(|line| line.starts_with("dunlin_vm_info")).count(),
        fleet["vms"].as_array().unwrap().len()
    );
    drop(vms);
    wait_for("their end", LIMIT, || (shown(&agent, &pids) == 0).then_some(())).unwrap();
    assert!(agent.vm(stays.0.id()).is_some());
    // Again, with the numbers of processes and the places in the maps that have become free.
    let again: Vec<TinyVmProcess> = (0..20).map(|_| start(Role::Rest)).collect();
    let pids: BTreeSet<u64> = again.iter().map(|vm| vm.0.id().into()).collect();
    wait_for("new ones", LIMIT, || (shown(&agent, &pids) == again.len()).then_some(())).unwrap();
}

#[test]
fn a_flood_of_exits_is_shed_said_and_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), "50ms", 0.0005, &[]).unwrap();
    let before = agent.resident_bytes().unwrap();
    let flood = start(Role::Exits);
    let is_shed = |fleet: &Value| {
        fleet["watching"]["shed"].as_array().is_some_and(|shed| shed.iter().any(|shed| shed["source"] == "vmm-exits"))
    };
    let fleet = wait_for("that exits are shed", LIMIT, || agent.fleet().ok().filter(is_shed)).unwrap();
    let missing = fleet["watching"]["missing_sources"].as_array().unwrap();
    assert!(missing.iter().any(|missing| missing["reason"].as_str().unwrap().contains("shed")), "{missing:?}");
    assert!(agent.log().contains("vmm-exits is shed"), "{}", agent.log());
    // A source that is away tries to come back now and then, so that a later look may find it attached again.
    let exits = fleet["watching"]["programs"].as_array().unwrap().iter().find(|of| of["program"] == "userspace_exit");
    assert_eq!(exits.unwrap()["attached"], false, "{fleet}");
    wait_for("that they cost nothing", LIMIT, || {
        let fleet = agent.fleet().ok()?;
        let programs = fleet["watching"]["programs"].as_array()?.clone();
        programs
            .into_iter()
            .find(|of| of["program"] == "userspace_exit" && of["attached"] == false && of["share_of_core"] == 0.0)
    })
    .unwrap();
    assert!(agent.metric("dunlin_sources_shed", &[]).unwrap() >= Some(1.0));
    assert_eq!(agent.metric("dunlin_source_up", &["vmm-exits"]).unwrap(), Some(0.0));
    drop(flood);
    // A VM that rests: programs stay loaded, and there is room again.
    let _rest = start(Role::Rest);
    wait_for("that exits are back", LIMIT, || agent.log().contains("vmm-exits is back").then_some(())).unwrap();
    assert!(agent.resident_bytes().unwrap() < before + (64 << 20));
}

#[test]
fn a_flood_of_pages_is_counted_and_said_to_be_above_the_budget() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(folder.path(), "100ms", 0.001, &[]).unwrap();
    let flood = start(Role::Pages);
    let vm = wait_for("the flood", LIMIT, || {
        agent.vm(flood.0.id()).filter(|vm| vm["rate"]["pages_per_second"].as_f64() > Some(2_000.0))
    })
    .unwrap();
    assert_eq!(vm["rate"]["regime"], "logged", "{vm}");
    let above = || agent.fleet().ok().filter(|fleet| fleet["watching"]["above_budget"] == true);
    let fleet = wait_for("that it says so", LIMIT, above).unwrap();
    println!(
        "shows a flood of {} pages a second takes {} of a core",
        vm["rate"]["pages_per_second"], fleet["watching"]["used_share_of_core"]
    );
    // The last source of pages is never shed; nothing is lost.
    assert_eq!(agent.metric("dunlin_source_up", &["page-tables"]).unwrap(), Some(1.0));
    assert_eq!(fleet["watching"]["lost_events"]["total"], 0);
    assert!(agent.resident_bytes().unwrap() < 256 << 20);
}

/// `dunlin agent` without some rights; its exit code and what it says.
fn with_capabilities(list: &str, run_dir: &Path) -> (Option<i32>, String) {
    let program = dunlin().get_program().to_owned();
    let output = Command::new("setpriv")
        .args(["--bounding-set", list, "--inh-caps", "-all", "--"])
        .arg(program)
        .args(["agent", "--run-dir"])
        .arg(run_dir)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn what_it_lacks_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (code, words) = with_capabilities("-all,+bpf", folder.path());
    assert_eq!(code, Some(1), "{words}");
    assert!(words.contains("CAP_PERFMON and CAP_SYS_PTRACE") && !words.contains("CAP_BPF"), "{words}");
    let (code, words) = with_capabilities("-all", folder.path());
    assert!(code == Some(1) && words.contains("CAP_BPF and CAP_PERFMON and CAP_SYS_PTRACE"), "{words}");
    assert!(fs::read_dir(folder.path()).unwrap().next().is_none(), "something was left in the run folder");
    for words in [["--interval", "1ms"], ["--listen", "nowhere"], ["--window", "1s"]] {
        let output = dunlin().arg("agent").args(words).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{words:?}");
    }
}

#[test]
fn a_vm_whose_process_is_stopped_holds_up_no_other() {
    let host = TestHost::new().unwrap();
    let vm = host.boot(&[]).unwrap();
    let agent =
        Agent::start(&host.run_dir(), "100ms", GENEROUS, &["--arm", "--window", "50ms", "--every", "100ms"]).unwrap();
    wait_for("a window", LIMIT, || agent.vm(vm.process.id()).filter(|vm| vm["armed"].is_object())).unwrap();
    vm.process.signal(Signal::STOP).unwrap();
    let rest = start(Role::Rest);
    // The window that cannot open takes its time; the other VM is there long before.
    wait_for("the other VM", LIMIT, || agent.vm(rest.0.id()).filter(|vm| vm["rate"].is_object())).unwrap();
    let problem = wait_for("what is said of the window", LIMIT, || {
        agent.vm(vm.process.id())?["armed_problem"].as_str().map(str::to_owned)
    })
    .unwrap();
    assert!(problem.contains("no answer within"), "{problem}");
    vm.process.signal(Signal::CONT).unwrap();
    wait_for("windows again", LIMIT, || agent.vm(vm.process.id()).filter(|vm| vm["armed_problem"].is_null())).unwrap();
}
