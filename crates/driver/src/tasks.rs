//! A disk for `async` code: futures of `core`, and no runtime.
//!
//! [`Tasks`] is shared by the tasks of one executor. Whoever handles the device's interrupt (or a kernel's thread that
//! polls) calls [`Tasks::interrupt`], which wakes the tasks whose requests have come to their end.
//!
//! ```
//! use ringfence_dma::{Buffer, Mapper};
//! use ringfence_driver::Transport;
//! use ringfence_driver::blk::BlkError;
//! use ringfence_driver::tasks::Tasks;
//!
//! async fn copy<'a, T: Transport>(
//!     disk: &Tasks<'a, T, dyn Mapper + 'a>,
//!     buffer: Buffer<'a>,
//! ) -> Result<(), BlkError<T::Error>> {
//!     disk.read(0, &[buffer]).await?;
//!     disk.write(8, &[buffer]).await?;
//!     disk.flush().await?;
//!     Ok(())
//! }
//! ```

use crate::Transport;
use crate::blk::{Answer, Blk, BlkError, Completion, Request, RequestError, RequestId};
use alloc::vec::Vec;
use core::cell::RefCell;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll, Waker};
use ringfence_dma::{Buffer, Mapper};

/// A disk that the tasks of one executor share.
///
/// Wakers are called while the disk is in use: one that polls a task at once, instead of having it polled, panics.
///
/// A request whose future is dropped goes on: its buffers stay lent until the disk is done with them. A running disk
/// allocates nothing as long as no more than [`Tasks::new`]'s `tasks` of them wait for room at once.
#[derive(Debug)]
pub struct Tasks<'a, T: Transport, M: Mapper + ?Sized> {
    state: RefCell<State<'a, T, M>>,
}

#[derive(Debug)]
struct State<'a, T: Transport, M: Mapper + ?Sized> {
    disk: Blk<'a, T, M>,
    /// Requests under way, and those whose future has not seen yet how they ended.
    requests: Vec<(RequestId, Progress)>,
    /// Tasks that wait for room.
    crowd: Vec<Waker>,
}

#[derive(Debug)]
enum Progress {
    UnderWay(Waker),
    Ended(Result<Answer, RequestError>),
    /// Its future was dropped.
    Abandoned,
}

impl<'a, T: Transport, M: Mapper + ?Sized> Tasks<'a, T, M> {
    /// Shares `disk` among about so many tasks, and asks it to tell of what comes to its end.
    ///
    /// # Errors
    /// [`BlkError::Broken`].
    pub fn new(mut disk: Blk<'a, T, M>, tasks: usize) -> Result<Self, BlkError<T::Error>> {
        disk.listen()?;
        let (requests, crowd) = (Vec::with_capacity(tasks), Vec::with_capacity(tasks));
        Ok(Self { state: RefCell::new(State { disk, requests, crowd }) })
    }

    /// Fills `into` from `sector` on.
    pub fn read<'t>(&'t self, sector: u64, into: &'t [Buffer<'a>]) -> Operation<'t, 'a, T, M> {
        self.request(Request::Read { sector, into })
    }

    /// Stores `from` from `sector` on.
    pub fn write<'t>(&'t self, sector: u64, from: &'t [Buffer<'a>]) -> Operation<'t, 'a, T, M> {
        self.request(Request::Write { sector, from })
    }

    /// Makes durable what was written by requests that have completed.
    ///
    /// A disk that does not cache has nothing to make durable, and says so ([`BlkError::NotOffered`]).
    pub fn flush(&self) -> Operation<'_, 'a, T, M> {
        self.request(Request::Flush)
    }

    /// Anything that a disk may be asked for.
    pub fn request<'t>(&'t self, request: Request<'t, 'a>) -> Operation<'t, 'a, T, M> {
        Operation { tasks: self, request, stage: Stage::Asked }
    }

    /// The disk may have ended requests: wakes the tasks that wait for them, and for room. Never waits; may be called
    /// at any time, from the executor's own processor, and not from within a future's poll.
    ///
    /// # Errors
    /// [`BlkError::Broken`]; every task is woken then, and hears of it.
    pub fn interrupt(&self) -> Result<(), BlkError<T::Error>> {
        self.state.borrow_mut().interrupt()
    }

    /// For an executor that has nothing else to do, and no interrupts: waits as [`Transport::wait`] does, then does what
    /// [`interrupt`](Self::interrupt) does.
    ///
    /// # Errors
    /// Those of [`Blk::wait`].
    pub fn idle(&self) -> Result<(), BlkError<T::Error>> {
        let state = &mut *self.state.borrow_mut();
        let waited = state.disk.wait();
        state.interrupt()?;
        waited
    }

    /// The disk again. Requests that are under way go on, and end unheard.
    pub fn into_disk(self) -> Blk<'a, T, M> {
        self.state.into_inner().disk
    }
}

impl<'a, T: Transport, M: Mapper + ?Sized> State<'a, T, M> {
    fn interrupt(&mut self) -> Result<(), BlkError<T::Error>> {
        let result = self.reap();
        if result.is_err() {
            self.wake_all();
        }
        result
    }

    fn reap(&mut self) -> Result<(), BlkError<T::Error>> {
        loop {
            let mut room = false;
            while let Some(completion) = self.disk.poll()? {
                self.end(completion);
                room = true;
            }
            if room {
                self.crowd.drain(..).for_each(Waker::wake);
            }
            // What ended since the last look will not be told of.
            if !self.disk.listen()? {
                return Ok(());
            }
        }
    }

    fn end(&mut self, Completion { id, result }: Completion) {
        let Some(at) = self.requests.iter().position(|(known, _)| *known == id) else { return };
        match core::mem::replace(&mut self.requests[at].1, Progress::Ended(result)) {
            Progress::UnderWay(waker) => waker.wake(),
            Progress::Abandoned | Progress::Ended(_) => {
                self.requests.swap_remove(at);
            }
        }
    }

    fn wake_all(&mut self) {
        self.crowd.drain(..).for_each(Waker::wake);
        for (_, progress) in &self.requests {
            if let Progress::UnderWay(waker) = progress {
                waker.wake_by_ref();
            }
        }
    }

    /// Puts a request on its way; `None`: there is no room before another one has ended.
    fn submit(&mut self, request: Request<'_, 'a>, waker: &Waker) -> Result<Option<RequestId>, BlkError<T::Error>> {
        let under_way = self.requests.iter().any(|(_, progress)| !matches!(progress, Progress::Ended(_)));
        match self.disk.submit(request) {
            Ok(id) => {
                self.requests.push((id, Progress::UnderWay(waker.clone())));
                // The disk may have it nevertheless.
                self.disk
                    .notify()
                    .inspect_err(|_| self.requests.last_mut().expect("just pushed").1 = Progress::Abandoned)?;
                Ok(Some(id))
            }
            Err(error) if under_way && error.is_temporary() => {
                self.crowd.push(waker.clone());
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// How a request ended, if it has.
    fn ended(&mut self, id: RequestId, waker: &Waker) -> Option<Result<Answer, RequestError>> {
        let at = self.requests.iter().position(|(known, _)| *known == id)?;
        match &mut self.requests[at].1 {
            Progress::Ended(result) => {
                let result = *result;
                self.requests.swap_remove(at);
                Some(result)
            }
            Progress::UnderWay(earlier) => {
                earlier.clone_from(waker);
                None
            }
            Progress::Abandoned => None,
        }
    }

    fn abandon(&mut self, id: RequestId) {
        let Some(at) = self.requests.iter().position(|(known, _)| *known == id) else { return };
        match &mut self.requests[at].1 {
            Progress::Ended(_) => {
                self.requests.swap_remove(at);
            }
            progress => *progress = Progress::Abandoned,
        }
    }
}

/// A request, as a future: how it ends. Nothing is asked for before it is first polled.
#[must_use = "a future does nothing unless it is polled"]
#[derive(Debug)]
pub struct Operation<'t, 'a, T: Transport, M: Mapper + ?Sized> {
    tasks: &'t Tasks<'a, T, M>,
    request: Request<'t, 'a>,
    stage: Stage,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    Asked,
    UnderWay(RequestId),
    Over,
}

impl<T: Transport, M: Mapper + ?Sized> Future for Operation<'_, '_, T, M> {
    type Output = Result<Answer, BlkError<T::Error>>;

    /// Panics where it is polled after its end, as any future may.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let waker = context.waker();
        let state = &mut *self.tasks.state.borrow_mut();
        match self.stage {
            Stage::Asked => match state.submit(self.request, waker) {
                Ok(Some(id)) => self.stage = Stage::UnderWay(id),
                Ok(None) => {}
                Err(error) => {
                    self.stage = Stage::Over;
                    return Poll::Ready(Err(error));
                }
            },
            Stage::UnderWay(id) => {
                // Whoever polls without an interrupt gets on as well.
                let reaped = state.interrupt();
                if let Some(result) = state.ended(id, waker) {
                    self.stage = Stage::Over;
                    return Poll::Ready(result.map_err(BlkError::Failed));
                }
                if let Err(error) = reaped {
                    state.abandon(id);
                    self.stage = Stage::Over;
                    return Poll::Ready(Err(error));
                }
            }
            Stage::Over => panic!("a request is polled after its end"),
        }
        Poll::Pending
    }
}

impl<T: Transport, M: Mapper + ?Sized> Drop for Operation<'_, '_, T, M> {
    fn drop(&mut self) {
        if let Stage::UnderWay(id) = self.stage {
            self.tasks.state.borrow_mut().abandon(id);
        }
    }
}
