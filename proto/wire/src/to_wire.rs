//! From `step` types to messages. Total: every value of the inner types has a message.

use crate::pb;
use ids::TokenId;
use step::{
    Admit, Configure, GroupKind, Hello, Logprobs, Outcome, PromptLogprobs, SampleFault, Sampling,
    Section, SlotOp, StartPhase, StepPlan, ToScheduler, ToWorker, TokenLogprob, Upload,
};

impl From<ToWorker> for pb::ToWorker {
    fn from(message: ToWorker) -> Self {
        use pb::to_worker::Message;
        let message = match message {
            ToWorker::Configure(c) => Message::Configure(configure(&c)),
            ToWorker::Upload(u) => Message::Upload(upload(&u)),
            ToWorker::Forget(incarnation, request) => {
                Message::Forget(pb::Forget { incarnation: incarnation.0, request: request.0 })
            }
            ToWorker::Step(plan) => Message::Step(step_plan(&plan)),
        };
        Self { message: Some(message) }
    }
}

impl From<ToScheduler> for pb::ToScheduler {
    fn from(message: ToScheduler) -> Self {
        use pb::to_scheduler::Message;
        let message = match message {
            ToScheduler::Loading(p) => Message::Loading(pb::LoadProgress {
                stage: p.stage,
                done: p.done.0,
                total: p.total.0,
            }),
            ToScheduler::Started(phase, took) => Message::Started(pb::Started {
                phase: start_phase(phase).into(),
                nanos: u64::try_from(took.as_nanos()).unwrap_or(u64::MAX),
            }),
            ToScheduler::Hello(h) => Message::Hello(hello(h)),
            ToScheduler::Ready(incarnation) => {
                Message::Ready(pb::Ready { incarnation: incarnation.0 })
            }
            ToScheduler::Outcome(o) => Message::Outcome(outcome(&o)),
            ToScheduler::Fault(message) => Message::Fault(pb::Fault { message }),
        };
        Self { message: Some(message) }
    }
}

/// Appends the message of a step as it travels to a worker: what the session does with a plan, for
/// those who measure it without a session.
pub fn encode_step(plan: &StepPlan, into: &mut Vec<u8>) {
    let message = pb::to_worker::Message::Step(step_plan(plan));
    crate::codec::append(&pb::ToWorker { message: Some(message) }, into);
}

fn raw(tokens: &[TokenId]) -> Vec<u32> {
    tokens.iter().map(|t| t.0).collect()
}

fn configure(c: &Configure) -> pb::Configure {
    pb::Configure {
        incarnation: c.incarnation.0,
        max_slots: c.max_slots,
        max_step_tokens: c.max_step_tokens.0,
        max_context: c.max_context.0,
        super_bytes: c.carving.super_bytes.0,
        supers: c.carving.supers,
        per_super: c.carving.per_super.clone(),
        host_blocks: c.carving.host_blocks,
    }
}

fn upload(u: &Upload) -> pb::Upload {
    pb::Upload {
        incarnation: u.incarnation.0,
        request: u.request.0,
        offset: u.offset.0,
        tokens: raw(&u.tokens),
    }
}

fn step_plan(plan: &StepPlan) -> pb::StepPlan {
    pb::StepPlan {
        seq: plan.seq.0,
        incarnation: plan.incarnation.0,
        bucket: plan.bucket.0,
        shard_tokens: plan.shard_tokens.iter().map(|t| t.0).collect(),
        sections: plan.sections.iter().map(section).collect(),
    }
}

fn section(s: &Section) -> pb::Section {
    pb::Section {
        ops: s.ops.iter().map(slot_op).collect(),
        prefill: s
            .prefill
            .iter()
            .map(|p| pb::PrefillRun { slot: p.slot.0, tokens: p.tokens.0, sample: p.sample })
            .collect(),
        decode_join: s.decode.join.iter().map(|slot| slot.0).collect(),
        decode_leave: s.decode.leave.iter().map(|slot| slot.0).collect(),
    }
}

fn slot_op(op: &SlotOp) -> pb::SlotOp {
    use pb::slot_op::Op;
    let op = match op {
        SlotOp::Admit(a) => Op::Admit(admit(a)),
        SlotOp::Extend { slot, blocks } => Op::Extend(pb::Extend {
            slot: slot.0,
            groups: blocks.iter().map(|b| u32::from(b.group.0)).collect(),
            blocks: blocks.iter().map(|b| b.block.0).collect(),
        }),
        SlotOp::Trim { slot, group, first_live } => {
            Op::Trim(pb::Trim { slot: slot.0, group: group.0.into(), first_live: *first_live })
        }
        SlotOp::Retire { slot } => Op::Retire(pb::Retire { slot: slot.0 }),
        SlotOp::Store { group, block, at } => {
            Op::Store(pb::BlockCopy { group: group.0.into(), block: block.0, at: at.0 })
        }
        SlotOp::Load { at, block } => {
            Op::Load(pb::BlockCopy { at: at.0, group: block.group.0.into(), block: block.block.0 })
        }
    };
    pb::SlotOp { op: Some(op) }
}

fn admit(a: &Admit) -> pb::Admit {
    pb::Admit {
        slot: a.slot.slot.0,
        generation: a.slot.generation.0,
        request: a.request.0,
        known: a.known.0,
        prompt: a.prompt.0,
        cached: a.cached.0,
        tables: a
            .tables
            .iter()
            .map(|t| pb::GroupTable {
                group: t.group.0.into(),
                skipped: t.skipped,
                blocks: t.blocks.iter().map(|b| b.0).collect(),
            })
            .collect(),
        sampling: Some(sampling(&a.sampling)),
        prompt_logprobs: a.prompt_logprobs.map(u32::from),
    }
}

fn sampling(s: &Sampling) -> pb::Sampling {
    pb::Sampling {
        temperature: s.temperature,
        top_k: s.top_k,
        top_p: s.top_p,
        min_p: s.min_p,
        seed: s.seed,
        choice: s.choice,
        repetition_penalty: s.repetition_penalty,
        presence_penalty: s.presence_penalty,
        frequency_penalty: s.frequency_penalty,
        bias_tokens: s.logit_bias.iter().map(|(token, _)| token.0).collect(),
        bias_values: s.logit_bias.iter().map(|(_, bias)| *bias).collect(),
        min_tokens: s.min_tokens.0,
        banned_before_min: raw(&s.banned_before_min),
        logprobs: s.logprobs.map(u32::from),
    }
}

fn start_phase(phase: StartPhase) -> pb::started::Phase {
    use pb::started::Phase;
    match phase {
        StartPhase::Device => Phase::Device,
        StartPhase::Kernels => Phase::Kernels,
        StartPhase::Weights => Phase::Weights,
        StartPhase::Memory => Phase::Memory,
        StartPhase::Graphs => Phase::Graphs,
    }
}

fn hello(h: Hello) -> pb::Hello {
    pb::Hello {
        architecture: h.architecture,
        vocab: h.vocab,
        max_context: h.max_context.0,
        groups: h
            .groups
            .iter()
            .map(|g| pb::GroupSpec {
                group: g.group.0.into(),
                window: match g.kind {
                    GroupKind::Full => None,
                    GroupKind::Sliding { window } => Some(window.0),
                },
                block_bytes: g.block_bytes.0,
            })
            .collect(),
        cache_bytes: h.cache_bytes.0,
        alignment: h.alignment.0,
        backend: h.backend,
        seat: Some(pb::Seat {
            dp: h.seat.mesh.dp,
            tp: h.seat.mesh.tp,
            expert_parallel: h.seat.mesh.expert_parallel,
            rank: h.seat.rank.0,
        }),
        weight_bytes: h.weight_bytes.0,
        host_bytes: h.host_bytes.0,
    }
}

fn outcome(o: &Outcome) -> pb::Outcome {
    let mut faults = Vec::new();
    let mut indexed = Vec::new();
    for (index, sampled) in (0_u32..).zip(&o.sampled) {
        if let Some(fault) = sampled.fault {
            let kind = match fault {
                SampleFault::NotANumber => pb::sample_fault::Kind::NotANumber,
                SampleFault::NothingAllowed => pb::sample_fault::Kind::NothingAllowed,
            };
            faults.push(pb::SampleFault { index, kind: kind.into() });
        }
        if let Some(l) = &sampled.logprobs {
            indexed.push(pb::IndexedLogprobs { index, logprobs: Some(logprobs(l)) });
        }
    }
    pb::Outcome {
        seq: o.seq.0,
        incarnation: o.incarnation.0,
        slots: o.sampled.iter().map(|s| s.slot.0).collect(),
        generations: o.sampled.iter().map(|s| s.generation.0).collect(),
        tokens: o.sampled.iter().map(|s| s.token.0).collect(),
        faults,
        logprobs: indexed,
        prompt_logprobs: o.prompt_logprobs.iter().map(prompt_logprobs).collect(),
        total_ns: o.timing.total_ns,
        model_ns: o.timing.model_ns,
        step_tokens: o.timing.tokens,
        prefill_tokens: o.timing.prefill_tokens,
        idle_ns: o.timing.idle_ns,
        launches: o.timing.launches,
        host_draws: o.timing.host_draws,
        graphs: o.timing.graphs,
        uncaptured: o.timing.uncaptured,
        digest: o.digest,
    }
}

fn logprobs(l: &Logprobs) -> pb::Logprobs {
    let all = || std::iter::once(&l.chosen).chain(&l.top);
    pb::Logprobs {
        tokens: all().map(|t: &TokenLogprob| t.token.0).collect(),
        logprobs: all().map(|t| t.logprob).collect(),
        ranks: all().map(|t| t.rank).collect(),
    }
}

fn prompt_logprobs(p: &PromptLogprobs) -> pb::PromptLogprobs {
    pb::PromptLogprobs {
        request: p.request.0,
        first: p.first.0,
        entries: p.entries.iter().map(logprobs).collect(),
    }
}
