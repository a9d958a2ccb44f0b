//! Errors as clients see them: the OpenAI envelope, always with all four keys.
//!
//! Every refusal of every door is an [`ApiError`]. A failure that would repeat says so with
//! `x-should-retry: false`, because client libraries retry every 5xx; one that passes says when to
//! come back. Invariant: `code` is a string or null, never a number.

use crate::engine::{GenerationError, SubmitError};
use axum::body::Body;
use axum::http::header::{CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use axum::http::{Response, StatusCode};
use axum::response::IntoResponse;
use serde::Serialize;
use std::borrow::Cow;
use std::time::Duration;
use telemetry::RefusedBy;

/// The longest message sent; what a client sent is quoted, but not at any length.
const MAX_MESSAGE_BYTES: usize = 2_000;
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// A refused or failed request.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The HTTP status.
    pub status: StatusCode,
    /// What is wrong and what to do.
    pub message: String,
    /// The field at fault, as the client wrote it.
    pub param: Option<Cow<'static, str>>,
    /// A name that programs can compare.
    pub code: Option<&'static str>,
    /// When to try again.
    pub retry_after: Option<Duration>,
}

#[derive(Serialize)]
struct Envelope<'a> {
    error: Inner<'a>,
}

#[derive(Serialize)]
struct Inner<'a> {
    message: &'a str,
    r#type: &'static str,
    param: Option<&'a str>,
    code: Option<&'static str>,
}

impl ApiError {
    /// An error of this status.
    #[must_use]
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: Some(code), retry_after: None }
    }

    /// 400 for a field: its value is wrong.
    #[must_use]
    pub fn invalid(param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_value", message).with_param(param)
    }

    /// 400 for a field that this server does not support.
    #[must_use]
    pub fn unsupported(param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "unsupported_parameter", message).with_param(param)
    }

    /// 404 for a model that is not served.
    #[must_use]
    pub fn model_not_found(name: &str) -> Self {
        let message = format!("the model {name:?} does not exist here; see GET /v1/models");
        Self::new(StatusCode::NOT_FOUND, "model_not_found", message).with_param("model")
    }

    /// 503: shutting down or not yet up.
    #[must_use]
    pub fn unavailable(code: &'static str, message: impl Into<String>, wait: Duration) -> Self {
        let mut error = Self::new(StatusCode::SERVICE_UNAVAILABLE, code, message);
        error.retry_after = Some(wait);
        error
    }

    /// The same error, about this field.
    #[must_use]
    pub fn with_param(mut self, param: impl Into<Cow<'static, str>>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// The envelope, as in a reply's body or in a stream's `data:`.
    #[must_use]
    pub fn to_json(&self) -> String {
        let end = self.message.floor_char_boundary(MAX_MESSAGE_BYTES);
        let inner = Inner {
            message: &self.message[..end],
            r#type: if self.status.is_client_error() {
                "invalid_request_error"
            } else {
                "server_error"
            },
            param: self.param.as_deref(),
            code: self.code,
        };
        serde_json::to_string(&Envelope { error: inner }).expect("strings always serialise")
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.to_json()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        match self.retry_after {
            Some(wait) => {
                let seconds = wait.as_millis().div_ceil(1000).max(1);
                let seconds = u64::try_from(seconds).unwrap_or(u64::MAX);
                headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
            }
            None if self.status.is_server_error() => {
                headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
            }
            None => {}
        }
        response
    }
}

/// How long a client should wait for a server that starts, or stops.
const NOT_READY_RETRY: Duration = Duration::from_secs(2);

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::QueueFull { retry_after } => {
                Self::unavailable("queue_full", message, retry_after)
            }
            SubmitError::Shed { retry_after } => Self::unavailable("shed", message, retry_after),
            SubmitError::DeadlineUnreachable { retry_after, .. } => {
                Self::unavailable("deadline_unreachable", message, retry_after)
            }
            SubmitError::NotReady(state) => {
                let wait = state.back_in().unwrap_or(NOT_READY_RETRY);
                Self::unavailable("not_ready", message, wait)
            }
            SubmitError::TooLarge { .. } => {
                Self::new(StatusCode::BAD_REQUEST, "kv_cache_too_small", message)
            }
            SubmitError::TooLong { .. } => {
                Self::new(StatusCode::BAD_REQUEST, "context_length_exceeded", message)
            }
            SubmitError::EmptyPrompt => {
                Self::new(StatusCode::BAD_REQUEST, "invalid_value", message)
            }
        }
    }
}

impl SubmitError {
    /// The label under which it is counted.
    #[must_use]
    pub fn label(&self) -> RefusedBy {
        match self {
            Self::QueueFull { .. } => RefusedBy::QueueFull,
            Self::Shed { .. } => RefusedBy::Shed,
            Self::DeadlineUnreachable { .. } => RefusedBy::Deadline,
            Self::NotReady(_) => RefusedBy::NotReady,
            Self::TooLarge { .. } | Self::TooLong { .. } => RefusedBy::TooLarge,
            Self::EmptyPrompt => RefusedBy::Validation,
        }
    }
}

impl From<GenerationError> for ApiError {
    fn from(error: GenerationError) -> Self {
        let message = error.to_string();
        match error {
            GenerationError::Refused(refusal) => refusal.into(),
            GenerationError::DeadlineExceeded => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, "deadline_exceeded", message)
            }
            GenerationError::NothingAllowed => {
                Self::new(StatusCode::BAD_REQUEST, "nothing_allowed", message)
            }
            GenerationError::NotANumber => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "not_a_number", message)
            }
            // Another try would take as many groups down.
            GenerationError::WorkerLost => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "worker_lost", message)
            }
            GenerationError::ShuttingDown => {
                Self::unavailable("shutting_down", message, NOT_READY_RETRY)
            }
            GenerationError::Internal(_) => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_envelope_has_all_four_keys_and_a_bounded_message() {
        let error = ApiError::new(StatusCode::BAD_REQUEST, "x", "é".repeat(5_000));
        let json: serde_json::Value = serde_json::from_str(&error.to_json()).expect("JSON");
        let inner = json["error"].as_object().expect("an object");
        assert_eq!(inner.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
        assert!(inner["param"].is_null());
        assert_eq!(inner["message"].as_str().map(str::len), Some(MAX_MESSAGE_BYTES));
    }

    #[test]
    fn what_would_repeat_is_not_retried_and_what_passes_says_when() {
        let failed = ApiError::from(GenerationError::NotANumber).into_response();
        assert_eq!(failed.headers()["x-should-retry"], "false");
        let full = SubmitError::QueueFull { retry_after: Duration::from_millis(1500) };
        assert_eq!(ApiError::from(full).into_response().headers()["retry-after"], "2");
    }

    #[test]
    fn a_late_refusal_answers_as_an_early_one() {
        let wait = Duration::from_secs(3);
        let late = |error: SubmitError| ApiError::from(GenerationError::Refused(error));
        let full = late(SubmitError::QueueFull { retry_after: wait });
        assert_eq!((full.status, full.retry_after), (StatusCode::SERVICE_UNAVAILABLE, Some(wait)));
        assert_eq!(late(SubmitError::EmptyPrompt).status, StatusCode::BAD_REQUEST);
    }
}
