//! Contact is lost, and managers die, while a VM runs at its target and its pages are still at its source: nothing of it is lost, and it goes on. Real KVM, real faults, real sockets.
#![cfg(target_arch = "x86_64")]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dunlin::migrate::outcomes::Whereabouts;
use dunlin::service::machine::RunState;
use dunlin_tests::hosted::{Running, TestHost, VM};
use dunlin_tests::hugepages::SetAside;
use dunlin_tests::proxy::{Cut, Proxy};
use dunlin_tests::scene::{Found, Host, MIGRATION_LIMIT, Scene, run_cells};
use dunlin_tests::wait::wait_for;

/// What both managers take for a stall.
const STALL: &str = "2s";
const LIMIT: Duration = Duration::from_secs(30);
/// Its pages take some seconds.
const SLOW: [&str; 4] = ["--bandwidth", "80Mbit", "--stall", STALL];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// All connections end; new ones are taken.
    CutHeals(Cut),
    /// Nothing moves until the source has noticed.
    Stalls,
    /// Nobody is reached until both have given up.
    Cut,
    SourceManagerDies,
    TargetManagerDies,
    BothManagersDie,
}

use Trouble::{BothManagersDie, Cut as CutForGood, CutHeals, SourceManagerDies, Stalls, TargetManagerDies};

#[derive(Clone, Copy, Debug)]
struct Cell {
    strategy: &'static str,
    trouble: Trouble,
}

/// A scene whose VM runs at the target and is owed pages; and what carries them.
fn owing(strategy: &str, doubt: &str, machine: &[&str]) -> Result<(Scene, Proxy)> {
    let (source, target) = (TestHost::new()?, TestHost::new()?);
    let vm = source.boot_with("96MiB", "dunlin.wl=ws:48M,rate:2000", machine)?;
    let mut scene = Scene { source, target, vm, receiver: None, migrate: None };
    scene.listen(&["--stall", STALL])?;
    let proxy = Proxy::new(scene.receiver.as_ref().context("no receiver")?.socket_address())?;
    // The last of two is the one that counts.
    let options = [&["--strategy", strategy], &SLOW[..]].concat();
    let events = scene.source.path("events").display().to_string();
    let options = [&["--events", events.as_str(), "--doubt", doubt], &options[..]].concat();
    scene.migrate = Some(scene.source.migrate(&proxy.address(), &options)?);
    wait_for("the VM to run at the target", LIMIT, || {
        scene.target.info().filter(|info| info.state == RunState::Running && info.owed_pages > Some(1000))
    })
    .with_context(|| scene.story())?;
    Ok((scene, proxy))
}

fn code(running: &mut Running) -> Result<Option<i32>> {
    running.exit_code(MIGRATION_LIMIT)
}

fn play(scene: &mut Scene, proxy: &Proxy, cell: Cell) -> Result<String> {
    let mut migrate = scene.migrate.take().context("no migration")?;
    match cell.trouble {
        CutHeals(how) => proxy.cut(how, false),
        Stalls => {
            proxy.stall();
            wait_for("the source to notice", LIMIT, || {
                let events = std::fs::read_to_string(scene.source.path("events")).ok()?;
                events.contains("contact is lost").then_some(())
            })?;
            proxy.heal();
        }
        CutForGood => proxy.cut(Cut::Reset, true),
        SourceManagerDies => migrate.kill()?,
        TargetManagerDies => scene.receiver.as_mut().context("no receiver")?.running.kill()?,
        BothManagersDie => {
            migrate.kill()?;
            scene.receiver.as_mut().context("no receiver")?.running.kill()?;
        }
    }
    let mut told = String::new();
    match cell.trouble {
        CutHeals(_) | Stalls => {
            ensure!(code(&mut migrate)? == Some(0), "{}", migrate.output.text());
            let owed = migrate.report().and_then(|report| report.post_copy).context("no report")?;
            ensure!(owed.recoveries >= 1, "{owed:?}");
            // Of a run in the middle of which contact was lost nobody knows how much has come.
            told += &format!(
                "{} pages sent for {} owed, over {} connections",
                owed.sent_pages,
                owed.owed_pages,
                owed.recoveries + 1
            );
        }
        CutForGood | TargetManagerDies => {
            ensure!(code(&mut migrate)? == Some(5), "{}", migrate.output.text());
            ensure!(migrate.output.text().contains("--recover"), "{}", migrate.output.text());
        }
        SourceManagerDies | BothManagersDie => {}
    }
    let before = scene.target.info().context("the VM is gone")?;
    ensure!(before.state == RunState::Running, "{before:?}");
    if !matches!(cell.trouble, CutHeals(_) | Stalls) {
        ensure!(before.owed_pages > Some(0), "it was too fast: {before:?}");
        proxy.heal();
        let mut to = None;
        if matches!(cell.trouble, TargetManagerDies | BothManagersDie) {
            let receiver = scene.target.receive(&["--recover", VM, "--stall", STALL])?;
            to = Some(receiver.address.clone());
            scene.receiver = Some(receiver);
        }
        // To where it was released, unless that has changed.
        let mut again = match &to {
            Some(to) => scene.source.migrate(to, &["--recover", "--stall", STALL])?,
            None => scene.source.recover(&["--stall", STALL])?,
        };
        ensure!(code(&mut again)? == Some(0), "{}\n{}", again.output.text(), scene.story());
        let owed = again.report().and_then(|report| report.post_copy).context("no report")?;
        told += &format!("{} of {:?} pages sent by the next manager", owed.sent_pages, before.owed_pages);
        ensure!(Some(owed.sent_pages) <= before.owed_pages, "what is there is not sent again: {owed:?} {before:?}");
    }
    let after = scene.target.info().context("the VM is gone")?;
    ensure!(after.owed_pages.is_none(), "{after:?}");
    scene.settle(Found { vm: Whereabouts::RunsAtTarget, copy_waits: false }, Host::Target)?;
    Ok(format!("{:>9}, {:?}: {told}", cell.strategy, cell.trouble))
}

#[test]
fn a_vm_that_is_owed_pages_goes_on_when_contact_or_a_manager_is_lost() {
    let troubles = [
        CutHeals(Cut::Reset),
        CutHeals(Cut::Close),
        Stalls,
        CutForGood,
        SourceManagerDies,
        TargetManagerDies,
        BothManagersDie,
    ];
    let cells = troubles.iter().enumerate().map(|(index, &trouble)| {
        let strategy = if index % 3 == 1 { "hybrid" } else { "post-copy" };
        Cell { strategy, trouble }
    });
    run_all(cells.collect(), &[]);
}

/// Blocks of which a part has come are nobody's whole, whoever asks for the rest.
#[test]
fn so_does_one_on_huge_pages() {
    let troubles = [CutHeals(Cut::Reset), TargetManagerDies, BothManagersDie];
    let _pages = SetAside::pages(troubles.len() as u64 * 2 * 48 + 2).unwrap();
    let cells = troubles.map(|trouble| Cell { strategy: "post-copy", trouble });
    run_all(cells.to_vec(), &["--hugepages"]);
}

fn run_all(cells: Vec<Cell>, machine: &[&str]) {
    run_cells(cells, |cell| {
        let doubt = if matches!(cell.trouble, CutForGood | TargetManagerDies) { "2s" } else { "30s" };
        let (mut scene, proxy) = owing(cell.strategy, doubt, machine)?;
        play(&mut scene, &proxy, cell).with_context(|| format!("{cell:?}\n{}", scene.story()))
    });
}

#[test]
fn only_a_vm_in_doubt_is_recovered() {
    let host = TestHost::new().unwrap();
    let _vm = host.boot(&[]).unwrap();
    let mut here = host.recover(&[]).unwrap();
    assert_eq!(here.exit_code(LIMIT).unwrap(), Some(3), "{}", here.output.text());
    assert!(here.output.text().contains("in doubt"), "{}", here.output.text());
    let mut there = host.receive(&["--recover", VM]).unwrap().running;
    assert_eq!(there.exit_code(LIMIT).unwrap(), Some(3), "{}", there.output.text());
    host.serial().await_beat().unwrap();
}
