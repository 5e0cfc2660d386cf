//! Owns the parsing of numbers with units: sizes (`64M`), durations (`10ms`), hexadecimal and decimal integers.

/// Parses a decimal or `0x` hexadecimal integer.
pub fn integer(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

/// Parses a size in bytes with an optional binary suffix `K`, `M` or `G` (also `KiB`, `MiB`, `GiB`).
pub fn size_bytes(text: &str) -> Option<u64> {
    let text = text.strip_suffix("iB").unwrap_or(text);
    let (number, shift) = match text.as_bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 10),
        b'm' | b'M' => (&text[..text.len() - 1], 20),
        b'g' | b'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    integer(number)?.checked_mul(1 << shift)
}

/// Parses a duration with unit `us`, `ms` or `s` into nanoseconds; a bare `0` is zero.
pub fn duration_ns(text: &str) -> Option<u64> {
    if text == "0" {
        return Some(0);
    }
    for (suffix, scale) in [("us", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000)] {
        if let Some(number) = text.strip_suffix(suffix) {
            return number.parse::<u64>().ok()?.checked_mul(scale);
        }
    }
    None
}

/// Converts a span of time stamp counter cycles to nanoseconds.
pub fn cycles_to_ns(cycles: u64, tsc_hz: u64) -> u64 {
    (u128::from(cycles) * 1_000_000_000 / u128::from(tsc_hz.max(1))) as u64
}

/// Converts nanoseconds to time stamp counter cycles.
pub fn ns_to_cycles(ns: u64, tsc_hz: u64) -> u64 {
    (u128::from(ns) * u128::from(tsc_hz) / 1_000_000_000) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_carry_binary_suffixes() {
        assert_eq!(size_bytes("64M"), Some(64 << 20));
        assert_eq!(size_bytes("6GiB"), Some(6 << 30));
        assert_eq!(size_bytes("4K"), Some(4096));
        assert_eq!(size_bytes("0x200"), Some(512));
        assert_eq!(size_bytes("512"), Some(512));
        assert_eq!(size_bytes(""), None);
        assert_eq!(size_bytes("M"), None);
        assert_eq!(size_bytes("99999999999G"), None);
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(duration_ns("10ms"), Some(10_000_000));
        assert_eq!(duration_ns("1s"), Some(1_000_000_000));
        assert_eq!(duration_ns("250us"), Some(250_000));
        assert_eq!(duration_ns("0"), Some(0));
        assert_eq!(duration_ns("10"), None);
        assert_eq!(duration_ns("ms"), None);
    }

    #[test]
    fn cycles_and_nanoseconds_convert_without_overflow() {
        let year_ns = 365 * 86_400 * 1_000_000_000;
        let cycles = ns_to_cycles(year_ns, 3_000_000_000);
        assert_eq!(cycles_to_ns(cycles, 3_000_000_000), year_ns);
    }
}
