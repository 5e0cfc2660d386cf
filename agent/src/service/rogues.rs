//! Who keeps one VM from migrating: profiles in a row, a forecast from each, and the writers that stay above the line.

use std::collections::BTreeMap;

use serde::Serialize;

use super::interrupt::Interrupt;
use super::observe::Observed as ObservedVm;
use super::profile::{Profile, ProfileError, ProfileRequest, Profiler, Progress, WriterProfile};
use crate::model::schema::Schema;
use crate::model::{PageCount, WriteCurve, Writer};
use crate::track::{Forecast, Observed, Patience, Ranking, Regime, RogueWatch, Terms, TermsError, forecast, rank};

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct RogueReport {
    /// Whose.
    pub vm: ObservedVm,
    /// Under which conditions the last profile was taken.
    pub regime: Regime,
    /// Whether the true rates may be higher.
    pub is_lower_bound: bool,
    /// What else there is to say.
    pub notes: Vec<String>,
    /// Goodput of the link, in bytes per second.
    pub bandwidth_bytes_per_second: u64,
    /// The downtime that is allowed.
    pub downtime_ns: u64,
    /// Whether pre-copy would get there, from the last profile.
    pub forecast: Forecast,
    /// Who writes how much, and who would have to write less, from the last profile.
    pub ranking: Ranking,
    /// Profiles that were taken.
    pub observations: u32,
    /// The rogues: who stayed above the line in enough of the profiles, with names where they are known.
    pub rogues: Vec<Rogue>,
}

impl Schema for RogueReport {
    const SCHEMA: &'static str = "dunlin.rogue/v1";
}

/// One rogue.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rogue {
    /// Who.
    pub writer: Writer,
    /// In words.
    pub words: String,
    /// What it writes, in unique pages per second over the memory's part of the downtime, by the last profile.
    pub pages_per_second: f64,
    /// To what it must be slowed; absent if the last profile alone would let it write.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_pages_per_second: Option<f64>,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum RogueError {
    /// There is no profile.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// No VM could be moved so.
    #[error(transparent)]
    Terms(#[from] TermsError),
}

/// Takes `observations` profiles of one window each, and says who stayed above the line.
///
/// # Errors
/// No profile, or terms under which nothing could be moved.
pub fn rogues(
    request: &ProfileRequest,
    terms: &Terms,
    margin: f64,
    observations: u32,
    interrupt: &Interrupt,
    progress: Progress<'_>,
) -> Result<RogueReport, RogueError> {
    terms.memory_time()?;
    let observations = observations.max(1);
    let mut watch = RogueWatch::new(Patience::new((observations as usize * 3).div_ceil(4), observations as usize));
    let mut profiler = Profiler::open(request)?;
    let mut step = 0;
    loop {
        progress(step, observations);
        let taken = profiler.measure(interrupt, &mut |_, _| {})?;
        let ranking = ranked(&taken.curve, &taken.writers, terms, margin)?;
        watch.observe(&ranking, &BTreeMap::new());
        step += 1;
        if step == observations {
            progress(step, observations);
            return Ok(report(&taken, ranking, &watch, terms, observations)?);
        }
    }
}

/// The ranking of the writers of one curve.
pub(super) fn ranked(
    curve: &WriteCurve,
    writers: &[WriterProfile],
    terms: &Terms,
    margin: f64,
) -> Result<Ranking, TermsError> {
    let whole = Observed { writer: Writer::Vm, curve, share: 1.0 };
    let parts =
        writers.iter().map(|part| Observed { writer: part.writer.clone(), curve: &part.curve, share: part.share });
    let observed: Vec<Observed<'_>> = std::iter::once(whole).chain(parts).collect();
    rank(&observed, terms, margin)
}

fn report(
    profile: &Profile,
    ranking: Ranking,
    watch: &RogueWatch,
    terms: &Terms,
    observations: u32,
) -> Result<RogueReport, TermsError> {
    let memory = PageCount::covering(profile.memory_bytes);
    let rogues = named(watch, &ranking);
    let curve: &WriteCurve = &profile.curve;
    Ok(RogueReport {
        vm: profile.vm.clone(),
        regime: profile.regime,
        is_lower_bound: profile.is_lower_bound,
        notes: profile.notes.clone(),
        bandwidth_bytes_per_second: terms.bandwidth.0,
        downtime_ns: terms.downtime.as_nanos() as u64,
        forecast: forecast(curve, memory, terms)?,
        ranking,
        observations,
        rogues,
    })
}

/// The rogues of a watch, with what the last ranking has of them.
pub(super) fn named(watch: &RogueWatch, ranking: &Ranking) -> Vec<Rogue> {
    // A thread, an address space, code: what can be slowed. The VM and its memory are not who writes.
    let culprits = watch.rogues().filter(|writer| !matches!(writer, Writer::Vm | Writer::Region { .. }));
    let rogues = culprits.map(|writer| {
        let found = ranking.writers.iter().find(|ranked| ranked.writer.identity() == *writer);
        let named = found.map_or_else(|| writer.clone(), |ranked| ranked.writer.clone());
        Rogue {
            words: named.to_string(),
            writer: named,
            pages_per_second: found.map_or(0.0, |ranked| ranked.pages_per_second),
            limit_pages_per_second: found.and_then(|ranked| ranked.limit_pages_per_second),
        }
    });
    let mut rogues: Vec<Rogue> = rogues.collect();
    rogues.sort_by(|a, b| b.pages_per_second.total_cmp(&a.pages_per_second));
    rogues
}
