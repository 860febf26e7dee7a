use core::fmt;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `bytes` further on, or `None` past the end of the 64-bit space.
            #[inline]
            pub fn checked_add(self, bytes: u64) -> Option<Self> {
                self.0.checked_add(bytes).map(Self)
            }

            /// The last address of `len` bytes that start here: inclusive, because an exclusive end wraps to zero at
            /// the top of the space. `None` where `len` is zero or the range wraps.
            #[inline]
            pub fn last(self, len: u64) -> Option<Self> {
                self.checked_add(len.checked_sub(1)?)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// What a driver puts into a descriptor: an I/O virtual address where an IOMMU translates, else guest-physical.
    BusAddr
}
address! {
    /// A guest-physical address.
    Gpa
}
address! {
    /// The VMM's own virtual address of a byte of guest memory, as vhost-user messages name it.
    FrontendVa
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_may_touch_the_top_of_the_space_and_not_pass_it() {
        assert_eq!(BusAddr(u64::MAX).last(1), Some(BusAddr(u64::MAX)));
        assert_eq!(BusAddr(u64::MAX).last(2), None);
        assert_eq!(BusAddr(5).last(0), None);
    }
}
