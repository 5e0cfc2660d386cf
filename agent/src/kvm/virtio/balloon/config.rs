//! The balloon's configuration space (virtio 1.2, 5.5.4), and what of it moves.
//!
//! Owns both layouts and which values can be. Must not know queues or memory.

/// Bytes of `struct virtio_balloon_config`: four little-endian words.
pub(super) const CONFIG_BYTES: usize = 16;
/// Bytes of the saved form: the configuration space, then the last command id that was given out. Of a guest that is squeezed, what was wanted before
/// follows.
const SAVED_BYTES: usize = CONFIG_BYTES + 4;

/// `VIRTIO_BALLOON_CMD_ID_STOP`: stop hinting, but keep the pages back that were hinted (5.5.6.6).
pub(super) const COMMAND_STOP: u32 = 0;
/// `VIRTIO_BALLOON_CMD_ID_DONE`: the guest may use the pages again that it hinted.
pub(super) const COMMAND_DONE: u32 = 1;
/// The first id of a round of hints.
pub(super) const FIRST_COMMAND: u32 = 2;

/// Offset of `actual`.
const ACTUAL: u64 = 4;
/// Offset of `poison_val`.
const POISON: u64 = 12;

/// The configuration space, and the last command id.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Config {
    /// `num_pages`: how many pages the host wants in the balloon.
    pub(super) target: u32,
    /// `actual`: how many the driver says are there.
    pub(super) actual: u32,
    /// `free_page_hint_cmd_id`.
    pub(super) command: u32,
    /// `poison_val`: what the guest expects free pages to be full of, if that was negotiated.
    pub(super) poison: u32,
    /// The id of the last round of hints, 0 before the first. A driver takes an id it has seen for no request, so it moves.
    pub(super) last_command: u32,
    /// What `target` was before the guest was squeezed, and is to be again.
    pub(super) before: Option<u32>,
}

impl Config {
    /// The configuration space.
    pub(super) fn bytes(&self) -> Vec<u8> {
        [self.target, self.actual, self.command, self.poison].iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// The saved form.
    pub(super) fn saved(&self) -> Vec<u8> {
        let before = self.before.map(u32::to_le_bytes);
        [&self.bytes()[..], &self.last_command.to_le_bytes(), before.as_ref().map_or(&[], |bytes| &bytes[..])].concat()
    }

    /// Reads the saved form of a balloon of a VM that has `pages` of RAM.
    pub(super) fn from_saved(saved: &[u8], pages: u64) -> Option<Self> {
        let (words, before) = saved.split_at_checked(SAVED_BYTES)?;
        let before = match before {
            [] => None,
            _ => Some(u32::from_le_bytes(before.try_into().ok()?)),
        };
        let mut words = words.chunks_exact(4).map(|word| word.try_into().map_or(0, u32::from_le_bytes));
        let [target, actual, command, poison, last_command] = std::array::from_fn(|_| words.next().unwrap_or(0));
        let config = Self { target, actual, command, poison, last_command, before };
        let fits = u64::from(target.max(actual).max(before.unwrap_or(0))) <= pages;
        let command_can_be = command == COMMAND_STOP || command == COMMAND_DONE || command == last_command;
        let last_can_be = last_command == 0 || last_command >= FIRST_COMMAND;
        (fits && command_can_be && last_can_be).then_some(config)
    }

    /// A store by the driver. False if it is none that a driver may do: it writes the two words that are its own, whole, and
    /// has no more pages in the balloon than the VM has.
    pub(super) fn store(&mut self, offset: u64, data: &[u8], pages: u64) -> bool {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return false };
        match offset {
            ACTUAL if u64::from(value) <= pages => self.actual = value,
            POISON => self.poison = value,
            _ => return false,
        }
        true
    }

    /// Wants so many pages in the balloon until [`Self::relax`].
    pub(super) fn squeeze(&mut self, target: u32) {
        self.before.get_or_insert(self.target);
        self.target = target;
    }

    /// Wants what was wanted before the guest was squeezed.
    pub(super) fn relax(&mut self) {
        if let Some(before) = self.before.take() {
            self.target = before;
        }
    }

    /// The id for a new round: the one after the last, and never one with a meaning of its own.
    pub(super) fn next_command(&mut self) -> u32 {
        self.last_command = self.last_command.checked_add(1).unwrap_or(0).max(FIRST_COMMAND);
        self.command = self.last_command;
        self.command
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What version 1 of the saved device holds for a balloon. If this fails, the format changed.
    #[test]
    fn the_saved_form_reads_as_it_was_written() {
        let config =
            Config { target: 0x1234, actual: 0x1200, command: 7, poison: 0xaaaa_aaaa, last_command: 7, before: None };
        let golden = [0x34, 0x12, 0, 0, 0, 0x12, 0, 0, 7, 0, 0, 0, 0xaa, 0xaa, 0xaa, 0xaa, 7, 0, 0, 0];
        assert_eq!(config.saved(), golden);
        assert_eq!(Config::from_saved(&golden, 0x1234), Some(config));
        assert_eq!(config.bytes(), golden[..16]);
        // Squeezed, it has a word more.
        let squeezed = Config { before: Some(0x0201), ..config };
        assert_eq!(squeezed.saved(), [&golden[..], &[1, 2, 0, 0]].concat());
        assert_eq!(Config::from_saved(&squeezed.saved(), 0x1234), Some(squeezed));
    }

    #[test]
    fn a_guest_gets_back_what_it_had_however_often_it_was_squeezed() {
        let mut config = Config { target: 5, ..Config::default() };
        config.squeeze(100);
        config.squeeze(50);
        assert_eq!((config.target, config.before), (50, Some(5)));
        config.relax();
        assert_eq!(config, Config { target: 5, ..Config::default() });
        config.target = 7;
        config.relax();
        assert_eq!(config.target, 7);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let good = Config { target: 10, actual: 9, command: COMMAND_DONE, poison: 0, last_command: 5, before: None };
        let read = |config: Config| Config::from_saved(&config.saved(), 10);
        assert_eq!(read(good), Some(good));
        assert_eq!(read(Config { target: 11, ..good }), None);
        assert_eq!(read(Config { actual: 11, ..good }), None);
        assert_eq!(read(Config { command: 4, ..good }), None, "a round that is not the last");
        assert_eq!(read(Config { last_command: 1, ..good }), None);
        assert_eq!(read(Config { before: Some(11), ..good }), None);
        assert_eq!(Config::from_saved(&good.saved()[..19], 10), None);
        assert_eq!(Config::from_saved(&[&good.saved()[..], &[0]].concat(), 10), None);
    }

    #[test]
    fn a_driver_stores_its_own_words_whole() {
        let mut config = Config { target: 3, command: 5, ..Config::default() };
        assert!(config.store(4, &[2, 0, 0, 0], 10) && config.store(12, &[0xaa; 4], 10));
        assert_eq!((config.actual, config.poison), (2, 0xaaaa_aaaa));
        let before = config;
        for (offset, data) in [
            (0, &[9, 0, 0, 0][..]),
            (8, &[9, 0, 0, 0]),
            (4, &[11, 0, 0, 0]),
            (4, &[9]),
            (5, &[9, 0, 0, 0]),
            (12, &[0; 8]),
            (16, &[0; 4]),
            (u64::MAX, &[0; 4]),
        ] {
            assert!(!config.store(offset, data, 10), "{offset} {data:?}");
        }
        assert_eq!(config, before);
    }

    #[test]
    fn ids_never_repeat_at_once_nor_mean_stop_or_done() {
        let mut config = Config::default();
        assert_eq!([config.next_command(), config.next_command()], [2, 3]);
        config.last_command = u32::MAX;
        assert_eq!([config.next_command(), config.next_command()], [2, 3]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_balloon_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..28), pages: u32) {
            if let Some(config) = Config::from_saved(&bytes, pages.into()) {
                prop_assert_eq!(config.saved(), bytes);
            }
        }
    }
}
