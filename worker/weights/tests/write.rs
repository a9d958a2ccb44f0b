//! Random checkpoints on disk: what was written opens, holds the values made in memory, and an
//! existing checkpoint is left alone.

#![allow(clippy::unwrap_used, reason = "a test panics when what it set up is not there")]

use safetensors::SafeTensors;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use weights::progress::Silent;
use weights::random::{Profile, RandomError, RandomModel, TensorSpec};
use weights::{
    Checkpoint, Dtype, LoadOptions, Weights, WriteError, WriteOptions, Written, write_random,
};

fn specs() -> Vec<TensorSpec> {
    let spec = |name: &str, shape: &[usize], dtype| TensorSpec {
        name: name.into(),
        shape: shape.to_vec(),
        dtype,
    };
    vec![
        spec("model.embed_tokens.weight", &[1031, 1033], Dtype::BF16),
        spec("model.layers.0.input_layernorm.weight", &[33], Dtype::BF16),
        spec("model.layers.0.mlp.gate.weight", &[5, 33], Dtype::BF16),
        spec("model.layers.0.mlp.gate.e_score_correction_bias", &[5], Dtype::F32),
        spec("model.layers.0.mlp.experts.0.up_proj.weight", &[7, 33], Dtype::F16),
        spec("lm_head.weight", &[0, 33], Dtype::BF16),
    ]
}

const MODEL: RandomModel =
    RandomModel { seed: 42, profile: Profile::Realistic, tied_embeddings: false };

struct Run {
    dir: TempDir,
    out: PathBuf,
    written: Result<Written, WriteError>,
}

fn write(shard_bytes: u64, threads: usize, specs: Vec<TensorSpec>) -> Run {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("tiny.json");
    fs::write(&config, "{\"model_type\": \"x\"}\n").unwrap();
    let out = dir.path().join("made/here");
    let options = WriteOptions { shard_bytes, threads };
    let written = write_random(&out, &config, &MODEL, specs, &options, &Silent);
    Run { dir, out, written }
}

fn assert_holds_the_values_made_in_memory(out: &Path) {
    let specs = specs();
    let memory = Weights::random(&MODEL, &specs, 1, &Silent).unwrap();
    let checkpoint = Checkpoint::open(out).unwrap();
    let wanted = specs.iter().map(|spec| (spec.name.as_str(), spec.shape.as_slice()));
    let disk = Weights::load(&checkpoint, wanted, &LoadOptions::default(), &Silent).unwrap();
    assert_eq!(disk.made_bytes(), 0, "every tensor lies aligned");
    assert!(disk.unused().is_empty());
    for spec in &specs {
        assert_eq!(checkpoint.tensor(&spec.name).unwrap().dtype, spec.dtype);
        assert_eq!(
            disk.get(&spec.name).unwrap().data,
            memory.get(&spec.name).unwrap().data,
            "{}",
            spec.name
        );
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_small_model_is_one_file() {
    for threads in [1, 3] {
        let run = write(u64::MAX, threads, specs());
        let written = run.written.unwrap();
        assert_eq!(names(&run.out), ["config.json", "model.safetensors"]);
        assert_eq!(fs::read(run.out.join("config.json")).unwrap(), b"{\"model_type\": \"x\"}\n");
        assert_holds_the_values_made_in_memory(&run.out);
        let bytes = fs::read(&written.files[0]).unwrap();
        let theirs = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(theirs.len(), specs().len());
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let notes = metadata.metadata().as_ref().unwrap();
        assert_eq!(notes["format"], "pt");
        assert_eq!(notes["random"], "seed 42, profile Realistic");
    }
}

#[test]
fn a_larger_one_is_sharded_under_an_index() {
    // The embedding passes the limit alone; norm, router and bias (416 bytes) share the next file.
    let run = write(500, 2, specs());
    let written = run.written.unwrap();
    assert_eq!(
        names(&run.out),
        [
            "config.json",
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json",
        ]
    );
    assert_eq!(written.files.len(), 3);
    let lens: Vec<u64> = specs().iter().map(|spec| spec.byte_len().unwrap()).collect();
    assert_eq!(written.data_bytes, lens.iter().sum::<u64>());
    assert_holds_the_values_made_in_memory(&run.out);
    let index = fs::read_to_string(run.out.join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    assert_eq!(index["metadata"]["total_size"], written.data_bytes);
}

#[test]
fn what_cannot_be_made_leaves_nothing_behind() {
    let with = |name: &str, shape: &[usize], dtype| {
        let mut list = specs();
        list.push(TensorSpec { name: name.into(), shape: shape.to_vec(), dtype });
        write(u64::MAX, 2, list)
    };
    let no_law = with("model.layers.0.scale", &[2, 2], Dtype::F32);
    assert!(matches!(no_law.written, Err(WriteError::Random(RandomError::NoLaw { .. }))));
    let wrong_type = with("a.weight", &[2, 2], Dtype::I64);
    assert!(matches!(wrong_type.written, Err(WriteError::Random(RandomError::Dtype { .. }))));
    let too_large = with("a.weight", &[usize::MAX, 2], Dtype::F32);
    assert!(matches!(too_large.written, Err(WriteError::Random(RandomError::TooLarge { .. }))));
    let twice = with("lm_head.weight", &[1, 33], Dtype::F32);
    assert!(
        matches!(twice.written, Err(WriteError::Twice { tensor }) if tensor == "lm_head.weight")
    );
    for run in [no_law.out, wrong_type.out, too_large.out, twice.out] {
        assert!(!run.exists());
    }
}

#[test]
fn an_existing_checkpoint_is_not_touched() {
    let run = write(u64::MAX, 1, specs());
    let before = fs::read(run.out.join("model.safetensors")).unwrap();
    let again = || {
        let config = run.dir.path().join("tiny.json");
        let other = RandomModel { seed: 43, ..MODEL };
        write_random(&run.out, &config, &other, specs(), &WriteOptions::default(), &Silent)
    };
    assert!(matches!(
        again(),
        Err(WriteError::Exists { file }) if file.ends_with("model.safetensors")
    ));
    assert_eq!(fs::read(run.out.join("model.safetensors")).unwrap(), before);
    fs::rename(run.out.join("model.safetensors"), run.out.join("model.safetensors.index.json"))
        .unwrap();
    assert!(matches!(again(), Err(WriteError::Exists { .. })));
}

#[test]
fn an_unusable_folder_or_config_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.json");
    let call =
        |out: &Path| write_random(out, &config, &MODEL, specs(), &WriteOptions::default(), &Silent);
    let absent = call(&dir.path().join("out"));
    assert!(matches!(absent, Err(WriteError::Config { path, .. }) if path == config));
    fs::write(&config, "{}").unwrap();
    // A file stands where the folder should be.
    let out = config.join("out");
    assert!(matches!(call(&out), Err(WriteError::Io { path, .. }) if path == out));
    // The folder of the config itself will do.
    call(dir.path()).unwrap();
    assert_holds_the_values_made_in_memory(dir.path());
}
