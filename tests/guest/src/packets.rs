//! Owns the UDP echo service: what comes goes back as it is, so that whoever numbers what it sends can tell what was lost, doubled or turned round.

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::udp::{PacketBuffer, PacketMetadata, Socket};

use crate::once::Once;

const PORT: u16 = 7;
/// Packets that wait in each direction: a second of a client that sends one each millisecond.
const PACKETS: usize = 1024;
const BYTES: usize = 64 << 10;
/// The longest packet that is answered.
const LONGEST: usize = 1472;

type Places = [PacketMetadata; PACKETS];

static PLACES: Once<[Places; 2]> = Once::new([[PacketMetadata::EMPTY; PACKETS]; 2]);
static PAYLOADS: Once<[[u8; BYTES]; 2]> = Once::new([[0; BYTES]; 2]);

/// The service.
pub struct Packets {
    handle: SocketHandle,
}

impl Packets {
    /// Listens.
    pub fn start(sockets: &mut SocketSet<'static>) -> Self {
        let [receive_places, send_places] = PLACES.take();
        let [receive, send] = PAYLOADS.take();
        let buffer = |places: &'static mut Places, bytes: &'static mut [u8; BYTES]| {
            PacketBuffer::new(&mut places[..], &mut bytes[..])
        };
        let mut socket = Socket::new(buffer(receive_places, receive), buffer(send_places, send));
        let bound = socket.bind(PORT);
        debug_assert!(bound.is_ok(), "the port is no zero, and the socket is new");
        Self { handle: sockets.add(socket) }
    }

    /// Answers what has come; whether there was anything.
    pub fn serve(&self, sockets: &mut SocketSet<'static>) -> bool {
        let socket = sockets.get_mut::<Socket>(self.handle);
        let mut packet = [0; LONGEST];
        let mut sent = false;
        while socket.can_send() {
            match socket.recv_slice(&mut packet) {
                Ok((len, from)) => sent |= socket.send_slice(&packet[..len], from).is_ok(),
                // Longer than the place for it: dropped.
                Err(smoltcp::socket::udp::RecvError::Truncated) => {}
                Err(_) => break,
            }
        }
        sent
    }
}
