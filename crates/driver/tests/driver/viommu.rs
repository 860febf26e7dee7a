//! virtio-iommu's driver against a strict IOMMU, and a disk behind the two of them.

use crate::peer::*;
use crate::world::*;
use ringfence_dma::{Buffer, BusAddr, DmaError, FromDevice, Gpa, Mapper, Permission, Streaming, ToDevice};
use ringfence_driver::blk::{Blk, Options};
use ringfence_driver::embedded::{Embedded, EmbeddedError};
use ringfence_driver::mapper::{Direct, Iommu, Paged, Run, Window};
use ringfence_driver::policy::IommuMode;
use ringfence_driver::viommu::{Fault, FaultReason, Reserved, Status, Viommu, ViommuError};
use ringfence_driver::{LoanError, StartError};
use ringfence_iommu::{Domain, Mapping};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::Arc;

const INPUT_RANGE: u64 = 1;
const DOMAIN_RANGE: u64 = 2;
const MAP_UNMAP: u64 = 4;
const PROBE: u64 = 16;

const ENDPOINT: u32 = 0x18;
const PROBE_SIZE: usize = 64;

/// What the device is and does, strictly as §5.13 has it.
struct Model {
    /// What endpoint 0x18 sees.
    space: Arc<Domain>,
    attached: RefCell<Option<u32>>,
    requests: RefCell<Vec<u8>>,
    faults: RefCell<VecDeque<Vec<u8>>>,
    /// Answers with this instead.
    status: RefCell<Option<u8>>,
    properties: RefCell<Vec<u8>>,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// `virtio_iommu_probe_resv_mem`.
fn reserved(subtype: u8, first: u64, last: u64) -> Vec<u8> {
    [&[1, 0, 20, 0, subtype, 0, 0, 0][..], &first.to_le_bytes(), &last.to_le_bytes()].concat()
}

impl Model {
    fn new(world: &World) -> Self {
        Self {
            space: world.domain.clone(),
            attached: RefCell::default(),
            requests: RefCell::default(),
            faults: RefCell::default(),
            status: RefCell::default(),
            properties: RefCell::new(
                [reserved(1, 0xfee0_0000, 0xfeef_ffff), reserved(0, 1 << 32, (1 << 32) + 4095)].concat(),
            ),
        }
    }

    fn answer(&self, queue: u16, read: &[u8], room: usize) -> Option<Vec<u8>> {
        if queue == 1 {
            assert_eq!((read.len(), room), (0, 24));
            return self.faults.borrow_mut().pop_front();
        }
        assert_eq!(read[1..4], [0; 3]);
        self.requests.borrow_mut().push(read[0]);
        let mut properties = Vec::new();
        let status = match (*self.status.borrow(), read[0]) {
            (Some(status), _) => status,
            (None, 1) => {
                assert_eq!((read.len(), word(read, 8), long(read, 12)), (20, ENDPOINT, 0));
                assert_eq!(self.attached.replace(Some(word(read, 4))), None);
                0
            }
            (None, 2) => {
                assert_eq!((read.len(), word(read, 8), long(read, 12)), (20, ENDPOINT, 0));
                assert_eq!(self.attached.replace(None), Some(word(read, 4)));
                0
            }
            (None, 3) => {
                assert_eq!((read.len(), self.attached.borrow().as_ref()), (36, Some(&word(read, 4))));
                let (first, last) = (long(read, 8), long(read, 16));
                let permission = match word(read, 32) {
                    1 => Permission::ReadOnly,
                    2 => Permission::WriteOnly,
                    3 => Permission::ReadWrite,
                    flags => panic!("flags {flags:#x}"),
                };
                let mapping =
                    Mapping { addr: BusAddr(first), gpa: Gpa(long(read, 24)), len: last - first + 1, permission };
                if self.space.map_at(mapping).is_ok() { 0 } else { 4 }
            }
            (None, 4) => {
                assert_eq!((read.len(), word(read, 24)), (28, 0));
                let (first, last) = (long(read, 8), long(read, 16));
                if self.space.unmap(BusAddr(first), last - first + 1).is_ok() { 0 } else { 6 }
            }
            (None, 5) => {
                assert_eq!((read.len(), read[8..].iter().all(|&byte| byte == 0)), (72, true));
                properties = self.properties.borrow().clone();
                if word(read, 4) == ENDPOINT { 0 } else { 6 }
            }
            (None, other) => panic!("request {other}"),
        };
        properties.resize(room - 4, 0);
        properties.extend([status, 0, 0, 0]);
        Some(properties)
    }
}

/// The device, which reaches physical memory.
fn peer<'p>(world: &World, model: &'p Model, ring: u64) -> Peer<'p> {
    let features = ring | INPUT_RANGE | DOMAIN_RANGE | MAP_UNMAP | PROBE;
    let mut peer = Peer::new(world, 23, 2, features, |queue, read, room| model.answer(queue, read, room));
    peer.config = [
        &0xffff_ffff_ffff_f000_u64.to_le_bytes()[..],
        &0_u64.to_le_bytes(),
        &0xffff_ffff_ffff_u64.to_le_bytes(),
        &0_u32.to_le_bytes(),
        &0xffff_u32.to_le_bytes(),
        &(PROBE_SIZE as u32).to_le_bytes(),
    ]
    .concat();
    peer
}

/// The two halves of coherent memory: for the IOMMU's own rings, and for those of who is behind it.
fn halves(world: &World) -> (Direct<'_>, Buffer<'_>) {
    (Direct::new(world.buffer(0, 64 * PAGE)), world.buffer(64 * PAGE, 64 * PAGE))
}

/// Brings the IOMMU up for a test.
fn with_iommu(ring: u64, test: impl FnOnce(&World, &Model, &Viommu<'_, Embedded<Peer<'_>>, Direct<'_>>)) {
    let world = World::new();
    let model = Model::new(&world);
    let (direct, _) = halves(&world);
    let iommu = Viommu::start(peer(&world, &model, ring).embedded(IommuMode::Off), &direct).unwrap();
    test(&world, &model, &iommu);
}

#[test]
fn a_disk_works_behind_it_and_reaches_what_is_lent_alone() {
    for (ring, batch) in [(0, 1), (PACKED | EVENT_IDX, 1), (INDIRECT, 9)] {
        with_iommu(ring, |world, model, iommu| {
            let reserved = iommu.probe(ENDPOINT).unwrap();
            assert_eq!(reserved.len(), 2);
            let space = iommu.attach(7, ENDPOINT).unwrap();
            let first = iommu.place(&reserved, 256).unwrap();
            assert_eq!(first, BusAddr((1 << 32) + 4096), "behind what is reserved there");
            let window = Window::new(space, first, 256);
            let (_, rings) = halves(world);
            let mapper = if batch == 1 { Paged::strict(window, rings) } else { Paged::batched(window, rings, batch) };
            let mut transport = world.embedded(DISK_FEATURES | ring, IommuMode::Require);
            let mut disk = Blk::start(&mut transport, new_driver(&mapper), Options::default()).unwrap();
            let data = world.buffer(200 * PAGE + 100, 3 * 512);
            let idle = world.domain.mapped();
            for round in 0..20 {
                data.memory().write(0, &stamp(round, 3 * 512));
                disk.write(5, &[data]).unwrap();
                data.memory().fill(0);
                disk.read(5, &[data]).unwrap();
                assert_eq!(bytes(data), stamp(round, 3 * 512));
                assert!(world.domain.mapped() < idle + batch, "{} are mapped", world.domain.mapped());
            }
            drop(disk);
            let seen = &transport.device().seen;
            assert!(seen.iter().all(|addr| *addr >= first && addr.0 < first.0 + 256 * 4096), "{seen:?}");
            drop(mapper);
            assert_eq!((world.domain.mapped(), *model.attached.borrow()), (0, None));
            assert!(world.domain.faults().latest.is_empty());
        });
    }
}

#[test]
fn a_mapping_that_is_gone_is_out_of_reach() {
    with_iommu(0, |world, _, iommu| {
        let space = iommu.attach(7, ENDPOINT).unwrap();
        let (_, rings) = halves(world);
        let mapper = Paged::strict(Window::new(space, BusAddr(1 << 40), 256), rings);
        let mut transport = world.embedded(DISK_FEATURES, IommuMode::Require);
        let mut disk = Blk::start(&mut transport, new_driver(&mapper), Options::default()).unwrap();
        // Read-only for the device, by a driver's mistake.
        let sector = world.buffer(200 * PAGE, 512);
        let lent = Streaming::map(&mapper, sector, ToDevice).unwrap();
        let stolen = Mapping { addr: lent.addr(), gpa: sector.physical(), len: 4096, permission: Permission::ReadOnly };
        assert_eq!(world.domain.lookup(lent.addr()), Some(stolen));
        drop(lent);
        assert_eq!(world.domain.lookup(stolen.addr), None);
        disk.read(0, &[sector]).unwrap();
    });
}

#[test]
fn many_mappings_go_with_one_ring_of_the_bell() {
    with_iommu(0, |_, model, iommu| {
        let space = iommu.attach(7, ENDPOINT).unwrap();
        let run = |number: u64| Run { addr: BusAddr((1 << 40) + number * 4096), len: 4096 };
        let runs: Vec<_> = (0..100).map(run).collect();
        for run in &runs {
            space.map(run.addr, Gpa(run.addr.0 - (1 << 40)), run.len, Permission::WriteOnly).unwrap();
        }
        assert_eq!(model.space.mapped(), 100);
        space.unmap(&runs).unwrap();
        assert_eq!(model.space.mapped(), 0);
        // All are tried, and the first that fails is told.
        assert_eq!(space.unmap(&runs[..3]), Err(DmaError::Platform { code: 6 }));
        let before = model.requests.borrow().len();
        space.unmap(&[]).unwrap();
        assert_eq!(model.requests.borrow().len(), before);
        assert_eq!(
            space.map(BusAddr(u64::MAX - 4095), Gpa(0), 8192, Permission::ReadOnly),
            Err(DmaError::Unreachable { physical: Gpa(0) })
        );
    });
}

#[test]
fn each_answer_has_a_name() {
    with_iommu(0, |_, model, iommu| {
        for (answer, expected) in [
            (1, Status::Io),
            (2, Status::Unsupported),
            (3, Status::Device),
            (4, Status::Invalid),
            (5, Status::Range),
            (6, Status::NoEntry),
            (7, Status::Fault),
            (8, Status::NoMemory),
            (9, Status::Other(9)),
            (0xff, Status::Other(0xff)),
        ] {
            *model.status.borrow_mut() = Some(answer);
            let error = iommu.attach(1, ENDPOINT).err();
            assert_eq!(error, Some(ViommuError::Refused(expected)));
        }
        *model.status.borrow_mut() = None;
        assert_eq!(iommu.probe(5).err(), Some(ViommuError::Refused(Status::NoEntry)));
    });
}

#[test]
fn a_probe_is_read_within_its_bounds() {
    let msi = Reserved { first: BusAddr(0xfee0_0000), last: BusAddr(0xfeef_ffff), msi: true };
    for (properties, expected) in [
        (vec![], Ok(vec![])),
        (reserved(1, 0xfee0_0000, 0xfeef_ffff), Ok(vec![msi])),
        // Unknown kinds are passed over, the four upper bits of a kind are not looked at.
        ([vec![9, 0xf0, 3, 0, 1, 2, 3], reserved(1, 0xfee0_0000, 0xfeef_ffff)].concat(), Ok(vec![msi])),
        ([vec![0, 0xf0, 3, 0], reserved(0, 0, 1)].concat(), Ok(vec![])),
        (vec![9, 0, 0xff, 0xff], Err(ViommuError::BadProperty { offset: 0 })),
        (vec![1, 0, 19, 0], Err(ViommuError::BadProperty { offset: 0 })),
        (vec![1, 0, 0, 0], Err(ViommuError::BadProperty { offset: 0 })),
        ([vec![9, 0, 0, 0], reserved(0, 2, 1)].concat(), Err(ViommuError::BadProperty { offset: 4 })),
        (reserved(3, 0, u64::MAX), Ok(vec![Reserved { first: BusAddr(0), last: BusAddr(u64::MAX), msi: false }])),
    ] {
        with_iommu(0, |_, model, iommu| {
            *model.properties.borrow_mut() = properties.clone();
            assert_eq!(iommu.probe(ENDPOINT), expected, "{properties:?}");
        });
    }
    with_iommu(0, |_, _, iommu| {
        let all = Reserved { first: BusAddr(0), last: BusAddr(u64::MAX), msi: false };
        assert_eq!(iommu.place(&[all], 1), None);
        let upper = Reserved { first: BusAddr(1 << 32), ..all };
        assert_eq!(iommu.place(&[upper], 16), Some(BusAddr(0)));
        assert_eq!(iommu.place(&[], usize::MAX), None);
        assert_eq!(iommu.place(&[], (1 << 36) - (1 << 20) + 1), Some(BusAddr(0)));
    });
}

#[test]
fn faults_are_told_of() {
    with_iommu(0, |_, model, iommu| {
        assert_eq!(iommu.fault(), Ok(None));
        let event = |reason, flags: u32, addr: u64| {
            [&[reason, 0, 0, 0][..], &flags.to_le_bytes(), &ENDPOINT.to_le_bytes(), &[0; 4], &addr.to_le_bytes()]
                .concat()
        };
        let (read, write) = (ringfence_dma::Access::Read, ringfence_dma::Access::Write);
        let (endpoint, addr) = (ENDPOINT, Some(BusAddr(0x1234_5678_9000)));
        for _ in 0..30 {
            for (bytes, expected) in [
                (
                    event(2, 0x101, 0x1234_5678_9000),
                    Fault { reason: FaultReason::Mapping, endpoint, access: Some(read), addr },
                ),
                (event(1, 0x2, 5), Fault { reason: FaultReason::Domain, endpoint, access: Some(write), addr: None }),
                (event(77, 0, 5), Fault { reason: FaultReason::Unknown(77), endpoint, access: None, addr: None }),
            ] {
                model.faults.borrow_mut().push_back(bytes);
                // Anything makes the device work.
                iommu.probe(ENDPOINT).unwrap();
                assert_eq!(iommu.fault(), Ok(Some(expected)));
            }
        }
        model.faults.borrow_mut().push_back(vec![2; 23]);
        iommu.probe(ENDPOINT).unwrap();
        assert_eq!(iommu.fault(), Err(LoanError::Short { written: 23, expected: 24 }));
        assert_eq!(iommu.fault(), Ok(None));
    });
}

#[test]
fn what_it_says_of_itself_is_checked() {
    let world = World::new();
    let model = Model::new(&world);
    let (direct, _) = halves(&world);
    let start = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut peer = peer(&world, &model, 0);
        change(&mut peer.config);
        Viommu::start(peer.embedded(IommuMode::Off), &direct).err()
    };
    let config = |field, value| Some(StartError::Config { field, value });
    assert_eq!(start(&|_| ()), None);
    assert_eq!(start(&|config| config[..8].fill(0)), config("page_size_mask", 0));
    assert_eq!(start(&|config| config[..7].fill(0)), config("page_size_mask", 0xff << 56));
    assert_eq!(start(&|config| config[14] = 0xff), config("input_range", 0xffff_ffff_ffff));
    assert_eq!(start(&|config| config[27] = 1), config("domain_range", 0xffff));
    assert_eq!(start(&|config| config[32] = 0), config("probe_size", 0));
    assert_eq!(start(&|config| config[34] = 1), config("probe_size", 0x1_0040));
    let lesser = Peer::new(&world, 23, 2, INPUT_RANGE, |_, _, _| None).embedded(IommuMode::Off);
    let error = Viommu::start(lesser, &direct).err();
    assert!(matches!(error, Some(StartError::Config { field: "features", .. })));
}

#[test]
fn an_iommu_that_breaks_the_rules_is_of_no_use_any_more() {
    for (ring, crime) in [0, PACKED].into_iter().flat_map(|ring| CRIMES.map(|crime| (ring, crime))) {
        if (ring, crime) == (PACKED, Crime::Twice) {
            continue; // what it writes into the ring is written over before anybody looks
        }
        let world = World::new();
        let model = Model::new(&world);
        let (direct, _) = halves(&world);
        let mut peer = peer(&world, &model, ring);
        peer.crime = crime;
        let iommu = Viommu::start(peer.embedded(IommuMode::Off), &direct).unwrap();
        // One that is used twice is found out by the second time.
        let first = iommu.probe(ENDPOINT).map(drop).and_then(|()| iommu.probe(ENDPOINT).map(drop)).err();
        assert!(matches!(first, Some(ViommuError::Loan(LoanError::Broken(_)))), "{crime:?}, ring {ring:#x}: {first:?}");
        assert_eq!(iommu.attach(1, ENDPOINT).map(drop).err(), first);
    }
}

#[test]
fn a_silent_iommu_is_given_up_and_late_answers_are_nobodys() {
    let world = World::new();
    let silent = RefCell::new(true);
    let model = Model::new(&world);
    let (direct, _) = halves(&world);
    let answer = |queue, read: &[u8], room| if *silent.borrow() { None } else { model.answer(queue, read, room) };
    let mut late = Peer::new(&world, 23, 2, MAP_UNMAP | PROBE, answer);
    late.config = peer(&world, &model, 0).config;
    let iommu = Viommu::start(late.embedded(IommuMode::Off), &direct).unwrap();
    let stalled = ViommuError::Loan(LoanError::Transport(EmbeddedError::Stalled { queue: 0 }));
    assert_eq!(iommu.attach(1, ENDPOINT).err(), Some(stalled));
    *silent.borrow_mut() = false;
    // The first is answered now: with success, which is not this one's.
    assert_eq!(iommu.probe(5).err(), Some(ViommuError::Refused(Status::NoEntry)));
    assert_eq!(*model.attached.borrow(), Some(1));
}

/// A space is a mapper that fails as mappers do.
#[test]
fn a_refusal_to_map_is_an_error_of_the_mapper() {
    with_iommu(0, |world, model, iommu| {
        let space = iommu.attach(7, ENDPOINT).unwrap();
        let (_, rings) = halves(world);
        let mapper = Paged::strict(Window::new(space, BusAddr(1 << 40), 4), rings);
        *model.status.borrow_mut() = Some(8);
        let buffer = world.buffer(200 * PAGE, 512);
        assert_eq!(Streaming::map(&mapper, buffer, FromDevice).err(), Some(DmaError::Platform { code: 8 }));
        *model.status.borrow_mut() = None;
        let lent: Vec<_> = (0..5).map_while(|_| Streaming::map(&mapper, buffer, FromDevice).ok()).collect();
        assert_eq!(lent.len(), 4, "the address was not lost");
        assert_eq!(mapper.max_len(), 3 * PAGE + 1);
    });
}
