//! The block device's driver (§5.2).

use crate::queue::{Piece, Pieces};
use crate::{Host, Running, StartError, Transport, Wants, start};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::{fmt, mem};
use ringfence_dma::{Access, Buffer, BusAddr, DmaError, FromDevice, Mapper, Streaming, ToDevice};
use ringfence_ring::{AddError, Descriptor, DeviceError, Indirect, IndirectTable};
use virtio_spec::blk::{F, S, T as Type};

/// The unit of positions and lengths, whatever the disk's block size.
pub const SECTOR: u64 = 512;

/// A disk.
///
/// [`read`](Self::read), [`write`](Self::write) and their like do one thing and wait for it.
/// [`submit`](Self::submit), [`notify`](Self::notify) and [`poll`](Self::poll) keep many requests under way; the two
/// ways mix. A running disk allocates nothing.
///
/// Each buffer is mapped when its request is made and unmapped when the request completes. A device that answers what it
/// must not stops the disk ([`BlkError::Broken`]); buffers that it still has stay lent until the disk is dropped, which
/// resets the device first.
#[derive(Debug)]
pub struct Blk<'a, T: Transport, M: Mapper + ?Sized> {
    device: Running<'a, T, M>,
    geometry: Geometry,
    limits: Limits,
    slots: Vec<Slot<'a, M>>,
    /// Slots that no request has.
    free: Vec<u16>,
    /// By the ring's token: whose slot it is.
    by_token: Vec<u16>,
    /// Each slot's header, payload and status, and table of descriptors; see [`Record`].
    records: Pieces<'a, M>,
    /// Completed while somebody waited for another request, and not handed out yet. Their slots are not free.
    finished: VecDeque<Completion>,
    /// For putting a chain together.
    chain: Vec<Descriptor>,
}

/// What a disk is like, as its configuration space says (§5.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// How many sectors.
    pub sectors: u64,
    /// The block size that the disk likes best, in bytes: a power of two, 512 or more.
    pub block_size: u32,
    /// Writes are not possible.
    pub read_only: bool,
    /// Writes may be cached by the device until a flush. Else they are durable when they complete.
    pub cached: bool,
    /// How many sectors a discard may cover, if there is one.
    pub discard: Option<u32>,
    /// How many sectors a write-zeroes may cover, if there is one.
    pub write_zeroes: Option<u32>,
}

/// What a disk is asked to be like.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How many descriptors its queue should have: a power of two.
    pub depth: u16,
    /// How many pieces of memory one request may be scattered over.
    pub segments: u16,
}

impl Default for Options {
    /// 128 descriptors, and requests of up to 64 pieces.
    fn default() -> Self {
        Self { depth: 128, segments: 64 }
    }
}

/// Something to ask a disk for. Positions are in sectors; buffers together are whole sectors.
#[derive(Clone, Copy, Debug)]
pub enum Request<'r, 'a> {
    /// Fill the buffers.
    Read {
        /// The first sector.
        sector: u64,
        /// Where the bytes go.
        into: &'r [Buffer<'a>],
    },
    /// Store what is in the buffers.
    Write {
        /// The first sector.
        sector: u64,
        /// Where the bytes come from.
        from: &'r [Buffer<'a>],
    },
    /// Make durable what was written.
    Flush,
    /// Say its name.
    Id,
    /// Forget what is there; what reads afterwards is undefined.
    Discard {
        /// The first sector.
        sector: u64,
        /// How many.
        sectors: u32,
    },
    /// Have it read as zeroes.
    WriteZeroes {
        /// The first sector.
        sector: u64,
        /// How many.
        sectors: u32,
        /// Whether the space may be given up for it.
        unmap: Unmap,
    },
}

/// Whether write-zeroes may give up the space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmap {
    /// Keep it.
    No,
    /// It may go.
    Yes,
}

/// Names a request that is under way. Never names another one later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId {
    slot: u16,
    generation: u64,
}

/// A request that came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Which.
    pub id: RequestId,
    /// How.
    pub result: Result<Answer, RequestError>,
}

/// What a disk answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is done.
    Done,
    /// Its name, padded with zeroes (§5.2.6).
    Id([u8; 20]),
}

/// How a request failed at the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestError {
    /// The device says that it failed (VIRTIO_BLK_S_IOERR): its storage, or its access to the buffers.
    Io,
    /// The device says that it can't (VIRTIO_BLK_S_UNSUPP).
    Unsupported,
    /// The device says nothing, or what no device may say.
    Status(u8),
    /// The device says that all went well and that it wrote less than that takes.
    Short {
        /// Bytes written, by its own account.
        written: u32,
        /// Bytes expected, status included.
        expected: u32,
    },
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RequestError::Io => f.write_str("the disk reports an I/O error"),
            RequestError::Unsupported => f.write_str("the disk does not support the request"),
            RequestError::Status(status) => write!(f, "the disk left status {status:#x}, which means nothing"),
            RequestError::Short { written, expected } => {
                write!(f, "the disk reports success and {written} bytes written instead of {expected}")
            }
        }
    }
}

impl core::error::Error for RequestError {}

/// Why a disk did not do as asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlkError<E> {
    /// As many requests as possible are under way or wait to be polled.
    Busy,
    /// A buffer can't be lent to the device; see [`DmaError::is_transient`].
    Dma(DmaError),
    /// The request goes beyond the end of the disk.
    OutOfRange {
        /// The first sector.
        sector: u64,
        /// How many.
        sectors: u64,
    },
    /// The buffers are no whole number of sectors, or have no bytes at all.
    Length {
        /// Bytes in all.
        len: u64,
    },
    /// More than the disk takes in one request: split it.
    TooLong {
        /// How much: pieces of memory, bytes or sectors.
        count: u64,
        /// The limit.
        max: u64,
    },
    /// The disk is read-only.
    ReadOnly,
    /// The disk does not offer that.
    NotOffered,
    /// The request failed at the device.
    Failed(RequestError),
    /// The device broke the rules of rings; the disk is of no use any more.
    Broken(DeviceError),
    /// The way to the device failed.
    Transport(E),
}

impl<E: fmt::Display> fmt::Display for BlkError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BlkError::Busy => f.write_str("too many requests are under way"),
            BlkError::Dma(error) => write!(f, "a buffer can't be lent to the disk: {error}"),
            BlkError::OutOfRange { sector, sectors } => {
                write!(f, "{sectors} sectors from {sector} go beyond the disk's end")
            }
            BlkError::Length { len } => write!(f, "{len} bytes are no whole sectors"),
            BlkError::TooLong { count, max } => write!(f, "{count} is more than the {max} that one request may have"),
            BlkError::ReadOnly => f.write_str("the disk is read-only"),
            BlkError::NotOffered => f.write_str("the disk does not offer that"),
            BlkError::Failed(error) => error.fmt(f),
            BlkError::Broken(error) => write!(f, "the disk broke the rules: {error}"),
            BlkError::Transport(error) => write!(f, "the disk can't be reached: {error}"),
        }
    }
}

impl<E: core::error::Error> core::error::Error for BlkError<E> {}

impl<E> BlkError<E> {
    /// Whether it may work once a request that is under way has come to its end.
    pub fn is_temporary(&self) -> bool {
        match self {
            BlkError::Busy => true,
            BlkError::Dma(error) => error.is_transient(),
            _ => false,
        }
    }
}

impl<E> From<DmaError> for BlkError<E> {
    fn from(error: DmaError) -> Self {
        BlkError::Dma(error)
    }
}

impl<E> From<RequestError> for BlkError<E> {
    fn from(error: RequestError) -> Self {
        BlkError::Failed(error)
    }
}

/// The virtio device type (§5).
const BLOCK_DEVICE: u32 = 2;

/// The disk's only queue.
const QUEUE: u16 = 0;

const fn bits(feature: F) -> u64 {
    feature.bits().to_ne() as u64
}

/// What this file implements; a bit that it merely knows has no place here.
const FEATURES: u64 = bits(F::SIZE_MAX)
    | bits(F::SEG_MAX)
    | bits(F::RO)
    | bits(F::BLK_SIZE)
    | bits(F::FLUSH)
    | bits(F::DISCARD)
    | bits(F::WRITE_ZEROES);

impl<'a, T: Transport, M: Mapper + ?Sized> Blk<'a, T, M> {
    /// Brings a disk up.
    ///
    /// # Errors
    /// Those of [`start`](crate::start()), and [`StartError::Config`] for a disk that can't be as it says.
    ///
    /// # Panics
    /// Where [`Options::depth`] is no power of two.
    pub fn start(transport: T, host: Host<'a, M>, options: Options) -> Result<Self, StartError<T::Error>> {
        let wants = Wants { device: BLOCK_DEVICE, features: FEATURES, queues: 1, depth: options.depth };
        let (device, (geometry, said)) = start(transport, host, wants, read_config)?;
        let depth = device.queues[0].ring.size();
        // A chain, in a table or not, has at most as many descriptors as the queue, and two are header and status.
        let limits = Limits { segments: said.segments.min(options.segments).min(depth.saturating_sub(2)), ..said };
        if limits.segments == 0 {
            return Err(StartError::Config { field: "queue_size", value: depth.into() });
        }
        let table = match device.queues[0].indirect {
            Indirect::Allowed => Record::DESCRIPTOR * (usize::from(limits.segments) + 2),
            Indirect::Refused => 0,
        };
        // As many as the ring takes, and the one that is kept for who waits; see `submit`.
        let count = depth + 1;
        let records = Pieces::allocate(device.mapper, count, Record::LEN + table)?;
        Ok(Self {
            device,
            geometry,
            limits,
            slots: (0..count).map(|_| Slot::new(limits.segments)).collect(),
            free: (0..count).rev().collect(),
            by_token: alloc::vec![0; depth.into()],
            records,
            finished: VecDeque::with_capacity(count.into()),
            chain: Vec::with_capacity(usize::from(limits.segments) + 2),
        })
    }

    /// What the disk is like.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The device below.
    pub fn device(&self) -> &Running<'a, T, M> {
        &self.device
    }

    /// The device below.
    pub fn device_mut(&mut self) -> &mut Running<'a, T, M> {
        &mut self.device
    }

    /// Fills `into` from `sector` on.
    ///
    /// # Errors
    /// Any [`BlkError`]. The buffers' content is undefined then.
    pub fn read(&mut self, sector: u64, into: &[Buffer<'a>]) -> Result<(), BlkError<T::Error>> {
        self.wait_for(Request::Read { sector, into }).map(drop)
    }

    /// Stores `from` from `sector` on. Durable after a [`flush`](Self::flush).
    ///
    /// # Errors
    /// Any [`BlkError`]. Any part may have been stored then.
    pub fn write(&mut self, sector: u64, from: &[Buffer<'a>]) -> Result<(), BlkError<T::Error>> {
        self.wait_for(Request::Write { sector, from }).map(drop)
    }

    /// Makes durable what was written by requests that have completed.
    ///
    /// # Errors
    /// Any [`BlkError`]. Nothing is known to be durable then.
    pub fn flush(&mut self) -> Result<(), BlkError<T::Error>> {
        match self.geometry.cached {
            true => self.wait_for(Request::Flush).map(drop),
            // §5.2.5.2: each write was durable when it completed.
            false => self.usable(),
        }
    }

    /// The disk's name.
    ///
    /// # Errors
    /// Any [`BlkError`].
    pub fn id(&mut self) -> Result<[u8; 20], BlkError<T::Error>> {
        match self.wait_for(Request::Id)? {
            Answer::Id(id) => Ok(id),
            Answer::Done => unreachable!("`Record::answer` gives a name for `Request::Id`"),
        }
    }

    /// Forgets what is in `sectors` sectors from `sector` on.
    ///
    /// # Errors
    /// Any [`BlkError`].
    pub fn discard(&mut self, sector: u64, sectors: u32) -> Result<(), BlkError<T::Error>> {
        self.wait_for(Request::Discard { sector, sectors }).map(drop)
    }

    /// Has `sectors` sectors from `sector` on read as zeroes.
    ///
    /// # Errors
    /// Any [`BlkError`].
    pub fn write_zeroes(&mut self, sector: u64, sectors: u32, unmap: Unmap) -> Result<(), BlkError<T::Error>> {
        self.wait_for(Request::WriteZeroes { sector, sectors, unmap }).map(drop)
    }

    /// Puts a request on its way. The device need not see it before [`notify`](Self::notify), so a batch needs one.
    ///
    /// # Errors
    /// Any [`BlkError`] but [`BlkError::Failed`]; nothing was put on its way then.
    pub fn submit(&mut self, request: Request<'_, 'a>) -> Result<RequestId, BlkError<T::Error>> {
        // Completions that nobody polls keep their slots. One slot is left for who waits, and does not poll others'.
        match self.free.len() {
            0 | 1 => self.usable().and(Err(BlkError::Busy)),
            _ => self.put(request),
        }
    }

    fn put(&mut self, request: Request<'_, 'a>) -> Result<RequestId, BlkError<T::Error>> {
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

    /// Tells the device of what was submitted, if it wants to be told.
    ///
    /// # Errors
    /// [`BlkError::Transport`] and [`BlkError::Broken`].
    pub fn notify(&mut self) -> Result<(), BlkError<T::Error>> {
        self.usable()?;
        match self.device.queues[0].ring.needs_kick() {
            true => self.device.transport.notify(QUEUE).map_err(BlkError::Transport),
            false => Ok(()),
        }
    }

    /// A request that has come to its end, if there is one. Does not wait.
    ///
    /// # Errors
    /// [`BlkError::Broken`].
    pub fn poll(&mut self) -> Result<Option<Completion>, BlkError<T::Error>> {
        let completion = match self.finished.pop_front() {
            Some(completion) => Some(completion),
            None => self.reap()?,
        };
        if let Some(completion) = &completion {
            self.free.push(completion.id.slot);
        }
        Ok(completion)
    }

    /// Waits until [`poll`](Self::poll) may have something.
    ///
    /// # Errors
    /// Those of [`Transport::wait`].
    pub fn wait(&mut self) -> Result<(), BlkError<T::Error>> {
        self.usable()?;
        if self.finished.is_empty() { self.rest() } else { Ok(()) }
    }

    /// Asks the device to tell of the next request that comes to its end, for who sleeps until an interrupt. `true`: one
    /// has already, so [`poll`](Self::poll) instead of sleeping. What was asked for lasts until [`wait`](Self::wait) or
    /// a request that is waited for.
    ///
    /// # Errors
    /// [`BlkError::Broken`].
    pub fn listen(&mut self) -> Result<bool, BlkError<T::Error>> {
        self.usable()?;
        let listening = self.device.queues[0].ring.enable_callbacks().map_err(BlkError::Broken)?;
        Ok(listening || !self.finished.is_empty())
    }

    /// Asks for a notification and waits, unless the device has used something already.
    fn rest(&mut self) -> Result<(), BlkError<T::Error>> {
        let ring = &mut self.device.queues[0].ring;
        let waited = match ring.enable_callbacks().map_err(BlkError::Broken)? {
            true => Ok(()),
            false => self.device.transport.wait(QUEUE),
        };
        self.device.queues[0].ring.disable_callbacks();
        waited.map_err(BlkError::Transport)
    }

    fn wait_for(&mut self, request: Request<'_, 'a>) -> Result<Answer, BlkError<T::Error>> {
        let id = loop {
            match self.put(request) {
                Ok(id) => break id,
                // What is under way may have to end before there is room. Nothing ends that nobody polls.
                Err(error) if self.is_temporary(&error) => {
                    self.notify()?;
                    self.set_aside()?;
                }
                Err(error) => return Err(error),
            }
        };
        self.notify()?;
        loop {
            if let Some(at) = self.finished.iter().position(|completion| completion.id == id) {
                let completion = self.finished.remove(at).expect("just found there");
                self.free.push(id.slot);
                return Ok(completion.result?);
            }
            self.set_aside()?;
        }
    }

    /// Whether the request may go through once another one has come to its end, and there is one to wait for.
    fn is_temporary(&self, error: &BlkError<T::Error>) -> bool {
        let under_way = self.slots.len() - self.free.len() - self.finished.len();
        let full = match error {
            BlkError::Busy => true,
            BlkError::Dma(error) => error.is_transient(),
            _ => false,
        };
        full && under_way > 0
    }

    /// Keeps a completion, if there is a new one, for whoever asked for it; else waits a while.
    fn set_aside(&mut self) -> Result<(), BlkError<T::Error>> {
        match self.reap()? {
            Some(completion) => {
                self.finished.push_back(completion);
                Ok(())
            }
            None => self.rest(),
        }
    }

    fn usable(&self) -> Result<(), BlkError<T::Error>> {
        self.device.queues[0].ring.poison().map_or(Ok(()), |error| Err(BlkError::Broken(error)))
    }

    fn check(&self, request: &Request<'_, 'a>) -> Result<(), BlkError<T::Error>> {
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
    fn map(&mut self, slot: u16, request: &Request<'_, 'a>) -> Result<(), BlkError<T::Error>> {
        let mapper = self.device.mapper;
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
    fn offer(&mut self, slot: u16, request: &Request<'_, 'a>) -> Result<u32, BlkError<T::Error>> {
        let Self { device, slots, by_token, records, chain, .. } = self;
        let record = Record(records.get(slot));
        record.write(request);

        chain.clear();
        chain.push(record.header());
        let payload = record.payload(request);
        chain.extend(payload.filter(|payload| payload.access == Access::Read));
        chain.extend(slots[usize::from(slot)].segments.iter().map(Segment::descriptor));
        chain.extend(payload.filter(|payload| payload.access == Access::Write));
        chain.push(record.status());
        let expected = chain.iter().filter(|part| part.access == Access::Write).map(|part| part.len).sum();

        let queue = &mut device.queues[0];
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
    fn reap(&mut self) -> Result<Option<Completion>, BlkError<T::Error>> {
        let used = self.device.queues[0].ring.take_used().map_err(BlkError::Broken)?;
        let Some(used) = used else { return Ok(None) };
        let slot = self.by_token[used.token.index()];
        let (id, kind, expected) = self.slots[usize::from(slot)].end(slot);
        let result = Record(self.records.get(slot)).answer(kind, used.written, expected);
        Ok(Some(Completion { id, result }))
    }
}

impl<T: Transport, M: Mapper + ?Sized> Drop for Blk<'_, T, M> {
    fn drop(&mut self) {
        if self.device.stop().is_lost() {
            // The device may still touch what it was lent: nobody else may ever get that memory.
            mem::forget(mem::take(&mut self.slots));
            self.records.leak();
        }
    }
}

/// How much one request may have.
#[derive(Clone, Copy, Debug)]
struct Limits {
    segments: u16,
    /// Bytes in one piece of memory.
    piece: usize,
}

impl Limits {
    /// A chain's length is counted in 32 bits (§2.7.8, §2.8.7); this leaves room for header and status.
    const BYTES: u64 = u32::MAX as u64 - 4096;
}

/// Reads the configuration space, and believes what can be.
fn read_config<T: Transport>(transport: &mut T, features: u64) -> Result<(Geometry, Limits), StartError<T::Error>> {
    let config = Config::read(transport)?;
    let taken = |feature| features & bits(feature) != 0;
    let sectors = config.u64(0);
    // A byte's position has to have a number too.
    if sectors > u64::MAX / SECTOR {
        return Err(StartError::Config { field: "capacity", value: sectors });
    }
    let block_size = if taken(F::BLK_SIZE) { config.u32(20) } else { SECTOR as u32 };
    if !block_size.is_power_of_two() || u64::from(block_size) < SECTOR {
        return Err(StartError::Config { field: "blk_size", value: block_size.into() });
    }
    let piece = if taken(F::SIZE_MAX) { config.u32(8) } else { u32::MAX };
    if piece == 0 {
        return Err(StartError::Config { field: "size_max", value: 0 });
    }
    let segments = if taken(F::SEG_MAX) { config.u32(12) } else { u32::MAX };
    if segments == 0 {
        return Err(StartError::Config { field: "seg_max", value: 0 });
    }
    let geometry = Geometry {
        sectors,
        block_size,
        read_only: taken(F::RO),
        cached: taken(F::FLUSH),
        discard: taken(F::DISCARD).then(|| config.u32(36)),
        write_zeroes: taken(F::WRITE_ZEROES).then(|| config.u32(48)),
    };
    let segments = u16::try_from(segments).unwrap_or(u16::MAX);
    Ok((geometry, Limits { segments, piece: piece as usize }))
}

/// The part of the configuration space that is read (§5.2.4), at one moment.
struct Config([u8; Config::LEN]);

impl Config {
    const LEN: usize = 56;

    /// A device that changes its configuration all the time is not waited for longer than this.
    const TRIES: u32 = 100;

    fn read<T: Transport>(transport: &mut T) -> Result<Self, StartError<T::Error>> {
        let mut bytes = [0; Self::LEN];
        let mut generation = transport.config_generation().map_err(StartError::Transport)?;
        for _ in 0..Self::TRIES {
            transport.read_config(0, &mut bytes).map_err(StartError::Transport)?;
            let now = transport.config_generation().map_err(StartError::Transport)?;
            if now == generation {
                return Ok(Self(bytes));
            }
            generation = now;
        }
        Err(StartError::Config { field: "config_generation", value: generation.into() })
    }

    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.0[offset..offset + 4].try_into().expect("four bytes"))
    }

    fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.0[offset..offset + 8].try_into().expect("eight bytes"))
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

    fn begin(&mut self, slot: u16, request: &Request<'_, '_>, expected: u32) -> RequestId {
        self.kind = if matches!(request, Request::Id) { Kind::Id } else { Kind::Plain };
        self.expected = expected;
        RequestId { slot, generation: self.generation }
    }

    /// Takes back what was lent: whatever the device wrote is in the buffers afterwards.
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

    fn write(&self, request: &Request<'_, '_>) {
        let (kind, at) = match *request {
            Request::Read { sector, .. } => (Type::In, sector),
            Request::Write { sector, .. } => (Type::Out, sector),
            Request::Flush => (Type::Flush, 0),
            Request::Id => (Type::GetId, 0),
            Request::Discard { .. } => (Type::Discard, 0),
            Request::WriteZeroes { .. } => (Type::WriteZeroes, 0),
        };
        let mut header = [0; 16];
        header[..4].copy_from_slice(&u32::from(kind).to_le_bytes());
        header[8..].copy_from_slice(&at.to_le_bytes());
        self.0.memory.write(0, &header);

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
        self.0.memory.write(Self::STATUS, &[Self::NO_STATUS]);
    }

    fn header(&self) -> Descriptor {
        self.part(0, 16, Access::Read)
    }

    fn payload(&self, request: &Request<'_, '_>) -> Option<Descriptor> {
        match request {
            Request::Discard { .. } | Request::WriteZeroes { .. } => Some(self.part(Self::PAYLOAD, 16, Access::Read)),
            Request::Id => Some(self.part(Self::PAYLOAD, 20, Access::Write)),
            Request::Read { .. } | Request::Write { .. } | Request::Flush => None,
        }
    }

    fn status(&self) -> Descriptor {
        self.part(Self::STATUS, 1, Access::Write)
    }

    fn part(&self, offset: usize, len: u32, access: Access) -> Descriptor {
        Descriptor { addr: BusAddr(self.0.addr.0 + offset as u64), len, access }
    }

    fn table(&self) -> IndirectTable<'a> {
        let memory = self.0.memory.sub(Self::LEN, self.0.memory.len() - Self::LEN);
        IndirectTable { memory, addr: BusAddr(self.0.addr.0 + Self::LEN as u64) }
    }

    /// What the device answered, who says that it wrote `written` bytes of `expected`.
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
