//! Real threads on real memory, for a second or two: no byte of a page moves after its fence.
#![cfg(not(loom))]

use ringfence_dma::{Access, BusAddr, Memory, Permission, Ram, Stop, Visit};
use ringfence_iotlb::{Ask, Iotlb, Options, Question, Unmapped, Wake};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

struct Nobody;

impl Ask for Nobody {
    fn ask(&self, _: &[Question]) {}
}

impl Wake for Nobody {
    fn wake(&self) {}
}

const PAGES: u64 = 64;
const PAGE: u64 = 4096;

/// Queues write all over every page that they find mapped, in visits and under leases that outlive them and end in
/// another thread. The session, after each fence, stamps the pages that it took away and looks whether the stamps stay.
/// The cache is too small for all of them, so that some are evicted on the way.
#[test]
fn a_page_is_silent_after_its_fence() {
    let ram = Ram::new((PAGES * PAGE) as usize);
    let iotlb = Iotlb::new(Unmapped::Ask(Arc::new(Nobody)), Options { capacity: 40, ..Options::default() });
    let stop = AtomicBool::new(false);
    let writes = AtomicU64::new(0);
    let page = |i: u64| ram.slice((i * PAGE) as usize, PAGE as usize);
    thread::scope(|scope| {
        let leases = elsewhere(scope);
        for queue in 0..2u64 {
            let mut view = iotlb.view(Arc::new(Nobody));
            let (stop, writes, leases) = (&stop, &writes, leases.clone());
            scope.spawn(move || {
                let mut random = queue + 1;
                while !stop.load(Ordering::Relaxed) {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let addr = BusAddr((random >> 33) % PAGES * PAGE + 0xffff_0000);
                    let visit = view.visit();
                    let Ok(slice) = visit.resolve(addr, PAGE as usize, Access::Write, None) else { continue };
                    slice.fill(queue as u8 + 1);
                    writes.fetch_add(1, Ordering::Relaxed);
                    if random >> 62 == 0 {
                        let detached = slice.detach();
                        let lease = visit.lease(&[(addr, PAGE as u32)]);
                        drop(visit);
                        let work: Box<dyn FnOnce() + Send> = Box::new(move || {
                            // SAFETY: the lease over it is held until the line after.
                            unsafe { detached.attach() }.fill(0x77);
                            drop(lease);
                        });
                        if leases.send(work).is_err() {
                            return;
                        }
                    }
                }
            });
        }
        drop(leases);
        let start = Instant::now();
        let stamp = [0xa5u8; PAGE as usize];
        let mut seen = stamp;
        let addr = |i: u64| BusAddr(0xffff_0000 + i * PAGE);
        let mut rounds = 0;
        while start.elapsed() < Duration::from_millis(1500) {
            rounds += 1;
            for i in 0..PAGES {
                let target = NonNull::new(page((i + rounds) % PAGES).as_ptr()).unwrap();
                // SAFETY: the page lives to the end of this test, and is looked at after its fence only.
                let fence =
                    unsafe { iotlb.update(addr(i), addr(i).last(PAGE).unwrap(), target, Permission::ReadWrite) };
                fence.unwrap().wait();
            }
            let before = writes.load(Ordering::Relaxed);
            while writes.load(Ordering::Relaxed) < before + 20 {
                thread::yield_now();
            }
            // One by one, by halves, at once.
            let step = [1, PAGES / 2, PAGES][(rounds % 3) as usize];
            for from in (0..PAGES).step_by(step as usize) {
                iotlb.invalidate(addr(from), addr(from + step - 1).last(PAGE).unwrap()).wait();
                for i in from..from + step {
                    page((i + rounds) % PAGES).fill(0xa5);
                }
            }
            thread::yield_now();
            for i in 0..PAGES {
                page(i).read(0, &mut seen);
                assert!(seen == stamp, "page {i} moved in round {rounds}");
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let seen = iotlb.statistics();
    assert!(seen.evictions > 0 && writes.load(Ordering::Relaxed) > 100, "{seen:?}");
}

type Work = Box<dyn FnOnce() + Send>;

/// A thread that does what I/O does: it finishes later, somewhere else.
fn elsewhere<'s>(scope: &'s thread::Scope<'s, '_>) -> std::sync::mpsc::SyncSender<Work> {
    let (send, receive) = std::sync::mpsc::sync_channel::<Work>(16);
    scope.spawn(move || receive.iter().for_each(|work| work()));
    send
}

/// Neighbours that are not removed are always found: an update or removal beside them shows nobody half a table.
#[test]
fn what_is_not_removed_is_always_found() {
    let iotlb = Iotlb::new(Unmapped::Fault, Options::default());
    let map = |first: u64, last: u64, host: u64| {
        let target = NonNull::new(std::ptr::without_provenance_mut(host as usize)).unwrap();
        // SAFETY: no memory at all, and what is resolved is only looked at.
        unsafe { iotlb.update(BusAddr(first), BusAddr(last), target, Permission::ReadWrite) }.unwrap().wait();
    };
    map(0x1000, 0x1fff, 0x1000_1000);
    map(0x1_0000_0000, 0x2_0000_0fff, 0x1_1000_0000);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut view = iotlb.view(Arc::new(Nobody));
        let stop_queue = &stop;
        scope.spawn(move || {
            while !stop_queue.load(Ordering::Relaxed) {
                for addr in [0x1008, 0x1_0000_0000, 0x2_0000_0ff0] {
                    let visit = view.visit();
                    match visit.resolve(BusAddr(addr), 1, Access::Read, None) {
                        Ok(slice) => assert_eq!(slice.as_ptr().addr(), 0x1000_0000 + addr as usize),
                        Err(Stop::Fault(fault)) => panic!("{fault}"),
                        Err(Stop::Miss(_)) => unreachable!(),
                    }
                }
            }
        });
        let start = Instant::now();
        let mut round = 0;
        while start.elapsed() < Duration::from_millis(500) {
            round += 1;
            // In the first's cluster and in new ones, so that leaves come and go and the table is rebuilt.
            for page in (2..40).chain(100_000 + round * 64 % 6_400..).step_by(3).take(200) {
                // Every other time one lies across pages in memory, for which the leaf has to become a wide one.
                let askew = if page == 20 { round % 2 } else { 0 };
                map(page * PAGE, page * PAGE + PAGE - 1, 0x1000_0000 + page * PAGE + askew);
            }
            // Now and then the first's cluster is a row, until something is taken out of it.
            for page in (0..64).filter(|&page| page != 1 && round % 4 == 0) {
                map(page * PAGE, page * PAGE + PAGE - 1, 0x1000_0000 + page * PAGE);
            }
            iotlb.invalidate(BusAddr(0x2000), BusAddr(0xffff_ffff)).wait();
        }
        stop.store(true, Ordering::Relaxed);
    });
}
