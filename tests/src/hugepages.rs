//! Huge pages of 2 MiB that the host sets aside for a test, and has back afterwards.

use std::fs::{self, File};

use anyhow::{Context, Result, ensure};

/// Where the kernel counts and makes them.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// So many more are set aside as long as this lives. Tests that need some take turns, across processes.
#[derive(Debug)]
pub struct SetAside {
    before: u64,
    _turn: File,
}

impl SetAside {
    /// Sets `more` huge pages aside.
    ///
    /// # Errors
    /// A kernel without huge pages, or without memory for so many.
    pub fn pages(more: u64) -> Result<Self> {
        let turn = File::create(std::env::temp_dir().join("dunlin-hugepages.lock")).context("the lock of the tests")?;
        turn.lock()?;
        let before = count("nr_hugepages")?;
        fs::write(format!("{POOL}/nr_hugepages"), (before + more).to_string())?;
        let set_aside = Self { before, _turn: turn };
        let now = count("nr_hugepages")?;
        ensure!(
            now == before + more,
            "the kernel found memory for {} of {more} huge pages",
            now.saturating_sub(before)
        );
        Ok(set_aside)
    }

    /// How many nobody has.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn free(&self) -> Result<u64> {
        count("free_hugepages")
    }
}

impl Drop for SetAside {
    fn drop(&mut self) {
        let _ = fs::write(format!("{POOL}/nr_hugepages"), self.before.to_string());
    }
}

fn count(name: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("{POOL}/{name}")).context("huge pages of this host")?;
    text.trim().parse().with_context(|| format!("{name}: {text}"))
}
