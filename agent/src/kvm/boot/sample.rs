//! A bzImage of a few instructions: for tests and for fuzzing.

use super::layout::IMAGE_START;

/// Where [`bzimage`] wants to lie.
pub(crate) const ADDRESS: u64 = IMAGE_START;
/// How much RAM it wants from there.
pub(crate) const INIT_BYTES: u32 = 0x1_0000;

/// Puts `value` at `at` of a file.
pub(crate) fn put(file: &mut [u8], at: usize, value: &[u8]) {
    file[at..at + value.len()].copy_from_slice(value);
}

/// A bzImage of boot protocol 2.15 whose 64-bit entry is `code`: one sector of setup, relocatable, an initrd anywhere
/// below 2 GiB.
pub(crate) fn bzimage(code: &[u8]) -> Vec<u8> {
    let loaded = (0x200 + code.len()).next_multiple_of(16);
    let mut file = vec![0; 2 * 512 + loaded];
    put(&mut file, 0x1f1, &[1]);
    put(&mut file, 0x1f4, &(loaded as u32 / 16).to_le_bytes());
    put(&mut file, 0x1fe, &[0x55, 0xaa]);
    put(&mut file, 0x200, &[0xeb, 0x6a]);
    put(&mut file, 0x202, b"HdrS");
    put(&mut file, 0x206, &0x020fu16.to_le_bytes());
    put(&mut file, 0x211, &[1]);
    put(&mut file, 0x214, &(IMAGE_START as u32).to_le_bytes());
    put(&mut file, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut file, 0x230, &0x1000u32.to_le_bytes());
    put(&mut file, 0x234, &[1]);
    put(&mut file, 0x236, &1u16.to_le_bytes());
    put(&mut file, 0x238, &2047u32.to_le_bytes());
    put(&mut file, 0x248, &0x200u32.to_le_bytes());
    put(&mut file, 0x24c, &(code.len() as u32).to_le_bytes());
    put(&mut file, 0x258, &ADDRESS.to_le_bytes());
    put(&mut file, 0x260, &INIT_BYTES.to_le_bytes());
    put(&mut file, 2 * 512 + 0x200, code);
    file
}
