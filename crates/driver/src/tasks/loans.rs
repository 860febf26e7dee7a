//! The simpler devices that tasks share: what is lent to them comes back.

use super::{Operation, Shared, Tasks};
use crate::console::Console;
use crate::lending::{LoanError, LoanId};
use crate::net::Net;
use crate::rng::Rng;
use crate::{Side, Transport};
use ringfence_dma::{Buffer, Mapper};

/// What a device with two directions may be asked for.
#[derive(Clone, Copy, Debug)]
pub enum Transfer<'r, 'a> {
    /// Take what is in these.
    Send(&'r [Buffer<'a>]),
    /// Fill this.
    Receive(Buffer<'a>),
}

impl<'a, T: Transport, M: Mapper + ?Sized> Tasks<Rng<'a, T, M>> {
    /// Fills a part of `into`, from its beginning, and says how much.
    pub fn fill(&self, into: Buffer<'a>) -> Operation<'_, Rng<'a, T, M>> {
        self.request(into)
    }
}

impl<'a, T: Transport, M: Mapper + ?Sized> Tasks<Net<'a, T, M>> {
    /// Waits for a packet in `buffer`, of [`Net::packet_len`] bytes at least, and says how long it is. Packets arrive in the
    /// buffers of the tasks that wait, in their order: who wants to miss none has several of them wait.
    pub fn receive(&self, buffer: Buffer<'a>) -> Operation<'_, Net<'a, T, M>> {
        self.request(Transfer::Receive(buffer))
    }

    /// Sends a packet, and waits until its buffers are back. No bytes come back.
    pub fn send<'t>(&'t self, packet: &'t [Buffer<'a>]) -> Operation<'t, Net<'a, T, M>> {
        self.request(Transfer::Send(packet))
    }
}

impl<'a, T: Transport, M: Mapper + ?Sized> Tasks<Console<'a, T, M>> {
    /// Waits for input in `buffer`, and says how much it is.
    pub fn read(&self, buffer: Buffer<'a>) -> Operation<'_, Console<'a, T, M>> {
        self.request(Transfer::Receive(buffer))
    }

    /// Sends what is in `output`, and waits until it is gone. No bytes come back.
    pub fn write<'t>(&'t self, output: &'t [Buffer<'a>]) -> Operation<'t, Console<'a, T, M>> {
        self.request(Transfer::Send(output))
    }
}

/// What all of them do alike. Those with one queue have [`Side::In`] alone.
macro_rules! shared {
    ($driver:ident, $request:ty, |$self:ident, $asked:ident: $one:ty| $submit:expr) => {
        impl<'a, T: Transport, M: Mapper + ?Sized> Shared for $driver<'a, T, M> {
            type Id = (Side, LoanId);
            type Request<'r>
                = $request
            where
                Self: 'r;
            type Answer = usize;
            type Error = LoanError<T::Error>;

            fn submit(&mut self, $asked: $one) -> Result<Self::Id, Self::Error> {
                let $self = self;
                $submit
            }

            fn is_temporary(error: &Self::Error) -> bool {
                error.is_temporary()
            }

            fn notify(&mut self) -> Result<(), Self::Error> {
                $driver::notify(self)
            }

            fn poll(&mut self) -> Result<Option<(Self::Id, Result<usize, Self::Error>)>, Self::Error> {
                self.came_back()
            }

            fn listen(&mut self) -> Result<bool, Self::Error> {
                self.lender.listen()
            }

            fn wait(&mut self) -> Result<(), Self::Error> {
                self.lender.wait_for_any()
            }

            fn restart(&mut self) -> Result<(), Self::Error> {
                $driver::restart(self)
            }

            fn lost() -> Self::Error {
                LoanError::Lost
            }
        }
    };
}

shared!(Rng, Buffer<'a>, |rng, into: Buffer<'a>| Ok((Side::In, rng.submit(into)?)));
shared!(Net, Transfer<'r, 'a>, |net, transfer: Transfer<'_, 'a>| match transfer {
    Transfer::Send(packet) => Ok((Side::Out, net.send(packet)?)),
    Transfer::Receive(buffer) => Ok((Side::In, net.offer(buffer)?)),
});
shared!(Console, Transfer<'r, 'a>, |console, transfer: Transfer<'_, 'a>| match transfer {
    Transfer::Send(output) => Ok((Side::Out, console.send(output)?)),
    Transfer::Receive(buffer) => Ok((Side::In, console.offer(buffer)?)),
});
