//! Fetching from a hub: whole, broken, moved meanwhile, gated, lying, absent.

#![allow(clippy::unwrap_used, reason = "a test panics when what it set up is not there")]

#[path = "../common/mod.rs"]
mod common;
mod server;

use common::{f32s, tensors};
use server::{Blob, Hub, REPO, State};
use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;
use tempfile::TempDir;
use weights::Checkpoint;
use weights::hub::{HubError, Origin, Request, Snapshot, Token, fetch};
use weights::progress::{Progress, Silent, Stage};

const ONE: &str = "model-00001-of-00002.safetensors";
const TWO: &str = "model-00002-of-00002.safetensors";

fn commit(digit: char) -> String {
    digit.to_string().repeat(40)
}

/// A sharded model whose tensors and config hold `value`, among files that are not to be fetched.
fn model(value: f32) -> Vec<(&'static str, Blob)> {
    let shard = |name: &str, elements: usize| {
        Blob::large(tensors(&[(name, "F32", &[elements], &f32s(&vec![value; elements]))]))
    };
    let index = format!(r#"{{"weight_map":{{"a.weight":"{ONE}","b.weight":"{TWO}"}}}}"#);
    vec![
        ("config.json", Blob::small(&format!("{{\"value\": {value}}}"))),
        ("generation_config.json", Blob::small("{}")),
        ("tokenizer.json", Blob::large(b"{\"model\": {}}".to_vec())),
        ("tokenizer_config.json", Blob::small("{\"x\": 1}")),
        ("chat_template.jinja", Blob::small("{{ messages }}")),
        ("model.safetensors.index.json", Blob::small(&index)),
        (ONE, shard("a.weight", 1000)),
        (TWO, shard("b.weight", 70_000)),
        ("consolidated.safetensors", Blob::large(vec![1; 100])),
        ("pytorch_model.bin", Blob::large(vec![2; 100])),
        ("modeling_tiny.py", Blob::small("import os")),
        ("original/params.json", Blob::small("{}")),
        ("README.md", Blob::small("# Tiny")),
    ]
}

fn hub_of(files: Vec<(&str, Blob)>) -> Hub {
    let mut state = State::default();
    let files = files.into_iter().map(|(name, blob)| (name.to_owned(), blob)).collect();
    state.commits.insert(commit('a'), files);
    state.branches.insert("main".into(), commit('a'));
    Hub::start(state)
}

fn request(hub: &Hub, cache: &TempDir) -> Request {
    Request {
        endpoint: hub.endpoint(),
        retry_pause: Duration::from_millis(1),
        ..Request::new(REPO, cache.path().to_owned())
    }
}

fn cache() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// The one value that a snapshot's config and tensors hold.
fn assert_is_model(snapshot: &Snapshot, value: f32) {
    assert_eq!(
        names(&snapshot.dir),
        [
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            ONE,
            TWO,
            "model.safetensors.index.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    );
    let config = fs::read_to_string(snapshot.dir.join("config.json")).unwrap();
    assert_eq!(config, format!("{{\"value\": {value}}}"));
    let checkpoint = Checkpoint::open(&snapshot.dir).unwrap();
    assert_eq!(checkpoint.tensors().len(), 2);
    for tensor in checkpoint.tensors() {
        assert!(tensor.to_f32().unwrap().iter().all(|&x| x == value), "{}", tensor.name);
    }
}

fn files_asked_for(hub: &Hub) -> Vec<String> {
    let state = hub.state();
    let files = state.seen.iter().filter(|seen| seen.path.contains("/resolve/"));
    files.map(|seen| seen.path.rsplit('/').next().unwrap().to_owned()).collect()
}

#[test]
fn a_whole_model_is_fetched_once_and_only_its_data() {
    struct Last(Mutex<Vec<(u64, u64)>>);
    impl Progress for Last {
        fn report(&self, stage: Stage, done: u64, total: u64) {
            assert_eq!(stage, Stage::Download);
            self.0.lock().unwrap().push((done, total));
        }
    }
    let (hub, cache) = (hub_of(model(1.0)), cache());
    let progress = Last(Mutex::new(Vec::new()));
    let snapshot = fetch(&request(&hub, &cache), &progress).unwrap();
    assert_eq!((snapshot.commit.clone(), snapshot.origin), (commit('a'), Origin::Hub));
    assert_is_model(&snapshot, 1.0);
    let mut asked = files_asked_for(&hub);
    asked.sort();
    assert_eq!(asked, names(&snapshot.dir), "each file once, and no other");
    let seen = progress.0.into_inner().unwrap();
    let total = seen[0].1;
    let listed: usize = model(1.0)
        .iter()
        .filter(|(n, _)| asked.contains(&(*n).to_owned()))
        .map(|(_, b)| b.content.len())
        .sum();
    assert_eq!((total, *seen.last().unwrap()), (listed as u64, (total, total)));
    // The layout is the one of the hub's own tools.
    let folder = cache.path().join("models--acme--tiny-model");
    assert_eq!(fs::read_to_string(folder.join("refs/main")).unwrap(), commit('a'));
    assert_eq!(snapshot.dir, folder.join("snapshots").join(commit('a')));
    let link = fs::read_link(snapshot.dir.join(TWO)).unwrap();
    let digest = model(1.0).iter().find(|(n, _)| *n == TWO).unwrap().1.sha256();
    assert_eq!(link, Path::new("../../blobs").join(digest));
    assert!(names(&folder.join("blobs")).iter().all(|name| !name.ends_with(".incomplete")));
    // A second call asks for the listing only.
    hub.state().seen.clear();
    assert_is_model(&fetch(&request(&hub, &cache), &Silent).unwrap(), 1.0);
    assert_eq!(hub.state().seen.len(), 1);
}

#[test]
fn a_model_in_one_file_needs_no_index() {
    let cache = cache();
    let single = tensors(&[("a.weight", "F32", &[2], &f32s(&[1.0, 2.0]))]);
    let hub = hub_of(vec![
        ("config.json", Blob::small("{}")),
        ("model.safetensors", Blob::large(single)),
    ]);
    let snapshot = fetch(&request(&hub, &cache), &Silent).unwrap();
    assert_eq!(names(&snapshot.dir), ["config.json", "model.safetensors"]);
    assert_eq!(Checkpoint::open(&snapshot.dir).unwrap().tensors().len(), 1);
}

#[test]
fn a_cut_connection_is_taken_up_where_it_broke() {
    let (hub, cache) = (hub_of(model(1.0)), cache());
    hub.state().cut = Some((TWO.into(), 100_000, 2));
    assert_is_model(&fetch(&request(&hub, &cache), &Silent).unwrap(), 1.0);
    let state = hub.state();
    let ranges: Vec<Option<&str>> =
        state.seen.iter().filter(|s| s.path.ends_with(TWO)).map(|s| s.range.as_deref()).collect();
    assert_eq!(ranges, [None, Some("bytes=100000-"), Some("bytes=200000-")]);
}

#[test]
fn a_later_call_takes_up_what_an_earlier_one_left() {
    let (hub, cache) = (hub_of(model(1.0)), cache());
    // The first answer brings 100,000 bytes; those after it bring none.
    hub.state().cut = Some((TWO.into(), 100_000, 1));
    let first = fetch(&request(&hub, &cache), &OneBreak(&hub));
    assert!(
        matches!(&first, Err(HubError::Broken { file, done: 100_000, .. }) if file == TWO),
        "{first:?}"
    );
    hub.state().seen.clear();
    hub.state().cut = None;
    assert_is_model(&fetch(&request(&hub, &cache), &Silent).unwrap(), 1.0);
    let state = hub.state();
    let asked: Vec<Option<&str>> =
        state.seen.iter().filter(|s| s.path.ends_with(TWO)).map(|s| s.range.as_deref()).collect();
    assert_eq!(asked, [Some("bytes=100000-")]);
}

/// After the first cut, every further answer for the file is empty.
struct OneBreak<'a>(&'a Hub);

impl Progress for OneBreak<'_> {
    fn report(&self, _: Stage, _: u64, _: u64) {
        let mut state = self.0.state();
        if state.cut.as_ref().is_some_and(|(_, _, times)| *times == 0) {
            state.cut = Some((TWO.into(), 0, u32::MAX));
        }
    }
}

#[test]
fn a_server_without_ranges_sends_the_file_anew() {
    let (hub, cache) = (hub_of(model(1.0)), cache());
    hub.state().no_ranges = true;
    hub.state().cut = Some((TWO.into(), 100_000, 1));
    assert_is_model(&fetch(&request(&hub, &cache), &Silent).unwrap(), 1.0);
}

#[test]
fn overload_passes_and_refusals_do_not() {
    let (hub, cache) = (hub_of(model(1.0)), cache());
    hub.state().failing = Some((TWO, 503, 2));
    assert_is_model(&fetch(&request(&hub, &cache), &Silent).unwrap(), 1.0);
    assert_eq!(files_asked_for(&hub).iter().filter(|name| *name == TWO).count(), 3);
    let cache = tempfile::tempdir().unwrap();
    hub.state().failing = Some((TWO, 429, u32::MAX));
    assert!(matches!(fetch(&request(&hub, &cache), &Silent), Err(HubError::Broken { .. })));
    hub.state().seen.clear();
    hub.state().failing = Some((TWO, 410, u32::MAX));
    assert!(matches!(
        fetch(&request(&hub, &cache), &Silent),
        Err(HubError::Status { status: 410, .. })
    ));
    assert_eq!(files_asked_for(&hub).iter().filter(|name| *name == TWO).count(), 1);
}

#[test]
fn leftovers_that_are_of_no_use_are_dropped() {
    let size = model(1.0).iter().find(|(n, _)| *n == TWO).unwrap().1.content.len();
    for (left, refused_once) in
        [(vec![7; size + 1], false), (vec![7; size], true), (vec![7; 9], true)]
    {
        let (hub, cache) = (hub_of(model(1.0)), cache());
        let blobs = cache.path().join("models--acme--tiny-model/blobs");
        let digest = model(1.0).iter().find(|(n, _)| *n == TWO).unwrap().1.sha256();
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(format!("{digest}.incomplete")), left).unwrap();
        if refused_once {
            let refused = fetch(&request(&hub, &cache), &Silent);
            assert!(matches!(refused, Err(HubError::Digest { .. })), "{refused:?}");
        }
        assert_is_model(&fetch(&request(&hub, &cache), &Silent).unwrap(), 1.0);
    }
}

#[test]
fn one_commit_though_main_moves_meanwhile() {
    let (hub, cache) = (hub_of(model(1.0)), cache());
    let newer = model(2.0).into_iter().map(|(name, blob)| (name.to_owned(), blob)).collect();
    hub.state().commits.insert(commit('b'), newer);
    hub.state().moves_to = Some(commit('b'));
    let snapshot = fetch(&request(&hub, &cache), &Silent).unwrap();
    assert_eq!(snapshot.commit, commit('a'));
    assert_is_model(&snapshot, 1.0);
    let by_commit = hub
        .state()
        .seen
        .iter()
        .filter(|s| s.path.contains("/resolve/"))
        .all(|s| s.path.contains(&commit('a')));
    assert!(by_commit, "every file is asked for by the commit");
    // The next call follows the branch, and leaves the first snapshot as it is.
    let next = fetch(&request(&hub, &cache), &Silent).unwrap();
    assert_eq!(next.commit, commit('b'));
    assert_is_model(&next, 2.0);
    assert_is_model(&snapshot, 1.0);
    // The old commit is there without a word to the hub.
    hub.state().seen.clear();
    let pinned = Request { revision: commit('a'), ..request(&hub, &cache) };
    let pinned = fetch(&pinned, &Silent).unwrap();
    assert_eq!((pinned.dir, pinned.origin), (snapshot.dir, Origin::Pinned));
    assert!(hub.state().seen.is_empty());
}

#[test]
fn wrong_sizes_are_refused() {
    for (listed, name) in [(999, ONE), (5_000, ONE), (1, "config.json")] {
        let (hub, cache) = (hub_of(model(1.0)), cache());
        let true_size = {
            let mut state = hub.state();
            let blob = state.commits.get_mut(&commit('a')).unwrap().get_mut(name).unwrap();
            blob.listed_size = Some(listed);
            blob.content.len() as u64
        };
        let refused = fetch(&request(&hub, &cache), &Silent);
        assert!(
            matches!(&refused, Err(HubError::Size { file, listed: l, sent })
                if file == name && *l == listed && *sent == true_size),
            "{refused:?}"
        );
        assert!(!cache.path().join("models--acme--tiny-model/refs/main").exists());
    }
}

#[test]
fn other_bytes_than_listed_are_refused_and_removed() {
    let (hub, cache) = (hub_of(model(1.0)), cache());
    let lie = "0".repeat(64);
    let give = |hub: &Hub, digest: Option<String>| {
        let mut state = hub.state();
        let files = state.commits.get_mut(&commit('a')).unwrap();
        files.get_mut(TWO).unwrap().listed_sha256 = digest;
    };
    give(&hub, Some(lie.clone()));
    let refused = fetch(&request(&hub, &cache), &Silent);
    assert!(
        matches!(&refused, Err(HubError::Digest { file, listed, .. }) if file == TWO && *listed == lie),
        "{refused:?}"
    );
    assert!(!cache.path().join("models--acme--tiny-model/blobs").join(lie).exists());
    give(&hub, None);
    assert_is_model(&fetch(&request(&hub, &cache), &Silent).unwrap(), 1.0);
}

#[test]
fn names_that_leave_the_folder_are_refused() {
    for name in ["../../evil.json", "/etc/evil", "a/../../config.json", "..\\config.json"] {
        let cache = cache();
        let mut files = model(1.0);
        files.push((name, Blob::small("x")));
        let refused = fetch(&request(&hub_of(files), &cache), &Silent);
        assert!(matches!(&refused, Err(HubError::UnsafeName { name: n, .. }) if n == name));
        assert!(names(cache.path()).is_empty(), "nothing was written");
    }
    // The same through the index.
    let cache = cache();
    let mut files = model(1.0);
    for (name, blob) in &mut files {
        if *name == "model.safetensors.index.json" {
            *blob = Blob::small(r#"{"weight_map":{"a.weight":"../../x.safetensors"}}"#);
        }
    }
    let refused = fetch(&request(&hub_of(files), &cache), &Silent);
    assert!(matches!(refused, Err(HubError::BadIndex { .. })));
    for repo in ["../x", "a/../..", "a"] {
        let bad = Request { repo: repo.into(), ..Request::new(REPO, cache.path().to_owned()) };
        assert!(matches!(fetch(&bad, &Silent), Err(HubError::BadRepo { .. })));
    }
    let bad = Request { revision: "../x".into(), ..Request::new(REPO, cache.path().to_owned()) };
    assert!(matches!(fetch(&bad, &Silent), Err(HubError::BadRevision { .. })));
}

#[test]
fn gated_models_want_a_token_that_goes_to_the_hub_only() {
    let (hub, cache) = (hub_of(model(1.0)), cache());
    hub.state().gate = Some("secret".into());
    // Files come from another host: the same server under another name.
    hub.state().elsewhere = Some(format!("http://localhost:{}", hub.address.port()));
    let denied = fetch(&request(&hub, &cache), &Silent).unwrap_err();
    assert!(matches!(denied, HubError::Denied { with_token: false, .. }));
    let text = denied.to_string();
    assert!(text.contains("HF_TOKEN") && text.contains("restricted"), "{text}");
    let wrong = Request { token: Some(Token::new("other")), ..request(&hub, &cache) };
    let denied = fetch(&wrong, &Silent).unwrap_err();
    assert!(matches!(denied, HubError::Denied { with_token: true, .. }));
    let right = Request { token: Some(Token::new("secret\n")), ..request(&hub, &cache) };
    assert!(!format!("{right:?}").contains("secret"));
    hub.state().seen.clear();
    assert_is_model(&fetch(&right, &Silent).unwrap(), 1.0);
    let state = hub.state();
    assert!(state.seen.iter().any(|seen| seen.host.starts_with("localhost")));
    for seen in &state.seen {
        let at_hub = !seen.host.starts_with("localhost");
        assert_eq!(seen.token.is_some(), at_hub, "{seen:?}");
    }
}

#[test]
fn what_is_not_there_is_named() {
    let (hub, cache) = (hub_of(model(1.0)), cache());
    let absent = Request { revision: "v9".into(), ..request(&hub, &cache) };
    let text = fetch(&absent, &Silent).unwrap_err().to_string();
    assert!(
        text.contains(REPO) && text.contains("v9") && text.contains("Invalid rev id"),
        "{text}"
    );
    let other = Request { repo: "acme/other".into(), ..request(&hub, &cache) };
    assert!(matches!(fetch(&other, &Silent), Err(HubError::NotFound { .. })));
    let without = |gone: &str| {
        let files = model(1.0).into_iter().filter(|(name, _)| !name.contains(gone)).collect();
        fetch(&request(&hub_of(files), &cache), &Silent)
    };
    assert!(matches!(without("config.json"), Err(HubError::NoConfig { .. })));
    assert!(matches!(without("00002-of"), Err(HubError::NoWeights { file, .. }) if file == TWO));
    assert!(matches!(
        without(".safetensors"),
        Err(HubError::NoWeights { file, .. }) if file == "model.safetensors"
    ));
}

#[test]
fn without_a_hub_the_cache_serves_and_says_so() {
    // A port that nothing listens on.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (hub, cache) = (hub_of(model(1.0)), cache());
    let online = request(&hub, &cache);
    let offline = Request { endpoint: format!("http://127.0.0.1:{port}"), ..online.clone() };
    let text = fetch(&offline, &Silent).unwrap_err().to_string();
    assert!(text.contains("HF_ENDPOINT") && text.contains(REPO), "{text}");
    let snapshot = fetch(&online, &Silent).unwrap();
    let cached = fetch(&offline, &Silent).unwrap();
    assert_eq!((cached.origin, &cached.dir), (Origin::CacheOnly, &snapshot.dir));
    // A snapshot that lacks a file is none.
    fs::remove_file(snapshot.dir.join(ONE)).unwrap();
    assert!(matches!(fetch(&offline, &Silent), Err(HubError::Offline { .. })));
}

#[test]
fn a_server_that_is_no_hub_is_named() {
    let (hub, cache) = (hub_of(model(1.0)), cache());
    hub.state().failing = Some(("/api/", 503, 1));
    assert!(matches!(
        fetch(&request(&hub, &cache), &Silent),
        Err(HubError::Status { status: 503, .. })
    ));
    let mut state = State::default();
    state.commits.insert("zz".into(), Default::default());
    state.branches.insert("main".into(), "zz".into());
    let refused = fetch(&request(&Hub::start(state), &cache), &Silent);
    assert!(matches!(refused, Err(HubError::BadListing { reason, .. }) if reason.contains("zz")));
}
