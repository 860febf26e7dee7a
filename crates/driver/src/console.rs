//! The console device's driver (§5.3): its first port.

use crate::lending::{Back, CameBack, Lender, LoanError, LoanId, Side};
use crate::{Host, Running, StartError, Transport, Wants, config};
use ringfence_dma::{Access, Buffer, Mapper};
use virtio_spec::Id;
use virtio_spec::console::F;

/// A console.
///
/// Buffers for input are [offered](Self::offer) and come back [received](Self::received); output is
/// [sent](Self::send) from buffers, which come back as [done](Self::sent).
#[derive(Debug)]
pub struct Console<'a, T: Transport, M: Mapper + ?Sized> {
    pub(crate) lender: Lender<'a, T, M>,
    has_size: bool,
}

/// Bytes that arrived.
#[derive(Clone, Copy, Debug)]
pub struct Received<'a> {
    /// Whose they are.
    pub id: LoanId,
    /// Where they are.
    pub buffer: Buffer<'a>,
    /// How many.
    pub len: usize,
}

/// How large a console is, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// The console's queues (§5.3.2).
const RECEIVING: usize = 0;
const SENDING: usize = 1;

/// How many buffers may be lent each way.
const DEPTH: u16 = 32;

const SIZE: u64 = F::SIZE.bits().to_ne() as u64;

impl<'a, T: Transport, M: Mapper + ?Sized> Console<'a, T, M> {
    /// Brings the console up.
    ///
    /// # Errors
    /// Those of [`start`](crate::start()).
    pub fn start(transport: T, host: Host<'a, M>) -> Result<Self, StartError<T::Error>> {
        let wants = Wants { device: u8::from(Id::Console).into(), features: SIZE, queues: 2, depth: DEPTH };
        let has_size = |_: &mut T, features| Ok(features & SIZE != 0);
        let (lender, has_size) = Lender::start(transport, host, wants, |_| [0; 2], DEPTH, has_size)?;
        Ok(Self { lender, has_size })
    }

    /// How large it is, if it says so. May change; it then tells by a change of its configuration.
    ///
    /// # Errors
    /// Those of [`start`](crate::start()) that have to do with the configuration space.
    pub fn size(&mut self) -> Result<Option<Size>, StartError<T::Error>> {
        if !self.has_size {
            return Ok(None);
        }
        let size = config::read(&mut self.lender.device.transport, |fields| {
            Ok(Size { cols: fields.u16(0)?, rows: fields.u16(2)? })
        });
        size.map(Some)
    }

    /// Offers room for input. It is cleared: a console that says that it wrote more than it did passes nothing of yours off as
    /// input. The console sees it after [`notify`](Self::notify).
    ///
    /// # Errors
    /// Any [`LoanError`] but [`LoanError::Short`]; nothing was lent then.
    pub fn offer(&mut self, buffer: Buffer<'a>) -> Result<LoanId, LoanError<T::Error>> {
        buffer.memory().fill(0);
        self.lender.queues[RECEIVING].lend(&[], &[buffer], Access::Write)
    }

    /// Input that has arrived, if there is some. Does not wait.
    ///
    /// # Errors
    /// [`LoanError::Broken`].
    pub fn received(&mut self) -> Result<Option<Received<'a>>, LoanError<T::Error>> {
        let Some(Back { id, buffer, written, .. }) = self.lender.queues[RECEIVING].take()? else { return Ok(None) };
        Ok(Some(Received { id, buffer: buffer.expect("each chain has a buffer"), len: written as usize }))
    }

    /// The same for tasks, whichever way.
    pub(crate) fn came_back(&mut self) -> CameBack<T::Error> {
        if let Some(Received { id, len, .. }) = self.received()? {
            return Ok(Some(((Side::In, id), Ok(len))));
        }
        Ok(self.sent()?.map(|id| ((Side::Out, id), Ok(0))))
    }

    /// Sends what is in `output`. The console sees it after [`notify`](Self::notify).
    ///
    /// # Errors
    /// Any [`LoanError`] but [`LoanError::Short`]; nothing was sent then.
    pub fn send(&mut self, output: &[Buffer<'a>]) -> Result<LoanId, LoanError<T::Error>> {
        match output.iter().map(Buffer::len).sum() {
            0 => Err(LoanError::TooShort { len: 0, needed: 1 }),
            _ => self.lender.queues[SENDING].lend(&[], output, Access::Read),
        }
    }

    /// Output whose buffers the console is done with, if there is some. Does not wait.
    ///
    /// # Errors
    /// [`LoanError::Broken`].
    pub fn sent(&mut self) -> Result<Option<LoanId>, LoanError<T::Error>> {
        Ok(self.lender.queues[SENDING].take()?.map(|back| back.id))
    }

    /// Sends what is in `output` and waits until it is gone.
    ///
    /// # Errors
    /// Any [`LoanError`] but [`LoanError::Short`].
    pub fn write(&mut self, output: &[Buffer<'a>]) -> Result<(), LoanError<T::Error>> {
        let id = self.send(output)?;
        self.notify()?;
        loop {
            match self.sent()? {
                Some(sent) if sent == id => return Ok(()),
                Some(_) => {}
                None => self.lender.wait(SENDING)?,
            }
        }
    }

    /// Tells the console of what was offered and sent.
    ///
    /// # Errors
    /// [`LoanError::Transport`] and [`LoanError::Broken`].
    pub fn notify(&mut self) -> Result<(), LoanError<T::Error>> {
        self.lender.notify()
    }

    /// Waits until [`received`](Self::received) may have something.
    ///
    /// # Errors
    /// Those of [`Transport::wait`].
    pub fn wait(&mut self) -> Result<(), LoanError<T::Error>> {
        self.lender.wait(RECEIVING)
    }

    /// Asks the device to tell of what comes next, for who sleeps until an interrupt. `true`: something has come already,
    /// so look at [`received`](Self::received) instead of sleeping. What was asked for lasts until the next wait.
    ///
    /// # Errors
    /// [`LoanError::Broken`].
    pub fn listen(&mut self) -> Result<bool, LoanError<T::Error>> {
        self.lender.queues[RECEIVING].listen()
    }

    /// Resets each queue alone, and has them go on: a console that is [`Broken`](LoanError::Broken), or that keeps a buffer
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
