//! Copies a file on the first disk again and again, and compares each copy with what the original must be.
//!
//! What is compared comes from the disk, not from the page cache. The original's content is made from a seed, so that it is known without
//! trusting the disk.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dunlin_linux::system;
use rustix::fs::Advice;
use rustix::mount::MountFlags;

use crate::options::Copy;
use crate::state::State;

const DEVICE: &str = "/dev/vda";
const FOLDER: &str = "/disk";
const ORIGINAL: &str = "/disk/original";
/// Bytes moved at a time.
const CHUNK: usize = 1 << 20;

/// Mounts the disk, makes the original, and starts to copy. A disk that has an original (after a restart) keeps it.
pub(crate) fn start(copy: &Copy, state: Arc<State>) -> Result<()> {
    system::mount_fs(DEVICE, "ext4", FOLDER, MountFlags::empty(), "")?;
    let (bytes, rate) = (copy.bytes, copy.bytes_per_second);
    if fs::metadata(ORIGINAL).map_or(0, |file| file.len()) != bytes {
        make_original(bytes)?;
    }
    let wanted = checksum_wanted(bytes);
    let body = move || {
        for number in 0u64.. {
            let path = format!("{FOLDER}/copy-{}", number % 2);
            match copy_once(Path::new(&path), bytes, rate, wanted, &state) {
                Ok(()) => {
                    state.copies.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => {
                    println!("GUEST copy {number}: {error:#}");
                    state.copy_errors.fetch_add(1, Ordering::Relaxed);
                    // A disk that is gone stays so; who switches the machine off wants the console too.
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
        }
    };
    std::thread::Builder::new().name("copier".into()).spawn(body).context("thread of the copier")?;
    Ok(())
}

/// The original's bytes: xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift generators").
struct Bytes(u64);

impl Bytes {
    fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    fn fill(&mut self, chunk: &mut [u8]) {
        for word in chunk.chunks_mut(8) {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            word.copy_from_slice(&self.0.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()[..word.len()]);
        }
    }
}

fn chunks(bytes: u64) -> impl Iterator<Item = usize> {
    let whole = (bytes / CHUNK as u64) as usize;
    let rest = (bytes % CHUNK as u64) as usize;
    std::iter::repeat_n(CHUNK, whole).chain((rest > 0).then_some(rest))
}

fn make_original(bytes: u64) -> Result<()> {
    let (mut file, mut source) = (File::create(ORIGINAL)?, Bytes::new());
    let mut chunk = vec![0; CHUNK];
    for length in chunks(bytes) {
        source.fill(&mut chunk[..length]);
        file.write_all(&chunk[..length])?;
    }
    file.sync_all().context("the original")
}

fn checksum_wanted(bytes: u64) -> u32 {
    let (mut sum, mut source) = (crc32fast::Hasher::new(), Bytes::new());
    let mut chunk = vec![0; CHUNK];
    for length in chunks(bytes) {
        source.fill(&mut chunk[..length]);
        sum.update(&chunk[..length]);
    }
    sum.finalize()
}

/// Has the kernel forget what it holds of a file: the next read is the disk's.
fn forget(file: &File) -> Result<()> {
    file.sync_all()?;
    rustix::fs::fadvise(file, 0, None, Advice::DontNeed).context("forget the page cache")
}

fn copy_once(to: &Path, bytes: u64, rate: u64, wanted: u32, state: &State) -> Result<()> {
    let (mut from, mut file) = (File::open(ORIGINAL)?, File::create(to)?);
    forget(&from)?;
    let mut chunk = vec![0; CHUNK];
    let began = Instant::now();
    let mut moved = 0;
    for length in chunks(bytes) {
        from.read_exact(&mut chunk[..length])?;
        file.write_all(&chunk[..length])?;
        moved += length as u64;
        state.copied_bytes.fetch_add(length as u64, Ordering::Relaxed);
        let due = Duration::from_secs_f64(moved as f64 / rate as f64);
        std::thread::sleep(due.saturating_sub(began.elapsed()));
    }
    forget(&file)?;
    let found = checksum(to)?;
    ensure!(found == wanted, "{} has the checksum {found:#x}, not {wanted:#x}", to.display());
    Ok(())
}

fn checksum(path: &Path) -> Result<u32> {
    let (mut sum, mut file) = (crc32fast::Hasher::new(), File::open(path)?);
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(sum.finalize()),
            length => sum.update(&chunk[..length]),
        }
    }
}

/// Compares the original on the disk with what it must be; how many bytes it has.
pub(crate) fn verify() -> Result<u64> {
    let file = File::open(ORIGINAL).context("no file is copied")?;
    forget(&file)?;
    let bytes = file.metadata()?.len();
    let (found, wanted) = (checksum(Path::new(ORIGINAL))?, checksum_wanted(bytes));
    ensure!(found == wanted, "the original has the checksum {found:#x}, not {wanted:#x}");
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_original_is_the_same_however_it_is_cut() {
        let mut whole = vec![0; 64];
        Bytes::new().fill(&mut whole);
        let mut source = Bytes::new();
        let mut cut = vec![0; 64];
        source.fill(&mut cut[..24]);
        source.fill(&mut cut[24..]);
        assert_eq!(whole, cut);
        assert_eq!(chunks(CHUNK as u64 * 2 + 5).collect::<Vec<_>>(), [CHUNK, CHUNK, 5]);
        assert_ne!(checksum_wanted(100), checksum_wanted(101));
    }
}
