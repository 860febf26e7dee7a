//! The driver's half of a queue of either format.

mod packed;
mod split;

use crate::cells::RingCells;
use crate::layout::check_size;
use crate::wire::{DESCRIPTOR, WRITE, store_words};
use crate::{Descriptor, Format, Indirect, LayoutError, Rules};
use alloc::boxed::Box;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};
use ringfence_dma::{Access, BusAddr, HostSlice};

/// The coherent memory of a ring: what a DMA API allocated for it, and the device reaches at a [`Layout`](crate::Layout).
pub trait RingMemory {
    /// The ring: of the queue's format and size, and always the same.
    fn cells(&self) -> RingCells<'_>;
}

impl RingMemory for RingCells<'_> {
    #[inline]
    fn cells(&self) -> RingCells<'_> {
        *self
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
    /// 16 bytes for each buffer. They are the device's to read until the chain comes back. Written faster where they begin
    /// on a multiple of 8.
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
    /// Where `memory` is a ring of another format or size.
    pub fn new(rules: Rules, size: u16, memory: M) -> Result<Self, LayoutError> {
        check_size(rules.format, size)?;
        let cells = memory.cells();
        assert_eq!((cells.format(), cells.size()), (rules.format, size), "another ring's memory");
        cells.clear();
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
        let writable = match check_buffers(buffers) {
            Ok(writable) if self.has_room(buffers.len(), table.as_ref()) => writable,
            _ => return Err(self.why_not(buffers, table)),
        };
        let cells = self.memory.cells();
        let (id, given) = either!(&mut self.ring, ring => ring.add(&cells, buffers, table.as_ref(), writable));
        self.chains.give(id, given);
        Ok(Token(id))
    }

    /// Which token the next chain will have, if one can be added at all.
    #[inline]
    pub fn next_token(&self) -> Option<Token> {
        match self.poison {
            None if self.chains.free > 0 => Some(Token(either!(&self.ring, ring => ring.next_id()))),
            _ => None,
        }
    }

    #[inline]
    fn has_room(&self, buffers: usize, table: Option<&IndirectTable<'_>>) -> bool {
        let free = usize::from(self.chains.free);
        let room = match table {
            None => buffers <= free,
            Some(table) => {
                self.rules.indirect == Indirect::Allowed
                    && free > 0
                    && buffers <= self.chains.given.len()
                    && buffers * DESCRIPTOR as usize <= table.memory.len()
            }
        };
        room && self.poison.is_none()
    }

    /// Why a chain is not added.
    #[cold]
    fn why_not(&self, buffers: &[Descriptor], table: Option<IndirectTable<'_>>) -> AddError {
        if let Some(poison) = self.poison {
            return AddError::Poisoned(poison);
        }
        if let Err(error) = check_buffers(buffers) {
            return error;
        }
        if let Some(table) = table {
            if self.rules.indirect == Indirect::Refused {
                return AddError::IndirectRefused;
            }
            let needed = DESCRIPTOR as usize * buffers.len();
            if table.memory.len() < needed {
                return AddError::TableTooSmall { needed, len: table.memory.len() };
            }
        }
        match (buffers.len(), self.size()) {
            (buffers, limit) if buffers > limit.into() => AddError::TooManyBuffers { buffers, limit },
            (buffers, _) => AddError::Full { needed: if table.is_some() { 1 } else { buffers }, free: self.free() },
        }
    }

    /// Shows the device what was added since the last time.
    #[inline]
    pub fn publish(&mut self) {
        either!(&mut self.ring, ring => ring.publish(&self.memory.cells()));
    }

    /// Publishes, and says whether the device wants to be told of what was published since this was last asked.
    #[inline]
    pub fn needs_kick(&mut self) -> bool {
        self.publish();
        either!(&mut self.ring, ring => ring.needs_kick(&self.memory.cells()))
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
        either!(ring, ring => ring.take_used(&memory.cells(), chains)).inspect_err(|&error| *poison = Some(error))
    }

    /// Whether the device has used something that was not taken back, or broke the rules: what
    /// [`Self::take_used`] will tell.
    #[inline]
    pub fn has_used(&self) -> bool {
        self.poison.is_some() || either!(&self.ring, ring => ring.has_used(&self.memory.cells()))
    }

    /// Lets the device know that it need not tell of what it uses. It may all the same.
    #[inline]
    pub fn disable_callbacks(&mut self) {
        either!(&mut self.ring, ring => ring.disable_callbacks(&self.memory.cells()));
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
        either!(ring, ring => ring.enable_callbacks(&memory.cells(), chains))
            .inspect_err(|&error| *poison = Some(error))
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
    /// By id.
    given: Box<[Given]>,
    /// How many entries of the ring are free.
    free: u16,
}

/// A chain.
#[derive(Clone, Copy, Debug)]
struct Given {
    /// How many entries of the ring it takes up; 0 where the device has no such chain.
    entries: u16,
    /// Its last entry, where it is a list.
    last: u16,
    /// How many bytes the device may write.
    writable: u32,
}

impl Chains {
    fn new(size: u16) -> Self {
        let given = alloc::vec![Given { entries: 0, last: 0, writable: 0 }; size.into()].into();
        Self { given, free: size }
    }

    #[inline]
    fn size(&self) -> u16 {
        // 32768 at the most.
        self.given.len() as u16
    }

    #[inline]
    fn are_all_back(&self) -> bool {
        self.free == self.size()
    }

    #[inline]
    fn give(&mut self, id: u16, given: Given) {
        self.given[usize::from(id)] = given;
        self.free -= given.entries;
    }

    /// Takes chain `id` back, of which the device says that it wrote `written` bytes.
    #[inline]
    fn take(&mut self, id: u32, written: u32) -> Result<(Used, Given), DeviceError> {
        let size = self.size();
        let given = self.given.get_mut(id as usize).ok_or(DeviceError::NoSuchChain { id, size })?;
        let id = id as u16;
        let was = *given;
        if was.entries == 0 {
            return Err(DeviceError::NotUnderWay { id });
        }
        if written > was.writable {
            return Err(DeviceError::WrittenTooMuch { id, written, writable: was.writable });
        }
        given.entries = 0;
        self.free += was.entries;
        Ok((Used { token: Token(id), written }, was))
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

/// Writes the table of a chain.
#[inline]
fn write_table(table: &IndirectTable<'_>, buffers: &[Descriptor], words: impl Fn(u16, &Descriptor) -> (u64, u64)) {
    match table.memory.cells::<[AtomicU64; 2]>(0, buffers.len()) {
        Some(cells) => {
            for ((number, buffer), cell) in (0..).zip(buffers).zip(cells) {
                store(cell, words(number, buffer));
            }
        }
        None => {
            for (number, buffer) in (0..).zip(buffers) {
                store_words(&table.memory, number, words(number, buffer));
            }
        }
    }
}

/// Writes the two words of a descriptor.
#[inline]
fn store(cell: &[AtomicU64; 2], (addr, rest): (u64, u64)) {
    cell[0].store(addr.to_le(), Ordering::Relaxed);
    cell[1].store(rest.to_le(), Ordering::Relaxed);
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
