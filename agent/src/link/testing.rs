//! Certificates and connected sockets for the link's own tests.

use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, IsCa, Issuer, KeyIdMethod, KeyPair,
    KeyUsagePurpose, RevokedCertParams, SerialNumber,
};
use tempfile::TempDir;
use time::{Duration as Span, OffsetDateTime};

use super::stream::{Stream, set_up};
use super::tls::{Tls, TlsFiles};

/// Longer than anything here takes on a busy host.
pub(super) const LIMIT: Duration = Duration::from_secs(20);

/// A CA with the files that it has made.
pub(super) struct Ca {
    folder: TempDir,
    issuer: Issuer<'static, KeyPair>,
    serial: AtomicU64,
}

impl Ca {
    pub(super) fn new() -> Self {
        Self::named("CA")
    }

    pub(super) fn named(name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).unwrap();
        std::fs::write(folder.path().join("ca.pem"), certificate.pem()).unwrap();
        Self { folder, issuer: Issuer::new(params, key), serial: AtomicU64::new(1) }
    }

    /// The files of a host of that name, whose certificate is good for the days from the first to the last from now; the serial number.
    pub(super) fn host(&self, name: &str, days: std::ops::Range<i64>) -> (TlsFiles, u64) {
        let now = OffsetDateTime::now_utc();
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.not_before, params.not_after) = (now + Span::days(days.start), now + Span::days(days.end));
        params.serial_number = Some(SerialNumber::from(serial));
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let path = |kind: &str| self.folder.path().join(format!("{serial}.{kind}"));
        std::fs::write(path("pem"), certificate.pem()).unwrap();
        std::fs::write(path("key"), key.serialize_pem()).unwrap();
        (TlsFiles { ca: self.folder.path().join("ca.pem"), cert: path("pem"), key: path("key"), crl: None }, serial)
    }

    /// What a host that is good for a year needs.
    pub(super) fn good(&self, name: &str) -> Tls {
        Tls::load(&self.host(name, -1..365).0, None).unwrap()
    }

    /// The same files with a list that revokes these serial numbers.
    pub(super) fn revoking(&self, files: &TlsFiles, serials: &[u64]) -> TlsFiles {
        let now = OffsetDateTime::now_utc();
        let revoked = serials.iter().map(|&serial| RevokedCertParams {
            serial_number: SerialNumber::from(serial),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: now,
            next_update: now + Span::days(1),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let path = self.folder.path().join(format!("{serials:?}.crl"));
        std::fs::write(&path, list.signed_by(&self.issuer).unwrap().pem().unwrap()).unwrap();
        TlsFiles { crl: Some(path), ..files.clone() }
    }
}

/// Two ends of a connection over loopback.
pub(super) fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let far = listener.accept().unwrap().0;
    for socket in [&near, &far] {
        set_up(socket, LIMIT, LIMIT).unwrap();
    }
    (near, far)
}

/// Both ends of a handshake between a source and a target.
pub(super) fn secured(
    (source, near): (&Tls, TcpStream),
    (target, far): (&Tls, TcpStream),
    name: &str,
) -> (std::io::Result<Stream>, std::io::Result<Stream>) {
    let until = Instant::now() + LIMIT;
    std::thread::scope(|scope| {
        let answered = scope.spawn(|| target.answer(far, until));
        (source.dial(near, name, until), answered.join().unwrap())
    })
}

/// A connection that is encrypted.
pub(super) fn secure_pair() -> (Stream, Stream) {
    let ca = Ca::new();
    let (near, far) = sockets();
    let (near, far) = secured((&ca.good("a"), near), (&ca.good("b"), far), "b");
    (near.unwrap(), far.unwrap())
}
