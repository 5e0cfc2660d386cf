//! What the programs cost, by the kernel's own count, and what is shed for it.
//!
//! Intervals without a window of write protection are judged by [`BudgetJudge`], each alone. A window makes events that
//! nothing else makes, so its interval counts as spread over the time to the next one; when even that is too much, writes are attributed to nobody in
//! windows, and when that does not help, no windows are opened for a while.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::view::{ProgramView, ShedView};
use crate::probe::syscall::{self, RunStats};
use crate::probe::{Probes, ProgramCost as Spent};
use crate::service::sources;
use crate::track::{Action, BudgetJudge, ProgramCost};

/// For so many windows their attribution, or the windows themselves, stay away.
const WINDOWS_AWAY: u32 = 10;

/// The costs of one set of loaded programs.
pub(super) struct Costs {
    judge: BudgetJudge,
    budget: f64,
    /// While it is open, the kernel counts.
    counting: Result<Option<OwnedFd>, String>,
    before: (Instant, BTreeMap<&'static str, RunStats>),
    shed: BTreeMap<String, String>,
    /// What is left of windows without attribution, and of windows that are not opened.
    unattributed: u32,
    unopened: u32,
    /// What is shown.
    pub(super) shown: Shown,
}

/// The last interval's.
#[derive(Clone, Debug, Default)]
pub(super) struct Shown {
    pub(super) used_share_of_core: Option<f64>,
    pub(super) above_budget: bool,
    pub(super) programs: Vec<ProgramView>,
}

impl Costs {
    /// From now on, for `budget`, a part of one core.
    pub(super) fn begin(budget: f64, probes: &Probes) -> Self {
        let counting = count();
        if let Err(reason) = &counting {
            tracing::warn!("the budget of BPF programs cannot be kept: {reason}");
        }
        let mut costs = Self {
            judge: BudgetJudge::new(budget, sources::specs()),
            budget,
            counting,
            before: (Instant::now(), stats(&probes.costs())),
            shed: BTreeMap::new(),
            unattributed: 0,
            unopened: 0,
            shown: Shown::default(),
        };
        costs.shown.programs = views(&probes.costs(), &BTreeMap::new(), Duration::ZERO);
        costs
    }

    /// Why costs are not known.
    pub(super) fn unknown(&self) -> Option<&String> {
        self.counting.as_ref().err()
    }

    /// What is away.
    pub(super) fn shed(&self) -> Vec<ShedView> {
        let of = |(source, reason): (&String, &String)| ShedView { source: source.clone(), reason: reason.clone() };
        let mut shed: Vec<ShedView> = self.shed.iter().map(of).collect();
        let windows = [("attribution in windows", self.unattributed), ("windows", self.unopened)];
        shed.extend(windows.into_iter().filter(|(_, left)| *left > 0).map(|(source, left)| ShedView {
            source: source.to_owned(),
            reason: format!("a window alone took more than the budget; back after {left} more"),
        }));
        shed
    }

    /// Asked when a window is due: whether it may open, and whether writes in it may be attributed.
    pub(super) fn window(&mut self) -> (bool, bool) {
        let open = self.unopened == 0;
        self.unopened = self.unopened.saturating_sub(1);
        let attribute = self.unattributed == 0;
        if open {
            self.unattributed = self.unattributed.saturating_sub(1);
        }
        (open, attribute)
    }

    /// Judges the interval that ends now, and carries out what follows. `window`: one was open in it, and how far apart they are.
    pub(super) fn after_interval(&mut self, probes: &mut Probes, window: Option<Duration>) {
        let (now, spent) = (Instant::now(), probes.costs());
        let interval = now.saturating_duration_since(self.before.0);
        let new = stats(&spent);
        let costs: Vec<ProgramCost> = new
            .iter()
            .map(|(&program, stats)| {
                let before = self.before.1.get(program).copied().unwrap_or_default();
                ProgramCost {
                    program: program.to_owned(),
                    run_time_ns: stats.run_time_ns.saturating_sub(before.run_time_ns),
                    runs: stats.run_count.saturating_sub(before.run_count),
                }
            })
            .collect();
        self.shown.programs = views(&spent, &self.before.1, interval);
        self.before = (now, new);
        if self.counting.is_err() {
            return;
        }
        let ns = (interval.as_nanos() as f64).max(1.0);
        let used: f64 = costs.iter().map(|cost| cost.run_time_ns as f64).sum::<f64>();
        self.shown.used_share_of_core = Some(used / ns);
        if let Some(apart) = window {
            if used / (apart.as_nanos() as f64).max(ns) > self.budget {
                let left = if self.unattributed > 0 { &mut self.unopened } else { &mut self.unattributed };
                *left = WINDOWS_AWAY;
                tracing::warn!(
                    "a window of write protection took {:.2} ms of CPU time, more than the budget",
                    used / 1e6
                );
            }
            return;
        }
        let report = self.judge.judge(interval, &costs, &BTreeMap::new());
        self.shown.above_budget = report.still_above;
        for decision in report.decisions {
            let Some(gives) = sources::gives_of(&decision.source) else { continue };
            match decision.action {
                Action::Shed => {
                    tracing::warn!("{} is shed: {}", decision.source, decision.reason);
                    probes.shed(gives, &format!("shed: {}", decision.reason));
                    self.shed.insert(decision.source, decision.reason);
                }
                Action::Restore => {
                    tracing::warn!("{} is back: {}", decision.source, decision.reason);
                    probes.restore(gives);
                    self.shed.remove(&decision.source);
                }
                Action::Keep | Action::StayAway => {}
            }
        }
        self.shown.attached_as(&probes.costs());
    }
}

impl Shown {
    /// After what was shed or came back: one look does not show a source as shed and its programs as attached.
    fn attached_as(&mut self, now: &[Spent]) {
        for program in &mut self.programs {
            program.attached = now.iter().any(|cost| cost.hook.program == program.program && cost.attached);
        }
    }
}

/// Has the kernel count what programs cost. It may do so already, for everybody.
fn count() -> Result<Option<OwnedFd>, String> {
    match syscall::count_runs() {
        Ok(counting) => Ok(Some(counting)),
        Err(_) if std::fs::read_to_string("/proc/sys/kernel/bpf_stats_enabled").is_ok_and(|on| on.trim() == "1") => {
            Ok(None)
        }
        Err(error) => Err(format!(
            "the kernel does not count what BPF programs cost ({error}): it takes CAP_SYS_ADMIN, or `sysctl kernel.bpf_stats_enabled=1`"
        )),
    }
}

fn stats(spent: &[Spent]) -> BTreeMap<&'static str, RunStats> {
    spent.iter().map(|cost| (cost.hook.program, cost.stats)).collect()
}

fn views(spent: &[Spent], before: &BTreeMap<&'static str, RunStats>, interval: Duration) -> Vec<ProgramView> {
    let ns = (interval.as_nanos() as f64).max(1.0);
    let of = |cost: &Spent| {
        let before = before.get(cost.hook.program).copied().unwrap_or(cost.stats);
        ProgramView {
            program: cost.hook.program,
            place: cost.hook.place,
            attached: cost.attached,
            run_time_ns: cost.stats.run_time_ns,
            runs: cost.stats.run_count,
            share_of_core: cost.stats.run_time_ns.saturating_sub(before.run_time_ns) as f64 / ns,
        }
    };
    spent.iter().map(of).collect()
}
