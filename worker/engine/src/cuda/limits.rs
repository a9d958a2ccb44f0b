//! What steps are at most, and the sizes they are padded to. Pure arithmetic.
//!
//! Invariant: a bucket holds the rows it was chosen for, and there are few of them.

/// The largest step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// Tokens of a step.
    pub(super) rows: usize,
    /// Requests at once.
    pub(super) slots: usize,
    /// Tokens of the longest context.
    pub(super) context: usize,
    /// Of the device.
    pub(super) multiprocessors: usize,
}

impl Limits {
    /// Rows that a step of `rows` is padded to: 1 to 8 each, then powers of two and the middles
    /// between them, the largest step at the end.
    pub(super) fn bucket(&self, rows: usize) -> usize {
        let power = rows.next_power_of_two();
        let middle = power / 4 * 3;
        let bucket = match rows {
            0..=8 => rows.max(1),
            _ if rows <= middle => middle,
            _ => power,
        };
        bucket.min(self.rows)
    }

    /// All of them, from small to large.
    pub(super) fn buckets(&self) -> Vec<usize> {
        let next = |bucket: &usize| (*bucket < self.rows).then(|| self.bucket(bucket + 1));
        std::iter::successors(Some(1), next).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_their_rows_and_are_few() {
        for rows in [1, 7, 8, 9, 13, 64, 100, 1000, 1024, 8192] {
            let limits = Limits { rows, slots: 1, context: 1, multiprocessors: 1 };
            let all = limits.buckets();
            assert_eq!((all.first(), all.last()), (Some(&1), Some(&rows)));
            assert!(all.len() <= 30 && all.is_sorted_by(|a, b| a < b), "{all:?}");
            for real in 1..=rows {
                let bucket = limits.bucket(real);
                assert!(bucket >= real && all.contains(&bucket), "{real} of {rows}: {bucket}");
                assert!(bucket == real || bucket * 2 <= real * 3, "{real} of {rows}: {bucket}");
            }
        }
    }
}
