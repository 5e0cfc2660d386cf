//! Which part of the bitmap map belongs to which VM: first fit, so that VMs can come and go.

use std::collections::BTreeMap;

/// Free runs of words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Windows {
    /// First word and length of each free run; no two touch.
    free: BTreeMap<u32, u32>,
}

impl Windows {
    /// All of `words` free.
    pub(super) fn new(words: u32) -> Self {
        Self { free: [(0, words)].into() }
    }

    /// Takes a window; its first word. None: no free run is long enough.
    pub(super) fn take(&mut self, words: u32) -> Option<u32> {
        let (&first, &len) = self.free.iter().find(|&(_, &len)| len >= words)?;
        self.free.remove(&first);
        if len > words {
            self.free.insert(first + words, len - words);
        }
        Some(first)
    }

    /// Gives a window back.
    pub(super) fn give_back(&mut self, mut first: u32, mut words: u32) {
        if let Some((&before, &len)) = self.free.range(..first).next_back()
            && before + len == first
        {
            self.free.remove(&before);
            (first, words) = (before, len + words);
        }
        if let Some(len) = self.free.remove(&(first + words)) {
            words += len;
        }
        self.free.insert(first, words);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn windows_never_overlap_and_all_comes_back(steps in prop::collection::vec((any::<bool>(), 1u32..40), 1..100)) {
            let mut windows = Windows::new(100);
            let mut taken: Vec<(u32, u32)> = Vec::new();
            for (take, words) in steps {
                if take {
                    if let Some(first) = windows.take(words) {
                        prop_assert!(first + words <= 100);
                        prop_assert!(taken.iter().all(|&(other, len)| first + words <= other || other + len <= first));
                        taken.push((first, words));
                    }
                } else if !taken.is_empty() {
                    let (first, words) = taken.swap_remove(words as usize % taken.len());
                    windows.give_back(first, words);
                }
            }
            for (first, words) in taken {
                windows.give_back(first, words);
            }
            prop_assert_eq!(windows, Windows::new(100));
        }
    }
}
