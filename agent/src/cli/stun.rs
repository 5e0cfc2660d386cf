//! `dunlin stun`.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args};

use super::dirty_rate::{printer, told};
use super::places::{RunDir, StateDir};
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::model::units::{PAGE_SIZE, display_bytes, display_duration, parse_duration};
use crate::model::{BytesPerSecond, PagesPerSecond, VmRef};
use crate::service::config::Config;
use crate::service::interrupt::Interrupt;
use crate::service::out::{complain, say};
use crate::service::stun::{Goal, Means, StunError, StunRequest, StunStatus, clear_leftovers, holder, stun};
use crate::stun::StunPolicy;

/// Slow the writers of a VM, by just enough, and let go in any case
///
/// Shares out what may be written max-min fairly: whoever writes less than the water line is not touched, everybody above is brought down to it. Limits hold for a second
/// and are renewed ten times as often: if this command is killed or stopped, they end. VMs that dunlin runs are held by their own process, page for page; of other VMMs' VMs the CPU time of single vCPU
/// threads is limited, in cgroups below their own, and only while their own VMM has their dirty log on does it show what they write.
#[derive(Debug, Args)]
#[command(
    group = ArgGroup::new("what").required(true).args(["target", "follow_migration", "clear"]),
    after_help = "\
Examples:
  dunlin stun web-1 --target 50MiB/s --for 30s
  dunlin stun web-1 --target 20MiB/s --vcpu 1 --dry-run
  dunlin stun pid:4711 --follow-migration --bandwidth 1Gbit --allow-foreign --qmp /run/web.qmp
  dunlin stun --clear

Exit codes: 0 done, and everybody was let go; 1 it failed; 2 wrong arguments; 3 not allowed."
)]
pub(super) struct StunArgs {
    /// The VM: NAME, uuid:U or pid:P.
    #[arg(required_unless_present = "clear", conflicts_with = "clear")]
    vm: Option<VmRef>,

    /// What may be written in all, in different pages, for example 50MiB/s.
    #[arg(long, value_name = "RATE")]
    target: Option<BytesPerSecond>,

    /// Wait until the VM's own VMM migrates it (its dirty log turns on), slow its writers to what the link carries, and let go when that has ended.
    #[arg(long, requires = "bandwidth")]
    follow_migration: bool,

    /// Goodput of the link that it is migrated over.
    #[arg(long, value_name = "RATE", requires = "follow_migration")]
    bandwidth: Option<BytesPerSecond>,

    /// Slow this vCPU only, to the target alone; may be given more than once.
    #[arg(long, value_name = "N", conflicts_with = "all_writers")]
    vcpu: Vec<u32>,

    /// Slow whoever writes more than its share [default].
    #[arg(long)]
    all_writers: bool,

    /// Never hold this vCPU, whatever it writes; may be given more than once.
    #[arg(long, value_name = "N")]
    never_vcpu: Vec<u32>,

    /// Hold whole vCPUs, not only those of their address spaces that write most.
    #[arg(long)]
    whole_vcpus: bool,

    /// For how long [default: until Ctrl-C].
    #[arg(long = "for", value_name = "TIME", value_parser = parse_duration)]
    duration: Option<Duration>,

    /// Say what would be done, and limit nobody.
    #[arg(long)]
    dry_run: bool,

    /// Allow it for a VM of another VMM.
    #[arg(long)]
    allow_foreign: bool,

    /// The socket of a foreign VM's QMP monitor, which must have no other client: says how long the VMM takes to answer while its vCPUs are held.
    #[arg(long, value_name = "PATH")]
    qmp: Option<PathBuf>,

    /// How vCPUs of a foreign VM are held: by the CPU time of their threads, or by QEMU itself (`set-vcpu-dirty-limit`; needs a dirty ring, and limits only who fills it) [default: cgroup].
    #[arg(long, value_name = "MEANS", requires = "qmp", value_parser = ["cgroup", "qmp"])]
    by: Option<String>,

    /// Put back threads that a run which was killed has left in cgroups of their own, and end.
    #[arg(long)]
    clear: bool,

    #[command(flatten)]
    run_dir: RunDir,

    #[command(flatten)]
    state_dir: StateDir,
}

impl StunArgs {
    /// Runs the command.
    pub(super) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let Some(vm) = self.vm else { return clear(json) };
        let goal = match (self.target, self.bandwidth) {
            (Some(target), _) => Goal::Target(PagesPerSecond(target.0 as f64 / PAGE_SIZE as f64)),
            (None, bandwidth) => Goal::FollowMigration { bandwidth: bandwidth.unwrap_or_default() },
        };
        if matches!(goal, Goal::Target(PagesPerSecond(rate)) if rate < 1.0)
            || matches!(goal, Goal::FollowMigration { bandwidth } if bandwidth.0 == 0)
        {
            complain!("dunlin: less than a page a second would stop the VM altogether: `dunlin vm pause` does that");
            return Ok(exit::USAGE);
        }
        let policy = StunPolicy {
            only: self.vcpu.into_iter().collect(),
            never: self.never_vcpu.into_iter().collect(),
            by_address_space: !self.whole_vcpus,
            ..config.stun.policy()
        };
        let request = StunRequest {
            run_dir: self.run_dir.path(config),
            state_dir: self.state_dir.path(config),
            vm,
            goal,
            policy,
            config: config.stun.clone(),
            allow_foreign: self.allow_foreign,
            qmp: self.qmp,
            means: if self.by.as_deref() == Some("qmp") { Means::Qmp } else { Means::Cgroup },
            duration: self.duration,
            dry_run: self.dry_run,
        };
        let interrupt = Interrupt::install()?;
        match stun(&request, &interrupt, printer(json, text)) {
            Ok(ended) => Ok(told(ended, &request.vm)),
            Err(error @ (StunError::Never(_) | StunError::NotAllowed { .. })) => {
                complain!("dunlin: refused: {error}");
                Ok(exit::REFUSED)
            }
            Err(StunError::Goal(words)) => {
                complain!("dunlin: {words}");
                Ok(exit::USAGE)
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// The process that holds threads, started by this very command.
pub(super) fn hold() -> anyhow::Result<u8> {
    holder::serve(io::stdin(), io::stdout())?;
    Ok(exit::DONE)
}

fn clear(json: bool) -> anyhow::Result<u8> {
    let cleared = clear_leftovers()?;
    if json {
        say!("{}", serde_json::to_string(&cleared.tagged())?);
    } else if cleared.groups.is_empty() {
        say!("nothing was left");
    }
    for group in cleared.groups.iter().filter(|_| !json) {
        say!("{group}: its threads are back");
    }
    for failure in &cleared.failures {
        complain!("dunlin: {failure}");
    }
    Ok(if cleared.failures.is_empty() { exit::DONE } else { exit::ERROR })
}

/// One report for people.
fn text(status: &StunStatus, first: bool) -> String {
    use std::fmt::Write;
    let rate = |pages: f64| format!("{}/s", display_bytes((pages * PAGE_SIZE as f64) as u64));
    let mut out = String::new();
    if first {
        let _ = writeln!(out, "{} (pid {}, {} vCPUs), by {}", status.vm.name, status.vm.pid, status.vm.cpus, status.by);
    }
    match status.allowed_pages_per_second {
        Some(allowed) => {
            let dry = if status.dry_run { ", dry run" } else { "" };
            let _ = write!(out, "allowed {}{dry}:", rate(allowed));
        }
        None => {
            let _ = write!(out, "no migration is seen, nobody is slowed:");
        }
    }
    for vcpu in &status.vcpus {
        let _ = write!(out, "  vcpu{} {}", vcpu.vcpu, rate(vcpu.pages_per_second));
        if let Some(limit) = vcpu.limit_pages_per_second {
            let _ = write!(out, " of {}", rate(limit));
        }
    }
    let lost = Duration::from_nanos(status.stun.guest_time_lost_ns);
    let _ = write!(out, "; {} of guest time lost", display_duration(lost));
    if let Some(took) = status.vmm_answers_ms {
        let _ = write!(out, "; its VMM answers in {took:.1} ms");
    }
    out.push('\n');
    if !status.stun.gave_up.is_empty() {
        let _ = writeln!(out, "  nobody is slowed any more: {}", status.stun.gave_up);
    }
    out
}
