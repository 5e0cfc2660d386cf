//! `dunlin vm run`: boots a VM in this process, or (started by `dunlin vm receive`) becomes one.

use std::os::fd::{FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use super::super::places::{RunDir, StateDir};
use super::super::signals::cancel_on_signals;
use crate::announce::conflict::OnConflict;
use crate::kvm::MachineExit;
use crate::kvm::boot::BootImage;
use crate::kvm::machine::BootConfig;
use crate::migrate::CancelFlag;
use crate::model::id::VmName;
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::model::units::parse_size_bytes;
use crate::model::{DirtyLogKind, DiskSpec, NetSpec, SerialSpec, VmId};
use crate::service::announce::inquiry::{self, InquiryOrder};
use crate::service::config::Config;
use crate::service::control;
use crate::service::machine::{Host, HostError, Places, session_from_fd};
use crate::service::out::{complain, say};

/// How often the main thread looks for signals.
const TICK: Duration = Duration::from_millis(100);

/// Boot a VM from a kernel and run it in this process until it ends.
///
/// The VM answers to `dunlin vm …`, `dunlin migrate` and `dunlin dirty-rate` by its name. Ctrl-C stops it. When it has
/// been migrated away, the process ends with code 0.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin vm run --name web1 --kernel guest.elf --memory 256MiB --cpus 2 --serial stdio
  dunlin vm run --name web1 --kernel guest.elf --cmdline 'dunlin.ip=10.0.0.2/24' \\
      --net tap=tap0,mac=52:54:00:00:00:01,ip=10.0.0.2 --disk path=disk.img --serial file=web1.log
  dunlin vm run --name web2 --kernel guest.elf --net tap=tap1,mac=52:54:00:00:00:02,ip=10.0.0.3 --on-conflict refuse
  dunlin vm run --name deb1 --kernel vmlinuz --initrd initrd.img --cmdline 'console=ttyS0' --serial stdio

Exit codes: 0 the guest switched off, was stopped or moved away; 1 it crashed; 2 wrong arguments; 3 refused.")]
pub(in crate::cli) struct RunArgs {
    /// The VM's name.
    #[arg(long, value_name = "N", required_unless_present = "incoming_fd")]
    name: Option<VmName>,

    /// Kernel to boot: a Linux bzImage, or a 64-bit ELF with a PVH entry (vmlinux).
    #[arg(long, value_name = "FILE", required_unless_present = "incoming_fd")]
    kernel: Option<PathBuf>,

    /// Initial RAM disk for a Linux kernel.
    #[arg(long, value_name = "FILE", conflicts_with = "incoming_fd")]
    initrd: Option<PathBuf>,

    /// Command line for the guest; Dunlin adds what it must know of the machine.
    #[arg(long, value_name = "S", default_value = "")]
    cmdline: String,

    /// Guest RAM.
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = parse_size_bytes)]
    memory: u64,

    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=1024))]
    cpus: u32,

    /// How the guest's writes are logged during migration: bitmap or ring. Fixed for the VM's life.
    #[arg(long, value_name = "KIND", default_value = "bitmap")]
    dirty_log: DirtyLogKind,

    /// The VM's identity; made up if absent.
    #[arg(long, value_name = "U")]
    uuid: Option<VmId>,

    /// Network port tap=T,mac=M[,ip=A]...[,router=A]...[,gateway=A]...[,vlan=V]; may be given several times. Addresses are announced after a migration (router=: an IPv6 address of a VM that routes; vlan=: tags that the VM's frames carry), and the VM hears from its gateways.
    #[arg(long = "net", value_name = "SPEC")]
    nets: Vec<NetSpec>,

    /// What to do when somebody else has the VM's addresses, which is asked before it starts and takes a third of a second: refuse, warn, or off [default: off].
    #[arg(long, value_name = "POLICY", conflicts_with = "incoming_fd")]
    on_conflict: Option<OnConflict>,

    /// Disk `path=F[,readonly]`; may be given several times.
    #[arg(long = "disk", value_name = "SPEC")]
    disks: Vec<DiskSpec>,

    /// Give the guest random bytes of this host's kernel (virtio-rng).
    #[arg(long)]
    rng: bool,

    /// Let the guest give memory back: balloon, free-page reporting and hinting (virtio-balloon).
    #[arg(long)]
    balloon: bool,

    /// Take guest RAM from the huge pages of 2 MiB that the host has set aside (vm.nr_hugepages).
    #[arg(long)]
    hugepages: bool,

    /// Console: stdio, none, file=F or socket=F.
    #[arg(long, value_name = "SPEC", default_value = "none")]
    serial: SerialSpec,

    /// Become the machine that a manager describes on this descriptor.
    #[arg(long, hide = true, conflicts_with_all = ["name", "kernel"])]
    incoming_fd: Option<i32>,

    #[command(flatten)]
    run_dir: RunDir,

    #[command(flatten)]
    state_dir: StateDir,
}

/// How a machine's process ended.
#[derive(Debug, Serialize)]
struct EndReport {
    name: String,
    vm_id: VmId,
    ending: &'static str,
    reason: String,
}

impl Schema for EndReport {
    const SCHEMA: &'static str = "dunlin.vm-end/v1";
}

/// A report with every member: for the test of the documentation.
#[cfg(test)]
pub(in crate::cli) fn sample() -> serde_json::Value {
    let report = EndReport { name: String::new(), vm_id: VmId::random(), ending: "", reason: String::new() };
    serde_json::to_value(report.tagged()).unwrap()
}

impl RunArgs {
    pub(in crate::cli) fn is_incoming(&self) -> bool {
        self.incoming_fd.is_some()
    }

    pub(in crate::cli) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let cancel = cancel_on_signals()?;
        let boots = self.incoming_fd.is_none();
        let host = match self.incoming_fd {
            Some(number) => incoming(number)?,
            None => match self.boot(config) {
                Ok(Some(host)) => host,
                Ok(None) => return Ok(exit::REFUSED),
                Err(error @ (HostError::InDoubt { .. } | HostError::Registry(_))) => {
                    complain!("dunlin: refused: {error}");
                    return Ok(exit::REFUSED);
                }
                Err(error) => return Err(error).context("the VM could not be started"),
            },
        };
        let served = serve(&host)?;
        if boots {
            host.start()?;
        }
        let code = watch(&host, &cancel, json);
        // The order that ended the machine is perhaps not answered yet.
        served.finish();
        Ok(code)
    }

    /// `None` if somebody else has its addresses, which has been said.
    fn boot(self, defaults: &Config) -> Result<Option<Arc<Host>>, HostError> {
        let (Some(name), Some(kernel)) = (self.name, self.kernel) else {
            unreachable!("clap requires both without --incoming-fd")
        };
        let image =
            BootImage::read(&kernel, self.initrd.as_deref(), &self.cmdline).map_err(crate::kvm::HostedError::from)?;
        let config = BootConfig {
            vm_id: self.uuid.unwrap_or_else(VmId::random),
            name,
            memory_bytes: self.memory,
            cpus: self.cpus,
            dirty_log: self.dirty_log,
            nets: self.nets,
            disks: self.disks,
            rng: self.rng,
            balloon: self.balloon,
            hugepages: self.hugepages,
            image,
        };
        let places = Places { run_dir: self.run_dir.path(defaults), state_dir: self.state_dir.path(defaults) };
        let order = InquiryOrder {
            policy: self.on_conflict.or(defaults.announce.on_conflict).unwrap_or_default(),
            vm_id: config.vm_id,
            nets: config.nets.clone(),
            run_dir: places.run_dir.clone(),
        };
        let asked = inquiry::before_start(order, &places.state_dir);
        for words in &asked.warnings {
            complain!("dunlin: {words}");
        }
        if let Some(reason) = asked.refusal {
            complain!("dunlin: refused: {reason}; or start it all the same with --on-conflict warn");
            return Ok(None);
        }
        Host::boot(config, self.serial, &places).map(Some)
    }
}

/// Becomes the machine that the manager at descriptor `number` describes, and serves its session beside.
fn incoming(number: i32) -> anyhow::Result<Arc<Host>> {
    rustix::io::fcntl_getfd(
        // SAFETY: only asked whether it is open; nothing is kept.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(number) },
    )
    .context("--incoming-fd is for processes that `dunlin vm receive` starts")?;
    // SAFETY: it is open, and the parent handed it over for us to own; nothing else here knows the number.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    let (host, socket) = Host::incoming(session_from_fd(fd)?)?;
    let session = Arc::clone(&host);
    std::thread::Builder::new().name("session".into()).spawn(move || session.serve_first_session(socket))?;
    Ok(host)
}

fn serve(host: &Arc<Host>) -> anyhow::Result<control::Served> {
    host.listen_for_sessions()?;
    control::serve(host).context("the control sockets could not be made")
}

/// Waits for the end, which a signal brings about.
fn watch(host: &Arc<Host>, cancel: &CancelFlag, json: bool) -> u8 {
    let exit = loop {
        if let Some(exit) = host.wait_end(TICK) {
            break exit;
        }
        if cancel.is_set() {
            host.machine().stop();
        }
    };
    let (ending, reason, code) = match exit {
        MachineExit::PowerOff => ("power-off", String::new(), exit::DONE),
        MachineExit::Stopped => ("stopped", String::new(), exit::DONE),
        MachineExit::Error(reason) => ("error", reason, exit::ERROR),
    };
    let shape = host.shape();
    if json {
        let report = EndReport { name: shape.name.to_string(), vm_id: shape.vm_id, ending, reason };
        say!("{}", serde_json::to_string(&report.tagged()).unwrap_or_default());
    } else if code != exit::DONE {
        complain!("dunlin: VM {} ended: {reason}", shape.name);
    }
    code
}
