//! Devices for `async` code: futures of `core`, and no runtime.
//!
//! [`Tasks`] has a driver that the tasks of one executor share: a [disk](crate::blk::Blk), a [card](crate::net::Net), a
//! [console](crate::console::Console) or a [random source](crate::rng::Rng). Whoever handles the device's interrupt (or a
//! kernel's thread that polls) calls [`Tasks::interrupt`], which wakes the tasks whose requests have come to their end.
//!
//! ```
//! use ringfence_dma::{Buffer, Mapper};
//! use ringfence_driver::blk::{Blk, BlkError};
//! use ringfence_driver::net::Net;
//! use ringfence_driver::tasks::Tasks;
//! use ringfence_driver::{LoanError, Transport};
//!
//! async fn copy<'a, T: Transport>(
//!     disk: &Tasks<Blk<'a, T, dyn Mapper + 'a>>,
//!     buffer: Buffer<'a>,
//! ) -> Result<(), BlkError<T::Error>> {
//!     disk.read(0, &[buffer]).await?;
//!     disk.write(8, &[buffer]).await?;
//!     disk.flush().await?;
//!     Ok(())
//! }
//!
//! async fn echo<'a, T: Transport>(
//!     card: &Tasks<Net<'a, T, dyn Mapper + 'a>>,
//!     buffer: Buffer<'a>,
//! ) -> Result<(), LoanError<T::Error>> {
//!     loop {
//!         let len = card.receive(buffer).await?;
//!         card.send(&[buffer.sub(0, len)]).await?;
//!     }
//! }
//! ```

mod blk;
mod loans;

pub use loans::Transfer;

use alloc::vec::Vec;
use core::cell::RefCell;
use core::fmt::Debug;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll, Waker};

/// A driver that tasks can share: what [`Tasks`] wants of it. Nothing here waits but [`wait`](Self::wait).
pub trait Shared {
    /// Names a request that is under way, and nothing else later.
    type Id: Copy + Eq + Debug;
    /// Something to ask the device for, over buffers that are somewhere for as long as the request is made.
    type Request<'r>: Copy + Debug
    where
        Self: 'r;
    /// How a request ends that goes well.
    type Answer: Debug;
    /// How one does not, and what is wrong with a device.
    type Error: Debug;

    /// Puts a request on its way.
    ///
    /// # Errors
    /// Nothing was put on its way then.
    fn submit(&mut self, request: Self::Request<'_>) -> Result<Self::Id, Self::Error>;

    /// Whether it may work once a request that is under way has come to its end.
    fn is_temporary(error: &Self::Error) -> bool;

    /// Tells the device of what was submitted.
    ///
    /// # Errors
    /// The way to the device, or the device.
    fn notify(&mut self) -> Result<(), Self::Error>;

    /// A request that has come to its end, if there is one.
    ///
    /// # Errors
    /// The device is of no use any more.
    #[expect(clippy::type_complexity, reason = "which one, and how: a name for that would be read once")]
    fn poll(&mut self) -> Result<Option<(Self::Id, Result<Self::Answer, Self::Error>)>, Self::Error>;

    /// Asks the device to tell of the next request that ends. `true`: one has already.
    ///
    /// # Errors
    /// As [`poll`](Self::poll).
    fn listen(&mut self) -> Result<bool, Self::Error>;

    /// Waits until [`poll`](Self::poll) may have something.
    ///
    /// # Errors
    /// The way to the device, or the device.
    fn wait(&mut self) -> Result<(), Self::Error>;

    /// Resets the queues alone, and has them go on.
    ///
    /// # Errors
    /// The way to the device, or that it does not do that.
    fn restart(&mut self) -> Result<(), Self::Error>;

    /// How a request ends that nobody knows the end of: it was under way when its queue was [restarted](Self::restart).
    fn lost() -> Self::Error;
}

/// A driver that the tasks of one executor share.
///
/// Wakers are called while the driver is in use: one that polls a task at once, instead of having it polled, panics.
///
/// A request whose future is dropped goes on: its buffers stay lent until the device is done with them. A running device
/// allocates nothing as long as no more than [`Tasks::new`]'s `tasks` of them wait for room at once.
#[derive(Debug)]
pub struct Tasks<D: Shared> {
    state: RefCell<State<D>>,
}

#[derive(Debug)]
struct State<D: Shared> {
    driver: D,
    /// Requests under way, and those whose future has not seen yet how they ended.
    requests: Vec<(D::Id, Progress<D>)>,
    /// Tasks that wait for room.
    crowd: Vec<Waker>,
}

#[derive(Debug)]
enum Progress<D: Shared> {
    UnderWay(Waker),
    Ended(Result<D::Answer, D::Error>),
    /// Its future was dropped.
    Abandoned,
}

impl<D: Shared> Tasks<D> {
    /// Shares `driver` among about so many tasks, and asks it to tell of what comes to its end.
    ///
    /// # Errors
    /// The device broke the rules already.
    pub fn new(mut driver: D, tasks: usize) -> Result<Self, D::Error> {
        driver.listen()?;
        let (requests, crowd) = (Vec::with_capacity(tasks), Vec::with_capacity(tasks));
        Ok(Self { state: RefCell::new(State { driver, requests, crowd }) })
    }

    /// Anything that the device may be asked for.
    pub fn request<'t>(&'t self, request: D::Request<'t>) -> Operation<'t, D> {
        Operation { tasks: self, request, stage: Stage::Asked }
    }

    /// The device may have ended requests: wakes the tasks that wait for them, and for room. Never waits; may be called
    /// at any time, from the executor's own processor, and not from within a future's poll.
    ///
    /// # Errors
    /// The device is of no use any more; every task is woken then, and hears of it.
    pub fn interrupt(&self) -> Result<(), D::Error> {
        self.state.borrow_mut().interrupt()
    }

    /// For an executor that has nothing else to do, and no interrupts: waits as
    /// [`Transport::wait`](crate::Transport::wait) does, then does what [`interrupt`](Self::interrupt) does.
    ///
    /// # Errors
    /// Those of [`Shared::wait`].
    pub fn idle(&self) -> Result<(), D::Error> {
        let state = &mut *self.state.borrow_mut();
        let waited = state.driver.wait();
        state.interrupt()?;
        waited
    }

    /// Has the device go on with queues that are reset alone. Tasks whose requests were under way hear that they are lost.
    ///
    /// # Errors
    /// Those of [`Shared::restart`].
    pub fn restart(&self) -> Result<(), D::Error> {
        let state = &mut *self.state.borrow_mut();
        state.driver.restart()?;
        let reaped = state.interrupt();
        // What the driver itself says nothing of.
        state.requests.retain_mut(|(_, progress)| match progress {
            Progress::UnderWay(waker) => {
                waker.wake_by_ref();
                *progress = Progress::Ended(Err(D::lost()));
                true
            }
            Progress::Ended(_) => true,
            Progress::Abandoned => false,
        });
        state.crowd.drain(..).for_each(Waker::wake);
        reaped
    }

    /// The driver again. Requests that are under way go on, and end unheard.
    pub fn into_driver(self) -> D {
        self.state.into_inner().driver
    }
}

impl<D: Shared> State<D> {
    fn interrupt(&mut self) -> Result<(), D::Error> {
        let result = self.reap();
        if result.is_err() {
            self.wake_all();
        }
        result
    }

    fn reap(&mut self) -> Result<(), D::Error> {
        loop {
            let mut room = false;
            while let Some((id, result)) = self.driver.poll()? {
                self.end(id, result);
                room = true;
            }
            if room {
                self.crowd.drain(..).for_each(Waker::wake);
            }
            // What ended since the last look will not be told of.
            if !self.driver.listen()? {
                return Ok(());
            }
        }
    }

    fn end(&mut self, id: D::Id, result: Result<D::Answer, D::Error>) {
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
    fn submit(&mut self, request: D::Request<'_>, waker: &Waker) -> Result<Option<D::Id>, D::Error> {
        let under_way = self.requests.iter().any(|(_, progress)| !matches!(progress, Progress::Ended(_)));
        match self.driver.submit(request) {
            Ok(id) => {
                self.requests.push((id, Progress::UnderWay(waker.clone())));
                // The device may have it nevertheless.
                self.driver
                    .notify()
                    .inspect_err(|_| self.requests.last_mut().expect("just pushed").1 = Progress::Abandoned)?;
                Ok(Some(id))
            }
            Err(error) if under_way && D::is_temporary(&error) => {
                self.crowd.push(waker.clone());
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// How a request ended, if it has.
    fn ended(&mut self, id: D::Id, waker: &Waker) -> Option<Result<D::Answer, D::Error>> {
        let at = self.requests.iter().position(|(known, _)| *known == id)?;
        if let Progress::UnderWay(earlier) = &mut self.requests[at].1 {
            earlier.clone_from(waker);
            return None;
        }
        match self.requests.swap_remove(at).1 {
            Progress::Ended(result) => Some(result),
            Progress::UnderWay(_) | Progress::Abandoned => unreachable!("a future that was dropped does not ask"),
        }
    }

    fn abandon(&mut self, id: D::Id) {
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
pub struct Operation<'t, D: Shared> {
    tasks: &'t Tasks<D>,
    request: D::Request<'t>,
    stage: Stage<D::Id>,
}

#[derive(Clone, Copy, Debug)]
enum Stage<I> {
    Asked,
    UnderWay(I),
    Over,
}

/// Nothing of it is borrowed from itself.
impl<D: Shared> Unpin for Operation<'_, D> {}

impl<D: Shared> Future for Operation<'_, D> {
    type Output = Result<D::Answer, D::Error>;

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
                    return Poll::Ready(result);
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

impl<D: Shared> Drop for Operation<'_, D> {
    fn drop(&mut self) {
        if let Stage::UnderWay(id) = self.stage {
            self.tasks.state.borrow_mut().abandon(id);
        }
    }
}
