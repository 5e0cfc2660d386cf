//! Entry points for fuzzing: every parser of bytes that a peer, a guest, a file or an operator gives.
//!
//! One table for two users: libFuzzer (`tests/fuzz`, which needs a nightly compiler) and the test of this module, which
//! runs each target on mutated seeds wherever the other tests run. Owns the seeds and the promises: no panic, no unbounded
//! work, and what was taken is written as it was read.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use uuid::Uuid;

use crate::announce::directory::{self, Directory};
use crate::block::held;
use crate::btf::{KernelTypes, Kind};
use crate::foreign::{maps, nics, qmp};
use crate::guest_os;
use crate::kvm;
use crate::kvm::virtio::fuzz as virtio;
use crate::link::Address;
use crate::link::wire::{
    self, BULK_HEADER_BYTES, BulkFrame, CONTROL_HEADER_BYTES, HELLO_BYTES, Hello, Purpose, decode_message,
};
use crate::migrate::target::check_offer;
use crate::migrate::{self, Accept, Compress, ControlMessage, Handed, Offer, Strategy, TargetState};
use crate::model::id::VmName;
use crate::model::shape::MAX_MEMORY_BYTES;
use crate::model::tunnel::inner_pair;
use crate::model::units::{parse_duration, parse_size_bytes};
use crate::model::{
    AskedReport, BlackoutLedger, BytesPerSecond, DirtyLogKind, DiskSpec, MacAddress, MachineShape, MigrationId,
    NetSpec, NetworkPlace, NetworkReport, NetworkWord, Packing, PageCount, PageRun, RegionId, RelayedFrame, SerialSpec,
    Station, Step, TunnelEntry, TunnelOffer, TunnelSpec, VlanTags, VmId, VmRef, WireguardKey, WireguardOffer,
    WriteCurve, Writer,
};
use crate::service::balloon::BalloonReport;
use crate::service::config;
use crate::service::control::Outcome;
use crate::service::machine::VmInfo;
use crate::service::prove;
use crate::service::registry::MachineEntry;
use crate::service::reports;
use crate::service::session::{Reply, Request, SESSION_VERSION, SessionSocket};
use crate::service::stun::holder;
use crate::store;

/// Something that reads bytes.
#[derive(Clone, Copy)]
pub struct Target {
    /// What it is called; the name of its libFuzzer program.
    pub name: &'static str,
    /// Reads one input; panics if a promise is broken.
    pub run: fn(&[u8]),
    /// Inputs that are right.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

const fn target(name: &'static str, run: fn(&[u8]), seeds: fn() -> Vec<Vec<u8>>) -> Target {
    Target { name, run, seeds }
}

/// All targets.
pub const TARGETS: &[Target] = &[
    target("hello", hello, || vec![Hello::new(Purpose::Bulk(3), MigrationId(Uuid::nil())).encode().to_vec()]),
    target("control_header", control_header, || vec![wire::encode_control(7, b"payload").to_vec()]),
    target("bulk_header", bulk_header, bulk_seeds),
    target("packed_pages", migrate::fuzz_packed, migrate::packed_seeds),
    target("control_message", control_message, control_seeds),
    target("session", session, session_seeds),
    target("saved_machine", kvm::fuzz::saved_machine, kvm::fuzz::saved_machine_seeds),
    target("saved_serial", kvm::fuzz::saved_serial, || vec![vec![12, 0, 0, 1, 3, 96, 8, 176, 0, 2, 65, 66, 67]]),
    target("saved_device", virtio::read_state, || vec![virtio::sample_state()]),
    target("virtio_net", |input| virtio::drive(virtio::Target::Net, input), virtio_seeds),
    target("virtio_disk", |input| virtio::drive(virtio::Target::Disk, input), virtio_seeds),
    target("virtio_rng", |input| virtio::drive(virtio::Target::Rng, input), virtio_seeds),
    target("virtio_balloon", |input| virtio::drive(virtio::Target::Balloon, input), virtio_seeds),
    target("kernel", kvm::fuzz::kernel, kvm::fuzz::kernel_seeds),
    target("bzimage", kvm::fuzz::bzimage, kvm::fuzz::bzimage_seeds),
    target("boot_image", kvm::fuzz::boot_image, kvm::fuzz::boot_image_seeds),
    target("journal", store::fuzz_line, store::fuzz_seeds),
    target("history", store::history::fuzz, || vec![store::history::SAMPLE.as_bytes().to_vec()]),
    target("recording", store::recording::fuzz, store::recording::fuzz_seeds),
    target("json", json, json_seeds),
    target("words", words, word_seeds),
    target("config", config_file, config_seeds),
    target("maps", maps::fuzz, maps::fuzz_seeds),
    target("btf", btf, guest_os::testing::type_seeds),
    target("btf_file", crate::btf::fuzz_file, crate::btf::file_seeds),
    target("guest_os", guest_os::testing::fuzz, guest_os::testing::fuzz_seeds),
    target("kernel_symbols", guest_os::fuzz_symbols, guest_os::symbol_seeds),
    target("guest_words", prove::fuzz_line, prove::fuzz_seeds),
    target("qmp", qmp::fuzz, qmp::fuzz_seeds),
    target("heard", crate::announce::heard::fuzz, crate::announce::heard::fuzz_seeds),
    target("network_cards", nics::fuzz, nics::fuzz_seeds),
    target("holder", holder::fuzz, holder::fuzz_seeds),
    target("network_word", network_word, network_word_seeds),
    target("addresses", addresses, || vec![ADDRESSES.as_bytes().to_vec()]),
    target("held_writes", held::fuzz, held::fuzz_seeds),
    target("migration_report", reports::fuzz, || vec![reports::SAMPLE.to_vec()]),
];

/// The target called `name`.
pub fn find(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// Gives `check` a header of `N` bytes as it is, and once more with a right checksum.
fn headers<const N: usize>(input: &[u8], check: impl Fn(&[u8; N])) {
    let mut header = [0; N];
    let length = N.min(input.len());
    header[..length].copy_from_slice(&input[..length]);
    check(&header);
    let checksum = crc32fast::hash(&header[..N - 4]);
    header[N - 4..].copy_from_slice(&checksum.to_le_bytes());
    check(&header);
}

fn hello(input: &[u8]) {
    headers::<HELLO_BYTES>(input, |header| {
        if let Ok(hello) = Hello::decode(header) {
            assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
        }
    });
}

fn control_header(input: &[u8]) {
    headers::<CONTROL_HEADER_BYTES>(input, |header| {
        let sequence = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        if let Ok((length, _)) = wire::decode_control(header, sequence) {
            assert!(length <= wire::MAX_CONTROL_BYTES as usize);
            assert!(wire::decode_control(header, sequence.wrapping_add(1)).is_err(), "a replay was taken");
        }
    });
}

fn bulk_header(input: &[u8]) {
    headers::<BULK_HEADER_BYTES>(input, |header| {
        let sequence = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        let Ok(frame) = wire::decode_bulk(header, sequence) else { return };
        assert_eq!(wire::decode_bulk(&wire::encode_bulk(sequence, frame), sequence), Ok(frame));
        assert!(wire::decode_bulk(header, sequence.wrapping_add(1)).is_err(), "a replay was taken");
        if let BulkFrame::Pages(_, run) | BulkFrame::Zeros(_, run) = frame
            && run.fits(PageCount::covering(MAX_MEMORY_BYTES))
        {
            assert!(run.byte_offset() + run.byte_len() as u64 <= MAX_MEMORY_BYTES);
        }
    });
}

fn bulk_seeds() -> Vec<Vec<u8>> {
    let run = PageRun::new(4096, 512);
    let frames = [
        BulkFrame::Packed(RegionId::RAM, PageRun::new(4096, 64), Packing::Zstd, 9000),
        BulkFrame::StartRound { round: 1, digested: false },
        BulkFrame::Pages(RegionId::RAM, run),
        BulkFrame::Zeros(RegionId::RAM, run),
        BulkFrame::EndRound(1),
    ];
    frames.into_iter().map(|frame| wire::encode_bulk(9, frame).to_vec()).collect()
}

fn control_message(input: &[u8]) {
    let Ok(message) = decode_message::<ControlMessage>(input) else { return };
    let written = postcard::to_stdvec(&message).expect("what was read can be written");
    assert_eq!(decode_message::<ControlMessage>(&written), Ok(message.clone()));
    if let ControlMessage::Tunnel(offer) = &message
        && offer.check().is_ok()
    {
        assert!((1..=16).contains(&offer.lines.len()) && offer.former != offer.new, "an absurd tunnel passed");
    }
    if let ControlMessage::SecretTunnel(both) = &message
        && both.1.check().is_ok()
    {
        assert!(both.1.former.is_link_local() && both.1.former != both.1.new && both.1.port != 0, "an absurd tunnel");
    }
    if let ControlMessage::Offer(offer) = message
        && check_offer(&offer).is_ok()
    {
        assert!((1..=MAX_MEMORY_BYTES).contains(&offer.shape.memory_bytes), "an absurd offer passed");
        assert!((1..=64).contains(&offer.streams), "an absurd offer passed");
    }
}

fn tunnel_offer() -> TunnelOffer {
    let text = br#"{"former":"192.0.2.1","new":"198.51.100.1","port":4789,"lines":[{"mac":"02:00:00:00:00:01","vni":7,"lan_mtu_bytes":1500}]}"#;
    serde_json::from_slice(text).expect("an offer")
}

fn wireguard_offer() -> WireguardOffer {
    let [former, new] = inner_pair(3);
    WireguardOffer { port: 51_820, key: WireguardKey([5; 32]), former, new }
}

fn shape() -> MachineShape {
    MachineShape {
        vm_id: VmId(Uuid::nil()),
        name: VmName::from_str("web1").expect("a name"),
        memory_bytes: 256 << 20,
        cpus: 2,
        dirty_log: DirtyLogKind::Ring,
        tsc_khz: 2_000_000,
        cpuid: Vec::new(),
        nets: "tap=t0,mac=02:00:00:00:00:01,ip=10.0.0.2".parse().into_iter().collect(),
        disks: "path=/d.img,readonly".parse().into_iter().collect(),
        rng: true,
        balloon: false,
        hugepages: true,
    }
}

fn control_seeds() -> Vec<Vec<u8>> {
    let id = MigrationId(Uuid::nil());
    let (shape, streams) = (shape(), 2);
    let offer = Offer { migration_id: id, regions: shape.regions(), shape, streams, verify: true };
    let messages = [
        ControlMessage::Offer(Box::new(offer)),
        ControlMessage::Accept(Accept { reservation_ns: 5 }),
        ControlMessage::Refuse("no room".to_owned()),
        ControlMessage::Handed(Box::new(Handed { state: vec![1; 40], round: 3, digest: 7, chunk_hashes: vec![1, 2] })),
        ControlMessage::Prepared(BlackoutLedger::default()),
        ControlMessage::Query(id),
        ControlMessage::State(TargetState::Owner),
        ControlMessage::Frames(vec![RelayedFrame { port: 1, bytes: vec![2; 60] }]),
        ControlMessage::Tunnel(Box::new(tunnel_offer())),
        ControlMessage::SecretTunnel(Box::new((tunnel_offer(), wireguard_offer()))),
        ControlMessage::SecretTunnelMade(WireguardKey([6; 32])),
        ControlMessage::Reducing(vec!["lz4".to_owned(), "dedup".to_owned()]),
        ControlMessage::Place(NetworkPlace { boot_id: Uuid::nil(), device: 4, inode: 5 }),
        ControlMessage::Network(NetworkWord::Asking.to_text()),
    ];
    messages.iter().map(|message| postcard::to_stdvec(message).unwrap_or_default()).collect()
}

/// What a target says of the network: read as it is written, or not at all.
fn network_word(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Some(word) = NetworkWord::read(text) {
        assert_eq!(NetworkWord::read(&word.to_text()), Some(word));
    }
}

fn network_word_seeds() -> Vec<Vec<u8>> {
    let report = NetworkReport { asked: Some(AskedReport::default()), ..NetworkReport::default() };
    let last = r#"{"last":{"rounds_sent":1,"frames_sent":4,"target":[{"bridge":"br0","expected_port":"tap0","mac":"02:00:00:00:00:01","verdict":"not-relearned","moves":0,"causes":[{"cause":"silence"}]}],"source":[]}}"#;
    let words = [NetworkWord::Asking, NetworkWord::Asked(AskedReport::default()), NetworkWord::Last(report)];
    let mut seeds: Vec<Vec<u8>> = words.iter().map(|word| word.to_text().into_bytes()).collect();
    seeds.push(last.into());
    seeds
}

/// A map of VMs, as an agent writes it.
const ADDRESSES: &str = r#"{"schema":"dunlin.addresses/v1","unix_ms":1,"host":"h","vms":[{"vm_id":"00000000-0000-0000-0000-000000000001","vm_name":"a","is_hosted":true,"pid":1,"since_unix_ms":1,"cards":[{"tap":"tap0","bridge":"br0","mac":"02:00:00:00:00:01","from":"configuration","vlan":"42","ips":[{"ip":"10.0.0.1","from":"configuration"}]}]}],"left":[{"vm_id":"00000000-0000-0000-0000-000000000002","vm_name":"b","left_unix_ms":1,"went_to":"h2","macs":["02:00:00:00:00:02"]}],"conflicts":[]}"#;

/// The map is bounded whatever is read, and what it has is what it would write.
fn addresses(input: &[u8]) {
    let Ok(book) = crate::service::addresses::parse(input) else { return };
    let restored = Directory::restore(book).book(0, "h");
    assert!(restored.left.len() <= directory::MOST_LEFT && restored.vms.len() <= directory::MOST_VMS);
    assert_eq!(Directory::restore(restored.clone()).book(0, "h"), restored);
}

/// Type information, a guest's among them.
fn btf(input: &[u8]) {
    let announced = KernelTypes::announced_len(input);
    let Ok(types) = KernelTypes::parse(input) else { return };
    assert!(announced.is_some_and(|bytes| bytes <= input.len() as u64), "what was taken is all there");
    for structure in ["task_struct", "mm_struct", "signal_struct"] {
        let _ = (types.id(structure, Kind::Struct), types.size_of(structure));
        for member in ["tasks.next", "comm", "pgd", "thread_head", "pid.nothing"] {
            let _ = types.field(structure, member);
        }
    }
    let _ = types.enumerator("nothing");
}

/// The bytes as they arrive on a session's socket, at the machine's end and at the manager's.
fn session(input: &[u8]) {
    fn read_all<T: serde::de::DeserializeOwned>(input: &[u8]) {
        use std::io::Write;
        let (mut near, far) = UnixStream::pair().expect("a socket pair");
        near.set_nonblocking(true).expect("a flag");
        // What does not fit the socket's buffer is cut off.
        let _ = near.write(input);
        drop(near);
        let mut far = SessionSocket::new(far);
        while far.recv::<T>().is_ok() {}
    }
    read_all::<Request>(input);
    read_all::<Reply>(input);
}

fn session_seeds() -> Vec<Vec<u8>> {
    let frame = |payload: Vec<u8>| [&(payload.len() as u32).to_le_bytes()[..], &payload].concat();
    let request = |request: &Request| frame(postcard::to_stdvec(request).unwrap_or_default());
    let attach = Request::Attach { version: SESSION_VERSION, migration: MigrationId(Uuid::nil()) };
    vec![
        [request(&attach), request(&Request::StartLog), request(&Request::Harvest)].concat(),
        request(&Request::RestoreState(vec![7; 50])),
        frame(postcard::to_stdvec(&Reply::FreePages(vec![PageRun::new(3, 5)])).unwrap_or_default()),
        frame(postcard::to_stdvec(&Reply::Welcome(Box::new(shape()))).unwrap_or_default()),
    ]
}

fn virtio_seeds() -> Vec<Vec<u8>> {
    // Set the device up, then requests of the right shape.
    vec![[&[0, 7, 0xff, 0xff, 0xff, 0xff][..], &[0, 9, 0, 0, 8, 0, 0, 2, 1, 0].repeat(8)].concat()]
}

/// JSON that one process of ours reads from another, or from a file.
fn json(input: &[u8]) {
    if let Ok(entry) = serde_json::from_slice::<MachineEntry>(input) {
        assert!(!entry.name.as_str().contains('/'), "a name that is a path");
    }
    let _ = serde_json::from_slice::<VmInfo>(input);
    let _ = serde_json::from_slice::<BalloonReport>(input);
    let _ = serde_json::from_slice::<Outcome>(input);
    let _ = serde_json::from_slice::<TunnelEntry>(input);
    let _ = serde_json::from_slice::<Writer>(input).map(|writer| writer.to_string());
    if let Ok(curve) = serde_json::from_slice::<WriteCurve>(input) {
        let (last, beyond) = (curve.last().unique_pages, curve.at(Duration::MAX));
        assert!(
            last <= beyond.unique_pages && beyond.unique_pages <= beyond.high_pages && beyond.high_pages.is_finite()
        );
    }
}

fn json_seeds() -> Vec<Vec<u8>> {
    let entry = MachineEntry {
        name: shape().name,
        vm_id: VmId(Uuid::nil()),
        pid: 1,
        start_time_ticks: 2,
        boot_id: "b".to_owned(),
        memory_bytes: 4096,
        cpus: 1,
        state_dir: "/s".into(),
    };
    vec![
        serde_json::to_vec(&entry).unwrap_or_default(),
        br#"{"error":"no"}"#.to_vec(),
        JSON_CURVE.to_vec(),
        JSON_WRITER.to_vec(),
        JSON_TUNNEL.to_vec(),
    ]
}

const JSON_CURVE: &[u8] =
    br#"{"measured_until_ns":9,"points":[{"interval_ns":5,"unique_pages":2,"low_pages":1,"high_pages":3},
{"interval_ns":9,"unique_pages":3,"low_pages":2,"high_pages":4}]}"#;
const JSON_WRITER: &[u8] =
    br#"{"kind":"address-space","vcpu":0,"address_space":4096,"process":{"pid":1,"name":"init"}}"#;

const JSON_TUNNEL: &[u8] =
    br#"{"id":"7","vm_id":"6ba7b810-9dad-41d1-80b4-00c04fd430c8","vm_name":"a","migration_id":"6ba7b810-9dad-41d1-80b4-00c04fd430c8",
"side":"new","local":"192.0.2.1","remote":"198.51.100.1","port":4789,"mtu_bytes":1450,"since_unix_ms":1,"boot_id":"b","namespace":1,"state_dir":"/s",
"wireguard":{"device":"dlw-7","local":"169.254.1.0","remote":"169.254.1.1","mtu_bytes":1440},
"lines":[{"device":"dln-7","vni":7,"tap":"t","bridge":"b","mac":"02:00:00:00:00:01","ips":["10.0.0.1"],"lan_mtu_bytes":1500}]}"#;

/// Everything that an operator writes on a command line.
fn words(input: &[u8]) {
    fn says_what_it_read<T: FromStr + ToString + PartialEq>(text: &str) {
        if let Ok(value) = text.parse::<T>() {
            assert!(value.to_string().parse::<T>().is_ok_and(|again| again == value), "{text:?} does not read again");
        }
    }
    let Ok(text) = std::str::from_utf8(input) else { return };
    says_what_it_read::<VmRef>(text);
    says_what_it_read::<VmName>(text);
    says_what_it_read::<MacAddress>(text);
    says_what_it_read::<Address>(text);
    says_what_it_read::<Strategy>(text);
    says_what_it_read::<Compress>(text);
    says_what_it_read::<Step>(text);
    says_what_it_read::<VlanTags>(text);
    says_what_it_read::<TunnelSpec>(text);
    let _ = text.parse::<Station>();
    let _ = text.parse::<NetSpec>();
    let _ = text.parse::<DiskSpec>();
    let _ = text.parse::<SerialSpec>();
    let _ = text.parse::<DirtyLogKind>();
    if let Ok(bytes) = parse_size_bytes(text) {
        assert!(bytes < 1 << 60);
    }
    if let Ok(rate) = text.parse::<BytesPerSecond>() {
        assert!(rate.0 > 0);
        let _ = rate.time_for(1 << 40);
    }
    let _ = parse_duration(text);
}

fn word_seeds() -> Vec<Vec<u8>> {
    let words = [
        "web-1",
        "uuid:6ba7b810-9dad-41d1-80b4-00c04fd430c8",
        "pid:17",
        "02:00:00:00:00:01",
        "tcp://[fd00::7]:4460",
        "tls://host-b:4460",
        "stop-and-copy",
        "zstd:3",
        "state-moved",
        "tap=t0,mac=02:00:00:00:00:01,ip=10.0.0.2,ip=fd00::2",
        "mac=02:00:00:00:00:01,ip=10.0.0.2,router=fd00::2,vlan=100.42",
        "100.42",
        "vxlan,remote=192.0.2.7,local=fd00::1,port=8472,vni=77",
        "vxlan,remote=192.0.2.7,local=198.51.100.1",
        "path=/d.img,readonly",
        "socket=/s",
        "1.5GiB",
        "100Mbit/s",
        "250us",
    ];
    words.iter().map(|word| word.as_bytes().to_vec()).collect()
}

fn config_file(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(config) = config::parse(Path::new("dunlin.toml"), text) {
        assert!(config.run_dir.is_absolute() && config.state_dir.is_absolute());
        assert!((1..=64).contains(&config.migrate.streams));
        let _ = config.announce.schedule.instants().last();
    }
}

fn config_seeds() -> Vec<Vec<u8>> {
    let all = "version = 1\nrun_dir = \"/r\"\nstate_dir = \"/s\"\n[migrate]\nstreams = 2\ndowntime = \"30ms\"\n\
               bandwidth = \"1Gbit\"\nmax_rounds = 30\nstall = \"10s\"\ninsecure_plaintext = false\n[announce]\n\
               initial = \"50ms\"\nstep = \"100ms\"\nmax = \"550ms\"\nrounds = 5\n[tls]\nca = \"/c\"\n";
    vec![all.into(), "version = 1\n".into()]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;
    use proptest::test_runner::{Config, TestRunner};

    use super::{
        ControlMessage, MachineEntry, Path, TARGETS, check_offer, config, config_seeds, control_seeds, decode_message,
        find, json_seeds,
    };

    /// One change of an input.
    #[derive(Clone, Debug)]
    enum Change {
        Flip(Index, u8),
        Set(Index, u8),
        Insert(Index, Vec<u8>),
        Remove(Index, usize),
        Repeat(Index, usize),
        Cut(Index),
    }

    fn change() -> impl Strategy<Value = Change> {
        let at = any::<Index>;
        // Values at which lengths and counts change their meaning.
        let byte = || prop_oneof![any::<u8>(), prop::sample::select(vec![0, 1, 0x7f, 0x80, 0xff])];
        prop_oneof![
            (at(), 0..8u8).prop_map(|(at, bit)| Change::Flip(at, 1 << bit)),
            (at(), byte()).prop_map(|(at, value)| Change::Set(at, value)),
            (at(), prop::collection::vec(byte(), 1..9)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
            (at(), 1..9usize).prop_map(|(at, count)| Change::Remove(at, count)),
            (at(), 1..64usize).prop_map(|(at, count)| Change::Repeat(at, count)),
            at().prop_map(Change::Cut),
        ]
    }

    fn apply(input: &mut Vec<u8>, change: &Change) {
        let length = input.len();
        if length == 0 {
            return;
        }
        let end = |from: usize, count: usize| length.min(from + count);
        match change {
            Change::Flip(at, bits) => input[at.index(length)] ^= bits,
            Change::Set(at, value) => input[at.index(length)] = *value,
            Change::Insert(at, bytes) => {
                let at = at.index(length + 1);
                input.splice(at..at, bytes.iter().copied());
            }
            Change::Remove(at, count) => {
                let at = at.index(length);
                input.drain(at..end(at, *count));
            }
            Change::Repeat(at, count) => {
                let at = at.index(length);
                let piece = input[at..end(at, *count)].to_vec();
                input.splice(at..at, piece);
            }
            Change::Cut(at) => input.truncate(at.index(length)),
        }
    }

    #[test]
    fn no_bytes_break_a_promise() {
        for target in TARGETS {
            let seeds = (target.seeds)();
            for seed in &seeds {
                (target.run)(seed);
            }
            let mutated = (any::<Index>(), prop::collection::vec(change(), 0..6)).prop_map(move |(seed, changes)| {
                let mut input = seeds.get(seed.index(seeds.len().max(1))).cloned().unwrap_or_default();
                for change in &changes {
                    apply(&mut input, change);
                }
                input
            });
            let inputs = prop_oneof![4 => mutated, 1 => prop::collection::vec(any::<u8>(), 0..300)];
            // The devices have tests of their own with more inputs.
            let cases = if target.name.starts_with("virtio") { 200 } else { 3000 };
            let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
            let broken = runner.run(&inputs, |input| {
                (target.run)(&input);
                Ok(())
            });
            assert!(broken.is_ok(), "{}: {broken:?}", target.name);
        }
    }

    /// Seeds that are refused at the first byte would test nothing.
    #[test]
    fn seeds_are_right() {
        for seed in control_seeds() {
            assert!(decode_message::<ControlMessage>(&seed).is_ok());
        }
        let offer = decode_message::<ControlMessage>(&control_seeds()[0]);
        assert!(matches!(offer, Ok(ControlMessage::Offer(offer)) if check_offer(&offer).is_ok()));
        for seed in config_seeds() {
            config::parse(Path::new("x"), std::str::from_utf8(&seed).unwrap()).unwrap();
        }
        assert!(serde_json::from_slice::<MachineEntry>(&json_seeds()[0]).is_ok());
    }

    #[test]
    fn each_target_has_its_libfuzzer_program() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz");
        let manifest = std::fs::read_to_string(folder.join("Cargo.toml")).unwrap();
        for target in TARGETS {
            let program = std::fs::read_to_string(folder.join(format!("fuzz_targets/{}.rs", target.name))).unwrap();
            assert!(program.contains(&format!("\"{}\"", target.name)), "{} runs another target", target.name);
            assert!(manifest.contains(&format!("name = \"{}\"", target.name)), "{} is not built", target.name);
            assert_eq!(find(target.name).map(|found| found.name), Some(target.name));
        }
    }
}
