//! Models on several worker processes that exchange what their meshes need, behind one scheduler: the same
//! answers as from one process, and nothing lost or repeated when a rank dies, hangs or lies.
//!
//! Shapes are small and divide by four. What each rank holds and moves is tested where ranks are threads; this
//! is about processes.

mod common;

use common::between::{Between, Way};
use common::{Server, checkpoint, config, signal, wait_until};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

const TOKENS: usize = 24;

/// A case's shapes with some of them changed, and random weights of these.
fn model(case: &str, changed: &Value, folder: &Path) -> PathBuf {
    let text = std::fs::read_to_string(config(case)).expect("the case's configuration");
    let mut shapes: Value = serde_json::from_str(&text).expect("JSON");
    for (field, value) in changed.as_object().expect("fields") {
        shapes[field] = value.clone();
    }
    let file = folder.join("config.json");
    std::fs::write(&file, shapes.to_string()).expect("written");
    checkpoint(&file, 11, folder)
}

fn serve(model: &Path, mesh: &[&str], more: &[&str]) -> Vec<String> {
    let own = [model.to_str().expect("UTF-8"), "--device", "cpu", "--max-model-len", "512"];
    let all = own.iter().chain(&["--threads", "1", "--max-num-seqs", "8"]).chain(mesh).chain(more);
    all.map(|word| (*word).to_owned()).collect()
}

fn start(model: &Path, mesh: &[&str]) -> Server {
    let args = serve(model, mesh, &[]);
    Server::start(&args.iter().map(String::as_str).collect::<Vec<_>>())
}

fn body(stream: u64, tokens: usize, temperature: f64) -> Value {
    let length = 20 + 37 * stream;
    let prompt: Vec<u64> = (0..length).map(|i| (i * i * 31 + i * 17 + stream) % 300).collect();
    json!({
        "model": "checkpoint", "prompt": prompt, "max_tokens": tokens, "seed": stream + 1,
        "temperature": temperature, "logprobs": 0, "return_token_ids": true, "ignore_eos": true,
        "stream": true,
    })
}

/// Streams an answer to its end; tokens with log-probabilities.
fn follow(url: &str, body: &Value, mut each: impl FnMut()) -> Vec<(u64, f64)> {
    let mut got = Vec::new();
    common::follow(url, body, |choice| {
        for (token, logprob) in common::tokens(choice) {
            got.push((token, logprob.expect("a number")));
            each();
        }
    });
    got
}

/// Several streams at once; `disturb` runs when `after` tokens have come in all.
fn load(
    server: &Server,
    bodies: &[Value],
    after: usize,
    disturb: impl FnOnce(),
) -> Vec<Vec<(u64, f64)>> {
    std::thread::scope(|scope| {
        let (token, tokens) = mpsc::channel();
        let stream = |body| {
            let (url, token) = (server.url.as_str(), token.clone());
            // Once enough have come nobody counts them.
            scope.spawn(move || follow(url, body, || token.send(()).unwrap_or(())))
        };
        let streams: Vec<_> = bodies.iter().map(stream).collect();
        drop(token);
        assert_eq!(tokens.iter().take(after).count(), after, "streams that go on");
        disturb();
        streams.into_iter().map(|stream| stream.join().expect("a whole stream")).collect()
    })
}

fn same(got: &[Vec<(u64, f64)>], expected: &[Vec<(u64, f64)>], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (stream, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(got.len(), expected.len(), "{what}, stream {stream}");
        for (at, ((a, x), (b, y))) in got.iter().zip(expected).enumerate() {
            assert_eq!(a, b, "{what}, stream {stream}, token {at}: {x} and {y}");
            assert!((x - y).abs() <= 1e-4, "{what}, stream {stream}, token {at}: {x} and {y}");
        }
    }
}

const TP2: &[&str] = &["--tensor-parallel-size", "2"];
const TP4: &[&str] = &["--tensor-parallel-size", "4"];
const DP2: &[&str] = &["--data-parallel-size", "2"];
const DP2_TP2: &[&str] = &["--data-parallel-size", "2", "--tensor-parallel-size", "2"];
const EP2: &[&str] = &["--tensor-parallel-size", "2", "--enable-expert-parallel"];
const EP4: &[&str] = &["--tensor-parallel-size", "4", "--enable-expert-parallel"];
const DP2_EP2: &[&str] = &["--data-parallel-size", "2", "--enable-expert-parallel"];
const ALL: &[&str] =
    &["--data-parallel-size", "2", "--tensor-parallel-size", "2", "--enable-expert-parallel"];

/// Meshes of families without experts, and of those with.
const DENSE: [&[&str]; 4] = [TP2, TP4, DP2, DP2_TP2];
const EXPERTS: [&[&str]; 6] = [TP2, TP4, EP2, EP4, DP2_EP2, ALL];

/// A server that logs what its ranks hold.
fn telling(model: &Path, mesh: &[&str]) -> (Server, Arc<Mutex<String>>) {
    let args = serve(model, mesh, &[]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    Server::start_logged_in(&[("TOKENMILL_LOG", "info")], &args)
}

/// What each of so many ranks said once it had its weights: its mesh, and their bytes.
fn loaded(log: &Mutex<String>, ranks: usize) -> Vec<(String, u64)> {
    let parsed = |line: &str| {
        let (_, line) = line.split_once("a rank is loaded")?.1.split_once("mesh=")?;
        let (mesh, rest) = line.split_once(" backend=")?;
        let (_, bytes) = rest.split_once("weight_bytes=")?;
        let digits: String = bytes.chars().take_while(char::is_ascii_digit).collect();
        Some((mesh.to_owned(), digits.parse().ok()?))
    };
    let told = || log.lock().expect("no panic").lines().filter_map(parsed).collect::<Vec<_>>();
    wait_until("all have said it", Duration::from_secs(2), || told().len() == ranks);
    told()
}

/// A mesh as ranks call it.
fn words(mesh: &[&str]) -> String {
    let size = |flag| {
        let at = mesh.iter().position(|word| *word == flag);
        at.map_or("1", |at| mesh[at + 1])
    };
    let experts =
        if mesh.contains(&"--enable-expert-parallel") { " with expert parallelism" } else { "" };
    format!("dp {} x tp {}{experts}", size("--data-parallel-size"), size("--tensor-parallel-size"))
}

/// A family's answers on each mesh against those of one process.
fn equals_one_process(case: &str, changed: &Value, meshes: &[&[&str]]) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let model = model(case, changed, folder.path());
    let bodies: Vec<Value> = (0..4).map(|stream| body(stream, TOKENS, 0.0)).collect();
    let (alone, log) = telling(&model, &[]);
    let whole = loaded(&log, 1)[0].1;
    let expected = load(&alone, &bodies, 0, || ());
    assert!(expected.iter().all(|tokens| tokens.len() == TOKENS));
    for mesh in meshes {
        let (server, log) = telling(&model, mesh);
        let ranks = loaded(&log, server.workers().len());
        assert!(ranks.len() >= 2, "{case} {mesh:?}: several processes");
        let split = *mesh != DP2;
        for (own, bytes) in &ranks {
            assert_eq!(*own, words(mesh), "{case}");
            assert_eq!(*bytes < whole, split, "{case} {mesh:?}: {bytes} of {whole} bytes");
        }
        let held: u64 = ranks.iter().map(|(_, bytes)| bytes).sum();
        assert!(held >= whole, "{case} {mesh:?}: {held} of {whole} bytes");
        same(&load(&server, &bodies, 0, || ()), &expected, &format!("{case} {mesh:?}"));
        assert_eq!(server.metric("tokenmill_worker_restarts_total"), Some(0.0));
    }
}

fn llama() -> Value {
    json!({"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 192, "vocab_size": 384})
}

fn latent() -> Value {
    json!({"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 384})
}

#[test]
fn llama_on_every_mesh_answers_as_one_process_does() {
    equals_one_process("llama/native_tied", &llama(), &DENSE);
}

/// Sliding windows, and fewer key-value heads than four ranks: some repeat them.
#[test]
fn qwen3_on_every_mesh_answers_as_one_process_does() {
    let shapes = json!({"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 384});
    equals_one_process("qwen3/tiny_window_tied", &shapes, &DENSE);
}

#[test]
fn qwen3_moe_on_every_mesh_answers_as_one_process_does() {
    let shapes = json!({"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 384,
        "num_experts": 8});
    equals_one_process("qwen3_moe/tiny_mixed_layers", &shapes, &EXPERTS);
}

#[test]
fn deepseek_v2_on_every_mesh_answers_as_one_process_does() {
    equals_one_process("deepseek_v2/native_lite", &latent(), &EXPERTS);
}

#[test]
fn deepseek_v3_on_every_mesh_answers_as_one_process_does() {
    equals_one_process("deepseek_v3/native_yarn", &latent(), &EXPERTS);
}

/// Every rank of a group under load: killed, stopped, and with a digest or a token of its own.
fn survives((case, changed): (&str, &Value), mesh: &[&str], ranks: u32, faults: &[(&str, u32)]) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let model = model(case, changed, folder.path());
    let bodies: Vec<Value> = (0..4).map(|stream| body(stream, 100, 0.7)).collect();
    let args = |more: &[&str]| serve(&model, mesh, &[&["--step-timeout", "2"], more].concat());
    let start = |more: &[&str]| {
        let args = args(more);
        Server::start_logged(&args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let expected = load(&start(&[]).0, &bodies, 0, || ());
    let restarts =
        |server: &Server| server.metric("tokenmill_worker_restarts_total").expect("counted");
    for rank in 0..ranks {
        // A server of its own: the pause before a start doubles with every death.
        let (server, log) = start(&[]);
        let mut ended = 0.0;
        for how in ["KILL", "STOP"] {
            log.lock().expect("no panic").clear();
            let got = load(&server, &bodies, 120, || {
                signal(how, server.workers()[&rank]);
                let begun = Instant::now();
                let limit = if how == "KILL" { 2 } else { 6 };
                let noticed = || restarts(&server) > ended;
                wait_until("noticed", Duration::from_secs(limit), noticed);
                eprintln!("{how} of rank {rank} noticed after {:?}", begun.elapsed());
                server.wait_ready(Duration::from_secs(10));
            });
            ended += 1.0;
            same(&got, &expected, &format!("{how} of rank {rank}"));
            assert_eq!(restarts(&server), ended);
            let text = log.lock().expect("no panic").clone();
            if how == "STOP" {
                // Whoever waited for it says so, with the collective it did not come to.
                assert!(text.contains(&format!("rank {rank} did not come to ")), "{text}");
                assert!(text.contains(" bytes, step "), "{text}");
            } else {
                assert!(text.contains(&format!("rank {rank}: ")), "{text}");
                assert!(text.contains("SIGKILL"), "{text}");
            }
        }
    }
    for (fault, named) in faults {
        let (server, log) = start(&["--plant-fault", fault]);
        same(&load(&server, &bodies, 0, || ()), &expected, fault);
        assert_eq!(server.metric("tokenmill_worker_divergences_total"), Some(1.0), "{fault}");
        assert_eq!(restarts(&server), 1.0, "{fault}");
        let text = log.lock().expect("no panic").clone();
        assert!(text.contains(&format!("rank {named} of shard {} (its lead", named / 2)), "{text}");
    }
}

/// A lead's other token is believed by its digest, so that the rank beside it is named.
#[test]
fn a_rank_of_a_mesh_that_dies_hangs_or_lies_ends_the_group_and_no_token_is_lost_or_repeated() {
    let faults = [
        ("0,20,digest", 0),
        ("1,20,digest", 1),
        ("2,20,digest", 2),
        ("3,20,digest", 3),
        ("0,20,token", 1),
        ("3,20,token", 3),
    ];
    survives(("deepseek_v3/native_yarn", &latent()), ALL, 4, &faults);
}

#[test]
fn a_rank_that_splits_layers_dies_hangs_or_lies_and_no_token_is_lost_or_repeated() {
    survives(("llama/native_tied", &llama()), TP2, 2, &[("0,20,digest", 0), ("1,20,digest", 1)]);
}

/// The others wait for what a rank was never told to compute, and say for whom; one that computed and was not
/// heard is missed by the scheduler alone.
#[test]
fn a_rank_of_a_model_that_is_cut_off_is_named_and_no_token_is_lost_or_repeated() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let model = model("llama/native_tied", &llama(), folder.path());
    let bodies: Vec<Value> = (0..4).map(|stream| body(stream, 100, 0.7)).collect();
    let args = serve(&model, TP2, &["--step-timeout", "1"]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let expected = load(&start(&model, &[]), &bodies, 0, || ());
    for (way, words) in [
        (Way::ToWorker, "rank 1 did not come to all_reduce over tp, "),
        (Way::FromWorker, "was not answered by rank 1 of dp 1 x tp 2"),
    ] {
        let between = Between::new();
        let (server, log) = between.server(&args);
        let got = load(&server, &bodies, 120, || {
            between.block(1, &[way], Duration::from_secs(3));
            server.wait_ready(Duration::from_secs(10));
        });
        same(&got, &expected, &format!("{way:?}"));
        assert_eq!(server.metric("tokenmill_worker_restarts_total"), Some(1.0), "{way:?}");
        let text = log.lock().expect("no panic").clone();
        assert!(between.late() > 0 && text.contains(words), "{way:?}: {text}");
    }
}

#[test]
fn what_a_mesh_does_not_divide_is_refused_with_what_would_do() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let model = checkpoint(&config("llama/native_tied"), 3, folder.path());
    let args = serve(&model, TP2, &["--port", "0"]);
    let output =
        common::ends(std::process::Command::new(common::program()).arg("serve").args(args));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("--tensor-parallel-size 2"), "{text}");
}
