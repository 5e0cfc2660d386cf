//! The service floor and composition root: joins policy and mechanism; machine host, migration managers, audit.

pub mod announce;
pub mod clock;
