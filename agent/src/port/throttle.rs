//! A throttle on the vCPUs of one VM.

use std::time::Duration;

use super::machine::MachineError;
use crate::model::{VcpuLimit, VmWrites};

/// Limits hold so long unless they are given again: whoever gave them may have been killed or stopped.
pub const THROTTLE_LEASE: Duration = Duration::from_secs(1);

/// Slows vCPUs down by what they write.
pub trait Throttle: Send {
    /// Limits each vCPU from now on, or lets it go (`None`), for [`THROTTLE_LEASE`]; vCPUs beyond the list are let go. An empty list lets all go, and still
    /// counts. Says what they have written so far.
    ///
    /// # Errors
    /// The machine refuses, or is gone; then nobody is held any more.
    fn throttle(&mut self, limits: &[Option<VcpuLimit>]) -> Result<VmWrites, MachineError>;
}
