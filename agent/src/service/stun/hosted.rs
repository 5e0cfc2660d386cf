//! Slowing a VM that dunlin runs: its own process counts and holds.

use std::path::PathBuf;

use super::{Actuator, Goal, StunError, StunRequest};
use crate::model::id::VmRefError;
use crate::model::{VcpuLimit, VmWrites};
use crate::service::control::{ControlError, throttle};
use crate::service::inventory::HostVm;
use crate::service::registry::Registry;

/// The control socket of its process.
pub(super) struct Hosted {
    socket: PathBuf,
    limits: Vec<Option<VcpuLimit>>,
}

impl Hosted {
    pub(super) fn open(request: &StunRequest, vm: &HostVm) -> Result<Self, StunError> {
        if matches!(request.goal, Goal::FollowMigration { .. }) {
            return Err(StunError::Goal(format!(
                "`{}` is a VM that dunlin runs: its migration slows writers itself, with `dunlin migrate --on-stuck stun`",
                vm.name
            )));
        }
        let name = vm.name.parse().map_err(|error: VmRefError| StunError::Goal(error.to_string()))?;
        Ok(Self { socket: Registry::new(&request.run_dir).socket(&name, "control"), limits: Vec::new() })
    }
}

impl Actuator for Hosted {
    fn by(&self) -> &'static str {
        "throttle"
    }

    fn look(&mut self) -> Result<Option<VmWrites>, StunError> {
        match throttle(&self.socket, Some(&self.limits)) {
            Ok(writes) => Ok(Some(writes)),
            // Nobody listens any more.
            Err(ControlError::Exchange { .. }) if !self.socket.exists() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn is_moved(&self) -> bool {
        false
    }

    fn limit(&mut self, limits: &[Option<VcpuLimit>]) -> Result<(), StunError> {
        if self.limits != limits {
            self.limits = limits.to_vec();
            self.look()?;
        }
        Ok(())
    }

    fn let_go(&mut self) -> Result<(), StunError> {
        Ok(throttle(&self.socket, None).map(drop)?)
    }
}
