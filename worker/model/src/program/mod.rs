//! A model as an SPMD program: what a paper writes, over named dimensions, with a placement at
//! each module's boundary and no collective by hand.
//!
//! A program knows no mesh size, no buffer and no kernel: the lowering makes those. Invariant:
//! nodes stand in execution order and every value is written before it is read.

mod builder;
mod cache;
mod extent;
mod node;
mod placement;
mod weight;

pub use builder::{Builder, Value};
pub use cache::{CacheGroup, CacheKind, CacheSlot};
pub use extent::{Extent, Indivisible};
pub use node::{
    Attention, GroupLimit, GroupScore, HeadSlice, Need, Node, NodeOp, Router, Scoring, ValueId,
    ValueInfo,
};
pub use placement::{Dim, Place, Placement};
pub use weight::{Cut, Shape, Weight, WeightId};

/// A whole model, before it is lowered for a mesh.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    /// Architecture name.
    pub architecture: String,
    /// Vocabulary entries.
    pub vocab: usize,
    /// Longest context, in tokens.
    pub max_context: usize,
    /// Whether experts are owned whole by ranks of `ep`.
    pub expert_parallel: bool,
    /// Every weight, each once.
    pub weights: Vec<Weight>,
    /// Cache groups, numbered from 0.
    pub groups: Vec<CacheGroup>,
    /// Values that flow between nodes.
    pub values: Vec<ValueInfo>,
    /// From tokens to normalised hidden states, all tokens.
    pub body: Vec<Node>,
    /// From chosen rows of hidden states to logits.
    pub head: Vec<Node>,
    /// The body's result, which the head starts from.
    pub hidden: ValueId,
    /// The head's result.
    pub logits: ValueId,
}
