//! Curves of unique bytes over the interval's length, both logarithmic, among the links that would have to carry them.
//!
//! A link that carries B bytes a second is the straight line B·t: where a curve lies below a link's line, pre-copy over that link
//! would come down to that interval, so a curve below the line at the downtime's budget converges.

use std::fmt::Write as _;
use std::time::Duration;

use super::Glyphs;
use super::label::{clean, clean_ascii, clean_xml};
use super::scale::{LogScale, number};
use crate::model::units::{PAGE_SIZE, display_duration};
use crate::model::{BytesPerSecond, WriteCurve};

/// The links that are drawn unless others are asked for: 1, 10, 25 and 100 Gbit/s.
pub const LINKS: [BytesPerSecond; 4] = [
    BytesPerSecond(125_000_000),
    BytesPerSecond(1_250_000_000),
    BytesPerSecond(3_125_000_000),
    BytesPerSecond(12_500_000_000),
];

/// The most curves in one drawing; more cannot be told apart.
const MOST: usize = 6;
const MEBIBYTE: f64 = 1048576.0;

/// The plot's place in the drawing, in pixels.
const LEFT: f64 = 78.0;
const TOP: f64 = 52.0;
const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 360.0;
/// The drawing's size.
const ALL_WIDTH: f64 = 900.0;
const ALL_HEIGHT: f64 = 470.0;

const STYLE: &str = "\
text{font:12px system-ui,sans-serif;fill:#24292f}.title{font-size:16px;font-weight:600}.bg{fill:#fff}.small{font-size:11px;fill:#57606a}\
.grid{stroke:#dfe3e8;fill:none}.axis{stroke:#57606a;fill:none}.link{stroke:#57606a;stroke-dasharray:1 3;fill:none}\
.halo{paint-order:stroke;stroke:#fff;stroke-width:4px}.budget{stroke:#24292f;stroke-width:1.5;fill:none}.curve{stroke-width:2;fill:none}.band{opacity:.16;stroke:none}\
.c0{stroke:#0072b2}.f0{fill:#0072b2}.c1{stroke:#c14f00}.f1{fill:#c14f00}.c2{stroke:#00795a}.f2{fill:#00795a}\
.c3{stroke:#9b4f7f}.f3{fill:#9b4f7f}.c4{stroke:#8a6100}.f4{fill:#8a6100}.c5{stroke:#4b5560}.f5{fill:#4b5560}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.bg{fill:#0d1117}.small{fill:#9aa4af}.grid{stroke:#262d36}\
.axis{stroke:#9aa4af}.link{stroke:#9aa4af}.halo{stroke:#0d1117}.budget{stroke:#e6edf3}.band{opacity:.28}\
.c0{stroke:#56b4e9}.f0{fill:#56b4e9}.c1{stroke:#ff9248}.f1{fill:#ff9248}.c2{stroke:#2dc59a}.f2{fill:#2dc59a}\
.c3{stroke:#e6a5cb}.f3{fill:#e6a5cb}.c4{stroke:#e6b84a}.f4{fill:#e6b84a}.c5{stroke:#c4ccd4}.f5{fill:#c4ccd4}}";
/// Dashes of the curves, by number.
const DASHES: [&str; MOST] = ["none", "8 3", "3 3", "10 3 3 3", "14 4", "5 2 1 2"];
/// Marks of the curves in text.
const MARKS: [char; MOST] = ['●', '■', '▲', '◆', '○', '□'];
const ASCII_MARKS: [char; MOST] = ['a', 'b', 'c', 'd', 'e', 'f'];

/// Both axes: milliseconds and MiB.
struct Axes {
    x: LogScale,
    y: LogScale,
}

impl Axes {
    fn of(curves: &[(&str, &WriteCurve)], downtime: Option<Duration>) -> Self {
        let points = || curves.iter().flat_map(|(_, curve)| curve.points());
        let times = || points().map(|point| point.interval_ns as f64 / 1e6).chain(downtime.map(ms));
        let (first, last) = (times().fold(f64::INFINITY, f64::min), times().fold(0.0, f64::max));
        let last = if last > 0.0 { last } else { 1000.0 };
        let most = points().map(|point| mebibytes(point.high_pages)).fold(mebibytes(1.0), f64::max);
        let least = points().map(|point| mebibytes(point.low_pages)).filter(|&low| low > 0.0).fold(most, f64::min);
        // Six powers of ten at most: what lies below is no part of the picture.
        Self {
            x: LogScale::around(first.clamp(last / 1e6, last), last),
            y: LogScale::around(least.max(most / 1e6), most),
        }
    }

    /// The places at which the line of `link` enters and leaves the plot, if it does.
    fn link(&self, link: BytesPerSecond) -> Option<[(f64, f64); 2]> {
        let mebibytes_per_ms = link.0 as f64 / MEBIBYTE / 1e3;
        if mebibytes_per_ms <= 0.0 {
            return None;
        }
        let first = self.x.from().max(self.y.from() / mebibytes_per_ms);
        let last = self.x.to().min(self.y.to() / mebibytes_per_ms);
        let place = |ms: f64| (self.x.place(ms), self.y.place(ms * mebibytes_per_ms));
        (first < last).then(|| [place(first), place(last)])
    }
}

/// The curves as a drawing: names, curves with their bands (dotted where extrapolated), the lines of `links`, and the downtime's
/// budget for memory as a vertical line. The first six curves are drawn; how many are not is said.
pub fn curve_svg(
    title: &str,
    curves: &[(&str, &WriteCurve)],
    links: &[BytesPerSecond],
    downtime: Option<Duration>,
) -> String {
    let shown = &curves[..curves.len().min(MOST)];
    let axes = Axes::of(shown, downtime);
    let title = clean_xml(title);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" viewBox=\"0 0 {ALL_WIDTH} {ALL_HEIGHT}\" width=\"{ALL_WIDTH}\" \
         height=\"{ALL_HEIGHT}\">\n<title>{title}</title>\n<desc>Different bytes written, over the length of the interval; both \
         axes logarithmic</desc>\n<style>{STYLE}</style>\n<rect class=\"bg\" width=\"{ALL_WIDTH}\" height=\"{ALL_HEIGHT}\"/>\n\
         <text class=\"title\" x=\"{LEFT}\" y=\"28\">{title}</text>\n"
    );
    draw_axes(&mut svg, &axes);
    for &link in links {
        draw_link(&mut svg, &axes, link);
    }
    if let Some(downtime) = downtime {
        let x = pixel_x(axes.x.place(ms(downtime)));
        let label = clean_xml(&format!("budget {}", display_duration(downtime)));
        put(
            &mut svg,
            format_args!(
                "<path class=\"budget\" d=\"M{x:.1} {TOP}V{:.1}\"/>\n<text class=\"small\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
                TOP + HEIGHT,
                TOP - 6.0
            ),
        );
    }
    for (index, (name, curve)) in shown.iter().enumerate() {
        draw_curve(&mut svg, &axes, index, curve);
        draw_legend(&mut svg, index, &clean_xml(name));
    }
    let (x, mut y) = (LEFT + WIDTH + 24.0, TOP + 22.0 * (shown.len() as f64) + 20.0);
    let mut note = |text: &str| {
        put(&mut svg, format_args!("<text class=\"small\" x=\"{x}\" y=\"{y}\">{text}</text>"));
        y += 16.0;
    };
    if curves.len() > MOST {
        note(&format!("and {} more that are not drawn", curves.len() - MOST));
    }
    if !shown.is_empty() {
        note("shaded: the band of each curve");
    }
    if shown.iter().any(|(_, curve)| curve.last().interval_ns > curve.measured_until().as_nanos() as u64) {
        note("dotted and faint: extrapolated");
    }
    if downtime.is_some() && !links.is_empty() {
        note("below a link's line at the budget:");
        note("pre-copy over it converges");
    }
    svg.push_str("</svg>\n");
    svg
}

fn draw_axes(svg: &mut String, axes: &Axes) {
    let bottom = TOP + HEIGHT;
    for tick in axes.x.ticks() {
        let (x, label) = (pixel_x(axes.x.place(tick)), number(tick));
        put(
            svg,
            format_args!(
                "<path class=\"grid\" d=\"M{x:.1} {TOP}V{bottom}\"/>\n<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
                bottom + 18.0
            ),
        );
    }
    for tick in axes.y.ticks() {
        let (y, label) = (pixel_y(axes.y.place(tick)), number(tick));
        put(
            svg,
            format_args!(
                "<path class=\"grid\" d=\"M{LEFT} {y:.1}H{}\"/>\n<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                LEFT + WIDTH,
                LEFT - 8.0,
                y + 4.0
            ),
        );
    }
    put(
        svg,
        format_args!(
            "<path class=\"axis\" d=\"M{LEFT} {TOP}V{bottom}H{}\"/>\n<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">length of the interval, ms</text>\n\
             <text transform=\"translate(20 {}) rotate(-90)\" text-anchor=\"middle\">different memory written, MiB</text>",
            LEFT + WIDTH,
            LEFT + WIDTH / 2.0,
            bottom + 42.0,
            TOP + HEIGHT / 2.0
        ),
    );
}

/// A link's line, with its rate above the line's upper end and inside the plot.
fn draw_link(svg: &mut String, axes: &Axes, link: BytesPerSecond) {
    let Some([from, to]) = axes.link(link) else { return };
    let (x0, y0, x1, y1) = (pixel_x(from.0), pixel_y(from.1), pixel_x(to.0), pixel_y(to.1));
    let at_the_top = to.1 > 0.999;
    let (x, y) = if at_the_top { (x1 + 5.0, y1 + 14.0) } else { (x1 - 4.0, y1 - 6.0) };
    // Beside the line: at the top there is room right of it, at the right only left.
    let (x, anchor) = if at_the_top && x < LEFT + WIDTH - 70.0 { (x, "start") } else { (x1 - 10.0, "end") };
    let rate = gigabits(link);
    put(
        svg,
        format_args!(
            "<path class=\"link\" d=\"M{x0:.1} {y0:.1}L{x1:.1} {y1:.1}\"/>\n<text class=\"small halo\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{rate}</text>"
        ),
    );
}

fn draw_curve(svg: &mut String, axes: &Axes, index: usize, curve: &WriteCurve) {
    let place = |interval_ns: u64, pages: f64| {
        let x = axes.x.place(interval_ns as f64 / 1e6);
        (x, (pixel_x(x), pixel_y(axes.y.place(mebibytes(pages)))))
    };
    let until = curve.measured_until().as_nanos() as u64;
    // What lies before the axis begins would be drawn onto it.
    let points: Vec<_> =
        curve.points().iter().filter(|point| point.interval_ns as f64 / 1e6 >= axes.x.from() * 0.999).collect();
    let line = |points: &mut dyn Iterator<Item = (f64, f64)>| {
        points.fold(String::new(), |mut path, (x, y)| {
            let _ = write!(path, "{}{x:.1} {y:.1}", if path.is_empty() { 'M' } else { 'L' });
            path
        })
    };
    let upper = points.iter().map(|p| place(p.interval_ns, p.high_pages).1);
    let lower = points.iter().rev().map(|p| place(p.interval_ns, p.low_pages).1);
    put(svg, format_args!("<path class=\"band f{index}\" d=\"{}Z\"/>", line(&mut upper.chain(lower))));
    let middle = |p: &&crate::model::CurvePoint| place(p.interval_ns, p.unique_pages).1;
    let measured = points.iter().filter(|p| p.interval_ns <= until).map(&middle);
    put(
        svg,
        format_args!(
            "<path class=\"curve c{index}\" stroke-dasharray=\"{}\" d=\"{}\"/>",
            DASHES[index],
            line(&mut measured.clone())
        ),
    );
    let from = points.iter().rposition(|p| p.interval_ns <= until).unwrap_or(0);
    if from + 1 < points.len() {
        let beyond = line(&mut points[from..].iter().map(&middle));
        put(
            svg,
            format_args!("<path class=\"curve c{index}\" opacity=\".6\" stroke-dasharray=\"1 4\" d=\"{beyond}\"/>"),
        );
    }
    // A mark for each of a few points; where there are many they would hide the line.
    if points.len() <= 16 {
        for (x, y) in measured {
            put(svg, format_args!("{}", mark(index, x, y)));
        }
    }
}

/// The mark of a curve, as on its points.
fn mark(index: usize, x: f64, y: f64) -> String {
    let path = match index % 3 {
        0 => return format!("<circle class=\"f{index}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\"/>"),
        1 => format!("M{:.1} {:.1}h7v7h-7z", x - 3.5, y - 3.5),
        _ => format!("M{x:.1} {:.1}l4.5 8h-9z", y - 5.0),
    };
    format!("<path class=\"f{index}\" d=\"{path}\"/>")
}

fn draw_legend(svg: &mut String, index: usize, name: &str) {
    let (x, y) = (LEFT + WIDTH + 24.0, TOP + 12.0 + 22.0 * index as f64);
    put(
        svg,
        format_args!(
            "<path class=\"curve c{index}\" stroke-dasharray=\"{}\" d=\"M{x} {y}h34\"/>\n{}\n<text x=\"{}\" y=\"{}\">{name}</text>",
            DASHES[index],
            mark(index, x + 17.0, y),
            x + 42.0,
            y + 4.0
        ),
    );
}

/// The curves as text of `width` by `height` characters and a legend below, without a line end behind the last line. Less than 30 by
/// 8 counts as that, more than 400 by 100 as that.
pub fn curve_text(
    curves: &[(&str, &WriteCurve)],
    links: &[BytesPerSecond],
    downtime: Option<Duration>,
    width: usize,
    height: usize,
    glyphs: Glyphs,
) -> String {
    let ascii = glyphs == Glyphs::Ascii;
    let shown = &curves[..curves.len().min(MOST)];
    let axes = Axes::of(shown, downtime);
    const MARGIN: usize = 10;
    let columns = width.clamp(30, 400) - MARGIN;
    let rows = height.clamp(8, 100) - 2;
    let mut grid = vec![vec![' '; columns]; rows];
    let column = |place: f64| (place * (columns - 1) as f64).round() as usize;
    let places = || (0..columns).map(|at| (at, at as f64 / (columns - 1) as f64));
    // Rows count from the top.
    let row = |place: f64| rows - 1 - (place.clamp(0.0, 1.0) * (rows - 1) as f64).round() as usize;
    if let Some(downtime) = downtime {
        let place = column(axes.x.place(ms(downtime))).min(columns - 1);
        for line in &mut grid {
            line[place] = if ascii { '|' } else { '│' };
        }
    }
    let mut labels = Vec::new();
    for &link in links {
        let Some([from, to]) = axes.link(link) else { continue };
        for (at, place) in places().filter(|(at, _)| (column(from.0)..=column(to.0)).contains(at)) {
            let part = ((place - from.0) / (to.0 - from.0)).clamp(0.0, 1.0);
            grid[row(from.1 + part * (to.1 - from.1))][at] = if ascii { '.' } else { '·' };
        }
        labels.push((row(to.1), column(to.0), gigabits(link).trim_end_matches("bit/s").replace(' ', "")));
    }
    for (index, (_, curve)) in shown.iter().enumerate() {
        let mark = if ascii { ASCII_MARKS[index] } else { MARKS[index] };
        for (at, place) in places() {
            let ns = axes.x.value(place) * 1e6;
            // Half a column beyond the ends, so that the ends themselves are drawn.
            let points = curve.points();
            let first = points.first().map_or(0, |point| point.interval_ns) as f64;
            if ns < first * 0.95 || ns > curve.last().interval_ns as f64 * 1.05 {
                continue;
            }
            grid[row(axes.y.place(mebibytes(curve.at_ns(ns).unique_pages)))][at] = mark;
        }
    }
    for (row, end, label) in labels {
        // Left of the line's end, for as much as nothing else stands there.
        let from = end.saturating_sub(label.len() + 1);
        for (at, c) in label.chars().enumerate() {
            if let Some(cell) = grid[row].get_mut(from + at).filter(|cell| matches!(cell, ' ' | '·' | '.')) {
                *cell = c;
            }
        }
    }
    let mut lines: Vec<String> = Vec::with_capacity(rows + 4);
    for (index, line) in grid.iter().enumerate() {
        let value = axes.y.value((rows - 1 - index) as f64 / (rows - 1) as f64);
        let label =
            if index == 0 || index + 1 == rows || index == rows / 2 { axis_bytes(value) } else { String::new() };
        lines.push(format!("{label:>9}{}{}", if ascii { '|' } else { '▏' }, line.iter().collect::<String>()));
    }
    let bottom = if ascii { "-" } else { "▔" };
    lines.push(format!("{:>MARGIN$}{}", "", bottom.repeat(columns)));
    let (first, last) = (number(axes.x.from()), format!("{} ms", number(axes.x.to())));
    lines.push(format!("{:>MARGIN$}{first}{last:>1$}", "", columns.saturating_sub(first.len())));
    for (index, (name, _)) in shown.iter().enumerate() {
        let (mark, name) = if ascii { (ASCII_MARKS[index], clean_ascii(name)) } else { (MARKS[index], clean(name)) };
        lines.push(format!("{:>MARGIN$}{mark} {name}", ""));
    }
    if curves.len() > MOST {
        lines.push(format!("{:>MARGIN$}and {} more that are not drawn", "", curves.len() - MOST));
    }
    if let Some(downtime) = downtime {
        let budget = display_duration(downtime);
        let (mark, budget) = if ascii { ('|', budget.replace('µ', "u")) } else { ('│', budget) };
        lines.push(format!("{:>MARGIN$}{mark} budget {budget}", ""));
    }
    lines.iter().map(|line| line.trim_end()).collect::<Vec<_>>().join("\n")
}

fn put(svg: &mut String, what: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = writeln!(svg, "{what}");
}

fn pixel_x(place: f64) -> f64 {
    LEFT + place.min(1.0) * WIDTH
}

fn pixel_y(place: f64) -> f64 {
    TOP + (1.0 - place.min(1.0)) * HEIGHT
}

fn ms(duration: Duration) -> f64 {
    // An axis has no zero.
    (duration.as_secs_f64() * 1e3).max(1e-6)
}

fn mebibytes(pages: f64) -> f64 {
    pages * PAGE_SIZE as f64 / MEBIBYTE
}

/// A value of the vertical axis, at most nine characters.
fn axis_bytes(mebibytes: f64) -> String {
    let (value, unit) = if mebibytes < 1e4 { (mebibytes, "MiB") } else { (mebibytes / 1024.0, "GiB") };
    format!("{value:>5.*} {unit}", if value < 10.0 { 2 } else { 0 })
}

fn gigabits(link: BytesPerSecond) -> String {
    let bits = link.0 as f64 * 8.0;
    if bits >= 1e9 { format!("{} Gbit/s", number(bits / 1e9)) } else { format!("{} Mbit/s", number(bits / 1e6)) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::draw::tests::golden;
    use crate::model::CurvePoint;
    use crate::model::curve::tests::curve_of;

    fn two() -> (WriteCurve, WriteCurve) {
        let banded = curve_of(&[(2000.0, 60.0), (40_000.0, 0.8)], &[5.0, 20.0, 80.0, 320.0, 1280.0]);
        let banded = banded.points().iter().map(|p| CurvePoint {
            low_pages: p.unique_pages * 0.8,
            high_pages: p.unique_pages * 1.3,
            ..*p
        });
        let points = curve_of(&[(150_000.0, 3.0)], &[5.0, 20.0, 80.0, 320.0, 1280.0, 5120.0]).points().to_vec();
        (WriteCurve::new(banded.collect()).unwrap(), WriteCurve::with_measured_until(points, 1_280_000_000).unwrap())
    }

    #[test]
    fn drawn_as_ever() {
        let (a, b) = two();
        let curves = [("vCPU 0 <db & \u{1b}[1m>", &a), ("vCPU 1", &b)];
        let budget = Some(Duration::from_millis(26));
        golden("curve.svg", &curve_svg("web1: unique pages", &curves, &LINKS, budget));
        golden("curve.txt", &curve_text(&curves, &LINKS, budget, 80, 20, Glyphs::Unicode));
        golden("curve-ascii.txt", &curve_text(&curves, &LINKS, budget, 60, 14, Glyphs::Ascii));
    }

    #[test]
    fn points_are_drawn_where_they_are() {
        // From 10 to 1000 ms and 1 to 100 MiB: the middle of both axes is 100 ms and 10 MiB.
        let points = [(10, 256.0), (100, 2560.0), (1000, 25_600.0)].map(|(ms, p)| CurvePoint::exact(ms * 1_000_000, p));
        let curve = WriteCurve::new(points.to_vec()).unwrap();
        // 10 MiB in 100 ms are 100 MiB/s: the link's line is the curve.
        let svg = curve_svg("", &[("a", &curve)], &[BytesPerSecond(100 << 20)], Some(Duration::from_millis(100)));
        assert!(svg.contains("d=\"M78.0 412.0L358.0 232.0L638.0 52.0\""), "{svg}");
        assert!(
            svg.contains("class=\"link\" d=\"M78.0 412.0L638.0 52.0\"") && svg.contains("M358.0 52V412.0"),
            "{svg}"
        );
    }

    #[test]
    fn nothing_and_too_much_are_drawn_too() {
        let empty = curve_svg("", &[], &LINKS, None);
        assert!(empty.ends_with("</svg>\n") && !empty.contains("NaN") && !empty.contains("inf"));
        let idle = curve_of(&[], &[5.0, 20.0]);
        let many: Vec<(&str, &WriteCurve)> = (0..9).map(|_| ("x", &idle)).collect();
        assert!(curve_svg("", &many, &[BytesPerSecond(0)], Some(Duration::ZERO)).contains("and 3 more"));
        assert!(curve_text(&many, &LINKS, Some(Duration::MAX), 0, 0, Glyphs::Unicode).contains("and 3 more"));
        assert!(!curve_text(&[], &[], None, usize::MAX, usize::MAX, Glyphs::Ascii).is_empty());
    }

    proptest! {
        /// Any curve: numbers only, within the page, and text within its width.
        #[test]
        fn any_curve_stays_on_the_page(
            steps in prop::collection::vec((1..10_000_000_000u64, 0.0..1e8f64), 1..60), name in ".*",
            width in 0..200usize, height in 0..60usize, budget in prop::option::of(0..100_000_000_000u64),
        ) {
            let mut at = 0;
            let points = steps.into_iter().map(|(step, pages)| {
                at += step;
                CurvePoint { interval_ns: at, unique_pages: pages, low_pages: pages / 2.0, high_pages: pages * 2.0 }
            });
            let curve = WriteCurve::from_measured(points.collect()).unwrap();
            let budget = budget.map(Duration::from_nanos);
            let svg = curve_svg(&name, &[(&name, &curve)], &LINKS, budget);
            prop_assert!(!svg.contains("NaN") && !svg.contains("inf\"") && svg.matches("<svg").count() == 1);
            for path in svg.split(" d=\"").skip(1) {
                let numbers = path.split('"').next().unwrap().split(|c: char| !c.is_ascii_digit() && c != '.' && c != '-');
                for number in numbers.filter(|number| !number.is_empty()) {
                    let number: f64 = number.parse().unwrap();
                    prop_assert!((-20.0..=ALL_WIDTH).contains(&number), "{}", path);
                }
            }
            let text = curve_text(&[(&name, &curve)], &LINKS, budget, width, height, Glyphs::Ascii);
            let plot = height.clamp(8, 100);
            prop_assert!(text.is_ascii() && text.lines().take(plot).all(|line| line.len() <= width.clamp(30, 400)), "{text}");
        }
    }
}
