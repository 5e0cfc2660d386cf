//! Where the `dunlin` under test is.

use std::path::PathBuf;
use std::process::Command;

/// A command of the binary of the same build as the running test (`target/PROFILE/dunlin`), or of `DUNLIN_BIN`.
///
/// # Panics
/// If it has not been built.
pub fn dunlin() -> Command {
    let path = std::env::var_os("DUNLIN_BIN").map_or_else(
        || {
            let test = std::env::current_exe().expect("the running test has a path");
            // target/PROFILE/deps/TEST-HASH
            test.ancestors().nth(2).map(|profile| profile.join("dunlin")).unwrap_or_default()
        },
        PathBuf::from,
    );
    assert!(path.is_file(), "{} is missing: run `cargo build --package dunlin` first", path.display());
    Command::new(path)
}
