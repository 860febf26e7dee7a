//! One queue of a disk: requests on their way, and nothing about how the device is rung.

use super::{Answer, BlkError, Completion, Geometry, Limits, Request, RequestError, RequestId, SECTOR, Unmap};
use crate::queue::{self, Piece, Pieces};
use alloc::vec::Vec;
use core::convert::Infallible;
use core::mem;
use core::sync::atomic::Ordering;
use ringfence_dma::{Access, Buffer, BusAddr, DmaError, FromDevice, Mapper, Streaming, ToDevice};
use ringfence_ring::{AddError, Descriptor, Indirect, IndirectTable};
use virtio_spec::blk::{S, T as Type};

/// Why a queue did not do as asked; it has no way to a device that could fail.
pub type QueueError = BlkError<Infallible>;

/// One queue of a disk. Threads may have one each; see [`Blk::split`](super::Blk::split).
///
/// Whoever uses it rings the device and waits for it by itself: a batch of requests is [`submit`](Self::submit)ted and
/// then [`publish`](Self::publish)ed, which says whether to ring.
#[derive(Debug)]
pub struct Queue<'a, M: Mapper + ?Sized> {
    ring: queue::Queue<'a, M>,
    mapper: &'a M,
    geometry: Geometry,
    limits: Limits,
    slots: Vec<Slot<'a, M>>,
    /// Slots that no request has.
    free: Vec<u16>,
    /// By the ring's token: whose slot it is.
    by_token: Vec<u16>,
    /// Each slot's header, payload and status, and table of descriptors; see [`Record`].
    records: Pieces<'a, M>,
    /// For putting a chain together.
    chain: Vec<Descriptor>,
}

impl<'a, M: Mapper + ?Sized> Queue<'a, M> {
    /// The records that a queue over `ring` needs: as many as the ring takes, and one that is kept for who waits; see
    /// [`Self::submit`].
    pub(super) fn records(
        mapper: &'a M,
        ring: &queue::Queue<'a, M>,
        limits: Limits,
    ) -> Result<Pieces<'a, M>, DmaError> {
        let table = match ring.indirect {
            Indirect::Allowed => Record::DESCRIPTOR * (usize::from(limits.segments) + 2),
            Indirect::Refused => 0,
        };
        Pieces::allocate(mapper, ring.ring.size() + 1, Record::LEN + table)
    }

    pub(super) fn new(
        mapper: &'a M,
        ring: queue::Queue<'a, M>,
        records: Pieces<'a, M>,
        geometry: Geometry,
        limits: Limits,
    ) -> Self {
        let depth = ring.ring.size();
        let count = depth + 1;
        Self {
            ring,
            mapper,
            geometry,
            limits,
            slots: (0..count).map(|_| Slot::new(limits.segments)).collect(),
            free: (0..count).rev().collect(),
            by_token: alloc::vec![0; depth.into()],
            records,
            chain: Vec::with_capacity(usize::from(limits.segments) + 2),
        }
    }

    /// What [`RequestId::slot`] is always below.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Whether [`poll`](Self::poll) will have something: a look at one word, for who looks again and again.
    #[inline]
    pub fn has_used(&self) -> bool {
        self.ring.ring.has_used()
    }

    /// How many requests have come to no end, or to one that was not polled yet.
    pub fn under_way(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Puts a request on its way. The device need not see it before [`publish`](Self::publish).
    ///
    /// # Errors
    /// Any [`BlkError`] but [`BlkError::Failed`]; nothing was put on its way then.
    #[inline]
    pub fn submit(&mut self, request: Request<'_, 'a>) -> Result<RequestId, QueueError> {
        // Completions that nobody polls keep their slots. One slot is left for who waits, and does not poll others'.
        match self.free.len() {
            0 | 1 => self.usable().and(Err(BlkError::Busy)),
            _ => self.put(request),
        }
    }

    #[inline]
    pub(super) fn put(&mut self, request: Request<'_, 'a>) -> Result<RequestId, QueueError> {
        self.usable()?;
        self.check(&request)?;
        let slot = *self.free.last().ok_or(BlkError::Busy)?;
        let offered = self.map(slot, &request).and_then(|()| self.offer(slot, &request));
        match offered {
            Ok(expected) => {
                self.free.pop();
                Ok(self.slots[usize::from(slot)].begin(slot, &request, expected))
            }
            Err(error) => {
                self.slots[usize::from(slot)].segments.clear();
                Err(error)
            }
        }
    }

    /// Shows the device what was submitted; `true` if it wants to be rung.
    ///
    /// # Errors
    /// [`BlkError::Broken`].
    #[inline]
    pub fn publish(&mut self) -> Result<bool, QueueError> {
        self.usable()?;
        Ok(self.ring.ring.needs_kick())
    }

    /// A request that has come to its end, if there is one. Does not wait.
    ///
    /// # Errors
    /// [`BlkError::Broken`].
    #[inline]
    pub fn poll(&mut self) -> Result<Option<Completion>, QueueError> {
        let completion = self.reap()?;
        if let Some(completion) = &completion {
            self.give_back(completion.id);
        }
        Ok(completion)
    }

    /// Asks the device to tell of the next request that ends. `true`: one has, so poll instead of sleeping.
    ///
    /// # Errors
    /// [`BlkError::Broken`].
    pub fn listen(&mut self) -> Result<bool, QueueError> {
        self.ring.ring.enable_callbacks().map_err(BlkError::Broken)
    }

    /// Lets the device know that it need not tell. It may all the same.
    pub fn ignore(&mut self) {
        self.ring.ring.disable_callbacks();
    }

    /// The slot of a request whose completion was taken by [`Self::reap`].
    #[inline]
    pub(super) fn give_back(&mut self, id: RequestId) {
        self.free.push(id.slot);
    }

    /// Gives up for lost whatever the device may still touch.
    pub(super) fn leak(self) {
        mem::forget(self);
    }

    #[inline]
    pub(super) fn usable(&self) -> Result<(), QueueError> {
        self.ring.ring.poison().map_or(Ok(()), |error| Err(BlkError::Broken(error)))
    }

    #[inline]
    fn check(&self, request: &Request<'_, 'a>) -> Result<(), QueueError> {
        let Geometry { sectors: capacity, read_only, cached, discard, write_zeroes, .. } = self.geometry;
        let in_range = |sector: u64, sectors: u64| match sector.checked_add(sectors) {
            Some(end) if end <= capacity => Ok(()),
            _ => Err(BlkError::OutOfRange { sector, sectors }),
        };
        let erase = |sector, sectors: u32, max: Option<u32>| {
            let max = max.ok_or(BlkError::NotOffered)?;
            match sectors {
                0 => Err(BlkError::Length { len: 0 }),
                _ if sectors > max => Err(BlkError::TooLong { count: sectors.into(), max: max.into() }),
                _ => in_range(sector, sectors.into()),
            }
        };
        let transfer = |sector, buffers: &[Buffer<'_>]| {
            let len = buffers.iter().map(|buffer| buffer.len() as u64).sum::<u64>();
            if len == 0 || len % SECTOR != 0 {
                return Err(BlkError::Length { len });
            }
            if len > Limits::BYTES {
                return Err(BlkError::TooLong { count: len, max: Limits::BYTES });
            }
            in_range(sector, len / SECTOR)
        };
        let writes = matches!(request, Request::Write { .. } | Request::Discard { .. } | Request::WriteZeroes { .. });
        if writes && read_only {
            return Err(BlkError::ReadOnly);
        }
        match *request {
            Request::Read { sector, into } => transfer(sector, into),
            Request::Write { sector, from } => transfer(sector, from),
            Request::Flush if !cached => Err(BlkError::NotOffered),
            Request::Flush | Request::Id => Ok(()),
            Request::Discard { sector, sectors } => erase(sector, sectors, discard),
            Request::WriteZeroes { sector, sectors, .. } => erase(sector, sectors, write_zeroes),
        }
    }

    /// Lends the request's buffers to the device, in pieces as long as device and mapper can take.
    #[inline]
    fn map(&mut self, slot: u16, request: &Request<'_, 'a>) -> Result<(), QueueError> {
        let mapper = self.mapper;
        let longest = self.limits.piece.min(mapper.max_len()).max(1);
        let most = usize::from(self.limits.segments);
        let segments = &mut self.slots[usize::from(slot)].segments;
        let (buffers, access) = match *request {
            Request::Read { into, .. } => (into, Access::Write),
            Request::Write { from, .. } => (from, Access::Read),
            _ => return Ok(()),
        };
        let count: usize = buffers.iter().map(|buffer| buffer.len().div_ceil(longest)).sum();
        if count > most {
            return Err(BlkError::TooLong { count: count as u64, max: most as u64 });
        }
        for buffer in buffers {
            let mut offset = 0;
            while offset < buffer.len() {
                let piece = buffer.sub(offset, longest.min(buffer.len() - offset));
                segments.push(match access {
                    Access::Write => Segment::FromDevice(Streaming::map(mapper, piece, FromDevice)?),
                    Access::Read => Segment::ToDevice(Streaming::map(mapper, piece, ToDevice)?),
                });
                offset += piece.len();
            }
        }
        Ok(())
    }

    /// Writes the request's record and puts its chain into the ring. Returns how many bytes the device is to write.
    #[inline]
    fn offer(&mut self, slot: u16, request: &Request<'_, 'a>) -> Result<u32, QueueError> {
        let Self { ring: queue, slots, by_token, records, chain, .. } = self;
        let record = Record(records.get(slot));
        record.write(request);

        chain.clear();
        chain.push(record.header());
        // A request has data or a payload, and not both.
        chain.extend(record.payload(request));
        chain.extend(slots[usize::from(slot)].segments.iter().map(Segment::descriptor));
        chain.push(record.status());
        let expected = chain.iter().map(|part| if part.access == Access::Write { part.len } else { 0 }).sum();

        // A table has the request take up one entry of the ring, so that more of them fit.
        let table = (queue.indirect == Indirect::Allowed).then(|| record.table());
        match queue.ring.add(chain, table) {
            Ok(token) => {
                by_token[token.index()] = slot;
                Ok(expected)
            }
            Err(AddError::Full { .. }) => Err(BlkError::Busy),
            Err(AddError::Poisoned(error)) => Err(BlkError::Broken(error)),
            Err(error) => unreachable!("a chain within the limits: {error}"),
        }
    }

    /// Takes the next used chain off the ring, and back what it had lent.
    #[inline]
    pub(super) fn reap(&mut self) -> Result<Option<Completion>, QueueError> {
        let used = self.ring.ring.take_used().map_err(BlkError::Broken)?;
        let Some(used) = used else { return Ok(None) };
        let slot = self.by_token[used.token.index()];
        let (id, kind, expected) = self.slots[usize::from(slot)].end(slot);
        let result = Record(self.records.get(slot)).answer(kind, used.written, expected);
        Ok(Some(Completion { id, result }))
    }
}

/// Room for one request under way.
#[derive(Debug)]
struct Slot<'a, M: Mapper + ?Sized> {
    /// Counts the requests that had the slot.
    generation: u64,
    kind: Kind,
    expected: u32,
    segments: Vec<Segment<'a, M>>,
}

/// What a slot's request wants back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Nothing but its status, or data in buffers.
    Plain,
    Id,
}

#[derive(Debug)]
enum Segment<'a, M: Mapper + ?Sized> {
    ToDevice(Streaming<'a, M, ToDevice>),
    FromDevice(Streaming<'a, M, FromDevice>),
}

impl<M: Mapper + ?Sized> Segment<'_, M> {
    #[inline]
    fn descriptor(&self) -> Descriptor {
        let (addr, len, access) = match self {
            Segment::ToDevice(mapping) => (mapping.addr(), mapping.len(), Access::Read),
            Segment::FromDevice(mapping) => (mapping.addr(), mapping.len(), Access::Write),
        };
        // `Limits::piece` has 32 bits.
        Descriptor { addr, len: len as u32, access }
    }
}

impl<M: Mapper + ?Sized> Slot<'_, M> {
    fn new(segments: u16) -> Self {
        Self { generation: 0, kind: Kind::Plain, expected: 0, segments: Vec::with_capacity(segments.into()) }
    }

    #[inline]
    fn begin(&mut self, slot: u16, request: &Request<'_, '_>, expected: u32) -> RequestId {
        self.kind = if matches!(request, Request::Id) { Kind::Id } else { Kind::Plain };
        self.expected = expected;
        RequestId { slot, generation: self.generation }
    }

    /// Takes back what was lent: whatever the device wrote is in the buffers afterwards.
    #[inline]
    fn end(&mut self, slot: u16) -> (RequestId, Kind, u32) {
        self.segments.clear();
        let id = RequestId { slot, generation: self.generation };
        self.generation += 1;
        (id, self.kind, self.expected)
    }
}

/// What a request has besides its data, in memory that the device sees all the time: `virtio_blk_req` (§5.2.6).
///
/// The device may scribble over all of it at any time, and harms nobody but itself: nothing but the answer is read back.
#[derive(Clone, Copy)]
struct Record<'a>(Piece<'a>);

impl<'a> Record<'a> {
    /// Where in a record the payload, the status and the table are. The header is at its start.
    const PAYLOAD: usize = 16;
    const STATUS: usize = 48;
    const LEN: usize = 64;

    /// The length of a descriptor in a table.
    const DESCRIPTOR: usize = 16;

    /// What no device writes: it shows a status that was not written.
    const NO_STATUS: u8 = 0xff;

    #[inline]
    fn write(&self, request: &Request<'_, '_>) {
        let (kind, at) = match *request {
            Request::Read { sector, .. } => (Type::In, sector),
            Request::Write { sector, .. } => (Type::Out, sector),
            Request::Flush => (Type::Flush, 0),
            Request::Id => (Type::GetId, 0),
            Request::Discard { .. } => (Type::Discard, 0),
            Request::WriteZeroes { .. } => (Type::WriteZeroes, 0),
        };
        // A type and a reserved field, then the sector.
        self.0.memory.store_u64(0, u32::from(kind).into(), Ordering::Relaxed);
        self.0.memory.store_u64(8, at, Ordering::Relaxed);
        if self.payload(request).is_some() {
            // `virtio_blk_discard_write_zeroes`, or room for a name: cleared, lest an earlier name comes back.
            let mut payload = [0; Self::STATUS - Self::PAYLOAD];
            if let Request::Discard { sector, sectors } | Request::WriteZeroes { sector, sectors, .. } = *request {
                payload[..8].copy_from_slice(&sector.to_le_bytes());
                payload[8..12].copy_from_slice(&sectors.to_le_bytes());
            }
            if let Request::WriteZeroes { unmap: Unmap::Yes, .. } = request {
                payload[12] = 1;
            }
            self.0.memory.write(Self::PAYLOAD, &payload);
        }
        self.0.memory.write(Self::STATUS, &[Self::NO_STATUS]);
    }

    #[inline]
    fn header(&self) -> Descriptor {
        self.part(0, 16, Access::Read)
    }

    #[inline]
    fn payload(&self, request: &Request<'_, '_>) -> Option<Descriptor> {
        match request {
            Request::Discard { .. } | Request::WriteZeroes { .. } => Some(self.part(Self::PAYLOAD, 16, Access::Read)),
            Request::Id => Some(self.part(Self::PAYLOAD, 20, Access::Write)),
            Request::Read { .. } | Request::Write { .. } | Request::Flush => None,
        }
    }

    #[inline]
    fn status(&self) -> Descriptor {
        self.part(Self::STATUS, 1, Access::Write)
    }

    #[inline]
    fn part(&self, offset: usize, len: u32, access: Access) -> Descriptor {
        Descriptor { addr: BusAddr(self.0.addr.0 + offset as u64), len, access }
    }

    fn table(&self) -> IndirectTable<'a> {
        let memory = self.0.memory.sub(Self::LEN, self.0.memory.len() - Self::LEN);
        IndirectTable { memory, addr: BusAddr(self.0.addr.0 + Self::LEN as u64) }
    }

    /// What the device answered, who says that it wrote `written` bytes of `expected`.
    #[inline]
    fn answer(&self, kind: Kind, written: u32, expected: u32) -> Result<Answer, RequestError> {
        let mut status = [0];
        self.0.memory.read(Self::STATUS, &mut status);
        match S::try_from(status[0]) {
            Ok(S::Ok) if written < expected => Err(RequestError::Short { written, expected }),
            Ok(S::Ok) => Ok(match kind {
                Kind::Plain => Answer::Done,
                Kind::Id => {
                    let mut id = [0; 20];
                    self.0.memory.read(Self::PAYLOAD, &mut id);
                    Answer::Id(id)
                }
            }),
            Ok(S::Ioerr) => Err(RequestError::Io),
            Ok(S::Unsupp) => Err(RequestError::Unsupported),
            _ => Err(RequestError::Status(status[0])),
        }
    }
}
