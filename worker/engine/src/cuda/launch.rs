//! Ops with everything resolved that does not change from step to step: weights as memory, buffers as
//! places, attention by the number of its tiles. What remains for a step are counts and tables.

use super::fuse::{Block, Found, Grouped};
use super::limits::Limits;
use super::moe_layer::{self, Layer as MoeLayer};
use super::sizes::{Attention, Sizes, Spec, attention_of};
use super::units::{self, Unit};
use super::weights::{Loaded, Packed, Product, product};
use device::cuda::{Arena, CudaError, DeviceSlice};
use model::lower::{BufferId, LocalAttention, LocalSlice, Lowered, Op};
use model::program::CacheSlot;
use ops::cuda::{Dtype, Tensor};
use ops::norm::Heads;
use ops::paged::KvLayer;
use ops::{gqa, mla, moe};

/// Which memory a buffer lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Region {
    /// The body's activations.
    Body,
    /// The head's.
    Head,
    /// Scores of the router at hand, 32-bit floats.
    Router,
    /// Logits, 32-bit floats.
    Logits,
}

/// A buffer's place: `[rows, width]`, of rows of `row` elements at `offset * rows` of its region, from
/// their element `column` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) region: Region,
    offset: usize,
    column: usize,
    pub(super) width: usize,
    /// More than the width where another buffer lies in the same rows.
    pub(super) row: usize,
}

impl Place {
    /// Of a buffer of a program, among ops whose plain buffers lie in `region`.
    pub(super) fn of(lowered: &Lowered, region: Region, id: BufferId) -> Self {
        let buffer = &lowered.buffers[id.0];
        let (offset, width) = (buffer.offset, buffer.width);
        let plain = Self { region, offset, column: 0, width, row: width };
        if let Some(pair) = lowered.pairs.iter().find(|pair| pair.contains(&id)) {
            let [first, second] = pair.map(|id| &lowered.buffers[id.0]);
            let column = if id == pair[0] { 0 } else { first.width };
            return Self { offset: first.offset, column, row: first.width + second.width, ..plain };
        }
        if !Sizes::is_exact(lowered, id) {
            return plain;
        }
        // One router's scores are used up before the next one's are made.
        let region = if id == lowered.logits { Region::Logits } else { Region::Router };
        Self { region, offset: 0, ..plain }
    }

    /// Whether they have no memory in common.
    pub(super) fn is_apart(self, other: Self) -> bool {
        let ends_before = |a: Self, b: Self| a.offset + a.row <= b.offset;
        let beside = |a: Self, b: Self| {
            (a.offset, a.row) == (b.offset, b.row) && a.column + a.width <= b.column
        };
        let apart = |a: Self, b: Self| ends_before(a, b) || beside(a, b);
        self.region != other.region || apart(self, other) || apart(other, self)
    }
}

/// The regions.
pub(super) struct Activations {
    body: DeviceSlice,
    head: DeviceSlice,
    router: DeviceSlice,
    logits: DeviceSlice,
    dtype: Dtype,
}

impl Activations {
    pub(super) fn take(
        arena: &mut Arena,
        sizes: &Sizes,
        limits: &Limits,
    ) -> Result<Self, CudaError> {
        Ok(Self {
            body: arena.take("activations", sizes.body_bytes(limits))?,
            head: arena.take("activations of the head", sizes.head_bytes())?,
            router: arena.take("router scores", sizes.router_bytes(limits))?,
            logits: arena.take("logits", sizes.logits_bytes())?,
            dtype: sizes.dtype,
        })
    }

    /// The same but for the body's, which lie in other memory.
    pub(super) fn over(&self, body: DeviceSlice) -> Self {
        let [head, router, logits] = [&self.head, &self.router, &self.logits].map(Clone::clone);
        Self { body, head, router, logits, dtype: self.dtype }
    }

    /// Element type of a place.
    pub(super) const fn dtype(&self, place: Place) -> Dtype {
        match place.region {
            Region::Body | Region::Head => self.dtype,
            Region::Router | Region::Logits => Dtype::F32,
        }
    }

    /// A place's memory, for steps padded to `rows`; its rows are [`Place::row`] apart.
    pub(super) fn at(&self, place: Place, rows: usize) -> DeviceSlice {
        let region = match place.region {
            Region::Body => &self.body,
            Region::Head => &self.head,
            Region::Router => &self.router,
            Region::Logits => &self.logits,
        };
        let element = self.dtype(place).size();
        let start = place.offset * rows + place.column;
        // The last row ends with what is the buffer's own.
        let len = rows.checked_sub(1).map_or(0, |before| before * place.row + place.width);
        region.slice(start * element..(start + len) * element)
    }
}

/// A layer of a cache group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layer {
    pub(super) group: usize,
    pub(super) kv: KvLayer,
    /// Whether a block of the group is a whole number of its rows.
    pub(super) whole: bool,
}

impl Layer {
    /// Where a program's slot lies.
    pub(super) fn of(lowered: &Lowered, slot: CacheSlot) -> Self {
        let group = &lowered.groups[slot.group];
        let row = group.layers[slot.row];
        let kv = KvLayer { offset: row.offset, row: row.width };
        let whole = group.block_elements.is_multiple_of(row.width.max(1));
        Self { group: slot.group, kv, whole }
    }
}

/// A resolved op.
pub(super) enum Launch {
    Embed {
        table: DeviceSlice,
        table_rows: usize,
        first_row: usize,
        out: Place,
    },
    Norm {
        x: Place,
        weight: DeviceSlice,
        eps: f32,
        out: Place,
    },
    AddNorm {
        delta: Place,
        residual: Place,
        weight: DeviceSlice,
        eps: f32,
        out: Place,
    },
    Add {
        x: Place,
        target: Place,
    },
    HeadNorm {
        x: Place,
        heads: Heads,
        weight: DeviceSlice,
        eps: f32,
    },
    Rope {
        x: Place,
        heads: Heads,
        rotation: usize,
    },
    Linear {
        x: Place,
        w: DeviceSlice,
        bias: Option<DeviceSlice>,
        out: Place,
    },
    WriteKv {
        rows: Place,
        layer: Layer,
    },
    Gqa {
        q: Place,
        shape: gqa::Gqa,
        layer: Layer,
        spec: usize,
        out: Place,
    },
    Mla {
        q: Place,
        shape: mla::Mla,
        weights: Latent,
        layer: Layer,
        spec: usize,
        out: Place,
    },
    SiluMul {
        gate_up: Place,
        out: Place,
    },
    Route {
        logits: Place,
        router: moe::Router<'static>,
        correction: Option<DeviceSlice>,
    },
    Experts {
        x: Place,
        experts: Experts,
        out: Place,
    },
    /// A layer of experts with what surrounds it.
    Moe(Box<MoeLayer>),
    /// A product and the activation of its results.
    Gated {
        product: Box<Launch>,
        act: Box<Launch>,
    },
    /// Latent attention of steps that decode alone, and the launches that others run.
    Block {
        block: Box<Block>,
        apart: Vec<Launch>,
    },
    /// The same of grouped-query attention, for any steps.
    Grouped(Box<Grouped>),
}

/// Weights of latent attention.
#[derive(Clone)]
pub(super) struct Latent {
    pub(super) absorbed: DeviceSlice,
    pub(super) kv_b: DeviceSlice,
}

/// One expert layer.
pub(super) struct Experts {
    gate_up: DeviceSlice,
    down: DeviceSlice,
    first: usize,
    held: usize,
    hidden: usize,
    intermediate: usize,
    pub(super) top_k: usize,
}

impl Experts {
    pub(super) const fn weights(&self, dtype: Dtype) -> moe::cuda::ExpertWeights<'_> {
        let Self { gate_up, down, first, held, hidden, intermediate, .. } = self;
        moe::cuda::ExpertWeights {
            first: *first,
            held: *held,
            gate_up: Tensor::new(gate_up, dtype),
            down,
            hidden: *hidden,
            intermediate: *intermediate,
        }
    }
}

/// Heads of a buffer's rows.
pub(super) fn heads(lowered: &Lowered, x: BufferId, slice: &LocalSlice) -> Heads {
    let LocalSlice { count, offset, width, stride } = *slice;
    Heads { row: lowered.buffers[x.0].width, count, offset, width, stride }
}

/// Resolves ops against weights on the device.
pub(super) struct Resolver<'a> {
    pub(super) lowered: &'a Lowered,
    pub(super) sizes: &'a Sizes,
    pub(super) loaded: &'a Loaded,
    /// Where plain buffers of the ops at hand lie.
    pub(super) region: Region,
}

impl Resolver<'_> {
    pub(super) fn place(&self, id: BufferId) -> Place {
        Place::of(self.lowered, self.region, id)
    }

    pub(super) fn launches(&self, ops: &[Op]) -> Result<Vec<Launch>, CudaError> {
        let mut launches = Vec::with_capacity(ops.len());
        for unit in units::split(self.lowered, ops, self.sizes.dtype) {
            match unit {
                Unit::One(op) => launches.extend(self.launch(op)?),
                Unit::Gated([product, act]) => {
                    if let (Some(product), Some(act)) = (self.launch(product)?, self.launch(act)?) {
                        let (product, act) = (Box::new(product), Box::new(act));
                        launches.push(Launch::Gated { product, act });
                    }
                }
                Unit::Block(found) => launches.push(self.block(found)?),
                Unit::Grouped(ops) => launches.push(self.grouped(ops)?),
                Unit::Moe(found) => launches.push(Launch::Moe(Box::new(self.moe_layer(found)?))),
            }
        }
        Ok(launches)
    }

    fn block(&self, found: Found<'_>) -> Result<Launch, CudaError> {
        let launches = found.apart.iter().filter_map(|op| self.launch(op).transpose());
        let apart = launches.collect::<Result<Vec<_>, _>>()?;
        let [
            Launch::Rope { rotation, .. },
            Launch::HeadNorm { x: kv, weight, eps, .. },
            ..,
            Launch::Mla { q, shape, weights, layer, spec, out },
        ] = apart.as_slice()
        else {
            let why = "a block of other ops".to_owned();
            return Err(CudaError::Shape { op: "mla", why });
        };
        let block = Block {
            q: *q,
            kv: *kv,
            norm: weight.clone(),
            eps: *eps,
            rotation: *rotation,
            shape: *shape,
            weights: weights.clone(),
            layer: *layer,
            spec: *spec,
            out: *out,
        };
        Ok(Launch::Block { block: Box::new(block), apart })
    }

    fn grouped(&self, ops: &[Op]) -> Result<Launch, CudaError> {
        let launches = ops.iter().filter_map(|op| self.launch(op).transpose());
        let apart = launches.collect::<Result<Vec<_>, _>>()?;
        let norms = match apart.as_slice() {
            [
                Launch::HeadNorm { weight: of_q, eps: q_eps, .. },
                Launch::HeadNorm { weight: of_k, eps: k_eps, .. },
                ..,
            ] => Some([(of_q.clone(), *q_eps), (of_k.clone(), *k_eps)]),
            _ => None,
        };
        let [
            ..,
            Launch::Rope { rotation, .. },
            Launch::WriteKv { rows, .. },
            Launch::Gqa { q, shape, layer, spec, out },
        ] = apart.as_slice()
        else {
            let why = "a block of other ops".to_owned();
            return Err(CudaError::Shape { op: "gqa", why });
        };
        let block = Grouped {
            q: *q,
            kv: *rows,
            norms,
            rotation: *rotation,
            shape: *shape,
            layer: *layer,
            spec: *spec,
            out: *out,
        };
        Ok(Launch::Grouped(Box::new(block)))
    }

    fn moe_layer(&self, found: moe_layer::Found<'_>) -> Result<MoeLayer, CudaError> {
        let all = |ops: &[&Op]| -> Result<Vec<Launch>, CudaError> {
            ops.iter().filter_map(|op| self.launch(op).transpose()).collect()
        };
        let shared = found.shared.map(|(ops, out)| {
            let ops: Vec<&Op> = ops.iter().collect();
            Ok::<_, CudaError>((all(&ops)?, self.place(out)))
        });
        let [score, route] = found.routing;
        let (
            Some(score),
            Some(Launch::Route { logits, router, correction }),
            Some(Launch::Experts { x, experts, .. }),
            Some(Launch::AddNorm { residual, weight, eps, out, .. }),
        ) = (
            self.launch(score)?,
            self.launch(route)?,
            self.launch(found.experts)?,
            self.launch(found.norm)?,
        )
        else {
            let why = "a layer of other ops".to_owned();
            return Err(CudaError::Shape { op: "experts", why });
        };
        let shared = shared.transpose()?;
        Ok(MoeLayer {
            score,
            logits,
            router,
            correction,
            x,
            experts,
            shared,
            residual,
            weight,
            eps,
            out,
        })
    }

    fn layer(&self, slot: CacheSlot) -> Layer {
        Layer::of(self.lowered, slot)
    }

    /// The op resolved; `None` for what one rank need not do, or another product does.
    fn launch(&self, op: &Op) -> Result<Option<Launch>, CudaError> {
        let place = |id| self.place(id);
        let vector = |id| self.loaded.get(&Packed::Vectors(vec![id]));
        let matrices = |ids: &[_]| self.loaded.get(&Packed::Matrices(ids.to_vec()));
        Ok(Some(match *op {
            Op::Embed { table, first_row, out } => {
                let bytes = matrices(&[table])?;
                let row = place(out).width * self.sizes.dtype.size();
                let table_rows = bytes.bytes() / row.max(1);
                Launch::Embed { table: bytes, table_rows, first_row, out: place(out) }
            }
            Op::Norm { x, weight, eps, out } => {
                let (x, out) = (place(x), place(out));
                Launch::Norm { x, weight: vector(weight)?, eps: eps as f32, out }
            }
            Op::AddNorm { delta, residual, weight, eps, out } => Launch::AddNorm {
                delta: place(delta),
                residual: place(residual),
                weight: vector(weight)?,
                eps: eps as f32,
                out: place(out),
            },
            Op::Add { x, target } => Launch::Add { x: place(x), target: place(target) },
            Op::HeadNorm { x, weight, eps, ref slice } => {
                let (x, heads) = (place(x), heads(self.lowered, x, slice));
                let heads = Heads { row: x.row, ..heads };
                Launch::HeadNorm { x, heads, weight: vector(weight)?, eps: eps as f32 }
            }
            Op::Rope { x, rope, ref slice } => {
                let (x, heads) = (place(x), heads(self.lowered, x, slice));
                Launch::Rope { x, heads: Heads { row: x.row, ..heads }, rotation: rope.0 }
            }
            Op::Linear { x, out, .. } => {
                let Some(Product { matrices, biases }) = product(self.lowered, op) else {
                    return Ok(None);
                };
                let bias = biases.map(|biases| self.loaded.get(&biases)).transpose()?;
                let out = place(out);
                // The first of a pair, or a product by itself.
                let out = Place { width: out.row, ..out };
                Launch::Linear { x: place(x), w: self.loaded.get(&matrices)?, bias, out }
            }
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
                router: crate::cpu::local_router(router),
                correction: router.correction.map(vector).transpose()?,
            },
            Op::Experts {
                x, first, top_k, intermediate, ref gate, ref up, ref down, out, ..
            } => {
                let experts = Experts {
                    gate_up: self.loaded.get(&Packed::gate_up(gate, up))?,
                    down: matrices(down)?,
                    first,
                    held: gate.len(),
                    hidden: place(x).width,
                    intermediate,
                    top_k,
                };
                Launch::Experts { x: place(x), experts, out: place(out) }
            }
            // One rank holds everything already.
            Op::AllReduce { .. } | Op::AllGather { .. } | Op::ReduceScatter { .. } => {
                return Ok(None);
            }
        }))
    }

    fn attention(
        &self,
        q: Place,
        attention: &LocalAttention,
        layer: Layer,
        out: Place,
    ) -> Result<Launch, CudaError> {
        let spec = Spec::new(attention, layer, self.sizes.dtype);
        let spec = self.sizes.specs.iter().position(|known| *known == spec).unwrap_or_default();
        Ok(match (attention_of(attention), attention, Packed::absorbed(attention)) {
            (Attention::Mla(shape), LocalAttention::Mla { kv_b, .. }, Some(absorbed)) => {
                let kv_b = self.loaded.get(&Packed::Matrices(vec![*kv_b]))?;
                let weights = Latent { absorbed: self.loaded.get(&absorbed)?, kv_b };
                Launch::Mla { q, shape, weights, layer, spec, out }
            }
            (Attention::Gqa(shape), ..) => Launch::Gqa { q, shape, layer, spec, out },
            (Attention::Mla(_), ..) => {
                let why = "latent attention without its projection".to_owned();
                return Err(CudaError::Shape { op: "mla", why });
            }
        })
    }
}
