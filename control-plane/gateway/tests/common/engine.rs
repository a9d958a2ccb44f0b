//! An engine that generates a scripted text, and remembers what was asked of it.

use gateway::engine::{
    Engine, FinishReason, GenerateRequest, GeneratedToken, Generation, GenerationControl,
    GenerationError, GenerationEvent, Limits, Readiness, SubmitError,
};
use ids::{RequestId, TokenId, Tokens};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use step::{Logprobs, PromptLogprobs, TokenLogprob};
use tokio::sync::mpsc;

pub(crate) const VOCAB: u32 = 300;
pub(crate) const MAX_CONTEXT: u32 = 256;

/// What ended a generation from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Stopped(Tokens),
    Aborted,
}

#[derive(Default)]
pub(crate) struct FakeEngine {
    /// Tokens of each answer; the model's end token follows.
    pub(crate) answer: Vec<u32>,
    /// Tokens per event.
    pub(crate) batch: usize,
    /// Before each event.
    pub(crate) delay: Duration,
    /// Fail after this many tokens.
    pub(crate) fail: Option<(usize, GenerationError)>,
    /// Only the request of this number fails, counted from one; all where absent.
    pub(crate) fail_only: Option<u64>,
    pub(crate) refuse: Option<SubmitError>,
    pub(crate) readiness: Mutex<Option<Readiness>>,
    pub(crate) requests: Mutex<Vec<GenerateRequest>>,
    pub(crate) ended: Arc<Mutex<Vec<Ended>>>,
    /// Instead of [`MAX_CONTEXT`].
    pub(crate) max_context: Option<u32>,
    /// Shared with every generation that the gateway holds.
    pub(crate) held: Arc<()>,
}

impl FakeEngine {
    /// Says `text`, a byte per token.
    pub(crate) fn say(text: &str) -> Self {
        Self { answer: text.bytes().map(u32::from).collect(), batch: 1, ..Self::default() }
    }

    pub(crate) fn last_request(&self) -> GenerateRequest {
        self.requests.lock().unwrap().last().expect("a request was submitted").clone()
    }

    pub(crate) fn submitted(&self) -> usize {
        self.requests.lock().unwrap().len()
    }

    /// Generations that have neither ended nor been given up.
    pub(crate) fn running(&self) -> usize {
        Arc::strong_count(&self.held) - 1
    }

    /// Waits until `count` generations were ended from outside.
    pub(crate) async fn ended(&self, count: usize) -> Vec<Ended> {
        for _ in 0..200 {
            let ended = self.ended.lock().unwrap().clone();
            if ended.len() >= count {
                return ended;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{:?} ended, not {count}", self.ended.lock().unwrap());
    }
}

struct Control {
    ended: Arc<Mutex<Vec<Ended>>>,
    _held: Arc<()>,
}

impl GenerationControl for Control {
    fn stop(&self, keep: Tokens) {
        self.ended.lock().unwrap().push(Ended::Stopped(keep));
    }

    fn abort(&self) {
        self.ended.lock().unwrap().push(Ended::Aborted);
    }
}

/// The token itself at -0.25 and the next ids below it; one of them impossible.
pub(crate) fn logprobs(token: TokenId, count: u8) -> Logprobs {
    let entry = |token, logprob, rank| TokenLogprob { token, logprob, rank };
    let top = (0..u32::from(count)).map(|i| {
        let logprob = if i == 4 { f32::NEG_INFINITY } else { -0.25 - i as f32 };
        entry(TokenId((token.0 + i) % VOCAB), logprob, i + 1)
    });
    Logprobs { chosen: entry(token, -0.25, 1), top: top.collect() }
}

impl Engine for FakeEngine {
    fn submit(&self, request: GenerateRequest) -> Result<Generation, SubmitError> {
        if let Some(error) = &self.refuse {
            return Err(error.clone());
        }
        let state = self.readiness();
        if state != Readiness::Ready {
            return Err(SubmitError::NotReady(state));
        }
        let count = {
            let mut requests = self.requests.lock().unwrap();
            requests.push(request.clone());
            requests.len() as u64
        };
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut events = vec![GenerationEvent::Started { cached: Tokens(3) }];
        if let Some(k) = request.prompt_logprobs {
            // In parts, as an engine that runs prompts in chunks reports them.
            let entries: Vec<_> = request.prompt[1..].iter().map(|t| logprobs(*t, k)).collect();
            for (part, entries) in entries.chunks(4).enumerate() {
                events.push(GenerationEvent::PromptLogprobs(PromptLogprobs {
                    request: RequestId(count),
                    first: Tokens(1 + 4 * part as u32),
                    entries: entries.to_vec(),
                }));
            }
        }
        let max = request.max_tokens.as_usize();
        let script = self.answer.iter().copied().chain([super::model::END]).cycle();
        let mut tokens = Vec::new();
        let mut reason = FinishReason::Length;
        for token in script.take(max).map(TokenId) {
            let logprobs = request.sampling.logprobs.map(|k| Box::new(logprobs(token, k)));
            tokens.push(GeneratedToken { token, logprobs });
            let ends = request.stop_token_ids.contains(&token);
            if ends && tokens.len() >= request.sampling.min_tokens.as_usize() {
                reason = FinishReason::Stop;
                break;
            }
        }
        let fails = self.fail_only.is_none_or(|only| only == count);
        let fail = self.fail.clone().filter(|_| fails);
        if let Some((after, _)) = &fail {
            tokens.truncate(*after);
        }
        for batch in tokens.chunks(self.batch.max(1)) {
            events.push(GenerationEvent::Tokens(batch.to_vec()));
        }
        events.push(match fail {
            Some((_, error)) => GenerationEvent::Failed(error),
            None => GenerationEvent::Finished(reason),
        });
        let delay = self.delay;
        tokio::spawn(async move {
            for event in events {
                if !delay.is_zero() {
                    tokio::time::sleep(delay).await;
                }
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        let control = Control { ended: Arc::clone(&self.ended), _held: Arc::clone(&self.held) };
        Ok(Generation::new(receiver, Box::new(control)))
    }

    fn readiness(&self) -> Readiness {
        self.readiness.lock().unwrap().clone().unwrap_or(Readiness::Ready)
    }

    fn limits(&self) -> Limits {
        Limits { vocab: VOCAB, max_context: Tokens(self.max_context.unwrap_or(MAX_CONTEXT)) }
    }
}
