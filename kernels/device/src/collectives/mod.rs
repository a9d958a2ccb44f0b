//! What ranks exchange: sums and parts of activations, between the members of a group.
//!
//! Every member of a group calls the same operations in the same order with as many elements; a backend
//! names who does not, where it can see it. A group is a list of ranks: no mesh is known here. Invariants:
//! a sum runs in the order of members and is rounded once, so all members hold the same bits; an operation
//! ends with its result or an error, and after an error none may be asked for any more.

mod error;
mod shared;

pub use error::{CollectiveError, RegionError};
pub use shared::{DEFAULT_STAGE, DEFAULT_TIMEOUT, SharedMemory, SharedRegion, Stopper};

use half::bf16;

/// Groups that a rank may be in at once.
pub const GROUPS: usize = 3;
/// Bytes of a group's name.
const NAME: usize = 8;

/// Ranks that exchange, and which of them this one is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    number: usize,
    name: &'static str,
    members: Vec<usize>,
    position: usize,
}

impl Group {
    /// The group that all of `members` know as `number`, in this order, for the member `rank`. `name` is
    /// what people call it, in up to 8 letters.
    ///
    /// # Panics
    /// When the number is not below [`GROUPS`], the name is longer, or `rank` is no member.
    #[must_use]
    pub fn new(number: usize, name: &'static str, members: Vec<usize>, rank: usize) -> Self {
        assert!(number < GROUPS && name.len() <= NAME, "group {number}, {name}");
        let position = members.iter().position(|member| *member == rank);
        let position = position.expect("a group is made for one of its members");
        Self { number, name, members, position }
    }

    /// Members, in order.
    #[must_use]
    pub fn members(&self) -> &[usize] {
        &self.members
    }

    /// Which of the members this rank is.
    #[must_use]
    pub const fn position(&self) -> usize {
        self.position
    }
}

/// Numbers changed in place.
#[derive(Debug)]
pub enum ElementsMut<'a> {
    /// IEEE single.
    F32(&'a mut [f32]),
    /// bfloat16; sums are made in singles and rounded once.
    Bf16(&'a mut [bf16]),
}

/// Numbers read, and others of the same type written.
#[derive(Debug)]
pub enum Transfer<'a> {
    /// IEEE single.
    F32 {
        /// Read.
        x: &'a [f32],
        /// Written.
        out: &'a mut [f32],
    },
    /// bfloat16; sums are made in singles and rounded once.
    Bf16 {
        /// Read.
        x: &'a [bf16],
        /// Written.
        out: &'a mut [bf16],
    },
}

/// Bytes that came from other ranks.
pub type Moved = Result<u64, CollectiveError>;

/// One rank's end of what ranks exchange.
pub trait Collectives: Send {
    /// This rank.
    fn rank(&self) -> usize;

    /// Ranks in all.
    fn world(&self) -> usize;

    /// The step that operations from now on belong to, for errors.
    fn begin_step(&mut self, step: u64);

    /// `x` becomes the sum over members.
    ///
    /// # Errors
    /// When a member does not come, comes with something else, or the ranks were stopped.
    fn all_reduce(&mut self, group: &Group, x: ElementsMut<'_>) -> Moved;

    /// `out` takes `run` elements of each member's `x` in turn, again and again: all of them where parts
    /// lie behind each other, a row's where they lie side by side.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce`], and where `out` is not as long as all parts together.
    fn all_gather(&mut self, group: &Group, parts: Transfer<'_>, run: usize) -> Moved;

    /// `out` becomes this member's part of the sum over members; parts of `x` lie behind each other.
    ///
    /// # Errors
    /// As [`Collectives::all_reduce`], and where `x` is not as long as all parts together.
    fn reduce_scatter(&mut self, group: &Group, parts: Transfer<'_>) -> Moved;
}

/// An operation, as ranks tell each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    AllReduce = 1,
    AllGather = 2,
    ReduceScatter = 3,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
        }
    }

    const fn of(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::AllReduce),
            2 => Some(Self::AllGather),
            3 => Some(Self::ReduceScatter),
            _ => None,
        }
    }
}
