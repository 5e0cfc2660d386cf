//! `dunlin agent`.

use std::net::SocketAddr;
use std::time::Duration;

use clap::Args;

use super::places::RunDir;
use crate::model::BytesPerSecond;
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::model::units::{display_duration, parse_duration};
use crate::service::agent::{AgentOptions, AgentReady, run};
use crate::service::config::Config;
use crate::service::fleet::{ArmPlan, FleetOptions, SHORTEST_INTERVAL};
use crate::service::interrupt::Interrupt;
use crate::service::out::{complain, say};
use crate::service::profile::{LONGEST_WINDOW, SHORTEST_WINDOW};
use crate::track::Terms;

/// Watch all KVM VMs of this host, and serve what is seen
///
/// Looks every interval at who has come and gone, and counts in the kernel how each VM writes its memory and why it leaves its guest. Serves
/// the fleet's objects on RUN_DIR/observe.sock, and with --listen metrics for Prometheus. BPF programs are loaded while there is a VM, and
/// keep to [track] budget of the configuration. Changes nothing in any VM, but with --arm in hosted ones. Ctrl-C ends it; nothing is left behind.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin agent --listen 127.0.0.1:9177
  dunlin agent --listen 127.0.0.1:9177 --arm --bandwidth 10Gbit --downtime 300ms
  curl --unix-socket /run/dunlin/observe.sock http://dunlin/v1/fleet

Needs CAP_BPF, CAP_PERFMON and CAP_SYS_PTRACE, not root (docs: dunlin agent).")]
pub(super) struct AgentArgs {
    /// Serve metrics at http://ADDR:PORT/metrics; port 0 lets the kernel choose.
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,

    /// The time between two looks.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_duration)]
    interval: Duration,

    /// Write-protect hosted VMs in short windows, one VM at a time, for their write curves.
    #[arg(long)]
    arm: bool,

    /// The length of a window.
    #[arg(long, value_name = "TIME", default_value = "320ms", value_parser = parse_duration, requires = "arm")]
    window: Duration,

    /// How far apart two windows of one VM begin, at least.
    #[arg(long, value_name = "TIME", default_value = "16s", value_parser = parse_duration, requires = "arm")]
    every: Duration,

    /// Goodput of the link that VMs would be moved over: forecasts and rogues are told for it.
    #[arg(long, value_name = "RATE", requires = "arm")]
    bandwidth: Option<BytesPerSecond>,

    /// The downtime that is allowed.
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = parse_duration, requires = "bandwidth")]
    downtime: Duration,

    /// Metrics of each vCPU too.
    #[arg(long)]
    vcpu_metrics: bool,

    #[command(flatten)]
    run_dir: RunDir,
}

/// What a switch costs in any case, and a round trip, as `dunlin rogue` takes them.
const SWITCH_COST: Duration = Duration::from_millis(5);
const RTT: Duration = Duration::from_millis(1);

impl AgentArgs {
    /// Runs the command.
    pub(super) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let options = match self.options(config) {
            Ok(options) => options,
            Err(words) => {
                complain!("dunlin: {words}");
                return Ok(exit::USAGE);
            }
        };
        let interrupt = Interrupt::install()?;
        run(options, &interrupt, |ready| announce(ready, json))?;
        Ok(exit::DONE)
    }

    fn options(self, config: &Config) -> Result<AgentOptions, String> {
        let Self { listen, interval, arm, window, every, bandwidth, downtime, vcpu_metrics, run_dir } = self;
        if interval < SHORTEST_INTERVAL {
            return Err(format!("--interval must be at least {}", display_duration(SHORTEST_INTERVAL)));
        }
        if !(SHORTEST_WINDOW..=LONGEST_WINDOW).contains(&window) {
            let (least, most) = (display_duration(SHORTEST_WINDOW), display_duration(LONGEST_WINDOW));
            return Err(format!("--window must be {least} to {most}"));
        }
        if every < window * 2 {
            return Err("--every must be at least twice --window: a VM must write freely most of the time".to_owned());
        }
        let terms = bandwidth.map(|bandwidth| Terms { bandwidth, downtime, switch_cost: SWITCH_COST, rtt: RTT });
        if let Some(terms) = &terms {
            terms.memory_time().map_err(|error| error.to_string())?;
        }
        let fleet = FleetOptions {
            interval,
            arm: arm.then_some(ArmPlan { window, every }),
            terms,
            budget: config.track.budget,
            read_memory: config.track.read_memory.clone(),
            keep_addresses: true,
            ..FleetOptions::new(run_dir.path(config))
        };
        Ok(AgentOptions { fleet, listen, vcpu_metrics })
    }
}

fn announce(ready: &AgentReady, json: bool) {
    if json {
        match serde_json::to_string(&ready.tagged()) {
            Ok(line) => say!("{line}"),
            Err(error) => complain!("dunlin: {error}"),
        }
        return;
    }
    say!("watching; objects on {}", ready.socket.display());
    if let Some(metrics) = &ready.metrics {
        say!("metrics on {metrics}");
    }
}
