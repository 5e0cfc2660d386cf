//! Write protection of a hosted VM for tracking, asked for over its control socket.

use std::path::PathBuf;
use std::time::Duration;

use super::control::give_order_within;
use crate::port::{Arm, ArmError};

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

    fn order(&self, on: bool, action: &'static str) -> Result<(), ArmError> {
        give_order_within(&self.socket, &format!("/v1/dirty-log?on={on}"), ANSWER_LIMIT)
            .map_err(|error| ArmError { action, reason: error.to_string() })
    }
}

impl Arm for ControlSocketArm {
    fn arm(&mut self) -> Result<(), ArmError> {
        self.order(true, "on")
    }

    fn rearm(&mut self) -> Result<(), ArmError> {
        self.order(true, "again")
    }

    fn disarm(&mut self) -> Result<(), ArmError> {
        self.order(false, "off")
    }
}
