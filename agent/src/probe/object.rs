//! The BPF object inside this binary.

/// This binary was built before the BPF programs were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("built without BPF programs: run `cargo xtask build-ebpf` and build again")]
pub struct NoObject;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/dunlin.bpf.o"));

/// The object, aligned as ELF parsers want it.
///
/// # Errors
/// There is none in this build; the words say what to do.
pub fn embedded_object() -> Result<&'static [u8], NoObject> {
    if OBJECT.is_empty() { Err(NoObject) } else { Ok(OBJECT) }
}
