//! Keeps one worker group alive: starts a process for each rank, opens their sessions, forwards what they
//! say, and when one of them ends, ends all and starts anew.
//!
//! It does not understand steps and holds no request. Invariants: the driver hears `GroupUp` before and
//! `GroupDown` after everything else of a life; at most one process of a rank exists at a time, and none of
//! an earlier life beside one of a later; children die with this process (they watch their standard input).

use super::driver::{Inbox, Message};
use super::life::Progress;
use super::member::{Member, Reply};
use super::startup::Startup;
use super::worker_config::WorkerConfig;
use anyhow::{Context, Result, anyhow};
use engine::collectives::{DEFAULT_STAGE, SharedRegion};
use ids::Rank;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use step::{Mesh, ToScheduler};
use telemetry::StartupPhase;
use tokio::sync::{mpsc, watch};

/// First wait before a restart; doubles up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// Longest wait before a restart.
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// A life this long starts the backoff anew.
const HEALTHY_LIFE: Duration = Duration::from_secs(30);
/// A folder in memory, where the system has one.
const MEMORY: &str = "/dev/shm";
/// How long ranks that live have to say why they end, or to end, once the first is gone.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// Supervises the workers of a group.
pub(crate) struct Supervisor {
    /// The ranks.
    pub(crate) mesh: Mesh,
    /// What each worker is to do; its rank is put in.
    pub(crate) config: WorkerConfig,
    /// The program to start; this one, outside of tests.
    pub(crate) program: PathBuf,
    /// What stands behind a socket's path where workers are dialled; nothing, outside of tests.
    pub(crate) dial_suffix: String,
    /// Where the scheduler's thread listens.
    pub(crate) inbox: Inbox,
    /// Hears when groups are started.
    pub(crate) progress: Arc<Progress>,
    /// Hears how long workers took to listen.
    pub(crate) startup: Arc<Startup>,
    /// Requests to kill the present group (a step past its deadline, ranks that disagree), and why.
    pub(crate) kill: mpsc::Receiver<String>,
    /// Turns true when the server ends.
    pub(crate) stop: watch::Receiver<bool>,
}

/// How a life ended.
enum End {
    /// The server is stopping.
    Stopped,
    /// The group is gone; whether it was ever ready, and why it ended.
    Died { was_ready: bool, reason: String },
}

/// Why a life is over, while its processes may still live.
enum Over {
    Stopped,
    /// A rank said why, or its stream ended.
    Rank(Rank, Option<String>),
    /// It was to be killed.
    Killed(String),
}

impl Supervisor {
    /// Runs until the server stops.
    ///
    /// # Errors
    /// When the very first life ends before it was ready: then the cause is the configuration, and
    /// starting again would only repeat it.
    pub(crate) async fn run(mut self) -> Result<()> {
        let folder = |at: &Path| tempfile::Builder::new().prefix("tokenmill-").tempdir_in(at);
        let sockets = folder(&std::env::temp_dir())
            .context("create a folder for the workers' sockets; set TMPDIR to a writable folder")?;
        // What ranks exchange should not go to a disk. Nobody promises that this folder is there.
        let several = self.mesh != Mesh::SINGLE && self.config.has_model();
        let meetings = several.then(|| folder(Path::new(MEMORY)).ok()).flatten();
        let meetings = meetings.as_ref().unwrap_or(&sockets).path();
        let mut backoff = BACKOFF_MIN;
        let mut ever_ready = false;
        for life in 0_u64.. {
            if life > 0 {
                self.config.heal();
            }
            let started = Instant::now();
            match self.live((sockets.path(), meetings), life).await? {
                End::Stopped => return Ok(()),
                End::Died { was_ready, reason } => {
                    ever_ready |= was_ready;
                    if !ever_ready {
                        return Err(anyhow!("the worker could not start: {reason}"));
                    }
                    tracing::error!(reason, life, "the workers died; restarting them");
                }
            }
            backoff = if started.elapsed() >= HEALTHY_LIFE {
                BACKOFF_MIN
            } else {
                (backoff * 2).min(BACKOFF_MAX)
            };
            self.progress.starts_in(backoff);
            tokio::select! {
                () = tokio::time::sleep(backoff) => {}
                _ = self.stop.wait_for(|stop| *stop) => return Ok(()),
            }
        }
        Ok(())
    }

    async fn live(&mut self, (sockets, meetings): (&Path, &Path), life: u64) -> Result<End> {
        let started = Instant::now();
        let meeting = self.meeting(meetings, life)?;
        let mut members = Vec::new();
        for rank in self.mesh.ranks() {
            let socket = sockets.join(format!("worker-{life}-{rank}.sock"));
            let config = self.config.of_rank(rank, meeting.as_ref().map(SharedRegion::path));
            members.push(Member::start(&self.program, rank, &socket, &config)?);
        }
        let (replies_in, mut replies) = mpsc::unbounded_channel();
        let mut sessions = Vec::new();
        for member in &mut members {
            match member.open(&self.dial_suffix, replies_in.clone()).await {
                Ok(commands) => sessions.push(commands),
                Err(reason) => {
                    let reason = self.of_rank(member.rank, &reason);
                    end(&mut members, Duration::ZERO).await;
                    return Ok(End::Died { was_ready: false, reason });
                }
            }
        }
        drop(replies_in);
        self.startup.took(StartupPhase::Worker, started.elapsed());
        // Kill requests meant for an earlier life are void.
        while self.kill.try_recv().is_ok() {}
        self.inbox.send(Message::GroupUp(sessions));
        let mut was_ready = false;
        let over = loop {
            tokio::select! {
                reply = replies.recv() => match reply {
                    Some((rank, Ok(ToScheduler::Fault(fault)))) => {
                        break Over::Rank(rank, Some(fault));
                    }
                    Some((rank, Ok(reply))) => {
                        if let ToScheduler::Ready(_) = reply {
                            was_ready = true;
                            meeting.iter().for_each(|meeting| hide(meeting, self.mesh));
                        }
                        self.inbox.send(Message::Worker(rank, reply));
                    }
                    Some((rank, Err(error))) => break Over::Rank(rank, error),
                    // Each stream ends with an error before.
                    None => break Over::Killed("no worker is left".to_owned()),
                },
                Some(why) = self.kill.recv() => break Over::Killed(why),
                _ = self.stop.wait_for(|stop| *stop) => break Over::Stopped,
            }
        };
        let reason = match over {
            Over::Stopped => {
                end(&mut members, LAST_WORDS).await;
                return Ok(End::Stopped);
            }
            // Who hangs or disagrees has nothing to say, and the others wait for it.
            Over::Killed(why) => {
                stop(meeting.as_ref(), &why);
                end(&mut members, Duration::ZERO).await;
                format!("{why}; all ranks were killed")
            }
            Over::Rank(first, said) => {
                stop(meeting.as_ref(), &format!("rank {first} ended"));
                let mut said = BTreeMap::from([(first, said)]);
                let until = Instant::now() + LAST_WORDS;
                hear_out(&mut replies, &mut said, until).await;
                let statuses =
                    end(&mut members, until.saturating_duration_since(Instant::now())).await;
                self.account(first, &said, &statuses)
            }
        };
        self.inbox.send(Message::GroupDown);
        Ok(End::Died { was_ready, reason })
    }

    /// Where the ranks of a model meet in this life; nowhere where there is one rank, or no model.
    fn meeting(&self, folder: &Path, life: u64) -> Result<Option<SharedRegion>> {
        if self.mesh == Mesh::SINGLE || !self.config.has_model() {
            return Ok(None);
        }
        let ranks = self.mesh.ranks().count();
        let path = folder.join(format!("meeting-{life}"));
        let region = SharedRegion::create(&path, ranks, DEFAULT_STAGE).with_context(|| {
            format!("make memory that {ranks} ranks share in {}", path.display())
        })?;
        Ok(Some(region))
    }

    /// Why a group ended: what the first rank to go said and how it ended, then what others said, each
    /// thing once.
    fn account(
        &self,
        first: Rank,
        said: &BTreeMap<Rank, Option<String>>,
        statuses: &BTreeMap<Rank, String>,
    ) -> String {
        let status = statuses.get(&first).map_or("its status is unknown", String::as_str);
        let words = said.get(&first).and_then(Option::as_ref);
        let text = words.map_or_else(|| status.to_owned(), |words| format!("{words} ({status})"));
        let mut all = self.of_rank(first, &text);
        let mut others: BTreeMap<&str, Vec<Rank>> = BTreeMap::new();
        for (rank, theirs) in said.iter().filter(|(_, theirs)| theirs.as_ref() != words) {
            others.entry(theirs.as_deref().unwrap_or_default()).or_default().push(*rank);
        }
        for (theirs, ranks) in others.iter().filter(|(theirs, _)| !theirs.is_empty()) {
            let names: Vec<String> = ranks.iter().map(|rank| format!("rank {rank}")).collect();
            all = format!("{all}; {}: {theirs}", names.join(", "));
        }
        all
    }

    /// Names the rank where there are several.
    fn of_rank(&self, rank: Rank, text: &str) -> String {
        if self.mesh == Mesh::SINGLE { text.to_owned() } else { format!("rank {rank}: {text}") }
    }
}

/// Takes away the name of memory that every rank has found, so that no end of this process leaves it.
fn hide(meeting: &SharedRegion, mesh: Mesh) {
    if meeting.joined().len() == mesh.ranks().count() {
        let _ = std::fs::remove_file(meeting.path());
    }
}

/// Wakes ranks that wait for each other; they end with an error that says why.
fn stop(meeting: Option<&SharedRegion>, why: &str) {
    if let Some(meeting) = meeting {
        meeting.abort(why);
    }
}

/// What the other ranks say until all streams have ended, but not for long. Outcomes among it are void.
async fn hear_out(
    replies: &mut mpsc::UnboundedReceiver<Reply>,
    said: &mut BTreeMap<Rank, Option<String>>,
    until: Instant,
) {
    let patience = tokio::time::sleep_until(until.into());
    tokio::pin!(patience);
    loop {
        let reply = tokio::select! {
            reply = replies.recv() => reply,
            () = &mut patience => return,
        };
        match reply {
            Some((rank, Ok(ToScheduler::Fault(fault)))) => {
                let words = said.entry(rank).or_default();
                words.get_or_insert(fault);
            }
            Some((rank, Err(words))) => {
                said.entry(rank).or_insert(words);
            }
            Some(_) => {}
            None => return,
        }
    }
}

/// Ends every process, those that do not end by themselves by force; how each ended.
async fn end(members: &mut [Member], patience: Duration) -> BTreeMap<Rank, String> {
    let deadline = Instant::now() + patience;
    let mut statuses = BTreeMap::new();
    for member in members.iter_mut() {
        let left = deadline.saturating_duration_since(Instant::now());
        if !member.ended_within(left).await {
            // The rest has no more time than this one had.
            member.kill();
        }
    }
    for member in members {
        statuses.insert(member.rank, member.status().await);
    }
    statuses
}
