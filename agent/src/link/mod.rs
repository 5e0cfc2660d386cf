//! The link between two migration managers: framing and TCP. Must not know what a message means.
//!
//! Data plane: plain threads and blocking, vectored I/O from and into guest memory, no copy in between but for short
//! runs, which are gathered into one write.

mod tcp;
pub mod wire;

pub use tcp::{Address, AddressError, Arrival, Listener, TcpControl, TcpSource, TcpTarget};
