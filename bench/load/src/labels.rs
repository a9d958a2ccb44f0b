//! Where the labels of points go in a plot, so that none covers another, a point or a line.
//!
//! It draws nothing. Each label in turn takes the place around its point that covers least of what is
//! there already. Invariant: a label's place depends on points and labels alone, so a plot of the same
//! data is the same.

/// Pixels, downwards.
pub(crate) type Pixel = (i32, i32);

/// Of a label's letters, about, in pixels.
const LETTER: i32 = 7;
const HEIGHT: i32 = 12;
/// Radius of a point, and from it to a label.
const RADIUS: i32 = 5;
const AWAY: [i32; 3] = [7, 13, 20];
/// What covering another label costs beside covering a point, and a piece of a line.
const LABEL: i32 = 100;
const POINT: i32 = 30;
const LINE: i32 = 1;
/// Pixels of a line that count as one piece.
const PIECE: i32 = 4;

/// A rectangle: left, top, right, bottom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Area(i32, i32, i32, i32);

impl Area {
    const fn of_label((left, top): Pixel, letters: i32) -> Self {
        Self(left, top, left + letters * LETTER, top + HEIGHT)
    }

    const fn around((x, y): Pixel) -> Self {
        Self(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS)
    }

    const fn meets(&self, other: &Self) -> bool {
        self.0 < other.2 && other.0 < self.2 && self.1 < other.3 && other.1 < self.3
    }

    const fn holds(&self, (x, y): Pixel) -> bool {
        self.0 <= x && x < self.2 && self.1 <= y && y < self.3
    }
}

/// Pixels along a line, a few apart.
fn along((from, to): (Pixel, Pixel)) -> impl Iterator<Item = Pixel> {
    let (width, height) = (to.0 - from.0, to.1 - from.1);
    let pieces = (width.abs().max(height.abs()) / PIECE).max(1);
    (0..=pieces).map(move |i| (from.0 + width * i / pieces, from.1 + height * i / pieces))
}

/// Left upper corners around a point, the likeliest first.
fn around((x, y): Pixel, letters: i32) -> impl Iterator<Item = Pixel> {
    let width = letters * LETTER;
    AWAY.into_iter().flat_map(move |away| {
        let (left, middle, right) = (x - away - width, x - width / 2, x + away);
        let (above, beside, below) = (y - away - HEIGHT, y - HEIGHT / 2, y + away);
        [
            (right, above),
            (left, below),
            (left, above),
            (right, below),
            (middle, above),
            (middle, below),
            (right, beside),
            (left, beside),
        ]
    })
}

/// Left upper corners of the labels of curves, which are points in the order in which lines join them;
/// a label is told by its letters. They stay inside of `right` pixels.
pub(crate) fn places(curves: &[Vec<(Pixel, i32)>], right: i32) -> Vec<Vec<Pixel>> {
    let points: Vec<Area> =
        curves.iter().flatten().map(|(point, _)| Area::around(*point)).collect();
    let joined = curves.iter().flat_map(|curve| curve.windows(2));
    let lines: Vec<Pixel> = joined.flat_map(|pair| along((pair[0].0, pair[1].0))).collect();
    let mut taken: Vec<Area> = Vec::new();
    let mut place = |&(point, letters): &(Pixel, i32)| {
        let cost = |corner: &Pixel| {
            let area = Area::of_label(*corner, letters);
            let labels = taken.iter().filter(|other| other.meets(&area)).count() as i32;
            let covered = points.iter().filter(|point| point.meets(&area)).count() as i32;
            let pieces = lines.iter().filter(|pixel| area.holds(**pixel)).count() as i32;
            let outside = i32::from(area.2 > right || area.0 < 0 || area.1 < 0);
            LABEL * (labels + outside) + POINT * covered + LINE * pieces
        };
        // Of equal ones the first.
        let best = around(point, letters).min_by_key(cost).unwrap_or(point);
        taken.push(Area::of_label(best, letters));
        best
    };
    curves.iter().map(|curve| curve.iter().map(&mut place).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_label_meets_another_or_a_point() {
        // Two curves that almost meet, with points close together at one end.
        let curve = |shift: i32| {
            let points = [(100, 400), (110, 396), (124, 380), (300, 200), (500, 190 + shift)];
            points.iter().map(|(x, y)| ((x + shift, y + shift), 3)).collect::<Vec<_>>()
        };
        let curves = [curve(0), curve(6), curve(-7)];
        let places = places(&curves, 600);
        let areas: Vec<Area> =
            places.iter().flatten().map(|corner| Area::of_label(*corner, 3)).collect();
        for (i, area) in areas.iter().enumerate() {
            assert!(areas[..i].iter().all(|other| !other.meets(area)), "{i}: {area:?}");
            let points = curves.iter().flatten();
            let covered = points.filter(|(point, _)| Area::around(*point).meets(area)).count();
            assert_eq!(covered, 0, "{i}: {area:?}");
            assert!(area.2 <= 600);
        }
    }

    #[test]
    fn alone_a_label_is_right_above_its_point() {
        assert_eq!(places(&[vec![((50, 50), 2)]], 600), [[(57, 31)]]);
    }
}
