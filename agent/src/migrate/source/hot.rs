//! Which pages a VM writes all the time: what it will touch first where it goes on, so they go first behind it.
//!
//! Found by its dirty log in some short windows while it still runs at the source. A page that is written in most of them is hot; one that a fast writer happens to pass in one is not.

use std::time::Duration;

use super::{Source, SourceError};
use crate::migrate::protect::protect_all;
use crate::model::{PageBitmap, PageCount, PageRun};

/// Windows, and how long each is. Together they delay the move by 10 ms.
const WINDOWS: usize = 5;
const WINDOW: Duration = Duration::from_millis(2);
/// In so many of them a page must be written.
const HOT_IN: usize = 3;
/// The most pages that go first: 2 MiB, a sixtieth of a second at 1 Gbit/s.
const MOST: usize = 512;

impl Source<'_> {
    /// The pages that the VM writes most, by the log, which is on; the hottest last. What was written meanwhile is `due`.
    pub(super) fn hot_pages(&mut self, due: &mut PageBitmap) -> Result<Vec<u64>, SourceError> {
        let pages = self.region.spec().pages;
        let mut windows = Vec::with_capacity(WINDOWS);
        for _ in 0..WINDOWS {
            self.clock.sleep(WINDOW);
            let mut written = PageBitmap::new(pages);
            self.machine.harvest(&mut written)?;
            // What is not armed anew counts as written in the next window, too.
            protect_all(self.machine, self.region)?;
            windows.push(written);
        }
        for written in &windows {
            due.union(written);
        }
        Ok(hottest(&windows))
    }
}

/// The pages of [`HOT_IN`] windows or more, at most [`MOST`] of them, the hottest last.
fn hottest(windows: &[PageBitmap]) -> Vec<u64> {
    let mut by_windows: Vec<Vec<u64>> = vec![Vec::new(); windows.len() + 1];
    let mut all = PageBitmap::new(windows.first().map_or(PageCount(0), PageBitmap::len));
    for written in windows {
        all.union(written);
    }
    for page in all.runs(u32::MAX).flat_map(PageRun::indices) {
        by_windows[windows.iter().filter(|written| written.contains(page)).count()].push(page);
    }
    let hot: Vec<u64> = by_windows.split_off(HOT_IN.min(windows.len())).into_iter().flatten().collect();
    hot[hot.len().saturating_sub(MOST)..].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(pages: impl IntoIterator<Item = u64>) -> PageBitmap {
        let mut written = PageBitmap::new(PageCount(4000));
        for page in pages {
            written.insert(page);
        }
        written
    }

    #[test]
    fn what_is_written_in_most_windows_is_hot_and_what_is_in_all_comes_last() {
        let windows =
            [window([7, 9, 100]), window([7, 9, 101]), window([7, 9, 102]), window([7, 103, 100]), window([7, 104])];
        assert_eq!(hottest(&windows), [9, 7]);
        assert_eq!(hottest(&[]), Vec::<u64>::new());
        let many: Vec<PageBitmap> = (0..5).map(|_| window(0..2000)).collect();
        assert_eq!(hottest(&many).len(), MOST);
    }
}
