//! One streamed completion, timed.

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// A client of one server.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    url: String,
    model: String,
}

/// Why a request did not produce a timeline.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server could not be reached or the connection broke.
    #[error("cannot talk to {url}")]
    Transport {
        /// The server.
        url: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// The server answered with an error, or sent one in the stream.
    #[error("the server answered {status}: {message}")]
    Refused {
        /// HTTP status; 200 where the error came in the stream.
        status: u16,
        /// The server's message.
        message: String,
    },
    /// The stream ended without a finish reason.
    #[error("the stream ended after {tokens} tokens without a finish reason")]
    CutOff {
        /// Tokens that had arrived.
        tokens: usize,
    },
}

/// When a stream is given up by the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamEnd {
    /// Read to the end.
    Whole,
    /// The connection is dropped after this many tokens.
    DropAfter(usize),
}

/// What arrived, when.
#[derive(Clone, Debug)]
pub struct Timeline {
    /// From sending to the first token.
    pub first: Duration,
    /// Between one token and the next.
    pub gaps: Vec<Duration>,
    /// From sending to the end.
    pub total: Duration,
    /// Token ids in order, as `return_token_ids` reports them; empty where the server does not.
    pub token_ids: Vec<u32>,
    /// Tokens that arrived, by events.
    pub tokens: usize,
    /// Whether the client itself gave the stream up.
    pub dropped: bool,
}

impl Client {
    /// A client of `url` for the server's `model`, or for its first when none is given.
    ///
    /// # Errors
    /// When the server cannot be reached or lists no model.
    pub async fn connect(url: &str, model: Option<String>) -> Result<Self, ClientError> {
        let mut client = Self {
            http: reqwest::Client::new(),
            url: url.trim_end_matches('/').to_owned(),
            model: String::new(),
        };
        client.model = match model {
            Some(model) => model,
            None => client.first_model().await?,
        };
        Ok(client)
    }

    /// The model requests name.
    #[must_use]
    pub fn model(&self) -> &str {
        &self.model
    }

    /// The body of a page of the server.
    ///
    /// # Errors
    /// When the server cannot be reached or answers with an error.
    pub async fn text(&self, path: &str) -> Result<String, ClientError> {
        let sent = self.http.get(format!("{}{path}", self.url)).send().await;
        let response = sent.map_err(|source| self.transport(source))?;
        let status = response.status();
        let text = response.text().await.map_err(|source| self.transport(source))?;
        if status.is_success() {
            return Ok(text);
        }
        Err(ClientError::Refused { status: status.as_u16(), message: text })
    }

    async fn first_model(&self) -> Result<String, ClientError> {
        let response = self
            .http
            .get(format!("{}/v1/models", self.url))
            .send()
            .await
            .map_err(|source| self.transport(source))?;
        let status = response.status().as_u16();
        let body: Value = response.json().await.map_err(|source| self.transport(source))?;
        body["data"][0]["id"]
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| ClientError::Refused { status, message: body.to_string() })
    }

    /// Streams one completion of `prompt` with exactly `output` tokens, greedy.
    ///
    /// # Errors
    /// When the server refuses, breaks off, or ends without a finish reason.
    pub async fn completion(
        &self,
        prompt: &[u32],
        output: u32,
        end: StreamEnd,
    ) -> Result<Timeline, ClientError> {
        let body = json!({
            "model": self.model, "prompt": prompt, "max_tokens": output, "temperature": 0,
            "ignore_eos": true, "stream": true, "return_token_ids": true,
        });
        let mut times = Times::start();
        let mut events = self.post("/v1/completions", &body).await?;
        let mut finished = false;
        while let Some(event) = events.next(self).await? {
            let choice = &event["choices"][0];
            if let Some(ids) = choice["token_ids"].as_array() {
                times.token_ids.extend(ids.iter().filter_map(Value::as_u64).map(|id| id as u32));
                times.tokens(ids.len());
            } else if choice["text"].as_str().is_some_and(|text| !text.is_empty()) {
                times.tokens(1);
            }
            finished |= choice["finish_reason"].is_string();
            if matches!(end, StreamEnd::DropAfter(limit) if times.count >= limit) {
                return Ok(times.done(true));
            }
        }
        if finished {
            Ok(times.done(false))
        } else {
            Err(ClientError::CutOff { tokens: times.count })
        }
    }

    /// Sends `body` and returns its server-sent events.
    ///
    /// # Errors
    /// When the server cannot be reached or answers with an error.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Events, ClientError> {
        let response = self
            .http
            .post(format!("{}{path}", self.url))
            .json(body)
            .send()
            .await
            .map_err(|source| self.transport(source))?;
        let status = response.status();
        if !status.is_success() {
            let text = response.text().await.unwrap_or_default();
            let parsed: Value = serde_json::from_str(&text).unwrap_or_default();
            let message = parsed["error"]["message"].as_str().map_or(text, str::to_owned);
            return Err(ClientError::Refused { status: status.as_u16(), message });
        }
        Ok(Events { chunks: response.bytes_stream().boxed(), buffer: Vec::new() })
    }

    fn transport(&self, source: reqwest::Error) -> ClientError {
        ClientError::Transport { url: self.url.clone(), source }
    }
}

/// The `data:` objects of a stream, up to `[DONE]`.
pub struct Events {
    chunks: BoxStream<'static, reqwest::Result<Bytes>>,
    buffer: Vec<u8>,
}

impl Events {
    /// The next object; nothing after `[DONE]` or the end of the body.
    ///
    /// # Errors
    /// When the connection breaks or the server reports an error in the stream.
    pub async fn next(&mut self, client: &Client) -> Result<Option<Value>, ClientError> {
        loop {
            while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let Some(data) = line.strip_prefix(b"data:") else { continue };
                let data = data.trim_ascii();
                if data == b"[DONE]" {
                    return Ok(None);
                }
                let event: Value = serde_json::from_slice(data).unwrap_or_default();
                if let Some(message) = event["error"]["message"].as_str() {
                    return Err(ClientError::Refused { status: 200, message: message.to_owned() });
                }
                return Ok(Some(event));
            }
            match self.chunks.next().await {
                Some(chunk) => {
                    let chunk = chunk.map_err(|source| client.transport(source))?;
                    self.buffer.extend_from_slice(&chunk);
                }
                None => return Ok(None),
            }
        }
    }
}

/// Collects arrival times.
struct Times {
    started: Instant,
    last: Instant,
    first: Option<Duration>,
    gaps: Vec<Duration>,
    token_ids: Vec<u32>,
    count: usize,
}

impl Times {
    fn start() -> Self {
        let now = Instant::now();
        Self {
            started: now,
            last: now,
            first: None,
            gaps: Vec::new(),
            token_ids: Vec::new(),
            count: 0,
        }
    }

    /// `n` tokens arrived together: one gap, then none between them.
    fn tokens(&mut self, n: usize) {
        let now = Instant::now();
        for i in 0..n {
            match self.first {
                None => self.first = Some(now - self.started),
                Some(_) if i == 0 => self.gaps.push(now - self.last),
                Some(_) => self.gaps.push(Duration::ZERO),
            }
        }
        if n > 0 {
            self.last = now;
        }
        self.count += n;
    }

    fn done(self, dropped: bool) -> Timeline {
        let total = self.started.elapsed();
        Timeline {
            first: self.first.unwrap_or(total),
            gaps: self.gaps,
            total,
            token_ids: self.token_ids,
            tokens: self.count,
            dropped,
        }
    }
}
