//! Units of memory and rates, and how people write them (`256MiB`, `1Gbit`, `50MiB/s`, `30ms`).
//!
//! Owns parsing and printing of quantities. Decimal prefixes (`k`, `M`, `G`) are powers of 1000, binary ones
//! (`Ki`, `Mi`, `Gi`) powers of 1024, as IEC 80000-13 has them; a bare `K`, `M` or `G` after a memory size
//! is refused rather than guessed.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::region::PageRun;

/// Bytes in the page that dirty logs and the wire count in.
pub const PAGE_SIZE: usize = 4096;
/// Bytes of a huge page of x86-64.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// A page's position inside one region, in units of [`PAGE_SIZE`]. For RAM this is the offset in the
/// memory file, not the guest frame number: the hole below 4 GiB has no index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageIndex(pub u64);

/// A number of pages of [`PAGE_SIZE`] bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageCount(pub u64);

impl PageCount {
    /// The pages that `bytes` fill, the last one perhaps in part.
    pub const fn covering(bytes: u64) -> Self {
        Self(bytes.div_ceil(PAGE_SIZE as u64))
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0 * PAGE_SIZE as u64
    }

    /// All of so many pages in order, in runs of `longest`; the last may be shorter.
    pub fn windows(self, longest: u32) -> impl Iterator<Item = PageRun> {
        let longest = longest.max(1);
        (0..self.0)
            .step_by(longest as usize)
            .map(move |first| PageRun::new(first, (self.0 - first).min(longest.into()) as u32))
    }
}

impl fmt::Display for PageCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages", self.0)
    }
}

/// Pages per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd, Serialize, Deserialize)]
pub struct PagesPerSecond(pub f64);

impl PagesPerSecond {
    /// The rate of `pages` seen in `interval`; zero for an empty interval.
    pub fn over(pages: PageCount, interval: Duration) -> Self {
        let seconds = interval.as_secs_f64();
        Self(if seconds > 0.0 { pages.0 as f64 / seconds } else { 0.0 })
    }

    /// The same rate in MiB/s.
    pub fn mebibytes_per_second(self) -> f64 {
        self.0 * PAGE_SIZE as f64 / f64::from(1 << 20)
    }
}

/// Bytes per second: goodput or a limit of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BytesPerSecond(pub u64);

impl BytesPerSecond {
    /// The rate of `bytes` moved in `elapsed`; zero for an empty interval.
    pub fn over(bytes: u64, elapsed: Duration) -> Self {
        let seconds = elapsed.as_secs_f64();
        Self(if seconds > 0.0 { (bytes as f64 / seconds) as u64 } else { 0 })
    }

    /// How long `bytes` take at this rate; [`Duration::MAX`] at rate zero.
    pub fn time_for(self, bytes: u64) -> Duration {
        if self.0 == 0 { Duration::MAX } else { Duration::from_secs_f64(bytes as f64 / self.0 as f64) }
    }
}

impl fmt::Display for BytesPerSecond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} MiB/s", self.0 as f64 / f64::from(1 << 20))
    }
}

/// A quantity that could not be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{text}` is no {what}; write for example {example}")]
pub struct ParseQuantityError {
    text: String,
    what: &'static str,
    example: &'static str,
}

/// Splits `text` into its leading decimal number and the unit after it.
fn split_number(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..end].parse().ok()?;
    Some((number, text[end..].trim()))
}

/// Reads a memory size such as `256MiB`, `6GiB`, `512KiB`, `4096B` or a bare number of bytes.
///
/// # Errors
/// Anything else, and sizes above 2^60 bytes, are refused with an example.
pub fn parse_size_bytes(text: &str) -> Result<u64, ParseQuantityError> {
    let refuse = || ParseQuantityError { text: text.to_owned(), what: "size", example: "`256MiB` or `6GiB`" };
    let (number, unit) = split_number(text).ok_or_else(refuse)?;
    let scale: f64 = match unit {
        "" | "B" => 1.0,
        "KiB" => 1024.0,
        "MiB" => 1024.0 * 1024.0,
        "GiB" => 1024.0 * 1024.0 * 1024.0,
        "TiB" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        "kB" | "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        _ => return Err(refuse()),
    };
    let bytes = number * scale;
    if bytes >= (1u64 << 60) as f64 {
        return Err(refuse());
    }
    Ok(bytes as u64)
}

impl FromStr for BytesPerSecond {
    type Err = ParseQuantityError;

    /// Reads `1Gbit`, `100Mbit/s`, `800kbit`, `50MiB/s`, `1GB/s`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse =
            || ParseQuantityError { text: text.to_owned(), what: "bandwidth", example: "`1Gbit` or `50MiB/s`" };
        let (number, unit) = split_number(text).ok_or_else(refuse)?;
        let unit = unit.strip_suffix("/s").unwrap_or(unit);
        let bytes_per_second = match unit {
            "bit" => number / 8.0,
            "kbit" | "Kbit" => number * 1e3 / 8.0,
            "Mbit" => number * 1e6 / 8.0,
            "Gbit" => number * 1e9 / 8.0,
            "" => return Err(refuse()),
            bytes => {
                let scale = parse_size_bytes(&format!("1{bytes}")).map_err(|_| refuse())?;
                number * scale as f64
            }
        };
        if !(1.0..1e15).contains(&bytes_per_second) {
            return Err(refuse());
        }
        Ok(Self(bytes_per_second as u64))
    }
}

/// Reads a duration such as `30ms`, `1s`, `250us`, `2min`.
///
/// # Errors
/// A number without a unit, and anything above ten days, is refused with an example.
pub fn parse_duration(text: &str) -> Result<Duration, ParseQuantityError> {
    let refuse = || ParseQuantityError { text: text.to_owned(), what: "duration", example: "`30ms` or `1s`" };
    let (number, unit) = split_number(text).ok_or_else(refuse)?;
    let seconds = match unit {
        "ns" => number * 1e-9,
        "us" | "µs" => number * 1e-6,
        "ms" => number * 1e-3,
        "s" => number,
        "min" => number * 60.0,
        "h" => number * 3600.0,
        _ => return Err(refuse()),
    };
    if !(0.0..=864_000.0).contains(&seconds) {
        return Err(refuse());
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// Prints a byte count with a binary prefix, three significant digits: `1.50 GiB`.
pub fn display_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.2} {}", UNITS[unit]) }
}

/// Prints a duration with the unit that fits: `850 ns`, `2.31 ms`, `1.20 s`.
pub fn display_duration(duration: Duration) -> String {
    let ns = duration.as_nanos() as f64;
    match ns {
        _ if ns < 1e3 => format!("{ns:.0} ns"),
        _ if ns < 1e6 => format!("{:.1} µs", ns / 1e3),
        _ if ns < 1e9 => format!("{:.2} ms", ns / 1e6),
        _ => format!("{:.2} s", ns / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_want_a_full_unit() {
        assert_eq!(parse_size_bytes("256MiB"), Ok(256 << 20));
        assert_eq!(parse_size_bytes("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_size_bytes("4096"), Ok(4096));
        for bad in ["", "MiB", "1M", "1 furlong", "-1MiB", "9999999TiB", "1e3MiB"] {
            assert!(parse_size_bytes(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn bandwidth_reads_bits_and_bytes() {
        assert_eq!("1Gbit".parse(), Ok(BytesPerSecond(125_000_000)));
        assert_eq!("100Mbit/s".parse(), Ok(BytesPerSecond(12_500_000)));
        assert_eq!("50MiB/s".parse(), Ok(BytesPerSecond(50 << 20)));
        for bad in ["", "0Gbit", "1", "Gbit", "1Gb", "99999999Gbit"] {
            assert!(bad.parse::<BytesPerSecond>().is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn durations_want_a_unit() {
        assert_eq!(parse_duration("30ms"), Ok(Duration::from_millis(30)));
        assert_eq!(parse_duration("0.5s"), Ok(Duration::from_millis(500)));
        for bad in ["30", "ms", "-1s", "1000000h"] {
            assert!(parse_duration(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn rate_of_an_empty_interval_is_zero() {
        assert_eq!(BytesPerSecond::over(10, Duration::ZERO), BytesPerSecond(0));
        assert!(PagesPerSecond::over(PageCount(10), Duration::ZERO).0.abs() < f64::EPSILON);
        assert_eq!(BytesPerSecond(0).time_for(1), Duration::MAX);
    }
}
