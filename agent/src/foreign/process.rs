//! A process that holds a VM, seen through `/proc`.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::model::KvmDescriptors;

/// Why a process is no VM that can be looked at.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// There is none.
    #[error("there is no process {0}")]
    Gone(u32),
    /// The number belongs to a thread.
    #[error("{thread} is a thread of process {pid}; write pid:{pid}")]
    Thread {
        /// What was asked for.
        thread: u32,
        /// Its process.
        pid: u32,
    },
    /// Its descriptors may not be looked at.
    #[error("process {pid} may not be looked at: run as root, or with CAP_SYS_PTRACE")]
    Refused {
        /// The process.
        pid: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It has no KVM descriptor.
    #[error("process {0} holds no VM: none of its descriptors is a KVM machine")]
    NoVm(u32),
}

/// A live process with a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvmProcess {
    /// Its id.
    pub pid: u32,
    /// Its name as the kernel has it (at most 15 characters).
    pub name: String,
    /// What it was started with: the program and its arguments.
    pub command: Vec<String>,
    /// Its KVM descriptors.
    pub descriptors: KvmDescriptors,
    /// The size of its address space: never smaller than its guest's RAM.
    pub address_space_bytes: u64,
    /// When it started, in clock ticks since boot (field 22 of /proc/PID/stat).
    pub start_time_ticks: u64,
}

impl KvmProcess {
    /// The ids of all processes, in no order.
    pub fn ids() -> Vec<u32> {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    }

    /// All that this process may look at, by process id. Those that end meanwhile are left out.
    pub fn all() -> Vec<Self> {
        let mut found: Vec<Self> = Self::ids().into_iter().filter_map(|pid| Self::open(pid).ok()).collect();
        found.sort_by_key(|process| process.pid);
        found
    }

    /// How many vCPUs it has.
    pub fn cpus(&self) -> u32 {
        self.descriptors.vcpus.len() as u32
    }

    /// Looks at a process.
    ///
    /// # Errors
    /// It is gone, no VM, or may not be looked at.
    pub fn open(pid: u32) -> Result<Self, ProcessError> {
        let process = Self::open_any(pid)?;
        if process.descriptors.machines.is_empty() { Err(ProcessError::NoVm(pid)) } else { Ok(process) }
    }

    /// Looks at a process that need not hold a KVM machine (a VMM that emulates).
    ///
    /// # Errors
    /// It is gone, or may not be looked at.
    pub fn open_any(pid: u32) -> Result<Self, ProcessError> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).map_err(|_| ProcessError::Gone(pid))?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        if let Some(process) = field("Tgid").and_then(|id| id.trim().parse().ok()).filter(|&id: &u32| id != pid) {
            return Err(ProcessError::Thread { thread: pid, pid: process });
        }
        let name = field("Name").unwrap_or_default().trim().to_owned();
        let kibibytes = field("VmSize").and_then(|size| size.split_whitespace().next()?.parse::<u64>().ok());
        let entries =
            fs::read_dir(format!("/proc/{pid}/fd")).map_err(|source| ProcessError::Refused { pid, source })?;
        let mut descriptors = KvmDescriptors { pid, ..KvmDescriptors::default() };
        for entry in entries.flatten() {
            let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let target = match fs::read_link(entry.path()) {
                Ok(target) => target,
                // The folder can be listed by those who may not look into it.
                Err(source) if source.kind() == io::ErrorKind::PermissionDenied => {
                    return Err(ProcessError::Refused { pid, source });
                }
                Err(_) => continue,
            };
            let target = target.to_string_lossy();
            if target == "anon_inode:kvm-vm" {
                descriptors.machines.push(number);
            } else if target.starts_with("anon_inode:kvm-vcpu:") || target == "anon_inode:kvm-vcpu" {
                // The kernel numbers them: `anon_inode:kvm-vcpu:0`.
                descriptors.vcpus.push(number);
            }
        }
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = command.split(|&byte| byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
        let command = command.filter(|word| !word.is_empty()).collect();
        let start_time_ticks = start_time_ticks(pid).ok_or(ProcessError::Gone(pid))?;
        let address_space_bytes = kibibytes.unwrap_or_default().saturating_mul(1024);
        Ok(Self { pid, name, command, descriptors, address_space_bytes, start_time_ticks })
    }

    /// Whether the process that was opened is still there, and not another with its number.
    pub fn is_alive(&self) -> bool {
        start_time_ticks(self.pid) == Some(self.start_time_ticks)
    }

    /// Whether it still has memory: one that is ending gives that up before it is a zombie.
    pub fn has_memory(&self) -> bool {
        let pages = fs::read_to_string(format!("/proc/{}/statm", self.pid)).unwrap_or_default();
        self.is_alive() && pages.split_whitespace().next().is_some_and(|pages| pages != "0")
    }

    /// A thread's name.
    pub fn thread_name(&self, thread: u32) -> Option<String> {
        let name = fs::read_to_string(format!("/proc/{}/task/{thread}/comm", self.pid)).ok()?;
        Some(name.trim_end().to_owned())
    }
}

/// When a running process started, in clock ticks since boot. A zombie runs no guest.
pub fn start_time_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything: count from behind its closing bracket, where the state (field 3) comes first.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// A handle (a pidfd) of the process that has this number now, if there is one and it may be had. Whether that is the process that was meant is to be asked behind it: while that one lives both have the
/// number.
pub fn handle(pid: u32) -> Option<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
    pidfd_open(pid, PidfdFlags::empty()).ok()
}

/// Whether the process of this handle (a pidfd) has ended, waited for up to `limit`. A zombie has.
pub fn has_ended(handle: impl AsFd, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        // A limit beyond what the kernel can count is none.
        let left = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(&handle, PollFlags::IN)], left.as_ref()) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_vm_is_refused_by_reason() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert!(matches!(KvmProcess::open(child.id()), Err(ProcessError::NoVm(_))));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(KvmProcess::open(child.id()), Err(ProcessError::Gone(_))));
        assert!(matches!(KvmProcess::open(u32::MAX), Err(ProcessError::Gone(_))));
    }

    #[test]
    fn a_thread_is_named_with_its_process() {
        std::thread::spawn(|| {
            let thread = rustix::thread::gettid().as_raw_nonzero().get() as u32;
            assert!(
                matches!(KvmProcess::open(thread), Err(ProcessError::Thread { pid, .. }) if pid == std::process::id())
            );
        })
        .join()
        .unwrap();
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn a_vm_shows_its_cpus_until_it_ends() {
        use crate::model::{DirtyLogKind, PageCount};
        let _vm = crate::trial::tiny_vm::TinyVm::new(PageCount(4), DirtyLogKind::Bitmap).unwrap();
        let process = KvmProcess::open(std::process::id()).unwrap();
        // Tests of one process may run side by side, each with a VM of its own.
        assert!(process.cpus() >= 1 && process.address_space_bytes > 1 << 20 && process.is_alive());
        assert!(process.thread_name(process.pid).is_some());
        assert!(process.has_memory());
        let earlier = KvmProcess { start_time_ticks: process.start_time_ticks - 1, ..process };
        assert!(!earlier.is_alive() && !earlier.has_memory());
        assert!(KvmProcess::all().iter().any(|process| process.pid == std::process::id()));
    }
}
