//! What a program is made of: operations on values, each with the placement it needs.

use super::{CacheSlot, Extent, Placement, WeightId};
use crate::config::RopeConfig;

/// Index into a program's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ValueId(pub usize);

/// A value: one row per token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValueInfo {
    /// For people.
    pub name: &'static str,
    /// Parts of a row, side by side.
    pub parts: Vec<Extent>,
    /// Where it lives.
    pub placement: Placement,
}

/// An input and the placement it must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// The value.
    pub value: ValueId,
    /// Where it must live.
    pub placement: Placement,
}

/// Heads inside the rows of a value: `width` elements from `offset` on, every `stride` elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadSlice {
    /// The heads; cut over `tp` when the value is.
    pub heads: Extent,
    /// First element of the first head in the row.
    pub offset: usize,
    /// Elements worked on.
    pub width: usize,
    /// From one head to the next.
    pub stride: usize,
}

/// How router logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// Over all experts.
    Softmax,
    /// Each expert by itself.
    Sigmoid,
}

/// How a group of experts is scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// By its best expert.
    Max,
    /// By the sum of its best two.
    SumTop2,
}

/// Choice limited to groups of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupLimit {
    /// Groups in all.
    pub groups: usize,
    /// Groups that may be chosen from.
    pub chosen: usize,
    /// How they are compared.
    pub score: GroupScore,
}

/// From router logits to experts and weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Router {
    /// Experts in all.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Logits to scores.
    pub scoring: Scoring,
    /// Limit to groups.
    pub limit: Option<GroupLimit>,
    /// Added to scores for the choice only, `[experts]`.
    pub correction: Option<WeightId>,
    /// Chosen weights are divided by their sum.
    pub norm_topk: bool,
    /// Chosen weights are multiplied by this at the end.
    pub scale: f64,
}

/// Attention over a cache group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Attention {
    /// Grouped-query.
    Gqa {
        /// Query heads.
        heads: Extent,
        /// Key-value heads.
        kv_heads: Extent,
        /// Width of a head.
        head_dim: usize,
        /// Multiplies the products of queries and keys.
        scale: f64,
        /// Tokens seen, the newest included; `None` for all.
        window: Option<usize>,
    },
    /// Multi-head latent, in either form.
    Mla {
        /// Query heads.
        heads: Extent,
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

/// One operation. Inputs are [`Node::needs`] in the order stated.
#[derive(Clone, Debug, PartialEq)]
pub enum NodeOp {
    /// The same value elsewhere: nothing but what its collectives do. Needs x.
    Move,
    /// Token ids to rows of a table.
    Embed {
        /// `[vocab, hidden]`.
        table: WeightId,
    },
    /// `x / rms(x) * weight`. Needs x.
    Norm {
        /// `[hidden]`.
        weight: WeightId,
        /// Added to the mean square.
        eps: f64,
    },
    /// The same inside heads, in place. Needs x.
    HeadNorm {
        /// `[slice.width]`.
        weight: WeightId,
        /// Added to the mean square.
        eps: f64,
        /// Which elements.
        slice: HeadSlice,
    },
    /// Rotary embedding inside heads, in place. Needs x.
    Rope {
        /// Frequencies and layout.
        rope: RopeConfig,
        /// Which elements.
        slice: HeadSlice,
    },
    /// `x W^T + b`, parts side by side. Needs x.
    Linear {
        /// `[out, in]` each.
        parts: Vec<WeightId>,
        /// One per part, or none.
        biases: Vec<WeightId>,
    },
    /// Rows into the cache. Needs the rows.
    WriteKv {
        /// Where.
        slot: CacheSlot,
    },
    /// Needs queries; reads the cache.
    Attention {
        /// What kind.
        attention: Attention,
        /// Where.
        slot: CacheSlot,
    },
    /// `silu(gate) * up`. Needs gate and up side by side.
    SiluMul,
    /// `target += x`, in place. Needs target, then x.
    Add,
    /// Experts and weights of each token. Needs router logits.
    Route {
        /// How.
        router: Router,
    },
    /// Weighted sum of the chosen experts. Needs x; uses the latest `Route`.
    Experts {
        /// Experts in all.
        experts: usize,
        /// Experts per token.
        top_k: usize,
        /// Width of an expert.
        intermediate: Extent,
        /// `[intermediate, hidden]` each.
        gate: Vec<WeightId>,
        /// `[intermediate, hidden]` each.
        up: Vec<WeightId>,
        /// `[hidden, intermediate]` each.
        down: Vec<WeightId>,
    },
}

/// A step of the program.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// What.
    pub op: NodeOp,
    /// Inputs.
    pub needs: Vec<Need>,
    /// The value made; `None` where the first input is changed in place, or nothing is made.
    pub output: Option<ValueId>,
}
