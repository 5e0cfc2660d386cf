//! `process_vm_readv(2)`: another process's memory, many pieces a call.
//!
//! Owns the iovecs. Must not know what is read.

use std::io;

/// Pieces that one call takes: `UIO_MAXIOV` of include/uapi/linux/uio.h.
pub(super) const MOST_PIECES: usize = 1024;

/// Fills each buffer from its address in process `pid`; says how many bytes were filled, which ends at the first page that cannot be read.
///
/// # Errors
/// `EFAULT`: the first page already; `EPERM`: rights; `ESRCH`: no such process; `EINVAL`: more than [`MOST_PIECES`].
pub(super) fn read(pid: u32, pieces: &mut [(u64, &mut [u8])]) -> io::Result<usize> {
    let remote: Vec<libc::iovec> = pieces
        .iter()
        .map(|(address, into)| libc::iovec {
            iov_base: std::ptr::without_provenance_mut(*address as usize),
            iov_len: into.len(),
        })
        .collect();
    let local: Vec<libc::iovec> = pieces
        .iter_mut()
        .map(|(_, into)| libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() })
        .collect();
    let count = pieces.len() as libc::c_ulong;
    // SAFETY: the kernel writes only into the local vectors, each of which is a buffer borrowed mutably through the call; it checks the
    // remote addresses against the other process's address space and never uses them in ours.
    let got = unsafe { libc::process_vm_readv(pid as libc::pid_t, local.as_ptr(), count, remote.as_ptr(), count, 0) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_filled_up_to_the_first_that_is_not_there() {
        let (from, pid) = (vec![7u8; 100], std::process::id());
        let address = from.as_ptr() as u64;
        let (mut first, mut second, mut third) = ([0; 10], [0; 20], [0; 4]);
        let mut pieces: [(u64, &mut [u8]); 3] =
            [(address, &mut first), (address + 50, &mut second), (4096, &mut third)];
        assert_eq!(read(pid, &mut pieces).unwrap(), 30);
        assert!(first == [7; 10] && second == [7; 20] && third == [0; 4]);
        let error = read(pid, &mut [(4096, &mut third)]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    }
}
