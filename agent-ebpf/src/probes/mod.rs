//! One file a kernel subsystem's events. Each program reads its arguments, and counts through [`crate::tracked`].

mod exit;
mod log;
mod page_table;
mod peek;
