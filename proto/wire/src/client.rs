//! The control plane's end: opens the one session of a worker's life.
//!
//! It does not start, watch or restart workers. Invariant: after `replies` yields an error or
//! ends, the worker's life is over and nothing sent to `commands` arrives.

use crate::{MAX_MESSAGE_BYTES, Malformed, pb};
use hyper_util::rt::TokioIo;
use std::io;
use std::path::{Path, PathBuf};
use step::{ToScheduler, ToWorker};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Endpoint, Uri};
use tower::service_fn;

/// An open session with one worker.
#[derive(Debug)]
pub struct Session {
    /// Commands in execution order. Unbounded in type, bounded by the scheduler: run-ahead depth
    /// limits steps, admission limits uploads.
    pub commands: mpsc::UnboundedSender<ToWorker>,
    /// What the worker says; the last item is the error that ended the stream, if one did.
    pub replies: mpsc::UnboundedReceiver<Result<ToScheduler, SessionError>>,
}

/// Why no session could be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody accepts on the socket (yet).
    #[error("cannot reach the worker at {socket}")]
    Unreachable {
        /// The socket's path.
        socket: PathBuf,
        /// The transport's reason.
        #[source]
        source: tonic::transport::Error,
    },
    /// The worker refused; it already has a session, or speaks another protocol.
    #[error("the worker refused the session: {0}")]
    Refused(String),
}

/// Why a session ended early.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The stream broke: the worker died or closed it.
    #[error("the worker's stream broke: {0}")]
    Broken(String),
    /// The worker sent something that does not convert.
    #[error("the worker sent a malformed message")]
    Malformed(#[from] Malformed),
}

/// Opens the session of the worker that serves `socket`.
///
/// # Errors
/// [`ConnectError::Unreachable`] until the worker listens; callers retry while the process lives.
pub async fn connect(socket: &Path) -> Result<Session, ConnectError> {
    let path = socket.to_owned();
    // The URI only satisfies the transport; the connector goes to the socket.
    let channel = Endpoint::from_static("http://worker.invalid")
        .connect_with_connector(service_fn(move |_: Uri| {
            let path = path.clone();
            async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
        }))
        .await
        .map_err(|source| ConnectError::Unreachable { socket: socket.to_owned(), source })?;
    let mut client = pb::step_service_client::StepServiceClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);

    let (commands, outgoing) = mpsc::unbounded_channel::<ToWorker>();
    let outgoing = UnboundedReceiverStream::new(outgoing).map(pb::ToWorker::from);
    let mut incoming = client
        .session(outgoing)
        .await
        .map_err(|status| ConnectError::Refused(status.message().to_owned()))?
        .into_inner();

    let (replies_in, replies) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let reply = match incoming.message().await {
                Ok(Some(message)) => ToScheduler::try_from(message).map_err(SessionError::from),
                Ok(None) => break,
                Err(status) => Err(SessionError::Broken(status.message().to_owned())),
            };
            let ended = reply.is_err();
            if replies_in.send(reply).is_err() || ended {
                break;
            }
        }
    });
    Ok(Session { commands, replies })
}
