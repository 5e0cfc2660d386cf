//! What a guest hears after a move: at its new place the router behind the same address has another Ethernet address.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use dunlin_tests::client::Pinger;
use dunlin_tests::topology::Lan;
use dunlin_tests::wait::wait_for;
use dunlin_tests::{HopOptions, Rig, VmSpec, guest, rig};

const LIMIT: Duration = Duration::from_secs(30);
const EVERY: Duration = Duration::from_millis(1);

/// The client stands for the router: its Ethernet address is another one when the VM has come to its new place, and it knows the guest and so never asks for it. The guest answers to whom it knows.
/// How many questions were answered with the former address, with the new one before the move, and after it.
fn answered(target: IpAddr, net: &str) -> [u64; 3] {
    let spec =
        VmSpec { guest: "dunlin.wl0=ws:8M,rate:1000,fill:random".to_owned(), net: net.to_owned(), ..VmSpec::default() };
    let mut rig = Rig::boot(&spec).unwrap();
    let pinger = rig.client.enter(|| Pinger::start_udp(SocketAddr::new(target, 7), EVERY)).unwrap();
    wait_for("some answers", LIMIT, || (pinger.report().answered > 100).then_some(())).unwrap();
    let formerly = pinger.finish(Duration::from_secs(1)).answered;
    // Nobody sends meanwhile: with its address an interface loses its neighbours.
    let neighbour = format!("neigh replace {target} lladdr {} nud permanent dev eth0", rig::MAC);
    rig.client.ip_batch(&["link set eth0 address 02:00:00:00:00:c7".to_owned(), neighbour]).unwrap();
    let pinger = rig.client.enter(|| Pinger::start_udp(SocketAddr::new(target, 7), EVERY)).unwrap();
    let sent = |more: u64| {
        let sent = pinger.report().sent;
        wait_for("questions", LIMIT, || (pinger.report().sent > sent + more).then_some(())).unwrap();
    };
    sent(100);
    let before = pinger.report().answered;
    let hop = rig.hop(&HopOptions::default()).unwrap();
    assert_eq!(hop.exit_code, Some(0), "{hop:#?}");
    sent(300);
    let after = pinger.finish(Duration::ZERO).answered;
    assert!(rig.stop().unwrap().success());
    [formerly, before, after - before]
}

#[test]
fn a_guest_hears_who_its_router_is_at_the_new_place() {
    let [v4, v6] = Lan::GUEST_IPS;
    let gateways = Lan::CLIENT_IPS.map(|ip| format!(",gateway={ip}"));
    for (target, gateway) in [v4, v6].into_iter().zip(&gateways) {
        let [_, _, without] = answered(target, "");
        let [formerly, before, after] = answered(target, gateway);
        println!(
            "shows {target}: {formerly} answers from its former router, {before} when that changed, {after} after the move; without gateway= {without}"
        );
        assert_eq!((without, before), (0, 0), "the guest has found its router by itself: nothing is shown");
        assert!(after > 250, "{after} answers after the move");
    }
}

/// Whoever has Linux as a guest lets it announce itself: see `linux.rs`. The test guest's driver does not know how to, and is not asked.
#[test]
fn a_guest_that_cannot_announce_itself_is_not_asked() {
    let spec = VmSpec { guest: "dunlin.wl0=ws:8M,rate:1000,fill:random".to_owned(), ..VmSpec::default() };
    let mut rig = Rig::boot(&spec).unwrap();
    rig.hop(&HopOptions::default()).unwrap();
    let ports = &rig.info().unwrap()["ports"];
    assert_eq!(ports.as_array().unwrap().len(), 1, "{ports}");
    assert_eq!(ports[0]["guest_announcements"], 0);
    assert!(ports[0]["announced_frames"].as_u64().unwrap() >= 4, "{ports}");
    assert_eq!(guest::errors(&rig.counters().unwrap()), Vec::<String>::new());
    assert!(rig.stop().unwrap().success());
}
