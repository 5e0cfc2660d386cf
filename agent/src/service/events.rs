//! The event log of one manager: steps and rounds, to a JSON file.
//!
//! Also holds a manager at a step, for the tests that kill it there.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::kvm::Hurry;
use crate::migrate::Observer;
use crate::model::schema::Schema;
use crate::model::{MigrationId, RoundReport, Step};
use crate::time::unix_ms;

/// How often a held manager looks whether it may go on.
const HOLD_TICK: Duration = Duration::from_millis(2);

#[derive(Serialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
enum Event<'a> {
    Step { step: Step, stage: crate::model::Stage, detail: &'a str },
    Round(&'a RoundReport),
}

#[derive(Serialize)]
struct Line<'a> {
    unix_ms: u64,
    elapsed_ns: u64,
    migration_id: MigrationId,
    side: &'static str,
    #[serde(flatten)]
    event: Event<'a>,
}

impl Schema for Line<'_> {
    const SCHEMA: &'static str = "dunlin.event/v1";
}

/// One line of each kind, with every member: for the test of the documentation.
#[cfg(test)]
pub(crate) fn samples() -> Vec<serde_json::Value> {
    let round = RoundReport { limit_bytes_per_second: Some(0), ..RoundReport::default() };
    let (step, migration_id) = (Step::Connected, MigrationId::random());
    let events = [Event::Step { step, stage: step.stage(), detail: "" }, Event::Round(&round)];
    let lines = events.map(|event| Line { unix_ms: 0, elapsed_ns: 0, migration_id, side: "source", event });
    lines.iter().map(|line| serde_json::to_value(line.tagged()).unwrap()).collect()
}

/// Hold at a step until a file appears: `STEP=PATH`. On arrival `PATH.held` is made; the manager goes on when `PATH`
/// exists.
#[derive(Clone, Debug)]
pub struct Hold {
    step: Step,
    path: PathBuf,
}

impl std::str::FromStr for Hold {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (step, path) = text.split_once('=').ok_or("write STEP=PATH")?;
        Ok(Self { step: step.parse()?, path: path.into() })
    }
}

impl Hold {
    fn wait(&self) {
        let mut held = self.path.clone().into_os_string();
        held.push(".held");
        if let Err(error) = File::create(&held) {
            tracing::error!("cannot hold at {}: {error}", self.step);
            return;
        }
        while fs::symlink_metadata(&self.path).is_err() {
            std::thread::sleep(HOLD_TICK);
        }
    }
}

thread_local! {
    /// Held by a manager's own thread from the pause to the guest's running for good: its work is the blackout, or keeps a loan alive.
    static HURRY: RefCell<Option<Hurry>> = const { RefCell::new(None) };
}

/// The event log.
pub struct EventLog {
    migration: MigrationId,
    side: &'static str,
    started: Instant,
    file: Option<Mutex<File>>,
    hold: Option<Hold>,
}

impl EventLog {
    /// A log for one side of one migration; `file` gets one JSON object a line.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn new(
        migration: MigrationId,
        side: &'static str,
        file: Option<&Path>,
        hold: Option<Hold>,
    ) -> io::Result<Self> {
        let file = file.map(|path| File::options().create(true).append(true).open(path)).transpose()?;
        Ok(Self { migration, side, started: Instant::now(), file: file.map(Mutex::new), hold })
    }

    fn write(&self, event: Event<'_>) {
        let Some(file) = &self.file else { return };
        let line = Line {
            unix_ms: unix_ms(),
            elapsed_ns: self.started.elapsed().as_nanos() as u64,
            migration_id: self.migration,
            side: self.side,
            event,
        };
        let written = serde_json::to_string(&line.tagged()).map_err(io::Error::from).and_then(|json| {
            let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
            file.write_all(format!("{json}\n").as_bytes())
        });
        if let Err(error) = written {
            tracing::warn!("event log: {error}");
        }
    }
}

impl Drop for EventLog {
    fn drop(&mut self) {
        drop(HURRY.take());
    }
}

impl Observer for EventLog {
    fn step(&self, step: Step, detail: &str) {
        match step {
            // The source's first step with the VM standing, the target's first with all of it here; and a loan, in which the VM stands again and again: both may have a manager that
            // has taken another's place.
            Step::Paused | Step::StateMoved | Step::Lent => HURRY.with_borrow_mut(|hurry| {
                hurry.get_or_insert_with(Hurry::here);
            }),
            Step::Running | Step::Discarded => drop(HURRY.take()),
            _ => {}
        }
        self.write(Event::Step { step, stage: step.stage(), detail });
        if let Some(hold) = self.hold.as_ref().filter(|hold| hold.step == step) {
            hold.wait();
        }
    }

    fn round(&self, round: &RoundReport) {
        self.write(Event::Round(round));
    }

    fn progress(&self, _round: u32, _sent_pages: u64, _due_pages: u64) {}
}
