//! A step: deltas to the slots, then what runs. Complete; a worker makes no choice.

use crate::Sampling;
use ids::{
    BlockId, GroupId, Incarnation, RequestId, SlotGeneration, SlotId, StepSeq, TierSlot, Tokens,
};
use std::sync::Arc;

/// One step of a replica: a header for all ranks and a section per data-parallel shard.
#[derive(Clone, Debug, PartialEq)]
pub struct StepPlan {
    /// Position in the incarnation's sequence; outcomes answer it, blocks wait for it.
    pub seq: StepSeq,
    /// The life of the worker group this is meant for.
    pub incarnation: Incarnation,
    /// Padded tokens of the largest shard: the bucket every rank runs, idle ones too.
    pub bucket: Tokens,
    /// Tokens of each shard, in shard order.
    pub shard_tokens: Vec<Tokens>,
    /// What each shard does, in shard order.
    pub sections: Vec<Section>,
}

/// One shard's part of a step. `ops` apply in order, before anything runs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Section {
    /// Changes to slots, and copies of blocks.
    pub ops: Vec<SlotOp>,
    /// Prompt chunks, each on its own slot.
    pub prefill: Vec<PrefillRun>,
    /// Change to the set of slots that decode one token each.
    pub decode: DecodeDelta,
}

/// A slot in one of its lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotRef {
    /// The row.
    pub slot: SlotId,
    /// The life of the row; an outcome that names another is stale.
    pub generation: SlotGeneration,
}

/// The right to write one KV block, and the only way a block's id gets into an `Extend`.
///
/// Made from a writable block by the KV cache; holding one proves nothing about other blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteSlot {
    /// Group of the block.
    pub group: GroupId,
    /// The block.
    pub block: BlockId,
}

/// A change to one slot, or a copy of one block between the cache and the memory behind it.
#[derive(Clone, Debug, PartialEq)]
pub enum SlotOp {
    /// Start a life of a slot on uploaded tokens.
    Admit(Box<Admit>),
    /// Append blocks to the slot's tables, in the given order within each group.
    Extend {
        /// The slot.
        slot: SlotId,
        /// The blocks, now writable by this slot alone.
        blocks: Vec<WriteSlot>,
    },
    /// Blocks of `group` before logical block `first_live` are given up (a sliding window passed).
    Trim {
        /// The slot.
        slot: SlotId,
        /// The group.
        group: GroupId,
        /// First logical block that may still be read.
        first_live: u32,
    },
    /// End the slot's life; its tables may not be read by later steps.
    Retire {
        /// The slot.
        slot: SlotId,
    },
    /// Copy a block to the host, over what the place held. Steps before this one have written it.
    Store {
        /// Group of the block.
        group: GroupId,
        /// The block.
        block: BlockId,
        /// Where to, among the places of its group.
        at: TierSlot,
    },
    /// Copy a block back from the host.
    Load {
        /// Where from, among the places of the block's group.
        at: TierSlot,
        /// The block; until the copy is done nobody else has it.
        block: WriteSlot,
    },
}

/// The start of a slot's life. The tokens were uploaded under `request` before.
#[derive(Clone, Debug, PartialEq)]
pub struct Admit {
    /// The slot and the generation it now has.
    pub slot: SlotRef,
    /// Whose tokens these are.
    pub request: RequestId,
    /// All tokens known: the prompt and, after a preemption, the output so far.
    pub known: Tokens,
    /// How many of `known` are the client's prompt (penalties and `min_tokens` count the rest).
    pub prompt: Tokens,
    /// Tokens whose KV is already in the shared blocks of `tables`; the first chunk starts there.
    pub cached: Tokens,
    /// Blocks shared from the prefix index, read-only, per group.
    pub tables: Vec<GroupTable>,
    /// How to sample.
    pub sampling: Arc<Sampling>,
    /// Report log-probabilities of the prompt's tokens, with this many alternatives.
    pub prompt_logprobs: Option<u8>,
}

/// A slot's shared prefix in one group.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupTable {
    /// The group.
    pub group: GroupId,
    /// Logical blocks before the first of `blocks` that are never read (outside the window).
    pub skipped: u32,
    /// Shared blocks in logical order.
    pub blocks: Vec<BlockId>,
}

/// A chunk of known tokens through the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillRun {
    /// The slot.
    pub slot: SlotId,
    /// Tokens of this chunk, from the first without KV on.
    pub tokens: Tokens,
    /// Sample after the last token: set when the chunk ends the known tokens.
    pub sample: bool,
}

/// Change to the decode set: slots that each step run one token (the last sampled) and sample.
///
/// A steady step is an empty delta. The delta applies before anything runs. A slot that joins in
/// the step whose prefill chunk samples its first token is not run twice: a slot with a chunk in a
/// step does not decode in that step, so it decodes from the next one on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DecodeDelta {
    /// Slots that decode from this step on.
    pub join: Vec<SlotId>,
    /// Slots that no longer decode; a retired slot leaves without being named.
    pub leave: Vec<SlotId>,
}
