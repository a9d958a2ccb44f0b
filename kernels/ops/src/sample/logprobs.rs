//! Log-probabilities of a raw row.

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
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|x| f64::from((x - max).exp())).sum();
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
        let likelier = logits.iter().filter(|x| **x > logit).count();
        TokenLogprob { token, logprob: self.logprob(logit), rank: likelier as u32 + 1 }
    }

    /// The `n` likeliest tokens in order, ties by number, into `top`.
    pub fn top(&self, logits: &[f32], n: usize, top: &mut Vec<TokenLogprob>) {
        top.clear();
        if n == 0 {
            return;
        }
        // Insertion into a short sorted list: n is at most 20 and most logits fail the first test.
        // `logprob` holds the logit until the end.
        for (token, logit) in (0_u32..).zip(logits) {
            if top.len() == n && top[n - 1].logprob >= *logit {
                continue;
            }
            let at = top.partition_point(|t| t.logprob >= *logit);
            top.truncate(n - 1);
            top.insert(at, TokenLogprob { token, logprob: *logit, rank: 0 });
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
