//! Every case, as a table to read, and the proposal's sentences as assertions over it.

use crate::*;
use std::fmt::Write;
use std::string::{String, ToString};
use std::vec::Vec;
extern crate std;

/// What follows from the decisions, given how the platforms work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Outcome {
    RefusedByDriver,
    RefusedByDevice,
    /// Both use the platform's translation.
    Translated,
    /// Both use physical addresses.
    Untranslated,
    /// Both use physical addresses although there is an IOMMU.
    Bypass,
    /// The device's accesses are stopped by the IOMMU.
    Faults,
    /// The device's accesses land somewhere else than the driver meant.
    WrongMemory,
}

const DRIVERS: [&str; 4] = ["old", "new", "refusing", "refusing, allowed"];

struct Case {
    platform: Platform,
    driver: &'static str,
    device: DeviceKind,
    flag_offered: bool,
    flag_taken: bool,
    outcome: Outcome,
}

impl Case {
    fn play(platform: Platform, driver: &'static str, device: DeviceKind) -> Self {
        const BITS: u64 = 1 << 32;
        let identity = Identity { vendor: 1, device: 2, slot: 3 };
        // Who writes an allow-list knows the device: hardware is behind the IOMMU, an emulated device goes past it. On
        // Xen either way the addresses have to be machine addresses, and under grants what lacks the flag goes past them.
        let addressing = match device {
            _ if platform == Platform::XenGrants => Addressing::Physical,
            DeviceKind::OldEmulated if platform != Platform::Xen => Addressing::Physical,
            _ => Addressing::Translated,
        };
        let allowed = [Allow { vendor: 1, device: 2, slot: Some(3), addressing }];
        let policy = match driver {
            "old" => DriverPolicy::Old,
            "new" => DriverPolicy::New,
            "refusing" => DriverPolicy::Refusing { allowed: &[] },
            _ => DriverPolicy::Refusing { allowed: &allowed },
        };

        let mode = device.mode(platform);
        let offered = mode.offers(BITS);
        let taken = driver_takes(platform, policy, identity, offered, BITS);
        let answer = taken.map(|taken| mode.accept(offered, taken.features));
        let outcome = match (taken, answer) {
            (Err(_), _) => Outcome::RefusedByDriver,
            (_, Ok(Err(_))) => Outcome::RefusedByDevice,
            (Ok(taken), _) => Self::meet(platform, taken.addressing, device.reach(platform)),
        };
        let flag_taken = taken.is_ok_and(|taken| taken.features & FLAG != 0);
        Case { platform, driver, device, flag_offered: offered & FLAG != 0, flag_taken, outcome }
    }

    fn meet(platform: Platform, driver: Addressing, device: Reach) -> Outcome {
        let iommu = !matches!(platform, Platform::X86 | Platform::Arm64 | Platform::Xen);
        assert!(iommu || device == Reach::Untranslated, "{platform} has nothing that would translate");
        match (platform, driver, device) {
            (Platform::X86 | Platform::Arm64, ..) => Outcome::Untranslated,
            (Platform::Xen, Addressing::Translated, _) => Outcome::Translated,
            (Platform::Xen, Addressing::Physical, _) => Outcome::WrongMemory,
            (_, Addressing::Translated, Reach::ThroughIommu) => Outcome::Translated,
            (_, Addressing::Physical, Reach::Untranslated) => Outcome::Bypass,
            (_, Addressing::Physical, Reach::ThroughIommu) => Outcome::Faults,
            // A reference to a grant is no address of anything else.
            (Platform::XenGrants, Addressing::Translated, Reach::Untranslated) => Outcome::Faults,
            (_, Addressing::Translated, Reach::Untranslated) => Outcome::WrongMemory,
        }
    }

    fn all() -> Vec<Case> {
        let mut cases = Vec::new();
        for platform in Platform::ALL {
            for driver in DRIVERS {
                cases.extend(DeviceKind::ALL.map(|device| Case::play(platform, driver, device)));
            }
        }
        cases
    }

    fn works(&self) -> bool {
        matches!(self.outcome, Outcome::Translated | Outcome::Untranslated | Outcome::Bypass)
    }

    fn is_ppc(&self) -> bool {
        matches!(self.platform, Platform::PpcProposed | Platform::PpcToday)
    }
}

#[test]
fn every_case() {
    let mut table = String::new();
    let mut rule = |cells: [&str; 6]| {
        let [platform, driver, device, offered, taken, outcome] = cells;
        writeln!(table, "{platform:18} | {driver:17} | {device:22} | {offered:7} | {taken:5} | {outcome}").unwrap();
    };
    rule(["platform", "driver", "device", "offered", "taken", "so"]);
    let flag = |on| if on { "flag" } else { "-" };
    for case in Case::all() {
        let outcome = match case.outcome {
            Outcome::RefusedByDriver => "refused by the driver",
            Outcome::RefusedByDevice => "refused by the device",
            Outcome::Translated => "works, translated",
            Outcome::Untranslated => "works, nothing to translate",
            Outcome::Bypass => "works, past the IOMMU",
            Outcome::Faults => "faults in the IOMMU",
            Outcome::WrongMemory => "WRONG MEMORY",
        };
        rule([
            &case.platform.to_string(),
            case.driver,
            &case.device.to_string(),
            flag(case.flag_offered),
            flag(case.flag_taken),
            outcome,
        ]);
    }
    insta::assert_snapshot!(table);
}

/// Whether `holds` in all of the cases that `sentence` is about, which are some.
#[track_caller]
fn check(sentence: &str, about: impl Fn(&Case) -> bool, holds: impl Fn(&Case) -> bool) {
    let cases: Vec<_> = Case::all().into_iter().filter(|case| about(case)).collect();
    assert!(!cases.is_empty(), "nothing to say about: {sentence}");
    for case in cases {
        assert!(
            holds(&case),
            "{sentence}\nbut not: {}, {} driver, {}: {:?}",
            case.platform,
            case.driver,
            case.device,
            case.outcome
        );
    }
}

use DeviceKind::*;

#[test]
fn the_rules_for_drivers() {
    let new = |case: &Case| case.driver != "old";
    check(
        "new kernels acknowledge the flag on any device that advertises it",
        |case| new(case) && case.flag_offered && case.platform != Platform::PpcProposed,
        |case| case.flag_taken,
    );
    check(
        "on PPC new kernels will not talk to devices that set the flag",
        |case| new(case) && case.flag_offered && case.platform == Platform::PpcProposed,
        |case| case.outcome == Outcome::RefusedByDriver,
    );
    check(
        "new kernels optionally refuse devices without the flag that appear to be behind an IOMMU",
        |case| {
            case.driver == "refusing"
                && !case.flag_offered
                && case.platform.appears_behind_iommu()
                && case.platform != Platform::PpcProposed
        },
        |case| case.outcome == Outcome::RefusedByDriver,
    );
    check(
        "and nothing else",
        |case| case.driver == "new" && case.platform != Platform::PpcProposed,
        |case| case.outcome != Outcome::RefusedByDriver,
    );
}

#[test]
fn the_rules_for_devices() {
    check(
        "new QEMU always advertises the flag, except on PPC",
        |case| {
            matches!(case.device, NewEmulated | NewEmulatedRequiring | Wrapped)
                && case.platform != Platform::PpcProposed
        },
        |case| case.flag_offered,
    );
    check(
        "on PPC new QEMU will not respect the IOMMU and will not set the flag",
        |case| {
            matches!(case.device, NewEmulated | NewEmulatedRequiring | Wrapped)
                && case.platform == Platform::PpcProposed
        },
        |case| !case.flag_offered && case.outcome == Outcome::Bypass,
    );
    check(
        "with iommu=on devices refuse to work unless the driver acknowledges the flag",
        |case| case.device == NewEmulatedRequiring && case.flag_offered && !case.flag_taken,
        |case| case.outcome == Outcome::RefusedByDevice,
    );
    check(
        "new QEMU always respects the IOMMU, if any, except on PPC",
        |case| matches!(case.device, NewEmulated | Wrapped) && case.platform != Platform::PpcProposed,
        |case| case.outcome != Outcome::Bypass,
    );
}

#[test]
fn this_results_in() {
    let with_iommu = |case: &Case| matches!(case.platform, Platform::X86Iommu | Platform::Arm64Smmu);
    check(
        "new kernels work fine with old QEMU unless iommu=on",
        |case| {
            case.driver == "new"
                && case.device == OldEmulated
                && !with_iommu(case)
                && case.platform != Platform::XenGrants
        },
        Case::works,
    );
    check(
        "(iommu=on there means that the machine has one: old QEMU then goes past it)",
        |case| case.driver == "new" && case.device == OldEmulated && with_iommu(case),
        |case| case.outcome == Outcome::WrongMemory,
    );
    check(
        "new kernels work with new devices under all circumstances, except on PPC",
        |case| {
            case.driver != "old"
                && matches!(case.device, NewEmulated | NewEmulatedRequiring | Wrapped | NewPhysical)
                && case.platform != Platform::PpcProposed
                && (case.platform, case.device) != (Platform::XenGrants, NewPhysical)
        },
        |case| case.works() && case.outcome != Outcome::Bypass,
    );
    check(
        "(hardware can't be granted anything)",
        |case| case.driver != "old" && (case.platform, case.device) == (Platform::XenGrants, NewPhysical),
        |case| case.outcome == Outcome::Faults,
    );
    check(
        "except on PPC, where physical devices are and remain broken",
        |case| case.platform == Platform::PpcProposed && matches!(case.device, OldPhysical | NewPhysical),
        |case| !case.works(),
    );
    check(
        "Xen works with new QEMU",
        |case| {
            matches!(case.platform, Platform::Xen | Platform::XenGrants)
                && case.driver != "old"
                && matches!(case.device, NewEmulated | NewEmulatedRequiring | Wrapped)
        },
        |case| case.outcome == Outcome::Translated,
    );
    check(
        "and cleanly refuses to interoperate with old QEMU",
        |case| {
            matches!(case.platform, Platform::Xen | Platform::XenGrants)
                && case.driver == "refusing"
                && case.device == OldEmulated
        },
        |case| case.outcome == Outcome::RefusedByDriver,
    );
    check(
        "the status quo, in which the Xen guest corrupts itself",
        |case| case.platform == Platform::Xen && case.driver == "old" && case.device == OldEmulated,
        |case| case.outcome == Outcome::WrongMemory,
    );
    check(
        "new kernels with old QEMU with iommu=on optionally refuse to interoperate",
        |case| case.driver == "refusing" && case.device == OldEmulated && with_iommu(case),
        |case| case.outcome == Outcome::RefusedByDriver,
    );
    check(
        "old kernels fail cleanly with new QEMU with iommu=on",
        |case| case.driver == "old" && case.device == NewEmulatedRequiring && case.platform != Platform::PpcProposed,
        |case| case.outcome == Outcome::RefusedByDevice,
    );
    check(
        "old kernels continue to fail with physical virtio devices if they're behind an iommu",
        |case| {
            case.driver == "old"
                && matches!(case.device, OldPhysical | NewPhysical)
                && (with_iommu(case) || case.is_ppc())
        },
        |case| case.outcome == Outcome::Faults,
    );
    check(
        "old physical devices that don't advertise the flag fail cleanly if the host uses an iommu",
        |case| case.driver == "refusing" && case.device == OldPhysical && with_iommu(case),
        |case| case.outcome == Outcome::RefusedByDriver,
    );
    check(
        "the driver could optionally whitelist such devices",
        |case| case.driver == "refusing, allowed" && case.device == OldPhysical && with_iommu(case),
        |case| case.outcome == Outcome::Translated,
    );
    check(
        "PPC works as well as it currently does",
        |case| case.platform == Platform::PpcProposed && matches!(case.device, OldEmulated | NewEmulated),
        Case::works,
    );
}
