//! Unix stream sockets that carry messages and file descriptors.
//!
//! Knows where one message ends and the next begins. Knows no meaning of any message, nor whose protocol it is: that is
//! its [`Head`].
//!
//! One call of the kernel brings as many messages as there are: a front-end that answers a hundred misses at once would
//! otherwise be read by two hundred. So a whole message may be here while the socket is empty: whoever sleeps on the
//! socket asks [`Channel::holds_message`] before.
//!
//! A peer may stop anywhere, also in the middle of a header, and nobody waits for it unless he said for how long: what
//! has arrived is kept, and the rest is read when there is more. It may attach more descriptors than any message has:
//! they are closed, and it loses its connection. It may stop reading: what we have to say is kept up to a bound.

use crate::wire::{Frame, Header, MAX_FDS, WireError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, send, sendmsg,
};
use std::fmt::{Debug, Display};
use std::io::{IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// For how long a peer may leave a message of ours unread before it counts as gone.
const SEND_PATIENCE: Duration = Duration::from_secs(10);

/// How many bytes wait for a peer that does not read: more than the questions that a translation cache has under way at the
/// most, and the answers to thousands of messages.
const MAX_BACKLOG: usize = 4 << 20;

/// What every message of a protocol begins with.
pub trait Head: Copy + Debug {
    /// As it travels: an array of bytes.
    type Bytes: AsRef<[u8]> + AsMut<[u8]> + Default + Debug;

    /// What can be wrong with it.
    type Error: Debug + Display;

    /// The most descriptors that any message carries; at most [`SPACE`].
    const MAX_FDS: usize;

    /// Reads one.
    ///
    /// # Errors
    /// After one the stream is lost.
    fn parse(bytes: &Self::Bytes) -> Result<Self, Self::Error>;

    /// How many bytes follow it. What it says is allocated.
    fn body(&self) -> usize;
}

/// There is room for so many descriptors with one read or write: the kernel takes no more with one message.
pub const SPACE: usize = 253;

impl Head for Header {
    type Bytes = [u8; Header::SIZE];
    type Error = WireError;
    const MAX_FDS: usize = MAX_FDS;

    fn parse(bytes: &Self::Bytes) -> Result<Self, WireError> {
        Header::parse(bytes)
    }

    fn body(&self) -> usize {
        self.size as usize
    }
}

/// Both directions of a socket; messages come in whole.
#[derive(Debug)]
pub struct Channel<H: Head = Header> {
    socket: OwnedFd,
    inbox: Inbox<H>,
}

/// What a look at the socket brought.
#[derive(Debug)]
pub enum Received<H = Header> {
    /// A message.
    Message(Message<H>),
    /// Not a whole message yet. Poll for more.
    Nothing,
    /// The peer has closed its end, between two messages.
    End,
}

/// One message as it arrived.
#[derive(Debug)]
pub struct Message<H = Header> {
    /// Its header.
    pub header: H,
    /// Its payload, as long as the header says.
    pub body: Vec<u8>,
    /// All descriptors that came with it, close-on-exec; at most [`Head::MAX_FDS`].
    pub fds: Vec<OwnedFd>,
}

/// Why a socket is of no use any more.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChannelError<E = WireError> {
    /// What came has no message's header.
    #[error("{0}")]
    Header(E),
    /// The peer closed its end within a message.
    #[error("the peer closed the connection {got} bytes into a message")]
    Truncated {
        /// Bytes that had come.
        got: usize,
    },
    /// More descriptors came with one message than any message has, or than this process can hold.
    #[error("more file descriptors than any message has, or none left to hold them")]
    TooManyFds,
    /// The peer closed its end where an answer was waited for.
    #[error("the peer closed the connection")]
    Closed,
    /// Nothing came, or nothing could be sent, for so long.
    #[error("the peer did not {0} in time")]
    TimedOut(&'static str),
    /// The socket itself failed.
    #[error("the socket failed: {0}")]
    Socket(Errno),
}

/// How many bytes are read at a time: several hundred translations.
const AHEAD: usize = 16 << 10;

/// What has come and was not handed out.
#[derive(Debug)]
struct Inbox<H> {
    /// Longer than [`AHEAD`] while a message comes in that is.
    bytes: Vec<u8>,
    /// Of `bytes`, what there is: the next message starts here.
    start: usize,
    end: usize,
    /// Descriptors, each with the place in `bytes` of the last byte that was read with it.
    ///
    /// The kernel ends a read behind the piece that a peer sent with descriptors, so they belong to the last message of
    /// that read. (Not to the first: that may be one sent before, without any.)
    fds: Vec<(usize, OwnedFd)>,
    head: PhantomData<H>,
}

impl<H: Head> Channel<H> {
    /// Uses `socket`, a connected Unix stream. Its flags are left alone: no call here waits unless it says so.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, inbox: Inbox::empty() }
    }

    /// The next message if it is all here. Never waits.
    ///
    /// # Errors
    /// The connection is of no use any more, see [`ChannelError`].
    pub fn receive(&mut self) -> Result<Received<H>, ChannelError<H::Error>> {
        // At most as often as a message has bytes.
        loop {
            if let Some(message) = self.inbox.take()? {
                return Ok(Received::Message(message));
            }
            match self.inbox.fill(self.socket.as_fd()) {
                Ok(0) => return self.inbox.end(),
                Ok(_) => {}
                Err(ReadError::Errno(Errno::AGAIN)) => return Ok(Received::Nothing),
                Err(ReadError::Errno(Errno::INTR)) => {}
                Err(ReadError::Errno(Errno::CONNRESET)) => return self.inbox.end(),
                Err(ReadError::Errno(errno)) => return Err(ChannelError::Socket(errno)),
                Err(ReadError::TooManyFds) => return Err(ChannelError::TooManyFds),
            }
        }
    }

    /// Whether [`Channel::receive`] has something to say without a look at the socket, which need not become readable
    /// for it.
    pub fn holds_message(&self) -> bool {
        !matches!(self.inbox.next(), Ok(Next::Part { .. }))
    }

    /// The next message, waited for until `deadline`.
    ///
    /// # Errors
    /// As [`Channel::receive`]; also if the peer closes its end or lets the time pass.
    pub fn receive_until(&mut self, deadline: Instant) -> Result<Message<H>, ChannelError<H::Error>> {
        loop {
            match self.receive()? {
                Received::Message(message) => return Ok(message),
                Received::End => return Err(ChannelError::Closed),
                Received::Nothing => wait(self.socket.as_fd(), PollFlags::IN, deadline, "answer")?,
            }
        }
    }

    /// Sends all of `frame`. Waits for a peer that does not read, though not for ever.
    ///
    /// # Errors
    /// The peer is gone or does not read; a part of the message may have been sent.
    pub fn send(&self, frame: &Frame<'_>) -> Result<(), ChannelError<H::Error>> {
        send_frame(self.socket.as_fd(), frame)
    }
}

/// As [`Channel::send`], for whoever has the socket alone.
///
/// # Errors
/// As [`Channel::send`].
pub fn send_frame<E>(socket: BorrowedFd<'_>, frame: &Frame<'_>) -> Result<(), ChannelError<E>> {
    let deadline = Instant::now() + SEND_PATIENCE;
    let mut sent = 0;
    while sent < frame.bytes.len() {
        // Descriptors travel with the first byte, once.
        let fds = if sent == 0 { &frame.fds[..] } else { &[] };
        match write(socket, &frame.bytes[sent..], fds) {
            Ok(count) => sent += count,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait(socket, PollFlags::OUT, deadline, "read")?,
            Err(Errno::PIPE | Errno::CONNRESET) => return Err(ChannelError::Closed),
            Err(errno) => return Err(ChannelError::Socket(errno)),
        }
    }
    Ok(())
}

impl<H: Head> AsFd for Channel<H> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// How far the next message has come.
enum Next<H> {
    Whole {
        header: H,
        /// Where it ends, in the inbox.
        end: usize,
    },
    Part {
        /// How many bytes it has at the least.
        len: usize,
    },
}

impl<H: Head> Inbox<H> {
    fn empty() -> Self {
        Self { bytes: vec![0; AHEAD], start: 0, end: 0, fds: Vec::new(), head: PhantomData }
    }

    fn next(&self) -> Result<Next<H>, H::Error> {
        let mut head = H::Bytes::default();
        let size = head.as_ref().len();
        let here = &self.bytes[self.start..self.end];
        let Some(first) = here.get(..size) else { return Ok(Next::Part { len: size }) };
        head.as_mut().copy_from_slice(first);
        let header = H::parse(&head)?;
        let len = size + header.body();
        Ok(if here.len() < len { Next::Part { len } } else { Next::Whole { header, end: self.start + len } })
    }

    /// The next message, if it is all here.
    fn take(&mut self) -> Result<Option<Message<H>>, ChannelError<H::Error>> {
        let (header, end) = match self.next().map_err(ChannelError::Header)? {
            Next::Whole { header, end } => (header, end),
            Next::Part { len } => {
                // All of them are of this message: nothing is read while there is a whole one.
                if self.fds.len() > H::MAX_FDS {
                    return Err(ChannelError::TooManyFds);
                }
                self.make_room(len);
                return Ok(None);
            }
        };
        let own = self.fds.partition_point(|&(at, _)| at < end);
        if own > H::MAX_FDS {
            return Err(ChannelError::TooManyFds);
        }
        let fds = self.fds.drain(..own).map(|(_, fd)| fd).collect();
        let body = self.bytes[end - header.body()..end].to_vec();
        self.start = end;
        Ok(Some(Message { header, body, fds }))
    }

    /// Moves what is here to the front, with room behind it for the rest of a message of `len` bytes.
    fn make_room(&mut self, len: usize) {
        self.bytes.copy_within(self.start..self.end, 0);
        self.fds.iter_mut().for_each(|(at, _)| *at -= self.start);
        (self.start, self.end) = (0, self.end - self.start);
        let room = len.max(self.end + 1).max(AHEAD);
        if self.bytes.len() != room {
            self.bytes.resize(room, 0);
            self.bytes.shrink_to_fit();
        }
    }

    /// Reads what there is behind the part of a message that is here.
    fn fill(&mut self, socket: BorrowedFd<'_>) -> Result<usize, ReadError> {
        let mut fds = Vec::new();
        let count = read(socket, &mut self.bytes[self.end..], &mut fds, H::MAX_FDS)?;
        self.end += count;
        // Of a read of nothing there are none.
        self.fds.extend(fds.into_iter().map(|fd| (self.end.saturating_sub(1), fd)));
        Ok(count)
    }

    fn end(&self) -> Result<Received<H>, ChannelError<H::Error>> {
        match self.end - self.start {
            0 => Ok(Received::End),
            got => Err(ChannelError::Truncated { got }),
        }
    }
}

/// One direction of a socket, for those who must not wait: what the socket does not take at once is kept in order.
#[derive(Debug)]
pub struct Sender {
    socket: OwnedFd,
    backlog: Vec<u8>,
}

/// Why a [`Sender`] is of no use any more.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The peer has closed its end.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer does not read, and no more can be kept for it.
    #[error("the peer leaves {bytes} bytes unread")]
    Backlog {
        /// How much is kept.
        bytes: usize,
    },
    /// The socket itself failed.
    #[error("the socket failed: {0}")]
    Socket(Errno),
}

impl<E> From<SendError> for ChannelError<E> {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Closed => ChannelError::Closed,
            SendError::Backlog { .. } => ChannelError::TimedOut("read"),
            SendError::Socket(errno) => ChannelError::Socket(errno),
        }
    }
}

impl Sender {
    /// Uses `socket`, a connected Unix stream.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, backlog: Vec::new() }
    }

    /// Keeps `frame` for the next [`Sender::flush`], so that many go out in one write. It has no descriptors.
    ///
    /// # Errors
    /// Too much is kept already.
    pub fn queue(&mut self, frame: &Frame<'_>) -> Result<(), SendError> {
        assert!(frame.fds.is_empty(), "descriptors can't wait: they are only borrowed");
        if self.backlog.len() + frame.bytes.len() > MAX_BACKLOG {
            return Err(SendError::Backlog { bytes: self.backlog.len() });
        }
        self.backlog.extend_from_slice(&frame.bytes);
        Ok(())
    }

    /// Sends as much as the socket takes. Never waits.
    ///
    /// # Errors
    /// The peer is gone.
    pub fn flush(&mut self) -> Result<(), SendError> {
        let mut sent = 0;
        let result = loop {
            if sent == self.backlog.len() {
                break Ok(());
            }
            match send(&self.socket, &self.backlog[sent..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break Ok(()),
                Err(Errno::PIPE | Errno::CONNRESET) => break Err(SendError::Closed),
                Err(errno) => break Err(SendError::Socket(errno)),
            }
        };
        self.backlog.drain(..sent);
        result
    }

    /// Sends `frame`, or keeps what the socket does not take at once of it, if it has no descriptors: a peer may ask a lot
    /// before it reads the first answer. Where no more can be kept it waits, though not for ever.
    ///
    /// # Errors
    /// As [`Channel::send`].
    pub fn send_soon<E>(&mut self, frame: &Frame<'_>) -> Result<(), ChannelError<E>> {
        if !frame.fds.is_empty() {
            return self.send(frame);
        }
        self.drain_to(MAX_BACKLOG.saturating_sub(frame.bytes.len()), SEND_PATIENCE)?;
        self.backlog.extend_from_slice(&frame.bytes);
        self.flush().map_err(ChannelError::from)
    }

    /// Sends what is kept, and all of `frame`. Waits for a peer that does not read, though not for ever.
    ///
    /// # Errors
    /// As [`Channel::send`].
    pub fn send<E>(&mut self, frame: &Frame<'_>) -> Result<(), ChannelError<E>> {
        self.drain_to(0, SEND_PATIENCE)?;
        send_frame(self.socket.as_fd(), frame)
    }

    /// Sends all that is kept. Waits for a peer that does not read, though no longer than `patience`.
    ///
    /// # Errors
    /// As [`Channel::send`].
    pub fn drain<E>(&mut self, patience: Duration) -> Result<(), ChannelError<E>> {
        self.drain_to(0, patience)
    }

    /// Waits until no more than so many bytes are kept.
    fn drain_to<E>(&mut self, left: usize, patience: Duration) -> Result<(), ChannelError<E>> {
        let deadline = Instant::now() + patience;
        while self.backlog.len() > left {
            wait(self.socket.as_fd(), PollFlags::OUT, deadline, "read")?;
            self.flush().map_err(ChannelError::from)?;
        }
        Ok(())
    }

    /// Whether something is kept: poll for room, then [`Sender::flush`] again.
    pub fn is_backed_up(&self) -> bool {
        !self.backlog.is_empty()
    }
}

impl AsFd for Sender {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

enum ReadError {
    Errno(Errno),
    TooManyFds,
}

/// Reads what is there, and adds the descriptors that came with it to `fds`.
fn read(socket: BorrowedFd<'_>, into: &mut [u8], fds: &mut Vec<OwnedFd>, max: usize) -> Result<usize, ReadError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SPACE))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(socket, &mut [IoSliceMut::new(into)], &mut control, flags).map_err(ReadError::Errno)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(arrived) = message {
            fds.extend(arrived);
        }
    }
    // Truncated: the peer sent more than there is space for, or we have run out of descriptors. Those that did arrive
    // are in `fds`, which the error makes its owner drop.
    if got.flags.contains(ReturnFlags::CTRUNC) || fds.len() > max {
        fds.clear();
        return Err(ReadError::TooManyFds);
    }
    Ok(got.bytes)
}

fn write(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SPACE))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "{} descriptors in a message", fds.len());
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
}

fn wait<E>(
    socket: BorrowedFd<'_>,
    what: PollFlags,
    deadline: Instant,
    verb: &'static str,
) -> Result<(), ChannelError<E>> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ChannelError::TimedOut(verb));
        }
        // A wait too long for the kernel's clock is as good as none.
        let timeout = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::from_borrowed_fd(socket, what)], timeout.as_ref()) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(ChannelError::Socket(errno)),
        }
    }
}

#[cfg(test)]
mod tests;
