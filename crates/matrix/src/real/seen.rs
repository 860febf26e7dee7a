//! What was seen of a real cell.

use std::time::Duration;

use ringfence_guests::{Guest, ImageState, IommuTrace, Outcome, Platform, Ring, Translation};
use ringfence_policy::IommuMode;

use crate::world::Flag;

/// Everything that was seen of a guest and its disk.
#[derive(Debug)]
pub(crate) struct Seen {
    /// Where.
    pub(crate) platform: &'static Platform,
    /// The boot.
    pub(crate) outcome: Outcome,
    /// What the image held in the end.
    pub(crate) image: ImageState,
    /// SHA-256 of the disk as the guest finds it.
    pub(crate) initial: String,
    /// SHA-256 of the disk as it leaves it.
    pub(crate) expected: String,
    /// What `ringfence serve blk` or `ringfence wrap` logged, where it serves.
    pub(crate) server: Option<Server>,
    /// The files that the back-end which knows no flag shared with others while its guest ran, as the kernel calls them.
    pub(crate) back_end_memory: Option<Vec<String>>,
}

/// What our server said and did.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    /// Whether the last front-end took the flag, if one got so far.
    pub(crate) flag: Option<bool>,
    /// Its reason for turning the front-end away.
    pub(crate) refusal: Option<String>,
    /// What it counted in the last connection.
    pub(crate) counts: Option<Counts>,
    /// Where the last driver put its ring, if it says so: a function of its own, of which QEMU knows no ring.
    pub(crate) ring: Option<Ring>,
    /// Warnings and errors, a line each.
    pub(crate) complaints: Vec<String>,
    /// After a refusal: whether it takes the next front-end.
    pub(crate) serves_on: bool,
    /// How it ended when it was told to.
    pub(crate) end: Result<(), String>,
}

/// The counts in the server's line on a connection's end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) misses: u64,
    pub(crate) updates: u64,
    pub(crate) invalidations: u64,
    pub(crate) faults: u64,
}

/// What a device's addresses were to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Addresses {
    /// The guest's own.
    Own,
    /// Others, which something turned into the right ones, and only the pages that were lent.
    Translated,
    /// Others, by an offset that is always the same or that nothing confines: all of memory is in reach.
    Shifted,
    /// None was seen.
    Unknown,
}

impl Seen {
    pub(crate) fn guest(&self) -> &Guest {
        self.outcome.so_far()
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.outcome.elapsed
    }

    pub(crate) fn iommu(&self) -> &IommuTrace {
        &self.outcome.iommu
    }

    pub(crate) fn ring(&self) -> Option<Ring> {
        let known = self.outcome.virtio.as_ref().and_then(|virtio| virtio.ring);
        known.or_else(|| self.server.as_ref()?.ring)
    }

    /// What became of the flag: offered as QEMU knows it; taken as the guest knows it, else as QEMU or our server does.
    pub(crate) fn flag(&self) -> Flag {
        let virtio = self.outcome.virtio.as_ref();
        let named = |names: &[String]| names.iter().any(|name| FLAG_NAMES.contains(&&**name));
        let taken = match &self.guest().features {
            Some(features) => features.has(flag_bit()),
            None => {
                let served = self.server.as_ref().and_then(|server| server.flag);
                virtio.is_some_and(|virtio| named(&virtio.taken)) || served == Some(true)
            }
        };
        match (virtio.is_some_and(|virtio| named(&virtio.offered)), taken) {
            (_, true) => Flag::Taken,
            (true, false) => Flag::NotTaken,
            (false, false) => Flag::NotOffered,
        }
    }

    /// Pages of memory that the IOMMU let the device reach. Where it writes an interrupt is no memory.
    pub(crate) fn pages(&self) -> impl Iterator<Item = Translation> {
        let ram = self.platform.ram();
        self.iommu().pages.iter().copied().filter(move |page| ram.contains(&page.machine))
    }

    /// What the device's addresses were, by the ring that the driver gave it and by what the IOMMU did.
    pub(crate) fn addresses(&self) -> Addresses {
        let offsets = |page: Translation| page.machine.wrapping_sub(page.bus);
        let first = self.pages().map(offsets).next();
        let several = self.pages().any(|page| Some(offsets(page)) != first);
        let ring = self.ring().map(|ring| self.is_own(ring.descriptors));
        match (ring, first) {
            // Each page has a place of its own in the IOMMU's tables.
            (_, Some(_)) if several => Addresses::Translated,
            (_, Some(offset)) if offset != 0 => Addresses::Shifted,
            // Outside of what the guest calls its memory.
            (Some(false), _) => Addresses::Shifted,
            (Some(true), _) => Addresses::Own,
            (None, _) => Addresses::Unknown,
        }
    }

    /// Whether an address lies in what the guest calls its memory.
    pub(crate) fn is_own(&self, address: u64) -> bool {
        let ram = self.platform.ram();
        match &self.guest().ram[..] {
            // It did not come to say so.
            [] => ram.contains(&address),
            ranges => ranges.iter().any(|range| range.contains(&address)),
        }
    }

    /// The guest's lines that tell of an access that was stopped, or of I/O that failed.
    pub(crate) fn fault_lines(&self) -> Vec<&str> {
        const SIGNS: [&str; 7] = [
            "DMAR: [DMA",
            "AMD-Vi: Event logged",
            "IO_PAGE_FAULT",
            "F_TRANSLATION",
            "arm-smmu-v3 ",
            "I/O error",
            "page fault at",
        ];
        self.lines(&|line| SIGNS.iter().any(|sign| line.contains(sign)) && !line.contains("BUG"))
    }

    /// The guest's lines that a kernel prints when its own memory is not what it left there.
    pub(crate) fn damage_lines(&self) -> Vec<&str> {
        const SIGNS: [&str; 20] = [
            "Corrupted page table",
            "Bad pagetable",
            ": bad pgd",
            ": bad p4d",
            ": bad pud",
            ": bad pmd",
            "general protection fault",
            "BUG: unable to handle",
            "BUG: Bad page",
            "BUG: Bad rss",
            "kernel BUG at",
            "stack-protector",
            "stack guard",
            "invalid opcode",
            "list_add corruption",
            "list_del corruption",
            "corrupt",
            "Oops",
            "traps: ",
            "segfault at",
        ];
        self.lines(&|line| SIGNS.iter().any(|sign| line.contains(sign)))
    }

    /// Complaints of QEMU itself.
    pub(crate) fn qemu_lines(&self) -> Vec<&str> {
        let lines = self.outcome.qemu.lines().map(str::trim);
        // Those that it says of every guest here, or of every function that reports no errors of a link.
        const USUAL: [&str; 2] = ["TCG doesn't support", "Could not enable error recovery"];
        lines.filter(|line| !line.is_empty() && !USUAL.iter().any(|usual| line.contains(usual))).collect()
    }

    fn lines(&self, wanted: &dyn Fn(&str) -> bool) -> Vec<&str> {
        const LINES: usize = 8;
        self.outcome.console.lines().map(str::trim).filter(|line| wanted(line)).take(LINES).collect()
    }
}

impl Counts {
    /// The counts in a line with `misses=N`; or with `maps=N`, of a function that has no misses.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let value = |name: &str| {
            let (_, rest) = line.split_once(&format!("{name}="))?;
            rest.split(|char: char| !char.is_ascii_digit()).next()?.parse::<u64>().ok()
        };
        let faults = value("faults")?;
        if let Some(updates) = value(" maps") {
            return Some(Self { misses: 0, updates, invalidations: value("unmaps")?, faults });
        }
        Some(Self {
            misses: value("misses")?,
            updates: value("updates")?,
            invalidations: value("invalidations")?,
            faults,
        })
    }
}

/// QEMU's names of the flag.
const FLAG_NAMES: [&str; 2] = ["VIRTIO_F_IOMMU_PLATFORM", "VIRTIO_F_ACCESS_PLATFORM"];

/// Whether the flag is among the features in our server's line on queues that run.
pub(crate) fn flag_in(line: &str) -> Option<bool> {
    let (_, features) = line.split_once("queues run")?.1.split_once("features=0x")?;
    let digits = features.split(|char: char| !char.is_ascii_hexdigit()).next()?;
    Some(u64::from_str_radix(digits, 16).ok()? & IommuMode::Offer.offers(0) != 0)
}

/// The three addresses in the line of a server that has the ring itself: descriptors, the driver's part, the device's.
pub(crate) fn ring_in(line: &str) -> Option<Ring> {
    let (_, rest) = line.split_once("ring=")?;
    let mut numbers = rest.split(',').map(|number| {
        let digits = number.trim_start_matches("0x").split(|char: char| !char.is_ascii_hexdigit()).next()?;
        u64::from_str_radix(digits, 16).ok()
    });
    let mut next = || numbers.next().flatten();
    Some(Ring { descriptors: next()?, available: next()?, used: next()? })
}

/// The flag's bit, from the crate that owns it: the one bit that an offering device adds.
fn flag_bit() -> u32 {
    IommuMode::Offer.offers(0).trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_from_the_log() {
        let line = "2026 INFO connection ended: it left misses=12 updates=10 invalidations=3 faults=0";
        assert_eq!(Counts::parse(line), Some(Counts { misses: 12, updates: 10, invalidations: 3, faults: 0 }));
        assert_eq!(Counts::parse("listening"), None);
        let line = "2026 INFO connection ended maps=8 unmaps=7 faults=1";
        assert_eq!(Counts::parse(line), Some(Counts { misses: 0, updates: 8, invalidations: 7, faults: 1 }));
    }

    #[test]
    fn a_ring_is_read_from_the_log() {
        let line = "2026 INFO the driver's queues run features=0x1 ring=0xfffff000,0xffffe000,0xffffd010 more";
        let ring = Ring { descriptors: 0xffff_f000, available: 0xffff_e000, used: 0xffff_d010 };
        assert_eq!(ring_in(line), Some(ring));
        assert_eq!(ring_in("ring=0x1,"), None);
        assert_eq!(ring_in("listening"), None);
    }

    #[test]
    fn the_flag_is_read_from_the_log() {
        let line = "2026 INFO the driver's queues run addressing=Translated features=";
        assert_eq!(flag_in(&format!("{line}0x330006244")), Some(true));
        assert_eq!(flag_in(&format!("{line}0x130006244 more")), Some(false));
        assert_eq!(flag_in("features=0x330006244"), None);
    }
}
