//! The arithmetic of tiles: every row of what is served in one, the longest first.

use super::*;
use crate::testing::Random;

#[test]
fn tiles_cover_what_is_served_once_the_longest_first() {
    let mut random = Random::new(5);
    for (group, width) in [(1, 192), (4, 128), (5, 128), (8, 64), (128, 64)] {
        let cut = Cut::new(group, width).expect("served");
        for _ in 0..50 {
            let mut start = 0;
            let segments: Vec<Segment> = (0..1 + random.below(20))
                .map(|_| {
                    let len = 1 + random.below(700) as u32;
                    start += len;
                    let context = len + random.below(3) as u32 * 1111;
                    Segment { start: start - len, len, context, table: 0 }
                })
                .collect();
            let mut list = Vec::new();
            cut.tiles(&segments, |of| of.len > 1, &mut list);
            assert!(list.len() <= cut.max_tiles(start as usize, segments.len()));
            let keys = |tile: &Tile| {
                let of = &segments[tile.segment as usize];
                let rows = (tile.line as usize / group + cut.rows).min(of.len as usize);
                ((of.context - of.len) as usize + rows).div_ceil(KEYS)
            };
            assert!(list.is_sorted_by_key(|tile| core::cmp::Reverse(keys(tile))));
            list.sort_unstable_by_key(|tile| (tile.segment, tile.line));
            let expected = (0_u32..).zip(&segments).filter(|(_, of)| of.len > 1);
            let expected = expected.flat_map(|(segment, of)| {
                let lines = (0..of.len as usize).step_by(cut.rows);
                lines.map(move |row| Tile { segment, line: (row * group) as u32 })
            });
            assert_eq!(list, expected.collect::<Vec<_>>());
        }
    }
}

#[test]
fn other_heads_are_not_served() {
    assert!(Cut::new(4, 80).is_none());
    assert!(Cut::new(0, 128).is_none());
    assert!(Cut::new(129, 64).is_none());
}
