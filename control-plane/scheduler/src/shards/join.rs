//! One outcome of a step out of what every rank of a group said of it.
//!
//! A step's tokens are those of each shard's lead. They count once every rank has answered and every digest
//! is the one that follows from the commands that were sent to its shard and the tokens of its lead: then
//! all ranks did the same, and nothing of the step was told to anybody before. It kills nothing.
//! Invariant: steps come out in order, each once, and never one that a rank disagrees about.

use core::fmt;
use ids::{Incarnation, Rank, ShardId, StepSeq};
use std::collections::VecDeque;
use step::{Digest, Mesh, Outcome};

/// The result of one step of a group.
#[derive(Clone, Debug, PartialEq)]
pub struct Joined {
    /// The step.
    pub seq: StepSeq,
    /// The life it was run in.
    pub incarnation: Incarnation,
    /// What each shard's lead said, in the order of shards.
    pub outcomes: Vec<Outcome>,
}

/// A rank that did not do what the others did. The group cannot be trusted any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Divergence {
    /// Digests differ.
    Digest {
        /// The step.
        seq: StepSeq,
        /// The shard in which they do.
        shard: ShardId,
        /// Who differs: from most of the shard where there is a majority, else from its lead.
        ranks: Vec<Rank>,
        /// The shard's lead.
        lead: Rank,
    },
    /// A rank answered what it was not asked, twice, or for another life.
    Unasked {
        /// The rank.
        rank: Rank,
        /// The step it named.
        seq: StepSeq,
    },
}

impl core::error::Error for Divergence {}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Digest { seq, shard, ranks, lead } => {
                let names: Vec<String> = ranks.iter().map(|rank| format!("rank {rank}")).collect();
                let names = names.join(", ");
                write!(f, "step {seq}: {names} of shard {shard} ")?;
                if ranks.contains(lead) {
                    f.write_str("(its lead) ")?;
                } else {
                    write!(f, "(its lead is rank {lead}) ")?;
                }
                f.write_str("carried out other commands or drew other tokens than the rest")
            }
            Self::Unasked { rank, seq } => {
                write!(f, "rank {rank} answered step {seq}, which it was not asked for now")
            }
        }
    }
}

/// Outcomes on their way to being one.
#[derive(Debug)]
pub struct Join {
    mesh: Mesh,
    incarnation: Incarnation,
    /// Oldest first.
    steps: VecDeque<Awaited>,
    spare: Vec<Awaited>,
}

#[derive(Debug, Default)]
struct Awaited {
    seq: StepSeq,
    /// Over all commands sent to each shard until the step's plan.
    sent: Vec<Digest>,
    /// Of each rank.
    answers: Vec<Option<Outcome>>,
}

impl Awaited {
    fn answer(&self, rank: Rank) -> Option<&Outcome> {
        self.answers.get(rank.index())?.as_ref()
    }
}

impl Join {
    /// For a group of this mesh.
    #[must_use]
    pub fn new(mesh: Mesh) -> Self {
        Self { mesh, incarnation: Incarnation(0), steps: VecDeque::new(), spare: Vec::new() }
    }

    /// A life begins; nothing of an earlier one is waited for.
    pub fn begin(&mut self, incarnation: Incarnation) {
        self.incarnation = incarnation;
        self.spare.extend(self.steps.drain(..));
    }

    /// A plan was sent to every rank; `sent` is what each shard has been told until now, the plan included.
    pub fn sent(&mut self, seq: StepSeq, sent: &[Digest]) {
        let mut step = self.spare.pop().unwrap_or_default();
        step.seq = seq;
        step.sent.clear();
        step.sent.extend_from_slice(sent);
        step.answers.clear();
        step.answers.resize_with(self.mesh.ranks().count(), || None);
        self.steps.push_back(step);
    }

    /// A rank's answer.
    ///
    /// # Errors
    /// When it answers what it was not asked.
    pub fn heard(&mut self, rank: Rank, outcome: Outcome) -> Result<(), Divergence> {
        let seq = outcome.seq;
        let step = self.steps.iter_mut().find(|step| step.seq == seq);
        let asked = step.and_then(|step| step.answers.get_mut(rank.index()));
        match asked {
            Some(answer @ None) if outcome.incarnation == self.incarnation => {
                *answer = Some(outcome);
                Ok(())
            }
            Some(_) | None => Err(Divergence::Unasked { rank, seq }),
        }
    }

    /// The oldest step, once every rank has answered it.
    ///
    /// # Errors
    /// When the ranks do not agree about it; it stays, and nothing of it may be told.
    pub fn whole(&mut self) -> Result<Option<Joined>, Divergence> {
        let Some(step) = self.steps.front() else { return Ok(None) };
        if !step.answers.iter().all(Option::is_some) {
            return Ok(None);
        }
        for (shard, sent) in self.mesh.shards().zip(&step.sent) {
            self.agree(step, shard, *sent)?;
        }
        let Some(mut step) = self.steps.pop_front() else { return Ok(None) };
        let leads = self.mesh.shards().map(|shard| self.mesh.lead(shard));
        let outcomes = leads.filter_map(|lead| step.answers[lead.index()].take()).collect();
        let joined = Joined { seq: step.seq, incarnation: self.incarnation, outcomes };
        self.spare.push(step);
        Ok(Some(joined))
    }

    /// Whether all ranks of a shard did what its lead did, and that what it was told.
    fn agree(&self, step: &Awaited, shard: ShardId, sent: Digest) -> Result<(), Divergence> {
        let lead = self.mesh.lead(shard);
        let members = || self.mesh.members(shard);
        let digest = |rank: Rank| step.answer(rank).map(|outcome| outcome.digest);
        let Some(answer) = step.answer(lead) else { return Ok(()) };
        let expected = Some(sent.with_sampled(&answer.sampled));
        if members().all(|rank| digest(rank) == expected) {
            return Ok(());
        }
        // Whoever most of the shard agrees with is right; without a majority the lead is.
        let agreeing =
            |rank: Rank| members().filter(|other| digest(*other) == digest(rank)).count();
        let majority = members().find(|rank| 2 * agreeing(*rank) > members().count());
        let right = majority.map_or(expected, digest);
        let mut ranks: Vec<Rank> = members().filter(|rank| digest(*rank) != right).collect();
        if ranks.is_empty() {
            // All vouch for the same, and it is not what the lead says that it drew.
            ranks.push(lead);
        }
        Err(Divergence::Digest { seq: step.seq, shard, ranks, lead })
    }

    /// The oldest step without all its answers, and the ranks that owe theirs.
    #[must_use]
    pub fn missing(&self) -> Option<(StepSeq, Vec<Rank>)> {
        let step = self.steps.front()?;
        let owing = step.answers.iter().zip(self.mesh.ranks());
        Some((step.seq, owing.filter(|(a, _)| a.is_none()).map(|(_, rank)| rank).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ids::{SlotGeneration, SlotId, TokenId};
    use step::{Sampled, StepTiming};

    const LIFE: Incarnation = Incarnation(3);

    fn sent(shard: u64) -> Digest {
        let mut digest = Digest::none();
        digest.take(&step::ToWorker::Forget(LIFE, ids::RequestId(shard)));
        digest
    }

    /// What a rank of a shard says that drew `token`.
    fn said(seq: u64, shard: u64, token: u32, lead: bool) -> Outcome {
        let one = Sampled {
            slot: SlotId(0),
            generation: SlotGeneration(1),
            token: TokenId(token),
            fault: None,
            logprobs: None,
        };
        let sampled = vec![one];
        Outcome {
            seq: StepSeq(seq),
            incarnation: LIFE,
            digest: sent(shard).with_sampled(&sampled),
            sampled: if lead { sampled } else { Vec::new() },
            prompt_logprobs: Vec::new(),
            timing: StepTiming::default(),
        }
    }

    fn group(dp: u32, tp: u32) -> Join {
        let mesh = Mesh { dp, tp, expert_parallel: false };
        let mut join = Join::new(mesh);
        join.begin(LIFE);
        let digests: Vec<Digest> = (0..dp).map(|shard| sent(shard.into())).collect();
        for seq in 1..=2 {
            join.sent(StepSeq(seq), &digests);
        }
        join
    }

    #[test]
    fn a_step_comes_out_when_all_have_answered_and_in_order() {
        let mut join = group(2, 2);
        for (rank, shard, lead) in [(1, 0, false), (3, 1, false), (0, 0, true)] {
            join.heard(Rank(rank), said(1, shard, 5 + shard as u32, lead)).expect("asked");
            assert_eq!(join.whole(), Ok(None));
        }
        for (rank, shard, lead) in [(0, 0, true), (1, 0, false), (2, 1, true), (3, 1, false)] {
            if rank != 2 {
                join.heard(Rank(rank), said(2, shard, 7, lead)).expect("asked");
            }
        }
        assert_eq!(join.whole(), Ok(None), "rank 2 owes the first");
        assert_eq!(join.missing(), Some((StepSeq(1), vec![Rank(2)])));
        join.heard(Rank(2), said(1, 1, 6, true)).expect("asked");
        let joined = join.whole().expect("agreed").expect("complete");
        let tokens: Vec<u32> = joined.outcomes.iter().map(|o| o.sampled[0].token.0).collect();
        assert_eq!((joined.seq, tokens), (StepSeq(1), vec![5, 6]));
        assert_eq!(join.whole(), Ok(None));
        join.heard(Rank(2), said(2, 1, 7, true)).expect("asked");
        assert_eq!(join.whole().expect("agreed").map(|joined| joined.seq), Some(StepSeq(2)));
        assert_eq!(join.missing(), None);
    }

    #[test]
    fn a_rank_that_differs_is_named_and_nothing_comes_out() {
        for (tp, wrong) in [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (4, 2)] {
            let mut join = group(1, tp);
            for rank in 0..tp {
                let mut answer = said(1, 0, 5, rank == 0);
                answer.digest ^= u64::from(rank == wrong);
                join.heard(Rank(rank), answer).expect("asked");
            }
            let Err(Divergence::Digest { ranks, seq, .. }) = join.whole() else {
                panic!("tp {tp}, rank {wrong} unnoticed");
            };
            assert_eq!((ranks, seq), (vec![Rank(wrong)], StepSeq(1)), "tp {tp}");
            assert!(join.whole().is_err(), "it stays so");
        }
    }

    #[test]
    fn a_lead_that_draws_another_token_than_the_majority_is_named() {
        let mut join = group(1, 3);
        for rank in 0..3 {
            join.heard(Rank(rank), said(1, 0, if rank == 0 { 6 } else { 5 }, rank == 0))
                .expect("asked");
        }
        let error = join.whole().expect_err("they differ");
        assert!(
            matches!(&error, Divergence::Digest { ranks, .. } if *ranks == [Rank(0)]),
            "{error}"
        );
        // Of two nobody knows which; the one that does not lead is named, and the lead beside it.
        let mut join = group(1, 2);
        for rank in 0..2 {
            join.heard(Rank(rank), said(1, 0, 5 + rank, rank == 0)).expect("asked");
        }
        let text = join.whole().expect_err("they differ").to_string();
        assert!(text.contains("rank 1 of shard 0 (its lead is rank 0)"), "{text}");
    }

    #[test]
    fn one_rank_alone_answers_for_its_commands() {
        let mut join = group(1, 1);
        let mut answer = said(1, 0, 5, true);
        answer.sampled[0].token = TokenId(6);
        join.heard(Rank(0), answer).expect("asked");
        assert!(join.whole().is_err(), "another token than the one it vouched for");
    }

    #[test]
    fn what_was_not_asked_is_refused() {
        let mut join = group(1, 2);
        join.heard(Rank(0), said(1, 0, 5, true)).expect("asked");
        let twice = join.heard(Rank(0), said(1, 0, 5, true));
        assert_eq!(twice, Err(Divergence::Unasked { rank: Rank(0), seq: StepSeq(1) }));
        assert!(join.heard(Rank(1), said(9, 0, 5, false)).is_err());
        let stale = Outcome { incarnation: Incarnation(2), ..said(1, 0, 5, false) };
        assert!(join.heard(Rank(1), stale).is_err());
        join.begin(Incarnation(4));
        assert!(join.heard(Rank(1), said(1, 0, 5, false)).is_err(), "another life");
    }
}
