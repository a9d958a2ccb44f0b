//! The mesh of ranks that runs one replica: named axes, and where a rank stands on them.
//!
//! World = dp x tp ranks, tp innermost. Inside expert modules `ep` names all of them when expert
//! parallelism is on. It moves no data. Invariant: every axis has at least one rank.

/// A named axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Axis {
    /// Data-parallel shards: each has its own requests and cache.
    Dp,
    /// Tensor parallelism inside a shard.
    Tp,
    /// Expert parallelism: every rank of both other axes.
    Ep,
}

impl core::fmt::Display for Axis {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Dp => "dp",
            Self::Tp => "tp",
            Self::Ep => "ep",
        })
    }
}

/// How many ranks, and what they share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mesh {
    /// Data-parallel shards.
    pub dp: usize,
    /// Ranks of a shard.
    pub tp: usize,
    /// Whether experts are owned whole by single ranks (over `ep`) instead of cut over `tp`.
    pub expert_parallel: bool,
}

/// A rank of the mesh, 0 to `world() - 1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank(pub usize);

/// A mesh or rank that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} = {got} must be {allowed}")]
pub struct MeshError {
    /// What is wrong.
    pub what: &'static str,
    /// Its value.
    pub got: usize,
    /// What would be accepted.
    pub allowed: String,
}

/// The most ranks of one replica.
const MAX_WORLD: usize = 4096;

impl Mesh {
    /// One rank.
    pub const SINGLE: Self = Self { dp: 1, tp: 1, expert_parallel: false };

    /// Refuses meshes without ranks or beyond any real machine.
    ///
    /// # Errors
    /// Names the axis.
    pub fn check(&self) -> Result<(), MeshError> {
        for (what, got) in [("dp", self.dp), ("tp", self.tp)] {
            if !(1..=MAX_WORLD).contains(&got) {
                return Err(MeshError { what, got, allowed: format!("1 to {MAX_WORLD}") });
            }
        }
        if self.world() > MAX_WORLD {
            let allowed = format!("at most {MAX_WORLD}");
            return Err(MeshError { what: "dp x tp", got: self.world(), allowed });
        }
        Ok(())
    }

    /// Ranks in all.
    #[must_use]
    pub const fn world(&self) -> usize {
        self.dp * self.tp
    }

    /// Ranks along `axis`.
    #[must_use]
    pub const fn size(&self, axis: Axis) -> usize {
        match axis {
            Axis::Dp => self.dp,
            Axis::Tp => self.tp,
            Axis::Ep => self.world(),
        }
    }

    /// Where `rank` stands along `axis`.
    #[must_use]
    pub const fn coordinate(&self, rank: Rank, axis: Axis) -> usize {
        match axis {
            Axis::Dp => rank.0 / self.tp,
            Axis::Tp => rank.0 % self.tp,
            Axis::Ep => rank.0,
        }
    }

    /// The ranks that take part in a collective of `rank` along `axis`, in axis order.
    #[must_use]
    pub fn peers(&self, rank: Rank, axis: Axis) -> Vec<Rank> {
        let same = |other: &Rank| match axis {
            Axis::Dp => other.0 % self.tp == rank.0 % self.tp,
            Axis::Tp => other.0 / self.tp == rank.0 / self.tp,
            Axis::Ep => true,
        };
        (0..self.world()).map(Rank).filter(same).collect()
    }
}
