//! The screen of `dunlin top`: every KVM VM of the host, how it writes, and what watching costs.
//!
//! [`State`] is what a key changes, [`draw`] how it looks; both are plain and tested without a terminal. [`run`] is the loop on a real one.

mod draw;
mod state;

use std::io;
use std::time::Duration;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{self, Event, KeyEventKind};

pub use draw::draw;
pub use state::{Sort, State, Step};

use crate::service::fleet::{FleetReader, FleetView};

/// How long the screen waits for a key before it looks whether there is a newer view.
const PATIENCE: Duration = Duration::from_millis(100);

/// Shows views until a key ends it.
///
/// # Errors
/// The terminal cannot be written or read. It is as it was before, whatever happens.
pub fn run(reader: &FleetReader, mut ended: impl FnMut() -> bool) -> io::Result<()> {
    let mut terminal = ratatui::try_init()?;
    let result = (|| {
        let mut state = State::default();
        let mut view = reader.view();
        loop {
            if !state.paused {
                view = reader.view();
            }
            state.clamp(&view);
            terminal.draw(|frame| draw(frame, &view, &state))?;
            if ended() {
                return Ok(());
            }
            if event::poll(PATIENCE)?
                && let Event::Key(key) = event::read()?
                && key.kind != KeyEventKind::Release
                && state.key(key, &view) == Step::End
            {
                return Ok(());
            }
        }
    })();
    ratatui::restore();
    result
}

/// One view as it would stand on a terminal of this size, as text.
pub fn picture(view: &FleetView, state: &State, width: u16, height: u16) -> String {
    let backend = TestBackend::new(width.clamp(40, 400), height.clamp(8, 200));
    let Ok(mut terminal) = Terminal::new(backend);
    let Ok(_) = terminal.draw(|frame| draw(frame, view, state));
    let buffer = terminal.backend().buffer();
    let area = buffer.area;
    let mut text = String::new();
    for y in 0..area.height {
        let line: String = (0..area.width).map(|x| buffer[(x, y)].symbol()).collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text.trim_end().to_owned() + "\n"
}

#[cfg(test)]
mod tests {
    use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

    use super::*;
    use crate::service::fleet;

    fn press(state: &mut State, view: &FleetView, code: KeyCode) -> Step {
        state.key(KeyEvent::new(code, KeyModifiers::NONE), view)
    }

    /// Two VMs: the sample, and one that writes less and has another name.
    fn view() -> FleetView {
        let mut view = fleet::sample();
        let mut other = view.vms[0].clone();
        other.name = "quiet".to_owned();
        other.vm_id = crate::model::VmId::random();
        other.pid += 1;
        other.rate = None;
        other.memory_bytes = Some(1 << 40);
        view.vms.insert(0, other);
        view
    }

    #[test]
    fn a_picture_shows_vms_their_regime_and_what_watching_costs() {
        let view = view();
        let mut state = State::default();
        state.clamp(&view);
        let text = picture(&view, &state, 160, 20);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("dunlin top  2 VMs"), "{text}");
        assert!(lines[1].contains("of a core, budget"), "{text}");
        let at = |name: &str| lines.iter().position(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{text}"));
        assert!(at(&view.vms[1].name) < at("quiet"), "the fastest comes first: {text}");
        assert!(lines[0].contains(", 2 stunned") && text.contains("STUNNED, 1.25 s lost"), "{text}");
        let details = picture(&view, &State { details: true, ..state.clone() }, 160, 40);
        assert!(
            details.contains("stunned by migration") && details.contains("vCPU 0: 990 of 1000 pages/s, 1.25 s lost"),
            "{details}"
        );
        // No size of a terminal is too small or too large.
        for (width, height) in [(0, 0), (40, 8), (500, 300)] {
            picture(&view, &State { details: true, help: true, ..state.clone() }, width, height);
        }
    }

    #[test]
    fn keys_do_what_they_do_in_top() {
        let view = view();
        let mut state = State::default();
        state.clamp(&view);
        let first = state.selected;
        assert_eq!(press(&mut state, &view, KeyCode::Down), Step::On);
        assert_ne!(state.selected, first);
        // The VM that is looked at stays the same when the order changes.
        let looked_at = state.selected;
        press(&mut state, &view, KeyCode::Char('M'));
        assert_eq!((state.sort, state.selected, state.position(&view)), (Sort::Memory, looked_at, Some(0)));
        press(&mut state, &view, KeyCode::Char('r'));
        assert_eq!(state.position(&view), Some(1));
        press(&mut state, &view, KeyCode::Enter);
        assert!(picture(&view, &state, 160, 30).contains("VCPU   THREAD"));
        press(&mut state, &view, KeyCode::Char('h'));
        assert!(picture(&view, &state, 160, 30).contains("stand still"));
        assert_eq!(press(&mut state, &view, KeyCode::Esc), Step::On);
        assert_eq!(press(&mut state, &view, KeyCode::Esc), Step::On);
        assert_eq!(press(&mut state, &view, KeyCode::Esc), Step::End);
        assert_eq!(press(&mut state, &view, KeyCode::Char('q')), Step::End);
        let gone = FleetView { vms: Vec::new(), ..view };
        state.clamp(&gone);
        assert_eq!((state.selected, state.position(&gone)), (None, None));
        assert!(picture(&gone, &State::default(), 160, 20).contains("no KVM VM runs"));
    }
}
