//! Whatever a front-end updates and invalidates, the cache takes no more memory than the crate's documentation says.
#![cfg(not(loom))]

use ringfence_dma::{BusAddr, Permission};
use ringfence_iotlb::{Ask, Iotlb, Options, Question, Unmapped};
use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: everything is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        MOST.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: by the caller's contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(start, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

struct Nobody;

impl Ask for Nobody {
    fn ask(&self, _: &[Question]) {}
}

/// What the crate's documentation promises, for each of the capacity.
const AT_MOST: usize = 256;

fn scattered(i: u64) -> u64 {
    (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn update(iotlb: &Iotlb, first: u64, len: u64) {
    let last = first.saturating_add(len - 1);
    let target = NonNull::new(std::ptr::without_provenance_mut(0x1000)).unwrap();
    // SAFETY: no memory at all, and nothing looks at it.
    unsafe { iotlb.update(BusAddr(first), BusAddr(last), target, Permission::ReadWrite) }.unwrap().wait();
}

/// What is done to the cache in a round.
type Stream<'s> = &'s dyn Fn(&Iotlb, u64);

/// Bytes for each of the capacity: the most there were at any time, and those there are in the end.
fn taken(capacity: usize, stream: Stream) -> (usize, usize) {
    let before = NOW.load(Relaxed);
    MOST.store(before, Relaxed);
    let options = Options { capacity, ..Options::default() };
    let iotlb = Iotlb::new(Unmapped::Ask(Arc::new(Nobody)), options);
    for i in 0..10 * capacity as u64 {
        stream(&iotlb, i);
        assert!(iotlb.statistics().mappings <= capacity as u64);
    }
    let each = |bytes: usize| (bytes - before) / capacity;
    (each(MOST.load(Relaxed)), each(NOW.load(Relaxed)))
}

/// One test, because others would be counted with it.
#[test]
fn no_stream_of_updates_grows_the_process_without_end() {
    // The first fills its slots just so, the second hardly.
    for capacity in [1 << 12, 5_500] {
        let (half, page) = (capacity as u64 / 2, |i: u64| scattered(i) & !0xfff);
        let long = (1 << 61) / capacity as u64;
        let streams: [(&str, Stream); 8] = [
            ("pages in a row", &|iotlb, i| update(iotlb, i << 12, 4096)),
            ("pages anywhere", &|iotlb, i| update(iotlb, page(i), 4096)),
            ("pages anywhere, half of them taken away at once", &|iotlb, i| {
                update(iotlb, page(i), 4096);
                if i > half {
                    iotlb.invalidate(BusAddr(page(i)), BusAddr(page(i) | 0xfff)).wait();
                }
            }),
            ("pages anywhere, all of them taken away now and then", &|iotlb, i| {
                update(iotlb, page(i), 4096);
                if i % 100 == 99 {
                    iotlb.invalidate(BusAddr(0), BusAddr(scattered(i))).wait();
                }
            }),
            ("two pages a cluster", &|iotlb, i| update(iotlb, (scattered(i / 2) << 18) + (i % 2 * 4096), 4096)),
            ("single bytes", &|iotlb, i| update(iotlb, scattered(i), 1)),
            ("long ranges that are aligned to nothing", &|iotlb, i| update(iotlb, scattered(i) >> 2 | 1, long)),
            ("the same page, and one byte more each time", &|iotlb, i| update(iotlb, 4096, 4096 + i)),
        ];
        for (what, stream) in streams {
            let (most, end) = taken(capacity, stream);
            println!("{what}: {most} bytes for each of {capacity} at most, {end} in the end");
            assert!(most <= AT_MOST, "{what}: {most} bytes for each of {capacity}");
        }
    }
}
