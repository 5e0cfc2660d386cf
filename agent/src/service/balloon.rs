//! What an operator asks of a VM's balloon: how it stands, how much memory the guest is to have, what of it is free.
//!
//! Owns the answer's form and the arithmetic between a guest's memory and the pages of its balloon. Must not know HTTP.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::kvm::Machine;
use crate::kvm::virtio::{GuestStats, HintRound, VirtioBalloon};
use crate::model::schema::Schema;
use crate::model::{PAGE_SIZE, PageBitmap, PageCount, PageRun, chain};

/// How long a question is held for the guest's statistics, or for progress; shorter than what the end of a machine waits
/// for last answers.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a guest may take to name its free pages.
const HINT_LIMIT: Duration = Duration::from_secs(10);

/// Runs of free pages that are told at most: those beyond are sent.
const MOST_RUNS: usize = 1 << 20;

/// What `dunlin vm balloon` prints.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BalloonReport {
    /// The VM's name.
    pub name: String,
    /// Guest RAM.
    pub memory_bytes: u64,
    /// What the guest is to have of it.
    pub target_bytes: u64,
    /// What the guest has of it: all that is not in the balloon.
    pub actual_bytes: u64,
    /// What the host keeps for it at the moment.
    pub resident_bytes: u64,
    /// Whether a driver in the guest runs the balloon.
    pub driver: bool,
    /// Whether the driver reports free pages by itself.
    pub reporting: bool,
    /// Whether the driver names free pages when asked.
    pub hinting: bool,
    /// Whether the guest wants its free pages to keep a pattern: then reported ones are not given back.
    pub poisoned: bool,
    /// Whether pages are only acknowledged at the moment.
    pub held: bool,
    /// Bytes given back to the host because they were put into the balloon, since this process has the machine.
    pub inflated_bytes: u64,
    /// Bytes given back to the host because they were reported as free, since this process has the machine.
    pub reported_bytes: u64,
    /// The guest was last asked for its free pages, and named them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hints: Option<HintReport>,
    /// What the guest says of its memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestStats>,
    /// Grows with every step that the guest makes: what to wait from.
    pub progress: u64,
}

impl Schema for BalloonReport {
    const SCHEMA: &'static str = "dunlin.balloon/v1";
}

/// What came of asking for free pages.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HintReport {
    /// The round's command id.
    pub command_id: u32,
    /// Pages that the guest named.
    pub pages: u64,
    /// Whether those were all.
    pub complete: bool,
}

impl BalloonReport {
    /// Whether the guest has as much memory as it is to have.
    pub fn has_followed(&self) -> bool {
        self.actual_bytes == self.target_bytes
    }
}

fn of(machine: &Machine) -> Result<&VirtioBalloon, String> {
    machine.balloon().ok_or_else(|| "the VM has no balloon; start it with `dunlin vm run --balloon`".to_owned())
}

/// How the balloon of `machine` stands. With `seen`, waits first for progress beyond it. With `stats`, asks the guest how
/// its memory is used; a guest that does not answer within a second has said what it said last.
///
/// # Errors
/// A VM without a balloon.
pub(super) fn report(machine: &Machine, seen: Option<u64>, stats: bool) -> Result<BalloonReport, String> {
    let balloon = of(machine)?;
    let progress = match seen {
        Some(seen) => balloon.wait_progress(seen, PATIENCE),
        None => balloon.wait_progress(0, Duration::ZERO),
    };
    if stats && machine.is_running() {
        balloon.ask_stats(PATIENCE);
    }
    let status = balloon.status();
    let memory_bytes = machine.memory().pages().bytes();
    Ok(BalloonReport {
        name: machine.shape().name.to_string(),
        memory_bytes,
        target_bytes: memory_bytes - status.target.bytes(),
        actual_bytes: memory_bytes - status.actual.bytes(),
        resident_bytes: machine.memory().resident_bytes().map_err(|error| chain(&error))?,
        driver: status.driver,
        reporting: status.reporting,
        hinting: status.hinting,
        poisoned: status.poisoned,
        held: status.held,
        inflated_bytes: status.inflated.bytes(),
        reported_bytes: status.reported.bytes(),
        hints: status.round.map(|round| HintReport {
            command_id: round.id,
            pages: round.hinted.0,
            complete: round.complete,
        }),
        guest: status.stats,
        progress,
    })
}

/// Asks the guest to go on with `bytes` of memory.
///
/// # Errors
/// A VM without a balloon; none, more than it has, or no whole pages.
pub(super) fn set_size(machine: &Machine, bytes: u64) -> Result<(), String> {
    let balloon = of(machine)?;
    let memory = machine.memory().pages();
    if bytes == 0 || bytes > memory.bytes() || !bytes.is_multiple_of(PAGE_SIZE as u64) {
        return Err(format!("{bytes} bytes are not whole pages between one and the VM's {} bytes", memory.bytes()));
    }
    let pages = PageCount(memory.0 - bytes / PAGE_SIZE as u64);
    balloon.set_target(pages).map_err(|error| error.to_string())
}

/// Asks the guest once for its free pages; the number of the question.
///
/// # Errors
/// A VM without a balloon, or a guest that names none.
pub(super) fn start_asking(machine: &Machine) -> Result<u32, String> {
    of(machine)?.start_hint().map_err(|error| error.to_string())
}

/// Waits until the guest has named its free pages, and lets it use them again. A question that somebody else has replaced meanwhile is theirs to
/// end.
///
/// # Errors
/// A VM without a balloon, or a guest that takes too long.
pub(super) fn await_answer(machine: &Machine, id: u32) -> Result<(), String> {
    let balloon = of(machine)?;
    let deadline = Instant::now() + HINT_LIMIT;
    let mut seen = balloon.wait_progress(0, Duration::ZERO);
    let complete = loop {
        let round = balloon.status().round.filter(|round| round.id == id);
        if round.is_none_or(|round| round.complete) || Instant::now() >= deadline {
            break round.map(|round| round.complete);
        }
        seen = balloon.wait_progress(seen, PATIENCE);
    };
    if complete.is_some() {
        balloon.finish_hint();
    }
    match complete {
        Some(true) => Ok(()),
        Some(false) => Err(format!("the guest did not name its free pages within {HINT_LIMIT:?}")),
        None => Err("the question was replaced by another one, or the guest's driver began anew".to_owned()),
    }
}

/// Asks the guest of `machine` for its free pages on behalf of a migration, waits at most `patience` until it has named all, and returns what it named, as pages of the memory file.
/// The guest keeps them back until [`relax`].
///
/// # Errors
/// A VM without a balloon, or a guest that names none.
pub(super) fn name_free_pages(machine: &Machine, patience: Duration) -> Result<Vec<PageRun>, String> {
    let balloon = of(machine)?;
    let id = balloon.start_hint().map_err(|error| error.to_string())?;
    let deadline = Instant::now() + patience;
    let mut seen = balloon.wait_progress(0, Duration::ZERO);
    let under_way = |round: &HintRound| round.id == id && !round.complete;
    while balloon.status().round.as_ref().is_some_and(under_way) {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        seen = balloon.wait_progress(seen, left);
    }
    balloon.stop_hint();
    let mut named = PageBitmap::new(machine.memory().pages());
    match balloon.take_hints(&mut named) {
        Some(round) if round.id == id => Ok(named.runs(u32::MAX).take(MOST_RUNS).collect()),
        _ => Err("the guest's driver began anew meanwhile".to_owned()),
    }
}

/// Asks the guest to go on with `pages` of its memory until [`relax`].
///
/// # Errors
/// A VM without a balloon, a guest without a driver for it; none, or more than it has.
pub(super) fn squeeze(machine: &Machine, pages: PageCount) -> Result<(), String> {
    let balloon = of(machine)?;
    let memory = machine.memory().pages();
    if pages == PageCount(0) || pages > memory {
        return Err(format!("a guest cannot go on with {pages} of {memory}"));
    }
    balloon.squeeze(PageCount(memory.0 - pages.0)).map_err(|error| error.to_string())
}

/// How much of its memory the guest has, once it has got nearer to what it is to have, or `patience` is over.
///
/// # Errors
/// A VM without a balloon.
pub(super) fn guest_pages(machine: &Machine, patience: Duration) -> Result<PageCount, String> {
    let balloon = of(machine)?;
    let seen = balloon.wait_progress(0, Duration::ZERO);
    let before = balloon.status();
    if before.actual != before.target {
        balloon.wait_progress(seen, patience);
    }
    Ok(PageCount(machine.memory().pages().0 - balloon.status().actual.0))
}

/// The migration is over: the guest may use the pages again that it named as free, and has again what it had before it was squeezed.
pub(super) fn relax(machine: &Machine) {
    let Some(balloon) = machine.balloon() else { return };
    if balloon.status().round.is_some() {
        balloon.finish_hint();
    }
    balloon.relax();
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::kvm::testing::{boot, config, hosting, kvm_or_skip, printer, wait_for, writer};
    use crate::model::DirtyLogKind;

    fn with_balloon(image: crate::kvm::boot::BootImage) -> Arc<Machine> {
        let config = config(image, 1, DirtyLogKind::Bitmap);
        Machine::boot(config, &hosting(), Box::new(|memory| Ok(vec![Arc::new(VirtioBalloon::new(memory)?) as _])))
            .unwrap()
    }

    #[test]
    fn a_guests_memory_is_what_is_not_in_the_balloon() {
        if !kvm_or_skip("a_guests_memory_is_what_is_not_in_the_balloon") {
            return;
        }
        let bare = boot(writer(1), 1, DirtyLogKind::Bitmap);
        for error in [report(&bare, None, false).unwrap_err(), set_size(&bare, 4096).unwrap_err()] {
            assert!(error.contains("--balloon"), "{error}");
        }
        let machine = with_balloon(writer(1));
        let all = machine.memory().pages().bytes();
        for wrong in [0, all + 4096, all - 1, u64::MAX] {
            assert!(set_size(&machine, wrong).is_err(), "{wrong}");
        }
        set_size(&machine, all - 8192).unwrap();
        let report = report(&machine, None, true).unwrap();
        assert_eq!((report.memory_bytes, report.target_bytes, report.actual_bytes), (all, all - 8192, all));
        assert!(!report.has_followed() && !report.driver && report.guest.is_none() && report.hints.is_none());
        assert!((4096..all).contains(&report.resident_bytes));
        assert!(start_asking(&machine).unwrap_err().contains("virtio_balloon"));
        set_size(&machine, all).unwrap();
        assert!(super::report(&machine, None, false).unwrap().has_followed());
    }

    #[test]
    fn a_reset_of_the_machine_asks_for_nothing() {
        if !kvm_or_skip("a_reset_of_the_machine_asks_for_nothing") {
            return;
        }
        // mov al, 0xfe; out 0x64, al
        let machine = with_balloon(printer(b"x", &[0xb0, 0xfe, 0xe6, 0x64]));
        set_size(&machine, 4096).unwrap();
        machine.resume().unwrap();
        wait_for("a reset", || machine.console().history().len() > 1);
        machine.pause().unwrap();
        assert!(report(&machine, None, false).unwrap().has_followed());
    }
}
