//! Every kernel of `ops` at the shapes that decide how fast models run: first whether its results are
//! right, then how long it takes, held against what the device gives in the same run.
//!
//! Launches go through the functions that an engine calls, into a captured graph, over operands that
//! were not in the second-level cache where a model's would not be either: weights and caches rotate
//! over more than [`COLD`] bytes, activations stay. It knows no engine and no file. Invariant: a figure
//! is given only for a kernel whose results were right in this run, at the timed shape.
//!
//! # Adding a case
//!
//! Each file of `cases` has the cases of some ops in a function that returns a list. A case is a name
//! like `mla_decode.h16.bs1.ctx8192` and a closure that lays operands out on a [`rig::Rig`] and returns
//! [`case::Ready`]: what must be read and computed at least, how many sets of operands there are, the
//! launch over the `i`th set, and the check of one launch against f64 on the host (some elements
//! suffice: first, last and some between). A new file is named in `cases::all`. Nothing else
//! knows of single cases.

mod case;
mod cases;
mod measure;
mod near;
mod peer;
mod profile;
mod rig;

pub use case::Case;
pub use cases::all as cases;
pub use measure::{Bench, Ceilings, Figure, Rate};
pub use near::Failure;
pub use profile::Profile;
pub use rig::COLD;
