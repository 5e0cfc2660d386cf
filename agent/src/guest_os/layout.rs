//! Where members lie in the structures of a guest's kernel.
//!
//! Owns the list of members that naming processes takes (include/linux/sched.h, mm_types.h, sched/signal.h of Linux). Must not know where a
//! structure is.

use crate::btf::KernelTypes;

/// The largest `task_struct` that is believed, in bytes; it has some thousand.
const MAX_TASK_BYTES: u32 = 1 << 20;
/// The longest name that is believed (`TASK_COMM_LEN` is 16).
const MAX_NAME_BYTES: u32 = 64;

/// Offsets in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// `task_struct.tasks`: the list of all processes.
    pub(super) tasks: u32,
    /// `task_struct.mm`: its address space; null for the kernel's own threads.
    pub(super) mm: u32,
    /// `task_struct.pid`.
    pub(super) pid: u32,
    /// `task_struct.tgid`: what is called the pid of a process.
    pub(super) tgid: u32,
    /// `task_struct.comm`.
    pub(super) comm: u32,
    /// The length of that.
    pub(super) comm_bytes: usize,
    /// `task_struct.signal`: what the threads of a process share.
    pub(super) signal: u32,
    /// `mm_struct.pgd`: the virtual address of the root table.
    pub(super) pgd: u32,
    /// How threads are found, where the kernel has it so.
    pub(super) threads: Option<Threads>,
}

/// Offsets in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Threads {
    /// `signal_struct.nr_threads`.
    pub(super) count: u32,
    /// `signal_struct.thread_head`: the list of them.
    pub(super) head: u32,
    /// `task_struct.thread_node`: its links.
    pub(super) node: u32,
}

impl Layout {
    /// Looks all of them up; says which is missing.
    pub(super) fn of(types: &KernelTypes) -> Result<Self, &'static str> {
        let within = types.size_of("task_struct").filter(|&bytes| bytes <= MAX_TASK_BYTES).ok_or("task_struct")?;
        let task = |member: &'static str, bytes: u32, full_name: &'static str| {
            let field = types.field("task_struct", member).ok_or(full_name)?;
            let fits = field.bytes >= bytes && field.offset.checked_add(field.bytes).is_some_and(|end| end <= within);
            if fits { Ok(field) } else { Err(full_name) }
        };
        let other = |structure, member| types.member_offset(structure, member).filter(|&at| at <= MAX_TASK_BYTES);
        let comm = task("comm", 1, "task_struct.comm")?;
        let threads = || {
            Some(Threads {
                count: other("signal_struct", "nr_threads")?,
                head: other("signal_struct", "thread_head")?,
                node: task("thread_node", 16, "task_struct.thread_node").ok()?.offset,
            })
        };
        Ok(Self {
            tasks: task("tasks", 16, "task_struct.tasks")?.offset,
            mm: task("mm", 8, "task_struct.mm")?.offset,
            pid: task("pid", 4, "task_struct.pid")?.offset,
            tgid: task("tgid", 4, "task_struct.tgid")?.offset,
            comm: comm.offset,
            comm_bytes: comm.bytes.min(MAX_NAME_BYTES) as usize,
            signal: task("signal", 8, "task_struct.signal")?.offset,
            pgd: other("mm_struct", "pgd").ok_or("mm_struct.pgd")?,
            threads: threads(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_os::testing;

    #[test]
    fn members_are_found_and_what_is_missing_is_named() {
        let layout = Layout::of(&KernelTypes::parse(&testing::types(&[])).unwrap()).unwrap();
        assert_eq!(layout, testing::LAYOUT);
        for missing in ["task_struct", "task_struct.tasks", "task_struct.comm", "mm_struct.pgd"] {
            assert_eq!(Layout::of(&KernelTypes::parse(&testing::types(&[missing])).unwrap()), Err(missing));
        }
        let without = Layout::of(&KernelTypes::parse(&testing::types(&["signal_struct.nr_threads"])).unwrap()).unwrap();
        assert_eq!(without, Layout { threads: None, ..testing::LAYOUT });
    }

    #[test]
    fn this_kernels_own_types_have_them_all() {
        // A kernel without type information is doctor's business, not this test's.
        if let Ok(types) = KernelTypes::vmlinux() {
            let layout = Layout::of(&types).unwrap();
            assert_eq!((layout.comm_bytes, layout.threads.is_some()), (16, true));
        }
    }
}
