//! `dunlin replay`.

use std::io::{self, BufWriter, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::dirty_rate::{printer, text};
use crate::model::GuestWrite;
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::service::interrupt::Interrupt;
use crate::service::observe::DirtyRateReport;
use crate::service::out::complain;
use crate::service::recording::{ReplayRequest, SLOWEST, replay};

/// Print what was printed when a recording was made
///
/// Runs the code that made the figures again, on the events and the times in the file. Needs no VM, no BPF and no rights.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  dunlin replay web-1.jsonl\n  dunlin replay web-1.jsonl --speed 10 --json\n  dunlin replay web-1.jsonl --writes"
)]
pub(super) struct ReplayArgs {
    /// A recording that `dunlin record` made.
    file: PathBuf,

    /// How many times faster than it was (1: as it was), or `max`: without waiting.
    #[arg(long, value_name = "X", default_value = "max", value_parser = parse_speed)]
    speed: Speed,

    /// Print each single write before its interval's figures; the recording must have been made with `--writes`.
    #[arg(long)]
    writes: bool,
}

/// None for as fast as can be.
#[derive(Clone, Copy, Debug)]
struct Speed(Option<f64>);

fn parse_speed(text: &str) -> Result<Speed, String> {
    if text == "max" {
        return Ok(Speed(None));
    }
    let number = text.parse().ok().filter(|speed: &f64| speed.is_finite() && *speed >= SLOWEST);
    number.map(|speed| Speed(Some(speed))).ok_or_else(|| format!("write a number of at least {SLOWEST}, or max"))
}

impl ReplayArgs {
    /// Runs the command.
    pub(super) fn run(self, json: bool) -> anyhow::Result<u8> {
        let request = ReplayRequest { file: self.file, speed: self.speed.0, writes: self.writes };
        let interrupt = Interrupt::install()?;
        let mut print = printer(json, text);
        let replayed = replay(&request, &interrupt, |report, writes| {
            if request.writes {
                print_writes(json, report, writes)?;
            }
            print(report)
        })?;
        if replayed.broke_off {
            complain!("dunlin: {} ends within a line, which was left out", request.file.display());
        }
        Ok(exit::DONE)
    }
}

/// One line a write.
fn print_writes(json: bool, report: &DirtyRateReport, writes: &[GuestWrite]) -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    for write in writes {
        if json {
            serde_json::to_writer(&mut out, &write.tagged())?;
            out.write_all(b"\n")?;
        } else {
            writeln!(out, "{}", line(report, write))?;
        }
    }
    out.flush()
}

fn line(report: &DirtyRateReport, write: &GuestWrite) -> String {
    let GuestWrite { at_ns, thread_id, gfn, pages, fresh, address_space, instruction } = *write;
    let name = report.rate.threads.iter().find(|thread| thread.thread_id == thread_id);
    let name = name.and_then(|thread| thread.name.as_deref()).unwrap_or("(ended)");
    let known = |place: Option<String>| place.unwrap_or_else(|| "unknown".to_owned());
    let what = match pages {
        1 if fresh == 1 => "first".to_owned(),
        1 => "again".to_owned(),
        _ => format!("{pages} pages, {fresh} first"),
    };
    format!(
        "{:>16.9} s  {name:<16} {thread_id:>7}  page {gfn:#}  {what}  in {}  by {}",
        Duration::from_nanos(at_ns).as_secs_f64(),
        known(address_space.map(|space| space.to_string())),
        known(instruction.map(|instruction| instruction.to_string())),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_speed_is_a_number_that_time_can_be_divided_by() {
        assert!(parse_speed("max").unwrap().0.is_none());
        assert!(parse_speed("2.5").unwrap().0.is_some());
        for wrong in ["0", "-1", "nan", "inf", "fast", "1e-9", ""] {
            assert!(parse_speed(wrong).is_err(), "{wrong}");
        }
    }
}
