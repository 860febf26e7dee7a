//! Ready-made mappers: what a platform without an IOMMU needs, and two that stand in front of another mapper.
//!
//! | mapper | the device reaches | price a request |
//! | --- | --- | --- |
//! | [`Direct`] | everything | none |
//! | [`Premapped`] | everything that was mapped once | a look at a short table |
//! | [`Bounce`] | its pool | a copy |
//! | an IOMMU's own, strict | what is under way | a mapping, its undoing, an invalidation |

mod bounce;
mod direct;
mod premapped;

pub use bounce::Bounce;
pub use direct::Direct;
pub use premapped::Premapped;

/// Rings and pools are cut in pages of this size: §2.7 and §2.8 want no more than 4096 for any part of a ring.
const PAGE: usize = 4096;
