//! virtio-mmio against a strict device, and against windows with something else behind.

use crate::model::*;
use crate::world::*;
use ringfence_driver::blk::{Blk, BlkError, Options};
use ringfence_driver::mmio::{Mmio, MmioError};
use ringfence_driver::policy::{Addressing, IommuMode};
use ringfence_driver::{StartError, Transport, Waiting};

#[test]
fn a_disk_works_over_registers() {
    for ring in [0, EVENT_IDX, INDIRECT, PACKED, PACKED | INDIRECT | EVENT_IDX] {
        let world = World::new();
        let core = Core::shared(&world, DISK_FEATURES | ring, IommuMode::Require);
        let transport = Mmio::new(MmioModel::new(&core), 0xa00_0000, patience(&core)).unwrap();
        assert_eq!(transport.identity().vendor, 0x1af4);
        world.with_mapper(Mapping::Dynamic, |mapper| {
            let mut disk = Blk::start(transport, new_driver(mapper), Options::default()).unwrap();
            assert_eq!(addressing(&core), Some(Addressing::Translated));
            let (from, into) = (world.buffer(0, 1024), world.buffer(5000, 1024));
            from.memory().write(0, &stamp(3, 1024));
            disk.write(7, &[from]).unwrap();
            disk.read(7, &[into]).unwrap();
            assert_eq!(bytes(into), stamp(3, 1024));
            assert_eq!(disk.device().transport().interrupt(), 1);
        });
        assert_eq!((core.borrow().status, world.domain.mapped()), (0, 0));
    }
}

#[test]
fn other_things_and_the_legacy_interface_are_refused() {
    let world = World::new();
    let core = Core::shared(&world, DISK_FEATURES, IommuMode::Offer);
    let open = |change: fn(&mut MmioModel)| {
        let mut model = MmioModel::new(&core);
        change(&mut model);
        Mmio::new(model, 0, patience(&core)).err()
    };
    assert_eq!(open(|_| ()), None);
    assert_eq!(open(|model| model.magic = 0), Some(MmioError::NotVirtio { magic: 0 }));
    assert_eq!(open(|model| model.version = 1), Some(MmioError::Legacy));
    assert_eq!(open(|model| model.version = 3), Some(MmioError::Version { version: 3 }));
    assert_eq!(open(|model| model.device = 0), Some(MmioError::Empty));
    assert_eq!(open(|model| model.len = 0xff), Some(MmioError::Short { len: 0xff }));
    assert!(MmioError::Legacy.to_string().contains("force-legacy=false"));
    assert_eq!(core.borrow().status, 0xaa, "nothing was touched");
}

#[test]
fn a_device_that_lies_is_named() {
    let start = |lie| {
        let world = World::new();
        let core = Core::shared(&world, DISK_FEATURES, IommuMode::Offer);
        core.borrow_mut().lie = lie;
        let transport = Mmio::new(MmioModel::new(&core), 0, patience(&core)).unwrap();
        world.with_mapper(Mapping::Dynamic, |mapper| {
            let started = Blk::start(transport, new_driver(mapper), Options::default());
            let lent = world.domain.mapped();
            (started.map(drop).err(), lent > 0 && world.domain.mapped() == lent)
        })
    };
    let already = StartError::Transport(MmioError::AlreadyReady { queue: 0 });
    assert_eq!(start(Lie::Enabled), (Some(already), false));
    assert_eq!(start(Lie::NoReset), (None, true), "what it was lent is leaked");
}

#[test]
fn a_queue_is_reset_alone() {
    for (features, lie, expected) in [
        (RING_RESET, Lie::None, Ok(())),
        (0, Lie::None, Err(BlkError::NotOffered)),
        (RING_RESET, Lie::NoQueueReset, Err(BlkError::Transport(MmioError::TimedOut(Waiting::QueueReset(0))))),
        (RING_RESET, Lie::StillEnabled, Err(BlkError::Transport(MmioError::StillReady { queue: 0 }))),
    ] {
        let world = World::new();
        let core = Core::shared(&world, DISK_FEATURES | features, IommuMode::Offer);
        core.borrow_mut().lie = lie;
        let transport = Mmio::new(MmioModel::new(&core), 0, patience(&core)).unwrap();
        world.with_mapper(Mapping::Dynamic, |mapper| {
            let mut disk = Blk::start(transport, new_driver(mapper), Options::default()).unwrap();
            check_restart(&world, &core, &mut disk, expected);
        });
    }
}

#[test]
fn a_silent_device_is_given_up() {
    let world = World::new();
    let core = Core::shared(&world, DISK_FEATURES, IommuMode::Offer);
    let transport = Mmio::new(MmioModel::new(&core), 0, patience(&core)).unwrap();
    world.with_mapper(Mapping::Dynamic, |mapper| {
        let mut disk = Blk::start(transport, new_driver(mapper), Options::default()).unwrap();
        core.borrow_mut().disk.mood = Mood::Sleepy;
        let silent = BlkError::Transport(MmioError::TimedOut(Waiting::Queue(0)));
        assert_eq!(disk.read(0, &[world.buffer(0, 512)]), Err(silent));
    });
}
