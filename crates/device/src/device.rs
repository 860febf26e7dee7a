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
    /// It goes on; its token comes back from [`Handler::completed`].
    Pending,
}

/// One queue of a device: what is done with its requests. Used from one thread.
pub trait Handler: Send {
    /// Starts a request whose every byte can be reached. Must not wait for anything.
    fn start(&mut self, token: Token, request: &Request<'_>) -> Outcome;

    /// A request of which some byte can't be reached; returns how many bytes of its writable part were written.
    /// Nothing of it may be carried out; a device with a status field says there that it failed.
    fn unreachable(&mut self, request: &Unreachable<'_>) -> u32;

    /// Hands on what was started since the last call: once a batch.
    fn submit(&mut self) {}

    /// Appends the tokens of pending requests that are done.
    fn completed(&mut self, _done: &mut Vec<Token>) {}

    /// Brings a request that was pending to its end, and returns how many bytes of its writable part were written.
    fn finish(&mut self, _token: Token, _request: &Request<'_>) -> u32 {
        0
    }

    /// Becomes readable when something completed, for a thread with nothing else to do.
    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
