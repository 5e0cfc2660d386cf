//! The probe plan: every source that tells something of a VM from outside, in one table. The loader asks it what to attach, `dunlin
//! doctor` what to try, the budget what may be done without, and the metrics what is up.
//!
//! Owns which sources there are and what each is worth. How a program is attached is [`crate::probe::HOOKS`]'s business.

use std::io;

use serde::Serialize;

use super::doctor::Tier;
use super::inventory;
use crate::probe::{Gives, HOOKS, Hook, Probes};
use crate::track::SourceSpec;
use crate::trial;

/// How a source is found to work.
#[derive(Clone, Copy, Debug)]
pub enum Tried {
    /// By attaching the BPF programs that give this; one of them is enough. `dunlin doctor` also looks whether their tracepoints are
    /// ever emitted while a VM runs.
    Attaching(Gives),
    /// By something else, once: in words how well it works.
    By(fn() -> io::Result<String>),
}

/// One source.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// Its name: in `dunlin doctor`, in the log, and as label of `dunlin_source_up`.
    pub name: &'static str,
    /// What it tells.
    pub gives: &'static str,
    /// To whom it can put that down.
    pub attributes: &'static str,
    /// What it needs of the host.
    pub needs: &'static str,
    /// How it is tried.
    pub tried: Tried,
    /// What it is needed for.
    pub tier: Tier,
    /// Whether it tells which pages were written.
    pub gives_pages: bool,
}

/// All sources, those that are given up last at the end.
pub const SOURCES: [Source; 8] = [
    Source {
        name: "guest-exits",
        gives: "exits from guest code by reason, and how long KVM took",
        attributes: "vCPU",
        needs: "a KVM backend that emits kvm_exit (Intel, AMD), CAP_BPF and CAP_PERFMON",
        tried: Tried::Attaching(Gives::GuestExits),
        tier: Tier::Optional,
        gives_pages: false,
    },
    Source {
        name: "vmm-exits",
        gives: "exits to the VMM by reason, and how long it took",
        attributes: "vCPU",
        needs: "CAP_BPF and CAP_PERFMON",
        tried: Tried::Attaching(Gives::VmmExits),
        tier: Tier::Optional,
        gives_pages: false,
    },
    Source {
        name: "dirty-ring",
        gives: "pages as KVM pushes them to a dirty ring that someone has switched on, KVM's own writes among them",
        attributes: "vCPU",
        needs: "Linux 5.11, CAP_BPF and CAP_PERFMON",
        tried: Tried::Attaching(Gives::RingPages),
        tier: Tier::Optional,
        gives_pages: true,
    },
    Source {
        name: "dirty-log",
        gives: "pages as KVM marks them in a dirty log that someone has switched on, those that the processor logged by itself among them",
        attributes: "vCPU, guest frame",
        needs: "kernel probes, and an Intel processor with page modification logging (elsewhere page tables tell the same)",
        tried: Tried::Attaching(Gives::HardwareLog),
        tier: Tier::Optional,
        gives_pages: true,
    },
    Source {
        name: "page-tables",
        gives: "pages that turn writable: what is written for the first time, or anew while something write-protects it",
        attributes: "vCPU, guest frame; with the kernel's type information also guest address space and instruction",
        needs: "CAP_BPF and CAP_PERFMON",
        tried: Tried::Attaching(Gives::Pages),
        tier: Tier::Tracking,
        gives_pages: true,
    },
    Source {
        name: "kernel-view",
        gives: "vCPU threads, memory slots, and whether someone has a dirty log on, as the kernel's structures have them",
        attributes: "VM",
        needs: "the kernel's type information (CONFIG_DEBUG_INFO_BTF), CAP_BPF and CAP_PERFMON, and no separate pid namespace",
        tried: Tried::By(kernel_view),
        tier: Tier::Tracking,
        gives_pages: false,
    },
    Source {
        name: "soft-dirty",
        gives: "pages that a process wrote since its memory was marked, at the granularity of its mappings; write-protects a foreign VM with \
                no help from it",
        attributes: "guest frame; what page-tables attributes meanwhile",
        needs: "CONFIG_MEM_SOFT_DIRTY, CAP_SYS_PTRACE, and the operator's permission for that VM",
        tried: Tried::By(trial::memory::soft_dirty),
        tier: Tier::Optional,
        gives_pages: true,
    },
    Source {
        name: "page-sampling",
        gives: "pages whose content changed, of a random sample: an estimate with its interval; works without KVM",
        attributes: "guest frame",
        needs: "CAP_SYS_PTRACE, and the operator's permission for that VM",
        tried: Tried::By(trial::memory::read_of_other_processes),
        tier: Tier::Optional,
        gives_pages: true,
    },
];

impl Source {
    /// Its BPF programs; none for a source without.
    pub fn hooks(&self) -> impl Iterator<Item = &'static Hook> + use<> {
        let gives = match self.tried {
            Tried::Attaching(gives) => Some(gives),
            Tried::By(_) => None,
        };
        HOOKS.iter().filter(move |hook| Some(hook.gives) == gives)
    }
}

/// What the loader is to attach when everything is wanted.
pub fn wanted() -> Vec<Gives> {
    let gives = SOURCES.iter().filter_map(|source| match source.tried {
        Tried::Attaching(gives) => Some(gives),
        Tried::By(_) => None,
    });
    gives.collect()
}

/// What the budget may shed, from the least worth to the most.
pub fn specs() -> Vec<SourceSpec> {
    let attached = SOURCES.iter().filter(|source| matches!(source.tried, Tried::Attaching(_)));
    let specs = attached.map(|source| SourceSpec {
        name: source.name.to_owned(),
        programs: source.hooks().map(|hook| hook.program.to_owned()).collect(),
        gives_pages: source.gives_pages,
    });
    specs.collect()
}

/// What a source of that name gives, if programs bring it.
pub fn gives_of(name: &str) -> Option<Gives> {
    SOURCES.iter().find(|source| source.name == name).and_then(|source| match source.tried {
        Tried::Attaching(gives) => Some(gives),
        Tried::By(_) => None,
    })
}

/// Whether a source is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SourceState {
    /// Its name.
    pub name: &'static str,
    /// Whether it would tell something now, or does.
    pub up: bool,
    /// What it tells.
    pub gives: &'static str,
    /// To whom it can put that down.
    pub attributes: &'static str,
    /// Why it is not there; absent when it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl SourceState {
    fn of(source: &Source, found: Result<(), String>) -> Self {
        let Source { name, gives, attributes, .. } = *source;
        Self { name, up: found.is_ok(), gives, attributes, reason: found.err() }
    }
}

/// The sources that no attaching shows, each tried once.
pub fn try_others() -> Vec<SourceState> {
    let others = SOURCES.iter().filter_map(|source| match source.tried {
        Tried::By(trial) => Some(SourceState::of(source, trial().map(drop).map_err(|error| error.to_string()))),
        Tried::Attaching(_) => None,
    });
    others.collect()
}

/// All sources in the table's order: those of programs as they are attached now, the others as `tried`. Without programs none of theirs
/// is up, as nobody asks.
pub fn states(probes: Option<&Probes>, tried: &[SourceState]) -> Vec<SourceState> {
    let of = |source: &Source| match source.tried {
        Tried::By(_) => tried
            .iter()
            .find(|state| state.name == source.name)
            .cloned()
            .unwrap_or_else(|| SourceState::of(source, Err("was not tried".to_owned()))),
        Tried::Attaching(gives) => {
            let found = probes.map_or_else(|| Err("no VM is watched".to_owned()), |probes| probes.is_attached(gives));
            SourceState::of(source, found)
        }
    };
    SOURCES.iter().map(of).collect()
}

/// Walks the kernel's structures to this very process.
fn kernel_view() -> io::Result<String> {
    let mut probes = inventory::kernel_view().ok_or_else(|| io::Error::other("the programs could not be loaded"))?;
    let me = crate::model::KvmDescriptors { pid: std::process::id(), ..Default::default() };
    match probes.inventory(&[me]).map_err(|error| io::Error::other(error.to_string()))?.pop() {
        Some(Ok(_)) => Ok("this process was found among the kernel's tasks".to_owned()),
        Some(Err(error)) => Err(io::Error::other(error.to_string())),
        None => Err(io::Error::other("no answer")),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_program_belongs_to_one_source_and_every_name_is_used_once() {
        let names: BTreeSet<_> = SOURCES.iter().map(|source| source.name).collect();
        assert_eq!(names.len(), SOURCES.len());
        let programs: Vec<_> = SOURCES.iter().flat_map(|source| source.hooks().map(|hook| hook.program)).collect();
        let all: BTreeSet<_> = HOOKS.iter().map(|hook| hook.program).collect();
        assert_eq!((programs.len(), programs.into_iter().collect::<BTreeSet<_>>()), (HOOKS.len(), all));
    }

    #[test]
    fn what_tells_pages_is_given_up_last() {
        let specs = specs();
        assert!(specs.last().unwrap().gives_pages && specs.last().unwrap().name == "page-tables");
        assert!(!specs.first().unwrap().gives_pages);
        assert!(specs.iter().all(|spec| gives_of(&spec.name).is_some() && !spec.programs.is_empty()));
        assert_eq!(gives_of("soft-dirty"), None);
    }

    #[test]
    fn without_programs_none_of_theirs_is_up_and_what_was_not_tried_says_so() {
        let states = states(None, &[]);
        assert_eq!(states.len(), SOURCES.len());
        assert!(states.iter().all(|state| !state.up && state.reason.is_some()));
    }
}
