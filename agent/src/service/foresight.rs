//! What is to be expected of a migration, and which strategy it takes where that is left to it: joins the log of earlier migrations, what is known of the
//! VM's memory and writing, and the model.
//!
//! No migration waits for it unless that is asked for ([`Foresee`]): then the VM's curve is measured first. Else what has no rounds is foretold from what
//! memory was ever written, and what has rounds once the first has shown a point of the curve. Must not know how a migration is done.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::config::TrackConfig;
use super::guest_names::GuestFiles;
use super::interrupt::Interrupt;
use super::profile::{Allowed, How, ProfileError, ProfileRequest, profile};
use crate::migrate::{KEPT_TO, Observer, OnStuck, SourceOptions, Strategy, zero_bits};
use crate::model::{
    BytesPerSecond, Chosen, CurvePoint, Foretold, ForetoldFrom, MigrationRecord, MigrationReport, PageCount, PageRun,
    RoundReport, Step, VmRef, WriteCurve,
};
use crate::port::Region;
use crate::predict::experience::{self, FixedCost};
use crate::predict::{Asked, Memory, Mover, Plan, choose, predict};
use crate::store::HistoryLog;
use crate::track::Terms;

/// How long a VM's writing is measured where that is asked for.
const WINDOW: Duration = Duration::from_millis(1280);
/// A round trip, where nothing is known of it.
const USUAL_RTT: Duration = Duration::from_millis(1);
/// What a link carries, where nothing is known of it: 1 Gbit/s.
const USUAL_LINK: BytesPerSecond = BytesPerSecond(125_000_000);
/// Of the downtime this part may be taken for the switch at most: rounds need something to get within.
const MOST_FIXED: f64 = 0.75;
/// Pages that say how much of memory holds something.
const CONTENT_PAGES: u64 = 8192;
/// A first round of fewer bytes says more of latency than of the link.
const ENOUGH_BYTES: u64 = 8 << 20;
/// Points that are drawn of a curve of which one is known.
const DRAWN_POINTS: u32 = 8;

/// What is wanted of the future.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Foresee {
    /// What can be told without delay.
    #[default]
    AsItGoes,
    /// How the VM writes is measured first.
    Measure(TrackConfig),
    /// The same, and the strategy is chosen by that.
    Choose(TrackConfig),
}

/// What earlier migrations say of one to a peer.
#[derive(Clone, Debug)]
pub struct Experience {
    records: Vec<MigrationRecord>,
    peer: String,
}

impl Experience {
    /// What the log in a state folder says.
    pub fn read(state_dir: &Path, peer: &str) -> Self {
        Self { records: HistoryLog::new(state_dir).read().records, peer: peer.to_owned() }
    }

    /// What a switch is to be expected to cost, of a downtime.
    pub fn fixed_cost(&self, downtime: Duration) -> FixedCost {
        let found = experience::fixed_cost(&self.records, Some(&self.peer), SourceOptions::default().fixed_cost);
        FixedCost { cost: found.cost.min(downtime.mul_f64(MOST_FIXED)), ..found }
    }

    /// What the link carries under a strategy, or under any.
    fn goodput(&self, strategy: Option<Strategy>) -> Option<BytesPerSecond> {
        experience::goodput(&self.records, &self.peer, strategy.map(|strategy| strategy.to_string()).as_deref())
    }
}

/// The way of moving that these options are; none that is modelled.
fn plan(options: &SourceOptions) -> Option<Plan> {
    Some(match (options.strategy, options.on_stuck) {
        (Strategy::StopAndCopy, _) => Plan::StopAndCopy,
        (Strategy::PreCopy, OnStuck::Stun) => Plan::PreCopyStun,
        (Strategy::PreCopy, OnStuck::PostCopy) => Plan::PreCopyPostCopy,
        (Strategy::PreCopy, OnStuck::Stop | OnStuck::Cancel) => Plan::PreCopy,
        (Strategy::PostCopy, _) => Plan::PostCopy,
        (Strategy::Hybrid, _) => Plan::Hybrid,
        // How long that takes is the operator's who finishes it.
        (Strategy::DemandPaging, _) => return None,
    })
}

/// Sets the options to a way of moving.
fn take(plan: Plan, options: &mut SourceOptions) {
    let (strategy, on_stuck) = match plan {
        Plan::StopAndCopy => (Strategy::StopAndCopy, None),
        Plan::PreCopyStun => (Strategy::PreCopy, Some(OnStuck::Stun)),
        Plan::PreCopyPostCopy => (Strategy::PreCopy, Some(OnStuck::PostCopy)),
        Plan::PostCopy => (Strategy::PostCopy, None),
        Plan::Hybrid => (Strategy::Hybrid, None),
        _ => (Strategy::PreCopy, None),
    };
    options.strategy = strategy;
    options.on_stuck = on_stuck.unwrap_or(options.on_stuck);
}

/// The VM's curve, measured now.
///
/// # Errors
/// It cannot be seen, the VM has ended, or a signal came.
pub(super) fn measure(
    run_dir: &Path,
    state_dir: &Path,
    vm: &VmRef,
    config: &TrackConfig,
) -> Result<WriteCurve, ProfileError> {
    let request = ProfileRequest {
        run_dir: run_dir.to_owned(),
        state_dir: state_dir.to_owned(),
        vm: vm.clone(),
        how: How::Auto,
        allowed: Allowed::default(),
        config: config.clone(),
        window: WINDOW,
        windows: 1,
        duty: 1.0,
        protect_one_in: None,
        max_slowdown: 1.0,
        names: false,
        guest_files: GuestFiles::default(),
        who: false,
        probe_log: false,
    };
    let interrupt = Interrupt::install().map_err(|_| ProfileError::Interrupted)?;
    Ok(profile(&request, &interrupt, &mut |_, _| {})?.curve)
}

/// What of a VM's memory is not zero, from pages that lie evenly in it.
fn filled(region: &dyn Region) -> Memory {
    let pages = region.spec().pages;
    let looked = CONTENT_PAGES.min(pages.0);
    if looked == 0 {
        return Memory::full(pages);
    }
    let holds = |page: u64| {
        let run = PageRun::new(page, 1);
        !region.data_within(run).is_empty() && zero_bits(region.bytes(run)) == 0
    };
    let found = (0..looked).filter(|index| holds(index * pages.0 / looked)).count();
    let share = found as f64 / looked as f64;
    // 95 of 100 samples are no further off (normal approximation of the binomial).
    let off = if looked == pages.0 { 0.0 } else { 1.96 * (share * (1.0 - share) / looked as f64).sqrt() };
    let of = |share: f64| share.clamp(0.0, 1.0) * pages.0 as f64;
    Memory { pages, filled: of(share), filled_low: of(share - off), filled_high: of(share + off) }
}

/// The curve of a VM that a round of length `took`, in which each page was protected when it was sent, left `left` pages of. Such a round leaves the mean of U over its
/// length: all of U if the VM rewrites one set, half of it if it writes ever new pages. Those are the edges; between them U is drawn as a square root.
fn curve_of_round(left: f64, took: Duration) -> Option<WriteCurve> {
    let end = took.as_nanos() as f64;
    let points = (0..=DRAWN_POINTS).rev().map(|step| {
        let part = 0.5f64.powi(step as i32);
        let (set, ever_new) = (left, 2.0 * left * part);
        CurvePoint {
            interval_ns: ((end * part) as u64).max(1),
            unique_pages: 1.5 * left * part.sqrt(),
            low_pages: set.min(ever_new),
            high_pages: set.max(ever_new).max(1.5 * left * part.sqrt()),
        }
    });
    WriteCurve::from_measured(points.collect()).ok()
}

/// What is foretold of one migration, while it goes on.
#[derive(Debug)]
pub(super) struct Foresight {
    plan: Option<Plan>,
    pages: PageCount,
    /// The most that may be sent.
    limit: Option<BytesPerSecond>,
    asked: Asked,
    downtime: Duration,
    fixed: FixedCost,
    rtt: Duration,
    setup: Duration,
    goodput: Option<BytesPerSecond>,
    chosen: Option<Chosen>,
    told: Mutex<Option<Foretold>>,
}

impl Foresight {
    /// What can be told of a migration with these options before it begins.
    pub(super) fn new(experience: &Experience, options: &SourceOptions, region: &dyn Region) -> Self {
        let foresight = Self {
            plan: plan(options),
            pages: region.spec().pages,
            limit: options.bandwidth_max.or(options.bandwidth),
            asked: Asked {
                link: None,
                least: options.bandwidth.filter(|_| options.bandwidth_max.is_some()),
                hybrid_rounds: options.hybrid_rounds,
            },
            downtime: options.downtime,
            fixed: experience.fixed_cost(options.downtime),
            rtt: experience::rtt(&experience.records, &experience.peer).unwrap_or(USUAL_RTT),
            setup: experience::setup(&experience.records, &experience.peer, Some(&options.strategy.to_string())),
            goodput: experience.goodput(Some(options.strategy)),
            chosen: None,
            told: Mutex::default(),
        };
        // Without rounds how the VM writes shows in nothing that is foretold.
        if matches!(foresight.plan, Some(Plan::StopAndCopy | Plan::PostCopy))
            && let Some(bandwidth) = foresight.bandwidth()
            && let Some(still) = curve_of_round(0.0, WINDOW)
        {
            foresight.tell(ForetoldFrom::Memory, &still, &filled(region), (bandwidth, foresight.asked.least));
        }
        foresight
    }

    /// What is told of a VM whose curve was measured.
    pub(super) fn with_curve(
        experience: &Experience,
        options: &SourceOptions,
        region: &dyn Region,
        curve: &WriteCurve,
    ) -> Self {
        let foresight = Self::new(experience, options, region);
        if let Some(bandwidth) = foresight.bandwidth() {
            foresight.tell(ForetoldFrom::Curve, curve, &filled(region), (bandwidth, foresight.asked.least));
        }
        foresight
    }

    /// The same, and the options are set to the way that is chosen. Its writers are slowed only if they may be; with `--verify` it never runs in two places.
    pub(super) fn choose(
        experience: &Experience,
        options: &mut SourceOptions,
        region: &dyn Region,
        curve: &WriteCurve,
        may_be_slowed: bool,
    ) -> Self {
        let first = Self::new(experience, options, region);
        let (bandwidth, source) = match (first.limit, experience.goodput(None)) {
            (Some(limit), _) => (limit, "the limit"),
            (None, Some(goodput)) => (goodput, "what earlier migrations to that host carried"),
            (None, None) => (USUAL_LINK, "nothing is known of the link, so 1 Gbit/s is taken"),
        };
        let found = predict(curve, &filled(region), Mover::Dunlin, &first.terms(bandwidth), &first.asked);
        let chosen = found.ok().and_then(|mut predictions| {
            for prediction in &mut predictions {
                prediction.is_available &= match prediction.plan {
                    Plan::PreCopyStun => may_be_slowed,
                    plan => !(plan.can_lose_the_vm() && options.verify),
                };
            }
            choose(&predictions, options.downtime)
        });
        let Some(chosen) = chosen else {
            return Self::unchosen(experience, options, region, "under these terms nothing can be foretold");
        };
        take(chosen.plan, options);
        let told = Chosen {
            plan: chosen.plan.word().to_owned(),
            meets_downtime: chosen.meets_downtime,
            reason: format!("{}; reckoned with {bandwidth} ({source})", chosen.reason),
        };
        let foresight = Self { chosen: Some(told), ..Self::new(experience, options, region) };
        foresight.tell(ForetoldFrom::Curve, curve, &filled(region), (bandwidth, foresight.asked.least));
        foresight
    }

    /// A choice without knowledge: pre-copy, which finds out as it goes.
    pub(super) fn unchosen(
        experience: &Experience,
        options: &mut SourceOptions,
        region: &dyn Region,
        why: &str,
    ) -> Self {
        take(Plan::PreCopy, options);
        let reason = format!("{why}; pre-copy finds out as it goes");
        let plan = Plan::PreCopy.word().to_owned();
        Self { chosen: Some(Chosen { plan, meets_downtime: false, reason }), ..Self::new(experience, options, region) }
    }

    /// Which strategy was taken by itself.
    pub(super) fn chosen(&self) -> Option<&Chosen> {
        self.chosen.as_ref()
    }

    /// What was foretold, beside what it took.
    pub(super) fn complete(&self, report: &mut MigrationReport) {
        report.chosen.clone_from(&self.chosen);
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner).take();
        report.prediction = told.map(|told| told.beside(report));
    }

    fn bandwidth(&self) -> Option<BytesPerSecond> {
        self.limit.or(self.goodput)
    }

    fn terms(&self, bandwidth: BytesPerSecond) -> Terms {
        Terms { bandwidth, downtime: self.downtime, switch_cost: self.fixed.cost, rtt: self.rtt }
    }

    /// Tells what is to be expected with this bandwidth, and with a limit that begins at the other.
    fn tell(
        &self,
        from: ForetoldFrom,
        curve: &WriteCurve,
        memory: &Memory,
        (bandwidth, least): (BytesPerSecond, Option<BytesPerSecond>),
    ) {
        let asked = Asked { least, ..self.asked };
        let Ok(predictions) = predict(curve, memory, Mover::Dunlin, &self.terms(bandwidth), &asked) else { return };
        let Some(found) = predictions.iter().find(|prediction| Some(prediction.plan) == self.plan) else { return };
        let course = found.expected;
        let told = Foretold {
            plan: found.plan.word().to_owned(),
            from,
            bandwidth_bytes_per_second: bandwidth.0,
            fixed_cost_ns: self.fixed.cost.as_nanos() as u64,
            fixed_cost_from: self.fixed.from,
            total_ns: course.total_ns.map(|total| total + self.setup.as_nanos() as u64),
            blackout_ns: course.blackout_ns,
            wire_bytes: course.wire_bytes,
            rounds: course.rounds,
            total_error_percent: None,
            blackout_error_percent: None,
            wire_error_percent: None,
        };
        self.told.lock().unwrap_or_else(PoisonError::into_inner).replace(told);
    }
}

impl Observer for Foresight {
    fn step(&self, _step: Step, _detail: &str) {}

    fn round(&self, round: &RoundReport) {
        let is_told = self.told.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        if round.round != 1 || round.paused || is_told {
            return;
        }
        let took = Duration::from_nanos(round.duration_ns);
        let carried = (round.wire_bytes >= ENOUGH_BYTES).then(|| BytesPerSecond::over(round.wire_bytes, took));
        let full = round.pages.saturating_sub(round.zero_pages) as f64;
        let memory = Memory { pages: self.pages, filled: full, filled_low: full, filled_high: full };
        let rates = match (self.asked.least, self.limit, carried) {
            // Below its limit it is the link that carries no more.
            (Some(least), Some(most), Some(carried)) if (carried.0 as f64) < least.0 as f64 * KEPT_TO => {
                Some((carried.min(most), None))
            }
            (Some(least), Some(most), carried) => Some((most, carried.or(Some(least)))),
            _ => carried.or_else(|| self.bandwidth()).map(|bandwidth| (bandwidth, None)),
        };
        if let Some(rates) = rates
            && let Some(curve) = curve_of_round(round.dirtied_pages as f64, took)
        {
            self.tell(ForetoldFrom::FirstRound, &curve, &memory, rates);
        }
    }

    fn progress(&self, _round: u32, _sent_pages: u64, _due_pages: u64) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that rewrites a set, and one that writes ever new pages: what a round of each leaves gives curves between which its own lies.
    #[test]
    fn a_rounds_rest_is_a_curve_between_two() {
        let took = Duration::from_secs(2);
        let curve = curve_of_round(10_000.0, took).unwrap();
        let at = |seconds: f64| curve.at_ns(seconds * 1e9);
        for seconds in [0.02, 0.1, 0.5, 1.0, 2.0] {
            let (set, ever_new) = (10_000.0, 10_000.0 * seconds);
            let here = at(seconds);
            let (low, high) = (f64::min(set, ever_new), f64::max(set, ever_new));
            assert!(here.low_pages <= low * 1.01 && here.high_pages >= high * 0.99, "{seconds}: {here:?}");
            assert!(here.low_pages <= here.unique_pages && here.unique_pages <= here.high_pages, "{seconds}: {here:?}");
        }
        // The mean of the middle curve over the round is what was left.
        let steps = 1000;
        let mean: f64 = (0..steps).map(|step| at(2.0 * (f64::from(step) + 0.5) / f64::from(steps)).unique_pages).sum();
        assert!((mean / f64::from(steps) / 10_000.0 - 1.0).abs() < 0.05, "{}", mean / f64::from(steps));
        assert!(curve_of_round(0.0, took).is_some());
    }

    #[test]
    fn a_way_is_taken_and_recognised() {
        for way in
            [Plan::StopAndCopy, Plan::PreCopy, Plan::PreCopyStun, Plan::PreCopyPostCopy, Plan::Hybrid, Plan::PostCopy]
        {
            let mut options = SourceOptions::default();
            take(way, &mut options);
            assert_eq!(plan(&options), Some(way));
        }
        let mut options = SourceOptions { on_stuck: OnStuck::Cancel, ..SourceOptions::default() };
        take(Plan::PreCopy, &mut options);
        assert_eq!(options.on_stuck, OnStuck::Cancel, "what was asked for in case of trouble stays");
        let most = Some(BytesPerSecond(2));
        let rounds = SourceOptions { strategy: Strategy::Hybrid, hybrid_rounds: 2, bandwidth_max: most, ..options };
        assert_eq!(plan(&rounds), Some(Plan::Hybrid));
        assert_eq!(plan(&SourceOptions { strategy: Strategy::DemandPaging, ..rounds }), None);
    }
}
