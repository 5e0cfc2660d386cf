//! Where cgroup hierarchies are mounted, and which group a thread is in: `/proc/self/mountinfo` and `/proc/PID/task/TID/cgroup` (proc(5), cgroups(7)).

use std::path::{Path, PathBuf};

/// Which kind of hierarchy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    One,
    Two,
}

impl Version {
    /// The file of a group that lists its threads, and takes one in that is written to it.
    pub(super) fn threads_file(self) -> &'static str {
        match self {
            Self::One => "tasks",
            Self::Two => "cgroup.threads",
        }
    }
}

/// A hierarchy that has a controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hierarchy {
    pub(super) version: Version,
    pub(super) root: PathBuf,
}

/// The hierarchy that has `controller`: of version 1 if there is one, since a controller is in one hierarchy only.
pub(super) fn find(controller: &str) -> Option<Hierarchy> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let has =
        |root: &Path| std::fs::read_to_string(root.join("cgroup.controllers")).is_ok_and(|all| lists(&all, controller));
    let mut second = None;
    for (kind, root, options) in mounts.lines().filter_map(mount) {
        match kind {
            "cgroup" if options.split(',').any(|option| option == controller) => {
                return Some(Hierarchy { version: Version::One, root });
            }
            "cgroup2" if has(&root) => second = Some(Hierarchy { version: Version::Two, root }),
            _ => {}
        }
    }
    second
}

/// Whether a file of version 2 that lists controllers has one.
pub(super) fn lists(text: &str, controller: &str) -> bool {
    text.split_ascii_whitespace().any(|one| one == controller)
}

/// Kind, place and options of one line: the fields behind `-` are kind, source and options.
fn mount(line: &str) -> Option<(&str, PathBuf, &str)> {
    let (before, after) = line.split_once(" - ")?;
    let root = before.split(' ').nth(4)?;
    let mut after = after.split(' ');
    let (kind, options) = (after.next()?, after.nth(1)?);
    Some((kind, PathBuf::from(unescaped(root)), options))
}

/// Spaces and the like are written as octal numbers.
fn unescaped(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
}

/// The group of a thread below the hierarchy's root. None: it has ended.
pub(super) fn group_of(process: u32, thread: u32, version: Version) -> Option<PathBuf> {
    let text = std::fs::read_to_string(format!("/proc/{process}/task/{thread}/cgroup")).ok()?;
    text.lines().find_map(|line| group(line, version))
}

/// The group of a line that is of this version, and of version 1 has the controller.
fn group(line: &str, version: Version) -> Option<PathBuf> {
    let mut fields = line.splitn(3, ':');
    let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    let is_it = match version {
        Version::One => controllers.split(',').any(|controller| controller == "cpu"),
        Version::Two => number == "0" && controllers.is_empty(),
    };
    // A group outside of our own namespace is shown as above its root.
    let relative = path.strip_prefix('/').filter(|path| !path.split('/').any(|part| part == ".."));
    is_it.then_some(relative).flatten().map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_and_groups_are_read_as_proc_writes_them() {
        let line = "31 23 0:27 / /sys/fs/cgroup/cpu,cpu\\040acct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct";
        let (kind, root, options) = mount(line).unwrap();
        assert_eq!(
            (kind, root.as_path(), options),
            ("cgroup", Path::new("/sys/fs/cgroup/cpu,cpu acct"), "rw,cpu,cpuacct")
        );
        assert_eq!(mount("nonsense"), None);
        let one = |line| group(line, Version::One).map(|path| path.display().to_string());
        let two = |line| group(line, Version::Two).map(|path| path.display().to_string());
        assert_eq!(one("4:cpu,cpuacct:/machine/vm-1"), Some("machine/vm-1".to_owned()));
        assert_eq!((one("4:cpuset:/machine"), one("0::/a:b")), (None, None));
        assert_eq!(two("0::/a:b/c"), Some("a:b/c".to_owned()));
        assert_eq!((two("1:cpu:/a"), two("0::/../outside"), two("0::")), (None, None, None));
    }
}
