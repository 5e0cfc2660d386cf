//! `bpf(2)` by hand, for trying what the kernel allows: the smallest map, the smallest program of each kind.
//!
//! Needs no BPF object, so `dunlin doctor` works in a build without one. Distinguishes what `aya` hides: the errno.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// `BPF_MAP_CREATE` and so on (`enum bpf_cmd`, include/uapi/linux/bpf.h).
const MAP_CREATE: libc::c_long = 0;
const PROG_LOAD: libc::c_long = 5;
const PROG_TEST_RUN: libc::c_long = 10;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const RAW_TRACEPOINT_OPEN: libc::c_long = 17;
const BTF_GET_FD_BY_ID: libc::c_long = 19;
const BTF_GET_NEXT_ID: libc::c_long = 23;
const ENABLE_STATS: libc::c_long = 32;

/// A kind of program, and what it is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProgramKind {
    /// `BPF_PROG_TYPE_RAW_TRACEPOINT`.
    RawTracepoint,
    /// `BPF_PROG_TYPE_TRACING` with `BPF_TRACE_RAW_TP`, on the typedef with this type id.
    TypedTracepoint(u32),
    /// `BPF_PROG_TYPE_TRACING` with `BPF_TRACE_FENTRY`, on the function with this type id.
    FunctionEntry(u32),
}

/// The part of `union bpf_attr` that the calls below use, zero elsewhere.
#[repr(C)]
#[derive(Default)]
struct MapAttr {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct ProgramAttr {
    kind: u32,
    instructions: u32,
    code: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    ifindex: u32,
    expected_attach_type: u32,
    btf_fd: u32,
    func_info_size: u32,
    func_info: u64,
    func_info_count: u32,
    line_info_size: u32,
    line_info: u64,
    line_info_count: u32,
    attach_btf_id: u32,
    attach_fd: u32,
    core_relo_count: u32,
}

#[repr(C)]
#[derive(Default)]
struct AttachAttr {
    name: u64,
    program: u32,
    padding: u32,
}

/// Makes and drops a mappable array of one value.
///
/// # Errors
/// What the kernel answered.
pub fn try_map() -> io::Result<()> {
    // BPF_MAP_TYPE_ARRAY, BPF_F_MMAPABLE.
    let attr = MapAttr { kind: 2, key_size: 4, value_size: 8, max_entries: 1, flags: 1 << 10 };
    bpf(MAP_CREATE, &attr).map(drop)
}

/// Loads a program that does nothing.
///
/// # Errors
/// What the kernel answered: the verifier's `EINVAL`, the policy's `EPERM`.
pub fn load(kind: ProgramKind) -> io::Result<OwnedFd> {
    // r0 = 0; exit
    load_code(kind, None, &[0xb7u64, 0x95])
}

/// Loads a program of these instructions. `module` is the type information that a [`ProgramKind::FunctionEntry`]'s id is of, where that is not
/// the kernel's own ([`module_types`]).
///
/// # Errors
/// What the kernel answered: the verifier's `EINVAL` or `EACCES`, the policy's `EPERM`.
pub fn load_code<Instruction>(
    kind: ProgramKind,
    module: Option<&OwnedFd>,
    code: &[Instruction],
) -> io::Result<OwnedFd> {
    const { assert!(size_of::<Instruction>() == 8) };
    let license = c"GPL";
    let (kind, expected_attach_type, attach_btf_id) = match kind {
        ProgramKind::RawTracepoint => (17, 0, 0),
        ProgramKind::TypedTracepoint(id) => (26, 23, id),
        ProgramKind::FunctionEntry(id) => (26, 24, id),
    };
    let attr = ProgramAttr {
        kind,
        instructions: code.len() as u32,
        code: code.as_ptr() as u64,
        license: license.as_ptr() as u64,
        expected_attach_type,
        attach_btf_id,
        attach_fd: module.map_or(0, |module| module.as_raw_fd() as u32),
        ..ProgramAttr::default()
    };
    bpf(PROG_LOAD, &attr)
}

/// The type information of a module that is loaded.
///
/// # Errors
/// What the kernel answered; `ENOENT` when it has none of that name.
pub fn module_types(module: &str) -> io::Result<OwnedFd> {
    /// `struct bpf_btf_info`.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        types: u64,
        types_size: u32,
        id: u32,
        name: u64,
        name_size: u32,
        of_kernel: u32,
    }
    // Each number that the kernel tells is larger than the one before.
    let mut after = 0u32;
    loop {
        let mut ids = [after, 0, 0];
        call_mut(BTF_GET_NEXT_ID, &mut ids)?;
        after = ids[1];
        // One that goes between the two calls is none that is looked for.
        let Ok(types) = bpf(BTF_GET_FD_BY_ID, &[after]) else { continue };
        let mut name = [0u8; 64];
        let mut info = Info { name: name.as_mut_ptr() as u64, name_size: name.len() as u32, ..Info::default() };
        let attr = InfoAttr {
            program: types.as_raw_fd() as u32,
            length: size_of::<Info>() as u32,
            info: (&raw mut info) as u64,
        };
        call(OBJ_GET_INFO_BY_FD, &attr)?;
        if info.of_kernel == 1 && name.split(|&byte| byte == 0).next() == Some(module.as_bytes()) {
            return Ok(types);
        }
    }
}

/// Attaches a program: to the tracepoint `name`, or, for kinds that carry their target, to that.
///
/// # Errors
/// What the kernel answered; `ENOENT` when it has no such tracepoint.
pub fn attach(program: &OwnedFd, name: Option<&std::ffi::CStr>) -> io::Result<OwnedFd> {
    let attr = AttachAttr {
        name: name.map_or(0, |name| name.as_ptr() as u64),
        program: program.as_raw_fd() as u32,
        padding: 0,
    };
    bpf(RAW_TRACEPOINT_OPEN, &attr)
}

#[repr(C)]
struct InfoAttr {
    program: u32,
    length: u32,
    info: u64,
}

/// `struct bpf_prog_info` up to and with `run_cnt`, in 64-bit words.
const RUN_COUNT_WORD: usize = 25;

/// Has the kernel count runs of programs, until what is returned is dropped.
///
/// # Errors
/// What the kernel answered.
pub fn count_runs() -> io::Result<OwnedFd> {
    // BPF_STATS_RUN_TIME.
    bpf(ENABLE_STATS, &0u32)
}

/// How often a program has run while runs were counted.
///
/// # Errors
/// What the kernel answered.
pub fn run_count(program: &OwnedFd) -> io::Result<u64> {
    run_stats(program).map(|stats| stats.run_count)
}

/// How often, and for how long in all, a program has run while runs were counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunStats {
    /// Nanoseconds.
    pub run_time_ns: u64,
    /// Runs.
    pub run_count: u64,
}

/// See [`RunStats`].
///
/// # Errors
/// What the kernel answered.
pub fn run_stats(program: impl AsFd) -> io::Result<RunStats> {
    let mut info = [0u64; RUN_COUNT_WORD + 1];
    let attr = InfoAttr {
        program: program.as_fd().as_raw_fd() as u32,
        length: size_of_val(&info) as u32,
        info: info.as_mut_ptr() as u64,
    };
    call(OBJ_GET_INFO_BY_FD, &attr)?;
    Ok(RunStats { run_time_ns: info[RUN_COUNT_WORD - 1], run_count: info[RUN_COUNT_WORD] })
}

/// `test` of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct RunAttr {
    program: u32,
    answer: u32,
    data_sizes: [u32; 2],
    data: [u64; 2],
    repeat: u32,
    duration: u32,
    context_sizes: [u32; 2],
    contexts: [u64; 2],
    flags: u32,
    cpu: u32,
    batch_size: u32,
    padding: u32,
}

/// Runs a raw tracepoint program once, here and now, with these arguments; what it returned.
///
/// # Errors
/// What the kernel answered; it does not run programs by hand before Linux 5.10.
pub fn run(program: impl AsFd, arguments: &[u64]) -> io::Result<u32> {
    let mut attr = RunAttr {
        program: program.as_fd().as_raw_fd() as u32,
        context_sizes: [size_of_val(arguments) as u32, 0],
        contexts: [arguments.as_ptr() as u64, 0],
        ..RunAttr::default()
    };
    call_mut(PROG_TEST_RUN, &mut attr)?;
    Ok(attr.answer)
}

/// One `bpf(2)` that answers with a descriptor.
fn bpf<T>(command: libc::c_long, attr: &T) -> io::Result<OwnedFd> {
    let fd = call(command, attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// One whose answer is in its own structure.
fn call_mut<T>(command: libc::c_long, attr: &mut T) -> io::Result<()> {
    // SAFETY: a whole, initialised C structure without padding that the kernel may write its answer to; its pointers are valid during
    // the call.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn call<T>(command: libc::c_long, attr: &T) -> io::Result<i32> {
    // SAFETY: `attr` is a whole, initialised C structure without padding, whose pointers are valid during the call.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer as i32) }
}
