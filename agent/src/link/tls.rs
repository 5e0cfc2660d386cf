//! Whom an encrypted link trusts: certificates, keys and revocation lists from PEM files, and what is said when trust is missing.
//!
//! TLS 1.3 (RFC 8446) alone, and mutual: each side shows a certificate and checks the other's against the CA. No sessions are resumed: each connection checks anew. Must not know what
//! flows, or how ([`super::secure`]).

use std::fs::File;
use std::io;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection,
};

use super::secure::Secure;
use super::stream::Stream;

/// A longer file is no certificate, key or list.
const MAX_BYTES: u64 = 16 << 20;

/// The files of one host, PEM each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificates of the CAs whose hosts are trusted.
    pub ca: PathBuf,
    /// This host's certificate, then those between it and a CA if there are any.
    pub cert: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// Revocation lists. With one, each certificate of a peer must be covered by some list.
    pub crl: Option<PathBuf>,
}

/// Files that no encrypted link can be made with.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file that cannot be read.
    #[error("{}: {source}; name the {what} by {option}, or make one with `dunlin pki`", path.display())]
    File {
        /// Where.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
        /// The option that names it.
        option: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file with something else in it.
    #[error("{}: no {what} as PEM in it: {problem}; check {option}", path.display())]
    Content {
        /// Where.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
        /// The option that names it.
        option: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// Certificate and key that are not of one pair, or that this build cannot use.
    #[error("{} and {} cannot be used together: {problem}; issue both anew with `dunlin pki issue`", cert.display(), key.display())]
    Pair {
        /// The certificate.
        cert: PathBuf,
        /// The key.
        key: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// CA or list that this build cannot use.
    #[error("{}: {problem}", path.display())]
    Unusable {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A name that no certificate can have.
    #[error(
        "`{0}` is neither a DNS name nor an address; write --tls-name as the target's certificate has it (`dunlin pki show`)"
    )]
    Name(String),
}

/// What is said when a handshake or a record fails.
#[derive(Debug, thiserror::Error)]
#[error("{}", explain(error))]
pub(super) struct TlsFault {
    error: rustls::Error,
}

impl TlsFault {
    pub(super) fn new(error: rustls::Error) -> Self {
        Self { error }
    }
}

/// What is wrong, and what to do.
fn explain(error: &rustls::Error) -> String {
    use AlertDescription as Alert;
    use CertificateError as Bad;
    let text = match error {
        rustls::Error::InvalidCertificate(bad) => match bad {
            // A CA of the same name has another key.
            Bad::UnknownIssuer | Bad::BadSignature => {
                "the peer's certificate is of no CA in --tls-ca; both hosts' must be of one CA (`dunlin pki issue`)"
            }
            Bad::Expired | Bad::ExpiredContext { .. } => {
                "the peer's certificate has expired; issue a new one (`dunlin pki issue`), or set this host's clock"
            }
            Bad::NotValidYet | Bad::NotValidYetContext { .. } => {
                "the peer's certificate is not valid yet; set the clocks of both hosts"
            }
            Bad::Revoked => "the peer's certificate is revoked by --tls-crl; issue a new one (`dunlin pki issue`)",
            Bad::UnknownRevocationStatus => {
                "no list in --tls-crl is of the CA that issued the peer's certificate; add that CA's list"
            }
            Bad::NotValidForName | Bad::NotValidForNameContext { .. } => {
                return format!(
                    "{bad}: dial the peer by a name that its certificate has (`dunlin pki show`), or give that by --tls-name"
                );
            }
            _ => {
                return format!(
                    "the peer's certificate cannot be accepted: {bad}; issue a new one (`dunlin pki issue`)"
                );
            }
        },
        rustls::Error::NoCertificatesPresented => "the peer shows no certificate; it needs --tls-cert and --tls-key",
        rustls::Error::AlertReceived(alert) => match alert {
            Alert::UnknownCA | Alert::DecryptError => {
                "the peer does not know the CA of this host's certificate; both hosts' must be of one CA, and of its revocation list if the peer has one"
            }
            Alert::CertificateExpired => {
                "by the peer's clock this host's certificate is not valid at this time; issue a new one (`dunlin pki issue`), or set the clocks"
            }
            Alert::CertificateRevoked => {
                "the peer holds this host's certificate for revoked; issue a new one (`dunlin pki issue`)"
            }
            Alert::CertificateRequired => {
                "the peer wants a certificate of this host; name it by --tls-cert and --tls-key"
            }
            Alert::BadCertificate | Alert::CertificateUnknown | Alert::UnsupportedCertificate | Alert::AccessDenied => {
                "the peer does not accept this host's certificate; its log says why"
            }
            Alert::ProtocolVersion => "the peer has no TLS 1.3; update it",
            _ => return format!("the peer ended the connection: {alert:?}; its log may say why"),
        },
        rustls::Error::InvalidMessage(_) => {
            "the peer does not speak TLS; write tls:// at both ends, or tcp:// at both (`dunlin vm receive --listen`, `dunlin migrate --to`)"
        }
        rustls::Error::PeerIncompatible(why) => {
            return format!("the peer and this host have no kind of TLS 1.3 in common: {why:?}");
        }
        other => return other.to_string(),
    };
    text.to_owned()
}

/// One host's side of encrypted links: what it shows, and whom it trusts.
#[derive(Clone, Debug)]
pub struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    /// The name that a target's certificate must have, if it is not that of its address.
    name: Option<ServerName<'static>>,
}

/// Everything of one kind in a PEM file.
fn read<T: PemObject>(path: &Path, what: &'static str, option: &'static str) -> Result<Vec<T>, TlsError> {
    use io::Read;
    let failed = |source| TlsError::File { path: path.to_owned(), what, option, source };
    let content = |problem: String| TlsError::Content { path: path.to_owned(), what, option, problem };
    let mut bytes = Vec::new();
    File::open(path).map_err(failed)?.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(content(format!("longer than {MAX_BYTES} bytes")));
    }
    let found: Result<Vec<T>, _> = T::pem_slice_iter(&bytes).collect();
    let found = found.map_err(|error| content(error.to_string()))?;
    if found.is_empty() {
        return Err(content("nothing of that kind".to_owned()));
    }
    Ok(found)
}

impl Tls {
    /// Reads the files. `name` is what the certificate of a target must be of, if not of the address that is dialled.
    ///
    /// # Errors
    /// Files that cannot be read or used.
    pub fn load(files: &TlsFiles, name: Option<&str>) -> Result<Self, TlsError> {
        let name = match name {
            None => None,
            Some(name) => Some(ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Name(name.to_owned()))?),
        };
        let unusable = |path: &Path, problem: String| TlsError::Unusable { path: path.to_owned(), problem };
        let mut roots = RootCertStore::empty();
        for certificate in read::<CertificateDer<'static>>(&files.ca, "certificate of a CA", "--tls-ca")? {
            roots.add(certificate).map_err(|error| unusable(&files.ca, error.to_string()))?;
        }
        let chain = read::<CertificateDer<'static>>(&files.cert, "certificate", "--tls-cert")?;
        let key = read::<PrivateKeyDer<'static>>(&files.key, "private key", "--tls-key")?.swap_remove(0);
        let lists = match &files.crl {
            None => Vec::new(),
            Some(path) => read::<CertificateRevocationListDer<'static>>(path, "revocation list", "--tls-crl")?,
        };
        let (roots, provider) = (Arc::new(roots), Arc::new(ring::default_provider()));
        let pair = |error: rustls::Error| TlsError::Pair {
            cert: files.cert.clone(),
            key: files.key.clone(),
            problem: error.to_string(),
        };
        let trust =
            |error: &dyn std::error::Error| unusable(files.crl.as_ref().unwrap_or(&files.ca), error.to_string());
        let targets = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .with_crls(lists.clone())
            .build()
            .map_err(|error| trust(&error))?;
        let sources = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .with_crls(lists)
            .build()
            .map_err(|error| trust(&error))?;
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(pair)?
            .with_webpki_verifier(targets)
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(pair)?;
        client.resumption = Resumption::disabled();
        let mut server = Self::server(provider, pair)?
            .with_client_cert_verifier(sources)
            .with_single_cert(chain, key)
            .map_err(pair)?;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Ok(Self { client: Arc::new(client), server: Arc::new(server), name })
    }

    fn server(
        provider: Arc<CryptoProvider>,
        failed: impl Fn(rustls::Error) -> TlsError,
    ) -> Result<rustls::ConfigBuilder<ServerConfig, rustls::WantsVerifier>, TlsError> {
        ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13]).map_err(failed)
    }

    /// Secures a connection to a target that was dialled by the name or address `host`.
    ///
    /// # Errors
    /// The peer is not trusted or does not trust us, or all of it took too long.
    pub(super) fn dial(&self, socket: TcpStream, host: &str, until: Instant) -> io::Result<Stream> {
        let name = match &self.name {
            Some(name) => name.clone(),
            None => ServerName::try_from(host.to_owned()).map_err(io::Error::other)?,
        };
        let connection = ClientConnection::new(Arc::clone(&self.client), name).map_err(io::Error::other)?;
        Ok(Stream::Secure(Arc::new(Secure::shake_hands(socket, connection.into(), until)?)))
    }

    /// Secures a connection that a source has dialled.
    ///
    /// # Errors
    /// As of [`Tls::dial`].
    pub(super) fn answer(&self, socket: TcpStream, until: Instant) -> io::Result<Stream> {
        let connection = ServerConnection::new(Arc::clone(&self.server)).map_err(io::Error::other)?;
        Ok(Stream::Secure(Arc::new(Secure::shake_hands(socket, connection.into(), until)?)))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::super::testing::{Ca, LIMIT, secured, sockets};
    use super::*;

    /// What each end says of a connection: of the source's what it hears when it first reads.
    fn both_say(source: &Tls, target: &Tls, name: &str) -> (String, String) {
        let (near, far) = sockets();
        let (near, far) = secured((source, near), (target, far), name);
        let target = match far {
            Ok(stream) => {
                // So that a source that trusts us has something to read.
                let _gone_already = (&mut &stream).write_all(b"x");
                String::new()
            }
            Err(error) => error.to_string(),
        };
        let source = match near {
            Ok(stream) => (&mut &stream).read(&mut [0]).map_or_else(|error| error.to_string(), |_| String::new()),
            Err(error) => error.to_string(),
        };
        (source, target)
    }

    fn load(files: &TlsFiles) -> Tls {
        Tls::load(files, None).unwrap()
    }

    #[test]
    fn who_has_a_good_certificate_is_trusted() {
        let ca = Ca::new();
        let (a, b) = (ca.host("a", -1..1).0, ca.host("192.0.2.7", -1..1).0);
        for (source, target) in [(a.clone(), b.clone()), (ca.revoking(&a, &[77]), ca.revoking(&b, &[77]))] {
            assert_eq!(both_say(&load(&source), &load(&target), "192.0.2.7"), Default::default());
        }
        let named = Tls::load(&a, Some("192.0.2.7")).unwrap();
        assert_eq!(both_say(&named, &load(&b), "10.0.0.9"), Default::default(), "--tls-name beats the address");
    }

    #[test]
    fn a_bad_certificate_ends_the_connection_and_both_ends_say_why() {
        let (ca, other, namesake) = (Ca::new(), Ca::named("another"), Ca::new());
        let good = |name: &str| ca.host(name, -1..1);
        let ((a, a_serial), (b, b_serial)) = (good("a"), good("b"));
        let of = |ca: &Ca, name: &str| TlsFiles { ca: a.ca.clone(), ..ca.host(name, -1..1).0 };
        let cases = [
            ("of another CA", a.clone(), of(&other, "b"), "of no CA in --tls-ca", "does not know the CA"),
            ("of a namesake", a.clone(), of(&namesake, "b"), "of no CA in --tls-ca", "does not know the CA"),
            ("not for the name", a.clone(), good("c").0, "dial the peer by a name", "its log says why"),
            ("expired", a.clone(), ca.host("b", -9..-1).0, "has expired", "by the peer's clock"),
            ("not yet", a.clone(), ca.host("b", 1..9).0, "not valid yet", "by the peer's clock"),
            ("revoked", ca.revoking(&a, &[b_serial]), b.clone(), "is revoked", "for revoked"),
        ];
        for (what, source, target, at_source, at_target) in cases {
            let (source, target) = both_say(&load(&source), &load(&target), "b");
            assert!(source.contains(at_source) && target.contains(at_target), "target {what}: {source} / {target}");
        }
        let cases = [
            ("of another CA", of(&other, "a"), b.clone(), "does not know the CA", "of no CA in --tls-ca"),
            ("of a namesake", of(&namesake, "a"), b.clone(), "does not know the CA", "of no CA in --tls-ca"),
            ("expired", ca.host("a", -9..-1).0, b.clone(), "by the peer's clock", "has expired"),
            ("revoked", a.clone(), ca.revoking(&b, &[a_serial]), "for revoked", "is revoked"),
            (
                "of no list",
                a.clone(),
                TlsFiles { crl: other.revoking(&b, &[]).crl, ..b.clone() },
                "does not know",
                "no list",
            ),
        ];
        for (what, source, target, at_source, at_target) in cases {
            let (source, target) = both_say(&load(&source), &load(&target), "b");
            assert!(source.contains(at_source) && target.contains(at_target), "source {what}: {source} / {target}");
        }
    }

    #[test]
    fn who_shows_no_certificate_is_told_to() {
        let ca = Ca::new();
        let b = ca.host("b", -1..1).0;
        let mut bare = ca.good("a");
        let mut roots = RootCertStore::empty();
        roots.add(read::<CertificateDer<'static>>(&b.ca, "", "").unwrap().remove(0)).unwrap();
        bare.client = Arc::new(
            ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
                .with_root_certificates(roots)
                .with_no_client_auth(),
        );
        let (source, target) = both_say(&bare, &load(&b), "b");
        assert!(source.contains("wants a certificate of this host"), "{source}");
        assert!(target.contains("the peer shows no certificate"), "{target}");
    }

    #[test]
    fn a_peer_that_says_nothing_is_not_waited_for() {
        let (near, far) = sockets();
        let until = Instant::now() + std::time::Duration::from_millis(50);
        let error = Ca::new().good("b").answer(far, until).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(Instant::now() < until + LIMIT);
        drop(near);
    }

    #[test]
    fn files_that_cannot_be_used_are_named_with_what_to_do() {
        let ca = Ca::new();
        let ((a, _), (b, _)) = (ca.host("a", -1..1), ca.host("b", -1..1));
        let missing = a.ca.with_file_name("none");
        let cases = [
            (TlsFiles { ca: missing.clone(), ..a.clone() }, "none: No such file or directory"),
            (TlsFiles { cert: missing, ..a.clone() }, "--tls-cert"),
            (TlsFiles { key: a.cert.clone(), ..a.clone() }, "no private key as PEM"),
            (TlsFiles { cert: a.key.clone(), ..a.clone() }, "no certificate as PEM"),
            (TlsFiles { crl: Some(a.cert.clone()), ..a.clone() }, "--tls-crl"),
            (TlsFiles { key: b.key, ..a.clone() }, "cannot be used together"),
        ];
        for (files, word) in cases {
            let error = Tls::load(&files, None).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        assert!(matches!(Tls::load(&a, Some("no name")), Err(TlsError::Name(_))));
    }
}
