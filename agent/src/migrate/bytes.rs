//! Copies out of and into memory that others may be writing.
//!
//! What is copied may be torn between an old and a new state of a page; the dirty log then names the page, and it is sent again.

use crate::port::BytesView;

/// Copies `bytes` into `copy`, which is as long.
///
/// # Panics
/// If it is not.
pub(super) fn copy_out(bytes: BytesView<'_>, copy: &mut [u8]) {
    assert_eq!(bytes.len(), copy.len(), "a copy as long as the original");
    // SAFETY: both are valid for their common length and do not overlap (`copy` is borrowed mutably). The guest or another thread may write the
    // original meanwhile; each byte is then its old or its new value, and all are valid.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr().cast::<u8>(), copy.as_mut_ptr(), bytes.len()) }
}

/// Copies `copy` to where `bytes` are, which are as many.
///
/// # Panics
/// If they are not.
pub(super) fn copy_in(copy: &[u8], bytes: BytesView<'_>) {
    assert_eq!(bytes.len(), copy.len(), "a place as long as the copy");
    // SAFETY: the view is valid for writes of its length (it is made of atomics) and does not overlap a plain slice. The VM does not run yet; a hostile
    // peer could at most make two streams write the same plain bytes.
    unsafe { std::ptr::copy_nonoverlapping(copy.as_ptr(), bytes.as_ptr().cast::<u8>().cast_mut(), copy.len()) }
}
