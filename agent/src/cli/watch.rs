//! The options by which a migration is watched, the same at both of its ends.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::model::units::parse_duration;
use crate::service::events::Hold;

/// How long to be patient, and who is told.
#[derive(Debug, Args)]
pub(super) struct Watch {
    /// Nothing moving for this long counts as a stalled peer [default: 10s].
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(super) stall: Option<Duration>,

    /// Append every step and round to this file, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    pub(super) events: Option<PathBuf>,

    /// For tests: hold at STEP until PATH exists.
    #[arg(long, value_name = "STEP=PATH", hide = true)]
    pub(super) hold_at: Option<Hold>,
}
