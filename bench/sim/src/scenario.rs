//! What kind of world a seed makes: the cache's shape, the scheduler's limits, how often things
//! go wrong. Drawn from the seed, so that every seed is another corner.
//!
//! It runs nothing. Invariant: every scenario is one in which all requests can end.

use crate::rng::Rng;
use core::time::Duration;
use ids::{Bytes, GroupId, HashKey, Tokens};
use kv_cache::{CarveError, carve};
use scheduler::Config;
use step::{Carving, GroupKind, GroupSpec, Mesh};

/// A world's parameters. A rate of `n` means one in `n`; 0 is never.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Everything else random follows from it.
    pub seed: u64,
    /// Whether the scheduler must do what the naive model does; without, the other checks stand alone.
    pub compared: bool,
    /// Events after which no more requests come.
    pub events: u64,
    /// Which groups the model has, in a word.
    pub model: &'static str,
    /// Cache groups.
    pub groups: Vec<GroupSpec>,
    /// Their carving.
    pub carving: Carving,
    /// Shards and ranks.
    pub mesh: Mesh,
    /// Whether outcomes are joined as the driver does it; without, whatever comes is handed on as it is.
    pub joined: bool,
    /// The scheduler's limits.
    pub config: Config,
    /// Longest prompt.
    pub prompt_most: u32,
    /// Most output tokens.
    pub output_most: u32,
    /// Mean time between sessions.
    pub pause: Duration,
    /// Tenants, who share no cache.
    pub tenants: u64,
    /// Whether requests name their tenants, who then share seats and queue fairly.
    pub named: bool,
    /// Sessions whose requests kill every worker that runs them.
    pub poisons: u64,
    /// Requests that the client aborts.
    pub aborts: u64,
    /// Requests that end at a stop string.
    pub stops: u64,
    /// Requests with a deadline.
    pub deadlines: u64,
    /// Requests with prompt log-probabilities.
    pub prompt_logprobs: u64,
    /// Mean time between acts of those who meddle; none when zero.
    pub meddling: Duration,
    /// Outcomes that come again.
    pub repeats: u64,
    /// Outcomes that come before their predecessor, and again after it.
    pub reorders: u64,
    /// Outcomes that take much longer.
    pub lates: u64,
    /// Outcomes that never come.
    pub losses: u64,
    /// Outcomes that lack a sample or name a slot of their own, and as many of unknown steps.
    pub lies: u64,
    /// Outcomes whose bytes break off.
    pub garbles: u64,
    /// Outcomes in which a token could not be drawn.
    pub sample_faults: u64,
    /// Steps from which on the worker answers no more.
    pub hangs: u64,
    /// Steps in which the worker dies.
    pub deaths: u64,
    /// Outcomes whose digest is wrong.
    pub digests: u64,
}

/// In these of so many seeds there is memory behind the cache.
const TIERED: [u64; 4] = [5, 8, 10, 11];
/// See [`TIERED`].
const SEEDS: u64 = 12;

/// Which groups the model has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Model {
    /// Full attention.
    Full,
    /// Sliding window in every layer.
    Sliding,
    /// Full and sliding layers, with blocks of different size.
    Mixed,
}

impl Scenario {
    /// The world of a seed: crowded, faulty, with little cache.
    ///
    /// # Errors
    /// When the model's cache cannot be carved, which no seed brings about.
    pub fn storm(seed: u64, events: u64, depth: u32, model: Model) -> Result<Self, CarveError> {
        let mut rng = Rng::new(seed ^ 0x5EED);
        let kind = |sliding: bool, rng: &mut Rng| {
            let windows = [1, 2, 63, 64, 65, 66, 128, 129, 200];
            let window = Tokens(windows[rng.below(windows.len() as u64) as usize]);
            if sliding { GroupKind::Sliding { window } } else { GroupKind::Full }
        };
        let spec = |group, kind, bytes| GroupSpec {
            group: GroupId(group),
            kind,
            block_bytes: Bytes(bytes),
        };
        let groups = match model {
            Model::Full => vec![spec(0, kind(false, &mut rng), 64)],
            Model::Sliding => vec![spec(0, kind(true, &mut rng), 64)],
            Model::Mixed => {
                let (full, sliding) = (kind(false, &mut rng), kind(true, &mut rng));
                // Both orders, and super-blocks that hold several blocks of one group.
                if rng.one_in(2) {
                    vec![spec(0, full, 64), spec(1, sliding, 192)]
                } else {
                    vec![spec(0, sliding, 64), spec(1, full, 256)]
                }
            }
        };
        let unit: u64 = groups.iter().map(|g| g.block_bytes.0).sum();
        let tiered = TIERED.contains(&(seed % SEEDS));
        let blocks = 4 + rng.below(if rng.clone().one_in(2) { 8 } else { 36 });
        // What is in front of other memory is small: nothing goes there before the cache is full.
        let cache_bytes = Bytes(unit * if tiered { blocks.min(12) } else { blocks });
        let mut carving = carve(&groups, cache_bytes, Bytes(64))?;
        if tiered {
            // Full almost at once, or so large that what is stored is often wanted again.
            let mut rng = Rng::new(seed ^ 0x71E2);
            carving.host_blocks = 1 + rng.below_u32(if rng.clone().one_in(2) { 2 } else { 12 });
        }
        let chunks = [1, 7, 63, 64, 65, 100, 512, 512];
        let max_chunk = chunks[rng.below(chunks.len() as u64) as usize];
        let max_running = 1 + rng.below_u32(12);
        let config = Config {
            max_running,
            max_step_tokens: Tokens(max_running + 1 + rng.below_u32(400)),
            max_chunk: Tokens(max_chunk),
            max_context: Tokens(1024),
            depth,
            decode_budget: Duration::from_micros(500 + rng.below(20_000)),
            prefix_caching: !rng.one_in(5) || tiered,
            queue_requests: 20,
            queue_tokens: 4000,
            step_timeout: Duration::from_millis(600),
            release_slice: 1 + rng.below_u32(6),
            ..Config::with_key(HashKey::derive("sim", b""))
        };
        let storm = Self {
            seed,
            compared: true,
            events,
            model: match model {
                Model::Full => "Full",
                Model::Sliding => "Sliding",
                Model::Mixed => "Mixed",
            },
            groups,
            carving,
            config,
            // A prompt takes a bounded number of chunks, or nobody gets past forced preemptions.
            prompt_most: if max_chunk < 60 { 70 } else { 330 },
            output_most: 90,
            pause: Duration::from_micros(20_000 + rng.below(150_000)),
            tenants: 1 + rng.below(3),
            named: false,
            poisons: 250,
            aborts: 8,
            stops: 6,
            deadlines: 8,
            prompt_logprobs: 12,
            meddling: Duration::from_millis(40),
            repeats: 50,
            reorders: 60,
            lates: 80,
            losses: 3000,
            lies: 2000,
            garbles: 3000,
            sample_faults: 400,
            hangs: 4000,
            deaths: 1200,
            digests: 0,
            mesh: Mesh::SINGLE,
            joined: false,
        };
        Ok(if seed % 6 == 3 || seed % 6 == 5 { storm.grouped(&mut rng) } else { storm })
    }

    /// The same world with a group of ranks, in which whoever says what it was not asked ends its life.
    fn grouped(mut self, rng: &mut Rng) -> Self {
        let shapes = [(2, 1), (2, 2), (3, 1), (4, 1), (1, 2), (3, 2), (2, 1), (4, 2), (1, 1)];
        let (dp, tp) = shapes[rng.below(shapes.len() as u64) as usize];
        self.mesh = Mesh { dp, tp, expert_parallel: false };
        self.joined = true;
        self.pause /= dp;
        (self.repeats, self.digests, self.lies) = (4000, 1500, 1200);
        // A suspect keeps every shard waiting.
        (self.poisons, self.deaths) = (600, 2400);
        self
    }

    /// The same world with what serving turns on: tenants that are told apart, patience, and a look
    /// ahead at deadlines. The model knows none of it, so the other checks stand alone.
    #[must_use]
    pub fn shared(mut self) -> Self {
        self.compared = false;
        self.named = true;
        self.config.patience = 1 + (self.seed % 16) as u32;
        self.config.refuse_late = true;
        self
    }

    /// The same world with room for so many blocks of each group behind the cache.
    #[must_use]
    pub fn behind(mut self, host_blocks: u32) -> Self {
        self.carving.host_blocks = host_blocks;
        self
    }

    /// The same world without anything that goes wrong.
    #[must_use]
    pub fn calm(mut self) -> Self {
        self.poisons = 0;
        self.aborts = 0;
        self.stops = 0;
        self.deadlines = 0;
        self.meddling = Duration::ZERO;
        self.repeats = 0;
        self.reorders = 0;
        self.lates = 0;
        self.losses = 0;
        self.lies = 0;
        self.garbles = 0;
        self.sample_faults = 0;
        self.hangs = 0;
        self.deaths = 0;
        self.digests = 0;
        self
    }
}
