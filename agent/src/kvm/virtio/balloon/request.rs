//! What the requests of the balloon's queues say (virtio 1.2, 5.5.6).
//!
//! Owns their formats and how much of one request is looked at. Bytes in, plain values out. Must not know memory's layout or
//! what is done with the pages.

use serde::{Deserialize, Serialize};

use crate::kvm::virtio::queue::Buffers;

/// Page numbers that are read of one request to inflate; Linux sends 256.
pub(super) const MAX_PAGE_NUMBERS: usize = 4096;
/// Statistics that are read of one buffer; 16 are defined.
const MAX_STATISTICS: usize = 64;
/// `struct virtio_balloon_stat`: a tag of 16 bits and a value of 64, packed (5.5.6.3).
const STATISTIC_BYTES: usize = 10;

/// What the guest says of its memory (virtio 1.2, 5.5.6.4). A value that it does not tell is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestStats {
    /// Bytes read back from swap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_in_bytes: Option<u64>,
    /// Bytes written to swap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_out_bytes: Option<u64>,
    /// Page faults that needed I/O.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    /// Page faults that needed none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    /// Memory used for nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_bytes: Option<u64>,
    /// All memory that the guest manages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<u64>,
    /// Memory that new work could have without swapping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_bytes: Option<u64>,
    /// Caches of files, which the guest can drop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_cache_bytes: Option<u64>,
    /// Huge pages that were had.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that could not be had.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_failures: Option<u64>,
}

impl GuestStats {
    /// Reads a buffer of the statistics queue. Tags that are not known are left out.
    pub(super) fn read(buffers: &Buffers<'_>) -> Self {
        let mut stats = Self::default();
        let count = (buffers.len() / STATISTIC_BYTES).min(MAX_STATISTICS);
        let mut bytes = vec![0; count * STATISTIC_BYTES];
        buffers.read(0, &mut bytes);
        for entry in bytes.chunks_exact(STATISTIC_BYTES) {
            let (tag, value) = entry.split_at(2);
            let (Ok(tag), Ok(value)) = (tag.try_into(), value.try_into()) else { continue };
            let place = match u16::from_le_bytes(tag) {
                0 => &mut stats.swap_in_bytes,
                1 => &mut stats.swap_out_bytes,
                2 => &mut stats.major_faults,
                3 => &mut stats.minor_faults,
                4 => &mut stats.free_bytes,
                5 => &mut stats.total_bytes,
                6 => &mut stats.available_bytes,
                7 => &mut stats.disk_cache_bytes,
                8 => &mut stats.hugetlb_allocations,
                9 => &mut stats.hugetlb_failures,
                _ => continue,
            };
            *place = Some(u64::from_le_bytes(value));
        }
        stats
    }
}

/// The runs of guest page numbers that a request to inflate names, as (first, count), ascending and apart. At most
/// [`MAX_PAGE_NUMBERS`] of them are looked at: the second value is whether those were all.
pub(super) fn page_numbers(buffers: &Buffers<'_>) -> (Vec<(u64, u64)>, bool) {
    let count = buffers.len() / 4;
    let mut bytes = vec![0; count.min(MAX_PAGE_NUMBERS) * 4];
    buffers.read(0, &mut bytes);
    let mut numbers: Vec<u32> = bytes.chunks_exact(4).map(|n| n.try_into().map_or(0, u32::from_le_bytes)).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for number in numbers.into_iter().map(u64::from) {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == number => *count += 1,
            _ => runs.push((number, 1)),
        }
    }
    (runs, count <= MAX_PAGE_NUMBERS)
}

/// The command id that a buffer of the hinting queue announces, if it is one.
pub(super) fn command_id(buffers: &Buffers<'_>) -> Option<u32> {
    let mut id = [0; 4];
    buffers.read(0, &mut id).then(|| u32::from_le_bytes(id))
}
