//! The command line as a person or a script meets it: help, version, recipes, explain, doctor, bench.
//!
//! It serves nothing but the fake engine and does not judge figures. That every flag is documented is
//! compared elsewhere. Invariant: what scripts rely on (flags, exit codes, one JSON object a line, and
//! errors that name what was wrong) does not change unnoticed.

mod common;

use common::{Server, program};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Every command with flags that scripts and documents rely on. Written out, so that a renamed flag fails.
const COMMANDS: [(&[&str], &[&str]); 19] = [
    (
        &["serve"],
        &[
            "--host",
            "--port",
            "--served-model-name",
            "--shutdown-timeout",
            "--dtype",
            "--load-format",
            "--revision",
            "--seed",
            "--max-model-len",
            "--chat-template",
            "--max-num-seqs",
            "--max-num-batched-tokens",
            "--max-prefill-chunk",
            "--max-step-ms",
            "--run-ahead",
            "--max-queued-requests",
            "--max-queued-tokens",
            "--no-enable-prefix-caching",
            "--kv-cache-dtype",
            "--kv-cache-memory-bytes",
            "--kv-host-memory-bytes",
            "--tensor-parallel-size",
            "--data-parallel-size",
            "--enable-expert-parallel",
            "--threads",
            "--step-timeout",
        ],
    ),
    (&["bench", "kernels"], &["--filter", "--list", "--json", "--record"]),
    (&["explain"], &["--url", "--steps", "--json"]),
    (&["chat"], &["--url", "--model", "--system", "--max-tokens", "--temperature"]),
    (
        &["bench", "latency"],
        &["--url", "--input-len", "--vocab-size", "--output-len", "--seed", "--json", "--repeats"],
    ),
    (&["bench", "throughput"], &["--url", "--input-len", "--output-len", "--num-prompts"]),
    (&["bench", "serve"], &["--num-prompts", "--max-concurrency", "--request-rate", "--json"]),
    (&["bench", "plot"], &["--out", "--title"]),
    (&["bench", "planner"], &["--json", "--steps"]),
    (&["bench", "overload"], &["--json", "--seed", "--plots"]),
    (&["model", "explain"], &["--tp", "--dp", "--ep", "--bucket"]),
    (&["model", "random"], &["--out", "--seed", "--dtype", "--profile"]),
    (&["model", "fetch"], &["--revision"]),
    (&["recipe", "list"], &[]),
    (&["recipe", "check"], &[]),
    (&["recipe", "plan"], &[]),
    (&["recipe", "explain"], &[]),
    (&["doctor"], &[]),
    (&["completions"], &[]),
];

fn run(args: &[&str]) -> Output {
    common::ends(Command::new(program()).args(args))
}

/// Standard output of a command that must succeed.
fn ok(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// All that a command says that must fail.
fn refused(args: &[&str]) -> String {
    let output = run(args);
    assert!(!output.status.success(), "{args:?} succeeded");
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

fn objects(lines: &str) -> Vec<Value> {
    let object = |line: &str| -> Value {
        let value: Value =
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        assert!(value.is_object(), "{line}");
        value
    };
    lines.lines().map(object).collect()
}

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/cases").join(name)
}

/// The commands that a help page lists, without `help` itself.
fn listed(help: &str) -> Vec<String> {
    help.lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        // Continued descriptions are indented further than names.
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next().map(str::to_owned))
        .filter(|name| name != "help")
        .collect()
}

#[test]
fn help_of_every_command_lists_its_flags() {
    let mut found: Vec<Vec<String>> = Vec::new();
    for name in listed(&ok(&["--help"])) {
        let below = listed(&ok(&[&name, "--help"]));
        if below.is_empty() {
            found.push(vec![name]);
        } else {
            found.extend(below.into_iter().map(|below| vec![name.clone(), below]));
        }
    }
    let mut expected: Vec<Vec<String>> = COMMANDS
        .iter()
        .map(|(command, _)| command.iter().map(|word| (*word).to_owned()).collect())
        .collect();
    found.sort();
    expected.sort();
    assert_eq!(found, expected, "a command without an entry here, or an entry without a command");
    for (command, flags) in COMMANDS {
        let help = ok(&[command, &["--help"]].concat());
        for flag in flags {
            let mut words =
                help.split(|c: char| c.is_whitespace() || c == ',').filter(|word| word == flag);
            assert!(words.next().is_some(), "{command:?} does not list {flag}");
        }
    }
}

#[test]
fn the_version_names_an_existing_commit() {
    let version = ok(&["--version"]);
    let commit = version.trim().rsplit_once('(').and_then(|(_, rest)| rest.strip_suffix(')'));
    let commit = commit.unwrap_or_else(|| panic!("{version} has no commit"));
    let git = |args: &[&str]| {
        let asked = Command::new("git").args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output();
        asked.ok().filter(|asked| asked.status.success())
    };
    // A source archive has no history to ask.
    if git(&["rev-parse", "HEAD"]).is_none() {
        assert_eq!(commit, "unknown commit");
        return;
    }
    let kind = git(&["cat-file", "-t", commit]).unwrap_or_else(|| panic!("{commit} is no object"));
    assert_eq!(String::from_utf8_lossy(&kind.stdout).trim(), "commit");
    assert_eq!(ok(&["serve", "--version"]).split_once(' ').map(|(_, rest)| rest.trim()), {
        version.split_once(' ').map(|(_, rest)| rest.trim())
    });
}

#[test]
fn every_built_in_recipe_checks_plans_and_explains() {
    let list = ok(&["recipe", "list"]);
    let names: Vec<&str> = list.lines().filter_map(|l| l.split_whitespace().next()).collect();
    assert!(names.len() >= 6, "{names:?}");
    let check = ok(&["recipe", "check"]);
    assert_eq!(check.lines().count(), names.len());
    for name in names {
        let good = |line: &str| line.starts_with("ok ") && line.contains(&format!(" {name}: "));
        assert!(check.lines().any(good), "{name} is not ok: {check}");
        let plan = ok(&["recipe", "plan", name]);
        for part in [name, "1 process", "weights", "KV cache", "in all", "available"] {
            assert!(plan.contains(part), "{name}: no {part} in {plan}");
        }
        let explain = ok(&["recipe", "explain", name]);
        for field in recipe::FIELDS {
            let own = |line: &&str| line.split_whitespace().next() == Some(field.name);
            let line = explain.lines().find(own);
            let line = line.unwrap_or_else(|| panic!("{name}: {} is not explained", field.name));
            assert!(line.contains(field.about), "{line}");
        }
    }
}

#[test]
fn a_broken_recipe_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let file = folder.path().join("odd.toml");
    let text = recipe::builtins().first().expect("a recipe").text;
    std::fs::write(&file, format!("no_such_field = 1\n{text}")).expect("written");
    let file = file.to_str().expect("UTF-8");
    for command in ["check", "plan", "explain"] {
        let said = refused(&["recipe", command, file]);
        assert!(said.contains("odd.toml") && said.contains("no_such_field"), "{command}: {said}");
        let said = refused(&["recipe", command, "no-such-recipe"]);
        assert!(said.contains("no-such-recipe"), "{command}: {said}");
    }
}

#[test]
fn broken_text_files_end_serve_before_anything_starts() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let at = |name: &str| folder.path().join(name);
    std::fs::copy(case("llama/native_tied").join("config.json"), at("config.json"))
        .expect("copied");
    let serve =
        ["serve", folder.path().to_str().expect("UTF-8"), "--load-format", "random", "--port", "0"];
    for (file, content, words) in [
        ("generation_config.json", r#"{"temperature": -1}"#, ["temperature", "between 0 and 2"]),
        ("generation_config.json", r#"{"top_k": -2}"#, ["top_k", "between -1"]),
        ("tokenizer.json", "{", ["tokenizer.json", "EOF"]),
    ] {
        std::fs::write(at(file), content).expect("written");
        let said = refused(&serve);
        assert!(said.contains(file) && words.iter().all(|word| said.contains(word)), "{said}");
        // What starts first prints the plan.
        assert!(!said.contains("KV cache"), "{said}");
        std::fs::remove_file(at(file)).expect("removed");
    }
    // Sparse: no such file should be so large, and none is read to find out.
    let large = std::fs::File::create(at("tokenizer.json")).expect("created");
    large.set_len(300 << 20).expect("as long as that");
    let said = refused(&serve);
    assert!(said.contains("tokenizer.json") && said.contains("larger"), "{said}");
}

#[test]
fn explain_prints_collectives_only_where_ranks_share_layers() {
    let model = case("qwen3/native_layer_types");
    let model = model.to_str().expect("UTF-8");
    let of = |tp| ok(&["model", "explain", model, "--tp", tp]);
    let (alone, shared) = (of("1"), of("2"));
    for kind in ["all_reduce", "all_gather"] {
        assert!(shared.contains(kind), "tp 2 has no {kind}: {shared}");
        assert!(!alone.contains(kind), "tp 1 has {kind}: {alone}");
    }
    let bytes = shared.lines().find_map(|line| {
        let rest = line.strip_prefix("collectives tp")?;
        rest.split_whitespace().next()?.parse::<u64>().ok()
    });
    assert!(bytes.is_some_and(|bytes| bytes > 0), "{shared}");
    // A count that cannot cut the model is refused with those that can.
    let said = refused(&["model", "explain", model, "--tp", "3"]);
    assert!(said.contains("tp = 3") && said.contains("tp may be 1, 2"), "{said}");
}

#[test]
fn explain_names_the_kernel_of_every_op() {
    let model = case("deepseek_v2/native_lite");
    let model = model.to_str().expect("UTF-8");
    let kinds =
        ["embed", "rms_norm", "linear", "rope", "write_kv", "mla", "silu_mul", "route", "experts"];
    let kernels = |bucket| {
        let table = ok(&["model", "explain", model, "--bucket", bucket]);
        let of = |kind: &str| {
            let mut ops = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
            let op = ops.find(|words| words.get(1) == Some(&kind));
            let op = op.unwrap_or_else(|| panic!("no {kind} in {table}"));
            assert!(!op[2].starts_with('['), "{kind} has no kernel: {op:?}");
            op[2].to_owned()
        };
        kinds.map(of)
    };
    let (one, many) = (kernels("1"), kernels("2048"));
    let mla = kinds.iter().position(|kind| *kind == "mla").expect("listed");
    assert!(one[mla].starts_with("absorbed_"), "{one:?}");
    assert!(many[mla].starts_with("expanded_"), "{many:?}");
}

#[test]
fn doctor_reports_every_check() {
    let report = ok(&["doctor"]);
    for check in ["version", "processor", "memory", "gpu", "temporary folder", "port 8000"] {
        let line = report.lines().find(|line| line.contains(&format!("  {check} ")));
        let line = line.unwrap_or_else(|| panic!("{check} is not checked: {report}"));
        assert!(line.starts_with("ok ") || line.starts_with("note "), "{line}");
    }
}

#[test]
fn bash_completions_know_every_flag() {
    let script = ok(&["completions", "bash"]);
    assert!(script.contains("complete -F _tokenmill"), "not a script that bash would register");
    // The script has one line of words per command.
    let offered: Vec<Vec<&str>> = script
        .lines()
        .filter_map(|line| line.trim().strip_prefix("opts=\""))
        .map(|words| words.trim_end_matches('"').split_whitespace().collect())
        .collect();
    for (command, flags) in COMMANDS {
        let complete = offered.iter().any(|words| flags.iter().all(|flag| words.contains(flag)));
        assert!(complete, "{command:?}: no completion offers all of {flags:?}");
    }
}

#[test]
fn kernels_are_listed_without_a_device_and_measured_only_with_one() {
    let listed = ok(&["bench", "kernels", "--list", "--filter", "mla_decode,sample.greedy"]);
    assert!(listed.lines().any(|line| line == "mla_decode.h16.bs1.ctx8192"), "{listed}");
    assert!(listed.lines().all(|line| line.starts_with("mla_") || line.starts_with("sample.")));
    refused(&["bench", "kernels", "--filter", "no such kernel"]);
    let doctor = ok(&["doctor"]);
    let has_device = doctor.lines().any(|line| line.starts_with("ok") && line.contains(" gpu "));
    if !has_device {
        let output = run(&["bench", "kernels"]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("nothing to measure here"), "{said}");
    }
}

#[test]
fn the_planner_bench_prints_one_object_per_case() {
    let cases = objects(&ok(&["bench", "planner", "--json", "--steps", "50"]));
    assert!(cases.len() >= 6, "{cases:?}");
    let mut seen: Vec<String> = Vec::new();
    for case in &cases {
        assert_eq!(case["bench"], "planner");
        assert_eq!(case["steps"], 50);
        assert!(case["p50_us"].as_f64().is_some_and(|us| us > 0.0), "{case}");
        seen.push(format!("{} {} {}", case["requests"], case["context_tokens"], case["kind"]));
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), cases.len(), "every case once");
}

#[test]
fn measurements_of_a_server_print_one_object() {
    let server = Server::start(&["--fake-engine", "1000,0,0", "--max-model-len", "4096"]);
    let common = ["--url", &server.url, "--input-len", "8", "--output-len", "5", "--json"];
    for (bench, flags) in [
        ("latency", vec!["--repeats", "2"]),
        ("throughput", vec!["--num-prompts", "4"]),
        ("serve", vec!["--num-prompts", "6", "--max-concurrency", "3"]),
    ] {
        let args = [&["bench", bench], common.as_slice(), &flags].concat();
        let found = objects(&ok(&args));
        assert_eq!(found.len(), 1, "{bench}: {found:?}");
    }
    // A sweep is an object a load, recorded as printed, and drawn beside another server's.
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_owned();
    let (record, svg) = (path("sweep.jsonl"), path("sweep.svg"));
    for label in ["one", "other"] {
        let sweep = ["--max-concurrency", "1,3,2", "--record", &record, "--label", label];
        let found = objects(&ok(&[&["bench", "serve"], common.as_slice(), &sweep].concat()));
        let sent: Vec<_> = (found.iter())
            .map(|load| (load["concurrency"].as_u64(), load["report"]["completed"].as_u64()))
            .collect();
        assert_eq!(sent, [(Some(1), Some(4)), (Some(3), Some(6)), (Some(2), Some(4))]);
        let recorded = objects(&std::fs::read_to_string(&record).expect("a record"));
        assert_eq!(recorded[recorded.len() - 3..], found);
    }
    ok(&["bench", "plot", &record, "--out", &svg]);
    let drawn = std::fs::read_to_string(&svg).expect("a plot");
    assert_eq!(drawn.matches("<circle").count(), 6);
    assert!(drawn.contains("one") && drawn.contains("other"));
    std::fs::write(&record, "{}\n{\"label\": 3}\n").expect("a file");
    let said = refused(&["bench", "plot", &record, "--out", &svg]);
    assert!(said.contains("sweep.jsonl:1") && said.contains("--record"), "{said}");
    let said = refused(&["bench", "serve", "--max-concurrency", "4,0"]);
    assert!(said.contains("--max-concurrency"), "{said}");
    // Nothing listens on port 1: the address has to be in the message.
    let said = refused(&["bench", "latency", "--url", "http://127.0.0.1:1"]);
    assert!(said.contains("127.0.0.1:1"), "{said}");
}

/// As `tokenmill ... | head` does, but for certain: whoever reads is gone before the command begins.
#[test]
fn a_reader_that_leaves_is_no_failure() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let config = case("llama/native_tied").join("config.json");
    let config = config.to_str().expect("UTF-8");
    let out = folder.path().join("checkpoint");
    let commands: [&[&str]; 10] = [
        &["--help"],
        &["--version"],
        &["serve", "--help"],
        &["bench", "kernels", "--list"],
        &["model", "explain", config],
        &["model", "random", config, "--out", out.to_str().expect("UTF-8")],
        &["recipe", "list"],
        &["recipe", "plan", "qwen3-8b-cpu"],
        &["recipe", "explain", "qwen3-8b-cpu"],
        &["completions", "bash"],
    ];
    for args in commands {
        let (status, said) = unread(args);
        assert!(status == Some(0) && !said.contains("error"), "{args:?}: {said}");
    }
    // Figures and verdicts that nobody has are another matter.
    let in_full: [&[&str]; 4] = [
        &["bench", "planner", "--steps", "2"],
        &["bench", "planner", "--steps", "2", "--json"],
        &["recipe", "check"],
        &["doctor"],
    ];
    for args in in_full {
        let (status, said) = unread(args);
        assert!(status == Some(141) && said.contains("behind the last line"), "{args:?}: {said}");
    }
}

/// Status, and what stands in standard error, of a command whose standard output nobody reads.
fn unread(args: &[&str]) -> (Option<i32>, String) {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut command = Command::new(program());
    let output = command.args(args).stdin(Stdio::null()).stdout(writer).output();
    let output = output.expect("the binary starts");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_server_goes_on_where_nobody_reads_what_it_tells() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    // Whoever takes a free port and leaves it may lose it to another; then the next one is tried.
    let served = (0..5).any(|_| {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = free.local_addr().expect("an address").port().to_string();
        drop(free);
        let mut command = Command::new(program());
        command.args(["serve", "--fake-engine", "0,0,0", "--max-model-len", "64", "--port", &port]);
        let stdout = writer.try_clone().expect("a writer");
        let mut server = command.stdin(Stdio::null()).stdout(stdout).spawn().expect("it starts");
        let url = format!("http://127.0.0.1:{port}/readyz");
        let ready = || reqwest::blocking::get(&url).is_ok_and(|answer| answer.status() == 200);
        while !ready() && server.try_wait().expect("a status").is_none() {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let lives = server.try_wait().expect("a status").is_none();
        let _ = server.kill();
        server.wait().expect("waited for");
        lives
    });
    assert!(served);
}
