//! One VM on the LAN of [`crate::topology`], and its moves from host to host by the real `dunlin`.
//!
//! Owns every process and folder that it makes: dropping it ends them, also in the middle of a move. Each move starts a
//! new `dunlin vm receive` in the other host's namespace. Must not judge: it measures, tests and the demo decide.

mod hop;
mod spec;

use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use dunlin::model::MacAddress;
use dunlin::service::control::give_order;
use dunlin::service::registry::Registry;
use rustix::process::{Pid, Signal, kill_process};
use serde::de::DeserializeOwned;
use tempfile::TempDir;

use crate::client::{Heartbeats, counters, http_get, monotonic_ns};
use crate::netns::{self, Netns};
use crate::topology::TAP;
use crate::{Host, Lan, LanConfig, OwnProcess, dunlin, guest, interrupt};

pub use hop::{Hop, HopOptions, Receiver};
pub use spec::VmSpec;

/// The VM's name at both hosts.
pub const VM_NAME: &str = "wader";
/// The VM's Ethernet address.
pub const MAC: &str = "02:00:00:00:00:64";
/// How long a guest may take from its start to its READY line; Linux takes 10 s in software.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// How long an answer over the network may take, with a guest that shares its CPUs.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// How long a process may take to end that has nothing left to do.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Which host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The first.
    A,
    /// The second.
    B,
}

impl Side {
    /// The other one.
    pub const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    const fn index(self) -> usize {
        match self {
            Self::A => 0,
            Self::B => 1,
        }
    }
}

/// A VM that runs on one of two hosts.
#[derive(Debug)]
pub struct Rig {
    /// Ends when the machine does: `dunlin vm run`, or the `dunlin vm receive` that waits for its machine.
    machine: Option<OwnProcess>,
    at: Side,
    hosts: [Option<Host>; 2],
    /// The switch between the hosts.
    pub switch: Netns,
    /// The client.
    pub client: Netns,
    folder: TempDir,
    disk: Option<PathBuf>,
    hops: u32,
    /// Further options of `dunlin vm receive`.
    pub receive_more: Vec<String>,
    /// How often the guest has restarted by itself on the host that it is on.
    boots: usize,
    ready: String,
}

impl Rig {
    /// Builds the LAN and boots the VM on host A; returns when the guest has said READY.
    ///
    /// # Errors
    /// What could not be made; nothing stays behind.
    pub fn boot(spec: &VmSpec) -> Result<Self> {
        Self::boot_on(Lan::new(LanConfig::default())?, spec)
    }

    /// The same on a LAN that was built before.
    ///
    /// # Errors
    /// What could not be made; nothing stays behind.
    pub fn boot_on(lan: Lan, spec: &VmSpec) -> Result<Self> {
        let Lan { host_a, host_b, switch, client } = lan;
        let folder = netns::own_folder()?;
        let disk = spec.disk_bytes.map(|length| -> Result<PathBuf> {
            let path = folder.path().join("disk.img");
            File::create_new(&path)?.set_len(length)?;
            if spec.linux.is_some() {
                let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&path).output().context("mkfs.ext4")?;
                ensure!(made.status.success(), "mkfs.ext4: {}", String::from_utf8_lossy(&made.stderr));
            }
            Ok(path)
        });
        let disk = disk.transpose().context("make the disk")?;
        let hosts = [Some(host_a), Some(host_b)];
        let mut rig = Self {
            machine: None,
            at: Side::A,
            hosts,
            switch,
            client,
            folder,
            disk,
            hops: 0,
            receive_more: Vec::new(),
            boots: 0,
            ready: String::new(),
        };
        for side in [Side::A, Side::B] {
            fs::create_dir_all(rig.run_dir(side))?;
            fs::create_dir_all(rig.state_dir(side))?;
        }
        let mut command = dunlin();
        command.args(["vm", "run", "--name", VM_NAME]).args(spec.arguments()?).args(rig.device_arguments(&spec.net));
        rig.add_places(&mut command, Side::A);
        rig.machine = Some(rig.start(Side::A, &mut command, "run")?);
        rig.ready = rig.wait_ready()?;
        Ok(rig)
    }

    /// The host that the VM is on.
    pub fn at(&self) -> Side {
        self.at
    }

    /// A host.
    ///
    /// # Panics
    /// It has been deleted.
    pub fn host(&self, side: Side) -> &Host {
        self.hosts[side.index()].as_ref().expect("the host is there")
    }

    /// The guest's READY line.
    pub fn ready(&self) -> &str {
        &self.ready
    }

    /// The frequency of the guest's time stamp counter.
    pub fn tsc_hz(&self) -> u64 {
        guest::field(&self.ready, "tsc_hz").and_then(|hz| hz.parse().ok()).unwrap_or(0)
    }

    /// The guest's address.
    pub fn guest_ip() -> IpAddr {
        Lan::GUEST_IPS[0]
    }

    /// The guest's IPv6 address; Linux has none.
    pub fn guest_ip6() -> IpAddr {
        Lan::GUEST_IPS[1]
    }

    /// The guest's echo service.
    pub fn echo_address() -> SocketAddr {
        SocketAddr::new(Self::guest_ip(), 7)
    }

    /// The guest's source of bytes.
    pub fn bulk_address() -> SocketAddr {
        SocketAddr::new(Self::guest_ip6(), 19)
    }

    /// The guest's Ethernet address.
    ///
    /// # Panics
    /// Never: it is a constant.
    pub fn mac() -> MacAddress {
        MAC.parse().expect("an Ethernet address")
    }

    /// Asks the guest's HTTP server, from the client.
    ///
    /// # Errors
    /// It does not answer.
    pub fn get(&self, path: &str) -> Result<String> {
        interrupt::check()?;
        let server = SocketAddr::new(Self::guest_ip(), 80);
        self.client.enter(|| http_get(server, path, ANSWER_LIMIT))
    }

    /// The guest's counters.
    ///
    /// # Errors
    /// It does not answer.
    pub fn counters(&self) -> Result<serde_json::Value> {
        interrupt::check()?;
        let server = SocketAddr::new(Self::guest_ip(), 80);
        self.client.enter(|| counters(server, ANSWER_LIMIT))
    }

    /// Has the guest check every page of its working sets; returns how many it checked.
    ///
    /// # Errors
    /// A page is not what was last written there, or the guest does not answer.
    pub fn verify_inside(&self) -> Result<u64> {
        let text = self.get("/verify")?;
        let answer: serde_json::Value = serde_json::from_str(&text)?;
        ensure!(answer["ok"] == true && answer["page_mismatches"] == 0, "the guest found wrong pages: {text}");
        answer["pages_checked"].as_u64().filter(|&pages| pages > 0).with_context(|| format!("no pages in {text}"))
    }

    /// A `dunlin` command with the folders of the host that the VM is on; run it in that host's namespace.
    pub fn dunlin_here(&self, arguments: &[&str]) -> Command {
        let mut command = dunlin();
        command.args(arguments).arg("--run-dir").arg(self.run_dir(self.at));
        command
    }

    /// Has the VM stand where it is for `time`; from the order to stand to the answer that it goes on, by `CLOCK_MONOTONIC`.
    ///
    /// # Errors
    /// It refuses.
    pub fn stand(&self, time: Duration) -> Result<RangeInclusive<u64>> {
        let socket = Registry::new(self.run_dir(self.at)).socket(&VM_NAME.parse()?, "control");
        let began = monotonic_ns();
        give_order(&socket, "/v1/pause", &[])?;
        thread::sleep(time);
        give_order(&socket, "/v1/resume", &[])?;
        Ok(began..=monotonic_ns())
    }

    /// What `dunlin vm info` says of the VM.
    ///
    /// # Errors
    /// It says nothing.
    pub fn info(&self) -> Result<serde_json::Value> {
        let output = self.host(self.at).netns.output(&mut self.dunlin_here(&["vm", "info", VM_NAME, "--json"]))?;
        serde_json::from_slice(&output.stdout).with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// The heartbeats of all consoles so far, in the order of the hosts that the guest was on. A line that a move cut goes
    /// on at the next host, so the consoles are read as one.
    ///
    /// # Errors
    /// A console cannot be read.
    pub fn heartbeats(&self) -> Result<Heartbeats> {
        let mut beats = Heartbeats::default();
        let mut all = Vec::new();
        for hop in 0..=self.hops {
            all.extend(fs::read(self.console(hop))?);
        }
        beats.read_all(&all[..])?;
        Ok(beats)
    }

    /// The time stamps' step between the last heartbeat before the last move and the first one after it.
    ///
    /// # Errors
    /// A console cannot be read.
    pub fn heartbeat_gap_of_last_hop_ns(&self) -> Result<u64> {
        let mut before = fs::read(self.console(self.hops.saturating_sub(1)))?;
        let whole = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        let mut after = before.split_off(whole);
        after.extend(fs::read(self.console(self.hops))?);
        let mut beats = Heartbeats::default();
        beats.read_all(&before[..])?;
        beats.restart_measurement();
        let after = String::from_utf8_lossy(&after);
        let first = after.lines().find(|line| line.starts_with("HB ")).context("no heartbeat after the move")?;
        beats.line(first);
        Ok(beats.report().largest_gap(self.tsc_hz()).as_nanos() as u64)
    }

    /// The guest's console on the host that it came to with move number `hop` (0: where it booted).
    pub fn console(&self, hop: u32) -> PathBuf {
        self.folder.path().join(format!("console-{hop}.log"))
    }

    /// Deletes the namespace of the host that the VM is *not* on, with its cables.
    ///
    /// # Errors
    /// It still has processes inside.
    pub fn delete_other_host(&mut self) -> Result<()> {
        let side = self.at.other();
        let Some(host) = self.hosts[side.index()].take() else { return Ok(()) };
        let inside = host.netns.inmates()?;
        let name = host.netns.name().to_owned();
        drop(host);
        ensure!(inside.is_empty(), "processes {inside:?} still ran in {name}");
        ensure!(!fs::exists(format!("/run/netns/{name}"))?, "the namespace {name} is still there");
        Ok(())
    }

    /// Ends the VM by `dunlin vm stop` and returns how its process ended.
    ///
    /// # Errors
    /// It does not end.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        let mut command = self.dunlin_here(&["vm", "stop", VM_NAME]);
        let output = self.host(self.at).netns.output(&mut command)?;
        ensure!(output.status.success(), "dunlin vm stop: {}", String::from_utf8_lossy(&output.stderr));
        let mut machine = self.machine.take().context("no machine runs")?;
        self.wait_end(&mut machine)
    }

    fn wait_end(&self, process: &mut OwnProcess) -> Result<ExitStatus> {
        match process.wait_for(END_LIMIT)? {
            Some(status) => Ok(status),
            None => bail!("process {} had not ended after {END_LIMIT:?}{}", process.id(), self.words()),
        }
    }

    /// The run folder of one host.
    pub fn run_dir(&self, side: Side) -> PathBuf {
        self.folder.path().join(format!("run-{side:?}"))
    }

    /// The state folder of one host.
    pub fn state_dir(&self, side: Side) -> PathBuf {
        self.folder.path().join(format!("state-{side:?}"))
    }

    fn add_places(&self, command: &mut Command, side: Side) {
        command.arg("--run-dir").arg(self.run_dir(side)).arg("--state-dir").arg(self.state_dir(side));
        command.arg("--serial").arg(format!("file={}", self.console(self.hops).display()));
    }

    /// `net` is what more is said of the port.
    fn device_arguments(&self, net: &str) -> Vec<String> {
        let port = format!("tap={TAP},mac={MAC},ip={},ip={}{net}", Self::guest_ip(), Self::guest_ip6());
        let mut arguments = vec!["--net".to_owned(), port];
        if let Some(disk) = &self.disk {
            arguments.extend(["--disk".to_owned(), format!("path={}", disk.display())]);
        }
        arguments
    }

    /// Starts a command in a host's namespace with its output in files called after `label`.
    fn start(&self, side: Side, command: &mut Command, label: &str) -> Result<OwnProcess> {
        let file = |suffix: &str| File::create(self.output_file(label, suffix));
        command.stdin(Stdio::null()).stdout(file("out")?).stderr(file("err")?);
        self.host(side).netns.spawn(command)
    }

    fn output_file(&self, label: &str, suffix: &str) -> PathBuf {
        self.folder.path().join(format!("{label}.{suffix}"))
    }

    /// Waits for a whole line in the output of `label` that is an object of `schema`.
    fn wait_object<T: DeserializeOwned>(
        &self,
        process: &mut OwnProcess,
        label: &str,
        schema: &str,
        limit: Duration,
    ) -> Result<T> {
        let path = self.output_file(label, "out");
        let found = interrupt::wait(limit, || {
            let ended = process.wait_for(Duration::ZERO)?;
            let text = fs::read_to_string(&path)?;
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            for line in whole.lines() {
                let value: serde_json::Value =
                    serde_json::from_str(line).with_context(|| format!("{label}: `{line}`"))?;
                if value["schema"] == schema {
                    return Ok(Some(serde_json::from_value(value)?));
                }
            }
            if let Some(status) = ended {
                bail!("{label} ended ({status}) without {schema}{}", self.words());
            }
            Ok(None)
        })?;
        found.with_context(|| format!("{label}: no {schema} within {limit:?}{}", self.words()))
    }

    /// Waits for the guest's READY line once more, after a restart that it made itself.
    ///
    /// # Errors
    /// It does not come up, or the VM ends.
    pub fn wait_ready_again(&mut self) -> Result<()> {
        self.boots += 1;
        self.ready = self.wait_ready()?;
        Ok(())
    }

    /// Waits until the VM, whose guest was told to switch itself off, has ended.
    ///
    /// # Errors
    /// It does not end.
    pub fn wait_machine_end(&mut self) -> Result<ExitStatus> {
        let mut machine = self.machine.take().context("no machine runs")?;
        self.wait_end(&mut machine)
    }

    fn wait_ready(&mut self) -> Result<String> {
        let console = self.console(self.hops);
        let boots = self.boots;
        let mut machine = self.machine.take().context("no machine runs")?;
        let found = interrupt::wait(BOOT_LIMIT, || {
            let ended = machine.wait_for(Duration::ZERO)?;
            let bytes = fs::read(&console).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes);
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            if let Some(line) = whole.lines().filter(|line| line.starts_with("READY ")).nth(boots) {
                return Ok(Some(line.trim_end().to_owned()));
            }
            if let Some(status) = ended {
                bail!("the VM ended ({status}) before its guest was ready{}", self.words());
            }
            Ok(None)
        })?;
        let found = found.with_context(|| format!("no READY from the guest within {BOOT_LIMIT:?}{}", self.words()));
        self.machine = Some(machine);
        found
    }

    /// What all processes wrote to their standard error, and the end of the consoles: for messages of failure.
    pub fn words(&self) -> String {
        let mut text = String::new();
        let mut files: Vec<_> = fs::read_dir(self.folder.path()).into_iter().flatten().flatten().collect();
        files.sort_by_key(fs::DirEntry::file_name);
        for entry in files {
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_console = name.starts_with("console-");
            if !is_console && Path::new(&name).extension().is_none_or(|suffix| suffix != "err") {
                continue;
            }
            let bytes = fs::read(entry.path()).unwrap_or_default();
            let lines: Vec<String> = String::from_utf8_lossy(&bytes).lines().map(str::to_owned).collect();
            let lines: Vec<_> = lines.iter().filter(|line| !is_console || !line.starts_with("HB ")).collect();
            for line in lines.iter().skip(lines.len().saturating_sub(8)) {
                text += &format!("\n  {name}: {line}");
            }
        }
        text
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("rig:{}", self.words());
        }
        self.machine = None;
        // A machine that came by a move is no child of ours. Only we know these folders, so who is listed there is ours.
        for side in [Side::A, Side::B] {
            for entry in Registry::new(self.run_dir(side)).list() {
                if let Some(pid) = Pid::from_raw(entry.pid as i32) {
                    let _gone_already = kill_process(pid, Signal::KILL);
                }
                let _killed = interruptless_wait(|| !entry.is_alive());
            }
        }
    }
}

/// Waits for what a kill must bring about, signal or not.
fn interruptless_wait(mut done: impl FnMut() -> bool) -> bool {
    for _ in 0..500 {
        if done() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    false
}
