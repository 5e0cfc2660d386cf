//! The guest's time: how far it moves on at a restore, and what counter and clock it then sees.
//!
//! Owns the arithmetic, and the calls that read and write time-stamp counters and the KVM clock. Must not know the other
//! registers, nor when a state is saved or restored.
//!
//! A guest has two clocks of KVM's, and may read both: the time-stamp counter, and the KVM clock, which KVM reckons from
//! that counter. Both are saved as of one `Moment`, and both go on from one `Now` by one `TimeShift`; so they agree
//! after a move as they did before it. The recipe is that of the kernel's Documentation/virt/kvm/devices/vcpu.rst, 4.1
//! (`KVM_VCPU_TSC_OFFSET`): the counter's offset moves by the time that has passed, and by the difference between the two
//! hosts' counters. It differs in two points. How much time has passed is decided here, with a bound, and not by
//! KVM_SET_CLOCK, whose KVM_CLOCK_REALTIME then accounts only for the microseconds since that decision. And it works for a
//! counter that KVM scales, because "the host's counter" here is what a guest of offset zero would see.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::msr;
use crate::kvm::sys::{self, KvmError};

/// How far two hosts' real-time clocks may be apart before nothing is believed of their difference.
pub(crate) const CLOCK_TOLERANCE: Duration = Duration::from_secs(1);
/// vCPUs whose counters were saved as values, and are not further apart, had the same counter: the values were read one
/// after another. The kernel's own rule (arch/x86/kvm/x86.c, `kvm_synchronize_tsc`).
const SAME_COUNTER: Duration = Duration::from_secs(1);
/// How far ahead of what was wanted a counter may be found that cannot be set.
const AHEAD_TOLERANCE: Duration = Duration::from_secs(1);
/// By how much a reading of a counter may be wrong.
const READING: Duration = Duration::from_millis(1);
/// How often a pair of clocks is read; the pair that took least time is kept.
const ATTEMPTS: usize = 3;

/// A counter is not what it must be, on a host that does not let it be set.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "vCPU {vcpu}'s time-stamp counter would jump {direction} by {by:?}: this host's KVM does not let it be set (no \
     KVM_VCPU_TSC_OFFSET, and a write is ignored); a VM can only come here from this very host"
)]
pub struct CounterError {
    vcpu: u32,
    direction: &'static str,
    by: Duration,
}

/// A point in time as it is saved: by a host's real-time clock, and by its time-stamp counter.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct Moment {
    /// Nanoseconds since 1970, CLOCK_REALTIME.
    pub(super) realtime_ns: u64,
    /// What a guest whose counter has offset zero would read: the host's counter, scaled if the guest's is.
    pub(super) host_tsc: u64,
}

/// A point in time on this host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    moment: Moment,
    /// The host's counter, unscaled.
    raw_tsc: u64,
    instant: Instant,
}

impl Now {
    /// Reads the host's clocks. `vcpu` is asked for the scaled counter, if there is one.
    pub(crate) fn read(vcpu: &VcpuFd, counter: &Counter) -> Result<Self, KvmError> {
        let pair = || {
            let before = rdtsc();
            let realtime_ns = realtime_ns();
            (realtime_ns, before, rdtsc())
        };
        let (realtime_ns, raw_tsc) = narrowest((0..ATTEMPTS).map(|_| pair()));
        Self::at(realtime_ns, raw_tsc, vcpu, counter)
    }

    fn at(realtime_ns: u64, raw_tsc: u64, vcpu: &VcpuFd, counter: &Counter) -> Result<Self, KvmError> {
        let instant = Instant::now();
        let host_tsc = counter.as_guest(vcpu, raw_tsc)?;
        Ok(Self { moment: Moment { realtime_ns, host_tsc }, raw_tsc, instant })
    }

    /// What of it is saved.
    pub(crate) fn moment(&self) -> Moment {
        self.moment
    }
}

/// Reads the KVM clock, and when it was that.
///
/// Where the clock is reckoned from a stable counter, KVM tells that moment itself (KVM_CLOCK_REALTIME and
/// KVM_CLOCK_HOST_TSC, since Linux 5.16); elsewhere the clocks are read around the call.
pub(crate) fn read_clock(vm: &VmFd, vcpu: &VcpuFd, counter: &Counter) -> Result<(kvm_clock_data, Now), KvmError> {
    const EXACT: u32 = KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
    let get = || vm.get_clock().map_err(KvmError::of("KVM_GET_CLOCK"));
    let clock = get()?;
    if clock.flags & EXACT == EXACT {
        return Ok((clock, Now::at(clock.realtime, clock.host_tsc, vcpu, counter)?));
    }
    let mut tries = Vec::with_capacity(ATTEMPTS);
    for _ in 0..ATTEMPTS {
        let before = rdtsc();
        let clock = get()?;
        let realtime_ns = realtime_ns();
        tries.push(((clock, realtime_ns), before, rdtsc()));
    }
    let ((clock, realtime_ns), raw_tsc) = narrowest(tries.into_iter());
    Ok((clock, Now::at(realtime_ns, raw_tsc, vcpu, counter)?))
}

/// Of readings between two values of the counter the one that took least, and the counter in its middle.
fn narrowest<T>(tries: impl Iterator<Item = (T, u64, u64)>) -> (T, u64) {
    let (reading, before, after) =
        tries.min_by_key(|(_, before, after)| after.wrapping_sub(*before)).expect("at least one try");
    (reading, before.wrapping_add(after.wrapping_sub(before) / 2))
}

/// Writes the KVM clock: `clock_ns` is what it showed at `now`. KVM adds what has passed since, if it can
/// (KVM_CLOCK_REALTIME, since Linux 5.16).
pub(crate) fn write_clock(vm: &VmFd, clock_ns: u64, now: &Now) -> Result<(), KvmError> {
    let flags = vm.check_extension_int(Cap::AdjustClock);
    let clock = if u32::try_from(flags).is_ok_and(|flags| flags & KVM_CLOCK_REALTIME != 0) {
        kvm_clock_data {
            clock: clock_ns,
            realtime: now.moment.realtime_ns,
            flags: KVM_CLOCK_REALTIME,
            ..Default::default()
        }
    } else {
        kvm_clock_data { clock: clock_ns.saturating_add(nanoseconds(now.instant.elapsed())), ..Default::default() }
    };
    vm.set_clock(&clock).map_err(KvmError::of("KVM_SET_CLOCK"))
}

/// The frequencies of a guest's time-stamp counter and of its host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frequency {
    /// What the guest was told, in kHz.
    pub(crate) guest_khz: u32,
    /// The host's, in kHz.
    pub(crate) host_khz: u32,
    /// Whether KVM makes the one of the other (KVM_SET_TSC_KHZ); if not, the guest counts as the host does.
    pub(crate) scaled: bool,
}

/// How far the two may be apart without scaling, in parts per million: KVM's own bound (arch/x86/kvm/x86.c,
/// `tsc_tolerance_ppm`), and half of what a guest's NTP can correct.
pub(crate) const TOLERANCE_PPM: u64 = 250;

/// The frequencies are apart, and KVM cannot scale on this CPU.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "the VM's time-stamp counter runs at {vm_khz} kHz and this host's at {host_khz} kHz, more than {TOLERANCE_PPM} parts per \
     million apart, and this host cannot scale it: that needs a CPU with TSC scaling (Intel servers since Skylake, AMD \
     TscRateMsr) and KVM_CAP_TSC_CONTROL; choose a host with the VM's frequency, or one that can scale"
)]
pub struct FrequencyError {
    /// The VM's, in kHz.
    pub vm_khz: u32,
    /// This host's, in kHz.
    pub host_khz: u32,
}

impl Frequency {
    /// A VM whose counter has this host's frequency.
    pub(crate) fn of_host(host_khz: u32) -> Self {
        Self { guest_khz: host_khz, host_khz, scaled: false }
    }

    /// How a VM of `guest_khz` runs on a host of `host_khz` that `can_scale` or not.
    pub(crate) fn fit(guest_khz: u32, host_khz: u32, can_scale: bool) -> Result<Self, FrequencyError> {
        let apart = u64::from(guest_khz.abs_diff(host_khz)) * 1_000_000;
        let scaled = apart > u64::from(host_khz) * TOLERANCE_PPM;
        if scaled && !(can_scale && guest_khz > 0) {
            return Err(FrequencyError { vm_khz: guest_khz, host_khz });
        }
        Ok(Self { guest_khz, host_khz, scaled })
    }
}

/// How a guest's time-stamp counter comes from this host's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counter {
    frequency: Frequency,
    /// Whether KVM_VCPU_TSC_OFFSET says, and sets, all the rest.
    by_offset: bool,
}

impl Counter {
    /// Tries on vCPUs that have their frequency and have not run. Afterwards they all have one offset.
    pub(crate) fn by_trial(vcpus: &[&VcpuFd], frequency: Frequency) -> Self {
        let Some(before) = vcpus.first().and_then(|vcpu| sys::get_tsc_offset(vcpu)) else {
            return Self { frequency, by_offset: false };
        };
        let taken = takes_offset(vcpus[0], before ^ 1 << 40);
        // The trial took the first vCPU out of what KVM counts as synchronised, even where nothing came of it; and with vCPUs
        // that are not, KVM has no master clock, and a guest's clock is neither stable nor exact
        // (`pvclock_update_vm_gtod_copy`).
        let put_back = vcpus.iter().map(|vcpu| sys::set_tsc_offset(vcpu, before)).collect::<Vec<_>>();
        let by_offset = taken && put_back.iter().all(Result::is_ok);
        Self { frequency, by_offset }
    }

    /// Whether the offset can be read and set.
    pub(crate) fn by_offset(&self) -> bool {
        self.by_offset
    }

    /// Guest ticks in a time span.
    fn ticks(&self, ns: u64) -> u64 {
        (u128::from(ns) * u128::from(self.frequency.guest_khz) / 1_000_000) as u64
    }

    fn span(&self, ticks: u64) -> Duration {
        let ns = u128::from(ticks) * 1_000_000 / u128::from(self.frequency.guest_khz.max(1));
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
    }

    /// Guest ticks from one value of the host's counter to another; may be negative, in two's complement.
    fn guest_ticks(&self, from: u64, to: u64) -> u64 {
        let apart = to.wrapping_sub(from) as i64;
        if !self.frequency.scaled {
            return apart as u64;
        }
        (i128::from(apart) * i128::from(self.frequency.guest_khz) / i128::from(self.frequency.host_khz.max(1))) as u64
    }

    /// What a guest with offset zero would read when the host's counter is `raw_tsc`, a moment ago.
    fn as_guest(&self, vcpu: &VcpuFd, raw_tsc: u64) -> Result<u64, KvmError> {
        match sys::get_tsc_offset(vcpu) {
            Some(offset) if self.frequency.scaled && self.by_offset => {
                Ok(self.read(vcpu, raw_tsc)?.wrapping_sub(offset))
            }
            _ => Ok(raw_tsc),
        }
    }

    /// A vCPU's counter as it was when the host's counter was `raw_tsc`, a moment ago.
    fn read(&self, vcpu: &VcpuFd, raw_tsc: u64) -> Result<u64, KvmError> {
        let mut tries = Vec::with_capacity(ATTEMPTS);
        for _ in 0..ATTEMPTS {
            let before = rdtsc();
            let tsc = msr::read(vcpu, &[msr::TSC])?.first().map_or(0, |entry| entry.data);
            tries.push((tsc, before, rdtsc()));
        }
        let (tsc, at) = narrowest(tries.into_iter());
        Ok(tsc.wrapping_sub(self.guest_ticks(raw_tsc, at)))
    }

    /// Saves a vCPU's counter: its value at `now`, and its offset.
    pub(crate) fn save(&self, vcpu: &VcpuFd, now: &Now) -> Result<SavedCounter, KvmError> {
        let offset = if self.by_offset { sys::get_tsc_offset(vcpu) } else { None };
        Ok(SavedCounter { tsc: self.read(vcpu, now.raw_tsc)?, offset })
    }

    /// Sets a vCPU's counter: `tsc` is what it shows at `now`.
    pub(crate) fn restore(&self, vcpu: &VcpuFd, tsc: u64, now: &Now) -> Result<(), KvmError> {
        if self.by_offset {
            return sys::set_tsc_offset(vcpu, tsc.wrapping_sub(now.moment.host_tsc));
        }
        let data = tsc.wrapping_add(self.guest_ticks(now.raw_tsc, rdtsc()));
        msr::write(vcpu, &[msr::entry(msr::TSC, data)])
    }

    /// Makes sure that the counter of vCPU number `index`, which was to show `tsc` at `now`, shows that now, or at least
    /// not less than it did when it was saved, nor much more.
    pub(crate) fn check(&self, vcpu: &VcpuFd, index: u32, tsc: u64, time: &TimeShift) -> Result<(), CheckError> {
        if self.by_offset {
            // KVM has taken the offset, which says all of it; a reading would only add its own error.
            return Ok(());
        }
        let seen = self.read(vcpu, time.now.raw_tsc)?;
        Ok(self.judge(index, seen, tsc, self.ticks(time.elapsed_ns))?)
    }

    /// `seen` and `wanted` at the same moment; `moved` is by how much `wanted` is more than what was saved.
    fn judge(&self, vcpu: u32, seen: u64, wanted: u64, moved: u64) -> Result<(), CounterError> {
        let saved = wanted.wrapping_sub(moved);
        let (ahead, behind) = (seen.wrapping_sub(wanted) as i64, seen.wrapping_sub(saved) as i64);
        // Two readings of a counter are apart by up to the time that an ioctl takes, on a busy or emulated CPU.
        if behind < -(self.ticks(nanoseconds(READING)) as i64) {
            return Err(CounterError { vcpu, direction: "back", by: self.span(behind.unsigned_abs()) });
        }
        if ahead > self.ticks(nanoseconds(AHEAD_TOLERANCE)) as i64 {
            return Err(CounterError { vcpu, direction: "ahead", by: self.span(ahead.unsigned_abs()) });
        }
        Ok(())
    }
}

/// A counter is wrong, or could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CheckError {
    /// It is wrong.
    #[error(transparent)]
    Counter(#[from] CounterError),
    /// It could not be read.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// A vCPU's time-stamp counter as of the moment that was saved with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SavedCounter {
    /// What the guest would have read.
    pub(super) tsc: u64,
    /// Its difference from [`Moment::host_tsc`], from hosts that tell it.
    pub(super) offset: Option<u64>,
}

/// By how much guest time moves on at a restore, and from when.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TimeShift {
    saved: Moment,
    now: Now,
    elapsed_ns: u64,
}

impl TimeShift {
    /// The guest's time is as it was: for a reset, to the state before the first instruction.
    pub(crate) fn none(saved: Moment, now: Now) -> Self {
        Self { saved, now, elapsed_ns: 0 }
    }

    /// The guest's time goes on by what has passed, at most `longest`.
    pub(crate) fn since(saved: Moment, now: Now, longest: Duration) -> Self {
        let (elapsed_ns, oddity) = elapsed(saved.realtime_ns, now.moment.realtime_ns, longest);
        if let Some(oddity) = oddity {
            tracing::warn!("guest time goes on by {:?}: {oddity}", Duration::from_nanos(elapsed_ns));
        }
        Self { saved, now, elapsed_ns }
    }

    /// The moment from which the guest's time goes on.
    pub(crate) fn now(&self) -> &Now {
        &self.now
    }

    /// What a KVM clock that was saved as `clock_ns` shows at [`TimeShift::now`].
    pub(crate) fn clock(&self, clock_ns: u64) -> u64 {
        clock_ns.saturating_add(self.elapsed_ns)
    }

    /// What the vCPUs' counters show at [`TimeShift::now`]. Differences that their offsets tell (a guest wrote to
    /// IA32_TSC_ADJUST) stay exactly as they are; values that were only read one after another become one.
    pub(crate) fn counters(&self, saved: &[SavedCounter], counter: &Counter) -> Vec<u64> {
        let mut first = None;
        let same = counter.ticks(nanoseconds(SAME_COUNTER));
        let ticks = counter.ticks(self.elapsed_ns);
        saved
            .iter()
            .map(|saved| {
                let then = saved.offset.map_or(saved.tsc, |offset| self.saved.host_tsc.wrapping_add(offset));
                let first = *first.get_or_insert(then);
                let one = saved.offset.is_none() && (then.wrapping_sub(first) as i64).unsigned_abs() <= same;
                if one { first } else { then }.wrapping_add(ticks)
            })
            .collect()
    }
}

/// How much time a guest is told to have passed between two readings of two hosts' real-time clocks, in nanoseconds; and
/// what was wrong with the readings.
///
/// What has really passed cannot be more than `longest`: so long has the target's machine existed, and the VM still ran
/// when it was made. Clocks are apart by what their synchronisation leaves, and the guest's time is then off by as much,
/// between two bounds: never back, never ahead of what is possible. If they are apart by more than [`CLOCK_TOLERANCE`]
/// nothing can be learned from them, and the guest's time stands through its blackout.
fn elapsed(saved_ns: u64, now_ns: u64, longest: Duration) -> (u64, Option<&'static str>) {
    let longest_ns = nanoseconds(longest);
    match now_ns.checked_sub(saved_ns) {
        None => (0, Some("this host's real-time clock is behind the source's")),
        Some(ns) if ns <= longest_ns => (ns, None),
        Some(ns) if ns - longest_ns <= nanoseconds(CLOCK_TOLERANCE) => {
            (longest_ns, Some("this host's real-time clock is ahead of the source's"))
        }
        Some(_) => (0, Some("the real-time clocks of this host and the source are more than a second apart")),
    }
}

/// Whether KVM really moves the guest's counter: there are hosts that show a guest their own counter, whatever they are
/// told.
fn takes_offset(vcpu: &VcpuFd, tried: u64) -> bool {
    sys::set_tsc_offset(vcpu, tried).is_ok() && sys::get_tsc_offset(vcpu) == Some(tried)
}

fn nanoseconds(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

fn realtime_ns() -> u64 {
    nanoseconds(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn rdtsc() -> u64 {
    // SAFETY: reads a counter; every CPU that has KVM has it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;
    const HOUR: Duration = Duration::from_secs(3600);

    fn plain(khz: u32) -> Counter {
        Counter { frequency: Frequency::of_host(khz), by_offset: true }
    }

    fn now(realtime_ns: u64, host_tsc: u64) -> Now {
        Now { moment: Moment { realtime_ns, host_tsc }, raw_tsc: host_tsc, instant: Instant::now() }
    }

    fn saved(offset: u64) -> SavedCounter {
        // The value beside an offset is not looked at.
        SavedCounter { tsc: 1, offset: Some(offset) }
    }

    #[test]
    fn guest_time_goes_on_by_what_has_passed_between_two_bounds() {
        let at = 1_000_000 * MS;
        let longest = Duration::from_millis(300);
        assert_eq!(elapsed(at, at, longest), (0, None));
        assert_eq!(elapsed(at, at + 10 * MS, longest), (10 * MS, None));
        assert_eq!(elapsed(at, at + 300 * MS, longest), (300 * MS, None));
        // A clock that is ahead, a clock that is behind, two that have nothing to do with each other.
        assert!(matches!(elapsed(at, at + 700 * MS, longest), (ns, Some(_)) if ns == 300 * MS));
        assert!(matches!(elapsed(at, at - 1, longest), (0, Some(_))));
        assert!(matches!(elapsed(at, at + 86_400_000 * MS, longest), (0, Some(_))));
        assert!(matches!(elapsed(0, u64::MAX, Duration::MAX), (u64::MAX, None)));
    }

    #[test]
    fn a_counter_goes_on_at_a_host_whose_own_is_far_from_the_sources() {
        let then = Moment { realtime_ns: 1000 * MS, host_tsc: 5_000 };
        // 2 GHz, ten milliseconds: twenty million ticks. The target's own counter is about to wrap.
        let time = TimeShift::since(then, now(1010 * MS, u64::MAX - 10), HOUR);
        let counters = time.counters(&[saved(700)], &plain(2_000_000));
        assert_eq!(counters, [5_000 + 700 + 20_000_000]);
        assert_eq!(time.clock(123), 123 + 10 * MS);
        let offset = counters[0].wrapping_sub(u64::MAX - 10);
        assert_eq!((u64::MAX - 10).wrapping_add(offset), 20_005_700);
    }

    #[test]
    fn vcpus_keep_what_their_offsets_tell_and_lose_what_reading_them_took() {
        let then = Moment { realtime_ns: 1000 * MS, host_tsc: 5_000 };
        let time = TimeShift::none(then, now(2000 * MS, 9_000));
        // One of a guest that moved its own counter by 3.
        assert_eq!(time.counters(&[saved(700), saved(700), saved(703)], &plain(2_000_000)), [5_700, 5_700, 5_703]);
        let read = |tsc| SavedCounter { tsc, offset: None };
        let apart = 2_000_000_001;
        let counters = time.counters(&[read(5_700), read(5_900), read(5_600), read(5_700 + apart)], &plain(2_000_000));
        assert_eq!(counters, [5_700, 5_700, 5_700, 5_700 + apart]);
    }

    #[test]
    fn a_counter_that_cannot_be_set_must_be_right_by_itself() {
        let counter = plain(2_000_000);
        let second = 2_000_000_000;
        let (wanted, moved) = (100 * second, 20_000_000);
        assert_eq!(counter.judge(0, wanted, wanted, moved), Ok(()));
        // The real-time clock was faster than the counter: not back for the guest.
        assert_eq!(counter.judge(0, wanted - moved, wanted, moved), Ok(()));
        let back = counter.judge(1, wanted - moved - second, wanted, moved).unwrap_err();
        assert_eq!(back, CounterError { vcpu: 1, direction: "back", by: Duration::from_secs(1) });
        let ahead = counter.judge(0, wanted + 3 * second, wanted, moved).unwrap_err();
        assert!(ahead.to_string().contains("vCPU 0's time-stamp counter would jump ahead by 3s"), "{ahead}");
    }

    #[test]
    fn a_frequency_fits_within_what_ntp_can_correct_or_by_scaling() {
        let fit = |guest, scale| Frequency::fit(guest, 2_000_000, scale);
        for near in [2_000_000, 2_000_500, 1_999_500] {
            assert!(!fit(near, true).unwrap().scaled && !fit(near, false).unwrap().scaled, "{near}");
        }
        for far in [2_000_501, 1_999_499, 3_000_000, u32::MAX] {
            assert!(fit(far, true).unwrap().scaled);
            let refused = fit(far, false).unwrap_err();
            assert_eq!(refused, FrequencyError { vm_khz: far, host_khz: 2_000_000 });
        }
        assert!(fit(0, true).is_err());
        let text = fit(3_000_000, false).unwrap_err().to_string();
        assert!(text.contains("3000000 kHz") && text.contains("2000000 kHz") && text.contains("TscRateMsr"), "{text}");
    }

    #[test]
    fn a_scaled_counter_counts_in_the_guests_ticks() {
        let frequency = Frequency { guest_khz: 3_000_000, host_khz: 2_000_000, scaled: true };
        let counter = Counter { frequency, by_offset: true };
        assert_eq!(counter.guest_ticks(1000, 3000), 3000);
        assert_eq!(counter.guest_ticks(3000, 1000) as i64, -3000);
        assert_eq!(counter.ticks(MS), 3_000_000);
        // Within the tolerance the guest counts as the host does, whatever it was told.
        let frequency = Frequency { guest_khz: 2_000_400, host_khz: 2_000_000, scaled: false };
        assert_eq!(Counter { frequency, by_offset: true }.guest_ticks(0, 2_000_000), 2_000_000);
    }

    proptest! {
        #[test]
        fn guest_time_never_goes_back_nor_beyond_what_can_have_passed(
            saved_ns: u64, now_ns: u64, longest_ns in 0..u64::MAX / 2,
        ) {
            let (ns, oddity) = elapsed(saved_ns, now_ns, Duration::from_nanos(longest_ns));
            prop_assert!(ns <= longest_ns);
            prop_assert!(oddity.is_some() || ns == now_ns - saved_ns);
        }

        /// True time passes, the clocks are apart by some error: what is lost or won is at most that error, and never more
        /// than the blackout itself.
        #[test]
        fn the_error_of_a_move_is_at_most_that_of_the_clocks(
            blackout_ns in 0..20_000 * MS, before_ns in 0..60_000 * MS, apart_ns in -2_000 * MS as i64..2_000 * MS as i64,
        ) {
            let saved_ns = 1 << 60;
            let now_ns = (saved_ns + blackout_ns).wrapping_add_signed(apart_ns);
            let (ns, _) = elapsed(saved_ns, now_ns, Duration::from_nanos(before_ns + blackout_ns));
            let error = ns as i64 - blackout_ns as i64;
            prop_assert!(error <= before_ns as i64 && error >= -(blackout_ns as i64));
            if apart_ns.unsigned_abs() <= nanoseconds(CLOCK_TOLERANCE) {
                prop_assert!(error.unsigned_abs() <= apart_ns.unsigned_abs());
            }
        }

        /// Counter and clock go on by the same time, at any two hosts, to within a tick.
        #[test]
        fn counter_and_clock_agree_after_a_move(
            saved_tsc: u64, now_tsc: u64, offset: u64, clock_ns in 0..u64::MAX / 2, passed_ns in 0..3_600_000 * MS,
            khz in 10_000u32..10_000_000,
        ) {
            let then = Moment { realtime_ns: 7, host_tsc: saved_tsc };
            let time = TimeShift::since(then, now(7 + passed_ns, now_tsc), HOUR);
            let tsc = time.counters(&[saved(offset)], &plain(khz))[0];
            let ticks = tsc.wrapping_sub(saved_tsc.wrapping_add(offset));
            let by_counter = u128::from(ticks) * 1_000_000 / u128::from(khz);
            let by_clock = u128::from(time.clock(clock_ns) - clock_ns);
            prop_assert!(by_clock - by_counter <= 1 + 1_000_000 / u128::from(khz));
        }
    }
}
