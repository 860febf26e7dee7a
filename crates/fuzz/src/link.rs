//! Back-ends for what stands before them, and both of its sockets.

use crate::Bytes;
use crate::frontend::{drain, send};
use crate::plain::{self, Told};
use ringfence_device::Device;
use ringfence_device::blk::{self, Blk};
use ringfence_device::storage::Memory;
use ringfence_policy::IommuMode;
use ringfence_ring::Format;
use ringfence_vhost_user::channel::{Channel, Received};
use ringfence_vhost_user::server::{self, Keep, Server};
use ringfence_vhost_user::wire::{
    Frame, FrontendCode, Header, Kind as What, NeedReply, ProtocolFeatures, Reply, Request,
};
use ringfence_wrap::{Kind, MIN_POOL, OnError, Options, Wrapped};
use rustix::event::{PollFd, PollFlags, poll};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

/// Of a few kinds, pools and formats.
pub(crate) fn options(backend: &Path, choice: u8) -> Options {
    Options {
        backend: backend.to_owned(),
        kind: Kind::ALL[usize::from(choice) % 4],
        queues: None,
        queue_size: 256,
        pool: MIN_POOL << (choice >> 6),
        format: if choice & 16 == 0 { Format::Split } else { Format::Packed },
        timeout: None,
        on_error: if choice & 32 == 0 { OnError::Stop } else { OnError::Reconnect },
        patience: Duration::ZERO,
    }
}

/// A disk of ours that knows no flag.
pub(crate) struct Honest {
    socket: PathBuf,
    end: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Honest {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("honest");
        let server = Server::bind(&socket).expect("a path of our own");
        let (end, ended) = UnixStream::pair().expect("two descriptors");
        let storage = Arc::new(Memory::new(1 << 17, false).expect("memory for a disk"));
        let disk = Arc::new(Blk::new(storage, blk::Options { queues: 1, queue_size: 256, serial: String::new() }));
        let options = server::Options {
            iommu: IommuMode::Off,
            keep: Keep::Cache,
            queue_size: 256,
            poll: Duration::ZERO,
            io_timeout: Duration::from_secs(1),
        };
        let serve = move || server.run(disk, options, ended.as_fd()).expect("a socket that is there");
        Self { socket, end: Some(end), thread: Some(std::thread::spawn(serve)), _folder: folder }
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Honest {
    fn drop(&mut self) {
        drop(self.end.take());
        let ended = self.thread.take().expect("joined here alone").join();
        assert!(ended.is_ok() || std::thread::panicking(), "the honest back-end panicked");
    }
}

/// A back-end that answers as it should and does to its memory what bytes say.
///
/// It acts in the thread of whoever asks it to, and what it answers it says before it is asked: an input that had a thread
/// wait for the other's each message would be mostly waiting.
pub(crate) struct BackEnd {
    socket: PathBuf,
    told: Told,
    /// Its connection, once somebody has come.
    channel: Option<Channel>,
    door: Option<JoinHandle<Option<Channel>>>,
    _folder: tempfile::TempDir,
}

/// As much of the configuration space as anybody asks for.
const CONFIG: usize = 256;

/// All that it is asked, in this order: a front-end that gets no acknowledgements waits for nothing else.
fn answers(offered: u64) -> Vec<u8> {
    let features = ProtocolFeatures::MQ | ProtocolFeatures::CONFIG;
    let config = Reply::Config { offset: 0, flags: 0, data: vec![1; CONFIG] };
    let answers = [
        (FrontendCode::GetFeatures, Reply::U64(plain::BASE | offered)),
        (FrontendCode::GetProtocolFeatures, Reply::U64(features.bits())),
        (FrontendCode::GetQueueNum, Reply::U64(1)),
        (FrontendCode::GetConfig, config),
        (FrontendCode::GetVringBase, Reply::VringBase { index: 0, base: 0 }),
    ];
    answers.iter().flat_map(|(code, answer)| answer.encode(code.number()).bytes).collect()
}

impl BackEnd {
    /// Serves one front-end. `choice` says what it offers.
    pub(crate) fn start(choice: u8) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("back-end");
        let listener = UnixListener::bind(&socket).expect("a path of our own");
        let rings = u64::from(choice & 7) << 28 & 0x3000_0000 | u64::from(choice >> 2 & 1) << 34;
        let answers = answers(rings);
        let door = std::thread::spawn(move || {
            let channel = Channel::new(listener.accept().ok()?.0.into());
            // One that came for nothing has left.
            let _ = channel.send(&Frame { bytes: answers, fds: Vec::new() });
            Some(channel)
        });
        let told = Told::new(rings, [1; 64]);
        Self { socket, told, channel: None, door: Some(door), _folder: folder }
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Takes in what it has been told. Somebody has come.
    fn hear(&mut self) {
        if let Some(door) = self.door.take() {
            self.channel = door.join().expect("the door is simple");
        }
        let Some(channel) = &mut self.channel else { return };
        while let Ok(Received::Message(message)) = channel.receive() {
            let Ok(request) = Request::parse(&message.header, &message.body, message.fds) else { return };
            self.told.hear(request);
        }
    }

    /// Does something with its memory and its descriptors.
    pub(crate) fn act(&mut self, bytes: &mut Bytes<'_>) {
        self.hear();
        let told = &mut self.told;
        let (Some(region), Some(ring)) = (told.memory.iter().next(), &told.ring) else { return };
        let all = region.slice();
        let at = |addr: u64| addr.checked_sub(region.frontend_va().0).map(|at| at as usize);
        let (Some(descriptors), Some(used)) = (at(ring.descriptor), at(ring.used)) else { return };
        let size = told.size.max(1);
        match bytes.u8() % 8 {
            0 => {
                let at = bytes.below(all.len().min(1 << 16));
                let len = bytes.below(64).min(all.len() - at);
                all.write(at, bytes.take(len));
            }
            1 => {
                let at = used + bytes.below(256);
                let len = bytes.below(16);
                all.write(at, bytes.take(len));
            }
            2..=4 => {
                // Used entries that make some sense.
                let count = 1 + bytes.below(3);
                for _ in 0..count {
                    let slot = used + 4 + 8 * usize::from(told.used % size);
                    all.store_u32(slot, bytes.below(usize::from(size) + 2) as u32, Ordering::Relaxed);
                    let written = match bytes.u8() % 4 {
                        0 => bytes.u32(),
                        1 => 513,
                        _ => u32::from(bytes.u16() % 600),
                    };
                    all.store_u32(slot + 4, written, Ordering::Relaxed);
                    told.used = told.used.wrapping_add(1);
                }
                all.store_u16(used + 2, told.used, Ordering::Release);
            }
            5 => {
                // The same in a packed ring.
                let slot = descriptors + 16 * bytes.below(usize::from(size));
                all.store_u32(slot + 8, bytes.u32() & 0x3ff, Ordering::Relaxed);
                all.store_u16(slot + 12, bytes.u8().into(), Ordering::Relaxed);
                let flags = u16::from(bytes.u8());
                all.store_u16(slot + 14, flags & 0x87 | (flags & 0x40) << 9, Ordering::Release);
            }
            6 => {
                if let Some(kick) = &told.kick {
                    let _ = rustix::io::write(kick, &u64::from(bytes.u8()).to_ne_bytes());
                }
            }
            _ => {}
        }
        if let Some(call) = &told.call {
            let _ = rustix::io::write(call, &1u64.to_ne_bytes());
        }
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        if let Some(door) = self.door.take() {
            // One that nobody came to is come to now.
            let _ = UnixStream::connect(&self.socket);
            let ended = door.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the hostile back-end panicked");
        }
    }
}

/// A back-end whose answers are anything, at some point of the acquaintance.
pub(crate) fn hostile_answers(data: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("back-end");
    let listener = UnixListener::bind(&socket).expect("a path of our own");
    let owned = data.get(1..).unwrap_or_default().to_vec();
    let thread = std::thread::spawn(move || {
        let Ok((stream, _)) = listener.accept() else { return };
        drop(listener);
        answer_anything(stream, &owned);
    });
    if let Ok(device) = Wrapped::open(options(&socket, data.first().copied().unwrap_or_default())) {
        let device: Arc<dyn Device> = Arc::new(device);
        let _ = device.read_config(0, 16);
        if device.take(1 << 32).is_ok() {
            let _ = device.write_config(4, &[1, 2]);
            let handler = Arc::clone(&device).open_queue(0, 64, 1 << 32);
            device.set_status(15);
            drop(handler);
            device.reset();
        }
    }
    let _ = UnixStream::connect(&socket);
    thread.join().expect("the back-end is simple");
}

fn answer_anything(stream: UnixStream, data: &[u8]) {
    let bytes = &mut Bytes::new(data);
    let mut channel: Channel = Channel::new(OwnedFd::from(stream));
    let mut own: Option<OwnedFd> = None;
    let mut told = Told::new(0x3000_0000, [1; 64]);
    loop {
        if !channel.holds_message() {
            let _ = poll(&mut [PollFd::new(&channel, PollFlags::IN)], None);
        }
        let message = match channel.receive() {
            Ok(Received::Message(message)) => message,
            Ok(Received::Nothing) => continue,
            Ok(Received::End) | Err(_) => return,
        };
        let number = message.header.request;
        let has_answer = message.header.need_reply == NeedReply::Yes
            || matches!(
                FrontendCode::try_from(number),
                Ok(FrontendCode::GetFeatures
                    | FrontendCode::GetProtocolFeatures
                    | FrontendCode::GetQueueNum
                    | FrontendCode::GetConfig
                    | FrontendCode::GetVringBase
                    | FrontendCode::GetStatus
                    | FrontendCode::GetMaxMemSlots)
            );
        let Ok(request) = Request::parse(&message.header, &message.body, message.fds) else { return };
        let honest = match request {
            Request::SetBackendReqFd(fd) => {
                own = Some(fd);
                None
            }
            Request::GetProtocolFeatures => Some(Reply::U64(u64::MAX)),
            request => told.hear(request),
        };
        // Whoever has no more to say leaves: an answer that never comes is waited for, which is no finding.
        if bytes.is_empty() && has_answer {
            return;
        }
        if let Some(own) = &own
            && bytes.one_in(4)
        {
            let len = bytes.below(48);
            send(own, &Frame { bytes: bytes.take(len).to_vec(), fds: Vec::new() });
        }
        match bytes.u8() % 8 {
            _ if !has_answer => {}
            0 => {
                let len = bytes.below(64);
                send(&channel, &Frame { bytes: bytes.take(len).to_vec(), fds: Vec::new() });
                return;
            }
            1 => {
                let len = bytes.below(64);
                let body = bytes.take(len);
                let request = if bytes.one_in(2) { number } else { bytes.u32() };
                let header = Header { request, kind: What::Reply, need_reply: NeedReply::No, size: body.len() as u32 };
                send(&channel, &Frame { bytes: [&header.encode()[..], body].concat(), fds: Vec::new() });
            }
            2 => {
                send(&channel, &Reply::U64(bytes.u64()).encode(number));
            }
            _ => {
                send(&channel, &honest.unwrap_or(Reply::U64(0)).encode(number));
            }
        }
    }
}

/// The mode in which messages pass, with anything from either side.
pub(crate) fn relayed(data: &[u8]) {
    let bytes = &mut Bytes::new(data);
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("back-end");
    let listener = UnixListener::bind(&socket).expect("a path of our own");
    let (front, frontend) = UnixStream::pair().expect("two descriptors");
    let (ended, end) = UnixStream::pair().expect("two more");
    let how = options(&socket, 0);
    let relay = std::thread::spawn(move || ringfence_wrap::pass::relay(frontend, &how, end.as_fd()));
    let back = listener.accept().expect("the relay comes").0;
    for _ in 0..100 {
        if bytes.is_empty() || !drain(&front) || !drain(&back) {
            break;
        }
        let choice = bytes.u8();
        let (side, kind) = if choice & 1 == 0 { (&front, What::Request) } else { (&back, What::Reply) };
        let need_reply = if choice & 2 == 0 { NeedReply::No } else { NeedReply::Yes };
        let len = bytes.below(72);
        let body = bytes.take(len);
        let header = Header { request: bytes.below(46) as u32, kind, need_reply, size: body.len() as u32 };
        let mut whole = [&header.encode()[..], body].concat();
        if choice & 0xf0 == 0 {
            let at = bytes.below(whole.len());
            whole[at] = bytes.u8();
        }
        let fds = (0..bytes.below(3)).map(|_| ended.as_fd()).collect();
        if !send(side, &Frame { bytes: whole, fds }) {
            break;
        }
    }
    drop((front, back));
    relay.join().expect("the relay does not panic");
}
