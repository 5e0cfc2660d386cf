//! One HTTP GET, for the guest's counters.
//!
//! HTTP/1.0 with `Connection: close`, so that the body ends where the connection ends: the guest's server is small.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// More than this many bytes are no answer of the test guest.
const ANSWER_LIMIT_BYTES: usize = 1 << 20;

/// Fetches `path`; returns the body.
///
/// # Errors
/// No connection, a status other than 200, or not done within `limit`.
pub fn http_get(server: SocketAddr, path: &str, limit: Duration) -> Result<String> {
    let deadline = Instant::now() + limit;
    let left = || deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero());
    let mut stream =
        TcpStream::connect_timeout(&server, limit).with_context(|| format!("connect to http://{server}{path}"))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {server}\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let left = left().with_context(|| format!("http://{server}{path}: not done within {limit:?}"))?;
        stream.set_read_timeout(Some(left))?;
        let length = match stream.read(&mut chunk) {
            // With a time limit on the socket the kernel does not restart the call after a signal.
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            result => result.with_context(|| format!("read http://{server}{path}"))?,
        };
        if length == 0 {
            break;
        }
        answer.extend_from_slice(&chunk[..length]);
        ensure!(answer.len() <= ANSWER_LIMIT_BYTES, "http://{server}{path}: more than {ANSWER_LIMIT_BYTES} bytes");
    }
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without an end of its head")?;
    let status = head.split_whitespace().nth(1).unwrap_or_default();
    ensure!(status == "200", "http://{server}{path}: {}", head.lines().next().unwrap_or_default());
    Ok(body.to_owned())
}

/// The guest's counters (`GET /counters`).
///
/// # Errors
/// As [`http_get`], or the body is no JSON.
pub fn counters(server: SocketAddr, limit: Duration) -> Result<serde_json::Value> {
    let body = http_get(server, "/counters", limit)?;
    serde_json::from_str(&body).with_context(|| format!("counters are no JSON: {body}"))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    fn serve(answer: &'static [u8], stay_open: bool) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 512];
            let _length = stream.read(&mut request).unwrap();
            let _client_may_be_gone = stream.write_all(answer);
            if stay_open {
                let _until_the_client_closes = stream.read(&mut request);
            }
        });
        address
    }

    #[test]
    fn bodies_are_read_and_errors_named() {
        let limit = Duration::from_secs(10);
        let ok = serve(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{\"pages\": 7}", false);
        assert_eq!(counters(ok, limit).unwrap()["pages"], 7);
        let missing = serve(b"HTTP/1.0 404 Not Found\r\n\r\n", false);
        assert!(http_get(missing, "/x", limit).unwrap_err().to_string().contains("404"));
        let stalled = serve(b"HTTP/1.0 200 OK\r\n\r\n", true);
        assert!(http_get(stalled, "/", Duration::from_millis(30)).is_err());
    }
}
