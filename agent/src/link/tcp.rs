//! The link over TCP, in the clear or inside TLS: one connection for control, one a page stream, all with `TCP_NODELAY`.
//!
//! Owns dialling, greeting and time limits. Framing is [`super::wire`]'s, encryption [`super::stream`]'s. The unsafe code hands guest memory to `writev`/`readv`.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::marker::PhantomData;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::stream::{Stream, poll_for, set_up, timed_out};
use super::tls::{Tls, TlsFault};
use super::wire::{self, BULK_HEADER_BYTES, BulkFrame, CONTROL_HEADER_BYTES, HELLO_BYTES, Hello, Purpose, WireError};
use crate::model::{BytesPerSecond, MigrationId, Packing, PageRun, RegionId};
use crate::port::{
    BulkItem, BulkReceiver, BulkSender, BytesView, ControlChannel, LinkError, SourceLink, TargetLink, Unconnected,
};

/// How long dialling and greeting may take.
const GREETING_LIMIT: Duration = Duration::from_secs(5);
/// How long a peer that dialled us may take to greet.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);
/// How long it may take to secure the connection before that: both together are shorter than [`GREETING_LIMIT`].
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(2);
/// How often a waiting page stream asks whether to go on.
const TICK: Duration = Duration::from_millis(250);
/// Runs up to this size are copied and gathered; longer ones go out of guest memory directly.
const GATHER_RUN_BYTES: usize = 32 << 10;
/// So much may wait in the socket that the kernel has not sent yet.
const UNSENT_BYTES: u32 = 256 << 10;
/// So much is gathered before it is written, and read ahead behind a run.
const BUFFER_BYTES: usize = 128 << 10;

/// Where a peer listens: `tls://HOST:PORT`, or `tcp://HOST:PORT` in the clear.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    is_encrypted: bool,
    host: String,
    port: u16,
}

/// Text that is no address of a peer.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// Neither `tls://HOST:PORT` nor `tcp://HOST:PORT`.
    #[error("`{0}` is no address; write tls://HOST:PORT or tcp://HOST:PORT, for example tls://192.0.2.7:4460")]
    Malformed(String),
    /// A name that does not resolve.
    #[error("cannot resolve {host}: {source}")]
    Resolve {
        /// The name.
        host: String,
        /// What the resolver said.
        source: io::Error,
    },
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = || AddressError::Malformed(text.to_owned());
        let (is_encrypted, rest) = match text.split_once("://") {
            Some(("tcp", rest)) => (false, rest),
            Some(("tls", rest)) => (true, rest),
            _ => return Err(malformed()),
        };
        let (host, port) = rest.rsplit_once(':').ok_or_else(malformed)?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        // Without brackets an IPv6 address and its port cannot be told apart.
        if bracketed.is_none() && host.contains(':') {
            return Err(malformed());
        }
        let host = bracketed.unwrap_or(host);
        let port = port.parse().map_err(|_| malformed())?;
        if host.is_empty() || host.contains(['/', '@', ' ', '[', ']']) {
            return Err(malformed());
        }
        Ok(Self { is_encrypted, host: host.to_owned(), port })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.is_encrypted { "tls" } else { "tcp" };
        if self.host.contains(':') {
            write!(f, "{scheme}://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{scheme}://{}:{}", self.host, self.port)
        }
    }
}

impl Address {
    /// The socket addresses that it stands for.
    pub fn resolve(&self) -> Result<Vec<SocketAddr>, AddressError> {
        match (self.host.as_str(), self.port).to_socket_addrs() {
            Ok(addresses) => Ok(addresses.collect()),
            Err(source) => Err(AddressError::Resolve { host: self.host.clone(), source }),
        }
    }

    /// The host, as it was written.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Whether its port speaks TLS.
    pub fn is_encrypted(&self) -> bool {
        self.is_encrypted
    }

    /// Whether what is sent to it stays on this machine.
    pub fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.host.parse().is_ok_and(|address: IpAddr| address.is_loopback())
    }
}

fn io_error(doing: &'static str) -> impl Fn(io::Error) -> LinkError {
    move |source| match source.get_ref().and_then(|inner| inner.downcast_ref::<TlsFault>()) {
        Some(fault) => LinkError::Encryption(fault.to_string()),
        None => LinkError::Io { doing, source },
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl From<WireError> for LinkError {
    fn from(error: WireError) -> Self {
        Self::Protocol(error.to_string())
    }
}

/// Whether these are the first bytes of a TLS record (RFC 8446 §5.1).
fn is_tls(bytes: &[u8]) -> bool {
    matches!(bytes, [20..=23, 3, ..])
}

/// Sends our greeting and reads theirs. A peer that ends the connection may have said why before our greeting came.
fn greet(stream: &Stream, hello: &Hello) -> Result<Hello, LinkError> {
    let sent = (&mut &*stream).write_all(&hello.encode());
    let theirs = match (read_hello(stream, GREETING_LIMIT), sent) {
        (Ok(theirs), Ok(())) => theirs,
        (Err(error @ LinkError::Encryption(_)), _) => return Err(error),
        (_, Err(error)) => return Err(io_error("greeting")(error)),
        (Err(error), _) => return Err(error),
    };
    Ok(Hello::decode(&theirs)?)
}

/// Reads a greeting as far as it is worth reading, for about as long as `limit`: also one that comes in drops.
fn read_hello(mut stream: &Stream, limit: Duration) -> Result<[u8; HELLO_BYTES], LinkError> {
    let until = Instant::now() + limit;
    let mut bytes = [0; HELLO_BYTES];
    let mut filled = 0;
    while filled < HELLO_BYTES {
        match stream.read(&mut bytes[filled..]) {
            Ok(0) => return Err(io_error("greeting")(io::ErrorKind::UnexpectedEof.into())),
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(io_error("greeting")(error)),
        }
        if is_tls(&bytes[..filled]) {
            return Err(LinkError::Encryption(
                "the peer speaks TLS, and this end plain TCP; write tls:// at both ends (`dunlin vm receive --listen`, `dunlin migrate --to`)".to_owned(),
            ));
        }
        if Instant::now() >= until {
            return Err(LinkError::Stalled { doing: "greeting", after: limit });
        }
    }
    Ok(bytes)
}

/// A control channel over one connection.
pub struct TcpControl<M> {
    stream: Stream,
    stall: Duration,
    sent: Mutex<u32>,
    received: Mutex<u32>,
    message: PhantomData<fn(M) -> M>,
}

impl<M> TcpControl<M> {
    fn new(stream: Stream, stall: Duration) -> Result<Self, LinkError> {
        stream.set_up(stall, stall).map_err(io_error("setting up control"))?;
        Ok(Self { stream, stall, sent: Mutex::new(0), received: Mutex::new(0), message: PhantomData })
    }

    fn read(&self, buffer: &mut [u8], doing: &'static str) -> Result<(), LinkError> {
        (&self.stream).read_exact(buffer).map_err(|source| {
            if timed_out(&source) { LinkError::Stalled { doing, after: self.stall } } else { io_error(doing)(source) }
        })
    }
}

impl<M: Serialize + DeserializeOwned> ControlChannel<M> for TcpControl<M> {
    fn send(&self, message: &M) -> Result<(), LinkError> {
        let payload = postcard::to_stdvec(message).map_err(|error| LinkError::Protocol(error.to_string()))?;
        let mut sequence = lock(&self.sent);
        let header = wire::encode_control(*sequence, &payload);
        *sequence = sequence.wrapping_add(1);
        let mut slices = [IoSlice::new(&header), IoSlice::new(&payload)];
        let mut left = &mut slices[..];
        while !left.is_empty() {
            match (&self.stream).write_vectored(left) {
                Ok(0) => return Err(io_error("sending a message")(io::ErrorKind::WriteZero.into())),
                Ok(written) => IoSlice::advance_slices(&mut left, written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if timed_out(&error) => {
                    return Err(LinkError::Stalled { doing: "sending a message", after: self.stall });
                }
                Err(error) => return Err(io_error("sending a message")(error)),
            }
        }
        Ok(())
    }

    fn recv(&self, timeout: Duration) -> Result<Option<M>, LinkError> {
        let mut sequence = lock(&self.received);
        if !self.stream.await_data(timeout).map_err(io_error("waiting for a message"))? {
            return Ok(None);
        }
        let mut header = [0; CONTROL_HEADER_BYTES];
        self.read(&mut header, "receiving a message")?;
        let (length, crc) = wire::decode_control(&header, *sequence)?;
        *sequence = sequence.wrapping_add(1);
        // Grows with what arrives, not with what is announced.
        let mut payload = Vec::new();
        let read = (&self.stream).take(length as u64).read_to_end(&mut payload);
        match read {
            Ok(read) if read == length => {}
            Ok(_) => return Err(io_error("receiving a message")(io::ErrorKind::UnexpectedEof.into())),
            Err(error) if timed_out(&error) => {
                return Err(LinkError::Stalled { doing: "receiving a message", after: self.stall });
            }
            Err(error) => return Err(io_error("receiving a message")(error)),
        }
        if crc32fast::hash(&payload) != crc {
            return Err(WireError::Checksum("control message").into());
        }
        Ok(Some(wire::decode_message(&payload)?))
    }
}

/// The source's link.
pub struct TcpSource<M> {
    address: Address,
    tls: Option<Tls>,
    migration: MigrationId,
    stall: Duration,
    control: Arc<TcpControl<M>>,
}

impl<M: Serialize + DeserializeOwned + 'static> TcpSource<M> {
    /// Dials a target. A `tls://` address wants `tls`.
    ///
    /// # Errors
    /// Nobody there, nobody who speaks our language or is trusted, or no version in common.
    pub fn dial(
        address: Address,
        tls: Option<Tls>,
        migration: MigrationId,
        stall: Duration,
    ) -> Result<Self, LinkError> {
        let control = Arc::new(Self::dial_control(&address, tls.as_ref(), migration, stall)?);
        Ok(Self { address, tls, migration, stall, control })
    }

    /// How the link is encrypted, for people: `tls1.3` and the cipher suite's name, or `none`.
    pub fn encryption(&self) -> String {
        self.control.stream.encryption()
    }

    fn dial_control(
        address: &Address,
        tls: Option<&Tls>,
        migration: MigrationId,
        stall: Duration,
    ) -> Result<TcpControl<M>, LinkError> {
        let stream = connect(address, tls)?;
        greet(&stream, &Hello::new(Purpose::Control, migration))?;
        TcpControl::new(stream, stall)
    }
}

/// A connection that is ready for the greeting.
fn connect(address: &Address, tls: Option<&Tls>) -> Result<Stream, LinkError> {
    let doing = "dialling";
    let addresses = address.resolve().map_err(|error| io_error(doing)(io::Error::other(error)))?;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let mut connected = None;
    for address in addresses {
        match TcpStream::connect_timeout(&address, GREETING_LIMIT) {
            Ok(socket) => {
                connected = Some(socket);
                break;
            }
            Err(error) => last = error,
        }
    }
    let socket = connected.ok_or(last).map_err(io_error(doing))?;
    set_up(&socket, GREETING_LIMIT, GREETING_LIMIT).map_err(io_error(doing))?;
    match (address.is_encrypted, tls) {
        (false, _) => Ok(Stream::plain(socket)),
        (true, Some(tls)) => tls
            .dial(socket, &address.host, Instant::now() + GREETING_LIMIT)
            .map_err(io_error("securing the connection")),
        (true, None) => Err(LinkError::Encryption(
            "a tls:// address wants certificates: --tls-ca, --tls-cert, --tls-key".to_owned(),
        )),
    }
}

impl<M: Serialize + DeserializeOwned + 'static> SourceLink<M> for TcpSource<M> {
    fn control(&self) -> Arc<dyn ControlChannel<M>> {
        Arc::clone(&self.control) as Arc<dyn ControlChannel<M>>
    }

    fn open_bulk(&mut self, migration: MigrationId, index: u16) -> Result<Box<dyn BulkSender>, LinkError> {
        let stream = connect(&self.address, self.tls.as_ref())?;
        stream.set_up(GREETING_LIMIT, self.stall).map_err(io_error("opening a page stream"))?;
        greet(&stream, &Hello::new(Purpose::Bulk(index), migration))?;
        // What waits in the socket is in front of whatever is asked for next; the kernel may refuse, and it is only slower then.
        let _ = socket2::SockRef::from(stream.socket()).set_tcp_notsent_lowat(UNSENT_BYTES);
        Ok(Box::new(TcpBulkSender::new(stream, self.stall)))
    }

    fn redial(&mut self) -> Result<(), LinkError> {
        // A target that still reads the old connection sees it end, and looks for the new one.
        self.control.stream.shutdown();
        self.control = Arc::new(Self::dial_control(&self.address, self.tls.as_ref(), self.migration, self.stall)?);
        Ok(())
    }
}

/// A listening target.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
    tls: Option<Tls>,
}

/// A greeted connection.
#[derive(Debug)]
pub struct Arrival {
    stream: Stream,
    /// What the peer said it is.
    pub hello: Hello,
}

impl Arrival {
    /// The migration that the peer named.
    pub fn migration(&self) -> MigrationId {
        self.hello.migration
    }

    /// Where the peer is; none if it has gone.
    pub fn peer(&self) -> Option<IpAddr> {
        self.stream.socket().peer_addr().ok().map(|address| address.ip())
    }
}

impl Listener {
    /// Listens at `address`. A `tls://` address wants `tls`.
    ///
    /// # Errors
    /// A port that is taken, or an address that is not this host's.
    pub fn bind(address: &Address, tls: Option<Tls>) -> io::Result<Self> {
        let tls = tls.filter(|_| address.is_encrypted);
        if address.is_encrypted && tls.is_none() {
            return Err(io::Error::other("a tls:// address wants certificates: --tls-ca, --tls-cert, --tls-key"));
        }
        let addresses = address.resolve().map_err(io::Error::other)?;
        Ok(Self { listener: TcpListener::bind(&addresses[..])?, tls })
    }

    /// The address that it listens at, the port chosen by the kernel included.
    pub fn local_address(&self) -> io::Result<Address> {
        let address = self.listener.local_addr()?;
        Ok(Address { is_encrypted: self.tls.is_some(), host: address.ip().to_string(), port: address.port() })
    }

    /// Waits up to `timeout` for a connection that greets properly; others are dropped with a warning.
    pub fn accept(&self, timeout: Duration) -> Result<Option<Arrival>, LinkError> {
        let until = Instant::now() + timeout;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if !poll_for(&self.listener, PollFlags::IN, left).map_err(io_error("listening"))? {
                return Ok(None);
            }
            let (socket, peer) = self.listener.accept().map_err(io_error("listening"))?;
            match self.answer(socket) {
                Ok(arrival) => return Ok(Some(arrival)),
                Err(error) => tracing::warn!(%peer, "dropped a connection: {error}"),
            }
        }
    }

    /// Greets a peer that has dialled. It is given one second, and two for its handshake: others wait behind it.
    fn answer(&self, socket: TcpStream) -> Result<Arrival, LinkError> {
        socket.set_nonblocking(false).map_err(io_error("greeting"))?;
        set_up(&socket, ANSWER_LIMIT, ANSWER_LIMIT).map_err(io_error("greeting"))?;
        let stream = match &self.tls {
            None => Stream::plain(socket),
            Some(tls) => {
                tls.answer(socket, Instant::now() + HANDSHAKE_LIMIT).map_err(io_error("securing the connection"))?
            }
        };
        let ours = |migration| Hello::new(Purpose::Control, migration).encode();
        let bytes = match read_hello(&stream, ANSWER_LIMIT) {
            Ok(bytes) => bytes,
            Err(error) => {
                // One that speaks TLS sees by that that we do not.
                let _gone_already = (&mut &stream).write_all(&ours(MigrationId(uuid::Uuid::nil())));
                return Err(error);
            }
        };
        let hello = Hello::decode(&bytes);
        // An incompatible peer is answered all the same: our greeting tells it which versions there are.
        let ours = ours(hello.as_ref().map_or(MigrationId(uuid::Uuid::nil()), |hello| hello.migration));
        (&mut &stream).write_all(&ours).map_err(io_error("greeting"))?;
        Ok(Arrival { stream, hello: hello? })
    }
}

/// The target's link of one migration.
pub struct TcpTarget<'a, M> {
    listener: &'a Listener,
    migration: MigrationId,
    stall: Duration,
    /// `None` until somebody has dialled.
    control: Option<Arc<TcpControl<M>>>,
}

impl<'a, M: Serialize + DeserializeOwned + 'static> TcpTarget<'a, M> {
    /// A link that the source of a migration is still to dial.
    pub fn unconnected(listener: &'a Listener, migration: MigrationId, stall: Duration) -> Self {
        Self { listener, migration, stall, control: None }
    }

    /// Takes an arrived control connection.
    ///
    /// # Errors
    /// A connection that is no control stream.
    pub fn new(listener: &'a Listener, arrival: Arrival, stall: Duration) -> Result<Self, LinkError> {
        if arrival.hello.purpose != Purpose::Control {
            return Err(LinkError::Protocol("a page stream of no migration".to_owned()));
        }
        let migration = arrival.migration();
        Ok(Self { listener, migration, stall, control: Some(Arc::new(TcpControl::new(arrival.stream, stall)?)) })
    }
}

impl<M: Serialize + DeserializeOwned + 'static> TargetLink<M> for TcpTarget<'_, M> {
    fn control(&self) -> Arc<dyn ControlChannel<M>> {
        match &self.control {
            Some(control) => Arc::clone(control) as Arc<dyn ControlChannel<M>>,
            None => Arc::new(Unconnected),
        }
    }

    fn accept_bulk(
        &mut self,
        migration: MigrationId,
        streams: u16,
        timeout: Duration,
    ) -> Result<Vec<Box<dyn BulkReceiver>>, LinkError> {
        if migration != self.migration {
            return Err(LinkError::Protocol("the offer names another migration than the greeting".to_owned()));
        }
        let until = Instant::now() + timeout;
        let mut slots: Vec<Option<Box<dyn BulkReceiver>>> = (0..streams).map(|_| None).collect();
        while slots.iter().any(Option::is_none) {
            let doing = "waiting for page streams";
            let left = until.saturating_duration_since(Instant::now());
            let Some(arrival) = self.listener.accept(left.min(TICK))? else {
                if Instant::now() >= until {
                    return Err(LinkError::Stalled { doing, after: timeout });
                }
                // A source that has died opens no streams.
                if self.control.as_ref().is_none_or(|control| control.stream.is_closed()) {
                    return Err(io_error(doing)(io::ErrorKind::UnexpectedEof.into()));
                }
                continue;
            };
            match arrival.hello.purpose {
                Purpose::Bulk(index) if arrival.migration() == migration => {
                    let slot = slots.get_mut(usize::from(index)).filter(|slot| slot.is_none());
                    let slot =
                        slot.ok_or_else(|| LinkError::Protocol(format!("page stream {index} twice or beyond")))?;
                    arrival.stream.set_up(TICK, self.stall).map_err(io_error(doing))?;
                    *slot = Some(Box::new(TcpBulkReceiver::new(arrival.stream, self.stall)));
                }
                _ => tracing::warn!(%migration, "dropped a connection of another migration"),
            }
        }
        Ok(slots.into_iter().flatten().collect())
    }

    fn reaccept(&mut self, timeout: Duration) -> bool {
        match self.listener.accept(timeout) {
            Ok(Some(arrival)) if arrival.migration() == self.migration && arrival.hello.purpose == Purpose::Control => {
                match TcpControl::new(arrival.stream, self.stall) {
                    Ok(control) => {
                        self.control = Some(Arc::new(control));
                        true
                    }
                    Err(_) => false,
                }
            }
            _ => false,
        }
    }
}

struct TcpBulkSender {
    stream: Stream,
    stall: Duration,
    sequence: u32,
    gathered: Vec<u8>,
}

impl TcpBulkSender {
    fn new(stream: Stream, stall: Duration) -> Self {
        Self { stream, stall, sequence: 0, gathered: Vec::with_capacity(BUFFER_BYTES) }
    }

    fn header(&mut self, frame: BulkFrame) -> u64 {
        self.gathered.extend_from_slice(&wire::encode_bulk(self.sequence, frame));
        self.sequence = self.sequence.wrapping_add(1);
        BULK_HEADER_BYTES as u64
    }

    /// Writes what is gathered and then `bytes`, over a connection in the clear.
    fn flush_with(&mut self, bytes: BytesView<'_>) -> Result<(), LinkError> {
        // SAFETY: the view is valid for reads of its length for as long as it is borrowed. The guest may write it
        // meanwhile; the kernel copies whatever is there, and no Rust code reads it through this slice.
        self.write_behind(unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast::<u8>(), bytes.len()) })
    }

    /// Adds a copy of `bytes` to what is gathered.
    fn gather(&mut self, bytes: BytesView<'_>) {
        let start = self.gathered.len();
        self.gathered.resize(start + bytes.len(), 0);
        // SAFETY: source and target are both valid for `bytes.len()` bytes and do not overlap (one is our own Vec). The
        // guest may write the source meanwhile: a torn page is sent again, since the dirty log names it.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr().cast::<u8>(),
                self.gathered[start..].as_mut_ptr(),
                bytes.len(),
            );
        }
    }

    /// Writes what is gathered and then `bytes`, of which nothing but their address is looked at here unless they are encrypted.
    fn write_behind(&mut self, bytes: &[u8]) -> Result<(), LinkError> {
        let mut slices = [IoSlice::new(&self.gathered), IoSlice::new(bytes)];
        let mut left = &mut slices[..];
        IoSlice::advance_slices(&mut left, 0);
        while !left.is_empty() {
            match (&self.stream).write_vectored(left) {
                Ok(0) => return Err(io_error("sending pages")(io::ErrorKind::WriteZero.into())),
                Ok(written) => IoSlice::advance_slices(&mut left, written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if timed_out(&error) => {
                    return Err(LinkError::Stalled { doing: "sending pages", after: self.stall });
                }
                Err(error) => return Err(io_error("sending pages")(error)),
            }
        }
        self.gathered.clear();
        Ok(())
    }

    /// Sends a frame and the bytes that belong to it.
    fn framed(&mut self, frame: BulkFrame, bytes: &[u8]) -> Result<u64, LinkError> {
        let sent = self.header(frame) + bytes.len() as u64;
        if bytes.len() > GATHER_RUN_BYTES {
            self.write_behind(bytes)?;
            return Ok(sent);
        }
        self.gathered.extend_from_slice(bytes);
        if self.gathered.len() >= BUFFER_BYTES {
            self.write_behind(&[])?;
        }
        Ok(sent)
    }
}

impl BulkSender for TcpBulkSender {
    fn start_round(&mut self, round: u32, digested: bool) -> Result<u64, LinkError> {
        Ok(self.header(BulkFrame::StartRound { round, digested }))
    }

    fn pages(&mut self, region: RegionId, run: PageRun, bytes: BytesView<'_>) -> Result<u64, LinkError> {
        let sent = self.header(BulkFrame::Pages(region, run)) + bytes.len() as u64;
        if bytes.len() > GATHER_RUN_BYTES && !self.stream.is_encrypted() {
            self.flush_with(bytes)?;
            return Ok(sent);
        }
        // What is encrypted is read by this process: from a copy, which the guest does not write.
        for piece in bytes.chunks(BUFFER_BYTES) {
            self.gather(piece);
            if self.gathered.len() >= BUFFER_BYTES {
                self.write_behind(&[])?;
            }
        }
        Ok(sent)
    }

    fn copied(&mut self, region: RegionId, run: PageRun, bytes: &[u8]) -> Result<u64, LinkError> {
        self.framed(BulkFrame::Pages(region, run), bytes)
    }

    fn packed(&mut self, region: RegionId, run: PageRun, packing: Packing, bytes: &[u8]) -> Result<u64, LinkError> {
        self.framed(BulkFrame::Packed(region, run, packing, bytes.len() as u32), bytes)
    }

    fn zeros(&mut self, region: RegionId, run: PageRun) -> Result<u64, LinkError> {
        self.framed(BulkFrame::Zeros(region, run), &[])
    }

    fn end_round(&mut self, round: u32) -> Result<u64, LinkError> {
        let sent = self.header(BulkFrame::EndRound(round));
        self.write_behind(&[])?;
        Ok(sent)
    }

    fn want(&mut self, region: RegionId, run: PageRun) -> Result<u64, LinkError> {
        let sent = self.header(BulkFrame::Want(region, run));
        self.write_behind(&[])?;
        Ok(sent)
    }

    fn pace(&mut self, limit: Option<BytesPerSecond>) {
        // All ones is the kernel's word for none.
        let rate = limit.map_or(u64::MAX, |limit| limit.0);
        // SAFETY: the option takes a u64 by address and length (a u32 before Linux 5.0, which then refuses), and the descriptor is open.
        let answer = unsafe {
            libc::setsockopt(
                self.stream.socket().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_MAX_PACING_RATE,
                (&raw const rate).cast(),
                size_of::<u64>() as libc::socklen_t,
            )
        };
        if answer != 0 {
            tracing::debug!("SO_MAX_PACING_RATE: {}", io::Error::last_os_error());
        }
    }

    fn flush(&mut self) -> Result<(), LinkError> {
        self.write_behind(&[])
    }

    fn answers(&mut self) -> Result<Box<dyn BulkReceiver>, LinkError> {
        self.stream.socket().set_read_timeout(Some(TICK)).map_err(io_error("reading requests"))?;
        Ok(Box::new(TcpBulkReceiver::new(self.stream.clone(), self.stall)))
    }
}

/// Receives runs straight into guest memory; what arrives behind a run is kept for the next headers.
struct TcpBulkReceiver {
    stream: Stream,
    sequence: u32,
    ahead: Box<[u8]>,
    start: usize,
    end: usize,
    stall: Duration,
}

impl TcpBulkReceiver {
    fn new(stream: Stream, stall: Duration) -> Self {
        Self { stream, sequence: 0, stall, ahead: vec![0; BUFFER_BYTES].into_boxed_slice(), start: 0, end: 0 }
    }

    /// One `readv` into `target` and, behind it, the look-ahead buffer (which is empty then). Returns the bytes that
    /// went into `target`.
    fn fill(&mut self, target: &mut [u8], keep_waiting: &mut dyn FnMut() -> bool) -> Result<usize, LinkError> {
        loop {
            let wanted = target.len();
            let mut slices = [IoSliceMut::new(target), IoSliceMut::new(&mut self.ahead[self.end..])];
            match (&self.stream).read_vectored(&mut slices) {
                Ok(0) => return Err(io_error("receiving pages")(io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => {
                    self.end += read.saturating_sub(wanted);
                    return Ok(read.min(wanted));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if timed_out(&error) => {
                    if !keep_waiting() {
                        return Err(LinkError::Stalled { doing: "receiving pages", after: TICK });
                    }
                }
                Err(error) => return Err(io_error("receiving pages")(error)),
            }
        }
    }
}

impl BulkReceiver for TcpBulkReceiver {
    fn next(&mut self, keep_waiting: &mut dyn FnMut() -> bool) -> Result<BulkItem, LinkError> {
        while self.end - self.start < BULK_HEADER_BYTES {
            self.ahead.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            self.fill(&mut [], keep_waiting)?;
        }
        let mut header = [0; BULK_HEADER_BYTES];
        header.copy_from_slice(&self.ahead[self.start..self.start + BULK_HEADER_BYTES]);
        self.start += BULK_HEADER_BYTES;
        let frame = wire::decode_bulk(&header, self.sequence)?;
        self.sequence = self.sequence.wrapping_add(1);
        Ok(match frame {
            BulkFrame::StartRound { round, digested } => BulkItem::StartRound { round, digested },
            BulkFrame::Pages(region, run) => BulkItem::Pages(region, run),
            BulkFrame::Zeros(region, run) => BulkItem::Zeros(region, run),
            BulkFrame::EndRound(round) => BulkItem::EndRound(round),
            BulkFrame::Want(region, run) => BulkItem::Want(region, run),
            BulkFrame::Packed(region, run, packing, bytes) => BulkItem::Packed(region, run, packing, bytes),
        })
    }

    fn read_into(&mut self, target: BytesView<'_>, keep_waiting: &mut dyn FnMut() -> bool) -> Result<(), LinkError> {
        // SAFETY: the view is valid for writes of its length (it is made of atomics) for as long as it is borrowed. The
        // VM does not run yet, or waits for these pages; a hostile peer could at most make two streams write the same plain bytes.
        let target = unsafe { std::slice::from_raw_parts_mut(target.as_ptr().cast::<u8>().cast_mut(), target.len()) };
        self.read_packed(target, keep_waiting)
    }

    fn read_packed(&mut self, target: &mut [u8], keep_waiting: &mut dyn FnMut() -> bool) -> Result<(), LinkError> {
        let have = target.len().min(self.end - self.start);
        target[..have].copy_from_slice(&self.ahead[self.start..self.start + have]);
        self.start += have;
        let mut filled = have;
        while filled < target.len() {
            (self.start, self.end) = (0, 0);
            filled += self.fill(&mut target[filled..], keep_waiting)?;
        }
        Ok(())
    }

    fn back(&mut self) -> Result<Box<dyn BulkSender>, LinkError> {
        Ok(Box::new(TcpBulkSender::new(self.stream.clone(), self.stall)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU8, Ordering};

    use super::super::testing::{Ca, LIMIT, secure_pair, sockets};
    use super::*;

    #[test]
    fn the_kernel_is_told_the_pace_and_that_there_is_none() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut sender = TcpBulkSender::new(Stream::plain(stream), TICK);
        for limit in [Some(BytesPerSecond(12_345_678)), None] {
            sender.pace(limit);
            let (mut rate, mut length) = (0u64, size_of::<u64>() as libc::socklen_t);
            // SAFETY: the option gives a u64 into the place of one, and the descriptor is open.
            let answer = unsafe {
                libc::getsockopt(
                    sender.stream.socket().as_raw_fd(),
                    libc::SOL_SOCKET,
                    libc::SO_MAX_PACING_RATE,
                    (&raw mut rate).cast(),
                    &raw mut length,
                )
            };
            assert_eq!((answer, rate), (0, limit.map_or(u64::MAX, |limit| limit.0)));
        }
    }

    #[test]
    fn an_address_reads_as_it_is_printed() {
        for good in [
            "tcp://192.0.2.7:4460",
            "tcp://[fd00::7]:4460",
            "tcp://host-b:1",
            "tls://192.0.2.7:4460",
            "tls://[fd00::7]:1",
        ] {
            assert_eq!(good.parse::<Address>().unwrap().to_string(), good);
        }
        let ambiguous = "tcp://fd00::7:4460";
        for bad in [
            "",
            "host:1",
            "udp://h:1",
            "tls://h",
            "tls:h:1",
            "tcp://:1",
            "tcp://h",
            "tcp://h:x",
            "tcp://[[x]]:1",
            "tcp://[x:1",
            ambiguous,
        ] {
            assert!(bad.parse::<Address>().is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn a_greeting_that_comes_in_drops_is_not_waited_for() {
        let (near, far) = sockets();
        let limit = Duration::from_millis(20);
        let error = std::thread::scope(|scope| {
            // A byte at a time, until the other end has gone.
            scope.spawn(|| {
                for byte in Hello::new(Purpose::Control, MigrationId::random()).encode() {
                    if (&near).write_all(&[byte]).is_err() || poll_for(&near, PollFlags::IN, limit).is_err() {
                        break;
                    }
                }
            });
            read_hello(&Stream::plain(far), limit).unwrap_err()
        });
        assert!(matches!(error, LinkError::Stalled { .. }), "{error}");
    }

    #[test]
    fn plain_tcp_and_tls_tell_one_another_apart_at_once() {
        let ca = Ca::new();
        let (plain, encrypted): (Address, Address) =
            ("tcp://127.0.0.1:0".parse().unwrap(), "tls://127.0.0.1:0".parse().unwrap());
        let dial = |address: Address| {
            let tls = Some(ca.good("a"));
            TcpSource::<()>::dial(address, tls, MigrationId::random(), LIMIT).map(drop).unwrap_err()
        };
        for (listens, dialled) in [(&plain, true), (&encrypted, false)] {
            let listener = Listener::bind(listens, Some(ca.good("127.0.0.1"))).unwrap();
            let to = Address { is_encrypted: dialled, ..listener.local_address().unwrap() };
            let began = Instant::now();
            std::thread::scope(|scope| {
                let dialling = scope.spawn(|| dial(to));
                let (socket, _) = listener.listener.accept().unwrap();
                let answered = listener.answer(socket).map(drop).unwrap_err();
                for error in [answered, dialling.join().unwrap()] {
                    let text = error.to_string();
                    assert!(
                        matches!(error, LinkError::Encryption(_)) && text.contains("tls:// at both ends"),
                        "{text}"
                    );
                }
            });
            assert!(began.elapsed() < GREETING_LIMIT);
        }
        let listener = Listener::bind(&encrypted, Some(ca.good("127.0.0.1"))).unwrap();
        let to = listener.local_address().unwrap();
        let arrived = std::thread::scope(|scope| {
            let dialling =
                scope.spawn(|| TcpSource::<()>::dial(to, Some(ca.good("a")), MigrationId::random(), LIMIT).unwrap());
            let arrived = listener.accept(LIMIT).unwrap().unwrap();
            assert!(dialling.join().unwrap().encryption().starts_with("tls1.3 TLS13_"));
            arrived
        });
        assert_eq!(arrived.hello.purpose, Purpose::Control);
        assert!(Listener::bind(&encrypted, None).is_err());
    }

    #[test]
    fn page_streams_and_their_ways_back_carry_the_same_in_the_clear_and_encrypted() {
        let (near, far) = sockets();
        for (near, far) in [(Stream::plain(near), Stream::plain(far)), secure_pair()] {
            let source: Vec<AtomicU8> = (0..3 << 20).map(|at| AtomicU8::new((at / 4096 * 7 + at) as u8)).collect();
            let target: Vec<AtomicU8> = (0..3 << 20).map(|_| AtomicU8::new(0)).collect();
            let runs = [(0u64, 1u32), (1, 300), (301, 8), (309, 459)];
            let bytes = |all: &'_ [AtomicU8], run: PageRun| -> std::ops::Range<usize> {
                let start = run.first.0 as usize * 4096;
                assert!(start + run.count as usize * 4096 <= all.len());
                start..start + run.count as usize * 4096
            };
            let region = RegionId(0);
            let mut waits = || true;
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut sender = TcpBulkSender::new(near.clone(), LIMIT);
                    let mut answers = sender.answers().unwrap();
                    sender.start_round(1, true).unwrap();
                    for (first, count) in runs {
                        let run = PageRun::new(first, count);
                        let sent = sender.pages(region, run, &source[bytes(&source, run)]).unwrap();
                        assert_eq!(sent, BULK_HEADER_BYTES as u64 + u64::from(count) * 4096);
                    }
                    sender.copied(region, PageRun::new(0, 9), &vec![7; 9 * 4096]).unwrap();
                    sender.end_round(1).unwrap();
                    assert_eq!(answers.next(&mut || true).unwrap(), BulkItem::Want(region, PageRun::new(5, 2)));
                });
                let mut receiver = TcpBulkReceiver::new(far.clone(), LIMIT);
                let mut back = receiver.back().unwrap();
                assert_eq!(receiver.next(&mut waits).unwrap(), BulkItem::StartRound { round: 1, digested: true });
                for (first, count) in runs {
                    let run = PageRun::new(first, count);
                    assert_eq!(receiver.next(&mut waits).unwrap(), BulkItem::Pages(region, run));
                    receiver.read_into(&target[bytes(&target, run)], &mut waits).unwrap();
                }
                assert!(
                    source.iter().zip(&target).all(|(a, b)| a.load(Ordering::Relaxed) == b.load(Ordering::Relaxed))
                );
                assert_eq!(receiver.next(&mut waits).unwrap(), BulkItem::Pages(region, PageRun::new(0, 9)));
                let mut copy = vec![0; 9 * 4096];
                receiver.read_packed(&mut copy, &mut waits).unwrap();
                assert!(copy.iter().all(|&byte| byte == 7));
                assert_eq!(receiver.next(&mut waits).unwrap(), BulkItem::EndRound(1));
                back.want(region, PageRun::new(5, 2)).unwrap();
            });
            // Nothing comes: whoever waits is asked whether to go on.
            let mut receiver = TcpBulkReceiver::new(far, LIMIT);
            receiver.stream.set_up(Duration::from_millis(10), LIMIT).unwrap();
            let mut asked = 0;
            let given_up = receiver.next(&mut || {
                asked += 1;
                asked < 3
            });
            assert!(matches!(given_up, Err(LinkError::Stalled { .. })) && asked == 3);
        }
    }

    #[test]
    fn a_message_that_does_not_come_is_waited_for_as_long_as_asked() {
        let (near, far) = secure_pair();
        let (near, far) =
            (TcpControl::<String>::new(near, LIMIT).unwrap(), TcpControl::<String>::new(far, LIMIT).unwrap());
        assert_eq!(far.recv(Duration::from_millis(30)).unwrap(), None);
        let long = "word ".repeat(40_000);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                near.send(&long).unwrap();
                near.send(&"end".to_owned()).unwrap();
            });
            assert_eq!(far.recv(LIMIT).unwrap(), Some(long.clone()));
            // It may have come with the first: what is decrypted already is not waited for.
            assert_eq!(far.recv(LIMIT).unwrap().as_deref(), Some("end"));
        });
        assert!(!far.stream.is_closed());
        near.stream.shutdown();
        assert!(far.recv(LIMIT).is_err() && far.stream.is_closed());
    }
}
