//! The whole table, and what it says of itself.

use ringfence_matrix::proposal::Proposal;
use ringfence_matrix::report::Cell;
use ringfence_matrix::{Case, Genuine, Matrix, Select, Verdict};

#[test]
fn every_cell() {
    let matrix = Matrix::run(&Select::default(), &Genuine);
    insta::assert_snapshot!(matrix.to_string());
    assert_eq!(matrix.unexpected().count(), 0);
}

/// What makes 'translated' more than a word.
#[test]
fn who_works_translated_sent_other_addresses_and_was_stopped() {
    let matrix = Matrix::run(&Select::default(), &Genuine);
    for cell in matrix.cells.iter().filter(|cell| cell.observed == Verdict::WorksTranslated) {
        let evidence = &cell.evidence;
        assert!(!evidence.addresses.is_empty(), "{}", cell.case);
        for address in &evidence.addresses {
            assert!(address.guest.as_ref().is_some_and(|guest| *guest != address.bus), "{}: {address:?}", cell.case);
        }
        for (page, why) in [(&evidence.forbidden_page, "forbids it"), (&evidence.returned_page, "nothing is mapped")] {
            let stopped = page.as_deref().unwrap_or_default();
            assert!(stopped.starts_with("stopped: write") && stopped.contains(why), "{}: {stopped}", cell.case);
        }
    }
}

/// A reason for a disagreement that there is not would hide the next one.
#[test]
fn every_disagreement_that_is_expected_happens() {
    for known in &Proposal::the().disagreements {
        let sentence = Proposal::the().sentences.iter().find(|sentence| sentence.id == known.sentence);
        let sentence = sentence.unwrap_or_else(|| panic!("no sentence is called '{}'", known.sentence));
        let cells = Matrix::run(&known.cells, &Genuine).cells;
        let happens = |verdict| cells.iter().any(|cell| cell.observed == verdict);
        assert!(known.verdicts.iter().all(|&verdict| happens(verdict)), "{known:?}");
        for Cell { case, observed, flag, .. } in cells {
            assert!(sentence.cells.matches(&case), "{case}: '{}' is not about it", sentence.text);
            assert!(!sentence.holds(observed, flag), "{case}: '{}' holds", sentence.text);
        }
    }
}

#[test]
fn every_sentence_is_about_some_cell() {
    for sentence in &Proposal::the().sentences {
        assert!(Case::all().iter().any(|case| sentence.cells.matches(case)), "{}", sentence.text);
    }
}
