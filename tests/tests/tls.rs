//! Migrations over TLS: a real VM there and back, each certificate that must not be accepted, plain TCP at either end, and a link that is cut. Real KVM, real sockets, `dunlin pki`'s own
//! certificates.
#![cfg(target_arch = "x86_64")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dunlin::migrate::outcomes::Whereabouts;
use dunlin::model::Step;
use dunlin::service::machine::RunState;
use dunlin_tests::dunlin;
use dunlin_tests::hosted::{HoldPoint, TestHost, VM};
use dunlin_tests::proxy::{Cut, Proxy};
use dunlin_tests::scene::{Found, Host, MIGRATION_LIMIT, Scene};
use dunlin_tests::wait::wait_for;
use rcgen::{CertificateParams, Issuer, KeyPair};
use tempfile::TempDir;
use time::{Duration as Span, OffsetDateTime};

const LIMIT: Duration = Duration::from_secs(30);
const ANY_PORT: &str = "tls://127.0.0.1:0";
const STALL: &str = "2s";

/// A CA that `dunlin pki` made.
struct Ca(TempDir);

/// The options that name a host's files.
type Files = Vec<String>;

fn words(files: &Files) -> Vec<&str> {
    files.iter().map(String::as_str).collect()
}

impl Ca {
    fn new() -> Result<Self> {
        let ca = Self(tempfile::Builder::new().prefix("dunlin-pki-").tempdir()?);
        ca.pki(&["init"])?;
        Ok(ca)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn pki(&self, arguments: &[&str]) -> Result<()> {
        let output = dunlin().arg("pki").args(arguments).arg("--dir").arg(self.0.path()).output()?;
        ensure!(output.status.success(), "dunlin pki {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    fn files(&self, name: &str) -> Files {
        let path = |file: &str| self.path(file).display().to_string();
        let (cert, key) = (path(&format!("{name}.pem")), path(&format!("{name}.key")));
        ["--tls-ca", &path("ca.pem"), "--tls-cert", &cert, "--tls-key", &key].map(str::to_owned).into()
    }

    /// Issues to a host that is dialled at loopback.
    fn host(&self, name: &str) -> Result<Files> {
        self.pki(&["issue", name, "--ip", "127.0.0.1"])?;
        Ok(self.files(name))
    }

    /// What was good until yesterday.
    fn expired(&self, name: &str) -> Result<Files> {
        let read = |name: &str| std::fs::read_to_string(self.path(name));
        let issuer = Issuer::from_ca_cert_pem(&read("ca.pem")?, KeyPair::from_pem(&read("ca.key")?)?)?;
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
        let now = OffsetDateTime::now_utc();
        (params.not_before, params.not_after) = (now - Span::days(9), now - Span::days(1));
        let key = KeyPair::generate()?;
        std::fs::write(self.path(&format!("{name}.pem")), params.signed_by(&key, &issuer)?.pem())?;
        std::fs::write(self.path(&format!("{name}.key")), key.serialize_pem())?;
        Ok(self.files(name))
    }

    /// The same host, trusting this CA and not its own.
    fn trusted_by(&self, mut others: Files) -> Files {
        others[1] = self.path("ca.pem").display().to_string();
        others
    }
}

fn listen<'a>(files: &'a Files, more: &[&'a str]) -> Vec<&'a str> {
    [&["--listen", ANY_PORT], &words(files)[..], more].concat()
}

#[test]
fn a_vm_moves_there_and_back_over_tls() {
    let ca = Ca::new().unwrap();
    let (a, b) = (ca.host("host-a").unwrap(), ca.host("host-b").unwrap());
    let (source, target) = (TestHost::new().unwrap(), TestHost::new().unwrap());
    let _vm = source.boot(&[]).unwrap();
    let hops = [
        (&source, &a, &target, &b, &["--verify", "--streams", "3"][..]),
        (&target, &b, &source, &a, &["--strategy", "post-copy"]),
    ];
    for (from, from_files, to, to_files, options) in hops {
        let receiver = to.receive(&listen(to_files, &[])).unwrap();
        assert!(receiver.address.starts_with("tls://"), "{}", receiver.address);
        let mut migrate = from.migrate(&receiver.address, &[&words(from_files)[..], options].concat()).unwrap();
        let code = migrate.exit_code(MIGRATION_LIMIT).unwrap();
        assert_eq!(code, Some(0), "{}\n{}", migrate.output.text(), to.story());
        let link = migrate.report().unwrap().link.unwrap();
        assert!(link.encryption.starts_with("tls1.3 TLS13_"), "{link:?}");
        to.serial().await_beat().unwrap();
        to.serial().check_guest().unwrap();
        let audit = std::fs::read_to_string(source.state_dir().join("audit.log")).unwrap();
        assert!(audit.contains("\"migrate\""), "{audit}");
        wait_for("nothing to be left", LIMIT, || from.leftovers().is_empty().then_some(())).unwrap();
    }
}

/// A migration that must be refused: within the limit, with these words at both ends, and the VM runs on.
fn refused(source: &TestHost, to: &str, options: &Files, says: &str) -> Result<()> {
    let mut migrate = source.migrate(to, &words(options))?;
    let code = migrate.exit_code(LIMIT)?;
    let text = migrate.output.text();
    ensure!(code == Some(3), "exit {code:?}: {text}");
    ensure!(text.contains(says) && text.contains("the VM was not touched"), "`{says}` is not in: {text}");
    let info = source.info().context("the VM is gone")?;
    ensure!(info.state == RunState::Running && !info.dirty_log_on, "{info:?}");
    source.serial().await_beat()
}

#[test]
fn who_is_not_trusted_is_refused_at_both_ends_and_the_vm_runs_on() {
    let (ca, other) = (Ca::new().unwrap(), Ca::new().unwrap());
    let (source, target) = (TestHost::new().unwrap(), TestHost::new().unwrap());
    let _vm = source.boot(&[]).unwrap();
    let (a, b) = (ca.host("host-a").unwrap(), ca.host("host-b").unwrap());
    let (lost, stolen) = (ca.host("lost").unwrap(), ca.host("stolen").unwrap());
    for name in ["lost", "stolen"] {
        ca.pki(&["revoke", ca.path(&format!("{name}.pem")).to_str().unwrap()]).unwrap();
    }
    let expired = ca.expired("expired").unwrap();
    let stranger = ca.trusted_by(other.host("stranger").unwrap());
    let list = ca.path("crl.pem").display().to_string();
    let with_list = |files: &Files| [files.clone(), vec!["--tls-crl".to_owned(), list.clone()]].concat();
    let named = |files: &Files, name: &str| [files.clone(), vec!["--tls-name".to_owned(), name.to_owned()]].concat();
    let nowhere = Path::new("/nonexistent/host.pem").display().to_string();
    let mut without = a.clone();
    without[3] = nowhere;

    // Sources that a good target does not trust; it waits on for the next.
    let checked = with_list(&b);
    let receiver = target.receive(&listen(&checked, &[])).unwrap();
    let plain = receiver.address.replace("tls://", "tcp://");
    let sources = [
        (&stranger, &receiver.address, "does not know the CA", "of no CA in --tls-ca"),
        (&expired, &receiver.address, "by the peer's clock", "has expired"),
        (&stolen, &receiver.address, "for revoked", "is revoked"),
        (&named(&a, "host-c"), &receiver.address, "dial the peer by a name", "its log says why"),
        (&Vec::new(), &plain, "write tls:// at both ends", "write tls:// at both ends"),
    ];
    for (files, to, here, there) in sources {
        refused(&source, to, files, here).unwrap_or_else(|error| panic!("{files:?}: {error}\n{}", target.story()));
        assert!(receiver.running.output.text().contains(there), "{there}: {}", receiver.running.output.text());
    }
    refused(&source, &receiver.address, &without, "--tls-cert").unwrap();
    assert!(target.leftovers().is_empty());
    let mut migrate = source.migrate(&receiver.address, &words(&named(&a, "host-b"))).unwrap();
    assert_eq!(migrate.exit_code(MIGRATION_LIMIT).unwrap(), Some(0), "{}", migrate.output.text());
    target.serial().await_beat().unwrap();

    // Targets that a good source does not trust.
    let (source, target) = (target, TestHost::new().unwrap());
    let checked = with_list(&a);
    let targets = [
        (&stranger, "of no CA in --tls-ca", "does not know the CA"),
        (&expired, "has expired", "by the peer's clock"),
        (&lost, "is revoked", "for revoked"),
    ];
    for (files, here, there) in targets {
        let receiver = target.receive(&listen(files, &[])).unwrap();
        refused(&source, &receiver.address, &checked, here).unwrap_or_else(|error| panic!("{files:?}: {error}"));
        assert!(receiver.running.output.text().contains(there), "{there}: {}", receiver.running.output.text());
    }
    let receiver = target.receive(&[]).unwrap();
    let encrypted = receiver.address.replace("tcp://", "tls://");
    refused(&source, &encrypted, &a, "write tls:// at both ends").unwrap();
    assert!(receiver.running.output.text().contains("write tls:// at both ends"), "{}", receiver.running.output.text());
}

/// A scene over TLS whose link passes a proxy; the proxy and the address to dial.
fn through_a_proxy(scene: &mut Scene, files: &Files, receive: &[&str]) -> Result<(Proxy, String)> {
    scene.listen(&listen(files, receive))?;
    let proxy = Proxy::new(scene.receiver.as_ref().context("no receiver")?.socket_address())?;
    let address = proxy.address().replace("tcp://", "tls://");
    Ok((proxy, address))
}

#[test]
fn a_link_that_is_cut_in_the_handover_is_dialled_anew_over_tls() {
    let ca = Ca::new().unwrap();
    let (a, b) = (ca.host("host-a").unwrap(), ca.host("host-b").unwrap());
    let play = |scene: &mut Scene| -> Result<()> {
        let (proxy, address) = through_a_proxy(scene, &b, &["--stall", STALL])?;
        let hold = HoldPoint::new(&scene.source, Step::Released);
        let held_at = hold.argument();
        let options = [&words(&a)[..], &["--hold-at", &held_at, "--stall", STALL]].concat();
        scene.start_to(&address, &options)?;
        hold.await_held()?;
        let mut ask = dunlin();
        ask.args(["migrate", VM, "--status", "--json", "--run-dir"]).arg(scene.source.run_dir());
        let status = String::from_utf8(ask.output()?.stdout)?;
        ensure!(status.contains("\"encryption\":\"tls1.3 TLS13_"), "{status}");
        proxy.cut(Cut::Reset, false);
        hold.release()?;
        let code = scene.migrate.as_mut().context("no migration")?.exit_code(MIGRATION_LIMIT)?;
        ensure!(code == Some(0), "exit {code:?}");
        scene.settle(Found { vm: Whereabouts::RunsAtTarget, copy_waits: false }, Host::Target)
    };
    let mut scene = Scene::new(&[]).unwrap();
    play(&mut scene).unwrap_or_else(|error| panic!("{error:#}\n{}", scene.story()));
}

#[test]
fn a_vm_that_is_owed_pages_gets_them_over_a_second_tls_connection() {
    let ca = Ca::new().unwrap();
    let (a, b) = (ca.host("host-a").unwrap(), ca.host("host-b").unwrap());
    let play = |scene: &mut Scene| -> Result<()> {
        let (proxy, address) = through_a_proxy(scene, &b, &["--stall", STALL])?;
        let slow = ["--strategy", "post-copy", "--bandwidth", "80Mbit", "--stall", STALL];
        scene.start_to(&address, &[&words(&a)[..], &slow].concat())?;
        wait_for("the VM to run at the target", LIMIT, || {
            scene.target.info().filter(|info| info.state == RunState::Running && info.owed_pages > Some(1000))
        })?;
        proxy.cut(Cut::Close, false);
        let migrate = scene.migrate.as_mut().context("no migration")?;
        let code = migrate.exit_code(MIGRATION_LIMIT)?;
        ensure!(code == Some(0), "exit {code:?}");
        let owed = migrate.report().and_then(|report| report.post_copy).context("no report")?;
        ensure!(owed.recoveries >= 1, "{owed:?}");
        scene.settle(Found { vm: Whereabouts::RunsAtTarget, copy_waits: false }, Host::Target)
    };
    let (source, target) = (TestHost::new().unwrap(), TestHost::new().unwrap());
    let vm = source.boot_with("96MiB", "dunlin.wl=ws:48M,rate:2000", &[]).unwrap();
    let mut scene = Scene { source, target, vm, receiver: None, migrate: None };
    play(&mut scene).unwrap_or_else(|error| panic!("{error:#}\n{}", scene.story()));
}
