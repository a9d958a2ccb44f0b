//! Everything `serve` decides before it starts anything.
//!
//! Flags first, then the recipe where one is served, then the model's own values. Invariant: what
//! is in here was checked; nothing later refuses a flag.

use super::device::{Chosen, choose};
use super::memory_plan::{Machine, MemoryPlan, Wanted, plan};
use super::source::{self, Source};
use super::worker_config::{
    DeviceConfig, EngineConfig, KvDtype, LoadFormat, ModelConfig, WorkerConfig,
};
use crate::cli::{Dtype, ServeArgs};
use crate::model_dir::ModelDir;
use anyhow::{Result, bail, ensure};
use ids::{HashKey, Rank, Tokens};
use recipe::Recipe;
use scheduler::Config;
use std::path::{Path, PathBuf};
use std::time::Duration;
use step::{Mesh, Seat};

/// Vocabulary of the fake engine.
const FAKE_VOCAB: u32 = 32_000;
/// The most worker processes of one server.
const MOST_RANKS: u32 = 256;
/// A decode budget where nobody sets one: no bound in practice.
const UNBOUNDED: Duration = Duration::from_secs(3600);

/// What will be served, and how.
pub(crate) struct Settings {
    /// The flags, with a recipe's values where they were left out.
    pub(crate) args: ServeArgs,
    /// The model; none with the fake engine.
    pub(crate) dir: Option<ModelDir>,
    /// The memory plan; none with the fake engine.
    pub(crate) plan: Option<MemoryPlan>,
    /// What runs it; none with the fake engine.
    pub(crate) device: Option<Chosen>,
    /// Names clients may use.
    pub(crate) names: Vec<String>,
    /// Vocabulary entries.
    pub(crate) vocab: u32,
    /// Longest context.
    pub(crate) max_context: Tokens,
    /// What cached KV depends on.
    pub(crate) identity: String,
    /// The ranks that run it.
    pub(crate) mesh: Mesh,
    threads: usize,
    kv: KvDtype,
    demo: bool,
}

impl Settings {
    /// Decides.
    ///
    /// # Errors
    /// When the model, a flag or the memory plan is refused.
    pub(crate) fn decide(mut args: ServeArgs) -> Result<Self> {
        let mesh = mesh(&args)?;
        ensure!(
            args.max_num_seqs > 0 && args.max_num_batched_tokens > args.max_num_seqs,
            "--max-num-batched-tokens {} must be above --max-num-seqs {}, so that a prompt can \
             advance while every request decodes",
            args.max_num_batched_tokens,
            args.max_num_seqs
        );
        if args.fake_engine.is_some() {
            ensure!(
                args.kv_host_memory_bytes == 0,
                "--kv-host-memory-bytes is for a model; the fake engine has no KV to keep"
            );
            let threads = threads(&args, mesh)?;
            return Ok(Self::fake(args, mesh, threads));
        }
        let mut source =
            source::resolve(args.model.as_deref(), |name| recipe::builtin(name).is_some())?;
        if let Source::Recipe(name) = &source {
            let (recipe, model) = recipe_of(name)?;
            apply(&recipe, &mut args);
            source = model;
        }
        ensure!(
            args.kv_host_memory_bytes == 0 || !args.no_enable_prefix_caching,
            "--kv-host-memory-bytes {} keeps prefixes, which --no-enable-prefix-caching never looks for; \
             leave one of them out",
            args.kv_host_memory_bytes
        );
        let mesh = self::mesh(&args)?;
        let threads = threads(&args, mesh)?;
        let demo = source == Source::Bundled;
        let name = name_of(&source);
        let folder = if args.load_format == LoadFormat::Random && matches!(source, Source::Hub(_)) {
            // Random weights need the shapes alone, which built-in recipes carry.
            shapes_of(&name)?
        } else {
            super::folder_of(&source, &args.revision)?
        };
        let dir = super::read_dir(&folder)?.of_rank(Seat { mesh, rank: Rank(0) })?;
        let device = choose(args.device)?;
        ensure!(
            mesh == Mesh::SINGLE || device.cuda.is_none(),
            "{mesh}: this build runs several ranks on the CPU alone; give --device cpu, or one rank"
        );
        ensure!(
            args.fail_launch.is_none() || device.cuda.is_some(),
            "--fail-launch is for a CUDA device; here it would change nothing"
        );
        let kv = kv_dtype(&args, &dir, &device)?;
        let float32 = dir.matrix_dtype(asked(&args)) == weights::Dtype::F32;
        let plan = plan(
            &dir,
            &Wanted {
                weight_element: if float32 { 4 } else { 2 },
                kv_element: if kv == KvDtype::Float32 { 4 } else { 2 },
                max_context: args.max_model_len,
                max_seqs: args.max_num_seqs,
                max_step_tokens: args.max_num_batched_tokens,
                kv_bytes: args.kv_cache_memory_bytes,
                host_bytes: args.kv_host_memory_bytes,
                machine: match &device.cuda {
                    Some(cuda) => Machine::Cuda {
                        multiprocessors: cuda.multiprocessors,
                        free: cuda.free.0,
                        share: args.gpu_memory_utilization,
                        host: super::memory::available(),
                    },
                    None => Machine::Cpu { threads, available: super::memory::available() },
                },
                ranks: mesh.world().unwrap_or(1),
            },
        )?;
        let names = if args.served_model_name.is_empty() {
            vec![name]
        } else {
            args.served_model_name.clone()
        };
        Ok(Self {
            vocab: u32::try_from(dir.program.vocab)?,
            max_context: Tokens(plan.max_context),
            identity: format!("{} {kv:?}", folder.display()),
            dir: Some(dir),
            plan: Some(plan),
            device: Some(device),
            names,
            args,
            mesh,
            threads,
            kv,
            demo,
        })
    }

    fn fake(args: ServeArgs, mesh: Mesh, threads: usize) -> Self {
        let names = if args.served_model_name.is_empty() {
            vec!["fake".to_owned()]
        } else {
            args.served_model_name.clone()
        };
        Self {
            dir: None,
            plan: None,
            device: None,
            names,
            vocab: FAKE_VOCAB,
            max_context: Tokens(args.max_model_len.unwrap_or(1 << 16)),
            identity: "fake".to_owned(),
            args,
            mesh,
            threads,
            kv: KvDtype::Float32,
            demo: false,
        }
    }

    /// Whether the bundled model is served, which shows itself.
    pub(crate) const fn is_demo(&self) -> bool {
        self.demo
    }

    /// What the worker is told.
    pub(crate) fn worker(&self) -> WorkerConfig {
        let engine = match (&self.args.fake_engine, &self.dir, &self.plan) {
            (None, Some(dir), Some(plan)) => EngineConfig::Model(ModelConfig {
                path: dir.path.clone(),
                device: match self.device.as_ref().and_then(|chosen| chosen.cuda.as_ref()) {
                    Some(cuda) => DeviceConfig::Cuda { ordinal: cuda.ordinal },
                    None => DeviceConfig::Cpu,
                },
                load_format: self.args.load_format,
                seed: self.args.seed,
                random_float32: asked(&self.args) == Some(weights::Dtype::F32),
                kv_cache_dtype: self.kv,
                kv_cache_bytes: plan.kv,
                kv_host_bytes: plan.host,
                failing_launch: self.args.fail_launch,
            }),
            (fake, _, _) => {
                let cost = fake.as_deref().unwrap_or(&[0, 0, 0]);
                let at = |i: usize| cost.get(i).copied().unwrap_or(0);
                EngineConfig::Fake {
                    base_us: at(0),
                    decode_us: at(1),
                    prefill_ns: at(2),
                    start_ms: at(3),
                    poison: self.args.poison_token,
                }
            }
        };
        let Mesh { dp, tp, expert_parallel } = self.mesh;
        WorkerConfig {
            engine,
            threads: self.threads,
            fake_vocab: self.vocab,
            dp,
            tp,
            expert_parallel,
            rank: 0,
            // Sooner than the step's time is up, so that whoever waits can say for whom.
            patience_ms: self.args.step_timeout.saturating_mul(750),
            meeting: None,
            planted: self.args.plant_fault,
        }
    }

    /// The scheduler's limits.
    pub(crate) fn scheduler(&self, hash_key: HashKey) -> Config {
        let step_tokens = Tokens(self.args.max_num_batched_tokens);
        Config {
            max_running: self.args.max_num_seqs,
            max_step_tokens: step_tokens,
            max_chunk: self.args.max_prefill_chunk.map_or(step_tokens, Tokens),
            max_context: self.max_context,
            depth: self.args.run_ahead.into(),
            decode_budget: match self.args.max_step_ms {
                0 => UNBOUNDED,
                ms => Duration::from_millis(ms),
            },
            prefix_caching: !self.args.no_enable_prefix_caching,
            queue_requests: self.args.max_queued_requests,
            queue_tokens: self.args.max_queued_tokens.into(),
            step_timeout: Duration::from_secs(self.args.step_timeout),
            ..Config::serving(hash_key)
        }
    }
}

/// Threads of each rank: what is asked for, or a share of all cores.
fn threads(args: &ServeArgs, mesh: Mesh) -> Result<usize> {
    let ranks = mesh.world().unwrap_or(1) as usize;
    let share = || std::thread::available_parallelism().map_or(1, usize::from) / ranks;
    let threads = args.threads.unwrap_or_else(|| share().max(1));
    ensure!(threads > 0, "--threads must be at least 1");
    Ok(threads)
}

/// The ranks that flags ask for.
fn mesh(args: &ServeArgs) -> Result<Mesh> {
    let mesh = Mesh {
        dp: args.data_parallel_size,
        tp: args.tensor_parallel_size,
        expert_parallel: args.enable_expert_parallel,
    };
    ensure!(
        mesh.world().is_some_and(|world| world <= MOST_RANKS),
        "--data-parallel-size {} times --tensor-parallel-size {} must be from 1 to {MOST_RANKS} ranks",
        mesh.dp,
        mesh.tp
    );
    // One rank has all experts anyway.
    let expert_parallel = mesh.expert_parallel && mesh.world() != Some(1);
    Ok(Mesh { expert_parallel, ..mesh })
}

/// The matrix type a flag asks for.
fn asked(args: &ServeArgs) -> Option<weights::Dtype> {
    match args.dtype {
        Dtype::Auto => None,
        Dtype::Float32 => Some(weights::Dtype::F32),
        Dtype::Bfloat16 => Some(weights::Dtype::BF16),
    }
}

/// The KV type. On the CPU what is asked for, else float32 for float32 models and bfloat16 for others.
/// On a CUDA device that of all activations: float32 where `--dtype` says so, else bfloat16.
fn kv_dtype(args: &ServeArgs, dir: &ModelDir, device: &Chosen) -> Result<KvDtype> {
    if device.cuda.is_some() {
        let float32 = args.dtype == Dtype::Float32;
        let all = if float32 { KvDtype::Float32 } else { KvDtype::Bfloat16 };
        ensure!(
            [KvDtype::Auto, all].contains(&args.kv_cache_dtype),
            "--kv-cache-dtype must be that of --dtype on a CUDA device; leave it out, or give \
             --device cpu"
        );
        return Ok(all);
    }
    Ok(match args.kv_cache_dtype {
        KvDtype::Auto if dir.matrix_dtype(asked(args)) == weights::Dtype::F32 => KvDtype::Float32,
        KvDtype::Auto => KvDtype::Bfloat16,
        chosen => chosen,
    })
}

/// A recipe and the source of its model.
fn recipe_of(name: &str) -> Result<(Recipe, Source)> {
    let recipe = crate::recipe_cmd::load(name)?;
    let source = match recipe.model.source.as_str() {
        "bundled" => Source::Bundled,
        word => source::resolve(Some(word), |_| false)?,
    };
    if let Source::Recipe(other) = &source {
        bail!("recipe {name}: model.source names another recipe, {other}");
    }
    Ok((recipe, source))
}

/// Takes a recipe's values where the flags kept their defaults.
fn apply(recipe: &Recipe, args: &mut ServeArgs) {
    args.revision.clone_from(&recipe.model.revision);
    args.max_model_len.get_or_insert(recipe.limits.max_model_len);
    args.max_num_seqs = recipe.limits.max_num_seqs;
    args.max_num_batched_tokens = recipe.limits.max_num_batched_tokens;
    for (flag, own) in [
        (&mut args.tensor_parallel_size, recipe.mesh.tp),
        (&mut args.data_parallel_size, recipe.mesh.dp),
    ] {
        *flag = if *flag == 1 { own.into() } else { *flag };
    }
    args.enable_expert_parallel |= recipe.mesh.ep;
    args.no_enable_prefix_caching |= !recipe.cache.prefix_caching;
    if args.threads.is_none() {
        args.threads = recipe.hardware.threads.map(usize::from);
    }
    if args.kv_cache_memory_bytes.is_none() {
        args.kv_cache_memory_bytes = recipe.cache.bytes;
    }
    if args.kv_host_memory_bytes == 0 {
        args.kv_host_memory_bytes = recipe.cache.host_bytes;
    }
    if args.kv_cache_dtype == KvDtype::Auto {
        args.kv_cache_dtype = match recipe.cache.dtype {
            recipe::CacheDtype::Auto => KvDtype::Auto,
            recipe::CacheDtype::Float32 => KvDtype::Float32,
            recipe::CacheDtype::Bfloat16 => KvDtype::Bfloat16,
        };
    }
}

fn name_of(source: &Source) -> String {
    match source {
        Source::Bundled => super::bundled::NAME.to_owned(),
        Source::Hub(repo) => repo.clone(),
        Source::Recipe(name) => name.clone(),
        Source::Folder(path) => path
            .canonicalize()
            .unwrap_or_else(|_| path.clone())
            .file_name()
            .map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned()),
    }
}

/// A folder with the published shapes of `repo`, from the recipes in the binary.
fn shapes_of(repo: &str) -> Result<PathBuf> {
    let Some(config) = recipe::config_of(repo) else {
        bail!("--load-format random for {repo} needs its config.json; give a folder that holds it");
    };
    let folder = std::env::temp_dir().join(format!("tokenmill-shapes-{}", repo.replace('/', "--")));
    write_config(&folder, config)?;
    Ok(folder)
}

fn write_config(folder: &Path, config: &str) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    std::fs::write(folder.join("config.json"), config)?;
    Ok(())
}
