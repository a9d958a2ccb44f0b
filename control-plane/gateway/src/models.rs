//! `GET /v1/models` and `GET /v1/models/{id}`: what is served, under which names.

use crate::error::ApiError;
use crate::state::{AppState, Gateway};
use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;

#[derive(Serialize)]
pub(crate) struct ModelList {
    object: &'static str,
    data: Vec<ModelJson>,
}

#[derive(Serialize)]
pub(crate) struct ModelJson {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    parent: Option<()>,
    max_model_len: u32,
}

fn json(name: &str, gateway: &Gateway) -> ModelJson {
    ModelJson {
        id: name.to_owned(),
        object: "model",
        created: gateway.model.created,
        owned_by: "tokenmill",
        root: gateway.model.root.clone(),
        parent: None,
        max_model_len: gateway.engine.limits().max_context.0,
    }
}

/// All names of the model.
pub(crate) async fn list(State(gateway): State<AppState>) -> Json<ModelList> {
    let data = gateway.model.names.iter().map(|name| json(name, &gateway)).collect();
    Json(ModelList { object: "list", data })
}

/// One name, which may hold slashes.
pub(crate) async fn one(
    State(gateway): State<AppState>,
    Path(name): Path<String>,
) -> Result<Json<ModelJson>, ApiError> {
    let name = gateway.model_name(Some(name))?;
    Ok(Json(json(&name, &gateway)))
}
