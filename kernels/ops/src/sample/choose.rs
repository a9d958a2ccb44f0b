//! One draw: the order of the steps, and those that touch single logits.

use super::filter::{self, Candidate};
use super::{Seen, Workspace, draw, uniform};
use crate::exp::maximum;
use device::Isa;

/// Logits that share a maximum, by which whole stretches are passed over.
pub(super) const CHUNK: usize = 256;

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
    /// The row holds NaN or positive infinity: it gives no distribution.
    NotANumber,
    /// Every token is banned.
    NothingAllowed,
}

/// Draws a token; `logits` are changed by penalties, bias and bans.
///
/// # Errors
/// When the row gives no distribution or nothing may be drawn.
pub fn sample(
    logits: &mut [f32],
    params: &Params<'_>,
    workspace: &mut Workspace,
) -> Result<u32, Fault> {
    adjust(logits, params);
    let isa = Isa::detect();
    let top = likeliest(isa, logits, &mut workspace.tops)?;
    if params.temperature == 0.0 {
        return Ok(top.token);
    }
    filter::keep(isa, logits, top.logit, params, workspace);
    let u = uniform(params.seed, params.choice, params.position);
    let Workspace { weights, sums, tokens, .. } = workspace;
    let index = draw::draw(u, weights, sums);
    // Without a filter every token is kept, and indices are tokens.
    Ok(if tokens.is_empty() { index as u32 } else { tokens[index] })
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

/// The first of the highest; `tops` becomes the maximum of every chunk.
fn likeliest(isa: Isa, logits: &[f32], tops: &mut Vec<f32>) -> Result<Candidate, Fault> {
    tops.clear();
    tops.extend(logits.chunks(CHUNK).map(|chunk| maximum(isa, chunk)));
    let highest = maximum(isa, tops);
    if highest.is_nan() || highest == f32::INFINITY {
        return Err(Fault::NotANumber);
    }
    if highest == f32::NEG_INFINITY {
        return Err(Fault::NothingAllowed);
    }
    let chunk = tops.iter().position(|top| *top == highest).unwrap_or(0) * CHUNK;
    let within = logits[chunk..].iter().position(|logit| *logit == highest).unwrap_or(0);
    Ok(Candidate { logit: highest, token: (chunk + within) as u32, weight: 1.0 })
}
