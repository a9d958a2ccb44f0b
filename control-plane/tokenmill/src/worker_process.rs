//! `tokenmill worker`: the process that `serve` starts for each rank.

use crate::cli::WorkerArgs;
use crate::model_dir::ModelDir;
use crate::serve::worker_config::{
    DeviceConfig, EngineConfig, KvDtype, LoadFormat, Meeting, ModelConfig, PlantedArg, WorkerConfig,
};
use anyhow::{Context, Result};
use engine::collectives::SharedMemory;
use engine::{Engine, MlaForm, Options, WeightSource};
use ids::{Bytes, RequestId, TokenId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use step::{Configure, Hello, LoadProgress, Outcome, Seat, StartPhase, StepPlan, Upload};
use weights::progress::{Progress, Stage};
use weights::random::{Profile, RandomModel, RandomWeights, TensorSpec};
use weights::{Checkpoint, Dtype, LoadOptions, Weights};
use worker::{Fake, FakeCost, Role, Stepper, WorkerFault};

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
        worker::stop_with_parent();
        let threads = config.threads;
        let seat = config.seat();
        let meeting = config.meeting;
        let role = Role { seat, planted: config.planted.map(PlantedArg::planted) };
        match config.engine {
            EngineConfig::Fake { base_us, decode_us, prefill_ns, start_ms, poison } => {
                let cost = FakeCost {
                    base: Duration::from_micros(base_us),
                    per_decode: Duration::from_micros(decode_us),
                    per_prefill: Duration::from_nanos(prefill_ns),
                };
                let vocab = config.fake_vocab;
                let poison = poison.map(TokenId);
                let fake = move |report: &mut (dyn FnMut(LoadProgress) + Send)| {
                    pretend_to_load(start_ms, report);
                    Ok(Fake::new(vocab, cost, seat).with_poison(poison))
                };
                worker::serve(&args.socket, role, fake).await
            }
            EngineConfig::Model(model) => {
                let load = move |report: &mut (dyn FnMut(LoadProgress) + Send)| {
                    load(&model, threads, (seat, meeting.as_ref()), report)
                };
                worker::serve(&args.socket, role, load).await
            }
        }
    })?;
    Ok(())
}

/// Takes so many milliseconds, and says so as loading weights does.
fn pretend_to_load(millis: u64, report: &mut (dyn FnMut(LoadProgress) + Send)) {
    let (began, whole) = (Instant::now(), Duration::from_millis(millis));
    while began.elapsed() < whole {
        let done = Bytes(began.elapsed().as_millis() as u64);
        let stage = "pretending to load".to_owned();
        report(LoadProgress { stage, done, total: Bytes(millis) });
        std::thread::sleep(REPORT_EVERY.min(whole));
    }
}

/// An engine, on weights that live as long as the process or on a device that has its own.
struct Model {
    engine: Engine<'static>,
    /// Of weights that this rank holds.
    weight_bytes: Bytes,
    /// Parts of the start that are not the engine's, or were taken from it.
    phases: Vec<(StartPhase, Duration)>,
}

impl Stepper for Model {
    fn hello(&self) -> Hello {
        Hello { weight_bytes: self.weight_bytes, ..self.engine.hello() }
    }

    fn configure(&mut self, configure: &Configure) -> Result<(), WorkerFault> {
        let began = Instant::now();
        self.engine.configure(configure).map_err(|error| WorkerFault::from_error(&error))?;
        let took = began.elapsed();
        for step in self.engine.captured() {
            let engine::Captured { rows, prompts, greedy, kernels, .. } = step;
            tracing::debug!(rows, prompts, greedy, kernels = kernels.join(" "), "captured a step");
        }
        self.phases.extend(self.engine.take_phases());
        if self.phases.is_empty() {
            self.phases.push((StartPhase::Memory, took));
        }
        for note in self.engine.take_notes() {
            tracing::info!("{note}");
        }
        Ok(())
    }

    fn take_phases(&mut self) -> Vec<(StartPhase, Duration)> {
        std::mem::take(&mut self.phases)
    }

    fn upload(&mut self, upload: &Upload) -> Result<(), WorkerFault> {
        self.engine.upload(upload).map_err(|error| WorkerFault::from_error(&error))
    }

    fn forget(&mut self, request: RequestId) {
        self.engine.forget(request);
    }

    fn in_flight(&self) -> usize {
        self.engine.in_flight()
    }

    fn accepts(&self) -> bool {
        self.engine.accepts()
    }

    fn enqueue(&mut self, plan: &StepPlan) -> Result<(), WorkerFault> {
        self.engine.enqueue(plan).map_err(|error| WorkerFault::from_error(&error))
    }

    fn ready(&self) -> Result<bool, WorkerFault> {
        self.engine.ready().map_err(|error| WorkerFault::from_error(&error))
    }

    fn collect(&mut self) -> Result<Option<Outcome>, WorkerFault> {
        // While steps run there is something to tell where something is not as wanted.
        for note in self.engine.take_notes() {
            tracing::warn!("{note}");
        }
        self.engine.collect().map_err(|error| WorkerFault::from_error(&error))
    }
}

fn load(
    config: &ModelConfig,
    threads: usize,
    (seat, meeting): (Seat, Option<&Meeting>),
    report: &mut (dyn FnMut(LoadProgress) + Send),
) -> Result<Model, WorkerFault> {
    let fault = |error: anyhow::Error| WorkerFault(format!("{error:#}"));
    let dir = ModelDir::read(&config.path).and_then(|dir| dir.of_rank(seat)).map_err(fault)?;
    let reporter = Reporter { state: Mutex::new((Instant::now(), report)) };
    let options = Options {
        device: match config.device {
            DeviceConfig::Cpu => engine::Device::Cpu,
            DeviceConfig::Cuda { ordinal } => engine::Device::Cuda { ordinal },
        },
        threads,
        kv_dtype: match config.kv_cache_dtype {
            KvDtype::Float32 => engine::KvDtype::F32,
            KvDtype::Auto | KvDtype::Bfloat16 => engine::KvDtype::Bf16,
        },
        cache_bytes: Bytes(config.kv_cache_bytes),
        host_bytes: Bytes(config.kv_host_bytes),
        graphs: true,
        mla_form: MlaForm::Auto,
        failing_launch: config.failing_launch,
    };
    match config.device {
        DeviceConfig::Cpu => match meeting {
            Some(meeting) => of_group(dir, config, options, (seat, meeting), &reporter),
            None => on_processor(dir, config, options, &reporter),
        },
        DeviceConfig::Cuda { ordinal } => on_device(dir, config, ordinal, options, &reporter),
    }
    .map_err(fault)
}

/// Weights stay in memory for as long as the process lives.
fn on_processor(
    dir: ModelDir,
    config: &ModelConfig,
    options: Options,
    progress: &Reporter<'_>,
) -> Result<Model> {
    let began = Instant::now();
    let weights = match config.load_format {
        LoadFormat::Random => {
            let (model, specs) = random(&dir, config);
            Weights::random(&model, &specs, options.threads, progress)?
        }
        LoadFormat::Auto => stored(&dir, config, options.threads, true, progress)?,
    };
    // One engine lives in this process, until it ends.
    let weights: &'static Weights = Box::leak(Box::new(weights));
    let weight_bytes = Bytes(weights.held_bytes());
    let engine = Engine::new(&dir.program, dir.lowered, weights, options)?;
    Ok(Model { engine, weight_bytes, phases: vec![(StartPhase::Weights, began.elapsed())] })
}

/// One rank of several: it reads and keeps its part of the weights alone, for as long as the process lives.
fn of_group(
    dir: ModelDir,
    config: &ModelConfig,
    options: Options,
    (seat, meeting): (Seat, &Meeting),
    progress: &Reporter<'_>,
) -> Result<Model> {
    let began = Instant::now();
    let parts = engine::parts(&dir.lowered);
    let weights = match config.load_format {
        LoadFormat::Random => {
            let (model, specs) = random(&dir, config);
            let types: BTreeMap<&str, Dtype> =
                specs.iter().map(|spec| (spec.name.as_str(), spec.dtype)).collect();
            let typed = parts.into_iter().filter_map(|part| {
                let dtype = *types.get(part.name.as_str())?;
                Some((part, dtype))
            });
            let parts: Vec<_> = typed.collect();
            Weights::random_parts(&model, &parts, options.threads, progress)?
        }
        LoadFormat::Auto => {
            let (checkpoint, how) = checkpoint(&dir, config, options.threads, true)?;
            let weights = Weights::load_parts(&checkpoint, &parts, &how, progress)?;
            // What other ranks keep is not this one's to use.
            let others: BTreeSet<&str> =
                dir.program.weights.iter().map(|weight| weight.name.as_str()).collect();
            warn_of_unused(weights.unused().iter().filter(|name| !others.contains(name.as_str())));
            weights
        }
    };
    let weight_bytes = Bytes(weights.held_bytes());
    let weights: &'static Weights = Box::leak(Box::new(weights));
    let patience = Duration::from_millis(meeting.patience_ms);
    let meeting = SharedMemory::join(&meeting.path, seat.rank.index(), patience)
        .context("meet the other ranks in shared memory")?;
    let (program, lowered) = (&dir.program, dir.lowered);
    let engine = Engine::of_rank(program, lowered, weights, Box::new(meeting), options)?;
    Ok(Model { engine, weight_bytes, phases: vec![(StartPhase::Weights, began.elapsed())] })
}

/// Weights go to the device, or are made there; nothing of them stays here.
fn on_device(
    dir: ModelDir,
    config: &ModelConfig,
    ordinal: usize,
    options: Options,
    progress: &Reporter<'_>,
) -> Result<Model> {
    let began = Instant::now();
    let threads = options.threads;
    let source: Box<dyn WeightSource> = match config.load_format {
        LoadFormat::Random => {
            let (model, specs) = random(&dir, config);
            Box::new(RandomWeights::new(&model, &specs, threads)?)
        }
        LoadFormat::Auto => Box::new(stored(&dir, config, threads, false, progress)?),
    };
    let prepared = began.elapsed();
    let report = |done, total| progress.report(Stage::Read, done, total);
    let weight_bytes = weight_bytes(&dir, config);
    let (program, lowered) = (&dir.program, dir.lowered);
    let mut engine = Engine::on_device(program, lowered, &*source, ordinal, options, &report)?;
    let mut phases = engine.take_phases();
    for (_, took) in phases.iter_mut().filter(|(phase, _)| *phase == StartPhase::Weights) {
        *took += prepared;
    }
    Ok(Model { engine, weight_bytes, phases })
}

/// Bytes of the weights in the type that they are stored in or made of.
fn weight_bytes(dir: &ModelDir, config: &ModelConfig) -> Bytes {
    let float32 = config.random_float32 || dir.matrix_dtype(None) == Dtype::F32;
    Bytes(dir.weight_bytes(if float32 { 4 } else { 2 }))
}

fn stored(
    dir: &ModelDir,
    config: &ModelConfig,
    threads: usize,
    read_ahead: bool,
    progress: &Reporter<'_>,
) -> Result<Weights> {
    let (checkpoint, options) = checkpoint(dir, config, threads, read_ahead)?;
    let wanted: Vec<(&str, Vec<usize>)> = dir.lowered.tensors().collect();
    let wanted = wanted.iter().map(|(name, shape)| (*name, shape.as_slice()));
    let weights = Weights::load(&checkpoint, wanted, &options, progress)?;
    warn_of_unused(weights.unused().iter());
    Ok(weights)
}

fn warn_of_unused<'a>(mut unused: impl Iterator<Item = &'a String>) {
    if let Some(first) = unused.next() {
        let count = 1 + unused.count();
        tracing::warn!(count, first, "the checkpoint holds tensors that the model does not use");
    }
}

/// The model's files, and how they are read.
fn checkpoint(
    dir: &ModelDir,
    config: &ModelConfig,
    threads: usize,
    read_ahead: bool,
) -> Result<(Checkpoint, LoadOptions)> {
    let options = LoadOptions {
        matrices: None,
        fp8_block: dir.config.decoder().quantization.as_ref().map(|q| q.block),
        read_ahead,
        threads,
    };
    Ok((Checkpoint::open(&config.path)?, options))
}

/// What random weights are made of.
fn random(dir: &ModelDir, config: &ModelConfig) -> (RandomModel, Vec<TensorSpec>) {
    let model = RandomModel {
        seed: config.seed,
        profile: Profile::Realistic,
        tied_embeddings: dir.config.decoder().tied,
    };
    let dtype = if config.random_float32 { Dtype::F32 } else { dir.matrix_dtype(None) };
    (model, dir.random_specs(dtype))
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
