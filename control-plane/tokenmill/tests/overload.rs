//! A full queue over HTTP: who is turned away, with which code, and when to come again; and what ten times
//! too many requests do to those who are served.

mod common;

use common::{Server, wait_until};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

fn ask(server: &Server, user: &str, tokens: u32) -> (u16, Option<u64>, Value) {
    let body = json!({
        "prompt": [1, 2, 3], "max_tokens": tokens, "ignore_eos": true, "user": user,
        "return_token_ids": true,
    });
    server.told("/v1/completions", &body)
}

#[test]
fn a_full_queue_turns_away_who_has_most_in_it_and_says_when_to_come_again() {
    // One seat and steps of 20 ms: the first holds it for two seconds, two may wait.
    let fake = ["--fake-engine", "20000,0,0", "--max-model-len", "4096", "--max-num-seqs", "1"];
    let server = Server::start(&[fake.as_slice(), &["--max-queued-requests", "2"]].concat());
    let waiting = |n: f64| {
        let enough = || server.metric("tokenmill_requests_waiting") == Some(n);
        wait_until("requests wait", Duration::from_secs(5), enough);
    };
    let server = &server;
    let running = || server.metric("tokenmill_requests_running") == Some(1.0);
    let refused =
        |by: &str| server.metric(&format!("tokenmill_refused_total{{refused_by=\"{by}\"}}"));
    let told = |answer: (u16, Option<u64>, Value), code: &str| {
        let (status, after, error) = answer;
        assert_eq!((status, &error["code"]), (503, &json!(code)), "{error}");
        assert!(after.is_some_and(|seconds| (1..=60).contains(&seconds)), "{after:?}");
    };
    std::thread::scope(|scope| {
        let first = scope.spawn(|| ask(server, "many", 100));
        wait_until("the first runs", Duration::from_secs(5), running);
        let second = scope.spawn(|| ask(server, "many", 2));
        waiting(1.0);
        let third = scope.spawn(|| ask(server, "many", 2));
        waiting(2.0);
        told(ask(server, "many", 2), "queue_full");
        let other = scope.spawn(|| ask(server, "other", 2));
        told(third.join().expect("answered"), "shed");
        for answer in [first, second, other] {
            assert_eq!(answer.join().expect("answered").0, 200);
        }
    });
    assert_eq!((refused("queue_full"), refused("shed")), (Some(1.0), Some(1.0)));
}

/// Tokens of an answer, steps of 10 ms for four at once: four answers a second. They are long beside
/// the few steps that a seat stays empty between two.
const TOKENS: u32 = 100;
const SEATS: u32 = 4;
const QUEUE: u32 = 8;
const PER_SECOND: u32 = 4;
/// How long ten times as many come.
const OVERLOAD: Duration = Duration::from_secs(3);
/// When every seat is taken.
const SETTLED: Duration = Duration::from_millis(300);

/// One of three users asks, and waits so many milliseconds: status, when to come again, and the error's code.
async fn ask_in_time(
    client: &reqwest::Client,
    url: &str,
    number: u32,
    patience: &'static str,
) -> (u16, Option<u64>, String) {
    let body = json!({
        "prompt": [1, 2, 3], "max_tokens": TOKENS, "ignore_eos": true, "return_token_ids": true,
        "user": format!("user {}", number % 3),
    });
    let request = client.post(format!("{url}/v1/completions")).json(&body);
    let reply = request.header("x-request-timeout-ms", patience).send().await.expect("an answer");
    let status = reply.status().as_u16();
    let after = reply.headers().get("retry-after");
    let after = after.and_then(|seconds| seconds.to_str().ok()?.parse().ok());
    let body: Value = reply.json().await.expect("JSON");
    if status == 200 {
        let tokens = body["choices"][0]["token_ids"].as_array().map(Vec::len);
        assert_eq!(tokens, Some(TOKENS as usize), "whole");
    }
    (status, after, body["error"]["code"].as_str().unwrap_or_default().to_owned())
}

/// Tokens that left the server until now. Where nobody is cut off, all of them are of whole answers.
fn tokens(server: &Server) -> (f64, Instant) {
    (server.metric("tokenmill_generated_tokens_total").expect("counted"), Instant::now())
}

/// Tokens a second from then to now.
fn since((before, then): (f64, Instant), server: &Server) -> f64 {
    let (after, now) = tokens(server);
    (after - before) / now.duration_since(then).as_secs_f64()
}

/// Says that it is over when it is dropped, also by a failure.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn ten_times_too_many_requests_leave_goodput_as_it_is_and_are_forgotten_as_soon_as_they_stop() {
    let (seats, queue) = (SEATS.to_string(), QUEUE.to_string());
    let server = Server::start(&[
        "--fake-engine",
        "10000,0,0",
        "--max-model-len",
        "4096",
        "--no-enable-prefix-caching",
        "--max-num-seqs",
        &seats,
        "--max-queued-requests",
        &queue,
    ]);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let client = reqwest::Client::new();
    let (over, url) = (AtomicBool::new(false), server.url.as_str());
    let begin = |number| {
        let (client, url) = (client.clone(), url.to_owned());
        runtime.spawn(async move { ask_in_time(&client, &url, number, "4000").await })
    };
    // The best load: as many again as run are always in line.
    let users = (0..2 * SEATS).map(|user| {
        let (client, url) = (client.clone(), url.to_owned());
        runtime.spawn(async move {
            for _ in 0..2 {
                let answer = ask_in_time(&client, &url, user, "60000").await;
                assert_eq!(answer, (200, None, String::new()));
            }
        })
    });
    let users: Vec<_> = users.collect();
    std::thread::sleep(SETTLED);
    let settled = tokens(&server);
    std::thread::sleep(OVERLOAD);
    let peak = since(settled, &server);
    for user in users {
        runtime.block_on(user).expect("served");
    }
    std::thread::scope(|scope| {
        let longest = scope.spawn(|| {
            let mut longest = 0.0_f64;
            while !over.load(Ordering::Relaxed) {
                longest =
                    longest.max(server.metric("tokenmill_requests_waiting").expect("counted"));
                std::thread::sleep(Duration::from_millis(50));
            }
            longest
        });
        let watched = Over(&over);
        let began = Instant::now();
        let all = 10 * PER_SECOND * OVERLOAD.as_secs() as u32;
        let mut settled = tokens(&server);
        let asked: Vec<_> = (0..all)
            .map(|number| {
                if began.elapsed() < SETTLED {
                    settled = tokens(&server);
                }
                let due = began + OVERLOAD * number / all;
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                begin(number)
            })
            .collect();
        let (during, end) = (since(settled, &server), Instant::now());
        let mut codes: BTreeMap<(u16, String), u32> = BTreeMap::new();
        for answer in asked {
            let (status, after, code) = runtime.block_on(answer).expect("answered");
            if status != 200 {
                assert!(
                    after.is_some_and(|seconds| (1..=60).contains(&seconds)),
                    "{code}: {after:?}"
                );
            }
            *codes.entry((status, code)).or_default() += 1;
        }
        let served = codes.remove(&(200, String::new())).unwrap_or(0);
        let answered = end.elapsed();
        drop(watched);
        let longest = longest.join().expect("no panic");
        eprintln!(
            "{during:.0} tokens/s of {peak:.0}; {longest} in line; {served} served, {codes:?}"
        );
        assert!(during >= 0.9 * peak, "{during:.0} tokens/s of {peak:.0}");
        assert!(
            longest <= f64::from(QUEUE) && longest >= f64::from(QUEUE / 2),
            "{longest} in line"
        );
        let known = |(status, code): &(u16, String)| {
            *status == 503
                && ["queue_full", "shed", "deadline_unreachable"].contains(&code.as_str())
        };
        assert!(codes.keys().all(known), "{codes:?}");
        assert!(codes.values().sum::<u32>() > all / 2, "{codes:?}");
        // Those in line and those with a seat, at the rate at which they are served, and a little.
        let lasts = f64::from((QUEUE + SEATS) * TOKENS) / during + 0.5;
        let lasts = Duration::from_secs_f64(lasts);
        assert!(answered < lasts, "all answered {answered:?} after the last came, not {lasts:?}");
        let asked = Instant::now();
        assert_eq!(runtime.block_on(begin(0)).expect("answered").0, 200);
        // A hundred steps of 10 ms, and half as much for a machine that is busy.
        assert!(asked.elapsed() < Duration::from_millis(1500), "at once: {:?}", asked.elapsed());
    });
}
