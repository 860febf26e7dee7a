//! Operations under way in the kernel, through io_uring.

use super::super::bounce::Engine;
use super::super::{Operation, Started};
use super::Image;
use super::blocking::{move_now, rw_flags};
use super::work::{Call, Next, Work, ZEROES};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use ringfence_dma::DetachedSlice;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

/// The image among the ring's registered files.
const IMAGE: types::Fixed = types::Fixed(0);

/// Marks the completion of an attempt to cancel; below it is the token.
const CANCELLATION: u64 = 1 << 16;

/// The longest submission queue that the kernel allows, and the longest virtqueue.
const MAX_ENTRIES: u32 = 1 << 15;

/// How often a full kernel is asked again where nothing is under way that would make room by ending.
const MAX_REFUSALS: u32 = 100;

/// Every token has at most two entries in the kernel: its call, and one attempt to cancel. The completion queue has
/// room for all of them, so it can't overflow.
pub(super) struct Ring {
    ring: IoUring,
    image: Arc<Image>,
    slots: Vec<Slot>,
    /// What is done without waiting; kept for its capacity.
    now: Work,
    /// How many tokens are under way.
    under_way: usize,
    /// Entries for which the submission queue had no room.
    waiting: Vec<squeue::Entry>,
    /// Whether [`Engine::completed`] left something to submit.
    continued: bool,
    /// Completions taken out of the ring; kept for its capacity.
    reaped: Vec<cqueue::Entry>,
}

struct Slot {
    work: Work,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    UnderWay,
    /// Under way, and asked to be given up.
    Cancelled,
}

impl Ring {
    pub(super) fn new(image: Arc<Image>, depth: u16) -> io::Result<Self> {
        let entries = u32::from(depth).next_power_of_two();
        assert!(entries <= MAX_ENTRIES, "a depth of {depth}, which no virtqueue has");
        let ring = IoUring::builder().dontfork().setup_cqsize(entries * 2).build(entries)?;
        ring.submitter().register_files(&[image.file.as_raw_fd()])?;
        let slots = (0..depth).map(|_| Slot { work: Work::new(), state: State::Idle }).collect();
        let reaped = Vec::with_capacity(usize::from(depth) * 2);
        let now = Work::new();
        Ok(Self { ring, image, slots, now, under_way: 0, waiting: Vec::new(), continued: false, reaped })
    }

    fn push_call(&mut self, token: u16) {
        let work = &self.slots[usize::from(token)].work;
        let entry = entry(work.call()).user_data(token.into());
        // In a worker thread of the kernel, where it may wait.
        let entry = if work.stalled() || !self.image.knows_nowait { entry.flags(squeue::Flags::ASYNC) } else { entry };
        self.push(entry);
    }

    fn push(&mut self, entry: squeue::Entry) {
        let order_kept = self.waiting.is_empty();
        // SAFETY: what the entry points to stays good until its completion: memory by the contract of `start`, the
        // array of pieces because a slot's work changes only after its call has completed, and the queue is not dropped
        // before all have; the rest is static.
        if !order_kept || unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.waiting.push(entry);
        }
    }

    /// Moves what waited into the submission queue, as far as there is room.
    fn refill(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        let mut submission = self.ring.submission();
        let room = (submission.capacity() - submission.len()).min(self.waiting.len());
        for entry in self.waiting.drain(..room) {
            // SAFETY: as in `push`.
            unsafe { submission.push(&entry) }.expect("no more than there is room for");
        }
    }

    /// Ends a token's call: makes the next one, or tells how all of them went.
    fn ended(&mut self, token: u16, result: i32) -> Option<io::Result<()>> {
        let slot = &mut self.slots[usize::from(token)];
        assert!(slot.state != State::Idle, "the kernel completed token {token}, which is not under way");
        // SAFETY: the token is under way, so its memory is good by the contract of `start`.
        let next = unsafe { slot.work.returned(&self.image, result) };
        let result = match (next, slot.state) {
            (Next::Call, State::Cancelled) => Err(io::Error::from_raw_os_error(libc::ECANCELED)),
            (Next::Call, _) => {
                self.push_call(token);
                self.continued = true;
                return None;
            }
            // A call that was interrupted in order to cancel it may say so in its own way.
            (Next::End(Err(error)), State::Cancelled) if error.kind() == io::ErrorKind::Interrupted => {
                Err(io::Error::from_raw_os_error(libc::ECANCELED))
            }
            (Next::End(result), _) => result,
        };
        slot.state = State::Idle;
        self.under_way -= 1;
        Some(result)
    }

    /// Takes the kernel's completions in and calls `each` for the tokens that are through.
    fn reap(&mut self, each: &mut dyn FnMut(u16, io::Result<()>)) {
        let mut reaped = std::mem::take(&mut self.reaped);
        reaped.extend(self.ring.completion());
        for completion in reaped.drain(..) {
            // How an attempt to cancel went shows in the result of what it was about.
            if completion.user_data() & CANCELLATION != 0 {
                continue;
            }
            let token = completion.user_data() as u16;
            if let Some(result) = self.ended(token, completion.result()) {
                each(token, result);
            }
        }
        self.reaped = reaped;
    }
}

impl Engine for Ring {
    #[inline]
    unsafe fn now(&mut self, operation: Operation, pieces: &[DetachedSlice], len: u64) -> io::Result<u64> {
        // SAFETY: by this function's own contract.
        unsafe { move_now(&self.image, &mut self.now, operation, pieces, len) }
    }

    unsafe fn start(&mut self, token: u16, operation: Operation, memory: Option<DetachedSlice>) -> Started {
        let slot = &mut self.slots[usize::from(token)];
        assert!(slot.state == State::Idle, "token {token} is under way already");
        let len = memory.map_or(0, |memory| memory.len() as u64);
        if let Next::End(result) = slot.work.begin(&self.image, operation, memory.as_slice(), len) {
            return Started::Done(result);
        }
        slot.state = State::UnderWay;
        self.under_way += 1;
        self.push_call(token);
        Started::Pending
    }

    fn submit(&mut self) -> io::Result<()> {
        // Ends: each round hands something on, or counts as a refusal.
        let mut refusals = 0;
        loop {
            self.refill();
            let waiting = self.ring.submission().len();
            if waiting == 0 {
                self.continued = false;
                return Ok(());
            }
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted && refusals < MAX_REFUSALS => refusals += 1,
                // Something that ends makes room, and whoever waits for it comes back to `completed`. Where nothing is
                // there to end, nobody would.
                Err(_) if refusals < MAX_REFUSALS && waiting + self.waiting.len() >= self.under_way => {
                    refusals += 1;
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => {
                    self.continued = true;
                    return Err(error);
                }
            }
        }
    }

    fn completed(&mut self, each: &mut dyn FnMut(u16, io::Result<()>)) {
        self.reap(each);
        if self.continued {
            // Tried again at the next call; see above for why there is one.
            let _ = self.submit();
        }
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns its descriptor and lives as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    fn cancel(&mut self, token: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(token)) else { return };
        if slot.state == State::UnderWay {
            slot.state = State::Cancelled;
            self.push(opcode::AsyncCancel::new(token.into()).build().user_data(CANCELLATION | u64::from(token)));
            // Cancelling is for whoever can't wait, so it does not wait for a batch.
            let _ = self.submit();
        }
    }
}

/// Closing a ring does not wait for what is in it, and the kernel would go on writing to memory that is somebody else's by
/// then. So this waits.
impl Drop for Ring {
    fn drop(&mut self) {
        for token in 0..self.slots.len() as u16 {
            if self.slots[usize::from(token)].state == State::UnderWay {
                self.slots[usize::from(token)].state = State::Cancelled;
                self.push(opcode::AsyncCancel::new(token.into()).build().user_data(CANCELLATION | u64::from(token)));
            }
        }
        // Every call either completes or was never handed on. A cancelled one is not followed by another, so each
        // completion is one token less.
        while self.under_way > 0 {
            self.refill();
            if let Err(error) = self.ring.submitter().submit_and_wait(1) {
                if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) {
                    tracing::error!(%error, under_way = self.under_way, "cannot wait for the kernel, trying again");
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            self.reap(&mut |_, _| {});
        }
        // A ring that was closed keeps its files for some milliseconds, and a device could not be detached meanwhile.
        let _ = self.ring.submitter().unregister_files();
    }
}

fn entry(call: Call<'_>) -> squeue::Entry {
    match call {
        Call::Read { offset, pieces: &[piece] } => {
            opcode::Read::new(IMAGE, piece.as_ptr(), len(piece)).offset(offset).build()
        }
        Call::Read { offset, pieces } => {
            // A `DetachedSlice` is laid out as an `iovec`.
            opcode::Readv::new(IMAGE, pieces.as_ptr().cast(), pieces.len() as u32).offset(offset).build()
        }
        Call::Write { offset, pieces: &[piece], durability } => {
            opcode::Write::new(IMAGE, piece.as_ptr(), len(piece)).offset(offset).rw_flags(rw_flags(durability)).build()
        }
        Call::Write { offset, pieces, durability } => {
            opcode::Writev::new(IMAGE, pieces.as_ptr().cast(), pieces.len() as u32)
                .offset(offset)
                .rw_flags(rw_flags(durability))
                .build()
        }
        Call::Zeroes { offset, len } => opcode::Write::new(IMAGE, ZEROES.as_ptr(), len).offset(offset).build(),
        Call::Allocate { offset, len, mode } => opcode::Fallocate::new(IMAGE, len).offset(offset).mode(mode).build(),
        Call::Sync => opcode::Fsync::new(IMAGE).flags(types::FsyncFlags::DATASYNC).build(),
    }
}

/// What does not fit is left for the next call.
fn len(piece: DetachedSlice) -> u32 {
    u32::try_from(piece.len()).unwrap_or(1 << 30)
}
