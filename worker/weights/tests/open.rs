//! Opening checkpoints: what a good one gives, and how each kind of damage is refused.

#![allow(clippy::unwrap_used, reason = "a test panics when what it set up is not there")]

mod common;

use common::{f32s, file, tensors, write_index};
use std::fs;
use std::path::Path;
use tempfile::TempDir;
use weights::{Checkpoint, CheckpointError, Defect, Dtype, Slice};

fn folder(files: &[(&str, Vec<u8>)]) -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).expect("a writable folder");
    }
    dir
}

fn refusal(bytes: Vec<u8>) -> Defect {
    let dir = folder(&[("model.safetensors", bytes)]);
    match Checkpoint::open(dir.path()).expect_err("a damaged file") {
        CheckpointError::Damaged { file, defect } => {
            assert!(file.ends_with("model.safetensors"));
            defect
        }
        other => panic!("{other}"),
    }
}

fn entry(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"a.weight":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
}

#[test]
fn one_file_gives_its_tensors_without_a_copy() {
    let values = [1.5, -2.0, 0.25, 8.0, 3.0, -1.0];
    let bytes = tensors(&[
        ("a.weight", "F32", &[2, 3], &f32s(&values)),
        ("b.bias", "BF16", &[2], &[0x80, 0x3f, 0x00, 0xc0]),
        ("c", "F16", &[1, 1], &[0x00, 0x3c]),
        ("empty", "F32", &[0, 7], &[]),
        ("scalar", "I64", &[], &[7, 0, 0, 0, 0, 0, 0, 0]),
    ]);
    let dir = folder(&[("model.safetensors", bytes)]);
    let checkpoint = Checkpoint::open(dir.path()).expect("a good file");
    assert_eq!(checkpoint.tensors().len(), 5);
    assert_eq!(checkpoint.data_bytes(), 24 + 4 + 2 + 8);
    let a = checkpoint.tensor("a.weight").expect("there");
    assert_eq!((a.dtype, a.shape), (Dtype::F32, &[2, 3][..]));
    let Some(Slice::F32(slice)) = a.slice() else { panic!("not borrowed") };
    assert_eq!(slice, values);
    assert_eq!(slice.as_ptr().cast(), a.bytes.as_ptr());
    assert_eq!(checkpoint.tensor("b.bias").unwrap().to_f32().unwrap().as_ref(), [1.0, -2.0]);
    assert_eq!(checkpoint.tensor("c").unwrap().to_f32().unwrap().as_ref(), [1.0]);
    assert!(checkpoint.tensor("empty").unwrap().slice().unwrap().is_empty());
    let scalar = checkpoint.tensor("scalar").unwrap();
    assert!(scalar.slice().is_none());
    assert!(matches!(scalar.to_f32(), Err(CheckpointError::WrongDtype { .. })));
    assert!(matches!(
        checkpoint.tensor("a.weigth"),
        Err(CheckpointError::NoTensor { tensor, .. }) if tensor == "a.weigth"
    ));
    let wrong = a.expect_shape(&[3, 2]).expect_err("another shape").to_string();
    assert!(wrong.contains("[2, 3]") && wrong.contains("[3, 2]"), "{wrong}");
}

#[test]
fn misaligned_data_is_copied() {
    // A header of odd length puts the data at an odd address.
    let header = entry("F32", "[2]", "[0,8]");
    let header = if header.len().is_multiple_of(2) { header + " " } else { header };
    let dir = folder(&[("model.safetensors", file(&header, &f32s(&[4.0, -0.5])))]);
    let checkpoint = Checkpoint::open(dir.path()).expect("a good file");
    let a = checkpoint.tensor("a.weight").unwrap();
    assert!(a.slice().is_none());
    assert_eq!(a.to_buffer().unwrap().slice(), Slice::F32(&[4.0, -0.5]));
}

#[test]
fn headers_that_lie_are_refused() {
    let data = [0u8; 8];
    assert!(matches!(refusal(vec![1, 2, 3]), Defect::NoHeader { len: 3 }));
    assert!(matches!(refusal(Vec::new()), Defect::NoHeader { len: 0 }));
    for header in [u64::MAX, u64::MAX - 7, 100_000_001, 9] {
        let mut bytes = header.to_le_bytes().to_vec();
        bytes.extend_from_slice(b"{}      ");
        assert!(matches!(refusal(bytes), Defect::HeaderLength { header: h, .. } if h == header));
    }
    for text in ["", "[]", "{", "{}x", "{\"a\":1}", "\u{1}"] {
        assert!(matches!(refusal(file(text, &[])), Defect::Json { .. }), "{text}");
    }
    for (dtype, shape, offsets) in [
        ("F99", "[2]", "[0,8]"),
        ("F32", "[-2]", "[0,8]"),
        ("F32", "[2]", "[-8,0]"),
        ("F32", "[2]", "[0,99999999999999999999]"),
        ("F32", "[2.5]", "[0,8]"),
    ] {
        let defect = refusal(file(&entry(dtype, shape, offsets), &data));
        let Defect::Json { reason, .. } = &defect else { panic!("{defect}") };
        assert!(reason.to_string().contains("a.weight"), "{reason}");
    }
    for (dtype, shape, offsets) in [
        ("BF16", "[2]", "[0,8]"),
        ("F32", "[2]", "[8,0]"),
        ("F32", "[3]", "[0,8]"),
        ("F32", "[4611686018427387904,4]", "[0,8]"),
        ("F4", "[3]", "[0,8]"),
        ("F32", "[2]", "[0,18446744073709551615]"),
    ] {
        let defect = refusal(file(&entry(dtype, shape, offsets), &data));
        assert!(
            matches!(&defect, Defect::Extent { tensor, .. } if tensor == "a.weight"),
            "{defect}"
        );
    }
}

#[test]
fn layouts_that_do_not_tile_the_file_are_refused() {
    let two = |second: &str, data: usize| {
        let header = format!(
            r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}},"b":{{"dtype":"F32","shape":[1],"data_offsets":{second}}}}}"#
        );
        refusal(file(&header, &vec![0; data]))
    };
    let overlap = two("[4,8]", 8);
    assert!(matches!(&overlap, Defect::Layout { tensor, .. } if tensor == "b"), "{overlap}");
    assert!(matches!(two("[12,16]", 16), Defect::Layout { tensor, .. } if tensor == "b"));
    assert!(matches!(two("[8,12]", 13), Defect::Trailing { .. }));
    let cut = two("[8,12]", 11);
    let Defect::PastEnd { tensor, bytes, len } = &cut else { panic!("{cut}") };
    assert_eq!((tensor.as_str(), bytes.end - len), ("b", 1));
    let text = cut.to_string();
    assert!(text.contains("`b`") && text.contains(&bytes.start.to_string()), "{text}");
}

#[test]
fn a_name_may_stand_once() {
    let one = r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    let defect = refusal(file(&format!("{{{one},{one}}}"), &[0; 4]));
    let Defect::Json { reason, .. } = &defect else { panic!("{defect}") };
    assert!(reason.to_string().contains("`a` stands twice"), "{reason}");
}

const ONE: &str = "model-00001-of-00002.safetensors";
const TWO: &str = "model-00002-of-00002.safetensors";

fn sharded(map: &[(&str, &str)]) -> Result<Checkpoint, CheckpointError> {
    let dir = folder(&[
        (ONE, tensors(&[("a", "F32", &[1], &f32s(&[1.0]))])),
        (TWO, tensors(&[("b", "F32", &[1], &f32s(&[2.0])), ("c", "F32", &[1], &f32s(&[3.0]))])),
    ]);
    write_index(dir.path(), map);
    Checkpoint::open(dir.path())
}

#[test]
fn shards_are_read_through_the_index() {
    let checkpoint = sharded(&[("a", ONE), ("b", TWO), ("c", TWO)]).expect("a good checkpoint");
    let values: Vec<f32> =
        checkpoint.tensors().map(|tensor| tensor.to_f32().expect("F32")[0]).collect();
    assert_eq!(values, [1.0, 2.0, 3.0]);
}

#[test]
fn an_index_that_disagrees_with_its_files_is_refused() {
    let defect = |map: &[(&str, &str)]| match sharded(map).expect_err("a wrong index") {
        CheckpointError::Damaged { file, defect } => (file, defect),
        other => panic!("{other}"),
    };
    let (file, missing) = defect(&[("a", ONE), ("b", TWO), ("c", TWO), ("d", ONE)]);
    assert!(file.ends_with(ONE));
    assert!(matches!(missing, Defect::Missing { tensor } if tensor == "d"));
    let (file, unlisted) = defect(&[("a", ONE), ("b", TWO)]);
    assert!(file.ends_with(TWO));
    assert!(matches!(unlisted, Defect::Unlisted { tensor, at } if tensor == "c" && at > 8));
    let (_, elsewhere) = defect(&[("a", ONE), ("b", TWO), ("c", ONE)]);
    assert!(matches!(elsewhere, Defect::Duplicate { tensor, .. } if tensor == "c"));
    for target in [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..",
        "x.bin",
        "",
        ".safetensors",
        "..\\\\x.safetensors",
        "C:x.safetensors",
        "a\\u0000.safetensors",
    ] {
        let (file, escape) = defect(&[("a", ONE), ("b", target)]);
        assert!(file.ends_with("model.safetensors.index.json"));
        assert!(matches!(escape, Defect::Escape { tensor, .. } if tensor == "b"), "{target}");
    }
    let (_, twice) = defect(&[("a", ONE), ("a", TWO)]);
    assert!(matches!(twice, Defect::Json { .. }));
    let gone = sharded(&[("a", ONE), ("b", "model-3.safetensors")]).expect_err("no such file");
    assert!(matches!(&gone, CheckpointError::NoFile { tensor, .. } if tensor == "b"), "{gone}");
}

#[test]
fn a_folder_without_one_clear_checkpoint_is_refused() {
    let open = |dir: &Path| Checkpoint::open(dir).expect_err("no checkpoint");
    let dir = folder(&[("pytorch_model.bin", vec![0; 16])]);
    assert!(matches!(open(dir.path()), CheckpointError::NoWeights { .. }));
    assert!(matches!(open(&dir.path().join("absent")), CheckpointError::NoWeights { .. }));
    let dir = folder(&[
        ("model.safetensors", tensors(&[])),
        (ONE, tensors(&[("a", "F32", &[1], &f32s(&[1.0]))])),
    ]);
    write_index(dir.path(), &[("a", ONE)]);
    assert!(matches!(open(dir.path()), CheckpointError::Ambiguous { .. }));
    let dir = tempfile::tempdir().expect("a temporary folder");
    fs::create_dir(dir.path().join("model.safetensors")).expect("a writable folder");
    assert!(matches!(open(dir.path()), CheckpointError::Io { .. }));
}
