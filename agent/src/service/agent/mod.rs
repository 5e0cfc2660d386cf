//! The agent: watches the fleet for as long as it runs, and tells whoever asks. Acts on no VM, but for windows of write protection on hosted
//! ones when asked.
//!
//! Owns how fleet, metrics and sockets are joined, their beginning and their end.

mod http;
pub mod metrics;
#[cfg(test)]
mod metrics_tests;
mod notify;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub use http::ServeError;
use serde::Serialize;

use super::fleet::{Fleet, FleetError, FleetOptions};
use super::interrupt::Interrupt;
use crate::model::schema::Schema;

/// How often it is looked whether the fleet's thread still lives.
const PULSE: Duration = Duration::from_secs(1);
/// The socket's name below the run folder.
pub const SOCKET: &str = "observe.sock";

/// What to do.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// What to watch.
    pub fleet: FleetOptions,
    /// Where metrics are served; none: nowhere.
    pub listen: Option<SocketAddr>,
    /// Whether each vCPU has metrics of its own.
    pub vcpu_metrics: bool,
}

/// An agent that is ready.
#[derive(Clone, Debug, Serialize)]
pub struct AgentReady {
    /// Its process.
    pub pid: u32,
    /// Where metrics are served, with the port that the kernel chose; absent where they are not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<String>,
    /// Where the fleet's objects are.
    pub socket: PathBuf,
    /// The time between two looks.
    pub interval_ns: u64,
}

impl Schema for AgentReady {
    const SCHEMA: &'static str = "dunlin.agent/v1";
}

/// Why the agent does not run, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The fleet.
    #[error(transparent)]
    Fleet(#[from] FleetError),
    /// What it serves.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// Its thread ended.
    #[error("the fleet's thread has failed; its last words are above")]
    Failed,
}

/// Runs until a signal comes. `ready` is told once everything is served.
///
/// # Errors
/// Rights, addresses or a socket that cannot be had; says what to do.
pub fn run(options: AgentOptions, interrupt: &Interrupt, ready: impl FnOnce(&AgentReady)) -> Result<(), AgentError> {
    let AgentOptions { fleet, listen, vcpu_metrics } = options;
    let socket = fleet.run_dir.join(SOCKET);
    let interval = fleet.interval;
    let fleet = Fleet::start(fleet)?;
    let served = http::serve(&fleet.reader(), listen, &socket, vcpu_metrics)?;
    ready(&AgentReady {
        pid: std::process::id(),
        metrics: served.metrics.map(|address| format!("http://{address}/metrics")),
        socket: served.socket.clone(),
        interval_ns: interval.as_nanos() as u64,
    });
    notify::tell("READY=1");
    let ended = loop {
        if interrupt.wait_until(Instant::now() + PULSE) {
            break Ok(());
        }
        if !fleet.is_alive() {
            break Err(AgentError::Failed);
        }
    };
    notify::tell("STOPPING=1");
    drop(served);
    fleet.stop();
    ended
}
