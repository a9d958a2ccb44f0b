//! Buffers and where they lie: values whose lives do not overlap share memory.
//!
//! Widths are per token, so one plan serves every number of tokens: a buffer lies at
//! `offset * tokens`. Invariant: two buffers that are alive in the same op are disjoint; and those of
//! ops that lie between experts and the sum with what lies beside them, so that both may run at once; two
//! summands and the norm of their sum; and what a norm reads, what the product behind it reads and what this
//! or the activation behind it writes, so that each of these may be one launch, whose blocks read and write in
//! no order.
//! Every buffer begins on a vector whatever the number of tokens, because kernels load vectors.

use super::{BufferId, Op};
use core::slice;

/// Elements of 16 bytes at two bytes each: offsets are multiples, so that any number of tokens times
/// an offset is.
pub(super) const VECTOR: usize = 8;

/// How many rows a buffer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// The tokens of this shard.
    Shard,
    /// The tokens of all of so many shards, padded to the bucket.
    AllShards(usize),
}

/// `[rows, width]` of activations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// For people.
    pub name: &'static str,
    /// Elements of a row.
    pub width: usize,
    /// Rows.
    pub rows: Rows,
    /// Where it lies, in elements per token.
    pub offset: usize,
}

impl Buffer {
    /// Elements per token of this shard.
    #[must_use]
    pub const fn per_token(&self) -> usize {
        match self.rows {
            Rows::Shard => self.width,
            Rows::AllShards(shards) => self.width * shards,
        }
    }
}

/// Gives every buffer that `ops` write, and every one of `inputs`, a place; `result` lives to the
/// end, the two of a pair as long as each other, side by side. Returns the elements per token of the whole
/// arena.
pub(super) fn plan(
    ops: &[Op],
    inputs: &[BufferId],
    result: BufferId,
    pairs: &[[BufferId; 2]],
    buffers: &mut [Buffer],
) -> usize {
    let mut last_use = vec![0_usize; buffers.len()];
    for (at, op) in ops.iter().enumerate() {
        let uses = op.uses();
        for buffer in uses.reads.into_iter().chain(uses.writes) {
            last_use[buffer.0] = at;
        }
    }
    live_beside_experts(ops, &mut last_use);
    live_until_attention(ops, &mut last_use);
    live_until_activation(ops, &mut last_use);
    live_until_norm(ops, &mut last_use);
    last_use[result.0] = usize::MAX;
    for [first, second] in pairs {
        let last = last_use[first.0].max(last_use[second.0]);
        (last_use[first.0], last_use[second.0]) = (last, last);
    }

    let mut live: Vec<BufferId> = Vec::new();
    let mut width = 0;
    let place = |together: &[BufferId], live: &mut Vec<BufferId>, buffers: &mut [Buffer]| {
        let size = together.iter().map(|id| buffers[id.0].per_token()).sum();
        let mut end = first_fit(size, live, buffers);
        for id in together {
            buffers[id.0].offset = end;
            end += buffers[id.0].per_token();
            live.push(*id);
        }
        live.sort_by_key(|live| buffers[live.0].offset);
        end
    };
    for &input in inputs {
        width = width.max(place(&[input], &mut live, buffers));
    }
    for (at, op) in ops.iter().enumerate() {
        if let Some(made) = op.uses().writes {
            let pair = pairs.iter().find(|pair| pair.contains(&made));
            let together = pair.map_or(slice::from_ref(&made), |pair| pair);
            // The second one has its place already.
            if together[0] == made {
                width = width.max(place(together, &mut live, buffers));
            }
        }
        live.retain(|buffer| last_use[buffer.0] > at);
    }
    width
}

/// Extends lives from experts to the sum that adds something to their result.
fn live_beside_experts(ops: &[Op], last_use: &mut [usize]) {
    let mut experts = None;
    for (at, op) in ops.iter().enumerate() {
        match (op, experts) {
            (Op::Experts { out, .. }, _) => experts = Some((at, *out)),
            (Op::Add { x, target }, Some((from, sum))) if [*x, *target].contains(&sum) => {
                for between in &ops[from..at] {
                    let uses = between.uses();
                    for buffer in uses.reads.into_iter().chain(uses.writes) {
                        last_use[buffer.0] = last_use[buffer.0].max(at);
                    }
                }
                experts = None;
            }
            _ => {}
        }
    }
}

/// Extends lives of what is written into the cache to the attention behind it, which may read it where
/// it lies instead: its result must not lie there too.
fn live_until_attention(ops: &[Op], last_use: &mut [usize]) {
    let mut written: Vec<BufferId> = Vec::new();
    for (at, op) in ops.iter().enumerate() {
        match op {
            Op::WriteKv { rows, .. } => written.push(*rows),
            Op::Attention { .. } => {
                for rows in written.drain(..) {
                    last_use[rows.0] = last_use[rows.0].max(at);
                }
            }
            _ => {}
        }
    }
}

/// Extends lives of what a product reads, or a norm right in front of it, to the product and the activation of
/// its results.
fn live_until_activation(ops: &[Op], last_use: &mut [usize]) {
    for (at, op) in ops.iter().enumerate() {
        let Op::Linear { x, out, .. } = op else { continue };
        let activated =
            matches!(ops.get(at + 1), Some(Op::SiluMul { gate_up, .. }) if gate_up == out);
        let last = at + usize::from(activated);
        let before = match ops[..at].last() {
            Some(
                Op::Norm { x: from, out: normed, .. }
                | Op::AddNorm { residual: from, out: normed, .. },
            ) if normed == x => Some(from),
            _ => None,
        };
        for buffer in before.into_iter().chain([x]) {
            last_use[buffer.0] = last_use[buffer.0].max(last);
        }
    }
}

/// Extends lives of both summands to the norm of their sum.
fn live_until_norm(ops: &[Op], last_use: &mut [usize]) {
    for (at, pair) in ops.windows(2).enumerate() {
        if let [Op::Add { x, target }, Op::AddNorm { delta, .. }] = pair
            && target == delta
        {
            last_use[x.0] = last_use[x.0].max(at + 1);
        }
    }
}

/// The lowest gap among `live` (sorted by offset) that takes `size`.
fn first_fit(size: usize, live: &[BufferId], buffers: &[Buffer]) -> usize {
    let mut end = 0;
    for buffer in live {
        let buffer = &buffers[buffer.0];
        if buffer.offset >= end + size {
            break;
        }
        end = end.max((buffer.offset + buffer.per_token()).next_multiple_of(VECTOR));
    }
    end
}
