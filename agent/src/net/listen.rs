//! Raw Ethernet frames that pass an interface, heard (`AF_PACKET`, packet(7)).
//!
//! Owns one receiving socket. Must not know what frames mean. A frame that the host itself sends out of the interface is told apart from one that comes in by it: on a tap,
//! what comes in is what the VM sends. Tags that the kernel or a NIC took out of a frame are put back.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::AsRawFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, Protocol, Socket, Type};

use super::{NetError, bridge};
use crate::time::monotonic_now;

/// The longest frame that the kernel hands over, segmentation by a NIC included.
const MOST_FRAME_BYTES: usize = 65_536 + 64;
/// Room for a burst, in bytes; what does not fit is dropped by the kernel.
const QUEUE_BYTES: usize = 2 << 20;
/// Destination and source address: tags come behind them.
const ADDRESSES_BYTES: usize = 12;
/// `TP_STATUS_VLAN_VALID`, `TP_STATUS_VLAN_TPID_VALID` (include/uapi/linux/if_packet.h).
const VLAN_VALID: u32 = 1 << 4;
const VLAN_TPID_VALID: u32 = 1 << 6;
/// The type of a tag where the kernel names none (802.1Q).
const TPID_8021Q: u16 = 0x8100;

/// `struct tpacket_auxdata` (include/uapi/linux/if_packet.h).
#[repr(C)]
#[derive(Clone, Copy)]
struct AuxData {
    status: u32,
    len: u32,
    snaplen: u32,
    mac: u16,
    net: u16,
    vlan_tci: u16,
    vlan_tpid: u16,
}

/// A place for one control message with [`AuxData`], aligned as the kernel wants it.
#[repr(C, align(8))]
struct Control([u8; 64]);

/// An interface that is listened to.
pub struct Listener {
    name: String,
    socket: Socket,
    frame: Vec<u8>,
}

/// A frame that was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passing<'a> {
    /// The whole frame, destination address first, without FCS.
    pub frame: &'a [u8],
    /// Whether the host sent it out of the interface; else it came in by it.
    pub outgoing: bool,
}

impl Listener {
    /// Listens to the interface `name` of the calling thread's network namespace: every frame from now on.
    ///
    /// # Errors
    /// There is none, it is down, or there is no right to (CAP_NET_RAW).
    pub fn open(name: &str) -> Result<Self, NetError> {
        Self::open_for(name, libc::ETH_P_ALL as u16)
    }

    /// Listens only to frames of one type that come in by it and are for this host: under a bridge those to groups that it does not forward.
    ///
    /// # Errors
    /// As [`Listener::open`].
    pub fn open_for(name: &str, ether_type: u16) -> Result<Self, NetError> {
        let link = bridge::link(name)?;
        if !link.up {
            return Err(NetError::Down { name: name.to_owned() });
        }
        let fail = |e| NetError::from_io(format!("listen to `{name}`"), "CAP_NET_RAW", e);
        // Protocol 0: nothing is queued before the socket is bound to the interface.
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0))).map_err(fail)?;
        let _smaller_is_no_failure = socket.set_recv_buffer_size(QUEUE_BYTES);
        let on: libc::c_int = 1;
        // SAFETY: the option is one int, which lives through the call.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_AUXDATA,
                (&raw const on).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        check(set).map_err(fail)?;
        // SAFETY: all-zero bytes are a valid `sockaddr_ll`, a plain C struct of integers.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = ether_type.to_be();
        address.sll_ifindex = link.index as libc::c_int;
        // SAFETY: a whole `sockaddr_ll` of its own length, which lives through the call.
        let bound = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        check(bound).map_err(fail)?;
        Ok(Self { name: name.to_owned(), socket, frame: vec![0; MOST_FRAME_BYTES] })
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The next frame; `None` if there is none until `deadline` (`CLOCK_MONOTONIC`).
    ///
    /// # Errors
    /// The interface is gone or down.
    pub fn next(&mut self, deadline: Duration) -> Result<Option<Passing<'_>>, NetError> {
        let (length, outgoing) = loop {
            let left = deadline.saturating_sub(monotonic_now());
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let failed = |source| NetError::from_io(format!("listen to `{}`", self.name), "CAP_NET_RAW", source);
            match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&left)) {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                // A signal: the caller may have been cancelled by it.
                Err(rustix::io::Errno::INTR) => return Ok(None),
                Err(error) => return Err(failed(error.into())),
            }
            match receive(&self.socket, &mut self.frame) {
                Ok(received) => break received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.raw_os_error() == Some(libc::ENETDOWN) => {
                    return Err(NetError::Down { name: self.name.clone() });
                }
                Err(error) => return Err(failed(error)),
            }
        };
        Ok(Some(Passing { frame: &self.frame[..length], outgoing }))
    }
}

/// Takes one frame, with its tag put back; its length, and whether it goes out.
fn receive(socket: &Socket, frame: &mut Vec<u8>) -> io::Result<(usize, bool)> {
    // Room for a tag that is put back.
    let room = frame.len() - 4;
    let mut part = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: room };
    let mut control = Control([0; 64]);
    let mut from = MaybeUninit::<libc::sockaddr_ll>::zeroed();
    // SAFETY: all-zero bytes are a valid `msghdr`, a plain C struct of integers and pointers.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = from.as_mut_ptr().cast();
    message.msg_namelen = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control.0).cast();
    message.msg_controllen = control.0.len() as _;
    // SAFETY: name, vector and control name memory of the lengths given, which lives through the call.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    let mut length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?.min(room);
    // SAFETY: zeroed above and at most filled in by the kernel; every bit pattern is a valid `sockaddr_ll`.
    let outgoing = unsafe { from.assume_init() }.sll_pkttype == libc::PACKET_OUTGOING;
    // SAFETY: the kernel has filled in `message`, whose control memory is still there.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: not null means that a whole header lies in the control memory.
    if let Some(first) = unsafe { header.as_ref() }
        && (first.cmsg_level, first.cmsg_type) == (libc::SOL_PACKET, libc::PACKET_AUXDATA)
        && first.cmsg_len >= size_of::<libc::cmsghdr>() + size_of::<AuxData>()
    {
        // SAFETY: the header says that so many bytes follow; they need not be aligned.
        let aux = unsafe { libc::CMSG_DATA(header).cast::<AuxData>().read_unaligned() };
        if aux.status & VLAN_VALID != 0 && length >= ADDRESSES_BYTES {
            let kind = if aux.status & VLAN_TPID_VALID != 0 { aux.vlan_tpid } else { TPID_8021Q };
            frame.copy_within(ADDRESSES_BYTES..length, ADDRESSES_BYTES + 4);
            frame[ADDRESSES_BYTES..ADDRESSES_BYTES + 2].copy_from_slice(&kind.to_be_bytes());
            frame[ADDRESSES_BYTES + 2..ADDRESSES_BYTES + 4].copy_from_slice(&aux.vlan_tci.to_be_bytes());
            length += 4;
        }
    }
    Ok((length, outgoing))
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_interface_is_named() {
        let Err(error) = Listener::open("nonesuch0") else { panic!("it was opened") };
        assert!(matches!(error, NetError::NoSuchInterface { name } if name == "nonesuch0"));
    }
}
