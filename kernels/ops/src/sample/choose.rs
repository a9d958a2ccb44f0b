//! One draw.

use super::{Seen, uniform};

/// Candidates that top-p sorts first; most rows need no more.
const FIRST_SORTED: usize = 256;

/// How to draw. Ranges are checked where requests come in.
#[derive(Clone, Copy, Debug)]
pub struct Params<'a> {
    /// 0 takes the likeliest.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
    /// Key of the random numbers.
    pub seed: u64,
    /// Which of several choices.
    pub choice: u32,
    /// Index of the output token.
    pub position: u32,
    /// 1 is off.
    pub repetition_penalty: f32,
    /// 0 is off.
    pub frequency_penalty: f32,
    /// 0 is off.
    pub presence_penalty: f32,
    /// Tokens of prompt and output; needed where a penalty is on.
    pub seen: &'a Seen,
    /// Added to single logits.
    pub bias: &'a [(u32, f32)],
    /// Cannot be drawn now.
    pub banned: &'a [u32],
}

/// Why nothing was drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The row holds NaN.
    NotANumber,
    /// Every token is banned.
    NothingAllowed,
}

/// Memory for selections, kept between rows.
#[derive(Debug, Default)]
pub struct Workspace {
    candidates: Vec<Candidate>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    logit: f32,
    token: u32,
}

impl Candidate {
    /// Likelier first, ties by number: a total order, since rows with NaN are refused before.
    fn order(&self, other: &Self) -> std::cmp::Ordering {
        other.logit.total_cmp(&self.logit).then(self.token.cmp(&other.token))
    }
}

impl Workspace {
    /// For rows of `vocab` logits.
    #[must_use]
    pub fn new(vocab: usize) -> Self {
        Self { candidates: Vec::with_capacity(vocab) }
    }
}

/// Draws a token; `logits` are changed by penalties, bias and bans.
///
/// # Errors
/// When the row holds NaN or nothing may be drawn.
pub fn sample(
    logits: &mut [f32],
    params: &Params<'_>,
    workspace: &mut Workspace,
) -> Result<u32, Fault> {
    adjust(logits, params);
    let top = likeliest(logits)?;
    if params.temperature == 0.0 {
        return Ok(top.token);
    }
    let u = uniform(params.seed, params.choice, params.position);
    let weight = |logit: f32| f64::from(((logit - top.logit) / params.temperature).exp());
    if params.top_k == 0 && params.top_p >= 1.0 && params.min_p <= 0.0 {
        let all = (0_u32..).zip(logits.iter()).map(|(token, logit)| (token, weight(*logit)));
        return Ok(draw(u, all).unwrap_or(top.token));
    }
    let kept = filter(logits, params, weight, workspace);
    let all = kept.iter().map(|c| (c.token, weight(c.logit)));
    Ok(draw(u, all).unwrap_or(top.token))
}

fn adjust(logits: &mut [f32], params: &Params<'_>) {
    let Params { repetition_penalty, frequency_penalty, presence_penalty, .. } = *params;
    if repetition_penalty != 1.0 || frequency_penalty != 0.0 || presence_penalty != 0.0 {
        params.seen.apply(logits, repetition_penalty, frequency_penalty, presence_penalty);
    }
    for (token, bias) in params.bias {
        if let Some(logit) = logits.get_mut(*token as usize) {
            *logit += bias;
        }
    }
    for token in params.banned {
        if let Some(logit) = logits.get_mut(*token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

fn likeliest(logits: &[f32]) -> Result<Candidate, Fault> {
    let mut top = Candidate { logit: f32::NEG_INFINITY, token: 0 };
    for (token, logit) in (0_u32..).zip(logits) {
        if logit.is_nan() {
            return Err(Fault::NotANumber);
        }
        if *logit > top.logit {
            top = Candidate { logit: *logit, token };
        }
    }
    // Infinite logits give no distribution either.
    match top.logit {
        f32::NEG_INFINITY => Err(Fault::NothingAllowed),
        f32::INFINITY => Err(Fault::NotANumber),
        _ => Ok(top),
    }
}

/// The first token at which the running mass passes `u` of the whole.
fn draw(u: f64, weighted: impl Iterator<Item = (u32, f64)> + Clone) -> Option<u32> {
    let whole: f64 = weighted.clone().map(|(_, w)| w).sum();
    let mut mass = 0.0;
    let mut last = None;
    for (token, w) in weighted {
        if w > 0.0 {
            mass += w;
            last = Some(token);
            if mass >= u * whole {
                return last;
            }
        }
    }
    last
}

/// What top-k, top-p and min-p keep, likeliest first where top-p is on.
fn filter<'w>(
    logits: &[f32],
    params: &Params<'_>,
    weight: impl Fn(f32) -> f64,
    workspace: &'w mut Workspace,
) -> &'w [Candidate] {
    let all = &mut workspace.candidates;
    all.clear();
    let of = |(token, logit): (u32, &f32)| Candidate { logit: *logit, token };
    all.extend((0_u32..).zip(logits).map(of).filter(|c| c.logit > f32::NEG_INFINITY));
    let k = params.top_k as usize;
    if k > 0 && k < all.len() {
        all.select_nth_unstable_by(k - 1, Candidate::order);
        all.truncate(k);
        all.sort_unstable_by(Candidate::order);
    }
    if params.top_p < 1.0 {
        let count = nucleus(all, f64::from(params.top_p), &weight);
        all.truncate(count);
    }
    if params.min_p > 0.0 {
        all.retain(|c| weight(c.logit) >= f64::from(params.min_p));
    }
    all
}

/// Moves the shortest prefix of the sorted order that holds `p` of the mass to the front, sorted;
/// returns its length. Sorts as little as it needs.
fn nucleus(all: &mut [Candidate], p: f64, weight: &impl Fn(f32) -> f64) -> usize {
    // Summed before anything moves, so that the sum's order is that of the tokens.
    let whole: f64 = all.iter().map(|c| weight(c.logit)).sum();
    let (mut mass, mut sorted, mut size) = (0.0, 0, FIRST_SORTED);
    while sorted < all.len() {
        let rest = &mut all[sorted..];
        let take = size.min(rest.len());
        if take < rest.len() {
            rest.select_nth_unstable_by(take - 1, Candidate::order);
        }
        rest[..take].sort_unstable_by(Candidate::order);
        for (i, candidate) in rest[..take].iter().enumerate() {
            mass += weight(candidate.logit);
            if mass >= p * whole {
                return sorted + i + 1;
            }
        }
        sorted += take;
        size *= 8;
    }
    all.len()
}
