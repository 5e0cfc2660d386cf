//! `dunlin heat`.

use std::path::PathBuf;

use clap::Args;

use super::profiling::{ProfilingArgs, heading, taken, write_drawing};
use crate::draw::{Glyphs, heat_svg, heat_text};
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::service::config::Config;
use crate::service::out::{complain, say};

/// Show where in its memory a VM writes
///
/// A map of guest memory in parts of 2 MiB or more, coloured by the part of their pages that was written in the windows.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin heat web-1
  dunlin heat web-1 --window 320ms --windows 4 --plot heat.svg
  dunlin heat pid:4711 --regime soft-dirty --allow-soft-dirty")]
pub(super) struct HeatArgs {
    #[command(flatten)]
    profiling: ProfilingArgs,

    /// Draw the map to this SVG file.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,

    /// Draw in ASCII only.
    #[arg(long)]
    ascii: bool,
}

impl HeatArgs {
    /// Runs the command.
    pub(super) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let Self { profiling, plot, ascii } = self;
        let profile = match taken(profiling, config)? {
            Ok(profile) => profile,
            Err(code) => return Ok(code),
        };
        if profile.sampled.is_some() {
            complain!("dunlin: sampling does not tell where a VM writes; measure under another regime");
            return Ok(exit::REFUSED);
        }
        let regions = profile.map();
        if let Some(path) = &plot {
            write_drawing(path, &heat_svg(&format!("{}: where it writes", profile.vm.name), &regions))?;
        }
        if json {
            say!("{}", serde_json::to_string(&profile.tagged())?);
        } else {
            let glyphs = if ascii { Glyphs::Ascii } else { Glyphs::Unicode };
            say!("{}\n{}", heading(&profile), heat_text(&regions, 78, glyphs));
        }
        Ok(exit::DONE)
    }
}
