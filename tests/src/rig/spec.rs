//! What a VM is made of: the options of `dunlin vm run` and of the guest.

use dunlin::model::DirtyLogKind;

use super::Rig;

/// A VM with the test guest.
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
            guest: "dunlin.wl=ws:32M,rate:5000".to_owned(),
        }
    }
}

impl VmSpec {
    /// The options of `dunlin vm run` that say this.
    pub(super) fn arguments(&self) -> Vec<String> {
        let log = match self.dirty_log {
            DirtyLogKind::Bitmap => "bitmap",
            DirtyLogKind::Ring => "ring",
        };
        let guest = format!("dunlin.cpus={} dunlin.ip={}/24 {}", self.cpus, Rig::guest_ip(), self.guest);
        let memory = format!("{}MiB", self.memory_bytes >> 20);
        let cpus = self.cpus.to_string();
        ["--memory", &memory, "--cpus", &cpus, "--dirty-log", log, "--cmdline", &guest].map(str::to_owned).to_vec()
    }
}
