//! The system in a guest, from outside: which of its processes an address space belongs to.
//!
//! Owns what is known of a guest's kernel: its page tables, where it maps itself, the structures that it lists its processes in. Reads through
//! [`crate::port::GuestMemory`] alone; must not know where that memory is, who saw an address space, nor what a name is for. The guest
//! does not help, and nothing in its memory is trusted: every walk has a budget, every name is made printable. A guest can lie about its
//! processes; it cannot make the reader do anything but repeat the lie.
//!
//! How, for Linux on x86-64, where nothing need be given: any CR3 maps the kernel (under page-table isolation, the other of its pair does);
//! the kernel's image carries its own type information, which tells where members lie; the first task is found in the image by its name and
//! by what must be true of it; from there on there is a list.
//!
//! What is said of the guest is what its memory said at that moment. A thread of the kernel has no address space of its own and runs in that
//! of whoever ran before it, so that what it writes is told as that process's.

mod image;
mod layout;
mod linux;
mod paging;
mod reader;
mod symbols;
mod tasks;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use linux::{Given, GuestOsError, Hints, LinuxGuest, Origin, Processes};
pub use symbols::{Symbols, SymbolsError};
#[cfg(any(test, feature = "fuzz"))]
pub(crate) use symbols::{fuzz as fuzz_symbols, fuzz_seeds as symbol_seeds};
