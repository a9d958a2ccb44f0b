//! The engine on a CUDA device: the same checks as on the CPU in 32-bit floats, and bf16 within what
//! its roundings explain. Without a device they say so and pass; where `TOKENMILL_REQUIRE` names
//! `gpu` they fail instead.

mod common;

use common::forced::{self, Forced};
use common::roundings::Roundings;
use common::{
    Completion, Model, Setup, agreement, ahead, behind, equalities, families, goldens, greedy,
    later, long, mixed, naive, native, origins, poison, prompts, roundings,
};
use device::cuda::{Context, DeviceMemory, HostStore, Stream};
use engine::{CudaError, Device, EngineError, KvDtype, MlaForm};
use ids::{TokenId, Tokens};
use std::io::Write;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use step::Sampling;

/// 32-bit sums in another order than the processor's.
const TOLERANCE: f32 = 5e-4;
/// As on the CPU: what parity means, and f32 against f64.
const PARITY: f64 = 2e-3;
const EXACT: f64 = 1e-3;

/// The device for one test at a time, in 32-bit floats; `None` where there is none.
fn cuda() -> Option<(Setup, MutexGuard<'static, ()>)> {
    static FOUND: OnceLock<bool> = OnceLock::new();
    static TURN: Mutex<()> = Mutex::new(());
    let found = *FOUND.get_or_init(|| {
        let missing = match engine::cuda_device(0) {
            Ok(_) => return true,
            Err(
                error @ (CudaError::NoDriver
                | CudaError::NoDevice { .. }
                | CudaError::NoKernels { .. }),
            ) => error,
            Err(error) => panic!("the device cannot be used: {error}"),
        };
        let required = std::env::var("TOKENMILL_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|r| r == "gpu"), "a GPU is required: {missing}");
        let _ = writeln!(std::io::stderr(), "SKIPPED: the engine on a CUDA device: {missing}");
        false
    });
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let setup = Setup { device: Device::Cuda { ordinal: 0 }, ..Setup::default() };
    found.then_some((setup, turn))
}

#[test]
fn it_says_what_it_is() {
    let Some((setup, _turn)) = cuda() else { return };
    let (_, config) = families().remove(0);
    let session = Model::new(&config, 1).session(setup);
    assert_eq!(session.engine.hello().backend, "cuda");
}

/// Which kernel a plan runs on, by name; it needs no device.
#[test]
fn decoding_attention_runs_on_the_kernel_that_is_meant() {
    let of = |name: &str, kv_dtype| {
        let mut all = families().into_iter().chain(native());
        let (_, config) = all.find(|(found, _)| *found == name).expect(name);
        Model::new(&config, 1).attention_kernels(kv_dtype)
    };
    let pieces = [
        ("qwen3, native", "gqa_decode_fused_128"),
        ("llama, native", "gqa_decode_fused_64"),
        ("deepseek_v2, native", "mla_decode_16"),
        ("deepseek_v3, native", "mla_decode_16"),
    ];
    for (name, kernel) in pieces {
        assert_eq!(of(name, KvDtype::Bf16), [kernel; 2], "{name}");
        assert_eq!(of(name, KvDtype::F32), ["tiles"; 2], "{name}");
    }
    for (name, config) in families() {
        let kernels = Model::new(&config, 1).attention_kernels(KvDtype::Bf16);
        assert!(kernels.iter().all(|kernel| *kernel == "tiles"), "{name}: {kernels:?}");
    }
}

#[test]
fn log_probabilities_agree_with_the_naive_model() {
    let Some((setup, _turn)) = cuda() else { return };
    agreement::every_family_agrees(setup, EXACT);
}

#[test]
fn every_case_agrees_with_its_golden() {
    let Some((setup, _turn)) = cuda() else { return };
    goldens::every_case_agrees(setup, PARITY);
}

#[test]
fn chunks_of_any_size_equal_the_whole_prompt() {
    let Some((setup, _turn)) = cuda() else { return };
    equalities::chunks_of_any_size_equal_the_whole_prompt(setup, TOLERANCE);
}

#[test]
fn places_of_blocks_do_not_matter() {
    let Some((setup, _turn)) = cuda() else { return };
    equalities::places_of_blocks_do_not_matter(setup);
}

#[test]
fn a_batch_of_32_equals_one_by_one() {
    let Some((setup, _turn)) = cuda() else { return };
    equalities::a_batch_of_32_equals_one_by_one(setup, TOLERANCE);
}

#[test]
fn a_preempted_request_goes_on_as_if_undisturbed() {
    let Some((setup, _turn)) = cuda() else { return };
    equalities::a_preempted_request_goes_on_as_if_undisturbed(setup);
}

#[test]
fn a_shared_prefix_equals_a_cold_start() {
    let Some((setup, _turn)) = cuda() else { return };
    equalities::a_shared_prefix_equals_a_cold_start(setup, TOLERANCE);
}

/// Parts of a device's memory in the host's: stored, written over, loaded elsewhere, all on one stream.
#[test]
fn what_is_kept_on_the_host_comes_back_to_the_bit() {
    let Some(_turn) = cuda() else { return };
    let context = Context::open(0).expect("a device");
    let stream = Stream::new(&context).expect("a stream");
    let (piece, pieces) = (100_001_usize, 7_usize);
    let memory = DeviceMemory::allocate(&context, "pieces", piece * pieces).expect("memory");
    let part = |n: usize| memory.slice(n * piece..(n + 1) * piece);
    let content = |n: usize| -> Vec<u8> {
        (0..piece).map(|i| (i.wrapping_mul(31) ^ (i >> 8) ^ (n * 77)) as u8).collect()
    };
    (0..pieces).for_each(|n| stream.upload(&content(n), &part(n)).expect("sent"));
    let mut store = HostStore::new(&context, piece * 3).expect("pinned memory");
    // Three go, in another order; their places are written over on the device at once.
    for (n, at) in [(0, 2), (1, 0), (2, 1)] {
        store.store(&stream, &part(n), at * piece).expect("stored");
        stream.fill(&part(n), 0xEE).expect("filled");
    }
    // The first place read is stored to again behind the copy out of it.
    store.load(&stream, 2 * piece, &part(4)).expect("loaded");
    store.store(&stream, &part(3), 2 * piece).expect("stored");
    store.load(&stream, 0, &part(5)).expect("loaded");
    store.load(&stream, piece, &part(6)).expect("loaded");
    store.load(&stream, 2 * piece, &part(0)).expect("loaded");
    let read = |n: usize| {
        let mut bytes = vec![0; piece];
        stream.read(&part(n), &mut bytes).expect("read");
        bytes
    };
    for (at, from) in [(4, 0), (5, 1), (6, 2), (0, 3), (3, 3)] {
        assert!(read(at) == content(from), "piece {from} in place {at}");
    }
    assert!(read(1).iter().all(|byte| *byte == 0xEE));
    let past = store.load(&stream, 2 * piece + 1, &part(0));
    assert!(matches!(past, Err(CudaError::Operand { .. })), "{past:?}");
}

#[test]
fn blocks_behind_the_cache_come_back_to_the_bit() {
    let Some((setup, _turn)) = cuda() else { return };
    for kv_dtype in [KvDtype::F32, KvDtype::Bf16] {
        for graphs in [false, true] {
            let setup = Setup { kv_dtype, graphs, slots: 8, ..setup };
            behind::blocks_come_back_to_the_bit(setup);
        }
    }
}

#[test]
fn a_nan_ends_one_request_and_leaves_its_batch_mates_alone() {
    let Some((setup, _turn)) = cuda() else { return };
    for kv_dtype in [KvDtype::F32, KvDtype::Bf16] {
        let setup = Setup { kv_dtype, tokens: 2048, ..setup };
        // Steps of few rows and of many, which have kernels of their own.
        poison::a_nan_ends_one_request(setup, 1, true);
        poison::a_nan_ends_one_request(setup, 20, true);
    }
    let captured = Setup { kv_dtype: KvDtype::Bf16, graphs: true, slots: 8, ..setup };
    poison::a_nan_ends_one_request(captured, 5, true);
}

#[test]
fn bf16_differs_by_no_more_than_its_roundings() {
    let Some((setup, _turn)) = cuda() else { return };
    let setup = Setup { kv_dtype: KvDtype::Bf16, ..setup };
    for (name, config) in families().into_iter().chain(native()) {
        let model = Model::new(&config, 11);
        let tokens = common::prompt(150, 4);
        let expected = naive::logprobs(&model.config, model.weights, &tokens);
        let roundings = Roundings::of(&model.config, model.weights, &tokens[..21]);
        let mut session = model.session(setup);
        // Whole, and a token at a time as decodes are.
        for chunk in [1024, 1] {
            let what = format!("bf16 {name} by {chunk}");
            let got = session.complete(&tokens, chunk, 1, greedy()).prompt;
            let off = |(at, got): (usize, &f32)| {
                (expected[at][tokens[at + 1] as usize] - f64::from(*got)).abs()
            };
            let off: Vec<f64> = got.iter().enumerate().map(off).collect();
            assert!(off.iter().any(|off| *off > 0.0), "{what}: exact");
            roundings.explain(off, &what);
            let request =
                Forced { whole: if chunk == 1 { 1 } else { 149 }, tokens: tokens.clone() };
            let said = forced::together(&mut session, &[&request], 1024).remove(0);
            let tops = said.iter().zip(&expected).map(|(said, row)| {
                let mut order: Vec<usize> = (0..row.len()).collect();
                order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
                (row[order[0]] - row[order[1]], order[0] == said.likeliest as usize)
            });
            roundings.agree(&tops.collect::<Vec<_>>(), &what);
        }
    }
}

#[test]
fn goldens_with_native_heads_run_on_the_kernels_made_for_them_in_bf16() {
    let Some((setup, _turn)) = cuda() else { return };
    goldens::every_case_agrees_in_bf16(setup);
}

/// Margins from which on the likeliest token must not depend on the batch.
const CLEAR: (f32, f32) = (0.05, 0.2);

/// A request alone takes other kernels than one among 256, and rounds elsewhere. Where a router's scores are
/// closer than that, it may take other experts, and then anything may be said: those tokens are counted,
/// and all others are equal where the margin is clear.
#[test]
fn a_batch_of_256_says_what_each_request_says_alone() {
    let Some((setup, _turn)) = cuda() else { return };
    let setup = Setup { kv_dtype: KvDtype::Bf16, graphs: true, slots: 256, supers: 400, ..setup };
    let mut near = 0;
    for (name, config) in families().into_iter().chain(native()) {
        let model = Model::new(&config, 23);
        let routed = Roundings::is_routed(&model.config);
        let clear = if routed { CLEAR.1 } else { CLEAR.0 };
        let mut session = model.session(setup);
        let captured = session.engine.captured();
        near += usize::from(captured.iter().any(|of| of.kernels.iter().any(|k| k == "mla_near_8")));
        let requests = Forced::many(256, 6);
        let all: Vec<&Forced> = requests.iter().collect();
        let together = forced::together(&mut session, &all, setup.tokens);
        let (mut compared, mut unclear, mut undecided, mut otherwise) = (0, 0, 0, 0);
        let mut decided = Vec::new();
        for at in (0..256).step_by(11) {
            let request = &requests[at];
            let alone = forced::together(&mut session, &[request], setup.tokens).remove(0);
            assert_eq!(alone.len(), request.tokens.len() - 1, "{name}");
            let part = Roundings::of_scores(&model.config);
            let ties = match routed {
                true => naive::undecided(&model.config, model.weights, &request.tokens, part),
                false => vec![false; request.tokens.len()],
            };
            for (token, (one, other)) in alone.iter().zip(&together[at]).enumerate() {
                let tie = ties[token];
                undecided += usize::from(tie);
                if !tie {
                    decided.push(f64::from((one.logprob - other.logprob).abs()));
                }
                if one.margin <= clear {
                    unclear += 1;
                    continue;
                }
                compared += 1;
                if one.likeliest != other.likeliest {
                    let what = format!("{name}, request {at}, token {token}");
                    assert!(tie, "{what}: {one:?} and {other:?}");
                    otherwise += 1;
                }
            }
        }
        common::say(&format!(
            "256 and one, {name}: {compared} clear, {unclear} not; {undecided} undecided by a router, \
             {otherwise} of them said otherwise"
        ));
        assert!(compared > unclear, "{name}: {compared} compared, {unclear} were unclear");
        assert!(f64::from(otherwise) <= roundings::OTHERWISE * f64::from(compared), "{name}");
        let roundings = Roundings::of(&model.config, model.weights, &requests[0].tokens);
        // Experts of the last layer alone change no other token.
        let roundings = match name.contains("native") {
            true => Roundings { routed: false, ..roundings },
            false => roundings,
        };
        roundings.twice().explain(decided, &format!("256 and one, decided, {name}"));
    }
    assert!(near >= 1, "no model is wide enough for attention of near contexts in one launch");
}

#[test]
fn a_hundred_runs_alone_are_equal_to_the_bit() {
    let Some((setup, _turn)) = cuda() else { return };
    let setup = Setup { kv_dtype: KvDtype::Bf16, graphs: true, slots: 4, ..setup };
    let these = ["qwen3_moe", "llama, biases, tied"];
    let families = families().into_iter().filter(|(name, _)| these.contains(name));
    for (name, config) in families.chain(native()) {
        let runs = if common::small() { 20 } else { 100 };
        equalities::runs_alone_are_one(setup, &Model::new(&config, 19), runs, name);
    }
}

#[test]
fn the_exact_model_of_long_contexts_is_the_naive_one() {
    long::the_exact_model_is_the_naive_one();
}

#[test]
fn a_context_of_64k_tokens_agrees() {
    let Some((setup, _turn)) = cuda() else { return };
    long::a_long_context_agrees(Setup { kv_dtype: KvDtype::Bf16, ..setup });
}

/// Prompts as a whole, later chunks and decodes in one step: whole prompts expanded or not, captured or
/// launched.
#[test]
fn mixed_steps_say_the_same_in_both_forms_and_captured() {
    let Some((setup, _turn)) = cuda() else { return };
    let setup = Setup { kv_dtype: KvDtype::Bf16, slots: 8, ..setup };
    for (name, config) in families().into_iter().chain(native()) {
        let model = Model::new(&config, 27);
        let run = |setup, how: &str| mixed::run(&model, setup, &format!("{name}, {how}"));
        let absorbed = run(Setup { form: MlaForm::Absorbed, ..setup }, "absorbed");
        let launched = run(setup, "launched");
        assert_eq!(run(Setup { graphs: true, ..setup }, "captured"), launched, "{name}");
        if !name.contains("deepseek") {
            assert_eq!(absorbed, launched, "{name}");
            continue;
        }
        let roundings = Roundings::of(&model.config, model.weights, &common::prompt(21, 4));
        let off = absorbed.iter().zip(&launched).flat_map(|(one, other)| {
            assert_eq!(one.prompt.len(), other.prompt.len(), "{name}");
            let prompts = one.prompt.iter().zip(&other.prompt);
            let off = prompts.map(|(a, b)| f64::from((a - b).abs()));
            off.chain(drawn_off(one, other)).collect::<Vec<_>>()
        });
        roundings.twice().explain(off.collect(), &format!("absorbed or expanded, {name}"));
    }
}

/// Where log-probabilities of prompts are asked for all rows run to the end, else those alone that draw.
#[test]
fn rows_that_nobody_asks_for_are_not_missed() {
    let Some((setup, _turn)) = cuda() else { return };
    for (name, config) in families().into_iter().chain(native()) {
        let model = Model::new(&config, 27);
        for (graphs, kv_dtype) in
            [(false, KvDtype::F32), (true, KvDtype::F32), (true, KvDtype::Bf16)]
        {
            let setup = Setup { kv_dtype, slots: 8, graphs, ..setup };
            let run =
                |how, what: &str| mixed::run_with(&model, setup, how, &format!("{name}, {what}"));
            let all = run((Some(0), greedy()), "all rows");
            let few = run((None, greedy()), "some rows");
            let drawn = run((None, Sampling::default()), "drawn ahead");
            assert!(few.iter().all(|few| few.prompt.is_empty() && !few.logprobs.is_empty()));
            for (few, drawn) in few.iter().zip(&drawn) {
                assert_eq!(few.tokens, drawn.tokens, "{name}");
            }
            if kv_dtype == KvDtype::F32 {
                for (few, all) in few.iter().zip(all) {
                    few.assert_close(&Completion { prompt: Vec::new(), ..all }, TOLERANCE, name);
                }
                continue;
            }
            let roundings = Roundings::of(&model.config, model.weights, &common::prompt(21, 4));
            let off = few.iter().zip(&all).flat_map(|(few, all)| drawn_off(few, all));
            roundings.twice().explain(off.collect(), &format!("some rows or all, {name}"));
        }
    }
}

/// How far log-probabilities of the tokens drawn are apart, which are the same up to where they part.
fn drawn_off(one: &Completion, other: &Completion) -> Vec<f64> {
    let same = one.tokens.iter().zip(&other.tokens).take_while(|(a, b)| a == b).count();
    let drawn = one.logprobs[..same].iter().zip(&other.logprobs);
    drawn.map(|(a, b)| f64::from((a - b).abs())).collect()
}

#[test]
fn captured_steps_equal_launched_ones() {
    let Some((setup, _turn)) = cuda() else { return };
    let captured = Setup { graphs: true, ..setup };
    for (name, config) in families().into_iter().chain(native()) {
        let model = Model::new(&config, 9);
        let tokens = common::prompt(150, 3);
        for kv_dtype in [KvDtype::F32, KvDtype::Bf16] {
            let run = |setup: Setup| {
                let setup = Setup { kv_dtype, ..setup };
                model.session(setup).complete(&tokens, 65, 8, greedy())
            };
            assert_eq!(run(captured), run(setup), "{name} {kv_dtype:?}");
        }
    }
    equalities::a_batch_of_32_equals_one_by_one_of(captured, TOLERANCE, 2);
}

#[test]
fn prompts_that_run_apart_agree() {
    let Some((setup, _turn)) = cuda() else { return };
    prompts::prompts_that_run_apart_agree(setup);
}

#[test]
fn later_chunks_of_captured_steps_equal_launched_ones() {
    let Some((setup, _turn)) = cuda() else { return };
    later::captured_equal_launched(setup);
    later::passes_are_captured(setup);
}

#[test]
fn steps_go_on_where_later_chunks_cannot_be_captured() {
    let Some((setup, _turn)) = cuda() else { return };
    later::a_failed_capture_is_said_and_steps_go_on(setup);
}

#[test]
fn a_nan_behind_one_chunk_leaves_the_others_of_its_step() {
    let Some((setup, _turn)) = cuda() else { return };
    later::a_nan_ends_one_request(setup);
}

#[test]
fn weights_are_the_same_from_everywhere() {
    let Some((setup, _turn)) = cuda() else { return };
    origins::weights_are_the_same_from_everywhere(setup);
}

#[test]
fn steps_that_run_ahead_change_nothing() {
    let Some((setup, _turn)) = cuda() else { return };
    let launched = ahead::run_ahead_changes_nothing(setup, true);
    let captured = ahead::run_ahead_changes_nothing(Setup { graphs: true, ..setup }, true);
    assert_eq!(captured, launched);
    assert_eq!(launched, ahead::run_ahead_changes_nothing(Setup::default(), false));
}

#[test]
fn a_nan_in_flight_leaves_batch_mates_alone() {
    let Some((setup, _turn)) = cuda() else { return };
    poison::a_nan_in_flight_leaves_batch_mates_alone(Setup { graphs: true, ..setup });
}

/// A copy there, a graph, a copy back.
#[test]
fn a_step_that_only_decodes_is_three_launches() {
    let Some((setup, _turn)) = cuda() else { return };
    let (_, config) = families().remove(0);
    let mut session = Model::new(&config, 1).session(Setup { graphs: true, ..setup });
    session.admit(0, &common::prompt(9, 1), 9, Sampling::default());
    session.admit(1, &common::prompt(5, 2), 5, Sampling::default());
    let mut plans = vec![session.plan(&[(0, 9), (1, 5)])];
    plans.extend((0..8).map(|_| session.plan(&[])));
    let (outcomes, _) = session.drive(&plans, 1);
    for outcome in &outcomes[1..] {
        assert_eq!(outcome.timing.launches, 3);
        assert!(outcome.timing.model_ns > 0 && !outcome.timing.host_draws);
    }
    assert!(outcomes[0].timing.host_draws, "the host waits for the prompt's log-probabilities");
}

#[test]
fn tokens_drawn_on_the_device_are_the_processors() {
    let Some((setup, _turn)) = cuda() else { return };
    let likeliest = Sampling { temperature: 0.0, ..Sampling::default() };
    let drawn = |seed| Sampling {
        temperature: 0.9,
        top_p: 0.95,
        min_p: 0.01,
        top_k: 40,
        seed,
        ..Sampling::default()
    };
    for (name, config) in families() {
        let model = Model::new(&config, 12);
        let tokens = common::prompt(70, 5);
        for sampling in [likeliest.clone(), drawn(1), drawn(2)] {
            let run =
                |setup| model.session(setup).complete(&tokens, 1024, 16, sampling.clone()).tokens;
            assert_eq!(run(setup), run(Setup::default()), "{name}");
        }
    }
}

/// Samplings that ask for more than a row of parameters.
fn asking() -> [Sampling; 5] {
    let penalised = Sampling {
        temperature: 0.8,
        seed: 3,
        repetition_penalty: 1.3,
        frequency_penalty: 0.4,
        presence_penalty: 0.5,
        ..Sampling::default()
    };
    let listed = Sampling {
        logit_bias: [(TokenId(5), 3.0), (TokenId(60), 4.0), (TokenId(96), -100.0)].into(),
        min_tokens: Tokens(6),
        banned_before_min: [TokenId(60), TokenId(2)].into(),
        ..Sampling::default()
    };
    let both = Sampling {
        logit_bias: listed.logit_bias.clone(),
        logprobs: Some(20),
        top_k: 20,
        top_p: 0.9,
        min_p: 0.01,
        ..penalised.clone()
    };
    let greedily = Sampling { temperature: 0.0, logprobs: Some(0), ..penalised.clone() };
    [penalised, listed, both, greedily, greedy()]
}

#[test]
fn counts_lists_and_log_probabilities_of_the_device_are_the_processors() {
    let Some((setup, _turn)) = cuda() else { return };
    for (name, config) in families() {
        let model = Model::new(&config, 12);
        let tokens = common::prompt(70, 5);
        let mut sessions = [setup, Setup::default()].map(|setup| model.session(setup));
        // One after another in one slot, whose place each fills anew.
        for sampling in asking() {
            let [device, processor] = sessions
                .each_mut()
                .map(|session| session.complete(&tokens, 1024, 16, sampling.clone()));
            device.assert_close(&processor, TOLERANCE, name);
        }
    }
}

#[test]
fn prompts_are_described_on_the_device_as_on_the_processor() {
    let Some((setup, _turn)) = cuda() else { return };
    for (name, config) in families() {
        let model = Model::new(&config, 12);
        let tokens = common::prompt(150, 5);
        let described = |setup, listed| {
            let mut session = model.session(setup);
            session.prompt_logprobs = Some(listed);
            session.admit(0, &tokens, tokens.len(), greedy());
            // In a whole chunk, in one row, and to the end with a draw in the same step.
            let parts = [100, 1, 49].map(|chunk| session.step(&[(0, chunk)]).prompt_logprobs);
            let entries = parts.into_iter().flatten().flat_map(|part| part.entries);
            entries.collect::<Vec<_>>()
        };
        for listed in [0, 3, 20] {
            let (device, processor) =
                (described(setup, listed), described(Setup::default(), listed));
            assert_eq!((device.len(), processor.len()), (149, 149), "{name}");
            for (at, (one, other)) in device.iter().zip(&processor).enumerate() {
                let what = format!("{name}, {listed} listed, entry {at}");
                assert_eq!((one.top.len(), other.top.len()), (listed.into(), listed.into()));
                assert_eq!(one.chosen.token, TokenId(tokens[at + 1]), "{what}");
                let all = std::iter::once((&one.chosen, &other.chosen));
                for (place, (a, b)) in all.chain(one.top.iter().zip(&other.top)).enumerate() {
                    let near = (a.logprob - b.logprob).abs() <= TOLERANCE;
                    assert!(near, "{what}: {a:?} for {b:?}");
                    // Equals may stand in another order, and of those sums differ.
                    assert!(place == 0 || a.rank as usize <= place, "{what}: {a:?}");
                }
            }
        }
    }
}

#[test]
fn counts_are_rebuilt_when_a_request_comes_back() {
    let Some((setup, _turn)) = cuda() else { return };
    let (_, config) = families().remove(0);
    let model = Model::new(&config, 12);
    let tokens = common::prompt(70, 5);
    for sampling in asking() {
        let whole = model.session(setup).complete(&tokens, 1024, 16, sampling.clone());
        let mut session = model.session(setup);
        // Another request left its counts in the slot.
        session.complete(&common::prompt(40, 9), 1024, 8, sampling.clone());
        let known = [&tokens[..], &whole.tokens[..7]].concat();
        session.admit(0, &known, tokens.len(), sampling);
        let mut rest = Completion::default();
        rest.take(session.step(&[(0, known.len() as u32)]));
        while rest.tokens.len() < 9 {
            rest.take(session.step(&[]));
        }
        assert_eq!(rest.tokens, whole.tokens[7..]);
    }
}

#[test]
fn a_cache_that_does_not_fit_is_refused_with_its_numbers() {
    let Some((setup, _turn)) = cuda() else { return };
    let (_, config) = families().remove(0);
    // A pebibyte.
    let error = Model::new(&config, 1).refused(setup, 1 << 50);
    let EngineError::Device(CudaError::Memory { what, needed, left }) = error else {
        panic!("{error}")
    };
    assert_eq!((what.as_str(), needed), ("the KV cache", 1 << 50));
    assert!(left > 0 && left < 1 << 40, "{left}");
}
