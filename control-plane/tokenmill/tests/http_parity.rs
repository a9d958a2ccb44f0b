//! Log-probabilities through HTTP equal those of transformers, for every family and case.
//!
//! The whole path runs: weights written by `model random`, a server, its worker, float32, on the device
//! that `TOKENMILL_TEST_DEVICE` names. tests/parity/README.md says how, and how goldens were made. A
//! comparison that would also pass for a faulty model is worth nothing, so every planted fault must be
//! far outside of the tolerance.

mod common;

use common::{Server, checkpoint, here};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Of every log-probability.
const TOLERANCE: f64 = 2e-3;
/// Above this margin the likeliest token must be the reference's.
const CLEAR: f64 = 1e-2;
/// Prompt lengths of every case: one token, within a block, at and over its edge, over several.
const LENGTHS: [usize; 5] = [1, 7, 64, 65, 300];
/// How far outside of the tolerance a planted fault must be.
const FAULT_FACTOR: f64 = 50.0;

fn read(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).expect("JSON")
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().expect("an array").iter().map(|x| x.as_f64().expect("a number")).collect()
}

/// The answer's log-probability of each prompt token from the second on, and the likeliest token there.
fn prompt_of(choice: &Value, prompt: &[Value]) -> Vec<(f64, u64)> {
    let entries = choice["prompt_logprobs"].as_array().expect("prompt_logprobs");
    assert_eq!(entries.len(), prompt.len());
    assert!(entries[0].is_null(), "the first token has no probability");
    let at = |(entry, token): (&Value, &Value)| {
        let own = entry[token.to_string()]["logprob"].as_f64().expect("the token itself");
        let first = entry.as_object().expect("tokens").iter().find(|(_, about)| about["rank"] == 1);
        (own, first.expect("a likeliest token").0.parse().expect("a token id"))
    };
    entries.iter().zip(prompt).skip(1).map(at).collect()
}

/// What a case came to.
struct Outcome {
    /// The largest difference to the golden.
    worst: f64,
    /// The least that a planted fault is off.
    nearest_fault: f64,
}

/// Compares one case.
fn check(case: &Path) -> Outcome {
    let golden = read(&case.join("golden.json"));
    let faults = read(&case.join("faults.json"));
    let folder = tempfile::tempdir().expect("temporary folder");
    let seed = golden["seed"].as_u64().expect("a seed");
    let model = checkpoint(&case.join("config.json"), seed, folder.path());
    // Several servers share a device, so none may take what is free.
    let cache = (256 << 20).to_string();
    let limits = ["--dtype", "float32", "--max-model-len", "1024"];
    let memory = ["--kv-cache-memory-bytes", &cache];
    let batch = ["--max-num-seqs", "8", "--max-num-batched-tokens", "512"];
    let mut args = vec![model.to_str().expect("UTF-8")];
    args.extend(limits.iter().chain(&batch).chain(&memory));
    let server = Server::start(&args);
    let mut worst: f64 = 0.0;
    let mut nearest_fault = f64::INFINITY;
    let items = golden["prompts"].as_array().expect("prompts");
    let lengths: Vec<_> =
        items.iter().filter_map(|i| Some(i["prompt"].as_array()?.len())).collect();
    assert_eq!(lengths, LENGTHS, "{}", case.display());
    for item in items {
        let prompt = item["prompt"].as_array().expect("a prompt");
        let answer = server.ok(
            "/v1/completions",
            &json!({
                "model": "checkpoint", "prompt": prompt, "max_tokens": 8, "temperature": 0,
                "logprobs": 1, "prompt_logprobs": 1, "return_token_ids": true, "ignore_eos": true,
            }),
        );
        let choice = &answer["choices"][0];
        let what = format!("{} with {} tokens", case.display(), prompt.len());
        let ours = prompt_of(choice, prompt);
        let theirs = floats(&item["prompt_logprobs"]);
        assert_eq!(ours.len(), theirs.len(), "{what}");
        let (tops, margins) = (floats(&item["prompt_top"]), floats(&item["prompt_margins"]));
        for (i, (logprob, top)) in ours.iter().enumerate() {
            let difference = (logprob - theirs[i]).abs();
            assert!(difference <= TOLERANCE, "{what}: {difference} at prompt position {i}");
            worst = worst.max(difference);
            assert!(margins[i] <= CLEAR || *top as f64 == tops[i], "{what}: top token at {i}");
        }
        assert_eq!(choice["token_ids"], item["continuation"], "{what}: greedy tokens");
        let steps = floats(&choice["logprobs"]["token_logprobs"]);
        let theirs = floats(&item["logprobs"]);
        assert_eq!((steps.len(), theirs.len()), (8, 8), "{what}: steps");
        for (ours, theirs) in steps.iter().zip(theirs) {
            assert!((ours - theirs).abs() <= TOLERANCE, "{what}: step {ours}, {theirs}");
            worst = worst.max((ours - theirs).abs());
        }
        if let Some(faults) = faults.get(prompt.len().to_string()).and_then(Value::as_object) {
            for (fault, faulty) in faults {
                let faulty = floats(faulty);
                assert_eq!(ours.len(), faulty.len(), "{what}: {fault}");
                let largest = ours
                    .iter()
                    .zip(faulty)
                    .map(|((ours, _), faulty)| (ours - faulty).abs())
                    .fold(0.0, f64::max);
                assert!(
                    largest >= FAULT_FACTOR * TOLERANCE,
                    "{what}: {fault} is only {largest} off"
                );
                nearest_fault = nearest_fault.min(largest);
            }
        }
    }
    assert!(nearest_fault.is_finite(), "{}: no fault was compared", case.display());
    Outcome { worst, nearest_fault }
}

fn family(name: &str) {
    let cases = here().join("tests/parity/cases").join(name);
    let mut found: Vec<PathBuf> = std::fs::read_dir(&cases)
        .expect("the family's cases")
        .map(|entry| entry.expect("readable").path())
        .collect();
    found.sort();
    assert!(found.len() >= 4, "{name} has {} cases", found.len());
    for case in found {
        let Outcome { worst, nearest_fault } = check(&case);
        eprintln!(
            "{}: largest difference {worst:.2e}, nearest fault {nearest_fault:.3}",
            case.display()
        );
    }
}

#[test]
fn deepseek_v2() {
    family("deepseek_v2");
}

#[test]
fn deepseek_v3() {
    family("deepseek_v3");
}

#[test]
fn qwen3() {
    family("qwen3");
}

#[test]
fn qwen3_moe() {
    family("qwen3_moe");
}

#[test]
fn llama() {
    family("llama");
}
