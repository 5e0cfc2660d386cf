//! `dunlin wws`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::profiling::{GuestFilesArgs, ProfilingArgs, heading, taken_by, write_drawing};
use crate::draw::{Glyphs, LINKS, curve_svg, curve_text};
use crate::model::curve::SHOWN_MS;
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::model::units::{PAGE_SIZE, display_bytes, display_duration, parse_duration};
use crate::model::{VmRef, Writer};
use crate::service::config::Config;
use crate::service::out::{complain, say};
use crate::service::profile::{Profile, ProfileRequest};

/// Show a VM's writable working set: how many different pages it writes in an interval, over the interval's length
///
/// One number cannot say whether a migration converges; this curve does: pre-copy gets within a downtime D if the VM writes less in D
/// than the link carries in D. Lines of 1, 10, 25 and 100 Gbit/s are drawn beside it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin wws web-1
  dunlin wws web-1 --windows 5 --duty 10 --plot web-1.svg
  dunlin wws web-1 --names --system-map System.map-6.1
  dunlin wws pid:4711 --regime sampled --allow-read-memory --json")]
pub(super) struct WwsArgs {
    /// The VM: NAME, uuid:U or pid:P (any KVM process, or QEMU that emulates).
    vm: VmRef,

    #[command(flatten)]
    profiling: ProfilingArgs,

    /// Draw the curve to this SVG file.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,

    /// Mark this downtime in the drawings.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    downtime: Option<Duration>,

    /// List the address spaces that wrote, with the names of a Linux guest's processes, and the vCPUs.
    #[arg(long)]
    names: bool,

    #[command(flatten)]
    guest_files: GuestFilesArgs,

    /// Draw in ASCII only.
    #[arg(long)]
    ascii: bool,
}

impl WwsArgs {
    /// Runs the command.
    pub(super) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let Self { vm, profiling, plot, downtime, names, guest_files, ascii } = self;
        let guest_files = guest_files.files();
        let names = names || !guest_files.is_empty();
        let request = match profiling.request(vm, config) {
            Ok(request) => ProfileRequest { names, who: names, guest_files, ..request },
            Err(words) => {
                complain!("dunlin: {words}");
                return Ok(exit::USAGE);
            }
        };
        let profile = match taken_by(&request)? {
            Ok(profile) => profile,
            Err(code) => return Ok(code),
        };
        if let Some(path) = &plot {
            let svg = curve_svg(
                &format!("{}: different bytes written", profile.vm.name),
                &[("U(t)", &profile.curve)],
                &LINKS,
                downtime,
            );
            write_drawing(path, &svg)?;
        }
        if json {
            say!("{}", serde_json::to_string(&profile.tagged())?);
        } else {
            let glyphs = if ascii { Glyphs::Ascii } else { Glyphs::Unicode };
            say!("{}", text(&profile, names, downtime, glyphs));
        }
        Ok(exit::DONE)
    }
}

fn text(profile: &Profile, names: bool, downtime: Option<Duration>, glyphs: Glyphs) -> String {
    use std::fmt::Write;
    let mut out = heading(profile);
    let bytes = |pages: f64| display_bytes((pages * PAGE_SIZE as f64) as u64);
    let _ =
        writeln!(out, "\n{:>10} {:>12} {:>12}   {:<25} {:>14}", "INTERVAL", "PAGES", "BYTES", "95 % INTERVAL", "RATE");
    let lengths = SHOWN_MS
        .map(Duration::from_millis)
        .into_iter()
        .filter(|length| length.mul_f64(1.05) < profile.curve.measured_until());
    for length in lengths.chain([profile.curve.measured_until()]) {
        let at = profile.curve.at(length);
        let _ = writeln!(
            out,
            "{:>10} {:>12.0} {:>12}   {:<25} {:>12}/s",
            display_duration(length),
            at.unique_pages,
            bytes(at.unique_pages),
            format!("{} to {}", bytes(at.low_pages), bytes(at.high_pages)),
            bytes(at.unique_pages / length.as_secs_f64().max(f64::MIN_POSITIVE))
        );
    }
    if let Some(exact) = profile.exact_unique_pages {
        let _ = writeln!(out, "different pages at the end of a window, by the bitmap: {exact:.0}");
    }
    if let Some(sampled) = &profile.sampled {
        if let Some(zero) = &sampled.zero_pages {
            let _ = writeln!(
                out,
                "zero pages: {:.1} % ({:.1} to {:.1} %)",
                zero.share * 100.0,
                zero.share_low * 100.0,
                zero.share_high * 100.0
            );
        }
        if let Some(compression) = &sampled.compression {
            let _ = writeln!(
                out,
                "compressed (lz4), the others take {:.0} % ({:.0} to {:.0} %) of their size",
                compression.ratio * 100.0,
                compression.ratio_low * 100.0,
                compression.ratio_high * 100.0
            );
        }
        for unreadable in &sampled.unreadable_ranges {
            let _ = writeln!(
                out,
                "not read: {} at {} ({})",
                display_bytes(unreadable.bytes),
                unreadable.start,
                unreadable.reason
            );
        }
    }
    if profile.guest_time_lost_ns > 0 {
        let _ = writeln!(
            out,
            "a window took up to {} of a busy vCPU's time; left alone for {} after it, the VM is slowed down no more than was allowed",
            display_duration(Duration::from_nanos(profile.guest_time_lost_ns)),
            display_duration(Duration::from_nanos(profile.rest_ns))
        );
    }
    if let Some(cost) = &profile.cost {
        let _ = writeln!(
            out,
            "cost: BPF ran {} times for {} in all, {:.2} % of a core while measuring",
            cost.bpf_runs,
            display_duration(Duration::from_nanos(cost.bpf_run_time_ns)),
            cost.bpf_core_share * 100.0
        );
    }
    if names {
        let _ = writeln!(
            out,
            "\n{:>12}  WRITER ({} of a window)",
            "PAGES",
            display_duration(profile.curve.measured_until())
        );
        let told = |writer: &Writer| matches!(writer, Writer::Vcpu { .. } | Writer::AddressSpace { .. });
        for part in profile.writers.iter().filter(|part| told(&part.writer)) {
            let _ = writeln!(out, "{:>12.0}  {}", part.share * part.curve.last().unique_pages, part.writer);
        }
    }
    out.push('\n');
    out + &curve_text(&[("U(t)", &profile.curve)], &LINKS, downtime, 78, 20, glyphs)
}
