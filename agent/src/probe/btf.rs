//! Type information of the running kernel (BTF): ids of types to attach to, and offsets of structure members.
//!
//! Rust BPF programs have no relocations against kernel types, so what they need is looked up here and handed to them as
//! constants. Understands the split information of modules, which `aya` 0.14 does not. Bounds-checked: the bytes come
//! from a file.

use std::io;
use std::path::Path;

/// Where the kernel shows its own and its modules' type information.
const FOLDER: &str = "/sys/kernel/btf";
const MAGIC: u16 = 0xeb9f;

/// What a type is, for those kinds that are looked up (`BTF_KIND_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A structure.
    Struct = 4,
    /// A typedef; `btf_trace_NAME` is what a typed tracepoint program attaches to.
    Typedef = 8,
    /// A function that programs can attach to.
    Func = 12,
}

/// Type information that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    /// The file cannot be read.
    #[error("{path} cannot be read: the kernel was built without CONFIG_DEBUG_INFO_BTF, or the module is not loaded")]
    Unreadable {
        /// The file.
        path: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file holds no type information that this version understands.
    #[error("type information is damaged: {0}")]
    Damaged(&'static str),
}

/// All types of the kernel, or of the kernel and one module.
#[derive(Debug)]
pub struct KernelTypes {
    /// Name strings, the module's after the kernel's, as their offsets count.
    strings: Vec<u8>,
    /// Types in order of id, from id 1.
    types: Vec<Type>,
}

#[derive(Debug)]
struct Type {
    name: u32,
    kind: u8,
    bitfields: bool,
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    name: u32,
    offset: u32,
}

impl KernelTypes {
    /// The running kernel's own types.
    ///
    /// # Errors
    /// The kernel shows none, or they are damaged.
    pub fn vmlinux() -> Result<Self, BtfError> {
        let mut types = Self { strings: Vec::new(), types: Vec::new() };
        types.append(&read("vmlinux")?)?;
        Ok(types)
    }

    /// The kernel's types and those of `module` if it is one; a built-in's are among the kernel's.
    ///
    /// # Errors
    /// As [`KernelTypes::vmlinux`].
    pub fn with_module(module: &str) -> Result<Self, BtfError> {
        let mut types = Self::vmlinux()?;
        if Path::new(FOLDER).join(module).exists() {
            types.append(&read(module)?)?;
        }
        Ok(types)
    }

    /// The id of a type.
    pub fn id(&self, name: &str, kind: Kind) -> Option<u32> {
        self.find(name, kind).map(|index| index as u32 + 1)
    }

    /// Offset in bytes of a direct member of a structure; none for a bit field.
    pub fn member_offset(&self, structure: &str, member: &str) -> Option<u32> {
        let structure = &self.types[self.find(structure, Kind::Struct)?];
        let found = structure.members.iter().find(|candidate| self.name(candidate.name) == Some(member.as_bytes()))?;
        let bits = if structure.bitfields {
            (found.offset >> 24 == 0).then_some(found.offset & 0xff_ffff)?
        } else {
            found.offset
        };
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    fn find(&self, name: &str, kind: Kind) -> Option<usize> {
        // A module's type hides the kernel's of the same name.
        self.types.iter().rposition(|t| t.kind == kind as u8 && self.name(t.name) == Some(name.as_bytes()))
    }

    fn name(&self, offset: u32) -> Option<&[u8]> {
        self.strings.get(offset as usize..)?.split(|&byte| byte == 0).next()
    }

    /// Adds the types of one file behind those already here.
    fn append(&mut self, file: &[u8]) -> Result<(), BtfError> {
        let header = Words(file);
        let magic = file.get(..2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        if magic != Some(MAGIC) {
            return Err(BtfError::Damaged("no magic number"));
        }
        let [header_len, type_off, type_len, str_off, str_len] = [1, 2, 3, 4, 5].map(|index| header.get(index));
        let section = |offset: Option<u32>, len: Option<u32>| {
            let start = header_len?.checked_add(offset?)? as usize;
            file.get(start..start.checked_add(len? as usize)?)
        };
        let strings = section(str_off, str_len).ok_or(BtfError::Damaged("strings outside the file"))?;
        let mut rest = Words(section(type_off, type_len).ok_or(BtfError::Damaged("types outside the file"))?);
        while !rest.0.is_empty() {
            let parsed = Type::parse(&rest).ok_or(BtfError::Damaged("a type is cut off"))?;
            self.types.push(parsed.0);
            rest = parsed.1;
        }
        self.strings.extend_from_slice(strings);
        Ok(())
    }
}

impl Type {
    /// The first type of `words`, and the words behind it.
    fn parse<'a>(words: &Words<'a>) -> Option<(Self, Words<'a>)> {
        let info = words.get(1)?;
        let kind = (info >> 24 & 0x1f) as u8;
        let count = (info & 0xffff) as usize;
        // Words behind the three of every type, by kind (include/uapi/linux/btf.h).
        let extra = match kind {
            1 | 14 | 17 => 1,
            3 => 3,
            4 | 5 | 15 | 19 => 3 * count,
            6 | 13 => 2 * count,
            2 | 7..=12 | 16 | 18 => 0,
            _ => return None,
        };
        let is_struct = kind == Kind::Struct as u8;
        let members = (0..if is_struct { count } else { 0 })
            .map(|index| Some(Member { name: words.get(3 + 3 * index)?, offset: words.get(5 + 3 * index)? }))
            .collect::<Option<_>>()?;
        let rest = Words(words.0.get((3 + extra) * 4..)?);
        Some((Self { name: words.get(0)?, kind, bitfields: info >> 31 == 1, members }, rest))
    }
}

/// Little-endian 32-bit words. The kernel writes its own byte order; the x86 and Arm hosts that run KVM are
/// little-endian.
struct Words<'a>(&'a [u8]);

impl Words<'_> {
    fn get(&self, index: usize) -> Option<u32> {
        let bytes = self.0.get(index * 4..index * 4 + 4)?;
        Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }
}

fn read(name: &str) -> Result<Vec<u8>, BtfError> {
    let path = Path::new(FOLDER).join(name);
    std::fs::read(&path).map_err(|source| BtfError::Unreadable { path: path.display().to_string(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with one structure `pair { int a; long b at byte 8 }` and one typedef `t`, name offsets shifted by `base`.
    fn file(base: u32) -> Vec<u8> {
        let strings = b"\0pair\0a\0b\0t\0";
        let name = |at: u32| if base == 0 { at } else { base + at };
        let types: Vec<u32> =
            [vec![name(1), 4 << 24 | 2, 16, name(6), 0, 0, name(8), 0, 64], vec![name(10), 8 << 24, 1]].concat();
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        for word in [24, 0, types.len() as u32 * 4, types.len() as u32 * 4, strings.len() as u32] {
            bytes.extend(u32::to_le_bytes(word));
        }
        bytes.extend(types.iter().flat_map(|word| word.to_le_bytes()));
        bytes.extend(strings);
        bytes
    }

    #[test]
    fn a_modules_types_follow_the_kernels() {
        let mut types = KernelTypes { strings: Vec::new(), types: Vec::new() };
        types.append(&file(0)).unwrap();
        assert_eq!(types.id("t", Kind::Typedef), Some(2));
        types.append(&file(types.strings.len() as u32)).unwrap();
        assert_eq!(types.id("t", Kind::Typedef), Some(4));
        assert_eq!(types.member_offset("pair", "b"), Some(8));
        assert_eq!(types.member_offset("pair", "c"), None);
        assert_eq!(types.id("pair", Kind::Func), None);
    }

    #[test]
    fn damaged_files_are_refused_at_every_length() {
        let whole = file(0);
        for len in 0..whole.len() {
            let mut types = KernelTypes { strings: Vec::new(), types: Vec::new() };
            assert!(types.append(&whole[..len]).is_err(), "{len} bytes were accepted");
        }
    }

    #[test]
    fn this_kernels_types_are_read() {
        // A kernel without type information is doctor's business, not this test's.
        if let Ok(types) = KernelTypes::vmlinux() {
            assert!(types.id("task_struct", Kind::Struct).is_some());
            assert!(types.member_offset("task_struct", "pid").is_some());
        }
    }
}
