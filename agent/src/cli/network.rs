//! What the network had to do with a migration, in words: for the reports of both hosts.

use std::time::Duration;

use crate::model::network::{Followed, Verdict};
use crate::model::units::display_duration;
use crate::model::{AskedReport, NetworkReport};

/// Some lines, indented as those of a report.
pub(super) fn describe(network: &NetworkReport) -> String {
    let mut text = network.asked.as_ref().map_or_else(String::new, describe_asked);
    if network.rounds_sent > 0 {
        let (rounds, frames) = (counted(network.rounds_sent, "round", "s"), counted(network.frames_sent, "frame", "s"));
        text += &format!("  announced  there by then: {rounds}, {frames}\n");
    }
    if network.rounds_here > 0 {
        let rounds = counted(network.rounds_here, "round", "s");
        text += &format!("  announced  here again: {rounds}, the first before it ran\n");
    }
    for followed in &network.target {
        text += &describe_followed(followed, "there", "the first announcement");
    }
    for followed in &network.source {
        text += &describe_followed(followed, "here", "`released`");
    }
    text
}

/// So many of something.
fn counted(number: u32, what: &str, plural: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { plural })
}

fn describe_asked(asked: &AskedReport) -> String {
    let mut text = String::new();
    for conflict in &asked.conflicts {
        text += &format!("  conflict   {conflict}: {}\n", conflict.remedy());
    }
    for reason in &asked.not_asked {
        text += &format!("  not asked  {reason}\n");
    }
    if asked.conflicts.is_empty() && asked.not_asked.is_empty() {
        let waited = display_duration(Duration::from_nanos(asked.waited_ns));
        let addresses = counted(asked.addresses, "address", "es");
        text += &format!("  asked      there for {addresses}, {waited}: nobody else has them\n");
    }
    text
}

fn describe_followed(followed: &Followed, place: &str, since: &str) -> String {
    let Followed { bridge, mac, .. } = followed;
    let port = followed.port.as_deref().unwrap_or("no port");
    let mut text = match followed.verdict {
        Verdict::Relearned => {
            let after = followed.after_first_ns.map(|ns| display_duration(Duration::from_nanos(ns)));
            let after = after.map_or_else(String::new, |after| format!(" {after} after {since}"));
            format!("  relearned  {bridge} {place} has {mac} behind {port}{after}\n")
        }
        Verdict::WasThere => format!("  relearned  {bridge} {place} had {mac} behind {port} before\n"),
        Verdict::Unchanged => format!("  unchanged  {bridge} {place} still has {mac} behind {port}\n"),
        Verdict::NotRelearned => {
            let wanted =
                followed.expected_port.as_ref().map_or_else(String::new, |port| format!(", not behind {port}"));
            format!("  not yet    {bridge} {place} has {mac} behind {port}{wanted}\n")
        }
    };
    for cause in &followed.causes {
        text += &format!("    {}: {}\n", cause.sentence, cause.remedy);
    }
    text
}
