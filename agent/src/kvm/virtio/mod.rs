//! Virtio devices of the hosted machine (virtio 1.2): the mmio transport, a network port on a tap, a disk on a raw file, a
//! source of entropy, a balloon.
//!
//! Owns everything a guest can reach through a virtio queue or register. Whatever a guest writes there, the worst that
//! happens is that its device demands a reset: no panic, no hang, no access outside guest memory, and never more than one
//! bounded piece of work between two looks at whether to pause. Must not know KVM, migration, or how a VM is configured.
//!
//! | file | owns |
//! |---|---|
//! | `mmio` | registers and status transitions, saving and restoring |
//! | `queue` | rings and descriptor chains |
//! | `interrupt` | the interrupt line and its status register |
//! | `worker` | the device's thread: standing still, going on |
//! | `device` | all of it behind [`Device`](crate::kvm::bus::Device) |
//! | `net`, `blk`, `rng`, `balloon` | what the requests of a queue mean |
//! | `state` | the format of the saved state |
//! | `driver` | the other side: a minimal driver for tests and fuzzing |
//! | `fuzz` | bytes in, register accesses and ring contents out |

mod arrivals;
mod balloon;
mod blk;
mod device;
mod driver;
pub mod fuzz;
mod held;
mod interrupt;
mod mmio;
mod net;
mod queue;
mod rng;
mod state;
mod warn;
mod worker;

pub use balloon::{BalloonError, BalloonStatus, GuestStats, HintRound, VirtioBalloon};
pub use blk::{DiskStats, VirtioBlk};
pub use device::VirtioDevice;
pub use net::VirtioNet;
pub use rng::{RngStats, VirtioRng};
