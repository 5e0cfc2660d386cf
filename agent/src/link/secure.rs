//! One TLS connection that one thread may read while another writes.
//!
//! Owns the state of the cipher, and ciphertext on its way. Must not know whom to trust ([`super::tls`]), or what flows.
//!
//! Three locks, taken in this order: `incoming` or `outgoing`, which a reader or a writer holds also while it waits for the network, then `state`, which is held for the work of the
//! cipher alone. So neither direction waits for the other's network. After the handshake a reader owes the peer nothing that its writer would have to send at once: there are no
//! tickets, and the answer to a change of keys goes out with the next bytes (RFC 8446 §4.6.3).

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::net::SendFlags;
use rustls::Connection;

use super::stream::poll_for;
use super::tls::TlsFault;

/// So much is encrypted at a time: four records.
const WRITE_BYTES: usize = 64 << 10;
/// So much ciphertext is read at a time.
const READ_BYTES: usize = 256 << 10;
/// What a peer is sent that speaks no TLS, in the clear: a fatal alert, "unexpected message" (RFC 8446 §5.1, §6).
const ALERT: [u8; 7] = [21, 3, 3, 0, 2, 2, 10];

/// A TLS connection.
#[derive(Debug)]
pub(super) struct Secure {
    socket: TcpStream,
    state: Mutex<Connection>,
    incoming: Mutex<Incoming>,
    outgoing: Mutex<Outgoing>,
}

/// What has come from the socket.
#[derive(Debug)]
struct Incoming {
    /// From `start` to `end`: ciphertext that the state has not taken.
    cipher: Box<[u8]>,
    start: usize,
    end: usize,
    /// Bytes that the state has decrypted and nobody has read.
    plain: usize,
    /// Nothing more comes.
    ended: bool,
}

/// What is on its way to the socket.
#[derive(Debug, Default)]
struct Outgoing {
    cipher: Vec<u8>,
    /// So much of it has been sent.
    sent: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Secure {
    /// Shakes hands over a socket. `until` bounds all of it.
    ///
    /// # Errors
    /// A peer that is not trusted, does not trust us, or speaks no TLS ([`TlsFault`] inside); the kernel's word.
    pub(super) fn shake_hands(socket: TcpStream, mut state: Connection, until: Instant) -> io::Result<Self> {
        // What is encrypted is taken out at once.
        state.set_buffer_limit(None);
        let incoming =
            Incoming { cipher: vec![0; READ_BYTES].into_boxed_slice(), start: 0, end: 0, plain: 0, ended: false };
        let this = Self {
            socket,
            state: Mutex::new(state),
            incoming: Mutex::new(incoming),
            outgoing: Mutex::new(Outgoing::default()),
        };
        loop {
            this.send_all(&mut lock(&this.outgoing))?;
            let incoming = &mut *lock(&this.incoming);
            if !lock(&this.state).is_handshaking() {
                break;
            }
            if incoming.ended {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the peer closed the connection in the TLS handshake",
                ));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the TLS handshake took too long"));
            }
            if poll_for(&this.socket, PollFlags::IN, left)? {
                this.fetch(incoming)?;
                this.decrypt(&mut lock(&this.state), incoming)?;
            }
        }
        Ok(this)
    }

    pub(super) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// The protocol's version and the cipher suite.
    pub(super) fn encryption(&self) -> String {
        let suite = lock(&self.state).negotiated_cipher_suite().map(|suite| suite.suite());
        format!("tls1.3 {}", suite.and_then(|suite| suite.as_str()).unwrap_or("unknown"))
    }

    /// Reads what has come into `buffers`; waits for some if none has. 0 is the end.
    pub(super) fn read(&self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        if buffers.iter().all(|buffer| buffer.is_empty()) {
            return Ok(0);
        }
        let incoming = &mut *lock(&self.incoming);
        loop {
            let taken = self.take(incoming, buffers)?;
            if taken > 0 || incoming.ended {
                return Ok(taken);
            }
            self.fetch(incoming)?;
        }
    }

    /// Waits until [`Secure::read`] would not wait. What has come of a record that is not whole stays.
    pub(super) fn await_data(&self, until: Instant) -> io::Result<bool> {
        let incoming = &mut *lock(&self.incoming);
        loop {
            if self.decrypt(&mut lock(&self.state), incoming)? || incoming.ended {
                return Ok(true);
            }
            if !poll_for(&self.socket, PollFlags::IN, until.saturating_duration_since(Instant::now()))? {
                return Ok(false);
            }
            self.fetch(incoming)?;
        }
    }

    /// Encrypts and sends the first bytes of `slices`; how many.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when the time for writing is up: the connection is to be given up then.
    pub(super) fn write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut left = WRITE_BYTES;
        let first: Vec<IoSlice<'_>> = slices
            .iter()
            .map(|slice| {
                let part = &slice[..slice.len().min(left)];
                left -= part.len();
                IoSlice::new(part)
            })
            .filter(|part| !part.is_empty())
            .collect();
        let outgoing = &mut *lock(&self.outgoing);
        let written = lock(&self.state).writer().write_vectored(&first)?;
        self.send_all(outgoing)?;
        Ok(written)
    }

    /// Takes all ciphertext out of the state, and sends it.
    fn send_all(&self, outgoing: &mut Outgoing) -> io::Result<()> {
        {
            let mut state = lock(&self.state);
            while state.wants_write() {
                state.write_tls(&mut outgoing.cipher)?;
            }
        }
        while outgoing.sent < outgoing.cipher.len() {
            match (&self.socket).write(&outgoing.cipher[outgoing.sent..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => outgoing.sent += sent,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        outgoing.cipher.clear();
        outgoing.sent = 0;
        Ok(())
    }

    /// One read from the socket. Everything that came before has been decrypted.
    fn fetch(&self, incoming: &mut Incoming) -> io::Result<()> {
        (incoming.start, incoming.end) = (0, 0);
        match (&self.socket).read(&mut incoming.cipher) {
            Ok(0) => incoming.ended = true,
            Ok(read) => incoming.end = read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Fills `buffers` with what has come; how many bytes.
    fn take(&self, incoming: &mut Incoming, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let mut state = lock(&self.state);
        let mut taken = 0;
        for buffer in buffers {
            let mut rest = &mut buffer[..];
            while !rest.is_empty() {
                if !self.decrypt(&mut state, incoming)? {
                    return Ok(taken);
                }
                let read = state.reader().read(rest)?;
                incoming.plain = incoming.plain.saturating_sub(read);
                taken += read;
                rest = &mut rest[read..];
            }
        }
        Ok(taken)
    }

    /// Decrypts what has come until there is something to read. Whether there is.
    fn decrypt(&self, state: &mut Connection, incoming: &mut Incoming) -> io::Result<bool> {
        while incoming.plain == 0 && incoming.start < incoming.end {
            let taken = state.read_tls(&mut &incoming.cipher[incoming.start..incoming.end])?;
            incoming.start += taken;
            let told = match state.process_new_packets() {
                Ok(told) => told,
                Err(error) => {
                    self.send_alert(state);
                    return Err(io::Error::new(io::ErrorKind::InvalidData, TlsFault::new(error)));
                }
            };
            incoming.plain = told.plaintext_bytes_to_read();
            // Nothing is taken behind the peer's word that it closes.
            if told.peer_has_closed() || taken == 0 {
                (incoming.start, incoming.ended) = (incoming.end, true);
            }
        }
        Ok(incoming.plain > 0)
    }

    /// Tells the peer why the connection ends, if that can be done without waiting.
    fn send_alert(&self, state: &mut Connection) {
        let Ok(outgoing) = self.outgoing.try_lock() else { return };
        let mut bytes = outgoing.cipher[outgoing.sent..].to_vec();
        while state.wants_write() {
            if state.write_tls(&mut bytes).is_err() {
                return;
            }
        }
        if bytes.is_empty() && state.is_handshaking() {
            bytes.extend(ALERT);
        }
        let _gone_already = rustix::net::send(&self.socket, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use proptest::prelude::*;

    use super::super::stream::{Stream, set_up, timed_out};
    use super::super::testing::{Ca, LIMIT, secure_pair, secured, sockets};
    use super::*;

    /// Bytes that tell where they belong.
    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at * 31 + at / 257) as u8).collect()
    }

    fn read_all(mut stream: &Stream, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// A connection through which ciphertext passes in pieces of these lengths, in turn, toward the second end.
    fn through_pieces(pieces: Vec<usize>) -> (Stream, Stream) {
        let ca = Ca::new();
        let (near, mut in_between) = sockets();
        let (mut onward, far) = sockets();
        let (mut back_from, mut back_to) = (onward.try_clone().unwrap(), in_between.try_clone().unwrap());
        std::thread::spawn(move || {
            for length in pieces.iter().cycle() {
                let mut piece = vec![0; *length];
                match in_between.read(&mut piece) {
                    Ok(read @ 1..) if onward.write_all(&piece[..read]).is_ok() => {}
                    _ => break,
                }
            }
            let _gone_already = onward.shutdown(std::net::Shutdown::Write);
        });
        std::thread::spawn(move || io::copy(&mut back_from, &mut back_to));
        let (near, far) = secured((&ca.good("a"), near), (&ca.good("b"), far), "b");
        (near.unwrap(), far.unwrap())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        #[test]
        fn what_is_written_in_any_pieces_is_read_in_any_others(
            writes in prop::collection::vec((0usize..3000, 0usize..90_000), 1..12),
            pieces in prop::collection::vec(1usize..40_000, 1..8),
            reads in prop::collection::vec((0usize..100, 1usize..50_000), 1..8),
        ) {
            let (near, far) = through_pieces(pieces);
            let length = writes.iter().map(|(a, b)| a + b).sum();
            let sent = pattern(length);
            let received = std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut rest = &sent[..];
                    for (a, b) in &writes {
                        let (first, more) = rest.split_at(*a);
                        let (second, more) = more.split_at(*b);
                        rest = more;
                        let mut slices = [IoSlice::new(first), IoSlice::new(second)];
                        let mut left = &mut slices[..];
                        IoSlice::advance_slices(&mut left, 0);
                        while !left.is_empty() {
                            let written = (&mut &near).write_vectored(left).unwrap();
                            IoSlice::advance_slices(&mut left, written);
                        }
                    }
                });
                let mut received: Vec<u8> = Vec::new();
                for (a, b) in reads.iter().cycle() {
                    if received.len() == length {
                        break;
                    }
                    let (mut first, mut second) = (vec![0; *a], vec![0; *b]);
                    let mut buffers = [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)];
                    let read = (&mut &far).read_vectored(&mut buffers).unwrap();
                    received.extend([first, second].concat().iter().take(read));
                }
                received
            });
            prop_assert!(received == sent);
            near.shutdown();
            prop_assert_eq!((&mut &far).read(&mut [0]).unwrap(), 0, "an end is an end");
        }
    }

    #[test]
    fn a_writer_that_waits_for_the_network_stops_no_reader() {
        let (near, far) = secure_pair();
        let sent = pattern(24 << 20);
        std::thread::scope(|scope| {
            // Nobody reads this until the way back has been read, which is more than sockets hold.
            scope.spawn(|| (&mut &near).write_all(&sent).unwrap());
            scope.spawn(|| {
                (&mut &far).write_all(&sent).unwrap();
                assert!(read_all(&far, sent.len()) == sent);
            });
            assert!(read_all(&near, sent.len()) == sent);
        });
    }

    #[test]
    fn half_a_record_is_no_data_and_is_not_lost() {
        let ca = Ca::new();
        let (near, mut in_between) = sockets();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut onward = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let far = listener.accept().unwrap().0;
        set_up(&far, LIMIT, LIMIT).unwrap();
        // The handshake passes, record by record; what is sent later waits for its turn.
        let (near, far, mut in_between, mut onward) = std::thread::scope(|scope| {
            let (mut from_far, mut to_near) = (onward.try_clone().unwrap(), in_between.try_clone().unwrap());
            let shaken = scope.spawn(|| secured((&ca.good("a"), near), (&ca.good("b"), far), "b"));
            let pass = |from: &mut TcpStream, to: &mut TcpStream| {
                let mut bytes = vec![0; 64 << 10];
                let read = from.read(&mut bytes).unwrap();
                to.write_all(&bytes[..read]).unwrap();
            };
            pass(&mut in_between, &mut onward);
            while !shaken.is_finished() {
                for (from, to) in [(&mut from_far, &mut to_near), (&mut in_between, &mut onward)] {
                    if poll_for(&*from, PollFlags::IN, Duration::from_millis(1)).unwrap() {
                        pass(from, to);
                    }
                }
            }
            let (near, far) = shaken.join().unwrap();
            (near.unwrap(), far.unwrap(), in_between, onward)
        });
        let sent = pattern(10_000);
        (&mut &near).write_all(&sent).unwrap();
        let mut record = vec![0; 64 << 10];
        let mut length = 0;
        while length < sent.len() + 22 {
            length += in_between.read(&mut record[length..]).unwrap();
        }
        onward.write_all(&record[..length - 1]).unwrap();
        assert!(!far.await_data(Duration::from_millis(100)).unwrap());
        far.set_up(Duration::from_millis(50), LIMIT).unwrap();
        assert!(timed_out(&(&mut &far).read(&mut [0; 10]).unwrap_err()));
        onward.write_all(&record[length - 1..length]).unwrap();
        assert!(far.await_data(LIMIT).unwrap());
        assert!(read_all(&far, sent.len()) == sent);
        // A record that was changed on its way is an error, and stays one.
        (&mut &near).write_all(b"more").unwrap();
        let length = in_between.read(&mut record).unwrap();
        record[length - 1] ^= 1;
        onward.write_all(&record[..length]).unwrap();
        assert_eq!((&mut &far).read(&mut [0; 10]).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
