//! The bench `tracking`: what Dunlin and QEMU say of a guest's writing beside what the guest itself counted, what that costs the guest, and
//! what an event costs the host.

mod events;
mod figures;
mod truth;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use self::events::EVENTS;
use self::figures::{CURVE_MS, Figure, Held, Profile};
use self::truth::{Pace, Pattern, Truth, Window, windows};
use super::guest::{Console, Load, Rate};
use super::measure::{Aim, Row, Samples};
use super::ours::{Places, Vm};
use super::qemu::{Boot, Qemu, Side};
use super::{Effort, fresh};
use crate::interrupt;
use crate::process::OwnChild;

const BENCH: &str = "tracking";
/// Length of the guest's windows: the longest interval of our curves.
const WINDOW_MS: u64 = 1280;
/// Windows of a control run.
const CONTROL_WINDOWS: usize = 3;
const QUICK_CONTROL_WINDOWS: usize = 2;
/// The part of the time that an armed window takes at most where the slowdown is averaged.
const DUTY: f64 = 0.25;
/// Intervals of measurements that go on without a pause, so that guest's windows lie within them.
const INTERVALS: u32 = 3;
/// How long a window may be waited for.
const WINDOW_LIMIT: Duration = Duration::from_secs(20);
/// Errors, slowdown (averaged), in percent; a gap in milliseconds; truths outside of 95 % intervals, in percent.
const AIM_ARMED_ERROR: f64 = 1.0;
const AIM_SAMPLED_ERROR: f64 = 10.0;
const AIM_SLOWDOWN: f64 = 2.0;
const AIM_GAP_MS: f64 = 2.0;
const AIM_OUTSIDE: f64 = 7.0;
/// An armed figure is to be exact while faults take less of the window than this, in percent.
const FAULT_PERCENT: f64 = 5.0;
/// What a write fault takes, in nanoseconds, for that.
const FAULT_NS: f64 = 2500.0;

/// One load.
#[derive(Clone, Debug)]
struct Case {
    name: String,
    pattern: Pattern,
    rate: Rate,
    quick: bool,
}

/// All loads.
fn cases() -> Vec<Case> {
    const RATES: [(&str, Rate); 4] = [("10k", "10000"), ("50k", "50000"), ("200k", "200000"), ("max", "max")];
    const QUICK: [&str; 2] = ["random-50k", "seq-max"];
    let patterns = [Pattern::Sequential, Pattern::Random, Pattern::HotCold];
    let all = patterns.iter().flat_map(|&pattern| RATES.map(|(name, rate)| (pattern, name, rate)));
    let cases = all.map(|(pattern, rate_name, rate)| {
        let name = format!("{}-{rate_name}", pattern.name());
        let quick = QUICK.contains(&name.as_str());
        Case { name, pattern, rate, quick }
    });
    cases.collect()
}

/// What the footer says of the metrics.
pub(super) const DEFINITIONS: &str = "\
Guest: 512 MiB, 1 vCPU, writes in a working set of 256 MiB at the case's rate in pages/s, one after the other (seq), at random, or nine of
ten in a tenth of the pages (hotcold). Windows are 1280 ms, as the guest's own are, or 1 s (dirty-rate, QEMU).
  control          the guest left alone: `truth` are the different pages that it counted in its windows, `truth_model` the same by
                   pattern and pace, against which everything is held (at the length that each measurement had); `truth_error` is how far the
                   guest's own count lies from it, at the worst of 5 to 1280 ms; `gap` is the longest time in a window (median)
                   for which the writer wanted to run and did not
  passive          `dirty-rate`: nothing is protected, a lower bound
  armed            `wws --regime armed`: `figure` by the bitmap, or where a part of the pages was protected by the curve's end; `curve_error_*`: of
                   the curve at that interval; `outside`: no truth of the control's windows is in the stated interval; `slowdown` over four times the window's length,
                   or as long as the VM is left alone before another window (`rest_ns`) if that is longer
  armed-on         `dirty-rate --arm`, an interval after the other: what protection costs while it lasts
  sampled          `wws --regime sampled` of our own VM;  sampled-qemu: the same of QEMU's process, from outside
  qemu-*           QEMU's calc-dirty-rate, one after the other; the pages are those of each GiB that its sampling looks at
  error            |figure / truth_model - 1|;  counting_error: the same beside what the guest wrote meanwhile, slowed down or held up by the host
  slowdown         1 - writes/s / control's;  gap_added: gap - control's;  core_share: of one core
  events/*         outside of a window (counting); in one, each a first write whose time is taken (first-writes), and put down to an address space and an
                   instruction besides (attributing), and each told by itself too (single-writes, on request only): the programs' run time per event, as the kernel counts it, and that of a program that does nothing (`empty`): the
                   counting of run times sees so much of itself; `event_cost_net` is without that; `core_share`: all programs
Values are medians of so many runs; `outside` is a part of all runs and intervals, in all/* of all cases too.";

/// The names of all cases.
fn names() -> Vec<String> {
    cases().into_iter().map(|case| case.name).chain([EVENTS.to_owned()]).collect()
}

/// Runs the cases named by `effort`, or all of them.
pub(super) fn run(places: &Places, effort: &Effort) -> Result<Vec<Row>> {
    let names = names();
    if let Some(unknown) = effort.cases.iter().find(|name| !names.contains(name)) {
        bail!("there is no case `{unknown}`; the cases are {}", names.join(", "));
    }
    let chosen = |name: &str, quick: bool| {
        if effort.cases.is_empty() { quick || !effort.quick } else { effort.cases.iter().any(|case| case == name) }
    };
    let mut rows = Vec::new();
    if chosen(EVENTS, true) {
        rows.extend(events::run(&events::build()?, &places.scratch, effort.runs, effort.quick)?);
    }
    let cases: Vec<Case> = cases().into_iter().filter(|case| chosen(&case.name, case.quick)).collect();
    if cases.is_empty() {
        return Ok(rows);
    }
    let qemu = Qemu::find(&places.kernel, &places.scratch)?;
    eprintln!("peer: {}", qemu.version());
    let mut bench = Bench {
        places,
        qemu,
        control_windows: if effort.quick { QUICK_CONTROL_WINDOWS } else { CONTROL_WINDOWS },
        found: cases.iter().map(|_| Found::default()).collect(),
    };
    // Cases take turns too: a host's mood that lasts meets all of them.
    for turn in 0..effort.runs {
        for (index, case) in cases.iter().enumerate() {
            let began = Instant::now();
            let said = bench.turn(index, case, turn)?;
            eprintln!("{} {}/{} ({} s): {said}", case.name, turn + 1, effort.runs, began.elapsed().as_secs());
        }
    }
    for (case, found) in cases.iter().zip(&bench.found) {
        rows.extend(found.rows(&case.name));
    }
    rows.extend(pooled(&bench.found));
    Ok(rows)
}

/// Samples of one way of measuring.
#[derive(Default)]
struct Way {
    figure: Samples,
    truth: Samples,
    error: Samples,
    counting_error: Samples,
    curve_errors: [Samples; CURVE_MS.len()],
    slowdown: Samples,
    gap_added: Samples,
    core: Samples,
    /// Curves' points of all runs.
    held: Vec<Held>,
    /// Whether an aim for the error holds: in every run enough was seen, or faults were few.
    exact: Option<bool>,
}

impl Way {
    fn figure(&mut self, figure: Figure, truth: &Truth, exact: bool) -> String {
        self.figure.push(figure.mib_per_second());
        self.truth.push(truth.mib_per_second(figure.ns));
        self.error.push(figure.error(truth));
        self.exact = Some(exact && self.exact.unwrap_or(true));
        format!("{:.1} MiB/s ({:.1} % off)", figure.mib_per_second(), figure.error(truth))
    }

    fn profile(&mut self, profile: &Profile, truth: &Truth, exact: bool) -> String {
        let held = profile.held_against(truth);
        for (samples, held) in self.curve_errors.iter_mut().zip(&held) {
            samples.push(held.error);
        }
        self.core.push(profile.core_percent());
        self.held.extend(held);
        self.figure(profile.figure(), truth, exact)
    }

    /// How the guest fared meanwhile, and the figure beside that; nothing if the measurement was too short for one of its windows.
    fn guest(&mut self, figure: Figure, pace: Option<Pace>, control: &Truth) {
        if let Some(pace) = pace {
            self.counting_error.push(figure.error(&control.at_pace(pace)));
            self.slowdown.push(pace.slowdown(&control.pace));
            self.gap_added.push(pace.gap_ms - control.pace.gap_ms);
        }
    }
}

/// The guest left alone, in all runs.
#[derive(Default)]
struct Control {
    counted: Samples,
    model: Samples,
    model_error: Samples,
    pages_per_second: Samples,
    gap: Samples,
}

impl Control {
    fn push(&mut self, truth: &Truth) {
        self.counted.push(truth.counted_mib_per_second());
        self.model.push(truth.mib_per_second(WINDOW_MS as f64 * 1e6));
        self.model_error.push(truth.model_error());
        self.pages_per_second.push(truth.pace.pages_per_second);
        self.gap.push(truth.pace.gap_ms);
    }
}

/// All that was found of one case.
#[derive(Default)]
struct Found {
    control: Control,
    passive: Way,
    armed: Way,
    armed_on: Way,
    sampled: Way,
    qemu_control: Control,
    qemu_few: Way,
    qemu_many: Way,
    qemu_bitmap: Way,
    qemu_ring: Way,
    sampled_qemu: Way,
}

/// Everything that the cases need.
struct Bench<'a> {
    places: &'a Places,
    qemu: Qemu,
    control_windows: usize,
    found: Vec<Found>,
}

/// A guest's console while it is measured.
struct Listener<'a> {
    console: &'a Console,
    tsc_hz: u64,
    from: usize,
}

impl<'a> Listener<'a> {
    fn new(console: &'a Console, tsc_hz: u64) -> Self {
        Self { console, tsc_hz, from: console.len() }
    }

    /// Windows that began since then and are over. The first that ended may have begun before.
    fn windows(&self) -> Vec<Window> {
        let bytes = self.console.bytes();
        let mut found = windows(bytes.get(self.from..).unwrap_or_default(), self.tsc_hz);
        if !found.is_empty() {
            found.remove(0);
        }
        found
    }

    fn pace(&self) -> Option<Pace> {
        Pace::of(&self.windows(), self.tsc_hz)
    }
}

/// Waits for `count` windows of a guest that is left alone.
fn control(
    pattern: Pattern,
    console: &Console,
    tsc_hz: u64,
    count: usize,
    mut alive: impl FnMut() -> Result<()>,
) -> Result<Truth> {
    let listener = Listener::new(console, tsc_hz);
    let limit = WINDOW_LIMIT * count as u32;
    let found = interrupt::wait_for(limit, "the guest's windows", || {
        alive()?;
        Ok(Some(listener.windows()).filter(|windows| windows.len() >= count))
    })?;
    Truth::of(pattern, &found, tsc_hz).context("the guest's windows say nothing")
}

impl Bench<'_> {
    fn turn(&mut self, index: usize, case: &Case, turn: usize) -> Result<String> {
        let found = &mut self.found[index];
        let load = Load::telling(case.pattern.name(), case.rate, WINDOW_MS);
        let mut said = Vec::new();
        for half in [turn % 2, (turn + 1) % 2] {
            fresh::recall()?;
            let count = self.control_windows;
            said.push(match half {
                0 => ours(self.places, case.pattern, &load, count, found)?,
                _ => theirs(&self.qemu, self.places, case.pattern, &load, count, found)?,
            });
        }
        Ok(said.join("; "))
    }
}

/// Our own VM, measured in all our ways.
fn ours(places: &Places, pattern: Pattern, load: &Load, count: usize, found: &mut Found) -> Result<String> {
    let vm = Vm::boot(places, load, "bitmap")?;
    let (console, tsc_hz) = (vm.console(), vm.tsc_hz());
    let truth = control(pattern, console, tsc_hz, count, || Ok(()))?;
    found.control.push(&truth);

    let (began, from) = (Instant::now(), console.len());
    let profile = figures::profile(&vm, "armed")?;
    let figure = profile.figure();
    interrupt::sleep(
        Duration::from_secs_f64(figure.ns / 1e9 / DUTY).saturating_sub(began.elapsed()).max(profile.rest()),
    )?;
    let few_faults = |figure: Figure| figure.pages * FAULT_NS * 100.0 < FAULT_PERCENT * figure.ns;
    let armed = found.armed.profile(&profile, &truth, few_faults(figure));
    // A listener leaves out the window in which it began; here that is armed for the most part, and must count.
    let span = windows(&console.bytes()[from..], tsc_hz);
    found.armed.slowdown.push(Pace::of(&span, tsc_hz).context("no window of the guest")?.slowdown(&truth.pace));

    // What was protected when the log went off is seen once more: the third interval is passive.
    let passive = figures::dirty_rate(&vm, 3, false)?;
    found.passive.figure(passive, &truth, false);

    let listener = Listener::new(console, tsc_hz);
    let figure = figures::dirty_rate(&vm, INTERVALS + 1, true)?;
    found.armed_on.figure(figure, &truth, few_faults(figure));
    found.armed_on.guest(figure, listener.pace(), &truth);

    let listener = Listener::new(console, tsc_hz);
    let profile = figures::profile(&vm, "sampled")?;
    let sampled = found.sampled.profile(&profile, &truth, profile.enough());
    found.sampled.guest(profile.figure(), listener.pace(), &truth);
    Ok(format!("truth {:.1} MiB/s, armed {armed}, sampled {sampled}", truth.counted_mib_per_second()))
}

/// QEMU's VM, measured by itself and by us.
fn theirs(
    qemu: &Qemu,
    places: &Places,
    pattern: Pattern,
    load: &Load,
    count: usize,
    found: &mut Found,
) -> Result<String> {
    qemu.clear()?;
    let boot = Boot { accelerator: "kvm", shared: true, incoming: false };
    let mut side = qemu.start("bitmap", load, boot)?;
    let (truth, tsc_hz) = control_of(&mut side, pattern, count)?;
    found.qemu_control.push(&truth);
    calc(&mut side, ("page-sampling", Some(512)), tsc_hz, &truth, &mut found.qemu_few)?;
    let many = calc(&mut side, ("page-sampling", Some(16384)), tsc_hz, &truth, &mut found.qemu_many)?;
    let bitmap = calc(&mut side, ("dirty-bitmap", None), tsc_hz, &truth, &mut found.qemu_bitmap)?;
    let listener = Listener::new(&side.console, tsc_hz);
    let profile = figures::profile_of_qemu(&places.dunlin, &side, qemu.folder())?;
    let sampled = found.sampled_qemu.profile(&profile, &truth, profile.enough());
    found.sampled_qemu.guest(profile.figure(), listener.pace(), &truth);
    drop(side);

    // A ring is chosen before the first vCPU, and shuts out the bitmap.
    let boot = Boot { accelerator: "kvm,dirty-ring-size=4096", ..boot };
    let mut side = qemu.start("ring", load, boot)?;
    let (ring_truth, tsc_hz) = control_of(&mut side, pattern, count)?;
    let ring = calc(&mut side, ("dirty-ring", None), tsc_hz, &ring_truth, &mut found.qemu_ring)?;
    Ok(format!(
        "QEMU: truth {:.1} MiB/s, page-sampling {many}, dirty-bitmap {bitmap}, dirty-ring {ring}, ours {sampled}",
        truth.counted_mib_per_second()
    ))
}

fn control_of(side: &mut Side, pattern: Pattern, count: usize) -> Result<(Truth, u64)> {
    let process: &mut OwnChild = &mut side.process;
    let tsc_hz = side.console.wait_ready(process)?;
    Ok((control(pattern, &side.console, tsc_hz, count, || process.check_alive())?, tsc_hz))
}

/// QEMU's measurement, one after the other until a guest's window lies within.
fn calc(
    side: &mut Side,
    (mode, sample_pages): (&str, Option<u64>),
    tsc_hz: u64,
    truth: &Truth,
    way: &mut Way,
) -> Result<String> {
    let console = side.console.clone();
    let listener = Listener::new(&console, tsc_hz);
    let mut rates = Samples::default();
    let mut ns = 0.0;
    for _ in 0..INTERVALS {
        let figure = figures::calc_dirty_rate(side, mode, sample_pages)?;
        rates.push(figure.pages);
        ns = figure.ns;
    }
    let figure = Figure { pages: rates.median().context("no rate of QEMU")?, ns };
    way.guest(figure, listener.pace(), truth);
    Ok(way.figure(figure, truth, false))
}

const QEMU_FEW: &str = "qemu-page-sampling-512";
const QEMU_MANY: &str = "qemu-page-sampling-16384";
const QEMU_BITMAP: &str = "qemu-dirty-bitmap";
const QEMU_RING: &str = "qemu-dirty-ring";

impl Found {
    fn rows(&self, case: &str) -> Vec<Row> {
        let mut rows = Vec::new();
        let named = |name: &str| format!("{case}/{name}");
        let of = |name: &str, metric, unit, samples: &Samples, aim| {
            (samples.runs() > 0).then(|| Row::new(BENCH, &named(name), metric, unit, samples, aim))
        };
        for (name, control) in [("control", &self.control), ("qemu-control", &self.qemu_control)] {
            let truth = of(name, "truth", "MiB/s", &control.counted, Aim::None);
            rows.extend(truth.map(|row| row.beside("truth_model", &control.model, Aim::None)));
            rows.extend(of(name, "truth_error", "percent", &control.model_error, Aim::None));
            rows.extend(of(name, "writes", "pages/s", &control.pages_per_second, Aim::None));
            rows.extend(of(name, "gap", "ms", &control.gap, Aim::None));
        }
        let protecting = [(QEMU_BITMAP, &self.qemu_bitmap), (QEMU_RING, &self.qemu_ring)];
        let sampling = [(QEMU_FEW, &self.qemu_few), (QEMU_MANY, &self.qemu_many)];
        let ours = [
            Shown { name: "passive", way: &self.passive, error_aim: None, peers: &[], averaged: false },
            Shown { name: "armed", way: &self.armed, error_aim: Some(AIM_ARMED_ERROR), peers: &[], averaged: true },
            Shown {
                name: "armed-on",
                way: &self.armed_on,
                error_aim: Some(AIM_ARMED_ERROR),
                peers: &protecting,
                averaged: false,
            },
            Shown {
                name: "sampled",
                way: &self.sampled,
                error_aim: Some(AIM_SAMPLED_ERROR),
                peers: &[],
                averaged: true,
            },
            Shown {
                name: "sampled-qemu",
                way: &self.sampled_qemu,
                error_aim: Some(AIM_SAMPLED_ERROR),
                peers: &sampling,
                averaged: true,
            },
        ];
        for shown in ours {
            rows.extend(shown.rows(case));
        }
        for (name, way) in sampling.iter().chain(&protecting) {
            let figure = of(name, "figure", "MiB/s", &way.figure, Aim::None);
            rows.extend(figure.map(|row| row.beside("truth_model", &way.truth, Aim::None)));
            rows.extend(of(name, "error", "percent", &way.error, Aim::None));
            rows.extend(of(name, "counting_error", "percent", &way.counting_error, Aim::None));
            rows.extend(of(name, "slowdown", "percent", &way.slowdown, Aim::None));
            rows.extend(of(name, "gap_added", "ms", &way.gap_added, Aim::None));
        }
        rows
    }
}

/// One of our ways, and how it is shown.
struct Shown<'a> {
    name: &'static str,
    way: &'a Way,
    /// In percent; none for a lower bound, which has no error.
    error_aim: Option<f64>,
    peers: &'a [(&'static str, &'a Way)],
    /// Its slowdown is that of continuous use, not that while the VM is protected.
    averaged: bool,
}

impl Shown<'_> {
    fn rows(&self, case: &str) -> Vec<Row> {
        let Self { name, way, error_aim, averaged, .. } = *self;
        let case = format!("{case}/{name}");
        let row = |metric, unit, samples: &Samples, aim| {
            (samples.runs() > 0).then(|| Row::new(BENCH, &case, metric, unit, samples, aim))
        };
        let mut rows = Vec::new();
        let figure = row("figure", "MiB/s", &way.figure, Aim::None);
        rows.extend(figure.map(|row| row.beside("truth_model", &way.truth, Aim::None)));
        if let Some(limit) = error_aim {
            let aim = if way.exact == Some(true) { Aim::AtMost(limit) } else { Aim::None };
            rows.extend(self.compared(&case, "error", "percent", aim, |way| &way.error));
            rows.extend(self.compared(&case, "counting_error", "percent", Aim::None, |way| &way.counting_error));
        }
        for (metric, samples) in CURVE_ERRORS.iter().zip(&way.curve_errors) {
            rows.extend(row(metric, "percent", samples, Aim::None));
        }
        if !way.held.is_empty() {
            rows.extend(row("outside", "percent", &outside(&way.held), Aim::None));
        }
        let aim = if averaged { Aim::AtMost(AIM_SLOWDOWN) } else { Aim::None };
        rows.extend(self.compared(&case, "slowdown", "percent", aim, |way| &way.slowdown));
        rows.extend(self.compared(&case, "gap_added", "ms", Aim::AtMost(AIM_GAP_MS), |way| &way.gap_added));
        rows.extend(row("core_share", "percent", &way.core, Aim::None));
        rows
    }

    /// A row against an aim, and one against each peer.
    fn compared(
        &self,
        case: &str,
        metric: &'static str,
        unit: &'static str,
        aim: Aim,
        of: fn(&Way) -> &Samples,
    ) -> Vec<Row> {
        let samples = of(self.way);
        if samples.runs() == 0 {
            return Vec::new();
        }
        let row = |aim| Row::new(BENCH, case, metric, unit, samples, aim);
        let peers = self.peers.iter().filter(|(_, theirs)| of(theirs).runs() > 0);
        let beside = peers.map(|(peer, theirs)| row(Aim::None).beside(peer, of(theirs), Aim::Peer(None)));
        [row(aim)].into_iter().chain(beside).collect()
    }
}

/// Names of the errors at each of [`CURVE_MS`].
const CURVE_ERRORS: [&str; CURVE_MS.len()] =
    ["curve_error_5ms", "curve_error_20ms", "curve_error_80ms", "curve_error_320ms", "curve_error_1280ms"];

/// How many of the truths lie outside of what was stated, in percent.
fn outside(held: &[Held]) -> Samples {
    let outside = held.iter().filter(|held| held.outside).count();
    let mut share = Samples::default();
    share.push(outside as f64 * 100.0 / held.len() as f64);
    share
}

/// How to come by one of our ways.
type WayOf = fn(&Found) -> &Way;

/// How often the truth lies outside of what was stated, over all cases and intervals.
fn pooled(found: &[Found]) -> Vec<Row> {
    let ways: [(&str, WayOf); 3] = [
        ("armed", |found| &found.armed),
        ("sampled", |found| &found.sampled),
        ("sampled-qemu", |found| &found.sampled_qemu),
    ];
    let rows = ways.iter().flat_map(|(name, way)| {
        let held: Vec<Held> = found.iter().flat_map(|found| way(found).held.clone()).collect();
        let share = outside(&held);
        let mut errors = Samples::default();
        held.iter().filter(|held| held.enough).for_each(|held| errors.push(held.error));
        let case = format!("all/{name}");
        let aim = if *name == "armed" { Aim::None } else { Aim::AtMost(AIM_SAMPLED_ERROR) };
        [
            Row::new(BENCH, &case, "outside", "percent", &share, Aim::AtMost(AIM_OUTSIDE)),
            Row::new(BENCH, &case, "point_error", "percent", &errors, aim),
        ]
    });
    rows.collect()
}
