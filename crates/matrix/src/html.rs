//! The report: one page that needs nothing else, opens from a file, and shows everything without JavaScript, too.
//!
//! What a guest printed is hostile: everything is escaped by the template, and the page forbids itself the network and
//! every script and style but its own two, by their hashes.

mod evidence;
mod words;

use crate::record::{Observed, Record, Source, Table};
use crate::sides::{self, DANGERS, Group, Provenance, device_title, driver_title, platform_title};
use crate::{Case, Verdict};
use askama::Template;
use evidence::{Body, Entry};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use words::{AgreementWord, VerdictWord};

const STYLE: &str = include_str!("html/page.css");
const SCRIPT: &str = include_str!("html/page.js");

/// Writes `table` as a page.
pub fn page(table: &Table) -> String {
    let page = Page::of(table);
    page.render().expect("a template that writes to a string")
}

#[derive(Template)]
#[template(path = "page.html")]
struct Page<'t> {
    style: &'static str,
    style_hash: String,
    script: &'static str,
    script_hash: String,
    headline: String,
    has_real: bool,
    unexpected: Vec<Cell<'t>>,
    dangers: Vec<Danger<'t>>,
    sources: Vec<(Source, &'static str)>,
    counts: Vec<Count>,
    facets: Vec<Facet>,
    groups: Vec<Section<'t>>,
    made: Vec<(&'static str, String)>,
}

/// A platform.
struct Section<'t> {
    id: String,
    platform: &'t str,
    title: String,
    rows: Vec<Row<'t>>,
}

struct Row<'t> {
    driver: &'t str,
    driver_title: String,
    device_title: String,
    embedded: Vec<Cell<'t>>,
    real: Vec<Cell<'t>>,
}

#[derive(Clone)]
struct Cell<'t> {
    id: String,
    record: &'t Record,
    verdict: VerdictWord,
    agreement: AgreementWord,
    evidence: Vec<Entry>,
}

/// All cells of one dangerous verdict.
struct Danger<'t> {
    verdict: VerdictWord,
    title: String,
    meaning: &'static str,
    sides: Vec<DangerSide<'t>>,
}

struct DangerSide<'t> {
    title: &'static str,
    places: Vec<DangerPlace<'t>>,
}

struct DangerPlace<'t> {
    platform: String,
    lines: Vec<DangerLine<'t>>,
}

/// Cells of one driver that tell the same story.
struct DangerLine<'t> {
    driver: String,
    cells: Vec<Cell<'t>>,
    /// Told of what corrupts. Who goes past the IOMMU does so in the same words everywhere.
    why: Option<&'t str>,
}

/// How often a verdict was seen, a number for each source.
struct Count {
    verdict: VerdictWord,
    numbers: Vec<usize>,
}

/// What cells can be chosen by: groups of values with what each is called.
struct Facet {
    name: &'static str,
    lists: Vec<FacetList>,
}

struct FacetList {
    label: &'static str,
    options: Vec<(String, String)>,
}

impl<'t> Page<'t> {
    fn of(table: &'t Table) -> Self {
        let mut ids = Ids::default();
        let groups = sides::by_platform(table).into_iter().map(|group| section(group, &mut ids));
        let groups: Vec<Section<'t>> = groups.collect();
        let cells: Vec<&Cell<'t>> = groups.iter().flat_map(Section::cells).collect();
        let has_real = cells.iter().any(|cell| cell.is_real());
        let mut sources = vec![(Source::Embedded, "embedded")];
        sources.extend(has_real.then_some((Source::Real, "real")));
        let dangers: Vec<_> = DANGERS.iter().map(|&verdict| Danger::of(verdict, &cells, has_real)).collect();
        Self {
            style: STYLE,
            style_hash: integrity(STYLE),
            script: SCRIPT,
            script_hash: integrity(SCRIPT),
            headline: dangers.iter().map(|danger| danger.title.as_str()).collect::<Vec<_>>().join(", "),
            has_real,
            unexpected: cells.iter().filter(|cell| cell.record.unexpected).map(|&cell| cell.clone()).collect(),
            counts: counts(&cells, &sources),
            facets: facets(&cells),
            dangers,
            sources,
            made: made(table),
            groups,
        }
    }
}

impl<'t> Section<'t> {
    fn cells(&self) -> impl Iterator<Item = &Cell<'t>> {
        self.rows.iter().flat_map(|row| row.embedded.iter().chain(&row.real))
    }

    fn has_real(&self) -> bool {
        self.rows.iter().any(|row| !row.real.is_empty())
    }

    fn embedded_by_driver(&self) -> Vec<Vec<&Cell<'t>>> {
        let rows = self.rows.chunk_by(|one, next| one.driver == next.driver);
        rows.map(|rows| rows.iter().flat_map(|row| &row.embedded).collect()).collect()
    }
}

impl Cell<'_> {
    fn is_real(&self) -> bool {
        self.record.source == Source::Real
    }

    fn source(&self) -> &'static str {
        self.record.source.slug()
    }

    fn is_danger(&self) -> bool {
        DANGERS.map(Observed::Verdict).contains(&self.record.observed)
    }

    fn device_title(&self) -> String {
        device_title(&self.record.device)
    }

    fn full_name(&self) -> String {
        let Record { platform, driver, device, .. } = self.record;
        format!("{}: {} × {}", platform_title(platform), driver_title(driver), device_title(device))
    }

    /// The names by which it can be chosen: its own, and those of what it stands for.
    fn platforms(&self) -> String {
        names(&self.record.platform, sides::place(self.record).0)
    }

    fn drivers(&self) -> String {
        names(&self.record.driver, sides::place(self.record).1)
    }

    fn devices(&self) -> String {
        names(&self.record.device, sides::place(self.record).2)
    }
}

fn names(own: &str, place: &str) -> String {
    if own == place { own.to_owned() } else { format!("{own} {place}") }
}

impl<'t> Danger<'t> {
    fn of(verdict: Verdict, cells: &[&Cell<'t>], has_real: bool) -> Self {
        let observed = Observed::Verdict(verdict);
        let here: Vec<_> = cells.iter().filter(|cell| cell.record.observed == observed).copied().collect();
        let what = match (verdict, here.len()) {
            (Verdict::Corrupts, 1) => "1 cell corrupts memory".to_owned(),
            (Verdict::Corrupts, many) => format!("{many} cells corrupt memory"),
            (_, 1) => "1 cell goes past the IOMMU".to_owned(),
            (_, many) => format!("{many} cells go past the IOMMU"),
        };
        let title = match here.iter().filter(|cell| cell.is_real()).count() {
            0 => what,
            real => format!("{what}, {real} of them real"),
        };
        // What happens to real guests comes first.
        let mut sides = vec![DangerSide::of(Source::Embedded, "In the proposal's table, embedded", &here)];
        if has_real {
            sides.insert(0, DangerSide::of(Source::Real, "In real guests", &here));
        }
        Self { verdict: VerdictWord::of(observed), title, meaning: words::meaning(observed), sides }
    }
}

impl<'t> DangerSide<'t> {
    fn of(source: Source, title: &'static str, cells: &[&Cell<'t>]) -> Self {
        let mut places: Vec<DangerPlace<'t>> = Vec::new();
        for &cell in cells.iter().filter(|cell| cell.record.source == source) {
            let platform = platform_title(&cell.record.platform);
            let driver = driver_title(&cell.record.driver);
            let corrupts = cell.record.observed == Observed::Verdict(Verdict::Corrupts);
            let why = corrupts.then_some(cell.record.why.as_str());
            let lines = match places.iter_mut().position(|place| place.platform == platform) {
                Some(index) => &mut places[index].lines,
                None => {
                    places.push(DangerPlace { platform, lines: Vec::new() });
                    &mut places.last_mut().expect("was pushed").lines
                }
            };
            match lines.iter_mut().find(|line| (&line.driver, line.why) == (&driver, why)) {
                Some(line) => line.cells.push(cell.clone()),
                None => lines.push(DangerLine { driver, cells: vec![cell.clone()], why }),
            }
        }
        Self { title, places }
    }
}

fn section<'t>(group: Group<'t>, ids: &mut Ids) -> Section<'t> {
    let rows = group.rows.into_iter().map(|row| Row {
        driver: row.driver,
        driver_title: driver_title(row.driver),
        device_title: device_title(row.device),
        embedded: row.embedded.into_iter().map(|record| cell(record, ids)).collect(),
        real: row.real.into_iter().map(|record| cell(record, ids)).collect(),
    });
    let rows = rows.collect();
    let id = ids.unique(&["platform", group.platform]);
    Section { id, platform: group.platform, title: platform_title(group.platform), rows }
}

fn cell<'t>(record: &'t Record, ids: &mut Ids) -> Cell<'t> {
    Cell {
        id: ids.unique(&[record.source.slug(), &record.platform, &record.driver, &record.device]),
        verdict: VerdictWord::of(record.observed),
        agreement: AgreementWord::of(record),
        evidence: evidence::entries(record),
        record,
    }
}

/// Links that a reader can read, and that stay the same from run to run.
#[derive(Default)]
struct Ids(HashMap<String, usize>);

impl Ids {
    fn unique(&mut self, names: &[&str]) -> String {
        let plain = |name: &&str| -> String {
            name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect()
        };
        let id = names.iter().map(plain).collect::<Vec<_>>().join(".");
        let seen = self.0.entry(id.clone()).or_default();
        *seen += 1;
        if *seen == 1 { id } else { format!("{id}.{seen}") }
    }
}

fn counts(cells: &[&Cell<'_>], sources: &[(Source, &str)]) -> Vec<Count> {
    let count = |observed| {
        let of = |source| {
            let fits = |cell: &&&Cell<'_>| (cell.record.observed, cell.record.source) == (observed, source);
            cells.iter().filter(fits).count()
        };
        Count { verdict: VerdictWord::of(observed), numbers: sources.iter().map(|(source, _)| of(*source)).collect() }
    };
    words::worst_first().map(count).filter(|count| count.numbers.iter().any(|&number| number > 0)).collect()
}

fn facets(cells: &[&Cell<'_>]) -> Vec<Facet> {
    let cases = Case::all();
    let proposal = |name: &dyn Fn(&Case) -> (String, String)| unique(cases.iter().map(name));
    let real = |name: &dyn Fn(&Record) -> &str| {
        let real = cells.iter().filter(|cell| cell.is_real());
        unique(real.map(|cell| (name(cell.record).to_owned(), name(cell.record).to_owned())))
    };
    let both = |name, proposal, real| Facet {
        name,
        lists: vec![
            FacetList { label: "as the proposal tells them apart", options: proposal },
            FacetList { label: "real", options: real },
        ],
    };
    let verdicts = words::worst_first().filter(|seen| cells.iter().any(|cell| cell.record.observed == *seen));
    let verdicts = verdicts.map(VerdictWord::of).map(|word| (word.slug.to_owned(), word.word)).collect();
    let sources = unique(cells.iter().map(|cell| (cell.source().to_owned(), cell.source().to_owned())));
    vec![
        both(
            "platform",
            proposal(&|case| (case.platform_slug().into(), case.platform.to_string())),
            real(&|record| &record.platform),
        ),
        both(
            "driver",
            proposal(&|case| (case.driver.slug().into(), case.driver.to_string())),
            real(&|record| &record.driver),
        ),
        both(
            "device",
            proposal(&|case| (case.device_slug().into(), case.device.to_string())),
            real(&|record| &record.device),
        ),
        Facet { name: "verdict", lists: vec![FacetList { label: "worst first", options: verdicts }] },
        Facet { name: "source", lists: vec![FacetList { label: "seen", options: sources }] },
    ]
}

fn unique(options: impl Iterator<Item = (String, String)>) -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = Vec::new();
    for option in options {
        if !all.contains(&option) {
            all.push(option);
        }
    }
    all
}

/// With what the page was made, and when its real cells ran.
fn made(table: &Table) -> Vec<(&'static str, String)> {
    let Provenance { kernels, qemus, dates } = Provenance::of(table);
    let ours = format!("Ringfence {}", env!("CARGO_PKG_VERSION"));
    let lines = [("made by", vec![ours]), ("kernels", kernels), ("QEMU", qemus), ("real cells ran on", dates)];
    lines.into_iter().filter(|(_, told)| !told.is_empty()).map(|(name, told)| (name, told.join("; "))).collect()
}

/// The hash by which a page allows a text of its own.
fn integrity(text: &str) -> String {
    format!("sha256-{}", base64(&Sha256::digest(text)))
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let word = three.iter().fold(0u32, |word, &byte| word << 8 | u32::from(byte)) << (8 * (3 - three.len()));
        (0..4).for_each(|digit| match digit <= three.len() {
            true => text.push(DIGITS[(word >> (18 - 6 * digit) & 63) as usize].into()),
            false => text.push('='),
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::base64;

    #[test]
    fn base64_pads() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }
}
