//! Building the test guest, and putting it where the agent takes it into its binary.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run;
use crate::workspace::root;

/// Where `agent/build.rs` looks for it.
fn installed() -> PathBuf {
    root().join("target/guest/dunlin-guest.elf")
}

/// Builds the guest; writes the copy for the agent only if it differs, so that the agent is not built again for nothing.
pub(crate) fn run() -> Result<()> {
    let guest = root().join("tests/guest");
    run::run(Command::new("cargo").args(["build", "--release"]).current_dir(&guest))?;
    let built = guest.join("target/release/dunlin-guest");
    let bytes = fs::read(&built).with_context(|| format!("{} was not built", built.display()))?;
    if bytes.get(..4) != Some(b"\x7fELF") {
        bail!("{} is no ELF", built.display());
    }
    if fs::read(installed()).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let folder = installed().parent().map_or_else(|| root().to_owned(), Path::to_owned);
    fs::create_dir_all(&folder).with_context(|| format!("{} could not be made", folder.display()))?;
    // Beside the folder, which Cargo watches.
    let fresh = root().join("target/dunlin-guest.fresh");
    fs::write(&fresh, bytes).with_context(|| format!("{} could not be written", fresh.display()))?;
    fs::rename(&fresh, installed()).with_context(|| format!("{} could not be replaced", installed().display()))
}
