//! What `/metrics` shows is what happened: every registered metric is fed by a running server.
//!
//! A metric that nothing feeds misleads whoever watches it. How values are spelled in the text format
//! is the library's business. Stalled clients need a half-minute of silence; the gateway's own tests,
//! with shorter timers, show that they are counted. Launches, idle time and the state are a device's: the
//! last test looks at them where `TOKENMILL_TEST_DEVICE` is `cuda`. Draws on the host are a processor's.
//! Placements and divergences take several ranks, whose tests look at them.

mod common;

use common::{Server, checkpoint, config, program, signal, test_device, wait_until};
use serde_json::{Value, json};
use std::io::Read;
use std::time::Duration;

/// Not fed here; see above.
const ELSEWHERE: [&str; 17] = [
    "tokenmill_stalled_clients_total",
    "tokenmill_build_info",
    "tokenmill_device_info",
    "tokenmill_worker_idle_seconds_total",
    "tokenmill_worker_launches_total",
    "tokenmill_worker_graphs",
    "tokenmill_worker_uncaptured_steps_total",
    "tokenmill_gpu_memory_used_bytes",
    "tokenmill_gpu_memory_bytes",
    "tokenmill_gpu_utilization_ratio",
    "tokenmill_gpu_power_watts",
    "tokenmill_gpu_temperature_celsius",
    "tokenmill_gpu_clock_hertz",
    "tokenmill_gpu_throttled",
    "tokenmill_gpu_ecc_errors",
    "tokenmill_placements_total",
    "tokenmill_worker_divergences_total",
];
/// Gauges are watched while work runs; afterwards they are back where they were.
const GAUGES: [&str; 7] = [
    "tokenmill_requests_running",
    "tokenmill_requests_waiting",
    "tokenmill_kv_cache_usage_ratio",
    "tokenmill_kv_blocks",
    "tokenmill_host_cache_blocks",
    "tokenmill_connections",
    "tokenmill_ready",
];

/// Every sample of `/metrics`: name with labels, value.
fn samples(server: &Server) -> Vec<(String, f64)> {
    let (_, text) = server.get("/metrics").expect("metrics answer");
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect()
}

/// Our metrics by their type lines, without vLLM's names for them.
fn families(server: &Server) -> Vec<String> {
    let (_, text) = server.get("/metrics").expect("metrics answer");
    let name = |line: &str| line.strip_prefix("# TYPE ")?.split(' ').next().map(str::to_owned);
    text.lines().filter_map(name).filter(|name| name.starts_with("tokenmill_")).collect()
}

/// A completion of exactly so many tokens. Ids are asked for because the model has no tokenizer, and
/// a stream without text or ids would stay silent.
fn body(prompt: &[u64], tokens: u32, stream: bool) -> Value {
    json!({
        "prompt": prompt, "max_tokens": tokens, "ignore_eos": true, "stream": stream,
        "return_token_ids": true,
    })
}

/// A prompt of `length` tokens, different for each `which`.
fn prompt(which: u64, length: u64) -> Vec<u64> {
    (0..length).map(|i| (which * 7919 + i * i * 31 + i * 17) % 300).collect()
}

#[test]
fn the_wait_in_the_queue_is_measured() {
    // One slot and steps of 5 ms: the second of two requests waits for all 40 steps of the first.
    let fake = ["--fake-engine", "5000,0,0", "--max-model-len", "4096", "--max-num-seqs", "1"];
    let server = Server::start(&fake);
    const NAMES: [&str; 2] = ["tokenmill_queue_seconds", "vllm:request_queue_time_seconds"];
    for name in NAMES {
        assert_eq!(server.metric(&format!("{name}_count")), Some(0.0), "{name}");
    }
    std::thread::scope(|scope| {
        for which in 0..2 {
            let server = &server;
            scope.spawn(move || server.ok("/v1/completions", &body(&[which, 2, 3], 40, false)));
        }
    });
    for name in NAMES {
        assert_eq!(server.metric(&format!("{name}_count")), Some(2.0), "{name}");
        let sum = server.metric(&format!("{name}_sum")).expect("a sum");
        assert!((0.15..10.0).contains(&sum), "{name}: {sum} s in the queue");
    }
    // When these end nobody knows, so one runs until its deadline and counts; the other never ran and does
    // not. One that surely could not be done in time is told so at once.
    let mut asked = body(&[4, 5, 6], 1000, false);
    asked["stop_token_ids"] = json!([31_999]);
    let both = std::thread::scope(|scope| {
        let both = [0, 1].map(|_| scope.spawn(|| server.post_within(500, &asked)));
        both.map(|answer| answer.join().expect("answered").0)
    });
    assert_eq!(both, [504, 504]);
    let (status, hopeless) = server.post_within(500, &body(&[4, 5, 6], 1000, false));
    assert_eq!((status, &hopeless["error"]["code"]), (503, &json!("deadline_unreachable")));
    let refused = "tokenmill_refused_total{refused_by=\"deadline\"}";
    assert_eq!(server.metric(refused), Some(1.0));
    assert_eq!(server.metric("tokenmill_queue_seconds_count"), Some(3.0));
}

#[test]
fn every_metric_is_fed() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let model = checkpoint(&config("llama/native_tied"), 3, folder.path());
    let path = model.to_str().expect("UTF-8");
    // Room for one context and a third: four requests of 400 tokens cannot all stay.
    let cache = (4 << 20).to_string();
    let host = (32 << 20).to_string();
    let room =
        ["--dtype", "float32", "--kv-cache-memory-bytes", &cache, "--kv-host-memory-bytes", &host];
    let limits = ["--max-model-len", "1024", "--max-num-seqs", "4", "--max-queued-requests", "8"];
    let server = Server::start(&[&[path], room.as_slice(), &limits].concat());
    let before = samples(&server);

    // A prompt twice, so that the second finds the first's blocks.
    for _ in 0..2 {
        server.ok("/v1/completions", &body(&prompt(1, 200), 8, false));
    }
    // Ends by a token of the client's; names a field that nobody knows.
    let mut greedy = json!({"prompt": [1, 2, 3], "max_tokens": 1, "temperature": 0,
        "ignore_eos": true, "return_token_ids": true, "no_such_field": 1});
    let token = server.ok("/v1/completions", &greedy)["choices"][0]["token_ids"][0].clone();
    greedy["stop_token_ids"] = json!([token]);
    greedy["max_tokens"] = 9.into();
    let stopped = server.ok("/v1/completions", &greedy);
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    // Refusals: a wrong field; a crowd that the queue does not hold.
    assert_eq!(server.post("/v1/completions", &json!({"prompt": []})).0, 400);
    let mut crowd = body(&[7, 8, 9], 300, false);
    crowd["n"] = 64.into();
    assert_eq!(server.post("/v1/completions", &crowd).0, 503);
    // More KV than there is: somebody gives way. Meanwhile the gauges of running work move.
    let idle = || server.metric("tokenmill_requests_running") == Some(0.0);
    wait_until("the crowd is gone", Duration::from_secs(10), idle);
    std::thread::scope(|scope| {
        for which in 0..6 {
            let server = &server;
            let asked = body(&prompt(which, 100), 300, false);
            scope.spawn(move || server.ok("/v1/completions", &asked));
        }
        for gauge in [GAUGES[0], GAUGES[1], GAUGES[2], "tokenmill_kv_blocks{state=\"used\"}"] {
            wait_until(gauge, Duration::from_secs(20), || server.metric(gauge) > Some(0.0));
        }
    });
    // What the crowd pushed out of the cache comes back from behind it.
    server.ok("/v1/completions", &body(&prompt(1, 200), 8, false));
    let blocks = "tokenmill_host_cache_blocks";
    wait_until(blocks, Duration::from_secs(5), || server.metric(blocks) > Some(0.0));
    // A client that leaves, in mid-stream.
    let client = reqwest::blocking::Client::new();
    let url = format!("{}/v1/completions", server.url);
    let mut stream =
        client.post(url).json(&body(&prompt(9, 100), 900, true)).send().expect("accepted");
    stream.read_exact(&mut [0; 10]).expect("a first event");
    drop(stream);
    let aborted = "tokenmill_generations_total{finished_by=\"abort\"}";
    let left = || server.metric(aborted) > Some(0.0);
    wait_until(aborted, Duration::from_secs(5), left);
    signal("KILL", server.worker_pid().expect("a worker"));
    let restarts = "tokenmill_worker_restarts_total";
    wait_until(restarts, Duration::from_secs(5), || server.metric(restarts) == Some(1.0));
    server.wait_ready(Duration::from_secs(10));

    let after = samples(&server);
    let was = |name: &str| before.iter().find(|(found, _)| found == name).map_or(0.0, |s| s.1);
    let on_device = test_device().as_deref() == Some("cuda");
    // A histogram is fed where its count grows.
    let of = |family: &str, name: &str| {
        let base = name.split('{').next().unwrap_or(name);
        base == family || base.strip_suffix("_count") == Some(family)
    };
    let still: Vec<String> = families(&server)
        .into_iter()
        .filter(|family| !ELSEWHERE.contains(&family.as_str()))
        .filter(|family| !(on_device && family == "tokenmill_worker_host_draw_steps_total"))
        .filter(|family| !GAUGES.contains(&family.as_str()))
        .filter(|family| !after.iter().any(|(name, to)| of(family, name) && *to > was(name)))
        .collect();
    assert!(still.is_empty(), "nothing feeds {still:?}");
    assert_eq!(server.metric("tokenmill_ready"), Some(1.0));
    // The one that asks.
    assert!(server.metric("tokenmill_connections") >= Some(1.0));
    for by in ["stop", "length", "abort"] {
        let series = format!("tokenmill_generations_total{{finished_by=\"{by}\"}}");
        assert!(server.metric(&series) > Some(0.0), "{series}");
    }
    for by in ["validation", "queue_full"] {
        let series = format!("tokenmill_refused_total{{refused_by=\"{by}\"}}");
        assert!(server.metric(&series) > Some(0.0), "{series}");
    }
}

#[test]
fn a_device_tells_how_it_is_doing() {
    if test_device().as_deref() != Some("cuda") {
        return;
    }
    let folder = tempfile::tempdir().expect("temporary folder");
    let model = checkpoint(&config("llama/native_tied"), 3, folder.path());
    let cache = (64_u64 << 20).to_string();
    let server = Server::start(&[
        model.to_str().expect("UTF-8"),
        "--kv-cache-memory-bytes",
        &cache,
        "--max-model-len",
        "1024",
    ]);
    server.ok("/v1/completions", &body(&prompt(1, 200), 30, false));
    // The library opens beside the server's start.
    let used = "tokenmill_gpu_memory_used_bytes";
    wait_until(used, Duration::from_secs(10), || server.metric(used) > Some(0.0));
    let of = |name: &str| server.metric(name).unwrap_or_else(|| panic!("no {name}"));
    let all = of("tokenmill_gpu_memory_bytes");
    assert!(of(used) > 64.0 * 1048576.0 && of(used) < all, "{} of {all} bytes", of(used));
    assert!((0.0..=1.0).contains(&of("tokenmill_gpu_utilization_ratio")));
    assert!((20.0..1500.0).contains(&of("tokenmill_gpu_power_watts")));
    assert!((10.0..110.0).contains(&of("tokenmill_gpu_temperature_celsius")));
    for clock in ["sm", "memory"] {
        let hertz = of(&format!("tokenmill_gpu_clock_hertz{{clock=\"{clock}\"}}"));
        assert!((1e8..1e10).contains(&hertz), "{clock}: {hertz}");
    }
    assert!(of("tokenmill_worker_launches_total") >= 30.0);
    assert!(of("tokenmill_worker_graphs") > 2.0);
    assert_eq!(of("tokenmill_worker_uncaptured_steps_total"), 0.0);
    let doctor = std::process::Command::new(program()).arg("doctor").output().expect("it starts");
    let told = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(doctor.status.success(), "{told}");
    let line = |name: &str| told.lines().find(|line| line.contains(name)).expect(name).to_owned();
    assert!(line("gpu ").contains("kernels built"), "{told}");
    assert!(line("gpu state").contains("GiB used"), "{told}");
}
