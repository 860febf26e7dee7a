//! A running disk allocates nothing: neither to map, nor to submit, nor to complete.

#[path = "driver/world.rs"]
#[expect(dead_code, reason = "the other tests use the rest of the world")]
mod world;

use ringfence_driver::blk::{Blk, BlkError, Options, Request};
use ringfence_driver::embedded::Embedded;
use ringfence_driver::policy::IommuMode;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use world::*;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: everything is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: by the caller's contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(start, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// How many allocations `work` makes.
fn allocations(work: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.with(Cell::get);
    work();
    ALLOCATIONS.with(Cell::get) - before
}

#[test]
fn a_running_disk_allocates_nothing() {
    for ring in [0, INDIRECT | EVENT_IDX, PACKED, PACKED | INDIRECT | EVENT_IDX] {
        for mapping in [Mapping::Direct, Mapping::Static, Mapping::Bounce] {
            let world = World::new();
            let mode = if mapping == Mapping::Direct { IommuMode::Off } else { IommuMode::Offer };
            let mut transport: Embedded<Disk> = world.embedded(DISK_FEATURES | ring, mode);
            world.with_mapper(mapping, |mapper| {
                let options = Options { depth: 64, segments: 8 };
                let mut disk = Blk::start(&mut transport, new_driver(mapper), options).unwrap();
                let mut driver = 0;
                for round in 0..20 {
                    let from = [world.buffer(0, 1000), world.buffer(5000, 24)];
                    driver += allocations(|| {
                        loop {
                            match disk.submit(Request::Write { sector: round, from: &from }) {
                                Ok(_) => {}
                                Err(BlkError::Busy) => break,
                                Err(error) => panic!("{error}"),
                            }
                        }
                    });
                    // The disk for testing allocates as it likes.
                    disk.notify().unwrap();
                    driver += allocations(|| while disk.poll().unwrap().is_some() {});
                }
                assert_eq!(driver, 0, "{mapping:?}, ring {ring:#x}");
            });
        }
    }
}
