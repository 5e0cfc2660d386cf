//! Whether the network follows: the forwarding tables of bridges, and this namespace's neighbour tables, watched beside an announcement.
//!
//! One thread a bridge and one for the neighbour tables. Nothing is polled: the kernel tells of each change, and the tables are read before and after.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use super::{Listener, News};
use crate::announce::diagnose;
use crate::model::network::{EntryFacts, Followed, PortFacts, Seen, StuckCause, Verdict};
use crate::model::{MacAddress, NetSpec, Station};
use crate::net::fdb::{FdbChange, FdbWatch};
use crate::net::neighbour::NeighbourWatch;
use crate::net::{NetError, bridge};
use crate::time::monotonic_now;

/// How long a watching thread may take to notice that it is over.
const END_LATENCY: Duration = Duration::from_millis(20);

/// A bridge, and the port behind which the stations should be; written `BRIDGE` or `BRIDGE=PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Follow {
    /// The bridge.
    pub bridge: String,
    /// The port, where it is known.
    pub port: Option<String>,
}

/// Text that names no bridge.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` names no bridge; write BRIDGE or BRIDGE=PORT")]
pub struct FollowError(String);

impl FromStr for Follow {
    type Err = FollowError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (bridge, port) = text.split_once('=').map_or((text, None), |(bridge, port)| (bridge, Some(port)));
        if bridge.is_empty() || port.is_some_and(str::is_empty) {
            return Err(FollowError(text.to_owned()));
        }
        Ok(Self { bridge: bridge.to_owned(), port: port.map(str::to_owned) })
    }
}

impl fmt::Display for Follow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.port {
            Some(port) => write!(f, "{}={port}", self.bridge),
            None => f.write_str(&self.bridge),
        }
    }
}

/// When the first announcement began, once it has.
#[derive(Debug, Default)]
pub struct Began(OnceLock<Duration>);

impl Began {
    /// It begins now.
    pub fn now(&self) {
        let _began_before = self.0.set(monotonic_now());
    }

    /// How long after it something was; zero for what came before.
    fn after(&self, time: Duration) -> Duration {
        self.0.get().map_or(Duration::ZERO, |began| time.saturating_sub(*began))
    }
}

/// Where a station is, in one table.
#[derive(Clone, Debug, Default)]
struct Position {
    port: Option<String>,
    seen_at: Option<Duration>,
    moves: u32,
    was_expected: bool,
}

/// What all threads share.
struct State<'a> {
    stations: &'a [Station],
    positions: Mutex<HashMap<(usize, MacAddress), Position>>,
    changed: Condvar,
    over: AtomicBool,
    began: Began,
    listener: Listener<'a>,
}

impl State<'_> {
    fn positions(&self) -> MutexGuard<'_, HashMap<(usize, MacAddress), Position>> {
        self.positions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    fn knows(&self, mac: MacAddress) -> bool {
        self.stations.iter().any(|station| station.mac == mac)
    }

    fn take(&self, at: usize, follow: &Follow, change: FdbChange) {
        let FdbChange { seen_at, entry, removed } = change;
        if !self.knows(entry.mac) {
            return;
        }
        let mut positions = self.positions();
        let position = positions.entry((at, entry.mac)).or_default();
        let there = position.port.as_ref() == Some(&entry.port);
        if removed {
            if there {
                position.port = None;
            }
            return;
        }
        if there {
            return;
        }
        position.moves += 1;
        position.seen_at = Some(seen_at);
        position.was_expected |= follow.port.as_ref() == Some(&entry.port);
        position.port = Some(entry.port.clone());
        drop(positions);
        self.changed.notify_all();
        (self.listener)(News::Seen(&Seen {
            mac: entry.mac,
            after_first_ns: self.began.after(seen_at).as_nanos() as u64,
            bridge: Some(follow.bridge.clone()),
            port: Some(entry.port),
            ip: None,
        }));
    }
}

/// Does `work`, which calls [`Began::now`] when the first frame leaves, and watches meanwhile and on, until all stations are where they should be, `within` after the beginning has passed,
/// or `cancel` is set. Without bridges to follow nothing is watched.
///
/// # Errors
/// A bridge that cannot be followed; nothing was done.
pub(super) fn beside<T>(
    stations: &[Station],
    follow: &[Follow],
    within: Duration,
    cancel: &AtomicBool,
    listener: Listener<'_>,
    work: impl FnOnce(&Began) -> T,
) -> Result<(T, Vec<Followed>), NetError> {
    if follow.is_empty() {
        return Ok((work(&Began::default()), Vec::new()));
    }
    let mut watches = follow.iter().map(|follow| FdbWatch::open(&follow.bridge)).collect::<Result<Vec<_>, _>>()?;
    let mut neighbours = NeighbourWatch::open()?;
    let state = State {
        stations,
        positions: Mutex::default(),
        changed: Condvar::new(),
        over: AtomicBool::new(false),
        began: Began::default(),
        listener,
    };
    for (at, watch) in watches.iter_mut().enumerate() {
        for entry in watch.entries()?.into_iter().filter(|entry| state.knows(entry.mac)) {
            let position = Position { port: Some(entry.port), ..Position::default() };
            state.positions().insert((at, entry.mac), position);
        }
    }
    let result = std::thread::scope(|scope| {
        for (at, (watch, follow)) in watches.iter_mut().zip(follow).enumerate() {
            let state = &state;
            scope.spawn(move || {
                while !state.is_over() {
                    match watch.next_change(END_LATENCY) {
                        Ok(change) => change.into_iter().for_each(|change| state.take(at, follow, change)),
                        Err(error) => {
                            tracing::warn!("bridge `{}` is not followed any more: {error}", follow.bridge);
                            return;
                        }
                    }
                }
            });
        }
        scope.spawn(|| watch_neighbours(&state, &mut neighbours));
        let result = work(&state.began);
        state.began.now();
        wait(&state, follow, within, cancel);
        state.over.store(true, Ordering::Release);
        result
    });
    let mut followed = Vec::new();
    for (at, (watch, follow)) in watches.iter_mut().zip(follow).enumerate() {
        followed.extend(judge(&state, at, follow, watch)?);
    }
    Ok((result, followed))
}

fn watch_neighbours(state: &State<'_>, neighbours: &mut NeighbourWatch) {
    let mut known: BTreeMap<std::net::IpAddr, MacAddress> = BTreeMap::new();
    while !state.is_over() {
        let (neighbour, seen_at) = match neighbours.next_change(END_LATENCY) {
            Ok(Some(change)) => change,
            Ok(None) => continue,
            Err(error) => {
                tracing::warn!("the neighbour tables are not followed any more: {error}");
                return;
            }
        };
        let announced =
            state.stations.iter().any(|station| station.mac == neighbour.mac && station.ips.contains(&neighbour.ip));
        if announced && !neighbour.doubtful && known.insert(neighbour.ip, neighbour.mac) != Some(neighbour.mac) {
            (state.listener)(News::Seen(&Seen {
                mac: neighbour.mac,
                after_first_ns: state.began.after(seen_at).as_nanos() as u64,
                bridge: None,
                port: None,
                ip: Some(neighbour.ip),
            }));
        }
    }
}

fn wait(state: &State<'_>, follow: &[Follow], within: Duration, cancel: &AtomicBool) {
    let is_there = |positions: &HashMap<(usize, MacAddress), Position>| {
        follow.iter().enumerate().all(|(at, follow)| {
            state.stations.iter().all(|station| {
                positions.get(&(at, station.mac)).is_some_and(|position| match &follow.port {
                    Some(port) => position.port.as_ref() == Some(port),
                    None => position.seen_at.is_some(),
                })
            })
        })
    };
    let mut positions = state.positions();
    while !is_there(&positions) && state.began.after(monotonic_now()) < within && !cancel.load(Ordering::Acquire) {
        let waited = state.changed.wait_timeout(positions, END_LATENCY);
        positions = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// What the table says in the end.
fn judge(state: &State<'_>, at: usize, follow: &Follow, watch: &mut FdbWatch) -> Result<Vec<Followed>, NetError> {
    let entries = watch.entries()?;
    let port_facts = expected_port_facts(follow)?;
    let positions = state.positions();
    let judged = state.stations.iter().map(|station| {
        let own: Vec<EntryFacts> =
            entries.iter().filter(|entry| entry.mac == station.mac).map(|entry| entry.facts()).collect();
        let position = positions.get(&(at, station.mac)).cloned().unwrap_or_default();
        let expected = follow.port.as_ref();
        let port = own.iter().find(|entry| Some(&entry.port) == expected && !entry.locked).or(own.first());
        let port = port.map(|entry| entry.port.clone());
        let waits = own.iter().any(|entry| Some(&entry.port) == expected && entry.locked);
        // A change whose notification was lost shows in the table alone.
        let moved = position.seen_at.is_some() || position.port != port;
        let verdict = match (expected, &port) {
            (_, None) => Verdict::NotRelearned,
            (Some(expected), Some(port)) if expected != port || waits => Verdict::NotRelearned,
            _ if moved => Verdict::Relearned,
            (Some(_), _) => Verdict::WasThere,
            (None, _) => Verdict::Unchanged,
        };
        let causes = match (verdict, expected) {
            (Verdict::NotRelearned, Some(expected)) => {
                diagnose::causes(expected, port_facts.as_ref(), &own, position.was_expected)
            }
            (Verdict::NotRelearned, None) => vec![StuckCause::Silence],
            _ => Vec::new(),
        };
        let seen_at = position.seen_at.filter(|_| verdict == Verdict::Relearned);
        Followed {
            bridge: follow.bridge.clone(),
            expected_port: follow.port.clone(),
            mac: station.mac,
            verdict,
            port,
            after_first_ns: seen_at.map(|time| state.began.after(time).as_nanos() as u64),
            moves: position.moves,
            causes: causes.into_iter().map(|cause| cause.diagnosis()).collect(),
        }
    });
    Ok(judged.collect())
}

/// The facts of the port that was named; none if the bridge has no such port.
fn expected_port_facts(follow: &Follow) -> Result<Option<PortFacts>, NetError> {
    let Some(port) = &follow.port else { return Ok(None) };
    let links = bridge::links()?;
    let master = links.iter().find(|link| link.name == follow.bridge).map(|link| link.index);
    Ok(links
        .iter()
        .find(|link| link.name == *port && link.master.is_some() && link.master == master)
        .and_then(|l| l.port))
}

/// Watches only: somebody else announces.
///
/// # Errors
/// A bridge that cannot be followed.
pub fn only(
    stations: &[Station],
    follow: &[Follow],
    within: Duration,
    cancel: &AtomicBool,
    listener: Listener<'_>,
) -> Result<Vec<Followed>, NetError> {
    beside(stations, follow, within, cancel, listener, Began::now).map(|((), followed)| followed)
}

/// Does `work`, the announcements of a VM that has arrived, and says whether the bridges of its taps have it behind these. A tap under no bridge has none that could.
///
/// # Errors
/// A table that cannot be read. `work` was done.
pub(in crate::service) fn taps(nets: &[NetSpec], work: &mut dyn FnMut()) -> Result<Vec<Followed>, NetError> {
    let mut found = Vec::new();
    for net in nets {
        match bridge::bridge_of(&net.tap) {
            Ok(Some(bridge)) => {
                found.push((Follow { bridge: bridge.name, port: Some(net.tap.clone()) }, Station::from(net)));
            }
            Ok(None) => {}
            Err(error) => tracing::warn!("tap `{}`: {error}", net.tap),
        }
    }
    let (follow, stations): (Vec<_>, Vec<_>) = found.iter().cloned().unzip();
    let mut done = false;
    let mut once = || {
        if !std::mem::replace(&mut done, true) {
            work();
        }
    };
    let (never, nobody) = (AtomicBool::new(false), |_: News<'_>| {});
    let followed = beside(&stations, &follow, Duration::ZERO, &never, &nobody, |_| once());
    once();
    let own = |one: &Followed| {
        found.iter().any(|(follow, station)| {
            (one.mac, &one.bridge, &one.expected_port) == (station.mac, &follow.bridge, &follow.port)
        })
    };
    Ok(followed?.1.into_iter().filter(own).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_followed_reads_as_it_is_written() {
        for good in ["br0", "br0=tap0"] {
            assert_eq!(good.parse::<Follow>().unwrap().to_string(), good);
        }
        for bad in ["", "=tap0", "br0="] {
            assert!(bad.parse::<Follow>().is_err(), "{bad} was accepted");
        }
    }
}
