//! Network interfaces of the host: taps, raw frames on named interfaces, forwarding tables over rtnetlink.
//!
//! Thin: one kernel interface a file. Must not know what a frame means or when it is sent.

pub mod tap;
