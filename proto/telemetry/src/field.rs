//! Names of log fields. One spelling each, so that logs of all parts can be joined.

/// The server's own id of a client request; never the client's.
pub const REQUEST_ID: &str = "request_id";
/// What the client called its request, sanitised.
pub const CLIENT_REQUEST_ID: &str = "client_request_id";
/// The door a request came through.
pub const DOOR: &str = "door";
/// Position of a choice within its request.
pub const CHOICE: &str = "choice";
/// Sequence number of a step.
pub const STEP: &str = "step";
/// Life of the worker group.
pub const INCARNATION: &str = "incarnation";
/// Rank of a worker.
pub const RANK: &str = "rank";
