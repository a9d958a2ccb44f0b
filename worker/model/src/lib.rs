//! Models as SPMD programs: configurations, programs over named dimensions, and the lowering to a
//! flat op list for one rank of a mesh.
//!
//! Pure: it opens no file, allocates no cache and runs no kernel. The way through:
//! [`config::parse`] a `config.json`, [`families::program`] it, [`lower::lower`] it for a rank,
//! then [`explain::explain`] or hand it to an engine. Invariant: what a file says is used, neutral
//! or refused, and what a mesh cannot divide is refused with what it could.

pub mod config;
pub mod explain;
pub mod families;
pub mod lower;
pub mod memory;
pub mod mesh;
pub mod program;
