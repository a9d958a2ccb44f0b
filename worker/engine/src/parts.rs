//! What a rank holds of a checkpoint, as its loader takes it.

use model::lower::{LocalWeight, Lowered, Region};
use weights::Part;

/// The part of each tensor that the program of a rank uses.
#[must_use]
pub fn parts(lowered: &Lowered) -> Vec<Part> {
    let part = |weight: &LocalWeight| {
        let (shape, rows, cols) = match &weight.region {
            Region::Matrix { rows, cols, of } => (vec![of.0, of.1], rows.clone(), cols.clone()),
            Region::Vector { range, of } => (vec![*of], range.clone(), 0..1),
        };
        Part::new(weight.name.clone(), shape, rows, cols)
    };
    lowered.weights.iter().flatten().map(part).collect()
}
