//! Rows that are there for other ranks' sake: no expert is theirs, and what ranks exchange of them is zero.

use super::*;
use crate::KvDtype;
use crate::cpu::KvMemory;
use crate::cpu::arena::Arena;
use model::program::{Router, Scoring};

const EXPERTS: usize = 4;
const TOP_K: usize = 2;
const ROWS: Rows = Rows { own: 1, padded: 4 };

fn memory(elements: usize) -> Memory {
    let mut arena = Arena::default();
    arena.allocate(elements);
    let choices = 2 * ROWS.padded * TOP_K;
    Memory {
        arena,
        head_arena: Arena::default(),
        scratch: Vec::new(),
        moe: None,
        routing: Routing { top_k: 0, experts: vec![7; choices], weights: vec![0.0; choices] },
        kv: KvMemory::new(KvDtype::F32, 0, 0),
        rows: ROWS,
        segments: Vec::new(),
    }
}

#[test]
fn padding_of_no_shard_has_an_expert() {
    let router = Router {
        correction: None,
        scoring: Scoring::Softmax,
        norm_topk: false,
        limit: None,
        scale: 1.0,
        top_k: TOP_K,
        experts: EXPERTS,
    };
    let logits = Place { offset: 0, width: EXPERTS, shards: 2 };
    let router = crate::cpu::launch::local_router(&router);
    let route = Launch::Route { logits, router, correction: None };
    let pool = ThreadPool::new(1);
    let mut memory = memory(2 * ROWS.padded * EXPERTS);
    // One token here, three in the other shard; the step's rows are four of each.
    let step = Step {
        pool: &pool,
        rotations: &[],
        form: MlaForm::Auto,
        ids: &[],
        positions: &[],
        rows: ROWS,
        in_head: false,
        shard_rows: &[1, 3],
    };
    step.run(&route, &[], &mut memory, None).expect("nothing is exchanged");
    let chosen = memory.routing.experts.chunks_exact(TOP_K);
    let routed: Vec<bool> = chosen.map(|experts| experts != [NOBODY; TOP_K]).collect();
    assert_eq!(routed, [true, false, false, false, true, true, true, false]);
    assert_eq!(memory.routing.experts[..TOP_K], [0, 1], "of equals the first");
}

#[test]
fn padding_is_zero_where_ranks_exchange_it() {
    let mut memory = memory(64);
    let (x, beside) =
        (Place { offset: 0, width: 3, shards: 1 }, Place { offset: 8, width: 2, shards: 2 });
    memory.arena.one(Place { offset: 0, width: 16, shards: 1 }, Rows::exactly(4)).fill(5.0);
    assert_eq!(memory.arena.one(x, ROWS), [5.0; 3]);
    let padded = memory.arena.padded(x, ROWS);
    assert_eq!((&padded[..3], &padded[3..]), (&[5.0; 3][..], &[0.0; 9][..]));
    // Of all shards every row is used.
    assert_eq!(memory.arena.padded(beside, ROWS), [5.0; 16]);
}
