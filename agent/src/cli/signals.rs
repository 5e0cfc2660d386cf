//! Ctrl-C and SIGTERM as a cancel flag.

use signal_hook::consts::{SIGINT, SIGTERM};

use crate::migrate::CancelFlag;

/// A flag that SIGINT and SIGTERM set. A second one ends the process at once.
pub(super) fn cancel_on_signals() -> std::io::Result<CancelFlag> {
    let cancel = CancelFlag::default();
    for signal in [SIGINT, SIGTERM] {
        // Registered first, so that it sees the flag as the first signal leaves it.
        signal_hook::flag::register_conditional_shutdown(signal, 130, cancel.as_atomic())?;
        signal_hook::flag::register(signal, cancel.as_atomic())?;
    }
    Ok(cancel)
}
