//! KVM's own statistics of a vCPU: how many faults on guest memory it resolved for it.
//!
//! Owns the layout of a statistics file (`KVM_GET_STATS_FD`, Documentation/virt/kvm/api.rst 4.133): a header, descriptors with names, values. Must not know
//! what faults say of writing.

use std::io;
use std::os::fd::OwnedFd;

use kvm_ioctls::VcpuFd;

use super::sys;

/// Bytes of the header: flags, length of names, number of descriptors, and the offsets of identity, descriptors and data.
const HEADER_BYTES: usize = 24;
/// Bytes of a descriptor before its name: flags, exponent, size, offset, bucket size.
const DESCRIPTOR_BYTES: usize = 16;
/// No kernel has more of either.
const MAX_DESCRIPTORS: usize = 1024;
const MAX_NAME: usize = 256;

/// What is summed up: faults that made a mapping, and faults that only had to make one writable (`arch/x86/kvm/x86.c`, `kvm_vcpu_stats_desc`).
const FAULTS: [&str; 2] = ["pf_fixed", "pf_fast"];

/// The statistics file of one vCPU.
#[derive(Debug)]
pub(super) struct VcpuFaults {
    file: OwnedFd,
    offsets: Vec<u64>,
}

impl VcpuFaults {
    /// Opens the statistics; none where the kernel has none (before Linux 5.14), or none of these.
    pub(super) fn open(vcpu: &VcpuFd) -> Option<Self> {
        let file = sys::stats_fd(vcpu).ok()?;
        let offsets = offsets(&file).ok().filter(|offsets| !offsets.is_empty())?;
        Some(Self { file, offsets })
    }

    /// How many there were so far.
    pub(super) fn count(&self) -> io::Result<u64> {
        let mut sum = 0u64;
        for &offset in &self.offsets {
            let mut value = [0; 8];
            read_at(&self.file, &mut value, offset)?;
            sum = sum.wrapping_add(u64::from_ne_bytes(value));
        }
        Ok(sum)
    }
}

fn read_at(file: &OwnedFd, into: &mut [u8], offset: u64) -> io::Result<()> {
    let read = rustix::io::pread(file, &mut *into, offset)?;
    if read == into.len() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Where the values of [`FAULTS`] lie.
fn offsets(file: &OwnedFd) -> io::Result<Vec<u64>> {
    let mut header = [0; HEADER_BYTES];
    read_at(file, &mut header, 0)?;
    let [_, name_bytes, count, _, descriptors, data] =
        std::array::from_fn(|index| u32::from_ne_bytes(std::array::from_fn(|byte| header[index * 4 + byte])));
    let (name_bytes, count) = (name_bytes as usize, count as usize);
    if count > MAX_DESCRIPTORS || name_bytes > MAX_NAME {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut all = vec![0; count * (DESCRIPTOR_BYTES + name_bytes)];
    read_at(file, &mut all, descriptors.into())?;
    Ok(all.chunks_exact(DESCRIPTOR_BYTES + name_bytes).filter_map(|one| offset_of(one, data.into())).collect())
}

/// Where a descriptor's value lies, if it is one of [`FAULTS`].
fn offset_of(descriptor: &[u8], data: u64) -> Option<u64> {
    let (fixed, name) = descriptor.split_at_checked(DESCRIPTOR_BYTES)?;
    let name = name.split(|&byte| byte == 0).next()?;
    let is_wanted = FAULTS.iter().any(|wanted| wanted.as_bytes() == name);
    let offset = u32::from_ne_bytes(fixed.get(8..12)?.try_into().ok()?);
    is_wanted.then(|| data + u64::from(offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_tells_its_name_and_its_place() {
        let descriptor = |name: &str, offset: u32| {
            let mut bytes = vec![0; DESCRIPTOR_BYTES];
            bytes[8..12].copy_from_slice(&offset.to_ne_bytes());
            bytes.extend(name.bytes().chain(std::iter::repeat(0)).take(48));
            bytes
        };
        assert_eq!(offset_of(&descriptor("pf_fixed", 24), 1000), Some(1024));
        assert_eq!(offset_of(&descriptor("pf_fixed_elsewhere", 24), 1000), None);
        assert_eq!(offset_of(&[0; 3], 1000), None);
    }

    #[test]
    fn this_kernels_file_is_read() {
        let kvm = kvm_ioctls::Kvm::new();
        let Ok(kvm) = kvm else { return };
        let vm = kvm.create_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        // Before Linux 5.14 there is no file.
        let Some(faults) = VcpuFaults::open(&vcpu) else { return };
        assert_eq!(faults.count().unwrap(), 0, "it has never run");
        assert_eq!(faults.offsets.len(), 2);
    }
}
