//! The test guest: where its ELF is, and what its counters say of errors.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use serde_json::Value;

/// The guest's ELF: `DUNLIN_GUEST`, or where `cargo build --release` in tests/guest puts it.
///
/// # Errors
/// It has not been built.
pub fn elf() -> Result<PathBuf> {
    let path = std::env::var_os("DUNLIN_GUEST")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/target/release/dunlin-guest"), PathBuf::from);
    ensure!(path.is_file(), "{} is missing: run `cargo build --release` in tests/guest first", path.display());
    Ok(path)
}

/// Everything that `/counters` counts as an error, by name and sum over vCPUs and devices.
pub const ERRORS: [&str; 8] = [
    "page_mismatches",
    "ipi_lost",
    "ipi_doubled",
    "timer_stalls",
    "address_space_mismatches",
    "irq_lost",
    "block_mismatches",
    "block_errors",
];

/// The sum of the counter `name` over all vCPUs, the network, the disk and the balloon.
pub fn sum(counters: &Value, name: &str) -> u64 {
    let of = |object: &Value| object.get(name).and_then(Value::as_u64).unwrap_or(0);
    let vcpus = counters["vcpus"].as_array().map_or(0, |vcpus| vcpus.iter().map(of).sum());
    vcpus + of(&counters["net"]) + of(&counters["block"]) + of(&counters["balloon"])
}

/// The error counters that are not zero, as `name=value`; an answer that is no answer of the guest counts as one.
pub fn errors(counters: &Value) -> Vec<String> {
    if counters["schema"] != "dunlin.guest/v1" || counters["vcpus"].as_array().is_none_or(Vec::is_empty) {
        return vec![format!("no counters of the guest: {counters}")];
    }
    let nonzero = ERRORS.iter().map(|name| (name, sum(counters, name))).filter(|(_, value)| *value > 0);
    nonzero.map(|(name, value)| format!("{name}={value}")).collect()
}

/// The longest time for which vCPU 0 wanted to run and did not, since the last `/reset-gap`.
pub fn max_gap_ns(counters: &Value) -> u64 {
    counters["max_gap_ns"].as_u64().unwrap_or(0)
}

/// The value of `key=` in a line of the guest's console.
pub fn field<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn errors_are_summed_and_named() {
        let mut counters =
            json!({"schema": "dunlin.guest/v1", "vcpus": [{"ipi_lost": 0}, {"ipi_lost": 0}], "net": null});
        assert!(errors(&counters).is_empty());
        counters["vcpus"][1]["ipi_lost"] = json!(2);
        counters["net"] = json!({"irq_lost": 1});
        counters["block"] = json!({"irq_lost": 1});
        assert_eq!(errors(&counters), ["ipi_lost=2", "irq_lost=2"]);
        assert_eq!(errors(&json!({})).len(), 1);
        assert_eq!(field("READY version=1 tsc_hz=2000", "tsc_hz"), Some("2000"));
        assert_eq!(field("READY tsc_hz=2000", "tsc"), None);
    }
}
