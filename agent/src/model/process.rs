//! What is known of a process in a guest.

use serde::{Deserialize, Serialize};

/// A process of a guest, as the memory of its kernel shows it. It is only as true as the guest is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GuestProcess {
    /// Its number in the guest, as seen outside of containers; 0 for the kernel itself.
    pub pid: u32,
    /// Its name, as the guest's kernel has it: printable, and short (15 characters in Linux).
    pub name: String,
    /// How many threads it has, where that could be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
}
