//! Owns the kernel command line: every option of the guest and of its virtio-mmio devices.

use crate::units;
use crate::{block, pool, workload};

/// Most vCPUs that the guest drives.
pub const MAX_CPUS: usize = 16;
/// Most virtio-mmio transports that are looked at.
pub const MAX_DEVICES: usize = 16;

/// A virtio-mmio transport (`virtio_mmio.device=SIZE@ADDRESS:GSI`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transport {
    /// Guest-physical address of its registers.
    pub address: u64,
    /// Bytes of its registers.
    pub bytes: u64,
    /// Global system interrupt, which is the IOAPIC pin.
    pub gsi: u32,
}

/// An IPv4 address with its prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub octets: [u8; 4],
    /// Length of the network's prefix.
    pub prefix: u8,
}

/// An IPv6 address with its prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address6 {
    /// The address.
    pub octets: [u8; 16],
    /// Length of the network's prefix.
    pub prefix: u8,
}

/// The network interface's place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// Its IPv4 address.
    pub address: Option<Address>,
    /// Its IPv6 address.
    pub address6: Option<Address6>,
    /// Default gateway of IPv4.
    pub gateway: Option<[u8; 4]>,
}

impl Network {
    /// True when it has an address.
    pub fn is_there(&self) -> bool {
        self.address.is_some() || self.address6.is_some()
    }
}

/// Everything that the command line says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Number of vCPUs.
    pub cpus: usize,
    /// Frequency of the time stamp counter when the VMM tells it.
    pub tsc_khz: Option<u64>,
    /// Workload of each vCPU.
    pub workloads: [workload::Spec; MAX_CPUS],
    /// Block workload.
    pub block: block::Spec,
    /// Memory that it can do without.
    pub pool: pool::Spec,
    /// The network interface.
    pub network: Network,
    /// Time between two heartbeats; 0 is off.
    pub heartbeat_ns: u64,
    /// Time between two status lines.
    pub stat_ns: u64,
    /// Time between two inter-processor interrupts of one sender; 0 is off.
    pub ipi_ns: u64,
    /// Longest time between two timer interrupts of a busy vCPU.
    pub tick_ns: u64,
    /// Time between two batches of a workload that keeps a rate.
    pub slice_ns: u64,
    /// Length of the windows of which writers tell their own truth; 0 is off.
    pub window_ns: u64,
    /// True when the guest offers to hold its writers when the host asks for it.
    pub stun: bool,
    /// True when vCPU 0 spins instead of halting between two batches.
    pub spin: bool,
    /// Devices.
    pub devices: [Transport; MAX_DEVICES],
    /// Number of devices.
    pub device_count: usize,
    /// Options of ours that were not understood.
    pub bad_options: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cpus: 1,
            tsc_khz: None,
            workloads: [workload::Spec::default(); MAX_CPUS],
            block: block::Spec::default(),
            pool: pool::Spec::default(),
            network: Network::default(),
            heartbeat_ns: 10_000_000,
            stat_ns: 1_000_000_000,
            ipi_ns: 20_000_000,
            tick_ns: 4_000_000,
            slice_ns: 2_000_000,
            window_ns: 0,
            stun: false,
            spin: false,
            devices: [Transport::default(); MAX_DEVICES],
            device_count: 0,
            bad_options: 0,
        }
    }
}

impl Config {
    /// Parses a whole command line. Options of others are ignored, bad values of ours are counted.
    pub fn parse(line: &str) -> Self {
        let mut config = Self::default();
        for word in line.split_ascii_whitespace() {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            if name == "virtio_mmio.device" {
                let understood = config_device(value).is_some_and(|device| config.add(device));
                config.count(understood);
            } else if let Some(name) = name.strip_prefix("dunlin.") {
                let understood = config.set(name, value).is_some();
                config.count(understood);
            }
        }
        config
    }

    fn count(&mut self, understood: bool) {
        self.bad_options += u32::from(!understood);
    }

    fn add(&mut self, device: Transport) -> bool {
        let Some(slot) = self.devices.get_mut(self.device_count) else { return false };
        *slot = device;
        self.device_count += 1;
        true
    }

    fn set(&mut self, name: &str, value: &str) -> Option<()> {
        match name {
            "cpus" => self.cpus = value.parse().ok().filter(|cpus| (1..=MAX_CPUS).contains(cpus))?,
            "tsc_khz" => self.tsc_khz = Some(value.parse().ok().filter(|khz| *khz > 0)?),
            "blk" => return self.block.set_list(value).then_some(()),
            "pool" => return self.pool.set_list(value).then_some(()),
            "ip" => self.network.address = Some(address(value)?),
            "ip6" => self.network.address6 = Some(address6(value)?),
            "gw" => self.network.gateway = Some(octets(value)?),
            "stat" => self.stat_ns = bounded_ns(value, 10_000_000, 1_000_000_000)?,
            "heartbeat" => self.heartbeat_ns = bounded_ns(value, 1_000_000, 1_000_000_000)?,
            "ipi" => self.ipi_ns = bounded_ns(value, 1_000_000, 1_000_000_000)?,
            "tick" => self.tick_ns = bounded_ns(value, 1_000_000, 100_000_000).filter(|ns| *ns > 0)?,
            "slice" => self.slice_ns = bounded_ns(value, 200_000, 20_000_000).filter(|ns| *ns > 0)?,
            "window" => self.window_ns = bounded_ns(value, 10_000_000, 10_000_000_000)?,
            "stun" => self.stun = flag(value)?,
            "spin" => self.spin = flag(value)?,
            "wl" => return self.set_workloads(value),
            _ => {
                let cpu: usize = name.strip_prefix("wl")?.parse().ok()?;
                return self.workloads.get_mut(cpu)?.set_list(value).then_some(());
            }
        }
        Some(())
    }

    fn set_workloads(&mut self, value: &str) -> Option<()> {
        let mut good = true;
        for workload in &mut self.workloads {
            good &= workload.set_list(value);
        }
        good.then_some(())
    }
}

fn bounded_ns(value: &str, least: u64, most: u64) -> Option<u64> {
    units::duration_ns(value).filter(|ns| *ns == 0 || (least..=most).contains(ns))
}

fn flag(value: &str) -> Option<bool> {
    match value {
        "0" => Some(false),
        "1" => Some(true),
        _ => None,
    }
}

fn config_device(value: &str) -> Option<Transport> {
    let (bytes, rest) = value.split_once('@')?;
    let mut parts = rest.split(':');
    let address = units::integer(parts.next()?)?;
    let gsi = parts.next()?.parse().ok()?;
    Some(Transport { address, bytes: units::size_bytes(bytes)?, gsi })
}

fn octets(value: &str) -> Option<[u8; 4]> {
    let mut parts = value.split('.');
    let mut octets = [0; 4];
    for octet in &mut octets {
        *octet = parts.next()?.parse().ok()?;
    }
    parts.next().is_none().then_some(octets)
}

fn address(value: &str) -> Option<Address> {
    let (ip, prefix) = value.split_once('/').unwrap_or((value, "24"));
    let prefix = prefix.parse().ok().filter(|prefix| *prefix <= 32)?;
    Some(Address { octets: octets(ip)?, prefix })
}

fn address6(value: &str) -> Option<Address6> {
    let (ip, prefix) = value.split_once('/').unwrap_or((value, "64"));
    let prefix = prefix.parse().ok().filter(|prefix| *prefix <= 128)?;
    Some(Address6 { octets: ip.parse::<core::net::Ipv6Addr>().ok()?.octets(), prefix })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::{Pattern, UNTHROTTLED};

    #[test]
    fn a_full_line_is_understood() {
        let config = Config::parse(
            "console=ttyS0 dunlin.cpus=2 dunlin.tsc_khz=2450000 dunlin.wl0=ws:64M,rate:50000,pattern:random \
             dunlin.wl1=rate:max,share:5 dunlin.ip=10.0.0.2/16 dunlin.gw=10.0.0.1 dunlin.ip6=fd00::2 dunlin.blk=rate:100,span:8M dunlin.pool=size:8M,churn:50 \
             dunlin.stat=50ms dunlin.heartbeat=1ms dunlin.spin=1 dunlin.stun=1 dunlin.ipi=0 dunlin.tick=1ms dunlin.slice=500us dunlin.window=1280ms \
             virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=512@0xfeb00000:16:3",
        );
        assert_eq!(config.bad_options, 0);
        assert_eq!((config.cpus, config.tsc_khz), (2, Some(2_450_000)));
        assert_eq!(config.workloads[0].rate_pages_per_second, 50_000);
        assert_eq!(config.workloads[0].pattern, Pattern::Random);
        assert_eq!(config.workloads[1].rate_pages_per_second, UNTHROTTLED);
        assert_eq!(config.network.address, Some(Address { octets: [10, 0, 0, 2], prefix: 16 }));
        assert_eq!(config.network.gateway, Some([10, 0, 0, 1]));
        let octets = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
        assert_eq!(config.network.address6, Some(Address6 { octets, prefix: 64 }));
        assert_eq!((config.pool.bytes, config.pool.churn_pages_per_second), (8 << 20, 50));
        assert_eq!(config.stat_ns, 50_000_000);
        assert_eq!((config.heartbeat_ns, config.spin, config.ipi_ns), (1_000_000, true, 0));
        assert_eq!((config.tick_ns, config.slice_ns), (1_000_000, 500_000));
        assert_eq!(config.window_ns, 1_280_000_000);
        assert_eq!(config.device_count, 2);
        assert_eq!(config.devices[0], Transport { address: 0xd000_0000, bytes: 4096, gsi: 5 });
        assert_eq!(config.devices[1], Transport { address: 0xfeb0_0000, bytes: 512, gsi: 16 });
    }

    #[test]
    fn one_line_for_all_workloads() {
        let config = Config::parse("dunlin.wl=ws:8M,rate:10 dunlin.wl3=rate:0");
        assert_eq!(config.workloads[0].rate_pages_per_second, 10);
        assert_eq!(config.workloads[3].rate_pages_per_second, 0);
        assert_eq!(config.workloads[3].working_set_bytes, 8 << 20);
    }

    #[test]
    fn bad_values_are_counted_and_change_nothing() {
        let bad = "dunlin.cpus=0 dunlin.cpus=99 dunlin.tsc_khz=0 dunlin.ip=1.2.3 dunlin.ip=1.2.3.4/33 dunlin.ip6=1.2.3.4 dunlin.ip6=::1/129 dunlin.gw=x \
                   dunlin.heartbeat=2us dunlin.heartbeat=5 dunlin.window=1ms dunlin.wl99=rate:1 dunlin.tick=0 dunlin.spin=yes dunlin.what=1 \
                   virtio_mmio.device=4K virtio_mmio.device=4K@zz:1";
        let config = Config::parse(bad);
        assert_eq!(config.bad_options, 17);
        assert_eq!(Config { bad_options: 0, ..config }, Config::default());
        assert_eq!(Config::parse(""), Config::default());
        assert_eq!(Config::parse("root=/dev/vda quiet"), Config::default());
    }

    #[test]
    fn more_devices_than_slots_are_counted() {
        let line = "virtio_mmio.device=4K@0xd0000000:5 ".repeat(MAX_DEVICES + 1);
        let config = Config::parse(&line);
        assert_eq!((config.device_count, config.bad_options), (MAX_DEVICES, 1));
    }
}
