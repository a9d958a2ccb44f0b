//! What all doors share: the engine, the model's names and text side, metrics, limits, ids.

use crate::book::Book;
use crate::engine::{Engine, Readiness};
use crate::error::ApiError;
use crate::limits::GatewayLimits;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use telemetry::Metrics;
use text::{TextFolder, Tokenizer};

/// How the served model is called.
#[derive(Clone, Debug)]
pub struct ServedModel {
    /// Names that requests may use; the first is the default. At least one.
    pub names: Vec<String>,
    /// Where it came from: a path or a name on the hub.
    pub root: String,
    /// Seconds since 1970 when the server started.
    pub created: u64,
}

/// The state behind every door.
pub struct Gateway {
    /// Runs the generations.
    pub engine: Arc<dyn Engine>,
    /// The model's names.
    pub model: ServedModel,
    /// Tokenizer, chat template, defaults.
    pub text: TextFolder,
    /// Bounds.
    pub limits: GatewayLimits,
    /// Metrics, shared with the engine.
    pub metrics: Arc<Metrics>,
    /// Render vLLM's metric names too.
    pub vllm_metric_names: bool,
    /// Version and commit, as `/version` reports.
    pub version: String,
    /// Opens the doors below `/admin` to whoever brings it; without one, to this machine alone.
    pub admin_key: Option<String>,
    pub(crate) book: Book,
    numbers: Numbers,
    draining: AtomicBool,
}

/// The handle that doors hold.
pub type AppState = Arc<Gateway>;

impl Gateway {
    /// A gateway for `engine`. `seed` is the start of the seeds of requests that bring none.
    #[must_use]
    pub fn new(
        engine: Arc<dyn Engine>,
        model: ServedModel,
        text: TextFolder,
        limits: GatewayLimits,
        metrics: Arc<Metrics>,
        seed: u64,
        version: String,
    ) -> Self {
        Self {
            engine,
            model,
            text,
            limits,
            metrics,
            vllm_metric_names: false,
            version,
            admin_key: None,
            book: Book::default(),
            numbers: Numbers { seed, drawn: AtomicU64::new(0), ids: AtomicU64::new(0) },
            draining: AtomicBool::new(false),
        }
    }

    /// The tokenizer, for a request whose field `param` is text.
    ///
    /// # Errors
    /// When the model folder has none.
    pub fn tokenizer(&self, param: &'static str) -> Result<&Arc<Tokenizer>, ApiError> {
        self.text.tokenizer.as_ref().ok_or_else(|| {
            ApiError::unsupported(
                param,
                "this model folder has no tokenizer.json, so text cannot be read; \
                 send token ids as the prompt of /v1/completions",
            )
        })
    }

    /// The name under which a reply speaks of the model.
    ///
    /// # Errors
    /// 404 when the client named another model.
    pub fn model_name(&self, asked: Option<String>) -> Result<String, ApiError> {
        match asked {
            None => Ok(self.model.names[0].clone()),
            Some(name) if self.model.names.contains(&name) => Ok(name),
            Some(name) => Err(ApiError::model_not_found(&name)),
        }
    }

    /// Whether new requests are taken.
    #[must_use]
    pub fn readiness(&self) -> Readiness {
        if self.draining.load(Ordering::Acquire) {
            Readiness::Draining
        } else {
            self.engine.readiness()
        }
    }

    /// Refuses new requests from now on; running ones go on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// A seed for a request that brings none.
    #[must_use]
    pub fn draw_seed(&self) -> u64 {
        let count = self.numbers.drawn.fetch_add(1, Ordering::Relaxed);
        mix(self.numbers.seed.wrapping_add(count.wrapping_mul(GOLDEN)))
    }

    /// An id that no other request of this server has, in hexadecimal.
    #[must_use]
    pub fn draw_id(&self) -> String {
        let count = self.numbers.ids.fetch_add(1, Ordering::Relaxed);
        let start = self.model.created.rotate_left(32) ^ self.numbers.seed;
        // `mix` is a bijection, so the second half alone is unique within a server's life.
        format!("{:016x}{:016x}", mix(start ^ !count), mix(count))
    }

    /// Whether an id is one that [`Self::draw_id`] drew.
    #[must_use]
    pub(crate) fn gave_out(&self, id: &str) -> bool {
        let half = |range| id.get(range).and_then(|hex| u64::from_str_radix(hex, 16).ok());
        let (Some(first), Some(second)) = (half(0..16), half(16..32)) else { return false };
        let count = unmix(second);
        let start = self.model.created.rotate_left(32) ^ self.numbers.seed;
        let drawn = self.numbers.ids.load(Ordering::Relaxed);
        id.len() == 32 && count < drawn && first == mix(start ^ !count)
    }

    /// How long a request may live, given what its client asked for.
    #[must_use]
    pub fn deadline(&self, asked: Option<Duration>) -> Option<Duration> {
        match (self.limits.request, asked) {
            (Some(limit), Some(asked)) => Some(limit.min(asked)),
            (limit, asked) => limit.or(asked),
        }
    }
}

#[derive(Debug)]
struct Numbers {
    seed: u64,
    drawn: AtomicU64,
    ids: AtomicU64,
}

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finaliser of SplitMix64: a bijection that spreads neighbouring numbers.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// What [`mix`] made this of: each of its steps undone, with the inverses of its factors.
fn unmix(mut z: u64) -> u64 {
    z = (z ^ (z >> 31) ^ (z >> 62)).wrapping_mul(0x3196_42B2_D24D_8EC3);
    z = (z ^ (z >> 27) ^ (z >> 54)).wrapping_mul(0x96DE_1B17_3F11_9089);
    z ^ (z >> 30) ^ (z >> 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unmixing_undoes_mixing() {
        for z in (0..1000).chain([u64::MAX, GOLDEN, 1 << 63]) {
            assert_eq!(unmix(mix(z)), z);
        }
    }
}
