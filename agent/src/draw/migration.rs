//! A migration's report as a drawing: its rounds, what it did to writers, and where the blackout went.
//!
//! Nothing is drawn that the report does not say. It does not say when rounds began: they are laid end to end, and the drawing says so. A report
//! may be anybody's: figures may contradict one another, and words may be markup.

use std::fmt::{Arguments, Write as _};
use std::time::Duration;

use super::label::{clean_xml, sentence_xml};
use crate::model::units::{display_bytes, display_duration};
use crate::model::{BytesPerSecond, Ending, MigrationReport, RoundReport, VcpuStun};

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
/// Phases that are drawn; a report has eleven.
const MOST_PHASES: usize = 32;
/// Colours of phases, by number.
const PHASE_COLOURS: usize = 11;

const STYLE: &str = "\
text{font:12px system-ui,sans-serif;fill:#24292f}.title{font-size:16px;font-weight:600}.head{font-size:13px;font-weight:600}.bg{fill:#fff}\
.small{font-size:11px;fill:#57606a}.axis{stroke:#57606a;fill:none}.limit{stroke:#24292f;stroke-width:1.5;fill:none}\
.live{fill:#0072b2}.stood{fill:#c14f00}.data{fill:#0072b2}.zero{fill:#9ec9e2}.dirtied{fill:#c14f00}.free{fill:#8b949e}.held{fill:#0072b2}\
.edge{stroke:#fff}.p0{fill:#0072b2}.p1{fill:#d98c00}.p2{fill:#c14f00}.p3{fill:#00795a}.p4{fill:#9b4f7f}.p5{fill:#3b6ea5}.p6{fill:#8a6100}\
.p7{fill:#4b5560}.p8{fill:#2f8f9d}.p9{fill:#6f42a5}.p10{fill:#6b7280}.on{fill:#fff;font-size:11px}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.bg{fill:#0d1117}.small{fill:#9aa4af}.axis{stroke:#9aa4af}.limit{stroke:#e6edf3}\
.live{fill:#56b4e9}.stood{fill:#ff9248}.data{fill:#56b4e9}.zero{fill:#1f4f6d}.dirtied{fill:#ff9248}.free{fill:#6e7681}.held{fill:#56b4e9}.edge{stroke:#0d1117}\
.on{fill:#fff}}";

/// The report as a drawing.
pub fn migration_svg(report: &MigrationReport) -> String {
    let mut body = String::new();
    let mut y = 76.0;
    draw_rounds(&mut body, &mut y, &report.rounds);
    draw_writers(&mut body, &mut y, report.stun.as_ref().map_or(&[], |stun| &stun.vcpus));
    draw_blackout(&mut body, &mut y, report);
    let height = y + 8.0;
    let title = clean_xml(&title(report));
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" viewBox=\"0 0 {ALL_WIDTH} {height}\" width=\"{ALL_WIDTH}\" height=\"{height}\">\n\
         <title>{title}</title>\n<desc>Rounds, writers and blackout of a migration</desc>\n<style>{STYLE}</style>\n\
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
    let rate = BytesPerSecond::over(round.wire_bytes, Duration::from_nanos(round.duration_ns));
    (round.duration_ns > 0).then_some(rate)
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

fn draw_rounds(svg: &mut String, y: &mut f64, rounds: &[RoundReport]) {
    put(svg, format_args!("{}", text("head", LEFT, *y, "start", "Rounds")));
    if rounds.is_empty() {
        put(svg, format_args!("{}", text("small", TIME.0, *y, "start", "none: no memory was sent")));
        *y += 34.0;
        return;
    }
    let total: f64 = rounds.iter().map(|round| round.duration_ns as f64).sum();
    let most = rounds.iter().map(|round| round.pages.max(round.dirtied_pages)).max().unwrap_or(0);
    let heading = |what: String, x: f64| text("small", x, *y, "start", &what);
    put(svg, format_args!("{}", heading(format!("time, end to end: 0 to {}", time(total.min(1.8e19) as u64)), TIME.0)));
    put(svg, format_args!("{}", heading(format!("pages: 0 to {most}"), PAGES.0)));
    *y += 10.0;
    let top = *y;
    let (head, tail) = if rounds.len() > MOST_ROUNDS { (MOST_ROUNDS / 2, MOST_ROUNDS / 2) } else { (rounds.len(), 0) };
    let mut before = 0.0;
    for (index, round) in rounds.iter().enumerate() {
        if index < head || index >= rounds.len() - tail {
            let class = if round.paused { "stood" } else { "live" };
            let kind = if round.paused { "paused" } else { "live" };
            put(svg, format_args!("{}", text("", LEFT, *y + 15.0, "start", &format!("{} {kind}", round.round))));
            let (from, width) = (part(before, total), part(round.duration_ns as f64, total));
            // However short: it was.
            bar(svg, class, TIME.0 + from * TIME.1, *y + 5.0, (width * TIME.1).max(1.0), 14.0);
            let zero = round.zero_pages.min(round.pages);
            let long = |pages: u64| part(pages as f64, most as f64) * PAGES.1;
            bar(svg, "data", PAGES.0, *y + 3.0, long(round.pages - zero), 11.0);
            bar(svg, "zero", PAGES.0 + long(round.pages - zero), *y + 3.0, long(zero), 11.0);
            bar(svg, "dirtied", PAGES.0, *y + 15.0, long(round.dirtied_pages), 6.0);
            let carried = rate(round).map_or_else(String::new, |rate| format!(" at {rate}"));
            let first = format!("{} in {}{carried}", display_bytes(round.wire_bytes), time(round.duration_ns));
            let second = format!(
                "{} due: {} sent, {zero} zero; {} dirtied",
                round.pages,
                round.pages - zero,
                round.dirtied_pages
            );
            put(svg, format_args!("{}", text("small", FIGURES, *y + 11.0, "start", &first)));
            put(svg, format_args!("{}", text("small", FIGURES, *y + 23.0, "start", &second)));
            *y += ROW;
        } else if index == head {
            let left_out = format!("{} rounds between are not drawn", rounds.len() - head - tail);
            put(svg, format_args!("{}", text("small", LEFT, *y + 15.0, "start", &left_out)));
            *y += ROW;
        }
        before += round.duration_ns as f64;
    }
    put(
        svg,
        format_args!("<path class=\"axis\" d=\"M{0} {top:.1}V{1:.1}M{2} {top:.1}V{1:.1}\"/>", TIME.0, *y, PAGES.0),
    );
    *y += 16.0;
    let mut x = PAGES.0;
    for (class, what) in [("data", "sent with content"), ("zero", "zero"), ("dirtied", "dirtied meanwhile")] {
        bar(svg, class, x, *y - 9.0, 10.0, 10.0);
        put(svg, format_args!("{}", text("small", x + 14.0, *y, "start", what)));
        x += 34.0 + 6.2 * what.len() as f64;
    }
    let mut x = TIME.0;
    for (class, what) in [("live", "the VM runs"), ("stood", "it stands")] {
        bar(svg, class, x, *y - 9.0, 10.0, 10.0);
        put(svg, format_args!("{}", text("small", x + 14.0, *y, "start", what)));
        x += 34.0 + 6.2 * what.len() as f64;
    }
    *y += 34.0;
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
    let mut x = PLOT.0;
    for (class, what) in [("free", "before it was limited"), ("held", "while it was limited")] {
        bar(svg, class, x, *y - 9.0, 10.0, 10.0);
        put(svg, format_args!("{}", text("small", x + 14.0, *y, "start", what)));
        x += 34.0 + 6.2 * what.len() as f64;
    }
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
    use crate::model::StunReport;
    use crate::model::blackout::{BlackoutPhase, LedgerEntry};

    pub(in crate::draw) fn sample() -> MigrationReport {
        serde_json::from_slice(include_bytes!("golden/migration.json")).unwrap()
    }

    #[test]
    fn drawn_as_ever() {
        golden("migration.svg", &migration_svg(&sample()));
        golden("migration.html", &migration_html(&sample()));
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
    fn words_are_no_markup() {
        let mut report = sample();
        report.strategy = "</title><script>alert(1)</script>".to_owned();
        report.reason = "<img src=x onerror=\"alert(1)\">".to_owned();
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
