//! A VM of another VMM that its own VMM migrates: QEMU with the test guest, and a second QEMU on this host that waits for it.
//!
//! Owns both processes, their monitors and consoles. Runs wherever the test guest does. vCPU 0 is a paced writer, vCPU 1 one that never pauses; each tells what it has written,
//! a window each half second.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::hosted::guest;
use crate::monitor::Monitor;
use crate::process::OwnProcess;
use crate::serial::SerialLog;
use crate::wait::wait_for;

/// How a pair is started.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'a> {
    /// RAM.
    pub memory_mib: u32,
    /// What the guest does, on its command line.
    pub workload: &'a str,
    /// The accelerator, with its options.
    pub accelerator: &'a str,
}

/// One QEMU process with its monitors; killed on drop.
#[derive(Debug)]
pub struct Qemu {
    process: OwnProcess,
    monitor: Monitor,
    second: PathBuf,
    serial: SerialLog,
    errors: PathBuf,
}

/// A VM that can be migrated, and where it goes.
#[derive(Debug)]
pub struct MovingVm {
    /// Where it runs.
    pub source: Qemu,
    /// Where it is to run.
    pub target: Qemu,
    folder: TempDir,
}

/// What a writer said of one of its windows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    /// When it began, by the guest's time stamp counter.
    pub start_tsc: u64,
    /// When it ended.
    pub end_tsc: u64,
    /// Writes, by its own count.
    pub written: u64,
}

impl Qemu {
    fn start(name: &str, folder: &TempDir, pair: &Pair<'_>, incoming: bool) -> Result<Self> {
        let file = |what: &str| folder.path().join(format!("{name}.{what}"));
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-name", name, "-accel", pair.accelerator, "-cpu", "host,-arch-capabilities"]);
        command.args(["-machine", "microvm,acpi=off,rtc=off,x-option-roms=off", "-bios", "qboot.rom"]);
        command.args(["-m", &pair.memory_mib.to_string(), "-smp", "2"]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        let options = "dunlin.cpus=2 dunlin.heartbeat=0 dunlin.window=500ms dunlin.stat=0";
        command.args(["-append", &format!("{options} {}", pair.workload)]).arg("-kernel").arg(guest());
        command.args(["-serial", &format!("file:{}", file("serial").display())]);
        for monitor in ["qmp", "second"] {
            command.args(["-qmp", &format!("unix:{},server=on,wait=off", file(monitor).display())]);
        }
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        let errors = File::create(file("errors"))?;
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors).spawn().context("start QEMU")?;
        let process = OwnProcess::new(child);
        let monitor = Monitor::connect(&file("qmp"), file("errors"))?;
        let serial = SerialLog::new(file("serial"));
        Ok(Self { process, monitor, second: file("second"), serial, errors: file("errors") })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The process itself.
    pub fn process_mut(&mut self) -> &mut OwnProcess {
        &mut self.process
    }

    /// The socket of a monitor that nobody speaks to yet.
    pub fn second_monitor(&self) -> &PathBuf {
        &self.second
    }

    /// The guest's console.
    pub fn serial(&self) -> &SerialLog {
        &self.serial
    }

    /// Gives its monitor an order; what it returned.
    ///
    /// # Errors
    /// QEMU refused, or has ended.
    pub fn order(&mut self, name: &str, arguments: Value) -> Result<Value> {
        self.monitor.order(name, arguments)
    }

    /// The kernel's numbers of its vCPU threads, in order.
    ///
    /// # Errors
    /// QEMU does not tell.
    pub fn vcpu_threads(&mut self) -> Result<Vec<u32>> {
        self.monitor.vcpu_threads()
    }

    /// What the writer of a vCPU has said so far; lines that others cut are left out.
    pub fn windows(&self, vcpu: u32) -> Vec<Window> {
        let start = format!("WINDOW cpu={vcpu} ");
        let number = |line: &str, name: &str| {
            line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse::<u64>().ok())
        };
        let lines = self.serial.lines();
        let windows = lines.iter().filter_map(|line| {
            let line = &line[line.find(&start)?..];
            let (start_tsc, end_tsc) = (number(line, "start_tsc")?, number(line, "end_tsc")?);
            // In an emulated machine the counter may go back.
            (start_tsc < end_tsc).then_some(Window { start_tsc, end_tsc, written: number(line, "written")? })
        });
        windows.collect()
    }
}

impl MovingVm {
    /// Starts both; returns when the guest works at the source.
    ///
    /// # Errors
    /// What QEMU said.
    pub fn boot(pair: &Pair<'_>) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("dunlin-moving-").tempdir()?;
        let source = Qemu::start("source", &folder, pair, false)?;
        source.serial().await_ready().with_context(|| fs::read_to_string(&source.errors).unwrap_or_default())?;
        let target = Qemu::start("target", &folder, pair, true)?;
        Ok(Self { source, target, folder })
    }

    /// A folder for what belongs to it.
    pub fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// Has QEMU begin to migrate it, over loopback.
    ///
    /// # Errors
    /// QEMU refuses.
    pub fn migrate(&mut self, bytes_per_second: u64, downtime_ms: u64) -> Result<()> {
        self.target.order("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }))?;
        let info = self.target.order("query-migrate", json!({}))?;
        let port = info["socket-address"][0]["port"].as_str().context("QEMU does not say its port")?.to_owned();
        let parameters = json!({ "max-bandwidth": bytes_per_second, "downtime-limit": downtime_ms });
        self.source.order("migrate-set-parameters", parameters)?;
        self.source.order("migrate", json!({ "uri": format!("tcp:127.0.0.1:{port}") }))?;
        Ok(())
    }

    /// What QEMU says of it.
    ///
    /// # Errors
    /// The source has ended.
    pub fn progress(&mut self) -> Result<Value> {
        self.source.order("query-migrate", json!({}))
    }

    /// Waits until it has begun round `number`, from 1.
    ///
    /// # Errors
    /// It has ended, or does not get there.
    pub fn await_round(&mut self, number: u64, limit: Duration) -> Result<Value> {
        let progress = wait_for("a round of QEMU's migration", limit, || {
            let info = self.progress().ok()?;
            let running = matches!(info["status"].as_str(), Some("setup" | "active"));
            (!running || info["ram"]["dirty-sync-count"].as_u64() >= Some(number)).then_some(info)
        })?;
        ensure!(progress["status"] == "active", "it ended before its round {number}: {progress}");
        Ok(progress)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It failed, or does not end.
    pub fn await_end(&mut self, limit: Duration) -> Result<Value> {
        let mut last = Value::Null;
        let ended = wait_for("the end of QEMU's migration", limit, || {
            last = self.progress().ok()?;
            (!matches!(last["status"].as_str(), Some("setup" | "active" | "device"))).then_some(())
        });
        ended.with_context(|| format!("{last}"))?;
        ensure!(last["status"] == "completed", "it failed: {last}");
        Ok(last)
    }
}
