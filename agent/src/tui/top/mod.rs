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
