//! What other implementations take at shapes that cases have, to be set beside ours.
//!
//! Measured apart on an H200: FlashMLA as it comes with vLLM 0.26.0, bf16, pages of 64 in random
//! order, the second-level cache flushed, median of 20.

/// Case and microseconds.
const FLASH_MLA: [(&str, f64); 7] = [
    ("mla_decode.h16.bs1.ctx8192", 36.0),
    ("mla_decode.h16.bs16.ctx8192", 78.6),
    ("mla_decode.h16.bs64.ctx8192", 180.4),
    ("mla_decode.h16.bs128.ctx8192", 320.0),
    ("mla_decode.h128.bs1.ctx8192", 43.0),
    ("mla_decode.h128.bs16.ctx8192", 86.0),
    ("mla_decode.h128.bs64.ctx8192", 248.0),
];

pub(crate) fn micros(case: &str) -> Option<f64> {
    FLASH_MLA.iter().find(|(name, _)| *name == case).map(|(_, micros)| *micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_of_a_case_that_there_is() {
        let cases = crate::cases();
        for (name, _) in FLASH_MLA {
            assert!(cases.iter().any(|case| case.name() == name), "{name}");
            assert!(micros(name).is_some());
        }
        assert_eq!(micros("another"), None);
    }
}
