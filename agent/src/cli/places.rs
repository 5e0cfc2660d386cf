//! The options that say where a host's VMs and journals are, the same for every command.

use std::path::PathBuf;

use clap::Args;

use crate::service::registry::{DEFAULT_RUN_DIR, DEFAULT_STATE_DIR};

/// Where VMs are listed.
#[derive(Debug, Args)]
pub(super) struct RunDir {
    /// Folder with one entry and the sockets of each VM.
    #[arg(long, value_name = "D", default_value = DEFAULT_RUN_DIR)]
    pub(super) run_dir: PathBuf,
}

/// Where journals are.
#[derive(Debug, Args)]
pub(super) struct StateDir {
    /// Folder with journals and the audit log; it must survive a reboot.
    #[arg(long, value_name = "D", default_value = DEFAULT_STATE_DIR)]
    pub(super) state_dir: PathBuf,
}
