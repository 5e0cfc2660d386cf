//! The link between two migration managers: framing and TCP. Must not know what a message means.
