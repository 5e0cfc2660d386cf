//! Free memory as every run finds it: really there.
//!
//! A hypervisor beneath this host may have taken back memory that lay free for some seconds (free page reporting), and
//! whoever touches it next waits for it: on the development host 256 MiB of huge pages cost 24 ms or 700 ms. That is nothing
//! of the VMM that is measured, so each run, ours or a peer's, begins after more memory than it needs was taken and given
//! back.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::guest::MEMORY_MIB;

/// What is taken: the guest's RAM at the target, and half as much again for what else a migration takes.
const BYTES: usize = ((MEMORY_MIB + MEMORY_MIB / 2) << 20) as usize;

/// Takes memory, in huge pages where the host lets it, and gives all back. Returns how long the taking took.
pub(super) fn recall() -> Result<Duration> {
    let began = Instant::now();
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice, which nobody but this function knows.
    let start = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), BYTES, protection, MapFlags::PRIVATE) };
    let start = start.context("mapping free memory")?;
    // SAFETY: advice on the mapping above; a host without huge pages refuses, which is no harm.
    let _ = unsafe { rustix::mm::madvise(start, BYTES, Advice::LinuxHugepage) };
    // SAFETY: faults the mapping above in; it holds nothing that could change.
    let taken = unsafe { rustix::mm::madvise(start, BYTES, Advice::LinuxPopulateWrite) };
    let took = began.elapsed();
    // SAFETY: exactly what was mapped above, and no reference into it exists.
    unsafe { rustix::mm::munmap(start, BYTES) }.context("unmapping memory")?;
    taken.context("taking free memory")?;
    Ok(took)
}

/// What the footer says of it, measured before anything else.
pub(super) fn note() -> Result<String> {
    let (found, again) = (recall()?, recall()?);
    Ok(format!(
        "Free memory: taking {} MiB cost {} ms as it was found and {} ms right afterwards (a hypervisor beneath may have had \
         it back); each run begins with such a taking, so that all find it alike.",
        BYTES >> 20,
        found.as_millis(),
        again.as_millis()
    ))
}
