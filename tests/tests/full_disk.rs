//! A full disk under the journal of either host, from before the migration or from a step of it on, against the outcome
//! table of [`dunlin::migrate::outcomes`].
#![cfg(target_arch = "x86_64")]

use anyhow::{Context, Result, ensure};
use dunlin::migrate::outcomes::Failure::{SourceDiskFull, TargetDiskFull};
use dunlin::migrate::outcomes::Window;
use dunlin::model::outcome::exit;
use dunlin::model::{Ending, Step};
use dunlin_tests::disk::{SmallDisk, in_own_mounts};
use dunlin_tests::hosted::{HoldPoint, TestHost};
use dunlin_tests::scene::{Host, MIGRATION_LIMIT, Scene, run_cells};

#[derive(Clone, Copy, Debug)]
struct Cell {
    full: Host,
    /// From which step of that host's manager on; `None` is from the start.
    from: Option<Step>,
    /// `None`: it was refused before it began.
    ends: Option<Ending>,
}

const fn cell(full: Host, from: Option<Step>, ends: Option<Ending>) -> Cell {
    Cell { full, from, ends }
}

const CELLS: &[Cell] = &[
    cell(Host::Source, None, None),
    cell(Host::Source, Some(Step::Prepared), Some(Ending::Failed)),
    cell(Host::Source, Some(Step::Released), Some(Ending::Moved)),
    cell(Host::Source, Some(Step::Running), Some(Ending::Moved)),
    cell(Host::Target, None, Some(Ending::Refused)),
    cell(Host::Target, Some(Step::Reserved), Some(Ending::Failed)),
    // `prepared` is journaled by then; the next record is `owner`.
    cell(Host::Target, Some(Step::StateMoved), Some(Ending::InDoubt)),
    cell(Host::Target, Some(Step::Prepared), Some(Ending::InDoubt)),
    cell(Host::Target, Some(Step::Owned), Some(Ending::Moved)),
];

fn run(cell: Cell) -> Result<String> {
    in_own_mounts(|| {
        let disk = SmallDisk::mount()?;
        let small = |host: TestHost| host.with_state_dir(disk.path().join("state"));
        let (source, target) = match cell.full {
            Host::Source => (small(TestHost::new()?), TestHost::new()?),
            Host::Target => (TestHost::new()?, small(TestHost::new()?)),
        };
        let mut scene = Scene::on(source, target, &[])?;
        let told = play(&mut scene, &disk, cell);
        told.with_context(|| format!("{cell:?}\n{}", scene.story()))
    })
}

fn play(scene: &mut Scene, disk: &SmallDisk, cell: Cell) -> Result<String> {
    let mut window = Window::BeforePrepared;
    if let Some(step) = cell.from {
        let hold = HoldPoint::new(scene.host(cell.full), step);
        let held_at = ["--hold-at", &hold.argument()];
        match cell.full {
            Host::Source => scene.start(&held_at, &[])?,
            Host::Target => scene.start(&[], &held_at)?,
        }
        hold.await_held()?;
        scene.await_other_side(cell.full, step)?;
        window = scene.journaled_window();
        disk.freeze()?;
        hold.release()?;
    } else {
        scene.listen(&[])?;
        disk.fill()?;
        let address = scene.receiver.as_ref().context("no receiver")?.address.clone();
        scene.start_to(&address, &[])?;
    }
    let ending = scene.end_of_migration(MIGRATION_LIMIT)?;
    ensure!(ending == cell.ends, "it ended {ending:?} instead of {:?}", cell.ends);
    let failure = if cell.full == Host::Source { SourceDiskFull } else { TargetDiskFull };
    let found = scene.check_against_table(failure, window, ending)?;
    disk.make_room()?;
    scene.settle(found, Host::Target)?;
    let code = ending.map_or(exit::REFUSED, Ending::exit_code);
    let from = cell.from.map_or("start", Step::name);
    Ok(format!("{failure} from {from} on [{window}]: exit {code}, {}", found.vm))
}

#[test]
fn a_full_disk_under_a_journal_loses_no_vm() {
    run_cells(CELLS.to_vec(), run);
}
