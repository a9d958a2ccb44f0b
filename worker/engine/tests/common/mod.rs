//! Tiny models of every family, and sessions over them.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

pub mod agreement;
pub mod ahead;
pub mod behind;
pub mod equalities;
pub mod forced;
pub mod goldens;
pub mod hand;
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

pub use hand::{Hand, begin};

use engine::{Device, Engine, EngineError, KvDtype, MlaForm, Options, WeightSource};
use ids::{Bytes, Incarnation, Tokens};
use model::config::{self, ModelConfig};
use model::lower::lower;
use model::mesh::{Mesh, Rank};
use serde_json::{Value, json};
use std::ops::{Deref, DerefMut};
use step::{Carving, Configure, Outcome, Sampling, StepPlan};
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
            host_bytes: Bytes(0),
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
            host_bytes: Bytes(0),
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
            carving: Carving { super_bytes: Bytes(bytes), supers: 1, per_super, host_blocks: 0 },
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
            host_bytes: Bytes(1 << 26),
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
    /// Blocks of each group behind the cache.
    pub places: u32,
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
            places: 0,
        }
    }
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
