//! Linux as a guest: kernels that `cargo xtask test-vm` has prepared, with `dunlin-linux-guest` as process 1, and its answers.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::client::http_get;
use crate::netns::Netns;

/// Where the bed says which guests there are.
const VARIABLE: &str = "DUNLIN_LINUX_GUESTS";
/// How long an answer may take in software.
const LIMIT: Duration = Duration::from_secs(60);

/// A kernel with an initramfs.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct LinuxGuest {
    /// How it is called.
    pub label: String,
    /// The bzImage.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

impl LinuxGuest {
    /// All that were prepared.
    ///
    /// # Errors
    /// None: this is not the bed.
    pub fn all() -> Result<Vec<Self>> {
        let text = std::env::var(VARIABLE)
            .with_context(|| format!("{VARIABLE} is not set: `cargo xtask test-vm` sets it and runs these tests"))?;
        let guests: Vec<Self> = serde_json::from_str(&text).with_context(|| format!("{VARIABLE}={text}"))?;
        ensure!(!guests.is_empty(), "{VARIABLE} names no guest");
        Ok(guests)
    }

    /// What every such guest is told. `noxsave`: QEMU's software emulation (7.2) does not intercept XSETBV for a nested hypervisor, so
    /// that KVM, whoever uses it, does not know what the guest has switched on, and Linux warns of an inconsistent XSAVE.
    pub fn cmdline(&self) -> &'static str {
        "console=ttyS0 quiet panic=-1 pci=off noxsave"
    }

    /// The options of `dunlin vm run` for it.
    pub fn arguments(&self) -> Vec<String> {
        let path = |path: &PathBuf| path.display().to_string();
        vec!["--kernel".into(), path(&self.kernel), "--initrd".into(), path(&self.initrd)]
    }
}

/// Asks a guest's web service from inside a namespace.
///
/// # Errors
/// It does not answer, or says that it failed.
pub fn ask(from: &Netns, guest: IpAddr, path: &str) -> Result<Value> {
    let text = from.enter(|| http_get(SocketAddr::new(guest, 80), path, LIMIT))?;
    serde_json::from_str(&text).with_context(|| format!("{path}: {text}"))
}

/// The sum of `name` over the guest's writers.
pub fn writers(state: &Value, name: &str) -> u64 {
    state["writers"].as_array().map_or(0, |writers| writers.iter().filter_map(|writer| writer[name].as_u64()).sum())
}

/// How far a guest's real-time clock is ahead of this host's, and by how much that may be wrong: half the time that the question took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockOffset {
    /// Ahead of the host's; negative: behind.
    pub ahead_ns: i64,
    /// Up or down.
    pub uncertain_ns: u64,
}

impl ClockOffset {
    /// The best of several looks: the one that took the shortest time.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn measure(from: &Netns, guest: IpAddr, looks: u32) -> Result<Self> {
        let mut best: Option<Self> = None;
        for _ in 0..looks {
            // Only from the request to the answer: the connection's set-up is not part of the question, but cannot be left out with
            // one connection a request; its time counts as uncertainty.
            let (before, began) = (SystemTime::now().duration_since(UNIX_EPOCH)?, Instant::now());
            let answer = ask(from, guest, "/time")?;
            let took = began.elapsed();
            let guest_ns = answer["realtime_ns"].as_u64().context("no realtime_ns")? as i64;
            let middle_ns = (before + took / 2).as_nanos() as i64;
            let look = Self { ahead_ns: guest_ns - middle_ns, uncertain_ns: took.as_nanos() as u64 / 2 };
            if best.is_none_or(|best| look.uncertain_ns < best.uncertain_ns) {
                best = Some(look);
            }
        }
        best.context("no look")
    }

    /// The least distance from the host's clock that the measurement allows.
    pub fn at_least_ns(&self) -> u64 {
        self.ahead_ns.unsigned_abs().saturating_sub(self.uncertain_ns)
    }
}
