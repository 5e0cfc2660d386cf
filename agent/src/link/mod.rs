//! The link between two migration managers: framing, TCP and TLS. Must not know what a message means.
//!
//! Data plane: plain threads and blocking, vectored I/O from and into guest memory, no copy in between but for short
//! runs, which are gathered into one write, and for what is encrypted.

mod secure;
mod stream;
mod tcp;
#[cfg(test)]
mod testing;
mod tls;
pub mod wire;

pub use tcp::{Address, AddressError, Arrival, Listener, TcpControl, TcpSource, TcpTarget};
pub use tls::{Tls, TlsError, TlsFiles};
