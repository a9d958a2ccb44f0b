//! Why ranks cannot exchange: someone is missing, does something else, or everybody was stopped; and why
//! memory for it cannot be made or joined.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a collective has no result. All ranks that wait, or come later, hear of the first cause.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// A rank that did not come in time, or is gone.
    #[error(
        "rank {missing} {} {op} over {group}, {bytes} bytes, step {step}: rank {waiting} waited for it \
         {:.1} s",
        if *left { "ended before" } else { "did not come to" },
        waited.as_secs_f64()
    )]
    Missing {
        /// Who.
        missing: usize,
        /// Whether it said that it ends.
        left: bool,
        /// Who waited for it.
        waiting: usize,
        /// In which operation.
        op: &'static str,
        /// Over which group.
        group: String,
        /// Bytes of the operation on one rank.
        bytes: u64,
        /// In which step.
        step: u64,
        /// How long.
        waited: Duration,
    },
    /// Two ranks that do not do the same.
    #[error("rank {rank} is at {here}, rank {other} at {there}")]
    Differs {
        /// Who found it.
        rank: usize,
        /// What it does.
        here: String,
        /// The other one.
        other: usize,
        /// What that one does.
        there: String,
    },
    /// Somebody stopped all ranks.
    #[error("the ranks were stopped: {reason}")]
    Aborted {
        /// Why.
        reason: String,
    },
    /// Lengths that do not fit each other; a mistake of the caller.
    #[error("{op} of {got} elements where {wanted} belong")]
    Elements {
        /// Operation.
        op: &'static str,
        /// Given.
        got: usize,
        /// Fitting.
        wanted: usize,
    },
}

/// Why memory that ranks share cannot be made or joined.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The system's reason.
    #[error("memory that ranks share, {} ({bytes} bytes): {source}", path.display())]
    Io {
        /// Its file.
        path: PathBuf,
        /// Its size; 0 where it is not known yet.
        bytes: u64,
        /// The reason.
        source: io::Error,
    },
    /// A number that cannot be met.
    #[error("{what} = {got} must be {allowed}")]
    Limit {
        /// Which.
        what: &'static str,
        /// Its value.
        got: usize,
        /// What would be accepted.
        allowed: String,
    },
    /// Another file, or one of another version of the program.
    #[error("{} is not memory that ranks of this version share", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// A rank that joined already.
    #[error("rank {rank} joined {} already; every incarnation needs a new file", path.display())]
    Taken {
        /// The rank.
        rank: usize,
        /// The file.
        path: PathBuf,
    },
}
