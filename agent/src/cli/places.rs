//! Options that several commands have and the configuration file may set: where a host's VMs and journals are, and whether
//! plain TCP may leave it.

use std::path::PathBuf;

use clap::Args;

use crate::service::config::Config;

/// Where VMs are listed.
#[derive(Debug, Args)]
pub(super) struct RunDir {
    /// Folder with one entry and the sockets of each VM [default: /run/dunlin].
    #[arg(long, value_name = "D")]
    run_dir: Option<PathBuf>,
}

/// Where journals are.
#[derive(Debug, Args)]
pub(super) struct StateDir {
    /// Folder with journals and the audit log; it must survive a reboot [default: /var/lib/dunlin].
    #[arg(long, value_name = "D")]
    state_dir: Option<PathBuf>,
}

/// Whether guest memory may travel in the clear.
#[derive(Debug, Args)]
pub(super) struct Plaintext {
    /// Allow plain TCP beyond loopback: guest memory travels in the clear [default: false].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    insecure_plaintext: Option<bool>,
}

impl Plaintext {
    /// The option, else the configuration.
    pub(super) fn is_allowed(&self, config: &Config) -> bool {
        self.insecure_plaintext.unwrap_or(config.migrate.insecure_plaintext)
    }
}

impl RunDir {
    /// The folder: the option's, else the configuration's.
    pub(super) fn path(self, config: &Config) -> PathBuf {
        self.run_dir.unwrap_or_else(|| config.run_dir.clone())
    }
}

impl StateDir {
    /// The folder: the option's, else the configuration's.
    pub(super) fn path(self, config: &Config) -> PathBuf {
        self.state_dir.unwrap_or_else(|| config.state_dir.clone())
    }
}
