//! Why a bridge has not relearned where a station is, from what its table and its port say.

use crate::model::network::{EntryFacts, PortFacts, PortState, StuckCause};

/// The causes, likeliest first; never empty.
///
/// `port` are the facts of the port that should have it, none if the bridge has no such port; `entries` what the table has for the station; `was_there` whether it was seen behind the port meanwhile.
pub fn causes(expected: &str, port: Option<&PortFacts>, entries: &[EntryFacts], was_there: bool) -> Vec<StuckCause> {
    let Some(port) = port else { return vec![StuckCause::NoSuchPort] };
    let mut causes = Vec::new();
    match port.state {
        PortState::Disabled => causes.push(StuckCause::PortDown),
        PortState::Blocking | PortState::Listening | PortState::Learning => causes.push(StuckCause::NotForwarding),
        PortState::Forwarding => {}
    }
    let elsewhere = || entries.iter().filter(|entry| entry.port != expected);
    if elsewhere().any(|entry| entry.local) {
        causes.push(StuckCause::OwnAddress);
    }
    if elsewhere().any(|entry| entry.sticky) {
        causes.push(StuckCause::StickyEntry);
    }
    let noted = entries.iter().any(|entry| entry.locked);
    match (port.locked, port.mab || noted) {
        (true, true) => causes.push(StuckCause::AwaitsAuthentication),
        (true, false) => causes.push(StuckCause::PortLocked),
        (false, _) => {}
    }
    if !port.learning {
        causes.push(StuckCause::LearningOff);
    }
    if elsewhere().any(|entry| entry.fixed && !entry.sticky) {
        causes.push(StuckCause::StaticEntry);
    }
    if elsewhere().any(|entry| entry.external) {
        causes.push(StuckCause::ExternalEntry);
    }
    if causes.is_empty() {
        causes.push(if was_there { StuckCause::MovedAway } else { StuckCause::Silence });
    }
    causes
}

#[cfg(test)]
mod tests {
    use super::*;

    const FINE: PortFacts = PortFacts { state: PortState::Forwarding, learning: true, locked: false, mab: false };

    fn entry(port: &str) -> EntryFacts {
        EntryFacts { port: port.to_owned(), local: false, fixed: false, sticky: false, external: false, locked: false }
    }

    #[test]
    fn each_cause_is_told_from_the_others() {
        use StuckCause::*;
        let cases = [
            (None, entry("old"), NoSuchPort),
            (Some(PortFacts { state: PortState::Disabled, ..FINE }), entry("old"), PortDown),
            (Some(PortFacts { state: PortState::Learning, ..FINE }), entry("old"), NotForwarding),
            (Some(PortFacts { learning: false, ..FINE }), entry("old"), LearningOff),
            (Some(PortFacts { locked: true, ..FINE }), entry("old"), PortLocked),
            (Some(PortFacts { locked: true, mab: true, ..FINE }), entry("old"), AwaitsAuthentication),
            (Some(FINE), EntryFacts { sticky: true, fixed: true, ..entry("old") }, StickyEntry),
            (Some(FINE), EntryFacts { fixed: true, ..entry("old") }, StaticEntry),
            (Some(FINE), EntryFacts { external: true, ..entry("old") }, ExternalEntry),
            (Some(FINE), EntryFacts { local: true, ..entry("old") }, OwnAddress),
            (Some(FINE), entry("old"), Silence),
        ];
        for (port, entry, cause) in cases {
            assert_eq!(
                causes("new", port.as_ref(), std::slice::from_ref(&entry), false),
                [cause],
                "{port:?} {entry:?}"
            );
            assert!(!cause.sentence().is_empty() && !cause.remedy().is_empty());
        }
        assert_eq!(causes("new", Some(&FINE), &[entry("old")], true), [MovedAway]);
        assert_eq!(causes("new", Some(&FINE), &[], false), [Silence]);
    }

    #[test]
    fn several_causes_are_all_named() {
        let port = PortFacts { state: PortState::Blocking, learning: false, ..FINE };
        let sticky = EntryFacts { sticky: true, fixed: true, ..entry("old") };
        let wanted = [StuckCause::NotForwarding, StuckCause::StickyEntry, StuckCause::LearningOff];
        assert_eq!(causes("new", Some(&port), &[sticky], false), wanted);
    }
}
