//! A migration's report as a drawing: its rounds, what followed the VM and how long that waited for it, what was done to writers, where the blackout went, and what of all that had been
//! expected.
//!
//! Nothing is drawn that the report does not say. It does not say when rounds began: they are laid end to end, and the drawing says so. A report
//! may be anybody's: figures may contradict one another, and words may be markup.

use std::fmt::{Arguments, Write as _};
use std::time::Duration;

use super::label::{clean_xml, sentence_xml};
use crate::model::units::{display_bytes, display_duration};
use crate::model::{BytesPerSecond, Ending, MigrationReport, PostCopyReport, RoundReport, VcpuStun};

/// The drawing's width, in pixels.
const ALL_WIDTH: f64 = 980.0;
const LEFT: f64 = 16.0;
/// Where the timeline is.
const TIME: (f64, f64) = (96.0, 300.0);
/// Where pages are.
const PAGES: (f64, f64) = (416.0, 220.0);
/// Where figures are.
const FIGURES: f64 = 650.0;
/// The height of a round's row, and of a vCPU's.
const ROW: f64 = 28.0;
/// Rounds that are drawn: of more the first and the last ones.
const MOST_ROUNDS: usize = 40;
/// vCPUs that are drawn.
const MOST_VCPUS: usize = 32;
/// Buckets of waits that are drawn: from a microsecond on they are 64 at most.
const MOST_BUCKETS: usize = 64;
/// Phases that are drawn; a report has eleven.
const MOST_PHASES: usize = 32;
/// Colours of phases, by number.
const PHASE_COLOURS: usize = 11;

const STYLE: &str = "\
text{font:12px system-ui,sans-serif;fill:#24292f}.title{font-size:16px;font-weight:600}.head{font-size:13px;font-weight:600}.bg{fill:#fff}\
.small{font-size:11px;fill:#57606a}.axis{stroke:#57606a;fill:none}.limit{stroke:#24292f;stroke-width:1.5;fill:none}\
.live{fill:#0072b2}.stood{fill:#c14f00}.data{fill:#0072b2}.zero{fill:#9ec9e2}.dirtied{fill:#c14f00}.follow{fill:#00795a}.asked{fill:#9b4f7f}.told{fill:#8b949e}.free{fill:#8b949e}.held{fill:#0072b2}\
.edge{stroke:#fff}.p0{fill:#0072b2}.p1{fill:#d98c00}.p2{fill:#c14f00}.p3{fill:#00795a}.p4{fill:#9b4f7f}.p5{fill:#3b6ea5}.p6{fill:#8a6100}\
.p7{fill:#4b5560}.p8{fill:#2f8f9d}.p9{fill:#6f42a5}.p10{fill:#6b7280}.on{fill:#fff;font-size:11px}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.bg{fill:#0d1117}.small{fill:#9aa4af}.axis{stroke:#9aa4af}.limit{stroke:#e6edf3}\
.live{fill:#56b4e9}.stood{fill:#ff9248}.data{fill:#56b4e9}.zero{fill:#1f4f6d}.dirtied{fill:#ff9248}.follow{fill:#2fb58a}.asked{fill:#c98bb5}.told{fill:#6e7681}.free{fill:#6e7681}.held{fill:#56b4e9}.edge{stroke:#0d1117}\
.on{fill:#fff}}";

/// The report as a drawing.
pub fn migration_svg(report: &MigrationReport) -> String {
    let mut body = String::new();
    let mut y = 76.0;
    draw_rounds(&mut body, &mut y, report);
    draw_waits(&mut body, &mut y, report);
    draw_writers(&mut body, &mut y, report.stun.as_ref().map_or(&[], |stun| &stun.vcpus));
    draw_blackout(&mut body, &mut y, report);
    draw_expected(&mut body, &mut y, report);
    let height = y + 8.0;
    let title = clean_xml(&title(report));
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" viewBox=\"0 0 {ALL_WIDTH} {height}\" width=\"{ALL_WIDTH}\" height=\"{height}\">\n\
         <title>{title}</title>\n<desc>Rounds, waits, writers and blackout of a migration, and what was expected of it</desc>\n<style>{STYLE}</style>\n\
         <rect class=\"bg\" width=\"{ALL_WIDTH}\" height=\"{height}\"/>\n"
    );
    put(&mut svg, format_args!("{}", text("title", LEFT, 28.0, "start", &title)));
    put(&mut svg, format_args!("{}", text("small", LEFT, 48.0, "start", &sentence_xml(&summary(report)))));
    svg + &body + "</svg>\n"
}

/// Which VM, and how it ended.
pub(super) fn title(report: &MigrationReport) -> String {
    let ending = match report.ending {
        Ending::Moved => "moved",
        Ending::Refused => "refused",
        Ending::Failed => "failed",
        Ending::Cancelled => "cancelled",
        Ending::Lost => "lost",
        Ending::InDoubt => "in doubt",
    };
    format!("{}: {ending}, {}", report.vm_name, report.strategy)
}

/// The most important figures, in a line.
pub(super) fn summary(report: &MigrationReport) -> String {
    format!(
        "{} for {} of RAM, {} on the wire by {} streams; blackout {} (target {})",
        time(report.total_ns),
        display_bytes(report.memory_bytes),
        display_bytes(report.wire_bytes),
        report.streams,
        time(report.blackout_ns),
        time(report.downtime_target_ns)
    )
}

/// What a round carried per second; absent of one that took no time.
pub(super) fn rate(round: &RoundReport) -> Option<BytesPerSecond> {
    over(round.wire_bytes, round.duration_ns)
}

fn over(bytes: u64, duration_ns: u64) -> Option<BytesPerSecond> {
    (duration_ns > 0).then(|| BytesPerSecond::over(bytes, Duration::from_nanos(duration_ns)))
}

/// A member of a report that is a word.
pub(super) fn word(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

pub(super) fn time(ns: u64) -> String {
    display_duration(Duration::from_nanos(ns))
}

/// A number of pages per second, in no more digits than can be read.
pub(super) fn pages(rate: f64) -> String {
    if rate.abs() < 1e15 { format!("{rate:.0}") } else { format!("{rate:.3e}") }
}

/// A round, or what followed the VM, as a row.
struct Sent {
    label: String,
    class: &'static str,
    pages: u64,
    zero: u64,
    /// Pages of the bar below, and its class.
    below: (u64, &'static str),
    duration_ns: u64,
    figures: [String; 2],
}

impl Sent {
    fn of_round(round: &RoundReport) -> Self {
        let (class, kind) = if round.paused { ("stood", "paused") } else { ("live", "live") };
        let zero = round.zero_pages.min(round.pages);
        let due =
            format!("{} due: {} sent, {zero} zero; {} dirtied", round.pages, round.pages - zero, round.dirtied_pages);
        Self {
            label: format!("{} {kind}", round.round),
            class,
            pages: round.pages,
            zero,
            below: (round.dirtied_pages, "dirtied"),
            duration_ns: round.duration_ns,
            figures: [carried(round.wire_bytes, round.duration_ns), due],
        }
    }

    fn of_owed(owed: &PostCopyReport) -> Self {
        let zero = owed.zero_pages.min(owed.sent_pages);
        let sent = owed.sent_pages - zero;
        Self {
            label: "following".to_owned(),
            class: "follow",
            pages: owed.sent_pages,
            zero,
            below: (owed.asked_pages, "asked"),
            duration_ns: owed.duration_ns,
            figures: [
                carried(owed.wire_bytes, owed.duration_ns),
                format!("{} owed: {sent} sent, {zero} zero; {} asked for", owed.owed_pages, owed.asked_pages),
            ],
        }
    }
}

/// So many bytes in so long.
fn carried(bytes: u64, duration_ns: u64) -> String {
    let rate = over(bytes, duration_ns).map_or_else(String::new, |rate| format!(" at {rate}"));
    format!("{} in {}{rate}", display_bytes(bytes), time(duration_ns))
}

fn draw_rounds(svg: &mut String, y: &mut f64, report: &MigrationReport) {
    let rounds = &report.rounds;
    put(svg, format_args!("{}", text("head", LEFT, *y, "start", "Rounds")));
    let rows: Vec<Sent> = rounds.iter().map(Sent::of_round).chain(report.post_copy.iter().map(Sent::of_owed)).collect();
    if rows.is_empty() {
        put(svg, format_args!("{}", text("small", TIME.0, *y, "start", "none: no memory was sent")));
        *y += 34.0;
        return;
    }
    let total: f64 = rows.iter().map(|row| row.duration_ns as f64).sum();
    let most = rows.iter().map(|row| row.pages.max(row.below.0)).max().unwrap_or(0);
    let heading = |what: String, x: f64| text("small", x, *y, "start", &what);
    put(svg, format_args!("{}", heading(format!("time, end to end: 0 to {}", time(total.min(1.8e19) as u64)), TIME.0)));
    put(svg, format_args!("{}", heading(format!("pages: 0 to {most}"), PAGES.0)));
    *y += 10.0;
    let top = *y;
    let (head, tail) = if rounds.len() > MOST_ROUNDS { (MOST_ROUNDS / 2, MOST_ROUNDS / 2) } else { (rounds.len(), 0) };
    let mut before = 0.0;
    for (index, row) in rows.iter().enumerate() {
        if index < head || index >= rounds.len() - tail {
            put(svg, format_args!("{}", text("", LEFT, *y + 15.0, "start", &row.label)));
            let (from, width) = (part(before, total), part(row.duration_ns as f64, total));
            // However short: it was.
            bar(svg, row.class, TIME.0 + from * TIME.1, *y + 5.0, (width * TIME.1).max(1.0), 14.0);
            let long = |pages: u64| part(pages as f64, most as f64) * PAGES.1;
            bar(svg, "data", PAGES.0, *y + 3.0, long(row.pages - row.zero), 11.0);
            bar(svg, "zero", PAGES.0 + long(row.pages - row.zero), *y + 3.0, long(row.zero), 11.0);
            bar(svg, row.below.1, PAGES.0, *y + 15.0, long(row.below.0), 6.0);
            for (figures, below) in row.figures.iter().zip([11.0, 23.0]) {
                put(svg, format_args!("{}", text("small", FIGURES, *y + below, "start", figures)));
            }
            *y += ROW;
        } else if index == head {
            let left_out = format!("{} rounds between are not drawn", rounds.len() - head - tail);
            put(svg, format_args!("{}", text("small", LEFT, *y + 15.0, "start", &left_out)));
            *y += ROW;
        }
        before += row.duration_ns as f64;
    }
    put(
        svg,
        format_args!("<path class=\"axis\" d=\"M{0} {top:.1}V{1:.1}M{2} {top:.1}V{1:.1}\"/>", TIME.0, *y, PAGES.0),
    );
    *y += 16.0;
    let follows = report.post_copy.is_some();
    let classes = [("live", "the VM runs"), ("stood", "it stands"), ("follow", "it runs there")];
    legend(svg, TIME.0, *y, classes.into_iter().filter(|(class, _)| follows || *class != "follow"));
    let mut below = vec![("data", "sent with content"), ("zero", "zero")];
    below.extend((!rounds.is_empty()).then_some(("dirtied", "dirtied meanwhile")));
    below.extend(follows.then_some(("asked", "asked for")));
    legend(svg, PAGES.0, *y, below);
    *y += 34.0;
}

/// What colours mean.
fn legend<'w>(svg: &mut String, from: f64, y: f64, classes: impl IntoIterator<Item = (&'w str, &'w str)>) -> f64 {
    let mut x = from;
    for (class, what) in classes {
        bar(svg, class, x, y - 9.0, 10.0, 10.0);
        put(svg, format_args!("{}", text("small", x + 14.0, y, "start", what)));
        x += 34.0 + 6.2 * what.len() as f64;
    }
    x
}

/// How long the guest waited for pages that it touched and that had not come.
fn draw_waits(svg: &mut String, y: &mut f64, report: &MigrationReport) {
    let Some(waits) = report.post_copy.as_ref().map(|owed| &owed.waits) else { return };
    put(svg, format_args!("{}", text("head", LEFT, *y, "start", "Waits for pages")));
    if waits.count == 0 {
        put(svg, format_args!("{}", text("small", TIME.0 + 40.0, *y, "start", "none")));
        *y += 34.0;
        return;
    }
    let told = format!(
        "{}: half of them up to {}, 99 of 100 up to {}, the longest {}; {} in all",
        waits.count,
        time(waits.p50_ns),
        time(waits.p99_ns),
        time(waits.max_ns),
        time(waits.sum_ns)
    );
    put(svg, format_args!("{}", text("small", TIME.0 + 40.0, *y, "start", &told)));
    *y += 22.0;
    let buckets = &waits.histogram[..waits.histogram.len().min(MOST_BUCKETS)];
    let most = buckets.iter().map(|bucket| bucket.count).max().unwrap_or(0);
    const HEIGHT: f64 = 60.0;
    let width = ((ALL_WIDTH - 2.0 * LEFT) / buckets.len().max(1) as f64).min(64.0);
    for (index, bucket) in buckets.iter().enumerate() {
        let (x, high) = (LEFT + index as f64 * width, part(bucket.count as f64, most as f64) * HEIGHT);
        // However few: they were.
        let high = if bucket.count > 0 { high.max(1.0) } else { 0.0 };
        if high > 0.0 {
            bar(svg, "asked", x, *y + HEIGHT - high, width - 2.0, high);
        }
        if width >= 44.0 {
            let (middle, count) = (x + width / 2.0 - 1.0, bucket.count.to_string());
            if bucket.count > 0 {
                put(svg, format_args!("{}", text("small", middle, *y + HEIGHT - high - 3.0, "middle", &count)));
            }
            put(svg, format_args!("{}", text("small", middle, *y + HEIGHT + 14.0, "middle", &time(bucket.up_to_ns))));
        }
    }
    let base = *y + HEIGHT;
    put(svg, format_args!("<path class=\"axis\" d=\"M{LEFT} {base:.1}h{:.1}\"/>", width * buckets.len() as f64));
    if width < 44.0
        && let (Some(first), Some(last)) = (buckets.first(), buckets.last())
    {
        let ends = format!("up to {} each twice as long as before, to {}", time(first.up_to_ns), time(last.up_to_ns));
        put(svg, format_args!("{}", text("small", LEFT, base + 14.0, "start", &ends)));
    }
    *y += HEIGHT + 44.0;
}

/// What had been foretold, beside what it took: each pair by the longer of both.
fn draw_expected(svg: &mut String, y: &mut f64, report: &MigrationReport) {
    let Some(told) = &report.prediction else { return };
    *y += 24.0;
    put(svg, format_args!("{}", text("head", LEFT, *y, "start", "Expected and taken")));
    let from = format!("of {}, reckoned from {}", clean_xml(&told.plan), clean_xml(&word(&told.from)));
    put(svg, format_args!("{}", text("small", TIME.0 + 80.0, *y, "start", &from)));
    *y += 10.0;
    const PLOT: (f64, f64) = (TIME.0, 540.0);
    let rows = [
        ("total", told.total_ns, report.total_ns, time as fn(u64) -> String, told.total_error_percent),
        ("blackout", told.blackout_ns, report.blackout_ns, time, told.blackout_error_percent),
        ("on the wire", Some(told.wire_bytes), report.wire_bytes, display_bytes, told.wire_error_percent),
    ];
    for (what, expected, taken, words, off) in rows {
        let most = expected.unwrap_or(0).max(taken) as f64;
        put(svg, format_args!("{}", text("", LEFT, *y + 15.0, "start", what)));
        bar(svg, "told", PLOT.0, *y + 2.0, part(expected.unwrap_or(0) as f64, most) * PLOT.1, 9.0);
        bar(svg, "held", PLOT.0, *y + 13.0, part(taken as f64, most) * PLOT.1, 9.0);
        let expected =
            expected.map_or_else(|| "no end expected".to_owned(), |value| format!("{} expected", words(value)));
        let off = off.map_or_else(String::new, |off| format!(", off by {}", percent(off)));
        let first = format!("{expected}, {} taken", words(taken));
        put(svg, format_args!("{}", text("small", FIGURES, *y + 16.0, "start", &format!("{first}{off}"))));
        *y += ROW;
    }
    *y += 16.0;
    legend(svg, PLOT.0, *y, [("told", "expected"), ("held", "taken")]);
    *y += 12.0;
}

/// A signed part in percent, in no more digits than can be read.
fn percent(value: f64) -> String {
    if value.abs() < 1e6 { format!("{value:+.1} %") } else { format!("{value:+.1e} %") }
}

fn draw_writers(svg: &mut String, y: &mut f64, vcpus: &[VcpuStun]) {
    if vcpus.is_empty() {
        return;
    }
    let most = vcpus
        .iter()
        .flat_map(|vcpu| [vcpu.free_pages_per_second, vcpu.limited_pages_per_second, vcpu.mean_limit_pages_per_second])
        .fold(0.0, f64::max);
    put(svg, format_args!("{}", text("head", LEFT, *y, "start", "Writers that were slowed")));
    let heading = format!("pages per second: 0 to {}", pages(most));
    put(svg, format_args!("{}", text("small", TIME.0 + 120.0, *y, "start", &heading)));
    *y += 10.0;
    const PLOT: (f64, f64) = (TIME.0, 540.0);
    for vcpu in vcpus.iter().take(MOST_VCPUS) {
        let long = |rate: f64| part(rate, most) * PLOT.1;
        put(svg, format_args!("{}", text("", LEFT, *y + 15.0, "start", &format!("vCPU {}", vcpu.vcpu))));
        bar(svg, "free", PLOT.0, *y + 2.0, long(vcpu.free_pages_per_second), 9.0);
        bar(svg, "held", PLOT.0, *y + 13.0, long(vcpu.limited_pages_per_second), 9.0);
        let limit = PLOT.0 + long(vcpu.mean_limit_pages_per_second);
        put(svg, format_args!("<path class=\"limit\" d=\"M{limit:.1} {:.1}v13\"/>", *y + 11.0));
        let first = format!(
            "{} before, {} of {} while limited",
            pages(vcpu.free_pages_per_second),
            pages(vcpu.limited_pages_per_second),
            pages(vcpu.mean_limit_pages_per_second)
        );
        let second = format!("held for {} of {}", time(vcpu.held_ns), time(vcpu.limited_ns));
        put(svg, format_args!("{}", text("small", FIGURES, *y + 11.0, "start", &first)));
        put(svg, format_args!("{}", text("small", FIGURES, *y + 23.0, "start", &second)));
        *y += ROW;
    }
    if vcpus.len() > MOST_VCPUS {
        let left_out = format!("and {} vCPUs that are not drawn", vcpus.len() - MOST_VCPUS);
        put(svg, format_args!("{}", text("small", LEFT, *y + 15.0, "start", &left_out)));
        *y += ROW;
    }
    *y += 16.0;
    let x = legend(svg, PLOT.0, *y, [("free", "before it was limited"), ("held", "while it was limited")]);
    put(svg, format_args!("<path class=\"limit\" d=\"M{x:.1} {:.1}v12\"/>", *y - 10.0));
    put(svg, format_args!("{}", text("small", x + 8.0, *y, "start", "the mean of its limits")));
    *y += 34.0;
}

fn draw_blackout(svg: &mut String, y: &mut f64, report: &MigrationReport) {
    put(svg, format_args!("{}", text("head", LEFT, *y, "start", "Blackout")));
    let phases = &report.blackout.phases[..report.blackout.phases.len().min(MOST_PHASES)];
    let sum: f64 = phases.iter().map(|entry| entry.duration_ns as f64).sum();
    let whole = sum.max(report.blackout_ns as f64);
    if whole <= 0.0 {
        put(svg, format_args!("{}", text("small", TIME.0, *y, "start", "none: the VM did not stand")));
        *y += 20.0;
        return;
    }
    let told = format!("0 to {}; target {}", time(report.blackout_ns), time(report.downtime_target_ns));
    put(svg, format_args!("{}", text("small", TIME.0, *y, "start", &told)));
    *y += 10.0;
    let width = ALL_WIDTH - 2.0 * LEFT;
    let mut x = LEFT;
    for (index, entry) in phases.iter().enumerate() {
        let long = part(entry.duration_ns as f64, whole) * width;
        bar(svg, &format!("edge p{}", index % PHASE_COLOURS), x, *y, long, 30.0);
        if long >= 16.0 {
            put(svg, format_args!("{}", text("on", x + long / 2.0, *y + 19.0, "middle", &(index + 1).to_string())));
        }
        x += long;
    }
    let target = report.downtime_target_ns as f64;
    if target > 0.0 && target <= whole {
        let x = LEFT + part(target, whole) * width;
        put(svg, format_args!("<path class=\"limit\" d=\"M{x:.1} {:.1}v40\"/>", *y - 5.0));
    }
    *y += 50.0;
    const COLUMNS: usize = 3;
    let rows = phases.len().div_ceil(COLUMNS);
    for (index, entry) in phases.iter().enumerate() {
        let (column, row) = (index / rows.max(1), index % rows.max(1));
        let (x, at) = (LEFT + column as f64 * width / COLUMNS as f64, *y + row as f64 * 20.0);
        bar(svg, &format!("p{}", index % PHASE_COLOURS), x, at - 10.0, 12.0, 12.0);
        let name = clean_xml(&word(&entry.phase));
        let words = format!("{}  {name}  {}", index + 1, time(entry.duration_ns));
        put(svg, format_args!("{}", text("", x + 18.0, at, "start", &words)));
    }
    *y += rows as f64 * 20.0;
    if report.blackout.phases.len() > MOST_PHASES {
        let left_out = format!("and {} phases that are not drawn", report.blackout.phases.len() - MOST_PHASES);
        put(svg, format_args!("{}", text("small", LEFT, *y, "start", &left_out)));
        *y += 20.0;
    }
}

/// A part of a whole, 0 to 1.
fn part(value: f64, whole: f64) -> f64 {
    if whole > 0.0 { (value / whole).clamp(0.0, 1.0) } else { 0.0 }
}

fn bar(svg: &mut String, class: &str, x: f64, y: f64, width: f64, height: f64) {
    if width > 0.0 {
        put(
            svg,
            format_args!(
                "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"/>"
            ),
        );
    }
}

/// A line of text that is fit for XML already.
fn text(class: &str, x: f64, y: f64, anchor: &str, words: &str) -> String {
    let class = if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") };
    format!("<text{class} x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{words}</text>")
}

fn put(svg: &mut String, what: Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = writeln!(svg, "{what}");
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::draw::migration_html;
    use crate::draw::tests::golden;
    use crate::model::blackout::{BlackoutPhase, LedgerEntry};
    use crate::model::{StunReport, WaitBucket, WaitReport};

    pub(in crate::draw) fn sample() -> MigrationReport {
        serde_json::from_slice(include_bytes!("golden/migration.json")).unwrap()
    }

    /// One whose memory followed it, as it was measured.
    fn followed() -> MigrationReport {
        serde_json::from_slice(include_bytes!("golden/post-copy.json")).unwrap()
    }

    #[test]
    fn drawn_as_ever() {
        golden("migration.svg", &migration_svg(&sample()));
        golden("migration.html", &migration_html(&sample()));
        golden("post-copy.svg", &migration_svg(&followed()));
        golden("post-copy.html", &migration_html(&followed()));
    }

    #[test]
    fn bars_are_as_long_as_figures_are_large() {
        let mut report = sample();
        let round = |pages, duration_ns| RoundReport { pages, duration_ns, ..RoundReport::default() };
        report.rounds = vec![round(1000, 3_000_000), round(500, 1_000_000)];
        let svg = migration_svg(&report);
        // Three quarters and one quarter of the time, behind one another; all and half of the pages.
        assert!(svg.contains("class=\"live\" x=\"96.0\" y=\"91.0\" width=\"225.0\""), "{svg}");
        assert!(svg.contains("class=\"live\" x=\"321.0\" y=\"119.0\" width=\"75.0\""), "{svg}");
        assert!(svg.contains("class=\"data\" x=\"416.0\" y=\"89.0\" width=\"220.0\""), "{svg}");
        assert!(svg.contains("class=\"data\" x=\"416.0\" y=\"117.0\" width=\"110.0\""), "{svg}");
        // 1000 and 3000 of 4000 µs of blackout.
        let phase = |phase, duration_ns| LedgerEntry { phase, duration_ns };
        report.blackout.phases = vec![phase(BlackoutPhase::Pause, 1_000_000), phase(BlackoutPhase::Wire, 3_000_000)];
        report.blackout_ns = 4_000_000;
        let svg = migration_svg(&report);
        assert!(
            svg.contains("class=\"edge p0\" x=\"16.0\"") && svg.contains("width=\"237.0\" height=\"30.0\""),
            "{svg}"
        );
        assert!(
            svg.contains("class=\"edge p1\" x=\"253.0\"") && svg.contains("width=\"711.0\" height=\"30.0\""),
            "{svg}"
        );
    }

    #[test]
    fn what_followed_stands_behind_the_rounds_and_waits_are_as_high_as_they_are_many() {
        let mut report = followed();
        report.rounds = vec![RoundReport { pages: 1000, duration_ns: 3_000_000, ..RoundReport::default() }];
        let owed = report.post_copy.as_mut().unwrap();
        (owed.sent_pages, owed.zero_pages, owed.asked_pages, owed.duration_ns) = (500, 100, 250, 1_000_000);
        owed.waits.histogram =
            [(1000, 30), (2000, 0), (4000, 60)].map(|(up_to_ns, count)| WaitBucket { up_to_ns, count }).to_vec();
        let svg = migration_svg(&report);
        assert!(svg.contains("class=\"follow\" x=\"321.0\" y=\"119.0\" width=\"75.0\""), "{svg}");
        assert!(svg.contains("class=\"zero\" x=\"504.0\" y=\"117.0\" width=\"22.0\""), "{svg}");
        assert!(svg.contains("class=\"asked\" x=\"416.0\" y=\"129.0\" width=\"55.0\" height=\"6.0\""), "{svg}");
        let column = |x: &str, high: &str| format!("class=\"asked\" x=\"{x}\"") + "|" + &format!("height=\"{high}\"");
        for column in [column("16.0", "30.0"), column("144.0", "60.0")] {
            let (place, high) = column.split_once('|').unwrap();
            assert!(svg.lines().any(|line| line.contains(place) && line.contains(high)), "{column}: {svg}");
        }
        // Alone it is a row as well, and no waits are said to be none.
        report.rounds.clear();
        report.post_copy.as_mut().unwrap().waits = WaitReport::default();
        let svg = migration_svg(&report);
        assert!(svg.contains("following") && !svg.contains("no memory was sent") && svg.contains(">none<"), "{svg}");
    }

    #[test]
    fn expected_and_taken_are_as_long_as_they_were() {
        let mut report = followed();
        (report.total_ns, report.blackout_ns) = (4_000_000_000, 2_000_000);
        let told = report.prediction.as_mut().unwrap();
        (told.total_ns, told.blackout_ns) = (Some(1_000_000_000), None);
        (told.total_error_percent, told.blackout_error_percent) = (Some(-75.0), None);
        let svg = migration_svg(&report);
        assert!(svg.contains("1.00 s expected, 4.00 s taken, off by -75.0 %"), "{svg}");
        assert!(svg.contains(">no end expected, 2.00 ms taken<"), "{svg}");
        let told = svg.lines().find(|line| line.contains("class=\"told\"")).unwrap();
        assert!(told.contains("width=\"135.0\" height=\"9.0\""), "{told}");
        report.prediction = None;
        assert!(!migration_svg(&report).contains("Expected"));
    }

    #[test]
    fn words_are_no_markup() {
        let mut report = sample();
        report.strategy = "</title><script>alert(1)</script>".to_owned();
        report.reason = "<img src=x onerror=\"alert(1)\">".to_owned();
        report.prediction.as_mut().unwrap().plan = "<script>".to_owned();
        if let Some(stun) = &mut report.stun {
            stun.gave_up = "'><script>".to_owned();
        }
        for text in [migration_svg(&report), migration_html(&report)] {
            assert!(!text.contains("<script") && !text.contains("<img") && !text.contains("'>"), "{text}");
            assert!(text.contains("&lt;script&gt;"));
        }
    }

    #[test]
    fn nothing_and_too_much_are_drawn_too() {
        let nothing = MigrationReport {
            rounds: Vec::new(),
            blackout: crate::model::BlackoutLedger::default(),
            blackout_ns: 0,
            stun: None,
            prediction: None,
            ..sample()
        };
        let svg = migration_svg(&nothing);
        assert!(svg.contains("no memory was sent") && svg.contains("did not stand"), "{svg}");
        let mut much = sample();
        much.rounds =
            vec![
                RoundReport { pages: u64::MAX, zero_pages: u64::MAX, duration_ns: u64::MAX, ..much.rounds[0].clone() };
                1000
            ];
        much.stun = Some(StunReport {
            vcpus: vec![VcpuStun { free_pages_per_second: 1e308, ..VcpuStun::default() }; 99],
            ..StunReport::default()
        });
        let svg = migration_svg(&much);
        assert!(
            svg.contains("960 rounds between") && svg.contains("and 67 vCPUs") && svg.len() < 100_000,
            "{}",
            svg.len()
        );
    }

    proptest! {
        /// Any figures: numbers only, and within the page.
        #[test]
        fn any_report_stays_on_the_page(
            rounds in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>(), any::<bool>()), 0..60),
            phases in prop::collection::vec(any::<u64>(), 0..40), blackout_ns in any::<u64>(), downtime in any::<u64>(),
            rates in prop::collection::vec((-1e300..1e300f64, -1e300..1e300f64), 0..40), words in ".*",
            waits in prop::collection::vec((any::<u64>(), any::<u64>()), 0..100), owed in any::<[u64; 6]>(),
            told in any::<(Option<u64>, Option<u64>, u64)>(), off in prop::option::of(-1e300..1e300f64),
        ) {
            let mut report = sample();
            report.strategy = words.clone();
            report.reason = words;
            (report.blackout_ns, report.downtime_target_ns) = (blackout_ns, downtime);
            report.rounds = rounds.into_iter().map(|(pages, zero_pages, duration_ns, dirtied_pages, paused)| {
                RoundReport { round: 1, paused, pages, zero_pages, wire_bytes: pages, duration_ns, dirtied_pages, limit_bytes_per_second: None }
            }).collect();
            report.blackout.phases =
                phases.into_iter().map(|duration_ns| LedgerEntry { phase: BlackoutPhase::Wire, duration_ns }).collect();
            let vcpus = rates.into_iter().map(|(free, limited)| VcpuStun {
                free_pages_per_second: free, limited_pages_per_second: limited, ..VcpuStun::default()
            });
            report.stun = Some(StunReport { vcpus: vcpus.collect(), ..StunReport::default() });
            let [owed_pages, sent_pages, zero_pages, asked_pages, wire_bytes, duration_ns] = owed;
            let buckets = waits.into_iter().map(|(up_to_ns, count)| WaitBucket { up_to_ns, count });
            let waits = WaitReport { count: owed_pages, p50_ns: sent_pages, histogram: buckets.collect(), ..WaitReport::default() };
            report.post_copy = Some(PostCopyReport {
                owed_pages, sent_pages, zero_pages, asked_pages, wire_bytes, duration_ns, waits, ..PostCopyReport::default()
            });
            if let Some(foretold) = &mut report.prediction {
                (foretold.total_ns, foretold.blackout_ns, foretold.wire_bytes) = told;
                foretold.total_error_percent = off;
            }
            let svg = migration_svg(&report);
            prop_assert!(svg.matches("<svg").count() == 1);
            for rect in svg.split("<rect class=").skip(2) {
                let number = |name: &str| rect.split(&format!("{name}=\"")).nth(1).unwrap().split('"').next().unwrap().parse::<f64>().unwrap();
                prop_assert!(number(" x") + number(" width") <= ALL_WIDTH + 1.0, "{}", rect);
            }
            prop_assert!(migration_html(&report).ends_with("</html>\n"));
        }
    }
}
