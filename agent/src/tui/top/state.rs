//! What keys change: the order of rows, the row that is looked at, what is shown of it.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use crate::model::VmId;
use crate::service::fleet::{FleetView, FleetVm};

/// What rows are ordered by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sort {
    /// Rate of writing, fastest first.
    #[default]
    Rate,
    /// Exits to the VMM, most first.
    Exits,
    /// Memory, largest first.
    Memory,
    /// Name.
    Name,
    /// Process id.
    Pid,
}

impl Sort {
    /// The next in turn.
    pub const fn next(self) -> Self {
        match self {
            Self::Rate => Self::Exits,
            Self::Exits => Self::Memory,
            Self::Memory => Self::Name,
            Self::Name => Self::Pid,
            Self::Pid => Self::Rate,
        }
    }

    /// In a word.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Exits => "exits",
            Self::Memory => "memory",
            Self::Name => "name",
            Self::Pid => "pid",
        }
    }
}

/// What comes after a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Go on.
    On,
    /// End.
    End,
}

/// The screen's state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The order of rows.
    pub sort: Sort,
    /// The other way round.
    pub reversed: bool,
    /// The row that is looked at, by identity, so that it stays the same VM when rows change places.
    pub selected: Option<VmId>,
    /// Whether its vCPUs and writers are shown below.
    pub details: bool,
    /// Whether the picture stands still.
    pub paused: bool,
    /// Whether the keys are shown.
    pub help: bool,
}

impl State {
    /// The VMs in the order of the rows.
    pub fn rows<'a>(&self, view: &'a FleetView) -> Vec<&'a FleetVm> {
        let mut rows: Vec<&FleetVm> = view.vms.iter().collect();
        let rate = |vm: &FleetVm| vm.rate.as_ref().map_or(-1.0, |rate| rate.bytes_per_second);
        match self.sort {
            Sort::Rate => rows.sort_by(|a, b| rate(b).total_cmp(&rate(a))),
            Sort::Exits => rows.sort_by(|a, b| b.exits_per_second.total_cmp(&a.exits_per_second)),
            Sort::Memory => rows.sort_by_key(|vm| std::cmp::Reverse(vm.memory_bytes)),
            Sort::Name => rows.sort_by(|a, b| a.name.cmp(&b.name)),
            Sort::Pid => rows.sort_by_key(|vm| vm.pid),
        }
        if self.reversed {
            rows.reverse();
        }
        rows
    }

    /// Where the row that is looked at stands; none without VMs.
    pub fn position(&self, view: &FleetView) -> Option<usize> {
        let rows = self.rows(view);
        let found = self.selected.and_then(|id| rows.iter().position(|vm| vm.vm_id == id));
        found.or_else(|| (!rows.is_empty()).then_some(0))
    }

    /// Looks at another row if the VM has gone.
    pub fn clamp(&mut self, view: &FleetView) {
        if !self.selected.is_some_and(|id| view.vms.iter().any(|vm| vm.vm_id == id)) {
            self.selected = self.rows(view).first().map(|vm| vm.vm_id);
        }
    }

    fn go(&mut self, view: &FleetView, by: isize) {
        let rows = self.rows(view);
        let Some(at) = self.position(view) else { return };
        let to = at.saturating_add_signed(by).min(rows.len() - 1);
        self.selected = Some(rows[to].vm_id);
    }

    /// Takes a key, as top and htop have them.
    pub fn key(&mut self, key: KeyEvent, view: &FleetView) -> Step {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c') if control => return Step::End,
            KeyCode::Esc if self.help => self.help = false,
            KeyCode::Esc if self.details => self.details = false,
            KeyCode::Char('q') | KeyCode::F(10) | KeyCode::Esc => return Step::End,
            KeyCode::Char('h' | '?') | KeyCode::F(1) => self.help = !self.help,
            KeyCode::Char('s' | '>') | KeyCode::F(6) => self.sort = self.sort.next(),
            KeyCode::Char('P') => self.sort = Sort::Rate,
            KeyCode::Char('M') => self.sort = Sort::Memory,
            KeyCode::Char('N') => self.sort = Sort::Pid,
            KeyCode::Char('r' | 'R' | 'I') => self.reversed = !self.reversed,
            KeyCode::Char(' ' | 'Z' | 'p') => self.paused = !self.paused,
            KeyCode::Enter | KeyCode::Char('d') => self.details = !self.details,
            KeyCode::Up | KeyCode::Char('k') => self.go(view, -1),
            KeyCode::Down | KeyCode::Char('j') => self.go(view, 1),
            KeyCode::PageUp => self.go(view, -10),
            KeyCode::PageDown => self.go(view, 10),
            KeyCode::Home | KeyCode::Char('g') => self.go(view, isize::MIN),
            KeyCode::End | KeyCode::Char('G') => self.go(view, isize::MAX),
            _ => {}
        }
        Step::On
    }
}
