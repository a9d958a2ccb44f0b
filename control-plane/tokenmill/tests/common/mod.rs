//! A real server per test: the built binary, a free port, its worker process, over real HTTP.

#![allow(dead_code, reason = "each test file uses its part of this module")]

pub(crate) mod between;

use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

/// How long a server may take until it is ready.
const READY: Duration = Duration::from_secs(60);

/// The program under test: the one built with the tests, or another given by `TOKENMILL_TEST_PROGRAM`,
/// so that tests run where nothing is built.
pub(crate) fn program() -> PathBuf {
    let given = std::env::var_os("TOKENMILL_TEST_PROGRAM");
    given.map_or_else(|| env!("CARGO_BIN_EXE_tokenmill").into(), PathBuf::from)
}

/// What servers are started on (`cpu` or `cuda`) where `TOKENMILL_TEST_DEVICE` says; else each takes
/// what it finds.
pub(crate) fn test_device() -> Option<String> {
    std::env::var("TOKENMILL_TEST_DEVICE").ok()
}

/// This crate's folder, now rather than when it was built.
pub(crate) fn here() -> PathBuf {
    let now = std::env::var_os("CARGO_MANIFEST_DIR");
    now.map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

/// A running server; killed on drop.
pub(crate) struct Server {
    child: Child,
    /// `http://127.0.0.1:PORT`.
    pub(crate) url: String,
}

impl Server {
    /// Starts `tokenmill serve ARGS --port 0` and waits until it is ready.
    pub(crate) fn start(args: &[&str]) -> Self {
        Self::start_in(&[], args)
    }

    /// The same in a process group of its own, as a terminal does.
    pub(crate) fn start_apart(args: &[&str]) -> Self {
        let mut command = Command::new(program());
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        Self::start_as(command, &[], args)
    }

    /// The same with variables of the environment.
    pub(crate) fn start_in(environment: &[(&str, &str)], args: &[&str]) -> Self {
        Self::start_as(Command::new(program()), environment, args)
    }

    /// The same, with what it logs.
    pub(crate) fn start_logged(args: &[&str]) -> (Self, Arc<Mutex<String>>) {
        Self::start_logged_in(&[], args)
    }

    /// The same with variables of the environment.
    pub(crate) fn start_logged_in(
        environment: &[(&str, &str)],
        args: &[&str],
    ) -> (Self, Arc<Mutex<String>>) {
        let mut command = Command::new(program());
        command.stderr(Stdio::piped());
        let mut server = Self::start_as(command, environment, args);
        let log = Arc::new(Mutex::new(String::new()));
        let (stderr, into) = (server.child.stderr.take().expect("piped"), Arc::clone(&log));
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                eprintln!("{line}");
                let mut log = into.lock().expect("no panic");
                log.push_str(&line);
                log.push('\n');
            }
        });
        (server, log)
    }

    fn start_as(command: Command, environment: &[(&str, &str)], args: &[&str]) -> Self {
        let server = Self::launch(command, environment, args);
        server.wait_ready(READY);
        server
    }

    /// Starts it without waiting until it is ready.
    pub(crate) fn begin(args: &[&str]) -> Self {
        Self::launch(Command::new(program()), &[], args)
    }

    fn launch(mut command: Command, environment: &[(&str, &str)], args: &[&str]) -> Self {
        let device = test_device().filter(|_| !args.contains(&"--fake-engine"));
        let mut child = command
            .arg("serve")
            .args(args)
            .args(device.iter().flat_map(|device| ["--device", device]))
            .args(["--port", "0"])
            .env("TOKENMILL_LOG", std::env::var("TOKENMILL_LOG").unwrap_or("warn".into()))
            .env("NO_COLOR", "1")
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let stdout = child.stdout.take().expect("piped");
        let (found, url) = mpsc::channel();
        std::thread::spawn(move || {
            // Reads to the end, so that the server never blocks on a full pipe.
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Some(at) = line.find("http://127.0.0.1:") {
                    let url: String =
                        line[at..].chars().take_while(|c| !c.is_whitespace()).collect();
                    let _ = found.send(url);
                }
            }
        });
        let Ok(url) = url.recv_timeout(READY) else {
            let _ = child.kill();
            panic!("serve {args:?} printed no address (status {:?})", child.wait());
        };
        Self { child, url }
    }

    /// Waits until `/readyz` answers 200.
    pub(crate) fn wait_ready(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if self.get("/readyz").is_ok_and(|(status, _)| status == 200) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("not ready within {limit:?}");
    }

    /// GET; status and body.
    pub(crate) fn get(&self, path: &str) -> Result<(u16, String), reqwest::Error> {
        let response = client().get(format!("{}{path}", self.url)).send()?;
        Ok((response.status().as_u16(), response.text()?))
    }

    /// POST of JSON; status and parsed body.
    pub(crate) fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let response = client()
            .post(format!("{}{path}", self.url))
            .json(body)
            .send()
            .expect("the server answers");
        let status = response.status().as_u16();
        let text = response.text().expect("a whole body");
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// POST of a completion that gives up after so many milliseconds; status and parsed body.
    pub(crate) fn post_within(&self, millis: u32, body: &Value) -> (u16, Value) {
        let request = client()
            .post(format!("{}/v1/completions", self.url))
            .header("x-request-timeout-ms", millis.to_string())
            .json(body);
        let response = request.send().expect("the server answers");
        (response.status().as_u16(), response.json().expect("JSON"))
    }

    /// POST of JSON: status, `Retry-After` in seconds, and the error of the body, if it is the envelope.
    pub(crate) fn told(&self, path: &str, body: &Value) -> (u16, Option<u64>, Value) {
        let sent = client().post(format!("{}{path}", self.url)).json(body).send();
        let reply = sent.expect("the server answers");
        let status = reply.status().as_u16();
        let after = reply.headers().get("retry-after");
        let after = after.and_then(|value| value.to_str().ok()?.parse().ok());
        let text = reply.text().expect("a whole body");
        let body: Value = serde_json::from_str(&text).unwrap_or_default();
        if status >= 400 {
            let keys = body["error"].as_object().map(|error| error.keys().cloned().collect());
            let envelope = ["message", "type", "param", "code"].map(str::to_owned).to_vec();
            assert_eq!(keys, Some(envelope), "{status}: {text}");
        }
        (status, after, body["error"].clone())
    }

    /// POST that must succeed.
    pub(crate) fn ok(&self, path: &str, body: &Value) -> Value {
        let (status, answer) = self.post(path, body);
        assert_eq!(status, 200, "{path} {body}: {answer}");
        answer
    }

    /// POST whose answer is a stream; every `data:` object up to `[DONE]`.
    pub(crate) fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut response = client()
            .post(format!("{}{path}", self.url))
            .json(body)
            .send()
            .expect("the server answers");
        let mut text = String::new();
        response.read_to_string(&mut text).expect("a whole stream");
        let mut events = Vec::new();
        let mut done = false;
        for data in text.lines().filter_map(|line| line.strip_prefix("data:")) {
            let data = data.trim();
            assert!(!done, "nothing follows [DONE]: {data}");
            if data == "[DONE]" {
                done = true;
            } else {
                events.push(serde_json::from_str(data).unwrap_or_else(|_| panic!("{data}")));
            }
        }
        assert!(done, "the stream ended without [DONE]: {text}");
        events
    }

    /// The value of a metric: `name`, or `name{label="value"}` to choose among series.
    pub(crate) fn metric(&self, name: &str) -> Option<f64> {
        let (_, text) = self.get("/metrics").expect("metrics answer");
        let (base, label) = name.trim_end_matches('}').split_once('{').unwrap_or((name, ""));
        text.lines().find_map(|line| {
            let rest = line.strip_prefix(base)?;
            let (labels, value) = rest.rsplit_once(' ')?;
            let same_name = labels.is_empty() || labels.starts_with('{');
            (same_name && labels.contains(label)).then(|| value.parse().ok())?
        })
    }

    /// The worker's process id: the only child of the server.
    pub(crate) fn worker_pid(&self) -> Option<u32> {
        self.children().first().copied()
    }

    /// The process ids of a group's workers, by rank.
    pub(crate) fn workers(&self) -> BTreeMap<u32, u32> {
        let rank = |pid: u32| {
            let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
            let (_, after) = line.split_once("\"rank\":")?;
            let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
            digits.parse::<u32>().ok()
        };
        self.children().into_iter().filter_map(|pid| Some((rank(pid)?, pid))).collect()
    }

    fn children(&self) -> Vec<u32> {
        let server = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{server}/task/{server}/children"));
        let mut found: Vec<u32> = Vec::new();
        if let Ok(list) = children {
            found.extend(list.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
        // The child may belong to any thread of the server.
        let tasks = std::fs::read_dir(format!("/proc/{server}/task"));
        for task in tasks.into_iter().flatten().flatten() {
            if let Ok(list) = std::fs::read_to_string(task.path().join("children")) {
                found.extend(list.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
            }
        }
        found
    }

    /// Resident bytes of the server process.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))
            .expect("the server lives");
        let kib = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        kib.expect("VmRSS") * 1024
    }

    /// Process id of the server.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the server to end by itself.
    pub(crate) fn wait(&mut self) -> std::process::ExitStatus {
        self.child.wait().expect("waited for")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Streams a completion to its `[DONE]`; `each` gets every choice that has tokens.
pub(crate) fn follow(url: &str, body: &Value, mut each: impl FnMut(&Value)) {
    let sent = client().post(format!("{url}/v1/completions")).json(body).send();
    for line in BufReader::new(sent.expect("accepted")).lines() {
        let line = line.expect("an unbroken stream");
        let Some(data) = line.strip_prefix("data:").map(str::trim) else { continue };
        if data == "[DONE]" {
            return;
        }
        let event: Value = serde_json::from_str(data).expect("JSON");
        assert!(event.get("error").is_none(), "{event}");
        let choice = &event["choices"][0];
        if choice["token_ids"].is_array() {
            each(choice);
        }
    }
    panic!("the stream ended without [DONE]");
}

/// The tokens of a choice, each with its log-probability where there is one.
pub(crate) fn tokens(choice: &Value) -> impl Iterator<Item = (u64, Option<f64>)> {
    let tokens = choice["token_ids"].as_array().into_iter().flatten().enumerate();
    tokens.map(|(at, token)| {
        let logprob = choice["logprobs"]["token_logprobs"][at].as_f64();
        (token.as_u64().expect("a token"), logprob)
    })
}

fn client() -> reqwest::blocking::Client {
    reqwest::blocking::Client::builder()
        .timeout(Duration::from_secs(120))
        .build()
        .expect("a client")
}

/// What a command says that must end by itself; one that does not is killed and fails the test.
pub(crate) fn ends(command: &mut Command) -> std::process::Output {
    let piped = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = piped.spawn().expect("the binary starts");
    let pid = child.id();
    let (ended, end) = mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        let late = end.recv_timeout(READY) == Err(mpsc::RecvTimeoutError::Timeout);
        if late {
            signal("KILL", pid);
        }
        late
    });
    let output = child.wait_with_output().expect("waited for");
    drop(ended);
    assert!(!watch.join().expect("no panic"), "still running after {READY:?}: {output:?}");
    output
}

/// Sends a signal by number-free name, as a person would.
pub(crate) fn signal(name: &str, pid: u32) {
    kill(name, &pid.to_string());
}

/// The same to all processes of a group.
pub(crate) fn signal_group(name: &str, group: u32) {
    kill(name, &format!("-{group}"));
}

fn kill(name: &str, whom: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), "--", whom]).status();
    assert!(status.is_ok_and(|s| s.success()), "kill -{name} {whom}");
}

/// Polls until `done`, at most for `limit`.
pub(crate) fn wait_until(what: &str, limit: Duration, done: impl Fn() -> bool) {
    let deadline = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The configuration of a parity case, such as `llama/native_tied`.
pub(crate) fn config(case: &str) -> PathBuf {
    here().join("tests/parity/cases").join(case).join("config.json")
}

/// Makes a random checkpoint of `config` in a fresh folder with the parity profile.
pub(crate) fn checkpoint(config: &Path, seed: u64, into: &Path) -> PathBuf {
    let out = into.join("checkpoint");
    let made = Command::new(program())
        .args(["model", "random"])
        .arg(config)
        .arg("--out")
        .arg(&out)
        .args(["--seed", &seed.to_string(), "--profile", "parity", "--dtype", "float32"])
        .output()
        .expect("the binary starts");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    out
}
