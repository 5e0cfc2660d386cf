//! Trials of the network: namespaces, taps, raw frames. All in a namespace of a thread that then ends, so that the host's
//! own network sees nothing.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::model::chain;
use crate::model::tunnel::{LEAST_MTU, inner_pair};
use crate::net::wireguard;
use crate::port::WireguardDevice;

/// Runs `trial` on a thread of its own, in a network namespace of its own.
fn in_own_namespace(trial: impl FnOnce() -> io::Result<String> + Send) -> io::Result<String> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: no pointers; changes only the calling thread, which ends with this closure.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
                return Err(io::Error::last_os_error());
            }
            trial()
        });
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the trial panicked")))
    })
}

/// Makes a network namespace.
///
/// # Errors
/// What the kernel answered.
pub fn namespace() -> io::Result<String> {
    in_own_namespace(|| Ok(String::new()))
}

/// `TUNSETIFF`, `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR` (include/uapi/linux/if_tun.h).
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TAP_FLAGS: i16 = 0x0002 | 0x1000 | 0x4000;

/// Makes a tap; it goes with its descriptor.
///
/// # Errors
/// What the kernel answered.
pub fn tap() -> io::Result<String> {
    in_own_namespace(|| {
        let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
        // SAFETY: a C structure of integers and unions of them, for which all zeros is valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = TAP_FLAGS;
        // SAFETY: the request reads and writes one `ifreq`, which lives through the call.
        if unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, &raw mut request) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(String::new())
    })
}

/// Makes a WireGuard device with a key, and brings it up.
///
/// # Errors
/// What the kernel answered.
pub fn wireguard() -> io::Result<String> {
    let [local, remote] = inner_pair(0);
    let device = WireguardDevice {
        name: "dlw-trial".to_owned(),
        // One that nobody has.
        port: 0,
        local,
        remote,
        mtu_bytes: LEAST_MTU,
        device_mtu_bytes: LEAST_MTU,
    };
    in_own_namespace(|| {
        wireguard::make(&device).map(|()| String::new()).map_err(|error| io::Error::other(chain(&error)))
    })
}

/// Opens a socket for raw frames, in the host's own namespace: nothing is bound or sent.
///
/// # Errors
/// What the kernel answered.
pub fn raw_socket() -> io::Result<String> {
    // SAFETY: no pointers; the kernel makes a descriptor.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(String::new())
}
