//! Whole prompts, later chunks, prompts behind a shared prefix and decodes in the same steps, over heads
//! that the kernels for prompts are made for.

use super::{Model, Session, Setup, greedy, native, over_native, prompt};
use engine::{KvDtype, MlaForm};
use std::collections::BTreeMap;
use std::io::Write;

/// What steps gave: log-probabilities of prompts by request and position, tokens in their order.
#[derive(Debug, PartialEq)]
struct Got {
    prompts: BTreeMap<(u64, u32), f32>,
    tokens: Vec<(u32, u32)>,
}

fn steps(model: &Model, setup: Setup) -> Got {
    let mut session = model.session(setup);
    let mut got = Got { prompts: BTreeMap::new(), tokens: Vec::new() };
    let step = |session: &mut Session, got: &mut Got, chunks: &[(u32, u32)]| {
        let outcome = session.step(chunks);
        for part in outcome.prompt_logprobs {
            let positions = (part.first.0..).zip(part.entries);
            let all = positions.map(|(at, one)| ((part.request.0, at), one.chosen.logprob));
            got.prompts.extend(all);
        }
        for sampled in outcome.sampled {
            assert_eq!(sampled.fault, None);
            got.tokens.push((sampled.slot.0, sampled.token.0));
        }
    };
    let admit = |session: &mut Session, slot: u32, tokens: &[u32]| {
        session.admit(slot, tokens, tokens.len(), greedy());
    };
    let prefix = prompt(200, 1);
    admit(&mut session, 0, &prefix);
    step(&mut session, &mut got, &[(0, 200)]);
    admit(&mut session, 1, &prompt(400, 2));
    admit(&mut session, 2, &prompt(150, 3));
    step(&mut session, &mut got, &[(1, 100), (2, 150)]);
    // Behind three blocks of the first one's; a long and a short chunk behind others; a short whole one.
    let shared: Vec<_> = session.blocks(0).iter().map(|blocks| blocks[..3].to_vec()).collect();
    let behind = [&prefix[..192], &prompt(77, 4)].concat();
    session.admit_shared(3, &behind, behind.len(), greedy(), shared, 0);
    admit(&mut session, 4, &prompt(9, 5));
    step(&mut session, &mut got, &[(1, 290), (3, 77), (4, 9)]);
    step(&mut session, &mut got, &[(1, 10)]);
    // Steps of a chunk or whole prompts alone.
    admit(&mut session, 5, &prompt(500, 6));
    step(&mut session, &mut got, &[(5, 257)]);
    step(&mut session, &mut got, &[(5, 243)]);
    for _ in 0..3 {
        step(&mut session, &mut got, &[]);
    }
    got
}

/// bf16 on a device against 32-bit floats on the processor: where prompts run apart they are off by as
/// much as where they do not. Captured steps have the very bits of launched ones.
pub fn prompts_that_run_apart_agree(device: Setup) {
    let narrow = over_native("llama", 4, 2, 64);
    for (name, config) in native().into_iter().chain([("llama, 64", narrow)]) {
        let model = Model::new(&config, 31);
        let exact = steps(&model, Setup::default()).prompts;
        let off = |form, graphs| {
            let got = steps(&model, Setup { form, graphs, kv_dtype: KvDtype::Bf16, ..device });
            assert!(got.prompts.keys().eq(exact.keys()));
            let pairs = got.prompts.values().zip(exact.values());
            let mut off: Vec<f32> = pairs.map(|(got, exact)| (got - exact).abs()).collect();
            off.sort_by(f32::total_cmp);
            (off, got)
        };
        let (absorbed, _) = off(MlaForm::Absorbed, false);
        let (auto, launched) = off(MlaForm::Auto, false);
        let (_, captured) = off(MlaForm::Auto, true);
        assert_eq!(captured, launched, "{name}");
        let at = |off: &[f32], part: f32| off[(off.len() as f32 * part) as usize];
        let of = |off: &[f32]| [0.5, 0.9].map(|part| at(off, part));
        let ([median, most], [as_median, as_most]) = (of(&auto), of(&absorbed));
        let figures =
            format!("{median:.5} and {most:.5}, absorbed {as_median:.5} and {as_most:.5}");
        let _ = writeln!(std::io::stderr(), "{name}: {figures}");
        // Both round as often, at other places.
        assert!(median <= 1.5 * as_median && most <= 1.5 * as_most, "{name}: {figures}");
        assert!(median < 0.02, "{name}: {figures}");
    }
}
