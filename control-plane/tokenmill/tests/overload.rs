//! A full queue over HTTP: who is turned away, with which code, and when to come again.

mod common;

use common::{Server, wait_until};
use serde_json::{Value, json};
use std::time::Duration;

/// What came back: status, `Retry-After`, the error.
type Answer = (u16, Option<u64>, Value);

fn ask(url: &str, user: &str, tokens: u32) -> Answer {
    let body = json!({
        "prompt": [1, 2, 3], "max_tokens": tokens, "ignore_eos": true, "user": user,
        "return_token_ids": true,
    });
    let client = reqwest::blocking::Client::new();
    let sent = client.post(format!("{url}/v1/completions")).json(&body).send();
    let reply = sent.expect("the server answers");
    let status = reply.status().as_u16();
    let after =
        reply.headers().get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
    let body: Value = reply.json().expect("JSON");
    (status, after, body["error"].clone())
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
    let url = server.url.as_str();
    let running = || server.metric("tokenmill_requests_running") == Some(1.0);
    let refused =
        |by: &str| server.metric(&format!("tokenmill_refused_total{{refused_by=\"{by}\"}}"));
    let told = |answer: Answer, code: &str| {
        let (status, after, error) = answer;
        assert_eq!((status, &error["code"]), (503, &json!(code)), "{error}");
        let keys: Vec<&String> = error.as_object().expect("the envelope").keys().collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        assert!(after.is_some_and(|seconds| (1..=60).contains(&seconds)), "{after:?}");
    };
    std::thread::scope(|scope| {
        let first = scope.spawn(|| ask(url, "many", 100));
        wait_until("the first runs", Duration::from_secs(5), running);
        let second = scope.spawn(|| ask(url, "many", 2));
        waiting(1.0);
        let third = scope.spawn(|| ask(url, "many", 2));
        waiting(2.0);
        told(ask(url, "many", 2), "queue_full");
        let other = scope.spawn(|| ask(url, "other", 2));
        told(third.join().expect("answered"), "shed");
        for answer in [first, second, other] {
            assert_eq!(answer.join().expect("answered").0, 200);
        }
    });
    assert_eq!((refused("queue_full"), refused("shed")), (Some(1.0), Some(1.0)));
}
