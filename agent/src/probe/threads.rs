//! The records of threads, as the programs keep them in a mapped array: read, and forgotten, with no system call.
//!
//! Owns which place has whose record. Must not know what is made of the counters.

use std::sync::atomic::{AtomicU64, Ordering};

use dunlin_ebpf::{MAX_THREADS, Thread, ThreadKey};

use super::mapped::MappedArray;

const WORDS: usize = size_of::<Thread>() / 8;

/// The array.
#[derive(Debug)]
pub(super) struct ThreadRecords(MappedArray);

impl ThreadRecords {
    /// Words of the array.
    pub(super) const MAPPED_WORDS: usize = WORDS * MAX_THREADS as usize;

    fn places(&self) -> impl Iterator<Item = &[AtomicU64]> {
        self.0.words().chunks_exact(WORDS)
    }

    /// All records that are somebody's, each with its place.
    pub(super) fn all(&self) -> impl Iterator<Item = (usize, ThreadKey, Thread)> {
        let taken = self.places().enumerate().filter(|(_, words)| owner(words).is_some());
        taken.filter_map(|(place, words)| read(words).map(|(key, thread)| (place, key, thread)))
    }

    /// The record at a place, if it is still that thread's. It may have changed while it was read.
    pub(super) fn get(&self, place: usize, key: ThreadKey) -> Option<Thread> {
        let (owner, thread) = read(self.places().nth(place)?)?;
        (owner == key).then_some(thread)
    }

    /// Frees the records of some processes.
    pub(super) fn forget(&self, mut which: impl FnMut(u32) -> bool) {
        for words in self.places() {
            let Some(key) = owner(words) else { continue };
            if which(key.tgid) {
                // The owner's name goes last: whoever takes the place finds it empty.
                for word in words.iter().rev() {
                    word.store(0, Ordering::Release);
                }
            }
        }
    }
}

impl From<MappedArray> for ThreadRecords {
    /// `array` is of [`ThreadRecords::MAPPED_WORDS`] words.
    fn from(array: MappedArray) -> Self {
        Self(array)
    }
}

fn owner(words: &[AtomicU64]) -> Option<ThreadKey> {
    let key = words.first()?.load(Ordering::Acquire);
    (key != 0).then_some(ThreadKey { tgid: (key >> 32) as u32, tid: key as u32 })
}

/// Word by word, from the first to the last.
fn read(words: &[AtomicU64]) -> Option<(ThreadKey, Thread)> {
    let key = owner(words)?;
    let mut copy = [0u64; WORDS];
    for (to, from) in copy.iter_mut().zip(words) {
        *to = from.load(Ordering::Acquire);
    }
    const { assert!(size_of::<Thread>() == size_of::<[u64; WORDS]>() && align_of::<Thread>() == align_of::<u64>()) };
    // SAFETY: `Thread` is as long and as strictly aligned, and has integers only, so that any bits are one.
    Some((key, unsafe { std::mem::transmute::<[u64; WORDS], Thread>(copy) }))
}
