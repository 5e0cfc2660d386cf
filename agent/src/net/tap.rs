//! Tap interfaces: the host's end of a guest's network port.
//!
//! Owns `/dev/net/tun` and its ioctls. A frame is read and written with a virtio-net header of [`HEADER_BYTES`] before it
//! and no offload, so the header is always zero. Must not know virtqueues, nor what a frame means.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

/// Length of the header before each frame: `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6).
pub const HEADER_BYTES: usize = 12;

/// A tap could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No name that an interface can have.
    #[error("`{0}` is no interface name: 1 to 15 characters, no `/`")]
    Name(String),
    /// `/dev/net/tun` cannot be opened.
    #[error("tap {name}: cannot open /dev/net/tun; load the tun module, or give this process the device")]
    Device {
        /// The tap.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Somebody else has it open.
    #[error("tap {name} in network namespace {namespace} is in use by another process; stop it or choose another tap")]
    Busy {
        /// The tap.
        name: String,
        /// Where it was looked for.
        namespace: String,
    },
    /// Not allowed to attach to it or to make it.
    #[error(
        "tap {name} in network namespace {namespace}: not allowed; make it for this user with `ip tuntap add dev {name} \
         mode tap user UID`, or give this process CAP_NET_ADMIN"
    )]
    NotAllowed {
        /// The tap.
        name: String,
        /// Where it was looked for.
        namespace: String,
    },
    /// An interface of that name is something else.
    #[error(
        "{name} in network namespace {namespace} is no single-queue tap; choose another name, or make one with `ip tuntap \
         add dev NAME mode tap`"
    )]
    NoTap {
        /// The interface.
        name: String,
        /// Where it was looked for.
        namespace: String,
    },
    /// Anything else.
    #[error("tap {name} in network namespace {namespace}: {action} failed")]
    Io {
        /// The tap.
        name: String,
        /// Where it was looked for.
        namespace: String,
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// An open tap. One that existed stays when this is dropped; one that was made here goes away.
#[derive(Debug)]
pub struct Tap {
    file: OwnedFd,
    name: String,
}

impl Tap {
    /// Attaches to the tap `name` of this thread's network namespace. If there is none it is made, set up, and said so in
    /// the log: nothing connects it to a bridge yet.
    ///
    /// # Errors
    /// Why not, and what to do about it.
    pub fn open(name: &str) -> Result<Self, TapError> {
        if !(1..libc::IFNAMSIZ).contains(&name.len()) || name.contains(['/', '\0']) {
            return Err(TapError::Name(name.to_owned()));
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
        let file = options.open("/dev/net/tun").map_err(|source| TapError::Device { name: name.to_owned(), source })?;
        let namespace = namespace_name();
        let existed = index_of(name).is_some();
        let failed = |action| {
            let (name, namespace) = (name.to_owned(), namespace.clone());
            move |source: io::Error| match source.raw_os_error() {
                Some(libc::EBUSY) => TapError::Busy { name, namespace },
                Some(libc::EPERM | libc::EACCES) => TapError::NotAllowed { name, namespace },
                Some(libc::EINVAL) if existed => TapError::NoTap { name, namespace },
                _ => TapError::Io { name, namespace, action, source },
            }
        };
        attach(&file, name).map_err(failed("attaching"))?;
        set_header_size(&file).map_err(failed("setting its header size"))?;
        no_offload(&file).map_err(failed("switching its offloads off"))?;
        let tap = Self { file: file.into(), name: name.to_owned() };
        if !existed {
            tap.set_up().map_err(failed("setting it up"))?;
            tracing::warn!(tap = name, %namespace, "made a tap that did not exist; connect it to a bridge");
        }
        Ok(tap)
    }

    /// Whether an interface of that name exists in this process's network namespace.
    pub fn exists(name: &str) -> bool {
        index_of(name).is_some()
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sets the interface administratively up.
    fn set_up(&self) -> io::Result<()> {
        let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
        let mut request = interface_request(&self.name);
        // SAFETY: the request is a whole `ifreq` with a closed name, which the kernel fills in.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) })?;
        // SAFETY: the flags are what the call above filled in; `ifreq` is plain data.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
        // SAFETY: as above; the kernel only reads the request.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl From<Tap> for OwnedFd {
    fn from(tap: Tap) -> Self {
        tap.file
    }
}

/// `TUNSETIFF`: joins the interface `name`, which is made if it does not exist.
fn attach(file: &File, name: &str) -> io::Result<()> {
    let mut request = interface_request(name);
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the request is a whole `ifreq` with a closed name and flags set.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
}

fn set_header_size(file: &File) -> io::Result<()> {
    let size = HEADER_BYTES as libc::c_int;
    // SAFETY: the kernel reads one int.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) })
}

fn no_offload(file: &File) -> io::Result<()> {
    // SAFETY: the argument is a value, no address.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, 0) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A request about `name`, which is shorter than the field (checked in [`Tap::open`]).
fn interface_request(name: &str) -> libc::ifreq {
    let mut field = [0; libc::IFNAMSIZ];
    for (to, from) in field.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from as libc::c_char;
    }
    libc::ifreq { ifr_name: field, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 } }
}

fn index_of(name: &str) -> Option<u32> {
    let name = std::ffi::CString::new(name).ok()?;
    // SAFETY: a closed string that lives through the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (index > 0).then_some(index)
}

/// This thread's network namespace in words: its name if `ip netns` gave it one, else its number.
fn namespace_name() -> String {
    let Ok(own) = std::fs::metadata("/proc/thread-self/ns/net") else { return "(unknown)".to_owned() };
    let same = |other: &std::fs::Metadata| (other.dev(), other.ino()) == (own.dev(), own.ino());
    let named = std::fs::read_dir("/run/netns")
        .into_iter()
        .flatten()
        .flatten()
        .find(|entry| std::fs::metadata(entry.path()).as_ref().is_ok_and(same));
    match named {
        Some(entry) => entry.file_name().to_string_lossy().into_owned(),
        None if std::fs::metadata("/proc/1/ns/net").as_ref().is_ok_and(same) => "of the host".to_owned(),
        None => format!("net:[{}]", own.ino()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `test` in a network namespace of its own, which goes away with the thread.
    fn in_namespace(test: impl FnOnce() + Send) {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // SAFETY: only this thread, which was made for it, changes its namespace; no descriptor is affected.
                let left = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) };
                left.expect("a network namespace wants CAP_SYS_ADMIN");
                test();
            });
        });
    }

    #[test]
    fn a_tap_is_made_once_and_gone_when_closed() {
        in_namespace(|| {
            let tap = Tap::open("t0").unwrap();
            assert!(index_of("t0").is_some());
            let error = Tap::open("t0").unwrap_err();
            assert!(
                matches!(&error, TapError::Busy { name, namespace } if name == "t0" && namespace.starts_with("net:["))
            );
            drop(tap);
            assert_eq!(index_of("t0"), None, "a tap stayed behind");
        });
    }

    #[test]
    fn what_is_no_tap_is_named() {
        in_namespace(|| {
            for bad in ["", "a/b", "averyveryverylongname", "a\0b"] {
                assert!(matches!(Tap::open(bad), Err(TapError::Name(_))), "{bad}");
            }
            let error = Tap::open("lo").unwrap_err();
            assert!(matches!(&error, TapError::NoTap { name, .. } if name == "lo"), "{error}");
        });
    }
}
