//! Process 1 of the test machine: sets a distribution's kernel up, runs the job that came in the initramfs, and ends the machine
//! with a verdict.
//!
//! Owns the order of things. The development host's files are seen read only, under an overlay in memory, so that its
//! programs run unchanged and nothing they write outlives the machine.

mod cgroup;
mod exit;
mod port;
mod runner;

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use dunlin_linux::protocol::{EXIT_FINE, EXIT_NOT_FINE, JOB, Job, MODULES, Message, ROOT_TAG};
use dunlin_linux::system;
use rustix::mount::{MountFlags, mount_move};

use crate::port::Port;

/// Where the host's files and what is written over them come together.
const NEW_ROOT: &str = "/new";

fn main() {
    // On any way out other than the verdict the machine goes off, and whoever started it knows that something is wrong.
    if let Err(error) = run() {
        eprintln!("bed: {error:#}");
    }
    system::power_off();
}

fn run() -> Result<()> {
    system::mount_basics()?;
    let job: Job = serde_json::from_slice(&fs::read(JOB)?).context("the job")?;
    let mut problems: Vec<(String, String)> = job
        .missing_modules
        .iter()
        .map(|name| (name.clone(), "the kernel's package has no such module".into()))
        .collect();
    for name in &job.modules {
        let file = Path::new(MODULES).join(format!("{name}.ko"));
        // Modules say where they stand by their own parameters' defaults.
        if let Err(error) = system::load_module(&file, "") {
            problems.push((name.clone(), format!("{error:#}")));
        }
    }
    enter_new_root()?;
    if job.shell {
        return shell(&job);
    }
    let port = Port::open()?;
    port.say(&Message::Started { kernel: system::kernel(), uptime_ms: system::uptime_ms() });
    for (name, problem) in problems {
        port.say(&Message::NoModule { name, problem });
    }
    let (passed, failed) = runner::run_all(&job, &port)?;
    port.say(&Message::Done { nonce: job.nonce, passed, failed });
    port::drain();
    exit::end(if failed == 0 { EXIT_FINE } else { EXIT_NOT_FINE })
}

/// The host's files below, memory above, the kernel's own file systems in their places.
fn enter_new_root() -> Result<()> {
    system::mount_fs(ROOT_TAG, "virtiofs", "/lower", MountFlags::RDONLY, "")
        .context("the host's files (a kernel without virtiofs?)")?;
    system::mount_kernel_fs("tmpfs", "/upper", "")?;
    fs::create_dir_all("/upper/files")?;
    fs::create_dir_all("/upper/work")?;
    let layers = "lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work";
    system::mount_kernel_fs("overlay", NEW_ROOT, layers)?;
    for kept in ["proc", "sys", "dev"] {
        mount_move(format!("/{kept}"), format!("{NEW_ROOT}/{kept}")).with_context(|| format!("move /{kept}"))?;
    }
    rustix::process::chroot(NEW_ROOT).context("chroot")?;
    rustix::process::chdir("/").context("chdir")?;
    // Sockets and locks of the host's processes mean nothing here.
    system::mount_kernel_fs("tmpfs", "/run", "mode=755")?;
    system::mount_kernel_fs("tmpfs", "/dev/shm", "")?;
    system::mount_kernel_fs("devpts", "/dev/pts", "")?;
    system::mount_kernel_fs("tracefs", "/sys/kernel/tracing", "")?;
    system::mount_kernel_fs("bpf", "/sys/fs/bpf", "")?;
    cgroup::mount()?;
    let _ = rustix::system::sethostname(b"bed");
    let status = command("ip").args(["link", "set", "lo", "up"]).status().context("start ip")?;
    anyhow::ensure!(status.success(), "ip link set lo up: {status}");
    Ok(())
}

/// A program of the host, with an environment of its own.
fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env_clear();
    command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command.env("HOME", "/root").env("TMPDIR", "/tmp").env("LANG", "C.UTF-8").env("RUST_BACKTRACE", "1");
    command
}

/// A shell on the console; the machine goes off when it ends.
fn shell(job: &Job) -> Result<()> {
    eprintln!(
        "\nbed: Linux {}; `exit` switches the machine off. The host's files are read only; what you write is lost.",
        system::kernel()
    );
    let mut shell = command("/bin/bash");
    shell.arg("-l").current_dir(&job.folder).envs(job.environment.iter().map(|(name, value)| (name, value)));
    shell.env("TERM", "linux");
    let console = fs::File::options().read(true).write(true).open("/dev/ttyS0").context("the console")?;
    shell.stdin(console.try_clone()?).stdout(console.try_clone()?).stderr(console.try_clone()?);
    // SAFETY: only async-signal-safe calls between fork and exec: a session of its own, with the console as its terminal.
    unsafe {
        shell.pre_exec(move || {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(&console)?;
            Ok(())
        });
    }
    let status = shell.status().context("start bash")?;
    eprintln!("bed: the shell has ended ({status})");
    Ok(())
}
