//! How long the parts of a start took.
//!
//! Invariant: every part is told once.

use std::time::{Duration, Instant};
use step::StartPhase;

/// A clock that is read at the end of each part.
#[derive(Debug)]
pub(crate) struct Phases {
    since: Instant,
    ended: Vec<(StartPhase, Duration)>,
}

impl Phases {
    pub(crate) fn begin() -> Self {
        Self { since: Instant::now(), ended: Vec::new() }
    }

    /// What passed since the last end belongs to no part.
    pub(crate) fn restart(&mut self) {
        self.since = Instant::now();
    }

    /// What passed since the last end was this part.
    pub(crate) fn end(&mut self, phase: StartPhase) {
        let now = Instant::now();
        self.ended.push((phase, now - self.since));
        self.since = now;
    }

    pub(crate) fn take(&mut self) -> Vec<(StartPhase, Duration)> {
        std::mem::take(&mut self.ended)
    }
}
