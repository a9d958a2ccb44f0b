//! Plans that contradict the engine's state are errors by name.

mod common;

use common::{LIFE, Model, Session, Setup, families, greedy, prompt};
use engine::{EngineError, PlanError, StepError, WeightError};
use ids::{
    BlockId, Bytes, GroupId, Incarnation, RequestId, SlotId, StepSeq, TierSlot, TokenId, Tokens,
};
use step::{Carving, Configure, PrefillRun, SlotOp, StepPlan, Upload, WriteSlot};
use weights::random::RandomWeights;

fn session() -> Session {
    let (_, config) = families().remove(3);
    Model::new(&config, 1).session(Setup::default())
}

/// What of a plan was refused; no device is involved here.
fn plan_error(error: StepError) -> PlanError {
    match error {
        StepError::Plan(error) => error,
        StepError::Device { .. } | StepError::Collective { .. } => panic!("{error}"),
    }
}

/// A session with one slot decoding after 100 tokens, and what becomes of a changed empty plan.
fn refused(change: impl FnOnce(&mut StepPlan)) -> PlanError {
    let mut session = session();
    session.admit(0, &prompt(100, 1), 100, greedy());
    session.step(&[(0, 100)]);
    let mut plan = session.plan(&[]);
    change(&mut plan);
    plan_error(session.engine.step(&plan).expect_err("a contradiction"))
}

fn op(op: SlotOp) -> PlanError {
    refused(|plan| plan.sections[0].ops.insert(0, op))
}

fn chunk(slot: u32, tokens: u32, sample: bool) -> PlanError {
    let run = PrefillRun { slot: SlotId(slot), tokens: Tokens(tokens), sample };
    refused(|plan| plan.sections[0].prefill.push(run))
}

fn extend(group: u8, block: u32) -> PlanError {
    let blocks = vec![WriteSlot { group: GroupId(group), block: BlockId(block) }];
    op(SlotOp::Extend { slot: SlotId(0), blocks })
}

#[test]
fn every_contradiction_has_its_name() {
    use PlanError as E;
    assert!(matches!(refused(|p| p.incarnation = Incarnation(1)), E::Incarnation { .. }));
    assert!(matches!(refused(|p| p.seq = StepSeq(1)), E::Sequence { .. }));
    assert!(matches!(refused(|p| p.sections.clear()), E::Sections { got: 0, shards: 1, .. }));
    assert!(matches!(op(SlotOp::Retire { slot: SlotId(1) }), E::NotAdmitted { .. }));
    assert!(matches!(op(SlotOp::Retire { slot: SlotId(4000) }), E::NoSlot { .. }));
    assert!(matches!(extend(9, 0), E::NoGroup(GroupId(9))));
    assert!(matches!(extend(0, u32::MAX), E::NoBlock { .. }));
    let block = WriteSlot { group: GroupId(0), block: BlockId(0) };
    let (group, at) = (GroupId(9), TierSlot(0));
    assert!(matches!(op(SlotOp::Load { at, block }), E::NoPlace { places: 0, .. }));
    assert!(matches!(op(SlotOp::Store { group, block: block.block, at }), E::NoGroup(GroupId(9))));
    assert!(matches!(chunk(0, 0, false), E::Chunk { .. }));
    assert!(matches!(chunk(0, 2, false), E::Chunk { .. }));
    assert!(matches!(chunk(7, 1, false), E::NotAdmitted { .. }));
    let join = |p: &mut StepPlan| p.sections[0].decode.join.push(SlotId(0));
    assert!(matches!(refused(join), E::DecodeSet { inside: true, .. }));
    let leave = |p: &mut StepPlan| p.sections[0].decode.leave = vec![SlotId(0), SlotId(0)];
    assert!(matches!(refused(leave), E::DecodeSet { inside: false, .. }));
    // The window is 70 tokens: position 100 reads from block 0 on.
    let trim = |first_live| SlotOp::Trim { slot: SlotId(0), group: GroupId(1), first_live };
    assert!(matches!(op(trim(1)), E::Trimmed { needed: 0, live: 1, .. }));
    assert!(matches!(
        op(SlotOp::Trim { slot: SlotId(0), group: GroupId(0), first_live: 1 }),
        E::Trimmed { .. }
    ));
    let many = (0..20).map(|block| WriteSlot { group: GroupId(0), block: BlockId(block) });
    let many = SlotOp::Extend { slot: SlotId(0), blocks: many.collect() };
    assert!(matches!(op(many), E::TableFull { .. }));
}

#[test]
fn a_configuration_that_does_not_fit_names_its_field() {
    let (_, config) = families().remove(3);
    let model = Model::new(&config, 1);
    let block =
        model.engine().hello().groups.iter().map(|g| g.block_bytes.0).max().expect("groups");
    let fits = Configure {
        incarnation: LIFE,
        max_slots: 4,
        max_step_tokens: Tokens(64),
        max_context: Tokens(512),
        carving: Carving {
            super_bytes: Bytes(block.next_multiple_of(128)),
            supers: 2,
            per_super: vec![1, 1],
            host_blocks: 0,
        },
    };
    let refusal = |change: &dyn Fn(&mut Configure)| {
        let mut configure = fits.clone();
        change(&mut configure);
        match model.engine().configure(&configure) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        }
    };
    assert_eq!(refusal(&|_| ()), "");
    type Change = fn(&mut Configure);
    let cases: [(&str, Change); 8] = [
        ("max_slots", |c| c.max_slots = 0),
        ("max_step_tokens", |c| c.max_step_tokens = Tokens(u32::MAX)),
        ("max_context", |c| c.max_context = Tokens(513)),
        ("exceed the cache", |c| c.carving.supers = u32::MAX),
        ("not aligned", |c| c.carving.super_bytes.0 += 4),
        ("2", |c| c.carving.per_super = vec![1]),
        ("behind the cache, where there are 0", |c| c.carving.host_blocks = 1),
        ("do not fit", |c| c.carving.per_super = vec![1, 2000]),
    ];
    for (wanted, change) in cases {
        let text = refusal(&change);
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    let early = StepPlan {
        seq: StepSeq(1),
        incarnation: LIFE,
        bucket: Tokens(1),
        shard_tokens: vec![],
        sections: vec![],
    };
    assert_eq!(model.engine().step(&early), Err(PlanError::NotConfigured.into()));
}

#[test]
fn a_slot_out_of_room_is_refused_before_anything_runs() {
    let mut session = session();
    session.admit(0, &prompt(64, 1), 64, greedy());
    session.step(&[(0, 64)]);
    let mut plan = session.plan(&[]);
    plan.sections[0].ops.clear();
    let error = plan_error(session.engine.step(&plan).expect_err("no block for token 65"));
    assert!(matches!(error, PlanError::NoRoom { reach: Tokens(65), room: Tokens(64), .. }));
}

#[test]
fn an_admission_needs_its_tokens_a_free_slot_and_a_new_generation() {
    let mut session = session();
    session.admit(0, &prompt(10, 1), 10, greedy());
    let plan = session.plan(&[(0, 10)]);
    session.engine.forget(RequestId(1));
    let error = plan_error(session.engine.step(&plan).expect_err("forgotten"));
    assert!(matches!(error, PlanError::NotUploaded { held: Tokens(0), .. }));

    let mut session = self::session();
    session.admit(0, &prompt(10, 1), 10, greedy());
    session.step(&[(0, 10)]);
    session.admit(0, &prompt(10, 1), 10, greedy());
    let plan = session.plan(&[]);
    let error = plan_error(session.engine.step(&plan).expect_err("occupied"));
    assert!(matches!(error, PlanError::Occupied { .. }));
}

#[test]
fn uploads_leave_no_gap_and_name_known_tokens() {
    let mut session = session();
    let upload = |offset, tokens: &[u32]| Upload {
        incarnation: LIFE,
        request: RequestId(50),
        offset: Tokens(offset),
        tokens: tokens.iter().copied().map(TokenId).collect(),
    };
    assert_eq!(session.engine.upload(&upload(0, &[1, 2])), Ok(()));
    let gap = session.engine.upload(&upload(3, &[1]));
    assert!(matches!(gap, Err(PlanError::UploadGap { held: Tokens(2), .. })));
    let unknown = session.engine.upload(&upload(2, &[97]));
    assert!(matches!(unknown, Err(PlanError::UnknownToken { token: 97, vocab: 97, .. })));
    let long = session.engine.upload(&upload(2, &[0; 511]));
    assert!(matches!(long, Err(PlanError::UploadGap { .. })));
}

#[test]
fn blocks_behind_a_sliding_window_can_be_given_up() {
    let (_, config) = families().remove(3);
    let model = Model::new(&config, 1);
    let run = |trims: bool| {
        let mut session = model.session(Setup::default());
        session.admit(0, &prompt(200, 1), 200, greedy());
        let mut tokens = vec![session.step(&[(0, 200)]).sampled[0].token];
        for _ in 0..70 {
            let mut plan = session.plan(&[]);
            if trims {
                let first_live = (199 + tokens.len() as u32 - 70) / 64;
                let trim = SlotOp::Trim { slot: SlotId(0), group: GroupId(1), first_live };
                plan.sections[0].ops.push(trim);
            }
            let outcome = session.engine.step(&plan).expect("a plan that fits");
            tokens.push(outcome.sampled[0].token);
        }
        tokens
    };
    assert_eq!(run(true), run(false));
}

#[test]
fn the_processor_is_not_given_weights_that_nobody_made() {
    let (_, config) = families().remove(0);
    let model = Model::new(&config, 1);
    let drawn = RandomWeights::new(&model.random, &model.specs, 1).expect("weights");
    let Err(error) = model.engine_over(&drawn) else { panic!("accepted") };
    assert!(matches!(error, EngineError::Weight(WeightError::NotMade { .. })), "{error}");
}
