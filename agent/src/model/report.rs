//! What a migration says of itself when it has ended: rounds, bytes, times, blackout by phase.

use serde::{Deserialize, Serialize};

use super::blackout::BlackoutLedger;
use super::foretold::{Chosen, Foretold};
use super::id::{MigrationId, VmId, VmName};
use super::network_report::NetworkReport;
use super::outcome::{Ending, Owner};
use super::relay::RelayReport;
use super::schema::Schema;
use super::stage::Stage;
use super::stun::StunReport;
use super::tunnel::TunnelReport;

/// One round of pages.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RoundReport {
    /// Counted from 1; the last one is the one sent while the VM was paused.
    pub round: u32,
    /// Whether the VM was paused.
    pub paused: bool,
    /// Pages that were due.
    pub pages: u64,
    /// Of these, pages that held only zeros and went as a mark.
    pub zero_pages: u64,
    /// Bytes written to the streams, headers included.
    pub wire_bytes: u64,
    /// From the first byte to the target's word that the round arrived; of the last round, to its last byte written.
    pub duration_ns: u64,
    /// Pages found dirty at the end of the round.
    pub dirtied_pages: u64,
    /// The bandwidth limit at its end; absent where there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_bytes_per_second: Option<u64>,
}

/// How long something was waited for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitReport {
    /// How often.
    pub count: u64,
    /// Half of the waits were no longer.
    pub p50_ns: u64,
    /// 99 of 100 were no longer.
    pub p99_ns: u64,
    /// The longest.
    pub max_ns: u64,
    /// All together.
    pub sum_ns: u64,
    /// How many were how long, from the shortest to the longest, each time twice as long as the one before.
    #[serde(default)]
    pub histogram: Vec<WaitBucket>,
}

/// Waits of about the same length.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitBucket {
    /// They were no longer than this, and longer than half of it.
    pub up_to_ns: u64,
    /// How many.
    pub count: u64,
}

impl WaitReport {
    /// Of these waits, in nanoseconds; sorts them.
    pub fn of(took_ns: &mut [u64]) -> Self {
        took_ns.sort_unstable();
        let at = |percent: usize| {
            let index = (took_ns.len() * percent).div_ceil(100).saturating_sub(1);
            took_ns.get(index).copied().unwrap_or_default()
        };
        let (p50_ns, p99_ns, max_ns) = (at(50), at(99), at(100));
        let histogram = Self::histogram(took_ns);
        Self { count: took_ns.len() as u64, p50_ns, p99_ns, max_ns, sum_ns: took_ns.iter().sum(), histogram }
    }

    /// In powers of two of a microsecond; what is shorter counts as one.
    fn histogram(sorted_ns: &[u64]) -> Vec<WaitBucket> {
        let up_to =
            |ns: u64| ns.div_ceil(1000).max(1).checked_next_power_of_two().unwrap_or(1 << 63).saturating_mul(1000);
        let mut buckets: Vec<WaitBucket> = Vec::new();
        for &ns in sorted_ns {
            while buckets.last().is_none_or(|last| last.up_to_ns < up_to(ns)) {
                let up_to_ns = buckets.last().map_or_else(|| up_to(ns), |last| last.up_to_ns.saturating_mul(2));
                buckets.push(WaitBucket { up_to_ns, count: 0 });
            }
            if let Some(last) = buckets.last_mut() {
                last.count += 1;
            }
        }
        buckets
    }
}

/// The part of a migration in which the VM ran at the target while pages were still owed to it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PostCopyReport {
    /// Pages that were owed when the VM was paused.
    pub owed_pages: u64,
    /// Pages that were sent since, each once.
    pub sent_pages: u64,
    /// Of these, pages that held only zeros and went as a mark.
    pub zero_pages: u64,
    /// How often the target asked for pages.
    pub requests: u64,
    /// Pages that were sent because they were asked for; the others had come before the guest touched them, or were on their way.
    pub asked_pages: u64,
    /// Bytes written to the streams, headers included.
    pub wire_bytes: u64,
    /// From the target's `running` until the last page was there.
    pub duration_ns: u64,
    /// How often contact was lost on the way, and it went on over another connection.
    #[serde(default)]
    pub recoveries: u64,
    /// How long the guest waited for pages that it touched, at the target.
    pub waits: WaitReport,
}

/// What it took that the VM could go on at the source while it ran at the target: `--safe-post-copy`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LoanReport {
    /// For how long the source lent it at a time.
    pub lease_ns: u64,
    /// How often the target was to send an increment, at most.
    pub every_ns: u64,
    /// Increments that the source has taken in.
    pub increments: u64,
    /// Pages in them.
    pub pages: u64,
    /// Bytes that the target sent for them, their states counted.
    pub wire_bytes: u64,
    /// How long the guest stood for them in all, by the target's clock.
    pub stood_ns: u64,
    /// The longest of these times.
    pub longest_stand_ns: u64,
    /// From the end of an increment until the target knew that it was safe: so long, and the increment before it, what the guest sent and wrote was held. The median, rounded up to a power of two of a
    /// microsecond.
    pub safe_p50_ns: u64,
    /// The longest of these times.
    pub safe_max_ns: u64,
    /// From the loan until the last page was at the target, or until the source took the VM back.
    pub lasted_ns: u64,
    /// If the source took the VM back: the increment that it went on from; 0 is the VM as it was paused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_back_increment: Option<u64>,
}

/// How the link of a migration was secured, and what else went over its interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkReport {
    /// The source's interface toward the target; empty where it cannot be told.
    pub interface: String,
    /// How what was sent was encrypted: `tls1.3` and the cipher suite, or `none`; empty of an older version.
    #[serde(default)]
    pub encryption: String,
    /// What others sent over it while the migration went on, per second: all that it sent, less what the migration did, reckoned with headers of full segments. Absent of loopback, whose
    /// traffic cannot be told apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other_bytes_per_second: Option<u64>,
    /// What was sent over it per second just before; absent where there was no time to look, and of loopback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other_before_bytes_per_second: Option<u64>,
}

/// What a reducer spared the streams in the rounds of a migration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReducerReport {
    /// `zero-pages`, `lz4`, `zstd`, `delta`, `dedup`, `skip-hot` or `free-pages`.
    pub name: String,
    /// Pages that went its way.
    pub pages: u64,
    /// What these pages have in bytes, less what was sent for them, headers not counted.
    pub saved_bytes: u64,
    /// CPU time of the streams' threads at the source that it took, also for pages that it could do nothing for.
    pub cpu_ns: u64,
    /// Why it could do nothing, or nothing more; absent where it could.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// What came of having the guest go on with less memory before the first round.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SqueezeReport {
    /// What it was to have, in bytes.
    pub asked_bytes: u64,
    /// What it had before.
    pub before_bytes: u64,
    /// What it had when the first round began.
    pub after_bytes: u64,
    /// Pages that it gave up: they need not be sent.
    pub spared_pages: u64,
    /// The same in bytes.
    pub spared_bytes: u64,
    /// How long that took; the VM ran meanwhile.
    pub duration_ns: u64,
    /// Why it gave up less than it was asked for; empty if it did not.
    pub reason: String,
}

/// The report of one migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrationReport {
    /// The migration, the same at both hosts.
    pub migration_id: MigrationId,
    /// The VM.
    pub vm_id: VmId,
    /// The VM's name.
    pub vm_name: VmName,
    /// The strategy's name.
    pub strategy: String,
    /// How it ended.
    pub ending: Ending,
    /// Who owns the VM now, seen from the source.
    pub owner: Owner,
    /// The last stage that was reached.
    pub stage: Stage,
    /// Why it did not end as asked, or why the give-up rule fired; empty if all went as asked.
    pub reason: String,
    /// Guest RAM.
    pub memory_bytes: u64,
    /// Parallel page streams.
    pub streams: u32,
    /// The rounds.
    pub rounds: Vec<RoundReport>,
    /// What the reducers that were asked for spared the rounds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reducers: Vec<ReducerReport>,
    /// What the guest gave up before the first round; absent where it was not asked to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub squeeze: Option<SqueezeReport>,
    /// Sum of the rounds' bytes, the boot image and the state.
    pub wire_bytes: u64,
    /// CPU and device state.
    pub state_bytes: u64,
    /// What the guest was booted from, sent along for its next reset.
    pub image_bytes: u64,
    /// From the offer to `running`, reservation counted.
    pub total_ns: u64,
    /// The blackout that was asked for as a limit.
    pub downtime_target_ns: u64,
    /// From the order to pause until the target said `running`, by the source's clock: the guest ran a little longer
    /// and again a little earlier, so this is an upper bound of the guest's own gap. Zero if the VM never paused.
    pub blackout_ns: u64,
    /// The blackout by phase; the phases add up to `blackout_ns`.
    pub blackout: BlackoutLedger,
    /// Smallest round trip seen on the control stream.
    pub rtt_ns: u64,
    /// Pages compared by `--verify`; zero without it.
    pub verified_pages: u64,
    /// What was owed when the VM began to run at the target; absent where nothing was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post_copy: Option<PostCopyReport>,
    /// What keeping the VM safe meanwhile took; absent where that was not asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loan: Option<LoanReport>,
    /// Frames that came to the VM's former place and were carried to it; absent where nothing could come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay: Option<RelayReport>,
    /// Who claimed the VM's addresses, and which bridges have relearned where it is; absent where nothing is known of that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkReport>,
    /// By what the VM keeps its addresses in another subnet; absent where that was not asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnel: Option<TunnelReport>,
    /// What was done to writers; absent where that was not asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stun: Option<StunReport>,
    /// What else went over the interface; absent where that could not be seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<LinkReport>,
    /// Which strategy was taken by itself, and why; absent where it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chosen: Option<Chosen>,
    /// What had been expected, beside what it took; absent where nothing was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prediction: Option<Foretold>,
}

impl Schema for MigrationReport {
    const SCHEMA: &'static str = "dunlin.migration/v1";
}

impl MigrationReport {
    /// Blackout − (final bytes ÷ goodput) − round trip, in nanoseconds: what switching over costs however little memory
    /// is left. Goodput is that of the best round that moved at least 1 MiB.
    pub fn fixed_blackout_ns(&self) -> u64 {
        let goodput = self
            .rounds
            .iter()
            .filter(|round| round.wire_bytes >= 1 << 20 && round.duration_ns > 0)
            .map(|round| round.wire_bytes as f64 / round.duration_ns as f64)
            .fold(0.0, f64::max);
        let last: u64 = self.rounds.iter().filter(|round| round.paused).map(|round| round.wire_bytes).sum();
        let moving = if goodput > 0.0 { (last as f64 / goodput) as u64 } else { 0 };
        self.blackout_ns.saturating_sub(moving).saturating_sub(self.rtt_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_counted_by_their_length() {
        let mut took = vec![900_000, 1, 1_000, 3_000, 2_001, 4_000];
        let waits = WaitReport::of(&mut took);
        assert_eq!((waits.count, waits.p50_ns, waits.max_ns, waits.sum_ns), (6, 2_001, 900_000, 910_002));
        let buckets: Vec<_> = waits.histogram.iter().map(|bucket| (bucket.up_to_ns, bucket.count)).collect();
        assert_eq!(buckets[..3], [(1_000, 2), (2_000, 0), (4_000, 3)]);
        assert_eq!((buckets.len(), buckets[10]), (11, (1_024_000, 1)));
        assert_eq!(WaitReport::of(&mut []), WaitReport::default());
        assert_eq!(WaitReport::of(&mut [u64::MAX]).histogram.len(), 1);
    }
}
