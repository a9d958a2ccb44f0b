//! Connections that misbehave, streams that break, servers that stop.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use common::Server;
use common::client::{self, Reply};
use common::engine::{Ended, FakeEngine};
use gateway::engine::{GenerationError, Readiness, SubmitError};
use serde_json::json;
use std::time::{Duration, Instant};
use telemetry::{FinishedBy, RefusedBy};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const DOOR: &str = "/v1/completions";

#[tokio::test]
async fn odd_methods_and_paths_get_the_envelope() {
    let server = Server::start(FakeEngine::say("x")).await;
    for (method, path, status, code) in [
        ("FOO", DOOR, 405, "method_not_allowed"),
        ("GET", DOOR, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/", 404, "not_found"),
        ("GET", "/v1/models/%2e%2e%2fsecret", 404, "model_not_found"),
    ] {
        let raw = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        );
        let reply = client::send(server.address, raw.as_bytes()).await;
        assert_eq!(
            (reply.status, &reply.json()["error"]["code"]),
            (status, &json!(code)),
            "{method} {path}"
        );
    }
    let metrics = server.get("/metrics").await.text();
    assert!(!metrics.contains("FOO"), "a method is no label");
    assert!(metrics.contains("door=\"other\",model_name=\"tiny\",status=\"4xx\"} 2"), "{metrics}");
}

#[tokio::test]
async fn http_1_0_and_pipelined_keep_alive_are_served() {
    let server = Server::start(FakeEngine::say("x")).await;
    let reply = client::send(server.address, b"GET /livez HTTP/1.0\r\n\r\n").await;
    assert_eq!((reply.status, reply.text().as_str()), (200, "ok\n"));
    let twice = "GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let mut stream = server.connect().await;
    stream.write_all(twice.as_bytes()).await.unwrap();
    let raw = String::from_utf8(client::read_all(&mut stream).await).unwrap();
    assert_eq!(raw.matches("HTTP/1.1 200 OK").count(), 2);
    assert!(raw.contains("{\"version\":\"test\"}"));
}

#[tokio::test]
async fn headers_beyond_the_limits_are_refused() {
    let server = Server::start(FakeEngine::say("x")).await;
    let huge = format!("GET /livez HTTP/1.1\r\nHost: x\r\nA: {}", "a".repeat(4 << 20));
    let many = format!("GET /livez HTTP/1.1\r\nHost: x\r\n{}\r\n", "A: b\r\n".repeat(10_000));
    for raw in [huge, many] {
        let reply = client::send(server.address, raw.as_bytes()).await;
        assert_eq!(reply.status, 431);
    }
    // The preface of HTTP/2, which is not spoken here.
    let mut stream = server.connect().await;
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    let raw = client::read_all(&mut stream).await;
    assert!(raw.is_empty() || Reply::parse(&raw).status >= 400);
    assert_eq!(server.get("/livez").await.status, 200);
}

#[tokio::test]
async fn slow_and_idle_clients_are_let_go() {
    let server = Server::start(FakeEngine::say("x")).await;
    let started = Instant::now();
    // Sends nothing; sends half a header; sends half a body; keeps a served connection open.
    let mut idle = server.connect().await;
    let mut half_header = server.connect().await;
    half_header.write_all(b"POST /v1/completions HT").await.unwrap();
    let mut half_body = server.connect().await;
    let request = client::post(DOOR, b"{\"prompt\":\"a\"}", "");
    half_body.write_all(&request[..request.len() - 4]).await.unwrap();
    let mut served = server.connect().await;
    served.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let reply = Reply::parse(&client::read_all(&mut half_body).await);
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (408, &json!("body_timeout")));
    for stream in [&mut idle, &mut half_header, &mut served] {
        client::read_all(stream).await;
    }
    assert!(started.elapsed() < Duration::from_secs(6), "closed by its timers");
    assert_eq!(server.metrics.connections.get(), 0);
}

/// A body that never falls silent for long is bounded too.
#[tokio::test]
async fn a_body_that_drips_is_let_go() {
    let server = Server::start(FakeEngine::say("x")).await;
    let request =
        client::post(DOOR, format!("{{\"prompt\":\"{}\"}}", "a".repeat(99)).as_bytes(), "");
    let (mut reader, mut writer) = server.connect().await.into_split();
    let drip = tokio::spawn(async move {
        let (most, rest) = request.split_at(request.len() - 99);
        let _ = writer.write_all(most).await;
        for byte in rest {
            tokio::time::sleep(Duration::from_millis(100)).await;
            if writer.write_all(&[*byte]).await.is_err() {
                break;
            }
        }
    });
    let started = Instant::now();
    let mut raw = Vec::new();
    // The connection may end in a reset: the rest of the body was never read.
    let _ = reader.read_to_end(&mut raw).await;
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    let reply = Reply::parse(&raw);
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (408, &json!("body_timeout")));
    drip.abort();
    assert_eq!(server.engine.submitted(), 0);
}

#[tokio::test]
async fn a_crowd_of_idle_connections_does_not_keep_others_out() {
    let mut limits = common::limits();
    limits.connections = 8;
    limits.header_read = Duration::from_millis(300);
    let server = Server::with(FakeEngine::say("x"), common::model::folder(), limits).await;
    let mut crowd = Vec::new();
    for _ in 0..40 {
        crowd.push(server.connect().await);
    }
    assert_eq!(server.get("/livez").await.status, 200);
    assert!(server.metrics.connections.get() <= 8);
}

#[tokio::test]
async fn request_ids_are_echoed_when_safe_and_never_used() {
    let server = Server::start(FakeEngine::say("x")).await;
    let body = b"{\"prompt\":\"a\"}";
    let mut ids = Vec::new();
    for _ in 0..2 {
        let raw = client::post(DOOR, body, "X-Request-Id: mine-1\r\n");
        let reply = client::send(server.address, &raw).await;
        assert_eq!(reply.header("x-request-id"), Some("mine-1"));
        ids.push(reply.json()["id"].as_str().unwrap().to_owned());
    }
    assert_ne!(ids[0], ids[1]);
    for bad in ["a b", "a\tb", "é", "<script>", &"x".repeat(129), ""] {
        let raw = client::post(DOOR, body, &format!("X-Request-Id: {bad}\r\n"));
        let reply = client::send(server.address, &raw).await;
        assert_eq!(reply.status, 200, "{bad}");
        let echoed = reply.header("x-request-id").unwrap();
        assert_eq!(reply.json()["id"], format!("cmpl-{echoed}"), "the server's own id");
    }
    // A line's end in an id ends the header or the request; it never makes a header of the reply.
    for bad in ["a\r\n Set-Cookie: b", "a\rSet-Cookie: b", "a\nSet-Cookie: b", "a\0Set-Cookie: b"] {
        let raw = client::post(DOOR, body, &format!("X-Request-Id: {bad}\r\n"));
        let reply = client::send(server.address, &raw).await;
        assert!([200, 400].contains(&reply.status), "{bad:?}: {}", reply.head);
        assert_eq!(reply.header("set-cookie"), None, "{bad:?}: {}", reply.head);
        assert!(!reply.head.contains("Cookie"), "{bad:?}: {}", reply.head);
    }
}

async fn open_stream(server: &Server, body: serde_json::Value) -> TcpStream {
    server.open_stream(&client::post(DOOR, body.to_string().as_bytes(), "")).await.0
}

#[tokio::test]
async fn a_client_that_goes_away_aborts_its_generations() {
    let slow =
        || FakeEngine { delay: Duration::from_millis(50), ..FakeEngine::say(&"a".repeat(99)) };
    let body = json!({"prompt": "a", "n": 2, "max_tokens": 90, "stream": true});
    let server = Server::start(slow()).await;
    drop(open_stream(&server, body.clone()).await);
    assert_eq!(server.engine.ended(2).await, [Ended::Aborted; 2]);
    assert_eq!(server.metrics.finished(FinishedBy::Abort).get(), 2);
    // The same for a reply that is not streamed, and before the first event of one that is.
    for stream in [false, true] {
        let server = Server::start(slow()).await;
        let mut body = body.clone();
        body["stream"] = stream.into();
        let mut connection = server.connect().await;
        let raw = client::post(DOOR, body.to_string().as_bytes(), "");
        connection.write_all(&raw).await.unwrap();
        while server.engine.submitted() < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        drop(connection);
        assert_eq!(server.engine.ended(2).await, [Ended::Aborted; 2]);
    }
}

#[tokio::test]
async fn a_client_that_stops_reading_is_given_up() {
    let mut limits = common::limits();
    limits.write_stall = Duration::from_millis(300);
    // Large chunks fill the socket's buffers; the text of each token is spelled out 21 times.
    let engine = FakeEngine { batch: 200, ..FakeEngine::say(&"a".repeat(200)) };
    let server = Server::with(engine, common::model::folder(), limits).await;
    let body = json!({"prompt": "a", "n": 128, "max_tokens": 255, "ignore_eos": true,
                      "logprobs": 20, "stream": true});
    let stream = open_stream(&server, body).await;
    server.engine.ended(1).await;
    assert_eq!(server.metrics.stalled_clients.get(), 1);
    drop(stream);
}

#[tokio::test]
async fn early_failures_keep_their_status_and_late_ones_are_in_band() {
    let failing = |after| FakeEngine {
        fail: Some((after, GenerationError::WorkerLost)),
        ..FakeEngine::say("abc")
    };
    let server = Server::start(failing(0)).await;
    for stream in [true, false] {
        let reply = server.post(DOOR, &json!({"prompt": "a", "stream": stream}).to_string()).await;
        assert_eq!((reply.status, &reply.json()["error"]["code"]), (500, &json!("worker_lost")));
        assert_eq!(
            (reply.header("retry-after"), reply.header("x-should-retry")),
            (None, Some("false"))
        );
    }
    let server = Server::start(failing(2)).await;
    for door in [DOOR, "/v1/chat/completions"] {
        let mut body = json!({"stream": true, "stream_options": {"include_usage": true}});
        if door == DOOR {
            body["prompt"] = "a".into();
        } else {
            body["messages"] = json!([{"role": "user", "content": "a"}]);
        }
        let reply = server.post(door, &body.to_string()).await;
        assert_eq!(reply.status, 200);
        let events = reply.events();
        let (last, rest) = events.split_last().unwrap();
        let error: serde_json::Value = serde_json::from_str(last).unwrap();
        assert_eq!(error["error"]["code"], "worker_lost");
        assert!(error["error"]["message"].is_string());
        assert!(rest.iter().all(|event| {
            let chunk: serde_json::Value = serde_json::from_str(event).unwrap();
            chunk["choices"][0]["finish_reason"].is_null()
        }));
        assert_eq!(server.post(door, &body.to_string()).await.status, 200);
    }
    assert_eq!(server.metrics.finished(FinishedBy::Error).get(), 4);
}

#[tokio::test]
async fn a_failure_that_would_repeat_is_not_retried_by_clients() {
    let engine =
        FakeEngine { fail: Some((1, GenerationError::NotANumber)), ..FakeEngine::say("ab") };
    let reply = Server::start(engine).await.post(DOOR, "{\"prompt\":\"a\"}").await;
    assert_eq!((reply.status, reply.header("x-should-retry")), (500, Some("false")));
    assert_eq!(reply.json()["error"]["type"], "server_error");
}

/// Also with more choices than are polled in one batch, and the failed one among the last.
#[tokio::test]
async fn one_failed_choice_ends_all_at_once() {
    const CHOICES: u64 = 64;
    let fail = Some((0, GenerationError::WorkerLost));
    let delay = Duration::from_millis(100);
    let engine = FakeEngine { fail, fail_only: Some(CHOICES), delay, ..FakeEngine::say("x") };
    let server = Server::start(engine).await;
    let body = json!({"prompt": "a", "n": CHOICES, "max_tokens": 200, "ignore_eos": true});
    let begun = Instant::now();
    let reply = server.post(DOOR, &body.to_string()).await;
    assert!(reply.status >= 500, "{}", reply.text());
    // The others would take twenty seconds.
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let others = CHOICES as usize - 1;
    assert_eq!(server.engine.ended(others).await, vec![Ended::Aborted; others]);
}

/// The engine's own check comes after the gateway's: what it refuses is refused alike.
#[tokio::test]
async fn a_refusal_after_submission_is_no_internal_error() {
    use ids::Tokens;
    let retry_after = Duration::from_secs(3);
    let (tokens, prompt, max_tokens) = (Tokens(9), Tokens(5), Tokens(4));
    let too_long = SubmitError::TooLong { prompt, max_tokens, max_context: Tokens(8) };
    for (refusal, status, code, label) in [
        (SubmitError::QueueFull { retry_after }, 503, "queue_full", RefusedBy::QueueFull),
        (SubmitError::Shed { retry_after }, 503, "shed", RefusedBy::Shed),
        (
            SubmitError::DeadlineUnreachable { needs: retry_after, left: retry_after, retry_after },
            503,
            "deadline_unreachable",
            RefusedBy::Deadline,
        ),
        (too_long, 400, "context_length_exceeded", RefusedBy::TooLarge),
        (
            SubmitError::TooLarge { tokens, need: 2, have: 1 },
            400,
            "kv_cache_too_small",
            RefusedBy::TooLarge,
        ),
        (SubmitError::EmptyPrompt, 400, "invalid_value", RefusedBy::Validation),
        (
            SubmitError::NotReady(Readiness::Restarting { left: retry_after }),
            503,
            "not_ready",
            RefusedBy::NotReady,
        ),
    ] {
        let fail = Some((0, GenerationError::Refused(refusal)));
        let server = Server::start(FakeEngine { fail, ..FakeEngine::say("x") }).await;
        for stream in [false, true] {
            let body = json!({"prompt": "a", "stream": stream}).to_string();
            let reply = server.post(DOOR, &body).await;
            assert_eq!(reply.status, status, "{code}: {}", reply.text());
            let error = reply.json()["error"].as_object().unwrap().clone();
            let keys: Vec<&String> = error.keys().collect();
            assert_eq!(keys, ["message", "type", "param", "code"]);
            let kind = if status == 400 { "invalid_request_error" } else { "server_error" };
            assert_eq!((&error["code"], &error["type"]), (&json!(code), &json!(kind)));
            assert_eq!(reply.header("retry-after").is_some(), status == 503, "{code}");
        }
        assert_eq!(server.metrics.refused(label).get(), 2, "{code}");
        assert_eq!(server.metrics.finished(FinishedBy::Error).get(), 0, "{code}: never began");
    }
}

#[tokio::test]
async fn a_full_or_unready_engine_says_when_to_come_back() {
    let retry_after = Duration::from_secs(3);
    let full =
        FakeEngine { refuse: Some(SubmitError::QueueFull { retry_after }), ..FakeEngine::say("x") };
    let server = Server::start(full).await;
    let reply = server.post(DOOR, "{\"prompt\":\"a\",\"stream\":true}").await;
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (503, &json!("queue_full")));
    assert_eq!(reply.header("retry-after"), Some("3"));

    let server = Server::start(FakeEngine::say("x")).await;
    *server.engine.readiness.lock().unwrap() = Some(Readiness::Loading { percent: 40 });
    for reply in [
        server.get("/readyz").await,
        server.get("/health").await,
        server.post(DOOR, "{\"prompt\":\"a\"}").await,
    ] {
        assert_eq!((reply.status, &reply.json()["error"]["code"]), (503, &json!("not_ready")));
        assert!(reply.header("retry-after").is_some());
        assert!(reply.text().contains("40 %"));
    }
    assert_eq!(server.get("/livez").await.status, 200);
    assert!(server.get("/metrics").await.text().contains("tokenmill_ready{model_name=\"tiny\"} 0"));
    // While a group starts again it is known how long that should take.
    let left = Duration::from_millis(6500);
    *server.engine.readiness.lock().unwrap() = Some(Readiness::Restarting { left });
    let chat = json!({"messages": [{"role": "user", "content": "a"}], "stream": true}).to_string();
    for reply in [
        server.get("/readyz").await,
        server.post(DOOR, "{\"prompt\":\"a\"}").await,
        server.post("/v1/chat/completions", &chat).await,
    ] {
        assert_eq!((reply.status, &reply.json()["error"]["code"]), (503, &json!("not_ready")));
        assert_eq!(reply.header("retry-after"), Some("7"));
    }
    *server.engine.readiness.lock().unwrap() = None;
    assert_eq!(server.get("/readyz").await.status, 200);
}

#[tokio::test]
async fn a_silent_stream_is_kept_alive() {
    let engine = FakeEngine { delay: Duration::from_millis(700), ..FakeEngine::say("ab") };
    let server = Server::start(engine).await;
    // The first event comes after `commit_after`, so the status is committed before it.
    let reply = server.post(DOOR, "{\"prompt\":\"a\",\"stream\":true,\"max_tokens\":1}").await;
    assert_eq!(reply.status, 200);
    assert!(reply.text().contains(": keep-alive\n\n"));
    let events = reply.events();
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    assert_eq!(events.len(), 3);
}

#[tokio::test]
async fn deadlines_reach_the_engine() {
    let mut limits = common::limits();
    limits.request = Some(Duration::from_secs(60));
    let server = Server::with(FakeEngine::say("x"), common::model::folder(), limits).await;
    for (header, deadline) in [
        ("", 60_000),
        ("X-Request-Timeout-Ms: 1500\r\n", 1_500),
        ("X-Request-Timeout-Ms: 99000\r\n", 60_000),
    ] {
        client::send(server.address, &client::post(DOOR, b"{\"prompt\":\"a\"}", header)).await;
        assert_eq!(server.engine.last_request().deadline, Some(Duration::from_millis(deadline)));
    }
    let raw = client::post(DOOR, b"{\"prompt\":\"a\"}", "X-Request-Timeout-Ms: soon\r\n");
    assert_eq!(client::send(server.address, &raw).await.status, 400);
}

#[tokio::test]
async fn shutdown_lets_streams_end_and_refuses_new_work() {
    let engine = FakeEngine { delay: Duration::from_millis(100), ..FakeEngine::say("abcdefgh") };
    let mut server = Server::start(engine).await;
    let mut stream = open_stream(&server, json!({"prompt": "a", "stream": true})).await;
    server.stop();
    let rest = String::from_utf8(client::read_all(&mut stream).await).unwrap();
    assert!(rest.contains("\"finish_reason\":\"stop\"") && rest.contains("[DONE]"), "{rest}");
    tokio::time::timeout(Duration::from_secs(1), &mut server.task).await.unwrap().unwrap().unwrap();
    assert!(TcpStream::connect(server.address).await.is_err());
}

#[tokio::test]
async fn shutdown_ends_what_does_not_end_by_itself() {
    let engine = FakeEngine { delay: Duration::from_secs(1), ..FakeEngine::say(&"a".repeat(99)) };
    let mut limits = common::limits();
    limits.drain = Duration::from_millis(300);
    let mut server = Server::with(engine, common::model::folder(), limits).await;
    let mut connection = server.connect().await;
    let raw = client::post(DOOR, b"{\"prompt\":\"a\",\"max_tokens\":90}", "");
    connection.write_all(&raw).await.unwrap();
    while server.engine.submitted() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    server.stop();
    tokio::time::timeout(Duration::from_secs(2), &mut server.task).await.unwrap().unwrap().unwrap();
    assert_eq!(server.engine.ended(1).await, [Ended::Aborted]);
}
