//! Which way of moving to take, and why.

use std::time::Duration;

use serde::Serialize;

use super::{Plan, Prediction};
use crate::model::units::display_duration;

/// What is said of a way by which the VM can be lost.
const RISK: &str = "; until all of its memory has followed it, a lost host is a lost VM";

/// What was chosen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// The way.
    pub plan: Plan,
    /// Whether it is expected to keep to the downtime.
    pub meets_downtime: bool,
    /// Why, for people.
    pub reason: String,
}

/// Of the ways that this VM can be moved today the first (they stand from the simplest to the one that asks most of the guest) that keeps to the downtime
/// even at the worse end of what is known; else the first that is expected to; else the one under which it stands for the shortest time. A way by which the VM can be lost
/// is taken only if no other keeps to the downtime. None if there is no way.
pub fn choose(predictions: &[Prediction], downtime: Duration) -> Option<Choice> {
    let limit = display_duration(downtime);
    for risky in [false, true] {
        let available = || {
            predictions
                .iter()
                .filter(|prediction| prediction.is_available && prediction.plan.can_lose_the_vm() == risky)
        };
        let warning = if risky { RISK } else { "" };
        if let Some(sure) = available().find(|prediction| {
            let all = [&prediction.expected, &prediction.best, &prediction.worst];
            all.iter().all(|course| course.within(downtime))
        }) {
            let (stands, worst) = (time(sure.expected.blackout_ns), time(sure.longest_blackout_ns()));
            let reason = format!("the VM stands for {stands}, {worst} at the worse end, of {limit} allowed{warning}");
            return Some(Choice { plan: sure.plan, meets_downtime: sure.meets_downtime, reason });
        }
        if let Some(likely) = available().find(|prediction| prediction.meets_downtime) {
            let (stands, worst) = (time(likely.expected.blackout_ns), time(likely.longest_blackout_ns()));
            let reason =
                format!("it is expected to stand for {stands}, of {limit} allowed; at the worse end {worst}{warning}");
            return Some(Choice { plan: likely.plan, meets_downtime: likely.meets_downtime, reason });
        }
    }
    let available = predictions.iter().filter(|prediction| prediction.is_available);
    let shortest = available.min_by_key(|prediction| prediction.expected.blackout_ns.unwrap_or(u64::MAX))?;
    let stands = time(shortest.expected.blackout_ns);
    let warning = if shortest.plan.can_lose_the_vm() { RISK } else { "" };
    let reason = format!(
        "no way keeps to the {limit} allowed; under this one it stands for the shortest time, {stands}{warning}"
    );
    Some(Choice { plan: shortest.plan, meets_downtime: shortest.meets_downtime, reason })
}

fn time(ns: Option<u64>) -> String {
    ns.map_or_else(|| "for ever".to_owned(), |ns| display_duration(Duration::from_nanos(ns)))
}
