//! Random weights kept in memory (`--load-format random`): the values that a written checkpoint
//! would have, without the file.
//!
//! Invariant: nothing takes memory before every tensor is known to be one that can be made.

use super::{Fill, RandomError, RandomModel, TensorSpec};
use crate::parallel;
use crate::progress::{Progress, Stage, Tally};
use crate::set::{Data, Entry, Float, Weights};
use crate::slice::{self, Buffer, Element};
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
        let mut total = 0;
        for spec in specs {
            model.law(spec)?;
            total += spec.byte_len()?;
        }
        let tally = Tally::new(progress, Stage::Generate, total);
        let mut entries = BTreeMap::new();
        for spec in specs {
            let fill = Fill::new(model, spec)?;
            let elements = spec.elements()?;
            let made = match spec.float()? {
                Float::F32 => Buffer::F32(make(&fill, elements, threads, &tally)),
                Float::Bf16 => Buffer::Bf16(make(&fill, elements, threads, &tally)),
                Float::F16 => Buffer::F16(make(&fill, elements, threads, &tally)),
            };
            let entry = Entry { shape: spec.shape.clone(), data: Data::Made(made) };
            entries.insert(spec.name.clone(), entry);
        }
        Ok(Self { entries, unused: Vec::new() })
    }
}

fn make<T: Element>(fill: &Fill, elements: usize, threads: usize, tally: &Tally<'_>) -> Vec<T> {
    let mut out = slice::zeros(elements);
    let jobs = out.chunks_mut(CHUNK).enumerate();
    let Ok(()) = parallel::for_each(threads, jobs, |(job, out): (usize, &mut [T])| {
        fill.fill(job * CHUNK, out);
        tally.add(size_of_val(out) as u64);
        Ok::<(), Infallible>(())
    });
    out
}
