//! Which network namespace a process is in, and of which running kernel.
//!
//! Owns the reading of `/proc/PID/ns/net` and of the boot's id.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::model::NetworkPlace;

/// The calling thread's.
pub fn own() -> Option<NetworkPlace> {
    at("/proc/thread-self/ns/net")
}

/// That of process `pid`; none if it is gone, or may not be looked at.
pub fn of_process(pid: u32) -> Option<NetworkPlace> {
    at(&format!("/proc/{pid}/ns/net"))
}

fn at(path: &str) -> Option<NetworkPlace> {
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().parse().ok()?;
    let namespace = fs::metadata(path).ok()?;
    Some(NetworkPlace { boot_id, device: namespace.dev(), inode: namespace.ino() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_where_its_threads_are() {
        let own = own().unwrap();
        assert_eq!(of_process(std::process::id()), Some(own));
        assert_eq!(of_process(u32::MAX), None);
    }
}
