//! How a token is chosen from logits. Checked once, here, for every door and every worker.
//!
//! Order of application, the same on every device: repetition, frequency and presence penalties,
//! logit bias, the ban on end tokens before `min_tokens`, temperature, top-k, top-p, min-p, draw.
//! Log-probabilities are of the raw logits, before any of it.

use ids::{TokenId, Tokens};
use std::sync::Arc;

/// The most alternatives reported beside a token.
pub const MAX_LOGPROBS: u8 = 20;

/// Parameters of one generation. Floats are finite and in range once [`Sampling::check`] passed.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the `top_k` likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the likeliest tokens that together reach this mass; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Key of the counter-based random numbers, with choice and position.
    pub seed: u64,
    /// Which of `n` choices this is; 0-based.
    pub choice: u32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from tokens seen in the output.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output.
    pub frequency_penalty: f32,
    /// Added to single logits; sorted by token, no token twice.
    pub logit_bias: Arc<[(TokenId, f32)]>,
    /// `banned_before_min` cannot be drawn before this many output tokens.
    pub min_tokens: Tokens,
    /// End and stop tokens, banned while fewer than `min_tokens` were generated.
    pub banned_before_min: Arc<[TokenId]>,
    /// Report the chosen token's log-probability and this many alternatives.
    pub logprobs: Option<u8>,
}

/// Why a [`Sampling`] is refused; `param` names the field as clients know it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{param} must be {allowed}, got {got}")]
pub struct SamplingError {
    /// The field.
    pub param: &'static str,
    /// The range in words.
    pub allowed: &'static str,
    /// The value refused.
    pub got: String,
}

impl Default for Sampling {
    /// Greedy without any restriction.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            choice: 0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Arc::default(),
            min_tokens: Tokens::ZERO,
            banned_before_min: Arc::default(),
            logprobs: None,
        }
    }
}

impl Sampling {
    /// Whether the likeliest token is taken without a draw.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether earlier tokens change the logits.
    #[must_use]
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }

    /// Refuses what is out of range, naming field, range and value.
    ///
    /// # Errors
    /// The first field out of range. `vocab` bounds the tokens of `logit_bias`.
    pub fn check(&self, vocab: u32) -> Result<(), SamplingError> {
        range("temperature", self.temperature, 0.0..=2.0, "between 0 and 2")?;
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(refused("top_p", "above 0 and at most 1", self.top_p));
        }
        range("min_p", self.min_p, 0.0..=1.0, "between 0 and 1")?;
        range("presence_penalty", self.presence_penalty, -2.0..=2.0, "between -2 and 2")?;
        range("frequency_penalty", self.frequency_penalty, -2.0..=2.0, "between -2 and 2")?;
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty <= 10.0) {
            return Err(refused(
                "repetition_penalty",
                "above 0 and at most 10",
                self.repetition_penalty,
            ));
        }
        for (token, bias) in self.logit_bias.iter() {
            if token.0 >= vocab {
                return Err(refused("logit_bias", "keyed by tokens of the vocabulary", token));
            }
            range("logit_bias", *bias, -100.0..=100.0, "between -100 and 100")?;
        }
        if self.logit_bias.windows(2).any(|pair| pair[0].0 >= pair[1].0) {
            return Err(refused("logit_bias", "sorted with no token twice", "another order"));
        }
        if let Some(n) = self.logprobs
            && n > MAX_LOGPROBS
        {
            return Err(refused("logprobs", "at most 20", n));
        }
        Ok(())
    }
}

fn range(
    param: &'static str,
    value: f32,
    allowed: std::ops::RangeInclusive<f32>,
    words: &'static str,
) -> Result<(), SamplingError> {
    if allowed.contains(&value) { Ok(()) } else { Err(refused(param, words, value)) }
}

fn refused(param: &'static str, allowed: &'static str, got: impl ToString) -> SamplingError {
    SamplingError { param, allowed, got: got.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_out_of_range_is_refused_by_name() {
        let base = Sampling::default();
        assert_eq!(base.check(10), Ok(()));
        let cases: [(&str, Sampling); 8] = [
            ("temperature", Sampling { temperature: f32::NAN, ..base.clone() }),
            ("temperature", Sampling { temperature: 2.1, ..base.clone() }),
            ("top_p", Sampling { top_p: 0.0, ..base.clone() }),
            ("min_p", Sampling { min_p: 1.5, ..base.clone() }),
            ("presence_penalty", Sampling { presence_penalty: -3.0, ..base.clone() }),
            ("repetition_penalty", Sampling { repetition_penalty: 0.0, ..base.clone() }),
            ("logit_bias", Sampling { logit_bias: [(TokenId(10), 1.0)].into(), ..base.clone() }),
            ("logprobs", Sampling { logprobs: Some(21), ..base.clone() }),
        ];
        for (param, sampling) in cases {
            assert_eq!(sampling.check(10).map_err(|e| e.param), Err(param));
        }
    }
}
