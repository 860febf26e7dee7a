//! Lookups, insertions and removals, beside those of vm-memory's `Iotlb`, in one run.
//!
//! `cargo run --release -p ringfence-iotlb --example compare`. Compare the columns, not the machines. An update or an
//! invalidation of ours takes a lock and a full barrier, which alone are most of its time in a small table; vm-memory's
//! leaves locking to its user, and is measured without.

use ringfence_dma::{Access, BusAddr, Memory, Permission, Visit};
use ringfence_iotlb::{Ask, Iotlb, Options, Question, Unmapped, Wake};
use std::hint::black_box;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;
use vm_memory::{GuestAddress, Permissions};

struct Nobody;

impl Ask for Nobody {
    fn ask(&self, questions: &[Question]) {
        panic!("all is mapped, and yet {questions:?}");
    }
}

impl Wake for Nobody {
    fn wake(&self) {}
}

/// Where the i-th page is mapped.
#[derive(Clone, Copy, Debug)]
enum Layout {
    /// One after the other, as Linux gives them out.
    Dense,
    /// Anywhere: the worst case.
    Scattered,
}

impl Layout {
    fn page(self, i: u64) -> u64 {
        match self {
            Layout::Dense => 0xf000_0000_0000 + i * 4096,
            Layout::Scattered => (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) & !4095,
        }
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Many short ones, so that the best was not interrupted.
const RUNS: u32 = 50;

/// Nanoseconds each, the best of several runs.
fn time(runs: u32, each: u64, mut run: impl FnMut()) -> f64 {
    (0..runs)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_nanos() as f64 / each as f64
        })
        .fold(f64::INFINITY, f64::min)
}

/// Nanoseconds for each insertion and each removal. A handful is too short for the clock: there it is half of both.
fn fill_and_empty<T>(count: u64, on: &mut T, fill: impl Fn(&mut T), empty: impl Fn(&mut T)) -> (f64, f64) {
    if count < 64 {
        let pair = time(20, 10_000 * count, || {
            for _ in 0..10_000 {
                fill(on);
                empty(on);
            }
        });
        return (pair / 2.0, pair / 2.0);
    }
    let mut best = (f64::INFINITY, f64::INFINITY);
    for _ in 0..if count > 100_000 { 1 } else { 10 } {
        best.0 = best.0.min(time(1, count, || fill(on)));
        best.1 = best.1.min(time(1, count, || empty(on)));
    }
    best
}

struct Figures {
    lookup: f64,
    insert: f64,
    invalidate: f64,
}

fn ours(layout: Layout, count: u64, lookups: u64) -> (Figures, f64, f64) {
    let iotlb = Iotlb::new(Unmapped::Ask(Arc::new(Nobody)), Options::default());
    let mut view = iotlb.view(Arc::new(Nobody));
    let fill = || {
        for i in 0..count {
            let page = BusAddr(layout.page(i));
            // Far from the last: neighbours in bus addresses are none in memory.
            let host = 0x10_0000_0000 + (i * 7) % count * 8192;
            let target = NonNull::new(std::ptr::without_provenance_mut(host as usize)).unwrap();
            let last = page.last(4096).unwrap();
            // SAFETY: not memory at all, and nothing touches it: what is resolved is only looked at.
            unsafe { iotlb.update(page, last, target, Permission::ReadWrite) }.unwrap().wait();
        }
    };
    let empty = || {
        for i in 0..count {
            let page = BusAddr(layout.page(i));
            iotlb.invalidate(page, page.last(4096).unwrap()).wait();
        }
    };
    let (insert, invalidate) = fill_and_empty(count, &mut (), |_| fill(), |_| empty());
    fill();
    let bytes = iotlb.statistics().bytes as f64 / count as f64;
    let random_addresses = |seed| {
        let mut random = Random(seed);
        move || BusAddr(layout.page(random.next() & (count - 1)) + 8)
    };
    let mut next = random_addresses(99);
    let lookup = time(RUNS, lookups, || {
        let visit = view.visit();
        for _ in 0..lookups {
            black_box(visit.resolve(next(), 8, Access::Read, None).unwrap());
        }
    });
    let mut next = random_addresses(98);
    let visits = time(RUNS, lookups, || {
        for _ in 0..lookups {
            let visit = view.visit();
            black_box(visit.resolve(next(), 8, Access::Read, None).unwrap());
        }
    });
    (Figures { lookup, insert, invalidate }, visits, bytes)
}

fn vm_memorys(layout: Layout, count: u64, lookups: u64) -> Figures {
    let mut iotlb = vm_memory::Iotlb::new();
    let fill = |iotlb: &mut vm_memory::Iotlb| {
        for i in 0..count {
            let target = GuestAddress(0x10_0000_0000 + (i * 7) % count * 8192);
            iotlb.set_mapping(GuestAddress(layout.page(i)), target, 4096, Permissions::ReadWrite).unwrap();
        }
    };
    let empty = |iotlb: &mut vm_memory::Iotlb| {
        for i in 0..count {
            iotlb.invalidate_mapping(GuestAddress(layout.page(i)), 4096);
        }
    };
    let (insert, invalidate) = fill_and_empty(count, &mut iotlb, fill, empty);
    fill(&mut iotlb);
    let mut random = Random(99);
    let lookup = time(RUNS, lookups, || {
        for _ in 0..lookups {
            let addr = GuestAddress(layout.page(random.next() & (count - 1)) + 8);
            black_box(vm_memory::Iotlb::lookup(&iotlb, addr, 8, Permissions::Read).unwrap().next());
        }
    });
    Figures { lookup, insert, invalidate }
}

fn main() {
    println!("nanoseconds each: Ringfence | vm-memory | how many times as fast\n");
    for layout in [Layout::Dense, Layout::Scattered] {
        println!(
            "{:<10}{:>8} {:>22} {:>12} {:>22} {:>22} {:>10}",
            format!("{layout:?}"),
            "mappings",
            "random lookup",
            "visit each",
            "insert",
            "invalidate",
            "bytes each"
        );
        for count in [1, 64, 2048, 1 << 16, 1 << 20] {
            let lookups = 50_000;
            let (a, visits, bytes) = ours(layout, count, lookups);
            let b = vm_memorys(layout, count, lookups / if count > 100_000 { 2 } else { 1 });
            let versus = |a: f64, b: f64| format!("{a:.1} | {b:.0} | {:.1}", b / a);
            println!(
                "{:<10}{count:>8} {:>22} {visits:>12.1} {:>22} {:>22} {bytes:>10.1}",
                "",
                versus(a.lookup, b.lookup),
                versus(a.insert, b.insert),
                versus(a.invalidate, b.invalidate)
            );
        }
        println!();
    }
}
