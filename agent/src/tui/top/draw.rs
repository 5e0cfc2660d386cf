//! How a view looks.

use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Cell, Clear, Paragraph, Row, Table, TableState, Wrap};

use super::state::State;
use crate::draw::{Glyphs, curve_text};
use crate::model::ThrottleView;
use crate::model::units::{PAGE_SIZE, display_bytes, display_duration};
use crate::service::fleet::{FleetView, FleetVm, PastRate};
use crate::service::inventory::Host;
use crate::track::Feasibility;

/// Characters of a history.
const SPARK: usize = 16;
/// Eight heights of a bar.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const KEYS: &str = "\
 q F10 Ctrl-C   end
 ↑ ↓ j k        another VM          PgUp PgDn Home End
 Enter d        its vCPUs, exits, curve and writers
 s > F6         order by rate, exits, memory, name, pid (P M N: rate, memory, pid)
 r              the other way round
 space p        stand still
 h ? F1         this

 DIRTY/s is what turned writable in the last interval. Its regime says what that means: passive is a lower bound (≥), logged
 counts a page once between two harvests of someone else's log, armed is from a window of our own (--arm). U is the unique
 rate of the last such window, FORECAST whether pre-copy would get there on the terms given. STUNNED: writers are slowed, by a
 migration or by `dunlin stun`; what follows is the guest time that vCPUs have lost so far.";

const DIM: Style = Style::new().fg(Color::DarkGray);
const HEAD: Style = Style::new().add_modifier(Modifier::BOLD);
const BAD: Style = Style::new().fg(Color::Red);

/// Draws all.
pub fn draw(frame: &mut Frame<'_>, view: &FleetView, state: &State) {
    let area = frame.area();
    let head = head(view, state);
    let below = if state.details { area.height.saturating_sub(head.len() as u16) * 3 / 5 } else { 0 };
    let rows =
        [Constraint::Length(head.len() as u16), Constraint::Min(3), Constraint::Length(below), Constraint::Length(1)];
    let [top, middle, bottom, foot] = Layout::vertical(rows).areas(area);
    frame.render_widget(Paragraph::new(head), top);
    table(frame, middle, view, state);
    let looked_at = state.position(view).and_then(|at| state.rows(view).get(at).copied());
    if let (true, Some(vm)) = (state.details, looked_at) {
        details(frame, bottom, vm);
    }
    let order = if state.reversed { "reversed" } else { "" };
    let keys =
        format!(" q end  ↑↓ choose  Enter details  s order: {} {order}  space stand still  h keys", state.sort.word());
    frame.render_widget(Paragraph::new(keys).style(DIM), foot);
    if state.help {
        let width = area.width.min(100);
        let height = area.height.min(18);
        let middle = Rect { x: (area.width - width) / 2, y: (area.height - height) / 2, width, height };
        frame.render_widget(Clear, middle);
        let help =
            Paragraph::new(KEYS).wrap(Wrap { trim: false }).block(Block::new().borders(Borders::ALL).title(" keys "));
        frame.render_widget(help, middle);
    }
}

fn is_stunned(vm: &FleetVm) -> bool {
    vm.throttle.as_ref().is_some_and(|throttle| throttle.stunned)
}

fn time(ns: u64) -> String {
    display_duration(Duration::from_nanos(ns))
}

fn percent(share: f64) -> String {
    format!("{:.2} %", share * 100.0)
}

/// The lines above the table.
fn head(view: &FleetView, state: &State) -> Vec<Line<'static>> {
    let watching = &view.watching;
    let hosted = view.vms.iter().filter(|vm| vm.host == Host::Hosted).count();
    let logged = view.vms.iter().filter(|vm| vm.logged_bytes > 0).count();
    let stunned = match view.vms.iter().filter(|vm| is_stunned(vm)).count() {
        0 => String::new(),
        stunned => format!(", {stunned} stunned"),
    };
    let paused = if state.paused { "  STANDS STILL" } else { "" };
    let mut lines = vec![Line::from(vec![
        Span::styled("dunlin top", HEAD),
        Span::raw(format!(
            "  {} VMs, {hosted} hosted, {logged} with a dirty log on{stunned}; every {}; backend {}",
            view.vms.len(),
            display_duration(Duration::from_nanos(view.interval_ns)),
            watching.backend
        )),
        Span::styled(paused, BAD),
    ])];
    let used = match (&watching.used_share_of_core, &watching.cost_unknown) {
        (Some(used), _) => {
            format!("BPF {} of a core, budget {}", percent(*used), percent(watching.budget_share_of_core))
        }
        (None, Some(why)) => format!("BPF: cost unknown ({why})"),
        (None, None) => "BPF: not loaded, nothing to watch".to_owned(),
    };
    let attached = watching.programs.iter().filter(|program| program.attached).count();
    let mut second = vec![Span::raw(format!(
        "{used}; {attached} programs; agent {}; lost events {} ({} in all)",
        percent(watching.own_share_of_core),
        watching.lost_events.total,
        watching.lost_events_total.total
    ))];
    if watching.above_budget {
        second.push(Span::styled("  ABOVE BUDGET", BAD));
    }
    lines.push(Line::from(second));
    if let Some(problem) = &watching.problem {
        lines.push(Line::styled(format!("not watching: {problem}"), BAD));
    }
    if !watching.shed.is_empty() {
        let shed: Vec<String> = watching.shed.iter().map(|shed| format!("{} ({})", shed.source, shed.reason)).collect();
        lines.push(Line::styled(format!("shed: {}", shed.join(", ")), BAD));
    }
    lines
}

const COLUMNS: [(&str, u16); 12] = [
    ("NAME", 20),
    ("VMM", 10),
    ("PID", 8),
    ("CPUS", 4),
    ("MEMORY", 10),
    ("REGIME", 10),
    ("DIRTY/s", 13),
    ("HISTORY", SPARK as u16),
    ("EXITS/s", 9),
    ("U", 13),
    ("FORECAST", 10),
    ("ROGUE", 30),
];

fn table(frame: &mut Frame<'_>, area: Rect, view: &FleetView, state: &State) {
    let rows = state.rows(view).into_iter().map(|vm| Row::new(cells(vm)));
    let widths = COLUMNS.map(|(_, width)| Constraint::Length(width));
    let table = Table::new(rows, widths)
        .header(Row::new(COLUMNS.map(|(name, _)| name)).style(HEAD.add_modifier(Modifier::REVERSED)))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    let mut place = TableState::new().with_selected(state.position(view));
    frame.render_stateful_widget(table, area, &mut place);
    if view.vms.is_empty() {
        let words = if view.sequence == 0 { "looking" } else { "no KVM VM runs on this host" };
        let inside = Rect { y: area.y + 1, height: area.height.saturating_sub(1).min(1), ..area };
        frame.render_widget(Paragraph::new(words).style(DIM), inside);
    }
}

fn cells(vm: &FleetVm) -> Vec<Cell<'static>> {
    let (kind, rate) = vm.rate.as_ref().map_or(("-", "-".to_owned()), |rate| {
        let bound = if rate.is_lower_bound { "≥ " } else { "" };
        (rate.regime.word(), format!("{bound}{}", display_bytes(rate.bytes_per_second as u64)))
    });
    let armed = vm.armed.as_ref();
    let unique = armed
        .map_or_else(|| "-".to_owned(), |armed| format!("{}/s", display_bytes(armed.unique_bytes_per_second as u64)));
    let (forecast, style) = match armed.and_then(|armed| armed.forecast.as_ref()).map(|forecast| forecast.feasibility) {
        None => ("-", DIM),
        Some(Feasibility::Converges) => ("converges", Style::new().fg(Color::Green)),
        Some(Feasibility::ConvergesSlowly) => ("slowly", Style::new().fg(Color::Yellow)),
        Some(Feasibility::Uncertain) => ("uncertain", Style::new().fg(Color::Yellow)),
        Some(Feasibility::Never) => ("never", BAD),
    };
    // While writers are slowed no window shows who they are.
    let rogue = match &vm.throttle {
        Some(throttle) if throttle.stunned => format!("STUNNED, {} lost", time(throttle.guest_time_lost_ns)),
        _ => armed.and_then(|armed| armed.rogues.first()).map_or_else(String::new, |rogue| rogue.words.clone()),
    };
    vec![
        Cell::new(vm.name.clone()),
        Cell::new(vm.vmm.clone()),
        Cell::new(vm.pid.to_string()),
        Cell::new(vm.vcpus.len().to_string()),
        Cell::new(vm.memory_bytes.map_or_else(|| "-".to_owned(), display_bytes)),
        Cell::new(kind),
        Cell::new(rate),
        Cell::new(spark(vm.history.iter())),
        Cell::new(format!("{:.0}", vm.exits_per_second)),
        Cell::new(unique),
        Cell::new(forecast).style(style),
        Cell::new(rogue).style(BAD),
    ]
}

/// The last rates as bars, the highest as high as there are.
fn spark<'a>(history: impl DoubleEndedIterator<Item = &'a PastRate> + ExactSizeIterator) -> String {
    let skip = history.len().saturating_sub(SPARK);
    let rates: Vec<f64> = history.skip(skip).map(|past| past.bytes_per_second).collect();
    let most = rates.iter().copied().fold(0.0, f64::max);
    let bar = |rate: &f64| {
        let height = if most > 0.0 { rate / most * (BARS.len() - 1) as f64 } else { 0.0 };
        BARS[(height.round() as usize).min(BARS.len() - 1)]
    };
    rates.iter().map(bar).collect()
}

fn details(frame: &mut Frame<'_>, area: Rect, vm: &FleetVm) {
    let block = Block::new().borders(Borders::TOP).title(format!(" {} ({}) ", vm.name, vm.vm_id));
    let inside = block.inner(area);
    frame.render_widget(block, area);
    let [left, right] = Layout::horizontal([Constraint::Percentage(50), Constraint::Percentage(50)]).areas(inside);
    frame.render_widget(Paragraph::new(facts(vm)), left);
    match &vm.armed {
        Some(armed) => {
            let (width, height) =
                (usize::from(right.width.max(30)), usize::from(right.height.saturating_sub(2).max(8)));
            let curve =
                curve_text(&[("U(t)", &armed.curve)], &crate::draw::LINKS, None, width, height, Glyphs::Unicode);
            frame.render_widget(Paragraph::new(curve), right);
        }
        None => {
            let words = vm.armed_problem.clone().unwrap_or_else(|| {
                "no curve: nothing is write-protected (--arm, for VMs that dunlin runs; `dunlin wws` for one VM)"
                    .to_owned()
            });
            frame.render_widget(Paragraph::new(words).style(DIM).wrap(Wrap { trim: true }), right);
        }
    }
}

/// Who slows writers, which, and what they have lost.
fn throttle_lines(throttle: &ThrottleView) -> Vec<Line<'static>> {
    let lost = time(throttle.guest_time_lost_ns);
    let mut lines = match &throttle.holder {
        Some(holder) if throttle.stunned => {
            vec![Line::styled(format!("stunned by {holder}: {lost} of guest time lost"), BAD)]
        }
        _ if throttle.guest_time_lost_ns > 0 => vec![Line::raw(format!("was stunned: {lost} of guest time lost"))],
        _ => Vec::new(),
    };
    for vcpu in &throttle.vcpus {
        if let Some(limit) = vcpu.limit_pages_per_second {
            let (rate, lost) = (vcpu.pages_per_second, time(vcpu.held_ns));
            lines
                .push(Line::styled(format!("  vCPU {}: {rate:.0} of {limit:.0} pages/s, {lost} lost", vcpu.vcpu), BAD));
        }
    }
    lines
}

/// vCPUs, exits and writers in words.
fn facts(vm: &FleetVm) -> Vec<Line<'static>> {
    let mut lines = vec![Line::styled("VCPU   THREAD    PAGES/s   EXITS/s  KVM EXITS/s   CPU", HEAD)];
    for vcpu in &vm.vcpus {
        lines.push(Line::raw(format!(
            "{:>4} {:>8} {:>10.0} {:>9.0} {:>12.0} {:>5}",
            vcpu.index,
            vcpu.thread_id.map_or_else(|| "-".to_owned(), |id| id.to_string()),
            vcpu.pages_per_second,
            vcpu.exits_per_second,
            vcpu.guest_exits_per_second,
            vcpu.cpu_share.map_or_else(|| "-".to_owned(), |share| format!("{:.0} %", share * 100.0))
        )));
    }
    let exits: Vec<String> = vm
        .exits
        .iter()
        .take(6)
        .map(|exit| {
            let mean = exit
                .mean_ns
                .map_or_else(String::new, |ns| format!(" ({})", display_duration(Duration::from_nanos(ns as u64))));
            format!("{} {} {:.0}/s{mean}", exit.to, exit.reason, exit.exits_per_second)
        })
        .collect();
    lines.extend(vm.throttle.iter().flat_map(throttle_lines));
    lines.push(Line::raw(format!("exits: {}", if exits.is_empty() { "none".to_owned() } else { exits.join(", ") })));
    if let Some(armed) = &vm.armed {
        if let Some(forecast) = &armed.forecast {
            lines.push(Line::raw(forecast.reason.clone()));
        }
        let writers = armed.ranking.iter().flat_map(|ranking| &ranking.writers).skip(1).take(5);
        for ranked in writers {
            let limit = ranked.limit_pages_per_second.map_or_else(String::new, |limit| {
                format!(", limit {}/s", display_bytes((limit * PAGE_SIZE as f64) as u64))
            });
            let style = if limit.is_empty() { Style::new() } else { BAD };
            lines.push(Line::styled(
                format!("{:>9.0} pages/s  {}{limit}", ranked.pages_per_second, ranked.writer),
                style,
            ));
        }
    }
    if let Some(missing) = vm.armed.as_ref().and_then(|armed| armed.names_missing.as_ref()) {
        lines.push(Line::styled(format!("processes are not named: {missing}"), DIM));
    }
    lines.extend(vm.notes.iter().map(|note| Line::styled(note.clone(), DIM)));
    lines
}
