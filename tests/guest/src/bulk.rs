//! Owns the source of bytes: who connects to it gets the bytes 0 to 250, again and again, as fast as it takes them.

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer};

use crate::once::Once;
use crate::web::reopen;

const PORT: u16 = 19;
/// Connections at a time.
const SOCKETS: usize = 2;
const SEND_BYTES: usize = 64 << 10;
const RECEIVE_BYTES: usize = 64;
/// The bytes repeat after so many: a prime, so that no page or segment is a multiple of it.
const PERIOD: u64 = 251;

static RECEIVE: Once<[[u8; RECEIVE_BYTES]; SOCKETS]> = Once::new([[0; RECEIVE_BYTES]; SOCKETS]);
static SEND: Once<[[u8; SEND_BYTES]; SOCKETS]> = Once::new([[0; SEND_BYTES]; SOCKETS]);

/// The service.
pub struct Bulk {
    connections: [(SocketHandle, u64); SOCKETS],
}

impl Bulk {
    /// Sockets that it adds.
    pub const SOCKETS: usize = SOCKETS;

    /// Listens.
    pub fn start(sockets: &mut SocketSet<'static>) -> Self {
        let mut buffers = RECEIVE.take().iter_mut().zip(SEND.take().iter_mut());
        let connections = core::array::from_fn(|_| {
            let (receive, send) = buffers.next().expect("a buffer for each socket");
            let socket = Socket::new(SocketBuffer::new(&mut receive[..]), SocketBuffer::new(&mut send[..]));
            (sockets.add(socket), 0)
        });
        Self { connections }
    }

    /// Goes on sending; whether there is anything new to be sent.
    pub fn serve(&mut self, sockets: &mut SocketSet<'static>) -> bool {
        let mut sent = false;
        for (handle, offset) in &mut self.connections {
            let socket = sockets.get_mut::<Socket>(*handle);
            if reopen(socket, PORT) {
                *offset = 0;
            }
            while socket.can_send() {
                let filled = socket.send(|room| {
                    for (byte, at) in room.iter_mut().zip(*offset..) {
                        *byte = (at % PERIOD) as u8;
                    }
                    (room.len(), room.len())
                });
                let Ok(bytes @ 1..) = filled else { break };
                *offset += bytes as u64;
                sent = true;
            }
            // Nobody is expected to say anything; who has said that it sends no more wants no more.
            if !socket.may_recv() && socket.may_send() {
                socket.abort();
                sent = true;
            }
        }
        sent
    }
}
