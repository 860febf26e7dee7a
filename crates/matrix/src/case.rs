use crate::real;
use crate::record::Source;
use ringfence_policy::{DeviceKind, Platform};
use std::fmt;
use std::str::FromStr;

/// A cell's place in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Where driver and device meet.
    pub platform: Platform,
    /// The driver.
    pub driver: DriverKind,
    /// The device.
    pub device: DeviceKind,
}

/// The kinds of driver that the proposal tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriverKind {
    /// Does not know the flag.
    Old,
    /// Takes the flag wherever it is offered.
    New,
    /// The same, and refuses devices without the flag that appear to be behind an IOMMU.
    Refusing,
    /// The same, with an allow-list that names this device, and how it reaches memory.
    Allowing,
}

impl DriverKind {
    /// Every kind, in the order of the table.
    pub const ALL: [DriverKind; 4] = [DriverKind::Old, DriverKind::New, DriverKind::Refusing, DriverKind::Allowing];

    /// The kind's name in reports and in selections.
    pub fn slug(self) -> &'static str {
        match self {
            DriverKind::Old => "old",
            DriverKind::New => "new",
            DriverKind::Refusing => "refusing",
            DriverKind::Allowing => "allowing",
        }
    }
}

impl fmt::Display for DriverKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            DriverKind::Old => "old",
            DriverKind::New => "new",
            DriverKind::Refusing => "refusing",
            DriverKind::Allowing => "refusing, but allowed",
        })
    }
}

impl Case {
    /// Every cell, row by row.
    pub fn all() -> Vec<Case> {
        let drivers = |platform| DriverKind::ALL.map(|driver| (platform, driver));
        let devices = |(platform, driver)| DeviceKind::ALL.map(|device| Case { platform, driver, device });
        Platform::ALL.into_iter().flat_map(drivers).flat_map(devices).collect()
    }

    /// The platform's name in reports and in selections.
    pub fn platform_slug(self) -> &'static str {
        match self.platform {
            Platform::X86 => "x86",
            Platform::X86Iommu => "x86-iommu",
            Platform::Xen => "xen",
            Platform::XenGrants => "xen-grants",
            Platform::PpcProposed => "ppc-proposed",
            Platform::PpcToday => "ppc-today",
            Platform::Arm64 => "arm64",
            Platform::Arm64Smmu => "arm64-smmu",
        }
    }

    /// The device's name in reports and in selections.
    pub fn device_slug(self) -> &'static str {
        match self.device {
            DeviceKind::OldEmulated => "old-emulated",
            DeviceKind::NewEmulated => "new-emulated",
            DeviceKind::NewEmulatedRequiring => "new-emulated-requiring",
            // By the proposal's words it is a new device, whatever it is inside.
            DeviceKind::Wrapped => "new-wrapped",
            DeviceKind::OldPhysical => "old-physical",
            DeviceKind::NewPhysical => "new-physical",
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "platform={} driver={} device={}", self.platform_slug(), self.driver.slug(), self.device_slug())
    }
}

/// Some of the cells: `platform=xen|x86* driver!=old`. Terms are separated by blanks or commas, and all of them hold;
/// of the names of one term, one. A `*` at a name's end stands for any rest. No term at all: every cell. Semicolons
/// separate selections of which one is enough.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Select(Vec<Vec<Term>>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Term {
    key: Key,
    negated: bool,
    names: Vec<String>,
}

/// What a selection can ask of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    Source,
    Platform,
    Driver,
    Device,
}

/// A selection that can't be understood, or that names what there is not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectError {
    /// Not of the form `key=name` or `key!=name`.
    #[error("'{0}' is not of the form KEY=NAME or KEY!=NAME")]
    Form(String),
    /// No such key.
    #[error("'{0}' is not a key: expected source, platform, driver or device")]
    Key(String),
    /// Nothing has that name.
    #[error("no {key} is called '{name}': there are {known}")]
    Name {
        /// Of which kind.
        key: String,
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
}

impl Select {
    /// Whether `case` is one of them.
    pub fn matches(&self, case: &Case) -> bool {
        self.matches_names(|key| vec![key.of(case)])
    }

    /// Whether a cell is one of them that is called by these names, any of which may be asked for.
    pub(crate) fn matches_names<'n>(&self, names: impl Fn(Key) -> Vec<&'n str>) -> bool {
        let holds = |term: &Term| {
            let called = names(term.key);
            let wanted = |name: &String| called.iter().any(|called| fits(name, called));
            term.names.iter().any(wanted) != term.negated
        };
        self.0.iter().any(|terms| terms.iter().all(holds))
    }

    /// Those of them that `other` selects too.
    pub fn and(&self, other: &Select) -> Select {
        let both =
            |ours: &Vec<Term>| other.0.iter().map(|theirs| [theirs.as_slice(), ours].concat()).collect::<Vec<_>>();
        Select(self.0.iter().flat_map(both).collect())
    }
}

/// Every cell.
impl Default for Select {
    fn default() -> Self {
        Select(vec![Vec::new()])
    }
}

/// As it is written.
impl fmt::Display for Select {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let selections = self.0.iter().map(|terms| terms.iter().map(Term::to_string).collect::<Vec<_>>().join(" "));
        f.write_str(&selections.collect::<Vec<_>>().join("; "))
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}{}", self.key.name(), if self.negated { "!=" } else { "=" }, self.names.join("|"))
    }
}

impl Key {
    const ALL: [Key; 4] = [Key::Source, Key::Platform, Key::Driver, Key::Device];

    fn name(self) -> &'static str {
        match self {
            Key::Source => "source",
            Key::Platform => "platform",
            Key::Driver => "driver",
            Key::Device => "device",
        }
    }

    fn of(self, case: &Case) -> &'static str {
        match self {
            Key::Source => Source::Embedded.slug(),
            Key::Platform => case.platform_slug(),
            Key::Driver => case.driver.slug(),
            Key::Device => case.device_slug(),
        }
    }
}

fn fits(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => name == pattern,
    }
}

impl FromStr for Select {
    type Err = SelectError;

    fn from_str(text: &str) -> Result<Self, SelectError> {
        let selection = |text: &str| {
            let terms = text.split([' ', ',', '\t', '\n']).filter(|term| !term.is_empty());
            terms.map(str::parse).collect::<Result<Vec<_>, _>>()
        };
        // Between two semicolons there is no selection, rather than one of everything.
        let selections = text.split(';').map(selection);
        let selections = selections.filter(|terms| !matches!(terms, Ok(terms) if terms.is_empty()));
        let selections = selections.collect::<Result<Vec<_>, _>>()?;
        Ok(if selections.is_empty() { Select::default() } else { Select(selections) })
    }
}

impl FromStr for Term {
    type Err = SelectError;

    fn from_str(text: &str) -> Result<Self, SelectError> {
        let (key, names) = text.split_once('=').ok_or_else(|| SelectError::Form(text.into()))?;
        let (key, negated) = key.strip_suffix('!').map_or((key, false), |key| (key, true));
        let kind = Key::ALL.into_iter().find(|kind| kind.name() == key);
        let kind = kind.ok_or_else(|| SelectError::Key(key.into()))?;
        let mut known: Vec<_> = Case::all().iter().map(|case| kind.of(case)).collect();
        known.extend(real::Cell::all().iter().flat_map(|cell| cell.names(kind)));
        known.sort_unstable();
        known.dedup();
        let names: Vec<String> = names.split('|').map(str::to_owned).collect();
        match names.iter().find(|name| !known.iter().any(|known| fits(name, known))) {
            Some(name) => Err(SelectError::Name { key: key.into(), name: name.clone(), known: known.join(", ") }),
            None => Ok(Term { key: kind, negated, names }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selections() {
        for (text, count) in [
            ("", 192),
            ("platform=xen", 24),
            ("platform=x86*", 48),
            ("platform=x86", 24),
            ("platform!=x86*|xen*  driver=old", 24),
            ("device=old-*,driver!=old,platform=xen|arm64*", 18),
            ("platform=xen platform=x86", 0),
            ("source=embedded", 192),
            ("source=real", 0),
            ("platform=xen driver=old; platform=xen driver=new", 12),
            (" ;; platform=xen; ; platform=xen; ", 24),
            (";", 192),
        ] {
            let select: Select = text.parse().unwrap();
            assert_eq!(Case::all().iter().filter(|case| select.matches(case)).count(), count, "{text}");
            assert_eq!(select.to_string().parse(), Ok(select));
        }
        for (text, error) in
            [("xen", SelectError::Form("xen".into())), ("colour=red", SelectError::Key("colour".into()))]
        {
            assert_eq!(text.parse::<Select>(), Err(error));
        }
        let error = "driver=older".parse::<Select>().unwrap_err();
        let known = "allowing, linux, linux-legacy, new, old, refusing, ringfence, ringfence-allowing, virtio-drivers";
        assert_eq!(error.to_string(), format!("no driver is called 'older': there are {known}"));
    }
}
