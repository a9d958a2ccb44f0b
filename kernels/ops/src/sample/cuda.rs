//! Launches of the sampler and of log-probabilities, one cluster of blocks per row, all on the device.
//!
//! A row that is drawn lies in the shared memory of its cluster; greedy draws and log-probabilities take it
//! through registers. So it is read once, and stays as it is.
//! The order of steps is the contract's, and exponentials have the processor's bits; masses are exact
//! integers instead of floating sums, so a draw differs from the processor's only where the random
//! number lies within rounding of a border. Penalties read dense counts, `[slots, vocab]`, that the
//! draw itself keeps up.

#[cfg(test)]
mod tests;

use crate::cuda::{Queue, Rows, dim, need, shape};
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters};

/// How one row is drawn, as the device has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleRow {
    /// Key of the random numbers.
    pub seed: u64,
    /// 0 takes the likeliest.
    pub temperature: f32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
    /// 1 is off.
    pub repetition: f32,
    /// 0 is off.
    pub frequency: f32,
    /// 0 is off.
    pub presence: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// Which of several choices.
    pub choice: u32,
    /// Index of the output token.
    pub position: u32,
    /// Row of the counts.
    pub slot: u32,
    /// First of the row's biases.
    pub bias_start: u32,
    /// How many.
    pub bias_count: u32,
    /// First of the row's banned tokens.
    pub banned_start: u32,
    /// How many cannot be drawn now.
    pub banned_count: u32,
}

impl SampleRow {
    /// The likeliest token.
    pub const GREEDY: Self = Self {
        seed: 0,
        temperature: 0.0,
        top_p: 1.0,
        min_p: 0.0,
        repetition: 1.0,
        frequency: 0.0,
        presence: 0.0,
        top_k: 0,
        choice: 0,
        position: 0,
        slot: 0,
        bias_start: 0,
        bias_count: 0,
        banned_start: 0,
        banned_count: 0,
    };

    /// Whether counts of what was seen matter.
    #[must_use]
    pub const fn has_penalties(&self) -> bool {
        self.repetition != 1.0 || self.frequency != 0.0 || self.presence != 0.0
    }

    /// Whether [`greedy`] draws the same.
    #[must_use]
    pub const fn is_greedy(&self) -> bool {
        let lists = self.bias_count > 0 || self.banned_count > 0;
        self.temperature == 0.0 && !lists && !self.has_penalties()
    }

    /// As the device has it, in 32-bit words.
    #[must_use]
    pub const fn words(&self) -> [u32; 16] {
        [
            self.seed as u32,
            (self.seed >> 32) as u32,
            self.temperature.to_bits(),
            self.top_p.to_bits(),
            self.min_p.to_bits(),
            self.repetition.to_bits(),
            self.frequency.to_bits(),
            self.presence.to_bits(),
            self.top_k,
            self.choice,
            self.position,
            self.slot,
            self.bias_start,
            self.bias_count,
            self.banned_start,
            self.banned_count,
        ]
    }
}

/// What [`sample`] leaves per row beside the token.
pub mod fault {
    /// A token was drawn.
    pub const NONE: u32 = 0;
    /// The row holds NaN or positive infinity.
    pub const NOT_A_NUMBER: u32 = 1;
    /// Every token is banned.
    pub const NOTHING_ALLOWED: u32 = 2;
}

/// Mirrors `SampleParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    logits: u64,
    how: u64,
    count: u64,
    seen: u64,
    bias_tokens: u64,
    bias_values: u64,
    banned: u64,
    tokens: u64,
    faults: u64,
    rows: u32,
    vocab: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `sample`; places in the lists are the
// promise of whoever fills the rows.
unsafe impl Parameters for Params {}

/// Operands of [`sample`].
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// f32 `[rows, vocab]`; not changed.
    pub logits: &'a DeviceSlice,
    /// Tokens of a row.
    pub vocab: usize,
    /// [`SampleRow`] each; slots and list places inside of what follows.
    pub how: &'a DeviceSlice,
    /// u32 `[slots, vocab]` by [`count_tokens`], to which what is drawn is added; none where no row has
    /// penalties.
    pub seen: Option<&'a DeviceSlice>,
    /// u32 tokens and f32 values of all rows' biases; no row names a token twice.
    pub bias: Option<(&'a DeviceSlice, &'a DeviceSlice)>,
    /// u32 tokens of all rows' bans.
    pub banned: Option<&'a DeviceSlice>,
    /// u32 `[rows]`, written; 0 where there is a fault.
    pub tokens: &'a DeviceSlice,
    /// u32 `[rows]`, written; see [`fault`].
    pub faults: &'a DeviceSlice,
}

/// Draws a token of every row.
///
/// # Errors
/// When an operand is too short, or the launch fails.
pub fn sample(on: Queue<'_>, rows: Rows<'_>, operands: &Sample<'_>) -> Result<(), CudaError> {
    const OP: &str = "sample";
    let Sample { logits, vocab, how, seen, bias, banned, tokens, faults } = *operands;
    check_vocab(OP, vocab)?;
    need(OP, "logits", logits, &[rows.padded, vocab], 4)?;
    need(OP, "parameters", how, &[rows.padded], size_of::<SampleRow>())?;
    need(OP, "tokens", tokens, &[rows.padded], 4)?;
    need(OP, "faults", faults, &[rows.padded], 4)?;
    let params = Params {
        logits: logits.address(),
        how: how.address(),
        count: rows.count_address(),
        seen: seen.map_or(0, DeviceSlice::address),
        bias_tokens: bias.map_or(0, |(tokens, _)| tokens.address()),
        bias_values: bias.map_or(0, |(_, values)| values.address()),
        banned: banned.map_or(0, DeviceSlice::address),
        tokens: tokens.address(),
        faults: faults.address(),
        rows: dim(OP, rows.padded)?,
        vocab: dim(OP, vocab)?,
    };
    launch(on, HOLDING, params.rows, vocab)?.on(on.stream, &params)
}

/// Mirrors `GreedyParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct GreedyParams {
    logits: u64,
    count: u64,
    tokens: u64,
    faults: u64,
    rows: u32,
    vocab: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `greedy`.
unsafe impl Parameters for GreedyParams {}

/// The likeliest token of every row, as [`sample`] finds it for [`SampleRow::GREEDY`], in less time.
/// Of [`Sample`]'s operands these are `logits`, `tokens` and `faults`.
///
/// # Errors
/// When an operand is too short, or the launch fails.
pub fn greedy(
    on: Queue<'_>,
    rows: Rows<'_>,
    vocab: usize,
    logits: &DeviceSlice,
    (tokens, faults): (&DeviceSlice, &DeviceSlice),
) -> Result<(), CudaError> {
    const OP: &str = "greedy";
    check_vocab(OP, vocab)?;
    need(OP, "logits", logits, &[rows.padded, vocab], 4)?;
    need(OP, "tokens", tokens, &[rows.padded], 4)?;
    need(OP, "faults", faults, &[rows.padded], 4)?;
    let params = GreedyParams {
        logits: logits.address(),
        count: rows.count_address(),
        tokens: tokens.address(),
        faults: faults.address(),
        rows: dim(OP, rows.padded)?,
        vocab: dim(OP, vocab)?,
    };
    launch(on, OP, params.rows, vocab)?.on(on.stream, &params)
}

/// The kernel that holds a row in shared memory.
pub(crate) const HOLDING: &str = "sample";
/// Threads of a block.
const THREADS: u32 = 512;
/// Blocks of a cluster, at most.
const MOST_BLOCKS: usize = 8;
/// Logits for which a row gets another block, until it has all: with fewer, barriers cost more than
/// blocks save.
const FEW_LOGITS: usize = 1 << 14;
/// Logits that a block holds, at most.
const MOST_LOGITS: usize = 49_152;

/// A row longer than a cluster holds is refused.
fn check_vocab(op: &'static str, vocab: usize) -> Result<(), CudaError> {
    const MOST: usize = MOST_BLOCKS * MOST_LOGITS;
    if vocab == 0 || vocab > MOST {
        let why = format!("a vocabulary of {vocab}; clusters hold rows of 1 to {MOST} logits");
        return Err(shape(op, why));
    }
    Ok(())
}

/// Blocks of a row, and the logits that each of them has.
const fn cluster(vocab: usize) -> (usize, usize) {
    let wanted = vocab.div_ceil(FEW_LOGITS).next_power_of_two();
    let blocks = if wanted < MOST_BLOCKS { wanted } else { MOST_BLOCKS };
    (blocks, vocab.div_ceil(blocks).next_multiple_of(4))
}

/// A cluster per row.
fn launch<'a>(
    on: Queue<'a>,
    kernel: &'static str,
    rows: u32,
    vocab: usize,
) -> Result<Launch<'a>, CudaError> {
    let (blocks, logits) = cluster(vocab);
    let blocks = dim(kernel, blocks)?;
    let held = if kernel == HOLDING { logits * size_of::<f32>() } else { 0 };
    let launch = Launch::new(on.kernel(kernel)?, [blocks, rows, 1], THREADS);
    Ok(launch.cluster(blocks).shared(dim(kernel, held)?))
}

/// Mirrors `CountParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct CountParams {
    tokens: u64,
    seen: u64,
    prompt: u32,
    count: u32,
    vocab: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `count_tokens`, tokens by the kernel.
unsafe impl Parameters for CountParams {}

/// Adds the known tokens of a request to its slot's counts, which were zeroed: the first `prompt` of
/// them are the client's.
///
/// # Errors
/// When an operand is too short, or the launch fails.
pub fn count_tokens(
    on: Queue<'_>,
    tokens: &DeviceSlice,
    known: usize,
    prompt: usize,
    seen: &DeviceSlice,
    vocab: usize,
) -> Result<(), CudaError> {
    const OP: &str = "count_tokens";
    need(OP, "tokens", tokens, &[known], 4)?;
    need(OP, "counts", seen, &[vocab], 4)?;
    let params = CountParams {
        tokens: tokens.address(),
        seen: seen.address(),
        prompt: dim(OP, prompt)?,
        count: dim(OP, known)?,
        vocab: dim(OP, vocab)?,
    };
    let blocks = params.count.div_ceil(256);
    Launch::new(on.kernel("count_tokens")?, [blocks, 1, 1], 256).on(on.stream, &params)
}

/// A token with its log-probability and rank, as the device writes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// Natural log of its probability.
    pub logprob: f32,
    /// 1 for the likeliest; one more than the tokens that are likelier.
    pub rank: u32,
}

/// Likeliest tokens that one row lists, at most.
pub const MOST_LISTED: usize = 64;
/// In [`Logprobs::wanted`]: nothing is wanted of this row.
pub const UNWANTED: u32 = u32::MAX;

/// Mirrors `LogprobParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LogprobParams {
    logits: u64,
    chosen: u64,
    given: u64,
    wanted: u64,
    count: u64,
    out: u64,
    rows: u32,
    vocab: u32,
    most: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `logprobs`, tokens by the kernel.
unsafe impl Parameters for LogprobParams {}

/// Operands of [`logprobs`].
#[derive(Clone, Copy, Debug)]
pub struct Logprobs<'a> {
    /// f32 `[rows, vocab]`, raw.
    pub logits: &'a DeviceSlice,
    /// Tokens of a row.
    pub vocab: usize,
    /// u32 `[rows]`: the token to describe; one outside of the vocabulary is passed over.
    pub chosen: &'a DeviceSlice,
    /// u32 `[rows]`: the token to describe instead; [`UNWANTED`] where it is the one above.
    pub given: Option<&'a DeviceSlice>,
    /// u32 `[rows]`: how many of the likeliest to list, or [`UNWANTED`].
    pub wanted: &'a DeviceSlice,
    /// Entries of a row for them, at most [`MOST_LISTED`].
    pub most: usize,
    /// [`TokenLogprob`] `[rows, 1 + most]`: the chosen one, then the likeliest in order.
    pub out: &'a DeviceSlice,
}

/// Describes tokens by their raw rows. A row that holds NaN has NaN log-probabilities.
///
/// # Errors
/// When an operand is too short, or the launch fails.
pub fn logprobs(on: Queue<'_>, rows: Rows<'_>, operands: &Logprobs<'_>) -> Result<(), CudaError> {
    const OP: &str = "logprobs";
    let Logprobs { logits, vocab, chosen, given, wanted, most, out } = *operands;
    check_vocab(OP, vocab)?;
    if most > MOST_LISTED {
        return Err(shape(OP, format!("lists of {most} tokens")));
    }
    need(OP, "logits", logits, &[rows.padded, vocab], 4)?;
    need(OP, "chosen", chosen, &[rows.padded], 4)?;
    need(OP, "wanted", wanted, &[rows.padded], 4)?;
    if let Some(given) = given {
        need(OP, "given", given, &[rows.padded], 4)?;
    }
    need(OP, "out", out, &[rows.padded, 1 + most], size_of::<TokenLogprob>())?;
    let params = LogprobParams {
        logits: logits.address(),
        chosen: chosen.address(),
        given: given.map_or(0, DeviceSlice::address),
        wanted: wanted.address(),
        count: rows.count_address(),
        out: out.address(),
        rows: dim(OP, rows.padded)?,
        vocab: dim(OP, vocab)?,
        most: dim(OP, most)?,
    };
    launch(on, OP, params.rows, vocab)?.on(on.stream, &params)
}
