//! The plot of a concurrency sweep: what a user gets against what a GPU gives.
//!
//! It measures nothing. Invariant: every point of every curve is drawn, with its concurrency beside it.

use crate::chart::{Area, FONT, SIZE, axes, colour, document, failed, legend, line};
use crate::labels::places;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// One load of a sweep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Requests in flight.
    pub concurrency: u32,
    /// Tokens a second that one stream gets after its first.
    pub per_user: f64,
    /// Generated tokens a second of each GPU.
    pub per_gpu: f64,
}

/// The loads of one engine.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// Its name in the legend.
    pub label: String,
    /// In any order.
    pub points: Vec<Point>,
}

/// Why there is no plot.
#[derive(Debug, thiserror::Error)]
pub enum PlotError {
    /// There is no point at all.
    #[error("there is nothing to draw: no curve has a point")]
    Empty,
    /// A speed that is none.
    #[error("{label} at concurrency {concurrency} has a speed that is not a positive number")]
    Speed {
        /// The curve.
        label: String,
        /// The point.
        concurrency: u32,
    },
    /// A point that is none.
    #[error("{label} has the point {x}, {y}; both must be numbers and not below zero")]
    Point {
        /// The curve.
        label: String,
        /// To the right.
        x: f64,
        /// Up.
        y: f64,
    },
    /// The drawing library refused.
    #[error("cannot draw: {0}")]
    Draw(String),
}

/// Room beyond the furthest point, for what is written beside it.
const ROOM: f64 = 1.12;

/// The curves as an SVG document.
///
/// # Errors
/// When there is nothing to draw, or a speed is not positive.
pub fn draw(title: &str, curves: &[Curve]) -> Result<String, PlotError> {
    let (mut furthest, mut highest) = (0.0_f64, 0.0_f64);
    for curve in curves {
        for point in &curve.points {
            let speeds = [point.per_user, point.per_gpu];
            if !speeds.iter().all(|speed| speed.is_finite() && *speed > 0.0) {
                let (label, concurrency) = (curve.label.clone(), point.concurrency);
                return Err(PlotError::Speed { label, concurrency });
            }
            furthest = furthest.max(point.per_user);
            highest = highest.max(point.per_gpu);
        }
    }
    if furthest <= 0.0 {
        return Err(PlotError::Empty);
    }
    document(|area| chart(area, title, curves, (furthest * ROOM, highest * ROOM)))
}

fn chart(
    area: &Area<'_>,
    title: &str,
    curves: &[Curve],
    most: (f64, f64),
) -> Result<(), PlotError> {
    let whole = |speed: &f64| format!("{speed:.0}");
    let mut chart = axes(area, title, most, ("tokens/s per user", "tokens/s per GPU"), &whole)?;
    let sorted: Vec<Vec<Point>> = curves
        .iter()
        .map(|curve| {
            let mut points = curve.points.clone();
            points.sort_by(|a, b| a.per_user.total_cmp(&b.per_user));
            points
        })
        .collect();
    let label = |point: &Point| point.concurrency.to_string();
    let pixel = |point: &Point| {
        (chart.backend_coord(&(point.per_user, point.per_gpu)), label(point).len() as i32)
    };
    let pixels: Vec<Vec<_>> =
        sorted.iter().map(|curve| curve.iter().map(pixel).collect()).collect();
    let places = places(&pixels, SIZE.0 as i32);
    for (index, (curve, points)) in curves.iter().zip(&sorted).enumerate() {
        let colour = colour(index);
        let through = points.iter().map(|point| (point.per_user, point.per_gpu));
        line(&mut chart, &curve.label, colour, through)?;
        let anchor = Pos::new(HPos::Left, VPos::Top);
        let style = TextStyle::from((FONT, 13).into_font()).color(&colour).pos(anchor);
        let beside = pixels[index].iter().zip(&places[index]);
        let marks = points.iter().zip(beside).map(|(point, ((at, _), corner))| {
            let away = (corner.0 - at.0, corner.1 - at.1);
            EmptyElement::at((point.per_user, point.per_gpu))
                + Circle::new((0, 0), 4, colour.filled())
                + Text::new(label(point), away, style.clone())
        });
        chart.draw_series(marks).map_err(failed)?;
    }
    legend(&mut chart, SeriesLabelPosition::UpperRight)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(label: &str, points: &[(u32, f64, f64)]) -> Curve {
        let point = |&(concurrency, per_user, per_gpu)| Point { concurrency, per_user, per_gpu };
        Curve { label: label.into(), points: points.iter().map(point).collect() }
    }

    #[test]
    fn every_point_is_drawn_with_its_concurrency() {
        let ours = curve("ours", &[(4, 250.0, 955.0), (1, 448.0, 435.0), (64, 92.0, 5207.0)]);
        let theirs = curve("theirs", &[(1, 325.0, 305.0), (17, 120.0, 1762.0)]);
        let svg = draw("a sweep", &[ours, theirs]).expect("a plot");
        assert_eq!(svg.matches("<circle").count(), 5);
        for text in
            ["a sweep", "ours", "theirs", "tokens/s per user", "tokens/s per GPU", "64", "17"]
        {
            let written = svg.lines().any(|line| line.trim() == text);
            assert!(written, "{text} is not in the plot");
        }
    }

    #[test]
    fn a_point_lies_where_its_speeds_are() {
        let svg = draw("t", &[curve("a", &[(1, 100.0, 50.0), (2, 50.0, 100.0)])]).expect("a plot");
        let centre = |line: &str, name: &str| -> f64 {
            let at = line.split(&format!("{name}=\"")).nth(1).expect("a circle");
            at.split('"').next().and_then(|n| n.parse().ok()).expect("a number")
        };
        let circles: Vec<(f64, f64)> = (svg.lines().filter(|line| line.contains("<circle")))
            .map(|line| (centre(line, "cx"), centre(line, "cy")))
            .collect();
        let [(left, upper), (right, lower)] = circles[..] else { panic!("{circles:?}") };
        assert!(right > left && lower > upper, "{circles:?}");
        // Half as far from an axis that begins at 0.
        let origin = 2.0 * left - right;
        assert!((80.0..120.0).contains(&origin), "the axis is at {origin}");
    }

    #[test]
    fn nothing_and_nonsense_are_refused() {
        assert!(matches!(draw("t", &[curve("a", &[])]), Err(PlotError::Empty)));
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let refused = draw("t", &[curve("a", &[(3, bad, 1.0)])]);
            let Err(PlotError::Speed { concurrency, .. }) = refused else { panic!("{bad}") };
            assert_eq!(concurrency, 3);
        }
    }
}
