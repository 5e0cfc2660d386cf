//! The peer QEMU: the same guest, moved between two QEMU processes on this host by QEMU's own migration.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::fresh;
use super::guest::{self, Console, HEARTBEAT_MS, Load};
use super::heartbeat::{Gaps, gaps, steps_ms};
use crate::interrupt;
use crate::process::OwnChild;
use crate::qmp::Qmp;
use crate::run;

/// The program.
const PROGRAM: &str = "qemu-system-x86_64";
/// No limit, in bytes per second.
const UNLIMITED: u64 = 1 << 40;
/// The same downtime target as ours.
const DOWNTIME_LIMIT_MS: u64 = 30;
/// How often the state is asked for.
const TICK: Duration = Duration::from_millis(10);
/// How long the guest beats on at the target before it is stopped.
const AFTER: Duration = Duration::from_millis(200);

/// A way in which QEMU can migrate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Its default: one stream.
    PreCopy,
    /// Two streams for pages.
    Multifd,
    /// The same with RAM in a shared memory file, as ours is, instead of private memory.
    MultifdShared,
    /// One stream; all vCPUs are throttled until the rounds shrink.
    AutoConverge,
    /// The VM moves at once, its memory follows.
    PostCopy,
    /// One stream; each vCPU may dirty a quarter of the link, as `set-vcpu-dirty-limit` sees to it.
    DirtyLimit,
}

impl Mode {
    /// The peer's name in tables.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::PreCopy => "qemu",
            Self::Multifd => "qemu-multifd",
            Self::MultifdShared => "qemu-multifd-memfd",
            Self::AutoConverge => "qemu-auto-converge",
            Self::PostCopy => "qemu-post-copy",
            Self::DirtyLimit => "qemu-dirty-limit",
        }
    }

    fn capability(self) -> Option<&'static str> {
        match self {
            Self::PreCopy | Self::DirtyLimit => None,
            Self::Multifd | Self::MultifdShared => Some("multifd"),
            Self::AutoConverge => Some("auto-converge"),
            Self::PostCopy => Some("postcopy-ram"),
        }
    }
}

/// One migration as it was measured.
#[derive(Clone, Debug)]
pub(super) struct Migration {
    /// QEMU's `total-time`.
    pub(super) total_ms: f64,
    /// QEMU's `downtime`.
    pub(super) downtime_ms: f64,
    /// QEMU's `ram.transferred`.
    pub(super) wire_bytes: f64,
    /// The guest's own view.
    pub(super) gaps: Gaps,
    /// Pages that the guest wrote per second while the migration ran.
    pub(super) pages_per_second: Option<f64>,
    /// The same from before it began until behind its end, at both hosts; none where the guest did not say.
    pub(super) pages_per_second_throughout: Option<f64>,
    /// Between the guest's heartbeats while the migration ran, in milliseconds.
    pub(super) steps_ms: Vec<f64>,
}

/// Where QEMU and the guest are, and where files go.
#[derive(Clone, Debug)]
pub(super) struct Qemu {
    program: PathBuf,
    kernel: PathBuf,
    folder: PathBuf,
}

/// One QEMU process.
#[derive(Debug)]
pub(super) struct Side {
    pub(super) process: OwnChild,
    pub(super) qmp: Qmp,
    pub(super) console: Console,
}

/// How QEMU is started.
#[derive(Clone, Copy, Debug)]
pub(super) struct Boot {
    /// The accelerator with its options.
    pub(super) accelerator: &'static str,
    /// RAM in a shared memory file, as ours is, instead of private memory.
    pub(super) shared: bool,
    /// It waits for a migration instead of booting.
    pub(super) incoming: bool,
}

impl Qemu {
    /// Finds QEMU.
    pub(super) fn find(kernel: &Path, scratch: &Path) -> Result<Self> {
        let program = run::find(PROGRAM).with_context(|| format!("no {PROGRAM}: run `cargo xtask setup`"))?;
        Ok(Self { program, kernel: kernel.to_owned(), folder: scratch.join("qemu") })
    }

    /// Its version, as it says it.
    pub(super) fn version(&self) -> String {
        let text = run::output(&self.program, &["--version"]).unwrap_or_default();
        text.lines().next().unwrap_or_default().to_owned()
    }

    /// Boots the guest and moves it. None if it did not converge within `cap`.
    pub(super) fn migrate(
        &self,
        mode: Mode,
        load: &Load,
        limit: Option<u64>,
        cap: Duration,
        settle: Duration,
    ) -> Result<Option<Migration>> {
        self.clear()?;
        // The limit is kept where a dirty ring is full.
        let accelerator = if mode == Mode::DirtyLimit { "kvm,dirty-ring-size=4096" } else { "kvm" };
        let boot = Boot { accelerator, shared: mode == Mode::MultifdShared, incoming: false };
        let mut source = self.start("source", load, boot)?;
        let tsc_hz = source.console.wait_ready(&mut source.process)?;
        let mut target = self.start("target", load, Boot { incoming: true, ..boot })?;
        if let Some(capability) = mode.capability() {
            let capabilities = json!({ "capabilities": [{ "capability": capability, "state": true }] });
            source.qmp.order("migrate-set-capabilities", capabilities.clone())?;
            target.qmp.order("migrate-set-capabilities", capabilities)?;
        }
        source.qmp.order(
            "migrate-set-parameters",
            // What follows the VM has a limit of its own.
            json!({
                "max-bandwidth": limit.unwrap_or(UNLIMITED),
                "max-postcopy-bandwidth": limit.unwrap_or(UNLIMITED),
                "downtime-limit": DOWNTIME_LIMIT_MS,
            }),
        )?;
        target.qmp.order("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }))?;
        let port = port(&target.qmp.order("query-migrate", json!({}))?).context("QEMU does not say its port")?;
        interrupt::sleep(settle)?;
        fresh::recall()?;

        if mode == Mode::DirtyLimit {
            let rate = limit.unwrap_or(UNLIMITED) / 4 / 1_000_000;
            source.qmp.order("set-vcpu-dirty-limit", json!({ "dirty-rate": rate }))?;
        }
        let began = source.console.len();
        source.qmp.order("migrate", json!({ "uri": format!("tcp:127.0.0.1:{port}") }))?;
        if mode == Mode::PostCopy {
            source.qmp.order("migrate-start-postcopy", json!({}))?;
        }
        let Some(info) = finished(&mut source, &mut target, cap)? else {
            source.qmp.order("migrate_cancel", json!({}))?;
            return Ok(None);
        };
        let ended = source.console.len() + target.console.len();
        interrupt::sleep(AFTER)?;
        drop(source.process);
        let before = source.console.bytes();
        let behind = target.console.bytes();
        let both = [before.as_slice(), &behind].concat();
        let gaps = gaps(&before, &behind, began, tsc_hz, HEARTBEAT_MS).context("no heartbeats around QEMU's switch")?;
        let number = |value: &Value, name: &str| value.get(name).and_then(Value::as_f64).unwrap_or(f64::NAN);
        Ok(Some(Migration {
            total_ms: number(&info, "total-time"),
            downtime_ms: number(&info, "downtime"),
            wire_bytes: info.get("ram").map_or(f64::NAN, |ram| number(ram, "transferred")),
            gaps,
            pages_per_second: guest::pages_per_second(&before[began..]),
            pages_per_second_throughout: guest::pages_per_second_around(&both, began, ended),
            steps_ms: steps_ms(&before, began, tsc_hz),
        }))
    }

    /// Where its files go.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Empties that.
    pub(super) fn clear(&self) -> Result<()> {
        let _ = fs::remove_dir_all(&self.folder);
        fs::create_dir_all(&self.folder).with_context(|| format!("{} could not be made", self.folder.display()))
    }

    /// Starts a process, whose files are called `name`.
    pub(super) fn start(&self, name: &str, load: &Load, boot: Boot) -> Result<Side> {
        let console = Console(self.folder.join(format!("{name}.log")));
        let socket = self.folder.join(format!("{name}.qmp"));
        let mut command = Command::new(&self.program);
        command
            .args(["-accel", boot.accelerator, "-cpu", "host,-arch-capabilities"])
            .args(["-machine", "microvm,acpi=off,rtc=off,x-option-roms=off", "-bios", "qboot.rom"])
            .args(["-m", &load.memory_mib.to_string(), "-smp", &load.cpus.to_string()])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-append", &load.cmdline])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-serial")
            .arg(format!("file:{}", console.0.display()))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .stdout(Stdio::null());
        if boot.shared {
            command.args(["-machine", "memory-backend=ram", "-object"]);
            command.arg(format!("memory-backend-memfd,id=ram,size={}M,share=on", load.memory_mib));
        }
        if boot.incoming {
            command.args(["-incoming", "defer"]);
        }
        let mut process = OwnChild::start(&mut command, &self.folder.join(format!("{name}.err")))?;
        let qmp = Qmp::connect(&socket, &mut process)?;
        Ok(Side { process, qmp, console })
    }
}

/// Where the incoming side listens.
fn port(info: &Value) -> Option<String> {
    Some(info.get("socket-address")?.get(0)?.get("port")?.as_str()?.to_owned())
}

/// Waits for the end of a migration and returns what the source says of it; none if the time is up.
fn finished(source: &mut Side, target: &mut Side, cap: Duration) -> Result<Option<Value>> {
    let until = Instant::now() + cap;
    loop {
        interrupt::sleep(TICK)?;
        target.process.check_alive()?;
        let info = source.qmp.order("query-migrate", json!({}))?;
        match info.get("status").and_then(Value::as_str) {
            Some("completed") => return Ok(Some(info)),
            Some("failed" | "cancelled") => bail!("QEMU's migration failed: {info}"),
            _ if Instant::now() >= until => return Ok(None),
            _ => {}
        }
    }
}
