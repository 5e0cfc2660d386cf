//! Maps of guest memory: which parts were written, and how much of each.
//!
//! A cell is 2 MiB, or as many times twice that as it takes for the map to stay small. Cells stand in order of guest physical
//! address; where there is no memory, as below 4 GiB on x86, the map says so.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::Glyphs;
use super::label::clean_xml;
use crate::model::RegionHeat;
use crate::model::units::display_bytes;

/// The least that a cell stands for, in bytes.
const CELL_BYTES: u64 = 2 << 20;
/// The most cells of a drawing.
const MOST_CELLS: usize = 4096;
/// Cells in a row of a drawing.
const COLUMNS: usize = 64;
/// The most rows of full cells in text.
const MOST_ROWS: usize = 32;

/// Upper ends of the shares that are drawn alike, 0 to 1; before the first, nothing written.
const CLASSES: [f64; 6] = [0.0, 0.01, 0.05, 0.2, 0.5, 1.0];
const CLASS_NAMES: [&str; 6] = ["none", "to 1 %", "to 5 %", "to 20 %", "to 50 %", "to 100 %"];
const BLOCKS: [char; 6] = ['·', '░', '▒', '▓', '▇', '█'];
const ASCII_BLOCKS: [char; 6] = ['.', ':', '-', '+', '*', '#'];

const CELL: usize = 10;
const LEFT: usize = 120;
const TOP: usize = 62;
const ALL_WIDTH: usize = LEFT + COLUMNS * CELL + 20;

const STYLE: &str = "\
text{font:12px system-ui,sans-serif;fill:#24292f}.title{font-size:16px;font-weight:600}.bg{fill:#fff}.small{font-size:11px;fill:#57606a}\
.at{font:11px ui-monospace,monospace}.hole{fill:none;stroke:#8b949e;stroke-dasharray:3 3}.e{stroke:#8b949e;stroke-width:.5}\
.h0{fill:#f0f2f4}.h1{fill:#c6dbef}.h2{fill:#8fc1de}.h3{fill:#4292c6}.h4{fill:#1361a9}.h5{fill:#08264f}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.bg{fill:#0d1117}.small{fill:#9aa4af}\
.h0{fill:#1b212a}.h1{fill:#123a63}.h2{fill:#1361a9}.h3{fill:#4292c6}.h4{fill:#8fc1de}.h5{fill:#f2f8ff}}";

/// What an estimate from a sample is told with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimated {
    /// The size of the regions: cells are no smaller.
    pub region_bytes: u64,
    /// Where the 95 % interval of all pages written begins.
    pub low_pages: u64,
    /// Where it ends.
    pub high_pages: u64,
    /// Pages that were looked at.
    pub sampled_pages: u64,
}

/// One cell.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Cell {
    pages: f64,
    written: f64,
}

impl Cell {
    /// Which of [`CLASSES`] its share is in.
    fn class(self) -> usize {
        let share = if self.pages > 0.0 { self.written / self.pages } else { 0.0 };
        CLASSES.iter().position(|&end| share <= end * (1.0 + 1e-9)).unwrap_or(CLASSES.len() - 1)
    }
}

/// A map: cells by their number, which is their first address in units of `cell_bytes`.
struct Map {
    cell_bytes: u64,
    cells: BTreeMap<u64, Cell>,
    pages: u64,
    written: u64,
}

/// A line of a map.
enum Row {
    /// Cells from this number on, in order.
    Cells(u64, Vec<Cell>),
    /// So many bytes from this address on are no memory.
    Hole(u64, u64),
}

impl Map {
    /// The map of `regions` in at most `most` cells. A region that lies in several cells counts in each by its part there.
    fn of(regions: &[RegionHeat], most: usize, estimated: Option<Estimated>) -> Self {
        let mut spans: Vec<(u64, u64)> = regions
            .iter()
            .filter(|region| region.range.bytes > 0)
            .map(|region| (region.range.start.0, region.range.end().0.saturating_sub(1)))
            .collect();
        spans.sort_unstable();
        let count = |cell_bytes: u64| {
            let mut next = 0;
            spans.iter().fold(0u64, |count, &(first, last)| {
                let (from, to) = ((first / cell_bytes).max(next), last.max(first) / cell_bytes);
                next = next.max(to + 1);
                count.saturating_add((to + 1).saturating_sub(from))
            })
        };
        let least =
            estimated.map_or(0, |estimated| estimated.region_bytes.checked_next_power_of_two().unwrap_or(1 << 62));
        let mut cell_bytes = CELL_BYTES.max(least);
        while count(cell_bytes) > most as u64 && cell_bytes < 1 << 62 {
            cell_bytes *= 2;
        }
        let mut map = Self { cell_bytes, cells: BTreeMap::new(), pages: 0, written: 0 };
        for region in regions.iter().filter(|region| region.range.bytes > 0) {
            map.pages = map.pages.saturating_add(region.pages);
            map.written = map.written.saturating_add(region.unique_pages.min(region.pages));
            let (first, end) = (region.range.start.0, region.range.end().0.max(region.range.start.0 + 1));
            for number in first / cell_bytes..=(end - 1) / cell_bytes {
                let from = first.max(number * cell_bytes);
                let to = end.min((number * cell_bytes).saturating_add(cell_bytes));
                let part = (to - from) as f64 / (end - first) as f64;
                let cell = map.cells.entry(number).or_default();
                cell.pages += region.pages as f64 * part;
                cell.written += region.unique_pages.min(region.pages) as f64 * part;
            }
        }
        map
    }

    /// The map in rows of `columns` cells; each hole begins a row.
    fn rows(&self, columns: usize) -> Vec<Row> {
        let mut rows: Vec<Row> = Vec::new();
        let mut next = 0;
        for (&number, &cell) in &self.cells {
            if number != next {
                rows.push(Row::Hole(
                    next.saturating_mul(self.cell_bytes),
                    (number - next).saturating_mul(self.cell_bytes),
                ));
            }
            match rows.last_mut() {
                Some(Row::Cells(_, cells)) if cells.len() < columns => cells.push(cell),
                _ => rows.push(Row::Cells(number, vec![cell])),
            }
            next = number + 1;
        }
        rows
    }

    /// What the map is about, in a line.
    fn summary(&self, estimated: Option<Estimated>) -> String {
        let share = if self.pages > 0 { self.written as f64 / self.pages as f64 * 100.0 } else { 0.0 };
        if let Some(Estimated { low_pages, high_pages, sampled_pages, .. }) = estimated {
            return format!(
                "sampled ({sampled_pages} pages): about {} of {} pages written ({share:.1} %; 95 % interval {low_pages} to {high_pages}); a cell is {}",
                self.written,
                self.pages,
                whole(self.cell_bytes)
            );
        }
        format!("{} of {} pages written ({share:.1} %); a cell is {}", self.written, self.pages, whole(self.cell_bytes))
    }
}

/// The map as a drawing, with a legend.
pub fn heat_svg(title: &str, regions: &[RegionHeat], estimated: Option<Estimated>) -> String {
    let map = Map::of(regions, MOST_CELLS, estimated);
    let rows = map.rows(COLUMNS);
    let height = TOP + rows.iter().map(row_height).sum::<usize>() + 56;
    let title = clean_xml(title);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" viewBox=\"0 0 {ALL_WIDTH} {height}\" width=\"{ALL_WIDTH}\" \
         height=\"{height}\">\n<title>{title}</title>\n<desc>Guest memory by guest physical address, shaded by the part that \
         was written</desc>\n<style>{STYLE}</style>\n<rect class=\"bg\" width=\"{ALL_WIDTH}\" height=\"{height}\"/>\n\
         <text class=\"title\" x=\"16\" y=\"28\">{title}</text>\n<text class=\"small\" x=\"16\" y=\"48\">{}</text>\n",
        map.summary(estimated)
    );
    let mut y = TOP;
    for row in &rows {
        match row {
            Row::Cells(number, cells) => {
                put(&mut svg, format_args!("{}", address(LEFT - 8, y + 9, number * map.cell_bytes)));
                for (column, cell) in cells.iter().enumerate() {
                    let (x, class, side) = (LEFT + column * CELL, cell.class(), CELL - 1);
                    put(
                        &mut svg,
                        format_args!(
                            "<rect class=\"h{class}\" x=\"{x}\" y=\"{y}\" width=\"{side}\" height=\"{side}\"/>"
                        ),
                    );
                }
            }
            Row::Hole(from, bytes) => {
                put(
                    &mut svg,
                    format_args!(
                        "{}\n<rect class=\"hole\" x=\"{LEFT}\" y=\"{}\" width=\"{}\" height=\"18\"/>\n<text class=\"small\" x=\"{}\" y=\"{}\">no memory: {}</text>",
                        address(LEFT - 8, y + 16, *from),
                        y + 3,
                        COLUMNS * CELL - 1,
                        LEFT + 8,
                        y + 16,
                        whole(*bytes)
                    ),
                );
            }
        }
        y += row_height(row);
    }
    put(&mut svg, format_args!("<text class=\"small\" x=\"16\" y=\"{}\">part written</text>", y + 29));
    for (class, name) in CLASS_NAMES.iter().enumerate() {
        let x = LEFT + class * 90;
        put(
            &mut svg,
            format_args!(
                "<rect class=\"h{class} e\" x=\"{x}\" y=\"{}\" width=\"14\" height=\"14\"/>\n<text class=\"small\" x=\"{}\" y=\"{}\">{name}</text>",
                y + 18,
                x + 20,
                y + 29
            ),
        );
    }
    svg.push_str("</svg>\n");
    svg
}

/// The map as text of `width` characters, 40 to 400, and a legend, without a line end behind the last line.
pub fn heat_text(regions: &[RegionHeat], width: usize, glyphs: Glyphs, estimated: Option<Estimated>) -> String {
    let (blocks, hole) = match glyphs {
        Glyphs::Unicode => (BLOCKS, '╌'),
        Glyphs::Ascii => (ASCII_BLOCKS, '~'),
    };
    const MARGIN: usize = 15;
    // A multiple of eight, so that addresses are round.
    let columns = (width.clamp(40, 400) - MARGIN) / 8 * 8;
    let map = Map::of(regions, columns * MOST_ROWS, estimated);
    let mut lines = vec![map.summary(estimated)];
    for row in map.rows(columns) {
        lines.push(match row {
            Row::Cells(number, cells) => {
                let cells: String = cells.iter().map(|cell| blocks[cell.class()]).collect();
                format!("{:>#14x} {cells}", number * map.cell_bytes)
            }
            Row::Hole(from, bytes) => {
                format!("{from:>#14x} {0}{0} no memory: {1} {0}{0}", hole, whole(bytes))
            }
        });
    }
    let legend: Vec<String> = CLASS_NAMES.iter().zip(blocks).map(|(name, block)| format!("{block} {name}")).collect();
    lines.push(format!("written: {}", legend.join("  ")));
    lines.join("\n")
}

fn row_height(row: &Row) -> usize {
    match row {
        Row::Cells(..) => CELL,
        Row::Hole(..) => 25,
    }
}

fn address(x: usize, y: usize, address: u64) -> String {
    format!("<text class=\"at\" x=\"{x}\" y=\"{y}\" text-anchor=\"end\">{address:#x}</text>")
}

/// A size of whole units without digits behind the point.
fn whole(bytes: u64) -> String {
    display_bytes(bytes).replace(".00 ", " ")
}

fn put(svg: &mut String, what: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = writeln!(svg, "{what}");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::draw::tests::golden;
    use crate::model::{Gpa, MemoryRange};

    fn region(start: u64, bytes: u64, unique_pages: u64) -> RegionHeat {
        RegionHeat { range: MemoryRange { start: Gpa(start), bytes }, unique_pages, pages: bytes / 4096 }
    }

    /// 3 GiB below the hole and 1 GiB above 4 GiB, in regions of 2 MiB.
    fn memory() -> Vec<RegionHeat> {
        let written = |i: u64| match i % 97 {
            0 => 512,
            1..=3 => 200,
            4..=9 => 60,
            10..=19 => 20,
            20..=39 => 3,
            _ => 0,
        };
        let below = (0..1536).map(|i| region(i << 21, 2 << 20, written(i)));
        let above = (0..512).map(|i| region((4 << 30) + (i << 21), 2 << 20, written(i + 500)));
        below.chain(above).collect()
    }

    #[test]
    fn drawn_as_ever() {
        let small: Vec<RegionHeat> =
            memory().into_iter().filter(|region| region.range.start.0 % (4 << 30) < 160 << 20).collect();
        golden("heat.svg", &heat_svg("web1 <&> memory", &small, None));
        golden("heat.txt", &heat_text(&memory(), 80, Glyphs::Unicode, None));
        golden("heat-ascii.txt", &heat_text(&memory(), 50, Glyphs::Ascii, None));
    }

    #[test]
    fn cells_grow_until_they_fit() {
        let map = Map::of(&memory(), MOST_CELLS, None);
        assert_eq!((map.cell_bytes, map.cells.len()), (2 << 20, 2048));
        let tebibyte = [region(0, 3 << 30, 5), region(4 << 30, 1 << 40, 1 << 20)];
        let map = Map::of(&tebibyte, MOST_CELLS, None);
        assert_eq!((map.cell_bytes, map.cells.len()), (512 << 20, 6 + 2048));
        assert!(matches!(map.rows(COLUMNS)[1], Row::Hole(at, bytes) if at == 3 << 30 && bytes == 1 << 30));
        let written: f64 = map.cells.values().map(|cell| cell.written).sum();
        assert!((written - 5.0 - f64::from(1 << 20)).abs() < 1e-3);
    }

    #[test]
    fn an_estimate_is_said_to_be_one_and_has_no_finer_cells_than_regions() {
        let regions: Vec<RegionHeat> =
            (0..16).map(|i| region(i << 26, 64 << 20, if i == 3 { 1000 } else { 0 })).collect();
        let estimated = Estimated { region_bytes: 64 << 20, low_pages: 800, high_pages: 1200, sampled_pages: 4000 };
        let text = heat_text(&regions, 80, Glyphs::Ascii, Some(estimated));
        assert_eq!(
            text.lines().next().unwrap(),
            "sampled (4000 pages): about 1000 of 262144 pages written (0.4 %; 95 % interval 800 to 1200); a cell is 64 MiB"
        );
        assert!(text.contains("0x0 ...+............\n"), "{text}");
        let svg = heat_svg("x", &regions, Some(estimated));
        assert!(svg.contains("sampled (4000 pages)") && svg.matches("class=\"h0\"").count() == 15, "{svg}");
    }

    #[test]
    fn shares_fall_in_their_classes() {
        let class = |written: f64| Cell { pages: 100.0, written }.class();
        assert_eq!([0.0, 0.5, 1.0, 1.1, 20.0, 50.0, 50.1, 100.0].map(class), [0, 1, 1, 2, 3, 4, 5, 5]);
        assert_eq!(Cell::default().class(), 0);
    }

    proptest! {
        /// Regions that no VM has are drawn all the same, and the map stays small.
        #[test]
        fn any_regions_make_a_small_map(
            raw in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>(), 0..64u32), 0..40), width in 0..300usize,
        ) {
            let regions: Vec<RegionHeat> = raw.into_iter().map(|(start, bytes, unique_pages, pages, shift)| RegionHeat {
                range: MemoryRange { start: Gpa(start >> shift), bytes: bytes >> (63 - shift) }, unique_pages, pages,
            }).collect();
            let map = Map::of(&regions, MOST_CELLS, None);
            prop_assert!(map.cells.len() <= MOST_CELLS);
            let svg = heat_svg("x", &regions, None);
            prop_assert!(svg.len() < 1 << 20 && svg.ends_with("</svg>\n") && !svg.contains("NaN"));
            let text = heat_text(&regions, width, Glyphs::Ascii, None);
            let rows = text.lines().count() - 2;
            // Addresses that no guest has are longer than their place.
            prop_assert!(text.is_ascii() && text.lines().skip(1).take(rows).all(|line| line.len() <= width.max(56) + 4), "{text}");
        }
    }
}
