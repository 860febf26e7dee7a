use super::*;
use crate::wire::{BackendRequest, FrontendCode, IotlbReport, Kind, NeedReply, Reply, Request};
use ringfence_dma::{BusAddr, Permission};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

fn pair() -> (Channel, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Channel::new(ours.into()), theirs)
}

fn message(channel: &mut Channel) -> Message {
    match channel.receive() {
        Ok(Received::Message(message)) => message,
        other => panic!("no message: {other:?}"),
    }
}

fn send_with_fds(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
}

/// How many descriptors of this process are open on the same thing as `fd`.
fn open_copies(fd: BorrowedFd<'_>) -> usize {
    let name = |path: &std::path::Path| std::fs::read_link(path).ok();
    let wanted = name(format!("/proc/self/fd/{}", fd.as_raw_fd()).as_ref());
    let entries = std::fs::read_dir("/proc/self/fd").unwrap();
    entries.filter(|entry| name(&entry.as_ref().unwrap().path()) == wanted).count()
}

#[test]
fn a_message_may_come_in_any_pieces() {
    let (mut channel, mut peer) = pair();
    let mut stream = Request::<OwnedFd>::SetFeatures(0x1234_5678_9abc_def0).encode(NeedReply::Yes).bytes;
    stream.extend(Request::<OwnedFd>::GetFeatures.encode(NeedReply::No).bytes);
    let mut arrived = Vec::new();
    for byte in stream {
        assert!(matches!(channel.receive(), Ok(Received::Nothing)));
        peer.write_all(&[byte]).unwrap();
        if let Received::Message(Message { header, body, fds }) = channel.receive().unwrap() {
            arrived.push(Request::parse(&header, &body, fds).unwrap());
        }
    }
    assert!(matches!(arrived[..], [Request::SetFeatures(0x1234_5678_9abc_def0), Request::GetFeatures]));
    drop(peer);
    assert!(matches!(channel.receive(), Ok(Received::End)));
}

#[test]
fn descriptors_belong_to_the_message_they_came_with() {
    let (mut channel, peer) = pair();
    let sender = Channel::<Header>::new(peer.into());
    let (one, two) = (std::io::pipe().unwrap(), std::io::pipe().unwrap());
    sender.send(&Request::<OwnedFd>::GetFeatures.encode(NeedReply::No)).unwrap();
    sender.send(&Request::SetLogFd(&one.1).encode(NeedReply::No)).unwrap();
    sender.send(&Request::SetBackendReqFd(&two.1).encode(NeedReply::No)).unwrap();
    assert!(message(&mut channel).fds.is_empty());
    for (code, mut pipe) in [(FrontendCode::SetLogFd, one.0), (FrontendCode::SetBackendReqFd, two.0)] {
        let Message { header, fds, .. } = message(&mut channel);
        assert_eq!(header.request, code.number());
        let [fd] = <[_; 1]>::try_from(fds).unwrap();
        assert!(rustix::io::fcntl_getfd(&fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        let mut file = std::fs::File::from(fd);
        file.write_all(b"!").unwrap();
        let mut byte = [0];
        pipe.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"!");
    }
}

#[test]
fn what_was_read_ahead_is_said_to_be_here() {
    let (mut channel, mut peer) = pair();
    let one = Request::<OwnedFd>::SetFeatures(7).encode(NeedReply::No).bytes;
    // More than are read at a time, and a part of one.
    let count = 3 * AHEAD / one.len();
    let mut stream = one.repeat(count);
    stream.extend_from_slice(&one[..5]);
    peer.write_all(&stream).unwrap();
    assert!(!channel.holds_message(), "nothing was read yet");
    let mut reads = 0;
    for number in 0..count {
        reads += u32::from(!channel.holds_message());
        let Message { header, body, fds } = message(&mut channel);
        assert!(matches!(Request::parse(&header, &body, fds), Ok(Request::SetFeatures(7))), "message {number}");
    }
    assert!(reads <= 4, "{reads} reads for {count} messages");
    assert!(!channel.holds_message(), "a part of a message is none");
    assert!(matches!(channel.receive(), Ok(Received::Nothing)));
    peer.write_all(&one[5..]).unwrap();
    message(&mut channel);
    // What is no message is to be told at once, too.
    peer.write_all(&[one.clone(), vec![0xff; 20]].concat()).unwrap();
    message(&mut channel);
    assert!(channel.holds_message());
    assert!(matches!(channel.receive(), Err(ChannelError::Header(_))));
}

/// A protocol whose messages may be longer than what is read at a time: a length, and so many bytes.
#[derive(Clone, Copy, Debug)]
struct Length(u32);

impl Head for Length {
    type Bytes = [u8; 4];
    type Error = u32;
    const MAX_FDS: usize = 1;

    fn parse(bytes: &[u8; 4]) -> Result<Self, u32> {
        let length = u32::from_ne_bytes(*bytes);
        if length <= 1 << 20 { Ok(Self(length)) } else { Err(length) }
    }

    fn body(&self) -> usize {
        self.0 as usize
    }
}

#[test]
fn long_messages_and_short_ones_follow_each_other() {
    let (ours, mut peer) = UnixStream::pair().unwrap();
    let mut channel = Channel::<Length>::new(ours.into());
    let lengths = [0, 5, AHEAD - 4, AHEAD - 3, 7, 1 << 20, 0, 3 * AHEAD, 1];
    let writer = std::thread::spawn(move || {
        for (number, length) in lengths.into_iter().enumerate() {
            peer.write_all(&[&(length as u32).to_ne_bytes()[..], &vec![number as u8; length]].concat()).unwrap();
        }
    });
    for (number, length) in lengths.into_iter().enumerate() {
        let message = channel.receive_until(Instant::now() + Duration::from_secs(60)).unwrap();
        assert_eq!(message.body, vec![number as u8; length], "message {number}");
        assert!(channel.inbox.bytes.len() <= (1 << 20) + 4);
    }
    writer.join().unwrap();
    assert!(matches!(channel.receive(), Ok(Received::End)));
    assert_eq!(channel.inbox.bytes.len(), AHEAD, "what a long one took was given back");
}

#[test]
fn descriptors_belong_to_the_last_message_of_their_read() {
    let (file, other) = (std::io::pipe().unwrap(), std::io::pipe().unwrap());
    let plain = Request::<OwnedFd>::GetFeatures.encode(NeedReply::No).bytes;
    let log = Request::SetLogFd(&file.1);
    let log = log.encode(NeedReply::No);
    for cut in 1..log.bytes.len() {
        // Two that have none, one that comes in two pieces with its descriptor at the first, one that has another.
        let (mut channel, mut peer) = pair();
        peer.write_all(&[&plain[..], &plain].concat()).unwrap();
        send_with_fds(&peer, &log.bytes[..cut], &log.fds);
        peer.write_all(&log.bytes[cut..]).unwrap();
        send_with_fds(&peer, &log.bytes, &[other.1.as_fd()]);
        peer.write_all(&plain).unwrap();
        let kinds = |fds: &[OwnedFd]| {
            let same = |one: &OwnedFd, two: &std::io::PipeWriter| {
                let (one, two) = (rustix::fs::fstat(one).unwrap(), rustix::fs::fstat(two).unwrap());
                one.st_ino == two.st_ino
            };
            fds.iter()
                .map(|fd| {
                    if same(fd, &file.1) {
                        'f'
                    } else if same(fd, &other.1) {
                        'o'
                    } else {
                        '?'
                    }
                })
                .collect()
        };
        let got: Vec<String> = (0..5).map(|_| kinds(&message(&mut channel).fds)).collect();
        assert_eq!(got, ["", "", "f", "o", ""], "cut at {cut}");
    }
}

#[test]
fn descriptors_beyond_any_message_are_closed() {
    // As many as fit the kernel's idea of our buffer, and more than that; at once, and piece by piece.
    for (chunks, each) in [(1, 9), (1, 64), (2, 5), (12, 1)] {
        let (mut channel, peer) = pair();
        let (reader, writer) = std::io::pipe().unwrap();
        let before = open_copies(writer.as_fd());
        for _ in 0..chunks {
            send_with_fds(&peer, &[1], &vec![writer.as_fd(); each]);
        }
        assert_eq!(channel.receive().unwrap_err(), ChannelError::TooManyFds, "{chunks} times {each}");
        // Those that nobody has read go with the socket.
        drop((channel, peer));
        assert_eq!(open_copies(writer.as_fd()), before);
        drop(reader);
    }
}

#[test]
fn what_is_no_message_ends_the_connection() {
    let (mut channel, mut peer) = pair();
    peer.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    assert!(matches!(channel.receive(), Err(ChannelError::Header(_))));

    let (mut channel, mut peer) = pair();
    peer.write_all(&Request::<OwnedFd>::SetFeatures(1).encode(NeedReply::No).bytes[..15]).unwrap();
    drop(peer);
    assert_eq!(channel.receive().unwrap_err(), ChannelError::Truncated { got: 15 });

    let (mut channel, mut peer) = pair();
    peer.write_all(&[1]).unwrap();
    drop(peer);
    assert_eq!(channel.receive().unwrap_err(), ChannelError::Truncated { got: 1 });
}

#[test]
fn an_answer_is_waited_for_until_the_deadline() {
    let (mut channel, peer) = pair();
    let soon = Instant::now() + Duration::from_millis(20);
    assert_eq!(channel.receive_until(soon).unwrap_err(), ChannelError::TimedOut("answer"));
    assert!(Instant::now() >= soon);

    let answering = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(10));
        let code = FrontendCode::GetFeatures.number();
        Channel::<Header>::new(peer.into()).send(&Reply::U64(5).encode(code)).unwrap();
    });
    let answer = channel.receive_until(Instant::now() + Duration::from_secs(60)).unwrap();
    assert_eq!((answer.header.kind, answer.body), (Kind::Reply, 5u64.to_ne_bytes().to_vec()));
    answering.join().unwrap();
    let late = Instant::now() + Duration::from_secs(60);
    assert_eq!(channel.receive_until(late).unwrap_err(), ChannelError::Closed);
    assert_eq!(channel.send(&Request::<OwnedFd>::GetFeatures.encode(NeedReply::No)), Err(ChannelError::Closed));
}

#[test]
fn what_a_peer_does_not_read_is_kept_in_order_and_bounded() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut sender = Sender::new(ours.into());
    let miss = |n| IotlbReport::Miss { iova: BusAddr(n), perm: Permission::ReadOnly };
    let request = |n| BackendRequest::IotlbMsg(miss(n));

    // One write for all of them: nothing has gone out before.
    let mut receiver = Channel::new(theirs.into());
    (0..3).for_each(|n| sender.queue(&request(n).encode(NeedReply::Yes)).unwrap());
    assert!(matches!(receiver.receive(), Ok(Received::Nothing)));
    sender.flush().unwrap();
    assert!(!sender.is_backed_up());

    // Then more than the socket holds.
    let mut count = 3;
    while !sender.is_backed_up() {
        sender.queue(&request(count).encode(NeedReply::Yes)).unwrap();
        sender.flush().unwrap();
        count += 1;
    }
    let full = loop {
        match sender.queue(&request(count).encode(NeedReply::Yes)) {
            Ok(()) => count += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(full, SendError::Backlog { bytes } if bytes <= MAX_BACKLOG));

    let mut seen = 0;
    while seen < count {
        match receiver.receive().unwrap() {
            Received::Message(Message { header, body, fds }) => {
                let request = BackendRequest::parse(&header, &body, fds).unwrap();
                assert!(matches!(request, BackendRequest::IotlbMsg(report) if report == miss(seen)));
                seen += 1;
            }
            Received::Nothing => sender.flush().unwrap(),
            Received::End => panic!("nobody has closed"),
        }
    }
    assert!(!sender.is_backed_up());
    drop(receiver);
    sender.queue(&request(0).encode(NeedReply::Yes)).unwrap();
    assert_eq!(sender.flush(), Err(SendError::Closed));
}
