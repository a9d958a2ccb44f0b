//! Compiles every `src/<op>/cuda/*.cu` to a cubin that the library holds as bytes.
//!
//! The compiler is nvcc from `CUDA_HOME`, from the path, or from the Python wheels of a virtual
//! environment. Without it the crate builds all the same, holds no kernels and says why; where
//! `TOKENMILL_REQUIRE` names `cuda` the build fails instead. A file is compiled again only when it,
//! a header or the command changed; two at a time. With `TOKENMILL_JITTER` set, kernels sleep at random
//! where they wait for each other: tests then find what is right only by luck of timing.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs};

/// One target for now: code of one architecture runs on no other, and the `a` has wgmma.
const FLAGS: [&str; 6] = [
    "-cubin",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Werror=all-warnings",
];
const JITTER: &str = "TOKENMILL_JITTER";
const COMPILERS_AT_ONCE: usize = 2;
const HOW: &str = "it was built without nvcc 13.0. Install the CUDA toolkit 13.0, or \
    `pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-runtime==13.0.*' \
    'nvidia-nvvm==13.0.*' 'nvidia-cuda-cccl==13.0.*'` into a virtual environment, set CUDA_HOME to \
    its site-packages/nvidia/cu13, and build again";

fn main() {
    for variable in ["CUDA_HOME", "VIRTUAL_ENV", "PATH", "TOKENMILL_REQUIRE", JITTER] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let (sources, headers) = sources();
    for path in sources.iter().chain(&headers) {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    // A folder is watched for files that come and go.
    println!("cargo:rerun-if-changed=src");
    let required =
        env::var("TOKENMILL_REQUIRE").is_ok_and(|all| all.split(',').any(|r| r == "cuda"));
    let cubins = match find_nvcc() {
        Some(nvcc) => compile(&nvcc, &sources, &headers, &out),
        None if required => panic!("CUDA kernels are required, and {HOW}"),
        None => Vec::new(),
    };
    let mut listing = String::from("pub(crate) static CUBINS: &[device::cuda::Cubin] = &[\n");
    for (name, path) in &cubins {
        listing += &format!(
            "    device::cuda::Cubin {{ name: {name:?}, image: include_bytes!({path:?}) }},\n"
        );
    }
    let jitter = env::var_os(JITTER).is_some();
    listing += &format!("];\npub(crate) const MISSING: &str = {HOW:?};\n");
    listing += &format!("pub(crate) const JITTER: bool = {jitter};\n");
    fs::write(out.join("cubins.rs"), listing).expect("OUT_DIR is writable");
}

/// The kernels of all ops, and the headers that any of them may include.
fn sources() -> (Vec<PathBuf>, Vec<PathBuf>) {
    let mut sources = Vec::new();
    let mut headers = Vec::new();
    for op in entries(Path::new("src")) {
        for path in entries(&op.join("cuda")).into_iter().chain(entries(&op)) {
            match path.extension().and_then(|e| e.to_str()) {
                Some("cu") => sources.push(path),
                Some("cuh") => headers.push(path),
                _ => {}
            }
        }
    }
    (sources, headers)
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    found.sort();
    found
}

fn find_nvcc() -> Option<PathBuf> {
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let environment = env::var_os("VIRTUAL_ENV").map(|venv| PathBuf::from(venv).join("lib"));
    let wheels = environment
        .iter()
        .flat_map(|lib| entries(lib))
        .map(|python| python.join("site-packages/nvidia/cu13/bin"));
    home.into_iter()
        .chain(env::split_paths(&path))
        .chain(wheels)
        .map(|folder| folder.join("nvcc"))
        .find(|nvcc| nvcc.is_file())
}

/// Compiles what changed; returns name and cubin of every source.
fn compile(
    nvcc: &Path,
    sources: &[PathBuf],
    headers: &[PathBuf],
    out: &Path,
) -> Vec<(String, PathBuf)> {
    let mut common = DefaultHasher::new();
    let jitter = env::var_os(JITTER).map(|_| "-DTOKENMILL_JITTER");
    (nvcc, FLAGS, jitter).hash(&mut common);
    for header in headers {
        fs::read(header).expect("a header that was just listed").hash(&mut common);
    }
    let jobs: Vec<(String, PathBuf)> = sources
        .iter()
        .map(|source| {
            let stem = source.file_stem().expect("a file").to_string_lossy().into_owned();
            let cubin = out.join(&stem).with_extension("cubin");
            (stem, cubin)
        })
        .collect();
    let next = Mutex::new(sources.iter().zip(&jobs));
    std::thread::scope(|scope| {
        for _ in 0..COMPILERS_AT_ONCE {
            scope.spawn(|| {
                loop {
                    let taken = next.lock().expect("no compiler panicked").next();
                    let Some((source, (_, cubin))) = taken else { return };
                    let mut hash = common.clone();
                    fs::read(source).expect("a source that was just listed").hash(&mut hash);
                    compile_one((nvcc, jitter), source, cubin, &hash.finish().to_string());
                }
            });
        }
    });
    jobs
}

/// `stamp` says of what the cubin was made.
fn compile_one((nvcc, more): (&Path, Option<&str>), source: &Path, cubin: &Path, stamp: &str) {
    let stamp_file = cubin.with_extension("stamp");
    if cubin.is_file() && fs::read_to_string(&stamp_file).is_ok_and(|made| made == stamp) {
        return;
    }
    let _ = fs::remove_file(&stamp_file);
    let output = Command::new(nvcc)
        .args(FLAGS)
        .args(more)
        .args(["-I", "src", "-o"])
        .arg(cubin)
        .arg(source)
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", nvcc.display()));
    assert!(
        output.status.success(),
        "nvcc {}:\n{}",
        source.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    fs::write(stamp_file, stamp).expect("OUT_DIR is writable");
}
