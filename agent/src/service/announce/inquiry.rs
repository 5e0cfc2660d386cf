//! Whether somebody else has what a VM has that is about to run here: asked on a thread of its own, beside what has to be done anyway.
//!
//! Owns the question, what is no conflict, and how one is told. What a conflict is to do is the policy's ([`OnConflict`]).
//!
//! The VM itself is no other: its answers come from its own Ethernet address, and a bridge that has that behind a tap from which the VM moves away, in this very network, has it where it should.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::{Place, probe};
use crate::announce::conflict::OnConflict;
use crate::model::network::{Conflict, ConflictKind, ProbeReport};
use crate::model::{AskedReport, NetSpec, VmId, chain};
use crate::net::bridge;
use crate::service::control::ask_info;
use crate::service::registry::Registry;

/// What is asked for whom.
#[derive(Clone, Debug)]
pub struct InquiryOrder {
    /// What a conflict is to do.
    pub policy: OnConflict,
    /// The VM.
    pub vm_id: VmId,
    /// Its cards, with the taps that it is to have here.
    pub nets: Vec<NetSpec>,
    /// Where this host's own VMs are listed.
    pub run_dir: PathBuf,
}

/// A question that goes on by itself. Dropping it ends it.
#[derive(Debug)]
pub struct Inquiry {
    policy: OnConflict,
    /// The VM's taps where it comes from, if these are in this network.
    former: Vec<String>,
    cancel: Arc<AtomicBool>,
    thread: Option<JoinHandle<AskedReport>>,
    report: Option<AskedReport>,
}

impl Inquiry {
    /// Begins to ask; none if nobody wants to know, or there is nothing to ask for.
    pub fn begin(order: InquiryOrder) -> Option<Self> {
        let policy = order.policy;
        if policy == OnConflict::Off || order.nets.is_empty() {
            return None;
        }
        let cancel = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&cancel);
        let thread = std::thread::Builder::new().name("inquiry".into()).spawn(move || ask(&order, &flag));
        let (thread, report) = match thread {
            Ok(thread) => (Some(thread), None),
            Err(error) => {
                (None, Some(AskedReport { not_asked: vec![format!("no thread: {error}")], ..AskedReport::default() }))
            }
        };
        Some(Self { policy, former: Vec::new(), cancel, thread, report })
    }

    /// Whether a conflict keeps the VM away.
    pub fn may_refuse(&self) -> bool {
        self.policy == OnConflict::Refuse
    }

    /// The VM comes from these taps of this very network.
    pub fn comes_from(&mut self, taps: impl IntoIterator<Item = String>) {
        self.former.extend(taps);
    }

    /// What came of it, once it is known. Does not wait.
    pub fn poll(&mut self) -> Option<&AskedReport> {
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            self.join();
        }
        self.report.as_ref()
    }

    /// Waits for the end of it, a third of a second.
    pub fn wait(&mut self) -> &AskedReport {
        self.join();
        self.report.get_or_insert_default()
    }

    fn join(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        let failed = || AskedReport { not_asked: vec!["the question failed".to_owned()], ..AskedReport::default() };
        let mut report = thread.join().unwrap_or_else(|_| failed());
        report.policy = self.policy.to_string();
        let former = &self.former;
        report.conflicts.retain_mut(|conflict| is_of_another(conflict, former));
        for conflict in &report.conflicts {
            tracing::warn!("{conflict}: {}", conflict.remedy());
        }
        for reason in &report.not_asked {
            tracing::warn!("who has the VM's addresses is not known: {reason}");
        }
        self.report = Some(report);
    }

    /// Why the VM is kept away, if it is: by the report that is there.
    pub fn refusal(&self) -> Option<String> {
        let conflict = self.report.as_ref().filter(|_| self.may_refuse())?.conflicts.first()?;
        Some(format!("{conflict}: {}", conflict.remedy()))
    }
}

impl Drop for Inquiry {
    fn drop(&mut self) {
        self.cancel.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // It has said why, if it panicked.
            let _ended = thread.join();
        }
    }
}

/// Whether anybody is left that has the VM's Ethernet address when its former taps are left out.
fn is_of_another(conflict: &mut Conflict, former: &[String]) -> bool {
    if conflict.kind != ConflictKind::Mac {
        return true;
    }
    conflict.ports.retain(|port| !former.contains(port));
    !conflict.ports.is_empty()
}

fn ask(order: &InquiryOrder, cancel: &AtomicBool) -> AskedReport {
    let mut report = AskedReport::default();
    // All cards at once: each waits for its own answers.
    let asked: Vec<Result<ProbeReport, String>> = std::thread::scope(|scope| {
        let threads: Vec<_> = order
            .nets
            .iter()
            .map(|net| {
                scope.spawn(move || {
                    let place = Place { interface: net.tap.clone(), stations: vec![net.station.clone()] };
                    probe::probe(&place, probe::DEFAULT_PATIENCE, cancel).map_err(|error| chain(&error))
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err("the question failed".to_owned())))
            .collect()
    });
    let mut add = |conflict: Conflict| {
        if !report
            .conflicts
            .iter()
            .any(|known| (known.kind, known.mac, known.ip) == (conflict.kind, conflict.mac, conflict.ip))
        {
            report.conflicts.push(conflict);
        }
    };
    let mut not_asked = Vec::new();
    for one in asked {
        match one {
            Ok(probed) => {
                report.addresses += probed.addresses;
                report.questions_sent += probed.questions_sent;
                report.waited_ns = report.waited_ns.max(probed.waited_ns);
                probed.conflicts.into_iter().for_each(&mut add);
            }
            Err(reason) => not_asked.push(reason),
        }
    }
    hosted_claims(order).into_iter().for_each(&mut add);
    report.not_asked = not_asked;
    report
}

/// Other VMs that dunlin runs here on the same bridges: one that has said nothing yet is in no table.
fn hosted_claims(order: &InquiryOrder) -> Vec<Conflict> {
    let registry = Registry::new(&order.run_dir);
    let mut claims = Vec::new();
    for entry in registry.list().into_iter().filter(|entry| entry.vm_id != order.vm_id) {
        let Ok(info) = ask_info(&registry.socket(&entry.name, "observe")) else { continue };
        for other in &info.nets {
            let there = &other.station;
            for net in order.nets.iter().filter(|net| share_a_bridge(&net.tap, &other.tap)) {
                let (own, ports) = (&net.station, vec![other.tap.clone()]);
                let is_same_card = own.mac == there.mac;
                if is_same_card && net.tap != other.tap {
                    claims.push(Conflict { kind: ConflictKind::Mac, mac: own.mac, ip: None, ports });
                } else if !is_same_card && let Some(&ip) = own.ips.iter().find(|ip| there.ips.contains(ip)) {
                    claims.push(Conflict { kind: ConflictKind::Address, mac: there.mac, ip: Some(ip), ports });
                }
            }
        }
    }
    claims
}

fn share_a_bridge(one: &str, other: &str) -> bool {
    let of = |tap: &str| bridge::bridge_of(tap).ok().flatten().map(|bridge| bridge.index);
    of(one).is_some_and(|bridge| of(other) == Some(bridge))
}

/// What was asked before a VM is started.
#[derive(Clone, Debug, Default)]
pub struct BeforeStart {
    /// What an operator should know.
    pub warnings: Vec<String>,
    /// Why it is not started, if it is not.
    pub refusal: Option<String>,
}

/// Asks, and waits for the answers, a third of a second; takes no time if nobody wants to know.
pub fn before_start(order: InquiryOrder, state_dir: &Path) -> BeforeStart {
    let vm_id = order.vm_id;
    let Some(mut inquiry) = Inquiry::begin(order) else { return BeforeStart::default() };
    let report = inquiry.wait().clone();
    let refusal = inquiry.refusal();
    audit(state_dir, "vm run", vm_id, &report, refusal.is_some());
    let mut warnings: Vec<String> = report.not_asked;
    if refusal.is_none() {
        warnings.extend(report.conflicts.iter().map(|conflict| format!("{conflict}: {}", conflict.remedy())));
    }
    BeforeStart { warnings, refusal }
}

/// What is written to the audit log of a conflict that was found.
pub fn audit(state_dir: &Path, what: &str, vm_id: VmId, report: &AskedReport, refused: bool) {
    use crate::service::audit::{Action, me, record};
    if report.conflicts.is_empty() {
        return;
    }
    let conflicts: Vec<String> = report.conflicts.iter().map(ToString::to_string).collect();
    let after = if refused { "refused" } else { "goes on" };
    let what = format!("{what} --on-conflict {}", report.policy);
    let action = Action {
        who: me(),
        what: &what,
        vm_id,
        before: "about to run here".to_owned(),
        after: after.to_owned(),
        result: conflicts.join("; "),
    };
    record(state_dir, &action);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_former_tap_of_this_network_is_no_other() {
        let conflict = |kind, ports: &[&str]| Conflict {
            kind,
            mac: "02:00:00:00:00:01".parse().unwrap(),
            ip: None,
            ports: ports.iter().map(|&port| port.to_owned()).collect(),
        };
        let left = |kind, ports: &[&str], former: &[String]| {
            let mut conflict = conflict(kind, ports);
            is_of_another(&mut conflict, former).then_some(conflict.ports)
        };
        let former = ["tap0".to_owned()];
        assert_eq!(left(ConflictKind::Mac, &["tap0"], &former), None);
        assert_eq!(left(ConflictKind::Mac, &["tap0"], &[]), Some(former.to_vec()));
        assert_eq!(left(ConflictKind::Mac, &["tap0", "tap1"], &former), Some(vec!["tap1".to_owned()]));
        assert_eq!(left(ConflictKind::Address, &["tap0"], &former), Some(former.to_vec()));
    }

    #[test]
    fn what_cannot_be_asked_is_said_and_nobody_is_refused_for_it() {
        let nets = vec!["tap=nonesuch9,mac=02:00:00:00:00:01,ip=10.0.0.1".parse().unwrap()];
        let run_dir = PathBuf::from("/nonesuch");
        let order = InquiryOrder { policy: OnConflict::Refuse, vm_id: VmId::random(), nets, run_dir };
        assert!(Inquiry::begin(InquiryOrder { policy: OnConflict::Off, ..order.clone() }).is_none());
        assert!(Inquiry::begin(InquiryOrder { nets: Vec::new(), ..order.clone() }).is_none());
        let mut inquiry = Inquiry::begin(order).unwrap();
        let report = inquiry.wait();
        assert_eq!((report.not_asked.len(), report.conflicts.len(), report.policy.as_str()), (1, 0, "refuse"));
        assert!(report.not_asked[0].contains("nonesuch9"), "{report:?}");
        assert_eq!(inquiry.refusal(), None);
    }
}
