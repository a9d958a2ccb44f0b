//! Counts with their units. Subtraction saturates nowhere: a count below zero is a bug and panics.

use crate::BLOCK_TOKENS;
use core::ops::{Add, AddAssign, Sub, SubAssign};

macro_rules! count {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
        #[repr(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// None of them.
            pub const ZERO: Self = Self(0);

            /// Whether there are none.
            #[must_use]
            pub const fn is_zero(self) -> bool {
                self.0 == 0
            }

            /// `self - other`, or zero where `other` is larger.
            #[must_use]
            pub const fn saturating_sub(self, other: Self) -> Self {
                Self(self.0.saturating_sub(other.0))
            }
        }

        impl Add for $name {
            type Output = Self;
            fn add(self, other: Self) -> Self {
                Self(self.0.checked_add(other.0).expect("count overflow"))
            }
        }

        impl Sub for $name {
            type Output = Self;
            fn sub(self, other: Self) -> Self {
                Self(self.0.checked_sub(other.0).expect("count below zero"))
            }
        }

        impl AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                *self = *self + other;
            }
        }

        impl SubAssign for $name {
            fn sub_assign(&mut self, other: Self) {
                *self = *self - other;
            }
        }

        impl core::iter::Sum for $name {
            fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
                iter.fold(Self::ZERO, |a, b| a + b)
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

count! {
    /// A number of tokens.
    Tokens(u32)
}
count! {
    /// A number of KV blocks.
    Blocks(u32)
}
count! {
    /// A number of bytes.
    Bytes(u64)
}

impl Tokens {
    /// Blocks needed to hold this many tokens.
    #[must_use]
    pub const fn blocks_ceil(self) -> Blocks {
        Blocks(self.0.div_ceil(BLOCK_TOKENS))
    }

    /// Blocks that this many tokens fill to the last position.
    #[must_use]
    pub const fn blocks_full(self) -> Blocks {
        Blocks(self.0 / BLOCK_TOKENS)
    }

    /// As a length or an index into a token sequence.
    #[must_use]
    pub const fn as_usize(self) -> usize {
        self.0 as usize
    }
}

impl Blocks {
    /// Tokens that this many blocks hold.
    #[must_use]
    pub const fn tokens(self) -> Tokens {
        Tokens(self.0 * BLOCK_TOKENS)
    }

    /// As a length or an index into a block table.
    #[must_use]
    pub const fn as_usize(self) -> usize {
        self.0 as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_round_the_named_way() {
        let cases = [(0, 0, 0), (1, 1, 0), (63, 1, 0), (64, 1, 1), (65, 2, 1), (128, 2, 2)];
        for (tokens, ceil, full) in cases {
            assert_eq!(Tokens(tokens).blocks_ceil(), Blocks(ceil));
            assert_eq!(Tokens(tokens).blocks_full(), Blocks(full));
        }
    }

    #[test]
    #[should_panic(expected = "count below zero")]
    fn a_count_never_wraps() {
        let _ = Tokens(1) - Tokens(2);
    }
}
