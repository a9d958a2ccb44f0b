//! A named dimension that a mesh may cut: so many units of so many elements.
//!
//! Heads are cut whole, never inside; key-value heads fewer than the ranks are repeated.
//! Invariant: the parts of all ranks cover every unit.

use core::ops::Range;

/// `count` units of `each` elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The configuration field that counts the units; refusals name it.
    pub name: &'static str,
    /// Units: heads, channels, vocabulary entries.
    pub count: usize,
    /// Elements of a unit.
    pub each: usize,
    /// Whether several ranks may hold the same unit when there are more ranks than units.
    pub repeats: bool,
}

/// A dimension that cannot be cut as asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name} = {count} cannot be cut over tp = {ranks}; tp may be {}", list(allowed))]
pub struct Indivisible {
    /// The configuration field.
    pub name: &'static str,
    /// Its value.
    pub count: usize,
    /// Ranks asked for.
    pub ranks: usize,
    /// Ranks that work.
    pub allowed: Vec<usize>,
}

/// The most divisors a refusal lists.
const LISTED: usize = 12;

fn list(allowed: &[usize]) -> String {
    let shown: Vec<_> = allowed.iter().take(LISTED).map(usize::to_string).collect();
    shown.join(", ")
}

impl Extent {
    /// Units that are cut freely between any two.
    #[must_use]
    pub const fn new(name: &'static str, count: usize, each: usize) -> Self {
        Self { name, count, each, repeats: false }
    }

    /// The same units, which ranks may share.
    #[must_use]
    pub const fn repeated(self) -> Self {
        Self { repeats: true, ..self }
    }

    /// Elements in all.
    #[must_use]
    pub const fn total(&self) -> usize {
        self.count * self.each
    }

    /// Whether `ranks` ranks can cut it.
    #[must_use]
    pub const fn divides(&self, ranks: usize) -> bool {
        self.count.is_multiple_of(ranks) || (self.repeats && ranks.is_multiple_of(self.count))
    }

    /// The elements of rank `rank` of `ranks`.
    ///
    /// # Errors
    /// When the units do not divide, with the numbers of ranks that would.
    pub fn part(&self, ranks: usize, rank: usize) -> Result<Range<usize>, Indivisible> {
        let units = if self.count.is_multiple_of(ranks) {
            let units = self.count / ranks;
            rank * units..(rank + 1) * units
        } else if self.repeats && ranks.is_multiple_of(self.count) {
            let unit = rank / (ranks / self.count);
            unit..unit + 1
        } else {
            let allowed = (1..=self.count).filter(|&n| self.divides(n)).collect();
            return Err(Indivisible { name: self.name, count: self.count, ranks, allowed });
        };
        Ok(units.start * self.each..units.end * self.each)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_cut_whole_and_few_are_repeated() {
        let heads = Extent::new("num_attention_heads", 6, 10);
        assert_eq!(heads.part(3, 1), Ok(20..40));
        let refusal = heads.part(4, 0).expect_err("6 heads over 4 ranks");
        assert_eq!(refusal.allowed, [1, 2, 3, 6]);
        let kv = Extent::new("num_key_value_heads", 2, 10).repeated();
        assert_eq!(kv.part(8, 3), Ok(0..10));
        assert_eq!(kv.part(8, 4), Ok(10..20));
        assert!(kv.part(3, 0).is_err());
    }
}
