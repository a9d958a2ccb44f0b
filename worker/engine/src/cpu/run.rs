//! One launch: borrows its buffers and calls its op. Nothing is chosen and nothing allocated here.

use super::launch::{Launch, Rotation};
use super::{Memory, Routing};
use crate::MlaForm;
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
}

impl Step<'_> {
    pub(super) fn run(
        &self,
        launch: &Launch<'_>,
        rows: usize,
        positions: &[u32],
        segments: &[Segment<'_>],
        memory: &mut Memory,
        in_head: bool,
    ) {
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
                let [x, out] = arena.two([*x, *out], rows);
                ops::linear::linear(pool, x, rows, parts, biases, out, scratch);
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
                        return;
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
                let choices = rows * router.top_k;
                let Routing { experts, weights, top_k } = routing;
                *top_k = router.top_k;
                let logits = arena.one(*logits, rows);
                let (experts, weights) = (&mut experts[..choices], &mut weights[..choices]);
                moe::route(pool, logits, &router, experts, weights);
            }
            Launch::Experts { x, experts, out } => {
                let [x, out] = arena.two([*x, *out], rows);
                let choices = rows * routing.top_k;
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
        }
    }
}
