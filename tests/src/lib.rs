//! Support for the integration suites: network namespaces, a small LAN made of them, and clients that measure from
//! outside what a migration costs.
//!
//! Everything here cleans up after itself, also on panic; what a killed test left behind is swept by the next one.

pub mod agent;
pub mod bare;
pub mod binary;
pub mod bpf;
pub mod capture;
pub mod client;
pub mod disk;
pub mod foreign;
pub mod guest;
pub mod hosted;
pub mod hugepages;
pub mod interrupt;
pub mod linux;
pub mod monitor;
pub mod moving;
pub mod netns;
pub mod process;
pub mod proxy;
pub mod raw;
pub mod rig;
pub mod scene;
pub mod serial;
pub mod stats;
pub mod tap;
pub mod topology;
pub mod wait;
pub mod wan;
pub mod wire;

pub use binary::dunlin;
pub use netns::Netns;
pub use process::OwnProcess;
pub use rig::{Hop, HopOptions, Rig, VmSpec};
pub use topology::{Host, Lan, LanConfig};
