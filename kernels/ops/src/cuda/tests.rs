//! The program's kernels as a whole: they are there, they do not spill, and a chain of launches in a
//! graph follows counts that change between its launches.

use super::*;
use crate::{act, norm};
use device::cuda::Event;

#[test]
fn a_program_without_kernels_says_how_to_get_them() {
    let error = CudaError::NoKernels { reason: built::MISSING }.to_string();
    assert!(error.contains("nvcc 13.0") && error.contains("CUDA_HOME"), "{error}");
}

/// Every kernel compiles wherever there is a compiler; continuous integration has one.
#[test]
fn every_source_gave_a_module() {
    if built::CUBINS.is_empty() {
        testing::skip(&format!("this program holds no CUDA kernels: {}", built::MISSING));
        return;
    }
    let names: Vec<&str> = built::CUBINS.iter().map(|cubin| cubin.name).collect();
    for name in ["embed", "norm", "rope", "paged", "act", "linear_few", "attention_mma", "sample"] {
        assert!(names.contains(&name), "{name} of {names:?}");
    }
    assert!(built::CUBINS.iter().all(|cubin| cubin.image.starts_with(b"\x7fELF")));
}

#[test]
fn no_fast_kernel_spills() {
    let Some(device) = testing::device() else { return };
    for name in crate::linear::cuda::MANY.iter().chain(crate::flash::cuda::ALL) {
        let kernel = device.gpu.kernels().get(name).expect("listed");
        let local = kernel.local_bytes().expect("an attribute");
        assert!(local == 0 || name.contains("any"), "{name} spills {local} bytes");
    }
}

#[test]
fn unknown_kernels_are_named() {
    let Some(device) = testing::device() else { return };
    let error = device.gpu.kernels().get("norm_of_nothing").expect_err("there is none");
    assert_eq!(error, CudaError::NoKernel { name: "norm_of_nothing".into() });
}

#[test]
fn a_captured_graph_follows_the_count_on_the_device() {
    let Some(device) = testing::device() else { return };
    let (padded, width) = (8, 64);
    let count = device.send(&[0_u32]);
    let weight = device.send(&vec![1.0_f32; width]);
    let delta = device.send(&vec![1.0_f32; padded * width]);
    let sum = device.send(&vec![0.0_f32; padded * width]);
    let out = device.poisoned(padded * width * 4);
    let rows = Rows { padded, count: Some(&count) };
    let x = Tensor::new(&delta, Dtype::F32);
    let graph = device
        .stream
        .capture(|stream| {
            let queue = Queue { gpu: &device.gpu, stream };
            act::cuda::add(queue, rows, width, x, &sum)?;
            norm::cuda::rms_norm(
                queue,
                rows,
                width,
                Tensor::new(&sum, Dtype::F32),
                &weight,
                0.0,
                &out,
            )
        })
        .expect("a graph");
    assert_eq!(graph.nodes(), Ok(2));
    let ends = [0, 1].map(|_| Event::new(&device.context, true).expect("an event"));
    for real in [3_u32, 8, 1] {
        device.stream.upload(&real.to_le_bytes(), &count).expect("an upload");
        ends[0].record(&device.stream).expect("an event");
        graph.launch(&device.stream).expect("a launch");
        ends[1].record(&device.stream).expect("an event");
        device.stream.synchronize().expect("the graph ran");
        assert!(ends[1].micros_since(&ends[0]).expect("a time") > 0.0);
    }
    let sums = device.fetch(&sum, 0.0_f32);
    for (row, sums) in sums.chunks_exact(width).enumerate() {
        let times = [3, 8, 1].iter().filter(|real| row < **real).count();
        assert!(sums.iter().all(|x| *x == times as f32), "row {row}");
    }
    assert!(device.fetch(&out, 0.0_f32).iter().all(|x| (x - 1.0).abs() < 1e-6));
}
