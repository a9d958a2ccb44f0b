//! What goes into the cache lies where the processor's op puts it.

use super::*;
use crate::cuda::testing::{DTYPES, device, rounded};
use crate::cuda::{Dtype, Strided};
use crate::paged::{self, BLOCK, KvMut};
use crate::testing::Random;

#[test]
fn rows_go_where_the_table_says_and_nowhere_else() {
    let Some(device) = device() else { return };
    for dtype in DTYPES {
        for (width, offset) in [(3, 2), (576, 64), (2, 1)] {
            let layer = KvLayer { offset, row: width };
            let block = offset + BLOCK * width + 8;
            let block = block.next_multiple_of(8);
            // Two sequences; their tables lie side by side. One padded row follows.
            let sequences = [(3, 66, vec![2_u64, 0]), (2, 130, vec![4, 1, 3])];
            let tables: Vec<u64> =
                sequences.iter().flat_map(|s| s.2.iter().map(|b| b * block as u64)).collect();
            let x = rounded(&Random::new(4).vector(6 * width), dtype);
            let mut expected = vec![0.0_f32; 5 * block];
            let (mut positions, mut row_tables) = (Vec::new(), Vec::new());
            let mut at = (0, 0);
            for (len, context, of) in &sequences {
                let table = &tables[at.1..at.1 + of.len()];
                let segment = paged::Segment { start: at.0, len: *len, context: *context, table };
                paged::write_kv(&x, layer, &[segment], &mut KvMut::F32(&mut expected));
                for i in 0..*len {
                    positions.push((context - len + i) as u32);
                    row_tables.push(at.1 as u32);
                }
                at = (at.0 + len, at.1 + of.len());
            }
            positions.push(7);
            row_tables.push(0);
            let arena = device.send_as(&vec![0.0; 5 * block], dtype);
            let sent = [&positions, &row_tables].map(|list| device.send(list));
            let tables_sent = device.send(&tables);
            let count = device.send(&[5_u32]);
            let to = Destination {
                arena: Tensor::new(&arena, dtype),
                positions: &sent[0],
                row_tables: &sent[1],
                tables: &tables_sent,
            };
            let rows = Rows { padded: 6, count: Some(&count) };
            // Rows as they are, and as a part of wider ones.
            for stride in [width, width + 8, width + 3] {
                let mut wide = vec![f32::NAN; 6 * stride];
                for (wide, x) in wide.chunks_exact_mut(stride).zip(x.chunks_exact(width)) {
                    wide[..width].copy_from_slice(x);
                }
                device.stream.fill(&arena, 0).expect("a fill");
                let x = device.send_as(&wide[..5 * stride + width], dtype);
                let x = Strided { slice: &x, stride };
                write_kv(device.queue(), rows, x, layer, &to).expect("a launch");
                let got = device.fetch_as(&arena, dtype);
                assert_eq!(got, expected, "{dtype:?} {layer:?}, {stride} apart");
            }
        }
    }
}

#[test]
fn an_entry_outside_of_the_arena_is_passed_over() {
    let Some(device) = device() else { return };
    let arena = device.send(&[0.0_f32; 128]);
    let (zero, rows_in) = (device.send(&[0_u32]), device.send(&[1.0_f32]));
    for dead in [u64::MAX, 128, u64::MAX - 10] {
        let tables = device.send(&[dead]);
        let to = Destination {
            arena: Tensor::new(&arena, Dtype::F32),
            positions: &zero,
            row_tables: &zero,
            tables: &tables,
        };
        let layer = KvLayer { offset: 1, row: 1 };
        let rows_in = Strided::dense(&rows_in, 1);
        write_kv(device.queue(), Rows::exactly(1), rows_in, layer, &to).expect("a launch");
    }
    assert!(device.fetch(&arena, 0.0).iter().all(|x| *x == 0.0));
}

#[test]
fn blocks_are_copied_and_zeroed_whole() {
    let Some(device) = device() else { return };
    for (dtype, block) in [(Dtype::F32, 4), (Dtype::Bf16, 64 * 576), (Dtype::F32, 5000)] {
        let x = rounded(&Random::new(9).vector(6 * block), dtype);
        let arena = device.send_as(&x, dtype);
        let at = |blocks: &[usize]| {
            device.send(&blocks.iter().map(|b| (b * block) as u64).collect::<Vec<_>>())
        };
        let (from, to, gone) = (at(&[0, 5, 1]), at(&[3, 4, 0]), at(&[2]));
        let count = device.send(&[2_u32]);
        let blocks = Rows { padded: 3, count: Some(&count) };
        let tensor = Tensor::new(&arena, dtype);
        let bytes = block * dtype.size();
        copy_blocks(device.queue(), blocks, tensor, bytes, &from, &to).expect("a launch");
        zero_blocks(device.queue(), Rows::exactly(1), tensor, bytes, &gone).expect("a launch");
        let mut expected = x.clone();
        expected.copy_within(0..block, 3 * block);
        expected.copy_within(5 * block..6 * block, 4 * block);
        expected[2 * block..3 * block].fill(0.0);
        assert_eq!(device.fetch_as(&arena, dtype), expected);
    }
}
