//! Diagnostics of the BPF programs themselves (aya-log), printed to standard error. Off by default.

use std::io::Write;

use ::log::{Log, Metadata, Record};
use aya::Ebpf;
use aya_log::EbpfLogger;

/// Prints what the programs say.
#[derive(Debug)]
pub(super) struct ToStderr;

impl Log for ToStderr {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let _reader_is_gone =
            writeln!(std::io::stderr(), "probe {}: {}", record.level().as_str().to_lowercase(), record.args());
    }

    fn flush(&self) {}
}

/// The programs' log ring.
pub(super) struct ProbeLog(EbpfLogger<ToStderr>);

impl std::fmt::Debug for ProbeLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ProbeLog")
    }
}

impl ProbeLog {
    /// Takes the log ring out of a loaded object.
    pub(super) fn open(bpf: &mut Ebpf) -> Result<Self, aya_log::Error> {
        EbpfLogger::init_with_logger(bpf, ToStderr).map(Self)
    }

    /// Prints what has come in.
    pub(super) fn print(&mut self) {
        self.0.flush();
    }
}
