//! The digest by which ranks of a group find out that they disagree: over the plan's content and
//! the sampled ids, in a canonical order of bytes. 64-bit FNV-1a; it is no defence against intent.

use ids::{Incarnation, StepSeq};
use step::{Sampled, Sampling, Section, SlotOp, StepPlan};

const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const PRIME: u64 = 0x0000_0100_0000_01b3;

/// A running digest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Digest(u64);

impl Digest {
    /// Over nothing.
    pub(crate) const fn none() -> Self {
        Self(OFFSET)
    }

    /// Over the plan.
    pub(crate) fn of_plan(plan: &StepPlan) -> Self {
        let mut digest = Self::none();
        let (StepSeq(seq), Incarnation(incarnation)) = (plan.seq, plan.incarnation);
        digest.word(seq);
        digest.word(incarnation);
        digest.word(u64::from(plan.bucket.0));
        for tokens in &plan.shard_tokens {
            digest.word(u64::from(tokens.0));
        }
        for section in &plan.sections {
            digest.section(section);
        }
        digest
    }

    /// Over the plan and what was sampled.
    pub(crate) fn with_sampled(mut self, sampled: &[Sampled]) -> u64 {
        for one in sampled {
            self.pair(one.slot.0, one.generation.0);
            self.pair(one.token.0, u32::from(one.fault.is_some()));
        }
        self.0
    }

    fn word(&mut self, word: u64) {
        for byte in word.to_le_bytes() {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(PRIME);
        }
    }

    fn pair(&mut self, high: u32, low: u32) {
        self.word(u64::from(high) << 32 | u64::from(low));
    }

    /// Lengths go before lists, so that no two plans have the same bytes.
    fn section(&mut self, section: &Section) {
        self.word(section.ops.len() as u64);
        for op in &section.ops {
            self.op(op);
        }
        self.word(section.prefill.len() as u64);
        for run in &section.prefill {
            self.pair(run.slot.0, run.tokens.0);
            self.word(u64::from(run.sample));
        }
        for set in [&section.decode.join, &section.decode.leave] {
            self.word(set.len() as u64);
            for slot in set {
                self.word(u64::from(slot.0));
            }
        }
    }

    fn op(&mut self, op: &SlotOp) {
        match op {
            SlotOp::Admit(admit) => {
                self.pair(0, admit.slot.slot.0);
                self.pair(admit.slot.generation.0, admit.known.0);
                self.pair(admit.prompt.0, admit.cached.0);
                self.word(admit.request.0);
                self.word(admit.tables.len() as u64);
                for table in &admit.tables {
                    self.pair(u32::from(table.group.0), table.skipped);
                    self.word(table.blocks.len() as u64);
                    for block in &table.blocks {
                        self.word(u64::from(block.0));
                    }
                }
                self.pair(
                    u32::from(admit.prompt_logprobs.is_some()),
                    admit.prompt_logprobs.unwrap_or(0).into(),
                );
                self.sampling(&admit.sampling);
            }
            SlotOp::Extend { slot, blocks } => {
                self.pair(1, slot.0);
                self.word(blocks.len() as u64);
                for block in blocks {
                    self.pair(u32::from(block.group.0), block.block.0);
                }
            }
            SlotOp::Trim { slot, group, first_live } => {
                self.pair(2, slot.0);
                self.pair(u32::from(group.0), *first_live);
            }
            SlotOp::Retire { slot } => self.pair(3, slot.0),
        }
    }

    fn sampling(&mut self, sampling: &Sampling) {
        self.word(sampling.seed);
        self.pair(sampling.choice, sampling.top_k);
        self.pair(sampling.min_tokens.0, sampling.temperature.to_bits());
        self.pair(sampling.top_p.to_bits(), sampling.min_p.to_bits());
        self.pair(sampling.presence_penalty.to_bits(), sampling.frequency_penalty.to_bits());
        let logprobs = sampling.logprobs.map_or(0, |n| u32::from(n) + 1);
        self.pair(sampling.repetition_penalty.to_bits(), logprobs);
        self.word(sampling.logit_bias.len() as u64);
        for (token, bias) in sampling.logit_bias.iter() {
            self.pair(token.0, bias.to_bits());
        }
        self.word(sampling.banned_before_min.len() as u64);
        for token in sampling.banned_before_min.iter() {
            self.word(u64::from(token.0));
        }
    }
}
