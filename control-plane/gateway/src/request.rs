//! What is done with every request: ids, counting, panics, and where the checking runs.

use crate::error::ApiError;
use crate::limits::{INLINE_BODY_BYTES, MAX_REQUEST_ID_BYTES};
use crate::state::{AppState, Gateway};
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::FutureExt;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use telemetry::{Door, RefusedBy, StatusClass};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout-ms");

/// The server's own name of a request. Clients cannot choose it.
#[derive(Clone, Debug)]
pub(crate) struct RequestContext {
    /// Unique over this server's life.
    pub(crate) id: String,
    /// The client's own name for it.
    pub(crate) client_id: Option<String>,
    pub(crate) door: &'static str,
    /// When its header had been read.
    pub(crate) received: Instant,
    /// Its line in the book, once it has one.
    pub(crate) line: Arc<OnceLock<u64>>,
}

/// Wraps every door.
pub(crate) async fn around(
    State(gateway): State<AppState>,
    mut request: Request<Body>,
    next: Next,
) -> Response {
    let received = Instant::now();
    let door = door(request.uri().path());
    let id = gateway.draw_id();
    let echoed = client_id(request.headers());
    let line = Arc::new(OnceLock::new());
    request.extensions_mut().insert(RequestContext {
        id: id.clone(),
        client_id: echoed.as_ref().and_then(|id| Some(id.to_str().ok()?.to_owned())),
        door: door.as_str(),
        received,
        line: Arc::clone(&line),
    });
    let mut response =
        AssertUnwindSafe(next.run(request)).catch_unwind().await.unwrap_or_else(|_| {
            tracing::error!(request_id = id, door = door.as_str(), "a request's handler panicked");
            let message = "an internal error; the server goes on";
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
                .into_response()
        });
    let id = HeaderValue::from_str(&id).expect("hexadecimal is a valid header");
    response.headers_mut().insert(REQUEST_ID, echoed.unwrap_or(id));
    let class = StatusClass::of(response.status().as_u16());
    gateway.metrics.replies(door, class).inc();
    match line.get() {
        Some(line) => {
            let noted = |body| Body::new(NotedBody { body, line: *line, gateway });
            response.map(noted)
        }
        None => response,
    }
}

/// A reply's body that notes when it is over: sent to its end, or given up.
struct NotedBody {
    body: Body,
    line: u64,
    gateway: AppState,
}

impl Drop for NotedBody {
    fn drop(&mut self) {
        self.gateway.book.replied(self.line);
    }
}

impl HttpBody for NotedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The label of a path. Unknown paths share one, so clients cannot make labels.
fn door(path: &str) -> Door {
    match path {
        "/v1/completions" => Door::Completions,
        "/v1/chat/completions" => Door::Chat,
        "/v1/models" => Door::Models,
        "/tokenize" => Door::Tokenize,
        "/detokenize" => Door::Detokenize,
        "/livez" | "/readyz" | "/health" | "/metrics" | "/version" => Door::Operations,
        path if path.starts_with("/admin/") => Door::Operations,
        path if path.starts_with("/v1/models/") => Door::Models,
        _ => Door::Other,
    }
}

/// The client's own id, if it is one that can be echoed and logged safely.
fn client_id(headers: &HeaderMap) -> Option<HeaderValue> {
    let value = headers.get(REQUEST_ID)?;
    let plain = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':');
    let bytes = value.as_bytes();
    let fits = (1..=MAX_REQUEST_ID_BYTES).contains(&bytes.len());
    (fits && bytes.iter().all(plain)).then(|| value.clone())
}

/// How long the client is willing to wait.
///
/// # Errors
/// When the header is no positive number of milliseconds.
pub(crate) fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, ApiError> {
    let Some(value) = headers.get(TIMEOUT) else { return Ok(None) };
    let millis = value.to_str().ok().and_then(|text| text.parse::<u64>().ok());
    match millis {
        Some(millis) if millis > 0 => Ok(Some(Duration::from_millis(millis))),
        _ => {
            let message = "x-request-timeout-ms must be a positive number of milliseconds";
            Err(ApiError::invalid(TIMEOUT.as_str().to_owned(), message))
        }
    }
}

/// Runs a check on a body: at once for a small one, on a thread for blocking work for a large one,
/// so that tokenising a book holds up no other connection.
///
/// # Errors
/// What the check says.
pub(crate) async fn check<T: Send + 'static>(
    gateway: &AppState,
    body: Bytes,
    check: fn(&[u8], &Gateway) -> Result<T, ApiError>,
) -> Result<T, ApiError> {
    let result = if body.len() <= INLINE_BODY_BYTES {
        check(&body, gateway)
    } else {
        let gateway = AppState::clone(gateway);
        let task = tokio::task::spawn_blocking(move || check(&body, &gateway));
        task.await.unwrap_or_else(|error| {
            tracing::error!(%error, "checking a request panicked");
            let message = "an internal error; the server goes on";
            Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message))
        })
    };
    if result.is_err() {
        gateway.metrics.refused(RefusedBy::Validation).inc();
    }
    result
}
