//! The virtio network device (virtio 1.2, 5.1): frames between a tap and the guest's two queues.
//!
//! Owns the frame path in both directions and its counters. Each frame goes by one system call straight from or into guest
//! memory. No offload is offered, so every header is zero but for `num_buffers` (5.1.6.4.1).
//!
//! What a pause leaves: frames that the guest queued and that were not sent stay in its ring, frames from the network stay
//! in the tap. So neither kind is lost or sent twice; whoever resumes goes on with them. What the tap of a target gathers
//! before the VM arrives is delivered to the guest on its first resume: broadcasts of that network, as if they were late.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use super::device::VirtioDevice;
use super::mmio::{Backend, Pass, Served};
use super::queue::{Buffers, Popped, RingFault, mark_written};
use super::warn::Complaints;
use crate::kvm::bus::DeviceError;
use crate::kvm::memory::GuestRam;
use crate::model::MacAddress;
use crate::net::tap::{HEADER_BYTES, Tap};
use crate::shm::{Sink, Source};

/// Device type of a network card (virtio 1.2, 5.1.1).
const DEVICE_ID: u32 = 1;
/// receiveq1, transmitq1 (5.1.2).
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// `VIRTIO_NET_F_MAC` (bit 5), `VIRTIO_NET_F_STATUS` (bit 16) (5.1.3).
const FEATURE_MAC: u64 = 1 << 5;
const FEATURE_STATUS: u64 = 1 << 16;
/// `VIRTIO_NET_S_LINK_UP` (5.1.4).
const LINK_UP: u16 = 1;
/// Ethernet header without FCS; a tap refuses less.
const MIN_FRAME_BYTES: usize = 14;
/// The largest frame a tap takes.
const MAX_FRAME_BYTES: usize = 65535 + MIN_FRAME_BYTES;
/// Frames in each direction in one pass.
const FRAMES_PER_PASS: usize = 64;
/// A header of a frame that needs nothing done, `num_buffers` 1.
const RECEIVE_HEADER: [u8; HEADER_BYTES] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
const TRANSMIT_HEADER: [u8; HEADER_BYTES] = [0; HEADER_BYTES];

/// A network port of the guest.
pub type VirtioNet = VirtioDevice<NetBackend>;

/// What passed through a port since the machine started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NetStats {
    /// Frames given to the guest.
    pub rx_frames: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Frames that fit no buffer of the guest, or found a malformed one.
    pub rx_dropped_frames: u64,
    /// Frames sent for the guest.
    pub tx_frames: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Frames of the guest that were malformed or that the tap refused (is it up?).
    pub tx_dropped_frames: u64,
    /// Frames sent on the guest's behalf, such as announcements.
    pub announced_frames: u64,
}

#[derive(Debug, Default)]
struct Counters {
    rx_frames: AtomicU64,
    rx_bytes: AtomicU64,
    rx_dropped: AtomicU64,
    tx_frames: AtomicU64,
    tx_bytes: AtomicU64,
    tx_dropped: AtomicU64,
    announced: AtomicU64,
}

fn count(counter: &AtomicU64, by: usize) {
    counter.fetch_add(by as u64, Ordering::Relaxed);
}

/// The device behind the transport.
pub struct NetBackend {
    wire: OwnedFd,
    mac: MacAddress,
    counters: Arc<Counters>,
    /// Where the rest of a frame goes that is longer than the guest's buffer.
    spill: Vec<u8>,
    /// The tap cannot be used any more.
    lost: bool,
}

impl VirtioNet {
    /// Port number `index` of the machine: `net0` and so on.
    ///
    /// # Errors
    /// No thread or descriptor is left.
    pub fn new(index: usize, ram: Arc<GuestRam>, tap: Tap, mac: MacAddress) -> Result<Self, DeviceError> {
        Self::on_wire(index, ram, tap.into(), mac)
    }

    /// The same on any descriptor that keeps message boundaries.
    pub(super) fn on_wire(
        index: usize,
        ram: Arc<GuestRam>,
        wire: OwnedFd,
        mac: MacAddress,
    ) -> Result<Self, DeviceError> {
        let name = format!("net{index}");
        let watched = wire.try_clone().map_err(|source| DeviceError::Io {
            device: name.clone(),
            action: "watching its tap",
            source,
        })?;
        Self::assemble(&name, ram, NetBackend::new(wire, mac), Some(watched))
    }

    /// What passed through it.
    pub fn stats(&self) -> NetStats {
        let counters = self.transport().with_backend(|backend| backend.counters.clone());
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NetStats {
            rx_frames: get(&counters.rx_frames),
            rx_bytes: get(&counters.rx_bytes),
            rx_dropped_frames: get(&counters.rx_dropped),
            tx_frames: get(&counters.tx_frames),
            tx_bytes: get(&counters.tx_bytes),
            tx_dropped_frames: get(&counters.tx_dropped),
            announced_frames: get(&counters.announced),
        }
    }
}

/// What became of one frame.
enum Moved {
    /// It went; so many bytes of the guest's buffers were filled.
    Yes(usize),
    /// Nothing to read, or no room to write: try when the tap says so.
    Later,
    /// The frame is gone but the guest's buffers were not used.
    Dropped,
}

impl NetBackend {
    pub(super) fn new(wire: OwnedFd, mac: MacAddress) -> Self {
        Self { wire, mac, counters: Arc::default(), spill: vec![0; MAX_FRAME_BYTES], lost: false }
    }

    /// Guest to network, until the ring is empty, the tap is full, or the pass is over. Sets what to come back for.
    fn transmit(&mut self, pass: &mut Pass<'_>, served: &mut Served) -> Result<(), RingFault> {
        let Some(ring) = &mut pass.rings[TRANSMIT] else { return Ok(()) };
        for _ in 0..FRAMES_PER_PASS {
            // From the moment a pause is wanted no frame of the guest leaves.
            if (pass.hold)() {
                break;
            }
            ring.silence(pass.ram)?;
            match ring.pop(pass.ram)? {
                Popped::Empty => {
                    if !ring.listen(pass.ram)? {
                        return Ok(());
                    }
                }
                Popped::Malformed(head, fault) => {
                    pass.complaints.warn(&format_args!("dropped a frame of the guest: {fault}"));
                    count(&self.counters.tx_dropped, 1);
                    ring.complete(pass.ram, head, 0)?;
                }
                Popped::Chain(chain) => {
                    match self.send(&chain.readable) {
                        Ok(Moved::Later) => {
                            ring.put_back();
                            served.writable = true;
                            return Ok(());
                        }
                        Ok(_) => {
                            count(&self.counters.tx_frames, 1);
                            count(&self.counters.tx_bytes, chain.readable.len() - HEADER_BYTES);
                        }
                        Err(error) => {
                            pass.complaints.warn(&format_args!("dropped a frame of the guest: {error}"));
                            count(&self.counters.tx_dropped, 1);
                        }
                    }
                    ring.complete(pass.ram, chain.head, 0)?;
                }
            }
        }
        served.more = true;
        Ok(())
    }

    fn send(&self, chain: &Buffers<'_>) -> io::Result<Moved> {
        let bytes = chain.len().saturating_sub(HEADER_BYTES);
        if !(MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&bytes) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("it has {bytes} bytes")));
        }
        // The guest's own header asks for offloads that it was not offered, or for nothing: ours asks for nothing.
        let frame = chain.part(HEADER_BYTES, bytes);
        match Source::default().host(&TRANSMIT_HEADER).guest(&frame).write(&self.wire) {
            Ok(_) => Ok(Moved::Yes(0)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Moved::Later),
            Err(error) => Err(error),
        }
    }

    /// Network to guest, until the tap is empty, the guest has no buffer, or the pass is over.
    fn receive(&mut self, pass: &mut Pass<'_>, served: &mut Served) -> Result<(), RingFault> {
        let Some(ring) = &mut pass.rings[RECEIVE] else { return Ok(()) };
        for _ in 0..FRAMES_PER_PASS {
            if self.lost {
                return Ok(());
            }
            if (pass.hold)() {
                break;
            }
            match ring.pop(pass.ram)? {
                Popped::Empty => {
                    // The tap keeps what comes until there is a buffer.
                    if !ring.listen(pass.ram)? {
                        return Ok(());
                    }
                }
                Popped::Malformed(head, fault) => {
                    pass.complaints.warn(&format_args!("dropped a receive buffer of the guest: {fault}"));
                    ring.complete(pass.ram, head, 0)?;
                }
                Popped::Chain(chain) if chain.writable.len() < HEADER_BYTES + MIN_FRAME_BYTES => {
                    let fault = format_args!("a receive buffer of {} bytes", chain.writable.len());
                    pass.complaints.warn(&fault);
                    ring.complete(pass.ram, chain.head, 0)?;
                }
                Popped::Chain(chain) => match self.fetch(&chain.writable, pass.complaints) {
                    Moved::Yes(filled) => ring.complete(pass.ram, chain.head, filled as u32)?,
                    Moved::Dropped => ring.put_back(),
                    Moved::Later => {
                        ring.put_back();
                        // There is a buffer, so what we wait for is the tap.
                        ring.silence(pass.ram)?;
                        served.readable = !self.lost;
                        return Ok(());
                    }
                },
            }
        }
        served.more = true;
        Ok(())
    }

    fn fetch(&mut self, buffers: &Buffers<'_>, complaints: &Complaints) -> Moved {
        let mut header = [0; HEADER_BYTES];
        let room = buffers.part(HEADER_BYTES, MAX_FRAME_BYTES);
        let capacity: usize = room.iter().map(|slice| slice.len()).sum();
        let got = Sink::default().host(&mut header).guest(&room).host(&mut self.spill).read(&self.wire);
        let bytes = match got {
            Ok(bytes) => bytes.saturating_sub(HEADER_BYTES),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Moved::Later,
            Err(error) => {
                // A tap that was deleted, or the namespace it was in.
                complaints.warn(&format_args!("the tap cannot be read any more: {error}"));
                self.lost = true;
                return Moved::Later;
            }
        };
        mark_written(&room, bytes.min(capacity));
        if bytes > capacity || bytes == 0 {
            complaints.warn(&format_args!("dropped a frame of {bytes} bytes: the guest's buffer has {capacity}"));
            count(&self.counters.rx_dropped, 1);
            return Moved::Dropped;
        }
        buffers.write(0, &RECEIVE_HEADER);
        count(&self.counters.rx_frames, 1);
        count(&self.counters.rx_bytes, bytes);
        Moved::Yes(HEADER_BYTES + bytes)
    }
}

impl Backend for NetBackend {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURE_MAC | FEATURE_STATUS
    }

    /// `struct virtio_net_config` up to `status` (5.1.4).
    fn config(&self) -> Vec<u8> {
        [&self.mac.bytes()[..], &LINK_UP.to_le_bytes()].concat()
    }

    fn serve(&mut self, pass: &mut Pass<'_>) -> Result<Served, RingFault> {
        let mut served = Served::default();
        self.transmit(pass, &mut served)?;
        self.receive(pass, &mut served)?;
        Ok(served)
    }

    fn lost(&mut self) {
        self.lost = true;
    }

    fn send_frame(&mut self, frame: &[u8]) -> io::Result<()> {
        Source::default().host(&TRANSMIT_HEADER).host(frame).write(&self.wire)?;
        count(&self.counters.announced, 1);
        Ok(())
    }

    fn explain_config(&self, saved: &[u8]) -> String {
        let saved = saved.first_chunk::<6>().and_then(|bytes| MacAddress::new(*bytes).ok());
        let saved = saved.map_or_else(|| "no MAC".to_owned(), |mac| mac.to_string());
        format!("the guest knows its port as {saved}, this one is {}", self.mac)
    }
}
