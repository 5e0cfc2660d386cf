//! What two programs share that are process 1 of a Linux: `dunlin-bed`, which runs test suites on a distribution's kernel, and
//! `dunlin-linux-guest`, which does work in a VM that is moved.
//!
//! Owns the words that the bed and `cargo xtask test-vm` speak with one another, and the first steps of a system: mounts,
//! modules, the end. Must not know Dunlin.

pub mod arguments;
pub mod protocol;
pub mod system;
