//! Values made on the device are those of the rule, bit for bit, wherever they start and end.

use super::*;
use crate::cuda::testing::{Device, device};
use half::{bf16, f16};

/// Splitmix64 as published: a state that advances by the golden gamma, and its output function.
fn splitmix(state: u64) -> u64 {
    let mut z = state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Element `i`, lane by lane.
fn element(values: &Normal, i: u64) -> f32 {
    let gamma = 0x9E37_79B9_7F4A_7C15_u64;
    let words = [2 * i, 2 * i + 1]
        .map(|word| splitmix(values.key.wrapping_add((word + 1).wrapping_mul(gamma))));
    let lanes =
        words.iter().flat_map(|word| (0..4).map(move |lane| (word >> (16 * lane)) & 0xFFFF));
    let centred = lanes.sum::<u64>() as f64 - 8.0 * 32767.5;
    let z = centred / (65536.0 * (8.0_f64 / 12.0).sqrt());
    let single = (values.mean + values.std * z) as f32;
    match values.stored {
        Stored::F32 => single,
        Stored::Bf16 => bf16::from_f32(single).to_f32(),
        Stored::F16 => f16::from_f32(single).to_f32(),
    }
}

fn bits(device: &Device, slice: &DeviceSlice, dtype: Dtype) -> Vec<u32> {
    match dtype {
        Dtype::F32 => device.fetch(slice, 0_u32),
        Dtype::Bf16 => {
            device.fetch(slice, bf16::ZERO).iter().map(|x| u32::from(x.to_bits())).collect()
        }
    }
}

#[test]
fn every_element_has_the_bits_of_the_rule() {
    let Some(device) = device() else { return };
    let laws = [
        (0_u64, 0.0, 1.0, Stored::F32),
        (0xDEAD_BEEF_0123_4567, 1.0, 0.2, Stored::Bf16),
        (u64::MAX, 0.0, 1.0 / 2048.0_f64.sqrt(), Stored::Bf16),
        (42, 0.0, 1e-6, Stored::F16),
    ];
    for (key, mean, std, stored) in laws {
        let values = Normal { key, mean, std, stored };
        for dtype in [Dtype::F32, Dtype::Bf16] {
            // Around one vector, one block, several; from an aligned address and from others.
            for (elements, before, start) in [
                (1, 0, 0),
                (1, 3, 5),
                (3, 7, 1),
                (8, 0, 2),
                (9, 1, 0),
                (2047, 5, 11),
                (2048, 0, 123_456_789_012),
                (2049, 0, u64::from(u32::MAX) - 100),
                (70_001, 6, 31),
            ] {
                let size = dtype.size();
                let memory = device.poisoned((before + elements + 9) * size);
                let out = memory.slice(before * size..(before + elements) * size);
                fill(device.queue(), &values, start, dtype, &out).expect("a launch");
                let got = bits(&device, &memory, dtype);
                let poison = if dtype == Dtype::F32 { u32::MAX } else { 0xFFFF };
                for (at, got) in got.iter().enumerate() {
                    let expected = match at.checked_sub(before).filter(|i| *i < elements) {
                        None => poison,
                        Some(i) => {
                            let value = element(&values, start + i as u64);
                            match dtype {
                                Dtype::F32 => value.to_bits(),
                                Dtype::Bf16 => bf16::from_f32(value).to_bits().into(),
                            }
                        }
                    };
                    let what = format!("{values:?} {dtype:?}: {elements} from {start}, {at}");
                    assert_eq!(*got, expected, "{what}");
                }
            }
        }
    }
}

#[test]
fn nothing_is_filled_and_half_an_element_is_refused() {
    let Some(device) = device() else { return };
    let memory = device.poisoned(64);
    let values = Normal { key: 1, mean: 0.0, std: 1.0, stored: Stored::F32 };
    fill(device.queue(), &values, 0, Dtype::F32, &memory.slice(8..8)).expect("no elements");
    for range in [0..6, 2..6] {
        let refused = fill(device.queue(), &values, 0, Dtype::F32, &memory.slice(range));
        assert!(matches!(refused, Err(CudaError::Shape { op: "fill", .. })), "{refused:?}");
    }
    assert_eq!(device.fetch(&memory, 0_u32), vec![u32::MAX; 16]);
}
