//! What the network still brings to a VM's former place is carried to its new one: switches relearn late, and what was on its way comes here.
//!
//! Owns what is carried, how much, and for how long. Begins when the VM runs at the target: what has come since the pause is kept until then, so that a migration that is rolled
//! back leaves it to the VM here.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::{Progress, Source};
use crate::migrate::message::ControlMessage;
use crate::model::{RelayReport, RelayedFrame};
use crate::port::{Clock, ControlChannel, FormerPorts, Job};

/// When nothing has come for so long nothing more will.
const QUIET: Duration = Duration::from_millis(200);
/// How often it is looked whether to go on.
const TICK: Duration = Duration::from_millis(20);
/// The most frames of one message.
const MOST_FRAMES: usize = 64;
/// The most that is carried, in bytes: a quarter of a second at 1 Gbit/s.
const MOST_BYTES: u64 = 32 << 20;

/// A relay.
struct Relaying<'a> {
    ports: Box<dyn FormerPorts>,
    control: Arc<dyn ControlChannel<ControlMessage>>,
    clock: &'a dyn Clock,
    limit: Duration,
    over: &'a AtomicBool,
    report: RelayReport,
}

impl Relaying<'_> {
    fn run(mut self) -> RelayReport {
        let began = self.clock.now();
        let ended = self.carry(began);
        self.report.lasted_ns = self.clock.now().saturating_sub(began).as_nanos() as u64;
        if let Err(error) = ended {
            tracing::warn!("frames are relayed no more: {error}");
            self.report.error = error.to_string();
        }
        self.report
    }

    fn carry(&mut self, began: Duration) -> io::Result<()> {
        let mut frames = Vec::new();
        loop {
            self.ports.take(&mut frames, MOST_FRAMES, Duration::ZERO)?;
            if frames.is_empty() {
                break;
            }
            self.send(std::mem::take(&mut frames), false)?;
        }
        self.say(&ControlMessage::CaughtUp)?;
        let mut heard = began;
        while !self.over.load(Ordering::Acquire) {
            self.ports.take(&mut frames, MOST_FRAMES, TICK)?;
            let now = self.clock.now();
            // What is for a group comes to the VM's new place by itself.
            frames.retain(RelayedFrame::is_unicast);
            if !frames.is_empty() {
                heard = now;
                self.send(std::mem::take(&mut frames), true)?;
            }
            if now.saturating_sub(heard) >= QUIET || now.saturating_sub(began) >= self.limit {
                break;
            }
        }
        self.say(&ControlMessage::RelayOver)
    }

    fn send(&mut self, mut frames: Vec<RelayedFrame>, late: bool) -> io::Result<()> {
        let report = &mut self.report;
        frames.retain(|frame| {
            let fits = report.bytes + frame.bytes.len() as u64 <= MOST_BYTES;
            if fits {
                report.frames += 1;
                report.bytes += frame.bytes.len() as u64;
                report.late_frames += u64::from(late);
            } else {
                report.dropped_frames += 1;
            }
            fits
        });
        if frames.is_empty() { Ok(()) } else { self.say(&ControlMessage::Frames(frames)) }
    }

    fn say(&self, message: &ControlMessage) -> io::Result<()> {
        self.control.send(message).map_err(io::Error::other)
    }
}

impl Source<'_> {
    /// The VM's ports, if what comes to them is to be carried on.
    pub(super) fn former_ports(&mut self) -> Option<Box<dyn FormerPorts>> {
        if self.options.relay.is_zero() {
            return None;
        }
        self.machine.former_ports().unwrap_or_else(|error| {
            tracing::warn!(migration = %self.id, "nothing will be relayed: {error}");
            None
        })
    }

    /// The VM goes on here: what came while it stood is its own.
    pub(super) fn give_frames_back(&mut self, progress: &mut Progress) {
        let Some(mut ports) = progress.ports.take() else { return };
        for frames in ports.give_back().chunks(MOST_FRAMES) {
            if let Err(error) = self.machine.relay(frames.to_vec()) {
                tracing::warn!(migration = %self.id, "frames that came while the VM stood are lost: {error}");
                return;
            }
        }
    }

    /// The VM runs at the target: does `work`, and relays meanwhile, and as long afterwards as that is of use.
    pub(super) fn beside_relay<R: Send>(
        &mut self,
        progress: &mut Progress,
        work: impl FnOnce(&mut Self, &mut Progress) -> R + Send,
    ) -> R {
        let Some(ports) = progress.ports.take() else { return work(self, progress) };
        let over = AtomicBool::new(false);
        let relaying = Relaying {
            ports,
            control: self.link.control(),
            clock: self.clock,
            limit: self.options.relay,
            over: &over,
            report: RelayReport::default(),
        };
        let (clock, mut report, mut result) = (self.clock, None, None);
        let job: Job<'_> = Box::new(|| report = Some(relaying.run()));
        let lead = || {
            result = Some(work(self, progress));
            if self.cancel.is_set() {
                over.store(true, Ordering::Release);
            }
        };
        clock.run_beside(vec![job], Box::new(lead));
        progress.relay = report;
        match result {
            Some(result) => result,
            None => unreachable!("the lead has returned"),
        }
    }
}
