//! The real cells for a terminal.

use std::fmt;

use crate::record::{Observed, Record};
use crate::verdict::Verdict;

/// Real cells, platform by platform, and what they come to. Nothing if there are none.
pub struct Report<'a>(pub &'a [Record]);

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut platform = None;
        for record in self.0 {
            if platform.replace(&record.platform) != Some(&record.platform) {
                let place = record.stands_for.as_ref().map_or("", |case| &case.platform);
                writeln!(f, "\n{} (real; stands for {place})", record.platform)?;
                let (driver, device, observed, seconds) = ("driver", "device", "observed", "time");
                writeln!(f, "  {driver:14} {device:24} {observed:29} {:10} {seconds:>7}  why", "proposal")?;
            }
            row(f, record)?;
        }
        if self.0.is_empty() { Ok(()) } else { self.count(f) }
    }
}

fn row(f: &mut fmt::Formatter<'_>, record: &Record) -> fmt::Result {
    let proposal = match (record.unexpected, record.agrees) {
        (true, _) => "UNEXPECTED",
        (_, None) => "–",
        (_, Some(true)) => "agrees",
        (_, Some(false)) => "otherwise",
    };
    let time = match record.evidence.get("seconds").and_then(|seconds| seconds.as_str()) {
        Some(seconds) => format!("{seconds} s"),
        None => String::new(),
    };
    let why = record.why.lines().next().unwrap_or_default();
    let Record { driver, device, observed, .. } = record;
    writeln!(f, "  {driver:14} {device:24} {observed:29} {proposal:10} {time:>7}  {why}")
}

impl Report<'_> {
    fn count(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\n{} real cells", self.0.len())?;
        let all = Verdict::ALL.map(Observed::Verdict).into_iter().chain([Observed::Skipped]);
        for observed in all {
            let count = self.0.iter().filter(|record| record.observed == observed).count();
            if count > 0 {
                write!(f, " · {count} {}", observed.slug())?;
            }
        }
        let unexpected: Vec<_> = self.0.iter().filter(|record| record.unexpected).collect();
        match unexpected.len() {
            0 => writeln!(f, "\nNothing is unexpected."),
            count => {
                writeln!(f, "\n{count} UNEXPECTED:")?;
                unexpected.iter().try_for_each(|record| {
                    let Record { platform, driver, device, why, .. } = record;
                    writeln!(f, "  platform={platform} driver={driver} device={device}: {why}")
                })
            }
        }
    }
}
