//! Write protection of a hosted VM, asked for over its control socket: `POST /v1/dirty-log` with `{"state": S}`, where S is
//! `on`, `again` (protect what was written since) or `off`.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use crate::port::{Arm, ArmError};

/// How long the VM may take to answer: protecting a TiB takes a fraction of this.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest answer that is read.
const MAX_ANSWER_BYTES: u64 = 64 << 10;

/// The control socket of one hosted VM.
#[derive(Debug)]
pub struct ControlSocketArm {
    socket: PathBuf,
}

impl ControlSocketArm {
    /// Nothing is sent before [`Arm::arm`].
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    fn ask(&self, state: &'static str) -> Result<(), ArmError> {
        let failed = |reason: String| ArmError { action: state, reason };
        let answer = self.post(state).map_err(|e| failed(format!("{}: {e}", self.socket.display())))?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        match head.split(' ').nth(1) {
            Some(code) if code.starts_with('2') => Ok(()),
            Some("404") => Err(failed("this VM's control socket has no dirty log to switch".to_owned())),
            _ => Err(failed(if body.is_empty() { "it answered no HTTP".to_owned() } else { body.to_owned() })),
        }
    }

    fn post(&self, state: &str) -> io::Result<String> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let body = format!("{{\"state\":\"{state}\"}}");
        let length = body.len();
        let head = "POST /v1/dirty-log HTTP/1.1\r\nHost: dunlin\r\nConnection: close\r\nContent-Type: application/json";
        stream.write_all(format!("{head}\r\nContent-Length: {length}\r\n\r\n{body}").as_bytes())?;
        let mut answer = Vec::new();
        stream.take(MAX_ANSWER_BYTES).read_to_end(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}

impl Arm for ControlSocketArm {
    fn arm(&mut self) -> Result<(), ArmError> {
        self.ask("on")
    }

    fn rearm(&mut self) -> Result<(), ArmError> {
        self.ask("again")
    }

    fn disarm(&mut self) -> Result<(), ArmError> {
        self.ask("off")
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Answers one request with `answer` and returns what was asked.
    fn serve(listener: &UnixListener, answer: &str) -> String {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 1024];
        let mut length = 0;
        while !request[..length].ends_with(b"}") {
            length += stream.read(&mut request[length..]).unwrap();
        }
        stream.write_all(answer.as_bytes()).unwrap();
        String::from_utf8_lossy(&request[..length]).into_owned()
    }

    #[test]
    fn the_answers_code_decides() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let mut arm = ControlSocketArm::new(path);
        std::thread::scope(|scope| {
            let server = scope.spawn(|| {
                let first = serve(&listener, "HTTP/1.1 200 OK\r\n\r\n{}");
                serve(&listener, "HTTP/1.1 409 Conflict\r\n\r\na migration uses the log");
                serve(&listener, "rubbish");
                first
            });
            arm.arm().unwrap();
            assert_eq!(arm.rearm().unwrap_err().reason, "a migration uses the log");
            assert!(arm.disarm().is_err());
            let first = server.join().unwrap();
            assert!(first.starts_with("POST /v1/dirty-log HTTP/1.1\r\n") && first.ends_with("{\"state\":\"on\"}"));
        });
    }
}
