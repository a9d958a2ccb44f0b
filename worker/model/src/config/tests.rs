//! Both dialects of each family, and what is refused by which name.

use super::*;
use serde_json::json;

fn llama() -> Value {
    json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128_256,
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
        "eos_token_id": [128_001, 128_008], "torch_dtype": "bfloat16", "rope_theta": 500_000.0,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"}
    })
}

fn deepseek_v2() -> Value {
    json!({
        "model_type": "deepseek_v2", "vocab_size": 102_400, "hidden_size": 2048,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "kv_lora_rank": 512, "q_lora_rank": null, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "n_routed_experts": 64, "num_experts_per_tok": 6,
        "n_shared_experts": 2, "moe_intermediate_size": 1408, "intermediate_size": 10_944,
        "first_k_dense_replace": 1, "scoring_func": "softmax", "norm_topk_prob": false,
        "topk_method": "greedy", "n_group": 1, "topk_group": 1,
        "max_position_embeddings": 163_840, "rope_theta": 10_000,
        "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1,
            "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096}
    })
}

fn with(mut base: Value, field: &str, value: Value) -> Value {
    base[field] = value;
    base
}

fn read(value: &Value) -> Result<Parsed, ConfigError> {
    parse(&value.to_string())
}

#[test]
fn both_dialects_of_rope_and_dtype_mean_the_same() {
    let published = read(&llama()).expect("published").config;
    let mut newer = llama();
    let map = newer.as_object_mut().expect("object");
    let mut rope = map.remove("rope_scaling").expect("scaling");
    rope["rope_theta"] = map.remove("rope_theta").expect("theta");
    map.remove("torch_dtype");
    map.insert("dtype".into(), json!("bfloat16"));
    map.insert("rope_parameters".into(), rope.clone());
    assert_eq!(read(&newer).expect("transformers 5").config, published);

    newer["rope_parameters"] = json!({"full_attention": rope, "sliding_attention": rope});
    assert_eq!(read(&newer).expect("per layer type").config, published);
    newer["rope_parameters"]["sliding_attention"]["rope_theta"] = json!(1e4);
    assert!(refusal(&newer).contains("rope_parameters"));
}

fn refusal(value: &Value) -> String {
    read(value).expect_err("a refusal").to_string()
}

#[test]
fn the_published_deepseek_v2_lite_is_read_whole() {
    let parsed = read(&deepseek_v2()).expect("published");
    assert_eq!(parsed.warnings, []);
    let ModelConfig::DeepSeek(config) = parsed.config else { panic!("another family") };
    assert_eq!((config.dense_layers, config.groups, config.attention.q_lora), (1, None, None));
    assert!(config.attention.rope.interleaved);
    // 0.1 * 0.707 * ln 40 + 1, squared; cosines stay unscaled as both mscales are equal.
    let scale = (0.1_f64 * 0.707 * 40.0_f64.ln() + 1.0).powi(2);
    assert!((config.attention.rope.softmax_factor() - scale).abs() < 1e-12);
    assert!((config.attention.rope.attention_factor() - 1.0).abs() < 1e-7);
}

#[test]
fn a_refusal_names_field_value_and_what_is_supported() {
    let v3 = |field: &str, value| {
        let base = with(deepseek_v2(), "model_type", json!("deepseek_v3"));
        let base =
            with(with(base, "scoring_func", json!("sigmoid")), "topk_method", json!("noaux_tc"));
        with(base, field, value)
    };
    let cases = [
        (with(llama(), "model_type", json!("gpt_oss")), "model_type", "deepseek_v3"),
        (with(llama(), "hidden_act", json!("gelu")), "hidden_act", "silu"),
        (with(llama(), "num_key_value_heads", json!(7)), "num_key_value_heads", "7"),
        (with(llama(), "hidden_size", json!(-4)), "hidden_size", "integer"),
        (with(llama(), "hidden_size", json!(1u64 << 40)), "hidden_size", "integer"),
        (with(llama(), "rope_scaling", json!({"type": "longrope"})), "rope_scaling.type", "yarn"),
        (
            with(llama(), "rope_scaling", json!({"type": "linear", "factor": 2, "what": 1})),
            "rope_scaling.what",
            "without it",
        ),
        (
            with(llama(), "quantization_config", json!({"quant_method": "awq"})),
            "quantization_config.quant_method",
            "fp8",
        ),
        (with(deepseek_v2(), "norm_topk_prob", json!(true)), "norm_topk_prob", "false"),
        (with(deepseek_v2(), "scoring_func", json!("sigmoid")), "scoring_func", "softmax"),
        (with(deepseek_v2(), "num_experts_per_tok", json!(65)), "num_experts_per_tok", "64"),
        (v3("n_group", json!(7)), "n_group", "divisor"),
        (v3("topk_method", json!("greedy")), "topk_method", "noaux_tc"),
    ];
    for (config, field, hint) in cases {
        let text = refusal(&config);
        assert!(text.contains(field) && text.contains(hint), "{field}: {text}");
    }
    let mut missing = llama();
    missing.as_object_mut().expect("object").remove("vocab_size");
    assert!(refusal(&missing).contains("vocab_size"));
    assert!(matches!(parse("[1]"), Err(ConfigError::Syntax(None))));
}

#[test]
fn an_unknown_field_is_a_warning() {
    let parsed = read(&with(llama(), "new_thing", json!(3))).expect("parsed");
    assert_eq!(parsed.warnings.len(), 1);
    assert_eq!(parsed.warnings[0].to_string(), "unknown field new_thing = 3 has no effect");
}

#[test]
fn fp8_blocks_are_exposed() {
    let fp8 = json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128]});
    let parsed = read(&with(llama(), "quantization_config", fp8)).expect("parsed");
    let quantization = parsed.config.decoder().quantization.clone();
    assert_eq!(quantization, Some(Fp8Blocks { block: (128, 128), skipped: vec![] }));
}

#[test]
fn sliding_layers_come_from_the_types_or_the_first_sliding_layer() {
    let mut qwen = with(llama(), "model_type", json!("qwen3"));
    qwen["rope_scaling"] = json!(null);
    qwen["num_hidden_layers"] = json!(3);
    qwen["sliding_window"] = json!(16);
    qwen["max_window_layers"] = json!(1);
    let windows = |value: &Value| match read(value).expect("parsed").config {
        ModelConfig::Qwen3(config) => config.windows,
        _ => panic!("another family"),
    };
    assert_eq!(windows(&qwen), [None; 3]);
    qwen["use_sliding_window"] = json!(true);
    assert_eq!(windows(&qwen), [None, Some(16), Some(16)]);
    qwen["layer_types"] = json!(["sliding_attention", "full_attention", "sliding_attention"]);
    assert_eq!(windows(&qwen), [Some(16), None, Some(16)]);
    qwen["use_sliding_window"] = json!(false);
    assert!(refusal(&qwen).contains("sliding_window"));
}

#[test]
fn yarn_keeps_fast_and_divides_slow_frequencies() {
    let ModelConfig::DeepSeek(config) = read(&deepseek_v2()).expect("parsed").config else {
        panic!("another family")
    };
    let (rope, freq) = (&config.attention.rope, config.attention.rope.inv_freq());
    let plain = RopeConfig { scaling: RopeScaling::None, ..rope.clone() }.inv_freq();
    assert_eq!(freq.len(), 32);
    assert!((freq[0] - plain[0]).abs() < 1e-9);
    assert!((freq[31] * 40.0 - plain[31]).abs() < 1e-9);
}
