//! How many frames a second all who announce at one host may send together.
//!
//! Owns the arithmetic of one shared bucket: the "virtual scheduling" form of the generic cell rate algorithm (ITU-T I.371 annex A), whose whole
//! state is the time at which the bucket is full again. Must not know where the state is kept, nor who else announces.
//!
//! First rounds go before others: a VM is unreachable until its first round, and only better known after the later ones.
//! They take from the bucket ahead of time and wait for nothing but the bucket; later rounds draw a place in a queue, and look once more whether the bucket has room when it is their turn.

use std::time::Duration;

/// A round of this size is never held up by itself, in frames; at high rates a burst may be 10 ms long.
const BURST_FRAMES: u32 = 16;
const BURST: Duration = Duration::from_millis(10);
/// A bucket that is full for longer was not written by us, or before the last boot.
const LONGEST: Duration = Duration::from_secs(3600);

/// Which round frames belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// The first: the network does not know the VM's place yet.
    First,
    /// A later one.
    Later,
}

/// A host's bucket. All times are of `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// When what was sent so far, or may be sent by first rounds, is paid for.
    pub paid_at: Duration,
    /// When the last who waits in the queue is through.
    pub queue_ends_at: Duration,
}

/// The answer to who wants to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// At this time, without asking again.
    At(Duration),
    /// Ask again at this time.
    AskAt(Duration),
}

impl Bucket {
    /// Asks for leave to send `frames` at once, at `frames_per_second` (at least 1). `place` is the time that an [`Turn::AskAt`] before named.
    pub fn take(
        &mut self,
        frames_per_second: u32,
        urgency: Urgency,
        frames: u32,
        place: Option<Duration>,
        now: Duration,
    ) -> Turn {
        let rate = frames_per_second.max(1);
        let time_of = |frames: u32| Duration::from_secs(1) * frames / rate;
        let (cost, burst) = (time_of(frames), BURST.max(time_of(BURST_FRAMES)));
        for time in [&mut self.paid_at, &mut self.queue_ends_at] {
            if *time > now + LONGEST {
                *time = now;
            }
        }
        let paid_at = self.paid_at.max(now);
        match (urgency, place) {
            (Urgency::First, _) => {
                self.paid_at = paid_at + cost;
                Turn::At(paid_at.saturating_sub(burst).max(now))
            }
            // Whoever comes when nobody waits need not queue.
            (Urgency::Later, None) if self.queue_ends_at <= now && self.paid_at <= now => {
                self.paid_at = now + cost;
                Turn::At(now)
            }
            (Urgency::Later, Some(place)) if place <= now && self.paid_at <= now => {
                self.paid_at = now + cost;
                Turn::At(now)
            }
            // The one before came a little late: it is still our turn.
            (Urgency::Later, Some(place)) if place <= now && self.paid_at - now <= cost => Turn::AskAt(self.paid_at),
            (Urgency::Later, Some(place)) if place > now => Turn::AskAt(place),
            (Urgency::Later, _) => {
                let place = self.queue_ends_at.max(paid_at);
                self.queue_ends_at = place + cost;
                Turn::AskAt(place)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: Duration = Duration::from_secs(1000);

    fn ms(value: u64) -> Duration {
        Duration::from_millis(value)
    }

    /// What asks for leave at its time, and again when it is told to; when it went.
    fn run(rate: u32, mut asking: Vec<(Duration, Urgency, u32, Option<Duration>)>) -> Vec<(Duration, Urgency, u32)> {
        let (mut bucket, mut went) = (Bucket::default(), Vec::new());
        while let Some(at) = (0..asking.len()).min_by_key(|&k| asking[k].0) {
            let (now, urgency, frames, place) = asking[at];
            match bucket.take(rate, urgency, frames, place, now) {
                Turn::At(time) => {
                    assert!(time >= now);
                    went.push((time, urgency, frames));
                    asking.swap_remove(at);
                }
                Turn::AskAt(time) => {
                    assert!(time > now, "asked in a circle");
                    asking[at] = (time, urgency, frames, Some(time));
                }
            }
        }
        went.sort_by_key(|(time, ..)| *time);
        went
    }

    #[test]
    fn one_vm_is_not_held_up() {
        for rate in [100, 1000, 100_000] {
            let went = run(rate, vec![(START, Urgency::First, 4, None), (START + ms(50), Urgency::Later, 4, None)]);
            assert_eq!(went.iter().map(|w| w.0).collect::<Vec<_>>(), [START, START + ms(50)], "{rate}");
        }
    }

    /// 300 VMs whose later rounds are already waiting when 300 others arrive.
    #[test]
    fn first_rounds_go_before_others() {
        let later = (0..300).map(|_| (START, Urgency::Later, 4, None));
        let first = (0..300).map(|_| (START + ms(100), Urgency::First, 4, None));
        let went = run(1000, later.chain(first).collect());
        let last_first = went.iter().filter(|w| w.1 == Urgency::First).map(|w| w.0).max().unwrap();
        // 1200 frames at 1000 a second, and what had gone before.
        assert!(last_first <= START + ms(1310), "{:?}", last_first - START);
        let between = went.iter().filter(|w| w.1 == Urgency::Later && w.0 > START + ms(104) && w.0 < last_first);
        assert_eq!(between.count(), 0, "later rounds came between first ones");
        assert_eq!(went.len(), 600, "somebody never went");
        let end = went.last().unwrap().0 - START;
        assert!(end >= ms(2350) && end <= ms(2450), "2400 frames at 1000 a second took {end:?}");
    }

    #[test]
    fn rubbish_in_the_shared_state_holds_nobody() {
        let mut bucket = Bucket { paid_at: Duration::MAX, queue_ends_at: Duration::MAX };
        assert_eq!(bucket.take(1, Urgency::First, 1, None, START), Turn::At(START));
        let mut bucket = Bucket { paid_at: START + ms(1), queue_ends_at: Duration::MAX };
        assert!(matches!(bucket.take(0, Urgency::Later, 1, None, START), Turn::AskAt(at) if at == START + ms(1)));
    }

    proptest! {
        /// Whatever comes when: in no window more than the rate and one burst, and everybody has a turn.
        #[test]
        fn the_rate_holds_in_every_window(
            rate in 10u32..5000,
            asking in prop::collection::vec((0u64..2000, any::<bool>(), 1u32..9), 1..80),
        ) {
            let all = asking.len();
            let urgency = |first| if first { Urgency::First } else { Urgency::Later };
            let asking = asking.into_iter().map(|(at, first, n)| (START + ms(at), urgency(first), n, None)).collect();
            let went = run(rate, asking);
            prop_assert_eq!(went.len(), all);
            let burst = f64::from(rate) * BURST.as_secs_f64().max(f64::from(BURST_FRAMES) / f64::from(rate)) + 9.0;
            for begin in 0..went.len() {
                let mut frames = 0;
                for (time, _, n) in &went[begin..] {
                    frames += n;
                    let allowed = f64::from(rate) * (*time - went[begin].0).as_secs_f64() + burst;
                    prop_assert!(f64::from(frames) <= allowed, "{frames} > {allowed}");
                }
            }
        }
    }
}
