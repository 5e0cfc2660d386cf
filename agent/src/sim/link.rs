//! Simulated twins of the link's ports, over [`super::network`].

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::network::{DialId, Found, Payload, PipeId, Purpose};
use super::scheduler::{Scheduler, Wait};
use super::world::World;
use crate::migrate::ControlMessage;
use crate::model::{MigrationId, Packing, PageRun, RegionId};
use crate::port::{
    BulkItem, BulkReceiver, BulkSender, BytesView, ControlChannel, LinkError, SourceLink, TargetLink, Unconnected,
};

/// How long dialling and greeting may take: as over TCP.
const GREETING_LIMIT: Duration = Duration::from_secs(5);
/// How often a waiting page stream asks whether to go on: as over TCP.
const TICK: Duration = Duration::from_millis(250);
/// A system call.
const CALL: Duration = Duration::from_micros(3);
/// Bytes in front of every frame: as over TCP.
const HEADER_BYTES: u64 = 32;

fn broken(doing: &'static str, kind: io::ErrorKind) -> LinkError {
    LinkError::Io { doing, source: kind.into() }
}

fn deadline(world: &World, timeout: Duration) -> u64 {
    world.now_ns + timeout.as_nanos() as u64
}

/// One end of a connection; closes when dropped.
struct End {
    sim: Arc<Scheduler>,
    reads: Option<PipeId>,
    writes: Option<PipeId>,
}

impl Drop for End {
    fn drop(&mut self) {
        let (reads, writes) = (self.reads, self.writes);
        self.sim.with(|world| {
            let now = world.now_ns;
            if let Some(pipe) = reads {
                world.network.close_reader(now, pipe);
            }
            if let Some(pipe) = writes {
                world.network.close_writer(now, pipe);
            }
        });
    }
}

/// A control channel.
struct SimControl {
    end: End,
    reads: PipeId,
    writes: PipeId,
}

impl SimControl {
    fn new(sim: &Arc<Scheduler>, reads: PipeId, writes: PipeId) -> Self {
        Self { end: End { sim: Arc::clone(sim), reads: Some(reads), writes: Some(writes) }, reads, writes }
    }
}

impl ControlChannel<ControlMessage> for SimControl {
    fn send(&self, message: &ControlMessage) -> Result<(), LinkError> {
        let bytes = postcard::to_stdvec(message).map_err(|error| LinkError::Protocol(error.to_string()))?.len() as u64;
        let payload = Payload::Message(Box::new(message.clone()));
        let sent = self.end.sim.operation(message.name(), CALL, |world| {
            let now = world.now_ns;
            world.network.write(now, self.writes, bytes + 20, payload)
        });
        if sent { Ok(()) } else { Err(broken("sending a message", io::ErrorKind::BrokenPipe)) }
    }

    fn recv(&self, timeout: Duration) -> Result<Option<ControlMessage>, LinkError> {
        let sim = &self.end.sim;
        let deadline_ns = sim.with(|world| deadline(world, timeout));
        let wait = Wait::Readable { pipe: self.reads, deadline_ns };
        let found =
            sim.wait_for("recv", &wait, deadline_ns, |world| match world.network.read(world.now_ns, self.reads) {
                Found::Nothing => None,
                found => Some(found),
            });
        match found {
            None | Some(Found::Nothing) => Ok(None),
            Some(Found::Payload(Payload::Message(message))) => Ok(Some(*message)),
            Some(Found::Payload(_)) => Err(LinkError::Protocol("page data on the control stream".to_owned())),
            Some(Found::Ended) => Err(broken("receiving a message", io::ErrorKind::UnexpectedEof)),
            Some(Found::Reset) => Err(broken("receiving a message", io::ErrorKind::ConnectionReset)),
        }
    }
}

fn dial(sim: &Arc<Scheduler>, purpose: Purpose) -> Result<DialId, LinkError> {
    let refused = || broken("dialling", io::ErrorKind::ConnectionRefused);
    let dialled = sim.operation("dial", CALL, |world| {
        let now = world.now_ns;
        world.network.dial(now, purpose).ok_or_else(|| world.rng.one_in(2))
    });
    let id = match dialled {
        Ok(id) => id,
        // Nobody answers at all, or an error comes back at once.
        Err(silent) => {
            sim.operation("dial", if silent { GREETING_LIMIT } else { CALL }, |_| ());
            return Err(refused());
        }
    };
    let deadline_ns = sim.with(|world| deadline(world, GREETING_LIMIT));
    let wait = Wait::Answer { dial: id, deadline_ns };
    let answered = sim.wait_for("greet", &wait, deadline_ns, |world| {
        (world.network.answered_at(id) <= world.now_ns).then(|| world.network.greeted(id, world.now_ns))
    });
    if answered == Some(true) {
        return Ok(id);
    }
    sim.with(|world| {
        let (now, to_target, to_source) =
            (world.now_ns, world.network.dials[id].to_target, world.network.dials[id].to_source);
        world.network.close_writer(now, to_target);
        world.network.close_reader(now, to_source);
    });
    Err(broken("greeting", io::ErrorKind::TimedOut))
}

/// The source's link.
pub(super) struct SimSourceLink {
    sim: Arc<Scheduler>,
    stall: Duration,
    control: Arc<SimControl>,
}

impl SimSourceLink {
    pub(super) fn dial(sim: &Arc<Scheduler>, stall: Duration) -> Result<Self, LinkError> {
        let control = Self::dial_control(sim)?;
        Ok(Self { sim: Arc::clone(sim), stall, control })
    }

    fn dial_control(sim: &Arc<Scheduler>) -> Result<Arc<SimControl>, LinkError> {
        let id = dial(sim, Purpose::Control)?;
        let (to_target, to_source) =
            sim.with(|world| (world.network.dials[id].to_target, world.network.dials[id].to_source));
        Ok(Arc::new(SimControl::new(sim, to_source, to_target)))
    }
}

impl SourceLink<ControlMessage> for SimSourceLink {
    fn control(&self) -> Arc<dyn ControlChannel<ControlMessage>> {
        Arc::clone(&self.control) as Arc<dyn ControlChannel<ControlMessage>>
    }

    fn open_bulk(&mut self, _migration: MigrationId, index: u16) -> Result<Box<dyn BulkSender>, LinkError> {
        let id = dial(&self.sim, Purpose::Bulk(index))?;
        let (pipe, back) =
            self.sim.with(|world| (world.network.dials[id].to_target, world.network.dials[id].to_source));
        let end = End { sim: Arc::clone(&self.sim), reads: Some(back), writes: Some(pipe) };
        Ok(Box::new(SimBulkSender { end, pipe, stall: self.stall }))
    }

    fn redial(&mut self) -> Result<(), LinkError> {
        let (reads, writes) = (self.control.reads, self.control.writes);
        self.sim.with(|world| {
            let now = world.now_ns;
            world.network.close_reader(now, reads);
            world.network.close_writer(now, writes);
        });
        self.control = Self::dial_control(&self.sim)?;
        Ok(())
    }
}

/// The target's link.
pub(super) struct SimTargetLink {
    sim: Arc<Scheduler>,
    stall: Duration,
    control: Option<Arc<SimControl>>,
}

impl SimTargetLink {
    /// Waits for the first control connection.
    pub(super) fn accept(sim: &Arc<Scheduler>, stall: Duration, timeout: Duration) -> Option<Self> {
        let control = accept_control(sim, timeout)?;
        Some(Self { sim: Arc::clone(sim), stall, control: Some(control) })
    }

    /// Of a manager that takes another's place: nobody has dialled yet.
    pub(super) fn unconnected(sim: &Arc<Scheduler>, stall: Duration) -> Self {
        Self { sim: Arc::clone(sim), stall, control: None }
    }
}

/// Takes the next connection.
fn accept(sim: &Arc<Scheduler>, deadline_ns: u64) -> Option<(Purpose, PipeId, PipeId)> {
    sim.wait_for("accept", &Wait::Incoming { deadline_ns }, deadline_ns, |world| {
        let now = world.now_ns;
        let id = world.network.accept(now)?;
        let dial = &world.network.dials[id];
        Some((dial.purpose, dial.to_target, dial.to_source))
    })
}

fn accept_control(sim: &Arc<Scheduler>, timeout: Duration) -> Option<Arc<SimControl>> {
    let deadline_ns = sim.with(|world| deadline(world, timeout));
    let (purpose, to_target, to_source) = accept(sim, deadline_ns)?;
    let control = SimControl::new(sim, to_target, to_source);
    // A connection of another kind is dropped, and so closed.
    (purpose == Purpose::Control).then(|| Arc::new(control))
}

impl TargetLink<ControlMessage> for SimTargetLink {
    fn control(&self) -> Arc<dyn ControlChannel<ControlMessage>> {
        match &self.control {
            Some(control) => Arc::clone(control) as Arc<dyn ControlChannel<ControlMessage>>,
            None => Arc::new(Unconnected),
        }
    }

    fn accept_bulk(
        &mut self,
        _migration: MigrationId,
        streams: u16,
        timeout: Duration,
    ) -> Result<Vec<Box<dyn BulkReceiver>>, LinkError> {
        let deadline_ns = self.sim.with(|world| deadline(world, timeout));
        let mut slots: Vec<Option<Box<dyn BulkReceiver>>> = (0..streams).map(|_| None).collect();
        while slots.iter().any(Option::is_none) {
            let Some((purpose, to_target, to_source)) = accept(&self.sim, deadline_ns) else {
                return Err(LinkError::Stalled { doing: "waiting for page streams", after: timeout });
            };
            let end = End { sim: Arc::clone(&self.sim), reads: Some(to_target), writes: Some(to_source) };
            if let Purpose::Bulk(index) = purpose {
                let receiver = SimBulkReceiver { end, pipe: to_target, have: VecDeque::new(), stall: self.stall };
                slots[usize::from(index)] = Some(Box::new(receiver));
            }
        }
        Ok(slots.into_iter().flatten().collect())
    }

    fn reaccept(&mut self, timeout: Duration) -> bool {
        match accept_control(&self.sim, timeout) {
            Some(control) => {
                self.control = Some(control);
                true
            }
            None => false,
        }
    }
}

struct SimBulkSender {
    end: End,
    pipe: PipeId,
    stall: Duration,
}

impl SimBulkSender {
    fn write(&self, bytes: u64, payload: impl FnOnce(&mut World) -> Payload) -> Result<u64, LinkError> {
        let sim = &self.end.sim;
        let deadline_ns = sim.with(|world| deadline(world, self.stall));
        let wait = Wait::Room { pipe: self.pipe, deadline_ns };
        let room = sim.wait_for("room", &wait, deadline_ns, |world| (!world.network.is_full(self.pipe)).then_some(()));
        if room.is_none() {
            return Err(LinkError::Stalled { doing: "sending pages", after: self.stall });
        }
        let sent = sim.operation("write", CALL, |world| {
            let (now, payload) = (world.now_ns, payload(world));
            world.network.write(now, self.pipe, bytes, payload)
        });
        if sent { Ok(bytes) } else { Err(broken("sending pages", io::ErrorKind::ConnectionReset)) }
    }

    fn header(&self, item: BulkItem) -> Result<u64, LinkError> {
        self.write(HEADER_BYTES, |_| Payload::Item(item))
    }

    /// Sends page data, a bit of which may be flipped on its way.
    fn data(&self, copy: impl FnOnce() -> Vec<u8>, bytes: usize) -> Result<u64, LinkError> {
        self.write(bytes as u64, |world| {
            let mut copy = copy();
            if std::mem::take(&mut world.network.flip_next) {
                let bit = world.rng.below(copy.len() as u64 * 8);
                copy[(bit / 8) as usize] ^= 1 << (bit % 8);
            }
            Payload::Bytes(copy)
        })
    }
}

impl BulkSender for SimBulkSender {
    fn start_round(&mut self, round: u32, digested: bool) -> Result<u64, LinkError> {
        self.header(BulkItem::StartRound { round, digested })
    }

    fn pages(&mut self, region: RegionId, run: PageRun, bytes: BytesView<'_>) -> Result<u64, LinkError> {
        let mut sent = self.header(BulkItem::Pages(region, run))?;
        // Memory is read in two goes, so that the guest may write in between.
        for half in bytes.chunks(bytes.len() / 2) {
            sent += self.data(|| half.iter().map(|byte| byte.load(Ordering::Relaxed)).collect(), half.len())?;
        }
        Ok(sent)
    }

    fn copied(&mut self, region: RegionId, run: PageRun, bytes: &[u8]) -> Result<u64, LinkError> {
        Ok(self.header(BulkItem::Pages(region, run))? + self.data(|| bytes.to_vec(), bytes.len())?)
    }

    fn packed(&mut self, region: RegionId, run: PageRun, packing: Packing, bytes: &[u8]) -> Result<u64, LinkError> {
        let header = self.header(BulkItem::Packed(region, run, packing, bytes.len() as u32))?;
        Ok(header + self.data(|| bytes.to_vec(), bytes.len())?)
    }

    fn zeros(&mut self, region: RegionId, run: PageRun) -> Result<u64, LinkError> {
        self.header(BulkItem::Zeros(region, run))
    }

    fn end_round(&mut self, round: u32) -> Result<u64, LinkError> {
        self.header(BulkItem::EndRound(round))
    }

    fn want(&mut self, region: RegionId, run: PageRun) -> Result<u64, LinkError> {
        self.header(BulkItem::Want(region, run))
    }

    fn flush(&mut self) -> Result<(), LinkError> {
        Ok(())
    }

    fn answers(&mut self) -> Result<Box<dyn BulkReceiver>, LinkError> {
        let pipe = self.end.reads.take().ok_or_else(|| broken("reading requests", io::ErrorKind::Unsupported))?;
        let end = End { sim: Arc::clone(&self.end.sim), reads: Some(pipe), writes: None };
        Ok(Box::new(SimBulkReceiver { end, pipe, have: VecDeque::new(), stall: self.stall }))
    }
}

struct SimBulkReceiver {
    end: End,
    pipe: PipeId,
    have: VecDeque<u8>,
    stall: Duration,
}

impl SimBulkReceiver {
    fn read(&self, keep_waiting: &mut dyn FnMut() -> bool) -> Result<Payload, LinkError> {
        let sim = &self.end.sim;
        loop {
            let deadline_ns = sim.with(|world| deadline(world, TICK));
            let wait = Wait::Readable { pipe: self.pipe, deadline_ns };
            let found =
                sim.wait_for("read", &wait, deadline_ns, |world| match world.network.read(world.now_ns, self.pipe) {
                    Found::Nothing => None,
                    found => Some(found),
                });
            match found {
                Some(Found::Payload(payload)) => return Ok(payload),
                Some(Found::Ended) => return Err(broken("receiving pages", io::ErrorKind::UnexpectedEof)),
                Some(Found::Reset) => return Err(broken("receiving pages", io::ErrorKind::ConnectionReset)),
                Some(Found::Nothing) | None => {}
            }
            if !keep_waiting() {
                return Err(LinkError::Stalled { doing: "receiving pages", after: TICK });
            }
        }
    }
}

impl SimBulkReceiver {
    /// The next byte of page data.
    fn next_byte(&mut self, keep_waiting: &mut dyn FnMut() -> bool) -> Result<u8, LinkError> {
        while self.have.is_empty() {
            match self.read(keep_waiting)? {
                Payload::Bytes(bytes) => self.have.extend(bytes),
                _ => return Err(LinkError::Protocol("a header inside page data".to_owned())),
            }
        }
        Ok(self.have.pop_front().unwrap_or_default())
    }
}

impl BulkReceiver for SimBulkReceiver {
    fn next(&mut self, keep_waiting: &mut dyn FnMut() -> bool) -> Result<BulkItem, LinkError> {
        match self.read(keep_waiting)? {
            Payload::Item(item) => Ok(item),
            _ => Err(LinkError::Protocol("page data without a header".to_owned())),
        }
    }

    fn read_into(&mut self, target: BytesView<'_>, keep_waiting: &mut dyn FnMut() -> bool) -> Result<(), LinkError> {
        for byte in target {
            byte.store(self.next_byte(keep_waiting)?, Ordering::Relaxed);
        }
        Ok(())
    }

    fn read_packed(&mut self, target: &mut [u8], keep_waiting: &mut dyn FnMut() -> bool) -> Result<(), LinkError> {
        for byte in target {
            *byte = self.next_byte(keep_waiting)?;
        }
        Ok(())
    }

    fn back(&mut self) -> Result<Box<dyn BulkSender>, LinkError> {
        let pipe = self.end.writes.take().ok_or_else(|| broken("opening the way back", io::ErrorKind::Unsupported))?;
        let end = End { sim: Arc::clone(&self.end.sim), reads: None, writes: Some(pipe) };
        Ok(Box::new(SimBulkSender { end, pipe, stall: self.stall }))
    }
}
