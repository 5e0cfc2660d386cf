//! The audit log: every action on a VM, one JSON line. Owns the format; no guest memory ever enters it.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use serde::Serialize;

use crate::model::VmId;
use crate::model::schema::Schema;
use crate::time::unix_ms;

/// One action.
#[derive(Debug, Serialize)]
pub struct Action<'a> {
    /// Who asked: user id, and process id of the caller where it is known.
    pub who: String,
    /// What was asked.
    pub what: &'a str,
    /// Of which VM.
    pub vm_id: VmId,
    /// The VM's state before.
    pub before: String,
    /// The VM's state after.
    pub after: String,
    /// `ok`, or what went wrong.
    pub result: String,
}

#[derive(Serialize)]
struct Entry<'a> {
    unix_ms: u64,
    #[serde(flatten)]
    action: &'a Action<'a>,
}

impl Schema for Entry<'_> {
    const SCHEMA: &'static str = "dunlin.audit/v1";
}

/// An entry with every member: for the test of the documentation.
#[cfg(test)]
pub(crate) fn sample() -> serde_json::Value {
    let [who, before, after, result] = [const { String::new() }; 4];
    let action = Action { who, what: "", vm_id: VmId::random(), before, after, result };
    serde_json::to_value(Entry { unix_ms: 0, action: &action }.tagged()).unwrap()
}

/// Who this process acts for.
pub fn me() -> String {
    format!("uid={} pid={}", rustix::process::getuid().as_raw(), std::process::id())
}

/// Writes an action to `audit.log` in the state folder and to the log. A log that cannot be written is reported, and
/// stops nothing: the VM comes first.
pub fn record(state_dir: &Path, action: &Action<'_>) {
    tracing::info!(
        who = action.who, what = action.what, vm = %action.vm_id, before = action.before, after = action.after,
        result = action.result, "audit"
    );
    let unix_ms = unix_ms();
    let written =
        serde_json::to_string(&Entry { unix_ms, action }.tagged()).map_err(std::io::Error::from).and_then(|line| {
            let mut file = OpenOptions::new().create(true).append(true).open(state_dir.join("audit.log"))?;
            file.write_all(format!("{line}\n").as_bytes())
        });
    if let Err(error) = written {
        tracing::warn!("audit log in {}: {error}", state_dir.display());
    }
}
