//! One launch: finds its buffers and enqueues its op. Nothing is chosen and nothing allocated here,
//! and nothing waits.

use super::fold::Fold;
use super::fuse::{Block, Grouped};
use super::graphs::Absorbed;
use super::inputs::{LaterViews, PromptViews, Views};
use super::launch::{Activations, Latent, Launch, Layer, Place};
use super::limits::Limits;
use super::moe_layer::Layer as MoeLayer;
use super::sizes::{Prompts, Sizes};
use device::cuda::{Context, CudaError, DeviceSlice, Event, Lane, Stream, TensorMap};
use ops::cuda::{Queue, Rows, Strided, Tensor};
use ops::flash::cuda::prompt::{self, Cut};
use ops::flash::cuda::{Partials, Plan, max_tiles};
use ops::gqa::cuda::{decode as grouped, prepare};
use ops::linear::cuda::{Linear, Then, gates, linear, linear_as};
use ops::mla::cuda::block::Keys;
use ops::mla::cuda::expand::later::{self, Later};
use ops::mla::cuda::{Core, decode, expand};
use ops::moe::cuda::stream::Always;
use ops::rope::Pairing;
use ops::{act, embed, gqa, mla, moe, norm, paged, rope};

/// Frequencies of one rotary embedding.
pub(super) struct Rotation {
    pub(super) inv_freq: DeviceSlice,
    pub(super) factor: f32,
    pub(super) pairing: Pairing,
}

/// What ops work in beside activations.
pub(super) struct Scratch {
    pub(super) partials: Partials,
    pub(super) mla: Option<mla::cuda::Scratch>,
    /// Keys and values of prompts.
    pub(super) expanded: Option<expand::Scratch>,
    /// The cache for the copy engine, and partial results of latent attention's pieces.
    pub(super) latent: Option<(decode::CacheMap, decode::Partials)>,
    /// The same of grouped-query attention: the cache as each attention reads it.
    pub(super) grouped: Option<(Vec<Option<TensorMap>>, grouped::Partials)>,
    pub(super) moe: Option<moe::cuda::Scratch>,
    /// Experts chosen, u32, and their weights, f32.
    pub(super) choices: [DeviceSlice; 2],
}

/// A second stream, for what may run beside a step's own launches.
pub(super) struct Beside {
    pub(super) stream: Stream,
    /// From where on it runs, and what the step waits for.
    begin: Event,
    end: Event,
}

impl Beside {
    pub(super) fn new(context: &Context) -> Result<Self, CudaError> {
        let event = || Event::new(context, false);
        Ok(Self { stream: Stream::on(context, Lane::Beside)?, begin: event()?, end: event()? })
    }
}

/// What every launch of a step sees.
#[derive(Clone, Copy)]
pub(super) struct Step<'a> {
    pub(super) on: Queue<'a>,
    pub(super) beside: &'a Beside,
    pub(super) rows: Rows<'a>,
    pub(super) ids: &'a DeviceSlice,
    pub(super) views: &'a Views,
    pub(super) prompts: bool,
    /// In steps with prompts that may run expanded.
    pub(super) absorbed: Absorbed,
    /// Whether there are few rows, of short contexts.
    pub(super) near: bool,
    /// What the tokens of each pass over prompts behind a context are padded to.
    pub(super) passes: &'a [usize],
    /// Whether there may be prompts that lie in the step as a whole.
    pub(super) whole: bool,
    pub(super) limits: &'a Limits,
    pub(super) sizes: &'a Sizes,
    pub(super) rotations: &'a [Rotation],
    pub(super) activations: &'a Activations,
    pub(super) scratch: &'a Scratch,
    pub(super) cache: &'a DeviceSlice,
}

impl Step<'_> {
    pub(super) fn at(&self, place: Place) -> DeviceSlice {
        self.activations.at(place, self.rows.padded)
    }

    /// The attention's part of the step.
    fn plan(&self, spec: usize, layer: Layer) -> Plan<'_> {
        let of = &self.sizes.specs[spec];
        let (variant, lines) = of.kernels[usize::from(self.prompts)];
        let bucket = self.rows.padded;
        let segments = bucket.min(self.limits.slots);
        let most = match self.prompts && of.paged.is_none() {
            true => max_tiles(bucket, segments, of.group(), lines),
            false => segments * of.group().div_ceil(lines),
        };
        let (tile_count, tiles) = &self.views.tiles[spec];
        Plan {
            segments: &self.views.segments[layer.group],
            tiles,
            tile_count,
            max_tiles: most.min(tiles.bytes() / size_of::<ops::flash::cuda::Tile>()),
            tables: &self.views.tables,
            splits: of.splits(self.limits, bucket, self.prompts),
            variant,
        }
    }

    /// The part of the step of prompts that run apart.
    fn prompts_of<'a>(
        &'a self,
        spec: usize,
        cut: Cut,
        segments: &'a DeviceSlice,
    ) -> prompt::Plan<'a> {
        let PromptViews { tile_count, tiles, .. } = &self.views.prompts[spec];
        let most = cut.max_tiles(self.rows.padded, self.rows.padded.min(self.limits.slots));
        prompt::Plan { segments, tiles, tile_count, first_tile: None, max_tiles: most }
    }

    /// The part of the step of decoding rows whose keys are cut into pieces; `None` where they are not.
    fn pieces(&self, spec: usize) -> Option<(decode::Plan<'_>, &decode::Partials)> {
        let of = &self.sizes.specs[spec];
        let (map, partials) = self.scratch.latent.as_ref().filter(|_| of.pieces.is_some())?;
        let [pieces, slots] = &self.views.pieces[spec];
        let plan = decode::Plan {
            map,
            pieces,
            slots,
            tables: &self.views.tables,
            blocks: self.limits.multiprocessors,
            decodes: of.decodes(self.limits, self.rows.padded),
        };
        Some((plan, partials))
    }

    /// The same of grouped-query attention.
    fn grouped(&self, spec: usize) -> Option<(grouped::Plan<'_>, &grouped::Partials)> {
        let of = &self.sizes.specs[spec];
        let (maps, partials) = self.scratch.grouped.as_ref()?;
        let [pieces, _] = &self.views.pieces[spec];
        let plan = grouped::Plan {
            map: maps[spec].as_ref()?,
            pieces,
            tables: &self.views.tables,
            blocks: grouped::blocks(self.limits.multiprocessors),
            decodes: of.decodes(self.limits, self.rows.padded),
        };
        Some((plan, partials))
    }

    /// Enqueues an op.
    pub(super) fn run(&self, launch: &Launch) -> Result<(), CudaError> {
        let (on, rows, dtype) = (self.on, self.rows, self.sizes.dtype);
        let at = |place: &Place| self.at(*place);
        let cache = Tensor::new(self.cache, dtype);
        match launch {
            Launch::Embed { table, table_rows, first_row, out } => {
                let operands = embed::cuda::Embed {
                    ids: self.ids,
                    table: Tensor::new(table, dtype),
                    table_rows: *table_rows,
                    first_row: *first_row,
                    width: out.width,
                    out: &at(out),
                };
                embed::cuda::embed(on, rows, &operands)
            }
            Launch::Norm { x, weight, eps, out } => {
                let from = at(x);
                let from = Tensor::new(&from, dtype);
                norm::cuda::rms_norm(on, rows, x.width, from, weight, *eps, &at(out))
            }
            Launch::AddNorm { delta, residual, weight, eps, out } => {
                let from = at(delta);
                let from = Tensor::new(&from, dtype);
                let (sum, out) = (at(residual), at(out));
                norm::cuda::add_rms_norm(on, rows, delta.width, from, &sum, weight, *eps, &out)
            }
            Launch::Add { x, target } => {
                let from = at(x);
                act::cuda::add(on, rows, x.width, Tensor::new(&from, dtype), &at(target))
            }
            Launch::HeadNorm { x, heads, weight, eps } => {
                let x = at(x);
                norm::cuda::head_norm(on, rows, Tensor::new(&x, dtype), heads, weight, *eps)
            }
            Launch::Rope { x, heads, rotation } => {
                let Rotation { inv_freq, factor, pairing } = &self.rotations[*rotation];
                let (factor, pairing) = (*factor, *pairing);
                let rope = rope::cuda::Rope { inv_freq, factor, pairing };
                let x = at(x);
                let x = Tensor::new(&x, dtype);
                rope::cuda::rope(on, rows, x, heads, &self.views.positions, &rope)
            }
            Launch::Linear { x, w, bias, out } => {
                let (from, to) = (at(x), at(out));
                linear(on, rows, &self.product((*x, &from), w, bias.as_ref(), (*out, &to)))
            }
            Launch::WriteKv { rows: x, layer } => {
                let (to, from) = (self.destination(*layer), at(x));
                paged::cuda::write_kv(on, rows, rows_of(*x, &from), layer.kv, &to)
            }
            Launch::Gqa { q, shape, layer, spec, out } => self.gqa(*q, shape, *layer, *spec, *out),
            Launch::Mla { q, shape, weights, layer, spec, out } => {
                let scratch = self.scratch.mla.as_ref().ok_or_else(|| missing("mla"))?;
                let (absorbed, kv_b) = (&weights.absorbed, &weights.kv_b);
                let weights = mla::cuda::Weights { absorbed, kv_b };
                let (from, out, plan) = (at(q), at(out), self.plan(*spec, *layer));
                let (q, layer) = (rows_of(*q, &from), layer.kv);
                let tiles = (&plan, &self.scratch.partials);
                let pieces = self.pieces(*spec);
                let decodes = self.prompts && self.absorbed == Absorbed::Decodes;
                let few = decodes && pieces.is_some();
                let core = match &pieces {
                    None => Core::Tiles(tiles.0, tiles.1),
                    Some((plan, partials)) if !self.prompts || few => Core::Pieces(plan, partials),
                    Some((plan, partials)) => Core::Both(tiles, (plan, *partials)),
                };
                // Rows that decode come first, and are no more than there are slots.
                let most = if few { self.limits.bucket(self.limits.slots) } else { rows.padded };
                let rows = Rows { padded: rows.padded.min(most), ..rows };
                mla::cuda::attention(
                    on, rows, q, &weights, shape, layer, cache, core, scratch, &out,
                )
            }
            Launch::SiluMul { gate_up, out } => {
                let from = at(gate_up);
                act::cuda::silu_mul(on, rows, out.width, Tensor::new(&from, dtype), &at(out))
            }
            Launch::Route { logits, router, correction } => {
                let from = at(logits);
                let logits = Tensor::new(&from, self.activations.dtype(*logits));
                let scores = moe::cuda::Scores { logits, router, correction: correction.as_ref() };
                moe::cuda::route(on, rows, &scores, &self.routing(router.top_k))
            }
            Launch::Experts { x, experts, out } => {
                let scratch = self.scratch.moe.as_ref().ok_or_else(|| missing("experts"))?;
                let routing = self.routing(experts.top_k);
                let weights = experts.weights(dtype);
                moe::cuda::experts(on, rows, &at(x), &routing, &weights, &at(out), scratch)
            }
            Launch::Moe(layer) => self.moe(layer, None, false),
            Launch::Gated { product, act } => self.gated(product, act),
            Launch::Block { block, apart } => match self.pieces(block.spec) {
                Some((plan, partials)) if !self.prompts => self.block(block, &plan, partials),
                _ => self.apart(block, apart),
            },
            Launch::Grouped(block) => match self.grouped(block.spec) {
                Some((plan, partials)) if !self.prompts => {
                    let (out, fused) = (self.at(block.out), grouped::fused);
                    self.projected(block, |of| {
                        fused(on, rows, &block.shape, of, &plan, partials, &out)
                    })
                }
                _ => {
                    self.projected(block, |of| prepare::prepare(on, rows, &block.shape, of))?;
                    self.gqa(block.q, &block.shape, block.layer, block.spec, block.out)
                }
            },
        }
    }

    /// Grouped-query attention of queries that are ready over keys that are written.
    fn gqa(
        &self,
        q: Place,
        shape: &gqa::Gqa,
        layer: Layer,
        spec: usize,
        out: Place,
    ) -> Result<(), CudaError> {
        let (on, rows, cache) = (self.on, self.rows, Tensor::new(self.cache, self.sizes.dtype));
        let (from, out, plan) = (self.at(q), self.at(out), self.plan(spec, layer));
        let (q, kv, cut) = (rows_of(q, &from), layer.kv, self.sizes.specs[spec].paged);
        let cut = cut.filter(|_| self.prompts);
        let tiles = (&plan, &self.scratch.partials);
        let pieces = self.grouped(spec);
        let core = match &pieces {
            None => gqa::cuda::Core::Tiles(tiles.0, tiles.1),
            Some((plan, partials)) if !self.prompts || cut.is_some() => {
                gqa::cuda::Core::Pieces(plan, partials)
            }
            Some((plan, partials)) => gqa::cuda::Core::Both(tiles, (plan, *partials)),
        };
        // Tiles may write rows between those that they compute, so prompts come after.
        gqa::cuda::attention(on, rows, q, shape, kv, cache, core, &out)?;
        let Some(cut) = cut else { return Ok(()) };
        let (segments, tables) = (&self.views.segments[layer.group], &self.views.tables);
        let prompts = self.prompts_of(spec, cut, segments);
        gqa::cuda::prompts(on, rows, q, shape, kv, cache, tables, &prompts, &out)
    }

    /// Latent attention op by op, prompts expanded.
    fn apart(&self, block: &Block, apart: &[Launch]) -> Result<(), CudaError> {
        let Block { shape, layer, spec, .. } = block;
        let expanded = self.sizes.prompts[*spec] == Prompts::Expanded;
        let scratch = self.scratch.expanded.as_ref().filter(|_| expanded);
        let (Some(scratch), Some(last)) = (scratch, apart.last()) else {
            return apart.iter().try_for_each(|launch| self.run(launch));
        };
        let [from_q, from_kv, out] = [block.q, block.kv, block.out].map(|place| self.at(place));
        let (q, kv) = (rows_of(block.q, &from_q), rows_of(block.kv, &from_kv));
        mla::cuda::block::keys(self.on, self.rows, shape, &self.keys(block, q, kv))?;
        let kv_b = &block.weights.kv_b;
        if self.absorbed != Absorbed::Nothing {
            // This may write rows between those that it computes, so prompts come after.
            let rows = Rows { count: Some(&self.views.absorbed), ..self.rows };
            Step { rows, ..*self }.run(last)?;
        }
        let views = &self.views.prompts[*spec];
        if self.whole {
            let plan = self.prompts_of(*spec, expand::cut(), &views.segments);
            expand::attention(self.on, self.rows, shape, q, kv, kv_b, &plan, scratch, &out)?;
        }
        let LaterViews { segments, firsts, tiles, .. } = &views.later;
        for (index, tokens) in self.passes.iter().enumerate() {
            let (tokens, parts, tables) = (*tokens, &views.later.pass(index), &self.views.tables);
            let later = Later { tokens, parts, segments, firsts, tiles, tables };
            let of = (layer.kv, Tensor::new(self.cache, self.sizes.dtype));
            let rows = self.rows.padded;
            later::attention(self.on, rows, shape, q, kv_b, of, &later, scratch, &out)?;
        }
        Ok(())
    }

    /// What becomes of queries and keys in front of latent attention.
    fn keys<'a>(&'a self, block: &'a Block, q: Strided<'a>, kv: Strided<'a>) -> Keys<'a> {
        let Rotation { inv_freq, factor, pairing } = &self.rotations[block.rotation];
        Keys {
            q,
            kv,
            norm: &block.norm,
            eps: block.eps,
            rope: rope::cuda::Rope { inv_freq, factor: *factor, pairing: *pairing },
            to: self.destination(block.layer),
            layer: block.layer.kv,
        }
    }

    /// Latent attention of decoding rows, with what surrounds it.
    fn block(
        &self,
        block: &Block,
        plan: &decode::Plan<'_>,
        partials: &decode::Partials,
    ) -> Result<(), CudaError> {
        let Latent { absorbed, kv_b } = &block.weights;
        let [q, kv] = [block.q, block.kv].map(|place| self.at(place));
        let (q, kv) = (rows_of(block.q, &q), rows_of(block.kv, &kv));
        let Keys { norm, eps, rope, to, layer, .. } = self.keys(block, q, kv);
        let operands = mla::cuda::block::Block {
            q,
            kv,
            norm,
            eps,
            rope,
            to,
            layer,
            weights: mla::cuda::Weights { absorbed, kv_b },
            plan,
            partials,
            scratch: self.scratch.mla.as_ref().ok_or_else(|| missing("mla"))?,
            out: &self.at(block.out),
        };
        match self.near {
            true => mla::cuda::near::attention(self.on, self.rows, &block.shape, &operands),
            false => mla::cuda::block::attention(self.on, self.rows, &block.shape, &operands),
        }
    }

    /// Calls `run` with what grouped-query attention was projected to, and all that it then needs.
    fn projected(
        &self,
        block: &Grouped,
        run: impl FnOnce(&grouped::Projected<'_>) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let Rotation { inv_freq, factor, pairing } = &self.rotations[block.rotation];
        let norms = block.norms.as_ref().map(|norms| {
            norms.each_ref().map(|(weight, eps)| grouped::HeadNorm { weight, eps: *eps })
        });
        run(&grouped::Projected {
            q: rows_of(block.q, &self.at(block.q)),
            kv: rows_of(block.kv, &self.at(block.kv)),
            norms,
            rope: rope::cuda::Rope { inv_freq, factor: *factor, pairing: *pairing },
            to: self.destination(block.layer),
            layer: block.layer.kv,
        })
    }

    /// Where the rows' keys and values go.
    fn destination(&self, layer: Layer) -> paged::cuda::Destination<'_> {
        paged::cuda::Destination {
            arena: Tensor::new(self.cache, self.sizes.dtype),
            positions: &self.views.positions,
            row_tables: &self.views.row_tables[layer.group],
            tables: &self.views.tables,
        }
    }

    pub(super) fn product<'a>(
        &self,
        (x, from): (Place, &'a DeviceSlice),
        w: &'a DeviceSlice,
        bias: Option<&'a DeviceSlice>,
        (out, to): (Place, &'a DeviceSlice),
    ) -> Linear<'a> {
        let from = Tensor::new(from, self.activations.dtype(x));
        let to = Tensor::new(to, self.activations.dtype(out));
        let plain = Linear::plain(from, w, to, x.width, out.width);
        Linear { bias, x_stride: x.row, out_stride: out.row, ..plain }
    }

    /// A product and its activation, in one launch where that is faster.
    fn gated(&self, product: &Launch, act: &Launch) -> Result<(), CudaError> {
        if let (Launch::Linear { x, w, bias: None, .. }, Launch::SiluMul { out, .. }) =
            (product, act)
        {
            let (from, to) = (self.at(*x), self.at(*out));
            let plain = self.product((*x, &from), w, None, (*out, &to));
            let gated = Linear { then: Then::Gate, ..plain };
            if let Some(variant) = gates(self.rows.padded, &gated) {
                return linear_as(variant, self.on, self.rows, &gated);
            }
        }
        self.run(product)?;
        self.run(act)
    }

    fn scores<'a>(&self, layer: &'a MoeLayer, logits: &'a DeviceSlice) -> moe::cuda::Scores<'a> {
        moe::cuda::Scores {
            logits: Tensor::new(logits, self.activations.dtype(layer.logits)),
            router: &layer.router,
            correction: layer.correction.as_ref(),
        }
    }

    /// The shared experts of a layer, if one launch takes them with the routed ones, as where tokens are
    /// few.
    pub(super) fn few_always<'a>(&self, layer: &'a MoeLayer) -> Option<Option<Always<'a>>> {
        let always = layer.always()?;
        let weights = layer.experts.weights(self.sizes.dtype);
        let top_k = layer.experts.top_k;
        moe::cuda::stream::takes(self.rows.padded, &weights, top_k, always.as_ref())
            .then_some(always)
    }

    /// A layer of experts of few tokens: shared ones with the routed ones. The router may make the `norm`
    /// in front; the one behind may be left to what comes next.
    fn few(
        &self,
        layer: &MoeLayer,
        always: Option<&Always<'_>>,
        norm: Option<&Fold<'_>>,
        unnormed: bool,
    ) -> Result<(), CudaError> {
        let MoeLayer { x, experts, residual, weight, eps, out, .. } = layer;
        let (on, rows, dtype) = (self.on, self.rows, self.sizes.dtype);
        let scratch = self.scratch.moe.as_ref().ok_or_else(|| missing("experts"))?;
        match norm {
            Some(norm) => self.normed(&layer.score, norm)?,
            None => self.run(&layer.score)?,
        }
        let (logits, routing) = (self.at(layer.logits), self.routing(experts.top_k));
        let (weights, scores) = (experts.weights(dtype), self.scores(layer, &logits));
        // A simple choice is made where it is used.
        let here = moe::cuda::stream::chooses(&scores);
        if !here {
            moe::cuda::route(on, rows, &scores, &routing)?;
        }
        let scores = here.then_some(&scores);
        let (x_at, residual) = (self.at(*x), self.at(*residual));
        let sum = moe::cuda::stream::Sum { out: &residual, add: true };
        moe::cuda::stream::experts(
            on, rows, &x_at, &routing, scores, &weights, always, &sum, scratch,
        )?;
        if unnormed {
            return Ok(());
        }
        let residual = Tensor::new(&residual, dtype);
        norm::cuda::rms_norm(on, rows, x.width, residual, weight, *eps, &self.at(*out))
    }

    /// A layer of experts; shared ones beside the router and the routed ones, or with these. Of few
    /// tokens only, the norm in front may be its own, and the one behind not.
    pub(super) fn moe(
        &self,
        layer: &MoeLayer,
        norm: Option<&Fold<'_>>,
        unnormed: bool,
    ) -> Result<(), CudaError> {
        let MoeLayer { x, experts, shared, residual, weight, eps, out, .. } = layer;
        let (on, rows, dtype, beside) = (self.on, self.rows, self.sizes.dtype, self.beside);
        if let Some(always) = self.few_always(layer) {
            return self.few(layer, always.as_ref(), norm, unnormed);
        }
        let scratch = self.scratch.moe.as_ref().ok_or_else(|| missing("experts"))?;
        let weights = experts.weights(dtype);
        // For many tokens shared experts run in the launch of the routed ones.
        let always = layer
            .always()
            .flatten()
            .filter(|always| moe::cuda::joins(rows.padded, &weights, experts.top_k, always));
        let places = layer.shared_places().map(|places| places.map(|place| self.at(place)));
        let joined = always.zip(places.as_ref());
        let joined = joined.map(|(always, [inner, out])| moe::cuda::Joined { always, inner, out });
        let apart = shared.as_ref().filter(|_| joined.is_none());
        if let Some((launches, _)) = apart {
            beside.begin.record(on.stream)?;
            beside.stream.wait(&beside.begin)?;
            let step = Step { on: Queue { stream: &beside.stream, ..on }, ..*self };
            launches.iter().try_for_each(|launch| step.run(launch))?;
            beside.end.record(&beside.stream)?;
        }
        let (logits, routing) = (self.at(layer.logits), self.routing(experts.top_k));
        self.run(&layer.score)?;
        moe::cuda::route(on, rows, &self.scores(layer, &logits), &routing)?;
        moe::cuda::results(on, rows, &self.at(*x), &routing, &weights, joined, scratch)?;
        if apart.is_some() {
            on.stream.wait(&beside.end)?;
        }
        let (residual, out) = (&self.at(*residual), &self.at(*out));
        let shared = shared.as_ref().map(|(_, place)| self.at(*place));
        let follows = apart.is_none();
        let (beside, eps) = (shared.as_ref(), *eps);
        let behind = moe::cuda::Behind { beside, residual, weight, eps, follows };
        let to = moe::cuda::Combined { dtype, hidden: x.width, out };
        moe::cuda::combine(on, rows, &routing, scratch, &to, Some(&behind))
    }

    fn routing(&self, top_k: usize) -> moe::cuda::Routing<'_> {
        let [chosen, weights] = &self.scratch.choices;
        moe::cuda::Routing { chosen, weights, top_k }
    }
}

/// Rows of a place, whose memory is at hand.
const fn rows_of(place: Place, at: &DeviceSlice) -> Strided<'_> {
    Strided { slice: at, stride: place.row }
}

/// An op whose scratch the sizes did not count.
fn missing(op: &'static str) -> CudaError {
    CudaError::Shape { op, why: "a step without scratch for it".to_owned() }
}
