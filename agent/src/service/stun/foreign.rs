//! Slowing a VM of another VMM: what its vCPUs write is seen from outside, and a separate process limits the CPU time of single threads, or has the VMM limit them.
//!
//! A CPU limit is no limit of writing: the share that brings a vCPU to its limit follows from what it writes in a second of CPU time, looked at anew each time. Rewrites
//! only show while somebody has the VM's dirty log on, while its own VMM migrates it, and then once between two rounds: a writer that has been round all its pages
//! shows nothing until the next round has them protected again, and then everything at once. So its speed is taken in at once where it grows, and forgotten slowly.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::answers::Answers;
use super::holder::{Holder, HolderError};
use super::{Actuator, Means, StunError, StunRequest};
use crate::cgroup;
use crate::foreign::Permission;
use crate::model::{Attribution, PAGE_SIZE, PageBitmap, VcpuLimit, VcpuWrites, VmWrites};
use crate::port::{EventSource, ThreadEvents};
use crate::probe::{Gives, KernelCounters};
use crate::service::watch::{WatchRequest, WatchedVm};
use crate::time::{ThreadTime, monotonic_now, thread_time};

/// How often the VM's slots and threads are looked at again.
const REFRESH_EVERY: Duration = Duration::from_millis(500);
/// What is known of a vCPU's speed halves in this time, while it writes less.
const HALF_LIFE: Duration = Duration::from_secs(1);
/// Behind a protection whoever writes little writes its few pages at once, too: what is seen in one look is told over this time.
const TELL_OVER: Duration = Duration::from_millis(500);
/// A VM whose dirty log is on and none of whose vCPUs runs for so long has been handed over: QEMU leaves the log on.
const STANDSTILL: Duration = Duration::from_secs(2);
/// How often a VMM is asked how it is.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// The unit of `set-vcpu-dirty-limit`.
const MEGABYTE: f64 = (1 << 20) as f64;
/// Less CPU time says nothing of speed.
const LEAST_TIME: Duration = Duration::from_millis(2);

/// A vCPU's thread.
#[derive(Debug, Default)]
struct Thread {
    /// Events of both kinds, in all.
    made_writable: u64,
    pushed: u64,
    /// Pages that it wrote, in all, as far as is known.
    written: u64,
    /// Of these, those that are told so far.
    told_pages: f64,
    /// Of these, those that `speed` knows of.
    pages: u64,
    ran: Duration,
    /// It neither ran nor waited for a CPU, at the look before.
    idle: Duration,
    /// Pages in a second of CPU time.
    speed: f64,
    held: Duration,
    held_before: Duration,
    /// The holder has it.
    taken: bool,
    /// What its VMM was told, in MB/s.
    told: u64,
}

impl Thread {
    /// What it has written so far, told over [`TELL_OVER`].
    fn tell(&mut self, since: Duration) -> f64 {
        let part = 1.0 - (-since.as_secs_f64() / TELL_OVER.as_secs_f64()).exp();
        self.told_pages += (self.written as f64 - self.told_pages) * part;
        self.told_pages
    }

    /// Takes in its events so far; what it has written in all.
    fn count(&mut self, events: &ThreadEvents, by_ring: bool) -> u64 {
        let made_writable = events.pages_made_writable.saturating_sub(self.made_writable);
        let pushed = events.dirty_ring_pushes.saturating_sub(self.pushed);
        (self.made_writable, self.pushed) = (events.pages_made_writable, events.dirty_ring_pushes);
        self.written += if by_ring { pushed } else { made_writable };
        self.written
    }

    /// Takes in what it has written and for how long it has run, in all, `since` the look before.
    fn see(&mut self, pages: u64, ran: Duration, since: Duration) {
        let kept = self.speed * 0.5f64.powf(since.as_secs_f64() / HALF_LIFE.as_secs_f64());
        let (new, time) = (pages.saturating_sub(self.pages), ran.saturating_sub(self.ran));
        self.speed = kept;
        if time > LEAST_TIME {
            let seen = new as f64 / time.as_secs_f64();
            // One look may have caught a moment: half of what it adds.
            self.speed = if kept > 0.0 { kept.max(f64::midpoint(kept, seen)) } else { seen };
            (self.pages, self.ran) = (pages, ran);
        }
    }
}

impl Thread {
    /// Has the holder limit it, or let it go.
    fn obey(
        &mut self,
        holder: &mut Holder,
        process: u32,
        id: u32,
        limit: Option<VcpuLimit>,
    ) -> Result<(), HolderError> {
        match limit {
            Some(limit) if self.speed > 0.0 => {
                if !self.taken {
                    holder.take(process, id)?;
                    self.taken = true;
                }
                (_, self.held) = holder.limit(id, limit.rate.0 / self.speed)?;
            }
            None if self.taken => {
                self.taken = false;
                holder.release(id)?;
            }
            _ => {}
        }
        Ok(())
    }
}

impl Thread {
    /// Has its VMM limit it, or let it go. How long it is held the VMM does not tell: what it neither runs nor waits for a CPU, it is held at most.
    fn obey_by_vmm(&mut self, holder: &mut Holder, vcpu: u32, limit: Option<VcpuLimit>) -> Result<(), HolderError> {
        match limit {
            Some(limit) => {
                let megabytes = ((limit.rate.0 * PAGE_SIZE as f64 / MEGABYTE).round() as u64).max(1);
                if !self.taken || self.told != megabytes {
                    holder.dirty_limit(vcpu, megabytes)?;
                    (self.taken, self.told) = (true, megabytes);
                }
            }
            None if self.taken => {
                self.taken = false;
                holder.cancel_dirty_limit(vcpu)?;
            }
            None => {}
        }
        Ok(())
    }

    /// Takes in for how long it neither ran nor waited for a CPU `since` the look before.
    fn see_idle(&mut self, now: ThreadTime, before: ThreadTime, since: Duration) {
        let busy = |time: ThreadTime| time.ran + time.waited.unwrap_or_default();
        let idle = since.saturating_sub(busy(now).saturating_sub(busy(before)));
        // The looks at it and at the clock are not at one instant.
        self.idle = if idle > since / 20 { idle } else { Duration::ZERO };
    }
}

/// One foreign VM.
pub(super) struct Foreign {
    watched: WatchedVm,
    counters: KernelCounters,
    pages: PageBitmap,
    holder: Option<Holder>,
    means: Means,
    answers: Option<Answers>,
    vmm_answers: Option<Duration>,
    asked: Instant,
    threads: BTreeMap<u32, Thread>,
    times: BTreeMap<u32, ThreadTime>,
    /// When a vCPU was last seen to have run.
    ran: Instant,
    looked: Instant,
    refreshed: Instant,
}

impl Foreign {
    pub(super) fn open(request: &StunRequest, permission: Permission) -> Result<Self, StunError> {
        if !request.dry_run {
            clear_first();
        }
        let (watched, counters) = WatchedVm::open(&WatchRequest {
            run_dir: request.run_dir.clone(),
            vm: request.vm.clone(),
            wanted: vec![Gives::Pages, Gives::RingPages, Gives::HardwareLog],
            max_address_bytes: None,
            single_writes: None,
            probe_log: false,
        })?;
        if !request.dry_run && request.means == Means::Cgroup {
            for thread in watched.vm.vcpus.iter().filter_map(|vcpu| vcpu.thread_id) {
                cgroup::check(watched.vm.pid, thread)?;
            }
        }
        let what = match request.means {
            Means::Cgroup => "vCPU threads may be moved into cgroups of their own, below those that they are in",
            Means::Qmp => "its VMM may be told to limit vCPUs",
        };
        tracing::info!(vm = watched.vm.name, allowed_by = permission.by(), "{what}");
        let pages = counters.empty_pages();
        let mut holder = if request.dry_run { None } else { Some(Holder::start(request.config.longest_hold)?) };
        let mut answers = None;
        match (request.means, &request.qmp, &mut holder) {
            (Means::Qmp, None, _) => {
                return Err(StunError::Goal("--by qmp needs the VMM's monitor: name it by --qmp PATH".to_owned()));
            }
            // A monitor has one client: the one who must let go whatever happens.
            (Means::Qmp, Some(path), Some(holder)) => holder.connect(path)?,
            (_, Some(path), _) => answers = Some(Answers::ask(path)?),
            (Means::Cgroup, None, _) => {}
        }
        let now = Instant::now();
        Ok(Self {
            watched,
            counters,
            pages,
            holder,
            means: request.means,
            answers,
            vmm_answers: None,
            asked: now,
            threads: BTreeMap::new(),
            times: BTreeMap::new(),
            ran: now,
            looked: now,
            refreshed: now,
        })
    }

    /// Looks for how long each vCPU has run.
    fn see_times(&mut self, vcpus: &[(u32, u32)], since: Duration) {
        for &(_, id) in vcpus {
            let Some(now) = thread_time(self.watched.vm.pid, id) else { continue };
            let before = self.times.insert(id, now).unwrap_or(now);
            if now.ran != before.ran {
                self.ran = Instant::now();
            }
            self.threads.entry(id).or_default().see_idle(now, before, since);
        }
    }

    /// The threads that run vCPUs, by index.
    fn vcpu_threads(&self) -> Vec<(u32, u32)> {
        self.watched.vm.vcpus.iter().filter_map(|vcpu| Some((vcpu.index, vcpu.thread_id?))).collect()
    }
}

/// Clears leftovers, which stand in nobody's way if that fails.
fn clear_first() {
    match super::clear_leftovers() {
        Ok(cleared) => {
            for group in cleared.groups {
                tracing::warn!("{group} was left by a process that was killed; its threads are back");
            }
            for failure in cleared.failures {
                tracing::warn!("{failure}");
            }
        }
        Err(error) => tracing::debug!("{error}"),
    }
}

impl Actuator for Foreign {
    fn by(&self) -> &'static str {
        match self.means {
            Means::Cgroup => "cgroup",
            Means::Qmp => "qmp",
        }
    }

    fn look(&mut self) -> Result<Option<VmWrites>, StunError> {
        if self.refreshed.elapsed() >= REFRESH_EVERY {
            self.refreshed = Instant::now();
            if !self.watched.refresh() {
                return Ok(None);
            }
        }
        let since = std::mem::replace(&mut self.looked, Instant::now()).elapsed();
        let sample = self.counters.sample(&mut self.pages)?;
        let different = self.pages.count().0;
        self.pages.clear();
        let count = self.watched.vm.vcpus.iter().map(|vcpu| vcpu.index + 1).max().unwrap_or(0);
        let mut writes = VmWrites {
            at_ns: monotonic_now().as_nanos() as u64,
            vcpus: vec![VcpuWrites::default(); count as usize],
            others_pages: 0.0,
            attribution: Attribution::Faults,
        };
        let vcpus = self.vcpu_threads();
        self.see_times(&vcpus, since);
        // Pages that turn writable count once. Where the processor itself logs writes none does, and entries of the dirty ring are counted instead, which may hold a page
        // many times.
        let made_writable: u64 = sample
            .threads
            .iter()
            .map(|(id, events)| {
                let before = self.threads.get(id).map_or(0, |thread| thread.made_writable);
                events.pages_made_writable.saturating_sub(before)
            })
            .sum();
        let by_ring = made_writable < different / 2;
        for (&id, events) in &sample.threads {
            let thread = self.threads.entry(id).or_default();
            let pages = thread.count(events, by_ring);
            let told = thread.tell(since);
            let Some(&(index, _)) = vcpus.iter().find(|&&(_, thread)| thread == id) else {
                writes.others_pages += told;
                continue;
            };
            let ran = self.times.get(&id).map_or(thread.ran, |time| time.ran);
            thread.see(pages, ran, since);
            if self.means == Means::Qmp && thread.taken {
                thread.held += thread.idle;
            }
            writes.vcpus[index as usize] = VcpuWrites {
                pages: told,
                held_ns: thread.held.as_nanos() as u64,
                owes: thread.taken && thread.held > thread.held_before,
                ..VcpuWrites::default()
            };
            thread.held_before = thread.held;
        }
        if let Some(holder) = &mut self.holder {
            holder.renew()?;
            if self.means == Means::Qmp && self.asked.elapsed() >= ASK_EVERY {
                self.asked = Instant::now();
                self.vmm_answers = holder.vmm_answers().ok();
            }
        }
        Ok(Some(writes))
    }

    fn is_moved(&self) -> bool {
        self.watched.vm.logged_bytes > 0 && self.ran.elapsed() < STANDSTILL
    }

    fn vmm_answers(&self) -> Option<Duration> {
        self.answers.as_ref().map_or(self.vmm_answers, Answers::last)
    }

    fn limit(&mut self, limits: &[Option<VcpuLimit>]) -> Result<(), StunError> {
        let vcpus = self.vcpu_threads();
        let pid = self.watched.vm.pid;
        let Some(holder) = &mut self.holder else { return Ok(()) };
        for (index, id) in vcpus {
            let thread = self.threads.entry(id).or_default();
            let limit = limits.get(index as usize).copied().flatten();
            let obeyed = match self.means {
                Means::Cgroup => thread.obey(holder, pid, id, limit),
                Means::Qmp => thread.obey_by_vmm(holder, index, limit),
            };
            match obeyed {
                // It has ended, or its process has: that is seen at the next look.
                Err(_) if thread_time(pid, id).is_none() => thread.taken = false,
                other => other?,
            }
        }
        Ok(())
    }

    fn let_go(&mut self) -> Result<(), StunError> {
        drop(self.holder.take());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_speed_is_taken_in_at_once_and_kept_while_a_round_has_nothing_left_to_show() {
        let mut thread = Thread::default();
        let look = Duration::from_millis(100);
        let (mut pages, mut ran) = (0, Duration::ZERO);
        let mut run = |thread: &mut Thread, new: u64, time_ms: u64| {
            pages += new;
            ran += Duration::from_millis(time_ms);
            thread.see(pages, ran, look);
        };
        run(&mut thread, 30_000, 100);
        assert!((thread.speed - 300_000.0).abs() < 1.0, "{}", thread.speed);
        // All its pages are written: ten looks in which it runs and nothing shows.
        for _ in 0..10 {
            run(&mut thread, 0, 10);
        }
        assert!((thread.speed - 150_000.0).abs() < 1000.0, "{}", thread.speed);
        // A round begins: within two looks most of it is known again.
        run(&mut thread, 3000, 10);
        run(&mut thread, 3000, 10);
        assert!(thread.speed > 250_000.0, "{}", thread.speed);
        // Next to no time says nothing, and is counted later.
        let before = thread.speed;
        run(&mut thread, 600, 1);
        assert!(thread.speed < before);
        run(&mut thread, 600, 2);
        assert!((thread.speed - before).abs() < 0.5 * before);
        // An emulated write is entered in the ring each time.
        let events = |made_writable, pushed| ThreadEvents {
            pages_made_writable: made_writable,
            dirty_ring_pushes: pushed,
            ..ThreadEvents::default()
        };
        assert_eq!((thread.count(&events(5, 900), false), thread.count(&events(5, 1000), true)), (5, 105));
        // A few pages behind a protection, and then none: no rate of ten times as many.
        let mut bystander = Thread { written: 60, ..Thread::default() };
        let told: Vec<f64> = (0..30).map(|_| bystander.tell(look)).collect();
        assert!(told[0] * 10.0 < 60.0 * 2.0 && told[29] > 59.0, "{told:?}");
        // Counters that go back.
        thread.see(0, Duration::ZERO, look);
        assert!(thread.speed.is_finite());
    }
}
