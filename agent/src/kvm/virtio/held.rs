//! Frames of a VM on loan that wait until the source can go on from behind them.

use std::collections::VecDeque;

/// What a port holds back.
#[derive(Debug, Default)]
pub(super) struct HeldFrames {
    frames: VecDeque<(u32, Vec<u8>)>,
    bytes: usize,
    /// The most that may be held, in bytes; nothing more is while it is 0.
    limit: usize,
    /// The increment that new frames are of.
    number: u32,
    /// Those of increments up to this one may go.
    free: u32,
}

impl HeldFrames {
    /// Holds frames from now on, at most `bytes` of them, as those of increment 1.
    pub(super) fn hold(&mut self, bytes: usize) {
        (self.limit, self.number, self.free) = (bytes, 1, 0);
    }

    /// Nothing more is held, and all that was may go.
    pub(super) fn end(&mut self) {
        (self.limit, self.free) = (0, u32::MAX);
    }

    /// What is sent from now on is of increment `number`.
    pub(super) fn begin(&mut self, number: u32) {
        self.number = number;
    }

    /// What is of increments up to `number` may go.
    pub(super) fn let_out(&mut self, number: u32) {
        self.free = self.free.max(number);
    }

    /// Whether frames are held.
    pub(super) fn holds(&self) -> bool {
        self.limit > 0
    }

    /// Whether a frame of so many bytes may be held.
    pub(super) fn has_room(&self, bytes: usize) -> bool {
        self.frames.is_empty() || self.bytes + bytes <= self.limit
    }

    /// Holds a frame.
    pub(super) fn push(&mut self, frame: Vec<u8>) {
        self.bytes += frame.len();
        self.frames.push_back((self.number, frame));
    }

    /// The next that may go.
    pub(super) fn next_free(&self) -> Option<&[u8]> {
        self.frames.front().filter(|(number, _)| *number <= self.free).map(|(_, frame)| frame.as_slice())
    }

    /// It has gone.
    pub(super) fn pop(&mut self) {
        if let Some((_, frame)) = self.frames.pop_front() {
            self.bytes -= frame.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_go_in_order_and_not_before_their_increment_is_safe() {
        let mut held = HeldFrames::default();
        held.hold(100);
        held.push(vec![1; 60]);
        assert!(held.has_room(40) && !held.has_room(41));
        held.begin(2);
        held.push(vec![2; 30]);
        assert_eq!(held.next_free(), None);
        held.let_out(1);
        assert_eq!(held.next_free().map(|frame| frame[0]), Some(1));
        held.pop();
        assert_eq!(held.next_free(), None);
        held.end();
        assert_eq!(held.next_free().map(|frame| frame[0]), Some(2));
        held.pop();
        assert!(
            held.next_free().is_none() && !held.holds() && held.has_room(1000),
            "one that is longer than all goes alone"
        );
    }
}
