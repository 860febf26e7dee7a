//! What a request has besides its data, in memory that the device sees all the time: `virtio_blk_req` (§5.2.6).

use super::{Answer, Request, RequestError, Unmap};
use crate::queue::Piece;
use core::sync::atomic::{AtomicU64, Ordering};
use ringfence_dma::{Access, BusAddr, HostSlice};
use ringfence_ring::{Descriptor, IndirectTable};
use virtio_spec::blk::{S, T as Type};

/// One request's, and the table of its descriptors.
///
/// The device may scribble over all of it at any time, and harms nobody but itself: nothing but the answer is read back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record<'a> {
    words: &'a [AtomicU64; 8],
    /// Where tables were agreed on.
    table: Option<HostSlice<'a>>,
    addr: BusAddr,
}

/// What a request wants back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// One buffer of data.
    Usual,
    /// Nothing but its status, or data in buffers.
    Plain,
    Id,
    /// Nobody will hear of it.
    Abandoned,
}

/// Where in a record the payload and the status are, in words. The header comes first: type, and sector.
const PAYLOAD: usize = 2;
const STATUS: usize = 6;

/// What no device writes: it shows a status that was not written.
const NO_STATUS: u8 = 0xff;

impl<'a> Record<'a> {
    /// Its length with a table of so many descriptors.
    pub(super) const fn len(descriptors: usize) -> usize {
        size_of::<[AtomicU64; 8]>() + 16 * descriptors
    }

    /// A record in `piece`, which starts on a cache line.
    pub(super) fn new(piece: Piece<'a>) -> Self {
        let Piece { memory, addr } = piece;
        let [words] = memory.cells(0, 1).expect("coherent memory starts on a page") else {
            unreachable!("one was asked for");
        };
        let table = memory.len() - Self::len(0);
        let table = (table > 0).then(|| memory.sub(Self::len(0), table));
        Self { words, table, addr }
    }

    /// Writes the header of a transfer.
    #[inline]
    pub(super) fn write_transfer(&self, kind: Type, sector: u64) {
        self.store(0, u32::from(kind).into());
        self.store(1, sector);
        self.store(STATUS, NO_STATUS.into());
    }

    pub(super) fn write(&self, request: &Request<'_, '_>) {
        let (kind, at) = match *request {
            Request::Read { sector, .. } => (Type::In, sector),
            Request::Write { sector, .. } => (Type::Out, sector),
            Request::Flush => (Type::Flush, 0),
            Request::Id => (Type::GetId, 0),
            Request::Discard { .. } => (Type::Discard, 0),
            Request::WriteZeroes { .. } => (Type::WriteZeroes, 0),
        };
        self.write_transfer(kind, at);
        // `virtio_blk_discard_write_zeroes`, or room for a name: cleared, lest an earlier name comes back.
        let payload = match *request {
            Request::Discard { sector, sectors } => [sector, sectors.into(), 0],
            Request::WriteZeroes { sector, sectors, unmap } => {
                [sector, u64::from(sectors) | u64::from(unmap == Unmap::Yes) << 32, 0]
            }
            _ => [0; 3],
        };
        for (word, value) in (PAYLOAD..).zip(payload) {
            self.store(word, value);
        }
    }

    #[inline]
    pub(super) fn header(&self) -> Descriptor {
        self.part(0, 16, Access::Read)
    }

    pub(super) fn payload(&self, request: &Request<'_, '_>) -> Option<Descriptor> {
        match request {
            Request::Discard { .. } | Request::WriteZeroes { .. } => Some(self.part(PAYLOAD, 16, Access::Read)),
            Request::Id => Some(self.part(PAYLOAD, 20, Access::Write)),
            Request::Read { .. } | Request::Write { .. } | Request::Flush => None,
        }
    }

    #[inline]
    pub(super) fn status(&self) -> Descriptor {
        self.part(STATUS, 1, Access::Write)
    }

    #[inline]
    pub(super) fn table(&self) -> Option<IndirectTable<'a>> {
        Some(IndirectTable { memory: self.table?, addr: self.at(Self::len(0) as u64) })
    }

    /// Whether the device says that all went well.
    #[inline]
    pub(super) fn is_ok(&self) -> bool {
        self.status_byte() == u8::from(S::Ok)
    }

    /// What the device answered, who says that it wrote `written` bytes of `expected`. `None`: nobody wants to know.
    #[cold]
    pub(super) fn answer(&self, kind: Kind, written: u32, expected: u32) -> Option<Result<Answer, RequestError>> {
        let status = self.status_byte();
        Some(match (S::try_from(status), kind) {
            (_, Kind::Abandoned) => return None,
            (Ok(S::Ok), _) if written < expected => Err(RequestError::Short { written, expected }),
            (Ok(S::Ok), Kind::Usual | Kind::Plain) => Ok(Answer::Done),
            (Ok(S::Ok), Kind::Id) => Ok(Answer::Id),
            (Ok(S::Ioerr), _) => Err(RequestError::Io),
            (Ok(S::Unsupp), _) => Err(RequestError::Unsupported),
            _ => Err(RequestError::Status(status)),
        })
    }

    /// What the device wrote as its name.
    pub(super) fn name(&self) -> [u8; 20] {
        let mut name = [0; 24];
        for (word, bytes) in (PAYLOAD..).zip(name.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&self.load(word).to_le_bytes());
        }
        *name.first_chunk().expect("more than that")
    }

    #[inline]
    fn status_byte(&self) -> u8 {
        // The word's first.
        self.load(STATUS) as u8
    }

    /// Where the device finds the byte at `offset`, which is in the record.
    #[inline]
    fn at(&self, offset: u64) -> BusAddr {
        BusAddr(self.addr.0.wrapping_add(offset))
    }

    #[inline]
    fn part(&self, word: usize, len: u32, access: Access) -> Descriptor {
        Descriptor { addr: self.at(8 * word as u64), len, access }
    }

    #[inline]
    fn store(&self, word: usize, value: u64) {
        self.words[word].store(value.to_le(), Ordering::Relaxed);
    }

    #[inline]
    fn load(&self, word: usize) -> u64 {
        u64::from_le(self.words[word].load(Ordering::Relaxed))
    }
}
