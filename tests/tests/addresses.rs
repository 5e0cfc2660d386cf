//! Who is where: the map of a host's VMs to their addresses, as an agent keeps it and as it is found in passing.
//!
//! What keeps it is tried by itself, as the agent's thread has it; one test has it in an agent, which needs BPF programs.

use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use dunlin::net::bridge;
use dunlin::service::addresses::Keeper;
use dunlin_tests::agent::Agent;
use dunlin_tests::hosted::{self, TestHost};
use dunlin_tests::wait::wait_for;
use dunlin_tests::{Netns, OwnProcess, dunlin};
use rustix::process::Signal;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);
const FIRST: &str = "02:00:00:00:00:64";
const SECOND: &str = "02:00:00:00:00:65";

/// A namespace with a bridge and three taps.
fn host_network() -> Netns {
    let netns = Netns::new("where").unwrap();
    netns.ip_batch(&["link add br0 type bridge forward_delay 0", "link set br0 addrgenmode none up"]).unwrap();
    for tap in ["tap0", "tap1", "tap2"] {
        netns
            .ip_batch(&[format!("tuntap add {tap} mode tap"), format!("link set {tap} master br0 addrgenmode none up")])
            .unwrap();
    }
    netns
}

/// `dunlin addresses --json`, and its exit code.
fn addresses(run_dir: &Path) -> (Option<i32>, Value) {
    let output = dunlin().args(["addresses", "--json", "--run-dir"]).arg(run_dir).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let book = serde_json::from_str(text.lines().next().unwrap_or_default());
    (output.status.code(), book.unwrap_or_else(|error| panic!("{error}: {text}{:?}", output.stderr)))
}

/// The VM of a process; others of this machine's tests may be there as well.
fn of(book: &Value, pid: u32) -> &Value {
    let vms = book["vms"].as_array();
    vms.and_then(|vms| vms.iter().find(|vm| vm["pid"] == pid)).unwrap_or(&Value::Null)
}

/// The VM of ours that has left.
fn left(book: &Value) -> Option<&Value> {
    book["left"].as_array()?.iter().find(|left| left["vm_name"] == hosted::VM)
}

fn ips(vm: &Value) -> Vec<(&str, &str)> {
    let ips = vm["cards"][0]["ips"].as_array().unwrap();
    ips.iter().map(|found| (found["ip"].as_str().unwrap(), found["from"].as_str().unwrap())).collect()
}

/// A VM of ours comes, is learnt of, moves away within the host and ends; the agent is restarted twice meanwhile.
#[test]
fn an_agent_knows_who_came_and_where_those_went_that_left() {
    let netns = host_network();
    let (source, target) = (TestHost::new().unwrap(), TestHost::new().unwrap());
    netns.enter(|| {
        let run_dir = source.run_dir();
        let vm = source.boot(&["--net", &format!("tap=tap0,mac={FIRST},ip=10.0.0.7")]).unwrap();
        bridge::wait_forwarding("tap0", LIMIT).unwrap();
        // Without an agent it is found in passing.
        let (code, book) = addresses(&run_dir);
        let pid = vm.process.id();
        let vm = of(&book, pid);
        assert_eq!((code, ips(vm)), (Some(0), vec![("10.0.0.7", "configuration")]), "{book:#}");
        assert_eq!((&vm["cards"][0]["tap"], &vm["cards"][0]["bridge"]), (&json!("tap0"), &json!("br0")), "{book:#}");
        assert!(vm["is_hosted"] == true && vm["came_by"].is_null(), "{book:#}");

        let mut keeper = Keeper::open(&run_dir);
        let mut last = Value::Null;
        let mut await_book = |keeper: &mut Keeper, what: &str, fits: &dyn Fn(&Value) -> bool| {
            let found = wait_for(what, LIMIT, || {
                last = serde_json::to_value(keeper.look_around().as_ref()).unwrap();
                fits(&last).then(|| last.clone())
            });
            found.unwrap_or_else(|error| panic!("{error}: {last:#}"))
        };
        await_book(&mut keeper, "the VM", &|book| of(book, pid)["cards"][0].is_object());
        // The neighbour table learns: the kernel tells, and nobody asks the VM.
        netns.ip(&format!("neigh add 10.0.0.8 lladdr {FIRST} dev br0 nud reachable")).unwrap();
        let learnt = [("10.0.0.7", "configuration"), ("10.0.0.8", "neighbour-table")];
        let knows = |book: &Value| of(book, pid)["cards"][0].is_object() && ips(of(book, pid)) == learnt;
        let before = await_book(&mut keeper, "what was learnt", &knows);

        // Another one goes on with what this one knew, although the table has forgotten.
        drop(keeper);
        netns.ip("neigh flush dev br0").unwrap();
        let mut keeper = Keeper::open(&run_dir);
        let after = await_book(&mut keeper, "what the other one knew", &knows);
        assert_eq!(of(&after, pid)["since_unix_ms"], of(&before, pid)["since_unix_ms"]);

        // It moves away.
        let receiver = target.receive(&["--net", &format!("tap=tap1,mac={FIRST}")]).unwrap();
        let mut migration = source.migrate(&receiver.address, &[]).unwrap();
        assert_eq!(migration.exit_code(LIMIT).unwrap(), Some(0), "{}", migration.output.text());
        let id = migration.report().unwrap().migration_id.to_string();
        let book = await_book(&mut keeper, "that it has left", &|book| {
            left(book).is_some_and(|left| left["went_by"].is_string())
        });
        let left = left(&book).unwrap();
        assert_eq!((&left["went_by"], &left["went_to"]), (&json!(id), &json!("127.0.0.1")), "{book:#}");
        assert_eq!((&left["vm_name"], &left["macs"]), (&json!(hosted::VM), &json!([FIRST])), "{book:#}");
        let (_, there) = addresses(&target.run_dir());
        let vm = there["vms"].as_array().unwrap().iter().find(|vm| vm["is_hosted"] == true).unwrap();
        assert_eq!((&vm["came_by"], &vm["came_from"]), (&json!(id), &json!("127.0.0.1")), "{there:#}");
        println!("shows {left}");
    });
}

/// Two VMs of a host with one address: in the list and the exit code, from when the kernel has said so until it is over.
#[test]
fn an_address_that_two_vms_share_is_told() {
    let netns = host_network();
    let (one, other) = (TestHost::new().unwrap(), TestHost::new().unwrap());
    netns.enter(|| {
        let run_dir = one.run_dir();
        let first = one.boot(&["--net", &format!("tap=tap0,mac={FIRST},ip=10.0.0.7,ip=fd00::7")]).unwrap();
        // Of the other one, which another run folder has, only the tap is known; the tables tell the rest.
        let second = other.boot(&["--net", &format!("tap=tap1,mac={SECOND}")]).unwrap();
        for tap in ["tap0", "tap1"] {
            bridge::wait_forwarding(tap, LIMIT).unwrap();
        }
        netns.run(&format!("bridge fdb replace {SECOND} dev tap1 master dynamic")).unwrap();
        let out = one.path("watch.out");
        let mut command = dunlin();
        command.args(["addresses", "--json", "--watch", "--interval", "50ms", "--run-dir"]).arg(&run_dir);
        command.stdin(Stdio::null()).stdout(File::create(&out).unwrap()).stderr(Stdio::null());
        let mut watch = OwnProcess::new(command.spawn().unwrap());
        let await_line = |what: &str, fits: &dyn Fn(&Value) -> bool| {
            let found = wait_for(what, LIMIT, || {
                let text = fs::read_to_string(&out).ok()?;
                let last = text.lines().next_back()?;
                serde_json::from_str::<Value>(last).ok().filter(|book| fits(book))
            });
            found.unwrap_or_else(|error| panic!("{error}: {}", fs::read_to_string(&out).unwrap()))
        };
        let pids = [first.process.id(), second.process.id()];
        let both = |book: &Value| pids.iter().all(|&pid| of(book, pid)["cards"][0]["mac"].is_string());
        let book = await_line("both VMs", &both);
        let foreign = of(&book, pids[1]);
        assert_eq!(foreign["is_hosted"], false);
        assert_eq!(
            (&foreign["cards"][0]["mac"], &foreign["cards"][0]["from"]),
            (&json!(SECOND), &json!("forwarding-table")),
            "{book:#}"
        );
        netns.ip(&format!("neigh add 10.0.0.7 lladdr {SECOND} dev br0 nud reachable")).unwrap();
        let book = await_line("the conflict", &|book| book["conflicts"][0].is_object());
        let conflict = &book["conflicts"][0];
        assert_eq!((&conflict["kind"], &conflict["ip"]), (&json!("address"), &json!("10.0.0.7")), "{book:#}");
        assert_eq!(addresses(&run_dir).0, Some(1));
        // The station has the address no more.
        netns.ip(&format!("neigh replace 10.0.0.7 lladdr {FIRST} dev br0 nud reachable")).unwrap();
        await_line("the end of it", &|book| book["conflicts"] == json!([]));
        assert_eq!(addresses(&run_dir).0, Some(0));
        watch.signal(Signal::INT).unwrap();
        assert_eq!(watch.wait_for(LIMIT).unwrap().unwrap().code(), Some(0));
    });
}

/// The same map from an agent: its socket, its metrics, its log.
#[test]
fn an_agent_serves_the_map() {
    let netns = host_network();
    let host = TestHost::new().unwrap();
    netns.enter(|| {
        let run_dir = host.run_dir();
        let agent = Agent::start(&run_dir, "100ms", 0.5, &[]).unwrap();
        let vm = host.boot(&["--net", &format!("tap=tap0,mac={FIRST},ip=10.0.0.7")]).unwrap();
        wait_for("the VM", LIMIT, || {
            let (status, book) = agent.get("/v1/addresses").ok()?;
            (status == 200 && of(&book, vm.process.id())["cards"][0]["mac"] == FIRST).then_some(())
        })
        .unwrap();
        assert_eq!(agent.metric("dunlin_address_conflicts", &[]).unwrap(), Some(0.0));
        assert!(run_dir.join("addresses.json").is_file());
    });
}
