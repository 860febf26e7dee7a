//! What QEMU's model of an IOMMU did for the disk, from QEMU's own trace.
//!
//! It tells of an access what the device asked for and what it was given, whoever serves the disk: QEMU's own device
//! translates each access, and for a vhost-user back-end QEMU asks the model what to answer.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// The slot of the disk on the first PCI bus, by which IOMMUs know it.
pub(crate) const SLOT: u64 = 5;

/// The same as a requester id.
const REQUESTER: u64 = SLOT << 3;

/// A page that the IOMMU let the disk reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Translation {
    /// The address that the device sent.
    pub bus: u64,
    /// What it reached, in the machine's memory.
    pub machine: u64,
}

/// What was traced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IommuTrace {
    /// The different pages, in the order in which they were first reached.
    pub pages: Vec<Translation>,
    /// How many accesses or questions there were.
    pub accesses: u64,
    /// The first faults, as QEMU traced them.
    pub faults: Vec<String>,
    /// Pages that the guest told an AMD IOMMU to forget.
    pub amd_invalidations: u64,
}

/// How many faults are kept: a device that is out of order makes thousands.
const FAULTS: usize = 8;
const PAGE: u64 = 4096;

/// The largest that an IOMMU maps as one, short of all memory.
const LARGE_PAGE: u64 = 2 << 20;

impl IommuTrace {
    /// Reads QEMU's trace; an absent file is an empty one.
    pub(crate) fn read(path: &Path) -> Self {
        let mut trace = Self::default();
        let mut seen = BTreeSet::new();
        let Ok(file) = File::open(path) else { return trace };
        // A line that cannot be read ends what can be known.
        for line in BufReader::new(file).lines().map_while(Result::ok) {
            trace.learn(&line, &mut seen);
        }
        trace
    }

    fn learn(&mut self, line: &str, seen: &mut BTreeSet<Translation>) {
        let Some((event, rest)) = line.split_once(' ') else { return };
        if let Some(page) = translation(event, rest) {
            self.accesses += 1;
            if seen.insert(page) {
                self.pages.push(page);
            }
        } else if event == "amdvi_pages_inval" {
            self.amd_invalidations += 1;
        } else if is_fault(event, rest) && self.faults.len() < FAULTS {
            self.faults.push(line.to_owned());
        }
    }
}

/// For a log: every page, as far as a person may want to read them.
impl fmt::Display for IommuTrace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 64;
        let Self { pages, accesses, faults, amd_invalidations } = self;
        writeln!(f, "{} different pages in {accesses} accesses", pages.len())?;
        if *amd_invalidations > 0 {
            writeln!(f, "the guest took pages away {amd_invalidations} times")?;
        }
        pages
            .iter()
            .take(SHOWN)
            .try_for_each(|Translation { bus, machine }| writeln!(f, "{bus:#x} -> {machine:#x}"))?;
        faults.iter().try_for_each(|fault| writeln!(f, "{fault}"))
    }
}

/// The page of one line, if it is the disk's.
fn translation(event: &str, rest: &str) -> Option<Translation> {
    let (bus, machine) = match event {
        "vtd_dmar_translate" => {
            let rest = rest.strip_prefix(&format!("dev 00:{SLOT:02x}.00 iova "))?;
            let (bus, rest) = rest.split_once(" -> gpa ")?;
            let (machine, mask) = rest.split_once(" mask ")?;
            let (bus, mask) = (number(bus)?, number(mask)?);
            (bus, number(machine)? & !mask | bus & mask)
        }
        "amdvi_translation_result" | "amdvi_iotlb_hit" => {
            let (_, rest) = rest.split_once("devid")?;
            let rest = rest.trim_start_matches([':', ' ']);
            let rest = rest.strip_prefix(&format!("00:{SLOT:02x}.0 "))?;
            let (bus, machine) = rest.strip_prefix("gpa ")?.split_once(" hpa ")?;
            (number(bus)?, number(machine)?)
        }
        "virtio_iommu_translate_out" => {
            let (addresses, requester) = rest.split_once(" for sid=")?;
            let (bus, machine) = addresses.split_once(" -> ")?;
            if requester.trim().parse() != Ok(REQUESTER) {
                return None;
            }
            (number(bus)?, number(machine)?)
        }
        "smmuv3_translate_success" => {
            let field = |name: &str| number(rest.split_once(name)?.1.split(' ').next()?);
            if field(" sid=")? != REQUESTER {
                return None;
            }
            (field(" iova=")?, field(" translated=")?)
        }
        // What a function of another process is granted: with an IOMMU page by page, before that all of memory. Memory
        // begins where its file does.
        "vfio_user_dma_map" => {
            let field = |name: &str| number(rest.split_once(name)?.1.split(' ').next()?);
            if field("size ")? > LARGE_PAGE {
                return None;
            }
            (field("iova ")?, field("off ")?)
        }
        "spapr_iommu_xlate" => {
            let (window, rest) = rest.strip_prefix("liobn=")?.split_once(' ')?;
            let (offset, rest) = rest.split_once(" -> ")?;
            let (entry, rest) = rest.split_once(" perm=")?;
            let (window, offset) = (number(window)?, number(offset)?);
            let mask = number(rest.split_once("mask=")?.1)?;
            // The model sees an offset in a window of the bus; the second window begins at 2^59.
            (offset + ((window & 1) << 59), number(entry)? & !mask | offset & mask)
        }
        _ => return None,
    };
    let page = |address: u64| address & !(PAGE - 1);
    Some(Translation { bus: page(bus), machine: page(machine) })
}

/// Whether a line tells of an access by the disk that was stopped.
fn is_fault(event: &str, rest: &str) -> bool {
    match event {
        "vtd_dmar_fault" => rest.starts_with(&format!("sid {REQUESTER:#x} ")),
        "virtio_iommu_report_fault" => rest.contains(&format!("endpoint={REQUESTER} ")),
        "amdvi_page_fault" => true,
        "smmuv3_record_event" => rest.ends_with(&format!(" sid={REQUESTER:#x}")),
        _ => false,
    }
}

fn number(text: &str) -> Option<u64> {
    let text = text.trim();
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => u64::from_str_radix(text, 16).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[&str]) -> IommuTrace {
        let (mut trace, mut seen) = (IommuTrace::default(), BTreeSet::new());
        lines.iter().for_each(|line| trace.learn(line, &mut seen));
        trace
    }

    #[test]
    fn every_iommu_is_understood() {
        for (line, bus, machine) in [
            ("vtd_dmar_translate dev 00:05.00 iova 0xfffff000 -> gpa 0x6493000 mask 0xfff", 0xffff_f000, 0x649_3000),
            (
                "vtd_dmar_translate dev 00:05.00 iova 0x16801000 -> gpa 0x16800000 mask 0x1fffff",
                0x1680_1000,
                0x1680_1000,
            ),
            ("amdvi_translation_result devid: 00:05.0 gpa 0xfffff002 hpa 0x617a000", 0xffff_f000, 0x617_a000),
            ("amdvi_iotlb_hit hit iotlb devid 00:05.0 gpa 0xfffff002 hpa 0x617a000", 0xffff_f000, 0x617_a000),
            ("virtio_iommu_translate_out 0xfffff002 -> 0x2313002 for sid=40", 0xffff_f000, 0x231_3000),
            (
                "smmuv3_translate_success smmuv3-iommu-memory-region-40-1 sid=0x28 iova=0xffffd002 \
                 translated=0x43213002 perm=0x3 stage=1",
                0xffff_d000,
                0x4321_3000,
            ),
            (
                "spapr_iommu_xlate liobn=0x80000001 0x2091002 -> 0x2000000 perm=3 mask=0xffffff",
                0x800_0000_0209_1000,
                0x209_1000,
            ),
            ("spapr_iommu_xlate liobn=0x80000000 0x1000 -> 0x7000 perm=3 mask=0xfff", 0x1000, 0x7000),
        ] {
            assert_eq!(read(&[line, line]).pages, [Translation { bus, machine }], "{line}");
            assert_eq!(read(&[line, line]).accesses, 2);
        }
    }

    #[test]
    fn faults_are_kept_and_limited() {
        let fault = "virtio_iommu_report_fault FAULT reason=2 flags=1 endpoint=40 address =0x1000";
        assert_eq!(read(&[fault; 9]).faults, [fault; FAULTS]);
        assert_eq!(read(&["amdvi_pages_inval AMD-Vi pages for domain 0x2 invalidated"]).amd_invalidations, 1);
        assert_eq!(read(&["smmuv3_record_event SMMU_EVT_F_TRANSLATION sid=0x28"]).faults.len(), 1);
        assert_eq!(read(&["smmuv3_record_event SMMU_EVT_F_TRANSLATION sid=0x8"]).faults.len(), 0);
    }

    #[test]
    fn other_devices_and_other_lines_are_left_out() {
        let other = [
            "vtd_dmar_translate dev 00:1f.02 iova 0xfffff000 -> gpa 0x6493000 mask 0xfff",
            "amdvi_iotlb_hit hit iotlb devid 00:02.0 gpa 0xfffff002 hpa 0x617a000",
            "virtio_iommu_translate_out 0xfffff002 -> 0x2313002 for sid=16",
            "smmuv3_translate_success x sid=0x8 iova=0xffffd002 translated=0x43213002 perm=0x3 stage=1",
            "spapr_iommu_xlate liobn=0x80000001 cut",
            "",
        ];
        assert_eq!(read(&other), IommuTrace::default());
    }
}
