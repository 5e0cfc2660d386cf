//! A private CA for the hosts of encrypted links: makes it, issues and revokes hosts' certificates, and reads any certificate or list.
//!
//! Owns the CA's folder: `ca.pem`, `ca.key`, `crl.pem`, and `HOST.pem` and `HOST.key` until they have gone to their host. Certificates are as in RFC 5280, keys of the curve P-256. Must
//! not know how a link uses them ([`super::trust`]).

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use ::time::{Duration, OffsetDateTime};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
};
use serde::Serialize;
use x509_parser::prelude::{
    CertificateRevocationList, FromDer, GeneralName, ParsedExtension, Pem, X509Certificate, X509Extension,
};

use super::trust;
use crate::model::schema::Schema;

/// For how long a CA is good: ten years.
const CA_LIFE: Duration = Duration::days(3650);
/// Certificates are good from a little before they are issued: clocks differ.
const CLOCK_MARGIN: Duration = Duration::hours(1);
/// A longer file is no certificate, key or list.
const MAX_BYTES: u64 = 16 << 20;
/// The key of the CA.
const CA_KEY_FILE: &str = "ca.key";

/// What could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file or folder.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is such a file already.
    #[error("{} exists, and is not overwritten: move it away, or choose another --dir", .0.display())]
    Exists(PathBuf),
    /// No CA in the folder.
    #[error("there is no CA in {}: make one with `dunlin pki init`, or name its folder by --dir", .0.display())]
    NoCa(PathBuf),
    /// A host's name that no certificate and no file can have.
    #[error(
        "`{0}` is no host: write a DNS name (letters, digits, `-`, `_`, `.`) or an address, as `dunlin migrate --to` will dial it"
    )]
    Host(String),
    /// A file with something else in it.
    #[error("{}: {problem}", path.display())]
    Content {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A certificate of someone else.
    #[error("{} was not issued by the CA in {}: name the folder of the one that did by --dir", certificate.display(), dir.display())]
    OtherCa {
        /// The certificate.
        certificate: PathBuf,
        /// The CA's folder.
        dir: PathBuf,
    },
    /// What the cryptography refused.
    #[error("making a certificate or list: {0}")]
    Make(#[from] rcgen::Error),
}

/// A file that was made or brought up to date, and where it belongs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PkiFile {
    /// Where it is.
    pub path: String,
    /// Where it goes: `HOST:PATH` or `every host:PATH`; empty of what stays with the CA.
    pub goes_to: String,
    /// Whether who has it can be somebody else.
    pub is_secret: bool,
}

/// Files of a CA.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PkiFiles {
    /// What was made, in order.
    pub files: Vec<PkiFile>,
}

impl Schema for PkiFiles {
    const SCHEMA: &'static str = "dunlin.pki-files/v1";
}

/// A certificate, as far as people ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CertificateView {
    /// Whose it is.
    pub subject: String,
    /// Who issued it.
    pub issuer: String,
    /// DNS names and addresses that it is good for.
    pub names: Vec<String>,
    /// Its number, unique to the issuer: hexadecimal bytes.
    pub serial: String,
    /// From when it is good, in seconds since 1970.
    pub not_before_unix_s: i64,
    /// Until when.
    pub not_after_unix_s: i64,
    /// Whether it can issue others.
    pub is_ca: bool,
    /// Whether it is good by this host's clock.
    pub is_valid_now: bool,
}

/// A revoked certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RevokedView {
    /// Its number.
    pub serial: String,
    /// Since when, in seconds since 1970.
    pub since_unix_s: i64,
}

/// A revocation list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RevocationListView {
    /// Whose certificates it revokes.
    pub issuer: String,
    /// When it was made, in seconds since 1970.
    pub updated_unix_s: i64,
    /// By when there is another one; absent if it does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_update_unix_s: Option<i64>,
    /// What is revoked.
    pub revoked: Vec<RevokedView>,
}

/// What a PEM file has in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PkiView {
    /// The file.
    pub file: String,
    /// Certificates, in order.
    pub certificates: Vec<CertificateView>,
    /// Revocation lists, in order.
    pub lists: Vec<RevocationListView>,
}

impl Schema for PkiView {
    const SCHEMA: &'static str = "dunlin.pki/v1";
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> PkiError {
    move |source| PkiError::Io { path: path.to_owned(), source }
}

fn content(path: &Path, problem: impl ToString) -> PkiError {
    PkiError::Content { path: path.to_owned(), problem: problem.to_string() }
}

/// A file's bytes.
fn read(path: &Path) -> Result<Vec<u8>, PkiError> {
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes)).map_err(io_error(path))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(content(path, format!("it is longer than {MAX_BYTES} bytes")));
    }
    Ok(bytes)
}

fn read_text(path: &Path) -> Result<String, PkiError> {
    String::from_utf8(read(path)?).map_err(|_| content(path, "it is no PEM file"))
}

/// What a PEM file has in it of one label, decoded.
fn blocks(path: &Path, label: &str) -> Result<Vec<Pem>, PkiError> {
    let bytes = read(path)?;
    let mut found = Vec::new();
    for block in Pem::iter_from_buffer(&bytes) {
        let block = block.map_err(|error| content(path, format!("it is no PEM file: {error}")))?;
        if block.label == label {
            found.push(block);
        }
    }
    Ok(found)
}

const CERTIFICATE: &str = "CERTIFICATE";
const LIST: &str = "X509 CRL";

fn certificate<'a>(path: &Path, block: &'a Pem) -> Result<X509Certificate<'a>, PkiError> {
    match X509Certificate::from_der(&block.contents) {
        Ok((_, certificate)) => Ok(certificate),
        Err(error) => Err(content(path, format!("it holds a certificate that cannot be read: {error}"))),
    }
}

fn list<'a>(path: &Path, block: &'a Pem) -> Result<CertificateRevocationList<'a>, PkiError> {
    match CertificateRevocationList::from_der(&block.contents) {
        Ok((_, list)) => Ok(list),
        Err(error) => Err(content(path, format!("it holds a revocation list that cannot be read: {error}"))),
    }
}

/// Writes new files that only their owner may read; all of them or none.
fn create(files: &[(&Path, &str)]) -> Result<(), PkiError> {
    for (index, (path, text)) in files.iter().enumerate() {
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        });
        if let Err(error) = made {
            let exists = error.kind() == io::ErrorKind::AlreadyExists;
            // The last of them is ours only if it was not there.
            let ours = if exists { index } else { index + 1 };
            for (path, _) in &files[..ours] {
                let _may_not_exist = std::fs::remove_file(path);
            }
            return Err(if exists { PkiError::Exists((*path).to_owned()) } else { io_error(path)(error) });
        }
    }
    Ok(())
}

/// Puts another content in place of a file's, whole or not at all.
fn replace(path: &Path, text: &str) -> Result<(), PkiError> {
    let new = path.with_added_extension("new");
    let written = File::create(&new).and_then(|mut file| {
        file.set_permissions(Permissions::from_mode(0o600))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    written.and_then(|()| std::fs::rename(&new, path)).map_err(io_error(path))
}

fn file(path: &Path, goes_to: impl Into<String>, is_secret: bool) -> PkiFile {
    PkiFile { path: path.display().to_string(), goes_to: goes_to.into(), is_secret }
}

fn place(host: &str, name: &str) -> String {
    format!("{host}:{}/{name}", trust::DEFAULT_DIR)
}

/// Makes a CA called `name` in `dir`, which is made too.
///
/// # Errors
/// There is one already, or it cannot be written.
pub fn init(dir: &Path, name: &str) -> Result<PkiFiles, PkiError> {
    let now = OffsetDateTime::now_utc();
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (params.not_before, params.not_after) = (now - CLOCK_MARGIN, now + CA_LIFE);
    let certificate = params.self_signed(&key)?;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io_error(dir))?;
    let (ca, ca_key) = (dir.join(trust::CA_FILE), dir.join(CA_KEY_FILE));
    create(&[(&ca, &certificate.pem()), (&ca_key, &key.serialize_pem())])?;
    Ok(PkiFiles { files: vec![file(&ca, place("every host", trust::CA_FILE), false), file(&ca_key, "", true)] })
}

/// The CA in `dir`.
fn issuer(dir: &Path) -> Result<Issuer<'static, KeyPair>, PkiError> {
    let (ca, key) = (dir.join(trust::CA_FILE), dir.join(CA_KEY_FILE));
    if !ca.exists() || !key.exists() {
        return Err(PkiError::NoCa(dir.to_owned()));
    }
    let pair = KeyPair::from_pem(&read_text(&key)?).map_err(|error| content(&key, error))?;
    Issuer::from_ca_cert_pem(&read_text(&ca)?, pair).map_err(|error| content(&ca, error))
}

/// Issues a certificate and a key to the host of that name or address, for links to and from it, good for `days`.
///
/// # Errors
/// It has been issued one already, the name is none, there is no CA, or it cannot be written.
pub fn issue(dir: &Path, host: &str, addresses: &[IpAddr], days: u16) -> Result<PkiFiles, PkiError> {
    let is_name = |host: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !host.is_empty() && host.len() <= 253 && host.chars().all(plain) && !host.starts_with(['.', '-'])
    };
    if host.parse::<IpAddr>().is_err() && !is_name(host) || host == "ca" {
        return Err(PkiError::Host(host.to_owned()));
    }
    let issuer = issuer(dir)?;
    let now = OffsetDateTime::now_utc();
    let mut names = vec![host.to_owned()];
    names.extend(addresses.iter().map(IpAddr::to_string).filter(|address| address != host));
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name.push(DnType::CommonName, host);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    (params.not_before, params.not_after) = (now - CLOCK_MARGIN, now + Duration::days(days.into()));
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &issuer)?;
    let (own, own_key) = (dir.join(format!("{host}.pem")), dir.join(format!("{host}.key")));
    create(&[(&own, &certificate.pem()), (&own_key, &key.serialize_pem())])?;
    let mut files = vec![
        file(&dir.join(trust::CA_FILE), place(host, trust::CA_FILE), false),
        file(&own, place(host, trust::CERT_FILE), false),
        file(&own_key, place(host, trust::KEY_FILE), true),
    ];
    let lists = dir.join(trust::CRL_FILE);
    if lists.exists() {
        files.push(file(&lists, place(host, trust::CRL_FILE), false));
    }
    Ok(PkiFiles { files })
}

/// The number of the key that signed a certificate, and of its own (RFC 5280 §4.2.1.1, §4.2.1.2).
fn key_ids<'a>(extensions: &'a [X509Extension<'a>]) -> (Option<&'a [u8]>, Option<&'a [u8]>) {
    let (mut signer, mut own) = (None, None);
    for extension in extensions {
        match extension.parsed_extension() {
            ParsedExtension::AuthorityKeyIdentifier(id) => signer = id.key_identifier.as_ref().map(|id| id.0),
            ParsedExtension::SubjectKeyIdentifier(id) => own = Some(id.0),
            _ => {}
        }
    }
    (signer, own)
}

fn instant(path: &Path, unix_s: i64) -> Result<OffsetDateTime, PkiError> {
    OffsetDateTime::from_unix_timestamp(unix_s).map_err(|error| content(path, error))
}

/// Revokes a certificate that the CA in `dir` issued: adds it to the CA's list, which is made if there is none.
///
/// # Errors
/// It was not issued there, there is no CA, or a file cannot be read or written.
pub fn revoke(dir: &Path, revoked: &Path) -> Result<PkiFiles, PkiError> {
    let issuer = issuer(dir)?;
    let (ca_path, list_path) = (dir.join(trust::CA_FILE), dir.join(trust::CRL_FILE));
    let (ca_blocks, blocks_of_it) = (blocks(&ca_path, CERTIFICATE)?, blocks(revoked, CERTIFICATE)?);
    let ca = certificate(&ca_path, ca_blocks.first().ok_or_else(|| content(&ca_path, "it holds no certificate"))?)?;
    let first = blocks_of_it.first().ok_or_else(|| content(revoked, "it holds no certificate"))?;
    let certificate = certificate(revoked, first)?;
    let (signer, _) = key_ids(certificate.extensions());
    let (_, own) = key_ids(ca.extensions());
    if certificate.issuer().as_raw() != ca.subject().as_raw() || signer.zip(own).is_some_and(|(a, b)| a != b) {
        return Err(PkiError::OtherCa { certificate: revoked.to_owned(), dir: dir.to_owned() });
    }
    let now = OffsetDateTime::now_utc();
    let mut params = CertificateRevocationListParams {
        this_update: now,
        next_update: instant(&ca_path, ca.validity().not_after.timestamp())?,
        crl_number: SerialNumber::from(now.unix_timestamp_nanos() as u64),
        issuing_distribution_point: None,
        revoked_certs: Vec::new(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let entry = |serial: &[u8], since| RevokedCertParams {
        serial_number: SerialNumber::from_slice(serial),
        revocation_time: since,
        reason_code: None,
        invalidity_date: None,
    };
    if list_path.exists() {
        for block in blocks(&list_path, LIST)? {
            for old in list(&list_path, &block)?.iter_revoked_certificates() {
                let since = instant(&list_path, old.revocation_date.timestamp())?;
                params.revoked_certs.push(entry(old.raw_serial(), since));
            }
        }
    }
    let added = entry(certificate.raw_serial(), now);
    if !params.revoked_certs.iter().any(|old| old.serial_number == added.serial_number) {
        params.revoked_certs.push(added);
    }
    let signed = params.signed_by(&issuer)?;
    replace(&list_path, &signed.pem()?)?;
    Ok(PkiFiles { files: vec![file(&list_path, place("every host", trust::CRL_FILE), false)] })
}

/// The day of an instant in seconds since 1970, by UTC: `2026-01-31`.
pub fn day(unix_s: i64) -> String {
    OffsetDateTime::from_unix_timestamp(unix_s).map_or_else(|_| format!("{unix_s} s"), |at| at.date().to_string())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

fn name(name: &GeneralName<'_>) -> String {
    match name {
        GeneralName::DNSName(name) => (*name).to_owned(),
        GeneralName::IPAddress(bytes) => match (<[u8; 4]>::try_from(*bytes), <[u8; 16]>::try_from(*bytes)) {
            (Ok(v4), _) => IpAddr::from(v4).to_string(),
            (_, Ok(v6)) => IpAddr::from(v6).to_string(),
            _ => hex(bytes),
        },
        other => other.to_string(),
    }
}

/// Reads the certificates and revocation lists in a PEM file, whoever made them.
///
/// # Errors
/// There are none, or the file cannot be read.
pub fn show(path: &Path) -> Result<PkiView, PkiError> {
    let mut view = PkiView { file: path.display().to_string(), certificates: Vec::new(), lists: Vec::new() };
    for block in blocks(path, CERTIFICATE)? {
        let certificate = certificate(path, &block)?;
        let names = certificate.subject_alternative_name().ok().flatten();
        view.certificates.push(CertificateView {
            subject: certificate.subject().to_string(),
            issuer: certificate.issuer().to_string(),
            names: names.map_or_else(Vec::new, |names| names.value.general_names.iter().map(name).collect()),
            serial: hex(certificate.raw_serial()),
            not_before_unix_s: certificate.validity().not_before.timestamp(),
            not_after_unix_s: certificate.validity().not_after.timestamp(),
            is_ca: certificate.is_ca(),
            is_valid_now: certificate.validity().is_valid(),
        });
    }
    for block in blocks(path, LIST)? {
        let list = list(path, &block)?;
        view.lists.push(RevocationListView {
            issuer: list.issuer().to_string(),
            updated_unix_s: list.last_update().timestamp(),
            next_update_unix_s: list.next_update().map(|at| at.timestamp()),
            revoked: list
                .iter_revoked_certificates()
                .map(|old| RevokedView { serial: hex(old.raw_serial()), since_unix_s: old.revocation_date.timestamp() })
                .collect(),
        });
    }
    if view.certificates.is_empty() && view.lists.is_empty() {
        return Err(content(path, "neither certificate nor revocation list as PEM is in it; a key is shown nowhere"));
    }
    Ok(view)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::{Tls, TlsFiles};

    fn mode(path: &str) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn what_is_issued_can_be_used_and_is_for_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("pki");
        let ca = init(&dir, "rack 7").unwrap();
        let issued =
            issue(&dir, "host-a.example", &["192.0.2.7".parse().unwrap(), "fd00::7".parse().unwrap()], 30).unwrap();
        for file in ca.files.iter().chain(&issued.files) {
            assert_eq!(mode(&file.path), 0o600, "{file:?}");
        }
        assert_eq!(issued.files[2].goes_to, "host-a.example:/etc/dunlin/pki/host.key");
        let path = |index: usize| PathBuf::from(&issued.files[index].path);
        let files = TlsFiles { ca: path(0), cert: path(1), key: path(2), crl: None };
        Tls::load(&files, None).unwrap();
        let shown = show(&path(1)).unwrap().certificates.remove(0);
        assert_eq!(shown.names, ["host-a.example", "192.0.2.7", "fd00::7"]);
        assert_eq!((shown.issuer.as_str(), shown.is_ca, shown.is_valid_now), ("CN=rack 7", false, true));
        assert_eq!(shown.not_after_unix_s - shown.not_before_unix_s, 30 * 86_400 + 3600);
        assert!(show(&path(0)).unwrap().certificates[0].is_ca);
        assert!(matches!(show(&path(2)), Err(PkiError::Content { .. })), "a key is not shown");
    }

    #[test]
    fn nothing_is_overwritten_and_nothing_is_half_made() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        assert!(matches!(issue(dir, "a", &[], 1), Err(PkiError::NoCa(_))));
        init(dir, "x").unwrap();
        let ca = std::fs::read(dir.join("ca.pem")).unwrap();
        assert!(matches!(init(dir, "x"), Err(PkiError::Exists(_))));
        assert_eq!(std::fs::read(dir.join("ca.pem")).unwrap(), ca);
        std::fs::write(dir.join("b.key"), "mine").unwrap();
        assert!(matches!(issue(dir, "b", &[], 1), Err(PkiError::Exists(path)) if path.ends_with("b.key")));
        assert!(!dir.join("b.pem").exists());
        for bad in ["", "../b", "a b", ".b", "-b", "ca", &"x".repeat(254)] {
            assert!(matches!(issue(dir, bad, &[], 1), Err(PkiError::Host(_))), "{bad}");
        }
    }

    #[test]
    fn a_list_keeps_what_was_revoked_before() {
        let folder = tempfile::tempdir().unwrap();
        let (dir, other) = (folder.path().join("one"), folder.path().join("other"));
        // Of the same name, so only their keys tell them apart.
        for dir in [&dir, &other] {
            init(dir, "x").unwrap();
        }
        let serial = |name: &str| show(&dir.join(name)).unwrap().certificates[0].serial.clone();
        for host in ["a", "b"] {
            issue(&dir, host, &[], 1).unwrap();
        }
        let list = revoke(&dir, &dir.join("a.pem")).unwrap().files.remove(0).path;
        revoke(&dir, &dir.join("a.pem")).unwrap();
        revoke(&dir, &dir.join("b.pem")).unwrap();
        let shown = show(Path::new(&list)).unwrap().lists.remove(0);
        let serials: Vec<_> = shown.revoked.iter().map(|revoked| revoked.serial.clone()).collect();
        assert_eq!(serials, [serial("a.pem"), serial("b.pem")]);
        assert_eq!(mode(&list), 0o600);
        let crl = Some(PathBuf::from(list));
        Tls::load(&TlsFiles { ca: dir.join("ca.pem"), cert: dir.join("a.pem"), key: dir.join("a.key"), crl }, None)
            .unwrap();
        issue(&other, "c", &[], 1).unwrap();
        assert!(matches!(revoke(&dir, &other.join("c.pem")), Err(PkiError::OtherCa { .. })));
        assert!(matches!(revoke(&dir, &dir.join("a.key")), Err(PkiError::Content { .. })));
    }
}
