use super::*;
use proptest::prelude::*;
use ringfence_dma::{BusAddr, Permission};

fn parse(frame: Frame<'_>) -> Result<Request, WireError> {
    let header = Header::parse(frame.bytes[..Header::SIZE].try_into().unwrap()).unwrap();
    assert_eq!(header.body as usize, frame.bytes.len() - Header::SIZE);
    let fds = frame.fds.iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
    Request::parse(&header, &frame.bytes[Header::SIZE..], fds)
}

#[test]
fn messages_are_their_own_inverse() {
    let (reader, _writer) = std::io::pipe().unwrap();
    let map = DmaMap {
        permission: Permission::WriteOnly,
        offset: 0x3000,
        first: BusAddr(u64::MAX - 0x1fff),
        last: BusAddr(u64::MAX),
        fd: Some(reader.into()),
    };
    let write = Write { region: 7, offset: 4, data: vec![1, 2, 3] };
    for request in [
        Request::Version(Version { major: 0, minor: 1, capabilities: Capabilities::default() }),
        Request::DmaMap(map),
        Request::DmaUnmap(DmaUnmap::everything()),
        Request::DmaUnmap(DmaUnmap::range(BusAddr(0x1000), BusAddr(0x2fff))),
        Request::DeviceInfo,
        Request::RegionInfo { index: 3 },
        Request::RegionIoFds { argsz: 100, index: 0 },
        Request::IrqInfo { index: 2 },
        Request::SetIrqs(SetIrqs {
            index: 2,
            start: 1,
            count: 2,
            action: Action::Mask,
            data: IrqData::Bools(vec![true, false]),
        }),
        Request::RegionRead { region: 7, offset: 9, count: 4 },
        Request::RegionWrite(write.clone()),
        Request::RegionWriteMulti(vec![write.clone(), write]),
        Request::DeviceReset,
    ] {
        let before = format!("{request:?}");
        let after = parse(request.encode(1, Answer::Wanted)).unwrap();
        let digits = |text: &str| text.replace(char::is_numeric, "");
        // A descriptor has another number after its travel.
        assert_eq!(digits(&before), digits(&format!("{after:?}")));
        assert_eq!(request.command(), after.command());
    }
}

#[test]
fn ranges_are_of_pages_and_do_not_wrap() {
    let command = Command::DmaMap;
    for (address, size) in [(0, 0), (1, 0x1000), (0x1000, 1), (u64::MAX - 0xfff, 0x2000), (0x2000, u64::MAX - 0xfff)] {
        let mut body = [32_u32, 3].iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>();
        body.extend([0, address, size].iter().flat_map(|word| word.to_ne_bytes()));
        let header = Header { id: 0, command: 2, kind: Kind::Command, answer: Answer::Wanted, error: None, body: 32 };
        let parsed = Request::parse(&header, &body, Vec::new()).map(drop);
        assert_eq!(parsed, Err(WireError::Range { command, address, size }));
    }
}

#[test]
fn a_map_may_say_how_its_file_is_reached_if_it_has_one() {
    let parse = |flags: u32, with_file: bool| {
        let words = [32, flags].into_iter().flat_map(u32::to_ne_bytes);
        let body: Vec<u8> = words.chain([0, 0x1000, 0x1000].into_iter().flat_map(u64::to_ne_bytes)).collect();
        let header = Header { id: 0, command: 2, kind: Kind::Command, answer: Answer::Wanted, error: None, body: 32 };
        let fds = with_file.then(|| std::io::pipe().unwrap().0.into());
        match Request::parse(&header, &body, Vec::from_iter(fds)) {
            Ok(Request::DmaMap(map)) => Some(map.permission),
            _ => None,
        }
    };
    for by_file in [0, 4, 8, 12] {
        assert_eq!(parse(3 | by_file, true), Some(Permission::ReadWrite));
        assert_eq!(parse(1 | by_file, true), Some(Permission::ReadOnly));
        assert_eq!(parse(by_file, true), None, "nothing may be done there");
        assert_eq!(parse(3 | by_file, false).is_some(), by_file == 0);
    }
    assert_eq!(parse(3 | 16, true), None);
}

proptest! {
    #[test]
    fn any_bytes_are_a_message_or_an_error(
        head: [u8; Header::SIZE],
        command in 0..24_u16,
        body in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let _ = Header::parse(&head);
        let header =
            Header { id: 0, command, kind: Kind::Command, answer: Answer::Wanted, error: None, body: body.len() as u32 };
        if let Err(error) = Request::parse(&header, &body, Vec::new()) {
            prop_assert!(!error.to_string().is_empty());
            prop_assert_ne!(error.errno().raw_os_error(), 0);
        }
    }
}
