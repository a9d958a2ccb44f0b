//! The first completion of a fresh server, printed as it streams.

use crate::out::{say, say_part};
use anyhow::{Context, Result};
use load::Client;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How long a server may take until it is ready.
const PATIENCE: Duration = Duration::from_secs(300);

/// A client, as soon as the server is ready.
pub(crate) async fn ready(url: &str) -> Result<Client> {
    let deadline = Instant::now() + PATIENCE;
    let http = reqwest::Client::new();
    loop {
        let answer = http.get(format!("{url}/readyz")).send().await;
        if answer.is_ok_and(|response| response.status().is_success()) {
            return Client::connect(url, None).await.context("list models");
        }
        anyhow::ensure!(Instant::now() < deadline, "not ready within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The request.
pub(crate) fn body(model: &str) -> Value {
    json!({
        "model": model, "prompt": "A server is a program that", "max_tokens": 48,
        "temperature": 0.7, "seed": 7, "stream": true,
    })
}

/// Prints the text as it comes.
pub(crate) async fn stream(client: &Client) -> Result<()> {
    let mut events = client.post("/v1/completions", &body(client.model())).await?;
    say_part!("A server is a program that")?;
    while let Some(event) = events.next(client).await? {
        if let Some(text) = event["choices"][0]["text"].as_str() {
            say_part!("{text}")?;
        }
    }
    say!("")?;
    Ok(())
}
