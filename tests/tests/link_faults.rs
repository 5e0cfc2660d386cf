//! The link between the managers cut and stalled while either stands at each of its steps, for good and for a while,
//! against the outcome table of [`dunlin::migrate::outcomes`].
#![cfg(target_arch = "x86_64")]

use std::time::Duration;

use anyhow::{Context, Result};
use dunlin::migrate::outcomes::Failure::{self, LinkCut, LinkCutHeals, LinkStallHeals, LinkStalls};
use dunlin::model::Step;
use dunlin_tests::hosted::HoldPoint;
use dunlin_tests::proxy::{Cut, Proxy};
use dunlin_tests::scene::{Host, MIGRATION_LIMIT, STEPS, Scene, in_scene, run_cells};

/// What both managers take for a stall: short, and still long for a busy host.
const STALL: &str = "2s";
/// A stall that heals is noticed by nobody who has not been told.
const SHORT_STALL: Duration = Duration::from_millis(300);

/// Whether either side still needs the link at that step.
fn is_linked((held, at): (Host, Step)) -> bool {
    !matches!((held, at), (Host::Source, Step::Discarded) | (Host::Target, Step::Running))
}

#[derive(Clone, Copy, Debug)]
struct Cell {
    held: Host,
    at: Step,
    failure: Failure,
    cut: Cut,
}

fn cells(failure: Failure) -> Vec<Cell> {
    let cell = |(index, &(held, at)): (usize, &(Host, Step))| {
        // Both ways to end a connection, in turn.
        let cut = if index % 2 == 0 { Cut::Reset } else { Cut::Close };
        Cell { held, at, failure, cut }
    };
    STEPS.iter().filter(|&&at| is_linked(at)).enumerate().map(cell).collect()
}

fn play(scene: &mut Scene, cell: Cell) -> Result<String> {
    let hold = HoldPoint::new(scene.host(cell.held), cell.at);
    let held_at = ["--hold-at", &hold.argument(), "--stall", STALL];
    let (migrate, receive) = match cell.held {
        Host::Source => (&held_at[..], &held_at[2..]),
        Host::Target => (&held_at[2..], &held_at[..]),
    };
    scene.listen(receive)?;
    let proxy = Proxy::new(scene.receiver.as_ref().context("no receiver")?.socket_address())?;
    scene.start_to(&proxy.address(), migrate)?;
    hold.await_held()?;
    scene.await_other_side(cell.held, cell.at)?;
    let window = scene.window();
    match cell.failure {
        LinkCut => proxy.cut(cell.cut, true),
        LinkCutHeals => proxy.cut(cell.cut, false),
        _ => proxy.stall(),
    }
    hold.release()?;
    if cell.failure == LinkStallHeals {
        // The length of a stall is what is tested.
        std::thread::sleep(SHORT_STALL);
        proxy.heal();
    }
    let ending = scene.end_of_migration(MIGRATION_LIMIT)?;
    let found = scene.check_against_table(cell.failure, window, ending)?;
    scene.settle(found, Host::Target)?;
    let code = ending.map_or("3".to_owned(), |ending| ending.exit_code().to_string());
    let (side, step) = (cell.held.name(), cell.at.name());
    Ok(format!("{side:>6} at {step:<11} {} [{window}]: exit {code}, {}{}", cell.failure, found.vm, found.copy_note()))
}

#[test]
fn the_link_is_cut_for_good_at_each_step() {
    run_cells(cells(LinkCut), |cell| in_scene(cell, play));
}

#[test]
fn the_link_is_cut_and_heals_at_each_step() {
    run_cells(cells(LinkCutHeals), |cell| in_scene(cell, play));
}

#[test]
fn the_link_stalls_for_good_at_each_step() {
    run_cells(cells(LinkStalls), |cell| in_scene(cell, play));
}

#[test]
fn the_link_stalls_for_a_while_at_each_step() {
    run_cells(cells(LinkStallHeals), |cell| in_scene(cell, play));
}
