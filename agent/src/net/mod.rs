//! Network interfaces of the host: taps, raw frames on named interfaces, forwarding tables and devices of tunnels over rtnetlink.
//!
//! Thin: one kernel interface a file. Must not know what a frame means or when it is sent. Everything works in the network
//! namespace of the calling thread; who wants another one enters it first (a socket keeps the namespace it was opened in).

pub mod bridge;
pub mod changes;
pub mod device;
pub mod fdb;
pub mod former;
pub mod inner;
pub mod listen;
pub mod neighbour;
mod netlink;
pub mod path;
pub mod place;
pub mod pnet;
pub mod tap;
pub mod traffic;
pub mod wireguard;
pub mod wires;

use std::io;
use std::time::Duration;

/// What an interface, a bridge or the kernel behind them refused.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The name means nothing in this namespace.
    #[error("there is no interface `{name}` in this network namespace; `ip link` lists those there are")]
    NoSuchInterface {
        /// The name.
        name: String,
    },
    /// The interface is administratively down.
    #[error("interface `{name}` is down; `ip link set {name} up` brings it up")]
    Down {
        /// Its name.
        name: String,
    },
    /// A raw socket or a table may not be opened.
    #[error("no permission to {action}: it needs {capability} in this network namespace")]
    NoPermission {
        /// What was tried.
        action: String,
        /// The capability that allows it.
        capability: &'static str,
    },
    /// The interface is something else than was assumed.
    #[error("interface `{name}` is no {expected}")]
    WrongKind {
        /// Its name.
        name: String,
        /// What it should be.
        expected: &'static str,
    },
    /// The kernel was built without it, or its module is not there.
    #[error("the kernel of this host has no {what}: {remedy}")]
    NotInKernel {
        /// What it has not.
        what: &'static str,
        /// Where it is to be had.
        remedy: &'static str,
    },
    /// Another program or device has it.
    #[error("UDP port {port} is in use at this host: another one can be named with `port=`")]
    PortInUse {
        /// The port.
        port: u16,
    },
    /// The kernel refused, or its answer could not be read.
    #[error("could not {action}")]
    Kernel {
        /// What was tried.
        action: String,
        /// What was answered.
        #[source]
        source: io::Error,
    },
    /// What was waited for did not happen.
    #[error("waited {after:?} in vain: {what}")]
    TimedOut {
        /// What was waited for, and what is the case instead.
        what: String,
        /// How long.
        after: Duration,
    },
}

impl NetError {
    /// Sorts what the kernel said into the kinds that an operator can act upon.
    fn from_io(action: impl Into<String>, capability: &'static str, source: io::Error) -> Self {
        let action = action.into();
        match source.kind() {
            io::ErrorKind::PermissionDenied => Self::NoPermission { action, capability },
            _ => Self::Kernel { action, source },
        }
    }
}
