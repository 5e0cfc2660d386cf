//! Who a VM and a migration are: one identity in journal, log, metrics and report of both hosts.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A VM's UUID: given by its operator, or made at its first start and kept through every migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VmId(pub Uuid);

impl VmId {
    /// A new random identity (UUID version 4).
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for VmId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

/// One attempt to move one VM. Both hosts use the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MigrationId(pub Uuid);

impl MigrationId {
    /// A new random identity (UUID version 4).
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How an operator points at a VM: `NAME`, `uuid:U` or `pid:P`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmRef {
    /// The name that `dunlin vm run --name` gave.
    Name(VmName),
    /// The VM's UUID.
    Uuid(VmId),
    /// The process that holds the VM's KVM descriptor.
    Pid(u32),
}

/// A VM's name: 1 to 64 letters, digits, `-`, `_` or `.`, not starting with `.` or `-`. It names files and sockets,
/// so nothing that a path could misread is let in.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

/// A VM argument that names nothing.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` names no VM; write a NAME (letters, digits, `-`, `_`, `.`; at most 64), uuid:U or pid:P")]
pub struct VmRefError(String);

impl VmName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for VmName {
    type Err = VmRefError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fine = (1..=64).contains(&text.len())
            && !text.starts_with(['.', '-'])
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if fine { Ok(Self(text.to_owned())) } else { Err(VmRefError(text.to_owned())) }
    }
}

impl TryFrom<String> for VmName {
    type Error = VmRefError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<VmName> for String {
    fn from(name: VmName) -> Self {
        name.0
    }
}

impl FromStr for VmRef {
    type Err = VmRefError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = || VmRefError(text.to_owned());
        if let Some(uuid) = text.strip_prefix("uuid:") {
            return uuid.parse().map(Self::Uuid).map_err(|_| refuse());
        }
        if let Some(pid) = text.strip_prefix("pid:") {
            return pid.parse().ok().filter(|&pid| pid > 0).map(Self::Pid).ok_or_else(refuse);
        }
        text.parse().map(Self::Name)
    }
}

impl fmt::Display for VmRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => name.fmt(f),
            Self::Uuid(id) => write!(f, "uuid:{id}"),
            Self::Pid(pid) => write!(f, "pid:{pid}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_named_three_ways() {
        assert!(matches!("web-1".parse(), Ok(VmRef::Name(_))));
        assert_eq!("pid:17".parse(), Ok(VmRef::Pid(17)));
        let id = VmId::random();
        assert_eq!(format!("uuid:{id}").parse(), Ok(VmRef::Uuid(id)));
        for bad in ["", "../x", ".x", "-x", "a/b", "pid:0", "pid:x", "uuid:1", &"x".repeat(65)] {
            assert!(bad.parse::<VmRef>().is_err(), "{bad} was accepted");
        }
    }
}
