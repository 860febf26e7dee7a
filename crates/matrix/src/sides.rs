//! The embedded and the real matrix, side by side: what every page for readers is made from.

use crate::record::{Record, Source, StandsFor, Table};
use crate::{Case, Verdict};

/// The cells of one platform of the proposal's table, or of a real one that stands for none.
pub(crate) struct Group<'t> {
    /// Its name in data.
    pub(crate) platform: &'t str,
    pub(crate) rows: Vec<Row<'t>>,
}

/// What was seen of one driver with one device.
pub(crate) struct Row<'t> {
    /// By the names of the proposal's table, where it has them.
    pub(crate) driver: &'t str,
    pub(crate) device: &'t str,
    pub(crate) embedded: Vec<&'t Record>,
    /// The real cells that stand for it, in the order in which they ran.
    pub(crate) real: Vec<&'t Record>,
}

/// Puts each real cell beside the embedded one that it stands for. Nothing is lost: a cell that stands for none, or for
/// one that is not there, gets a row of its own.
pub(crate) fn by_platform(table: &Table) -> Vec<Group<'_>> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    let of = |source| table.cells.iter().filter(move |cell| cell.source == source);
    for cell in of(Source::Embedded).chain(of(Source::Real)) {
        let (platform, driver, device) = place(cell);
        let group = position(&mut groups, |group| group.platform == platform, || Group { platform, rows: Vec::new() });
        let row = position(
            &mut group.rows,
            |row| (row.driver, row.device) == (driver, device),
            || Row { driver, device, embedded: Vec::new(), real: Vec::new() },
        );
        match cell.source {
            Source::Embedded => row.embedded.push(cell),
            Source::Real => row.real.push(cell),
        }
    }
    groups
}

/// The one that fits, made if there is none.
fn position<T>(all: &mut Vec<T>, fits: impl Fn(&T) -> bool, make: impl FnOnce() -> T) -> &mut T {
    let index = all.iter().position(fits).unwrap_or_else(|| {
        all.push(make());
        all.len() - 1
    });
    &mut all[index]
}

/// The cell of the proposal's table that `cell` belongs beside: platform, driver, device.
pub(crate) fn place(cell: &Record) -> (&str, &str, &str) {
    match &cell.stands_for {
        Some(StandsFor { platform, driver, device }) => (platform, driver, device),
        None => (&cell.platform, &cell.driver, &cell.device),
    }
}

/// What a platform is called in a text; its name in data where the proposal's table does not have it.
pub(crate) fn platform_title(name: &str) -> String {
    title(name, |case| (case.platform_slug(), case.platform.to_string()))
}

/// The same of a driver.
pub(crate) fn driver_title(name: &str) -> String {
    title(name, |case| (case.driver.slug(), case.driver.to_string()))
}

/// The same of a device.
pub(crate) fn device_title(name: &str) -> String {
    title(name, |case| (case.device_slug(), case.device.to_string()))
}

fn title(name: &str, names: impl Fn(Case) -> (&'static str, String)) -> String {
    let known = Case::all().into_iter().map(names).find(|(slug, _)| *slug == name);
    known.map_or_else(|| name.to_owned(), |(_, title)| title)
}

/// What readers look for first: memory that changes behind its owner's back, or could.
pub(crate) const DANGERS: [Verdict; 2] = [Verdict::Corrupts, Verdict::Bypasses];

/// What of a run is worth knowing once and not in every cell.
pub(crate) struct Provenance {
    /// The kernels that were booted.
    pub(crate) kernels: Vec<String>,
    /// The QEMUs that they ran in.
    pub(crate) qemus: Vec<String>,
    /// The days on which real cells ran.
    pub(crate) dates: Vec<String>,
}

impl Provenance {
    /// From what the evidence of real cells tells.
    pub(crate) fn of(table: &Table) -> Self {
        let all = |name: &str| {
            let real = table.cells.iter().filter(|cell| cell.source == Source::Real);
            let told = real.filter_map(|cell| cell.evidence.get(name)?.as_str()).map(str::to_owned);
            let mut told: Vec<String> = told.collect();
            told.sort_unstable();
            told.dedup();
            told
        };
        Self { kernels: all("kernel"), qemus: all("qemu"), dates: all("date") }
    }
}
