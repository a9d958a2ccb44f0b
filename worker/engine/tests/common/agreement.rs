//! Every family against an independent f64 model: prompt and output, through the paged cache.

use super::{Model, Setup, families, greedy, naive, native, prompt};

/// Prompt and output of every family and native shape, on `base`, within `tolerance`.
pub fn every_family_agrees(base: Setup, tolerance: f64) {
    for (name, config) in families().into_iter().chain(native()) {
        let model = Model::new(&config, 11);
        let mut session = model.session(base);
        for length in [1, 7, 64, 65, 150] {
            let tokens = prompt(length, length as u32);
            let got = session.complete(&tokens, 1024, 6, greedy());
            let all: Vec<u32> = tokens.iter().chain(&got.tokens).copied().collect();
            let expected = naive::logprobs(&model.config, model.weights, &all);
            let given = got.prompt.iter().chain(&got.logprobs);
            let mut worst = 0.0_f64;
            for (at, given) in given.enumerate() {
                let wanted = expected[at][all[at + 1] as usize];
                worst = worst.max((f64::from(*given) - wanted).abs());
            }
            assert!(worst < tolerance, "{name}, {length} tokens: off by {worst}");
            for (at, token) in got.tokens.iter().enumerate() {
                let row = &expected[length - 1 + at];
                let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                assert!(top - row[*token as usize] < 1e-2, "{name}: not the likeliest token");
            }
        }
    }
}
