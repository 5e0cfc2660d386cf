//! Tests that a run leaves out, and why: the runners count them, but do not print the reason.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Where tests are.
const FOLDERS: [&str; 4] = ["agent/src", "tests/src", "tests/tests", "xtask/src"];
const MARK: &str = "#[ignore = \"";

/// A test that runs only when it is asked for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ignored {
    file: PathBuf,
    name: String,
    reason: String,
}

/// How the reason of a test ends that `cargo xtask test-vm` runs.
const IN_VM: [&str; 2] = ["`cargo xtask test-vm` runs it", "`cargo xtask test-vm --self-test` runs it"];

impl Ignored {
    /// Whether the test machine runs it.
    pub(crate) fn runs_in_vm(&self) -> bool {
        IN_VM.iter().any(|end| self.reason.ends_with(end))
    }
}

impl fmt::Display for Ignored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "left out unless asked for: {} ({}): {}", self.name, self.file.display(), self.reason)
    }
}

/// All of them in the checkout at `root`, in the order of their files' names.
pub(crate) fn list(root: &Path) -> Result<Vec<Ignored>> {
    let mut found = Vec::new();
    for folder in FOLDERS {
        walk(root, &root.join(folder), &mut found)?;
    }
    Ok(found)
}

fn walk(root: &Path, folder: &Path, found: &mut Vec<Ignored>) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("listing {}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            walk(root, &path, found)?;
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            let file = path.strip_prefix(root).unwrap_or(&path);
            found.extend(in_text(&text).map(|(name, reason)| Ignored { file: file.to_owned(), name, reason }));
        }
    }
    Ok(())
}

/// Name and reason of each ignored test of a source file.
fn in_text(text: &str) -> impl Iterator<Item = (String, String)> {
    text.split('\n').enumerate().filter_map(move |(number, line)| {
        let reason = line.trim().strip_prefix(MARK)?.strip_suffix("\"]")?;
        let below = text.split('\n').skip(number + 1);
        let name = below.map(str::trim).find_map(|line| line.split_once("fn ")?.1.split('(').next())?;
        Some((name.to_owned(), reason.to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ignored_test_is_found_with_its_reason() {
        let text = format!(
            "#[test]\n    {MARK}a measurement\"]\n    #[other]\n    fn long() {{}}\n#[test]\nfn short() {{}}\n"
        );
        let found: Vec<_> = in_text(&text).collect();
        assert_eq!(found, [("long".to_owned(), "a measurement".to_owned())]);
    }

    #[test]
    fn the_workspace_is_read() {
        list(crate::workspace::root()).unwrap();
    }
}
