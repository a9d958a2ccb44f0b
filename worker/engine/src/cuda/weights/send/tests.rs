//! What is written into a buffer, without a device: every stored type as both computed ones.

use super::*;
use crate::{Origin, WeightSource};
use weights::progress::Silent;
use weights::random::{Profile, RandomModel, TensorSpec};
use weights::{Checkpoint, LoadOptions, Weights, WriteOptions, write_random};

const NAME: &str = "a.up_proj.weight";
const SHAPE: [usize; 2] = [7, 5];

/// A checkpoint of one matrix, and the same in memory.
fn checkpoint(dtype: safetensors::Dtype) -> (tempfile::TempDir, Weights, Weights) {
    let folder = tempfile::tempdir().expect("a folder");
    let (out, config) = (folder.path().join("model"), folder.path().join("config.json"));
    std::fs::write(&config, "{}").expect("a file");
    let model = RandomModel { seed: 4, profile: Profile::Parity, tied_embeddings: false };
    let spec = TensorSpec { name: NAME.to_owned(), shape: SHAPE.to_vec(), dtype };
    let memory = Weights::random(&model, std::slice::from_ref(&spec), 1, &Silent);
    let options = WriteOptions::default();
    write_random(&out, &config, &model, [spec], &options, &Silent).expect("files");
    let checkpoint = Checkpoint::open(&out).expect("what was written");
    let options = LoadOptions { read_ahead: false, ..LoadOptions::default() };
    let files = Weights::load(&checkpoint, [(NAME, &SHAPE[..])], &options, &Silent);
    (folder, files.expect("weights"), memory.expect("weights"))
}

fn elements(weights: &Weights) -> Elements<'_> {
    match weights.origin(NAME, SHAPE[0], SHAPE[1]).expect("the matrix") {
        Origin::Held(data) => Elements::Held(data),
        Origin::Stored(stored) => Elements::Stored(stored),
        Origin::Drawn(_) => panic!("nothing is drawn here"),
    }
}

#[test]
fn any_part_of_any_type_is_written_as_either_type() {
    use safetensors::Dtype::{BF16, F16, F32};
    for stored in [F32, BF16, F16] {
        let (_folder, files, memory) = checkpoint(stored);
        let (files, held) = (elements(&files), elements(&memory));
        assert!(matches!((&files, &held), (Elements::Stored(_), Elements::Held(_))));
        let values = memory.get(NAME).expect("the matrix").data.to_f32();
        // One buffer of raw elements serves ranges of any length, as it does in a thread.
        let mut raw = Vec::new();
        for range in [0..35, 1..2, 3..34, 34..35, 9..9] {
            for dtype in [Dtype::F32, Dtype::Bf16] {
                let expected: Vec<u8> = match dtype {
                    Dtype::F32 => values[range.clone()].as_bytes().to_vec(),
                    Dtype::Bf16 => {
                        let round = |x: &f32| bf16::from_f32(*x).to_bits().to_le_bytes();
                        values[range.clone()].iter().flat_map(round).collect()
                    }
                };
                for from in [&files, &held, &Elements::Vector(Cow::Borrowed(&values))] {
                    // As pinned memory: aligned for either type, and longer than what is asked for.
                    let mut buffer = vec![f32::NAN; range.len()];
                    let room = &mut buffer.as_mut_slice().as_mut_bytes()[..expected.len()];
                    from.write(NAME, range.clone(), dtype, &mut raw, room).expect("written");
                    assert_eq!(room, expected, "{stored:?} as {dtype:?}, {range:?}");
                }
            }
        }
    }
}

#[test]
fn a_file_that_was_cut_is_named_with_its_weight() {
    let (folder, files, _) = checkpoint(safetensors::Dtype::BF16);
    let path = folder.path().join("model/model.safetensors");
    let file = std::fs::File::options().write(true).open(&path).expect("the file");
    file.set_len(file.metadata().expect("its length").len() - 2).expect("cut");
    let mut room = [0; 70];
    let error = elements(&files).write(NAME, 0..35, Dtype::Bf16, &mut Vec::new(), &mut room);
    let error = error.expect_err("too short").to_string();
    assert!(error.contains(NAME) && error.contains("model.safetensors"), "{error}");
}
