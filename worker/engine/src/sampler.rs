//! Draws tokens and describes rows: a slot's parameters and counts meet its logits.
//!
//! The arithmetic is the op's; here is only what belongs to a request. Invariant: a draw depends on
//! the row, the request's parameters, what it has seen and the number of its output token, which is
//! what prompt and output determine, so a preemption changes nothing.

use crate::executor::RowDraw;
use crate::slots::Life;
use ids::{SlotId, TokenId, Tokens};
use ops::sample::cuda::{SampleRow, UNWANTED, fault};
use ops::sample::{Fault, LogSoftmax, Params, Seen, Workspace, sample};
use step::{Logprobs, MAX_LOGPROBS, SampleFault, Sampling, TokenLogprob};

/// Biases that a slot has a place for on a device: as many as the gateway lets through.
pub(crate) const MOST_BIASES: usize = 1024;
/// Bans, likewise: stop tokens that a client names, and those of the model.
const MOST_BANNED: usize = 512;
/// 32-bit words of a slot's place for both: tokens of biases, their values, bans.
pub(crate) const LIST_WORDS: usize = 2 * MOST_BIASES + MOST_BANNED;

/// What a request's sampling needs beyond its parameters.
#[derive(Debug, Default)]
pub(crate) struct SamplerState {
    /// Counted only where a penalty is on.
    seen: Option<Seen>,
    bias: Vec<(u32, f32)>,
    banned: Vec<u32>,
}

impl SamplerState {
    /// Rebuilt from all known tokens, of which the first `prompt` are the client's. No sequence has
    /// more than `most` distinct tokens; memory for them is taken now, so that no step takes any.
    pub(crate) fn new(sampling: &Sampling, tokens: &[u32], prompt: usize, most: usize) -> Self {
        let seen = sampling.has_penalties().then(|| {
            let mut seen = Seen::none();
            seen.reserve(most);
            let (prompt, output) = tokens.split_at(prompt.min(tokens.len()));
            prompt.iter().for_each(|&token| seen.prompt(token));
            output.iter().for_each(|&token| seen.output(token));
            seen
        });
        Self {
            seen,
            bias: sampling.logit_bias.iter().map(|&(token, bias)| (token.0, bias)).collect(),
            banned: sampling.banned_before_min.iter().map(|token| token.0).collect(),
        }
    }

    /// Whether a slot's place on a device holds the lists.
    fn fits(&self) -> bool {
        self.bias.len() <= MOST_BIASES && self.banned.len() <= MOST_BANNED
    }

    /// Writes the lists as a slot's place has them; what is behind their ends stays.
    pub(crate) fn write_lists(&self, words: &mut [u32]) {
        let (tokens, rest) = words.split_at_mut(MOST_BIASES);
        let (values, banned) = rest.split_at_mut(MOST_BIASES);
        for ((token, value), (t, v)) in tokens.iter_mut().zip(values).zip(&self.bias) {
            (*token, *value) = (*t, v.to_bits());
        }
        banned.iter_mut().zip(&self.banned).for_each(|(to, token)| *to = *token);
    }

    /// Counts a token of the output.
    pub(crate) fn record(&mut self, token: TokenId) {
        if let Some(seen) = &mut self.seen {
            seen.output(token.0);
        }
    }
}

/// What came of a row.
pub(crate) struct Drawn {
    pub(crate) token: Result<TokenId, SampleFault>,
    pub(crate) logprobs: Option<Logprobs>,
}

/// Memory of draws, kept between steps.
#[derive(Debug)]
pub(crate) struct Sampler {
    workspace: Workspace,
    /// The raw row, kept where its log-probabilities are wanted after it was changed.
    raw: Vec<f32>,
    none: Seen,
}

impl Sampler {
    pub(crate) fn new(vocab: usize) -> Self {
        Self {
            workspace: Workspace::new(vocab),
            raw: Vec::with_capacity(vocab),
            none: Seen::none(),
        }
    }

    /// How a request's next token is drawn on a device; `None` where its lists are too long. It depends
    /// on the request alone, so neither batch mates nor its length change who draws.
    pub(crate) fn on_device(life: &Life, slot: SlotId) -> Option<RowDraw> {
        let sampling = &*life.sampling;
        let (output, state) = (life.known - life.prompt, &life.sampler);
        if !state.fits() {
            return None;
        }
        let place = slot.0 * LIST_WORDS as u32;
        let how = SampleRow {
            seed: sampling.seed,
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repetition: sampling.repetition_penalty,
            frequency: sampling.frequency_penalty,
            presence: sampling.presence_penalty,
            top_k: sampling.top_k,
            choice: sampling.choice,
            position: output.0,
            slot: slot.0,
            bias_start: place,
            bias_count: state.bias.len() as u32,
            banned_start: place,
            banned_count: banned(&state.banned, output, sampling.min_tokens).len() as u32,
        };
        let listed = sampling.logprobs.map_or(UNWANTED, u32::from);
        Some(RowDraw { how, listed, given: None })
    }

    /// How the prompt token at `position` is described on a device, by the row before it; `None` where
    /// more are listed than there is room for.
    pub(crate) fn described(life: &Life, position: u32) -> Option<RowDraw> {
        let listed = life.prompt_logprobs.unwrap_or(0);
        (listed <= MAX_LOGPROBS).then(|| RowDraw {
            how: SampleRow::GREEDY,
            listed: listed.into(),
            given: Some(life.token(position).unwrap_or_default()),
        })
    }

    /// Draws the next token of a request from its row, which is changed.
    pub(crate) fn draw(&mut self, logits: &mut [f32], life: &Life) -> Drawn {
        let sampling = &*life.sampling;
        if sampling.logprobs.is_some() {
            self.raw.clear();
            self.raw.extend_from_slice(logits);
        }
        let output = life.known - life.prompt;
        let state = &life.sampler;
        let params = Params {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            seed: sampling.seed,
            choice: sampling.choice,
            position: output.0,
            repetition_penalty: sampling.repetition_penalty,
            frequency_penalty: sampling.frequency_penalty,
            presence_penalty: sampling.presence_penalty,
            seen: state.seen.as_ref().unwrap_or(&self.none),
            bias: &state.bias,
            banned: banned(&state.banned, output, sampling.min_tokens),
        };
        let token = sample(logits, &params, &mut self.workspace);
        let logprobs = match (&token, sampling.logprobs) {
            (Ok(token), Some(top)) => Some(logprobs(&self.raw, *token, top)),
            _ => None,
        };
        let token = token.map(TokenId).map_err(|fault| match fault {
            Fault::NotANumber => SampleFault::NotANumber,
            Fault::NothingAllowed => SampleFault::NothingAllowed,
        });
        Drawn { token, logprobs }
    }

    /// Describes the prompt token at `position` by the row before it.
    pub(crate) fn describe(&self, logits: &[f32], life: &Life, position: u32) -> Logprobs {
        logprobs(
            logits,
            life.token(position).unwrap_or_default(),
            life.prompt_logprobs.unwrap_or(0),
        )
    }
}

/// What a device left of a row.
pub(crate) const fn drawn_on_device(token: u32, left: u32) -> Drawn {
    let token = match left {
        fault::NONE => Ok(TokenId(token)),
        fault::NOTHING_ALLOWED => Err(SampleFault::NothingAllowed),
        _ => Err(SampleFault::NotANumber),
    };
    Drawn { token, logprobs: None }
}

/// What a device says of a row of `vocab` tokens of which `listed` are asked for.
pub(crate) fn described_on_device(
    entries: &[[u32; 3]],
    listed: u32,
    vocab: usize,
) -> Option<Logprobs> {
    let convert = |[token, logprob, rank]: [u32; 3]| TokenLogprob {
        token: TokenId(token),
        logprob: f32::from_bits(logprob),
        rank,
    };
    let (chosen, top) = entries.split_first()?;
    let top = top.iter().take(vocab.min(listed as usize));
    Some(Logprobs { chosen: convert(*chosen), top: top.copied().map(convert).collect() })
}

fn banned(tokens: &[u32], output: Tokens, min_tokens: Tokens) -> &[u32] {
    if output < min_tokens { tokens } else { &[] }
}

fn logprobs(raw: &[f32], token: u32, top: u8) -> Logprobs {
    let softmax = LogSoftmax::of(raw);
    let convert = |one: ops::sample::TokenLogprob| TokenLogprob {
        token: TokenId(one.token),
        logprob: one.logprob,
        rank: one.rank,
    };
    let mut likeliest = Vec::with_capacity(usize::from(top) + 1);
    softmax.top(raw, usize::from(top), &mut likeliest);
    Logprobs {
        chosen: convert(softmax.token(raw, token)),
        top: likeliest.into_iter().map(convert).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn penalties_take_their_memory_at_admission() {
        let sampling = Sampling { presence_penalty: 1.0, ..Sampling::default() };
        let mut state = SamplerState::new(&sampling, &[1, 2, 3], 2, 2000);
        let held = |state: &SamplerState| state.seen.as_ref().map(Seen::capacity);
        let before = held(&state);
        assert!(before >= Some(2000), "{before:?}");
        (0..2000).for_each(|token| state.record(TokenId(token)));
        assert_eq!(held(&state), before, "counting took memory");
        let plain = SamplerState::new(&Sampling::default(), &[1], 1, 2000);
        assert!(plain.seen.is_none(), "nothing is counted where no penalty is on");
    }
}
