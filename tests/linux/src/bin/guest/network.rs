//! The guest's one interface: up, with an address, by the ioctls of netdevice(7).

use std::fs;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::options::Address;

const INTERFACE: &str = "eth0";
/// How long the driver may take to make the interface.
const APPEARS: Duration = Duration::from_secs(20);

/// An interface request with nothing but a name.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: a plain C structure, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn socket_address(ip: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (to, from) in data[2..].iter_mut().zip(ip.octets()) {
        *to = from as libc::c_char;
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}

fn order(socket: &std::net::UdpSocket, what: libc::Ioctl, request: &mut libc::ifreq, name: &str) -> Result<()> {
    // SAFETY: the ioctls used here read and write one `ifreq`, which `request` is.
    if unsafe { libc::ioctl(socket.as_raw_fd(), what, std::ptr::from_mut(request)) } != 0 {
        bail!("{name} of {INTERFACE}: {}", std::io::Error::last_os_error());
    }
    Ok(())
}

fn switch_on(socket: &std::net::UdpSocket, name: &str) -> Result<()> {
    let mut flags = request(name);
    order(socket, libc::SIOCGIFFLAGS, &mut flags, "flags")?;
    // SAFETY: the call above has filled in this member of the union.
    unsafe { flags.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    order(socket, libc::SIOCSIFFLAGS, &mut flags, "switching on")
}

/// Switches loopback and the interface on and gives the latter its address.
pub(crate) fn up(address: Address) -> Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    switch_on(&socket, "lo")?;
    let deadline = Instant::now() + APPEARS;
    while !fs::exists(format!("/sys/class/net/{INTERFACE}"))? {
        ensure!(Instant::now() < deadline, "no {INTERFACE} after {APPEARS:?}");
        // The driver makes it while its module is loaded; this loop is for one that does so later.
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut ip = request(INTERFACE);
    ip.ifr_ifru.ifru_addr = socket_address(address.ip);
    order(&socket, libc::SIOCSIFADDR, &mut ip, "address")?;
    let mask = u32::MAX.checked_shl(32 - address.prefix).unwrap_or(0);
    let mut netmask = request(INTERFACE);
    netmask.ifr_ifru.ifru_netmask = socket_address(Ipv4Addr::from(mask));
    order(&socket, libc::SIOCSIFNETMASK, &mut netmask, "mask")?;
    switch_on(&socket, INTERFACE)
}
