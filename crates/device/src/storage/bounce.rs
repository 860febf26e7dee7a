//! Operations that have to wait, on memory of our own.
//!
//! An [`Engine`] is given memory that is nobody else's, so what it does to it, when, and whether it ever lets go, is of
//! no concern to whoever owns the pieces: those are touched in [`StorageQueue::start`] and [`StorageQueue::go_on`], by
//! the thread that calls, and never between.
//!
//! The alternative, handing the pieces themselves to the kernel, ends where a disk hangs. io_uring's ASYNC_CANCEL does not
//! reach a read that waits for a page, nor anything in an uninterruptible sleep. Mapping something else over the
//! addresses takes a buffered copy's target away, but not that of a file system which has looked the pages up before and
//! writes to those: FUSE with FOPEN_DIRECT_IO, 9p without a cache and CIFS with `forcedirectio` do, and it is their
//! server that decides, not how we open the file. One more copy of what was not in the page cache is the price.

use super::{Came, Geometry, Operation, Started, StorageQueue, total};
use ringfence_dma::{DetachedSlice, HostSlice};
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Carries operations out that may have to wait. One thread has it.
///
/// Dropping it waits until it touches no memory any more, for as long as that takes.
pub(super) trait Engine: Send {
    /// Moves as many bytes between the disk and `pieces`, which are `len` bytes, as can be without waiting. `Ok`: so many.
    ///
    /// # Safety
    /// The pieces are good until this returns.
    #[inline]
    unsafe fn now(&mut self, _operation: Operation, _pieces: &[DetachedSlice], _len: u64) -> io::Result<u64> {
        Ok(0)
    }

    /// Starts an operation that the disk admits. Reads fill `memory`, writes take from it, others have none.
    ///
    /// # Safety
    /// `memory` is mapped, and nobody else touches it, until `token` comes back from [`Self::completed`], or until this
    /// returns where it returns [`Started::Done`], or until the engine has been dropped.
    unsafe fn start(&mut self, token: u16, operation: Operation, memory: Option<DetachedSlice>) -> Started;

    /// As [`StorageQueue::submit`].
    fn submit(&mut self) -> io::Result<()>;

    /// Calls `each` with the token and the result of every operation that has ended.
    fn completed(&mut self, each: &mut dyn FnMut(u16, io::Result<()>));

    /// As [`StorageQueue::completion_fd`].
    fn completion_fd(&self) -> BorrowedFd<'_>;

    /// As [`StorageQueue::cancel`].
    fn cancel(&mut self, token: u16);
}

/// Operations that change the disk and that nobody waits for any more, of all queues of a storage.
pub(super) type Strays = Arc<AtomicUsize>;

/// A [`StorageQueue`] over an engine.
pub(super) struct Bounce<E: Engine> {
    // Before the buffers, which its operations use until it is gone.
    engine: E,
    geometry: Geometry,
    slots: Box<[Slot]>,
    buffers: Buffers,
    /// Those that wait for a buffer, in their order.
    short: VecDeque<u16>,
    /// Cancelled before they had one.
    given_up: Vec<u16>,
    // Before `_owed`: what is owed is paid when the engine has gone.
    strays: Strays,
    _owed: Owed,
}

/// One operation, by token.
struct Slot {
    operation: Operation,
    /// How many bytes of data it has, and how many of them are done.
    total: u64,
    done: u64,
    buffer: Option<Buffer>,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    /// Waits for a buffer.
    Short,
    /// The engine has it, with so many bytes.
    UnderWay(usize),
    /// Has a buffer, and needs its pieces in order to go on.
    Empty,
    /// So many bytes that were read are in its buffer.
    Full(usize),
}

/// The most that goes through a buffer at once.
const PART: u64 = 1 << 20;

/// How much memory the buffers of one queue are at the most; whatever needs more waits.
const BUFFERS: usize = 32 << 20;

/// How much of it is kept while nobody needs it.
const SPARE: usize = 4 << 20;

impl<E: Engine> Bounce<E> {
    /// `strays` are those of the storage.
    pub(super) fn new(engine: E, geometry: Geometry, depth: u16, strays: &Strays) -> Self {
        let idle = || Slot { operation: Operation::Flush, total: 0, done: 0, buffer: None, state: State::Idle };
        Self {
            engine,
            geometry,
            slots: (0..depth).map(|_| idle()).collect(),
            buffers: Buffers::default(),
            short: VecDeque::new(),
            given_up: Vec::new(),
            strays: Arc::clone(strays),
            _owed: Owed { strays: Arc::clone(strays), count: 0 },
        }
    }

    /// Takes an operation further, which has `pieces` left and a buffer if there was one to be had.
    ///
    /// # Safety
    /// The pieces are good until this returns.
    unsafe fn advance(&mut self, token: u16, pieces: &[DetachedSlice]) -> Started {
        let slot = &mut self.slots[usize::from(token)];
        let mut cursor = Cursor { pieces, skip: 0 };
        // Ends: each round moves bytes.
        loop {
            if let State::Full(len) = slot.state {
                let buffer = slot.buffer.as_ref().expect("it is full");
                // SAFETY: the pieces are good by this function's own contract.
                unsafe { cursor.each(len, |piece, at| copy(buffer.slice(at, piece.len()), piece)) };
                slot.done += len as u64;
                slot.state = State::Empty;
            }
            let len = (slot.total - slot.done).min(PART) as usize;
            if len == 0 {
                self.buffers.give_back(slot.buffer.take());
                slot.state = State::Idle;
                return Started::Done(Ok(()));
            }
            if slot.buffer.is_none() {
                slot.buffer = self.buffers.take(len);
            }
            let Some(buffer) = &slot.buffer else {
                slot.state = State::Short;
                self.short.push_back(token);
                return Started::Pending;
            };
            let part = match slot.operation {
                Operation::Write { offset, durability } => {
                    // SAFETY: as above.
                    unsafe { cursor.each(len, |piece, at| copy(piece, buffer.slice(at, piece.len()))) };
                    Operation::Write { offset: offset + slot.done, durability }
                }
                Operation::Read { offset } => Operation::Read { offset: offset + slot.done },
                other => unreachable!("{other:?} has no data"),
            };
            // SAFETY: the buffer stays in its slot until the token has come back, or the engine is gone, which is
            // dropped first.
            match unsafe { self.engine.start(token, part, Some(buffer.slice(0, len).detach())) } {
                Started::Pending => {
                    slot.state = State::UnderWay(len);
                    return Started::Pending;
                }
                Started::Done(Ok(())) if matches!(part, Operation::Read { .. }) => slot.state = State::Full(len),
                Started::Done(Ok(())) => slot.done += len as u64,
                Started::Done(Err(error)) => {
                    self.buffers.give_back(slot.buffer.take());
                    slot.state = State::Idle;
                    return Started::Done(Err(error));
                }
            }
        }
    }

    /// Gives buffers to those that wait for one, as far as there are any.
    fn relieve(&mut self, each: &mut dyn FnMut(u16, Came)) {
        while let Some(&token) = self.short.front() {
            let slot = &mut self.slots[usize::from(token)];
            slot.buffer = self.buffers.take((slot.total - slot.done).min(PART) as usize);
            if slot.buffer.is_none() {
                break;
            }
            slot.state = State::Empty;
            self.short.pop_front();
            each(token, Came::Data { done: slot.done });
        }
    }
}

impl<E: Engine> StorageQueue for Bounce<E> {
    #[inline]
    unsafe fn start(&mut self, token: u16, operation: Operation, pieces: &[DetachedSlice]) -> Started {
        let len = total(pieces);
        if let Err(refused) = self.geometry.admit(&operation, len) {
            return Started::Done(Err(refused));
        }
        if operation.changes() && self.strays.load(Ordering::Acquire) > 0 {
            return Started::Done(Err(io::Error::from_raw_os_error(libc::EIO)));
        }
        let has_data = matches!(operation, Operation::Read { .. } | Operation::Write { .. });
        // SAFETY: the pieces are good by this function's own contract.
        let done = if has_data { unsafe { self.engine.now(operation, pieces, len) } } else { Ok(0) };
        let done = match done {
            Ok(done) if done == len && has_data => return Started::Done(Ok(())),
            Ok(done) => done,
            Err(error) => return Started::Done(Err(error)),
        };
        let slot = &mut self.slots[usize::from(token)];
        assert!(slot.state == State::Idle, "token {token} is under way already");
        (slot.operation, slot.total, slot.done) = (operation, len, done);
        if has_data {
            let left;
            let pieces = match done {
                0 => pieces,
                _ => {
                    left = rest(pieces, done);
                    &left
                }
            };
            // SAFETY: as above.
            return unsafe { self.advance(token, pieces) };
        }
        // SAFETY: without memory there is nothing to be vouched for.
        let started = unsafe { self.engine.start(token, operation, None) };
        if matches!(started, Started::Pending) {
            slot.state = State::UnderWay(0);
        }
        started
    }

    #[inline]
    fn submit(&mut self) -> io::Result<()> {
        self.engine.submit()
    }

    fn completed(&mut self, each: &mut dyn FnMut(u16, Came)) {
        let Self { engine, slots, buffers, .. } = self;
        engine.completed(&mut |token, result| {
            let slot = &mut slots[usize::from(token)];
            let State::UnderWay(len) = slot.state else { panic!("token {token} ended and was not under way") };
            let came = match (result, slot.operation) {
                (Ok(()), Operation::Read { .. }) => {
                    slot.state = State::Full(len);
                    Came::Data { done: slot.done }
                }
                (Ok(()), Operation::Write { .. }) if slot.done + (len as u64) < slot.total => {
                    slot.done += len as u64;
                    slot.state = State::Empty;
                    Came::Data { done: slot.done }
                }
                (result, _) => {
                    buffers.give_back(slot.buffer.take());
                    slot.state = State::Idle;
                    Came::End(result)
                }
            };
            each(token, came);
        });
        for token in self.given_up.drain(..) {
            each(token, Came::End(Err(io::Error::from_raw_os_error(libc::ECANCELED))));
        }
        if !self.short.is_empty() {
            self.relieve(each);
        }
    }

    unsafe fn go_on(&mut self, token: u16, pieces: &[DetachedSlice]) -> Started {
        let slot = &self.slots[usize::from(token)];
        assert!(matches!(slot.state, State::Empty | State::Full(_)), "token {token} goes on and had not come back");
        assert_eq!(total(pieces), slot.total - slot.done, "the pieces that are left");
        // SAFETY: by this function's own contract.
        unsafe { self.advance(token, pieces) }
    }

    fn forget(&mut self, token: u16) {
        let slot = &mut self.slots[usize::from(token)];
        assert!(
            matches!(slot.state, State::Empty | State::Full(_)),
            "token {token} is forgotten and had not come back"
        );
        self.buffers.give_back(slot.buffer.take());
        slot.state = State::Idle;
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.engine.completion_fd())
    }

    fn cancel(&mut self, token: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(token)) else { return };
        match slot.state {
            State::UnderWay(_) => self.engine.cancel(token),
            State::Short => {
                slot.state = State::Idle;
                self.short.retain(|&other| other != token);
                self.given_up.push(token);
            }
            State::Idle | State::Empty | State::Full(_) => {}
        }
    }

    fn abandon(&mut self) {
        let changing = |slot: &&Slot| matches!(slot.state, State::UnderWay(_)) && slot.operation.changes();
        let count = self.slots.iter().filter(changing).count();
        self._owed.count += count;
        self.strays.fetch_add(count, Ordering::AcqRel);
    }
}

/// Strays of one queue, which are none any more when it has gone.
struct Owed {
    strays: Strays,
    count: usize,
}

impl Drop for Owed {
    fn drop(&mut self) {
        self.strays.fetch_sub(self.count, Ordering::AcqRel);
    }
}

/// Memory of our own, zeroed when it was made.
struct Buffer {
    start: NonNull<u8>,
    /// A power of two, at least [`SMALLEST`].
    size: usize,
}

// SAFETY: owns its memory, as a `Box` does.
unsafe impl Send for Buffer {}

const SMALLEST: usize = 4096;

impl Buffer {
    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size, SMALLEST).expect("sizes are those of parts")
    }

    fn new(size: usize) -> Self {
        // SAFETY: the size is not 0.
        let start = unsafe { alloc_zeroed(Self::layout(size)) };
        let start = NonNull::new(start).unwrap_or_else(|| handle_alloc_error(Self::layout(size)));
        Self { start, size }
    }

    fn slice(&self, at: usize, len: usize) -> HostSlice<'_> {
        // SAFETY: allocated until `self` is dropped; Rust references to it are made by engines alone, while it is theirs.
        unsafe { HostSlice::new(self.start, self.size) }.sub(at, len)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: from `alloc_zeroed` in `new`, with this layout.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.size)) }
    }
}

/// The buffers of a queue.
#[derive(Default)]
struct Buffers {
    /// By size: 2^n times the smallest.
    spare: [Vec<Buffer>; (PART as usize / SMALLEST).ilog2() as usize + 1],
    spare_bytes: usize,
    /// With those that are in use.
    bytes: usize,
}

impl Buffers {
    fn class(size: usize) -> usize {
        (size / SMALLEST).ilog2() as usize
    }

    /// One of at least `len` bytes, which are not more than a part. `None`: there are too many.
    fn take(&mut self, len: usize) -> Option<Buffer> {
        let size = len.next_power_of_two().max(SMALLEST);
        if let Some(buffer) = self.spare[Self::class(size)].pop() {
            self.spare_bytes -= size;
            return Some(buffer);
        }
        if self.bytes + size > BUFFERS {
            // Those of other sizes are of no use now.
            self.spare.iter_mut().for_each(Vec::clear);
            self.bytes -= std::mem::take(&mut self.spare_bytes);
        }
        if self.bytes + size > BUFFERS {
            return None;
        }
        self.bytes += size;
        Some(Buffer::new(size))
    }

    fn give_back(&mut self, buffer: Option<Buffer>) {
        let Some(buffer) = buffer else { return };
        if self.spare_bytes + buffer.size <= SPARE {
            self.spare_bytes += buffer.size;
            self.spare[Self::class(buffer.size)].push(buffer);
        } else {
            self.bytes -= buffer.size;
        }
    }
}

/// A place in the bytes of some pieces.
struct Cursor<'p> {
    pieces: &'p [DetachedSlice],
    /// How many bytes of the first piece are behind.
    skip: usize,
}

impl Cursor<'_> {
    /// Calls `each` for the pieces of the next `len` bytes, with how many bytes came before.
    ///
    /// # Safety
    /// The pieces are good until this returns.
    unsafe fn each(&mut self, len: usize, mut each: impl FnMut(HostSlice<'_>, usize)) {
        let mut done = 0;
        while done < len {
            // SAFETY: by this function's own contract.
            let piece = unsafe { self.pieces[0].attach() };
            let here = (piece.len() - self.skip).min(len - done);
            each(piece.sub(self.skip, here), done);
            done += here;
            self.skip += here;
            if self.skip == piece.len() {
                (self.pieces, self.skip) = (&self.pieces[1..], 0);
            }
        }
    }
}

/// What is left of `pieces` behind `done` bytes.
fn rest(pieces: &[DetachedSlice], done: u64) -> Vec<DetachedSlice> {
    let mut skip = done as usize;
    let mut left = Vec::with_capacity(pieces.len());
    for &piece in pieces {
        if skip >= piece.len() {
            skip -= piece.len();
            continue;
        }
        // SAFETY: an address within the piece is taken here and nothing is touched.
        left.push(unsafe { piece.attach() }.sub(skip, piece.len() - skip).detach());
        skip = 0;
    }
    left
}

/// Copies all of `from` to `to`, which is as long, as [`HostSlice`] does.
fn copy(from: HostSlice<'_>, to: HostSlice<'_>) {
    assert_eq!(from.len(), to.len());
    // SAFETY: both are good while borrowed; one of them is a buffer, so they do not overlap.
    unsafe { from.as_ptr().copy_to_nonoverlapping(to.as_ptr(), from.len()) }
}

#[cfg(test)]
mod tests {
    use super::super::Durability;
    use super::*;
    use ringfence_dma::Ram;
    use std::os::fd::AsFd;

    /// Ends what it was given when a test says so. Every read brings 7s.
    struct Script {
        under_way: Vec<(u16, Operation, Option<DetachedSlice>)>,
        ends: Vec<(u16, io::Result<()>)>,
        fd: std::os::fd::OwnedFd,
    }

    impl Engine for Script {
        unsafe fn start(&mut self, token: u16, operation: Operation, memory: Option<DetachedSlice>) -> Started {
            self.under_way.push((token, operation, memory));
            Started::Pending
        }

        fn submit(&mut self) -> io::Result<()> {
            Ok(())
        }

        fn completed(&mut self, each: &mut dyn FnMut(u16, io::Result<()>)) {
            self.ends.drain(..).for_each(|(token, result)| each(token, result));
        }

        fn completion_fd(&self) -> BorrowedFd<'_> {
            self.fd.as_fd()
        }

        fn cancel(&mut self, _token: u16) {}
    }

    fn queue(strays: &Strays) -> Bounce<Script> {
        let fd = std::fs::File::open("/dev/null").unwrap().into();
        let script = Script { under_way: Vec::new(), ends: Vec::new(), fd };
        Bounce::new(script, Geometry::plain(1 << 30), 64, strays)
    }

    impl Bounce<Script> {
        /// Ends the oldest, and says what is told of it.
        fn end_oldest(&mut self) -> Vec<(u16, Came)> {
            let (token, operation, memory) = self.engine.under_way.remove(0);
            if let (Operation::Read { .. }, Some(memory)) = (operation, memory) {
                // SAFETY: the buffer is the engine's until its token ends.
                unsafe { memory.attach() }.fill(7);
            }
            self.engine.ends.push((token, Ok(())));
            self.came()
        }

        fn came(&mut self) -> Vec<(u16, Came)> {
            let mut came = Vec::new();
            self.completed(&mut |token, how| came.push((token, how)));
            came
        }
    }

    fn sum(ram: &Ram) -> u64 {
        let mut bytes = vec![0; ram.len()];
        ram.slice(0, ram.len()).read(0, &mut bytes);
        bytes.iter().map(|&byte| u64::from(byte)).sum()
    }

    #[test]
    fn a_read_comes_in_parts_and_moves_bytes_during_calls_alone() {
        const LEN: usize = 5 << 19;
        let (ram, mut queue) = (Ram::new(LEN), queue(&Strays::default()));
        // SAFETY: `ram` is there during all calls.
        let start = |queue: &mut Bounce<Script>, done: usize, go_on: bool| unsafe {
            let pieces = [ram.slice(done, 100), ram.slice(done + 100, LEN - done - 100)].map(HostSlice::detach);
            match go_on {
                false => queue.start(3, Operation::Read { offset: 512 }, &pieces),
                true => queue.go_on(3, &pieces),
            }
        };
        assert!(matches!(start(&mut queue, 0, false), Started::Pending));
        for part in 0..3 {
            let done = part << 20;
            assert!(matches!(queue.engine.under_way[..], [(3, Operation::Read { offset }, _)] if offset == 512 + done));
            assert_eq!(sum(&ram), 7 * done, "nothing moves between calls");
            assert!(matches!(queue.end_oldest()[..], [(3, Came::Data { done: told })] if told == done));
            let went_on = start(&mut queue, done as usize, true);
            assert!(matches!((part, went_on), (0 | 1, Started::Pending) | (2, Started::Done(Ok(())))));
        }
        assert_eq!(sum(&ram), 7 * LEN as u64);
    }

    #[test]
    fn a_write_takes_its_bytes_in_calls_and_ends_without_them() {
        const LEN: usize = (1 << 20) + 512;
        let (ram, mut queue) = (Ram::new(LEN), queue(&Strays::default()));
        ram.slice(0, LEN).fill(1);
        let write = Operation::Write { offset: 0, durability: Durability::Cached };
        // SAFETY: `ram` is there during the call.
        assert!(matches!(unsafe { queue.start(0, write, &[ram.slice(0, LEN).detach()]) }, Started::Pending));
        ram.slice(0, LEN).fill(2);
        let (_, _, memory) = queue.engine.under_way[0];
        // SAFETY: a buffer, which is the engine's.
        assert_eq!(unsafe { memory.unwrap().attach() }.load_u16(0, Ordering::Relaxed), 0x101);
        assert!(matches!(queue.end_oldest()[..], [(0, Came::Data { done: 0x10_0000 })]));
        // SAFETY: as above.
        assert!(matches!(unsafe { queue.go_on(0, &[ram.slice(1 << 20, 512).detach()]) }, Started::Pending));
        assert!(matches!(queue.end_oldest()[..], [(0, Came::End(Ok(())))]));
    }

    #[test]
    fn buffers_are_bounded_and_whoever_lacks_one_gets_the_next() {
        const LEN: usize = PART as usize;
        let (ram, mut queue) = (Ram::new(LEN), queue(&Strays::default()));
        let room = (BUFFERS / LEN) as u16;
        let piece = [ram.slice(0, LEN).detach()];
        for token in 0..room + 3 {
            // SAFETY: `ram` is there during the call.
            assert!(matches!(unsafe { queue.start(token, Operation::Read { offset: 0 }, &piece) }, Started::Pending));
        }
        assert_eq!(queue.engine.under_way.len(), usize::from(room));
        queue.cancel(room + 1);
        assert!(matches!(queue.came()[..], [(token, Came::End(Err(_)))] if token == room + 1));
        // One that is given up, one that ends.
        assert!(matches!(queue.end_oldest()[..], [(0, Came::Data { .. })]));
        queue.forget(0);
        assert!(matches!(queue.came()[..], [(token, Came::Data { done: 0 })] if token == room));
        // SAFETY: as above.
        assert!(matches!(unsafe { queue.go_on(room, &piece) }, Started::Pending));
        assert!(matches!(queue.end_oldest()[..], [(1, Came::Data { .. })]));
        // SAFETY: as above.
        assert!(matches!(unsafe { queue.go_on(1, &piece) }, Started::Done(Ok(()))));
        assert!(matches!(queue.came()[..], [(token, Came::Data { done: 0 })] if token == room + 2));
        assert!(queue.buffers.bytes <= BUFFERS);
    }

    #[test]
    fn nothing_changes_the_disk_while_a_change_may_still_come() {
        let (strays, ram) = (Strays::default(), Ram::new(512));
        let (mut old, mut new) = (queue(&strays), queue(&strays));
        let write = Operation::Write { offset: 0, durability: Durability::Cached };
        let piece = [ram.slice(0, 512).detach()];
        // SAFETY: `ram` is there during all calls.
        let start = |queue: &mut Bounce<Script>, token, operation| unsafe {
            let pieces = if matches!(operation, Operation::Discard { .. }) { &[][..] } else { &piece };
            match queue.start(token, operation, pieces) {
                Started::Pending => None,
                Started::Done(result) => Some(result.unwrap_err().raw_os_error().unwrap()),
            }
        };
        assert_eq!(start(&mut old, 0, write), None);
        assert_eq!(start(&mut old, 1, Operation::Read { offset: 0 }), None);
        old.abandon();
        assert_eq!(start(&mut new, 0, write), Some(libc::EIO));
        assert_eq!(start(&mut new, 0, Operation::Discard { offset: 0, len: 512 }), Some(libc::EIO));
        assert_eq!(start(&mut new, 0, Operation::Read { offset: 0 }), None);
        drop(old);
        assert_eq!(start(&mut new, 1, write), None);
    }
}
