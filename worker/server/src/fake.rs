//! A worker without a model: follows plans faithfully, draws tokens from a hash, takes the time a
//! cost model says. It lets everything above the engine be tested at any scale without weights.
//!
//! It keeps no KV and does not check block ownership (the simulator's worker does). As a rank of a group it
//! follows its shard's sections and talks to no other rank. For tests of requests that kill workers there can
//! be a poison: a token that ends the process some way behind it. Invariant: a token depends on (seed, choice,
//! position) alone, so batches, chunks, meshes and restarts cannot change it.

use crate::{Stepper, WorkerFault};
use ids::{Bytes, GroupId, RequestId, SlotGeneration, SlotId, TokenId, Tokens};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use step::{
    Configure, GroupKind, GroupSpec, Hello, Logprobs, Outcome, Sampled, Seat, Section, SlotOp,
    StepPlan, StepTiming, TokenLogprob, Upload,
};

/// Time a step takes: `base + per_decode * decodes + per_prefill * prompt tokens`.
#[derive(Clone, Copy, Debug)]
pub struct FakeCost {
    /// Of any step.
    pub base: Duration,
    /// Of each slot that decodes.
    pub per_decode: Duration,
    /// Of each prompt token.
    pub per_prefill: Duration,
}

/// Tokens that stand behind a poison when it strikes.
const POISON_AFTER: u32 = 8;

/// Exit code of a poisoned process.
const POISONED: i32 = 86;

/// The fake engine.
#[derive(Debug)]
pub struct Fake {
    cost: FakeCost,
    /// The prompt token that ends this process.
    poison: Option<TokenId>,
    vocab: u32,
    seat: Seat,
    uploads: BTreeMap<RequestId, Uploaded>,
    slots: BTreeMap<SlotId, Slot>,
    /// The step that was enqueued last, which takes its time there.
    done: Option<Outcome>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Uploaded {
    tokens: u32,
    /// How many tokens are known when the process ends of it.
    fatal: Option<u32>,
}

#[derive(Debug)]
struct Slot {
    generation: SlotGeneration,
    seed: u64,
    choice: u32,
    logprobs: bool,
    known: u32,
    computed: u32,
    decoding: bool,
    fatal: Option<u32>,
}

impl Fake {
    /// A fake that draws from `vocab` tokens, one rank of a mesh.
    #[must_use]
    pub fn new(vocab: u32, cost: FakeCost, seat: Seat) -> Self {
        let (uploads, slots) = (BTreeMap::new(), BTreeMap::new());
        Self { cost, poison: None, vocab, seat, uploads, slots, done: None }
    }

    /// The same with a poison: the process ends in the step that runs a request in which so many tokens
    /// ([`POISON_AFTER`]) stand behind this one.
    #[must_use]
    pub fn with_poison(self, poison: Option<TokenId>) -> Self {
        Self { poison, ..self }
    }

    fn apply(&mut self, section: &Section) -> Result<(), WorkerFault> {
        for op in &section.ops {
            match op {
                SlotOp::Admit(admit) => {
                    let uploaded = self.uploads.remove(&admit.request);
                    if uploaded.map(|uploaded| uploaded.tokens) != Some(admit.known.0) {
                        return Err(WorkerFault(format!(
                            "request {} admitted with {} tokens, {uploaded:?} uploaded",
                            admit.request, admit.known
                        )));
                    }
                    let slot = Slot {
                        generation: admit.slot.generation,
                        seed: admit.sampling.seed,
                        choice: admit.sampling.choice,
                        logprobs: admit.sampling.logprobs.is_some(),
                        known: admit.known.0,
                        computed: admit.cached.0,
                        decoding: false,
                        fatal: uploaded.and_then(|uploaded| uploaded.fatal),
                    };
                    self.slots.insert(admit.slot.slot, slot);
                }
                SlotOp::Retire { slot } => {
                    self.slot(*slot)?;
                    self.slots.remove(slot);
                }
                SlotOp::Store { .. } | SlotOp::Load { .. } => {
                    return Err(WorkerFault("this worker offered no host memory".into()));
                }
                SlotOp::Extend { slot, .. } | SlotOp::Trim { slot, .. } => {
                    self.slot(*slot)?;
                }
            }
        }
        for slot in &section.decode.leave {
            self.slot(*slot)?.decoding = false;
        }
        for slot in &section.decode.join {
            self.slot(*slot)?.decoding = true;
        }
        Ok(())
    }

    fn slot(&mut self, slot: SlotId) -> Result<&mut Slot, WorkerFault> {
        self.slots.get_mut(&slot).ok_or_else(|| WorkerFault(format!("slot {slot} is not admitted")))
    }

    fn sample(&mut self, id: SlotId) -> Result<Sampled, WorkerFault> {
        let vocab = self.vocab;
        let slot = self.slot(id)?;
        let token = TokenId(draw(slot.seed, slot.choice, slot.known) % vocab);
        slot.known += 1;
        let chosen = TokenLogprob { token, logprob: -1.0, rank: 1 };
        Ok(Sampled {
            slot: id,
            generation: slot.generation,
            token,
            fault: None,
            logprobs: slot.logprobs.then(|| Box::new(Logprobs { chosen, top: vec![chosen] })),
        })
    }
}

impl Stepper for Fake {
    fn hello(&self) -> Hello {
        Hello {
            architecture: "Fake".into(),
            vocab: self.vocab,
            max_context: Tokens(1 << 20),
            groups: vec![GroupSpec {
                group: GroupId(0),
                kind: GroupKind::Full,
                block_bytes: Bytes(64),
            }],
            cache_bytes: Bytes(64 << 16),
            alignment: Bytes(64),
            backend: "fake".into(),
            seat: self.seat,
            weight_bytes: Bytes(0),
            host_bytes: Bytes(0),
        }
    }

    fn configure(&mut self, _: &Configure) -> Result<(), WorkerFault> {
        Ok(())
    }

    fn upload(&mut self, upload: &Upload) -> Result<(), WorkerFault> {
        let count = u32::try_from(upload.tokens.len())
            .map_err(|_| WorkerFault("an upload of more than 2^32 tokens".into()))?;
        let held = self.uploads.entry(upload.request).or_default();
        if upload.offset.0 == 0 {
            *held = Uploaded::default();
        }
        if held.tokens != upload.offset.0 {
            return Err(WorkerFault(format!(
                "request {}: upload at {} after {} tokens",
                upload.request, upload.offset, held.tokens
            )));
        }
        if let Some(poison) = self.poison
            && let Some(at) = (held.tokens..).zip(upload.tokens.iter()).find(|it| *it.1 == poison)
        {
            held.fatal.get_or_insert(at.0 + POISON_AFTER);
        }
        held.tokens += count;
        Ok(())
    }

    fn forget(&mut self, request: RequestId) {
        self.uploads.remove(&request);
    }

    fn in_flight(&self) -> usize {
        usize::from(self.done.is_some())
    }

    fn accepts(&self) -> bool {
        self.done.is_none()
    }

    fn enqueue(&mut self, plan: &StepPlan) -> Result<(), WorkerFault> {
        self.done = Some(self.step(plan)?);
        Ok(())
    }

    fn ready(&self) -> Result<bool, WorkerFault> {
        Ok(self.done.is_some())
    }

    fn collect(&mut self) -> Result<Option<Outcome>, WorkerFault> {
        Ok(self.done.take())
    }
}

impl Fake {
    fn step(&mut self, plan: &StepPlan) -> Result<Outcome, WorkerFault> {
        let started = Instant::now();
        let mut sampled = Vec::new();
        let mut prefill_tokens = 0;
        let shards = plan.sections.len();
        if shards != self.seat.mesh.dp as usize {
            return Err(WorkerFault(format!("{shards} sections for {}", self.seat.mesh)));
        }
        let section = &plan.sections[self.seat.shard().index()];
        self.apply(section)?;
        let in_prefill = |id: &SlotId| section.prefill.iter().any(|run| run.slot == *id);
        let decoding: Vec<SlotId> = self
            .slots
            .iter()
            .filter(|(id, slot)| slot.decoding && !in_prefill(id))
            .map(|(id, _)| *id)
            .collect();
        for run in &section.prefill {
            let slot = self.slot(run.slot)?;
            slot.computed += run.tokens.0;
            if slot.computed > slot.known || run.sample != (slot.computed == slot.known) {
                return Err(WorkerFault(format!("slot {}: chunk past its tokens", run.slot)));
            }
            prefill_tokens += run.tokens.0;
            if run.sample {
                sampled.push(self.sample(run.slot)?);
            }
        }
        for id in &decoding {
            self.slot(*id)?.computed += 1;
            sampled.push(self.sample(*id)?);
        }
        let tokens = prefill_tokens + u32::try_from(decoding.len()).unwrap_or(u32::MAX);
        if plan.shard_tokens.get(self.seat.shard().index()) != Some(&Tokens(tokens)) {
            return Err(WorkerFault(format!("{tokens} tokens run, not those announced")));
        }
        if let Some(own) = self.poisoned(section, &decoding) {
            let all: u32 = plan.shard_tokens.iter().map(|tokens| tokens.0).sum();
            tracing::error!(step = plan.seq.0, beside = all - own, "poisoned");
            std::process::exit(POISONED);
        }
        let cost = self.cost.base
            + self.cost.per_decode * (tokens - prefill_tokens)
            + self.cost.per_prefill * prefill_tokens;
        std::thread::sleep(cost.saturating_sub(started.elapsed()));
        let total_ns = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        Ok(Outcome {
            seq: plan.seq,
            incarnation: plan.incarnation,
            sampled,
            prompt_logprobs: Vec::new(),
            timing: StepTiming {
                total_ns,
                model_ns: total_ns,
                tokens,
                prefill_tokens,
                ..StepTiming::default()
            },
            digest: plan.seq.0,
        })
    }
}

impl Fake {
    /// The tokens that a request has in this step whose poison strikes.
    fn poisoned(&self, section: &Section, decoding: &[SlotId]) -> Option<u32> {
        let runs = section.prefill.iter().map(|run| (run.slot, run.tokens.0));
        let mut runs = runs.chain(decoding.iter().map(|slot| (*slot, 1)));
        let struck = |slot: &Slot| slot.fatal.is_some_and(|fatal| slot.known > fatal);
        runs.find(|(slot, _)| self.slots.get(slot).is_some_and(struck)).map(|(_, tokens)| tokens)
    }
}

/// A well-mixed number from seed, choice and position.
fn draw(seed: u64, choice: u32, position: u32) -> u32 {
    let mut z = seed ^ (u64::from(choice) << 32 | u64::from(position));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (z >> 32) as u32
}
