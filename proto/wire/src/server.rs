//! The worker's end: serves exactly one session, then ends.
//!
//! It does not execute anything. Invariant: a second session is refused while the process lives,
//! so two schedulers can never drive one worker.

use crate::{MAX_MESSAGE_BYTES, Malformed, pb};
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Mutex;
use std::task::{Context, Poll};
use std::time::Duration;
use step::{ToScheduler, ToWorker};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::Stream;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, Streaming};

/// How long the last replies have to reach the scheduler after the session ended.
const FLUSH_GRACE: Duration = Duration::from_millis(500);

/// The session a scheduler opened.
#[derive(Debug)]
pub struct Incoming {
    /// Commands in execution order; ends when the scheduler goes away. A malformed command is the
    /// last item.
    pub commands: mpsc::UnboundedReceiver<Result<ToWorker, Malformed>>,
    /// Replies in order; dropping it ends the session and [`serve`].
    pub replies: mpsc::UnboundedSender<ToScheduler>,
}

/// Why a worker cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket cannot be bound.
    #[error("cannot listen on {socket}")]
    Bind {
        /// The socket's path.
        socket: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The transport failed.
    #[error("the worker's transport failed")]
    Transport(#[from] tonic::transport::Error),
}

/// Listens on `socket`, hands the first session to `on_session`, returns when it has ended.
///
/// # Errors
/// When the socket cannot be bound or the transport fails.
pub async fn serve(
    socket: &Path,
    on_session: impl FnOnce(Incoming) + Send + 'static,
) -> Result<(), ServeError> {
    let listener = UnixListener::bind(socket)
        .map_err(|source| ServeError::Bind { socket: socket.to_owned(), source })?;
    let (ended_in, ended) = oneshot::channel();
    let service = OneSession {
        first: Mutex::new(Some(First { on_session: Box::new(on_session), ended: ended_in })),
    };
    let service = pb::step_service_server::StepServiceServer::new(service)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let over = tokio::sync::Notify::new();
    let serving = tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async {
            // A dropped sender means the same: no session can be served any more.
            let _ = ended.await;
            over.notify_one();
        });
    // A scheduler that keeps its end open must not keep a finished worker alive.
    let grace = async {
        over.notified().await;
        tokio::time::sleep(FLUSH_GRACE).await;
    };
    tokio::select! {
        served = serving => served?,
        () = grace => {}
    }
    Ok(())
}

struct First {
    on_session: Box<dyn FnOnce(Incoming) + Send>,
    ended: oneshot::Sender<()>,
}

struct OneSession {
    first: Mutex<Option<First>>,
}

#[tonic::async_trait]
impl pb::step_service_server::StepService for OneSession {
    type SessionStream = Replies;

    async fn session(
        &self,
        request: Request<Streaming<pb::ToWorker>>,
    ) -> Result<Response<Replies>, Status> {
        let first = self.first.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let Some(First { on_session, ended }) = first else {
            return Err(Status::failed_precondition("this worker already has a scheduler"));
        };
        let mut stream = request.into_inner();
        let (commands_in, commands) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            // A transport error and an orderly end mean the same to a worker: nobody drives it.
            while let Ok(Some(message)) = stream.message().await {
                let command = ToWorker::try_from(message);
                let malformed = command.is_err();
                if commands_in.send(command).is_err() || malformed {
                    break;
                }
            }
        });
        let (replies, outgoing) = mpsc::unbounded_channel();
        on_session(Incoming { commands, replies });
        Ok(Response::new(Replies {
            outgoing: UnboundedReceiverStream::new(outgoing),
            ended: Some(ended),
        }))
    }
}

/// The reply stream; tells the server when it is over, by end or by drop.
struct Replies {
    outgoing: UnboundedReceiverStream<ToScheduler>,
    ended: Option<oneshot::Sender<()>>,
}

impl Stream for Replies {
    type Item = Result<pb::ToScheduler, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.outgoing).poll_next(cx).map(|next| next.map(|m| Ok(m.into())))
    }
}

impl Drop for Replies {
    fn drop(&mut self) {
        if let Some(ended) = self.ended.take() {
            let _ = ended.send(());
        }
    }
}
