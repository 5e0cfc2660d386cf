//! Which processes hold a KVM VM, asked again and again at little cost.
//!
//! Looking at all descriptors of all processes of a busy host every second would cost more than everything else here. So a process that
//! holds a VM is looked at each time, a new one for its first few times, and every other once in [`AGAIN_IN`] looks: a VMM that opens
//! `/dev/kvm` long after its start, or that has the number of a process that has just ended, is found that much later.

use std::collections::HashMap;

use crate::foreign::KvmProcess;

/// How many looks a new process is looked at in a row.
const YOUNG: u64 = 5;
/// In how many looks a process that holds no VM is looked at once.
pub(super) const AGAIN_IN: u64 = 10;

/// What is remembered of all processes.
#[derive(Debug, Default)]
pub(super) struct Census {
    seen: HashMap<u32, Seen>,
    turn: u64,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    first: u64,
    last: u64,
    holds: bool,
}

impl Census {
    /// The processes that hold a VM now, by id, but for `except`.
    pub(super) fn look(&mut self, except: Option<u32>) -> Vec<KvmProcess> {
        let ids: Vec<u32> = KvmProcess::ids().into_iter().filter(|&id| Some(id) != except).collect();
        self.look_at(&ids, |id| KvmProcess::open(id).ok())
    }

    fn look_at<P>(&mut self, ids: &[u32], mut open: impl FnMut(u32) -> Option<P>) -> Vec<P> {
        self.turn += 1;
        let turn = self.turn;
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        let mut found = Vec::new();
        for id in ids {
            let seen = self.seen.entry(id).or_insert(Seen { first: turn, last: turn, holds: false });
            seen.last = turn;
            if seen.holds || turn - seen.first < YOUNG || turn.wrapping_add(id.into()).is_multiple_of(AGAIN_IN) {
                let process = open(id);
                seen.holds = process.is_some();
                found.extend(process);
            }
        }
        self.seen.retain(|_, seen| seen.last == turn);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vms_are_looked_at_each_time_and_others_seldom() {
        let mut census = Census::default();
        let ids: Vec<u32> = (1..=100).collect();
        let mut looks = 0;
        for turn in 0..40 {
            let found = census.look_at(&ids, |id| {
                looks += usize::from(turn >= 20);
                (id == 7).then_some(id)
            });
            assert_eq!(found, [7]);
        }
        assert!((200..=240).contains(&looks), "{looks} looks at 100 processes in 20 turns");
    }

    #[test]
    fn a_vm_is_found_late_and_lost_at_once() {
        let mut census = Census::default();
        let ids = [1, 2, 3];
        for _ in 0..20 {
            assert!(census.look_at(&ids, |_| None::<u32>).is_empty());
        }
        // 2 opens /dev/kvm long after its start.
        let until = (1..=AGAIN_IN).find(|_| census.look_at(&ids, |id| (id == 2).then_some(id)) == [2]);
        assert!(until.is_some());
        assert_eq!(census.look_at(&ids, |id| (id == 2).then_some(id)), [2]);
        assert!(census.look_at(&ids, |_| None::<u32>).is_empty());
        // What has ended is forgotten; a new process of that number is looked at at once.
        assert!(census.look_at(&[1, 3], |_| None::<u32>).is_empty());
        assert_eq!(census.look_at(&ids, |id| (id == 2).then_some(id)), [2]);
    }
}
