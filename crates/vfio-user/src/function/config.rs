//! The configuration space: what it holds, which bits a write changes, and what that does.

use super::capabilities::{self, Found};
use super::layout::{BAR_MSIX_LEN, BAR_VIRTIO_LEN, CONFIG_LEN};

/// Red Hat's vendor ID, which virtio's is.
const VENDOR: u16 = 0x1af4;

/// Device IDs of the modern interface begin here (§4.1.2).
const FIRST_DEVICE: u16 = 0x1040;

const COMMAND: usize = 0x04;
const BARS: usize = 0x10;

/// Memory space, bus mastering, parity, SERR and INTx off. There is no I/O space.
const COMMAND_BITS: u16 = 1 << 1 | 1 << 2 | 1 << 6 | 1 << 8 | 1 << 10;
const MASTER: u16 = 1 << 2;

/// What the upper half of an MSI-X capability's control says.
const MSIX_ENABLE: u8 = 1 << 7;
const MSIX_MASK: u8 = 1 << 6;

/// The configuration space.
#[derive(Debug)]
pub(super) struct ConfigSpace {
    bytes: Vec<u8>,
    fresh: Vec<u8>,
    /// A one for each bit that a write changes.
    writable: Vec<u8>,
    found: Found,
    /// Whether anybody has ever allowed it to master the bus. Before that nobody has taken it back: a client that plugs
    /// the function into no bus writes no command.
    mastered: bool,
}

/// What a write did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Did(u8);

impl Did {
    /// Bus mastering was switched.
    pub(super) const MASTER: Did = Did(1);
    /// MSI-X was enabled, disabled, masked or unmasked.
    pub(super) const MSIX: Did = Did(2);
    /// A reset of the function was asked for.
    pub(super) const RESET: Did = Did(4);

    pub(super) fn contains(self, other: Did) -> bool {
        self.0 & other.0 != 0
    }
}

impl ConfigSpace {
    pub(super) fn new(id: u16, vectors: u16, config: usize) -> Self {
        let mut bytes = vec![0; CONFIG_LEN as usize];
        let mut writable = vec![0; CONFIG_LEN as usize];
        let device = FIRST_DEVICE + id;
        let mut set = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        set(0x00, &VENDOR.to_le_bytes());
        set(0x02, &device.to_le_bytes());
        // It has a list of capabilities.
        set(0x06, &[0x10, 0x00]);
        // Revision 1: no transitional device (§4.1.2.1). The class is the device type's.
        set(0x08, &[1]);
        set(0x09, &class(id));
        set(0x2c, &VENDOR.to_le_bytes());
        // §4.1.2.1: 0x40 or higher where it is of no use to a legacy driver.
        set(0x2e, &device.to_le_bytes());
        // 64 bits wide, prefetchable; and 32 bits wide.
        set(BARS, &[0x0c]);
        set(BARS + 8, &[0x00]);
        let mut may = |at: usize, mask: &[u8]| writable[at..at + mask.len()].copy_from_slice(mask);
        may(COMMAND, &COMMAND_BITS.to_le_bytes());
        may(0x0c, &[0xff]);
        may(BARS, &(!(BAR_VIRTIO_LEN - 1)).to_le_bytes());
        may(BARS + 8, &(!(BAR_MSIX_LEN as u32 - 1)).to_le_bytes());
        // The interrupt line is for software; no pin is wired.
        may(0x3c, &[0xff]);
        let found = capabilities::build(&mut bytes, &mut writable, vectors, config);
        Self { fresh: bytes.clone(), bytes, writable, found, mastered: false }
    }

    pub(super) fn reset(&mut self) {
        self.bytes.copy_from_slice(&self.fresh);
        self.mastered = false;
    }

    pub(super) fn read(&self, offset: u64, into: &mut [u8]) {
        super::copy(&self.bytes, offset, into);
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Did {
        let (master, msix) = (self.is_master(), self.msix_control());
        let flr = (self.found.express + 9) as u64;
        let mut did = 0;
        for (at, &value) in (offset..CONFIG_LEN).zip(data) {
            let mask = self.writable[at as usize];
            let byte = &mut self.bytes[at as usize];
            *byte = *byte & !mask | value & mask;
            if at == flr && value & 0x80 != 0 {
                did |= Did::RESET.0;
            }
        }
        self.mastered |= self.is_master();
        if self.is_master() != master {
            did |= Did::MASTER.0;
        }
        if self.msix_control() != msix {
            did |= Did::MSIX.0;
        }
        Did(did)
    }

    /// What VIRTIO_PCI_CAP_PCI_CFG shows or sets, if an access of `len` bytes at `offset` is one to its data (§4.1.4.9):
    /// which BAR, where, and how many bytes.
    pub(super) fn window(&self, offset: u64, len: usize) -> Option<(u32, u64, usize)> {
        let at = self.found.window;
        if offset != (at + 16) as u64 || len > 4 {
            return None;
        }
        let word = |at: usize| u32::from_le_bytes(self.bytes[at..at + 4].try_into().expect("four bytes"));
        let (bar, place, width) = (self.bytes[at + 4], word(at + 8), word(at + 12));
        matches!(width, 1 | 2 | 4).then_some((bar.into(), place.into(), width as usize))
    }

    /// Whether it may reach memory.
    pub(super) fn may_master(&self) -> bool {
        self.is_master() || !self.mastered
    }

    fn is_master(&self) -> bool {
        u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]]) & MASTER != 0
    }

    fn msix_control(&self) -> u8 {
        self.bytes[self.found.msix + 3] & (MSIX_ENABLE | MSIX_MASK)
    }

    pub(super) fn msix_enabled(&self) -> bool {
        self.msix_control() & MSIX_ENABLE != 0
    }

    pub(super) fn msix_masked(&self) -> bool {
        self.msix_control() & MSIX_MASK != 0
    }
}

/// The class code, programming interface first (PCI Code and ID Assignment).
fn class(id: u16) -> [u8; 3] {
    match id {
        // Ethernet controller.
        1 => [0x00, 0x00, 0x02],
        // SCSI storage controller: a disk.
        2 | 8 => [0x00, 0x00, 0x01],
        // Simple communications controller, other.
        3 => [0x00, 0x80, 0x07],
        // None of those.
        _ => [0x00, 0xff, 0x00],
    }
}
