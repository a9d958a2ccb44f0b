//! The goldens of transformers 5.17 in process: every prompt and step log-probability, the likeliest
//! token where the margin is clear. The same cases run through HTTP elsewhere; here a failure points at
//! the engine.

use super::{Model, Setup, greedy};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A margin between first and second from which on the token must be the same.
const CLEAR: f64 = 1e-2;

fn cases() -> Vec<PathBuf> {
    let root = "../../control-plane/tokenmill/tests/parity/cases";
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(root);
    let folders = |path: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let mut paths: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
        paths.sort();
        paths
    };
    folders(&root).iter().flat_map(|family| folders(family)).collect()
}

fn read(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn tokens(value: &Value) -> Vec<u32> {
    value.as_array().expect("tokens").iter().map(|t| t.as_u64().expect("a token") as u32).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("numbers").iter().map(|x| x.as_f64().expect("a number")).collect()
}

/// The worst difference; the lists are as long as each other.
fn worst(got: &[f32], expected: &[f64], what: &str) -> f64 {
    assert_eq!(got.len(), expected.len(), "{what}");
    got.iter().zip(expected).map(|(got, e)| (f64::from(*got) - e).abs()).fold(0.0, f64::max)
}

/// Every case, on `base`, within `tolerance`.
pub fn every_case_agrees(base: Setup, tolerance: f64) {
    let cases = cases();
    assert!(cases.len() >= 20, "four cases for each of five families, found {}", cases.len());
    for case in cases {
        let name = case.display();
        let golden = read(&case.join("golden.json"));
        let seed = golden["seed"].as_u64().expect("a seed");
        let model = Model::new(&read(&case.join("config.json")), seed);
        for entry in golden["prompts"].as_array().expect("prompts") {
            let prompt = tokens(&entry["prompt"]);
            let continuation = tokens(&entry["continuation"]);
            let expected = [numbers(&entry["prompt_logprobs"]), numbers(&entry["logprobs"])];
            let what = format!("{name}, {} tokens", prompt.len());

            // Teacher forcing: the continuation as part of the prompt.
            let forced: Vec<u32> = prompt.iter().chain(&continuation).copied().collect();
            let got = model.session(base).complete(&forced, 1024, 1, greedy());
            let off = worst(&got.prompt, &expected.concat(), &what);
            assert!(off <= tolerance, "{what}: forced, off by {off}");

            // Decoding, as far as the tokens are the golden's; they must be where it is clear.
            let steps = continuation.len();
            let got = model.session(base).complete(&prompt, 65, steps, greedy());
            let same = got.tokens.iter().zip(&continuation).take_while(|(a, b)| a == b).count();
            let margins = numbers(&entry["margins"]);
            assert!(same == steps || margins[same] <= CLEAR, "{what}: token {same} differs");
            let off = worst(&got.logprobs[..same], &expected[1][..same], &what);
            assert!(off <= tolerance, "{what}: decoded, off by {off}");
            let off = worst(&got.prompt, &expected[0], &what);
            assert!(off <= tolerance, "{what}: in chunks, off by {off}");
        }
    }
}
