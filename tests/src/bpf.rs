//! Which BPF programs and links there are in the kernel, by id, and which of them a process holds.

use std::collections::BTreeSet;
use std::fs;
use std::io;

/// A kind of object, by the command that lists it (`enum bpf_cmd`, include/uapi/linux/bpf.h), and by what `/proc/PID/fdinfo` calls its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Programs.
    Program,
    /// Maps.
    Map,
    /// Links: what attaches a program.
    Link,
}

impl Kind {
    /// All.
    pub const ALL: [Self; 3] = [Self::Program, Self::Map, Self::Link];

    const fn next_id(self) -> libc::c_long {
        match self {
            Self::Program => 11,
            Self::Map => 12,
            Self::Link => 31,
        }
    }

    const fn word(self) -> &'static str {
        match self {
            Self::Program => "prog_id:",
            Self::Map => "map_id:",
            Self::Link => "link_id:",
        }
    }
}

/// Whether the kernel has an object of this id.
///
/// # Errors
/// It does not say.
pub fn exists(kind: Kind, id: u32) -> io::Result<bool> {
    // The first of `union bpf_attr`: start_id, next_id, open_flags.
    let mut attr = [id.wrapping_sub(1), 0, 0];
    // SAFETY: the kernel reads and writes only the three words, which live through the call.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, kind.next_id(), attr.as_mut_ptr(), size_of_val(&attr)) };
    match answer {
        0 => Ok(attr[1] == id),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            error => Err(error),
        },
    }
}

/// The ids of what a process holds.
pub fn held_by(pid: u32, kind: Kind) -> BTreeSet<u32> {
    let entries = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    let texts = entries.filter_map(|entry| fs::read_to_string(entry.path()).ok());
    let ids = |text: String| -> Vec<u32> {
        // A link's text names its program too.
        if kind == Kind::Program && text.contains(Kind::Link.word()) {
            return Vec::new();
        }
        text.lines().filter_map(|line| line.strip_prefix(kind.word())?.trim().parse().ok()).collect()
    };
    texts.flat_map(ids).collect()
}
