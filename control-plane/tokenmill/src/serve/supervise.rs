//! Keeps one worker process alive: starts it, opens its session, forwards what it says, restarts
//! it when it dies.
//!
//! It does not understand steps and holds no request. Invariants: the driver hears `Up` before and
//! `Down` after everything else of a life; at most one worker process exists at a time; the child
//! dies with this process (it watches its standard input).

use super::driver::{Inbox, Message};
use super::startup::Startup;
use super::worker_config::WorkerConfig;
use anyhow::{Context, Result, anyhow};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};
use step::ToScheduler;
use telemetry::StartupPhase;
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};

/// First wait before a restart; doubles up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// Longest wait before a restart.
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// A life this long starts the backoff anew.
const HEALTHY_LIFE: Duration = Duration::from_secs(30);
/// How often a starting worker's socket is tried.
const CONNECT_RETRY: Duration = Duration::from_millis(10);
/// How long a worker process may take to listen (it listens before it loads anything).
const LISTEN_DEADLINE: Duration = Duration::from_secs(30);

/// Supervises the worker of one rank.
pub(crate) struct Supervisor {
    /// What the worker is to do.
    pub(crate) config: WorkerConfig,
    /// The program to start; this one, outside of tests.
    pub(crate) program: PathBuf,
    /// Where the scheduler's thread listens.
    pub(crate) inbox: Inbox,
    /// Hears how long a worker took to listen.
    pub(crate) startup: Arc<Startup>,
    /// Requests to kill the current process (a step past its deadline).
    pub(crate) kill: mpsc::Receiver<()>,
    /// Turns true when the server ends.
    pub(crate) stop: watch::Receiver<bool>,
}

/// How a life ended.
enum End {
    /// The server is stopping.
    Stopped,
    /// The worker is gone; whether it was ever ready, and why it ended.
    Died { was_ready: bool, reason: String },
}

impl Supervisor {
    /// Runs until the server stops.
    ///
    /// # Errors
    /// When the very first life ends before it was ready: then the cause is the configuration, and
    /// starting again would only repeat it.
    pub(crate) async fn run(mut self) -> Result<()> {
        let sockets = tempfile::Builder::new()
            .prefix("tokenmill-")
            .tempdir()
            .context("create a folder for the worker's socket; set TMPDIR to a writable folder")?;
        let mut backoff = BACKOFF_MIN;
        let mut ever_ready = false;
        for life in 0_u64.. {
            if life > 0 {
                self.config.heal();
            }
            let started = Instant::now();
            let socket = sockets.path().join(format!("worker-{life}.sock"));
            match self.live(socket).await? {
                End::Stopped => return Ok(()),
                End::Died { was_ready, reason } => {
                    ever_ready |= was_ready;
                    if !ever_ready {
                        return Err(anyhow!("the worker could not start: {reason}"));
                    }
                    tracing::error!(reason, life, "the worker died; restarting it");
                }
            }
            backoff = if started.elapsed() >= HEALTHY_LIFE {
                BACKOFF_MIN
            } else {
                (backoff * 2).min(BACKOFF_MAX)
            };
            tokio::select! {
                () = tokio::time::sleep(backoff) => {}
                _ = self.stop.wait_for(|stop| *stop) => return Ok(()),
            }
        }
        Ok(())
    }

    async fn live(&mut self, socket: PathBuf) -> Result<End> {
        let started = Instant::now();
        let mut child = self.start(&socket)?;
        let session = match self.open(&socket, &mut child).await {
            Ok(session) => session,
            Err(reason) => {
                end(&mut child).await;
                return Ok(End::Died { was_ready: false, reason });
            }
        };
        self.startup.took(StartupPhase::Worker, started.elapsed());
        // Kill requests meant for an earlier life are void.
        while self.kill.try_recv().is_ok() {}
        self.inbox.send(Message::WorkerUp(session.commands));
        let mut replies = session.replies;
        let mut was_ready = false;
        let mut reason: Option<String> = None;
        let stopped = loop {
            tokio::select! {
                reply = replies.recv() => match reply {
                    Some(Ok(ToScheduler::Fault(fault))) => reason = Some(fault),
                    Some(Ok(reply)) => {
                        was_ready |= matches!(reply, ToScheduler::Ready(_));
                        self.inbox.send(Message::Worker(reply));
                    }
                    Some(Err(error)) => {
                        reason.get_or_insert(error.to_string());
                        break false;
                    }
                    None => break false,
                },
                Some(()) = self.kill.recv() => {
                    reason = Some("a step passed its deadline; the process was killed".into());
                    break false;
                }
                _ = self.stop.wait_for(|stop| *stop) => break true,
            }
        };
        let status = end(&mut child).await;
        if stopped {
            return Ok(End::Stopped);
        }
        let reason = reason.map_or_else(|| status.clone(), |reason| format!("{reason} ({status})"));
        self.inbox.send(Message::WorkerDown(reason.clone()));
        Ok(End::Died { was_ready, reason })
    }

    fn start(&self, socket: &std::path::Path) -> Result<Child> {
        Command::new(&self.program)
            .arg("worker")
            .arg("--socket")
            .arg(socket)
            .arg("--config")
            .arg(serde_json::to_string(&self.config).context("encode the worker's configuration")?)
            // Held open for as long as this process lives; its end tells the worker to exit.
            .stdin(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start the worker process {}", self.program.display()))
    }

    async fn open(
        &mut self,
        socket: &std::path::Path,
        child: &mut Child,
    ) -> Result<wire::Session, String> {
        let deadline = Instant::now() + LISTEN_DEADLINE;
        loop {
            match wire::connect(socket).await {
                Ok(session) => return Ok(session),
                Err(refused @ wire::ConnectError::Refused(_)) => return Err(refused.to_string()),
                Err(wire::ConnectError::Unreachable { .. }) if Instant::now() < deadline => {}
                Err(unreachable) => return Err(unreachable.to_string()),
            }
            if let Ok(Some(status)) = child.try_wait() {
                return Err(format!("the process ended before it listened ({status})"));
            }
            tokio::time::sleep(CONNECT_RETRY).await;
        }
    }
}

/// Kills the process if it still runs; says how it ended.
async fn end(child: &mut Child) -> String {
    // A worker that faulted is exiting by itself; its own status says more than our signal.
    let exited = tokio::time::timeout(Duration::from_millis(200), child.wait()).await;
    let status = match exited {
        Ok(status) => status,
        Err(_) => {
            let _ = child.start_kill();
            child.wait().await
        }
    };
    status.map_or_else(|error| format!("its status is unknown: {error}"), |s| s.to_string())
}
