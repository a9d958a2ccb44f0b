//! The engine: slots, batch, executor and sampler behind the step protocol.
//!
//! A plain-thread library: no async, no network, no choice of its own. Invariant: after a step
//! returned an error nothing may be asked of the engine any more; the worker ends.

use crate::cpu::Cpu;
use crate::cuda::{self, Captured, Cuda};
use crate::executor::Backend;
use crate::slots::{MAX_CONTEXT, Slots};
use crate::standing::Standing;
use crate::steps::Steps;
use crate::tables::Carver;
use crate::{Device, EngineError, Options, PlanError, StepError, WeightSource};
use device::collectives::Collectives;
use ids::{Bytes, GroupId, Incarnation, Rank, RequestId, Tokens};
use model::lower::Lowered;
use model::memory;
use model::program::{CacheKind, Program};
use std::time::Duration;
use step::{Configure, GroupKind, GroupSpec, Hello, Outcome, Seat, StartPhase, StepPlan, Upload};

/// Least alignment of super-blocks: two cache lines, which a device's copy engine takes as one.
const ALIGNMENT: u64 = 128;
/// The most rows of the slot table.
const MAX_SLOTS: u32 = 1 << 16;
/// The most tokens of one step.
const MAX_STEP_TOKENS: u32 = 1 << 20;

/// A model on one device, or one rank's part of it, driven by step plans. `'w` is the life of the weights.
pub struct Engine<'w> {
    architecture: String,
    vocab: u32,
    max_context: Tokens,
    groups: Vec<GroupSpec>,
    seat: Seat,
    options: Options,
    /// Of super-blocks, in bytes.
    alignment: u64,
    backend: Backend<'w>,
    standing: Standing,
    configured: Option<Steps>,
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
            Device::Cpu => {
                Self::alone(&lowered)?;
                Self::over(program, lowered, options, |lowered, options| {
                    Ok(Backend::Cpu(Box::new(Cpu::new(lowered, weights, options, None)?)))
                })
            }
            Device::Cuda { ordinal } => {
                Self::on_device(program, lowered, weights, ordinal, options, &|_, _| {})
            }
        }
    }

    /// As [`Engine::new`] for one rank of several, on the processor. `weights` hold the rank's parts, see
    /// [`crate::parts`]; `collectives` are its end of the exchange with the others.
    ///
    /// # Errors
    /// As [`Engine::new`], and where the collectives are another rank's or the options name a CUDA device.
    pub fn of_rank(
        program: &Program,
        lowered: Lowered,
        weights: &'w dyn WeightSource,
        collectives: Box<dyn Collectives>,
        options: Options,
    ) -> Result<Self, EngineError> {
        if options.device != Device::Cpu {
            return Err(EngineError::Ranks { ranks: lowered.mesh.world() });
        }
        let (rank, ranks) = (lowered.rank.0, lowered.mesh.world());
        let (got, got_of) = (collectives.rank(), collectives.world());
        if (got, got_of) != (rank, ranks) {
            return Err(EngineError::OtherRank { got, got_of, rank, ranks });
        }
        Self::over(program, lowered, options, |lowered, options| {
            let cpu = Cpu::new(lowered, weights, options, Some(collectives))?;
            Ok(Backend::Cpu(Box::new(cpu)))
        })
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
        Self::alone(&lowered)?;
        Self::over(program, lowered, options, |lowered, options| {
            let cuda = Cuda::new(ordinal, &lowered, weights, options, report)?;
            Ok(Backend::Cuda(Box::new(cuda)))
        })
    }

    /// Refuses programs whose ranks would have to exchange.
    const fn alone(lowered: &Lowered) -> Result<(), EngineError> {
        match lowered.mesh.world() {
            1 => Ok(()),
            ranks => Err(EngineError::Ranks { ranks }),
        }
    }

    fn over(
        program: &Program,
        lowered: Lowered,
        options: Options,
        backend: impl FnOnce(Lowered, &Options) -> Result<Backend<'w>, EngineError>,
    ) -> Result<Self, EngineError> {
        let standing = Standing::new(lowered.mesh, lowered.rank);
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
        let groups = groups.collect();
        let seat = seat(&lowered);
        let of_rows = cuda::alignment(&lowered, options.kv_dtype, ALIGNMENT);
        let backend = backend(lowered, &options)?;
        Ok(Self {
            alignment: if matches!(backend, Backend::Cuda(_)) { of_rows } else { ALIGNMENT },
            architecture: program.architecture.clone(),
            vocab: program.vocab as u32,
            max_context: Tokens((program.max_context as u64).min(MAX_CONTEXT.into()) as u32),
            groups,
            seat,
            backend,
            standing,
            options,
            configured: None,
        })
    }

    /// Parts of the start that ended since the last call, with what each took.
    pub fn take_phases(&mut self) -> Vec<(StartPhase, Duration)> {
        self.backend.take_phases()
    }

    /// How often each kernel of a device was enqueued or captured until now, of those that were: the
    /// difference of two calls says what steps between them resolved to. A captured step counts when
    /// it is captured; see [`Engine::captured`].
    #[must_use]
    pub fn launches(&self) -> Vec<(String, u64)> {
        self.backend.launches()
    }

    /// What captured steps launch, by kind; empty where none are captured.
    #[must_use]
    pub fn captured(&self) -> Vec<Captured> {
        self.backend.captured()
    }

    /// Bytes that came from other ranks in the last step, by op of the program's body, then of its head;
    /// empty on a device that exchanges nothing. As [`model::explain::collective_bytes`] says for the rows
    /// that the ops ran with.
    #[must_use]
    pub fn moved(&self) -> &[u64] {
        self.backend.moved()
    }

    /// What an operator may want to know since the last call: what was chosen at the start, and what went
    /// otherwise while steps ran.
    #[must_use]
    pub fn take_notes(&mut self) -> Vec<String> {
        self.backend.take_notes()
    }

    /// What this engine offers. How many bytes of weights there are, whoever holds them says.
    #[must_use]
    pub fn hello(&self) -> Hello {
        Hello {
            architecture: self.architecture.clone(),
            vocab: self.vocab,
            max_context: self.max_context,
            groups: self.groups.clone(),
            cache_bytes: self.options.cache_bytes,
            alignment: Bytes(self.alignment),
            backend: self.backend.name().to_owned(),
            seat: self.seat,
            weight_bytes: Bytes::ZERO,
            host_bytes: self.options.host_bytes,
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
        let carving = &configure.carving;
        let offered = (self.options.cache_bytes.0, self.options.host_bytes.0);
        let carver = Carver::new(carving, &self.groups, offered, self.alignment, element)?;
        let max_step_tokens = configure.max_step_tokens.as_usize();
        let cache_bytes = carving.super_bytes.0 * u64::from(carving.supers);
        let max_slots = configure.max_slots;
        let context = configure.max_context.as_usize();
        let bytes = (cache_bytes, carver.host_bytes());
        self.backend.configure((max_step_tokens, max_slots as usize, context), bytes)?;
        let slots = Slots::new(carver, max_slots, configure.max_context, self.vocab);
        let limits = (max_step_tokens, max_slots as usize);
        let steps =
            Steps::new(configure.incarnation, slots, limits, self.vocab as usize, self.standing);
        self.configured = Some(steps);
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

    /// Whether [`Engine::enqueue`] may be called now: few steps are in flight, and none of them needs
    /// the host to draw its tokens.
    #[must_use]
    pub fn accepts(&self) -> bool {
        self.configured.as_ref().is_none_or(Steps::accepts)
    }

    /// Steps enqueued and not collected.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.configured.as_ref().map_or(0, Steps::in_flight)
    }

    /// Applies a plan and enqueues its step, behind those in flight. A device that works on its own
    /// is not waited for; the processor has run the model when this returns.
    ///
    /// # Errors
    /// When the plan contradicts the engine's state or comes while [`Engine::accepts`] says no, or the
    /// device fails; nothing may be asked of it afterwards.
    pub fn enqueue(&mut self, plan: &StepPlan) -> Result<(), StepError> {
        let steps = Self::expect_life(&mut self.configured, plan.incarnation)?;
        steps.enqueue(&mut self.backend, plan)
    }

    /// Whether [`Engine::collect`] would not wait; false where nothing is in flight.
    ///
    /// # Errors
    /// When the device failed.
    pub fn ready(&self) -> Result<bool, StepError> {
        self.configured.as_ref().map_or(Ok(false), |steps| steps.ready(&self.backend))
    }

    /// Waits for the oldest step in flight; `None` where there is none.
    ///
    /// # Errors
    /// When the device failed; nothing may be asked of it afterwards.
    pub fn collect(&mut self) -> Result<Option<Outcome>, StepError> {
        let Some(steps) = &mut self.configured else { return Ok(None) };
        steps.collect(&mut self.backend)
    }

    /// Executes one step while nothing is in flight.
    ///
    /// # Errors
    /// As [`Engine::enqueue`] and [`Engine::collect`].
    pub fn step(&mut self, plan: &StepPlan) -> Result<Outcome, StepError> {
        if let in_flight @ 1.. = self.in_flight() {
            return Err(PlanError::InFlight { in_flight }.into());
        }
        self.enqueue(plan)?;
        self.collect()?.ok_or_else(|| PlanError::NotConfigured.into())
    }

    fn life(&mut self, incarnation: Incarnation) -> Result<&mut Steps, PlanError> {
        Self::expect_life(&mut self.configured, incarnation)
    }

    fn expect_life(
        configured: &mut Option<Steps>,
        incarnation: Incarnation,
    ) -> Result<&mut Steps, PlanError> {
        let configured = configured.as_mut().ok_or(PlanError::NotConfigured)?;
        if configured.incarnation != incarnation {
            let (got, lives) = (incarnation.0, configured.incarnation.0);
            return Err(PlanError::Incarnation { got, lives });
        }
        Ok(configured)
    }
}

/// The rank that a program was lowered for, as the protocol names it.
fn seat(lowered: &Lowered) -> Seat {
    let model::mesh::Mesh { dp, tp, expert_parallel } = lowered.mesh;
    Seat {
        mesh: step::Mesh { dp: dp as u32, tp: tp as u32, expert_parallel },
        rank: Rank(lowered.rank.0 as u32),
    }
}
