//! Programs at the entry of a kernel function (`fentry`), of one in a module too.
//!
//! The BPF library loads such programs for functions of the kernel proper only: it knows no way to say in which module's type information
//! a function's id is. So one program is loaded here, from the same object and onto the same maps; all that the library exports of
//! reading an object is used.
//!
//! Owns what the kernel is told of the function. Must not know what the program counts.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use aya::Ebpf;
use aya::maps::Map;
use aya_obj::Object;
use aya_obj::generated::bpf_insn;

use super::syscall::{self, ProgramKind};

/// A function of the kernel, by its type information.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Function {
    /// The type's id.
    pub(crate) id: u32,
    /// The module whose types have it; none: the kernel's own.
    pub(crate) module: Option<&'static str>,
}

/// Loads the program `name` of `object` for a function's entry, onto the maps of `bpf`, which is that object loaded.
///
/// # Errors
/// The object is not what was built with this program, a map that the program uses is not with `bpf`, or what the kernel answered.
pub(super) fn load(object: &[u8], name: &str, bpf: &Ebpf, function: Function) -> io::Result<OwnedFd> {
    let types = function.module.map(syscall::module_types).transpose()?;
    let code = relocated(object, name, bpf)?;
    syscall::load_code(ProgramKind::FunctionEntry(function.id), types.as_ref(), &code)
}

/// The program's code with the descriptors of the maps in it.
fn relocated(object: &[u8], name: &str, bpf: &Ebpf) -> io::Result<Vec<bpf_insn>> {
    let mut object = Object::parse(object).map_err(io::Error::other)?;
    let missing = || io::Error::other(format!("the object has no program {name}"));
    let key = object.programs.get(name).ok_or_else(missing)?.function_key();
    let sections: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
    let programs: HashSet<_> = object.programs.values().map(aya_obj::Program::function_key).collect();
    // Other programs use maps that are elsewhere by now.
    object.programs.retain(|other, _| other == name);
    object.functions.retain(|other, _| *other == key || !programs.contains(other));
    let maps = std::mem::take(&mut object.maps);
    let descriptors = maps.iter().filter_map(|(name, map)| Some((name.as_str(), descriptor(bpf.map(name)?)?, map)));
    object.relocate_maps(descriptors, &sections).map_err(io::Error::other)?;
    object.relocate_calls(&sections).map_err(io::Error::other)?;
    object.functions.remove(&key).map(|function| function.instructions).ok_or_else(missing)
}

/// Of the kinds of maps that the programs have.
fn descriptor(map: &Map) -> Option<RawFd> {
    match map {
        Map::Array(map) | Map::HashMap(map) | Map::LruHashMap(map) | Map::RingBuf(map) => {
            Some(map.fd().as_fd().as_raw_fd())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::object::embedded_object;
    use super::*;

    #[test]
    fn the_kernel_takes_the_code_as_it_takes_the_librarys() {
        // A build without programs, or a user without the right to load any, has nothing to show here.
        let Ok(object) = embedded_object() else { return };
        let Ok(bpf) = Ebpf::load(object) else { return };
        let code = relocated(object, dunlin_ebpf::program::PAGE_LOGGED_AT_ENTRY, &bpf).unwrap();
        assert!(code.len() > 50, "{} instructions", code.len());
        // Arguments lie as a raw tracepoint's do, and raw tracepoints are allowed where function entries are not.
        syscall::load_code(ProgramKind::RawTracepoint, None, &code).unwrap();
        assert!(relocated(object, "no_such_program", &bpf).is_err());
    }

    #[test]
    fn a_module_that_is_not_there_is_said_to_be_missing() {
        let error = syscall::module_types("no_such_module").unwrap_err();
        assert!(matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EPERM)), "{error}");
    }
}
