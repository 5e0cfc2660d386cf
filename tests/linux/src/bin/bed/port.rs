//! The way out for messages: a virtio port, a line of JSON each.

use std::fs::{self, File};
use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use dunlin_linux::protocol::{Message, PORT};

/// A thousand times what a message takes to the host.
const DRAIN: Duration = Duration::from_secs(1);

/// The open port. Lines are whole: several threads may speak.
#[derive(Debug)]
pub(crate) struct Port(Mutex<File>);

impl Port {
    /// Finds the port by its name.
    pub(crate) fn open() -> Result<Self> {
        let ports = fs::read_dir("/sys/class/virtio-ports").context("no virtio ports (virtio_console missing?)")?;
        for port in ports.flatten() {
            if fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim() == PORT) {
                let device = std::path::Path::new("/dev").join(port.file_name());
                let file =
                    File::options().write(true).open(&device).with_context(|| format!("open {}", device.display()))?;
                return Ok(Self(Mutex::new(file)));
            }
        }
        anyhow::bail!("no virtio port is called {PORT}")
    }

    /// Sends a message. One that cannot be sent is missing at the other end, which then knows that the run is none.
    pub(crate) fn say(&self, message: &Message) {
        let mut line = serde_json::to_vec(message).unwrap_or_default();
        line.push(b'\n');
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = file.write_all(&line) {
            eprintln!("bed: a message is lost: {error}");
        }
    }
}

/// Gives the host time to take what was said last. There is nothing to wait for: the kernel takes what is written to such a port without waiting
/// for the host, and tells nobody when it has gone (`port_fops_write`, drivers/char/virtio_console.c).
pub(crate) fn drain() {
    std::thread::sleep(DRAIN);
}
