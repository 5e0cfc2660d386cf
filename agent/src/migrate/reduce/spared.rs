//! What the reducers of one migration have come to, for its report.

use super::{Gain, Reducers, Reducing};
use crate::migrate::rounds::Tally;
use crate::model::{Packing, PageCount, ReducerReport};

/// What was spared in all rounds so far.
#[derive(Clone, Debug, Default)]
pub(in crate::migrate) struct Spared {
    zeros: Gain,
    hot: Gain,
    free: Gain,
    /// Why the guest was not asked, or not asked any more, for free pages.
    not_asked: String,
    packed: Vec<(Packing, Gain)>,
}

impl Spared {
    /// A round has been sent; the streams' own counts are of all rounds.
    pub(in crate::migrate) fn count(&mut self, tally: &Tally, streams: &[Reducing]) {
        self.zeros.add(Gain { cpu: tally.scanned, ..Gain::default() });
        self.zeros.note(tally.zero_pages, 0);
        self.free.add(tally.free);
        self.packed.clear();
        for (packing, gain) in streams.iter().flat_map(Reducing::gains) {
            match self.packed.iter_mut().find(|(kind, _)| *kind == packing) {
                Some((_, sum)) => sum.add(gain),
                None => self.packed.push((packing, gain)),
            }
        }
    }

    /// The guest is not asked for its free pages.
    pub(in crate::migrate) fn cannot_ask(&mut self, why: String) {
        self.not_asked = why;
    }

    /// Whether it may be asked.
    pub(in crate::migrate) fn may_ask(&self) -> bool {
        self.not_asked.is_empty()
    }

    /// So many hot pages went last in a round, and so many of them were written again before it had ended: the others need not be sent again.
    pub(in crate::migrate) fn skip_hot(&mut self, hot: PageCount, written: PageCount) {
        self.hot.pages += hot.0;
        self.hot.saved_bytes += PageCount(hot.0.saturating_sub(written.0)).bytes();
    }

    /// What was asked for, and what came of it.
    pub(in crate::migrate) fn report(&self, asked: &Reducers) -> Vec<ReducerReport> {
        let report = |name: &str, gain: Gain| ReducerReport {
            name: name.to_owned(),
            pages: gain.pages,
            saved_bytes: gain.saved_bytes,
            cpu_ns: gain.cpu.as_nanos() as u64,
            reason: String::new(),
        };
        let zeros = asked.zero_pages.then(|| report("zero-pages", self.zeros));
        let hot = asked.skip_hot.then(|| report("skip-hot", self.hot));
        let free = asked
            .free_pages
            .then(|| ReducerReport { reason: self.not_asked.clone(), ..report("free-pages", self.free) });
        let packed = asked.packings().into_iter().map(|packing| {
            let gain = self.packed.iter().find(|(kind, _)| *kind == packing);
            report(packing.name(), gain.map_or_else(Gain::default, |&(_, gain)| gain))
        });
        zeros.into_iter().chain(packed).chain(hot).chain(free).collect()
    }
}
