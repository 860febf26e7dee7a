//! One queue of a disk: requests on their way, and nothing about how the device is rung.

use super::record::{Kind, Record};
use super::{Answer, BlkError, Completion, Geometry, Limits, Request, RequestError, RequestId, SECTOR};
use crate::Transport;
use crate::loans::{self, Loans};
use crate::queue::{self, Pieces};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::convert::Infallible;
use ringfence_dma::{Access, Buffer, DmaError, Loan, Mapper};
use ringfence_ring::{AddError, Descriptor, Framed, Indirect, Token};
use virtio_spec::blk::T as Type;

/// Why a queue did not do as asked; it has no way to a device that could fail.
pub type QueueError = BlkError<Infallible>;

/// One queue of a disk. Threads may have one each; see [`Blk::split`](super::Blk::split).
///
/// Whoever uses it rings the device and waits for it by itself: a batch of requests is [`submit`](Self::submit)ted and
/// then [`publish`](Self::publish)ed, which says whether to ring.
#[derive(Debug)]
pub struct Queue<'a, M: Mapper + ?Sized> {
    number: u16,
    /// With what is kept beside each chain.
    ring: queue::Queue<'a, M, Slot<'a, M>>,
    mapper: &'a M,
    geometry: Geometry,
    limits: Limits,
    /// How many sectors one piece of memory may have.
    longest: u64,
    /// Counts requests.
    generation: u64,
    /// The answer to the last [`Request::Id`].
    name: [u8; 20],
    /// Completions that nobody has heard of yet: of requests that ended while somebody waited for another one, or that a
    /// restart has lost.
    finished: VecDeque<Completion>,
    /// Numbers that no slot has: see [`Self::set_aside`].
    spare: Vec<u16>,
    /// For putting a chain together that is not the usual one.
    chain: Vec<Descriptor>,
    /// The memory of the slots' records.
    records: Pieces<'a, M>,
}

/// One request under way.
#[derive(Debug)]
struct Slot<'a, M: Mapper + ?Sized> {
    record: Record<'a>,
    generation: u64,
    /// What [`RequestId::slot`] says.
    number: u16,
    kind: Kind,
    loans: Loans<'a, M>,
}

impl<'a, M: Mapper + ?Sized> Queue<'a, M> {
    /// The records that a queue over `ring` needs.
    pub(super) fn records(
        mapper: &'a M,
        ring: &queue::Queue<'a, M>,
        limits: Limits,
    ) -> Result<Pieces<'a, M>, DmaError> {
        let table = match ring.indirect {
            Indirect::Allowed => usize::from(limits.segments) + 2,
            Indirect::Refused => 0,
        };
        Pieces::allocate(mapper, ring.ring.size(), Record::len(table))
    }

    pub(super) fn new(
        number: u16,
        mapper: &'a M,
        ring: queue::Queue<'a, M>,
        records: Pieces<'a, M>,
        geometry: Geometry,
        limits: Limits,
    ) -> Self {
        let depth = ring.ring.size();
        let slot = |token: Token| Slot {
            record: Record::new(records.get(token.index() as u16)),
            generation: 0,
            number: token.index() as u16,
            kind: Kind::Plain,
            loans: Loans::with_capacity(limits.segments),
        };
        Self {
            number,
            ring: ring.keeping(slot),
            mapper,
            geometry,
            limits,
            longest: limits.piece as u64 / SECTOR,
            generation: 0,
            name: [0; 20],
            finished: VecDeque::with_capacity(depth.into()),
            // Up to 65535.
            spare: (depth..=depth + (depth - 1)).collect(),
            chain: Vec::with_capacity(usize::from(limits.segments) + 2),
            records,
        }
    }

    /// What [`RequestId::slot`] is always below.
    pub fn slots(&self) -> usize {
        2 * self.depth()
    }

    /// Whether [`poll`](Self::poll) will have something: a look at one word, for who looks again and again. What a
    /// [restart](Self::restart) has lost is not counted.
    #[inline]
    pub fn has_used(&self) -> bool {
        self.ring.ring.has_used()
    }

    /// How many requests the disk has. Counts them.
    pub fn under_way(&self) -> usize {
        self.ring.ring.under_way().count()
    }

    /// How many there may be.
    pub(super) fn depth(&self) -> usize {
        self.ring.ring.size().into()
    }

    /// Puts a request on its way. The device need not see it before [`publish`](Self::publish).
    ///
    /// # Errors
    /// Any [`BlkError`] but [`BlkError::Failed`]; nothing was put on its way then.
    #[inline]
    pub fn submit(&mut self, request: Request<'_, 'a>) -> Result<RequestId, QueueError> {
        self.put_if_room(request)
    }

    #[inline(always)]
    pub(super) fn put_if_room<E>(&mut self, request: Request<'_, 'a>) -> Result<RequestId, BlkError<E>> {
        if !self.finished.is_empty() && self.is_crowded() {
            return Err(BlkError::Busy);
        }
        self.put(request)
    }

    /// Completions that nobody polls count too: they are kept, in room of a limited size.
    #[cold]
    fn is_crowded(&self) -> bool {
        self.ring.ring.poison().is_none() && self.finished.len() + self.under_way() >= self.depth()
    }

    #[inline(always)]
    pub(super) fn put<E>(&mut self, request: Request<'_, 'a>) -> Result<RequestId, BlkError<E>> {
        // Each arm hands on what it took apart, so that a usual request is never put together in memory.
        match request {
            Request::Read { sector, into } => match into {
                [buffer] if self.is_usual(sector, buffer.len()) => {
                    self.put_usual(Type::In, sector, *buffer, Access::Write)
                }
                _ => self.put_read(sector, into),
            },
            Request::Write { sector, from } => match from {
                [buffer] if self.is_usual(sector, buffer.len()) && !self.geometry.read_only => {
                    self.put_usual(Type::Out, sector, *buffer, Access::Read)
                }
                _ => self.put_write(sector, from),
            },
            other => self.put_any(other),
        }
    }

    #[inline(never)]
    fn put_read<E>(&mut self, sector: u64, into: &[Buffer<'a>]) -> Result<RequestId, BlkError<E>> {
        self.put_any(Request::Read { sector, into })
    }

    #[inline(never)]
    fn put_write<E>(&mut self, sector: u64, from: &[Buffer<'a>]) -> Result<RequestId, BlkError<E>> {
        self.put_any(Request::Write { sector, from })
    }

    /// Shows the device what was submitted; `true` if it wants to be rung.
    ///
    /// # Errors
    /// [`BlkError::Broken`].
    #[inline]
    pub fn publish(&mut self) -> Result<bool, QueueError> {
        self.needs_kick()
    }

    #[inline(always)]
    pub(super) fn needs_kick<E>(&mut self) -> Result<bool, BlkError<E>> {
        // A broken queue has nothing to tell of.
        match self.ring.ring.needs_kick() {
            true => Ok(true),
            false => self.usable().map(|()| false),
        }
    }

    /// Shows the device what was submitted just now; whether it wants to be rung.
    #[inline(always)]
    pub(super) fn tell(&mut self) -> bool {
        self.ring.ring.tell()
    }

    /// A request that has come to its end, if there is one. Does not wait.
    ///
    /// # Errors
    /// [`BlkError::Broken`].
    #[inline]
    pub fn poll(&mut self) -> Result<Option<Completion>, QueueError> {
        self.next()
    }

    /// The next that came to its end.
    #[inline(always)]
    pub(super) fn next<E>(&mut self) -> Result<Option<Completion>, BlkError<E>> {
        match self.finished.is_empty() {
            true => self.reap(),
            false => Ok(self.kept()),
        }
    }

    /// One that came to its end before, and was set aside.
    #[cold]
    fn kept(&mut self) -> Option<Completion> {
        let completion = self.finished.pop_front()?;
        // Its number is heard of now, and may be another's.
        self.spare.push(completion.id.slot);
        Some(completion)
    }

    /// Whether one is kept that nobody has heard of.
    pub(super) fn keeps_some(&self) -> bool {
        !self.finished.is_empty()
    }

    /// Asks the device to tell of the next request that ends. `true`: one has, so poll instead of sleeping.
    ///
    /// # Errors
    /// [`BlkError::Broken`].
    pub fn listen(&mut self) -> Result<bool, QueueError> {
        Ok(self.listen_for()? || self.keeps_some())
    }

    pub(super) fn listen_for<E>(&mut self) -> Result<bool, BlkError<E>> {
        self.ring.ring.enable_callbacks().map_err(BlkError::Broken)
    }

    /// Lets the device know that it need not tell. It may all the same.
    pub fn ignore(&mut self) {
        self.ring.ring.disable_callbacks();
    }

    /// Has the device reset this queue alone, and go on with it; see [`Blk::restart`](super::Blk::restart), which does so
    /// with all of them. `transport` is the disk's, as [`Blk::split`](super::Blk::split) has it: what was lent is taken back
    /// when that says that the queue was reset, and not before.
    ///
    /// # Errors
    /// [`BlkError::NeedsReset`], and [`BlkError::Transport`]: also where single queues can't be reset. As long as the disk does
    /// not confirm, it keeps what it has.
    pub fn restart<T: Transport>(&mut self, transport: &mut T) -> Result<(), BlkError<T::Error>> {
        if let Some(status) = transport.needs_reset().map_err(BlkError::Transport)? {
            return Err(BlkError::NeedsReset { status });
        }
        transport.reset_queue(self.number).map_err(BlkError::Transport)?;
        let Self { ring, spare, finished, .. } = self;
        ring.ring.reset(|_, slot| {
            slot.loans.take_back();
            if slot.kind != Kind::Abandoned {
                let id = RequestId { slot: slot.number, generation: slot.generation };
                slot.number = spare.pop().expect("no more are kept than there are slots");
                finished.push_back(Completion { id, result: Err(RequestError::Lost) });
            }
        });
        ring.ring.disable_callbacks();
        transport.start_queue(self.number, &ring.layout).map_err(BlkError::Transport)
    }

    /// Gives up for lost whatever the device may still touch.
    pub(super) fn leak(&mut self) {
        self.ring.ring.records().for_each(|slot| slot.loans.leak());
        self.ring.leak();
        self.records.leak();
    }

    #[inline]
    pub(super) fn usable<E>(&self) -> Result<(), BlkError<E>> {
        self.ring.ring.poison().map_or(Ok(()), |error| Err(BlkError::Broken(error)))
    }

    /// Whether a transfer over one buffer can be as it is: whole sectors, in one piece, on the disk.
    #[inline(always)]
    fn is_usual(&self, sector: u64, len: usize) -> bool {
        // Enormous, where it is no whole number of sectors.
        let sectors = (len as u64).rotate_right(SECTOR.trailing_zeros());
        // Not 0, and no longer than a piece.
        sectors.wrapping_sub(1) < self.longest
            && self.geometry.sectors.checked_sub(sector).is_some_and(|left| sectors <= left)
    }

    /// What nearly every request is, without a detour: header, one buffer, status.
    #[inline(always)]
    fn put_usual<E>(
        &mut self,
        kind: Type,
        sector: u64,
        buffer: Buffer<'a>,
        access: Access,
    ) -> Result<RequestId, BlkError<E>> {
        let Self { ring, mapper, generation, .. } = self;
        let added = ring.ring.add_framed(|slot| {
            let loan = slot.loans.keep(Loan::map(*mapper, buffer, loans::permission(access))?);
            let data = loans::descriptor(loan, access);
            slot.record.write_transfer(kind, sector);
            let (before, after, table) = (slot.record.header(), slot.record.status(), slot.record.table());
            let framed = Framed { before: (before.addr, before.len), data, after: (after.addr, after.len), table };
            Ok::<_, DmaError>((framed, slot.begin(generation, Kind::Usual)))
        });
        match added? {
            Some(id) => Ok(id),
            None => Err(self.busy()),
        }
    }

    /// Any request, whatever there is to be said of it.
    #[inline(never)]
    fn put_any<E>(&mut self, request: Request<'_, 'a>) -> Result<RequestId, BlkError<E>> {
        self.usable()?;
        self.check(&request)?;
        let Some(token) = self.ring.ring.next_token() else { return Err(self.busy()) };
        self.lend(token, &request)?;
        let Self { ring: queue, chain, .. } = self;
        let Slot { record, loans, .. } = queue.ring.record(token);
        record.write(&request);

        chain.clear();
        chain.push(record.header());
        // A request has data or a payload, and not both.
        chain.extend(record.payload(&request));
        let reads = matches!(request, Request::Read { .. });
        chain.extend(loans.descriptors(if reads { Access::Write } else { Access::Read }));
        chain.push(record.status());

        // A table has the request take up one entry of the ring, so that more of them fit.
        let table = record.table();
        let added = queue.ring.add(chain, table);
        let slot = queue.ring.record(token);
        match added {
            Ok(_) => {
                let kind = if matches!(request, Request::Id) { Kind::Id } else { Kind::Plain };
                Ok(slot.begin(&mut self.generation, kind))
            }
            Err(error) => {
                slot.loans.take_back();
                Err(refused(error))
            }
        }
    }

    /// Why there is no token.
    #[cold]
    fn busy<E>(&self) -> BlkError<E> {
        self.ring.ring.poison().map_or(BlkError::Busy, BlkError::Broken)
    }

    fn check<E>(&self, request: &Request<'_, 'a>) -> Result<(), BlkError<E>> {
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
    fn lend<E>(&mut self, token: Token, request: &Request<'_, 'a>) -> Result<(), BlkError<E>> {
        let Limits { segments, piece } = self.limits;
        let (buffers, access) = match *request {
            Request::Read { into, .. } => (into, Access::Write),
            Request::Write { from, .. } => (from, Access::Read),
            _ => return Ok(()),
        };
        let (count, max) = (Loans::<M>::count(buffers, piece), usize::from(segments));
        if count > max {
            return Err(BlkError::TooLong { count: count as u64, max: max as u64 });
        }
        Ok(self.ring.ring.record(token).loans.lend(self.mapper, buffers, piece, access)?)
    }

    /// Takes the next used chain off the ring, and back what it had lent.
    #[inline]
    pub(super) fn reap<E>(&mut self) -> Result<Option<Completion>, BlkError<E>> {
        loop {
            let Some((used, slot)) = self.ring.ring.pop_used() else { return self.usable().map(|()| None) };
            let id = RequestId { slot: slot.number, generation: slot.generation };
            // What nearly every request is, and comes to.
            if slot.kind == Kind::Usual && used.written == used.writable && slot.record.is_ok() {
                slot.loans.take_one_back();
                return Ok(Some(Completion { id, result: Ok(Answer::Done) }));
            }
            slot.loans.take_back();
            if let Some(result) = slot.record.answer(slot.kind, used.written, used.writable) {
                if result == Ok(Answer::Id) {
                    self.name = slot.record.name();
                }
                return Ok(Some(Completion { id, result }));
            }
        }
    }

    /// What the disk last said when asked for its name.
    pub fn name(&self) -> [u8; 20] {
        self.name
    }

    /// Nobody hears yet of this request, which was reaped last. The ring has its slot to give away again, and so the slot
    /// gets another number: the request keeps its own until it is heard of.
    pub(super) fn set_aside(&mut self, completion: Completion) {
        let number = self.spare.pop().expect("no more are kept than there are slots");
        let slot = self.ring.ring.records().find(|slot| slot.number == completion.id.slot);
        slot.expect("it was just there").number = number;
        self.finished.push_back(completion);
    }

    /// Nobody will ever want to hear of this request.
    pub(super) fn abandon(&mut self, id: RequestId) {
        let named = |slot: &&mut Slot<'a, M>| (slot.number, slot.generation) == (id.slot, id.generation);
        if let Some(slot) = self.ring.ring.records().find(named) {
            slot.kind = Kind::Abandoned;
        }
    }
}

/// Why the ring did not take a chain that is within the limits.
#[cold]
fn refused<E>(error: AddError) -> BlkError<E> {
    match error {
        AddError::Full { .. } => BlkError::Busy,
        AddError::Poisoned(error) => BlkError::Broken(error),
        error => unreachable!("a chain within the limits: {error}"),
    }
}

impl<M: Mapper + ?Sized> Slot<'_, M> {
    #[inline]
    fn begin(&mut self, generation: &mut u64, kind: Kind) -> RequestId {
        (self.generation, self.kind) = (*generation, kind);
        // One a nanosecond lasts for centuries.
        *generation = generation.wrapping_add(1);
        RequestId { slot: self.number, generation: self.generation }
    }
}
