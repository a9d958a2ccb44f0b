//! Sizes that steps are padded to: 1 to 8 each, then two per octave (12, 16, 24, 32, …).
//!
//! It does not know which sizes a worker has captured. Invariant: the bucket holds the tokens and
//! is at most half as large again.

use ids::Tokens;

/// The smallest bucket that holds `tokens`.
pub(crate) fn bucket(tokens: Tokens) -> Tokens {
    let n = tokens.0;
    if n <= 8 {
        return tokens;
    }
    let power = n.checked_next_power_of_two().unwrap_or(u32::MAX);
    let between = power / 4 * 3;
    Tokens(if n <= between { between } else { power })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_the_stated_sizes() {
        let sizes = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128];
        for n in 1..=128 {
            let smallest = sizes.into_iter().find(|size| *size >= n).expect("covered");
            assert_eq!(bucket(Tokens(n)), Tokens(smallest), "{n}");
        }
    }
}
