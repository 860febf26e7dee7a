//! The whole table, and what becomes of it when something is broken on purpose.

use ringfence_dma::{Buffer, DmaError, HostSlice, Mapped, Mapper, Permission};
use ringfence_driver::mapper::Direct;
use ringfence_iommu::Strict;
use ringfence_matrix::proposal::{Agreement, Proposal};
use ringfence_matrix::report::Cell;
use ringfence_matrix::{Area, Bus, Case, Genuine, Matrix, Parts, Select, Verdict, World, XenDma};
use ringfence_policy::{IommuMode, Platform};
use std::sync::Arc;

fn run(select: &str, parts: &dyn Parts) -> Matrix {
    Matrix::run(&select.parse::<Select>().unwrap(), parts)
}

#[test]
fn every_cell() {
    let matrix = run("", &Genuine);
    insta::assert_snapshot!(matrix.to_string());
    assert_eq!(matrix.unexpected().count(), 0);
}

/// What makes 'translated' more than a word.
#[test]
fn who_works_translated_sent_other_addresses_and_was_stopped() {
    for cell in run("", &Genuine).cells.iter().filter(|cell| cell.observed == Verdict::WorksTranslated) {
        let evidence = &cell.evidence;
        assert!(!evidence.addresses.is_empty(), "{}", cell.case);
        for address in &evidence.addresses {
            assert!(address.guest.as_ref().is_some_and(|guest| *guest != address.bus), "{}: {address:?}", cell.case);
        }
        let stopped = evidence.forbidden_page.as_deref().unwrap_or_default();
        assert!(stopped.starts_with("stopped: write"), "{}: {stopped}", cell.case);
    }
}

/// A reason for a disagreement that there is not would hide the next one.
#[test]
fn every_disagreement_that_is_expected_happens() {
    for known in &Proposal::the().disagreements {
        let sentence = Proposal::the().sentences.iter().find(|sentence| sentence.id == known.sentence);
        let sentence = sentence.unwrap_or_else(|| panic!("no sentence is called '{}'", known.sentence));
        let cells = Matrix::run(&known.cells, &Genuine).cells;
        assert!(!cells.is_empty(), "{known:?}");
        for Cell { case, observed, flag, .. } in cells {
            assert!(sentence.cells.matches(&case), "{case}: '{}' is not about it", sentence.text);
            assert!(!sentence.holds(observed, flag), "{case}: '{}' holds", sentence.text);
        }
    }
}

#[test]
fn every_sentence_is_about_some_cell() {
    for sentence in &Proposal::the().sentences {
        assert!(Case::all().iter().any(|case| sentence.cells.matches(case)), "{}", sentence.text);
    }
}

/// Each cell of `select` comes out as `expected`, which is red: the proposal has it otherwise, and no reason is known.
#[track_caller]
fn turns_red(parts: &dyn Parts, select: &str, expected: Verdict) {
    let matrix = run(select, parts);
    assert!(!matrix.cells.is_empty(), "{select}");
    for cell in &matrix.cells {
        assert_eq!(cell.observed, expected, "{}: {}", cell.case, cell.reason);
        assert!(matches!(cell.agreement, Agreement::Unexpected(_)), "{}: {:?}", cell.case, cell.agreement);
    }
}

/// Devices that ignore the IOMMU.
struct Ignorant;

impl Parts for Ignorant {
    fn bus(&self, _: Case, world: &World) -> Bus {
        Bus::plain(&world.machine, &world.trace)
    }
}

#[test]
fn a_device_that_ignores_the_iommu_is_found() {
    turns_red(&Ignorant, "platform=x86-iommu driver!=old device=new-*", Verdict::Corrupts);
    turns_red(
        &Ignorant,
        "platform=x86-iommu|ppc-proposed driver=old device=old-physical|new-physical",
        Verdict::Bypasses,
    );
    // There the addresses hit nothing, and no IOMMU is there to say so.
    let ppc = run("platform=ppc-today driver=new device=new-*", &Ignorant);
    assert!(ppc.cells.iter().all(|cell| cell.observed == Verdict::FailsSilently));
}

/// Drivers that pass their own addresses where the DMA API's belong.
struct Careless;

impl Parts for Careless {
    fn dma_api<'w>(&self, _: Case, world: &'w World) -> Result<Box<dyn Mapper + 'w>, DmaError> {
        Ok(Box::new(Direct::new(world.machine.buffer(Area::RINGS))))
    }
}

#[test]
fn a_driver_that_skips_the_dma_api_is_found() {
    turns_red(&Careless, "platform=x86-iommu driver!=old device=new-*", Verdict::FailsCleanly);
}

#[test]
fn xen_without_its_translation_is_found() {
    turns_red(&Careless, "platform=xen driver!=old device=new-*", Verdict::Corrupts);
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

#[test]
fn a_device_that_does_not_refuse_is_found() {
    let old = |platform: &str| format!("platform={platform} driver=old device=new-emulated-requiring");
    turns_red(&Lax, &old("x86"), Verdict::WorksUntranslated);
    turns_red(&Lax, &old("x86-iommu"), Verdict::FailsCleanly);
    turns_red(&Lax, &old("xen"), Verdict::Corrupts);
}

/// An IOMMU's driver that lets the device do everything with what it is lent.
struct Generous;

struct EverythingAllowed<'w>(Strict<'w>);

impl Mapper for EverythingAllowed<'_> {
    fn max_len(&self) -> usize {
        self.0.max_len()
    }

    fn map(&self, buffer: Buffer<'_>, _: Permission) -> Result<Mapped, DmaError> {
        self.0.map(buffer, Permission::ReadWrite)
    }

    fn unmap(&self, mapped: Mapped, buffer: Buffer<'_>, _: Permission) {
        self.0.unmap(mapped, buffer, Permission::ReadWrite);
    }

    fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
        self.0.allocate(len)
    }

    fn free(&self, mapped: Mapped) {
        self.0.free(mapped);
    }
}

impl Parts for Generous {
    fn dma_api<'w>(&self, case: Case, world: &'w World) -> Result<Box<dyn Mapper + 'w>, DmaError> {
        assert_eq!(case.platform, Platform::X86Iommu);
        let domain = world.domain.as_ref().expect("a platform with an IOMMU");
        Ok(Box::new(EverythingAllowed(Strict::new(Arc::clone(domain), world.machine.buffer(Area::RINGS)))))
    }
}

#[test]
fn translation_without_protection_is_found() {
    turns_red(&Generous, "platform=x86-iommu driver=new|refusing device=new-*", Verdict::WorksUnconfined);
}

/// A bounce pool that never copies back what the device wrote.
struct Forgetful;

struct NothingBack<'w>(XenDma<'w>);

impl Mapper for NothingBack<'_> {
    fn max_len(&self) -> usize {
        self.0.max_len()
    }

    fn map(&self, buffer: Buffer<'_>, permission: Permission) -> Result<Mapped, DmaError> {
        self.0.map(buffer, permission)
    }

    fn unmap(&self, mapped: Mapped, buffer: Buffer<'_>, _: Permission) {
        self.0.unmap(mapped, buffer, Permission::ReadOnly);
    }

    fn allocate(&self, len: usize) -> Result<(Mapped, HostSlice<'_>), DmaError> {
        self.0.allocate(len)
    }

    fn free(&self, mapped: Mapped) {
        self.0.free(mapped);
    }
}

impl Parts for Forgetful {
    fn dma_api<'w>(&self, case: Case, world: &'w World) -> Result<Box<dyn Mapper + 'w>, DmaError> {
        assert_eq!(case.platform, Platform::Xen);
        Ok(Box::new(NothingBack(XenDma::new(&world.frames, world.machine.buffer(Area::BOUNCE))?)))
    }
}

#[test]
fn bytes_that_do_not_come_back_are_found() {
    turns_red(&Forgetful, "platform=xen driver!=old device=new-*", Verdict::Corrupts);
    let cell = &run("platform=xen driver=new device=new-physical", &Forgetful).cells[0];
    assert!(cell.evidence.driver.starts_with("byte 0 of the transfer"), "{}", cell.evidence.driver);
    assert_eq!(cell.evidence.damage, [""; 0]);
}
