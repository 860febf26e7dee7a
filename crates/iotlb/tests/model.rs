//! The cache against a list of ranges: what it finds is right, and what was removed is gone.
#![cfg(not(loom))]

use proptest::prelude::*;
use ringfence_dma::{Access, BusAddr, Memory, Permission, Stop, Visit};
use ringfence_iotlb::{Ask, Iotlb, Options, Question, Unmapped, Wake};
use std::ptr::NonNull;
use std::sync::Arc;

struct Nobody;

impl Ask for Nobody {
    fn ask(&self, _: &[Question]) {}
}

impl Wake for Nobody {
    fn wake(&self) {}
}

/// One mapping, in the place of whatever was there.
fn update(iotlb: &Iotlb, first: u64, last: u64, host: usize, permission: Permission) {
    let target = NonNull::new(std::ptr::without_provenance_mut(host)).unwrap();
    // SAFETY: no memory at all, and what is resolved is only looked at.
    unsafe { iotlb.update(BusAddr(first), BusAddr(last), target, permission) }.unwrap().wait();
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Update { first: u64, last: u64, host: usize, permission: Permission },
    Invalidate { first: u64, last: u64 },
    Look { addr: u64 },
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Mapping {
    first: u64,
    last: u64,
    host: usize,
    permission: Permission,
}

impl Mapping {
    fn overlaps(&self, first: u64, last: u64) -> bool {
        self.first <= last && first <= self.last
    }
}

/// Places where mappings meet: page and granule borders, zero, the top of the space.
fn address() -> impl Strategy<Value = u64> {
    let place = prop_oneof![
        Just(0),
        Just(u64::MAX),
        Just(0xfef0_0000),
        Just(1 << 24),
        Just(0x800_0000_0456_0000),
        Just(1 << 60),
        Just(0xf000_0000_0000_0000)
    ];
    let offset = prop_oneof![
        -3i64..=3,
        (-20i64..=20).prop_map(|pages| pages * 4096),
        (-5i64..=5).prop_map(|pages| pages * 4096 - 1),
        (-4i64..=4).prop_map(|granules| granules << 24),
    ];
    (place, offset).prop_map(|(place, offset)| place.saturating_add_signed(offset))
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    let page = (address(), prop_oneof![Just(0), Just(12), Just(16), Just(18), Just(21), Just(24), Just(49)])
        .prop_map(|(addr, shift)| (addr >> shift << shift, (addr >> shift << shift) + ((1 << shift) - 1)));
    let any = (address(), address()).prop_map(|(a, b)| (a.min(b), a.max(b)));
    let short = (address(), 0u64..100).prop_map(|(a, more)| (a, a.saturating_add(more)));
    prop_oneof![4 => page, 2 => any, 2 => short, 1 => Just((0, u64::MAX))]
}

fn step() -> impl Strategy<Value = Step> {
    let permission = prop_oneof![
        1 => Just(Permission::ReadOnly),
        1 => Just(Permission::WriteOnly),
        4 => Just(Permission::ReadWrite)
    ];
    // A few hosts, so that the same mapping comes twice; one beyond what fits a word.
    let host = prop_oneof![Just(0x7000_0000_1000), Just(0x7000_0000_2001), Just(0x0123_4567_0000_0000)];
    prop_oneof![
        4 => (range(), host, permission)
            .prop_map(|((first, last), host, permission)| Step::Update { first, last, host, permission }),
        2 => range().prop_map(|(first, last)| Step::Invalidate { first, last }),
        4 => address().prop_map(|addr| Step::Look { addr }),
    ]
}

fn check(iotlb: &Arc<Iotlb>, model: &mut Vec<Mapping>, steps: &[Step], exact: bool) {
    let mut view = iotlb.view(Arc::new(Nobody));
    let mut look = |addr: u64, model: &[Mapping]| {
        let expected = model.iter().find(|mapping| mapping.overlaps(addr, addr));
        for access in [Access::Read, Access::Write] {
            let visit = view.visit();
            let found = visit.resolve(BusAddr(addr), usize::MAX, access, None);
            match (found, expected) {
                (Ok(slice), Some(mapping)) => {
                    assert!(mapping.permission.allows(access));
                    assert_eq!(slice.as_ptr().addr(), mapping.host.wrapping_add((addr - mapping.first) as usize));
                    let rest = ((mapping.last - addr) as usize).saturating_add(1);
                    assert_eq!(slice.len(), rest);
                }
                (Ok(slice), None) => panic!("{addr:#x} is at {:p} and should be nowhere", slice.as_ptr()),
                (Err(Stop::Miss(_)), Some(mapping)) => assert!(!exact || !mapping.permission.allows(access)),
                (Err(Stop::Miss(_)), None) => {}
                (Err(Stop::Fault(fault)), _) => panic!("{fault}"),
            }
        }
    };
    for &step in steps {
        match step {
            Step::Update { first, last, host, permission } => {
                model.retain(|mapping| !mapping.overlaps(first, last));
                model.push(Mapping { first, last, host, permission });
                update(iotlb, first, last, host, permission);
                look(first, model);
                look(last, model);
            }
            Step::Invalidate { first, last } => {
                model.retain(|mapping| !mapping.overlaps(first, last));
                iotlb.invalidate(BusAddr(first), BusAddr(last)).wait();
                look(first, model);
                look(last, model);
            }
            Step::Look { addr } => look(addr, model),
        }
        for mapping in model.iter() {
            for at in [mapping.first, mapping.last, mapping.first.midpoint(mapping.last)] {
                look(at, model);
            }
            for at in [mapping.first.saturating_sub(1), mapping.last.saturating_add(1)] {
                look(at, model);
            }
        }
        let mappings = iotlb.statistics().mappings;
        if exact {
            assert_eq!(mappings, model.len() as u64);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn finds_what_a_list_of_ranges_finds(steps in prop::collection::vec(step(), 1..60)) {
        let iotlb = Iotlb::new(Unmapped::Ask(Arc::new(Nobody)), Options::default());
        check(&iotlb, &mut Vec::new(), &steps, true);
        iotlb.clear().wait();
        prop_assert_eq!((iotlb.statistics().mappings, iotlb.statistics().bytes), (0, 0));
    }

    #[test]
    fn a_small_cache_forgets_and_never_lies(steps in prop::collection::vec(step(), 1..60), capacity in 1usize..5) {
        let iotlb = Iotlb::new(Unmapped::Ask(Arc::new(Nobody)), Options { capacity, ..Options::default() });
        check(&iotlb, &mut Vec::new(), &steps, false);
        prop_assert!(iotlb.statistics().mappings <= capacity as u64);
    }
}

/// Pages from 0 on, of which `count` change.
#[derive(Clone, Copy, Debug)]
enum Change {
    /// A mapping each, all the same way from their bus addresses: whole clusters of them are rows.
    Each {
        first: usize,
        count: usize,
        distance: usize,
        permission: Permission,
    },
    /// One mapping.
    Whole {
        first: usize,
        count: usize,
        distance: usize,
        permission: Permission,
    },
    Invalidate {
        first: usize,
        count: usize,
    },
}

const PAGES: usize = 200;

fn change() -> impl Strategy<Value = Change> {
    let pages = || {
        (0..PAGES, prop_oneof![2 => Just(1), 1 => 1..PAGES, 1 => Just(64), 1 => Just(128)])
            .prop_map(|(first, count)| (first, count.min(PAGES - first)))
    };
    // Two that a row may lie at, one that lies across pages, and one of which a row is too high.
    let distance = || {
        prop_oneof![
            4 => Just(0x7000_0000_0000),
            1 => Just(0x7000_0000_1000),
            1 => Just(0x7000_0000_0800),
            1 => Just((1 << 56) - 0x40000)
        ]
    };
    let permission = || prop_oneof![1 => Just(Permission::ReadOnly), 4 => Just(Permission::ReadWrite)];
    prop_oneof![
        6 => (pages(), distance(), permission()).prop_map(|((first, count), distance, permission)| Change::Each {
            first, count, distance, permission
        }),
        1 => (pages(), distance(), permission()).prop_map(|((first, count), distance, permission)| Change::Whole {
            first, count, distance, permission
        }),
        3 => pages().prop_map(|(first, count)| Change::Invalidate { first, count }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn pages_in_rows_are_found_and_taken_away_one_by_one(changes in prop::collection::vec(change(), 1..30)) {
        let iotlb = Iotlb::new(Unmapped::Ask(Arc::new(Nobody)), Options::default());
        let mut view = iotlb.view(Arc::new(Nobody));
        // Of each page the number of its mapping, where that mapping lies, and what it allows.
        let mut model = [None::<(usize, usize, Permission)>; PAGES];
        let mut mappings = 0;
        for change in changes {
            let mut map = |first: usize, count: usize, distance: usize, permission| {
                mappings += 1;
                let pages = first..first + count;
                let gone: Vec<_> = pages.clone().filter_map(|page| model[page]).map(|(number, ..)| number).collect();
                for page in &mut model {
                    *page = page.filter(|(number, ..)| !gone.contains(number));
                }
                let (first, last) = ((pages.start << 12) as u64, (pages.end << 12) as u64 - 1);
                if distance == 0 {
                    iotlb.invalidate(BusAddr(first), BusAddr(last)).wait();
                    return;
                }
                model[pages].fill(Some((mappings, distance, permission)));
                update(&iotlb, first, last, distance + first as usize, permission);
            };
            match change {
                Change::Each { first, count, distance, permission } => {
                    (first..first + count).for_each(|page| map(page, 1, distance, permission));
                }
                Change::Whole { first, count, distance, permission } => map(first, count, distance, permission),
                Change::Invalidate { first, count } => map(first, count, 0, Permission::ReadOnly),
            }
            let visit = view.visit();
            for (page, there) in model.iter().enumerate() {
                let addr = (page << 12) + 5;
                for access in [Access::Read, Access::Write] {
                    let found = visit.resolve(BusAddr(addr as u64), 1, access, None).ok().map(|slice| slice.as_ptr().addr());
                    let expected = there.filter(|(.., permission)| permission.allows(access));
                    prop_assert_eq!(found, expected.map(|(_, distance, _)| distance + addr), "page {}", page);
                }
            }
            let numbers: std::collections::BTreeSet<_> = model.iter().flatten().map(|(number, ..)| number).collect();
            prop_assert_eq!(iotlb.statistics().mappings, numbers.len() as u64);
        }
        iotlb.clear().wait();
        prop_assert_eq!((iotlb.statistics().mappings, iotlb.statistics().bytes), (0, 0));
    }
}

/// Enough of them to rebuild the table, to fill leaves and to go around more than once; of memory that lies page by page, and
/// that does not.
#[test]
fn many_pages_come_and_go() {
    for (capacity, offset) in [(1 << 20, 0), (1 << 20, 5), (5000, 0), (5000, 5)] {
        let iotlb = Iotlb::new(Unmapped::Ask(Arc::new(Nobody)), Options { capacity, ..Options::default() });
        let mut view = iotlb.view(Arc::new(Nobody));
        let host = |page: u64| 0x1000_0000 + (page & 0x3ff_ffff_ffff) as usize + offset;
        let pages: Vec<u64> = (0..20_000u64)
            .map(|i| if i % 2 == 0 { i << 12 } else { i.wrapping_mul(0x9e37_79b9_7f4a_7c15) & !4095 })
            .collect();
        for &page in &pages {
            update(&iotlb, page, page | 0xfff, host(page), Permission::ReadWrite);
            let seen = iotlb.statistics();
            assert!(seen.mappings <= capacity as u64 && seen.bytes <= capacity as u64 * 128 + 4096, "{seen:?}");
        }
        let mut found = 0;
        for &page in &pages {
            let visit = view.visit();
            if let Ok(slice) = visit.resolve(BusAddr(page + 5), 10, Access::Write, None) {
                assert_eq!(slice.as_ptr().addr(), host(page) + 5);
                found += 1;
            }
        }
        assert_eq!(found, iotlb.statistics().mappings);
        if capacity > pages.len() {
            assert_eq!(found, pages.len() as u64);
        }
        for &page in &pages {
            iotlb.invalidate(BusAddr(page), BusAddr(page | 4095)).wait();
        }
        assert_eq!(iotlb.statistics().mappings, 0);
    }
}

/// A change in one of a few regions of 64 clusters of 64 pages.
#[derive(Clone, Copy, Debug)]
enum Crowd {
    /// One page in each of so many clusters of a region, from one on.
    Map { region: u64, first: u64, count: u64 },
    /// All of so many clusters.
    Invalidate { region: u64, first: u64, count: u64 },
}

fn crowd() -> impl Strategy<Value = Crowd> {
    let clusters = || (0..3u64, 0..64u64, prop_oneof![Just(1), 1..10u64, Just(64)]);
    prop_oneof![
        3 => clusters().prop_map(|(region, first, count)| Crowd::Map { region, first, count }),
        2 => clusters().prop_map(|(region, first, count)| Crowd::Invalidate { region, first, count }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn regions_fill_and_empty(changes in prop::collection::vec(crowd(), 1..60), capacity in prop_oneof![Just(1 << 20), 20..200usize]) {
        let iotlb = Iotlb::new(Unmapped::Ask(Arc::new(Nobody)), Options { capacity, ..Options::default() });
        let mut view = iotlb.view(Arc::new(Nobody));
        let mut model = std::collections::BTreeMap::new();
        // Elsewhere, so that slots are replaced now and then whatever the regions hold.
        let mut elsewhere = 1u64 << 40;
        for (number, change) in changes.into_iter().enumerate() {
            let page_of = |region: u64, cluster: u64| region << 24 | cluster << 18 | 0x5000;
            let map = |page: u64| {
                let host = ((number + 1) << 20) + (page & 0xf000) as usize;
                update(&iotlb, page, page | 0xfff, host, Permission::ReadWrite);
            };
            match change {
                Crowd::Map { region, first, count } => {
                    for cluster in first..(first + count).min(64) {
                        let page = page_of(region, cluster);
                        map(page);
                        model.insert(page, ((number + 1) << 20) + 0x5000);
                    }
                }
                Crowd::Invalidate { region, first, count } => {
                    let (first, last) = (region << 24 | first << 18, (region << 24 | first << 18) + (count << 18) - 1);
                    iotlb.invalidate(BusAddr(first), BusAddr(last)).wait();
                    model.retain(|&page, _| page < first || page > last);
                }
            }
            for _ in 0..number % 40 {
                map(elsewhere);
                elsewhere += 1 << 24;
            }
            iotlb.invalidate(BusAddr(1 << 40), BusAddr(u64::MAX)).wait();
            let visit = view.visit();
            let mut found = 0;
            for page in (0..3).flat_map(|region| (0..64).map(move |cluster| page_of(region, cluster))) {
                let there = visit.resolve(BusAddr(page), 1, Access::Read, None).ok().map(|slice| slice.as_ptr().addr());
                found += u64::from(there.is_some());
                // A small cache forgets, and does not lie.
                prop_assert!(there == model.get(&page).copied() || there.is_none() && capacity < 1000, "{:#x}", page);
            }
            prop_assert_eq!(found, iotlb.statistics().mappings);
            prop_assert!(found <= capacity as u64);
        }
        iotlb.clear().wait();
        prop_assert_eq!((iotlb.statistics().mappings, iotlb.statistics().bytes), (0, 0));
    }
}

/// Clusters that follow each other share what leads to them.
#[test]
fn neighbours_take_less_memory_than_strangers() {
    let bytes = |distance: u64| {
        let iotlb = Iotlb::new(Unmapped::Ask(Arc::new(Nobody)), Options::default());
        for i in 0..10_000 {
            let page = i * distance;
            update(&iotlb, page, page | 0xfff, 0x1000, Permission::ReadOnly);
        }
        iotlb.statistics().bytes / 10_000
    };
    let (pages, neighbours, strangers) = (bytes(1 << 12), bytes(1 << 18), bytes(1 << 24));
    assert!(pages * 4 < neighbours && neighbours * 3 < strangers, "{pages}, {neighbours} and {strangers} bytes a page");
}

/// Whether they are neighbours or strangers: one that is too many takes the place of a few, and not always of the same.
#[test]
fn a_full_cache_keeps_most_of_what_it_has() {
    for distance in [1 << 12, 1 << 18, 1 << 24] {
        let capacity = 4096;
        let iotlb = Iotlb::new(Unmapped::Ask(Arc::new(Nobody)), Options { capacity, ..Options::default() });
        let map = |i: u64| {
            let page = i * distance;
            update(&iotlb, page, page | 0xfff, 0x1000, Permission::ReadOnly);
        };
        (0..capacity as u64).for_each(map);
        assert_eq!(iotlb.statistics().evictions, 0);
        let mut gone = std::collections::BTreeSet::new();
        for _ in 0..20 {
            let mapped = |i: &u64| iotlb.is_mapped(BusAddr(i * distance));
            // Full again, and one more.
            let missing: Vec<u64> = (0..capacity as u64 + 1).filter(|i| !mapped(i)).collect();
            gone.extend(missing.iter().copied());
            let before = iotlb.statistics().evictions;
            missing.into_iter().for_each(map);
            let evicted = iotlb.statistics().evictions - before;
            assert!((1..=200).contains(&evicted), "{evicted} for one more");
        }
        assert!(gone.len() > 500, "the same {} each time", gone.len());
    }
}
