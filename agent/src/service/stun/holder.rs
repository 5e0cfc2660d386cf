//! The process that holds threads of foreign VMs at their limit: apart from whoever decides, so that its death or standstill releases them.
//!
//! Owns the lease: what is not asked for again within a second ends. Both ends of its pipe are here. It does nothing but limit and put back, so that there is little in it
//! that can fail; if it is killed itself, its groups are found by their names (`dunlin stun --clear`, and at the next start).

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::cgroup::LimitedThread;
use crate::model::chain;
use crate::port::THROTTLE_LEASE;

/// The command that the process is started with.
pub const COMMAND: &str = crate::cgroup::HOLDER;
/// How long it may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
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
    /// Starts it.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn start() -> io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        // In a group of its own: Ctrl-C is for whoever decides, who then lets go in good order.
        command.arg(COMMAND).stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let mut child = command.spawn()?;
        let (Some(orders), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::Error::other("its pipes were not made"));
        };
        Ok(Self { child, orders: Some(orders), answers: BufReader::new(answers) })
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
        // It puts its threads back and ends; that takes no longer than a lease.
        let _ = self.child.wait();
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
    let mut threads: BTreeMap<u32, LimitedThread> = BTreeMap::new();
    let mut unread: Vec<u8> = Vec::new();
    while readable(&orders, THROTTLE_LEASE)? {
        let mut part = [0; 512];
        let count = rustix::io::read(&orders, &mut part)?;
        if count == 0 {
            break;
        }
        unread.extend_from_slice(&part[..count]);
        while let Some(end) = unread.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = unread.drain(..=end).collect();
            let answer = match obey(&mut threads, &String::from_utf8_lossy(&line)) {
                Ok(answer) => format!("ok {answer}\n"),
                Err(why) => format!("error {}\n", why.replace('\n', "; ")),
            };
            answers.write_all(answer.as_bytes())?;
            answers.flush()?;
        }
        if unread.len() > MOST_BYTES {
            break;
        }
    }
    Ok(())
}

fn obey(threads: &mut BTreeMap<u32, LimitedThread>, line: &str) -> Result<String, String> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let number = |word: &str| word.parse::<u32>().map_err(|_| format!("`{word}` is no number"));
    match words.as_slice() {
        ["renew"] => Ok(String::new()),
        ["take", process, thread] => {
            let (process, thread) = (number(process)?, number(thread)?);
            let limited = LimitedThread::take(process, thread).map_err(|error| chain(&error))?;
            threads.insert(thread, limited);
            Ok(String::new())
        }
        ["limit", thread, share] => {
            let limited = threads.get(&number(thread)?).ok_or_else(|| format!("thread {thread} was not taken"))?;
            let share = share.parse().map_err(|_| format!("`{share}` is no share"))?;
            let holds = limited.limit(share).map_err(|error| chain(&error))?;
            let held = limited.held().map_err(|error| chain(&error))?;
            Ok(format!("{holds} {}", held.as_nanos()))
        }
        ["release", thread] => {
            let limited = threads.remove(&number(thread)?).ok_or_else(|| format!("thread {thread} was not taken"))?;
            limited.put_back().map(|()| String::new()).map_err(|error| chain(&error))
        }
        _ => Err(format!("`{}` is no order", line.trim_end())),
    }
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
        assert_eq!(ask("nonsense"), "error `nonsense` is no order");
        assert!(ask("take 4194304 4194304").starts_with("error "), "no such thread");
        let began = Instant::now();
        serving.join().unwrap().unwrap();
        assert!(began.elapsed() < 3 * THROTTLE_LEASE);
    }
}
