//! Who write-protects a VM's pages, and that nobody does when it is over.

use super::{ProfileError, ProfileRequest};
use crate::foreign::{Permission, SoftDirty};
use crate::model::{PageSubset, RamSlot};
use crate::port::{Arm, ArmError, Clock, Protected};
use crate::probe::KernelCounters;
use crate::service::audit;
use crate::service::clock::MonotonicClock;
use crate::service::inventory::HostVm;
use crate::track::Regime;

/// Who protects.
pub(super) enum Protector {
    /// The VM's own dirty log, switched on by us.
    Log(Box<dyn Arm>),
    /// Soft-dirty marks.
    Marks(SoftDirty),
    /// Someone else's dirty log.
    Others,
}

/// The slots that the guest can write.
pub(in crate::service) fn ram_slots(vm: &HostVm) -> Vec<RamSlot> {
    let slots = vm.slots.iter().filter(|slot| !slot.read_only);
    slots
        .map(|slot| RamSlot { start: slot.range.start, bytes: slot.range.bytes, host_address: slot.host_address })
        .collect()
}

impl Protector {
    /// Soft-dirty marks, with the operator's permission; recorded.
    pub(super) fn soft_dirty(request: &ProfileRequest, vm: &HostVm) -> Result<Self, ProfileError> {
        let by = if request.allowed.soft_dirty { "--allow-soft-dirty" } else { "[track] soft_dirty" };
        let marks = SoftDirty::of(&vm.process, &ram_slots(vm), Permission::granted(by));
        let action = audit::Action {
            who: audit::me(),
            what: "write-protect by soft-dirty marks",
            vm_id: vm.vm_id,
            before: "unprotected".to_owned(),
            after: format!("{} windows of {} ms, allowed by {by}", request.windows, request.window.as_millis()),
            result: marks.as_ref().map_or_else(ToString::to_string, |_| "ok".to_owned()),
        };
        audit::record(&request.state_dir, &action);
        Ok(Self::Marks(marks?))
    }

    pub(super) fn regime(&self) -> Regime {
        match self {
            Self::Log(_) => Regime::Armed,
            Self::Marks(_) => Regime::SoftDirty,
            Self::Others => Regime::Logged,
        }
    }
}

/// The protection of one window; gone on drop.
pub(super) struct Armed<'a> {
    pub(super) protector: &'a mut Protector,
    pub(super) counters: &'a mut KernelCounters,
}

impl Armed<'_> {
    /// Protects at the time that was ordered, or at once, and says when that was.
    pub(super) fn protect(&mut self, subset: PageSubset, at_ns: u64) -> Result<Protected, ArmError> {
        let now = || MonotonicClock.now().as_nanos() as u64;
        let began_ns = now();
        let did = match self.protector {
            Protector::Log(arm) => arm.arm_at(subset, at_ns)?,
            Protector::Marks(marks) => marks.arm().map(|()| None)?,
            Protector::Others => {
                Some(Protected { began_ns: at_ns, ended_ns: at_ns, subset: subset.raw(), was_on: true })
            }
        };
        Ok(did.unwrap_or_else(|| Protected { began_ns, ended_ns: now(), subset: PageSubset::ALL.raw(), was_on: false }))
    }
}

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        self.counters.disarm();
    }
}

/// Someone protects, or gets ready to; on drop nobody does any more, and the VM writes freely.
pub(super) struct Protecting<'a>(pub(super) &'a mut Protector);

impl Protecting<'_> {
    pub(super) fn let_go(&mut self) {
        let done = match self.0 {
            Protector::Log(arm) => arm.disarm(),
            Protector::Marks(marks) => marks.disarm(),
            Protector::Others => Ok(()),
        };
        if let Err(error) = done {
            // The VM ends the protection by itself when nobody asks again.
            tracing::warn!("{error}");
        }
    }
}

impl Drop for Protecting<'_> {
    fn drop(&mut self) {
        self.let_go();
    }
}
