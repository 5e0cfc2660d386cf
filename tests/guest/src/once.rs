//! Owns one idiom: a static that is handed out once as a unique reference.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering::AcqRel};

/// A static value that can be taken once.
pub struct Once<T> {
    taken: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reachable only through `take`, which succeeds once.
unsafe impl<T> Sync for Once<T> {}

impl<T> Once<T> {
    /// A value to be taken later.
    pub const fn new(value: T) -> Self {
        Self { taken: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    /// Takes the value; a second call is a mistake of this program.
    #[allow(clippy::mut_from_ref, reason = "the one call that succeeds has the only reference")]
    pub fn take(&'static self) -> &'static mut T {
        assert!(!self.taken.swap(true, AcqRel), "a static was taken twice");
        // SAFETY: the swap above lets only one caller come here, so the reference is unique.
        unsafe { &mut *self.value.get() }
    }
}
