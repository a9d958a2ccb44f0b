//! The flat op list: what one rank executes, in order, for a step of any number of tokens.
//!
//! No op decides anything at run time but by counts and lengths. Invariant: an op that makes a
//! buffer never reads the memory it writes.

use crate::mesh::Axis;
use crate::program::{CacheSlot, Dim, Router, WeightId};

/// Index into [`super::Lowered::buffers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BufferId(pub usize);

/// Index into [`super::Lowered::ropes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RopeId(pub usize);

/// Heads of this rank inside the rows of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalSlice {
    /// Heads.
    pub count: usize,
    /// First element of the first head in the row.
    pub offset: usize,
    /// Elements worked on in each head.
    pub width: usize,
    /// From one head to the next.
    pub stride: usize,
}

/// Attention over this rank's heads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LocalAttention {
    /// Grouped-query.
    Gqa {
        /// Query heads here.
        heads: usize,
        /// Key-value heads here.
        kv_heads: usize,
        /// Width of a head.
        head_dim: usize,
        /// Multiplies the products of queries and keys.
        scale: f64,
        /// Tokens seen, the newest included; `None` for all.
        window: Option<usize>,
    },
    /// Multi-head latent; the form is chosen per segment by its length.
    Mla {
        /// Query heads here.
        heads: usize,
        /// Unrotated width of a query head.
        nope: usize,
        /// Rotated width.
        rope: usize,
        /// Width of a value head.
        v: usize,
        /// Width of the latent.
        latent: usize,
        /// Multiplies the products of queries and keys.
        scale: f64,
        /// `[heads * (nope + v), latent]`.
        kv_b: WeightId,
    },
}

/// One operation of one rank. Shapes: every buffer is `[tokens, width]`.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// Token ids to rows of the table part that starts at `first_row`; others are zero.
    Embed {
        /// `[rows, hidden]`.
        table: WeightId,
        /// First vocabulary entry held here.
        first_row: usize,
        /// Written.
        out: BufferId,
    },
    /// `out = x / rms(x) * weight`.
    Norm {
        /// Read.
        x: BufferId,
        /// `[width]`.
        weight: WeightId,
        /// Added to the mean square.
        eps: f64,
        /// Written.
        out: BufferId,
    },
    /// `residual += delta; out = norm(residual)`.
    AddNorm {
        /// Read.
        delta: BufferId,
        /// Changed.
        residual: BufferId,
        /// `[width]`.
        weight: WeightId,
        /// Added to the mean square.
        eps: f64,
        /// Written.
        out: BufferId,
    },
    /// `target += x`.
    Add {
        /// Read.
        x: BufferId,
        /// Changed.
        target: BufferId,
    },
    /// RMS norm inside heads, in place.
    HeadNorm {
        /// Changed.
        x: BufferId,
        /// `[slice.width]`.
        weight: WeightId,
        /// Added to the mean square.
        eps: f64,
        /// Which elements.
        slice: LocalSlice,
    },
    /// Rotary embedding inside heads, in place.
    Rope {
        /// Changed.
        x: BufferId,
        /// Frequencies and layout.
        rope: RopeId,
        /// Which elements.
        slice: LocalSlice,
    },
    /// `out = x W^T + b`, parts side by side.
    Linear {
        /// Read.
        x: BufferId,
        /// `[out, in]` each.
        parts: Vec<WeightId>,
        /// One per part, or none.
        biases: Vec<WeightId>,
        /// Written.
        out: BufferId,
    },
    /// Rows into the cache.
    WriteKv {
        /// Read.
        rows: BufferId,
        /// Where.
        slot: CacheSlot,
    },
    /// Attention over the cache.
    Attention {
        /// Queries.
        q: BufferId,
        /// What kind.
        attention: LocalAttention,
        /// Where.
        slot: CacheSlot,
        /// Written.
        out: BufferId,
    },
    /// `out = silu(gate) * up`.
    SiluMul {
        /// Gate then up, side by side.
        gate_up: BufferId,
        /// Written.
        out: BufferId,
    },
    /// Router logits to the step's routing.
    Route {
        /// `[tokens, experts]`.
        logits: BufferId,
        /// How.
        router: Router,
    },
    /// Weighted sum of the chosen experts that live here.
    Experts {
        /// Read.
        x: BufferId,
        /// Number of the first expert held here.
        first: usize,
        /// Experts in all.
        experts: usize,
        /// Experts per token.
        top_k: usize,
        /// Width of an expert here.
        intermediate: usize,
        /// `[intermediate, hidden]` each.
        gate: Vec<WeightId>,
        /// `[intermediate, hidden]` each.
        up: Vec<WeightId>,
        /// `[hidden, intermediate]` each.
        down: Vec<WeightId>,
        /// Written.
        out: BufferId,
    },
    /// Sum over the ranks of an axis, in place.
    AllReduce {
        /// Changed.
        x: BufferId,
        /// Over which ranks.
        axis: Axis,
    },
    /// Parts of all ranks of an axis, along a dimension.
    AllGather {
        /// Read.
        x: BufferId,
        /// Along what.
        dim: Dim,
        /// Over which ranks.
        axis: Axis,
        /// Written.
        out: BufferId,
    },
    /// Sum over the ranks of an axis, of which each keeps its tokens.
    ReduceScatter {
        /// Read.
        x: BufferId,
        /// Over which ranks.
        axis: Axis,
        /// Written.
        out: BufferId,
    },
}

/// How an op uses buffers.
#[derive(Clone, Debug, Default)]
pub struct Uses {
    /// Read, or changed in place.
    pub reads: Vec<BufferId>,
    /// Made from nothing.
    pub writes: Option<BufferId>,
}

impl Op {
    /// The op's name in lists.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Embed { .. } => "embed",
            Self::Norm { .. } => "rms_norm",
            Self::AddNorm { .. } => "add_rms_norm",
            Self::Add { .. } => "add",
            Self::HeadNorm { .. } => "head_norm",
            Self::Rope { .. } => "rope",
            Self::Linear { .. } => "linear",
            Self::WriteKv { .. } => "write_kv",
            Self::Attention { attention: LocalAttention::Gqa { .. }, .. } => "gqa",
            Self::Attention { attention: LocalAttention::Mla { .. }, .. } => "mla",
            Self::SiluMul { .. } => "silu_mul",
            Self::Route { .. } => "route",
            Self::Experts { .. } => "experts",
            Self::AllReduce { .. } => "all_reduce",
            Self::AllGather { .. } => "all_gather",
            Self::ReduceScatter { .. } => "reduce_scatter",
        }
    }

    /// Buffers read and written.
    #[must_use]
    pub fn uses(&self) -> Uses {
        let (reads, writes) = match *self {
            Self::Embed { out, .. } => (vec![], Some(out)),
            Self::Norm { x, out, .. }
            | Self::Linear { x, out, .. }
            | Self::Experts { x, out, .. }
            | Self::AllGather { x, out, .. }
            | Self::ReduceScatter { x, out, .. } => (vec![x], Some(out)),
            Self::AddNorm { delta, residual, out, .. } => (vec![delta, residual], Some(out)),
            Self::Add { x, target } => (vec![x, target], None),
            Self::HeadNorm { x, .. } | Self::Rope { x, .. } | Self::AllReduce { x, .. } => {
                (vec![x], None)
            }
            Self::WriteKv { rows, .. } => (vec![rows], None),
            Self::Attention { q, out, .. } => (vec![q], Some(out)),
            Self::SiluMul { gate_up, out } => (vec![gate_up], Some(out)),
            Self::Route { logits, .. } => (vec![logits], None),
        };
        Uses { reads, writes }
    }

    /// Weights read, of all kinds.
    #[must_use]
    pub fn weights(&self) -> Vec<WeightId> {
        match self {
            Self::Embed { table, .. } => vec![*table],
            Self::Norm { weight, .. }
            | Self::AddNorm { weight, .. }
            | Self::HeadNorm { weight, .. } => vec![*weight],
            Self::Linear { parts, biases, .. } => parts.iter().chain(biases).copied().collect(),
            Self::Attention { attention: LocalAttention::Mla { kv_b, .. }, .. } => vec![*kv_b],
            Self::Route { router, .. } => router.correction.into_iter().collect(),
            Self::Experts { gate, up, down, .. } => {
                gate.iter().chain(up).chain(down).copied().collect()
            }
            _ => vec![],
        }
    }
}
