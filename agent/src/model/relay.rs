//! Frames that reach a VM's former place when it has moved, and what became of them.

use serde::{Deserialize, Serialize};

/// An Ethernet frame, without its check sequence, and the VM's port that it came to, counted from 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayedFrame {
    /// The port.
    pub port: u16,
    /// Its bytes, destination address first.
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
}

impl RelayedFrame {
    /// Whether it is for one station: the group bit of the destination is clear (IEEE 802-2014, 8.2).
    pub fn is_unicast(&self) -> bool {
        self.bytes.first().is_some_and(|first| first & 1 == 0)
    }
}

/// What a source carried to its target after the VM ran there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayReport {
    /// Frames carried: those that had come between the pause and the VM's first word from there, and stragglers.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Of them, those that came when the VM already ran at the target.
    pub late_frames: u64,
    /// Frames that were not carried, since they were more than a relay may carry.
    pub dropped_frames: u64,
    /// For how long it was done.
    pub lasted_ns: u64,
    /// Why it ended early; empty if it did not.
    pub error: String,
}
