//! A cell as it is written down, wherever it was observed: what the JSON holds, and what every report is made from.
//!
//! docs/matrix.md describes the JSON field by field.

use crate::case::Key;
use crate::sides::place;
use crate::{Select, Verdict};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::{Map, Value};
use std::fmt;

/// The version of the JSON: it changes when a field changes its meaning or goes.
pub const SCHEMA: u32 = 1;

/// Cells, written down.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Table {
    /// [`SCHEMA`].
    pub schema: u32,
    /// In the order in which they are shown.
    pub cells: Vec<Record>,
}

impl Table {
    /// Reads what was written as JSON.
    ///
    /// # Errors
    ///
    /// It is no JSON of this kind, or of another version: nothing is guessed.
    pub fn from_json(text: &str) -> Result<Self, ReadError> {
        #[derive(Deserialize)]
        struct Version {
            schema: Option<Value>,
        }
        let version: Version = serde_json::from_str(text)?;
        match version.schema {
            Some(schema) if schema == SCHEMA => Ok(serde_json::from_str(text)?),
            Some(schema) => Err(ReadError::Schema(schema.to_string())),
            None => Err(ReadError::NoSchema),
        }
    }

    /// Its real cells that are in `select`, by their own names or those of what they stand for.
    pub fn into_real(self, select: &Select) -> Vec<Record> {
        self.cells.into_iter().filter(|cell| cell.source == Source::Real && cell.is_in(select)).collect()
    }
}

impl Record {
    fn is_in(&self, select: &Select) -> bool {
        let (platform, driver, device) = place(self);
        select.matches_names(|key| match key {
            Key::Source => vec![self.source.slug()],
            Key::Platform => vec![&self.platform, platform],
            Key::Driver => vec![&self.driver, driver],
            Key::Device => vec![&self.device, device],
        })
    }
}

/// A table that can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Not JSON, or not the fields that it should have.
    #[error("not a matrix as JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// It does not say of which version it is.
    #[error("not a matrix as JSON: it has no \"schema\"")]
    NoSchema,
    /// Another version.
    #[error(
        "its schema is {0}, and this ringfence reads schema {SCHEMA}: write it anew, or use the ringfence that wrote it"
    )]
    Schema(String),
}

/// One cell, written down.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Record {
    /// Where driver and device met.
    pub platform: String,
    /// The driver.
    pub driver: String,
    /// The device.
    pub device: String,
    /// How it was observed.
    pub source: Source,
    /// For a real cell: the cell of the proposal's table that it stands for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stands_for: Option<StandsFor>,
    /// What the proposal says of it.
    pub proposal: Proposed,
    /// What happened.
    pub observed: Observed,
    /// Whether every sentence about it holds; `None` where the proposal is unsure or silent, or nothing was observed.
    pub agrees: Option<bool>,
    /// One does not hold, and no reason is known.
    pub unexpected: bool,
    /// In a line, what was seen, and the reason for a disagreement that is expected.
    pub why: String,
    /// What the verdict follows from: by name, a text, a list of texts, or a list of small objects.
    pub evidence: Map<String, Value>,
}

/// How a cell was observed.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// In a machine of the project's own parts, in this process.
    Embedded,
    /// With a real kernel in a real QEMU.
    Real,
}

impl Source {
    /// Its name in data.
    pub fn slug(self) -> &'static str {
        match self {
            Source::Embedded => "embedded",
            Source::Real => "real",
        }
    }
}

/// A cell of the proposal's table, by the names that selections use.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct StandsFor {
    /// See [`Case::platform_slug`](crate::Case::platform_slug).
    pub platform: String,
    /// See [`DriverKind::slug`](crate::DriverKind::slug).
    pub driver: String,
    /// See [`Case::device_slug`](crate::Case::device_slug).
    pub device: String,
}

/// What the proposal says of a cell.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Proposed {
    /// Whether it says anything.
    pub says: Says,
    /// The sentence that does not hold, else the first about this cell.
    pub sentence: Option<String>,
}

/// Whether the proposal says anything of a cell.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Says {
    /// It does.
    Decided,
    /// Its author was unsure.
    Unsure,
    /// No sentence is about it.
    Silent,
}

/// What happened in a cell, or that nothing did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observed {
    /// It was executed.
    Verdict(Verdict),
    /// It could not be executed: `why` tells what was missing.
    Skipped,
}

impl Observed {
    /// Its name in data.
    pub fn slug(self) -> &'static str {
        match self {
            Observed::Verdict(verdict) => verdict.slug(),
            Observed::Skipped => "skipped",
        }
    }
}

/// As a reader says it.
impl fmt::Display for Observed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Observed::Verdict(verdict) => verdict.fmt(f),
            Observed::Skipped => f.pad("skipped"),
        }
    }
}

impl Serialize for Observed {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.slug())
    }
}

impl<'de> Deserialize<'de> for Observed {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let name = String::deserialize(from)?;
        let all = Verdict::ALL.map(Observed::Verdict).into_iter().chain([Observed::Skipped]);
        let known = all.into_iter().find(|observed| observed.slug() == name);
        known.ok_or_else(|| de::Error::custom(format!("no verdict is called '{name}'")))
    }
}
