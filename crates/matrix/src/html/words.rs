//! What verdicts and agreements are called on the page. A colour never stands alone: beside it is a glyph and a word.

use crate::Verdict;
use crate::record::{Observed, Record, Says};

/// A verdict as the page shows it.
#[derive(Clone)]
pub(super) struct VerdictWord {
    /// Its name in data.
    pub(super) slug: &'static str,
    pub(super) word: String,
    /// In fonts that every system has.
    pub(super) glyph: &'static str,
    /// Its colours, in page.css.
    pub(super) class: &'static str,
    pub(super) meaning: &'static str,
}

impl VerdictWord {
    pub(super) fn of(observed: Observed) -> Self {
        let (glyph, class) = match observed {
            Observed::Verdict(Verdict::Corrupts) => ("✖", "corrupts"),
            Observed::Verdict(Verdict::Bypasses) => ("↷", "past"),
            Observed::Verdict(Verdict::FailsSilently) => ("?", "fails"),
            Observed::Verdict(Verdict::FailsCleanly) => ("!", "fails"),
            Observed::Verdict(Verdict::RefusedByDriver | Verdict::RefusedByDevice) => ("⊘", "refused"),
            Observed::Verdict(Verdict::WorksUntranslated) => ("=", "plain"),
            Observed::Verdict(Verdict::WorksUnconfined) => ("≈", "half"),
            Observed::Verdict(Verdict::WorksTranslated) => ("✓", "good"),
            Observed::Skipped => ("–", "skipped"),
        };
        Self { slug: observed.slug(), word: observed.to_string(), glyph, class, meaning: meaning(observed) }
    }
}

/// Everything that can be observed, in the order in which a reader wants to know it.
pub(super) fn worst_first() -> impl Iterator<Item = Observed> {
    [
        Verdict::Corrupts,
        Verdict::Bypasses,
        Verdict::FailsSilently,
        Verdict::FailsCleanly,
        Verdict::RefusedByDriver,
        Verdict::RefusedByDevice,
        Verdict::WorksUntranslated,
        Verdict::WorksUnconfined,
        Verdict::WorksTranslated,
    ]
    .into_iter()
    .map(Observed::Verdict)
    .chain([Observed::Skipped])
}

/// A verdict for who has not read docs/matrix.md.
pub(super) fn meaning(observed: Observed) -> &'static str {
    match observed {
        Observed::Verdict(Verdict::Corrupts) => {
            "Bytes changed that nobody had lent to the device, or wrong data came back."
        }
        Observed::Verdict(Verdict::Bypasses) => {
            "It works, and there is an IOMMU; yet the device reaches all of memory, whatever the IOMMU says."
        }
        Observed::Verdict(Verdict::FailsSilently) => "No data moved, and nobody recorded why.",
        Observed::Verdict(Verdict::FailsCleanly) => {
            "The driver gets an error, a fault is recorded, nothing has changed."
        }
        Observed::Verdict(Verdict::RefusedByDriver) => "The driver does not start the device: no ring ran.",
        Observed::Verdict(Verdict::RefusedByDevice) => "The device does not accept the driver: no ring ran.",
        Observed::Verdict(Verdict::WorksUntranslated) => "There is no IOMMU, and none is needed.",
        Observed::Verdict(Verdict::WorksUnconfined) => {
            "Addresses are translated, and nothing is protected: Xen without grants."
        }
        Observed::Verdict(Verdict::WorksTranslated) => {
            "The device reaches what the driver lent to it, and nothing else."
        }
        Observed::Skipped => "Something was missing here: nothing was observed.",
    }
}

/// Whether the proposal has it so.
#[derive(Clone)]
pub(super) struct AgreementWord {
    pub(super) word: &'static str,
    pub(super) class: &'static str,
    /// Comes before the sentence, if there is one.
    pub(super) meaning: &'static str,
}

impl AgreementWord {
    pub(super) fn of(cell: &Record) -> Self {
        let (word, class, meaning) = match (cell.proposal.says, cell.agrees) {
            (_, None | Some(true)) if cell.unexpected => ("UNEXPECTED", "unexpected", "Not as expected. The proposal:"),
            (Says::Silent, _) => ("silent", "silent", "The proposal does not speak of it."),
            (Says::Unsure, _) => ("unsure", "unsure", "The proposal's author was unsure:"),
            (Says::Decided, Some(true)) => ("agrees", "agrees", "As the proposal has it:"),
            (Says::Decided, Some(false)) if cell.unexpected => {
                ("NOT SO", "unexpected", "Not as the proposal has it, for no reason that is known:")
            }
            (Says::Decided, Some(false)) => ("otherwise", "otherwise", "The proposal has it otherwise:"),
            (Says::Decided, None) => ("not seen", "silent", "The proposal says:"),
        };
        Self { word, class, meaning }
    }
}
