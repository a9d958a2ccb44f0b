//! Log-probabilities of a raw row.
//!
//! Exponentials in 32 bits, their sum in 64. A row that holds NaN has NaN for every log-probability;
//! its ranks mean nothing.

use super::choose::CHUNK;
use crate::exp::{maximum, weights};
use device::Isa;

/// A token with its log-probability and rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// Natural log of its probability.
    pub logprob: f32,
    /// 1 for the likeliest; one more than the tokens that are likelier.
    pub rank: u32,
}

/// The normaliser of a row: `logprob = logit - max - log_sum`.
#[derive(Clone, Copy, Debug)]
pub struct LogSoftmax {
    max: f32,
    log_sum: f64,
}

impl LogSoftmax {
    /// Of `logits`; NaN anywhere makes every log-probability NaN.
    #[must_use]
    pub fn of(logits: &[f32]) -> Self {
        let isa = Isa::detect();
        let max = maximum(isa, logits);
        let mut buffer = [0.0_f32; CHUNK];
        let mut sum = 0.0_f64;
        for chunk in logits.chunks(CHUNK) {
            let buffer = &mut buffer[..chunk.len()];
            weights(isa, chunk, max, 1.0, buffer);
            sum += buffer.iter().map(|weight| f64::from(*weight)).sum::<f64>();
        }
        Self { max, log_sum: sum.ln() }
    }

    /// Log-probability of a token with this logit.
    #[must_use]
    pub fn logprob(&self, logit: f32) -> f32 {
        (f64::from(logit) - f64::from(self.max) - self.log_sum) as f32
    }

    /// One token of the row.
    ///
    /// # Panics
    /// When the token is outside of the row.
    #[must_use]
    pub fn token(&self, logits: &[f32], token: u32) -> TokenLogprob {
        let logit = logits[token as usize];
        let likelier: u32 = logits.iter().map(|x| u32::from(*x > logit)).sum();
        TokenLogprob { token, logprob: self.logprob(logit), rank: likelier + 1 }
    }

    /// The `n` likeliest tokens in order, ties by number, into `top`.
    pub fn top(&self, logits: &[f32], n: usize, top: &mut Vec<TokenLogprob>) {
        top.clear();
        if n == 0 {
            return;
        }
        let isa = Isa::detect();
        // Insertion into a short sorted list: n is at most 20, and most chunks hold nothing for it.
        // `logprob` holds the logit until the end.
        for (index, chunk) in logits.chunks(CHUNK).enumerate() {
            if top.len() == n && maximum(isa, chunk) <= top[n - 1].logprob {
                continue;
            }
            for (token, logit) in (index * CHUNK..).zip(chunk) {
                if top.len() == n && *logit <= top[n - 1].logprob {
                    continue;
                }
                let at = top.partition_point(|t| t.logprob >= *logit);
                top.truncate(n - 1);
                top.insert(at, TokenLogprob { token: token as u32, logprob: *logit, rank: 0 });
            }
        }
        let (mut rank, mut previous) = (1, f32::INFINITY);
        for (i, entry) in (1_u32..).zip(top.iter_mut()) {
            if entry.logprob < previous {
                (rank, previous) = (i, entry.logprob);
            }
            entry.rank = rank;
            entry.logprob = self.logprob(entry.logprob);
        }
    }
}
