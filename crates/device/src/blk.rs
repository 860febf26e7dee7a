//! The block device (§5.2).

use crate::storage::{Came, Durability, Operation, Started, Storage, StorageQueue};
use crate::{Back, Device, Handler, Outcome, Pieces, Request, Token, Unreachable};
use ringfence_dma::DetachedSlice;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use virtio_spec::blk::{F, T};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, little_endian as le};

/// The unit of all positions and sizes in requests and in the configuration space, whatever the block size.
pub const SECTOR: u64 = 512;

/// A discard or write-zeroes request may cover this much; a longer range comes as several requests.
const MAX_ERASE_SECTORS: u32 = 1 << 22;

/// What most drivers set a queue up with. Two descriptors of a chain are header and status; the rest may be segments, and
/// no chain is longer than its queue (§2.7.5.3.1).
const USUAL_QUEUE: u16 = 128;

/// A virtio block device over any [`Storage`].
pub struct Blk {
    storage: Arc<dyn Storage>,
    options: Options,
}

/// What a [`Blk`] is told by its operator.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many queues, 1 or more. More than one offers VIRTIO_BLK_F_MQ.
    pub queues: u16,
    /// The longest queue that a driver may set up; `seg_max` fits it, and the usual 128.
    pub queue_size: u16,
    /// What VIRTIO_BLK_T_GET_ID answers: at most 20 bytes of it.
    pub serial: String,
}

impl Blk {
    /// A disk of `storage`'s content.
    pub fn new(storage: Arc<dyn Storage>, options: Options) -> Self {
        assert!(options.queues > 0, "a disk without a queue");
        Self { storage, options }
    }

    /// `virtio_blk_config` (§5.2.4).
    fn layout(&self) -> Config {
        let geometry = self.storage.geometry();
        let block = geometry.block_size;
        let erasable = |supported: bool, value: u32| if supported { value.into() } else { 0.into() };
        Config {
            capacity: (geometry.capacity / SECTOR).into(),
            size_max: 0.into(),
            seg_max: u32::from(self.options.queue_size.clamp(3, USUAL_QUEUE) - 2).into(),
            geometry: [0; 4],
            blk_size: block.into(),
            topology: [0; 8],
            writeback: 1,
            unused0: 0,
            num_queues: self.options.queues.into(),
            max_discard_sectors: erasable(geometry.discard, MAX_ERASE_SECTORS),
            max_discard_seg: erasable(geometry.discard, 1),
            discard_sector_alignment: erasable(geometry.discard, block / SECTOR as u32),
            max_write_zeroes_sectors: erasable(geometry.write_zeroes, MAX_ERASE_SECTORS),
            max_write_zeroes_seg: erasable(geometry.write_zeroes, 1),
            write_zeroes_may_unmap: geometry.write_zeroes.into(),
            unused1: [0; 3],
        }
    }
}

impl Device for Blk {
    fn name(&self) -> &'static str {
        "blk"
    }

    fn id(&self) -> u16 {
        2
    }

    fn features(&self) -> u64 {
        let geometry = self.storage.geometry();
        let mut features = F::SEG_MAX | F::BLK_SIZE | F::FLUSH;
        features.set(F::MQ, self.options.queues > 1);
        features.set(F::RO, geometry.read_only);
        features.set(F::DISCARD, geometry.discard && !geometry.read_only);
        features.set(F::WRITE_ZEROES, geometry.write_zeroes && !geometry.read_only);
        low_bits(features)
    }

    fn queues(&self) -> u16 {
        self.options.queues
    }

    fn config(&self) -> Vec<u8> {
        self.layout().as_bytes().to_vec()
    }

    fn open_queue(self: Arc<Self>, _index: u16, depth: u16, features: u64) -> io::Result<Box<dyn Handler>> {
        let geometry = self.storage.geometry();
        // §5.2.5.2: a driver that did not take FLUSH has no way to ask for durability, so each write has it.
        let durability = if features & low_bits(F::FLUSH) == 0 { Durability::Durable } else { Durability::Cached };
        Ok(Box::new(BlkQueue {
            storage: self.storage.open_queue(depth)?,
            capacity: geometry.capacity,
            read_only: geometry.read_only,
            durability,
            pending: vec![Pending::default(); usize::from(depth)],
            data: Vec::new(),
            id: id_bytes(&self.options.serial),
        }))
    }
}

/// The bits below 64: all that a block device has.
fn low_bits(features: F) -> u64 {
    features.bits().to_ne() as u64
}

/// §5.2.6.1: 20 bytes, padded with NUL and not terminated when full.
fn id_bytes(serial: &str) -> [u8; 20] {
    let mut id = [0; 20];
    for (to, from) in id.iter_mut().zip(serial.bytes()) {
        *to = from;
    }
    id
}

/// `struct virtio_blk_config` up to the fields that the offered features define. The `virtio-spec` crate's has a
/// `num_queues` of one byte, which makes it unfit for more than 255 queues.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    capacity: le::U64,
    size_max: le::U32,
    seg_max: le::U32,
    geometry: [u8; 4],
    blk_size: le::U32,
    topology: [u8; 8],
    writeback: u8,
    unused0: u8,
    num_queues: le::U16,
    max_discard_sectors: le::U32,
    max_discard_seg: le::U32,
    discard_sector_alignment: le::U32,
    max_write_zeroes_sectors: le::U32,
    max_write_zeroes_seg: le::U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

/// What every request begins with (§5.2.6).
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Header {
    kind: le::U32,
    reserved: le::U32,
    sector: le::U64,
}

const HEADER: u32 = size_of::<Header>() as u32;

/// `struct virtio_blk_discard_write_zeroes` (§5.2.6).
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Segment {
    sector: le::U64,
    num_sectors: le::U32,
    flags: le::U32,
}

const SEGMENT: u32 = size_of::<Segment>() as u32;
const SEGMENT_UNMAP: u32 = 1;

/// The last byte of every request's writable part (§5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// How a request ended: its status and how many bytes of data were written before it.
#[derive(Clone, Copy, Debug)]
struct Ended {
    written: u32,
    status: Status,
}

/// What is known of a request that is pending.
#[derive(Clone, Copy, Debug)]
struct Pending {
    /// How long its two parts are.
    readable: u32,
    writable: u32,
    data: Data,
    /// How many bytes of the data are done.
    done: u32,
    /// How it ends, or ended.
    ended: Ended,
}

impl Default for Pending {
    fn default() -> Self {
        let ended = Ended { written: 0, status: Status::Ok };
        Self { readable: 0, writable: 0, data: Data::Settled, done: 0, ended }
    }
}

/// What storage still has to do with a request's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Data {
    /// Nothing: it needs no more, or never had any.
    Settled,
    /// It fills the writable part.
    Read,
    /// It takes from the readable part, behind the header.
    Write,
}

/// A request as its header and lengths tell it, checked against the disk.
enum Task {
    Read { offset: u64, len: u32 },
    Write { offset: u64, len: u32 },
    Flush,
    Id,
    Discard { offset: u64, len: u64 },
    WriteZeroes { offset: u64, len: u64, unmap: bool },
}

struct BlkQueue {
    storage: Box<dyn StorageQueue>,
    capacity: u64,
    read_only: bool,
    durability: Durability,
    /// By token.
    pending: Vec<Pending>,
    /// The pieces of the request being started; kept for its capacity.
    data: Vec<DetachedSlice>,
    id: [u8; 20],
}

impl Handler for BlkQueue {
    fn may_repeat(&self) -> bool {
        true
    }

    fn start(&mut self, token: Token, request: &Request<'_>) -> Outcome {
        if request.writable.is_empty() {
            // No room for a status: there is nothing that the driver could be told.
            return Outcome::Done(0);
        }
        match self.task(request) {
            Ok(task) => self.begin(token, task, request),
            Err(status) => Outcome::Done(end(request.writable, Ended { written: 0, status })),
        }
    }

    fn unreachable(&mut self, request: &Unreachable<'_>) -> u32 {
        // The used length is counted from the first writable byte, of which none was written but the last.
        if let Some(last) = request.writable_len.checked_sub(1) {
            request.write(last, &[Status::IoError as u8]);
        }
        0
    }

    fn submit(&mut self) {
        // What the kernel does not take now it is offered again with the next batch; nothing is lost.
        if let Err(error) = self.storage.submit() {
            tracing::warn!(%error, "storage did not take a batch, will try again");
        }
    }

    fn completed(&mut self, back: &mut Vec<Back>) {
        let pending = &mut self.pending;
        self.storage.completed(&mut |token, came| {
            let pending = &mut pending[usize::from(token)];
            match came {
                Came::Data { done } => pending.done = done as u32,
                Came::End(Ok(())) => pending.data = Data::Settled,
                Came::End(Err(error)) => {
                    pending.data = Data::Settled;
                    pending.ended = Ended { written: 0, status: status_of(&error) };
                }
            }
            // The status goes into the last byte.
            let (readable_from, writable_from) = match pending.data {
                Data::Settled => (pending.readable, pending.writable - 1),
                Data::Read => (pending.readable, pending.done),
                Data::Write => (HEADER + pending.done, pending.writable - 1),
            };
            back.push(Back { token, readable_from, writable_from });
        });
    }

    fn go_on(&mut self, token: Token, request: &Request<'_>) -> Outcome {
        let Pending { data, done, ended, .. } = self.pending[usize::from(token)];
        self.data.clear();
        match data {
            Data::Settled => return Outcome::Done(end(request.writable, ended)),
            Data::Read => request.writable.extract(done, request.writable.len() - 1 - done, &mut self.data),
            Data::Write => {
                let at = HEADER + done;
                request.readable.extract(at, request.readable.len() - at, &mut self.data)
            }
        };
        // SAFETY: the pieces are those of `request`, which are good until this returns.
        let started = unsafe { self.storage.go_on(token, &self.data) };
        self.outcome(token, started, data, ended, request)
    }

    fn forget(&mut self, token: Token) {
        if self.pending[usize::from(token)].data != Data::Settled {
            self.storage.forget(token);
        }
    }

    fn cancel(&mut self, token: Token) {
        self.storage.cancel(token);
    }

    fn abandon(&mut self) {
        self.storage.abandon();
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        self.storage.completion_fd()
    }
}

impl BlkQueue {
    fn task(&self, request: &Request<'_>) -> Result<Task, Status> {
        let mut header = Header { kind: 0.into(), reserved: 0.into(), sector: 0.into() };
        if !request.readable.read(0, header.as_mut_bytes()) {
            return Err(Status::IoError);
        }
        let kind = T::try_from(header.kind.get()).map_err(|_| Status::Unsupported)?;
        let offset = header.sector.get().checked_mul(SECTOR);
        match kind {
            T::In => {
                let len = request.writable.len() - 1;
                Ok(Task::Read { offset: self.inside(offset, len.into())?, len })
            }
            T::Out => {
                self.writable()?;
                let len = request.readable.len() - HEADER;
                Ok(Task::Write { offset: self.inside(offset, len.into())?, len })
            }
            T::Flush => Ok(Task::Flush),
            T::GetId => Ok(Task::Id),
            T::Discard => {
                let (offset, len, flags) = self.segment(request)?;
                // §5.2.6.2: the unmap flag of a discard is reserved.
                if flags == 0 { Ok(Task::Discard { offset, len }) } else { Err(Status::Unsupported) }
            }
            T::WriteZeroes => {
                let (offset, len, flags) = self.segment(request)?;
                if flags & !SEGMENT_UNMAP != 0 {
                    return Err(Status::Unsupported);
                }
                Ok(Task::WriteZeroes { offset, len, unmap: flags == SEGMENT_UNMAP })
            }
            _ => Err(Status::Unsupported),
        }
    }

    /// The byte offset of a request for `len` bytes, if whole sectors within the disk.
    fn inside(&self, offset: Option<u64>, len: u64) -> Result<u64, Status> {
        let offset = offset.ok_or(Status::IoError)?;
        let end = offset.checked_add(len).ok_or(Status::IoError)?;
        if len.is_multiple_of(SECTOR) && end <= self.capacity { Ok(offset) } else { Err(Status::IoError) }
    }

    fn writable(&self) -> Result<(), Status> {
        if self.read_only { Err(Status::IoError) } else { Ok(()) }
    }

    /// The one segment of a discard or write-zeroes request: `max_*_seg` is 1.
    fn segment(&self, request: &Request<'_>) -> Result<(u64, u64, u32), Status> {
        self.writable()?;
        if self.durability == Durability::Durable {
            // What storage erases is durable after a flush, which this driver can't ask for.
            return Err(Status::Unsupported);
        }
        let mut segment = Segment { sector: 0.into(), num_sectors: 0.into(), flags: 0.into() };
        if request.readable.len() != HEADER + SEGMENT || !request.readable.read(HEADER, segment.as_mut_bytes()) {
            return Err(Status::IoError);
        }
        let sectors = segment.num_sectors.get();
        if sectors > MAX_ERASE_SECTORS {
            return Err(Status::IoError);
        }
        let len = u64::from(sectors) * SECTOR;
        let offset = self.inside(segment.sector.get().checked_mul(SECTOR), len)?;
        Ok((offset, len, segment.flags.get()))
    }

    fn begin(&mut self, token: Token, task: Task, request: &Request<'_>) -> Outcome {
        self.data.clear();
        let (operation, data, written) = match task {
            Task::Read { offset, len } => {
                request.writable.extract(0, len, &mut self.data);
                (Operation::Read { offset }, Data::Read, len)
            }
            Task::Write { offset, len } => {
                request.readable.extract(HEADER, len, &mut self.data);
                (Operation::Write { offset, durability: self.durability }, Data::Write, 0)
            }
            Task::Flush => (Operation::Flush, Data::Settled, 0),
            Task::Id => return Outcome::Done(self.identify(request.writable)),
            Task::Discard { offset, len } => (Operation::Discard { offset, len }, Data::Settled, 0),
            Task::WriteZeroes { offset, len, unmap } => {
                (Operation::WriteZeroes { offset, len, unmap }, Data::Settled, 0)
            }
        };
        let ended = Ended { written, status: Status::Ok };
        // SAFETY: the pieces are those of `request`, which are good until this returns.
        let started = unsafe { self.storage.start(token, operation, &self.data) };
        self.outcome(token, started, data, ended, request)
    }

    #[inline]
    fn outcome(&mut self, token: Token, started: Started, data: Data, ended: Ended, request: &Request<'_>) -> Outcome {
        match started {
            Started::Done(Ok(())) => Outcome::Done(end(request.writable, ended)),
            Started::Done(Err(error)) => {
                Outcome::Done(end(request.writable, Ended { written: 0, status: status_of(&error) }))
            }
            Started::Pending => {
                let (readable, writable) = (request.readable.len(), request.writable.len());
                self.pending[usize::from(token)] = Pending { readable, writable, data, done: 0, ended };
                Outcome::Pending
            }
        }
    }

    fn identify(&self, writable: Pieces<'_>) -> u32 {
        let len = (writable.len() - 1).min(self.id.len() as u32);
        writable.write(0, &self.id[..len as usize]);
        end(writable, Ended { written: len, status: Status::Ok })
    }
}

/// Writes the status byte; returns how many bytes were written from the first on, which takes the status in only where
/// all before it was written too.
fn end(writable: Pieces<'_>, ended: Ended) -> u32 {
    let last = writable.len() - 1;
    writable.write(last, &[ended.status as u8]);
    if ended.written == last { last + 1 } else { ended.written }
}

fn status_of(error: &io::Error) -> Status {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => Status::Unsupported,
        _ => Status::IoError,
    }
}
