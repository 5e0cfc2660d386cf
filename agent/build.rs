//! Selects the BPF object that goes into the binary. Never builds it: that is `cargo xtask build-ebpf`.
//!
//! An empty file stands for "no object", so that a build needs no BPF toolchain.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=DUNLIN_BPF_OBJECT");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("dunlin.bpf.o");
    let object = if let Some(given) = env::var_os("DUNLIN_BPF_OBJECT") {
        let given = PathBuf::from(given);
        println!("cargo::rerun-if-changed={}", given.display());
        fs::read(&given).unwrap_or_else(|e| panic!("DUNLIN_BPF_OBJECT: {} cannot be read: {e}", given.display()))
    } else {
        let folder =
            Path::new(&env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR")).join("../target/bpf");
        // Cargo watches the folder: a file that does not exist yet would count as changed at every build.
        fs::create_dir_all(&folder).expect("target/bpf can be made");
        println!("cargo::rerun-if-changed={}", folder.display());
        fs::read(folder.join("dunlin.bpf.o")).unwrap_or_default()
    };
    fs::write(out, object).expect("OUT_DIR is writable");
}
