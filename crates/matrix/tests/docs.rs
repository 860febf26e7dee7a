//! docs/matrix.md says sentence by sentence what the matrix says; docs/compatibility.md is both matrices, the real one as
//! docs/compatibility.json has it.
//!
//! With `UPDATE_DOCS=1` they are written anew, and with `REAL_RUN=FILE`, which `ringfence matrix --real --format json`
//! wrote, the real cells that this has are those from then on.

use ringfence_matrix::proposal::{Agreement, Proposal, Sentence};
use ringfence_matrix::real;
use ringfence_matrix::record::{Record, SCHEMA, Table};
use ringfence_matrix::report::Cell;
use ringfence_matrix::{Genuine, Matrix, Select, Verdict, compatibility};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

const BEGIN: &str = "<!-- sentences: begin -->\n";
const END: &str = "<!-- sentences: end -->\n";

#[test]
fn the_sentences_are_in_step() {
    let page = fs::read_to_string(docs("matrix.md")).unwrap();
    let (before, rest) = page.split_once(BEGIN).expect("where the table begins");
    let (_, after) = rest.split_once(END).expect("where the table ends");
    in_step("matrix.md", &format!("{before}{BEGIN}{}{END}{after}", table()));
}

#[test]
fn the_compatibility_is_in_step() {
    let data = docs("compatibility.json");
    if let (true, Some(run)) = (updating(), env::var_os("REAL_RUN")) {
        let [stored, run] =
            [&*data, Path::new(&run)].map(|file| Table::from_json(&fs::read_to_string(file).unwrap()).unwrap());
        fs::write(&data, serde_json::to_string_pretty(&renewed(stored, kept(run))).unwrap() + "\n").unwrap();
    }
    let stored = Table::from_json(&fs::read_to_string(&data).unwrap()).unwrap();
    assert_eq!(kept(stored.clone()), stored, "docs/compatibility.json holds more than a reader needs");
    let mut both = Matrix::run(&Select::default(), &Genuine).table();
    both.cells.extend(stored.cells);
    in_step("compatibility.md", &compatibility::page(&both));
}

/// What is stored, with the cells of a run in the place of earlier ones, in the order in which all run.
fn renewed(stored: Table, run: Table) -> Table {
    let name = |cell: &Record| format!("{} {} {}", cell.platform, cell.driver, cell.device);
    let newer: Vec<_> = run.cells.iter().map(name).collect();
    let older = stored.cells.into_iter().filter(|cell| !newer.contains(&name(cell)));
    let mut cells: Vec<_> = older.chain(run.cells).collect();
    let order: Vec<_> = real::Cell::all().iter().map(ToString::to_string).collect();
    cells.sort_by_key(|cell| order.iter().position(|known| *known == name(cell)).unwrap_or(usize::MAX));
    Table { schema: SCHEMA, cells }
}

/// What is worth keeping of a real run: its cells, without what is about the machine that it ran on.
fn kept(run: Table) -> Table {
    let mut cells = run.into_real(&Select::default());
    for cell in &mut cells {
        cell.evidence.retain(|name, _| !["command", "log"].contains(&name.as_str()));
    }
    Table { schema: SCHEMA, cells }
}

fn docs(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(name)
}

fn updating() -> bool {
    env::var_os("UPDATE_DOCS").is_some()
}

fn in_step(name: &str, expected: &str) {
    let page = fs::read_to_string(docs(name)).unwrap_or_default();
    if page != expected && updating() {
        fs::write(docs(name), expected).unwrap();
    } else {
        assert!(page == expected, "docs/{name} is not in step: run this test with UPDATE_DOCS=1");
    }
}

fn table() -> String {
    let matrix = Matrix::run(&Select::default(), &Genuine);
    let mut table = String::from("| | sentence | cells | verdict |\n| --- | --- | --- | --- |\n");
    for (index, sentence) in Proposal::the().sentences.iter().enumerate() {
        let cells: Vec<_> = matrix.cells.iter().filter(|cell| sentence.cells.matches(&cell.case)).collect();
        let select = sentence.cells.to_string().replace('|', "\\|");
        let verdict = verdict(sentence, &cells);
        writeln!(table, "| {} | {} | {}: `{select}` | {verdict} |", index + 1, sentence.text, cells.len()).unwrap();
    }
    table
}

fn verdict(sentence: &Sentence, cells: &[&Cell]) -> String {
    let (holds, not): (Vec<&Cell>, Vec<&Cell>) =
        cells.iter().partition(|cell| sentence.holds(cell.observed, cell.flag));
    let mut text = match (sentence.is_unsure(), not.is_empty()) {
        (true, _) => format!("observed: {}", counts(&holds)),
        (false, true) => format!("**so**: {}", counts(&holds)),
        (false, false) if holds.is_empty() => String::new(),
        (false, false) => format!("**so** in {}: {}. ", holds.len(), counts(&holds)),
    };
    if !not.is_empty() {
        write!(text, "**not so** in {}: {}.", not.len(), counts(&not)).unwrap();
        let known = Proposal::the().disagreements.iter().filter(|known| known.sentence == sentence.id);
        known.for_each(|known| write!(text, " {}", known.why).unwrap());
    }
    assert!(cells.iter().all(|cell| !matches!(cell.agreement, Agreement::Unexpected(_))));
    text
}

fn counts(cells: &[&Cell]) -> String {
    let of = |verdict| cells.iter().filter(|cell| cell.observed == verdict).count();
    let seen = Verdict::ALL.into_iter().filter(|&verdict| of(verdict) > 0);
    seen.map(|verdict| format!("{} `{}`", of(verdict), verdict.slug())).collect::<Vec<_>>().join(", ")
}
