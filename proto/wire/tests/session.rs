//! Both ends over a real Unix socket: every message arrives as it was sent, one session a life.

use ids::*;
use proptest::prelude::*;
use std::sync::Arc;
use std::time::Duration;
use step::*;

fn sampling() -> impl Strategy<Value = Sampling> {
    (
        (0.0_f32..2.0, any::<u32>(), 0.1_f32..1.0, 0.0_f32..1.0, any::<u64>(), any::<u32>()),
        prop::collection::btree_map(any::<u32>(), -100.0_f32..100.0, 0..4),
        prop::option::of(0_u8..=20),
        prop::collection::vec(any::<u32>(), 0..3),
    )
        .prop_map(
            |((temperature, top_k, top_p, min_p, seed, choice), bias, logprobs, banned)| Sampling {
                temperature,
                top_k,
                top_p,
                min_p,
                seed,
                choice,
                repetition_penalty: 1.1,
                presence_penalty: -0.5,
                frequency_penalty: 0.25,
                logit_bias: bias.into_iter().map(|(t, b)| (TokenId(t), b)).collect(),
                min_tokens: Tokens(7),
                banned_before_min: banned.into_iter().map(TokenId).collect(),
                logprobs,
            },
        )
}

fn slot_op() -> impl Strategy<Value = SlotOp> {
    let blocks = prop::collection::vec((any::<u8>(), any::<u32>()), 0..4);
    prop_oneof![
        (any::<[u32; 4]>(), blocks.clone(), sampling(), prop::option::of(0_u8..=20)).prop_map(
            |(n, blocks, sampling, prompt_logprobs)| {
                SlotOp::Admit(Box::new(Admit {
                    slot: SlotRef { slot: SlotId(n[0]), generation: SlotGeneration(n[1]) },
                    request: RequestId(u64::from(n[2]) << 20),
                    known: Tokens(n[3]),
                    prompt: Tokens(n[2]),
                    cached: Tokens(n[1]),
                    tables: blocks
                        .into_iter()
                        .map(|(g, b)| GroupTable {
                            group: GroupId(g),
                            skipped: b,
                            blocks: vec![BlockId(b), BlockId(1)],
                        })
                        .collect(),
                    sampling: Arc::new(sampling),
                    prompt_logprobs,
                }))
            }
        ),
        (any::<u32>(), blocks).prop_map(|(slot, blocks)| SlotOp::Extend {
            slot: SlotId(slot),
            blocks: blocks
                .into_iter()
                .map(|(g, b)| WriteSlot { group: GroupId(g), block: BlockId(b) })
                .collect(),
        }),
        any::<(u32, u8, u32)>().prop_map(|(s, g, first_live)| SlotOp::Trim {
            slot: SlotId(s),
            group: GroupId(g),
            first_live,
        }),
        any::<u32>().prop_map(|slot| SlotOp::Retire { slot: SlotId(slot) }),
        any::<(u8, u32, u32)>().prop_map(|(g, b, at)| SlotOp::Store {
            group: GroupId(g),
            block: BlockId(b),
            at: TierSlot(at),
        }),
        any::<(u32, u8, u32)>().prop_map(|(at, g, b)| SlotOp::Load {
            at: TierSlot(at),
            block: WriteSlot { group: GroupId(g), block: BlockId(b) },
        }),
    ]
}

fn command() -> impl Strategy<Value = ToWorker> {
    let slots = prop::collection::vec(any::<u32>().prop_map(SlotId), 0..4);
    let step = (
        any::<(u64, u64, u32)>(),
        prop::collection::vec(slot_op(), 0..6),
        prop::collection::vec(any::<(u32, u32, bool)>(), 0..4),
        slots.clone(),
        slots,
    )
        .prop_map(|((seq, incarnation, bucket), ops, prefill, join, leave)| {
            ToWorker::Step(Arc::new(StepPlan {
                seq: StepSeq(seq),
                incarnation: Incarnation(incarnation),
                bucket: Tokens(bucket),
                shard_tokens: vec![Tokens(bucket)],
                sections: vec![Section {
                    ops,
                    prefill: prefill
                        .into_iter()
                        .map(|(slot, tokens, sample)| PrefillRun {
                            slot: SlotId(slot),
                            tokens: Tokens(tokens),
                            sample,
                        })
                        .collect(),
                    decode: DecodeDelta { join, leave },
                }],
            }))
        });
    prop_oneof![
        4 => step,
        1 => (any::<(u64, u64, u32)>(), prop::collection::vec(any::<u32>(), 0..9)).prop_map(
            |((i, r, offset), tokens)| ToWorker::Upload(Upload {
                incarnation: Incarnation(i),
                request: RequestId(r),
                offset: Tokens(offset),
                tokens: tokens.into_iter().map(TokenId).collect(),
            })
        ),
        1 => any::<(u64, u64)>().prop_map(|(i, r)| ToWorker::Forget(Incarnation(i), RequestId(r))),
        1 => any::<(u64, [u32; 5])>().prop_map(|(i, n)| ToWorker::Configure(Configure {
            incarnation: Incarnation(i),
            max_slots: n[0],
            max_step_tokens: Tokens(n[1]),
            max_context: Tokens(n[2]),
            carving: Carving {
                super_bytes: Bytes(i),
                supers: n[3],
                per_super: vec![n[4], 1],
                host_blocks: n[0],
            },
        })),
    ]
}

fn logprobs() -> impl Strategy<Value = Logprobs> {
    prop::collection::vec((any::<u32>(), -50.0_f32..0.0, 1_u32..9), 1..4).prop_map(|all| {
        let mut all = all.into_iter().map(|(t, logprob, rank)| TokenLogprob {
            token: TokenId(t),
            logprob,
            rank,
        });
        Logprobs { chosen: all.next().expect("at least one"), top: all.collect() }
    })
}

fn reply() -> impl Strategy<Value = ToScheduler> {
    let sampled = (any::<(u32, u32, u32)>(), 0..3_u8, prop::option::of(logprobs())).prop_map(
        |((slot, generation, token), fault, logprobs)| Sampled {
            slot: SlotId(slot),
            generation: SlotGeneration(generation),
            token: TokenId(token),
            fault: [None, Some(SampleFault::NotANumber), Some(SampleFault::NothingAllowed)]
                [usize::from(fault)],
            logprobs: logprobs.map(Box::new),
        },
    );
    let prompt = (any::<(u64, u32)>(), prop::collection::vec(logprobs(), 0..3)).prop_map(
        |((request, first), entries)| PromptLogprobs {
            request: RequestId(request),
            first: Tokens(first),
            entries,
        },
    );
    let outcome = (
        any::<(u64, u64, u64)>(),
        prop::collection::vec(sampled, 0..5),
        prop::collection::vec(prompt, 0..3),
    )
        .prop_map(|((seq, incarnation, digest), sampled, prompt_logprobs)| {
            ToScheduler::Outcome(Outcome {
                seq: StepSeq(seq),
                incarnation: Incarnation(incarnation),
                sampled,
                prompt_logprobs,
                timing: StepTiming {
                    total_ns: seq,
                    model_ns: 1,
                    idle_ns: 4,
                    launches: 5,
                    host_draws: true,
                    graphs: 6,
                    uncaptured: true,
                    tokens: 2,
                    prefill_tokens: 3,
                },
                digest,
            })
        });
    prop_oneof![
        4 => outcome,
        1 => any::<(String, u64, u64)>().prop_map(|(stage, done, total)| ToScheduler::Loading(
            LoadProgress { stage, done: Bytes(done), total: Bytes(total) }
        )),
        1 => any::<(String, u32, Option<u32>, u64)>().prop_map(|(name, n, window, b)| {
            ToScheduler::Hello(Hello {
                architecture: name.clone(),
                vocab: n,
                max_context: Tokens(n),
                groups: vec![GroupSpec {
                    group: GroupId(1),
                    kind: window.map_or(GroupKind::Full, |w| GroupKind::Sliding { window: Tokens(w) }),
                    block_bytes: Bytes(b),
                }],
                cache_bytes: Bytes(b),
                alignment: Bytes(256),
                backend: name,
                seat: Seat {
                    mesh: Mesh { dp: 2, tp: 1 + n % 7, expert_parallel: b % 2 == 1 },
                    rank: Rank(1 + n % 7),
                },
                weight_bytes: Bytes(b / 3),
                host_bytes: Bytes(b / 5),
            })
        }),
        1 => (0_usize..5, any::<u64>()).prop_map(|(phase, nanos)| {
            use StartPhase::{Device, Graphs, Kernels, Memory, Weights};
            let phase = [Device, Kernels, Weights, Memory, Graphs][phase];
            ToScheduler::Started(phase, Duration::from_nanos(nanos))
        }),
        1 => any::<u64>().prop_map(|i| ToScheduler::Ready(Incarnation(i))),
        1 => any::<String>().prop_map(ToScheduler::Fault),
    ]
}

/// Sends every command and reply through a socket and returns what arrived.
async fn through_a_socket(
    commands: Vec<ToWorker>,
    replies: Vec<ToScheduler>,
) -> (Vec<ToWorker>, Vec<ToScheduler>) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let socket = dir.path().join("worker.sock");
    let (got_in, got) = tokio::sync::oneshot::channel();
    let count = commands.len();
    let server = tokio::spawn({
        let socket = socket.clone();
        async move {
            wire::serve(&socket, move |mut session| {
                tokio::spawn(async move {
                    let mut got = Vec::new();
                    while got.len() < count {
                        match session.commands.recv().await {
                            Some(command) => got.push(command.expect("well formed")),
                            None => break,
                        }
                    }
                    for reply in replies {
                        session.replies.send(reply).expect("stream open");
                    }
                    let _ = got_in.send(got);
                });
            })
            .await
        }
    });
    let mut session = loop {
        match wire::connect(&socket).await {
            Ok(session) => break session,
            Err(wire::ConnectError::Unreachable { .. }) => tokio::task::yield_now().await,
            Err(other) => panic!("{other}"),
        }
    };
    assert!(
        matches!(wire::connect(&socket).await, Err(wire::ConnectError::Refused(_))),
        "a second scheduler must be refused"
    );
    for command in commands {
        session.commands.send(command).expect("stream open");
    }
    let mut back = Vec::new();
    while let Some(reply) = session.replies.recv().await {
        back.push(reply.expect("no error before the orderly end"));
    }
    drop(session);
    server.await.expect("no panic").expect("served");
    (got.await.expect("the worker's end ran"), back)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn what_is_sent_arrives(
        commands in prop::collection::vec(command(), 1..12),
        replies in prop::collection::vec(reply(), 0..12),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let (got, back) = runtime.block_on(through_a_socket(commands.clone(), replies.clone()));
        prop_assert_eq!(got, commands);
        prop_assert_eq!(back, replies);
    }
}

#[test]
fn a_dead_worker_ends_the_replies() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let socket = dir.path().join("worker.sock");
    // Its own runtime, so that dropping it takes every task and socket with it, as a kill does.
    let worker = tokio::runtime::Runtime::new().expect("a runtime");
    worker.spawn({
        let socket = socket.clone();
        async move { wire::serve(&socket, std::mem::forget).await }
    });
    let scheduler = tokio::runtime::Runtime::new().expect("a runtime");
    scheduler.block_on(async {
        let mut session = loop {
            if let Ok(session) = wire::connect(&socket).await {
                break session;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        worker.shutdown_background();
        let last = tokio::time::timeout(Duration::from_secs(5), session.replies.recv()).await;
        assert!(!matches!(last.expect("detected in time"), Some(Ok(_))));
    });
}
