//! Where everything lies: the function's regions, and the structures of virtio in them (§4.1.4).

use std::num::NonZeroU16;
use std::ops::Range;

/// Regions of a PCI device, as VFIO numbers them: BARs first.
pub const REGIONS: u32 = 9;

/// The BAR with virtio's structures: 64 bits wide.
pub const BAR_VIRTIO: u32 = 0;

/// The BAR with the MSI-X table and its pending bits.
pub const BAR_MSIX: u32 = 2;

/// The configuration space.
pub const CONFIG: u32 = 7;

/// How many bytes the configuration space has: that of PCI Express.
pub const CONFIG_LEN: u64 = 4096;

/// The common configuration structure.
pub const COMMON: Range<u64> = 0..0x1000;

/// The ISR status.
pub const ISR: Range<u64> = 0x1000..0x2000;

/// The device's own configuration.
pub const DEVICE: Range<u64> = 0x2000..0x3000;

/// Where queues are rung: 4 bytes each, by their number.
pub const NOTIFY: Range<u64> = 0x3000..BAR_VIRTIO_LEN;

/// How far one queue's register is from the next.
pub const NOTIFY_MULTIPLIER: u32 = 4;

/// How long the BAR is: there is room for 3072 queues.
pub const BAR_VIRTIO_LEN: u64 = 0x8000;

/// Where the pending bits begin; the table is before them.
pub const PENDING: u64 = 0x8000;

/// How long the MSI-X BAR is.
pub const BAR_MSIX_LEN: u64 = 0x10000;

/// The most MSI-X vectors of a function.
const MOST_VECTORS: u16 = 2048;

/// One vector for each queue, and one for the configuration; no more than `most`.
pub fn vectors(queues: u16, most: Option<NonZeroU16>) -> u16 {
    queues.saturating_add(1).min(most.map_or(MOST_VECTORS, NonZeroU16::get)).min(MOST_VECTORS)
}

/// How many bytes a region has; 0: it is not there.
pub fn region_size(index: u32) -> u64 {
    match index {
        BAR_VIRTIO => BAR_VIRTIO_LEN,
        BAR_MSIX => BAR_MSIX_LEN,
        CONFIG => CONFIG_LEN,
        _ => 0,
    }
}

/// A structure in the first BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Common,
    Isr,
    Device,
    Notify,
}

const PLACES: [(Range<u64>, Place); 4] =
    [(COMMON, Place::Common), (ISR, Place::Isr), (DEVICE, Place::Device), (NOTIFY, Place::Notify)];

/// Which structures `len` bytes at `offset` lie in, and which of the bytes.
pub(super) fn parts(offset: u64, len: usize) -> impl Iterator<Item = (Place, Range<usize>)> {
    let end = offset.saturating_add(len as u64);
    PLACES.into_iter().filter_map(move |(range, place)| {
        let (first, last) = (range.start.max(offset), range.end.min(end));
        (first < last).then(|| (place, (first - offset) as usize..(last - offset) as usize))
    })
}
