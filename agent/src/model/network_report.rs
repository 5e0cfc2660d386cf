//! What the network had to do with a migration: who claimed the VM's addresses, and which bridges relearned where it is.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::network::{Conflict, Followed};

/// A network namespace of a running kernel. Where two are equal, interfaces of one name are one interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkPlace {
    /// This boot (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: Uuid,
    /// The device of the namespace's file (`/proc/PID/ns/net`; see namespaces(7)).
    pub device: u64,
    /// Its inode there.
    pub inode: u64,
}

/// Whether somebody else has what a VM has: asked at its target, while its memory came.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AskedReport {
    /// What a conflict was to do: `warn` or `refuse`.
    pub policy: String,
    /// IP addresses that were asked for.
    pub addresses: u32,
    /// Questions that were sent.
    pub questions_sent: u32,
    /// For how long answers were waited for.
    pub waited_ns: u64,
    /// What else has the VM's addresses.
    pub conflicts: Vec<Conflict>,
    /// Cards that could not be asked for, and why.
    pub not_asked: Vec<String>,
}

/// What the network had to do with a migration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkReport {
    /// What came of asking who has the VM's addresses; absent where nobody asked, or it is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked: Option<AskedReport>,
    /// Rounds of announcements that the target had sent when this was written.
    pub rounds_sent: u32,
    /// Their frames.
    pub frames_sent: u32,
    /// Rounds that the source has sent, since the VM runs there again.
    #[serde(default)]
    pub rounds_here: u32,
    /// Bridges of the VM's taps at the target; times are after the first announcement.
    pub target: Vec<Followed>,
    /// Bridges of the VM's taps at the source: whether these have it elsewhere now. Times are after `released`.
    pub source: Vec<Followed>,
}

impl NetworkReport {
    /// Whether it says nothing at all.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What a target tells its source of the network, beside the migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkWord {
    /// It asks who has the VM's addresses, and may refuse: the VM should not be paused before that is known.
    Asking,
    /// What came of it.
    Asked(AskedReport),
    /// The VM runs there, and this is what is known of its bridges. Nothing follows.
    Last(NetworkReport),
}

impl NetworkWord {
    /// The longest that is read, in bytes.
    pub const MOST_BYTES: usize = 256 << 10;

    /// As it travels: JSON, so that a reader of another version finds what it knows.
    pub fn to_text(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// What a peer said; none if that is too long, or no such word.
    pub fn read(text: &str) -> Option<Self> {
        if text.len() > Self::MOST_BYTES { None } else { serde_json::from_str(text).ok() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::network::{ConflictKind, StuckCause, Verdict};

    #[test]
    fn a_word_reads_as_it_was_said_and_rubbish_is_none() {
        let mac = "02:00:00:00:00:01".parse().unwrap();
        let conflict =
            Conflict { kind: ConflictKind::Address, mac, ip: "10.0.0.1".parse().ok(), ports: vec!["up0".to_owned()] };
        let asked = AskedReport { policy: "warn".to_owned(), conflicts: vec![conflict], ..AskedReport::default() };
        let followed = Followed {
            bridge: "br0".to_owned(),
            expected_port: Some("tap0".to_owned()),
            mac,
            verdict: Verdict::NotRelearned,
            port: None,
            after_first_ns: None,
            moves: 1,
            causes: vec![StuckCause::PortLocked.diagnosis()],
        };
        let report = NetworkReport { asked: Some(asked.clone()), target: vec![followed], ..NetworkReport::default() };
        for word in [NetworkWord::Asking, NetworkWord::Asked(asked), NetworkWord::Last(report)] {
            assert_eq!(NetworkWord::read(&word.to_text()), Some(word));
        }
        let long = format!(r#"{{"asked":{{"policy":"{}"}}}}"#, "a".repeat(NetworkWord::MOST_BYTES));
        for bad in ["", "{}", r#"{"asked":3}"#, &long] {
            assert_eq!(NetworkWord::read(bad), None);
        }
        // A word of a later version says more.
        let later = r#"{"last":{"rounds_sent":1,"frames_sent":4,"target":[],"source":[],"weather":"fine"}}"#;
        let Some(NetworkWord::Last(report)) = NetworkWord::read(later) else { panic!() };
        assert_eq!(report.rounds_sent, 1);
    }
}
