//! What every plot here shares: size, fonts, colours, axes from 0, a legend.
//!
//! It draws no data. Invariant: what is drawn is one SVG document without outside references.

use crate::pareto::PlotError;
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use std::fmt::Display;

/// Width and height in pixels.
pub(crate) const SIZE: (u32, u32) = (900, 600);
pub(crate) const FONT: &str = "sans-serif";
/// Told apart in print and by the colour-blind.
const COLOURS: [RGBColor; 5] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 86, 86),
];

/// A drawing of this crate.
pub(crate) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// Axes on it.
pub(crate) type Chart<'a, 'b> =
    ChartContext<'b, SVGBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// The colour of a curve.
pub(crate) fn colour(index: usize) -> RGBColor {
    COLOURS[index % COLOURS.len()]
}

/// What the drawing library refused.
pub(crate) fn failed(error: impl Display) -> PlotError {
    PlotError::Draw(error.to_string())
}

/// An SVG document of what `draw` draws.
pub(crate) fn document(
    draw: impl FnOnce(&Area<'_>) -> Result<(), PlotError>,
) -> Result<String, PlotError> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        draw(&area)?;
        area.present().map_err(failed)?;
    }
    Ok(svg)
}

/// Axes from 0 to `most`, with their names and how their marks are written.
pub(crate) fn axes<'a, 'b>(
    area: &'b Area<'a>,
    title: &str,
    (right, top): (f64, f64),
    (x, y): (&str, &str),
    mark: &dyn Fn(&f64) -> String,
) -> Result<Chart<'a, 'b>, PlotError> {
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 20))
        .margin(18)
        .x_label_area_size(46)
        .y_label_area_size(70)
        .build_cartesian_2d(0.0..right, 0.0..top)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .x_desc(x)
        .y_desc(y)
        .x_label_formatter(mark)
        .y_label_formatter(mark)
        .label_style((FONT, 14))
        .axis_desc_style((FONT, 16))
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(225, 225, 225))
        .draw()
        .map_err(failed)?;
    Ok(chart)
}

/// A named curve through points in order.
pub(crate) fn line<'a: 'b, 'b>(
    chart: &mut Chart<'a, 'b>,
    name: &str,
    colour: RGBColor,
    points: impl Iterator<Item = (f64, f64)>,
) -> Result<(), PlotError> {
    chart
        .draw_series(LineSeries::new(points, colour.stroke_width(2)))
        .map_err(failed)?
        .label(name)
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], colour.stroke_width(2)));
    Ok(())
}

/// The names of the curves, in a corner.
pub(crate) fn legend<'a: 'b, 'b>(
    chart: &mut Chart<'a, 'b>,
    corner: SeriesLabelPosition,
) -> Result<(), PlotError> {
    chart
        .configure_series_labels()
        .position(corner)
        .label_font((FONT, 14))
        .background_style(WHITE)
        .border_style(RGBColor(180, 180, 180))
        .draw()
        .map_err(failed)
}
