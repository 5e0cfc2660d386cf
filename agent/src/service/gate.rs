//! The ownership gate of one machine: whether its vCPUs may run, and the journal records that decide it.
//!
//! The machine's process holds the gate, so no manager's death can leave two owners. Pure but for the journal port;
//! must not know sockets or KVM.

use crate::model::{MigrationId, Owner, VmId};
use crate::port::{Journal, JournalError, JournalRecord};

/// Who may run the VM, as this machine knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GateState {
    /// This machine may run.
    Open,
    /// A target that has no complete VM yet.
    Receiving,
    /// A target that holds a complete VM and waits for the source's word.
    Prepared,
    /// A target that runs the VM on loan: until the lease is over, and behind that not before it is prolonged.
    Borrowed,
    /// A source that has lent the VM to its target, and can take it back.
    Lent,
    /// A source that has let go and waits to hear that the target runs.
    Released,
    /// Never again: the VM is elsewhere.
    Closed,
}

/// What the machine does when its manager's session has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLoss {
    /// Go on at full speed, dirty log off.
    Run,
    /// Stand and wait for a manager or an operator.
    Stand,
    /// End the process: there is nothing worth keeping.
    Exit,
}

/// The order does not fit the gate's state, or could not be journaled.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// Not from here.
    #[error("not possible while {state:?}: {order}")]
    State {
        /// What was asked.
        order: &'static str,
        /// The gate's state.
        state: GateState,
    },
    /// The record is not on disk; nothing has changed.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// The gate.
pub struct OwnershipGate {
    vm: VmId,
    state: GateState,
    migration: Option<MigrationId>,
    journal: Box<dyn Journal>,
    /// Target: `prepared` is journaled, though the VM is not complete yet.
    foreseen: bool,
    /// Target: the loan has ended, or has not begun.
    lease_over: bool,
}

impl OwnershipGate {
    /// The gate of a machine that was booted here.
    pub fn open(vm: VmId, journal: Box<dyn Journal>) -> Self {
        Self { vm, state: GateState::Open, migration: None, journal, foreseen: false, lease_over: true }
    }

    /// The gate of a machine that waits for a VM.
    ///
    /// # Errors
    /// A journal that cannot be written.
    pub fn receiving(vm: VmId, migration: MigrationId, mut journal: Box<dyn Journal>) -> Result<Self, GateError> {
        journal.append(migration, vm, JournalRecord::Reserved)?;
        Ok(Self {
            vm,
            state: GateState::Receiving,
            migration: Some(migration),
            journal,
            foreseen: false,
            lease_over: true,
        })
    }

    /// The state.
    pub fn state(&self) -> GateState {
        self.state
    }

    /// The migration that has the machine, or had it last.
    pub fn migration(&self) -> Option<MigrationId> {
        self.migration
    }

    /// Whether vCPUs may run.
    pub fn may_run(&self) -> bool {
        self.state == GateState::Open || (self.state == GateState::Borrowed && !self.lease_over)
    }

    fn pass(
        &mut self,
        order: &'static str,
        from: &[GateState],
        to: GateState,
        record: Option<JournalRecord>,
    ) -> Result<(), GateError> {
        let (true, Some(migration)) = (from.contains(&self.state), self.migration) else {
            return Err(GateError::State { order, state: self.state });
        };
        if let Some(record) = record {
            self.journal.append(migration, self.vm, record)?;
        }
        self.state = to;
        Ok(())
    }

    /// A manager begins to move the VM away.
    pub fn attach(&mut self, migration: MigrationId) -> Result<(), GateError> {
        if self.state != GateState::Open {
            return Err(GateError::State { order: "migrate", state: self.state });
        }
        // Makes the file, too, and finds out about a full disk while nothing depends on it.
        self.journal.append(migration, self.vm, JournalRecord::Offered)?;
        self.migration = Some(migration);
        Ok(())
    }

    /// The manager's session has ended. Nothing depends on the record being written: at a source to which the VM still
    /// belongs, and at a target that never had all of it, it only tells an operator that this attempt is over.
    pub fn note_loss(&mut self) {
        if self.foreseen
            && let (GateState::Receiving, Some(migration)) = (self.state, self.migration)
            && let Err(error) = self.journal.append(migration, self.vm, JournalRecord::NeverOwner)
        {
            tracing::warn!("the end of the attempt could not be journaled: {error}");
        }
        if let (GateState::Open, Some(migration)) = (self.state, self.migration)
            && matches!(self.journal.last(migration), Ok(Some(JournalRecord::Offered)))
            && let Err(error) = self.journal.append(migration, self.vm, JournalRecord::Aborted)
        {
            tracing::warn!("the rollback could not be journaled: {error}");
        }
    }

    /// Source: the VM is to run at the target on loan.
    pub fn lend(&mut self, peer: String, lease_ms: u64) -> Result<(), GateError> {
        self.pass("lend", &[GateState::Open], GateState::Lent, Some(JournalRecord::Lent { peer, lease_ms }))
    }

    /// Source: the point of no return.
    pub fn release(&mut self, peer: String) -> Result<(), GateError> {
        let record = JournalRecord::Released { peer };
        self.pass("release", &[GateState::Open, GateState::Lent], GateState::Released, Some(record))
    }

    /// Source: the target is known never to have owned the VM; or what was lent to it has ended.
    pub fn reclaim(&mut self) -> Result<(), GateError> {
        let from = [GateState::Released, GateState::Lent];
        self.pass("take back", &from, GateState::Open, Some(JournalRecord::Owner))
    }

    /// Target: the VM may run here until [`OwnershipGate::lease_over`]. The journal goes on saying `prepared`: after a crash of this host it must not run here.
    pub fn borrow(&mut self) -> Result<(), GateError> {
        self.pass("run on loan", &[GateState::Prepared, GateState::Borrowed], GateState::Borrowed, None)?;
        self.lease_over = false;
        Ok(())
    }

    /// Target: the lease is over. Whether the VM ran by it.
    pub fn lease_over(&mut self) -> bool {
        let was_lent = self.state == GateState::Borrowed && !self.lease_over;
        self.lease_over = true;
        was_lent
    }

    /// Target: the source is about to pause the VM, so `prepared` is journaled: nobody waits for the disk while the VM stands.
    /// The gate's state stays; if the VM does not become complete, `never-owner` follows.
    pub fn foresee_prepared(&mut self) -> Result<(), GateError> {
        if self.foreseen {
            return Ok(());
        }
        self.pass("prepare", &[GateState::Receiving], GateState::Receiving, Some(JournalRecord::Prepared))?;
        self.foreseen = true;
        Ok(())
    }

    /// Target: a complete VM is here.
    pub fn prepared(&mut self) -> Result<(), GateError> {
        let record = (!self.foreseen).then_some(JournalRecord::Prepared);
        self.pass("prepare", &[GateState::Receiving], GateState::Prepared, record)
    }

    /// Target: the source has released it.
    pub fn take_ownership(&mut self) -> Result<(), GateError> {
        if self.state == GateState::Open {
            // An operator was faster: `dunlin resolve --owner here`.
            return Ok(());
        }
        let from = [GateState::Prepared, GateState::Borrowed];
        self.pass("take ownership", &from, GateState::Open, Some(JournalRecord::Owner))
    }

    /// Either side: the VM is elsewhere.
    pub fn discard(&mut self) -> Result<(), GateError> {
        let record = match self.state {
            GateState::Released | GateState::Lent => JournalRecord::Discarded,
            _ => JournalRecord::NeverOwner,
        };
        let from =
            [GateState::Released, GateState::Lent, GateState::Receiving, GateState::Prepared, GateState::Borrowed];
        self.pass("discard", &from, GateState::Closed, Some(record))
    }

    /// An operator decides, of a machine in doubt.
    pub fn resolve(&mut self, owner: Owner) -> Result<(), GateError> {
        match owner {
            Owner::Here => {
                let from = [GateState::Released, GateState::Lent, GateState::Prepared, GateState::Borrowed];
                self.pass("resolve --owner here", &from, GateState::Open, Some(JournalRecord::Owner))
            }
            Owner::There if !matches!(self.state, GateState::Open | GateState::Receiving | GateState::Closed) => {
                self.discard()
            }
            _ => Err(GateError::State { order: "resolve --owner there", state: self.state }),
        }
    }

    /// What the end of the manager's session means.
    pub fn on_session_lost(&self) -> OnLoss {
        match self.state {
            GateState::Open => OnLoss::Run,
            GateState::Prepared | GateState::Borrowed | GateState::Lent | GateState::Released => OnLoss::Stand,
            GateState::Receiving | GateState::Closed => OnLoss::Exit,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::FileJournal;

    fn journal() -> (tempfile::TempDir, FileJournal) {
        let folder = tempfile::tempdir().unwrap();
        let journal = FileJournal::open(folder.path()).unwrap();
        (folder, journal)
    }

    #[test]
    fn a_released_source_does_not_run_whatever_happens_to_its_manager() {
        let (_folder, journal) = journal();
        let id = MigrationId::random();
        let mut gate = OwnershipGate::open(VmId::random(), Box::new(journal.clone()));
        gate.attach(id).unwrap();
        assert_eq!(gate.on_session_lost(), OnLoss::Run);
        gate.release("tcp://192.0.2.1:1".to_owned()).unwrap();
        assert!(!gate.may_run());
        assert_eq!(gate.on_session_lost(), OnLoss::Stand);
        assert!(matches!(journal.last(id), Ok(Some(JournalRecord::Released { .. }))));
        gate.reclaim().unwrap();
        assert!(gate.may_run());
    }

    #[test]
    fn a_manager_that_goes_leaves_an_aborted_attempt() {
        let (_folder, journal) = journal();
        let id = MigrationId::random();
        let mut gate = OwnershipGate::open(VmId::random(), Box::new(journal.clone()));
        gate.attach(id).unwrap();
        gate.note_loss();
        assert_eq!(journal.last(id).unwrap(), Some(JournalRecord::Aborted));
    }

    #[test]
    fn a_target_runs_only_after_it_was_prepared_and_told() {
        let (_folder, journal) = journal();
        let id = MigrationId::random();
        let mut gate = OwnershipGate::receiving(VmId::random(), id, Box::new(journal.clone())).unwrap();
        assert_eq!(gate.on_session_lost(), OnLoss::Exit);
        assert!(gate.take_ownership().is_err());
        gate.prepared().unwrap();
        assert_eq!((gate.may_run(), gate.on_session_lost()), (false, OnLoss::Stand));
        gate.take_ownership().unwrap();
        assert_eq!((gate.may_run(), gate.on_session_lost()), (true, OnLoss::Run));
        assert_eq!(journal.last(id).unwrap(), Some(JournalRecord::Owner));
    }

    #[test]
    fn a_target_whose_vm_was_never_complete_says_so_behind_what_it_foresaw() {
        let (_folder, journal) = journal();
        let id = MigrationId::random();
        let mut gate = OwnershipGate::receiving(VmId::random(), id, Box::new(journal.clone())).unwrap();
        gate.foresee_prepared().unwrap();
        assert_eq!((gate.may_run(), gate.on_session_lost()), (false, OnLoss::Exit));
        assert!(gate.take_ownership().is_err());
        assert_eq!(journal.last(id).unwrap(), Some(JournalRecord::Prepared));
        gate.note_loss();
        assert_eq!(journal.last(id).unwrap(), Some(JournalRecord::NeverOwner));
    }

    #[test]
    fn a_vm_on_loan_runs_until_the_lease_is_over_and_is_nobodys_in_the_journal() {
        let (_folder, journal) = journal();
        let id = MigrationId::random();
        let mut gate = OwnershipGate::receiving(VmId::random(), id, Box::new(journal.clone())).unwrap();
        assert!(gate.borrow().is_err() && !gate.lease_over());
        gate.prepared().unwrap();
        gate.borrow().unwrap();
        assert_eq!((gate.may_run(), gate.on_session_lost()), (true, OnLoss::Stand));
        assert!(gate.lease_over() && !gate.may_run() && !gate.lease_over());
        gate.borrow().unwrap();
        assert!(gate.may_run());
        assert_eq!(journal.last(id).unwrap(), Some(JournalRecord::Prepared));
        gate.take_ownership().unwrap();
        assert!(gate.may_run() && !gate.lease_over() && gate.may_run());
    }

    #[test]
    fn what_was_lent_can_be_taken_back_until_it_is_released() {
        let (_folder, journal) = journal();
        let (taken, given) = (MigrationId::random(), MigrationId::random());
        let mut gate = OwnershipGate::open(VmId::random(), Box::new(journal.clone()));
        gate.attach(taken).unwrap();
        gate.lend("tcp://192.0.2.1:1".to_owned(), 3000).unwrap();
        assert_eq!((gate.may_run(), gate.on_session_lost()), (false, OnLoss::Stand));
        gate.reclaim().unwrap();
        assert!(gate.may_run());
        gate.attach(given).unwrap();
        gate.lend(String::new(), 3000).unwrap();
        gate.release(String::new()).unwrap();
        assert_eq!((gate.state(), gate.may_run()), (GateState::Released, false));
        assert_eq!(journal.last(taken).unwrap(), Some(JournalRecord::Owner));
    }

    #[test]
    fn what_was_foreseen_is_not_journaled_again() {
        let (_folder, journal) = journal();
        let id = MigrationId::random();
        let mut gate = OwnershipGate::receiving(VmId::random(), id, Box::new(journal)).unwrap();
        gate.foresee_prepared().unwrap();
        gate.journal = Box::new(Full);
        gate.prepared().unwrap();
        assert_eq!(gate.on_session_lost(), OnLoss::Stand);
    }

    #[test]
    fn an_operator_decides_only_in_doubt() {
        let (_folder, journal) = journal();
        let mut gate = OwnershipGate::open(VmId::random(), Box::new(journal.clone()));
        gate.attach(MigrationId::random()).unwrap();
        assert!(gate.resolve(Owner::Here).is_err());
        assert!(gate.resolve(Owner::There).is_err());
        gate.release(String::new()).unwrap();
        assert!(gate.resolve(Owner::Nobody).is_err());
        gate.resolve(Owner::There).unwrap();
        assert_eq!(gate.state(), GateState::Closed);
        assert!(gate.resolve(Owner::Here).is_err());
    }

    /// A journal on a full disk.
    struct Full;

    impl Journal for Full {
        fn append(&mut self, _: MigrationId, _: VmId, _: JournalRecord) -> Result<(), JournalError> {
            let source = std::io::ErrorKind::StorageFull.into();
            Err(JournalError::Io { path: "full".to_owned(), action: "writing", source })
        }

        fn last(&self, _: MigrationId) -> Result<Option<JournalRecord>, JournalError> {
            Ok(None)
        }
    }

    #[test]
    fn what_is_not_on_disk_has_not_happened() {
        let mut gate = OwnershipGate::open(VmId::random(), Box::new(Full));
        assert!(gate.attach(MigrationId::random()).is_err());
        gate.migration = Some(MigrationId::random());
        assert!(gate.release(String::new()).is_err());
        assert!(gate.may_run());
        assert!(OwnershipGate::receiving(VmId::random(), MigrationId::random(), Box::new(Full)).is_err());
    }
}
