//! From a checkpoint to [`Weights`]: which tensors can be used as they lie, and how the others are
//! made.
//!
//! It asks for the tensors it is told to and knows no model. Invariant: nothing is converted before
//! every tensor asked for is known to be there, in the right shape and of a type that can be used.

use crate::checkpoint::{Checkpoint, TensorView};
use crate::error::CheckpointError;
use crate::fp8::Quantised;
use crate::parallel;
use crate::part::Part;
use crate::progress::{Progress, Stage, Tally};
use crate::set::{Data, Entry, Float, Weights};
use crate::slice::{self, Buffer, Element};
use core::ops::Range;
use half::{bf16, f16};
use safetensors::Dtype;
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::hint::black_box;

/// Bytes that one job reads ahead.
const READ_CHUNK: usize = 4 << 20;
/// Elements that one job converts.
const CONVERT_CHUNK: usize = 1 << 20;
/// One touch per page brings it in; pages are never smaller.
const PAGE: usize = 4096;
/// What the name of a quantised weight's scales adds to the weight's.
const SCALE_SUFFIX: &str = "_scale_inv";
/// What a weight may be stored as.
const READABLE: &str = "F32, BF16, F16 or F8_E4M3 with block scales";

/// How a checkpoint becomes weights.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Type that matrices are brought to (`--dtype`). None keeps what is stored, which needs no
    /// memory, and makes BF16 of FP8. Vectors (norms, biases) keep their type always: they are small
    /// and their precision shows.
    pub matrices: Option<Float>,
    /// Rows and columns per FP8 scale (`quantization_config.weight_block_size`).
    pub fp8_block: Option<(usize, usize)>,
    /// Whether mapped weights are read into the page cache now, with progress, rather than at first
    /// use.
    pub read_ahead: bool,
    /// Threads that convert and read.
    pub threads: usize,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            matrices: None,
            fp8_block: None,
            read_ahead: true,
            threads: parallel::available_threads(),
        }
    }
}

impl Weights {
    /// Takes the tensors named, each held to its shape, out of a checkpoint.
    ///
    /// # Errors
    /// The first tensor that is absent, of another shape, of a type that cannot be used, or that
    /// holds FP8 codes or scales that are no numbers.
    ///
    /// # Panics
    /// On an FP8 block of no rows or columns, which reading `config.json` refuses.
    pub fn load<'a>(
        checkpoint: &Checkpoint,
        wanted: impl IntoIterator<Item = (&'a str, &'a [usize])>,
        options: &LoadOptions,
        progress: &dyn Progress,
    ) -> Result<Self, CheckpointError> {
        let parts: Vec<_> =
            wanted.into_iter().map(|(name, shape)| Part::whole(name, shape)).collect();
        Self::load_parts(checkpoint, &parts, options, progress)
    }

    /// Takes parts of the tensors named, each held to its whole shape. Rows are used as they lie; columns
    /// are copied together. Nothing else is read.
    ///
    /// # Errors
    /// As [`Weights::load`]; what is no number elsewhere is not looked for.
    ///
    /// # Panics
    /// As [`Weights::load`].
    pub fn load_parts(
        checkpoint: &Checkpoint,
        parts: &[Part],
        options: &LoadOptions,
        progress: &dyn Progress,
    ) -> Result<Self, CheckpointError> {
        let mut used = BTreeSet::new();
        let mut views = Vec::new();
        for part in parts {
            let view = checkpoint.tensor(&part.name)?.expect_shape(&part.shape)?;
            used.insert(view.name);
            let plan = Plan::of(checkpoint, view, part, options)?;
            if let Plan::Dequantise { scales, .. } = &plan {
                used.insert(scales.name);
            }
            views.push((view, part, plan));
        }
        let made_bytes = views
            .iter()
            .filter(|(_, _, plan)| !matches!(plan, Plan::Map { .. }))
            .map(|(view, part, _)| part_bytes(view, part))
            .sum();
        let tally = (made_bytes > 0).then(|| Tally::new(progress, Stage::Convert, made_bytes));
        let mut entries = BTreeMap::new();
        for (view, part, plan) in views {
            let data = match plan {
                Plan::Map { float, elements } => {
                    let (file, bytes) = checkpoint.mapped(&view);
                    let at = |element| bytes.start + element * float.bytes();
                    Data::Mapped { file, bytes: at(elements.start)..at(elements.end), float }
                }
                _ => {
                    let made = plan.make(&view, part, options)?;
                    if let Some(tally) = &tally {
                        tally.add(part_bytes(&view, part));
                    }
                    Data::Made(made)
                }
            };
            entries.insert(view.name.to_owned(), Entry { shape: part.kept(), data });
        }
        let unused = checkpoint
            .tensors()
            .filter(|view| !used.contains(view.name))
            .map(|view| view.name.to_owned())
            .collect();
        let weights = Self { entries, unused };
        if options.read_ahead {
            weights.read_ahead(options.threads, progress);
        }
        Ok(weights)
    }

    fn read_ahead(&self, threads: usize, progress: &dyn Progress) {
        let mapped: Vec<&[u8]> = self.entries.values().filter_map(|e| e.data.mapped()).collect();
        let total: u64 = mapped.iter().map(|bytes| bytes.len() as u64).sum();
        if total == 0 {
            return;
        }
        let tally = Tally::new(progress, Stage::Read, total);
        let chunks = mapped.into_iter().flat_map(|bytes| bytes.chunks(READ_CHUNK));
        let Ok(()) = parallel::for_each(threads, chunks, |chunk: &[u8]| {
            black_box(chunk.iter().step_by(PAGE).fold(0u8, |sum, &byte| sum ^ byte));
            tally.add(chunk.len() as u64);
            Ok::<(), Infallible>(())
        });
    }
}

/// What has to be done to a stored tensor before it can be computed with.
enum Plan<'a> {
    /// Nothing: these elements are used.
    Map { float: Float, elements: Range<usize> },
    /// Its elements brought to another type, or copied to where they are aligned.
    Convert(Float),
    /// Numbers made of its codes.
    Dequantise { to: Float, scales: TensorView<'a>, block: (usize, usize) },
}

impl<'a> Plan<'a> {
    fn of(
        checkpoint: &'a Checkpoint,
        view: TensorView<'a>,
        part: &Part,
        options: &LoadOptions,
    ) -> Result<Self, CheckpointError> {
        if view.dtype == Dtype::F8_E4M3 {
            return Self::dequantise(checkpoint, view, options);
        }
        let stored = Float::of(view.dtype).ok_or_else(|| view.wrong_dtype(READABLE))?;
        let to = options.matrices.filter(|_| view.shape.len() > 1).unwrap_or(stored);
        let usable = to == stored && view.slice().is_some();
        Ok(match part.stretch().filter(|_| usable) {
            Some(elements) => Self::Map { float: stored, elements },
            None => Self::Convert(to),
        })
    }

    fn dequantise(
        checkpoint: &'a Checkpoint,
        view: TensorView<'a>,
        options: &LoadOptions,
    ) -> Result<Self, CheckpointError> {
        let (&[rows, cols], Some(block)) = (view.shape, options.fp8_block) else {
            return Err(CheckpointError::NoBlockSize {
                file: view.file.to_owned(),
                tensor: view.name.to_owned(),
            });
        };
        assert!(block.0 > 0 && block.1 > 0, "a block of no rows or columns");
        let scales = checkpoint
            .tensor(&format!("{}{SCALE_SUFFIX}", view.name))?
            .expect_shape(&[rows.div_ceil(block.0), cols.div_ceil(block.1)])?;
        Float::of(scales.dtype).ok_or_else(|| scales.wrong_dtype("F32, BF16 or F16"))?;
        Ok(Self::Dequantise { to: options.matrices.unwrap_or(Float::Bf16), scales, block })
    }

    fn make(
        &self,
        view: &TensorView<'_>,
        part: &Part,
        options: &LoadOptions,
    ) -> Result<Buffer, CheckpointError> {
        let (&Self::Map { float: to, .. } | &Self::Convert(to) | &Self::Dequantise { to, .. }) =
            self;
        Ok(match to {
            Float::F32 => Buffer::F32(self.make_as(view, part, options)?),
            Float::Bf16 => Buffer::Bf16(self.make_as(view, part, options)?),
            Float::F16 => Buffer::F16(self.make_as(view, part, options)?),
        })
    }

    fn make_as<T: Element>(
        &self,
        view: &TensorView<'_>,
        part: &Part,
        options: &LoadOptions,
    ) -> Result<Vec<T>, CheckpointError> {
        let Self::Dequantise { scales, block, .. } = self else {
            return Ok(convert(view, part, options.threads));
        };
        let scale_values = scales.to_f32()?;
        if let Some(i) = scale_values.iter().position(|scale| !scale.is_finite()) {
            return Err(scales.no_number(i));
        }
        let (width, cols, first) = (part.width(), part.cols(), part.rows().start);
        let codes =
            Quantised { codes: view.bytes, cols: width, scales: &scale_values, block: *block };
        let mut out = slice::zeros(part.elements());
        if !out.is_empty() {
            let rows_each = (CONVERT_CHUNK / cols.len()).max(1);
            let jobs = out.chunks_mut(rows_each * cols.len()).enumerate();
            parallel::for_each(options.threads, jobs, |(job, out)| {
                codes
                    .dequantise(first + job * rows_each, cols.clone(), out)
                    .map_err(|(row, col)| view.no_number(row * width + col))
            })?;
        }
        Ok(out)
    }
}

/// Bytes of the file that a part is made of, scales apart.
fn part_bytes(view: &TensorView<'_>, part: &Part) -> u64 {
    (part.elements() * (view.dtype.bitsize() / 8)) as u64
}

/// Elements of a stored tensor in another type, rounded to nearest, ties to even.
fn convert<T: Element>(view: &TensorView<'_>, part: &Part, threads: usize) -> Vec<T> {
    fn widen<S: Element, T: Element>(bytes: &[u8], part: &Part, threads: usize) -> Vec<T> {
        let mut out = slice::zeros(part.elements());
        let jobs = part.pieces(CONVERT_CHUNK, &mut out).into_iter();
        let Ok(()) = parallel::for_each(threads, jobs, |(first, out): (usize, &mut [T])| {
            let bytes = &bytes[first * size_of::<S>()..][..out.len() * size_of::<S>()];
            for (x, value) in out.iter_mut().zip(slice::numbers::<S>(bytes)) {
                *x = T::round(value.widen());
            }
            Ok::<(), Infallible>(())
        });
        out
    }
    match view.dtype {
        Dtype::F32 => widen::<f32, T>(view.bytes, part, threads),
        Dtype::BF16 => widen::<bf16, T>(view.bytes, part, threads),
        _ => widen::<f16, T>(view.bytes, part, threads),
    }
}
