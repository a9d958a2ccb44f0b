//! The life of blocks as short stories, each ended by a full recount.

use super::*;
use crate::{Hit, carve};
use ids::{Bytes, TierSlot, Tokens};

fn full(group: u8, block_bytes: u64) -> GroupSpec {
    GroupSpec { group: GroupId(group), kind: GroupKind::Full, block_bytes: Bytes(block_bytes) }
}

fn sliding(group: u8, block_bytes: u64, window: u32) -> GroupSpec {
    let kind = GroupKind::Sliding { window: Tokens(window) };
    GroupSpec { group: GroupId(group), kind, block_bytes: Bytes(block_bytes) }
}

fn cache(specs: &[GroupSpec], bytes: u64) -> KvCache {
    KvCache::new(specs, &carve(specs, Bytes(bytes), Bytes(1)).expect("fits"))
}

const G: GroupId = GroupId(0);

fn hashes(n: u128) -> Vec<BlockHash> {
    (0..n).map(|i| BlockHash(i * 7 + 1)).collect()
}

/// Mints and seals a chain and releases it from its tail.
fn cached(cache: &mut KvCache, group: GroupId, hashes: &[BlockHash]) {
    let held: Vec<_> = hashes
        .iter()
        .map(|hash| {
            let block = cache.mint(group).expect("room");
            cache.seal(block, *hash)
        })
        .collect();
    held.into_iter().rev().for_each(|block| cache.release(block));
}

#[test]
fn a_block_released_in_flight_waits_for_its_epoch() {
    let mut cache = cache(&[full(0, 8)], 8);
    let block = cache.mint(G).expect("one block");
    let step = cache.launch();
    cache.discard(block);
    assert_eq!(cache.mint(G).err(), Some(Shortage { group: G }));
    assert_eq!((cache.arriving(G), cache.mintable(G)), (Blocks(1), Blocks(0)));
    let retired = cache.retire(step).expect("due");
    cache.reclaim(retired);
    assert_eq!(cache.check(), Ok(()));
    let block = cache.mint(G).expect("back");
    cache.discard(block);
    assert_eq!(cache.check(), Ok(()));
}

#[test]
fn a_cached_block_is_evicted_only_after_its_epoch_but_hit_at_once() {
    let mut cache = cache(&[full(0, 8)], 8);
    let hash = hashes(1);
    let block = cache.mint(G).expect("one block");
    let block = cache.seal(block, hash[0]);
    let step = cache.launch();
    cache.release(block);
    assert!(cache.mint(G).is_err());
    let hit = cache.lookup(&hash);
    assert_eq!(hit.boundary, Blocks(1));
    let taken = cache.acquire(&hash, hit, false).expect("room").pop().expect("one group").blocks;
    assert_eq!(cache.check(), Ok(()));
    taken.into_iter().for_each(|block| cache.release(block));
    let retired = cache.retire(step).expect("due");
    cache.reclaim(retired);
    let block = cache.mint(G).expect("evicted");
    assert_eq!(cache.lookup(&hash).boundary, Blocks(0));
    cache.discard(block);
    assert_eq!(cache.check(), Ok(()));
}

#[test]
fn children_are_evicted_before_parents_and_the_longest_unused_first() {
    let mut cache = cache(&[full(0, 8)], 8 * 6);
    let (a, b) = (hashes(3), vec![BlockHash(100), BlockHash(101), BlockHash(102)]);
    cached(&mut cache, G, &a);
    cached(&mut cache, G, &b);
    let hit = cache.lookup(&a);
    let again = cache.acquire(&a, hit, false).expect("room").pop().expect("one group").blocks;
    again.into_iter().rev().for_each(|block| cache.release(block));
    // b is now the longest unused; its tail goes first.
    let mut held = Vec::new();
    for left in [2, 1, 0] {
        held.push(cache.mint(G).expect("evicts"));
        assert_eq!(cache.lookup(&b).boundary, Blocks(left));
        assert_eq!(cache.lookup(&a).boundary, Blocks(3));
    }
    held.push(cache.mint(G).expect("evicts"));
    assert_eq!(cache.lookup(&a).boundary, Blocks(2));
    held.into_iter().for_each(|block| cache.discard(block));
    assert_eq!(cache.check(), Ok(()));
}

#[test]
fn a_duplicate_stays_private_and_the_first_stays_canonical() {
    let mut cache = cache(&[full(0, 8)], 8 * 4);
    let hash = hashes(1);
    let first = cache.mint(G).expect("room");
    let first = cache.seal(first, hash[0]);
    let second = cache.mint(G).expect("room");
    let second = cache.seal(second, hash[0]);
    let hit = cache.lookup(&hash);
    let taken = cache.acquire(&hash, hit, false).expect("room").pop().expect("one group").blocks;
    assert_eq!(taken[0].id(), first.id());
    cache.release(second);
    assert_eq!(cache.counts(G).cached, Blocks(0));
    cache.release(first);
    assert_eq!(cache.counts(G).shared, Blocks(1));
    taken.into_iter().for_each(|block| cache.release(block));
    assert_eq!(cache.counts(G).cached, Blocks(1));
    assert_eq!(cache.check(), Ok(()));
}

#[test]
fn a_hit_is_the_longest_boundary_all_groups_support() {
    let specs = [full(0, 8), sliding(1, 8, 129)];
    let mut cache = cache(&specs, 8 * 40);
    let chain = hashes(8);
    cached(&mut cache, GroupId(0), &chain[..7]);
    assert_eq!(cache.lookup(&chain).boundary, Blocks(0), "the sliding group has nothing");
    // Window 129 wants the two blocks before a boundary.
    cached(&mut cache, GroupId(1), &chain[2..4]);
    cached(&mut cache, GroupId(1), &chain[5..6]);
    let hit = cache.lookup(&chain);
    assert_eq!(hit.boundary, Blocks(4));
    let prefixes = cache.acquire(&chain, hit, false).expect("room");
    assert_eq!((prefixes[0].skipped, prefixes[0].blocks.len()), (Blocks(0), 4));
    assert_eq!((prefixes[1].skipped, prefixes[1].blocks.len()), (Blocks(2), 2));
    for block in prefixes.into_iter().flat_map(|p| p.blocks) {
        cache.release(block);
    }
    assert_eq!(cache.check(), Ok(()));
}

#[test]
fn the_window_is_exact_at_its_edges() {
    let live = |window, position| {
        crate::first_live(GroupKind::Sliding { window: Tokens(window) }, Tokens(position)).0
    };
    assert_eq!(live(1, 128), 2, "a window of one reads nothing before the query");
    assert_eq!(live(2, 128), 1, "a window of two reads token 127");
    assert_eq!(live(65, 128), 1, "reads from token 64");
    assert_eq!(live(66, 128), 0, "reads from token 63");
    assert_eq!(live(100, 5), 0);
}

#[test]
fn an_idle_super_block_moves_to_the_group_that_needs_it() {
    let specs = [full(0, 16), full(1, 32)];
    let mut cache = cache(&specs, 32 * 2);
    cached(&mut cache, GroupId(0), &hashes(4));
    assert_eq!(cache.mintable(GroupId(1)), Blocks(2));
    let one = cache.mint(GroupId(1)).expect("takes an idle super-block");
    assert_eq!(cache.check(), Ok(()));
    let two = cache.mint(GroupId(1)).expect("and the other");
    assert!(cache.mint(GroupId(1)).is_err() && cache.mint(GroupId(0)).is_err());
    cache.discard(one);
    let back = cache.mint(GroupId(0)).expect("and back");
    cache.discard(back);
    cache.discard(two);
    assert_eq!(cache.check(), Ok(()));
}

#[test]
fn a_purge_empties_the_index_through_limbo_where_steps_are_in_flight() {
    let mut cache = cache(&[full(0, 8)], 8 * 4);
    cached(&mut cache, G, &hashes(2));
    let step = cache.launch();
    cached(&mut cache, G, &[BlockHash(900)]);
    cache.purge();
    assert_eq!(cache.check(), Ok(()));
    assert_eq!(cache.arriving(G), Blocks(1));
    let retired = cache.retire(step).expect("due");
    cache.reclaim(retired);
    assert_eq!(cache.counts(G), Counts::default(), "nothing is bound to any group");
    assert_eq!(cache.check(), Ok(()));
}

fn behind(specs: &[GroupSpec], bytes: u64, host_blocks: u32) -> KvCache {
    let carving = carve(specs, Bytes(bytes), Bytes(1)).expect("fits");
    KvCache::new(specs, &Carving { host_blocks, ..carving })
}

fn copies(cache: &mut KvCache) -> Vec<SlotOp> {
    let mut ops = Vec::new();
    cache.take_copies(&mut ops);
    ops
}

fn take(cache: &mut KvCache, hashes: &[BlockHash], hit: Hit) -> Vec<SharedBlock> {
    cache.acquire(hashes, hit, false).expect("room").pop().expect("one group").blocks
}

fn store(block: u32, at: u32) -> SlotOp {
    SlotOp::Store { group: G, block: BlockId(block), at: TierSlot(at) }
}

fn load(at: u32, block: u32) -> SlotOp {
    let block = step::WriteSlot { group: G, block: BlockId(block) };
    SlotOp::Load { at: TierSlot(at), block }
}

#[test]
fn what_is_evicted_is_found_behind_the_cache_and_brought_back() {
    let mut cache = behind(&[full(0, 8)], 8 * 3, 4);
    let (a, b) = (hashes(3), [BlockHash(100), BlockHash(101), BlockHash(102)]);
    cached(&mut cache, G, &a);
    assert_eq!(copies(&mut cache), []);
    cached(&mut cache, G, &b);
    // Children first, each before the block is written again.
    assert_eq!(copies(&mut cache), [store(2, 0), store(1, 1), store(0, 2)]);
    assert_eq!(cache.behind(), (Blocks(3), Blocks(4)));
    let hit = cache.lookup(&a);
    assert_eq!(hit, Hit { boundary: Blocks(3), resident: Blocks(0) });
    assert_eq!(cache.claimed_by(G, &a, hit), Blocks(3), "as many as if nothing were found");
    let taken = take(&mut cache, &a, hit);
    // A place is read before it is overwritten, and what was read is overwritten first: three blocks here
    // and four there hold all six.
    let listed = copies(&mut cache);
    let wanted = [store(0, 3), load(2, 0), store(1, 2), load(1, 1), store(2, 1), load(0, 2)];
    assert_eq!(listed, wanted);
    assert_eq!(taken.iter().map(SharedBlock::id).collect::<Vec<_>>(), [0, 1, 2].map(BlockId));
    assert_eq!(cache.lookup(&a), Hit { boundary: Blocks(3), resident: Blocks(3) });
    assert_eq!(cache.lookup(&b), Hit { boundary: Blocks(3), resident: Blocks(0) });
    assert_eq!(cache.check(), Ok(()));
    taken.into_iter().rev().for_each(|block| cache.release(block));
    assert_eq!(cache.check(), Ok(()));
}

#[test]
fn what_lies_behind_the_cache_already_is_not_copied_again() {
    let mut cache = behind(&[full(0, 8)], 8, 2);
    let (a, b) = (hashes(1), [BlockHash(100)]);
    cached(&mut cache, G, &a);
    cached(&mut cache, G, &b);
    let hit = cache.lookup(&a);
    take(&mut cache, &a, hit).into_iter().for_each(|block| cache.release(block));
    assert_eq!(copies(&mut cache), [store(0, 0), store(0, 1), load(0, 0)]);
    cached(&mut cache, G, &[BlockHash(200)]);
    assert_eq!(copies(&mut cache), [], "the first is there still");
    cached(&mut cache, G, &[BlockHash(300)]);
    assert_eq!(copies(&mut cache), [store(0, 1)], "over the second, which is the longest unused");
    assert_eq!(cache.lookup(&b).boundary, Blocks(0));
    assert_eq!(cache.check(), Ok(()));
}

#[test]
fn bringing_back_evicts_nothing_of_the_same_hit() {
    let mut cache = behind(&[full(0, 8)], 8 * 4, 8);
    let a = hashes(4);
    cached(&mut cache, G, &a);
    // Two more blocks push out the two at the end of the chain.
    cached(&mut cache, G, &[BlockHash(100), BlockHash(101)]);
    let hit = cache.lookup(&a);
    assert_eq!(hit, Hit { boundary: Blocks(4), resident: Blocks(2) });
    assert_eq!(cache.claimed_by(G, &a, hit), Blocks(4), "two unused, two to be minted");
    let taken = take(&mut cache, &a, hit);
    assert_eq!((taken.len(), cache.lookup(&a).resident), (4, Blocks(4)));
    assert!(cache.mint(G).is_err(), "all four are held");
    taken.into_iter().rev().for_each(|block| cache.release(block));
    assert_eq!(cache.check(), Ok(()));
}

#[test]
fn a_hit_for_which_there_is_no_room_leaves_nothing_behind() {
    let (mut cache, a) = (behind(&[full(0, 8)], 8 * 3, 8), hashes(3));
    cached(&mut cache, G, &a);
    let held: Vec<_> = (0..3).map(|_| cache.mint(G).expect("evicts")).collect();
    let hit = cache.lookup(&a);
    assert_eq!(cache.acquire(&a, hit, false).err(), Some(Shortage { group: G }));
    let mut held = held.into_iter();
    held.next().into_iter().for_each(|block| cache.discard(block));
    assert_eq!(cache.acquire(&a, hit, true).err(), Some(Shortage { group: G }));
    assert_eq!(cache.check(), Ok(()));
    // One was brought back before the room ended, and stays.
    assert_eq!(cache.lookup(&a), Hit { boundary: Blocks(3), resident: Blocks(1) });
    held.for_each(|block| cache.discard(block));
    let taken = take(&mut cache, &a, hit);
    taken.into_iter().rev().for_each(|block| cache.release(block));
    assert_eq!(cache.check(), Ok(()));
}

#[test]
#[should_panic(expected = "was dropped, not given back")]
fn a_lost_block_is_caught() {
    let mut cache = cache(&[full(0, 8)], 8);
    drop(cache.mint(G));
}
