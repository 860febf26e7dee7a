//! Who is told, at every boundary: each half of a queue against a peer whose wish is written by hand.

use crate::world::{Kind, World};
use ringfence_dma::{Access, BusAddr};
use ringfence_ring::{Chain, Descriptor, DeviceQueue, DriverQueue, Format, Notifications, Position, RingCells, Rules};
use std::sync::atomic::Ordering;

const SIZE: u16 = 8;

/// Honest halves, lockstep, one descriptor a chain.
struct Pair<'w> {
    world: &'w World,
    driver: DriverQueue<RingCells<'w>>,
    device: DeviceQueue,
    /// How many chains went through.
    done: u32,
}

impl<'w> Pair<'w> {
    fn new(world: &'w World) -> Self {
        Self {
            world,
            driver: DriverQueue::new(world.rules, SIZE, world.cells()).unwrap(),
            device: DeviceQueue::new(world.rules, world.layout, Position::start(world.rules.format)).unwrap(),
            done: 0,
        }
    }

    fn add(&mut self, count: u32) {
        for _ in 0..count {
            self.driver.add(&[Descriptor { addr: BusAddr(1), len: 1, access: Access::Write }], None).unwrap();
        }
        self.driver.publish();
    }

    fn serve(&mut self) {
        let mut open = self.device.open(self.world);
        let mut chain = Chain::default();
        while open.pop(&mut chain).unwrap() {
            open.push(chain.head(), 1).unwrap();
            self.done += 1;
        }
        open.publish().unwrap();
    }

    fn take(&mut self) {
        while self.driver.take_used().unwrap().is_some() {}
    }

    fn needs_notification(&mut self) -> bool {
        self.device.open(self.world).needs_notification().unwrap()
    }

    /// Brings `count` chains all the way, everybody told.
    fn pass(&mut self, count: u32) {
        for _ in 0..count {
            self.add(1);
            self.serve();
            self.take();
            self.driver.needs_kick();
            self.needs_notification();
        }
    }
}

/// How a wish to be told of entry `entry`, counted from the very first, is written.
fn wish(format: Format, entry: u32) -> u32 {
    match format {
        Format::Split => entry & 0xffff,
        Format::Packed => {
            let (index, lap) = (entry % u32::from(SIZE), entry / u32::from(SIZE));
            let wrap = u32::from(lap % 2 == 0);
            // RING_EVENT_FLAGS_DESC
            index | wrap << 15 | 2 << 16
        }
    }
}

fn write_wish(format: Format, area: &ringfence_dma::HostSlice<'_>, split_at: usize, wish: u32) {
    match format {
        Format::Split => area.store_u16(split_at, wish as u16, Ordering::Relaxed),
        Format::Packed => area.store_u32(0, wish, Ordering::Relaxed),
    }
}

/// Every batch, at places around each wrap, against every entry near it: told exactly if the entry is in the batch.
#[test]
fn told_exactly_of_what_was_asked_for() {
    for format in [Format::Split, Format::Packed] {
        let rules = Rules { format, notifications: Notifications::EventIdx, ..Rules::default() };
        let world = World::new(Kind::Flat, rules, SIZE, 0);
        let (used_event, avail_event) = (4 + 2 * usize::from(SIZE), 4 + 8 * usize::from(SIZE));
        let mut pair = Pair::new(&world);
        pair.pass(1);
        // Batches of all lengths, some times over; then once more around the wrap of a split ring's indices.
        let starts = [1, 40, 80, 120, 65_400, 65_500].into_iter().take(if format == Format::Split { 6 } else { 4 });
        for start in starts {
            pair.pass(u32::saturating_sub(start, pair.done));
            for batch in 1..=u32::from(SIZE) {
                // A split ring can be asked for anything; a packed one for an entry of this lap or the one before.
                let near = pair.done.saturating_sub(3)..pair.done + batch + 3;
                for entry in near {
                    let (start, world) = (pair.done, pair.world);
                    let passed = |entry: u32, start: u32| (start..start + batch).contains(&entry);
                    // The window moves on with every batch, so the entry does too.
                    let entry = entry.max(start.saturating_sub(3));

                    write_wish(format, &world.slices().device, avail_event, wish(format, entry));
                    pair.add(batch);
                    assert_eq!(
                        pair.driver.needs_kick(),
                        passed(entry, start),
                        "kick: {format:?} {start}+{batch}, {entry}"
                    );
                    assert!(!pair.driver.needs_kick(), "kicked twice");

                    write_wish(format, &world.slices().driver, used_event, wish(format, entry));
                    pair.serve();
                    let told = pair.needs_notification();
                    assert_eq!(told, passed(entry, start), "interrupt: {format:?} {start}+{batch}, {entry}");
                    assert!(!pair.needs_notification(), "told twice");
                    pair.take();
                }
            }
        }
    }
}

/// By flags: as the flag says, whatever was before.
#[test]
fn told_by_flags() {
    for (format, notifications, flags, told) in [
        (Format::Split, Notifications::Flags, 0, true),
        (Format::Split, Notifications::Flags, 1, false),
        (Format::Split, Notifications::Flags, 0xfffe, true),
        (Format::Packed, Notifications::Flags, 0 << 16, true),
        (Format::Packed, Notifications::Flags, 1 << 16, false),
        // Nobody agreed on it, or it means nothing: better once too often.
        (Format::Packed, Notifications::Flags, 2 << 16 | 0x0003, true),
        (Format::Packed, Notifications::Flags, 3 << 16, true),
        (Format::Packed, Notifications::EventIdx, 0 << 16, true),
        (Format::Packed, Notifications::EventIdx, 1 << 16, false),
        (Format::Packed, Notifications::EventIdx, 3 << 16, true),
        // Bits that mean nothing.
        (Format::Packed, Notifications::EventIdx, 0xfffd << 16, false),
    ] {
        let rules = Rules { format, notifications, ..Rules::default() };
        let world = World::new(Kind::Flat, rules, SIZE, 0);
        let mut pair = Pair::new(&world);
        pair.pass(3);
        write_wish(format, &world.slices().device, 0, flags);
        write_wish(format, &world.slices().driver, 0, flags);
        pair.add(1);
        assert_eq!(pair.driver.needs_kick(), told, "kick: {format:?} {notifications:?} {flags:#x}");
        pair.serve();
        assert_eq!(pair.needs_notification(), told, "interrupt: {format:?} {notifications:?} {flags:#x}");
    }
}

/// A device that goes on after another can't know what that one told, so it tells once.
#[test]
fn told_once_after_a_change_of_device() {
    for format in [Format::Split, Format::Packed] {
        let rules = Rules { format, notifications: Notifications::EventIdx, ..Rules::default() };
        let world = World::new(Kind::Flat, rules, SIZE, 0);
        let mut pair = Pair::new(&world);
        pair.pass(3);
        // Asks for what was used by a device that ended before it told.
        write_wish(format, &world.slices().driver, 4 + 2 * usize::from(SIZE), wish(format, 3));
        pair.add(1);
        pair.serve();
        let position = pair.device.position();
        pair.device = DeviceQueue::new(rules, world.layout, position).unwrap();
        assert!(pair.needs_notification());
        assert!(!pair.needs_notification());
    }
}

/// What each half writes when it listens and when it does not, by the standard's numbers.
#[test]
fn wishes_as_they_are_written() {
    for (format, notifications) in [
        (Format::Split, Notifications::Flags),
        (Format::Split, Notifications::EventIdx),
        (Format::Packed, Notifications::Flags),
        (Format::Packed, Notifications::EventIdx),
    ] {
        let rules = Rules { format, notifications, ..Rules::default() };
        let world = World::new(Kind::Flat, rules, SIZE, 0);
        let mut pair = Pair::new(&world);
        pair.pass(11);
        let (driver, device) = (world.slices().driver, world.slices().device);
        let flags = |area: &ringfence_dma::HostSlice<'_>| match format {
            Format::Split => u32::from(area.load_u16(0, Ordering::Relaxed)),
            Format::Packed => area.load_u32(0, Ordering::Relaxed),
        };

        assert!(!pair.device.open(&world).enable_notifications().unwrap());
        assert!(!pair.driver.enable_callbacks().unwrap());
        match (format, notifications) {
            (Format::Split, Notifications::Flags) => assert_eq!((flags(&device), flags(&driver)), (0, 0)),
            (Format::Split, Notifications::EventIdx) => {
                assert_eq!(device.load_u16(4 + 8 * 8, Ordering::Relaxed), 11);
                assert_eq!(driver.load_u16(4 + 2 * 8, Ordering::Relaxed), 11);
            }
            (Format::Packed, Notifications::Flags) => assert_eq!((flags(&device), flags(&driver)), (0, 0)),
            // 11 entries are a lap and 3.
            (Format::Packed, Notifications::EventIdx) => {
                assert_eq!((flags(&device), flags(&driver)), (0x0002_0003, 0x0002_0003));
            }
        }
        pair.device.open(&world).disable_notifications().unwrap();
        pair.driver.disable_callbacks();
        match (format, notifications) {
            (Format::Split, Notifications::Flags) => assert_eq!((flags(&device), flags(&driver)), (1, 1)),
            (Format::Split, Notifications::EventIdx) => {
                // A device stays where it was; a driver asks for what is past.
                assert_eq!(device.load_u16(4 + 8 * 8, Ordering::Relaxed), 11);
                assert_eq!(driver.load_u16(4 + 2 * 8, Ordering::Relaxed), 10);
                assert_eq!((flags(&device), flags(&driver)), (0, 0), "flags mean nothing by EVENT_IDX");
            }
            (Format::Packed, _) => assert_eq!((flags(&device), flags(&driver)), (0x0001_0000, 0x0001_0000)),
        }
    }
}
