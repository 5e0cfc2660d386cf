//! Where things are.

use std::path::{Path, PathBuf};

/// The workspace's folder.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// The object that `agent/build.rs` takes into the binary.
pub(crate) fn bpf_object() -> PathBuf {
    root().join("target/bpf/dunlin.bpf.o")
}

/// The target folder of the BPF build: its own, so that host builds do not wait for it.
pub(crate) fn bpf_build() -> PathBuf {
    root().join("target/bpf-build")
}
