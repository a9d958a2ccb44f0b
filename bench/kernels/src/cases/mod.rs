//! The cases, by op. Shapes are those of DeepSeek-V2-Lite and Qwen3-8B.

mod block;
mod gqa;
mod linear;
mod mla;
mod moe;
mod paged;
mod prepare;
mod row;
mod sample;
mod step;

use crate::case::Case;

/// All cases, in the order they are measured in.
#[must_use]
pub fn all() -> Vec<Case> {
    [
        mla::cases(),
        block::cases(),
        gqa::cases(),
        prepare::cases(),
        linear::cases(),
        moe::cases(),
        sample::cases(),
        row::cases(),
        paged::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_are_distinct_and_plain() {
        let cases = super::all();
        let mut names: Vec<&str> = cases.iter().map(crate::Case::name).collect();
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._".contains(c);
        assert!(names.iter().all(|name| name.chars().all(plain)), "{names:?}");
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), cases.len());
    }
}
