//! The processes of Linux guests, named from outside: a guest's memory is read while it runs, and what is found in it is compared with what
//! the guest says of itself. `cargo xtask test-vm` runs these.
#![cfg(target_arch = "x86_64")]

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use dunlin::guest_os::{Hints, LinuxGuest as GuestKernel, Origin, Processes, Symbols};
use dunlin::model::{AddressSpace, Gpa, MemoryRange};
use dunlin::port::{GuestMemory, GuestMemoryError};
use dunlin_tests::agent::Agent;
use dunlin_tests::foreign::ForeignVm;
use dunlin_tests::linux::LinuxGuest;
use dunlin_tests::wait::wait_for;
use dunlin_tests::{Rig, VmSpec, dunlin};
use serde_json::{Value, json};

/// Two processes that write, and a look at the kernel's symbols.
const WORK: &str = "dunlin.wl=ws:16M,rate:1000 dunlin.wl=ws:8M,rate:300 dunlin.symbols";
const LIMIT: Duration = Duration::from_secs(60);

/// A guest's RAM, in QEMU's memory. Below 2 GiB it is in one piece from address zero on.
struct Ram {
    memory: File,
    start: u64,
    ranges: [MemoryRange; 1],
}

impl Ram {
    fn of(vm: &ForeignVm) -> Self {
        let memory = File::open(format!("/proc/{}/mem", vm.pid())).unwrap();
        let ram = vm.ram().unwrap();
        Self { memory, start: ram.start, ranges: [MemoryRange { start: Gpa(0), bytes: ram.end - ram.start }] }
    }
}

impl GuestMemory for Ram {
    fn ranges(&self) -> &[MemoryRange] {
        &self.ranges
    }

    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), GuestMemoryError> {
        if !self.ranges[0].contains(at, into.len() as u64) {
            return Err(GuestMemoryError::NotRam(at));
        }
        let unreadable = |error: std::io::Error| GuestMemoryError::Unreadable { at, reason: error.to_string() };
        self.memory.read_exact_at(into, self.start + at.0).map_err(unreadable)
    }
}

/// What is in CR3 of all vCPUs, now.
fn address_spaces(vm: &mut ForeignVm) -> Vec<AddressSpace> {
    let text = vm.order("human-monitor-command", json!({ "command-line": "info registers -a" })).unwrap();
    let words = text.as_str().unwrap().split_whitespace().filter_map(|word| word.strip_prefix("CR3="));
    words.map(|word| AddressSpace(u64::from_str_radix(word, 16).unwrap())).collect()
}

/// Number and name of each process that the guest has said it started to write.
fn writers(vm: &ForeignVm) -> Vec<(u32, String)> {
    let state = vm.next_state().unwrap();
    let pids = state["writers"].as_array().unwrap().iter().map(|writer| writer["pid"].as_u64().unwrap() as u32);
    pids.enumerate().map(|(index, pid)| (pid, format!("writer{index}"))).collect()
}

fn names(processes: &Processes) -> Vec<(u32, String)> {
    let mut names: Vec<_> = processes.iter().map(|(_, process)| (process.pid, process.name.clone())).collect();
    names.sort();
    names
}

/// What the guest told of its kernel's symbols, as `/proc/kallsyms` has it.
fn symbols(vm: &ForeignVm) -> String {
    let console = std::fs::read_to_string(vm.console()).unwrap();
    console.lines().filter_map(|line| line.strip_prefix("SYMBOL ")).collect::<Vec<_>>().join("\n")
}

/// Boots, finds, names, and compares.
fn check(linux: &LinuxGuest, options: &str, more: &[&str]) {
    let mut vm = ForeignVm::boot_with(linux, &format!("{WORK} {options}"), more).unwrap();
    let what = format!("{} {options} {}", linux.label, more.join(" "));
    let ram = Ram::of(&vm);
    let roots = address_spaces(&mut vm);
    let began = Instant::now();
    let mut kernel = GuestKernel::find(&ram, &roots, &Hints::default()).unwrap_or_else(|e| panic!("{what}: {e}"));
    let took = began.elapsed();
    assert_eq!((kernel.types_from, kernel.first_task_from), (Origin::Guest, Origin::Guest));

    assert_eq!(kernel.release.as_deref(), vm.state().unwrap()["identity"]["kernel"].as_str(), "{what}");

    // The guest's process 1, its writers, and the kernel itself: there is nobody else.
    let wanted = [vec![(0, "swapper/0".to_owned()), (1, "init".to_owned())], writers(&vm)].concat();
    let began = Instant::now();
    let processes = kernel.processes(&ram).unwrap();
    println!("shows {what}: found in {took:?}, named in {:?}: {:?}", began.elapsed(), names(&processes));
    assert_eq!((names(&processes), processes.is_whole()), (wanted.clone(), true), "{what}");
    assert_eq!(processes.is_isolated(), options.contains("pti=on"), "{what}");

    // Whatever is seen on a vCPU is somebody's; and both writers are seen.
    let mut seen = BTreeSet::new();
    wait_for("both writers on a vCPU", LIMIT, || {
        for space in address_spaces(&mut vm) {
            let process = processes.get(space).unwrap_or_else(|| panic!("{what}: nobody has {space}"));
            seen.insert((process.pid, process.name.clone()));
        }
        wanted[2..].iter().all(|writer| seen.contains(writer)).then_some(())
    })
    .unwrap_or_else(|error| panic!("{what}: {error}; seen: {seen:?}"));

    // The guest's own symbols lead to the same, and one vCPU's look at any time is enough.
    let symbols = symbols(&vm);
    let symbols = Symbols::parse(symbols.as_bytes()).unwrap_or_else(|e| panic!("{what}: {e}: {symbols:?}"));
    let hints = Hints { symbols: Some(&symbols), ..Hints::default() };
    let roots = address_spaces(&mut vm);
    let mut again = GuestKernel::find(&ram, &roots[..1], &hints).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(again.first_task_from, Origin::Operator);
    assert_eq!(names(&again.processes(&ram).unwrap()), wanted, "{what}");

    let pid = vm.pid();
    drop(vm);
    assert!(kernel.processes(&ram).is_err(), "{what}: process {pid} has ended");
}

#[test]
#[ignore = "needs a KVM that runs Linux: `cargo xtask test-vm` runs it"]
fn writers_in_a_stock_linux_are_named_from_outside() {
    for linux in LinuxGuest::all().unwrap() {
        check(&linux, "", &[]);
    }
}

#[test]
#[ignore = "needs a KVM that runs Linux: `cargo xtask test-vm` runs it"]
fn writers_are_named_under_page_table_isolation_and_with_two_cpus() {
    for linux in LinuxGuest::all().unwrap() {
        check(&linux, "pti=on", &["-smp", "2"]);
    }
}

/// `dunlin wws --names` with an operator's files: exit code, report, and what it said besides.
fn named_with(vm: &ForeignVm, map: &Path, types: Option<&Path>) -> (Option<i32>, Value, String) {
    let mut command = dunlin();
    command.args([
        "wws",
        &format!("pid:{}", vm.pid()),
        "--json",
        "--names",
        "--window",
        "2s",
        "--regime",
        "soft-dirty",
    ]);
    command.args(["--allow-soft-dirty", "--allow-read-memory", "--system-map"]).arg(map);
    if let Some(types) = types {
        command.arg("--btf").arg(types);
    }
    let output = command.output().unwrap();
    let report = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (output.status.code(), report, String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
#[ignore = "needs a KVM that runs Linux, and soft-dirty: `cargo xtask test-vm` runs it"]
fn an_operators_files_lead_to_the_names_and_wrong_ones_are_said_to_be_wrong() {
    let linux = LinuxGuest::all().unwrap().remove(0);
    let vm = ForeignVm::boot_with(&linux, WORK, &[]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let right = symbols(&vm);
    let map = file("System.map", &right);
    let own_release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let release = vm.state().unwrap()["identity"]["kernel"].as_str().unwrap().to_owned();
    let own_types = Path::new("/sys/kernel/btf/vmlinux");
    // Where the guest runs this host's kernel, the host's types are the guest's.
    let types = (own_release.trim() == release).then_some(own_types);
    // Huge mappings are protected, and become writable, as a whole: of two writers in one of them, one window shows the first.
    let wanted = BTreeSet::from(["writer0", "writer1"].map(str::to_owned));
    let mut names = BTreeSet::new();
    for _ in 0..8 {
        let (code, report, said) = named_with(&vm, &map, types);
        assert_eq!(code, Some(0), "{said}");
        let writers = report["writers"].as_array().unwrap();
        names.extend(writers.iter().filter_map(|part| Some(part["writer"]["process"]["name"].as_str()?.to_owned())));
        if names.is_superset(&wanted) {
            break;
        }
    }
    println!("shows {}: named by an operator's files (types {types:?}): {names:?}", linux.label);
    assert!(names.is_superset(&wanted), "{names:?}");

    // Another kernel's symbols: the first task is elsewhere.
    let moved = |line: &str| match line.split_once(' ') {
        Some((at, name)) if name.ends_with(" init_task") => {
            format!("{:x} {name}", u64::from_str_radix(at, 16).unwrap() + 4096)
        }
        _ => line.to_owned(),
    };
    let other = file("System.map-other", &right.lines().map(moved).collect::<Vec<_>>().join("\n"));
    assert_ne!(std::fs::read_to_string(&other).unwrap(), right);
    let (code, report, said) = named_with(&vm, &other, None);
    let note = format!("no process list is found in the guest's kernel ({release}) by the given symbols");
    assert!(code == Some(0) && report["notes"].to_string().contains(&note), "{said} {:#}", report["notes"]);

    // No file of this kind at all: nothing is measured.
    let (code, report, said) = named_with(&vm, own_types, None);
    assert!(code == Some(2) && report.is_null() && said.contains("is no System.map"), "{said}");
    let (code, _, said) = named_with(&vm, &map, Some(&map));
    assert!(code == Some(2) && said.contains("gives no types"), "{said}");
}

#[test]
#[ignore = "needs a KVM that runs Linux: `cargo xtask test-vm` runs it"]
fn the_agent_names_the_process_that_keeps_a_hosted_linux_from_moving() {
    let spec = VmSpec {
        cpus: 1,
        memory_bytes: 256 << 20,
        linux: Some(LinuxGuest::all().unwrap().remove(0)),
        guest: "dunlin.wl=ws:20M,rate:250 dunlin.wl=ws:1M,rate:5".to_owned(),
        ..VmSpec::default()
    };
    let mut rig = Rig::boot(&spec).unwrap();
    // The link carries less than the first writes, and more than the second does. Both write little: a fault costs up to a
    // millisecond in an emulated machine, and the agent rests after a window until faults took a fiftieth of the time.
    let terms = ["--arm", "--window", "1s", "--every", "2s", "--bandwidth", "125KiB/s", "--downtime", "1s"];
    let mut agent = Agent::start(&rig.run_dir(rig.at()), "500ms", 1.0, &terms).unwrap();
    let named = wait_for("a rogue with a name", 2 * LIMIT, || {
        let fleet = agent.fleet().ok()?;
        let armed = &fleet["vms"][0]["armed"];
        let rogues = armed["rogues"].as_array()?;
        rogues.iter().any(|rogue| rogue["writer"]["process"]["name"] == "writer0").then(|| armed.clone())
    });
    let named = named.unwrap_or_else(|error| panic!("{error}: {:#}\n{}", agent.fleet().unwrap(), agent.log()));
    assert_eq!(named["names_missing"], Value::Null, "{named:#}");
    let words = |rogue: &Value| rogue["words"].as_str().unwrap().to_owned();
    let rogues: Vec<String> = named["rogues"].as_array().unwrap().iter().map(words).collect();
    println!("shows the agent's rogues: {rogues:?}");
    assert!(!rogues.iter().any(|words| words.contains("`writer1`")), "{rogues:?}");
    let rate = agent.metric("dunlin_vm_rogue_process_bytes_per_second", &["process=\"writer0\""]).unwrap().unwrap();
    println!("shows its metric: {rate:.0} bytes/s");
    // It is told to write 1 MB/s. In software it may get to a part of that, and then to more for a while; and of so few pages
    // a part is watched.
    assert!((5e4..4e6).contains(&rate), "{rate}");
    // The thread that reads guests' memory ends with the agent.
    agent.process.signal(rustix::process::Signal::TERM).unwrap();
    assert_eq!(agent.process.wait_for(LIMIT).unwrap().and_then(|status| status.code()), Some(0), "{}", agent.log());
    rig.stop().unwrap();
}
