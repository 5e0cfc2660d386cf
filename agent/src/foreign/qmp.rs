//! QEMU's machine protocol over a Unix socket: JSON, one line a message.
//!
//! Owns one connection: its greeting, orders and their answers, with bounds on both time and bytes. Events are skipped. Must not know what is ordered. A monitor serves
//! one client at a time: a second one is greeted when the first has gone.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// No message is longer: the longest known one, the list of all commands, has 30 KiB.
const MOST_BYTES: usize = 1 << 20;

/// A monitor does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nobody is there.
    #[error("no monitor answers at {}: {cause}; give a socket of its own, as by `-qmp unix:PATH,server=on,wait=off`", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },
    /// The connection broke.
    #[error("the monitor's socket, at `{order}`: {cause}")]
    Io {
        /// What was ordered.
        order: String,
        /// What the kernel said.
        cause: io::Error,
    },
    /// It says nothing.
    #[error("the monitor has not answered `{order}` within {} ms: it may be busy, or have another client (give a socket of its own)", limit.as_millis())]
    Silent {
        /// What was ordered.
        order: String,
        /// For how long was waited.
        limit: Duration,
    },
    /// It refuses.
    #[error("the monitor refuses `{order}`: {why}")]
    Refused {
        /// What was ordered.
        order: String,
        /// Why, in its words.
        why: String,
    },
    /// It speaks something else.
    #[error("what answers `{order}` is no QEMU monitor: {what}")]
    Nonsense {
        /// What was ordered.
        order: String,
        /// What is wrong.
        what: &'static str,
    },
}

/// A message of a monitor.
#[derive(Debug, PartialEq)]
enum Message {
    Greeting,
    Return { id: Option<u64>, value: Value },
    Error { id: Option<u64>, why: String },
    Event,
}

impl Message {
    fn parse(line: &[u8]) -> Result<Self, &'static str> {
        let mut value: Value = serde_json::from_slice(line).map_err(|_| "a line is no JSON")?;
        let id = value.get("id").and_then(Value::as_u64);
        if value.get("QMP").is_some() {
            Ok(Self::Greeting)
        } else if value.get("event").is_some() {
            Ok(Self::Event)
        } else if let Some(error) = value.get("error") {
            let why = error.get("desc").and_then(Value::as_str).unwrap_or("it does not say why");
            Ok(Self::Error { id, why: why.to_owned() })
        } else if let Some(value) = value.get_mut("return") {
            Ok(Self::Return { id, value: value.take() })
        } else {
            Err("a line is neither greeting, answer nor event")
        }
    }
}

/// Bytes cut into lines.
#[derive(Debug, Default)]
struct Lines {
    unread: Vec<u8>,
}

impl Lines {
    /// The next line without its end; none: more bytes are needed.
    fn next(&mut self) -> Result<Option<Vec<u8>>, &'static str> {
        match self.unread.iter().position(|&byte| byte == b'\n') {
            Some(end) => {
                let rest = self.unread.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.unread, rest);
                line.pop();
                Ok(Some(line))
            }
            None if self.unread.len() > MOST_BYTES => Err("a line has no end"),
            None => Ok(None),
        }
    }
}

/// A connection to a monitor, ready for orders.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    lines: Lines,
    next_id: u64,
}

impl Qmp {
    /// Connects, and is greeted within `limit`.
    ///
    /// # Errors
    /// Nobody is there, or it has another client.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(path).map_err(|cause| QmpError::Connect { path: path.to_owned(), cause })?;
        let mut qmp = Self { stream, lines: Lines::default(), next_id: 0 };
        let until = Instant::now() + limit;
        match qmp.message("greeting", limit, until)? {
            Message::Greeting => {}
            _ => return Err(QmpError::Nonsense { order: "greeting".to_owned(), what: "it does not greet" }),
        }
        qmp.order("qmp_capabilities", &json!({}), limit)?;
        Ok(qmp)
    }

    /// Gives an order; what it returned. Behind a time-out the connection can be used on: late answers are known by their numbers.
    ///
    /// # Errors
    /// It refuses, or does not answer within `limit`.
    pub fn order(&mut self, name: &str, arguments: &Value, limit: Duration) -> Result<Value, QmpError> {
        let until = Instant::now() + limit;
        self.next_id += 1;
        let own = Some(self.next_id);
        let failed = |cause| QmpError::Io { order: name.to_owned(), cause };
        let text = json!({ "execute": name, "arguments": arguments, "id": own }).to_string() + "\n";
        self.stream.set_write_timeout(Some(limit)).map_err(failed)?;
        self.stream.write_all(text.as_bytes()).map_err(failed)?;
        loop {
            match self.message(name, limit, until)? {
                Message::Return { id, value } if id == own => return Ok(value),
                Message::Error { id, why } if id == own || id.is_none() => {
                    return Err(QmpError::Refused { order: name.to_owned(), why });
                }
                _ => {}
            }
        }
    }

    fn message(&mut self, order: &str, limit: Duration, until: Instant) -> Result<Message, QmpError> {
        let nonsense = |what| QmpError::Nonsense { order: order.to_owned(), what };
        let failed = |cause| QmpError::Io { order: order.to_owned(), cause };
        loop {
            if let Some(line) = self.lines.next().map_err(nonsense)? {
                return Message::parse(&line).map_err(nonsense);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(QmpError::Silent { order: order.to_owned(), limit });
            }
            self.stream.set_read_timeout(Some(left)).map_err(failed)?;
            let mut part = [0; 4096];
            match self.stream.read(&mut part) {
                Ok(0) => return Err(failed(io::Error::new(io::ErrorKind::UnexpectedEof, "it was closed"))),
                Ok(count) => self.lines.unread.extend_from_slice(&part[..count]),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted => {}
                    _ => return Err(failed(error)),
                },
            }
        }
    }
}

/// Takes any bytes as what a monitor says.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz(input: &[u8]) {
    let mut lines = Lines::default();
    for part in input.chunks(11) {
        lines.unread.extend_from_slice(part);
        while let Ok(Some(line)) = lines.next() {
            assert!(!line.contains(&b'\n'));
            if let Ok(Message::Return { value, .. }) = Message::parse(&line) {
                let _ = value.to_string();
            }
        }
    }
    assert!(!lines.unread.contains(&b'\n'), "a whole line was left");
}

/// A talk.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz_seeds() -> Vec<Vec<u8>> {
    let lines = br#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}
{"return": {}, "id": 1}
{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}
{"id": 2, "error": {"class": "GenericError", "desc": "dirty ring is not enabled"}}
"#;
    vec![lines.to_vec()]
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    /// A monitor that says these lines, each behind an order.
    fn monitor(says: &'static [&'static str]) -> (tempfile::TempDir, PathBuf, std::thread::JoinHandle<Vec<String>>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let serving = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut orders = BufReader::new(stream.try_clone().unwrap()).lines();
            let mut heard = Vec::new();
            stream.write_all(b"{\"QMP\": {}}\n").unwrap();
            for line in says {
                heard.push(orders.next().unwrap().unwrap());
                stream.write_all(line.as_bytes()).unwrap();
            }
            // Until the client has gone.
            heard.extend(orders.map_while(Result::ok));
            heard
        });
        (folder, path, serving)
    }

    #[test]
    fn orders_are_answered_events_are_skipped_and_a_late_answer_is_no_answer_to_the_next_order() {
        let (_folder, path, serving) = monitor(&[
            "{\"return\": {}, \"id\": 1}\n",
            "{\"event\": \"STOP\"}\n{\"return\": {\"running\": true}, \"id\": 2}\n",
            "{\"id\": 3, \"error\": {\"class\": \"GenericError\", \"desc\": \"no dirty ring\"}}\n",
            "",
            "{\"return\": 4, \"id\": 4}\n{\"return\": 5, \"id\": 5}\n",
            "nonsense\n",
        ]);
        let mut qmp = Qmp::connect(&path, LIMIT).unwrap();
        assert_eq!(qmp.order("query-status", &json!({}), LIMIT).unwrap()["running"], true);
        let refused = qmp.order("set-vcpu-dirty-limit", &json!({ "dirty-rate": 1 }), LIMIT).unwrap_err().to_string();
        assert_eq!(refused, "the monitor refuses `set-vcpu-dirty-limit`: no dirty ring");
        let silent = qmp.order("late", &json!({}), Duration::from_millis(20)).unwrap_err().to_string();
        assert!(silent.contains("within 20 ms"), "{silent}");
        assert_eq!(qmp.order("next", &json!({}), LIMIT).unwrap(), 5);
        let nonsense = qmp.order("more", &json!({}), LIMIT).unwrap_err().to_string();
        assert!(nonsense.contains("no QEMU monitor"), "{nonsense}");
        drop(qmp);
        let heard = serving.join().unwrap();
        assert!(heard[2].contains("\"dirty-rate\":1") && heard.len() == 6, "{heard:?}");
    }

    #[test]
    fn nobody_there_one_that_ends_and_one_that_never_stops_talking_are_errors() {
        let nobody = Qmp::connect(Path::new("/nowhere/qmp"), LIMIT).unwrap_err().to_string();
        assert!(nobody.contains("-qmp unix:PATH"), "{nobody}");
        let (near, far) = UnixStream::pair().unwrap();
        let mut qmp = Qmp { stream: near, lines: Lines::default(), next_id: 0 };
        drop(far);
        assert!(qmp.order("x", &json!({}), LIMIT).is_err());
        let mut endless = Lines { unread: vec![b'x'; MOST_BYTES + 1] };
        assert_eq!(endless.next(), Err("a line has no end"));
    }
}
