use super::PciError;
use crate::registers::Registers;

/// A PCI function, as far as a kernel's PCI code has to know it.
pub trait Function {
    /// A mapping of registers: a [`RegisterWindow`](ringfence_dma::RegisterWindow) mostly.
    type Registers: Registers;

    /// Which function this is: segment, bus, device and function packed into a number, as
    /// [`Identity::slot`](crate::policy::Identity::slot) has it.
    fn slot(&self) -> u64;

    /// Reads 32 bits of the configuration space. `offset` is a multiple of 4.
    fn read(&mut self, offset: u8) -> u32;

    /// Writes 32 bits of the configuration space. `offset` is a multiple of 4.
    fn write(&mut self, offset: u8, value: u32);

    /// Maps `len` bytes at `offset` of a memory BAR, uncached. They lie within it, and its address and length are no
    /// overflow. `None`: that can't be had here.
    ///
    /// Where a BAR is, the function says itself, if nobody else does ([`bar`](Self::bar)). One that lies can name any
    /// address, such as that of the kernel's own memory, which would then be written to as registers are: map what is in the
    /// windows of its bridge, and nothing else.
    fn map(&mut self, bar: Bar, offset: u64, len: usize) -> Option<Self::Registers>;

    /// The BAR `index`, 0 to 5: none where the function has no such one, or it is the upper half of another.
    ///
    /// Asks the function itself, by writing ones while its decoding is off. A kernel that knows its BARs says so instead.
    fn bar(&mut self, index: u8) -> Option<BarKind> {
        probe(self, index)
    }
}

/// A memory BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Which, 0 to 5.
    pub index: u8,
    /// Where it is on the bus. 0 where firmware has not given it an address.
    pub address: u64,
    /// How many bytes.
    pub len: u64,
}

/// What a BAR may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Memory space.
    Memory(Bar),
    /// I/O space.
    Io,
}

/// Offsets in the configuration space (PCI 3.0, §6.1).
const ID: u8 = 0x00;
const COMMAND: u8 = 0x04;
const REVISION: u8 = 0x08;
const BARS: u8 = 0x10;
const SUBSYSTEM: u8 = 0x2c;

/// Bits of the command register.
const IO_SPACE: u32 = 1;
const MEMORY_SPACE: u32 = 1 << 1;
const BUS_MASTER: u32 = 1 << 2;
const INTX_OFF: u32 = 1 << 10;

/// What the IDs of a function say.
pub(super) struct Ids {
    pub(super) vendor: u16,
    pub(super) device: u16,
    /// The virtio device type.
    pub(super) virtio: u16,
    pub(super) transitional: bool,
}

/// The type of a virtio device (§4.1.2).
pub(super) fn device_type(function: &mut impl Function) -> Result<Ids, PciError> {
    let id = function.read(ID);
    let (vendor, device) = (id as u16, (id >> 16) as u16);
    let not_virtio = PciError::NotVirtio { vendor, device };
    match (vendor, device) {
        (0xffff, _) => Err(PciError::Gone),
        (0x1af4, 0x1040..=0x107f) => Ok(Ids { vendor, device, virtio: device - 0x1040, transitional: false }),
        // §4.1.2.3: a transitional device's type is its subsystem's ID. One with a revision above 0 is none.
        (0x1af4, 0x1000..=0x103f) if function.read(REVISION) as u8 == 0 => {
            let virtio = (function.read(SUBSYSTEM) >> 16) as u16;
            Ok(Ids { vendor, device, virtio, transitional: true })
        }
        _ => Err(not_virtio),
    }
}

pub(super) fn is_gone(function: &mut (impl Function + ?Sized)) -> bool {
    function.read(ID) == u32::MAX
}

pub(super) fn enable_memory(function: &mut impl Function) {
    set_command(function, MEMORY_SPACE, 0);
}

pub(super) fn enable_master(function: &mut impl Function, intx_off: bool) {
    match intx_off {
        true => set_command(function, BUS_MASTER | INTX_OFF, 0),
        false => set_command(function, BUS_MASTER, INTX_OFF),
    }
}

pub(super) fn disable_master(function: &mut impl Function) {
    set_command(function, 0, BUS_MASTER);
}

/// The status register shares the word: its bits are cleared by ones, so zeroes leave them alone.
fn set_command(function: &mut (impl Function + ?Sized), set: u32, clear: u32) {
    let command = function.read(COMMAND) & 0xffff;
    function.write(COMMAND, command & !clear | set);
}

/// Where a BAR is and how long (PCI 3.0, §6.2.5.1).
fn probe(function: &mut (impl Function + ?Sized), wanted: u8) -> Option<BarKind> {
    let mut index = 0;
    while index <= wanted && index < 6 {
        let at = BARS + 4 * index;
        let low = function.read(at);
        let wide = low & 1 == 0 && low >> 1 & 3 == 2;
        if index < wanted {
            index += if wide { 2 } else { 1 };
            continue;
        }
        if low & 1 != 0 {
            return Some(BarKind::Io);
        }
        // The upper half of the last one would be the register behind.
        if wide && index == 5 {
            return None;
        }
        let high = if wide { function.read(at + 4) } else { 0 };
        let command = function.read(COMMAND) & 0xffff;
        function.write(COMMAND, command & !(IO_SPACE | MEMORY_SPACE));
        let mut ones = |at, before| {
            function.write(at, u32::MAX);
            let mask = function.read(at);
            function.write(at, before);
            u64::from(mask)
        };
        let mask = ones(at, low) & !0xf | if wide { ones(at + 4, high) << 32 } else { 0xffff_ffff << 32 };
        function.write(COMMAND, command);
        let len = (!mask).checked_add(1)?;
        // A BAR that is not there reads as 0, and a length is a power of two.
        if mask as u32 == 0 && (!wide || mask == 0) || !len.is_power_of_two() {
            return None;
        }
        let address = u64::from(low & !0xf) | u64::from(high) << 32;
        // Nor does one end where the addresses do: who adds up the end of what lies in it comes to 0.
        address.checked_add(len)?;
        return Some(BarKind::Memory(Bar { index, address, len }));
    }
    None
}
