//! QEMU's monitor (QMP), as tests speak to it: orders and their answers.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::wait::wait_for;

/// How long it may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// A connection to the monitor of a QEMU process.
#[derive(Debug)]
pub struct Monitor {
    connection: BufReader<UnixStream>,
    errors: PathBuf,
}

impl Monitor {
    /// Waits for the monitor at `socket`, and greets it. `errors` is where QEMU's words on standard error go.
    ///
    /// # Errors
    /// QEMU does not answer; with its words.
    pub fn connect(socket: &Path, errors: PathBuf) -> Result<Self> {
        let connection = wait_for("QEMU's monitor", ANSWER_LIMIT, || UnixStream::connect(socket).ok())
            .with_context(|| fs::read_to_string(&errors).unwrap_or_default())?;
        connection.set_read_timeout(Some(ANSWER_LIMIT))?;
        let mut monitor = Self { connection: BufReader::new(connection), errors };
        monitor.line().context("QEMU's greeting")?;
        monitor.order("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Gives an order; what it returned.
    ///
    /// # Errors
    /// QEMU refused, or has ended.
    pub fn order(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let text = json!({ "execute": name, "arguments": arguments }).to_string() + "\n";
        self.connection.get_mut().write_all(text.as_bytes())?;
        loop {
            // Events come between.
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
        ensure!(
            self.connection.read_line(&mut line)? > 0,
            "QEMU closed its monitor: {}",
            fs::read_to_string(&self.errors).unwrap_or_default()
        );
        Ok(serde_json::from_str(&line)?)
    }

    /// The kernel's numbers of QEMU's vCPU threads, in order.
    ///
    /// # Errors
    /// QEMU does not tell.
    pub fn vcpu_threads(&mut self) -> Result<Vec<u32>> {
        let cpus = self.order("query-cpus-fast", json!({}))?;
        let cpus = cpus.as_array().context("no list of vCPUs")?;
        cpus.iter().map(|cpu| cpu["thread-id"].as_u64().map(|id| id as u32).context("no thread-id")).collect()
    }
}
