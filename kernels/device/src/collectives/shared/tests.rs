//! Ranks as threads over one file: sums, parts, subsets, and everything that stops them.

use super::super::{CollectiveError, Collectives, ElementsMut, Group, RegionError, Transfer};
use super::{DEFAULT_TIMEOUT, SharedMemory, SharedRegion};
use half::bf16;
use std::thread;
use std::time::{Duration, Instant};

/// The least stage: 1024 singles, so that longer operations go in pieces.
const STAGE: usize = 4096;
const SOON: Duration = Duration::from_secs(1);

/// What a body returns on each of so many ranks.
fn on_ranks<R: Send>(
    world: usize,
    timeout: Duration,
    body: impl Fn(&SharedRegion, SharedMemory) -> R + Sync,
) -> Vec<R> {
    let dir = tempfile::tempdir().expect("a folder");
    let region = SharedRegion::create(&dir.path().join("ranks"), world, STAGE).expect("a file");
    thread::scope(|scope| {
        let rank = |rank| {
            let (region, body) = (&region, &body);
            scope.spawn(move || {
                let memory = SharedMemory::join(region.path(), rank, timeout).expect("a place");
                body(region, memory)
            })
        };
        let ranks: Vec<_> = (0..world).map(rank).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a result")).collect()
    })
}

fn all(memory: &SharedMemory) -> Group {
    Group::new(0, "all", (0..memory.world()).collect(), memory.rank())
}

/// Element `i` of a rank: of many magnitudes, so that another order of a sum shows.
fn value(rank: usize, i: usize) -> f32 {
    let mix = (rank * 7919 + i * 104_729 + 1) as u32;
    let bits = mix.wrapping_mul(2_654_435_761);
    (bits as f32 / u32::MAX as f32 - 0.5) * 10_f32.powi((bits % 7) as i32)
}

fn values(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| value(rank, i)).collect()
}

fn sums(world: usize, len: usize) -> Vec<f32> {
    let sum = |i| (1..world).fold(value(0, i), |sum, rank| sum + value(rank, i));
    (0..len).map(sum).collect()
}

fn brains(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|x| bf16::from_f32(*x)).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

const LENGTHS: [usize; 9] = [0, 1, 2, 3, 7, 64, 1024, 1025, 5003];

#[test]
fn sums_are_the_same_bits_on_every_rank() {
    for world in 1..=5 {
        let read = on_ranks(world, DEFAULT_TIMEOUT, |_, mut memory| {
            let (group, rank) = (all(&memory), memory.rank());
            LENGTHS.map(|len| {
                let mut x = values(rank, len);
                let read = memory.all_reduce(&group, ElementsMut::F32(&mut x)).expect("a sum");
                assert_eq!(bits(&x), bits(&sums(world, len)), "{len} elements on {world} ranks");
                read
            })
        });
        for (at, len) in LENGTHS.into_iter().enumerate() {
            let all: u64 = read.iter().map(|read| read[at]).sum();
            assert_eq!(all as usize, 2 * (world - 1) * len * 4, "bytes of {len} on {world}");
        }
    }
}

#[test]
fn sums_of_halves_are_rounded_once() {
    for world in [2, 3, 5] {
        on_ranks(world, DEFAULT_TIMEOUT, |_, mut memory| {
            let (group, rank) = (all(&memory), memory.rank());
            for len in [1, 5, 2048, 4099] {
                let given = |rank| brains(&values(rank, len));
                let expected: Vec<bf16> = (0..len)
                    .map(|i| {
                        let part = |rank| bf16::from_f32(value(rank, i)).to_f32();
                        bf16::from_f32((1..world).fold(part(0), |sum, rank| sum + part(rank)))
                    })
                    .collect();
                let mut x = given(rank);
                memory.all_reduce(&group, ElementsMut::Bf16(&mut x)).expect("a sum");
                assert_eq!(x, expected, "{len} elements on {world} ranks");
                let whole: Vec<bf16> = (0..world).flat_map(|_| given(rank)).collect();
                let mut out = vec![bf16::ZERO; len];
                let parts = Transfer::Bf16 { x: &whole, out: &mut out };
                memory.reduce_scatter(&group, parts).expect("a part");
                assert_eq!(out, expected);
            }
        });
    }
}

#[test]
fn parts_are_gathered_behind_and_beside_each_other() {
    for world in [1, 2, 3, 4] {
        on_ranks(world, DEFAULT_TIMEOUT, |_, mut memory| {
            let (group, rank) = (all(&memory), memory.rank());
            for (rows, run) in [(1, 1), (1, 2500), (5, 3), (7, 300), (1100, 1)] {
                let len = rows * run;
                let x = values(rank, len);
                let mut out = vec![f32::NAN; len * world];
                let parts = Transfer::F32 { x: &x, out: &mut out };
                let read = memory.all_gather(&group, parts, len).expect("parts");
                let behind: Vec<f32> = (0..world).flat_map(|rank| values(rank, len)).collect();
                assert_eq!(bits(&out), bits(&behind));
                assert_eq!(read as usize, (world - 1) * len * 4);
                let parts = Transfer::F32 { x: &x, out: &mut out };
                memory.all_gather(&group, parts, run).expect("parts");
                let row = |row| (0..world * run).map(move |i| value(i / run, row * run + i % run));
                let beside: Vec<f32> = (0..rows).flat_map(row).collect();
                assert_eq!(bits(&out), bits(&beside), "{rows} rows of {run} on {world}");
            }
        });
    }
}

#[test]
fn sums_are_scattered() {
    for world in [1, 2, 3, 4] {
        on_ranks(world, DEFAULT_TIMEOUT, |_, mut memory| {
            let (group, rank) = (all(&memory), memory.rank());
            for len in [1, 3, 511, 1500] {
                let x = values(rank, len * world);
                let mut out = vec![f32::NAN; len];
                let parts = Transfer::F32 { x: &x, out: &mut out };
                let read = memory.reduce_scatter(&group, parts).expect("a part");
                let own = rank * len..(rank + 1) * len;
                assert_eq!(bits(&out), bits(&sums(world, len * world)[own]));
                assert_eq!(read as usize, (world - 1) * len * 4);
            }
        });
    }
}

/// Six ranks as 3 x 2: rows and columns exchange by turns, as steps of a mesh do, rows more often than
/// columns and not all rows as often.
#[test]
fn subsets_exchange_beside_each_other() {
    on_ranks(6, DEFAULT_TIMEOUT, |_, mut memory| {
        let rank = memory.rank();
        let (row, column) = (rank / 2, rank % 2);
        let across = Group::new(0, "dp", (0..3).map(|row| row * 2 + column).collect(), rank);
        let inside = Group::new(1, "tp", vec![row * 2, row * 2 + 1], rank);
        for step in 0..400 {
            memory.begin_step(step);
            for _ in 0..=row {
                let mut x = [rank as f32 + 1.0, step as f32];
                memory.all_reduce(&inside, ElementsMut::F32(&mut x)).expect("a sum");
                assert_eq!(x, [row as f32 * 4.0 + 3.0, step as f32 * 2.0]);
            }
            let mut out = [0.0; 3];
            let parts = Transfer::F32 { x: &[(rank * 1000) as f32 + step as f32], out: &mut out };
            memory.all_gather(&across, parts, 1).expect("parts");
            let part = |row: usize| ((row * 2 + column) * 1000) as f32 + step as f32;
            assert_eq!(out, [part(0), part(1), part(2)]);
        }
    });
}

/// Rank 3 never comes: rank 1 waits for it, rank 0 for rank 1, rank 2 for rank 3. All name rank 3.
#[test]
fn who_never_comes_is_named_and_not_who_waits_too() {
    let errors = on_ranks(4, SOON, |_, mut memory| {
        let rank = memory.rank();
        memory.begin_step(7);
        let across = Group::new(0, "dp", vec![rank % 2, rank % 2 + 2], rank);
        let inside = Group::new(1, "tp", vec![rank / 2 * 2, rank / 2 * 2 + 1], rank);
        if rank == 3 {
            thread::sleep(SOON * 3);
            let mut x = [0.0; 8];
            return memory.all_reduce(&across, ElementsMut::F32(&mut x)).expect_err("too late");
        }
        let mut x = [0.0; 8];
        let group = if rank == 1 { &across } else { &inside };
        memory.all_reduce(group, ElementsMut::F32(&mut x)).expect_err("nobody comes")
    });
    for error in &errors {
        assert_eq!(error, &errors[0], "all hear the first cause");
        let CollectiveError::Missing { missing, left, op, bytes, step, waiting, waited, .. } =
            error
        else {
            panic!("{error}")
        };
        assert_eq!((*missing, *left, *op, *bytes, *step), (3, false, "all_reduce", 32, 7));
        assert!([1, 2].contains(waiting) && *waited >= SOON, "{error}");
    }
    let text = errors[0].to_string();
    assert!(text.starts_with("rank 3 did not come to all_reduce over "), "{text}");
    assert!(text.contains(", 32 bytes, step 7: rank "), "{text}");
}

#[test]
fn an_abort_wakes_who_waits_and_who_comes_later() {
    let began = Instant::now();
    let errors = on_ranks(3, DEFAULT_TIMEOUT, |region, mut memory| {
        let (group, stopper) = (all(&memory), memory.stopper());
        let mut x = [0.0; 3];
        if memory.rank() == 2 {
            thread::sleep(Duration::from_millis(50));
            assert_eq!(region.joined(), [0, 1, 2]);
            stopper.abort("rank 2 was told to, ä");
            region.abort("too late");
        }
        memory.all_reduce(&group, ElementsMut::F32(&mut x)).expect_err("stopped")
    });
    let reason = "rank 2 was told to, ä".to_owned();
    assert_eq!(errors, vec![CollectiveError::Aborted { reason }; 3]);
    assert!(began.elapsed() < DEFAULT_TIMEOUT / 3, "nobody slept to the timeout");
}

#[test]
fn nobody_waits_for_a_rank_that_ended() {
    let began = Instant::now();
    let errors = on_ranks(3, DEFAULT_TIMEOUT, |_, mut memory| {
        let group = all(&memory);
        let mut x = [1.0; 3];
        memory.all_reduce(&group, ElementsMut::F32(&mut x)).expect("all are there");
        let stays = memory.rank() != 1;
        stays.then(|| memory.all_reduce(&group, ElementsMut::F32(&mut x)).expect_err("one left"))
    });
    let text = errors[0].as_ref().map(ToString::to_string).unwrap_or_default();
    assert!(text.starts_with("rank 1 ended before all_reduce over all, 12 bytes"), "{text}");
    assert!(began.elapsed() < DEFAULT_TIMEOUT / 3, "nobody slept to the timeout");
}

#[test]
fn ranks_that_do_not_do_the_same_are_told_apart() {
    let errors = on_ranks(2, DEFAULT_TIMEOUT, |region, mut memory| {
        let group = all(&memory);
        let rank = memory.rank();
        memory.begin_step(5 + rank as u64);
        let mut x = [0.0; 4];
        let error = memory.all_reduce(&group, ElementsMut::F32(&mut x)).expect_err("other steps");
        (error.to_string(), region.stopped().is_some())
    });
    for (text, stopped) in errors {
        assert!(text.contains("step 5") && text.contains("step 6"), "{text}");
        assert!(stopped);
    }
    let errors = on_ranks(2, DEFAULT_TIMEOUT, |_, mut memory| {
        let group = all(&memory);
        let mut x = vec![0.0; 4 + memory.rank()];
        memory.all_reduce(&group, ElementsMut::F32(&mut x)).expect_err("other lengths").to_string()
    });
    assert!(errors.iter().all(|text| text.contains("16 bytes") && text.contains("20 bytes")));
}

#[test]
fn what_cannot_be_made_or_joined_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("ranks");
    let refused = |world, stage| SharedRegion::create(&path, world, stage).expect_err("refused");
    assert!(matches!(refused(0, STAGE), RegionError::Limit { what: "world", .. }));
    assert!(matches!(refused(257, STAGE), RegionError::Limit { what: "world", .. }));
    assert!(matches!(refused(2, STAGE + 1), RegionError::Limit { what: "stage", .. }));
    assert!(!path.exists());
    let region = SharedRegion::create(&path, 2, STAGE).expect("a file");
    assert!(matches!(refused(2, STAGE), RegionError::Io { .. }), "it exists");
    let join = |rank| SharedMemory::join(&path, rank, SOON);
    assert!(matches!(join(2), Err(RegionError::Limit { what: "rank", .. })));
    let first = join(1).expect("a place");
    assert!(matches!(join(1), Err(RegionError::Taken { rank: 1, .. })));
    drop(first);
    assert!(matches!(join(1), Err(RegionError::Taken { rank: 1, .. })), "no second life");
    assert_eq!(region.joined(), [1]);
    drop(region);
    assert!(!path.exists());
    assert!(matches!(join(0), Err(RegionError::Io { .. })));
    std::fs::write(&path, vec![7; 1 << 16]).expect("a file");
    assert!(matches!(join(0), Err(RegionError::Foreign { .. })));
    std::fs::write(&path, [7]).expect("a file");
    assert!(matches!(join(0), Err(RegionError::Foreign { .. })));
}

#[test]
fn lengths_that_do_not_fit_are_the_callers_mistake() {
    on_ranks(2, DEFAULT_TIMEOUT, |_, mut memory| {
        let group = all(&memory);
        let mut out = [0.0; 5];
        let parts = Transfer::F32 { x: &[0.0; 3], out: &mut out };
        let error = memory.all_gather(&group, parts, 3).expect_err("6 are needed");
        assert_eq!(error, CollectiveError::Elements { op: "all_gather", got: 5, wanted: 6 });
        let parts = Transfer::F32 { x: &[0.0; 9], out: &mut out };
        memory.reduce_scatter(&group, parts).expect_err("10 are needed");
        // Nothing was posted: the ranks go on.
        let mut x = [1.0];
        memory.all_reduce(&group, ElementsMut::F32(&mut x)).expect("a sum");
        assert_eq!(x, [2.0]);
    });
}
