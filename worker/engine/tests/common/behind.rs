//! Blocks that went behind the cache and came back, against the same blocks left where they were.

use super::{Completion, Model, Session, Setup, families, greedy, prompt};
use ids::{BlockId, GroupId, TierSlot};
use step::{SlotOp, WriteSlot};

/// Places behind the cache.
const PLACES: u32 = 4;
/// Where the three blocks go, so that a place is not the number of a block.
const AT: [u32; 3] = [2, 0, 3];
const OUTPUT: usize = 12;

/// A request on three blocks of another's prompt reads the same bits whether they stayed or were stored,
/// written over by somebody else, and loaded into other blocks.
pub fn blocks_come_back_to_the_bit(base: Setup) {
    for (name, config) in families() {
        let model = Model::new(&config, 8);
        let base = Setup { places: PLACES, ..base };
        let (stayed, back) = (on_a_prefix(&model, base, false), on_a_prefix(&model, base, true));
        assert_eq!(stayed.tokens.len(), OUTPUT);
        assert_eq!(back, stayed, "{name}");
    }
}

fn on_a_prefix(model: &Model, base: Setup, leave: bool) -> Completion {
    let tokens = prompt(200, 6);
    let mut session = model.session(base);
    let mut other = tokens[..192].to_vec();
    other.extend([1, 2, 3]);
    session.admit(0, &other, other.len(), greedy());
    session.step(&[(0, other.len() as u32)]);
    let mut shared: Vec<Vec<BlockId>> =
        session.blocks(0).iter().map(|blocks| blocks[..3].to_vec()).collect();
    if leave {
        shared = leave_and_return(&mut session, &shared);
    } else {
        session.retire(0);
    }
    session.admit_shared(1, &tokens, tokens.len(), greedy(), shared, 1);
    let mut done = Completion::default();
    let mut first = session.step(&[(1, 8)]);
    first.prompt_logprobs.clear();
    done.take(first);
    while done.tokens.len() < OUTPUT {
        done.take(session.step(&[]));
    }
    done
}

/// Returns the blocks in which they are in the end; the copies are in the next plan.
fn leave_and_return(session: &mut Session, blocks: &[Vec<BlockId>]) -> Vec<Vec<BlockId>> {
    let groups = (0..).map(GroupId);
    for (group, blocks) in groups.clone().zip(blocks) {
        for (at, block) in AT.into_iter().map(TierSlot).zip(blocks) {
            session.ops.push(SlotOp::Store { group, block: *block, at });
        }
    }
    // The step whose plan stores them writes them over, and the steps after it.
    session.retire(0);
    session.admit(2, &prompt(256, 9), 256, greedy());
    session.step(&[(2, 256)]);
    session.step(&[]);
    let over = session.blocks(2);
    let gone =
        |(blocks, over): (&Vec<BlockId>, &Vec<BlockId>)| blocks.iter().all(|b| over.contains(b));
    assert!(blocks.iter().zip(&over).all(gone), "every block has another's tokens");
    let mut back = Vec::new();
    for (group, over) in groups.zip(&over) {
        let mut of_group = Vec::new();
        for at in AT.into_iter().map(TierSlot) {
            let block = BlockId(session.free[group.index()].pop().expect("a free block"));
            session.ops.push(SlotOp::Load { at, block: WriteSlot { group, block } });
            // What was read may be written over at once, and must not come back instead.
            session.ops.push(SlotOp::Store { group, block: over[0], at });
            of_group.push(block);
        }
        back.push(of_group);
    }
    session.retire(2);
    back
}
