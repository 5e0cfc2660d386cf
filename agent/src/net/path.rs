//! The way to another host, as the kernel knows it: which address of this host it begins with, and how large a packet may be.
//!
//! Nothing is sent. What the kernel has learnt from packets that were too large for the way (RFC 1191, RFC 8201) counts, so it knows best when it has sent much there.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use super::NetError;

/// What connecting needs, and nobody is asked at: the discard service.
const ANY_PORT: u16 = 9;

/// A way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// Where it begins.
    pub local: IpAddr,
    /// The largest IP packet that it carries in one piece, in bytes.
    pub mtu_bytes: u32,
}

/// The way to `remote`; from `local`, if that is given.
///
/// # Errors
/// There is none, or `local` is no address of this host.
pub fn to(remote: IpAddr, local: Option<IpAddr>) -> Result<Path, NetError> {
    let from = local.map_or_else(String::new, |local| format!(" from {local}"));
    let failed = |source| NetError::Kernel { action: format!("find the way to {remote}{from}"), source };
    let any: IpAddr = if remote.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(local.unwrap_or(any), 0)).map_err(failed)?;
    // A datagram socket that is connected has a route.
    socket.connect(SocketAddr::new(remote, ANY_PORT)).map_err(failed)?;
    let local = socket.local_addr().map_err(failed)?.ip();
    let (level, name) =
        if remote.is_ipv4() { (libc::IPPROTO_IP, libc::IP_MTU) } else { (libc::IPPROTO_IPV6, libc::IPV6_MTU) };
    let mut mtu: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most one int, whose length it is given; both live through the call.
    let got = unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut mtu).cast(), &raw mut length) };
    if got < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(Path { local, mtu_bytes: mtu as u32 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_to_itself_is_loopback() {
        let path = to(Ipv4Addr::LOCALHOST.into(), None).unwrap();
        assert_eq!(path.local, IpAddr::V4(Ipv4Addr::LOCALHOST));
        assert!(path.mtu_bytes >= 1500, "{path:?}");
        let foreign = "192.0.2.77".parse().unwrap();
        let error = to(Ipv4Addr::LOCALHOST.into(), Some(foreign)).unwrap_err().to_string();
        assert!(error.contains("192.0.2.77"), "{error}");
    }
}
