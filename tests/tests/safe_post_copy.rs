//! `--safe-post-copy`: a VM runs at its target on loan while it is owed pages, and goes on at its source when the target, its manager or the link is lost. Real KVM, real faults, real sockets. The guest
//! itself checks before each write that a page holds what it wrote there last: one that went back to a mixture of two moments would say so.
#![cfg(target_arch = "x86_64")]

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dunlin::kvm::Hurry;
use dunlin::migrate::Strategy;
use dunlin::migrate::outcomes::Whereabouts;
use dunlin::model::DirtyLogKind;
use dunlin::port::JournalRecord;
use dunlin::service::machine::RunState;
use dunlin_tests::client::EchoClient;
use dunlin_tests::hosted::TestHost;
use dunlin_tests::proxy::{Cut, Proxy};
use dunlin_tests::rig::Side;
use dunlin_tests::scene::{Found, Host, MIGRATION_LIMIT, Scene, run_cells};
use dunlin_tests::wait::wait_for;
use dunlin_tests::{HopOptions, Rig, VmSpec, guest};

const LIMIT: Duration = Duration::from_secs(30);
/// Its pages take some seconds, and it is lent for two at a time.
const SAFE: [&str; 9] =
    ["--bandwidth", "80Mbit", "--stall", "2s", "--safe-post-copy", "--lease", "2s", "--increment-every", "50ms"];

/// There and back under a client's eyes, with a disk: what was held has gone out, once and in order, and what was written is there.
fn there_and_back(dirty_log: DirtyLogKind, strategy: Strategy) {
    let mut rig = Rig::boot(&VmSpec::busy(2, dirty_log)).unwrap();
    let echo = rig.client.enter(|| EchoClient::start(Rig::echo_address(), Duration::from_millis(2))).unwrap();
    echo.wait_answers(50, LIMIT).unwrap();
    let more = ["--safe-post-copy", "--increment-every", "20ms", "--bandwidth", "800Mbit"];
    let options =
        HopOptions { strategy, more: more.iter().map(|&word| word.to_owned()).collect(), ..HopOptions::default() };
    for side in [Side::B, Side::A] {
        let hop = rig.hop(&options).unwrap();
        println!("shows {}", serde_json::to_string(&hop.report).unwrap());
        assert_eq!((hop.exit_code, hop.source_exit_code, rig.at()), (Some(0), Some(0), side), "{hop:#?}");
        assert_eq!(hop.report.blackout.total_ns(), hop.report.blackout_ns, "the ledger adds up");
        let loan = hop.report.loan.as_ref().unwrap();
        // How many become safe is a matter of what else the host does.
        assert!(loan.increments > 0 && loan.pages > 0 && loan.taken_back_increment.is_none(), "{loan:?}");
        assert!(loan.stood_ns > 0 && loan.safe_max_ns >= loan.safe_p50_ns / 2, "{loan:?}");
        let counters = rig.counters().unwrap();
        assert_eq!(guest::errors(&counters), Vec::<String>::new(), "{counters:#}");
        rig.verify_inside().unwrap();
    }
    echo.wait_answers(100, LIMIT).unwrap();
    let echo = echo.finish(LIMIT);
    assert_eq!((&echo.fault, echo.answered), (&None, echo.sent));
    assert!(rig.stop().unwrap().success());
}

#[test]
fn on_loan_there_and_back_with_disk_and_two_vcpus() {
    there_and_back(DirtyLogKind::Bitmap, Strategy::PostCopy);
}

#[test]
fn on_loan_after_a_round_with_dirty_rings() {
    there_and_back(DirtyLogKind::Ring, Strategy::Hybrid);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    TargetMachineDies,
    TargetManagerDies,
    /// Nobody is reached any more.
    LinkCut,
    /// Nothing moves any more, and nobody is told.
    LinkStalls,
    /// All connections end; new ones are taken.
    LinkCutHeals,
    Cancelled,
    /// Another one goes on with the loan.
    SourceManagerDies,
    /// It cannot be taken back any more.
    SourceMachineDies,
}

use Trouble::{
    Cancelled, LinkCut, LinkCutHeals, LinkStalls, SourceMachineDies, SourceManagerDies, TargetMachineDies,
    TargetManagerDies,
};

/// A scene whose VM runs at the target on loan, and has sent some increments back.
fn on_loan(strategy: &str) -> Result<(Scene, Proxy)> {
    let (source, target) = (TestHost::new()?, TestHost::new()?);
    let vm = source.boot_with("96MiB", "dunlin.wl=ws:48M,rate:2000", &[])?;
    let mut scene = Scene { source, target, vm, receiver: None, migrate: None };
    scene.listen(&["--stall", "2s"])?;
    let proxy = Proxy::new(scene.receiver.as_ref().context("no receiver")?.socket_address())?;
    let events = scene.source.path("events").display().to_string();
    let options = [&["--events", &events, "--strategy", strategy, "--doubt", "3s"], &SAFE[..]].concat();
    scene.migrate = Some(scene.source.migrate(&proxy.address(), &options)?);
    wait_for("the VM to run at the target on loan", LIMIT, || {
        scene.target.info().filter(|info| info.state == RunState::Borrowed && info.owed_pages > Some(1000))
    })
    .with_context(|| scene.story())?;
    // It has done something there that is to be found again.
    wait_for("an increment", LIMIT, || {
        let told = std::fs::read_to_string(&events).ok()?;
        told.contains("increment is safe").then_some(())
    })
    .with_context(|| scene.story())?;
    session_is_in_front(scene.target.info().context("no VM there")?.pid)?;
    Ok((scene, proxy))
}

/// The scheduling policy (field 41 of `/proc/PID/task/TID/stat`) of a thread.
fn policy(task: &Path) -> Result<u64> {
    let stat = std::fs::read_to_string(task.join("stat"))?;
    let fields = stat.rsplit_once(')').context("no name")?.1;
    Ok(fields.split_ascii_whitespace().nth(38).context("no policy")?.parse()?)
}

/// Increments wait for nobody else's work: who takes the manager's orders in the VM's machine is in front of it from one to the next, where that may be.
fn session_is_in_front(pid: u32) -> Result<()> {
    let foremost = {
        let _hurry = Hurry::here();
        policy(Path::new("/proc/thread-self"))?
    };
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))?.flatten().map(|task| task.path());
    let mut sessions =
        tasks.filter(|task| std::fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == "session"));
    let session = sessions.next().context("no thread of a session")?;
    ensure!(policy(&session)? == foremost, "the session's policy is {}, not {foremost}", policy(&session)?);
    Ok(())
}

fn play(scene: &mut Scene, proxy: &Proxy, trouble: Trouble) -> Result<String> {
    let mut migrate = scene.migrate.take().context("no migration")?;
    ensure!(matches!(scene.source.journal(None), Some(JournalRecord::Lent { .. })), "{:?}", scene.source.journal(None));
    match trouble {
        TargetMachineDies => scene.target.kill_machine()?,
        TargetManagerDies => scene.receiver.as_mut().context("no receiver")?.running.kill()?,
        LinkCut => proxy.cut(Cut::Reset, true),
        LinkStalls => proxy.stall(),
        LinkCutHeals => proxy.cut(Cut::Reset, false),
        Cancelled => ensure!(scene.source.cancel_migration()? == 0, "{}", migrate.output.text()),
        SourceManagerDies => {
            migrate.kill()?;
            wait_for("the loan to end", LIMIT, || {
                let told = scene.target.story().contains("the loan of the VM is over");
                told.then_some(())
            })?;
            ensure!(scene.source.info().context("gone")?.state == RunState::Lent, "{:?}", scene.source.info());
            migrate = scene.source.recover(&["--stall", "2s", "--bandwidth", "80Mbit"])?;
        }
        SourceMachineDies => scene.source.kill_machine()?,
    }
    let code = migrate.exit_code(MIGRATION_LIMIT)?;
    let loan = migrate.report().and_then(|report| report.loan).context("no report of the loan")?;
    let moved = matches!(trouble, LinkCutHeals | SourceManagerDies | SourceMachineDies);
    let expected = match trouble {
        _ if moved => 0,
        Cancelled => 6,
        _ => 4,
    };
    ensure!(code == Some(expected), "exit {code:?}: {}", migrate.output.text());
    ensure!(loan.increments > 0, "{loan:?}");
    let (vm, told) = if moved {
        ensure!(loan.taken_back_increment.is_none(), "{loan:?}");
        (Whereabouts::RunsAtTarget, "it went on at the target")
    } else {
        ensure!(loan.taken_back_increment > Some(0), "{loan:?}");
        (Whereabouts::RunsAtSource, "it went on at the source")
    };
    // Whoever could not be told holds a copy that stands.
    let copy_waits = scene.target.machine().is_some() && !moved;
    ensure!(
        !copy_waits || matches!(trouble, TargetManagerDies | LinkCut | LinkStalls),
        "a copy was left: {}",
        migrate.output.text()
    );
    // What was held back would reach the copy.
    if trouble != LinkStalls {
        proxy.heal();
    }
    scene.settle(Found { vm, copy_waits }, Host::Source)?;
    Ok(format!(
        "{trouble:?}: {told} behind {} increments, for which it stood {:?}, {:?} the longest",
        loan.increments,
        Duration::from_nanos(loan.stood_ns),
        Duration::from_nanos(loan.longest_stand_ns)
    ))
}

#[test]
fn a_vm_on_loan_goes_on_whatever_is_lost() {
    let troubles = vec![
        TargetMachineDies,
        TargetManagerDies,
        LinkCut,
        LinkStalls,
        LinkCutHeals,
        Cancelled,
        SourceManagerDies,
        SourceMachineDies,
    ];
    run_cells(troubles, |trouble| {
        let strategy = if matches!(trouble, LinkCut | SourceManagerDies) { "hybrid" } else { "post-copy" };
        let (mut scene, proxy) = on_loan(strategy)?;
        play(&mut scene, &proxy, trouble).with_context(|| format!("{trouble:?}\n{}", scene.story()))
    });
}

#[test]
fn only_a_vm_that_runs_there_before_its_memory_is_kept_safe() {
    let host = TestHost::new().unwrap();
    let _vm = host.boot(&[]).unwrap();
    for (options, says) in [
        (&["--safe-post-copy"][..], "--strategy post-copy"),
        (&["--strategy", "post-copy", "--safe-post-copy", "--lease", "10ms"], "between 500"),
        (&["--strategy", "post-copy", "--safe-post-copy", "--increment-every", "1ms"], "between 5"),
        (&["--strategy", "post-copy", "--lease", "1s"], "--safe-post-copy"),
    ] {
        let mut refused = host.migrate("tcp://127.0.0.1:1", options).unwrap();
        assert_eq!(refused.exit_code(LIMIT).unwrap(), Some(2), "{}", refused.output.text());
        assert!(refused.output.text().contains(says), "{}", refused.output.text());
    }
    host.serial().await_beat().unwrap();
}
