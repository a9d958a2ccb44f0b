//! The shipped schedulers of a group in a seeded world: virtual time, clients that come, stop and leave,
//! workers that follow plans to the letter while they check every read and write, the protocol's
//! bytes between them, and a naive model that must say the same.
//!
//! Nothing here is used in production. The world has no threads and asks no clock, so a seed is a
//! run. Invariant: the first thing that is wrong ends the run with the seed that shows it.

pub mod act;
pub mod client;
pub mod coverage;
pub mod curves;
pub mod echo;
pub mod figures;
pub mod group;
pub mod naive;
pub mod overload;
pub mod planner_bench;
pub mod ranks;
pub mod replica;
pub mod rng;
pub mod scenario;
pub mod shrink;
pub mod worker;
pub mod world;

pub use figures::Figures;
pub use scenario::Scenario;
pub use world::{Violation, World};
