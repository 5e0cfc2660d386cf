//! Frames that reach a VM's former place when it has left: they are carried to it, once and in order.

use std::time::Duration;

use dunlin::migrate::Strategy;
use dunlin_tests::client::{PingReport, Pinger};
use dunlin_tests::wait::wait_for;
use dunlin_tests::{Hop, HopOptions, Rig, VmSpec, guest};

const LIMIT: Duration = Duration::from_secs(30);
/// Frames come this often; none fits into no blackout.
const EVERY: Duration = Duration::from_millis(1);

/// Moves a VM that is pinged all the time; what became of the pings.
fn hop(strategy: Strategy, more: &[&str]) -> (PingReport, Hop) {
    let spec = VmSpec { guest: "dunlin.wl0=ws:8M,rate:1000,fill:random".to_owned(), ..VmSpec::default() };
    let mut rig = Rig::boot(&spec).unwrap();
    let pinger = rig.client.enter(|| Pinger::start(Rig::guest_ip(), EVERY)).unwrap();
    wait_for("some answers", LIMIT, || (pinger.report().answered > 200).then_some(())).unwrap();
    let more = more.iter().map(|&argument| argument.to_owned()).collect();
    let options = HopOptions { strategy, more, ..HopOptions::default() };
    let hop = rig.hop(&options).unwrap();
    assert_eq!(hop.exit_code, Some(0), "{hop:#?}");
    let so_far = pinger.report().answered;
    wait_for("answers from there", LIMIT, || (pinger.report().answered > so_far + 200).then_some(())).unwrap();
    let report = pinger.finish(Duration::from_secs(2));
    assert_eq!(guest::errors(&rig.counters().unwrap()), Vec::<String>::new());
    assert!(rig.stop().unwrap().success());
    (report, hop)
}

/// Whatever way it moves, and for however long it stands: what it uses takes half a second at 400 Mbit/s, within which half as many frames come as a tap holds.
#[test]
fn no_frame_is_lost_doubled_or_turned_round() {
    let ways = [
        (Strategy::StopAndCopy, &["--bandwidth", "400Mbit"][..]),
        (Strategy::PreCopy, &[]),
        (Strategy::PostCopy, &["--bandwidth", "400Mbit"]),
        (Strategy::PostCopy, &["--bandwidth", "400Mbit", "--safe-post-copy"]),
    ];
    for (strategy, more) in ways {
        let (pings, hop) = hop(strategy, more);
        let relay = hop.report.relay.clone().unwrap();
        println!(
            "shows {strategy} {more:?}: {} pings, blackout {:.1} ms, relayed {relay:?}; {} unanswered, {} doubled, {} out of order",
            pings.sent,
            hop.report.blackout_ns as f64 / 1e6,
            pings.unanswered.len(),
            pings.duplicates,
            pings.reordered
        );
        assert!(relay.frames > 0 && relay.dropped_frames == 0 && relay.error.is_empty(), "{relay:?}");
        assert_eq!((&pings.unanswered, pings.duplicates, pings.reordered), (&Vec::new(), 0, 0), "{strategy}");
    }
}

/// What the relay is for: the same without it.
#[test]
fn without_it_what_comes_while_the_vm_stands_is_lost() {
    let (pings, hop) = hop(Strategy::StopAndCopy, &["--bandwidth", "400Mbit", "--relay", "0s"]);
    let stood_ms = hop.report.blackout_ns / 1_000_000;
    println!("shows {} of {} pings unanswered, blackout {stood_ms} ms", pings.unanswered.len(), pings.sent);
    assert_eq!(hop.report.relay, None);
    assert!(pings.unanswered.len() as u64 > stood_ms / 2, "{} unanswered in {stood_ms} ms", pings.unanswered.len());
}
