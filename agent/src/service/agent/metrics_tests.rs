//! Golden text of the metrics; the dashboard and the book against the table.

use std::collections::BTreeSet;
use std::path::Path;

use prometheus_client::registry::Registry;

use super::metrics::{METRICS, ViewCollector, text};
use crate::service::fleet::{FleetView, sample};

fn scrape(view: FleetView, per_vcpu: bool) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(ViewCollector(view, per_vcpu)));
    text(&registry)
}

/// `DUNLIN_UPDATE_DOCS=1` writes the golden text instead of comparing it.
#[test]
fn a_scrape_is_the_golden_text() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/service/agent/golden.metrics");
    let text = scrape(sample(), true).replace(env!("CARGO_PKG_VERSION"), "VERSION");
    if std::env::var_os("DUNLIN_UPDATE_DOCS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "DUNLIN_UPDATE_DOCS=1 writes it anew");
    let names: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("# HELP ")?.split(' ').next()).collect();
    assert_eq!(names, METRICS.iter().map(|metric| metric.name).collect::<Vec<_>>(), "a full view has every metric");
}

#[test]
fn names_from_outside_cannot_break_a_line() {
    let mut view = sample();
    view.vms[0].name = "x\" 1\nforged{a=\"b\\".to_owned();
    let text = scrape(view, false);
    assert!(text.contains("name=\"x\\\" 1\\nforged{a=\\\"b\\\\\""), "{text}");
    assert!(!text.lines().any(|line| line.starts_with("forged")));
}

#[test]
fn ended_vms_and_vcpus_nobody_asked_for_are_in_no_scrape() {
    let mut view = sample();
    let uuid = view.vms[0].vm_id.to_string();
    let with = scrape(view.clone(), false);
    assert!(with.contains(&uuid) && !with.contains("dunlin_vcpu"));
    view.vms.clear();
    let without = scrape(view, true);
    assert!(!without.contains("vm_uuid") && without.contains("dunlin_vms 0"));
}

#[test]
fn before_the_first_look_nothing_is_claimed() {
    let view = FleetView { sequence: 0, ..sample() };
    assert_eq!(scrape(view, true), "# EOF\n");
}

#[test]
fn one_identity_in_two_processes_makes_one_series() {
    let mut view = sample();
    let twin = crate::service::fleet::FleetVm { pid: 40, start_time_ticks: 99, ..view.vms[0].clone() };
    view.vms.push(twin);
    let text = scrape(view, false);
    let infos: Vec<&str> = text.lines().filter(|line| line.starts_with("dunlin_vm_info")).collect();
    assert!(infos.len() == 1 && infos[0].contains("pid=\"41\""), "the older tells: {infos:?}");
}

/// The words of `text` that are names of metrics.
fn names_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("dunlin_") && *word != "dunlin_").map(str::to_owned).collect()
}

#[test]
fn the_dashboard_names_only_metrics_that_there_are() {
    let dashboard = include_str!("../../../../docs/grafana/dunlin.json");
    let parsed: serde_json::Value = serde_json::from_str(dashboard).unwrap();
    assert!(parsed["panels"].as_array().unwrap().len() >= 8);
    let all: BTreeSet<String> = METRICS.iter().map(super::metrics::Metric::full_name).collect();
    let named = names_in(dashboard);
    assert!(named.len() >= 10, "{named:?}");
    assert_eq!(named.difference(&all).collect::<Vec<_>>(), Vec::<&String>::new());
}

#[test]
fn the_book_names_exactly_the_metrics_that_there_are() {
    let page = include_str!("../../../../docs/src/metrics.md");
    let rows: BTreeSet<String> =
        page.lines().filter_map(|line| line.strip_prefix("| `")?.split(['`', '{']).next()).map(str::to_owned).collect();
    assert_eq!(rows, METRICS.iter().map(super::metrics::Metric::full_name).collect());
}
