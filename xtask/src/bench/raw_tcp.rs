//! The peer "raw TCP": so many bytes over so many streams, out of a prefilled memory file into a fresh one in another
//! process, with nothing else. What the link and the receiver's page faults cost, and the least that a migration can take.
//!
//! The receiver is this program again (`cargo xtask raw-tcp-receiver`, hidden). It makes and maps a new memory file for
//! each transfer, after the sender's clock has started.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};

use crate::process::OwnChild;

/// Bytes in one write or read at most.
const CHUNK_BYTES: usize = 2 << 20;
/// No transfer of a bench takes so long.
const LIMIT: Duration = Duration::from_secs(60);
/// The hidden verb.
pub(crate) const RECEIVER_VERB: &str = "raw-tcp-receiver";

/// A receiver process and memory to send.
#[derive(Debug)]
pub(super) struct RawTcp {
    port: u16,
    memory: Memory,
    // Ends with us.
    _receiver: OwnChild,
}

impl RawTcp {
    /// Starts the receiver and fills `bytes` of memory.
    pub(super) fn start(bytes: usize, scratch: &Path) -> Result<Self> {
        let program = std::env::current_exe().context("our own program's path")?;
        let mut command = Command::new(program);
        command.arg(RECEIVER_VERB).stdout(Stdio::piped());
        let mut receiver = OwnChild::start(&mut command, &scratch.join("raw-tcp-receiver.err"))?;
        let output = receiver.child_mut().stdout.take().context("the receiver's output")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line).context("the receiver's port")?;
        let port = line.trim().parse().with_context(|| format!("`{}` is no port", line.trim()))?;
        let mut memory = Memory::new(bytes)?;
        fill(memory.bytes_mut());
        Ok(Self { port, memory, _receiver: receiver })
    }

    /// Sends the first `bytes` of the memory over `streams` streams, paced by the kernel to `limit` bytes per second in all.
    /// Returns the time from the first dial to the receiver's word that all is there.
    pub(super) fn send(&self, bytes: usize, streams: usize, limit: Option<u64>) -> Result<Duration> {
        let memory = self.memory.bytes().get(..bytes).context("more bytes than memory to send")?;
        let started = Instant::now();
        let mut control = self.dial()?;
        control.write_all(&words([bytes as u64, streams as u64]))?;
        let share = bytes.div_ceil(streams).next_multiple_of(4096);
        let parts: Vec<&[u8]> = memory.chunks(share).collect();
        if parts.len() != streams {
            bail!("{bytes} bytes do not make {streams} streams");
        }
        std::thread::scope(|scope| {
            let threads: Vec<_> = parts
                .iter()
                .enumerate()
                .map(|(index, part)| scope.spawn(move || self.send_part(index * share, part, limit, streams)))
                .collect();
            threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| bail!("a sender panicked")))
        })?;
        control.read_exact(&mut [0]).context("the receiver's word")?;
        Ok(started.elapsed())
    }

    fn dial(&self) -> Result<TcpStream> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).context("dialling the receiver")?;
        set_up(&stream)?;
        Ok(stream)
    }

    fn send_part(&self, offset: usize, part: &[u8], limit: Option<u64>, streams: usize) -> Result<()> {
        let mut stream = self.dial()?;
        if let Some(limit) = limit {
            pace(&stream, limit / streams as u64)?;
        }
        stream.write_all(&words([offset as u64, part.len() as u64]))?;
        for chunk in part.chunks(CHUNK_BYTES) {
            stream.write_all(chunk).context("sending")?;
        }
        Ok(())
    }
}

fn set_up(stream: &TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    Ok(())
}

/// Lets the kernel hold a stream to a rate.
fn pace(stream: &TcpStream, bytes_per_second: u64) -> Result<()> {
    // SAFETY: the option takes a u64 by address and length, and the descriptor is open.
    let answer = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MAX_PACING_RATE,
            (&raw const bytes_per_second).cast(),
            size_of::<u64>() as libc::socklen_t,
        )
    };
    if answer != 0 {
        return Err(std::io::Error::last_os_error()).context("SO_MAX_PACING_RATE");
    }
    Ok(())
}

/// The receiver's end: serves transfers until it is killed.
pub(crate) fn receiver() -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listening")?;
    println!("{}", listener.local_addr()?.port());
    std::io::stdout().flush()?;
    loop {
        receive(&listener)?;
    }
}

fn receive(listener: &TcpListener) -> Result<()> {
    let accept = || -> Result<(TcpStream, [u64; 2])> {
        let (mut stream, _) = listener.accept().context("accepting")?;
        set_up(&stream)?;
        let mut head = [0; 16];
        stream.read_exact(&mut head).context("a head")?;
        Ok((stream, [0, 8].map(|at| u64::from_le_bytes(head[at..at + 8].try_into().unwrap_or_default()))))
    };
    let (mut control, [bytes, streams]) = accept()?;
    let mut memory = Memory::new(bytes as usize)?;
    let mut parts = Vec::new();
    for _ in 0..streams {
        parts.push(accept()?);
    }
    parts.sort_by_key(|(_, [offset, _])| *offset);
    std::thread::scope(|scope| {
        let mut rest = memory.bytes_mut();
        let mut threads = Vec::new();
        for (stream, [_, len]) in &mut parts {
            let (part, others) = rest.split_at_mut_checked(*len as usize).context("parts larger than the whole")?;
            rest = others;
            threads.push(scope.spawn(move || {
                part.chunks_mut(CHUNK_BYTES).try_for_each(|chunk| stream.read_exact(chunk).context("receiving"))
            }));
        }
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| bail!("a receiver panicked")))
    })?;
    control.write_all(&[1]).context("the last word")
}

fn words(words: [u64; 2]) -> [u8; 16] {
    let mut bytes = [0; 16];
    for (word, place) in words.iter().zip(bytes.chunks_exact_mut(8)) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Fills memory with bytes of which no page is zero.
fn fill(bytes: &mut [u8]) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for word in bytes.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
}

/// A mapped memory file, like the one that guest RAM is.
#[derive(Debug)]
struct Memory {
    start: NonNull<u8>,
    len: usize,
    _file: OwnedFd,
}

// SAFETY: plain memory that this value owns.
unsafe impl Send for Memory {}
// SAFETY: through a shared reference it is only read.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(len: usize) -> Result<Self> {
        let file = rustix::fs::memfd_create("raw-tcp", MemfdFlags::CLOEXEC).context("a memory file")?;
        rustix::fs::ftruncate(&file, len as u64).context("a memory file's length")?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, access, MapFlags::SHARED, &file, 0) };
        let start = NonNull::new(start.context("mapping a memory file")?.cast()).context("a null mapping")?;
        Ok(Self { start, len, _file: file })
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `start..start+len` is mapped for as long as `self` lives; the file is ours alone and never shrinks.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped, and no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_arrives_whole() {
        let mut memory = Memory::new(3 << 20).unwrap();
        fill(memory.bytes_mut());
        assert!(memory.bytes().chunks(4096).all(|page| page.iter().any(|&byte| byte != 0)));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let receiver = std::thread::spawn(move || receive(&listener));
        let errors = tempfile::tempdir().unwrap();
        let stand_in = OwnChild::start(&mut Command::new("true"), &errors.path().join("err")).unwrap();
        let peer = RawTcp { port, memory, _receiver: stand_in };
        assert!(peer.send(3 << 20, 2, None).unwrap() > Duration::ZERO);
        receiver.join().unwrap().unwrap();
        assert!(peer.send(4 << 20, 2, None).is_err(), "more than there is");
    }
}
