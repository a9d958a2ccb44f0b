//! Where this engine stands among ranks, and what of a plan is its own.
//!
//! A plan is one for all ranks: a header, and a section for each data-parallel shard. Invariant: whether a
//! step runs and with how many rows follows from the header alone, so that all ranks agree on it.

use crate::PlanError;
use crate::batch::Batch;
use model::mesh::{Axis, Mesh, Rank};
use step::{Section, StepPlan};

/// A rank's place in a mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    shard: usize,
    shards: usize,
    ranks: usize,
}

impl Standing {
    /// The only rank.
    #[cfg(test)]
    pub(crate) const ALONE: Self = Self { shard: 0, shards: 1, ranks: 1 };

    pub(crate) const fn new(mesh: Mesh, rank: Rank) -> Self {
        let shard = mesh.coordinate(rank, Axis::Dp);
        Self { shard, shards: mesh.dp, ranks: mesh.world() }
    }

    /// This shard's section.
    pub(crate) fn section<'p>(&self, plan: &'p StepPlan) -> Result<&'p Section, PlanError> {
        let (got, tokens, shards) = (plan.sections.len(), plan.shard_tokens.len(), self.shards);
        // Nobody else has to agree with a rank that is alone.
        let fits = got == shards && (tokens == shards || self.ranks == 1);
        match plan.sections.get(self.shard).filter(|_| fits) {
            Some(section) => Ok(section),
            None => Err(PlanError::Sections { got, tokens, shards }),
        }
    }

    /// Notes the rows of a step whose `batch` was filled from this shard's section, at most `most` for a
    /// shard. Returns whether it runs.
    pub(crate) fn rows(
        &self,
        plan: &StepPlan,
        most: usize,
        batch: &mut Batch,
    ) -> Result<bool, PlanError> {
        batch.step = plan.seq.0;
        if self.ranks == 1 {
            return Ok(!batch.ids.is_empty());
        }
        let (shard, got) = (self.shard, batch.ids.len());
        let named = plan.shard_tokens[shard];
        if named.as_usize() != got {
            return Err(PlanError::ShardTokens { shard, named, got });
        }
        batch.shard_rows.clear();
        batch.shard_rows.extend(plan.shard_tokens.iter().map(|tokens| tokens.as_usize()));
        batch.bucket = plan.bucket.as_usize().min(most);
        let tokens = batch.shard_rows.iter().copied().max().unwrap_or(0);
        if tokens > batch.bucket {
            return Err(PlanError::Bucket { rows: batch.bucket, tokens });
        }
        Ok(tokens > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ids::{Incarnation, StepSeq, Tokens};

    fn plan(bucket: u32, tokens: &[u32], sections: usize) -> StepPlan {
        StepPlan {
            seq: StepSeq(5),
            incarnation: Incarnation(1),
            bucket: Tokens(bucket),
            shard_tokens: tokens.iter().copied().map(Tokens).collect(),
            sections: vec![Section::default(); sections],
        }
    }

    fn batch(tokens: usize) -> Batch {
        let mut batch = Batch::with_capacity(tokens, 0);
        batch.ids.resize(tokens, 0);
        batch
    }

    #[test]
    fn a_rank_alone_looks_at_its_section_only() {
        let alone = Standing::ALONE;
        assert!(alone.section(&plan(0, &[], 1)).is_ok());
        let refused = PlanError::Sections { got: 2, tokens: 0, shards: 1 };
        assert_eq!(alone.section(&plan(0, &[], 2)), Err(refused));
        assert_eq!(alone.rows(&plan(0, &[7], 1), 8, &mut batch(3)), Ok(true));
        assert_eq!(alone.rows(&plan(0, &[7], 1), 8, &mut batch(0)), Ok(false));
    }

    #[test]
    fn ranks_of_a_mesh_agree_on_rows_by_the_header() {
        let mesh = Mesh { dp: 2, tp: 2, expert_parallel: false };
        let at = |rank| Standing::new(mesh, Rank(rank));
        let mut mixed = plan(12, &[9, 0], 2);
        mixed.sections[1].decode.leave.push(ids::SlotId(4));
        assert_eq!(at(1).section(&mixed), Ok(&mixed.sections[0]));
        assert_eq!(at(2).section(&mixed), Ok(&mixed.sections[1]));
        let (mut busy, mut idle) = (batch(9), batch(0));
        assert_eq!(at(1).rows(&mixed, 10, &mut busy), Ok(true));
        assert_eq!(at(2).rows(&mixed, 10, &mut idle), Ok(true), "it takes part");
        for batch in [&busy, &idle] {
            assert_eq!((batch.bucket, &batch.shard_rows[..], batch.step), (10, &[9, 0][..], 5));
        }
        assert_eq!(at(0).rows(&plan(0, &[0, 0], 2), 10, &mut idle), Ok(false), "nobody does");

        let sections = |got, tokens| Err(PlanError::Sections { got, tokens, shards: 2 });
        assert_eq!(at(0).section(&plan(12, &[9], 2)), sections(2, 1));
        assert_eq!(at(0).section(&plan(12, &[9, 0], 1)), sections(1, 2));
        let named = PlanError::ShardTokens { shard: 0, named: Tokens(9), got: 8 };
        assert_eq!(at(0).rows(&mixed, 10, &mut batch(8)), Err(named));
        let few = PlanError::Bucket { rows: 8, tokens: 9 };
        assert_eq!(at(0).rows(&plan(8, &[9, 0], 2), 10, &mut busy), Err(few.clone()));
        assert_eq!(at(2).rows(&plan(8, &[9, 0], 2), 10, &mut idle), Err(few), "all refuse");
    }
}
