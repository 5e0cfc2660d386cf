//! A VM that is not ours with the test guest in it: QEMU, on KVM or in software, with RAM of the kind that is asked for. Runs wherever the
//! test guest does.

use std::fs::File;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::hosted::guest;
use crate::process::OwnProcess;
use crate::serial::SerialLog;

/// RAM.
const MEMORY_MIB: u32 = 128;

/// What runs the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// KVM.
    Kvm,
    /// QEMU itself.
    Tcg,
}

/// What guest RAM is in QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ram {
    /// Private anonymous memory: QEMU's default.
    Anonymous,
    /// A shared memory file.
    MemoryFile,
    /// A memory file of which QEMU has a private mapping.
    PrivateMemoryFile,
    /// A shared memory file of 2 MiB pages, of which the host must have set enough aside.
    HugePages,
}

impl Ram {
    fn backend(self) -> Option<&'static str> {
        match self {
            Self::Anonymous => None,
            Self::MemoryFile => Some("share=on"),
            Self::PrivateMemoryFile => Some("share=off"),
            Self::HugePages => Some("share=on,hugetlb=on,hugetlbsize=2M"),
        }
    }
}

/// Pages of 2 MiB that guest RAM needs, and the host has free.
pub fn has_huge_pages() -> bool {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    free.is_ok_and(|text| text.trim().parse::<u32>().is_ok_and(|pages| pages >= MEMORY_MIB / 2))
}

/// A QEMU process with the test guest inside; killed on drop.
#[derive(Debug)]
pub struct BareVm {
    process: OwnProcess,
    folder: TempDir,
}

impl BareVm {
    /// Boots the test guest with `workload` on its command line; returns when it works.
    ///
    /// # Errors
    /// What QEMU said.
    pub fn boot(accelerator: Accelerator, ram: Ram, workload: &str) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("dunlin-bare-").tempdir()?;
        let file = |name: &str| folder.path().join(name);
        let mut command = Command::new("qemu-system-x86_64");
        match accelerator {
            Accelerator::Kvm => command.args(["-accel", "kvm", "-cpu", "host,-arch-capabilities"]),
            Accelerator::Tcg => command.args(["-accel", "tcg", "-cpu", "max"]),
        };
        command.args(["-machine", "microvm,acpi=off,rtc=off,x-option-roms=off", "-bios", "qboot.rom"]);
        command.args(["-m", &MEMORY_MIB.to_string(), "-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-no-reboot", "-append", workload]).arg("-kernel").arg(guest());
        command.args(["-serial", &format!("file:{}", file("serial").display())]);
        if let Some(options) = ram.backend() {
            command.args(["-machine", "memory-backend=ram", "-object"]);
            command.arg(format!("memory-backend-memfd,id=ram,size={MEMORY_MIB}M,{options}"));
        }
        let errors = File::create(file("errors"))?;
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors).spawn().context("start QEMU")?;
        let vm = Self { process: OwnProcess::new(child), folder };
        let errors = || std::fs::read_to_string(vm.folder.path().join("errors")).unwrap_or_default();
        vm.serial().await_ready().with_context(errors)?;
        Ok(vm)
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The guest's console.
    pub fn serial(&self) -> SerialLog {
        SerialLog::new(self.folder.path().join("serial"))
    }
}
