//! One write of a guest, as it was seen by itself.

use serde::{Deserialize, Serialize};

use super::guest::{AddressSpace, Gfn, Gva};
use super::schema::Schema;

/// A mapping of guest memory that turned writable, because of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestWrite {
    /// When, in nanoseconds: by the monotonic clock, or in a recording after its first look.
    pub at_ns: u64,
    /// The host's thread that wrote: a vCPU, or one that acts for it.
    pub thread_id: u32,
    /// The first page that turned writable.
    pub gfn: Gfn,
    /// Pages that did: more than one of a huge mapping.
    pub pages: u32,
    /// How many of them had not been written since the look before.
    pub fresh: u32,
    /// The address space that the vCPU had loaded, where that could be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address_space: Option<AddressSpace>,
    /// The guest's instruction, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instruction: Option<Gva>,
}

impl Schema for GuestWrite {
    const SCHEMA: &'static str = "dunlin.guest-write/v1";
}
