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
pub use to_wire::encode_step;

/// Largest message either side accepts: an upload of more than six million tokens, or the
/// log-probabilities of one step's prompt chunks.
pub const MAX_MESSAGE_BYTES: usize = 32 << 20;

#[allow(missing_docs, clippy::all, clippy::disallowed_types, unreachable_pub)]
mod pb {
    tonic::include_proto!("tokenmill.step.v1");
}
