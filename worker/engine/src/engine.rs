//! The engine: slots, batch, executor and sampler behind the step protocol.
//!
//! A plain-thread library: no async, no network, no choice of its own. Invariant: after `step`
//! returned an error nothing may be asked of the engine any more; the worker ends.

use crate::batch::{Batch, Purpose, Wanted};
use crate::cpu::Cpu;
use crate::cuda::Cuda;
use crate::digest::Digest;
use crate::executor::{Backend, Executor, TableView, Tile};
use crate::sampler::{Sampler, drawn_on_device};
use crate::slots::{MAX_CONTEXT, Slots};
use crate::tables::Carver;
use crate::{Device, EngineError, Options, PlanError, StepError, WeightSource};
use core::ops::Range;
use device::cuda::CudaError;
use ids::{Bytes, GroupId, Incarnation, RequestId, StepSeq, Tokens};
use model::lower::Lowered;
use model::memory;
use model::program::{CacheKind, Program};
use std::time::{Duration, Instant};
use step::{
    Configure, GroupKind, GroupSpec, Hello, Logprobs, Outcome, PromptLogprobs, Sampled, StartPhase,
    StepPlan, StepTiming, Upload,
};

/// Alignment of super-blocks: two cache lines, which a device's copy engine takes as one.
const ALIGNMENT: u64 = 128;
/// The most rows of the slot table.
const MAX_SLOTS: u32 = 1 << 16;
/// The most tokens of one step.
const MAX_STEP_TOKENS: u32 = 1 << 20;

/// A model on one device, driven by step plans. `'w` is the life of the weights.
pub struct Engine<'w> {
    architecture: String,
    vocab: u32,
    max_context: Tokens,
    groups: Vec<GroupSpec>,
    options: Options,
    backend: Backend<'w>,
    configured: Option<Configured>,
}

/// What exists once the scheduler has said how memory is carved.
struct Configured {
    incarnation: Incarnation,
    last: StepSeq,
    max_step_tokens: usize,
    vocab: usize,
    slots: Slots,
    batch: Batch,
    sampler: Sampler,
}

impl<'w> Engine<'w> {
    /// Resolves every weight of a lowered program and prepares its execution. `weights` outlive
    /// the engine: on the CPU nothing is copied but vectors. A CUDA device gets a copy of all.
    ///
    /// # Errors
    /// When a weight is missing or of another shape, the program is for several ranks, or the device
    /// cannot be used.
    pub fn new(
        program: &Program,
        lowered: Lowered,
        weights: &'w dyn WeightSource,
        options: Options,
    ) -> Result<Self, EngineError> {
        match options.device {
            Device::Cpu => Self::over(program, lowered, options, |lowered, options| {
                Ok(Backend::Cpu(Box::new(Cpu::new(lowered, weights, options)?)))
            }),
            Device::Cuda { ordinal } => {
                Self::on_device(program, lowered, weights, ordinal, options, &|_, _| {})
            }
        }
    }

    /// As [`Engine::new`] on a CUDA device, whatever the options say, which gets a copy of all
    /// weights: they are not used any more afterwards. `report` hears bytes sent and bytes to send.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub fn on_device(
        program: &Program,
        lowered: Lowered,
        weights: &dyn WeightSource,
        ordinal: usize,
        options: Options,
        report: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Self, EngineError> {
        Self::over(program, lowered, options, |lowered, options| {
            let cuda = Cuda::new(ordinal, &lowered, weights, options, report)?;
            Ok(Backend::Cuda(Box::new(cuda)))
        })
    }

    fn over(
        program: &Program,
        lowered: Lowered,
        options: Options,
        backend: impl FnOnce(Lowered, &Options) -> Result<Backend<'w>, EngineError>,
    ) -> Result<Self, EngineError> {
        let ranks = lowered.mesh.world();
        if ranks != 1 {
            return Err(EngineError::Ranks { ranks });
        }
        let element = options.kv_dtype.bytes();
        let groups = lowered.groups.iter().enumerate().map(|(number, group)| GroupSpec {
            group: GroupId(number as u8),
            kind: match group.kind {
                CacheKind::Full | CacheKind::Latent => GroupKind::Full,
                CacheKind::Sliding { window } => {
                    GroupKind::Sliding { window: Tokens(window as u32) }
                }
            },
            block_bytes: memory::block_bytes(group, element),
        });
        Ok(Self {
            architecture: program.architecture.clone(),
            vocab: program.vocab as u32,
            max_context: Tokens((program.max_context as u64).min(MAX_CONTEXT.into()) as u32),
            groups: groups.collect(),
            backend: backend(lowered, &options)?,
            options,
            configured: None,
        })
    }

    /// Parts of the start that ended since the last call, with what each took.
    pub fn take_phases(&mut self) -> Vec<(StartPhase, Duration)> {
        self.backend.take_phases()
    }

    /// What this engine offers.
    #[must_use]
    pub fn hello(&self) -> Hello {
        Hello {
            architecture: self.architecture.clone(),
            vocab: self.vocab,
            max_context: self.max_context,
            groups: self.groups.clone(),
            cache_bytes: self.options.cache_bytes,
            alignment: Bytes(ALIGNMENT),
            backend: self.backend.name().to_owned(),
        }
    }

    /// Allocates everything that steps use, and begins a life.
    ///
    /// # Errors
    /// When the configuration does not fit what [`Engine::hello`] offered.
    pub fn configure(&mut self, configure: &Configure) -> Result<(), EngineError> {
        let limit = |what, got: u32, most: u32| {
            if (1..=most).contains(&got) {
                return Ok(());
            }
            let allowed = format!("from 1 to {most}");
            Err(EngineError::Limit { what, got: u64::from(got), allowed })
        };
        limit("max_slots", configure.max_slots, MAX_SLOTS)?;
        limit("max_step_tokens", configure.max_step_tokens.0, MAX_STEP_TOKENS)?;
        limit("max_context", configure.max_context.0, self.max_context.0)?;
        let element = self.options.kv_dtype.bytes() as u64;
        let (carving, cache) = (&configure.carving, self.options.cache_bytes.0);
        let carver = Carver::new(carving, &self.groups, cache, ALIGNMENT, element)?;
        let max_step_tokens = configure.max_step_tokens.as_usize();
        let cache_bytes = carving.super_bytes.0 * u64::from(carving.supers);
        let max_slots = configure.max_slots;
        let context = configure.max_context.as_usize();
        self.backend.configure((max_step_tokens, max_slots as usize, context), cache_bytes)?;
        self.configured = Some(Configured {
            incarnation: configure.incarnation,
            last: StepSeq::ZERO,
            max_step_tokens,
            vocab: self.vocab as usize,
            slots: Slots::new(carver, max_slots, configure.max_context, self.vocab),
            batch: Batch::with_capacity(max_step_tokens, max_slots as usize),
            sampler: Sampler::new(self.vocab as usize),
        });
        Ok(())
    }

    /// Takes tokens ahead of the admission that names them.
    ///
    /// # Errors
    /// When they are for another life, leave a gap, or are not in the vocabulary.
    pub fn upload(&mut self, upload: &Upload) -> Result<(), PlanError> {
        self.life(upload.incarnation)?.slots.upload(upload)
    }

    /// Drops the tokens of a request that will not be admitted.
    pub fn forget(&mut self, request: RequestId) {
        if let Some(configured) = &mut self.configured {
            configured.slots.forget(request);
        }
    }

    /// Executes one step.
    ///
    /// # Errors
    /// When the plan contradicts the engine's state or the device fails; nothing may be asked of it
    /// afterwards.
    pub fn step(&mut self, plan: &StepPlan) -> Result<Outcome, StepError> {
        let began = Instant::now();
        let configured = Self::expect_life(&mut self.configured, plan.incarnation)?;
        if plan.seq <= configured.last {
            return Err(PlanError::Sequence { got: plan.seq, last: configured.last }.into());
        }
        configured.last = plan.seq;
        let [section] = plan.sections.as_slice() else {
            return Err(PlanError::Sections { got: plan.sections.len() }.into());
        };
        let digest = Digest::of_plan(plan);
        configured.slots.apply(section)?;
        configured.batch.fill(&mut configured.slots, section, configured.max_step_tokens)?;
        let ran = Instant::now();
        if !configured.batch.ids.is_empty() {
            let tables = TableView::new(&configured.slots);
            let run = self.backend.forward(&configured.batch, &tables);
            run.map_err(|source| configured.failed("the forward pass", source))?;
        }
        let forwarded = ran.elapsed();
        let mut outcome = Outcome {
            seq: plan.seq,
            incarnation: plan.incarnation,
            sampled: Vec::with_capacity(configured.slots.decoding().len() + section.prefill.len()),
            prompt_logprobs: Vec::new(),
            timing: StepTiming::default(),
            digest: 0,
        };
        let head = configured.finish(&mut self.backend, &mut outcome)?;
        outcome.digest = digest.with_sampled(&outcome.sampled);
        outcome.timing = StepTiming {
            total_ns: began.elapsed().as_nanos() as u64,
            model_ns: (forwarded + head).as_nanos() as u64,
            tokens: configured.batch.ids.len() as u32,
            prefill_tokens: configured.batch.prefill_tokens as u32,
        };
        Ok(outcome)
    }

    fn life(&mut self, incarnation: Incarnation) -> Result<&mut Configured, PlanError> {
        Self::expect_life(&mut self.configured, incarnation)
    }

    fn expect_life(
        configured: &mut Option<Configured>,
        incarnation: Incarnation,
    ) -> Result<&mut Configured, PlanError> {
        let configured = configured.as_mut().ok_or(PlanError::NotConfigured)?;
        if configured.incarnation != incarnation {
            let (got, lives) = (incarnation.0, configured.incarnation.0);
            return Err(PlanError::Incarnation { got, lives });
        }
        Ok(configured)
    }
}

impl Configured {
    /// How the wanted rows are drawn where that may happen on a device.
    fn fill_draws(&mut self, wanted: Range<usize>) -> Result<(), PlanError> {
        let Self { slots, batch, sampler, .. } = self;
        sampler.draws.clear();
        for wanted in &batch.wanted[wanted] {
            let life = slots.life_mut(wanted.slot)?;
            let sampled = wanted.purpose == Purpose::Sample;
            sampler.draws.push(sampled.then(|| Sampler::on_device(life)).flatten());
        }
        Ok(())
    }

    /// A failure of the device in this step.
    fn failed(&self, during: &'static str, source: CudaError) -> StepError {
        let (rows, requests) = (self.batch.ids.len(), self.batch.runs.len());
        StepError::Device { during, step: self.last, rows, requests, source }
    }

    /// Logits of the wanted rows in tiles, and what each is wanted for. Returns the time that the
    /// logits took.
    fn finish(
        &mut self,
        executor: &mut impl Executor,
        outcome: &mut Outcome,
    ) -> Result<Duration, StepError> {
        let mut spent = Duration::ZERO;
        let most = executor.tile();
        for first in (0..self.batch.wanted.len()).step_by(most) {
            let range = first..(first + most).min(self.batch.wanted.len());
            self.fill_draws(range.clone())?;
            let began = Instant::now();
            let Tile { logits, drawn } = executor
                .finish(&self.batch, range.clone(), &self.sampler.draws)
                .map_err(|source| self.failed("logits and draws", source))?;
            spent += began.elapsed();
            let Self { slots, batch, sampler, vocab, .. } = self;
            let (tokens, faults) = drawn.split_at(drawn.len() / 2);
            let tile = &batch.wanted[range];
            for (at, wanted) in tile.iter().enumerate() {
                let Wanted { slot, purpose, .. } = *wanted;
                let generation = slots.row(slot).generation.unwrap_or_default();
                let life = slots.life_mut(slot)?;
                // Empty where the row was drawn on the device.
                let row = logits.get_mut(at * *vocab..(at + 1) * *vocab).unwrap_or_default();
                match purpose {
                    Purpose::Prompt { position } => {
                        let entry = sampler.describe(row, life, position);
                        push_prompt(&mut outcome.prompt_logprobs, life.request, position, entry);
                    }
                    Purpose::Sample => {
                        let drawn = match (sampler.draws[at], tokens.get(at), faults.get(at)) {
                            (Some(_), Some(token), Some(left)) => drawn_on_device(*token, *left),
                            _ => sampler.draw(row, life),
                        };
                        let (token, fault) = match drawn.token {
                            Ok(token) => (token, None),
                            Err(fault) => (ids::TokenId(0), Some(fault)),
                        };
                        life.accept(token);
                        let logprobs = drawn.logprobs.map(Box::new);
                        outcome.sampled.push(Sampled { slot, generation, token, fault, logprobs });
                    }
                }
            }
        }
        Ok(spent)
    }
}

/// Appends an entry to its request's part, or begins one.
fn push_prompt(
    parts: &mut Vec<PromptLogprobs>,
    request: RequestId,
    position: u32,
    entry: Logprobs,
) {
    match parts.last_mut().filter(|part| part.request == request) {
        Some(part) => part.entries.push(entry),
        None => {
            let first = Tokens(position);
            parts.push(PromptLogprobs { request, first, entries: vec![entry] });
        }
    }
}
