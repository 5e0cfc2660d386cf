//! What a VM is made of: the options of `dunlin vm run` and of the guest.

use dunlin::model::DirtyLogKind;

use anyhow::Result;

use super::Rig;
use crate::guest;
use crate::linux::LinuxGuest;

/// A VM with the test guest, or with Linux.
#[derive(Clone, Debug)]
pub struct VmSpec {
    /// Number of vCPUs.
    pub cpus: u32,
    /// RAM.
    pub memory_bytes: u64,
    /// How its writes are logged.
    pub dirty_log: DirtyLogKind,
    /// Size of its disk, a file that both hosts share; none without.
    pub disk_bytes: Option<u64>,
    /// Linux instead of the test guest; its disk then has a file system.
    pub linux: Option<LinuxGuest>,
    /// What more is said of its network port when it is started: `,gateway=A` and the like.
    pub net: String,
    /// Further options of `dunlin vm run`.
    pub more: Vec<String>,
    /// Options of the guest besides its addresses and number of vCPUs.
    pub guest: String,
}

impl Default for VmSpec {
    fn default() -> Self {
        Self {
            cpus: 2,
            memory_bytes: 256 << 20,
            dirty_log: DirtyLogKind::Bitmap,
            disk_bytes: None,
            linux: None,
            net: String::new(),
            more: Vec::new(),
            guest: "dunlin.wl=ws:32M,rate:5000".to_owned(),
        }
    }
}

impl VmSpec {
    /// A guest that writes at random places of its memory and of a disk, and beats each 5 ms.
    pub fn busy(cpus: u32, dirty_log: DirtyLogKind) -> Self {
        Self {
            cpus,
            dirty_log,
            disk_bytes: Some(64 << 20),
            guest: "dunlin.wl=ws:48M,rate:8000,pattern:random dunlin.blk=rate:200,span:16M dunlin.heartbeat=5ms"
                .to_owned(),
            ..Self::default()
        }
    }

    /// The options of `dunlin vm run` that say this.
    pub(super) fn arguments(&self) -> Result<Vec<String>> {
        let log = match self.dirty_log {
            DirtyLogKind::Bitmap => "bitmap",
            DirtyLogKind::Ring => "ring",
        };
        let options = format!("dunlin.ip={}/24 {}", Rig::guest_ip(), self.guest);
        let (system, cmdline) = match &self.linux {
            None => {
                let kernel = guest::elf()?.display().to_string();
                let own = format!("dunlin.cpus={} dunlin.ip6={}/64", self.cpus, Rig::guest_ip6());
                (vec!["--kernel".to_owned(), kernel], format!("{own} {options}"))
            }
            Some(linux) => (linux.arguments(), format!("{} {options}", linux.cmdline())),
        };
        let memory = format!("{}MiB", self.memory_bytes >> 20);
        let cpus = self.cpus.to_string();
        let rest = ["--memory", &memory, "--cpus", &cpus, "--dirty-log", log, "--cmdline", &cmdline].map(str::to_owned);
        Ok([&system, &rest[..], &self.more].concat())
    }
}
