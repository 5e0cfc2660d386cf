//! Linux as a guest: kernels that `cargo xtask test-vm` has prepared, with `dunlin-linux-guest` as process 1, and its answers.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
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

/// How often a guest is to be moved: 20 times, or as `DUNLIN_MOVES` says. Each move takes seconds in an emulated machine, so `cargo xtask test` asks for fewer.
///
/// # Panics
/// That is no number.
pub fn moves() -> u32 {
    std::env::var("DUNLIN_MOVES").map_or(20, |number| number.parse().unwrap())
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
    /// Asks the guest's time service several times over one connection; the answer that came fastest is the best.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn measure(from: &Netns, guest: IpAddr, looks: u32) -> Result<Self> {
        from.enter(|| Self::ask(&mut Self::connect(guest)?, looks))
    }

    /// Sets the guest's clock to the host's, as a time service in a guest does.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn correct(from: &Netns, guest: IpAddr, looks: u32) -> Result<Self> {
        from.enter(|| {
            let mut service = Self::connect(guest)?;
            let found = Self::ask(&mut service, looks)?;
            Self::look(&mut service, &format!("set {}", -found.ahead_ns))?;
            Self::ask(&mut service, looks)
        })
    }

    fn connect(guest: IpAddr) -> Result<BufReader<TcpStream>> {
        let stream =
            TcpStream::connect_timeout(&SocketAddr::new(guest, 37), LIMIT).context("the guest's time service")?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(BufReader::new(stream))
    }

    fn ask(service: &mut BufReader<TcpStream>, looks: u32) -> Result<Self> {
        let all = (0..looks.max(1)).map(|_| Self::look(service, "now")).collect::<Result<Vec<_>>>()?;
        all.into_iter().min_by_key(|look| look.uncertain_ns).context("no look")
    }

    fn look(service: &mut BufReader<TcpStream>, question: &str) -> Result<Self> {
        let mut line = String::new();
        let (before, began) = (SystemTime::now().duration_since(UNIX_EPOCH)?, Instant::now());
        service.get_mut().write_all(format!("{question}\n").as_bytes())?;
        service.read_line(&mut line).context("the guest's time service")?;
        let took = began.elapsed();
        let guest_ns: i64 = line.trim().parse().with_context(|| format!("time `{line}`"))?;
        let middle_ns = (before + took / 2).as_nanos() as i64;
        Ok(Self { ahead_ns: guest_ns - middle_ns, uncertain_ns: took.as_nanos() as u64 / 2 })
    }
}

impl std::fmt::Display for ClockOffset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:+.3} ms (± {:.3} ms)", self.ahead_ns as f64 / 1e6, self.uncertain_ns as f64 / 1e6)
    }
}
