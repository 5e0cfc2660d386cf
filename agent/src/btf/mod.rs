//! Type information of a Linux kernel (BTF): ids of types to attach to, and where members of structures lie.
//!
//! Rust BPF programs have no relocations against kernel types, so what they need is looked up here and handed to them as
//! constants; the same serves who reads a guest's kernel from outside. Understands the split information of modules, which `aya` 0.14
//! does not. Bounds-checked: the bytes come from a file, or from a guest.
//!
//! Format: Documentation/bpf/btf.rst and include/uapi/linux/btf.h of Linux.

mod file;

use std::io;
use std::path::Path;

pub use file::{BtfFileError, kernel_types_of};
#[cfg(any(test, feature = "fuzz"))]
pub(crate) use file::{fuzz as fuzz_file, fuzz_seeds as file_seeds};

/// Where the kernel shows its own and its modules' type information.
const FOLDER: &str = "/sys/kernel/btf";
const MAGIC: u16 = 0xeb9f;
/// Typedefs, qualifiers and anonymous members that are followed before a type counts as circular.
const MAX_DEPTH: u32 = 32;
/// Members that are looked at for one path, those of anonymous members included: these may branch, and lead back to where they came from. A
/// structure has at most 65535 of its own.
const MAX_MEMBERS: u32 = 1 << 18;

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

/// Kinds that are only walked through.
mod kind {
    pub(super) const INT: u8 = 1;
    pub(super) const PTR: u8 = 2;
    pub(super) const ARRAY: u8 = 3;
    pub(super) const STRUCT: u8 = 4;
    pub(super) const UNION: u8 = 5;
    pub(super) const ENUM: u8 = 6;
    pub(super) const TYPEDEF: u8 = 8;
    pub(super) const RESTRICT: u8 = 11;
    pub(super) const TYPE_TAG: u8 = 18;
    pub(super) const ENUM64: u8 = 19;
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

/// Where a member lies in its structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Bytes from the structure's start.
    pub offset: u32,
    /// Its own bytes; of an array, those of all elements. Zero where the type has none.
    pub bytes: u32,
}

/// All types of a kernel, or of a kernel and one module.
#[derive(Debug, Default)]
pub struct KernelTypes {
    /// Name strings, the module's after the kernel's, as their offsets count.
    strings: Vec<u8>,
    /// The type sections, one behind the other, in 32-bit words.
    words: Vec<u32>,
    /// Where each type begins in `words`, in order of id, from id 1.
    starts: Vec<u32>,
}

/// One type's words.
#[derive(Clone, Copy)]
struct Type<'a>(&'a [u32]);

impl Type<'_> {
    fn name(self) -> u32 {
        self.0[0]
    }

    fn kind(self) -> u8 {
        (self.0[1] >> 24 & 0x1f) as u8
    }

    /// Members, values or parameters.
    fn count(self) -> usize {
        (self.0[1] & 0xffff) as usize
    }

    /// Bytes, or the type that is referred to.
    fn size_or_type(self) -> u32 {
        self.0[2]
    }

    /// Name, type and offset in bits of each member; of a bit field no offset.
    fn members(self) -> impl Iterator<Item = (u32, u32, Option<u32>)> {
        let bit_fields = self.0[1] >> 31 == 1;
        self.0[3..].chunks_exact(3).take(self.count()).map(move |member| {
            let offset = match (bit_fields, member[2] >> 24) {
                (false, _) => Some(member[2]),
                (true, 0) => Some(member[2] & 0xff_ffff),
                (true, _) => None,
            };
            (member[0], member[1], offset)
        })
    }
}

impl KernelTypes {
    /// The running kernel's own types.
    ///
    /// # Errors
    /// The kernel shows none, or they are damaged.
    pub fn vmlinux() -> Result<Self, BtfError> {
        Self::parse(&read("vmlinux")?)
    }

    /// The running kernel's types and those of `module` if it is one; a built-in's are among the kernel's.
    ///
    /// # Errors
    /// As [`KernelTypes::vmlinux`].
    pub fn with_module(module: &str) -> Result<Self, BtfError> {
        let mut types = Self::vmlinux()?;
        types.add_module(module)?;
        Ok(types)
    }

    /// Adds the types of a loaded module to the running kernel's; nothing if it is built in, or not there. One module only: the ids of two
    /// overlap.
    ///
    /// # Errors
    /// They are damaged.
    pub fn add_module(&mut self, module: &str) -> Result<(), BtfError> {
        if Path::new(FOLDER).join(module).exists() { self.append(&read(module)?) } else { Ok(()) }
    }

    /// The types in `bytes`: a whole file as the kernel has it, with nothing behind it that matters.
    ///
    /// # Errors
    /// They are damaged.
    pub fn parse(bytes: &[u8]) -> Result<Self, BtfError> {
        let mut types = Self::default();
        types.append(bytes)?;
        Ok(types)
    }

    /// The length in bytes that the header at the start of `bytes` announces; none if it is no header of type information.
    pub fn announced_len(bytes: &[u8]) -> Option<u64> {
        let header = Header::of(bytes)?;
        let end = |offset: u32, len: u32| u64::from(header.own_len) + u64::from(offset) + u64::from(len);
        Some(end(header.type_off, header.type_len).max(end(header.str_off, header.str_len)))
    }

    /// The id of a type.
    pub fn id(&self, name: &str, kind: Kind) -> Option<u32> {
        self.find(name, kind as u8)
    }

    /// The size in bytes of a structure.
    pub fn size_of(&self, structure: &str) -> Option<u32> {
        Some(self.get(self.find(structure, kind::STRUCT)?)?.size_or_type())
    }

    /// Offset in bytes of a member of a structure; see [`KernelTypes::field`].
    pub fn member_offset(&self, structure: &str, path: &str) -> Option<u32> {
        self.field(structure, path).map(|field| field.offset)
    }

    /// Where a member of a structure lies. `path` names members of members with dots (`arch.cr3`); structures and unions without a name are
    /// looked into. No pointer is followed. None for a bit field.
    pub fn field(&self, structure: &str, path: &str) -> Option<Field> {
        let mut id = self.find(structure, kind::STRUCT)?;
        let (mut offset, mut left) = (0u32, MAX_MEMBERS);
        for name in path.split('.') {
            let (bits, member) = self.member(id, name.as_bytes(), 0, &mut left)?;
            if !bits.is_multiple_of(8) {
                return None;
            }
            (offset, id) = (offset.checked_add(bits / 8)?, member);
        }
        Some(Field { offset, bytes: self.bytes_of(id, 0).unwrap_or(0) })
    }

    /// The value of an enumerator, whatever enumeration has it.
    pub fn enumerator(&self, name: &str) -> Option<u64> {
        (1..=self.starts.len() as u32).find_map(|id| {
            let t = self.get(id)?;
            let words = match t.kind() {
                kind::ENUM => 2,
                kind::ENUM64 => 3,
                _ => return None,
            };
            let found =
                t.0[3..].chunks_exact(words).take(t.count()).find(|value| self.is_named(value[0], name.as_bytes()))?;
            Some(u64::from(found[1]) | found.get(2).map_or(0, |&high| u64::from(high) << 32))
        })
    }

    /// Offset in bits and type of a member of the structure or union `id`; none when `left` members have been looked at.
    fn member(&self, id: u32, name: &[u8], depth: u32, left: &mut u32) -> Option<(u32, u32)> {
        let t = self.resolved(id)?;
        if depth > MAX_DEPTH || !matches!(t.kind(), kind::STRUCT | kind::UNION) {
            return None;
        }
        t.members().find_map(|(member, id, offset)| {
            *left = left.checked_sub(1)?;
            if self.is_named(member, name) {
                return Some((offset?, id));
            }
            if !self.is_named(member, b"") {
                return None;
            }
            let (inner, id) = self.member(id, name, depth + 1, left)?;
            Some((offset?.checked_add(inner)?, id))
        })
    }

    /// The type behind typedefs and qualifiers.
    fn resolved(&self, mut id: u32) -> Option<Type<'_>> {
        for _ in 0..MAX_DEPTH {
            let t = self.get(id)?;
            match t.kind() {
                kind::TYPEDEF..=kind::RESTRICT | kind::TYPE_TAG => id = t.size_or_type(),
                _ => return Some(t),
            }
        }
        None
    }

    fn bytes_of(&self, id: u32, depth: u32) -> Option<u32> {
        let t = self.resolved(id)?;
        match t.kind() {
            kind::PTR => Some(8),
            kind::ARRAY if depth < MAX_DEPTH => self.bytes_of(t.0[3], depth + 1)?.checked_mul(t.0[5]),
            kind::INT | kind::STRUCT..=kind::ENUM | kind::ENUM64 => Some(t.size_or_type()),
            _ => None,
        }
    }

    fn find(&self, name: &str, kind: u8) -> Option<u32> {
        // A module's type hides the kernel's of the same name.
        (1..=self.starts.len() as u32)
            .rev()
            .find(|&id| self.get(id).is_some_and(|t| t.kind() == kind && self.is_named(t.name(), name.as_bytes())))
    }

    fn get(&self, id: u32) -> Option<Type<'_>> {
        let start = *self.starts.get(id.checked_sub(1)? as usize)?;
        let end = self.starts.get(id as usize).map_or(self.words.len(), |&next| next as usize);
        self.words.get(start as usize..end).map(Type)
    }

    fn is_named(&self, offset: u32, name: &[u8]) -> bool {
        self.strings
            .get(offset as usize..)
            .is_some_and(|rest| rest.starts_with(name) && rest.get(name.len()).is_none_or(|&end| end == 0))
    }

    /// Adds the types of one file behind those already here.
    fn append(&mut self, file: &[u8]) -> Result<(), BtfError> {
        let header = Header::of(file).ok_or(BtfError::Damaged("no magic number"))?;
        let section = |offset: u32, len: u32| {
            let start = header.own_len.checked_add(offset)? as usize;
            file.get(start..start.checked_add(len as usize)?)
        };
        let strings = section(header.str_off, header.str_len).ok_or(BtfError::Damaged("strings outside the file"))?;
        let types = section(header.type_off, header.type_len).ok_or(BtfError::Damaged("types outside the file"))?;
        let words: Vec<u32> = types.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let mut starts = Vec::new();
        let mut at = 0;
        while at < words.len() {
            let bytes = words
                .get(at + 1)
                .and_then(|&info| words_of(info))
                .ok_or(BtfError::Damaged("a type of no known kind"))?;
            if words.len() - at < bytes {
                return Err(BtfError::Damaged("a type is cut off"));
            }
            starts.push((self.words.len() + at) as u32);
            at += bytes;
        }
        self.starts.append(&mut starts);
        self.words.extend(words);
        self.strings.extend_from_slice(strings);
        Ok(())
    }
}

/// Words that a type takes, by the second of them.
fn words_of(info: u32) -> Option<usize> {
    let count = (info & 0xffff) as usize;
    let more = match info >> 24 & 0x1f {
        1 | 14 | 17 => 1,
        3 => 3,
        4 | 5 | 15 | 19 => 3 * count,
        6 | 13 => 2 * count,
        2 | 7..=12 | 16 | 18 => 0,
        _ => return None,
    };
    Some(3 + more)
}

/// The header of a file, in the kernel's own byte order: the x86 and Arm hosts that run KVM are little-endian.
struct Header {
    own_len: u32,
    type_off: u32,
    type_len: u32,
    str_off: u32,
    str_len: u32,
}

impl Header {
    fn of(file: &[u8]) -> Option<Self> {
        let word = |index: usize| {
            let bytes = file.get(index * 4..index * 4 + 4)?;
            Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        };
        // Magic number, version 1, no flags.
        if word(0)? != u32::from(MAGIC) | 1 << 16 {
            return None;
        }
        let [own_len, type_off, type_len, str_off, str_len] = [word(1)?, word(2)?, word(3)?, word(4)?, word(5)?];
        Some(Self { own_len, type_off, type_len, str_off, str_len })
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
        let mut types = KernelTypes::default();
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
            let mut types = KernelTypes::default();
            assert!(types.append(&whole[..len]).is_err(), "{len} bytes were accepted");
        }
        assert_eq!(KernelTypes::announced_len(&whole), Some(whole.len() as u64));
    }

    #[test]
    fn a_type_that_contains_itself_ends_the_search() {
        // Structure 1 has one member without a name, of its own type; typedef 2 refers to itself.
        let words = [1, 4 << 24 | 1, 8, 0, 1, 0, 3, 8 << 24, 2];
        let types = KernelTypes { strings: b"\0a\0b\0".to_vec(), words: words.to_vec(), starts: vec![0, 6] };
        assert_eq!(types.field("a", "x"), None);
        assert!(types.resolved(2).is_none());
        // Two such members: each way leads on to two.
        let words = [1, 4 << 24 | 2, 8, 0, 1, 0, 0, 1, 0];
        let types = KernelTypes { strings: b"\0a\0".to_vec(), words: words.to_vec(), starts: vec![0] };
        assert_eq!(types.field("a", "x"), None);
    }

    #[test]
    fn this_kernels_types_are_read() {
        // A kernel without type information is doctor's business, not this test's.
        if let Ok(types) = KernelTypes::vmlinux() {
            assert!(types.id("task_struct", Kind::Struct).is_some());
            assert_eq!(types.field("task_struct", "pid").map(|field| field.bytes), Some(4));
            // Behind a structure without a name, in a member of a member, and through a typedef.
            assert!(types.member_offset("task_struct", "tasks").is_some());
            assert_eq!(types.member_offset("task_struct", "tasks.next"), types.member_offset("task_struct", "tasks"));
            assert_eq!(types.field("task_struct", "comm").map(|field| field.bytes), Some(16));
            assert_eq!(types.enumerator("BPF_MAP_TYPE_HASH"), Some(1));
            assert!(types.size_of("task_struct") > types.member_offset("task_struct", "comm"));
            assert_eq!(types.field("task_struct", "tasks.nothing"), None);
        }
    }
}
