//! `dunlin resolve`: an operator decides who owns a VM in doubt.

use anyhow::Context;
use clap::{Args, ValueEnum};

use super::places::{RunDir, StateDir};
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::model::{Owner, VmRef};
use crate::service::config::Config;
use crate::service::control::{Outcome, give_order};
use crate::service::out::{complain, say};
use crate::service::registry::Registry;
use crate::service::resolve::resolve_without_machine;

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Side {
    Here,
    There,
}

/// Decide who owns a VM whose migration ended in doubt.
///
/// A migration is in doubt when contact was lost between the source's letting go and the target's running: neither side
/// runs the VM by itself then. Look at both hosts (`dunlin vm info`), then say on each who owns it. Saying `here` on both
/// runs the VM twice: the journal keeps who said so.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin resolve web1 --owner there         # on the source, when the target has the VM
  dunlin resolve web1 --owner here          # on the one host that shall run it
  dunlin resolve uuid:6ba7b810-9dad-41d1-80b4-00c04fd430c8 --owner here   # after its machine process has died

Exit codes: 0 done, 1 failed, 2 wrong arguments, 3 refused: the VM is not in doubt here.")]
pub(super) struct ResolveArgs {
    /// The VM: NAME, uuid:U or pid:P. Without a live machine process only uuid:U.
    vm: VmRef,

    /// Which side owns it, seen from this host.
    #[arg(long, value_enum)]
    owner: Side,

    #[command(flatten)]
    run_dir: RunDir,

    #[command(flatten)]
    state_dir: StateDir,
}

impl ResolveArgs {
    pub(super) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let owner = match self.owner {
            Side::Here => Owner::Here,
            Side::There => Owner::There,
        };
        let word = owner.name();
        let (registry, state_dir) = (Registry::new(self.run_dir.path(config)), self.state_dir.path(config));
        let result = match (registry.find(&self.vm), &self.vm) {
            (Ok(entry), _) => {
                let socket = registry.served(&entry, "control");
                give_order(&socket, &format!("/v1/resolve?owner={word}"), &[]).map_err(|error| error.to_string())
            }
            (Err(_), VmRef::Uuid(id)) => resolve_without_machine(&state_dir, *id, owner)
                .with_context(|| format!("journals in {}", state_dir.display()))?,
            (Err(error), _) => Err(error.to_string()),
        };
        let error = result.err().unwrap_or_default();
        let code = if error.is_empty() { exit::DONE } else { exit::REFUSED };
        if json {
            say!("{}", serde_json::to_string(&Outcome { error }.tagged())?);
        } else if error.is_empty() {
            say!("{}: the owner is {word}", self.vm);
        } else {
            complain!("dunlin: {error}");
        }
        Ok(code)
    }
}
