//! The guest's heartbeat on its serial console: lines `HB <seq> <tsc hex>` among others.
//!
//! Owns: the largest step of the TSC between two beats (the pause as the guest itself saw it), and beats lost or
//! repeated. Fed from files, sockets or pipes; the same collector goes on when the console moves to another host's file.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

/// Lines that are no heartbeat are kept up to this many, the newest.
const OTHER_LINES_KEPT: usize = 256;

/// What the beats say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HeartbeatReport {
    /// Beats seen.
    pub beats: u64,
    /// Sequence numbers that were skipped.
    pub lost: u64,
    /// Beats whose sequence number was not above the last one's.
    pub repeated: u64,
    /// Lines that began as a beat but could not be read (a console cut in the middle of a line).
    pub damaged: u64,
    /// The largest step of the TSC between two beats.
    pub largest_tsc_step: u64,
    /// The sequence number of the beat after that step.
    pub largest_step_at_seq: u64,
    /// Steps on which the TSC went back.
    pub tsc_went_back: u64,
}

impl HeartbeatReport {
    /// The largest gap as time, for a TSC of `tsc_hz`.
    pub fn largest_gap(&self, tsc_hz: u64) -> Duration {
        let ns = u128::from(self.largest_tsc_step) * 1_000_000_000 / u128::from(tsc_hz.max(1));
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
    }
}

/// Collects beats.
#[derive(Clone, Debug, Default)]
pub struct Heartbeats {
    report: HeartbeatReport,
    last: Option<(u64, u64)>,
    others: VecDeque<String>,
}

impl Heartbeats {
    /// Takes one line of console output.
    pub fn line(&mut self, line: &str) {
        let line = line.trim_end();
        let Some(rest) = line.strip_prefix("HB ") else {
            if self.others.len() == OTHER_LINES_KEPT {
                self.others.pop_front();
            }
            self.others.push_back(line.to_owned());
            return;
        };
        match parse(rest) {
            Some((seq, tsc)) => self.beat(seq, tsc),
            None => self.report.damaged += 1,
        }
    }

    /// Reads a whole console to its end. Bytes that are no UTF-8 are replaced; a last line without an end of line counts
    /// only if it is whole.
    ///
    /// # Errors
    /// The source fails.
    pub fn read_all(&mut self, source: impl Read) -> Result<()> {
        let mut reader = BufReader::new(source);
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            // Bounded: a console without line ends must not fill our memory.
            let length = (&mut reader).take(64 << 10).read_until(b'\n', &mut bytes).context("read the console")?;
            if length == 0 {
                return Ok(());
            }
            if bytes.last() == Some(&b'\n') {
                self.line(&String::from_utf8_lossy(&bytes));
            }
        }
    }

    /// What was seen so far.
    pub fn report(&self) -> HeartbeatReport {
        self.report
    }

    /// The newest lines that are no heartbeat.
    pub fn other_lines(&self) -> impl Iterator<Item = &str> {
        self.others.iter().map(String::as_str)
    }

    /// Forgets the largest step; an open one still counts whole when it ends.
    pub fn restart_measurement(&mut self) {
        self.report.largest_tsc_step = 0;
        self.report.largest_step_at_seq = 0;
    }

    fn beat(&mut self, seq: u64, tsc: u64) {
        self.report.beats += 1;
        if let Some((last_seq, last_tsc)) = self.last {
            if seq <= last_seq {
                self.report.repeated += 1;
                return;
            }
            self.report.lost += seq - last_seq - 1;
            match tsc.checked_sub(last_tsc) {
                Some(step) if step > self.report.largest_tsc_step => {
                    self.report.largest_tsc_step = step;
                    self.report.largest_step_at_seq = seq;
                }
                Some(_) => {}
                None => self.report.tsc_went_back += 1,
            }
        }
        self.last = Some((seq, tsc));
    }
}

fn parse(rest: &str) -> Option<(u64, u64)> {
    let (seq, tsc) = rest.split_once(' ')?;
    Some((seq.parse().ok()?, u64::from_str_radix(tsc.trim_start_matches("0x"), 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beats_across_two_consoles_yield_one_gap() {
        let mut beats = Heartbeats::default();
        beats.read_all(&b"boot\r\nHB 1 64\r\nHB 2 c8\r\nHB 3 1"[..]).unwrap();
        beats.read_all(&b"HB 3 1f4\nHB 5 258\nHB 5 258\nHB 6 200\nHB x\n"[..]).unwrap();
        let report = beats.report();
        assert_eq!(report.beats, 6);
        assert_eq!((report.lost, report.repeated, report.damaged, report.tsc_went_back), (1, 1, 1, 1));
        assert_eq!((report.largest_tsc_step, report.largest_step_at_seq), (300, 3));
        assert_eq!(report.largest_gap(1_000_000), Duration::from_micros(300));
        assert_eq!(beats.other_lines().collect::<Vec<_>>(), ["boot"]);
    }

    #[test]
    fn hostile_consoles_stay_bounded() {
        let mut beats = Heartbeats::default();
        beats.read_all(std::io::repeat(b'x').take(1 << 20)).unwrap();
        for _ in 0..10_000 {
            beats.line("noise");
        }
        beats.line("HB 18446744073709551615 ffffffffffffffff");
        beats.line("HB 0 0");
        assert_eq!(beats.other_lines().count(), OTHER_LINES_KEPT);
        assert_eq!(beats.report().repeated, 1);
    }
}
