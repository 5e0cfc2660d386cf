//! A migration under way is seen and steered from other processes: its status, its limit, its cancel; and whoever speaks nonsense to it disturbs nobody.
//!
//! Migrations are slow by a bandwidth limit, so that there is time to look. Rates are asserted with room for a busy host.
#![cfg(target_arch = "x86_64")]

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use dunlin::model::outcome::exit;
use dunlin::model::{Ending, MigrationReport, MigrationStatus, Step};
use dunlin::service::machine::RunState;
use dunlin_tests::dunlin;
use dunlin_tests::hosted::{HoldPoint, Receiver, Running, TestHost, VM};
use dunlin_tests::scene::MIGRATION_LIMIT;
use dunlin_tests::wait::wait_for;

const LIMIT: Duration = Duration::from_secs(30);
/// What migrations begin with.
const SLOW: &str = "100Mbit";
const SLOW_BYTES: f64 = 12.5e6;
/// Much that is not zero, and is written again.
const WORKLOAD: &str = "dunlin.wl0=ws:96M,rate:20000";

const GARBAGE: [u8; 4096] = [0xff; 4096];

/// Two hosts with a VM and a slow migration between them.
struct Scene {
    source: TestHost,
    target: TestHost,
    _vm: Running,
    receiver: Receiver,
    manager: Running,
}

/// What a command said: exit code, standard output, standard error.
type Said = (Option<i32>, String, String);

fn said(command: &mut Command) -> Said {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn steer(host: &TestHost, words: &[&str]) -> Said {
    said(dunlin().args(["migrate", VM]).args(words).arg("--run-dir").arg(host.run_dir()))
}

fn status(host: &TestHost) -> Option<MigrationStatus> {
    let (code, out, _) = steer(host, &["--status", "--json"]);
    (code == Some(0)).then(|| serde_json::from_str(&out).unwrap())
}

impl Scene {
    fn begin(options: &[&str]) -> Self {
        let (source, target) = (TestHost::new().unwrap(), TestHost::new().unwrap());
        let vm = source.boot_with("256MiB", WORKLOAD, &[]).unwrap();
        let receiver = target.receive(&[]).unwrap();
        let manager = source.migrate(&receiver.address, options).unwrap();
        Self { source, target, _vm: vm, receiver, manager }
    }

    /// The status, when it is as `wanted`.
    fn await_status(&self, what: &str, mut wanted: impl FnMut(&MigrationStatus) -> bool) -> MigrationStatus {
        wait_for(what, LIMIT, || status(&self.source).filter(&mut wanted)).unwrap_or_else(|error| {
            panic!("{error}: {:?}\n{}{}", status(&self.source), self.source.story(), self.target.story())
        })
    }

    fn goodput(&self, what: &str, least: f64, most: f64) -> f64 {
        let fits = |status: &MigrationStatus| (least..most).contains(&(status.goodput_bytes_per_second as f64));
        self.await_status(what, fits).goodput_bytes_per_second as f64
    }

    /// The VM runs at the source, with its log off, and nothing of the migration is left there.
    fn runs_at_the_source(&self) {
        let info = self.source.info().unwrap();
        assert!(info.state == RunState::Running && !info.dirty_log_on, "{info:?}");
        self.source.serial().await_beat().unwrap();
        assert!(!self.socket().exists());
    }

    fn socket(&self) -> PathBuf {
        self.source.run_dir().join(VM).join("migrate.sock")
    }

    fn ends(&mut self, ending: Ending) -> MigrationReport {
        let code = self.manager.exit_code(MIGRATION_LIMIT).unwrap();
        assert_eq!(code, Some(i32::from(ending.exit_code())), "{}", self.manager.output.text());
        let report = self.manager.report().unwrap();
        assert_eq!(report.ending, ending, "{report:?}");
        report
    }
}

#[test]
fn a_migration_is_seen_moving_its_limit_is_changed_and_it_is_cancelled() {
    let mut scene = Scene::begin(&["--bandwidth", SLOW]);
    let first = scene.await_status("the first pages", |status| status.round == 1 && status.sent_pages > 0);
    assert_eq!((first.step, first.vm_name.as_str(), first.due_pages), (Step::Round, VM, 65_536));
    assert!(
        first.pid == scene.manager.process.id() && first.can_be_cancelled && first.target == scene.receiver.address
    );
    let later = scene.await_status("more pages", |status| status.sent_pages > first.sent_pages);
    assert!(later.sent_bytes > first.sent_bytes && later.elapsed_ns > first.elapsed_ns, "{first:?} {later:?}");
    assert!(later.round_ends_in_ns.is_some() && later.throttle.is_none());
    let slow = scene.goodput("100 Mbit/s", SLOW_BYTES * 0.8, SLOW_BYTES * 1.1);
    // Another one is refused, and does not take the first one's socket.
    let mut other = scene.source.migrate(&scene.receiver.address, &[]).unwrap();
    assert_eq!(other.exit_code(LIMIT).unwrap(), Some(i32::from(exit::REFUSED)), "{}", other.output.text());
    assert_eq!(status(&scene.source).unwrap().pid, first.pid);
    let (code, out, err) = steer(&scene.source, &["--set", "bandwidth=300Mbit"]);
    assert!(code == Some(0) && out.contains("35.76 MiB/s"), "{out}{err}");
    let fast = scene.goodput("300 Mbit/s", SLOW_BYTES * 2.0, SLOW_BYTES * 3.3);
    let (code, ..) = steer(&scene.source, &["--set", "bandwidth=20Mbit"]);
    assert_eq!(code, Some(0));
    let slowest = scene.goodput("20 Mbit/s", SLOW_BYTES * 0.1, SLOW_BYTES * 0.25);
    println!("shows goodput at 100, 300, 20 Mbit/s: {slow}, {fast}, {slowest} bytes/s");
    let (code, _, err) = steer(&scene.source, &["--set", "bandwidth=1bit"]);
    assert!(code == Some(2) && err.contains("bandwidth"), "{err}");
    let (code, _, err) = steer(&scene.source, &["--set", "bandwidth=1kbit"]);
    assert!(code == Some(3) && err.contains("less than a page"), "{err}");
    let text = steer(&scene.source, &["--status"]).1;
    println!("shows {text}");
    assert!(text.contains("limit 2.38 MiB/s") && text.contains("round ends in"), "{text}");
    let (code, out, err) = steer(&scene.source, &["--cancel", "--json"]);
    assert_eq!(code, Some(0), "{out}{err}");
    let told: MigrationReport = serde_json::from_str(&out).unwrap();
    assert_eq!(told.ending, Ending::Cancelled);
    assert_eq!(scene.ends(Ending::Cancelled), told);
    scene.runs_at_the_source();
    let audit = fs::read_to_string(scene.source.state_dir().join("audit.log")).unwrap();
    assert_eq!((audit.matches("set-migration-bandwidth").count(), audit.matches("cancel-migration").count()), (2, 1));
}

#[test]
fn where_there_is_no_migration_that_is_said_and_one_that_a_killed_manager_left_is_none() {
    let mut scene = Scene::begin(&["--bandwidth", SLOW]);
    scene.await_status("the first pages", |status| status.sent_pages > 0);
    scene.manager.kill().unwrap();
    assert!(scene.socket().exists(), "who was killed takes nothing away");
    wait_for("the VM to be let go", LIMIT, || scene.source.info().filter(|info| !info.dirty_log_on)).unwrap();
    for words in [&["--status"][..], &["--cancel"], &["--set", "bandwidth=none"]] {
        let (code, out, err) = steer(&scene.source, words);
        assert!(code == Some(3) && out.is_empty() && err.contains("no migration of `vm` runs"), "{words:?}: {err}");
        let (code, _, err) =
            said(dunlin().args(["migrate", "nobody"]).args(words).arg("--run-dir").arg(scene.source.run_dir()));
        assert!(code == Some(3) && err.contains("vm list"), "{words:?}: {err}");
    }
    // The next one takes the place, and ends well.
    scene.receiver = scene.target.receive(&[]).unwrap();
    scene.manager = scene.source.migrate(&scene.receiver.address, &["--bandwidth", SLOW]).unwrap();
    let pid = scene.manager.process.id();
    scene.await_status("the next migration", |status| status.pid == pid && status.sent_pages > 0);
    assert_eq!(steer(&scene.source, &["--set", "bandwidth=none"]).0, Some(0));
    let report = scene.ends(Ending::Moved);
    assert!(report.reason.is_empty(), "{report:?}");
    wait_for("the VM at the target", LIMIT, || scene.target.info().filter(|info| info.state == RunState::Running))
        .unwrap();
    let (code, _, err) = steer(&scene.source, &["--status"]);
    assert!(code == Some(3) && err.contains("no VM"), "{err}");
}

#[test]
fn past_the_point_of_no_return_a_cancel_is_refused() {
    let host = TestHost::new().unwrap();
    let hold = HoldPoint::new(&host, Step::Released);
    let mut scene = Scene::begin(&["--hold-at", &hold.argument()]);
    hold.await_held().unwrap();
    let late = status(&scene.source).unwrap();
    assert!(late.step == Step::Released && !late.can_be_cancelled, "{late:?}");
    let (code, _, err) = steer(&scene.source, &["--cancel"]);
    assert!(code == Some(3) && err.contains("too late") && err.contains("point of no return"), "{err}");
    hold.release().unwrap();
    scene.ends(Ending::Moved);
}

#[test]
fn writers_that_are_slowed_are_seen() {
    let scene = Scene::begin(&["--bandwidth", SLOW, "--on-stuck", "stun"]);
    let limited = |status: &MigrationStatus| {
        let throttle = status.throttle.as_ref();
        throttle.is_some_and(|throttle| throttle.stunned && throttle.vcpus[0].limit_pages_per_second.is_some())
    };
    let stunned = scene.await_status("a writer that is slowed", limited);
    let before = stunned.throttle.unwrap().vcpus[0].limit_pages_per_second.unwrap();
    // What the link carries is what they may write a part of.
    assert_eq!(steer(&scene.source, &["--set", "bandwidth=20Mbit"]).0, Some(0));
    let after = scene.await_status("a lower limit", |status| {
        let limit = status.throttle.as_ref().and_then(|throttle| throttle.vcpus.first()?.limit_pages_per_second);
        limit.is_some_and(|limit| limit < before / 2.0)
    });
    println!(
        "shows limits at 100 and 20 Mbit/s: {before} and {:?} pages/s",
        after.throttle.unwrap().vcpus[0].limit_pages_per_second
    );
    assert_eq!(steer(&scene.source, &["--cancel"]).0, Some(0));
    scene.runs_at_the_source();
}

/// Silence, half requests and garbage on as many connections as a process may have.
#[test]
fn a_hostile_client_does_not_disturb_a_migration() {
    let mut scene = Scene::begin(&["--bandwidth", "200Mbit", "--max-rounds", "2"]);
    scene.await_status("the first pages", |status| status.sent_pages > 0);
    let words: [&[u8]; 4] = [b"", b"GET /v1/migration HTTP/1.1\r\nhost:", b"POST /v1/cancel HTTP/1.1\r\nx: ", &GARBAGE];
    let path = scene.socket();
    let mut streams = Vec::new();
    let flood = std::thread::spawn(move || {
        for index in 0..1000 {
            let Ok(mut stream) = UnixStream::connect(&path) else { break };
            let _cut_off = stream.write_all(words[index % words.len()]);
            streams.push(stream);
        }
        streams
    });
    let mut most = 0;
    wait_for("the first round", LIMIT, || {
        let open = fs::read_dir(format!("/proc/{}/fd", scene.manager.process.id())).map_or(0, Iterator::count);
        most = most.max(open);
        (scene.manager.process.wait_for(Duration::ZERO).unwrap().is_some() || flood.is_finished()).then_some(())
    })
    .unwrap();
    assert!(most < 150, "{most} files are open in the manager");
    let report = scene.ends(Ending::Moved);
    let first = &report.rounds[0];
    let goodput = first.wire_bytes as f64 / (first.duration_ns as f64 / 1e9);
    println!(
        "shows under 1000 hostile connections: {goodput} bytes/s of 25e6, at most {most} files, blackout {} ms",
        report.blackout_ns as f64 / 1e6
    );
    assert!(goodput > 25e6 * 0.7, "{report:?}");
    let mut cut_off = 0;
    for mut stream in flood.join().unwrap() {
        let mut answer = Vec::new();
        let _reset = stream.read_to_end(&mut answer);
        cut_off += 1;
    }
    println!("shows {cut_off} of them cut off");
}

#[test]
fn only_root_and_the_managers_user_get_in() {
    let scene = Scene::begin(&["--bandwidth", SLOW]);
    scene.await_status("the first pages", |status| status.sent_pages > 0);
    let socket = scene.socket();
    let ask = || {
        let mut curl = Command::new("curl");
        curl.args(["-s", "--max-time", "20", "-X", "POST", "--unix-socket"]).arg(&socket).arg("http://vm/v1/cancel");
        said(curl.uid(65_534).gid(65_534))
    };
    let folder = scene.source.run_dir();
    for path in [folder.parent().unwrap(), &folder, &folder.join(VM)] {
        fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    }
    assert_ne!(ask().0, Some(0), "the socket lets anybody connect");
    fs::set_permissions(&socket, Permissions::from_mode(0o666)).unwrap();
    let (code, out, _) = ask();
    assert!(code == Some(0) && out.contains("uid=65534") && out.contains("may look but not act"), "{out}");
    assert!(status(&scene.source).is_some());
    assert_eq!(steer(&scene.source, &["--cancel"]).0, Some(0));
    scene.runs_at_the_source();
}
