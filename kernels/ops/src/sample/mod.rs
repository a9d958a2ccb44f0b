//! From a row of logits to a token, and log-probabilities of the raw row.
//!
//! Order: repetition, frequency and presence penalties, bias, the ban before `min_tokens`,
//! temperature, top-k, top-p, min-p, draw. The draw's random number depends on (seed, choice,
//! position) alone, and every selection breaks ties by token number, so batch, preemption and
//! device do not change a sample. Nothing is sorted whole: filters select what they keep.

mod choose;
mod logprobs;
mod philox;
mod seen;
#[cfg(test)]
mod tests;

pub use choose::{Fault, Params, Workspace, sample};
pub use logprobs::{LogSoftmax, TokenLogprob};
pub use philox::{philox4x32_10, uniform};
pub use seen::Seen;
