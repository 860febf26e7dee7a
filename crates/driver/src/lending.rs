//! What the drivers of simple devices have in common: a queue through which buffers are lent, a chain for each, and come
//! back in whatever order the device likes.

use crate::loans::Loans;
use crate::queue::{Piece, Pieces, Queue};
use crate::{Host, Running, StartError, Transport, Wants, start};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::{fmt, mem};
use ringfence_dma::{Access, Buffer, BusAddr, DmaError, Mapper};
use ringfence_ring::{AddError, Descriptor, DeviceError};

/// Names something that is lent. Never names anything else later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LoanId {
    slot: u16,
    generation: u64,
}

/// Which way something goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// From the device.
    In,
    /// To it.
    Out,
}

/// Why a device did not do as asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoanError<E> {
    /// As much as possible is lent already: wait until something comes back.
    Busy,
    /// A buffer can't be lent to the device; see [`DmaError::is_transient`].
    Dma(DmaError),
    /// Too little room.
    TooShort {
        /// Bytes there are.
        len: usize,
        /// Bytes it takes.
        needed: usize,
    },
    /// Too much at once: split it.
    TooLong {
        /// How much: pieces of memory, or bytes.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// The device says that all went well and that it wrote less than that takes.
    Short {
        /// Bytes written, by its own account.
        written: u32,
        /// Bytes expected.
        expected: u32,
    },
    /// The device broke the rules of rings; it is of no use any more.
    Broken(DeviceError),
    /// The device, or the way to it, does not do that.
    NotOffered,
    /// The queue was restarted before the device was done with it: nobody knows what became of it.
    Lost,
    /// The device says that it broke down (DEVICE_NEEDS_RESET), and no queue of it can be reset alone: start it anew.
    NeedsReset {
        /// Its status.
        status: u8,
    },
    /// The way to the device failed.
    Transport(E),
}

impl<E: fmt::Display> fmt::Display for LoanError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LoanError::Busy => f.write_str("as much as possible is lent to the device already"),
            LoanError::Dma(error) => write!(f, "a buffer can't be lent to the device: {error}"),
            LoanError::TooShort { len, needed } => write!(f, "{len} bytes are too few, it takes {needed}"),
            LoanError::TooLong { count, max } => write!(f, "{count} is more than the {max} that may be lent at once"),
            LoanError::Short { written, expected } => {
                write!(f, "the device says that it wrote {written} bytes, and it takes {expected}")
            }
            LoanError::Lost => f.write_str("the queue was restarted before the device was done"),
            LoanError::NotOffered => f.write_str("the device does not offer that"),
            LoanError::Broken(error) => write!(f, "the device broke the rules: {error}"),
            LoanError::NeedsReset { status } => {
                write!(f, "the device broke down, and needs a reset (status {status:#x})")
            }
            LoanError::Transport(error) => write!(f, "the device can't be reached: {error}"),
        }
    }
}

impl<E: core::error::Error> core::error::Error for LoanError<E> {}

impl<E> LoanError<E> {
    /// Whether it may work once something that is lent has come back.
    pub fn is_temporary(&self) -> bool {
        match self {
            LoanError::Busy => true,
            LoanError::Dma(error) => error.is_transient(),
            _ => false,
        }
    }
}

/// A part of a chain's head.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub(crate) offset: u32,
    pub(crate) len: u32,
    pub(crate) access: Access,
}

/// Something that came back.
#[derive(Debug)]
pub(crate) struct Back<'a> {
    pub(crate) id: LoanId,
    /// The first of its buffers, if it had any.
    pub(crate) buffer: Option<Buffer<'a>>,
    /// How many bytes the device says that it wrote, head included: no more than there was room for.
    pub(crate) written: u32,
    /// The head, which is the driver's until this slot is lent again.
    pub(crate) head: Piece<'a>,
}

/// The next that came back, whichever way, and how many bytes are in it.
pub(crate) type CameBack<E> = Result<Option<((Side, LoanId), Result<usize, LoanError<E>>)>, LoanError<E>>;

/// A queue and what is lent through it.
///
/// Each chain may have a head: a bit of coherent memory, for a header or for a whole request.
#[derive(Debug)]
pub(crate) struct Lending<'a, M: Mapper + ?Sized> {
    number: u16,
    mapper: &'a M,
    queue: Queue<'a, M>,
    heads: Pieces<'a, M>,
    /// By the ring's token.
    slots: Box<[Slot<'a, M>]>,
    /// Counts loans.
    generation: u64,
    /// How many pieces of memory one chain may have, its head aside.
    segments: u16,
    /// How long one may be.
    longest: usize,
    /// For putting a chain together.
    chain: Vec<Descriptor>,
}

#[derive(Debug)]
struct Slot<'a, M: Mapper + ?Sized> {
    generation: u64,
    loans: Loans<'a, M>,
    first: Option<Buffer<'a>>,
}

/// A device that runs, and what is lent to it.
#[derive(Debug)]
pub(crate) struct Lender<'a, T: Transport, M: Mapper + ?Sized> {
    pub(crate) device: Running<'a, T, M>,
    pub(crate) queues: Vec<Lending<'a, M>>,
}

impl<'a, T: Transport, M: Mapper + ?Sized> Lender<'a, T, M> {
    /// Brings a device up; see [`start`](crate::start()). Each chain of queue `number` has as many bytes of its own as
    /// `heads` says for it, and up to `segments` pieces of other memory.
    pub(crate) fn start<C, const N: usize>(
        transport: T,
        host: Host<'a, M>,
        wants: Wants,
        heads: impl FnOnce(&C) -> [usize; N],
        segments: u16,
        configure: impl FnOnce(&mut T, u64) -> Result<C, StartError<T::Error>>,
    ) -> Result<(Self, C), StartError<T::Error>> {
        let (device, config) = start(transport, host, wants, configure)?;
        // From here on the device is reset before anything that it was told of goes.
        let mut lender = Self { device, queues: Vec::with_capacity(N) };
        for (number, head) in (0..).zip(heads(&config)) {
            let (mapper, queue) = (lender.device.mapper, &lender.device.queues[0]);
            let memory = Pieces::allocate(mapper, queue.ring.size(), head.max(1))?;
            let queue = lender.device.queues.remove(0);
            lender.queues.push(Lending::new(number, mapper, queue, memory, segments));
        }
        Ok((lender, config))
    }

    /// Tells the device of what was lent through all queues, if it wants to be told.
    pub(crate) fn notify(&mut self) -> Result<(), LoanError<T::Error>> {
        for lending in &mut self.queues {
            lending.usable()?;
            if lending.queue.ring.needs_kick() {
                self.device.transport.notify(lending.number).map_err(LoanError::Transport)?;
            }
        }
        Ok(())
    }

    /// Asks the device to tell of what comes back next through any queue. `true`: something has.
    pub(crate) fn listen(&mut self) -> Result<bool, LoanError<T::Error>> {
        self.queues.iter_mut().try_fold(false, |some, lending| Ok(lending.listen()? || some))
    }

    /// Waits until something may have come back: through the last of the queues that have something, for that is the one
    /// which comes back soonest.
    pub(crate) fn wait_for_any(&mut self) -> Result<(), LoanError<T::Error>> {
        let lent = |lending: &Lending<'_, M>| lending.queue.ring.free() < lending.queue.ring.size();
        self.wait(self.queues.iter().rposition(lent).unwrap_or(0))
    }

    /// Waits until something may have come back through queue `number`.
    pub(crate) fn wait(&mut self, number: usize) -> Result<(), LoanError<T::Error>> {
        let lending = &mut self.queues[number];
        let waited = match lending.listen()? {
            true => Ok(()),
            false => self.device.transport.wait(lending.number),
        };
        lending.queue.ring.disable_callbacks();
        waited.map_err(LoanError::Transport)
    }
}

impl<T: Transport, M: Mapper + ?Sized> Lender<'_, T, M> {
    /// Resets each queue alone, and has it go on. What was lent is back, and nothing of it is heard of any more.
    pub(crate) fn restart(&mut self) -> Result<(), LoanError<T::Error>> {
        if !self.device.resets_queues() {
            return Err(LoanError::NotOffered);
        }
        if let Some(status) = self.device.transport.needs_reset().map_err(LoanError::Transport)? {
            return Err(LoanError::NeedsReset { status });
        }
        for lending in &mut self.queues {
            self.device.transport.reset_queue(lending.number).map_err(LoanError::Transport)?;
            lending.restart();
            let layout = &lending.queue.layout;
            self.device.transport.start_queue(lending.number, layout).map_err(LoanError::Transport)?;
        }
        Ok(())
    }
}

impl<T: Transport, M: Mapper + ?Sized> Drop for Lender<'_, T, M> {
    fn drop(&mut self) {
        if self.device.stop().is_lost() {
            // The device may still touch what it was lent: nobody else may ever get that memory.
            mem::forget(mem::take(&mut self.queues));
        }
    }
}

impl<'a, M: Mapper + ?Sized> Lending<'a, M> {
    fn new(number: u16, mapper: &'a M, queue: Queue<'a, M>, heads: Pieces<'a, M>, segments: u16) -> Self {
        let size = queue.ring.size();
        let segments = segments.min(size);
        let slot = |_| Slot { generation: 0, loans: Loans::with_capacity(segments), first: None };
        Self {
            number,
            mapper,
            queue,
            heads,
            slots: (0..size).map(slot).collect(),
            generation: 0,
            segments,
            longest: mapper.max_len().clamp(1, u32::MAX as usize),
            chain: Vec::with_capacity(usize::from(segments) + 2),
        }
    }

    /// The head of the next chain that is lent, if one can be.
    pub(crate) fn next_head(&self) -> Option<Piece<'a>> {
        self.queue.ring.next_token().map(|token| self.heads.get(token.index() as u16))
    }

    /// Lends a chain: of its head, these parts; then the buffers.
    pub(crate) fn lend<E>(
        &mut self,
        head: &[Part],
        buffers: &[Buffer<'a>],
        access: Access,
    ) -> Result<LoanId, LoanError<E>> {
        self.usable()?;
        let number = self.queue.ring.next_token().ok_or(LoanError::Busy)?.index();
        let (count, max) = (Loans::<M>::count(buffers, self.longest), usize::from(self.segments));
        if count > max {
            return Err(LoanError::TooLong { count, max });
        }
        let slot = &mut self.slots[number];
        slot.loans.lend(self.mapper, buffers, self.longest, access)?;
        let start = self.heads.get(number as u16).addr;
        self.chain.clear();
        self.chain.extend(head.iter().map(|part| Descriptor {
            addr: BusAddr(start.0 + u64::from(part.offset)),
            len: part.len,
            access: part.access,
        }));
        self.chain.extend(slot.loans.descriptors(access));
        match self.queue.ring.add(&self.chain, None) {
            Ok(_) => {
                (slot.generation, slot.first) = (self.generation, buffers.first().copied());
                self.generation += 1;
                Ok(LoanId { slot: number as u16, generation: slot.generation })
            }
            Err(error) => {
                slot.loans.take_back();
                Err(match error {
                    AddError::Full { .. } => LoanError::Busy,
                    AddError::Poisoned(error) => LoanError::Broken(error),
                    AddError::TooManyBuffers { buffers, limit } => {
                        LoanError::TooLong { count: buffers, max: limit.into() }
                    }
                    AddError::TooManyBytes => LoanError::TooLong { count: usize::MAX, max: u32::MAX as usize },
                    AddError::NoBytes => LoanError::TooShort { len: 0, needed: 1 },
                    error => unreachable!("a chain with bytes, in order: {error}"),
                })
            }
        }
    }

    /// Takes back the next that the device is done with.
    pub(crate) fn take<E>(&mut self) -> Result<Option<Back<'a>>, LoanError<E>> {
        let used = self.queue.ring.take_used().map_err(LoanError::Broken)?;
        let Some(used) = used else { return Ok(None) };
        let number = used.token.index();
        let slot = &mut self.slots[number];
        slot.loans.take_back();
        let id = LoanId { slot: number as u16, generation: slot.generation };
        let head = self.heads.get(number as u16);
        Ok(Some(Back { id, buffer: slot.first.take(), written: used.written, head }))
    }

    /// Begins anew with a ring that the device has let go of.
    fn restart(&mut self) {
        let Self { queue, slots, .. } = self;
        queue.ring.reset(|token, ()| {
            let slot = &mut slots[token.index()];
            slot.loans.take_back();
            slot.first = None;
        });
        queue.ring.disable_callbacks();
    }

    /// Asks the device to tell of what comes back next. `true`: something has.
    pub(crate) fn listen<E>(&mut self) -> Result<bool, LoanError<E>> {
        self.queue.ring.enable_callbacks().map_err(LoanError::Broken)
    }

    pub(crate) fn usable<E>(&self) -> Result<(), LoanError<E>> {
        self.queue.ring.poison().map_or(Ok(()), |error| Err(LoanError::Broken(error)))
    }
}

impl<E> From<DmaError> for LoanError<E> {
    fn from(error: DmaError) -> Self {
        LoanError::Dma(error)
    }
}
