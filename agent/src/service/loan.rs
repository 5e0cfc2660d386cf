//! A VM on loan, as its machines keep it: the source's takes increments in and goes on from the last, the target's stands when the lease is over.
//!
//! Owns what must not depend on any manager: that an increment is taken in as a whole, and that nothing runs behind the end of a lease. Must not know who decides.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::gate::GateState;
use super::lease::Lease;
use super::machine::{Host, lock};
use crate::model::{PageBitmap, PageRun, chain};
use crate::port::{Faults as _, Region as _};
use crate::shm::{RamRegion, memory_file};
use crate::time::monotonic_now;

/// What a machine keeps of a loan.
#[derive(Default)]
pub(super) struct Loan {
    lease: Arc<Lease>,
    /// The machine stands because the lease was over, and is to run when the VM is lent again. Locked while that is decided.
    stands: Mutex<bool>,
    /// Where increments are gathered, and where they go.
    staging: Mutex<Option<Staging>>,
    /// What the guest sends and writes is held.
    holds: AtomicBool,
    /// The state of the last one.
    state: Mutex<Option<Vec<u8>>>,
}

/// Memory as large as RAM, and RAM, as regions.
struct Staging {
    memory: RamRegion,
    ram: RamRegion,
}

impl Loan {
    /// Whether what the guest sends and writes is held.
    pub(super) fn holds(&self) -> bool {
        self.holds.load(Ordering::Acquire)
    }

    /// Does something with the staging memory's file, if there is one.
    pub(super) fn with_staging<T>(&self, action: impl FnOnce(BorrowedFd<'_>) -> T) -> Option<T> {
        lock(&self.staging).as_ref().map(|staging| action(staging.memory.file()))
    }
}

impl Host {
    /// Makes the memory in which increments are gathered, if there is none yet. It is as large as RAM, and takes what is gathered.
    pub(super) fn make_staging(&self) -> Result<(), String> {
        let mut staging = lock(&self.loan.staging);
        if staging.is_none() {
            let spec = self.machine.shape().regions().swap_remove(0);
            let make = || {
                let file = memory_file("dunlin-staging", spec.pages.bytes())?;
                let ram = self.machine.memory().file().try_clone_to_owned()?;
                Ok(Staging { memory: RamRegion::new(spec.clone(), file)?, ram: RamRegion::new(spec.clone(), ram)? })
            };
            let made: std::io::Result<Staging> = make();
            *staging = Some(made.map_err(|error| format!("memory for increments: {error}"))?);
        }
        Ok(())
    }

    /// What the guest sends and writes to disks stays in the machine from now on.
    pub(super) fn hold_output(&self) {
        self.loan.holds.store(true, Ordering::Release);
        self.machine.hold_output();
    }

    /// Takes an increment in. It is done whatever becomes of who asked for it.
    pub(super) fn advance(&self, words: &[u8], state: Vec<u8>) -> Result<(), String> {
        if lock(&self.gate).state() != GateState::Lent {
            return Err("the VM is not on loan".to_owned());
        }
        let staging = lock(&self.loan.staging);
        let Staging { memory: staging, ram } = staging.as_ref().ok_or("there is no memory for increments")?;
        let mut pages = PageBitmap::new(staging.spec().pages);
        if words.len() != pages.words().len() * 8 {
            return Err(format!("{} bytes do not name pages of this VM", words.len()));
        }
        for (index, word) in words.as_chunks::<8>().0.iter().enumerate() {
            pages.or_word(index, u64::from_le_bytes(*word));
        }
        for run in pages.runs(1 << 16) {
            let mut at = run.first.0;
            for data in staging.data_within(run) {
                if at < data.first.0 {
                    ram.zero(PageRun::new(at, (data.first.0 - at) as u32));
                }
                ram.copy_from(staging, data);
                at = data.end();
            }
            if at < run.end() {
                ram.zero(PageRun::new(at, (run.end() - at) as u32));
            }
            staging.zero(run);
        }
        *lock(&self.loan.state) = Some(state);
        Ok(())
    }

    /// Puts the state of the last increment in place, if there is one: memory is of it already.
    pub(super) fn go_on_from_increment(&self) -> Result<(), String> {
        let state = lock(&self.loan.state);
        let Some(state) = state.as_ref() else { return Ok(()) };
        self.machine.go_on_from(state).map_err(|error| chain(&error))
    }

    /// The VM is this host's for good, or again.
    pub(super) fn end_loan(&self) {
        self.loan.lease.give_up();
        *lock(&self.loan.stands) = false;
        *lock(&self.loan.state) = None;
        *lock(&self.loan.staging) = None;
        self.loan.holds.store(false, Ordering::Release);
        self.machine.end_holding();
        if let Err(error) = self.machine.log().stop() {
            tracing::error!("the dirty log could not be switched off: {error}");
        }
    }

    /// The VM is lent to this host until then, by `CLOCK_MONOTONIC`.
    pub(super) fn run_until(&self, until: Duration) -> Result<(), String> {
        let left = until.saturating_sub(monotonic_now());
        if left.is_zero() {
            return Err("the loan would be over already".to_owned());
        }
        let mut stands = lock(&self.loan.stands);
        lock(&self.gate).borrow().map_err(|error| chain(&error))?;
        let me = self.me.clone();
        let over = move || {
            if let Some(host) = me.upgrade() {
                host.lease_over();
            }
        };
        if let Err(error) = self.loan.lease.grant(left, over) {
            lock(&self.gate).lease_over();
            return Err(format!("nobody would see the end of the loan: {error}"));
        }
        if std::mem::take(&mut *stands) { self.start().map_err(|error| chain(&error)) } else { Ok(()) }
    }

    /// Somebody wanted it to run when the lease was over: it does so as soon as the VM is lent again.
    pub(super) fn run_when_lent(&self) {
        let mut stands = lock(&self.loan.stands);
        *stands |= lock(&self.gate).state() == GateState::Borrowed;
    }

    /// Nobody has lent the VM for longer: it must not run here.
    fn lease_over(&self) {
        let mut stands = lock(&self.loan.stands);
        let ran = self.machine.is_running();
        if !lock(&self.gate).lease_over() {
            return;
        }
        tracing::warn!("the loan of the VM is over: it stands");
        *stands = ran;
        self.machine.order_stand();
        if let Err(error) = self.machine.pause() {
            tracing::error!("a machine whose loan is over: {}", chain(&error));
        }
    }

    /// A VM that was lent is about to be let go of: it does not run any more.
    pub(super) fn stand_for_good(&self) {
        if lock(&self.gate).state() == GateState::Borrowed {
            self.loan.lease.give_up();
            lock(&self.gate).lease_over();
            self.machine.order_stand();
            // What a vCPU waits for may never come. It reads zeros then, and executes nothing behind that.
            if let Some(Err(error)) = lock(&self.faults).as_ref().map(|faults| faults.end()) {
                tracing::warn!("whoever waits for memory: {error}");
            }
            if let Err(error) = self.machine.pause() {
                tracing::error!("a machine that is let go of: {}", chain(&error));
            }
        }
    }
}
