//! Who slows the writers of this process's VM, since when, and what it has cost: what `vm info`, the agent and the audit log tell.
//!
//! Remembers one throttling, from the first order to its end. Must not know how a vCPU is held, nor who may have it held.

use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::model::units::display_duration;
use crate::model::{
    MigrationId, ThrottleHolder, ThrottleStatus, ThrottleView, VcpuLimit, VcpuThrottle, VcpuWrites, VmWrites,
};
use crate::port::THROTTLE_LEASE;
use crate::time::unix_ms;

/// Rates are those of at least so long.
const RATE_OVER_NS: u64 = 100_000_000;

/// What is new of a throttling, for the audit log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Writers are slowed from now on; whose, in words.
    Began(ThrottleHolder, String),
    /// They are not any more; for how long they were and what they lost, in words.
    Ended(ThrottleHolder, String),
}

/// The throttling under way, if there is one.
#[derive(Debug, Default)]
pub(super) struct Throttling(Mutex<Option<Current>>);

#[derive(Debug)]
struct Current {
    holder: ThrottleHolder,
    ordered: Instant,
    /// When the first vCPU was limited.
    stunned: Option<Instant>,
    /// As it was before.
    first: VmWrites,
    /// Two looks that rates follow from.
    looks: [VmWrites; 2],
}

impl Throttling {
    fn lock(&self) -> MutexGuard<'_, Option<Current>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of an order that was carried out, and of what its answer says.
    pub(super) fn ordered(
        &self,
        who: &str,
        migration_id: Option<MigrationId>,
        limits: &[Option<VcpuLimit>],
        writes: &VmWrites,
    ) -> Vec<Change> {
        let mut slot = self.lock();
        let now = Instant::now();
        let is_anothers = |current: &mut Current| {
            // Who has not asked for longer than a lease has lost it.
            let lapsed = now.saturating_duration_since(current.ordered) > THROTTLE_LEASE;
            lapsed || current.holder.who != who || current.holder.migration_id != migration_id
        };
        let mut changes: Vec<Change> = slot.take_if(is_anothers).and_then(|old| old.end(writes)).into_iter().collect();
        let current = slot.get_or_insert_with(|| Current {
            holder: ThrottleHolder { who: who.to_owned(), migration_id, since_unix_ms: unix_ms() },
            ordered: now,
            stunned: None,
            first: writes.clone(),
            looks: [writes.clone(), writes.clone()],
        });
        current.ordered = now;
        if writes.at_ns.saturating_sub(current.looks[1].at_ns) >= RATE_OVER_NS {
            current.looks.swap(0, 1);
            current.looks[1] = writes.clone();
        }
        if current.stunned.is_none() && limits.iter().any(Option::is_some) {
            current.stunned = Some(now);
            changes.push(Change::Began(current.holder.clone(), whose(limits)));
        }
        changes
    }

    /// Takes note that everybody was let go; `writes` is what they have written by now.
    pub(super) fn ended(&self, writes: &VmWrites) -> Option<Change> {
        self.lock().take()?.end(writes)
    }

    /// How it stands.
    pub(super) fn view(&self, status: &ThrottleStatus) -> ThrottleView {
        let ThrottleStatus { is_asked, limits, writes } = status;
        let slot = self.lock();
        let current = slot.as_ref().filter(|_| *is_asked);
        let vcpu = |(index, now): (usize, &VcpuWrites)| VcpuThrottle {
            vcpu: index as u32,
            limit_pages_per_second: limits.get(index).copied().flatten().map(|limit| limit.rate.0),
            pages_per_second: current.map_or(0.0, |current| current.rate(index, writes)),
            held_ns: now.held_ns,
            co_resident_held_ns: now.co_resident_held_ns,
        };
        ThrottleView {
            stunned: limits.iter().any(Option::is_some),
            holder: current.map(|current| current.holder.clone()),
            guest_time_lost_ns: writes.vcpus.iter().map(|vcpu| vcpu.held_ns).sum(),
            vcpus: (writes.vcpus.iter().enumerate().map(vcpu))
                .filter(|vcpu| current.is_some() || vcpu.held_ns > 0)
                .collect(),
        }
    }
}

impl Current {
    /// What a vCPU has written per second of late.
    fn rate(&self, vcpu: usize, now: &VmWrites) -> f64 {
        let [older, newer] = &self.looks;
        let before = if now.at_ns.saturating_sub(newer.at_ns) >= RATE_OVER_NS { newer } else { older };
        let seconds = now.at_ns.saturating_sub(before.at_ns) as f64 / 1e9;
        let pages = |writes: &VmWrites| writes.vcpus.get(vcpu).map_or(0.0, |vcpu| vcpu.pages);
        if seconds > 0.0 { (pages(now) - pages(before)).max(0.0) / seconds } else { 0.0 }
    }

    /// Its end; none if nobody was ever limited.
    fn end(self, now: &VmWrites) -> Option<Change> {
        let lasted =
            self.stunned?.elapsed().min(self.ordered.saturating_duration_since(self.stunned?) + THROTTLE_LEASE);
        let mut words = format!("after {}: ", display_duration(lasted));
        let before = self.first.vcpus.iter().map(|vcpu| vcpu.held_ns).chain(std::iter::repeat(0));
        let lost = |(index, (now, before)): (usize, (&VcpuWrites, u64))| {
            let lost = Duration::from_nanos(now.held_ns.saturating_sub(before));
            (!lost.is_zero()).then(|| format!("vCPU {index} {}", display_duration(lost)))
        };
        let lost: Vec<String> = now.vcpus.iter().zip(before).enumerate().filter_map(lost).collect();
        let _ = match lost.as_slice() {
            [] => write!(words, "no guest time lost"),
            lost => write!(words, "guest time lost: {}", lost.join(", ")),
        };
        Some(Change::Ended(self.holder, words))
    }
}

fn whose(limits: &[Option<VcpuLimit>]) -> String {
    let limited = limits.iter().enumerate().filter_map(|(index, limit)| Some((index, (*limit)?.rate.0)));
    limited.map(|(index, rate)| format!("vCPU {index} to {rate:.0} pages/s")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::PagesPerSecond;

    /// Two vCPUs, of which the second has written and lost so much.
    fn writes(at_ms: u64, pages: f64, held_ms: u64) -> VmWrites {
        let vcpu = VcpuWrites { pages, held_ns: held_ms * 1_000_000, ..VcpuWrites::default() };
        VmWrites { at_ns: at_ms * 1_000_000, vcpus: vec![VcpuWrites::default(), vcpu], ..VmWrites::default() }
    }

    fn limits(rate: f64) -> [Option<VcpuLimit>; 2] {
        [None, Some(VcpuLimit { rate: PagesPerSecond(rate), by_address_space: false })]
    }

    fn status(limits: &[Option<VcpuLimit>], writes: VmWrites) -> ThrottleStatus {
        ThrottleStatus { is_asked: true, limits: limits.to_vec(), writes }
    }

    #[test]
    fn it_tells_who_whom_how_much_and_what_was_lost() {
        let (throttling, id) = (Throttling::default(), Some(MigrationId::random()));
        assert_eq!(throttling.view(&ThrottleStatus::default()), ThrottleView::default());
        // Who only watches has done nothing.
        assert_eq!(throttling.ordered("uid=0 pid=7", id, &[], &writes(1000, 0.0, 500)), []);
        let watched = throttling.view(&status(&[None, None], writes(1050, 0.0, 500)));
        assert!(!watched.stunned && watched.holder.is_some() && watched.vcpus.len() == 2);
        let changes = throttling.ordered("uid=0 pid=7", id, &limits(400.0), &writes(1100, 100.0, 500));
        let [Change::Began(holder, whose)] = changes.as_slice() else { panic!("{changes:?}") };
        assert_eq!((holder.migration_id, whose.as_str()), (id, "vCPU 1 to 400 pages/s"));
        assert_eq!(throttling.ordered("uid=0 pid=7", id, &limits(300.0), &writes(1200, 140.0, 590)), []);
        let view = throttling.view(&status(&limits(300.0), writes(1250, 155.0, 640)));
        assert!(view.stunned && view.holder.as_ref() == Some(holder), "{view:?}");
        assert_eq!((view.vcpus[1].limit_pages_per_second, view.guest_time_lost_ns), (Some(300.0), 640_000_000));
        // Since 1100: 55 pages in 150 ms.
        assert!((view.vcpus[1].pages_per_second - 55.0 / 0.15).abs() < 1e-6, "{view:?}");
        let Some(Change::Ended(_, words)) = throttling.ended(&writes(1300, 170.0, 700)) else { panic!("no end") };
        assert!(words.ends_with("guest time lost: vCPU 1 200.00 ms"), "{words}");
        assert_eq!(throttling.ended(&writes(1300, 170.0, 700)), None);
        // What was lost stays, and who did it does not.
        let after = throttling.view(&ThrottleStatus { writes: writes(1300, 170.0, 700), ..ThrottleStatus::default() });
        assert!(!after.stunned && after.holder.is_none() && after.vcpus.len() == 1, "{after:?}");
        assert_eq!(after.guest_time_lost_ns, 700_000_000);
    }

    #[test]
    fn a_lease_that_has_ended_is_told_when_another_begins() {
        let throttling = Throttling::default();
        throttling.ordered("a", None, &limits(1.0), &writes(0, 0.0, 0));
        let changes = throttling.ordered("b", None, &limits(1.0), &writes(100, 0.0, 30));
        let [Change::Ended(old, _), Change::Began(new, _)] = changes.as_slice() else { panic!("{changes:?}") };
        assert_eq!((old.who.as_str(), new.who.as_str()), ("a", "b"));
        // The lease ends by itself: no limit holds, nobody has it.
        let view = throttling.view(&ThrottleStatus { writes: writes(1500, 0.0, 30), ..ThrottleStatus::default() });
        assert!(view.holder.is_none() && !view.stunned);
    }
}
