//! From messages to `step` types. A message that does not convert whole is [`Malformed`]; nothing
//! is defaulted, clamped or dropped.

use crate::pb;
use ids::{
    BlockId, Bytes, GroupId, Incarnation, Rank, RequestId, SlotGeneration, SlotId, StepSeq,
    TierSlot, TokenId, Tokens,
};
use std::sync::Arc;
use std::time::Duration;
use step::{
    Admit, Carving, Configure, DecodeDelta, GroupKind, GroupSpec, GroupTable, Hello, LoadProgress,
    Logprobs, Mesh, Outcome, PrefillRun, PromptLogprobs, SampleFault, Sampled, Sampling, Seat,
    Section, SlotOp, SlotRef, StartPhase, StepPlan, StepTiming, ToScheduler, ToWorker,
    TokenLogprob, Upload, WriteSlot,
};

/// Why a message is refused. The peer speaks another protocol or is broken; the stream ends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A part that must be there is not.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// Arrays that run in parallel differ in length.
    #[error("{0} differ in length")]
    Lengths(&'static str),
    /// A number outside of its type's range.
    #[error("{field} is {value}, which is out of range")]
    Range {
        /// The field.
        field: &'static str,
        /// What was sent.
        value: u64,
    },
}

impl TryFrom<pb::ToWorker> for ToWorker {
    type Error = Malformed;

    fn try_from(message: pb::ToWorker) -> Result<Self, Malformed> {
        use pb::to_worker::Message;
        Ok(match message.message.ok_or(Malformed::Missing("ToWorker.message"))? {
            Message::Configure(c) => Self::Configure(configure(c)),
            Message::Upload(u) => Self::Upload(upload(u)),
            Message::Forget(f) => Self::Forget(Incarnation(f.incarnation), RequestId(f.request)),
            Message::Step(plan) => Self::Step(Arc::new(step_plan(plan)?)),
        })
    }
}

impl TryFrom<pb::ToScheduler> for ToScheduler {
    type Error = Malformed;

    fn try_from(message: pb::ToScheduler) -> Result<Self, Malformed> {
        use pb::to_scheduler::Message;
        Ok(match message.message.ok_or(Malformed::Missing("ToScheduler.message"))? {
            Message::Loading(p) => Self::Loading(LoadProgress {
                stage: p.stage,
                done: Bytes(p.done),
                total: Bytes(p.total),
            }),
            Message::Started(s) => {
                Self::Started(start_phase(s.phase())?, Duration::from_nanos(s.nanos))
            }
            Message::Hello(h) => Self::Hello(hello(h)?),
            Message::Ready(r) => Self::Ready(Incarnation(r.incarnation)),
            Message::Outcome(o) => Self::Outcome(outcome(o)?),
            Message::Fault(f) => Self::Fault(f.message),
        })
    }
}

fn start_phase(phase: pb::started::Phase) -> Result<StartPhase, Malformed> {
    use pb::started::Phase;
    match phase {
        Phase::Unspecified => Err(Malformed::Missing("start phase")),
        Phase::Device => Ok(StartPhase::Device),
        Phase::Kernels => Ok(StartPhase::Kernels),
        Phase::Weights => Ok(StartPhase::Weights),
        Phase::Memory => Ok(StartPhase::Memory),
        Phase::Graphs => Ok(StartPhase::Graphs),
    }
}

fn byte(field: &'static str, value: u32) -> Result<u8, Malformed> {
    u8::try_from(value).map_err(|_| Malformed::Range { field, value: value.into() })
}

fn group(value: u32) -> Result<GroupId, Malformed> {
    byte("group", value).map(GroupId)
}

fn tokens(raw: Vec<u32>) -> Arc<[TokenId]> {
    raw.into_iter().map(TokenId).collect()
}

fn configure(c: pb::Configure) -> Configure {
    Configure {
        incarnation: Incarnation(c.incarnation),
        max_slots: c.max_slots,
        max_step_tokens: Tokens(c.max_step_tokens),
        max_context: Tokens(c.max_context),
        carving: Carving {
            super_bytes: Bytes(c.super_bytes),
            supers: c.supers,
            per_super: c.per_super,
            host_blocks: c.host_blocks,
        },
    }
}

fn upload(u: pb::Upload) -> Upload {
    Upload {
        incarnation: Incarnation(u.incarnation),
        request: RequestId(u.request),
        offset: Tokens(u.offset),
        tokens: tokens(u.tokens),
    }
}

fn step_plan(plan: pb::StepPlan) -> Result<StepPlan, Malformed> {
    if plan.shard_tokens.len() != plan.sections.len() {
        return Err(Malformed::Lengths("shard_tokens and sections"));
    }
    Ok(StepPlan {
        seq: StepSeq(plan.seq),
        incarnation: Incarnation(plan.incarnation),
        bucket: Tokens(plan.bucket),
        shard_tokens: plan.shard_tokens.into_iter().map(Tokens).collect(),
        sections: plan.sections.into_iter().map(section).collect::<Result<_, _>>()?,
    })
}

fn section(s: pb::Section) -> Result<Section, Malformed> {
    let slots = |raw: Vec<u32>| raw.into_iter().map(SlotId).collect();
    Ok(Section {
        ops: s.ops.into_iter().map(slot_op).collect::<Result<_, _>>()?,
        prefill: s
            .prefill
            .into_iter()
            .map(|p| PrefillRun {
                slot: SlotId(p.slot),
                tokens: Tokens(p.tokens),
                sample: p.sample,
            })
            .collect(),
        decode: DecodeDelta { join: slots(s.decode_join), leave: slots(s.decode_leave) },
    })
}

fn slot_op(op: pb::SlotOp) -> Result<SlotOp, Malformed> {
    use pb::slot_op::Op;
    Ok(match op.op.ok_or(Malformed::Missing("SlotOp.op"))? {
        Op::Admit(a) => SlotOp::Admit(Box::new(admit(a)?)),
        Op::Extend(e) => {
            if e.groups.len() != e.blocks.len() {
                return Err(Malformed::Lengths("Extend.groups and Extend.blocks"));
            }
            let blocks = e
                .groups
                .into_iter()
                .zip(e.blocks)
                .map(|(g, b)| Ok(WriteSlot { group: group(g)?, block: BlockId(b) }))
                .collect::<Result<_, _>>()?;
            SlotOp::Extend { slot: SlotId(e.slot), blocks }
        }
        Op::Trim(t) => {
            SlotOp::Trim { slot: SlotId(t.slot), group: group(t.group)?, first_live: t.first_live }
        }
        Op::Retire(r) => SlotOp::Retire { slot: SlotId(r.slot) },
        Op::Store(s) => {
            SlotOp::Store { group: group(s.group)?, block: BlockId(s.block), at: TierSlot(s.at) }
        }
        Op::Load(l) => SlotOp::Load {
            at: TierSlot(l.at),
            block: WriteSlot { group: group(l.group)?, block: BlockId(l.block) },
        },
    })
}

fn admit(a: pb::Admit) -> Result<Admit, Malformed> {
    Ok(Admit {
        slot: SlotRef { slot: SlotId(a.slot), generation: SlotGeneration(a.generation) },
        request: RequestId(a.request),
        known: Tokens(a.known),
        prompt: Tokens(a.prompt),
        cached: Tokens(a.cached),
        tables: a
            .tables
            .into_iter()
            .map(|t| {
                Ok(GroupTable {
                    group: group(t.group)?,
                    skipped: t.skipped,
                    blocks: t.blocks.into_iter().map(BlockId).collect(),
                })
            })
            .collect::<Result<_, _>>()?,
        sampling: Arc::new(sampling(a.sampling.ok_or(Malformed::Missing("Admit.sampling"))?)?),
        prompt_logprobs: a.prompt_logprobs.map(|n| byte("prompt_logprobs", n)).transpose()?,
    })
}

fn sampling(s: pb::Sampling) -> Result<Sampling, Malformed> {
    if s.bias_tokens.len() != s.bias_values.len() {
        return Err(Malformed::Lengths("bias_tokens and bias_values"));
    }
    Ok(Sampling {
        temperature: s.temperature,
        top_k: s.top_k,
        top_p: s.top_p,
        min_p: s.min_p,
        seed: s.seed,
        choice: s.choice,
        repetition_penalty: s.repetition_penalty,
        presence_penalty: s.presence_penalty,
        frequency_penalty: s.frequency_penalty,
        logit_bias: s.bias_tokens.into_iter().map(TokenId).zip(s.bias_values).collect(),
        min_tokens: Tokens(s.min_tokens),
        banned_before_min: tokens(s.banned_before_min),
        logprobs: s.logprobs.map(|n| byte("logprobs", n)).transpose()?,
    })
}

fn hello(h: pb::Hello) -> Result<Hello, Malformed> {
    Ok(Hello {
        architecture: h.architecture,
        vocab: h.vocab,
        max_context: Tokens(h.max_context),
        groups: h
            .groups
            .into_iter()
            .map(|g| {
                let kind =
                    g.window.map_or(GroupKind::Full, |w| GroupKind::Sliding { window: Tokens(w) });
                Ok(GroupSpec { group: group(g.group)?, kind, block_bytes: Bytes(g.block_bytes) })
            })
            .collect::<Result<_, _>>()?,
        cache_bytes: Bytes(h.cache_bytes),
        alignment: Bytes(h.alignment),
        backend: h.backend,
        seat: seat(h.seat.ok_or(Malformed::Missing("Hello.seat"))?)?,
        weight_bytes: Bytes(h.weight_bytes),
        host_bytes: Bytes(h.host_bytes),
    })
}

fn seat(s: pb::Seat) -> Result<Seat, Malformed> {
    let mesh = Mesh { dp: s.dp, tp: s.tp, expert_parallel: s.expert_parallel };
    let world = mesh.world().ok_or(Malformed::Range { field: "dp", value: s.dp.into() })?;
    if s.rank >= world {
        return Err(Malformed::Range { field: "rank", value: s.rank.into() });
    }
    Ok(Seat { mesh, rank: Rank(s.rank) })
}

fn outcome(o: pb::Outcome) -> Result<Outcome, Malformed> {
    if o.slots.len() != o.tokens.len() || o.slots.len() != o.generations.len() {
        return Err(Malformed::Lengths("slots, generations and tokens"));
    }
    let mut sampled: Vec<Sampled> = o
        .slots
        .into_iter()
        .zip(o.generations)
        .zip(o.tokens)
        .map(|((slot, generation), token)| Sampled {
            slot: SlotId(slot),
            generation: SlotGeneration(generation),
            token: TokenId(token),
            fault: None,
            logprobs: None,
        })
        .collect();
    for fault in o.faults {
        let kind = match fault.kind() {
            pb::sample_fault::Kind::NotANumber => SampleFault::NotANumber,
            pb::sample_fault::Kind::NothingAllowed => SampleFault::NothingAllowed,
            pb::sample_fault::Kind::Unspecified => return Err(Malformed::Missing("fault kind")),
        };
        at(&mut sampled, fault.index)?.fault = Some(kind);
    }
    for entry in o.logprobs {
        let parsed = logprobs(entry.logprobs.ok_or(Malformed::Missing("logprobs"))?)?;
        at(&mut sampled, entry.index)?.logprobs = Some(Box::new(parsed));
    }
    Ok(Outcome {
        seq: StepSeq(o.seq),
        incarnation: Incarnation(o.incarnation),
        sampled,
        prompt_logprobs: o
            .prompt_logprobs
            .into_iter()
            .map(|p| {
                Ok(PromptLogprobs {
                    request: RequestId(p.request),
                    first: Tokens(p.first),
                    entries: p.entries.into_iter().map(logprobs).collect::<Result<_, _>>()?,
                })
            })
            .collect::<Result<_, _>>()?,
        timing: StepTiming {
            total_ns: o.total_ns,
            model_ns: o.model_ns,
            tokens: o.step_tokens,
            prefill_tokens: o.prefill_tokens,
            idle_ns: o.idle_ns,
            launches: o.launches,
            host_draws: o.host_draws,
            graphs: o.graphs,
            uncaptured: o.uncaptured,
        },
        digest: o.digest,
    })
}

fn at(sampled: &mut [Sampled], index: u32) -> Result<&mut Sampled, Malformed> {
    sampled.get_mut(index as usize).ok_or(Malformed::Range { field: "index", value: index.into() })
}

fn logprobs(l: pb::Logprobs) -> Result<Logprobs, Malformed> {
    if l.tokens.len() != l.logprobs.len() || l.tokens.len() != l.ranks.len() {
        return Err(Malformed::Lengths("tokens, logprobs and ranks"));
    }
    let mut all = l
        .tokens
        .into_iter()
        .zip(l.logprobs)
        .zip(l.ranks)
        .map(|((token, logprob), rank)| TokenLogprob { token: TokenId(token), logprob, rank });
    let chosen = all.next().ok_or(Malformed::Missing("the chosen token"))?;
    Ok(Logprobs { chosen, top: all.collect() })
}
