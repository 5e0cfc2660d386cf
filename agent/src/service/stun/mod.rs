//! `dunlin stun`: slows the writers of a VM, ours or another VMM's, to what an operator or a link allows, and lets go in any case.
//!
//! Joins what is seen of the VM, the policy of stunning, and an actuator: `hosted` asks the VM's own process, `foreign` has a separate process limit the CPU time of single vCPU
//! threads. Must not know how a vCPU is held.

mod answers;
mod foreign;
pub mod holder;
mod hosted;

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::audit::{self, Action};
use super::config::StunConfig;
use super::control::ControlError;
use super::interrupt::Interrupt;
use super::intervals::printed;
use super::inventory::{self, FindError, HostVm};
use super::observe::{Ended, Observed};
use super::profile::names;
use super::watch::WatchError;
use crate::cgroup::{self, CgroupError};
use crate::foreign::Permission;
use crate::foreign::qmp::QmpError;
use crate::model::schema::Schema;
use crate::model::units::display_duration;
use crate::model::{BytesPerSecond, PAGE_SIZE, PagesPerSecond, StunReport, VcpuLimit, VmRef, VmWrites};
use crate::port::EventSourceError;
use crate::stun::{Controller, StunPolicy, steady};

/// How often writers are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often is reported.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// To what writers are slowed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// All that count may write this much together.
    Target(PagesPerSecond),
    /// What a migration over this link can carry, for as long as the VM's dirty log is on by somebody else.
    FollowMigration {
        /// The link's goodput.
        bandwidth: BytesPerSecond,
    },
}

/// How vCPUs of foreign VMs are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Means {
    /// By the CPU time of their threads.
    #[default]
    Cgroup,
    /// By their VMM, told over its monitor.
    Qmp,
}

/// What to do.
#[derive(Clone, Debug)]
pub struct StunRequest {
    /// Where hosted VMs are listed.
    pub run_dir: PathBuf,
    /// Where the audit log is.
    pub state_dir: PathBuf,
    /// The VM.
    pub vm: VmRef,
    /// To what.
    pub goal: Goal,
    /// Whom, and how far.
    pub policy: StunPolicy,
    /// What the configuration allows.
    pub config: StunConfig,
    /// Whether a flag allows it for a foreign VM.
    pub allow_foreign: bool,
    /// The monitor of a foreign VM's VMM.
    pub qmp: Option<PathBuf>,
    /// How a foreign VM is held.
    pub means: Means,
    /// For how long; none: until a signal.
    pub duration: Option<Duration>,
    /// Only say what would be done.
    pub dry_run: bool,
}

/// What is printed, each second and at the end.
#[derive(Clone, Debug, Serialize)]
pub struct StunStatus {
    /// Whose.
    pub vm: Observed,
    /// How it is held: `throttle` (the VM's own process), `cgroup`, or `qmp` (its VMM).
    pub by: &'static str,
    /// How long its VMM took to answer when it was last asked, or has been taking; absent unless its monitor was named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vmm_answers_ms: Option<f64>,
    /// What may be written; absent while no migration is seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_pages_per_second: Option<f64>,
    /// What is written at present, by vCPU.
    pub vcpus: Vec<VcpuStatus>,
    /// Whether nobody is really limited.
    pub dry_run: bool,
    /// What was done so far.
    pub stun: StunReport,
}

impl Schema for StunStatus {
    const SCHEMA: &'static str = "dunlin.stun/v1";
}

/// What holders left that were killed.
#[derive(Debug, Serialize)]
pub struct Cleared {
    /// The groups that were removed, their threads put back.
    pub groups: Vec<String>,
    /// Why others could not be.
    #[serde(skip)]
    pub failures: Vec<CgroupError>,
}

impl Schema for Cleared {
    const SCHEMA: &'static str = "dunlin.stun-cleared/v1";
}

/// Puts back what holders left that were killed.
///
/// # Errors
/// This host has no such groups, so nothing can have been left.
pub fn clear_leftovers() -> Result<Cleared, CgroupError> {
    let (groups, failures) = cgroup::clear()?;
    Ok(Cleared { groups: groups.iter().map(|group| group.display().to_string()).collect(), failures })
}

/// One vCPU at present.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct VcpuStatus {
    /// Its index.
    pub vcpu: u32,
    /// What it wrote per second since the last look.
    pub pages_per_second: f64,
    /// What it may write; absent if it may write as it likes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_pages_per_second: Option<f64>,
}

/// Why nobody was slowed, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum StunError {
    /// No such VM.
    #[error(transparent)]
    Find(#[from] FindError),
    /// It cannot be watched.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// Its counters cannot be read.
    #[error(transparent)]
    Source(#[from] EventSourceError),
    /// The VM's own process refuses.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The holder.
    #[error(transparent)]
    Holder(#[from] holder::HolderError),
    /// The VMM's monitor.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// No cgroups.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The operator has forbidden it.
    #[error("`{0}` is never slowed: `never` in [stun] of the configuration names it")]
    Never(String),
    /// Nobody has allowed it.
    #[error(
        "`{vm}` is run by {vmm}: slowing a VM of another VMM is off until you allow it (--allow-foreign, or `foreign` in [stun] of the configuration)"
    )]
    NotAllowed {
        /// The VM.
        vm: String,
        /// Its VMM.
        vmm: String,
    },
    /// A goal that makes no sense for this VM.
    #[error("{0}")]
    Goal(String),
    /// It could not be printed.
    #[error("a report could not be printed")]
    Print(#[from] io::Error),
}

/// What limits the vCPUs of one VM, and sees what they write.
trait Actuator {
    /// How.
    fn by(&self) -> &'static str;

    /// Looks; none: the VM has ended.
    fn look(&mut self) -> Result<Option<VmWrites>, StunError>;

    /// Whether somebody else moves the VM at present.
    fn is_moved(&self) -> bool;

    /// How long the VMM takes to answer, if it is asked.
    fn vmm_answers(&self) -> Option<Duration> {
        None
    }

    /// Limits, until the next look at most for a lease.
    fn limit(&mut self, limits: &[Option<VcpuLimit>]) -> Result<(), StunError>;

    /// Lets everybody go.
    fn let_go(&mut self) -> Result<(), StunError>;
}

/// Slows writers until the time is over, a signal comes or the migration that it follows ends; reports to `each`.
///
/// # Errors
/// Says what is missing; nobody is held then.
pub fn stun(
    request: &StunRequest,
    interrupt: &Interrupt,
    each: impl FnMut(&StunStatus) -> io::Result<()>,
) -> Result<Ended, StunError> {
    let found = inventory::find(&request.run_dir, &request.vm, None)?;
    if names(&request.config.never, &found) {
        return Err(StunError::Never(found.name));
    }
    let last_vcpu = found.vcpus.len() as u32;
    if let Some(&wrong) = request.policy.only.iter().find(|&&vcpu| vcpu >= last_vcpu && last_vcpu > 0) {
        return Err(StunError::Goal(format!("`{}` has no vCPU {wrong}: they are 0 to {}", found.name, last_vcpu - 1)));
    }
    let state_dir = found.entry.as_ref().map_or(&request.state_dir, |entry| &entry.state_dir).clone();
    let mut actuator: Box<dyn Actuator> = if found.entry.is_some() {
        if request.qmp.is_some() || request.means == Means::Qmp {
            return Err(StunError::Goal(format!("`{}` is a VM that dunlin runs: it has no QMP monitor", found.name)));
        }
        Box::new(hosted::Hosted::open(request, &found)?)
    } else {
        Box::new(foreign::Foreign::open(request, permission(request, &found)?)?)
    };
    let what = match request.goal {
        Goal::Target(rate) => format!("stun --target {:.0} pages/s", rate.0),
        Goal::FollowMigration { bandwidth } => format!("stun --follow-migration --bandwidth {bandwidth}"),
    };
    let audit = |what: &str, [before, after]: [&str; 2], result: String| {
        if !request.dry_run {
            let [before, after] = [before, after].map(str::to_owned);
            let action = Action { who: audit::me(), what, vm_id: found.vm_id, before, after, result };
            audit::record(&state_dir, &action);
        }
    };
    audit(&what, ["running", "stunned"], "ok".to_owned());
    let mut controller = Controller::new(request.policy.clone());
    let ended = control(request, &found, actuator.as_mut(), &mut controller, interrupt, each);
    let released = if request.dry_run { Ok(()) } else { actuator.let_go() };
    let lost = display_duration(Duration::from_nanos(controller.report().guest_time_lost_ns));
    audit(
        &format!("{what}: let go, {lost} of guest time lost"),
        ["stunned", "running"],
        match (&ended, &released) {
            (Ok(_), Ok(())) => "ok".to_owned(),
            (Err(error), _) | (_, Err(error)) => error.to_string(),
        },
    );
    let ended = ended?;
    if ended != Ended::VmGone {
        released?;
    }
    Ok(ended)
}

fn permission(request: &StunRequest, vm: &HostVm) -> Result<Permission, StunError> {
    if request.allow_foreign {
        return Ok(Permission::granted("--allow-foreign"));
    }
    if names(&request.config.foreign, vm) {
        return Ok(Permission::granted("[stun] of the configuration"));
    }
    Err(StunError::NotAllowed { vm: vm.name.clone(), vmm: vm.vmm.clone() })
}

/// The loop.
fn control(
    request: &StunRequest,
    vm: &HostVm,
    actuator: &mut dyn Actuator,
    controller: &mut Controller,
    interrupt: &Interrupt,
    mut each: impl FnMut(&StunStatus) -> io::Result<()>,
) -> Result<Ended, StunError> {
    let began = Instant::now();
    let until = request.duration.map(|duration| began + duration);
    let (mut before, mut due, mut report_due) = (None::<VmWrites>, began, began + REPORT_EVERY);
    let mut followed = false;
    loop {
        let Some(writes) = actuator.look()? else { return Ok(Ended::VmGone) };
        let is_moved = actuator.is_moved();
        let allowed = match request.goal {
            Goal::Target(rate) => Some(rate),
            Goal::FollowMigration { bandwidth } if is_moved => {
                Some(steady(PagesPerSecond(bandwidth.0 as f64 / PAGE_SIZE as f64)))
            }
            Goal::FollowMigration { .. } => None,
        };
        let limits = controller.look(&writes, allowed);
        if !request.dry_run {
            actuator.limit(&limits)?;
        }
        let is_over = followed && !is_moved || until.is_some_and(|until| Instant::now() >= until);
        followed |= is_moved && matches!(request.goal, Goal::FollowMigration { .. });
        if is_over || Instant::now() >= report_due {
            report_due += REPORT_EVERY;
            let status = StunStatus {
                vm: Observed::of(vm),
                by: actuator.by(),
                vmm_answers_ms: actuator.vmm_answers().map(|took| took.as_secs_f64() * 1e3),
                allowed_pages_per_second: allowed.map(|rate| rate.0),
                vcpus: at_present(before.as_ref(), &writes, &limits),
                dry_run: request.dry_run,
                stun: controller.report(),
            };
            if let Some(ended) = printed(each(&status))? {
                return Ok(ended);
            }
            before = Some(writes);
        } else if before.is_none() {
            before = Some(writes);
        }
        if is_over {
            return Ok(Ended::Counted);
        }
        due = (due + LOOK_EVERY).max(Instant::now());
        if interrupt.wait_until(due) {
            return Ok(Ended::Interrupted);
        }
    }
}

fn at_present(before: Option<&VmWrites>, now: &VmWrites, limits: &[Option<VcpuLimit>]) -> Vec<VcpuStatus> {
    let seconds = before.map_or(0, |before| now.at_ns.saturating_sub(before.at_ns)) as f64 / 1e9;
    let vcpu = |(index, writes): (usize, &crate::model::VcpuWrites)| {
        let old = before.and_then(|before| before.vcpus.get(index)).map_or(0.0, |old| old.pages);
        VcpuStatus {
            vcpu: index as u32,
            pages_per_second: if seconds > 0.0 { (writes.pages - old).max(0.0) / seconds } else { 0.0 },
            limit_pages_per_second: limits.get(index).copied().flatten().map(|limit| limit.rate.0),
        }
    };
    now.vcpus.iter().enumerate().map(vcpu).collect()
}
