//! The hosted machine: KVM, vCPUs, RAM, interrupt controllers, console, virtio devices; x86 alone in `x86/`.
//!
//! Owns every KVM ioctl and every byte a guest can touch. Must not know migration, announcing, or the control sockets.
//! vCPUs are plain threads; devices bring their own.

mod alarm;
mod asking;
pub mod boot;
pub mod bus;
pub mod console;
pub mod container;
mod control;
pub mod dirty;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
#[cfg(test)]
mod guest_tests;
mod hurry;
pub mod machine;
#[cfg(test)]
mod machine_tests;
pub mod memory;
pub mod ports;
mod serial;
mod spaces;
mod stats;
mod stun_port;
pub mod sys;
#[cfg(test)]
pub(crate) mod testing;
mod throttle;
#[cfg(test)]
mod time_tests;
mod vcpu;
pub mod virtio;
mod vm;
pub mod x86;

pub use control::MachineExit;
pub use hurry::{Hurry, stand, stand_back};
pub use machine::{HostedError, Hosting, Machine};
