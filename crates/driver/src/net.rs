//! The network device's driver (§5.1): packets, and no offloads.

use crate::lending::{Back, CameBack, Lender, LoanError, LoanId, Part, Side};
use crate::{Host, Running, StartError, Transport, Wants, config};
use ringfence_dma::{Access, Buffer, Mapper};
use virtio_spec::Id;
use virtio_spec::net::F;

/// A network card.
///
/// Buffers for packets are [offered](Self::offer) and come back [received](Self::received); packets are
/// [sent](Self::send) and their buffers come back as [done](Self::sent). A running card allocates nothing.
#[derive(Debug)]
pub struct Net<'a, T: Transport, M: Mapper + ?Sized> {
    pub(crate) lender: Lender<'a, T, M>,
    card: Card,
}

/// What the card is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Card {
    /// Its address, if it has one of its own.
    pub mac: Option<[u8; 6]>,
    /// The longest payload of a packet, if it says so.
    pub mtu: Option<u16>,
    has_status: bool,
}

/// What a card is asked to be like.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How many descriptors each of its queues should have: a power of two.
    pub depth: u16,
    /// How many pieces of memory a packet may be scattered over.
    pub segments: u16,
}

impl Default for Options {
    /// 256 descriptors, and packets in up to 4 pieces.
    fn default() -> Self {
        Self { depth: 256, segments: 4 }
    }
}

/// A packet that arrived.
#[derive(Clone, Copy, Debug)]
pub struct Received<'a> {
    /// Whose it is.
    pub id: LoanId,
    /// Where it is.
    pub buffer: Buffer<'a>,
    /// How long it is.
    pub len: usize,
}

/// Whether the cable is plugged in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// It is, or the card does not know.
    Up,
    /// It is not.
    Down,
}

/// The card's queues (§5.1.2).
const RECEIVING: usize = 0;
const SENDING: usize = 1;

/// A packet without its payload, as Ethernet has it.
const ETHERNET: usize = 14;

/// The smallest buffer for a packet where the card says no MTU.
const PACKET: usize = 1500 + ETHERNET;

/// `virtio_net_hdr` of a device with VERSION_1 (§5.1.6): all zeroes, but for the number of buffers, which only counts
/// with offloads that are not used here.
const HEADER: u32 = 12;

const fn bits(feature: F) -> u64 {
    feature.bits().to_ne() as u64
}

/// What this file implements.
const FEATURES: u64 = bits(F::MAC) | bits(F::STATUS) | bits(F::MTU);

/// The smallest MTU (§5.1.4.1).
const LEAST_MTU: u16 = 68;

impl<'a, T: Transport, M: Mapper + ?Sized> Net<'a, T, M> {
    /// Brings the card up.
    ///
    /// # Errors
    /// Those of [`start`](crate::start()), and [`StartError::Config`] for a card that can't be as it says.
    ///
    /// # Panics
    /// Where [`Options::depth`] is no power of two.
    pub fn start(transport: T, host: Host<'a, M>, options: Options) -> Result<Self, StartError<T::Error>> {
        let wants = Wants { device: u8::from(Id::Net).into(), features: FEATURES, queues: 2, depth: options.depth };
        let heads = |_: &Card| [HEADER as usize; 2];
        let (lender, card) = Lender::start(transport, host, wants, heads, options.segments, read_config)?;
        Ok(Self { lender, card })
    }

    /// What the card is like.
    pub fn card(&self) -> Card {
        self.card
    }

    /// How long a buffer for a packet has to be.
    pub fn packet_len(&self) -> usize {
        self.card.mtu.map_or(PACKET, |mtu| usize::from(mtu) + ETHERNET).max(PACKET)
    }

    /// Whether the cable is plugged in.
    ///
    /// # Errors
    /// [`LoanError::Transport`].
    pub fn link(&mut self) -> Result<Link, LoanError<T::Error>> {
        if !self.card.has_status {
            return Ok(Link::Up);
        }
        let mut status = [0; 2];
        self.lender.device.transport.read_config(6, &mut status).map_err(LoanError::Transport)?;
        Ok(if status[0] & 1 != 0 { Link::Up } else { Link::Down })
    }

    /// Offers room for a packet, of [`packet_len`](Self::packet_len) bytes at least. It is cleared: a card that says that it
    /// wrote more than it did passes nothing of yours off as a packet. The card sees it after [`notify`](Self::notify).
    ///
    /// # Errors
    /// Any [`LoanError`] but [`LoanError::Short`]; nothing was lent then.
    pub fn offer(&mut self, buffer: Buffer<'a>) -> Result<LoanId, LoanError<T::Error>> {
        let needed = self.packet_len();
        if buffer.len() < needed {
            return Err(LoanError::TooShort { len: buffer.len(), needed });
        }
        buffer.memory().fill(0);
        self.lender.queues[RECEIVING].lend(&[header(Access::Write)], &[buffer], Access::Write)
    }

    /// A packet that has arrived, if there is one. Does not wait.
    ///
    /// # Errors
    /// [`LoanError::Broken`]; [`LoanError::Short`] for a packet without a header, whose buffer is back all the same.
    pub fn received(&mut self) -> Result<Option<Received<'a>>, LoanError<T::Error>> {
        let Some(back) = self.lender.queues[RECEIVING].take()? else { return Ok(None) };
        let len = payload(&back)?;
        Ok(Some(Received { id: back.id, buffer: back.buffer.expect("each chain has a buffer"), len }))
    }

    /// The same for tasks, whichever way.
    pub(crate) fn came_back(&mut self) -> CameBack<T::Error> {
        if let Some(back) = self.lender.queues[RECEIVING].take()? {
            return Ok(Some(((Side::In, back.id), payload(&back))));
        }
        Ok(self.sent()?.map(|id| ((Side::Out, id), Ok(0))))
    }

    /// Sends a packet. The card sees it after [`notify`](Self::notify).
    ///
    /// # Errors
    /// Any [`LoanError`] but [`LoanError::Short`]; nothing was sent then.
    pub fn send(&mut self, packet: &[Buffer<'a>]) -> Result<LoanId, LoanError<T::Error>> {
        let len: usize = packet.iter().map(Buffer::len).sum();
        let max = self.card.mtu.map_or(usize::from(u16::MAX), usize::from) + ETHERNET;
        match len {
            0..ETHERNET => return Err(LoanError::TooShort { len, needed: ETHERNET }),
            _ if len > max => return Err(LoanError::TooLong { count: len, max }),
            _ => {}
        }
        let Some(head) = self.lender.queues[SENDING].next_head() else {
            return self.lender.queues[SENDING].usable().and(Err(LoanError::Busy));
        };
        head.memory.fill(0);
        self.lender.queues[SENDING].lend(&[header(Access::Read)], packet, Access::Read)
    }

    /// A packet whose buffers the card is done with, if there is one. Does not wait.
    ///
    /// # Errors
    /// [`LoanError::Broken`].
    pub fn sent(&mut self) -> Result<Option<LoanId>, LoanError<T::Error>> {
        Ok(self.lender.queues[SENDING].take()?.map(|back| back.id))
    }

    /// Tells the card of what was offered and sent.
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

    /// Waits until [`sent`](Self::sent) may have something.
    ///
    /// # Errors
    /// Those of [`Transport::wait`].
    pub fn wait_sent(&mut self) -> Result<(), LoanError<T::Error>> {
        self.lender.wait(SENDING)
    }

    /// Asks the device to tell of what comes next, for who sleeps until an interrupt. `true`: something has come already,
    /// so look at [`received`](Self::received) instead of sleeping. What was asked for lasts until the next wait.
    ///
    /// # Errors
    /// [`LoanError::Broken`].
    pub fn listen(&mut self) -> Result<bool, LoanError<T::Error>> {
        self.lender.queues[RECEIVING].listen()
    }

    /// Resets each queue alone, and has them go on: a card that is [`Broken`](LoanError::Broken), or that keeps a buffer
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

/// How long the packet is in what came back.
fn payload<E>(back: &Back<'_>) -> Result<usize, LoanError<E>> {
    let short = LoanError::Short { written: back.written, expected: HEADER };
    back.written.checked_sub(HEADER).map(|len| len as usize).ok_or(short)
}

fn header(access: Access) -> Part {
    Part { offset: 0, len: HEADER, access }
}

fn read_config<T: Transport>(transport: &mut T, features: u64) -> Result<Card, StartError<T::Error>> {
    let taken = |feature| features & bits(feature) != 0;
    let card = config::read(transport, |fields| {
        let mut mac = [0; 6];
        for (offset, byte) in (0..).zip(&mut mac) {
            *byte = fields.u8(offset)?;
        }
        let mtu = if taken(F::MTU) { Some(fields.u16(10)?) } else { None };
        Ok(Card { mac: taken(F::MAC).then_some(mac), mtu, has_status: taken(F::STATUS) })
    })?;
    match card.mtu {
        Some(mtu) if mtu < LEAST_MTU => Err(StartError::Config { field: "mtu", value: mtu.into() }),
        _ => Ok(card),
    }
}
