//! docs/matrix.md says sentence by sentence what the matrix says.

use ringfence_matrix::proposal::{Agreement, Proposal, Sentence};
use ringfence_matrix::report::Cell;
use ringfence_matrix::{Genuine, Matrix, Select, Verdict};
use std::fmt::Write;
use std::{env, fs, path};

const BEGIN: &str = "<!-- sentences: begin -->\n";
const END: &str = "<!-- sentences: end -->\n";

#[test]
fn the_page_is_in_step() {
    let path = path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/matrix.md");
    let page = fs::read_to_string(&path).unwrap();
    let (before, rest) = page.split_once(BEGIN).expect("where the table begins");
    let (_, after) = rest.split_once(END).expect("where the table ends");
    let expected = format!("{before}{BEGIN}{}{END}{after}", table());
    if page != expected && env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, &expected).unwrap();
    } else {
        assert!(page == expected, "docs/matrix.md is not in step: run this test with UPDATE_DOCS=1");
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
