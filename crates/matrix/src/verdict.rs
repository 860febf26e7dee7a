use crate::world::{Content, Observation, Outcome, Probe, Probes};
use crate::{Damage, Touch};
use ringfence_policy::Refusal;
use std::fmt::{self, Write};

/// What happens in a cell. Follows from what was observed and from nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Every address that the device sent meant another place than the guest's byte of that number, it was the right
    /// one, and a page that was not lent for that, or not any more, was out of reach.
    WorksTranslated,
    /// The same, but such a page was reached: addresses are translated, and not everything is protected.
    WorksUnconfined,
    /// Addresses are the guest's own, and there is no IOMMU.
    WorksUntranslated,
    /// Addresses are the guest's own, although there is an IOMMU: the device goes past it.
    Bypasses,
    /// The driver does not start the device.
    RefusedByDriver,
    /// The device does not accept the driver.
    RefusedByDevice,
    /// The driver gets an error, a fault is recorded, and nothing has changed.
    FailsCleanly,
    /// The driver gets an error or no answer, nothing has changed, and no IOMMU recorded why.
    FailsSilently,
    /// Bytes changed that nobody had lent, or the wrong ones came back or went to the disk.
    Corrupts,
}

impl Verdict {
    /// Every verdict, from good to bad.
    pub const ALL: [Verdict; 9] = [
        Verdict::WorksTranslated,
        Verdict::WorksUnconfined,
        Verdict::WorksUntranslated,
        Verdict::Bypasses,
        Verdict::RefusedByDriver,
        Verdict::RefusedByDevice,
        Verdict::FailsCleanly,
        Verdict::FailsSilently,
        Verdict::Corrupts,
    ];

    /// Its name in data.
    pub fn slug(self) -> &'static str {
        match self {
            Verdict::WorksTranslated => "works-translated",
            Verdict::WorksUnconfined => "works-translated-unconfined",
            Verdict::WorksUntranslated => "works-untranslated",
            Verdict::Bypasses => "works-bypassing",
            Verdict::RefusedByDriver => "refused-by-driver",
            Verdict::RefusedByDevice => "refused-by-device",
            Verdict::FailsCleanly => "fails-cleanly",
            Verdict::FailsSilently => "fails-silently",
            Verdict::Corrupts => "corrupts",
        }
    }

    /// What `seen` amounts to.
    pub fn of(seen: &Observation) -> Self {
        let wrong_disk = match seen.disk {
            Content::Wrong { .. } => true,
            // A driver that was told that all is well, and a disk that does not hold it.
            Content::Untouched => seen.outcome == Outcome::Done,
            Content::Written => false,
        };
        if !seen.damage.is_empty() || wrong_disk {
            return Verdict::Corrupts;
        }
        match seen.outcome {
            Outcome::WrongData { .. } => Verdict::Corrupts,
            Outcome::RefusedByDriver(_) => Verdict::RefusedByDriver,
            Outcome::RefusedByDevice(_) => Verdict::RefusedByDevice,
            Outcome::Failed(_) if seen.iommu.as_ref().is_some_and(|faults| faults.total > 0) => Verdict::FailsCleanly,
            Outcome::Failed(_) => Verdict::FailsSilently,
            Outcome::Done => Self::of_success(seen),
        }
    }

    fn of_success(seen: &Observation) -> Self {
        let translated = |touch: &Touch| touch.reached.is_some_and(|reached| reached.0 != touch.sent.0);
        let all = !seen.touches.is_empty() && seen.touches.iter().all(translated);
        match (all, &seen.probes, &seen.iommu) {
            (true, Some(Probes { forbidden: Probe::Stopped(_), returned: Probe::Stopped(_) }), _) => {
                Verdict::WorksTranslated
            }
            (true, ..) => Verdict::WorksUnconfined,
            (false, _, None) => Verdict::WorksUntranslated,
            (false, _, Some(_)) => Verdict::Bypasses,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Verdict::WorksTranslated => "works, translated",
            Verdict::WorksUnconfined => "works, translated, unconfined",
            Verdict::WorksUntranslated => "works, untranslated",
            Verdict::Bypasses => "works, past the IOMMU",
            Verdict::RefusedByDriver => "refused by the driver",
            Verdict::RefusedByDevice => "refused by the device",
            Verdict::FailsCleanly => "fails cleanly",
            Verdict::FailsSilently => "fails silently",
            Verdict::Corrupts => "CORRUPTS",
        })
    }
}

/// In a line, what one has to have seen to believe the verdict.
pub(crate) fn reason(seen: &Observation) -> String {
    if !seen.damage.is_empty() {
        return damage(&seen.damage);
    }
    match (&seen.outcome, seen.disk) {
        (Outcome::RefusedByDriver(refusal) | Outcome::RefusedByDevice(refusal), _) => refused(*refusal).into(),
        (Outcome::WrongData { at, expected, found }, _) => {
            format!("byte {at} came back as {found:02x}, {expected:02x} was written")
        }
        (_, Content::Wrong { at }) => format!("the disk is wrong from byte {at:#x} on"),
        (Outcome::Done, Content::Untouched) => "the disk does not hold what was written".into(),
        (Outcome::Failed(error), _) => match seen.iommu.as_ref().and_then(|faults| faults.latest.first()) {
            Some(fault) => format!("stopped: {fault}"),
            None => error.clone(),
        },
        (Outcome::Done, Content::Written) => success(seen),
    }
}

/// Shorter than what a refusal says of itself, which goes into the evidence.
fn refused(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::FlagRequired => "the flag is required and was not taken",
        Refusal::NeverOffered { .. } => "bits were taken that were never offered",
        Refusal::FlagOnPpc { .. } => "the flag is set, and means nothing here",
        Refusal::Unflagged { .. } => "no flag, and it appears to be behind an IOMMU",
    }
}

fn success(seen: &Observation) -> String {
    let mut text = match seen.touches.first() {
        Some(Touch { sent, reached: Some(reached), .. }) if sent.0 == reached.0 => format!("sent and reached {sent}"),
        Some(Touch { sent, reached: Some(reached), .. }) => format!("sent {sent}, reached the guest's {reached}"),
        _ => "the device touched nothing of the guest's".into(),
    };
    text += match seen.probes {
        Some(Probes { forbidden: Probe::Stopped(_), returned: Probe::Stopped(_) }) => {
            "; forbidden and returned pages: stopped"
        }
        Some(Probes { forbidden: Probe::Stopped(_), returned: Probe::Reached }) => {
            "; forbidden page: stopped; returned page: written"
        }
        Some(Probes { forbidden: Probe::Reached, returned: Probe::Stopped(_) }) => {
            "; forbidden page: written; returned page: stopped"
        }
        Some(Probes { forbidden: Probe::Reached, returned: Probe::Reached }) => {
            "; forbidden and returned pages: written"
        }
        None => "",
    };
    text
}

fn damage(damage: &[Damage]) -> String {
    let mut text = damage[0].to_string();
    if damage.len() > 1 {
        let _ = write!(text, "; and {} more places", damage.len() - 1);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Owner;
    use crate::world::Flag;
    use ringfence_dma::{Access, BusAddr, Fault, FaultReason, Gpa};
    use ringfence_iommu::Faults;

    const FAULT: Fault = Fault { addr: BusAddr(0x1000), access: Access::Write, reason: FaultReason::Forbidden };

    fn touch(sent: u64, reached: Option<u64>) -> Touch {
        Touch { sent: BusAddr(sent), reached: reached.map(Gpa), access: Access::Read }
    }

    /// A cell that works translated.
    fn good() -> Observation {
        Observation {
            outcome: Outcome::Done,
            flag: Flag::Taken,
            touches: vec![touch(0x9000, Some(0x1000)), touch(0x9004, Some(0x1004))],
            iommu: Some(Faults::default()),
            complaints: Vec::new(),
            probes: Some(Probes { forbidden: Probe::Stopped(FAULT), returned: Probe::Stopped(FAULT) }),
            damage: Vec::new(),
            disk: Content::Written,
        }
    }

    #[test]
    fn every_verdict_and_what_it_takes() {
        let check = |expected, change: &dyn Fn(&mut Observation)| {
            let mut seen = good();
            change(&mut seen);
            assert_eq!(Verdict::of(&seen), expected, "{seen:?}");
        };
        let faulted = Some(Faults { total: 1, latest: vec![FAULT] });
        let failed = || Outcome::Failed("no answer".into());
        let damage = Damage { addr: 0, owner: Owner::Guest, was: vec![1], found: vec![2] };

        check(Verdict::WorksTranslated, &|_| ());
        check(Verdict::WorksUnconfined, &|seen| seen.probes.as_mut().unwrap().forbidden = Probe::Reached);
        check(Verdict::WorksUnconfined, &|seen| seen.probes.as_mut().unwrap().returned = Probe::Reached);
        check(Verdict::WorksUnconfined, &|seen| seen.probes = None);
        // One address that was not translated is one too many.
        check(Verdict::Bypasses, &|seen| seen.touches.push(touch(0x2000, Some(0x2000))));
        check(Verdict::Bypasses, &|seen| seen.touches.push(touch(0x2000, None)));
        check(Verdict::Bypasses, &|seen| seen.touches.clear());
        check(Verdict::WorksUntranslated, &|seen| {
            (seen.touches, seen.iommu) = (vec![touch(0x2000, Some(0x2000))], None)
        });
        check(Verdict::RefusedByDevice, &|seen| seen.outcome = Outcome::RefusedByDevice(Refusal::FlagRequired));
        check(Verdict::RefusedByDriver, &|seen| seen.outcome = Outcome::RefusedByDriver(Refusal::FlagRequired));
        check(Verdict::FailsSilently, &|seen| seen.outcome = failed());
        check(Verdict::FailsCleanly, &|seen| (seen.outcome, seen.iommu) = (failed(), faulted.clone()));
        // Whatever else was seen.
        check(Verdict::Corrupts, &|seen| seen.damage = vec![damage.clone()]);
        check(Verdict::Corrupts, &|seen| (seen.outcome, seen.damage) = (failed(), vec![damage.clone()]));
        check(Verdict::Corrupts, &|seen| seen.disk = Content::Untouched);
        check(Verdict::Corrupts, &|seen| (seen.outcome, seen.disk) = (failed(), Content::Wrong { at: 0 }));
        check(Verdict::Corrupts, &|seen| seen.outcome = Outcome::WrongData { at: 0, expected: 1, found: 2 });
    }
}
