//! Ops with everything resolved that does not change from step to step: weights as slices, buffers
//! as places, frequencies as numbers. What remains for a step are counts and tables.

use crate::{WeightError, WeightSource};
use device::ThreadPool;
use model::lower::{BufferId, LocalAttention, LocalSlice, Lowered, Op, Region, Rows};
use model::mesh::Axis;
use model::program::{CacheSlot, Dim, GroupScore, Scoring, WeightId};
use ops::norm::Heads;
use ops::paged::KvLayer;
use ops::rope::Pairing;
use ops::{Matrix, gqa, mla, moe};
use std::borrow::Cow;

/// A buffer's place: `[rows, width]` at `offset * rows` of its arena, where rows are those that all ranks
/// run, and those of every shard where the buffer has them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) offset: usize,
    pub(super) width: usize,
    /// Shards whose rows it holds.
    pub(super) shards: usize,
}

/// A vector of the checkpoint in 32-bit floats.
pub(super) type Vector<'w> = Cow<'w, [f32]>;

/// Frequencies of one rotary embedding.
#[derive(Clone, Debug)]
pub(super) struct Rotation {
    pub(super) inv_freq: Vec<f32>,
    pub(super) factor: f32,
    pub(super) pairing: Pairing,
}

/// A layer of a cache group.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layer {
    pub(super) group: usize,
    pub(super) kv: KvLayer,
}

/// A resolved op.
pub(super) enum Launch<'w> {
    Embed { table: Matrix<'w>, first_row: usize, out: Place },
    Norm { x: Place, weight: Vector<'w>, eps: f32, out: Place },
    AddNorm { delta: Place, residual: Place, weight: Vector<'w>, eps: f32, out: Place },
    Add { x: Place, target: Place },
    HeadNorm { x: Place, heads: Heads, weight: Vector<'w>, eps: f32 },
    Rope { x: Place, heads: Heads, rotation: usize },
    Linear { x: Place, parts: Vec<Matrix<'w>>, biases: Vec<Vector<'w>>, out: Place },
    WriteKv { rows: Place, layer: Layer },
    Gqa { q: Place, shape: gqa::Gqa, layer: Layer, out: Place },
    Mla { q: Place, shape: mla::Mla, kv_b: Matrix<'w>, layer: Layer, out: Place },
    SiluMul { gate_up: Place, out: Place },
    Route { logits: Place, router: moe::Router<'static>, correction: Option<Vector<'w>> },
    Experts { x: Place, experts: Experts<'w>, out: Place },
    AllReduce { x: Place, axis: Axis },
    AllGather { x: Place, dim: Dim, axis: Axis, out: Place },
    ReduceScatter { x: Place, axis: Axis, out: Place },
}

/// One expert layer.
pub(super) struct Experts<'w> {
    pub(super) first: usize,
    pub(super) top_k: usize,
    pub(super) gate: Vec<Matrix<'w>>,
    pub(super) up: Vec<Matrix<'w>>,
    pub(super) down: Vec<Matrix<'w>>,
}

/// Resolves ops against weights.
pub(super) struct Resolver<'a, 'w> {
    pub(super) lowered: &'a Lowered,
    pub(super) source: &'w dyn WeightSource,
}

impl<'w> Resolver<'_, 'w> {
    pub(super) fn place(&self, id: BufferId) -> Place {
        let buffer = &self.lowered.buffers[id.0];
        let shards = match buffer.rows {
            Rows::Shard => 1,
            Rows::AllShards(shards) => shards,
        };
        Place { offset: buffer.offset, width: buffer.width, shards }
    }

    pub(super) fn rotations(&self) -> Vec<Rotation> {
        let rotation = |rope: &model::config::RopeConfig| Rotation {
            inv_freq: rope.inv_freq(),
            factor: rope.attention_factor(),
            pairing: if rope.interleaved { Pairing::Interleaved } else { Pairing::Halves },
        };
        self.lowered.ropes.iter().map(rotation).collect()
    }

    pub(super) fn launches(&self, ops: &[Op]) -> Result<Vec<Launch<'w>>, WeightError> {
        ops.iter().map(|op| self.launch(op)).collect()
    }

    fn matrix(&self, id: WeightId) -> Result<Matrix<'w>, WeightError> {
        match self.lowered.weights[id.0].as_ref().map(|held| (&held.name, &held.region)) {
            Some((name, Region::Matrix { rows, cols, .. })) => {
                self.source.matrix(name, rows.len(), cols.len())
            }
            held => Err(WeightError::Kind {
                name: held.map_or_else(String::new, |(name, _)| name.clone()),
            }),
        }
    }

    fn vector(&self, id: WeightId) -> Result<Vector<'w>, WeightError> {
        match self.lowered.weights[id.0].as_ref().map(|held| (&held.name, &held.region)) {
            Some((name, Region::Vector { range, .. })) => self.source.vector(name, range.len()),
            held => Err(WeightError::Kind {
                name: held.map_or_else(String::new, |(name, _)| name.clone()),
            }),
        }
    }

    fn matrices(&self, ids: &[WeightId]) -> Result<Vec<Matrix<'w>>, WeightError> {
        ids.iter().map(|&id| self.matrix(id)).collect()
    }

    fn heads(&self, x: BufferId, slice: &LocalSlice) -> Heads {
        let LocalSlice { count, offset, width, stride } = *slice;
        Heads { row: self.lowered.buffers[x.0].width, count, offset, width, stride }
    }

    fn layer(&self, slot: CacheSlot) -> Layer {
        let row = self.lowered.groups[slot.group].layers[slot.row];
        let kv = KvLayer { offset: row.offset, row: row.width };
        Layer { group: slot.group, kv }
    }

    fn launch(&self, op: &Op) -> Result<Launch<'w>, WeightError> {
        let place = |id| self.place(id);
        Ok(match *op {
            Op::Embed { table, first_row, out } => {
                Launch::Embed { table: self.matrix(table)?, first_row, out: place(out) }
            }
            Op::Norm { x, weight, eps, out } => Launch::Norm {
                x: place(x),
                weight: self.vector(weight)?,
                eps: eps as f32,
                out: place(out),
            },
            Op::AddNorm { delta, residual, weight, eps, out } => Launch::AddNorm {
                delta: place(delta),
                residual: place(residual),
                weight: self.vector(weight)?,
                eps: eps as f32,
                out: place(out),
            },
            Op::Add { x, target } => Launch::Add { x: place(x), target: place(target) },
            Op::HeadNorm { x, weight, eps, ref slice } => Launch::HeadNorm {
                x: place(x),
                heads: self.heads(x, slice),
                weight: self.vector(weight)?,
                eps: eps as f32,
            },
            Op::Rope { x, rope, ref slice } => {
                Launch::Rope { x: place(x), heads: self.heads(x, slice), rotation: rope.0 }
            }
            Op::Linear { x, ref parts, ref biases, out } => Launch::Linear {
                x: place(x),
                parts: self.matrices(parts)?,
                biases: biases.iter().map(|&id| self.vector(id)).collect::<Result<_, _>>()?,
                out: place(out),
            },
            Op::WriteKv { rows, slot } => {
                Launch::WriteKv { rows: place(rows), layer: self.layer(slot) }
            }
            Op::Attention { q, ref attention, slot, out } => {
                self.attention(place(q), attention, self.layer(slot), place(out))?
            }
            Op::SiluMul { gate_up, out } => {
                Launch::SiluMul { gate_up: place(gate_up), out: place(out) }
            }
            Op::Route { logits, ref router } => Launch::Route {
                logits: place(logits),
                router: local_router(router),
                correction: router.correction.map(|id| self.vector(id)).transpose()?,
            },
            Op::Experts { x, first, top_k, ref gate, ref up, ref down, out, .. } => {
                Launch::Experts {
                    x: place(x),
                    experts: Experts {
                        first,
                        top_k,
                        gate: self.matrices(gate)?,
                        up: self.matrices(up)?,
                        down: self.matrices(down)?,
                    },
                    out: place(out),
                }
            }
            Op::AllReduce { x, axis } => Launch::AllReduce { x: place(x), axis },
            Op::AllGather { x, dim, axis, out } => {
                Launch::AllGather { x: place(x), dim, axis, out: place(out) }
            }
            Op::ReduceScatter { x, axis, out } => {
                Launch::ReduceScatter { x: place(x), axis, out: place(out) }
            }
        })
    }

    fn attention(
        &self,
        q: Place,
        attention: &LocalAttention,
        layer: Layer,
        out: Place,
    ) -> Result<Launch<'w>, WeightError> {
        Ok(match *attention {
            LocalAttention::Gqa { heads, kv_heads, head_dim, scale, window } => {
                let scale = scale as f32;
                let shape = gqa::Gqa { heads, kv_heads, head_dim, scale, window };
                Launch::Gqa { q, shape, layer, out }
            }
            LocalAttention::Mla { heads, nope, rope, v, latent, scale, kv_b } => {
                let shape = mla::Mla { heads, nope, rope, v, latent, scale: scale as f32 };
                Launch::Mla { q, shape, kv_b: self.matrix(kv_b)?, layer, out }
            }
        })
    }
}

/// The op's parameters; the correction is lent to it at each step.
pub(crate) fn local_router(router: &model::program::Router) -> moe::Router<'static> {
    moe::Router {
        experts: router.experts,
        top_k: router.top_k,
        scoring: match router.scoring {
            Scoring::Softmax => moe::Scoring::Softmax,
            Scoring::Sigmoid => moe::Scoring::Sigmoid,
        },
        limit: router.limit.map(|limit| moe::GroupLimit {
            groups: limit.groups,
            chosen: limit.chosen,
            score: match limit.score {
                GroupScore::Max => moe::GroupScore::Max,
                GroupScore::SumTop2 => moe::GroupScore::SumTop2,
            },
        }),
        correction: None,
        norm_topk: router.norm_topk,
        scale: router.scale as f32,
    }
}

impl Experts<'_> {
    /// Memory for steps of up to `tokens`.
    pub(super) fn scratch(&self, pool: &ThreadPool, tokens: usize) -> moe::Scratch {
        let (hidden, intermediate) =
            self.gate.first().map_or((0, 0), |gate| (gate.cols, gate.rows));
        moe::Scratch::new(pool, tokens, self.top_k, self.gate.len(), hidden, intermediate)
    }
}
