//! The scheduler's part without policy: it carves a cache, writes plans and knows what it wrote.

use super::{LIFE, Setup};
use ids::{
    BLOCK_TOKENS, BlockId, Bytes, GroupId, RequestId, SlotGeneration, SlotId, StepSeq, TokenId,
    Tokens,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use step::{
    Admit, Carving, Configure, DecodeDelta, GroupSpec, GroupTable, PrefillRun, Sampling, Section,
    SlotOp, SlotRef, StepPlan, Upload, WriteSlot,
};

/// How the cache of these groups is carved, and a hand that writes plans for it.
pub fn begin(groups: &[GroupSpec], alignment: u64, options: &Setup) -> (Configure, Hand) {
    let largest = groups.iter().map(|g| g.block_bytes.0).max().expect("a group");
    let super_bytes = (largest * 3 + 64).next_multiple_of(alignment);
    let supers = options.supers;
    let per_super: Vec<u32> =
        groups.iter().map(|g| (super_bytes / g.block_bytes.0) as u32).collect();
    // Super-blocks go round the groups; within a group, blocks come in a scattered order.
    let groups = groups.len() as u32;
    let free = (0..groups).map(|g| {
        let of = per_super[g as usize];
        let mut ids: Vec<u32> =
            (0..supers).filter(|s| s % groups == g).flat_map(|s| s * of..(s + 1) * of).collect();
        if options.scattered {
            ids.sort_by_key(|id| id.wrapping_mul(2_654_435_761));
        }
        ids
    });
    let hand = Hand {
        prompt_logprobs: Some(2),
        seq: StepSeq::ZERO,
        free: free.collect(),
        slots: BTreeMap::new(),
        ops: Vec::new(),
        uploads: Vec::new(),
        generations: 0,
    };
    let configure = Configure {
        incarnation: LIFE,
        max_slots: options.slots,
        max_step_tokens: Tokens(options.tokens),
        max_context: Tokens(options.context),
        carving: Carving {
            super_bytes: Bytes(super_bytes),
            supers,
            per_super,
            host_blocks: options.places,
        },
    };
    (configure, hand)
}

/// What the hand knows of a slot.
pub(super) struct Known {
    known: u32,
    computed: u32,
    blocks: u32,
    /// Blocks of every table that were another slot's first.
    shared: usize,
    decodes: bool,
    tables: Vec<Vec<BlockId>>,
}

/// Writes plans; what it says of tokens is in `uploads` until somebody passes it on.
pub struct Hand {
    /// How many likeliest tokens are listed with each one of a prompt.
    pub prompt_logprobs: Option<u8>,
    pub uploads: Vec<Upload>,
    pub(super) seq: StepSeq,
    pub(super) free: Vec<Vec<u32>>,
    pub(super) slots: BTreeMap<u32, Known>,
    pub(super) ops: Vec<SlotOp>,
    pub(super) generations: u32,
}

impl Hand {
    /// Known and computed tokens of a slot.
    pub fn progress(&self, slot: u32) -> (u32, u32) {
        (self.slots[&slot].known, self.slots[&slot].computed)
    }

    /// How many slots decode in a step that ends the lives of these first.
    pub fn decoding(&self, retired: &[u32]) -> u32 {
        let decodes = |(slot, known): &(&u32, &Known)| known.decodes && !retired.contains(slot);
        self.slots.iter().filter(decodes).count() as u32
    }

    /// Blocks of a slot as its tables have them, per group.
    pub fn blocks(&self, slot: u32) -> Vec<Vec<BlockId>> {
        self.slots[&slot].tables.clone()
    }

    /// Says the tokens, and admits with the next step.
    pub fn admit(&mut self, slot: u32, tokens: &[u32], prompt: usize, sampling: Sampling) {
        let groups = self.free.len();
        self.admit_shared(slot, tokens, prompt, sampling, vec![vec![]; groups], 0);
    }

    /// As `admit`, on shared blocks of which the group 1 leaves out the first `skipped`.
    pub fn admit_shared(
        &mut self,
        slot: u32,
        tokens: &[u32],
        prompt: usize,
        sampling: Sampling,
        shared: Vec<Vec<BlockId>>,
        skipped: u32,
    ) {
        self.generations += 1;
        let request = RequestId(u64::from(self.generations));
        let upload = |offset: usize, tokens: &[u32]| Upload {
            incarnation: LIFE,
            request,
            offset: Tokens(offset as u32),
            tokens: tokens.iter().copied().map(TokenId).collect(),
        };
        let (first, rest) = tokens.split_at(tokens.len() / 2);
        self.uploads.extend([upload(0, first), upload(first.len(), rest)]);
        self.ops.push(SlotOp::Admit(Box::new(Admit {
            slot: SlotRef { slot: SlotId(slot), generation: SlotGeneration(self.generations) },
            request,
            known: Tokens(tokens.len() as u32),
            prompt: Tokens(prompt as u32),
            cached: Tokens(shared[0].len() as u32 * BLOCK_TOKENS),
            tables: (0..)
                .zip(&shared)
                .map(|(group, blocks)| {
                    let skipped = if group == 1 { skipped } else { 0 };
                    let blocks = blocks[skipped as usize..].to_vec();
                    GroupTable { group: GroupId(group), skipped, blocks }
                })
                .collect(),
            sampling: Arc::new(sampling),
            prompt_logprobs: self.prompt_logprobs,
        })));
        let (known, blocks) = (tokens.len() as u32, shared[0].len() as u32);
        let (computed, of_others) = (blocks * BLOCK_TOKENS, shared[0].len());
        self.slots.insert(
            slot,
            Known { known, computed, blocks, shared: of_others, decodes: false, tables: shared },
        );
    }

    /// Its own blocks are the next ones taken, with all that they hold.
    pub fn retire(&mut self, slot: u32) {
        let known = self.slots.remove(&slot).expect("admitted");
        for (free, table) in self.free.iter_mut().zip(&known.tables) {
            free.extend(table[known.shared..].iter().map(|block| block.0));
        }
        self.ops.push(SlotOp::Retire { slot: SlotId(slot) });
    }

    /// One step: chunks of these lengths, and everything that decodes. A chunk that ends the known
    /// tokens samples and joins the decode set.
    pub fn plan(&mut self, chunks: &[(u32, u32)]) -> StepPlan {
        let mut prefill = Vec::new();
        let mut join = Vec::new();
        let mut grow = Vec::new();
        let decoding: Vec<u32> =
            self.slots.iter().filter(|(_, known)| known.decodes).map(|(slot, _)| *slot).collect();
        for slot in decoding {
            grow.push((slot, 1));
        }
        for &(slot, tokens) in chunks {
            grow.push((slot, tokens));
            let known = self.slots.get_mut(&slot).expect("admitted");
            let sample = known.computed + tokens == known.known;
            prefill.push(PrefillRun { slot: SlotId(slot), tokens: Tokens(tokens), sample });
            if sample {
                known.decodes = true;
                join.push(SlotId(slot));
            }
        }
        for (slot, tokens) in grow {
            let known = self.slots.get_mut(&slot).expect("admitted");
            known.computed += tokens;
            if known.computed == known.known {
                known.known += 1;
            }
            let mut blocks = Vec::new();
            while known.blocks * BLOCK_TOKENS < known.computed {
                for (group, free) in self.free.iter_mut().enumerate() {
                    let block = BlockId(free.pop().expect("a free block"));
                    known.tables[group].push(block);
                    blocks.push(WriteSlot { group: GroupId(group as u8), block });
                }
                known.blocks += 1;
            }
            if !blocks.is_empty() {
                self.ops.push(SlotOp::Extend { slot: SlotId(slot), blocks });
            }
        }
        self.seq = self.seq.next();
        StepPlan {
            seq: self.seq,
            incarnation: LIFE,
            bucket: Tokens(64),
            shard_tokens: vec![Tokens(1)],
            sections: vec![Section {
                ops: core::mem::take(&mut self.ops),
                prefill,
                decode: DecodeDelta { join, leave: vec![] },
            }],
        }
    }
}
