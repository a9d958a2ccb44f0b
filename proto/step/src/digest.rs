//! The digest by which ranks of a group find out that they disagree: over commands in the order of the
//! stream, then over sampled ids. Both sides compute it from `step` types, so that it does not depend on
//! how those travel.
//!
//! 64 bits, mixed word by word; it is no defence against intent. Invariant: of two streams that differ
//! in one word the digests differ, and stay different whatever equal words follow.

use crate::{Configure, Sampled, Sampling, Section, SlotOp, StepPlan, ToWorker, Upload};
use ids::{Incarnation, StepSeq};

const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
/// Odd, so that multiplication loses nothing.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// A running digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest(u64);

impl Default for Digest {
    fn default() -> Self {
        Self::none()
    }
}

impl Digest {
    /// Over nothing.
    #[must_use]
    pub const fn none() -> Self {
        Self(OFFSET)
    }

    /// Over one plan.
    #[must_use]
    pub fn of_plan(plan: &StepPlan) -> Self {
        let mut digest = Self::none();
        digest.plan(plan);
        digest
    }

    /// Goes on over a command.
    pub fn take(&mut self, command: &ToWorker) {
        match command {
            ToWorker::Configure(configure) => self.configure(configure),
            ToWorker::Upload(upload) => self.upload(upload),
            ToWorker::Forget(incarnation, request) => {
                self.word(2);
                self.word(incarnation.0);
                self.word(request.0);
            }
            ToWorker::Step(plan) => self.plan(plan),
        }
    }

    /// What an outcome says: what was taken until now and what was sampled.
    #[must_use]
    pub fn with_sampled(mut self, sampled: &[Sampled]) -> u64 {
        for one in sampled {
            self.pair(one.slot.0, one.generation.0);
            self.pair(one.token.0, u32::from(one.fault.is_some()));
        }
        self.0
    }

    /// Each part is a bijection of the state, and of the word, so nothing that differs becomes equal.
    fn word(&mut self, word: u64) {
        let mixed = (self.0 ^ word).wrapping_mul(FACTOR);
        self.0 = mixed ^ (mixed >> 32);
    }

    fn pair(&mut self, high: u32, low: u32) {
        self.word(u64::from(high) << 32 | u64::from(low));
    }

    fn configure(&mut self, configure: &Configure) {
        self.word(0);
        self.word(configure.incarnation.0);
        self.pair(configure.max_slots, configure.max_step_tokens.0);
        self.pair(configure.max_context.0, configure.carving.supers);
        self.word(configure.carving.super_bytes.0);
        self.word(configure.carving.per_super.len() as u64);
        for blocks in &configure.carving.per_super {
            self.word(u64::from(*blocks));
        }
        self.word(u64::from(configure.carving.host_blocks));
    }

    fn upload(&mut self, upload: &Upload) {
        self.word(1);
        self.word(upload.incarnation.0);
        self.word(upload.request.0);
        self.pair(upload.offset.0, u32::try_from(upload.tokens.len()).unwrap_or(u32::MAX));
        let pairs = upload.tokens.chunks_exact(2);
        let last = pairs.remainder();
        for pair in pairs {
            self.pair(pair[0].0, pair[1].0);
        }
        for token in last {
            self.word(u64::from(token.0));
        }
    }

    fn plan(&mut self, plan: &StepPlan) {
        let (StepSeq(seq), Incarnation(incarnation)) = (plan.seq, plan.incarnation);
        self.word(3);
        self.word(seq);
        self.word(incarnation);
        self.word(u64::from(plan.bucket.0));
        for tokens in &plan.shard_tokens {
            self.word(u64::from(tokens.0));
        }
        self.word(plan.sections.len() as u64);
        for section in &plan.sections {
            self.section(section);
        }
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
            SlotOp::Store { group, block, at } => {
                self.pair(4, u32::from(group.0));
                self.pair(block.0, at.0);
            }
            SlotOp::Load { at, block } => {
                self.pair(5, u32::from(block.group.0));
                self.pair(block.block.0, at.0);
            }
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

#[cfg(test)]
mod tests {
    use super::*;
    use ids::{RequestId, SlotGeneration, SlotId, TokenId, Tokens};

    fn upload(tokens: &[u32]) -> ToWorker {
        ToWorker::Upload(Upload {
            incarnation: Incarnation(1),
            request: RequestId(7),
            offset: Tokens(0),
            tokens: tokens.iter().copied().map(TokenId).collect(),
        })
    }

    fn after(commands: &[ToWorker]) -> Digest {
        let mut digest = Digest::none();
        commands.iter().for_each(|command| digest.take(command));
        digest
    }

    #[test]
    fn one_token_one_command_or_another_order_is_another_digest() {
        let (a, b) = (upload(&[1, 2, 3]), ToWorker::Forget(Incarnation(1), RequestId(8)));
        let all = after(&[a.clone(), b.clone()]);
        assert_eq!(all, after(&[a.clone(), b.clone()]));
        for other in [
            vec![a.clone()],
            vec![b.clone()],
            vec![b.clone(), a.clone()],
            vec![upload(&[1, 2, 4]), b.clone()],
            vec![upload(&[2, 1, 3]), b.clone()],
            vec![upload(&[1, 2, 3, 0]), b.clone()],
            vec![a.clone(), ToWorker::Forget(Incarnation(2), RequestId(8))],
        ] {
            assert_ne!(all, after(&other), "{other:?}");
        }
    }

    #[test]
    fn what_was_sampled_counts() {
        let one = Sampled {
            slot: SlotId(1),
            generation: SlotGeneration(1),
            token: TokenId(5),
            fault: None,
            logprobs: None,
        };
        let other = Sampled { token: TokenId(6), ..one.clone() };
        let digest = Digest::none();
        let one = std::slice::from_ref(&one);
        assert_ne!(digest.with_sampled(one), digest.with_sampled(&[other]));
        assert_ne!(digest.with_sampled(one), digest.with_sampled(&[]));
    }
}
