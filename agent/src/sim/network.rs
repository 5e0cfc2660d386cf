//! The simulated network between two hosts, as plain data: pipes with bandwidth, latency, buffers, resets and stalls.
//!
//! Modelled on TCP: what a killed process had sent still arrives, then the stream ends; a reset drops what is on its
//! way; what a stall holds back arrives when it heals. Knows no thread: the twins in [`super::link`] wait.

use std::collections::VecDeque;
use std::time::Duration;

use super::rng::Rng;
use super::scenario::{NetworkModel, Side};
use crate::migrate::ControlMessage;
use crate::port::BulkItem;

/// Bytes that a pipe holds before its writer has to wait.
const BUFFER_BYTES: u64 = 256 << 10;
/// Never.
pub(super) const NEVER: u64 = u64::MAX;

pub(super) type PipeId = usize;
pub(super) type DialId = usize;

/// What travels.
pub(super) enum Payload {
    Message(Box<ControlMessage>),
    Item(BulkItem),
    Bytes(Vec<u8>),
}

struct Parcel {
    arrives_ns: u64,
    bytes: u64,
    payload: Payload,
}

/// One direction of one connection.
struct Pipe {
    from: Side,
    parcels: VecDeque<Parcel>,
    queued_bytes: u64,
    last_arrival_ns: u64,
    writer_closed_ns: u64,
    reader_closed_ns: u64,
    reset_ns: u64,
}

/// What a dialled connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Control,
    Bulk(u16),
}

/// A connection that the source has dialled.
pub(super) struct Dial {
    pub(super) purpose: Purpose,
    arrives_ns: u64,
    answered_ns: u64,
    pub(super) to_target: PipeId,
    pub(super) to_source: PipeId,
}

/// What an attempt to read finds.
pub(super) enum Found {
    Payload(Payload),
    Nothing,
    Ended,
    Reset,
}

pub(super) struct Network {
    model: NetworkModel,
    pub(super) down: bool,
    stalled_since: [Option<u64>; 2],
    busy_until_ns: [u64; 2],
    pipes: Vec<Pipe>,
    pub(super) dials: Vec<Dial>,
    pub(super) listening: bool,
    /// The next page data on the wire loses a bit.
    pub(super) flip_next: bool,
    rng: Rng,
}

fn ns(duration: Duration) -> u64 {
    duration.as_nanos() as u64
}

impl Network {
    pub(super) fn new(model: NetworkModel, rng: Rng) -> Self {
        Self {
            model,
            down: false,
            stalled_since: [None; 2],
            busy_until_ns: [0; 2],
            pipes: Vec::new(),
            dials: Vec::new(),
            listening: true,
            flip_next: false,
            rng,
        }
    }

    fn open(&mut self, from: Side) -> PipeId {
        self.pipes.push(Pipe {
            from,
            parcels: VecDeque::new(),
            queued_bytes: 0,
            last_arrival_ns: 0,
            writer_closed_ns: NEVER,
            reader_closed_ns: NEVER,
            reset_ns: NEVER,
        });
        self.pipes.len() - 1
    }

    /// Whether something that arrives at `arrives_ns` is held back by a stall.
    fn held_back(&self, from: Side, arrives_ns: u64) -> bool {
        self.stalled_since[from.index()].is_some_and(|since| arrives_ns >= since)
    }

    fn latency_ns(&mut self) -> u64 {
        let latency = ns(self.model.latency);
        latency + self.rng.below(latency / 2 + 1)
    }

    /// Dials the target; `None` if the network or the host refuses at once.
    pub(super) fn dial(&mut self, now: u64, purpose: Purpose) -> Option<DialId> {
        if self.down || !self.listening {
            return None;
        }
        let (to_target, to_source) = (self.open(Side::Source), self.open(Side::Target));
        let arrives_ns = now + self.latency_ns();
        self.dials.push(Dial { purpose, arrives_ns, answered_ns: NEVER, to_target, to_source });
        Some(self.dials.len() - 1)
    }

    /// When the next connection that nobody has taken arrives at the target.
    pub(super) fn incoming_at(&self) -> u64 {
        let waiting = self.dials.iter().filter(|dial| dial.answered_ns == NEVER);
        let arrived = waiting.filter(|dial| !self.held_back(Side::Source, dial.arrives_ns));
        arrived.map(|dial| dial.arrives_ns).min().unwrap_or(NEVER)
    }

    /// Takes the next connection and greets it.
    pub(super) fn accept(&mut self, now: u64) -> Option<DialId> {
        let arrived = |dial: &Dial| dial.answered_ns == NEVER && dial.arrives_ns <= now;
        let id = (0..self.dials.len())
            .find(|&id| arrived(&self.dials[id]) && !self.held_back(Side::Source, self.dials[id].arrives_ns))?;
        self.dials[id].answered_ns = now + self.latency_ns();
        Some(id)
    }

    /// When the target's greeting reaches the dialler, or the reset does.
    pub(super) fn answered_at(&self, dial: DialId) -> u64 {
        let dial = &self.dials[dial];
        let greeted = if self.held_back(Side::Target, dial.answered_ns) { NEVER } else { dial.answered_ns };
        greeted.min(self.pipes[dial.to_source].reset_ns).min(self.pipes[dial.to_source].writer_closed_ns)
    }

    /// Whether a dialled connection stands.
    pub(super) fn greeted(&self, dial: DialId, now: u64) -> bool {
        let pipe = &self.pipes[self.dials[dial].to_source];
        self.answered_at(dial) <= now && pipe.reset_ns == NEVER && self.dials[dial].answered_ns <= now
    }

    /// Whether the writer has to wait for the reader.
    pub(super) fn is_full(&self, pipe: PipeId) -> bool {
        self.pipes[pipe].queued_bytes >= BUFFER_BYTES && self.write_error_at(pipe) == NEVER
    }

    /// When a waiting writer should look again.
    pub(super) fn room_at(&self, pipe: PipeId, now: u64) -> u64 {
        if self.is_full(pipe) { NEVER } else { now }
    }

    fn write_error_at(&self, pipe: PipeId) -> u64 {
        let pipe = &self.pipes[pipe];
        // The reader's reset takes a round trip to be noticed.
        let gone = pipe.reader_closed_ns.saturating_add(2 * ns(self.model.latency));
        let gone = if self.held_back(pipe.from.other(), gone) { NEVER } else { gone };
        pipe.reset_ns.min(gone)
    }

    /// Sends; `false` when the connection is known to be broken.
    pub(super) fn write(&mut self, now: u64, id: PipeId, bytes: u64, payload: Payload) -> bool {
        if self.write_error_at(id) <= now || self.pipes[id].writer_closed_ns <= now {
            return false;
        }
        let from = self.pipes[id].from;
        // Control messages are small and have a stream of their own: they share the link, not the queue.
        let sent = if matches!(payload, Payload::Message(_)) {
            now + bytes * 1_000_000_000 / self.model.bandwidth.0
        } else {
            let busy = &mut self.busy_until_ns[from.index()];
            *busy = (*busy).max(now) + bytes * 1_000_000_000 / self.model.bandwidth.0;
            *busy
        };
        let latency = self.latency_ns();
        let pipe = &mut self.pipes[id];
        pipe.last_arrival_ns = pipe.last_arrival_ns.max(sent + latency);
        pipe.queued_bytes += bytes;
        pipe.parcels.push_back(Parcel { arrives_ns: pipe.last_arrival_ns, bytes, payload });
        true
    }

    /// When a reader finds something: data, the end, or a reset.
    pub(super) fn readable_at(&self, id: PipeId) -> u64 {
        let pipe = &self.pipes[id];
        let first = match pipe.parcels.front() {
            Some(parcel) => parcel.arrives_ns,
            None => pipe.writer_closed_ns.saturating_add(ns(self.model.latency)).max(pipe.last_arrival_ns),
        };
        let first = if self.held_back(pipe.from, first) { NEVER } else { first };
        first.min(pipe.reset_ns)
    }

    /// Reads.
    pub(super) fn read(&mut self, now: u64, id: PipeId) -> Found {
        if self.readable_at(id) > now {
            return Found::Nothing;
        }
        let held_back =
            self.pipes[id].parcels.front().is_some_and(|p| self.held_back(self.pipes[id].from, p.arrives_ns));
        let pipe = &mut self.pipes[id];
        match pipe.parcels.front() {
            Some(parcel) if parcel.arrives_ns <= now && !held_back => {
                let bytes = parcel.bytes;
                pipe.queued_bytes -= bytes;
                pipe.parcels.pop_front().map_or(Found::Nothing, |parcel| Found::Payload(parcel.payload))
            }
            _ if pipe.reset_ns <= now => Found::Reset,
            _ => Found::Ended,
        }
    }

    /// The writer has closed its end, in order.
    pub(super) fn close_writer(&mut self, now: u64, pipe: PipeId) {
        let closed = &mut self.pipes[pipe].writer_closed_ns;
        *closed = (*closed).min(now);
    }

    /// The reader has closed its end.
    pub(super) fn close_reader(&mut self, now: u64, pipe: PipeId) {
        let closed = &mut self.pipes[pipe].reader_closed_ns;
        *closed = (*closed).min(now);
    }

    /// A manager was killed: the kernel closes what it had.
    pub(super) fn process_ended(&mut self, now: u64, side: Side) {
        for id in 0..self.pipes.len() {
            if self.pipes[id].from == side {
                self.close_writer(now, id);
            } else {
                self.close_reader(now, id);
            }
        }
        if side == Side::Target {
            self.listening = false;
        }
    }

    /// Resets all connections; new ones fail until [`Network::heal`].
    pub(super) fn cut(&mut self, now: u64) {
        self.down = true;
        for pipe in &mut self.pipes {
            pipe.reset_ns = pipe.reset_ns.min(now);
            // What has arrived is read before the reset is seen, or is dropped with it.
            let keep_arrived = self.rng.one_in(2);
            pipe.parcels.retain(|parcel| keep_arrived && parcel.arrives_ns <= now);
        }
        for dial in &mut self.dials {
            dial.answered_ns = dial.answered_ns.min(now);
        }
    }

    /// Nothing that `from` sends arrives any more.
    pub(super) fn stall(&mut self, now: u64, from: Side) {
        self.stalled_since[from.index()].get_or_insert(now);
    }

    /// Cuts and stalls are over; what was held back arrives now.
    pub(super) fn heal(&mut self, now: u64) {
        self.down = false;
        for side in Side::BOTH {
            let Some(since) = self.stalled_since[side.index()].take() else { continue };
            let late = |at: &mut u64| {
                if *at >= since && *at != NEVER {
                    *at = (*at).max(now + 1000);
                }
            };
            for pipe in self.pipes.iter_mut().filter(|pipe| pipe.from == side) {
                pipe.parcels.iter_mut().for_each(|parcel| late(&mut parcel.arrives_ns));
                late(&mut pipe.last_arrival_ns);
            }
            for dial in &mut self.dials {
                late(if side == Side::Source { &mut dial.arrives_ns } else { &mut dial.answered_ns });
            }
        }
    }
}
