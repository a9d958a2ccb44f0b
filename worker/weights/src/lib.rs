//! Checkpoints: safetensors files read as they lie in the page cache, the same tensors made of a
//! seeded generator, and the download of a model from a hub.
//!
//! It knows tensors by name, type and shape; what a tensor means to a model, and which tensors a
//! model has, is the `model` crate's business. It runs no code found beside weights and reads no
//! format that could carry any.
//!
//! Invariant: no byte of a tensor is handed out before the file that holds it has been checked
//! whole (lengths, offsets, overlaps, names), and every refusal names file, tensor and offset.
#![deny(unsafe_code)]

mod checkpoint;
mod error;
mod fp8;
mod header;
pub mod hub;
mod load;
#[allow(unsafe_code, reason = "the one memory map of the workspace")]
mod map_file;
mod parallel;
mod part;
pub mod progress;
pub mod random;
mod set;
mod slice;
mod write;

pub use checkpoint::{Checkpoint, TensorView};
pub use error::{CheckpointError, Defect};
pub use load::LoadOptions;
pub use map_file::MappedFile;
pub use parallel::available_threads;
pub use part::Part;
pub use progress::Progress;
pub use safetensors::Dtype;
pub use set::{Float, Stored, Weight, Weights};
pub use slice::{Buffer, Slice};
pub use write::{DEFAULT_SHARD_BYTES, WriteError, WriteOptions, Written, write_random};

#[cfg(target_endian = "big")]
compile_error!("safetensors are little-endian and are used as they lie in the file");
