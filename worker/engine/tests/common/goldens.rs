//! The goldens of transformers 5.17 in process: every prompt and step log-probability, the likeliest
//! token where the margin is clear. The same cases run through HTTP elsewhere; here a failure points at
//! the engine, and the kernels that ran have names. `TOKENMILL_GOLDENS` names a part of them, for tools
//! under which all would take too long: cases whose names contain one of its words, separated by commas.

use super::launches::{self, Before};
use super::roundings::Roundings;
use super::{Model, Setup, greedy};
use engine::{Device, KvDtype};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A margin between first and second from which on the token must be the same.
const CLEAR: f64 = 1e-2;

fn cases() -> Vec<PathBuf> {
    let root = "../../control-plane/tokenmill/tests/parity/cases";
    // Read when the test runs, so that it may be elsewhere than where it was built.
    let here = std::env::var_os("CARGO_MANIFEST_DIR");
    let root = here.map_or(env!("CARGO_MANIFEST_DIR").into(), PathBuf::from).join(root);
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

/// One prompt of a case.
struct Entry {
    prompt: Vec<u32>,
    continuation: Vec<u32>,
    /// Of the prompt, then of the continuation.
    logprobs: [Vec<f64>; 2],
    margins: Vec<f64>,
    what: String,
}

/// Names of cases that are wanted, one of which is in every name where all are.
fn wanted() -> Vec<String> {
    let words = std::env::var("TOKENMILL_GOLDENS").unwrap_or_default();
    words.split(',').map(str::to_owned).collect()
}

/// The cases by name, each with its model and prompts.
fn each(mut check: impl FnMut(&str, &Model, &[Entry])) {
    let (cases, wanted) = (cases(), wanted());
    for case in &cases {
        let name: PathBuf = case.components().rev().take(2).collect();
        let name: PathBuf = name.components().rev().collect();
        let name = name.display().to_string();
        if !wanted.iter().any(|word| name.contains(word)) {
            continue;
        }
        let golden = read(&case.join("golden.json"));
        let seed = golden["seed"].as_u64().expect("a seed");
        let model = Model::new(&read(&case.join("config.json")), seed);
        let entry = |entry: &Value| {
            let prompt = tokens(&entry["prompt"]);
            Entry {
                what: format!("{name}, {} tokens", prompt.len()),
                prompt,
                continuation: tokens(&entry["continuation"]),
                logprobs: [numbers(&entry["prompt_logprobs"]), numbers(&entry["logprobs"])],
                margins: numbers(&entry["margins"]),
            }
        };
        let entries: Vec<Entry> =
            golden["prompts"].as_array().expect("prompts").iter().map(entry).collect();
        check(&name, &model, &entries);
    }
    assert!(cases.len() >= 20, "four cases for each of five families, found {}", cases.len());
}

impl Entry {
    /// Teacher forcing: the continuation as part of the prompt.
    fn forced(&self) -> Vec<u32> {
        self.prompt.iter().chain(&self.continuation).copied().collect()
    }
}

/// Every case, on `base`, within `tolerance`; on a device in 32-bit floats on kernels for any shape.
pub fn every_case_agrees(base: Setup, tolerance: f64) {
    each(|name, model, entries| {
        let mut session = model.session(base);
        let before = Before::of(&session.engine);
        for Entry { prompt, continuation, logprobs, margins, what } in entries {
            let forced: Vec<u32> = prompt.iter().chain(continuation).copied().collect();
            let got = session.complete(&forced, 1024, 1, greedy());
            let off = worst(&got.prompt, &logprobs.concat(), what);
            assert!(off <= tolerance, "{what}: forced, off by {off}");

            // Decoding, as far as the tokens are the golden's; they must be where it is clear.
            let steps = continuation.len();
            let got = session.complete(prompt, 65, steps, greedy());
            let same = got.tokens.iter().zip(continuation).take_while(|(a, b)| a == b).count();
            assert!(same == steps || margins[same] <= CLEAR, "{what}: token {same} differs");
            let off = worst(&got.logprobs[..same], &logprobs[1][..same], what);
            assert!(off <= tolerance, "{what}: decoded, off by {off}");
            let off = worst(&got.prompt, &logprobs[0], what);
            assert!(off <= tolerance, "{what}: in chunks, off by {off}");
        }
        if base.device != Device::Cpu {
            launches::are_generic(&before.since(&session.engine), name);
        }
    });
}

/// Every case in bf16 within its roundings, those with native head dimensions on the kernels that are
/// made for them and no others.
pub fn every_case_agrees_in_bf16(base: Setup) {
    let mut native = 0;
    each(|name, model, entries| {
        let few = &entries.iter().find(|entry| entry.prompt.len() > 5).expect("a prompt").prompt;
        let roundings = Roundings::of(&model.config, model.weights, &few[..few.len().min(40)]);
        let mut session = model.session(Setup { kv_dtype: KvDtype::Bf16, ..base });
        let before = Before::of(&session.engine);
        let (mut whole, mut stepwise) = (Vec::new(), Vec::new());
        for entry in entries {
            let forced = entry.forced();
            let exact = entry.logprobs.concat();
            // In one step, and in short ones as decodes are: of one row, and of nine of nine requests.
            for (chunk, off) in [(1024, &mut whole), (1, &mut stepwise)] {
                let got = session.complete(&forced, chunk, 1, greedy()).prompt;
                assert_eq!(got.len(), exact.len(), "{}", entry.what);
                let apart = got.iter().zip(&exact).map(|(a, b)| (f64::from(*a) - b).abs());
                off.extend(apart);
            }
        }
        let names = before.since(&session.engine);
        super::say(&format!("{name} in bf16: {names:?}"));
        roundings.explain(whole, &format!("{name}, whole prompts in bf16"));
        roundings.explain(stepwise, &format!("{name}, token by token in bf16"));
        if name.contains("native") {
            native += 1;
            launches::are_production(&names, model, name);
        } else {
            launches::are_not_made_for_heads(&names, name);
        }
    });
    assert!(native >= 8 || wanted() != [""], "{native} cases have native head dimensions");
}
