//! Resolving a VM in doubt whose machine process has died: only the journal is left to be told.

use std::path::Path;

use super::audit::{self, Action};
use crate::model::{Owner, VmId};
use crate::port::{Journal, JournalError, JournalRecord};
use crate::store::FileJournal;

/// Writes the operator's decision for every migration of `vm` that is in doubt in the journals of `state_dir`.
/// `Ok(Err(_))` says why there was nothing to decide.
///
/// # Errors
/// Journals that cannot be read or written.
pub fn resolve_without_machine(state_dir: &Path, vm: VmId, owner: Owner) -> Result<Result<(), String>, JournalError> {
    let mut journal = FileJournal::open(state_dir)?;
    let mut decided = 0;
    for (migration, of, last) in journal.all()? {
        if of != vm || !last.leaves_doubt() {
            continue;
        }
        let record = match (owner, &last) {
            // A prepared copy died with its process: it can never run here, and the source may have its VM back.
            (Owner::Here, JournalRecord::Prepared) => {
                return Ok(Err(format!(
                    "the prepared copy of VM {vm} died with its process, so it cannot be owned here; run this with \
                     --owner there, and `dunlin resolve --owner here` at the source"
                )));
            }
            // The process is dead and its memory with it: owning it here means that it may be booted here again.
            (Owner::Here, _) => JournalRecord::Owner,
            (_, JournalRecord::Prepared) => JournalRecord::NeverOwner,
            _ => JournalRecord::Discarded,
        };
        journal.append(migration, vm, record)?;
        audit::record(
            state_dir,
            &Action {
                who: audit::me(),
                what: "resolve without a machine",
                vm_id: vm,
                before: last.name().to_owned(),
                after: owner.name().to_owned(),
                result: "ok".to_owned(),
            },
        );
        decided += 1;
    }
    Ok(if decided > 0 { Ok(()) } else { Err(format!("VM {vm} is not in doubt here")) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::MigrationId;

    #[test]
    fn only_a_vm_in_doubt_can_be_resolved() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = FileJournal::open(folder.path()).unwrap();
        let (vm, id) = (VmId::random(), MigrationId::random());
        assert!(resolve_without_machine(folder.path(), vm, Owner::Here).unwrap().is_err());
        journal.append(id, vm, JournalRecord::Released { peer: String::new() }).unwrap();
        resolve_without_machine(folder.path(), vm, Owner::There).unwrap().unwrap();
        assert_eq!(journal.last(id).unwrap(), Some(JournalRecord::Discarded));
        assert!(resolve_without_machine(folder.path(), vm, Owner::Here).unwrap().is_err());
    }
}
