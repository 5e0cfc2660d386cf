//! Who writes a guest's memory: a VM, a vCPU, one of its address spaces, code in it, or a place that is written.
//!
//! Owns the names of writers. Must not know how a write is put down to one.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::guest::{AddressSpace, Gva, MemoryRange};
use super::process::GuestProcess;

/// A writer. A vCPU is part of the VM, an address space part of a vCPU, code part of an address space; a region is another cut
/// through the VM.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Writer {
    /// All of the VM, devices included.
    Vm,
    /// A vCPU.
    Vcpu {
        /// Its index in the VM.
        index: u32,
        /// The host's thread that runs it.
        thread_id: u32,
    },
    /// What a vCPU writes while one address space is loaded.
    AddressSpace {
        /// The vCPU's index.
        vcpu: u32,
        /// Which address space.
        address_space: AddressSpace,
        /// Whose it is, if the guest could be asked.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        process: Option<GuestProcess>,
    },
    /// What a vCPU writes while its instruction pointer is in a range of one address space.
    Code {
        /// The vCPU's index.
        vcpu: u32,
        /// Which address space.
        address_space: AddressSpace,
        /// The range's first byte.
        first: Gva,
        /// Its last byte.
        last: Gva,
    },
    /// What is written to a part of guest memory, by whomever.
    Region {
        /// Which part.
        range: MemoryRange,
    },
}

impl Writer {
    /// The same writer without what may become known later or change: two observations of one writer are equal so.
    pub fn identity(&self) -> Self {
        match self {
            Self::AddressSpace { vcpu, address_space, process: _ } => {
                Self::AddressSpace { vcpu: *vcpu, address_space: *address_space, process: None }
            }
            other => other.clone(),
        }
    }
}

impl fmt::Display for Writer {
    /// For people; the guest's words are escaped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vm => f.write_str("the whole VM"),
            Self::Vcpu { index, thread_id } => write!(f, "vCPU {index} (thread {thread_id})"),
            Self::AddressSpace { vcpu, address_space, process: None } => {
                write!(f, "address space {address_space} on vCPU {vcpu}")
            }
            Self::AddressSpace { vcpu, address_space, process: Some(process) } => {
                let name = process.name.escape_debug();
                write!(f, "process {} `{name}` (address space {address_space}) on vCPU {vcpu}", process.pid)
            }
            Self::Code { vcpu, address_space, first, last } => {
                write!(f, "code at {first} to {last} in address space {address_space} on vCPU {vcpu}")
            }
            Self::Region { range } => write!(f, "guest memory {} to {}", range.start, range.end()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Gpa;

    #[test]
    fn writers_are_told_apart_by_place_and_not_by_name() {
        let space = |process| Writer::AddressSpace { vcpu: 1, address_space: AddressSpace(0x1000), process };
        let named = space(Some(GuestProcess { pid: 7, name: "db\u{1b}[2J".to_owned(), threads: None }));
        assert_ne!(named, space(None));
        assert_eq!(named.identity(), space(None).identity());
        assert_eq!(named.to_string(), "process 7 `db\\u{1b}[2J` (address space 0x1000) on vCPU 1");
    }

    #[test]
    fn json_names_the_kind() {
        let region = Writer::Region { range: MemoryRange { start: Gpa(4096), bytes: 8192 } };
        let text = r#"{"kind":"region","range":{"start":4096,"bytes":8192}}"#;
        assert_eq!(serde_json::to_string(&region).unwrap(), text);
        assert_eq!(serde_json::from_str::<Writer>(text).unwrap(), region);
        let vcpu = Writer::Vcpu { index: 0, thread_id: 9 };
        assert_eq!(serde_json::to_string(&vcpu).unwrap(), r#"{"kind":"vcpu","index":0,"thread_id":9}"#);
    }
}
