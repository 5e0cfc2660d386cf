//! Bytes that no honest peer sends, offers that cannot be met, and files that are not what they should be: each ends in a
//! clear error, with the VM running where it ran and nothing left behind.
#![cfg(target_arch = "x86_64")]

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dunlin::kvm::boot::BootImage;
use dunlin::link::wire::{self, BulkFrame, Hello, Purpose};
use dunlin::migrate::{Accept, ControlMessage, Handed, Offer, TargetState};
use dunlin::model::outcome::exit;
use dunlin::model::tunnel::{VXLAN_PORT, inner_pair};
use dunlin::model::{
    BlackoutLedger, DiskSpec, MigrationId, NetSpec, OfferedLine, PageRun, RegionId, Station, Step, TunnelOffer, Vni,
    WireguardKey, WireguardOffer,
};
use dunlin_tests::hosted::{HoldPoint, TestHost, VM, guest};
use dunlin_tests::raw::{RawPeer, encode_message};
use dunlin_tests::scene::MIGRATION_LIMIT;
use dunlin_tests::wait::wait_for;
use rustix::process::Signal;

const LIMIT: Duration = Duration::from_secs(20);

/// What a real source offers for its VM.
fn real_offer(source: &TestHost) -> Result<Offer> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let mut migrate = source.migrate(&format!("tcp://{}", listener.local_addr()?), &[])?;
    let mut peer = fake_target(&listener)?;
    let offer = match peer.recv()? {
        Some(ControlMessage::Offer(offer)) => *offer,
        other => anyhow::bail!("{other:?} is no offer"),
    };
    peer.send(&ControlMessage::Refuse("not today".to_owned()))?;
    let code = migrate.exit_code(MIGRATION_LIMIT)?;
    ensure!(code == Some(i32::from(exit::REFUSED)), "refused, and the exit code is {code:?}");
    ensure!(migrate.output.text().contains("not today"), "the target's reason is lost: {}", migrate.output.text());
    Ok(offer)
}

/// Greets the source that dials.
fn fake_target(listener: &TcpListener) -> Result<RawPeer> {
    let mut peer = RawPeer::accept(listener)?;
    peer.hello()?;
    peer.raw(&Hello::new(Purpose::Control, MigrationId::random()).encode())?;
    Ok(peer)
}

/// A greeting with another version range; the last four bytes are its checksum.
fn hello_of_version(oldest: u16, newest: u16) -> Vec<u8> {
    let mut hello = Hello::new(Purpose::Control, MigrationId::random());
    (hello.oldest, hello.newest) = (oldest, newest);
    hello.encode().to_vec()
}

/// A tunnel through WireGuard, for no VM of this test.
fn secret_tunnel() -> ControlMessage {
    let line =
        OfferedLine { mac: net("t0").station.mac, vni: Vni::of_migration(MigrationId::random()), lan_mtu_bytes: 1500 };
    let (former, new) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
    let tunnel = TunnelOffer { former, new, port: VXLAN_PORT, lines: vec![line] };
    let [former, new] = inner_pair(1);
    ControlMessage::SecretTunnel(Box::new((
        tunnel,
        WireguardOffer { port: 1, key: WireguardKey([1; 32]), former, new },
    )))
}

fn flipped(mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
    bytes[at] ^= 0x10;
    bytes
}

/// A control connection to the receiver, greeted.
fn control(address: SocketAddr, offer: &Offer) -> Result<RawPeer> {
    RawPeer::dial(address, Purpose::Control, offer.migration_id)
}

/// An offer that was accepted, and its one page stream.
fn accepted(address: SocketAddr, offer: &Offer) -> Result<(RawPeer, RawPeer)> {
    let mut peer = control(address, offer)?;
    peer.send(&ControlMessage::Offer(Box::new(offer.clone())))?;
    match peer.recv()? {
        Some(ControlMessage::Accept(_)) => {}
        other => anyhow::bail!("{other:?} instead of `accept`"),
    }
    let stream = RawPeer::dial(address, Purpose::Bulk(0), offer.migration_id)?;
    Ok((peer, stream))
}

type Attack = fn(SocketAddr, &Offer) -> Result<String>;

/// Sends an offer changed by `change`; the receiver's reason.
fn offered(address: SocketAddr, offer: &Offer, change: impl FnOnce(&mut Offer)) -> Result<String> {
    let mut offer = offer.clone();
    change(&mut offer);
    let mut peer = control(address, &offer)?;
    peer.send(&ControlMessage::Offer(Box::new(offer)))?;
    peer.verdict()
}

/// Sends page-stream frames after a proper start; the receiver's reason.
fn streamed(address: SocketAddr, offer: &Offer, frames: &[BulkFrame]) -> Result<String> {
    let (mut peer, mut stream) = accepted(address, offer)?;
    stream.frames(frames)?;
    peer.verdict()
}

/// Sends parts of boot images; the receiver's reason.
fn imaged(address: SocketAddr, offer: &Offer, parts: &[(&[u8], bool)]) -> Result<String> {
    let (mut peer, _stream) = accepted(address, offer)?;
    for &(part, last) in parts {
        peer.send(&ControlMessage::BootImage { part: part.to_vec(), last })?;
    }
    peer.verdict()
}

fn sound_image() -> Vec<u8> {
    BootImage { kernel: vec![1; 100].into(), initrd: None, cmdline: String::new() }.to_bytes()
}

fn net(tap: &str) -> NetSpec {
    let station = Station::new("52:54:00:00:00:01".parse().expect("an address"), Vec::new());
    NetSpec { tap: tap.to_owned(), station }
}

fn pages(first: u64, count: u32) -> BulkFrame {
    BulkFrame::Pages(RegionId::RAM, PageRun::new(first, count))
}

const START: BulkFrame = BulkFrame::StartRound { round: 1, digested: false };

fn handed(state: Vec<u8>, round: u32, digest: u64) -> ControlMessage {
    ControlMessage::Handed(Box::new(Handed { state, round, digest, chunk_hashes: Vec::new() }))
}

/// What is said to a receiver, and a word of its answer.
const ATTACKS: &[(&str, &str, Attack)] = &[
    ("noise for a greeting", "", |address, _| {
        let mut peer = RawPeer::connect(address)?;
        peer.raw(&[0x5a; 64])?;
        // It says which versions there are before it hangs up.
        peer.hello()?;
        peer.verdict()
    }),
    ("a greeting cut short", "", |address, _| {
        RawPeer::connect(address)?.raw(&hello_of_version(1, 1)[..10])?;
        Ok(String::new())
    }),
    ("a flipped greeting", "", |address, _| {
        let mut peer = RawPeer::connect(address)?;
        peer.raw(&flipped(hello_of_version(1, 1), 20))?;
        peer.hello()?;
        peer.verdict()
    }),
    ("an older version", "", |address, _| {
        let mut peer = RawPeer::connect(address)?;
        peer.raw(&hello_of_version(0, 0))?;
        peer.hello()?;
        peer.verdict()
    }),
    ("a newer version", "", |address, _| {
        let mut peer = RawPeer::connect(address)?;
        peer.raw(&hello_of_version(7, 9))?;
        peer.hello()?;
        peer.verdict()
    }),
    ("a page stream of no migration", "", |address, offer| {
        RawPeer::dial(address, Purpose::Bulk(3), offer.migration_id)?.verdict()
    }),
    ("an oversized message", "", |address, offer| {
        let mut peer = control(address, offer)?;
        let mut header = wire::encode_control(0, &[]).to_vec();
        header[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        let crc = header.len() - 4;
        let sum = crc32fast::hash(&header[..crc]).to_le_bytes();
        header[crc..].copy_from_slice(&sum);
        peer.raw(&header)?;
        peer.verdict()
    }),
    ("a flipped message", "", |address, offer| {
        let mut peer = control(address, offer)?;
        let bytes = peer.encode(&ControlMessage::Offer(Box::new(offer.clone())));
        let last = bytes.len() - 1;
        peer.raw(&flipped(bytes, last))?;
        peer.verdict()
    }),
    ("a message cut short", "", |address, offer| {
        let mut peer = control(address, offer)?;
        let bytes = peer.encode(&ControlMessage::Offer(Box::new(offer.clone())));
        peer.raw(&bytes[..bytes.len() / 2])?;
        Ok(String::new())
    }),
    ("a payload that is no message", "", |address, offer| {
        let mut peer = control(address, offer)?;
        let payload = [0xff; 40];
        peer.raw(&wire::encode_control(0, &payload))?;
        peer.raw(&payload)?;
        peer.verdict()
    }),
    ("commit first", "", |address, offer| {
        let mut peer = control(address, offer)?;
        peer.send(&ControlMessage::Commit)?;
        peer.verdict()
    }),
    ("an offer replayed", "frame 0 where frame 1", |address, offer| {
        let (mut peer, _stream) = accepted(address, offer)?;
        let payload = encode_message(&ControlMessage::Offer(Box::new(offer.clone())));
        peer.raw(&[&wire::encode_control(0, &payload)[..], &payload].concat())?;
        peer.verdict()
    }),
    ("commit before the state", "commit", |address, offer| {
        let (mut peer, _stream) = accepted(address, offer)?;
        peer.send(&ControlMessage::Commit)?;
        peer.verdict()
    }),
    ("more memory than there is", "available", |address, offer| {
        offered(address, offer, |offer| {
            offer.shape.memory_bytes = 8 << 40;
            offer.regions = offer.shape.regions();
        })
    }),
    ("more memory than can be", "memory of", |address, offer| {
        offered(address, offer, |offer| {
            offer.shape.memory_bytes = 0u64.wrapping_sub(4096);
            offer.regions = offer.shape.regions();
        })
    }),
    ("regions of another machine", "regions", |address, offer| {
        offered(address, offer, |offer| offer.regions[0].pages.0 += 1)
    }),
    ("no stream", "streams", |address, offer| offered(address, offer, |offer| offer.streams = 0)),
    ("too many streams", "streams", |address, offer| offered(address, offer, |offer| offer.streams = u16::MAX)),
    ("too many vCPUs", "vCPUs", |address, offer| offered(address, offer, |offer| offer.shape.cpus = 100_000)),
    ("a disk of the peer's choice", "a peer may not choose them", |address, offer| {
        offered(address, offer, |offer| {
            offer.shape.disks = vec![DiskSpec { path: "/etc/hostname".into(), readonly: false }];
        })
    }),
    ("a tap that cannot be", "no/tap", |address, offer| {
        offered(address, offer, |offer| {
            offer.shape.nets = vec![net("no/tap")];
        })
    }),
    ("a tap that is not there", "dunlin-no-tap", |address, offer| {
        offered(address, offer, |offer| offer.shape.nets = vec![net("dunlin-no-tap")])
    }),
    ("a damaged boot image", "boot image", |address, offer| imaged(address, offer, &[(b"no image", true)])),
    ("a second boot image", "second boot image", |address, offer| {
        let image = sound_image();
        imaged(address, offer, &[(&image, true), (&image, true)])
    }),
    ("more of an image than fits into the VM", "boot image above", |address, offer| {
        let part = vec![0; 48 << 20];
        imaged(address, offer, &[(&part, false), (&part, false)])
    }),
    ("a boot image without an end", "without an end", |address, offer| {
        let (mut peer, _stream) = accepted(address, offer)?;
        peer.send(&ControlMessage::BootImage { part: vec![1; 100], last: false })?;
        peer.send(&handed(Vec::new(), 1, 0))?;
        peer.verdict()
    }),
    ("a tunnel that nobody has allowed", "start it with --tunnel", |address, offer| {
        let (mut peer, _stream) = accepted(address, offer)?;
        peer.send(&secret_tunnel())?;
        peer.verdict()
    }),
    // A source of a later version that goes by what this one does not know hears so.
    ("a message that is none of this version", "does not decode", |address, offer| {
        let (mut peer, _stream) = accepted(address, offer)?;
        let unknown = [&[120][..], &encode_message(&secret_tunnel())[1..]].concat();
        // The offer was the first.
        peer.raw(&[&wire::encode_control(1, &unknown)[..], &unknown].concat())?;
        peer.verdict()
    }),
    ("pages beyond the end", "outside", |address, offer| {
        streamed(address, offer, &[START, pages(offer.regions[0].pages.0 - 1, 2)])
    }),
    ("pages at the end of all numbers", "", |address, offer| streamed(address, offer, &[START, pages(u64::MAX, 1)])),
    ("pages of no region", "outside", |address, offer| {
        streamed(address, offer, &[START, BulkFrame::Zeros(RegionId(7), PageRun::new(0, 1))])
    }),
    ("pages before a round", "out of order", |address, offer| {
        streamed(address, offer, &[BulkFrame::Zeros(RegionId::RAM, PageRun::new(0, 1))])
    }),
    ("a round that skips one", "out of order", |address, offer| {
        streamed(address, offer, &[BulkFrame::StartRound { round: 2, digested: false }])
    }),
    ("the end of another round", "out of order", |address, offer| {
        streamed(address, offer, &[START, BulkFrame::EndRound(9)])
    }),
    ("a replayed frame", "frame 0 where frame 1", |address, offer| {
        let (mut peer, mut stream) = accepted(address, offer)?;
        stream.raw(&wire::encode_bulk(0, START))?;
        stream.raw(&wire::encode_bulk(0, START))?;
        peer.verdict()
    }),
    ("a flipped frame", "checksum", |address, offer| {
        let (mut peer, mut stream) = accepted(address, offer)?;
        stream.raw(&flipped(wire::encode_bulk(0, START).to_vec(), 9))?;
        peer.verdict()
    }),
    ("pages cut short", "", |address, offer| {
        let (mut peer, mut stream) = accepted(address, offer)?;
        stream.frames(&[START, pages(0, 16)])?;
        stream.raw(&[1; 5000])?;
        drop(stream);
        peer.verdict()
    }),
    ("a stream twice", "twice", |address, offer| {
        let mut twice = offer.clone();
        twice.streams = 2;
        let (mut peer, _stream) = accepted(address, &twice)?;
        let _again = RawPeer::dial(address, Purpose::Bulk(0), offer.migration_id)?;
        peer.verdict()
    }),
    ("a state that is none", "state", |address, offer| {
        let (mut peer, mut stream) = accepted(address, offer)?;
        stream.frames(&[BulkFrame::StartRound { round: 1, digested: true }, BulkFrame::EndRound(1)])?;
        peer.send(&handed(vec![0xab; 900], 1, 0))?;
        peer.verdict()
    }),
    ("a wrong digest", "digest", |address, offer| {
        let (mut peer, mut stream) = accepted(address, offer)?;
        stream.frames(&[BulkFrame::StartRound { round: 1, digested: true }, BulkFrame::EndRound(1)])?;
        peer.send(&handed(Vec::new(), 1, 77))?;
        peer.verdict()
    }),
    ("a state of a round that never was", "round", |address, offer| {
        let (mut peer, mut stream) = accepted(address, offer)?;
        stream.frames(&[BulkFrame::StartRound { round: 1, digested: true }, BulkFrame::EndRound(1)])?;
        peer.send(&handed(Vec::new(), 0, 0))?;
        peer.verdict()
    }),
    ("silence after the offer", "stalled", |address, offer| {
        let (mut peer, _stream) = accepted(address, offer)?;
        peer.verdict()
    }),
];

/// One receiver takes all of it, one after the other, and then a VM.
#[test]
fn a_receiver_outlives_bad_peers() {
    let (source, target) = (TestHost::new().unwrap(), TestHost::new().unwrap());
    let _vm = source.boot(&[]).unwrap();
    let mut offer = real_offer(&source).unwrap();
    offer.streams = 1;
    let receiver = target.receive(&["--stall", "1s"]).unwrap();
    let address = receiver.socket_address();
    let mut failed = Vec::new();
    for (what, word, attack) in ATTACKS {
        offer.migration_id = MigrationId::random();
        let result = attack(address, &offer).and_then(|answer| {
            ensure!(answer.contains(word), "its answer lacks `{word}`: {answer}");
            wait_for("the end of leftovers", LIMIT, || target.leftovers().is_empty().then_some(()))
                .with_context(|| format!("left: {:?}", target.leftovers()))?;
            println!("{what}: {answer}");
            Ok(())
        });
        if let Err(error) = result {
            failed.push(format!("{what}: {error:#}"));
        }
    }
    assert!(failed.is_empty(), "{}\n{}", failed.join("\n"), target.story());
    assert!(source.info().is_some_and(|info| !info.dirty_log_on));
    let mut migrate = source.migrate(&receiver.address, &[]).unwrap();
    assert_eq!(migrate.exit_code(MIGRATION_LIMIT).unwrap(), Some(0), "{}", target.story());
    target.serial().await_beat().unwrap();
    target.serial().check_guest().unwrap();
}

type Lie = fn(&TcpListener) -> Result<()>;

/// Takes the offer and accepts it; whatever comes on the source's page streams is read and forgotten.
fn accept_offer(listener: &TcpListener) -> Result<RawPeer> {
    let mut peer = fake_target(listener)?;
    let Some(ControlMessage::Offer(offer)) = peer.recv()? else { anyhow::bail!("no offer") };
    peer.send(&ControlMessage::Accept(Accept { reservation_ns: 1 }))?;
    for _ in 0..offer.streams {
        let mut stream = fake_target(listener)?;
        // Ends with the source.
        std::thread::spawn(move || stream.drain());
    }
    let Some(ControlMessage::Place(_)) = peer.recv()? else { anyhow::bail!("it does not say where its ports are") };
    Ok(peer)
}

/// The same, and every ping is answered and the boot image taken.
fn reserved(listener: &TcpListener) -> Result<RawPeer> {
    let mut peer = accept_offer(listener)?;
    for _ in 0..4 {
        answer_ping(&mut peer)?;
    }
    while let Some(message) = peer.recv()? {
        let ControlMessage::BootImage { last, .. } = message else { anyhow::bail!("`{}`", message.name()) };
        if last {
            break;
        }
    }
    // The source waits until the image has been put away.
    answer_ping(&mut peer)?;
    Ok(peer)
}

fn answer_ping(peer: &mut RawPeer) -> Result<()> {
    let Some(ControlMessage::Ping(number)) = peer.recv()? else { anyhow::bail!("no ping") };
    peer.send(&ControlMessage::Pong(number))
}

fn say_early(listener: &TcpListener, message: &ControlMessage) -> Result<()> {
    let mut peer = reserved(listener)?;
    peer.send(message)?;
    peer.verdict().map(drop)
}

/// What a target says, and a word of the source's report.
const LIES: &[(&str, &str, Lie)] = &[
    ("noise for a greeting", "magic", |listener| {
        let mut peer = RawPeer::accept(listener)?;
        peer.raw(&[0x5a; 64])?;
        // Gone with the source's own greeting unread, the kernel would reset the connection and drop the noise.
        peer.drain();
        Ok(())
    }),
    ("another version", "versions 7 to 9", |listener| {
        let mut peer = RawPeer::accept(listener)?;
        peer.hello()?;
        peer.raw(&hello_of_version(7, 9))
    }),
    ("no greeting at all", "greeting", |listener| RawPeer::accept(listener).map(drop)),
    ("gone after the offer", "failed", |listener| {
        let mut peer = fake_target(listener)?;
        peer.recv().map(drop)
    }),
    ("prepared for an answer", "prepared", |listener| {
        let mut peer = fake_target(listener)?;
        peer.recv()?;
        peer.send(&ControlMessage::Prepared(BlackoutLedger::default()))?;
        peer.verdict().map(drop)
    }),
    ("a flipped answer", "checksum", |listener| {
        let mut peer = fake_target(listener)?;
        peer.recv()?;
        let bytes = peer.encode(&ControlMessage::Accept(Accept { reservation_ns: 1 }));
        let last = bytes.len() - 1;
        peer.raw(&flipped(bytes, last))?;
        peer.verdict().map(drop)
    }),
    ("a wrong pong", "pong", |listener| {
        let mut peer = accept_offer(listener)?;
        peer.recv()?;
        peer.send(&ControlMessage::Pong(9999))?;
        peer.verdict().map(drop)
    }),
    ("prepared at the start", "prepared", |listener| {
        say_early(listener, &ControlMessage::Prepared(BlackoutLedger::default()))
    }),
    ("running at the start", "running", |listener| {
        say_early(listener, &ControlMessage::Running(BlackoutLedger::default()))
    }),
    ("owner at the start", "state", |listener| say_early(listener, &ControlMessage::State(TargetState::Owner))),
    ("the end of another round", "round-received", |listener| say_early(listener, &ControlMessage::RoundReceived(77))),
    ("a change of mind", "no room", |listener| {
        say_early(listener, &ControlMessage::Cancel("no room after all".to_owned()))
    }),
    ("silence while memory flows", "stalled", |listener| {
        let mut peer = reserved(listener)?;
        peer.verdict().map(drop)
    }),
    ("gone while memory flows", "failed", |listener| reserved(listener).map(drop)),
];

/// One VM outlives all of them.
#[test]
fn a_source_outlives_lying_targets() {
    let source = TestHost::new().unwrap();
    let _vm = source.boot(&[]).unwrap();
    let mut failed = Vec::new();
    for (what, word, lie) in LIES {
        let result = lied_to(&source, word, *lie);
        if let Err(error) = result {
            failed.push(format!("{what}: {error:#}"));
        }
    }
    assert!(failed.is_empty(), "{}\n{}", failed.join("\n"), source.story());
    source.serial().check_guest().unwrap();
}

fn lied_to(source: &TestHost, word: &str, lie: Lie) -> Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let address = format!("tcp://{}", listener.local_addr()?);
    let mut migrate = source.migrate(&address, &["--stall", "1s", "--doubt", "1s"])?;
    lie(&listener).with_context(|| migrate.output.text())?;
    drop(listener);
    let code = migrate.exit_code(MIGRATION_LIMIT)?;
    let said = migrate.output.text();
    ensure!(matches!(code, Some(3 | 4)), "exit code {code:?}: {said}");
    ensure!(said.contains(word), "its report lacks `{word}`: {said}");
    source.serial().await_beat()?;
    let info = source.info().context("no VM any more")?;
    ensure!(!info.dirty_log_on, "the dirty log was left on");
    Ok(())
}

/// Moved anew before the target has let go what came of the last attempt: that is waited for, a machine that stays is not.
#[test]
fn what_a_move_left_behind_does_not_refuse_the_next() {
    let (source, target) = (TestHost::new().unwrap(), TestHost::new().unwrap());
    let _vm = source.boot(&[]).unwrap();
    let hold = HoldPoint::new(&target, Step::Reserved);
    let first = target.receive(&["--hold-at", &hold.argument()]).unwrap();
    let mut given_up = source.migrate(&first.address, &[]).unwrap();
    hold.await_held().unwrap();
    given_up.process.signal(Signal::INT).unwrap();
    assert_eq!(given_up.exit_code(MIGRATION_LIMIT).unwrap(), Some(6), "{}", given_up.output.text());

    let second = target.receive(&[]).unwrap();
    let mut refused = source.migrate(&second.address, &[]).unwrap();
    assert_eq!(refused.exit_code(MIGRATION_LIMIT).unwrap(), Some(3), "{}", refused.output.text());
    assert!(refused.output.text().contains("runs here already"), "{}", refused.output.text());

    let waits = || second.running.output.text().matches("has not ended yet").count();
    let before = waits();
    let mut moved = source.migrate(&second.address, &[]).unwrap();
    wait_for("the second receiver's wait", LIMIT, || (waits() > before).then_some(())).unwrap();
    hold.release().unwrap();
    assert_eq!(moved.exit_code(MIGRATION_LIMIT).unwrap(), Some(0), "{}\n{}", moved.output.text(), target.story());
    target.serial().check_guest().unwrap();
}

/// A VM whose process stands still is said to, and holds nobody up for long.
#[test]
fn a_stopped_machine_is_told() {
    let host = TestHost::new().unwrap();
    let vm = host.boot(&[]).unwrap();
    vm.process.signal(Signal::STOP).unwrap();
    let (code, output) = host.ask_info().unwrap();
    assert_eq!(code, i32::from(exit::ERROR), "{}", output.text());
    assert!(output.text().contains("is the VM's process stopped?"), "{}", output.text());
    vm.process.signal(Signal::CONT).unwrap();
    assert_eq!(host.ask_info().unwrap().0, 0);
}

/// Names and ports that are taken, targets that are not there, kernels that are none.
#[test]
fn what_is_taken_missing_or_wrong_is_refused() {
    let (source, target) = (TestHost::new().unwrap(), TestHost::new().unwrap());
    let _vm = source.boot(&[]).unwrap();

    // A second VM of the same name on one host.
    let mut second = source.start_vm(&guest(), &[]).unwrap();
    assert_eq!(second.exit_code(LIMIT).unwrap(), Some(3), "{}", second.output.text());
    assert!(second.output.text().contains("runs already"));

    // A receiver where another one listens.
    let receiver = target.receive(&[]).unwrap();
    let mut taken = target.start_receiver(&receiver.address).unwrap();
    assert_eq!(taken.exit_code(LIMIT).unwrap(), Some(3), "{}", taken.output.text());
    assert!(taken.output.text().contains("cannot listen"));

    // A target that has a VM of that name.
    let squatter = target.boot(&[]).unwrap();
    let mut migrate = source.migrate(&receiver.address, &[]).unwrap();
    assert_eq!(migrate.exit_code(MIGRATION_LIMIT).unwrap(), Some(3), "{}", migrate.output.text());
    assert!(migrate.output.text().contains("runs here already"), "{}", migrate.output.text());
    drop(squatter);

    // A port where nobody listens.
    let closed = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap();
    let mut migrate = source.migrate(&format!("tcp://{closed}"), &[]).unwrap();
    assert_eq!(migrate.exit_code(LIMIT).unwrap(), Some(3), "{}", migrate.output.text());

    // A VM of that name that is not there.
    let mut migrate = TestHost::new().unwrap().migrate(&receiver.address, &[]).unwrap();
    assert_eq!(migrate.exit_code(LIMIT).unwrap(), Some(3), "{}", migrate.output.text());

    // A network port of another address.
    let misfit = TestHost::new().unwrap();
    let receiver = misfit.receive(&["--net", "tap=t0,mac=52:54:00:00:00:99"]).unwrap();
    let mut offer = real_offer(&source).unwrap();
    offer.migration_id = MigrationId::random();
    let reason = offered(receiver.socket_address(), &offer, |offer| offer.shape.nets = vec![net("t0")]).unwrap();
    assert!(reason.contains("no --net here has the VM's MAC address"), "{reason}");
    drop(receiver);

    // A disk that is not there.
    let receiver = misfit.receive(&["--disk", "path=/nonexistent/disk.img"]).unwrap();
    let mut offer = real_offer(&source).unwrap();
    offer.migration_id = MigrationId::random();
    let disk = DiskSpec { path: "/srv/theirs.img".into(), readonly: false };
    let reason = offered(receiver.socket_address(), &offer, |offer| offer.shape.disks = vec![disk]).unwrap();
    assert!(reason.contains("No such file"), "{reason}");
    drop(receiver);

    // Network ports and disks that do not fit the VM's.
    for option in [["--net", "tap=t0,mac=52:54:00:00:00:01"], ["--disk", "path=/nonexistent"]] {
        let receiver = misfit.receive(&option).unwrap();
        let mut migrate = source.migrate(&receiver.address, &[]).unwrap();
        assert_eq!(migrate.exit_code(MIGRATION_LIMIT).unwrap(), Some(3), "{}", migrate.output.text());
        assert!(migrate.output.text().contains(option[0]), "{}", migrate.output.text());
        assert!(misfit.leftovers().is_empty());
    }
    assert!(source.info().is_some_and(|info| info.name == VM && !info.dirty_log_on));
    source.serial().check_guest().unwrap();
}

#[test]
fn a_kernel_that_is_none_starts_no_vm() {
    let host = TestHost::new().unwrap();
    let whole = std::fs::read(guest()).unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = host.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let mut wild = whole.clone();
    // The first program header's offset, far beyond the file.
    let headers = u64::from_le_bytes(wild[32..40].try_into().unwrap()) as usize;
    wild[headers + 8..headers + 16].copy_from_slice(&u64::MAX.to_le_bytes());
    let kernels = [
        write("empty", &[]),
        write("text", b"#!/bin/sh\necho no kernel\n"),
        write("cut", &whole[..whole.len() / 3]),
        write("wild", &wild),
        Path::new("/nonexistent/kernel").to_owned(),
        Path::new("/").to_owned(),
        // An ELF that is no kernel.
        std::env::current_exe().unwrap(),
    ];
    for kernel in kernels {
        let mut vm = host.start_vm(&kernel, &[]).unwrap();
        let code = vm.exit_code(LIMIT).unwrap_or_else(|error| panic!("{}: {error}", kernel.display()));
        let said = vm.output.text();
        assert_eq!(code, Some(i32::from(exit::ERROR)), "{}: {said}", kernel.display());
        assert!(!said.contains("panicked") && said.contains("could not be started"), "{}: {said}", kernel.display());
        assert!(host.leftovers().is_empty(), "{}: {:?}", kernel.display(), host.leftovers());
    }
}

#[test]
fn a_reader_that_has_gone_ends_nothing_but_itself() {
    let host = TestHost::new().unwrap();
    let _vm = host.boot(&[]).unwrap();
    let run_dir = host.run_dir();
    for arguments in
        [&["vm", "list"][..], &["--json", "vm", "info", VM], &["vm", "console", VM], &["vm", "pause", "none"]]
    {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = dunlin_tests::dunlin();
        command.args(arguments).arg("--run-dir").arg(&run_dir).stdin(std::process::Stdio::null());
        command.stdout(writer.try_clone().unwrap()).stderr(writer);
        let status = command.status().unwrap();
        assert!(matches!(status.code(), Some(0 | 1 | 3)), "{arguments:?}: {status}");
    }
    host.serial().await_beat().unwrap();
}
