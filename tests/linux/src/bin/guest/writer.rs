//! Processes that write memory at a steady rate, and check each page before they write it again.
//!
//! Processes, not threads: each has an address space of its own, as the programs of a real guest have.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use serde_json::{Value, json};

use crate::options::Writer;

/// The argument that makes this program a writer.
pub(crate) const VERB: &str = "--write";
const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
/// Between two bursts.
const TICK: Duration = Duration::from_millis(10);

/// What a writer counts, in a page that it shares with process 1.
#[derive(Debug)]
#[repr(C)]
struct Counters {
    pages: AtomicU64,
    mismatches: AtomicU64,
    passes: AtomicU64,
}

/// A writer, from outside.
#[derive(Debug)]
pub(crate) struct WriterCounters {
    pid: u32,
    shared: NonNull<Counters>,
}

// SAFETY: the mapping is never taken down, and everything in it is atomic.
unsafe impl Send for WriterCounters {}
// SAFETY: as above.
unsafe impl Sync for WriterCounters {}

impl WriterCounters {
    /// As JSON.
    pub(crate) fn report(&self) -> Value {
        // SAFETY: a mapping of a whole page that is never taken down; all zeroes, which it begins with, are counters.
        let counters = unsafe { self.shared.as_ref() };
        json!({
            "pid": self.pid,
            "pages_written": counters.pages.load(Ordering::Relaxed),
            "passes": counters.passes.load(Ordering::Relaxed),
            "page_mismatches": counters.mismatches.load(Ordering::Relaxed),
        })
    }
}

fn map_counters(file: &OwnedFd) -> Result<NonNull<Counters>> {
    // SAFETY: a new mapping at an address that the kernel chooses.
    let address =
        unsafe { mmap(std::ptr::null_mut(), PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, 0) };
    NonNull::new(address.context("map counters")?.cast()).context("counters at address zero")
}

/// Starts all of them.
pub(crate) fn start_all(writers: &[Writer]) -> Result<Vec<WriterCounters>> {
    writers.iter().enumerate().map(|(index, writer)| start(index, writer)).collect()
}

fn start(index: usize, writer: &Writer) -> Result<WriterCounters> {
    // Without close-on-exec: the writer takes it over by its number.
    let file = rustix::fs::memfd_create("writer", rustix::fs::MemfdFlags::empty())?;
    File::from(file.try_clone()?).set_len(PAGE as u64)?;
    let shared = map_counters(&file)?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0(format!("writer{index}")).arg(VERB).arg(file.as_raw_fd().to_string()).arg(index.to_string());
    let child = command.args([writer.bytes, writer.pages_per_second].map(|number| number.to_string())).spawn();
    Ok(WriterCounters { pid: child.context("start a writer")?.id(), shared })
}

/// A writer's whole life.
pub(crate) fn run(words: impl Iterator<Item = String>) -> Result<()> {
    let numbers: Vec<u64> = words.map(|word| word.parse()).collect::<Result<_, _>>().context("a writer's numbers")?;
    let [file, index, bytes, rate] = numbers[..] else { bail!("a writer takes four numbers") };
    // SAFETY: process 1 has handed it over, and nothing else here knows the number.
    let file = unsafe { OwnedFd::from_raw_fd(file as i32) };
    // SAFETY: a mapping of a whole page that is never taken down.
    let counters = unsafe { map_counters(&file)?.as_ref() };
    let _ = rustix::thread::set_name(&std::ffi::CString::new(format!("writer{index}"))?);
    let pages = (bytes as usize / PAGE).max(1);
    let mut memory = vec![0u64; pages * WORDS];
    let (began, mut done) = (Instant::now(), 0u64);
    loop {
        std::thread::sleep(TICK);
        let due = (began.elapsed().as_secs_f64() * rate as f64) as u64;
        // What a pause made it miss is not caught up: the rate is a rate, not a debt.
        if due.saturating_sub(done) > rate / 5 + 1 {
            done = due - (rate / 100).min(due);
        }
        while done < due {
            let (page, pass) =
                ((counters.pages.load(Ordering::Relaxed) as usize) % pages, counters.passes.load(Ordering::Relaxed));
            let words = &mut memory[page * WORDS..][..WORDS];
            if !write_page(words, page as u64, pass) {
                counters.mismatches.fetch_add(1, Ordering::Relaxed);
            }
            counters.pages.fetch_add(1, Ordering::Relaxed);
            counters.passes.fetch_add(u64::from(page + 1 == pages), Ordering::Relaxed);
            done += 1;
        }
    }
}

/// Checks what pass number `pass` must find, and writes its own; whether it found that.
fn write_page(words: &mut [u64], page: u64, pass: u64) -> bool {
    let value =
        |pass: u64, index: usize| if pass == 0 { 0 } else { (page << 32 ^ pass).wrapping_mul(index as u64 + 1) };
    let fine = words.iter().enumerate().all(|(index, &word)| word == value(pass, index));
    for (index, word) in words.iter_mut().enumerate() {
        *word = value(pass + 1, index);
    }
    fine
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_not_what_was_written_is_noticed() {
        let mut page = vec![0; WORDS];
        assert!(write_page(&mut page, 3, 0) && write_page(&mut page, 3, 1));
        page[100] ^= 1;
        assert!(!write_page(&mut page, 3, 2));
        assert!(write_page(&mut page, 3, 3));
        // The page of an earlier pass, or of another place.
        assert!(!write_page(&mut page.clone(), 3, 3) && !write_page(&mut page, 4, 4));
    }
}
