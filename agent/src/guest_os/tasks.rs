//! The list of a Linux kernel's processes, read while the kernel changes it.
//!
//! Owns the list's form (`task_struct.tasks`, circular, its head in the first task) and what is believed of it. A walk needs no lock: a
//! process that leaves the list keeps its links until no reader of the guest's own can be on it (RCU). So a walk may be torn, seldom, and
//! then does not fit together; it is made again.

use std::collections::HashSet;

use super::layout::{Layout, Threads};
use super::paging::{Virtual, root_of};
use super::reader::ReadError;
use crate::model::{AddressSpace, Gpa, GuestProcess, Gva};

/// `PID_MAX_LIMIT` (include/linux/threads.h).
const MAX_PID: u32 = 4 << 20;
/// Processes that are named.
const MAX_PROCESSES: usize = 1 << 17;
/// Threads that are looked at for a process whose first has ended.
const MAX_ENDED_THREADS: u32 = 16;
/// How often a list that does not fit together is read again.
const ATTEMPTS: u32 = 3;

/// A process that has an address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Process {
    /// Where its root table lies.
    pub(super) root: Gpa,
    /// What it is.
    pub(super) process: GuestProcess,
}

/// What one walk found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Walk {
    /// In the list's order, which is that of age.
    pub(super) processes: Vec<Process>,
    /// The list fitted together from its head to its head, and every process in it could be read.
    pub(super) whole: bool,
}

/// The kernel of a guest, through whichever address space.
pub(super) struct Tasks<'a> {
    pub(super) space: &'a Virtual<'a>,
    pub(super) layout: &'a Layout,
    /// Where the list's head is: `init_task`.
    pub(super) first: Gva,
}

/// One task, as it was read.
struct Task {
    next: Gva,
    prev: Gva,
    mm: u64,
    signal: u64,
    pid: u32,
    tgid: u32,
    comm: Vec<u8>,
}

/// A member of a structure in the kernel's half of the addresses; none if the structure does not lie there, where no pointer leads that
/// the kernel follows.
fn member(structure: u64, offset: u32) -> Result<Gva, ReadError> {
    let there = structure >> 63 == 1 && structure.is_multiple_of(8);
    structure.checked_add(u64::from(offset)).filter(|_| there).map(Gva).ok_or(ReadError::Unmapped)
}

impl Tasks<'_> {
    /// Whether the first task is where it is said to be: an idle task without an address space of its own, in a list that closes.
    pub(super) fn is_first(&self) -> Result<bool, ReadError> {
        for _ in 0..ATTEMPTS {
            match self.looks_first() {
                Ok(false) | Err(ReadError::Unmapped) => {}
                done => return done,
            }
        }
        Ok(false)
    }

    fn looks_first(&self) -> Result<bool, ReadError> {
        let task = self.task(self.first)?;
        let links = member(self.first.0, self.layout.tasks)?;
        // Alone in the list it is in a kernel that has not started its first process; or in no kernel.
        Ok(task.pid == 0
            && task.tgid == 0
            && task.mm == 0
            && task.comm.starts_with(b"swapper")
            && task.next != links
            && self.space.word(Gva(task.next.0.checked_add(8).ok_or(ReadError::Unmapped)?))? == links.0
            && self.space.word(task.prev)? == links.0)
    }

    /// What the first task is called: the kernel itself.
    pub(super) fn kernel(&self) -> Result<GuestProcess, ReadError> {
        Ok(GuestProcess { pid: 0, name: printable(&self.task(self.first)?.comm), threads: None })
    }

    /// All processes that have an address space.
    pub(super) fn walk(&self) -> Result<Walk, ReadError> {
        let mut best = Walk::default();
        for _ in 0..ATTEMPTS {
            let walk = self.walk_once()?;
            if walk.whole || walk.processes.len() > best.processes.len() {
                best = walk;
            }
            if best.whole {
                break;
            }
        }
        Ok(best)
    }

    fn walk_once(&self) -> Result<Walk, ReadError> {
        let head = member(self.first.0, self.layout.tasks)?;
        let mut walk = Walk { processes: Vec::new(), whole: true };
        let mut seen = HashSet::from([head]);
        let first = self.task(self.first)?;
        let reached = self.follow(&mut walk, &mut seen, first.next, |task| (task.next, task.prev), head)?;
        if !reached {
            // What lies behind the break is reached from the other end.
            walk.whole = false;
            self.follow(&mut walk, &mut seen, first.prev, |task| (task.prev, task.next), head)?;
        }
        Ok(walk)
    }

    /// Goes from `links` on until the list closes; whether it did. `way` tells where a task leads, and where one must have come from.
    fn follow(
        &self,
        walk: &mut Walk,
        seen: &mut HashSet<Gva>,
        mut links: Gva,
        way: impl Fn(&Task) -> (Gva, Gva),
        head: Gva,
    ) -> Result<bool, ReadError> {
        let mut from = head;
        while links != head {
            if seen.len() > MAX_PROCESSES || !seen.insert(links) {
                return Ok(false);
            }
            let task = match links.0.checked_sub(u64::from(self.layout.tasks)).map(|at| self.task(Gva(at))) {
                None | Some(Err(ReadError::Unmapped)) => return Ok(false),
                Some(task) => task?,
            };
            let (on, back) = way(&task);
            walk.whole &= back == from;
            match self.process(&task) {
                Ok(process) => walk.processes.extend(process),
                Err(ReadError::Unmapped) => walk.whole = false,
                Err(error) => return Err(error),
            }
            (from, links) = (links, on);
        }
        Ok(true)
    }

    fn task(&self, at: Gva) -> Result<Task, ReadError> {
        let layout = self.layout;
        let (mut links, mut mm, mut signal) = ([0; 16], [0; 8], [0; 8]);
        let (mut pid, mut tgid, mut comm) = ([0; 4], [0; 4], vec![0; layout.comm_bytes]);
        let place = |offset| member(at.0, offset);
        self.space.read_many([
            (place(layout.tasks)?, &mut links[..]),
            (place(layout.mm)?, &mut mm),
            (place(layout.signal)?, &mut signal),
            (place(layout.pid)?, &mut pid),
            (place(layout.tgid)?, &mut tgid),
            (place(layout.comm)?, &mut comm),
        ])?;
        let links = u128::from_le_bytes(links);
        Ok(Task {
            next: Gva(links as u64),
            prev: Gva((links >> 64) as u64),
            mm: u64::from_le_bytes(mm),
            signal: u64::from_le_bytes(signal),
            pid: u32::from_le_bytes(pid),
            tgid: u32::from_le_bytes(tgid),
            comm,
        })
    }

    /// What a task of the list is as a process; none for a thread of the kernel, and for what has ended.
    fn process(&self, task: &Task) -> Result<Option<Process>, ReadError> {
        if !(1..=MAX_PID).contains(&task.pid) || !(1..=MAX_PID).contains(&task.tgid) {
            return Err(ReadError::Unmapped);
        }
        let count = match self.layout.threads {
            Some(threads) => Some(self.space.half_word(member(task.signal, threads.count)?)?),
            None => None,
        };
        let threads = count.filter(|count| (1..=MAX_PID).contains(count));
        let mm = match (task.mm, self.layout.threads) {
            // The first thread may end before the others.
            (0, Some(layout)) if threads > Some(1) => self.mm_of_threads(task.signal, layout)?,
            (mm, _) => mm,
        };
        if mm == 0 {
            return Ok(None);
        }
        let table = Gva(self.space.word(member(mm, self.layout.pgd)?)?);
        let root = root_of(AddressSpace(self.space.translate(table)?.0));
        let name = printable(&task.comm);
        Ok(Some(Process { root, process: GuestProcess { pid: task.tgid, name, threads } }))
    }

    /// The address space of the first thread that has one, or zero.
    fn mm_of_threads(&self, signal: u64, layout: Threads) -> Result<u64, ReadError> {
        let head = member(signal, layout.head)?;
        let mut node = self.space.word(head)?;
        for _ in 0..MAX_ENDED_THREADS {
            let at = node.checked_sub(u64::from(layout.node)).filter(|_| node != head.0);
            let Some(at) = at else { break };
            let mm = self.space.word(member(at, self.layout.mm)?)?;
            if mm != 0 {
                return Ok(mm);
            }
            node = self.space.word(member(at, layout.node)?)?;
        }
        Ok(0)
    }
}

/// A name without what a terminal would obey or what could pass for something else: letters, digits and ASCII as they are.
fn printable(comm: &[u8]) -> String {
    let end = comm.iter().position(|&byte| byte == 0).unwrap_or(comm.len());
    let text = String::from_utf8_lossy(&comm[..end]);
    text.chars().map(|c| if c.is_ascii_graphic() || c == ' ' || c.is_alphanumeric() { c } else { '?' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_hold_nothing_that_a_terminal_obeys() {
        assert_eq!(printable(b"nginx: worker\0rest"), "nginx: worker");
        assert_eq!(printable(b"\x1b[31mred\n"), "?[31mred?");
        assert_eq!(printable("größe\u{202e}x".as_bytes()), "größe?x");
        assert_eq!((printable(b"\xff\xfe"), printable(b"")), ("??".into(), String::new()));
    }
}
