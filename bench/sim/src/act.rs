//! What a seed decides, one act at a time: who arrives, what befalls a step, who meddles.
//!
//! Every act draws from random numbers of its own, so that leaving one out changes no other: that
//! is what lets a failing run be shrunk to the few acts that matter.
//! Invariant: an act's draws follow from the seed and its number alone.

use crate::rng::{Rng, chain};
use core::fmt;
use core::str::FromStr;

/// One decision of a seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Act {
    /// A client's session begins.
    Arrive(u64),
    /// Something befalls the outcome of the n-th step carried out.
    Step(u64),
    /// Somebody aborts, stops, preempts or submits again.
    Meddle(u64),
}

impl Act {
    fn parts(self) -> (char, u64) {
        match self {
            Self::Arrive(n) => ('a', n),
            Self::Step(n) => ('s', n),
            Self::Meddle(n) => ('m', n),
        }
    }

    /// The act's random numbers.
    #[must_use]
    pub fn rng(self, seed: u64) -> Rng {
        let (kind, n) = self.parts();
        Rng::new(chain(chain(seed, u64::from(u32::from(kind))), n))
    }
}

impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, n) = self.parts();
        write!(f, "{kind}{n}")
    }
}

/// Text that names no act.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no act: write a, s or m and a number, as in a12,s40,m7")]
pub struct NoAct(String);

impl FromStr for Act {
    type Err = NoAct;

    fn from_str(text: &str) -> Result<Self, NoAct> {
        let refused = || NoAct(text.to_owned());
        let mut letters = text.chars();
        let kind = letters.next().ok_or_else(refused)?;
        let n = letters.as_str().parse().map_err(|_| refused())?;
        match kind {
            'a' => Ok(Self::Arrive(n)),
            's' => Ok(Self::Step(n)),
            'm' => Ok(Self::Meddle(n)),
            _ => Err(refused()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acts_are_written_and_read() {
        for act in [Act::Arrive(0), Act::Step(17), Act::Meddle(400)] {
            assert_eq!(act.to_string().parse(), Ok(act));
        }
        for text in ["", "a", "x1", "a-1", "3"] {
            assert!(text.parse::<Act>().is_err(), "{text}");
        }
    }
}
