//! A function on its socket: one client after the other, each with a function as after a reset.

use crate::session::{Session, SessionError};
use crate::wire::{Answer, Header, Kind, Request, WireError};
use ringfence_device::Device;
use ringfence_vhost_user::Limit;
use ringfence_vhost_user::channel::{Channel, ChannelError, Message, Received};
use ringfence_vhost_user::server::Ended;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, Shutdown, recv, shutdown};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

pub use crate::session::Options;
pub use ringfence_vhost_user::server::{Server, ServerError};

/// Serves `device` to one client after the other, until `end` becomes readable. A client's mistakes end its own connection
/// and nothing else.
///
/// # Errors
/// No client can be waited for any more.
pub fn run(
    server: Server,
    name: &str,
    open: impl FnMut() -> io::Result<Arc<dyn Device>>,
    options: Options,
    end: BorrowedFd<'_>,
) -> Result<(), ServerError> {
    let serve = |stream, device| connection(stream, device, options, end);
    server.each_with((name, &format!("vfio-user, iommu {}", options.iommu)), open, serve, end)
}

/// Why a connection ended early.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("the socket failed: {0}")]
    Channel(ChannelError<WireError>),
    #[error("bad message: {0}")]
    Wire(WireError),
    #[error("{0}")]
    Session(#[from] SessionError),
    #[error("can't wait: {0}")]
    Wait(#[from] Errno),
    #[error("no function to serve: {0}")]
    Resources(#[from] io::Error),
    #[error("a bug of ringfence's; the panic is above")]
    Panicked,
}

impl From<ChannelError<WireError>> for Lost {
    fn from(error: ChannelError<WireError>) -> Self {
        Lost::Channel(error)
    }
}

/// Serves one client, and tells the log in one line what it came to.
fn connection(stream: UnixStream, device: Arc<dyn Device>, options: Options, end: BorrowedFd<'_>) -> Ended {
    let ended = Connection::new(stream, device, options, end).map_err(Lost::from).and_then(|mut connection| {
        // A bug of ours ends the connection it was met on, and the next client is served.
        let ended = std::panic::catch_unwind(AssertUnwindSafe(|| connection.run(end)));
        connection.part();
        let counted = connection.session.counted();
        tracing::info!(maps = counted.maps, unmaps = counted.unmaps, faults = counted.faults, "connection ended");
        ended.unwrap_or(Err(Lost::Panicked))
    });
    match ended {
        Ok(ended) => ended,
        Err(lost) => {
            tracing::error!("connection closed: {lost}");
            Ended::ByFrontend
        }
    }
}

/// Most messages between two looks at everything else.
const BURST: usize = 256;

struct Connection {
    session: Session,
    client: Channel<Header>,
    /// Answers to what we asked, where they do not come with the rest.
    twin: Option<Channel<Header>>,
    /// For what the client does wrong and goes on doing.
    complaints: Limit,
}

/// How much of what had arrived was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Read {
    All,
    Some,
    /// All, and the other end is closed.
    End,
}

impl Connection {
    fn new(stream: UnixStream, device: Arc<dyn Device>, options: Options, end: BorrowedFd<'_>) -> io::Result<Self> {
        let socket: OwnedFd = stream.into();
        let session = Session::new(device, options, socket.try_clone()?, end.try_clone_to_owned()?)?;
        Ok(Self { session, client: Channel::new(socket), twin: None, complaints: Limit::new() })
    }

    fn run(&mut self, end: BorrowedFd<'_>) -> Result<Ended, Lost> {
        loop {
            let [broken, changed] = self.session.news();
            let mut fds = vec![end, self.client.as_fd(), broken, changed];
            fds.extend(self.twin.as_ref().map(AsFd::as_fd));
            let mut fds: Vec<_> = fds.into_iter().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
            let backed_up = self.session.link().is_backed_up();
            if backed_up {
                fds[1] = PollFd::from_borrowed_fd(self.client.as_fd(), PollFlags::IN | PollFlags::OUT);
            }
            let look = self.client.holds_message().then(Timespec::default);
            match poll(&mut fds, look.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let ready: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            if ready[0] {
                return Ok(Ended::ByUs);
            }
            if ready[2] || ready[3] {
                self.session.look();
            }
            if ready.get(4) == Some(&true) {
                self.answers();
            }
            if backed_up {
                self.session.link().flush().map_err(ChannelError::<WireError>::from)?;
            }
            if self.messages()? == Read::End {
                return Ok(Ended::ByFrontend);
            }
            if let Some(twin) = self.session.take_twin() {
                self.twin = Some(Channel::new(twin));
            }
        }
    }

    /// Has the client find the end of the stream, and no error: a socket that is closed with something unread in it counts as
    /// reset at its other end, and QEMU 11.1 dies of an error that it meets when it reads (`vfio_user_recv_hdr` sets it twice).
    ///
    /// What was answered is sent before: a client may ask a lot, close its end, and then read.
    fn part(&self) {
        self.session.link().drain();
        let client = self.client.as_fd();
        // Nothing more can arrive from here on, so this comes to an end.
        if shutdown(client, Shutdown::Read).is_ok() {
            let mut rest = [0; 4096];
            while recv(client, &mut rest, RecvFlags::DONTWAIT).is_ok_and(|(read, _)| read > 0) {}
        }
    }

    /// Takes in what the client has sent, up to a bounded number of messages: it may send without end.
    fn messages(&mut self) -> Result<Read, Lost> {
        for _ in 0..BURST {
            let received = self.client.receive();
            if let Err(ChannelError::Header(error)) = &received
                && let Some(farewell) = error.farewell()
            {
                self.session.link().send::<WireError>(&farewell)?;
            }
            match received? {
                Received::Message(Message { header, body, .. }) if header.kind == Kind::Reply => {
                    self.session.link().answered(&header, body);
                }
                Received::Message(message) => self.message(message)?,
                Received::Nothing => return Ok(Read::All),
                Received::End => return Ok(Read::End),
            }
        }
        Ok(Read::Some)
    }

    fn message(&mut self, Message { header, body, fds }: Message<Header>) -> Result<(), Lost> {
        let done = match Request::parse(&header, &body, fds) {
            Ok(request) => {
                tracing::trace!(?request, "message");
                let checked = self.session.check_memory();
                checked.and_then(|()| self.session.handle(request)).map_err(|error| (error.errno(), Lost::from(error)))
            }
            Err(error) => Err((error.errno(), Lost::Wire(error))),
        };
        let answer = header.answer == Answer::Wanted;
        match done {
            Ok(reply) => {
                let (body, fds) = reply.encode();
                if answer {
                    self.session.link().send::<WireError>(&header.reply(&body, &fds))?;
                }
                Ok(())
            }
            Err((errno, lost)) => {
                if answer {
                    self.session.link().send::<WireError>(&header.refusal(errno.raw_os_error() as u32))?;
                }
                match lost {
                    Lost::Session(error) if error.is_fatal() => Err(error.into()),
                    lost => {
                        if let Some(untold) = self.complaints.tell() {
                            tracing::warn!(untold, "refused: {lost}");
                        }
                        Ok(())
                    }
                }
            }
        }
    }

    /// Takes in answers from the socket of their own.
    fn answers(&mut self) {
        let Some(twin) = &mut self.twin else { return };
        let over = loop {
            match twin.receive() {
                Ok(Received::Message(Message { header, body, .. })) => self.session.link().answered(&header, body),
                Ok(Received::Nothing) => break false,
                Ok(Received::End) | Err(_) => break true,
            }
        };
        if over {
            // Questions are not answered any more, and fail.
            self.twin = None;
        }
    }
}

/// Whether `fd` can be read now.
pub(crate) fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}
