//! Rogues: the writers that keep a VM's curve above what the link can carry, and how far each would have to be slowed.
//!
//! All rates are U(D')/D': unique pages per second over the memory's part of the downtime, the one rate that decides whether pre-copy
//! converges ([`super::feasible`]). What may be written in all is what the link carries, less a margin. It is shared max-min fairly:
//! whoever writes less than the water line keeps all of it, everyone above is brought down to the line, and no one's part
//! could grow without that of someone who has no more (Bertsekas and Gallager, "Data Networks", 6.5.2). vCPUs share what
//! is allowed to the VM; within a vCPU that must be slowed, its address spaces share what is allowed to it, and within these their
//! code. Regions are another cut and share on their own.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::Serialize;

use super::feasible::{Terms, TermsError};
use crate::model::{AddressSpace, WriteCurve, Writer, max_min};

/// The part of the link that is left free for what no forecast knows.
pub const DEFAULT_MARGIN: f64 = 0.1;
/// Differences of rates below this part of the larger are rounding.
const ROUNDING: f64 = 1e-9;

/// What was seen of one writer.
#[derive(Clone, Debug)]
pub struct Observed<'a> {
    /// Who.
    pub writer: Writer,
    /// A curve that it is part of.
    pub curve: &'a WriteCurve,
    /// Its part of that curve, 0 to 1: 1 when the curve is its own, else what events or samples put down to it.
    pub share: f64,
}

/// One writer's place.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ranked {
    /// Who.
    pub writer: Writer,
    /// Its unique pages per second over D'.
    pub pages_per_second: f64,
    /// Lower edge of the band.
    pub low_pages_per_second: f64,
    /// Upper edge.
    pub high_pages_per_second: f64,
    /// Its part of what the whole VM writes, 0 to 1.
    pub share: f64,
    /// The rate to which it must be slowed for the VM to converge; absent if it may write on as it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_pages_per_second: Option<f64>,
}

/// Who writes how much, and who would have to write less.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ranking {
    /// What the whole VM writes.
    pub total_pages_per_second: f64,
    /// What it may write.
    pub allowed_pages_per_second: f64,
    /// The part of it that no vCPU wrote (devices, KVM itself, what was not attributed) and slowing vCPUs does not lower.
    pub unattributed_pages_per_second: f64,
    /// What each vCPU may write at most; absent if none must be slowed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub water_line_pages_per_second: Option<f64>,
    /// Whether slowing vCPUs is enough for the VM to converge; true when nobody must be slowed.
    pub enough: bool,
    /// All writers, the largest rate first.
    pub writers: Vec<Ranked>,
}

impl Ranking {
    /// Whether the VM converges as it writes now.
    pub fn converges(&self) -> bool {
        self.total_pages_per_second <= self.allowed_pages_per_second
    }

    /// Those that must be slowed.
    pub fn above(&self) -> impl Iterator<Item = &Ranked> {
        self.writers.iter().filter(|ranked| ranked.limit_pages_per_second.is_some())
    }
}

/// Of what a writer is part of, as a group that shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Group {
    Vm,
    Vcpus,
    Regions,
    AddressSpacesOf(u32),
    CodeOf(u32, AddressSpace),
}

fn group(writer: &Writer) -> Group {
    match writer {
        Writer::Vm => Group::Vm,
        Writer::Vcpu { .. } => Group::Vcpus,
        Writer::Region { .. } => Group::Regions,
        Writer::AddressSpace { vcpu, .. } => Group::AddressSpacesOf(*vcpu),
        Writer::Code { vcpu, address_space, .. } => Group::CodeOf(*vcpu, *address_space),
    }
}

/// The group that shares what `writer` may write.
fn parts_of(writer: &Writer) -> Option<Group> {
    match writer {
        Writer::Vcpu { index, .. } => Some(Group::AddressSpacesOf(*index)),
        Writer::AddressSpace { vcpu, address_space, .. } => Some(Group::CodeOf(*vcpu, *address_space)),
        Writer::Vm | Writer::Code { .. } | Writer::Region { .. } => None,
    }
}

/// Ranks writers, and finds who must be slowed to what rate. The VM's own rate is that of [`Writer::Vm`], else the sum of its
/// vCPUs. `margin` is the part of the link that is left free, 0 to 1.
///
/// # Errors
/// Under these terms no VM could be moved.
pub fn rank(observed: &[Observed<'_>], terms: &Terms, margin: f64) -> Result<Ranking, TermsError> {
    let interval = terms.memory_time()?;
    let margin = if margin.is_finite() { margin.clamp(0.0, 1.0) } else { DEFAULT_MARGIN };
    let allowed = terms.pages_per_second().0 * (1.0 - margin);
    let mut writers: Vec<Ranked> = observed
        .iter()
        .map(|Observed { writer, curve, share }| {
            let part = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
            let rate = curve.rate_over(interval);
            Ranked {
                writer: writer.clone(),
                pages_per_second: rate.pages_per_second * part,
                low_pages_per_second: rate.low_pages_per_second * part,
                high_pages_per_second: rate.high_pages_per_second * part,
                share: 0.0,
                limit_pages_per_second: None,
            }
        })
        .collect();
    writers.sort_by(|a, b| b.pages_per_second.total_cmp(&a.pages_per_second).then_with(|| a.writer.cmp(&b.writer)));
    let mut groups: BTreeMap<Group, Vec<usize>> = BTreeMap::new();
    for (index, ranked) in writers.iter().enumerate() {
        groups.entry(group(&ranked.writer)).or_default().push(index);
    }
    let sum = |writers: &[Ranked], members: Option<&Vec<usize>>| {
        members.map(|members| members.iter().map(|&i| writers[i].pages_per_second).sum::<f64>())
    };
    let by_vcpus = sum(&writers, groups.get(&Group::Vcpus));
    let total = sum(&writers, groups.get(&Group::Vm)).or(by_vcpus).unwrap_or_default();
    for ranked in &mut writers {
        ranked.share = if total > 0.0 { (ranked.pages_per_second / total).min(1.0) } else { 0.0 };
    }
    let unattributed = by_vcpus.map_or(0.0, |vcpus| (total - vcpus).max(0.0));
    let mut ranking = Ranking {
        total_pages_per_second: total,
        allowed_pages_per_second: allowed,
        unattributed_pages_per_second: unattributed,
        water_line_pages_per_second: None,
        enough: true,
        writers,
    };
    if ranking.converges() {
        return Ok(ranking);
    }
    if let Some(&[vm, ..]) = groups.get(&Group::Vm).map(Vec::as_slice) {
        ranking.writers[vm].limit_pages_per_second = Some(allowed);
    }
    ranking.enough = unattributed < allowed && by_vcpus.is_some();
    ranking.water_line_pages_per_second =
        share_out(&mut ranking.writers, &groups, Group::Vcpus, allowed - unattributed, 0.0);
    // A region's pages are written by whomever: what no region was seen to take shares with them.
    let others = sum(&ranking.writers, groups.get(&Group::Regions)).map_or(0.0, |regions| (total - regions).max(0.0));
    share_out(&mut ranking.writers, &groups, Group::Regions, allowed, others);
    Ok(ranking)
}

/// Shares `capacity` among the members of `group` and `others`, which are not members, and what each gets among its parts.
/// Returns the water line.
fn share_out(
    writers: &mut [Ranked],
    groups: &BTreeMap<Group, Vec<usize>>,
    which: Group,
    capacity: f64,
    others: f64,
) -> Option<f64> {
    let members = groups.get(&which)?;
    let mut demands: Vec<f64> = members.iter().map(|&index| writers[index].pages_per_second).collect();
    demands.push(others);
    let line = max_min(&demands, capacity).line?;
    for &index in members {
        let rate = writers[index].pages_per_second;
        if rate <= line * (1.0 + ROUNDING) {
            continue;
        }
        writers[index].limit_pages_per_second = Some(line);
        if let Some(parts) = parts_of(&writers[index].writer) {
            let known: f64 = groups.get(&parts).into_iter().flatten().map(|&i| writers[i].pages_per_second).sum();
            share_out(writers, groups, parts, line, (rate - known).max(0.0));
        }
    }
    Some(line)
}

/// How often a writer must be seen above the line before it is called a rogue, and below before it is none any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    of: usize,
    times: usize,
}

impl Patience {
    /// `times` of the last `of` observations, which are 1 to 64; `times` is raised above half of them, so that the same observations
    /// cannot both make a rogue and end it.
    pub fn new(times: usize, of: usize) -> Self {
        let of = of.clamp(1, 64);
        Self { of, times: times.clamp(of / 2 + 1, of) }
    }
}

impl Default for Patience {
    /// Three of four.
    fn default() -> Self {
        Self::new(3, 4)
    }
}

/// What changed with an observation.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "change", rename_all = "kebab-case")]
pub enum RogueChange {
    /// A writer is a rogue from now on.
    Appeared {
        /// Who.
        writer: Writer,
        /// To what it must be slowed.
        limit_pages_per_second: f64,
    },
    /// It is none any more.
    Ended {
        /// Who.
        writer: Writer,
    },
}

/// Tells rogues from bursts, over observations in a row.
#[derive(Debug, Default)]
pub struct RogueWatch {
    patience: Patience,
    seen: BTreeMap<Writer, Seen>,
}

/// Of one writer the last observations, the newest at the front.
#[derive(Debug, Default)]
struct Seen {
    above: VecDeque<bool>,
    rogue: bool,
}

/// A writer that is held to its limit and reaches this part of it would be above the line if it were let go.
const PRESSES: f64 = 0.8;
/// Writers that are remembered at once; a guest can make address spaces without end.
const MAX_SEEN: usize = 4096;

impl RogueWatch {
    /// A watch with this patience.
    pub fn new(patience: Patience) -> Self {
        Self { patience, seen: BTreeMap::new() }
    }

    /// Takes the next observation. `held` are the writers that are being slowed now, and to what rate (pages per second): such a one is
    /// above while it uses up what it is allowed, else slowing a rogue would be what acquits it. A writer that is not in
    /// the ranking is below, and so is one whose band holds the line, unless none of its group writes more: what was seen of it may be chance.
    pub fn observe(&mut self, ranking: &Ranking, held: &BTreeMap<Writer, f64>) -> Vec<RogueChange> {
        let held: BTreeMap<Writer, f64> = held.iter().map(|(writer, &limit)| (writer.identity(), limit)).collect();
        let mut above: BTreeMap<Writer, f64> = BTreeMap::new();
        let mut largest = BTreeSet::new();
        // The largest come first, so they are what there is room for.
        for ranked in &ranking.writers {
            let identity = ranked.writer.identity();
            let pressed = held.get(&identity).copied().filter(|&limit| ranked.pages_per_second >= limit * PRESSES);
            // Whoever writes most is above the line wherever it is; of the others it must be sure.
            let is_largest = largest.insert(group(&ranked.writer));
            let sure = ranked.limit_pages_per_second.filter(|&limit| is_largest || ranked.low_pages_per_second > limit);
            let Some(limit) = sure.or(pressed) else { continue };
            if self.seen.contains_key(&identity) || self.seen.len() < MAX_SEEN {
                self.seen.entry(identity.clone()).or_default();
                above.insert(identity, limit);
            }
        }
        let Patience { of, times } = self.patience;
        let mut changes = Vec::new();
        self.seen.retain(|writer, seen| {
            let limit = above.get(writer);
            seen.above.push_front(limit.is_some());
            seen.above.truncate(of);
            let ups = seen.above.iter().filter(|&&up| up).count();
            if let (Some(&limit_pages_per_second), false, true) = (limit, seen.rogue, ups >= times) {
                seen.rogue = true;
                changes.push(RogueChange::Appeared { writer: writer.clone(), limit_pages_per_second });
            } else if seen.rogue && limit.is_none() && seen.above.len() - ups >= times {
                seen.rogue = false;
                changes.push(RogueChange::Ended { writer: writer.clone() });
            }
            seen.rogue || ups > 0
        });
        changes
    }

    /// The rogues there are, without the names of their processes.
    pub fn rogues(&self) -> impl Iterator<Item = &Writer> {
        self.seen.iter().filter(|(_, seen)| seen.rogue).map(|(writer, _)| writer)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::model::curve::tests::curve_of;
    use crate::model::{BytesPerSecond, Gpa, GuestProcess, Gva, MemoryRange};

    const MS: [f64; 6] = [1.0, 5.0, 20.0, 80.0, 320.0, 1280.0];

    /// 20 ms for memory, at `pages` pages per second.
    fn terms(pages: f64) -> Terms {
        Terms {
            bandwidth: BytesPerSecond((pages * 4096.0) as u64),
            downtime: Duration::from_millis(30),
            switch_cost: Duration::from_millis(9),
            rtt: Duration::from_millis(1),
        }
    }

    /// A writer of so many unique pages per second, which never wraps around.
    fn steady(rate: f64) -> WriteCurve {
        let points = MS.iter().map(|&ms| crate::model::CurvePoint::exact((ms * 1e6) as u64, rate * ms / 1e3));
        WriteCurve::new(points.collect()).unwrap()
    }

    fn vcpu(index: u32) -> Writer {
        Writer::Vcpu { index, thread_id: 100 + index }
    }

    fn space(vcpu: u32, root: u64) -> Writer {
        Writer::AddressSpace { vcpu, address_space: AddressSpace(root), process: None }
    }

    fn seen(writer: Writer, curve: &WriteCurve, share: f64) -> Observed<'_> {
        Observed { writer, curve, share }
    }

    fn limits(ranking: &Ranking) -> Vec<(Writer, f64)> {
        let round = |limit: Option<f64>| limit.unwrap().round();
        ranking.above().map(|ranked| (ranked.writer.clone(), round(ranked.limit_pages_per_second))).collect()
    }

    proptest! {
        /// Any mixture: limits lie below the rates and add up to no more than is allowed.
        #[test]
        fn limits_add_up(vcpus in prop::collection::vec((0.0..1e5f64, prop::collection::vec(0.0..1.0f64, 0..5)), 1..8), link in 1e3..1e6f64) {
            let curves: Vec<WriteCurve> = vcpus.iter().map(|(rate, _)| steady(*rate)).collect();
            let mut observed = Vec::new();
            for (index, (curve, (_, shares))) in curves.iter().zip(&vcpus).enumerate() {
                observed.push(seen(vcpu(index as u32), curve, 1.0));
                let sum = shares.iter().sum::<f64>().max(1.0);
                observed.extend(shares.iter().enumerate().map(|(i, share)| seen(space(index as u32, i as u64), curve, share / sum)));
            }
            let ranking = rank(&observed, &terms(link), DEFAULT_MARGIN).unwrap();
            let after = |ranked: &Ranked| ranked.limit_pages_per_second.unwrap_or(ranked.pages_per_second);
            let of = |which: Group| ranking.writers.iter().filter(move |ranked| group(&ranked.writer) == which);
            prop_assert_eq!(ranking.above().next().is_none(), ranking.converges());
            prop_assert!(of(Group::Vcpus).map(after).sum::<f64>() <= ranking.allowed_pages_per_second * (1.0 + 1e-6));
            for ranked in &ranking.writers {
                prop_assert!(after(ranked) <= ranked.pages_per_second);
                if let Writer::Vcpu { index, .. } = ranked.writer {
                    let parts: f64 = of(Group::AddressSpacesOf(index)).map(after).sum();
                    prop_assert!(parts <= after(ranked) * (1.0 + 1e-6) + 1e-6);
                }
            }
        }

        /// A writer is named only after enough observations of the last few, whatever came before.
        #[test]
        fn a_rogue_was_above_often_enough(ups in prop::collection::vec(any::<bool>(), 1..60)) {
            let (quiet, loud) = (steady(10.0), steady(10_000.0));
            let mut watch = RogueWatch::default();
            let mut was = false;
            for now in 0..ups.len() {
                let curve = if ups[now] { &loud } else { &quiet };
                let ranking = rank(&[seen(vcpu(0), curve, 1.0)], &terms(1000.0), DEFAULT_MARGIN).unwrap();
                watch.observe(&ranking, &BTreeMap::new());
                let rogue = watch.rogues().next().is_some();
                let last = &ups[now.saturating_sub(3)..=now];
                let above = last.iter().filter(|&&up| up).count();
                let enough = if rogue { above } else { last.len() - above };
                prop_assert!(rogue == was || enough >= 3);
                prop_assert!(above < 4 || rogue);
                prop_assert!(above > 0 || last.len() < 4 || !rogue);
                was = rogue;
            }
            prop_assert!(watch.seen.len() <= 1);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        /// Two writers, of which the sum does not fit and one alone is too much: that one is named, and never the other. When the
        /// sum fits, nobody is.
        #[test]
        fn of_two_writers_the_right_one_is_named_in_all_trials(
            link in 5e3..1e6f64, small in 0.01..0.45f64, large in 1.05..20.0f64, rogue in 0..2u32, fits in 0.1..0.99f64, first in 0.0..1.0f64,
        ) {
            let allowed = link * (1.0 - DEFAULT_MARGIN);
            let (calm, busy) = (steady(allowed * small), steady(allowed * large));
            let observed = [seen(vcpu(1 - rogue), &calm, 1.0), seen(vcpu(rogue), &busy, 1.0)];
            let ranking = rank(&observed, &terms(link), DEFAULT_MARGIN).unwrap();
            prop_assert!(ranking.above().map(|ranked| &ranked.writer).eq([&vcpu(rogue)]), "{:?}", ranking);

            let (one, other) = (steady(allowed * fits * first), steady(allowed * fits * (1.0 - first)));
            let observed = [seen(vcpu(0), &one, 1.0), seen(vcpu(1), &other, 1.0)];
            let ranking = rank(&observed, &terms(link), DEFAULT_MARGIN).unwrap();
            prop_assert!(ranking.above().next().is_none() && ranking.enough);
        }
    }

    #[test]
    fn the_process_is_slowed_and_its_neighbours_are_not() {
        let (vm, busy, calm) = (steady(11_000.0), steady(10_000.0), steady(1000.0));
        let code =
            Writer::Code { vcpu: 0, address_space: AddressSpace(1), first: Gva(0x40_0000), last: Gva(0x40_0fff) };
        let observed = [
            seen(Writer::Vm, &vm, 1.0),
            seen(vcpu(0), &busy, 1.0),
            seen(vcpu(1), &calm, 1.0),
            seen(space(0, 1), &busy, 0.9),
            seen(space(0, 2), &busy, 0.1),
            seen(code.clone(), &busy, 0.8),
        ];
        let ranking = rank(&observed, &terms(5000.0), DEFAULT_MARGIN).unwrap();
        // 4500 are allowed: 1000 stay with vCPU 1, 3500 are left to vCPU 0, of which 1000 stay with the other process, and of the
        // 2500 of the first, 1000 (of 9000) with what is not that code.
        assert_eq!(limits(&ranking), [(Writer::Vm, 4500.0), (vcpu(0), 3500.0), (space(0, 1), 2500.0), (code, 1500.0)]);
        assert_eq!(ranking.water_line_pages_per_second.map(f64::round), Some(3500.0));
        assert!(ranking.enough && (ranking.writers[1].share - 10.0 / 11.0).abs() < 1e-9);
    }

    #[test]
    fn what_no_vcpu_wrote_is_nobodys_to_save() {
        let (vm, one) = (steady(10_000.0), steady(1000.0));
        let observed = [seen(Writer::Vm, &vm, 1.0), seen(vcpu(0), &one, 1.0)];
        let ranking = rank(&observed, &terms(5000.0), DEFAULT_MARGIN).unwrap();
        assert!(!ranking.enough && (ranking.unattributed_pages_per_second - 9000.0).abs() < 1e-6);
        let fits = rank(&observed, &terms(10_500.0), DEFAULT_MARGIN).unwrap();
        assert!(fits.enough && limits(&fits) == [(Writer::Vm, 9450.0), (vcpu(0), 450.0)], "{fits:?}");
    }

    #[test]
    fn regions_are_ranked_on_their_own() {
        let vm = steady(10_000.0);
        let region = |start: u64| Writer::Region { range: MemoryRange { start: Gpa(start), bytes: 2 << 20 } };
        let observed = [
            seen(Writer::Vm, &vm, 1.0),
            seen(region(0), &vm, 0.7),
            seen(region(2 << 20), &vm, 0.1),
            seen(vcpu(0), &vm, 1.0),
        ];
        let ranking = rank(&observed, &terms(5000.0), DEFAULT_MARGIN).unwrap();
        // 1000 and the 2000 of all other memory are below the line.
        assert_eq!(limits(&ranking), [(Writer::Vm, 4500.0), (vcpu(0), 4500.0), (region(0), 1750.0)]);
    }

    #[test]
    fn the_rate_is_that_over_the_downtime_and_not_over_a_second() {
        // Few pages, written all the time: 500 in any 20 ms, and no more in a second.
        let small_and_hot = curve_of(&[(500.0, 1e4)], &MS);
        let ranking = rank(&[seen(vcpu(0), &small_and_hot, 1.0)], &terms(10_000.0), DEFAULT_MARGIN).unwrap();
        assert!((ranking.total_pages_per_second - 25_000.0).abs() < 1.0 && !ranking.converges());
    }

    #[test]
    fn a_burst_is_no_rogue_and_slowing_acquits_nobody() {
        let (quiet, loud) = (steady(10.0), steady(10_000.0));
        let observe = |watch: &mut RogueWatch, curve, process, held: &BTreeMap<Writer, f64>| {
            let writer = Writer::AddressSpace { vcpu: 0, address_space: AddressSpace(1), process };
            let observed = [seen(vcpu(0), curve, 1.0), seen(writer, curve, 1.0)];
            watch.observe(&rank(&observed, &terms(1000.0), DEFAULT_MARGIN).unwrap(), held)
        };
        let none = BTreeMap::new();
        let mut watch = RogueWatch::default();
        assert!(observe(&mut watch, &loud, None, &none).is_empty());
        assert!(observe(&mut watch, &loud, None, &none).is_empty());
        assert!((0..5).all(|_| observe(&mut watch, &quiet, None, &none).is_empty()) && watch.seen.is_empty());

        observe(&mut watch, &loud, None, &none);
        observe(&mut watch, &quiet, None, &none);
        observe(&mut watch, &loud, None, &none);
        // A name that becomes known meanwhile makes no new writer.
        let process = || Some(GuestProcess { pid: 1, name: "db".to_owned(), threads: None });
        let changes = observe(&mut watch, &loud, process(), &none);
        assert_eq!(changes.len(), 2, "{changes:?}");
        assert!(watch.rogues().eq([&vcpu(0), &space(0, 1)]), "{:?}", watch.rogues().collect::<Vec<_>>());

        // Held to 900 it writes 900: allowed, and still what it was.
        let held: BTreeMap<Writer, f64> = [(vcpu(0), 900.0), (space(0, 1), 900.0)].into();
        let slowed = steady(890.0);
        assert!((0..10).all(|_| observe(&mut watch, &slowed, process(), &held).is_empty()));
        // It calms down.
        assert!(observe(&mut watch, &quiet, process(), &held).is_empty());
        assert!(observe(&mut watch, &quiet, process(), &held).is_empty());
        assert_eq!(observe(&mut watch, &quiet, process(), &held).len(), 2);
        assert_eq!(watch.rogues().count(), 0);
    }

    #[test]
    fn of_those_that_may_be_below_by_chance_only_the_largest_is_a_rogue() {
        let band = |rate: f64, low: f64| {
            let point = |ms: &f64| crate::model::CurvePoint {
                interval_ns: (ms * 1e6) as u64,
                unique_pages: rate * ms / 1e3,
                low_pages: low * ms / 1e3,
                high_pages: 2.0 * rate * ms / 1e3,
            };
            WriteCurve::new(MS.iter().map(point).collect()).unwrap()
        };
        // The line is at 450: one is surely above it, one is by what was counted, and the largest may be anywhere.
        let (largest, sure, chance) = (band(2000.0, 100.0), band(1500.0, 1000.0), band(800.0, 100.0));
        let mut watch = RogueWatch::default();
        for _ in 0..3 {
            let observed = [seen(vcpu(0), &largest, 1.0), seen(vcpu(1), &sure, 1.0), seen(vcpu(2), &chance, 1.0)];
            let ranking = rank(&observed, &terms(1500.0), DEFAULT_MARGIN).unwrap();
            assert_eq!(limits(&ranking).len(), 3);
            watch.observe(&ranking, &BTreeMap::new());
        }
        assert_eq!(watch.rogues().collect::<Vec<_>>(), [&vcpu(0).identity(), &vcpu(1).identity()]);
    }

    #[test]
    fn a_guest_that_makes_address_spaces_without_end_fills_nothing() {
        let loud = steady(1e6);
        let mut watch = RogueWatch::default();
        for round in 0..4 {
            let roots = (0..2000).map(|i| round * 2000 + i);
            let mut observed = vec![seen(vcpu(0), &loud, 1.0)];
            observed.extend(roots.map(|root| seen(space(0, root), &loud, 1.0)));
            watch.observe(&rank(&observed, &terms(1000.0), DEFAULT_MARGIN).unwrap(), &BTreeMap::new());
            assert!(watch.seen.len() <= MAX_SEEN);
        }
    }

    #[test]
    fn patience_is_more_than_half() {
        assert_eq!(Patience::new(1, 4), Patience::new(3, 4));
        assert_eq!(Patience::new(9, 4), Patience::new(4, 4));
        assert_eq!(Patience::new(0, 0), Patience::new(1, 1));
    }
}
