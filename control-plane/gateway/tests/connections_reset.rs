//! Clients that reset their connection (TCP RST) at every point of an exchange: nothing of them is
//! left behind, and nobody else notices.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use common::client::{self, Reply};
use common::engine::{Ended, FakeEngine};
use common::{Server, model};
use serde_json::json;
use std::future::Future;
use std::time::{Duration, Instant};
use telemetry::FinishedBy;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

const DOOR: &str = "/v1/completions";
const RESETS: usize = 20;
/// Of streams that are open at once.
const ROUND: usize = 5;
/// Fewer than there are resets: one that kept its slot would soon keep everyone out.
const SLOTS: usize = ROUND + 3;
/// What a request gets that ends by itself; said in about a second.
const ANSWER: &str = "A stream of one hundred bytes is whole when each of its bytes has come, and \
                      the reason of its end..";

/// A server that speaks slowly, and whose timers never help.
async fn start() -> Server {
    let mut limits = common::limits();
    let minute = Duration::from_secs(60);
    limits.connections = SLOTS;
    (limits.header_read, limits.body_idle, limits.body_total) = (minute, minute, minute);
    let engine = FakeEngine { delay: Duration::from_millis(10), ..FakeEngine::say(ANSWER) };
    Server::with(engine, model::folder(), limits).await
}

/// A request that does not end by itself before its client is gone.
fn endless(stream: bool, headers: &str) -> Vec<u8> {
    let body = json!({"prompt": "a", "stream": stream, "max_tokens": 250, "ignore_eos": true});
    client::post(DOOR, body.to_string().as_bytes(), headers)
}

/// Closes with a reset instead of an orderly end.
fn reset(stream: TcpStream) {
    stream.set_zero_linger().unwrap();
    drop(stream);
}

/// Sends `bytes` and resets, every second time at once and else when the server has read them.
async fn send_and_reset(server: &Server, bytes: &[u8]) {
    for i in 0..RESETS {
        let mut stream = server.connect().await;
        stream.write_all(bytes).await.unwrap();
        if i % 2 == 0 {
            sleep(Duration::from_millis(10)).await;
        }
        reset(stream);
    }
}

/// Does `resets` beside the stream of another client, which must come whole. Then nothing of the
/// others may be left, long before a timer would have ended it; each of theirs that reached the
/// engine must have been aborted, `aborts` of them where that is known; and the next is served.
async fn beside_a_stream(server: &Server, aborts: Option<usize>, resets: impl Future<Output = ()>) {
    let body = json!({"prompt": "a", "stream": true, "max_tokens": 200});
    let other = async {
        let reply = server.post(DOOR, &body.to_string()).await;
        assert_whole(&reply);
        Instant::now()
    };
    let resets = async {
        resets.await;
        Instant::now()
    };
    let both = async { tokio::join!(other, resets) };
    let (other, resets) = timeout(Duration::from_secs(30), both).await.expect("nobody waits");
    assert!(resets < other, "the other stream ran beside all resets");

    let gone = async {
        while server.metrics.connections.get() > 0 || server.engine.running() > 0 {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(2), gone).await.unwrap_or_else(|_| {
        let (connections, running) = (server.metrics.connections.get(), server.engine.running());
        panic!("{connections} connections and {running} generations are left");
    });
    let reached = server.engine.submitted() - 1;
    assert_eq!(server.engine.ended(reached).await, vec![Ended::Aborted; reached]);
    assert_eq!(server.metrics.finished(FinishedBy::Abort).get(), reached as u64);
    assert_eq!(server.metrics.finished(FinishedBy::Stop).get(), 1);
    if let Some(aborts) = aborts {
        assert_eq!(reached, aborts);
    }
    let next = server.ok(DOOR, json!({"prompt": "a", "max_tokens": 2}));
    timeout(Duration::from_secs(5), next).await.expect("there is a slot for the next");
}

fn assert_whole(reply: &Reply) {
    assert_eq!(reply.status, 200, "{}", reply.text());
    let mut events = reply.events();
    assert_eq!(events.pop().as_deref(), Some("[DONE]"));
    let chunks: Vec<serde_json::Value> =
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let text: String = chunks.iter().map(|c| c["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, ANSWER);
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn in_the_middle_of_the_head() {
    let request = endless(true, "");
    for cut in [1, 20, request.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 3] {
        let server = start().await;
        beside_a_stream(&server, Some(0), send_and_reset(&server, &request[..cut])).await;
    }
}

/// What has come of the body is a whole request, so only its announced end tells that it is not.
#[tokio::test]
async fn in_the_middle_of_the_body() {
    let head = format!("POST {DOOR} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n");
    for body in [
        "Content-Length: 100\r\n\r\n{\"prompt\": \"a\"}   ",
        "Content-Length: 100\r\n\r\n{\"prompt\"",
        "Content-Length: 100\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\nf\r\n{\"prompt\": \"a\"}\r\n",
        "Transfer-Encoding: chunked\r\n\r\nff\r\n{\"prompt\": \"a\"}",
    ] {
        let server = start().await;
        let request = format!("{head}{body}");
        beside_a_stream(&server, Some(0), send_and_reset(&server, request.as_bytes())).await;
    }
}

/// Whether a request is seen before its reset is up to the network; it is not left behind either way.
#[tokio::test]
async fn right_after_the_request() {
    for stream in [false, true] {
        let server = start().await;
        let request = endless(stream, "");
        beside_a_stream(&server, None, send_and_reset(&server, &request)).await;
    }
}

#[tokio::test]
async fn before_the_answer_to_a_request_under_way() {
    for stream in [false, true] {
        let server = start().await;
        let request = endless(stream, "");
        let resets = async {
            // After the other stream.
            while server.engine.submitted() == 0 {
                sleep(Duration::from_millis(1)).await;
            }
            for i in 0..RESETS {
                let mut connection = server.connect().await;
                connection.write_all(&request).await.unwrap();
                while server.engine.submitted() < i + 2 {
                    sleep(Duration::from_millis(1)).await;
                }
                reset(connection);
            }
        };
        beside_a_stream(&server, Some(RESETS), resets).await;
    }
}

#[tokio::test]
async fn in_the_middle_of_a_stream() {
    let server = start().await;
    let request = endless(true, "");
    let resets = async {
        for _ in 0..RESETS / ROUND {
            let opened = (0..ROUND).map(|_| server.open_stream(&request));
            for (stream, _) in futures::future::join_all(opened).await {
                reset(stream);
            }
        }
    };
    beside_a_stream(&server, Some(RESETS), resets).await;
}

/// A client's own id names nothing in the server: who shares it, or has one that begins with it,
/// does not go with the one that is reset.
#[tokio::test]
async fn another_request_of_the_same_id_goes_on() {
    let server = start().await;
    let body = json!({"prompt": "a", "stream": true, "max_tokens": 200}).to_string();
    let named = |id: &str| client::post(DOOR, body.as_bytes(), &format!("X-Request-Id: {id}\r\n"));
    let others = ["job", "job", "job-1"].map(named);
    let opened = futures::future::join_all(others.iter().map(|raw| server.open_stream(raw))).await;
    let (first, _) = server.open_stream(&endless(true, "X-Request-Id: job\r\n")).await;
    reset(first);
    assert_eq!(server.engine.ended(1).await, [Ended::Aborted]);
    for (mut stream, mut raw) in opened {
        raw.extend(client::read_all(&mut stream).await);
        assert_whole(&Reply::parse(&raw));
    }
    assert_eq!(server.metrics.finished(FinishedBy::Abort).get(), 1);
}
