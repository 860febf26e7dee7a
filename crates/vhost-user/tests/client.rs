//! The front-end against a back-end that says exactly what each test wants it to say.

use ringfence_dma::{BusAddr, FrontendVa, Gpa, Permission};
use ringfence_hostmem::{Placement, Region, SharedMemory};
use ringfence_vhost_user::channel::{Channel, ChannelError, Message, Received};
use ringfence_vhost_user::client::{ClientError, Counters, Frontend, Options, Translation, Translator, Vring, range};
use ringfence_vhost_user::wire::{
    BackendCode, BackendRequest, Enable, F_PROTOCOL_FEATURES, FrontendCode, Header, Invalidated, Iotlb, IotlbReport,
    NeedReply, ProtocolFeatures, Reply, Request, VringAddr, VringFd, WireError,
};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Barrier, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
const DEVICE: u64 = 0x1_0000_0002;

/// Long enough for any machine, short enough for a test that fails.
fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// The other end, in the words of the script.
struct Backend {
    channel: Channel,
    protocol: ProtocolFeatures,
}

impl Backend {
    fn next(&mut self) -> (Header, Request) {
        let Message { header, body, fds } = self.channel.receive_until(soon()).expect("one more message");
        (header, Request::parse(&header, &body, fds).expect("a good message"))
    }

    fn reply(&self, header: &Header, reply: Reply) {
        self.channel.send(&reply.encode(header.request)).unwrap();
    }

    /// The next message, acknowledged where that is asked for.
    fn command(&mut self) -> Request {
        let (header, request) = self.next();
        let asked = header.need_reply == NeedReply::Yes;
        assert_eq!(asked, self.protocol.contains(ProtocolFeatures::REPLY_ACK), "{request:?}");
        if asked {
            self.reply(&header, Reply::U64(0));
        }
        request
    }

    /// The next message, answered with a number.
    fn number(&mut self, code: FrontendCode, number: u64) {
        let (header, request) = self.next();
        assert_eq!(request.code(), code);
        self.reply(&header, Reply::U64(number));
    }

    fn negotiate(&mut self) {
        self.number(FrontendCode::GetFeatures, DEVICE | F_PROTOCOL_FEATURES);
        // What nobody has heard of is offered too.
        self.number(FrontendCode::GetProtocolFeatures, self.protocol.bits() | 1 << 60);
        let (header, request) = self.next();
        assert_eq!(header.need_reply, NeedReply::No, "whether there are acknowledgements is being agreed on");
        let wanted = self.protocol;
        assert!(matches!(request, Request::SetProtocolFeatures(taken) if taken == wanted), "{request:?}");
        assert!(matches!(self.command(), Request::SetOwner));
    }

    /// The channel for requests of its own.
    fn own_channel(&mut self) -> Channel {
        match self.command() {
            Request::SetBackendReqFd(fd) => Channel::new(fd),
            request => panic!("{request:?} instead of a channel"),
        }
    }
}

const USUAL: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::BACKEND_REQ)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(ProtocolFeatures::STATUS);

/// Runs `script` against a front-end that is negotiated with.
fn negotiated<R: Send + 'static>(
    protocol: ProtocolFeatures,
    options: Options,
    script: impl FnOnce(Backend) -> R + Send + 'static,
) -> (Frontend, JoinHandle<R>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let mut backend = Backend { channel: Channel::new(theirs.into()), protocol };
        backend.negotiate();
        script(backend)
    });
    (Frontend::new(ours, options).expect("negotiation"), thread)
}

/// All that a front-end sends until it hangs up, everything acknowledged.
fn listen(mut backend: Backend) -> Vec<Request> {
    let mut heard = Vec::new();
    loop {
        match backend.channel.receive_until(soon()) {
            Ok(Message { header, body, fds }) => {
                heard.push(Request::parse(&header, &body, fds).unwrap());
                if header.need_reply == NeedReply::Yes {
                    backend.reply(&header, Reply::U64(0));
                }
            }
            Err(ChannelError::Closed) => return heard,
            Err(error) => panic!("{error}"),
        }
    }
}

fn codes(requests: &[Request]) -> Vec<FrontendCode> {
    requests.iter().map(Request::code).collect()
}

fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap()
}

fn vring<'f>(kick: &'f OwnedFd, call: &'f OwnedFd) -> Vring<'f> {
    let (kick, call) = (Some(kick.as_fd()), Some(call.as_fd()));
    Vring { index: 1, size: 256, base: 7, descriptor: 0x1000, available: 0x2000, used: 1 << 63, kick, call }
}

#[test]
fn a_queue_is_set_up_as_it_was_described() {
    let (frontend, backend) = negotiated(USUAL, Options::default(), listen);
    assert_eq!((frontend.offered(), frontend.protocol()), (DEVICE, USUAL));
    frontend.set_features(DEVICE).unwrap();
    let (kick, call) = (eventfd(), eventfd());
    frontend.start_vring(&vring(&kick, &call)).unwrap();
    frontend.set_status(0xf).unwrap();
    frontend.reset().unwrap();
    drop(frontend);

    let heard = backend.join().unwrap();
    let addr = VringAddr { index: 1, flags: 0, descriptor: 0x1000, used: 1 << 63, available: 0x2000, log: 0 };
    assert!(
        matches!(
            &heard[..],
            [
                Request::SetFeatures(features),
                Request::SetVringNum { index: 1, num: 256 },
                Request::SetVringBase { index: 1, base: 7 },
                Request::SetVringAddr(at),
                Request::SetVringCall(VringFd { index: 1, fd: Some(_) }),
                Request::SetVringKick(VringFd { index: 1, fd: Some(_) }),
                Request::SetVringEnable { index: 1, enable: Enable::On },
                Request::SetStatus(0xf),
                Request::ResetDevice,
            ] if *features == DEVICE | F_PROTOCOL_FEATURES && *at == addr
        ),
        "{heard:?}"
    );
}

#[test]
fn a_back_end_without_protocol_features_is_asked_for_none() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let backend = std::thread::spawn(move || {
        let protocol = ProtocolFeatures::empty();
        let mut backend = Backend { channel: Channel::new(theirs.into()), protocol };
        backend.number(FrontendCode::GetFeatures, DEVICE);
        listen(backend)
    });
    let frontend = Frontend::new(ours, Options::default()).unwrap();
    frontend.set_features(DEVICE).unwrap();
    let (kick, call) = (eventfd(), eventfd());
    frontend.start_vring(&vring(&kick, &call)).unwrap();
    assert!(matches!(frontend.config(0, &mut [0; 8]), Err(ClientError::NotOffered("CONFIG"))));
    assert!(matches!(frontend.serve_iotlb(Arc::new(Nothing)), Err(ClientError::NotOffered("BACKEND_REQ"))));
    assert!(matches!(frontend.invalidate(Invalidated::Everything), Err(ClientError::NotOffered("REPLY_ACK"))));
    assert!(matches!(frontend.reset(), Err(ClientError::NotOffered("RESET_DEVICE"))));
    assert_eq!(frontend.queues().unwrap(), None);
    assert_eq!(frontend.status().unwrap(), None);
    frontend.set_status(1).unwrap();
    drop(frontend);
    use FrontendCode::*;
    let expected = [SetOwner, SetFeatures, SetVringNum, SetVringBase, SetVringAddr, SetVringCall, SetVringKick];
    let heard = backend.join().unwrap();
    assert_eq!(codes(&heard), expected);
    assert!(matches!(heard[1], Request::SetFeatures(DEVICE)));
}

#[test]
fn memory_arrives_and_is_the_same_memory() {
    let memory = SharedMemory::new(16 * PAGE as usize).unwrap();
    let placement = |n: u64| Placement {
        gpa: Gpa(n << 32),
        frontend_va: FrontendVa(0x7000_0000_0000 + n * PAGE),
        size: PAGE,
        offset: n * PAGE,
    };
    let table: Vec<_> = (0..10).map(|n| (placement(n), memory.as_fd())).collect();

    let (frontend, backend) = negotiated(USUAL, Options::default(), |mut backend| {
        backend.number(FrontendCode::GetMaxMemSlots, 10);
        let heard = listen(backend);
        let mut regions = Vec::new();
        for request in heard {
            match request {
                Request::SetMemTable(table) => regions.extend(table),
                Request::AddMemReg(placement, fd) => regions.push((placement, fd)),
                Request::RemMemReg(gone) => regions.retain(|(placement, _)| placement.gpa != gone.gpa),
                request => panic!("{request:?}"),
            }
        }
        regions
    });
    frontend.set_memory(&table).unwrap();
    frontend.remove_memory(placement(9)).unwrap();
    drop(frontend);
    let regions = backend.join().unwrap();
    assert_eq!(
        regions.iter().map(|(placement, _)| *placement).collect::<Vec<_>>(),
        Vec::from_iter((0..9).map(placement))
    );
    for (n, (placement, fd)) in regions.into_iter().enumerate() {
        let region = Region::map(placement, fd).unwrap();
        region.slice().fill(n as u8 + 1);
        let mut byte = [0];
        memory.slice(n * PAGE as usize + 100, 1).read(0, &mut byte);
        assert_eq!(byte, [n as u8 + 1]);
    }

    let (frontend, _backend) = negotiated(USUAL, Options::default(), |mut backend| {
        backend.number(FrontendCode::GetMaxMemSlots, 9);
        listen(backend)
    });
    assert!(matches!(frontend.set_memory(&table), Err(ClientError::Slots { wanted: 10, max: 9 })));
}

#[test]
fn a_refusal_is_told_apart_from_a_failure() {
    let (frontend, backend) = negotiated(USUAL, Options::default(), |mut backend| {
        let (header, request) = backend.next();
        assert!(matches!(request, Request::SetFeatures(_)));
        backend.reply(&header, Reply::U64(9));
        listen(backend)
    });
    let refused = frontend.set_features(0).unwrap_err();
    assert!(matches!(refused, ClientError::Refused { message: FrontendCode::SetFeatures, value: 9 }), "{refused}");
    frontend.set_features(DEVICE).expect("the connection goes on");
    drop(frontend);
    assert_eq!(codes(&backend.join().unwrap()), [FrontendCode::SetFeatures]);
}

#[test]
fn the_first_answer_may_be_anything() {
    let answer = |code: FrontendCode, body: &[u8]| {
        let head = [code.number().to_ne_bytes(), 5u32.to_ne_bytes(), (body.len() as u32).to_ne_bytes()];
        [head.as_flattened(), body].concat()
    };
    let question = Request::<OwnedFd>::GetFeatures.encode(NeedReply::No).bytes;
    type Expected = fn(&ClientError) -> bool;
    let cases: [(Vec<u8>, Expected); 7] = [
        (b"HTTP/1.1 400 Bad Request".to_vec(), |error| {
            matches!(error, ClientError::Channel { error: ChannelError::Header(_), .. })
        }),
        (question, |error| matches!(error, ClientError::Answer(WireError::Kind { request: 1, .. }))),
        (answer(FrontendCode::GetConfig, &[0; 8]), |error| {
            matches!(error, ClientError::Answer(WireError::WrongReply { got: 24, expected: "GET_FEATURES" }))
        }),
        (answer(FrontendCode::GetFeatures, &[0; 7]), |error| {
            matches!(error, ClientError::Answer(WireError::Size { got: 7, expected: 8, .. }))
        }),
        (answer(FrontendCode::GetFeatures, &[]), |error| {
            matches!(error, ClientError::Answer(WireError::Size { got: 0, expected: 8, .. }))
        }),
        (answer(FrontendCode::GetFeatures, &[0; 8])[..15].to_vec(), |error| {
            matches!(error, ClientError::Channel { error: ChannelError::Truncated { got: 15 }, .. })
        }),
        (Vec::new(), |error| matches!(error, ClientError::Channel { error: ChannelError::Closed, .. })),
    ];
    for (bytes, expected) in cases {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&bytes).unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        let error = Frontend::new(ours, Options::default()).unwrap_err();
        assert!(expected(&error), "{bytes:?}: {error:?}");
    }
}

#[test]
fn silence_ends_at_the_timeout_and_late_answers_answer_nothing() {
    let options = Options { timeout: Duration::from_millis(50), ..Options::default() };
    let (frontend, backend) = negotiated(USUAL, options, |mut backend| {
        let (header, _) = backend.next();
        // Comes when nobody waits for it any more.
        std::thread::sleep(Duration::from_millis(200));
        let _ = backend.channel.send(&Reply::U64(0).encode(header.request));
        backend
    });
    let error = frontend.set_features(0).unwrap_err();
    assert!(matches!(error, ClientError::Channel { error: ChannelError::TimedOut(_), .. }), "{error}");
    let _backend = backend.join().unwrap();
    assert!(matches!(frontend.set_features(0), Err(ClientError::Broken)));
    assert!(matches!(frontend.queues(), Err(ClientError::Broken)));
}

#[test]
fn answers_about_something_else_are_noticed() {
    let (frontend, backend) = negotiated(USUAL, Options::default(), |mut backend| {
        for reply in [
            Reply::NoConfig,
            Reply::Config { offset: 4, flags: 0, data: vec![1; 8] },
            Reply::Config { offset: 0, flags: 0, data: vec![1; 9] },
            Reply::Config { offset: 0, flags: 0, data: vec![1, 2, 3, 4, 5, 6, 7, 8] },
            Reply::VringBase { index: 2, base: 5 },
            Reply::VringBase { index: 1, base: 5 },
            Reply::U64(0x100),
            Reply::U64(0xb),
        ] {
            let (header, _) = backend.next();
            backend.reply(&header, reply);
        }
    });
    let mut config = [0; 8];
    assert!(matches!(frontend.config(0, &mut config), Err(ClientError::NoConfig { offset: 0, size: 8 })));
    let wrong = frontend.config(0, &mut config).unwrap_err();
    assert!(matches!(wrong, ClientError::Mismatch { field: "offset", got: 4, expected: 0, .. }));
    let wrong = frontend.config(0, &mut config).unwrap_err();
    assert!(matches!(wrong, ClientError::Mismatch { field: "size", got: 9, expected: 8, .. }));
    assert_eq!(config, [0; 8]);
    frontend.config(0, &mut config).unwrap();
    assert_eq!(config, [1, 2, 3, 4, 5, 6, 7, 8]);
    let wrong = frontend.stop_vring(1).unwrap_err();
    assert!(matches!(wrong, ClientError::Mismatch { field: "index", got: 2, expected: 1, .. }));
    assert_eq!(frontend.stop_vring(1).unwrap(), 5);
    assert!(matches!(frontend.status(), Err(ClientError::Answer(WireError::Value { value: 0x100, .. }))));
    assert_eq!(frontend.status().unwrap(), Some(0xb));
    backend.join().unwrap();
}

/// Denies everything.
struct Nothing;

impl Translator for Nothing {
    fn translate(&self, _: BusAddr, _: Permission) -> Option<Translation> {
        None
    }
}

/// Every page below 1 GiB, one to one and a way off; nothing above.
struct Shifted;

const SHIFT: u64 = 0x7000_0000_0000;

impl Translator for Shifted {
    fn translate(&self, iova: BusAddr, perm: Permission) -> Option<Translation> {
        let page = iova.0 & !(PAGE - 1);
        let uaddr = FrontendVa(page + SHIFT);
        (page < 1 << 30).then_some(Translation { iova: BusAddr(page), size: PAGE, uaddr, perm })
    }
}

fn miss(iova: u64) -> BackendRequest {
    BackendRequest::IotlbMsg(IotlbReport::Miss { iova: BusAddr(iova), perm: Permission::ReadOnly })
}

/// The answers that have come on the back-end's own channel.
fn answers(channel: &mut Channel, count: usize) -> Vec<u64> {
    let answer = |_| {
        let Message { header, body, fds } = channel.receive_until(soon()).unwrap();
        BackendRequest::parse_reply(BackendCode::IotlbMsg, &header, &body, fds).unwrap()
    };
    (0..count).map(answer).collect()
}

#[test]
fn a_miss_is_answered_after_its_translation() {
    let (frontend, backend) = negotiated(USUAL, Options::default(), |mut backend| {
        let mut own = backend.own_channel();
        // All at once, as a request over scattered pages does.
        let pages = [0x5123, 1 << 40, 0x9000, 0x5fff];
        let burst: Vec<u8> = pages.iter().flat_map(|&iova| miss(iova).encode(NeedReply::Yes).bytes).collect();
        own.send(&with_bytes(burst)).unwrap();
        let mut updates = Vec::new();
        for result in [0, 1, 0] {
            let (header, request) = backend.next();
            assert!(matches!(own.receive(), Ok(Received::Nothing)), "no answer before its translation");
            backend.reply(&header, Reply::U64(result));
            updates.push(request);
        }
        // The second address has no translation, the third was not taken by us.
        assert_eq!(answers(&mut own, 4), [0, 1, 1, 0]);
        updates
    });
    frontend.serve_iotlb(Arc::new(Shifted)).unwrap();
    let updates = backend.join().unwrap();
    for (update, page) in updates.iter().zip([0x5000, 0x9000, 0x5000]) {
        let expected = Iotlb::Update {
            iova: BusAddr(page),
            size: PAGE,
            uaddr: FrontendVa(page + SHIFT),
            perm: Permission::ReadOnly,
        };
        assert!(matches!(update, Request::IotlbMsg(got) if *got == expected), "{update:?}");
    }
    let expected = Counters { misses: 4, denied: 1, updates: 3, rejected: 1, ..Counters::default() };
    assert_eq!(frontend.counters(), expected);
}

/// A frame of several messages.
fn with_bytes(bytes: Vec<u8>) -> ringfence_vhost_user::wire::Frame<'static> {
    ringfence_vhost_user::wire::Frame { bytes, fds: Vec::new() }
}

#[test]
fn an_invalidation_never_passes_between_a_translation_and_its_arrival() {
    /// Stops in the middle, with the old translation in hand.
    struct Slow {
        looked: Barrier,
        go_on: Barrier,
    }
    impl Translator for Slow {
        fn translate(&self, iova: BusAddr, perm: Permission) -> Option<Translation> {
            self.looked.wait();
            self.go_on.wait();
            Shifted.translate(iova, perm)
        }
    }
    let slow = Arc::new(Slow { looked: Barrier::new(2), go_on: Barrier::new(2) });
    let (frontend, backend) = negotiated(USUAL, Options::default(), |mut backend| {
        let own = backend.own_channel();
        own.send(&miss(0x1000).encode(NeedReply::No)).unwrap();
        (backend.command(), backend.command())
    });
    frontend.serve_iotlb(slow.clone()).unwrap();
    slow.looked.wait();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Meanwhile the page is unmapped, and the back-end to be told.
            frontend.invalidate(range(BusAddr(0x1000), PAGE).unwrap()).unwrap();
        });
        // Time for it to pass, if it could.
        std::thread::sleep(Duration::from_millis(50));
        slow.go_on.wait();
    });
    let (first, second) = backend.join().unwrap();
    assert!(matches!(first, Request::IotlbMsg(Iotlb::Update { .. })), "{first:?}");
    let expected = Invalidated::Range { first: BusAddr(0x1000), last: BusAddr(0x1fff) };
    assert!(matches!(second, Request::IotlbMsg(Iotlb::Invalidate(range)) if range == expected), "{second:?}");
    assert_eq!(frontend.counters().invalidations, 1);
}

#[test]
fn delayed_misses_wait_side_by_side() {
    const MISSES: u64 = 200;
    let delay = Duration::from_millis(20);
    let (frontend, backend) = negotiated(USUAL, Options { miss_delay: delay, ..Options::default() }, |mut backend| {
        let mut own = backend.own_channel();
        let start = Instant::now();
        let burst = (0..MISSES).flat_map(|n| miss(n * PAGE).encode(NeedReply::Yes).bytes).collect();
        own.send(&with_bytes(burst)).unwrap();
        let (header, _) = backend.next();
        let first = start.elapsed();
        backend.reply(&header, Reply::U64(0));
        (1..MISSES).for_each(|_| drop(backend.command()));
        assert_eq!(answers(&mut own, MISSES as usize), vec![0; MISSES as usize]);
        (first, start.elapsed())
    });
    frontend.serve_iotlb(Arc::new(Shifted)).unwrap();
    let (first, all) = backend.join().unwrap();
    assert!(first >= delay, "{first:?}");
    // One behind the other they would take 4 s.
    assert!(all < delay * MISSES as u32 / 2, "{all:?}");
}

#[test]
fn what_a_back_end_must_not_ask_is_declined_and_what_it_reports_is_counted() {
    let (frontend, backend) = negotiated(USUAL, Options::default(), |mut backend| {
        let mut own = backend.own_channel();
        let fail = IotlbReport::AccessFail { iova: BusAddr(1), perm: Permission::WriteOnly };
        let mut unknown = BackendRequest::ConfigChangeMsg.encode(NeedReply::Yes);
        unknown.bytes[0] = 77;
        for (question, expected) in [
            (BackendRequest::IotlbMsg(fail).encode(NeedReply::Yes), 0),
            (BackendRequest::ConfigChangeMsg.encode(NeedReply::Yes), 0),
            (BackendRequest::VringCall { index: 0 }.encode(NeedReply::Yes), 1),
            (unknown, 1),
        ] {
            own.send(&question).unwrap();
            let Message { body, .. } = own.receive_until(soon()).unwrap();
            assert_eq!(body, u64::to_ne_bytes(expected));
        }
    });
    frontend.serve_iotlb(Arc::new(Nothing)).unwrap();
    backend.join().unwrap();
    let expected = Counters { access_fails: 1, config_changes: 1, ..Counters::default() };
    assert_eq!(frontend.counters(), expected);
}

#[test]
fn garbage_on_the_back_ends_channel_ends_that_channel_alone() {
    let (frontend, backend) = negotiated(USUAL, Options::default(), |mut backend| {
        let mut own = backend.own_channel();
        own.send(&with_bytes(vec![0xff; 64])).unwrap();
        assert_eq!(own.receive_until(soon()).unwrap_err(), ChannelError::Closed);
        listen(backend)
    });
    frontend.serve_iotlb(Arc::new(Nothing)).unwrap();
    let deadline = soon();
    while frontend.iotlb_failure().is_none() {
        assert!(Instant::now() < deadline, "the failure shows");
        std::thread::yield_now();
    }
    assert!(frontend.iotlb_failure().unwrap().contains("protocol version"));
    frontend.set_features(DEVICE).expect("the other channel goes on");
    drop(frontend);
    assert_eq!(codes(&backend.join().unwrap()), [FrontendCode::SetFeatures]);
}

#[test]
fn a_front_end_can_leave_a_back_end_that_never_acknowledges() {
    let waiting = Arc::new(Mutex::new(None));
    let theirs = Arc::clone(&waiting);
    let options = Options { timeout: Duration::from_secs(3600), ..Options::default() };
    let (frontend, backend) = negotiated(USUAL, options, move |mut backend| {
        let own = backend.own_channel();
        own.send(&miss(0).encode(NeedReply::Yes)).unwrap();
        let (_, request) = backend.next();
        assert!(matches!(request, Request::IotlbMsg(Iotlb::Update { .. })));
        *theirs.lock().unwrap() = Some((backend, own));
    });
    frontend.serve_iotlb(Arc::new(Shifted)).unwrap();
    backend.join().unwrap();
    let start = Instant::now();
    drop(frontend);
    assert!(start.elapsed() < Duration::from_secs(60));
}
