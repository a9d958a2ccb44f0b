//! Jobs handed to a few threads as they become free.
//!
//! For start-up only: it starts its threads anew each time. Invariant: when it returns, every job
//! was run to its end, or an error is returned and no job is running.

use std::sync::Mutex;
use std::thread;

/// Threads to use where the caller has no opinion: all the cores that this process may use.
#[must_use]
pub fn available_threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Runs `body` on each job. After an error no further job is started and the first one is returned.
pub(crate) fn for_each<J, E, I>(
    threads: usize,
    jobs: I,
    body: impl Fn(J) -> Result<(), E> + Sync,
) -> Result<(), E>
where
    I: Iterator<Item = J> + Send,
    J: Send,
    E: Send,
{
    // A thread per job at most: most tensors of a model are one.
    let threads = jobs.size_hint().1.map_or(threads, |most| threads.min(most));
    let state = Mutex::new((jobs, None));
    let lock = || state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let work = || {
        loop {
            let job = {
                let mut state = lock();
                if state.1.is_some() { None } else { state.0.next() }
            };
            let Some(job) = job else { return };
            if let Err(error) = body(job) {
                lock().1.get_or_insert(error);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
    let (_, error) = state.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    error.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::for_each;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn each_job_runs_once_on_any_number_of_threads() {
        for threads in [0, 1, 2, 7] {
            let sum = AtomicU64::new(0);
            let done = for_each(threads, 1..=1000u64, |job| {
                sum.fetch_add(job, Ordering::Relaxed);
                Ok::<(), ()>(())
            });
            assert_eq!((done, sum.into_inner()), (Ok(()), 500_500));
        }
    }

    #[test]
    fn an_error_ends_the_work() {
        let run = AtomicU64::new(0);
        let done = for_each(2, 0..1_000_000u64, |job| {
            run.fetch_add(1, Ordering::Relaxed);
            if job == 10 { Err("ten") } else { Ok(()) }
        });
        assert_eq!(done, Err("ten"));
        assert!(run.into_inner() < 1_000_000);
    }
}
