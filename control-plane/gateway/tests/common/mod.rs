//! A gateway on a loopback port over an engine that says what a test scripted.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, reason = "shared by several tests")]

pub(crate) mod client;
pub(crate) mod engine;
pub(crate) mod model;

use client::Reply;
use engine::FakeEngine;
use gateway::{Gateway, GatewayLimits, ServedModel, serve};
use std::net::SocketAddr;
use std::sync::Arc;
use telemetry::Metrics;
use text::TextFolder;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

/// A running server; it stops when dropped.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) engine: Arc<FakeEngine>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) task: tokio::task::JoinHandle<std::io::Result<()>>,
    stop: Option<oneshot::Sender<()>>,
}

impl Server {
    /// With a tokenizer and short timers.
    pub(crate) async fn start(engine: FakeEngine) -> Self {
        Self::with(engine, model::folder(), limits()).await
    }

    pub(crate) async fn with(engine: FakeEngine, text: TextFolder, limits: GatewayLimits) -> Self {
        let engine = Arc::new(engine);
        let metrics = Arc::new(Metrics::new("tiny", "test"));
        let served = ServedModel {
            names: vec!["tiny".to_owned(), "org/tiny".to_owned()],
            root: "/models/tiny".to_owned(),
            created: 1_700_000_000,
        };
        let state = Arc::new(Gateway::new(
            Arc::clone(&engine) as Arc<dyn gateway::engine::Engine>,
            served,
            text,
            limits,
            Arc::clone(&metrics),
            7,
            "test".to_owned(),
        ));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(serve(listener, state, async {
            let _ = stopped.await;
        }));
        Self { address, engine, metrics, task, stop: Some(stop) }
    }

    /// Asks for shutdown.
    pub(crate) fn stop(&mut self) {
        drop(self.stop.take());
    }

    pub(crate) async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Waits for the first event of a stream, whose connection stays open. Also returns what has
    /// come of it.
    pub(crate) async fn open_stream(&self, request: &[u8]) -> (TcpStream, Vec<u8>) {
        let mut stream = self.connect().await;
        stream.write_all(request).await.unwrap();
        let mut seen = Vec::new();
        let mut buf = [0; 1024];
        while !String::from_utf8_lossy(&seen).contains("data: ") {
            let n = stream.read(&mut buf).await.unwrap();
            assert!(n > 0, "{}", String::from_utf8_lossy(&seen));
            seen.extend_from_slice(&buf[..n]);
        }
        (stream, seen)
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        client::send(
            self.address,
            format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes(),
        )
        .await
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> Reply {
        client::send(self.address, &client::post(path, body.as_bytes(), "")).await
    }

    /// A request that must succeed, as JSON.
    pub(crate) async fn ok(&self, path: &str, body: serde_json::Value) -> serde_json::Value {
        let reply = self.post(path, &body.to_string()).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        reply.json()
    }

    /// The events of a stream that must succeed, without `[DONE]`.
    pub(crate) async fn stream(
        &self,
        path: &str,
        body: serde_json::Value,
    ) -> Vec<serde_json::Value> {
        let reply = self.post(path, &body.to_string()).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        let mut events = reply.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

pub(crate) fn limits() -> GatewayLimits {
    let second = std::time::Duration::from_secs(1);
    GatewayLimits {
        body_bytes: 1 << 20,
        header_read: 2 * second,
        body_idle: second / 2,
        body_total: 2 * second,
        keep_alive: second / 5,
        commit_after: second / 2,
        drain: 2 * second,
        ..GatewayLimits::default()
    }
}
