//! Lookups, insertions and removals, beside those of vm-memory's `Iotlb`, in one run.
//!
//! `cargo bench -p ringfence-iotlb`. Compare the two of a line, not the machines. An update or an invalidation of ours
//! takes a lock and a full barrier, which alone are most of its time in a small table; vm-memory's leaves locking to its
//! user, and is measured without.

use divan::Bencher;
use divan::counter::ItemsCount;
use ringfence_dma::{Access, BusAddr, Memory, Permission, Visit};
use ringfence_iotlb::{Ask, Iotlb, Options, Question, Unmapped, Wake};
use std::hint::black_box;
use std::ptr::NonNull;
use std::sync::Arc;
use vm_memory::{GuestAddress, Permissions};

fn main() {
    for layout in [Layout::Dense, Layout::Straight, Layout::Scattered] {
        let bytes = COUNTS.map(|count| {
            let table = Ringfence::filled(layout, count);
            format!("{:.1} for {count}", table.0.statistics().bytes as f64 / count as f64)
        });
        println!("bytes a mapping, {layout:?}: {}", bytes.join(", "));
    }
    divan::main();
}

/// How many pages of 4 KiB are mapped; powers of two.
const COUNTS: [u64; 5] = [1, 64, 2048, 1 << 16, 1 << 20];
/// Enough for a clock.
const MANY: [u64; 4] = [64, 2048, 1 << 16, 1 << 20];

/// Where the i-th page is mapped.
#[derive(Clone, Copy, Debug)]
enum Layout {
    /// One after the other, as Linux gives them out.
    Dense,
    /// One after the other, and their memory too.
    Straight,
    /// Anywhere: the worst case.
    Scattered,
}

impl Layout {
    fn page(self, i: u64) -> u64 {
        match self {
            Layout::Dense | Layout::Straight => 0xf000_0000_0000 + i * PAGE,
            Layout::Scattered => (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) & !(PAGE - 1),
        }
    }

    /// Where in memory the i-th of `count` pages is.
    fn host(self, i: u64, count: u64) -> u64 {
        let place = match self {
            Layout::Straight => i,
            // Neighbours in bus addresses are none there.
            Layout::Dense | Layout::Scattered => (i * 7) % count * 2,
        };
        0x10_0000_0000 + place * PAGE
    }
}

const PAGE: u64 = 4096;

/// How many at a time: with fewer, what is measured is how the caches warm up.
const LOOKUPS: u32 = 25_000;

/// One of the two that are compared.
trait Table: Sized {
    fn empty() -> Self;
    fn insert(&mut self, page: u64, host: u64);
    fn remove(&mut self, page: u64);
    /// Measures looking up the addresses that `next` gives, in a table that does not change.
    fn look_up(&mut self, bencher: Bencher<'_, '_>, next: impl FnMut() -> u64);

    fn fill(&mut self, layout: Layout, count: u64) {
        (0..count).for_each(|i| self.insert(layout.page(i), layout.host(i, count)));
    }

    fn filled(layout: Layout, count: u64) -> Self {
        let mut table = Self::empty();
        table.fill(layout, count);
        table
    }
}

struct Ringfence(Arc<Iotlb>);

struct Nobody;

impl Ask for Nobody {
    fn ask(&self, questions: &[Question]) {
        panic!("all is mapped, and yet {questions:?}");
    }
}

impl Wake for Nobody {
    fn wake(&self) {}
}

impl Table for Ringfence {
    fn empty() -> Self {
        Self(Iotlb::new(Unmapped::Ask(Arc::new(Nobody)), Options::default()))
    }

    fn insert(&mut self, page: u64, host: u64) {
        let page = BusAddr(page);
        let target = NonNull::new(std::ptr::without_provenance_mut(host as usize)).unwrap();
        let last = page.last(PAGE).unwrap();
        // SAFETY: not memory at all, and nothing touches it: what is resolved is only looked at.
        unsafe { self.0.update(page, last, target, Permission::ReadWrite) }.unwrap().wait();
    }

    fn remove(&mut self, page: u64) {
        let page = BusAddr(page);
        self.0.invalidate(page, page.last(PAGE).unwrap()).wait();
    }

    fn look_up(&mut self, bencher: Bencher<'_, '_>, mut next: impl FnMut() -> u64) {
        let mut view = self.0.view(Arc::new(Nobody));
        let visit = view.visit();
        bencher.bench_local(|| {
            black_box(visit.resolve(BusAddr(next()), 8, Access::Read, None).unwrap());
        });
    }
}

struct VmMemory(vm_memory::Iotlb);

impl Table for VmMemory {
    fn empty() -> Self {
        Self(vm_memory::Iotlb::new())
    }

    fn insert(&mut self, page: u64, host: u64) {
        let (page, host) = (GuestAddress(page), GuestAddress(host));
        self.0.set_mapping(page, host, PAGE as usize, Permissions::ReadWrite).unwrap();
    }

    fn remove(&mut self, page: u64) {
        self.0.invalidate_mapping(GuestAddress(page), PAGE as usize);
    }

    fn look_up(&mut self, bencher: Bencher<'_, '_>, mut next: impl FnMut() -> u64) {
        bencher.bench_local(|| {
            black_box(vm_memory::Iotlb::lookup(&self.0, GuestAddress(next()), 8, Permissions::Read).unwrap().next());
        });
    }
}

/// Numbers below `count`, in no order; the same for everyone.
fn random(count: u64) -> impl FnMut() -> u64 {
    let mut state = 0x1234_5678_9abc_def1_u64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state & (count - 1)
    }
}

/// One lookup of 8 bytes anywhere in all that is mapped.
#[divan::bench(types = [Ringfence, VmMemory], args = COUNTS, sample_count = 40, sample_size = LOOKUPS)]
fn lookup_dense<T: Table>(bencher: Bencher<'_, '_>, count: u64) {
    lookup::<T>(bencher, Layout::Dense, count);
}

#[divan::bench(types = [Ringfence, VmMemory], args = COUNTS, sample_count = 40, sample_size = LOOKUPS)]
fn lookup_straight<T: Table>(bencher: Bencher<'_, '_>, count: u64) {
    lookup::<T>(bencher, Layout::Straight, count);
}

#[divan::bench(types = [Ringfence, VmMemory], args = COUNTS, sample_count = 40, sample_size = LOOKUPS)]
fn lookup_scattered<T: Table>(bencher: Bencher<'_, '_>, count: u64) {
    lookup::<T>(bencher, Layout::Scattered, count);
}

fn lookup<T: Table>(bencher: Bencher<'_, '_>, layout: Layout, count: u64) {
    let mut next = random(count);
    T::filled(layout, count).look_up(bencher, || layout.page(next()) + 8);
}

/// The same, each in a visit of its own: what a turn of a queue costs that has one request.
#[divan::bench(args = COUNTS, sample_count = 40, sample_size = LOOKUPS)]
fn visit_and_lookup_dense(bencher: Bencher<'_, '_>, count: u64) {
    let table = Ringfence::filled(Layout::Dense, count);
    let mut view = table.0.view(Arc::new(Nobody));
    let mut next = random(count);
    bencher.bench_local(|| {
        let visit = view.visit();
        let at = BusAddr(Layout::Dense.page(next()) + 8);
        black_box(visit.resolve(at, 8, Access::Read, None).unwrap());
    });
}

/// One mapping taken away and given again, anywhere among all that there are.
#[divan::bench(types = [Ringfence, VmMemory], args = COUNTS, sample_count = 40, sample_size = LOOKUPS)]
fn invalidate_and_insert<T: Table>(bencher: Bencher<'_, '_>, count: u64) {
    replace::<T>(bencher, Layout::Dense, count);
}

#[divan::bench(types = [Ringfence, VmMemory], args = COUNTS, sample_count = 40, sample_size = LOOKUPS)]
fn invalidate_and_insert_straight<T: Table>(bencher: Bencher<'_, '_>, count: u64) {
    replace::<T>(bencher, Layout::Straight, count);
}

fn replace<T: Table>(bencher: Bencher<'_, '_>, layout: Layout, count: u64) {
    let mut table = T::filled(layout, count);
    let mut next = random(count);
    bencher.bench_local(|| {
        let i = next();
        table.remove(layout.page(i));
        table.insert(layout.page(i), layout.host(i, count));
    });
}

/// All of them, one after the other, into a table that had as many and lost them.
#[divan::bench(types = [Ringfence, VmMemory], args = MANY, sample_size = 1, max_time = 1)]
fn insert_all<T: Table>(bencher: Bencher<'_, '_>, count: u64) {
    let table = std::cell::RefCell::new(T::filled(Layout::Dense, count));
    bencher
        .counter(ItemsCount::new(count))
        .with_inputs(|| (0..count).for_each(|i| table.borrow_mut().remove(Layout::Dense.page(i))))
        .bench_local_values(|()| table.borrow_mut().fill(Layout::Dense, count));
}

/// All of them, one after the other.
#[divan::bench(types = [Ringfence, VmMemory], args = MANY, sample_size = 1, max_time = 1)]
fn invalidate_all<T: Table>(bencher: Bencher<'_, '_>, count: u64) {
    let table = std::cell::RefCell::new(T::empty());
    bencher
        .counter(ItemsCount::new(count))
        .with_inputs(|| table.borrow_mut().fill(Layout::Dense, count))
        .bench_local_values(|()| {
            let mut table = table.borrow_mut();
            (0..count).for_each(|i| table.remove(Layout::Dense.page(i)));
        });
}
