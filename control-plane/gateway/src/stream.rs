//! Replies as server-sent events.
//!
//! One task per stream moves deltas into a bounded channel that is the reply's body. It ends when
//! the choices end, when one fails (an in-band error, and no finish reason), or when the body is
//! dropped because the client went away; then its choices are dropped, which aborts them. Status
//! 200 is not committed before the first result, so that early failures keep their own status,
//! unless that takes long.

use crate::choice::{Choice, Delta};
use crate::engine::GenerationError;
use crate::error::ApiError;
use crate::generate::Reply;
use crate::limits::STREAM_FRAMES;
use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue};
use axum::response::Response;
use bytes::Bytes;
use futures::stream::{SelectAll, Stream, StreamExt};
use serde::Serialize;
use std::convert::Infallible;
use std::pin::Pin;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

/// Turns deltas into chunks of one door's shape.
pub(crate) trait Chunks: Send + 'static {
    /// What the chunks are about.
    fn reply(&self) -> &Reply;
    /// Writes what is new; nothing where that says nothing.
    fn delta(&mut self, delta: Delta, frame: &mut Frame);
    /// Writes the last chunk, which has no choices.
    fn usage(&mut self, frame: &mut Frame);
}

/// Events under construction, sent together.
#[derive(Default)]
pub(crate) struct Frame(Vec<u8>);

impl Frame {
    /// Adds an event.
    pub(crate) fn data(&mut self, json: &impl Serialize) {
        self.0.extend_from_slice(b"data: ");
        serde_json::to_writer(&mut self.0, json).expect("replies serialise to memory");
        self.0.extend_from_slice(b"\n\n");
    }

    fn raw(text: &str) -> Bytes {
        Bytes::copy_from_slice(text.as_bytes())
    }
}

type Deltas = SelectAll<Pin<Box<dyn Stream<Item = Result<Delta, GenerationError>> + Send>>>;

/// All choices' deltas as they come.
fn merge(choices: Vec<Choice>) -> Deltas {
    let streams = choices.into_iter().map(|choice| {
        let deltas = futures::stream::unfold(Some(choice), |choice| async {
            let mut choice = choice?;
            match choice.next().await {
                Ok(None) => None,
                Ok(Some(delta)) => Some((Ok(delta), Some(choice))),
                Err(error) => Some((Err(error), None)),
            }
        });
        deltas.boxed()
    });
    futures::stream::select_all(streams)
}

/// Starts the stream.
///
/// # Errors
/// A failure before the first result.
pub(crate) async fn respond(
    choices: Vec<Choice>,
    chunks: impl Chunks,
) -> Result<Response, ApiError> {
    let limits = chunks.reply().gateway.limits.clone();
    let mut deltas = merge(choices);
    let first = match timeout(limits.commit_after, deltas.next()).await {
        Ok(Some(Err(error))) => return Err(error.into()),
        Ok(Some(Ok(delta))) => Some(delta),
        Ok(None) | Err(_) => None,
    };
    let (frames, receiver) = mpsc::channel::<Bytes>(STREAM_FRAMES);
    tokio::spawn(pump(deltas, first, chunks, frames, limits.keep_alive));
    let body = tokio_stream::wrappers::ReceiverStream::new(receiver).map(Ok::<_, Infallible>);
    let mut response = Response::new(Body::from_stream(body));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Tells proxies of the nginx family not to collect chunks.
    let buffering = HeaderName::from_static("x-accel-buffering");
    headers.insert(buffering, HeaderValue::from_static("no"));
    Ok(response)
}

async fn pump(
    mut deltas: Deltas,
    first: Option<Delta>,
    mut chunks: impl Chunks,
    frames: mpsc::Sender<Bytes>,
    keep_alive: std::time::Duration,
) {
    let mut next = first.map(Ok);
    loop {
        let event = match next.take() {
            Some(event) => Some(event),
            None => tokio::select! {
                event = deltas.next() => event,
                () = frames.closed() => return,
                () = sleep(keep_alive) => {
                    if frames.send(Frame::raw(": keep-alive\n\n")).await.is_err() {
                        return;
                    }
                    continue;
                }
            },
        };
        let mut frame = Frame::default();
        match event {
            Some(Ok(delta)) => chunks.delta(delta, &mut frame),
            Some(Err(error)) => {
                tracing::warn!(request_id = chunks.reply().id, %error, "a stream failed");
                let error = ApiError::from(error).to_json();
                let _ = frames.send(Frame::raw(&format!("data: {error}\n\n"))).await;
                return;
            }
            None => {
                let options = chunks.reply().checked.common.stream.unwrap_or_default();
                if options.include_usage {
                    chunks.usage(&mut frame);
                }
                frame.0.extend_from_slice(b"data: [DONE]\n\n");
                let _ = frames.send(frame.0.into()).await;
                return;
            }
        }
        // A client that is gone has dropped the receiver; dropping the choices aborts them.
        if !frame.0.is_empty() && frames.send(frame.0.into()).await.is_err() {
            return;
        }
    }
}
