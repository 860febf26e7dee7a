//! What the proposal says of each cell: its sentences, the cells that each is about, and where it is known to be wrong.
//!
//! All of that is data (`data/proposal.json`), for people to read and to argue with.

use crate::world::Flag;
use crate::{Case, Select, Verdict};
use serde::{Deserialize, Deserializer, de};
use std::sync::LazyLock;

/// The proposal, sentence by sentence.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Proposal {
    /// In the order of the text.
    pub sentences: Vec<Sentence>,
    /// Where what is observed is known to differ, and why.
    pub disagreements: Vec<Disagreement>,
}

/// A sentence, or a part of one that is about cells of its own.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sentence {
    /// A short name.
    pub id: String,
    /// The words, with what was left out or filled in in brackets.
    pub text: String,
    /// The cells that it is about.
    pub cells: Select,
    /// What it lets happen there; everything where there is none.
    #[serde(default, deserialize_with = "verdicts")]
    pub verdicts: Vec<Verdict>,
    /// What it lets become of the flag; everything where there is none.
    #[serde(default, deserialize_with = "flags")]
    pub flag: Vec<Flag>,
}

/// A disagreement that is expected.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disagreement {
    /// With which sentence, by name.
    pub sentence: String,
    /// In which cells.
    pub cells: Select,
    /// What happens there instead. Anything else is unexpected.
    #[serde(deserialize_with = "verdicts")]
    pub verdicts: Vec<Verdict>,
    /// Why.
    pub why: String,
}

/// What comes of comparing a cell with the proposal.
#[derive(Clone, Copy, Debug)]
pub enum Agreement<'p> {
    /// No sentence is about it.
    Silent,
    /// The proposal's author was unsure.
    Unsure(&'p Sentence),
    /// It is as every sentence about it has it.
    Agrees,
    /// It is not as this sentence has it, for a reason that is known.
    Expected(&'p Sentence, &'p Disagreement),
    /// It is not as this sentence has it.
    Unexpected(&'p Sentence),
}

static PROPOSAL: LazyLock<Proposal> = LazyLock::new(|| {
    serde_json::from_str(include_str!("../data/proposal.json")).expect("data that a test has read before")
});

impl Proposal {
    /// The proposal.
    pub fn the() -> &'static Proposal {
        &PROPOSAL
    }

    /// The sentences about a cell.
    pub fn about(&self, case: Case) -> impl Iterator<Item = &Sentence> {
        self.sentences.iter().filter(move |sentence| sentence.cells.matches(&case))
    }

    /// Compares what was seen of a cell with every sentence about it. An unexpected disagreement comes before an expected
    /// one.
    pub fn compare(&self, case: Case, flag: Flag, verdict: Verdict) -> Agreement<'_> {
        self.compare_knowing(case, flag, verdict, |sentence| {
            self.disagreements.iter().find(|known| known.is_of(sentence, verdict) && known.cells.matches(&case))
        })
    }

    /// The same, with other disagreements expected: `known` finds one with the sentence of a name.
    pub(crate) fn compare_knowing<'p>(
        &'p self,
        case: Case,
        flag: Flag,
        verdict: Verdict,
        known: impl Fn(&str) -> Option<&'p Disagreement>,
    ) -> Agreement<'p> {
        let mut agreement = Agreement::Silent;
        for sentence in self.about(case) {
            if sentence.is_unsure() {
                return Agreement::Unsure(sentence);
            }
            if sentence.holds(verdict, flag) {
                agreement = match agreement {
                    Agreement::Silent => Agreement::Agrees,
                    other => other,
                };
                continue;
            }
            agreement = match (known(&sentence.id), agreement) {
                (None, _) => return Agreement::Unexpected(sentence),
                (Some(_), first @ Agreement::Expected(..)) => first,
                (Some(known), _) => Agreement::Expected(sentence, known),
            };
        }
        agreement
    }
}

impl Disagreement {
    /// Whether it is with that sentence, and with this verdict.
    pub(crate) fn is_of(&self, sentence: &str, verdict: Verdict) -> bool {
        self.sentence == sentence && self.verdicts.contains(&verdict)
    }
}

impl Sentence {
    /// Whether it says that its author does not know.
    pub fn is_unsure(&self) -> bool {
        self.verdicts.is_empty() && self.flag.is_empty()
    }

    /// Whether it lets this happen.
    pub fn holds(&self, verdict: Verdict, flag: Flag) -> bool {
        (self.verdicts.is_empty() || self.verdicts.contains(&verdict))
            && (self.flag.is_empty() || self.flag.contains(&flag))
    }
}

impl Flag {
    /// Its name in data.
    pub fn slug(self) -> &'static str {
        match self {
            Flag::NotOffered => "not-offered",
            Flag::Taken => "taken",
            Flag::NotTaken => "not-taken",
        }
    }
}

impl<'de> Deserialize<'de> for Select {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(de::Error::custom)
    }
}

fn verdicts<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Verdict>, D::Error> {
    Vec::<String>::deserialize(from)?.iter().map(|name| known(name, verdict(name))).collect()
}

fn flags<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Flag>, D::Error> {
    Vec::<String>::deserialize(from)?.iter().map(|name| known(name, flag(name))).collect()
}

/// A verdict by its name.
pub(crate) fn verdict_named<'de, D: Deserializer<'de>>(from: D) -> Result<Verdict, D::Error> {
    let name = String::deserialize(from)?;
    known(&name, verdict(&name))
}

/// What became of the flag, by its name.
pub(crate) fn flag_named<'de, D: Deserializer<'de>>(from: D) -> Result<Flag, D::Error> {
    let name = String::deserialize(from)?;
    known(&name, flag(&name))
}

fn verdict(name: &str) -> Option<Verdict> {
    Verdict::ALL.into_iter().find(|verdict| verdict.slug() == name)
}

fn flag(name: &str) -> Option<Flag> {
    [Flag::NotOffered, Flag::Taken, Flag::NotTaken].into_iter().find(|flag| flag.slug() == name)
}

fn known<T, E: de::Error>(name: &str, found: Option<T>) -> Result<T, E> {
    found.ok_or_else(|| de::Error::custom(format!("what is '{name}'?")))
}
