//! Distribution kernels: which ones are pinned, where to get them, and what is in a package.
//!
//! Owns `target/test-vm/packages` and `target/test-vm/kernels`. Nothing is installed: a package is downloaded, compared with the pinned
//! checksum and unpacked. What is cached is used with no network.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::run;
use crate::workspace::root;

/// A kernel that is known by name.
#[derive(Debug)]
pub(crate) struct Pin {
    /// How it is asked for.
    pub(crate) name: &'static str,
    /// Debian's package.
    package: &'static str,
    /// The package's version.
    version: &'static str,
    /// Of the package file.
    sha256: &'static str,
}

/// The first is what `cargo xtask test` boots.
pub(crate) const PINS: [Pin; 2] = [
    Pin {
        name: "6.12",
        package: "linux-image-6.12.117+deb12-cloud-amd64",
        version: "6.12.117-1~deb12u1",
        sha256: "5195b288dec79e2981d6b84457f38b7ce7310a2d702930ec7d07209c7f78ce37",
    },
    Pin {
        name: "6.1",
        package: "linux-image-6.1.0-56-cloud-amd64",
        version: "6.1.192-2",
        sha256: "e7d02b943971edcb8790e256c02cfab3bca6c3d37c1bf25392a57c71300615ee",
    },
];

/// A kernel and its modules, on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// How it was asked for; used for files' names.
    pub(crate) label: String,
    /// The bzImage, or vmlinux.
    pub(crate) image: PathBuf,
    /// `lib/modules/VERSION`.
    pub(crate) modules: PathBuf,
}

/// Where everything of the test machine is kept.
pub(crate) fn cache() -> PathBuf {
    root().join("target/test-vm")
}

/// The kernel that `word` means: a pinned one's name, a `.deb`, a folder with `boot` and `lib/modules`, or an image whose name ends in its
/// version.
pub(crate) fn find(word: &str) -> Result<Kernel> {
    if let Some(pin) = PINS.iter().find(|pin| pin.name == word) {
        return pinned(pin);
    }
    let path = Path::new(word);
    let names = PINS.map(|pin| pin.name).join(" or ");
    ensure!(
        path.exists(),
        "no kernel {word}: give {names}, or the path of a package, an unpacked package, or an image"
    );
    let path = fs::canonicalize(path)?;
    if path.is_dir() {
        return in_folder(&path, word);
    }
    if path.extension().is_some_and(|ending| ending == "deb") {
        let sum = sha256(&path)?;
        let folder = unpack(&path, &sum)?;
        return in_folder(&folder, word);
    }
    by_image(&path, word)
}

fn label_of(word: &str) -> String {
    let name = Path::new(word).file_name().unwrap_or_default().to_string_lossy().into_owned();
    name.chars().map(|c| if c.is_ascii_alphanumeric() || ".-+".contains(c) { c } else { '-' }).collect()
}

/// The package of a pin, from the cache or the distribution.
fn pinned(pin: &Pin) -> Result<Kernel> {
    let folder = cache().join("kernels").join(pin.sha256);
    if folder.is_dir() {
        return in_folder(&folder, pin.name);
    }
    let packages = cache().join("packages");
    fs::create_dir_all(&packages)?;
    let package = match cached(&packages, pin)? {
        Some(package) => package,
        None => download(&packages, pin)?,
    };
    in_folder(&unpack(&package, pin.sha256)?, pin.name)
}

/// The package file whose checksum is right, if it is there. One whose is not is half of a download: it goes.
fn cached(packages: &Path, pin: &Pin) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(packages)?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(&format!("{}_", pin.package)) {
            if sha256(&entry.path())? == pin.sha256 {
                return Ok(Some(entry.path()));
            }
            eprintln!("{} is damaged or another version: fetching it again", entry.path().display());
            fs::remove_file(entry.path())?;
        }
    }
    Ok(None)
}

fn download(packages: &Path, pin: &Pin) -> Result<PathBuf> {
    ensure!(
        run::find("apt-get").is_some(),
        "kernel {} is Debian's and this host has no apt-get: fetch {} {} by hand and give its path to --kernel",
        pin.name,
        pin.package,
        pin.version
    );
    let wanted = format!("{}={}", pin.package, pin.version);
    eprintln!("Fetching {wanted} to {} (nothing is installed) ...", packages.display());
    let is_offered = || {
        let policy = run::output("apt-cache", &["madison", pin.package]).unwrap_or_default();
        policy.lines().any(|line| line.split('|').nth(1).is_some_and(|version| version.trim() == pin.version))
    };
    if !is_offered() {
        // Without root, or a network, the lists stay as they are, and the download says so.
        let _ = run::run(Command::new("apt-get").args(["update", "-qq"]).stdin(Stdio::null()));
    }
    let mut apt = Command::new("apt-get");
    // As root apt would drop its rights for the download, and then not be allowed to write here.
    apt.args(["download", "-qq", "-o", "APT::Sandbox::User=root", &wanted]).current_dir(packages).stdin(Stdio::null());
    run::run(&mut apt).with_context(|| {
        format!(
            "kernel {} could not be fetched and is not in {}: the package host cannot be reached, or has this version no more; \
             then put the package there, or give another kernel's path to --kernel",
            pin.name,
            packages.display()
        )
    })?;
    cached(packages, pin)?
        .with_context(|| format!("{wanted} was fetched, but its checksum is not the pinned one ({})", pin.sha256))
}

fn sha256(file: &Path) -> Result<String> {
    let text = run::output("sha256sum", &[&file.to_string_lossy()]);
    let sum = text.as_deref().and_then(|text| text.split_whitespace().next()).map(str::to_owned);
    sum.with_context(|| format!("the checksum of {} could not be taken", file.display()))
}

/// Unpacks a package into the folder named after its checksum; whole or not at all.
fn unpack(package: &Path, sum: &str) -> Result<PathBuf> {
    let kernels = cache().join("kernels");
    let folder = kernels.join(sum);
    if folder.is_dir() {
        return Ok(folder);
    }
    fs::create_dir_all(&kernels)?;
    let fresh = tempfile::Builder::new().prefix("unpacking-").tempdir_in(&kernels)?;
    run::run(Command::new("dpkg-deb").arg("--extract").arg(package).arg(fresh.path()))?;
    fs::rename(fresh.keep(), &folder).with_context(|| format!("put {} in place", folder.display()))?;
    Ok(folder)
}

fn in_folder(folder: &Path, word: &str) -> Result<Kernel> {
    let boot = folder.join("boot");
    let images = fs::read_dir(&boot).with_context(|| format!("{word}: no boot folder"))?;
    let mut images: Vec<PathBuf> = images
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")))
        .collect();
    images.sort();
    match images.as_slice() {
        [] => bail!("{word}: no vmlinuz in {}", boot.display()),
        [image] => by_image(image, word),
        _ => bail!("{word}: several kernels in {}: give the path of one of them", boot.display()),
    }
}

fn by_image(image: &Path, word: &str) -> Result<Kernel> {
    let name = image.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let version = name.split_once('-').map(|(_, version)| version.to_owned());
    let version =
        version.with_context(|| format!("{word}: the name of an image must end in its version, vmlinuz-VERSION"))?;
    let beside = image.parent().and_then(Path::parent).map(|folder| folder.join("lib/modules").join(&version));
    let also = beside
        .as_ref()
        .and_then(|path| Some(path.parent()?.parent()?.parent()?.join("usr/lib/modules").join(&version)));
    let modules =
        [beside, also, Some(Path::new("/lib/modules").join(&version))].into_iter().flatten().find(|path| path.is_dir());
    let modules = modules.with_context(|| format!("{word}: no modules of {version} beside it or in /lib/modules"))?;
    let label = label_of(word);
    ensure!(!label.is_empty(), "{word}: give a path that ends in a name");
    Ok(Kernel { label, image: image.to_owned(), modules })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_and_an_image_are_kernels_if_their_modules_are_there() {
        let folder = tempfile::tempdir().unwrap();
        let word = folder.path().to_string_lossy().into_owned();
        assert!(find(&word).unwrap_err().to_string().contains("boot"));
        fs::create_dir_all(folder.path().join("boot")).unwrap();
        fs::write(folder.path().join("boot/vmlinuz-1.2-x"), "").unwrap();
        assert!(find(&word).unwrap_err().to_string().contains("no modules of 1.2-x"));
        fs::create_dir_all(folder.path().join("usr/lib/modules/1.2-x")).unwrap();
        let by_folder = find(&word).unwrap();
        let by_image = find(&format!("{word}/boot/vmlinuz-1.2-x")).unwrap();
        assert_eq!((&by_folder.image, &by_folder.modules), (&by_image.image, &by_image.modules));
        fs::write(folder.path().join("boot/vmlinuz-1.3"), "").unwrap();
        assert!(find(&word).unwrap_err().to_string().contains("several"));
        let unknown = find("5.99").unwrap_err().to_string();
        assert!(unknown.contains("6.12 or 6.1"), "{unknown}");
    }

    #[test]
    fn a_damaged_package_is_no_package() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(format!("{}_{}_amd64.deb", PINS[0].package, PINS[0].version));
        fs::write(&file, "half of it").unwrap();
        assert_eq!(cached(folder.path(), &PINS[0]).unwrap(), None);
        assert!(!file.exists());
    }
}
