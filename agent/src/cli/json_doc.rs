//! The documentation against the program: each schema has a section in `docs/json.md` whose table names exactly the members
//! that are written, and the book's outcome table is the program's.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

use super::{pki, vm};
use crate::kvm::virtio::GuestStats;
use crate::model::network::{
    Conflict, ConflictKind, Followed, FoundCard, FoundIp, FoundVm, LearntFrom, ProbeReport, Seen, StuckCause, Verdict,
};
use crate::model::schema::Schema;
use crate::model::{
    AddressSpace, AnnounceReport, AnnounceRound, AskedReport, BlackoutLedger, BlackoutPhase, BytesPerSecond, Chosen,
    CurvePoint, Ending, Gfn, Gpa, GuestProcess, GuestWrite, Gva, LinkReport, LoanReport, MacAddress, MemoryRange,
    MigrationId, MigrationRecord, MigrationReport, MigrationStatus, NetworkReport, Owner, PageCount, PostCopyReport,
    ReducerReport, RegionHeat, RelayReport, RoundReport, SqueezeReport, Stage, Station, Step, StunReport, TunnelReport,
    VcpuStun, VmId, WaitBucket, WaitReport, WriteCurve, Writer,
};
use crate::port::Protected;
use crate::service::balloon::{BalloonReport, HintReport};
use crate::service::control::Outcome;
use crate::service::doctor::{DoctorReport, Finding, ResultKind, Tier};
use crate::service::exits::{ExitRow, ExitsReport};
use crate::service::machine::{RunState, VmInfo};
use crate::service::observe::{DirtyRateReport, MissingSource, Observed};
use crate::service::profile::{Profile, WindowCost, WriterProfile};
use crate::service::prove::{Figure, Proof, ProofReport};
use crate::service::registry::MachineEntry;
use crate::service::rogues::{Rogue, RogueReport};
use crate::service::stun::{StunStatus, VcpuStatus};
use crate::service::{audit, events, inventory};
use crate::track::{
    Compression, DirtyRate, Lost, Ranked, Ranking, Regime, SampledCurve, SampledHeat, SampledRegion, Terms, ThreadRate,
    UnreadableRange, WindowEstimate, ZeroPages, forecast,
};

fn tagged(object: &impl Schema) -> Value {
    serde_json::to_value(object.tagged()).unwrap()
}

fn migration() -> Value {
    let mut blackout = BlackoutLedger::default();
    blackout.add(BlackoutPhase::Pause, std::time::Duration::ZERO);
    tagged(&MigrationReport {
        migration_id: MigrationId::random(),
        vm_id: VmId::random(),
        vm_name: "a".parse().unwrap(),
        strategy: String::new(),
        ending: Ending::Moved,
        owner: Owner::There,
        stage: Stage::Activation,
        reason: String::new(),
        memory_bytes: 0,
        streams: 0,
        rounds: vec![round()],
        reducers: vec![ReducerReport { reason: "a".to_owned(), ..ReducerReport::default() }],
        squeeze: Some(SqueezeReport::default()),
        wire_bytes: 0,
        state_bytes: 0,
        image_bytes: 0,
        total_ns: 0,
        downtime_target_ns: 0,
        blackout_ns: 0,
        blackout,
        rtt_ns: 0,
        verified_pages: 0,
        post_copy: Some(PostCopyReport {
            waits: WaitReport { histogram: vec![WaitBucket::default()], ..WaitReport::default() },
            ..PostCopyReport::default()
        }),
        loan: Some(LoanReport { taken_back_increment: Some(0), ..LoanReport::default() }),
        relay: Some(RelayReport::default()),
        network: Some(network()),
        tunnel: Some(TunnelReport::default()),
        stun: Some(stun_report()),
        link: Some(LinkReport {
            interface: String::new(),
            encryption: String::new(),
            other_bytes_per_second: Some(0),
            other_before_bytes_per_second: Some(0),
        }),
        chosen: Some(chosen()),
        prediction: record().prediction,
    })
}

fn network() -> NetworkReport {
    let asked = AskedReport { conflicts: vec![conflict()], not_asked: vec![String::new()], ..AskedReport::default() };
    NetworkReport { asked: Some(asked), target: vec![followed()], source: vec![followed()], ..NetworkReport::default() }
}

fn conflict() -> Conflict {
    let (mac, ip) = ("02:00:00:00:00:01".parse().unwrap(), "fd00::1".parse().ok());
    Conflict { kind: ConflictKind::Address, mac, ip, ports: Vec::new() }
}

fn followed() -> Followed {
    let port = Some(String::new());
    Followed {
        bridge: String::new(),
        expected_port: port.clone(),
        mac: "02:00:00:00:00:01".parse().unwrap(),
        verdict: Verdict::NotRelearned,
        port,
        after_first_ns: Some(0),
        moves: 0,
        causes: vec![StuckCause::Silence.diagnosis()],
    }
}

fn chosen() -> Chosen {
    Chosen { plan: String::new(), meets_downtime: true, reason: String::new() }
}

fn round() -> RoundReport {
    RoundReport { limit_bytes_per_second: Some(0), ..RoundReport::default() }
}

/// A line of the log of migrations.
fn record() -> MigrationRecord {
    serde_json::from_str(crate::store::history::SAMPLE).unwrap()
}

fn migration_status() -> Value {
    let (time, step) = (Some(0), Step::Round);
    tagged(&MigrationStatus {
        migration_id: MigrationId::random(),
        vm_id: VmId::random(),
        vm_name: "a".parse().unwrap(),
        pid: 1,
        target: String::new(),
        encryption: String::new(),
        strategy: String::new(),
        chosen: Some(chosen()),
        since_unix_ms: 0,
        elapsed_ns: 0,
        step,
        stage: step.stage(),
        can_be_cancelled: true,
        round: 1,
        due_pages: 0,
        sent_pages: 0,
        memory_bytes: 0,
        sent_bytes: 0,
        goodput_bytes_per_second: 0,
        bandwidth_bytes_per_second: Some(1),
        last_round: Some(round()),
        round_ends_in_ns: time,
        pauses_in_ns: time,
        expected_blackout_ns: time,
        ends_in_ns: time,
        downtime_target_ns: 0,
        throttle: Some(crate::service::fleet::throttle_sample()),
    })
}

fn stun_report() -> StunReport {
    StunReport { vcpus: vec![VcpuStun::default()], ..StunReport::default() }
}

fn stun() -> Value {
    tagged(&StunStatus {
        vm: observed(),
        by: "",
        vmm_answers_ms: Some(0.4),
        allowed_pages_per_second: Some(0.),
        vcpus: vec![VcpuStatus { vcpu: 0, pages_per_second: 0., limit_pages_per_second: Some(0.) }],
        dry_run: false,
        stun: stun_report(),
    })
}

fn machines() -> [Value; 2] {
    let info = VmInfo {
        name: String::new(),
        vm_id: VmId::random(),
        pid: 1,
        state: RunState::Running,
        memory_bytes: 0,
        cpus: 1,
        vcpu_thread_ids: vec![1],
        dirty_log: crate::model::DirtyLogKind::Ring,
        dirty_log_on: false,
        nets: vec!["tap=t,mac=02:00:00:00:00:01,router=fd00::2,ip=10.0.0.1,gateway=10.0.0.2,vlan=7".parse().unwrap()],
        ports: vec![crate::model::network::PortCounters::default()],
        disks: vec!["path=/d".parse().unwrap()],
        rng: false,
        balloon: true,
        hugepages: true,
        uptime_ns: 0,
        owed_pages: Some(0),
        migration_id: Some(MigrationId::random()),
        throttle: Some(crate::service::fleet::throttle_sample()),
        kvm_shortcomings: vec![String::new()],
    };
    let entry = MachineEntry {
        name: "a".parse().unwrap(),
        vm_id: VmId::random(),
        pid: 1,
        start_time_ticks: 0,
        boot_id: String::new(),
        memory_bytes: 0,
        cpus: 1,
        state_dir: "/".into(),
    };
    [tagged(&info), tagged(&entry)]
}

fn balloon() -> Value {
    let value = Some(0);
    tagged(&BalloonReport {
        name: String::new(),
        memory_bytes: 0,
        target_bytes: 0,
        actual_bytes: 0,
        resident_bytes: 0,
        driver: true,
        reporting: true,
        hinting: true,
        poisoned: false,
        held: false,
        inflated_bytes: 0,
        reported_bytes: 0,
        hints: Some(HintReport { command_id: 2, pages: 0, complete: true }),
        guest: Some(GuestStats {
            swap_in_bytes: value,
            swap_out_bytes: value,
            major_faults: value,
            minor_faults: value,
            free_bytes: value,
            total_bytes: value,
            available_bytes: value,
            disk_cache_bytes: value,
            hugetlb_allocations: value,
            hugetlb_failures: value,
        }),
        progress: 0,
    })
}

fn dirty_rate() -> Value {
    let thread = ThreadRate {
        thread_id: 1,
        name: Some(String::new()),
        pages_per_second: 0.,
        share: 0.,
        exits_per_second: 0.,
        guest_exits_per_second: 0.,
    };
    let rate = DirtyRate {
        interval_ns: 0,
        pages_per_second: 0.,
        bytes_per_second: 0.,
        unique_pages: 0,
        unique_bytes: 0,
        regime: Regime::Passive,
        meaning: "",
        is_lower_bound: true,
        source: "",
        dirty_ring_pushes_per_second: 0.,
        huge_mappings: 0,
        threads: vec![thread],
        exits: BTreeMap::from([("REASON".to_owned(), 1)]),
        lost_events: lost(),
    };
    tagged(&DirtyRateReport { vm: observed(), rate, missing_sources: missing_sources(), single_writes: Some(0) })
}

fn lost() -> Lost {
    Lost {
        total: 0,
        out_of_range: 0,
        threads_full: 0,
        exits_full: 0,
        too_large: 0,
        unreadable: 0,
        unattributed: 0,
        writes_full: 0,
    }
}

fn observed() -> Observed {
    Observed { name: String::new(), vm_id: Some(VmId::random()), pid: 1, cpus: 1 }
}

fn missing_sources() -> Vec<MissingSource> {
    let [name, gives, reason] = [const { String::new() }; 3];
    vec![MissingSource { name, gives, reason }]
}

fn curve() -> WriteCurve {
    WriteCurve::new(vec![CurvePoint::exact(1_000_000, 1.0)]).unwrap()
}

/// One writer of each kind.
fn writers() -> Vec<Writer> {
    let address_space = AddressSpace(0);
    let process = Some(GuestProcess { pid: 1, name: String::new(), threads: Some(1) });
    vec![
        Writer::Vcpu { index: 0, thread_id: 1 },
        Writer::AddressSpace { vcpu: 0, address_space, process },
        Writer::Code { vcpu: 0, address_space, first: Gva(0), last: Gva(0) },
        Writer::Region { range: MemoryRange { start: Gpa(0), bytes: 4096 } },
    ]
}

fn sampled() -> SampledCurve {
    let window = WindowEstimate {
        window_ns: 0,
        effective_interval_ns: 0,
        shortest_interval_ns: 0,
        longest_interval_ns: 0,
        unique_pages: 0,
        unique_pages_low: 0,
        unique_pages_high: 0,
        is_exact: false,
        sampled_pages: 0,
        changed_pages: 0,
        unreadable_pages: 0,
        windows: 0,
        variance_ratio: 0.,
        read_ns: 0,
    };
    SampledCurve {
        windows: vec![window],
        regime: Regime::Sampled,
        meaning: "",
        population_pages: 0,
        heat: SampledHeat {
            region_bytes: 1,
            window_ns: 0,
            windows: 1,
            regions: vec![SampledRegion {
                range: MemoryRange { start: Gpa(0), bytes: 4096 },
                pages: 0,
                sampled_pages: 0,
                changed_pages: 0,
                unique_pages: 0,
                unique_pages_low: 0,
                unique_pages_high: 0,
            }],
        },
        unreadable_ranges: vec![UnreadableRange { start: Gpa(0), bytes: 0, reason: String::new() }],
        zero_pages: Some(ZeroPages { share: 0., share_low: 0., share_high: 0., sampled_pages: 0 }),
        compression: Some(Compression { ratio: 0., ratio_low: 0., ratio_high: 0., sampled_pages: 0 }),
        read_ns: 0,
        elapsed_ns: 0,
        seed: 0,
    }
}

fn profile() -> Value {
    let range = MemoryRange { start: Gpa(0), bytes: 4096 };
    tagged(&Profile {
        vm: observed(),
        regime: Regime::Sampled,
        meaning: "",
        is_lower_bound: false,
        granularity_bytes: Some(4096),
        notes: vec![String::new()],
        window_ns: 1,
        windows: 1,
        memory_bytes: 4096,
        curve: curve(),
        protected_one_in: 1,
        guest_time_lost_ns: 0,
        rest_ns: 0,
        exact_unique_pages: Some(1.),
        fault_cost_ns: Some(0),
        writers: writers().into_iter().map(|writer| WriterProfile { writer, share: 1., curve: curve() }).collect(),
        heat: vec![RegionHeat { range, unique_pages: 1, pages: 1 }],
        ram: vec![range],
        sampled: Some(sampled()),
        lost_events: Some(lost()),
        cost: Some(WindowCost { bpf_run_time_ns: 0, bpf_runs: 0, bpf_core_share: 0. }),
        missing_sources: missing_sources(),
    })
}

fn rogue() -> Value {
    let second = std::time::Duration::from_secs(1);
    let terms = Terms {
        bandwidth: BytesPerSecond(1 << 20),
        downtime: second,
        switch_cost: std::time::Duration::ZERO,
        rtt: std::time::Duration::ZERO,
    };
    let ranked = |writer| Ranked {
        writer,
        pages_per_second: 0.,
        low_pages_per_second: 0.,
        high_pages_per_second: 0.,
        share: 0.,
        limit_pages_per_second: Some(0.),
    };
    let rogue = |writer| Rogue { writer, words: String::new(), pages_per_second: 0., limit_pages_per_second: Some(0.) };
    tagged(&RogueReport {
        vm: observed(),
        regime: Regime::Armed,
        is_lower_bound: false,
        notes: vec![String::new()],
        bandwidth_bytes_per_second: 1 << 20,
        downtime_ns: 1_000_000_000,
        forecast: forecast(&curve(), PageCount(1), &terms).unwrap(),
        ranking: Ranking {
            total_pages_per_second: 0.,
            allowed_pages_per_second: 0.,
            unattributed_pages_per_second: 0.,
            water_line_pages_per_second: Some(0.),
            enough: true,
            writers: writers().into_iter().map(ranked).collect(),
        },
        observations: 1,
        rogues: writers().into_iter().filter(|writer| !matches!(writer, Writer::Region { .. })).map(rogue).collect(),
    })
}

fn exits() -> Value {
    let row = ExitRow {
        to: "kvm",
        thread_id: Some(1),
        reason: String::new(),
        count: 0,
        exits_per_second: 0.,
        total_ns: Some(0),
        time_share: Some(0.),
        mean_ns: Some(0.),
        p50_ns: Some(0),
        p99_ns: Some(0),
        longest_ns: Some(0),
    };
    let (vm, missing_sources) = (observed(), missing_sources());
    tagged(&ExitsReport { vm, interval_ns: 0, backend: "svm", exits: vec![row], missing_sources })
}

fn followed_announcements() -> [Value; 4] {
    let mac: MacAddress = "02:00:00:00:00:01".parse().unwrap();
    let ip = "fd00::1".parse().unwrap();
    let ips = vec![FoundIp { ip, from: LearntFrom::Traffic, router: Some(true) }];
    let vlan = "42".parse().ok();
    let cards = vec![FoundCard { tap: String::new(), mac, from: LearntFrom::Given, vlan, ips }];
    let found =
        FoundVm { vm_name: String::new(), vm_id: VmId::random(), pid: 1, listened_ns: 0, frames_heard: 0, cards };
    let (bridge, port) = (Some(String::new()), Some(String::new()));
    let seen = Seen { mac, after_first_ns: 0, bridge, port, ip: Some(ip) };
    let probe = ProbeReport {
        interface: String::new(),
        asked_on: String::new(),
        addresses: 0,
        questions_sent: 0,
        waited_ns: 0,
        own_answers: vec![ip],
        conflicts: vec![conflict()],
    };
    [tagged(&found), tagged(&seen), tagged(&followed()), tagged(&probe)]
}

fn announcements() -> [Value; 2] {
    let error = Some(String::new());
    let round = AnnounceRound { round: 0, after_first_ns: 0, frames_sent: 0, frames_failed: 0, error };
    let station =
        "mac=02:00:00:00:00:01,ip=10.0.0.1,router=fd00::1,gateway=10.0.0.2,vlan=100.42".parse::<Station>().unwrap();
    let report = AnnounceReport {
        interface: String::new(),
        sent_on: String::new(),
        stations: vec![station],
        rounds_planned: 0,
        rounds_done: 0,
        frames_sent: 0,
        frames_failed: 0,
        cancelled: false,
    };
    [tagged(&round), tagged(&report)]
}

fn doctor() -> Value {
    let [name, why, detail, kernel] = [const { String::new() }; 4];
    let (tier, result, remedy) = (Tier::Required, ResultKind::Works, Some(String::new()));
    tagged(&DoctorReport { ready: true, kernel, checks: vec![Finding { name, tier, why, result, detail, remedy }] })
}

fn proof() -> Value {
    let [name, why, detail, kernel] = [const { String::new() }; 4];
    let finding =
        Finding { name, tier: Tier::Required, why, result: ResultKind::Failed, detail, remedy: Some(String::new()) };
    let figure = Figure { name: String::new(), unit: "ns", median: 0., least: 0., most: 0., samples: 1 };
    tagged(&ProofReport {
        proven: true,
        kernel,
        duration_ns: 0,
        checks: vec![Proof { finding, figures: vec![figure] }],
    })
}

/// Leaves out what stands below a path (`a.b[].c`) and is documented elsewhere.
fn without(value: &mut Value, path: &str) {
    let (first, rest) = path.split_once('.').map_or((path, None), |(first, rest)| (first, Some(rest)));
    let (name, many) = first.strip_suffix("[]").map_or((first, false), |name| (name, true));
    let Some(member) = value.get_mut(name) else { panic!("there is no `{path}`") };
    match (rest, many) {
        (None, _) => *member = Value::Null,
        (Some(rest), false) => without(member, rest),
        (Some(rest), true) => member.as_array_mut().unwrap().iter_mut().for_each(|item| without(item, rest)),
    }
}

/// The fleet, one VM of it, and the agent. What other commands print as well is documented with them.
fn fleet() -> [Value; 3] {
    let view = crate::service::fleet::sample();
    let mut vm = tagged(&view.vms[0]);
    for path in ["rate", "armed.curve", "armed.forecast", "armed.ranking", "armed.rogues"] {
        without(&mut vm, path);
    }
    let mut fleet = tagged(&view);
    fleet["vms"] = serde_json::json!([]);
    without(&mut fleet, "watching.lost_events");
    without(&mut fleet, "watching.lost_events_total");
    let ready =
        crate::service::agent::AgentReady { pid: 1, metrics: Some(String::new()), socket: "/".into(), interval_ns: 1 };
    [vm, fleet, tagged(&ready)]
}

/// An object of every schema, with every member that it can have.
fn samples() -> Vec<Value> {
    let mut all = vec![migration(), dirty_rate(), doctor(), proof(), audit::sample(), vm::run::sample(), balloon()];
    all.extend([exits(), profile(), rogue()]);
    all.push(migration_status());
    all.push(tagged(&record()));
    all.push(tagged(&crate::service::prediction::sample()));
    all.push(tagged(&crate::service::prediction::history_sample()));
    all.extend([stun(), crate::service::control::throttled_sample()]);
    all.push(tagged(&crate::service::fleet::throttle_sample()));
    all.push(serde_json::json!({ "schema": "dunlin.stun-cleared/v1", "groups": [""] }));
    all.extend(crate::store::recording::samples());
    all.push(tagged(&GuestWrite {
        at_ns: 0,
        thread_id: 1,
        gfn: Gfn(0),
        pages: 1,
        fresh: 1,
        address_space: Some(AddressSpace(0)),
        instruction: Some(Gva(0)),
    }));
    all.push(tagged(&inventory::sample()));
    all.extend(machines());
    all.extend(announcements());
    all.extend(followed_announcements());
    all.extend(fleet());
    all.push(tagged(&crate::service::fleet::address_sample()));
    let host = String::new();
    all.push(tagged(&crate::service::addresses::Origin { migration_id: MigrationId::random(), host }));
    all.extend(vm::receive::samples());
    all.extend(crate::service::tunnel::list::samples());
    all.extend(pki::samples());
    all.extend(events::samples());
    all.extend(crate::store::fuzz_seeds().iter().map(|line| serde_json::from_slice::<Value>(line).unwrap()));
    all.push(tagged(&Outcome { error: String::new() }));
    all.push(tagged(&Protected { began_ns: 0, ended_ns: 0, subset: 0, was_on: true }));
    all.push(serde_json::from_str(&vm::orders::console_line(b"")).unwrap());
    all
}

/// The members of `value` as the documentation writes them: `rounds[].pages`, `blackout.phases[].phase`.
fn members(value: &Value, prefix: &str, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                if path != "schema" {
                    into.insert(path.clone());
                }
                members(field, &path, into);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| members(item, &format!("{prefix}[]"), into)),
        _ => {}
    }
}

/// What the documentation's sections say, by schema.
fn documented() -> BTreeMap<String, BTreeSet<String>> {
    let mut sections = BTreeMap::new();
    let mut current: Option<String> = None;
    for line in include_str!("../../../docs/json.md").lines() {
        if line.starts_with('#') {
            current = line.split('`').nth(1).map(str::to_owned);
            if let Some(schema) = &current {
                assert!(sections.insert(schema.clone(), BTreeSet::new()).is_none(), "{schema} is there twice");
            }
        } else if let (Some(schema), Some(row)) = (&current, line.strip_prefix("| `")) {
            let (member, _) = row.split_once('`').unwrap();
            let fresh = sections.get_mut(schema).unwrap().insert(member.to_owned());
            assert!(fresh, "{schema} has `{member}` twice");
        }
    }
    sections
}

#[test]
fn the_documentation_names_exactly_the_members_that_are_written() {
    let mut written: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for sample in samples() {
        let schema = sample["schema"].as_str().expect("an object without a schema").to_owned();
        members(&sample, "", written.entry(schema).or_default());
    }
    let documented = documented();
    assert_eq!(documented.keys().collect::<Vec<_>>(), written.keys().collect::<Vec<_>>());
    for (schema, members) in &written {
        assert_eq!(&documented[schema], members, "{schema}: documented, written");
    }
}

#[test]
fn no_schema_is_forgotten() {
    fn sources(folder: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                for rest in text.split("\"dunlin.").skip(1) {
                    let name = rest.split('"').next().unwrap();
                    if name.ends_with("/v1") && !name.contains("KIND") {
                        found.insert(format!("dunlin.{name}"));
                    }
                }
            }
        }
    }
    let mut found = BTreeSet::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    assert_eq!(found, documented().into_keys().collect());
}

/// `DUNLIN_UPDATE_DOCS=1` writes the tables instead of comparing them.
#[test]
fn the_books_outcome_tables_are_the_programs() {
    use crate::migrate::outcomes::{LENT_OUTCOMES, OUTCOMES, OWING_OUTCOMES, markdown};
    const MARK: &str = "<!-- an outcome table: DUNLIN_UPDATE_DOCS=1 cargo test -p dunlin --lib json_doc -->\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/src/concepts/outcomes.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let parts: Vec<&str> = page.split(MARK).collect();
    assert_eq!(parts.len(), 7, "{} has the mark before and behind each table", path.display());
    let tables = [markdown(OUTCOMES), markdown(OWING_OUTCOMES), markdown(LENT_OUTCOMES)];
    if std::env::var_os("DUNLIN_UPDATE_DOCS").is_some() {
        let page = [parts[0], &tables[0], parts[2], &tables[1], parts[4], &tables[2], parts[6]];
        std::fs::write(&path, page.join(MARK)).unwrap();
    } else {
        assert_eq!([parts[1], parts[3], parts[5]], tables, "run the command in the mark");
    }
}
