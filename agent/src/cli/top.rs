//! `dunlin top`.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use clap::Args;

use super::places::RunDir;
use crate::model::BytesPerSecond;
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::model::units::{display_duration, parse_duration};
use crate::service::config::Config;
use crate::service::fleet::{ArmPlan, Fleet, FleetOptions, SHORTEST_INTERVAL};
use crate::service::interrupt::Interrupt;
use crate::service::out::{complain, say};
use crate::track::Terms;
use crate::tui::top::{self, State};

/// Watch every KVM VM of this host on one screen
///
/// Rates of writing with their regime, exits, vCPUs; with --arm also curves, forecasts and rogues of the VMs that dunlin runs. Other VMMs'
/// VMs are only looked at. With --json, or where standard output is no terminal, views are printed instead.
#[derive(Debug, Args)]
#[command(after_help = "\
Keys: q end, arrows choose, Enter details, s order, r reverse, space stand still, h all keys

Examples:
  dunlin top
  dunlin top --arm --bandwidth 10Gbit --downtime 300ms
  dunlin top --once
  dunlin top --json --count 3")]
pub(super) struct TopArgs {
    /// The time between two looks.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_duration)]
    interval: Duration,

    /// Write-protect the VMs that dunlin runs in short windows, one at a time, for their curves (costs a guest about 2.5 µs for each
    /// page and window; 2 % of the time for one VM).
    #[arg(long)]
    arm: bool,

    /// The link that VMs would be moved over, for forecasts and rogues (with --arm).
    #[arg(long, value_name = "RATE", requires = "arm")]
    bandwidth: Option<BytesPerSecond>,

    /// The downtime that is allowed (with --bandwidth).
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = parse_duration)]
    downtime: Duration,

    /// Print one picture after the second look, and end.
    #[arg(long)]
    once: bool,

    /// How many views to print [default: until Ctrl-C].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,

    #[command(flatten)]
    run_dir: RunDir,
}

/// What a switch costs in any case, and the link's round trip, where nobody says otherwise.
const SWITCH_COST: Duration = Duration::from_millis(5);
const RTT: Duration = Duration::from_millis(1);
/// The size of a picture where there is no terminal.
const PICTURE: (u16, u16) = (160, 24);

impl TopArgs {
    /// Runs the command.
    pub(super) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let Self { interval, arm, bandwidth, downtime, once, count, run_dir } = self;
        if interval < SHORTEST_INTERVAL {
            complain!("dunlin: --interval must be at least {}", display_duration(SHORTEST_INTERVAL));
            return Ok(exit::USAGE);
        }
        let interrupt = Interrupt::install()?;
        let terms = bandwidth.map(|bandwidth| Terms { bandwidth, downtime, switch_cost: SWITCH_COST, rtt: RTT });
        let options = FleetOptions {
            interval,
            arm: arm.then(ArmPlan::default),
            terms,
            budget: config.track.budget,
            read_memory: config.track.read_memory.clone(),
            ..FleetOptions::new(run_dir.path(config))
        };
        let fleet = Fleet::start(options)?;
        let reader = fleet.reader();
        if !json && !once && count.is_none() && std::io::stdout().is_terminal() {
            top::run(&reader, || interrupt.wait_until(Instant::now()))?;
            return Ok(exit::DONE);
        }
        // The first look has no interval behind it.
        let mut sequence = u64::from(once);
        let mut left = if once { Some(1) } else { count };
        while left != Some(0) {
            let view = reader.next(sequence, Duration::from_millis(100));
            if interrupt.wait_until(Instant::now()) {
                break;
            }
            if view.sequence <= sequence {
                continue;
            }
            sequence = view.sequence;
            if json {
                say!("{}", serde_json::to_string(&view.tagged())?);
            } else {
                let mut state = State { details: once, ..State::default() };
                state.clamp(&view);
                say!("{}", top::picture(&view, &state, PICTURE.0, PICTURE.1));
            }
            left = left.map(|left| left - 1);
        }
        Ok(exit::DONE)
    }
}
