//! The test guest under load, the same under every VMM: its command line, and what its serial console says.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::interrupt;
use crate::process::OwnChild;

/// Guest RAM.
pub(super) const MEMORY_MIB: u64 = 512;
/// vCPUs: 0 beats on the console, 1 writes memory.
pub(super) const CPUS: u32 = 2;
/// Time between two heartbeats.
pub(super) const HEARTBEAT_MS: f64 = 1.0;
/// The writer's working set, filled with random data.
pub(super) const WORKING_SET_MIB: u64 = 256;
/// How long booting and filling may take.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// How the writer writes, for the command line: pages per second or `max`, then what else is not as usual.
pub(super) type Rate = &'static str;

/// What a guest does.
#[derive(Clone, Debug)]
pub(super) struct Load {
    /// Its vCPUs.
    pub(super) cpus: u32,
    /// Its RAM.
    pub(super) memory_mib: u64,
    /// Its command line.
    pub(super) cmdline: String,
}

impl Load {
    /// One that beats, and whose working set of `mebibytes` is filled and written as `workload` says.
    pub(super) fn filled(mebibytes: u64, workload: &str) -> Self {
        let cmdline = format!(
            "dunlin.cpus={CPUS} dunlin.heartbeat=1ms dunlin.wl0=ws:64K,rate:0 dunlin.wl1=ws:{mebibytes}M,{workload}"
        );
        Self { cpus: CPUS, memory_mib: MEMORY_MIB, cmdline }
    }

    /// The same with so much RAM, whose guest says ten times a second what it has written.
    pub(super) fn telling_often(rate: Rate, memory_mib: u64) -> Self {
        let Self { cpus, cmdline, .. } = Self::beating(rate);
        Self { cpus, memory_mib, cmdline: format!("{cmdline} dunlin.stat=100ms") }
    }

    /// One that beats, and writes at `rate`.
    pub(super) fn beating(rate: Rate) -> Self {
        Self::filled(WORKING_SET_MIB, &format!("rate:{rate},fill:random"))
    }

    /// One of a single vCPU that writes at `rate` in the order of `pattern`, and tells its own truth of windows of `window_ms`. It writes
    /// in small batches and says nothing else, so that windows hold whole batches and no console.
    pub(super) fn telling(pattern: &str, rate: Rate, window_ms: u64) -> Self {
        let cmdline = format!(
            "dunlin.cpus=1 dunlin.heartbeat=0 dunlin.stat=0 dunlin.slice=200us dunlin.window={window_ms}ms \
             dunlin.wl0=ws:{WORKING_SET_MIB}M,rate:{rate},pattern:{pattern},fill:random"
        );
        Self { cpus: 1, memory_mib: MEMORY_MIB, cmdline }
    }
}

/// A serial console that is written to a file.
#[derive(Clone, Debug)]
pub(super) struct Console(pub(super) PathBuf);

impl Console {
    /// Its bytes so far; none if there is no file yet.
    pub(super) fn bytes(&self) -> Vec<u8> {
        fs::read(&self.0).unwrap_or_default()
    }

    /// Its length so far.
    pub(super) fn len(&self) -> usize {
        fs::metadata(&self.0).map_or(0, |meta| meta.len() as usize)
    }

    /// Waits until the guest runs its load, and returns the frequency of its time stamp counter.
    pub(super) fn wait_ready(&self, vmm: &mut OwnChild) -> Result<u64> {
        interrupt::wait_for(READY_LIMIT, "the guest's READY line", || {
            vmm.check_alive()?;
            Ok(field(&self.bytes(), "READY ", "tsc_hz=").last().copied())
        })
    }
}

/// Where the guest stood at a STAT line.
#[derive(Clone, Copy, Debug)]
struct Stat {
    uptime_ns: u64,
    pages_written: u64,
}

fn stats(bytes: &[u8]) -> Vec<Stat> {
    let uptime = field(bytes, "STAT ", "uptime_ns=");
    let written = field(bytes, "STAT ", "pages_written=");
    uptime.iter().zip(&written).map(|(&uptime_ns, &pages_written)| Stat { uptime_ns, pages_written }).collect()
}

fn rate(first: &Stat, last: &Stat) -> Option<f64> {
    let elapsed_ns = last.uptime_ns.checked_sub(first.uptime_ns).filter(|&ns| ns > 0)?;
    Some(last.pages_written.checked_sub(first.pages_written)? as f64 * 1e9 / elapsed_ns as f64)
}

/// Pages written per second, between the first and the last STAT line within `bytes`.
pub(super) fn pages_per_second(bytes: &[u8]) -> Option<f64> {
    let stats = stats(bytes);
    rate(stats.first()?, stats.last()?)
}

/// Pages written per second over a span of a console that reaches from the last STAT line before `from` to the first one behind `to`.
pub(super) fn pages_per_second_around(bytes: &[u8], from: usize, to: usize) -> Option<f64> {
    let before = stats(bytes.get(..from)?);
    let behind = stats(bytes).into_iter().nth(stats(bytes.get(..to)?).len());
    rate(before.last()?, &behind?)
}

/// How many page mismatches the guest has found.
pub(super) fn mismatches(bytes: &[u8]) -> Option<u64> {
    field(bytes, "STAT ", "page_mismatches=").last().copied()
}

/// A number in every whole line that begins with `line`.
fn field(bytes: &[u8], line: &str, name: &str) -> Vec<u64> {
    let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    let text = String::from_utf8_lossy(&bytes[..whole]);
    let lines = text.lines().filter(|text| text.starts_with(line));
    lines.filter_map(|text| text.split(' ').find_map(|word| word.strip_prefix(name)?.parse().ok())).collect()
}

/// The guest's ELF, once built.
pub(super) fn kernel(root: &Path) -> Result<PathBuf> {
    let path = root.join("tests/guest/target/release/dunlin-guest");
    fs::metadata(&path).with_context(|| format!("{} was not built", path.display()))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_and_a_cut_one_is_left_out() {
        let text = b"READY version=1 tsc_hz=2000 net=0\nSTAT uptime_ns=1000000000 pages_written=5 page_mismatches=0 x=1\n\
                     HB 1 2\nSTAT uptime_ns=3000000000 pages_written=25 page_mismatches=0\nSTAT uptime_ns=4000000000 pages_wr";
        assert_eq!(field(text, "READY ", "tsc_hz="), [2000]);
        assert_eq!(pages_per_second(text), Some(10.0));
        let first = text.windows(3).position(|part| part == b"HB ").unwrap();
        assert_eq!(pages_per_second_around(text, first, first + 1), Some(10.0));
        assert_eq!(pages_per_second_around(text, first, text.len()), None, "nothing was said since");
        assert_eq!(mismatches(text), Some(0));
    }
}
