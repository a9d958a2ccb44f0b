//! Which tokens a sequence holds, for penalties: kept sparse, so a step costs what was seen and not
//! what the vocabulary holds. Rebuilt from prompt and output after a preemption.
//!
//! A list of distinct tokens with an open-addressed index over it. Counting a token costs a probe;
//! memory is taken when the list doubles, or ahead by [`Seen::reserve`]. Invariant: each token is
//! listed once, and at most half of the index is taken.

/// Occurrences by token.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    tokens: Vec<Count>,
    /// One more than a position in `tokens`, or 0; a power of two long.
    index: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Count {
    token: u32,
    /// Occurrences in the output.
    output: u32,
}

/// Entries of the smallest index.
const MIN_INDEX: usize = 64;

impl Seen {
    /// Nothing seen.
    #[must_use]
    pub const fn none() -> Self {
        Self { tokens: Vec::new(), index: Vec::new() }
    }

    /// Takes memory for `tokens` distinct tokens, so that counting them takes none.
    pub fn reserve(&mut self, tokens: usize) {
        self.tokens.reserve(tokens.saturating_sub(self.tokens.len()));
        if self.index.len() < 2 * tokens {
            self.rebuild(2 * tokens);
        }
    }

    /// Bytes that [`Seen::reserve`] takes for `tokens` distinct tokens, where nothing is held yet.
    #[must_use]
    pub fn bytes(tokens: usize) -> usize {
        // The least index is never full: half of it is the least list that is worth counting.
        let tokens = tokens.max(MIN_INDEX / 2);
        let index = tokens.saturating_mul(2).next_power_of_two();
        tokens.saturating_mul(size_of::<Count>()).saturating_add(index * size_of::<u32>())
    }

    /// Distinct tokens that can be counted without taking memory.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.tokens.capacity().min(self.index.len() / 2)
    }

    /// Counts a token of the prompt: it matters to the repetition penalty only.
    pub fn prompt(&mut self, token: u32) {
        self.entry(token);
    }

    /// Counts a token of the output.
    pub fn output(&mut self, token: u32) {
        let entry = self.entry(token);
        entry.output = entry.output.saturating_add(1);
    }

    /// Forgets everything and keeps the memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.index.fill(0);
    }

    fn entry(&mut self, token: u32) -> &mut Count {
        if self.index.len() <= 2 * self.tokens.len() {
            self.rebuild(4 * self.tokens.len());
        }
        let mut at = self.home(token);
        loop {
            match self.index[at] {
                0 => {
                    self.tokens.push(Count { token, output: 0 });
                    // Tokens are 32 bits wide, so their number is, too.
                    self.index[at] = self.tokens.len() as u32;
                    let last = self.tokens.len() - 1;
                    return &mut self.tokens[last];
                }
                position => {
                    let position = position as usize - 1;
                    if self.tokens[position].token == token {
                        return &mut self.tokens[position];
                    }
                }
            }
            at = (at + 1) & (self.index.len() - 1);
        }
    }

    /// Where the search for a token begins: the high bits of a product with the golden ratio.
    fn home(&self, token: u32) -> usize {
        let hash = u64::from(token).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        hash as usize & (self.index.len() - 1)
    }

    fn rebuild(&mut self, at_least: usize) {
        let len = at_least.max(MIN_INDEX).next_power_of_two();
        self.index.clear();
        self.index.resize(len, 0);
        for position in 0..self.tokens.len() {
            let mut at = self.home(self.tokens[position].token);
            while self.index[at] != 0 {
                at = (at + 1) & (len - 1);
            }
            self.index[at] = position as u32 + 1;
        }
    }

    /// Applies the penalties to the logits of tokens seen. Tokens are independent of each other, so
    /// the order in which they were seen does not matter.
    pub(super) fn apply(&self, logits: &mut [f32], repetition: f32, frequency: f32, presence: f32) {
        for Count { token, output } in &self.tokens {
            let Some(logit) = logits.get_mut(*token as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            if *output > 0 {
                *logit -= frequency * *output as f32 + presence;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;
    use std::collections::BTreeMap;

    #[test]
    fn what_is_reserved_is_what_was_said() {
        for tokens in [0, 1, 7, 8, 9, 1000, 4096, 128_000] {
            let mut seen = Seen::none();
            seen.reserve(tokens);
            let held = seen.tokens.capacity() * size_of::<Count>() + seen.index.len() * 4;
            assert!(held <= Seen::bytes(tokens), "{tokens} tokens: {held} bytes");
            assert!(seen.capacity() >= tokens);
        }
    }

    #[test]
    fn counts_are_those_of_a_map() {
        let mut random = Random::new(4);
        let mut seen = Seen::none();
        for round in 0..3 {
            let mut map = BTreeMap::new();
            if round == 1 {
                seen.reserve(3000);
            }
            for _ in 0..5000 {
                // Clustered tokens, so that probes collide.
                let token = (random.below(300) * random.below(20)) as u32;
                if random.below(3) == 0 {
                    seen.prompt(token);
                    map.entry(token).or_insert(0);
                } else {
                    seen.output(token);
                    *map.entry(token).or_insert(0) += 1;
                }
            }
            let mut got: Vec<(u32, u32)> =
                seen.tokens.iter().map(|count| (count.token, count.output)).collect();
            got.sort_unstable();
            assert_eq!(got, map.into_iter().collect::<Vec<_>>());
            seen.clear();
        }
    }

    #[test]
    fn counting_what_was_reserved_takes_no_memory() {
        let mut seen = Seen::none();
        seen.reserve(1000);
        let before = (seen.tokens.capacity(), seen.index.capacity());
        (0..1000).for_each(|token| seen.output(token * 7));
        assert_eq!((seen.tokens.capacity(), seen.index.capacity()), before);
    }
}
