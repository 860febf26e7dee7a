//! virtio-pci against a strict function, and against functions that lie.

use crate::model::*;
use crate::world::*;
use ringfence_driver::blk::{Blk, BlkError, Options};
use ringfence_driver::pci::{Interrupts, Pci, PciError, Structure, Unusable};
use ringfence_driver::policy::{Addressing, IommuMode};
use ringfence_driver::{StartError, Transport, Waiting};

fn pci(model: PciModel) -> Result<Pci<Model, impl ringfence_driver::Wait>, PciError> {
    let patience = patience(&model.core);
    Pci::new(Model::new(model), patience)
}

/// A disk behind the function writes and reads.
fn check(world: &World, transport: Pci<Model, impl ringfence_driver::Wait>) {
    world.with_mapper(Mapping::Dynamic, |mapper| {
        let core = transport.function().borrow().core.clone();
        let mut disk = Blk::start(transport, new_driver(mapper), Options::default()).unwrap();
        assert_eq!(addressing(&core), Some(Addressing::Translated));
        assert_eq!(disk.geometry().sectors, SECTORS as u64);
        let (from, into) = (world.buffer(0, 1024), world.buffer(5000, 1024));
        from.memory().write(0, &stamp(9, 1024));
        disk.write(7, &[from]).unwrap();
        disk.read(7, &[into]).unwrap();
        assert_eq!(bytes(into), stamp(9, 1024));
        let model = disk.device().transport().function().clone();
        assert_eq!(model.borrow().space[4] & 6, 6, "memory and bus mastering are on");
        drop(disk);
        assert_eq!(model.borrow().space[4] & 4, 0, "bus mastering is off again");
        assert_eq!(core.borrow().status, 0);
        assert_eq!(world.domain.mapped(), 0);
    });
}

#[test]
fn a_disk_works_over_registers() {
    for ring in [0, EVENT_IDX, INDIRECT, PACKED, PACKED | INDIRECT | EVENT_IDX] {
        let world = World::new();
        let core = Core::shared(&world, DISK_FEATURES | ring, IommuMode::Require);
        check(&world, pci(PciModel::sane(&core)).unwrap());
    }
}

#[test]
fn of_several_structures_the_first_that_can_be_used_is_used() {
    let io = Cap { bar: 0, ..NOTIFY_CAP };
    let short = Cap { length: 0x37, ..COMMON_CAP };
    let reserved_bar = Cap { bar: 6, ..COMMON_CAP };
    let unknown = Cap { kind: 9, bar: 0, ..COMMON_CAP };
    let window = Cap { kind: 5, bar: 0, length: 0, ..COMMON_CAP };
    let beyond = Cap { offset: 0x3fff, length: 2, ..ISR_CAP };
    let absent = Cap { bar: 2, ..DEVICE_CAP };
    let upper_half = Cap { bar: 5, ..DEVICE_CAP };
    let wraps = Cap { offset: u32::MAX - 3, length: u32::MAX, ..DEVICE_CAP };
    let world = World::new();
    for caps in [
        vec![io, short, unknown, NOTIFY_CAP, COMMON_CAP, ISR_CAP, DEVICE_CAP],
        vec![reserved_bar, window, beyond, NOTIFY_CAP, ISR_CAP, COMMON_CAP, DEVICE_CAP],
        vec![upper_half, COMMON_CAP, wraps, ISR_CAP, absent, DEVICE_CAP, NOTIFY_CAP],
    ] {
        let core = Core::shared(&world, DISK_FEATURES, IommuMode::Offer);
        check(&world, pci(PciModel::new(&core, &caps)).unwrap());
    }
}

#[test]
fn what_cannot_be_used_is_said() {
    let world = World::new();
    let bar_len = 0x4000;
    let beyond = |structure: Cap| Cap { offset: 0x3000, length: 0x1001, ..structure };
    for (cap, structure, why) in [
        (Cap { len: 15, ..COMMON_CAP }, Structure::Common, Unusable::ShortCapability { len: 15 }),
        (Cap { len: 16, ..NOTIFY_CAP }, Structure::Notify, Unusable::ShortCapability { len: 16 }),
        (Cap { bar: 0, ..COMMON_CAP }, Structure::Common, Unusable::Io { bar: 0 }),
        (Cap { bar: 5, ..ISR_CAP }, Structure::Isr, Unusable::NoBar { bar: 5 }),
        (Cap { bar: 3, ..DEVICE_CAP }, Structure::Device, Unusable::NoBar { bar: 3 }),
        (Cap { length: 0, ..DEVICE_CAP }, Structure::Device, Unusable::Short { len: 0, needed: 1 }),
        (Cap { length: 1, ..NOTIFY_CAP }, Structure::Notify, Unusable::Short { len: 1, needed: 2 }),
        (Cap { length: 0x37, ..COMMON_CAP }, Structure::Common, Unusable::Short { len: 0x37, needed: 0x38 }),
        (Cap { offset: 2, ..COMMON_CAP }, Structure::Common, Unusable::Misaligned { offset: 2 }),
        (Cap { offset: 3, ..NOTIFY_CAP }, Structure::Notify, Unusable::Misaligned { offset: 3 }),
        (beyond(COMMON_CAP), Structure::Common, Unusable::BeyondBar { offset: 0x3000, len: 0x1001, bar_len }),
        (beyond(NOTIFY_CAP), Structure::Notify, Unusable::BeyondBar { offset: 0x3000, len: 0x1001, bar_len }),
    ] {
        let caps =
            [COMMON_CAP, NOTIFY_CAP, ISR_CAP, DEVICE_CAP].map(|sane| if sane.kind == cap.kind { cap } else { sane });
        let core = Core::shared(&world, DISK_FEATURES, IommuMode::Offer);
        let error = pci(PciModel::new(&core, &caps)).err();
        assert_eq!(error, Some(PciError::Structure { structure, why: Some(why) }));
        assert_eq!(core.borrow().status, 0xaa, "nothing was touched");
    }
    let mut model = PciModel::sane(&Core::shared(&world, DISK_FEATURES, IommuMode::Offer));
    model.unmappable = true;
    let why = Some(Unusable::NotMapped { bar: 4 });
    assert_eq!(pci(model).err(), Some(PciError::Structure { structure: Structure::Common, why }));
    let model = PciModel::new(&Core::shared(&world, DISK_FEATURES, IommuMode::Offer), &[COMMON_CAP, NOTIFY_CAP]);
    assert_eq!(pci(model).err(), Some(PciError::Structure { structure: Structure::Isr, why: None }));
}

#[test]
fn a_list_of_capabilities_ends_or_is_refused() {
    let world = World::new();
    let core = || Core::shared(&world, DISK_FEATURES, IommuMode::Offer);
    // In a circle; to itself.
    for to in [0x40, 0x40 + 60] {
        let mut model = PciModel::sane(&core());
        model.link_to(to);
        assert_eq!(pci(model).err(), Some(PciError::EndlessCapabilities));
    }
    // Into the header, where it ends; with the reserved bits set.
    let mut model = PciModel::sane(&core());
    model.link_to(0x3f);
    assert!(pci(model).is_ok());
    let mut model = PciModel::sane(&core());
    model.space[0x34] |= 3;
    assert!(pci(model).is_ok());
    // Over the end of the configuration space.
    let mut model = PciModel::new(&core(), &[COMMON_CAP, NOTIFY_CAP, DEVICE_CAP]);
    model.next_at(0xf4);
    model.add(ISR_CAP);
    let why = Some(Unusable::ShortCapability { len: 12 });
    assert_eq!(pci(model).err(), Some(PciError::Structure { structure: Structure::Isr, why }));
    // Without the bit that says that there is one.
    let mut model = PciModel::sane(&core());
    model.space[6] = 0;
    assert_eq!(pci(model).err(), Some(PciError::Structure { structure: Structure::Common, why: None }));
}

#[test]
fn other_functions_and_legacy_ones_are_refused_and_transitional_ones_driven() {
    let world = World::new();
    let core = Core::shared(&world, DISK_FEATURES, IommuMode::Offer);
    let ids = |vendor: u16, device: u16, subsystem: u16, revision, caps: &[Cap]| {
        let mut model = PciModel::new(&core, caps);
        model.space[..2].copy_from_slice(&vendor.to_le_bytes());
        model.space[2..4].copy_from_slice(&device.to_le_bytes());
        model.space[0x2e..0x30].copy_from_slice(&subsystem.to_le_bytes());
        model.space[8] = revision;
        model
    };
    let all = [COMMON_CAP, NOTIFY_CAP, ISR_CAP, DEVICE_CAP];
    for (vendor, device, revision) in
        [(0x8086, 0x1042, 1), (0x1af4, 0x1080, 1), (0x1af4, 0x0fff, 0), (0x1af4, 0x1001, 1)]
    {
        let error = pci(ids(vendor, device, 2, revision, &all)).err();
        assert_eq!(error, Some(PciError::NotVirtio { vendor, device }));
    }
    assert_eq!(pci(ids(0xffff, 0xffff, 0, 0, &all)).err(), Some(PciError::Gone));
    let legacy = pci(ids(0x1af4, 0x1001, 2, 0, &[])).err().unwrap();
    assert_eq!(legacy, PciError::LegacyOnly { device: 0x1001 });
    assert!(legacy.to_string().contains("disable-modern=off"), "{legacy}");
    assert_eq!(core.borrow().status, 0xaa, "nothing was touched");
    check(&world, pci(ids(0x1af4, 0x1001, 2, 0, &all)).unwrap());
}

#[test]
fn a_device_that_lies_is_named() {
    let vectors = Interrupts::Vectors { config: Some(0), queues: vec![1] };
    let polled = Interrupts::Polled;
    for (lie, interrupts, expected) in [
        (Lie::Enabled, polled.clone(), PciError::AlreadyEnabled { queue: 0 }),
        (Lie::NotifyOff(0x400), polled.clone(), PciError::Doorbell { queue: 0, offset: 0x1000 }),
        (Lie::NotifyOff(u16::MAX), polled, PciError::Doorbell { queue: 0, offset: 0x3fffc }),
        (Lie::NoVector, vectors, PciError::NoVector { vector: 0 }),
    ] {
        let world = World::new();
        let core = Core::shared(&world, DISK_FEATURES, IommuMode::Offer);
        core.borrow_mut().lie = lie;
        let transport = pci(PciModel::sane(&core)).unwrap().with_interrupts(interrupts);
        world.with_mapper(Mapping::Dynamic, |mapper| {
            let error = Blk::start(transport, new_driver(mapper), Options::default()).err();
            assert_eq!(error, Some(StartError::Transport(expected)));
        });
        assert_eq!(core.borrow().status, 0, "what it had been told of is forgotten");
        assert_eq!(world.domain.mapped(), 0);
    }
}

#[test]
fn a_doorbell_is_aligned_and_within_the_structure() {
    let world = World::new();
    for (multiplier, off, expected) in [
        (1, 3, Some(PciError::Doorbell { queue: 0, offset: 3 })),
        (0x8000_0000, 2, Some(PciError::Doorbell { queue: 0, offset: 1 << 32 })),
        (2, 6, None),
        (12, 1, None),
    ] {
        let core = Core::shared(&world, DISK_FEATURES, IommuMode::Offer);
        core.borrow_mut().lie = Lie::NotifyOff(off);
        let caps = [COMMON_CAP, Cap { multiplier, ..NOTIFY_CAP }, ISR_CAP, DEVICE_CAP];
        let transport = pci(PciModel::new(&core, &caps)).unwrap();
        match expected {
            None => check(&world, transport),
            Some(expected) => world.with_mapper(Mapping::Dynamic, |mapper| {
                let error = Blk::start(transport, new_driver(mapper), Options::default()).err();
                assert_eq!(error, Some(StartError::Transport(expected)));
            }),
        }
    }
}

#[test]
fn vectors_are_given_to_the_device() {
    let world = World::new();
    let core = Core::shared(&world, DISK_FEATURES, IommuMode::Offer);
    let vectors = Interrupts::Vectors { config: Some(3), queues: vec![5] };
    let transport = pci(PciModel::sane(&core)).unwrap().with_interrupts(vectors);
    world.with_mapper(Mapping::Dynamic, |mapper| {
        let disk = Blk::start(transport, new_driver(mapper), Options::default()).unwrap();
        assert_eq!((core.borrow().config_vector, core.borrow().queue_vector()), (3, 5));
        assert!(disk.device().transport().interrupt().queue);
    });
}

#[test]
fn what_was_lent_to_a_device_that_does_not_reset_is_never_used_again() {
    for (lie, why) in [(Lie::NoReset, PciError::TimedOut(Waiting::Reset)), (Lie::Gone, PciError::Gone)] {
        let world = World::new();
        let core = Core::shared(&world, DISK_FEATURES, IommuMode::Offer);
        core.borrow_mut().lie = lie;
        let mut transport = pci(PciModel::sane(&core)).unwrap();
        let model = transport.function().clone();
        world.with_mapper(Mapping::Dynamic, |mapper| {
            let disk = Blk::start(&mut transport, new_driver(mapper), Options::default()).unwrap();
            let lent = world.domain.mapped();
            assert!(lent > 0);
            drop(disk);
            assert_eq!(world.domain.mapped(), lent, "leaked, not reused");
        });
        assert_eq!(model.borrow().space[4] & 4, 0, "it is not let on the bus any more");
        assert_eq!(ringfence_driver::Transport::reset(&mut transport), Err(why));
    }
}

#[test]
fn a_queue_is_reset_alone() {
    let long = Cap { length: 0x40, ..COMMON_CAP };
    for (cap, features, lie, expected) in [
        (long, RING_RESET, Lie::None, Ok(())),
        (long, 0, Lie::None, Err(BlkError::NotOffered)),
        (COMMON_CAP, RING_RESET, Lie::None, Err(BlkError::NotOffered)),
        (long, RING_RESET, Lie::NoQueueReset, Err(BlkError::Transport(PciError::TimedOut(Waiting::QueueReset(0))))),
        (long, RING_RESET, Lie::StillEnabled, Err(BlkError::Transport(PciError::StillEnabled { queue: 0 }))),
    ] {
        let world = World::new();
        let core = Core::shared(&world, DISK_FEATURES | features, IommuMode::Offer);
        core.borrow_mut().lie = lie;
        let transport = pci(PciModel::new(&core, &[cap, NOTIFY_CAP, ISR_CAP, DEVICE_CAP])).unwrap();
        world.with_mapper(Mapping::Dynamic, |mapper| {
            let mut disk = Blk::start(transport, new_driver(mapper), Options::default()).unwrap();
            check_restart(&world, &core, &mut disk, expected);
            if expected == Ok(()) {
                assert_eq!(disk.device_mut().transport_mut().reset_queue(1), Err(PciError::NoQueue { queue: 1 }));
            }
        });
    }
}

#[test]
fn a_silent_device_is_given_up() {
    let world = World::new();
    let core = Core::shared(&world, DISK_FEATURES, IommuMode::Offer);
    let transport = pci(PciModel::sane(&core)).unwrap();
    world.with_mapper(Mapping::Dynamic, |mapper| {
        let mut disk = Blk::start(transport, new_driver(mapper), Options::default()).unwrap();
        core.borrow_mut().disk.mood = Mood::Sleepy;
        let silent = BlkError::Transport(PciError::TimedOut(Waiting::Queue(0)));
        assert_eq!(disk.read(0, &[world.buffer(0, 512)]), Err(silent));
    });
}
