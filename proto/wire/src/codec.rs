//! Messages as bytes: what the session does with them, for those who have no session.
//!
//! No stream and no runtime here. Invariant: decoding what was encoded gives the same message, and
//! bytes that are not a whole message give an error.

use crate::{Malformed, pb};
use prost::Message;
use step::{ToScheduler, ToWorker};

/// Why bytes are not a message.
#[derive(Debug, thiserror::Error)]
pub enum Undecodable {
    /// They are not of this protocol.
    #[error("the bytes are no message")]
    Bytes(#[from] prost::DecodeError),
    /// They are, but say nothing that makes sense.
    #[error("the message does not convert")]
    Malformed(#[from] Malformed),
}

/// Appends the bytes of a message to a worker.
pub fn encode_to_worker(message: ToWorker, into: &mut Vec<u8>) {
    append(&pb::ToWorker::from(message), into);
}

/// Appends the bytes of a message to the scheduler.
pub fn encode_to_scheduler(message: ToScheduler, into: &mut Vec<u8>) {
    append(&pb::ToScheduler::from(message), into);
}

/// The message to a worker that the bytes are.
///
/// # Errors
/// When they are none.
pub fn decode_to_worker(bytes: &[u8]) -> Result<ToWorker, Undecodable> {
    Ok(pb::ToWorker::decode(bytes)?.try_into()?)
}

/// The message to the scheduler that the bytes are.
///
/// # Errors
/// When they are none.
pub fn decode_to_scheduler(bytes: &[u8]) -> Result<ToScheduler, Undecodable> {
    Ok(pb::ToScheduler::decode(bytes)?.try_into()?)
}

pub(crate) fn append(message: &impl Message, into: &mut Vec<u8>) {
    let encoded = message.encode(into);
    debug_assert!(encoded.is_ok(), "a vector grows as needed");
}
