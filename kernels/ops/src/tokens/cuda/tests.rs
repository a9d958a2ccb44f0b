//! Ids, changes and kept tokens are those of plain loops; what is not named stays.

use super::*;
use crate::cuda::testing::device;
use crate::tokens::{NOT_KEPT, OF_SLOT};

#[test]
fn ids_come_from_the_host_or_from_slots() {
    let Some(device) = device() else { return };
    for rows in [0_u32, 1, 7, 256, 1000] {
        let last: Vec<u32> = (0..rows + 1).map(|slot| 5000 + slot).collect();
        let staged: Vec<u32> =
            (0..rows).map(|row| if row % 3 == 0 { OF_SLOT | (rows - row) } else { row }).collect();
        let changes: Vec<u32> = (0..rows).flat_map(|i| [i * 2, i, 7 + i]).collect();
        // One less than there are: the last is not applied.
        let applied = rows.saturating_sub(1);
        let (staged_there, last) = (device.send(&staged), device.send(&last));
        let (changes, changed) = (device.send(&changes), device.send(&[applied]));
        let tables = device.send(&vec![u64::MAX; rows as usize * 2 + 1]);
        let ids = device.poisoned(rows as usize * 4);
        let operands = Begin {
            staged: &staged_there,
            last: &last,
            ids: &ids,
            changes: &changes,
            changed: &changed,
            tables: &tables,
        };
        begin(device.queue(), Rows::exactly(rows as usize), &operands).expect("a launch");
        let expected: Vec<u32> = (0..rows)
            .map(|row| if row % 3 == 0 { 5000 + rows - row } else { row })
            .collect();
        assert_eq!(device.fetch(&ids, 0_u32), expected, "{rows}");
        for (entry, got) in device.fetch(&tables, 0_u64).into_iter().enumerate() {
            let change = entry as u64 / 2;
            let named = entry % 2 == 0 && change < u64::from(applied);
            let wanted = if named { (7 + change) << 32 | change } else { u64::MAX };
            assert_eq!(got, wanted, "{rows}: {entry}");
        }
    }
}

#[test]
fn padding_and_foreign_slots_are_left_alone() {
    let Some(device) = device() else { return };
    let last = device.send(&[1_u32, 2, 3, 4]);
    let tokens = device.send(&[10_u32, 11, 12, 13]);
    let kept = device.send(&[2_u32, NOT_KEPT, 0, 3]);
    let count = device.send(&[3_u32]);
    let rows = Rows { padded: 4, count: Some(&count) };
    keep(device.queue(), rows, &tokens, &kept, &last).expect("a launch");
    assert_eq!(device.fetch(&last, 0_u32), [12, 2, 10, 4]);
}
