//! A peer that speaks the link's bytes by hand, so that it can also say what no Dunlin would say.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use dunlin::link::wire::{self, BulkFrame, CONTROL_HEADER_BYTES, HELLO_BYTES, Hello, Purpose};
use dunlin::migrate::ControlMessage;
use dunlin::model::MigrationId;

/// The longest wait for a peer's answer: longer than any limit of its own in these suites.
const LIMIT: Duration = Duration::from_secs(30);

/// One connection.
#[derive(Debug)]
pub struct RawPeer {
    stream: TcpStream,
    sent: u32,
    received: u32,
}

impl RawPeer {
    /// Connects and says nothing.
    ///
    /// # Errors
    /// Nobody there.
    pub fn connect(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address).with_context(|| format!("dial {address}"))?;
        Self::on(stream)
    }

    /// Waits for a connection and says nothing.
    ///
    /// # Errors
    /// The kernel's word.
    pub fn accept(listener: &TcpListener) -> Result<Self> {
        Self::on(listener.accept().context("accept")?.0)
    }

    fn on(stream: TcpStream) -> Result<Self> {
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, sent: 0, received: 0 })
    }

    /// Connects and greets properly.
    ///
    /// # Errors
    /// It is not greeted in turn.
    pub fn dial(address: SocketAddr, purpose: Purpose, migration: MigrationId) -> Result<Self> {
        let mut peer = Self::connect(address)?;
        peer.raw(&Hello::new(purpose, migration).encode())?;
        peer.hello()?;
        Ok(peer)
    }

    /// Reads a greeting; it may be of any version.
    ///
    /// # Errors
    /// The peer closed.
    pub fn hello(&mut self) -> Result<[u8; HELLO_BYTES]> {
        let mut hello = [0; HELLO_BYTES];
        self.stream.read_exact(&mut hello).context("read a greeting")?;
        Ok(hello)
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// The peer closed.
    pub fn raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).context("send bytes")
    }

    /// The bytes of a message under the next sequence number.
    pub fn encode(&mut self, message: &ControlMessage) -> Vec<u8> {
        let payload = encode_message(message);
        let header = wire::encode_control(self.sent, &payload);
        self.sent += 1;
        [&header[..], &payload].concat()
    }

    /// Sends a message properly.
    ///
    /// # Errors
    /// The peer closed.
    pub fn send(&mut self, message: &ControlMessage) -> Result<()> {
        let bytes = self.encode(message);
        self.raw(&bytes)
    }

    /// Sends page-stream frames, numbered from 0.
    ///
    /// # Errors
    /// The peer closed.
    pub fn frames(&mut self, frames: &[BulkFrame]) -> Result<()> {
        for &frame in frames {
            self.raw(&wire::encode_bulk(self.sent, frame))?;
            self.sent += 1;
        }
        Ok(())
    }

    /// The next message; `None` if the peer has closed.
    ///
    /// # Errors
    /// It says nothing in time, or rubbish.
    pub fn recv(&mut self) -> Result<Option<ControlMessage>> {
        let mut header = [0; CONTROL_HEADER_BYTES];
        match self.stream.read_exact(&mut header) {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => {
                return Ok(None);
            }
            Err(error) => return Err(error).context("the peer says nothing"),
        }
        let (length, _) = wire::decode_control(&header, self.received)?;
        self.received += 1;
        let mut payload = vec![0; length];
        self.stream.read_exact(&mut payload).context("read a message")?;
        Ok(Some(decode_message(&payload)?))
    }

    /// Reads and forgets everything until the peer closes.
    pub fn drain(&mut self) {
        let _ended = std::io::copy(&mut self.stream, &mut std::io::sink());
    }

    /// Reads until the peer closes or says why it gives up; its words.
    ///
    /// # Errors
    /// It goes on.
    pub fn verdict(&mut self) -> Result<String> {
        loop {
            match self.recv()? {
                None => return Ok("closed".to_owned()),
                Some(ControlMessage::Cancel(reason) | ControlMessage::Refuse(reason)) => return Ok(reason),
                Some(ControlMessage::Accept(_) | ControlMessage::Pong(_) | ControlMessage::RoundReceived(_)) => {}
                Some(other) => bail!("it goes on with `{}`", other.name()),
            }
        }
    }
}

/// A message's payload.
pub fn encode_message(message: &ControlMessage) -> Vec<u8> {
    postcard::to_stdvec(message).expect("our own messages encode")
}

fn decode_message(payload: &[u8]) -> Result<ControlMessage> {
    Ok(postcard::from_bytes(payload)?)
}
