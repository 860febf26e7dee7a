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
pub struct DriverQueue<M, T = ()> {
    memory: M,
    rules: Rules,
    chains: Chains<T>,
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

/// A request's data and what stands around it: see [`DriverQueue::add_framed`].
#[derive(Clone, Copy, Debug)]
pub struct Framed<'m> {
    /// Where a header is, and how long, up to 2048 bytes: always the same for the same token.
    pub before: (BusAddr, u32),
    /// What changes: a byte at least, and less than 4 GiB by 4096 bytes and more. Else this is a malformed chain.
    pub data: Descriptor,
    /// Where there is room for an answer, and how much, up to 2048 bytes: always the same for the same token.
    pub after: (BusAddr, u32),
    /// The token's table, where it has one.
    pub table: Option<IndirectTable<'m>>,
}

impl Framed<'_> {
    /// How many bytes of the chain are writable.
    #[inline(always)]
    fn writable(&self) -> u32 {
        if self.data.access == Access::Write { self.data.len.wrapping_add(self.after.1) } else { self.after.1 }
    }
}

/// What they are in the ring.
#[inline(always)]
fn framed_chain(before: (BusAddr, u32), data: Descriptor, after: (BusAddr, u32)) -> [Descriptor; 3] {
    let part = |(addr, len), access| Descriptor { addr, len, access };
    [part(before, Access::Read), data, part(after, Access::Write)]
}

/// A frame and this much are less than 4 GiB.
const FRAMED_LEN: u32 = u32::MAX - 4096;

/// A chain that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Which.
    pub token: Token,
    /// How many bytes the device says that it wrote, from the beginning of the writable part and within it. A device
    /// can lie: more of the part may have changed, and less.
    pub written: u32,
}

/// The same, and what might have been written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Returned {
    /// Which.
    pub token: Token,
    /// As [`Used::written`].
    pub written: u32,
    /// How many bytes the writable part has.
    pub writable: u32,
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
    /// Something was used, and then was not (a packed ring alone can say so).
    Unused {
        /// The descriptor that said so.
        place: u16,
    },
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

impl Ring {
    fn new(rules: Rules, size: u16) -> Self {
        match rules.format {
            Format::Split => Ring::Split(split::Ring::new(size, rules.notifications)),
            Format::Packed => Ring::Packed(packed::Ring::new(size, rules.notifications)),
        }
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
        Ok(Self { memory, rules, chains: Chains::new(size, |_| ()), ring: Ring::new(rules, size), poison: None })
    }

    /// The same queue, which keeps a record beside the chain of each token: a caller's table, where the queue looks anyway.
    ///
    /// # Panics
    /// Where a chain was added.
    pub fn keeping<T>(self, records: impl FnMut(Token) -> T) -> DriverQueue<M, T> {
        let Self { memory, rules, chains, ring, poison } = self;
        assert!(chains.are_all_back() && chains.next == 0, "a queue in use");
        DriverQueue { memory, rules, chains: Chains::new(chains.size, records), ring, poison }
    }
}

impl<M: RingMemory, T> DriverQueue<M, T> {
    /// Adds a chain: bytes for the device to read, then bytes for it to write. The device sees it after
    /// [`Self::publish`]; in a packed ring, where no store can be saved for a batch, it may see it before. With a `table`
    /// it takes up one entry of the ring, else one for each buffer.
    ///
    /// # Errors
    /// Those of [`AddError`].
    #[inline]
    pub fn add(&mut self, buffers: &[Descriptor], table: Option<IndirectTable<'_>>) -> Result<Token, AddError> {
        match self.offer(buffers, table) {
            Some(token) => Ok(token),
            None => self.add_slowly(buffers, table),
        }
    }

    /// Adds a chain of a buffer between two others that are always the same for the same token: what is still in the ring,
    /// or the table, is not written again. `make` says what it is, has the record of its token, and may have an answer for
    /// the caller; `None` where there is no room, or the device broke the queue before.
    ///
    /// # Errors
    /// That of `make`; nothing was changed then.
    ///
    /// # Panics
    /// Where [`Self::add`] would fail for a reason of the caller's own.
    #[inline(always)]
    pub fn add_framed<'t, R, E>(
        &mut self,
        make: impl FnOnce(&mut T) -> Result<(Framed<'t>, R), E>,
    ) -> Result<Option<R>, E> {
        let Chains { entries, links, next, free, .. } = &mut self.chains;
        let (id, left) = (*next, *free);
        if left < 3 && (left == 0 || self.rules.indirect == Indirect::Refused) {
            return Ok(None);
        }
        let Some(entry) = entries.get_mut(usize::from(id)) else { return Ok(None) };
        let (framed, answer) = make(&mut entry.record)?;
        let Framed { before, data, after, table } = framed;
        // Of itself or with its frame it is not too long for 32 bits.
        debug_assert!((1..FRAMED_LEN).contains(&data.len), "{} bytes of data", data.len);
        let ring = &mut self.ring;
        let added = match table {
            None if left >= 3 => match ring {
                Ring::Packed(ring) => {
                    // `last` never was anything but the id.
                    (entry.taken, entry.writable) = (3, framed.writable());
                    (*next, *free) = (links[usize::from(id)], left.wrapping_sub(3));
                    ring.add_three(&self.memory.cells(), id, framed_chain(before, data, after));
                    true
                }
                Ring::Split(ring) if entry.standing == Standing::InRing => {
                    (entry.taken, entry.writable) = (3, framed.writable());
                    (*next, *free) = (links[usize::from(entry.last)], left.wrapping_sub(3));
                    let cells = self.memory.cells();
                    split::Ring::replace(&cells, entry.middle, &data, entry.last);
                    ring.add_head(&cells, id);
                    true
                }
                Ring::Split(_) => false,
            },
            Some(table) if entry.standing == Standing::InTable => {
                // It was in order when the table was written.
                if let Some([[_, middle, _]]) = table.memory.cells::<[[AtomicU64; 2]; 3]>(0, 1) {
                    let words = match ring {
                        Ring::Split(_) => split::Ring::in_table(&data, 1, true),
                        Ring::Packed(_) => packed::Ring::in_table(&data),
                    };
                    store(middle, words);
                }
                (entry.last, entry.taken, entry.writable) = (id, 1, framed.writable());
                (*next, *free) = (links[usize::from(id)], left.wrapping_sub(1));
                let cells = self.memory.cells();
                either!(ring, ring => ring.add_table(&cells, id, table.addr, 3 * DESCRIPTOR));
                true
            }
            _ => false,
        };
        if !added {
            // In pieces: as a whole it would be put together in memory for this alone.
            let table = table.map(|table| (table.memory, table.addr)).unzip();
            if !self.frame_anew(before, data.addr, data.len, data.access, after, table.0, table.1) {
                return Ok(None);
            }
        }
        Ok(Some(answer))
    }

    /// Adds a chain whose frame is not in its place, but will be the next time, if there is room.
    #[inline(never)]
    #[expect(clippy::too_many_arguments, reason = "see above")]
    fn frame_anew(
        &mut self,
        before: (BusAddr, u32),
        addr: BusAddr,
        len: u32,
        access: Access,
        after: (BusAddr, u32),
        table_memory: Option<HostSlice<'_>>,
        table_addr: Option<BusAddr>,
    ) -> bool {
        let table = table_memory.zip(table_addr).map(|(memory, addr)| IndirectTable { memory, addr });
        let token = match self.add(&framed_chain(before, Descriptor { addr, len, access }, after), table) {
            Ok(token) => token,
            Err(AddError::Full { .. }) => return false,
            Err(error) => panic!("a framed chain: {error}"),
        };
        let aligned = table.is_some_and(|table| table.memory.cells::<AtomicU64>(0, 1).is_some());
        let entry = &mut self.chains.entries[token.index()];
        entry.middle = self.chains.links[token.index()];
        entry.standing = match (&self.ring, table) {
            (_, Some(_)) if aligned => Standing::InTable,
            (Ring::Split(_), None) => Standing::InRing,
            _ => Standing::Nowhere,
        };
        true
    }

    /// [`Self::add`] without a reason, and for a table that starts on a multiple of 8.
    #[inline]
    fn offer(&mut self, buffers: &[Descriptor], table: Option<IndirectTable<'_>>) -> Option<Token> {
        let writable = check_buffers(buffers).ok()?;
        match table {
            None if self.has_room(buffers.len(), None) => {
                let cells = self.memory.cells();
                let chains = &mut self.chains;
                Some(Token(either!(&mut self.ring, ring => ring.add(&cells, chains, buffers, writable))))
            }
            Some(table) if self.has_room(buffers.len(), Some(&table)) => {
                let cells = table.memory.cells::<[AtomicU64; 2]>(0, buffers.len())?;
                for (number, cell) in cells.iter().enumerate() {
                    store(cell, self.in_table(buffers, number));
                }
                Some(self.add_table(table.addr, buffers.len(), writable))
            }
            _ => None,
        }
    }

    #[cold]
    fn add_slowly(&mut self, buffers: &[Descriptor], table: Option<IndirectTable<'_>>) -> Result<Token, AddError> {
        match table {
            Some(table) if self.has_room(buffers.len(), Some(&table)) => {
                let writable = check_buffers(buffers)?;
                for number in 0..buffers.len() {
                    store_words(&table.memory, number as u16, self.in_table(buffers, number));
                }
                Ok(self.add_table(table.addr, buffers.len(), writable))
            }
            _ => Err(self.why_not(buffers, table)),
        }
    }

    /// The table's words for that buffer.
    #[inline(always)]
    fn in_table(&self, buffers: &[Descriptor], number: usize) -> (u64, u64) {
        let (buffer, goes_on) = (&buffers[number], number + 1 < buffers.len());
        match self.ring {
            Ring::Split(_) => split::Ring::in_table(buffer, number, goes_on),
            Ring::Packed(_) => packed::Ring::in_table(buffer),
        }
    }

    /// Adds a chain whose table is written.
    #[inline(always)]
    fn add_table(&mut self, addr: BusAddr, descriptors: usize, writable: u32) -> Token {
        let cells = self.memory.cells();
        // As many as fit a queue, so their length fits too.
        let len = DESCRIPTOR * descriptors as u32;
        let id = self.chains.next;
        self.chains.next = self.chains.links[usize::from(id)];
        self.chains.give(id, id, 1, writable);
        either!(&mut self.ring, ring => ring.add_table(&cells, id, addr, len));
        Token(id)
    }

    /// Which token the next chain will have, if one can be added at all.
    #[inline]
    pub fn next_token(&self) -> Option<Token> {
        (self.chains.free > 0).then_some(Token(self.chains.next))
    }

    #[inline(always)]
    fn has_room(&self, buffers: usize, table: Option<&IndirectTable<'_>>) -> bool {
        let free = usize::from(self.chains.free);
        match table {
            None => buffers <= free,
            Some(table) => {
                self.rules.indirect == Indirect::Allowed
                    && free > 0
                    && buffers <= self.chains.size.into()
                    && buffers * DESCRIPTOR as usize <= table.memory.len()
            }
        }
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

    /// Publishes, and says whether the device wants to be told of what was published since this was last asked. A
    /// device that broke the queue is told of nothing.
    #[inline(always)]
    pub fn needs_kick(&mut self) -> bool {
        either!(&mut self.ring, ring => {
            let cells = self.memory.cells();
            ring.publish(&cells);
            ring.needs_kick(&cells)
        })
    }

    /// The same for who has added something since this was last asked: for each chain by itself.
    #[inline(always)]
    pub fn tell(&mut self) -> bool {
        either!(&mut self.ring, ring => ring.tell(&self.memory.cells()))
    }

    /// Takes a chain back that the device has used, in whatever order it does so. Publishes first: what the device was
    /// not shown it can't have used.
    ///
    /// # Errors
    /// [`DeviceError`], then and from then on: nothing that the device says of this queue can be believed.
    #[inline]
    pub fn take_used(&mut self) -> Result<Option<Used>, DeviceError> {
        match self.pop_used() {
            Some((Returned { token, written, .. }, _)) => Ok(Some(Used { token, written })),
            None => self.poison.map_or(Ok(None), Err),
        }
    }

    /// The same, with the record of its token. Where there is nothing, [`Self::poison`] is to be looked at.
    #[inline(always)]
    pub fn pop_used(&mut self) -> Option<(Returned, &mut T)> {
        let Self { memory, chains, ring, poison, .. } = self;
        let popped = either!(ring, ring => {
            let cells = memory.cells();
            ring.publish(&cells);
            ring.pop_used(&cells, chains)
        });
        match popped {
            Ok(popped) => popped,
            Err(error) => {
                *poison = Some(error);
                None
            }
        }
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
        let more = either!(ring, ring => ring.enable_callbacks(&memory.cells(), chains));
        more.inspect_err(|&error| *poison = Some(error))
    }

    /// How many entries of the ring are free.
    #[inline]
    pub fn free(&self) -> u16 {
        self.chains.free
    }

    /// How many descriptors the queue has.
    pub fn size(&self) -> u16 {
        self.chains.size
    }

    /// The chains that did not come back. They are the device's until it is reset; then they can be taken from it.
    pub fn under_way(&self) -> impl Iterator<Item = Token> {
        (0..).zip(&self.chains.entries).filter(|(_, entry)| entry.taken != 0).map(|(id, _)| Token(id))
    }

    /// What the device did, if it broke the queue.
    pub fn poison(&self) -> Option<DeviceError> {
        self.poison
    }

    /// Begins anew, as [`Self::new`] does, whatever became of the queue: for one that the device has let go of (§2.6.1).
    /// `lost` hears of each chain that did not come back.
    pub fn reset(&mut self, mut lost: impl FnMut(Token, &mut T)) {
        let Self { memory, rules, chains, ring, poison } = self;
        for (id, entry) in (0..).zip(&mut chains.entries) {
            if entry.taken != 0 {
                lost(Token(id), &mut entry.record);
            }
        }
        memory.cells().clear();
        chains.reset();
        (*ring, *poison) = (Ring::new(*rules, chains.size), None);
    }

    /// What is kept beside the chain of that token.
    #[inline]
    pub fn record(&mut self, token: Token) -> &mut T {
        &mut self.chains.entries[token.index()].record
    }

    /// What is kept beside the chains of all tokens.
    pub fn records(&mut self) -> impl Iterator<Item = &mut T> {
        self.chains.entries.iter_mut().map(|entry| &mut entry.record)
    }

    /// The ring's memory, which the device has until it is reset.
    pub fn into_memory(self) -> M {
        self.memory
    }
}

/// Which chains the device has, and what is free. None of it is ever read back from the ring.
#[derive(Debug)]
struct Chains<T> {
    /// By descriptor (split) or id (packed).
    entries: Box<[Entry<T>]>,
    /// From each to the next, of a chain or of the free ones: what a ring says too, and is not asked.
    links: Box<[u16]>,
    /// The first free one, where there is one.
    next: u16,
    /// How many entries of the ring are free.
    free: u16,
    size: u16,
}

/// A descriptor or an id, and the chain that begins with it or has it.
#[derive(Debug)]
struct Entry<T> {
    /// The last one of the chain.
    last: u16,
    /// The second, of a chain with a frame.
    middle: u16,
    /// How many entries of the ring the chain takes up; 0 where the device has no such chain.
    taken: u16,
    /// How many bytes the device may write.
    writable: u32,
    /// Where its last chain still is, with its frame.
    standing: Standing,
    /// The caller's.
    record: T,
}

/// Where a chain of three is, but for what is in its middle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Standing {
    #[default]
    Nowhere,
    /// In the descriptors from `Entry::next` to `Entry::last`.
    InRing,
    InTable,
}

impl<T> Chains<T> {
    fn new(size: u16, mut records: impl FnMut(Token) -> T) -> Self {
        // The last is followed by one that is not there, and that is never gone to: `free` counts.
        let entries = (0..size).map(|id| Entry {
            last: id,
            middle: id,
            taken: 0,
            writable: 0,
            standing: Standing::Nowhere,
            record: records(Token(id)),
        });
        Self { entries: entries.collect(), links: (1..=size).collect(), next: 0, free: size, size }
    }

    /// All are free, and none is in the ring's memory. Those that the device had come last: one that uses them after all,
    /// which it must not, is found out for as long as there are others.
    fn reset(&mut self) {
        let Self { entries, links, next, free, size } = self;
        let under_way = |entries: &[Entry<T>], id: u16| entries[usize::from(id)].taken != 0;
        let mut kept = 0;
        for id in (0..*size).filter(|&id| under_way(entries, id)) {
            let mut at = id;
            kept += 1;
            while at != entries[usize::from(id)].last {
                at = links[usize::from(at)];
                kept += 1;
            }
        }
        // The list of the free ones, whatever `free` says of a broken queue; then those of each chain.
        let mut tail = None;
        let mut at = *next;
        for _ in kept..*size {
            tail = Some(at);
            at = links[usize::from(at)];
        }
        for id in (0..*size).filter(|&id| under_way(entries, id)) {
            match tail {
                None => *next = id,
                Some(tail) => links[usize::from(tail)] = id,
            }
            tail = Some(entries[usize::from(id)].last);
        }
        *free = *size;
        for (id, entry) in (0..).zip(entries) {
            let Entry { last, middle, taken, writable, standing, record: _ } = entry;
            (*last, *middle, *taken, *writable, *standing) = (id, id, 0, 0, Standing::Nowhere);
        }
    }

    #[inline]
    fn are_all_back(&self) -> bool {
        self.free == self.size
    }

    /// Remembers a chain whose entries are not among the free ones any more.
    #[inline]
    fn give(&mut self, id: u16, last: u16, taken: u16, writable: u32) {
        let entry = &mut self.entries[usize::from(id)];
        (entry.last, entry.taken, entry.writable, entry.standing) = (last, taken, writable, Standing::Nowhere);
        self.free -= taken;
    }

    /// Takes chain `id` back, of which the device says that it wrote `written` bytes; also says how many entries of the
    /// ring it took up.
    #[inline(always)]
    fn take(&mut self, id: u32, written: u32) -> Result<(Returned, u16, &mut T), DeviceError> {
        let Self { entries, links, next, free, size } = self;
        match entries.get_mut(id as usize) {
            Some(entry) if entry.taken != 0 && written <= entry.writable => {
                let (id, taken) = (id as u16, entry.taken);
                entry.taken = 0;
                // The chain goes before the free ones.
                links[usize::from(entry.last)] = *next;
                *next = id;
                // No more than the size: they were taken from it.
                *free = free.wrapping_add(taken);
                let returned = Returned { token: Token(id), written, writable: entry.writable };
                Ok((returned, taken, &mut entry.record))
            }
            entry => {
                let entry = entry.map(|entry| (entry.taken, entry.writable));
                let error = why_not_back(id, written, entry, *size, free == size);
                // From here on nothing is added.
                *free = 0;
                Err(error)
            }
        }
    }
}

#[cold]
fn why_not_back(id: u32, written: u32, entry: Option<(u16, u32)>, size: u16, all_back: bool) -> DeviceError {
    match entry {
        _ if all_back => DeviceError::NothingUnderWay,
        None => DeviceError::NoSuchChain { id, size },
        Some((0, _)) => DeviceError::NotUnderWay { id: id as u16 },
        Some((_, writable)) => DeviceError::WrittenTooMuch { id: id as u16, written, writable },
    }
}

/// How many bytes of a chain are writable.
#[inline(always)]
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

/// Writes the two words of a descriptor.
#[inline(always)]
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
            DeviceError::Unused { place } => write!(f, "descriptor {place} was used, and then was not"),
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
