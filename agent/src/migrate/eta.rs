//! When a migration will end, by what its rounds have shown: the rest of the round under way, and those that must follow it.
//!
//! A forecast for people, and no judge: [`super::converge`] decides. A round that carries x bytes takes x/B, and leaves r·x/B, with r what the last
//! round dirtied per second; so rounds shrink by r/B each until what is left fits the downtime. Writing is concave in time, so short
//! rounds leave more than this says.

use std::time::Duration;

use crate::model::{BytesPerSecond, PAGE_SIZE, RoundReport};

/// Rounds that shrink by less than this are no end in sight.
const NO_END: f64 = 0.9;
/// The longest time that is told.
const LONGEST: Duration = Duration::from_hours(24 * 365);

/// How far a migration is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Going<'a> {
    /// Pages due in the round under way.
    pub due_pages: u64,
    /// Of these, pages that were sent.
    pub sent_pages: u64,
    /// Bytes that were sent for them.
    pub sent_bytes: u64,
    /// Whether the VM stands.
    pub is_paused: bool,
    /// What the link carries.
    pub goodput: BytesPerSecond,
    /// The last round that has ended.
    pub last_round: Option<&'a RoundReport>,
    /// What the downtime leaves for the last pages.
    pub memory_time: Duration,
    /// What switching over takes besides them.
    pub fixed_cost: Duration,
}

/// When things will be; absent what the rounds do not tell yet, or what will not be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Eta {
    /// From now to the end of the round under way.
    pub round: Option<Duration>,
    /// From now to the pause.
    pub pause: Option<Duration>,
    /// How long the VM will stand; while it does, how much longer.
    pub blackout: Option<Duration>,
    /// From now to the end.
    pub end: Option<Duration>,
}

/// The forecast.
pub fn eta(going: &Going<'_>) -> Eta {
    let goodput = going.goodput.0 as f64;
    if going.due_pages == 0 || goodput <= 0.0 {
        return Eta::default();
    }
    let page = PAGE_SIZE as f64;
    // Pages of zeros cost next to nothing: those to come are taken to be as many as those that were sent.
    let a_page =
        if going.sent_pages > 0 { (going.sent_bytes as f64 / going.sent_pages as f64).min(page) } else { page };
    let unsent = going.due_pages.saturating_sub(going.sent_pages) as f64 * a_page;
    let round = seconds(unsent / goodput);
    if going.is_paused {
        let rest = seconds(unsent / goodput + going.fixed_cost.as_secs_f64());
        return Eta { round: Some(round), pause: None, blackout: Some(rest), end: Some(rest) };
    }
    let Some(last) = going.last_round.filter(|last| last.duration_ns > 0) else {
        return Eta { round: Some(round), ..Eta::default() };
    };
    let dirtied = last.dirtied_pages as f64 * page / (last.duration_ns as f64 / 1e9);
    let shrinking = dirtied / goodput;
    // What this round will leave, in seconds of the link.
    let mut left = (going.sent_bytes as f64 + unsent) / goodput * shrinking;
    let fits = going.memory_time.as_secs_f64();
    if left > fits && shrinking >= NO_END {
        return Eta { round: Some(round), ..Eta::default() };
    }
    let mut pause = unsent / goodput;
    while left > fits && left > 1e-6 {
        pause += left;
        left *= shrinking;
    }
    let blackout = left + going.fixed_cost.as_secs_f64();
    Eta {
        round: Some(round),
        pause: Some(seconds(pause)),
        blackout: Some(seconds(blackout)),
        end: Some(seconds(pause + blackout)),
    }
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 1000 pages a second.
    const GOODPUT: BytesPerSecond = BytesPerSecond(1000 * PAGE_SIZE as u64);

    fn going(last: Option<&RoundReport>) -> Going<'_> {
        Going {
            due_pages: 10_000,
            sent_pages: 5_000,
            sent_bytes: 5_000 * PAGE_SIZE as u64,
            is_paused: false,
            goodput: GOODPUT,
            last_round: last,
            memory_time: Duration::from_millis(100),
            fixed_cost: Duration::from_millis(3),
        }
    }

    fn round(dirtied_pages: u64) -> RoundReport {
        RoundReport { duration_ns: 10_000_000_000, dirtied_pages, ..RoundReport::default() }
    }

    #[test]
    fn the_rest_of_the_round_and_rounds_that_shrink() {
        let ms = Duration::from_millis;
        let first = eta(&going(None));
        assert_eq!(first, Eta { round: Some(ms(5000)), ..Eta::default() });
        // 100 pages a second, a tenth of the link: this round leaves 1 s worth, the next 100 ms, which fits.
        let second = eta(&going(Some(&round(1000))));
        let near = |got: Option<Duration>, wanted| got.unwrap().abs_diff(wanted) < Duration::from_micros(10);
        assert!(near(second.round, ms(5000)) && near(second.pause, ms(6000)), "{second:?}");
        assert!(near(second.blackout, ms(103)) && near(second.end, ms(6103)), "{second:?}");
        // Nobody writes: there is nothing to follow.
        let idle = eta(&going(Some(&round(0))));
        assert!(near(idle.pause, ms(5000)) && near(idle.blackout, ms(3)), "{idle:?}");
    }

    #[test]
    fn no_end_is_told_where_there_is_none() {
        let stuck = eta(&going(Some(&round(9_500))));
        assert_eq!(stuck, Eta { round: Some(Duration::from_secs(5)), ..Eta::default() });
        assert_eq!(eta(&Going { goodput: BytesPerSecond(0), ..going(None) }), Eta::default());
    }

    #[test]
    fn zeros_to_come_are_as_many_as_those_that_were_sent() {
        let half = Going { sent_bytes: 2_500 * PAGE_SIZE as u64, ..going(None) };
        assert_eq!(eta(&half).round, Some(Duration::from_millis(2500)));
    }

    #[test]
    fn a_vm_that_stands_has_its_last_round_before_it() {
        let paused = eta(&Going { is_paused: true, ..going(None) });
        assert_eq!((paused.blackout, paused.end), (Some(Duration::from_millis(5003)), paused.blackout));
    }

    proptest! {
        #[test]
        fn any_figures_give_times(
            due in any::<u64>(), sent in any::<u64>(), bytes in any::<u64>(), goodput in any::<u64>(), ns in any::<u64>(),
            dirtied in any::<u64>(), paused in any::<bool>(), memory_ns in any::<u64>()
        ) {
            let last = RoundReport { duration_ns: ns, dirtied_pages: dirtied, ..RoundReport::default() };
            let going = Going {
                due_pages: due, sent_pages: sent, sent_bytes: bytes, is_paused: paused, goodput: BytesPerSecond(goodput),
                last_round: Some(&last), memory_time: Duration::from_nanos(memory_ns), fixed_cost: Duration::from_millis(3),
            };
            let eta = eta(&going);
            prop_assert!([eta.round, eta.pause, eta.blackout, eta.end].into_iter().flatten().all(|time| time <= LONGEST));
        }
    }
}
