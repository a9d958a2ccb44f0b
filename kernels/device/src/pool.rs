//! A fixed set of threads that run one parallel loop at a time.
//!
//! A dispatch allocates nothing: the loop body is lent to the workers by pointer for the length of
//! the call. Workers spin briefly after a loop, because an op follows an op within microseconds,
//! and park when none comes. A worker that the system gives no core does not hold a loop up: only
//! those who joined are waited for. Invariant: `run` returns only after every item ran and every
//! worker that joined let go of the body.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Polls of the loop counter before a worker parks, some tens of microseconds; and polls of the
/// caller before it offers its core to a worker that was descheduled inside an item.
const SPINS: u32 = 2_000;

/// The loop in progress, lent to whoever joins it.
#[derive(Clone, Copy)]
struct Job {
    body: *const (dyn Fn(usize) + Sync),
    items: usize,
}

/// What joining, closing and parking agree on.
struct State {
    /// Open from the start of a loop until its caller finds no item left.
    open: Option<Job>,
    /// Workers that wait in the condition variable: without any, waking costs no system call.
    parked: usize,
}

struct Shared {
    /// Counts loops: a change means a new one.
    epoch: AtomicUsize,
    /// Workers inside the current loop; they join under the state's lock, while it is open.
    joined: AtomicUsize,
    /// Next item to take.
    next: AtomicUsize,
    stop: AtomicBool,
    state: Mutex<State>,
    wake: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: the raw body pointer inside `state` is the only field that is not Send and Sync by itself;
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
            joined: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            state: Mutex::new(State { open: None, parked: 0 }),
            wake: Condvar::new(),
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

    /// Runs `body(i)` for every `i` in `0..items`, in any order, on the threads that are free;
    /// returns when all ran. A worker that the system does not run is not waited for, unless it is
    /// inside an item. Items are taken one by one, so give each enough work to be worth an atomic
    /// operation.
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
        shared.open(items, body);
        shared.take_items(body, items);
        shared.close();
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Offers a loop to the workers. The caller must [`Shared::close`] it before `body` ends.
    fn open(&self, items: usize, body: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime changes. A worker uses the pointer between joining, which it
        // can do only while the loop is open, and its decrement of `joined`; `run` closes the loop
        // and waits for `joined` to be zero before it returns, and it does not unwind before that:
        // the caller's share runs under catch_unwind.
        let body: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(body) };
        let mut state = self.lock();
        state.open = Some(Job { body, items });
        self.next.store(0, Ordering::Relaxed);
        self.epoch.fetch_add(1, Ordering::Release);
        if state.parked > 0 {
            self.wake.notify_all();
        }
    }

    /// Lets nobody join any more, and waits for those who did.
    fn close(&self) {
        self.lock().open = None;
        let mut spins = 0_u32;
        while self.joined.load(Ordering::Acquire) > 0 {
            if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }

    fn work(&self) {
        let mut seen = 0;
        while let Some(epoch) = self.next_epoch(seen) {
            seen = epoch;
            let job = {
                let state = self.lock();
                // Counted under the lock, so that `close` sees everyone who got the pointer.
                if state.open.is_some() {
                    self.joined.fetch_add(1, Ordering::Relaxed);
                }
                state.open
            };
            if let Some(Job { body, items }) = job {
                // SAFETY: `run` keeps the body alive until this worker decrements `joined` below.
                self.take_items(unsafe { &*body }, items);
                self.joined.fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// Waits for a loop after `seen`; nothing once the pool is dropped.
    fn next_epoch(&self, seen: usize) -> Option<usize> {
        let changed = || {
            let epoch = self.epoch.load(Ordering::Acquire);
            (epoch != seen).then_some(epoch)
        };
        let mut found = None;
        for _ in 0..SPINS {
            found = changed();
            if found.is_some() {
                break;
            }
            std::hint::spin_loop();
        }
        if found.is_none() {
            let mut state = self.lock();
            state.parked += 1;
            found = loop {
                if let Some(epoch) = changed() {
                    break Some(epoch);
                }
                state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            };
            state.parked -= 1;
        }
        found.filter(|_| !self.stop.load(Ordering::Acquire))
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
            let _state = self.shared.lock();
            self.shared.stop.store(true, Ordering::Release);
            self.shared.epoch.fetch_add(1, Ordering::Release);
            self.shared.wake.notify_all();
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

    #[test]
    fn a_worker_without_a_core_is_not_waited_for() {
        // Far more workers than cores: waiting for each to check in would cost a scheduler's turn
        // per loop and worker.
        let pool = ThreadPool::new(65);
        let start = std::time::Instant::now();
        for _ in 0..2_000 {
            pool.run(2, &|_| {});
        }
        let each = start.elapsed() / 2_000;
        assert!(each < std::time::Duration::from_millis(1), "{each:?} a loop");
    }
}
