//! Which tokens a sequence holds, for penalties: kept sparse, so a step costs what was seen and not
//! what the vocabulary holds. Rebuilt from prompt and output after a preemption.

use std::collections::BTreeMap;

/// Occurrences by token.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    tokens: BTreeMap<u32, Count>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Count {
    output: u32,
}

impl Seen {
    /// Nothing seen.
    #[must_use]
    pub const fn none() -> Self {
        Self { tokens: BTreeMap::new() }
    }

    /// Counts a token of the prompt: it matters to the repetition penalty only.
    pub fn prompt(&mut self, token: u32) {
        self.tokens.entry(token).or_default();
    }

    /// Counts a token of the output.
    pub fn output(&mut self, token: u32) {
        self.tokens.entry(token).or_default().output += 1;
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.tokens.clear();
    }

    /// Applies the penalties to the logits of tokens seen.
    pub(super) fn apply(&self, logits: &mut [f32], repetition: f32, frequency: f32, presence: f32) {
        for (token, count) in &self.tokens {
            let Some(logit) = logits.get_mut(*token as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            if count.output > 0 {
                *logit -= frequency * count.output as f32 + presence;
            }
        }
    }
}
