//! `kill -9` of each manager and each machine while either manager stands at each of its steps, against the outcome table
//! of [`dunlin::migrate::outcomes`]: who runs the guest then, what the exit code says, what is left, and that the
//! operator's way out works.
#![cfg(target_arch = "x86_64")]

use anyhow::{Context, Result, ensure};
use dunlin::migrate::outcomes::Failure::{SourceMachineDies, SourceManagerDies, TargetMachineDies, TargetManagerDies};
use dunlin::migrate::outcomes::{Failure, Window};
use dunlin::model::outcome::exit;
use dunlin::model::{Ending, Step};
use dunlin_tests::hosted::HoldPoint;
use dunlin_tests::scene::{Host, MIGRATION_LIMIT, STEPS, Scene, in_scene, run_cells};
use rustix::process::Signal;

/// One cell of the matrix.
#[derive(Clone, Copy, Debug)]
struct Cell {
    held: Host,
    at: Step,
    victim: Failure,
    /// Where the operator lets a VM run that waits.
    settle_at: Host,
}

/// Whether the victim is there at that step.
fn exists(victim: Failure, held: Host, at: Step) -> bool {
    match (held, at) {
        (Host::Source, Step::Connected) | (Host::Target, Step::Offered) => victim != TargetMachineDies,
        (Host::Source, Step::Discarded) => victim != SourceMachineDies,
        // The source has let go and ended by then.
        (Host::Target, Step::Running) => !matches!(victim, SourceManagerDies | SourceMachineDies),
        _ => true,
    }
}

/// All cells of a victim; those that leave the VM waiting are settled both ways.
fn cells(victim: Failure) -> Vec<Cell> {
    let mut cells = Vec::new();
    for &(held, at) in STEPS.iter().filter(|&&(held, at)| exists(victim, held, at)) {
        let cell = Cell { held, at, victim, settle_at: Host::Target };
        cells.push(cell);
        let waits = matches!((victim, held, at), (SourceManagerDies | TargetManagerDies, Host::Source, Step::Released));
        if waits {
            cells.push(Cell { settle_at: Host::Source, ..cell });
        }
    }
    cells
}

fn strike(scene: &mut Scene, cell: Cell) -> Result<()> {
    match cell.victim {
        SourceManagerDies => scene.migrate.as_mut().context("no migration")?.kill(),
        SourceMachineDies => scene.source.kill_machine(),
        TargetManagerDies => scene.receiver.as_mut().context("no receiver")?.running.kill(),
        _ => scene.target.kill_machine(),
    }
}

fn play(scene: &mut Scene, cell: Cell) -> Result<String> {
    let hold = HoldPoint::new(scene.host(cell.held), cell.at);
    match cell.held {
        Host::Source => scene.start(&["--hold-at", &hold.argument()], &[])?,
        Host::Target => scene.start(&[], &["--hold-at", &hold.argument()])?,
    }
    hold.await_held()?;
    scene.await_other_side(cell.held, cell.at)?;
    strike(scene, cell)?;
    let window = scene.window();
    hold.release()?;
    let killed = cell.victim == SourceManagerDies;
    let ending = if killed { None } else { scene.end_of_migration(MIGRATION_LIMIT)? };
    let found = scene.check_against_table(cell.victim, window, ending)?;
    if cell.victim == SourceManagerDies && window == Window::BeforePrepared {
        let log_on = scene.source.info().context("no VM at the source")?.dirty_log_on;
        ensure!(!log_on, "the dirty log is on though its manager is dead");
    }
    scene.settle(found, cell.settle_at)?;
    let code = ending.map_or("killed".to_owned(), |ending| ending.exit_code().to_string());
    Ok(format!(
        "{:>6} at {:<11} {} [{window}]: exit {code}, {}{}",
        cell.held.name(),
        cell.at.name(),
        cell.victim,
        found.vm,
        found.copy_note()
    ))
}

/// Ctrl-C at the manager that is held. Up to `prepared` the VM stays at the source, whoever asks; later it moves.
fn cancel((held, at): (Host, Step)) -> Result<String> {
    let mut scene = Scene::new(&[])?;
    let told = play_cancel(&mut scene, held, at);
    told.with_context(|| format!("Ctrl-C at the {} at {at}\n{}", held.name(), scene.story()))
}

fn play_cancel(scene: &mut Scene, held: Host, at: Step) -> Result<String> {
    let hold = HoldPoint::new(scene.host(held), at);
    let held_at = ["--hold-at", &hold.argument()];
    match held {
        Host::Source => scene.start(&held_at, &[])?,
        Host::Target => scene.start(&[], &held_at)?,
    }
    hold.await_held()?;
    scene.await_other_side(held, at)?;
    let window = scene.window();
    match held {
        Host::Source => scene.migrate.as_ref().context("no migration")?.process.signal(Signal::INT)?,
        Host::Target => scene.receiver.as_ref().context("no receiver")?.running.process.signal(Signal::INT)?,
    }
    hold.release()?;
    let ending = scene.end_of_migration(MIGRATION_LIMIT)?;
    let found = scene.check_against_table(Failure::Cancelled, window, ending)?;
    let in_time = matches!(window, Window::BeforePrepared | Window::Prepared);
    let wanted = match held {
        Host::Source if in_time => Ending::Cancelled,
        Host::Target if window == Window::BeforePrepared => Ending::Failed,
        _ => Ending::Moved,
    };
    ensure!(ending == Some(wanted), "ended {ending:?} instead of {wanted:?}");
    if held == Host::Target {
        let code = scene.receiver.as_mut().context("no receiver")?.running.exit_code(MIGRATION_LIMIT)?;
        let wanted = if wanted == Ending::Moved { exit::DONE } else { exit::CANCELLED };
        ensure!(code == Some(i32::from(wanted)), "the receiver's exit code is {code:?}");
    }
    scene.settle(found, Host::Target)?;
    Ok(format!("{:>6} at {:<11} Ctrl-C [{window}]: exit {}, {}", held.name(), at.name(), wanted.exit_code(), found.vm))
}

#[test]
fn ctrl_c_at_each_step() {
    run_cells(STEPS.to_vec(), cancel);
}

#[test]
fn the_sources_manager_is_killed_at_each_step() {
    run_cells(cells(SourceManagerDies), |cell| in_scene(cell, play));
}

#[test]
fn the_sources_machine_is_killed_at_each_step() {
    run_cells(cells(SourceMachineDies), |cell| in_scene(cell, play));
}

#[test]
fn the_targets_manager_is_killed_at_each_step() {
    run_cells(cells(TargetManagerDies), |cell| in_scene(cell, play));
}

#[test]
fn the_targets_machine_is_killed_at_each_step() {
    run_cells(cells(TargetMachineDies), |cell| in_scene(cell, play));
}
