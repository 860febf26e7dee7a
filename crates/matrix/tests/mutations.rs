//! What becomes of the table when a part of it is broken on purpose: exactly these cells turn red, and come out so.
//!
//! Red is a cell that is not as the proposal has it, for no reason that is known; `ringfence matrix` then ends with exit
//! status 1. On arm64 nothing is ever red, as the proposal is unsure of it. Each broken part is one more implementation of
//! what the good one implements.

use Verdict::*;
use ringfence_dma::{Buffer, BusAddr, DmaError, Gpa, HostSlice, Mapped, Mapper, Permission};
use ringfence_driver::mapper::Direct;
use ringfence_iommu::{Domain, Mapping};
use ringfence_matrix::{ALL, Area, Bus, Case, DriverKind, Genuine, Matrix, PAGE, Parts, Select, Verdict, World};
use ringfence_policy::{Allow, DriverPolicy, IommuMode, Platform, Reach};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

/// A part that is broken, and the cells that turn red.
struct Mutation {
    what: &'static str,
    parts: &'static dyn Parts,
    red: &'static [(&'static str, Verdict)],
}

const MUTATIONS: &[Mutation] = &[
    Mutation {
        what: "the device ignores the IOMMU",
        parts: &BusOf { on: IOMMU, bus: |world| Bus::plain(&world.machine, &world.trace) },
        red: &[
            ("platform=x86-iommu|ppc-today driver=old device=new-emulated|old-physical|new-physical", Bypasses),
            ("platform=ppc-proposed driver=old device=old-physical|new-physical", Bypasses),
            ("platform=ppc-proposed driver!=old device=old-physical", Bypasses),
            ("platform=ppc-today driver=new device=old-physical", Bypasses),
            ("platform=ppc-today driver=new|refusing device=new-*", FailsSilently),
            ("platform=ppc-today driver=allowing device=old-physical|new-*", FailsSilently),
            ("platform=x86-iommu driver=new|allowing device=old-physical|new-*", Corrupts),
            ("platform=x86-iommu driver=refusing device=new-*", Corrupts),
        ],
    },
    Mutation {
        what: "the device ignores the grant table, and takes every address for one of the guest's",
        parts: &BusOf { on: GRANTS, bus: |world| Bus::foreign(&world.machine, &world.trace) },
        red: &[
            ("platform=xen-grants driver!=old device=new-emulated*", FailsSilently),
            ("platform=xen-grants driver=old device=new-emulated", Bypasses),
        ],
    },
    Mutation {
        what: "the device takes the reference to a grant for the number of a frame",
        parts: &BusOf { on: GRANTS, bus: references_are_frames },
        red: &[
            ("platform=xen-grants driver!=old device=new-emulated*", Corrupts),
            ("platform=xen-grants driver=old device=new-emulated", FailsSilently),
        ],
    },
    Mutation {
        what: "the device does not refuse where the flag is required",
        parts: &Lax,
        red: &[
            ("platform=x86 driver=old device=new-emulated-requiring", WorksUntranslated),
            ("platform=x86-iommu|xen-grants driver=old device=new-emulated-requiring", FailsCleanly),
            ("platform=xen driver=old device=new-emulated-requiring", Corrupts),
        ],
    },
    Mutation {
        what: "the device does not offer the flag",
        parts: &Mute,
        red: &[
            ("platform=x86-iommu driver=old device=new-emulated*", FailsCleanly),
            ("platform=xen-grants driver=old|allowing device=new-emulated*", FailsCleanly),
            ("platform=xen-grants driver=new device=new-physical", FailsCleanly),
            ("platform=ppc-proposed driver!=old device=new-physical", FailsCleanly),
            ("platform=ppc-today driver=new device=new-*", FailsCleanly),
            ("platform=x86-iommu|xen|xen-grants driver=refusing device=new-*", RefusedByDriver),
            ("platform=ppc-today driver=refusing device=new-emulated*", RefusedByDriver),
            ("platform=x86 driver=old device=new-emulated*", WorksUntranslated),
            ("platform=x86 driver!=old device=new-*", WorksUntranslated),
            ("platform=x86-iommu driver=new|allowing device=new-*", WorksTranslated),
            ("platform=xen-grants driver=new device=new-emulated*", WorksTranslated),
            ("platform=xen driver=new|allowing device=new-*", WorksUnconfined),
            ("platform=xen driver=old device=new-emulated*", Corrupts),
            ("platform=xen-grants driver=allowing device=new-physical", Bypasses),
        ],
    },
    Mutation {
        what: "the driver does not take the flag",
        parts: &PolicyOf(|_, _| DriverPolicy::Old),
        red: &[
            ("platform=x86-iommu driver!=old device=new-emulated|old-physical|new-physical", FailsCleanly),
            ("platform=xen-grants driver!=old device=new-emulated", FailsCleanly),
            ("platform=ppc-proposed driver!=old device=new-physical", FailsCleanly),
            ("platform=ppc-today driver!=old device=new-emulated|new-physical", FailsCleanly),
            (
                "platform=x86|x86-iommu|xen|xen-grants|ppc-today driver!=old device=new-emulated-requiring",
                RefusedByDevice,
            ),
            ("platform=x86 driver!=old device=new-emulated|new-physical", WorksUntranslated),
            ("platform=x86-iommu driver=new|refusing device=old-emulated", Bypasses),
            ("platform=xen-grants driver=new|refusing device=old-emulated|old-physical|new-physical", Bypasses),
            ("platform=xen-grants driver=allowing device=new-physical", Bypasses),
            ("platform=xen driver=new device=old-emulated|new-emulated|new-physical", Corrupts),
            ("platform=xen driver=refusing device=old-emulated|new-emulated|old-physical|new-physical", Corrupts),
            ("platform=xen driver=allowing device=new-emulated|new-physical", Corrupts),
        ],
    },
    Mutation {
        what: "the driver does not refuse a device without the flag",
        parts: &PolicyOf(|case, _| match case.driver {
            DriverKind::Old => DriverPolicy::Old,
            _ => DriverPolicy::New,
        }),
        red: &[
            ("platform=x86-iommu driver=refusing device=old-emulated", Corrupts),
            ("platform=x86-iommu driver=refusing device=old-physical", WorksTranslated),
            ("platform=xen driver=refusing device=old-*", WorksUnconfined),
            ("platform=xen-grants driver=refusing|allowing device=old-physical", FailsCleanly),
            ("platform=xen-grants driver=refusing device=old-emulated", FailsSilently),
        ],
    },
    Mutation {
        what: "the driver forgets its allow-list",
        parts: &PolicyOf(|case, _| Genuine.policy(case, &[])),
        red: &[
            ("platform=x86-iommu|xen-grants driver=allowing device=old-physical", RefusedByDriver),
            ("platform=ppc-today driver=allowing device=old-emulated", RefusedByDriver),
        ],
    },
    Mutation {
        what: "the driver skips the DMA API",
        parts: &OwnAddresses { on: |platform| platform != Platform::Xen },
        red: &[
            ("platform=x86-iommu driver=new|allowing device=old-physical|new-*", FailsCleanly),
            ("platform=x86-iommu driver=refusing device=new-*", FailsCleanly),
            ("platform=xen-grants driver!=old device=new-emulated*", FailsCleanly),
            ("platform=ppc-today driver!=old device=new-*", FailsCleanly),
            ("platform=x86-iommu driver=new device=old-emulated", Bypasses),
            ("platform=xen-grants driver=new device=old-emulated|old-physical|new-physical", Bypasses),
            ("platform=xen-grants driver=refusing|allowing device=new-physical", Bypasses),
        ],
    },
    Mutation {
        what: "Xen's DMA API does not translate",
        parts: &OwnAddresses { on: |platform| platform == Platform::Xen },
        red: &[
            ("platform=xen driver=new device=old-emulated|new-*", Corrupts),
            ("platform=xen driver=refusing|allowing device=new-*", Corrupts),
        ],
    },
    Mutation {
        what: "the bounce pool does not give back what the device wrote",
        parts: &DmaApi { on: &[Platform::Xen], lent: |asked| asked, back: |_| Some(Permission::ReadOnly) },
        red: &[
            ("platform=xen driver=new device=old-emulated|new-*", Corrupts),
            ("platform=xen driver=refusing|allowing device=new-*", Corrupts),
        ],
    },
    Mutation {
        what: "the IOMMU's driver lends everything for writing",
        parts: &DmaApi { on: IOMMU, lent: |_| Permission::ReadWrite, back: |_| Some(Permission::ReadWrite) },
        red: &[
            ("platform=x86-iommu driver=new device=old-physical|new-*", WorksUnconfined),
            ("platform=x86-iommu driver=refusing device=new-*", WorksUnconfined),
            ("platform=x86-iommu driver=allowing device=new-emulated*|old-physical", WorksUnconfined),
            ("platform=ppc-today driver=new|refusing device=new-*", WorksUnconfined),
            ("platform=ppc-today driver=allowing device=old-physical|new-*", WorksUnconfined),
        ],
    },
    Mutation {
        what: "the IOMMU's driver does not take mappings away",
        parts: &DmaApi { on: IOMMU, lent: |asked| asked, back: |_| None },
        red: &[
            ("platform=x86-iommu driver=new device=old-physical|new-*", WorksUnconfined),
            ("platform=x86-iommu driver=refusing device=new-*", WorksUnconfined),
            ("platform=x86-iommu driver=allowing device=new-emulated*|old-physical", WorksUnconfined),
            ("platform=ppc-today driver=new|refusing device=new-*", WorksUnconfined),
            ("platform=ppc-today driver=allowing device=old-physical|new-*", WorksUnconfined),
        ],
    },
    Mutation {
        what: "every grant is one for writing",
        parts: &DmaApi { on: GRANTS, lent: |_| Permission::ReadWrite, back: |_| Some(Permission::ReadWrite) },
        red: &[("platform=xen-grants driver!=old device=new-emulated*", WorksUnconfined)],
    },
    Mutation {
        what: "grants are not revoked",
        parts: &DmaApi { on: GRANTS, lent: |asked| asked, back: |_| None },
        red: &[("platform=xen-grants driver!=old device=new-emulated*", WorksUnconfined)],
    },
];

const IOMMU: &[Platform] = &[Platform::X86Iommu, Platform::PpcProposed, Platform::PpcToday, Platform::Arm64Smmu];
const GRANTS: &[Platform] = &[Platform::XenGrants];

#[test]
fn each_turns_these_cells_red_and_no_others() {
    let mut wrong = String::new();
    // A back-end on a socket for each cell of each of these would take its time.
    let others: Select = "device!=new-wrapped".parse().unwrap();
    for Mutation { what, parts, red } in MUTATIONS {
        let mut expected = BTreeMap::new();
        for &(select, verdict) in *red {
            let select: Select = select.parse().unwrap();
            let cells = Case::all().into_iter().filter(|case| select.matches(case) && others.matches(case));
            expected.extend(cells.map(|case| (case.to_string(), verdict)));
        }
        let matrix = Matrix::run(&others, *parts);
        let seen: BTreeMap<_, _> = matrix.unexpected().map(|cell| (cell.case.to_string(), cell.observed)).collect();
        for (case, verdict) in seen.iter().filter(|&(case, verdict)| expected.get(case) != Some(verdict)) {
            writeln!(wrong, "{what}: {case} turns red: {verdict:?}").unwrap();
        }
        for case in expected.keys().filter(|&case| !seen.contains_key(case)) {
            writeln!(wrong, "{what}: {case} does not turn red").unwrap();
        }
        assert!(!seen.is_empty(), "{what}: nobody notices");
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// What stands before a device reaches no memory but by the way that every device has.
#[test]
fn a_wrapped_device_is_caught_as_others_are() {
    let select = "device=new-wrapped platform=x86-iommu driver=new".parse().unwrap();
    let mutations: [(&dyn Parts, Verdict); 3] = [
        (&BusOf { on: IOMMU, bus: |world| Bus::plain(&world.machine, &world.trace) }, Corrupts),
        (&Mute, WorksTranslated),
        (&DmaApi { on: IOMMU, lent: |asked| asked, back: |_| None }, WorksUnconfined),
    ];
    for (parts, verdict) in mutations {
        let matrix = Matrix::run(&select, parts);
        assert_eq!(matrix.cells[0].observed, verdict);
        assert_eq!(matrix.unexpected().count(), 1);
    }
}

/// Devices that ought to go through what the platform translates with, and go another way.
struct BusOf {
    on: &'static [Platform],
    bus: fn(&World) -> Bus,
}

impl Parts for BusOf {
    fn bus(&self, case: Case, world: &World) -> Bus {
        match case.device.reach(case.platform) {
            Reach::ThroughIommu if self.on.contains(&case.platform) => (self.bus)(world),
            _ => Genuine.bus(case, world),
        }
    }
}

/// As if each frame of the machine were granted, under its number.
fn references_are_frames(world: &World) -> Bus {
    let every = Domain::default();
    for frame in 0..ALL as u64 {
        let gpa = Gpa(frame * PAGE as u64);
        let addr = BusAddr(1 << 63 | gpa.0);
        every.map_at(Mapping { addr, gpa, len: PAGE as u64, permission: Permission::ReadWrite }).unwrap();
    }
    Bus::through(&Arc::new(every), &world.machine, &world.trace)
}

/// Devices that require the flag and go on without it.
struct Lax;

impl Parts for Lax {
    fn mode(&self, case: Case) -> IommuMode {
        match case.device.mode(case.platform) {
            IommuMode::Require => IommuMode::Offer,
            mode => mode,
        }
    }
}

/// Devices that keep to the IOMMU and do not say so.
struct Mute;

impl Parts for Mute {
    fn mode(&self, _: Case) -> IommuMode {
        IommuMode::Off
    }
}

/// Drivers with another policy than their own.
struct PolicyOf(for<'a> fn(Case, &'a [Allow]) -> DriverPolicy<'a>);

impl Parts for PolicyOf {
    fn policy<'a>(&self, case: Case, allowed: &'a [Allow]) -> DriverPolicy<'a> {
        self.0(case, allowed)
    }
}

/// Drivers that pass their own addresses where the DMA API's belong.
struct OwnAddresses {
    on: fn(Platform) -> bool,
}

impl Parts for OwnAddresses {
    fn dma_api<'w>(&self, case: Case, world: &'w World) -> Result<Box<dyn Mapper + 'w>, DmaError> {
        match (self.on)(case.platform) {
            true => Ok(Box::new(Direct::new(world.machine.buffer(Area::RINGS)))),
            false => Genuine.dma_api(case, world),
        }
    }
}

/// A DMA API that lends other permissions than it is asked for, or takes back other ones than it lent, or nothing.
struct DmaApi {
    on: &'static [Platform],
    lent: fn(Permission) -> Permission,
    back: fn(Permission) -> Option<Permission>,
}

impl Parts for DmaApi {
    fn dma_api<'w>(&self, case: Case, world: &'w World) -> Result<Box<dyn Mapper + 'w>, DmaError> {
        let inner = Genuine.dma_api(case, world)?;
        if !self.on.contains(&case.platform) {
            return Ok(inner);
        }
        Ok(Box::new(Altered { inner, lent: self.lent, back: self.back }))
    }
}

struct Altered<'w> {
    inner: Box<dyn Mapper + 'w>,
    lent: fn(Permission) -> Permission,
    back: fn(Permission) -> Option<Permission>,
}

impl Mapper for Altered<'_> {
    fn max_len(&self) -> usize {
        self.inner.max_len()
    }

    fn map(&self, buffer: Buffer<'_>, permission: Permission) -> Result<Mapped, DmaError> {
        self.inner.map(buffer, (self.lent)(permission))
    }

    fn unmap(&self, mapped: Mapped, buffer: Buffer<'_>, permission: Permission) {
        if let Some(permission) = (self.back)(permission) {
            self.inner.unmap(mapped, buffer, permission);
        }
    }

    fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
        self.inner.allocate(len)
    }

    fn free(&self, mapped: Mapped) {
        self.inner.free(mapped);
    }
}

#[test]
fn bytes_that_do_not_come_back_are_named() {
    let forgetful = DmaApi { on: &[Platform::Xen], lent: |asked| asked, back: |_| Some(Permission::ReadOnly) };
    let matrix = Matrix::run(&"platform=xen driver=new device=new-physical".parse().unwrap(), &forgetful);
    let [cell] = &matrix.cells[..] else { panic!("one cell") };
    assert!(cell.evidence.driver.starts_with("byte 0 of the transfer"), "{}", cell.evidence.driver);
    assert_eq!(cell.evidence.damage, [""; 0]);
}
