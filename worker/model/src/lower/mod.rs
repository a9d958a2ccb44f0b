//! From a program to what one rank of a mesh executes: place, rewrite, plan buffers.
//!
//! Runs once per bucket; the op list is the same for every bucket, the bytes are not. It executes
//! nothing. Invariant: every need of every node is met by the placement its input has when it runs.

mod buffers;
mod local;
mod op;
mod pairs;
mod place;
mod rewrite;

pub use buffers::{Buffer, Rows};
pub use local::{GroupLayout, LayerRow, LocalWeight, Region};
pub use op::{BufferId, LocalAttention, LocalSlice, Op, RopeId, Uses};

use crate::config::RopeConfig;
use crate::mesh::{Axis, Mesh, MeshError, Rank};
use crate::program::{Indivisible, Place, Program};

/// What one rank executes.
#[derive(Clone, Debug, PartialEq)]
pub struct Lowered {
    /// The mesh.
    pub mesh: Mesh,
    /// The rank.
    pub rank: Rank,
    /// Padded tokens of the largest shard; collectives move this many.
    pub bucket: usize,
    /// From tokens to normalised hidden states.
    pub body: Vec<Op>,
    /// From chosen rows of hidden states to logits.
    pub head: Vec<Op>,
    /// All buffers, of body and head.
    pub buffers: Vec<Buffer>,
    /// Results of two products of the same rows in the body that lie side by side, the second behind the
    /// first, and live as long as each other: one product may make rows of both.
    pub pairs: Vec<[BufferId; 2]>,
    /// The body's result: all tokens.
    pub hidden: BufferId,
    /// The head's input: chosen rows of `hidden`.
    pub chosen: BufferId,
    /// The head's result.
    pub logits: BufferId,
    /// Elements per token of the arena that holds the body's buffers.
    pub body_width: usize,
    /// Elements per row of the arena that holds the head's buffers.
    pub head_width: usize,
    /// The weights, by the program's numbers; `None` where another rank owns it.
    pub weights: Vec<Option<LocalWeight>>,
    /// Distinct rotary embeddings.
    pub ropes: Vec<RopeConfig>,
    /// Cache groups as this rank holds them.
    pub groups: Vec<GroupLayout>,
}

impl Lowered {
    /// Every checkpoint tensor that this rank reads, with its whole shape.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, Vec<usize>)> {
        self.weights.iter().flatten().map(|weight| {
            let shape = match weight.region {
                Region::Matrix { of, .. } => vec![of.0, of.1],
                Region::Vector { of, .. } => vec![of],
            };
            (weight.name.as_str(), shape)
        })
    }
}

/// Why a program cannot be lowered for a mesh.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LowerError {
    /// The mesh itself.
    #[error(transparent)]
    Mesh(#[from] MeshError),
    /// A dimension that the mesh does not divide.
    #[error(transparent)]
    Indivisible(#[from] Indivisible),
    /// Experts that the ranks cannot share evenly.
    #[error("{experts} experts cannot be owned evenly by {ranks} ranks (dp x tp)")]
    Experts {
        /// Experts in all.
        experts: usize,
        /// Ranks of `ep`.
        ranks: usize,
    },
    /// A program built for another kind of expert parallelism than the mesh has.
    #[error("the program and the mesh disagree on expert parallelism")]
    ExpertParallel,
    /// A transition for which no collective exists; a mistake in a model file.
    #[error("{value} cannot go from {from} to {to} along {axis}")]
    NoCollective {
        /// The value.
        value: &'static str,
        /// The axis.
        axis: Axis,
        /// Where it is.
        from: Place,
        /// Where it must be.
        to: Place,
    },
}

/// Lowers `program` for one rank.
///
/// # Errors
/// When the mesh does not divide the model, naming the field and what would.
pub fn lower(
    program: &Program,
    mesh: Mesh,
    rank: Rank,
    bucket: usize,
) -> Result<Lowered, LowerError> {
    mesh.check()?;
    if rank.0 >= mesh.world() {
        let allowed = format!("below {}", mesh.world());
        return Err(MeshError { what: "rank", got: rank.0, allowed }.into());
    }
    if program.expert_parallel != mesh.expert_parallel {
        return Err(LowerError::ExpertParallel);
    }
    let local = local::Local { mesh, rank };
    let weights =
        program.weights.iter().map(|w| local.weight(w)).collect::<Result<Vec<_>, LowerError>>()?;
    let groups = program.groups.iter().map(|g| local.group(g)).collect::<Result<Vec<_>, _>>()?;
    let mut placed = place::place(program, &local, &weights)?;
    rewrite::fuse_add_norm(&mut placed.body);
    let pairs = pairs::find(&placed.body, &placed.buffers);
    let body_width = buffers::plan(&placed.body, &[], placed.hidden, &pairs, &mut placed.buffers);
    let head_width =
        buffers::plan(&placed.head, &[placed.chosen], placed.logits, &[], &mut placed.buffers);
    Ok(Lowered {
        mesh,
        rank,
        bucket,
        body: placed.body,
        head: placed.head,
        buffers: placed.buffers,
        pairs,
        hidden: placed.hidden,
        chosen: placed.chosen,
        logits: placed.logits,
        body_width,
        head_width,
        weights,
        ropes: placed.ropes,
        groups,
    })
}

#[cfg(test)]
mod tests;
