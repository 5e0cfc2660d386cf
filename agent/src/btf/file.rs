//! Type information of a whole kernel in a file as an operator has it: that information alone (`/sys/kernel/btf/vmlinux`, or what `pahole
//! --btf_encode_detached` writes), or a `vmlinux` with its `.BTF` section.
//!
//! Owns how the section is found in an ELF file, of which only headers, section names and that section are read: a `vmlinux` with debug
//! information has a gigabyte. Must not know whose kernel it is.
//!
//! Format: the System V ABI, chapter 4 ("Object Files"); include/uapi/linux/elf.h.

use std::io::{self, Read, Seek, SeekFrom};

use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::{BtfError, KernelTypes};
use crate::elf::Header;

/// The most type information that is read, in bytes; kernels have 4 to 10 MiB.
const MAX_TYPES_BYTES: u64 = 32 << 20;
/// The most section names that are read, in bytes; a `vmlinux` has some hundred.
const MAX_NAMES_BYTES: u64 = 1 << 20;
const SECTION: &[u8] = b".BTF";
/// A section of no bytes in the file (`SHT_NOBITS`).
const NO_BITS: u32 = 8;

/// Why a file gives no kernel's types.
#[derive(Debug, thiserror::Error)]
pub enum BtfFileError {
    /// It cannot be read.
    #[error("it cannot be read")]
    Read(#[from] io::Error),
    /// It is something else.
    #[error(
        "it is neither type information (BTF) nor an ELF file (vmlinux); of a compressed kernel (vmlinuz, bzImage) the kernel's \
         scripts/extract-vmlinux makes a vmlinux"
    )]
    Neither,
    /// It is for another kind of processor.
    #[error("it is not of a 64-bit x86 kernel")]
    Processor,
    /// Its section headers lead nowhere.
    #[error("it is a damaged ELF file: {0}")]
    Elf(&'static str),
    /// It was built without, or stripped.
    #[error(
        "it is an ELF file without a .BTF section: the kernel was built without CONFIG_DEBUG_INFO_BTF; from a vmlinux with debug information \
         `pahole --btf_encode_detached` makes the file that is wanted"
    )]
    NoSection,
    /// More than any kernel has.
    #[error("its type information has {0} bytes, which is more than any kernel's")]
    Large(u64),
    /// The information itself.
    #[error(transparent)]
    Types(#[from] BtfError),
    /// It is a module's, or a program's.
    #[error("it describes no whole kernel (it has no task_struct): is it a module's?")]
    NoKernel,
}

/// A section header.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout)]
struct Section {
    name: u32,
    kind: u32,
    flags: u64,
    address: u64,
    offset: u64,
    bytes: u64,
    link: u32,
    info: u32,
    align: u64,
    entry_bytes: u64,
}

/// The kernel's types in a file, which is read from its start.
///
/// # Errors
/// It cannot be read, is something else, or describes no whole kernel; says what would do.
pub fn kernel_types_of(mut file: impl Read + Seek) -> Result<KernelTypes, BtfFileError> {
    file.seek(SeekFrom::Start(0))?;
    let mut start = Vec::new();
    file.by_ref().take(size_of::<Header>() as u64).read_to_end(&mut start)?;
    let bytes = if start.starts_with(b"\x7fELF") {
        let header = Header::read_from_bytes(&start).map_err(|_| BtfFileError::Elf("it is too short"))?;
        section(&mut file, &header)?
    } else if KernelTypes::announced_len(&start).is_some() {
        file.seek(SeekFrom::Start(0))?;
        let mut bytes = Vec::new();
        file.by_ref().take(MAX_TYPES_BYTES + 1).read_to_end(&mut bytes)?;
        bytes
    } else {
        return Err(BtfFileError::Neither);
    };
    if bytes.len() as u64 > MAX_TYPES_BYTES {
        return Err(BtfFileError::Large(bytes.len() as u64));
    }
    let types = KernelTypes::parse(&bytes)?;
    types.size_of("task_struct").ok_or(BtfFileError::NoKernel)?;
    Ok(types)
}

/// The bytes of an ELF file's section with type information.
fn section(file: &mut (impl Read + Seek), header: &Header) -> Result<Vec<u8>, BtfFileError> {
    if !header.is_x86_64() {
        return Err(BtfFileError::Processor);
    }
    if usize::from(header.section_bytes) != size_of::<Section>() || header.sections == 0 {
        return Err(BtfFileError::NoSection);
    }
    let table = stretch(file, header.sections_offset, u64::from(header.sections) * size_of::<Section>() as u64)?;
    let sections: Vec<Section> = table
        .chunks_exact(size_of::<Section>())
        .map(|bytes| Section::read_from_bytes(bytes).map_err(|_| BtfFileError::Elf("its section headers are cut off")))
        .collect::<Result<_, _>>()?;
    let names = sections.get(usize::from(header.names)).filter(|names| names.bytes <= MAX_NAMES_BYTES);
    let names = names.ok_or(BtfFileError::Elf("it has no section names"))?;
    let names = stretch(file, names.offset, names.bytes)?;
    let is_wanted = |section: &&Section| {
        let name = names.get(section.name as usize..).unwrap_or_default();
        section.kind != NO_BITS && name.strip_prefix(SECTION).is_some_and(|rest| rest.first() == Some(&0))
    };
    let found = sections.iter().find(is_wanted).ok_or(BtfFileError::NoSection)?;
    if found.bytes > MAX_TYPES_BYTES {
        return Err(BtfFileError::Large(found.bytes));
    }
    stretch(file, found.offset, found.bytes)
}

/// `bytes` bytes from `offset` on, no fewer. What is not there takes no memory.
fn stretch(file: &mut (impl Read + Seek), offset: u64, bytes: u64) -> Result<Vec<u8>, BtfFileError> {
    file.seek(SeekFrom::Start(offset)).map_err(|_| BtfFileError::Elf("a section lies beyond any file"))?;
    let mut read = Vec::new();
    file.by_ref().take(bytes).read_to_end(&mut read)?;
    if read.len() as u64 == bytes { Ok(read) } else { Err(BtfFileError::Elf("a section is cut off")) }
}

/// Fuzzing: what is taken describes a kernel.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz(input: &[u8]) {
    if let Ok(types) = kernel_types_of(io::Cursor::new(input)) {
        assert!(types.size_of("task_struct").is_some());
    }
}

/// Fuzzing: what is right.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz_seeds() -> Vec<Vec<u8>> {
    let types = crate::guest_os::testing::types(&[]);
    vec![elf(&types, b".BTF\0"), types]
}

/// An ELF file with `types` in a section called `name`, which ends in a zero.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn elf(types: &[u8], name: &[u8]) -> Vec<u8> {
    let (headers, each) = (size_of::<Header>(), size_of::<Section>());
    let names_at = headers + 3 * each;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(headers, 0);
    file[16..20].copy_from_slice(&[2, 0, 62, 0]);
    file[40..48].copy_from_slice(&(headers as u64).to_le_bytes());
    file[58..64].copy_from_slice(&[each as u8, 0, 3, 0, 2, 0]);
    let mut section = |name: u32, offset: usize, bytes: usize| {
        let mut header = [name.to_le_bytes(), 1u32.to_le_bytes()].concat();
        header.resize(24, 0);
        header.extend([offset as u64, bytes as u64].map(u64::to_le_bytes).concat());
        header.resize(each, 0);
        file.extend(header);
    };
    section(0, 0, 0);
    section(1, names_at + 1 + name.len(), types.len());
    section(0, names_at, 1 + name.len());
    file.push(0);
    file.extend(name);
    file.extend(types);
    file
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_os::testing::types;

    fn of(bytes: &[u8]) -> Result<KernelTypes, BtfFileError> {
        kernel_types_of(io::Cursor::new(bytes))
    }

    #[test]
    fn both_kinds_of_file_are_read() {
        for seed in fuzz_seeds() {
            assert!(of(&seed).unwrap().size_of("task_struct").is_some());
        }
    }

    #[test]
    fn what_is_none_is_refused_by_reason() {
        let words = |bytes: &[u8]| of(bytes).unwrap_err().to_string();
        let whole = elf(&types(&[]), b".BTF\0");
        assert!(words(b"").contains("neither") && words(b"ffffffff81000000 T _text\n").contains("neither"));
        assert!(words(b"MZ compressed kernel").contains("extract-vmlinux"));
        assert!(words(&elf(&types(&[]), b".BTF_ids\0")).contains("without a .BTF section"));
        assert!(words(&types(&["task_struct"])).contains("no whole kernel"));
        for cut in [10, 64, 100, 270, whole.len() - 1] {
            assert!(words(&whole[..cut]).contains("damaged"), "{cut}: {}", words(&whole[..cut]));
        }
        let with = |at: usize, byte: u8| {
            let mut other = whole.clone();
            other[at] = byte;
            words(&other)
        };
        assert!(with(4, 1).contains("64-bit x86") && with(18, 183).contains("64-bit x86"));
        // A section of 2^62 bytes, and one at 2^62 and more: neither is asked for.
        assert!(with(64 + 64 + 39, 0x40).contains("more than any kernel's"));
        assert!(with(64 + 64 + 31, 0xff).contains("damaged") && with(64 + 64 + 31, 0x40).contains("cut off"));
    }
}
