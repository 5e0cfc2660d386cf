//! Owns the interrupt accounting of a vCPU: pings to itself and to the next vCPU, exactly once, and a watch on the next vCPU's
//! timer. Part of every service task.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use dunlin_guest::ledger::{Ping, PingLedger, RunClock, TimerWatch};

use crate::cpu::{self, Cpu, SERVICE};
use crate::{apic, clock, entry, paging};

/// Observed running time of the sender after which a ping counts as lost.
const LOST_NS: u64 = 1_000_000_000;
/// Observed running time after which the timer of another vCPU counts as stalled (longer than any throttle sleeps).
const PEER_STALL_NS: u64 = 3_000_000_000;
/// Longest sleep of a service task.
pub const LONGEST_SLEEP_NS: u64 = 100_000_000;

/// Accounting state of one vCPU.
pub struct Monitor {
    cpu: &'static Cpu,
    peer: Option<&'static Cpu>,
    run: RunClock,
    own: PingLedger,
    cross: PingLedger,
    peer_timer: TimerWatch,
    ping_cycles: u64,
    next_ping: u64,
}

impl Monitor {
    /// Starts the accounting of `cpu`, one of `cpus`; pings go out every `ping_ns` (0: never).
    pub fn new(cpu: &'static Cpu, cpus: usize, ping_ns: u64, now: u64) -> Self {
        let peer = (cpus > 1).then(|| cpu::cpu((cpu.number() + 1) % cpus));
        Self {
            cpu,
            peer,
            run: RunClock::new(now, clock::cycles(20_000_000)),
            own: PingLedger::default(),
            cross: PingLedger::default(),
            peer_timer: TimerWatch::default(),
            ping_cycles: clock::cycles(ping_ns),
            next_ping: now,
        }
    }

    /// One round. `planned` is when it was planned; returns the run clock and when the next round must be.
    pub fn round(&mut self, now: u64, planned: u64) -> (u64, u64) {
        let shared = &self.cpu.shared;
        shared.rounds.fetch_add(1, Relaxed);
        if !paging::in_own_space(self.cpu.number(), SERVICE) {
            shared.address_space_mismatches.fetch_add(1, Relaxed);
        }
        let run = self.run.look(now, planned);
        if self.ping_cycles > 0 {
            let due = now >= self.next_ping;
            ping(&mut self.own, self.cpu, &self.cpu.own_received, entry::OWN_VECTOR, run, due);
            publish(&self.own, &shared.own);
            if let Some(peer) = self.peer {
                ping(&mut self.cross, peer, &peer.cross_received, entry::CROSS_VECTOR, run, due);
                publish(&self.cross, &shared.cross);
            }
            if due {
                self.next_ping = (self.next_ping + self.ping_cycles).max(now);
            }
        }
        if let Some(peer) = self.peer {
            self.watch_peer(peer, now, run);
        }
        let longest = now + clock::cycles(LONGEST_SLEEP_NS);
        let next = if self.ping_cycles > 0 { self.next_ping.min(longest) } else { longest };
        (run, next)
    }

    fn watch_peer(&mut self, peer: &Cpu, now: u64, run: u64) {
        let overdue = now > peer.armed_until.load(Relaxed);
        if self.peer_timer.look(peer.ticks.load(Relaxed), overdue, run, clock::cycles(PEER_STALL_NS)) {
            peer.shared.timer_stalls.fetch_add(1, Relaxed);
            apic::send(peer.index.load(Relaxed), entry::WAKE_VECTOR);
        }
    }
}

fn ping(book: &mut PingLedger, receiver: &Cpu, received: &AtomicU64, vector: u8, run: u64, due: bool) {
    let rounds = receiver.shared.rounds.load(Relaxed);
    let verdict = book.look(received.load(Relaxed), rounds, run, clock::cycles(LOST_NS));
    if verdict == Ping::Send && due {
        book.sending(rounds, run);
        apic::send(receiver.index.load(Relaxed), vector);
    }
}

fn publish(book: &PingLedger, slots: &[AtomicU64; 3]) {
    for (slot, value) in slots.iter().zip([book.sent, book.lost, book.doubled]) {
        slot.store(value, Relaxed);
    }
}

/// Service task of every vCPU but the first: accounting only.
pub extern "sysv64" fn main(cpu: &'static Cpu) -> ! {
    apic::enable();
    let mut now = cpu.look(0);
    let settings = crate::settings();
    let mut monitor = Monitor::new(cpu, settings.cpus, settings.ipi_ns, now);
    crate::release_writer(cpu);
    let mut planned = 0;
    while !crate::panic::PANICKED.load(Relaxed) {
        cpu.tasks[SERVICE].wake.store(0, Relaxed);
        let (_, next) = monitor.round(now, planned);
        planned = next;
        now = cpu.wait(planned);
    }
    cpu::halt_for_ever()
}
