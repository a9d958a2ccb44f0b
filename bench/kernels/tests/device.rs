//! Every case on a device: its results are right, and it can be timed. Skipped, loudly, where there is
//! no device; `--nocapture` shows the figures.

use kernel_bench::{Bench, Case, Rate, cases};
use std::io::Write;

#[test]
fn every_kernel_is_right_and_has_a_figure() {
    let mut out = std::io::stderr();
    let mut bench = match Bench::open() {
        Ok(bench) => bench,
        Err(failure) if failure.is_absent() => {
            let required = std::env::var("TOKENMILL_REQUIRE").unwrap_or_default();
            assert!(!required.split(',').any(|r| r == "gpu"), "a GPU is required: {failure}");
            let _ = writeln!(out, "SKIPPED: kernels on a CUDA device: {failure}");
            return;
        }
        Err(failure) => panic!("{failure}"),
    };
    let _ = writeln!(out, "{:?} {:?}", bench.device(), bench.ceilings());
    let wanted = std::env::var("TOKENMILL_KERNELS").unwrap_or_default();
    let wanted = |case: &Case| wanted.split(',').any(|part| case.name().contains(part));
    let mut wrong = Vec::new();
    let begin = std::time::Instant::now();
    for case in cases().iter().filter(|case| wanted(case)) {
        match bench.run(case) {
            Ok(figure) => {
                assert!(figure.micros.is_finite() && figure.micros > 0.0, "{figure:?}");
                let rate = match figure.rate {
                    Rate::Bytes(rate) => format!("{:.2} TB/s", rate / 1e12),
                    Rate::Flops(rate) => format!("{:.0} TFLOP/s", rate / 1e12),
                };
                let (name, micros) = (&figure.name, figure.micros);
                let percent = figure.floor.map_or(f64::NAN, |floor| 100.0 * floor / micros);
                let [least, most] = figure.range;
                let _ = writeln!(
                    out,
                    "{name:<44} {micros:>10.2} us ({least:.2} to {most:.2}) {rate:>12} {percent:>5.1} %"
                );
            }
            Err(failure) => {
                let _ = writeln!(out, "{:<44} {failure}", case.name());
                wrong.push(format!("{}: {failure}", case.name()));
            }
        }
    }
    let _ = writeln!(out, "in {:.1} s", begin.elapsed().as_secs_f64());
    assert!(wrong.is_empty(), "{wrong:#?}");
}
