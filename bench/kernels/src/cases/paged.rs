//! The cache itself: rows written into it, blocks copied and zeroed.

use super::step::Step;
use crate::case::{Case, Check, Launch, Ready, Work};
use crate::near::{Failure, equal, some};
use crate::rig::{Rig, cold_sets};
use ops::cuda::{Dtype, Rows, Strided, Tensor};
use ops::paged::cuda::{Destination, copy_blocks, write_kv, zero_blocks};
use ops::paged::{BLOCK, KvLayer};

/// Width of a row: a latent, and keys and values of eight heads.
const ROW_WIDTHS: [(&str, usize); 2] = [("mla576", 576), ("gqa2048", 2048)];
const ROWS: [usize; 3] = [1, 64, 2048];
/// Elements of a block of all layers of DeepSeek-V2-Lite, and blocks that move.
const BLOCK_ELEMENTS: usize = 27 * BLOCK * 576;
const MOVED: [usize; 2] = [1, 64];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, width) in ROW_WIDTHS {
        for rows in ROWS {
            cases.push(Case::new(format!("write_kv.{name}.rows{rows}"), move |rig| {
                written(rig, rows, width)
            }));
        }
    }
    for blocks in MOVED {
        for (name, copies) in [("copy", true), ("zero", false)] {
            cases.push(Case::new(format!("{name}_blocks.v2_lite.n{blocks}"), move |rig| {
                moved(rig, blocks, copies)
            }));
        }
    }
    cases
}

fn written(rig: &mut Rig, rows: usize, width: usize) -> Result<Ready, Failure> {
    let layer = KvLayer { offset: 0, row: width };
    // Decoding rows of as many sequences, or one prompt.
    let step =
        if rows > 64 { Step::new(1, rows, rows, width) } else { Step::new(rows, 1, 300, width) };
    let cache = rig.space(step.elements() * 2)?;
    let x = rig.normal(rows * width, 1.0)?;
    let positions = rig.u32s(&step.positions())?;
    let row_tables = rig.u32s(&step.row_tables())?;
    let tables = rig.u64s(&step.tables)?;
    let (from, arena) = (x.clone(), cache.clone());
    let launch: Launch = Box::new(move |on, _| {
        let to = Destination {
            arena: Tensor::new(&cache, Dtype::Bf16),
            positions: &positions,
            row_tables: &row_tables,
            tables: &tables,
        };
        write_kv(on, Rows::exactly(rows), Strided::dense(&x, layer.row), layer, &to)
    });
    let check: Check = Box::new(move |rig, launch| {
        rig.poison(&arena)?;
        rig.run(launch, 0)?;
        let (positions, tables) = (step.positions(), step.row_tables());
        for row in some(rows, 8) {
            let (position, table) = (positions[row] as usize, tables[row] as usize);
            let block = step.tables[table + position / BLOCK] as usize;
            let at = block + position % BLOCK * width;
            let got = rig.bf16s(&arena, at..at + width)?;
            let expected = rig.bf16s(&from, row * width..(row + 1) * width)?;
            equal(&format!("row {row}"), &got, &expected)?;
        }
        Ok(())
    });
    Ok(Ready { work: Work::cached(rows * width * 4), sets: 1, launch, check })
}

fn moved(rig: &mut Rig, blocks: usize, copies: bool) -> Result<Ready, Failure> {
    let bytes = BLOCK_ELEMENTS * 2;
    let sets = cold_sets(blocks * bytes);
    let arena = rig.normal(2 * sets * blocks * BLOCK_ELEMENTS, 1.0)?;
    let (mut from, mut to) = (Vec::new(), Vec::new());
    for set in 0..sets {
        let first = 2 * set * blocks;
        let offset = |block: usize| ((first + block) * BLOCK_ELEMENTS) as u64;
        from.push(rig.u64s(&(0..blocks).map(offset).collect::<Vec<_>>())?);
        to.push(rig.u64s(&(blocks..2 * blocks).map(offset).collect::<Vec<_>>())?);
    }
    let all = arena.clone();
    let launch: Launch = Box::new(move |on, i| {
        let (arena, moved) = (Tensor::new(&arena, Dtype::Bf16), Rows::exactly(blocks));
        match copies {
            true => copy_blocks(on, moved, arena, bytes, &from[i], &to[i]),
            false => zero_blocks(on, moved, arena, bytes, &to[i]),
        }
    });
    let check: Check = Box::new(move |rig, launch| {
        rig.run(launch, 0)?;
        let of =
            |block: usize| rig.bf16s(&all, block * BLOCK_ELEMENTS..(block + 1) * BLOCK_ELEMENTS);
        for block in some(blocks, 2) {
            let got = of(blocks + block)?;
            let expected = if copies { of(block)? } else { vec![0.0; BLOCK_ELEMENTS] };
            equal(&format!("block {block}"), &got, &expected)?;
        }
        // What comes after them is left alone.
        equal("the next block", &[of(2 * blocks)?.iter().all(|x| *x == 0.0)], &[false])
    });
    let work = if copies { Work::copied(2 * blocks * bytes) } else { Work::copied(blocks * bytes) };
    Ok(Ready { work, sets, launch, check })
}
