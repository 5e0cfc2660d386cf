//! Owns the source of bytes: who connects to it gets the bytes 0 to 250, again and again, so many each millisecond. The pace is this side's: one that only the receiver's window sets comes in
//! steps of whatever that holds, and what waits there hides a silence.

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer};

use crate::clock;
use crate::once::Once;
use crate::web::reopen;

const PORT: u16 = 19;
/// Connections at a time.
const SOCKETS: usize = 2;
const SEND_BYTES: usize = 64 << 10;
const RECEIVE_BYTES: usize = 64;
/// A piece is due each millisecond of the guest's running: 16 Mbit/s.
const PIECE_BYTES: u64 = 2000;
/// What could not be sent in time is made up for up to so many.
const MOST_DUE: u64 = 16;
/// The bytes repeat after so many: a prime, so that no page or segment is a multiple of it.
const PERIOD: u64 = 251;

static RECEIVE: Once<[[u8; RECEIVE_BYTES]; SOCKETS]> = Once::new([[0; RECEIVE_BYTES]; SOCKETS]);
static SEND: Once<[[u8; SEND_BYTES]; SOCKETS]> = Once::new([[0; SEND_BYTES]; SOCKETS]);

/// The service.
pub struct Bulk {
    connections: [Connection; SOCKETS],
}

struct Connection {
    handle: SocketHandle,
    /// Bytes since it was made.
    offset: u64,
    /// Bytes that are due and not sent.
    due: u64,
    /// Until when pieces were counted, in cycles of running.
    counted: u64,
}

impl Bulk {
    /// Sockets that it adds.
    pub const SOCKETS: usize = SOCKETS;

    /// Listens.
    pub fn start(sockets: &mut SocketSet<'static>) -> Self {
        let mut buffers = RECEIVE.take().iter_mut().zip(SEND.take().iter_mut());
        let connections = core::array::from_fn(|_| {
            let (receive, send) = buffers.next().expect("a buffer for each socket");
            let mut socket = Socket::new(SocketBuffer::new(&mut receive[..]), SocketBuffer::new(&mut send[..]));
            socket.set_nagle_enabled(false);
            Connection { handle: sockets.add(socket), offset: 0, due: 0, counted: 0 }
        });
        Self { connections }
    }

    /// Goes on sending. Whether there is anything new to be sent, and the cycles until there is more if somebody takes it.
    pub fn serve(&mut self, sockets: &mut SocketSet<'static>, run_cycles: u64) -> (bool, Option<u64>) {
        let (mut sent, mut next) = (false, None);
        let piece = clock::cycles(1_000_000).max(1);
        for Connection { handle, offset, due, counted } in &mut self.connections {
            let socket = sockets.get_mut::<Socket>(*handle);
            if reopen(socket, PORT) {
                *offset = 0;
            }
            if !socket.may_send() {
                (*due, *counted) = (0, run_cycles);
                continue;
            }
            let pieces = run_cycles.saturating_sub(*counted) / piece;
            *counted += pieces * piece;
            *due = (*due + pieces * PIECE_BYTES).min(MOST_DUE * PIECE_BYTES);
            next = Some((*counted + piece - run_cycles).min(next.unwrap_or(piece)));
            while *due > 0 && socket.can_send() {
                let filled = socket.send(|room| {
                    let len = room.len().min(*due as usize);
                    for (byte, at) in room[..len].iter_mut().zip(*offset..) {
                        *byte = (at % PERIOD) as u8;
                    }
                    (len, len)
                });
                let Ok(bytes @ 1..) = filled else { break };
                *offset += bytes as u64;
                *due -= bytes as u64;
                sent = true;
            }
            // Nobody is expected to say anything; who has said that it sends no more wants no more.
            if !socket.may_recv() && socket.may_send() {
                socket.abort();
                sent = true;
            }
        }
        (sent, next)
    }
}
