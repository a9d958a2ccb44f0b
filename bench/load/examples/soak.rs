//! Keeps a server under streams whose clients leave at random, for minutes, then kills its worker.
//!
//! ```text
//! cargo run --release -p load --example soak -- target/release/tokenmill [seconds] [streams]
//! ```
//!
//! It starts the server itself (the bundled model), keeps `streams` open at once, drops every fifth
//! after a random number of tokens, and samples the resident memory of server and worker. Then all
//! streams end and the block counts must be those of the start. Last, the worker is killed with
//! SIGKILL under load. One JSON object is printed. Linux only: it reads `/proc`.

#![allow(clippy::print_stdout, reason = "the figures are what this program is for")]
#![allow(clippy::print_stderr, reason = "progress")]

use futures::stream::{FuturesUnordered, StreamExt};
use load::{Client, ClientError, Prompts, StreamEnd, Timeline};
use serde_json::{Value, json};
use std::error::Error;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Every so many streams one is dropped by its client.
const DROP_EVERY: u32 = 5;
/// Tokens of a stream.
const OUTPUT: u32 = 64;
/// Between two samples of memory.
const SAMPLE: Duration = Duration::from_secs(5);
/// Before memory is expected to be level.
const WARM_UP: Duration = Duration::from_secs(60);
/// Gauges are refreshed a few times a second; after this they show a state that does not change.
const SETTLE: Duration = Duration::from_millis(500);
/// Streams in flight when the worker is killed.
const KILLED_STREAMS: u32 = 64;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// The server; killed when the program ends early.
struct Server {
    child: Child,
    url: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(program: &str, streams: u32) -> Outcome<Self> {
        let mut child = Command::new(program)
            .args(["serve", "--port", "0", "--max-num-seqs", &streams.to_string()])
            .env("TOKENMILL_LOG", "error")
            .stdout(Stdio::piped())
            .spawn()?;
        let mut lines = BufReader::new(child.stdout.take().ok_or("stdout is piped")?).lines();
        let url = loop {
            let line = lines.next().ok_or("the server ended before it was ready")??;
            if let Some(at) = line.find("http://127.0.0.1:") {
                break line[at..].chars().take_while(|c| !c.is_whitespace()).collect();
            }
        };
        // The rest is read to the end, so that the server never blocks on a full pipe.
        std::thread::spawn(move || lines.map_while(Result::ok).count());
        Ok(Self { child, url })
    }

    async fn wait_ready(&self, http: &reqwest::Client) -> Outcome<Duration> {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(60) {
            let answer = http.get(format!("{}/readyz", self.url)).send().await;
            if answer.is_ok_and(|answer| answer.status().is_success()) {
                return Ok(begun.elapsed());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Err("not ready within a minute".into())
    }

    /// Blocks by state, as `/metrics` reports them.
    async fn blocks(&self, http: &reqwest::Client) -> Outcome<Value> {
        let text = http.get(format!("{}/metrics", self.url)).send().await?.text().await?;
        let mut states = serde_json::Map::new();
        for line in text.lines().filter(|line| line.starts_with("tokenmill_kv_blocks{")) {
            let state = line.split("state=\"").nth(1).and_then(|rest| rest.split('"').next());
            let count = line.rsplit(' ').next().and_then(|count| count.parse::<f64>().ok());
            if let (Some(state), Some(count)) = (state, count) {
                states.insert(state.to_owned(), json!(count));
            }
        }
        Ok(Value::Object(states))
    }

    fn workers(&self) -> Vec<u32> {
        let server = self.child.id();
        let tasks = std::fs::read_dir(format!("/proc/{server}/task"));
        let lists = tasks.into_iter().flatten().flatten();
        lists
            .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
            .flat_map(|list| list.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
            .filter_map(|pid| pid.parse().ok())
            .collect()
    }

    /// Resident MB of the server and its workers.
    fn resident_mb(&self) -> f64 {
        let of = |pid: u32| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
            line.split_whitespace().nth(1)?.parse::<f64>().ok()
        };
        let all = self.workers().into_iter().chain([self.child.id()]);
        all.filter_map(of).sum::<f64>() / 1024.0
    }
}

/// Least-squares slope of `(minutes, MB)`.
fn slope(samples: &[(f64, f64)]) -> f64 {
    let n = samples.len().max(1) as f64;
    let mean = samples.iter().fold((0.0, 0.0), |m, s| (m.0 + s.0 / n, m.1 + s.1 / n));
    let cov: f64 = samples.iter().map(|s| (s.0 - mean.0) * (s.1 - mean.1)).sum();
    let var: f64 = samples.iter().map(|s| (s.0 - mean.0).powi(2)).sum();
    if var > 0.0 { cov / var } else { 0.0 }
}

async fn one(client: &Client, index: u32, drops: bool) -> (bool, Result<Timeline, ClientError>) {
    let sizes = Prompts { length: 2, vocab: 100, seed: 7 }.tokens(index);
    let (length, leave) = (8 + sizes[0], sizes[1] % OUTPUT);
    let prompt = Prompts { length, vocab: 2000, seed: 1 }.tokens(index);
    let dropped = drops && index.is_multiple_of(DROP_EVERY);
    let end = if dropped { StreamEnd::DropAfter(leave as usize + 1) } else { StreamEnd::Whole };
    (dropped, client.completion(&prompt, OUTPUT, end).await)
}

#[tokio::main]
async fn main() -> Outcome<()> {
    let mut args = std::env::args().skip(1);
    let program = args.next().ok_or("name the tokenmill binary")?;
    let seconds: u64 = args.next().map_or(Ok(300), |text| text.parse())?;
    let streams: u32 = args.next().map_or(Ok(200), |text| text.parse())?;
    let server = Server::start(&program, streams)?;
    let http = reqwest::Client::new();
    server.wait_ready(&http).await?;
    let client = Client::connect(&server.url, None).await?;
    tokio::time::sleep(SETTLE).await;
    let before = server.blocks(&http).await?;

    let begun = Instant::now();
    let (mut undisturbed, mut complete, mut dropped, mut tokens) = (0_u32, 0_u32, 0_u32, 0_usize);
    let mut failures: Vec<String> = Vec::new();
    let mut memory: Vec<(f64, f64)> = Vec::new();
    let mut next_sample = WARM_UP.min(Duration::from_secs(seconds / 5));
    let mut in_flight = FuturesUnordered::new();
    let mut index = 0;
    loop {
        let running = begun.elapsed() < Duration::from_secs(seconds);
        while running && in_flight.len() < streams as usize {
            in_flight.push(one(&client, index, true));
            index += 1;
        }
        let Some((drops, result)) = in_flight.next().await else { break };
        tokens += result.as_ref().map_or(0, |timeline| timeline.tokens);
        if drops {
            dropped += 1;
        } else {
            undisturbed += 1;
            match result {
                Ok(timeline) if timeline.tokens == OUTPUT as usize => complete += 1,
                Ok(timeline) => failures.push(format!("{} tokens", timeline.tokens)),
                Err(error) => failures.push(error.to_string()),
            }
        }
        if begun.elapsed() >= next_sample {
            next_sample += SAMPLE;
            memory.push((begun.elapsed().as_secs_f64() / 60.0, server.resident_mb()));
            eprintln!("{:>4} s  {undisturbed} ended  {:.1} MB", begun.elapsed().as_secs(), {
                server.resident_mb()
            });
        }
    }
    let ran = begun.elapsed();
    tokio::time::sleep(SETTLE).await;
    let after = server.blocks(&http).await?;

    // The worker dies under load; every stream must end whole or with an error in its own envelope.
    let worker = *server.workers().first().ok_or("a worker runs")?;
    let mut in_flight: FuturesUnordered<_> =
        (0..KILLED_STREAMS).map(|i| one(&client, index + i, false)).collect();
    let kill = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let killed = Command::new("kill").args(["-9", &worker.to_string()]).status();
        let since = Instant::now();
        // Not before the death was noticed: the new worker has another process id.
        while server.workers().first().is_none_or(|pid| *pid == worker) {
            if since.elapsed() > Duration::from_secs(60) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let ready = server.wait_ready(&http).await;
        (killed, ready.map(|_| since.elapsed()).map_err(|error| error.to_string()))
    };
    let finish = async {
        let (mut whole, mut clean, mut other) = (0_u32, 0_u32, Vec::new());
        while let Some((_, result)) = in_flight.next().await {
            match result {
                Ok(timeline) if timeline.tokens == OUTPUT as usize => whole += 1,
                Ok(timeline) => other.push(format!("{} tokens", timeline.tokens)),
                Err(ClientError::Refused { .. }) => clean += 1,
                Err(error) => other.push(error.to_string()),
            }
        }
        (whole, clean, other)
    };
    let ((killed, ready), (whole, clean, other)) = tokio::join!(kill, finish);
    killed?;
    tokio::time::sleep(SETTLE).await;
    println!(
        "{}",
        json!({
            "bench": "soak", "streams": streams, "seconds": ran.as_secs_f64(),
            "undisturbed": undisturbed, "complete": complete,
            "complete_percent": 100.0 * f64::from(complete) / f64::from(undisturbed.max(1)),
            "dropped_by_clients": dropped, "tokens": tokens,
            "failures": failures.iter().take(5).collect::<Vec<_>>(),
            "blocks_before": before, "blocks_after": after,
            "resident_mb_first": memory.first().map(|m| m.1),
            "resident_mb_last": memory.last().map(|m| m.1),
            "resident_mb_per_minute": slope(&memory),
            "killed_worker": {
                "streams": KILLED_STREAMS, "resumed": whole, "errors_in_band": clean,
                "other": other, "ready_after_s": ready?.as_secs_f64(),
                "blocks_after": server.blocks(&http).await?,
            },
        })
    );
    Ok(())
}
