//! The cooperative scheduler: real threads, virtual time, one thread at a time.
//!
//! Every port operation passes through here. The thread with the smallest wake time runs next, ties are decided by the
//! seed, so one seed gives one order of events; [`Scheduler::trace_hash`] proves it. A killed process's threads are
//! unwound at their next operation, as if they had ended in the middle of it.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::network::{DialId, NEVER, PipeId};
use super::rng::mix;
use super::scenario::{Scenario, Side};
use super::world::World;
use crate::port::{Bell, Clock, Job};

/// What unwinds the threads of a killed process.
struct Killed;

type TaskId = usize;

thread_local! {
    static CURRENT: Cell<Option<TaskId>> = const { Cell::new(None) };
}

/// A manager's process: the first of its side, or the one that takes its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) side: Side,
    pub(super) generation: u8,
}

/// What a task waits for.
#[derive(Clone)]
pub(super) enum Wait {
    Until(u64),
    Readable {
        pipe: PipeId,
        deadline_ns: u64,
    },
    Room {
        pipe: PipeId,
        deadline_ns: u64,
    },
    Answer {
        dial: DialId,
        deadline_ns: u64,
    },
    Incoming {
        deadline_ns: u64,
    },
    Bell {
        rings: Arc<AtomicU64>,
        seen: u64,
        deadline_ns: u64,
    },
    /// A fault of that side's machine.
    Fault {
        side: Side,
        deadline_ns: u64,
    },
    /// That an operator starts this process.
    Start,
    /// That these tasks have ended.
    Children {
        first: TaskId,
        count: usize,
    },
}

struct Task {
    process: Process,
    wait: Wait,
    /// Time that operations cost which could not wait at once.
    debt_ns: u64,
    ended: bool,
    turn: Arc<Condvar>,
}

struct Shared {
    world: World,
    tasks: Vec<Task>,
    current: Option<TaskId>,
    operations: u64,
    trace: u64,
    /// The last of the trace, for people.
    log: Vec<(u64, TaskId, &'static str)>,
    /// The first panic that was no killing.
    panic: Option<Box<dyn std::any::Any + Send>>,
}

/// Runs threads one at a time over a [`World`].
pub(super) struct Scheduler {
    shared: Mutex<Shared>,
}

impl Scheduler {
    pub(super) fn new(scenario: &Scenario) -> Self {
        let shared = Shared {
            world: World::new(scenario),
            tasks: Vec::new(),
            current: None,
            operations: 0,
            trace: 0,
            log: Vec::new(),
            panic: None,
        };
        Self { shared: Mutex::new(shared) }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the world without taking time.
    pub(super) fn with<R>(&self, look: impl FnOnce(&mut World) -> R) -> R {
        look(&mut self.lock().world)
    }

    /// A hash of every operation with its thread and time.
    pub(super) fn trace_hash(&self) -> u64 {
        self.lock().trace
    }

    /// How many operations there were.
    pub(super) fn operations(&self) -> u64 {
        self.lock().operations
    }

    /// The last operations, one a line.
    pub(super) fn trace_text(&self, lines: usize) -> String {
        let shared = self.lock();
        let from = shared.log.len().saturating_sub(lines);
        let line = |&(at, task, label): &(u64, usize, _)| format!("{:.6} task {task} {label}\n", at as f64 / 1e9);
        shared.log[from..].iter().map(line).collect()
    }

    /// Runs one thread for each process to its end.
    pub(super) fn run(&self, mains: Vec<(Process, Job<'_>)>) {
        let mut shared = self.lock();
        let first = shared.tasks.len();
        for (process, _) in &mains {
            shared.add_task(*process);
        }
        drop(shared);
        std::thread::scope(|scope| {
            for (index, (process, main)) in mains.into_iter().enumerate() {
                scope.spawn(move || {
                    self.be(first + index, main, || self.with(|world| world.manager_ended(process)));
                });
            }
            self.lock().dispatch();
        });
        if let Some(panic) = self.lock().panic.take() {
            resume_unwind(panic);
        }
    }

    /// A thread's whole life as a task.
    fn be(&self, id: TaskId, work: Job<'_>, at_end: impl FnOnce()) {
        CURRENT.set(Some(id));
        let result = catch_unwind(AssertUnwindSafe(|| {
            drop(Self::await_turn(self.lock(), id));
            work();
        }));
        at_end();
        let mut shared = self.lock();
        if let Err(panic) = result
            && !panic.is::<Killed>()
        {
            shared.panic.get_or_insert(panic);
            // Nothing sensible can follow: let everybody go.
            shared.world.over = true;
        }
        shared.tasks[id].ended = true;
        shared.dispatch();
    }

    fn await_turn(mut shared: MutexGuard<'_, Shared>, me: TaskId) -> MutexGuard<'_, Shared> {
        let turn = Arc::clone(&shared.tasks[me].turn);
        while shared.current != Some(me) {
            shared = turn.wait(shared).unwrap_or_else(PoisonError::into_inner);
        }
        shared
    }

    /// Gives the turn away until `wait` is over.
    fn give_way(mut shared: MutexGuard<'_, Shared>, me: TaskId, wait: Wait) -> MutexGuard<'_, Shared> {
        shared.tasks[me].wait = wait;
        shared.dispatch();
        Self::await_turn(shared, me)
    }

    /// Books an operation; faults strike here.
    fn begin(&self, label: &'static str) -> (MutexGuard<'_, Shared>, TaskId) {
        let me = CURRENT.get().expect("a port of a simulation was called by a thread that it does not know");
        let mut shared = self.lock();
        shared.die_if_killed(me);
        shared.operations += 1;
        let (now, number) = (shared.world.now_ns, shared.operations);
        shared.trace = label.bytes().fold(mix(shared.trace ^ now ^ me as u64), |sum, byte| mix(sum ^ u64::from(byte)));
        shared.log.push((now, me, label));
        shared.world.before_operation(number);
        shared.die_if_killed(me);
        (shared, me)
    }

    /// An operation that takes about `cost` and then has its effect.
    pub(super) fn operation<R>(&self, label: &'static str, cost: Duration, effect: impl FnOnce(&mut World) -> R) -> R {
        let (mut shared, me) = self.begin(label);
        let cost = cost.as_nanos() as u64;
        let until = shared.world.now_ns + cost + shared.world.rng.below(cost / 2 + 1) + shared.pay_debt(me);
        let mut shared = Self::give_way(shared, me, Wait::Until(until));
        shared.die_if_killed(me);
        effect(&mut shared.world)
    }

    /// An order to another process: once sent it may be carried out although its sender dies before the answer.
    pub(super) fn order<R>(&self, label: &'static str, cost: Duration, effect: impl FnOnce(&mut World) -> R) -> R {
        let (mut shared, me) = self.begin(label);
        let cost = cost.as_nanos() as u64;
        let until = shared.world.now_ns + cost + shared.world.rng.below(cost / 2 + 1) + shared.pay_debt(me);
        let mut shared = Self::give_way(shared, me, Wait::Until(until));
        if shared.world.over || (shared.world.is_dead(shared.tasks[me].process) && shared.world.rng.one_in(2)) {
            shared.die_if_killed(me);
        }
        let answer = effect(&mut shared.world);
        shared.die_if_killed(me);
        answer
    }

    /// An operation that must not wait, since its caller holds a lock; its cost is paid at the next one that may.
    pub(super) fn operation_in_lock<R>(
        &self,
        label: &'static str,
        cost: Duration,
        effect: impl FnOnce(&mut World) -> R,
    ) -> R {
        let (mut shared, me) = self.begin(label);
        shared.tasks[me].debt_ns += cost.as_nanos() as u64;
        effect(&mut shared.world)
    }

    /// Waits until an operator starts the calling process; false if nobody does.
    pub(super) fn await_start(&self) -> bool {
        let (shared, me) = self.begin("await start");
        let shared = Self::give_way(shared, me, Wait::Start);
        shared.world.has_started(shared.tasks[me].process)
    }

    /// Tries until there is a result or `deadline_ns` has passed; between tries waits as `wait` says.
    pub(super) fn wait_for<R>(
        &self,
        label: &'static str,
        wait: &Wait,
        deadline_ns: u64,
        mut attempt: impl FnMut(&mut World) -> Option<R>,
    ) -> Option<R> {
        let (mut shared, me) = self.begin(label);
        let debt = shared.pay_debt(me);
        if debt > 0 {
            let until = Wait::Until(shared.world.now_ns + debt);
            shared = Self::give_way(shared, me, until);
        }
        loop {
            shared.die_if_killed(me);
            if let Some(result) = attempt(&mut shared.world) {
                return Some(result);
            }
            if shared.world.now_ns >= deadline_ns {
                return None;
            }
            shared = Self::give_way(shared, me, wait.clone());
        }
    }
}

impl Shared {
    fn add_task(&mut self, process: Process) -> TaskId {
        self.tasks.push(Task {
            process,
            wait: Wait::Until(self.world.now_ns),
            debt_ns: 0,
            ended: false,
            turn: Arc::new(Condvar::new()),
        });
        self.tasks.len() - 1
    }

    fn pay_debt(&mut self, me: TaskId) -> u64 {
        std::mem::take(&mut self.tasks[me].debt_ns)
    }

    fn die_if_killed(&self, me: TaskId) {
        if self.world.is_dead(self.tasks[me].process) {
            resume_unwind(Box::new(Killed));
        }
    }

    /// When a task can go on.
    fn ready_at(&self, task: &Task) -> u64 {
        let now = self.world.now_ns;
        let network = &self.world.network;
        if let Wait::Children { first, count } = task.wait {
            let ended = self.tasks[first..first + count].iter().all(|task| task.ended);
            return if ended { now } else { NEVER };
        }
        if matches!(task.wait, Wait::Start) {
            return if self.world.has_started(task.process) || self.world.over { now } else { NEVER };
        }
        if self.world.is_dead(task.process) {
            return now;
        }
        match &task.wait {
            Wait::Until(at) => *at,
            Wait::Readable { pipe, deadline_ns } => network.readable_at(*pipe).min(*deadline_ns),
            Wait::Room { pipe, deadline_ns } => network.room_at(*pipe, now).min(*deadline_ns),
            Wait::Answer { dial, deadline_ns } => network.answered_at(*dial).min(*deadline_ns),
            Wait::Incoming { deadline_ns } => network.incoming_at().min(*deadline_ns),
            Wait::Bell { rings, seen, deadline_ns } => {
                if rings.load(Ordering::Acquire) == *seen {
                    *deadline_ns
                } else {
                    now
                }
            }
            Wait::Fault { side, deadline_ns } => {
                if self.world.has_fault(*side) {
                    now
                } else {
                    *deadline_ns
                }
            }
            Wait::Children { .. } | Wait::Start => NEVER,
        }
    }

    /// Gives the turn to the task that is due first; fires what is due before it.
    fn dispatch(&mut self) {
        loop {
            let now = self.world.now_ns;
            let mut due: Vec<TaskId> = Vec::new();
            let mut first = NEVER;
            for (id, task) in self.tasks.iter().enumerate().filter(|(_, task)| !task.ended) {
                let at = self.ready_at(task);
                let at = if at == NEVER { NEVER } else { at.max(now) };
                if at < first {
                    due.clear();
                    first = at;
                }
                if at == first && at != NEVER {
                    due.push(id);
                }
            }
            let (event, touch) = (self.world.next_event_at(), self.world.next_touch_at());
            if touch < first.min(event) {
                self.world.advance(touch);
                continue;
            }
            if event != NEVER && event <= first {
                self.world.fire_event();
                continue;
            }
            if due.is_empty() {
                // Those that nobody starts are not missed.
                let waits = |task: &Task| !task.ended && !matches!(task.wait, Wait::Start);
                if !self.tasks.iter().any(waits) && self.tasks.iter().any(|task| !task.ended) && !self.world.over {
                    self.world.over = true;
                    continue;
                }
                if self.tasks.iter().any(|task| !task.ended) && !self.world.over {
                    self.world.violations.push("every thread waits for another".to_owned());
                    self.world.over = true;
                    continue;
                }
                self.current = None;
                return;
            }
            self.world.advance(first);
            let chosen = due[self.world.rng.below(due.len() as u64) as usize];
            self.current = Some(chosen);
            self.tasks[chosen].turn.notify_one();
            return;
        }
    }
}

impl Clock for Scheduler {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.lock().world.now_ns)
    }

    fn sleep(&self, duration: Duration) {
        self.operation("sleep", duration, |_| ());
    }

    fn wait(&self, bell: &Bell, seen: u64, timeout: Duration) {
        let rings = bell.counter();
        let deadline_ns = self.with(|world| world.now_ns) + timeout.as_nanos() as u64;
        let wait = Wait::Bell { rings: Arc::clone(&rings), seen, deadline_ns };
        self.wait_for("wait for a bell", &wait, deadline_ns, |_| (rings.load(Ordering::Acquire) != seen).then_some(()));
    }

    fn run_beside(&self, jobs: Vec<Job<'_>>, lead: Job<'_>) {
        if jobs.is_empty() {
            return lead();
        }
        let (mut shared, me) = self.begin("fork");
        let process = shared.tasks[me].process;
        let first = shared.tasks.len();
        for _ in &jobs {
            shared.add_task(process);
        }
        let children = Wait::Children { first, count: jobs.len() };
        drop(shared);
        std::thread::scope(|scope| {
            for (index, job) in jobs.into_iter().enumerate() {
                scope.spawn(move || self.be(first + index, job, || ()));
            }
            let led = catch_unwind(AssertUnwindSafe(lead));
            drop(Self::give_way(self.lock(), me, children));
            if let Err(panic) = led {
                resume_unwind(panic);
            }
        });
        let shared = self.lock();
        shared.die_if_killed(me);
    }
}
