//! The promise, in every order of events that the memory model allows.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p ringfence-iotlb --test loom --release`
//!
//! The memory behind a mapping is a loom cell, so that loom itself finds a touch which is not ordered before what the
//! session does once its fence has passed: the strongest form of 'nothing is touched any more'.
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::Arc as LoomArc;
use loom::thread;
use ringfence_dma::{Access, BusAddr, Memory, Permission, Stop, Visit};
use ringfence_iotlb::{Ask, Iotlb, Lease, Options, Question, Replies, Unmapped, View, Wake};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const PAGE: BusAddr = BusAddr(0x5000);
const LAST: BusAddr = BusAddr(0x5fff);
const OTHER: BusAddr = BusAddr(0x9_0000);
/// Of the first's cluster, so that the three share a leaf.
const NEXT: BusAddr = BusAddr(0x6000);
const THIRD: BusAddr = BusAddr(0x7000);

/// Pieces of memory, told apart by their address, and what loom knows of each.
struct World {
    cells: [UnsafeCell<u32>; 2],
}

// SAFETY: that accesses do not race is what loom checks.
unsafe impl Sync for World {}

impl World {
    fn new() -> LoomArc<World> {
        LoomArc::new(World { cells: [UnsafeCell::new(0), UnsafeCell::new(0)] })
    }

    /// Never touched: an address that stands for a cell.
    fn target(which: usize) -> NonNull<u8> {
        NonNull::new(std::ptr::without_provenance_mut((which + 1) << 20)).unwrap()
    }

    fn which(host: *mut u8) -> usize {
        (host.addr() >> 20) - 1
    }

    /// A device reads.
    fn touch(&self, which: usize) {
        // SAFETY: loom panics on a race.
        self.cells[which].with(|cell| unsafe { *cell });
    }

    /// The memory is somebody else's by now.
    fn give_away(&self, which: usize) {
        // SAFETY: as above.
        self.cells[which].with_mut(|cell| unsafe { *cell += 1 });
    }
}

struct Nobody;

impl Ask for Nobody {
    fn ask(&self, _: &[Question]) {}
}

impl Wake for Nobody {
    fn wake(&self) {}
}

fn map(iotlb: &Iotlb, page: BusAddr, which: usize) {
    map_at(iotlb, page, World::target(which));
}

fn map_at(iotlb: &Iotlb, page: BusAddr, target: NonNull<u8>) {
    // SAFETY: the address is only told from others, see `World::touch`.
    let fence = unsafe { iotlb.update(page, page.last(4096).unwrap(), target, Permission::ReadWrite) };
    fence.unwrap().wait();
}

fn cache() -> Arc<Iotlb> {
    Iotlb::new(Unmapped::Ask(Arc::new(Nobody)), Options { capacity: 8, replies: Replies::Each })
}

fn touch(world: &World, view: &mut View, page: BusAddr) -> bool {
    let visit = view.visit();
    let Ok(slice) = visit.resolve(page, 8, Access::Read, None) else { return false };
    world.touch(World::which(slice.as_ptr()));
    true
}

/// How many times a thread may be interrupted where it could have gone on. Most bugs need one or two.
enum Interruptions {
    Any,
    AtMost(usize),
}
use Interruptions::{Any, AtMost};

fn check(interruptions: Interruptions, model: impl Fn() + Send + Sync + 'static) {
    bounded(interruptions).check(model);
}

fn bounded(interruptions: Interruptions) -> loom::model::Builder {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = match interruptions {
        Any => None,
        AtMost(times) => Some(times),
    };
    builder
}

#[test]
fn a_visit_touches_nothing_after_the_fence() {
    check(Any, || {
        let (world, iotlb) = (World::new(), cache());
        map(&iotlb, PAGE, 0);
        let mut view = iotlb.view(Arc::new(Nobody));
        let queue = thread::spawn({
            let world = LoomArc::clone(&world);
            move || {
                // The second visit may find what the first remembered.
                touch(&world, &mut view, PAGE);
                touch(&world, &mut view, PAGE);
            }
        });
        iotlb.invalidate(PAGE, LAST).wait();
        world.give_away(0);
        queue.join().unwrap();
    });
}

#[test]
fn a_lease_is_waited_for_whoever_drops_it() {
    check(Any, || {
        let (world, iotlb) = (World::new(), cache());
        map(&iotlb, PAGE, 0);
        let mut view = iotlb.view(Arc::new(Nobody));
        let queue = thread::spawn({
            let world = LoomArc::clone(&world);
            move || {
                let leased: Option<Lease> = {
                    let visit = view.visit();
                    visit.resolve(PAGE, 8, Access::Read, None).is_ok().then(|| visit.lease(&[(PAGE, 8)]))
                };
                // The view is gone and its I/O is not.
                drop(view);
                if let Some(lease) = leased {
                    world.touch(0);
                    drop(lease);
                }
            }
        });
        iotlb.invalidate(PAGE, LAST).wait();
        world.give_away(0);
        queue.join().unwrap();
    });
}

/// The page's lease comes after another in the same slot, or before.
#[test]
fn slots_that_are_used_again_hide_no_lease() {
    for order in [[OTHER, PAGE], [PAGE, OTHER]] {
        check(AtMost(3), move || {
            let (world, iotlb) = (World::new(), cache());
            map(&iotlb, PAGE, 0);
            let mut view = iotlb.view(Arc::new(Nobody));
            let queue = thread::spawn({
                let world = LoomArc::clone(&world);
                move || {
                    for page in order {
                        let visit = view.visit();
                        let found = visit.resolve(page, 8, Access::Read, None).is_ok();
                        let lease = visit.lease(&[(page, 8)]);
                        drop(visit);
                        if found {
                            world.touch(0);
                        }
                        drop(lease);
                    }
                }
            });
            iotlb.invalidate(PAGE, LAST).wait();
            world.give_away(0);
            queue.join().unwrap();
        });
    }
}

/// As above, with a lease that another thread ends while the next is taken.
#[test]
fn a_slot_that_another_thread_gave_back_hides_no_lease() {
    check(AtMost(2), || {
        let (world, iotlb) = (World::new(), cache());
        map(&iotlb, PAGE, 0);
        let mut view = iotlb.view(Arc::new(Nobody));
        let leased = {
            let visit = view.visit();
            visit.resolve(PAGE, 8, Access::Read, None).unwrap();
            visit.lease(&[(PAGE, 8)])
        };
        let storage = thread::spawn({
            let world = LoomArc::clone(&world);
            move || {
                world.touch(0);
                drop(leased);
            }
        });
        let queue = thread::spawn(move || {
            let visit = view.visit();
            let lease = visit.lease(&[(OTHER, 8)]);
            drop(visit);
            drop(lease);
        });
        iotlb.invalidate(PAGE, LAST).wait();
        world.give_away(0);
        storage.join().unwrap();
        queue.join().unwrap();
    });
}

#[test]
fn an_update_over_a_mapping_is_a_removal_too() {
    check(AtMost(3), || {
        let (world, iotlb) = (World::new(), cache());
        map(&iotlb, PAGE, 0);
        let mut view = iotlb.view(Arc::new(Nobody));
        let queue = thread::spawn({
            let world = LoomArc::clone(&world);
            move || {
                touch(&world, &mut view, PAGE);
                touch(&world, &mut view, PAGE);
            }
        });
        map(&iotlb, PAGE, 1);
        world.give_away(0);
        // And the new one goes as well.
        iotlb.invalidate(PAGE, LAST).wait();
        world.give_away(1);
        queue.join().unwrap();
    });
}

#[test]
fn a_view_that_registers_meanwhile_sees_the_removal_or_is_seen() {
    check(Any, || {
        let (world, iotlb) = (World::new(), cache());
        map(&iotlb, PAGE, 0);
        let queue = thread::spawn({
            let (world, iotlb) = (LoomArc::clone(&world), Arc::clone(&iotlb));
            move || {
                let mut view = iotlb.view(Arc::new(Nobody));
                touch(&world, &mut view, PAGE);
            }
        });
        iotlb.invalidate(PAGE, LAST).wait();
        world.give_away(0);
        queue.join().unwrap();
    });
}

#[test]
fn a_leaf_that_another_takes_the_place_of_hides_no_mapping_and_no_removal() {
    check(AtMost(4), || {
        let (world, iotlb) = (World::new(), cache());
        map(&iotlb, PAGE, 0);
        map(&iotlb, NEXT, 1);
        let mut view = iotlb.view(Arc::new(Nobody));
        let queue = thread::spawn({
            let world = LoomArc::clone(&world);
            move || {
                touch(&world, &mut view, PAGE);
                assert!(touch(&world, &mut view, NEXT), "what was never taken away");
            }
        });
        // It lies across pages in memory, and has no place in a leaf of half words.
        map_at(&iotlb, THIRD, World::target(1).map_addr(|addr| addr | 1));
        iotlb.invalidate(PAGE, LAST).wait();
        world.give_away(0);
        queue.join().unwrap();
    });
}

#[test]
fn a_row_that_comes_and_goes_hides_no_mapping_and_no_removal() {
    let mut builder = bounded(AtMost(2));
    // The cluster is filled in each of them.
    builder.max_branches = 20_000;
    builder.check(|| {
        let (world, iotlb) = (World::new(), Iotlb::new(Unmapped::Ask(Arc::new(Nobody)), Options::default()));
        let page = |at: u64| BusAddr(0x4_0000 + (at << 12));
        // All of a row's memory is the first cell's.
        let target = |at: u64| World::target(0).map_addr(|addr| addr.saturating_add((at as usize) << 12));
        (0..63).for_each(|at| map_at(&iotlb, page(at), target(at)));
        let mut view = iotlb.view(Arc::new(Nobody));
        let queue = thread::spawn({
            let world = LoomArc::clone(&world);
            move || {
                let visit = view.visit();
                assert!(visit.resolve(page(5), 8, Access::Read, None).is_ok(), "what was never taken away");
                drop(visit);
                touch(&world, &mut view, page(7));
            }
        });
        map_at(&iotlb, page(63), target(63));
        iotlb.invalidate(page(7), page(7).last(4096).unwrap()).wait();
        world.give_away(0);
        queue.join().unwrap();
    });
}

#[test]
fn an_evicted_mapping_is_fenced_like_any_other() {
    check(AtMost(3), || {
        let (world, iotlb) = (
            World::new(),
            Iotlb::new(Unmapped::Ask(Arc::new(Nobody)), Options { capacity: 1, replies: Replies::Each }),
        );
        map(&iotlb, PAGE, 0);
        let mut view = iotlb.view(Arc::new(Nobody));
        let queue = thread::spawn({
            let world = LoomArc::clone(&world);
            move || {
                touch(&world, &mut view, PAGE);
                touch(&world, &mut view, PAGE);
            }
        });
        map(&iotlb, OTHER, 1);
        assert_eq!(iotlb.statistics().evictions, 1);
        iotlb.invalidate(PAGE, LAST).wait();
        world.give_away(0);
        queue.join().unwrap();
    });
}

/// Where nothing is kept beyond its request: what the queue itself forgets, without a fence, is fenced by who takes it away
/// later, also against another queue that is using it.
#[test]
fn a_translation_that_was_used_up_is_fenced_like_any_other() {
    check(AtMost(2), || {
        let (world, iotlb) = (World::new(), cache());
        iotlb.keep(false);
        map(&iotlb, PAGE, 0);
        let queue = |mut view: View| {
            let world = LoomArc::clone(&world);
            thread::spawn(move || {
                let visit = view.visit();
                if let Ok(slice) = visit.resolve(PAGE, 8, Access::Read, None) {
                    world.touch(World::which(slice.as_ptr()));
                }
                visit.release(&[(PAGE, 8)]);
                drop(visit);
                touch(&world, &mut view, PAGE);
            })
        };
        let queues = [iotlb.view(Arc::new(Nobody)), iotlb.view(Arc::new(Nobody))].map(queue);
        iotlb.invalidate(PAGE, LAST).wait();
        world.give_away(0);
        queues.into_iter().for_each(|queue| queue.join().unwrap());
    });
}

struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Ask for Count {
    fn ask(&self, questions: &[Question]) {
        self.0.fetch_add(questions.len(), Ordering::SeqCst);
    }
}

/// A miss and its update at the same time: either the visit finds it, or the view is woken.
#[test]
fn no_answer_goes_unnoticed() {
    check(Any, || {
        let iotlb = cache();
        let woken = Arc::new(Count(AtomicUsize::new(0)));
        let mut view = iotlb.view(Arc::clone(&woken) as Arc<dyn Wake>);
        let queue = thread::spawn(move || {
            let visit = view.visit();
            let missed = matches!(visit.resolve(PAGE, 8, Access::Read, None), Err(Stop::Miss(_)));
            drop(visit);
            (view, missed)
        });
        map(&iotlb, PAGE, 0);
        let (mut view, missed) = queue.join().unwrap();
        assert_eq!(woken.0.load(Ordering::SeqCst), usize::from(missed));
        assert!(view.visit().resolve(PAGE, 8, Access::Read, None).is_ok());
    });
}

/// Two parts of something are missed, and one of them is waited for, while both are answered: whoever waits is woken, and
/// finds what he waits for.
#[test]
fn no_answer_to_a_part_goes_unnoticed() {
    check(AtMost(3), || {
        let iotlb = cache();
        let woken = Arc::new(Count(AtomicUsize::new(0)));
        let mut view = iotlb.view(Arc::clone(&woken) as Arc<dyn Wake>);
        let queue = thread::spawn(move || {
            let visit = view.visit();
            let first = visit.resolve_part(OTHER, 8, Access::Read, None).is_err();
            let last = visit.resolve_part(PAGE, 8, Access::Read, None).is_err();
            if last {
                visit.wait_for(PAGE, Access::Read);
            } else if first {
                visit.wait_for(OTHER, Access::Read);
            }
            drop(visit);
            (view, first || last)
        });
        map(&iotlb, OTHER, 1);
        map(&iotlb, PAGE, 0);
        let (mut view, missed) = queue.join().unwrap();
        assert_eq!(woken.0.load(Ordering::SeqCst), usize::from(missed));
        for page in [OTHER, PAGE] {
            assert!(view.visit().resolve(page, 8, Access::Read, None).is_ok());
        }
    });
}

/// The quick look at what was missed takes no lock: either it finds the answer, or the view is told of it.
#[test]
fn no_answer_escapes_a_quick_look() {
    for granted in [true, false] {
        check(AtMost(3), move || {
            let iotlb = cache();
            let woken = Arc::new(Count(AtomicUsize::new(0)));
            let mut view = iotlb.view(Arc::clone(&woken) as Arc<dyn Wake>);
            let verdicts = {
                let visit = view.visit();
                let verdicts = visit.verdicts();
                assert!(matches!(visit.resolve(PAGE, 8, Access::Read, None), Err(Stop::Miss(_))));
                assert!(matches!(visit.resolve(OTHER, 8, Access::Read, None), Err(Stop::Miss(_))));
                verdicts
            };
            // News of something else use up the wake-up that the misses have earned.
            map(&iotlb, OTHER, 1);
            let before = woken.0.load(Ordering::SeqCst);
            assert_eq!(before, 1);
            let queue = thread::spawn(move || {
                let found = view.visit().may_have_changed(PAGE, Access::Read, verdicts);
                (view, found)
            });
            if granted {
                map(&iotlb, PAGE, 0);
            } else {
                iotlb.answered(false).unwrap();
            }
            let (mut view, found) = queue.join().unwrap();
            assert!(found || woken.0.load(Ordering::SeqCst) > before, "neither found nor told");
            assert!(view.visit().may_have_changed(PAGE, Access::Read, verdicts));
        });
    }
}

/// A disk that is slow: what it brings is moved in a visit that looks the page up anew. Nobody waits for the disk, and
/// where the page is another's by then, the bytes go there or nowhere.
#[test]
fn what_comes_late_goes_to_where_the_page_is_then() {
    check(AtMost(3), || {
        let (world, iotlb) = (World::new(), cache());
        map(&iotlb, PAGE, 0);
        let mut view = iotlb.view(Arc::new(Nobody));
        let queue = thread::spawn({
            let world = LoomArc::clone(&world);
            move || {
                // The request starts; then its visit is over, and it holds nothing.
                let _ = view.visit().resolve(PAGE, 8, Access::Write, None).is_ok();
                touch(&world, &mut view, PAGE);
            }
        });
        iotlb.invalidate(PAGE, LAST).wait();
        world.give_away(0);
        map(&iotlb, PAGE, 1);
        iotlb.invalidate(PAGE, LAST).wait();
        world.give_away(1);
        queue.join().unwrap();
    });
}

/// A region's clusters go from their slots to a branch, and the branch goes when the last of them does; one of them is never
/// taken away, another is, and comes again.
#[test]
fn a_branch_that_comes_and_goes_hides_no_mapping_and_no_removal() {
    let cluster = |at: u64| BusAddr(at << 18 | 0x5000);
    for stays in [true, false] {
        check(AtMost(3), move || {
            let (world, iotlb) = (World::new(), cache());
            // Two clusters of a region have slots, and are all that slots are there for.
            map(&iotlb, cluster(0), 0);
            if stays {
                map(&iotlb, cluster(1), 1);
            }
            let mut view = iotlb.view(Arc::new(Nobody));
            let queue = thread::spawn({
                let world = LoomArc::clone(&world);
                move || {
                    if stays {
                        assert!(touch(&world, &mut view, cluster(1)), "what was never taken away");
                    }
                    touch(&world, &mut view, cluster(0));
                }
            });
            if !stays {
                map(&iotlb, cluster(1), 0);
            }
            // The slots are replaced.
            map(&iotlb, cluster(200), 0);
            if !stays {
                iotlb.invalidate(BusAddr(0), cluster(63)).wait();
            }
            iotlb.invalidate(cluster(0), cluster(0).last(4096).unwrap()).wait();
            world.give_away(0);
            queue.join().unwrap();
        });
    }
}
