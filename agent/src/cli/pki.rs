//! `dunlin pki`: certificates for encrypted links.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::service::out::{bytes, complain, say};
use crate::service::pki::{PkiError, PkiFiles, PkiView, day, init, issue, revoke, show};

/// Make a private CA for tls:// links, issue and revoke hosts' certificates, and read any.
///
/// Each host needs the CA's certificate, and a certificate and key of its own. The key of the CA stays where it was made.
#[derive(Debug, Subcommand)]
pub(super) enum PkiCommand {
    Init(InitArgs),
    Issue(IssueArgs),
    Revoke(RevokeArgs),
    Show(ShowArgs),
}

/// Where the CA is.
#[derive(Debug, Args)]
struct Dir {
    /// The CA's folder.
    #[arg(long, value_name = "D", default_value = "dunlin-pki")]
    dir: PathBuf,
}

/// Make a CA: a certificate that every host gets, and a key that no host gets.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin pki init
  dunlin pki init --dir /root/dunlin-pki --name 'rack 7'

Exit codes: 0 done, 1 failed, 2 wrong arguments, 3 refused: there is a CA already.")]
pub(super) struct InitArgs {
    #[command(flatten)]
    dir: Dir,

    /// What the CA is called in certificates.
    #[arg(long, default_value = "Dunlin CA")]
    name: String,
}

/// Issue a certificate and a key to a host, and say where they go.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin pki issue host-a.example
  dunlin pki issue host-a --ip 192.0.2.7 --ip fd00::7 --days 90

Exit codes: 0 done, 1 failed, 2 wrong arguments, 3 refused: no CA, no name, or it has been issued one already.")]
pub(super) struct IssueArgs {
    /// The host: the DNS name or address by which others dial it.
    host: String,

    /// Another address by which it is dialled.
    #[arg(long = "ip", value_name = "A")]
    addresses: Vec<IpAddr>,

    /// For how long it is good, 1 to 3650.
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u16).range(1..=3650))]
    days: u16,

    #[command(flatten)]
    dir: Dir,
}

/// Revoke a host's certificate: makes or updates the CA's list, which every host then needs anew.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin pki revoke dunlin-pki/host-a.example.pem

Exit codes: 0 done, 1 failed, 2 wrong arguments, 3 refused: it is no certificate of this CA.")]
pub(super) struct RevokeArgs {
    /// The certificate.
    file: PathBuf,

    #[command(flatten)]
    dir: Dir,
}

/// Tell names and dates of certificates and revocation lists.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin pki show /etc/dunlin/pki/host.pem
  dunlin pki show /etc/dunlin/pki/crl.pem --json

Exit codes: 0 done, 1 the file cannot be read, 2 wrong arguments, 3 nothing of the kind is in it.")]
pub(super) struct ShowArgs {
    /// A PEM file.
    file: PathBuf,
}

impl PkiCommand {
    pub(super) fn run(self, json: bool) -> anyhow::Result<u8> {
        let made = match self {
            Self::Init(InitArgs { dir, name }) => init(&dir.dir, &name),
            Self::Issue(IssueArgs { host, addresses, days, dir }) => issue(&dir.dir, &host, &addresses, days),
            Self::Revoke(RevokeArgs { file, dir }) => revoke(&dir.dir, &file),
            Self::Show(ShowArgs { file }) => {
                return print(show(&file), json, |view| describe(&view));
            }
        };
        print(made, json, |files| places(&files))
    }
}

/// Prints what was made or found, or why not; the exit code.
fn print<T: Schema>(done: Result<T, PkiError>, json: bool, text: impl FnOnce(T) -> String) -> anyhow::Result<u8> {
    match done {
        Ok(object) if json => say!("{}", serde_json::to_string(&object.tagged())?),
        Ok(object) => {
            bytes(text(object).as_bytes());
        }
        Err(error) => {
            let failed = matches!(error, PkiError::Io { .. } | PkiError::Make(_));
            complain!("dunlin: {}{error}", if failed { "" } else { "refused: " });
            return Ok(if failed { exit::ERROR } else { exit::REFUSED });
        }
    }
    Ok(exit::DONE)
}

/// Which file goes where.
fn places(files: &PkiFiles) -> String {
    let width = files.files.iter().map(|file| file.path.len()).max().unwrap_or(0);
    let mut text = String::new();
    for file in &files.files {
        let goes = match file.goes_to.as_str() {
            "" => "stays here".to_owned(),
            place => format!("to {place}"),
        };
        let secret = if file.is_secret { ", secret" } else { "" };
        text += &format!("{:width$}  {goes}{secret}\n", file.path);
    }
    text
}

/// What is in a file, as a person reads it.
fn describe(view: &PkiView) -> String {
    let mut text = String::new();
    for certificate in &view.certificates {
        text += &format!(
            "certificate of {}{}\n  names   {}\n  issuer  {}\n  good    {} to {}{}\n  serial  {}\n",
            certificate.subject,
            if certificate.is_ca { ", a CA" } else { "" },
            if certificate.names.is_empty() { "none".to_owned() } else { certificate.names.join(", ") },
            certificate.issuer,
            day(certificate.not_before_unix_s),
            day(certificate.not_after_unix_s),
            if certificate.is_valid_now { "" } else { ", NOT NOW" },
            certificate.serial,
        );
    }
    for list in &view.lists {
        text += &format!(
            "revocation list of {}\n  made    {}{}\n",
            list.issuer,
            day(list.updated_unix_s),
            list.next_update_unix_s.map_or_else(String::new, |at| format!(", good until {}", day(at))),
        );
        for revoked in &list.revoked {
            text += &format!("  revoked {} on {}\n", revoked.serial, day(revoked.since_unix_s));
        }
    }
    text
}

/// Objects with every member: for the test of the documentation.
#[cfg(test)]
pub(super) fn samples() -> [serde_json::Value; 2] {
    use crate::service::pki::{CertificateView, PkiFile, RevocationListView, RevokedView};
    let word = String::new;
    let certificate = CertificateView {
        subject: word(),
        issuer: word(),
        names: Vec::new(),
        serial: word(),
        not_before_unix_s: 0,
        not_after_unix_s: 0,
        is_ca: false,
        is_valid_now: true,
    };
    let revoked = vec![RevokedView { serial: word(), since_unix_s: 0 }];
    let list = RevocationListView { issuer: word(), updated_unix_s: 0, next_update_unix_s: Some(0), revoked };
    let view = PkiView { file: word(), certificates: vec![certificate], lists: vec![list] };
    let files = PkiFiles { files: vec![PkiFile { path: word(), goes_to: word(), is_secret: false }] };
    [serde_json::to_value(files.tagged()).unwrap(), serde_json::to_value(view.tagged()).unwrap()]
}
