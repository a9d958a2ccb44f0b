//! Ranks as processes: the same sums, and what the others say of one that was killed or stopped.
//!
//! Children are this test program again, told by its environment which rank to be.

use device::collectives::{
    CollectiveError, Collectives, ElementsMut, Group, SharedMemory, SharedRegion,
};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const WORLD: usize = 3;
const PATH: &str = "COLLECTIVE_TEST_PATH";
const RANK: &str = "COLLECTIVE_TEST_RANK";
const STEPS: &str = "COLLECTIVE_TEST_STEPS";
const TIMEOUT_MS: &str = "COLLECTIVE_TEST_TIMEOUT_MS";

/// No test of its own: what a child does. Sums for so many steps, says the last sum or why there is none.
#[test]
fn child() {
    let get = |name| std::env::var(name).ok();
    let (Some(path), Some(rank)) = (get(PATH), get(RANK)) else { return };
    let number = |name| get(name).and_then(|text| text.parse::<u64>().ok()).expect("a number");
    let rank: usize = rank.parse().expect("a rank");
    let timeout = Duration::from_millis(number(TIMEOUT_MS));
    let mut memory = SharedMemory::join(Path::new(&path), rank, timeout).expect("a place");
    let group = Group::new(0, "tp", (0..WORLD).collect(), rank);
    let mut last = 0.0;
    for step in 0..number(STEPS) {
        memory.begin_step(step);
        let mut x = [rank as f32 + 1.0, step as f32, 0.5];
        if let Err(error) = memory.all_reduce(&group, ElementsMut::F32(&mut x)) {
            tell(&format!("failed: {error}"));
            return;
        }
        assert_eq!(x, [6.0, step as f32 * WORLD as f32, 1.5]);
        last = x[1];
        if step == 0 {
            tell("running");
        }
    }
    tell(&format!("last {last}"));
}

/// A line for the parent, past the test harness.
fn tell(line: &str) {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n@{line}").expect("a parent");
    out.flush().expect("a parent");
}

struct Ranks {
    region: SharedRegion,
    children: Vec<(Child, BufReader<std::process::ChildStdout>)>,
    _dir: tempfile::TempDir,
}

impl Ranks {
    fn start(steps: u64, timeout_ms: u64) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("ranks");
        let region = SharedRegion::create(&path, WORLD, 4096).expect("a file");
        let children = (0..WORLD).map(|rank| {
            let mut child = Command::new(std::env::current_exe().expect("this program"))
                .args(["child", "--exact", "--nocapture", "--test-threads=1"])
                .env(PATH, &path)
                .env(RANK, rank.to_string())
                .env(STEPS, steps.to_string())
                .env(TIMEOUT_MS, timeout_ms.to_string())
                .stdout(Stdio::piped())
                .spawn()
                .expect("a child");
            let out = child.stdout.take().expect("piped");
            (child, BufReader::new(out))
        });
        let children = children.collect();
        Self { region, children, _dir: dir }
    }

    /// The next line that a rank tells.
    fn told(&mut self, rank: usize) -> String {
        let mut line = String::new();
        while self.children[rank].1.read_line(&mut line).expect("a pipe") > 0 {
            if let Some(told) = line.strip_prefix('@') {
                return told.trim_end().to_owned();
            }
            line.clear();
        }
        String::new()
    }

    fn all_run(&mut self) {
        (0..WORLD).for_each(|rank| assert_eq!(self.told(rank), "running"));
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for (child, out) in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
            let _ = out.read_to_end(&mut Vec::new());
        }
    }
}

#[test]
fn processes_sum_as_threads_do() {
    let mut ranks = Ranks::start(300, 20_000);
    ranks.all_run();
    for rank in 0..WORLD {
        assert_eq!(ranks.told(rank), "last 897");
    }
    assert_eq!(ranks.region.stopped(), None);
    assert_eq!(ranks.region.joined(), [0, 1, 2]);
}

#[test]
fn a_killed_rank_is_named_by_those_who_wait() {
    let mut ranks = Ranks::start(u64::MAX, 2_000);
    ranks.all_run();
    ranks.children[1].0.kill().expect("a child");
    for rank in [0, 2] {
        let told = ranks.told(rank);
        assert!(told.starts_with("failed: rank 1 did not come to all_reduce over tp"), "{told}");
        assert!(told.contains(", 12 bytes, step "), "{told}");
    }
    let stopped = ranks.region.stopped();
    assert!(matches!(stopped, Some(CollectiveError::Missing { missing: 1, .. })), "{stopped:?}");
}

#[test]
fn a_rank_that_the_system_stops_is_named_too() {
    let mut ranks = Ranks::start(u64::MAX, 2_000);
    ranks.all_run();
    let id = ranks.children[2].0.id().to_string();
    let sent = Command::new("kill").args(["-STOP", &id]).status().expect("a shell's tool");
    assert!(sent.success());
    for rank in [0, 1] {
        let told = ranks.told(rank);
        assert!(told.starts_with("failed: rank 2 did not come to all_reduce over tp"), "{told}");
    }
}

#[test]
fn the_supervisor_wakes_those_who_wait_for_the_dead() {
    let mut ranks = Ranks::start(u64::MAX, 600_000);
    ranks.all_run();
    ranks.children[0].0.kill().expect("a child");
    let began = Instant::now();
    ranks.region.abort("rank 0 died of signal 9");
    for rank in [1, 2] {
        assert_eq!(ranks.told(rank), "failed: the ranks were stopped: rank 0 died of signal 9");
    }
    assert!(began.elapsed() < Duration::from_secs(60));
}
