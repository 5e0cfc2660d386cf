//! The guest's pause as the guest saw it: steps of the time stamp counter between the beats (`HB <seq> <tsc>`) that it writes
//! to its serial console, read from the console files of both sides of a migration.

/// One beat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Beat {
    tsc: u64,
    /// Offset behind its line.
    end: usize,
}

/// What the beats say about one migration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Gaps {
    /// The step across the switch, less the heartbeat period.
    pub(super) switch_ms: f64,
    /// The largest step from the start of the migration on, less the heartbeat period.
    pub(super) largest_ms: f64,
}

/// Reads the gaps. `source` and `target` are the two consoles, which join to one stream (a line cut by the switch goes on at
/// the target); the migration began when the source's was `began` bytes long.
pub(super) fn gaps(source: &[u8], target: &[u8], began: usize, tsc_hz: u64, period_ms: f64) -> Option<Gaps> {
    let cut = source.len();
    let stream = [source, target].concat();
    let beats = beats(&stream, began);
    let ms = |pair: &[Beat]| pair[1].tsc.saturating_sub(pair[0].tsc) as f64 * 1e3 / tsc_hz as f64 - period_ms;
    // The beat whose line the switch cut was taken before it, so both steps around the cut are candidates.
    let after = beats.iter().position(|beat| beat.end > cut)?;
    let around = beats.get(after.checked_sub(1)?..(after + 2).min(beats.len()))?;
    let most = |steps: &[Beat]| steps.windows(2).map(ms).fold(0.0, f64::max);
    (around.len() >= 2).then(|| Gaps { switch_ms: most(around), largest_ms: most(&beats) })
}

/// The steps between the beats of one console from its byte `began` on, in milliseconds, the period included.
pub(super) fn steps_ms(console: &[u8], began: usize, tsc_hz: u64) -> Vec<f64> {
    let beats = beats(console, began);
    let ms = |pair: &[Beat]| pair[1].tsc.saturating_sub(pair[0].tsc) as f64 * 1e3 / tsc_hz as f64;
    beats.windows(2).map(ms).collect()
}

/// The whole beats that end behind `from`, one before it included.
fn beats(stream: &[u8], from: usize) -> Vec<Beat> {
    let mut beats: Vec<Beat> = Vec::new();
    let mut end = 0;
    for line in stream.split_inclusive(|&byte| byte == b'\n') {
        end += line.len();
        if line.last() != Some(&b'\n') {
            break;
        }
        let Some(tsc) = parse(line) else { continue };
        if end <= from {
            beats.clear();
        }
        beats.push(Beat { tsc, end });
    }
    beats
}

fn parse(line: &[u8]) -> Option<u64> {
    let line = std::str::from_utf8(line).ok()?;
    let (_, tsc) = line.trim_end().strip_prefix("HB ")?.split_once(' ')?;
    u64::from_str_radix(tsc, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_step_across_the_switch_is_found_also_when_the_switch_cuts_a_line() {
        // At 1 MHz: beats at 0, 1, 2 ms; pause; 12 and 13 ms. The largest step, 40 ms, lies before the start.
        let before = "HB 0 0\nHB 1 9c40\n";
        let source = format!("{before}HB 2 a028\nHB 3 a4");
        let target = "10\nHB 4 cb20\nSTAT x\nHB 5 cf08\nHB 6";
        let found = gaps(source.as_bytes(), target.as_bytes(), before.len(), 1_000_000, 1.0).unwrap();
        assert_eq!(found, Gaps { switch_ms: 9.0, largest_ms: 9.0 });
        let found = gaps(source.as_bytes(), target.as_bytes(), 0, 1_000_000, 1.0).unwrap();
        assert_eq!(found, Gaps { switch_ms: 9.0, largest_ms: 39.0 });
    }

    #[test]
    fn a_console_without_beats_has_no_gap() {
        assert_eq!(gaps(b"BOOT\n", b"", 0, 1_000_000, 1.0), None);
        assert_eq!(gaps(b"HB 0 0\n", b"", 0, 1_000_000, 1.0), None);
    }
}
