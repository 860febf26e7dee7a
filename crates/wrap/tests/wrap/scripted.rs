//! A back-end that does what it is told, right or wrong: a disk of one split queue, in a thread.

use crate::plain::Told;
use ringfence_dma::HostSlice;
use ringfence_vhost_user::channel::{Channel, Received};
use ringfence_vhost_user::wire::{NeedReply, Reply, Request};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// What a back-end does with the first requests of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// What it should.
    Honest,
    /// The used index jumps.
    WildIndex,
    /// A chain is used that was never given.
    NeverGiven,
    /// A chain is used that can't exist.
    NoSuchChain,
    /// One chain is used twice.
    Twice,
    /// More is written than there is room for, as it says.
    TooLong,
    /// Nothing comes back.
    Silent,
    /// It hangs up in the middle of requests.
    Dies,
    /// A read went well, of which it wrote a byte.
    Short,
    /// What it says lies where the descriptors are, after it has read them: all of them, and the avail ring.
    Rewrites,
    /// What is no message.
    Babbles,
    /// It makes the eventfd that it is kicked by blocking, fills it, and never reads it again.
    FillsKick,
    /// It does not answer to the memory table.
    Deaf,
    /// It says no to the memory table.
    Refuses,
    /// Whatever this number leads to: bytes anywhere in its memory, used entries and indices of any kind, and now and then
    /// what it should.
    Wild(u64),
}

/// Ends with the value.
pub(crate) struct Scripted {
    pub(crate) socket: PathBuf,
    pub(crate) disk: Arc<Mutex<Vec<u8>>>,
    connections: Arc<AtomicUsize>,
    requests: Arc<AtomicUsize>,
    ended: Arc<AtomicUsize>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Scripted {
    /// A disk of 8 MiB, whose connections act in this order; those that come after are honest.
    pub(crate) fn start(acts: &[Act]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("scripted.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let disk = Arc::new(Mutex::new(vec![0; 8 << 20]));
        let [connections, requests, ended]: [Arc<AtomicUsize>; 3] = Default::default();
        let end = Arc::<AtomicBool>::default();
        let thread = std::thread::spawn({
            let (disk, connections, end) = (Arc::clone(&disk), Arc::clone(&connections), Arc::clone(&end));
            let (requests, ended) = (Arc::clone(&requests), Arc::clone(&ended));
            let mut acts = VecDeque::from(acts.to_vec());
            move || {
                loop {
                    let (stream, _) = listener.accept().unwrap();
                    if end.load(Ordering::Relaxed) {
                        break;
                    }
                    connections.fetch_add(1, Ordering::Relaxed);
                    let act = acts.pop_front().unwrap_or(Act::Honest);
                    Connection::new(stream, act, Arc::clone(&disk), Arc::clone(&requests)).run();
                    ended.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Self { socket, disk, connections, requests, ended, end, thread: Some(thread), _folder: folder }
    }

    /// Waits until there were so many requests.
    pub(crate) fn has_taken(&self, requests: usize) {
        while self.requests.load(Ordering::Relaxed) < requests {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    /// How many requests there were, on all connections.
    pub(crate) fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }

    /// How many connections have ended.
    pub(crate) fn ended(&self) -> usize {
        self.ended.load(Ordering::Relaxed)
    }

    /// How many connections there were.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        // A connection that nobody uses, so that the thread looks.
        let _ = UnixStream::connect(&self.socket);
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking(), "the scripted back-end panicked");
    }
}

struct Connection {
    channel: Channel,
    act: Act,
    disk: Arc<Mutex<Vec<u8>>>,
    requests: Arc<AtomicUsize>,
    told: Told,
    random: RefCell<u64>,
    filled: bool,
}

impl Connection {
    fn new(stream: UnixStream, act: Act, disk: Arc<Mutex<Vec<u8>>>, requests: Arc<AtomicUsize>) -> Self {
        let mut config = [0; 64];
        config[..8].copy_from_slice(&(8u64 << 20 >> 9).to_le_bytes());
        Self {
            channel: Channel::new(stream.into()),
            act,
            disk,
            requests,
            told: Told::new(1 << 9, config),
            filled: false,
            random: RefCell::new(if let Act::Wild(seed) = act { seed } else { 1 }),
        }
    }

    /// Until the front-end hangs up, or the act is over.
    fn run(&mut self) {
        loop {
            let mut fds = vec![PollFd::new(&self.channel, PollFlags::IN)];
            fds.extend(self.told.kick.as_ref().map(|kick| PollFd::new(kick, PollFlags::IN)));
            poll(&mut fds, None).unwrap();
            let kicked = fds.len() == 2 && !fds[1].revents().is_empty();
            loop {
                match self.channel.receive() {
                    Ok(Received::Message(message)) => {
                        let request = Request::parse(&message.header, &message.body, message.fds).unwrap();
                        if self.act == Act::Babbles {
                            let _ = rustix::io::write(&self.channel, &[0xff; 64]);
                            return;
                        }
                        if self.act == Act::Deaf && matches!(request, Request::SetMemTable(_)) {
                            // Until it is hung up on.
                            let _ = poll(&mut [PollFd::new(&self.channel, PollFlags::RDHUP)], None);
                            return;
                        }
                        let refuse = self.act == Act::Refuses && matches!(request, Request::SetMemTable(_));
                        let reply = self.told.hear(request);
                        let wanted = message.header.need_reply == NeedReply::Yes;
                        let reply = reply.or(wanted.then_some(Reply::U64(refuse.into())));
                        if let Some(reply) = reply
                            && self.channel.send(&reply.encode(message.header.request)).is_err()
                        {
                            return;
                        }
                    }
                    Ok(Received::Nothing) => break,
                    Ok(Received::End) | Err(_) => return,
                }
            }
            if kicked && let Some(kick) = &self.told.kick {
                if self.filled {
                    // It goes on hearing its front-end, and sees what it is given.
                    let pause = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
                    poll(&mut [PollFd::new(&self.channel, PollFlags::IN)], Some(&pause)).unwrap();
                    self.count_available();
                    continue;
                }
                let _ = rustix::io::read(kick, &mut [0; 8]);
                if self.act == Act::FillsKick {
                    rustix::fs::fcntl_setfl(kick, rustix::fs::OFlags::empty()).unwrap();
                    rustix::io::write(kick, &(u64::MAX - 1).to_ne_bytes()).unwrap();
                    self.filled = true;
                }
                if self.serve().is_none() {
                    return;
                }
            }
        }
    }

    /// Counts what is in the avail ring, taken or not.
    fn count_available(&self) {
        if let Some(addresses) = self.told.ring {
            let (_, va, all) = self.region();
            let index = all.load_u16((addresses.available - va) as usize + 2, Ordering::Acquire);
            self.requests.fetch_max(index.into(), Ordering::Relaxed);
        }
    }

    fn region(&self) -> (u64, u64, HostSlice<'_>) {
        let region = self.told.memory.iter().next().unwrap();
        assert_eq!(self.told.memory.iter().count(), 1, "the private memory and nothing else");
        (region.gpa().0, region.frontend_va().0, region.slice())
    }

    /// Takes what is available; `None` ends the connection.
    fn serve(&mut self) -> Option<()> {
        let addresses = self.told.ring?;
        let (gpa, va, all) = self.region();
        let at = |addr: u64| (addr - va) as usize;
        let (table, avail, ring) = (at(addresses.descriptor), at(addresses.available), at(addresses.used));
        let (size, act) = (self.told.size, self.act);
        let mut used = self.told.used;
        let mut next = self.told.next;
        let push = |used: &mut u16, id: u32, len: u32| {
            let slot = usize::from(*used % size);
            all.store_u32(ring + 4 + 8 * slot, id, Ordering::Relaxed);
            all.store_u32(ring + 8 + 8 * slot, len, Ordering::Relaxed);
            *used = used.wrapping_add(1);
        };
        while next != all.load_u16(avail + 2, Ordering::Acquire) {
            let head = all.load_u16(avail + 4 + 2 * usize::from(next % size), Ordering::Relaxed);
            next = next.wrapping_add(1);
            self.requests.fetch_add(1, Ordering::Relaxed);
            let mut buffers = Vec::new();
            let mut index = head;
            // What it has scribbled over it must not follow.
            if matches!(act, Act::Wild(_)) && !is_whole(&all, table, gpa, size, head) {
                return None;
            }
            loop {
                let entry = table + 16 * usize::from(index);
                let (addr, len) = (all.load_u64(entry, Ordering::Relaxed), all.load_u32(entry + 8, Ordering::Relaxed));
                let flags = all.load_u16(entry + 12, Ordering::Relaxed);
                buffers.push((all.sub((addr - gpa) as usize, len as usize), flags & 2 != 0));
                if flags & 1 == 0 {
                    break;
                }
                index = all.load_u16(entry + 14, Ordering::Relaxed);
            }
            if act == Act::Rewrites {
                all.sub(table, 16 * usize::from(size)).fill(0xff);
                all.sub(avail, 4 + 2 * usize::from(size)).fill(0xff);
            }
            match act {
                Act::Wild(_) => self.run_wild(all, ring, &buffers, &mut used, &push, head),
                Act::Honest | Act::Rewrites | Act::FillsKick => push(&mut used, head.into(), self.carry_out(&buffers)),
                Act::WildIndex => used = used.wrapping_add(1000),
                Act::NeverGiven => push(&mut used, u32::from(head) ^ 1, 1),
                Act::NoSuchChain => push(&mut used, u32::MAX, 1),
                Act::Twice => {
                    let written = self.carry_out(&buffers);
                    push(&mut used, head.into(), written);
                    push(&mut used, head.into(), written);
                }
                Act::TooLong => push(&mut used, head.into(), u32::MAX),
                Act::Short => {
                    self.carry_out(&buffers);
                    push(&mut used, head.into(), 1);
                }
                Act::Silent | Act::Deaf => {}
                Act::Dies | Act::Babbles | Act::Refuses => return None,
            }
            // What follows in the avail ring is no guide any more.
            if matches!(act, Act::Rewrites | Act::WildIndex) {
                break;
            }
        }
        all.store_u16(ring + 2, used, Ordering::Release);
        (self.told.next, self.told.used) = (next, used);
        if let Some(call) = &self.told.call {
            let _ = rustix::io::write(call, &1u64.to_ne_bytes());
        }
        Some(())
    }

    /// Some of everything.
    fn run_wild(
        &self,
        all: HostSlice<'_>,
        ring: usize,
        buffers: &[(HostSlice<'_>, bool)],
        used: &mut u16,
        push: &dyn Fn(&mut u16, u32, u32),
        head: u16,
    ) {
        let mut random = self.random.borrow_mut();
        let mut next = |below: usize| {
            // xorshift: any numbers will do, and the same ones each time.
            *random ^= *random << 13;
            *random ^= *random >> 7;
            *random ^= *random << 17;
            (*random >> 11) as usize % below
        };
        for _ in 0..next(8) {
            let (at, len) = (next(all.len() - 64), 1 + next(63));
            // The rings are what is near the start.
            let at = if next(64) != 0 { at } else { at % (ring + 1024) };
            let bytes: Vec<u8> = (0..len).map(|_| next(256) as u8).collect();
            all.write(at, &bytes);
        }
        match next(128) {
            0 => push(used, next(1 << 17) as u32, next(1 << 20) as u32),
            1 => push(used, head.into(), next(1 << 14) as u32),
            2 => *used = used.wrapping_add(next(1 << 16) as u16),
            3 => {}
            _ => push(used, head.into(), self.try_carry_out(buffers).unwrap_or(0)),
        }
    }

    /// A request of a disk (§5.2.6), cut into header, data and status; how many bytes were written.
    fn carry_out(&self, buffers: &[(HostSlice<'_>, bool)]) -> u32 {
        self.try_carry_out(buffers).expect("a request that a disk can carry out")
    }

    fn try_carry_out(&self, buffers: &[(HostSlice<'_>, bool)]) -> Option<u32> {
        let mut header = [0; 16];
        buffers[0].0.read(0, &mut header);
        let kind = u32::from_le_bytes(header[..4].try_into().unwrap());
        let mut at = usize::try_from(u64::from_le_bytes(header[8..].try_into().unwrap())).ok()?.checked_mul(512)?;
        let (status, data) = buffers[1..].split_last()?;
        let disk = &mut *self.disk.lock().unwrap();
        let mut written = 0;
        for (buffer, writable) in data {
            let place = disk.get_mut(at..at.checked_add(buffer.len())?)?;
            match (kind, writable) {
                (0, true) => buffer.write(0, place),
                (1, false) => buffer.read(0, place),
                _ => return None,
            }
            at += buffer.len();
            written += if *writable { buffer.len() as u32 } else { 0 };
        }
        status.0.write(0, &[0]);
        Some(written + 1)
    }
}

/// Whether the chain at `head` lies in this memory, begins with a header and comes to an end.
fn is_whole(all: &HostSlice<'_>, table: usize, gpa: u64, size: u16, head: u16) -> bool {
    let mut index = head;
    for count in 0..size {
        if index >= size {
            return false;
        }
        let entry = table + 16 * usize::from(index);
        let (addr, len) = (all.load_u64(entry, Ordering::Relaxed), all.load_u32(entry + 8, Ordering::Relaxed));
        let inside = addr.checked_sub(gpa).is_some_and(|at| at + u64::from(len) <= all.len() as u64);
        if !inside || len == 0 || count == 0 && len != 16 {
            return false;
        }
        if all.load_u16(entry + 12, Ordering::Relaxed) & 1 == 0 {
            return count >= 1;
        }
        index = all.load_u16(entry + 14, Ordering::Relaxed);
    }
    false
}
