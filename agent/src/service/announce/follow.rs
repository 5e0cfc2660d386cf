//! Whether the network follows: the forwarding tables of bridges, and this namespace's neighbour tables, watched beside an announcement.
//!
//! One thread a bridge and one for the neighbour tables. Nothing is polled: the kernel tells of each change, and the tables are read before and after.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Listener, News};
use crate::announce::diagnose;
use crate::model::network::{EntryFacts, Followed, PortFacts, Seen, StuckCause, Verdict};
use crate::model::{MacAddress, NetSpec, Station};
use crate::net::fdb::{self, FdbChange, FdbEntry, FdbWatch};
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
    follow: Vec<Follow>,
    stations: Vec<Station>,
    positions: Mutex<HashMap<(usize, MacAddress), Position>>,
    changed: Condvar,
    over: AtomicBool,
    began: Began,
    listener: Listener<'a>,
}

impl<'a> State<'a> {
    fn new(follow: &[Follow], stations: &[Station], listener: Listener<'a>) -> Self {
        Self {
            follow: follow.to_vec(),
            stations: stations.to_vec(),
            positions: Mutex::new(HashMap::new()),
            changed: Condvar::new(),
            over: AtomicBool::new(false),
            began: Began::default(),
            listener,
        }
    }

    /// Starts to follow each bridge, and notes where the stations are before anything is announced.
    fn open(&self) -> Result<Vec<FdbWatch>, NetError> {
        let mut watches =
            self.follow.iter().map(|follow| FdbWatch::open(&follow.bridge)).collect::<Result<Vec<_>, _>>()?;
        for (at, watch) in watches.iter_mut().enumerate() {
            for entry in watch.entries()?.into_iter().filter(|entry| self.knows(entry.mac)) {
                let position = Position { port: Some(entry.port), ..Position::default() };
                self.positions().insert((at, entry.mac), position);
            }
        }
        Ok(watches)
    }

    /// Follows the bridge with number `at` until it is over.
    fn watch(&self, at: usize, watch: &mut FdbWatch) {
        while !self.is_over() {
            match watch.next_change(END_LATENCY) {
                Ok(change) => change.into_iter().for_each(|change| self.take(at, change)),
                Err(error) => {
                    tracing::warn!("bridge `{}` is not followed any more: {error}", self.follow[at].bridge);
                    return;
                }
            }
        }
    }

    /// Whether all stations are where they should be.
    fn is_settled(&self, positions: &HashMap<(usize, MacAddress), Position>) -> bool {
        (0..self.follow.len()).all(|at| self.stations.iter().all(|station| self.has(positions, at, station.mac)))
    }

    /// Whether the bridge with number `at` has the station where it should be.
    fn has(&self, positions: &HashMap<(usize, MacAddress), Position>, at: usize, mac: MacAddress) -> bool {
        positions.get(&(at, mac)).is_some_and(|position| match &self.follow[at].port {
            Some(port) => position.port.as_ref() == Some(port),
            None => position.seen_at.is_some(),
        })
    }

    fn positions(&self) -> MutexGuard<'_, HashMap<(usize, MacAddress), Position>> {
        self.positions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    fn knows(&self, mac: MacAddress) -> bool {
        self.stations.iter().any(|station| station.mac == mac)
    }

    fn take(&self, at: usize, change: FdbChange) {
        let FdbChange { seen_at, entry, removed } = change;
        let follow = &self.follow[at];
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
    let state = State::new(follow, stations, listener);
    let mut watches = state.open()?;
    let mut neighbours = NeighbourWatch::open()?;
    let result = std::thread::scope(|scope| {
        for (at, watch) in watches.iter_mut().enumerate() {
            let state = &state;
            scope.spawn(move || state.watch(at, watch));
        }
        scope.spawn(|| watch_neighbours(&state, &mut neighbours));
        let result = work(&state.began);
        state.began.now();
        wait(&state, within, cancel);
        state.over.store(true, Ordering::Release);
        result
    });
    let mut followed = Vec::new();
    for (at, watch) in watches.iter_mut().enumerate() {
        followed.extend(judge(&state, at, &watch.entries()?)?);
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

fn wait(state: &State<'_>, within: Duration, cancel: &AtomicBool) {
    let mut positions = state.positions();
    while !state.is_settled(&positions)
        && state.began.after(monotonic_now()) < within
        && !cancel.load(Ordering::Acquire)
    {
        let waited = state.changed.wait_timeout(positions, END_LATENCY);
        positions = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// What the table says in the end.
fn judge(state: &State<'_>, at: usize, entries: &[FdbEntry]) -> Result<Vec<Followed>, NetError> {
    let follow = &state.follow[at];
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

/// The bridges of a VM's taps, watched by threads of their own until this is dropped. A tap under no bridge has none.
pub(in crate::service) struct Watching {
    state: Arc<State<'static>>,
    /// Which station belongs to which bridge: others are none of that bridge's.
    own: Vec<(usize, MacAddress)>,
    threads: Vec<JoinHandle<()>>,
}

impl Watching {
    /// Watches whether bridges have the VM behind its taps: where it arrives.
    ///
    /// # Errors
    /// A table that cannot be read or followed.
    pub(in crate::service) fn arrival(nets: &[NetSpec]) -> Result<Self, NetError> {
        Self::of_taps(nets, |net| Some(net.tap.clone()))
    }

    /// Watches whether bridges have the VM elsewhere: where it leaves.
    ///
    /// # Errors
    /// A table that cannot be read or followed.
    pub(in crate::service) fn departure(nets: &[NetSpec]) -> Result<Self, NetError> {
        Self::of_taps(nets, |_| None)
    }

    fn of_taps(nets: &[NetSpec], port: impl Fn(&NetSpec) -> Option<String>) -> Result<Self, NetError> {
        let (mut follow, mut stations, mut own) = (Vec::new(), Vec::new(), Vec::new());
        for net in nets {
            match bridge::bridge_of(&net.tap) {
                Ok(Some(bridge)) => {
                    own.push((follow.len(), net.station.mac));
                    follow.push(Follow { bridge: bridge.name, port: port(net) });
                    stations.push(net.station.clone());
                }
                Ok(None) => {}
                Err(error) => tracing::warn!("tap `{}`: {error}", net.tap),
            }
        }
        let state = Arc::new(State::new(&follow, &stations, &|_: News<'_>| {}));
        let mut watching = Self { state, own, threads: Vec::new() };
        for (at, mut watch) in watching.state.open()?.into_iter().enumerate() {
            let state = Arc::clone(&watching.state);
            let spawned = std::thread::Builder::new().name("follow".into()).spawn(move || state.watch(at, &mut watch));
            watching.threads.push(spawned.map_err(|source| NetError::Kernel {
                action: "start a thread that follows a bridge".to_owned(),
                source,
            })?);
        }
        Ok(watching)
    }

    /// The first announcement leaves now, or whatever else times are counted from.
    pub(in crate::service) fn begin(&self) {
        self.state.began.now();
    }

    /// Whether every bridge has the VM where it should be.
    pub(in crate::service) fn is_settled(&self) -> bool {
        let positions = self.state.positions();
        self.own.iter().all(|&(at, mac)| self.state.has(&positions, at, mac))
    }

    /// What the tables say by now. One that cannot be read any more is left out, and said in the log.
    pub(in crate::service) fn judge(&self) -> Vec<Followed> {
        let mut followed = Vec::new();
        for (at, follow) in self.state.follow.iter().enumerate() {
            match fdb::entries(&follow.bridge).and_then(|entries| judge(&self.state, at, &entries)) {
                Ok(judged) => followed.extend(judged.into_iter().filter(|one| self.own.contains(&(at, one.mac)))),
                Err(error) => tracing::warn!("whether bridge `{}` has relearned is not known: {error}", follow.bridge),
            }
        }
        followed
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.state.over.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            // One that panicked has said so.
            let _ended = thread.join();
        }
    }
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
