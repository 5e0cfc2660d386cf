//! Owns the words by which the host asks that writers stand: `hold VCPU MILLISECONDS`, a line each.

/// The longest line that means something.
const LONGEST: usize = 24;
/// No hold lasts longer.
const MOST_MS: u64 = 1000;

/// The writers of a vCPU are to stand for so long from now on; 0 lets them go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hold {
    /// Its number.
    pub vcpu: usize,
    /// Milliseconds.
    pub ms: u64,
}

/// Bytes as they come.
#[derive(Debug, Default)]
pub struct Lines {
    line: [u8; LONGEST],
    len: usize,
}

impl Lines {
    /// Whether no line has begun.
    pub fn is_between(&self) -> bool {
        self.len == 0
    }

    /// Takes a byte; returns what a line says that it ends.
    pub fn byte(&mut self, byte: u8) -> Option<Hold> {
        if byte != b'\n' {
            if let Some(place) = self.line.get_mut(self.len) {
                *place = byte;
            }
            self.len += 1;
            return None;
        }
        let line = self.line.get(..core::mem::take(&mut self.len))?;
        let mut words = core::str::from_utf8(line).ok()?.split(' ');
        let (verb, vcpu, ms) = (words.next()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        (verb == "hold" && words.next().is_none() && ms <= MOST_MS).then_some(Hold { vcpu, ms })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> Vec<Hold> {
        let mut lines = Lines::default();
        text.bytes().filter_map(|byte| lines.byte(byte)).collect()
    }

    #[test]
    fn holds_are_obeyed_and_nothing_else() {
        assert_eq!(said("hold 1 50\nhold 0 0\n"), [Hold { vcpu: 1, ms: 50 }, Hold { vcpu: 0, ms: 0 }]);
        let long = "hold 1 00000000000000000000000000005\n";
        assert_eq!(
            said(
                &["\n", "hold\n", "hold 1\n", "hold x 5\n", "hold 1 5 5\n", "hold 1 1001\n", "free 1 5\n", long]
                    .concat()
            ),
            []
        );
        assert_eq!(said(&[long, "hold 2 3\n"].concat()), [Hold { vcpu: 2, ms: 3 }]);
    }
}
