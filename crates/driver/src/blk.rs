//! The block device's driver (§5.2).

mod config;
mod queue;
mod record;

pub use queue::{Queue, QueueError};

use crate::{Host, Running, StartError, Transport, Wants, start};
use alloc::vec::Vec;
use config::{Limits, read_config};
use core::{fmt, mem};
use ringfence_dma::{Buffer, DmaError, Mapper};
use ringfence_ring::DeviceError;
use virtio_spec::blk::F;

/// The unit of positions and lengths, whatever the disk's block size.
pub const SECTOR: u64 = 512;

/// A disk.
///
/// [`read`](Self::read), [`write`](Self::write) and their like do one thing and wait for it.
/// [`submit`](Self::submit), [`notify`](Self::notify) and [`poll`](Self::poll) keep many requests under way; the two
/// ways mix. A disk with several queues is [`split`](Self::split) among as many threads. A running disk allocates nothing.
///
/// Each buffer is mapped when its request is made and unmapped when the request completes. A device that answers what it
/// must not stops the disk ([`BlkError::Broken`]); buffers that it still has stay lent until the disk is dropped, which
/// resets the device first.
#[derive(Debug)]
pub struct Blk<'a, T: Transport, M: Mapper + ?Sized> {
    device: Running<'a, T, M>,
    geometry: Geometry,
    /// The one that this type's own methods use.
    queue: Queue<'a, M>,
    /// The others.
    more: Vec<Queue<'a, M>>,
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

impl RequestId {
    /// For a table of the caller's own: below [`Queue::slots`], twice the queue's depth, and nobody else's before the
    /// request was polled.
    #[inline]
    pub fn slot(self) -> usize {
        self.slot.into()
    }
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
    /// It has said its name: [`Blk::name`].
    Id,
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
    /// The queue was [restarted](Blk::restart) before the device had answered: it may have been done, or not.
    Lost,
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
            RequestError::Lost => f.write_str("the queue was restarted before the disk had answered"),
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
    /// The disk says that it broke down (DEVICE_NEEDS_RESET), and no queue of it can be reset alone: start it anew.
    NeedsReset {
        /// Its status.
        status: u8,
    },
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
            BlkError::NeedsReset { status } => write!(f, "the disk broke down, and needs a reset (status {status:#x})"),
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

/// The queue that a disk's own methods use.
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
        Self::start_queues(transport, host, options, 1)
    }

    /// Brings a disk up with `count` queues, each as `options` says.
    ///
    /// # Errors
    /// As [`Self::start`]; [`StartError::NoQueue`] where the disk has fewer.
    ///
    /// # Panics
    /// As [`Self::start`], and for no queue at all.
    pub fn start_queues(
        transport: T,
        host: Host<'a, M>,
        options: Options,
        count: u16,
    ) -> Result<Self, StartError<T::Error>> {
        assert!(count > 0, "a disk without a queue");
        let many = if count > 1 { bits(F::MQ) } else { 0 };
        let wants = Wants { device: BLOCK_DEVICE, features: FEATURES | many, queues: count, depth: options.depth };
        let (device, (geometry, said)) = start(transport, host, wants, |transport, features| {
            // §5.2.2: without the feature there is one queue.
            if features & many != many {
                return Err(StartError::NoQueue { queue: 1 });
            }
            read_config(transport, features)
        })?;
        let mut device = device;
        let mapper = device.mapper;
        let piece = said.piece.min(mapper.max_len()).min(Limits::BYTES as usize).max(1);
        // The device was not told of these: should one fail, it is reset before its rings go.
        let prepare = |ring: &crate::queue::Queue<'a, M>| {
            let depth = ring.ring.size();
            // A chain, in a table or not, has at most as many descriptors as the queue, and two are header and status.
            let segments = said.segments.min(options.segments).min(depth.saturating_sub(2));
            if segments == 0 {
                return Err(StartError::Config { field: "queue_size", value: depth.into() });
            }
            let limits = Limits { segments, piece };
            Ok((Queue::records(mapper, ring, limits)?, limits))
        };
        let prepared = device.queues.iter().map(prepare).collect::<Result<Vec<_>, _>>()?;
        let rings = mem::take(&mut device.queues).into_iter().zip(prepared);
        let mut queues = (QUEUE..)
            .zip(rings)
            .map(|(number, (ring, (records, limits)))| Queue::new(number, mapper, ring, records, geometry, limits));
        let queue = queues.next().expect("one at least was wanted");
        let more = queues.collect();
        Ok(Self { device, geometry, queue, more })
    }

    /// The way to the device and the queues, for as many threads.
    pub fn split(&mut self) -> (&mut T, Vec<&mut Queue<'a, M>>) {
        let Self { device, queue, more, .. } = self;
        (&mut device.transport, core::iter::once(queue).chain(more).collect())
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

    /// Fills `into` from `sector` on. A disk that says so and has not leaves in the buffers what was there: who hands on what
    /// was read to somebody else clears them before, or has them bounced.
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
        self.wait_for(Request::Id)?;
        Ok(self.name())
    }

    /// The disk's name as it last said it, padded with zeroes (§5.2.6); all zeroes where it was not asked.
    pub fn name(&self) -> [u8; 20] {
        self.queue.name()
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
    #[inline]
    pub fn submit(&mut self, request: Request<'_, 'a>) -> Result<RequestId, BlkError<T::Error>> {
        self.queue.put_if_room(request)
    }

    /// Puts a request on its way and tells the device, if it wants to be told: [`submit`](Self::submit) and
    /// [`notify`](Self::notify) of one request, for less.
    ///
    /// # Errors
    /// Those of the two. After [`BlkError::Transport`] the request is on its way, and the device may come to it.
    #[inline]
    pub fn send(&mut self, request: Request<'_, 'a>) -> Result<RequestId, BlkError<T::Error>> {
        let id = self.submit(request)?;
        if self.queue.tell() {
            self.device.transport.notify(QUEUE).map_err(BlkError::Transport)?;
        }
        Ok(id)
    }

    /// Tells the device of what was submitted, if it wants to be told.
    ///
    /// # Errors
    /// [`BlkError::Transport`] and [`BlkError::Broken`].
    #[inline(always)]
    pub fn notify(&mut self) -> Result<(), BlkError<T::Error>> {
        match self.queue.needs_kick()? {
            true => self.device.transport.notify(QUEUE).map_err(BlkError::Transport),
            false => Ok(()),
        }
    }

    /// A request that has come to its end, if there is one. Does not wait.
    ///
    /// # Errors
    /// [`BlkError::Broken`].
    #[inline]
    pub fn poll(&mut self) -> Result<Option<Completion>, BlkError<T::Error>> {
        self.queue.next()
    }

    /// Waits until [`poll`](Self::poll) may have something.
    ///
    /// # Errors
    /// Those of [`Transport::wait`].
    pub fn wait(&mut self) -> Result<(), BlkError<T::Error>> {
        self.usable()?;
        if self.queue.keeps_some() { Ok(()) } else { self.rest() }
    }

    /// Asks the device to tell of the next request that comes to its end, for who sleeps until an interrupt. `true`: one
    /// has already, so [`poll`](Self::poll) instead of sleeping. What was asked for lasts until [`wait`](Self::wait) or
    /// a request that is waited for.
    ///
    /// # Errors
    /// [`BlkError::Broken`].
    pub fn listen(&mut self) -> Result<bool, BlkError<T::Error>> {
        self.usable()?;
        let listening = self.queue.listen_for()?;
        Ok(listening || self.queue.keeps_some())
    }

    /// Resets each queue alone, and has them go on: a disk that is [`Broken`](BlkError::Broken), or that keeps a buffer
    /// for too long, need not be given up. What was lent is back when this returns. Requests that were under way are
    /// polled as [`RequestError::Lost`]. Of several queues one can be [restarted](Queue::restart) by itself.
    ///
    /// # Errors
    /// [`BlkError::NotOffered`] where the device or the transport does not reset single queues,
    /// [`BlkError::NeedsReset`], and [`BlkError::Transport`]: as long as the disk does not confirm, it keeps what it has, and
    /// queues that come after that one are as they were.
    pub fn restart(&mut self) -> Result<(), BlkError<T::Error>> {
        let Self { device, queue, more, .. } = self;
        if !device.resets_queues() {
            return Err(BlkError::NotOffered);
        }
        core::iter::once(queue).chain(more).try_for_each(|queue| queue.restart(&mut device.transport))
    }

    /// Asks for a notification and waits, unless the device has used something already.
    fn rest(&mut self) -> Result<(), BlkError<T::Error>> {
        let waited = match self.queue.listen_for()? {
            true => Ok(()),
            false => self.device.transport.wait(QUEUE),
        };
        self.queue.ignore();
        waited.map_err(BlkError::Transport)
    }

    fn wait_for(&mut self, request: Request<'_, 'a>) -> Result<Answer, BlkError<T::Error>> {
        let id = loop {
            match self.queue.put(request) {
                Ok(id) => break id,
                // What is under way may have to end before there is room. Nothing ends that nobody polls.
                Err(error) if error.is_temporary() && self.queue.under_way() > 0 => {
                    self.notify()?;
                    self.set_aside(None)?;
                }
                Err(error) => return Err(error),
            }
        };
        let answer = self.notify().and_then(|()| {
            loop {
                if let Some(result) = self.set_aside(Some(id))? {
                    return Ok(result?);
                }
            }
        });
        // Nobody else knows of it.
        answer.inspect_err(|_| self.queue.abandon(id))
    }

    /// Keeps a completion, if there is a new one, for whoever asked for it; else waits a while. `Some`: it was `wanted`.
    fn set_aside(
        &mut self,
        wanted: Option<RequestId>,
    ) -> Result<Option<Result<Answer, RequestError>>, BlkError<T::Error>> {
        match self.queue.reap()? {
            Some(completion) if Some(completion.id) == wanted => return Ok(Some(completion.result)),
            Some(completion) => self.queue.set_aside(completion),
            None => self.rest()?,
        }
        Ok(None)
    }

    fn usable(&self) -> Result<(), BlkError<T::Error>> {
        self.queue.usable()
    }
}

impl<T: Transport, M: Mapper + ?Sized> Drop for Blk<'_, T, M> {
    fn drop(&mut self) {
        if self.device.stop().is_lost() {
            // The device may still touch what it was lent: nobody else may ever get that memory.
            self.queue.leak();
            self.more.iter_mut().for_each(Queue::leak);
        }
    }
}
