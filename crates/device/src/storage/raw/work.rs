//! What is left to do of an operation, one system call at a time, whoever makes them.

use super::super::{Durability, Operation};
use super::Image;
use ringfence_dma::DetachedSlice;
use std::io;
use std::sync::atomic::Ordering;

/// More pieces than this the kernel does not take in one call.
const MAX_PIECES: usize = 1024;

/// What zeroes are written from where the file system can't make them.
pub(super) static ZEROES: [u8; 1 << 16] = [0; 1 << 16];

/// How often in a row a call may come back with nothing done before that is an error.
const MAX_STALLS: u8 = 32;

/// An operation that is under way: how far it got and what comes next.
#[derive(Debug)]
pub(super) struct Work {
    kind: Kind,
    /// Where the next byte lies, and how many there are from there.
    offset: u64,
    left: u64,
    /// Those of a transfer that are not done, from `first` on; the one at `first` is what is left of it. Kept for its
    /// capacity.
    pieces: Vec<DetachedSlice>,
    first: usize,
    stalls: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write(Durability),
    Flush,
    Discard,
    Zero(Zeroing),
}

/// Ways of making zeroes, the next one where one does not work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Zeroing {
    Punch,
    Range,
    Write,
}

/// The next system call.
#[derive(Clone, Copy, Debug)]
pub(super) enum Call<'w> {
    Read {
        offset: u64,
        pieces: &'w [DetachedSlice],
    },
    Write {
        offset: u64,
        pieces: &'w [DetachedSlice],
        durability: Durability,
    },
    /// Writes from [`ZEROES`], of which there are at least `len`.
    Zeroes {
        offset: u64,
        len: u32,
    },
    Allocate {
        offset: u64,
        len: u64,
        mode: i32,
    },
    Sync,
}

/// What a call's result means for the whole.
#[derive(Debug)]
pub(super) enum Next {
    /// There is another call to make.
    Call,
    /// The operation has ended.
    End(io::Result<()>),
}

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

impl Work {
    /// Nothing.
    pub(super) fn new() -> Self {
        Self { kind: Kind::Flush, offset: 0, left: 0, pieces: Vec::new(), first: 0, stalls: 0 }
    }

    /// Starts over with `operation`, which `image` admits. `len` is that of `pieces`.
    pub(super) fn begin(&mut self, image: &Image, operation: Operation, pieces: &[DetachedSlice], len: u64) -> Next {
        self.pieces.clear();
        self.first = 0;
        self.stalls = 0;
        (self.kind, self.offset, self.left) = match operation {
            Operation::Read { offset } => (Kind::Read, offset, len),
            Operation::Write { offset, durability } => (Kind::Write(durability), offset, len),
            Operation::Flush => {
                // What nobody could write needs no flush.
                self.kind = Kind::Flush;
                let verdict = image.lost.verdict();
                let ended = image.geometry.read_only || verdict.is_err();
                return if ended { Next::End(verdict) } else { Next::Call };
            }
            Operation::Discard { offset, len } => {
                image.window.as_ref().inspect(|window| window.forget(offset, len));
                let (offset, len) = image.whole_blocks(offset, len);
                let len = if image.can_punch.load(Ordering::Relaxed) { len } else { 0 };
                (Kind::Discard, offset, len)
            }
            Operation::WriteZeroes { offset, len, unmap } => {
                image.window.as_ref().inspect(|window| window.forget(offset, len));
                let punch = unmap && image.can_punch.load(Ordering::Relaxed);
                let range = image.can_zero.load(Ordering::Relaxed);
                let zeroing = match (punch, range) {
                    (true, _) => Zeroing::Punch,
                    (false, true) => Zeroing::Range,
                    (false, false) => Zeroing::Write,
                };
                (Kind::Zero(zeroing), offset, len)
            }
        };
        if self.left == 0 {
            return Next::End(Ok(()));
        }
        if matches!(self.kind, Kind::Read | Kind::Write(_)) {
            self.pieces.extend_from_slice(pieces);
        }
        Next::Call
    }

    /// The call to make next.
    #[inline]
    pub(super) fn call(&self) -> Call<'_> {
        let offset = self.offset;
        match self.kind {
            Kind::Read => Call::Read { offset, pieces: self.batch() },
            Kind::Write(durability) => Call::Write { offset, pieces: self.batch(), durability },
            Kind::Flush => Call::Sync,
            Kind::Discard | Kind::Zero(Zeroing::Punch) => Call::Allocate { offset, len: self.left, mode: PUNCH },
            Kind::Zero(Zeroing::Range) => Call::Allocate { offset, len: self.left, mode: ZERO },
            Kind::Zero(Zeroing::Write) => Call::Zeroes { offset, len: self.left.min(ZEROES.len() as u64) as u32 },
        }
    }

    fn batch(&self) -> &[DetachedSlice] {
        let rest = &self.pieces[self.first..];
        &rest[..rest.len().min(MAX_PIECES)]
    }

    /// Takes in what the call returned: a count, or an error's number made negative.
    ///
    /// # Safety
    /// The pieces are good, until this returns.
    #[inline]
    pub(super) unsafe fn returned(&mut self, image: &Image, result: i32) -> Next {
        match result {
            0.. => {
                let count = result as u64;
                match self.kind {
                    // SAFETY: by this function's own contract.
                    Kind::Read => unsafe { self.read(image, count) },
                    Kind::Write(_) | Kind::Zero(Zeroing::Write) => self.written(count),
                    Kind::Flush => Next::End(image.lost.verdict()),
                    Kind::Discard | Kind::Zero(_) => Next::End(Ok(())),
                }
            }
            _ => self.failed(image, -result),
        }
    }

    /// # Safety
    /// As in [`Self::returned`].
    unsafe fn read(&mut self, image: &Image, count: u64) -> Next {
        if count > 0 {
            return self.advanced(count);
        }
        if self.offset < image.len {
            if !image.warned_of_shrinking.swap(true, Ordering::Relaxed) {
                tracing::error!(offset = self.offset, size = image.len, "the image ends before its size when opened");
            }
            return Next::End(Err(io::ErrorKind::UnexpectedEof.into()));
        }
        for piece in &self.pieces[self.first..] {
            // SAFETY: by this function's own contract.
            unsafe { piece.attach() }.fill(0);
        }
        Next::End(Ok(()))
    }

    fn written(&mut self, count: u64) -> Next {
        if count == 0 { Next::End(Err(io::ErrorKind::WriteZero.into())) } else { self.advanced(count) }
    }

    /// `count` more bytes are done.
    #[inline]
    fn advanced(&mut self, count: u64) -> Next {
        assert!(count <= self.left, "{count} bytes done of {}", self.left);
        self.stalls = 0;
        self.offset += count;
        self.left -= count;
        if self.left == 0 {
            return Next::End(Ok(()));
        }
        let mut count = count as usize;
        while let Some(piece) = self.pieces.get_mut(self.first) {
            if count < piece.len() {
                // SAFETY: an address within the piece is taken here and nothing is touched.
                *piece = unsafe { piece.attach() }.sub(count, piece.len() - count).detach();
                break;
            }
            count -= piece.len();
            self.first += 1;
        }
        Next::Call
    }

    #[cold]
    fn failed(&mut self, image: &Image, errno: i32) -> Next {
        let error = || Next::End(Err(io::Error::from_raw_os_error(errno)));
        match (errno, self.kind) {
            (libc::EINTR | libc::EAGAIN, _) if self.stalls < MAX_STALLS => {
                self.stalls += 1;
                Next::Call
            }
            (libc::EINTR | libc::EAGAIN | libc::ECANCELED, _) => error(),
            (_, Kind::Flush | Kind::Write(Durability::Durable)) => {
                image.lost.remember(&io::Error::from_raw_os_error(errno));
                error()
            }
            // A discard is a wish.
            (libc::EOPNOTSUPP, Kind::Discard) => {
                image.can_punch.store(false, Ordering::Relaxed);
                Next::End(Ok(()))
            }
            (libc::EOPNOTSUPP | libc::EINVAL, Kind::Zero(Zeroing::Punch)) => {
                // EINVAL is about this one range: devices want whole blocks.
                if errno == libc::EOPNOTSUPP {
                    image.can_punch.store(false, Ordering::Relaxed);
                }
                self.kind = Kind::Zero(Zeroing::Range);
                Next::Call
            }
            (libc::EOPNOTSUPP | libc::EINVAL, Kind::Zero(Zeroing::Range)) => {
                if errno == libc::EOPNOTSUPP {
                    image.can_zero.store(false, Ordering::Relaxed);
                }
                self.kind = Kind::Zero(Zeroing::Write);
                Next::Call
            }
            _ => error(),
        }
    }

    /// How many bytes are not done.
    #[inline]
    pub(super) fn left(&self) -> u64 {
        self.left
    }

    /// Whether the last call came back with nothing done, so that the next should be allowed to wait.
    pub(super) fn stalled(&self) -> bool {
        self.stalls > 0
    }
}

impl Image {
    /// The largest range of whole blocks within: devices discard nothing smaller.
    fn whole_blocks(&self, offset: u64, len: u64) -> (u64, u64) {
        if !self.is_device {
            return (offset, len);
        }
        let block = u64::from(self.geometry.block_size);
        let (start, end) = (offset.next_multiple_of(block), (offset + len) / block * block);
        (start, end.saturating_sub(start))
    }
}
