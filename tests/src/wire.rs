//! The frames of one station that come in at one port of a switch, with their times.
//!
//! Owns a packet socket and the thread that reads it. Must not know of VMs: it shows in which order announcements and the
//! station's own traffic arrived.

use std::ffi::CString;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use dunlin::model::MacAddress;
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use socket2::{Domain, Socket, Type};

use crate::client::gap::monotonic_ns;

/// More are not kept: what matters is who came first.
const KEPT: usize = 64;
/// How often the reader looks whether it should end.
const SLICE: Duration = Duration::from_millis(20);

/// What a frame is, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FrameKind {
    /// Reverse ARP: the announcement that every switch learns from.
    Rarp,
    /// ARP whose sender and target are the same: an announcement to neighbours.
    GratuitousArp,
    /// Anything else: the station itself speaks.
    Traffic,
}

/// A frame and when it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SeenFrame {
    /// `CLOCK_MONOTONIC` when it arrived, by the kernel's stamp (of the other clock, moved by their difference at reading).
    pub at_monotonic_ns: u64,
    /// What it is.
    pub kind: FrameKind,
}

/// Reads until it is finished or dropped.
#[derive(Debug)]
pub struct WireWatch {
    seen: Arc<Mutex<Vec<SeenFrame>>>,
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

impl WireWatch {
    /// Starts to read what `station` sends in at `port`, an interface of the calling thread's network namespace.
    ///
    /// # Errors
    /// No such interface, or no right to (CAP_NET_RAW).
    pub fn start(port: &str, station: MacAddress) -> io::Result<Self> {
        let name = CString::new(port)?;
        // SAFETY: the name is a C string that lives through the call.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        if index == 0 {
            return Err(io::Error::last_os_error());
        }
        let every_protocol = (libc::ETH_P_ALL as u16).to_be();
        // With a protocol from the start it would hear every interface until it is bound.
        let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
        socket.set_read_timeout(Some(SLICE))?;
        // SAFETY: all-zero bytes are a valid `sockaddr_ll`, a plain C struct.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = every_protocol;
        address.sll_ifindex = index as i32;
        // SAFETY: the address is a whole `sockaddr_ll` of the length given.
        let bound = unsafe {
            libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as u32)
        };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        // The first question switches stamping on.
        let _no_stamp_yet = stamp_ns(&socket);
        let (seen, stop) = (Arc::default(), Arc::new(AtomicBool::new(false)));
        let reader = thread::spawn({
            let (seen, stop) = (Arc::clone(&seen), Arc::clone(&stop));
            move || read_loop(&socket, station, &seen, &stop)
        });
        Ok(Self { seen, stop, reader: Some(reader) })
    }

    /// Those that have come so far.
    pub fn frames(&self) -> Vec<SeenFrame> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The first frames, in the order of their arrival.
    pub fn finish(mut self) -> Vec<SeenFrame> {
        self.end();
        std::mem::take(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(reader) = self.reader.take() {
            let _panicked_and_printed = reader.join();
        }
    }
}

impl Drop for WireWatch {
    fn drop(&mut self) {
        self.end();
    }
}

/// `SIOCGSTAMPNS`: when the frame that was read last arrived, by `CLOCK_REALTIME`.
const SIOCGSTAMPNS: libc::c_ulong = 0x8907;

fn stamp_ns(socket: &Socket) -> Option<u64> {
    let mut stamp = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one `timespec`, which lives through it.
    let answer = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSTAMPNS, &raw mut stamp) };
    (answer == 0 && stamp.tv_sec > 0).then(|| stamp.tv_sec as u64 * 1_000_000_000 + stamp.tv_nsec as u64)
}

/// When the frame that was read last arrived; without a stamp, now.
fn arrival_ns(socket: &Socket) -> u64 {
    let now_ns = monotonic_ns();
    let realtime = clock_gettime(ClockId::Realtime);
    let realtime_ns = realtime.tv_sec as u64 * 1_000_000_000 + realtime.tv_nsec as u64;
    stamp_ns(socket).map_or(now_ns, |stamp_ns| now_ns.saturating_sub(realtime_ns.saturating_sub(stamp_ns)))
}

fn read_loop(socket: &Socket, station: MacAddress, seen: &Mutex<Vec<SeenFrame>>, stop: &AtomicBool) {
    let mut frame = [0u8; 2048];
    while !stop.load(Ordering::Acquire) {
        // SAFETY: all-zero bytes are a valid `sockaddr_ll`.
        let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut from_length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: buffer and address are ours, of the lengths given, and live through the call.
        let length = unsafe {
            libc::recvfrom(
                socket.as_raw_fd(),
                frame.as_mut_ptr().cast(),
                frame.len(),
                0,
                (&raw mut from).cast(),
                &raw mut from_length,
            )
        };
        let Ok(length) = usize::try_from(length) else {
            match io::Error::last_os_error().kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted => continue,
                _ => return,
            }
        };
        let at_monotonic_ns = arrival_ns(socket);
        // What the switch itself sends out of the port is not what the station sent in.
        if from.sll_pkttype == libc::PACKET_OUTGOING {
            continue;
        }
        let frame = &frame[..length.min(frame.len())];
        if frame.get(6..12) != Some(&station.bytes()[..]) {
            continue;
        }
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() < KEPT {
            seen.push(SeenFrame { at_monotonic_ns, kind: kind(frame) });
        }
    }
}

fn kind(frame: &[u8]) -> FrameKind {
    match frame.get(12..14) {
        Some([0x80, 0x35]) => FrameKind::Rarp,
        // Sender's and target's protocol address of an ARP for IPv4.
        Some([0x08, 0x06]) if frame.get(28..32).is_some() && frame.get(28..32) == frame.get(38..42) => {
            FrameKind::GratuitousArp
        }
        _ => FrameKind::Traffic,
    }
}

#[cfg(test)]
mod tests {
    use dunlin::announce::frames;

    use super::*;

    #[test]
    fn announcements_are_told_from_traffic() {
        let mac: MacAddress = "02:00:00:00:00:64".parse().unwrap();
        let ip = "10.77.0.100".parse().unwrap();
        assert_eq!(kind(frames::rarp(mac).bytes()), FrameKind::Rarp);
        assert_eq!(kind(frames::gratuitous_arp_request(mac, ip).bytes()), FrameKind::GratuitousArp);
        assert_eq!(kind(&[0; 60]), FrameKind::Traffic);
        assert_eq!(kind(&[]), FrameKind::Traffic);
    }
}
