//! Pure parts of the Dunlin test guest: everything that needs no privileged instruction, no device and no page table.
//! The bare-metal binary (`src/main.rs`) uses them as they are; here they also compile with `std` and carry unit tests.
#![cfg_attr(not(test), no_std)]

pub mod block;
pub mod cmdline;
pub mod hold;
pub mod http;
pub mod ledger;
pub mod memory;
pub mod page;
pub mod pool;
pub mod text;
pub mod units;
pub mod window;
pub mod workload;
