//! What the proposal says of each cell: its sentences, the cells that each is about, and where it is known to be wrong.
//!
//! All of that is data (`data/proposal.json`), for people to read and to argue with.

use crate::world::{Flag, Observation};
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
    pub fn compare(&self, case: Case, seen: &Observation, verdict: Verdict) -> Agreement<'_> {
        let mut agreement = Agreement::Silent;
        for sentence in self.about(case) {
            if sentence.is_unsure() {
                return Agreement::Unsure(sentence);
            }
            if sentence.holds(verdict, seen.flag) {
                agreement = match agreement {
                    Agreement::Silent => Agreement::Agrees,
                    other => other,
                };
                continue;
            }
            let known = |known: &&Disagreement| {
                known.sentence == sentence.id && known.cells.matches(&case) && known.verdicts.contains(&verdict)
            };
            agreement = match (self.disagreements.iter().find(known), agreement) {
                (None, _) => return Agreement::Unexpected(sentence),
                (Some(_), first @ Agreement::Expected(..)) => first,
                (Some(known), _) => Agreement::Expected(sentence, known),
            };
        }
        agreement
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
    named(from, |name| Verdict::ALL.into_iter().find(|verdict| verdict.slug() == name))
}

fn flags<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Flag>, D::Error> {
    named(from, |name| [Flag::NotOffered, Flag::Taken, Flag::NotTaken].into_iter().find(|flag| flag.slug() == name))
}

fn named<'de, D: Deserializer<'de>, T>(from: D, find: impl Fn(&str) -> Option<T>) -> Result<Vec<T>, D::Error> {
    let names = Vec::<String>::deserialize(from)?;
    let values = names.iter().map(|name| find(name).ok_or_else(|| de::Error::custom(format!("what is '{name}'?"))));
    values.collect()
}
