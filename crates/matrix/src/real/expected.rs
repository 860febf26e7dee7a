//! What should come of the real cells, and where the proposal is known to be wrong about them: data.

use std::sync::LazyLock;

use serde::Deserialize;

use super::Cell;
use crate::Select;
use crate::proposal::{Agreement, Disagreement, Proposal, flag_named, verdict_named};
use crate::verdict::Verdict;
use crate::world::Flag;

/// All of it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Expectations {
    /// The first that is about a cell counts.
    expected: Vec<Expected>,
    disagreements: Vec<Disagreement>,
}

/// What should come of some cells.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Expected {
    cells: Select,
    #[serde(deserialize_with = "verdict_named")]
    pub(crate) verdict: Verdict,
    #[serde(deserialize_with = "flag_named")]
    pub(crate) flag: Flag,
    /// The device status in the end, where that is the point.
    #[serde(default)]
    pub(crate) status: Option<String>,
    /// A word on it, for the cells where the verdict may surprise.
    #[serde(default)]
    pub(crate) why: Option<String>,
}

static EXPECTATIONS: LazyLock<Expectations> = LazyLock::new(|| {
    serde_json::from_str(include_str!("../../data/real.json")).expect("data that a test has read before")
});

/// What should come of `cell`.
pub(crate) fn of(cell: &Cell) -> Option<&'static Expected> {
    EXPECTATIONS.expected.iter().find(|expected| cell.is_in(&expected.cells))
}

/// Compares what was seen of a cell with every sentence about the cell that it stands for.
pub(crate) fn compare(cell: &Cell, flag: Flag, verdict: Verdict) -> Agreement<'static> {
    Proposal::the().compare_knowing(cell.case(), flag, verdict, |sentence| {
        EXPECTATIONS.disagreements.iter().find(|known| known.is_of(sentence, verdict) && cell.is_in(&known.cells))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn something_is_expected_of_every_cell_and_agrees_or_has_its_reason() {
        for cell in Cell::all() {
            let expected = of(&cell).unwrap_or_else(|| panic!("nothing is expected of {cell}"));
            let agreement = compare(&cell, expected.flag, expected.verdict);
            assert!(!matches!(agreement, Agreement::Unexpected(_)), "{cell}, {}: {agreement:?}", expected.verdict);
        }
    }

    #[test]
    fn no_line_of_the_data_is_idle() {
        let cells = Cell::all();
        for expected in &EXPECTATIONS.expected {
            let used = cells.iter().any(|cell| of(cell).is_some_and(|used| std::ptr::eq(used, expected)));
            assert!(used, "{expected:?}");
        }
        for known in &EXPECTATIONS.disagreements {
            let used = |cell: &&Cell| {
                let expected = of(cell).expect("something is");
                let sentence = Proposal::the().about(cell.case()).find(|sentence| sentence.id == known.sentence);
                known.verdicts.contains(&expected.verdict)
                    && cell.is_in(&known.cells)
                    && sentence.is_some_and(|it| !it.holds(expected.verdict, expected.flag))
            };
            assert!(cells.iter().any(|cell| used(&cell)), "{known:?}");
        }
    }
}
