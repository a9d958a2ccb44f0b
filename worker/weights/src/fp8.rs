//! FP8 weights with one scale per block, as DeepSeek-V3 publishes them: `w = e4m3(code) * scale`,
//! where the scale of element (row, column) is entry (row / 128, column / 128) of
//! `weight_scale_inv`. Blocks at the right and lower edge may be partial.
//!
//! e4m3 is the "fn" variant of "FP8 Formats for Deep Learning" (Micikevicius et al., 2022): bias 7,
//! no infinities, largest value 448, and the two codes 0x7F and 0xFF are no numbers.
//!
//! It reads no file. Invariant: no value that is not a number leaves it unnoticed.

use crate::slice::Element;
use core::ops::Range;

/// The value of each code.
const E4M3: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let exponent = (code >> 3) & 0xF;
        let mantissa = (code & 7) as f32;
        let size = if exponent == 0 {
            // Subnormal: mantissa / 8 * 2^-6.
            mantissa / 512.0
        } else if exponent == 15 && code & 7 == 7 {
            f32::NAN
        } else {
            // (1 + mantissa / 8) * 2^(exponent - 7), the power taken as a single's bits.
            (1.0 + mantissa / 8.0) * f32::from_bits((exponent as u32 + 120) << 23)
        };
        table[code] = if code < 128 { size } else { -size };
        code += 1;
    }
    table
};

/// A quantised matrix: codes `[rows, cols]` and scales `[ceil(rows / block.0), ceil(cols /
/// block.1)]`, both row-major.
#[derive(Clone, Copy)]
pub(crate) struct Quantised<'a> {
    pub codes: &'a [u8],
    pub cols: usize,
    pub scales: &'a [f32],
    /// Rows and columns that share a scale; neither is zero.
    pub block: (usize, usize),
}

impl Quantised<'_> {
    /// Makes the numbers of `out.len() / cols.len()` rows from `first_row` on, in these columns, of which
    /// there are some.
    ///
    /// # Errors
    /// Row and column of the first code that is no number.
    pub(crate) fn dequantise<T: Element>(
        &self,
        first_row: usize,
        cols: Range<usize>,
        out: &mut [T],
    ) -> Result<(), (usize, usize)> {
        let scale_cols = self.cols.div_ceil(self.block.1);
        for (row, out) in (first_row..).zip(out.chunks_exact_mut(cols.len())) {
            let codes = &self.codes[row * self.cols..][cols.clone()];
            let scales = &self.scales[row / self.block.0 * scale_cols..][..scale_cols];
            let mut from = cols.start;
            while from < cols.end {
                let block = from / self.block.1;
                let end = ((block + 1) * self.block.1).min(cols.end);
                let piece = from - cols.start..end - cols.start;
                for (&code, x) in codes[piece.clone()].iter().zip(&mut out[piece]) {
                    *x = T::round(E4M3[usize::from(code)] * scales[block]);
                }
                from = end;
            }
            if let Some(column) = codes.iter().position(|code| code & 0x7F == 0x7F) {
                return Err((row, cols.start + column));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn codes_mean_what_the_paper_says() {
        for (code, value) in [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 7.0 * 2f32.powi(-9)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x39, 1.125),
            (0x40, 2.0),
            (0x77, 240.0),
            (0x78, 256.0),
            (0x7E, 448.0),
        ] {
            assert_eq!(E4M3[code], value, "{code:#x}");
            assert_eq!(E4M3[code | 0x80].to_bits(), (-value).to_bits(), "{code:#x} negated");
        }
        let numberless: Vec<usize> = (0..256).filter(|&code| E4M3[code].is_nan()).collect();
        assert_eq!(numberless, [0x7F, 0xFF]);
        // Positive codes are ordered as their values are.
        assert!((0..0x7E).all(|code| E4M3[code] < E4M3[code + 1]));
    }

    /// Every shape around the block's edges, against the definition applied element by element.
    #[test]
    fn blocks_are_cut_at_the_edges() {
        let block = (4, 3);
        for rows in 1..=9usize {
            for cols in 1..=7usize {
                let codes: Vec<u8> =
                    (0..rows * cols).map(|i| (i * 37 % 127) as u8 | ((i % 2) << 7) as u8).collect();
                let scale_cols = cols.div_ceil(block.1);
                let scales: Vec<f32> =
                    (0..rows.div_ceil(block.0) * scale_cols).map(|i| 0.01 + i as f32).collect();
                let matrix = Quantised { codes: &codes, cols, scales: &scales, block };
                let (mut single, mut brain) =
                    (vec![0f32; rows * cols], vec![bf16::ZERO; rows * cols]);
                matrix.dequantise(0, 0..cols, &mut single).expect("numbers");
                // In two pieces, the second one not at a block's edge.
                let (upper, lower) = brain.split_at_mut(cols);
                matrix.dequantise(0, 0..cols, upper).expect("numbers");
                matrix.dequantise(1, 0..cols, lower).expect("numbers");
                for row in 0..rows {
                    for col in 0..cols {
                        let i = row * cols + col;
                        let scale = scales[row / block.0 * scale_cols + col / block.1];
                        assert_eq!(single[i], E4M3[usize::from(codes[i])] * scale);
                        assert_eq!(brain[i], bf16::from_f32(single[i]));
                    }
                }
                // Columns alone, wherever blocks begin.
                for from in 0..cols {
                    let mut part = vec![0f32; rows * (cols - from)];
                    matrix.dequantise(0, from..cols, &mut part).expect("numbers");
                    for (row, part) in part.chunks_exact(cols - from).enumerate() {
                        assert_eq!(part, &single[row * cols + from..(row + 1) * cols]);
                    }
                }
            }
        }
    }

    #[test]
    fn a_code_that_is_no_number_is_found() {
        for code in [0x7F, 0xFF] {
            let mut codes = [0x38; 15];
            codes[3 * 3 + 2] = code;
            let matrix = Quantised { codes: &codes, cols: 3, scales: &[1.0; 2], block: (4, 4) };
            assert_eq!(matrix.dequantise(0, 0..3, &mut [0f32; 15]), Err((3, 2)));
            assert_eq!(matrix.dequantise(3, 1..3, &mut [0f32; 2]), Err((3, 2)));
            assert_eq!(matrix.dequantise(3, 0..2, &mut [0f32; 2]), Ok(()), "it is elsewhere");
            assert_eq!(matrix.dequantise(4, 0..3, &mut [0f32; 3]), Ok(()));
        }
    }
}
