//! Reads a request's body: type, encoding, size and time are bounded before a byte is kept.

use crate::error::ApiError;
use crate::limits::GatewayLimits;
use axum::body::Body;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderMap, Request, StatusCode};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use tokio::time::{Instant, timeout_at};

/// The body of a JSON request.
///
/// # Errors
/// 415 for another type or a compressed body, 413 over the limit (by header alone, or as soon as
/// the bytes exceed it), 408 for a body that comes too slowly.
pub(crate) async fn read(
    request: Request<Body>,
    limits: &GatewayLimits,
) -> Result<Bytes, ApiError> {
    let (parts, mut body) = request.into_parts();
    check_headers(&parts.headers, limits)?;
    let end = Instant::now() + limits.body_total;
    let mut bytes = BytesMut::new();
    loop {
        let deadline = end.min(Instant::now() + limits.body_idle);
        let frame = match timeout_at(deadline, body.frame()).await {
            Err(_) => {
                return Err(ApiError::new(
                    StatusCode::REQUEST_TIMEOUT,
                    "body_timeout",
                    "the body arrived too slowly",
                ));
            }
            Ok(None) => return Ok(bytes.freeze()),
            Ok(Some(Err(_))) => {
                return Err(ApiError::new(
                    StatusCode::BAD_REQUEST,
                    "incomplete_body",
                    "the body ended before its announced length",
                ));
            }
            Ok(Some(Ok(frame))) => frame,
        };
        let Ok(data) = frame.into_data() else { continue };
        if data.len() > limits.body_bytes - bytes.len() {
            return Err(too_large(limits));
        }
        bytes.extend_from_slice(&data);
    }
}

fn check_headers(headers: &HeaderMap, limits: &GatewayLimits) -> Result<(), ApiError> {
    let unsupported = |message: &str| {
        ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message)
    };
    let header = |name| headers.get(name).map(|value| value.to_str().unwrap_or_default());
    if !header(CONTENT_TYPE).is_some_and(is_json) {
        return Err(unsupported("send the header Content-Type: application/json"));
    }
    if header(CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
        return Err(unsupported("compressed bodies are not taken; send the body as it is"));
    }
    let length = header(CONTENT_LENGTH).and_then(|length| length.parse::<u64>().ok());
    if length.is_some_and(|length| length > limits.body_bytes as u64) {
        return Err(too_large(limits));
    }
    Ok(())
}

fn is_json(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("application/json")
}

fn too_large(limits: &GatewayLimits) -> ApiError {
    let message = format!("the body is larger than {} bytes", limits.body_bytes);
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
}
