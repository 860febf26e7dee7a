//! The matrix, run, and written down as a table or as JSON.

use crate::proposal::{Agreement, Proposal};
use crate::record::{Observed, Proposed, Record, SCHEMA, Says, Source, Table};
use crate::verdict::reason;
use crate::world::{Flag, Observation, Outcome, Probe, Probes};
use crate::{Case, Parts, Select, Verdict, observe};
use serde::Serialize;
use std::collections::BTreeSet;
use std::fmt::{self, Write};

/// How many addresses a cell's evidence shows.
const ADDRESSES: usize = 6;

/// Some cells, run.
#[derive(Debug)]
pub struct Matrix {
    /// Row by row.
    pub cells: Vec<Cell>,
}

/// One cell: what the proposal says of it, and what was seen.
#[derive(Debug)]
pub struct Cell {
    /// Which.
    pub case: Case,
    /// What happened.
    pub observed: Verdict,
    /// Whether the proposal has it so.
    pub agreement: Agreement<'static>,
    /// In a line, what was seen.
    pub reason: String,
    /// What became of the flag, which some sentences are about.
    pub flag: Flag,
    /// What the verdict follows from.
    pub evidence: Evidence,
}

/// What a verdict follows from, for reading.
#[derive(Debug, Serialize)]
pub struct Evidence {
    /// What became of the flag: `not-offered`, `taken` or `not-taken`.
    pub flag: &'static str,
    /// How the driver fared.
    pub driver: String,
    /// What the device complained of.
    pub device: Vec<String>,
    /// The first different addresses that the device sent, and what it reached.
    pub addresses: Vec<Address>,
    /// What was recorded as stopped; `null` where there is nothing that stops and records.
    pub faults: Option<Vec<String>>,
    /// What became of a write to a page that was lent for reading; `null` where nothing worked.
    pub forbidden_page: Option<String>,
    /// What became of a write to a page that had been lent and was taken back; `null` where nothing worked.
    pub returned_page: Option<String>,
    /// Bytes that changed though nobody had lent them.
    pub damage: Vec<String>,
    /// What the disk held in the end.
    pub disk: String,
}

/// An access of a device that was let through.
#[derive(Debug, Serialize, PartialEq, Eq)]
pub struct Address {
    /// What it sent.
    pub bus: String,
    /// What the guest calls the place; `null` if it is not the guest's.
    pub guest: Option<String>,
    /// `read` or `write`.
    pub access: String,
}

impl Matrix {
    /// Runs the cells of `select`.
    pub fn run(select: &Select, parts: &dyn Parts) -> Self {
        let cases = Case::all().into_iter().filter(|case| select.matches(case));
        Self { cells: cases.map(|case| Cell::run(case, parts)).collect() }
    }

    /// The cells that are not as the proposal has them, for no reason that is known.
    pub fn unexpected(&self) -> impl Iterator<Item = &Cell> {
        self.cells.iter().filter(|cell| matches!(cell.agreement, Agreement::Unexpected(_)))
    }

    /// Written down.
    pub fn table(&self) -> Table {
        Table { schema: SCHEMA, cells: self.cells.iter().map(Cell::record).collect() }
    }
}

impl Cell {
    /// Runs one cell.
    pub fn run(case: Case, parts: &dyn Parts) -> Self {
        let seen = observe(case, parts);
        let observed = Verdict::of(&seen);
        let agreement = Proposal::the().compare(case, seen.flag, observed);
        Self { case, observed, agreement, reason: reason(&seen), flag: seen.flag, evidence: Evidence::of(&seen) }
    }

    /// What was seen, and why the proposal does not have it so where that is known.
    pub fn why(&self) -> String {
        match self.agreement {
            Agreement::Expected(_, known) => format!("{}. {}", self.reason, known.why),
            _ => self.reason.clone(),
        }
    }

    /// The sentence to show: the one that does not hold, else the first.
    fn sentence(&self) -> Option<&'static str> {
        match self.agreement {
            Agreement::Silent => None,
            Agreement::Unsure(sentence) | Agreement::Expected(sentence, _) | Agreement::Unexpected(sentence) => {
                Some(&sentence.text)
            }
            Agreement::Agrees => Proposal::the().about(self.case).next().map(|sentence| &*sentence.text),
        }
    }

    /// Written down.
    pub fn record(&self) -> Record {
        Record {
            platform: self.case.platform_slug().into(),
            driver: self.case.driver.slug().into(),
            device: self.case.device_slug().into(),
            source: Source::Embedded,
            stands_for: None,
            proposal: Proposed {
                says: match self.agreement {
                    Agreement::Silent => Says::Silent,
                    Agreement::Unsure(_) => Says::Unsure,
                    _ => Says::Decided,
                },
                sentence: self.sentence().map(Into::into),
            },
            observed: Observed::Verdict(self.observed),
            agrees: match self.agreement {
                Agreement::Silent | Agreement::Unsure(_) => None,
                Agreement::Agrees => Some(true),
                Agreement::Expected(..) | Agreement::Unexpected(_) => Some(false),
            },
            unexpected: matches!(self.agreement, Agreement::Unexpected(_)),
            why: self.why(),
            evidence: match serde_json::to_value(&self.evidence) {
                Ok(serde_json::Value::Object(evidence)) => evidence,
                other => unreachable!("a struct of texts and lists became {other:?}"),
            },
        }
    }
}

impl Evidence {
    fn of(seen: &Observation) -> Self {
        let mut addresses: Vec<Address> = Vec::new();
        for touch in &seen.touches {
            let address = Address {
                bus: touch.sent.to_string(),
                guest: touch.reached.map(|reached| reached.to_string()),
                access: touch.access.to_string(),
            };
            if addresses.len() < ADDRESSES && !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        let page = |of: fn(Probes) -> Probe| {
            seen.probes.map(|probes| match of(probes) {
                Probe::Stopped(fault) => format!("stopped: {fault}"),
                Probe::Reached => "written".into(),
            })
        };
        Self {
            flag: seen.flag.slug(),
            driver: match &seen.outcome {
                Outcome::Done => "wrote, and read the same back".into(),
                Outcome::RefusedByDriver(refusal) | Outcome::RefusedByDevice(refusal) => refusal.to_string(),
                Outcome::Failed(error) => error.clone(),
                Outcome::WrongData { at, expected, found } => {
                    format!("byte {at} of the transfer is {found:02x} and not {expected:02x}")
                }
            },
            device: seen.complaints.clone(),
            addresses,
            faults: seen.iommu.as_ref().map(|faults| faults.latest.iter().map(ToString::to_string).collect()),
            forbidden_page: page(|probes| probes.forbidden),
            returned_page: page(|probes| probes.returned),
            damage: seen.damage.iter().map(ToString::to_string).collect(),
            disk: seen.disk.to_string(),
        }
    }
}

/// The table for a terminal. Sentences are numbered, and follow it.
impl fmt::Display for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut platform = None;
        let mut cited = BTreeSet::new();
        for cell in &self.cells {
            if platform.replace(cell.case.platform) != Some(cell.case.platform) {
                writeln!(f, "\n{}", cell.case.platform)?;
                writeln!(f, "  {:21} {:22} {:29} {:20} why", "driver", "device", "observed", "proposal")?;
            }
            let Case { driver, device, .. } = cell.case;
            let proposal = cell.cite(&mut cited);
            writeln!(f, "  {driver:21} {device:22} {:29} {proposal:20} {}", cell.observed, cell.reason)?;
        }
        self.legend(f, &cited)?;
        self.count(f)
    }
}

impl Matrix {
    fn legend(&self, f: &mut fmt::Formatter<'_>, cited: &BTreeSet<usize>) -> fmt::Result {
        writeln!(f, "\nWhat the proposal says:")?;
        for &number in cited {
            writeln!(f, "  [{}] {}", number + 1, Proposal::the().sentences[number].text)?;
        }
        let mut reasons: Vec<(usize, &str)> = Vec::new();
        for cell in &self.cells {
            if let Agreement::Expected(sentence, known) = cell.agreement
                && !reasons.iter().any(|&(_, why)| why == known.why)
            {
                reasons.push((number(&sentence.id), &known.why));
            }
        }
        if !reasons.is_empty() {
            writeln!(f, "\nWhy it is otherwise, where that is known:")?;
        }
        reasons.iter().try_for_each(|(number, why)| writeln!(f, "  [{}] {why}", number + 1))
    }

    fn count(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = format!("{} cells", self.cells.len());
        for verdict in Verdict::ALL {
            let count = self.cells.iter().filter(|cell| cell.observed == verdict).count();
            if count > 0 {
                write!(line, " · {count} {}", verdict.slug())?;
            }
        }
        writeln!(f, "\n{line}")?;
        match self.unexpected().count() {
            0 => writeln!(f, "Nothing is unexpected."),
            count => {
                writeln!(f, "{count} UNEXPECTED:")?;
                self.unexpected().try_for_each(|cell| writeln!(f, "  {}: {}", cell.case, cell.observed))
            }
        }
    }
}

impl Cell {
    /// The proposal's column.
    fn cite(&self, cited: &mut BTreeSet<usize>) -> String {
        let mut cite = |id: &str| {
            cited.insert(number(id));
            number(id) + 1
        };
        match self.agreement {
            Agreement::Silent => "silent".into(),
            Agreement::Unsure(sentence) => format!("unsure [{}]", cite(&sentence.id)),
            Agreement::Expected(sentence, _) => format!("otherwise [{}]", cite(&sentence.id)),
            Agreement::Unexpected(sentence) => format!("NOT SO [{}]", cite(&sentence.id)),
            Agreement::Agrees => {
                let numbers = Proposal::the().about(self.case).map(|sentence| cite(&sentence.id).to_string());
                format!("agrees [{}]", numbers.collect::<Vec<_>>().join(" "))
            }
        }
    }
}

/// A sentence's place in the text.
fn number(id: &str) -> usize {
    Proposal::the().sentences.iter().position(|sentence| sentence.id == id).expect("a sentence of the proposal")
}
