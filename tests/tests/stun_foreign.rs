//! Writers of VMs that QEMU migrates are slowed from outside: a migration that would not end ends, nobody else is slowed, and whatever becomes of who slowed them, nothing is left.
//! On the host that these run on, and in the test machine, whose cgroups are of the other version.
#![cfg(target_arch = "x86_64")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use dunlin_tests::moving::{MovingVm, Pair, Qemu, Window};
use dunlin_tests::wait::wait_for;
use dunlin_tests::{OwnProcess, dunlin};
use rustix::process::Signal;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(120);

/// What fits the machine: in an emulated one everything is slower, and figures of time mean nothing. Behind each protection the bystander writes some pages of its own at once, which
/// must be below its share of the link.
struct Scale {
    is_emulated: bool,
    memory_mib: u32,
    writes_mib: u64,
    /// What the bystander writes.
    rate: f64,
    /// What the link carries, in bytes per second: the writer writes more.
    link: u64,
    /// A link on which no migration ends within a test.
    slow_link: u64,
}

impl Scale {
    fn of_here() -> Self {
        if std::env::var_os("DUNLIN_LINUX_GUESTS").is_some() {
            return Self {
                is_emulated: true,
                memory_mib: 96,
                writes_mib: 24,
                rate: 20.0,
                link: 8_000_000,
                slow_link: 1_000_000,
            };
        }
        Self {
            is_emulated: false,
            memory_mib: 512,
            writes_mib: 160,
            rate: 250.0,
            link: 125_000_000,
            slow_link: 20_000_000,
        }
    }

    fn boot(&self) -> MovingVm {
        self.boot_on("kvm")
    }

    fn boot_on(&self, accelerator: &str) -> MovingVm {
        let workload =
            format!("dunlin.wl0=ws:16M,rate:{} dunlin.wl1=ws:{}M,rate:max,fill:random", self.rate, self.writes_mib);
        let vm = MovingVm::boot(&Pair { memory_mib: self.memory_mib, workload: &workload, accelerator }).unwrap();
        fs::create_dir(vm.folder().join("state")).unwrap();
        vm
    }

    /// Where all have one emulated CPU, whoever is slowed by others writes what a bystander does: that one is left out by name.
    fn spared(&self) -> &'static [&'static str] {
        if self.is_emulated { &["--never-vcpu", "0"] } else { &[] }
    }

    /// Pages that the writer writes round and round.
    fn pages(&self) -> u64 {
        self.writes_mib << 8
    }
}

fn stun_of(vm: &MovingVm, link: u64, more: &[&str]) -> Command {
    let mut command = dunlin();
    let pid = format!("pid:{}", vm.source.pid());
    command.args(["stun", &pid, "--follow-migration", "--bandwidth", &format!("{link}B/s"), "--json"]).args(more);
    command.arg("--run-dir").arg(vm.folder().join("run")).arg("--state-dir").arg(vm.folder().join("state"));
    command
}

/// Starts `dunlin stun`; its reports go to a file.
fn stun(vm: &MovingVm, link: u64, more: &[&str]) -> (OwnProcess, PathBuf) {
    let reports = vm.folder().join("reports");
    let mut command = stun_of(vm, link, &[&["--allow-foreign"], more].concat());
    let child = command.stdin(Stdio::null()).stdout(fs::File::create(&reports).unwrap()).spawn().unwrap();
    (OwnProcess::new(child), reports)
}

fn reports(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Groups that were made for these threads, wherever.
fn groups(threads: &[u32]) -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![PathBuf::from("/sys/fs/cgroup")]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if threads.iter().any(|thread| name.starts_with(&format!("dunlin-stun-{thread}."))) {
                found.push(entry.path());
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(entry.path());
            }
        }
    }
    found
}

/// Waits until the writer, and nobody else, is held by who says `words` there.
fn await_held(threads: &[u32], words: &Path) {
    let held = wait_for("the writer to be held", LIMIT, || (!groups(&threads[1..]).is_empty()).then_some(()));
    held.unwrap_or_else(|error| panic!("{error}: {}", fs::read_to_string(words).unwrap_or_default()));
    assert_eq!(groups(&threads[..1]), Vec::<PathBuf>::new(), "the bystander is held");
}

/// Waits until nothing is left; how long that took.
fn await_free(threads: &[u32]) -> Duration {
    let began = Instant::now();
    wait_for("everybody to be let go", LIMIT, || groups(threads).is_empty().then_some(())).unwrap();
    began.elapsed()
}

/// What a writer wrote per second in all these windows, if a second has `hz` ticks.
fn rate(windows: &[Window], hz: f64) -> f64 {
    let ticks: u64 = windows.iter().map(|window| window.end_tsc - window.start_tsc).sum();
    windows.iter().map(|window| window.written).sum::<u64>() as f64 / (ticks as f64 / hz)
}

fn hz(qemu: &Qemu) -> f64 {
    let lines = qemu.serial().lines();
    let ready = lines.iter().find(|line| line.starts_with("READY ")).unwrap();
    ready.split(' ').find_map(|word| word.strip_prefix("tsc_hz=")?.parse().ok()).unwrap()
}

/// The windows of a vCPU from now on: those that begin later.
fn next_windows(qemu: &Qemu, vcpu: u32, count: usize) -> Vec<Window> {
    let before = qemu.windows(vcpu).len();
    // One is under way.
    wait_for("a writer's windows", LIMIT, || {
        let windows = qemu.windows(vcpu);
        (windows.len() > before + count).then(|| windows[before + 1..].to_vec())
    })
    .unwrap()
}

/// Waits until the writer writes as it did; what that is.
fn at_full_rate(qemu: &Qemu, free: f64, hz: f64) -> f64 {
    wait_for("the writer to be at its full rate", LIMIT, || {
        Some(rate(&next_windows(qemu, 1, 1), hz)).filter(|&now| now > free / 2.0)
    })
    .unwrap()
}

#[test]
fn a_migration_that_does_not_end_ends_when_its_writer_is_slowed_and_nobody_else_is() {
    let scale = Scale::of_here();
    let mut vm = scale.boot();
    let (threads, hz) = (vm.source.vcpu_threads().unwrap(), hz(&vm.source));
    let free = rate(&next_windows(&vm.source, 1, 2), hz);
    vm.migrate(scale.link, 30).unwrap();
    // Rounds that do not shrink.
    for round in [2, 3, 4] {
        let info = vm.await_round(round, LIMIT).unwrap();
        let left = info["ram"]["remaining"].as_u64().unwrap() / 4096;
        println!("shows round {round} without stun: {left} pages of {} to be sent again", scale.pages());
        assert!(left > scale.pages() / 2, "it would end by itself: {info}");
    }
    // Of what came before only the last is what it writes by itself: at first it filled its pages, which takes as long as the host lets it.
    let before = next_windows(&vm.source, 0, 1);
    let count = vm.source.windows(0).len();
    let began = Instant::now();
    let monitor = vm.source.second_monitor().display().to_string();
    let (mut process, reported) = stun(&vm, scale.link, &["--qmp", &monitor]);
    let info = vm.await_end(LIMIT).unwrap();
    println!(
        "shows it ended {:.1} s after `dunlin stun` was started, in round {}, downtime {} ms",
        began.elapsed().as_secs_f64(),
        info["ram"]["dirty-sync-count"],
        info["downtime"]
    );
    let during: Vec<Window> = vm.source.windows(0).into_iter().skip(count + 1).collect();
    let (was, is) = (rate(&before, hz), rate(&during, hz));
    println!("shows the bystander: {was:.1} pages/s before, {is:.1} while the writer was held");
    // Held, it would write next to nothing.
    assert!(scale.is_emulated || !during.is_empty() && is > 0.8 * was, "{was} before, {is} during");
    // QEMU leaves the dirty log on; that nothing runs any more ends the command.
    assert_eq!(process.wait_for(LIMIT).unwrap().unwrap().code(), Some(0));
    assert_eq!(groups(&threads), Vec::<PathBuf>::new());
    let all = reports(&reported);
    let last = &all.last().unwrap()["stun"];
    println!("shows {last}");
    let [writer] = last["vcpus"].as_array().unwrap().as_slice() else { panic!("only the writer is held: {last:#}") };
    assert!(writer["vcpu"] == 1 && writer["held_ns"].as_u64() > Some(0), "{last:#}");
    let answers: Vec<f64> = all.iter().filter_map(|report| report["vmm_answers_ms"].as_f64()).collect();
    println!("shows QEMU answered within {answers:.1?} ms meanwhile");
    assert!(!answers.is_empty(), "{all:#?}");
    // At the target it writes as before.
    let at_target = at_full_rate(&vm.target, free, hz);
    println!("shows the writer: {free:.0} writes/s free, {at_target:.0} at the target");
}

#[test]
fn cancelled_killed_or_stopped_everybody_is_let_go() {
    let scale = Scale::of_here();
    let mut vm = scale.boot();
    let (threads, hz) = (vm.source.vcpu_threads().unwrap(), hz(&vm.source));
    let free = rate(&next_windows(&vm.source, 1, 2), hz);
    vm.migrate(scale.slow_link, 1).unwrap();
    // Lets go at once, or when the lease of a second ends.
    for (signal, limit_ms) in [(Signal::KILL, 700), (Signal::STOP, 2500)] {
        let (process, reported) = stun(&vm, scale.slow_link, scale.spared());
        await_held(&threads, &reported);
        process.signal(signal).unwrap();
        let took = await_free(&threads);
        println!("shows {signal:?}: everybody was let go {:.2} s later", took.as_secs_f64());
        assert!(scale.is_emulated || took < Duration::from_millis(limit_ms), "{signal:?}: {took:?}");
    }
    let (mut process, reported) = stun(&vm, scale.slow_link, scale.spared());
    await_held(&threads, &reported);
    assert_eq!(vm.progress().unwrap()["status"], "active");
    vm.source.order("migrate_cancel", json!({})).unwrap();
    let took = await_free(&threads);
    println!("shows migrate_cancel: everybody was let go {:.2} s later", took.as_secs_f64());
    assert!(scale.is_emulated || took < Duration::from_millis(1500), "{took:?}");
    assert_eq!(process.wait_for(LIMIT).unwrap().unwrap().code(), Some(0));
    let again = at_full_rate(&vm.source, free, hz);
    println!("shows the writer: {free:.0} writes/s before, {again:.0} after");
}

#[test]
fn a_vm_that_is_killed_while_its_writer_is_held_leaves_nothing() {
    let scale = Scale::of_here();
    let mut vm = scale.boot();
    let threads = vm.source.vcpu_threads().unwrap();
    vm.migrate(scale.slow_link, 1).unwrap();
    let errors = vm.folder().join("errors");
    let mut command = stun_of(&vm, scale.slow_link, &[&["--allow-foreign"], scale.spared()].concat());
    let child = command.stdout(Stdio::null()).stderr(fs::File::create(&errors).unwrap()).spawn().unwrap();
    let mut process = OwnProcess::new(child);
    await_held(&threads, &errors);
    vm.source.process_mut().signal(Signal::KILL).unwrap();
    vm.source.process_mut().wait_for(LIMIT).unwrap();
    let status = process.wait_for(LIMIT).unwrap().unwrap();
    let words = fs::read_to_string(&errors).unwrap();
    println!("shows a VM that is killed: exit code {:?}, {}", status.code(), words.trim());
    assert!(status.code() == Some(1) && words.contains("has ended"), "{status} {words}");
    assert_eq!(groups(&threads), Vec::<PathBuf>::new());
}

/// Where the CPU controller is.
fn hierarchy() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let of = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let has = match words[2] {
            "cgroup" => words[3].split(',').any(|option| option == "cpu"),
            "cgroup2" => fs::read_to_string(Path::new(words[1]).join("cgroup.controllers"))
                .is_ok_and(|all| all.split_whitespace().any(|one| one == "cpu")),
            _ => false,
        };
        has.then(|| PathBuf::from(words[1]))
    };
    mounts.lines().find_map(of).unwrap()
}

#[test]
fn where_no_group_can_be_made_nothing_is_begun_and_the_reason_is_told() {
    let vm = Scale::of_here().boot();
    let hierarchy = hierarchy().display().to_string();
    let said = |output: Output| (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned());
    // In a mount namespace of its own.
    let within = |first: &str| {
        let command = stun_of(&vm, 1 << 20, &["--allow-foreign", "--for", "1s"]);
        let mut other = Command::new("unshare");
        other.args(["--mount", "sh", "-c", &format!("{first} && exec \"$@\""), "sh"]);
        said(other.arg(command.get_program()).args(command.get_args()).output().unwrap())
    };
    let (code, words) = within(&format!("mount -o remount,bind,ro {hierarchy}"));
    println!("shows read-only cgroups: {}", words.trim());
    assert!(code == Some(1) && words.contains("Read-only") && words.contains("run this as root"), "{code:?} {words}");
    let (code, words) = within(&format!("umount -l {hierarchy}"));
    println!("shows no cgroups: {}", words.trim());
    assert!(code == Some(1) && words.contains("no cgroup hierarchy with the `cpu` controller"), "{code:?} {words}");
    // Without a permission, and with a monitor that is none.
    let (code, words) = said(stun_of(&vm, 1 << 20, &["--for", "1s"]).output().unwrap());
    assert!(code == Some(3) && words.contains("--allow-foreign"), "{code:?} {words}");
    let no_monitor = ["--allow-foreign", "--for", "1s", "--qmp", "/nowhere/qmp"];
    let (code, words) = said(stun_of(&vm, 1 << 20, &no_monitor).output().unwrap());
    assert!(code == Some(1) && words.contains("no monitor answers at /nowhere/qmp"), "{code:?} {words}");
}

/// A kernel that looks at quotas at its tick only would let it run for a tick, and hold it for as many periods as that is quotas.
#[test]
fn a_thread_at_the_least_share_is_held_for_no_longer_than_is_allowed() {
    const LONGEST: Duration = Duration::from_millis(50);
    let (tell, told) = mpsc::channel();
    let ends = Arc::new(AtomicBool::new(false));
    let own = Arc::clone(&ends);
    let busy = std::thread::spawn(move || {
        tell.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
        let (mut holds, mut last) = (Vec::new(), Instant::now());
        while !own.load(Ordering::Relaxed) {
            let now = Instant::now();
            // Shorter ones are the scheduler's.
            if now - last > LONGEST / 5 {
                holds.push(now - last);
            }
            last = now;
        }
        holds
    });
    let (pid, thread) = (std::process::id(), told.recv().unwrap());
    let mut child = dunlin().arg("stun-holder").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut orders, mut answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()).lines());
    let _holder = OwnProcess::new(child);
    let mut ask = |order: &str| {
        writeln!(orders, "{order}").unwrap();
        answers.next().unwrap().unwrap()
    };
    assert!(ask(&format!("longest-hold {}", LONGEST.as_micros())).starts_with("ok"));
    assert!(ask(&format!("take {pid} {thread}")).starts_with("ok"));
    assert!(ask(&format!("limit {thread} 0")).starts_with("ok 0.02 "));
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        std::thread::sleep(Duration::from_millis(200));
        assert!(ask("renew").starts_with("ok"));
    }
    assert!(ask(&format!("release {thread}")).starts_with("ok"));
    ends.store(true, Ordering::Relaxed);
    let mut holds = busy.join().unwrap();
    holds.sort_unstable();
    let (median, longest) = (holds[holds.len() / 2], holds[holds.len() - 1]);
    println!("shows {} holds at 2 % of a CPU: {median:.0?} in the middle, {longest:.0?} the longest", holds.len());
    assert!(Scale::of_here().is_emulated || median <= LONGEST + LONGEST / 5, "{holds:?}");
}

/// QEMU's own limit bites only where a dirty ring is full.
#[test]
fn the_vmm_itself_limits_its_writer_and_stops_that_when_who_asked_for_it_is_killed() {
    let scale = Scale::of_here();
    let mut vm = scale.boot_on("kvm,dirty-ring-size=4096");
    vm.migrate(scale.slow_link, 1).unwrap();
    let monitor = vm.source.second_monitor().display().to_string();
    let limits = |vm: &mut MovingVm| vm.source.order("query-vcpu-dirty-limit", json!({})).unwrap();
    assert_eq!(limits(&mut vm), json!([]));
    let (process, _) = stun(&vm, scale.slow_link, &["--qmp", &monitor, "--by", "qmp"]);
    // The limit comes down over the ramp.
    let link_mib = scale.slow_link.div_ceil(1 << 20);
    let told = wait_for("QEMU to be told of a limit", LIMIT, || {
        let all = limits(&mut vm);
        all[0]["limit-rate"].as_u64().is_some_and(|limit| limit <= link_mib).then_some(all)
    })
    .unwrap();
    println!("shows QEMU's own limit: {told}");
    assert!(told[0]["cpu-index"] == 1 && told[1].is_null(), "only the writer is limited: {told}");
    process.signal(Signal::STOP).unwrap();
    let began = Instant::now();
    wait_for("QEMU to limit nobody", LIMIT, || (limits(&mut vm) == json!([])).then_some(())).unwrap();
    println!("shows it was taken back {:.2} s after SIGSTOP", began.elapsed().as_secs_f64());
    assert!(scale.is_emulated || began.elapsed() < Duration::from_millis(3000));
}
