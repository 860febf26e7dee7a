//! The way to the client, shared by the session's thread, which answers, and the queues', which ask.

use crate::wire::{Answer, Command, Frame, Header, Kind, MAX_DATA};
use ringfence_vhost_user::channel::{ChannelError, SendError, Sender, send_frame};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use zerocopy::{Immutable, IntoBytes};

/// How long an answer to a question of ours is waited for.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long a client is waited for that has answers to read when its connection ends.
const PARTING: Duration = Duration::from_secs(1);

/// Sends whole messages, and matches answers with questions.
#[derive(Debug)]
pub(crate) struct Link {
    /// Whole messages are sent under its lock.
    main: Mutex<Sender>,
    asking: Mutex<Asking>,
    answered: Condvar,
}

#[derive(Debug)]
struct Asking {
    /// Where questions go, if not beside the answers.
    twin: Option<OwnedFd>,
    /// The most data of one message.
    max: u32,
    next: u16,
    /// Questions by id; with what came, or `None` while nothing has.
    open: BTreeMap<u16, Option<Result<Vec<u8>, Unanswered>>>,
    /// How many want no question to be under way.
    hushed: usize,
}

/// Why a question has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unanswered {
    /// The client refuses.
    Refused,
    /// Not now: whoever is to answer waits for us. Try again.
    Later,
}

/// What is known of bytes that were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Arrival {
    /// They are there.
    Seen,
    /// They are there before what we say next is heard: whoever is to answer waits for us.
    OnItsWay,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct RawDma {
    address: u64,
    count: u64,
}

impl Link {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        let asking = Asking { twin: None, max: MAX_DATA, next: 0, open: BTreeMap::new(), hushed: 0 };
        Self { main: Mutex::new(Sender::new(socket)), asking: Mutex::new(asking), answered: Condvar::new() }
    }

    fn asking(&self) -> MutexGuard<'_, Asking> {
        self.asking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the client takes, and where it is asked.
    pub(crate) fn set_up(&self, max: u32, twin: Option<OwnedFd>) {
        let mut asking = self.asking();
        asking.max = max.clamp(1, MAX_DATA);
        asking.twin = twin;
    }

    /// Answers. A client that does not read at once gets it when it does, by [`Link::flush`].
    pub(crate) fn send<E>(&self, frame: &Frame<'_>) -> Result<(), ChannelError<E>> {
        self.main().send_soon(frame)
    }

    /// Whether there are answers that the client has no room for: poll for room, then [`Link::flush`].
    pub(crate) fn is_backed_up(&self) -> bool {
        self.main().is_backed_up()
    }

    /// Sends as much of them as there is room for. Never waits.
    pub(crate) fn flush(&self) -> Result<(), SendError> {
        self.main().flush()
    }

    /// Sends all of them, to a client that is about to lose its connection: what it is not reading by then it does without.
    pub(crate) fn drain(&self) {
        let _ = self.main().drain::<()>(PARTING);
    }

    fn main(&self) -> MutexGuard<'_, Sender> {
        self.main.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client answered.
    pub(crate) fn answered(&self, header: &Header, body: Vec<u8>) {
        let mut asking = self.asking();
        // Who did not ask, or has given up, gets no answer.
        if let Some(open @ None) = asking.open.get_mut(&header.id) {
            *open = Some(if header.error.is_some() { Err(Unanswered::Refused) } else { Ok(body) });
            self.answered.notify_all();
        }
    }

    /// From here on, and until what comes back is dropped, no question is under way: those that were are given up.
    pub(crate) fn hush(&self) -> Hush<'_> {
        self.asking().hushed += 1;
        self.answered.notify_all();
        Hush(self)
    }

    /// Reads memory of the client's.
    pub(crate) fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Unanswered> {
        let max = self.asking().max as usize;
        let mut at = address;
        for part in into.chunks_mut(max) {
            let question = RawDma { address: at, count: part.len() as u64 };
            let answer = self.ask(Command::DmaRead, question.as_bytes())?;
            // Its address and count come first.
            let data = answer.get(size_of::<RawDma>()..).filter(|data| data.len() == part.len());
            let counted = answer.get(8..16) == Some(&question.count.to_ne_bytes());
            part.copy_from_slice(data.filter(|_| counted).ok_or(Unanswered::Refused)?);
            at = at.wrapping_add(part.len() as u64);
        }
        Ok(())
    }

    /// Writes memory of the client's.
    pub(crate) fn write(&self, address: u64, from: &[u8]) -> Result<Arrival, Unanswered> {
        let max = self.asking().max as usize;
        let (mut at, mut arrival) = (address, Arrival::Seen);
        for part in from.chunks(max) {
            let question = RawDma { address: at, count: part.len() as u64 };
            match self.ask(Command::DmaWrite, &[question.as_bytes(), part].concat()) {
                Ok(_) => {}
                Err(Unanswered::Later) => arrival = Arrival::OnItsWay,
                Err(refused) => return Err(refused),
            }
            at = at.wrapping_add(part.len() as u64);
        }
        Ok(arrival)
    }

    fn ask(&self, command: Command, body: &[u8]) -> Result<Vec<u8>, Unanswered> {
        let mut asking = self.asking();
        let hushed = asking.hushed > 0;
        if hushed && command == Command::DmaRead {
            return Err(Unanswered::Later);
        }
        let mut id = asking.next;
        while asking.open.contains_key(&id) {
            id = id.wrapping_add(1);
        }
        asking.next = id.wrapping_add(1);
        if !hushed {
            asking.open.insert(id, None);
        }
        let (command, body_len) = (command as u16, body.len() as u32);
        let answer = if hushed { Answer::Unwanted } else { Answer::Wanted };
        let header = Header { id, command, kind: Kind::Command, answer, error: None, body: body_len };
        let frame = Frame { bytes: [&header.encode(), body].concat(), fds: Vec::new() };
        let twin = asking.twin.as_ref().and_then(|twin| twin.try_clone().ok());
        drop(asking);
        let sent: Result<(), ChannelError<()>> = match twin {
            Some(twin) => {
                let _one_at_a_time = self.main();
                send_frame(twin.as_fd(), &frame)
            }
            None => self.main().send(&frame),
        };
        let mut asking = self.asking();
        if sent.is_err() {
            asking.open.remove(&id);
            return Err(Unanswered::Refused);
        }
        // No answer was asked for, also where there is no hush any more by now.
        if hushed {
            return Err(Unanswered::Later);
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match asking.open.get_mut(&id).and_then(Option::take) {
                Some(answer) => {
                    asking.open.remove(&id);
                    return answer;
                }
                None if asking.hushed > 0 || left.is_zero() => {
                    asking.open.remove(&id);
                    return Err(if left.is_zero() { Unanswered::Refused } else { Unanswered::Later });
                }
                None => {}
            }
            asking = self.answered.wait_timeout(asking, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// See [`Link::hush`].
pub(crate) struct Hush<'l>(&'l Link);

impl Drop for Hush<'_> {
    fn drop(&mut self) {
        self.0.asking().hushed -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfence_vhost_user::channel::Head;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    /// More than a socket holds, so that the hush is over before all of it is sent.
    #[test]
    fn what_is_sent_in_a_hush_waits_for_no_answer_after_it() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let link = Link::new(ours.into());
        let data = vec![7; MAX_DATA as usize];
        let hush = link.hush();
        let (arrival, message) = std::thread::scope(|scope| {
            let written = scope.spawn(|| link.write(0x1000, &data));
            let mut message = vec![0; Header::SIZE + size_of::<RawDma>() + data.len()];
            theirs.read_exact(&mut message[..1]).unwrap();
            drop(hush);
            theirs.read_exact(&mut message[1..]).unwrap();
            (written.join().unwrap(), message)
        });
        assert_eq!(arrival, Ok(Arrival::OnItsWay));
        let header = Header::parse(&message[..Header::SIZE].try_into().unwrap()).unwrap();
        assert_eq!(header.answer, Answer::Unwanted);
        assert!(link.asking().open.is_empty());
    }
}
