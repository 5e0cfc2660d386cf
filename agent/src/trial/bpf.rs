//! Trials of BPF: type information, each kind of program, and whether tracepoints are emitted at all.

use std::ffi::CString;
use std::io;

use crate::btf::{BtfError, KernelTypes, Kind};
use crate::probe::syscall::{self, ProgramKind};

/// A tracepoint of the kernel itself, for trying a kind of program without KVM.
const ANY_TRACEPOINT: &str = "sched_switch";
/// A function of the kernel itself, likewise.
const ANY_FUNCTION: &str = "bpf_fentry_test1";

/// Makes a map that can be mapped.
///
/// # Errors
/// What the kernel answered.
pub fn map() -> io::Result<String> {
    syscall::try_map().map(|()| String::new())
}

/// Reads the types of the kernel and of KVM.
///
/// # Errors
/// There are none.
pub fn type_information() -> io::Result<String> {
    let types = KernelTypes::with_module("kvm").map_err(|error| match error {
        BtfError::Unreadable { source, .. } if source.raw_os_error() == Some(libc::EACCES) => source,
        other => io::Error::other(other.to_string()),
    })?;
    match types.member_offset("kvm_page_fault", "gfn") {
        Some(_) => Ok("of the kernel and of KVM".to_owned()),
        None => Err(io::Error::other("the kernel's is there, KVM's is not (is the module loaded?)")),
    }
}

/// Loads and attaches a raw tracepoint program.
///
/// # Errors
/// What the kernel answered.
pub fn raw_tracepoint() -> io::Result<String> {
    let program = syscall::load(ProgramKind::RawTracepoint)?;
    syscall::attach(&program, Some(&CString::new(ANY_TRACEPOINT)?))?;
    Ok(String::new())
}

/// Loads and attaches a typed tracepoint program.
///
/// # Errors
/// What the kernel answered.
pub fn typed_tracepoint() -> io::Result<String> {
    let name = format!("btf_trace_{ANY_TRACEPOINT}");
    load_on(&name, Kind::Typedef, ProgramKind::TypedTracepoint)
}

/// Loads and attaches a program at a function's entry.
///
/// # Errors
/// What the kernel answered.
pub fn function_entry() -> io::Result<String> {
    load_on(ANY_FUNCTION, Kind::Func, ProgramKind::FunctionEntry)
}

fn load_on(name: &str, kind: Kind, program: fn(u32) -> ProgramKind) -> io::Result<String> {
    let types = KernelTypes::vmlinux().map_err(|error| io::Error::other(error.to_string()))?;
    let id = types.id(name, kind).ok_or_else(|| io::Error::other(format!("this kernel has no {name}")))?;
    let program = syscall::load(program(id))?;
    syscall::attach(&program, None)?;
    Ok(String::new())
}

/// How often each of some tracepoints was emitted on this host while `work` ran; an error for one that does not exist or
/// cannot be attached to.
///
/// # Errors
/// Run counts cannot be switched on, or `work` failed.
pub fn emitted(names: &[&str], work: impl FnOnce() -> io::Result<()>) -> io::Result<Vec<io::Result<u64>>> {
    let _counting = syscall::count_runs()?;
    let attached: Vec<io::Result<_>> = names
        .iter()
        .map(|name| {
            let program = syscall::load(ProgramKind::RawTracepoint)?;
            let link = syscall::attach(&program, Some(&CString::new(*name)?))?;
            Ok((program, link))
        })
        .collect();
    work()?;
    Ok(attached.into_iter().map(|attached| syscall::run_count(&attached?.0)).collect())
}
