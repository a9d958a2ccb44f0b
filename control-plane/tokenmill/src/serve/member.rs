//! One worker process of a group: started, listened to, ended.
//!
//! It knows nothing of the others. Invariant: a stream's last item is an error, with what there is to say
//! about its end; the process is gone when its status was taken.

use super::worker_config::WorkerConfig;
use anyhow::{Context, Result};
use ids::Rank;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use step::{ToScheduler, ToWorker};
use tokio::process::{Child, Command};
use tokio::sync::mpsc::UnboundedSender;

/// How often a starting worker's socket is tried.
const CONNECT_RETRY: Duration = Duration::from_millis(10);
/// How long a worker process may take to listen (it listens before it loads anything).
const LISTEN_DEADLINE: Duration = Duration::from_secs(30);

/// What a rank said; after an error nothing more comes.
pub(crate) type Reply = (Rank, Result<ToScheduler, Option<String>>);

/// A process.
pub(crate) struct Member {
    pub(crate) rank: Rank,
    socket: PathBuf,
    child: Child,
}

impl Member {
    /// Starts `program` as the worker of a rank.
    pub(crate) fn start(
        program: &Path,
        rank: Rank,
        socket: &Path,
        config: &WorkerConfig,
    ) -> Result<Self> {
        let child = Command::new(program)
            .arg("worker")
            .arg("--socket")
            .arg(socket)
            .arg("--config")
            .arg(serde_json::to_string(config).context("encode the worker's configuration")?)
            // Held open for as long as this process lives; its end tells the worker to exit.
            .stdin(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start the worker process {}", program.display()))?;
        Ok(Self { rank, socket: socket.to_owned(), child })
    }

    /// Opens the session at the socket's path with `suffix` behind it; what the rank says goes to `replies`.
    pub(crate) async fn open(
        &mut self,
        suffix: &str,
        replies: UnboundedSender<Reply>,
    ) -> Result<UnboundedSender<ToWorker>, String> {
        let wire::Session { commands, replies: mut said } = self.connect(suffix).await?;
        let rank = self.rank;
        tokio::spawn(async move {
            let mut end = None;
            while let Some(reply) = said.recv().await {
                match reply {
                    Ok(reply) => {
                        if replies.send((rank, Ok(reply))).is_err() {
                            return;
                        }
                    }
                    Err(error) => end = Some(error.to_string()),
                }
            }
            let _ = replies.send((rank, Err(end)));
        });
        Ok(commands)
    }

    async fn connect(&mut self, suffix: &str) -> Result<wire::Session, String> {
        let mut address = self.socket.clone().into_os_string();
        address.push(suffix);
        let address = PathBuf::from(address);
        let deadline = Instant::now() + LISTEN_DEADLINE;
        loop {
            // One that accepts and says nothing is as good as one that does not listen.
            let opening = tokio::time::timeout_at(deadline.into(), wire::connect(&address));
            let Ok(opened) = opening.await else {
                return Err(format!("no session was opened within {LISTEN_DEADLINE:?}"));
            };
            match opened {
                Ok(session) => return Ok(session),
                Err(refused @ wire::ConnectError::Refused(_)) => return Err(refused.to_string()),
                Err(wire::ConnectError::Unreachable { .. }) if Instant::now() < deadline => {}
                Err(unreachable) => return Err(unreachable.to_string()),
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(format!("the process ended before it listened ({status})"));
            }
            tokio::time::sleep(CONNECT_RETRY).await;
        }
    }

    /// Whether the process ends by itself in time: one that faulted is exiting, and its own status says
    /// more than a signal.
    pub(crate) async fn ended_within(&mut self, patience: Duration) -> bool {
        tokio::time::timeout(patience, self.child.wait()).await.is_ok()
    }

    /// Kills the process; it need not hear of it before.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.start_kill();
    }

    /// Waits for the end and says how it was.
    pub(crate) async fn status(&mut self) -> String {
        let status = self.child.wait().await;
        status.map_or_else(|error| format!("its status is unknown: {error}"), |s| s.to_string())
    }
}
