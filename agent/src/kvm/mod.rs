//! The hosted machine: KVM, vCPUs, RAM, interrupt controllers, console, virtio devices; x86 alone in `x86/`.
//!
//! Owns every KVM ioctl and every byte a guest can touch. Must not know migration, announcing, or the control sockets.

pub mod bus;
pub mod memory;
pub mod virtio;
