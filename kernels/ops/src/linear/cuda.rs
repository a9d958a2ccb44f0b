//! Launches of products `out = x W^T + b`: which kernel, and its operands.
//!
//! [`Variant::Few`] streams the weights once for up to 16 rows; [`Variant::Many`] tiles both; both want
//! bf16, inputs in multiples of 8, and rows that begin on 16 bytes. For one product [`Variant::Stream`]
//! is faster for up to eight rows, [`Variant::Wide`] for some tens, where outputs are a multiple of 8, and
//! [`Variant::Library`], where it is there, for more.
//! [`Variant::Any`] takes everything, slowly. Merged projections are one matrix: parts are laid side by side
//! when weights are loaded. A row's result depends on the variant and the row alone.

mod library;
pub(crate) mod stream;
#[cfg(test)]
mod tests;
pub(crate) mod wide;

use crate::cuda::{Dtype, Gpu, Queue, Rows, Tensor, bytes, dim, need, shape};
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters};
pub use library::Library;
pub(crate) use library::Opening;
pub use stream::takes as streams;
pub use wide::Tile;

/// Kernels that may have more shared memory than the default.
pub(crate) const MANY: &[&str] =
    &["linear_many_64_bf16", "linear_many_128_bf16", "linear_many_64_f32", "linear_many_128_f32"];

/// Rows up to which weights are streamed once.
pub const FEW_ROWS: usize = 16;
/// Elements of 16 bytes.
const WIDE: usize = 8;
/// Outputs of a tile of [`Variant::Many`].
const MANY_OUTPUTS: usize = 128;
/// Rows and outputs of a tile of [`Variant::Any`].
const ANY_TILE: usize = 32;
/// Stages of shared memory of [`Variant::Many`], and bytes of a row of one.
const STAGES: usize = 3;
const STAGE_ROW: usize = 128;

/// How a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Any shape, f32 or bf16, ordinary arithmetic.
    Any,
    /// Weights streamed through registers to the tensor cores.
    Few {
        /// Rows of a tile: 8 or 16.
        rows: usize,
        /// Outputs of a block: 8, 16 or 32.
        outputs: usize,
    },
    /// Tiles in shared memory, tensor cores.
    Many {
        /// Rows of a tile: 64 or 128.
        rows: usize,
    },
    /// Weights by the copy engine, warpgroups.
    Wide(Tile),
    /// Rows of weights by the copy engine, for up to eight rows.
    Stream,
    /// The vendor's library.
    Library,
}

/// What becomes of a product's results; other than the first only [`Variant::Stream`] has it, and the last
/// one [`Variant::Wide`] for some rows, as [`gates`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Stored.
    Store,
    /// Added to what is there.
    Add,
    /// `w` is `[2, outputs, inputs]`, and `silu(first) * second` is stored.
    Gate,
}

/// A norm of a product's rows in front of it; only [`Variant::Stream`] has it.
#[derive(Clone, Copy, Debug)]
pub struct Normed<'a> {
    /// f32 `[inputs]`.
    pub weight: &'a DeviceSlice,
    /// Of the norm.
    pub eps: f32,
    /// `[rows, inputs]` of the type of `x`, dense: rows as they are multiplied.
    pub out: &'a DeviceSlice,
}

impl Variant {
    /// Rows that one block computes; tiles of grouped products have at most so many.
    #[must_use]
    pub const fn tile_rows(self) -> usize {
        match self {
            Self::Any | Self::Library => ANY_TILE,
            Self::Stream => stream::MOST_ROWS,
            Self::Few { rows, .. } | Self::Many { rows } | Self::Wide(Tile { rows, .. }) => rows,
        }
    }

    const fn outputs(self) -> usize {
        match self {
            Self::Any | Self::Library => ANY_TILE,
            Self::Stream => stream::MOST_ROWS,
            Self::Few { outputs, .. } => outputs,
            Self::Many { .. } => MANY_OUTPUTS,
            Self::Wide(Tile { outputs, .. }) => outputs,
        }
    }

    fn kernel(self, input: Dtype, output: Dtype) -> Option<&'static str> {
        Some(match (self, input, output) {
            (Self::Any, Dtype::F32, Dtype::F32) => "linear_any_f32_f32",
            (Self::Any, Dtype::Bf16, Dtype::F32) => "linear_any_bf16_f32",
            (Self::Any, Dtype::Bf16, Dtype::Bf16) => "linear_any_bf16_bf16",
            (_, Dtype::F32, _) => return None,
            (Self::Few { rows, outputs }, Dtype::Bf16, _) => match (rows, outputs) {
                (8, 8) => output.pick("linear_few_8x8_f32", "linear_few_8x8_bf16"),
                (8, 16) => output.pick("linear_few_8x16_f32", "linear_few_8x16_bf16"),
                (16, 8) => output.pick("linear_few_16x8_f32", "linear_few_16x8_bf16"),
                (16, 16) => output.pick("linear_few_16x16_f32", "linear_few_16x16_bf16"),
                (16, 32) => output.pick("linear_few_16x32_f32", "linear_few_16x32_bf16"),
                _ => return None,
            },
            (Self::Many { rows: 64 }, Dtype::Bf16, _) => {
                output.pick("linear_many_64_f32", "linear_many_64_bf16")
            }
            (Self::Many { rows: 128 }, Dtype::Bf16, _) => {
                output.pick("linear_many_128_f32", "linear_many_128_bf16")
            }
            (Self::Many { .. } | Self::Wide(_) | Self::Stream | Self::Library, Dtype::Bf16, _) => {
                return None;
            }
        })
    }
}

/// The variant for products of `rows` rows (per expert, where grouped) whose operands are aligned.
/// Blocks of few outputs keep all multiprocessors busy where there are few of them.
#[must_use]
pub const fn select(
    aligned: bool,
    rows: usize,
    outputs: usize,
    batch: usize,
    multiprocessors: usize,
) -> Variant {
    if !aligned {
        return Variant::Any;
    }
    let enough = 2 * multiprocessors;
    match rows {
        0..=8 if outputs * batch / 16 >= enough => Variant::Few { rows: 8, outputs: 16 },
        0..=8 => Variant::Few { rows: 8, outputs: 8 },
        9..=FEW_ROWS if outputs * batch / 32 >= enough => Variant::Few { rows: 16, outputs: 32 },
        9..=FEW_ROWS if outputs * batch / 16 >= enough => Variant::Few { rows: 16, outputs: 16 },
        9..=FEW_ROWS => Variant::Few { rows: 16, outputs: 8 },
        17..=64 => Variant::Many { rows: 64 },
        _ => Variant::Many { rows: 128 },
    }
}

/// Operands of a product, `batch` times side by side (attention projects head by head so).
#[derive(Clone, Copy, Debug)]
pub struct Linear<'a> {
    /// Rows of `inputs` elements, `x_stride` apart.
    pub x: Tensor<'a>,
    /// From row to row of `x`, in elements.
    pub x_stride: usize,
    /// `[outputs, inputs]` for each product, of the type of `x`.
    pub w: &'a DeviceSlice,
    /// From one product's `w` to the next one's, in elements.
    pub w_batch: usize,
    /// f32 `[outputs]`; none where `batch` is not 1.
    pub bias: Option<&'a DeviceSlice>,
    /// Rows of `outputs` elements, `out_stride` apart; of the type of `x`, or f32.
    pub out: Tensor<'a>,
    /// From row to row of `out`, in elements.
    pub out_stride: usize,
    /// Width of a row of `x`.
    pub inputs: usize,
    /// Width of a row of `out`.
    pub outputs: usize,
    /// Products.
    pub batch: usize,
    /// From one product's `x` to the next one's, in elements.
    pub x_batch: usize,
    /// From one product's `out` to the next one's, in elements.
    pub out_batch: usize,
    /// What becomes of results.
    pub then: Then,
    /// What happens to `x` before.
    pub norm: Option<Normed<'a>>,
}

impl<'a> Linear<'a> {
    /// One product over whole rows.
    #[must_use]
    pub const fn plain(
        x: Tensor<'a>,
        w: &'a DeviceSlice,
        out: Tensor<'a>,
        inputs: usize,
        outputs: usize,
    ) -> Self {
        Self {
            x,
            x_stride: inputs,
            w,
            w_batch: 0,
            bias: None,
            out,
            out_stride: outputs,
            inputs,
            outputs,
            batch: 1,
            x_batch: 0,
            out_batch: 0,
            then: Then::Store,
            norm: None,
        }
    }

    /// Whether the fast kernels take the operands.
    #[must_use]
    pub fn is_aligned(&self) -> bool {
        self.x.dtype == Dtype::Bf16
            && [self.inputs, self.x_stride, self.x_batch, self.w_batch]
                .iter()
                .all(|n| n.is_multiple_of(WIDE))
            && [self.x.address(), self.w.address()].iter().all(|at| at.is_multiple_of(16))
    }
}

/// Mirrors `LinearParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    x: u64,
    w: u64,
    bias: u64,
    out: u64,
    count: u64,
    tiles: u64,
    gather: u64,
    x_stride: u64,
    out_stride: u64,
    x_batch: u64,
    w_batch: u64,
    out_batch: u64,
    rows: u32,
    n: u32,
    k: u32,
    gather_by: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `linear_as` and `grouped`.
unsafe impl Parameters for Params {}

/// The product on the variant that [`select`] names, or a faster one where it can be.
///
/// # Errors
/// When an operand is too short, or the launch fails.
pub fn linear(on: Queue<'_>, rows: Rows<'_>, operands: &Linear<'_>) -> Result<(), CudaError> {
    let Linear { inputs, outputs, batch, .. } = *operands;
    if let Some(plan) = library::plan(on, rows, operands)? {
        check(rows, operands)?;
        return library::launch(Some(plan), on, rows, operands);
    }
    let variant = if stream::takes(rows.padded, operands) {
        Variant::Stream
    } else if rows.padded > stream::MOST_ROWS && wide::takes(operands) {
        Variant::Wide(Tile::select(rows.padded, outputs, inputs))
    } else {
        select(operands.is_aligned(), rows.padded, outputs, batch, on.multiprocessors())
    };
    linear_as(variant, on, rows, operands)
}

/// Which kernels products of bf16 run on, for the operator.
#[must_use]
pub fn statement(gpu: &Gpu) -> String {
    let few = stream::MOST_ROWS;
    let products = match gpu.cublaslt() {
        Ok(library) => {
            let ((major, minor), rows) = (library.version(), library::ROWS);
            let planned = library.planned();
            format!(
                "products of up to {few} rows stream their weights, of up to {rows} run on wide tiles, of \
                 more on cuBLASLt {major}.{minor} ({planned} shapes planned)"
            )
        }
        Err(error) => format!(
            "products of up to {few} rows stream their weights, of more run on wide tiles: {error}, with \
             which many rows are faster (the CUDA toolkit and the wheel nvidia-cublas hold it; its folder \
             belongs to the loader's path)"
        ),
    };
    if crate::cuda::JITTER {
        format!("{products}; kernels sleep at random, for tests")
    } else {
        products
    }
}

/// The variant that computes a product and the activation of its results in one launch, if one does and is
/// faster than both apart.
#[must_use]
pub fn gates(rows: usize, operands: &Linear<'_>) -> Option<Variant> {
    if rows <= stream::MOST_ROWS {
        return stream::takes(rows, operands).then_some(Variant::Stream);
    }
    wide::gates(rows, operands).map(Variant::Wide)
}

/// Whether operands hold what they say.
fn check(rows: Rows<'_>, operands: &Linear<'_>) -> Result<(), CudaError> {
    const OP: &str = "linear";
    let Linear { x, x_stride, w, bias, out, out_stride, inputs, outputs, .. } = *operands;
    let Linear { batch, x_batch, w_batch, out_batch, then, .. } = *operands;
    if rows.padded == 0 || batch == 0 || outputs == 0 {
        return Ok(());
    }
    let last = |stride: usize, step: usize, width: usize| -> Result<usize, CudaError> {
        let rows = bytes(OP, &[rows.padded - 1, stride])?;
        let batches = bytes(OP, &[batch - 1, step])?;
        rows.checked_add(batches)
            .and_then(|at| at.checked_add(width))
            .ok_or_else(|| shape(OP, format!("{operands:?}")))
    };
    x.need(OP, "x", &[last(x_stride, x_batch, inputs)?])?;
    out.need(OP, "out", &[last(out_stride, out_batch, outputs)?])?;
    let weights = bytes(OP, &[batch - 1, w_batch])?.checked_add(bytes(OP, &[outputs, inputs])?);
    let weights = weights.ok_or_else(|| shape(OP, format!("{operands:?}")))?;
    let parts = if then == Then::Gate { 2 } else { 1 };
    need(OP, "w", w, &[parts, weights], x.dtype.size())?;
    if let Some(bias) = bias {
        need(OP, "bias", bias, &[outputs], 4)?;
    }
    if let Some(Normed { weight, out, .. }) = operands.norm {
        need(OP, "weight of the norm", weight, &[inputs], 4)?;
        need(OP, "normed rows", out, &[rows.padded, inputs], x.dtype.size())?;
    }
    Ok(())
}

/// As [`linear`], on a given variant.
///
/// # Errors
/// As [`linear`], or when the variant does not take the operands.
pub fn linear_as(
    variant: Variant,
    on: Queue<'_>,
    rows: Rows<'_>,
    operands: &Linear<'_>,
) -> Result<(), CudaError> {
    const OP: &str = "linear";
    let Linear { x, x_stride, w, bias, out, out_stride, inputs, outputs, .. } = *operands;
    let Linear { batch, x_batch, w_batch, out_batch, then, .. } = *operands;
    if rows.padded == 0 || batch == 0 || outputs == 0 {
        return Ok(());
    }
    check(rows, operands)?;
    if variant != Variant::Any && !operands.is_aligned() {
        return Err(shape(
            OP,
            format!("{inputs} unaligned inputs of {:?} as {variant:?}", x.dtype),
        ));
    }
    if variant == Variant::Stream {
        return stream::launch(on, rows, operands);
    }
    if let Variant::Wide(tile) = variant
        && operands.norm.is_none()
    {
        return wide::launch(tile, on, rows, operands);
    }
    if then != Then::Store || operands.norm.is_some() {
        return Err(shape(OP, format!("{operands:?} as {variant:?}")));
    }
    if variant == Variant::Library {
        return library::launch(None, on, rows, operands);
    }
    let params = Params {
        x: x.address(),
        w: w.address(),
        bias: bias.map_or(0, DeviceSlice::address),
        out: out.address(),
        count: rows.count_address(),
        tiles: 0,
        gather: 0,
        x_stride: x_stride as u64,
        out_stride: out_stride as u64,
        x_batch: x_batch as u64,
        w_batch: w_batch as u64,
        out_batch: out_batch as u64,
        rows: dim(OP, rows.padded)?,
        n: dim(OP, outputs)?,
        k: dim(OP, inputs)?,
        gather_by: 1,
    };
    let tiles = rows.padded.div_ceil(variant.tile_rows());
    launch(OP, variant, on, (x.dtype, out.dtype), &params, tiles, batch)
}

/// Rows of a grouped product: tiles of sorted pairs that share an expert.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grouped<'a> {
    /// `RowTile` each.
    pub(crate) tiles: &'a DeviceSlice,
    /// Tiles there can be.
    pub(crate) max_tiles: usize,
    /// How many there are, on the device.
    pub(crate) tile_count: &'a DeviceSlice,
    /// Sorted pair to pair, and how many pairs share a row of `x`; none where rows are sorted pairs.
    pub(crate) gather: Option<(&'a DeviceSlice, usize)>,
}

/// `out[pair] = w[expert] x[row of pair]` for the pairs of every tile.
#[allow(clippy::too_many_arguments, reason = "the operands of a product")]
pub(crate) fn grouped(
    variant: Variant,
    on: Queue<'_>,
    rows: &Grouped<'_>,
    x: Tensor<'_>,
    w: &DeviceSlice,
    out: Tensor<'_>,
    inputs: usize,
    outputs: usize,
) -> Result<(), CudaError> {
    const OP: &str = "experts";
    let params = Params {
        x: x.address(),
        w: w.address(),
        bias: 0,
        out: out.address(),
        count: rows.tile_count.address(),
        tiles: rows.tiles.address(),
        gather: rows.gather.map_or(0, |(pairs, _)| pairs.address()),
        x_stride: inputs as u64,
        out_stride: outputs as u64,
        x_batch: 0,
        w_batch: bytes(OP, &[outputs, inputs])? as u64,
        out_batch: 0,
        rows: 0,
        n: dim(OP, outputs)?,
        k: dim(OP, inputs)?,
        gather_by: dim(OP, rows.gather.map_or(1, |(_, by)| by))?,
    };
    launch(OP, variant, on, (x.dtype, out.dtype), &params, rows.max_tiles, 1)
}

fn launch(
    op: &'static str,
    variant: Variant,
    on: Queue<'_>,
    (input, output): (Dtype, Dtype),
    params: &Params,
    tiles: usize,
    batch: usize,
) -> Result<(), CudaError> {
    let name = variant
        .kernel(input, output)
        .ok_or_else(|| shape(op, format!("{input:?} to {output:?} as {variant:?}")))?;
    let grid = [params.n.div_ceil(variant.outputs() as u32), dim(op, tiles)?, dim(op, batch)?];
    let shared = match variant {
        Variant::Many { rows } => STAGES * (rows + MANY_OUTPUTS) * STAGE_ROW,
        _ => 0,
    };
    Launch::new(on.kernel(name)?, grid, 256).shared(shared as u32).on(on.stream, params)
}
