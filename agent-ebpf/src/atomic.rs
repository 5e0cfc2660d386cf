//! Atomic read-modify-write on map values that other CPUs and the agent's mapping touch at the same time.

use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_or, atomic_xadd};

/// Adds to a counter.
///
/// # Safety
/// `counter` must point to a live, aligned map value.
#[inline(always)]
pub(crate) unsafe fn add(counter: *mut u64, by: u64) {
    // SAFETY: the caller's promise.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(counter, by) };
}

/// Sets bits in a word, losing none that another CPU sets and none that the agent has not taken. Returns what the word was.
///
/// # Safety
/// `word` must point to a live, aligned map value.
#[inline(always)]
pub(crate) unsafe fn set_bits(word: *mut u64, bits: u64) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { atomic_or::<u64, u64, { AtomicOrdering::SeqCst }>(word, bits) }
}

/// Puts `word` where 0 is; whether it was 0.
///
/// # Safety
/// `place` must point to a live, aligned map value.
#[inline(always)]
pub(crate) unsafe fn take(place: *mut u64, word: u64) -> bool {
    // SAFETY: the caller's promise.
    unsafe { atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(place, 0, word).0 == 0 }
}
