//! How much device memory a program takes: for plans before anything is there, and for the
//! allocation itself, so that the two agree.
//!
//! Pure arithmetic on a lowered program. Invariant: no step within the limits needs more.

use super::fuse::{self, Found};
use super::inputs::{self, Layout};
use super::launch::Layer;
use super::limits::Limits;
use super::{ahead, asked, rest, weights};
use crate::memory::HEAD_ROWS;
use device::cuda::{Arena, CudaError, DeviceSlice, TensorMap};
use model::lower::{BufferId, LocalAttention, Lowered, Op};
use ops::cuda::{Dtype, Gpu};
use ops::flash::cuda::cut::{self, Lines};
use ops::flash::cuda::prompt::Cut;
use ops::flash::cuda::{Partials, Segment, Variant, splits};
use ops::gqa::cuda::decode as grouped;
use ops::mla::cuda::{decode as latent, expand};
use ops::sample::cuda::{SampleRow, TokenLogprob};
use ops::{gqa, mla, moe};
use step::MAX_LOGPROBS;

/// Elements of logits held at once, at most (but for one row).
const MAX_TILE_ELEMENTS: usize = 1 << 26;
/// Rows of logits held at once, at most: the head's weights are read once for so many.
const MAX_TILE_ROWS: usize = 256;
/// Elements of logits on their way to the host at once, at most (but for one row).
const MAX_HOST_ELEMENTS: usize = 1 << 23;

/// Attention as grids see it; layers that look the same share the tiles of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spec {
    /// Query heads.
    pub(super) heads: usize,
    /// KV heads.
    pub(super) kv_heads: usize,
    /// Variant and lines of a tile, for steps without and with prompt chunks.
    pub(super) kernels: [(Variant, usize); 2],
    /// Where the keys of decoding rows are cut into pieces: how.
    pub(super) pieces: Option<Pieces>,
    /// Where prompts over the cache have a kernel of their own: how it cuts them.
    pub(super) paged: Option<Cut>,
    v_width: usize,
}

/// How the keys of decoding rows are cut into pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pieces {
    /// The cache group they lie in.
    pub(super) group: usize,
    pub(super) lines: Lines,
    /// Whether a second kernel merges results, and reads which of a row's they are.
    pub(super) listed: bool,
}

impl Pieces {
    /// Blocks that keys are cut for.
    pub(super) const fn blocks(&self, limits: &Limits) -> usize {
        match self.listed {
            true => limits.multiprocessors,
            false => grouped::blocks(limits.multiprocessors),
        }
    }
}

/// Segments that a kernel of their own computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Prompts {
    /// None: all are tiles of the same kernel.
    None,
    /// Those of several rows, over the cache.
    Paged(Cut),
    /// Those that are expanded: where they lie in a step as a whole in one launch, others in passes.
    Expanded,
}

impl Prompts {
    /// How they are cut.
    pub(super) const fn cut(self) -> Option<Cut> {
        match self {
            Self::None => None,
            Self::Paged(cut) => Some(cut),
            Self::Expanded => Some(expand::cut()),
        }
    }

    /// Whether a segment is one.
    pub(super) const fn takes(self, segment: &Segment) -> bool {
        match self {
            Self::None => false,
            Self::Paged(_) => segment.len > 1,
            Self::Expanded => expand::is_expanded(segment),
        }
    }
}

impl Spec {
    pub(super) fn new(attention: &LocalAttention, layer: Layer, dtype: Dtype) -> Self {
        let Layer { group, kv: layer, whole } = layer;
        let pieces =
            |serves: bool, lines, listed| serves.then_some(Pieces { group, lines, listed });
        let kernels = |select: &dyn Fn(bool) -> (Variant, usize)| [select(false), select(true)];
        match attention_of(attention) {
            Attention::Gqa(shape) => {
                let paged = gqa::cuda::prompt_cut(&shape, layer, dtype);
                // Where prompts have their kernel, those of tiles are for decoding rows.
                let tiles = |prompts| prompts && paged.is_none();
                let select = |prompts| gqa::cuda::select(&shape, layer, dtype, tiles(prompts));
                Self {
                    heads: shape.heads,
                    kv_heads: shape.kv_heads,
                    kernels: kernels(&select),
                    pieces: pieces(
                        whole && grouped::serves(&shape, layer, dtype),
                        grouped::lines(&shape),
                        false,
                    ),
                    paged,
                    v_width: shape.head_dim,
                }
            }
            Attention::Mla(shape) => Self {
                heads: shape.heads,
                kv_heads: 1,
                kernels: kernels(&|prompts| mla::cuda::select(&shape, layer, dtype, prompts)),
                pieces: pieces(
                    latent::serves(&shape, layer, dtype),
                    latent::lines(shape.heads),
                    true,
                ),
                paged: None,
                v_width: shape.latent,
            },
        }
    }

    /// The cache as pieces of grouped-query attention read it; `None` where it has none.
    pub(super) fn cache_map(&self, cache: &DeviceSlice) -> Result<Option<TensorMap>, CudaError> {
        let (heads, kv_heads, head_dim) = (self.heads, self.kv_heads, self.v_width);
        let shape = gqa::Gqa { heads, kv_heads, head_dim, scale: 1.0, window: None };
        let cut = self.pieces.filter(|pieces| !pieces.listed);
        cut.map(|_| grouped::cache_map(&shape, cache)).transpose()
    }

    /// Query heads of a KV head.
    pub(super) const fn group(&self) -> usize {
        self.heads / if self.kv_heads == 0 { 1 } else { self.kv_heads }
    }

    /// Of a step padded to `bucket`: rows whose keys are cut into pieces, at most.
    pub(super) fn decodes(&self, limits: &Limits, bucket: usize) -> usize {
        if self.pieces.is_some() { bucket.min(limits.slots) } else { 0 }
    }

    /// Stretches that keys are cut into; the same for all steps of a bucket.
    pub(super) fn splits(&self, limits: &Limits, bucket: usize, prompts: bool) -> usize {
        let lines = self.kernels[usize::from(prompts)].1;
        // Where every row is a segment of its own; else this is the least there is.
        let tiles = match prompts && self.paged.is_none() {
            false => bucket.min(limits.slots) * self.group().div_ceil(lines),
            true => (bucket * self.group()).div_ceil(lines),
        };
        splits(limits.multiprocessors, tiles, self.kv_heads, limits.context)
    }
}

/// An attention's shape, by kind.
pub(super) enum Attention {
    Gqa(gqa::Gqa),
    Mla(mla::Mla),
}

pub(super) fn attention_of(attention: &LocalAttention) -> Attention {
    match *attention {
        LocalAttention::Gqa { heads, kv_heads, head_dim, scale, window } => {
            Attention::Gqa(gqa::Gqa { heads, kv_heads, head_dim, scale: scale as f32, window })
        }
        LocalAttention::Mla { heads, nope, rope, v, latent, scale, .. } => {
            Attention::Mla(mla::Mla { heads, nope, rope, v, latent, scale: scale as f32 })
        }
    }
}

/// Shape of the expert layers.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExpertShape {
    pub(super) top_k: usize,
    pub(super) held: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
}

/// What the ops of a program need.
#[derive(Clone, Debug)]
pub(super) struct Sizes {
    pub(super) dtype: Dtype,
    /// Rows of logits computed at once.
    pub(super) drawn_tile: usize,
    /// The same, where they may be sent to the host.
    pub(super) tile: usize,
    pub(super) vocab: usize,
    pub(super) groups: usize,
    pub(super) specs: Vec<Spec>,
    /// Of each: prompts that run apart from its other rows, in every layer.
    pub(super) prompts: Vec<Prompts>,
    pub(super) experts: Option<ExpertShape>,
    pub(super) mla: Option<mla::Mla>,
    /// Experts that a router scores, and experts per token.
    pub(super) router: (usize, usize),
    body_width: usize,
    head_width: usize,
}

impl Sizes {
    /// Whole prompts run expanded where `expands` and kernels serve that.
    pub(super) fn new(lowered: &Lowered, dtype: Dtype, expands: bool) -> Self {
        let vocab = lowered.buffers[lowered.logits.0].width;
        let mut sizes = Self {
            dtype,
            drawn_tile: (MAX_TILE_ELEMENTS / vocab.max(1)).clamp(1, MAX_TILE_ROWS),
            tile: (MAX_HOST_ELEMENTS / vocab.max(1)).clamp(1, HEAD_ROWS),
            vocab,
            groups: lowered.groups.len(),
            specs: Vec::new(),
            prompts: Vec::new(),
            experts: None,
            mla: None,
            router: (0, 0),
            body_width: lowered.body_width,
            head_width: lowered.head_width,
        };
        for (at, op) in lowered.body.iter().chain(&lowered.head).enumerate() {
            match op {
                Op::Attention { attention, slot, .. } => {
                    let spec = Spec::new(attention, Layer::of(lowered, *slot), dtype);
                    let known = sizes.specs.iter().position(|known| *known == spec);
                    let index = known.unwrap_or_else(|| {
                        sizes.specs.push(spec);
                        sizes.prompts.push(match spec.paged {
                            Some(cut) => Prompts::Paged(cut),
                            None if expands => Prompts::Expanded,
                            None => Prompts::None,
                        });
                        sizes.specs.len() - 1
                    });
                    let prompts = &mut sizes.prompts[index];
                    if *prompts == Prompts::Expanded && !expandable(lowered, at, dtype) {
                        *prompts = Prompts::None;
                    }
                    if let Attention::Mla(mla) = attention_of(attention) {
                        sizes.mla = Some(mla);
                    }
                }
                Op::Route { logits, router } => {
                    let width = lowered.buffers[logits.0].width;
                    let (experts, top_k) = sizes.router;
                    sizes.router = (experts.max(width), top_k.max(router.top_k));
                }
                Op::Experts { x, top_k, intermediate, gate, .. } => {
                    sizes.experts = Some(ExpertShape {
                        top_k: *top_k,
                        held: gate.len(),
                        hidden: lowered.buffers[x.0].width,
                        intermediate: *intermediate,
                    });
                }
                _ => {}
            }
        }
        sizes
    }

    /// Whether a buffer is kept in 32-bit floats whatever activations are: what chooses must not be
    /// rounded first.
    pub(super) fn is_exact(lowered: &Lowered, id: BufferId) -> bool {
        let routed = |op: &Op| matches!(op, Op::Route { logits, .. } if *logits == id);
        id == lowered.logits || lowered.body.iter().any(routed)
    }

    /// Bytes of the body's activations.
    pub(super) fn body_bytes(&self, limits: &Limits) -> usize {
        self.body_width.saturating_mul(limits.rows).saturating_mul(self.dtype.size())
    }

    /// Bytes of the head's activations.
    pub(super) const fn head_bytes(&self) -> usize {
        self.head_width * self.drawn_tile * self.dtype.size()
    }

    /// Bytes of a tile of logits.
    pub(super) const fn logits_bytes(&self) -> usize {
        self.drawn_tile * self.vocab * 4
    }

    /// Bytes of logits that are sent to the host at once.
    pub(super) const fn host_bytes(&self) -> usize {
        self.tile * self.vocab * 4
    }

    /// Bytes that say how the rows of a tile are drawn, what is listed of each, and which are given.
    pub(super) const fn draw_bytes(&self) -> usize {
        self.drawn_tile * (size_of::<SampleRow>() + 2 * size_of::<u32>())
    }

    /// Bytes of such a tile's tokens, as many faults, and log-probabilities.
    pub(super) const fn drawn_bytes(&self) -> usize {
        let described = (1 + MAX_LOGPROBS as usize) * size_of::<TokenLogprob>();
        self.drawn_tile * (2 * size_of::<u32>() + described)
    }

    /// Bytes of the router's scores.
    pub(super) const fn router_bytes(&self, limits: &Limits) -> usize {
        limits.rows * self.router.0 * 4
    }

    /// Bytes of the experts chosen, and as many of their weights.
    pub(super) const fn choice_bytes(&self, limits: &Limits) -> usize {
        limits.rows * self.router.1 * 4
    }

    /// Lines times splits of attention's partial results, at most, and their width.
    pub(super) fn partials(&self, limits: &Limits) -> (usize, usize) {
        let mut most = (0, 0);
        for bucket in limits.buckets() {
            for (spec, prompts) in self.specs.iter().flat_map(|s| [(s, false), (s, true)]) {
                // Nothing is left to tiles.
                if spec.pieces.is_some() && (!prompts || spec.paged.is_some()) {
                    continue;
                }
                let splits = spec.splits(limits, bucket, prompts);
                if splits > 1 {
                    most.0 = most.0.max(bucket * spec.heads * splits);
                }
                most.1 = most.1.max(spec.v_width);
            }
        }
        most
    }

    /// Whether prompts may run expanded in every attention.
    pub(super) fn expands(&self) -> bool {
        let mut prompts = self.prompts.iter();
        !self.prompts.is_empty() && prompts.all(|prompts| *prompts == Prompts::Expanded)
    }

    /// The latent attention whose prompts run expanded, and the room for that.
    pub(super) fn expanded(&self, limits: &Limits) -> Option<(&mla::Mla, expand::Room)> {
        let Limits { rows, slots, context, .. } = *limits;
        let mla = self.mla.as_ref().filter(|_| self.prompts.contains(&Prompts::Expanded))?;
        Some((mla, expand::Room::new(mla, rows, slots.min(rows), context)))
    }

    /// Slots of partial results of latent attention's pieces, at most; none where no rows are cut so.
    pub(super) fn latent_slots(&self, limits: &Limits) -> Option<usize> {
        self.slots(limits, true).map(|(slots, _)| slots)
    }

    /// The same of grouped-query attention, and the width of values.
    pub(super) fn grouped_slots(&self, limits: &Limits) -> Option<(usize, usize)> {
        self.slots(limits, false)
    }

    fn slots(&self, limits: &Limits, listed: bool) -> Option<(usize, usize)> {
        let of = |spec: &Spec| {
            let pieces = spec.pieces.filter(|pieces| pieces.listed == listed)?;
            let rows = spec.decodes(limits, limits.rows);
            Some((cut::Cut::most(rows, pieces.lines, pieces.blocks(limits)).1, spec.v_width))
        };
        let all = self.specs.iter().filter_map(of);
        all.reduce(|(slots, width), other| (slots.max(other.0), width.max(other.1)))
    }

    /// Bytes that steps within the limits take, inputs, scratch and logits included.
    pub(super) fn step_bytes(&self, limits: &Limits) -> usize {
        let (lines, v_width) = self.partials(limits);
        let latents = |mla| mla::cuda::Scratch::bytes(mla, self.dtype, limits.rows);
        let attention = Partials::bytes(lines, v_width)
            .saturating_add(self.mla.as_ref().map_or(0, latents))
            .saturating_add(
                self.expanded(limits).map_or(0, |(mla, room)| expand::Scratch::bytes(mla, room)),
            )
            .saturating_add(self.latent_slots(limits).map_or(0, latent::Partials::bytes))
            .saturating_add(
                self.grouped_slots(limits)
                    .map_or(0, |(slots, width)| grouped::Partials::bytes(slots, width)),
            );
        let experts = self.experts.map_or(0, |e| {
            let ExpertShape { top_k, held, hidden, intermediate } = e;
            moe::cuda::Scratch::bytes(self.dtype, limits.rows, top_k, held, hidden, intermediate)
        });
        let plain = [
            self.body_bytes(limits),
            self.head_bytes(),
            self.logits_bytes(),
            self.router_bytes(limits),
            self.choice_bytes(limits),
            self.choice_bytes(limits),
            Layout::new(self, limits, limits.rows).bytes(),
            self.draw_bytes(),
            self.drawn_bytes(),
        ];
        let kept = inputs::kept_bytes(self, limits).into_iter().chain(ahead::bytes(limits));
        let kept = kept.chain(asked::bytes(self, limits)).chain(rest::bytes(self, limits));
        let plain = plain.into_iter().chain(kept).map(Arena::padded).fold(0, usize::saturating_add);
        plain.saturating_add(attention).saturating_add(experts)
    }
}

/// Whether the attention at `at` ends a block, whose latents are at hand, and has widths that the
/// expanded form serves. Steps leave whole prompts out of other tiles by this, and only by this.
fn expandable(lowered: &Lowered, at: usize, dtype: Dtype) -> bool {
    let Some(Op::Attention { attention, .. }) = lowered.body.get(at) else { return false };
    let Attention::Mla(mla) = attention_of(attention) else { return false };
    let block = (at + 1).checked_sub(Found::LENGTH).map(|first| &lowered.body[first..=at]);
    expand::serves(&mla, dtype)
        && block.is_some_and(|ops| fuse::find(lowered, ops, dtype).is_some())
}

/// Of every attention of a program in order, the kernel that steps run on a CUDA device which only decode:
/// its name where keys are cut into pieces, `tiles` elsewhere.
#[must_use]
pub fn cuda_attention(lowered: &Lowered, kv_dtype: crate::KvDtype) -> Vec<&'static str> {
    let dtype = super::dtype_of(kv_dtype);
    let body = &lowered.body;
    let name = |(at, op): (usize, &Op)| {
        let Op::Attention { attention, slot, .. } = op else { return None };
        let cut = Spec::new(attention, Layer::of(lowered, *slot), dtype).pieces.is_some();
        Some(match attention_of(attention) {
            Attention::Gqa(shape) if cut => {
                let ends = |from: &usize| {
                    fuse::find_grouped(lowered, &body[*from..], dtype)
                        .is_some_and(|length| from + length == at + 1)
                };
                grouped::name(&shape, (0..at).any(|from| ends(&from)))
            }
            Attention::Mla(shape) if cut => latent::name(shape.heads),
            _ => "tiles",
        })
    };
    body.iter().enumerate().filter_map(name).collect()
}

/// What super-blocks begin on multiples of, in bytes: `least`, and the rows that pieces of grouped-query
/// attention take for granted.
pub(crate) fn alignment(lowered: &Lowered, kv_dtype: crate::KvDtype, least: u64) -> u64 {
    let dtype = super::dtype_of(kv_dtype);
    let row = |op: &Op| {
        let Op::Attention { attention, slot, .. } = op else { return None };
        let layer = Layer::of(lowered, *slot);
        let pieces = Spec::new(attention, layer, dtype).pieces?;
        (!pieces.listed).then_some((layer.kv.row * dtype.size()) as u64)
    };
    lowered.body.iter().filter_map(row).fold(least, |all, row| {
        let multiple = |times: &u64| (all * times).is_multiple_of(row);
        all * (1..=row).find(multiple).unwrap_or(1)
    })
}

/// What a program takes of a device's memory, beside the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaBytes {
    /// Weights, laid out as the kernels want them.
    pub weights: u64,
    /// Activations, scratch, inputs and logits of the largest step, and what kernels share.
    pub steps: u64,
}

/// What an engine on a CUDA device will allocate beside the cache, in bytes: `element` are those of
/// activations and matrices (4 or 2), a step has up to `tokens` tokens of up to `slots` requests whose
/// contexts are up to `context` long.
#[must_use]
pub fn cuda_bytes(
    lowered: &Lowered,
    kv_dtype: crate::KvDtype,
    (tokens, slots, context): (usize, usize, usize),
    multiprocessors: usize,
) -> CudaBytes {
    let dtype = super::dtype_of(kv_dtype);
    let limits = Limits { rows: tokens, slots, context, multiprocessors };
    CudaBytes {
        weights: weights::bytes(lowered, dtype) as u64,
        steps: Sizes::new(lowered, dtype, true)
            .step_bytes(&limits)
            .saturating_add(Gpu::bytes(multiprocessors)) as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::lower::lower;
    use model::mesh::{Mesh, Rank};

    fn sizes(nope: usize, value: usize, dtype: Dtype, expands: bool) -> Sizes {
        let config = format!(
            r#"{{"model_type": "deepseek_v3", "vocab_size": 64, "hidden_size": 32,
            "num_hidden_layers": 3, "num_attention_heads": 5, "intermediate_size": 48,
            "max_position_embeddings": 512, "kv_lora_rank": 512, "q_lora_rank": 12,
            "qk_nope_head_dim": {nope}, "qk_rope_head_dim": 64, "v_head_dim": {value},
            "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
            "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1}}"#
        );
        let config = model::config::parse(&config).expect("a config").config;
        let program = model::families::program(&config, false);
        let lowered = lower(&program, Mesh::SINGLE, Rank(0), 64).expect("one rank");
        Sizes::new(&lowered, dtype, expands)
    }

    #[test]
    fn whole_prompts_are_told_apart_only_where_something_else_computes_them() {
        for (nope, value, dtype, expands, whole) in [
            (128, 128, Dtype::Bf16, true, true),
            (128, 128, Dtype::Bf16, false, false),
            (128, 128, Dtype::F32, true, false),
            // Decoding rows of these have pieces; prompts run absorbed.
            (192, 256, Dtype::Bf16, true, false),
            (64, 128, Dtype::Bf16, true, false),
        ] {
            let sizes = sizes(nope, value, dtype, expands);
            let what = format!("{nope} and {value} in {dtype:?}, {expands}");
            let expected = if whole { Prompts::Expanded } else { Prompts::None };
            assert_eq!(sizes.prompts, [expected], "{what}");
            assert_eq!(sizes.specs[0].pieces.is_some(), dtype == Dtype::Bf16, "{what}");
            let limits = Limits { rows: 64, slots: 8, context: 512, multiprocessors: 4 };
            assert_eq!(sizes.expanded(&limits).is_some(), whole, "{what}");
            let layout = Layout::new(&sizes, &limits, 64);
            assert_eq!(layout.has_prompts(0), whole, "{what}");
        }
    }

    #[test]
    fn super_blocks_begin_on_rows_where_pieces_take_that_for_granted() {
        let config = r#"{"model_type": "llama", "vocab_size": 64, "hidden_size": 32,
            "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3,
            "head_dim": 64, "intermediate_size": 48, "max_position_embeddings": 512}"#;
        let config = model::config::parse(config).expect("a config").config;
        let program = model::families::program(&config, false);
        let lowered = lower(&program, Mesh::SINGLE, Rank(0), 64).expect("one rank");
        // Keys and values of three heads of 64, two bytes each.
        assert_eq!(alignment(&lowered, crate::KvDtype::Bf16, 128), 768);
        assert_eq!(alignment(&lowered, crate::KvDtype::Bf16, 512), 1536);
        assert_eq!(alignment(&lowered, crate::KvDtype::F32, 128), 128);
    }
}
