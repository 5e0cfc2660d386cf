//! QEMU's machine protocol over a Unix socket, as far as a migration needs it. Events are skipped: states are asked for.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::interrupt;
use crate::process::OwnChild;

/// How long QEMU may take to start, and to answer.
const LIMIT: Duration = Duration::from_secs(10);

/// A connection to a monitor.
#[derive(Debug)]
pub(crate) struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects as soon as `qemu` listens at `socket`.
    pub(crate) fn connect(socket: &Path, qemu: &mut OwnChild) -> Result<Self> {
        let stream = interrupt::wait_for(LIMIT, "QEMU's monitor", || {
            qemu.check_alive()?;
            Ok(UnixStream::connect(socket).ok())
        })?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        let mut qmp = Self { reader: BufReader::new(stream) };
        qmp.line().context("QEMU's greeting")?;
        qmp.order("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Gives an order and returns what it returned.
    pub(crate) fn order(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let mut text = json!({ "execute": name, "arguments": arguments }).to_string();
        text.push('\n');
        self.reader.get_mut().write_all(text.as_bytes()).with_context(|| format!("sending {name} to QEMU"))?;
        loop {
            let mut answer = self.line().with_context(|| format!("QEMU's answer to {name}"))?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refused {name}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("QEMU closed its monitor");
        }
        Ok(serde_json::from_str(&line)?)
    }
}
