//! A model's folder, read as far as its configuration: what it is and what it will need.
//!
//! No weights are read here. Invariant: what this accepts, a worker can load; what it refuses, it
//! refuses before anything is allocated.

use anyhow::{Context, Result};
use model::config::{Dtype as Declared, ModelConfig};
use model::families;
use model::lower::{Lowered, lower};
use model::mesh::{Mesh, Rank};
use model::program::Program;
use std::path::{Path, PathBuf};
use step::Seat;
use weights::Dtype;
use weights::random::TensorSpec;

/// A parsed configuration with its program, lowered for one rank of a mesh.
pub(crate) struct ModelDir {
    /// The folder.
    pub(crate) path: PathBuf,
    /// The configuration.
    pub(crate) config: ModelConfig,
    /// Its program.
    pub(crate) program: Program,
    /// The program for a single rank, or the rank asked for.
    pub(crate) lowered: Lowered,
}

impl ModelDir {
    /// Reads `config.json` of a folder, or the file itself.
    ///
    /// # Errors
    /// When it cannot be read or describes a model that is not supported.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let file = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
        let text = std::fs::read_to_string(&file)
            .with_context(|| format!("read {}; give the folder of a checkpoint", file.display()))?;
        let parsed = model::config::parse(&text).with_context(|| {
            format!("{} describes a model this build cannot run", file.display())
        })?;
        for warning in &parsed.warnings {
            tracing::warn!("{}: {warning}", file.display());
        }
        let program = families::program(&parsed.config, false);
        let lowered = lower(&program, Mesh::SINGLE, Rank(0), 1).context("lower the model")?;
        let folder = file.parent().unwrap_or(Path::new(".")).to_owned();
        Ok(Self { path: folder, config: parsed.config, program, lowered })
    }

    /// The same for a rank of a mesh.
    ///
    /// # Errors
    /// When the mesh does not divide the model; says what would.
    pub(crate) fn of_rank(self, seat: Seat) -> Result<Self> {
        if seat == Seat::SINGLE {
            return Ok(self);
        }
        let step::Mesh { dp, tp, expert_parallel } = seat.mesh;
        let mesh = Mesh { dp: dp as usize, tp: tp as usize, expert_parallel };
        let program = families::program(&self.config, expert_parallel);
        let lowered = lower(&program, mesh, Rank(seat.rank.index()), 1).with_context(|| {
            format!("--tensor-parallel-size {tp}, --data-parallel-size {dp}: divide the model")
        })?;
        Ok(Self { program, lowered, ..self })
    }

    /// Element type of the matrices: what is asked for, or what the configuration declares.
    pub(crate) fn matrix_dtype(&self, asked: Option<Dtype>) -> Dtype {
        asked.unwrap_or(match self.config.decoder().dtype {
            Some(Declared::F32) => Dtype::F32,
            Some(Declared::F16) => Dtype::F16,
            Some(Declared::Bf16) | None => Dtype::BF16,
        })
    }

    /// Every tensor the model reads, for random weights: matrices in `dtype`, vectors too, but for
    /// correction biases, which published checkpoints keep in float32.
    pub(crate) fn random_specs(&self, dtype: Dtype) -> Vec<TensorSpec> {
        self.lowered
            .tensors()
            .map(|(name, shape)| TensorSpec {
                name: name.to_owned(),
                shape,
                dtype: if name.ends_with("e_score_correction_bias") { Dtype::F32 } else { dtype },
            })
            .collect()
    }

    /// Bytes of the weights with matrices of `element` bytes.
    pub(crate) fn weight_bytes(&self, element: usize) -> u64 {
        model::memory::weight_bytes(&self.lowered, |_| element).0
    }

    /// Bytes of KV of one token, windows not counted in favour, at `element` bytes.
    pub(crate) fn kv_token_bytes(&self, element: usize) -> u64 {
        let block = model::memory::sequence_bytes(&self.lowered, ids::Blocks(1), element).0;
        block.div_ceil(ids::BLOCK_TOKENS.into())
    }

    /// Bytes of KV that a context of `tokens` needs, in whole blocks.
    pub(crate) fn kv_bytes(&self, tokens: u32, element: usize) -> u64 {
        let blocks = ids::Tokens(tokens).blocks_ceil();
        model::memory::sequence_bytes(&self.lowered, blocks, element).0
    }

    /// Bytes of activations and scratch of a step of `tokens` on `threads`.
    pub(crate) fn step_bytes(&self, tokens: u32, threads: usize) -> u64 {
        engine::step_bytes(&self.lowered, tokens as usize, threads).0
    }

    /// Bytes that weights and steps take on a CUDA device: steps of `tokens` of `slots` requests on
    /// contexts of `context`, elements of `element` bytes.
    pub(crate) fn cuda_bytes(
        &self,
        element: usize,
        (tokens, slots, context): (u32, u32, u32),
        multiprocessors: usize,
    ) -> engine::CudaBytes {
        let dtype = if element == 4 { engine::KvDtype::F32 } else { engine::KvDtype::Bf16 };
        let limits = (tokens as usize, slots as usize, context as usize);
        engine::cuda_bytes(&self.lowered, dtype, limits, multiprocessors)
    }

    /// Bytes of what penalties count, if `slots` requests use them on contexts of `tokens`.
    pub(crate) fn penalty_bytes(&self, slots: u32, tokens: u32) -> u64 {
        let vocab = u32::try_from(self.program.vocab).unwrap_or(u32::MAX);
        engine::penalty_bytes(slots, ids::Tokens(tokens), vocab).0
    }
}
