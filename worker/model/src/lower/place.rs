//! Placement: turns nodes into ops of one rank and inserts the collectives that placements ask for.
//!
//! A value has one current placement. A reduction over an axis happens in place, once, when the
//! first reader needs the sum; gathers and scatters make a new buffer. Invariant: after `meet`, the
//! buffer returned holds the value under the placement asked for.

use super::local::{Local, LocalWeight};
use super::op::{LocalAttention, LocalSlice};
use super::{Buffer, BufferId, LowerError, Op, Region, RopeId, Rows};
use crate::config::RopeConfig;
use crate::mesh::Axis;
use crate::program::{
    Attention, Dim, Extent, HeadSlice, Need, Node, NodeOp, Place, Placement, Program, ValueId,
};

/// Ops and buffers, not yet planned.
pub(super) struct Placed {
    pub(super) body: Vec<Op>,
    pub(super) head: Vec<Op>,
    pub(super) buffers: Vec<Buffer>,
    pub(super) hidden: BufferId,
    pub(super) chosen: BufferId,
    pub(super) logits: BufferId,
    pub(super) ropes: Vec<RopeConfig>,
}

/// Where a value is now.
#[derive(Clone, Copy)]
struct Held {
    buffer: BufferId,
    placement: Placement,
}

struct Placer<'a> {
    program: &'a Program,
    local: &'a Local,
    weights: &'a [Option<LocalWeight>],
    ops: Vec<Op>,
    buffers: Vec<Buffer>,
    ropes: Vec<RopeConfig>,
    held: Vec<Option<Held>>,
}

pub(super) fn place(
    program: &Program,
    local: &Local,
    weights: &[Option<LocalWeight>],
) -> Result<Placed, LowerError> {
    let mut placer = Placer {
        program,
        local,
        weights,
        ops: Vec::new(),
        buffers: Vec::new(),
        ropes: Vec::new(),
        held: vec![None; program.values.len()],
    };
    for node in &program.body {
        placer.node(node)?;
    }
    let hidden = placer.buffer_of(program.hidden);
    let body = core::mem::take(&mut placer.ops);
    // The head works on rows gathered from the hidden states: same width, fewer rows.
    let chosen = placer.new_buffer(Buffer { name: "chosen", ..placer.buffers[hidden.0].clone() });
    if let Some(held) = &mut placer.held[program.hidden.0] {
        held.buffer = chosen;
    }
    for node in &program.head {
        placer.node(node)?;
    }
    let logits = placer.buffer_of(program.logits);
    let Placer { ops: head, buffers, ropes, .. } = placer;
    Ok(Placed { body, head, buffers, hidden, chosen, logits, ropes })
}

impl Placer<'_> {
    fn buffer_of(&self, value: ValueId) -> BufferId {
        self.held(value).buffer
    }

    fn held(&self, value: ValueId) -> Held {
        self.held[value.0].expect("a program's values are written before they are read")
    }

    fn new_buffer(&mut self, buffer: Buffer) -> BufferId {
        self.buffers.push(buffer);
        BufferId(self.buffers.len() - 1)
    }

    /// Elements of a row of a value under a placement.
    fn width(&self, value: ValueId, placement: Placement) -> Result<usize, LowerError> {
        let mut width = 0;
        for part in &self.program.values[value.0].parts {
            width += match placement.tp {
                Place::Shard(Dim::Width) => self.local.part(part)?.len(),
                _ => part.total(),
            };
        }
        Ok(width)
    }

    fn rows(&self, placement: Placement) -> Rows {
        match placement.dp {
            Place::Shard(Dim::Tokens) => Rows::Shard,
            _ => match self.local.mesh.dp {
                1 => Rows::Shard,
                shards => Rows::AllShards(shards),
            },
        }
    }

    /// A fresh buffer for `value` under `placement`.
    fn make(&mut self, value: ValueId, placement: Placement) -> Result<BufferId, LowerError> {
        let name = self.program.values[value.0].name;
        let (width, rows) = (self.width(value, placement)?, self.rows(placement));
        Ok(self.new_buffer(Buffer { name, width, rows, offset: 0 }))
    }

    /// Brings a value under the placement a node needs.
    fn meet(&mut self, need: Need) -> Result<BufferId, LowerError> {
        // Scattering over dp before summing over tp moves the least.
        for axis in [Axis::Dp, Axis::Tp] {
            let held = self.held(need.value);
            let (from, to) = match axis {
                Axis::Dp => (held.placement.dp, need.placement.dp),
                Axis::Tp | Axis::Ep => (held.placement.tp, need.placement.tp),
            };
            if from == to {
                continue;
            }
            let placement = held.placement.with(axis, to);
            let mut buffer = held.buffer;
            // Along an axis of one rank all placements are the same.
            if self.local.mesh.size(axis) > 1 {
                buffer = self.collective(need.value, held.buffer, axis, (from, to), placement)?;
            }
            self.held[need.value.0] = Some(Held { buffer, placement });
        }
        Ok(self.buffer_of(need.value))
    }

    fn collective(
        &mut self,
        value: ValueId,
        x: BufferId,
        axis: Axis,
        (from, to): (Place, Place),
        placement: Placement,
    ) -> Result<BufferId, LowerError> {
        match (from, to) {
            (Place::Partial, Place::Replicate) => {
                self.ops.push(Op::AllReduce { x, axis });
                Ok(x)
            }
            (Place::Partial, Place::Shard(Dim::Tokens)) => {
                let out = self.make(value, placement)?;
                self.ops.push(Op::ReduceScatter { x, axis, out });
                Ok(out)
            }
            (Place::Shard(dim), Place::Replicate) => {
                let out = self.make(value, placement)?;
                self.ops.push(Op::AllGather { x, dim, axis, out });
                Ok(out)
            }
            _ => {
                let value = self.program.values[value.0].name;
                Err(LowerError::NoCollective { value, axis, from, to })
            }
        }
    }

    fn node(&mut self, node: &Node) -> Result<(), LowerError> {
        // What a gather makes serves this reader only: the stream itself stays where it was.
        let before: Vec<_> = node.needs.iter().map(|need| self.held(need.value)).collect();
        let mut inputs = Vec::with_capacity(node.needs.len());
        for &need in &node.needs {
            inputs.push(self.meet(need)?);
        }
        let moved: Vec<_> = node.needs.iter().map(|need| self.held(need.value)).collect();
        for ((need, before), moved) in node.needs.iter().zip(before).zip(moved) {
            if moved.buffer != before.buffer {
                self.held[need.value.0] = Some(before);
            }
        }
        if matches!(node.op, NodeOp::Move) {
            let (need, buffer) = (node.needs[0], inputs[0]);
            if let Some(output) = node.output {
                self.held[output.0] = Some(Held { buffer, placement: need.placement });
            }
            return Ok(());
        }
        let mut out = BufferId(usize::MAX);
        if let Some(output) = node.output {
            let placement = self.program.values[output.0].placement;
            out = self.make(output, placement)?;
            self.held[output.0] = Some(Held { buffer: out, placement });
        }
        let op = self.op(&node.op, &inputs, out)?;
        self.ops.push(op);
        Ok(())
    }

    fn op(&mut self, op: &NodeOp, inputs: &[BufferId], out: BufferId) -> Result<Op, LowerError> {
        let x = inputs.first().copied().unwrap_or(out);
        Ok(match op {
            NodeOp::Move => unreachable!("handled where buffers are known"),
            NodeOp::Embed { table } => {
                let first_row = match &self.weights[table.0] {
                    Some(LocalWeight { region: Region::Matrix { rows, .. }, .. }) => rows.start,
                    _ => 0,
                };
                Op::Embed { table: *table, first_row, out }
            }
            NodeOp::Norm { weight, eps } => Op::Norm { x, weight: *weight, eps: *eps, out },
            NodeOp::HeadNorm { weight, eps, slice } => {
                Op::HeadNorm { x, weight: *weight, eps: *eps, slice: self.slice(slice)? }
            }
            NodeOp::Rope { rope, slice } => {
                let rope = self.rope(rope);
                Op::Rope { x, rope, slice: self.slice(slice)? }
            }
            NodeOp::Linear { parts, biases } => {
                let here = |id: &&crate::program::WeightId| self.weights[id.0].is_some();
                let biases = biases.iter().filter(here).copied().collect();
                Op::Linear { x, parts: parts.clone(), biases, out }
            }
            NodeOp::WriteKv { slot } => Op::WriteKv { rows: x, slot: *slot },
            NodeOp::Attention { attention, slot } => {
                Op::Attention { q: x, attention: self.attention(attention)?, slot: *slot, out }
            }
            NodeOp::SiluMul => Op::SiluMul { gate_up: x, out },
            NodeOp::Add => Op::Add { x: inputs[1], target: inputs[0] },
            NodeOp::Route { router } => Op::Route { logits: x, router: *router },
            NodeOp::Experts { experts, top_k, intermediate, gate, up, down } => {
                let owned = self.local.experts(*experts)?;
                let cut = !self.local.mesh.expert_parallel;
                let intermediate =
                    if cut { self.local.part(intermediate)?.len() } else { intermediate.total() };
                Op::Experts {
                    x,
                    first: owned.start,
                    experts: *experts,
                    top_k: *top_k,
                    intermediate,
                    gate: gate[owned.clone()].to_vec(),
                    up: up[owned.clone()].to_vec(),
                    down: down[owned].to_vec(),
                    out,
                }
            }
        })
    }

    fn rope(&mut self, rope: &RopeConfig) -> RopeId {
        let known = self.ropes.iter().position(|known| known == rope);
        RopeId(known.unwrap_or_else(|| {
            self.ropes.push(rope.clone());
            self.ropes.len() - 1
        }))
    }

    fn slice(&self, slice: &HeadSlice) -> Result<LocalSlice, LowerError> {
        let count = self.heads(&slice.heads)?;
        Ok(LocalSlice { count, offset: slice.offset, width: slice.width, stride: slice.stride })
    }

    fn heads(&self, heads: &Extent) -> Result<usize, LowerError> {
        Ok(self.local.units(heads)?)
    }

    fn attention(&self, attention: &Attention) -> Result<LocalAttention, LowerError> {
        Ok(match *attention {
            Attention::Gqa { heads, kv_heads, head_dim, scale, window } => LocalAttention::Gqa {
                heads: self.heads(&heads)?,
                kv_heads: self.heads(&kv_heads)?,
                head_dim,
                scale,
                window,
            },
            Attention::Mla { heads, nope, rope, v, latent, scale, kv_b } => LocalAttention::Mla {
                heads: self.heads(&heads)?,
                nope,
                rope,
                v,
                latent,
                scale,
                kv_b,
            },
        })
    }
}
