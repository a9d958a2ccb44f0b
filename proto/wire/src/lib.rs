//! The step protocol on the wire: gRPC over Unix sockets, speaking `step` types at both ends.
//!
//! Generated types never leave this crate. It decides nothing and keeps no state beyond the
//! stream. Invariant: what arrives either converts whole or ends the stream with a reason.

mod client;
mod from_wire;
mod server;
mod to_wire;

pub use client::{ConnectError, Session, SessionError, connect};
pub use from_wire::Malformed;
pub use server::{Incoming, ServeError, serve};

/// Largest message either side accepts: 4 Mi tokens of upload, or the log-probabilities of a
/// prompt part. Uploads and prompt parts are split well below it.
pub const MAX_MESSAGE_BYTES: usize = 32 << 20;

/// Tokens of one upload message; longer prompts are sent in several.
pub const MAX_UPLOAD_TOKENS: usize = 1 << 16;

#[allow(missing_docs, clippy::all, clippy::disallowed_types, unreachable_pub)]
mod pb {
    tonic::include_proto!("tokenmill.step.v1");
}
