//! The process that holds threads of foreign VMs at their limit, or has their VMM do so: apart from whoever decides, so that its death or standstill releases them.
//!
//! Owns the lease: what is not asked for again within a second ends. Both ends of its pipe are here. It does nothing but limit and put back, so that there is little in it
//! that can fail; if it is killed itself, its groups are found by their names (`dunlin stun --clear`, and at the next start).

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};

use crate::cgroup::{self, LimitedThread};
use crate::foreign::qmp::Qmp;
use crate::model::chain;
use crate::port::THROTTLE_LEASE;

/// The command that the process is started with.
pub const COMMAND: &str = crate::cgroup::HOLDER;
/// How long it may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a monitor may take to answer it.
const MONITOR_PATIENCE: Duration = Duration::from_secs(2);
/// No line is longer.
const MOST_BYTES: usize = 4096;

/// The holder does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum HolderError {
    /// It cannot be started, or is gone.
    #[error("the process that holds vCPUs: {0}")]
    Pipe(#[from] io::Error),
    /// It refused.
    #[error("{0}")]
    Refused(String),
}

/// The holder as whoever decides has it. Dropping it releases all threads.
#[derive(Debug)]
pub struct Holder {
    child: Child,
    /// Closed first when it is dropped.
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Holder {
    /// Starts it; it holds no thread for longer than `longest_hold` at a time.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn start(longest_hold: Duration) -> Result<Self, HolderError> {
        let mut command = Command::new(std::env::current_exe()?);
        // In a group of its own: Ctrl-C is for whoever decides, who then lets go in good order.
        command.arg(COMMAND).stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let mut child = command.spawn()?;
        let (Some(orders), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::Error::other("its pipes were not made").into());
        };
        let mut holder = Self { child, orders: Some(orders), answers: BufReader::new(answers) };
        holder.ask(&format!("longest-hold {}", longest_hold.as_micros()))?;
        Ok(holder)
    }

    /// Has it take a thread, without a limit yet.
    ///
    /// # Errors
    /// It says why not.
    pub fn take(&mut self, process: u32, thread: u32) -> Result<(), HolderError> {
        self.ask(&format!("take {process} {thread}")).map(drop)
    }

    /// Limits a thread to a part of one CPU; says what holds then, and for how long the thread was held so far.
    ///
    /// # Errors
    /// It says why not.
    pub fn limit(&mut self, thread: u32, share: f64) -> Result<(f64, Duration), HolderError> {
        let answer = self.ask(&format!("limit {thread} {share}"))?;
        let mut words = answer.split(' ');
        let share = words.next().and_then(|word| word.parse().ok());
        let held = words.next().and_then(|word| word.parse().ok()).map(Duration::from_nanos);
        share.zip(held).ok_or_else(|| HolderError::Refused(format!("its answer is not understood: {answer}")))
    }

    /// Has it put a thread back.
    ///
    /// # Errors
    /// It says why not.
    pub fn release(&mut self, thread: u32) -> Result<(), HolderError> {
        self.ask(&format!("release {thread}")).map(drop)
    }

    /// Has it go on as it does.
    ///
    /// # Errors
    /// It is gone.
    pub fn renew(&mut self) -> Result<(), HolderError> {
        self.ask("renew").map(drop)
    }

    /// Has it connect to a monitor, for the orders below.
    ///
    /// # Errors
    /// It says why not.
    pub fn connect(&mut self, monitor: &Path) -> Result<(), HolderError> {
        self.ask(&format!("monitor {}", monitor.display())).map(drop)
    }

    /// Has the VMM itself limit a vCPU, in MB/s.
    ///
    /// # Errors
    /// It says why not.
    pub fn dirty_limit(&mut self, vcpu: u32, megabytes: u64) -> Result<(), HolderError> {
        self.ask(&format!("dirty-limit {vcpu} {megabytes}")).map(drop)
    }

    /// Has the VMM limit a vCPU no more.
    ///
    /// # Errors
    /// It says why not.
    pub fn cancel_dirty_limit(&mut self, vcpu: u32) -> Result<(), HolderError> {
        self.ask(&format!("cancel-dirty-limit {vcpu}")).map(drop)
    }

    /// How long the VMM takes to answer.
    ///
    /// # Errors
    /// It does not.
    pub fn vmm_answers(&mut self) -> Result<Duration, HolderError> {
        let answer = self.ask("answers")?;
        let took = answer.parse().map(Duration::from_nanos);
        took.map_err(|_| HolderError::Refused(format!("its answer is not understood: {answer}")))
    }

    fn ask(&mut self, order: &str) -> Result<String, HolderError> {
        let orders = self.orders.as_mut().ok_or_else(|| io::Error::from(io::ErrorKind::BrokenPipe))?;
        orders.write_all(format!("{order}\n").as_bytes())?;
        if self.answers.buffer().is_empty() && !readable(self.answers.get_ref(), PATIENCE)? {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not answer").into());
        }
        let mut answer = String::new();
        if self.answers.read_line(&mut answer)? == 0 {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "it has ended").into());
        }
        match answer.trim_end().split_once(' ') {
            Some(("ok", rest)) => Ok(rest.to_owned()),
            Some(("error", why)) => Err(HolderError::Refused(why.to_owned())),
            _ if answer.trim_end() == "ok" => Ok(String::new()),
            _ => Err(HolderError::Refused(format!("its answer is not understood: {answer}"))),
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.orders.take());
        // It puts its threads back and ends, which closes its answers.
        while readable(self.answers.get_ref(), PATIENCE).unwrap_or(false) {
            if !matches!(self.answers.read(&mut [0; 512]), Ok(1..)) {
                let _ = self.child.wait();
                return;
            }
        }
        tracing::warn!("the process {} that holds vCPUs does not end: it is killed", self.child.id());
        let _ = (self.child.kill(), self.child.wait());
        if let Err(error) = crate::cgroup::clear() {
            tracing::warn!("{error}");
        }
    }
}

/// Whether there is something to read, or the end of it, within `limit`.
fn readable(from: impl AsFd, limit: Duration) -> io::Result<bool> {
    let until = Instant::now() + limit;
    loop {
        let left = Timespec::try_from(until.saturating_duration_since(Instant::now())).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&from, PollFlags::IN)], Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The holder itself: obeys until its orders end or none comes for the time of a lease, then puts all threads back.
///
/// # Errors
/// Its pipes fail; all threads are back then, too.
pub fn serve(orders: impl AsFd, mut answers: impl Write) -> io::Result<()> {
    let mut held = Held::default();
    let mut lines = Lines::default();
    while readable(&orders, THROTTLE_LEASE)? {
        let mut part = [0; 512];
        let count = rustix::io::read(&orders, &mut part)?;
        if count == 0 || !lines.add(&part[..count]) {
            break;
        }
        while let Some(line) = lines.next() {
            let answer = match Order::parse(&line).and_then(|order| held.obey(&order)) {
                Ok(answer) => format!("ok {answer}\n"),
                Err(why) => format!("error {}\n", why.replace('\n', "; ")),
            };
            match answers.write_all(answer.as_bytes()).and_then(|()| answers.flush()) {
                // Who asked is gone.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                written => written?,
            }
        }
    }
    Ok(())
}

/// Bytes cut into lines.
#[derive(Debug, Default)]
struct Lines {
    unread: Vec<u8>,
}

impl Lines {
    /// Takes bytes in; false: there is no line in more bytes than a line may have.
    fn add(&mut self, bytes: &[u8]) -> bool {
        self.unread.extend_from_slice(bytes);
        self.unread.len() <= MOST_BYTES || self.unread.contains(&b'\n')
    }

    fn next(&mut self) -> Option<String> {
        let end = self.unread.iter().position(|&byte| byte == b'\n')?;
        let line: Vec<u8> = self.unread.drain(..=end).collect();
        Some(String::from_utf8_lossy(&line).trim_end().to_owned())
    }
}

/// What the holder can be told.
#[derive(Clone, Debug, PartialEq)]
enum Order {
    /// Go on.
    Renew,
    /// Hold nobody for longer at a time, from the next limit on.
    LongestHold(Duration),
    Take {
        process: u32,
        thread: u32,
    },
    Limit {
        thread: u32,
        share: f64,
    },
    Release {
        thread: u32,
    },
    /// Speak to this monitor.
    Monitor(PathBuf),
    DirtyLimit {
        vcpu: u32,
        megabytes: u64,
    },
    CancelDirtyLimit {
        vcpu: u32,
    },
    /// Time the monitor.
    Answers,
}

impl Order {
    fn parse(line: &str) -> Result<Self, String> {
        fn number<T: std::str::FromStr>(word: &str) -> Result<T, String> {
            word.parse().map_err(|_| format!("`{word}` is no number"))
        }
        if let Some(path) = line.strip_prefix("monitor ") {
            return Ok(Self::Monitor(PathBuf::from(path)));
        }
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        match words.as_slice() {
            ["renew"] => Ok(Self::Renew),
            ["longest-hold", micros] => Ok(Self::LongestHold(Duration::from_micros(number(micros)?))),
            ["take", process, thread] => Ok(Self::Take { process: number(process)?, thread: number(thread)? }),
            ["limit", thread, share] => Ok(Self::Limit { thread: number(thread)?, share: number(share)? }),
            ["release", thread] => Ok(Self::Release { thread: number(thread)? }),
            ["dirty-limit", vcpu, megabytes] => {
                Ok(Self::DirtyLimit { vcpu: number(vcpu)?, megabytes: number(megabytes)? })
            }
            ["cancel-dirty-limit", vcpu] => Ok(Self::CancelDirtyLimit { vcpu: number(vcpu)? }),
            ["answers"] => Ok(Self::Answers),
            _ => Err(format!("`{line}` is no order")),
        }
    }
}

/// What a holder holds.
#[derive(Debug)]
struct Held {
    threads: BTreeMap<u32, LimitedThread>,
    longest_hold: Duration,
    monitor: Option<Qmp>,
    /// vCPUs that the VMM was told to limit.
    dirty_limited: BTreeSet<u32>,
}

impl Default for Held {
    fn default() -> Self {
        Self { threads: BTreeMap::new(), longest_hold: cgroup::PERIOD, monitor: None, dirty_limited: BTreeSet::new() }
    }
}

impl Held {
    fn obey(&mut self, order: &Order) -> Result<String, String> {
        let not_taken = |thread: u32| format!("thread {thread} was not taken");
        match *order {
            Order::Renew => {}
            Order::Monitor(ref path) => {
                self.monitor = Some(Qmp::connect(path, MONITOR_PATIENCE).map_err(|error| chain(&error))?);
            }
            Order::DirtyLimit { vcpu, megabytes } => {
                self.dirty_limited.insert(vcpu);
                let arguments = json!({ "cpu-index": vcpu, "dirty-rate": megabytes.max(1) });
                self.order("set-vcpu-dirty-limit", &arguments)?;
            }
            Order::CancelDirtyLimit { vcpu } => {
                self.order("cancel-vcpu-dirty-limit", &json!({ "cpu-index": vcpu }))?;
                self.dirty_limited.remove(&vcpu);
            }
            Order::Answers => {
                let began = Instant::now();
                self.order("query-status", &json!({}))?;
                return Ok(began.elapsed().as_nanos().to_string());
            }
            Order::LongestHold(time) => self.longest_hold = time,
            Order::Take { process, thread } => {
                let limited = LimitedThread::take(process, thread).map_err(|error| chain(&error))?;
                self.threads.insert(thread, limited);
            }
            Order::Limit { thread, share } => {
                let limited = self.threads.get_mut(&thread).ok_or_else(|| not_taken(thread))?;
                let holds = limited.limit(share, self.longest_hold).map_err(|error| chain(&error))?;
                let held = limited.held().map_err(|error| chain(&error))?;
                return Ok(format!("{holds} {}", held.as_nanos()));
            }
            Order::Release { thread } => {
                let limited = self.threads.remove(&thread).ok_or_else(|| not_taken(thread))?;
                limited.put_back().map_err(|error| chain(&error))?;
            }
        }
        Ok(String::new())
    }

    fn order(&mut self, name: &str, arguments: &Value) -> Result<(), String> {
        let monitor = self.monitor.as_mut().ok_or("no monitor was named")?;
        monitor.order(name, arguments, MONITOR_PATIENCE).map(drop).map_err(|error| chain(&error))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for vcpu in std::mem::take(&mut self.dirty_limited) {
            if let Err(error) = self.order("cancel-vcpu-dirty-limit", &json!({ "cpu-index": vcpu })) {
                tracing::warn!("vCPU {vcpu} may still be limited by its VMM (`cancel-vcpu-dirty-limit`): {error}");
            }
        }
    }
}

/// Takes any bytes as orders, and obeys none.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz(input: &[u8]) {
    let mut lines = Lines::default();
    for part in input.chunks(7) {
        if !lines.add(part) {
            assert!(input.len() > MOST_BYTES, "a line that is not too long was refused");
            return;
        }
        while let Some(line) = lines.next() {
            assert!(!line.contains('\n'));
            if let Ok(Order::Limit { share, .. }) = Order::parse(&line) {
                // Whatever it is, it becomes a limit or none.
                let _ = share.to_string();
            }
        }
    }
}

/// One of each.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz_seeds() -> Vec<Vec<u8>> {
    vec![
        b"longest-hold 50000\nrenew\ntake 17 18\nlimit 18 0.25\nrelease 18\nmonitor /run/a b\n\
        dirty-limit 1 33\ncancel-dirty-limit 1\nanswers\n"
            .to_vec(),
    ]
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn it_answers_each_order_and_ends_when_nobody_asks_any_more() {
        let (ours, its) = UnixStream::pair().unwrap();
        let its_answers = its.try_clone().unwrap();
        let serving = std::thread::spawn(move || serve(its, its_answers));
        let mut answers = BufReader::new(ours.try_clone().unwrap());
        let mut ask = |order: &str| {
            (&ours).write_all(format!("{order}\n").as_bytes()).unwrap();
            let mut answer = String::new();
            answers.read_line(&mut answer).unwrap();
            answer.trim_end().to_owned()
        };
        assert_eq!(ask("renew"), "ok");
        assert_eq!(ask("limit 7 0.5"), "error thread 7 was not taken");
        assert_eq!(ask("limit x 0.5"), "error `x` is no number");
        assert_eq!(ask("dirty-limit 1 33"), "error no monitor was named");
        assert!(ask("monitor /nowhere/qmp").starts_with("error no monitor answers at /nowhere/qmp"));
        assert_eq!(
            (ask("longest-hold 50000"), ask("longest-hold -1")),
            ("ok".into(), "error `-1` is no number".into())
        );
        assert_eq!(ask("nonsense"), "error `nonsense` is no order");
        assert!(ask("take 4194304 4194304").starts_with("error "), "no such thread");
        let began = Instant::now();
        serving.join().unwrap().unwrap();
        assert!(began.elapsed() < 3 * THROTTLE_LEASE);
    }
}
