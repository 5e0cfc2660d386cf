//! The first files of a Linux: an archive in the form that the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::io::Write;

use anyhow::{Context, Result};
use cpio::newc;

use super::modules::Selection;

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;

/// An archive that grows.
#[derive(Debug, Default)]
pub(crate) struct Initramfs {
    bytes: Vec<u8>,
    entries: u32,
}

impl Initramfs {
    /// An archive with `init` as process 1, `modules` in the folder `folder` (an absolute path) with their order in a file `order`.
    pub(crate) fn new(init: &[u8], modules: &Selection, folder: &str) -> Result<Self> {
        let mut archive = Self::default();
        archive.add("/init", PROGRAM, init)?;
        // The kernel opens it as standard output of process 1 before anything is mounted.
        archive.add("/dev", FOLDER, &[])?;
        archive.add(folder, FOLDER, &[])?;
        let mut order = String::new();
        for (name, bytes) in &modules.modules {
            archive.file(&format!("{folder}/{name}.ko"), bytes)?;
            order += &format!("{name}\n");
        }
        archive.file(&format!("{folder}/order"), order.as_bytes())?;
        Ok(archive)
    }

    /// Adds a file at an absolute path whose folder is there.
    pub(crate) fn file(&mut self, path: &str, bytes: &[u8]) -> Result<()> {
        self.add(path, FILE, bytes)
    }

    fn add(&mut self, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        self.entries += 1;
        let length = u32::try_from(bytes.len()).with_context(|| format!("{path} is too large"))?;
        let entry = newc::Builder::new(path.trim_start_matches('/')).ino(self.entries).mode(mode).nlink(1);
        let mut writer = entry.write(&mut self.bytes, length);
        writer.write_all(bytes)?;
        writer.finish()?;
        Ok(())
    }

    /// The whole of it.
    pub(crate) fn finish(self) -> Result<Vec<u8>> {
        Ok(newc::trailer(self.bytes)?)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn what_is_put_in_comes_out() {
        let modules = Selection { modules: vec![("a".into(), vec![1, 2, 3])], missing: Vec::new() };
        let mut archive = Initramfs::new(b"#!", &modules, "/modules").unwrap();
        archive.file("/job", b"{}").unwrap();
        let bytes = archive.finish().unwrap();
        let mut rest = &bytes[..];
        let mut found = Vec::new();
        loop {
            let mut reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
            let mut content = Vec::new();
            reader.read_to_end(&mut content).unwrap();
            found.push((name, mode, content));
            rest = reader.finish().unwrap();
        }
        let names: Vec<_> = found.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(names, ["init", "dev", "modules", "modules/a.ko", "modules/order", "job"]);
        assert_eq!((found[0].1, &found[3].2[..], &found[4].2[..]), (PROGRAM, &[1, 2, 3][..], &b"a\n"[..]));
    }
}
