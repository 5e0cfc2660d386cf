//! A Linux guest: its kernel found once, its processes named as often as they are asked for.
//!
//! Owns the order in which one thing leads to the next, and what is said when it does not. Must not know where the addresses on the vCPUs
//! come from, nor what the names are for.

use std::collections::BTreeMap;
use std::fmt;

use super::image::{self, Image, Marks};
use super::layout::Layout;
use super::paging::{Levels, Virtual, root_of};
use super::reader::{ReadError, Reader};
use super::symbols::Symbols;
use super::tasks::Tasks;
use crate::btf::KernelTypes;
use crate::model::{AddressSpace, Gpa, GuestProcess, Gva};
use crate::port::{GuestMemory, GuestMemoryError};

/// What finding may read, in bytes: several images of the largest kernels.
const FIND_BYTES: u64 = 2 << 30;
/// What naming may read, in bytes: some hundred thousand processes.
const NAME_BYTES: u64 = 512 << 20;
/// The most type information that is read, in bytes; kernels have 4 to 10 MiB.
const MAX_TYPES_BYTES: u64 = 32 << 20;
/// Places that look like type information and are read.
const MAX_TYPES: usize = 16;
/// Root tables that are tried.
const MAX_ROOTS: usize = 64;
/// Root tables that are kept, of the oldest processes: these live longest.
const KEPT_ROOTS: usize = 8;
/// Of a pair of root tables under page-table isolation, the processor has the other in user mode (`PTI_PGTABLE_SWITCH_BIT`).
const TWIN: u64 = 1 << 12;

/// Why a guest's processes cannot be named.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum GuestOsError {
    /// Nothing to begin with.
    #[error("no address space has been seen on the guest's vCPUs yet")]
    NoAddressSpace,
    /// The window where a kernel is mapped is empty in all of them.
    #[error(
        "no 64-bit Linux kernel is mapped in the address spaces seen on the guest's vCPUs: it runs another system, or has not finished booting"
    )]
    NoKernel,
    /// There is no type information in the kernel.
    #[error(
        "the guest's kernel ({}) carries no type information (CONFIG_DEBUG_INFO_BTF): give it as a file, made from the same kernel's vmlinux by `pahole --btf_encode_detached`",
        release.as_deref().unwrap_or("of unknown version")
    )]
    NoTypes {
        /// What the kernel says that it is.
        release: Option<String>,
    },
    /// There is some, of another kernel or of none.
    #[error("the type information lacks {missing}: it is not that of the guest's Linux kernel")]
    WrongTypes {
        /// What was looked for.
        missing: &'static str,
    },
    /// The list of processes has no beginning.
    #[error(
        "the list of processes was not found in the guest's kernel: it has not finished booting, or its data cannot be told apart; a System.map or a copy of the guest's /proc/kallsyms tells where it is"
    )]
    NoProcesses,
    /// What the operator gave leads elsewhere.
    #[error(
        "no process list is found in the guest's kernel ({}) by the given {what}: give those of that very kernel, or it has not finished booting",
        release.as_deref().unwrap_or("of unknown version"),
    )]
    WrongHints {
        /// What it was.
        what: Given,
        /// What the kernel says that it is.
        release: Option<String>,
    },
    /// It was found, and is there no more.
    #[error("the guest's kernel is no longer where it was: it has restarted, and must be found again")]
    Moved,
    /// More was to be read than any kernel has.
    #[error("the guest's page tables or lists do not end")]
    TooMuch,
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] GuestMemoryError),
}

impl GuestOsError {
    /// How far it got: the error of the address space that led furthest is told.
    fn rank(&self) -> u32 {
        match self {
            Self::NoAddressSpace => 0,
            Self::NoKernel => 1,
            Self::NoTypes { .. } => 2,
            Self::WrongTypes { .. } => 3,
            Self::NoProcesses | Self::WrongHints { .. } => 4,
            Self::Moved | Self::TooMuch | Self::Memory(_) => 5,
        }
    }
}

/// What leads nowhere is an error of its own kind at each place; here it was not expected.
fn failed(error: ReadError, otherwise: GuestOsError) -> GuestOsError {
    match error {
        ReadError::Unmapped => otherwise,
        ReadError::Exhausted => GuestOsError::TooMuch,
        ReadError::Memory(error) => error.into(),
    }
}

/// What an operator knows of a guest's kernel. Nothing need be given.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hints<'a> {
    /// Its symbols.
    pub symbols: Option<&'a Symbols>,
    /// Its type information.
    pub types: Option<&'a KernelTypes>,
}

impl Hints<'_> {
    /// What of it there is.
    fn given(&self) -> Option<Given> {
        match (self.symbols, self.types) {
            (None, None) => None,
            (Some(_), None) => Some(Given::Symbols),
            (None, Some(_)) => Some(Given::Types),
            (Some(_), Some(_)) => Some(Given::Both),
        }
    }
}

/// What an operator gave that may be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Given {
    /// Symbols.
    Symbols,
    /// Type information.
    Types,
    /// Both: either may be wrong.
    Both,
}

impl fmt::Display for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Symbols => "symbols",
            Self::Types => "types (BTF)",
            Self::Both => "symbols and types (BTF)",
        })
    }
}

/// Where something was taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The guest's memory.
    Guest,
    /// The operator gave it.
    Operator,
}

/// A Linux kernel in a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinuxGuest {
    layout: Layout,
    levels: Levels,
    init_task: Gva,
    /// The kernel's own root table, which lives as long as it does.
    own_root: Option<Gpa>,
    /// Others, which may go.
    roots: Vec<Gpa>,
    /// What the kernel says that it is (`uname -r`), where it says so; printable.
    pub release: Option<String>,
    /// Where the structures' layout is from.
    pub types_from: Origin,
    /// Where the place of the first task is from.
    pub first_task_from: Origin,
}

/// The processes of a guest at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Processes {
    spaces: BTreeMap<AddressSpace, GuestProcess>,
    isolated: bool,
    whole: bool,
}

impl Processes {
    /// Whose address space a vCPU has in CR3; flag bits do not matter. While the guest's kernel works for nobody, or runs a thread of its
    /// own, that may be the last process's.
    pub fn get(&self, space: AddressSpace) -> Option<&GuestProcess> {
        let root = root_of(space).0;
        let root = if self.isolated { root & !TWIN } else { root };
        self.spaces.get(&AddressSpace(root))
    }

    /// All of them, each with its address space as the kernel has it. Processes that share one are told as the oldest.
    pub fn iter(&self) -> impl Iterator<Item = (AddressSpace, &GuestProcess)> {
        self.spaces.iter().map(|(space, process)| (*space, process))
    }

    /// Whether the guest keeps two root tables for each process (page-table isolation); [`Processes::get`] takes either.
    pub fn is_isolated(&self) -> bool {
        self.isolated
    }

    /// Whether the list was read from end to end. If not, the guest changed it each time, and some may be missing.
    pub fn is_whole(&self) -> bool {
        self.whole
    }
}

impl LinuxGuest {
    /// Finds the kernel of a running guest. Takes as long as reading its image does: tens of MiB.
    ///
    /// `roots` are what was seen in CR3 of its vCPUs; any one will do while its process lives.
    ///
    /// # Errors
    /// Which step failed in the address space that led furthest, and what would help.
    pub fn find(memory: &dyn GuestMemory, roots: &[AddressSpace], hints: &Hints<'_>) -> Result<Self, GuestOsError> {
        Self::find_within(FIND_BYTES, memory, roots, hints)
    }

    /// The same, with a budget in bytes.
    pub(super) fn find_within(
        budget_bytes: u64,
        memory: &dyn GuestMemory,
        roots: &[AddressSpace],
        hints: &Hints<'_>,
    ) -> Result<Self, GuestOsError> {
        let reader = Reader::new(memory, budget_bytes);
        let mut worst = GuestOsError::NoAddressSpace;
        let mut looked_through = Vec::new();
        for &root in roots.iter().take(MAX_ROOTS) {
            let root = root_of(root);
            let twin = (root.0 & TWIN != 0).then_some(Gpa(root.0 & !TWIN));
            for root in [root].into_iter().chain(twin) {
                for levels in [Levels::Four, Levels::Five] {
                    let space = Virtual::new(&reader, root, levels);
                    let found = Image::of(&space).map_err(|error| failed(error, GuestOsError::NoKernel));
                    let error = match found {
                        Ok(None) => GuestOsError::NoKernel,
                        Ok(Some(image)) if looked_through.contains(&image.stretches) => continue,
                        Ok(Some(image)) => match Self::in_image(&space, &image, hints) {
                            Ok(guest) => return Ok(guest),
                            Err(error) => {
                                looked_through.push(image.stretches);
                                error
                            }
                        },
                        Err(error) => error,
                    };
                    if matches!(error, GuestOsError::Memory(_)) {
                        return Err(error);
                    }
                    if error.rank() > worst.rank() {
                        worst = error;
                    }
                }
            }
        }
        Err(worst)
    }

    fn in_image(space: &Virtual<'_>, image: &Image, hints: &Hints<'_>) -> Result<Self, GuestOsError> {
        let marks = image.marks(space).map_err(|error| failed(error, GuestOsError::NoKernel))?;
        let (layout, types_from) = match hints.types {
            Some(types) => (layout_of(types)?, Origin::Operator),
            None => (layout_in(space, image, &marks)?, Origin::Guest),
        };
        let is_first = |at: Gva| {
            let tasks = Tasks { space, layout: &layout, first: at };
            tasks.is_first().map_err(|error| failed(error, GuestOsError::NoProcesses))
        };
        let nowhere = || match hints.given() {
            // Whoever gave the right ones gets as far as the guest does.
            Some(what) => GuestOsError::WrongHints { what, release: marks.release.clone() },
            None => GuestOsError::NoProcesses,
        };
        let (init_task, first_task_from) = match hints.symbols {
            Some(symbols) => {
                // Both are below the last address: an image begins in its window, and the offset is less than that is long.
                let at = Gva(image.start().0 + symbols.init_task);
                if !is_first(at)? {
                    return Err(nowhere());
                }
                (at, Origin::Operator)
            }
            None => {
                let mut found = None;
                for name in &marks.idle_names {
                    let at = Gva(name.0.wrapping_sub(u64::from(layout.comm)));
                    if is_first(at)? {
                        found = Some(at);
                        break;
                    }
                }
                (found.ok_or_else(nowhere)?, Origin::Guest)
            }
        };
        // A copy of the kernel's table in which nothing can be found is none.
        let own_root = match marks.root {
            Some(root) => {
                let own = Virtual::new(space.physical(), root, space.levels());
                let tasks = Tasks { space: &own, layout: &layout, first: init_task };
                let fits = tasks.is_first().map_err(|error| failed(error, GuestOsError::NoProcesses))?;
                fits.then_some(root)
            }
            None => None,
        };
        let roots = vec![space.root()];
        Ok(Self {
            layout,
            levels: space.levels(),
            init_task,
            own_root,
            roots,
            release: marks.release,
            types_from,
            first_task_from,
        })
    }

    /// Names all processes that have an address space, as they are now.
    ///
    /// # Errors
    /// The guest has restarted, its lists do not end, or its memory cannot be read.
    pub fn processes(&mut self, memory: &dyn GuestMemory) -> Result<Processes, GuestOsError> {
        self.processes_within(NAME_BYTES, memory)
    }

    /// The same, with a budget in bytes.
    pub(super) fn processes_within(
        &mut self,
        budget_bytes: u64,
        memory: &dyn GuestMemory,
    ) -> Result<Processes, GuestOsError> {
        let reader = Reader::new(memory, budget_bytes);
        let moved = |error| failed(error, GuestOsError::Moved);
        for root in self.own_root.into_iter().chain(self.roots.iter().copied()) {
            let space = Virtual::new(&reader, root, self.levels);
            let tasks = Tasks { space: &space, layout: &self.layout, first: self.init_task };
            if !tasks.is_first().map_err(moved)? {
                continue;
            }
            let walk = tasks.walk().map_err(moved)?;
            let roots: Vec<Gpa> = walk.processes.iter().map(|process| process.root).take(KEPT_ROOTS).collect();
            let isolated = isolated(&reader, &roots).map_err(moved)?;
            let mut spaces = BTreeMap::new();
            if let Some(own) = self.own_root {
                spaces.insert(AddressSpace(own.0), tasks.kernel().map_err(moved)?);
            }
            for found in walk.processes {
                spaces.entry(AddressSpace(found.root.0)).or_insert(found.process);
            }
            if !roots.is_empty() {
                self.roots = roots;
            }
            return Ok(Processes { spaces, isolated, whole: walk.whole });
        }
        Err(GuestOsError::Moved)
    }
}

/// The layout by what an operator gave.
fn layout_of(types: &KernelTypes) -> Result<Layout, GuestOsError> {
    Layout::of(types).map_err(|missing| GuestOsError::WrongTypes { missing })
}

/// The layout by the first type information in the image that has it.
fn layout_in(space: &Virtual<'_>, image: &Image, marks: &Marks) -> Result<Layout, GuestOsError> {
    let none = || GuestOsError::NoTypes { release: marks.release.clone() };
    let mut worst = none();
    for &at in marks.types.iter().take(MAX_TYPES) {
        let mut header = [0; 24];
        let types = space.read(at, &mut header).and_then(|()| {
            let bytes = KernelTypes::announced_len(&header);
            let bytes = bytes.filter(|&bytes| bytes <= MAX_TYPES_BYTES.min(image.bytes_from(at)));
            let mut bytes = vec![0; bytes.ok_or(ReadError::Unmapped)? as usize];
            space.read(at, &mut bytes)?;
            KernelTypes::parse(&bytes).map_err(|_| ReadError::Unmapped)
        });
        let error = match types {
            // Other programs carry such information too, the kernel's own BPF programs among them.
            Ok(types) if types.size_of("task_struct").is_none() => none(),
            Ok(types) => match layout_of(&types) {
                Ok(layout) => return Ok(layout),
                Err(error) => error,
            },
            Err(error) => failed(error, none()),
        };
        if error.rank() > worst.rank() {
            worst = error;
        }
    }
    Err(worst)
}

/// Whether processes have two root tables, by the oldest ones.
fn isolated(reader: &Reader<'_>, roots: &[Gpa]) -> Result<bool, ReadError> {
    // The pair is one allocation, aligned to its size.
    if roots.iter().any(|root| root.0 & TWIN != 0) {
        return Ok(false);
    }
    for root in roots {
        match image::are_twins(reader, *root, Gpa(root.0 | TWIN)) {
            Ok(true) => return Ok(true),
            Ok(false) | Err(ReadError::Unmapped) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}
