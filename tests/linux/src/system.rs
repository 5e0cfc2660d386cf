//! The first steps of a Linux system and its end: file systems, modules, reaping, switching off.
//!
//! Must not know what the system is for. Everything here is for process 1 of a machine that is thrown away.

use std::ffi::CString;
use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount};
use rustix::process::{WaitOptions, wait};

/// Mounts a file system of the kernel's at `target`, which is made.
///
/// # Errors
/// What the kernel said.
pub fn mount_kernel_fs(kind: &str, target: impl AsRef<Path>, options: &str) -> Result<()> {
    mount_fs(kind, kind, target, MountFlags::empty(), options)
}

/// Mounts `source` of a kind at `target`, which is made.
///
/// # Errors
/// What the kernel said.
pub fn mount_fs(source: &str, kind: &str, target: impl AsRef<Path>, flags: MountFlags, options: &str) -> Result<()> {
    let target = target.as_ref();
    fs::create_dir_all(target).with_context(|| format!("make {}", target.display()))?;
    let options = CString::new(options)?;
    mount(source, target, kind, flags, Some(options.as_c_str()))
        .with_context(|| format!("mount {kind} {source} at {}", target.display()))
}

/// `/proc`, `/sys` and `/dev`.
///
/// # Errors
/// What the kernel said.
pub fn mount_basics() -> Result<()> {
    mount_kernel_fs("proc", "/proc", "")?;
    mount_kernel_fs("sysfs", "/sys", "")?;
    mount_kernel_fs("devtmpfs", "/dev", "")
}

/// Loads a module from an uncompressed file `NAME.ko`; one that is loaded already is fine.
///
/// # Errors
/// What the kernel said.
pub fn load_module(path: &Path, parameters: &str) -> Result<()> {
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    match rustix::system::finit_module(&file, &CString::new(parameters)?, 0) {
        Ok(()) => Ok(()),
        // Also the answer of a module whose place another one has (one KVM vendor beside the other).
        Err(rustix::io::Errno::EXIST) if is_loaded(path) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("load {}", path.display())),
    }
}

fn is_loaded(path: &Path) -> bool {
    path.file_stem().is_some_and(|name| Path::new("/sys/module").join(name).exists())
}

/// Takes the end of every child that has ended and was not waited for: process 1 inherits orphans.
pub fn reap() {
    while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
}

/// Milliseconds since the kernel started.
pub fn uptime_ms() -> u64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds: f64 = text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0.0);
    (seconds * 1000.0) as u64
}

/// `uname -r`.
pub fn kernel() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Switches the machine off.
pub fn power_off() -> ! {
    rustix::fs::sync();
    loop {
        // It returns only if it failed, and there is nobody to tell.
        let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
        std::thread::park();
    }
}

/// Starts the machine anew.
pub fn restart() -> ! {
    rustix::fs::sync();
    loop {
        let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
        std::thread::park();
    }
}
