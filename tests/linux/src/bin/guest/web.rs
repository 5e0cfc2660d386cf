//! What the guest tells and does over HTTP/1.0: one request a connection.
//!
//! | path | what |
//! |---|---|
//! | `/state` | everything, see [`crate::state`] |
//! | `/verify` | compares the original file on the disk with what it must be |
//! | `/grab/64M` | writes so much memory, and frees it |
//! | `/entropy` | reads the hardware random number generator |
//! | `/poweroff`, `/reboot` | ends it |

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use dunlin_linux::arguments::bytes;
use dunlin_linux::system;
use serde_json::{Value, json};

use crate::copier;
use crate::state::State;

const PORT: u16 = 80;

/// Serves for good.
pub(crate) fn serve(state: Arc<State>) -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", PORT)).context("the web service")?;
    let body = move || {
        for stream in listener.incoming().flatten() {
            let state = state.clone();
            let _ = std::thread::Builder::new().name("web".into()).spawn(move || serve_one(&stream, &state));
        }
    };
    std::thread::Builder::new().name("web".into()).spawn(body).context("thread of the web service")?;
    Ok(())
}

fn serve_one(stream: &TcpStream, state: &State) {
    let mut line = String::new();
    // A request line that is longer is none of ours.
    if BufReader::new(stream.take(4096)).read_line(&mut line).is_err() {
        return;
    }
    let path = line.split_whitespace().nth(1).unwrap_or("/").to_owned();
    let (status, body) = match answer(&path, state) {
        Ok(body) => ("200 OK", body),
        Err(error) => ("500 Failed", json!({ "error": format!("{error:#}") })),
    };
    let mut writer = stream;
    let _ = writer.write_all(format!("HTTP/1.0 {status}\r\nContent-Type: application/json\r\n\r\n{body}").as_bytes());
    let _ = stream.shutdown(std::net::Shutdown::Write);
    match path.as_str() {
        "/poweroff" => system::power_off(),
        "/reboot" => system::restart(),
        _ => {}
    }
}

fn answer(path: &str, state: &State) -> Result<Value> {
    match path {
        "/state" => Ok(state.report()),
        "/verify" => Ok(json!({ "ok": true, "bytes": copier::verify()? })),
        "/entropy" => {
            let mut bytes = [0; 32];
            File::open("/dev/hwrng").context("/dev/hwrng")?.read_exact(&mut bytes)?;
            Ok(json!({ "bytes": bytes }))
        }
        "/poweroff" | "/reboot" => Ok(json!({ "ok": true })),
        other => match other.strip_prefix("/grab/").and_then(bytes) {
            Some(length) => {
                let memory = vec![0x5au8; usize::try_from(length)?];
                Ok(json!({ "bytes": std::hint::black_box(&memory).len() }))
            }
            None => bail!("no such path: {path}"),
        },
    }
}
