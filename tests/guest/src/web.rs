//! Owns the network interface on smoltcp, and two of its services: the TCP echo with sequence numbers and the small HTTP server.

use core::fmt::Write;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};

use dunlin_guest::cmdline::Network;
use dunlin_guest::http::{self, Request};
use dunlin_guest::text::{self, Buffer};
use dunlin_guest::units::cycles_to_ns;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet, SocketStorage};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Address, Ipv6Address};

use crate::balloon::{self, Balloon};
use crate::blk::Block;
use crate::bulk::Bulk;
use crate::net::NetDevice;
use crate::once::Once;
use crate::packets::Packets;
use crate::report::{self, Extras};
use crate::writer::VERIFY;
use crate::{clock, cpu, io};

const ECHO_PORT: u16 = 7;
const HTTP_PORT: u16 = 80;
const ECHO_SOCKETS: usize = 8;
const HTTP_SOCKETS: usize = 6;
const SOCKETS: usize = ECHO_SOCKETS + HTTP_SOCKETS;
/// With those of the other services.
const ALL_SOCKETS: usize = SOCKETS + Bulk::SOCKETS + 1;
const RECEIVE_BYTES: usize = 2048;
const SEND_BYTES: usize = 8192;
const RESPONSE_BYTES: usize = 24 << 10;
/// Digits of an echo line at most.
const LINE_BYTES: usize = 20;
/// Longest answer of the echo service.
const ANSWER_BYTES: usize = 64;

static STORAGE: Once<[SocketStorage<'static>; ALL_SOCKETS]> = Once::new([SocketStorage::EMPTY; ALL_SOCKETS]);
static RECEIVE: Once<[[u8; RECEIVE_BYTES]; SOCKETS]> = Once::new([[0; RECEIVE_BYTES]; SOCKETS]);
static SEND: Once<[[u8; SEND_BYTES]; SOCKETS]> = Once::new([[0; SEND_BYTES]; SOCKETS]);
static SCRATCH: Once<Response> = Once::new(Buffer::new());
static RESPONSES: Once<[Response; HTTP_SOCKETS]> = Once::new([const { Buffer::new() }; HTTP_SOCKETS]);

type Response = Buffer<RESPONSE_BYTES>;

/// What a request asks of the machine after its answer is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Power off.
    PowerOff,
    /// Reset.
    Reset,
}

struct Echo {
    handle: SocketHandle,
    line: [u8; LINE_BYTES],
    line_len: usize,
    count: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Reading,
    Verifying(u32),
    Sending(usize),
}

struct Http {
    handle: SocketHandle,
    stage: Stage,
    response: &'static mut Response,
}

/// All network services.
pub struct Web {
    /// The card.
    pub device: NetDevice,
    interface: Interface,
    sockets: SocketSet<'static>,
    echos: [Echo; ECHO_SOCKETS],
    https: [Http; HTTP_SOCKETS],
    packets: Packets,
    bulk: Bulk,
    /// Lines answered by the echo service.
    pub echo_lines: u64,
    order: Option<(Order, u64)>,
    scratch: &'static mut Response,
}

impl Web {
    /// Starts the services on a card.
    pub fn start(mut device: NetDevice, network: &Network) -> Self {
        let mut config = Config::new(EthernetAddress(device.mac).into());
        config.random_seed = io::tsc();
        let mut interface = Interface::new(config, &mut device, Instant::ZERO);
        let v4 = network.address.map(|it| IpCidr::new(Ipv4Address::from_octets(it.octets).into(), it.prefix));
        let v6 = network.address6.map(|it| IpCidr::new(Ipv6Address::from_octets(it.octets).into(), it.prefix));
        interface.update_ip_addrs(|addresses| {
            for address in v4.into_iter().chain(v6) {
                let _ = addresses.push(address);
            }
        });
        if let Some(gateway) = network.gateway {
            let _ = interface.routes_mut().add_default_ipv4_route(Ipv4Address::from_octets(gateway));
        }
        let mut sockets = SocketSet::new(&mut STORAGE.take()[..]);
        let mut buffers = RECEIVE.take().iter_mut().zip(SEND.take().iter_mut());
        let mut responses = RESPONSES.take().iter_mut();
        let mut add = || {
            let (receive, send) = buffers.next().expect("a buffer for each socket");
            let mut socket = Socket::new(SocketBuffer::new(&mut receive[..]), SocketBuffer::new(&mut send[..]));
            socket.set_nagle_enabled(false);
            socket.set_ack_delay(None);
            sockets.add(socket)
        };
        let echos = core::array::from_fn(|_| Echo { handle: add(), line: [0; LINE_BYTES], line_len: 0, count: 0 });
        let https = core::array::from_fn(|_| Http {
            handle: add(),
            stage: Stage::Reading,
            response: responses.next().expect("a response buffer for each socket"),
        });
        let (packets, bulk) = (Packets::start(&mut sockets), Bulk::start(&mut sockets));
        let (order, scratch) = (None, SCRATCH.take());
        Self { device, interface, sockets, echos, https, packets, bulk, echo_lines: 0, order, scratch }
    }

    /// One round. Time is the run clock, so that a pause of the machine runs out no time-out. Returns the cycles until the
    /// next round must be, and what the machine was asked to do.
    pub fn round(
        &mut self,
        run_cycles: u64,
        heartbeats: u64,
        block: &mut Option<Block>,
        balloon: Option<&Balloon>,
    ) -> (u64, Option<Order>) {
        let interrupts = self.device.begin();
        let now = Instant::from_micros((cycles_to_ns(run_cycles, clock::tsc_hz()) / 1000) as i64);
        self.interface.poll(now, &mut self.device, &mut self.sockets);
        let mut again = self.serve_echo();
        again |= self.serve_http(run_cycles, heartbeats, block, balloon);
        again |= self.packets.serve(&mut self.sockets);
        let (bulk, bulk_in) = self.bulk.serve(&mut self.sockets, run_cycles);
        again |= bulk;
        if again {
            self.interface.poll(now, &mut self.device, &mut self.sockets);
        }
        self.device.settle(interrupts, run_cycles);
        let order = self.order.filter(|(_, at)| run_cycles >= *at).map(|(order, _)| order);
        let busy = self.order.is_some() || self.https.iter().any(|http| http.stage != Stage::Reading);
        let longest = Duration::from_millis(if busy { 5 } else { 1000 });
        let delay = self.interface.poll_delay(now, &self.sockets).unwrap_or(longest).min(longest);
        let delay = clock::cycles(delay.total_micros() * 1000);
        (bulk_in.map_or(delay, |bulk_in| bulk_in.min(delay)), order)
    }

    fn serve_echo(&mut self) -> bool {
        let mut sent = false;
        for echo in &mut self.echos {
            let socket = self.sockets.get_mut::<Socket>(echo.handle);
            if reopen(socket, ECHO_PORT) {
                echo.line_len = 0;
                echo.count = 0;
            }
            while socket.can_recv() && socket.send_capacity() - socket.send_queue() >= ANSWER_BYTES {
                let Some(complete) = echo.read_line(socket) else {
                    socket.abort();
                    break;
                };
                if complete {
                    echo.count += 1;
                    self.echo_lines += 1;
                    let mut answer = Buffer::<ANSWER_BYTES>::new();
                    let number = core::str::from_utf8(&echo.line[..echo.line_len]).unwrap_or("");
                    text::echo_answer(&mut answer, number, echo.count, io::tsc());
                    let _ = socket.send_slice(answer.as_bytes());
                    echo.line_len = 0;
                    sent = true;
                }
            }
            if socket.state() == State::CloseWait && !socket.can_recv() {
                socket.close();
                sent = true;
            }
        }
        sent
    }

    fn serve_http(
        &mut self,
        run_cycles: u64,
        heartbeats: u64,
        block: &mut Option<Block>,
        balloon: Option<&Balloon>,
    ) -> bool {
        let mut sent = false;
        for index in 0..HTTP_SOCKETS {
            let handle = self.https[index].handle;
            let socket = self.sockets.get_mut::<Socket>(handle);
            if reopen(socket, HTTP_PORT) {
                self.https[index].stage = Stage::Reading;
            }
            match self.https[index].stage {
                Stage::Reading => {
                    let mut input = [0u8; RECEIVE_BYTES];
                    let len = socket.peek_slice(&mut input).unwrap_or(0);
                    match http::parse(&input[..len]) {
                        Some(request) => {
                            let extras = Extras {
                                heartbeats,
                                net: Some(&self.device),
                                echo_lines: self.echo_lines,
                                block: block.as_ref(),
                                balloon,
                            };
                            let (stage, order) = answer(request, self.https[index].response, self.scratch, &extras);
                            if let Request::Set(query) = request {
                                set_block(query, block);
                            }
                            self.https[index].stage = stage;
                            self.order =
                                self.order.or(order.map(|order| (order, run_cycles + clock::cycles(100_000_000))));
                            let _ = socket.recv(|all| (all.len(), ()));
                        }
                        None if len == RECEIVE_BYTES => socket.abort(),
                        None if socket.state() == State::CloseWait => socket.close(),
                        None => {}
                    }
                }
                Stage::Verifying(generation) => {
                    let done = |cpu: &cpu::Cpu| cpu.shared.verified_generation.load(Acquire) >= generation;
                    if cpu::all(crate::settings().cpus).iter().all(done) && balloon::has_verified(generation) {
                        let body = &mut Buffer::<256>::new();
                        report::verification(body);
                        respond(self.https[index].response, "200 OK", "application/json", body.as_bytes());
                        self.https[index].stage = Stage::Sending(0);
                    }
                }
                Stage::Sending(_) => {}
            }
            if let Stage::Sending(from) = self.https[index].stage {
                let socket = self.sockets.get_mut::<Socket>(handle);
                let rest = &self.https[index].response.as_bytes()[from..];
                let taken = socket.send_slice(rest).unwrap_or(0);
                sent |= taken > 0;
                self.https[index].stage = Stage::Sending(from + taken);
                if taken == rest.len() && socket.may_send() {
                    socket.close();
                    sent = true;
                }
            }
        }
        sent
    }
}

impl Echo {
    /// Takes bytes up to the end of a line; true when the line is complete, `None` when it is not a number.
    fn read_line(&mut self, socket: &mut Socket) -> Option<bool> {
        let (line, line_len) = (&mut self.line, &mut self.line_len);
        let outcome = socket.recv(|bytes| {
            for (index, byte) in bytes.iter().enumerate() {
                match byte {
                    b'\n' if *line_len > 0 => return (index + 1, Some(true)),
                    b'\r' => {}
                    b'0'..=b'9' if *line_len < LINE_BYTES => {
                        line[*line_len] = *byte;
                        *line_len += 1;
                    }
                    _ => return (index, None),
                }
            }
            (bytes.len(), Some(false))
        });
        outcome.unwrap_or(None)
    }
}

/// Listens again on a socket whose connection is over; true when it did.
pub fn reopen(socket: &mut Socket, port: u16) -> bool {
    if socket.state() == State::TimeWait {
        socket.abort();
    }
    let closed = !socket.is_open();
    if closed {
        let _ = socket.listen(port);
        // A peer that has vanished must not hold a socket for ever; counted in run time, so a pause does not end it.
        socket.set_keep_alive(Some(Duration::from_secs(30)));
        socket.set_timeout(Some(Duration::from_secs(180)));
    }
    closed
}

fn respond(out: &mut Response, status: &str, kind: &str, body: &[u8]) {
    out.clear();
    let _ = write!(
        out,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let _ = out.write_str(core::str::from_utf8(body).unwrap_or(""));
}

fn respond_counters(out: &mut Response, scratch: &mut Response, extras: &Extras) {
    scratch.clear();
    report::counters(scratch, extras);
    respond(out, "200 OK", "application/json", scratch.as_bytes());
}

fn answer(request: Request, out: &mut Response, scratch: &mut Response, extras: &Extras) -> (Stage, Option<Order>) {
    let mut small = Buffer::<2048>::new();
    let sent = (Stage::Sending(0), None);
    match request {
        Request::Index => {
            report::index(&mut small, extras);
            respond(out, "200 OK", "text/plain", small.as_bytes());
            sent
        }
        Request::Counters => {
            respond_counters(out, scratch, extras);
            sent
        }
        Request::Set(query) => {
            match set(query) {
                Ok(()) => respond_counters(out, scratch, extras),
                Err(message) => respond(out, "400 Bad Request", "text/plain", message.as_bytes()),
            }
            sent
        }
        Request::Verify => (Stage::Verifying(VERIFY.fetch_add(1, AcqRel) + 1), None),
        Request::ResetGap => {
            report::reset_gaps();
            respond(out, "200 OK", "text/plain", b"gap reset\n");
            sent
        }
        Request::Poison(query) => {
            match poison(query) {
                Some(()) => respond(out, "200 OK", "text/plain", b"page broken\n"),
                None => respond(out, "400 Bad Request", "text/plain", b"cpu=N&page=N\n"),
            }
            sent
        }
        Request::PowerOff => {
            respond(out, "200 OK", "text/plain", b"power off\n");
            (Stage::Sending(0), Some(Order::PowerOff))
        }
        Request::Reset => {
            respond(out, "200 OK", "text/plain", b"reset\n");
            (Stage::Sending(0), Some(Order::Reset))
        }
        Request::Unknown => {
            respond(out, "404 Not Found", "text/plain", b"no such page\n");
            sent
        }
        Request::Malformed => {
            respond(out, "400 Bad Request", "text/plain", b"GET only\n");
            sent
        }
    }
}

/// Applies the settings of `/set` to one vCPU (`cpu=N`) or to all.
fn set(query: &str) -> Result<(), &'static str> {
    let count = crate::settings().cpus;
    let mut targets = 0..count;
    if let Some((_, value)) = http::pairs(query).find(|(name, _)| *name == "cpu") {
        let cpu: usize = value.parse().ok().filter(|cpu| *cpu < count).ok_or("no such cpu\n")?;
        targets = cpu..cpu + 1;
    }
    for cpu in &cpu::all(count)[targets] {
        let before = cpu.shared.wanted();
        let mut spec = before;
        for (name, value) in http::pairs(query) {
            match name {
                "cpu" | "blk_rate" => {}
                "spin" => cpu.shared.spin.store(u8::from(value == "1"), Relaxed),
                _ if spec.set(name, value) => {}
                _ => return Err("not understood: cpu, ws, rate, pattern, share, fill, spin, blk_rate\n"),
            }
        }
        if spec != before {
            cpu.shared.publish(&spec);
        }
    }
    Ok(())
}

fn set_block(query: &str, block: &mut Option<Block>) {
    let rate = http::pairs(query).find(|(name, _)| *name == "blk_rate").and_then(|(_, value)| value.parse().ok());
    if let (Some(rate), Some(block)) = (rate, block) {
        block.set_rate(rate);
    }
}

fn poison(query: &str) -> Option<()> {
    let value = |wanted| http::pairs(query).find(|(name, _)| *name == wanted)?.1.parse::<u64>().ok();
    let (cpu, page) = (value("cpu")? as usize, value("page")?);
    let target = cpu::all(crate::settings().cpus).get(cpu)?;
    target.shared.poison.store(page.checked_add(1)?, Relaxed);
    Some(())
}
