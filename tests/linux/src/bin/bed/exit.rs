//! The machine's end with a number, by QEMU's `isa-debug-exit`.
//!
//! By `ioperm` and `out`: cloud kernels have no `/dev/port`.

use anyhow::{Result, bail};
use dunlin_linux::protocol::EXIT_PORT;

/// Ends the machine; QEMU exits with twice `code`, plus one.
///
/// # Errors
/// The port could not be had, or nothing listens there.
pub(crate) fn end(code: u8) -> Result<()> {
    // SAFETY: asks for one I/O port for this thread; touches no memory.
    if unsafe { libc::ioperm(EXIT_PORT.into(), 1, 1) } != 0 {
        bail!("ioperm: {}", std::io::Error::last_os_error());
    }
    // SAFETY: the port was granted above; QEMU's device behind it ends the machine, nothing else listens there.
    unsafe { std::arch::asm!("out dx, al", in("dx") EXIT_PORT, in("al") code, options(nomem, nostack)) };
    bail!("nothing listens at port {EXIT_PORT:#x}")
}
