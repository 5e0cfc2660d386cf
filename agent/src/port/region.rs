//! A region of a VM as the page streams see it: bytes that the guest may be writing at this moment.

use std::sync::atomic::AtomicU8;

use crate::model::{PageRun, RegionSpec};

/// Bytes that others write concurrently. Reading them while the guest writes may tear; the dirty log brings the page
/// again.
pub type BytesView<'a> = &'a [AtomicU8];

/// RAM (later: a disk) mapped into this process.
pub trait Region: Send + Sync {
    /// Its name, kind and size.
    fn spec(&self) -> &RegionSpec;

    /// The bytes of `run`.
    ///
    /// # Panics
    /// If `run` does not fit into the region: callers check what a peer sent with [`PageRun::fits`] first.
    fn bytes(&self, run: PageRun) -> BytesView<'_>;

    /// The parts of `run` that may hold something else than zeros, in order. What was never written is left out
    /// without being touched.
    fn data_within(&self, run: PageRun) -> Vec<PageRun>;

    /// Makes `run` ready to be written to quickly (huge pages, faults taken in one go). A hint: never fails.
    fn prepare_for_write(&self, run: PageRun);

    /// Makes `run` read as zeros, giving its memory back where that is possible.
    fn zero(&self, run: PageRun);
}
