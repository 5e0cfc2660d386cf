//! The metrics: which there are, and what each takes from a view of the fleet. Base units; identities as labels, names only in
//! `dunlin_vm_info`. A VM that has ended is in no view, and so in no scrape.
//!
//! Pure: a scrape reads a view that is there, and nothing of the host.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::model::PAGE_SIZE;
use crate::model::curve::SHOWN_MS;
use crate::service::fleet::{FleetReader, FleetView, FleetVm};
use crate::track::Regime;

/// What a scrape's answer is.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// How a value behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It goes up and down.
    Gauge,
    /// It only grows, while its VM and this process live; its name ends in `_total` in the scrape.
    Counter,
    /// Always 1: its labels say something.
    Info,
}

/// One value with its labels.
type Sample = (Vec<(&'static str, String)>, f64);

/// One metric.
pub struct Metric {
    /// Its name, without the ending that its kind adds.
    pub name: &'static str,
    /// How it behaves.
    pub kind: Kind,
    /// What it says.
    pub help: &'static str,
    /// Whether there is one for each vCPU, which is asked for.
    pub per_vcpu: bool,
    samples: fn(&FleetView) -> Vec<Sample>,
}

impl Metric {
    /// Its name in the scrape.
    pub fn full_name(&self) -> String {
        let ending = match self.kind {
            Kind::Gauge => "",
            Kind::Counter => "_total",
            Kind::Info => "_info",
        };
        format!("{}{ending}", self.name)
    }
}

impl fmt::Debug for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

const fn metric(name: &'static str, kind: Kind, help: &'static str, samples: fn(&FleetView) -> Vec<Sample>) -> Metric {
    Metric { name, kind, help, per_vcpu: false, samples }
}

const fn vcpu_metric(name: &'static str, help: &'static str, samples: fn(&FleetView) -> Vec<Sample>) -> Metric {
    Metric { name, kind: Kind::Gauge, help, per_vcpu: true, samples }
}

/// All of them.
pub const METRICS: [Metric; 34] = [
    metric("dunlin_agent", Kind::Info, "The agent", |view| {
        let version = ("version", env!("CARGO_PKG_VERSION").to_owned());
        vec![(vec![version, ("backend", view.watching.backend.to_owned())], 1.0)]
    }),
    metric("dunlin_last_look_timestamp_seconds", Kind::Gauge, "When the agent last looked at its VMs", |view| {
        one(view.unix_ms as f64 / 1e3)
    }),
    metric("dunlin_vms", Kind::Gauge, "KVM VMs of this host", |view| one(view.vms.len() as f64)),
    metric("dunlin_vm", Kind::Info, "A VM's names and its process", |view| {
        let of = |vm: &FleetVm| {
            let host = match vm.host {
                crate::service::inventory::Host::Hosted => "hosted",
                crate::service::inventory::Host::Foreign => "foreign",
            };
            let mut labels = identity(vm);
            labels.extend([("name", vm.name.clone()), ("vmm", vm.vmm.clone()), ("host", host.to_owned())]);
            labels.push(("pid", vm.pid.to_string()));
            (labels, 1.0)
        };
        distinct(view).map(of).collect()
    }),
    metric("dunlin_vm_memory_bytes", Kind::Gauge, "Memory that the guest can write", |view| {
        each(view, |vm| vm.memory_bytes.map(|bytes| bytes as f64))
    }),
    metric("dunlin_vm_vcpus", Kind::Gauge, "A VM's vCPUs", |view| each(view, |vm| Some(vm.vcpus.len() as f64))),
    metric("dunlin_vm_logged_bytes", Kind::Gauge, "Memory whose dirty log is on: a migration, most likely", |view| {
        each(view, |vm| Some(vm.logged_bytes as f64))
    }),
    metric(
        "dunlin_vm_dirty_bytes_per_second",
        Kind::Gauge,
        "How fast a VM's memory turns dirty, and under which regime that was seen: passive is a lower bound",
        |view| {
            let with = |vm: &FleetVm, regime: Regime, value: f64| {
                let mut labels = identity(vm);
                labels.push(("regime", regime.word().to_owned()));
                (labels, value)
            };
            let of = |vm: &FleetVm| {
                let now = vm.rate.as_ref().map(|rate| with(vm, rate.regime, rate.bytes_per_second));
                let armed = vm.armed.as_ref().map(|armed| with(vm, Regime::Armed, armed.unique_bytes_per_second));
                now.into_iter().chain(armed).collect::<Vec<_>>()
            };
            distinct(view).flat_map(of).collect()
        },
    ),
    metric(
        "dunlin_vm_unique_bytes",
        Kind::Gauge,
        "U(t): different bytes, in whole pages, written in an interval of length t, by the last window of write protection",
        |view| {
            let of = |vm: &FleetVm| {
                let Some(armed) = &vm.armed else { return Vec::new() };
                let measured = SHOWN_MS.into_iter().filter(|ms| ms * 1_000_000 <= armed.window_ns);
                let value = |ms: u64| {
                    let mut labels = identity(vm);
                    labels.push(("window", format!("{ms}ms")));
                    (labels, armed.curve.at_ns((ms * 1_000_000) as f64).unique_pages * PAGE_SIZE as f64)
                };
                measured.map(value).collect::<Vec<_>>()
            };
            distinct(view).flat_map(of).collect()
        },
    ),
    metric(
        "dunlin_vm_last_interval_unique_bytes",
        Kind::Gauge,
        "Different bytes, in whole pages, that turned writable in the last interval",
        |view| each(view, |vm| vm.rate.as_ref().filter(|_| vm.unique_known).map(|rate| rate.unique_bytes as f64)),
    ),
    metric(
        "dunlin_vm_converges",
        Kind::Gauge,
        "Whether pre-copy would get within the agent's terms, by the last window: 1 or 0",
        |view| {
            each(view, |vm| {
                let forecast = vm.armed.as_ref()?.forecast.as_ref()?;
                Some(f64::from(u8::from(forecast.expected.converges)))
            })
        },
    ),
    metric("dunlin_vm_rogues", Kind::Gauge, "Writers that keep a VM from converging", |view| {
        each(view, |vm| Some(vm.armed.as_ref()?.rogues.len() as f64))
    }),
    metric(
        "dunlin_vm_rogue_process_bytes_per_second",
        Kind::Gauge,
        "Different pages that a rogue process of a guest writes, by the last window",
        |view| {
            let of = |vm: &FleetVm| {
                let rogues = vm.armed.iter().flat_map(|armed| &armed.rogue_processes);
                let value = |rogue: &crate::service::fleet::RogueProcess| {
                    let mut labels = identity(vm);
                    labels.extend([("vcpu", rogue.vcpu.to_string()), ("guest_pid", rogue.pid.clone())]);
                    labels.push(("process", rogue.name.clone()));
                    (labels, rogue.bytes_per_second)
                };
                rogues.map(value).collect::<Vec<_>>()
            };
            distinct(view).flat_map(of).collect()
        },
    ),
    metric("dunlin_vm_armed_windows", Kind::Counter, "Windows of write protection", |view| {
        each(view, |vm| Some(vm.armed.as_ref()?.windows as f64))
    }),
    metric(
        "dunlin_vm_exits",
        Kind::Counter,
        "Exits by reason: to=kvm from guest code, to=vmm from KVM to the VMM; the second are among the first",
        |view| {
            let of = |vm: &FleetVm| {
                let value = |exit: &crate::service::fleet::ExitRate| {
                    let mut labels = identity(vm);
                    labels.extend([("to", exit.to.to_owned()), ("reason", exit.reason.clone())]);
                    (labels, exit.count as f64)
                };
                vm.exits.iter().map(value).collect::<Vec<_>>()
            };
            distinct(view).flat_map(of).collect()
        },
    ),
    metric(
        "dunlin_vm_unique_known",
        Kind::Gauge,
        "Whether the bitmap has room for a VM's different pages: 1 or 0",
        |view| each(view, |vm| Some(f64::from(u8::from(vm.unique_known)))),
    ),
    metric("dunlin_vm_stunned", Kind::Gauge, "Whether writers of a hosted VM have a limit: 1 or 0", |view| {
        each(view, |vm| Some(f64::from(u8::from(vm.throttle.as_ref()?.stunned))))
    }),
    metric(
        "dunlin_vm_guest_time_lost_seconds",
        Kind::Counter,
        "How long the vCPUs of a hosted VM, all together, were held so that they write less",
        |view| each(view, |vm| Some(vm.throttle.as_ref()?.guest_time_lost_ns as f64 / 1e9)),
    ),
    vcpu_metric("dunlin_vcpu_limit_bytes_per_second", "What a vCPU that is slowed may write, in whole pages", |view| {
        each_vcpu(view, |vm, vcpu| {
            let throttled = vm.throttle.as_ref()?.vcpus.iter().find(|throttled| throttled.vcpu == vcpu.index)?;
            Some(throttled.limit_pages_per_second? * PAGE_SIZE as f64)
        })
    }),
    vcpu_metric("dunlin_vcpu_dirty_bytes_per_second", "A vCPU's part of its VM's rate", |view| {
        each_vcpu(view, |_, vcpu| Some(vcpu.pages_per_second * PAGE_SIZE as f64))
    }),
    vcpu_metric("dunlin_vcpu_exits_per_second", "A vCPU's exits to the VMM", |view| {
        each_vcpu(view, |_, vcpu| Some(vcpu.exits_per_second))
    }),
    vcpu_metric("dunlin_vcpu_cpu_ratio", "The part of a CPU that a vCPU's thread had", |view| {
        each_vcpu(view, |_, vcpu| vcpu.cpu_share)
    }),
    metric("dunlin_source_up", Kind::Gauge, "Whether a source of the probe plan is there: 1 or 0", |view| {
        let sources = view.watching.sources.iter();
        sources.map(|source| (vec![("source", source.name.to_owned())], f64::from(u8::from(source.up)))).collect()
    }),
    metric("dunlin_sources_shed", Kind::Gauge, "Sources that are away because of the budget", |view| {
        one(view.watching.shed.len() as f64)
    }),
    metric("dunlin_bpf_run_seconds", Kind::Counter, "CPU time of a BPF program since it was loaded", |view| {
        let programs = view.watching.programs.iter();
        programs.map(|of| (vec![("program", of.program.to_owned())], of.run_time_ns as f64 / 1e9)).collect()
    }),
    metric("dunlin_bpf_runs", Kind::Counter, "Runs of a BPF program since it was loaded", |view| {
        let programs = view.watching.programs.iter();
        programs.map(|of| (vec![("program", of.program.to_owned())], of.runs as f64)).collect()
    }),
    metric(
        "dunlin_bpf_budget_ratio",
        Kind::Gauge,
        "What all BPF programs used of what they may use; absent where the kernel does not count it",
        |view| {
            let watching = &view.watching;
            watching.used_share_of_core.map_or_else(Vec::new, |used| one(used / watching.budget_share_of_core))
        },
    ),
    metric(
        "dunlin_bpf_above_budget",
        Kind::Gauge,
        "More than the budget is used, and nothing more can be shed: 1 or 0",
        |view| one(f64::from(u8::from(view.watching.above_budget))),
    ),
    metric("dunlin_lost_events", Kind::Counter, "Events that were not counted in full, of all VMs", |view| {
        let lost = &view.watching.lost_events_total;
        let all = [
            ("out_of_range", lost.out_of_range),
            ("threads_full", lost.threads_full),
            ("exits_full", lost.exits_full),
            ("too_large", lost.too_large),
            ("unreadable", lost.unreadable),
            ("unattributed", lost.unattributed),
        ];
        all.into_iter().map(|(reason, count)| (vec![("reason", reason.to_owned())], count as f64)).collect()
    }),
    metric("dunlin_agent_cpu_ratio", Kind::Gauge, "The part of a CPU that looking took, BPF programs apart", |view| {
        one(view.watching.own_share_of_core)
    }),
    metric(
        "dunlin_agent_loaded",
        Kind::Gauge,
        "Whether BPF programs are loaded, as they are while there is a VM: 1 or 0",
        |view| one(f64::from(u8::from(view.watching.loaded))),
    ),
    metric(
        "dunlin_agent_problem",
        Kind::Gauge,
        "Whether programs could not be loaded although there is a VM: 1 or 0",
        |view| one(f64::from(u8::from(view.watching.problem.is_some()))),
    ),
    metric(
        "dunlin_address_conflicts",
        Kind::Gauge,
        "Ethernet and IP addresses that two VMs of this host share on one bridge",
        |view| view.addresses.as_ref().map_or_else(Vec::new, |book| one(book.conflicts.len() as f64)),
    ),
    metric("dunlin_vms_without_address", Kind::Gauge, "VMs of which no IP address is known", |view| {
        view.addresses.as_ref().map_or_else(Vec::new, |book| one(book.without_address() as f64))
    }),
];

fn one(value: f64) -> Vec<Sample> {
    vec![(Vec::new(), value)]
}

fn identity(vm: &FleetVm) -> Vec<(&'static str, String)> {
    vec![("vm_uuid", vm.vm_id.to_string())]
}

/// The VMs, each identity once: a VM that moves within one host has two processes, of which the older tells until it ends.
fn distinct(view: &FleetView) -> impl Iterator<Item = &FleetVm> {
    let mut vms: Vec<&FleetVm> = view.vms.iter().collect();
    vms.sort_by_key(|vm| (vm.start_time_ticks, vm.pid));
    let mut seen = BTreeSet::new();
    vms.retain(|vm| seen.insert(vm.vm_id));
    vms.sort_by(|a, b| a.name.cmp(&b.name).then(a.pid.cmp(&b.pid)));
    vms.into_iter()
}

fn each(view: &FleetView, value: impl Fn(&FleetVm) -> Option<f64>) -> Vec<Sample> {
    distinct(view).filter_map(|vm| Some((identity(vm), value(vm)?))).collect()
}

fn each_vcpu(
    view: &FleetView,
    value: impl Fn(&FleetVm, &crate::service::fleet::FleetVcpu) -> Option<f64>,
) -> Vec<Sample> {
    let of = |vm: &FleetVm| {
        let with = |vcpu: &crate::service::fleet::FleetVcpu| {
            let mut labels = identity(vm);
            labels.push(("vcpu", vcpu.index.to_string()));
            Some((labels, value(vm, vcpu)?))
        };
        vm.vcpus.iter().filter_map(with).collect::<Vec<_>>()
    };
    distinct(view).flat_map(of).collect()
}

/// A label's value as the text format wants it. Names come from the command lines of other processes, and the encoder writes what it is given.
fn escaped(value: &str) -> Cow<'_, str> {
    if value.contains(['\\', '"', '\n']) {
        Cow::Owned(value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
    } else {
        Cow::Borrowed(value)
    }
}

/// The newest view, as metrics.
#[derive(Debug)]
struct FleetCollector {
    fleet: FleetReader,
    per_vcpu: bool,
}

impl Collector for FleetCollector {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        encode(&self.fleet.view(), self.per_vcpu, encoder)
    }
}

/// One view that does not change.
#[cfg(test)]
#[derive(Debug)]
pub(super) struct ViewCollector(pub(super) FleetView, pub(super) bool);

#[cfg(test)]
impl Collector for ViewCollector {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        encode(&self.0, self.1, encoder)
    }
}

fn encode(view: &FleetView, per_vcpu: bool, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
    // Before the first look there is nothing to say, and zeros would be wrong.
    if view.sequence == 0 {
        return Ok(());
    }
    for metric in METRICS.iter().filter(|metric| per_vcpu || !metric.per_vcpu) {
        let samples = (metric.samples)(view);
        if samples.is_empty() {
            continue;
        }
        let kind = match metric.kind {
            Kind::Gauge => MetricType::Gauge,
            Kind::Counter => MetricType::Counter,
            Kind::Info => MetricType::Info,
        };
        let mut descriptor = encoder.encode_descriptor(metric.name, metric.help, None, kind)?;
        for (labels, value) in samples {
            let labels: Vec<(&str, Cow<'_, str>)> =
                labels.iter().map(|(name, value)| (*name, escaped(value))).collect();
            match metric.kind {
                Kind::Info => descriptor.encode_info(&labels)?,
                Kind::Gauge if labels.is_empty() => descriptor.encode_gauge(&value)?,
                Kind::Gauge => ConstGauge::new(value).encode(descriptor.encode_family(&labels)?)?,
                Kind::Counter => ConstCounter::new(value).encode(descriptor.encode_family(&labels)?)?,
            }
        }
    }
    Ok(())
}

/// The one registry of an agent.
pub(super) fn registry(fleet: FleetReader, per_vcpu: bool) -> Registry {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(FleetCollector { fleet, per_vcpu }));
    registry
}

/// A scrape's answer.
pub(super) fn text(registry: &Registry) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = prometheus_client::encoding::text::encode(&mut text, registry);
    text
}
