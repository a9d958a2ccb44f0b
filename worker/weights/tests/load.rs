//! Loading: what is used as it lies, what is converted, and what of FP8 is refused.

#![allow(clippy::unwrap_used, reason = "a test panics when what it set up is not there")]

mod common;

use common::{f32s, tensors};
use half::bf16;
use std::fs;
use std::sync::Mutex;
use tempfile::TempDir;
use weights::progress::{Progress, Silent, Stage};
use weights::random::{Profile, RandomModel, TensorSpec};
use weights::{Checkpoint, CheckpointError, Defect, Dtype, Float, LoadOptions, Slice, Weights};

fn checkpoint(list: &[(&str, &str, &[usize], &[u8])]) -> (TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("model.safetensors"), tensors(list)).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

fn bf16s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect()
}

#[test]
fn stored_types_are_used_as_they_lie() {
    let (_dir, checkpoint) = checkpoint(&[
        ("m.weight", "BF16", &[2, 2], &bf16s(&[1.0, 2.0, 3.0, 4.0])),
        ("norm.weight", "F32", &[2], &f32s(&[0.5, 0.25])),
        ("extra.weight", "F32", &[1], &f32s(&[9.0])),
    ]);
    let wanted: [(&str, &[usize]); 2] = [("m.weight", &[2, 2]), ("norm.weight", &[2])];
    let weights = Weights::load(&checkpoint, wanted, &LoadOptions::default(), &Silent).unwrap();
    let m = weights.get("m.weight").unwrap();
    let Slice::Bf16(data) = m.data else { panic!("{m:?}") };
    assert_eq!(data.as_ptr().cast(), checkpoint.tensor("m.weight").unwrap().bytes.as_ptr());
    assert_eq!((m.shape, m.data.to_f32()), (&[2, 2][..], vec![1.0, 2.0, 3.0, 4.0]));
    assert_eq!(weights.made_bytes(), 0);
    assert_eq!(weights.unused(), ["extra.weight"]);
    assert!(weights.get("extra.weight").is_none());
    // The weights keep their file mapped by themselves.
    drop(checkpoint);
    assert_eq!(weights.get("norm.weight").unwrap().data.to_f32(), [0.5, 0.25]);
}

#[test]
fn matrices_are_converted_on_request_and_vectors_never() {
    let values = [1.0, 1.0 + 2f32.powi(-9), -3.0, 1e-3, 65504.0, 0.1];
    let (_dir, checkpoint) = checkpoint(&[
        ("m.weight", "F32", &[3, 2], &f32s(&values)),
        ("norm.weight", "F32", &[2], &f32s(&values[..2])),
    ]);
    for (to, expected) in [
        (Float::F32, values.to_vec()),
        (Float::Bf16, values.iter().map(|&v| bf16::from_f32(v).to_f32()).collect()),
        (Float::F16, values.iter().map(|&v| half::f16::from_f32(v).to_f32()).collect()),
    ] {
        let options = LoadOptions { matrices: Some(to), ..LoadOptions::default() };
        let wanted: [(&str, &[usize]); 2] = [("m.weight", &[3, 2]), ("norm.weight", &[2])];
        let weights = Weights::load(&checkpoint, wanted, &options, &Silent).unwrap();
        assert_eq!(weights.get("m.weight").unwrap().data.to_f32(), expected);
        assert_eq!(weights.made_bytes(), if to == Float::F32 { 0 } else { 12 });
        assert!(matches!(weights.get("norm.weight").unwrap().data, Slice::F32(_)));
    }
}

#[test]
fn unaligned_data_is_moved() {
    // One byte in front puts the singles at an odd address.
    let (_dir, checkpoint) =
        checkpoint(&[("a", "U8", &[1], &[1]), ("b.weight", "F32", &[2], &f32s(&[7.0, -8.0]))]);
    let wanted: [(&str, &[usize]); 1] = [("b.weight", &[2])];
    let weights = Weights::load(&checkpoint, wanted, &LoadOptions::default(), &Silent).unwrap();
    assert_eq!(weights.get("b.weight").unwrap().data, Slice::F32(&[7.0, -8.0]));
    assert_eq!(weights.made_bytes(), 8);
    let wanted: [(&str, &[usize]); 1] = [("a", &[1])];
    let refused = Weights::load(&checkpoint, wanted, &LoadOptions::default(), &Silent);
    assert!(matches!(refused, Err(CheckpointError::WrongDtype { found: Dtype::U8, .. })));
}

/// A matrix of 130 x 257 codes in blocks of 128 x 128, so 2 x 3 scales.
fn fp8(codes: &[u8], scales: &[f32], scale_shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
    let (_dir, checkpoint) = checkpoint(&[
        ("q.weight", "F8_E4M3", &[130, 257], codes),
        ("q.weight_scale_inv", "F32", scale_shape, &f32s(scales)),
    ]);
    let options = LoadOptions { fp8_block: Some((128, 128)), ..LoadOptions::default() };
    let wanted: [(&str, &[usize]); 1] = [("q.weight", &[130, 257])];
    let weights = Weights::load(&checkpoint, wanted, &options, &Silent)?;
    assert!(weights.unused().is_empty(), "scales are used by their weight");
    let weight = weights.get("q.weight").unwrap();
    assert!(matches!(weight.data, Slice::Bf16(_)));
    Ok(weight.data.to_f32())
}

#[test]
fn fp8_blocks_are_scaled_one_by_one() {
    let ones = vec![0x38; 130 * 257];
    let made = fp8(&ones, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 3]).unwrap();
    for row in 0..130 {
        for col in 0..257 {
            let scale = (row / 128 * 3 + col / 128 + 1) as f32;
            assert_eq!(made[row * 257 + col], scale, "{row} {col}");
        }
    }
}

#[test]
fn fp8_that_is_no_number_or_has_no_scale_is_refused() {
    let ones = vec![0x38; 130 * 257];
    let six = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    assert!(matches!(
        fp8(&ones, &six, &[3, 2]),
        Err(CheckpointError::WrongShape { tensor, wanted, .. })
            if tensor == "q.weight_scale_inv" && wanted == [2, 3]
    ));
    let mut broken = ones.clone();
    broken[129 * 257 + 256] = 0xFF;
    let Err(CheckpointError::Damaged { defect, .. }) = fp8(&broken, &six, &[2, 3]) else {
        panic!("a code that is no number passed")
    };
    let Defect::NotANumber { tensor, element, at } = &defect else { panic!("{defect}") };
    assert_eq!((tensor.as_str(), *element), ("q.weight", 130 * 257 - 1));
    // Codes come first in the file, so the scales (24 bytes) follow the broken one.
    let whole = tensors(&[
        ("q.weight", "F8_E4M3", &[130, 257], &broken),
        ("q.weight_scale_inv", "F32", &[2, 3], &f32s(&six)),
    ]);
    assert_eq!(whole[*at as usize], 0xFF);
    for bad in [f32::NAN, f32::INFINITY] {
        let refused = fp8(&ones, &[1.0, 2.0, 3.0, bad, 5.0, 6.0], &[2, 3]);
        assert!(matches!(
            refused,
            Err(CheckpointError::Damaged { defect: Defect::NotANumber { tensor, element: 3, .. }, .. })
                if tensor == "q.weight_scale_inv"
        ));
    }
    let (_dir, bare) = checkpoint(&[("q.weight", "F8_E4M3", &[1, 2], &[0x38, 0x38])]);
    let wanted: [(&str, &[usize]); 1] = [("q.weight", &[1, 2])];
    let load = |options| Weights::load(&bare, wanted, &options, &Silent);
    assert!(matches!(
        load(LoadOptions::default()),
        Err(CheckpointError::NoBlockSize { tensor, .. }) if tensor == "q.weight"
    ));
    let blocks = LoadOptions { fp8_block: Some((128, 128)), ..LoadOptions::default() };
    assert!(matches!(
        load(blocks),
        Err(CheckpointError::NoTensor { tensor, .. }) if tensor == "q.weight_scale_inv"
    ));
}

#[test]
fn progress_reaches_its_total_in_each_stage() {
    struct Seen(Mutex<Vec<(Stage, u64, u64)>>);
    impl Progress for Seen {
        fn report(&self, stage: Stage, done: u64, total: u64) {
            self.0.lock().unwrap().push((stage, done, total));
        }
    }
    let big = vec![0; 9 << 20];
    let (_dir, checkpoint) = checkpoint(&[
        ("a.weight", "F32", &[9 << 18], &big),
        ("b.weight", "BF16", &[1, 2], &bf16s(&[1.0, 2.0])),
    ]);
    let seen = Seen(Mutex::new(Vec::new()));
    let options = LoadOptions { matrices: Some(Float::F32), ..LoadOptions::default() };
    let wanted: [(&str, &[usize]); 2] = [("a.weight", &[9 << 18]), ("b.weight", &[1, 2])];
    Weights::load(&checkpoint, wanted, &options, &seen).unwrap();
    let seen = seen.0.into_inner().unwrap();
    assert_eq!(seen[..2], [(Stage::Convert, 0, 4), (Stage::Convert, 4, 4)]);
    assert_eq!(seen[2], (Stage::Read, 0, 9 << 20));
    assert_eq!(*seen.last().unwrap(), (Stage::Read, 9 << 20, 9 << 20));
}

#[test]
fn random_weights_in_memory_depend_on_seed_and_name_only() {
    let spec = |name: &str, shape: &[usize], dtype| TensorSpec {
        name: name.into(),
        shape: shape.to_vec(),
        dtype,
    };
    let specs = [
        spec("a.weight", &[1025, 1031], Dtype::BF16),
        spec("b.weight", &[3, 5], Dtype::F32),
        spec("a.mlp.gate.weight", &[4, 6], Dtype::F16),
    ];
    let model = |seed| RandomModel { seed, profile: Profile::Realistic, tied_embeddings: false };
    let make = |seed, threads| Weights::random(&model(seed), &specs, threads, &Silent).unwrap();
    let one = make(1, 1);
    let bytes: usize = 1025 * 1031 * 2 + 15 * 4 + 24 * 2;
    assert_eq!(one.made_bytes(), bytes as u64);
    for spec in &specs {
        let value = |weights: &Weights| weights.get(&spec.name).unwrap().data.to_f32();
        assert_eq!(value(&one), value(&make(1, 3)), "{}", spec.name);
        assert_ne!(value(&one), value(&make(2, 1)), "{}", spec.name);
    }
    let refused = Weights::random(&model(1), &[spec("a", &[2, 2], Dtype::F32)], 1, &Silent);
    assert!(refused.unwrap_err().to_string().contains("`a`"));
    let refused = Weights::random(&model(1), &[spec("a.weight", &[2], Dtype::I8)], 1, &Silent);
    assert!(refused.unwrap_err().to_string().contains("I8"));
    let huge = spec("a.weight", &[1 << 40, 1 << 40], Dtype::F32);
    assert!(Weights::random(&model(1), &[huge], 1, &Silent).is_err());
}

#[test]
fn stored_bytes_are_read_past_the_map() {
    let values = [1.0, 2.0, 3.0, -4.0, 5.0, 6.0];
    let (dir, checkpoint) = checkpoint(&[
        ("first.weight", "F32", &[1, 1], &f32s(&[9.0])),
        ("m.weight", "BF16", &[3, 2], &bf16s(&values)),
    ]);
    let wanted: [(&str, &[usize]); 1] = [("m.weight", &[3, 2])];
    let options = LoadOptions { read_ahead: false, ..LoadOptions::default() };
    let weights = Weights::load(&checkpoint, wanted, &options, &Silent).unwrap();
    let stored = weights.stored("m.weight").unwrap();
    assert_eq!((stored.float, stored.elements()), (Float::Bf16, 6));
    let mut bytes = [0; 6];
    stored.read(4, &mut bytes).unwrap();
    assert_eq!(bytes.to_vec(), bf16s(&values[2..5]));
    let past = stored.read(8, &mut bytes).expect_err("past the weight's end");
    assert_eq!(past.kind(), std::io::ErrorKind::UnexpectedEof);
    // A file that was cut short is an error here and no signal.
    let file = fs::File::options().write(true).open(dir.path().join("model.safetensors")).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    assert_eq!(
        stored.read(6, &mut bytes).expect_err("cut").kind(),
        std::io::ErrorKind::UnexpectedEof
    );
    assert!(weights.stored("first.weight").is_none());
    // What was made lies nowhere.
    let options = LoadOptions { matrices: Some(Float::F32), ..options };
    let made = Weights::load(&checkpoint, wanted, &options, &Silent);
    assert!(made.unwrap().stored("m.weight").is_none());
}
