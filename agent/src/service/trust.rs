//! Which files an encrypted link is made with: those of the options, else of the configuration, else where `dunlin pki` says that they belong.

use std::path::{Path, PathBuf};

use super::config::TlsConfig;
use crate::link::{Address, Tls, TlsError, TlsFiles};

/// Where a host's files are unless told otherwise. They need not exist.
pub const DEFAULT_DIR: &str = "/etc/dunlin/pki";
/// Certificates of the CAs, in [`DEFAULT_DIR`].
pub const CA_FILE: &str = "ca.pem";
/// The host's certificate there.
pub const CERT_FILE: &str = "host.pem";
/// Its key there.
pub const KEY_FILE: &str = "host.key";
/// Revocation lists there.
pub const CRL_FILE: &str = "crl.pem";

/// What an operator has said of encryption.
#[derive(Clone, Debug, Default)]
pub struct TlsOptions {
    /// Files that are not where they belong.
    pub files: TlsConfig,
    /// The name that a target's certificate must have, if not that of the address.
    pub name: Option<String>,
}

/// The files of a host whose others are in `dir`. The revocation list there is that of the CA there.
fn files(given: &TlsConfig, dir: &Path) -> TlsFiles {
    let at = |path: &Option<PathBuf>, name: &str| path.clone().unwrap_or_else(|| dir.join(name));
    let list = || Some(dir.join(CRL_FILE)).filter(|path| given.ca.is_none() && path.exists());
    TlsFiles {
        ca: at(&given.ca, CA_FILE),
        cert: at(&given.cert, CERT_FILE),
        key: at(&given.key, KEY_FILE),
        crl: given.crl.clone().or_else(list),
    }
}

/// Reads what an encrypted link to or at `address` needs; nothing for one in the clear.
///
/// # Errors
/// Files that are not there, or cannot be used.
pub fn tls_for(address: &Address, options: &TlsOptions) -> Result<Option<Tls>, TlsError> {
    if !address.is_encrypted() {
        return Ok(None);
    }
    Tls::load(&files(&options.files, Path::new(DEFAULT_DIR)), options.name.as_deref()).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revocation_list_is_taken_unasked_only_with_the_ca_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(files(&TlsConfig::default(), folder.path()).crl, None);
        std::fs::write(folder.path().join(CRL_FILE), "").unwrap();
        let all = files(&TlsConfig::default(), folder.path());
        assert_eq!((all.ca, all.crl), (folder.path().join("ca.pem"), Some(folder.path().join("crl.pem"))));
        let given = TlsConfig { ca: Some("/ca".into()), ..TlsConfig::default() };
        let other = files(&given, folder.path());
        assert_eq!((other.ca, other.cert, other.crl), ("/ca".into(), folder.path().join("host.pem"), None));
    }
}
