//! Services that answer line by line: echo, as the bare-metal test guest has it (`<n>` is answered with `<n> <count> <tsc>`), and time, whose
//! answer to any line is the real-time clock in nanoseconds; `set <nanoseconds>` moves that clock by as much first.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::clock::{now_ns, tsc};
use crate::state::State;

const ECHO_PORT: u16 = 7;
const TIME_PORT: u16 = 37;

/// Serves both for good, a thread each connection.
pub(crate) fn serve(state: Arc<State>) -> Result<()> {
    listen(ECHO_PORT, move |line, index| {
        state.echoed.fetch_add(1, Ordering::Relaxed);
        format!("{line} {} {:x}\n", index + 1, tsc())
    })?;
    listen(TIME_PORT, |line, _| {
        if let Some(by_ns) = line.strip_prefix("set ").and_then(|number| number.parse::<i64>().ok()) {
            let now = now_ns(ClockId::Realtime).saturating_add_signed(by_ns);
            let time = Timespec { tv_sec: (now / 1_000_000_000) as i64, tv_nsec: (now % 1_000_000_000) as i64 };
            // Refused only to who is not root; the answer shows it.
            let _ = clock_settime(ClockId::Realtime, time);
        }
        format!("{}\n", now_ns(ClockId::Realtime))
    })
}

fn listen(port: u16, answer: impl Fn(&str, usize) -> String + Clone + Send + 'static) -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port)).with_context(|| format!("the service at port {port}"))?;
    let body = move || {
        for stream in listener.incoming().flatten() {
            let answer = answer.clone();
            // A connection for which there is no thread is closed.
            let _ = std::thread::Builder::new().name("line".into()).spawn(move || converse(&stream, &answer));
        }
    };
    std::thread::Builder::new().name("listen".into()).spawn(body).context("thread of a service")?;
    Ok(())
}

fn converse(stream: &TcpStream, answer: &impl Fn(&str, usize) -> String) {
    let _ = stream.set_nodelay(true);
    let mut writer = stream;
    for (index, line) in BufReader::new(stream).lines().map_while(std::result::Result::ok).enumerate() {
        if writer.write_all(answer(line.trim(), index).as_bytes()).is_err() {
            return;
        }
    }
}
