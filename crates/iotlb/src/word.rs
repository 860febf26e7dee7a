//! What the table's slots, branches and leaves hold: words of 64 bits, each of which changes in one store.
//!
//! A cluster that holds several mappings has a leaf, of one of three kinds: see `leaf.rs`. A cluster that is full, and lies in
//! memory as it lies in bus addresses, is a *row*, and needs no leaf: its word says it all.

use crate::leaf::{BASES, Leaf, NarrowLeaf, Origin, PAGE_BITS, Tight, TightLeaf};
use crate::slots::Branch;
use crate::table::Translation;
use ringfence_dma::Permission;

/// A mapping of more than one granule.
pub(crate) struct Span(pub(crate) Translation);

/// A cluster's or a granule's 64 bits. 0 is nothing; else
///
/// | bits 63, 62 | bits 61 to 56 | bits 55 to 0 |
/// | --- | --- | --- |
/// | writable, readable | which of the cluster's granules | host address |
/// | 0 | 1 | address of a [`Span`] |
/// | 0 | 2 | address of a [`WideLeaf`](crate::leaf::WideLeaf), in a cluster's word only |
/// | 0 | 3 | 0: nothing, in a cluster that is in the index still |
/// | 0 | 4 | address of a [`NarrowLeaf`], in a cluster's word only |
/// | 0 | 5 | a row's host address, with what is allowed in bits 1 and 0, in a cluster's word only |
/// | 0 | 6 | address of a [`Branch`], in a region's word only |
/// | 0 | 8, and what its pages allow | a [`TightLeaf`]: bits 55 to 44 its base, 42 to 0 its address by 16; in a cluster's word only |
///
/// Bit 0 of a leaf's address, or 43 of a tight one's word: it was a row. It does not become one again: where one page comes and
/// goes all the time, making a leaf each time would be most of what that costs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Word(pub(crate) u64);

pub(crate) enum Meaning<'t> {
    Nothing,
    Granule {
        index: u32,
        host: u64,
        permission: Permission,
    },
    /// Each granule is a mapping of its own, and the first lies at `host`.
    Row {
        host: u64,
        permission: Permission,
    },
    Span(&'t Span),
    Leaf(Leaf<'t>),
}

pub(crate) const ADDRESS: u64 = (1 << 56) - 1;
pub(crate) const SPAN: u64 = 1;
pub(crate) const LEAF: u64 = 2;
const VACANT: u64 = 3;
pub(crate) const NARROW: u64 = 4;
pub(crate) const ROW: u64 = 5;
pub(crate) const BRANCH: u64 = 6;
const TIGHT: u64 = 8;
const WAS_ROW: u64 = 1;
const TIGHT_WAS_ROW: u64 = 1 << 43;

/// What may be allowed, as bits: a word's upper two.
pub(crate) const READ: u64 = 1;
pub(crate) const WRITE: u64 = 2;

/// The other way round: [`Word::permission`].
pub(crate) fn rights(permission: Permission) -> u64 {
    match permission {
        Permission::ReadOnly => READ,
        Permission::WriteOnly => WRITE,
        Permission::ReadWrite => READ | WRITE,
    }
}

impl Word {
    pub(crate) const NOTHING: Word = Word(0);
    /// A driver that maps each request comes back to the same clusters over and over: they stay in the index.
    pub(crate) const VACANT: Word = Word(VACANT << 56);

    pub(crate) fn granule(index: u32, host: u64, permission: Permission) -> Word {
        debug_assert!(index < 64 && host <= ADDRESS);
        Word(rights(permission) << 62 | u64::from(index) << 56 | host)
    }

    /// What a granule's word allows, or the two bits of a row's.
    #[inline]
    pub(crate) fn permission(rights: u64) -> Option<Permission> {
        // And no branches: what is allowed comes from memory, and may be anything.
        const MEANING: [Option<Permission>; 4] =
            [None, Some(Permission::ReadOnly), Some(Permission::WriteOnly), Some(Permission::ReadWrite)];
        MEANING[rights as usize & 3]
    }

    pub(crate) fn pointer<T>(kind: u64, to: *mut T) -> Word {
        let address = to.expose_provenance() as u64;
        assert!(address <= ADDRESS, "an allocation at {address:#x}, beyond 2^56");
        Word(kind << 56 | address)
    }

    pub(crate) fn address(self) -> u64 {
        self.0 & ADDRESS
    }

    /// What a granule's word allows, in bits.
    #[inline]
    pub(crate) fn rights(self) -> u64 {
        self.0 >> 62
    }

    /// # Safety
    /// The word was read from the table, by the writer or in the visit that goes on for all of `'t`.
    #[inline]
    pub(crate) unsafe fn meaning<'t>(self) -> Meaning<'t> {
        if let Some(permission) = Word::permission(self.0 >> 62) {
            return Meaning::Granule { index: (self.0 >> 56) as u32 & 63, host: self.address(), permission };
        }
        match self.0 >> 56 {
            // SAFETY: made by `Word::pointer` from a box that is freed only after the visits that could see it.
            NARROW => Meaning::Leaf(Leaf::Narrow(unsafe { &*self.to() })),
            // SAFETY: as above.
            LEAF => Meaning::Leaf(Leaf::Wide(unsafe { &*self.to() })),
            // SAFETY: as above.
            SPAN => Meaning::Span(unsafe { &*self.to() }),
            // SAFETY: as above.
            kind if kind & !3 == TIGHT => Meaning::Leaf(Leaf::Tight(unsafe { self.tight() })),
            ROW => Word::permission(self.0 & 3)
                .map_or(Meaning::Nothing, |permission| Meaning::Row { host: self.address() & !3, permission }),
            _ => Meaning::Nothing,
        }
    }

    /// The granule `at` of a cluster of pages with this word, as if it were the first; nothing if that is not quickly told.
    ///
    /// # Safety
    /// As for [`Word::meaning`].
    #[inline]
    pub(crate) unsafe fn page(self, at: u32, origin: &Origin) -> Word {
        let kind = self.0 >> 56;
        if kind & !3 == TIGHT {
            // SAFETY: by this function's own contract.
            unsafe { self.tight() }.page(at, origin)
        } else if kind == NARROW {
            // SAFETY: as above; made by `Word::pointer`.
            unsafe { &*self.to::<NarrowLeaf>() }.page(at, origin)
        } else if kind == ROW {
            Word((self.0 & 3) << 62 | ((self.address() & !3) + (u64::from(at) << PAGE_BITS)))
        } else if self.rights() != 0 && kind & 63 == u64::from(at) {
            Word(self.0 & !(63 << 56))
        } else {
            Word::NOTHING
        }
    }

    /// The word of a tight leaf, if its address is one that processes have.
    pub(crate) fn of_tight(leaf: *mut TightLeaf, base: u64, rights: u64) -> Option<Word> {
        let address = leaf.expose_provenance() as u64;
        let fits = address < 1 << 47 && address.is_multiple_of(16);
        fits.then_some(Word((TIGHT | rights) << 56 | base << 44 | address >> 4))
    }

    /// # Safety
    /// As for [`Word::meaning`], and the word is one of a tight leaf.
    #[inline]
    unsafe fn tight<'t>(self) -> Tight<'t> {
        // SAFETY: made by `Word::of_tight` from a box that is freed only after the visits that could see it.
        let leaf = unsafe { &*self.to_tight() };
        Tight { leaf, base: self.0 >> 44 & (BASES - 1), rights: self.0 >> 56 & 3 }
    }

    pub(crate) fn is_tight(self) -> bool {
        self.0 >> 58 == TIGHT >> 2
    }

    #[inline]
    pub(crate) fn to_tight(self) -> *mut TightLeaf {
        std::ptr::with_exposed_provenance_mut(((self.0 & (TIGHT_WAS_ROW - 1)) << 4) as usize)
    }

    /// The branch that this points to, if it does.
    ///
    /// # Safety
    /// As for [`Word::meaning`].
    #[inline]
    pub(crate) unsafe fn branch<'t>(self) -> Option<&'t Branch> {
        // SAFETY: as above.
        (self.0 >> 56 == BRANCH).then(|| unsafe { &*self.to() })
    }

    /// Whether nothing is there, whatever the index says.
    pub(crate) fn is_nothing(self) -> bool {
        self == Word::NOTHING || self == Word::VACANT
    }

    /// What a word of a pointer's kind points to.
    #[inline]
    pub(crate) fn to<T>(self) -> *mut T {
        std::ptr::with_exposed_provenance_mut((self.address() & !WAS_ROW) as usize)
    }

    /// A leaf's word, as that of one that was a row.
    pub(crate) fn that_was_row(self) -> Word {
        Word(self.0 | self.row_mark())
    }

    pub(crate) fn was_row(self) -> bool {
        self.0 & self.row_mark() != 0
    }

    fn row_mark(self) -> u64 {
        if self.is_tight() { TIGHT_WAS_ROW } else { WAS_ROW }
    }

    pub(crate) fn is_narrow(self) -> bool {
        self.0 >> 56 == NARROW
    }
}
