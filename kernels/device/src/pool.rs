//! A fixed set of threads that run one parallel loop at a time.
//!
//! A dispatch allocates nothing: the loop body is lent to the workers by pointer for the length of
//! the call. Workers spin briefly after a loop, because an op follows an op within microseconds,
//! and park when none comes. Invariant: `run` returns only after every item ran and every worker
//! let go of the body.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Polls of the job counter before a worker parks; some tens of microseconds.
const SPINS: u32 = 20_000;

/// The loop in progress. The pointer is valid from the store of `epoch` until `active` is zero.
struct Job {
    body: *const (dyn Fn(usize) + Sync),
    items: usize,
}

struct Shared {
    /// Counts loops; odd values do not occur, a change means a new job.
    epoch: AtomicUsize,
    /// Workers that have not finished the current loop.
    active: AtomicUsize,
    /// Next item to take.
    next: AtomicUsize,
    stop: AtomicBool,
    job: Mutex<Option<Job>>,
    parked: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: the raw body pointer inside `job` is the only field that is not Send and Sync by itself;
// what it points to is `Sync`, and `ThreadPool::run` keeps it alive while any thread may use it.
unsafe impl Send for Shared {}
// SAFETY: as for Send.
unsafe impl Sync for Shared {}

/// The threads. The calling thread takes part, so a pool of one has no thread of its own.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One loop at a time.
    turn: Mutex<()>,
}

impl ThreadPool {
    /// A pool that runs loops on `threads` threads, the caller's included; at least one.
    ///
    /// # Panics
    /// When the operating system refuses a thread.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            active: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            job: Mutex::new(None),
            parked: Condvar::new(),
            panic: Mutex::new(None),
        });
        let workers = (1..threads)
            .map(|index| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("op-{index}"))
                    .spawn(move || shared.work())
                    .expect("the system gives a thread")
            })
            .collect();
        Self { shared, workers, turn: Mutex::new(()) }
    }

    /// Threads that take part in a loop.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `body(i)` for every `i` in `0..items`, in any order, on all threads; returns when all
    /// ran. Items are taken one by one, so give each enough work to be worth an atomic operation.
    ///
    /// # Panics
    /// With the first panic of a body, after all threads have stopped.
    pub fn run(&self, items: usize, body: &(dyn Fn(usize) + Sync)) {
        if items == 0 {
            return;
        }
        if items == 1 || self.workers.is_empty() {
            (0..items).for_each(body);
            return;
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        {
            let mut job = shared.job.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: only the lifetime changes. The pointer is used by workers between the epoch
            // store below and their decrement of `active`, and this function does not return (nor
            // unwind: the caller's share runs under catch_unwind) before `active` is zero.
            let body: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(body) };
            *job = Some(Job { body, items });
            shared.next.store(0, Ordering::Relaxed);
            shared.active.store(self.workers.len(), Ordering::Relaxed);
            shared.epoch.fetch_add(1, Ordering::Release);
            shared.parked.notify_all();
        }
        shared.take_items(body, items);
        let mut spins = 0_u32;
        while shared.active.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins.is_multiple_of(SPINS) {
                std::thread::yield_now()
            } else {
                std::hint::spin_loop()
            }
        }
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut seen = 0;
        while let Some(epoch) = self.next_epoch(seen) {
            seen = epoch;
            let job = {
                let job = self.job.lock().unwrap_or_else(PoisonError::into_inner);
                job.as_ref().map(|job| (job.body, job.items))
            };
            if let Some((body, items)) = job {
                // SAFETY: `run` keeps the body alive until this worker decrements `active` below.
                self.take_items(unsafe { &*body }, items);
            }
            self.active.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for a loop after `seen`; nothing once the pool is dropped.
    fn next_epoch(&self, seen: usize) -> Option<usize> {
        for _ in 0..SPINS {
            let epoch = self.epoch.load(Ordering::Acquire);
            if epoch != seen {
                return (!self.stop.load(Ordering::Acquire)).then_some(epoch);
            }
            std::hint::spin_loop();
        }
        let mut job = self.job.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let epoch = self.epoch.load(Ordering::Acquire);
            if epoch != seen {
                return (!self.stop.load(Ordering::Acquire)).then_some(epoch);
            }
            job = self.parked.wait(job).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn take_items(&self, body: &(dyn Fn(usize) + Sync), items: usize) {
        let ran = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let item = self.next.fetch_add(1, Ordering::Relaxed);
                if item >= items {
                    break;
                }
                body(item);
            }
        }));
        if let Err(panic) = ran {
            // Nobody takes another item of a loop that failed.
            self.next.store(items, Ordering::Relaxed);
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        {
            let _job = self.shared.job.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.stop.store(true, Ordering::Release);
            self.shared.epoch.fetch_add(1, Ordering::Release);
            self.shared.parked.notify_all();
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl std::fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ThreadPool({} threads)", self.threads())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn every_item_runs_once_whatever_the_threads() {
        for threads in [1, 2, 3, 7] {
            let pool = ThreadPool::new(threads);
            for items in [0, 1, 2, 100, 1001] {
                let counts: Vec<AtomicU32> = (0..items).map(|_| AtomicU32::new(0)).collect();
                pool.run(items, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = ThreadPool::new(3);
        let failed = catch_unwind(AssertUnwindSafe(|| {
            pool.run(100, &|i| assert_ne!(i, 57, "planted"));
        }));
        assert!(failed.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(10, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.load(Ordering::Relaxed), 45);
    }

    #[test]
    fn parked_workers_wake_up() {
        let pool = ThreadPool::new(2);
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            let sum = AtomicUsize::new(0);
            pool.run(2, &|i| {
                sum.fetch_add(i + 1, Ordering::Relaxed);
            });
            assert_eq!(sum.load(Ordering::Relaxed), 3);
        }
    }
}
