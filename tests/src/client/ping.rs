//! Echoes at a steady pace, of ICMP or of UDP: what is lost, repeated and late.
//!
//! ICMP takes raw sockets (the ping socket's group range is empty in new namespaces), so it needs CAP_NET_RAW. Numbers are 64 bits
//! in the payload; ICMP's own sequence number is their low half-word.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use etherparse::{IcmpEchoHeader, Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, Ipv4HeaderSlice};
use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};

use super::gap::{Gap, GapMeter, monotonic_ns};

/// "dunlin" and two bytes of version in front of the number and the sending time.
const MAGIC: [u8; 8] = *b"dunlin\0\x01";
const PAYLOAD_BYTES: usize = 24;
/// Room for what has come and was not read.
const RECEIVE_BYTES: usize = 16 << 20;
/// How often a waiting receiver looks whether it should end.
const RECEIVE_SLICE: Duration = Duration::from_millis(20);

static NEXT_ID: AtomicU16 = AtomicU16::new(0);

/// What the pinger has seen so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PingReport {
    /// Requests that left.
    pub sent: u64,
    /// Requests that the kernel refused to send (no route, no neighbour).
    pub refused: u64,
    /// Distinct replies.
    pub answered: u64,
    /// Replies to a number already answered.
    pub duplicates: u64,
    /// Replies that came after the reply to a later number.
    pub reordered: u64,
    /// Numbers without a reply (after [`Pinger::finish`]: lost; before: perhaps under way).
    pub unanswered: Vec<u64>,
    /// The longest time between two replies.
    pub largest_gap: Gap,
    /// The longest round trip.
    pub largest_round_trip_ns: u64,
}

#[derive(Debug, Default)]
struct State {
    report: PingReport,
    gaps: GapMeter,
    unanswered: BTreeSet<u64>,
    highest: Option<u64>,
}

impl State {
    fn reply(&mut self, number: u64, sent_ns: u64, now_ns: u64) {
        if number >= self.report.sent {
            return; // Not a number of ours: somebody else's packet with our magic.
        }
        if !self.unanswered.remove(&number) {
            self.report.duplicates += 1;
            return;
        }
        if self.highest.is_some_and(|highest| number < highest) {
            self.report.reordered += 1;
        }
        self.highest = self.highest.max(Some(number));
        self.report.answered += 1;
        self.report.largest_round_trip_ns = self.report.largest_round_trip_ns.max(now_ns.saturating_sub(sent_ns));
        self.gaps.event(now_ns);
    }
}

/// Pings until it is finished or dropped.
#[derive(Debug)]
pub struct Pinger {
    state: Arc<Mutex<State>>,
    stop_sending: Arc<AtomicBool>,
    stop_receiving: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Pinger {
    /// Starts to ping `target` every `interval`.
    ///
    /// # Errors
    /// No right to open raw sockets.
    pub fn start(target: IpAddr, interval: Duration) -> Result<Self> {
        let (domain, protocol) = match target {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        let socket = Socket::new(domain, Type::RAW, Some(protocol)).context("raw ICMP socket (needs CAP_NET_RAW)")?;
        // Distinguishes pingers of one process, and most likely of two.
        let id = (std::process::id() as u16).wrapping_add(NEXT_ID.fetch_add(1, Ordering::Relaxed).wrapping_mul(257));
        Self::send_to(socket, SocketAddr::new(target, 0), Form::Icmp { id }, interval)
    }

    /// Starts to send packets to the UDP echo service at `target` every `interval`.
    ///
    /// # Errors
    /// No socket is left.
    pub fn start_udp(target: SocketAddr, interval: Duration) -> Result<Self> {
        let socket =
            Socket::new(Domain::for_address(target), Type::DGRAM, Some(Protocol::UDP)).context("UDP socket")?;
        Self::send_to(socket, target, Form::Udp, interval)
    }

    fn send_to(socket: Socket, target: SocketAddr, form: Form, interval: Duration) -> Result<Self> {
        socket.set_read_timeout(Some(RECEIVE_SLICE))?;
        // What a VM answers at once that stood for a while is not to be dropped here.
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, RECEIVE_BYTES)?;
        let receiver_socket = socket.try_clone()?;
        let state = Arc::new(Mutex::new(State::default()));
        let (stop_sending, stop_receiving) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let sender = thread::spawn({
            let (state, stop) = (Arc::clone(&state), Arc::clone(&stop_sending));
            move || send_loop(&socket, target, form, interval, &state, &stop)
        });
        let receiver = thread::spawn({
            let (state, stop) = (Arc::clone(&state), Arc::clone(&stop_receiving));
            move || receive_loop(&receiver_socket, target, form, &state, &stop)
        });
        Ok(Self { state, stop_sending, stop_receiving, threads: vec![sender, receiver] })
    }

    /// What was seen so far.
    pub fn report(&self) -> PingReport {
        let state = lock(&self.state);
        PingReport {
            unanswered: state.unanswered.iter().copied().collect(),
            largest_gap: state.gaps.largest(),
            ..state.report.clone()
        }
    }

    /// The longest gaps since the last [`Pinger::restart_measurement`], longest first.
    pub fn longest_gaps(&self) -> Vec<Gap> {
        lock(&self.state).gaps.longest().to_vec()
    }

    /// Starts a new measurement of the largest gap and round trip; an open gap counts whole into the new one.
    pub fn restart_measurement(&self) {
        let mut state = lock(&self.state);
        state.gaps.restart();
        state.report.largest_round_trip_ns = 0;
    }

    /// Stops sending, waits up to `limit` for replies under way, and reports.
    pub fn finish(self, limit: Duration) -> PingReport {
        self.stop_sending.store(true, Ordering::Release);
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            // The sender's last packet is counted before it leaves, so an empty set after it ended is final.
            if self.threads[0].is_finished() && lock(&self.state).unanswered.is_empty() {
                break;
            }
            thread::sleep(Duration::from_millis(1));
        }
        self.report()
    }
}

impl Drop for Pinger {
    fn drop(&mut self) {
        self.stop_sending.store(true, Ordering::Release);
        self.stop_receiving.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            let _panicked_and_printed = thread.join();
        }
    }
}

fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is sent, and comes back.
#[derive(Clone, Copy, Debug)]
enum Form {
    /// Echo requests of ICMP.
    Icmp { id: u16 },
    /// Packets of UDP.
    Udp,
}

fn send_loop(
    socket: &Socket,
    target: SocketAddr,
    form: Form,
    interval: Duration,
    state: &Mutex<State>,
    stop: &AtomicBool,
) {
    let address = target.into();
    let start = Instant::now();
    let mut slot = 0u32;
    loop {
        if let Some(early) = interval.saturating_mul(slot).checked_sub(start.elapsed()) {
            thread::sleep(early);
        }
        slot = slot.saturating_add(1);
        if stop.load(Ordering::Acquire) {
            return;
        }
        let number = {
            let mut state = lock(state);
            let number = state.report.sent;
            state.report.sent += 1;
            state.unanswered.insert(number);
            number
        };
        if socket.send_to(&request(target.ip(), form, number, monotonic_ns()), &address).is_err() {
            // Counted as sent and never answered would read as loss in the network; it never left.
            let mut state = lock(state);
            state.unanswered.remove(&number);
            state.report.refused += 1;
        }
    }
}

fn receive_loop(socket: &Socket, target: SocketAddr, form: Form, state: &Mutex<State>, stop: &AtomicBool) {
    let mut buffer = [MaybeUninit::<u8>::uninit(); 2048];
    while !stop.load(Ordering::Acquire) {
        let (length, from) = match socket.recv_from(&mut buffer) {
            Ok(received) => received,
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) =>
            {
                continue;
            }
            Err(error) => {
                eprintln!("pinger: {error}");
                return;
            }
        };
        let now_ns = monotonic_ns();
        if from.as_socket().map(|from| from.ip()) != Some(target.ip()) {
            continue;
        }
        // SAFETY: the kernel has written the first `length` bytes.
        let packet = unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast::<u8>(), length) };
        if let Some((number, sent_ns)) = reply(target.ip(), form, packet) {
            lock(state).reply(number, sent_ns, now_ns);
        }
    }
}

/// An echo request with its payload.
fn request(target: IpAddr, form: Form, number: u64, now_ns: u64) -> Vec<u8> {
    let mut payload = [0; PAYLOAD_BYTES];
    payload[..8].copy_from_slice(&MAGIC);
    payload[8..16].copy_from_slice(&number.to_be_bytes());
    payload[16..].copy_from_slice(&now_ns.to_be_bytes());
    let Form::Icmp { id } = form else { return payload.to_vec() };
    let echo = IcmpEchoHeader { id, seq: number as u16 };
    let mut packet = match target {
        IpAddr::V4(_) => Icmpv4Header::with_checksum(Icmpv4Type::EchoRequest(echo), &payload).to_bytes().to_vec(),
        // The kernel fills in the checksum of raw ICMPv6 (RFC 3542 §3.1).
        IpAddr::V6(_) => Icmpv6Header::new(Icmpv6Type::EchoRequest(echo)).to_bytes().to_vec(),
    };
    packet.extend_from_slice(&payload);
    packet
}

/// Number and sending time of a reply to us; `None` for anything else.
fn reply(target: IpAddr, form: Form, packet: &[u8]) -> Option<(u64, u64)> {
    let Form::Icmp { id } = form else { return numbers(packet) };
    let (echo, payload) = match target {
        IpAddr::V4(_) => {
            let ip = Ipv4HeaderSlice::from_slice(packet).ok()?;
            let (header, payload) = Icmpv4Header::from_slice(packet.get(ip.slice().len()..)?).ok()?;
            let Icmpv4Type::EchoReply(echo) = header.icmp_type else { return None };
            (echo, payload)
        }
        IpAddr::V6(_) => {
            let (header, payload) = Icmpv6Header::from_slice(packet).ok()?;
            let Icmpv6Type::EchoReply(echo) = header.icmp_type else { return None };
            (echo, payload)
        }
    };
    if echo.id == id { numbers(payload) } else { None }
}

/// Number and sending time in a payload of ours.
fn numbers(payload: &[u8]) -> Option<(u64, u64)> {
    if payload.len() != PAYLOAD_BYTES || payload[..8] != MAGIC {
        return None;
    }
    let word = |at: usize| Some(u64::from_be_bytes(payload.get(at..at + 8)?.try_into().ok()?));
    Some((word(8)?, word(16)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_loses_nothing() {
        for target in ["127.0.0.1", "::1"] {
            let pinger = Pinger::start(target.parse().unwrap(), Duration::from_millis(1)).unwrap();
            let deadline = Instant::now() + Duration::from_secs(10);
            while pinger.report().answered < 20 {
                assert!(Instant::now() < deadline, "{target}: {:?}", pinger.report());
                thread::sleep(Duration::from_millis(1));
            }
            let report = pinger.finish(Duration::from_secs(5));
            assert_eq!((report.unanswered.len(), report.duplicates, report.refused), (0, 0, 0), "{target}");
            assert!(report.largest_gap.length_ns > 0 && report.largest_round_trip_ns > 0);
        }
    }

    #[test]
    fn udp_is_numbered_like_pings() {
        let echo = std::net::UdpSocket::bind("[::1]:0").unwrap();
        let target = echo.local_addr().unwrap();
        let server = thread::spawn(move || {
            let mut packet = [0; 100];
            for turn in 0..20 {
                let (len, from) = echo.recv_from(&mut packet).unwrap();
                // The fourth is lost, the tenth answered twice.
                for _ in 0..[1, usize::from(turn != 3), 1 + usize::from(turn == 9)].into_iter().product() {
                    echo.send_to(&packet[..len], from).unwrap();
                }
            }
        });
        let pinger = Pinger::start_udp(target, Duration::from_millis(1)).unwrap();
        server.join().unwrap();
        let report = pinger.finish(Duration::from_millis(200));
        assert_eq!((report.duplicates, report.reordered, report.unanswered.first()), (1, 0, Some(&3)), "{report:?}");
    }

    #[test]
    fn loss_duplicates_and_reordering_are_told_apart() {
        let mut state = State::default();
        state.report.sent = 5;
        state.unanswered = (0..5).collect();
        for (number, now_ns) in [(0, 100), (2, 200), (1, 210), (1, 220), (4, 300), (9, 400)] {
            state.reply(number, 90, now_ns);
        }
        let PingReport { answered, duplicates, reordered, .. } = state.report;
        assert_eq!((answered, duplicates, reordered), (4, 1, 1));
        assert_eq!(state.unanswered.into_iter().collect::<Vec<_>>(), [3]);
        assert_eq!(state.gaps.largest(), Gap { length_ns: 100, from_monotonic_ns: 100 });
    }
}
