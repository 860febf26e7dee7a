use crate::{Request, Unreachable};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// A virtio device, as every transport needs it. Shared by the transport and the threads of its queues.
pub trait Device: Send + Sync {
    /// The device type's name, for logs.
    fn name(&self) -> &'static str;

    /// The virtio device ID (§5).
    fn id(&self) -> u16;

    /// The feature bits of the device type (§2.2: 0 to 23, 50 to 127). What rings and transports offer is theirs to add.
    fn features(&self) -> u64;

    /// How many queues the device has at the most.
    fn queues(&self) -> u16;

    /// The device's configuration space (§2.5) in whole.
    fn config(&self) -> Vec<u8>;

    /// `len` bytes of the configuration space from `offset`; `None` where it can't be read now. What lies beyond the
    /// device's fields reads as zero: front-ends ask for all fields that they know of.
    fn read_config(&self, offset: u32, len: u32) -> Option<Vec<u8>> {
        let config = self.config();
        Some((offset..offset.saturating_add(len)).map(|at| config.get(at as usize).copied().unwrap_or(0)).collect())
    }

    /// Writes to the configuration space, as a driver does: a field at a time.
    ///
    /// # Errors
    /// The device has no field there that a driver may write.
    fn write_config(&self, _offset: u32, _data: &[u8]) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "the device's configuration can't be written"))
    }

    /// Whom to tell of changes of the configuration space.
    fn watch_config(&self, _changed: Box<dyn Fn() + Send + Sync>) {}

    /// How many queues a transport is told of that asks: of a network card, pairs.
    fn queue_groups(&self) -> u16 {
        self.queues()
    }

    /// A driver took `features`, of all kinds. Queues that open after this are its.
    ///
    /// # Errors
    /// The device can't work with these now.
    fn take(&self, _features: u64) -> io::Result<()> {
        Ok(())
    }

    /// The transport's device status (§2.1) is this now; with 0 all queues have ended.
    fn set_status(&self, _status: u8) {}

    /// The device was reset (§2.4): all queues have ended.
    fn reset(&self) {}

    /// Makes queue `index` ready to have up to `depth` requests under way, for a driver that took `features`.
    ///
    /// # Errors
    /// What the device's resources could not give; the queue then does not start.
    fn open_queue(self: Arc<Self>, index: u16, depth: u16, features: u64) -> io::Result<Box<dyn Handler>>;
}

/// Names a request that is under way; below the queue's depth, and not given again before it has finished.
pub type Token = u16;

/// What became of a request that was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done, and this many bytes of its writable part were written, counted from the first.
    Done(u32),
    /// It goes on without its memory; its token comes back from [`Handler::completed`].
    Pending,
    /// There is no room for it now, and nothing of it was done: an answer to [`Handler::start`]. It is offered again, and
    /// none that came after it before.
    NoRoom,
}

/// A request that comes back, and the bytes of it that its handler touches next: nothing else of it has to be in reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Back {
    /// Which.
    pub token: Token,
    /// The first byte of its readable part from which on all are read; its length where none is.
    pub readable_from: u32,
    /// The first byte of its writable part from which on all are written; its length where none is.
    pub writable_from: u32,
}

/// One queue of a device: what is done with its requests. Used from one thread.
///
/// A handler has a request's memory during a call and never between: whoever takes memory away waits for no device.
pub trait Handler: Send {
    /// Whether requests start in the driver's order and end in that of [`Handler::completed`], whatever has to be waited for
    /// until memory is in reach: as streams of packets or bytes need it, and packets that fill several buffers.
    fn is_in_order(&self) -> bool {
        false
    }

    /// Whether a request may be carried out twice, and those beside it in between, as long as the driver was not told that any
    /// of them ended: as those of a disk.
    fn may_repeat(&self) -> bool {
        false
    }

    /// Whether requests without a byte to read start as soon as they come: it is looked for where their bytes are, and
    /// nobody waits for that before [`Back`] names them. For buffers that are posted and filled later: one that is not
    /// there yet when something arrives is of no use.
    fn starts_unseen(&self) -> bool {
        false
    }

    /// Starts a request whose every byte can be reached, or every byte to be read: see [`Handler::starts_unseen`]. Must not
    /// wait for anything.
    fn start(&mut self, token: Token, request: &Request<'_>) -> Outcome;

    /// A request of which some byte can't be reached; returns how many bytes of its writable part were written.
    /// Nothing of it may be carried out, or no more than was; a device with a status field says there that it failed.
    fn unreachable(&mut self, request: &Unreachable<'_>) -> u32;

    /// Hands on what was started since the last call: once a batch.
    fn submit(&mut self) {}

    /// Appends the pending requests that have come as far as they can without their memory.
    fn completed(&mut self, _back: &mut Vec<Back>) {}

    /// Brings a request that came back to its end, or further. Of its memory there is what was asked for.
    fn go_on(&mut self, _token: Token, _request: &Request<'_>) -> Outcome {
        unreachable!("a device whose requests are never pending")
    }

    /// A request that came back and will not go on.
    fn forget(&mut self, _token: Token) {}

    /// The queue stops, and takes nothing new: appends the pending requests that have not begun and may never, such as the
    /// receive buffers of a network card. They start anew when the queue goes on.
    fn recall(&mut self, _unbegun: &mut Vec<Token>) {}

    /// Asks for a pending request to be given up. It comes back all the same, sooner if that works.
    fn cancel(&mut self, _token: Token) {}

    /// Nobody waits any more for the requests that are pending. The handler is about to be dropped, which takes as long
    /// as they do, and others of the same device may be at work before that is over.
    fn abandon(&mut self) {}

    /// Asks for [`Handler::completion_fd`] to tell of what completes next. `true`: something has already.
    fn listen(&mut self) -> bool {
        false
    }

    /// Becomes readable when something completed, for a thread with nothing else to do.
    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
