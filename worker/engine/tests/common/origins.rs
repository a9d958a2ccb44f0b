//! The same weights out of memory, out of a checkpoint's files and made on the device.

use super::{Completion, Model, Setup, families, greedy, prompt};
use engine::{KvDtype, WeightSource};
use safetensors::Dtype;
use weights::progress::Silent;
use weights::random::{RandomWeights, TensorSpec};
use weights::{Checkpoint, LoadOptions, Weights, WriteOptions, write_random};

fn leaked<T: WeightSource + 'static>(source: T) -> &'static dyn WeightSource {
    Box::leak(Box::new(source))
}

/// Results are equal to the bit, whatever type weights are stored in and computed with.
pub fn weights_are_the_same_from_everywhere(setup: Setup) {
    // With biases and one matrix used twice, with experts, with a latent cache.
    const THESE: [&str; 3] = ["llama, biases, tied", "qwen3_moe", "deepseek_v3"];
    for (name, config) in families().into_iter().filter(|(name, _)| THESE.contains(name)) {
        let model = Model::new(&config, 21);
        let random = &model.random;
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            let typed = |spec: &TensorSpec| TensorSpec { dtype, ..spec.clone() };
            let specs: Vec<TensorSpec> = model.specs.iter().map(typed).collect();
            let folder = tempfile::tempdir().expect("a folder");
            let (out, config) = (folder.path().join("model"), folder.path().join("config.json"));
            std::fs::write(&config, "{}").expect("a file");
            let options = WriteOptions { shard_bytes: 100_000, threads: 2 };
            write_random(&out, &config, random, specs.clone(), &options, &Silent).expect("files");
            let checkpoint = Checkpoint::open(&out).expect("what was written");
            let wanted = specs.iter().map(|spec| (spec.name.as_str(), spec.shape.as_slice()));
            let options = LoadOptions { read_ahead: false, ..LoadOptions::default() };
            let files = Weights::load(&checkpoint, wanted, &options, &Silent).expect("weights");
            let memory = Weights::random(random, &specs, 2, &Silent).expect("weights");
            let drawn = RandomWeights::new(random, &specs, 2).expect("weights");
            let [memory, files, drawn] = [leaked(memory), leaked(files), leaked(drawn)];
            for kv_dtype in [KvDtype::F32, KvDtype::Bf16] {
                let run = |source| -> Completion {
                    let setup = Setup { kv_dtype, ..setup };
                    model.session_over(source, setup).complete(&prompt(40, 6), 64, 3, greedy())
                };
                let expected = run(memory);
                assert_eq!(run(files), expected, "{name} {dtype:?} {kv_dtype:?}: files");
                assert_eq!(run(drawn), expected, "{name} {dtype:?} {kv_dtype:?}: drawn");
            }
        }
    }
}
