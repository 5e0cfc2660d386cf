//! A client of the guest's source of bytes: one TCP connection that never rests, each byte compared with what is due.
//!
//! It takes what comes as it comes; the guest sets the pace. Must not know of migration.

use std::io::Read;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::gap::{Gap, GapMeter, monotonic_ns};

/// The bytes repeat after so many.
const PERIOD: u64 = 251;
const PIECE_BYTES: usize = 16 << 10;

/// What the client has seen so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BulkReport {
    /// Bytes that came, all of them right unless `fault` says otherwise.
    pub bytes: u64,
    /// The longest time between two pieces.
    pub largest_gap: Gap,
    /// The first wrong byte, or how the connection ended before it was told to.
    pub fault: Option<String>,
}

#[derive(Debug, Default)]
struct State {
    bytes: u64,
    gaps: GapMeter,
    fault: Option<String>,
}

/// One connection with its thread.
#[derive(Debug)]
pub struct BulkClient {
    stream: TcpStream,
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    receiver: Option<JoinHandle<()>>,
}

impl BulkClient {
    /// Connects and takes all that comes.
    ///
    /// # Errors
    /// No connection within ten seconds.
    pub fn start(server: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&server, Duration::from_secs(10))
            .with_context(|| format!("connect to the source of bytes at {server}"))?;
        let (state, stop) = (Arc::<Mutex<State>>::default(), Arc::<AtomicBool>::default());
        let receiver = thread::spawn({
            let (stream, state, stop) = (stream.try_clone()?, Arc::clone(&state), Arc::clone(&stop));
            move || {
                if let Err(error) = take(stream, &state, &stop)
                    && !stop.load(Ordering::Acquire)
                {
                    lock(&state).fault.get_or_insert(format!("{error:#}"));
                }
            }
        });
        Ok(Self { stream, state, stop, receiver: Some(receiver) })
    }

    /// What was seen so far.
    pub fn report(&self) -> BulkReport {
        let state = lock(&self.state);
        BulkReport { bytes: state.bytes, largest_gap: state.gaps.largest(), fault: state.fault.clone() }
    }

    /// The longest gaps since the last [`BulkClient::restart_measurement`], longest first.
    pub fn longest_gaps(&self) -> Vec<Gap> {
        lock(&self.state).gaps.longest().to_vec()
    }

    /// Starts a new measurement of the largest gap; one that is open now counts whole into the new one.
    pub fn restart_measurement(&self) {
        lock(&self.state).gaps.restart();
    }
}

impl Drop for BulkClient {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Ends the thread's blocking call.
        let _closed_already = self.stream.shutdown(Shutdown::Both);
        if let Some(thread) = self.receiver.take() {
            let _panicked_and_printed = thread.join();
        }
    }
}

fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    // A panic in a client thread must not hide what it measured.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn take(mut stream: TcpStream, state: &Mutex<State>, stop: &AtomicBool) -> Result<()> {
    let mut piece = [0; PIECE_BYTES];
    let mut offset = 0;
    while !stop.load(Ordering::Acquire) {
        let len = stream.read(&mut piece).context("receiving")?;
        ensure!(len > 0, "the server closed the connection");
        let wrong = piece[..len].iter().zip(offset..).find(|(byte, at)| u64::from(**byte) != at % PERIOD);
        if let Some((byte, at)) = wrong {
            anyhow::bail!("byte {at} is {byte}, not {}", at % PERIOD);
        }
        offset += len as u64;
        let mut state = lock(state);
        state.bytes = offset;
        state.gaps.event(monotonic_ns());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpListener;

    use super::*;
    use crate::wait::wait_for;

    /// Sends the right bytes, but for the one at `wrong`.
    fn source(wrong: Option<u64>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            for start in (0..).step_by(1000) {
                let bytes: Vec<u8> = (start..start + 1000u64)
                    .map(|at| if wrong == Some(at) { 255 } else { (at % PERIOD) as u8 })
                    .collect();
                if stream.write_all(&bytes).is_err() {
                    return;
                }
            }
        });
        address
    }

    #[test]
    fn each_byte_is_compared() {
        let limit = Duration::from_secs(10);
        let client = BulkClient::start(source(None)).unwrap();
        wait_for("bytes", limit, || (client.report().bytes > 300_000).then_some(())).unwrap();
        assert_eq!(client.report().fault, None);
        let client = BulkClient::start(source(Some(123_456))).unwrap();
        let fault = wait_for("the wrong one", limit, || client.report().fault).unwrap();
        assert!(fault.contains("byte 123456 is 255"), "{fault}");
    }
}
