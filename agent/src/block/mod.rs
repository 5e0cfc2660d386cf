//! Disks: raw files behind a virtio-blk device. Owns file I/O of disks; must not know the guest-facing queue format.

pub mod held;
pub mod raw;
