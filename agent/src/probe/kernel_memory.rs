//! Reading kernel memory by a BPF program that is run by hand: the way to structures that no file shows.
//!
//! Owns the reading, not where anything lies. What is read changes meanwhile, or is freed: whoever follows pointers checks what it finds
//! and bounds its steps.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use dunlin_ebpf::PEEK_BYTES;

use super::mapped::MappedArray;
use super::syscall;

/// Why kernel memory could not be read.
#[derive(Debug, thiserror::Error)]
pub enum PeekError {
    /// Nothing is there (any more).
    #[error("kernel memory at {0:#x} cannot be read")]
    Unreadable(u64),
    /// The program could not be run.
    #[error("the kernel does not run the program that reads its memory: {0}")]
    Run(#[source] io::Error),
}

/// The program, loaded, and where it puts what it reads.
#[derive(Debug)]
pub(crate) struct KernelMemory {
    program: OwnedFd,
    peeked: MappedArray,
}

impl KernelMemory {
    pub(super) fn new(program: OwnedFd, peeked: MappedArray) -> Self {
        Self { program, peeked }
    }

    /// Where the kernel has the calling thread's `struct task_struct`.
    pub(super) fn current_task(&mut self) -> Result<u64, PeekError> {
        self.peek(0, 8)?;
        Ok(self.peeked.words()[0].load(Ordering::Relaxed))
    }

    /// Reads `bytes` bytes, 4096 at most, and hands them out as little-endian bytes.
    pub(super) fn read(&mut self, address: u64, bytes: u32) -> Result<Vec<u8>, PeekError> {
        let bytes = bytes.min(PEEK_BYTES);
        if address == 0 {
            return Err(PeekError::Unreadable(0));
        }
        self.peek(address, bytes)?;
        let words = self.peeked.words()[..(bytes as usize).div_ceil(8)].iter();
        let mut read: Vec<u8> = words.flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect();
        read.truncate(bytes as usize);
        Ok(read)
    }

    /// Reads one word.
    pub(super) fn word(&mut self, address: u64) -> Result<u64, PeekError> {
        self.read(address, 8).map(|bytes| word_at(&bytes, 0))
    }

    fn peek(&mut self, address: u64, bytes: u32) -> Result<(), PeekError> {
        match syscall::run(&self.program, &[address, bytes.into()]) {
            Ok(0) => Ok(()),
            Ok(_) => Err(PeekError::Unreadable(address)),
            Err(error) => Err(PeekError::Run(error)),
        }
    }
}

/// The word at an offset of bytes that were read; zero beyond them.
pub(super) fn word_at(bytes: &[u8], offset: u32) -> u64 {
    let offset = offset as usize;
    bytes.get(offset..offset + 8).map_or(0, |b| u64::from_ne_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
}

/// The half word at an offset, likewise.
pub(super) fn half_at(bytes: &[u8], offset: u32) -> u32 {
    let offset = offset as usize;
    bytes.get(offset..offset + 4).map_or(0, |b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
}
