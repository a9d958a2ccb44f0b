//! Writes a copy of the scheduler, the cache and the simulator into one file, with a switch for
//! every planted bug, so that `tests/planted` can run each of them without a build of its own.
//!
//! Modules are put inline, paths into the three crates become paths into the copy, and every bug's
//! line becomes one that asks whether the bug is active. A bug whose line is not found any more is
//! listed for the test to complain. Invariant: nothing of the copy is in the library or the binary.

#[path = "tests/planted/bugs.rs"]
mod bugs;

use bugs::{BUGS, UNFAIR};
use std::fs;
use std::path::{Path, PathBuf};

/// Crates of the copy, by name in code and folder from here, and whom each of them names.
const CRATES: [(&str, &str, &[&str]); 3] = [
    ("kv_cache", "../../control-plane/kv-cache", &[]),
    ("scheduler", "../../control-plane/scheduler", &["kv_cache"]),
    ("sim", "../sim", &["kv_cache", "scheduler"]),
];

fn main() {
    let here = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    println!("cargo:rerun-if-changed=tests/planted/bugs.rs");
    let mut found = vec![false; BUGS.len() + UNFAIR.len()];
    let mut copy = String::new();
    for (name, folder, uses) in CRATES {
        println!("cargo:rerun-if-changed={folder}/src");
        let folder = here.join(folder);
        let krate = folder.canonicalize().expect("a crate");
        let krate = krate.file_name().expect("a folder").to_string_lossy().into_owned();
        let source = Source { src: folder.join("src"), krate, name, uses };
        let text = source.module(&folder.join("src/lib.rs"), &folder.join("src"), &mut found);
        copy += &format!("pub mod {name} {{\n{text}\n}}\n");
    }
    copy += &promises(&here);
    let missing: Vec<_> = BUGS
        .iter()
        .chain(UNFAIR)
        .zip(found)
        .filter(|(_, found)| !found)
        .map(|(bug, _)| bug.name)
        .collect();
    copy += &format!("pub const NOT_FOUND: &[&str] = &{missing:?};\n");
    fs::write(out.join("planted.rs"), copy).expect("the output folder is writable");
}

struct Source {
    src: PathBuf,
    krate: String,
    name: &'static str,
    uses: &'static [&'static str],
}

impl Source {
    /// A file with its modules inline; those of tests are left out.
    fn module(&self, file: &Path, folder: &Path, found: &mut [bool]) -> String {
        let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{file:?}: {error}"));
        let mut text = self.paths(&self.plant(file, text, found));
        text = text.replace("#[cfg(test)]", "#[cfg(any())]");
        let mut whole = String::new();
        let mut tests = false;
        for line in text.lines() {
            let child = line.trim().strip_suffix(';').and_then(|line| {
                let (vis, name) = line.split_once("mod ")?;
                (vis.is_empty() || vis.starts_with("pub"))
                    .then(|| (vis.to_owned(), name.to_owned()))
            });
            match child {
                Some((vis, name)) if !tests => {
                    let flat = folder.join(format!("{name}.rs"));
                    let below = folder.join(&name);
                    let file = if flat.exists() { flat } else { below.join("mod.rs") };
                    let text = self.module(&file, &below, found);
                    whole += &format!("{vis}mod {name} {{\n{text}\n}}\n");
                }
                // The attribute of a module of tests has to stand before something.
                Some((_, name)) => whole += &format!("mod {name} {{}}\n"),
                None => whole += &format!("{line}\n"),
            }
            tests = line.trim() == "#[cfg(any())]";
        }
        whole
    }

    /// Every bug of the file, asleep.
    fn plant(&self, file: &Path, mut text: String, found: &mut [bool]) -> String {
        for (at, bug) in BUGS.iter().chain(UNFAIR).enumerate() {
            let (krate, name) = bug.file;
            if krate == self.krate && file == self.src.join(name) && text.contains(bug.from) {
                found[at] = true;
                let to = bug.to.replace("PLANTED", &format!("on({at})"));
                text = text.replacen(bug.from, &to.replace("on(", "crate::switch::on("), 1);
            }
        }
        text
    }

    /// Paths into the crates of the copy, wherever they are named.
    fn paths(&self, text: &str) -> String {
        let mut text = text.replace("crate::switch", "@switch");
        text = text.replace("crate::", &format!("crate::planted::{}::", self.name));
        extern_paths(text, self.uses).replace("@switch", "crate::switch")
    }
}

/// Paths that begin with a crate of the copy.
fn extern_paths(mut text: String, crates: &[&str]) -> String {
    for name in crates {
        let named = format!("{name}::");
        let mut parts = text.split(&named);
        let mut joined = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let inside = |c: char| c == ':' || c == '_' || c.is_alphanumeric();
            let extern_path = !joined.ends_with(inside);
            joined += if extern_path { "crate::planted::" } else { "" };
            joined += &named;
            joined += part;
        }
        text = joined;
    }
    text
}

/// The tests of fairness and overload as functions over the copy, and a list of them.
fn promises(here: &Path) -> String {
    let (mut modules, mut names) = (String::new(), String::new());
    for name in ["fairness", "overload"] {
        println!("cargo:rerun-if-changed=tests/{name}.rs");
        let file = here.join("tests").join(format!("{name}.rs"));
        let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{file:?}: {error}"));
        let text = extern_paths(text, &["scheduler", "sim"]);
        for test in text.split("#[test]\nfn ").skip(1) {
            let test = test.split('(').next().unwrap_or_default();
            names += &format!("(\"{test}\", {name}::{test}), ");
        }
        modules += &format!("pub mod {name} {{\n{}\n}}\n", text.replace("#[test]\nfn ", "pub fn "));
    }
    format!("{modules}pub const PROMISES: &[(&str, fn())] = &[{names}];\n")
}
