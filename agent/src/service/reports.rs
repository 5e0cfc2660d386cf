//! Reads what `dunlin migrate --json` printed. The file may be anybody's: its size and the lengths of its lists are bounded before anything is made
//! of it. Must not know what is drawn.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::Deserialize;

use crate::model::MigrationReport;
use crate::model::schema::Schema;

/// The largest file; a report of 1000 rounds has 150 KB.
pub const MOST_BYTES: u64 = 4 << 20;
/// The most elements of each of its lists: rounds, phases, vCPUs.
const MOST_ELEMENTS: usize = 4096;

/// A report that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The file.
    #[error("{path}: {source}")]
    Read {
        /// Which.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Nothing that large is a report.
    #[error("more than {} MiB is no report of a migration; give what `dunlin migrate --json` printed", MOST_BYTES >> 20)]
    TooLarge,
    /// Not JSON, or another object.
    #[error("this is no report of a migration ({0}); give the one line that `dunlin migrate --json` printed")]
    Form(String),
    /// Another object.
    #[error("this is a `{0}`, not a `dunlin.migration/v1`; give the one line that `dunlin migrate --json` printed")]
    Schema(String),
    /// More than any migration has.
    #[error("{count} {what} are more than any migration has ({MOST_ELEMENTS}): no report")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
    },
}

#[derive(Deserialize)]
struct Header {
    #[serde(default)]
    schema: String,
}

/// Reads the report in a file; `-` is standard input.
///
/// # Errors
/// It cannot be read, or is none.
pub fn read(path: &Path) -> Result<MigrationReport, ReportError> {
    let failed = |source| ReportError::Read { path: path.display().to_string(), source };
    let from: Box<dyn Read> =
        if path == Path::new("-") { Box::new(io::stdin()) } else { Box::new(File::open(path).map_err(failed)?) };
    let mut bytes = Vec::new();
    from.take(MOST_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    parse(&bytes)
}

/// The report that these bytes are.
///
/// # Errors
/// They are none.
pub fn parse(bytes: &[u8]) -> Result<MigrationReport, ReportError> {
    if bytes.len() as u64 > MOST_BYTES {
        return Err(ReportError::TooLarge);
    }
    let Header { schema } = serde_json::from_slice(bytes).map_err(form)?;
    if schema != MigrationReport::SCHEMA {
        return Err(ReportError::Schema(schema.chars().filter(|c| c.is_ascii_graphic()).take(64).collect()));
    }
    let report: MigrationReport = serde_json::from_slice(bytes).map_err(form)?;
    let vcpus = report.stun.as_ref().map_or(0, |stun| stun.vcpus.len());
    let lists = [
        ("rounds", report.rounds.len()),
        ("reducers", report.reducers.len()),
        ("phases", report.blackout.phases.len()),
        ("vCPUs", vcpus),
    ];
    match lists.into_iter().find(|(_, count)| *count > MOST_ELEMENTS) {
        Some((what, count)) => Err(ReportError::TooMany { what, count }),
        None => Ok(report),
    }
}

/// What is wrong with it. The words of the file are among that: nothing that a terminal obeys, and no more than a few lines.
fn form(error: serde_json::Error) -> ReportError {
    let words = error.to_string();
    ReportError::Form(words.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).take(300).collect())
}

/// A report that is right.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) const SAMPLE: &[u8] = include_bytes!("../draw/golden/migration.json");

/// For fuzzing: what is read can be drawn, and nothing in it is taken for markup.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz(input: &[u8]) {
    let Ok(report) = parse(input) else { return };
    let (svg, page) = (crate::draw::migration_svg(&report), crate::draw::migration_html(&report));
    for text in [&svg, &page] {
        assert!(text.matches("<svg").count() == 1 && !text.contains("<script"), "{text}");
    }
    assert!(svg.len() < 200_000, "{} bytes of drawing", svg.len());
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::model::RoundReport;

    pub(in crate::service) fn sample() -> MigrationReport {
        parse(SAMPLE).unwrap()
    }

    #[test]
    fn what_was_printed_is_read() {
        let report = sample();
        assert_eq!((report.rounds.len(), report.vm_name.as_str()), (4, "web1"));
        let again = serde_json::to_vec(&report.tagged()).unwrap();
        assert_eq!(parse(&again).unwrap(), report);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("r.json");
        std::fs::write(&file, SAMPLE).unwrap();
        assert_eq!(read(&file).unwrap(), report);
        let missing = read(&folder.path().join("none")).unwrap_err().to_string();
        assert!(missing.contains("none: "), "{missing}");
    }

    #[test]
    fn what_is_no_report_is_refused() {
        let says = |bytes: &[u8], words: &str| {
            let error = parse(bytes).unwrap_err().to_string();
            assert!(error.contains(words) && error.len() < 600, "{error}");
        };
        says(b"", "no report");
        says(b"{", "no report");
        says(b"[]", "not a `dunlin.migration/v1`");
        says(&[0xff; 10], "no report");
        says(&vec![b'['; 100_000], "no report");
        says(&vec![b' '; MOST_BYTES as usize + 1], "MiB");
        says(br#"{"schema":"dunlin.vm/v1"}"#, "`dunlin.vm/v1`");
        says(b"{}", "a ``");
        let text = String::from_utf8(SAMPLE.to_vec()).unwrap();
        says(&text.as_bytes()[..text.len() / 2], "no report");
        says(format!("{text}{text}").as_bytes(), "no report");
        says(text.replace("\"memory_bytes\":268435456", "\"memory_bytes\":-1").as_bytes(), "no report");
        let obeyed = text.replace("\"moved\"", "\"\u{1b}[2J\"").replace('\u{1b}', "\\u001b");
        says(obeyed.as_bytes(), "no report");
        assert!(!parse(obeyed.as_bytes()).unwrap_err().to_string().contains('\u{1b}'));
        // A name that is none, and would be markup.
        says(text.replace("\"web1\"", "\"<script>alert(1)</script>\"").as_bytes(), "names no VM");
        let many = MigrationReport { rounds: vec![RoundReport::default(); MOST_ELEMENTS + 1], ..sample() };
        says(&serde_json::to_vec(&many.tagged()).unwrap(), "4097 rounds");
    }
}
