//! The entropy device's driver (§5.4).

use crate::lending::{Back, CameBack, Lender, LoanError, LoanId, Side};
use crate::{Host, Running, StartError, Transport, Wants};
use ringfence_dma::{Access, Buffer, Mapper};
use virtio_spec::Id;

/// A source of random bytes.
///
/// What comes out of it is as random as the device likes: a kernel mixes it with what it has.
#[derive(Debug)]
pub struct Rng<'a, T: Transport, M: Mapper + ?Sized> {
    pub(crate) lender: Lender<'a, T, M>,
}

/// Random bytes that arrived.
#[derive(Clone, Copy, Debug)]
pub struct Entropy<'a> {
    /// Whose they are.
    pub id: LoanId,
    /// Where they are.
    pub buffer: Buffer<'a>,
    /// How many, from the buffer's beginning; the rest is zero.
    pub len: usize,
}

/// The device's queue (§5.4.2).
const REQUESTS: usize = 0;

/// How many requests may be under way.
const DEPTH: u16 = 8;

impl<'a, T: Transport, M: Mapper + ?Sized> Rng<'a, T, M> {
    /// Brings the device up.
    ///
    /// # Errors
    /// Those of [`start`](crate::start()).
    pub fn start(transport: T, host: Host<'a, M>) -> Result<Self, StartError<T::Error>> {
        let wants = Wants { device: u8::from(Id::Rng).into(), features: 0, queues: 1, depth: DEPTH };
        let (lender, ()) = Lender::start(transport, host, wants, |()| [0], 1, |_, _| Ok(()))?;
        Ok(Self { lender })
    }

    /// Fills a part of `into`, from its beginning, and says how much. Waits for it.
    ///
    /// # Errors
    /// Any [`LoanError`]. [`LoanError::Short`] is a device that used a buffer without a byte for it.
    pub fn fill(&mut self, into: Buffer<'a>) -> Result<usize, LoanError<T::Error>> {
        let id = self.submit(into)?;
        self.notify()?;
        loop {
            match self.poll()? {
                // Others were submitted, and are nobody's who waits here.
                Some(entropy) if entropy.id == id => return Ok(entropy.len),
                Some(_) => {}
                None => self.wait()?,
            }
        }
    }

    /// Asks for random bytes, as many as there is room for. The buffer is cleared: a device that does not write where it
    /// says so passes no secrets off as random.
    ///
    /// # Errors
    /// Any [`LoanError`] but [`LoanError::Short`]; nothing was asked for then.
    pub fn submit(&mut self, into: Buffer<'a>) -> Result<LoanId, LoanError<T::Error>> {
        into.memory().fill(0);
        self.lender.queues[REQUESTS].lend(&[], &[into], Access::Write)
    }

    /// Tells the device of what was submitted.
    ///
    /// # Errors
    /// [`LoanError::Transport`] and [`LoanError::Broken`].
    pub fn notify(&mut self) -> Result<(), LoanError<T::Error>> {
        self.lender.notify()
    }

    /// Random bytes that have arrived, if there are some. Does not wait.
    ///
    /// # Errors
    /// [`LoanError::Short`] and [`LoanError::Broken`].
    pub fn poll(&mut self) -> Result<Option<Entropy<'a>>, LoanError<T::Error>> {
        let Some((back, len)) = self.back()? else { return Ok(None) };
        Ok(Some(Entropy { id: back.id, buffer: back.buffer.expect("each request has a buffer"), len: len? }))
    }

    /// What came back, and how many bytes are in it.
    #[expect(clippy::type_complexity, reason = "one and its result")]
    fn back(&mut self) -> Result<Option<(Back<'a>, Result<usize, LoanError<T::Error>>)>, LoanError<T::Error>> {
        let Some(back) = self.lender.queues[REQUESTS].take()? else { return Ok(None) };
        // §5.4.6.2: one byte at least.
        let len = match back.written {
            0 => Err(LoanError::Short { written: 0, expected: 1 }),
            written => Ok(written as usize),
        };
        Ok(Some((back, len)))
    }

    /// The same for tasks.
    pub(crate) fn came_back(&mut self) -> CameBack<T::Error> {
        Ok(self.back()?.map(|(back, len)| ((Side::In, back.id), len)))
    }

    /// Waits until [`poll`](Self::poll) may have something.
    ///
    /// # Errors
    /// Those of [`Transport::wait`].
    pub fn wait(&mut self) -> Result<(), LoanError<T::Error>> {
        self.lender.wait(REQUESTS)
    }

    /// Asks the device to tell of what comes next, for who sleeps until an interrupt. `true`: something has come already,
    /// so look at [`poll`](Self::poll) instead of sleeping. What was asked for lasts until the next wait.
    ///
    /// # Errors
    /// [`LoanError::Broken`].
    pub fn listen(&mut self) -> Result<bool, LoanError<T::Error>> {
        self.lender.queues[REQUESTS].listen()
    }

    /// Resets the queue alone, and has it go on: a source that is [`Broken`](LoanError::Broken), or that keeps a buffer
    /// for too long, need not be given up. What was lent is back when this returns, and no [`LoanId`] of before is heard of
    /// again.
    ///
    /// # Errors
    /// [`LoanError::NotOffered`] where the device or the transport does not reset single queues, [`LoanError::NeedsReset`], and
    /// [`LoanError::Transport`]: as long as the device does not confirm, it keeps what it has.
    pub fn restart(&mut self) -> Result<(), LoanError<T::Error>> {
        self.lender.restart()
    }

    /// The device below.
    pub fn device(&self) -> &Running<'a, T, M> {
        &self.lender.device
    }

    /// The device below.
    pub fn device_mut(&mut self) -> &mut Running<'a, T, M> {
        &mut self.lender.device
    }
}
