//! The test machine: QEMU with a distribution's kernel, and the development host's files shared with it, read only.
//!
//! Owns both processes. In software unless this host's KVM runs nested VMs: one CPU then, since QEMU's several (MTTCG) race with the
//! kernel's patching of its own text (`Oops: int3`, seen with QEMU 7.2 and 8.0).

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dunlin_linux::protocol::{EXIT_FINE, EXIT_NOT_FINE, EXIT_PORT, Message, PORT, ROOT_TAG};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tempfile::TempDir;

use crate::interrupt;
use crate::process::OwnChild;
use crate::qmp::Qmp;
use crate::run;
use crate::setup::sharer;
use crate::workspace::root;

/// How QEMU runs guest code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accelerator {
    /// In software.
    Tcg,
    /// On this host's KVM, nested VMs included.
    Kvm,
}

impl Accelerator {
    /// KVM where a module says that it nests; the modules' switch is the only sign that needs no trial of a minute.
    pub(crate) fn of_host() -> Self {
        let nests = |module: &str| {
            let text = fs::read_to_string(format!("/sys/module/{module}/parameters/nested")).unwrap_or_default();
            matches!(text.trim(), "Y" | "1")
        };
        if nests("kvm_amd") || nests("kvm_intel") { Self::Kvm } else { Self::Tcg }
    }

    /// As it is printed.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::Tcg => "in software (QEMU TCG, EPYC with SVM, one CPU)",
            Self::Kvm => "on this host's KVM (one CPU)",
        }
    }

    fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Tcg => ["-machine", "q35,accel=tcg", "-cpu", "EPYC,+svm"],
            Self::Kvm => ["-machine", "q35,accel=kvm", "-cpu", "host"],
        }
    }
}

/// What a machine is made of.
#[derive(Debug)]
pub(crate) struct Config<'a> {
    /// How it runs.
    pub(crate) accelerator: Accelerator,
    /// Its kernel.
    pub(crate) image: &'a Path,
    /// Its first files.
    pub(crate) initramfs: &'a Path,
    /// RAM.
    pub(crate) memory_mib: u32,
    /// Where its console is written to.
    pub(crate) console: &'a Path,
    /// How long it may run.
    pub(crate) limit: Duration,
}

/// How a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It said that all was fine.
    Fine,
    /// It said that something was not.
    NotFine,
    /// It ended without a word: a panic, or process 1 gave up.
    Silent(Option<i32>),
    /// It had to be killed.
    OutOfTime,
}

/// Shares `/`, and the file system of the checkout where that is another one. The bind mount is read only in the sharer's own mount
/// namespace, so that not even root in the machine can write: what the guest mounts how does not matter.
fn share(folder: &Path, socket: &Path) -> Result<OwnChild> {
    let sharer = sharer().context("no virtiofsd: `cargo xtask setup` installs it")?;
    let source = folder.join("root");
    fs::create_dir(&source)?;
    let script = "set -e; source=$1; checkout=$2; shift 2
        mount --bind / \"$source\"; mount -o remount,bind,ro \"$source\"
        point=$(stat -c %m \"$checkout\")
        if [ \"$point\" != / ]; then
            mount --bind \"$point\" \"$source$point\"; mount -o remount,bind,ro \"$source$point\"
        fi
        exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "--", "/bin/sh", "-c", script, "sh"]);
    command.arg(&source).arg(root()).arg(&sharer).arg(format!("--socket-path={}", socket.display()));
    if sharer.starts_with("/usr/lib/qemu") {
        command.args(["-o", &format!("source={}", source.display()), "-o", "sandbox=chroot", "-o", "cache=always"]);
    } else {
        command.arg(format!("--shared-dir={}", source.display())).args(["--sandbox=chroot", "--cache=always"]);
    }
    command.stdout(Stdio::null());
    let mut child = OwnChild::start(&mut command, &folder.join("virtiofsd.err"))?;
    interrupt::wait_for(Duration::from_secs(10), "virtiofsd's socket", || {
        child.check_alive()?;
        Ok(socket.exists().then_some(()))
    })?;
    Ok(child)
}

/// The sockets' folder: short, since a socket's path has 108 bytes at most.
fn folder() -> Result<TempDir> {
    tempfile::Builder::new().prefix("dunlin-vm-").tempdir().context("a folder for sockets")
}

/// What the CPU and its interrupt controllers stand at, for the log of a machine that hangs.
fn inspect(monitor: &Path, machine: &mut OwnChild) -> Result<String> {
    let mut monitor = Qmp::connect(monitor, machine)?;
    let mut text = String::from("\n--- the machine, when its time was up ---\n");
    for what in ["info registers", "info lapic", "info pic"] {
        let answer = monitor.order("human-monitor-command", json!({ "command-line": what }))?;
        text += answer.as_str().unwrap_or_default();
    }
    Ok(text)
}

fn qemu(config: &Config<'_>, socket: &Path) -> Command {
    let memory = config.memory_mib;
    let mut command = Command::new("qemu-system-x86_64");
    command.args(config.accelerator.arguments());
    command.args([
        "-smp",
        "1",
        "-m",
        &memory.to_string(),
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    command.args([
        "-object",
        &format!("memory-backend-memfd,id=ram,size={memory}M,share=on"),
        "-numa",
        "node,memdev=ram",
    ]);
    command.args(["-chardev", &format!("socket,id=files,path={}", socket.display())]);
    command.args(["-device", &format!("vhost-user-fs-pci,chardev=files,tag={ROOT_TAG}")]);
    command.args(["-device", &format!("isa-debug-exit,iobase={EXIT_PORT:#x},iosize=1")]);
    command.arg("-kernel").arg(config.image).arg("-initrd").arg(config.initramfs);
    // A panic restarts, which QEMU takes for the end. The TSC is declared reliable: on a busy host the emulated counter would be found unstable,
    // and then VMs inside lose timers.
    command.args(["-append", "console=ttyS0 panic=-1 oops=panic quiet loglevel=4 tsc=reliable"]);
    command
}

/// Runs a machine to its end; each message that it sends is shown to `hear`.
pub(crate) fn run(config: &Config<'_>, mut hear: impl FnMut(Message)) -> Result<End> {
    let folder = folder()?;
    let socket = folder.path().join("files");
    let _sharer = share(folder.path(), &socket)?;
    let mut command = qemu(config, &socket);
    command.args(["-serial", &format!("file:{}", config.console.display())]);
    // Not QEMU's `stdio`: at the end of our empty standard input it would shut the port.
    command.args(["-device", "virtio-serial-pci", "-chardev", "file,id=port,path=/proc/self/fd/1"]);
    command.args(["-device", &format!("virtserialport,chardev=port,name={PORT}")]);
    let monitor = folder.path().join("monitor");
    command.args(["-qmp", &format!("unix:{},server=on,wait=off", monitor.display())]);
    command.stdout(Stdio::piped());
    let mut machine = OwnChild::start(&mut command, &folder.path().join("qemu.err"))?;
    let output = machine.child_mut().stdout.take().context("no output")?;
    let pid = Pid::from_raw(machine.child_mut().id() as i32).context("pid zero")?;

    let deadline = Instant::now() + config.limit;
    let (sender, lines) = channel();
    let out_of_time = std::thread::scope(|scope| -> Result<bool> {
        scope.spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let heard = (|| loop {
            interrupt::check()?;
            match lines.recv_timeout(Duration::from_millis(200)) {
                Ok(line) => match serde_json::from_str(&line) {
                    Ok(message) => hear(message),
                    Err(error) => eprintln!("the test machine says `{line}`: {error}"),
                },
                Err(RecvTimeoutError::Disconnected) => return Ok(false),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if Instant::now() >= deadline {
                return Ok(true);
            }
        })();
        if matches!(heard, Ok(true)) {
            let words = inspect(&monitor, &mut machine).unwrap_or_else(|error| format!("\n{error:#}\n"));
            // The console's log is QEMU's, which appends in place: what is written behind its end stays.
            let _ = fs::File::options()
                .append(true)
                .open(config.console)
                .and_then(|mut log| log.write_all(words.as_bytes()));
        }
        if !matches!(heard, Ok(false)) {
            // Ends the reader too. The number is still ours: the child has not been waited for.
            let _ = kill_process(pid, Signal::KILL);
        }
        heard
    })?;
    let status = machine.wait(Duration::from_secs(20))?;
    if out_of_time {
        return Ok(End::OutOfTime);
    }
    // `isa-debug-exit` makes the code; QEMU itself ends with 1 when it cannot start.
    let code = status.code();
    let end_code = |code: u8| Some(i32::from(code) * 2 + 1);
    if code == end_code(EXIT_FINE) {
        Ok(End::Fine)
    } else if code == end_code(EXIT_NOT_FINE) {
        Ok(End::NotFine)
    } else if code == Some(1) {
        bail!("QEMU could not start the machine: {}", machine.words())
    } else {
        Ok(End::Silent(code))
    }
}

/// A machine whose console is this terminal.
pub(crate) fn shell(config: &Config<'_>) -> Result<()> {
    let folder = folder()?;
    let socket = folder.path().join("files");
    let _sharer = share(folder.path(), &socket)?;
    let mut command = qemu(config, &socket);
    command.args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]);
    // It has our terminal, and else is as our other children are: it does not outlive us.
    // SAFETY: between fork and exec only prctl is called, which is a plain system call.
    unsafe {
        command.pre_exec(|| Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?));
    }
    let status = command.status().with_context(|| format!("{} could not be started", run::words(&command)))?;
    if !status.success() {
        bail!("QEMU ended with {status}");
    }
    Ok(())
}
