//! The echo service, as the bare-metal test guest has it: `<n>` is answered with `<n> <count> <tsc>`.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};

use crate::clock::tsc;
use crate::state::State;

const PORT: u16 = 7;

/// Serves for good, a thread each connection.
pub(crate) fn serve(state: Arc<State>) -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", PORT)).context("the echo service")?;
    let body = move || {
        for stream in listener.incoming().flatten() {
            let state = state.clone();
            // A connection for which there is no thread is closed.
            let _ = std::thread::Builder::new().name("echo".into()).spawn(move || answer(&stream, &state));
        }
    };
    std::thread::Builder::new().name("echo".into()).spawn(body).context("thread of the echo service")?;
    Ok(())
}

fn answer(stream: &TcpStream, state: &State) {
    let _ = stream.set_nodelay(true);
    let mut writer = stream;
    for (index, line) in BufReader::new(stream).lines().map_while(std::result::Result::ok).enumerate() {
        state.echoed.fetch_add(1, Ordering::Relaxed);
        if writer.write_all(format!("{} {} {:x}\n", line.trim(), index + 1, tsc()).as_bytes()).is_err() {
            return;
        }
    }
}
