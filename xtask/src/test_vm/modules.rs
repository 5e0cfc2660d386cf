//! Kernel modules: which are needed for the ones that are wanted, in what order, and their bytes.
//!
//! A module names what it needs in its `.modinfo` section (`depends=`, include/linux/module.h); packages bring no `modules.dep`, which
//! the installation would make.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The modules of one kernel.
#[derive(Debug)]
pub(crate) struct Modules {
    files: BTreeMap<String, PathBuf>,
    built_in: Vec<String>,
}

/// Modules to load, in order, with their uncompressed bytes.
#[derive(Debug, Default)]
pub(crate) struct Selection {
    /// Each behind those that it needs.
    pub(crate) modules: Vec<(String, Vec<u8>)>,
    /// Wanted, and neither there nor built in.
    pub(crate) missing: Vec<String>,
}

/// File names write a dash where the kernel writes an underscore.
fn kernel_name(name: &str) -> String {
    name.replace('-', "_")
}

impl Modules {
    /// Lists the modules in `lib/modules/VERSION`.
    pub(crate) fn of(folder: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        let mut folders = vec![folder.join("kernel")];
        while let Some(next) = folders.pop() {
            for entry in fs::read_dir(&next).with_context(|| format!("list {}", next.display()))?.flatten() {
                let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
                if path.is_dir() {
                    folders.push(path);
                } else if let Some((name, _)) = name.split_once(".ko") {
                    files.insert(kernel_name(name), path);
                }
            }
        }
        let text = fs::read_to_string(folder.join("modules.builtin")).unwrap_or_default();
        let built_in =
            text.lines().filter_map(|line| Some(kernel_name(line.rsplit('/').next()?.strip_suffix(".ko")?))).collect();
        Ok(Self { files, built_in })
    }

    /// What must be loaded for `wanted`.
    pub(crate) fn select(&self, wanted: &[&str]) -> Result<Selection> {
        let mut selection = Selection::default();
        for name in wanted {
            self.add(&kernel_name(name), &mut selection, 0)?;
        }
        Ok(selection)
    }

    fn add(&self, name: &str, selection: &mut Selection, depth: u32) -> Result<()> {
        if depth > 32 {
            bail!("modules need one another in a circle: {name}");
        }
        if selection.modules.iter().any(|(own, _)| own == name) || self.built_in.iter().any(|own| own == name) {
            return Ok(());
        }
        let Some(file) = self.files.get(name) else {
            selection.missing.push(name.to_owned());
            return Ok(());
        };
        let bytes = uncompressed(file)?;
        for needed in depends(&bytes) {
            self.add(&kernel_name(&needed), selection, depth + 1)?;
        }
        selection.modules.push((name.to_owned(), bytes));
        Ok(())
    }
}

/// The names behind `depends=` in a module.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    // The section's first string has no zero before it, but `depends` is never the first.
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let text = module[at + KEY.len()..].split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// A file's bytes, by the ending of its name.
fn uncompressed(file: &Path) -> Result<Vec<u8>> {
    let program = match file.extension().and_then(|ending| ending.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(file).with_context(|| format!("read {}", file.display())),
    };
    let output = Command::new(program).arg("-dc").arg(file).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("{program} could not be started: install it"))?;
    if !output.status.success() {
        bail!("{program} -dc {}: {}", file.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(depends: &str) -> Vec<u8> {
        format!("\x7fELF...\0license=GPL\0depends={depends}\0retpoline=Y\0").into_bytes()
    }

    #[test]
    fn what_is_needed_comes_first_and_what_is_missing_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let kernel = folder.path().join("kernel/drivers");
        fs::create_dir_all(&kernel).unwrap();
        for (name, needs) in [("top", "mid-dle,base"), ("mid-dle", "base,inside"), ("base", ""), ("other", "gone")] {
            fs::write(kernel.join(format!("{name}.ko")), module(needs)).unwrap();
        }
        fs::write(folder.path().join("modules.builtin"), "kernel/fs/inside.ko\n").unwrap();
        let modules = Modules::of(folder.path()).unwrap();
        let names = |wanted: &[&str]| {
            let selection = modules.select(wanted).unwrap();
            let names: Vec<_> = selection.modules.into_iter().map(|(name, _)| name).collect();
            (names.join(" "), selection.missing.join(" "))
        };
        assert_eq!(names(&["top", "base", "inside"]), ("base mid_dle top".into(), String::new()));
        assert_eq!(names(&["nonesuch", "other"]), ("other".into(), "nonesuch gone".into()));
        fs::write(kernel.join("base.ko"), module("top")).unwrap();
        assert!(modules.select(&["top"]).unwrap_err().to_string().contains("circle"));
    }

    #[test]
    fn damaged_files_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x.ko.gz");
        fs::write(&file, "no gzip").unwrap();
        assert!(uncompressed(&file).is_err());
        assert!(depends(b"\0depends=").is_empty() && depends(b"").is_empty());
    }
}
