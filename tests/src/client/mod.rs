//! Clients that measure from outside what a migration costs: TCP connections, pings, counters, heartbeats.
//!
//! They speak the test guest's services but know nothing of VMs or migration. Sockets and threads stay in the network
//! namespace in which a client is made: make it inside [`crate::Netns::enter`].

pub mod bulk;
pub mod echo;
pub mod gap;
pub mod heartbeat;
pub mod http;
pub mod ping;

pub use bulk::{BulkClient, BulkReport};
pub use echo::{EchoClient, EchoReport};
pub use gap::{Gap, GapMeter, Split, monotonic_ns};
pub use heartbeat::{HeartbeatReport, Heartbeats};
pub use http::{counters, http_get};
pub use ping::{PingReport, Pinger};
