//! What this host can do, found out by really trying: one table of name, reason, trial and remedy.
//!
//! Owns which trial matters to whom. What can be seen of a VM is tried by the one plan that the loader and the metrics have too ([`super::sources`]),
//! so what is shown here and what is attached later cannot differ.

use std::io;
use std::path::PathBuf;

use serde::Serialize;

use super::sources::{SOURCES, Tried};
use crate::model::schema::Schema;
use crate::probe::{self, Attach};
use crate::trial::{self, Verdict};

/// What a capability is needed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tier {
    /// Running and moving a VM. Without it dunlin is of no use on this host.
    Required,
    /// The VM's network, and announcing its new place.
    Network,
    /// Watching how VMs write.
    Tracking,
    /// Better where it is there.
    Optional,
}

/// One line of the table.
struct Check {
    name: &'static str,
    tier: Tier,
    why: &'static str,
    remedy: &'static str,
    trial: fn(&Paths) -> io::Result<String>,
}

/// The folders to try.
#[derive(Clone, Debug)]
pub struct Paths {
    /// Where VMs are listed.
    pub run_dir: PathBuf,
    /// Where the journal is.
    pub state_dir: PathBuf,
}

const LOAD_KVM: &str = "load kvm_intel or kvm_amd (in a VM: switch nested virtualisation on), and give this user access to \
                        /dev/kvm";
const NEWER_KERNEL: &str = "use a newer kernel; other ways of doing the same stay available";
const BPF_RIGHTS: &str = "run as root, or with CAP_BPF and CAP_PERFMON; a host that locks BPF down cannot track";
const NET_RIGHTS: &str = "run as root, or with CAP_NET_ADMIN and CAP_NET_RAW";

const CHECKS: [Check; 18] = [
    Check { name: "kvm", tier: Tier::Required, why: "runs VMs", remedy: LOAD_KVM, trial: |_| trial::kvm::create_vm() },
    Check {
        name: "kvm-guest",
        tier: Tier::Required,
        why: "runs guest code and sees what it writes",
        remedy: LOAD_KVM,
        trial: |_| trial::kvm::run_vm(),
    },
    Check {
        name: "memory-file",
        tier: Tier::Required,
        why: "holds guest RAM where machine and migration manager both map it",
        remedy: "allow memfd_create with seals (Linux 3.17; a seccomp filter may forbid it)",
        trial: |_| trial::memory::sealed_memory_file(),
    },
    Check {
        name: "run-dir",
        tier: Tier::Required,
        why: "lists VMs and holds their sockets",
        remedy: "run as root, or choose another --run-dir",
        trial: |paths| trial::files::run_folder(&paths.run_dir),
    },
    Check {
        name: "state-dir",
        tier: Tier::Required,
        why: "holds the journal that says who may run a VM",
        remedy: "run as root, or choose another --state-dir on a real disk",
        trial: |paths| trial::files::state_folder(&paths.state_dir),
    },
    Check {
        name: "manual-protect",
        tier: Tier::Optional,
        why: "re-arms the dirty bitmap piece by piece, and starts it without a stop",
        remedy: NEWER_KERNEL,
        trial: |_| trial::kvm::manual_protect(),
    },
    Check {
        name: "dirty-ring",
        tier: Tier::Optional,
        why: "`--dirty-log ring`: says which vCPU wrote",
        remedy: NEWER_KERNEL,
        trial: |_| trial::kvm::dirty_ring(),
    },
    Check {
        name: "user-faults",
        tier: Tier::Optional,
        why: "post-copy: fetches a page when the guest touches it",
        remedy: "run as root, or set vm.unprivileged_userfaultfd=1; needs Linux 5.14",
        trial: |_| trial::memory::user_faults(),
    },
    Check {
        name: "huge-pages",
        tier: Tier::Optional,
        why: "2 MiB pages in memory files: receiving and running are faster",
        remedy: "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        trial: |_| trial::memory::huge_pages(),
    },
    Check {
        name: "netns",
        tier: Tier::Network,
        why: "hosts of the demo and of the tests",
        remedy: "run as root",
        trial: |_| trial::net::namespace(),
    },
    Check {
        name: "tap",
        tier: Tier::Network,
        why: "a VM's network port",
        remedy: NET_RIGHTS,
        trial: |_| trial::net::tap(),
    },
    Check {
        name: "raw-socket",
        tier: Tier::Network,
        why: "announces the VM's new place",
        remedy: NET_RIGHTS,
        trial: |_| trial::net::raw_socket(),
    },
    Check {
        name: "wireguard",
        tier: Tier::Optional,
        why: "`--tunnel wireguard`: a VM keeps its addresses in another subnet by an encrypted tunnel",
        remedy: "Linux 5.6 with its module `wireguard`; --tunnel vxlan needs none",
        trial: |_| trial::net::wireguard(),
    },
    Check {
        name: "bpf-map",
        tier: Tier::Tracking,
        why: "counts in the kernel, is read with no system call",
        remedy: BPF_RIGHTS,
        trial: |_| trial::bpf::map(),
    },
    Check {
        name: "bpf-raw-tracepoint",
        tier: Tier::Tracking,
        why: "how dunlin listens to KVM",
        remedy: BPF_RIGHTS,
        trial: |_| trial::bpf::raw_tracepoint(),
    },
    Check {
        name: "bpf-typed-tracepoint",
        tier: Tier::Optional,
        why: "listens with less overhead",
        remedy: "a kernel with CONFIG_DEBUG_INFO_BTF; raw tracepoints do the same",
        trial: |_| trial::bpf::typed_tracepoint(),
    },
    Check {
        name: "bpf-function-entry",
        tier: Tier::Optional,
        why: "sees pages that KVM logs without a tracepoint, at less cost than a kernel probe",
        remedy: "a kernel with CONFIG_FUNCTION_TRACER that allows it; a kernel probe does the same",
        trial: |_| trial::bpf::function_entry(),
    },
    Check {
        name: "type-information",
        tier: Tier::Tracking,
        why: "finds the guest frame in faults that KVM resolves without its lock",
        remedy: "a kernel with CONFIG_DEBUG_INFO_BTF; without it those faults count as lost",
        trial: |_| trial::bpf::type_information(),
    },
];

/// Tracepoints that other KVM backends emit and that tell more: what for.
const MORE_TRACEPOINTS: [(&str, &str); 1] = [("kvm_page_fault", "faults by guest address")];

/// All findings.
#[derive(Clone, Debug, Serialize)]
pub struct DoctorReport {
    /// Whether nothing that is required is missing.
    pub ready: bool,
    /// Linux, as `uname -r` says.
    pub kernel: String,
    /// Line by line.
    pub checks: Vec<Finding>,
}

impl Schema for DoctorReport {
    const SCHEMA: &'static str = "dunlin.doctor/v1";
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The capability.
    pub name: String,
    /// What it is needed for.
    pub tier: Tier,
    /// What it is for.
    pub why: String,
    /// What the trial showed.
    pub result: ResultKind,
    /// How well it works, or why it does not.
    pub detail: String,
    /// What to do, where it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// [`Verdict`] without its words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResultKind {
    /// It works.
    Works,
    /// The kernel, or the machine under it, lacks it.
    Missing,
    /// The policy of the host forbids it.
    Refused,
    /// It is there, was tried, and did not do what it must (`--prove` only).
    Failed,
}

/// Tries everything.
pub fn examine(paths: &Paths) -> DoctorReport {
    let mut checks: Vec<Finding> = CHECKS
        .iter()
        .map(|check| {
            let verdict = Verdict::from_trial((check.trial)(paths));
            finding(check.name, check.tier, check.why, verdict, check.remedy)
        })
        .collect();
    checks.push(object());
    checks.extend(plan());
    let ready = checks.iter().all(|check| check.tier != Tier::Required || check.result == ResultKind::Works);
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    DoctorReport { ready, kernel, checks }
}

fn finding(name: impl Into<String>, tier: Tier, why: impl Into<String>, verdict: Verdict, remedy: &str) -> Finding {
    let (result, detail) = match verdict {
        Verdict::Works(detail) => (ResultKind::Works, detail),
        Verdict::Missing(detail) => (ResultKind::Missing, detail),
        Verdict::Refused(detail) => (ResultKind::Refused, detail),
    };
    let remedy = (result != ResultKind::Works).then(|| remedy.to_owned());
    Finding { name: name.into(), tier, why: why.into(), result, detail, remedy }
}

/// Whether this binary has its BPF programs, and the kernel takes them: loaded and attached for this very process.
fn object() -> Finding {
    let options = probe::ProbeOptions { pid: std::process::id(), frames: crate::model::PageCount(64), log: false };
    let verdict = match probe::KernelCounters::attach(options) {
        Ok(counters) => {
            use crate::port::EventSource;
            let missing: Vec<String> = counters
                .hooks()
                .iter()
                .filter_map(|hook| Some(format!("{} ({})", hook.name, hook.missing.as_ref()?)))
                .collect();
            if missing.is_empty() {
                let ways = ways(&counters.probes().ways());
                Verdict::Works(format!("{} programs loaded and attached: {ways}", counters.hooks().len()))
            } else {
                Verdict::Missing(format!("not attached: {}", missing.join(", ")))
            }
        }
        Err(error @ probe::ProbeError::Refused(_)) => Verdict::Refused(error.to_string()),
        Err(error) => Verdict::Missing(error.to_string()),
    };
    let remedy = "as it says; a kernel that refuses only some of the programs still tracks with the others";
    finding("bpf-programs", Tier::Tracking, "dunlin's own programs", verdict, remedy)
}

/// How the programs of each source are attached, and why not in a faster way.
fn ways(attached: &[probe::Way]) -> String {
    let of_source = SOURCES.iter().filter_map(|source| {
        let mut words: Vec<String> = Vec::new();
        for hook in source.hooks() {
            let Some(way) = attached.iter().find(|way| way.hook == hook) else { continue };
            let how = match &way.slower_because {
                Some(why) => format!("{} (no function entry: {why})", way.attach.words()),
                None => way.attach.words().to_owned(),
            };
            if !words.contains(&how) {
                words.push(how);
            }
        }
        (!words.is_empty()).then(|| format!("{} by {}", source.name, words.join(" and ")))
    });
    of_source.collect::<Vec<_>>().join(", ")
}

/// The probe plan: which of KVM's tracepoints are really emitted while a VM runs (some KVM backends have them and never do), and the
/// sources that are tried another way.
fn plan() -> Vec<Finding> {
    let mut tracepoints: Vec<(&str, &str, Tier)> = Vec::new();
    let mut findings = Vec::new();
    for source in &SOURCES {
        match source.tried {
            // A source is needed as much as the first of its programs; the others see what that one cannot.
            Tried::Attaching(_) => {
                let hooks = source.hooks().filter(|hook| hook.attach == Attach::RawTracepoint);
                let tier = |index| if index == 0 { source.tier } else { Tier::Optional };
                tracepoints.extend(hooks.enumerate().map(|(index, hook)| (hook.place, hook.what, tier(index))));
            }
            Tried::By(trial) => {
                let why = format!("{}; attributed to: {}", source.gives, source.attributes);
                let remedy = format!("needs {}; dunlin uses what there is", source.needs);
                findings.push(finding(source.name, source.tier, why, Verdict::from_trial(trial()), &remedy));
            }
        }
    }
    tracepoints.extend(MORE_TRACEPOINTS.iter().map(|&(name, gives)| (name, gives, Tier::Optional)));
    let names: Vec<&str> = tracepoints.iter().map(|&(name, ..)| name).collect();
    let run_both = || trial::kvm::run_vm().and_then(|_| trial::kvm::dirty_ring()).map(drop);
    let counts = trial::bpf::emitted(&names, run_both);
    let emitted = tracepoints.iter().enumerate().map(|(index, &(name, gives, tier))| {
        let count = match &counts {
            Ok(counts) => counts[index].as_ref().map(|count| *count),
            Err(error) => Err(error),
        };
        let verdict = match count {
            Ok(0) => Verdict::Missing("is there, and was never emitted while a VM ran and wrote".to_owned()),
            Ok(count) => Verdict::Works(format!("emitted {count} times while a VM ran and wrote")),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                Verdict::Missing("this kernel has no such tracepoint (is KVM loaded?)".to_owned())
            }
            Err(error) => Verdict::of(error),
        };
        let remedy = if tier == Tier::Tracking {
            "another KVM backend or a newer kernel; without it only a VM's own dirty log can be read"
        } else {
            "nothing: this KVM backend works another way, and dunlin uses what there is"
        };
        finding(name, tier, gives, verdict, remedy)
    });
    emitted.chain(findings).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_required_decides() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths { run_dir: folder.path().to_owned(), state_dir: PathBuf::from("/proc/nowhere") };
        let report = examine(&paths);
        assert!(!report.ready, "a journal in /proc was accepted");
        for check in &report.checks {
            assert_eq!(check.remedy.is_some(), check.result != ResultKind::Works, "{check:?}");
            assert!(check.result == ResultKind::Works || !check.detail.is_empty(), "{check:?}");
        }
        let names: std::collections::BTreeSet<_> = report.checks.iter().map(|check| &check.name).collect();
        assert_eq!(names.len(), report.checks.len(), "a name is used twice");
    }

    #[test]
    fn policy_and_lack_are_told_apart() {
        let of = |errno| Verdict::of(&io::Error::from_raw_os_error(errno));
        assert!(matches!(of(libc::EPERM), Verdict::Refused(_)));
        assert!(matches!(of(libc::EACCES), Verdict::Refused(_)));
        assert!(matches!(of(libc::ENOENT), Verdict::Missing(_)));
        assert!(matches!(of(libc::EINVAL), Verdict::Missing(_)));
    }
}
