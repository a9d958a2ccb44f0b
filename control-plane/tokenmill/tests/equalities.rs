//! What must not change an answer does not: chunks, batches, prefix hits, run-ahead, streaming.
//!
//! Through HTTP, float32, each with proof that the feature fired. Tokens are equal and log-probabilities
//! within 1e-4. Preemption at every step is shown in process, where it can be forced.

mod common;

use common::{Server, checkpoint, config, wait_until};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;

/// Families with a sliding window, with latents and experts, and plain.
const CASES: [&str; 3] =
    ["qwen3/native_layer_types", "deepseek_v3/native_yarn", "llama/native_tied"];
const LIMITS: [&str; 6] =
    ["--max-model-len", "1024", "--max-num-seqs", "32", "--max-num-batched-tokens", "512"];

struct Model {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

fn model(case: &str) -> Model {
    let config = config(case);
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = checkpoint(&config, 3, folder.path());
    Model { _folder: folder, path }
}

impl Model {
    fn serve(&self, flags: &[&str]) -> Server {
        let mut args = vec![self.path.to_str().expect("UTF-8")];
        args.extend(LIMITS);
        args.extend(flags);
        Server::start(&args)
    }
}

/// A prompt of `length` tokens, different for each `which`.
fn prompt(which: u64, length: u64) -> Vec<u64> {
    (0..length).map(|i| (which * 7919 + i * i * 31 + i * 17) % 300).collect()
}

fn body(prompt: &[u64], temperature: f64) -> Value {
    json!({
        "model": "checkpoint", "prompt": prompt, "max_tokens": 12, "temperature": temperature,
        "seed": 11, "logprobs": 0, "return_token_ids": true, "ignore_eos": true,
    })
}

/// Token ids and log-probabilities of an answer, and its cached prompt tokens.
#[derive(Debug)]
struct Answer {
    tokens: Vec<u64>,
    logprobs: Vec<f64>,
    cached: u64,
}

fn answer(value: &Value) -> Answer {
    let choice = &value["choices"][0];
    let list = |value: &Value| value.as_array().expect("an array").clone();
    Answer {
        tokens: list(&choice["token_ids"]).iter().filter_map(Value::as_u64).collect(),
        logprobs: list(&choice["logprobs"]["token_logprobs"])
            .iter()
            .filter_map(Value::as_f64)
            .collect(),
        cached: value["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0),
    }
}

fn ask(server: &Server, prompt: &[u64], temperature: f64) -> Answer {
    answer(&server.ok("/v1/completions", &body(prompt, temperature)))
}

/// Steps that the server has run.
fn steps(server: &Server) -> f64 {
    server.metric("tokenmill_step_seconds_count").expect("steps are counted")
}

fn assert_same(what: &str, a: &Answer, b: &Answer) {
    assert_eq!(a.tokens.len(), 12, "{what}");
    assert_eq!(a.tokens, b.tokens, "{what}");
    assert_eq!((a.logprobs.len(), b.logprobs.len()), (12, 12), "{what}");
    for (x, y) in a.logprobs.iter().zip(&b.logprobs) {
        assert!((x - y).abs() <= 1e-4, "{what}: {x} and {y}");
    }
}

/// Steps planned while so many others were in flight; no series stands for more than two.
fn ahead(server: &Server, others: u32) -> f64 {
    let name = format!("tokenmill_steps_planned_total{{in_flight=\"{others}\"}}");
    server.metric(&name).unwrap_or(0.0)
}

#[test]
fn chunks_and_run_ahead_change_nothing() {
    for case in CASES {
        let model = model(case);
        let prompt = prompt(1, 150);
        let patient = model.serve(&["--run-ahead", "0"]);
        let whole = ask(&patient, &prompt, 0.0);
        assert_eq!((ahead(&patient, 1), ahead(&patient, 2)), (0.0, 0.0), "{case}");
        assert!(ahead(&patient, 0) >= 12.0, "{case}: every step is counted");
        assert!(patient.metric("tokenmill_queue_seconds_count") >= Some(1.0), "{case}");
        for chunk in ["1", "63", "64", "65"] {
            let server = model.serve(&["--max-prefill-chunk", chunk, "--no-enable-prefix-caching"]);
            assert_same(&format!("{case}, chunks of {chunk}"), &whole, &ask(&server, &prompt, 0.0));
            let steps = steps(&server);
            let least = 150 / chunk.parse::<u32>().expect("a number") + 11;
            assert!(steps >= f64::from(least), "{steps} steps for chunks of {chunk}");
        }
        for depth in ["1", "2"] {
            let server = model.serve(&["--run-ahead", depth]);
            assert_same(&format!("{case}, depth {depth}"), &whole, &ask(&server, &prompt, 0.0));
            let depth = depth.parse().expect("a number");
            assert!(ahead(&server, depth) > 0.0, "{case}: never {depth} ahead");
            assert_eq!(ahead(&server, depth + 1), 0.0, "{case}: more than {depth} ahead");
        }
    }
}

#[test]
fn a_prefix_hit_changes_nothing() {
    for case in CASES {
        let model = model(case);
        let prompt = prompt(2, 200);
        let server = model.serve(&[]);
        let cold = ask(&server, &prompt, 0.0);
        let hit = ask(&server, &prompt, 0.0);
        assert_eq!(cold.cached, 0);
        assert!(hit.cached >= 128, "{case}: {} cached tokens", hit.cached);
        assert_same(case, &cold, &hit);
        let off = model.serve(&["--no-enable-prefix-caching"]);
        ask(&off, &prompt, 0.0);
        assert_eq!(ask(&off, &prompt, 0.0).cached, 0, "{case}");
    }
}

/// A long prompt, others that push it out of the cache, and the prompt again: on one rank, on two that split
/// each layer with their own parts behind their own caches, on two shards of which one has the prefix.
#[test]
fn a_prefix_from_behind_the_cache_changes_nothing() {
    // Shapes that two ranks can split.
    let even = json!({"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 192,
        "vocab_size": 384});
    let (none, split, shards) =
        (json!({}), ["--tensor-parallel-size", "2"], ["--data-parallel-size", "2"]);
    let worlds: [(&str, &Value, u64, &[&str]); 4] = [
        (CASES[0], &none, 9, &[]),
        (CASES[1], &none, 8, &[]),
        (CASES[2], &even, 7, &split),
        (CASES[2], &none, 4, &shards),
    ];
    for (case, changed, mebibytes, mesh) in worlds {
        let mut shapes: Value =
            serde_json::from_slice(&std::fs::read(config(case)).expect("read")).expect("JSON");
        shapes
            .as_object_mut()
            .expect("fields")
            .extend(changed.as_object().expect("fields").clone());
        let folder = tempfile::tempdir().expect("temporary folder");
        let file = folder.path().join("config.json");
        std::fs::write(&file, shapes.to_string()).expect("written");
        let path = checkpoint(&file, 3, folder.path());
        let model = Model { _folder: folder, path };
        let prompt_of = |which| prompt(which, 700);
        // Little more than the longest context, of each rank.
        let cache = (mebibytes << 20).to_string();
        let room = ["--device", "cpu", "--kv-cache-memory-bytes", cache.as_str()];
        let again = |flags: &[&str]| {
            let server = model.serve(&[mesh, &room, flags].concat());
            let cold = ask(&server, &prompt_of(1), 0.0);
            let others = if mesh == shards { 6 } else { 3 };
            (2..2 + others).for_each(|which| drop(ask(&server, &prompt_of(which), 0.0)));
            let again = ask(&server, &prompt_of(1), 0.0);
            assert_eq!(cold.cached, 0);
            assert_same(case, &cold, &again);
            (server, again)
        };
        let (without, computed) = again(&[]);
        assert_eq!(computed.cached, 0, "{case} {mesh:?}: the others push it out");
        assert_eq!(without.metric("tokenmill_host_cache_stores_total"), Some(0.0), "{case}");
        let (with, back) = again(&["--kv-host-memory-bytes", "100000000"]);
        assert_eq!(back.cached, 640, "{case} {mesh:?}");
        assert_same(case, &computed, &back);
        let of = |name: &str| with.metric(&format!("tokenmill_host_cache_{name}")).unwrap_or(0.0);
        let hit = || of("hit_tokens_total") > 0.0;
        wait_until("a hit behind the cache", Duration::from_secs(5), hit);
        assert!(of("loads_total") > 0.0 && of("blocks") > 0.0, "{case} {mesh:?}");
        assert!(of("stores_total") >= of("blocks"), "{case} {mesh:?}");
    }
}

#[test]
fn a_batch_gives_what_each_gets_alone() {
    for case in CASES {
        let model = model(case);
        let server = model.serve(&["--no-enable-prefix-caching"]);
        for temperature in [0.0, 0.8] {
            let prompts: Vec<Vec<u64>> = (0..32).map(|i| prompt(i, 3 + i * 5)).collect();
            let before = steps(&server);
            let alone: Vec<Answer> =
                prompts.iter().map(|prompt| ask(&server, prompt, temperature)).collect();
            let between = steps(&server);
            let together: Vec<Answer> = std::thread::scope(|scope| {
                let asked: Vec<_> = prompts
                    .iter()
                    .map(|prompt| scope.spawn(|| ask(&server, prompt, temperature)))
                    .collect();
                asked.into_iter().map(|one| one.join().expect("answered")).collect()
            });
            // Alone each takes twelve steps; a step that serves several makes fewer of them.
            let (alone_steps, batch_steps) = (between - before, steps(&server) - between);
            eprintln!(
                "{case} at {temperature}: {alone_steps} steps alone, {batch_steps} in a batch"
            );
            assert!(alone_steps >= 384.0, "{alone_steps} steps for one after the other");
            assert!(batch_steps <= alone_steps / 2.0, "{batch_steps} of {alone_steps} steps");
            for (i, (a, b)) in alone.iter().zip(&together).enumerate() {
                assert_same(&format!("{case}, prompt {i} at {temperature}"), a, b);
            }
        }
    }
}

#[test]
fn a_stream_says_what_the_whole_answer_says() {
    for case in CASES {
        let model = model(case);
        let server = model.serve(&[]);
        let prompt = prompt(4, 70);
        for temperature in [0.0, 0.8] {
            let whole = ask(&server, &prompt, temperature);
            let mut streamed = body(&prompt, temperature);
            streamed["stream"] = true.into();
            let events = server.stream("/v1/completions", &streamed);
            assert!(events.len() >= 12, "a token at a time, not {} events", events.len());
            let of = |field: &dyn Fn(&Value) -> Value| -> Vec<Value> {
                events
                    .iter()
                    .filter_map(|e| field(&e["choices"][0]).as_array().cloned())
                    .flatten()
                    .collect()
            };
            let tokens = of(&|choice| choice["token_ids"].clone());
            let logprobs = of(&|choice| choice["logprobs"]["token_logprobs"].clone());
            let streamed = Answer {
                tokens: tokens.iter().filter_map(Value::as_u64).collect(),
                logprobs: logprobs.iter().filter_map(Value::as_f64).collect(),
                cached: 0,
            };
            assert_same(&format!("{case}, streamed at {temperature}"), &whole, &streamed);
        }
    }
}
