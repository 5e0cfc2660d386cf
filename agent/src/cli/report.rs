//! `dunlin report`.

use std::path::PathBuf;

use clap::Args;

use super::profiling::write_drawing;
use crate::draw::{migration_html, migration_svg};
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::service::out::say;
use crate::service::reports;

/// Draw what `dunlin migrate --json` reported
///
/// Its rounds (pages due, sent, zero and dirtied; rates), what followed the VM and how long that waited for pages, the writers that were slowed, the blackout by phase, and what of it had
/// been expected. Nothing is drawn that the report does not say.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin migrate web1 --to tcp://127.0.0.1:4460 --json > web1.json
  dunlin report web1.json --html web1.html
  dunlin report - --svg web1.svg < web1.json")]
pub(super) struct ReportArgs {
    /// What `dunlin migrate --json` printed; - is standard input.
    file: PathBuf,

    /// Write a page that needs nothing else: the drawing, and every figure in tables.
    #[arg(long, value_name = "OUT", required_unless_present = "svg")]
    html: Option<PathBuf>,

    /// Write the drawing alone.
    #[arg(long, value_name = "OUT")]
    svg: Option<PathBuf>,
}

impl ReportArgs {
    /// Runs the command.
    pub(super) fn run(self, json: bool) -> anyhow::Result<u8> {
        let report = reports::read(&self.file)?;
        if let Some(path) = &self.html {
            write_drawing(path, &migration_html(&report))?;
        }
        if let Some(path) = &self.svg {
            write_drawing(path, &migration_svg(&report))?;
        }
        if json {
            say!("{}", serde_json::to_string(&report.tagged())?);
        } else {
            for path in self.html.iter().chain(&self.svg) {
                say!("{}: the migration of {} in {} rounds", path.display(), report.vm_name, report.rounds.len());
            }
        }
        Ok(exit::DONE)
    }
}
