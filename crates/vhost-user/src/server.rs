//! A back-end on its socket: one front-end after the other, until told to end.

use crate::backend::Outgoing;
use crate::channel::{Channel, ChannelError, Message, Received, Sender};
use crate::faults::Limit;
use crate::session::{Session, SessionError, Severity};
use crate::wire::{BackendCode, BackendRequest, Frame, FrontendCode, NeedReply, Reply, Request, WireError};
use ringfence_device::worker::Patience;
use ringfence_device::{Device, eventfd};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd as new_eventfd, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, sockopt};
use std::fmt::Display;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use crate::session::{Keep, Options, UnknownKeep};

/// Where front-ends come from.
#[derive(Debug)]
pub struct Server {
    source: Source,
    /// The socket in the file system that is ours to remove.
    path: Option<OwnPath>,
}

/// A path and what was made there: somebody else's socket of that name is not ours to remove.
#[derive(Debug)]
struct OwnPath {
    path: PathBuf,
    inode: (u64, u64),
}

impl OwnPath {
    fn new(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), inode: inode(path)? })
    }
}

impl Drop for OwnPath {
    fn drop(&mut self) {
        if inode(&self.path).is_ok_and(|inode| inode == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

#[derive(Debug)]
enum Source {
    Listener(UnixListener),
    Connected(UnixStream),
}

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Somebody answers on the socket.
    #[error("{}: another process listens on this socket; end it or choose another path", .0.display())]
    InUse(PathBuf),
    /// There is a file that is no socket.
    #[error("{}: exists and is not a socket; remove it or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// The socket can't be had.
    #[error("{}: can't listen: {error}", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// The inherited descriptor is no Unix stream socket.
    #[error("file descriptor {fd}: not a Unix stream socket: {error}")]
    Inherit {
        /// Which.
        fd: RawFd,
        /// Why not.
        error: io::Error,
    },
    /// The host is short of something.
    #[error("can't wait for front-ends: {0}")]
    Wait(io::Error),
}

/// Why a connection ended early.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("the socket failed: {0}")]
    Channel(#[from] ChannelError),
    #[error("bad message: {0}")]
    Wire(#[from] WireError),
    #[error("{0}")]
    Session(#[from] SessionError),
    #[error("can't wait: {0}")]
    Wait(#[from] Errno),
    #[error("the front-end closed the back-end channel while queues need it to ask for translations")]
    BackendChannel,
    #[error("a bug of ringfence's; the panic is above")]
    Panicked,
}

impl Server {
    /// Listens on `path`. A socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// Somebody else uses the path, or the socket can't be made.
    pub fn bind(path: &Path) -> Result<Self, ServerError> {
        remove_stale(path)?;
        let failed = |error| ServerError::Listen { path: path.to_owned(), error };
        let listener = UnixListener::bind(path).map_err(failed)?;
        let own = OwnPath::new(path).map_err(failed)?;
        Ok(Self { source: Source::Listener(listener), path: Some(own) })
    }

    /// Uses a socket that was inherited: one that listens, or one whose other end is a front-end already.
    ///
    /// # Errors
    /// The descriptor is not open, or not such a socket.
    pub fn inherit(fd: RawFd) -> Result<Self, ServerError> {
        // SAFETY: not -1, and only asked what it is; nothing is read from it and nothing closed.
        let probe = unsafe { BorrowedFd::borrow_raw(fd) };
        let failed = |error: Errno| ServerError::Inherit { fd, error: error.into() };
        let listens = sockopt::socket_acceptconn(probe).map_err(failed)?;
        let domain = sockopt::socket_domain(probe).map_err(failed)?;
        if domain != AddressFamily::UNIX || sockopt::socket_type(probe).map_err(failed)? != SocketType::STREAM {
            return Err(failed(Errno::PROTOTYPE));
        }
        // SAFETY: open by the line above, and the command line gave it to us to own.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let source = if listens { Source::Listener(fd.into()) } else { Source::Connected(fd.into()) };
        Ok(Self { source, path: None })
    }

    /// Serves `device` to one front-end after the other, until `end` becomes readable; a socket that came connected is
    /// served until its front-end leaves. A front-end's mistakes end its own connection and nothing else.
    ///
    /// # Errors
    /// No front-end can be waited for any more.
    pub fn run(self, device: Arc<dyn Device>, options: Options, end: BorrowedFd<'_>) -> Result<(), ServerError> {
        self.run_each(device.name(), || Ok(Arc::clone(&device)), options, end)
    }

    /// As [`Server::run`], with a device for each front-end: see [`Server::each_with`].
    ///
    /// # Errors
    /// No front-end can be waited for any more.
    pub fn run_each(
        self,
        name: &str,
        open: impl FnMut() -> io::Result<Arc<dyn Device>>,
        options: Options,
        end: BorrowedFd<'_>,
    ) -> Result<(), ServerError> {
        let serve = |stream, device| connection(stream, &device, options, end);
        self.each_with((name, &format!("iommu {}", options.iommu)), open, serve, end)
    }

    /// Hands `serve` the connection of one front-end after the other and a device for it, until `end` becomes readable.
    /// `open` makes the device, `name` and what is special about it, when a front-end has come; one that can't be made
    /// costs the front-end its connection.
    ///
    /// # Errors
    /// No front-end can be waited for any more.
    pub fn each_with(
        self,
        (name, about): (&str, &str),
        mut open: impl FnMut() -> io::Result<Arc<dyn Device>>,
        mut serve: impl FnMut(UnixStream, Arc<dyn Device>) -> Ended,
        end: BorrowedFd<'_>,
    ) -> Result<(), ServerError> {
        let serve = |stream| match open() {
            Ok(device) => serve(stream, device),
            Err(error) => {
                tracing::error!("connection closed: no {name} to serve: {error}");
                Ended::ByFrontend
            }
        };
        self.each(&format!("{name}, {about}"), serve, end)
    }

    /// Hands `serve` the connection of one front-end after the other, until `end` becomes readable.
    ///
    /// # Errors
    /// No front-end can be waited for any more.
    pub fn each(
        self,
        what: &str,
        mut serve: impl FnMut(UnixStream) -> Ended,
        end: BorrowedFd<'_>,
    ) -> Result<(), ServerError> {
        let listener = match &self.source {
            Source::Connected(stream) => {
                let stream = stream.try_clone().map_err(ServerError::Wait)?;
                serve(stream);
                return Ok(());
            }
            Source::Listener(listener) => listener,
        };
        if let Some(OwnPath { path, .. }) = &self.path {
            tracing::info!("{what}: listening on {}", path.display());
        }
        loop {
            let mut fds = [PollFd::from_borrowed_fd(end, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(ServerError::Wait(error.into())),
            }
            if !fds[0].revents().is_empty() {
                return Ok(());
            }
            if fds[1].revents().is_empty() {
                continue;
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    if serve(stream) == Ended::ByUs {
                        return Ok(());
                    }
                }
                // A front-end that left before it was taken in, or a host that is short of something for now.
                Err(error) => {
                    tracing::warn!("can't take a front-end in: {error}");
                    std::thread::sleep(std::time::Duration::from_secs(1));
                }
            }
        }
    }
}

/// Removes a socket at `path` that nobody answers on.
fn remove_stale(path: &Path) -> Result<(), ServerError> {
    let failed = |error| ServerError::Listen { path: path.to_owned(), error };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(ServerError::NotASocket(path.to_owned())),
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(ServerError::InUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path).map_err(failed),
        Err(error) => Err(failed(error)),
    }
}

/// Why a connection is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The front-end left or had to: the next is served.
    ByFrontend,
    /// All is to end.
    ByUs,
}

/// Serves one front-end, and tells the log in one line what it came to.
fn connection(stream: UnixStream, device: &Arc<dyn Device>, options: Options, end: BorrowedFd<'_>) -> Ended {
    let mut session = Session::new(Arc::clone(device), options);
    match end.try_clone_to_owned() {
        Ok(end) => session.hurry_on(end),
        Err(error) => tracing::warn!("storage that does not answer will delay the end of this process: {error}"),
    }
    let mut connection = Connection {
        session,
        frontend: Channel::new(stream.into()),
        replies: Vec::new(),
        backend: None,
        patience: Patience { most: options.poll, now: Duration::ZERO },
        complaints: Limit::new(),
    };
    // A bug of ours ends the connection it was met on, and the next front-end is served.
    let ended = std::panic::catch_unwind(AssertUnwindSafe(|| connection.run(end))).unwrap_or(Err(Lost::Panicked));
    let counted = connection.session.counted();
    let (ended, why) = match ended {
        Ok(Ended::ByUs) => (Ended::ByUs, "told to end".to_owned()),
        Ok(Ended::ByFrontend) => (Ended::ByFrontend, "the front-end left".to_owned()),
        Err(lost) => {
            tracing::error!("connection closed: {lost}");
            (Ended::ByFrontend, "closed".to_owned())
        }
    };
    tracing::info!(
        misses = counted.misses,
        updates = counted.updates,
        invalidations = counted.invalidations,
        faults = counted.faults,
        "connection ended: {why}"
    );
    ended
}

/// Most messages between two looks at everything else.
const BURST: usize = 256;

/// How much of what had arrived on a socket was read.
enum Read {
    All,
    Some,
    /// All, and the other end is closed.
    End,
}

/// The back-end channel, as whoever reads it has it.
struct Answers {
    channel: Channel,
    /// Readable when questions wait for room in it.
    backed_up: OwnedFd,
}

struct Connection {
    session: Session,
    frontend: Channel,
    /// What was not yet said to it: acknowledgements of translations that came together go together.
    replies: Vec<u8>,
    backend: Option<Answers>,
    patience: Patience,
    /// For what the front-end does wrong and goes on doing.
    complaints: Limit,
}

impl Connection {
    fn run(&mut self, end: BorrowedFd<'_>) -> Result<Ended, Lost> {
        loop {
            let mut fds =
                vec![PollFd::from_borrowed_fd(end, PollFlags::IN), PollFd::new(&self.frontend, PollFlags::IN)];
            if let Some(Answers { channel, backed_up }) = &self.backend {
                let room = if self.session.backend().is_backed_up() { PollFlags::OUT } else { PollFlags::empty() };
                fds.extend([PollFd::new(channel, PollFlags::IN | room), PollFd::new(backed_up, PollFlags::IN)]);
            }
            match self.frontend.holds_message() {
                true => look(&mut fds).map(drop)?,
                false => wait(&mut fds, &mut self.patience)?,
            }
            if !fds[0].revents().is_empty() {
                return Ok(Ended::ByUs);
            }
            let backed_up = fds.get(3).is_some_and(|fd| !fd.revents().is_empty());
            match self.requests()? {
                // An UPDATE was sent before the answer that it belongs to, and must be seen first.
                Read::All => self.answers()?,
                Read::Some => {}
                Read::End => return Ok(Ended::ByFrontend),
            }
            if backed_up && let Some(Answers { backed_up, .. }) = &self.backend {
                eventfd::hush(backed_up.as_fd());
            }
            self.rest_of_questions()?;
        }
    }

    /// Takes in what the front-end has sent, up to a bounded number of messages: it may send without end.
    fn requests(&mut self) -> Result<Read, Lost> {
        for _ in 0..BURST {
            match self.frontend.receive()? {
                Received::Message(message) => self.request(message)?,
                Received::Nothing => return Ok(Read::All),
                Received::End => return Ok(Read::End),
            }
        }
        Ok(Read::Some)
    }

    fn request(&mut self, Message { header, body, fds }: Message) -> Result<(), Lost> {
        if header.request != FrontendCode::IotlbMsg.number() {
            // What it asks may take a while.
            self.say()?;
        }
        let result = match Request::parse(&header, &body, fds) {
            Ok(Request::SetBackendReqFd(fd)) => self.open_channel(fd).map(|()| None),
            Ok(request) => {
                tracing::trace!(?request, "message");
                let checked = self.session.check_memory();
                checked.and_then(|()| self.session.handle(request)).map_err(Lost::from)
            }
            Err(error) => Err(error.into()),
        };
        // A message without an answer of its own is acknowledged where that was asked for.
        let acknowledge = header.need_reply == NeedReply::Yes && self.session.acknowledges();
        let reply = match &result {
            Ok(Some(reply)) => Some(reply.encode(header.request)),
            Ok(None) => acknowledge.then(|| Reply::U64(0).encode(header.request)),
            Err(_) => acknowledge.then(|| Reply::U64(1).encode(header.request)),
        };
        if let Some(reply) = reply {
            self.replies.extend_from_slice(&reply.bytes);
        }
        if !self.frontend.holds_message() {
            self.say()?;
        }
        match result {
            Ok(_) => Ok(()),
            Err(Lost::Session(error)) if goes_on(error.severity(), acknowledge) => {
                self.complain(&format_args!("message not carried out: {error}"));
                Ok(())
            }
            // Whoever was told of it can go on; whoever was not would be wrong about everything that follows.
            Err(Lost::Wire(error)) if acknowledge => {
                self.complain(&format_args!("bad message: {error}"));
                Ok(())
            }
            Err(lost) => Err(lost),
        }
    }

    /// Sends what there is to say.
    fn say(&mut self) -> Result<(), Lost> {
        let bytes = std::mem::take(&mut self.replies);
        Ok(self.frontend.send(&Frame { bytes, fds: Vec::new() })?)
    }

    /// Sends what the back-end channel did not take before. A front-end that stops reading keeps its own questions unasked,
    /// and nothing else; one that never will again is as good as gone.
    fn rest_of_questions(&mut self) -> Result<(), Lost> {
        match self.session.backend().flush() {
            Ok(()) => Ok(()),
            Err(error) => {
                self.complain(&format_args!("what the device asks can't be sent: {error}"));
                self.close_channel()
            }
        }
    }

    fn open_channel(&mut self, fd: OwnedFd) -> Result<(), Lost> {
        // Answers belong to questions by their order, which a second channel would upset.
        if self.backend.is_some() && self.session.needs_channel() {
            return Err(SessionError::ChannelInUse.into());
        }
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let backed_up = new_eventfd(0, flags).map_err(io::Error::from).map_err(SessionError::Resources)?;
        let rung = backed_up.try_clone().map_err(SessionError::Resources)?;
        let sender = Sender::new(fd.try_clone().map_err(SessionError::Resources)?);
        self.session.backend().connect(Some(Outgoing { sender, backed_up: rung }));
        self.backend = Some(Answers { channel: Channel::new(fd), backed_up });
        Ok(())
    }

    fn complain(&mut self, what: &dyn Display) {
        if let Some(untold) = self.complaints.tell() {
            tracing::warn!(untold, "{what}");
        }
    }

    /// Takes in the front-end's answers to our questions.
    fn answers(&mut self) -> Result<(), Lost> {
        loop {
            let Some(Answers { channel, .. }) = &mut self.backend else { return Ok(()) };
            match channel.receive() {
                Ok(Received::Message(message)) => match answer(message) {
                    Ok(granted) => self.session.answered(granted),
                    Err(error) => self.complain(&format_args!("bad answer on the back-end channel: {error}")),
                },
                Ok(Received::Nothing) => return Ok(()),
                Ok(Received::End) => break,
                Err(error) => {
                    self.complain(&format_args!("the back-end channel failed: {error}"));
                    break;
                }
            }
        }
        self.close_channel()
    }

    fn close_channel(&mut self) -> Result<(), Lost> {
        self.backend = None;
        self.session.backend().connect(None);
        if self.session.needs_channel() { Err(Lost::BackendChannel) } else { Ok(()) }
    }
}

/// Waits until one of `fds` is ready; looks for a while before it sleeps, but not while messages come now and then. A
/// front-end that waits for each acknowledgement before it goes on, as QEMU does with every page that it gives and every
/// range that it takes away, would else wait each time for as long as it takes to wake this thread.
fn wait(fds: &mut [PollFd<'_>], patience: &mut Patience) -> Result<(), Errno> {
    let since = Instant::now();
    while since.elapsed() < patience.now {
        if look(fds)? > 0 {
            return Ok(());
        }
        // Whoever is to say something may be waiting for this very processor.
        std::thread::yield_now();
    }
    match poll(fds, None) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error),
    }
    patience.learn(since.elapsed());
    Ok(())
}

fn look(fds: &mut [PollFd<'_>]) -> Result<usize, Errno> {
    match poll(fds, Some(&Timespec::default())) {
        Err(Errno::INTR) => Ok(0),
        looked => looked,
    }
}

fn goes_on(severity: Severity, told: bool) -> bool {
    severity == Severity::Minor || severity == Severity::Tell && told
}

/// What the front-end says to a MISS: zero if it has sent the translation.
fn answer(Message { header, body, fds }: Message) -> Result<bool, WireError> {
    BackendRequest::parse_reply(BackendCode::IotlbMsg, &header, &body, fds).map(|result| result == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_a_live_one_and_a_file_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let server = Server::bind(&path).unwrap();
        assert!(matches!(Server::bind(&path), Err(ServerError::InUse(_))));
        drop(server);
        assert!(!path.exists(), "the socket goes with its server");
        let server = Server::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let other = UnixListener::bind(&path).unwrap();
        drop(server);
        assert!(path.exists(), "another's socket stays");
        drop(other);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "mine").unwrap();
        assert!(matches!(Server::bind(&path), Err(ServerError::NotASocket(_))));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
    }
}
