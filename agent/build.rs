//! Selects what goes into the binary beside its code: the BPF object, and the guest of `dunlin doctor --prove`. Never builds
//! them: those are `cargo xtask build-ebpf` and `build-guest`.
//!
//! An empty file stands for "none", so that a build needs no BPF toolchain and no guest.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    take("DUNLIN_BPF_OBJECT", "target/bpf", "dunlin.bpf.o");
    take("DUNLIN_GUEST_ELF", "target/guest", "dunlin-guest.elf");
}

/// Puts the file that the environment names, else `folder/name`, where the code includes it from.
fn take(variable: &str, folder: &str, name: &str) {
    println!("cargo::rerun-if-env-changed={variable}");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join(name);
    let content = if let Some(given) = env::var_os(variable) {
        let given = PathBuf::from(given);
        println!("cargo::rerun-if-changed={}", given.display());
        fs::read(&given).unwrap_or_else(|e| panic!("{variable}: {} cannot be read: {e}", given.display()))
    } else {
        let manifest = env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
        let folder = Path::new(&manifest).join("..").join(folder);
        // Cargo watches the folder: a file that does not exist yet would count as changed at every build.
        fs::create_dir_all(&folder).expect("the folder can be made");
        println!("cargo::rerun-if-changed={}", folder.display());
        fs::read(folder.join(name)).unwrap_or_default()
    };
    fs::write(out, content).expect("OUT_DIR is writable");
}
