//! A plan's runs as one batch: rows of tokens, segments over them, and rows whose logits are
//! wanted.
//!
//! Decodes come first, then chunks from short to long, so that attention can split the segments by
//! length. It only reads the slots it starts. Invariant: segments cover all rows once, in order.

use crate::PlanError;
use crate::slots::Slots;
use ids::{SlotId, Tokens};
use ops::tokens::OF_SLOT;
use step::Section;

/// Consecutive rows of one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The slot whose tables are read.
    pub slot: SlotId,
    /// First row.
    pub start: usize,
    /// Rows.
    pub len: usize,
    /// Tokens with KV after the step, these included.
    pub context: usize,
}

/// A row whose logits are wanted, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The row.
    pub row: u32,
    /// Whose.
    pub slot: SlotId,
    /// What for.
    pub purpose: Purpose,
}

/// What logits are wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To draw the next token.
    Sample,
    /// To describe the prompt token at this position.
    Prompt {
        /// Position of the token described, one after the row's.
        position: u32,
    },
}

/// One step's work. Reused from step to step.
#[derive(Debug, Default)]
pub struct Batch {
    /// Tokens, `[rows]`, or slots with [`OF_SLOT`] whose last token only the device knows.
    pub ids: Vec<u32>,
    /// Their positions, `[rows]`.
    pub positions: Vec<u32>,
    /// What belongs to whom.
    pub runs: Vec<Run>,
    /// Rows whose logits are wanted, in row order.
    pub wanted: Vec<Wanted>,
    /// Prompt tokens among the rows.
    pub prefill_tokens: usize,
    /// Number of the step.
    pub step: u64,
    /// Rows that each of several ranks runs for every shard.
    pub bucket: usize,
    /// Tokens of each of several shards.
    pub shard_rows: Vec<usize>,
    order: Vec<usize>,
}

impl Batch {
    /// Room for `tokens` rows of `slots` slots, so that filling never allocates (but for prompt
    /// log-probabilities, which want a row per token).
    pub(crate) fn with_capacity(tokens: usize, slots: usize) -> Self {
        Self {
            ids: Vec::with_capacity(tokens),
            positions: Vec::with_capacity(tokens),
            runs: Vec::with_capacity(slots),
            wanted: Vec::with_capacity(slots),
            prefill_tokens: 0,
            step: 0,
            bucket: 0,
            shard_rows: Vec::new(),
            order: Vec::with_capacity(slots),
        }
    }

    /// Fills the batch with a section's runs, after its ops were applied.
    pub(crate) fn fill(
        &mut self,
        slots: &mut Slots,
        section: &Section,
        limit: usize,
    ) -> Result<(), PlanError> {
        self.ids.clear();
        self.positions.clear();
        self.runs.clear();
        self.wanted.clear();
        self.prefill_tokens = 0;
        let chunked: usize = section.prefill.iter().map(|run| run.tokens.as_usize()).sum();
        let got = chunked + slots.decoding().len();
        // A slot that joins by its last chunk decodes from the next step on.
        let joining = section.decode.join.len();
        if got > limit + joining {
            return Err(PlanError::TooManyTokens { got, limit });
        }
        // Chunks are started first, so that a slot that just ran one does not decode too.
        let chunks = self.start_chunks(slots, section)?;
        for index in 0..slots.decoding().len() {
            let slot = slots.decoding()[index];
            if let Some(from) = slots.start_decode(slot)? {
                self.push(slots, slot, from, Tokens(1), true)?;
            }
        }
        for &(index, from) in &chunks {
            let run = section.prefill[index];
            self.prefill_tokens += run.tokens.as_usize();
            self.push(slots, run.slot, from, run.tokens, run.sample)?;
        }
        if self.ids.len() > limit {
            return Err(PlanError::TooManyTokens { got: self.ids.len(), limit });
        }
        Ok(())
    }

    /// Chunks in order of length, with where each starts. Steps with chunks may allocate.
    fn start_chunks(
        &mut self,
        slots: &mut Slots,
        section: &Section,
    ) -> Result<Vec<(usize, Tokens)>, PlanError> {
        self.order.clear();
        self.order.extend(0..section.prefill.len());
        self.order.sort_by_key(|&index| section.prefill[index].tokens);
        let start = |&index: &usize| Ok((index, slots.start_chunk(&section.prefill[index])?));
        self.order.iter().map(start).collect()
    }

    fn push(
        &mut self,
        slots: &mut Slots,
        slot: SlotId,
        from: Tokens,
        tokens: Tokens,
        sample: bool,
    ) -> Result<(), PlanError> {
        let life = slots.life_mut(slot)?;
        let (start, reach) = (self.ids.len(), from + tokens);
        for position in from.0..reach.0 {
            self.ids.push(life.token(position).unwrap_or(OF_SLOT | slot.0));
            self.positions.push(position);
        }
        self.runs.push(Run { slot, start, len: tokens.as_usize(), context: reach.as_usize() });
        if life.prompt_logprobs.is_some() {
            // The row at a position describes the token after it; the prompt's last row none.
            for position in from.0..reach.0.min(life.prompt.0 - 1) {
                let row = start as u32 + (position - from.0);
                let purpose = Purpose::Prompt { position: position + 1 };
                self.wanted.push(Wanted { row, slot, purpose });
            }
        }
        if sample {
            let row = (self.ids.len() - 1) as u32;
            self.wanted.push(Wanted { row, slot, purpose: Purpose::Sample });
        }
        Ok(())
    }
}
