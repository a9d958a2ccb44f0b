//! What a step produced. Answers one plan; order within a slot is generation order.

use ids::{Incarnation, RequestId, SlotGeneration, SlotId, StepSeq, TokenId, Tokens};

/// The result of one step of one shard.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The plan answered.
    pub seq: StepSeq,
    /// The life it was run in.
    pub incarnation: Incarnation,
    /// Sampled tokens, one entry per accepted token; a slot's entries are in order.
    pub sampled: Vec<Sampled>,
    /// Finished parts of prompt log-probabilities.
    pub prompt_logprobs: Vec<PromptLogprobs>,
    /// Where the time went.
    pub timing: StepTiming,
    /// A [`crate::Digest`] over every command of this life up to the plan, and the sampled ids; ranks
    /// of a shard must agree. A rank that is not its shard's lead says nothing else of what it drew.
    pub digest: u64,
}

/// One token drawn for one slot.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The slot.
    pub slot: SlotId,
    /// Its life.
    pub generation: SlotGeneration,
    /// The token; meaningless where `fault` is set.
    pub token: TokenId,
    /// Why no token could be drawn.
    pub fault: Option<SampleFault>,
    /// Present when the request asked for it.
    pub logprobs: Option<Box<Logprobs>>,
}

/// A sampling failure that concerns one request alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SampleFault {
    /// The logits held NaN.
    NotANumber,
    /// Every token was banned.
    NothingAllowed,
}

/// A token with the natural log of its probability under the raw logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: TokenId,
    /// Natural log of its probability.
    pub logprob: f32,
    /// 1 for the likeliest token, and so on.
    pub rank: u32,
}

/// The chosen (or given) token and the likeliest alternatives.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// The token itself.
    pub chosen: TokenLogprob,
    /// The likeliest tokens in order, as many as asked for.
    pub top: Vec<TokenLogprob>,
}

/// Log-probabilities of consecutive prompt tokens. Returned in parts as chunks finish.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptLogprobs {
    /// Whose prompt; parts outlive the slot.
    pub request: RequestId,
    /// Position of the first token described (1 is the first that has a probability).
    pub first: Tokens,
    /// One entry per position.
    pub entries: Vec<Logprobs>,
}

/// Timings of one step, for metrics and for fitting the scheduler's cost model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTiming {
    /// From taking the plan, or from the tokens of the step before where that was later, to having
    /// the tokens, in nanoseconds.
    pub total_ns: u64,
    /// In the model program alone, in nanoseconds.
    pub model_ns: u64,
    /// From the end of the step before on the device to this one's first launch, in nanoseconds; 0
    /// where it is not measured.
    pub idle_ns: u64,
    /// Kernels, graphs and copies that the host launched; 0 where there are none.
    pub launches: u32,
    /// Whether the host drew tokens, so that no step could be enqueued behind this one.
    pub host_draws: bool,
    /// Kinds of steps that the worker has captured until now; 0 where it captures none.
    pub graphs: u32,
    /// Whether the step was launched op by op though steps are captured.
    pub uncaptured: bool,
    /// Tokens run through the model.
    pub tokens: u32,
    /// Prompt tokens among them.
    pub prefill_tokens: u32,
}
