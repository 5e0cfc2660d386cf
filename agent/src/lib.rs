//! Dunlin: watches how virtual machines write memory, stuns the writers that would keep a migration from
//! converging, moves a running VM live to another host, and announces its new place.
//!
//! The crate is a house of floors; a module imports what stands below it and never what stands above:
//!
//! | floor | modules | what lives there |
//! |---|---|---|
//! | faces | [`cli`], [`tui`] | arguments and keys in, human or JSON out |
//! | service | [`service`] | the composition root: machine host, migration managers, observer |
//! | policy | [`migrate`], [`announce`], [`tunnel`], [`stun`], [`track`], [`predict`] | the subject itself, generic over ports |
//! | mechanism | [`kvm`], [`block`], [`net`], [`cgroup`], [`link`], [`shm`], [`probe`], [`btf`], [`trial`], [`foreign`], [`guest_os`], [`store`], [`draw`], `time` | one kernel interface each, thin |
//! | ports | [`port`] | the traits that join policy to mechanism |
//! | words | [`model`] | newtypes with units, neutral names |
//!
//! Policy and mechanism never import one another: both know only words and ports.

// Both panic when their reader has gone: see `service::out`.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod announce;
pub mod block;
pub mod btf;
pub mod cgroup;
pub mod cli;
pub mod draw;
mod elf;
pub mod foreign;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
pub mod guest_os;
pub mod kvm;
pub mod link;
pub mod migrate;
pub mod model;
pub mod net;
pub mod port;
pub mod predict;
pub mod probe;
pub mod service;
pub mod shm;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub mod store;
pub mod stun;
mod time;
pub mod track;
pub mod trial;
pub mod tui;
pub mod tunnel;
