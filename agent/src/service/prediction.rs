//! What moving a VM would take, before anything is moved: joins its profile, what its memory holds, and the model of each way.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::interrupt::Interrupt;
use super::inventory::Host;
use super::observe::Observed;
use super::profile::{self, ProfileError, ProfileRequest, Profiler, Progress};
use crate::migrate::SourceOptions;
use crate::model::schema::Schema;
use crate::model::{BytesPerSecond, CostFrom, MigrationRecord, PAGE_SIZE, PageCount, UniqueRate};
use crate::predict::experience::{FixedCost, PlanErrors, errors, fixed_cost};
use crate::predict::{Asked, Choice, Memory, Mover, Prediction, choose, predict};
use crate::store::{History, HistoryLog};
use crate::track::{Regime, Terms, TermsError};

/// What is to be expected.
#[derive(Clone, Debug, Serialize)]
pub struct PredictionReport {
    /// Of whom.
    pub vm: Observed,
    /// Who runs it.
    pub vmm: String,
    /// Under which conditions its profile was taken.
    pub regime: Regime,
    /// Whether it may write more than was seen.
    pub is_lower_bound: bool,
    /// What else there is to say.
    pub notes: Vec<String>,
    /// Goodput of the link, in bytes per second.
    pub bandwidth_bytes_per_second: u64,
    /// What the link itself carries, where that is a limit below it; absent where it was not said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link_bytes_per_second: Option<u64>,
    /// Where the limit begins, if it follows what the VM dirties up to the bandwidth; absent of one that stays.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub least_bytes_per_second: Option<u64>,
    /// Rounds of `hybrid` before the VM moves.
    pub hybrid_rounds: u32,
    /// The downtime that is allowed.
    pub downtime_ns: u64,
    /// What a switch costs in any case, CPU and device state included.
    pub fixed_cost_ns: u64,
    /// Where that was taken from.
    pub fixed_cost_from: CostFrom,
    /// From how many migrations.
    pub fixed_cost_migrations: u32,
    /// The link's round trip.
    pub rtt_ns: u64,
    /// Guest memory.
    pub memory_bytes: u64,
    /// What of it is not zero.
    pub filled_bytes: u64,
    /// The least that may be.
    pub filled_bytes_low: u64,
    /// The most.
    pub filled_bytes_high: u64,
    /// U(D')/D': different pages per second that it writes over what the downtime leaves for memory.
    pub unique: UniqueRate,
    /// Each way of moving it.
    pub strategies: Vec<Way>,
    /// Which to take; absent if it cannot be moved today.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chosen: Option<Choice>,
}

impl Schema for PredictionReport {
    const SCHEMA: &'static str = "dunlin.predict/v1";
}

/// One way of moving, with what to type for it.
#[derive(Clone, Debug, Serialize)]
pub struct Way {
    /// What is to be expected.
    #[serde(flatten)]
    pub prediction: Prediction,
    /// The commands, one after the other; empty where there are none yet.
    pub commands: Vec<String>,
}

/// Why there is no prediction.
#[derive(Debug, thiserror::Error)]
pub enum PredictionError {
    /// There is no profile.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// No VM could be moved so.
    #[error(transparent)]
    Terms(#[from] TermsError),
}

/// Under which conditions a VM would be moved.
#[derive(Clone, Debug)]
pub struct PredictTerms {
    /// Goodput of the link, or a limit below it.
    pub bandwidth: BytesPerSecond,
    /// What is asked of the ways besides.
    pub asked: Asked,
    /// The downtime that is allowed.
    pub downtime: Duration,
    /// What a switch costs besides the last pages; by earlier migrations without.
    pub fixed_cost: Option<Duration>,
    /// The link's round trip.
    pub rtt: Duration,
    /// The host that it would be moved to, as it would be dialled.
    pub peer: Option<String>,
}

impl PredictTerms {
    fn fixed_cost(&self, state_dir: &Path) -> FixedCost {
        if let Some(given) = self.fixed_cost {
            return FixedCost::unmeasured(given, CostFrom::Given);
        }
        let records = HistoryLog::new(state_dir).read().records;
        fixed_cost(&records, self.peer.as_deref(), SourceOptions::default().fixed_cost)
    }
}

/// How far predictions of earlier migrations were off.
#[derive(Clone, Debug, Serialize)]
pub struct PredictHistory {
    /// By way of moving.
    pub errors: Vec<PlanErrors>,
    /// The migrations, the oldest first.
    pub migrations: Vec<MigrationRecord>,
    /// Lines of the log that cannot be read.
    pub damaged_lines: u32,
}

impl Schema for PredictHistory {
    const SCHEMA: &'static str = "dunlin.predict-history/v1";
}

/// What the log in a state folder says of predictions.
pub fn history(state_dir: &Path) -> PredictHistory {
    let History { records, damaged_lines } = HistoryLog::new(state_dir).read();
    PredictHistory { errors: errors(&records), migrations: records, damaged_lines }
}

/// Takes the VM's profile and predicts.
///
/// # Errors
/// No profile, or terms under which nothing could be moved.
pub fn prediction(
    request: &ProfileRequest,
    wanted: &PredictTerms,
    interrupt: &Interrupt,
    progress: Progress<'_>,
) -> Result<PredictionReport, PredictionError> {
    let fixed = wanted.fixed_cost(&request.state_dir);
    let PredictTerms { bandwidth, downtime, rtt, .. } = *wanted;
    let terms = &Terms { bandwidth, downtime, switch_cost: fixed.cost, rtt };
    let memory_time = terms.memory_time()?;
    let found = profile::find(request).map_err(ProfileError::from)?;
    let mover = match (found.host, found.vmm.as_str()) {
        (Host::Hosted, _) => Mover::Dunlin,
        (Host::Foreign, "qemu") => Mover::Qemu,
        _ => Mover::Unknown,
    };
    let taken = Profiler::open(request)?.measure(interrupt, progress)?;
    let mut notes = taken.notes.clone();
    let zero = match taken.sampled.as_ref().and_then(|sampled| sampled.zero_pages) {
        Some(zero) => Some(zero),
        None => profile::zero_pages(request)?,
    };
    let pages = PageCount::covering(taken.memory_bytes);
    let memory = zero.map_or_else(
        || {
            notes.push(
                "what the memory holds may not be read (--allow-read-memory): all of it counts, though pages of zeros are not sent"
                    .to_owned(),
            );
            Memory::full(pages)
        },
        |zero| {
            let of = |share: f64| pages.0 as f64 * (1.0 - share).clamp(0.0, 1.0);
            let [filled, filled_low, filled_high] = [zero.share, zero.share_high, zero.share_low].map(of);
            Memory { pages, filled, filled_low, filled_high }
        },
    );
    let mut asked = wanted.asked;
    if mover != Mover::Dunlin && asked.least.take().is_some() {
        notes.push("only Dunlin has a limit that follows what the VM dirties: reckoned with the most".to_owned());
    }
    let predictions = predict(&taken.curve, &memory, mover, terms, &asked)?;
    let chosen = choose(&predictions, terms.downtime);
    let ways = predictions.into_iter().map(|prediction| Way {
        commands: if prediction.is_available {
            prediction.plan.commands(&taken.vm.name, terms.bandwidth, terms.downtime, &asked)
        } else {
            Vec::new()
        },
        prediction,
    });
    let bytes = |pages: f64| (pages * PAGE_SIZE as f64) as u64;
    Ok(PredictionReport {
        strategies: ways.collect(),
        vm: taken.vm,
        vmm: found.vmm,
        regime: taken.regime,
        is_lower_bound: taken.is_lower_bound,
        notes,
        bandwidth_bytes_per_second: terms.bandwidth.0,
        link_bytes_per_second: asked.link.map(|link| link.0),
        least_bytes_per_second: asked.least.map(|least| least.0),
        hybrid_rounds: asked.hybrid_rounds,
        downtime_ns: terms.downtime.as_nanos() as u64,
        fixed_cost_ns: terms.switch_cost.as_nanos() as u64,
        fixed_cost_from: fixed.from,
        fixed_cost_migrations: fixed.migrations,
        rtt_ns: terms.rtt.as_nanos() as u64,
        memory_bytes: taken.memory_bytes,
        filled_bytes: bytes(memory.filled),
        filled_bytes_low: bytes(memory.filled_low),
        filled_bytes_high: bytes(memory.filled_high),
        unique: taken.curve.rate_over(memory_time),
        chosen,
    })
}

/// A report with every member, for the documentation's test.
#[cfg(test)]
pub(crate) fn sample() -> PredictionReport {
    use crate::predict::{Course, Plan};
    let course = Course {
        total_ns: Some(1),
        blackout_ns: Some(1),
        wire_bytes: 0,
        rounds: 1,
        converges: true,
        guest_slowdown: 0.,
    };
    let prediction = Prediction {
        plan: Plan::PreCopy,
        is_available: true,
        expected: course,
        best: course,
        worst: course,
        meets_downtime: true,
    };
    PredictionReport {
        vm: Observed { name: String::new(), vm_id: Some(crate::model::VmId::random()), pid: 1, cpus: 1 },
        vmm: String::new(),
        regime: Regime::Armed,
        is_lower_bound: false,
        notes: vec![String::new()],
        bandwidth_bytes_per_second: 0,
        link_bytes_per_second: Some(0),
        least_bytes_per_second: Some(0),
        hybrid_rounds: 1,
        downtime_ns: 0,
        fixed_cost_ns: 0,
        fixed_cost_from: CostFrom::Default,
        fixed_cost_migrations: 0,
        rtt_ns: 0,
        memory_bytes: 0,
        filled_bytes: 0,
        filled_bytes_low: 0,
        filled_bytes_high: 0,
        unique: UniqueRate {
            pages_per_second: 0.,
            low_pages_per_second: 0.,
            high_pages_per_second: 0.,
            extrapolated: false,
        },
        strategies: vec![Way { prediction, commands: vec![String::new()] }],
        chosen: Some(Choice { plan: Plan::PreCopy, meets_downtime: true, reason: String::new() }),
    }
}

/// A history with every member, for the documentation's test.
#[cfg(test)]
pub(crate) fn history_sample() -> PredictHistory {
    let some = Some(1.);
    let errors = PlanErrors {
        plan: String::new(),
        migrations: 1,
        total_median_percent: some,
        total_worst_percent: some,
        blackout_median_percent: some,
        blackout_worst_percent: some,
        blackout_median_ns: Some(1),
        blackout_worst_ns: Some(1),
    };
    let record = serde_json::from_str(crate::store::history::SAMPLE);
    PredictHistory { errors: vec![errors], migrations: record.into_iter().collect(), damaged_lines: 0 }
}
