//! The language that model files are written in.
//!
//! Each method is one module: it states the placement of its inputs and result, which is all that
//! the lowering needs to insert collectives. Invariant: a method never asks for a mesh.

use super::{
    Attention, CacheGroup, CacheKind, CacheSlot, Cut, Dim, Extent, HeadSlice, Need, Node, NodeOp,
    Place, Placement, Program, Router, Shape, ValueId, ValueInfo, Weight, WeightId,
};
use crate::config::{Decoder, RopeConfig};
use crate::mesh::Axis;
use std::collections::BTreeMap;

/// A value in the hands of a model file.
#[derive(Clone, Debug)]
pub struct Value {
    pub(crate) id: ValueId,
    pub(crate) placement: Placement,
}

/// A program under construction.
#[derive(Debug)]
pub struct Builder {
    program: Program,
    names: BTreeMap<String, WeightId>,
    hidden: Extent,
    in_head: bool,
}

const SHARD_WIDTH: Place = Place::Shard(Dim::Width);

impl Builder {
    /// An empty program of a model with these common fields.
    #[must_use]
    pub fn new(decoder: &Decoder, expert_parallel: bool) -> Self {
        Self {
            program: Program {
                architecture: decoder.architecture.clone(),
                vocab: decoder.vocab,
                max_context: decoder.max_context,
                expert_parallel,
                weights: Vec::new(),
                groups: Vec::new(),
                values: Vec::new(),
                body: Vec::new(),
                head: Vec::new(),
                hidden: ValueId(0),
                logits: ValueId(0),
            },
            names: BTreeMap::new(),
            hidden: Extent::new("hidden_size", decoder.hidden, 1),
            in_head: false,
        }
    }

    /// The width of the residual stream.
    #[must_use]
    pub const fn hidden(&self) -> Extent {
        self.hidden
    }

    /// Whether experts are owned whole by ranks of `ep`.
    #[must_use]
    pub const fn expert_parallel(&self) -> bool {
        self.program.expert_parallel
    }

    /// Declares `[out, input]`.
    pub fn matrix(&mut self, name: String, out: Extent, input: Extent, cut: Cut) -> WeightId {
        self.declare(Weight { name, shape: Shape::Matrix { out, input }, cut })
    }

    /// Declares `[len]`.
    pub fn vector(&mut self, name: String, len: Extent, cut: Cut) -> WeightId {
        self.declare(Weight { name, shape: Shape::Vector(len), cut })
    }

    /// A weight used twice (tied embeddings) is declared once.
    fn declare(&mut self, weight: Weight) -> WeightId {
        if let Some(&id) = self.names.get(&weight.name) {
            return id;
        }
        let id = WeightId(self.program.weights.len());
        self.names.insert(weight.name.clone(), id);
        self.program.weights.push(weight);
        id
    }

    /// Declares a cache group without layers.
    pub fn cache_group(&mut self, kind: CacheKind) -> usize {
        self.program.groups.push(CacheGroup { kind, rows: Vec::new() });
        self.program.groups.len() - 1
    }

    /// Gives a layer a row of `parts` in `group`.
    pub fn cache_row(&mut self, group: usize, parts: Vec<Extent>) -> CacheSlot {
        let rows = &mut self.program.groups[group].rows;
        rows.push(parts);
        CacheSlot { group, row: rows.len() - 1 }
    }

    /// Token ids to the residual stream. A table cut over its rows yields summands.
    pub fn embed(&mut self, table: WeightId) -> Value {
        let tp = match self.program.weights[table.0].cut {
            Cut::Out => Place::Partial,
            _ => Place::Replicate,
        };
        let placement = Placement::BOUNDARY.with(Axis::Tp, tp);
        let rows = self.push(NodeOp::Embed { table }, vec![], "embedding", placement, self.hidden);
        // The stream is added to in place, so it must be whole before anyone reads it.
        self.moved(&rows, Placement::BOUNDARY)
    }

    /// RMS norm of whole rows.
    pub fn norm(&mut self, x: &Value, weight: WeightId, eps: f64) -> Value {
        let needs = vec![self.need(x, x.placement.with(Axis::Tp, Place::Replicate))];
        let placement = needs[0].placement;
        let parts = self.program.values[x.id.0].parts.clone();
        self.push_parts(NodeOp::Norm { weight, eps }, needs, "normed", placement, parts)
    }

    /// RMS norm inside heads, in place.
    pub fn head_norm(&mut self, x: &Value, weight: WeightId, eps: f64, slice: HeadSlice) {
        self.in_place(NodeOp::HeadNorm { weight, eps, slice }, x, None);
    }

    /// Rotary embedding inside heads, in place.
    pub fn rope(&mut self, x: &Value, rope: &RopeConfig, slice: HeadSlice) {
        self.in_place(NodeOp::Rope { rope: rope.clone(), slice }, x, None);
    }

    /// A projection, possibly of several parts side by side; the weights' cut decides placements.
    pub fn linear(
        &mut self,
        name: &'static str,
        x: &Value,
        parts: &[WeightId],
        biases: &[WeightId],
    ) -> Value {
        let cut = self.program.weights[parts[0].0].cut;
        let (input, output) = match cut {
            Cut::Out => (Place::Replicate, SHARD_WIDTH),
            Cut::In => (SHARD_WIDTH, Place::Partial),
            Cut::Whole | Cut::First | Cut::Expert { .. } => (Place::Replicate, Place::Replicate),
        };
        let needs = vec![self.need(x, x.placement.with(Axis::Tp, input))];
        let placement = needs[0].placement.with(Axis::Tp, output);
        let widths = parts.iter().map(|part| match self.program.weights[part.0].shape {
            Shape::Matrix { out, .. } => out,
            Shape::Vector(len) => len,
        });
        let widths = widths.collect();
        let op = NodeOp::Linear { parts: parts.to_vec(), biases: biases.to_vec() };
        self.push_parts(op, needs, name, placement, widths)
    }

    /// Rows into the cache.
    pub fn write_kv(&mut self, rows: &Value, slot: CacheSlot) {
        self.in_place(NodeOp::WriteKv { slot }, rows, None);
    }

    /// Attention of `q` over what the cache holds.
    pub fn attention(&mut self, q: &Value, attention: Attention, slot: CacheSlot) -> Value {
        let out = match attention {
            Attention::Gqa { heads, head_dim, .. } => Extent { each: head_dim, ..heads },
            Attention::Mla { heads, v, .. } => Extent { each: v, ..heads },
        };
        let needs = vec![self.need(q, q.placement)];
        self.push(NodeOp::Attention { attention, slot }, needs, "attended", q.placement, out)
    }

    /// `silu(gate) * up` of two parts side by side.
    pub fn silu_mul(&mut self, gate_up: &Value) -> Value {
        let needs = vec![self.need(gate_up, gate_up.placement)];
        let width = self.program.values[gate_up.id.0].parts[0];
        self.push(NodeOp::SiluMul, needs, "activated", gate_up.placement, width)
    }

    /// `target += x`. What is a summand on both sides stays one, and is reduced once, later.
    pub fn add(&mut self, target: &Value, x: &Value) {
        self.in_place(NodeOp::Add, target, Some(x));
    }

    /// `x` where it must be for expert modules: every rank of `ep` sees every token.
    pub fn for_experts(&mut self, x: &Value) -> Value {
        if self.program.expert_parallel {
            let everywhere = x.placement.with(Axis::Ep, Place::Replicate);
            return self.moved(x, everywhere);
        }
        x.clone()
    }

    /// Chooses experts from router logits.
    pub fn route(&mut self, logits: &Value, router: Router) {
        self.in_place(NodeOp::Route { router }, logits, None);
    }

    /// The chosen experts' weighted sum; a summand over the axis that experts are spread on.
    pub fn experts(&mut self, x: &Value, op: NodeOp) -> Value {
        let axis = if self.program.expert_parallel { Axis::Ep } else { Axis::Tp };
        let needs = vec![self.need(x, x.placement)];
        let placement = x.placement.with(axis, Place::Partial);
        self.push(op, needs, "routed", placement, self.hidden)
    }

    /// Ends the body with `hidden` and the program with a projection onto the vocabulary.
    #[must_use]
    pub fn finish(mut self, hidden: &Value, head: WeightId) -> Program {
        self.program.hidden = hidden.id;
        self.in_head = true;
        let logits = self.linear("logits", hidden, &[head], &[]);
        let logits = self.moved(&logits, Placement::BOUNDARY);
        self.program.logits = logits.id;
        self.program
    }

    /// `x` under another placement. The lowering turns the difference into collectives.
    fn moved(&mut self, x: &Value, placement: Placement) -> Value {
        if x.placement == placement {
            return x.clone();
        }
        let parts = self.program.values[x.id.0].parts.clone();
        let name = self.program.values[x.id.0].name;
        let needs = vec![Need { value: x.id, placement }];
        self.push_parts(NodeOp::Move, needs, name, placement, parts)
    }

    const fn need(&self, x: &Value, placement: Placement) -> Need {
        Need { value: x.id, placement }
    }

    fn in_place(&mut self, op: NodeOp, target: &Value, x: Option<&Value>) {
        let mut needs = vec![self.need(target, target.placement)];
        needs.extend(x.map(|x| self.need(x, target.placement)));
        self.node(Node { op, needs, output: None });
    }

    fn push(
        &mut self,
        op: NodeOp,
        needs: Vec<Need>,
        name: &'static str,
        placement: Placement,
        width: Extent,
    ) -> Value {
        self.push_parts(op, needs, name, placement, vec![width])
    }

    fn push_parts(
        &mut self,
        op: NodeOp,
        needs: Vec<Need>,
        name: &'static str,
        placement: Placement,
        parts: Vec<Extent>,
    ) -> Value {
        let id = ValueId(self.program.values.len());
        self.program.values.push(ValueInfo { name, parts, placement });
        self.node(Node { op, needs, output: Some(id) });
        Value { id, placement }
    }

    fn node(&mut self, node: Node) {
        let nodes = if self.in_head { &mut self.program.head } else { &mut self.program.body };
        nodes.push(node);
    }
}
