//! Plain curves: one number over another, for loads and for time.
//!
//! It measures nothing. Invariant: every point is drawn, joined to the one before it.

use crate::chart::{axes, colour, document, failed, legend, line};
use crate::pareto::PlotError;
use plotters::prelude::*;

/// A named curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// Its name in the legend.
    pub name: String,
    /// Points in order of `x`; both finite and not below zero.
    pub points: Vec<(f64, f64)>,
}

/// The curves as an SVG document.
///
/// # Errors
/// When there is nothing to draw, or a point is no point.
pub fn draw_lines(title: &str, x: &str, y: &str, lines: &[Line]) -> Result<String, PlotError> {
    let (mut right, mut top) = (0.0_f64, 0.0_f64);
    for line in lines {
        for (at, value) in &line.points {
            if !(at.is_finite() && value.is_finite() && *at >= 0.0 && *value >= 0.0) {
                return Err(PlotError::Point { label: line.name.clone(), x: *at, y: *value });
            }
            (right, top) = (right.max(*at), top.max(*value));
        }
    }
    if right <= 0.0 || top <= 0.0 {
        return Err(PlotError::Empty);
    }
    // Small scales need a decimal, large ones none.
    let mark = |value: &f64| format!("{value:.0$}", usize::from(value.fract() != 0.0));
    document(|area| {
        let mut chart = axes(area, title, (right * 1.02, top * 1.25), (x, y), &mark)?;
        for (index, curve) in lines.iter().enumerate() {
            let colour = colour(index);
            line(&mut chart, &curve.name, colour, curve.points.iter().copied())?;
            // Where there are few points each is marked.
            if curve.points.len() <= 40 {
                let dot = |at: &(f64, f64)| Circle::new(*at, 3, colour.filled());
                chart.draw_series(curve.points.iter().map(dot)).map_err(failed)?;
            }
        }
        legend(&mut chart, SeriesLabelPosition::UpperLeft)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(points: &[(f64, f64)]) -> Line {
        Line { name: "a curve".into(), points: points.to_vec() }
    }

    #[test]
    fn every_point_is_drawn_and_everything_has_its_name() {
        let svg = draw_lines("t", "offered", "got", &[line(&[(0.0, 1.0), (1.5, 2.0), (3.0, 0.0)])])
            .expect("a plot");
        assert_eq!(svg.matches("<circle").count(), 3);
        for text in ["t", "offered", "got", "a curve"] {
            assert!(svg.lines().any(|line| line.trim() == text), "{text} is not in the plot");
        }
    }

    #[test]
    fn nothing_and_nonsense_are_refused() {
        assert!(matches!(draw_lines("t", "x", "y", &[line(&[])]), Err(PlotError::Empty)));
        for bad in [(-1.0, 1.0), (1.0, f64::NAN), (f64::INFINITY, 1.0)] {
            let refused = draw_lines("t", "x", "y", &[line(&[bad])]);
            assert!(matches!(refused, Err(PlotError::Point { .. })), "{bad:?}");
        }
    }
}
