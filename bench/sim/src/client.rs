//! A client's side of one request: what it asked for, what it must get, what it got.
//!
//! The expected tokens come from a naive loop over the same sampling function that the worker
//! uses, without slots, blocks or batches: the oracle. It drives nothing. Invariant: `check_*`
//! fails at the first token, count or ending that differs from the oracle.

use crate::rng::chain;
use ids::{RequestId, TokenId, Tokens};
use scheduler::{FinishReason, Submit, Usage};
use std::sync::Arc;

/// Entries of the simulated vocabulary.
pub const VOCAB: u32 = 97;
/// The model's end token.
pub const END: TokenId = TokenId(0);

/// The token that follows a history.
#[must_use]
pub fn draw(seed: u64, choice: u32, history: u64) -> TokenId {
    TokenId((chain(chain(history, seed), u64::from(choice)) % u64::from(VOCAB)) as u32)
}

/// What names the tokens up to and including `token`.
#[must_use]
pub fn history(before: u64, token: TokenId) -> u64 {
    chain(before, u64::from(token.0))
}

/// A request as its client sees it.
#[derive(Debug)]
pub struct Client {
    /// As submitted.
    pub submit: Submit,
    expected: Vec<TokenId>,
    natural: FinishReason,
    got: usize,
    cached: Option<Tokens>,
    prompt_logprobs: u32,
    /// Tokens after which a stop string is found in the text, and how many of them are kept.
    pub stop_at: Option<(u32, u32)>,
    /// What the client did to end it.
    pub asked: Vec<FinishReason>,
    /// Keeps of the stops sent.
    pub keeps: Vec<u32>,
}

impl Client {
    /// A client that waits for what the oracle says.
    #[must_use]
    pub fn new(submit: Submit, stop_at: Option<(u32, u32)>) -> Self {
        let (expected, natural) = oracle(&submit);
        Self {
            submit,
            expected,
            natural,
            got: 0,
            cached: None,
            prompt_logprobs: 0,
            stop_at,
            asked: Vec::new(),
            keeps: Vec::new(),
        }
    }

    /// What the oracle says, to the end.
    #[must_use]
    pub fn expected(&self) -> &[TokenId] {
        &self.expected
    }

    /// Output tokens seen.
    #[must_use]
    pub fn got(&self) -> u32 {
        u32::try_from(self.got).unwrap_or(u32::MAX)
    }

    /// Takes the admission.
    ///
    /// # Errors
    /// When it comes twice.
    pub fn started(&mut self, cached: Tokens) -> Result<(), String> {
        if self.cached.replace(cached).is_some() {
            return Err("started twice".into());
        }
        if self.submit.prompt_logprobs.is_some() && !cached.is_zero() {
            return Err("a prompt with log-probabilities hit the cache".into());
        }
        Ok(())
    }

    /// Takes a token.
    ///
    /// # Errors
    /// When it is not the next one of the oracle.
    pub fn token(&mut self, token: TokenId) -> Result<(), String> {
        let want = self.expected.get(self.got).copied();
        if want != Some(token) {
            return Err(format!("output token {} is {token}, expected {want:?}", self.got));
        }
        self.got += 1;
        Ok(())
    }

    /// Takes a part of the prompt's log-probabilities.
    ///
    /// # Errors
    /// When it does not continue the parts before.
    pub fn prompt_part(&mut self, part: &step::PromptLogprobs) -> Result<(), String> {
        if part.first.0 != self.prompt_logprobs + 1 {
            return Err(format!("part at {} after {}", part.first, self.prompt_logprobs));
        }
        for (i, entry) in part.entries.iter().enumerate() {
            if Some(&entry.chosen.token) != self.submit.prompt.get(part.first.as_usize() + i) {
                return Err(format!("log-probability {i} of the part is of another token"));
            }
        }
        self.prompt_logprobs += u32::try_from(part.entries.len()).unwrap_or(u32::MAX);
        Ok(())
    }

    /// Takes the end.
    ///
    /// # Errors
    /// When the reason or the bill is not justified.
    pub fn finished(&self, reason: FinishReason, usage: Usage) -> Result<(), String> {
        let prompt = u32::try_from(self.submit.prompt.len()).unwrap_or(u32::MAX);
        let billed = |output| Usage {
            prompt: Tokens(prompt),
            cached: self.cached.unwrap_or_default(),
            output: Tokens(output),
        };
        let fair = match reason {
            FinishReason::Stop(_) | FinishReason::Length => {
                let whole = self.got == self.expected.len();
                let prompt_told =
                    self.submit.prompt_logprobs.is_none() || self.prompt_logprobs == prompt - 1;
                reason == self.natural && whole && prompt_told && usage == billed(self.got())
            }
            FinishReason::StopString => self.keeps.iter().any(|keep| usage == billed(*keep)),
            FinishReason::Aborted | FinishReason::Deadline => {
                self.asked.contains(&reason) && usage == billed(self.got())
            }
            FinishReason::WorkerDied { deaths } => deaths == 3 && usage == billed(self.got()),
            FinishReason::Refused(_) => self.cached.is_none() && usage == billed(0),
            // That it befell this request is the model's to say.
            FinishReason::Fault(_) => usage == billed(self.got()),
        };
        if fair {
            return Ok(());
        }
        Err(format!(
            "ended {reason:?} with {usage:?} after {} of {} tokens, naturally {:?}",
            self.got,
            self.expected.len(),
            self.natural
        ))
    }

    /// The id it runs under.
    #[must_use]
    pub fn id(&self) -> RequestId {
        self.submit.request
    }
}

/// The output of a request that runs alone and undisturbed.
fn oracle(submit: &Submit) -> (Vec<TokenId>, FinishReason) {
    let sampling = &submit.sampling;
    let mut past = submit.prompt.iter().fold(0, |past, token| history(past, *token));
    let mut output = Vec::new();
    while output.len() < submit.max_tokens.as_usize() {
        let token = draw(sampling.seed, sampling.choice, past);
        past = history(past, token);
        output.push(token);
        let ends = |list: &Arc<[TokenId]>| list.contains(&token);
        if (!submit.ignore_eos && ends(&submit.end_tokens)) || ends(&submit.stop_tokens) {
            return (output, FinishReason::Stop(token));
        }
    }
    (output, FinishReason::Length)
}
