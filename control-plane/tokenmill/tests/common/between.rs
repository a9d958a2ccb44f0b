//! Something between a server and its workers' sockets, which a test can block: each way of each rank by
//! itself. Nothing is lost in it or changed; what is blocked comes late, also when nobody waits for it any more.

use super::Server;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

const SUFFIX: &str = ".between";

/// A way of what is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Way {
    ToWorker,
    FromWorker,
}

/// What is blocked, and what came late for it.
#[derive(Default)]
struct Gates {
    blocked: Mutex<BTreeSet<(u32, Way)>>,
    opened: Condvar,
    /// Bytes that were held back and then passed on.
    late: AtomicU64,
    over: AtomicBool,
}

/// Between one server and its workers.
pub(crate) struct Between {
    folder: tempfile::TempDir,
    gates: Arc<Gates>,
}

impl Between {
    /// Waits for workers' sockets in a folder of its own.
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("temporary folder");
        let gates = Arc::new(Gates::default());
        let (at, watching) = (folder.path().to_owned(), Arc::clone(&gates));
        std::thread::spawn(move || watch(&at, &watching));
        Self { folder, gates }
    }

    /// A server that reaches its workers through this, with what it logs.
    pub(crate) fn server(&self, args: &[&str]) -> (Server, Arc<Mutex<String>>) {
        let folder = self.folder.path().to_str().expect("UTF-8");
        let args = [args, &["--dial-suffix", SUFFIX]].concat();
        Server::start_logged_in(&[("TMPDIR", folder)], &args)
    }

    /// Lets nothing through on these ways of a rank, in whatever life, for so long.
    pub(crate) fn block(&self, rank: u32, ways: &[Way], time: Duration) {
        let blocked = || self.gates.blocked.lock().expect("no panic");
        blocked().extend(ways.iter().map(|way| (rank, *way)));
        std::thread::sleep(time);
        blocked().clear();
        self.gates.opened.notify_all();
    }

    /// Bytes that came late.
    pub(crate) fn late(&self) -> u64 {
        self.gates.late.load(Ordering::Relaxed)
    }
}

impl Drop for Between {
    fn drop(&mut self) {
        self.gates.over.store(true, Ordering::Relaxed);
        self.gates.blocked.lock().expect("no panic").clear();
        self.gates.opened.notify_all();
    }
}

/// Puts a socket of its own beside every worker's that comes to be.
fn watch(folder: &Path, gates: &Arc<Gates>) {
    let mut seen = BTreeSet::new();
    while !gates.over.load(Ordering::Relaxed) {
        for socket in sockets(folder) {
            let name = socket.file_stem().and_then(|name| name.to_str()).expect("UTF-8");
            let rank = name.rsplit('-').next().and_then(|rank| rank.parse().ok());
            if seen.insert(socket.clone()) {
                let gates = Arc::clone(gates);
                stand_in(socket, rank.expect("worker-LIFE-RANK.sock"), gates);
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn sockets(folder: &Path) -> Vec<PathBuf> {
    let entries = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten();
    let inner = entries(folder).flat_map(|entry| entries(&entry.path()).collect::<Vec<_>>());
    inner
        .map(|entry| entry.path())
        .filter(|path| path.extension() == Some("sock".as_ref()))
        .collect()
}

fn stand_in(socket: PathBuf, rank: u32, gates: Arc<Gates>) {
    let mut own = socket.clone().into_os_string();
    own.push(SUFFIX);
    let listener = UnixListener::bind(own).expect("a socket beside the worker's");
    std::thread::spawn(move || {
        for server in listener.incoming().map_while(Result::ok) {
            // A worker that does not listen yet is tried again by the server.
            let Ok(worker) = UnixStream::connect(&socket) else { continue };
            let other = |end: &UnixStream| end.try_clone().expect("a descriptor");
            let (from, to) = (other(&worker), other(&server));
            let both = [(server, worker, Way::ToWorker), (from, to, Way::FromWorker)];
            for (from, to, way) in both {
                let gates = Arc::clone(&gates);
                std::thread::spawn(move || pass(from, to, (rank, way), &gates));
            }
        }
    });
}

/// Passes on what comes until the end, which is passed on too.
fn pass(mut from: UnixStream, mut to: UnixStream, gate: (u32, Way), gates: &Gates) {
    let mut bytes = vec![0; 1 << 16];
    loop {
        let read = from.read(&mut bytes).unwrap_or(0);
        let mut blocked = gates.blocked.lock().expect("no panic");
        let held = blocked.contains(&gate);
        while blocked.contains(&gate) {
            blocked = gates.opened.wait(blocked).expect("no panic");
        }
        drop(blocked);
        if read == 0 || to.write_all(&bytes[..read]).is_err() {
            let _ = to.shutdown(std::net::Shutdown::Both);
            return;
        }
        if held {
            gates.late.fetch_add(read as u64, Ordering::Relaxed);
        }
    }
}
