//! From two samples and the pages between them to rates. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::regime::{Protection, Regime};
use crate::model::{PageCount, PagesPerSecond};
use crate::port::{EventSample, LostEvents, ThreadEvents};

/// Which event a rate counts.
const FROM_RING: &str = "kvm_dirty_ring_push";
const FROM_PAGE_TABLES: &str = "kvm_mmu_set_spte, fast_page_fault";

/// Pushes to a ring for each page that turned writable, beyond which the ring is believed instead of the page tables.
///
/// KVM pushes a page again each time that it writes there itself (an emulated instruction, a clock page), so pushes
/// outnumber pages several times. Where the hardware keeps a log of its own (PML), page tables show next to nothing.
const PUSHES_A_PAGE: u64 = 64;

/// How a VM wrote its memory during one interval.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DirtyRate {
    /// The interval's true length.
    pub interval_ns: u64,
    /// Events of [`DirtyRate::source`] per second.
    pub pages_per_second: f64,
    /// The same in bytes.
    pub bytes_per_second: f64,
    /// Different pages that turned writable in the interval.
    pub unique_pages: u64,
    /// The same in bytes.
    pub unique_bytes: u64,
    /// Under which conditions.
    pub regime: Regime,
    /// What the figures mean then.
    pub meaning: &'static str,
    /// Whether the true rate may be higher.
    pub is_lower_bound: bool,
    /// The tracepoints that the rate was counted on.
    pub source: &'static str,
    /// Entries that KVM pushed to a dirty ring, per second: the same page again each time that KVM itself writes it.
    pub dirty_ring_pushes_per_second: f64,
    /// Mappings of 2 MiB and larger among the events: each counts all pages that it covers.
    pub huge_mappings: u64,
    /// Threads that caused events since tracking began, busiest first.
    pub threads: Vec<ThreadRate>,
    /// Exits to user space in the interval, by reason.
    pub exits: BTreeMap<String, u64>,
    /// Events that were not counted in full, in the interval.
    pub lost_events: Lost,
}

/// One thread's part.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ThreadRate {
    /// Thread id: a vCPU's thread, or one that acts for the VM.
    pub thread_id: u32,
    /// The thread's name, unless it has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its pages per second.
    pub pages_per_second: f64,
    /// Its part of all pages, 0 to 1.
    pub share: f64,
    /// Its exits to user space per second.
    pub exits_per_second: f64,
    /// Its exits from guest code per second, those that KVM handles itself among them; zero where the backend does not tell.
    pub guest_exits_per_second: f64,
}

/// [`LostEvents`] with their sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Lost {
    /// All.
    pub total: u64,
    /// Pages beyond the tracked range.
    pub out_of_range: u64,
    /// Events of threads for which there was no room.
    pub threads_full: u64,
    /// Exits for whose reason there was no room.
    pub exits_full: u64,
    /// Mappings larger than 2 MiB.
    pub too_large: u64,
    /// Page table entries that could not be read.
    pub unreadable: u64,
    /// Writes whose address space or instruction could not be read: counted, not lost, and nobody's.
    pub unattributed: u64,
    /// Single writes (`dunlin record --writes`) that were counted and not kept, for want of room: no figure is lower for it.
    pub writes_full: u64,
}

impl From<LostEvents> for Lost {
    fn from(lost: LostEvents) -> Self {
        Self {
            total: lost.total(),
            out_of_range: lost.out_of_range,
            threads_full: lost.threads_full,
            exits_full: lost.exits_full,
            too_large: lost.too_large,
            unreadable: lost.unreadable,
            unattributed: lost.unattributed,
            writes_full: lost.writes_full,
        }
    }
}

/// What happened between two samples that lie `interval` apart, in which `unique` different pages turned writable.
pub fn rate_between(
    before: &EventSample,
    after: &EventSample,
    interval: Duration,
    unique: PageCount,
    protection: Protection,
) -> DirtyRate {
    let nothing = ThreadEvents::default();
    let threads: Vec<(u32, ThreadEvents)> =
        after.threads.iter().map(|(&id, now)| (id, now.since(before.threads.get(&id).unwrap_or(&nothing)))).collect();
    let sum = |of: fn(&ThreadEvents) -> u64| threads.iter().map(|(_, events)| of(events)).sum::<u64>();
    let (pushed, mapped) = (sum(|e| e.dirty_ring_pushes), sum(|e| e.pages_made_writable));
    let from_ring = pushed > mapped.saturating_mul(PUSHES_A_PAGE);
    let pages_of: fn(&ThreadEvents) -> u64 =
        if from_ring { |e| e.dirty_ring_pushes } else { |e| e.pages_made_writable };
    let regime = match protection {
        Protection::Ours => Regime::Armed,
        Protection::Others => Regime::Logged,
        // Where the kernel's structures cannot be read, a ring in use still shows.
        Protection::Unseen if pushed > 0 => Regime::Logged,
        Protection::Unseen => Regime::Passive,
    };
    let pages = sum(pages_of);
    let rate = PagesPerSecond::over(PageCount(pages), interval);
    let mut exits = BTreeMap::new();
    for (reason, times) in threads.iter().flat_map(|(_, events)| &events.exits) {
        *exits.entry(reason.clone()).or_default() += times.count;
    }
    exits.retain(|_, count| *count > 0);
    let mut rates: Vec<ThreadRate> = threads
        .iter()
        .map(|(id, events)| ThreadRate {
            thread_id: *id,
            name: None,
            pages_per_second: PagesPerSecond::over(PageCount(pages_of(events)), interval).0,
            share: if pages == 0 { 0.0 } else { pages_of(events) as f64 / pages as f64 },
            exits_per_second: PagesPerSecond::over(
                PageCount(events.exits.values().map(|times| times.count).sum()),
                interval,
            )
            .0,
            guest_exits_per_second: PagesPerSecond::over(PageCount(events.guest_exits), interval).0,
        })
        .collect();
    rates.sort_by(|a, b| b.pages_per_second.total_cmp(&a.pages_per_second).then(a.thread_id.cmp(&b.thread_id)));
    DirtyRate {
        interval_ns: interval.as_nanos() as u64,
        pages_per_second: rate.0,
        bytes_per_second: rate.0 * PageCount(1).bytes() as f64,
        unique_pages: unique.0,
        unique_bytes: unique.bytes(),
        regime,
        meaning: regime.meaning(),
        is_lower_bound: regime.is_lower_bound(),
        source: if from_ring { FROM_RING } else { FROM_PAGE_TABLES },
        dirty_ring_pushes_per_second: PagesPerSecond::over(PageCount(pushed), interval).0,
        huge_mappings: sum(|e| e.huge_mappings),
        threads: rates,
        exits,
        lost_events: after.lost.since(&before.lost).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ExitTimes;

    fn sample(threads: &[(u32, u64, u64)]) -> EventSample {
        let threads = threads.iter().map(|&(id, pages_made_writable, dirty_ring_pushes)| {
            let mmio = ExitTimes { count: pages_made_writable / 10, ..ExitTimes::default() };
            let exits = BTreeMap::from([("mmio".to_owned(), mmio)]);
            (id, ThreadEvents { pages_made_writable, dirty_ring_pushes, exits, ..ThreadEvents::default() })
        });
        EventSample { threads: threads.collect(), lost: LostEvents::default() }
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-9
    }

    #[test]
    fn only_what_happened_in_the_interval_counts() {
        let before = sample(&[(1, 100, 0), (2, 50, 0)]);
        let after = sample(&[(1, 400, 0), (2, 150, 0), (3, 100, 0)]);
        let rate = rate_between(&before, &after, Duration::from_millis(500), PageCount(350), Protection::Unseen);
        assert!(close(rate.pages_per_second, 1000.0) && close(rate.bytes_per_second, 4_096_000.0));
        assert_eq!((rate.unique_pages, rate.regime, rate.is_lower_bound), (350, Regime::Passive, true));
        assert_eq!(rate.threads.iter().map(|t| t.thread_id).collect::<Vec<_>>(), [1, 2, 3]);
        assert!(close(rate.threads[0].share, 0.6));
        assert_eq!(rate.exits, BTreeMap::from([("mmio".to_owned(), 30 + 10 + 10)]));
    }

    #[test]
    fn a_ring_names_its_regime_and_is_believed_only_where_page_tables_show_nothing() {
        let before = sample(&[(1, 0, 0)]);
        let measure = |mapped, pushed, protection| {
            rate_between(&before, &sample(&[(1, mapped, pushed)]), Duration::from_secs(1), PageCount(100), protection)
        };
        let emulating = measure(100, 517, Protection::Unseen);
        assert_eq!((emulating.regime, emulating.source), (Regime::Logged, FROM_PAGE_TABLES));
        assert!(close(emulating.pages_per_second, 100.0) && close(emulating.dirty_ring_pushes_per_second, 517.0));
        let hardware_log = measure(1, 5000, Protection::Others);
        assert_eq!((hardware_log.regime, hardware_log.source), (Regime::Logged, FROM_RING));
        assert!(close(hardware_log.pages_per_second, 5000.0));
        let armed = measure(100, 103, Protection::Ours);
        assert_eq!((armed.regime, armed.is_lower_bound), (Regime::Armed, false));
    }

    #[test]
    fn an_empty_interval_and_a_reused_thread_id_are_no_nonsense() {
        let empty = rate_between(&sample(&[]), &sample(&[]), Duration::ZERO, PageCount(0), Protection::Unseen);
        assert!(close(empty.pages_per_second, 0.0));
        let reused = rate_between(
            &sample(&[(1, 500, 0)]),
            &sample(&[(1, 7, 0)]),
            Duration::from_secs(1),
            PageCount(7),
            Protection::Unseen,
        );
        assert!(close(reused.pages_per_second, 7.0));
    }

    #[test]
    fn losses_are_those_of_the_interval() {
        let mut before = sample(&[]);
        let mut after = sample(&[]);
        before.lost.out_of_range = 5;
        after.lost = LostEvents { out_of_range: 8, unreadable: 1, ..before.lost };
        let rate = rate_between(&before, &after, Duration::from_secs(1), PageCount(0), Protection::Unseen);
        assert_eq!((rate.lost_events.total, rate.lost_events.out_of_range), (4, 3));
    }
}
