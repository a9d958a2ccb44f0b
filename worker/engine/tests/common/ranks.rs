//! A model on every rank of a mesh, ranks as threads: plans are written ahead, since greedy tokens change
//! none of them, and every rank runs all of them.

use super::{Completion, Hand, LIFE, Model, Setup, begin, greedy, prompt};
use device::collectives::{Collectives, DEFAULT_TIMEOUT, SharedMemory, SharedRegion};
use engine::{Device, Engine, KvDtype, MlaForm, Options, StepError};
use ids::{Bytes, StepSeq, Tokens};
use model::families;
use model::lower::{Lowered, lower};
use model::mesh::{Axis, Mesh, Rank};
use std::collections::BTreeMap;
use std::thread;
use step::{GroupSpec, Outcome, StepPlan, Upload};
use weights::progress::Silent;
use weights::{Dtype, Weights};

/// Of super-blocks on the processor.
const ALIGNMENT: u64 = 128;

/// What a shard is asked, one entry a step: requests that come, chunks that run, requests that go.
#[derive(Clone, Default)]
pub struct Turn {
    pub admit: Vec<(u32, Vec<u32>)>,
    pub chunks: Vec<(u32, u32)>,
    pub retire: Vec<u32>,
}

/// A long prompt in chunks beside a short one; two decode together, one ends, another comes.
pub fn busy(seed: u32) -> Vec<Turn> {
    let admit = |slot, tokens| vec![(slot, prompt(tokens, seed + slot))];
    let mut turns = vec![
        Turn { admit: admit(0, 90), chunks: vec![(0, 40)], ..Turn::default() },
        Turn { admit: admit(1, 9), chunks: vec![(0, 50), (1, 9)], ..Turn::default() },
        Turn::default(),
        Turn::default(),
        Turn { retire: vec![1], admit: admit(2, 3), chunks: vec![(2, 3)] },
    ];
    turns.extend(vec![Turn::default(); 4]);
    turns
}

/// Nothing at first, one request in the middle, nothing at the end.
pub fn late(seed: u32) -> Vec<Turn> {
    let mut turns = vec![Turn::default(); 3];
    let admit = vec![(5, prompt(17, seed))];
    turns.push(Turn { admit, chunks: vec![(5, 17)], ..Turn::default() });
    turns.extend(vec![Turn::default(); 2]);
    turns.push(Turn { retire: vec![5], ..Turn::default() });
    turns.extend(vec![Turn::default(); 2]);
    turns
}

/// What shards are asked, each its own.
pub fn script(shards: usize) -> Vec<Vec<Turn>> {
    (0..shards).map(|shard| if shard == 1 { late(40) } else { busy(shard as u32 * 10) }).collect()
}

fn take_turn(hand: &mut Hand, turn: &Turn) -> StepPlan {
    turn.retire.iter().for_each(|slot| hand.retire(*slot));
    for (slot, tokens) in &turn.admit {
        hand.admit(*slot, tokens, tokens.len(), greedy());
    }
    hand.plan(&turn.chunks)
}

/// Completions of a shard's requests, by slot and in the order they came.
pub type Completions = BTreeMap<(u32, u32), Completion>;

/// Puts what came back to whose it is; prompts are described for the request whose chunk ran.
pub fn collect(outcomes: Vec<Outcome>, owners: &BTreeMap<u64, u32>) -> Completions {
    let mut done = Completions::new();
    for outcome in outcomes {
        for part in outcome.prompt_logprobs {
            let (request, slot) = (part.request.0, owners[&part.request.0]);
            let entry = done.entry((slot, request as u32)).or_default();
            entry.prompt.extend(part.entries.iter().map(|entry| entry.chosen.logprob));
        }
        for sampled in outcome.sampled {
            assert_eq!(sampled.fault, None);
            // The hand names requests as it names generations.
            let entry = done.entry((sampled.slot.0, sampled.generation.0)).or_default();
            entry.tokens.push(sampled.token.0);
            entry.logprobs.extend(sampled.logprobs.map(|logprobs| logprobs.chosen.logprob));
        }
    }
    done
}

/// A shard's script on one rank alone.
pub fn alone(model: &Model, turns: &[Turn]) -> Completions {
    let mut session = model.session(setup());
    let mut owners = BTreeMap::new();
    let mut outcomes = Vec::new();
    for turn in turns {
        let plan = take_turn(&mut session, turn);
        note_owners(&mut owners, &plan);
        let uploads = std::mem::take(&mut session.uploads);
        uploads.iter().for_each(|upload| session.engine.upload(upload).expect("tokens"));
        outcomes.push(session.engine.step(&plan).expect("a plan that fits"));
    }
    collect(outcomes, &owners)
}

fn note_owners(owners: &mut BTreeMap<u64, u32>, plan: &StepPlan) {
    for op in plan.sections.iter().flat_map(|section| &section.ops) {
        if let step::SlotOp::Admit(admit) = op {
            owners.insert(admit.request.0, admit.slot.slot.0);
        }
    }
}

/// Contexts and caches that the scripts need, and not more.
pub fn setup() -> Setup {
    Setup { slots: 8, tokens: 64, context: 128, supers: 12, ..Setup::default() }
}

/// Sizes of steps as the scheduler pads them.
fn bucket(tokens: u32) -> u32 {
    let power = tokens.next_power_of_two();
    match tokens {
        0..=8 => tokens,
        _ if tokens <= power / 4 * 3 => power / 4 * 3,
        _ => power,
    }
}

/// One step for all shards, and what each shard is told before it.
#[derive(Clone)]
pub struct Planned {
    pub plan: StepPlan,
    pub uploads: Vec<Vec<Upload>>,
}

/// The plans of a script, and whose requests are whose in each shard.
pub fn plans(
    groups: &[GroupSpec],
    script: &[Vec<Turn>],
) -> (Vec<Planned>, Vec<BTreeMap<u64, u32>>) {
    let mut hands: Vec<Hand> =
        script.iter().map(|_| begin(groups, ALIGNMENT, &setup()).1).collect();
    let mut owners = vec![BTreeMap::new(); script.len()];
    let steps = script.iter().map(Vec::len).max().unwrap_or(0);
    let planned = (0..steps).map(|step| {
        let (mut sections, mut uploads, mut shard_tokens) = (vec![], vec![], vec![]);
        for ((hand, turns), owners) in hands.iter_mut().zip(script).zip(&mut owners) {
            let (chunked, decoding) = (&turns[step].chunks, hand.decoding(&turns[step].retire));
            let tokens = chunked.iter().map(|(_, tokens)| tokens).sum::<u32>() + decoding;
            let plan = take_turn(hand, &turns[step]);
            note_owners(owners, &plan);
            sections.extend(plan.sections);
            uploads.push(std::mem::take(&mut hand.uploads));
            shard_tokens.push(Tokens(tokens));
        }
        let most = shard_tokens.iter().map(|tokens| tokens.0).max().unwrap_or(0);
        let seq = StepSeq(step as u64 + 1);
        let bucket = Tokens(bucket(most));
        let plan = StepPlan { seq, incarnation: LIFE, bucket, shard_tokens, sections };
        Planned { plan, uploads }
    });
    (planned.collect(), owners)
}

/// What a rank holds and did.
pub struct RankRun {
    pub lowered: Lowered,
    pub groups: Vec<GroupSpec>,
    pub weight_bytes: u64,
    pub outcomes: Vec<Outcome>,
    /// Bytes that came from others, of each step and op.
    pub moved: Vec<Vec<u64>>,
    pub error: Option<StepError>,
}

/// What stands between an engine and its collectives.
pub type Wrap<'a> = &'a (dyn Fn(SharedMemory) -> Box<dyn Collectives> + Sync);

pub fn unchanged(memory: SharedMemory) -> Box<dyn Collectives> {
    Box::new(memory)
}

/// Runs a script on every rank of a mesh.
pub fn run(model: &Model, mesh: Mesh, script: &[Vec<Turn>], wrap: Wrap<'_>) -> Vec<RankRun> {
    let dir = tempfile::tempdir().expect("a folder");
    let region = SharedRegion::create(&dir.path().join("ranks"), mesh.world(), 1 << 16);
    let region = region.expect("memory");
    let program = families::program(&model.config, mesh.expert_parallel);
    let lowered = |rank| lower(&program, mesh, Rank(rank), 64).expect("a mesh that divides");
    // Every rank offers the same cache, so plans may be written before any has said what it offers.
    let (planned, _) = plans(&offered(&lowered(0)), script);
    thread::scope(|scope| {
        let rank = |rank| {
            let (lowered, program, planned) = (lowered(rank), &program, &planned);
            let path = region.path();
            scope.spawn(move || {
                let memory = SharedMemory::join(path, rank, DEFAULT_TIMEOUT).expect("a place");
                live(model, program, lowered, wrap(memory), planned)
            })
        };
        let ranks: Vec<_> = (0..mesh.world()).map(rank).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank")).collect()
    })
}

/// Groups that a rank will offer, as far as a hand needs them.
pub fn offered(lowered: &Lowered) -> Vec<GroupSpec> {
    let groups = lowered.groups.iter().enumerate().map(|(number, group)| GroupSpec {
        group: ids::GroupId(number as u8),
        kind: step::GroupKind::Full,
        block_bytes: model::memory::block_bytes(group, 4),
    });
    groups.collect()
}

pub fn options() -> Options {
    Options {
        device: Device::Cpu,
        threads: 1,
        kv_dtype: KvDtype::F32,
        cache_bytes: Bytes(1 << 24),
        host_bytes: Bytes(0),
        graphs: false,
        mla_form: MlaForm::Auto,
        failing_launch: None,
    }
}

/// The rank's parts of the model's weights, and nothing else.
pub fn weights(model: &Model, lowered: &Lowered) -> Weights {
    let parts: Vec<_> = engine::parts(lowered).into_iter().map(|part| (part, Dtype::F32)).collect();
    Weights::random_parts(&model.random, &parts, 1, &Silent).expect("weights")
}

fn live(
    model: &Model,
    program: &model::program::Program,
    lowered: Lowered,
    collectives: Box<dyn Collectives>,
    planned: &[Planned],
) -> RankRun {
    let weights = weights(model, &lowered);
    let (mesh, rank) = (lowered.mesh, lowered.rank);
    let shard = mesh.coordinate(rank, Axis::Dp);
    let mut engine = Engine::of_rank(program, lowered.clone(), &weights, collectives, options())
        .expect("parts as the program wants them");
    let hello = engine.hello();
    assert_eq!(hello.alignment, Bytes(ALIGNMENT));
    engine.configure(&begin(&hello.groups, ALIGNMENT, &setup()).0).expect("a carving that fits");
    let mut run = RankRun {
        lowered,
        groups: hello.groups,
        weight_bytes: weights.held_bytes(),
        outcomes: Vec::new(),
        moved: Vec::new(),
        error: None,
    };
    for Planned { plan, uploads } in planned {
        uploads[shard].iter().for_each(|upload| engine.upload(upload).expect("tokens"));
        match engine.step(plan) {
            Ok(outcome) => run.outcomes.push(outcome),
            Err(error) => {
                run.error = Some(error);
                break;
            }
        }
        run.moved.push(engine.moved().to_vec());
    }
    run
}

/// Completions that a rank of every shard brought.
pub fn completions(runs: &[RankRun], script: &[Vec<Turn>], mesh: Mesh) -> Vec<Completions> {
    let (_, owners) = plans(&offered(&runs[0].lowered), script);
    let lead = |shard: usize| &runs[shard * mesh.tp];
    (0..mesh.dp).map(|shard| collect(lead(shard).outcomes.clone(), &owners[shard])).collect()
}
