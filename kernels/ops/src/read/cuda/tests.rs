//! Every word is read once.

use super::*;
use crate::cuda::testing::device;
use crate::testing::Random;

#[test]
fn the_xor_of_all_words_is_added() {
    let Some(device) = device() else { return };
    for words in [0, 4, 8, 1000, 4 * 132 * 4 * 512 * 8 + 20] {
        let mut random = Random::new(words as u64);
        let values: Vec<u32> = (0..words).map(|_| random.next() as u32).collect();
        let (sent, out) = (device.send(&values), device.send(&[5_u32]));
        read(device.queue(), &sent, &out).expect("a launch");
        let expected = values.iter().fold(5, |sum, word| sum ^ word);
        assert_eq!(device.fetch(&out, 0_u32), [expected], "{words} words");
    }
}

#[test]
fn what_no_access_covers_is_refused() {
    let Some(device) = device() else { return };
    let (all, out) = (device.poisoned(64), device.poisoned(4));
    for range in [0..24, 8..24] {
        assert!(matches!(
            read(device.queue(), &all.slice(range), &out),
            Err(CudaError::Shape { .. })
        ));
    }
}
