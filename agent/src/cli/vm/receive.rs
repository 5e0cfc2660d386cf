//! `dunlin vm receive`: waits for one VM, then runs it.

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use super::super::network;
use super::super::places::{Plaintext, RunDir, StateDir, TlsFileArgs};
use super::super::signals::cancel_on_signals;
use super::super::watch::Watch;
use crate::announce::conflict::OnConflict;
use crate::link::{Address, Listener};
use crate::model::id::VmName;
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::model::{DiskSpec, MigrationId, NetSpec, NetworkReport, SerialSpec, VmRef};
use crate::service::config::Config;
use crate::service::machine::Places;
use crate::service::migration::check_plaintext;
use crate::service::out::{complain, say};
use crate::service::receive::{ReceiveError, ReceiveRequest, answer_questions, receive, recover};
use crate::service::trust::tls_for;

/// Wait for one VM that `dunlin migrate` sends, then run it.
///
/// The VM gets a machine process of its own, which goes on when this one ends. An attempt that fails before the VM is here
/// leaves nothing, and the wait goes on. Ctrl-C ends the wait; later it ends only this manager, not the VM.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin vm receive --listen tcp://127.0.0.1:4460
  dunlin vm receive --listen tls://192.0.2.7:4460
  dunlin vm receive --listen tcp://192.0.2.7:4460 --insecure-plaintext \\
      --net tap=tap7,mac=52:54:00:00:00:01 --disk path=/srv/disk.img --serial file=web1.log
  dunlin vm receive --listen tls://192.0.2.7:4460 --on-conflict refuse
  dunlin vm receive --listen tls://198.51.100.7:4460 --net tap=tap7,mac=52:54:00:00:00:01 --tunnel
  dunlin vm receive --listen tcp://192.0.2.7:4460 --insecure-plaintext --recover web1

Exit codes: 0 the VM came and has ended, or moved on; 1 it crashed; 2 wrong arguments; 3 refused; 6 cancelled.")]
pub(in crate::cli) struct ReceiveArgs {
    /// Where to listen: tls://ADDR:PORT, or tcp://ADDR:PORT in the clear; port 0 lets the kernel choose, and the choice is printed.
    #[arg(long, value_name = "ADDRESS")]
    listen: Address,

    /// Take the place of a receiver that died: of a VM that waits here in doubt, or runs here and is owed pages. `dunlin migrate --recover` on its former host goes on then.
    #[arg(long, value_name = "VM", conflicts_with_all = ["name", "nets", "disks"])]
    recover: Option<VmRef>,

    /// The VM's name here; the source's if absent.
    #[arg(long, value_name = "N")]
    name: Option<VmName>,

    /// This host's tap for the VM's port with that MAC: tap=T,mac=M[,ip=A]...[,router=A]...[,gateway=A]...[,vlan=V]; the source's names if absent. What is not said stays as the source has it.
    #[arg(long = "net", value_name = "SPEC")]
    nets: Vec<NetSpec>,

    /// This host's path of the VM's disk, in the VM's order; a VM with disks is refused without.
    #[arg(long = "disk", value_name = "SPEC")]
    disks: Vec<DiskSpec>,

    /// What to do when somebody else has the VM's addresses, which is asked while its memory comes: refuse (the VM stays where it is), warn, or off (nobody asks) [default: warn].
    #[arg(long, value_name = "POLICY")]
    on_conflict: Option<OnConflict>,

    /// Do not announce the VM's new place: somebody else does (a fabric's controller, the guest). Until then frames for it go to its former place.
    #[arg(long)]
    no_announce: bool,

    /// Console: stdio, none, file=F or socket=F.
    #[arg(long, value_name = "SPEC", default_value = "none")]
    serial: SerialSpec,

    /// Make this host's end of a tunnel for a VM that comes with `dunlin migrate --tunnel`, so that it keeps its addresses from another subnet: its tap then leads into the tunnel, and to nothing else here.
    #[arg(long)]
    tunnel: bool,

    #[command(flatten)]
    tls: TlsFileArgs,

    #[command(flatten)]
    plaintext: Plaintext,

    #[command(flatten)]
    watch: Watch,

    #[command(flatten)]
    run_dir: RunDir,

    #[command(flatten)]
    state_dir: StateDir,
}

/// The receiver listens.
#[derive(Serialize)]
struct Listening {
    address: String,
}

impl Schema for Listening {
    const SCHEMA: &'static str = "dunlin.listening/v1";
}

/// A VM has come.
#[derive(Serialize)]
struct Came {
    migration_id: MigrationId,
    pid: u32,
    verified_pages: u64,
}

impl Schema for Came {
    const SCHEMA: &'static str = "dunlin.received/v1";
}

/// All announcements of a VM that has come are sent.
#[derive(Serialize)]
struct Announced<'a> {
    migration_id: MigrationId,
    network: &'a NetworkReport,
}

impl Schema for Announced<'_> {
    const SCHEMA: &'static str = "dunlin.received-network/v1";
}

fn print_network(migration_id: MigrationId, network: &NetworkReport, json: bool) {
    if !json {
        say!("{}", network::describe(network).trim_end());
        return;
    }
    match serde_json::to_string(&Announced { migration_id, network }.tagged()) {
        Ok(line) => say!("{line}"),
        Err(error) => complain!("dunlin: {error}"),
    }
}

/// Objects with every member: for the test of the documentation.
#[cfg(test)]
pub(in crate::cli) fn samples() -> [serde_json::Value; 3] {
    let came = Came { migration_id: MigrationId::random(), pid: 1, verified_pages: 0 };
    let listening = Listening { address: String::new() };
    let network = &NetworkReport::default();
    let announced = Announced { migration_id: MigrationId::random(), network };
    let mut announced = serde_json::to_value(announced.tagged()).unwrap();
    // Documented with the report of a migration.
    announced["network"] = serde_json::Value::Null;
    [serde_json::to_value(listening.tagged()).unwrap(), serde_json::to_value(came.tagged()).unwrap(), announced]
}

impl ReceiveArgs {
    pub(in crate::cli) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        if let Err(error) = check_plaintext(&self.listen, self.plaintext.is_allowed(config)) {
            complain!("dunlin: refused: {error}");
            return Ok(exit::REFUSED);
        }
        let tls = match tls_for(&self.listen, &self.tls.options(config, None)) {
            Ok(tls) => tls,
            Err(error) => {
                complain!("dunlin: refused: {error}");
                return Ok(exit::REFUSED);
            }
        };
        let cancel = cancel_on_signals()?;
        let listener = match Listener::bind(&self.listen, tls) {
            Ok(listener) => listener,
            Err(error) => {
                complain!("dunlin: refused: cannot listen at {}: {error}", self.listen);
                return Ok(exit::REFUSED);
            }
        };
        let address = listener.local_address()?.to_string();
        if json {
            say!("{}", serde_json::to_string(&Listening { address }.tagged())?);
        } else {
            say!("listening at {address}");
        }
        let request = ReceiveRequest {
            name: self.name,
            nets: self.nets,
            disks: self.disks,
            serial: self.serial,
            tunnel: self.tunnel,
            places: Places { run_dir: self.run_dir.path(config), state_dir: self.state_dir.path(config) },
            announce: config.announce.clone(),
            announces: !self.no_announce,
            on_conflict: self.on_conflict.or(config.announce.on_conflict).unwrap_or(OnConflict::Warn),
            events: self.watch.events,
            hold: self.watch.hold_at,
            stall: self.watch.stall.unwrap_or(config.migrate.stall),
        };
        let came = match &self.recover {
            None => receive(&request, &listener, &cancel)?,
            Some(vm) => match recover(&request, vm, &listener, &cancel) {
                Err(error @ (ReceiveError::Registry(_) | ReceiveError::Machine(_) | ReceiveError::Control(_))) => {
                    complain!("dunlin: refused: {error}");
                    return Ok(exit::REFUSED);
                }
                other => Some(other?),
            },
        };
        let Some(mut received) = came else { return Ok(exit::CANCELLED) };
        let (migration_id, pid) = (received.migration_id, received.process.id());
        if json {
            let came = Came { migration_id, pid, verified_pages: received.verified_pages };
            say!("{}", serde_json::to_string(&came.tagged())?);
        } else {
            say!("received by migration {migration_id}; it runs in process {pid}");
        }
        let mut on_network = |report: &NetworkReport| print_network(migration_id, report, json);
        let status = answer_questions(&request, &listener, &mut received, &cancel, &mut on_network)
            .context("answering late questions")?;
        Ok(match status {
            Some(true) => exit::DONE,
            Some(false) => exit::ERROR,
            // The manager goes, the VM stays.
            None => exit::DONE,
        })
    }
}
