//! `tokenmill model`: explain, random, fetch.

use crate::cli::{Dtype, ModelCommand, RandomProfile};
use crate::model_dir::ModelDir;
use crate::out::{say, say_part};
use anyhow::{Context, Result};
use model::explain::{Storage, explain};
use model::lower::lower;
use model::mesh::{Mesh, Rank};
use std::path::{Path, PathBuf};
use weights::hub::{Origin, Request, Token, default_cache_dir};
use weights::random::{Profile, RandomModel};
use weights::{WriteOptions, write_random};

/// Runs one of the commands.
pub(crate) fn run(command: ModelCommand) -> Result<()> {
    match command {
        ModelCommand::Explain { model, tp, dp, ep, bucket } => {
            let dir = ModelDir::read(&model)?;
            let mesh = Mesh { dp: dp as usize, tp: tp as usize, expert_parallel: ep };
            let program = model::families::program(&dir.config, ep);
            let lowered = lower(&program, mesh, Rank(0), bucket as usize)?;
            let element = if dir.matrix_dtype(None) == weights::Dtype::F32 { 4 } else { 2 };
            let storage = Storage { weight: element, cache: element };
            say_part!("{}", explain(&lowered, storage, |op| engine::kernel(op, lowered.bucket)))?;
        }
        ModelCommand::Random { config, out, seed, dtype, profile } => {
            random(&config, &out, seed, dtype, profile)?;
        }
        ModelCommand::Fetch { repo, revision } => say!("{}", fetch(&repo, &revision)?.display())?,
    }
    Ok(())
}

fn random(
    config: &Path,
    out: &Path,
    seed: u64,
    dtype: Dtype,
    profile: RandomProfile,
) -> Result<()> {
    let dir = ModelDir::read(config)?;
    let file = if config.is_dir() { config.join("config.json") } else { config.to_owned() };
    let asked = match dtype {
        Dtype::Auto => None,
        Dtype::Float32 => Some(weights::Dtype::F32),
        Dtype::Bfloat16 => Some(weights::Dtype::BF16),
    };
    let model = RandomModel {
        seed,
        profile: match profile {
            RandomProfile::Realistic => Profile::Realistic,
            RandomProfile::Parity => Profile::Parity,
        },
        tied_embeddings: dir.config.decoder().tied,
    };
    let specs = dir.random_specs(dir.matrix_dtype(asked));
    let progress = weights::progress::on_stderr();
    let written = write_random(out, &file, &model, specs, &WriteOptions::default(), &*progress)?;
    say!("{} bytes in {} files in {}", written.data_bytes, written.files.len(), out.display())?;
    Ok(())
}

/// Makes sure that a hub model is on this machine; its folder.
pub(crate) fn fetch(repo: &str, revision: &str) -> Result<PathBuf> {
    let cache = default_cache_dir(|name| std::env::var_os(name))
        .context("no folder for downloads: set HF_HOME, XDG_CACHE_HOME or HOME")?;
    let mut request = Request::new(repo, cache);
    request.revision = revision.to_owned();
    if let Ok(endpoint) = std::env::var("HF_ENDPOINT") {
        request.endpoint = endpoint.trim_end_matches('/').to_owned();
    }
    // Set and empty is how shells unset it; an empty token would be sent and refused.
    let token = std::env::var("HF_TOKEN").ok().filter(|token| !token.trim().is_empty());
    request.token = token.map(|token| Token::new(&token));
    let progress = weights::progress::on_stderr();
    let snapshot = weights::hub::fetch(&request, &*progress)?;
    if snapshot.origin == Origin::CacheOnly {
        tracing::warn!(
            repo,
            commit = snapshot.commit,
            "the hub cannot be reached; using what was fetched before"
        );
    }
    Ok(snapshot.dir)
}
