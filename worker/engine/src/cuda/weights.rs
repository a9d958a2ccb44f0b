//! Weights on the device: which tensors lie side by side, how many bytes that is, and the way there.
//!
//! Every matrix goes once, in the type of the activations; vectors in 32-bit floats. Random matrices
//! do not go but are made there. Invariant: what is loaded is what [`bytes`] counted.

mod send;

pub(crate) use send::Report;

use crate::{EngineError, Origin, WeightError, WeightSource};
use device::cuda::{Arena, Context, CudaError, DeviceMemory, DeviceSlice};
use model::lower::{LocalAttention, Lowered, Op, Region};
use model::program::WeightId;
use ops::cuda::{Dtype, Queue, Tensor};
use ops::fill::{self, Normal};
use ops::mla;
use send::{Elements, Transfer};
use std::borrow::Cow;
use std::collections::BTreeMap;
use weights::Float;
use weights::random::Draws;

const WHAT: &str = "weights";

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

/// What a product reads.
pub(super) struct Product {
    pub(super) matrices: Packed,
    pub(super) biases: Option<Packed>,
}

/// What an op reads if it is a product; that of a pair's first result makes both, and the other is none.
pub(super) fn product(lowered: &Lowered, op: &Op) -> Option<Product> {
    let Op::Linear { parts, biases, out, .. } = op else { return None };
    let (mut parts, mut biases) = (parts.clone(), biases.clone());
    if let Some([first, second]) = lowered.pairs.iter().find(|pair| pair.contains(out)) {
        if second == out {
            return None;
        }
        debug_assert_eq!(first, out, "a pair is of two");
        let other = lowered.body.iter().find_map(|op| match op {
            Op::Linear { parts, biases, out, .. } if out == second => Some((parts, biases)),
            _ => None,
        });
        let (more, others) = other?;
        parts.extend(more);
        biases.extend(others);
    }
    let biases = (!biases.is_empty()).then_some(Packed::Vectors(biases));
    Some(Product { matrices: Packed::Matrices(parts), biases })
}

/// What an op reads.
fn packed(lowered: &Lowered, op: &Op) -> Vec<Packed> {
    use Packed::{Matrices, Vectors};
    match op {
        Op::Embed { table, .. } => vec![Matrices(vec![*table])],
        Op::Norm { weight, .. } | Op::AddNorm { weight, .. } | Op::HeadNorm { weight, .. } => {
            vec![Vectors(vec![*weight])]
        }
        Op::Linear { .. } => {
            let of = product(lowered, op).into_iter();
            of.flat_map(|Product { matrices, biases }| [Some(matrices), biases]).flatten().collect()
        }
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
    let all = lowered.body.iter().chain(&lowered.head).flat_map(|op| packed(lowered, op));
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
    /// Brings everything there with up to `threads` threads, and says how far it is.
    pub(super) fn load(
        context: &Context,
        on: Queue<'_>,
        lowered: &Lowered,
        source: &dyn WeightSource,
        dtype: Dtype,
        (threads, report): (usize, Report<'_>),
    ) -> Result<Self, EngineError> {
        let memory = DeviceMemory::allocate(context, WHAT, bytes(lowered, dtype))?;
        let mut arena = Arena::new(memory);
        let mut loaded = Self { slices: BTreeMap::new(), frequencies: Vec::new() };
        let mut transfers = Vec::new();
        for packed in all(lowered) {
            let whole = arena.take(WHAT, packed.bytes(lowered, dtype))?;
            let mut end = 0;
            let mut next = |bytes: usize| {
                end += bytes;
                whole.slice(end - bytes..end)
            };
            match &packed {
                Packed::Matrices(ids) => {
                    for id in ids {
                        let (name, rows, cols) = matrix(lowered, *id)?;
                        let to = next(rows * cols * dtype.size());
                        let from = match source.origin(name, rows, cols)? {
                            Origin::Held(data) => Elements::Held(data),
                            Origin::Stored(stored) => Elements::Stored(stored),
                            Origin::Drawn(draws) => {
                                fill::cuda::fill(on, &normal(&draws), 0, dtype, &to)?;
                                continue;
                            }
                        };
                        transfers.push(Transfer { name, from, dtype, to });
                    }
                }
                Packed::Vectors(ids) => {
                    for id in ids {
                        let (name, len) = vector(lowered, *id)?;
                        let from = Elements::Vector(source.vector(name, len)?);
                        let to = next(len * Dtype::F32.size());
                        transfers.push(Transfer { name, from, dtype: Dtype::F32, to });
                    }
                }
                Packed::Absorbed { .. } => {}
            }
            loaded.slices.insert(packed, whole);
        }
        for rope in &lowered.ropes {
            let frequencies = rope.inv_freq();
            let to = arena.take(WHAT, size_of_val(frequencies.as_slice()))?;
            loaded.frequencies.push(to.clone());
            let from = Elements::Vector(Cow::Owned(frequencies));
            transfers.push(Transfer { name: "inv_freq", from, dtype: Dtype::F32, to });
        }
        send::send(context, on.stream, &transfers, threads, report)?;
        loaded.absorb(on, dtype)?;
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

/// Name, rows and columns of a matrix.
fn matrix(lowered: &Lowered, id: WeightId) -> Result<(&str, usize, usize), WeightError> {
    match lowered.weights[id.0].as_ref().map(|held| (&held.name, &held.region)) {
        Some((name, Region::Matrix { of, .. })) => Ok((name, of.0, of.1)),
        held => Err(misused(held)),
    }
}

/// Name and length of a vector.
fn vector(lowered: &Lowered, id: WeightId) -> Result<(&str, usize), WeightError> {
    match lowered.weights[id.0].as_ref().map(|held| (&held.name, &held.region)) {
        Some((name, Region::Vector { of, .. })) => Ok((name, *of)),
        held => Err(misused(held)),
    }
}

fn misused(held: Option<(&String, &Region)>) -> WeightError {
    WeightError::Kind { name: held.map_or_else(String::new, |(name, _)| name.clone()) }
}

/// Draws as a kernel takes them.
fn normal(draws: &Draws) -> Normal {
    Normal {
        key: draws.generator.key(),
        mean: draws.mean,
        std: draws.std,
        stored: match draws.float {
            Float::F32 => fill::Stored::F32,
            Float::Bf16 => fill::Stored::Bf16,
            Float::F16 => fill::Stored::F16,
        },
    }
}
