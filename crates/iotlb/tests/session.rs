//! The whole as a session and its queues use it.
#![cfg(not(loom))]

use ringfence_dma::{
    Access, BusAddr, Fault, FaultReason, Memory, Permission, Ram, Stop, Visit, copy_from_bus, copy_to_bus,
};
use ringfence_iotlb::{Ask, Fence, Iotlb, Options, Question, Refused, Replies, Stuck, Unasked, Unmapped, View, Wake};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

#[derive(Default)]
struct Frontend {
    asked: Mutex<Vec<Vec<Question>>>,
    woken: AtomicUsize,
}

impl Ask for Frontend {
    fn ask(&self, questions: &[Question]) {
        self.asked.lock().unwrap().push(questions.to_vec());
    }
}

impl Wake for Frontend {
    fn wake(&self) {
        self.woken.fetch_add(1, Ordering::Relaxed);
    }
}

impl Frontend {
    fn asked(&self) -> Vec<Vec<Question>> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }

    fn woken(&self) -> usize {
        self.woken.swap(0, Ordering::Relaxed)
    }
}

const PAGE: u64 = 4096;
const BASE: u64 = 0x800_0000_0000_0000;

struct World {
    frontend: Arc<Frontend>,
    iotlb: Arc<Iotlb>,
    view: View,
    ram: Ram,
}

impl World {
    fn new() -> World {
        World::with(Unmapped::Ask)
    }

    fn with(unmapped: impl FnOnce(Arc<dyn Ask>) -> Unmapped) -> World {
        let frontend = Arc::new(Frontend::default());
        let iotlb = Iotlb::new(unmapped(Arc::clone(&frontend) as _), Options { capacity: 512, replies: Replies::Each });
        let view = iotlb.view(Arc::clone(&frontend) as _);
        World { frontend, iotlb, view, ram: Ram::new(1 << 20) }
    }

    fn map(&self, number: u64, permission: Permission) -> Fence {
        let addr = BusAddr(BASE + number * PAGE);
        // Backwards, so that neighbours are none in memory.
        let target = self.ram.slice(((255 - number) * PAGE) as usize, PAGE as usize).as_ptr();
        // SAFETY: `ram` outlives the view.
        unsafe { self.iotlb.update(addr, addr.last(PAGE).unwrap(), NonNull::new(target).unwrap(), permission) }.unwrap()
    }

    fn unmap(&self, number: u64) -> Fence {
        self.iotlb.invalidate(BusAddr(BASE + number * PAGE), BusAddr(BASE + number * PAGE + PAGE - 1))
    }
}

fn at(number: u64) -> BusAddr {
    BusAddr(BASE + number * PAGE)
}

/// A request of three pages is one thing to wait for.
#[test]
fn who_waits_for_several_pages_is_woken_once() {
    let mut world = World::new();
    let look = |view: &mut View| {
        let visit = view.visit();
        let found = [0, 1, 2].map(|number| visit.resolve_part(at(number), 8, Access::Read, None).is_ok());
        if let Some(last) = found.iter().rposition(|found| !found) {
            visit.wait_for(at(last as u64), Access::Read);
        }
        found
    };
    assert_eq!(look(&mut world.view), [false; 3]);
    assert_eq!(world.frontend.asked().concat().len(), 3);
    for number in 0..2 {
        world.map(number, Permission::ReadWrite).wait();
        assert_eq!(world.frontend.woken(), 0, "page {number}");
    }
    world.map(2, Permission::ReadWrite).wait();
    assert_eq!(world.frontend.woken(), 1);
    assert_eq!(look(&mut world.view), [true; 3]);
    // In another order: the last is there, and then the one that is waited for instead.
    (0..3).for_each(|number| world.unmap(number).wait());
    assert_eq!(look(&mut world.view), [false; 3]);
    world.map(2, Permission::ReadWrite).wait();
    assert_eq!(world.frontend.woken(), 1);
    assert_eq!(look(&mut world.view), [false, false, true]);
    world.map(0, Permission::ReadWrite).wait();
    assert_eq!(world.frontend.woken(), 0);
    world.map(1, Permission::ReadWrite).wait();
    assert_eq!(world.frontend.woken(), 1);
    // The answer was there before anybody waited for it.
    world.unmap(0).wait();
    let visit = world.view.visit();
    assert!(visit.resolve_part(at(0), 8, Access::Read, None).is_err());
    let target = NonNull::new(world.ram.slice(255 * PAGE as usize, PAGE as usize).as_ptr()).unwrap();
    // SAFETY: as in `World::map`.
    let mapped = unsafe { world.iotlb.update(at(0), at(0).last(PAGE).unwrap(), target, Permission::ReadWrite) };
    assert!(mapped.is_ok());
    assert_eq!(world.frontend.woken(), 0);
    visit.wait_for(at(0), Access::Read);
    assert_eq!(world.frontend.woken(), 1);
}

fn fault(addr: BusAddr, access: Access, reason: FaultReason) -> Result<(), Stop> {
    Err(Stop::Fault(Fault { addr, access, reason }))
}

#[test]
fn a_mebibyte_is_asked_for_at_once_and_goes_through_once_answered() {
    let mut world = World::new();
    let from: Vec<u8> = (0..1u32 << 20).map(|i| (i ^ i >> 12) as u8).collect();
    let Err(Stop::Miss(miss)) = copy_to_bus(&world.view.visit(), at(0), &from, None) else { panic!("unmapped") };
    let asked = world.frontend.asked();
    assert_eq!(asked.len(), 1, "one batch, at the end of the visit");
    let expected: Vec<_> = (0..256).map(|i| Question { addr: at(i), access: Access::Write }).collect();
    assert_eq!(asked[0], expected);
    for i in 0..256 {
        world.map(i, Permission::ReadWrite).wait();
        world.iotlb.answered(true).unwrap();
    }
    assert_eq!(world.frontend.woken(), 1, "woken once, until it tries again");
    copy_to_bus(&world.view.visit(), at(0), &from, Some(miss.ticket)).unwrap();
    let mut into = vec![0; from.len()];
    copy_from_bus(&world.view.visit(), at(0), &mut into, None).unwrap();
    assert!(into == from);
    assert_eq!(world.iotlb.answered(true), Err(Unasked));
    let seen = world.iotlb.statistics();
    assert_eq!((seen.misses, seen.updates, seen.mappings, seen.denials), (256, 256, 256, 0));
}

#[test]
fn a_denial_faults_and_is_counted() {
    let mut world = World::new();
    let mut byte = [0];
    let Err(Stop::Miss(miss)) = copy_from_bus(&world.view.visit(), at(3), &mut byte, None) else { panic!("unmapped") };
    world.iotlb.answered(false).unwrap();
    assert_eq!(world.frontend.woken(), 1);
    let denied = copy_from_bus(&world.view.visit(), at(3), &mut byte, Some(miss.ticket));
    assert_eq!(denied, fault(at(3), Access::Read, FaultReason::Unmapped));
    assert_eq!(world.iotlb.statistics().denials, 1);
}

#[test]
fn a_permission_is_asked_for_and_raised() {
    let mut world = World::new();
    world.map(0, Permission::ReadOnly).wait();
    copy_from_bus(&world.view.visit(), at(0), &mut [0], None).unwrap();
    let Err(Stop::Miss(miss)) = copy_to_bus(&world.view.visit(), at(0), &[7], None) else { panic!("read-only") };
    assert_eq!(world.frontend.asked(), [[Question { addr: at(0), access: Access::Write }]]);
    world.map(0, Permission::ReadWrite).wait();
    world.iotlb.answered(true).unwrap();
    copy_to_bus(&world.view.visit(), at(0), &[7], Some(miss.ticket)).unwrap();
    // And lowered: what the view remembers is void.
    world.map(0, Permission::ReadOnly).wait();
    assert!(matches!(copy_to_bus(&world.view.visit(), at(0), &[7], None), Err(Stop::Miss(_))));
    assert_eq!(world.iotlb.statistics().remaps, 2);
}

#[test]
fn a_page_that_is_mapped_elsewhere_is_found_there() {
    let mut world = World::new();
    for round in 0..200 {
        let page = world.ram.slice(round * PAGE as usize, PAGE as usize);
        page.fill(round as u8);
        let target = NonNull::new(page.as_ptr()).unwrap();
        // SAFETY: `ram` outlives the view.
        let fence = unsafe { world.iotlb.update(at(0), at(0).last(PAGE).unwrap(), target, Permission::ReadOnly) };
        fence.unwrap().wait();
        let mut byte = [0];
        copy_from_bus(&world.view.visit(), BusAddr(at(0).0 + 77), &mut byte, None).unwrap();
        assert_eq!(byte, [round as u8]);
    }
}

#[test]
fn a_page_that_was_evicted_and_is_mapped_elsewhere_is_found_there() {
    let ram = Ram::new(3 * PAGE as usize);
    let frontend = Arc::new(Frontend::default());
    let options = Options { capacity: 1, replies: Replies::Each };
    let iotlb = Iotlb::new(Unmapped::Ask(Arc::clone(&frontend) as _), options);
    let mut view = iotlb.view(frontend);
    for (number, page, evictions) in [(0, 0, 0), (1, 1, 1), (0, 2, 2)] {
        let target = NonNull::new(ram.slice(page * PAGE as usize, 1).as_ptr()).unwrap();
        // SAFETY: `ram` outlives the view.
        let fence = unsafe { iotlb.update(at(number), at(number).last(PAGE).unwrap(), target, Permission::ReadOnly) };
        fence.unwrap().wait();
        let visit = view.visit();
        assert_eq!(visit.resolve(at(number), 1, Access::Read, None).unwrap().as_ptr(), target.as_ptr());
        assert_eq!(iotlb.statistics().evictions, evictions);
    }
}

#[test]
fn a_fence_waits_for_what_overlaps_and_nothing_else() {
    let mut world = World::new();
    for i in 0..4 {
        world.map(i, Permission::ReadWrite).wait();
    }
    let visit = world.view.visit();
    let one = visit.lease(&[(at(1), 10)]);
    let two_and_three = visit.lease(&[(at(2), PAGE as u32), (at(3), 1), (at(9), 0)]);
    drop(visit);
    let stuck = |mut fence: Fence| fence.wait_for(Duration::from_millis(1)).err();
    assert_eq!(stuck(world.unmap(0)), None);
    assert_eq!(stuck(world.unmap(9)), None, "a range of no bytes");
    assert_eq!(stuck(world.iotlb.invalidate(BusAddr(at(1).0 + 10), at(1).last(PAGE).unwrap())), None);
    assert_eq!(
        stuck(world.unmap(1)),
        Some(Stuck { first: at(1), last: at(1).last(PAGE).unwrap(), visits: 0, leases: 1 })
    );
    assert_eq!(stuck(world.unmap(3)).unwrap().leases, 1);
    assert_eq!(stuck(world.iotlb.clear()).unwrap().leases, 2);
    // Mapped and leased again: the older fence waits for the older lease alone.
    let mut fence = world.unmap(1);
    assert!(!fence.has_passed());
    let visit = world.view.visit();
    let again = visit.lease(&[(at(1), 10)]);
    drop((visit, one));
    assert!(fence.has_passed());
    // The view goes, and the leases are still waited for.
    let mut fence = world.iotlb.clear();
    drop(world.view);
    let mut later = world.iotlb.clear();
    drop(again);
    assert!(!fence.has_passed() && !later.has_passed());
    // By whichever thread.
    std::thread::spawn(move || drop(two_and_three)).join().unwrap();
    assert!(fence.has_passed() && later.has_passed());
    world.iotlb.clear().wait();
}

#[test]
fn a_fence_waits_for_a_visit_and_for_what_it_leases() {
    let mut world = World::new();
    world.map(0, Permission::ReadWrite).wait();
    let mut other = world.iotlb.view(Arc::clone(&world.frontend) as _);
    let visit = world.view.visit();
    let elsewhere = other.visit();
    let mut fence = world.iotlb.invalidate(at(0), at(0));
    assert_eq!(fence.wait_for(Duration::ZERO).unwrap_err().visits, 2);
    let lease = visit.lease(&[(at(0), 1)]);
    let beside = elsewhere.lease(&[(at(5), 1)]);
    drop((visit, elsewhere));
    assert_eq!(fence.wait_for(Duration::ZERO).unwrap_err().leases, 1);
    drop(lease);
    fence.wait();
    drop(beside);
}

#[test]
fn what_is_forgotten_is_asked_for_again_and_its_lease_stays() {
    let mut world = World::new();
    for i in 0..3 {
        world.map(i, Permission::ReadWrite).wait();
    }
    let visit = world.view.visit();
    visit.resolve(at(1), 1, Access::Read, None).unwrap();
    let lease = visit.lease(&[(at(1), 1)]);
    drop(visit);
    world.iotlb.forget(&[(at(0), PAGE as u32 + 1), (at(2), 0)]);
    assert_eq!((world.iotlb.statistics().mappings, world.iotlb.statistics().invalidations), (1, 0));
    assert!(copy_from_bus(&world.view.visit(), at(1), &mut [0], None).is_err());
    let mut fence = world.unmap(1);
    assert!(!fence.has_passed());
    drop(lease);
    assert!(fence.has_passed());
}

#[test]
fn a_visit_that_was_forgotten_holds_up_no_later_fence() {
    let mut world = World::new();
    std::mem::forget(world.view.visit());
    let mut fence = world.iotlb.clear();
    assert!(!fence.has_passed());
    drop(world.view.visit());
    assert!(fence.has_passed());
    std::mem::forget(world.view.visit());
    drop(world.view);
    world.iotlb.clear().wait();
}

#[test]
fn physical_memory_faults_at_once_and_is_never_evicted() {
    let mut world = World::with(|_| Unmapped::Fault);
    for i in 0..256 {
        world.map(i, if i == 7 { Permission::ReadOnly } else { Permission::ReadWrite }).wait();
    }
    copy_to_bus(&world.view.visit(), at(6), &[1; 4096], None).unwrap();
    let forbidden = copy_to_bus(&world.view.visit(), at(6), &[1; 4097], None);
    assert_eq!(forbidden, fault(at(7), Access::Write, FaultReason::Forbidden));
    let outside = copy_from_bus(&world.view.visit(), BusAddr(0), &mut [0], None);
    assert_eq!(outside, fault(BusAddr(0), Access::Read, FaultReason::Unmapped));
    let wrapping = copy_from_bus(&world.view.visit(), BusAddr(u64::MAX), &mut [0; 2], None);
    assert_eq!(wrapping, fault(BusAddr(u64::MAX), Access::Read, FaultReason::Unmapped));
    for i in 256..512 {
        let addr = BusAddr(i * PAGE);
        let target = NonNull::new(world.ram.slice(0, 4096).as_ptr()).unwrap();
        // SAFETY: `ram` outlives the view.
        unsafe { world.iotlb.update(addr, addr.last(PAGE).unwrap(), target, Permission::ReadWrite) }.unwrap().wait();
    }
    let target = NonNull::new(world.ram.slice(0, 4096).as_ptr()).unwrap();
    // SAFETY: `ram` outlives the view.
    let refused = unsafe { world.iotlb.update(BusAddr(0), BusAddr(1), target, Permission::ReadWrite) };
    assert_eq!(refused.unwrap_err(), Refused::Full { capacity: 512 });
    // SAFETY: as above.
    let refused = unsafe { world.iotlb.update(BusAddr(1), BusAddr(0), target, Permission::ReadWrite) };
    assert_eq!(refused.unwrap_err(), Refused::Backwards { first: BusAddr(1), last: BusAddr(0) });
    assert!(world.frontend.asked().is_empty());
    assert_eq!(world.iotlb.answered(true), Err(Unasked));
}

#[test]
fn a_promise_without_an_update_has_a_deadline() {
    let mut world = World::new();
    let Err(Stop::Miss(miss)) = copy_from_bus(&world.view.visit(), at(0), &mut [0], None) else { panic!("unmapped") };
    assert_eq!(world.view.take_deadline(), None);
    world.iotlb.answered(true).unwrap();
    assert_eq!(world.frontend.woken(), 1);
    assert!(copy_from_bus(&world.view.visit(), at(0), &mut [0], Some(miss.ticket)).is_err());
    assert_eq!(world.frontend.asked().len(), 1, "not asked again before then");
    let deadline = world.view.take_deadline().unwrap();
    assert_eq!(world.view.take_deadline(), None);
    std::thread::sleep(deadline.saturating_duration_since(std::time::Instant::now()));
    assert!(copy_from_bus(&world.view.visit(), at(0), &mut [0], Some(miss.ticket)).is_err());
    assert_eq!(world.frontend.asked().len(), 1, "asked again");
}

#[test]
fn views_and_fences_are_made_for_threads() {
    fn moves<T: Send + 'static>() {}
    moves::<View>();
    moves::<Fence>();
    moves::<ringfence_iotlb::Lease>();
    moves::<Arc<Iotlb>>();
}
