//! Blocking netlink sockets: dumps, changes and notifications (RFC 3549; netlink(7)), of rtnetlink (rtnetlink(7)) and of the families of generic netlink (include/uapi/linux/genetlink.h).
//!
//! Owns the framing of requests and answers and the loss of notifications. Must not know what the messages mean. Blocking
//! on purpose: waiting for a forwarding table belongs to threads that have entered a namespace.

use std::fmt::Debug;
use std::io;
use std::marker::PhantomData;
use std::time::Duration;

use netlink_packet_generic::GenlMessage;
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use rtnetlink::sys::protocols::{NETLINK_GENERIC, NETLINK_ROUTE};
use rtnetlink::sys::{Socket, SocketAddr};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::NetError;
use crate::time::monotonic_now;

/// The kernel fills a dump's datagram up to 32 KiB.
const DATAGRAM_BYTES: usize = 64 << 10;
/// An answer of the kernel to a request is immediate; this only keeps a bug from hanging a migration.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// A dump is restarted this often when the table changes under it.
const DUMP_TRIES: u32 = 16;
/// Old events are dropped for at most this long.
const DISCARD_LIMIT: Duration = Duration::from_millis(20);
/// Room for bursts of notifications, in bytes.
const EVENT_BUFFER_BYTES: i32 = 1 << 20;
const CAPABILITY: &str = "CAP_NET_ADMIN";

/// What is asked for and answered.
pub(super) trait Object: NetlinkSerializable + NetlinkDeserializable + Clone + Debug {}

impl<T: NetlinkSerializable + NetlinkDeserializable + Clone + Debug> Object for T {}

/// Requests and their answers.
pub(super) struct Requests<T = RouteNetlinkMessage> {
    socket: Socket,
    sequence: u32,
    objects: PhantomData<T>,
}

impl Requests {
    /// To rtnetlink.
    pub(super) fn open() -> Result<Self, NetError> {
        Self::to(NETLINK_ROUTE, "open rtnetlink")
    }
}

impl<F: Debug> Requests<GenlMessage<F>>
where
    GenlMessage<F>: Object,
{
    /// To a family of generic netlink.
    pub(super) fn open_generic() -> Result<Self, NetError> {
        Self::to(NETLINK_GENERIC, "open generic netlink")
    }
}

impl<T: Object> Requests<T> {
    fn to(protocol: isize, action: &str) -> Result<Self, NetError> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(protocol)?;
            socket.bind_auto()?;
            Ok(socket)
        };
        let socket = open().map_err(|e| NetError::from_io(action, CAPABILITY, e))?;
        Ok(Self { socket, sequence: 0, objects: PhantomData })
    }

    /// All objects of a table. Taken again from the start if the table changed meanwhile.
    pub(super) fn dump(&mut self, request: &T, action: &str) -> Result<Vec<T>, NetError> {
        let fail = |source| NetError::from_io(action, CAPABILITY, source);
        for _ in 0..DUMP_TRIES {
            if let Some(objects) = self.try_dump(request.clone()).map_err(fail)? {
                return Ok(objects);
            }
        }
        Err(fail(io::Error::other("the table kept changing while it was read")))
    }

    /// Asks for a change; returns when the kernel has made it.
    pub(super) fn change(&mut self, request: T, flags: u16, action: &str) -> Result<(), NetError> {
        self.ask(request, flags, action).map(drop)
    }

    /// Asks for one thing; what is answered until the kernel says that it is done.
    pub(super) fn ask(&mut self, request: T, flags: u16, action: &str) -> Result<Vec<T>, NetError> {
        let fail = |source| NetError::from_io(action, CAPABILITY, source);
        let sequence = self.send(request, NLM_F_REQUEST | NLM_F_ACK | flags).map_err(fail)?;
        let mut objects = Vec::new();
        loop {
            for message in receive::<T>(&self.socket, ANSWER_LIMIT).map_err(fail)?.ok_or_else(|| fail(late()))? {
                if message.header.sequence_number != sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(object) => objects.push(object),
                    NetlinkPayload::Error(answer) if answer.code.is_none() => return Ok(objects),
                    NetlinkPayload::Error(answer) => return Err(fail(answer.to_io())),
                    _ => {}
                }
            }
        }
    }

    fn send(&mut self, request: T, flags: u16) -> io::Result<u32> {
        self.sequence += 1;
        let mut message = NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::InnerMessage(request));
        message.header.flags = flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        Ok(self.sequence)
    }

    /// `None` if the dump was torn.
    fn try_dump(&mut self, request: T) -> io::Result<Option<Vec<T>>> {
        let sequence = self.send(request, NLM_F_REQUEST | NLM_F_DUMP)?;
        let (mut objects, mut torn) = (Vec::new(), false);
        loop {
            for message in receive::<T>(&self.socket, ANSWER_LIMIT)?.ok_or_else(late)? {
                if message.header.sequence_number != sequence {
                    continue; // Left over from a dump that failed half-way.
                }
                torn |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(object) => objects.push(object),
                    NetlinkPayload::Done(_) => return Ok((!torn).then_some(objects)),
                    NetlinkPayload::Error(answer) => return Err(answer.to_io()),
                    _ => {}
                }
            }
        }
    }
}

fn late() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the kernel did not answer")
}

/// What a subscription yields.
pub(super) enum Event {
    /// A notification, and when it was taken from the socket (`CLOCK_MONOTONIC`).
    Message(RouteNetlinkMessage, Duration),
    /// Notifications were lost or could not be read: read the table again.
    Lost,
}

/// A subscription to one multicast group; events queue from its opening on.
pub(super) struct Events {
    socket: Socket,
    queue: std::collections::VecDeque<Event>,
}

impl Events {
    /// Subscribes to an rtnetlink group (`RTNLGRP_*`).
    pub(super) fn open(group: u32) -> Result<Self, NetError> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.set_rx_buf_sz(EVENT_BUFFER_BYTES)?;
            socket.add_membership(group)?;
            Ok(socket)
        };
        let socket = open().map_err(|e| NetError::from_io("subscribe to rtnetlink", CAPABILITY, e))?;
        Ok(Self { socket, queue: std::collections::VecDeque::new() })
    }

    /// Drops the events that have come so far, but not for ever when they keep coming.
    pub(super) fn discard_pending(&mut self) -> Result<(), NetError> {
        let enough = monotonic_now() + DISCARD_LIMIT;
        while monotonic_now() < enough && self.next(Duration::ZERO)?.is_some() {}
        Ok(())
    }

    /// The next event; `None` if there is none until `deadline` (`CLOCK_MONOTONIC`).
    pub(super) fn next(&mut self, deadline: Duration) -> Result<Option<Event>, NetError> {
        loop {
            if let Some(event) = self.queue.pop_front() {
                return Ok(Some(event));
            }
            let left = deadline.saturating_sub(monotonic_now());
            match receive(&self.socket, left) {
                Ok(None) => return Ok(None),
                Ok(Some(messages)) => {
                    let now = monotonic_now();
                    self.queue.extend(messages.into_iter().filter_map(|message| match message.payload {
                        NetlinkPayload::InnerMessage(inner) => Some(Event::Message(inner, now)),
                        NetlinkPayload::Overrun(_) => Some(Event::Lost),
                        _ => None,
                    }));
                }
                // ENOBUFS: our queue overran. InvalidData: a message of a newer kernel that the parser does not know.
                Err(error)
                    if error.raw_os_error() == Some(libc::ENOBUFS) || error.kind() == io::ErrorKind::InvalidData =>
                {
                    return Ok(Some(Event::Lost));
                }
                Err(source) => return Err(NetError::from_io("read rtnetlink notifications", CAPABILITY, source)),
            }
        }
    }
}

/// One datagram of the kernel, taken apart; `None` if none came within `limit`.
fn receive<T: NetlinkDeserializable>(socket: &Socket, limit: Duration) -> io::Result<Option<Vec<NetlinkMessage<T>>>> {
    let mut bytes = Vec::with_capacity(DATAGRAM_BYTES);
    let deadline = monotonic_now() + limit;
    loop {
        let left = deadline.saturating_sub(monotonic_now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        bytes.clear();
        let (length, from) = socket.recv_from(&mut bytes, libc::MSG_TRUNC)?;
        if length > bytes.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a datagram larger than the kernel's own limit"));
        }
        // Port 0 is the kernel; other processes may send to us too.
        if from.port_number() == 0 {
            return split(&bytes).map(Some);
        }
    }
}

/// Takes a datagram apart into its messages.
fn split<T: NetlinkDeserializable>(mut bytes: &[u8]) -> io::Result<Vec<NetlinkMessage<T>>> {
    let invalid = |problem: String| io::Error::new(io::ErrorKind::InvalidData, problem);
    let mut messages = Vec::new();
    while !bytes.is_empty() {
        let message = NetlinkMessage::<T>::deserialize(bytes).map_err(|e| invalid(e.to_string()))?;
        let length = message.header.length as usize;
        if length == 0 {
            return Err(invalid("a message of length zero".to_owned()));
        }
        messages.push(message);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(messages)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The kernel is no attacker, but a parser that panics on a newer kernel's message would end a migration.
        #[test]
        fn no_datagram_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _parsed_or_refused = split::<RouteNetlinkMessage>(&bytes);
        }
    }
}
