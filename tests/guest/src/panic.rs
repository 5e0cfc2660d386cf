//! Owns the end of the program by mistake: Rust panics and CPU exceptions become one `PANIC` line on the serial port.

use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::{io, serial};

/// Set by the first panic; all tasks then stop, so that no heartbeat hides it.
pub static PANICKED: AtomicBool = AtomicBool::new(false);

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    match info.location() {
        Some(place) => serial::line(format_args!("PANIC {} at {}:{}", info.message(), place.file(), place.line())),
        None => serial::line(format_args!("PANIC {}", info.message())),
    }
    stop()
}

/// Where the CPL 0 exception handler sends a task that faulted.
#[unsafe(no_mangle)]
extern "sysv64" fn exception_report(vector: u64, error: u64, rip: u64, cr2: u64, rsp: u64, cr3: u64) -> ! {
    serial::line(format_args!(
        "PANIC exception={vector} error={error:#x} rip={rip:#x} cr2={cr2:#x} rsp={rsp:#x} cr3={cr3:#x}"
    ));
    stop()
}

fn stop() -> ! {
    PANICKED.store(true, Relaxed);
    io::out8(0xf4, 0x11); // QEMU isa-debug-exit: status 35
    crate::cpu::halt_for_ever()
}
