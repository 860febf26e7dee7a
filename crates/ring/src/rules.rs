/// How a ring is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Format {
    /// Descriptor table, avail ring and used ring (§2.7).
    #[default]
    Split,
    /// One descriptor ring that both sides write, and two event suppression structures (§2.8).
    Packed,
}

/// How each side says whether it wants to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Notifications {
    /// Wanted or not wanted (§2.7.7, §2.8.10 without descriptor events).
    #[default]
    Flags,
    /// Wanted once the other side has come past a given entry (§2.7.10, §2.8.10).
    EventIdx,
}

/// Whether a descriptor may refer to a table of descriptors elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Indirect {
    /// It was not agreed on: a driver that does so breaks the rules.
    #[default]
    Refused,
    /// As §2.7.5.3 and §2.8.7 have it.
    Allowed,
}

/// What driver and device agreed on for their queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Rules {
    /// How the rings are laid out.
    pub format: Format,
    /// How each side says whether it wants to be told.
    pub notifications: Notifications,
    /// Whether tables of descriptors are allowed.
    pub indirect: Indirect,
}
