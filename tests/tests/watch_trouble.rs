//! Watching when something is wrong: rights that are missing, VMs that end under the eye, numbers used again, memory that cannot be read, a
//! kernel without type information. Each must end in words that say what to do, and leave nothing attached.
#![cfg(target_arch = "x86_64")]

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use dunlin::foreign::{KvmProcess, MemoryOpenError, ProcessMemory, guess_ram};
use dunlin::model::PageCount;
use dunlin::probe::{Gives, LoadOptions, ProbeError, Probes};
use dunlin::service::inventory;
use dunlin_tests::{OwnProcess, dunlin};

/// A hosted VM whose guest writes; killed on drop.
struct Vm {
    process: OwnProcess,
    folder: tempfile::TempDir,
}

impl Vm {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kernel = concat!(env!("CARGO_MANIFEST_DIR"), "/guest/target/release/dunlin-guest");
        let serial = folder.path().join("serial");
        let child = dunlin()
            .args(["vm", "run", "--name", "watched", "--kernel", kernel, "--memory", "64MiB", "--cpus", "1"])
            .args(["--cmdline", "dunlin.wl=ws:8M,rate:5000", "--serial", &format!("file={}", serial.display())])
            .arg("--run-dir")
            .arg(folder.path().join("run"))
            .arg("--state-dir")
            .arg(folder.path().join("state"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let vm = Self { process: OwnProcess::new(child), folder };
        dunlin_tests::wait::wait_for("the guest", Duration::from_secs(60), || {
            std::fs::read_to_string(&serial).ok().filter(|text| text.contains("\nREADY "))
        })
        .unwrap();
        vm
    }

    fn run_dir(&self) -> std::path::PathBuf {
        self.folder.path().join("run")
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// `dunlin` of the same user without some capabilities.
fn without(capabilities: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set", capabilities]).arg(dunlin().get_program());
    command
}

#[test]
fn a_missing_capability_is_named() {
    let vm = Vm::start();
    let watched = |mut command: Command, arguments: &[&str]| {
        let output = command.args(arguments).arg("--run-dir").arg(vm.run_dir()).output().unwrap();
        (output.status.code(), said(&output))
    };
    let watch = ["dirty-rate", "watched", "--count", "1", "--interval", "50ms"];
    for (lost, named) in
        [("-bpf,-sys_admin", "CAP_BPF"), ("-perfmon,-sys_admin", "CAP_PERFMON"), ("-sys_ptrace", "CAP_SYS_PTRACE")]
    {
        let (code, words) = watched(without(lost), &watch);
        assert!(code == Some(1) && words.contains(named), "{lost}: {code:?} {words}");
    }
    let (code, words) = watched(without("-sys_ptrace"), &["wws", "watched", "--regime", "sampled"]);
    assert!(code == Some(1) && words.contains("CAP_SYS_PTRACE"), "{code:?} {words}");
    // Without them nothing is shown as something else: the list says that it does not know.
    let (code, words) = watched(without("-bpf,-sys_admin"), &["vm", "list", "--all"]);
    assert!(code == Some(0) && words.contains("not known of some"), "{code:?} {words}");
    let (code, words) = watched(dunlin(), &watch);
    assert_eq!(code, Some(0), "{words}");
}

/// Descriptors of BPF objects that this process holds.
fn bpf_descriptors() -> usize {
    let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    links
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .filter(|to| to.to_string_lossy().contains("bpf"))
        .count()
}

/// Tests that load programs into this process, or look at its own descriptors.
static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

#[test]
fn programs_that_are_refused_half_way_leave_nothing() {
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    let _alone = ALONE.lock();
    let load = |wanted: Vec<Gives>| {
        Probes::load(&LoadOptions {
            only: None,
            capacity: PageCount(64),
            wanted,
            attribute: true,
            single_writes: None,
            log: false,
        })
    };
    let before = bpf_descriptors();
    // Capabilities are a thread's own: maps can be made without this one, programs cannot be loaded.
    std::thread::spawn(move || {
        let mut mine = capabilities(None).unwrap();
        mine.effective &= !(CapabilitySet::PERFMON | CapabilitySet::SYS_ADMIN);
        set_capabilities(None, mine).unwrap();
        let error = load(vec![Gives::Pages, Gives::VmmExits]).unwrap_err();
        assert!(
            matches!(error, ProbeError::NothingAttached(_)) && error.to_string().contains("CAP_PERFMON"),
            "{error}"
        );
        assert_eq!(bpf_descriptors(), before, "something is left");
    })
    .join()
    .unwrap();
    let probes = load(vec![Gives::Pages, Gives::VmmExits]).unwrap();
    assert!(bpf_descriptors() > before);
    drop(probes);
    assert_eq!(bpf_descriptors(), before);
}

#[test]
fn a_vm_that_ends_while_it_is_measured_is_said_to_have_ended() {
    for regime in ["armed", "sampled"] {
        let vm = Vm::start();
        let measuring = dunlin()
            .args(["wws", "watched", "--window", "2s", "--windows", "2", "--regime", regime, "--run-dir"])
            .arg(vm.run_dir())
            .arg("--state-dir")
            .arg(vm.folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It has the VM's memory open, or its programs loaded, once it has more than the descriptors that it began with.
        let open = format!("/proc/{}/fd", measuring.id());
        let is_at_work = || {
            let links =
                std::fs::read_dir(&open).ok()?.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok());
            let work = ["bpf", "pidfd"];
            links.into_iter().any(|to| work.iter().any(|word| to.to_string_lossy().contains(word))).then_some(())
        };
        dunlin_tests::wait::wait_for("the measurement", Duration::from_secs(30), is_at_work).unwrap();
        let began = Instant::now();
        vm.process.signal(rustix::process::Signal::KILL).unwrap();
        let output = measuring.wait_with_output().unwrap();
        let words = said(&output);
        assert!(output.status.code() == Some(1) && words.contains("ended"), "{regime}: {:?} {words}", output.status);
        println!("shows {regime}: said {:?} after the VM ended", began.elapsed());
    }
}

#[test]
fn vms_that_come_and_go_are_listed_while_they_are_there() {
    let _alone = ALONE.lock();
    let nowhere = tempfile::tempdir().unwrap();
    let mut view = inventory::kernel_view();
    let mut pids = Vec::new();
    for _ in 0..3 {
        let vm = Vm::start();
        pids.push(vm.process.id());
        let run_dir = vm.run_dir();
        let found = inventory::all(&run_dir, view.as_mut());
        let mine = found.iter().find(|found| found.pid == vm.process.id()).expect("it is listed");
        assert_eq!((mine.name.as_str(), mine.memory_bytes), ("watched", Some(64 << 20)));
        // It ends while we look, again and again, until it is gone.
        vm.process.signal(rustix::process::Signal::KILL).unwrap();
        dunlin_tests::wait::wait_for("the VM to be gone", Duration::from_secs(20), || {
            let still = inventory::all(&run_dir, view.as_mut()).iter().any(|found| found.pid == vm.process.id());
            (!still).then_some(())
        })
        .unwrap();
        assert!(inventory::again(mine, &run_dir, view.as_mut().unwrap()).is_none());
    }
    assert!(inventory::all(nowhere.path(), view.as_mut()).iter().all(|vm| !pids.contains(&vm.pid)));
}

#[test]
fn a_number_that_another_process_has_is_not_the_vms() {
    let _alone = ALONE.lock();
    let vm = Vm::start();
    let process = KvmProcess::open(vm.process.id()).unwrap();
    let earlier = KvmProcess { start_time_ticks: process.start_time_ticks - 1, ..process.clone() };
    let slots = guess_ram(process.pid).unwrap().slots;
    assert!(ProcessMemory::of(&process, &slots).is_ok());
    assert!(matches!(ProcessMemory::of(&earlier, &slots), Err(MemoryOpenError::Gone(_))));
    let mut view = inventory::kernel_view().unwrap();
    let found = inventory::find(&vm.run_dir(), &dunlin::model::VmRef::Pid(process.pid), Some(&mut view)).unwrap();
    assert!(inventory::again(&found, &vm.run_dir(), &mut view).is_some());
    let other = inventory::HostVm { start_time_ticks: earlier.start_time_ticks, ..found };
    assert!(inventory::again(&other, &vm.run_dir(), &mut view).is_none());
}

#[test]
fn memory_that_cannot_be_read_is_told_by_range_and_the_rest_is_sampled() {
    use dunlin::model::{Gpa, RamSlot};
    use dunlin::service::clock::MonotonicClock;
    use dunlin::track::{Sampler, SamplingOptions};
    const BYTES: usize = 2 << 20;
    // SAFETY: takes a number and no pointer (memfd_secret(2)).
    let secret = unsafe { libc::syscall(libc::SYS_memfd_secret, 0) } as i32;
    if secret < 0 {
        println!("shows nothing: this kernel has no memfd_secret ({})", std::io::Error::last_os_error());
        return;
    }
    let map = |descriptor: i32, flags: i32| {
        // SAFETY: a mapping of its own, whose address the kernel chooses; kept until the process ends.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), BYTES, libc::PROT_READ | libc::PROT_WRITE, flags, descriptor, 0)
        };
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        at as u64
    };
    // SAFETY: the descriptor is ours and stays open.
    assert_eq!(unsafe { libc::ftruncate(secret, BYTES as i64) }, 0);
    let hidden = map(secret, libc::MAP_SHARED);
    let plain = map(-1, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: both mappings are ours, writable, and this long.
    unsafe {
        std::ptr::write_bytes(hidden as *mut u8, 1, BYTES);
        std::ptr::write_bytes(plain as *mut u8, 1, BYTES);
    }
    let slot = |start, host_address| RamSlot { start: Gpa(start), bytes: BYTES as u64, host_address };
    let sampled = |hidden_from: u64| {
        let slots = [slot(0, plain), slot(hidden_from, hidden)];
        let memory = ProcessMemory::of_pid(std::process::id(), &slots).unwrap();
        let options = SamplingOptions { windows: vec![Duration::from_millis(20)], ..SamplingOptions::default() };
        Sampler::new(memory, MonotonicClock, options).unwrap().measure().unwrap()
    };
    // A range of its own is left out as a whole, and named.
    let apart = sampled(1 << 32);
    let [range] = apart.unreadable_ranges.as_slice() else { panic!("{apart:#?}") };
    println!("shows {range:?}");
    assert_eq!((range.start, range.bytes, range.reason.is_empty()), (Gpa(1 << 32), BYTES as u64, false));
    assert_eq!(apart.population_pages, BYTES as u64 / 4096);
    assert!(apart.windows[0].sampled_pages > 0 && apart.windows[0].changed_pages == 0, "{apart:#?}");
    // Where it touches what can be read, its pages are counted.
    let touching = sampled(BYTES as u64);
    assert!(touching.windows[0].sampled_pages > 0 && touching.windows[0].unreadable_pages > 0, "{touching:#?}");
}

#[test]
fn without_type_information_measuring_goes_on_and_the_list_says_what_it_does_not_know() {
    let vm = Vm::start();
    let binary = dunlin().get_program().to_owned();
    let hidden = |arguments: &str| {
        let script = format!(
            "mount -t tmpfs none /sys/kernel/btf && exec {} {arguments} --run-dir {}",
            Path::new(&binary).display(),
            vm.run_dir().display()
        );
        Command::new("unshare").args(["-m", "sh", "-c", &script]).output().unwrap()
    };
    let list = hidden("vm list --all");
    let text = String::from_utf8_lossy(&list.stdout).into_owned();
    assert!(list.status.success() && text.contains("watched") && text.contains("unknown"), "{text}");
    assert!(said(&list).contains("not known of some"), "{}", said(&list));
    // All pages: on a host with other work few may be protected otherwise, and nothing is exact then.
    let wws = hidden("wws watched --window 200ms --protect-one-in 1 --json");
    let profile: serde_json::Value = serde_json::from_slice(&wws.stdout).unwrap_or_else(|_| panic!("{}", said(&wws)));
    assert_eq!(profile["regime"], "armed");
    // 5000 pages a second, in turn, for a fifth of a second.
    assert!(profile["exact_unique_pages"].as_f64().unwrap() > 500.0, "{profile:#}");
}
