//! Limits of the scheduler. Parsed once by the binary and passed down; nothing here is optional
//! knowledge that another part looks up again.
//!
//! Holds no policy. Invariant: a [`Config`] that passed [`Config::check`] lets every request that
//! admission accepts run to its end.

use core::time::Duration;
use ids::{HashKey, Tokens};

/// What the scheduler may do.
#[derive(Clone)]
pub struct Config {
    /// Requests with a slot at once: rows of the worker's slot table.
    pub max_running: u32,
    /// Most tokens of one step, decode and prefill together.
    pub max_step_tokens: Tokens,
    /// Most prompt tokens of one request in one step. Lower it to cap the work that a long prompt
    /// puts in front of others; `max_step_tokens` means no cap of its own.
    pub max_chunk: Tokens,
    /// Longest sequence, prompt and output together.
    pub max_context: Tokens,
    /// Steps planned before the outcome of the oldest is known: 0, 1 or 2.
    pub depth: u32,
    /// Aim for the duration of a step that decodes: prompt chunks are cut to stay below it.
    pub decode_budget: Duration,
    /// Whether finished blocks may serve later requests.
    pub prefix_caching: bool,
    /// How many times its own tokens others are served before the request that waits longest goes
    /// first, whatever its class and tenant; 0 for never. Also what better classes leave of a full
    /// queue to every class: one part in `patience + 1`.
    pub patience: u32,
    /// Whether a request whose deadline is out of reach is ended rather than run.
    pub refuse_late: bool,
    /// Most requests waiting for their first admission.
    pub queue_requests: u32,
    /// Most tokens of those requests together.
    pub queue_tokens: u64,
    /// A step whose outcome takes longer than this and ten times its predicted duration means
    /// that the worker hangs.
    pub step_timeout: Duration,
    /// Blocks given back per step when a long table is released.
    pub release_slice: u32,
    /// Key of the block hashes; the caller hashes prompts under the same.
    pub hash_key: HashKey,
}

/// [`Config::patience`] when serving.
const PATIENCE: u32 = 16;
/// The most steps planned ahead.
pub const MAX_DEPTH: u32 = 2;

/// Why a configuration is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} must be {allowed}, got {got}")]
pub struct ConfigError {
    /// The field.
    pub field: &'static str,
    /// What it may be.
    pub allowed: &'static str,
    /// What it is.
    pub got: u64,
}

impl Config {
    /// Limits that suit tests and small machines; the binary sets every field.
    #[must_use]
    pub fn with_key(hash_key: HashKey) -> Self {
        Self {
            max_running: 256,
            max_step_tokens: Tokens(2048),
            max_chunk: Tokens(2048),
            max_context: Tokens(32_768),
            depth: 2,
            decode_budget: Duration::from_millis(50),
            prefix_caching: true,
            patience: 0,
            refuse_late: false,
            queue_requests: 4096,
            queue_tokens: 16 << 20,
            step_timeout: Duration::from_secs(60),
            release_slice: 256,
            hash_key,
        }
    }

    /// The same with what serving turns on: patience and a look ahead at deadlines.
    #[must_use]
    pub fn serving(hash_key: HashKey) -> Self {
        Self { patience: PATIENCE, refuse_late: true, ..Self::with_key(hash_key) }
    }

    /// Refuses limits that contradict each other.
    ///
    /// # Errors
    /// The first field that cannot stand.
    pub fn check(&self) -> Result<(), ConfigError> {
        let refuse = |field, allowed, got: u64| Err(ConfigError { field, allowed, got });
        if self.max_running == 0 {
            return refuse("max_running", "at least 1", 0);
        }
        if self.max_step_tokens.0 <= self.max_running {
            let got = u64::from(self.max_step_tokens.0);
            return refuse("max_step_tokens", "above max_running", got);
        }
        if self.max_chunk.is_zero() {
            return refuse("max_chunk", "at least 1", 0);
        }
        if self.max_context.0 < 2 || self.max_context.0 > u32::MAX / 2 {
            let got = u64::from(self.max_context.0);
            return refuse("max_context", "between 2 and 2^31", got);
        }
        if self.depth > MAX_DEPTH {
            return refuse("depth", "0, 1 or 2", u64::from(self.depth));
        }
        if self.release_slice == 0 {
            return refuse("release_slice", "at least 1", 0);
        }
        Ok(())
    }
}

impl core::fmt::Debug for Config {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        // The hash key is a secret and stays out of logs.
        f.debug_struct("Config")
            .field("max_running", &self.max_running)
            .field("max_step_tokens", &self.max_step_tokens)
            .field("max_chunk", &self.max_chunk)
            .field("max_context", &self.max_context)
            .field("depth", &self.depth)
            .field("decode_budget", &self.decode_budget)
            .field("prefix_caching", &self.prefix_caching)
            .finish_non_exhaustive()
    }
}
