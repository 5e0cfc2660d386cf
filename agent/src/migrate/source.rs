//! The source's end: offer, reserve, pre-copy, stop, commit, let go.
//!
//! Contract: up to `released` every failure and every cancel leaves the VM running here at full speed, log off, and the
//! target told. From `released` on the VM never runs here again unless the target is known never to have owned it.

mod hot;
mod lending;
mod network;
mod owing;
mod relay;
mod spare;
mod tunnel;

use std::sync::{Arc, Mutex};
use std::time::Duration;

pub use self::network::Heard;
use self::owing::Rest;
use super::adapt::Adaptive;
use super::converge::{Convergence, Verdict};
use super::digest::chunk_hashes;
use super::lap::Lap;
use super::message::{ControlMessage, Handed, Offer, TargetState};
use super::observe::{CancelFlag, Observer};
use super::options::{OnStuck, SourceOptions, Strategy};
use super::order::Order;
use super::pacer::{Pace, Pacer};
use super::reduce::{Reducing, SentPages, Spared};
use super::rounds::{Round, Saved, Tally, longest_run};
use super::steward::{Sent, Steward};
use crate::model::{
    BlackoutLedger, BlackoutPhase, BytesPerSecond, Ending, LoanReport, MachineShape, MigrationId, MigrationReport,
    PAGE_SIZE, PageBitmap, PageCount, PostCopyReport, RelayReport, RoundReport, SqueezeReport, Step,
};
use crate::port::{
    BulkSender, Clock, ControlChannel, Fate, FormerPorts, LinkError, Machine, MachineError, Region, SourceLink,
    SourceTunnel, WireError,
};
use crate::stun::Budget;

/// How many times the stall limit a target may take to set memory and devices aside: much memory takes its time.
const RESERVATION_STALLS: u32 = 6;
/// How long the paused VM waits for its target's `prepared`, hashing apart: restoring takes milliseconds.
const PAUSED_STALL: Duration = Duration::from_secs(3);
/// How many pings measure the link.
const PINGS: u32 = 4;
/// The boot image travels in parts of at most this size; a bandwidth limit makes them smaller, as it does runs of pages.
const IMAGE_PART_BYTES: usize = 256 << 10;
/// A last round that is expected to take no longer has the state saved beside it.
const SHORT_LAST_ROUND: Duration = Duration::from_millis(100);
/// A shorter round says more of latency than of bandwidth.
const ENOUGH_BYTES: u64 = 8 << 20;
/// How often waits look at the cancel flag.
const TICK: Duration = Duration::from_millis(100);
/// How long a target may take to say that it has let go, before it is dialled again.
const LETTING_GO_LIMIT: Duration = Duration::from_secs(2);

/// Why a migration did not go on.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The link or the peer.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The machine here.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The target cannot or will not take the VM.
    #[error("the target refused: {0}")]
    Refused(String),
    /// The target gave up.
    #[error("the target gave up: {0}")]
    PeerCancelled(String),
    /// An operator here asked for it.
    #[error("cancelled")]
    Cancelled,
    /// Pre-copy does not end, and that is reason enough.
    #[error("pre-copy gave up: {0}")]
    Stuck(String),
    /// The VM's addresses cannot be kept there.
    #[error("no tunnel: {0}")]
    Tunnel(#[from] WireError),
    /// The right message at the wrong time.
    #[error("the peer broke the protocol: `{got}` while waiting for {wanted}")]
    Unexpected {
        /// The message's name.
        got: &'static str,
        /// What would have been right.
        wanted: &'static str,
    },
}

/// One migration at its source.
pub struct Source<'a> {
    /// The migration's identity.
    pub id: MigrationId,
    /// What is asked.
    pub options: &'a SourceOptions,
    /// What is offered.
    pub shape: &'a MachineShape,
    /// Guest RAM.
    pub region: &'a dyn Region,
    /// The machine's process.
    pub machine: &'a mut dyn Machine,
    /// The way to the target.
    pub link: &'a mut dyn SourceLink<ControlMessage>,
    /// Time.
    pub clock: &'a dyn Clock,
    /// Who watches.
    pub observer: &'a dyn Observer,
    /// Who may stop it.
    pub cancel: CancelFlag,
    /// How fast it may send; what the options say is where it begins.
    pub pace: Pace,
    /// What the target has told of the network; nothing at first.
    pub heard: Heard,
    /// By what the VM is to keep its addresses in another subnet.
    pub tunnel: Option<&'a mut dyn SourceTunnel>,
}

/// What is known so far; becomes the report.
struct Progress {
    step: Step,
    rounds: Vec<RoundReport>,
    state_bytes: u64,
    image_bytes: u64,
    rtt: Duration,
    goodput: BytesPerSecond,
    /// Bytes of pages for each byte on the wire, at least 1.
    stretch: f64,
    gave_up: String,
    paused_at: Option<Duration>,
    ledger: BlackoutLedger,
    blackout: Duration,
    verified_pages: u64,
    /// Who watches the writers, if they may be slowed.
    steward: Option<Steward>,
    /// When the target said `running`, or that nothing is owed to it any more.
    ended_at: Option<Duration>,
    /// What was owed.
    post_copy: Option<PostCopyReport>,
    /// What keeping the VM safe meanwhile took.
    loan: Option<LoanReport>,
    /// The VM has run at the target: the blackout is over.
    ran: bool,
    /// What the reducers have spared.
    spared: Spared,
    /// What the guest gave up before the first round.
    squeeze: Option<SqueezeReport>,
    /// Whether the target may have journaled `prepared`.
    handed: bool,
    /// Whether the VM moves before what is due of its memory.
    owing: bool,
    /// Whether the log tells what is due besides what is known to be.
    logs: bool,
    /// The limit, if it follows what is dirtied.
    adaptive: Option<Adaptive>,
    /// The VM's ports here, until the VM runs at the target.
    ports: Option<Box<dyn FormerPorts>>,
    /// What was relayed from them.
    relay: Option<RelayReport>,
}

impl Progress {
    /// Nothing has happened.
    fn new() -> Self {
        Self {
            step: Step::Connected,
            rounds: Vec::new(),
            state_bytes: 0,
            image_bytes: 0,
            rtt: Duration::ZERO,
            goodput: BytesPerSecond(0),
            stretch: 1.0,
            gave_up: String::new(),
            paused_at: None,
            ledger: BlackoutLedger::default(),
            blackout: Duration::ZERO,
            verified_pages: 0,
            steward: None,
            ended_at: None,
            post_copy: None,
            loan: None,
            ran: false,
            spared: Spared::default(),
            squeeze: None,
            handed: false,
            owing: false,
            logs: false,
            adaptive: None,
            ports: None,
            relay: None,
        }
    }

    fn book(&mut self, tally: &Tally, duration: Duration, paused: bool, limit: Option<BytesPerSecond>) {
        if self.goodput == BytesPerSecond(0) || tally.wire_bytes >= ENOUGH_BYTES {
            // What is left to send is counted in whole pages, so this is, too: packed, more of them go than the wire carries.
            let content = PageCount(tally.pages - tally.zero_pages).bytes().max(tally.wire_bytes);
            self.goodput = BytesPerSecond::over(content, duration);
            self.stretch = content as f64 / tally.wire_bytes.max(1) as f64;
        }
        self.rounds.push(RoundReport {
            round: self.rounds.len() as u32 + 1,
            paused,
            pages: tally.pages,
            zero_pages: tally.zero_pages,
            wire_bytes: tally.wire_bytes,
            duration_ns: duration.as_nanos() as u64,
            dirtied_pages: 0,
            limit_bytes_per_second: limit.map(|limit| limit.0),
        });
    }
}

/// What carries the memory of one migration, and what of it is due.
struct Way<'w> {
    control: Arc<dyn ControlChannel<ControlMessage>>,
    streams: Vec<Box<dyn BulkSender>>,
    /// One for each stream.
    reducing: Vec<Reducing>,
    pacer: Pacer<'w>,
    due: PageBitmap,
    /// What was due, too, but for the guest's word that it does not use it.
    free: PageBitmap,
    /// What the target has as zeros by such a word, given in any round, and nothing has been written to since.
    left_out: PageBitmap,
    /// What was due in the round before, if that was written during the one before it.
    due_before: Option<PageBitmap>,
}

impl Source<'_> {
    /// Runs the migration to its end, whatever that is.
    pub fn run(mut self) -> MigrationReport {
        let started = self.clock.now();
        let (least, most) = (self.options.bandwidth, self.options.bandwidth_max);
        let mut progress = Progress {
            steward: self.steward(),
            owing: self.options.strategy.runs_owing(),
            adaptive: least.zip(most).map(|(least, most)| Adaptive::new(least, most)),
            ..Progress::new()
        };
        self.pass(&mut progress, Step::Connected, &self.options.peer);
        let (ending, reason) = match self.until_rounds_end(&mut progress) {
            Ok(way) if progress.owing => self.move_owing(&mut progress, way),
            Ok(way) => match self.stop_and_copy(&mut progress, way) {
                Ok(target_ledger) => self.hand_over(&mut progress, target_ledger, Rest::None),
                Err(error) => self.roll_back(&mut progress, &error),
            },
            Err(error) => self.roll_back(&mut progress, &error),
        };
        self.await_last_word(ending);
        self.report(progress, started, ending, reason)
    }

    /// What it came to.
    fn report(&self, mut progress: Progress, started: Duration, ending: Ending, reason: String) -> MigrationReport {
        let reason = if reason.is_empty() { std::mem::take(&mut progress.gave_up) } else { reason };
        let total = progress.ended_at.unwrap_or_else(|| self.clock.now()).saturating_sub(started);
        MigrationReport {
            migration_id: self.id,
            vm_id: self.shape.vm_id,
            vm_name: self.shape.name.clone(),
            strategy: self.options.strategy.to_string(),
            ending,
            owner: ending.owner(),
            stage: progress.step.stage(),
            reason,
            memory_bytes: self.shape.memory_bytes,
            streams: u32::from(self.streams()),
            wire_bytes: progress.rounds.iter().map(|round| round.wire_bytes).sum::<u64>()
                + progress.post_copy.as_ref().map_or(0, |owed| owed.wire_bytes)
                + progress.state_bytes
                + progress.image_bytes,
            reducers: progress.spared.report(&self.options.reducers),
            squeeze: progress.squeeze,
            rounds: progress.rounds,
            state_bytes: progress.state_bytes,
            image_bytes: progress.image_bytes,
            total_ns: total.as_nanos() as u64,
            downtime_target_ns: self.options.downtime.as_nanos() as u64,
            blackout_ns: progress.blackout.as_nanos() as u64,
            blackout: progress.ledger,
            rtt_ns: progress.rtt.as_nanos() as u64,
            verified_pages: progress.verified_pages,
            post_copy: progress.post_copy,
            loan: progress.loan,
            network: self.network_report(),
            relay: progress.relay,
            tunnel: None,
            stun: progress.steward.map(|steward| steward.report()),
            link: None,
            chosen: None,
            prediction: None,
        }
    }

    /// Page streams: one is for requests where there may be any.
    fn streams(&self) -> u16 {
        if self.options.may_run_owing() { self.options.streams.max(2) } else { self.options.streams }
    }

    fn steward(&self) -> Option<Steward> {
        if self.options.on_stuck != OnStuck::Stun || self.options.strategy != Strategy::PreCopy {
            return None;
        }
        // The round trip is not known yet, and small beside the rest.
        let memory_time = self.options.downtime.saturating_sub(self.options.fixed_cost);
        let budget = Budget { stretch: self.options.stun_stretch, memory_time };
        Some(Steward::new(budget, self.options.stun.clone(), self.pace.clone()))
    }

    fn pass(&self, progress: &mut Progress, step: Step, detail: &str) {
        progress.step = step;
        tracing::info!(vm = %self.shape.name, migration = %self.id, %step, detail, "source");
        self.observer.step(step, detail);
    }

    /// Stages 0 to 2: what is left is due. Everything in here can be undone.
    fn until_rounds_end<'w>(&mut self, progress: &mut Progress) -> Result<Way<'w>, SourceError>
    where
        Self: 'w,
    {
        let control = self.link.control();
        let streams = self.reserve(progress, control.as_ref())?;
        self.lay_tunnel(control.as_ref())?;
        let pacer = Pacer::new(self.clock, self.pace.clone());
        let reducers = &self.options.reducers;
        // More than the VM has is not needed.
        let room = reducers.delta_bytes.min(self.region.spec().pages.bytes());
        let sent_pages = (room > 0).then(|| Arc::new(SentPages::new(room)));
        let reducing = streams.iter().map(|_| Reducing::new(reducers, streams.len(), sent_pages.clone())).collect();
        let pages = self.region.spec().pages;
        let due = PageBitmap::full(pages);
        let (free, left_out) = (PageBitmap::new(pages), PageBitmap::new(pages));
        let mut way = Way { control, streams, reducing, pacer, due, free, left_out, due_before: None };
        self.send_boot_image(progress, &way)?;
        progress.ports = self.former_ports();
        self.squeeze_guest(progress, &way)?;
        match self.options.strategy {
            Strategy::PreCopy => {
                self.start_log(progress)?;
                self.iterate(progress, &mut way)?;
            }
            Strategy::Hybrid => {
                self.start_log(progress)?;
                for _ in 0..self.options.hybrid_rounds {
                    let (left, took) = self.one_round(progress, &mut way)?;
                    self.follow_dirtying(progress, left, took);
                }
            }
            Strategy::StopAndCopy | Strategy::DemandPaging | Strategy::PostCopy => {}
        }
        Ok(way)
    }

    fn start_log(&mut self, progress: &mut Progress) -> Result<(), SourceError> {
        self.machine.start_log()?;
        progress.logs = true;
        Ok(())
    }

    fn open_streams(&mut self, count: u16) -> Result<Vec<Box<dyn BulkSender>>, LinkError> {
        (0..count).map(|index| self.link.open_bulk(self.id, index)).collect()
    }

    fn reserve(
        &mut self,
        progress: &mut Progress,
        control: &dyn ControlChannel<ControlMessage>,
    ) -> Result<Vec<Box<dyn BulkSender>>, SourceError> {
        let offer = Offer {
            migration_id: self.id,
            shape: self.shape.clone(),
            regions: vec![self.region.spec().clone()],
            streams: self.streams(),
            verify: self.options.verify,
        };
        control.send(&ControlMessage::Offer(Box::new(offer)))?;
        self.pass(progress, Step::Offered, "");
        let accept = match self.expect(control, self.options.stall * RESERVATION_STALLS, "the target's reservation")? {
            ControlMessage::Accept(accept) => accept,
            other => return Err(unexpected(&other, "accept")),
        };
        let streams = self.open_streams(self.streams())?;
        // It has read this, too, when it answers.
        self.tell_place(control)?;
        let packings = self.options.reducers.packings();
        if !packings.is_empty() {
            // It has read this, or refused, when it answers the first ping.
            let names = packings.iter().map(|packing| packing.name().to_owned()).collect();
            control.send(&ControlMessage::Reducing(names))?;
        }
        let mut rtt = Duration::MAX;
        for number in 0..PINGS {
            rtt = rtt.min(self.ping(control, number, self.options.stall)?);
        }
        progress.rtt = rtt;
        let reservation = Duration::from_nanos(accept.reservation_ns);
        self.pass(progress, Step::Reserved, &format!("reservation took {reservation:?}"));
        Ok(streams)
    }

    /// Waits until the target has dealt with all that was sent so far; returns how long that took.
    fn ping(
        &mut self,
        control: &dyn ControlChannel<ControlMessage>,
        number: u32,
        patience: Duration,
    ) -> Result<Duration, SourceError> {
        let sent = self.clock.now();
        control.send(&ControlMessage::Ping(number))?;
        match self.expect(control, patience, "pong")? {
            ControlMessage::Pong(echo) if echo == number => Ok(self.clock.now().saturating_sub(sent)),
            other => Err(unexpected(&other, "pong")),
        }
    }

    /// Sends what the guest boots from when it resets; it is not among the VM's memory. Returns when the target has put it
    /// away: a large one would else be in the way of the state, while the VM stands.
    fn send_boot_image(&mut self, progress: &mut Progress, way: &Way<'_>) -> Result<(), SourceError> {
        let Some(image) = self.machine.boot_image()? else {
            tracing::warn!(vm = %self.shape.name, migration = %self.id, "no boot image: a reset will end the VM there");
            return Ok(());
        };
        let part_bytes =
            (longest_run(self.pace.limit(), self.options.streams) as usize * PAGE_SIZE).min(IMAGE_PART_BYTES);
        let mut parts = image.chunks(part_bytes).peekable();
        while let Some(part) = parts.next() {
            if self.cancel.is_set() {
                return Err(SourceError::Cancelled);
            }
            way.pacer.pay(part.len() as u64);
            let message = ControlMessage::BootImage { part: part.to_vec(), last: parts.peek().is_none() };
            way.control.send(&message).map_err(|error| peers_reason(way.control.as_ref(), error.into()))?;
            progress.image_bytes += part.len() as u64;
        }
        // All that the sockets still hold comes before the pong; the VM runs meanwhile.
        self.ping(way.control.as_ref(), PINGS, self.options.stall * RESERVATION_STALLS)?;
        Ok(())
    }

    /// Rounds until what is left fits the downtime target, or no longer shrinks.
    fn iterate(&mut self, progress: &mut Progress, way: &mut Way<'_>) -> Result<(), SourceError> {
        let mut convergence = Convergence::new(self.options.downtime, self.options.fixed_cost, self.options.max_rounds);
        loop {
            let (left, took) = self.one_round(progress, way)?;
            let followed = self.follow_dirtying(progress, left, took);
            let stretched = |bytes: BytesPerSecond| BytesPerSecond((bytes.0 as f64 * progress.stretch) as u64);
            let goodput = match followed {
                Some(last) => stretched(last),
                // The round may have been faster than what is allowed by now.
                None => self.pace.limit().map_or(progress.goodput, |limit| stretched(limit).min(progress.goodput)),
            };
            match convergence.judge(left, took, goodput, progress.rtt) {
                Verdict::Another => {}
                Verdict::Converged => return Ok(()),
                Verdict::GaveUp(_) if progress.steward.as_mut().is_some_and(Steward::press) => {
                    convergence = Convergence::new(
                        self.options.downtime,
                        self.options.fixed_cost,
                        self.options.max_rounds.saturating_sub(progress.rounds.len() as u32).max(1),
                    );
                }
                Verdict::GaveUp(why) if self.options.on_stuck == OnStuck::Cancel => {
                    return Err(SourceError::Stuck(why));
                }
                Verdict::GaveUp(why) => {
                    progress.owing = self.options.on_stuck == OnStuck::PostCopy;
                    let then = if progress.owing { "; what is left follows the VM by post-copy" } else { "" };
                    progress.gave_up = format!("pre-copy gave up: {why}{then}");
                    tracing::warn!(vm = %self.shape.name, migration = %self.id, "{}", progress.gave_up);
                    return Ok(());
                }
            }
        }
    }

    /// A limit that follows what the VM dirties does, behind a round that has left so much. What the last pages may be expected to go at; none if there is no such limit.
    fn follow_dirtying(&self, progress: &mut Progress, left: PageCount, took: Duration) -> Option<BytesPerSecond> {
        let carried = progress.rounds.last().filter(|round| round.wire_bytes >= ENOUGH_BYTES);
        let carried = carried.map(|round| BytesPerSecond::over(round.wire_bytes, took));
        progress.adaptive.as_mut().map(|adaptive| adaptive.follow(left, took, carried, &self.pace))
    }

    /// Sends what is due, and finds out what is due then: how many pages, and how long the round took.
    fn one_round(&mut self, progress: &mut Progress, way: &mut Way<'_>) -> Result<(PageCount, Duration), SourceError> {
        self.leave_out_free(progress, way)?;
        self.round_of_due(progress, way)
    }

    /// The same, with nothing left out.
    fn round_of_due(
        &mut self,
        progress: &mut Progress,
        way: &mut Way<'_>,
    ) -> Result<(PageCount, Duration), SourceError> {
        self.pass(progress, Step::Round, &format!("{} pages due", way.due.count().0));
        let skips_hot = self.options.reducers.skip_hot;
        let hot = way.due_before.take().map(|before| way.due.both(&before));
        self.send_round(progress, way, hot.as_ref())?;
        // In the first round all was due, written or not.
        way.due_before = (skips_hot && progress.rounds.len() > 1).then(|| way.due.clone());
        way.due.clear();
        let left = self.machine.harvest(&mut way.due)?;
        if let Some(hot) = hot {
            progress.spared.skip_hot(hot.count(), hot.both(&way.due).count());
        }
        let mut took = Duration::ZERO;
        if let Some(round) = progress.rounds.last_mut() {
            round.dirtied_pages = left.0;
            took = Duration::from_nanos(round.duration_ns);
            self.observer.round(round);
        }
        Ok((left, took))
    }

    /// A round of the pages in `due`, while the VM runs.
    fn round<'r>(
        &self,
        number: usize,
        pacer: &'r Pacer<'r>,
        (due, free, order): (&'r PageBitmap, &'r PageBitmap, &'r Order),
        cancel: &'r CancelFlag,
        sent: &'r Sent,
    ) -> Round<'r>
    where
        Self: 'r,
    {
        Round {
            number: number as u32,
            last: false,
            region: self.region,
            due,
            free,
            order,
            marks_zeros: self.options.reducers.zero_pages,
            pacer,
            clock: self.clock,
            observer: self.observer,
            cancel,
            streams: self.options.streams,
            sent,
        }
    }

    /// Sends one round while the VM runs, and waits for the target's word that it arrived.
    fn send_round(
        &mut self,
        progress: &mut Progress,
        way: &mut Way<'_>,
        hot: Option<&PageBitmap>,
    ) -> Result<(), SourceError> {
        let started = self.clock.now();
        let cancel = self.cancel.clone();
        let so_far = Sent::default();
        let order = hot.map_or_else(|| Order::plain(way.due.len()), |hot| Order::hot_last(&way.due, hot));
        let what = (&way.due, &way.free, &order);
        let round = self.round(progress.rounds.len() + 1, &way.pacer, what, &cancel, &so_far);
        let lanes = (&mut way.streams[..], &mut way.reducing[..]);
        let number = round.number;
        let (clock, due) = (self.clock, way.due.count());
        let machine: Mutex<&mut dyn Machine> = Mutex::new(&mut *self.machine);
        let sent = match &mut progress.steward {
            None => round.send(&machine, lanes),
            Some(steward) => {
                steward.begin_round(&machine, due, clock.now())?;
                // A machine that is gone is noticed by the streams.
                let mut look = || drop(steward.look(&machine, &so_far, clock.now()));
                round.send_watched(&machine, lanes, &mut look)
            }
        };
        let tally = sent.map_err(|error| peers_reason(way.control.as_ref(), error))?;
        match self.expect(way.control.as_ref(), self.options.stall, "the end of a round")? {
            ControlMessage::RoundReceived(received) if received == number => {}
            other => return Err(unexpected(&other, "round-received")),
        }
        progress.book(&tally, self.clock.now().saturating_sub(started), false, self.pace.limit());
        progress.spared.count(&tally, &way.reducing);
        Ok(())
    }

    /// Sends what is left of the paused VM, and saves its state beside that, or behind it if it is much.
    fn send_last(&mut self, progress: &mut Progress, way: &mut Way<'_>) -> Result<(Tally, Saved), SourceError> {
        let started = self.clock.now();
        // The last round is never cancelled half-way: it is short, and undone as a whole if need be.
        let cancel = CancelFlag::default();
        let so_far = Sent::default();
        let order = Order::plain(way.due.len());
        // A VM that stands cannot be asked.
        way.leave_out_none();
        let what = (&way.due, &way.free, &order);
        let round = self.round(progress.rounds.len() + 1, &way.pacer, what, &cancel, &so_far);
        let round = Round { last: true, ..round };
        let lanes = (&mut way.streams[..], &mut way.reducing[..]);
        // The clock and the counters are saved first: only a short round may lie between them and the state's restoring.
        let short = progress.goodput != BytesPerSecond(0)
            && progress.goodput.time_for(way.due.count().bytes()) <= SHORT_LAST_ROUND;
        let machine: Mutex<&mut dyn Machine> = Mutex::new(&mut *self.machine);
        let sent = if short {
            round.send_and_save(&machine, lanes)
        } else {
            round.send(&machine, lanes).and_then(|tally| Ok((tally, round.save(&machine)?)))
        };
        let (tally, saved) = sent.map_err(|error| peers_reason(way.control.as_ref(), error))?;
        progress.book(&tally, tally.sent_at.saturating_sub(started), true, self.pace.limit());
        progress.spared.count(&tally, &way.reducing);
        Ok((tally, saved))
    }

    /// Pauses the VM, and finds what is due then. Behind it the state's phase has begun.
    fn pause<'l>(&mut self, progress: &mut Progress, way: &mut Way<'_>) -> Result<Lap<'l>, SourceError>
    where
        Self: 'l,
    {
        if self.cancel.is_set() {
            return Err(SourceError::Cancelled);
        }
        self.await_inquiry(way.control.as_ref())?;
        if let Some(adaptive) = &mut progress.adaptive {
            adaptive.open(&self.pace);
        }
        let told = way.control.send(&ControlMessage::Pausing);
        told.map_err(|error| peers_reason(way.control.as_ref(), error.into()))?;
        let paused_at = self.clock.now();
        progress.paused_at = Some(paused_at);
        self.machine.pause()?;
        if let Some(ports) = &mut progress.ports {
            ports.keep();
        }
        let mut lap = Lap::since(self.clock, paused_at);
        progress.ledger.add(BlackoutPhase::Pause, lap.next());
        self.pass(progress, Step::Paused, "");
        if progress.logs {
            self.machine.harvest(&mut way.due)?;
        }
        progress.ledger.add(BlackoutPhase::LastHarvest, lap.next());
        Ok(lap)
    }

    /// Stage 3, up to the target's `prepared`. All of it can be undone.
    fn stop_and_copy(&mut self, progress: &mut Progress, mut way: Way<'_>) -> Result<BlackoutLedger, SourceError> {
        let mut lap = self.pause(progress, &mut way)?;
        let (tally, saved) = self.send_last(progress, &mut way)?;
        let both = lap.next();
        let longer = saved.at.saturating_sub(tally.sent_at).min(both);
        progress.ledger.add(BlackoutPhase::LastPages, both - longer);
        progress.ledger.add(BlackoutPhase::SaveState, longer);
        progress.state_bytes = saved.state.len() as u64;
        let round = progress.rounds.len() as u32;
        let chunk_hashes = if self.options.verify { chunk_hashes(self.region, &way.left_out) } else { Vec::new() };
        progress.handed = true;
        let handed = Handed { state: saved.state, round, digest: tally.digest, chunk_hashes };
        way.control.send(&ControlMessage::Handed(Box::new(handed)))?;
        self.pass(progress, Step::StateMoved, &format!("{} pages in the last round", tally.pages));
        let patience = self.options.stall.min(PAUSED_STALL) + self.hashing_time();
        let ledger = self.await_prepared(progress, way.control.as_ref(), round, patience)?;
        if self.options.verify {
            progress.verified_pages = self.region.spec().pages.0;
        }
        Ok(ledger)
    }

    fn await_prepared(
        &mut self,
        progress: &mut Progress,
        control: &dyn ControlChannel<ControlMessage>,
        round: u32,
        patience: Duration,
    ) -> Result<BlackoutLedger, SourceError> {
        let ledger = loop {
            match self.expect(control, patience, "the target's `prepared`")? {
                ControlMessage::RoundReceived(received) if received == round => {}
                ControlMessage::Prepared(ledger) => break ledger,
                other => return Err(unexpected(&other, "prepared")),
            }
        };
        self.pass(progress, Step::Prepared, "");
        Ok(ledger)
    }

    /// How long hashing all memory may take the target, at a slow 256 MiB/s.
    fn hashing_time(&self) -> Duration {
        if self.options.verify { BytesPerSecond(256 << 20).time_for(self.shape.memory_bytes) } else { Duration::ZERO }
    }

    /// Stages 4 and 5. Only the journaling of `released` can still be refused.
    fn hand_over(&mut self, progress: &mut Progress, mut target: BlackoutLedger, rest: Rest<'_>) -> (Ending, String) {
        if self.cancel.is_set() && !progress.ran {
            return self.roll_back(progress, &SourceError::Cancelled);
        }
        let asked = self.clock.now();
        if let Err(error) = self.machine.release(self.id, &self.options.peer) {
            if progress.ran {
                let advice = format!(
                    "the target has all of the VM, but `released` could not be journaled here: {error}. The VM stands at both hosts when the loan has ended: make room, then                      `dunlin migrate {} --recover`",
                    self.shape.name
                );
                return (Ending::InDoubt, advice);
            }
            return self.roll_back(progress, &error.into());
        }
        if !progress.ran {
            progress.ledger.add(BlackoutPhase::JournalReleased, self.clock.now().saturating_sub(asked));
        }
        self.pass(progress, Step::Released, "");
        let mut lost = self.commit(progress, &ControlMessage::Commit).err().map(SourceError::from);
        let deadline = self.clock.now() + self.options.stall;
        while lost.is_none() {
            match self.expect_quietly(deadline) {
                Ok(ControlMessage::Running(activation)) => {
                    target.phases.extend(activation.phases);
                    return self.moved(progress, &target, rest);
                }
                Ok(ControlMessage::State(TargetState::NeverOwner)) => return self.take_back(progress),
                // It was lent to the target until now.
                Ok(ControlMessage::Renew(_) | ControlMessage::Increment(_) | ControlMessage::Pong(_)) => {}
                Ok(other) => lost = Some(unexpected(&other, "running")),
                Err(error) => lost = Some(error),
            }
        }
        let why = lost.map(|error| error.to_string()).unwrap_or_default();
        self.settle(progress, &target, &why, rest)
    }

    /// Has the target run the VM, and tells it before what will follow.
    fn commit(&self, progress: &Progress, order: &ControlMessage) -> Result<(), LinkError> {
        let control = self.link.control();
        if progress.ports.is_some() {
            control.send(&ControlMessage::Relaying)?;
        }
        control.send(order)
    }

    /// Contact was lost after `released`: dial again and ask, for a bounded time.
    fn settle(
        &mut self,
        progress: &mut Progress,
        target: &BlackoutLedger,
        why: &str,
        rest: Rest<'_>,
    ) -> (Ending, String) {
        tracing::warn!(vm = %self.shape.name, migration = %self.id, "in doubt after `released`: {why}");
        let until = self.clock.now() + self.options.doubt;
        while self.clock.now() < until {
            match self.ask_target() {
                Ok(TargetState::Owner) => {
                    let (ending, reason) = self.moved(progress, target, rest);
                    let found =
                        format!("contact was lost after `released` ({why}); the target says that it has the VM");
                    return (ending, if reason.is_empty() { found } else { format!("{found}; {reason}") });
                }
                Ok(TargetState::NeverOwner) => return self.take_back(progress),
                // Committed again on the new channel, answer pending: ask again.
                Ok(TargetState::Prepared) => {}
                Err(error) => tracing::debug!(migration = %self.id, "target not reached: {error}"),
            }
            self.clock.sleep(TICK);
        }
        let advice = format!(
            "in doubt: contact was lost after `released` ({why}). The VM runs nowhere until this is settled: look at the \
             target, then run `dunlin resolve {name} --owner there` here if it has the VM, or `--owner here` if it \
             never will",
            name = self.shape.name
        );
        (Ending::InDoubt, advice)
    }

    /// Dials the target and asks what it knows; commits again if it waits for that.
    fn ask_target(&mut self) -> Result<TargetState, SourceError> {
        self.link.redial()?;
        let control = self.link.control();
        control.send(&ControlMessage::Query(self.id))?;
        let deadline = self.clock.now() + self.options.stall;
        let state = match self.expect_quietly(deadline)? {
            ControlMessage::State(state) => state,
            other => return Err(unexpected(&other, "state")),
        };
        if state != TargetState::Prepared {
            return Ok(state);
        }
        control.send(&ControlMessage::Commit)?;
        match self.expect_quietly(deadline)? {
            ControlMessage::Running(_) => Ok(TargetState::Owner),
            ControlMessage::State(state) => Ok(state),
            other => Err(unexpected(&other, "running")),
        }
    }

    /// The VM runs at the target: the blackout has ended, if it has not before.
    fn note_running(&mut self, progress: &mut Progress, target: &BlackoutLedger) {
        if !progress.ran {
            let now = self.clock.now();
            (progress.ran, progress.ended_at) = (true, Some(now));
            progress.blackout = now.saturating_sub(progress.paused_at.unwrap_or(now));
            progress.ledger.close(target, progress.blackout.as_nanos() as u64);
        }
    }

    fn moved(&mut self, progress: &mut Progress, target: &BlackoutLedger, rest: Rest<'_>) -> (Ending, String) {
        if let Rest::Pushed(push) = rest
            && !progress.ran
        {
            push.guest_runs();
        }
        self.note_running(progress, target);
        self.pass(progress, Step::Running, "");
        self.beside_relay(progress, |source, progress| source.let_go(progress, rest))
    }

    /// The VM runs at the target: sends it what it is owed, and lets go of what is here.
    fn let_go(&mut self, progress: &mut Progress, rest: Rest<'_>) -> (Ending, String) {
        if let Err(error) = self.send_the_rest(progress, rest) {
            if let SourceError::PeerCancelled(reason) = &error {
                let advice = format!(
                    "the VM died at the target while pages of it were still here: {reason}. What stands here is the VM as it was before it moved, and does not run: \
                     `dunlin resolve {name} --owner there` lets go of it",
                    name = self.shape.name
                );
                return (Ending::Lost, advice);
            }
            let advice = format!(
                "the VM runs at the target, and pages that it is owed are still here: {error}. It waits wherever it touches one of them. Nothing is lost: do not end the machine \
                 here; when the target can be reached, `dunlin migrate {name} --recover` goes on (and `dunlin vm receive --recover {name}` there, if its manager is gone)",
                name = self.shape.name
            );
            return (Ending::InDoubt, advice);
        }
        // The VM runs there whatever happens to what is left of it here.
        let reason = match self.machine.discard(self.id) {
            Ok(()) => String::new(),
            Err(error) => format!("it runs at the target, but the source's machine did not end: {error}"),
        };
        self.pass(progress, Step::Discarded, &reason);
        (Ending::Moved, reason)
    }

    /// The target has journaled `never-owner`: the VM is the source's again.
    fn take_back(&mut self, progress: &mut Progress) -> (Ending, String) {
        self.give_frames_back(progress);
        let resumed = self.machine.reclaim(self.id).and_then(|()| self.run_here_again());
        progress.blackout = self.clock.now().saturating_sub(progress.paused_at.unwrap_or_default());
        let reason = "the target lost the VM after it was released and journaled that it never owned it";
        match resumed {
            Ok(()) => (Ending::Failed, format!("{reason}; it runs here again")),
            Err(error) if self.machine.fate() == Fate::Dead => {
                (Ending::Lost, format!("{reason}; the machine here has died: {error}"))
            }
            Err(error) => {
                let name = &self.shape.name;
                let advice = format!("`dunlin resolve {name} --owner here`, or `dunlin vm resume {name}`, lets it run");
                (Ending::InDoubt, format!("{reason}; it could not be resumed here: {error}; {advice}"))
            }
        }
    }

    /// The VM is this host's again: says so to the network, and runs it.
    fn run_here_again(&mut self) -> Result<(), MachineError> {
        if let Err(error) = self.machine.stop_log() {
            tracing::warn!(migration = %self.id, "the dirty log could not be switched off: {error}");
        }
        // The target may have announced the VM.
        self.announce_here();
        self.machine.resume()
    }

    /// Undoes everything before `released`.
    fn roll_back(&mut self, progress: &mut Progress, error: &SourceError) -> (Ending, String) {
        if progress.handed && self.machine.fate() == Fate::Dead {
            return self.leave_to_target(progress, error);
        }
        tracing::warn!(vm = %self.shape.name, migration = %self.id, step = %progress.step, "rolled back: {error}");
        // A log that cannot be switched off must not keep the VM from running.
        let log = self.machine.stop_log();
        self.give_frames_back(progress);
        if progress.paused_at.is_some() {
            self.announce_here();
        }
        let resumed = self.machine.resume();
        if let Some(paused_at) = progress.paused_at {
            progress.blackout = self.clock.now().saturating_sub(paused_at);
        }
        if matches!(error, SourceError::Refused(_)) {
            self.hear_why();
        }
        let mut reason = format!("at {}: {error}", progress.step);
        if !self.tell_of_rollback(progress, error) {
            reason += &format!(
                "; the target could not be told and may hold a prepared copy, which must not run: `dunlin resolve {} \
                 --owner there` on it lets it go",
                self.shape.name
            );
        }
        match (resumed, error) {
            (Err(lost), _) if self.machine.fate() == Fate::Dead => {
                return (Ending::Lost, format!("{reason}; the machine has died: {lost}"));
            }
            (Err(stuck), _) => {
                return (Ending::Failed, format!("{reason}; resuming failed: {stuck}; try `dunlin vm resume`"));
            }
            _ => {}
        }
        if let Err(stuck) = log {
            reason += &format!("; the dirty log could not be switched off: {stuck}");
        }
        match error {
            SourceError::Cancelled | SourceError::Stuck(_) => (Ending::Cancelled, reason),
            SourceError::Refused(_) | SourceError::Tunnel(_) => (Ending::Refused, reason),
            _ => (Ending::Failed, reason),
        }
    }

    /// The machine died after everything was handed over: there is nothing here to roll back to, and the target may hold
    /// the only copy. A dead machine cannot run, so the VM is released in its place.
    fn leave_to_target(&mut self, progress: &mut Progress, error: &SourceError) -> (Ending, String) {
        let why = format!("the machine died, and then: {error}");
        match self.machine.release(self.id, &self.options.peer) {
            Ok(()) => {
                self.pass(progress, Step::Released, "in the dead machine's place");
                self.settle(progress, &BlackoutLedger::default(), &why, Rest::None)
            }
            Err(refused) => (
                Ending::InDoubt,
                format!(
                    "{why}; `released` could not be journaled: {refused}. If the target holds a prepared copy it is \
                     the only one: `dunlin resolve {} --owner here` on it lets it run",
                    self.shape.name
                ),
            ),
        }
    }

    /// Tells the target that the attempt is over. One that may be prepared would wait for ever, so it is told until it
    /// says that it has let go; `false` if that could not be had.
    fn tell_of_rollback(&mut self, progress: &Progress, error: &SourceError) -> bool {
        if matches!(error, SourceError::Refused(_) | SourceError::PeerCancelled(_)) {
            return true;
        }
        let cancel = ControlMessage::Cancel(error.to_string());
        let mut told = self.link.control().send(&cancel).is_ok();
        if !progress.handed {
            return true;
        }
        let until = self.clock.now() + self.options.doubt;
        loop {
            if told && self.has_let_go(self.clock.now() + LETTING_GO_LIMIT) {
                return true;
            }
            if self.clock.now() >= until {
                return false;
            }
            self.clock.sleep(TICK);
            told = self.link.redial().is_ok()
                && self.link.control().send(&ControlMessage::Query(self.id)).is_ok()
                && self.link.control().send(&cancel).is_ok();
        }
    }

    /// Waits for the target's word that it can never run the VM.
    fn has_let_go(&mut self, deadline: Duration) -> bool {
        loop {
            match self.expect_quietly(deadline) {
                Ok(ControlMessage::State(TargetState::NeverOwner) | ControlMessage::Cancel(_)) => return true,
                // What it said before it read the news.
                Ok(_) => {}
                Err(_) => return false,
            }
        }
    }

    /// Takes what may come whatever is waited for: that the peer gives up or refuses, or a word of the network. Anything else is handed back.
    fn obey(&mut self, message: ControlMessage) -> Result<Option<ControlMessage>, SourceError> {
        match message {
            ControlMessage::Cancel(reason) => Err(SourceError::PeerCancelled(reason)),
            ControlMessage::Refuse(reason) => Err(SourceError::Refused(reason)),
            other => Ok(self.hear_network(other)),
        }
    }

    /// Waits for the peer's next message; obeys cancelling.
    fn expect(
        &mut self,
        control: &dyn ControlChannel<ControlMessage>,
        patience: Duration,
        doing: &'static str,
    ) -> Result<ControlMessage, SourceError> {
        let deadline = self.clock.now() + patience;
        loop {
            if self.cancel.is_set() {
                return Err(SourceError::Cancelled);
            }
            match control.recv(TICK)? {
                Some(message) => {
                    if let Some(other) = self.obey(message)? {
                        return Ok(other);
                    }
                }
                None if self.clock.now() >= deadline => {
                    return Err(LinkError::Stalled { doing, after: patience }.into());
                }
                None => {}
            }
        }
    }

    /// Waits for the peer's next message on the present channel; past the point of no return nothing cancels.
    fn expect_quietly(&mut self, deadline: Duration) -> Result<ControlMessage, SourceError> {
        let control: Arc<dyn ControlChannel<ControlMessage>> = self.link.control();
        loop {
            match control.recv(TICK)? {
                Some(message) => {
                    if let Some(other) = self.hear_network(message) {
                        return Ok(other);
                    }
                }
                None if self.clock.now() >= deadline => {
                    return Err(LinkError::Stalled { doing: "activation", after: self.options.stall }.into());
                }
                None => {}
            }
        }
    }
}

/// A peer that gives up says why and closes its streams: its words explain a broken stream better than the kernel's.
fn peers_reason(control: &dyn ControlChannel<ControlMessage>, error: SourceError) -> SourceError {
    if !matches!(error, SourceError::Link(_)) {
        return error;
    }
    loop {
        match control.recv(TICK) {
            Ok(Some(ControlMessage::Cancel(reason))) => return SourceError::PeerCancelled(reason),
            Ok(Some(ControlMessage::Refuse(reason))) => return SourceError::Refused(reason),
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => return error,
        }
    }
}

fn unexpected(message: &ControlMessage, wanted: &'static str) -> SourceError {
    SourceError::Unexpected { got: message.name(), wanted }
}
