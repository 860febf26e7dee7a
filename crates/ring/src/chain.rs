use crate::area::ask_behind;
use crate::wire::{DESCRIPTOR, INDIRECT, NEXT, Raw, WRITE, load_words};
use crate::{Format, RingError, RingStop};
use alloc::vec::Vec;
use ringfence_dma::{Access, BusAddr, Fault, FaultReason, HostSlice, Stop, Ticket, Visit, copy_from_bus};

/// The most entries that an indirect table may have in a queue smaller than that; as many as QEMU takes.
const TABLE_ENTRIES: u32 = 1024;

/// What the driver made available as one request: bytes for the device to read, then bytes for it to write.
///
/// Filled by [`OpenQueue::pop`](crate::OpenQueue::pop) and used again and again, so that it allocates only while it
/// grows.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    head: Head,
    descriptors: Vec<Descriptor>,
    tally: Tally,
    table: Option<Table>,
    /// Where its table is, read or not.
    indirect: Option<(BusAddr, u32)>,
}

/// What a chain adds up to so far. Kept apart while a chain is walked; checked, and stored in it, at the end.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    /// In bytes, as is the next. No chain is so long that they overflow.
    readable: u64,
    writable: u64,
    /// A writable descriptor has been seen, so no readable one may follow.
    writing: bool,
}

/// What a chain is given back as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Head {
    /// Split: the first descriptor. Packed: the buffer id, which is the driver's to choose.
    pub(crate) id: u16,
    /// How many entries of the ring the chain takes up. Split: 1, in the avail ring.
    pub(crate) entries: u16,
}

impl Head {
    /// How many entries of the ring the chain takes up: of a split one's avail ring 1.
    pub fn entries(&self) -> u16 {
        self.entries
    }
}

/// A stretch of memory that the driver described. It has at least one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Where.
    pub addr: BusAddr,
    /// How many bytes.
    pub len: u32,
    /// What the device is to do there.
    pub access: Access,
}

/// An indirect table that was not read yet.
#[derive(Clone, Copy, Debug)]
struct Table {
    addr: BusAddr,
    entries: u32,
    format: Format,
}

impl Head {
    /// Split: the first descriptor. Packed: the buffer id, which is the driver's to choose.
    pub fn id(self) -> u16 {
        self.id
    }
}

impl Chain {
    /// What to give back when the request is done.
    #[inline]
    pub fn head(&self) -> Head {
        self.head
    }

    /// The chain's memory in the driver's order: all that is to be read before all that is to be written. Stretches
    /// without a byte are left out.
    #[inline]
    pub fn descriptors(&self) -> &[Descriptor] {
        &self.descriptors
    }

    /// How many bytes the device is to read. Together with [`Self::writable_len`] less than 4 GiB.
    #[inline]
    pub fn readable_len(&self) -> u32 {
        // Both together are below 4 GiB, see `settle`.
        self.tally.readable as u32
    }

    /// How many bytes the device may write.
    #[inline]
    pub fn writable_len(&self) -> u32 {
        self.tally.writable as u32
    }

    /// Where the chain's indirect table is and how many bytes it has, if there is one.
    #[inline]
    pub fn table(&self) -> Option<(BusAddr, u32)> {
        self.indirect
    }

    /// Whether a part of the chain is in a table that [`Self::expand`] has yet to read.
    #[inline]
    pub fn is_folded(&self) -> bool {
        self.table.is_some()
    }

    /// Reads the chain's indirect table, if it has one that was not read yet. `asked`: the ticket of an earlier try.
    ///
    /// # Errors
    /// [`RingStop::Wait`] where the table's translation is missing: the chain waits, others need not.
    /// [`RingStop::Fault`] where the table can't be reached, which concerns this chain alone.
    /// [`RingStop::Broken`] where what is in it breaks the rules.
    #[inline]
    pub fn expand<V: Visit>(&mut self, visit: &V, asked: Option<Ticket>) -> Result<(), RingStop> {
        match self.table {
            None => Ok(()),
            Some(table) => self.read_table(visit, table, asked),
        }
    }

    fn read_table<V: Visit>(&mut self, visit: &V, table: Table, asked: Option<Ticket>) -> Result<(), RingStop> {
        let direct = self.descriptors.len();
        let read = self.walk_table(&TableReader::new(visit, table, asked)?);
        match read {
            Ok(()) => self.table = None,
            // Half a table is worth nothing: it is read from its start next time.
            Err(_) => self.descriptors.truncate(direct),
        }
        read
    }

    fn walk_table<V: Visit>(&mut self, reader: &TableReader<'_, V>) -> Result<(), RingStop> {
        let Table { entries, format, .. } = reader.table;
        let mut tally = self.tally;
        let mut index = 0;
        for _ in 0..entries {
            let raw = reader.entry(index)?;
            match format {
                Format::Split => {
                    if raw.has(INDIRECT) {
                        return Err(RingError::IndirectNested.into());
                    }
                    self.add(raw, &mut tally)?;
                    if !raw.has(NEXT) {
                        return Ok(self.complete(tally)?);
                    }
                    index = u32::from(raw.link);
                    if index >= entries {
                        return Err(RingError::NoSuchDescriptor { index: raw.link, count: entries }.into());
                    }
                }
                // All entries in order, and no flag but WRITE means anything (§2.8.7).
                Format::Packed => {
                    self.add(raw, &mut tally)?;
                    index += 1;
                }
            }
        }
        match format {
            Format::Split => Err(RingError::ChainTooLong { limit: entries }.into()),
            Format::Packed => Ok(self.complete(tally)?),
        }
    }

    /// Begins a new chain.
    #[inline]
    pub(crate) fn begin(&mut self) {
        let Self { head, descriptors, tally, table, indirect } = self;
        descriptors.clear();
        (*head, *tally, *table, *indirect) = (Head::default(), Tally::default(), None, None);
    }

    #[inline]
    pub(crate) fn set_head(&mut self, head: Head) {
        self.head = head;
    }

    /// Appends what a descriptor that is no table describes.
    #[inline]
    pub(crate) fn add(&mut self, raw: Raw, tally: &mut Tally) -> Result<(), RingError> {
        let access = if raw.has(WRITE) {
            tally.writing = true;
            tally.writable += u64::from(raw.len);
            Access::Write
        } else {
            if tally.writing {
                return Err(RingError::ReadAfterWrite);
            }
            tally.readable += u64::from(raw.len);
            Access::Read
        };
        // The standard does not forbid an empty stretch, and Linux has made some; it is nothing to anybody.
        if raw.len != 0 {
            self.descriptors.push(Descriptor { addr: raw.addr, len: raw.len, access });
        }
        Ok(())
    }

    /// Notes the table that a descriptor refers to, which ends the chain. Its WRITE flag means nothing (§2.7.5.3.2).
    #[inline]
    pub(crate) fn fold(&mut self, raw: Raw, format: Format, size: u16, tally: Tally) -> Result<(), RingError> {
        let limit = u32::from(size).max(TABLE_ENTRIES);
        let entries = raw.len / DESCRIPTOR;
        if raw.len == 0 || !raw.len.is_multiple_of(DESCRIPTOR) {
            return Err(RingError::TableLength { len: raw.len });
        }
        if entries > limit {
            return Err(RingError::TableTooLong { entries, limit });
        }
        self.table = Some(Table { addr: raw.addr, entries, format });
        self.indirect = Some((raw.addr, raw.len));
        self.settle(tally)
    }

    /// Ends a chain that is all there. One without a byte is what a ring full of zeros looks like, and what no driver has
    /// a use for.
    #[inline]
    pub(crate) fn complete(&mut self, tally: Tally) -> Result<(), RingError> {
        if self.descriptors.is_empty() {
            return Err(RingError::NoBytes);
        }
        self.settle(tally)
    }

    #[inline]
    fn settle(&mut self, tally: Tally) -> Result<(), RingError> {
        if tally.readable + tally.writable > u64::from(u32::MAX) {
            return Err(RingError::TooManyBytes);
        }
        self.tally = tally;
        Ok(())
    }
}

/// An indirect table during a visit.
struct TableReader<'v, V> {
    visit: &'v V,
    table: Table,
    asked: Option<Ticket>,
    /// The whole table, where it lies in one piece.
    whole: Option<HostSlice<'v>>,
}

impl<'v, V: Visit> TableReader<'v, V> {
    fn new(visit: &'v V, table: Table, asked: Option<Ticket>) -> Result<Self, RingStop> {
        let len = table.entries * DESCRIPTOR;
        if table.addr.last(len.into()).is_none() {
            let fault = Fault { addr: table.addr, access: Access::Read, reason: FaultReason::Wraps };
            return Err(RingStop::Fault(fault));
        }
        let whole = match visit.resolve(table.addr, len as usize, Access::Read, asked) {
            Ok(slice) => Some(slice).filter(|slice| slice.len() == len as usize),
            Err(stop) => return Err(Self::missed(visit, table, 0, asked, stop)),
        };
        Ok(Self { visit, table, asked, whole })
    }

    /// Entry `index`, read once. It lies in the table.
    #[inline]
    fn entry(&self, index: u32) -> Result<Raw, RingStop> {
        let offset = index * DESCRIPTOR;
        let (addr, rest) = match &self.whole {
            Some(slice) => load_words(&slice.sub(offset as usize, DESCRIPTOR as usize)),
            None => self.scattered(offset)?,
        };
        // The entries of a packed ring's table have their flags where the ring's descriptors have them.
        Ok(match self.table.format {
            Format::Split => Raw::split(addr, rest),
            Format::Packed => Raw::packed(addr, rest),
        })
    }

    /// Tables need no alignment, so an entry may lie across pages.
    #[cold]
    fn scattered(&self, offset: u32) -> Result<(u64, u64), RingStop> {
        let mut bytes = [0; DESCRIPTOR as usize];
        let addr = BusAddr(self.table.addr.0 + u64::from(offset));
        copy_from_bus(self.visit, addr, &mut bytes, self.asked)
            .map_err(|stop| Self::missed(self.visit, self.table, offset, self.asked, stop))?;
        let both = u128::from_le_bytes(bytes);
        Ok((both as u64, (both >> 64) as u64))
    }

    #[cold]
    fn missed(visit: &V, table: Table, offset: u32, asked: Option<Ticket>, stop: Stop) -> RingStop {
        if let Stop::Miss(miss) = stop {
            let (addr, len) = (BusAddr(table.addr.0 + u64::from(offset)), table.entries * DESCRIPTOR - offset);
            ask_behind(visit, miss, addr, len, Access::Read, asked.unwrap_or(miss.ticket));
        }
        stop.into()
    }
}
