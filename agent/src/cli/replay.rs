//! `dunlin replay`.

use std::path::PathBuf;

use clap::Args;

use super::dirty_rate::{printer, text};
use crate::model::outcome::exit;
use crate::service::interrupt::Interrupt;
use crate::service::out::complain;
use crate::service::recording::{ReplayRequest, SLOWEST, replay};

/// Print what was printed when a recording was made
///
/// Runs the code that made the figures again, on the events and the times in the file. Needs no VM, no BPF and no rights.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  dunlin replay web-1.jsonl\n  dunlin replay web-1.jsonl --speed 10 --json")]
pub(super) struct ReplayArgs {
    /// A recording that `dunlin record` made.
    file: PathBuf,

    /// How many times faster than it was (1: as it was), or `max`: without waiting.
    #[arg(long, value_name = "X", default_value = "max", value_parser = parse_speed)]
    speed: Speed,
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
        let request = ReplayRequest { file: self.file, speed: self.speed.0 };
        let interrupt = Interrupt::install()?;
        let replayed = replay(&request, &interrupt, printer(json, text))?;
        if replayed.broke_off {
            complain!("dunlin: {} ends within a line, which was left out", request.file.display());
        }
        Ok(exit::DONE)
    }
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
