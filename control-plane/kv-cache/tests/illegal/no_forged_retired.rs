//! The proof that a step retired is made by the cache's clock alone.

use ids::StepSeq;
use kv_cache::Retired;

fn main() {
    let _ = Retired { through: StepSeq(9) };
}
