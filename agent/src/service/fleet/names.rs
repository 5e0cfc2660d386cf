//! Names of the guest processes behind address spaces that wrote in windows: looked for on a thread of its own, so that no look waits for a
//! guest's memory.
//!
//! Owns what is remembered of each VM, and how often its memory is read: for address spaces that are new, once a minute for those that are
//! not (a process may end, and its address space become another's), and for [`SHARE_OF_CORE`] of a core's time at most. Must not know what a
//! name is for.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::tracked::Key;
use crate::model::{AddressSpace, GuestProcess, Writer};
use crate::service::guest_names::GuestNames;
use crate::service::interrupt::{Interrupt, Wake};
use crate::service::inventory::HostVm;
use crate::time::thread_cpu_time;

/// Names are as old as this, at most, while their VM's windows open.
const FRESH: Duration = Duration::from_mins(1);
/// The part of one core that reading guests' memory may take, on average.
const SHARE_OF_CORE: f64 = 0.01;
/// VMs that may wait for their names.
const MOST_WAITING: usize = 64;
/// Processes of one VM that are told apart for as long as it is watched.
const MOST_TOLD_APART: usize = 64;

/// What is known of one VM's processes.
#[derive(Debug, Default)]
pub(super) struct Known {
    names: BTreeMap<AddressSpace, Option<GuestProcess>>,
    answered: Option<Instant>,
    problem: Option<String>,
    /// What reads the VM's memory; away while it is being asked.
    guest: GuestNames,
    asked: bool,
    told_apart: BTreeSet<(u32, String)>,
}

impl Known {
    /// Gives a writer the name that is known of it.
    pub(super) fn name(&self, writer: &mut Writer) {
        if let Writer::AddressSpace { address_space, process, .. } = writer {
            *process = self.names.get(address_space).cloned().flatten();
        }
    }

    /// Why address spaces have no names.
    pub(super) fn problem(&self) -> Option<&String> {
        self.problem.as_ref()
    }

    /// Whether a process may have a time series of its own: a guest can make up new ones without end.
    pub(super) fn is_told_apart(&mut self, process: &GuestProcess) -> bool {
        let key = (process.pid, process.name.clone());
        if self.told_apart.len() < MOST_TOLD_APART {
            self.told_apart.insert(key);
            return true;
        }
        self.told_apart.contains(&key)
    }

    fn is_due(&self, spaces: &[AddressSpace], now: Instant) -> bool {
        let old = self.answered.is_none_or(|then| now.saturating_duration_since(then) >= FRESH);
        // What has just failed is not tried again for every new address space.
        let new = self.problem.is_none() && spaces.iter().any(|space| !self.names.contains_key(space));
        !self.asked && !spaces.is_empty() && (old || new)
    }
}

/// Names that were found, or why not.
type Outcome = Result<BTreeMap<AddressSpace, GuestProcess>, String>;

struct Job {
    key: Key,
    vm: HostVm,
    guest: GuestNames,
    spaces: Vec<AddressSpace>,
}

struct Answer {
    key: Key,
    guest: GuestNames,
    spaces: Vec<AddressSpace>,
    outcome: Outcome,
}

/// The thread. Dropping it ends it, behind a guest's memory that is being read.
pub(super) struct Names {
    jobs: Option<SyncSender<Job>>,
    done: Receiver<Answer>,
    wake: Option<Wake>,
    thread: Option<JoinHandle<()>>,
}

impl Names {
    /// Starts the thread.
    pub(super) fn start() -> std::io::Result<Self> {
        Self::start_with(|guest, vm, spaces| guest.of_spaces(vm, spaces))
    }

    fn start_with(
        mut find: impl FnMut(&mut GuestNames, &HostVm, &[AddressSpace]) -> Outcome + Send + 'static,
    ) -> std::io::Result<Self> {
        let (jobs, todo) = sync_channel::<Job>(MOST_WAITING);
        let (answer, done) = channel();
        let (interrupt, wake) = Interrupt::by_hand()?;
        let thread = std::thread::Builder::new().name("names".into()).spawn(move || {
            for Job { key, vm, mut guest, spaces } in todo {
                if interrupt.wait_until(Instant::now()) {
                    break;
                }
                let before = thread_cpu_time();
                let outcome = find(&mut guest, &vm, &spaces);
                let cost = thread_cpu_time().saturating_sub(before);
                if answer.send(Answer { key, guest, spaces, outcome }).is_err()
                    || interrupt.wait_until(Instant::now() + cost.div_f64(SHARE_OF_CORE))
                {
                    break;
                }
            }
        })?;
        Ok(Self { jobs: Some(jobs), done, wake: Some(wake), thread: Some(thread) })
    }

    /// Has the processes of `spaces` looked for, which is answered later; those that wrote most come first. Nothing happens if all are known, or
    /// being looked for, or too many VMs wait.
    pub(super) fn ask(&self, key: Key, vm: &HostVm, may_read: bool, known: &mut Known, spaces: &[AddressSpace]) {
        if !may_read {
            known.problem = Some("reading this VM's memory is not allowed ([track] read_memory)".to_owned());
            return;
        }
        let Some(jobs) = self.jobs.as_ref().filter(|_| known.is_due(spaces, Instant::now())) else { return };
        let guest = std::mem::take(&mut known.guest);
        match jobs.try_send(Job { key, vm: vm.clone(), guest, spaces: spaces.to_vec() }) {
            Ok(()) => known.asked = true,
            Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) => known.guest = job.guest,
        }
    }

    /// Takes an answer, if there is one: whose it is, for [`take`] to keep.
    pub(super) fn answered(&self) -> Option<(Key, Found)> {
        let Answer { key, guest, spaces, outcome } = self.done.try_recv().ok()?;
        Some((key, Found { guest, spaces, outcome }))
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        self.jobs = None;
        self.wake = None;
        if let Some(thread) = self.thread.take() {
            // It has already said why, if it panicked.
            let _ = thread.join();
        }
    }
}

/// What an answer holds.
pub(super) struct Found {
    guest: GuestNames,
    spaces: Vec<AddressSpace>,
    outcome: Outcome,
}

impl Known {
    /// Keeps an answer: what was asked for last, and nothing older.
    pub(super) fn take(&mut self, found: Found) {
        let Found { guest, spaces, outcome } = found;
        (self.guest, self.asked, self.answered) = (guest, false, Some(Instant::now()));
        match outcome {
            Ok(mut names) => {
                self.problem = None;
                self.names = spaces.into_iter().map(|space| (space, names.remove(&space))).collect();
            }
            Err(problem) => {
                self.problem = Some(problem);
                self.names.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Arc, Mutex};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn process(pid: u32) -> GuestProcess {
        GuestProcess { pid, name: format!("p{pid}"), threads: None }
    }

    fn spaces(range: std::ops::Range<u64>) -> Vec<AddressSpace> {
        range.map(|number| AddressSpace(number * 4096)).collect()
    }

    fn name_of(known: &Known, space: u64) -> Option<String> {
        let mut writer = Writer::AddressSpace { vcpu: 0, address_space: AddressSpace(space * 4096), process: None };
        known.name(&mut writer);
        let Writer::AddressSpace { process, .. } = writer else { return None };
        process.map(|process| process.name)
    }

    fn wait(names: &Names, known: &mut Known) {
        let until = Instant::now() + LIMIT;
        let (_, found) = std::iter::repeat_with(|| {
            std::thread::yield_now();
            assert!(Instant::now() < until, "no answer");
            names.answered()
        })
        .find_map(|answer| answer)
        .unwrap();
        known.take(found);
    }

    #[test]
    fn memory_is_read_for_new_address_spaces_only_and_not_by_whoever_asks() {
        let reads = Arc::new(AtomicU64::new(0));
        let (gate, count) = (Arc::new(Mutex::new(())), Arc::clone(&reads));
        let closed = gate.lock().unwrap();
        let opening = Arc::clone(&gate);
        let names = Names::start_with(move |_, _, spaces| {
            drop(opening.lock().unwrap());
            count.fetch_add(1, Ordering::SeqCst);
            let third = AddressSpace(3 * 4096);
            Ok(spaces.iter().filter(|&&space| space != third).map(|&space| (space, process(space.0 as u32))).collect())
        })
        .unwrap();
        let (key, vm, mut known) = ((1, 1), crate::service::inventory::sample(), Known::default());
        names.ask(key, &vm, true, &mut known, &[]);
        assert!(!known.asked, "for nobody nothing is read");
        // While the thread is stuck, whoever asks is not, and asks once.
        (0..3).for_each(|_| names.ask(key, &vm, true, &mut known, &spaces(1..4)));
        assert!(known.asked && names.answered().is_none() && name_of(&known, 1).is_none());
        drop(closed);
        wait(&names, &mut known);
        assert_eq!((name_of(&known, 1).as_deref(), name_of(&known, 3)), (Some("p4096"), None));
        // All are known, that one is nobody's too.
        names.ask(key, &vm, true, &mut known, &spaces(1..4));
        assert!(!known.asked && reads.load(Ordering::SeqCst) == 1);
        names.ask(key, &vm, true, &mut known, &spaces(4..6));
        wait(&names, &mut known);
        assert_eq!(
            (name_of(&known, 5).as_deref(), known.names.len()),
            (Some("p20480"), 2),
            "only what was asked for is kept"
        );
        // A minute later the same address space may be another's.
        known.answered = Instant::now().checked_sub(FRESH);
        names.ask(key, &vm, true, &mut known, &spaces(5..6));
        assert!(known.asked);
    }

    #[test]
    fn what_fails_is_said_and_not_tried_at_once_again() {
        let names = Names::start_with(|_, _, _| Err("no kernel".to_owned())).unwrap();
        let (key, vm, mut known) = ((1, 1), crate::service::inventory::sample(), Known::default());
        names.ask(key, &vm, false, &mut known, &spaces(1..2));
        assert!(!known.asked && known.problem().unwrap().contains("[track] read_memory"));
        known.problem = None;
        names.ask(key, &vm, true, &mut known, &spaces(1..2));
        wait(&names, &mut known);
        assert_eq!(known.problem().unwrap(), "no kernel");
        names.ask(key, &vm, true, &mut known, &spaces(7..9));
        assert!(!known.asked);
    }

    #[test]
    fn a_guest_that_renames_its_processes_without_end_makes_no_series_without_end() {
        let mut known = Known::default();
        let told = (0..1000).filter(|&pid| known.is_told_apart(&process(pid))).count();
        assert_eq!(told, MOST_TOLD_APART);
        assert!(known.is_told_apart(&process(3)) && !known.is_told_apart(&process(999)));
    }
}
