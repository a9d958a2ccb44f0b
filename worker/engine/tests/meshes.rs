//! Every family on every kind of mesh, ranks as threads with collectives through shared memory, against one
//! rank: tokens, log-probabilities, and what each rank holds and moves.

mod common;

use common::ranks::{self, Completions, RankRun, script, unchanged};
use common::{Completion, Model, over};
use device::collectives::{
    CollectiveError, Collectives, ElementsMut, Group, Moved, SharedMemory, Transfer,
};
use engine::StepError;
use model::explain::collective_bytes;
use model::lower::Op;
use model::memory::weight_bytes;
use model::mesh::{Axis, Mesh, Rank};
use serde_json::{Value, json};

/// What sums in another order may change.
const TOLERANCE: f32 = 1e-4;

const fn mesh(dp: usize, tp: usize, expert_parallel: bool) -> Mesh {
    Mesh { dp, tp, expert_parallel }
}

/// Tensor parallel; experts over the same ranks; shards of their own requests; all of it.
fn meshes() -> impl Iterator<Item = Mesh> {
    let shapes = [(1, 2), (1, 4), (2, 1), (2, 2)].into_iter();
    shapes.flat_map(|(dp, tp)| [false, true].map(|expert_parallel| mesh(dp, tp, expert_parallel)))
}

/// Every family in a shape that four ranks divide, but for the key-value heads of some, which they repeat.
fn families() -> Vec<(&'static str, Value)> {
    let family = |kind: &str, fields: Value| {
        let shape = json!({"model_type": kind, "architectures": ["Test"], "vocab_size": 100,
            "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "head_dim": 16,
            "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 512,
            "rope_theta": 1000.0});
        over(shape, fields)
    };
    let windows = json!({"use_sliding_window": true, "sliding_window": 70, "max_window_layers": 1,
        "tie_word_embeddings": true});
    let experts = json!({"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
        "norm_topk_prob": true, "mlp_only_layers": [1], "num_key_value_heads": 4});
    let latent = json!({"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 24,
        "q_lora_rank": 20, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
        "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1});
    let groups = json!({"n_group": 4, "topk_group": 2, "norm_topk_prob": true,
        "routed_scaling_factor": 1.5});
    vec![
        ("llama", family("llama", json!({"attention_bias": true, "mlp_bias": true}))),
        ("qwen3, windows", family("qwen3", windows)),
        ("qwen3_moe", family("qwen3_moe", experts)),
        ("deepseek_v2", family("deepseek_v2", over(latent.clone(), json!({"q_lora_rank": null})))),
        ("deepseek_v3", over(family("deepseek_v3", latent), groups)),
    ]
}

fn compare(got: &[Completions], alone: &[Completions], what: &str) {
    assert_eq!(got.len(), alone.len());
    for (shard, (got, alone)) in got.iter().zip(alone).enumerate() {
        assert!(got.keys().eq(alone.keys()), "{what}: requests of shard {shard}");
        assert!(!got.is_empty());
        for (request, completion) in alone {
            completion.assert_close(&got[request], TOLERANCE, &format!("{what}: {request:?}"));
        }
    }
}

#[test]
fn every_family_on_every_mesh_equals_one_rank() {
    for (name, config) in families() {
        let model = Model::new(&config, 23);
        let alone: Vec<Completions> =
            script(2).iter().map(|turns| ranks::alone(&model, turns)).collect();
        for mesh in meshes() {
            let what = format!("{name} on {mesh:?}");
            let script = script(mesh.dp);
            let runs = ranks::run(&model, mesh, &script, &unchanged);
            for run in &runs {
                assert_eq!(run.error, None, "{what}, rank {}", run.lowered.rank.0);
            }
            compare(&ranks::completions(&runs, &script, mesh), &alone[..mesh.dp], &what);
            ranks_of_a_shard_agree(&runs, mesh, &what);
            memory_is_as_planned(&model, &config, &runs, &what);
            bytes_are_as_explained(&runs, mesh, &script, &what);
        }
    }
}

/// Not the lead alone: whoever is asked says the same, to the bit.
fn ranks_of_a_shard_agree(runs: &[RankRun], mesh: Mesh, what: &str) {
    for (rank, run) in runs.iter().enumerate() {
        let lead = &runs[mesh.coordinate(Rank(rank), Axis::Dp) * mesh.tp];
        for (one, other) in run.outcomes.iter().zip(&lead.outcomes) {
            assert_eq!(one.sampled, other.sampled, "{what}, rank {rank}");
            assert_eq!(one.prompt_logprobs, other.prompt_logprobs, "{what}, rank {rank}");
            assert_eq!(one.digest, other.digest, "{what}, rank {rank}");
        }
    }
}

/// Weights that a rank holds are its shard and what is listed as replicated; all ranks together hold the
/// model once, and each replica as often as it says. A block of the cache is the rank's heads.
fn memory_is_as_planned(model: &Model, config: &Value, runs: &[RankRun], what: &str) {
    let whole: usize = model.specs.iter().map(|spec| spec.shape.iter().product::<usize>()).sum();
    let mut once = 0.0;
    for run in runs {
        let RankRun { lowered, weight_bytes: held, .. } = run;
        assert_eq!(*held, weight_bytes(lowered, |_| 4).0, "{what}, rank {}", lowered.rank.0);
        for weight in lowered.weights.iter().flatten() {
            once += weight.region.elements() as f64 / weight.copies as f64;
        }
        if lowered.mesh.tp > 1
            || lowered.mesh.expert_parallel && lowered.tensors().count() < model.specs.len()
        {
            assert!(*held < whole as u64 * 4, "{what}: a rank holds the whole model");
        }
    }
    assert!((once - whole as f64).abs() < 1e-3, "{what}: {once} of {whole} elements");
    let number = |field: &str| config[field].as_u64().unwrap_or(0);
    let tp = runs[0].lowered.mesh.tp as u64;
    let row = match number("kv_lora_rank") {
        0 => 2 * (number("num_key_value_heads") / tp).max(1) * number("head_dim"),
        latent => latent + number("qk_rope_head_dim"),
    };
    let expected = number("num_hidden_layers") * row * 64 * 4;
    for run in runs {
        let bytes: u64 = run.groups.iter().map(|group| group.block_bytes.0).sum();
        assert_eq!(bytes, expected, "{what}, rank {}", run.lowered.rank.0);
    }
}

/// Every collective of every step moves what `model explain` says for the rows it ran with.
fn bytes_are_as_explained(runs: &[RankRun], mesh: Mesh, script: &[Vec<ranks::Turn>], what: &str) {
    let (planned, _) = ranks::plans(&ranks::offered(&runs[0].lowered), script);
    for run in runs {
        let lowered = &run.lowered;
        let ops: Vec<&Op> = lowered.body.iter().chain(&lowered.head).collect();
        let (mut exchanges, mut idle) = (0, 0);
        for ((planned, outcome), moved) in planned.iter().zip(&run.outcomes).zip(&run.moved) {
            assert_eq!(moved.len(), ops.len());
            let described = outcome.prompt_logprobs.iter().map(|part| part.entries.len());
            let wanted = outcome.sampled.len() + described.sum::<usize>();
            idle += usize::from(outcome.timing.tokens == 0);
            for (at, (op, moved)) in ops.iter().zip(moved).enumerate() {
                let rows =
                    if at < lowered.body.len() { planned.plan.bucket.as_usize() } else { wanted };
                let explained = model::lower::Lowered { bucket: rows, ..lowered.clone() };
                let bytes = collective_bytes(&explained, op).0;
                assert_eq!(*moved, bytes, "{what}, {} at {at}, {rows} rows", op.name());
                exchanges += usize::from(bytes > 0);
            }
        }
        let dp_alone =
            mesh.tp == 1 && !lowered.body.iter().any(|op| collective_bytes(lowered, op).0 > 0);
        assert_eq!(exchanges == 0, dp_alone, "{what}: ranks exchange");
        let shard = mesh.coordinate(lowered.rank, Axis::Dp);
        assert_eq!(idle > 0, shard == 1, "{what}: shard {shard} was idle in {idle} steps");
    }
}

/// What is wrong with collectives.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// Sums are this rank's summand.
    NoSums,
    /// Parts lie behind each other where they belong side by side.
    Behind,
    /// What is scattered is a part of this rank's summand.
    NoScatteredSums,
    /// The rank ends before its so-manieth operation.
    Ends(usize),
}

struct Planted {
    memory: Option<SharedMemory>,
    fault: Fault,
    done: usize,
}

impl Planted {
    fn over(memory: SharedMemory, fault: Fault) -> Box<dyn Collectives> {
        Box::new(Self { memory: Some(memory), fault, done: 0 })
    }

    fn end(&mut self) -> Result<&mut SharedMemory, CollectiveError> {
        self.done += 1;
        if self.fault == Fault::Ends(self.done) {
            self.memory = None;
        }
        self.memory.as_mut().ok_or(CollectiveError::Aborted { reason: "planted".to_owned() })
    }
}

impl Collectives for Planted {
    fn rank(&self) -> usize {
        self.memory.as_ref().map_or(0, Collectives::rank)
    }

    fn world(&self) -> usize {
        self.memory.as_ref().map_or(0, Collectives::world)
    }

    fn begin_step(&mut self, step: u64) {
        self.memory.as_mut().expect("not ended between steps").begin_step(step);
    }

    fn all_reduce(&mut self, group: &Group, x: ElementsMut<'_>) -> Moved {
        if self.fault == Fault::NoSums { Ok(0) } else { self.end()?.all_reduce(group, x) }
    }

    fn all_gather(&mut self, group: &Group, parts: Transfer<'_>, run: usize) -> Moved {
        let Transfer::F32 { x, out } = parts else { panic!("singles") };
        let run = if self.fault == Fault::Behind { x.len() } else { run };
        self.end()?.all_gather(group, Transfer::F32 { x, out }, run)
    }

    fn reduce_scatter(&mut self, group: &Group, parts: Transfer<'_>) -> Moved {
        let Transfer::F32 { x, out } = parts else { panic!("singles") };
        if self.fault == Fault::NoScatteredSums {
            let len = out.len();
            out.copy_from_slice(&x[group.position() * len..][..len]);
            return Ok(0);
        }
        self.end()?.reduce_scatter(group, Transfer::F32 { x, out })
    }
}

#[test]
fn a_collective_that_does_nothing_is_seen() {
    let (_, config) = families().remove(3);
    let model = Model::new(&config, 23);
    let (mesh, script) = (mesh(2, 2, true), script(2));
    let alone: Vec<Completions> = script.iter().map(|turns| ranks::alone(&model, turns)).collect();
    for fault in [Fault::None, Fault::NoSums, Fault::Behind, Fault::NoScatteredSums] {
        let wrap = |memory| Planted::over(memory, fault);
        let runs = ranks::run(&model, mesh, &script, &wrap);
        let got = ranks::completions(&runs, &script, mesh);
        let off = |(got, alone): (&Completions, &Completions)| {
            let prompts = |all: &Completions| -> Vec<f32> {
                all.values().flat_map(|completion: &Completion| completion.prompt.clone()).collect()
            };
            let pairs = prompts(got).into_iter().zip(prompts(alone));
            pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
        };
        let off = got.iter().zip(&alone).map(off).fold(0.0, f32::max);
        assert_eq!(off <= TOLERANCE, fault == Fault::None, "{fault:?}: off by {off}");
    }
}

#[test]
fn a_rank_that_ends_in_a_step_ends_all_and_is_named() {
    let (_, config) = families().remove(0);
    let model = Model::new(&config, 23);
    // A step has seven sums in its body and a part of logits in its head: in the second one's third sum.
    let wrap = |memory: SharedMemory| {
        let fault = if memory.rank() == 2 { Fault::Ends(11) } else { Fault::None };
        Planted::over(memory, fault)
    };
    let runs = ranks::run(&model, mesh(1, 4, false), &script(1), &wrap);
    for run in &runs {
        let rank = run.lowered.rank.0;
        assert_eq!(run.outcomes.len(), 1, "rank {rank}: the step before is whole");
        let Some(StepError::Collective { step, source }) = &run.error else {
            panic!("rank {rank}: {:?}", run.error)
        };
        assert_eq!(step.0, 2);
        let text = source.to_string();
        if rank == 2 {
            assert!(text.contains("planted"), "{text}");
        } else {
            assert!(text.starts_with("rank 2 ended before all_reduce over tp, "), "{text}");
            assert!(text.contains(" bytes, step 2: rank "), "{text}");
        }
    }
}

#[test]
fn loaders_read_a_ranks_parts_alone() {
    let (_, config) = families().remove(3);
    let model = Model::new(&config, 23);
    let dir = tempfile::tempdir().expect("a folder");
    let config_path = dir.path().join("config.json");
    std::fs::write(&config_path, config.to_string()).expect("a file");
    weights::write_random(
        dir.path(),
        &config_path,
        &model.random,
        model.specs.clone(),
        &weights::WriteOptions::default(),
        &weights::progress::Silent,
    )
    .expect("files");
    let checkpoint = weights::Checkpoint::open(dir.path()).expect("a checkpoint");
    let program = model::families::program(&model.config, true);
    let mut columns = 0;
    for rank in 0..4 {
        let lowered =
            model::lower::lower(&program, mesh(2, 2, true), Rank(rank), 8).expect("lowered");
        let parts = engine::parts(&lowered);
        let silent = &weights::progress::Silent;
        let load = weights::LoadOptions::default();
        let stored =
            weights::Weights::load_parts(&checkpoint, &parts, &load, silent).expect("parts");
        let drawn = ranks::weights(&model, &lowered);
        let mut copied = 0;
        for part in &parts {
            let [stored, drawn] =
                [&stored, &drawn].map(|from| from.get(&part.name).expect("a part"));
            assert_eq!((stored.shape, stored.data), (drawn.shape, drawn.data), "{}", part.name);
            let whole = model.weights.get(&part.name).expect("a tensor");
            let (all, width) = (whole.data.to_f32(), part.shape.iter().skip(1).product::<usize>());
            let rows = part.rows().flat_map(|row| part.cols().map(move |col| row * width + col));
            let expected: Vec<f32> = rows.map(|at| all[at]).collect();
            assert_eq!(stored.data.to_f32(), expected, "{}", part.name);
            if part.cols().len() < width {
                copied += expected.len() as u64 * 4;
            }
        }
        assert_eq!(stored.made_bytes(), copied, "rows are used as they lie in the file");
        assert_eq!(stored.held_bytes(), drawn.held_bytes());
        columns += copied;
    }
    assert!(columns > 0);
}

#[test]
fn an_engine_is_made_for_the_rank_of_its_collectives() {
    let (_, config) = families().remove(0);
    let model = Model::new(&config, 23);
    let program = model::families::program(&model.config, false);
    let lowered =
        |rank| model::lower::lower(&program, mesh(1, 2, false), Rank(rank), 8).expect("lowered");
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("ranks");
    let _region = device::collectives::SharedRegion::create(&path, 2, 4096).expect("memory");
    let memory =
        SharedMemory::join(&path, 1, device::collectives::DEFAULT_TIMEOUT).expect("a place");
    let weights = ranks::weights(&model, &lowered(0));
    let options = ranks::options();
    let refused = |result: Result<engine::Engine<'_>, engine::EngineError>| match result {
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    };
    let alone = engine::Engine::new(&program, lowered(0), &weights, options.clone());
    assert!(refused(alone).contains("lowered for 2 ranks"));
    let memory: Box<dyn Collectives> = Box::new(memory);
    let other = engine::Engine::of_rank(&program, lowered(0), &weights, memory, options);
    assert!(refused(other).contains("collectives of rank 1 of 2 for a program lowered for rank 0"));
}
