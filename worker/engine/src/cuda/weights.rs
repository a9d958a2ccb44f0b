//! Weights on the device: which tensors lie side by side, how many bytes that is, and the way there.
//!
//! Every matrix goes once, in the type of the activations; vectors in 32-bit floats. Invariant: what
//! is loaded is what [`bytes`] counted.

use crate::{EngineError, WeightError, WeightSource};
use device::cuda::{Arena, Context, CudaError, DeviceMemory, DeviceSlice, Upload};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use model::lower::{LocalAttention, Lowered, Op, Region};
use model::program::WeightId;
use ops::WeightSlice;
use ops::cuda::{Dtype, Queue, Tensor};
use ops::mla;
use std::collections::BTreeMap;
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of one pinned buffer; two take turns.
const CHUNK: usize = 32 << 20;

/// Tensors that lie side by side.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Packed {
    /// Rows of all, in order.
    Matrices(Vec<WeightId>),
    /// Elements of all, in order.
    Vectors(Vec<WeightId>),
    /// The key half of a latent projection, transposed head by head.
    Absorbed { kv_b: WeightId, heads: usize, nope: usize, v: usize, latent: usize },
}

impl Packed {
    /// What the experts' first products read: each one's gate, then its up.
    pub(super) fn gate_up(gate: &[WeightId], up: &[WeightId]) -> Self {
        Self::Matrices(gate.iter().zip(up).flat_map(|(gate, up)| [*gate, *up]).collect())
    }

    /// The weights of a latent attention.
    pub(super) fn absorbed(attention: &LocalAttention) -> Option<Self> {
        match *attention {
            LocalAttention::Mla { heads, nope, v, latent, kv_b, .. } => {
                Some(Self::Absorbed { kv_b, heads, nope, v, latent })
            }
            LocalAttention::Gqa { .. } => None,
        }
    }

    fn bytes(&self, lowered: &Lowered, dtype: Dtype) -> usize {
        let elements = |ids: &[WeightId]| -> usize {
            let held = ids.iter().filter_map(|id| lowered.weights[id.0].as_ref());
            held.map(|weight| weight.region.elements()).fold(0, usize::saturating_add)
        };
        match self {
            Self::Matrices(ids) => elements(ids).saturating_mul(dtype.size()),
            Self::Vectors(ids) => elements(ids).saturating_mul(4),
            Self::Absorbed { heads, nope, latent, .. } => heads * nope * latent * dtype.size(),
        }
    }
}

/// What an op reads.
fn packed(op: &Op) -> Vec<Packed> {
    use Packed::{Matrices, Vectors};
    match op {
        Op::Embed { table, .. } => vec![Matrices(vec![*table])],
        Op::Norm { weight, .. } | Op::AddNorm { weight, .. } | Op::HeadNorm { weight, .. } => {
            vec![Vectors(vec![*weight])]
        }
        Op::Linear { parts, biases, .. } if biases.is_empty() => vec![Matrices(parts.clone())],
        Op::Linear { parts, biases, .. } => vec![Matrices(parts.clone()), Vectors(biases.clone())],
        Op::Attention { attention, .. } => {
            let absorbed = Packed::absorbed(attention).into_iter();
            let kv_b = op.weights();
            let whole = (!kv_b.is_empty()).then_some(Matrices(kv_b));
            whole.into_iter().chain(absorbed).collect()
        }
        Op::Route { router, .. } => {
            router.correction.map(|id| Vectors(vec![id])).into_iter().collect()
        }
        Op::Experts { gate, up, down, .. } => {
            vec![Packed::gate_up(gate, up), Matrices(down.clone())]
        }
        _ => vec![],
    }
}

/// Everything a program reads, each once.
fn all(lowered: &Lowered) -> impl Iterator<Item = Packed> {
    let all = lowered.body.iter().chain(&lowered.head).flat_map(packed);
    all.collect::<std::collections::BTreeSet<_>>().into_iter()
}

/// Bytes of the weights on the device.
pub(super) fn bytes(lowered: &Lowered, dtype: Dtype) -> usize {
    let frequencies = lowered.ropes.iter().map(|rope| rope.dim / 2 * 4);
    let weights = all(lowered).map(|packed| packed.bytes(lowered, dtype));
    weights.chain(frequencies).map(Arena::padded).fold(0, usize::saturating_add)
}

/// The weights, by what lies side by side.
pub(super) struct Loaded {
    slices: BTreeMap<Packed, DeviceSlice>,
    /// Frequencies of every rotary embedding.
    pub(super) frequencies: Vec<DeviceSlice>,
}

impl Loaded {
    /// Sends everything.
    pub(super) fn load(
        context: &Context,
        on: Queue<'_>,
        lowered: &Lowered,
        source: &dyn WeightSource,
        dtype: Dtype,
    ) -> Result<Self, EngineError> {
        const WHAT: &str = "weights";
        let memory = DeviceMemory::allocate(context, WHAT, bytes(lowered, dtype))?;
        let mut arena = Arena::new(memory);
        let largest = all(lowered).map(|packed| packed.bytes(lowered, dtype)).max().unwrap_or(0);
        let chunk = largest.clamp(1 << 12, CHUNK);
        let uploads = [Upload::new(context, chunk)?, Upload::new(context, chunk)?];
        let mut sender = Sender { on, uploads, turn: 0, chunk };
        let mut loaded = Self { slices: BTreeMap::new(), frequencies: Vec::new() };
        for packed in all(lowered) {
            let slice = arena.take(WHAT, packed.bytes(lowered, dtype))?;
            let mut end = 0;
            match &packed {
                Packed::Matrices(ids) => {
                    for id in ids {
                        let data = matrix(lowered, source, *id)?;
                        end = sender.send(data, dtype, &slice, end)?;
                    }
                }
                Packed::Vectors(ids) => {
                    for id in ids {
                        let data = vector(lowered, source, *id)?;
                        end = sender.send(WeightSlice::F32(&data), Dtype::F32, &slice, end)?;
                    }
                }
                Packed::Absorbed { .. } => {}
            }
            loaded.slices.insert(packed, slice);
        }
        loaded.absorb(on, dtype)?;
        for rope in &lowered.ropes {
            let frequencies = rope.inv_freq();
            let slice = arena.take(WHAT, size_of_val(frequencies.as_slice()))?;
            sender.send(WeightSlice::F32(&frequencies), Dtype::F32, &slice, 0)?;
            loaded.frequencies.push(slice);
        }
        on.stream.synchronize()?;
        Ok(loaded)
    }

    /// Transposes what latent attention wants transposed.
    fn absorb(&self, on: Queue<'_>, dtype: Dtype) -> Result<(), CudaError> {
        for (packed, out) in &self.slices {
            if let Packed::Absorbed { kv_b, heads, nope, v, latent } = *packed {
                let kv_b = self.get(&Packed::Matrices(vec![kv_b]))?;
                let mla = mla::Mla { heads, nope, rope: 0, v, latent, scale: 1.0 };
                mla::cuda::absorb_weights(on, &mla, Tensor::new(&kv_b, dtype), out)?;
            }
        }
        Ok(())
    }

    /// Where tensors lie.
    pub(super) fn get(&self, packed: &Packed) -> Result<DeviceSlice, CudaError> {
        let missing = || CudaError::Shape { op: "weights", why: format!("{packed:?}") };
        self.slices.get(packed).cloned().ok_or_else(missing)
    }
}

fn matrix<'s>(
    lowered: &Lowered,
    source: &'s dyn WeightSource,
    id: WeightId,
) -> Result<WeightSlice<'s>, WeightError> {
    match lowered.weights[id.0].as_ref().map(|held| (&held.name, &held.region)) {
        Some((name, Region::Matrix { of, .. })) => Ok(source.matrix(name, of.0, of.1)?.data),
        held => {
            Err(WeightError::Kind { name: held.map_or_else(String::new, |(name, _)| name.clone()) })
        }
    }
}

fn vector<'s>(
    lowered: &Lowered,
    source: &'s dyn WeightSource,
    id: WeightId,
) -> Result<std::borrow::Cow<'s, [f32]>, WeightError> {
    match lowered.weights[id.0].as_ref().map(|held| (&held.name, &held.region)) {
        Some((name, Region::Vector { of, .. })) => source.vector(name, *of),
        held => {
            Err(WeightError::Kind { name: held.map_or_else(String::new, |(name, _)| name.clone()) })
        }
    }
}

/// Two pinned buffers: one is filled while the other is copied.
struct Sender<'a> {
    on: Queue<'a>,
    uploads: [Upload; 2],
    turn: usize,
    chunk: usize,
}

impl Sender<'_> {
    /// Sends `data` as `dtype` to byte `start` of `to`; returns where it ends.
    fn send(
        &mut self,
        data: WeightSlice<'_>,
        dtype: Dtype,
        to: &DeviceSlice,
        start: usize,
    ) -> Result<usize, CudaError> {
        let (size, all) = (dtype.size(), data.len());
        let each = self.chunk / size;
        for first in (0..all).step_by(each) {
            let last = (first + each).min(all);
            let target = to.slice(start + first * size..start + last * size);
            let upload = &mut self.uploads[self.turn];
            self.turn = 1 - self.turn;
            convert(data.range(first..last), dtype, &mut upload.edit()?[..target.bytes()]);
            upload.send(self.on.stream, &target)?;
        }
        Ok(start + all * size)
    }
}

/// What a failed cast means: pinned memory is aligned to pages.
const ALIGNED: &str = "pinned memory is aligned, whole elements of it were taken";

/// Writes elements as `dtype`; `to` has their length.
fn convert(from: WeightSlice<'_>, dtype: Dtype, to: &mut [u8]) {
    match (from, dtype) {
        (WeightSlice::F32(from), Dtype::F32) => to.copy_from_slice(from.as_bytes()),
        (WeightSlice::Bf16(from), Dtype::Bf16) => to.copy_from_slice(from.as_bytes()),
        (WeightSlice::F32(from), Dtype::Bf16) => {
            <[bf16]>::mut_from_bytes(to).expect(ALIGNED).convert_from_f32_slice(from);
        }
        (WeightSlice::F16(from), Dtype::Bf16) => {
            let to = <[bf16]>::mut_from_bytes(to).expect(ALIGNED);
            let round = |from: &f16| bf16::from_f32(from.to_f32());
            to.iter_mut().zip(from).for_each(|(to, from)| *to = round(from));
        }
        (WeightSlice::Bf16(from), Dtype::F32) => {
            from.convert_to_f32_slice(<[f32]>::mut_from_bytes(to).expect(ALIGNED));
        }
        (WeightSlice::F16(from), Dtype::F32) => {
            from.convert_to_f32_slice(<[f32]>::mut_from_bytes(to).expect(ALIGNED));
        }
    }
}
