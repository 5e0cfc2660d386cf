//! A VM that is not ours: QEMU on KVM with Linux in it, as operators run it. For the suites of everything that is done to foreign VMs.
//!
//! Owns the process, its monitor and its console. Needs a KVM that runs Linux: the bed (`cargo xtask test-vm`).
//!
//! The guest is `dunlin-linux-guest` with no network: it tells its state on the console each second, from which [`ForeignVm::state`] reads what
//! the guest itself knows of its writers (pid, pages written). Extend it with further options of QEMU by [`ForeignVm::boot_with`].

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use tempfile::TempDir;

use crate::linux::LinuxGuest;
use crate::monitor::Monitor;
use crate::process::OwnProcess;
use crate::wait::wait_for;

/// How long the guest may take to boot, in software.
const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// How long the guest may take to tell its next state.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// RAM; `dunlin-linux-guest` and a cloud kernel need 160 MiB.
const MEMORY_MIB: u32 = 192;

/// A QEMU process with Linux inside; killed on drop.
#[derive(Debug)]
pub struct ForeignVm {
    process: OwnProcess,
    monitor: Monitor,
    folder: TempDir,
}

impl ForeignVm {
    /// Boots Linux with `options` on the guest's command line (`dunlin.wl=...`); returns when its work has begun.
    ///
    /// # Errors
    /// What QEMU or the guest said.
    pub fn boot(linux: &LinuxGuest, options: &str) -> Result<Self> {
        Self::boot_with(linux, options, &[])
    }

    /// The same with further options of QEMU.
    ///
    /// # Errors
    /// What QEMU or the guest said.
    pub fn boot_with(linux: &LinuxGuest, options: &str, more: &[&str]) -> Result<Self> {
        let folder = crate::netns::own_folder()?;
        let file = |name: &str| folder.path().join(name);
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "kvm", "-machine", "q35", "-cpu", "EPYC", "-m", &MEMORY_MIB.to_string()]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.args(["-serial", &format!("file:{}", file("console").display())]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", file("monitor").display())]);
        command.arg("-kernel").arg(&linux.kernel).arg("-initrd").arg(&linux.initrd);
        command.args(["-append", &format!("console=ttyS0 quiet panic=-1 noxsave dunlin.console {options}")]).args(more);
        let errors = fs::File::create(file("errors"))?;
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors).spawn().context("start QEMU")?;
        let process = OwnProcess::new(child);
        let monitor = Monitor::connect(&file("monitor"), file("errors"))?;
        let vm = Self { process, monitor, folder };
        wait_for("the guest's first state", BOOT_LIMIT, || vm.state().ok())
            .with_context(|| format!("the console:\n{}", fs::read_to_string(vm.console()).unwrap_or_default()))?;
        Ok(vm)
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The guest's console so far.
    pub fn console(&self) -> PathBuf {
        self.folder.path().join("console")
    }

    /// What the guest last said of itself.
    ///
    /// # Errors
    /// It has not said anything yet.
    pub fn state(&self) -> Result<Value> {
        let bytes = fs::read(self.console())?;
        let text = String::from_utf8_lossy(&bytes);
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let line = whole.lines().rev().find_map(|line| line.strip_prefix("STATE ")).context("no state yet")?;
        Ok(serde_json::from_str(line.trim_end())?)
    }

    /// The next state that the guest tells.
    ///
    /// # Errors
    /// None comes.
    pub fn next_state(&self) -> Result<Value> {
        let uptime = |state: &Value| state["uptime_ms"].as_u64().unwrap_or(0);
        let now = uptime(&self.state()?);
        wait_for("the guest's next state", ANSWER_LIMIT, || self.state().ok().filter(|state| uptime(state) > now))
    }

    /// Gives QEMU's monitor an order; what it returned.
    ///
    /// # Errors
    /// QEMU refused.
    pub fn order(&mut self, name: &str, arguments: Value) -> Result<Value> {
        self.monitor.order(name, arguments)
    }

    /// The kernel's numbers of QEMU's vCPU threads, in order.
    ///
    /// # Errors
    /// QEMU does not tell.
    pub fn vcpu_threads(&mut self) -> Result<Vec<u32>> {
        self.monitor.vcpu_threads()
    }

    /// The host addresses of guest RAM: the largest mapping, which it is.
    ///
    /// # Errors
    /// `/proc` does not tell.
    pub fn ram(&self) -> Result<std::ops::Range<u64>> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid()))?;
        let ranges = maps.lines().filter_map(|line| {
            let (start, end) = line.split_whitespace().next()?.split_once('-')?;
            Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
        });
        let ram = u64::from(MEMORY_MIB) << 20;
        ranges
            .filter(|range| range.end - range.start >= ram)
            .min_by_key(|range| range.end - range.start)
            .context("no RAM")
    }
}
