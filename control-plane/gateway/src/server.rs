//! Routes, and the loop that serves connections.
//!
//! HTTP/1.0 and 1.1 only: nothing that talks to such servers needs HTTP/2 without TLS, and its
//! reset floods are not worth having. Connections are bounded; one that idles, sends its header
//! slowly or reads nothing is closed. Shutdown stops accepting, refuses new generations, lets
//! running replies end until the drain time is over, and then drops them, which aborts them.

use crate::admin::Peer;
use crate::error::ApiError;
use crate::limits::{MAX_HEADER_BYTES, MAX_HEADERS};
use crate::stall::StallGuard;
use crate::state::AppState;
use crate::{admin, chat, completions, health, models, request, tokenize};
use axum::Router;
use axum::http::{Method, Request, StatusCode, Uri};
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Pause after a failed `accept`: it fails again at once while the process is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// All doors.
pub fn router(state: AppState) -> Router {
    Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/livez", get(health::livez))
        .route("/readyz", get(health::readyz))
        .route("/health", get(health::readyz))
        .route("/metrics", get(health::metrics))
        .route("/version", get(health::version))
        .nest("/admin", admin(&state))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(from_fn_with_state(Arc::clone(&state), request::around))
        .with_state(state)
}

/// The doors below `/admin`, behind their guard; also the ones that are not there.
fn admin(state: &AppState) -> Router<AppState> {
    admin::routes()
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(from_fn_with_state(Arc::clone(state), admin::guard))
}

async fn not_found(uri: Uri) -> ApiError {
    let message = format!("there is nothing at {:?}", uri.path());
    ApiError::new(StatusCode::NOT_FOUND, "not_found", message)
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    let message = format!("{:?} does not take the method {:?}", uri.path(), method.as_str());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

/// Serves until `shutdown` completes and running replies have ended or the drain time is over.
///
/// # Errors
/// Never while serving: what goes wrong with a connection concerns that connection.
pub async fn serve(
    listener: TcpListener,
    state: AppState,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let mut shutdown = pin!(shutdown);
    let slots = Arc::new(Semaphore::new(state.limits.connections));
    let router = router(Arc::clone(&state));
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    loop {
        let slot = tokio::select! {
            slot = Arc::clone(&slots).acquire_owned() => slot.expect("the semaphore is never closed"),
            () = &mut shutdown => break,
        };
        let (stream, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a connection was not accepted");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
            () = &mut shutdown => break,
        };
        while connections.try_join_next().is_some() {}
        let connection = graceful.watch(connection(stream, peer, &router, &state));
        let metrics = Arc::clone(&state.metrics);
        connections.spawn(async move {
            metrics.connections.inc();
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended early");
            }
            metrics.connections.dec();
            drop(slot);
        });
    }
    drop(listener);
    state.drain();
    if timeout(state.limits.drain, graceful.shutdown()).await.is_err() {
        tracing::warn!(open = connections.len(), "the drain time is over; dropping what is left");
    }
    connections.shutdown().await;
    Ok(())
}

/// The connection as a future that serves its requests.
fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    router: &Router,
    state: &AppState,
) -> http1::Connection<TokioIo<StallGuard<TcpStream>>, Doors> {
    // Chunks of a stream are small and urgent.
    let _ = stream.set_nodelay(true);
    let limits = &state.limits;
    let stream = StallGuard::new(stream, limits.write_stall, Arc::clone(&state.metrics));
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_read)
        .max_buf_size(MAX_HEADER_BYTES)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), Doors { router: router.clone(), peer })
}

/// The doors as one connection sees them.
struct Doors {
    router: Router,
    peer: SocketAddr,
}

impl Service<Request<Incoming>> for Doors {
    type Response = <TowerToHyperService<Router> as Service<Request<Incoming>>>::Response;
    type Error = Infallible;
    type Future = <TowerToHyperService<Router> as Service<Request<Incoming>>>::Future;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        request.extensions_mut().insert(Peer(self.peer));
        TowerToHyperService::new(self.router.clone()).call(request)
    }
}
