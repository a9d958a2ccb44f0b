//! One launch: borrows its buffers and calls its op. Nothing is chosen and nothing allocated here.
//!
//! Padding of other shards' rows is given to no expert; a rank without tokens exchanges and computes
//! nothing else for its own shard.

use super::arena::Rows;
use super::exchange::Exchange;
use super::launch::{Launch, Place, Rotation};
use super::{Memory, Routing};
use crate::MlaForm;
use device::collectives::CollectiveError;
use device::{Isa, ThreadPool};
use ops::mla::Form;
use ops::moe;
use ops::paged::Segment;
use ops::rope::Rope;

/// Parts of one merged projection, at most.
const MAX_PARTS: usize = 4;

/// What every launch of a step sees.
pub(super) struct Step<'a> {
    pub(super) pool: &'a ThreadPool,
    pub(super) rotations: &'a [Rotation],
    pub(super) form: MlaForm,
    pub(super) ids: &'a [u32],
    pub(super) positions: &'a [u32],
    pub(super) rows: Rows,
    /// Whether buffers are the head's.
    pub(super) in_head: bool,
    /// Tokens of every shard; empty where there is one.
    pub(super) shard_rows: &'a [usize],
}

/// The number of an expert that no rank has.
const NOBODY: u32 = u32::MAX;

impl Step<'_> {
    /// Runs an op. Returns the bytes that came from other ranks.
    pub(super) fn run(
        &self,
        launch: &Launch<'_>,
        segments: &[Segment<'_>],
        memory: &mut Memory,
        exchange: Option<&mut Exchange>,
    ) -> Result<u64, CollectiveError> {
        let Self { rows, positions, in_head, .. } = *self;
        if launch.place().is_some_and(|place| rows.of(place) == 0) {
            return Ok(0);
        }
        let pool = self.pool;
        let Memory { arena, head_arena, scratch, moe: moe_scratch, routing, kv, .. } = memory;
        let arena = if in_head { head_arena } else { arena };
        match launch {
            Launch::Embed { table, first_row, out } => {
                ops::embed::embed(pool, self.ids, *first_row, *table, arena.one(*out, rows));
            }
            Launch::Norm { x, weight, eps, out } => {
                let [x, out] = arena.two([*x, *out], rows);
                ops::norm::rms_norm(pool, x, weight, *eps, out);
            }
            Launch::AddNorm { delta, residual, weight, eps, out } => {
                let [delta, residual, out] = arena.three([*delta, *residual, *out], rows);
                ops::norm::add_rms_norm(pool, delta, residual, weight, *eps, out);
            }
            Launch::Add { x, target } => {
                let [x, target] = arena.two([*x, *target], rows);
                ops::act::add(pool, x, target);
            }
            Launch::HeadNorm { x, heads, weight, eps } => {
                ops::norm::head_norm(pool, arena.one(*x, rows), heads, weight, *eps);
            }
            Launch::Rope { x, heads, rotation } => {
                let Rotation { inv_freq, factor, pairing } = &self.rotations[*rotation];
                let rope = Rope { inv_freq, factor: *factor, pairing: *pairing };
                ops::rope::rope(pool, arena.one(*x, rows), heads, positions, &rope);
            }
            Launch::Linear { x, parts, biases, out } => {
                let mut lent: [&[f32]; MAX_PARTS] = [&[]; MAX_PARTS];
                lent.iter_mut().zip(biases).for_each(|(lent, bias)| *lent = bias);
                let biases = &lent[..biases.len()];
                let count = rows.of(*x);
                let [x, out] = arena.two([*x, *out], rows);
                ops::linear::linear(pool, x, count, parts, biases, out, scratch);
            }
            Launch::WriteKv { rows: x, layer } => {
                let x = arena.one(*x, rows);
                ops::paged::write_kv(x, layer.kv, segments, &mut kv.write());
            }
            Launch::Gqa { q, shape, layer, out } => {
                let [q, out] = arena.two([*q, *out], rows);
                ops::gqa::attention(pool, q, shape, layer.kv, segments, kv.read(), out, scratch);
            }
            Launch::Mla { q, shape, kv_b, layer, out } => {
                let [q, out] = arena.two([*q, *out], rows);
                let (b, kv, layer) = (*kv_b, kv.read(), layer.kv);
                let form = match self.form {
                    MlaForm::Auto => {
                        ops::mla::attention(pool, q, b, shape, layer, segments, kv, out, scratch);
                        return Ok(0);
                    }
                    MlaForm::Absorbed => Form::Absorbed,
                    MlaForm::Expanded => Form::Expanded,
                };
                let isa = Isa::detect();
                ops::mla::attention_as(
                    form, isa, pool, q, b, shape, layer, segments, kv, out, scratch,
                );
            }
            Launch::SiluMul { gate_up, out } => {
                let n = out.width;
                let [gate_up, out] = arena.two([*gate_up, *out], rows);
                ops::act::silu_mul(pool, gate_up, n, out);
            }
            Launch::Route { logits, router, correction } => {
                let router = moe::Router { correction: correction.as_deref(), ..*router };
                let choices = rows.of(*logits) * router.top_k;
                let Routing { experts, weights, top_k } = routing;
                *top_k = router.top_k;
                let gathered = logits.shards > 1;
                let logits = arena.one(*logits, rows);
                let (experts, weights) = (&mut experts[..choices], &mut weights[..choices]);
                moe::route(pool, logits, &router, experts, weights);
                if gathered {
                    let shards = experts.chunks_exact_mut(rows.padded * router.top_k);
                    for (chosen, tokens) in shards.zip(self.shard_rows) {
                        chosen[tokens * router.top_k..].fill(NOBODY);
                    }
                }
            }
            Launch::Experts { x, experts, out } => {
                let choices = rows.of(*x) * routing.top_k;
                let [x, out] = arena.two([*x, *out], rows);
                let chosen = moe::Routing {
                    experts: &routing.experts[..choices],
                    weights: &routing.weights[..choices],
                    top_k: routing.top_k,
                };
                let weights = moe::ExpertWeights {
                    first: experts.first,
                    gate: &experts.gate,
                    up: &experts.up,
                    down: &experts.down,
                };
                if let Some(scratch) = moe_scratch {
                    moe::experts(pool, x, &chosen, &weights, out, scratch);
                }
            }
            Launch::AllReduce { x, axis } => {
                return with(exchange, |other| other.all_reduce(arena, *x, *axis, rows));
            }
            Launch::AllGather { x, dim, axis, out } => {
                return with(exchange, |other| {
                    other.all_gather(arena, [*x, *out], (*dim, *axis), rows)
                });
            }
            Launch::ReduceScatter { x, axis, out } => {
                return with(exchange, |other| {
                    other.reduce_scatter(arena, [*x, *out], *axis, rows)
                });
            }
        }
        Ok(0)
    }
}

/// A program of one rank exchanges nothing; one of several has an end of the exchange.
fn with(
    exchange: Option<&mut Exchange>,
    body: impl FnOnce(&mut Exchange) -> Result<u64, CollectiveError>,
) -> Result<u64, CollectiveError> {
    body(exchange.expect("an engine of several ranks is made with collectives"))
}

impl Launch<'_> {
    /// The buffer whose rows an op works on; `None` where ranks exchange padding too.
    const fn place(&self) -> Option<Place> {
        Some(match self {
            Self::Embed { out, .. } => *out,
            Self::Norm { x, .. }
            | Self::Add { x, .. }
            | Self::HeadNorm { x, .. }
            | Self::Rope { x, .. }
            | Self::Linear { x, .. }
            | Self::Experts { x, .. } => *x,
            Self::AddNorm { residual, .. } => *residual,
            Self::WriteKv { rows, .. } => *rows,
            Self::Gqa { q, .. } | Self::Mla { q, .. } => *q,
            Self::SiluMul { gate_up, .. } => *gate_up,
            Self::Route { logits, .. } => *logits,
            Self::AllReduce { .. } | Self::AllGather { .. } | Self::ReduceScatter { .. } => {
                return None;
            }
        })
    }
}

#[cfg(test)]
mod tests;
