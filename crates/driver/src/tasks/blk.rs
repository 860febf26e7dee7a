//! A disk that tasks share.

use super::{Operation, Shared, Tasks};
use crate::Transport;
use crate::blk::{Answer, Blk, BlkError, Completion, Request, RequestError, RequestId};
use ringfence_dma::{Buffer, Mapper};

impl<'a, T: Transport, M: Mapper + ?Sized> Tasks<Blk<'a, T, M>> {
    /// Fills `into` from `sector` on.
    pub fn read<'t>(&'t self, sector: u64, into: &'t [Buffer<'a>]) -> Operation<'t, Blk<'a, T, M>> {
        self.request(Request::Read { sector, into })
    }

    /// Stores `from` from `sector` on.
    pub fn write<'t>(&'t self, sector: u64, from: &'t [Buffer<'a>]) -> Operation<'t, Blk<'a, T, M>> {
        self.request(Request::Write { sector, from })
    }

    /// Makes durable what was written by requests that have completed.
    ///
    /// A disk that does not cache has nothing to make durable, and says so ([`BlkError::NotOffered`]).
    pub fn flush(&self) -> Operation<'_, Blk<'a, T, M>> {
        self.request(Request::Flush)
    }
}

impl<'a, T: Transport, M: Mapper + ?Sized> Shared for Blk<'a, T, M> {
    type Id = RequestId;
    type Request<'r>
        = Request<'r, 'a>
    where
        Self: 'r;
    type Answer = Answer;
    type Error = BlkError<T::Error>;

    fn submit(&mut self, request: Request<'_, 'a>) -> Result<RequestId, Self::Error> {
        Blk::submit(self, request)
    }

    fn is_temporary(error: &Self::Error) -> bool {
        error.is_temporary()
    }

    fn notify(&mut self) -> Result<(), Self::Error> {
        Blk::notify(self)
    }

    fn poll(&mut self) -> Result<Option<(RequestId, Result<Answer, Self::Error>)>, Self::Error> {
        Ok(Blk::poll(self)?.map(|Completion { id, result }| (id, result.map_err(BlkError::Failed))))
    }

    fn listen(&mut self) -> Result<bool, Self::Error> {
        Blk::listen(self)
    }

    fn wait(&mut self) -> Result<(), Self::Error> {
        Blk::wait(self)
    }

    fn restart(&mut self) -> Result<(), Self::Error> {
        Blk::restart(self)
    }

    fn lost() -> Self::Error {
        BlkError::Failed(RequestError::Lost)
    }
}
