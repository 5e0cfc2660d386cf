//! A migration's report as one page that needs nothing else: the drawing, tables for people, and every member as it stands in the report.
//!
//! The page runs no script and loads nothing, and forbids itself both.

use std::fmt::Write as _;

use serde_json::Value;

use super::label::{clean_xml, sentence_xml};
use super::migration::{migration_svg, pages, rate, summary, time, title, word};
use crate::model::schema::Schema;
use crate::model::units::display_bytes;
use crate::model::{MigrationReport, WaitBucket};

const STYLE: &str = "\
body{font:14px/1.5 system-ui,sans-serif;color:#24292f;background:#fff;max-width:1000px;margin:24px auto;padding:0 16px}h1{font-size:22px}h2{font-size:17px;margin-top:32px}\
svg{max-width:100%;height:auto}table{border-collapse:collapse}th,td{padding:3px 12px 3px 0;text-align:left;border-bottom:1px solid #dfe3e8;vertical-align:top}\
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}code{font:12px ui-monospace,monospace;overflow-wrap:anywhere}\
@media(prefers-color-scheme:dark){body{color:#e6edf3;background:#0d1117}th,td{border-color:#262d36}}";

/// The report as a page.
pub fn migration_html(report: &MigrationReport) -> String {
    let title = clean_xml(&title(report));
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n<title>{title}</title>\n\
         <style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<p>{}</p>\n",
        sentence_xml(&summary(report))
    );
    if !report.reason.is_empty() {
        line(&mut page, &format!("<p>Reason: {}</p>", sentence_xml(&report.reason)));
    }
    if let Some(chosen) = &report.chosen {
        line(&mut page, &format!("<p>Chosen: {}: {}</p>", sentence_xml(&chosen.plan), sentence_xml(&chosen.reason)));
    }
    page += &migration_svg(report);
    expected(&mut page, report);
    rounds(&mut page, report);
    reducers(&mut page, report);
    blackout(&mut page, report);
    waits(&mut page, report);
    network(&mut page, report);
    writers(&mut page, report);
    members(&mut page, report);
    page + "</body>\n</html>\n"
}

fn rounds(page: &mut String, report: &MigrationReport) {
    let headings =
        ["round", "", "pages due", "with content", "zero", "on the wire", "time", "rate", "dirtied meanwhile"];
    let rows = report.rounds.iter().map(|round| {
        let zero = round.zero_pages.min(round.pages);
        vec![
            round.round.to_string(),
            if round.paused { "paused" } else { "live" }.to_owned(),
            round.pages.to_string(),
            (round.pages - zero).to_string(),
            zero.to_string(),
            display_bytes(round.wire_bytes),
            time(round.duration_ns),
            rate(round).map_or_else(String::new, |rate| rate.to_string()),
            round.dirtied_pages.to_string(),
        ]
    });
    table(page, "Rounds", &headings, rows.collect());
}

/// What had been expected, beside what it took.
fn expected(page: &mut String, report: &MigrationReport) {
    let Some(told) = &report.prediction else { return };
    let ns = |ns: Option<u64>| ns.map_or_else(|| "no end".to_owned(), time);
    let off = |percent: Option<f64>| percent.map_or_else(String::new, |percent| format!("{percent:+.1} %"));
    let row =
        |what: &str, expected: String, taken: String, percent| vec![what.to_owned(), expected, taken, off(percent)];
    let rows = vec![
        row("total", ns(told.total_ns), time(report.total_ns), told.total_error_percent),
        row("blackout", ns(told.blackout_ns), time(report.blackout_ns), told.blackout_error_percent),
        row("on the wire", display_bytes(told.wire_bytes), display_bytes(report.wire_bytes), told.wire_error_percent),
    ];
    let headings = ["", "expected", "taken", "off by"];
    table(page, &format!("Expected of {}, from {}", sentence_xml(&told.plan), word(&told.from)), &headings, rows);
}

fn reducers(page: &mut String, report: &MigrationReport) {
    let rows = report.reducers.iter().map(|reducer| {
        vec![reducer.name.clone(), reducer.pages.to_string(), display_bytes(reducer.saved_bytes), time(reducer.cpu_ns)]
    });
    table(page, "Reducers", &["", "pages", "saved", "CPU"], rows.collect());
}

fn blackout(page: &mut String, report: &MigrationReport) {
    let rows = report
        .blackout
        .phases
        .iter()
        .enumerate()
        .map(|(index, entry)| vec![(index + 1).to_string(), word(&entry.phase), time(entry.duration_ns)]);
    table(page, "Blackout", &["", "phase", "time"], rows.collect());
}

/// How long the guest waited for pages that it was owed.
fn waits(page: &mut String, report: &MigrationReport) {
    let Some(owed) = &report.post_copy else { return };
    let all = owed.waits.count.max(1) as f64;
    let row = |bucket: &WaitBucket| {
        vec![time(bucket.up_to_ns), bucket.count.to_string(), format!("{:.1} %", bucket.count as f64 * 100.0 / all)]
    };
    let came = owed.sent_pages.max(1) as f64;
    let asked = owed.asked_pages as f64 * 100.0 / came;
    let heading = format!("Waits for pages: {:.1} % of {} came because they were asked for", asked, owed.sent_pages);
    table(page, &heading, &["up to", "waits", ""], owed.waits.histogram.iter().map(row).collect());
}

/// Which bridges have relearned where the VM is, and who else has its addresses.
fn network(page: &mut String, report: &MigrationReport) {
    let Some(network) = &report.network else { return };
    let sides = [("target", &network.target), ("source", &network.source)];
    let rows = sides.iter().flat_map(|(side, bridges)| bridges.iter().map(move |followed| (side, followed)));
    let rows = rows.map(|(side, followed)| {
        vec![
            (*side).to_owned(),
            followed.bridge.clone(),
            followed.mac.to_string(),
            word(&followed.verdict),
            followed.port.clone().unwrap_or_default(),
            followed.after_first_ns.map_or_else(String::new, time),
            followed.causes.first().map_or_else(String::new, |cause| word(&cause.cause)),
        ]
    });
    let headings = ["host", "bridge", "Ethernet address", "", "behind", "after", "why not"];
    table(page, "Bridges", &headings, rows.collect());
    let conflicts = network.asked.iter().flat_map(|asked| &asked.conflicts);
    let rows = conflicts.map(|conflict| {
        vec![
            word(&conflict.kind),
            conflict.ip.map_or_else(String::new, |ip| ip.to_string()),
            conflict.mac.to_string(),
            conflict.ports.join(", "),
        ]
    });
    table(page, "Who else has its addresses", &["", "IP address", "Ethernet address", "behind"], rows.collect());
}

fn writers(page: &mut String, report: &MigrationReport) {
    let headings = [
        "vCPU",
        "pages/s before",
        "pages/s limited",
        "mean limit",
        "least limit",
        "limited for",
        "held for",
        "of that beside others",
    ];
    let rows = report.stun.iter().flat_map(|stun| &stun.vcpus).map(|vcpu| {
        vec![
            vcpu.vcpu.to_string(),
            pages(vcpu.free_pages_per_second),
            pages(vcpu.limited_pages_per_second),
            pages(vcpu.mean_limit_pages_per_second),
            pages(vcpu.least_limit_pages_per_second),
            time(vcpu.limited_ns),
            time(vcpu.held_ns),
            time(vcpu.co_resident_held_ns),
        ]
    });
    table(page, "Writers that were slowed", &headings, rows.collect());
}

/// Every member, as it is in the report.
fn members(page: &mut String, report: &MigrationReport) {
    let mut rows = Vec::new();
    if let Ok(value) = serde_json::to_value(report.tagged()) {
        flatten("", &value, &mut rows);
    }
    line(page, "<h2>Every member</h2>\n<table>\n<tr><th>member</th><th>value</th></tr>");
    for (member, value) in rows {
        let (member, value) = (sentence_xml(&member), sentence_xml(&value));
        line(page, &format!("<tr><td><code>{member}</code></td><td><code>{value}</code></td></tr>"));
    }
    line(page, "</table>");
}

fn flatten(prefix: &str, value: &Value, rows: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                flatten(&if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") }, field, rows);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                flatten(&format!("{prefix}[{index}]"), item, rows);
            }
        }
        Value::String(text) => rows.push((prefix.to_owned(), text.clone())),
        other => rows.push((prefix.to_owned(), other.to_string())),
    }
}

/// A table; none without rows.
fn table(page: &mut String, name: &str, headings: &[&str], rows: Vec<Vec<String>>) {
    if rows.is_empty() {
        return;
    }
    line(page, &format!("<h2>{name}</h2>\n<table>"));
    let tr = |cells: Vec<String>| format!("<tr>{}</tr>", cells.concat());
    line(page, &tr(headings.iter().map(|heading| format!("<th class=\"n\">{heading}</th>")).collect()));
    for row in rows {
        line(page, &tr(row.iter().map(|cell| format!("<td class=\"n\">{}</td>", clean_xml(cell))).collect()));
    }
    line(page, "</table>");
}

fn line(page: &mut String, text: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(page, "{text}");
}

#[cfg(test)]
mod tests {
    use super::super::migration::tests::sample;
    use super::*;

    #[test]
    fn every_member_of_the_report_is_on_the_page() {
        let report = sample();
        let page = migration_html(&report);
        let mut rows = Vec::new();
        flatten("", &serde_json::to_value(report.tagged()).unwrap(), &mut rows);
        assert!(rows.len() > 60 && rows.iter().any(|(member, _)| member == "blackout.phases[10].duration_ns"));
        for (member, value) in rows {
            let row = format!("<code>{}</code></td><td><code>{}</code>", sentence_xml(&member), sentence_xml(&value));
            assert!(page.contains(&row), "{row}");
        }
    }

    #[test]
    fn what_the_network_did_is_on_the_page() {
        use crate::model::NetworkWord;
        let text = r#"{"last":{"asked":{"policy":"warn","addresses":1,"questions_sent":3,"waited_ns":1,"conflicts":[{"kind":"address","mac":"02:00:00:00:00:02","ip":"10.0.0.1","ports":["<up0>"]}],"not_asked":[]},
            "rounds_sent":1,"frames_sent":4,"target":[{"bridge":"<br0>","mac":"02:00:00:00:00:01","verdict":"not-relearned","moves":0,"causes":[{"cause":"silence"}]}],"source":[]}}"#;
        let Some(NetworkWord::Last(network)) = NetworkWord::read(text) else { panic!() };
        let page = migration_html(&MigrationReport { network: Some(network), ..sample() });
        for words in ["&lt;br0&gt;", ">silence<", ">10.0.0.1<", ">02:00:00:00:00:02<", "&lt;up0&gt;"] {
            assert!(page.contains(words), "{words}");
        }
        assert!(!page.contains("<br0>") && !page.contains("<up0>"));
    }

    #[test]
    fn the_page_needs_nothing_else() {
        let page = migration_html(&sample());
        assert!(page.contains("default-src 'none'"));
        for word in ["<script", "<link", "src=", "href=", "url(", "@import"] {
            assert!(!page.contains(word), "{word}");
        }
    }
}
