//! The driver's half of a queue of either format.

mod packed;
mod split;

use crate::layout::check_size;
use crate::wire::{DESCRIPTOR, WRITE};
use crate::{Descriptor, Format, Indirect, LayoutError, RingArea, Rules};
use alloc::boxed::Box;
use core::fmt;
use ringfence_dma::{Access, BusAddr, HostSlice};

/// The coherent memory of a ring: what a DMA API allocated for it, and the device reaches at a [`Layout`](crate::Layout).
pub trait RingMemory {
    /// The bytes of `area`: at least [`RingArea::len`] of them, aligned to [`RingArea::align`], and always the same.
    fn area(&self, area: RingArea) -> HostSlice<'_>;
}

/// Three slices that are a ring's memory.
#[derive(Clone, Copy, Debug)]
pub struct RingSlices<'m> {
    /// The descriptor table, or ring.
    pub descriptors: HostSlice<'m>,
    /// What the driver writes.
    pub driver: HostSlice<'m>,
    /// What the device writes.
    pub device: HostSlice<'m>,
}

impl RingMemory for RingSlices<'_> {
    #[inline]
    fn area(&self, area: RingArea) -> HostSlice<'_> {
        match area {
            RingArea::Descriptors => self.descriptors,
            RingArea::Driver => self.driver,
            RingArea::Device => self.device,
        }
    }
}

/// The driver's half of a queue.
///
/// The device is not trusted: what it may use, how long each chain is and how much of it is writable is kept here.
/// Once the device breaks the rules the queue is poisoned and every call says why; what is under way then stays the
/// device's until it is reset.
#[derive(Debug)]
pub struct DriverQueue<M> {
    memory: M,
    rules: Rules,
    chains: Chains,
    ring: Ring,
    poison: Option<DeviceError>,
}

#[derive(Debug)]
enum Ring {
    Split(split::Ring),
    Packed(packed::Ring),
}

/// A chain that the device has, or had. Distinct among those under way, so that it can index the caller's own table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(u16);

/// Memory for the descriptors of a chain, so that the chain takes up one entry of the ring.
#[derive(Clone, Copy, Debug)]
pub struct IndirectTable<'m> {
    /// 16 bytes for each buffer. They are the device's to read until the chain comes back.
    pub memory: HostSlice<'m>,
    /// Where the device reaches it.
    pub addr: BusAddr,
}

/// A chain that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Which.
    pub token: Token,
    /// How many bytes the device says that it wrote, from the beginning of the writable part and within it. A device
    /// can lie: more of the part may have changed, and less.
    pub written: u32,
}

/// Why a chain was not added. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddError {
    /// The ring has no room until the device has used something.
    Full {
        /// How many entries the chain takes up.
        needed: usize,
        /// How many are free.
        free: u16,
    },
    /// There is no buffer, or one without a byte.
    NoBytes,
    /// A buffer to be read comes after one to be written.
    ReadAfterWrite,
    /// The chain would have 4 GiB or more.
    TooManyBytes,
    /// It could never be added: the queue has fewer descriptors.
    TooManyBuffers {
        /// How many there are.
        buffers: usize,
        /// How many there may be.
        limit: u16,
    },
    /// A table that is too small.
    TableTooSmall {
        /// How many bytes it takes.
        needed: usize,
        /// How many it has.
        len: usize,
    },
    /// Tables were not agreed on.
    IndirectRefused,
    /// The device broke the queue before.
    Poisoned(DeviceError),
}

/// A rule that the device broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceError {
    /// The used index moved past everything that the device has.
    UsedIndex {
        /// The index that the device wrote.
        index: u16,
        /// The next entry that would have been taken.
        next: u16,
        /// How many chains the device has.
        under_way: u16,
    },
    /// Something was used while the device has nothing.
    NothingUnderWay,
    /// A chain that can't exist was used.
    NoSuchChain {
        /// The id that the device wrote.
        id: u32,
        /// How many there are.
        size: u16,
    },
    /// A chain was used that the device does not have: never given, or given back before.
    NotUnderWay {
        /// The id that the device wrote.
        id: u16,
    },
    /// More was written than the device may write.
    WrittenTooMuch {
        /// The chain.
        id: u16,
        /// How many bytes the device says that it wrote.
        written: u32,
        /// How many it might have.
        writable: u32,
    },
}

impl Token {
    /// Below the queue's size.
    #[inline]
    pub fn index(self) -> usize {
        self.0.into()
    }
}

macro_rules! either {
    ($on:expr, $ring:ident => $call:expr) => {
        match $on {
            Ring::Split($ring) => $call,
            Ring::Packed($ring) => $call,
        }
    };
}

impl<M: RingMemory> DriverQueue<M> {
    /// A queue of `size` descriptors over `memory`, which is set to zero. The device does not run yet. It is asked to
    /// tell of what it uses.
    ///
    /// # Errors
    /// [`LayoutError::Size`].
    ///
    /// # Panics
    /// Where an area of `memory` is too short or not aligned.
    pub fn new(rules: Rules, size: u16, memory: M) -> Result<Self, LayoutError> {
        check_size(rules.format, size)?;
        for area in RingArea::ALL {
            let (slice, len) = (memory.area(area), area.len(rules.format, size) as usize);
            assert!(
                slice.as_ptr().addr().is_multiple_of(area.align(rules.format) as usize),
                "the {area} is misaligned"
            );
            slice.sub(0, len).fill(0);
        }
        let ring = match rules.format {
            Format::Split => Ring::Split(split::Ring::new(size, rules.notifications)),
            Format::Packed => Ring::Packed(packed::Ring::new(size, rules.notifications)),
        };
        Ok(Self { memory, rules, chains: Chains::new(size), ring, poison: None })
    }

    /// Adds a chain: bytes for the device to read, then bytes for it to write. The device sees it after
    /// [`Self::publish`]. With a `table` it takes up one entry of the ring, else one for each buffer.
    ///
    /// # Errors
    /// Those of [`AddError`].
    #[inline]
    pub fn add(&mut self, buffers: &[Descriptor], table: Option<IndirectTable<'_>>) -> Result<Token, AddError> {
        let Self { memory, rules, chains, ring, poison } = self;
        if let Some(poison) = *poison {
            return Err(AddError::Poisoned(poison));
        }
        let writable = check_buffers(buffers)?;
        let limit = chains.size();
        if let Some(table) = table {
            if rules.indirect == Indirect::Refused {
                return Err(AddError::IndirectRefused);
            }
            let needed = DESCRIPTOR as usize * buffers.len();
            if table.memory.len() < needed {
                return Err(AddError::TableTooSmall { needed, len: table.memory.len() });
            }
        }
        if buffers.len() > limit.into() {
            return Err(AddError::TooManyBuffers { buffers: buffers.len(), limit });
        }
        let needed = if table.is_some() { 1 } else { buffers.len() };
        if needed > usize::from(chains.free) {
            return Err(AddError::Full { needed, free: chains.free });
        }
        let memory: &M = memory;
        let id = either!(ring, ring => ring.add(memory, chains, buffers, table.as_ref()));
        chains.give(id, needed as u16, writable);
        Ok(Token(id))
    }

    /// Shows the device what was added since the last time.
    #[inline]
    pub fn publish(&mut self) {
        let memory = &self.memory;
        either!(&mut self.ring, ring => ring.publish(memory));
    }

    /// Publishes, and says whether the device wants to be told of what was published since this was last asked.
    #[inline]
    pub fn needs_kick(&mut self) -> bool {
        self.publish();
        let memory = &self.memory;
        either!(&mut self.ring, ring => ring.needs_kick(memory))
    }

    /// Takes a chain back that the device has used, in whatever order it does so. Publishes first: what the device was
    /// not shown it can't have used.
    ///
    /// # Errors
    /// [`DeviceError`], then and from then on: nothing that the device says of this queue can be believed.
    #[inline]
    pub fn take_used(&mut self) -> Result<Option<Used>, DeviceError> {
        if let Some(poison) = self.poison {
            return Err(poison);
        }
        self.publish();
        let Self { memory, chains, ring, poison, .. } = self;
        let memory: &M = memory;
        either!(ring, ring => ring.take_used(memory, chains)).inspect_err(|&error| *poison = Some(error))
    }

    /// Whether the device has used something that was not taken back, or broke the rules: what
    /// [`Self::take_used`] will tell.
    #[inline]
    pub fn has_used(&self) -> bool {
        self.poison.is_some() || either!(&self.ring, ring => ring.has_used(&self.memory))
    }

    /// Lets the device know that it need not tell of what it uses. It may all the same.
    #[inline]
    pub fn disable_callbacks(&mut self) {
        let memory = &self.memory;
        either!(&mut self.ring, ring => ring.disable_callbacks(memory));
    }

    /// Asks the device to tell of the next chain that it uses. `true`: there is one already, so take it instead of
    /// sleeping.
    ///
    /// # Errors
    /// As [`Self::take_used`].
    #[inline]
    pub fn enable_callbacks(&mut self) -> Result<bool, DeviceError> {
        if let Some(poison) = self.poison {
            return Err(poison);
        }
        let Self { memory, chains, ring, poison, .. } = self;
        let memory: &M = memory;
        either!(ring, ring => ring.enable_callbacks(memory, chains)).inspect_err(|&error| *poison = Some(error))
    }

    /// How many entries of the ring are free.
    #[inline]
    pub fn free(&self) -> u16 {
        self.chains.free
    }

    /// How many descriptors the queue has.
    pub fn size(&self) -> u16 {
        self.chains.size()
    }

    /// The chains that did not come back. They are the device's until it is reset; then they can be taken from it.
    pub fn under_way(&self) -> impl Iterator<Item = Token> {
        (0..).zip(&self.chains.given).filter(|(_, given)| given.entries != 0).map(|(id, _)| Token(id))
    }

    /// What the device did, if it broke the queue.
    pub fn poison(&self) -> Option<DeviceError> {
        self.poison
    }

    /// The ring's memory, which the device has until it is reset.
    pub fn into_memory(self) -> M {
        self.memory
    }
}

/// Which chains the device has, and what is free. None of it is ever read back from the ring.
#[derive(Debug)]
struct Chains {
    /// By id; `entries` is 0 where the device has no such chain.
    given: Box<[Given]>,
    /// How many are given.
    under_way: u16,
    /// How many entries of the ring are free.
    free: u16,
}

#[derive(Clone, Copy, Debug)]
struct Given {
    entries: u16,
    writable: u32,
}

impl Chains {
    fn new(size: u16) -> Self {
        let given = alloc::vec![Given { entries: 0, writable: 0 }; size.into()].into();
        Self { given, under_way: 0, free: size }
    }

    #[inline]
    fn size(&self) -> u16 {
        // 32768 at the most.
        self.given.len() as u16
    }

    #[inline]
    fn give(&mut self, id: u16, entries: u16, writable: u32) {
        self.given[usize::from(id)] = Given { entries, writable };
        self.under_way += 1;
        self.free -= entries;
    }

    /// Takes chain `id` back, of which the device says that it wrote `written` bytes. Also says how many entries of the
    /// ring it took up.
    #[inline]
    fn take(&mut self, id: u32, written: u32) -> Result<(Used, u16), DeviceError> {
        let size = self.size();
        let no_such = DeviceError::NoSuchChain { id, size };
        let given = self.given.get_mut(id as usize).ok_or(no_such)?;
        let id = id as u16;
        let Given { entries, writable } = *given;
        if entries == 0 {
            return Err(DeviceError::NotUnderWay { id });
        }
        if written > writable {
            return Err(DeviceError::WrittenTooMuch { id, written, writable });
        }
        given.entries = 0;
        self.under_way -= 1;
        self.free += entries;
        Ok((Used { token: Token(id), written }, entries))
    }
}

/// How many bytes of a chain are writable.
#[inline]
fn check_buffers(buffers: &[Descriptor]) -> Result<u32, AddError> {
    let (mut total, mut writable) = (0u64, 0);
    for buffer in buffers {
        if buffer.len == 0 {
            return Err(AddError::NoBytes);
        }
        total += u64::from(buffer.len);
        match buffer.access {
            Access::Read if writable != 0 => return Err(AddError::ReadAfterWrite),
            Access::Read => {}
            Access::Write => writable += u64::from(buffer.len),
        }
    }
    if total == 0 {
        return Err(AddError::NoBytes);
    }
    if total > u32::MAX.into() {
        return Err(AddError::TooManyBytes);
    }
    Ok(writable as u32)
}

/// The flag of a buffer's descriptor that says what the device does with it.
#[inline]
fn access_flag(buffer: &Descriptor) -> u16 {
    match buffer.access {
        Access::Read => 0,
        Access::Write => WRITE,
    }
}

impl fmt::Display for AddError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            AddError::Full { needed, free } => write!(f, "the ring has {free} free entries and it takes {needed}"),
            AddError::NoBytes => f.write_str("a chain, or a buffer of it, has no bytes"),
            AddError::ReadAfterWrite => f.write_str("a readable buffer follows a writable one"),
            AddError::TooManyBytes => f.write_str("a chain has 4 GiB or more"),
            AddError::TooManyBuffers { buffers, limit } => write!(f, "{buffers} buffers in a queue of {limit}"),
            AddError::TableTooSmall { needed, len } => {
                write!(f, "an indirect table of {len} bytes, and it takes {needed}")
            }
            AddError::IndirectRefused => f.write_str("indirect tables were not agreed on"),
            AddError::Poisoned(error) => write!(f, "the queue is of no use any more: {error}"),
        }
    }
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            DeviceError::UsedIndex { index, next, under_way } => {
                write!(f, "the used index is {index}, with {next} next and {under_way} under way")
            }
            DeviceError::NothingUnderWay => f.write_str("a chain was used and none is under way"),
            DeviceError::NoSuchChain { id, size } => write!(f, "chain {id} was used in a queue of {size}"),
            DeviceError::NotUnderWay { id } => write!(f, "chain {id} was used and is not under way"),
            DeviceError::WrittenTooMuch { id, written, writable } => {
                write!(f, "{written} bytes were written to chain {id}, which has {writable}")
            }
        }
    }
}

impl core::error::Error for AddError {}
impl core::error::Error for DeviceError {}
