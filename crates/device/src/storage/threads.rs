//! Operations by threads that wait, for what no ring of the kernel's can do.

use super::bounce::Engine;
use super::{Operation, Started};
use crate::eventfd::{hush, ring};
use ringfence_dma::DetachedSlice;
use rustix::event::{EventfdFlags, eventfd};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// What threads do operations on.
pub(super) trait Carry: Send + Sync + 'static {
    /// Moves as many bytes as can be without waiting, in the thread that calls: see [`Engine::now`].
    ///
    /// # Safety
    /// The pieces are good until this returns.
    unsafe fn now(&self, _operation: Operation, _pieces: &[DetachedSlice], _len: u64) -> io::Result<u64> {
        Ok(0)
    }

    /// Carries an operation out, to its end. `memory` is empty for those that have no data.
    fn carry_out(&self, operation: Operation, memory: &mut [u8]) -> io::Result<()>;
}

/// How many operations of a queue are carried out at once.
const THREADS: usize = 4;

pub(super) struct Threads<C> {
    shared: Arc<Shared<C>>,
    /// Started, and not yet handed on.
    batch: Vec<Job>,
    /// Ended, taken from the threads; kept for its capacity.
    taken: Vec<(u16, io::Result<()>)>,
    threads: Vec<JoinHandle<()>>,
}

/// What a queue and its threads share.
struct Shared<C> {
    image: Arc<C>,
    jobs: Mutex<Jobs>,
    /// There are jobs, or there will be none any more.
    changed: Condvar,
    ended: Mutex<Vec<(u16, io::Result<()>)>>,
    /// How many have `ended`, for looking without taking the lock.
    ended_count: AtomicUsize,
    /// Readable while something has `ended`; changed under its lock.
    signal: OwnedFd,
}

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    closed: bool,
}

struct Job {
    token: u16,
    operation: Operation,
    memory: Option<DetachedSlice>,
}

impl<C: Carry> Threads<C> {
    pub(super) fn new(name: &str, image: &Arc<C>, depth: u16) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            image: Arc::clone(image),
            jobs: Mutex::default(),
            changed: Condvar::new(),
            ended: Mutex::default(),
            ended_count: AtomicUsize::new(0),
            signal: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        });
        let mut queue = Self { shared, batch: Vec::new(), taken: Vec::new(), threads: Vec::new() };
        for _ in 0..THREADS.min(depth.into()) {
            let shared = Arc::clone(&queue.shared);
            // Those that started end with the queue if one can't.
            queue.threads.push(std::thread::Builder::new().name(name.into()).spawn(move || shared.work())?);
        }
        Ok(queue)
    }
}

impl<C: Carry> Engine for Threads<C> {
    #[inline]
    unsafe fn now(&mut self, operation: Operation, pieces: &[DetachedSlice], len: u64) -> io::Result<u64> {
        // SAFETY: by this function's own contract.
        unsafe { self.shared.image.now(operation, pieces, len) }
    }

    unsafe fn start(&mut self, token: u16, operation: Operation, memory: Option<DetachedSlice>) -> Started {
        self.batch.push(Job { token, operation, memory });
        Started::Pending
    }

    fn submit(&mut self) -> io::Result<()> {
        if !self.batch.is_empty() {
            lock(&self.shared.jobs).waiting.extend(self.batch.drain(..));
            self.shared.changed.notify_all();
        }
        Ok(())
    }

    fn completed(&mut self, each: &mut dyn FnMut(u16, io::Result<()>)) {
        if self.shared.ended_count.load(Ordering::Acquire) == 0 {
            return;
        }
        {
            let mut ended = lock(&self.shared.ended);
            std::mem::swap(&mut *ended, &mut self.taken);
            self.shared.ended_count.store(0, Ordering::Relaxed);
            // Under the lock, as its counterpart is: a signal stands exactly while something has ended. It can't fail:
            // there is one.
            hush(self.shared.signal.as_fd());
        }
        for (token, result) in self.taken.drain(..) {
            each(token, result);
        }
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.shared.signal.as_fd()
    }

    fn cancel(&mut self, token: u16) {
        // What a thread has begun it brings to its end.
        let waiting = {
            let mut jobs = lock(&self.shared.jobs);
            let handed_on = jobs.waiting.iter().position(|job| job.token == token);
            handed_on.and_then(|index| jobs.waiting.remove(index))
        };
        let kept = self.batch.iter().position(|job| job.token == token);
        if waiting.or_else(|| kept.map(|index| self.batch.remove(index))).is_some() {
            self.shared.end(token, Err(io::Error::from_raw_os_error(libc::ECANCELED)));
        }
    }
}

/// What no thread has begun is dropped, and the rest is waited for.
impl<C> Drop for Threads<C> {
    fn drop(&mut self) {
        {
            let mut jobs = lock(&self.shared.jobs);
            jobs.closed = true;
            jobs.waiting.clear();
        }
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            thread.join().expect("a thread catches what its jobs throw");
        }
    }
}

impl<C> Shared<C> {
    fn next(&self) -> Option<Job> {
        let mut jobs = lock(&self.jobs);
        loop {
            if let Some(job) = jobs.waiting.pop_front() {
                return Some(job);
            }
            if jobs.closed {
                return None;
            }
            jobs = self.changed.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn end(&self, token: u16, result: io::Result<()>) {
        let mut ended = lock(&self.ended);
        if ended.is_empty() {
            // Can't fail: the counter is 0.
            ring(self.signal.as_fd());
        }
        ended.push((token, result));
        self.ended_count.store(ended.len(), Ordering::Release);
    }
}

impl<C: Carry> Shared<C> {
    /// What a thread does until the queue goes.
    fn work(&self) {
        while let Some(Job { token, operation, memory }) = self.next() {
            // An image from a stranger may lead a format's code where its author did not look.
            let result = catch_unwind(AssertUnwindSafe(|| match memory {
                Some(memory) => {
                    // SAFETY: nobody else touches it until the token comes back, or the engine is gone, by the
                    // contract of `start`; buffers are initialised when they are made.
                    let memory = unsafe { std::slice::from_raw_parts_mut(memory.as_ptr(), memory.len()) };
                    self.image.carry_out(operation, memory)
                }
                None => self.image.carry_out(operation, &mut []),
            }));
            self.end(token, result.unwrap_or_else(|_| Err(io::ErrorKind::Other.into())));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
