//! `dunlin heat`.

use std::path::PathBuf;

use clap::Args;

use super::profiling::{ProfilingArgs, heading, taken, write_drawing};
use crate::draw::{Estimated, Glyphs, heat_svg, heat_text};
use crate::model::VmRef;
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::service::config::Config;
use crate::service::out::say;
use crate::track::{SampledCurve, SampledHeat};

/// Show where in its memory a VM writes
///
/// A map of guest memory in parts of 2 MiB or more, coloured by the part of their pages that was written in the windows. Sampled, it is an
/// estimate, in parts that are large enough for one; those that are written most are listed with their intervals.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin heat web-1
  dunlin heat web-1 --window 320ms --windows 4 --plot heat.svg
  dunlin heat pid:4711 --regime soft-dirty --allow-soft-dirty
  dunlin heat pid:4711 --regime sampled --allow-read-memory")]
pub(super) struct HeatArgs {
    /// The VM: NAME, uuid:U or pid:P (any KVM process, or QEMU that emulates).
    vm: VmRef,

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
        let Self { vm, profiling, plot, ascii } = self;
        let profile = match taken(vm, profiling, config)? {
            Ok(profile) => profile,
            Err(code) => return Ok(code),
        };
        let estimated = profile.sampled.as_ref().map(estimated);
        let regions = profile.map();
        if let Some(path) = &plot {
            write_drawing(path, &heat_svg(&format!("{}: where it writes", profile.vm.name), &regions, estimated))?;
        }
        if json {
            say!("{}", serde_json::to_string(&profile.tagged())?);
        } else {
            let glyphs = if ascii { Glyphs::Ascii } else { Glyphs::Unicode };
            say!("{}\n{}", heading(&profile), heat_text(&regions, 78, glyphs, estimated));
            if let Some(sampled) = &profile.sampled {
                say!("{}", hottest(&sampled.heat));
            }
        }
        Ok(exit::DONE)
    }
}

/// Regions that are listed.
const LISTED: usize = 8;

/// What the drawings of an estimate say of it.
fn estimated(sampled: &SampledCurve) -> Estimated {
    let (regions, longest) = (&sampled.heat.regions, sampled.windows.last());
    Estimated {
        region_bytes: sampled.heat.region_bytes,
        low_pages: longest.map_or(0, |window| window.unique_pages_low),
        high_pages: longest.map_or(0, |window| window.unique_pages_high),
        sampled_pages: regions.iter().map(|region| region.sampled_pages).sum(),
    }
}

/// The regions that are written most, with their intervals.
fn hottest(heat: &SampledHeat) -> String {
    use std::fmt::Write;
    let mut regions: Vec<_> = heat.regions.iter().filter(|region| region.changed_pages > 0).collect();
    regions.sort_by_key(|region| std::cmp::Reverse(region.unique_pages));
    let mut out = format!("{:>14} {:>10} {:>19} {:>10}", "REGION", "PAGES", "95 % INTERVAL", "SAMPLED");
    for region in regions.iter().take(LISTED) {
        let interval = format!("{} to {}", region.unique_pages_low, region.unique_pages_high);
        let start = format!("{:#x}", region.range.start.0);
        let _ = write!(out, "\n{start:>14} {:>10} {interval:>19} {:>10}", region.unique_pages, region.sampled_pages);
    }
    out
}
