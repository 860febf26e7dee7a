use super::*;
use proptest::prelude::*;
use ringfence_dma::{BusAddr, FrontendVa, Gpa, Permission};
use ringfence_hostmem::Placement;
use std::os::fd::OwnedFd;

fn fd() -> OwnedFd {
    std::fs::File::open("/dev/null").unwrap().into()
}

fn fds(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| fd()).collect()
}

/// A request with this body and so many descriptors.
fn parse(code: FrontendCode, body: &[u8], count: usize) -> Result<Request, WireError> {
    let header =
        Header { request: code.number(), kind: Kind::Request, need_reply: NeedReply::No, size: body.len() as u32 };
    Request::parse(&header, body, fds(count))
}

fn error(code: FrontendCode, body: &[u8], count: usize) -> WireError {
    parse(code, body, count).expect_err("must not be taken")
}

/// What `frame` would be on the other side.
fn split(frame: &Frame<'_>) -> (Header, Vec<u8>, Vec<OwnedFd>) {
    let (head, body) = frame.bytes.split_first_chunk().unwrap();
    let fds = frame.fds.iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
    (Header::parse(head).unwrap(), body.to_vec(), fds)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

fn region(n: u64) -> Placement {
    Placement { gpa: Gpa(n << 30), frontend_va: FrontendVa(0x7f00_0000_0000 + n), size: 1 << 20, offset: n << 12 }
}

/// One of each.
fn requests() -> Vec<Request> {
    let inflight = Inflight { mmap_size: 4096, mmap_offset: 8, queues: 2, queue_size: 128 };
    let addr = VringAddr { index: 1, flags: 1, descriptor: 0x10, used: 1 << 63, available: 0x30, log: 0x40 };
    let update =
        Iotlb::Update { iova: BusAddr(!0xfff), size: 4096, uaddr: FrontendVa(0x1000), perm: Permission::WriteOnly };
    let invalidate = Invalidated::Range { first: BusAddr(0xfef0_0000), last: BusAddr(u64::MAX) };
    vec![
        Request::GetFeatures,
        Request::SetFeatures(F_PROTOCOL_FEATURES),
        Request::SetOwner,
        Request::ResetOwner,
        Request::SetMemTable(vec![]),
        Request::SetMemTable((0..8).map(|n| (region(n), fd())).collect()),
        Request::SetLogBase { size: 1, offset: 2, fd: fd() },
        Request::SetLogFd(fd()),
        Request::SetVringNum { index: 3, num: 256 },
        Request::SetVringAddr(addr),
        Request::SetVringBase { index: 4, base: 0x8001_8001 },
        Request::GetVringBase { index: 5 },
        Request::SetVringKick(VringFd { index: 255, fd: Some(fd()) }),
        Request::SetVringCall(VringFd { index: 0, fd: None }),
        Request::SetVringErr(VringFd { index: 1, fd: Some(fd()) }),
        Request::GetProtocolFeatures,
        Request::SetProtocolFeatures(ProtocolFeatures::from_bits_retain(1 << 50)),
        Request::GetQueueNum,
        Request::SetVringEnable { index: 6, enable: Enable::On },
        Request::SetVringEnable { index: 6, enable: Enable::Off },
        Request::SendRarp(7),
        Request::NetSetMtu(1500),
        Request::SetBackendReqFd(fd()),
        Request::IotlbMsg(update),
        Request::IotlbMsg(Iotlb::Invalidate(invalidate)),
        Request::IotlbMsg(Iotlb::Invalidate(Invalidated::Everything)),
        Request::SetVringEndian { index: 8, num: 1 },
        Request::GetConfig { offset: 4, size: 60, flags: 0 },
        Request::SetConfig { offset: 32, flags: 1, data: vec![9] },
        Request::GetInflightFd(inflight),
        Request::SetInflightFd(inflight, fd()),
        Request::ResetDevice,
        Request::VringKick { index: 10 },
        Request::GetMaxMemSlots,
        Request::AddMemReg(region(1), fd()),
        Request::RemMemReg(region(2)),
        Request::SetStatus(0xff),
        Request::GetStatus,
    ]
}

/// Debug without the numbers of descriptors, which change on the way.
fn shape(value: &impl std::fmt::Debug) -> String {
    let text = format!("{value:?}");
    let mut parts = text.split("OwnedFd { fd: ");
    let first = parts.next().unwrap().to_owned();
    parts.fold(first, |shape, part| shape + "fd" + part.trim_start_matches(|c: char| c.is_ascii_digit()))
}

#[test]
fn requests_arrive_as_they_were_sent() {
    let mut seen = std::collections::HashSet::new();
    for request in requests() {
        seen.insert(request.code());
        for need_reply in [NeedReply::Yes, NeedReply::No] {
            let (header, body, fds) = split(&request.encode(need_reply));
            assert_eq!(header.need_reply, need_reply);
            let arrived = Request::parse(&header, &body, fds).unwrap();
            assert_eq!(shape(&arrived), shape(&request));
            assert_eq!(arrived.code().number(), header.request);
        }
    }
    for &code in FrontendCode::ALL {
        let unsupported = parse(code, &[], 0).is_err_and(|error| matches!(error, WireError::Unsupported { .. }));
        assert_eq!(seen.contains(&code), !unsupported, "{code} is in the list above if it is supported");
    }
}

#[test]
fn back_end_requests_arrive_as_they_were_sent() {
    let requests = [
        BackendRequest::IotlbMsg(IotlbReport::Miss { iova: BusAddr(1 << 63), perm: Permission::ReadOnly }),
        BackendRequest::IotlbMsg(IotlbReport::AccessFail { iova: BusAddr(2), perm: Permission::ReadWrite }),
        BackendRequest::ConfigChangeMsg,
        BackendRequest::VringHostNotifierMsg { index: 3, size: 4096, offset: 0, fd: Some(fd()) },
        BackendRequest::VringHostNotifierMsg { index: 3, size: 4096, offset: 0, fd: None },
        BackendRequest::VringCall { index: 4 },
        BackendRequest::VringErr { index: 5 },
    ];
    for request in requests {
        let (header, body, fds) = split(&request.encode(NeedReply::Yes));
        assert_eq!(shape(&BackendRequest::parse(&header, &body, fds).unwrap()), shape(&request));
        let (reply, body, fds) = split(&BackendRequest::encode_reply(&header, 7));
        assert_eq!(BackendRequest::parse_reply(request.code(), &reply, &body, fds), Ok(7));
    }
}

#[test]
fn replies_arrive_as_they_were_sent() {
    let inflight = Inflight { mmap_size: 1, mmap_offset: 2, queues: 3, queue_size: 4 };
    for (code, reply) in [
        (FrontendCode::GetFeatures, Reply::U64(1 << 32)),
        (FrontendCode::SetMemTable, Reply::U64(0)),
        (FrontendCode::GetVringBase, Reply::VringBase { index: 1, base: 2 }),
        (FrontendCode::GetConfig, Reply::Config { offset: 1, flags: 0, data: vec![2, 3] }),
        (FrontendCode::GetConfig, Reply::NoConfig),
        (FrontendCode::GetInflightFd, Reply::Inflight(inflight, fd())),
    ] {
        let (header, body, fds) = split(&reply.encode(code.number()));
        assert_eq!(shape(&Reply::parse(code, &header, &body, fds).unwrap()), shape(&reply));
        let other = Reply::parse(FrontendCode::GetStatus, &header, &body, vec![]);
        let expected = WireError::WrongReply { got: code.number(), expected: "GET_STATUS" };
        assert_eq!(other.unwrap_err(), expected);
    }
}

#[test]
fn a_header_is_what_the_standard_says() {
    let bytes =
        |request: u32, flags: u32, size: u32| -> [u8; 12] { words(&[request, flags, size]).try_into().unwrap() };
    let header = Header { request: 22, kind: Kind::Request, need_reply: NeedReply::Yes, size: 32 };
    assert_eq!(Header::parse(&bytes(22, 0b1001, 32)), Ok(header));
    assert_eq!(header.encode(), bytes(22, 0b1001, 32));
    assert_eq!(Header::parse(&bytes(1, 0b101, 8)).unwrap().kind, Kind::Reply);
    assert_eq!(Header::parse(&bytes(1, 0, 0)), Err(WireError::Version { request: 1, version: 0 }));
    assert_eq!(Header::parse(&bytes(1, 2, 0)), Err(WireError::Version { request: 1, version: 2 }));
    assert_eq!(Header::parse(&bytes(1, 0x11, 0)), Err(WireError::Flags { request: 1, flags: 0x11 }));
    assert_eq!(Header::parse(&bytes(1, 1, 4097)), Err(WireError::TooLong { request: 1, size: 4097, max: MAX_BODY }));
}

#[test]
fn what_is_not_a_request_is_refused_with_its_name_and_numbers() {
    use FrontendCode::*;
    let header = Header { request: 99, kind: Kind::Request, need_reply: NeedReply::No, size: 0 };
    assert_eq!(Request::parse(&header, &[], vec![]).unwrap_err(), WireError::Unknown { request: 99 });
    let reply = Header { request: 1, kind: Kind::Reply, ..header };
    assert_eq!(Request::parse(&reply, &[], vec![]).unwrap_err(), WireError::Kind { request: 1, got: Kind::Reply });

    let size = |message, got, expected| WireError::Size { message, got, expected };
    assert_eq!(error(GetFeatures, &[0], 0), size("GET_FEATURES", 1, 0));
    assert_eq!(error(SetFeatures, &[0; 7], 0), size("SET_FEATURES", 7, 8));
    assert_eq!(error(SetVringAddr, &[0; 41], 0), size("SET_VRING_ADDR", 41, 40));
    assert_eq!(error(IotlbMsg, &[0; 27], 0), size("IOTLB_MSG", 27, 32));
    assert_eq!(error(GetConfig, &words(&[0, 8, 0, 1]), 0), size("GET_CONFIG", 16, 20));
    assert_eq!(error(SetMemTable, &words(&[1]), 1), size("SET_MEM_TABLE", 4, 8));
    assert_eq!(error(SetMemTable, &[words(&[2, 0]), longs(&[0; 4])].concat(), 2), size("SET_MEM_TABLE", 40, 72));

    let count = |message, got, expected| WireError::Fds { message, got, expected };
    assert_eq!(error(GetFeatures, &[], 1), count("GET_FEATURES", 1, 0));
    assert_eq!(error(SetBackendReqFd, &[], 0), count("SET_BACKEND_REQ_FD", 0, 1));
    assert_eq!(error(SetMemTable, &words(&[0, 0]), 1), count("SET_MEM_TABLE", 1, 0));
    assert_eq!(error(SetVringKick, &longs(&[3]), 0), count("SET_VRING_KICK", 0, 1));
    assert_eq!(error(SetVringKick, &longs(&[0x103]), 1), count("SET_VRING_KICK", 1, 0));
    assert_eq!(error(RemMemReg, &longs(&[0; 5]), 2), count("REM_MEM_REG", 2, 0));

    let value = |message, field, value| WireError::Value { message, field, value };
    assert_eq!(error(SetVringCall, &longs(&[0x200]), 1), value("SET_VRING_CALL", "vring", 0x200));
    assert_eq!(error(SetVringEnable, &words(&[0, 2]), 0), value("SET_VRING_ENABLE", "num", 2));
    assert_eq!(error(SetStatus, &longs(&[256]), 0), value("SET_STATUS", "status", 256));

    let nine = [words(&[9, 0]), longs(&[0; 36])].concat();
    assert_eq!(error(SetMemTable, &nine, 8), WireError::Regions { message: "SET_MEM_TABLE", got: 9, max: 8 });
    let far = WireError::Range { message: "SET_CONFIG", field: "config", start: u32::MAX.into(), size: 4 };
    assert_eq!(error(SetConfig, &words(&[u32::MAX, 4, 0, 0]), 0), far);
}

#[test]
fn what_peers_do_though_the_standard_does_not_say_so_is_taken() {
    // The whole table of eight, of which one is used.
    let mut table = vec![0; 8 + 8 * 32];
    table[0] = 1;
    assert!(matches!(parse(FrontendCode::SetMemTable, &table, 1), Ok(Request::SetMemTable(one)) if one.len() == 1));
    // A descriptor with REM_MEM_REG.
    assert!(matches!(parse(FrontendCode::RemMemReg, &longs(&[0; 5]), 1), Ok(Request::RemMemReg(_))));
    // IOTLB messages and inflight descriptions without C's padding.
    let update = [longs(&[0, 1, 2]), vec![3, 2]].concat();
    assert!(matches!(parse(FrontendCode::IotlbMsg, &update, 0), Ok(Request::IotlbMsg(_))));
    assert!(matches!(parse(FrontendCode::GetInflightFd, &[0; 20], 0), Ok(Request::GetInflightFd(_))));
    // A reply that still asks for a reply.
    let header = Header::parse(&words(&[1, 0b1101, 8]).try_into().unwrap()).unwrap();
    assert!(matches!(Reply::parse(FrontendCode::GetFeatures, &header, &[0; 8], vec![]), Ok(Reply::U64(0))));
}

#[test]
fn iotlb_entries() {
    const MAX: u64 = u64::MAX;
    let parse = |iova: u64, size: u64, uaddr: u64, perm: u8, kind: u8| {
        Iotlb::parse("IOTLB_MSG", IotlbMessage { iova, size, uaddr, perm, kind, padding: [0; 6] }.as_bytes())
    };
    let range = |field, start, size| Err(WireError::Range { message: "IOTLB_MSG", field, start, size });
    let value = |field, value| Err(WireError::Value { message: "IOTLB_MSG", field, value });
    let update =
        |iova, size, uaddr, perm| Ok(Iotlb::Update { iova: BusAddr(iova), size, uaddr: FrontendVa(uaddr), perm });
    let invalidate =
        |first, last| Ok(Iotlb::Invalidate(Invalidated::Range { first: BusAddr(first), last: BusAddr(last) }));
    let everything = Ok(Iotlb::Invalidate(Invalidated::Everything));
    for (got, expected) in [
        (parse(5, 1, 7, 1, 2), update(5, 1, 7, Permission::ReadOnly)),
        (parse(!0xfff, 4096, !0xfff, 3, 2), update(!0xfff, 4096, !0xfff, Permission::ReadWrite)),
        (parse(0, MAX, 0, 2, 2), update(0, MAX, 0, Permission::WriteOnly)),
        (parse(5, 0, 7, 1, 2), range("iova", 5, 0)),
        (parse(!0xfff, 4097, 0, 1, 2), range("iova", !0xfff, 4097)),
        (parse(0, 4097, !0xfff, 1, 2), range("uaddr", !0xfff, 4097)),
        (parse(0, 1, 0, 0, 2), value("perm", 0)),
        (parse(0, 1, 0, 4, 2), value("perm", 4)),
        (parse(0, 1, 0, 1, 1), value("type", 1)),
        (parse(0, 1, 0, 1, 4), value("type", 4)),
        (parse(0, 1, 0, 1, 0), value("type", 0)),
        // QEMU: all of the space above the interrupt window, then all of it.
        (parse(0xfef0_0000, 0xffff_ffff_0110_0000, 0, 0, 3), invalidate(0xfef0_0000, MAX)),
        (parse(0, 0, 0, 0, 3), everything),
        (parse(7, 0, 0, 0, 3), everything),
        (parse(0, 1 << 49, 0, 0, 3), invalidate(0, (1 << 49) - 1)),
        // Passes the top by one byte.
        (parse(2, MAX, 0, 0, 3), invalidate(2, MAX)),
    ] {
        assert_eq!(got, expected);
        if let Ok(entry) = got {
            assert_eq!(Iotlb::parse("IOTLB_MSG", entry.encode().as_bytes()), expected);
        }
    }
    // From 0 to the top is 2^64 bytes: everything.
    let all = Iotlb::Invalidate(Invalidated::Range { first: BusAddr(0), last: BusAddr(MAX) });
    assert_eq!(Iotlb::parse("IOTLB_MSG", all.encode().as_bytes()), everything);
}

/// Numbers that are easily mistaken, from the standard's tables.
#[test]
fn numbers() {
    assert_eq!(FrontendCode::SetBackendReqFd.number(), 21);
    assert_eq!(FrontendCode::IotlbMsg.number(), 22);
    assert_eq!(FrontendCode::ResetDevice.number(), 34);
    assert_eq!(FrontendCode::RemMemReg.number(), 38);
    assert_eq!(BackendCode::IotlbMsg.number(), 1);
    assert_eq!(ProtocolFeatures::STATUS.bits(), 1 << 16);
    assert_eq!(FrontendCode::ALL.len(), 43);
    assert!(FrontendCode::ALL.iter().map(|code| code.number()).eq(1..=43));
}

proptest! {
    /// Whatever bytes come, there is an answer; and what was understood, is what the bytes say.
    #[test]
    fn parsing_is_total(request in 0u32..50, body in proptest::collection::vec(any::<u8>(), 0..300), count in 0usize..3) {
        let header = Header { request, kind: Kind::Request, need_reply: NeedReply::No, size: body.len() as u32 };
        if let Ok(request) = Request::parse(&header, &body, fds(count)) {
            let (again, body, fds) = split(&request.encode(NeedReply::No));
            prop_assert_eq!(shape(&Request::parse(&again, &body, fds).unwrap()), shape(&request));
        }
        let _ = BackendRequest::parse(&header, &body, fds(count));
        let reply = Header { kind: Kind::Reply, ..header };
        if let Ok(code) = FrontendCode::try_from(request) {
            let _ = Reply::parse(code, &reply, &body, fds(count));
        }
    }

    /// The same with lengths that are right, so that fields are looked at.
    #[test]
    fn fields_are_taken_or_refused(
        request in 1u32..44,
        body in proptest::collection::vec(prop_oneof![Just(0u64), Just(1), Just(u64::MAX), any::<u64>()], 0..9),
        count in 0usize..2,
    ) {
        let body = longs(&body);
        let header = Header { request, kind: Kind::Request, need_reply: NeedReply::No, size: body.len() as u32 };
        if let Ok(Request::IotlbMsg(Iotlb::Update { iova, size, uaddr, .. })) =
            Request::parse(&header, &body, fds(count))
        {
            prop_assert!(iova.last(size).is_some() && uaddr.last(size).is_some());
        }
    }
}
