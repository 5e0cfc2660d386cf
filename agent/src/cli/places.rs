//! Options that several commands have and the configuration file may set: where a host's VMs and journals are, how links are secured, and
//! whether plain TCP may leave it.

use std::path::PathBuf;

use clap::Args;

use crate::service::config::{Config, TlsConfig};
use crate::service::trust::TlsOptions;

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

/// What links to and at tls:// addresses are made with.
#[derive(Debug, Args)]
pub(super) struct TlsFileArgs {
    /// Of tls:// links: certificates of the CAs whose hosts are trusted, PEM [default: /etc/dunlin/pki/ca.pem].
    #[arg(id = "tls_ca", long = "tls-ca", value_name = "FILE")]
    ca: Option<PathBuf>,

    /// Of tls:// links: this host's certificate, PEM [default: /etc/dunlin/pki/host.pem].
    #[arg(id = "tls_cert", long = "tls-cert", value_name = "FILE")]
    cert: Option<PathBuf>,

    /// Of tls:// links: its private key, PEM [default: /etc/dunlin/pki/host.key].
    #[arg(id = "tls_key", long = "tls-key", value_name = "FILE")]
    key: Option<PathBuf>,

    /// Of tls:// links: revocation lists, PEM [default: /etc/dunlin/pki/crl.pem, if there is one and the CA is the one beside it].
    #[arg(id = "tls_crl", long = "tls-crl", value_name = "FILE")]
    crl: Option<PathBuf>,
}

impl TlsFileArgs {
    /// Each the option, else the configuration. A list that the configuration names is that of the CA that it names.
    pub(super) fn options(&self, config: &Config, name: Option<String>) -> TlsOptions {
        let or = |own: &Option<PathBuf>, configured: &Option<PathBuf>| own.clone().or_else(|| configured.clone());
        let files = TlsConfig {
            ca: or(&self.ca, &config.tls.ca),
            cert: or(&self.cert, &config.tls.cert),
            key: or(&self.key, &config.tls.key),
            crl: or(&self.crl, if self.ca.is_some() { &None } else { &config.tls.crl }),
        };
        TlsOptions { files, name }
    }
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
        absolute(self.run_dir.unwrap_or_else(|| config.run_dir.clone()))
    }
}

/// Other processes find the folder by this path, from wherever they run.
fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

impl StateDir {
    /// The folder: the option's, else the configuration's.
    pub(super) fn path(self, config: &Config) -> PathBuf {
        absolute(self.state_dir.unwrap_or_else(|| config.state_dir.clone()))
    }
}
