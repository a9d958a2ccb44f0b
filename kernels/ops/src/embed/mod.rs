//! Token ids to rows of a table, widened to f32. Ids outside of the part held here give zeros (on
//! one rank there are none: ids are checked against the vocabulary before they get this far).

pub mod cuda;

use crate::share::Shared;
use crate::{Matrix, WeightSlice};
use device::ThreadPool;

/// `out[t] = table[ids[t] - first_row]`; `out` is `[ids.len(), table.cols]`.
///
/// # Panics
/// When `out` has another length.
pub fn embed(pool: &ThreadPool, ids: &[u32], first_row: usize, table: Matrix<'_>, out: &mut [f32]) {
    let width = table.cols;
    assert_eq!(out.len(), ids.len() * width, "out is [{}, {width}]", ids.len());
    let out = Shared::new(out);
    pool.run(ids.len(), &|token| {
        // SAFETY: one item per token, one row per item.
        let row = unsafe { out.part(token * width, width) };
        let index = (ids[token] as usize).checked_sub(first_row).filter(|i| *i < table.rows);
        match index.map(|index| table.row(index)) {
            Some(WeightSlice::F32(source)) => row.copy_from_slice(source),
            Some(WeightSlice::Bf16(source)) => {
                row.iter_mut().zip(source).for_each(|(y, x)| *y = x.to_f32());
            }
            Some(WeightSlice::F16(source)) => {
                row.iter_mut().zip(source).for_each(|(y, x)| *y = x.to_f32());
            }
            None => row.fill(0.0),
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, poisoned};

    #[test]
    fn rows_are_taken_and_foreign_ids_are_zero() {
        let pool = ThreadPool::new(2);
        let table = Random::new(1).vector(7 * 5);
        let matrix = Matrix::new(WeightSlice::F32(&table), 7, 5);
        let ids = [10, 16, 9, 17, u32::MAX, 12];
        let mut out = poisoned(ids.len() * 5);
        embed(&pool, &ids, 10, matrix, &mut out);
        for (row, id) in out.chunks_exact(5).zip(ids) {
            match (id as usize).checked_sub(10).filter(|i| *i < 7) {
                Some(i) => assert_eq!(row, &table[i * 5..(i + 1) * 5]),
                None => assert_eq!(row, [0.0; 5]),
            }
        }
    }
}
