//! The virtio network device (virtio 1.2, 5.1): frames between a tap and the guest's two queues, and the request that the guest announce itself.
//!
//! Owns the frame path in both directions and its counters. Each frame goes by one system call straight from or into guest
//! memory. No offload is offered, so every header is zero but for `num_buffers` (5.1.6.4.1).
//!
//! What a pause leaves: frames that the guest queued and that were not sent stay in its ring, frames from the network stay
//! in the tap. So neither kind is lost or sent twice; whoever resumes goes on with them. What the tap of a target has gathered
//! when the VM is about to be announced its former place has had, too: where a relay brings it from there ([`super::arrivals`])
//! it is thrown away, else it is delivered on the first resume: broadcasts of that network, as if they were late.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::arrivals::Arrivals;
use super::device::VirtioDevice;
use super::held::HeldFrames;
use super::mmio::{Backend, Pass, Served};
use super::queue::{Buffers, Popped, RingFault, mark_written};
use super::warn::Complaints;
use crate::kvm::bus::DeviceError;
use crate::kvm::memory::GuestRam;
use crate::model::MacAddress;
use crate::model::network::PortCounters;
use crate::net::tap::{HEADER_BYTES, Tap};
use crate::shm::{Sink, Source};

/// Device type of a network card (virtio 1.2, 5.1.1).
const DEVICE_ID: u32 = 1;
/// receiveq1, transmitq1, controlq (5.1.2).
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// `VIRTIO_NET_F_MAC` (bit 5), `VIRTIO_NET_F_STATUS` (bit 16), `VIRTIO_NET_F_CTRL_VQ` (bit 17), `VIRTIO_NET_F_GUEST_ANNOUNCE` (bit 21) (5.1.3).
const FEATURE_MAC: u64 = 1 << 5;
const FEATURE_STATUS: u64 = 1 << 16;
const FEATURE_CONTROL: u64 = 1 << 17;
const FEATURE_GUEST_ANNOUNCE: u64 = 1 << 21;
/// What a driver must have accepted to be asked to announce its guest (5.1.3.1; it answers by the control queue).
const ANNOUNCES: u64 = FEATURE_STATUS | FEATURE_CONTROL | FEATURE_GUEST_ANNOUNCE;
/// `VIRTIO_NET_S_LINK_UP`, `VIRTIO_NET_S_ANNOUNCE` (5.1.4).
const LINK_UP: u16 = 1;
const ANNOUNCE: u16 = 2;
/// `VIRTIO_NET_CTRL_ANNOUNCE`, `VIRTIO_NET_CTRL_ANNOUNCE_ACK` (5.1.6.5.4).
const ANNOUNCE_DONE: [u8; 2] = [3, 0];
/// `VIRTIO_NET_OK`, `VIRTIO_NET_ERR` (5.1.6.5).
const CONTROL_OK: u8 = 0;
const CONTROL_ERROR: u8 = 1;
/// Requests of the control queue in one pass.
const REQUESTS_PER_PASS: usize = 16;
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

#[derive(Debug, Default)]
struct Counters {
    rx_frames: AtomicU64,
    rx_bytes: AtomicU64,
    rx_dropped: AtomicU64,
    tx_frames: AtomicU64,
    tx_bytes: AtomicU64,
    tx_dropped: AtomicU64,
    announced: AtomicU64,
    guest_announced: AtomicU64,
    relayed: AtomicU64,
    relay_dropped: AtomicU64,
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
    /// Frames of a VM on loan.
    held: HeldFrames,
    /// Frames that came otherwise than straight through the port, or wait for those.
    arrivals: Arrivals,
    /// The guest is asked to announce itself, and has not said that it did.
    is_to_announce: bool,
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
    pub fn stats(&self) -> PortCounters {
        self.transport().with_backend(|backend| backend.counters.read())
    }
}

impl Counters {
    fn read(&self) -> PortCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PortCounters {
            rx_frames: get(&self.rx_frames),
            rx_bytes: get(&self.rx_bytes),
            rx_dropped_frames: get(&self.rx_dropped),
            tx_frames: get(&self.tx_frames),
            tx_bytes: get(&self.tx_bytes),
            tx_dropped_frames: get(&self.tx_dropped),
            announced_frames: get(&self.announced),
            guest_announcements: get(&self.guest_announced),
            relayed_frames: get(&self.relayed),
            relay_dropped_frames: get(&self.relay_dropped),
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
        Self {
            wire,
            mac,
            counters: Arc::default(),
            spill: vec![0; MAX_FRAME_BYTES],
            lost: false,
            held: HeldFrames::default(),
            arrivals: Arrivals::default(),
            is_to_announce: false,
        }
    }

    /// `struct virtio_net_config` up to `status` (5.1.4).
    fn space(&self, status: u16) -> Vec<u8> {
        [&self.mac.bytes()[..], &status.to_le_bytes()].concat()
    }

    /// Requests of the guest's driver. The only one that is known says that it has announced the guest.
    fn control(&mut self, pass: &mut Pass<'_>, served: &mut Served) -> Result<(), RingFault> {
        let Some(ring) = &mut pass.rings[CONTROL] else { return Ok(()) };
        for _ in 0..REQUESTS_PER_PASS {
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
                    pass.complaints.warn(&format_args!("dropped a control request of the guest: {fault}"));
                    ring.complete(pass.ram, head, 0)?;
                }
                Popped::Chain(chain) => {
                    let mut command = [0; 2];
                    let whole = chain.readable.len() >= command.len() && !chain.writable.is_empty();
                    if whole {
                        chain.readable.read(0, &mut command);
                    }
                    let is_done = whole && command == ANNOUNCE_DONE && pass.features & ANNOUNCES == ANNOUNCES;
                    if is_done && std::mem::take(&mut self.is_to_announce) {
                        count(&self.counters.guest_announced, 1);
                        served.configured = true;
                    }
                    if whole {
                        chain.writable.write(0, &[if is_done { CONTROL_OK } else { CONTROL_ERROR }]);
                    }
                    ring.complete(pass.ram, chain.head, u32::from(whole))?;
                }
            }
        }
        served.more = true;
        Ok(())
    }

    /// Guest to network, until the ring is empty, the tap is full, or the pass is over. Sets what to come back for.
    fn transmit(&mut self, pass: &mut Pass<'_>, served: &mut Served) -> Result<(), RingFault> {
        if !self.send_held(pass) {
            served.writable = true;
            return Ok(());
        }
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
                    match self.send_or_hold(&chain.readable) {
                        // Whoever lets out what is held has this looked at again.
                        Ok(Moved::Later) if self.held.holds() => {
                            ring.put_back();
                            return Ok(());
                        }
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

    /// Sends frames that were held and may go. False if the tap takes no more at the moment.
    fn send_held(&mut self, pass: &Pass<'_>) -> bool {
        while let Some(frame) = self.held.next_free() {
            if (pass.hold)() {
                return true;
            }
            match Source::default().host(&TRANSMIT_HEADER).host(frame).write(&self.wire) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) => pass.complaints.warn(&format_args!("dropped a frame of the guest: {error}")),
                Ok(_) => {}
            }
            self.held.pop();
        }
        true
    }

    fn send_or_hold(&mut self, chain: &Buffers<'_>) -> io::Result<Moved> {
        let bytes = chain.len().saturating_sub(HEADER_BYTES);
        if !(MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&bytes) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("it has {bytes} bytes")));
        }
        if self.held.holds() {
            if !self.held.has_room(bytes) {
                return Ok(Moved::Later);
            }
            let mut frame = vec![0; bytes];
            chain.read(HEADER_BYTES, &mut frame);
            self.held.push(frame);
            return Ok(Moved::Yes(0));
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
        if self.arrivals.waits() && !(pass.hold)() {
            self.keep_back(pass.complaints);
        }
        let Some(ring) = &mut pass.rings[RECEIVE] else { return Ok(()) };
        for _ in 0..FRAMES_PER_PASS {
            if self.lost && self.arrivals.next().is_none() {
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
                        served.readable = !self.lost && self.arrivals.has_room();
                        return Ok(());
                    }
                },
            }
        }
        served.more = true;
        Ok(())
    }

    /// The next frame of those that came by a relay or waited for it, else of the tap's.
    fn fetch(&mut self, buffers: &Buffers<'_>, complaints: &Complaints) -> Moved {
        if let Some(frame) = self.arrivals.next() {
            let moved = self.deliver(frame, buffers, complaints);
            self.arrivals.pop();
            return moved;
        }
        if self.arrivals.waits() {
            return Moved::Later;
        }
        if self.arrivals.remembers() {
            let Some(bytes) = self.read_aside(complaints) else { return Moved::Later };
            self.arrivals.remember(&self.spill[..bytes]);
            return self.deliver(&self.spill[..bytes], buffers, complaints);
        }
        let mut header = [0; HEADER_BYTES];
        let room = buffers.part(HEADER_BYTES, MAX_FRAME_BYTES);
        let capacity: usize = room.iter().map(|slice| slice.len()).sum();
        let got = Sink::default().host(&mut header).guest(&room).host(&mut self.spill).read(&self.wire);
        let Some(bytes) = self.frame_bytes(got, complaints) else { return Moved::Later };
        mark_written(&room, bytes.min(capacity));
        self.received(bytes, capacity, buffers, complaints)
    }

    /// Hands a frame to the guest that is in the host's memory.
    fn deliver(&self, frame: &[u8], buffers: &Buffers<'_>, complaints: &Complaints) -> Moved {
        let capacity = buffers.len().saturating_sub(HEADER_BYTES);
        if frame.len() <= capacity {
            buffers.write(HEADER_BYTES, frame);
        }
        self.received(frame.len(), capacity, buffers, complaints)
    }

    /// A frame of so many bytes is in the guest's buffers, if it fits there.
    fn received(&self, bytes: usize, capacity: usize, buffers: &Buffers<'_>, complaints: &Complaints) -> Moved {
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

    /// What reading the tap gave, without the header; none if there is nothing to be had.
    fn frame_bytes(&mut self, got: io::Result<usize>, complaints: &Complaints) -> Option<usize> {
        match got {
            Ok(bytes) => Some(bytes.saturating_sub(HEADER_BYTES)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => {
                // A tap that was deleted, or the namespace it was in.
                complaints.warn(&format_args!("the tap cannot be read any more: {error}"));
                self.lost = true;
                None
            }
        }
    }

    /// Reads a frame of the tap into the host's memory. How long it is.
    fn read_aside(&mut self, complaints: &Complaints) -> Option<usize> {
        let mut header = [0; HEADER_BYTES];
        let got = Sink::default().host(&mut header).host(&mut self.spill).read(&self.wire);
        self.frame_bytes(got, complaints)
    }

    /// What comes through the port waits until the relay has caught up.
    fn keep_back(&mut self, complaints: &Complaints) {
        while self.arrivals.has_room()
            && !self.lost
            && let Some(bytes) = self.read_aside(complaints)
        {
            self.arrivals.keep_back(self.spill[..bytes].to_vec());
        }
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
        FEATURE_MAC | ANNOUNCES
    }

    fn config(&self) -> Vec<u8> {
        self.space(LINK_UP | if self.is_to_announce { ANNOUNCE } else { 0 })
    }

    /// Without the request to announce: whoever takes the VM asks anew.
    fn save(&self) -> Vec<u8> {
        self.space(LINK_UP)
    }

    fn reset(&mut self) {
        self.is_to_announce = false;
    }

    fn serve(&mut self, pass: &mut Pass<'_>) -> Result<Served, RingFault> {
        let mut served = Served::default();
        self.transmit(pass, &mut served)?;
        self.receive(pass, &mut served)?;
        self.control(pass, &mut served)?;
        Ok(served)
    }

    fn hold_output(&mut self, bytes: usize) {
        self.held.hold(bytes);
    }

    fn begin_increment(&mut self, number: u32) {
        self.held.begin(number);
    }

    fn let_out(&mut self, number: u32) {
        self.held.let_out(number);
    }

    fn end_holding(&mut self) {
        self.held.end();
    }

    fn await_relay(&mut self) {
        // Its former place has had that, too.
        let complaints = Complaints::new("network port");
        while self.read_aside(&complaints).is_some() {}
        self.arrivals.await_relay();
    }

    fn relay_frame(&mut self, frame: Vec<u8>) {
        if !(MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&frame.len()) {
            return;
        }
        let is_taken = self.arrivals.relay(frame);
        count(if is_taken { &self.counters.relayed } else { &self.counters.relay_dropped }, 1);
    }

    fn relay_caught_up(&mut self) {
        let twice = self.arrivals.caught_up();
        count(&self.counters.relay_dropped, twice as usize);
    }

    fn end_relay(&mut self) {
        let twice = self.arrivals.end_relay();
        count(&self.counters.relay_dropped, twice as usize);
    }

    fn former_port(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wire.as_fd())
    }

    fn counters(&self) -> Option<PortCounters> {
        Some(self.counters.read())
    }

    fn ask_to_announce(&mut self, features: u64) {
        self.is_to_announce |= features & ANNOUNCES == ANNOUNCES;
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;
    use std::time::{Duration, Instant};

    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::super::driver::Driver;
    use super::super::mmio::{feature, register};
    use super::*;
    use crate::kvm::bus::Device;
    use crate::kvm::memory::{Memory, MemoryOptions};
    use crate::model::PageBitmap;

    const FEATURES: u64 = feature::VERSION_1 | FEATURE_MAC;
    const RAM_BYTES: u64 = 8 << 20;
    const SIZE: u16 = 64;
    /// Buffers of 2 KiB from here on.
    const BUFFERS: u64 = 4 << 20;

    fn mac() -> MacAddress {
        "02:00:00:00:00:01".parse().unwrap()
    }

    fn memory() -> Memory {
        Memory::new(RAM_BYTES, MemoryOptions { huge_pages: false }).unwrap()
    }

    /// A port whose wire ends in the returned socket.
    fn port(memory: &Memory) -> (VirtioNet, UnixDatagram) {
        let (wire, network) = UnixDatagram::pair().unwrap();
        wire.set_nonblocking(true).unwrap();
        network.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        (VirtioNet::on_wire(0, memory.ram().clone(), wire.into(), mac()).unwrap(), network)
    }

    /// A frame of `len` bytes that carries a number.
    fn frame(number: u32, len: usize) -> Vec<u8> {
        let mut frame = [&[0xff; 6][..], &mac().bytes(), &[0x88, 0xb5], &number.to_be_bytes()].concat();
        frame.resize(len, number as u8);
        frame
    }

    fn number(frame: &[u8]) -> u32 {
        u32::from_be_bytes(frame[14..18].try_into().unwrap())
    }

    /// What came over the wire, without the header, which must be zero.
    fn arrived(network: &UnixDatagram) -> Vec<u8> {
        let mut data = [0; 4096];
        let len = network.recv(&mut data).expect("no frame came");
        assert_eq!(data[..HEADER_BYTES], TRANSMIT_HEADER);
        data[HEADER_BYTES..len].to_vec()
    }

    fn deliver(network: &UnixDatagram, frame: &[u8]) {
        network.send(&[&[0xee; HEADER_BYTES][..], frame].concat()).unwrap();
    }

    /// Queues a frame, its header full of rubbish, in two pieces that do not meet the header's end.
    fn transmit(driver: &mut Driver<'_>, memory: &Memory, slot: u64, frame: &[u8]) {
        let at = BUFFERS + 2048 * slot;
        memory.ram().write_slice(&[&[0xff; HEADER_BYTES][..], frame].concat(), GuestAddress(at)).unwrap();
        driver.post(TRANSMIT, &[(at, 5, false), (at + 5, (HEADER_BYTES + frame.len() - 5) as u32, false)]);
    }

    /// A line that is connected to `device`.
    fn listen(device: &VirtioNet) -> Arc<EventFd> {
        let irq = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        device.connect_irq(irq.clone());
        irq
    }

    fn dirty_pages(memory: &Memory) -> Vec<u64> {
        let mut dirty = PageBitmap::new(memory.pages());
        memory.dirty().take(&mut dirty);
        dirty.runs(u32::MAX).flat_map(|run| run.indices()).collect()
    }

    #[test]
    fn frames_go_both_ways_and_mark_what_they_touch() {
        let memory = memory();
        let (device, network) = port(&memory);
        let irq = listen(&device);
        device.resume().unwrap();
        let mut driver = Driver::new(&device, memory.ram(), 2, SIZE);
        assert_eq!(driver.start(FEATURES), 15);
        let mut config = [0; 8];
        crate::kvm::bus::MmioDevice::read(&device, register::CONFIG, &mut config);
        assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0]);

        transmit(&mut driver, &memory, 0, &frame(7, 60));
        driver.kick(TRANSMIT);
        assert_eq!(arrived(&network), frame(7, 60));
        driver.wait(TRANSMIT);

        dirty_pages(&memory);
        let buffer = BUFFERS + 0x1_0ff0;
        driver.post(RECEIVE, &[(buffer, 8, true), (buffer + 8, 2000, true)]);
        driver.kick(RECEIVE);
        deliver(&network, &frame(9, 100));
        assert_eq!(driver.wait(RECEIVE), (0, 112));
        let mut got = [0; 112];
        memory.ram().read_slice(&mut got, GuestAddress(buffer)).unwrap();
        assert_eq!(got[..HEADER_BYTES], RECEIVE_HEADER, "the wire's header reached the guest");
        assert_eq!(got[HEADER_BYTES..], frame(9, 100));
        let dirty = dirty_pages(&memory);
        for page in [buffer / 4096, buffer / 4096 + 1, Driver::place(RECEIVE)[2] / 4096] {
            assert!(dirty.contains(&page), "page {page:#x} was written and not marked: {dirty:x?}");
        }
        device.pause().unwrap();
        let expected =
            PortCounters { rx_frames: 1, rx_bytes: 100, tx_frames: 1, tx_bytes: 60, ..PortCounters::default() };
        assert_eq!(device.stats(), expected);
        assert!(irq.read().is_ok());
    }

    /// Queues a request of two bytes and their answer's place; what the answer was.
    fn request(driver: &mut Driver<'_>, memory: &Memory, command: [u8; 2]) -> u8 {
        let at = BUFFERS + (1 << 20);
        memory.ram().write_slice(&[command[0], command[1], 0xee], GuestAddress(at)).unwrap();
        driver.post(CONTROL, &[(at, 2, false), (at + 2, 1, true)]);
        driver.kick(CONTROL);
        driver.wait(CONTROL);
        memory.ram().read_obj(GuestAddress(at + 2)).unwrap()
    }

    #[test]
    fn a_driver_that_can_is_asked_to_announce_its_guest_until_it_has() {
        let memory = memory();
        let status = |device: &VirtioNet| {
            let mut status = [0; 2];
            crate::kvm::bus::MmioDevice::read(device, register::CONFIG + 6, &mut status);
            u16::from_le_bytes(status)
        };
        for (features, expected) in [(FEATURES | ANNOUNCES, LINK_UP | ANNOUNCE), (FEATURES | FEATURE_STATUS, LINK_UP)] {
            let (device, _network) = port(&memory);
            let irq = listen(&device);
            device.ask_to_announce();
            assert_eq!(status(&device), LINK_UP, "nobody is there to be asked");
            device.resume().unwrap();
            let mut driver = Driver::new(&device, memory.ram(), 3, 16);
            driver.start(features);
            device.pause().unwrap();
            let saved = device.save().unwrap();
            let _ = irq.read();
            device.ask_to_announce();
            assert_eq!((status(&device), irq.read().is_ok()), (expected, expected != LINK_UP));
            assert_eq!(device.save().unwrap()[3..12], saved[3..12], "the request does not move: it is made anew there");
            device.resume().unwrap();
            let is_asked = expected != LINK_UP;
            assert_eq!(request(&mut driver, &memory, [3, 1]), CONTROL_ERROR);
            assert_eq!(request(&mut driver, &memory, [0, 0]), CONTROL_ERROR);
            assert_eq!(status(&device), expected);
            let answer = request(&mut driver, &memory, ANNOUNCE_DONE);
            assert_eq!((answer == CONTROL_OK, status(&device)), (is_asked, LINK_UP));
            assert_eq!(device.stats().guest_announcements, u64::from(is_asked));
        }
    }

    /// Of a VM on loan: what it sends waits until it is safe, across pauses, and goes in order.
    #[test]
    fn frames_of_a_vm_on_loan_leave_when_they_are_safe() {
        let memory = memory();
        let (device, network) = port(&memory);
        network.set_nonblocking(true).unwrap();
        device.hold_output(1 << 20);
        device.resume().unwrap();
        let mut driver = Driver::new(&device, memory.ram(), 2, SIZE);
        driver.start(FEATURES);
        let mut send = |first: u32, count: u32| {
            for number in first..first + count {
                transmit(&mut driver, &memory, u64::from(number), &frame(number, 60));
                driver.kick(TRANSMIT);
                driver.wait(TRANSMIT);
            }
        };
        let nothing = || network.recv(&mut [0; 100]).unwrap_err().kind() == io::ErrorKind::WouldBlock;
        send(0, 3);
        device.pause().unwrap();
        device.begin_increment(2);
        device.resume().unwrap();
        send(3, 2);
        assert!(nothing(), "a frame left before it was safe");
        network.set_nonblocking(false).unwrap();
        device.let_out(1);
        assert_eq!([(); 3].map(|()| number(&arrived(&network))), [0, 1, 2]);
        network.set_nonblocking(true).unwrap();
        assert!(nothing(), "a frame of the second increment left with the first");
        network.set_nonblocking(false).unwrap();
        device.end_holding();
        send(5, 1);
        assert_eq!([(); 3].map(|()| number(&arrived(&network))), [3, 4, 5]);
        device.pause().unwrap();
    }

    /// Frames in flight when the VM moves: the guest queues while the device stands, the network delivers.
    #[test]
    fn a_move_loses_no_frame_and_doubles_none() {
        let source_memory = memory();
        let (source, network) = port(&source_memory);
        source.resume().unwrap();
        let mut driver = Driver::new(&source, source_memory.ram(), 2, SIZE);
        driver.start(FEATURES);
        for number in 0..20 {
            transmit(&mut driver, &source_memory, u64::from(number), &frame(number, 60));
            driver.kick(TRANSMIT);
        }
        // Some of them are sent by now, some are not.
        source.pause().unwrap();
        for number in 20..30 {
            transmit(&mut driver, &source_memory, u64::from(number), &frame(number, 60));
            driver.kick(TRANSMIT);
        }
        for slot in 0..4 {
            driver.post(RECEIVE, &[(BUFFERS + 0x10_0000 + 2048 * slot, 2048, true)]);
        }
        let state = source.save().unwrap();
        let sent_before = source.stats().tx_frames;
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(source.stats().tx_frames, sent_before, "a frame left while the device stood");

        let target_memory = memory();
        let mut everything = vec![0; RAM_BYTES as usize];
        source_memory.ram().read_slice(&mut everything, GuestAddress(0)).unwrap();
        target_memory.ram().write_slice(&everything, GuestAddress(0)).unwrap();
        let (target, target_network) = port(&target_memory);
        target.restore(&state).unwrap();
        let mut driver = driver.moved_to(&target, target_memory.ram());
        target.send_frame(&frame(999, 60)).unwrap();
        assert_eq!(number(&arrived(&target_network)), 999, "the announcement leaves first");
        deliver(&target_network, &frame(1000, 60));
        // No kick: the target looks by itself.
        target.resume().unwrap();
        let first: Vec<u32> = (0..sent_before).map(|_| number(&arrived(&network))).collect();
        let rest: Vec<u32> = (sent_before..30).map(|_| number(&arrived(&target_network))).collect();
        assert_eq!([first, rest].concat(), (0..30).collect::<Vec<_>>());
        assert_eq!(driver.wait(RECEIVE).1, 72);
        network.set_nonblocking(true).unwrap();
        target_network.set_nonblocking(true).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        for wire in [&network, &target_network] {
            assert!(wire.recv(&mut [0; 64]).is_err(), "a frame was sent twice");
        }
        let completed: Vec<u32> = std::iter::from_fn(|| driver.completed(TRANSMIT)).map(|done| done.0).collect();
        assert_eq!(completed.len(), 30);
    }

    #[test]
    fn an_interrupt_that_was_not_acknowledged_comes_again_at_the_target() {
        let memory = memory();
        let (source, network) = port(&memory);
        source.resume().unwrap();
        let mut driver = Driver::new(&source, memory.ram(), 2, SIZE);
        driver.start(FEATURES);
        transmit(&mut driver, &memory, 0, &frame(1, 60));
        driver.kick(TRANSMIT);
        arrived(&network);
        driver.wait(TRANSMIT);
        source.pause().unwrap();
        for acknowledged in [false, true] {
            if acknowledged {
                driver.store(register::INTERRUPT_ACK, 3);
            }
            let (target, _network) = port(&memory);
            let irq = listen(&target);
            target.restore(&source.save().unwrap()).unwrap();
            target.resume().unwrap();
            assert_eq!(irq.read().is_err(), acknowledged);
        }
    }

    #[test]
    fn frames_that_cannot_be_are_dropped_and_counted() {
        let memory = memory();
        let (device, network) = port(&memory);
        device.resume().unwrap();
        let mut driver = Driver::new(&device, memory.ram(), 2, SIZE);
        driver.start(FEATURES);
        // Longer than the only buffer, which is used for the next frame then.
        driver.post(RECEIVE, &[(BUFFERS, 100, true)]);
        deliver(&network, &frame(1, 89));
        deliver(&network, &frame(2, 88));
        assert_eq!(driver.wait(RECEIVE), (0, 100));
        assert_eq!(memory.ram().read_obj::<[u8; 4]>(GuestAddress(BUFFERS + 26)).unwrap(), [0, 0, 0, 2]);
        // Too small for any frame; outside RAM; a request for the wrong queue.
        for bad in [(BUFFERS, 25, true), (RAM_BYTES - 8, 100, true), (BUFFERS, 100, false)] {
            driver.post(RECEIVE, &[bad]);
            driver.kick(RECEIVE);
            assert_eq!(driver.wait(RECEIVE).1, 0);
        }
        // No frame at all; too short; too long; outside RAM; writable.
        for bad in [
            (BUFFERS, 12, false),
            (BUFFERS, 25, false),
            (BUFFERS, 12 + 65550, false),
            (RAM_BYTES - 8, 100, false),
            (BUFFERS, 100, true),
        ] {
            driver.post(TRANSMIT, &[bad]);
        }
        driver.kick(TRANSMIT);
        (0..5).for_each(|_| assert_eq!(driver.wait(TRANSMIT).1, 0));
        transmit(&mut driver, &memory, 0, &frame(3, 60));
        driver.kick(TRANSMIT);
        assert_eq!(number(&arrived(&network)), 3, "the port does not work any more");
        driver.wait(TRANSMIT);
        device.pause().unwrap();
        let stats = device.stats();
        assert_eq!((stats.rx_frames, stats.rx_dropped_frames), (1, 1));
        assert_eq!((stats.tx_frames, stats.tx_dropped_frames), (1, 5));
    }

    #[test]
    fn a_full_wire_holds_frames_back_and_a_lost_one_drops_them() {
        let memory = memory();
        let (wire, network) = UnixDatagram::pair().unwrap();
        wire.set_nonblocking(true).unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&wire, 8192).unwrap();
        let device = VirtioNet::on_wire(0, memory.ram().clone(), wire.into(), mac()).unwrap();
        device.resume().unwrap();
        let mut driver = Driver::new(&device, memory.ram(), 2, SIZE);
        driver.start(FEATURES);
        // More than the socket takes.
        for slot in 0..u64::from(SIZE / 2) {
            transmit(&mut driver, &memory, slot, &frame(slot as u32, 1500));
        }
        driver.kick(TRANSMIT);
        std::thread::sleep(Duration::from_millis(30));
        let held = u64::from(SIZE / 2) - device.stats().tx_frames;
        assert!(held > 0, "the socket took all");
        device.pause().unwrap();
        device.resume().unwrap();
        for slot in 0..SIZE / 2 {
            assert_eq!(number(&arrived(&network)), u32::from(slot));
        }
        drop(network);
        transmit(&mut driver, &memory, 0, &frame(1, 60));
        driver.kick(TRANSMIT);
        for _ in 0..=SIZE / 2 {
            driver.wait(TRANSMIT);
        }
        assert_eq!(device.stats().tx_dropped_frames, 1);
    }

    #[test]
    fn pauses_are_prompt_and_resets_safe_under_full_load() {
        let memory = memory();
        let (device, network) = port(&memory);
        device.resume().unwrap();
        let mut driver = Driver::new(&device, memory.ram(), 2, SIZE);
        let stop = std::sync::atomic::AtomicBool::new(false);
        let mut longest = Duration::ZERO;
        std::thread::scope(|scope| {
            // The network reads and writes as fast as it can.
            scope.spawn(|| {
                network.set_nonblocking(true).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    let _ = network.send(&frame(1, 1500));
                    while network.recv(&mut [0; 2048]).is_ok() {}
                }
            });
            for round in 0..200u32 {
                driver.start(FEATURES);
                for slot in 0..u64::from(SIZE / 2) - 1 {
                    transmit(&mut driver, &memory, slot, &frame(round, 1500));
                    driver.post(RECEIVE, &[(BUFFERS + 0x10_0000 + 2048 * slot, 2048, true)]);
                    driver.kick(TRANSMIT);
                    driver.kick(RECEIVE);
                }
                if round % 2 == 0 {
                    let start = Instant::now();
                    device.pause().unwrap();
                    longest = longest.max(start.elapsed());
                    let used = Driver::place(TRANSMIT)[2];
                    let before: u32 = memory.ram().read_obj(GuestAddress(used)).unwrap();
                    std::thread::sleep(Duration::from_micros(300));
                    assert_eq!(memory.ram().read_obj::<u32>(GuestAddress(used)).unwrap(), before);
                    device.resume().unwrap();
                } else {
                    // A reset returns only when the worker has let go of the rings.
                    driver.store(register::STATUS, 0);
                    memory.ram().write_slice(&[0xff; 4096], GuestAddress(Driver::place(TRANSMIT)[2])).unwrap();
                    std::thread::sleep(Duration::from_micros(300));
                    let mut page = [0; 4096];
                    memory.ram().read_slice(&mut page, GuestAddress(Driver::place(TRANSMIT)[2])).unwrap();
                    assert!(page.iter().all(|byte| *byte == 0xff), "the rings were written after a reset");
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        println!("longest pause {longest:?}");
        // Generous: other tests share the processors.
        assert!(longest < Duration::from_millis(200), "a pause took {longest:?}");
    }

    /// Real taps, in a network namespace of the test's own.
    mod tap {
        use std::os::fd::AsRawFd;

        use super::*;

        /// The host's end of a tap: a packet socket on the interface.
        struct Host(socket2::Socket);

        impl Host {
            fn on(interface: &str) -> Self {
                let protocol = i32::from((libc::ETH_P_ALL as u16).to_be());
                let socket =
                    socket2::Socket::new(socket2::Domain::PACKET, socket2::Type::RAW, Some(protocol.into())).unwrap();
                let name = std::ffi::CString::new(interface).unwrap();
                // SAFETY: all-zero is a `sockaddr_ll`; the name is a closed string; the address is whole.
                unsafe {
                    let mut address: libc::sockaddr_ll = std::mem::zeroed();
                    address.sll_family = libc::AF_PACKET as u16;
                    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
                    address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
                    let len = size_of::<libc::sockaddr_ll>() as u32;
                    assert_eq!(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len), 0);
                }
                socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                Self(socket)
            }

            /// The next ARP frame: the kernel itself sends IPv6 discovery on a new interface.
            fn arp(&mut self) -> Vec<u8> {
                loop {
                    let mut data = [0; 2048];
                    let len = std::io::Read::read(&mut self.0, &mut data).expect("no ARP frame came");
                    if data[12..14] == [0x08, 0x06] {
                        return data[..len].to_vec();
                    }
                }
            }
        }

        /// An ARP request or reply, padded to the least that Ethernet carries.
        fn arp(operation: u8, sender: [u8; 6]) -> Vec<u8> {
            let head = [&[0xff; 6][..], &sender, &[0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, operation], &sender].concat();
            let mut frame = [&head[..], &[10, 0, 0, 2], &[0; 6], &[10, 0, 0, 1]].concat();
            frame.resize(60, 0);
            frame
        }

        fn in_namespace(test: impl FnOnce() + Send) {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    // SAFETY: only this thread, which was made for it, changes its namespace.
                    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
                    test();
                });
            });
        }

        #[test]
        fn arp_frames_cross_a_real_tap_both_ways() {
            in_namespace(|| {
                let memory = memory();
                let tap = Tap::open("arp0").unwrap();
                let mut host = Host::on("arp0");
                let device = VirtioNet::new(0, memory.ram().clone(), tap, mac()).unwrap();
                device.resume().unwrap();
                let mut driver = Driver::new(&device, memory.ram(), 2, SIZE);
                driver.start(FEATURES);
                transmit(&mut driver, &memory, 0, &arp(1, mac().bytes()));
                driver.kick(TRANSMIT);
                assert_eq!(host.arp(), arp(1, mac().bytes()));

                for slot in 0..u64::from(SIZE) - 1 {
                    driver.post(RECEIVE, &[(BUFFERS + 0x10_0000 + 2048 * slot, 2048, true)]);
                }
                driver.kick(RECEIVE);
                let answer = arp(2, [2, 0, 0, 0, 0, 9]);
                host.0.send(&answer).unwrap();
                let got = loop {
                    let (id, len) = driver.wait(RECEIVE);
                    let mut data = vec![0; len as usize];
                    let at = BUFFERS + 0x10_0000 + 2048 * u64::from(id);
                    memory.ram().read_slice(&mut data, GuestAddress(at)).unwrap();
                    assert_eq!(data[..HEADER_BYTES], RECEIVE_HEADER);
                    if data[24..26] == [0x08, 0x06] {
                        break data[HEADER_BYTES..].to_vec();
                    }
                };
                assert_eq!(got, answer);

                device.pause().unwrap();
                transmit(&mut driver, &memory, 1, &arp(1, [2, 0, 0, 0, 0, 7]));
                driver.kick(TRANSMIT);
                device.send_frame(&arp(2, mac().bytes())).unwrap();
                assert_eq!(host.arp(), arp(2, mac().bytes()), "an announcement while the device stands");
                device.resume().unwrap();
                assert_eq!(host.arp(), arp(1, [2, 0, 0, 0, 0, 7]));
                assert_eq!(device.stats().announced_frames, 1);
            });
        }

        #[test]
        fn a_tap_that_is_deleted_leaves_the_device_idle_not_spinning() {
            in_namespace(|| {
                let memory = memory();
                let device = VirtioNet::new(0, memory.ram().clone(), Tap::open("gone0").unwrap(), mac()).unwrap();
                device.resume().unwrap();
                let mut driver = Driver::new(&device, memory.ram(), 2, SIZE);
                driver.start(FEATURES);
                driver.post(RECEIVE, &[(BUFFERS, 2048, true)]);
                driver.kick(RECEIVE);
                let deleted = std::process::Command::new("ip").args(["link", "del", "gone0"]).status().unwrap();
                assert!(deleted.success());
                transmit(&mut driver, &memory, 1, &arp(1, mac().bytes()));
                driver.kick(TRANSMIT);
                driver.wait(TRANSMIT);
                assert_eq!(device.stats().tx_dropped_frames, 1);
                let ticks = || {
                    let own = std::fs::read_dir("/proc/self/task").unwrap().flatten().find_map(|task| {
                        let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
                        stat.contains("(net0)").then_some(stat)
                    });
                    let fields = own.expect("the worker's thread");
                    let fields: Vec<&str> = fields.rsplit(')').next().unwrap().split_whitespace().collect();
                    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
                };
                let before = ticks();
                std::thread::sleep(Duration::from_millis(300));
                assert!(ticks() - before < 10, "the worker spins");
                device.pause().unwrap();
            });
        }
    }
}
