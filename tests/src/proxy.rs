//! A TCP proxy between two managers that cuts, stalls and heals on command.
//!
//! Owns a thread a direction of each connection. Must not know what flows.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use socket2::SockRef;

/// How often a thread that waits for bytes looks whether its connection was cut.
const TICK: Duration = Duration::from_millis(10);
/// Connecting to the real target: it is on this host.
const DIAL_LIMIT: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Bytes flow.
    Open,
    /// Nothing moves, and nobody is told.
    Stalled,
    /// New connections are reset.
    Refusing,
    /// The proxy ends.
    Over,
}

/// How connections end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// With RST, as when a host has restarted.
    Reset,
    /// With FIN, as when a process has ended.
    Close,
}

struct State {
    mode: Mode,
    /// Counts cuts: a connection older than the last one ends.
    cuts: u32,
    how: Cut,
}

struct Shared {
    target: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.changed.notify_all();
    }

    /// Waits while the link is stalled; how the connection of age `age` is to end, if it is.
    fn pass(&self, age: u32) -> Option<Cut> {
        let mut state = self.state();
        while state.mode == Mode::Stalled && state.cuts == age {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        (state.cuts != age || state.mode == Mode::Over).then_some(state.how)
    }
}

/// A running proxy; dropping it closes everything.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Listens on a port of the kernel's choice and forwards to `target`.
    ///
    /// # Errors
    /// No port.
    pub fn new(target: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).context("a port for the proxy")?;
        let address = listener.local_addr()?;
        let state = Mutex::new(State { mode: Mode::Open, cuts: 0, how: Cut::Close });
        let shared = Arc::new(Shared { target, state, changed: Condvar::new() });
        let inside = Arc::clone(&shared);
        let acceptor = thread::Builder::new().name("proxy".into()).spawn(move || accept(&listener, &inside))?;
        Ok(Self { address, shared, acceptor: Some(acceptor) })
    }

    /// `tcp://ADDR:PORT`
    pub fn address(&self) -> String {
        format!("tcp://{}", self.address)
    }

    /// Ends all connections; new ones are reset until [`Proxy::heal`] if `for_good`.
    pub fn cut(&self, how: Cut, for_good: bool) {
        self.shared.set(|state| {
            state.cuts += 1;
            state.how = how;
            state.mode = if for_good { Mode::Refusing } else { Mode::Open };
        });
    }

    /// Forwards nothing any more, on old and new connections.
    pub fn stall(&self) {
        self.shared.set(|state| state.mode = Mode::Stalled);
    }

    /// Forwards again, what was held back first.
    pub fn heal(&self) {
        self.shared.set(|state| state.mode = Mode::Open);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.set(|state| state.mode = Mode::Over);
        // Wakes the acceptor.
        drop(TcpStream::connect(self.address));
        if let Some(acceptor) = self.acceptor.take() {
            let _panicked = acceptor.join();
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for near in listener.incoming() {
        let (mode, age) = {
            let state = shared.state();
            (state.mode, state.cuts)
        };
        let Ok(near) = near else { continue };
        match mode {
            Mode::Over => return,
            Mode::Refusing => reset(&near),
            Mode::Open | Mode::Stalled => {
                let shared = Arc::clone(shared);
                // They end with the link or the proxy; nobody waits for them.
                let _detached = thread::Builder::new().name("proxied".into()).spawn(move || carry(&near, &shared, age));
            }
        }
    }
}

fn reset(stream: &TcpStream) {
    let _gone_already = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Carries one connection to its end.
fn carry(near: &TcpStream, shared: &Shared, age: u32) {
    if shared.pass(age).is_some() {
        return;
    }
    let Ok(far) = TcpStream::connect_timeout(&shared.target, DIAL_LIMIT) else { return reset(near) };
    let set_up =
        |stream: &TcpStream| stream.set_nodelay(true).and_then(|()| stream.set_read_timeout(Some(TICK))).is_ok();
    if !(set_up(near) && set_up(&far)) {
        return;
    }
    thread::scope(|scope| {
        scope.spawn(|| pump(near, &far, shared, age));
        pump(&far, near, shared, age);
    });
    if shared.pass(age) == Some(Cut::Reset) {
        reset(near);
        reset(&far);
    }
}

/// Moves bytes one way until that side closes or the link is cut.
fn pump(mut from: &TcpStream, mut to: &TcpStream, shared: &Shared, age: u32) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        if shared.pass(age).is_some() {
            return;
        }
        let read = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => continue,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        // What was read just before a stall is held back with the rest.
        if shared.pass(age).is_some() || to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    let _gone_already = to.shutdown(std::net::Shutdown::Write);
}
