//! The balloon behind the transport: its five queues, served.
//!
//! Owns what is done with the pages a guest names: given back to the host, or noted as free. Must not know who wants to know
//! (that is [`super::VirtioBalloon`]'s), nor migration.
//!
//! Linux numbers the queues by the features it accepted, with no gaps; the specification (5.5.2) gives each a fixed number.
//! Both agree in the order, so a queue's role is found by counting the ready ones.
//!
//! A request is done in pieces; between two it can be given up, and is then done again from its start, here or at another
//! host. That changes nothing: a page that was given back once reads as zero until the guest, which waits for the answer,
//! uses it again.

use std::sync::Arc;

use super::config::{COMMAND_DONE, COMMAND_STOP, Config};
use super::request::{self, GuestStats};
use super::{BalloonError, HintRound, Progress, feature};
use crate::kvm::memory::Memory;
use crate::kvm::virtio::mmio::{Backend, Pass, Served};
use crate::kvm::virtio::queue::{Buffers, Chain, Popped, Ring, RingFault};
use crate::model::{PAGE_SIZE, PageBitmap, PageCount, PageRun};

/// Device type of a balloon (virtio 1.2, 5.5.1).
const DEVICE_ID: u32 = 5;
/// Enough for what Linux reports at a time (32 buffers), and for many hints on their way.
const QUEUE_SIZES: [u16; 5] = [128, 128, 128, 256, 128];
/// Pages that are given back or noted before the next look at whether to pause: 4 MiB, what Linux hands over as one.
const PIECE_PAGES: u32 = 1024;
/// Runs of single pages that count as one piece.
const RUNS_PER_PIECE: usize = 16;
/// How much of guest memory one request may name, in bytes; the rest of it is not looked at. Linux names up to 128 MiB.
const MAX_REQUEST_BYTES: u64 = 1 << 30;
/// After so many pieces a pass begins no new request.
const PIECES_PER_PASS: u32 = 256;

/// What a queue is for (5.5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Hint,
    Report,
}

/// What was asked of the guest's statistics. The driver leaves one buffer with the device; getting it back is the request
/// for a new one (5.5.6.3). The device only takes it from the ring to give it back, so that a move finds it there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Wanted {
    /// Nothing.
    #[default]
    Nothing,
    /// The buffer is to be given back.
    Ask,
    /// It was; the next is the answer.
    Answer,
}

/// A round of hints (5.5.6.6).
#[derive(Debug)]
pub(super) struct Round {
    /// Its id.
    pub(super) id: u32,
    /// The guest may still add to it.
    pub(super) open: bool,
    /// The id that the guest announced last: what follows belongs to that one.
    announced: u32,
    /// The guest has named all that it had.
    pub(super) complete: bool,
    /// What it named, as pages of the memory file, and nobody has taken.
    pub(super) pages: PageBitmap,
    /// How many it named in all; one twice counts twice.
    pub(super) hinted: PageCount,
}

/// The device behind the transport.
pub struct BalloonBackend {
    memory: Memory,
    pub(super) config: Config,
    progress: Arc<Progress>,
    /// Whether pages are only acknowledged, and stay the guest's.
    pub(super) held: bool,
    pub(super) round: Option<Round>,
    /// Restored amid or behind a round, or squeezed: the guest may hold pages back for a host that it has left.
    left_behind: bool,
    wanted: Wanted,
    pub(super) stats: Option<GuestStats>,
    /// Counts the answers, so that who asks knows a new one.
    pub(super) answers: u64,
    pub(super) inflated: PageCount,
    pub(super) reported: PageCount,
}

/// The work of one pass.
struct Work<'a> {
    hold: &'a dyn Fn() -> bool,
    pieces: u32,
}

impl Work<'_> {
    /// Whether the next piece may be done.
    fn goes_on(&mut self) -> bool {
        self.pieces += 1;
        !(self.hold)()
    }

    /// Whether the pass has done enough.
    fn is_spent(&self) -> bool {
        self.pieces >= PIECES_PER_PASS
    }
}

/// How a request ended.
enum Outcome {
    /// It is to be acknowledged.
    Done,
    /// It is not: the worker is wanted elsewhere.
    GivenUp,
}

impl BalloonBackend {
    pub(in crate::kvm::virtio) fn new(memory: Memory, progress: Arc<Progress>) -> Self {
        Self {
            memory,
            config: Config::default(),
            progress,
            held: false,
            round: None,
            left_behind: false,
            wanted: Wanted::Nothing,
            stats: None,
            answers: 0,
            inflated: PageCount(0),
            reported: PageCount(0),
        }
    }

    pub(super) fn progress(&self) -> Arc<Progress> {
        self.progress.clone()
    }

    pub(super) fn round_status(&self) -> Option<HintRound> {
        self.round.as_ref().map(|round| HintRound { id: round.id, hinted: round.hinted, complete: round.complete })
    }

    pub(super) fn memory_pages(&self) -> PageCount {
        self.memory.pages()
    }

    /// So many pages as the guest is told them.
    pub(super) fn checked_target(&self, pages: PageCount) -> Result<u32, BalloonError> {
        let all = self.memory_pages();
        let target = u32::try_from(pages.0).ok().filter(|_| pages <= all);
        target.ok_or(BalloonError::Target(pages, all))
    }

    /// Asks for statistics at the next pass.
    pub(super) fn want_stats(&mut self) {
        self.wanted = Wanted::Ask;
    }

    /// Begins a round of hints, of which nothing is known yet; returns its id.
    pub(super) fn begin_round(&mut self) -> u32 {
        let id = self.config.next_command();
        let pages = PageBitmap::new(self.memory.pages());
        self.round =
            Some(Round { id, open: true, announced: COMMAND_STOP, complete: false, pages, hinted: PageCount(0) });
        id
    }

    /// Ends the round: what the guest names from now on is dropped.
    pub(super) fn end_round(&mut self, command: u32) {
        self.config.command = command;
        if let Some(round) = &mut self.round {
            round.open = false;
        }
    }

    /// For fuzzing: one of the things that a host asks, by number.
    pub(in crate::kvm::virtio) fn order(&mut self, number: usize) {
        match number % 9 {
            0 => drop(self.begin_round()),
            1 => self.end_round(COMMAND_STOP),
            2 => self.end_round(COMMAND_DONE),
            3 => self.want_stats(),
            4 => self.held = !self.held,
            5 => self.config.target = number as u32,
            6 => self.power_on(),
            7 => self.config.squeeze(number as u32),
            _ => drop(self.activate()),
        }
    }

    fn serve_queue(
        &mut self,
        role: Role,
        ring: &mut Ring,
        pass: &Pass<'_>,
        work: &mut Work<'_>,
    ) -> Result<bool, RingFault> {
        if role == Role::Statistics {
            return self.serve_statistics(ring, pass, work);
        }
        while !work.is_spent() && work.goes_on() {
            ring.silence(pass.ram)?;
            match ring.pop(pass.ram)? {
                Popped::Empty => {
                    if !ring.listen(pass.ram)? {
                        return Ok(false);
                    }
                }
                Popped::Malformed(head, fault) => {
                    pass.complaints.warn(&format_args!("dropped a request: {fault}"));
                    ring.complete(pass.ram, head, 0)?;
                }
                Popped::Chain(chain) => match self.perform(role, &chain, pass, work) {
                    Outcome::GivenUp => {
                        ring.put_back();
                        return Ok(true);
                    }
                    Outcome::Done => ring.complete(pass.ram, chain.head, 0)?,
                },
            }
        }
        Ok(true)
    }

    fn perform(&mut self, role: Role, chain: &Chain<'_>, pass: &Pass<'_>, work: &mut Work<'_>) -> Outcome {
        let wrong_side = match role {
            Role::Inflate | Role::Deflate => !chain.writable.is_empty(),
            Role::Report => !chain.readable.is_empty(),
            Role::Hint | Role::Statistics => false,
        };
        if wrong_side {
            pass.complaints.warn(&format_args!("{role:?}: a request with buffers of the wrong direction"));
            return Outcome::Done;
        }
        match role {
            Role::Inflate => self.inflate(&chain.readable, pass, work),
            // Its pages come back, as zeros, when the guest touches them.
            Role::Deflate | Role::Statistics => Outcome::Done,
            Role::Hint => self.hint(chain, pass, work),
            Role::Report => self.report(&chain.writable, pass, work),
        }
    }

    /// The guest has put pages into the balloon and does not use them (5.5.6). What they hold is lost even with
    /// `PAGE_POISON`: a driver fills them anew when it frees them.
    fn inflate(&mut self, buffers: &Buffers<'_>, pass: &Pass<'_>, work: &mut Work<'_>) -> Outcome {
        if self.held {
            return Outcome::Done;
        }
        let (runs, all) = request::page_numbers(buffers);
        if !all {
            pass.complaints.warn(&format_args!(
                "a request to inflate by {} page numbers; the first {} were looked at",
                buffers.len() / 4,
                request::MAX_PAGE_NUMBERS
            ));
        }
        let mut given = 0;
        for (index, (first, count)) in runs.into_iter().enumerate() {
            if index % RUNS_PER_PIECE == 0 && !work.goes_on() {
                return Outcome::GivenUp;
            }
            let page = PAGE_SIZE as u64;
            let pages: Vec<_> = self.memory.runs_in(first * page, count * page, u32::MAX).collect();
            given += pages.iter().map(|run| self.give_back(*run, pass)).sum::<u64>();
            if pages.iter().map(|run| u64::from(run.count)).sum::<u64>() < count {
                pass.complaints.warn(&format_args!("page {first:#x} or one of the {count} from there is no RAM"));
            }
        }
        self.inflated.0 += given;
        Outcome::Done
    }

    /// The guest has free pages, and waits until it may use them again (5.5.6.7).
    fn report(&mut self, buffers: &Buffers<'_>, pass: &Pass<'_>, work: &mut Work<'_>) -> Outcome {
        // A guest that checks its free pages for a pattern must find it there: zeros will do only if it expects zeros.
        let poisoned = pass.features & feature::PAGE_POISON != 0 && self.config.poison != 0;
        if self.held || poisoned {
            return Outcome::Done;
        }
        let mut given = 0;
        let done = self.each_piece(buffers, pass, work, |backend, run| given += backend.give_back(run, pass));
        if matches!(done, Outcome::Done) {
            self.reported.0 += given;
        }
        done
    }

    /// The guest announces a round, or names pages that were free after the round was asked for (5.5.6.6).
    fn hint(&mut self, chain: &Chain<'_>, pass: &Pass<'_>, work: &mut Work<'_>) -> Outcome {
        if let Some(id) = request::command_id(&chain.readable) {
            self.announced(id);
        } else if !chain.readable.is_empty() {
            pass.complaints.warn(&format_args!("a command id of {} bytes", chain.readable.len()));
        }
        // What belongs to another round is of no use: its pages may have been written since.
        let current = self.round.as_ref().is_some_and(|round| round.open && round.announced == round.id);
        if chain.writable.is_empty() || !current {
            return Outcome::Done;
        }
        let mut hinted = 0;
        let done = self.each_piece(&chain.writable, pass, work, |backend, run| {
            if let Some(round) = &mut backend.round {
                round.pages.insert_run(run);
            }
            hinted += u64::from(run.count);
        });
        if let (Outcome::Done, Some(round)) = (&done, &mut self.round) {
            round.hinted.0 += hinted;
        }
        done
    }

    fn announced(&mut self, id: u32) {
        let Some(round) = &mut self.round else { return };
        if id == COMMAND_STOP && round.announced == round.id {
            round.complete = true;
            self.progress.note();
        }
        round.announced = id;
    }

    /// Calls `act` with the whole pages of RAM in `buffers`, piece by piece.
    fn each_piece(
        &mut self,
        buffers: &Buffers<'_>,
        pass: &Pass<'_>,
        work: &mut Work<'_>,
        mut act: impl FnMut(&mut Self, PageRun),
    ) -> Outcome {
        let mut left = MAX_REQUEST_BYTES;
        let memory = self.memory.clone();
        for place in buffers.places() {
            if place.bytes > left {
                pass.complaints.warn(&format_args!("a request of {} bytes; {MAX_REQUEST_BYTES} count", buffers.len()));
            }
            let bytes = place.bytes.min(left);
            left -= bytes;
            for run in memory.runs_in(place.address, bytes, PIECE_PAGES) {
                if !work.goes_on() {
                    return Outcome::GivenUp;
                }
                act(self, run);
            }
        }
        Outcome::Done
    }

    /// Gives pages back; returns how many were.
    fn give_back(&self, run: PageRun, pass: &Pass<'_>) -> u64 {
        match self.memory.give_back(run) {
            Ok(()) => run.count.into(),
            Err(error) => {
                // The guest loses nothing, and the host gets nothing.
                pass.complaints.warn(&format_args!("{}", crate::model::chain(&error)));
                0
            }
        }
    }

    fn serve_statistics(&mut self, ring: &mut Ring, pass: &Pass<'_>, work: &mut Work<'_>) -> Result<bool, RingFault> {
        if !work.goes_on() {
            return Ok(true);
        }
        let head = match ring.pop(pass.ram)? {
            Popped::Empty => return ring.listen(pass.ram),
            Popped::Malformed(head, fault) => {
                pass.complaints.warn(&format_args!("dropped statistics: {fault}"));
                head
            }
            Popped::Chain(chain) => {
                if self.wanted != Wanted::Ask {
                    self.stats = Some(GuestStats::read(&chain.readable));
                    self.answers += 1;
                    self.wanted = Wanted::Nothing;
                    self.progress.note();
                    ring.put_back();
                    return Ok(false);
                }
                chain.head
            }
        };
        ring.complete(pass.ram, head, 0)?;
        self.wanted = Wanted::Answer;
        // What follows comes with a notification, or is there already.
        ring.listen(pass.ram)
    }
}

/// The optional queues that a driver with these features has, in order.
fn optional_roles(features: u64) -> impl Iterator<Item = Role> {
    [(feature::STATS_VQ, Role::Statistics), (feature::FREE_PAGE_HINT, Role::Hint), (feature::REPORTING, Role::Report)]
        .into_iter()
        .filter_map(move |(bit, role)| (features & bit != 0).then_some(role))
}

impl Backend for BalloonBackend {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        feature::ALL
    }

    fn config(&self) -> Vec<u8> {
        self.config.bytes()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) -> bool {
        let stored = self.config.store(offset, data, self.memory.pages().0);
        if stored {
            self.progress.note();
        }
        stored
    }

    fn save(&self) -> Vec<u8> {
        self.config.saved()
    }

    fn fits(&self, saved: &[u8]) -> bool {
        Config::from_saved(saved, self.memory.pages().0).is_some()
    }

    fn restore(&mut self, saved: &[u8]) {
        if let Some(config) = Config::from_saved(saved, self.memory.pages().0) {
            self.config = config;
            self.left_behind = config.before.is_some() || (config.last_command != 0 && config.command != COMMAND_DONE);
        }
    }

    fn serve(&mut self, pass: &mut Pass<'_>) -> Result<Served, RingFault> {
        let required = [(0, Role::Inflate), (1, Role::Deflate)];
        let ready = (2..pass.rings.len()).filter(|&queue| pass.rings[queue].is_some());
        let queues: Vec<_> = required.into_iter().chain(ready.zip(optional_roles(pass.features))).collect();
        let mut work = Work { hold: pass.hold, pieces: 0 };
        let mut more = false;
        for (queue, role) in queues {
            let Some(mut ring) = pass.rings[queue].take() else { continue };
            let result = self.serve_queue(role, &mut ring, pass, &mut work);
            pass.rings[queue] = Some(ring);
            more |= result?;
        }
        Ok(Served { more, ..Served::default() })
    }

    /// The pages of the balloon are the guest's again; what the host wants stays wanted.
    fn reset(&mut self) {
        let Config { target, last_command, before, .. } = self.config;
        self.config = Config { target, last_command, before, ..Config::default() };
        (self.round, self.left_behind) = (None, false);
        (self.wanted, self.stats) = (Wanted::Nothing, None);
        self.progress.note();
    }

    fn power_on(&mut self) {
        self.config = Config::default();
    }

    fn activate(&mut self) -> std::io::Result<()> {
        if std::mem::take(&mut self.left_behind) {
            self.config.command = COMMAND_DONE;
            self.config.relax();
        }
        Ok(())
    }

    fn explain_config(&self, saved: &[u8]) -> String {
        let pages = self.memory.pages();
        match Config::from_saved(saved, u64::MAX) {
            Some(saved) => format!(
                "a balloon of {} pages, {} of them wanted, is none of a VM of {pages}",
                saved.actual, saved.target
            ),
            None => format!("{} bytes are no state of a balloon", saved.len()),
        }
    }
}
