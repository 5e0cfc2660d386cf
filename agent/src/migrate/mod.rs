//! Moving a running VM: strategies, the six-stage state machine, the wire protocol, convergence.
//!
//! Policy: generic over [`crate::port`], so a whole migration runs in a test with no KVM, no root and no network.
