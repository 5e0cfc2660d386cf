//! `dunlin agent` under test, and what it answers.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::binary::dunlin;
use crate::process::OwnProcess;
use crate::wait::wait_for;

const START_LIMIT: Duration = Duration::from_secs(30);
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// An agent that is ready; killed on drop.
#[derive(Debug)]
pub struct Agent {
    /// Its process.
    pub process: OwnProcess,
    folder: TempDir,
    ready: Value,
}

impl Agent {
    /// Starts one that looks every `interval`, with more options, and a budget (part of a core).
    ///
    /// # Errors
    /// It does not become ready.
    pub fn start(run_dir: &Path, interval: &str, budget: f64, options: &[&str]) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("dunlin-agent-").tempdir()?;
        let config = folder.path().join("dunlin.toml");
        fs::write(&config, format!("version = 1\n[track]\nbudget = {budget}\n"))?;
        let (out, err) = (folder.path().join("out"), folder.path().join("err"));
        let mut command = dunlin();
        command.args(["agent", "--json", "--interval", interval, "--listen", "127.0.0.1:0", "--config"]).arg(config);
        command.arg("--run-dir").arg(run_dir).args(options);
        command.stdin(Stdio::null()).stdout(File::create(&out)?).stderr(File::create(&err)?);
        let mut process = OwnProcess::new(command.spawn().context("start dunlin agent")?);
        let ready = wait_for("the agent", START_LIMIT, || {
            let text = fs::read_to_string(&out).ok()?;
            serde_json::from_str(text.lines().next()?).ok()
        });
        let ready = match ready {
            Ok(ready) => ready,
            Err(error) => {
                let status = process.wait_for(Duration::ZERO);
                return Err(error.context(format!("{status:?}: {}", fs::read_to_string(&err)?)));
            }
        };
        Ok(Self { process, folder, ready })
    }

    /// The socket.
    pub fn socket(&self) -> PathBuf {
        self.ready["socket"].as_str().unwrap_or_default().into()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("err")).unwrap_or_default()
    }

    /// A scrape of its metrics.
    ///
    /// # Errors
    /// It does not answer.
    pub fn scrape(&self) -> Result<String> {
        let address = self.ready["metrics"].as_str().context("no metrics")?;
        let address = address.trim_start_matches("http://").trim_end_matches("/metrics");
        let stream = TcpStream::connect(address).context("connect")?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        let (status, body) = ask(stream, "/metrics")?;
        ensure!(status == 200, "status {status}");
        Ok(body)
    }

    /// The value of one series: a metric whose labels contain all of these.
    ///
    /// # Errors
    /// It does not answer.
    pub fn metric(&self, name: &str, labels: &[&str]) -> Result<Option<f64>> {
        let text = self.scrape()?;
        let fits = |line: &&str| {
            let rest = line.strip_prefix(name).filter(|rest| rest.starts_with(['{', ' ']));
            rest.is_some() && labels.iter().all(|label| line.contains(label))
        };
        Ok(text.lines().find(fits).and_then(|line| line.rsplit_once(' ')?.1.parse().ok()))
    }

    /// Status and object at a path of its socket.
    ///
    /// # Errors
    /// It does not answer.
    pub fn get(&self, path: &str) -> Result<(u16, Value)> {
        let stream = UnixStream::connect(self.socket()).context("connect")?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        let (status, body) = ask(stream, path)?;
        Ok((status, serde_json::from_str(&body).with_context(|| body)?))
    }

    /// The newest view.
    ///
    /// # Errors
    /// It does not answer.
    pub fn fleet(&self) -> Result<Value> {
        Ok(self.get("/v1/fleet")?.1)
    }

    /// The VM of a process in the newest view.
    pub fn vm(&self, pid: u32) -> Option<Value> {
        self.fleet().ok()?["vms"].as_array()?.iter().find(|vm| vm["pid"] == pid).cloned()
    }

    /// Its resident memory, in bytes.
    pub fn resident_bytes(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).ok()?;
        let kibibytes = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        kibibytes.split_whitespace().next()?.parse::<u64>().ok().map(|kibibytes| kibibytes * 1024)
    }
}

/// One request; what the other end answers until it closes.
fn ask(mut stream: impl Read + Write, path: &str) -> Result<(u16, String)> {
    write!(stream, "GET {path} HTTP/1.1\r\nhost: dunlin\r\nconnection: close\r\n\r\n")?;
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset && !bytes.is_empty() => {}
        Err(error) => return Err(error.into()),
    }
    let text = String::from_utf8(bytes)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no head")?;
    let status = head.split(' ').nth(1).context("no status")?.parse()?;
    ensure!(!head.to_ascii_lowercase().contains("transfer-encoding"), "a body in pieces: {head}");
    Ok((status, body.to_owned()))
}

/// A process of this very test program that holds a small VM, and ends when its standard input does. The suite has the test
/// `NAME`, which is ignored, and calls [`tiny_vm_process`].
#[derive(Debug)]
pub struct TinyVmProcess(pub OwnProcess);

/// Set in such a process: what its VM does.
const ROLE: &str = "DUNLIN_TINY_VM";

/// What the VM of such a process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Writes its pages once, and rests.
    Rest,
    /// Leaves its guest for the VMM as fast as it can.
    Exits,
    /// Has its pages protected and written as fast as it can.
    Pages,
}

impl TinyVmProcess {
    /// Starts one, and does not wait for it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(test: &str, role: Role) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args([test, "--exact", "--ignored", "--nocapture", "--test-threads=1"]).env(ROLE, format!("{role:?}"));
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(OwnProcess::new(command.spawn()?)))
    }
}

/// What such a process runs; returns at once in any other.
///
/// # Panics
/// If KVM refuses.
#[cfg(target_arch = "x86_64")]
pub fn tiny_vm_process() {
    use dunlin::model::{DirtyLogKind, PageCount};
    use dunlin::trial::tiny_vm::TinyVm;
    use std::sync::atomic::{AtomicBool, Ordering};
    let Ok(role) = std::env::var(ROLE) else { return };
    let pages = PageCount(if role == "Pages" { 2048 } else { 16 });
    let mut vm = TinyVm::new(pages, DirtyLogKind::Bitmap).unwrap();
    vm.write_pages(pages).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ends_with_its_writer = io::stdin().read_to_end(&mut Vec::new());
            over.store(true, Ordering::Relaxed);
        });
        while role != "Rest" && !over.load(Ordering::Relaxed) {
            if role == "Pages" {
                vm.set_logging(false).unwrap();
                vm.set_logging(true).unwrap();
                vm.write_pages(pages).unwrap();
            } else {
                vm.write_pages(PageCount(1)).unwrap();
            }
        }
    });
}
