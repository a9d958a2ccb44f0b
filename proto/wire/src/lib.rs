//! The step protocol on the wire: gRPC over Unix sockets, speaking `step` types at both ends.
//!
//! Generated types never leave this crate. It decides nothing and keeps no state beyond the
//! stream. Without the feature `transport` it is the codec alone, which needs no runtime. Invariant: what arrives either converts whole or ends the stream with a reason.

#[cfg(feature = "transport")]
mod client;
mod codec;
mod from_wire;
#[cfg(feature = "transport")]
mod server;
mod to_wire;

#[cfg(feature = "transport")]
pub use client::{ConnectError, Session, SessionError, connect};
pub use codec::{
    Undecodable, decode_to_scheduler, decode_to_worker, encode_to_scheduler, encode_to_worker,
};
pub use from_wire::Malformed;
#[cfg(feature = "transport")]
pub use server::{Incoming, ServeError, serve};
pub use to_wire::encode_step;

/// Largest message either side accepts: an upload of more than six million tokens, or the
/// log-probabilities of one step's prompt chunks.
pub const MAX_MESSAGE_BYTES: usize = 32 << 20;

#[allow(missing_docs, clippy::all, clippy::disallowed_types, unreachable_pub)]
mod pb {
    include!(concat!(env!("OUT_DIR"), "/tokenmill.step.v1.rs"));
}
