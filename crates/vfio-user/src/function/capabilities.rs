//! The function's list of capabilities (§4.1.4, PCI 3.0 §6.7), as it is built into the configuration space.

use super::layout::{BAR_MSIX, BAR_VIRTIO, COMMON, DEVICE, ISR, NOTIFY, NOTIFY_MULTIPLIER, PENDING};
use std::ops::Range;

/// Where the capabilities are that something happens at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// MSI-X.
    pub(super) msix: usize,
    /// PCI Express.
    pub(super) express: usize,
    /// VIRTIO_PCI_CAP_PCI_CFG.
    pub(super) window: usize,
}

/// Where they begin: behind the header.
const FIRST: usize = 0x40;

const POWER: u8 = 0x01;
const VENDOR: u8 = 0x09;
const EXPRESS: u8 = 0x10;
const MSIX: u8 = 0x11;

/// How long VIRTIO_PCI_CAP_PCI_CFG is: 4 bytes of data behind the usual.
const WINDOW_LEN: u8 = 20;

/// Function Level Reset can be asked for.
const FLR_CAPABLE: u32 = 1 << 28;

/// Writes the list. `writable` gets a one for every bit that a write changes.
pub(super) fn build(space: &mut [u8], writable: &mut [u8], vectors: u16, config: usize) -> Found {
    let mut list = List { space, next: FIRST, link: 0x34 };
    let structure = |kind: u8, place: Range<u64>, extra: &[u8]| {
        let mut body = vec![(16 + extra.len()) as u8, kind, BAR_VIRTIO as u8, 0, 0, 0];
        body.extend((place.start as u32).to_le_bytes());
        body.extend(((place.end - place.start) as u32).to_le_bytes());
        body.extend(extra);
        body
    };
    list.add(VENDOR, &structure(1, COMMON, &[]));
    list.add(VENDOR, &structure(2, NOTIFY, &NOTIFY_MULTIPLIER.to_le_bytes()));
    list.add(VENDOR, &structure(3, ISR.start..ISR.start + 4, &[]));
    // §4.1.4.6: for types that have something there.
    if config > 0 {
        list.add(VENDOR, &structure(4, DEVICE.start..DEVICE.start + config as u64, &[]));
    }
    let window = list.add(VENDOR, &[WINDOW_LEN, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);

    let mut msix = Vec::from((vectors - 1).to_le_bytes());
    msix.extend(BAR_MSIX.to_le_bytes());
    msix.extend((PENDING as u32 | BAR_MSIX).to_le_bytes());
    let msix = list.add(MSIX, &msix);

    // Version 3, and it keeps its state in D3hot.
    list.add(POWER, &[0x03, 0x00, 0x08, 0x00, 0x00, 0x00]);

    // An endpoint, version 2: what it can, its control and status, and a link of one lane.
    let mut express = vec![0; 0x3a];
    express[0] = 0x02;
    express[2..6].copy_from_slice(&(FLR_CAPABLE | 1 << 15).to_le_bytes());
    express[10..14].copy_from_slice(&(1_u32 | 1 << 4).to_le_bytes());
    express[16..18].copy_from_slice(&(1_u16 | 1 << 4).to_le_bytes());
    let express = list.add(EXPRESS, &express);

    // Which BAR, where and how much: the driver writes.
    writable[window + 4] = 0xff;
    writable[window + 8..window + 16].fill(0xff);
    // Enable, and mask all.
    writable[msix + 3] = 0xc0;
    // The power state.
    writable[msix + 12 + 4] = 0x03;
    // Device and link control; FLR reads as zero.
    writable[express + 8..express + 10].copy_from_slice(&0x7fff_u16.to_le_bytes());
    writable[express + 16] = 0xc3;
    Found { msix, express, window }
}

struct List<'s> {
    space: &'s mut [u8],
    /// Where there is room.
    next: usize,
    /// What has to point there.
    link: usize,
}

impl List<'_> {
    fn add(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next;
        self.space[self.link] = at as u8;
        self.space[at] = id;
        self.space[at + 2..at + 2 + body.len()].copy_from_slice(body);
        (self.link, self.next) = (at + 1, (at + 2 + body.len()).next_multiple_of(4));
        assert!(self.next <= 256, "capabilities of {} bytes", self.next);
        at
    }
}
