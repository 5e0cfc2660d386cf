//! CPU bandwidth of single threads, by cgroups of both versions.
//!
//! Owns where a thread is moved to, the limit that it has there, that the limit is kept in short periods (`pacer`), and that everything is as it was afterwards. Must not know why a thread is limited. A thread is only
//! ever moved into a child of the group that it is in, which is made for it and removed again; nobody else's limit is changed.
//!
//! Version 1: a child of the thread's group in the `cpu` hierarchy (Documentation/scheduler/sched-bwc.rst). Version 2: a threaded child (Documentation/admin-guide/cgroup-v2.rst,
//! "Threads"); where the group does not hand `cpu` on to its children that is switched on, and off again behind the last child.

mod mounts;
mod pacer;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Access, access};

use self::mounts::{Hierarchy, Version, find, group_of, lists};
use self::pacer::Pacer;

/// How the names of the groups begin that are made here; the thread follows, and the process that made the group.
const PREFIX: &str = "dunlin-stun-";
/// A word of the command line of processes that make groups.
pub const HOLDER: &str = "stun-holder";
/// How often a limit is enforced, as long as the quota is not too small for that.
pub const PERIOD: Duration = Duration::from_millis(10);
/// The kernel takes no longer period (`max_cfs_quota_period`, kernel/sched/core.c).
pub const LONGEST_PERIOD: Duration = Duration::from_secs(1);
/// The kernel takes no quota below 1 ms (`min_cfs_quota_period`).
const LEAST_QUOTA: Duration = Duration::from_millis(1);
/// How deep groups of a former run are looked for.
const DEPTH: usize = 16;

/// What the scheduler is told: a thread runs for `quota` in each `period`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bandwidth {
    quota: Duration,
    period: Duration,
}

impl Bandwidth {
    /// This part of one CPU: in periods of [`PERIOD`], and where the quota would be less than the kernel takes in longer ones, up to `longest_hold`. None: no limit.
    fn of(share: f64, longest_hold: Duration) -> Option<Self> {
        let share = if share.is_finite() { share.max(0.0) } else { 1.0 };
        let longest = longest_hold.clamp(PERIOD, LONGEST_PERIOD);
        let share = share.max(LEAST_QUOTA.as_secs_f64() / longest.as_secs_f64());
        let period = LEAST_QUOTA.div_f64(share).clamp(PERIOD, longest);
        let quota = period.mul_f64(share.min(1.0)).max(LEAST_QUOTA);
        // In whole microseconds, as the kernel takes them.
        let whole = |time: Duration| Duration::from_micros(time.as_micros() as u64);
        let (quota, period) = (whole(quota + Duration::from_nanos(500)), whole(period));
        (quota < period).then_some(Self { quota, period })
    }

    fn share(self) -> f64 {
        self.quota.as_secs_f64() / self.period.as_secs_f64()
    }
}

/// A thread cannot be limited.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// There is no hierarchy with the controller.
    #[error("no cgroup hierarchy with the `cpu` controller is mounted: mount one")]
    NoController,
    /// The group does not have the controller.
    #[error("the group {} of thread {thread} does not have the `cpu` controller: whoever manages it must hand it on (systemd: `Delegate=yes`, or `CPUAccounting=yes`)", group.display())]
    NotHandedOn {
        /// The thread.
        thread: u32,
        /// Its group.
        group: PathBuf,
    },
    /// Nobody may make groups there.
    #[error("{}: {cause}: a limit needs a group below it; run this as root, where cgroups can be written (in a container they often cannot)", group.display())]
    NotWritable {
        /// The group of the thread.
        group: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },
    /// The group hands on controllers that its threads cannot have.
    #[error("the group {} of thread {thread} can have no threaded children: it hands on controllers of whole processes (cgroup.subtree_control), or has children with processes", group.display())]
    NotThreadable {
        /// The thread.
        thread: u32,
        /// Its group.
        group: PathBuf,
    },
    /// Two at once.
    #[error("thread {thread} is limited already: {} exists; another `dunlin stun` is at it, or was killed (`dunlin stun --clear`)", group.display())]
    Taken {
        /// The thread.
        thread: u32,
        /// The group.
        group: PathBuf,
    },
    /// A file.
    #[error("{action} {}: {cause}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },
    /// The thread has ended.
    #[error("thread {0} has ended")]
    Ended(u32),
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> CgroupError + 'a {
    move |cause| CgroupError::Io { action, path: path.to_owned(), cause }
}

fn write(path: &Path, text: &str) -> Result<(), CgroupError> {
    fs::write(path, text).map_err(failed("writing", path))
}

/// A thread that has a group of its own. Dropping it puts the thread back.
#[derive(Debug)]
pub struct LimitedThread {
    process: u32,
    thread: u32,
    version: Version,
    /// Where it was.
    home: PathBuf,
    /// Where it is.
    group: PathBuf,
    /// Whether `home` was made to hand the controller on.
    handed_on: bool,
    pacer: Option<Pacer>,
    is_back: bool,
}

/// Where a thread is, and where it can have a group of its own.
struct Place {
    version: Version,
    home: PathBuf,
}

impl Place {
    fn of(process: u32, thread: u32) -> Result<Self, CgroupError> {
        let Hierarchy { version, root } = find("cpu").ok_or(CgroupError::NoController)?;
        let home = root.join(group_of(process, thread, version).ok_or(CgroupError::Ended(thread))?);
        if let Some(group) = group_of_thread(&home, thread) {
            return Err(CgroupError::Taken { thread, group });
        }
        if version == Version::Two {
            let controllers = home.join("cgroup.controllers");
            let has = fs::read_to_string(&controllers).map_err(failed("reading", &controllers))?;
            if !lists(&has, "cpu") {
                return Err(CgroupError::NotHandedOn { thread, group: home });
            }
        }
        access(&home, Access::WRITE_OK)
            .map_err(|error| CgroupError::NotWritable { group: home.clone(), cause: error.into() })?;
        Ok(Self { version, home })
    }
}

/// Looks whether a thread can be limited, and changes nothing.
///
/// # Errors
/// Says what is missing.
pub fn check(process: u32, thread: u32) -> Result<(), CgroupError> {
    Place::of(process, thread).map(drop)
}

impl LimitedThread {
    /// Moves a thread of a process into a group of its own, without a limit yet.
    ///
    /// # Errors
    /// Says what is missing; nothing is left behind.
    pub fn take(process: u32, thread: u32) -> Result<Self, CgroupError> {
        let Place { version, home } = Place::of(process, thread)?;
        let group = home.join(format!("{PREFIX}{thread}.{}", std::process::id()));
        fs::create_dir(&group).map_err(failed("making", &group))?;
        let mut limited = Self { process, thread, version, home, group, handed_on: false, pacer: None, is_back: false };
        // From here on dropping it undoes what was done.
        if version == Version::Two {
            match write(&limited.group.join("cgroup.type"), "threaded") {
                Err(CgroupError::Io { cause, .. }) if cause.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    return Err(CgroupError::NotThreadable { thread, group: limited.home.clone() });
                }
                other => other?,
            }
            let handed = limited.home.join("cgroup.subtree_control");
            let hands = fs::read_to_string(&handed).map_err(failed("reading", &handed))?;
            if !lists(&hands, "cpu") {
                write(&handed, "+cpu")?;
                limited.handed_on = true;
            }
        }
        limited.move_to(&limited.group)?;
        Ok(limited)
    }

    fn move_to(&self, group: &Path) -> Result<(), CgroupError> {
        match write(&group.join(self.version.threads_file()), &self.thread.to_string()) {
            Err(CgroupError::Io { cause, .. }) if cause.raw_os_error() == Some(libc::ESRCH) => {
                Err(CgroupError::Ended(self.thread))
            }
            other => other,
        }
    }

    /// Limits it to this part of one CPU; 1 and more is no limit. It is held for no longer than `longest_hold` at a time, so the part is at least 1 ms of that. Returns
    /// what holds.
    ///
    /// # Errors
    /// The kernel refuses, as it does if the group is gone.
    pub fn limit(&mut self, share: f64, longest_hold: Duration) -> Result<f64, CgroupError> {
        let bandwidth = Bandwidth::of(share, longest_hold);
        let period_us = bandwidth.map_or(PERIOD, |it| it.period).as_micros();
        let quota_us = bandwidth.map(|it| it.quota.as_micros());
        match self.version {
            Version::One => {
                write(&self.group.join("cpu.cfs_period_us"), &period_us.to_string())?;
                let quota = quota_us.map_or_else(|| "-1".to_owned(), |quota| quota.to_string());
                write(&self.group.join("cpu.cfs_quota_us"), &quota)?;
            }
            Version::Two => {
                let quota = quota_us.map_or_else(|| "max".to_owned(), |quota| quota.to_string());
                write(&self.group.join("cpu.max"), &format!("{quota} {period_us}"))?;
            }
        }
        match bandwidth {
            None => self.pacer = None,
            Some(_) if self.pacer.is_none() => self.pacer = Pacer::start(self.process, self.thread),
            Some(_) => {}
        }
        Ok(bandwidth.map_or(1.0, Bandwidth::share))
    }

    /// For how long it was held so far.
    ///
    /// # Errors
    /// The group is gone.
    pub fn held(&self) -> Result<Duration, CgroupError> {
        let path = self.group.join("cpu.stat");
        let text = fs::read_to_string(&path).map_err(failed("reading", &path))?;
        // Version 1 counts nanoseconds, version 2 microseconds.
        let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
        let held = match self.version {
            Version::One => value("throttled_time ").map(Duration::from_nanos),
            Version::Two => value("throttled_usec ").map(Duration::from_micros),
        };
        Ok(held.unwrap_or_default())
    }

    /// Puts it back where it was, and removes its group.
    ///
    /// # Errors
    /// It could not be put back; a thread that has ended is no error.
    pub fn put_back(mut self) -> Result<(), CgroupError> {
        self.go_back()
    }

    fn go_back(&mut self) -> Result<(), CgroupError> {
        if std::mem::replace(&mut self.is_back, true) {
            return Ok(());
        }
        self.pacer = None;
        let moved = match self.move_to(&self.home) {
            Err(CgroupError::Ended(_)) => Ok(()),
            other => other,
        };
        let removed = fs::remove_dir(&self.group).map_err(failed("removing", &self.group));
        if self.handed_on {
            stop_handing_on(&self.home);
        }
        moved.and(removed)
    }
}

impl Drop for LimitedThread {
    fn drop(&mut self) {
        if let Err(error) = self.go_back() {
            tracing::warn!("{error}");
        }
    }
}

/// Has a group hand the controller on no more, unless a child needs it still: the kernel may refuse, and then it needs it.
fn stop_handing_on(home: &Path) {
    let has_others = fs::read_dir(home).is_ok_and(|entries| entries.flatten().any(|entry| is_ours(&entry.path())));
    if !has_others {
        let _ = fs::write(home.join("cgroup.subtree_control"), "-cpu");
    }
}

/// Thread and maker of a group of ours; none: it is not.
fn parts(path: &Path) -> Option<(u32, u32)> {
    let (thread, maker) = path.file_name()?.to_str()?.strip_prefix(PREFIX)?.split_once('.')?;
    Some((thread.parse().ok()?, maker.parse().ok()?))
}

fn is_ours(path: &Path) -> bool {
    parts(path).is_some()
}

/// The group that a thread has been moved to by anybody; it is a child of `home`, or `home` itself.
fn group_of_thread(home: &Path, thread: u32) -> Option<PathBuf> {
    if is_ours(home) {
        return Some(home.to_owned());
    }
    let mut children = fs::read_dir(home).ok()?.flatten().map(|entry| entry.path());
    children.find(|child| parts(child).is_some_and(|(of, _)| of == thread))
}

/// Whether whoever made a group may still be at it.
fn has_maker(maker: u32) -> bool {
    let command = fs::read(format!("/proc/{maker}/cmdline")).unwrap_or_default();
    command.split(|&byte| byte == 0).any(|word| word == HOLDER.as_bytes())
}

/// Removes every group whose maker is gone, its threads put back. Returns the groups, and what could not be removed.
///
/// # Errors
/// There is no hierarchy, so nothing can have been left.
pub fn clear() -> Result<(Vec<PathBuf>, Vec<CgroupError>), CgroupError> {
    let Hierarchy { version, root } = find("cpu").ok_or(CgroupError::NoController)?;
    let (mut cleared, mut failures, mut leftovers) = (Vec::new(), Vec::new(), Vec::new());
    let mut groups = vec![(root, 0)];
    while let Some((group, depth)) = groups.pop() {
        let Ok(entries) = fs::read_dir(&group) else { continue };
        for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            let path = entry.path();
            match parts(&path) {
                None if depth < DEPTH => groups.push((path, depth + 1)),
                Some((_, maker)) if !has_maker(maker) => leftovers.push((group.clone(), path)),
                _ => {}
            }
        }
    }
    for (home, path) in leftovers {
        match dissolve(&home, &path, version) {
            Ok(()) => cleared.push(path),
            Err(error) => failures.push(error),
        }
    }
    Ok((cleared, failures))
}

fn dissolve(home: &Path, group: &Path, version: Version) -> Result<(), CgroupError> {
    let file = version.threads_file();
    let threads = group.join(file);
    let text = fs::read_to_string(&threads).map_err(failed("reading", &threads))?;
    for thread in text.lines() {
        // One that ended meanwhile is where it belongs.
        let _ = fs::write(home.join(file), thread);
    }
    fs::remove_dir(group).map_err(failed("removing", group))?;
    if version == Version::Two {
        stop_handing_on(home);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_part_of_a_cpu_has_longer_periods_and_no_hold_is_longer_than_allowed() {
        let of = |share: f64, longest_ms: u64| {
            Bandwidth::of(share, Duration::from_millis(longest_ms))
                .map(|it| (it.quota.as_micros(), it.period.as_micros()))
        };
        assert_eq!(of(0.5, 50), Some((5000, 10_000)));
        assert_eq!(of(0.1, 50), Some((1000, 10_000)));
        assert_eq!(of(0.04, 50), Some((1000, 25_000)));
        // The least.
        assert_eq!(of(0.001, 50), Some((1000, 50_000)));
        assert_eq!((of(0.0, 50), of(-3.0, 50)), (Some((1000, 50_000)), Some((1000, 50_000))));
        assert_eq!((of(0.0, 10), of(0.0, 0)), (Some((1000, 10_000)), Some((1000, 10_000))));
        assert_eq!(of(0.0, 5000), Some((1000, 1_000_000)));
        // No limit.
        assert_eq!((of(1.0, 50), of(7.0, 50), of(f64::NAN, 50), of(f64::INFINITY, 50)), (None, None, None, None));
    }
}
