//! The arithmetic of grids: every line in one tile, and never more tiles than said.

use super::*;
use crate::testing::Random;

#[test]
fn tiles_cover_every_line_once_and_stay_below_the_bound() {
    let mut random = Random::new(3);
    for _ in 0..200 {
        let (group, lines) = (1 + random.below(130), [4, 16, 32, 64][random.below(4)]);
        let mut start = 0;
        let segments: Vec<Segment> = (0..1 + random.below(40))
            .map(|_| {
                let len = 1 + random.below(9) as u32;
                start += len;
                Segment { start: start - len, len, context: len, table: 0 }
            })
            .collect();
        let mut list = Vec::new();
        tiles(&segments, group, lines, &mut list);
        assert!(list.len() <= max_tiles(start as usize, segments.len(), group, lines));
        for (index, segment) in segments.iter().enumerate() {
            let of: Vec<u32> =
                list.iter().filter(|t| t.segment == index as u32).map(|t| t.line).collect();
            let all = segment.len as usize * group;
            assert_eq!(of.len(), all.div_ceil(lines));
            assert!(of.iter().zip(0..).all(|(line, i)| *line as usize == i * lines));
        }
    }
}

#[test]
fn splits_fill_the_device_and_keep_work_for_each() {
    assert_eq!(splits(132, 1, 1, 131_072), 64);
    assert_eq!(splits(132, 1, 1, 256), 2);
    assert_eq!(splits(132, 16, 1, 8192), 17);
    assert_eq!(splits(132, 300, 8, 8192), 1);
}

#[test]
fn widths_that_are_no_multiples_of_sixteen_go_the_plain_way() {
    let shape = |dtype, q_width| Shape {
        dtype,
        heads: 4,
        group: 2,
        q_width,
        rest_width: 0,
        v_width: q_width,
        key_stride: q_width,
        value_offset: 2 * q_width,
        value_stride: q_width,
        window: None,
        scale: 1.0,
    };
    let layer = KvLayer { offset: 0, row: 512 };
    assert_eq!(shape(Dtype::Bf16, 128).select(layer, false), Variant::Few);
    assert_eq!(shape(Dtype::Bf16, 128).select(layer, true), Variant::Many);
    assert_eq!(shape(Dtype::Bf16, 72).select(layer, true), Variant::Any);
    assert_eq!(shape(Dtype::F32, 128).select(layer, true), Variant::Any);
    let odd = KvLayer { offset: 3, row: 512 };
    assert_eq!(shape(Dtype::Bf16, 128).select(odd, false), Variant::Any);
}
