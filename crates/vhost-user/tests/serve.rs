//! The server and the front-end against each other, over real sockets and real memory.

mod served;

use ringfence_dma::{Access, BusAddr, FromDevice, FrontendVa, Gpa, Permission, Streaming};
use ringfence_driver::StartError;
use ringfence_driver::blk::{Request, RequestError};
use ringfence_driver::mapper::{Direct, Premapped};
use ringfence_hostmem::{Placement, SharedMemory};
use ringfence_iommu::Strict;
use ringfence_policy::{Addressing, IommuMode};
use ringfence_ring::{Descriptor, DriverQueue, RingCells, RingSlices, Rules};
use ringfence_vhost_user::channel::Channel;
use ringfence_vhost_user::client;
use ringfence_vhost_user::wire::{
    BackendRequest, Enable, FrontendCode, Header, Invalidated, Iotlb, IotlbReport, NeedReply, ProtocolFeatures,
    Request as Message, VringAddr, VringFd,
};
use served::{BUFFERS, Driver, Frontend, PAGE, RINGS, Served};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

type Ask = Message<OwnedFd>;

/// Invariant 3, on the device's side: a driver that does not take the flag gets no ring where it is required, the next
/// one is served, and one that takes it is translated.
#[test]
fn require_refuses_an_old_driver_and_serves_the_next() {
    let served = Served::start(IommuMode::Require);
    for _ in 0..3 {
        let frontend = Frontend::connect(&served);
        let direct = Direct::new(frontend.buffer(RINGS));
        let refused = frontend.start(Driver::Old, &direct).expect_err("refused");
        assert!(matches!(refused, StartError::FeaturesRefused { .. }), "{refused}");
        drop(frontend);

        let frontend = Frontend::connect(&served);
        let strict = Strict::new(Arc::clone(&frontend.domain), frontend.buffer(RINGS));
        let mut disk = frontend.start(Driver::New, &strict).unwrap();
        assert_eq!(disk.device().addressing(), Addressing::Translated);
        disk.write(0, &[frontend.buffer((BUFFERS.0, PAGE))]).unwrap();
    }
}

/// More messages at once than are read at a time, or taken in at a time: each gets its answer, in order, and nobody
/// sleeps over those that were read and not looked at.
#[test]
fn messages_that_come_at_once_are_answered_in_order() {
    let served = Served::start(IommuMode::Offer);
    let mut stream = UnixStream::connect(&served.socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let taken = Ask::SetProtocolFeatures(ProtocolFeatures::REPLY_ACK).encode(NeedReply::No).bytes;
    // Without the flag there are no translations: a mistake of one message each.
    let invalidate = Ask::IotlbMsg(Iotlb::Invalidate(Invalidated::Everything)).encode(NeedReply::Yes).bytes;
    let question = Ask::GetQueueNum.encode(NeedReply::No).bytes;
    const RUN: usize = 1500;
    let rounds = 3;
    let round = [invalidate.repeat(RUN), question].concat();
    let writer = std::thread::spawn({
        let mut stream = stream.try_clone().unwrap();
        move || stream.write_all(&[taken, round.repeat(rounds)].concat()).unwrap()
    });
    for number in 0..rounds * (RUN + 1) {
        let mut reply = [0; 20];
        stream.read_exact(&mut reply).unwrap_or_else(|error| panic!("reply {number}: {error}"));
        let code = u32::from_ne_bytes(reply[..4].try_into().unwrap());
        let (expected, value) = match number % (RUN + 1) {
            RUN => (FrontendCode::GetQueueNum, 1),
            _ => (FrontendCode::IotlbMsg, 1),
        };
        assert_eq!(code, expected.number(), "reply {number}");
        assert_eq!(u64::from_ne_bytes(reply[12..].try_into().unwrap()), value, "reply {number}");
    }
    writer.join().unwrap();
}

/// A front-end that says nothing more, whose back-end channel holds a few questions at a time: it gets all of them as it reads.
#[test]
fn what_the_back_end_channel_has_no_room_for_follows_when_there_is() {
    // As many as a request asks for at a time.
    const PAGES: u64 = 1024;
    let served = Served::start(IommuMode::Offer);
    let mut main = Channel::<Header>::new(UnixStream::connect(&served.socket).unwrap().into());
    let say = |main: &Channel, message: Message<BorrowedFd<'_>>| main.send(&message.encode(NeedReply::No)).unwrap();
    say(&main, Message::GetFeatures);
    let patience = || Instant::now() + Duration::from_secs(60);
    let offered = main.receive_until(patience()).unwrap().body;
    let offered = u64::from_ne_bytes(offered.try_into().unwrap());
    // All of it but what would change how a ring looks: a driver behind an IOMMU, whatever that bit is called.
    use ringfence_vhost_user::session::bits;
    say(&main, Message::SetFeatures(offered & !(bits::RING_PACKED | bits::EVENT_IDX)));
    say(&main, Message::SetProtocolFeatures(ProtocolFeatures::REPLY_ACK | ProtocolFeatures::BACKEND_REQ));
    let memory = SharedMemory::new(1 << 20).unwrap();
    let va = memory.slice(0, 1).as_ptr() as u64;
    let all = Placement { gpa: Gpa(0), frontend_va: FrontendVa(va), size: 1 << 20, offset: 0 };
    say(&main, Message::SetMemTable(vec![(all, memory.as_fd())]));
    let (ours, theirs) = UnixStream::pair().unwrap();
    // The kernel gives it its least, which is some dozens of messages.
    rustix::net::sockopt::set_socket_send_buffer_size(&theirs, 1).unwrap();
    say(&main, Message::SetBackendReqFd(theirs.as_fd()));
    drop(theirs);
    let mut channel = Channel::<Header>::new(ours.into());
    // The ring is where it is; the rest of the guest's memory is nowhere.
    let ring = Iotlb::Update { iova: BusAddr(0), size: 0x6000, uaddr: FrontendVa(va), perm: Permission::ReadWrite };
    say(&main, Message::IotlbMsg(ring));
    let [descriptors, driver, device] = [0, 0x2000, 0x4000].map(|at| memory.slice(at, 0x2000));
    let slices = RingSlices { descriptors, driver, device };
    let rules = Rules::default();
    let mut queue = DriverQueue::new(rules, 256, RingCells::new(rules.format, 256, &slices)).unwrap();
    let page = |page: u64| BusAddr((1 << 40) + page * PAGE as u64);
    let pieces = (0..PAGES).step_by(32);
    let chain: Vec<_> = pieces.map(|at| Descriptor { addr: page(at), len: 32 << 12, access: Access::Read }).collect();
    queue.add(&chain, None).unwrap();
    queue.publish();
    say(&main, Message::SetVringNum { index: 0, num: 256 });
    let addresses = VringAddr { index: 0, flags: 0, descriptor: 0, available: 0x2000, used: 0x4000, log: 0 };
    say(&main, Message::SetVringAddr(addresses));
    let kick = rustix::event::eventfd(1, rustix::event::EventfdFlags::NONBLOCK).unwrap();
    say(&main, Message::SetVringKick(VringFd { index: 0, fd: Some(kick.as_fd()) }));
    say(&main, Message::SetVringEnable { index: 0, enable: Enable::On });

    // Until nobody over there has anything else to do.
    std::thread::sleep(Duration::from_millis(20));
    let mut asked = BTreeSet::new();
    while asked.len() < PAGES as usize {
        let message = channel.receive_until(patience()).unwrap_or_else(|error| panic!("{} came: {error}", asked.len()));
        match BackendRequest::parse(&message.header, &message.body, message.fds).unwrap() {
            BackendRequest::IotlbMsg(IotlbReport::Miss { iova, .. }) => asked.insert(iova),
            other => panic!("{other:?}"),
        };
        if asked.len().is_multiple_of(32) {
            // Slower than the other side could send.
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    assert!(asked.into_iter().eq((0..PAGES).map(page)));
}

/// Invariant 3, on the data path: once the flag is taken a physical address reaches nothing, though the server has all
/// of the memory mapped.
#[test]
fn a_physical_address_reaches_nothing_once_the_flag_is_taken() {
    let served = Served::start(IommuMode::Offer);
    let frontend = Frontend::connect(&served);
    let strict = Strict::new(Arc::clone(&frontend.domain), frontend.buffer(RINGS));
    let lying = served::BuffersAreDirect { rings: &strict };
    let mut disk = frontend.start(Driver::New, &lying).unwrap();
    let buffer = frontend.buffer((BUFFERS.0, PAGE));
    buffer.memory().fill(0x5a);
    for _ in 0..20 {
        served::assert_io_error(disk.read(0, &[buffer]));
    }
    assert_eq!(served::bytes(buffer), [0x5a; PAGE]);
    drop(disk);
    assert!(frontend.client.counters().denied > 0);
    assert!(frontend.client.counters().access_fails > 0);
}

#[test]
fn without_the_flag_addresses_are_physical_and_nothing_is_asked() {
    let served = Served::start(IommuMode::Off);
    let frontend = Frontend::connect(&served);
    let direct = Direct::new(frontend.buffer(RINGS));
    let mut disk = frontend.start(Driver::Old, &direct).unwrap();
    frontend.write_and_read_back(&mut disk, 1);
    drop(disk);
    assert_eq!(frontend.client.counters().misses, 0);
}

#[test]
fn a_mapping_that_is_made_anew_hundreds_of_times_is_the_new_one_each_time() {
    let served = Served::start(IommuMode::Offer);
    let frontend = Frontend::connect(&served);
    let strict = Strict::new(Arc::clone(&frontend.domain), frontend.buffer(RINGS));
    let mut disk = frontend.start(Driver::New, &strict).unwrap();
    let invalidated = frontend.client.counters().invalidations;
    for round in 0..200 {
        frontend.write_and_read_back(&mut disk, round);
    }
    assert!(frontend.client.counters().invalidations >= invalidated + 200);
    drop(disk);
    assert_eq!(frontend.domain.mapped(), 0);
}

/// One page after the other is forbidden; what is next to it is not touched, and the next request is served.
#[test]
fn forbidden_pages_fail_their_request_alone() {
    let served = Served::start(IommuMode::Offer);
    let frontend = Frontend::connect(&served);
    let strict = Strict::new(Arc::clone(&frontend.domain), frontend.buffer(RINGS));
    let pages: Vec<_> = (0..8).map(|at| frontend.buffer((BUFFERS.0 + at * PAGE, PAGE))).collect();
    for forbidden in &pages {
        for access in [Access::Read, Access::Write] {
            let mapper = served::Forbidding { inner: &strict, page: forbidden.physical(), access };
            let mut disk = frontend.start(Driver::New, &mapper).unwrap();
            pages.iter().for_each(|page| page.memory().fill(0xee));
            let failed = match access {
                Access::Read => disk.write(0, &pages),
                Access::Write => disk.read(0, &pages),
            };
            served::assert_io_error(failed);
            pages.iter().for_each(|&page| assert_eq!(served::bytes(page), [0xee; PAGE], "{access}"));
            frontend.write_and_read_back_at(&mut disk, BUFFERS.0 + (1 << 20), 3);
        }
    }
}

/// A stop while requests wait for translations that nobody gives, as a VMM that is itself waiting for the stop can't.
/// QEMU sets the status to 0 besides: before 8.0.1 first, later last. That is a pause and not a reset.
#[test]
fn a_queue_stops_while_requests_wait_and_goes_on_with_them() {
    stop_and_go_on(|_| {}, |_| {});
    stop_and_go_on(|client| client.set_status(0).unwrap(), |_| {});
    stop_and_go_on(|_| {}, |client| client.set_status(0).unwrap());
}

fn stop_and_go_on(before: fn(&client::Frontend), after: fn(&client::Frontend)) {
    let served = Served::start(IommuMode::Offer);
    let frontend = Frontend::connect_slowly(&served, std::time::Duration::from_millis(150));
    let all = frontend.buffer(BUFFERS);
    let strict = Strict::new(Arc::clone(&frontend.domain), frontend.buffer(RINGS));
    let fixed = Premapped::new(&strict, &[all], frontend.buffer((RINGS.0 + RINGS.1, RINGS.1))).unwrap();
    let mut disk = frontend.start(Driver::New, &fixed).unwrap();
    // The ring's own pages are there after this, so that what is asked for next is the requests'.
    disk.read(0, &[all.sub(BUFFERS.1 - PAGE, PAGE)]).unwrap();
    let counters = frontend.client.counters();
    let requests = 16;
    for at in 0..requests {
        let buffer = all.sub(at as usize * PAGE, PAGE);
        buffer.memory().fill(0xee);
        disk.submit(Request::Read { sector: 8 * at, into: &[buffer] }).unwrap();
    }
    disk.notify().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(frontend.client.counters().updates, counters.updates, "nothing was answered yet");
    before(&frontend.client);
    let base = disk.device_mut().transport_mut().pause(0).unwrap();
    // None of them was begun: another process would find all of them in the ring.
    assert_eq!(base as u16, (base >> 16) as u16, "{base:#x}: a packed ring's");
    after(&frontend.client);
    disk.device_mut().transport_mut().resume(0, base).unwrap();
    let mut done = 0;
    while done < requests {
        disk.wait().unwrap();
        while let Some(completion) = disk.poll().unwrap() {
            completion.result.unwrap();
            done += 1;
        }
    }
    // The disk was never written to.
    assert_eq!(served::bytes(all.sub(0, PAGE)), [0; PAGE]);
    let bus = Streaming::map(&fixed, all.sub(0, PAGE), FromDevice).unwrap().addr();
    assert!(bus > BusAddr(1 << 63), "not a bus address: {bus}");
}

/// The front-end has a queue stop and begin anew; what was under way is the driver's again.
#[test]
fn a_queue_is_reset_alone_and_goes_on() {
    let served = Served::start(IommuMode::Offer);
    let frontend = Frontend::connect_slowly(&served, Duration::from_millis(20));
    let strict = Strict::new(Arc::clone(&frontend.domain), frontend.buffer(RINGS));
    let mut disk = frontend.start(Driver::New, &strict).unwrap();
    frontend.write_and_read_back(&mut disk, 0);
    let idle = frontend.domain.mapped();
    for round in 1..4 {
        let into = [frontend.buffer((BUFFERS.0, PAGE))];
        let ids: Vec<_> = (0..8).map(|_| disk.submit(Request::Read { sector: 0, into: &into }).unwrap()).collect();
        disk.notify().unwrap();
        disk.restart().unwrap();
        assert_eq!(frontend.domain.mapped(), idle, "what was lent is back");
        for id in ids {
            let ended = disk.poll().unwrap().map(|ended| (ended.id, ended.result));
            assert_eq!(ended, Some((id, Err(RequestError::Lost))));
        }
        frontend.write_and_read_back(&mut disk, round);
    }
    drop(disk);
    assert_eq!(frontend.domain.mapped(), 0);
}

/// Whatever comes over the socket, the next front-end is served.
#[test]
fn garbage_ends_its_own_connection_alone() {
    let served = Served::start(IommuMode::Offer);
    let mut state = 0x1234_5678_9abc_def1_u64;
    for round in 0..64 {
        let mut stream = UnixStream::connect(&served.socket).unwrap();
        let mut bytes = vec![0_u8; 16 + round * 17];
        for byte in &mut bytes {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = state as u8;
        }
        // Some look like messages: a number that exists, the right version, a length that fits.
        if round % 2 == 0 {
            bytes[..4].copy_from_slice(&(round as u32 / 2 + 1).to_ne_bytes());
            bytes[4..8].copy_from_slice(&9_u32.to_ne_bytes());
            let len = bytes.len() as u32 - 12;
            bytes[8..12].copy_from_slice(&len.to_ne_bytes());
        }
        // The server may have hung up already.
        let _ = stream.write_all(&bytes);
    }
    let frontend = Frontend::connect(&served);
    let strict = Strict::new(Arc::clone(&frontend.domain), frontend.buffer(RINGS));
    frontend.write_and_read_back(&mut frontend.start(Driver::New, &strict).unwrap(), 9);
}
