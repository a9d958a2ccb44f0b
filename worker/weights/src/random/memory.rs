//! Random weights kept in memory (`--load-format random`): the values that a written checkpoint
//! would have, without the file.
//!
//! Invariant: nothing takes memory before every tensor is known to be one that can be made.

use super::{Fill, RandomError, RandomModel, TensorSpec};
use crate::parallel;
use crate::part::Part;
use crate::progress::{Progress, Stage, Tally};
use crate::set::{Data, Entry, Float, Weights};
use crate::slice::{self, Buffer, Element};
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::convert::Infallible;

/// Elements that one job makes: an expert's matrix of a few million is still a job for every core.
const CHUNK: usize = 1 << 17;

impl Weights {
    /// Makes random tensors in memory, with the values that [`crate::write_random`] would put into
    /// files.
    ///
    /// # Errors
    /// The first tensor that cannot be made.
    pub fn random(
        model: &RandomModel,
        specs: &[TensorSpec],
        threads: usize,
        progress: &dyn Progress,
    ) -> Result<Self, RandomError> {
        let parts: Vec<_> =
            specs.iter().map(|spec| (Part::whole(&spec.name, &spec.shape), spec.dtype)).collect();
        Self::random_parts(model, &parts, threads, progress)
    }

    /// Makes parts of random tensors: the bits that these elements have in the whole ones.
    ///
    /// # Errors
    /// The first tensor that cannot be made.
    pub fn random_parts(
        model: &RandomModel,
        parts: &[(Part, Dtype)],
        threads: usize,
        progress: &dyn Progress,
    ) -> Result<Self, RandomError> {
        let spec = |(part, dtype): &(Part, Dtype)| TensorSpec {
            name: part.name.clone(),
            shape: part.shape.clone(),
            dtype: *dtype,
        };
        let specs: Vec<TensorSpec> = parts.iter().map(spec).collect();
        let mut total = 0;
        for (spec, (part, _)) in specs.iter().zip(parts) {
            model.law(spec)?;
            spec.byte_len()?;
            total += (part.elements() * spec.float()?.bytes()) as u64;
        }
        let tally = Tally::new(progress, Stage::Generate, total);
        let mut entries = BTreeMap::new();
        for (spec, (part, _)) in specs.iter().zip(parts) {
            let fill = Fill::new(model, spec)?;
            let made = match spec.float()? {
                Float::F32 => Buffer::F32(make(&fill, part, threads, &tally)),
                Float::Bf16 => Buffer::Bf16(make(&fill, part, threads, &tally)),
                Float::F16 => Buffer::F16(make(&fill, part, threads, &tally)),
            };
            let entry = Entry { shape: part.kept(), data: Data::Made(made) };
            entries.insert(spec.name.clone(), entry);
        }
        Ok(Self { entries, unused: Vec::new() })
    }
}

fn make<T: Element>(fill: &Fill, part: &Part, threads: usize, tally: &Tally<'_>) -> Vec<T> {
    let mut out = slice::zeros(part.elements());
    if out.is_empty() {
        return out;
    }
    let jobs = part.pieces(CHUNK, &mut out).into_iter();
    let Ok(()) = parallel::for_each(threads, jobs, |(first, out): (usize, &mut [T])| {
        fill.fill(first, out);
        tally.add(size_of_val(out) as u64);
        Ok::<(), Infallible>(())
    });
    out
}
