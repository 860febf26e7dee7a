//! Ready-made mappers: what a platform without an IOMMU needs, and two that stand in front of another mapper.
//!
//! | mapper | the device reaches | price a request |
//! | --- | --- | --- |
//! | [`Direct`] | everything | none |
//! | [`Premapped`] | everything that was mapped once | a look at a short table |
//! | [`Bounce`] | its pool | a copy |
//! | [`Paged::strict`] | what is under way | a mapping, its undoing, an invalidation |
//! | [`Paged::batched`] | that, and what came back lately | a mapping, its undoing, a part of an invalidation |
//! | [`Xen`] | the machine | a look at a table for each frame, or a copy |
//!
//! [`Paged`] is for a kernel that has an IOMMU ([`Iommu`], behind a [`Window`] of bus addresses) or a Xen grant table
//! ([`Grants`]).

mod bounce;
mod direct;
mod grants;
mod paged;
mod premapped;
mod window;
mod xen;

pub use bounce::Bounce;
pub use direct::Direct;
pub use grants::{GrantAccess, GrantTable, Grants};
pub use paged::{Paged, Pages, Run};
pub use premapped::Premapped;
pub use window::{Iommu, Window};
pub use xen::{FrameTable, Frames, Xen};

/// Rings and pools are cut in pages of this size: §2.7 and §2.8 want no more than 4096 for any part of a ring.
const PAGE: usize = 4096;
