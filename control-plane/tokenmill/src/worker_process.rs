//! `tokenmill worker`: the process that `serve` starts for each rank.

use crate::cli::WorkerArgs;
use crate::model_dir::ModelDir;
use crate::serve::worker_config::{
    DeviceConfig, EngineConfig, KvDtype, LoadFormat, ModelConfig, WorkerConfig,
};
use anyhow::{Context, Result};
use engine::{Engine, MlaForm, Options};
use ids::{Bytes, RequestId};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use step::{Configure, Hello, LoadProgress, Outcome, StepPlan, Upload};
use weights::progress::{Progress, Stage};
use weights::random::{Profile, RandomModel};
use weights::{Checkpoint, Dtype, LoadOptions, Weights};
use worker::{Fake, FakeCost, Stepper, WorkerFault};

/// How often loading reports.
const REPORT_EVERY: Duration = Duration::from_millis(50);

/// Serves one session.
pub(crate) fn run(args: WorkerArgs) -> Result<()> {
    worker::exit_with_parent();
    let config: WorkerConfig =
        serde_json::from_str(&args.config).context("parse the worker's configuration")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(async {
        let threads = config.threads;
        match config.engine {
            EngineConfig::Fake { base_us, decode_us, prefill_ns } => {
                let cost = FakeCost {
                    base: Duration::from_micros(base_us),
                    per_decode: Duration::from_micros(decode_us),
                    per_prefill: Duration::from_nanos(prefill_ns),
                };
                let vocab = config.fake_vocab;
                worker::serve(&args.socket, move |_| Ok(Fake::new(vocab, cost))).await
            }
            EngineConfig::Model(model) => {
                worker::serve(&args.socket, move |report| load(&model, threads, report)).await
            }
        }
    })?;
    Ok(())
}

/// An engine on weights that live as long as the process.
struct Model(Engine<'static>);

impl Stepper for Model {
    fn hello(&self) -> Hello {
        self.0.hello()
    }

    fn configure(&mut self, configure: &Configure) -> Result<(), WorkerFault> {
        let began = Instant::now();
        self.0.configure(configure).map_err(|error| WorkerFault::from_error(&error))?;
        tracing::info!(
            seconds = began.elapsed().as_secs_f64(),
            "memory of steps and cache is there"
        );
        Ok(())
    }

    fn upload(&mut self, upload: &Upload) -> Result<(), WorkerFault> {
        self.0.upload(upload).map_err(|error| WorkerFault::from_error(&error))
    }

    fn forget(&mut self, request: RequestId) {
        self.0.forget(request);
    }

    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }

    fn accepts(&self) -> bool {
        self.0.accepts()
    }

    fn enqueue(&mut self, plan: &StepPlan) -> Result<(), WorkerFault> {
        self.0.enqueue(plan).map_err(|error| WorkerFault::from_error(&error))
    }

    fn ready(&self) -> Result<bool, WorkerFault> {
        self.0.ready().map_err(|error| WorkerFault::from_error(&error))
    }

    fn collect(&mut self) -> Result<Option<Outcome>, WorkerFault> {
        self.0.collect().map_err(|error| WorkerFault::from_error(&error))
    }
}

fn load(
    config: &ModelConfig,
    threads: usize,
    report: &mut (dyn FnMut(LoadProgress) + Send),
) -> Result<Model, WorkerFault> {
    let fault = |error: anyhow::Error| WorkerFault(format!("{error:#}"));
    let dir = ModelDir::read(&config.path).map_err(fault)?;
    let began = Instant::now();
    let reporter = Reporter { state: Mutex::new((Instant::now(), report)) };
    let weights = match config.load_format {
        LoadFormat::Random => random(&dir, config, threads, &reporter),
        LoadFormat::Auto => stored(&dir, config, threads, &reporter),
    };
    let weights = weights.map_err(fault)?;
    let kv_dtype = match config.kv_cache_dtype {
        KvDtype::Float32 => engine::KvDtype::F32,
        KvDtype::Auto | KvDtype::Bfloat16 => engine::KvDtype::Bf16,
    };
    let device = match config.device {
        DeviceConfig::Cpu => engine::Device::Cpu,
        DeviceConfig::Cuda { ordinal } => engine::Device::Cuda { ordinal },
    };
    let options = Options {
        device,
        threads,
        kv_dtype,
        cache_bytes: Bytes(config.kv_cache_bytes),
        graphs: true,
        mla_form: MlaForm::Auto,
    };
    tracing::info!(seconds = began.elapsed().as_secs_f64(), "weights are loaded");
    let began = Instant::now();
    // One engine lives in this process, until it ends.
    let weights: &'static Weights = Box::leak(Box::new(weights));
    let engine = Engine::new(&dir.program, dir.lowered, weights, options)
        .map_err(|error| WorkerFault::from_error(&error))?;
    tracing::info!(seconds = began.elapsed().as_secs_f64(), "the engine holds its weights");
    Ok(Model(engine))
}

fn stored(
    dir: &ModelDir,
    config: &ModelConfig,
    threads: usize,
    progress: &Reporter<'_>,
) -> Result<Weights> {
    let checkpoint = Checkpoint::open(&config.path)?;
    let options = LoadOptions {
        matrices: None,
        fp8_block: dir.config.decoder().quantization.as_ref().map(|q| q.block),
        read_ahead: true,
        threads,
    };
    let wanted: Vec<(&str, Vec<usize>)> = dir.lowered.tensors().collect();
    let wanted = wanted.iter().map(|(name, shape)| (*name, shape.as_slice()));
    let weights = Weights::load(&checkpoint, wanted, &options, progress)?;
    if let Some(first) = weights.unused().first() {
        let count = weights.unused().len();
        tracing::warn!(count, first, "the checkpoint holds tensors that the model does not use");
    }
    Ok(weights)
}

fn random(
    dir: &ModelDir,
    config: &ModelConfig,
    threads: usize,
    progress: &Reporter<'_>,
) -> Result<Weights> {
    let model = RandomModel {
        seed: config.seed,
        profile: Profile::Realistic,
        tied_embeddings: dir.config.decoder().tied,
    };
    let dtype = if config.random_float32 { Dtype::F32 } else { dir.matrix_dtype(None) };
    Ok(Weights::random(&model, &dir.random_specs(dtype), threads, progress)?)
}

/// Passes progress on to the scheduler, not too often.
struct Reporter<'a> {
    state: Mutex<(Instant, &'a mut (dyn FnMut(LoadProgress) + Send))>,
}

impl Progress for Reporter<'_> {
    fn report(&self, stage: Stage, done: u64, total: u64) {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if done < total && state.0.elapsed() < REPORT_EVERY {
            return;
        }
        state.0 = Instant::now();
        (state.1)(LoadProgress {
            stage: stage.to_string(),
            done: Bytes(done),
            total: Bytes(total),
        });
    }
}
