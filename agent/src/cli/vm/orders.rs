//! `dunlin vm list|info|pause|resume|stop|console`: what its control sockets offer.

use std::borrow::Cow;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use serde::Serialize;

use super::super::places::RunDir;
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::model::units::{display_bytes, display_duration};
use crate::model::{ThrottleView, VmRef};
use crate::service::config::Config;
use crate::service::control::{Outcome, ask_console, ask_info, give_order};
use crate::service::inventory::{self, Host};
use crate::service::machine::{RunState, VmInfo};
use crate::service::out::{bytes, complain, say};
use crate::service::registry::Registry;

/// List the VMs that Dunlin hosts here, or every KVM VM of this host
///
/// With --all also those of other VMMs: their names, vCPU threads, memory and dirty log are read from /proc and from the kernel's own
/// structures; no VMM is asked.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  dunlin vm list\n  dunlin vm list --all --slots\n  dunlin vm list --all --json")]
pub(in crate::cli) struct ListArgs {
    /// Every KVM VM of this host, whoever runs it.
    #[arg(long)]
    all: bool,

    /// Show each VM's memory slots too (guest address, size, host address, dirty log).
    #[arg(long, requires = "all")]
    slots: bool,

    #[command(flatten)]
    run_dir: RunDir,
}

/// What it does, in a word: a VM whose writers are slowed runs, too.
fn state_or_stunned(info: &VmInfo) -> String {
    let stunned = info.throttle.as_ref().is_some_and(|throttle| throttle.stunned);
    if stunned && info.state == RunState::Running { "stunned".to_owned() } else { state(info) }
}

fn state(info: &VmInfo) -> String {
    serde_json::to_string(&info.state).unwrap_or_default().trim_matches('"').to_owned()
}

impl ListArgs {
    pub(in crate::cli) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let run_dir = self.run_dir.path(config);
        if self.all {
            return list_all(&run_dir, self.slots, json);
        }
        let registry = Registry::new(run_dir);
        let entries = registry.list();
        if !json {
            say!("{:<20} {:<9} {:>8} {:>5} {:>11}  UUID", "NAME", "STATE", "PID", "CPUS", "MEMORY");
        }
        for entry in &entries {
            match ask_info(&registry.served(entry, "observe")) {
                Ok(info) if json => say!("{}", serde_json::to_string(&info.tagged())?),
                Ok(info) => say!(
                    "{:<20} {:<9} {:>8} {:>5} {:>11}  {}",
                    info.name,
                    state_or_stunned(&info),
                    info.pid,
                    info.cpus,
                    display_bytes(info.memory_bytes),
                    info.vm_id
                ),
                // It has ended since it was looked for.
                Err(_) if !entry.is_alive() => {}
                Err(error) => complain!("dunlin: {}: {error}", entry.name),
            }
        }
        Ok(exit::DONE)
    }
}

/// Every KVM VM of this host.
fn list_all(run_dir: &Path, slots: bool, json: bool) -> anyhow::Result<u8> {
    let mut view = inventory::kernel_view();
    let vms = inventory::all(run_dir, view.as_mut());
    if json {
        for vm in &vms {
            say!("{}", serde_json::to_string(&vm.tagged())?);
        }
        return Ok(exit::DONE);
    }
    say!(
        "{:<24} {:<8} {:<16} {:>8} {:>5} {:>11} {:>8}  UUID",
        "NAME",
        "HOST",
        "VMM",
        "PID",
        "CPUS",
        "MEMORY",
        "LOGGED"
    );
    for vm in &vms {
        let host = if vm.host == Host::Hosted { "hosted" } else { "foreign" };
        let memory = vm.memory_bytes.map_or_else(|| "unknown".to_owned(), display_bytes);
        let logged = match (vm.logged_bytes, vm.memory_bytes) {
            _ if vm.kernel_view_missing.is_some() => "unknown".to_owned(),
            (0, _) => "no".to_owned(),
            (logged, Some(memory)) if logged < memory => "partly".to_owned(),
            _ => "yes".to_owned(),
        };
        say!(
            "{:<24} {host:<8} {:<16} {:>8} {:>5} {memory:>11} {logged:>8}  {}",
            vm.name,
            vm.vmm,
            vm.pid,
            vm.vcpus.len(),
            vm.vm_id
        );
        for slot in vm.slots.iter().filter(|_| slots) {
            say!(
                "  slot {:<5} {:>14} + {:>11}  at {:#x}{}{}",
                slot.id,
                slot.range.start.to_string(),
                display_bytes(slot.range.bytes),
                slot.host_address,
                if slot.read_only { ", read-only" } else { "" },
                if slot.dirty_log { ", dirty log on" } else { "" },
            );
        }
    }
    if let Some(reason) = vms.iter().find_map(|vm| vm.kernel_view_missing.as_ref()) {
        complain!("dunlin: vCPU threads, memory slots and dirty logs are not known of some: {reason}");
    }
    Ok(exit::DONE)
}

/// Show one VM: state, vCPU threads, devices, dirty log.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  dunlin vm info web1\n  dunlin vm info pid:4711 --json")]
pub(in crate::cli) struct InfoArgs {
    /// The VM: NAME, uuid:U or pid:P.
    vm: VmRef,
    #[command(flatten)]
    run_dir: RunDir,
}

impl InfoArgs {
    pub(in crate::cli) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let registry = Registry::new(self.run_dir.path(config));
        let info = ask_info(&registry.served(&registry.find(&self.vm)?, "observe"))?;
        if json {
            say!("{}", serde_json::to_string(&info.tagged())?);
            return Ok(exit::DONE);
        }
        say!("name         {}", info.name);
        say!("uuid         {}", info.vm_id);
        say!("state        {}", state(&info));
        say!("pid          {}, for {}", info.pid, display_duration(Duration::from_nanos(info.uptime_ns)));
        let huge = if info.hugepages { ", in huge pages" } else { "" };
        say!("memory       {}{huge}", display_bytes(info.memory_bytes));
        say!("vcpus        {}, threads {:?}", info.cpus, info.vcpu_thread_ids);
        let log = if info.dirty_log_on { "on" } else { "off" };
        say!("dirty log    {}, {log}", serde_json::to_string(&info.dirty_log)?.trim_matches('"'));
        for net in &info.nets {
            let (station, further) = (&net.station, net.station.further());
            let further = if further.is_empty() { further } else { format!(", {further}") };
            say!("net          {} on {}, announces {:?}{further}", station.mac, net.tap, station.ips);
        }
        for disk in &info.disks {
            say!("disk         {}{}", disk.path.display(), if disk.readonly { ", readonly" } else { "" });
        }
        if info.rng {
            say!("rng          random bytes of this host's kernel");
        }
        if info.balloon {
            say!("balloon      see dunlin vm balloon");
        }
        if let Some(migration) = info.migration_id {
            say!("migration    {migration}");
        }
        if let Some(owed) = info.owed_pages {
            say!("owed         {owed} pages of its memory are still at its former host");
        }
        for line in info.throttle.iter().flat_map(throttle_lines) {
            say!("{line}");
        }
        if !info.kvm_shortcomings.is_empty() {
            say!("kvm lacks    {}", info.kvm_shortcomings.join(", "));
        }
        Ok(exit::DONE)
    }
}

/// Who slows the writers of a VM, since when, which, and what they have lost. Nothing of one that never was slowed.
fn throttle_lines(throttle: &ThrottleView) -> Vec<String> {
    let time = |ns: u64| display_duration(Duration::from_nanos(ns));
    let lost = time(throttle.guest_time_lost_ns);
    let mut lines = match &throttle.holder {
        Some(holder) => {
            let did = if throttle.stunned { "slowed" } else { "watched" };
            let since = Duration::from_millis(holder.since_unix_ms);
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let since = display_duration(now.saturating_sub(since));
            vec![format!("writers      {did} by {holder} for {since}, {lost} of guest time lost so far")]
        }
        None if throttle.guest_time_lost_ns > 0 => {
            vec![format!("writers      not slowed any more, {lost} of guest time lost")]
        }
        None => Vec::new(),
    };
    for vcpu in &throttle.vcpus {
        let limit = vcpu.limit_pages_per_second.map_or_else(String::new, |limit| format!(" of {limit:.0}"));
        let rate = format!("{:.0}{limit} pages/s, ", vcpu.pages_per_second);
        let rate = if throttle.holder.is_some() { rate } else { String::new() };
        lines.push(format!("  vcpu{:<6} {rate}{} lost", vcpu.vcpu, time(vcpu.held_ns)));
    }
    lines
}

/// Gives an order to a VM's control socket and says how it went.
fn order(vm: &VmRef, run_dir: &Path, target: &str, done: &str, json: bool) -> anyhow::Result<u8> {
    let registry = Registry::new(run_dir);
    let result = registry.find(vm).map_err(|error| error.to_string()).and_then(|entry| {
        give_order(&registry.served(&entry, "control"), target, &[]).map_err(|error| error.to_string())
    });
    let error = result.err().unwrap_or_default();
    let code = if error.is_empty() { exit::DONE } else { exit::REFUSED };
    if json {
        say!("{}", serde_json::to_string(&Outcome { error }.tagged())?);
    } else if error.is_empty() {
        say!("{vm}: {done}");
    } else {
        complain!("dunlin: {error}");
    }
    Ok(code)
}

/// Pause a VM: its vCPUs and devices stand until `dunlin vm resume`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  dunlin vm pause web1")]
pub(in crate::cli) struct PauseArgs {
    /// The VM: NAME, uuid:U or pid:P.
    vm: VmRef,
    #[command(flatten)]
    run_dir: RunDir,
}

impl PauseArgs {
    pub(in crate::cli) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        order(&self.vm, &self.run_dir.path(config), "/v1/pause", "paused", json)
    }
}

/// Let a paused VM go on.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  dunlin vm resume web1")]
pub(in crate::cli) struct ResumeArgs {
    /// The VM: NAME, uuid:U or pid:P.
    vm: VmRef,
    #[command(flatten)]
    run_dir: RunDir,
}

impl ResumeArgs {
    pub(in crate::cli) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        order(&self.vm, &self.run_dir.path(config), "/v1/resume", "runs", json)
    }
}

/// End a VM at once, as if its power were cut.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  dunlin vm stop web1")]
pub(in crate::cli) struct StopArgs {
    /// The VM: NAME, uuid:U or pid:P.
    vm: VmRef,
    #[command(flatten)]
    run_dir: RunDir,
}

impl StopArgs {
    pub(in crate::cli) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        order(&self.vm, &self.run_dir.path(config), "/v1/stop", "stopped", json)
    }
}

/// Show a VM's console: its last 64 KiB of output, then what follows; lines typed here go to the guest.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  dunlin vm console web1\n  dunlin vm console web1 --history")]
pub(in crate::cli) struct ConsoleArgs {
    /// The VM: NAME, uuid:U or pid:P.
    vm: VmRef,
    /// Print what there is and end.
    #[arg(long)]
    history: bool,
    #[command(flatten)]
    run_dir: RunDir,
}

impl ConsoleArgs {
    pub(in crate::cli) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let registry = Registry::new(self.run_dir.path(config));
        let entry = registry.find(&self.vm)?;
        let (observe, act) = (registry.served(&entry, "observe"), registry.served(&entry, "control"));
        let (shown, mut position) = ask_console(&observe, None)?;
        let print = |output: &[u8]| {
            if json { bytes(format!("{}\n", console_line(output)).as_bytes()) } else { bytes(output) }
        };
        if !print(&shown) {
            return Ok(exit::DONE);
        }
        if self.history {
            return Ok(exit::DONE);
        }
        std::thread::spawn(move || {
            let mut buffer = [0; 1024];
            while let Ok(read @ 1..) = std::io::stdin().read(&mut buffer) {
                if give_order(&act, "/v1/console", &buffer[..read]).is_err() {
                    break;
                }
            }
        });
        loop {
            let Ok((new, end)) = ask_console(&observe, Some(position)) else { return Ok(exit::DONE) };
            if !new.is_empty() && !print(&new) {
                return Ok(exit::DONE);
            }
            position = end;
        }
    }
}

/// A piece of console output.
#[derive(Serialize)]
struct Piece<'a> {
    output: Cow<'a, str>,
}

impl Schema for Piece<'_> {
    const SCHEMA: &'static str = "dunlin.console/v1";
}

/// A piece of console output as JSON.
pub(in crate::cli) fn console_line(output: &[u8]) -> String {
    serde_json::to_string(&Piece { output: String::from_utf8_lossy(output) }.tagged()).unwrap_or_default()
}
