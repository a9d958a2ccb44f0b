//! Every bound of the gateway, by name. A loop or buffer that a client can grow ends at one of them.

use std::time::Duration;

/// Nesting of a request's JSON.
pub const MAX_JSON_DEPTH: usize = 128;
/// Fields of a request's top level, known and unknown.
pub const MAX_FIELDS: usize = 256;
/// Choices per prompt, as OpenAI allows.
pub const MAX_N: i64 = 128;
/// Choices of one request over all its prompts.
pub const MAX_CHOICES: usize = 1_024;
/// Stop strings, as OpenAI allows.
pub const MAX_STOP_STRINGS: usize = 4;
/// Bytes of one stop string.
pub const MAX_STOP_BYTES: usize = 1_024;
/// Stop tokens.
pub const MAX_STOP_TOKENS: usize = 256;
/// Entries of `logit_bias`.
pub const MAX_LOGIT_BIAS: usize = 1_024;
/// Messages of a chat.
pub const MAX_MESSAGES: usize = 16_384;
/// Parts of a message's content.
pub const MAX_CONTENT_PARTS: usize = 1_024;
/// Characters of `cache_salt`.
pub const MAX_SALT_BYTES: usize = 128;
/// Log-probabilities of prompt tokens in one reply, all alternatives counted: about 100 MB.
pub const MAX_PROMPT_LOGPROB_ENTRIES: usize = 1 << 20;
/// Bodies up to this size are parsed and tokenised on the connection's own task.
pub const INLINE_BODY_BYTES: usize = 32 << 10;
/// Header bytes of a request.
pub const MAX_HEADER_BYTES: usize = 64 << 10;
/// Header lines of a request.
pub const MAX_HEADERS: usize = 100;
/// Bytes of a client's `X-Request-Id` that are echoed.
pub const MAX_REQUEST_ID_BYTES: usize = 128;
/// Stream frames that wait for a client's socket; then the stream's generation is not read on.
pub const STREAM_FRAMES: usize = 16;

/// Bounds that operators may change.
#[derive(Clone, Debug)]
pub struct GatewayLimits {
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// Client connections; more wait in the listener's backlog.
    pub connections: usize,
    /// A connection that has not sent a whole header for this long is closed; idle ones too.
    pub header_read: Duration,
    /// Longest silence while a body is read.
    pub body_idle: Duration,
    /// Longest time a body may take in all.
    pub body_total: Duration,
    /// A client that takes no byte for this long is given up.
    pub write_stall: Duration,
    /// A comment is sent on a stream that was silent for this long.
    pub keep_alive: Duration,
    /// How long a stream waits for its first result before it commits to status 200.
    pub commit_after: Duration,
    /// Longest life of a request, queueing included. Clients may ask for less.
    pub request: Option<Duration>,
    /// How long running requests may go on after shutdown was asked for.
    pub drain: Duration,
}

impl Default for GatewayLimits {
    fn default() -> Self {
        Self {
            body_bytes: 16 << 20,
            connections: 4_096,
            header_read: Duration::from_secs(20),
            body_idle: Duration::from_secs(10),
            body_total: Duration::from_secs(120),
            write_stall: Duration::from_secs(30),
            keep_alive: Duration::from_secs(15),
            commit_after: Duration::from_secs(5),
            request: None,
            drain: Duration::from_secs(30),
        }
    }
}
