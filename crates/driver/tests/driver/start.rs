//! Bringing a device up, and being turned away, by §3.1.1.

use crate::world::*;
use ringfence_dma::{DmaError, Mapper};
use ringfence_driver::blk::{Blk, Options};
use ringfence_driver::embedded::{Embedded, EmbeddedError};
use ringfence_driver::policy::{Addressing, Allow, DriverPolicy, Identity, IommuMode, Platform, Refusal, Taken};
use ringfence_driver::{DeviceStatus, Host, StartError, Transport};
use ringfence_ring::Layout;

/// Writes down what the driver does, and lies where it is told to.
struct Recorder {
    inner: Embedded<Disk>,
    log: Vec<String>,
    lie: Lie,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Lie {
    None,
    /// FEATURES_OK does not stick.
    FeaturesRefused,
    /// DRIVER_OK ends in DEVICE_NEEDS_RESET.
    NeedsReset,
    /// With DRIVER_OK it takes FEATURES_OK back.
    Forgetful,
    /// The configuration changes all the time.
    Unsteady,
    NoQueue,
    /// Resets are not confirmed, but for the first.
    NoReset,
    OddQueue,
}

impl Recorder {
    fn new(world: &World, features: u64, mode: IommuMode, lie: Lie) -> Self {
        Self { inner: world.embedded(features, mode), log: Vec::new(), lie }
    }

    fn says(&self, what: &str) -> bool {
        self.log.iter().any(|line| line.starts_with(what))
    }
}

impl Transport for Recorder {
    type Error = EmbeddedError;

    fn features(&self) -> u64 {
        self.inner.features()
    }

    fn identity(&self) -> Identity {
        self.inner.identity()
    }

    fn reset(&mut self) -> Result<(), EmbeddedError> {
        self.log.push("reset".into());
        if self.lie == Lie::NoReset && self.log.len() > 1 {
            return Err(EmbeddedError::Stalled { queue: 0 });
        }
        self.inner.reset()
    }

    fn status(&mut self) -> Result<DeviceStatus, EmbeddedError> {
        self.log.push("status?".into());
        let status = self.inner.status()?;
        Ok(match self.lie {
            Lie::FeaturesRefused => status - DeviceStatus::FEATURES_OK,
            Lie::NeedsReset if status.contains(DeviceStatus::DRIVER_OK) => status | DeviceStatus::DEVICE_NEEDS_RESET,
            Lie::Forgetful if status.contains(DeviceStatus::DRIVER_OK) => status - DeviceStatus::FEATURES_OK,
            _ => status,
        })
    }

    fn set_status(&mut self, status: DeviceStatus) -> Result<(), EmbeddedError> {
        self.log.push(format!("status {:#x}", status.bits()));
        self.inner.set_status(status)
    }

    fn offered(&mut self) -> Result<u64, EmbeddedError> {
        self.log.push("offered?".into());
        self.inner.offered()
    }

    fn take(&mut self, taken: Taken) -> Result<(), EmbeddedError> {
        self.log.push("take".into());
        self.inner.take(taken)
    }

    fn config_generation(&mut self) -> Result<u32, EmbeddedError> {
        self.log.push("config?".into());
        Ok(if self.lie == Lie::Unsteady { self.log.len() as u32 } else { 0 })
    }

    fn read_config(&mut self, offset: u32, into: &mut [u8]) -> Result<(), EmbeddedError> {
        self.inner.read_config(offset, into)
    }

    fn max_queue_size(&mut self, queue: u16) -> Result<u16, EmbeddedError> {
        match self.lie {
            Lie::NoQueue => Ok(0),
            Lie::OddQueue => Ok(100),
            _ => self.inner.max_queue_size(queue),
        }
    }

    fn start_queue(&mut self, queue: u16, layout: &Layout) -> Result<(), EmbeddedError> {
        self.log.push(format!("queue of {}", layout.size));
        self.inner.start_queue(queue, layout)
    }

    fn reset_queue(&mut self, queue: u16) -> Result<(), EmbeddedError> {
        self.log.push(format!("reset of queue {queue}"));
        self.inner.reset_queue(queue)
    }

    fn notify(&mut self, queue: u16) -> Result<(), EmbeddedError> {
        self.inner.notify(queue)
    }

    fn wait(&mut self, queue: u16) -> Result<(), EmbeddedError> {
        self.inner.wait(queue)
    }
}

type Started<'a> = Result<Blk<'a, &'a mut Recorder, dyn Mapper + 'a>, StartError<EmbeddedError>>;

/// Starts a disk, hands over what came of it, and gives the transport back.
fn started(features: u64, mode: IommuMode, lie: Lie, with: impl FnOnce(Started<'_>, &World)) -> Recorder {
    let world = World::new();
    let mut transport = Recorder::new(&world, features, mode, lie);
    world.with_mapper(Mapping::Dynamic, |mapper| {
        with(Blk::start(&mut transport, new_driver(mapper), Options::default()), &world);
    });
    transport
}

#[test]
fn the_steps_are_those_of_the_standard_in_their_order() {
    let transport = started(DISK_FEATURES, IommuMode::Require, Lie::None, |disk, world| {
        let mut disk = disk.unwrap();
        disk.read(0, &[world.buffer(0, 512)]).unwrap();
    });
    let steps = [
        "reset",
        "status 0x1",
        "status 0x3",
        "offered?",
        "take",
        "status 0xb",
        "status?",
        "config?",
        "config?",
        "queue of 128",
        "status 0xf",
        "status?",
        "reset",
    ];
    assert_eq!(transport.log, steps);
}

#[test]
fn a_device_that_leaves_features_ok_clear_is_not_driven() {
    let transport = started(DISK_FEATURES, IommuMode::Offer, Lie::FeaturesRefused, |disk, world| {
        let error = disk.err().unwrap();
        assert!(matches!(error, StartError::FeaturesRefused { .. }), "{error}");
        assert_eq!(world.domain.mapped(), 0);
    });
    assert_eq!(transport.log.last().unwrap(), "status 0x8b", "FAILED comes last");
    assert!(!transport.says("queue"));
}

#[test]
fn a_device_that_breaks_down_is_reset_before_its_rings_are_taken_back() {
    let transport = started(DISK_FEATURES, IommuMode::Offer, Lie::NeedsReset, |disk, world| {
        assert_eq!(disk.err(), Some(StartError::Broken { status: 0x4f }));
        assert_eq!(world.domain.mapped(), 0);
    });
    assert_eq!(transport.log[transport.log.len() - 2..], ["status 0x8b", "reset"]);
}

#[test]
fn memory_of_a_device_that_does_not_confirm_its_reset_is_never_used_again() {
    started(DISK_FEATURES, IommuMode::Offer, Lie::NoReset, |disk, world| {
        let mut disk = disk.unwrap();
        let from = [world.buffer(0, 512)];
        disk.device_mut().transport_mut().inner.device_mut().mood = Mood::Sleepy;
        disk.submit(ringfence_driver::blk::Request::Write { sector: 0, from: &from }).unwrap();
        let lent = world.domain.mapped();
        drop(disk);
        assert_eq!(world.domain.mapped(), lent, "rings, records and the buffer");
    });
}

#[test]
fn a_disk_that_needs_a_reset_is_not_restarted_and_keeps_what_it_has() {
    let transport = started(DISK_FEATURES | RING_RESET, IommuMode::Offer, Lie::None, |disk, world| {
        let mut disk = disk.unwrap();
        disk.device_mut().transport_mut().inner.device_mut().mood = Mood::Sleepy;
        let into = [world.buffer(0, 512)];
        disk.submit(ringfence_driver::blk::Request::Read { sector: 0, into: &into }).unwrap();
        let lent = world.domain.mapped();
        disk.device_mut().transport_mut().lie = Lie::NeedsReset;
        assert_eq!(disk.restart(), Err(ringfence_driver::blk::BlkError::NeedsReset { status: 0x4f }));
        assert_eq!(world.domain.mapped(), lent);
        drop(disk);
        assert_eq!(world.domain.mapped(), 0, "all of it was reset");
    });
    assert!(!transport.says("reset of queue"));
}

#[test]
fn what_a_disk_says_of_itself_is_checked() {
    for (lie, expected) in
        [(Lie::NoQueue, Some(StartError::NoQueue { queue: 0 })), (Lie::OddQueue, None), (Lie::None, None)]
    {
        started(DISK_FEATURES, IommuMode::Offer, lie, |disk, _| assert_eq!(disk.err(), expected, "{lie:?}"));
    }
    let odd = started(DISK_FEATURES | PACKED, IommuMode::Offer, Lie::OddQueue, |disk, _| drop(disk.unwrap()));
    assert!(odd.says("queue of 64"), "{:?}", odd.log);
    let forgetful = started(DISK_FEATURES, IommuMode::Offer, Lie::Forgetful, |disk, world| {
        assert_eq!(disk.err(), Some(StartError::Broken { status: 0x7 }));
        assert_eq!(world.domain.mapped(), 0);
    });
    assert_eq!(forgetful.log.last().unwrap(), "reset");
    started(DISK_FEATURES, IommuMode::Offer, Lie::Unsteady, |disk, _| {
        assert!(matches!(disk.err(), Some(StartError::Config { field: "config_generation", .. })));
    });
    started(DISK_FEATURES & !VERSION_1, IommuMode::Offer, Lie::None, |disk, _| {
        assert!(matches!(disk.err(), Some(StartError::Legacy { .. })));
    });
    let world = World::new();
    let mut transport = Recorder::new(&world, DISK_FEATURES, IommuMode::Offer, Lie::None);
    transport.inner.device_mut().config_capacity = u64::MAX / 512 + 1;
    world.with_mapper(Mapping::Dynamic, |mapper| {
        let disk = Blk::start(&mut transport, new_driver(mapper), Options::default());
        assert!(matches!(disk.err(), Some(StartError::Config { field: "capacity", .. })));
    });
}

#[test]
fn no_memory_for_rings_is_an_error_and_not_a_panic() {
    let world = World::new();
    let mut transport = Recorder::new(&world, DISK_FEATURES, IommuMode::Offer, Lie::None);
    let domain = std::sync::Arc::new(ringfence_iommu::Domain::default());
    let little = ringfence_iommu::Strict::new(domain.clone(), world.buffer(0, 2 * PAGE));
    let host = new_driver(&little);
    let disk = Blk::start(&mut transport, host, Options { depth: 128, segments: 4 });
    assert!(matches!(disk.err(), Some(StartError::Dma(DmaError::PoolFull { .. }))));
    assert_eq!(domain.mapped(), 0);
    assert_eq!(transport.log.last().unwrap(), "reset");
}

/// Driver by mode: who goes on with whom, and with which addresses.
#[test]
fn old_and_new_drivers_meet_each_kind_of_device() {
    let allowed = [Allow { vendor: 0x1af4, device: 2, slot: Some(0x18), addressing: Addressing::Physical }];
    let by_driver = |identity| Err(StartError::Refused(Refusal::Unflagged { identity }));
    let identity = Identity { vendor: 0x1af4, device: 2, slot: 0x18 };
    let refusing = DriverPolicy::Refusing { allowed: &[] };
    let allowing = DriverPolicy::Refusing { allowed: &allowed };
    for (policy, mode, expected) in [
        (DriverPolicy::Old, IommuMode::Off, Ok(Addressing::Physical)),
        (DriverPolicy::Old, IommuMode::Offer, Ok(Addressing::Physical)),
        (DriverPolicy::Old, IommuMode::Require, Err(StartError::FeaturesRefused { offered: 0, taken: 0 })),
        (DriverPolicy::New, IommuMode::Offer, Ok(Addressing::Translated)),
        (DriverPolicy::New, IommuMode::Require, Ok(Addressing::Translated)),
        (refusing, IommuMode::Off, by_driver(identity)),
        (refusing, IommuMode::Offer, Ok(Addressing::Translated)),
        (refusing, IommuMode::Require, Ok(Addressing::Translated)),
        (allowing, IommuMode::Off, Ok(Addressing::Physical)),
        (allowing, IommuMode::Require, Ok(Addressing::Translated)),
    ] {
        let world = World::new();
        let mut transport = Recorder::new(&world, DISK_FEATURES, mode, Lie::None);
        let context = format!("{policy:?}, {mode}");
        world.with_mapper(Mapping::Dynamic, |strict| {
            let direct_rings = world.buffer(256 * PAGE, 64 * PAGE);
            let direct = ringfence_driver::mapper::Direct::new(direct_rings);
            let (physical, translated): (&dyn Mapper, &dyn Mapper) = (&direct, strict);
            let platform = Platform::X86Iommu;
            let host = Host { platform, policy, physical: Some(physical), translated: Some(translated) };
            match (Blk::start(&mut transport, host, Options::default()), expected) {
                (Ok(mut disk), Ok(addressing)) => {
                    assert_eq!(disk.device().addressing(), addressing, "{context}");
                    let data = world.buffer(0, 512);
                    data.memory().fill(0x42);
                    disk.write(1, &[data]).unwrap();
                    data.memory().fill(0);
                    disk.read(1, &[data]).unwrap();
                    assert_eq!(bytes(data), [0x42; 512], "{context}");
                }
                (Err(StartError::FeaturesRefused { offered, taken }), Err(StartError::FeaturesRefused { .. })) => {
                    let text = StartError::<EmbeddedError>::FeaturesRefused { offered, taken }.to_string();
                    assert!(text.contains("likely reason") && text.contains("vIOMMU"), "{text}");
                }
                (Err(error), Err(expected)) => assert_eq!(error, expected, "{context}"),
                (Ok(_), Err(error)) => panic!("{context}: not refused, but {error} was due"),
                (Err(error), Ok(_)) => panic!("{context}: {error}"),
            }
            assert_eq!(world.domain.mapped(), 0, "{context}");
        });
        let accepted = transport.inner.accepted();
        if expected.is_err() {
            assert!(!transport.says("queue"), "{context}");
            assert!(transport.log.last().unwrap().starts_with("status 0x8"), "{context}");
            assert!(accepted.is_none_or(|accepted| accepted == Err(Refusal::FlagRequired)), "{context}");
        } else {
            assert_eq!(accepted, None, "reset since: {context}");
        }
    }
}

#[test]
fn a_driver_that_can_not_make_such_addresses_stops_before_it_lends_any() {
    for (policy, missing) in [(DriverPolicy::Old, Addressing::Physical), (DriverPolicy::New, Addressing::Translated)] {
        let world = World::new();
        let mut transport = Recorder::new(&world, DISK_FEATURES, IommuMode::Offer, Lie::None);
        world.with_mapper(Mapping::Dynamic, |mapper| {
            let only = |addressing| (addressing != missing).then_some(mapper);
            let (physical, translated) = (only(Addressing::Physical), only(Addressing::Translated));
            let host = Host { platform: Platform::X86Iommu, policy, physical, translated };
            let disk = Blk::start(&mut transport, host, Options::default());
            assert_eq!(disk.err(), Some(StartError::NoMapper(missing)));
        });
        assert!(!transport.says("queue"));
    }
}

#[test]
fn a_refusal_by_the_device_is_not_advisory() {
    let world = World::new();
    let mut transport = world.embedded(DISK_FEATURES, IommuMode::Require);
    let taken = Taken { features: VERSION_1, addressing: Addressing::Physical };
    transport.take(taken).unwrap();
    let all = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER | DeviceStatus::FEATURES_OK;
    transport.set_status(all).unwrap();
    assert_eq!(transport.accepted(), Some(Err(Refusal::FlagRequired)));
    // A driver that goes on all the same.
    let addr = ringfence_dma::BusAddr(0);
    transport.start_queue(0, &Layout { size: 16, descriptors: addr, driver: addr, device: addr }).unwrap();
    transport.set_status(all | DeviceStatus::DRIVER_OK).unwrap();
    let status = transport.status().unwrap();
    assert!(status.contains(DeviceStatus::DEVICE_NEEDS_RESET) && !status.contains(DeviceStatus::DRIVER_OK));
    assert_eq!(transport.notify(0), Err(EmbeddedError::NotRunning { queue: 0 }));
    assert_eq!(transport.device().kicks, 0);
}

#[test]
fn what_was_agreed_on_can_not_be_taken_back() {
    let world = World::new();
    let mut transport = world.embedded(DISK_FEATURES, IommuMode::Offer);
    let features = transport.offered().unwrap();
    transport.take(Taken { features, addressing: Addressing::Translated }).unwrap();
    transport.set_status(DeviceStatus::FEATURES_OK).unwrap();
    transport.take(Taken { features: VERSION_1, addressing: Addressing::Physical }).unwrap();
    transport.set_status(DeviceStatus::FEATURES_OK).unwrap();
    assert_eq!(transport.accepted(), Some(Ok(Addressing::Translated)));
    let at = |page: u64| ringfence_dma::BusAddr(page * 4096);
    transport.start_queue(0, &Layout { size: 16, descriptors: at(0), driver: at(1), device: at(2) }).unwrap();
    transport.set_status(DeviceStatus::FEATURES_OK | DeviceStatus::DRIVER_OK).unwrap();
    assert_eq!(transport.device().taken, Some(features));
    assert_eq!(transport.device().addressing, Some(Addressing::Translated));
}

/// A device that offers every bit there is gets back what is implemented, ORDER_PLATFORM where it is kept to.
#[test]
fn what_is_taken_is_what_is_implemented() {
    let order = 1 << 36;
    let known = DISK_FEATURES | READ_ONLY | PACKED | EVENT_IDX | INDIRECT | RING_RESET | 1 << 1;
    let world = World::new();
    let mut transport = world.embedded(!0, IommuMode::Offer);
    world.with_mapper(Mapping::Dynamic, |mapper| {
        let disk = Blk::start(&mut transport, new_driver(mapper), Options::default()).unwrap();
        let taken = disk.device().features();
        let platform = IommuMode::Offer.offers(0);
        let ordered = if cfg!(any(target_arch = "x86", target_arch = "x86_64")) { order } else { 0 };
        assert_eq!(taken, known | platform | ordered, "{taken:#x}");
    });
}
