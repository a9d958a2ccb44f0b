//! One choice of a reply: engine events in, pieces of text and tokens out.
//!
//! The same pieces make a stream's chunks and, put together, a whole reply, so the two cannot
//! differ. [`Decoder`] decides and is pure; [`Choice`] waits, counts, and tells the engine where a
//! stop string ended the text. Invariant: a choice that is dropped before its end aborts its
//! generation and is counted as aborted.

use crate::engine::{FinishReason, GeneratedToken, Generation, GenerationError, GenerationEvent};
use crate::validate::sampling::Common;
use ids::{TokenId, Tokens};
use std::sync::Arc;
use std::time::Instant;
use step::Logprobs;
use telemetry::{FinishedBy, Metrics};
use text::{Detokenizer, Start, StopMatcher, Tokenizer};

/// What is new in a choice.
#[derive(Debug, Default)]
pub(crate) struct Delta {
    /// Which choice; counted over all prompts of the request.
    pub(crate) index: usize,
    /// In a choice's first delta.
    pub(crate) opening: Option<Opening>,
    pub(crate) text: String,
    pub(crate) tokens: Vec<GeneratedToken>,
    /// In a choice's last delta.
    pub(crate) finish: Option<Finish>,
}

/// What is known about the prompt when generation starts.
#[derive(Debug, Default)]
pub(crate) struct Opening {
    pub(crate) cached: Tokens,
    /// Of prompt tokens 1, 2, …; empty unless asked for.
    pub(crate) prompt_logprobs: Vec<Logprobs>,
}

/// How a choice ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finish {
    pub(crate) reason: FinishReason,
    pub(crate) stop: StopReason,
}

/// What of the client's own stops ended it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StopReason {
    None,
    Token(TokenId),
    Text(Box<str>),
}

/// Tokens to text with stops applied.
#[derive(Debug)]
pub(crate) struct Decoder {
    /// Absent for a model without tokenizer: its text is empty.
    text: Option<(Detokenizer, StopMatcher)>,
    stop_token_ids: Arc<[TokenId]>,
    own_stop_token_ids: Arc<[TokenId]>,
    min_tokens: Tokens,
    include_stop: bool,
    generated: Tokens,
    last: Option<TokenId>,
}

impl Decoder {
    pub(crate) fn new(tokenizer: Option<&Arc<Tokenizer>>, common: &Common) -> Self {
        let text = tokenizer.map(|tokenizer| {
            let skip = common.skip_special;
            let detokenizer = Detokenizer::new(Arc::clone(tokenizer), Start::Continuation, skip);
            (detokenizer, StopMatcher::new(common.stop.clone(), common.include_stop))
        });
        Self {
            text,
            stop_token_ids: Arc::clone(&common.stop_token_ids),
            own_stop_token_ids: Arc::clone(&common.own_stop_token_ids),
            min_tokens: common.sampling.min_tokens,
            include_stop: common.include_stop,
            generated: Tokens::ZERO,
            last: None,
        }
    }

    /// Tokens taken so far: those to keep once a stop string was found.
    pub(crate) fn generated(&self) -> Tokens {
        self.generated
    }

    /// Takes tokens in order. With a stop string, what follows the token that completed it is
    /// dropped and `finish` is set.
    pub(crate) fn push(&mut self, mut tokens: Vec<GeneratedToken>, delta: &mut Delta) {
        let mut piece = String::new();
        for at in 0..tokens.len() {
            let token = tokens[at].token;
            self.generated += Tokens(1);
            self.last = Some(token);
            let Some((detokenizer, matcher)) = &mut self.text else { continue };
            let ends = self.generated >= self.min_tokens
                && self.stop_token_ids.binary_search(&token).is_ok();
            if ends && !self.include_stop {
                continue;
            }
            piece.clear();
            detokenizer.push(token, &mut piece);
            let armed = self.generated > self.min_tokens;
            if let Some(found) = matcher.push(&piece, armed, &mut delta.text) {
                tokens.truncate(at + 1);
                let stop = StopReason::Text(found.stop);
                delta.finish = Some(Finish { reason: FinishReason::Stop, stop });
                break;
            }
        }
        delta.tokens.append(&mut tokens);
    }

    /// The engine's end: hands out what text was held back.
    pub(crate) fn finish(&mut self, reason: FinishReason, delta: &mut Delta) {
        if let Some((detokenizer, matcher)) = &mut self.text {
            let mut piece = String::new();
            detokenizer.finish(&mut piece);
            // A broken character at the end cannot complete a stop string.
            let _ = matcher.push(&piece, false, &mut delta.text);
            matcher.finish(&mut delta.text);
        }
        let own = self.last.filter(|token| self.own_stop_token_ids.binary_search(token).is_ok());
        let stop = match (reason, own) {
            (FinishReason::Stop, Some(token)) => StopReason::Token(token),
            _ => StopReason::None,
        };
        delta.finish = Some(Finish { reason, stop });
    }
}

/// A choice whose generation is under way.
pub(crate) struct Choice {
    index: usize,
    /// None once it ended, and for a choice that generates nothing.
    generation: Option<Generation>,
    decoder: Decoder,
    opening: Option<Opening>,
    clock: Clock,
    ended: bool,
}

/// Times of one choice, as metrics want them.
struct Clock {
    metrics: Arc<Metrics>,
    submitted: Instant,
    last_token: Option<Instant>,
}

impl Clock {
    fn tokens(&mut self, count: usize) {
        let now = Instant::now();
        match self.last_token.replace(now) {
            None => {
                let waited = now.duration_since(self.submitted);
                self.metrics.time_to_first_token.observe(waited.as_secs_f64());
            }
            Some(before) => {
                let each = now.duration_since(before).as_secs_f64() / count.max(1) as f64;
                (0..count).for_each(|_| self.metrics.inter_token.observe(each));
            }
        }
        self.metrics.generated_tokens.inc_by(count as u64);
    }

    /// A request that was refused was never a generation.
    fn fail(&self, error: &GenerationError) {
        match error {
            GenerationError::Refused(refusal) => self.metrics.refused(refusal.label()).inc(),
            _ => self.end(FinishedBy::Error),
        }
    }

    fn end(&self, by: FinishedBy) {
        self.metrics.finished(by).inc();
        self.metrics.request_duration.observe(self.submitted.elapsed().as_secs_f64());
    }
}

impl Choice {
    /// A choice fed by `generation`; without one it ends at once, having generated nothing.
    pub(crate) fn new(
        index: usize,
        generation: Option<Generation>,
        decoder: Decoder,
        metrics: Arc<Metrics>,
    ) -> Self {
        let clock = Clock { metrics, submitted: Instant::now(), last_token: None };
        let opening = Some(Opening::default());
        Self { index, generation, decoder, opening, clock, ended: false }
    }

    /// The next piece; none after the last.
    ///
    /// # Errors
    /// The engine's failure, which is the end too.
    pub(crate) async fn next(&mut self) -> Result<Option<Delta>, GenerationError> {
        if self.ended {
            return Ok(None);
        }
        let mut delta = Delta { index: self.index, ..Delta::default() };
        loop {
            let event = match &mut self.generation {
                None => GenerationEvent::Finished(FinishReason::Length),
                Some(generation) => generation.next().await,
            };
            match event {
                GenerationEvent::Started { cached } => {
                    if let Some(opening) = &mut self.opening {
                        opening.cached = cached;
                    }
                }
                GenerationEvent::PromptLogprobs(part) => {
                    if let Some(opening) = &mut self.opening {
                        opening.prompt_logprobs.extend(part.entries);
                    }
                }
                GenerationEvent::Tokens(tokens) => {
                    self.decoder.push(tokens, &mut delta);
                    self.clock.tokens(delta.tokens.len());
                    if delta.finish.is_some()
                        && let Some(generation) = self.generation.take()
                    {
                        generation.stop(self.decoder.generated());
                    }
                    break;
                }
                GenerationEvent::Finished(reason) => {
                    self.decoder.finish(reason, &mut delta);
                    break;
                }
                GenerationEvent::Failed(error) => {
                    self.ended = true;
                    self.clock.fail(&error);
                    return Err(error);
                }
            }
        }
        delta.opening = self.opening.take();
        if let Some(finish) = &delta.finish {
            self.ended = true;
            self.generation = None;
            self.clock.end(match finish.reason {
                FinishReason::Stop => FinishedBy::Stop,
                FinishReason::Length => FinishedBy::Length,
            });
        }
        Ok(Some(delta))
    }

    /// The whole choice as one piece.
    ///
    /// # Errors
    /// The engine's failure.
    pub(crate) async fn whole(mut self) -> Result<Delta, GenerationError> {
        let mut whole = Delta { index: self.index, ..Delta::default() };
        while let Some(mut delta) = self.next().await? {
            whole.opening = whole.opening.or(delta.opening);
            whole.text.push_str(&delta.text);
            whole.tokens.append(&mut delta.tokens);
            whole.finish = delta.finish;
        }
        Ok(whole)
    }
}

impl Drop for Choice {
    fn drop(&mut self) {
        if !self.ended {
            self.clock.end(FinishedBy::Abort);
        }
    }
}
