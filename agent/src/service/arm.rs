//! Write protection of a hosted VM for tracking, asked for over its control socket.

use std::path::PathBuf;
use std::time::Duration;

use super::control::give_order_within;
use crate::model::PageSubset;
use crate::port::{Arm, ArmError, Protected};

/// Protecting the largest VM takes less.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// The dirty log of one hosted VM: switching it on, also when it is on, write-protects every page.
#[derive(Debug)]
pub struct ControlSocketArm {
    socket: PathBuf,
}

impl ControlSocketArm {
    /// Nothing is sent before [`Arm::arm`].
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    fn order(&self, words: &str, action: &'static str) -> Result<Protected, ArmError> {
        let failed = |reason| ArmError { action, reason };
        let answer = give_order_within(&self.socket, &format!("/v1/dirty-log?{words}"), ANSWER_LIMIT)
            .map_err(|error| failed(error.to_string()))?;
        serde_json::from_slice(&answer).map_err(|error| failed(format!("its answer is not understood: {error}")))
    }
}

impl Arm for ControlSocketArm {
    fn arm(&mut self) -> Result<(), ArmError> {
        self.order("on=true", "on").map(drop)
    }

    fn arm_at(&mut self, subset: PageSubset, at_ns: u64) -> Result<Option<Protected>, ArmError> {
        self.order(&format!("on=true&subset={}&at_ns={at_ns}", subset.raw()), "on").map(Some)
    }

    fn rearm(&mut self) -> Result<(), ArmError> {
        self.order("on=true", "again").map(drop)
    }

    fn disarm(&mut self) -> Result<(), ArmError> {
        self.order("on=false", "off").map(drop)
    }
}
