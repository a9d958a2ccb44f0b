//! Rows taken on the device are the table's, bit for bit.

use super::*;
use crate::cuda::testing::{DTYPES, device, rounded};
use crate::testing::Random;

#[test]
fn rows_are_taken_and_foreign_ids_are_zero() {
    let Some(device) = device() else { return };
    for dtype in DTYPES {
        for (width, ids) in [(5, vec![10, 16, 9, 17, u32::MAX, 12]), (2048, vec![11]), (64, vec![])]
        {
            let table = Random::new(1).vector(7 * width);
            let sent = device.send_as(&table, dtype);
            let out = device.poisoned(ids.len() * width * dtype.size());
            let ids_sent = device.send(&ids);
            let operands = Embed {
                ids: &ids_sent,
                table: Tensor::new(&sent, dtype),
                table_rows: 7,
                first_row: 10,
                width,
                out: &out,
            };
            embed(device.queue(), Rows::exactly(ids.len()), &operands).expect("a launch");
            let table = rounded(&table, dtype);
            for (row, id) in device.fetch_as(&out, dtype).chunks_exact(width).zip(&ids) {
                match (*id as usize).checked_sub(10).filter(|i| *i < 7) {
                    Some(i) => assert_eq!(row, &table[i * width..(i + 1) * width]),
                    None => assert_eq!(row, vec![0.0; width]),
                }
            }
        }
    }
}

#[test]
fn a_short_operand_is_refused_with_its_name() {
    let Some(device) = device() else { return };
    let memory = device.poisoned(64);
    let operands = Embed {
        ids: &memory,
        table: Tensor::new(&memory, crate::cuda::Dtype::F32),
        table_rows: 4,
        first_row: 0,
        width: 8,
        out: &memory,
    };
    let error = embed(device.queue(), Rows::exactly(2), &operands).expect_err("too short");
    assert_eq!(error, CudaError::Operand { op: "embed", what: "table", needed: 128, got: 64 });
}
