//! Asks and answers through a tunnel: its other end, and the VM behind it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::announce::frames;
use crate::announce::heard::{self, Evidence};
use crate::model::{MacAddress, TunnelLine};
use crate::net::listen::Listener;
use crate::net::pnet::PnetPort;
use crate::net::{NetError, bridge};
use crate::port::{FramePort, WireError};
use crate::time::monotonic_now;
use crate::tunnel::echo::{ETHER_TYPE, Echo};
use crate::tunnel::moved::Found;

/// A question is repeated this often until it is answered.
const ASK_EVERY: Duration = Duration::from_millis(100);
/// How often one who answers looks whether to go on.
const TICK: Duration = Duration::from_millis(200);
/// The least that is asked with, in bytes behind the Ethernet header: what Ethernet pads to (IEEE 802.3, 4.2.3.3).
pub const SMALL_BYTES: usize = 46;

fn own_address(device: &str) -> Result<MacAddress, NetError> {
    let none = || NetError::WrongKind { name: device.to_owned(), expected: "Ethernet device" };
    bridge::link(device)?.mac.ok_or_else(none)
}

fn send(port: &mut PnetPort, frame: &[u8]) -> Result<(), WireError> {
    port.send(frame).map_err(|error| WireError(format!("a frame could not be sent into the tunnel: {error}")))
}

/// Asks the other end of `device` with frames of so many bytes behind the Ethernet header; how long the answer took, or none if none came within `limit`.
///
/// # Errors
/// The device is gone, or nobody may send there.
pub fn far_end(device: &str, packet_bytes: usize, limit: Duration) -> Result<Option<Duration>, WireError> {
    let own = own_address(device)?;
    let mut listener = Listener::open_for(device, ETHER_TYPE)?;
    let mut port = PnetPort::open(device)?;
    let began = monotonic_now();
    let first = began.as_nanos() as u64;
    // The number says which question of ours it was.
    let mut asked: Vec<Duration> = Vec::new();
    loop {
        let now = monotonic_now();
        if now >= began + limit {
            return Ok(None);
        }
        if asked.last().is_none_or(|last| now >= *last + ASK_EVERY) {
            send(&mut port, &Echo::question(first.wrapping_add(asked.len() as u64), packet_bytes).frame(own))?;
            asked.push(now);
        }
        let until = (now + ASK_EVERY).min(began + limit);
        let Some(passing) = listener.next(until)? else { continue };
        let Some(echo) = Echo::read(passing.frame).filter(|echo| echo.is_answer && !passing.outgoing) else { continue };
        let index = echo.number.wrapping_sub(first) as usize;
        if let Some(asked) = asked.get(index)
            && echo.packet_bytes >= packet_bytes
        {
            return Ok(Some(monotonic_now().saturating_sub(*asked)));
        }
    }
}

/// Answers whoever asks through the devices of a tunnel, for as long as it lives.
#[derive(Debug)]
pub struct Answering {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Answering {
    /// Begins.
    ///
    /// # Errors
    /// A device cannot be listened to.
    pub fn on(lines: &[TunnelLine]) -> Result<Self, WireError> {
        let mut all = Self { over: Arc::default(), threads: Vec::new() };
        for line in lines {
            let own = own_address(&line.device)?;
            let listener = Listener::open_for(&line.device, ETHER_TYPE)?;
            let port = PnetPort::open(&line.device)?;
            let over = Arc::clone(&all.over);
            let answer = std::thread::Builder::new().name("tunnel".to_owned());
            let thread = answer.spawn(move || answer_all(listener, port, own, &over));
            all.threads.push(thread.map_err(|error| WireError(format!("no thread for a tunnel: {error}")))?);
        }
        Ok(all)
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            let _panicked_and_printed = thread.join();
        }
    }
}

fn answer_all(mut listener: Listener, mut port: PnetPort, own: MacAddress, over: &AtomicBool) {
    while !over.load(Ordering::Acquire) {
        let echo = match listener.next(monotonic_now() + TICK) {
            Ok(None) => continue,
            Ok(Some(passing)) if passing.outgoing => continue,
            Ok(Some(passing)) => Echo::read(passing.frame),
            Err(error) => {
                tracing::debug!("a tunnel is not answered for any more: {error}");
                return;
            }
        };
        if let Some(echo) = echo.filter(|echo| !echo.is_answer)
            && let Err(error) = port.send(&echo.answer().frame(own))
        {
            tracing::debug!("an answer into a tunnel: {error}");
        }
    }
}

/// Asks through the tunnel and in the VM's LAN who has the addresses of one port, for so long. A VM that only sends from one of them, and answers no question of a station without an address, has it, too.
///
/// # Errors
/// An interface is gone.
pub fn who_has(line: &TunnelLine, limit: Duration) -> Result<BTreeMap<IpAddr, Found>, WireError> {
    let nobody = Found { behind: false, elsewhere: None };
    let mut found: BTreeMap<IpAddr, Found> = line.ips.iter().map(|&ip| (ip, nobody)).collect();
    for (ip, _) in answers(&line.device, line, true, limit / 2)? {
        found.entry(ip).or_insert(nobody).behind = true;
    }
    for (ip, mac) in answers(&line.bridge, line, false, limit / 2)? {
        found.entry(ip).or_insert(nobody).elsewhere = Some(mac);
    }
    Ok(found)
}

/// Asks on an interface, and returns what the VM itself (`through` the tunnel), or what others say. In the LAN the bridge itself answers for the VM: only what comes out of the tunnel is the VM's own word.
fn answers(
    interface: &str,
    line: &TunnelLine,
    through: bool,
    limit: Duration,
) -> Result<BTreeMap<IpAddr, MacAddress>, WireError> {
    let own = own_address(interface)?;
    let mut listener = Listener::open(interface)?;
    let mut port = PnetPort::open(interface)?;
    let began = monotonic_now();
    let (mut asked_at, mut heard_all) = (None::<Duration>, BTreeMap::new());
    loop {
        let now = monotonic_now();
        if now >= began + limit || heard_all.len() == line.ips.len() {
            return Ok(heard_all);
        }
        if asked_at.is_none_or(|asked| now >= asked + 3 * ASK_EVERY) {
            for ip in &line.ips {
                if let Ok(question) = frames::question(own, *ip, None) {
                    send(&mut port, question.bytes())?;
                }
            }
            asked_at = Some(now);
        }
        let Some(passing) = listener.next((now + ASK_EVERY).min(began + limit))? else { continue };
        if passing.outgoing {
            continue;
        }
        let Some(heard) = heard::read(passing.frame) else { continue };
        let Some((ip, evidence)) = heard.ip.filter(|(ip, _)| line.ips.contains(ip)) else { continue };
        let claims = matches!(evidence, Evidence::Arp | Evidence::Advertisement { .. });
        let is_vm = heard.mac == line.mac;
        // Others than the VM may send from its address who only pass its packets on.
        if is_vm == through && (claims || is_vm) {
            heard_all.insert(ip, heard.mac);
        }
    }
}
