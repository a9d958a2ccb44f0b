//! Texts of megabytes: read, refused or tokenised within a bounded time, and never on the threads
//! that serve the other connections.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use common::client::{self, Reply};
use common::engine::FakeEngine;
use common::{Server, model};
use gateway::GatewayLimits;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";
/// Far more than any of them takes in a build without optimisation.
const BOUND: Duration = Duration::from_secs(60);

/// A pause shorter than this may be the machine's own, with other tests beside.
const NOTICED: Duration = Duration::from_millis(200);

/// One letter with a million accents: a single character to a reader, two megabytes.
fn marks() -> String {
    format!("e{}", "\u{301}".repeat(1_000_000))
}

async fn start(max_context: u32) -> Server {
    let engine = FakeEngine { max_context: Some(max_context), ..FakeEngine::say("ok") };
    Server::with(engine, model::folder_with_words(), GatewayLimits::default()).await
}

/// The reply to a large request, while others are served without waiting for it: the runtime here
/// has one thread, so work done on it would hold them up for as long as it takes.
async fn beside_others(server: &Server, door: &str, body: &Value) -> Reply {
    let request = client::post(door, body.to_string().as_bytes(), "");
    let address = server.address;
    let begun = Instant::now();
    let large = tokio::spawn(async move { client::send(address, &request).await });
    let mut longest = Duration::ZERO;
    while !large.is_finished() {
        let asked = Instant::now();
        server.ok(COMPLETIONS, json!({"prompt": "a"})).await;
        longest = longest.max(asked.elapsed());
    }
    let took = begun.elapsed();
    assert!(took < BOUND, "{door} took {took:?}");
    assert!(longest < NOTICED.max(took / 4), "others waited {longest:?} of {took:?} for {door}");
    large.await.unwrap()
}

#[tokio::test]
async fn a_million_marks_that_fit_are_answered() {
    let server = start(4 << 20).await;
    let message = json!([{"role": "user", "content": marks()}]);
    for (door, body) in
        [(COMPLETIONS, json!({"prompt": marks()})), (CHAT, json!({"messages": message}))]
    {
        let reply = beside_others(&server, door, &body).await;
        assert_eq!(reply.status, 200, "{door}: {}", reply.text());
        let tokens = reply.json()["usage"]["prompt_tokens"].as_u64().unwrap();
        // The first accent went into its letter, the others are a token a pair.
        assert!((500_000..500_100).contains(&tokens), "{tokens}");
    }
}

#[tokio::test]
async fn a_million_marks_become_tokens_and_text_again() {
    let server = start(4 << 20).await;
    let body = json!({"prompt": marks(), "return_token_strs": true});
    let reply = beside_others(&server, "/tokenize", &body).await;
    assert_eq!(reply.status, 200);
    let json = reply.json();
    assert_eq!(
        json["token_strs"].as_array().unwrap().len(),
        json["count"].as_u64().unwrap() as usize
    );
    assert_eq!(reply.header("content-type"), Some("application/json"));
    let body = json!({"tokens": json["tokens"]});
    let reply = beside_others(&server, "/detokenize", &body).await;
    assert_eq!(reply.status, 200);
    // In NFC, as the tokenizer's file asks.
    let expected = format!("\u{E9}{}", "\u{301}".repeat(999_999));
    assert!(reply.json()["prompt"] == expected, "the text came back changed");
}

#[tokio::test]
async fn millions_of_ids_become_text() {
    let server = start(256).await;
    let ids = vec![97; 5_000_000];
    let reply = beside_others(&server, "/detokenize", &json!({"tokens": ids})).await;
    assert!(reply.json()["prompt"] == "a".repeat(ids.len()), "the text is a wrong one");
}

#[tokio::test]
async fn a_million_marks_that_cannot_fit_are_refused() {
    // Refused by their bytes alone, and after they were counted.
    for max_context in [256, 400_000] {
        let server = start(max_context).await;
        let message = json!([{"role": "user", "content": marks()}]);
        for (door, param, body) in [
            (COMPLETIONS, "prompt", json!({"prompt": marks()})),
            (CHAT, "messages", json!({"messages": message})),
        ] {
            let begun = Instant::now();
            let reply = server.post(door, &body.to_string()).await;
            assert!(begun.elapsed() < BOUND, "{door}: {:?}", begun.elapsed());
            assert_eq!(reply.status, 400, "{door}: {}", reply.text());
            let error = &reply.json()["error"];
            assert_eq!(
                (&error["code"], &error["param"]),
                (&json!("context_length_exceeded"), &json!(param))
            );
            assert!(reply.body.len() < 4_000, "a refusal is short");
        }
        assert_eq!(server.engine.submitted(), 0);
        server.ok(COMPLETIONS, json!({"prompt": "a"})).await;
    }
}

/// A client that resets its connection meanwhile: its text is no request any more.
#[tokio::test]
async fn a_text_whose_client_is_gone_is_not_submitted() {
    let server = start(4 << 20).await;
    let request = client::post(COMPLETIONS, json!({"prompt": marks()}).to_string().as_bytes(), "");
    for _ in 0..5 {
        let mut stream = server.connect().await;
        stream.write_all(&request).await.unwrap();
        // Read as a whole, and not yet tokenised.
        tokio::time::sleep(Duration::from_millis(50)).await;
        stream.set_zero_linger().unwrap();
        drop(stream);
    }
    let begun = Instant::now();
    while server.metrics.connections.get() > 0 {
        assert!(begun.elapsed() < BOUND);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(server.engine.submitted(), 0);
    server.ok(COMPLETIONS, json!({"prompt": "a"})).await;
}

#[tokio::test]
async fn a_million_entries_of_a_map_are_refused() {
    let server = start(256).await;
    let bias: serde_json::Map<_, _> = (0..1_000_000).map(|i| (i.to_string(), json!(1))).collect();
    let body = json!({"prompt": "a", "logit_bias": bias});
    let reply = beside_others(&server, COMPLETIONS, &body).await;
    assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!("logit_bias")));
}
