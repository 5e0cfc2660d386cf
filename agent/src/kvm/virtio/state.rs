//! The saved state of a virtio device: a little-endian version, then a postcard body.
//!
//! Owns the format. Must not know which values a device can take: whoever restores checks them.

use serde::{Deserialize, Serialize};

/// The version this build writes. A later one must still read it.
pub(super) const VERSION: u16 = 1;
/// The longest state that is looked at, in bytes; a real one has about a hundred.
pub(super) const MAX_BYTES: usize = 4096;

/// What a device with the mmio transport is made of, beyond its backend and guest memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DeviceState {
    /// Virtio device type (virtio 1.2, 5).
    pub device_id: u32,
    /// The device's configuration space; it holds what must be the same at both hosts (MAC, capacity).
    pub config: Vec<u8>,
    /// Features that the driver accepted.
    pub driver_features: u64,
    /// `DeviceFeaturesSel`.
    pub device_features_select: u32,
    /// `DriverFeaturesSel`.
    pub driver_features_select: u32,
    /// `QueueSel`.
    pub queue_select: u32,
    /// `Status`, without `DEVICE_NEEDS_RESET`.
    pub status: u8,
    /// `DEVICE_NEEDS_RESET`.
    pub needs_reset: bool,
    /// `InterruptStatus`: raised and not yet acknowledged.
    pub interrupt_status: u32,
    /// Every queue of the device, in order.
    pub queues: Vec<QueueState>,
}

/// One queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueueState {
    /// `QueueNum` as the driver wrote it.
    pub size: u32,
    /// `QueueReady`.
    pub ready: bool,
    /// `QueueDesc`.
    pub descriptors: u64,
    /// `QueueDriver`.
    pub available: u64,
    /// `QueueDevice`.
    pub used: u64,
    /// Next entry of the available ring to take.
    pub next_avail: u16,
    /// Next entry of the used ring to fill.
    pub next_used: u16,
}

/// Bytes that are no state of a version this build reads.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum StateError {
    /// Longer than [`MAX_BYTES`], or too short for a version.
    #[error("a state of {0} bytes is not between 2 and {MAX_BYTES}")]
    Length(usize),
    /// Written by a later build.
    #[error("state version {0}; this build reads {VERSION}")]
    Version(u16),
    /// The body cannot be read, or more follows it.
    #[error("the state's body cannot be read")]
    Body,
}

impl DeviceState {
    /// The bytes of it.
    pub(super) fn encode(&self) -> Vec<u8> {
        let header = VERSION.to_le_bytes().to_vec();
        // Growing a Vec cannot fail, and the types are all plain; an empty body would be refused by `decode`.
        postcard::to_extend(self, header).unwrap_or_default()
    }

    /// Reads what [`DeviceState::encode`] wrote.
    ///
    /// # Errors
    /// Bytes that are none.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let length = || StateError::Length(bytes.len());
        if bytes.len() > MAX_BYTES {
            return Err(length());
        }
        let (version, body) = bytes.split_first_chunk::<2>().ok_or_else(length)?;
        match u16::from_le_bytes(*version) {
            VERSION => match postcard::take_from_bytes(body) {
                Ok((state, [])) => Ok(state),
                _ => Err(StateError::Body),
            },
            later => Err(StateError::Version(later)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> DeviceState {
        DeviceState {
            device_id: 1,
            config: vec![2, 0, 0, 0, 0, 1, 1, 0],
            driver_features: 1 << 32 | 1 << 5,
            status: 15,
            interrupt_status: 1,
            queues: vec![
                QueueState {
                    size: 256,
                    ready: true,
                    descriptors: 0x1000,
                    available: 0x2000,
                    used: 0x3000,
                    next_avail: 65535,
                    next_used: 65535,
                },
                QueueState::default(),
            ],
            ..DeviceState::default()
        }
    }

    /// What version 1 looks like on disk and wire. If this fails, the format changed: raise [`VERSION`] and keep
    /// reading this one.
    #[test]
    fn version_1_reads_as_it_was_written() {
        let golden = [
            1, 0, 1, 8, 2, 0, 0, 0, 0, 1, 1, 0, 160, 128, 128, 128, 16, 0, 0, 0, 15, 0, 1, 2, 128, 2, 1, 128, 32, 128,
            64, 128, 96, 255, 255, 3, 255, 255, 3, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(DeviceState::decode(&golden), Ok(sample()));
        assert_eq!(sample().encode(), golden);
    }

    #[test]
    fn what_is_no_state_is_refused() {
        let good = sample().encode();
        assert_eq!(DeviceState::decode(&[]), Err(StateError::Length(0)));
        assert_eq!(DeviceState::decode(&[2, 0, 0]), Err(StateError::Version(2)));
        assert_eq!(DeviceState::decode(&good[..good.len() - 1]), Err(StateError::Body));
        assert_eq!(DeviceState::decode(&[&good[..], &[0]].concat()), Err(StateError::Body));
        assert_eq!(DeviceState::decode(&vec![1; MAX_BYTES + 1]), Err(StateError::Length(MAX_BYTES + 1)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_state_or_an_error(bytes: Vec<u8>) {
            let _ = DeviceState::decode(&bytes);
        }
    }
}
