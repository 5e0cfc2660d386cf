//! The link over TCP: one connection for control, one a page stream, all with `TCP_NODELAY`.
//!
//! Owns sockets and their time-outs. Framing is [`super::wire`]'s. The unsafe code hands guest memory to `writev`/`readv`.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::marker::PhantomData;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::wire::{self, BULK_HEADER_BYTES, BulkFrame, CONTROL_HEADER_BYTES, HELLO_BYTES, Hello, Purpose, WireError};
use crate::model::{BytesPerSecond, MigrationId, Packing, PageRun, RegionId};
use crate::port::{
    BulkItem, BulkReceiver, BulkSender, BytesView, ControlChannel, LinkError, SourceLink, TargetLink, Unconnected,
};

/// How long dialling and greeting may take.
const GREETING_LIMIT: Duration = Duration::from_secs(5);
/// How long a peer that dialled us may take to greet.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);
/// How often a waiting page stream asks whether to go on.
const TICK: Duration = Duration::from_millis(250);
/// Runs up to this size are copied and gathered; longer ones go out of guest memory directly.
const GATHER_RUN_BYTES: usize = 32 << 10;
/// So much may wait in the socket that the kernel has not sent yet.
const UNSENT_BYTES: u32 = 256 << 10;
/// So much is gathered before it is written, and read ahead behind a run.
const BUFFER_BYTES: usize = 128 << 10;

/// Where a peer listens: `tcp://HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    host: String,
    port: u16,
}

/// Text that is no address of a peer.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// Not `tcp://HOST:PORT`.
    #[error("`{0}` is no address; write tcp://HOST:PORT, for example tcp://192.0.2.7:4460")]
    Malformed(String),
    /// The encrypted link is not there yet.
    #[error("tls:// links are not built yet; use tcp:// inside a trusted network with --insecure-plaintext")]
    Tls,
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
        if text.starts_with("tls://") {
            return Err(AddressError::Tls);
        }
        let malformed = || AddressError::Malformed(text.to_owned());
        let (host, port) = text.strip_prefix("tcp://").and_then(|rest| rest.rsplit_once(':')).ok_or_else(malformed)?;
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
        Ok(Self { host: host.to_owned(), port })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "tcp://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "tcp://{}:{}", self.host, self.port)
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

    /// Whether plain TCP to it stays on this machine.
    pub fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.host.parse().is_ok_and(|address: IpAddr| address.is_loopback())
    }
}

fn io_error(doing: &'static str) -> impl Fn(io::Error) -> LinkError {
    move |source| LinkError::Io { doing, source }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl From<WireError> for LinkError {
    fn from(error: WireError) -> Self {
        Self::Protocol(error.to_string())
    }
}

/// Whether an error of a socket with a time-out means that the time is up.
fn timed_out(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn set_up(stream: &TcpStream, read: Duration, write: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(read))?;
    stream.set_write_timeout(Some(write))
}

/// Sends our greeting and reads theirs.
fn greet(mut stream: &TcpStream, hello: &Hello) -> Result<Hello, LinkError> {
    stream.write_all(&hello.encode()).map_err(io_error("greeting"))?;
    let mut theirs = [0; HELLO_BYTES];
    stream.read_exact(&mut theirs).map_err(io_error("greeting"))?;
    Ok(Hello::decode(&theirs)?)
}

/// A control channel over one TCP connection.
pub struct TcpControl<M> {
    stream: TcpStream,
    stall: Duration,
    sent: Mutex<u32>,
    received: Mutex<u32>,
    message: PhantomData<fn(M) -> M>,
}

impl<M> TcpControl<M> {
    fn new(stream: TcpStream, stall: Duration) -> Result<Self, LinkError> {
        set_up(&stream, stall, stall).map_err(io_error("setting up control"))?;
        Ok(Self { stream, stall, sent: Mutex::new(0), received: Mutex::new(0), message: PhantomData })
    }

    /// Whether the peer has closed the connection, or the kernel has given it up.
    fn is_closed(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.stream.as_fd(), PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    fn read(&self, buffer: &mut [u8], doing: &'static str) -> Result<(), LinkError> {
        (&self.stream).read_exact(buffer).map_err(|source| {
            if timed_out(&source) {
                LinkError::Stalled { doing, after: self.stall }
            } else {
                LinkError::Io { doing, source }
            }
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
        let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
        let mut fds = [PollFd::from_borrowed_fd(self.stream.as_fd(), PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => return Ok(None),
            Err(rustix::io::Errno::INTR) => return Ok(None),
            Ok(_) => {}
            Err(error) => return Err(io_error("waiting for a message")(error.into())),
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
    migration: MigrationId,
    stall: Duration,
    control: Arc<TcpControl<M>>,
}

impl<M: Serialize + DeserializeOwned + 'static> TcpSource<M> {
    /// Dials a target.
    ///
    /// # Errors
    /// Nobody there, nobody who speaks our language, or no version in common.
    pub fn dial(address: Address, migration: MigrationId, stall: Duration) -> Result<Self, LinkError> {
        let control = Arc::new(Self::dial_control(&address, migration, stall)?);
        Ok(Self { address, migration, stall, control })
    }

    fn dial_control(address: &Address, migration: MigrationId, stall: Duration) -> Result<TcpControl<M>, LinkError> {
        let stream = connect(address)?;
        set_up(&stream, GREETING_LIMIT, GREETING_LIMIT).map_err(io_error("dialling"))?;
        greet(&stream, &Hello::new(Purpose::Control, migration))?;
        TcpControl::new(stream, stall)
    }
}

fn connect(address: &Address) -> Result<TcpStream, LinkError> {
    let addresses = address.resolve().map_err(|error| io_error("dialling")(io::Error::other(error)))?;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in addresses {
        match TcpStream::connect_timeout(&address, GREETING_LIMIT) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(io_error("dialling")(last))
}

impl<M: Serialize + DeserializeOwned + 'static> SourceLink<M> for TcpSource<M> {
    fn control(&self) -> Arc<dyn ControlChannel<M>> {
        Arc::clone(&self.control) as Arc<dyn ControlChannel<M>>
    }

    fn open_bulk(&mut self, migration: MigrationId, index: u16) -> Result<Box<dyn BulkSender>, LinkError> {
        let stream = connect(&self.address)?;
        set_up(&stream, GREETING_LIMIT, self.stall).map_err(io_error("opening a page stream"))?;
        greet(&stream, &Hello::new(Purpose::Bulk(index), migration))?;
        // What waits in the socket is in front of whatever is asked for next; the kernel may refuse, and it is only slower then.
        let _ = socket2::SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT_BYTES);
        Ok(Box::new(TcpBulkSender::new(stream, self.stall)))
    }

    fn redial(&mut self) -> Result<(), LinkError> {
        // A target that still reads the old connection sees it end, and looks for the new one.
        let _ = self.control.stream.shutdown(Shutdown::Both);
        self.control = Arc::new(Self::dial_control(&self.address, self.migration, self.stall)?);
        Ok(())
    }
}

/// A listening target.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
}

/// A greeted connection.
#[derive(Debug)]
pub struct Arrival {
    stream: TcpStream,
    /// What the peer said it is.
    pub hello: Hello,
}

impl Arrival {
    /// The migration that the peer named.
    pub fn migration(&self) -> MigrationId {
        self.hello.migration
    }
}

impl Listener {
    /// Listens at `address`.
    ///
    /// # Errors
    /// A port that is taken, or an address that is not this host's.
    pub fn bind(address: &Address) -> io::Result<Self> {
        let addresses = address.resolve().map_err(io::Error::other)?;
        Ok(Self { listener: TcpListener::bind(&addresses[..])? })
    }

    /// The address that it listens at, the port chosen by the kernel included.
    pub fn local_address(&self) -> io::Result<Address> {
        let address = self.listener.local_addr()?;
        Ok(Address { host: address.ip().to_string(), port: address.port() })
    }

    /// Waits up to `timeout` for a connection that greets properly; others are dropped with a warning.
    pub fn accept(&self, timeout: Duration) -> Result<Option<Arrival>, LinkError> {
        let until = Instant::now() + timeout;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let wait = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            let mut fds = [PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN)];
            match poll(&mut fds, Some(&wait)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(None),
                Ok(_) => {}
                Err(error) => return Err(io_error("listening")(error.into())),
            }
            let (stream, peer) = self.listener.accept().map_err(io_error("listening"))?;
            match Self::answer(stream) {
                Ok(arrival) => return Ok(Some(arrival)),
                Err(error) => tracing::warn!(%peer, "dropped a connection: {error}"),
            }
        }
    }

    /// Greets a peer that has dialled. It is given one second: others wait behind it.
    fn answer(mut stream: TcpStream) -> Result<Arrival, LinkError> {
        stream.set_nonblocking(false).map_err(io_error("greeting"))?;
        set_up(&stream, ANSWER_LIMIT, ANSWER_LIMIT).map_err(io_error("greeting"))?;
        let mut bytes = [0; HELLO_BYTES];
        stream.read_exact(&mut bytes).map_err(io_error("greeting"))?;
        let hello = Hello::decode(&bytes);
        // An incompatible peer is answered all the same: our greeting tells it which versions there are.
        let ours = Hello::new(Purpose::Control, hello.as_ref().map_or(MigrationId(uuid::Uuid::nil()), |h| h.migration));
        stream.write_all(&ours.encode()).map_err(io_error("greeting"))?;
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
                if self.control.as_ref().is_none_or(|control| control.is_closed()) {
                    return Err(io_error(doing)(io::ErrorKind::UnexpectedEof.into()));
                }
                continue;
            };
            match arrival.hello.purpose {
                Purpose::Bulk(index) if arrival.migration() == migration => {
                    let slot = slots.get_mut(usize::from(index)).filter(|slot| slot.is_none());
                    let slot =
                        slot.ok_or_else(|| LinkError::Protocol(format!("page stream {index} twice or beyond")))?;
                    set_up(&arrival.stream, TICK, self.stall).map_err(io_error(doing))?;
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
    stream: TcpStream,
    stall: Duration,
    sequence: u32,
    gathered: Vec<u8>,
}

impl TcpBulkSender {
    fn new(stream: TcpStream, stall: Duration) -> Self {
        Self { stream, stall, sequence: 0, gathered: Vec::with_capacity(BUFFER_BYTES) }
    }

    fn header(&mut self, frame: BulkFrame) -> u64 {
        self.gathered.extend_from_slice(&wire::encode_bulk(self.sequence, frame));
        self.sequence = self.sequence.wrapping_add(1);
        BULK_HEADER_BYTES as u64
    }

    /// Writes what is gathered and then `bytes`.
    fn flush_with(&mut self, bytes: BytesView<'_>) -> Result<(), LinkError> {
        // SAFETY: the view is valid for reads of its length for as long as it is borrowed. The guest may write it
        // meanwhile; the kernel copies whatever is there, and no Rust code reads it through this slice.
        self.write_behind(unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast::<u8>(), bytes.len()) })
    }

    /// Writes what is gathered and then `bytes`, of which nothing but their address is looked at here.
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
        if bytes.len() > GATHER_RUN_BYTES {
            self.flush_with(bytes)?;
            return Ok(sent);
        }
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
        if self.gathered.len() >= BUFFER_BYTES {
            self.flush_with(&[])?;
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
        self.flush_with(&[])?;
        Ok(sent)
    }

    fn want(&mut self, region: RegionId, run: PageRun) -> Result<u64, LinkError> {
        let sent = self.header(BulkFrame::Want(region, run));
        self.flush_with(&[])?;
        Ok(sent)
    }

    fn pace(&mut self, limit: Option<BytesPerSecond>) {
        // All ones is the kernel's word for none.
        let rate = limit.map_or(u64::MAX, |limit| limit.0);
        // SAFETY: the option takes a u64 by address and length (a u32 before Linux 5.0, which then refuses), and the descriptor is open.
        let answer = unsafe {
            libc::setsockopt(
                self.stream.as_raw_fd(),
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
        self.flush_with(&[])
    }

    fn answers(&mut self) -> Result<Box<dyn BulkReceiver>, LinkError> {
        let doing = "reading requests";
        self.stream.set_read_timeout(Some(TICK)).map_err(io_error(doing))?;
        Ok(Box::new(TcpBulkReceiver::new(self.stream.try_clone().map_err(io_error(doing))?, self.stall)))
    }
}

/// Receives runs straight into guest memory; what arrives behind a run is kept for the next headers.
struct TcpBulkReceiver {
    stream: TcpStream,
    sequence: u32,
    ahead: Box<[u8]>,
    start: usize,
    end: usize,
    stall: Duration,
}

impl TcpBulkReceiver {
    fn new(stream: TcpStream, stall: Duration) -> Self {
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
        let stream = self.stream.try_clone().map_err(io_error("opening the way back"))?;
        Ok(Box::new(TcpBulkSender::new(stream, self.stall)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_told_the_pace_and_that_there_is_none() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut sender = TcpBulkSender::new(stream, TICK);
        for limit in [Some(BytesPerSecond(12_345_678)), None] {
            sender.pace(limit);
            let (mut rate, mut length) = (0u64, size_of::<u64>() as libc::socklen_t);
            // SAFETY: the option gives a u64 into the place of one, and the descriptor is open.
            let answer = unsafe {
                libc::getsockopt(
                    sender.stream.as_raw_fd(),
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
        for good in ["tcp://192.0.2.7:4460", "tcp://[fd00::7]:4460", "tcp://host-b:1"] {
            assert_eq!(good.parse::<Address>().unwrap().to_string(), good);
        }
        let ambiguous = "tcp://fd00::7:4460";
        for bad in ["", "host:1", "tcp://:1", "tcp://h", "tcp://h:x", "tcp://[[x]]:1", "tcp://[x:1", ambiguous] {
            assert!(bad.parse::<Address>().is_err(), "{bad} was accepted");
        }
    }
}
