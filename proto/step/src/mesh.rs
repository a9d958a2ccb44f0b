//! The mesh of a worker group: how many ranks, which shard each belongs to, who answers for it.
//!
//! Ranks are counted shard by shard: `rank = shard * tp + place in the shard`. It says nothing of what ranks
//! compute. Invariant: a mesh that [`Mesh::world`] counts has at least one rank, and each rank one shard.

use ids::{Rank, ShardId};

/// The most ranks of one group.
const MOST_RANKS: u32 = 4096;

/// How the ranks of a group share a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mesh {
    /// Data-parallel shards, each with its own requests and cache.
    pub dp: u32,
    /// Ranks that split each layer of a shard.
    pub tp: u32,
    /// Whether experts are spread over all ranks.
    pub expert_parallel: bool,
}

/// A rank's place in a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat {
    /// The group.
    pub mesh: Mesh,
    /// Which of its ranks.
    pub rank: Rank,
}

impl Mesh {
    /// One rank.
    pub const SINGLE: Self = Self { dp: 1, tp: 1, expert_parallel: false };

    /// Ranks in all; `None` where there is no such group: without ranks, or with more than 4096.
    #[must_use]
    pub fn world(&self) -> Option<u32> {
        self.dp.checked_mul(self.tp).filter(|world| (1..=MOST_RANKS).contains(world))
    }

    /// Every rank.
    pub fn ranks(&self) -> impl Iterator<Item = Rank> + use<> {
        (0..self.world().unwrap_or(0)).map(Rank)
    }

    /// Every shard.
    pub fn shards(&self) -> impl Iterator<Item = ShardId> + use<> {
        (0..self.dp).map(|shard| ShardId(u16::try_from(shard).unwrap_or(u16::MAX)))
    }

    /// The shard of a rank.
    #[must_use]
    pub fn shard(&self, rank: Rank) -> ShardId {
        ShardId(u16::try_from(rank.0 / self.tp.max(1)).unwrap_or(u16::MAX))
    }

    /// The rank that answers for a shard.
    #[must_use]
    pub fn lead(&self, shard: ShardId) -> Rank {
        Rank(u32::from(shard.0) * self.tp)
    }

    /// The ranks of a shard, its lead first.
    pub fn members(&self, shard: ShardId) -> impl Iterator<Item = Rank> + use<> {
        let first = self.lead(shard).0;
        (first..first + self.tp).map(Rank)
    }
}

impl core::fmt::Display for Mesh {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "dp {} x tp {}", self.dp, self.tp)?;
        if self.expert_parallel { f.write_str(" with expert parallelism") } else { Ok(()) }
    }
}

impl Seat {
    /// A worker alone.
    pub const SINGLE: Self = Self { mesh: Mesh::SINGLE, rank: Rank(0) };

    /// The shard.
    #[must_use]
    pub fn shard(&self) -> ShardId {
        self.mesh.shard(self.rank)
    }

    /// Whether this rank answers for its shard.
    #[must_use]
    pub fn is_lead(&self) -> bool {
        self.mesh.lead(self.shard()) == self.rank
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_is_in_one_shard_that_one_of_them_leads() {
        let mesh = Mesh { dp: 3, tp: 2, expert_parallel: true };
        assert_eq!(mesh.world(), Some(6));
        let members: Vec<Rank> = mesh.shards().flat_map(|shard| mesh.members(shard)).collect();
        assert_eq!(members, mesh.ranks().collect::<Vec<_>>());
        for shard in mesh.shards() {
            let leads = |rank: &Rank| Seat { mesh, rank: *rank }.is_lead();
            assert_eq!(mesh.members(shard).filter(leads).collect::<Vec<_>>(), [mesh.lead(shard)]);
            assert!(mesh.members(shard).all(|rank| mesh.shard(rank) == shard));
        }
        assert_eq!(Mesh { dp: 0, ..mesh }.world(), None);
        assert_eq!(Mesh { dp: 1 << 20, tp: 1 << 20, ..mesh }.world(), None);
        assert!(Seat::SINGLE.is_lead());
    }
}
