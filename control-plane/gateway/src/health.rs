//! Probes, metrics and version: doors for those who run the server.

use crate::engine::Readiness;
use crate::error::ApiError;
use crate::state::AppState;
use axum::Json;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use serde_json::{Value, json};
use std::time::Duration;

/// When a probe is to ask again, where nothing better is known.
const PROBE_RETRY: Duration = Duration::from_secs(1);

/// The process answers. Says nothing about the engine.
pub(crate) async fn livez() -> &'static str {
    "ok\n"
}

/// Whether requests are served: 200, or 503 with the reason.
pub(crate) async fn readyz(State(gateway): State<AppState>) -> Result<Json<Value>, ApiError> {
    match gateway.readiness() {
        Readiness::Ready => Ok(Json(json!({ "status": "ready" }))),
        state => {
            let wait = state.back_in().unwrap_or(PROBE_RETRY);
            Err(ApiError::unavailable("not_ready", state.to_string(), wait))
        }
    }
}

/// Prometheus text.
pub(crate) async fn metrics(State(gateway): State<AppState>) -> impl IntoResponse {
    gateway.metrics.ready.set(i64::from(gateway.readiness() == Readiness::Ready));
    // A device may take milliseconds to say how it is.
    let render = move || gateway.metrics.render(gateway.vllm_metric_names);
    let text = tokio::task::spawn_blocking(render).await.unwrap_or_default();
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

/// Version and commit.
pub(crate) async fn version(State(gateway): State<AppState>) -> Json<Value> {
    Json(json!({ "version": gateway.version }))
}
