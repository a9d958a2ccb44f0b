//! Tiny models of every family, and a hand that writes plans: the scheduler's part, without policy.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

pub mod agreement;
pub mod ahead;
pub mod equalities;
pub mod forced;
pub mod goldens;
pub mod later;
pub mod launches;
pub mod long;
pub mod mixed;
pub mod naive;
pub mod origins;
pub mod poison;
pub mod prompts;
pub mod ranks;
pub mod roundings;

use engine::{Device, Engine, EngineError, KvDtype, MlaForm, Options, WeightSource};
use ids::{
    BLOCK_TOKENS, BlockId, Bytes, GroupId, Incarnation, RequestId, SlotGeneration, SlotId, StepSeq,
    TokenId, Tokens,
};
use model::config::{self, ModelConfig};
use model::lower::lower;
use model::mesh::{Mesh, Rank};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use step::{
    Admit, Carving, Configure, DecodeDelta, GroupSpec, GroupTable, Outcome, PrefillRun, Sampling,
    Section, SlotOp, SlotRef, StepPlan, Upload, WriteSlot,
};
use weights::Weights;
use weights::progress::Silent;
use weights::random::{Profile, RandomModel, TensorSpec};

/// A base with the fields given laid over it.
pub fn over(mut base: Value, fields: Value) -> Value {
    for (key, value) in fields.as_object().expect("an object") {
        base[key] = value.clone();
    }
    base
}

fn base(kind: &str) -> Value {
    json!({
        "model_type": kind, "architectures": ["Test"], "vocab_size": 97, "hidden_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 56,
        "max_position_embeddings": 512, "rope_theta": 1000.0
    })
}

/// Every family, with each feature that changes the arithmetic at least once.
pub fn families() -> Vec<(&'static str, Value)> {
    let gqa = json!({"num_key_value_heads": 2, "head_dim": 16});
    let mla = json!({"num_attention_heads": 3, "kv_lora_rank": 24, "q_lora_rank": null,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 12,
        "num_experts_per_tok": 3, "n_shared_experts": 2, "moe_intermediate_size": 20,
        "first_k_dense_replace": 1});
    let yarn = json!({"type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1,
        "mscale": 0.707, "mscale_all_dim": 1.0, "original_max_position_embeddings": 128});
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    let v3 = json!({"q_lora_rank": 20, "n_group": 4, "topk_group": 2,
        "norm_topk_prob": true, "routed_scaling_factor": 1.5});
    vec![
        ("llama", over(over(base("llama"), gqa.clone()), json!({"rope_scaling": llama3}))),
        (
            "llama, biases, tied",
            over(
                over(base("llama"), gqa.clone()),
                json!({"attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true}),
            ),
        ),
        ("qwen3", over(base("qwen3"), gqa.clone())),
        (
            "qwen3, sliding",
            over(
                over(base("qwen3"), gqa.clone()),
                json!({"use_sliding_window": true, "sliding_window": 70, "max_window_layers": 1}),
            ),
        ),
        (
            "qwen3_moe",
            over(
                over(base("qwen3_moe"), gqa),
                json!({"num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 20,
                    "norm_topk_prob": true, "mlp_only_layers": [1]}),
            ),
        ),
        (
            "deepseek_v2",
            over(over(base("deepseek_v2"), mla.clone()), json!({"rope_scaling": yarn})),
        ),
        (
            "deepseek_v2, groups",
            over(
                over(base("deepseek_v2"), mla.clone()),
                json!({"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2,
                    "routed_scaling_factor": 4.0, "q_lora_rank": 20}),
            ),
        ),
        (
            "deepseek_v3",
            over(
                over(base("deepseek_v3"), mla.clone()),
                over(v3.clone(), json!({"rope_scaling": yarn})),
            ),
        ),
        (
            "deepseek_v3, halves",
            over(over(base("deepseek_v3"), mla), over(v3, json!({"rope_interleave": false}))),
        ),
    ]
}

/// Head dimensions of published models, which the fast kernels are made for; odd head counts.
pub fn native() -> Vec<(&'static str, Value)> {
    let mla = json!({"num_attention_heads": 3, "num_key_value_heads": 3, "kv_lora_rank": 512,
        "q_lora_rank": null, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
        "num_hidden_layers": 2});
    // Results of so many heads lie apart from what they are made of, as those of published models do: steps
    // of one or two rows then take one launch of attention.
    let wide = over(mla.clone(), json!({"num_attention_heads": 8, "num_key_value_heads": 8}));
    let gqa = json!({"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 128,
        "num_hidden_layers": 2});
    let narrow = json!({"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64,
        "num_hidden_layers": 2});
    vec![
        ("qwen3, native", over(base("qwen3"), gqa)),
        ("llama, native", over(base("llama"), narrow)),
        ("deepseek_v2, native", over(base("deepseek_v2"), mla.clone())),
        ("deepseek_v3, native", over(base("deepseek_v3"), wide)),
    ]
}

/// A model of attention with so many heads, KV heads and their width.
pub fn over_native(kind: &str, heads: usize, kv_heads: usize, width: usize) -> Value {
    let fields = json!({"num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": width, "num_hidden_layers": 2});
    over(base(kind), fields)
}

/// A model with its weights, for as long as the test process lives.
#[derive(Clone)]
pub struct Model {
    pub config: ModelConfig,
    pub weights: &'static Weights,
    /// What the weights are made of.
    pub random: RandomModel,
    pub specs: Vec<TensorSpec>,
    pub program: model::program::Program,
    lowered: model::lower::Lowered,
}

impl Model {
    pub fn new(config: &Value, seed: u64) -> Self {
        let config = config::parse(&config.to_string()).expect("a valid config").config;
        let program = model::families::program(&config, false);
        let lowered = lower(&program, Mesh::SINGLE, Rank(0), 64).expect("one rank");
        let specs: Vec<_> = lowered
            .tensors()
            .map(|(name, shape)| TensorSpec {
                name: name.to_owned(),
                shape,
                dtype: safetensors::Dtype::F32,
            })
            .collect();
        let tied_embeddings = config.decoder().tied;
        let random = RandomModel { seed, profile: Profile::Parity, tied_embeddings };
        let weights = Weights::random(&random, &specs, 1, &Silent).expect("random weights");
        let weights = Box::leak(Box::new(weights));
        Self { config, weights, random, specs, program, lowered }
    }

    /// Of every attention in steps on a CUDA device which only decode.
    pub fn attention_kernels(&self, kv_dtype: KvDtype) -> Vec<&'static str> {
        engine::cuda_attention(&self.lowered, kv_dtype)
    }

    pub fn session(&self, options: Setup) -> Session {
        self.session_over(self.weights, options)
    }

    /// An engine that is not configured yet.
    pub fn engine(&self) -> Engine<'static> {
        self.engine_over(self.weights).expect("weights")
    }

    /// The same over other weights.
    pub fn engine_over<'w>(
        &self,
        weights: &'w dyn WeightSource,
    ) -> Result<Engine<'w>, EngineError> {
        let options = Options {
            device: Device::Cpu,
            threads: 1,
            kv_dtype: KvDtype::F32,
            cache_bytes: Bytes(1 << 20),
            graphs: false,
            mla_form: MlaForm::Auto,
            failing_launch: None,
        };
        Engine::new(&self.program, self.lowered.clone(), weights, options)
    }

    /// Why an engine whose cache is one super-block of `bytes` bytes is refused.
    pub fn refused(&self, setup: Setup, bytes: u64) -> EngineError {
        let options = Options {
            device: setup.device,
            threads: 1,
            kv_dtype: setup.kv_dtype,
            cache_bytes: Bytes(bytes),
            graphs: setup.graphs,
            mla_form: setup.form,
            failing_launch: None,
        };
        let lowered = self.lowered.clone();
        let mut engine =
            Engine::new(&self.program, lowered, self.weights, options).expect("weights");
        let per_super = vec![1; engine.hello().groups.len()];
        let configure = Configure {
            incarnation: LIFE,
            max_slots: 4,
            max_step_tokens: Tokens(64),
            max_context: Tokens(512),
            carving: Carving { super_bytes: Bytes(bytes), supers: 1, per_super },
        };
        engine.configure(&configure).expect_err("a cache that does not fit")
    }

    /// A session over other weights of the same shapes.
    pub fn session_over(&self, weights: &'static dyn WeightSource, options: Setup) -> Session {
        let engine_options = Options {
            device: options.device,
            threads: 2,
            kv_dtype: options.kv_dtype,
            cache_bytes: Bytes(1 << 30),
            graphs: options.graphs,
            mla_form: options.form,
            failing_launch: options.failing_launch,
        };
        let lowered = self.lowered.clone();
        let mut engine = Engine::new(&self.program, lowered, weights, engine_options)
            .expect("weights as the program wants them");
        let hello = engine.hello();
        let (configure, hand) = begin(&hello.groups, hello.alignment.0, &options);
        engine.configure(&configure).expect("a carving that fits");
        Session { engine, hand }
    }
}

/// How the cache of these groups is carved, and a hand that writes plans for it.
pub fn begin(groups: &[GroupSpec], alignment: u64, options: &Setup) -> (Configure, Hand) {
    let largest = groups.iter().map(|g| g.block_bytes.0).max().expect("a group");
    let super_bytes = (largest * 3 + 64).next_multiple_of(alignment);
    let supers = options.supers;
    let per_super: Vec<u32> =
        groups.iter().map(|g| (super_bytes / g.block_bytes.0) as u32).collect();
    // Super-blocks go round the groups; within a group, blocks come in a scattered order.
    let groups = groups.len() as u32;
    let free = (0..groups).map(|g| {
        let of = per_super[g as usize];
        let mut ids: Vec<u32> =
            (0..supers).filter(|s| s % groups == g).flat_map(|s| s * of..(s + 1) * of).collect();
        if options.scattered {
            ids.sort_by_key(|id| id.wrapping_mul(2_654_435_761));
        }
        ids
    });
    let hand = Hand {
        prompt_logprobs: Some(2),
        seq: StepSeq::ZERO,
        free: free.collect(),
        slots: BTreeMap::new(),
        ops: Vec::new(),
        uploads: Vec::new(),
        generations: 0,
    };
    let configure = Configure {
        incarnation: LIFE,
        max_slots: options.slots,
        max_step_tokens: Tokens(options.tokens),
        max_context: Tokens(options.context),
        carving: Carving { super_bytes: Bytes(super_bytes), supers, per_super },
    };
    (configure, hand)
}

pub const LIFE: Incarnation = Incarnation(7);

#[derive(Clone, Copy)]
pub struct Setup {
    pub device: Device,
    pub kv_dtype: KvDtype,
    pub form: MlaForm,
    pub scattered: bool,
    pub graphs: bool,
    /// A launch of steps that fails.
    pub failing_launch: Option<u64>,
    /// Requests at once, tokens of a step, tokens of a context, super-blocks of three blocks.
    pub slots: u32,
    pub tokens: u32,
    pub context: u32,
    pub supers: u32,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            kv_dtype: KvDtype::F32,
            form: MlaForm::Auto,
            scattered: true,
            graphs: false,
            failing_launch: None,
            slots: 40,
            tokens: 1024,
            context: 512,
            supers: 90,
        }
    }
}

/// What the hand knows of a slot.
struct Known {
    known: u32,
    computed: u32,
    blocks: u32,
    /// Blocks of every table that were another slot's first.
    shared: usize,
    decodes: bool,
    tables: Vec<Vec<BlockId>>,
}

/// Writes plans; what it says of tokens is in `uploads` until somebody passes it on.
pub struct Hand {
    /// How many likeliest tokens are listed with each one of a prompt.
    pub prompt_logprobs: Option<u8>,
    pub uploads: Vec<Upload>,
    seq: StepSeq,
    free: Vec<Vec<u32>>,
    slots: BTreeMap<u32, Known>,
    ops: Vec<SlotOp>,
    generations: u32,
}

/// A hand and the engine that it writes for.
pub struct Session {
    pub engine: Engine<'static>,
    hand: Hand,
}

impl Deref for Session {
    type Target = Hand;

    fn deref(&self) -> &Hand {
        &self.hand
    }
}

impl DerefMut for Session {
    fn deref_mut(&mut self) -> &mut Hand {
        &mut self.hand
    }
}

impl Hand {
    /// Known and computed tokens of a slot.
    pub fn progress(&self, slot: u32) -> (u32, u32) {
        (self.slots[&slot].known, self.slots[&slot].computed)
    }

    /// How many slots decode in a step that ends the lives of these first.
    pub fn decoding(&self, retired: &[u32]) -> u32 {
        let decodes = |(slot, known): &(&u32, &Known)| known.decodes && !retired.contains(slot);
        self.slots.iter().filter(decodes).count() as u32
    }

    /// Blocks of a slot as its tables have them, per group.
    pub fn blocks(&self, slot: u32) -> Vec<Vec<BlockId>> {
        self.slots[&slot].tables.clone()
    }

    /// Says the tokens, and admits with the next step.
    pub fn admit(&mut self, slot: u32, tokens: &[u32], prompt: usize, sampling: Sampling) {
        let groups = self.free.len();
        self.admit_shared(slot, tokens, prompt, sampling, vec![vec![]; groups], 0);
    }

    /// As `admit`, on shared blocks of which the group 1 leaves out the first `skipped`.
    pub fn admit_shared(
        &mut self,
        slot: u32,
        tokens: &[u32],
        prompt: usize,
        sampling: Sampling,
        shared: Vec<Vec<BlockId>>,
        skipped: u32,
    ) {
        self.generations += 1;
        let request = RequestId(u64::from(self.generations));
        let upload = |offset: usize, tokens: &[u32]| Upload {
            incarnation: LIFE,
            request,
            offset: Tokens(offset as u32),
            tokens: tokens.iter().copied().map(TokenId).collect(),
        };
        let (first, rest) = tokens.split_at(tokens.len() / 2);
        self.uploads.extend([upload(0, first), upload(first.len(), rest)]);
        self.ops.push(SlotOp::Admit(Box::new(Admit {
            slot: SlotRef { slot: SlotId(slot), generation: SlotGeneration(self.generations) },
            request,
            known: Tokens(tokens.len() as u32),
            prompt: Tokens(prompt as u32),
            cached: Tokens(shared[0].len() as u32 * BLOCK_TOKENS),
            tables: (0..)
                .zip(&shared)
                .map(|(group, blocks)| {
                    let skipped = if group == 1 { skipped } else { 0 };
                    let blocks = blocks[skipped as usize..].to_vec();
                    GroupTable { group: GroupId(group), skipped, blocks }
                })
                .collect(),
            sampling: Arc::new(sampling),
            prompt_logprobs: self.prompt_logprobs,
        })));
        let (known, blocks) = (tokens.len() as u32, shared[0].len() as u32);
        let (computed, of_others) = (blocks * BLOCK_TOKENS, shared[0].len());
        self.slots.insert(
            slot,
            Known { known, computed, blocks, shared: of_others, decodes: false, tables: shared },
        );
    }

    /// Its own blocks are the next ones taken, with all that they hold.
    pub fn retire(&mut self, slot: u32) {
        let known = self.slots.remove(&slot).expect("admitted");
        for (free, table) in self.free.iter_mut().zip(&known.tables) {
            free.extend(table[known.shared..].iter().map(|block| block.0));
        }
        self.ops.push(SlotOp::Retire { slot: SlotId(slot) });
    }

    /// One step: chunks of these lengths, and everything that decodes. A chunk that ends the known
    /// tokens samples and joins the decode set.
    pub fn plan(&mut self, chunks: &[(u32, u32)]) -> StepPlan {
        let mut prefill = Vec::new();
        let mut join = Vec::new();
        let mut grow = Vec::new();
        let decoding: Vec<u32> =
            self.slots.iter().filter(|(_, known)| known.decodes).map(|(slot, _)| *slot).collect();
        for slot in decoding {
            grow.push((slot, 1));
        }
        for &(slot, tokens) in chunks {
            grow.push((slot, tokens));
            let known = self.slots.get_mut(&slot).expect("admitted");
            let sample = known.computed + tokens == known.known;
            prefill.push(PrefillRun { slot: SlotId(slot), tokens: Tokens(tokens), sample });
            if sample {
                known.decodes = true;
                join.push(SlotId(slot));
            }
        }
        for (slot, tokens) in grow {
            let known = self.slots.get_mut(&slot).expect("admitted");
            known.computed += tokens;
            if known.computed == known.known {
                known.known += 1;
            }
            let mut blocks = Vec::new();
            while known.blocks * BLOCK_TOKENS < known.computed {
                for (group, free) in self.free.iter_mut().enumerate() {
                    let block = BlockId(free.pop().expect("a free block"));
                    known.tables[group].push(block);
                    blocks.push(WriteSlot { group: GroupId(group as u8), block });
                }
                known.blocks += 1;
            }
            if !blocks.is_empty() {
                self.ops.push(SlotOp::Extend { slot: SlotId(slot), blocks });
            }
        }
        self.seq = self.seq.next();
        StepPlan {
            seq: self.seq,
            incarnation: LIFE,
            bucket: Tokens(64),
            shard_tokens: vec![Tokens(1)],
            sections: vec![Section {
                ops: core::mem::take(&mut self.ops),
                prefill,
                decode: DecodeDelta { join, leave: vec![] },
            }],
        }
    }
}

impl Session {
    /// As the hand's, after the engine was told the tokens.
    pub fn plan(&mut self, chunks: &[(u32, u32)]) -> StepPlan {
        for upload in self.hand.uploads.drain(..) {
            self.engine.upload(&upload).expect("tokens in order");
        }
        self.hand.plan(chunks)
    }

    /// A planned step, executed.
    pub fn step(&mut self, chunks: &[(u32, u32)]) -> Outcome {
        let plan = self.plan(chunks);
        self.engine.step(&plan).expect("a plan that fits")
    }

    /// A request alone: its prompt in chunks of `chunk`, then decodes until `output` tokens.
    pub fn complete(
        &mut self,
        prompt: &[u32],
        chunk: usize,
        output: usize,
        sampling: Sampling,
    ) -> Completion {
        self.admit(0, prompt, prompt.len(), sampling);
        let mut done = Completion::default();
        for part in prompt.chunks(chunk) {
            let outcome = self.step(&[(0, part.len() as u32)]);
            done.take(outcome);
        }
        while done.tokens.len() < output {
            let outcome = self.step(&[]);
            done.take(outcome);
        }
        self.retire(0);
        done
    }
}

/// What came back for one request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Completion {
    pub tokens: Vec<u32>,
    /// Of the sampled tokens, where asked for.
    pub logprobs: Vec<f32>,
    /// Of the prompt's tokens from the second on.
    pub prompt: Vec<f32>,
}

impl Completion {
    pub fn take(&mut self, outcome: Outcome) {
        for part in outcome.prompt_logprobs {
            assert_eq!(part.first.as_usize(), self.prompt.len() + 1, "parts come in order");
            self.prompt.extend(part.entries.iter().map(|entry| entry.chosen.logprob));
        }
        for sampled in outcome.sampled {
            assert_eq!(sampled.fault, None);
            self.tokens.push(sampled.token.0);
            self.logprobs.extend(sampled.logprobs.map(|logprobs| logprobs.chosen.logprob));
        }
    }

    /// Same tokens, log-probabilities within `tolerance`.
    #[track_caller]
    pub fn assert_close(&self, other: &Self, tolerance: f32, what: &str) {
        assert_eq!(self.tokens, other.tokens, "{what}: tokens");
        for (name, a, b) in
            [("prompt", &self.prompt, &other.prompt), ("output", &self.logprobs, &other.logprobs)]
        {
            assert_eq!(a.len(), b.len(), "{what}: {name}");
            for (at, (a, b)) in a.iter().zip(b).enumerate() {
                assert!((a - b).abs() <= tolerance, "{what}: {name} {at}: {a} against {b}");
            }
        }
    }
}

/// Greedy with log-probabilities.
pub fn greedy() -> Sampling {
    Sampling { logprobs: Some(3), ..Sampling::default() }
}

/// A prompt of `n` tokens.
pub fn prompt(n: usize, seed: u32) -> Vec<u32> {
    let mut state = seed.wrapping_mul(747_796_405).wrapping_add(1);
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) % 97
        })
        .collect()
}

/// Whether tests that take long do a part of what they do: for tools, and for kernels that sleep.
pub fn small() -> bool {
    std::env::var_os("TOKENMILL_TEST_SMALL").is_some()
}

/// Past the test runner's capture.
pub fn say(what: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{what}");
}
