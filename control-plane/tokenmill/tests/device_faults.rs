//! What a device can do to a server under load: its worker killed, hung, a launch refused, NaN, a plan
//! that does not fit. Each ends in the engine alive or restarted, the other requests unharmed, and no
//! token lost or repeated; each says so in a line.
//!
//! Real processes, float32, on what `TOKENMILL_TEST_DEVICE` names. A launch can only be refused by a
//! CUDA device.

mod common;

use common::{Server, checkpoint, config, program, signal, test_device, wait_until};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Latents, experts and native head dimensions.
const CASE: &str = "deepseek_v3/native_yarn";
const LIMITS: [&str; 13] = [
    "--dtype",
    "float32",
    "--max-model-len",
    "1024",
    "--max-num-seqs",
    "16",
    "--max-num-batched-tokens",
    "512",
    "--kv-cache-memory-bytes",
    "268435456",
    "--no-enable-prefix-caching",
    "--step-timeout",
    "2",
];
/// Requests at once, and tokens of each.
const REQUESTS: u64 = 8;
const TOKENS: usize = 200;
/// As in the tests of preemption: KV computed anew.
const TOLERANCE: f64 = 1e-4;
/// No embedding of it is a number in the checkpoint of [`nan_of_one_request`].
const POISON: u64 = 301;

/// Tokens with log-probabilities.
type Answer = Vec<(u64, f64)>;

/// Past the test runner's capture: a line for each fault.
fn say(fault: &str, began: Instant, what: &str) {
    let device = test_device().unwrap_or_else(|| "whatever serve finds".into());
    let took = began.elapsed().as_secs_f64();
    let _ = writeln!(std::io::stderr(), "fault on {device}: {fault}: {what} ({took:.1} s)");
}

fn body(which: u64, stream: bool) -> Value {
    let length = 20 + which * 13;
    let prompt: Vec<u64> =
        (0..length).map(|i| (which * 7919 + i * i * 31 + i * 17) % 300).collect();
    let temperature = if which.is_multiple_of(2) { 0.0 } else { 0.8 };
    json!({
        "model": "checkpoint", "prompt": prompt, "max_tokens": TOKENS, "temperature": temperature,
        "seed": which, "logprobs": 0, "return_token_ids": true, "ignore_eos": true, "stream": stream,
        // Nobody draws what one of the models cannot read.
        "logit_bias": {POISON.to_string(): -100},
    })
}

/// Streams an answer to its end, counting tokens as they arrive.
fn follow(server: &Server, body: &Value, arrived: &AtomicUsize) -> Result<Answer, String> {
    let client = reqwest::blocking::Client::new();
    let sent = client.post(format!("{}/v1/completions", server.url)).json(body).send();
    let answer = sent.expect("answered");
    if !answer.status().is_success() {
        return Err(answer.text().expect("a whole body"));
    }
    let mut got = Vec::new();
    for line in BufReader::new(answer).lines() {
        let line = line.expect("an unbroken stream");
        let Some(data) = line.strip_prefix("data:").map(str::trim) else { continue };
        if data == "[DONE]" {
            return Ok(got);
        }
        let event: Value = serde_json::from_str(data).expect("JSON");
        if !event["error"].is_null() {
            return Err(event["error"].to_string());
        }
        let choice = &event["choices"][0];
        let Some(tokens) = choice["token_ids"].as_array() else { continue };
        for (i, token) in tokens.iter().enumerate() {
            let logprob = &choice["logprobs"]["token_logprobs"][i];
            got.push((token.as_u64().expect("a token"), logprob.as_f64().expect("a number")));
        }
        arrived.fetch_add(tokens.len(), Ordering::Relaxed);
    }
    Err(format!("the stream ended after {} tokens without [DONE]", got.len()))
}

/// All requests at once; `meanwhile` runs once each has sent some tokens on average.
fn load(server: &Server, meanwhile: impl FnOnce()) -> Vec<Answer> {
    let arrived = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..REQUESTS)
            .map(|which| {
                let arrived = &arrived;
                scope.spawn(move || follow(server, &body(which, true), arrived))
            })
            .collect();
        wait_until("tokens of all requests", Duration::from_secs(20), || {
            arrived.load(Ordering::Relaxed) > REQUESTS as usize * TOKENS / 4
        });
        meanwhile();
        let answers = asked.into_iter().map(|one| one.join().expect("no panic"));
        answers.map(|answer| answer.expect("a whole answer")).collect()
    })
}

/// No token lost, none repeated, none other; the largest difference of log-probabilities.
fn assert_same(fault: &str, got: &[Answer], expected: &[Answer]) -> f64 {
    let mut worst = 0.0_f64;
    assert_eq!(got.len(), expected.len(), "{fault}");
    for (which, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(got.len(), TOKENS, "{fault}: request {which}");
        for (at, ((a, x), (b, y))) in got.iter().zip(expected).enumerate() {
            assert_eq!(a, b, "{fault}: request {which}, token {at}");
            worst = worst.max((x - y).abs());
        }
    }
    assert!(worst <= TOLERANCE, "{fault}: {worst}");
    worst
}

fn serve(model: &Path, more: &[&str]) -> Server {
    let mut args = vec![model.to_str().expect("UTF-8")];
    args.extend(LIMITS);
    args.extend(more);
    Server::start(&args)
}

/// A worker that ends, or stands still until its step is overdue, in the middle of all requests.
fn lost_worker(server: &Server, undisturbed: &[Answer], how: &str, fault: &str) {
    let began = Instant::now();
    let restarts = || server.metric("tokenmill_worker_restarts_total").unwrap_or(0.0);
    let (before, worker) = (restarts(), server.worker_pid().expect("a worker"));
    let mut noticed = None;
    let answers = load(server, || {
        let struck = Instant::now();
        signal(how, worker);
        wait_until("not ready", Duration::from_secs(10), || {
            server.get("/readyz").is_ok_and(|(status, _)| status == 503)
        });
        noticed = Some(struck.elapsed());
        server.wait_ready(Duration::from_secs(15));
    });
    let worst = assert_same(fault, &answers, undisturbed);
    assert_eq!(restarts(), before + 1.0, "{fault}: restarts");
    assert_ne!(server.worker_pid(), Some(worker), "{fault}: another process took over");
    assert!(!Path::new(&format!("/proc/{worker}")).exists(), "{fault}: the old worker is gone");
    let noticed = noticed.expect("struck").as_secs_f64();
    say(
        fault,
        began,
        &format!("noticed after {noticed:.2} s, {REQUESTS} answers whole and equal ({worst:.0e})"),
    );
}

/// A launch in the middle of all requests is refused; the next worker has none that is.
fn failed_launch(model: &Path, undisturbed: &[Answer]) {
    let (fault, began) = ("a launch fails", Instant::now());
    if test_device().as_deref() != Some("cuda") {
        return say(fault, began, "not run: only a CUDA device launches");
    }
    // A step is three launches and more.
    let server = serve(model, &["--fail-launch", "400"]);
    let answers = load(&server, || ());
    let worst = assert_same(fault, &answers, undisturbed);
    assert_eq!(server.metric("tokenmill_worker_restarts_total"), Some(1.0), "{fault}");
    say(fault, began, &format!("a new worker, {REQUESTS} answers whole and equal ({worst:.0e})"));
}

/// The checkpoint with NaN for a token's embedding.
fn poisoned(model: &Path, into: &Path) -> PathBuf {
    let folder = into.join("checkpoint");
    std::fs::create_dir(&folder).expect("a folder");
    for entry in std::fs::read_dir(model).expect("the checkpoint") {
        let path = entry.expect("an entry").path();
        std::fs::copy(&path, folder.join(path.file_name().expect("a name"))).expect("copied");
    }
    let file = folder.join("model.safetensors");
    let mut bytes = std::fs::read(&file).expect("weights");
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let parsed: Value = serde_json::from_slice(&bytes[8..8 + header]).expect("a header");
    let table = &parsed["model.embed_tokens.weight"];
    assert_eq!(table["dtype"], "F32");
    let number = |value: &Value| value.as_u64().expect("a number") as usize;
    let row = number(&table["shape"][1]) * 4;
    let start = 8 + header + number(&table["data_offsets"][0]) + POISON as usize * row;
    bytes[start..start + row].fill(0xFF);
    std::fs::write(&file, bytes).expect("written");
    folder
}

/// NaN in one request's prompt among others.
fn nan_of_one_request(model: &Path, undisturbed: &[Answer]) {
    let (fault, began) = ("NaN in one request", Instant::now());
    let folder = tempfile::tempdir().expect("temporary folder");
    let server = serve(&poisoned(model, folder.path()), &[]);
    let worker = server.worker_pid();
    let mut faults = 0;
    let answers = load(&server, || {
        let mut bad = body(3, true);
        bad["prompt"][7] = POISON.into();
        for _ in 0..3 {
            let said = follow(&server, &bad, &AtomicUsize::new(0));
            let error = said.expect_err("an error");
            assert!(error.contains("not_a_number"), "{fault}: {error}");
            faults += 1;
        }
    });
    let worst = assert_same(fault, &answers, undisturbed);
    // Blocks that held NaN are somebody else's now.
    let again = load(&server, || ());
    assert_same("behind NaN", &again, undisturbed);
    assert_eq!(server.worker_pid(), worker, "{fault}: the worker lives on");
    say(fault, began, &format!("{faults} errors, same worker, the others equal ({worst:.0e})"));
}

/// More than there is: refused before anything is allocated, with what is needed and what is there.
fn a_plan_that_does_not_fit(model: &Path) {
    let (fault, began) = ("a plan that does not fit", Instant::now());
    let mut args = vec![model.to_str().expect("UTF-8")];
    let pebibyte = (1_u64 << 50).to_string();
    args.extend(["--port", "0", "--kv-cache-memory-bytes", &pebibyte]);
    let mut command = Command::new(program());
    command.arg("serve").args(args);
    if let Some(device) = test_device() {
        command.args(["--device", &device]);
    }
    let output = common::ends(&mut command);
    assert!(!output.status.success(), "{fault}: served");
    let (told, refused) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    // The plan is printed before the worker is started, and not even that happened.
    assert!(!told.contains("memory plan"), "{fault}: {told}");
    for part in ["for weights", "for activations", "1024.0 TiB for the KV cache", "are usable"] {
        assert!(refused.contains(part), "{fault}: {part} is not in {refused}");
    }
    let line = refused.lines().find(|line| line.contains("are usable")).unwrap_or_default();
    say(fault, began, line.trim());
}

#[test]
fn every_fault_leaves_the_others_unharmed() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let model = checkpoint(&config(CASE), 3, folder.path());
    let server = serve(&model, &[]);
    let undisturbed = load(&server, || ());
    assert_same("nothing", &load(&server, || ()), &undisturbed);
    lost_worker(&server, &undisturbed, "KILL", "a killed worker");
    lost_worker(&server, &undisturbed, "STOP", "a worker that hangs");
    drop(server);
    failed_launch(&model, &undisturbed);
    nan_of_one_request(&model, &undisturbed);
    a_plan_that_does_not_fit(&model);
}
