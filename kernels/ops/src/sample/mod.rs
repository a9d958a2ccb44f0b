//! From a row of logits to a token, and log-probabilities of the raw row.
//!
//! Order: repetition, frequency and presence penalties, bias, the ban before `min_tokens`,
//! temperature, top-k, top-p, min-p, draw. The draw's random number depends on (seed, choice,
//! position) alone, every selection breaks ties by token number, and sums go by token, so batch,
//! preemption and processor do not change a sample. Nothing is sorted whole: filters find a cut.

pub mod cuda;

mod choose;
mod draw;
mod filter;
mod logprobs;
mod philox;
mod seen;
#[cfg(test)]
mod tests;
mod workspace;

pub use choose::{Fault, Params, sample};
pub use logprobs::{LogSoftmax, TokenLogprob};
pub use philox::{philox4x32_10, uniform};
pub use seen::Seen;
pub use workspace::Workspace;
