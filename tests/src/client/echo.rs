//! A client of the guest's TCP echo service that keeps one connection for good.
//!
//! Sends `<n>\n` at a steady pace and expects `<n> <count> <tsc hex>\n`: each number once and in order, `count` (the
//! guest's own count of answers) growing by one. What TCP promises is thereby checked end to end: a guest that lost or
//! repeated bytes in a migration shows. Must not know of migration.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::gap::{Gap, GapMeter, monotonic_ns};

/// What the client has seen so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct EchoReport {
    /// Numbers sent.
    pub sent: u64,
    /// Numbers answered, each exactly once and in order unless `fault` says otherwise.
    pub answered: u64,
    /// The longest time between two answers.
    pub largest_gap: Gap,
    /// The longest time from a number's sending to its answer.
    pub largest_round_trip_ns: u64,
    /// The largest step of the guest's TSC between two answers, and the one before it.
    pub largest_tsc_step: u64,
    /// The first violation of the order, or how the connection ended before it was told to. Nothing is counted after it.
    pub fault: Option<String>,
}

#[derive(Debug, Default)]
struct State {
    report: EchoReport,
    gaps: GapMeter,
    /// When each unanswered number was sent, oldest first.
    in_flight_ns: VecDeque<u64>,
    last_count: Option<u64>,
    last_tsc: Option<u64>,
}

impl State {
    /// Takes one answer.
    fn answer(&mut self, line: &str, now_ns: u64) -> Result<()> {
        let mut words = line.split_ascii_whitespace();
        let (number, count, tsc) = (words.next(), words.next(), words.next());
        let (Some(number), Some(count), Some(tsc), None) = (number, count, tsc, words.next()) else {
            bail!("answer `{line}` is not `<n> <count> <tsc hex>`");
        };
        let number: u64 = number.parse().with_context(|| format!("number in `{line}`"))?;
        let count: u64 = count.parse().with_context(|| format!("count in `{line}`"))?;
        let tsc = u64::from_str_radix(tsc.trim_start_matches("0x"), 16).with_context(|| format!("tsc in `{line}`"))?;
        let expected = self.report.answered;
        if number != expected {
            bail!("answer {number} came where {expected} was due");
        }
        if let Some(last) = self.last_count.replace(count)
            && count != last.wrapping_add(1)
        {
            bail!("the guest counted {count} answers after {last}");
        }
        if let Some(last) = self.last_tsc.replace(tsc) {
            if tsc < last {
                bail!("the guest's TSC went back from {last:#x} to {tsc:#x}");
            }
            self.report.largest_tsc_step = self.report.largest_tsc_step.max(tsc - last);
        }
        let Some(sent_ns) = self.in_flight_ns.pop_front() else {
            bail!("answer {number} came before the question");
        };
        self.report.largest_round_trip_ns = self.report.largest_round_trip_ns.max(now_ns.saturating_sub(sent_ns));
        self.gaps.event(now_ns);
        self.report.answered += 1;
        Ok(())
    }

    fn fault(&mut self, fault: String) {
        self.report.fault.get_or_insert(fault);
    }

    fn snapshot(&self) -> EchoReport {
        EchoReport { largest_gap: self.gaps.largest(), ..self.report.clone() }
    }
}

/// One connection with its two threads.
#[derive(Debug)]
pub struct EchoClient {
    stream: TcpStream,
    state: Arc<Mutex<State>>,
    stop_sending: Arc<AtomicBool>,
    sender: Option<JoinHandle<()>>,
    receiver: Option<JoinHandle<()>>,
}

impl EchoClient {
    /// Connects and starts to send a number every `interval`.
    ///
    /// # Errors
    /// No connection within ten seconds.
    pub fn start(server: SocketAddr, interval: Duration) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&server, Duration::from_secs(10))
            .with_context(|| format!("connect to the echo service at {server}"))?;
        stream.set_nodelay(true)?;
        let state = Arc::new(Mutex::new(State::default()));
        let stop_sending = Arc::new(AtomicBool::new(false));
        let sender = thread::spawn({
            let (mut stream, state, stop) = (stream.try_clone()?, Arc::clone(&state), Arc::clone(&stop_sending));
            move || send_loop(&mut stream, &state, &stop, interval)
        });
        let receiver = thread::spawn({
            let (stream, state, stop) = (stream.try_clone()?, Arc::clone(&state), Arc::clone(&stop_sending));
            move || receive_loop(stream, &state, &stop)
        });
        Ok(Self { stream, state, stop_sending, sender: Some(sender), receiver: Some(receiver) })
    }

    /// What was seen so far.
    pub fn report(&self) -> EchoReport {
        lock(&self.state).snapshot()
    }

    /// The gap in which `at_ns` (`CLOCK_MONOTONIC`) lies, if it is among the longest since the last
    /// [`EchoClient::restart_measurement`].
    pub fn gap_at(&self, at_ns: u64) -> Option<Gap> {
        self.longest_gaps().into_iter().find(|gap| gap.holds(at_ns))
    }

    /// The longest gaps since the last [`EchoClient::restart_measurement`], longest first.
    pub fn longest_gaps(&self) -> Vec<Gap> {
        lock(&self.state).gaps.longest().to_vec()
    }

    /// Starts a new measurement of the largest gap, round trip and TSC step on the same connection; a gap that is open
    /// now counts whole into the new one.
    pub fn restart_measurement(&self) {
        let mut state = lock(&self.state);
        state.gaps.restart();
        state.report.largest_round_trip_ns = 0;
        state.report.largest_tsc_step = 0;
    }

    /// Waits until `count` more answers have come than now.
    ///
    /// # Errors
    /// They did not come within `limit`, or the connection is at fault.
    pub fn wait_answers(&self, count: u64, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        let goal = self.report().answered + count;
        loop {
            let report = self.report();
            if report.answered >= goal {
                return Ok(());
            }
            if let Some(fault) = report.fault {
                bail!("echo connection: {fault}");
            }
            if Instant::now() >= deadline {
                bail!("{} of {goal} answers after {limit:?}", report.answered);
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Stops sending, waits up to `limit` for what is still in flight, closes, and reports. Answers that did not come
    /// are a fault.
    pub fn finish(mut self, limit: Duration) -> EchoReport {
        self.stop_sending.store(true, Ordering::Release);
        join(&mut self.sender);
        let deadline = Instant::now() + limit;
        loop {
            let report = self.report();
            if report.answered == report.sent || report.fault.is_some() {
                break;
            }
            if Instant::now() >= deadline {
                let missing = report.sent - report.answered;
                lock(&self.state).fault(format!("{missing} answers were still missing after {limit:?}"));
                break;
            }
            thread::sleep(Duration::from_millis(1));
        }
        self.report()
    }
}

impl Drop for EchoClient {
    fn drop(&mut self) {
        self.stop_sending.store(true, Ordering::Release);
        // Ends both threads' blocking calls.
        let _closed_already = self.stream.shutdown(Shutdown::Both);
        join(&mut self.sender);
        join(&mut self.receiver);
    }
}

fn send_loop(stream: &mut TcpStream, state: &Mutex<State>, stop: &AtomicBool, interval: Duration) {
    let start = Instant::now();
    for number in 0u64.. {
        // By the schedule, not by the last sending: a stalled socket is followed by a burst, as of a busy client.
        let due = interval.saturating_mul(u32::try_from(number).unwrap_or(u32::MAX));
        if let Some(early) = due.checked_sub(start.elapsed()) {
            thread::sleep(early);
        }
        if stop.load(Ordering::Acquire) {
            return;
        }
        {
            let mut state = lock(state);
            if state.report.fault.is_some() {
                return;
            }
            state.in_flight_ns.push_back(monotonic_ns());
            state.report.sent += 1;
        }
        if let Err(error) = stream.write_all(format!("{number}\n").as_bytes()) {
            if !stop.load(Ordering::Acquire) {
                lock(state).fault(format!("sending number {number}: {error}"));
            }
            return;
        }
    }
}

fn receive_loop(stream: TcpStream, state: &Mutex<State>, stop: &AtomicBool) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    loop {
        line.clear();
        let result = reader.read_line(&mut line);
        let now_ns = monotonic_ns();
        let mut state = lock(state);
        let fault = match result {
            Ok(0) if stop.load(Ordering::Acquire) && state.report.answered == state.report.sent => return,
            Ok(0) => "the server closed the connection".to_owned(),
            Ok(_) => match state.answer(line.trim_end(), now_ns) {
                Ok(()) => continue,
                Err(error) => format!("{error:#}"),
            },
            Err(error) => format!("receiving: {error}"),
        };
        state.fault(fault);
        return;
    }
}

fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    // A panic in a client thread must not hide what it measured.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn join(thread: &mut Option<JoinHandle<()>>) {
    if let Some(thread) = thread.take() {
        let _panicked_and_printed = thread.join();
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// Serves one connection; `answer` turns the k-th line into the reply, or ends the connection.
    fn server(answer: impl Fn(u64, &str) -> Option<String> + Send + 'static) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut writer = stream.try_clone().unwrap();
            for (k, line) in BufReader::new(stream).lines().enumerate() {
                let Ok(line) = line else { return };
                let Some(reply) = answer(k as u64, &line) else { return };
                if writer.write_all(reply.as_bytes()).is_err() {
                    return;
                }
            }
        });
        address
    }

    #[test]
    fn a_pause_of_the_server_is_the_largest_gap() {
        let pause = Duration::from_millis(60);
        let address = server(move |k, line| {
            if k == 20 {
                thread::sleep(pause);
            }
            Some(format!("{line} {} {:x}\n", k + 7, 1000 + k * 10))
        });
        let client = EchoClient::start(address, Duration::from_millis(1)).unwrap();
        client.wait_answers(30, Duration::from_secs(10)).unwrap();
        assert!(client.report().largest_gap.length() >= pause);
        assert!(client.report().largest_round_trip_ns >= pause.as_nanos() as u64 / 2);
        client.restart_measurement();
        client.wait_answers(10, Duration::from_secs(10)).unwrap();
        let report = client.finish(Duration::from_secs(10));
        assert_eq!((report.fault, report.answered), (None, report.sent));
        assert!(report.largest_gap.length() < pause, "{:?}", report.largest_gap);
        assert_eq!(report.largest_tsc_step, 10);
    }

    #[test]
    fn every_kind_of_wrong_answer_is_a_fault() {
        type Answer = fn(u64, &str) -> Option<String>;
        let cases: [(Answer, &str); 6] = [
            (|k, line| Some(format!("{line} {k} {k:x}\n").repeat(if k == 3 { 2 } else { 1 })), "was due"),
            (|k, line| if k == 3 { Some(String::new()) } else { Some(format!("{line} {k} {k:x}\n")) }, "was due"),
            (|k, line| Some(format!("{line} {} {k:x}\n", if k == 3 { 9 } else { k })), "counted"),
            (|k, line| Some(format!("{line} {k} {:x}\n", if k == 3 { 0 } else { k + 9 })), "TSC went back"),
            (|_, _| Some("what\n".to_owned()), "is not"),
            (|k, line| (k < 3).then(|| format!("{line} {k} {k:x}\n")), "closed"),
        ];
        for (answer, words) in cases {
            let client = EchoClient::start(server(answer), Duration::from_millis(1)).unwrap();
            assert!(client.wait_answers(1000, Duration::from_secs(10)).is_err());
            let fault = client.finish(Duration::from_millis(10)).fault.unwrap();
            assert!(fault.contains(words), "{fault} should say `{words}`");
        }
    }

    #[test]
    fn silence_at_the_end_is_a_fault() {
        let address = server(|k, line| Some(if k < 5 { format!("{line} {k} {k:x}\n") } else { String::new() }));
        let client = EchoClient::start(address, Duration::from_millis(1)).unwrap();
        client.wait_answers(5, Duration::from_secs(10)).unwrap();
        thread::sleep(Duration::from_millis(5));
        let report = client.finish(Duration::from_millis(20));
        assert!(report.fault.unwrap().contains("still missing"));
    }
}
