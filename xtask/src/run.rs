//! Running other programs.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Runs a command with our own output; an error unless it succeeds.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("{} could not be started", words(command)))?;
    if !status.success() {
        bail!("{} failed ({status})", words(command));
    }
    Ok(())
}

/// Runs a command and returns its standard output, trimmed; none if it fails in any way.
pub(crate) fn output(program: impl AsRef<OsStr>, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Runs a command whose lines of output are passed on and also shown to `watch`. Returns whether it succeeded.
pub(crate) fn watched(command: &mut Command, mut watch: impl FnMut(&str) + Send) -> Result<bool> {
    let text = words(command);
    let (reader, writer) = std::io::pipe().context("a pipe could not be made")?;
    let mut child = command
        .stdout(writer.try_clone().context("a pipe could not be shared")?)
        .stderr(writer)
        .spawn()
        .with_context(|| format!("{text} could not be started"))?;
    // The command keeps the ends for writing until it is replaced; reading ends only when all are closed.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    for line in BufReader::new(reader).split(b'\n') {
        let line = line.with_context(|| format!("the output of {text} could not be read"))?;
        let line = String::from_utf8_lossy(&line);
        let _ = writeln!(std::io::stdout(), "{line}");
        watch(&line);
    }
    Ok(child.wait().with_context(|| format!("{text} could not be waited for"))?.success())
}

/// The path of a program: in `PATH`, or where Cargo installs.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| {
        let home = std::env::var_os("HOME")?;
        Some(PathBuf::from(home).join(".cargo"))
    });
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(home.map(|home| home.join("bin")))
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}

/// The command as a person would type it.
pub(crate) fn words(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    format!("`{}`", words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" "))
}
