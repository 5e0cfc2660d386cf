//! The target's end: reserve or refuse, receive, prepare, wait for the word, own, announce, run.
//!
//! Contract: before `prepared` every failure leaves nothing here. From `prepared` on the VM is neither run nor dropped
//! without the source's word, its known rollback, or an operator's decision.

mod borrowing;
mod network;
mod owing;
mod relay;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use self::borrowing::Borrowing;
pub use self::network::{Asked, Telling};
pub use self::owing::Orphan;
pub use self::relay::RelayPhase;
use super::digest::{chunk_hashes, run_digest, zeros_digest};
use super::lap::Lap;
use super::marks::Marks;
use super::message::{Accept, ControlMessage, Handed, Offer, TargetState};
use super::observe::{CancelFlag, Observer};
use super::options::Safety;
use super::owed::{Owed, check_run, owed_pages};
use super::reduce::{Unpacker, known_packings};
use crate::model::{
    BlackoutLedger, BlackoutPhase, MAX_BOOT_IMAGE_BYTES, MigrationId, NetworkPlace, NetworkReport, Owner, Packing,
    PageBitmap, PageRun, Step, TunnelOffer, VmId, WaitReport, WireguardKey, WireguardOffer,
};
use crate::port::{
    Bell, BulkItem, BulkReceiver, BulkSender, Clock, ControlChannel, Fate, Faults, Job, LinkError, Machine,
    MachineError, Place, Region, TargetLink,
};

/// How long a source may take to say what it wants, and to open its streams.
const GREETING_LIMIT: Duration = Duration::from_secs(30);
/// How often waits look around.
const TICK: Duration = Duration::from_millis(100);
/// How often a VM that runs owing is announced.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(1);
/// After so long without a word from the source, a new connection of its is looked for beside the old one.
const SILENCE: Duration = Duration::from_secs(1);
/// The most page streams of one migration.
const MAX_STREAMS: u16 = 64;
/// Runs at least this long are worth taking their memory in one go: half of a huge page.
const PREPARE_PAGES: u32 = 256;

/// Why the target did not get the VM.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// The link or the peer.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The machine here.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// This host cannot or will not take the VM.
    #[error("refused: {0}")]
    Refused(String),
    /// Somebody else has what the VM has.
    #[error("refused: {0}")]
    Conflict(String),
    /// The source gave up.
    #[error("the source gave up: {0}")]
    PeerCancelled(String),
    /// An operator here asked for it.
    #[error("cancelled")]
    Cancelled,
    /// What arrived is not what was sent.
    #[error("the memory that arrived is not the memory that was sent: {0}")]
    Damaged(String),
    /// An operator decided that the VM is the source's.
    #[error("resolved: the source keeps the VM")]
    ResolvedAway,
    /// The machine died after `prepared`; `never-owner` is journaled.
    #[error("the machine died holding a prepared VM; the source may resume it")]
    LostPrepared,
    /// The machine died after it had journaled `owner`: a VM crash like any other.
    #[error("the machine died right after it took ownership: {0}")]
    LostOwned(String),
    /// Faults of the VM can be caught or resolved no more.
    #[error("its faults: {0}")]
    Faults(String),
    /// The VM runs here, and pages that it is owed do not come any more.
    #[error(
        "the VM runs here, but {left} pages are still at the source, and cannot be had: {reason}. Whatever touches one of them waits"
    )]
    Owing {
        /// How many.
        left: u64,
        /// Why.
        reason: String,
    },
    /// The right message at the wrong time.
    #[error("the peer broke the protocol: `{got}` while waiting for {wanted}")]
    Unexpected {
        /// The message's name.
        got: &'static str,
        /// What would have been right.
        wanted: &'static str,
    },
}

/// What a host sets aside for a VM.
pub struct Reservation {
    /// The waiting machine.
    pub machine: Box<dyn Machine>,
    /// Its RAM.
    pub region: Arc<dyn Region>,
}

/// A host that can make room for a VM.
pub trait Host: Send {
    /// Sets aside everything that the offer asks for, or says why not. Nothing stays behind a refusal.
    ///
    /// # Errors
    /// A reason for the source's operator.
    fn reserve(&mut self, offer: &Offer) -> Result<Reservation, String>;

    /// Whether a VM is refused if somebody else has what it has.
    fn may_refuse(&self) -> bool {
        false
    }

    /// The source's ports of the VM are in this network: where that is the host's own they are nobody else's.
    fn note_former_place(&mut self, _place: NetworkPlace) {}

    /// Whether somebody else has what the VM has, which is asked from its reservation on. Does not wait.
    fn asked(&mut self) -> Asked {
        Asked::Not
    }

    /// Whether VMs that come are announced here; else somebody else does.
    fn may_announce(&self) -> bool {
        true
    }

    /// The first announcement is about to leave: bridges are watched from before it. Takes no time.
    fn announces(&mut self) {}

    /// A round of announcements of so many frames has left.
    fn announced(&mut self, _frames: u32) {}

    /// What has become of the host's bridges, and of asking: if all have relearned where the VM is and whoever was asked has had the time to answer, or it `is_late`. None if it is not known yet.
    fn network(&mut self, _is_late: bool) -> Option<NetworkReport> {
        Some(NetworkReport::default())
    }

    /// Makes this host's end of a tunnel for the VM that was reserved for, through WireGuard if so much is offered, and answers in it; its key there. Goes when the VM does not come.
    ///
    /// # Errors
    /// A reason for the source's operator.
    fn make_tunnel(
        &mut self,
        offer: &TunnelOffer,
        _wireguard: Option<&WireguardOffer>,
    ) -> Result<Option<WireguardKey>, String> {
        Err(format!("this host makes no tunnels, not to {} either", offer.former))
    }
}

/// Whether a prepared VM can run on loan.
#[derive(Clone, Copy, PartialEq, Eq)]
enum MayBeLent {
    No,
    Yes,
    /// It has, and all of it is here.
    Was,
}

/// What a source has decided.
enum Verdict {
    /// The VM is the target's.
    Ours,
    /// It may run here on loan, in answer to what was sent at this time.
    Lent(Duration),
}

/// A VM that has arrived and runs.
pub struct Arrived {
    /// The migration.
    pub migration_id: MigrationId,
    /// The VM.
    pub vm_id: VmId,
    /// The machine, for the announcements that follow.
    pub machine: Box<dyn Machine>,
    /// This side's share of the blackout.
    pub ledger: BlackoutLedger,
    /// Pages compared under `--verify`.
    pub verified_pages: u64,
}

/// One migration at its target.
pub struct Target<'a> {
    /// The way to the source.
    pub link: &'a mut dyn TargetLink<ControlMessage>,
    /// Makes room.
    pub host: &'a mut dyn Host,
    /// Time.
    pub clock: &'a dyn Clock,
    /// Who watches.
    pub observer: &'a dyn Observer,
    /// Who may stop it, up to `prepared`.
    pub cancel: CancelFlag,
    /// Nothing moving for this long counts as a stalled peer.
    pub stall: Duration,
    /// How far a relay of frames is; there is none at first.
    pub relay: RelayPhase,
    /// What was told of the network; nothing at first.
    pub telling: Telling,
}

impl Target<'_> {
    /// Runs the migration to its end. `first` is the message that the caller has read to know what the peer wants.
    ///
    /// # Errors
    /// Why the VM is not here; the source has been told where that is possible.
    pub fn run(mut self, first: ControlMessage) -> Result<Arrived, TargetError> {
        let control = self.link.control();
        let offer = match first {
            ControlMessage::Offer(offer) => offer,
            other => return Err(unexpected(&other, "offer")),
        };
        self.pass(offer.migration_id, Step::Offered, offer.shape.name.as_str());
        let started = self.clock.now();
        let reservation = check_offer(&offer).and_then(|()| self.host.reserve(&offer));
        let Reservation { mut machine, region } = match reservation {
            Ok(reservation) => reservation,
            Err(reason) => {
                control.send(&ControlMessage::Refuse(reason.clone()))?;
                return Err(TargetError::Refused(reason));
            }
        };
        let mut ledger = BlackoutLedger::default();
        // The VM was prepared while it is still owed pages: what follows is not undone here.
        let mut owes = false;
        let ended = self.until_prepared(&offer, started, (machine.as_mut(), region.as_ref()), &mut ledger, &mut owes);
        let verified_pages = match ended {
            Ok(pages) => pages,
            Err(error) if owes => return Err(error),
            Err(error) => {
                tracing::warn!(migration = %offer.migration_id, "gave up before `prepared`: {error}");
                if !matches!(error, TargetError::PeerCancelled(_)) {
                    self.tell_end(&error);
                }
                let gone = machine.discard(offer.migration_id);
                if gone.is_err() {
                    machine.never_owner(offer.migration_id)?;
                }
                return Err(error);
            }
        };
        if !owes {
            self.until_it_runs(offer.migration_id, machine.as_mut(), &mut ledger, &mut None)?;
        }
        self.stay_for_relay(offer.migration_id, machine.as_mut());
        self.tell_last(offer.migration_id);
        Ok(Arrived { migration_id: offer.migration_id, vm_id: offer.shape.vm_id, machine, ledger, verified_pages })
    }

    fn pass(&self, migration: MigrationId, step: Step, detail: &str) {
        tracing::info!(%migration, %step, detail, "target");
        self.observer.step(step, detail);
    }

    /// From `prepared` until the guest runs and is ours, or runs on loan. `borrowing` is what is ready for that; it is used up when the VM is ours.
    fn until_it_runs(
        &mut self,
        id: MigrationId,
        machine: &mut dyn Machine,
        ledger: &mut BlackoutLedger,
        borrowing: &mut Option<Borrowing>,
    ) -> Result<(), TargetError> {
        loop {
            let loan = match borrowing {
                None => MayBeLent::No,
                Some(borrowing) if borrowing.is_whole => MayBeLent::Was,
                Some(_) => MayBeLent::Yes,
            };
            match self.await_verdict(id, machine, loan)? {
                Verdict::Ours => {
                    if self.activate(id, machine, ledger, loan == MayBeLent::Was)? {
                        *borrowing = None;
                        return Ok(());
                    }
                }
                Verdict::Lent(asked_at) => {
                    if let Some(borrowing) = borrowing
                        && self.run_on_loan(id, machine, borrowing, ledger, asked_at)?
                    {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Stages 1 to 3, up to the journaled `prepared`; where the VM is to run before its memory is here, to the last page of it.
    fn until_prepared(
        &mut self,
        offer: &Offer,
        started: Duration,
        (machine, region): (&mut dyn Machine, &dyn Region),
        ledger: &mut BlackoutLedger,
        owes: &mut bool,
    ) -> Result<u64, TargetError> {
        let control = self.link.control();
        let reservation_ns = self.clock.now().saturating_sub(started).as_nanos() as u64;
        control.send(&ControlMessage::Accept(Accept { reservation_ns }))?;
        let patience = GREETING_LIMIT.min(self.stall);
        let mut receivers = self.link.accept_bulk(offer.migration_id, offer.streams, patience)?;
        self.pass(offer.migration_id, Step::Reserved, "");
        let inflow = Inflow::new(region, control.as_ref(), self.clock, self.stall, receivers.len());
        let clock = self.clock;
        // Needed only if pages will be asked for.
        let requests = receivers.last_mut().and_then(|last| last.back().ok());
        // Only if the VM is lent.
        let back = (receivers.len() > 1).then(|| receivers[0].back().ok()).flatten();
        let (mut received, mut borrowing) = (None, None);
        let lead = || {
            let ways = Ways { requests, back, borrowing: &mut borrowing };
            let handed = self.receive(offer.migration_id, control.as_ref(), (&inflow, ways), machine);
            received = Some(handed.and_then(|(handed, at)| match inflow.owed.get() {
                None => Ok(Some((handed, at))),
                Some(owed) => {
                    let loan = borrowing.take();
                    self.run_owing(offer, (&inflow, owed), machine, (&handed, at), (ledger, loan), owes).map(|()| None)
                }
            }));
            inflow.stop();
        };
        clock.run_beside(inflow.streams(receivers), Box::new(lead));
        let Some((handed, arrived_at)) = received.unwrap_or(Err(TargetError::Cancelled))? else { return Ok(0) };
        self.pass(offer.migration_id, Step::StateMoved, "");
        let digest = inflow.digest();
        if digest != handed.digest {
            return Err(TargetError::Damaged(format!(
                "the last round's digest is {digest:016x}, the source says {:016x}",
                handed.digest
            )));
        }
        machine.restore_state(&handed.state)?;
        ledger.add(BlackoutPhase::Restore, self.clock.now().saturating_sub(arrived_at));
        let mut verified_pages = 0;
        if offer.verify {
            compare_hashes(&handed.chunk_hashes, &chunk_hashes(region, &PageBitmap::new(region.spec().pages)))?;
            verified_pages = region.spec().pages.0;
        }
        self.say_prepared(offer, machine, ledger)?;
        Ok(verified_pages)
    }

    fn say_prepared(
        &mut self,
        offer: &Offer,
        machine: &mut dyn Machine,
        ledger: &mut BlackoutLedger,
    ) -> Result<(), TargetError> {
        if self.cancel.is_set() {
            return Err(TargetError::Cancelled);
        }
        self.settle_inquiry()?;
        let journaling = self.clock.now();
        machine.prepared(offer.migration_id)?;
        ledger.add(BlackoutPhase::JournalPrepared, self.clock.now().saturating_sub(journaling));
        self.pass(offer.migration_id, Step::Prepared, "");
        // A lost message is the verdict's business: from here the VM waits.
        if let Err(error) = self.link.control().send(&ControlMessage::Prepared(ledger.clone())) {
            tracing::warn!(migration = %offer.migration_id, "`prepared` could not be sent: {error}");
        }
        ledger.phases.clear();
        Ok(())
    }

    /// Reads the control stream while pages flow, until the state has come and every stream has ended its last round.
    fn receive<'a>(
        &mut self,
        id: MigrationId,
        control: &dyn ControlChannel<ControlMessage>,
        (inflow, ways): (&Inflow<'a>, Ways<'_>),
        machine: &mut dyn Machine,
    ) -> Result<(Box<Handed>, Duration), TargetError>
    where
        Self: 'a,
    {
        let Ways { mut requests, mut back, borrowing } = ways;
        let mut owing = None::<PageBitmap>;
        // Nobody boots from more than fits into the VM.
        let room = MAX_BOOT_IMAGE_BYTES.min(inflow.region.spec().pages.bytes() as usize);
        let mut image = Some(Vec::new());
        loop {
            if self.cancel.is_set() {
                return Err(TargetError::Cancelled);
            }
            inflow.check()?;
            // Better known while the VM still runs than when its state has come.
            if machine.fate() == Fate::Dead {
                let reason = "its process has ended".to_owned();
                return Err(MachineError::Gone { action: "wait for the VM", reason }.into());
            }
            self.look_at_inquiry(control)?;
            match control.recv(self.look_pause())? {
                Some(ControlMessage::Ping(number)) => {
                    inflow.touch();
                    control.send(&ControlMessage::Pong(number))?;
                }
                Some(ControlMessage::Place(place)) => self.hear_place(place, control)?,
                Some(ControlMessage::BootImage { part, last }) => {
                    inflow.touch();
                    let Some(mut so_far) = image.take() else {
                        return Err(LinkError::Protocol("a second boot image".to_owned()).into());
                    };
                    if so_far.len() + part.len() > room {
                        return Err(LinkError::Protocol(format!("a boot image above {room} bytes")).into());
                    }
                    so_far.extend_from_slice(&part);
                    if last {
                        machine.set_boot_image(&so_far)?;
                    } else {
                        image = Some(so_far);
                    }
                }
                Some(ControlMessage::Pausing) => {
                    inflow.touch();
                    machine.foresee_prepared(id)?;
                }
                Some(ControlMessage::Handed(_)) if image.as_ref().is_some_and(|image| !image.is_empty()) => {
                    return Err(LinkError::Protocol("a boot image without an end".to_owned()).into());
                }
                Some(ControlMessage::Reducing(names)) if inflow.packings.get().is_none() => {
                    let _ = inflow.packings.set(known_packings(&names).map_err(TargetError::Refused)?);
                }
                Some(ControlMessage::Tunnel(offer)) => {
                    inflow.touch();
                    self.host.make_tunnel(&offer, None).map_err(TargetError::Refused)?;
                    inflow.touch();
                    control.send(&ControlMessage::TunnelMade)?;
                }
                Some(ControlMessage::SecretTunnel(offer)) => {
                    inflow.touch();
                    let (offer, wireguard) = *offer;
                    let key = self.host.make_tunnel(&offer, Some(&wireguard)).map_err(TargetError::Refused)?;
                    inflow.touch();
                    let none = || TargetError::Refused("a tunnel without a key".to_owned());
                    control.send(&ControlMessage::SecretTunnelMade(key.ok_or_else(none)?))?;
                }
                Some(ControlMessage::PostCopy) if inflow.faults.get().is_none() && requests.is_some() => {
                    inflow.touch();
                    let _ = inflow.faults.set(machine.catch_faults()?);
                    control.send(&ControlMessage::FaultsCaught)?;
                }
                Some(ControlMessage::SafePostCopy { lease_ms, every_ms })
                    if inflow.faults.get().is_none() && requests.is_some() =>
                {
                    inflow.touch();
                    let safety = check_safety(lease_ms, every_ms).map_err(LinkError::Protocol)?;
                    let no_way = || LinkError::Protocol("no stream for increments".to_owned());
                    let back = back.take().ok_or_else(no_way)?;
                    let _ = inflow.faults.set(machine.catch_faults()?);
                    *borrowing = Some(Borrowing::prepare(safety, machine, inflow.region, back)?);
                    control.send(&ControlMessage::FaultsCaught)?;
                }
                Some(ControlMessage::Owing(words)) if inflow.faults.get().is_some() => {
                    inflow.touch();
                    owing = Some(owed_pages(&words, inflow.region.spec().pages)?);
                }
                Some(ControlMessage::Handed(handed)) => {
                    if let (Some(owing), Some(faults), Some(requests)) = (owing, inflow.faults.get(), requests.take()) {
                        if handed.round > 0 {
                            inflow.await_round(handed.round)?;
                        }
                        let owed = Owed::new(inflow.region, Arc::clone(faults), inflow.clock, &owing, requests);
                        // Nothing has come yet: what is not owed is as empty here as it is there.
                        let owed = if handed.round == 0 { owed.onto_nothing() } else { owed };
                        let _ = inflow.owed.set(Arc::new(owed));
                        inflow.changed.ring();
                    } else {
                        inflow.await_round(handed.round)?;
                    }
                    return Ok((handed, self.clock.now()));
                }
                Some(ControlMessage::Cancel(reason)) => return Err(TargetError::PeerCancelled(reason)),
                Some(other) => return Err(unexpected(&other, "handed")),
                None => {}
            }
        }
    }

    /// Holds the prepared VM until it is known whose it is, or until it is lent.
    fn await_verdict(
        &mut self,
        id: MigrationId,
        machine: &mut dyn Machine,
        loan: MayBeLent,
    ) -> Result<Verdict, TargetError> {
        let mut reachable = true;
        let mut heard_at = self.clock.now();
        // When the source was last told that the VM is ready.
        let mut told_at = self.clock.now();
        loop {
            match machine.fate() {
                Fate::Waiting => {}
                Fate::Resolved(Owner::Here) => return Ok(Verdict::Ours),
                Fate::Resolved(_) => return Err(TargetError::ResolvedAway),
                Fate::Dead => {
                    machine.never_owner(id)?;
                    let _ = self.link.control().send(&ControlMessage::State(TargetState::NeverOwner));
                    return Err(TargetError::LostPrepared);
                }
            }
            if !reachable {
                reachable = self.link.reaccept(TICK);
                heard_at = self.clock.now();
                continue;
            }
            let message = self.link.control().recv(TICK);
            if matches!(message, Ok(Some(_))) {
                heard_at = self.clock.now();
            }
            match message {
                Ok(Some(ControlMessage::Commit)) => return Ok(Verdict::Ours),
                Ok(Some(ControlMessage::Lend)) if loan == MayBeLent::Yes => return Ok(Verdict::Lent(told_at)),
                // It has not heard that the VM runs, or that all is here.
                Ok(Some(ControlMessage::Lend)) if loan == MayBeLent::Was => {
                    let running = ControlMessage::Running(BlackoutLedger::default());
                    reachable = self.link.control().send(&running).is_ok();
                }
                Ok(Some(ControlMessage::Recover { migration, .. })) if loan == MayBeLent::Was && migration == id => {
                    let complete = ControlMessage::Complete(WaitReport::default());
                    reachable = self.link.control().send(&complete).is_ok();
                }
                Ok(Some(ControlMessage::Query(asked))) if asked == id => {
                    told_at = self.clock.now();
                    reachable = self.link.control().send(&ControlMessage::State(TargetState::Prepared)).is_ok();
                }
                Ok(Some(ControlMessage::Cancel(reason))) => match machine.discard(id) {
                    Ok(()) => {
                        // The source asks until it hears this.
                        let _ = self.link.control().send(&ControlMessage::State(TargetState::NeverOwner));
                        return Err(TargetError::PeerCancelled(reason));
                    }
                    Err(error) => {
                        tracing::warn!(migration = %id, "the source wants the VM back ({reason}), but: {error}");
                        let _ = self.link.control().send(&ControlMessage::State(TargetState::Prepared));
                    }
                },
                Ok(Some(message)) => {
                    if let Some(other) = self.hear_relay(id, message, machine) {
                        tracing::warn!(migration = %id, got = other.name(), "ignored while prepared");
                    }
                }
                // A connection may be dead without a sign of it: a source that dials anew takes its place.
                Ok(None) if self.clock.now().saturating_sub(heard_at) >= SILENCE => {
                    if self.link.reaccept(Duration::ZERO) {
                        heard_at = self.clock.now();
                    }
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(
                        migration = %id,
                        "in doubt: contact lost while prepared ({error}); waiting for the source, or for `dunlin resolve`"
                    );
                    reachable = false;
                }
            }
        }
    }

    /// Stage 5, of a VM that may run `already`, on loan. `false` if the right to run could neither be journaled nor given back: the VM is still prepared.
    fn activate(
        &mut self,
        id: MigrationId,
        machine: &mut dyn Machine,
        ledger: &mut BlackoutLedger,
        already: bool,
    ) -> Result<bool, TargetError> {
        let mut lap = Lap::since(self.clock, self.clock.now());
        if let Err(error) = machine.take_ownership(id) {
            return self.ownership_failed(id, machine, &error);
        }
        ledger.add(BlackoutPhase::JournalOwner, lap.next());
        self.pass(id, Step::Owned, "");
        if already && machine.fate() == Fate::Dead {
            return Err(TargetError::LostOwned("its process has ended".to_owned()));
        }
        self.announce_and_run(id, machine, ledger, Step::Running)
    }

    /// The first announcement, then the guest. `false` as [`Target::activate`] says it.
    fn announce_and_run(
        &mut self,
        id: MigrationId,
        machine: &mut dyn Machine,
        ledger: &mut BlackoutLedger,
        step: Step,
    ) -> Result<bool, TargetError> {
        let mut lap = Lap::since(self.clock, self.clock.now());
        self.begin_relay(id, machine);
        self.host.announces();
        if let Some(frames) = self.announce(id, machine) {
            self.pass(id, Step::Announced, &format!("{frames} frames"));
        }
        ledger.add(BlackoutPhase::Announce, lap.next());
        // Up to here it certainly never ran: one that died meanwhile is the source's again.
        if machine.fate() == Fate::Dead {
            let error = MachineError::Gone { action: "resume", reason: "its process has ended".to_owned() };
            return self.ownership_failed(id, machine, &error);
        }
        machine.resume().map_err(|error| TargetError::LostOwned(error.to_string()))?;
        ledger.add(BlackoutPhase::Resume, lap.next());
        self.note_run();
        // If this is lost the source asks again, and the journal answers.
        if let Err(error) = self.link.control().send(&ControlMessage::Running(ledger.clone())) {
            tracing::warn!(migration = %id, "`running` could not be sent: {error}");
        }
        self.pass(id, step, "");
        Ok(true)
    }

    /// A round of announcements, if VMs are announced here: how many frames have left. None if it failed.
    fn announce(&mut self, id: MigrationId, machine: &mut dyn Machine) -> Option<u32> {
        if !self.host.may_announce() {
            return Some(0);
        }
        match machine.announce() {
            Ok(frames) => {
                self.host.announced(frames);
                Some(frames)
            }
            Err(error) => {
                tracing::warn!(migration = %id, "an announcement failed: {error}");
                None
            }
        }
    }

    /// The machine did not take the VM, or died before it was let run: the source may have it back. If that cannot be
    /// journaled either (the disk is full), a living machine goes on waiting; the source asks again.
    fn ownership_failed(
        &mut self,
        id: MigrationId,
        machine: &mut dyn Machine,
        error: &MachineError,
    ) -> Result<bool, TargetError> {
        let dead = machine.fate() == Fate::Dead;
        let given_back = if dead { machine.never_owner(id) } else { machine.discard(id) };
        match given_back {
            Ok(()) => {
                let _ = self.link.control().send(&ControlMessage::State(TargetState::NeverOwner));
                Err(TargetError::LostPrepared)
            }
            Err(_) if dead => Err(TargetError::LostOwned(error.to_string())),
            Err(refused) => {
                tracing::warn!(migration = %id, "the VM can neither be taken ({error}) nor given back ({refused})");
                let _ = self.link.control().send(&ControlMessage::State(TargetState::Prepared));
                self.clock.sleep(TICK);
                Ok(false)
            }
        }
    }
}

fn unexpected(message: &ControlMessage, wanted: &'static str) -> TargetError {
    TargetError::Unexpected { got: message.name(), wanted }
}

/// Ways back to a source whose VM runs before its memory is here.
struct Ways<'w> {
    requests: Option<Box<dyn BulkSender>>,
    back: Option<Box<dyn BulkSender>>,
    /// What is ready for a loan, once the source has asked for one.
    borrowing: &'w mut Option<Borrowing>,
}

/// How a source wants a VM kept safe, if it can be.
fn check_safety(lease_ms: u64, every_ms: u64) -> Result<Safety, String> {
    let (lease, every) = (Duration::from_millis(lease_ms), Duration::from_millis(every_ms));
    if !Safety::LEASES.contains(&lease) || !Safety::INTERVALS.contains(&every) {
        return Err(format!("a loan of {lease:?} with an increment every {every:?}"));
    }
    Ok(Safety { lease, every })
}

/// Checks what an offer says of itself, before anything is allocated for it.
pub(crate) fn check_offer(offer: &Offer) -> Result<(), String> {
    offer.shape.check().map_err(|error| error.to_string())?;
    if offer.regions != offer.shape.regions() {
        return Err("the offered regions are not those of the offered machine".to_owned());
    }
    if !(1..=MAX_STREAMS).contains(&offer.streams) {
        return Err(format!("{} streams are not between 1 and {MAX_STREAMS}", offer.streams));
    }
    Ok(())
}

fn compare_hashes(source: &[u64], target: &[u64]) -> Result<(), TargetError> {
    if source.len() != target.len() {
        return Err(TargetError::Damaged(format!("{} hashes for {} chunks", source.len(), target.len())));
    }
    let wrong: Vec<usize> = (0..source.len()).filter(|&chunk| source[chunk] != target[chunk]).collect();
    match wrong.first() {
        None => Ok(()),
        Some(first) => Err(TargetError::Damaged(format!(
            "{} of {} chunks of 2 MiB differ, the first at offset {} MiB",
            wrong.len(),
            source.len(),
            first * 2
        ))),
    }
}

/// What all page streams of one migration share while they are received.
struct Inflow<'a> {
    region: &'a dyn Region,
    control: &'a dyn ControlChannel<ControlMessage>,
    clock: &'a dyn Clock,
    stall: Duration,
    streams: usize,
    /// Pages that have been written here: a zero page that never was needs no work.
    written: Marks,
    /// 2 MiB blocks whose memory has been taken.
    taken: Vec<AtomicBool>,
    digest: AtomicU64,
    /// What pages may come packed as.
    packings: OnceLock<Vec<Packing>>,
    /// Nanoseconds of the clock when anything last moved.
    moved_at: AtomicU64,
    stopped: AtomicBool,
    state: Mutex<InflowState>,
    /// The VM is to run before its memory is here.
    faults: OnceLock<Arc<dyn Faults>>,
    owed: OnceLock<Arc<Owed<'a>>>,
    /// Streams that somebody reads.
    reading: AtomicUsize,
    /// Rung when `state`, `owed` or `reading` has changed.
    changed: Bell,
}

#[derive(Default)]
struct InflowState {
    /// The last round that every stream has ended.
    complete: u32,
    /// Streams that have ended the round after it.
    ended: usize,
    failure: Option<TargetError>,
}

impl<'a> Inflow<'a> {
    fn new(
        region: &'a dyn Region,
        control: &'a dyn ControlChannel<ControlMessage>,
        clock: &'a dyn Clock,
        stall: Duration,
        streams: usize,
    ) -> Self {
        let pages = region.spec().pages.0;
        let inflow = Self {
            region,
            control,
            clock,
            stall,
            streams,
            written: Marks::none(pages),
            taken: (0..pages.div_ceil(512)).map(|_| AtomicBool::new(false)).collect(),
            digest: AtomicU64::new(0),
            packings: OnceLock::new(),
            moved_at: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            state: Mutex::default(),
            faults: OnceLock::new(),
            owed: OnceLock::new(),
            reading: AtomicUsize::new(streams),
            changed: Bell::default(),
        };
        inflow.touch();
        inflow
    }

    /// Streams of pages that a VM is owed that runs.
    fn of_owed(
        owed: &Arc<Owed<'a>>,
        control: &'a dyn ControlChannel<ControlMessage>,
        clock: &'a dyn Clock,
        stall: Duration,
        streams: usize,
    ) -> Self {
        let inflow = Self::new(owed.region(), control, clock, stall, streams);
        let _ = inflow.faults.set(owed.faults());
        let _ = inflow.owed.set(Arc::clone(owed));
        inflow
    }

    fn state(&self) -> MutexGuard<'_, InflowState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that something moved.
    fn touch(&self) {
        self.moved_at.store(self.clock.now().as_nanos() as u64, Ordering::Relaxed);
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    fn digest(&self) -> u64 {
        self.digest.load(Ordering::Acquire)
    }

    fn stalled(&self) -> bool {
        let idle = (self.clock.now().as_nanos() as u64).saturating_sub(self.moved_at.load(Ordering::Relaxed));
        idle > self.stall.as_nanos() as u64
    }

    /// The first failure of any stream, or a stall of all.
    fn check(&self) -> Result<(), TargetError> {
        if let Some(failure) = self.state().failure.take() {
            return Err(failure);
        }
        if self.stalled() {
            return Err(LinkError::Stalled { doing: "receiving memory", after: self.stall }.into());
        }
        Ok(())
    }

    /// Waits until all streams have ended `round`.
    fn await_round(&self, round: u32) -> Result<(), TargetError> {
        self.touch();
        let complete = loop {
            let seen = self.changed.rings();
            let (complete, failed) = {
                let state = self.state();
                (state.complete, state.failure.is_some())
            };
            if complete >= round || failed || self.stalled() {
                break complete;
            }
            self.clock.wait(&self.changed, seen, TICK);
        };
        self.check()?;
        // Rounds are counted from 1: before the first has ended there is nothing that a state could follow.
        if complete == round && round > 0 {
            Ok(())
        } else {
            Err(LinkError::Protocol(format!("the state follows round {round}, but round {complete} is the last"))
                .into())
        }
    }

    /// What receives each of these streams.
    fn streams<'j>(&'j self, receivers: Vec<Box<dyn BulkReceiver>>) -> Vec<Job<'j>> {
        let last = receivers.len().saturating_sub(1);
        let take = |(index, mut receiver): (usize, Box<dyn BulkReceiver>)| {
            Box::new(move || self.take_stream(receiver.as_mut(), index == last)) as Job<'j>
        };
        receivers.into_iter().enumerate().map(take).collect()
    }

    /// Receives one stream to the end of its last round, on a thread of its own; pages that were `asked` for come by it.
    fn take_stream(&self, receiver: &mut dyn BulkReceiver, asked: bool) {
        if let Err(error) = self.take_rounds(receiver, asked)
            && !self.stopped.load(Ordering::Acquire)
        {
            self.fail(error);
        }
        self.reading.fetch_sub(1, Ordering::AcqRel);
        self.changed.ring();
    }

    /// Stops the streams, and waits until nobody reads them any more.
    fn end_streams(&self) {
        self.stop();
        loop {
            let seen = self.changed.rings();
            if self.reading.load(Ordering::Acquire) == 0 {
                return;
            }
            self.clock.wait(&self.changed, seen, TICK);
        }
    }

    fn fail(&self, error: TargetError) {
        self.state().failure.get_or_insert(error);
        self.changed.ring();
        if let Some(owed) = self.owed.get() {
            owed.changed.ring();
        }
    }

    /// What is owed, once that is known.
    fn await_owed(&self) -> Result<&Arc<Owed<'a>>, TargetError> {
        loop {
            let seen = self.changed.rings();
            if let Some(owed) = self.owed.get() {
                return Ok(owed);
            }
            if self.stopped.load(Ordering::Acquire) {
                return Err(TargetError::Cancelled);
            }
            self.clock.wait(&self.changed, seen, TICK);
        }
    }

    fn take_rounds(&self, receiver: &mut dyn BulkReceiver, asked: bool) -> Result<(), TargetError> {
        let mut keep_waiting = || !self.stopped.load(Ordering::Acquire) && !self.stalled();
        let mut round = 0;
        let mut inside = None;
        let mut digest = 0u64;
        let mut owed: Option<&Arc<Owed<'_>>> = None;
        let mut unpacker = Unpacker::default();
        loop {
            let item = receiver.next(&mut keep_waiting)?;
            self.touch();
            match (item, inside) {
                (BulkItem::StartRound { round: next, digested }, None) if next == round + 1 => {
                    round = next;
                    inside = Some(digested);
                    if digested && self.faults.get().is_some() {
                        owed = Some(self.await_owed()?);
                    }
                    self.clock.stand(match owed {
                        Some(owed) if !asked => owed.place_of_push(),
                        // The VM waits for what it has asked for; it stands if nothing is owed in the last round.
                        _ if digested => Place::InFront,
                        _ => Place::Among,
                    });
                }
                (BulkItem::Pages(region, run), Some(_)) if let Some(owed) = owed => {
                    if !asked {
                        self.clock.stand(owed.place_of_push());
                    }
                    check_run(self.region, region, run)?;
                    owed.take_pages(run, receiver, &mut keep_waiting)?;
                    self.touch();
                }
                (BulkItem::Zeros(region, run), Some(_)) if let Some(owed) = owed => {
                    check_run(self.region, region, run)?;
                    owed.take_zeros(run)?;
                }
                (BulkItem::EndRound(ended), Some(_)) if ended == round && owed.is_some() => return Ok(()),
                (BulkItem::Pages(region, run), Some(digested)) => {
                    check_run(self.region, region, run)?;
                    self.take_memory(run);
                    receiver.read_into(self.region.bytes(run), &mut keep_waiting)?;
                    digest = self.arrived(run, digested, digest);
                }
                (BulkItem::Packed(region, run, packing, bytes), Some(digested)) if owed.is_none() => {
                    check_run(self.region, region, run)?;
                    let announced = self.packings.get().map_or(&[][..], Vec::as_slice);
                    let packed = (packing, run, bytes);
                    unpacker.take(packed, announced, self.region, receiver, &mut keep_waiting)?;
                    digest = self.arrived(run, digested, digest);
                }
                (BulkItem::Zeros(region, run), Some(digested)) => {
                    check_run(self.region, region, run)?;
                    self.zero_written(run);
                    if digested {
                        digest = digest.wrapping_add(zeros_digest(run));
                    }
                }
                (BulkItem::EndRound(ended), Some(digested)) if ended == round => {
                    inside = None;
                    self.digest.fetch_add(digest, Ordering::AcqRel);
                    self.end_round(round)?;
                    if digested {
                        return Ok(());
                    }
                }
                (item, _) => return Err(LinkError::Protocol(format!("{item:?} out of order in round {round}")).into()),
            }
        }
    }

    /// Notes that these pages are here; the digest with them.
    fn arrived(&self, run: PageRun, digested: bool, digest: u64) -> u64 {
        self.touch();
        self.mark_written(run);
        if digested { digest.wrapping_add(run_digest(run, self.region.bytes(run))) } else { digest }
    }

    /// Takes the memory of whole 2 MiB blocks in one go before their first bytes arrive.
    fn take_memory(&self, run: PageRun) {
        if run.count < PREPARE_PAGES {
            return;
        }
        for block in run.first.0 / 512..run.end().div_ceil(512) {
            if !self.taken[block as usize].swap(true, Ordering::Relaxed) {
                let first = block * 512;
                let count = (self.region.spec().pages.0 - first).min(512) as u32;
                self.region.prepare_for_write(PageRun::new(first, count));
            }
        }
    }

    fn mark_written(&self, run: PageRun) {
        for page in run.indices() {
            self.written.set(page);
        }
    }

    /// Zeroes those pages of `run` that have been written, in runs.
    fn zero_written(&self, run: PageRun) {
        let mut pending: Option<PageRun> = None;
        let mut page = run.first.0;
        while page < run.end() {
            let word = self.written.word(page);
            if word == 0 && page.is_multiple_of(64) {
                page += 64;
                continue;
            }
            if word >> (page % 64) & 1 == 1 {
                pending = match pending {
                    Some(before) if before.end() == page => Some(PageRun { count: before.count + 1, ..before }),
                    before => {
                        if let Some(run) = before {
                            self.region.zero(run);
                        }
                        Some(PageRun::new(page, 1))
                    }
                };
            }
            page += 1;
        }
        if let Some(run) = pending {
            self.region.zero(run);
        }
    }

    /// Books one stream's end of a round; the last one tells the source.
    fn end_round(&self, round: u32) -> Result<(), TargetError> {
        let complete = {
            let mut state = self.state();
            if state.complete + 1 != round {
                return Err(LinkError::Protocol(format!("round {round} ended, {} is complete", state.complete)).into());
            }
            state.ended += 1;
            if state.ended == self.streams {
                state.complete = round;
                state.ended = 0;
            }
            state.complete == round
        };
        if complete {
            self.control.send(&ControlMessage::RoundReceived(round))?;
            self.changed.ring();
        }
        Ok(())
    }
}
