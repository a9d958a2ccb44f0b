//! How far a long job is: a trait for the jobs, and the two forms a person reads on stderr.
//!
//! No job waits for it, and it never writes to stdout. Invariant: `done` never passes `total`.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;

/// What a long job is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Files come from a hub.
    Download,
    /// Weights are read from the disk into the page cache.
    Read,
    /// Weights are brought to the type they are computed in.
    Convert,
    /// Random weights are made in memory.
    Generate,
    /// Random weights are made and written to files.
    Write,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Download => "downloading",
            Self::Read => "reading weights",
            Self::Convert => "converting weights",
            Self::Generate => "making random weights",
            Self::Write => "writing random weights",
        })
    }
}

/// Takes notice of how far a job is. Called from any thread, a few times per second and core.
pub trait Progress: Sync {
    /// `done` of `total` bytes of a stage are through.
    fn report(&self, stage: Stage, done: u64, total: u64);
}

/// Shows nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn report(&self, _: Stage, _: u64, _: u64) {}
}

/// A bar where stderr is a terminal, else a line of text for each tenth.
#[must_use]
pub fn on_stderr() -> Box<dyn Progress + Send> {
    if io::stderr().is_terminal() {
        Box::new(Bar::default())
    } else {
        Box::new(Lines::new(io::stderr()))
    }
}

/// One bar that is redrawn, for terminals.
#[derive(Debug, Default)]
struct Bar(Mutex<Option<(Stage, ProgressBar)>>);

impl Progress for Bar {
    fn report(&self, stage: Stage, done: u64, total: u64) {
        // A panic elsewhere leaves the bar usable: nothing in it can be half-done.
        let mut current = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if current.as_ref().is_none_or(|(of, bar)| *of != stage || bar.is_finished()) {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            bar.set_style(
                ProgressStyle::with_template(
                    "{msg:24} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
                )
                .expect("the template above is well formed"),
            );
            bar.set_message(stage.to_string());
            *current = Some((stage, bar));
        }
        if let Some((_, bar)) = current.as_ref() {
            bar.set_length(total);
            bar.set_position(done);
            if done >= total {
                bar.finish();
            }
        }
    }
}

/// A line for each tenth that is through, for logs.
#[derive(Debug)]
pub struct Lines<W>(Mutex<LinesState<W>>);

#[derive(Debug)]
struct LinesState<W> {
    out: W,
    last: Option<(Stage, u64)>,
}

impl<W: Write> Lines<W> {
    /// Writes the lines to `out`; an error in writing is no error of the job.
    pub fn new(out: W) -> Self {
        Self(Mutex::new(LinesState { out, last: None }))
    }
}

impl<W: Write + Send> Progress for Lines<W> {
    fn report(&self, stage: Stage, done: u64, total: u64) {
        let tenth =
            if total == 0 { 10 } else { (u128::from(done) * 10 / u128::from(total)) as u64 };
        let mut state = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // Threads may report out of order; a line is only ever news.
        if state.last.is_some_and(|(of, at)| of == stage && tenth <= at) {
            return;
        }
        state.last = Some((stage, tenth));
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let _ =
            writeln!(state.out, "{stage}: {}% ({} of {} MiB)", tenth * 10, mib(done), mib(total));
    }
}

/// Adds up what several threads have done and passes the sum on.
pub(crate) struct Tally<'a> {
    progress: &'a dyn Progress,
    stage: Stage,
    total: u64,
    done: Mutex<u64>,
}

impl<'a> Tally<'a> {
    pub(crate) fn new(progress: &'a dyn Progress, stage: Stage, total: u64) -> Self {
        progress.report(stage, 0, total);
        Self { progress, stage, total, done: Mutex::new(0) }
    }

    pub(crate) fn add(&self, bytes: u64) {
        let mut done = self.done.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *done = (*done + bytes).min(self.total);
        // Reported under the lock, so that what is shown never goes back.
        self.progress.report(self.stage, *done, self.total);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_once_per_tenth_and_never_go_back() {
        let lines = Lines::new(Vec::new());
        for done in [0, 1 << 20, 5 << 20, 52 << 19, 3 << 20, 50 << 20] {
            lines.report(Stage::Download, done, 50 << 20);
        }
        lines.report(Stage::Read, 0, 0);
        let text = lines.0.into_inner().map(|state| state.out).unwrap_or_default();
        assert_eq!(
            String::from_utf8_lossy(&text),
            "downloading: 0% (0 of 50 MiB)\ndownloading: 10% (5 of 50 MiB)\n\
             downloading: 50% (26 of 50 MiB)\ndownloading: 100% (50 of 50 MiB)\n\
             reading weights: 100% (0 of 0 MiB)\n"
        );
    }

    #[test]
    fn a_bar_follows_its_stage() {
        let bar = Bar::default();
        let state = |bar: &Bar| {
            let guard = bar.0.lock().expect("no thread panicked");
            guard.as_ref().map(|(stage, bar)| (*stage, bar.position(), bar.is_finished()))
        };
        bar.report(Stage::Download, 3, 10);
        assert_eq!(state(&bar), Some((Stage::Download, 3, false)));
        bar.report(Stage::Read, 10, 10);
        assert_eq!(state(&bar), Some((Stage::Read, 10, true)));
        bar.report(Stage::Read, 1, 5);
        assert_eq!(state(&bar), Some((Stage::Read, 1, false)));
    }

    #[test]
    fn a_tally_adds_up_over_threads() {
        struct Last(Mutex<(u64, u64)>);
        impl Progress for Last {
            fn report(&self, _: Stage, done: u64, total: u64) {
                let mut last = self.0.lock().expect("no thread panicked");
                assert!(done >= last.0 && done <= total);
                *last = (done, total);
            }
        }
        let last = Last(Mutex::new((0, 0)));
        let tally = Tally::new(&last, Stage::Write, 400);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..100).for_each(|_| tally.add(1)));
            }
        });
        assert_eq!(last.0.into_inner().expect("no thread panicked"), (400, 400));
    }
}
