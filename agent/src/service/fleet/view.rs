//! What the fleet shows of itself after each interval: plain values, the same for the terminal, for JSON and for metrics.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::Serialize;

use crate::model::addresses::AddressBook;
use crate::model::schema::Schema;
use crate::model::{ThrottleView, VmId, WriteCurve};
use crate::service::inventory::Host;
use crate::service::observe::MissingSource;
use crate::service::rogues::Rogue;
use crate::service::sources::SourceState;
use crate::track::{DirtyRate, Forecast, Lost, Ranking, Regime};

/// How many intervals a VM's history holds.
pub const HISTORY: usize = 60;

/// All KVM VMs of this host after one interval.
#[derive(Clone, Debug, Serialize)]
pub struct FleetView {
    /// Counts the views of one fleet, from 1.
    pub sequence: u64,
    /// When it was taken, in milliseconds since 1970.
    pub unix_ms: u64,
    /// How long the fleet lets pass between two views.
    pub interval_ns: u64,
    /// The VMs, by name and process id.
    pub vms: Vec<FleetVm>,
    /// What watching costs and what is missing.
    pub watching: Watching,
    /// Who has which addresses, where that is kept; told by itself.
    #[serde(skip)]
    pub addresses: Option<Arc<AddressBook>>,
}

impl Schema for FleetView {
    const SCHEMA: &'static str = "dunlin.fleet/v1";
}

impl FleetView {
    /// What there is before the first look.
    pub(super) fn before_the_first(interval_ns: u64, watching: Watching) -> Self {
        Self { sequence: 0, unix_ms: 0, interval_ns, vms: Vec::new(), watching, addresses: None }
    }
}

impl Schema for FleetVm {
    const SCHEMA: &'static str = "dunlin.fleet-vm/v1";
}

/// One VM of the fleet.
#[derive(Clone, Debug, Serialize)]
pub struct FleetVm {
    /// Its name: its own, or its VMM's and its process id.
    pub name: String,
    /// Its identity.
    pub vm_id: VmId,
    /// Whether dunlin runs it.
    pub host: Host,
    /// The VMM.
    pub vmm: String,
    /// Its process.
    pub pid: u32,
    /// When that process started, in clock ticks since boot.
    pub start_time_ticks: u64,
    /// Memory that the guest can write; absent where that is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Bytes of its memory whose dirty log is on.
    pub logged_bytes: u64,
    /// What is not known of it, or not counted, and why.
    pub notes: Vec<String>,
    /// Whether its different pages are counted; without, `rate.unique_pages` is 0 and means nothing.
    pub unique_known: bool,
    /// The last interval; absent before the first is over, and while the VM cannot be counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<DirtyRate>,
    /// Exits to the VMM per second, all reasons.
    pub exits_per_second: f64,
    /// Exits from guest code per second, those that KVM handles itself among them; 0 where this KVM backend does not tell them.
    pub guest_exits_per_second: f64,
    /// Exits by reason, those that were most frequent in the last interval first; at most 32.
    pub exits: Vec<ExitRate>,
    /// Its vCPUs, by number.
    pub vcpus: Vec<FleetVcpu>,
    /// Rates of the last intervals, oldest first, at most [`HISTORY`].
    pub history: VecDeque<PastRate>,
    /// The last window of write protection; absent before the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub armed: Option<ArmedView>,
    /// Why the last try at one came to nothing; absent when it did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub armed_problem: Option<String>,
    /// How its writers are slowed; absent of a foreign VM, and until its process has said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub throttle: Option<ThrottleView>,
}

/// Exits for one reason.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExitRate {
    /// `kvm`: from guest code; `vmm`: from KVM to the VMM. The second are among the first.
    pub to: &'static str,
    /// Why, as KVM or the processor names it.
    pub reason: String,
    /// How many since its counting began.
    pub count: u64,
    /// How many per second, in the last interval.
    pub exits_per_second: f64,
    /// Mean time until it was back; absent where that is not told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean_ns: Option<f64>,
}

/// One vCPU.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FleetVcpu {
    /// Its number.
    pub index: u32,
    /// The thread that runs it; absent before its first run, and where the kernel's structures cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thread_id: Option<u32>,
    /// Its pages per second, in the regime of the VM's rate.
    pub pages_per_second: f64,
    /// Its exits to the VMM per second.
    pub exits_per_second: f64,
    /// Its exits from guest code per second.
    pub guest_exits_per_second: f64,
    /// The part of one CPU that its thread had in the interval, guest and host together, 0 to 1; absent where it is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_share: Option<f64>,
}

/// One past interval's rate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PastRate {
    /// Bytes per second.
    pub bytes_per_second: f64,
    /// Under which conditions.
    pub regime: Regime,
}

/// What one window of write protection showed.
#[derive(Clone, Debug, Serialize)]
pub struct ArmedView {
    /// When it ended, in milliseconds since 1970.
    pub unix_ms: u64,
    /// Its length.
    pub window_ns: u64,
    /// Different pages that were written in it.
    pub unique_pages: u64,
    /// The same per second, in bytes.
    pub unique_bytes_per_second: f64,
    /// U(t): different pages written in an interval of length t.
    pub curve: WriteCurve,
    /// Whether pre-copy would get there, on the fleet's terms; absent where there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forecast: Option<Forecast>,
    /// Who writes how much, and who would have to write less, on the fleet's terms; likewise. Only the largest writers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranking: Option<Ranking>,
    /// Who stayed above the line in three of the last four windows.
    pub rogues: Vec<Rogue>,
    /// Windows of this VM so far.
    pub windows: u64,
    /// Why address spaces have no names of processes; absent where they have, and while they are looked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub names_missing: Option<String>,
    /// Those rogues that are named processes of the guest, as metrics tell them: of at most 64 different names while the VM lives.
    #[serde(skip)]
    pub rogue_processes: Vec<RogueProcess>,
}

/// A rogue process on one vCPU, or all that are not told apart.
#[derive(Clone, Debug, PartialEq)]
pub struct RogueProcess {
    /// The vCPU's number.
    pub vcpu: u32,
    /// Its number in the guest; empty for those that are not told apart.
    pub pid: String,
    /// Its name in the guest, or `other`.
    pub name: String,
    /// What it writes, different pages in bytes per second.
    pub bytes_per_second: f64,
}

/// What watching costs, and what is not seen.
#[derive(Clone, Debug, Serialize)]
pub struct Watching {
    /// Whether the BPF programs are loaded: they are while there is a VM.
    pub loaded: bool,
    /// Why they are not, although there is a VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// The processor's kind of virtualisation: `svm`, `vmx` or `other`.
    pub backend: &'static str,
    /// What all programs together may take, as a part of one core.
    pub budget_share_of_core: f64,
    /// What they took in the last interval; absent where the kernel does not count it for us, and the budget cannot be kept then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub used_share_of_core: Option<f64>,
    /// Why it is not counted; absent when it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost_unknown: Option<String>,
    /// Whether more than the budget is used although nothing more can be shed.
    pub above_budget: bool,
    /// The programs.
    pub programs: Vec<ProgramView>,
    /// Sources that are away because of the budget.
    pub shed: Vec<ShedView>,
    /// Events of the last interval that were not counted in full, of all VMs.
    pub lost_events: Lost,
    /// The same since the fleet began.
    pub lost_events_total: Lost,
    /// Sources that could not be attached, and why.
    pub missing_sources: Vec<MissingSource>,
    /// All sources of the plan, and whether each is there.
    pub sources: Vec<SourceState>,
    /// What the fleet itself took in the last interval, looking at `/proc` and at maps, as a part of one core.
    pub own_share_of_core: f64,
    /// How often a window of write protection is opened, over all VMs; absent where none is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub armed_every_ns: Option<u64>,
}

/// One program.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ProgramView {
    /// Its name.
    pub program: &'static str,
    /// The tracepoint or function.
    pub place: &'static str,
    /// Whether it is attached.
    pub attached: bool,
    /// Time on a CPU since the fleet began.
    pub run_time_ns: u64,
    /// Runs since then.
    pub runs: u64,
    /// What it took in the last interval, as a part of one core.
    pub share_of_core: f64,
}

/// A source that is away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ShedView {
    /// Its name.
    pub source: String,
    /// Why.
    pub reason: String,
}

/// A throttle of which everything is known.
#[cfg(test)]
pub(crate) fn throttle_sample() -> ThrottleView {
    use crate::model::{MigrationId, ThrottleHolder, VcpuThrottle};
    let migration_id = Some(MigrationId(uuid::Uuid::from_u128(9)));
    ThrottleView {
        stunned: true,
        holder: Some(ThrottleHolder { who: "uid=0 pid=77".to_owned(), migration_id, since_unix_ms: 1_699_999_997_500 }),
        guest_time_lost_ns: 1_250_000_000,
        vcpus: vec![VcpuThrottle {
            vcpu: 0,
            limit_pages_per_second: Some(1000.0),
            pages_per_second: 990.0,
            held_ns: 1_250_000_000,
            co_resident_held_ns: 0,
        }],
    }
}

/// A view with all that can be in one.
#[cfg(test)]
pub(crate) fn sample() -> FleetView {
    use std::time::Duration;

    use crate::model::{BytesPerSecond, CurvePoint, PageCount};
    use crate::port::{EventSample, LostEvents, ThreadEvents};
    use crate::service::rogues;
    use crate::service::sources;
    use crate::track::{Protection, RogueWatch, Terms, forecast, rate_between};

    let thread = ThreadEvents { pages_made_writable: 500, ..ThreadEvents::default() };
    let after = EventSample { threads: [(1, thread)].into(), ..EventSample::default() };
    let second = Duration::from_secs(1);
    let rate = rate_between(&EventSample::default(), &after, second, PageCount(256), Protection::Unseen);
    // Twenty thousand pages a second, each another.
    let points = [5u64, 20, 80, 320].map(|ms| CurvePoint::exact(ms * 1_000_000, ms as f64 * 20.0));
    let curve = WriteCurve::new(points.to_vec()).unwrap();
    let terms = Terms {
        bandwidth: BytesPerSecond(10_000_000),
        downtime: Duration::from_millis(300),
        switch_cost: Duration::from_millis(5),
        rtt: Duration::from_millis(1),
    };
    let writer = crate::model::Writer::Vcpu { index: 0, thread_id: 1 };
    let writers = [crate::service::profile::WriterProfile { writer, share: 1.0, curve: curve.clone() }];
    let ranking = rogues::ranked(&curve, &writers, &terms, crate::track::DEFAULT_MARGIN).unwrap();
    let mut watch = RogueWatch::default();
    for _ in 0..4 {
        watch.observe(&ranking, &std::collections::BTreeMap::new());
    }
    let armed = ArmedView {
        unix_ms: 1,
        window_ns: 320_000_000,
        unique_pages: 6400,
        unique_bytes_per_second: 81_920_000.0,
        forecast: Some(forecast(&curve, PageCount(10_000), &terms).unwrap()),
        rogues: rogues::named(&watch, &ranking),
        ranking: Some(ranking),
        curve,
        windows: 4,
        names_missing: Some(String::new()),
        rogue_processes: vec![RogueProcess {
            vcpu: 0,
            pid: "812".to_owned(),
            name: "stress".to_owned(),
            bytes_per_second: 81_920_000.0,
        }],
    };
    let vm = FleetVm {
        name: "a \"quoted\" name\\".to_owned(),
        vm_id: VmId(uuid::Uuid::from_u128(7)),
        host: Host::Foreign,
        vmm: "qemu".to_owned(),
        pid: 41,
        start_time_ticks: 9,
        memory_bytes: Some(1 << 30),
        logged_bytes: 0,
        notes: vec![String::new()],
        unique_known: true,
        rate: Some(rate),
        exits_per_second: 20.0,
        guest_exits_per_second: 40.0,
        exits: vec![ExitRate {
            to: "vmm",
            reason: "mmio".to_owned(),
            count: 11,
            exits_per_second: 20.0,
            mean_ns: Some(1500.0),
        }],
        vcpus: vec![FleetVcpu {
            index: 0,
            thread_id: Some(1),
            pages_per_second: 500.0,
            exits_per_second: 20.0,
            guest_exits_per_second: 40.0,
            cpu_share: Some(0.25),
        }],
        history: [PastRate { bytes_per_second: 2_048_000.0, regime: Regime::Passive }].into(),
        armed: Some(armed),
        armed_problem: Some(String::new()),
        throttle: Some(throttle_sample()),
    };
    let lost = LostEvents { unreadable: 3, ..LostEvents::default() };
    let [name, gives, reason] = [const { String::new() }; 3];
    FleetView {
        sequence: 3,
        unix_ms: 1_700_000_000_500,
        interval_ns: 1_000_000_000,
        vms: vec![vm],
        watching: Watching {
            loaded: true,
            problem: Some(String::new()),
            backend: "svm",
            budget_share_of_core: 0.01,
            used_share_of_core: Some(0.005),
            cost_unknown: Some(String::new()),
            above_budget: false,
            programs: vec![ProgramView {
                program: "set_spte",
                place: "kvm_mmu_set_spte",
                attached: true,
                run_time_ns: 5_000_000,
                runs: 50_000,
                share_of_core: 0.005,
            }],
            shed: vec![ShedView { source: "guest-exits".to_owned(), reason: "dear".to_owned() }],
            lost_events: lost.into(),
            lost_events_total: lost.into(),
            missing_sources: vec![MissingSource { name, gives, reason }],
            sources: sources::states(None, &[]),
            own_share_of_core: 0.002,
            armed_every_ns: Some(16_000_000_000),
        },
        addresses: Some(Arc::new(address_sample())),
    }
}

/// A map with every member: two VMs that share what they have, and one that left.
#[cfg(test)]
pub(crate) fn address_sample() -> AddressBook {
    use crate::announce::directory::Directory;
    use crate::model::MigrationId;
    use crate::model::addresses::{KnownCard, KnownVm, LeftVm};
    use crate::model::network::{FoundIp, LearntFrom};

    let mac = "02:00:00:00:00:01".parse().unwrap();
    let vm = |number: u128, ips: Vec<FoundIp>, last: u8| KnownVm {
        vm_id: VmId(uuid::Uuid::from_u128(number)),
        vm_name: format!("vm{number}"),
        is_hosted: true,
        pid: 1,
        since_unix_ms: 0,
        came_by: Some(MigrationId(uuid::Uuid::from_u128(1))),
        came_from: Some("192.0.2.1".to_owned()),
        state_dir: Some("/".into()),
        cards: vec![KnownCard {
            tap: "tap0".to_owned(),
            bridge: Some("br0".to_owned()),
            mac: crate::model::MacAddress::new([2, 0, 0, 0, 0, last]).unwrap(),
            from: LearntFrom::Configuration,
            vlan: "42".parse().ok(),
            ips,
        }],
        problem: Some(String::new()),
    };
    let ip = FoundIp { ip: "fd00::1".parse().unwrap(), from: LearntFrom::Configuration, router: Some(true) };
    let mut directory = Directory::default();
    for (number, last) in [(1, 1), (2, 2)] {
        directory.arrive(vm(number, vec![ip], last));
    }
    directory.arrive(vm(3, Vec::new(), 3));
    directory.leave(LeftVm {
        vm_id: VmId(uuid::Uuid::from_u128(4)),
        vm_name: "vm4".to_owned(),
        left_unix_ms: 0,
        went_by: Some(MigrationId(uuid::Uuid::from_u128(2))),
        went_to: Some("192.0.2.2".to_owned()),
        macs: vec![mac],
    });
    directory.book(1, "host")
}
