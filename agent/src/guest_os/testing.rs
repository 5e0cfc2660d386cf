//! A guest made by hand: RAM, page tables, and as much of a Linux kernel as naming its processes takes.
//!
//! Owns nothing that is true of any real kernel but the form. For this module's tests and for fuzzing.

use std::cell::{Cell, RefCell};
use std::sync::OnceLock;

use super::layout::{Layout, Threads};
use super::linux::{Hints, LinuxGuest};
use super::paging::Levels;
use crate::model::{AddressSpace, Gpa, MemoryRange};
use crate::port::{GuestMemory, GuestMemoryError};

/// What the guest does while it is read: gets the bytes and the number of the read.
type Meanwhile = Box<dyn FnMut(&mut [u8], u64) + Send>;

/// RAM from address zero on, of which is counted how much was read.
pub(super) struct GuestRam {
    bytes: RefCell<Vec<u8>>,
    range: [MemoryRange; 1],
    bytes_read: Cell<u64>,
    reads: Cell<u64>,
    meanwhile: RefCell<Option<Meanwhile>>,
}

impl GuestRam {
    /// All zero.
    pub(super) fn new(bytes: usize) -> Self {
        Self::of(vec![0; bytes])
    }

    /// These bytes.
    pub(super) fn of(bytes: Vec<u8>) -> Self {
        let range = [MemoryRange { start: Gpa(0), bytes: bytes.len() as u64 }];
        let (bytes_read, reads) = (Cell::new(0), Cell::new(0));
        Self { bytes: RefCell::new(bytes), range, bytes_read, reads, meanwhile: RefCell::new(None) }
    }

    /// Writes where there is RAM.
    pub(super) fn write(&self, at: u64, bytes: &[u8]) {
        self.bytes.borrow_mut()[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn bytes_read(&self) -> u64 {
        self.bytes_read.get()
    }

    /// Has this done before each read.
    #[cfg(test)]
    pub(super) fn meanwhile(&self, what: impl FnMut(&mut [u8], u64) + Send + 'static) {
        *self.meanwhile.borrow_mut() = Some(Box::new(what));
    }
}

impl GuestMemory for GuestRam {
    fn ranges(&self) -> &[MemoryRange] {
        &self.range
    }

    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), GuestMemoryError> {
        if !self.range[0].contains(at, into.len() as u64) {
            return Err(GuestMemoryError::NotRam(at));
        }
        self.bytes_read.set(self.bytes_read.get() + into.len() as u64);
        self.reads.set(self.reads.get() + 1);
        if let Some(meanwhile) = self.meanwhile.borrow_mut().as_mut() {
            meanwhile(&mut self.bytes.borrow_mut(), self.reads.get());
        }
        into.copy_from_slice(&self.bytes.borrow()[at.0 as usize..][..into.len()]);
        Ok(())
    }
}

/// Page tables, made in the order in which they are needed.
pub(super) struct Tables {
    pub(super) root: Gpa,
    next: u64,
    levels: Levels,
}

impl Tables {
    /// None but the root, at `at`; the others follow.
    #[cfg(test)]
    pub(super) fn new(at: Gpa, levels: Levels) -> Self {
        Self { root: at, next: at.0 + 0x1000, levels }
    }

    /// Maps one page of 4 KiB, 2 MiB or 1 GiB.
    pub(super) fn map(&mut self, ram: &GuestRam, from: u64, to: u64, bytes: u64) {
        let leaf = (bytes.trailing_zeros() - 12) / 9 + 1;
        let mut table = self.root.0;
        for level in (leaf..=self.levels as u32).rev() {
            let at = table + (from >> (12 + 9 * (level - 1)) & 511) * 8;
            let mut entry = [0; 8];
            entry.copy_from_slice(&ram.bytes.borrow()[at as usize..][..8]);
            let entry = u64::from_le_bytes(entry);
            if level == leaf {
                // Present, writable, accessed, and large above the last level; no-execute, which must be left out of the address.
                let large = u64::from(level > 1) << 7;
                ram.write(at, &(to | 0x23 | large | 1 << 63).to_le_bytes());
            } else if entry & 1 == 1 {
                table = entry & dunlin_ebpf::TABLE_ADDRESS;
            } else {
                ram.write(at, &(self.next | 0x27).to_le_bytes());
                table = self.next;
                self.next += 0x1000;
            }
        }
    }
}

/// Where members lie by [`types`].
#[cfg(test)]
pub(super) const LAYOUT: Layout = SAMPLE_LAYOUT;
const SAMPLE_LAYOUT: Layout = Layout {
    tasks: 32,
    mm: 48,
    pid: 16,
    tgid: 20,
    comm: 80,
    comm_bytes: 16,
    signal: 56,
    pgd: 32,
    threads: Some(Threads { count: 8, head: 16, node: 64 }),
};

/// Type information of such a kernel, without what is `missing` (`STRUCTURE` or `STRUCTURE.MEMBER`).
pub(crate) fn types(missing: &[&str]) -> Vec<u8> {
    const LIST: u32 = 2;
    const POINTER: u32 = 6;
    let mut strings = vec![0u8];
    let mut name = |text: &str| {
        let at = strings.len() as u32;
        strings.extend(text.as_bytes());
        strings.push(0);
        if text.is_empty() { 0 } else { at }
    };
    let mut words: Vec<u32> = Vec::new();
    let mut structure = |words: &mut Vec<u32>, own: &str, bytes: u32, members: &[(&str, u32, u32)]| {
        let there: Vec<_> = members.iter().filter(|m| !missing.contains(&format!("{own}.{}", m.0).as_str())).collect();
        words.extend([name(if missing.contains(&own) { "other" } else { own }), 4 << 24 | there.len() as u32, bytes]);
        for (member, id, at) in there {
            words.extend([name(member), *id, at * 8]);
        }
    };
    words.extend([0, 1 << 24, 4, 32]);
    structure(&mut words, "list_head", 16, &[("next", 3, 0), ("prev", 3, 8)]);
    words.extend([0, 2 << 24, LIST]);
    words.extend([0, 1 << 24, 1, 8]);
    words.extend([0, 3 << 24, 0, 4, 1, 16]);
    words.extend([0, 2 << 24, 0]);
    let l = SAMPLE_LAYOUT;
    let members = [
        ("pid", 1, l.pid),
        ("tgid", 1, l.tgid),
        ("tasks", LIST, l.tasks),
        ("mm", POINTER, l.mm),
        ("signal", POINTER, l.signal),
        ("thread_node", LIST, 64),
        ("comm", 5, l.comm),
    ];
    structure(&mut words, "task_struct", 128, &members);
    // The root table is in a structure without a name, as it is in Linux.
    let pgd: &[_] = if missing.contains(&"mm_struct.pgd") { &[] } else { &[("pgd", POINTER, 24)] };
    structure(&mut words, "", 48, pgd);
    structure(&mut words, "mm_struct", 64, &[("", 8, 8)]);
    structure(&mut words, "signal_struct", 32, &[("nr_threads", 1, 8), ("thread_head", LIST, 16)]);
    let types_bytes = words.len() as u32 * 4;
    let mut bytes = vec![0x9f, 0xeb, 1, 0];
    for word in [24, 0, types_bytes, types_bytes, strings.len() as u32] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    bytes.extend(strings);
    bytes
}

/// Fuzzing: type information.
pub(crate) fn type_seeds() -> Vec<Vec<u8>> {
    vec![types(&[]), types(&["task_struct.tasks"])]
}

/// A process to be.
pub(super) struct Wanted {
    pub(super) pid: u32,
    pub(super) name: &'static [u8],
    /// Zero: a thread of the kernel.
    pub(super) threads: u32,
}

/// What kind of kernel.
#[derive(Clone, Copy)]
pub(super) struct Kind {
    pub(super) levels: Levels,
    /// Two root tables for each process.
    pub(super) isolated: bool,
    pub(super) with_types: bool,
    /// The kernel's own root table is where it should be.
    pub(super) own_root: bool,
}

impl Default for Kind {
    fn default() -> Self {
        Self { levels: Levels::Four, isolated: false, with_types: true, own_root: true }
    }
}

/// A guest, and where in it things lie.
pub(super) struct SampleGuest {
    pub(super) ram: GuestRam,
    /// Of each process that has one, in order: what is in CR3 when it runs in the kernel.
    pub(super) roots: Vec<AddressSpace>,
    pub(super) own_root: AddressSpace,
    /// Of each task in order, the first task before them.
    pub(super) tasks: Vec<Gpa>,
}

const TABLES: u64 = 0x1_0000;
const IMAGE: u64 = 0x8_0000;
const IMAGE_BYTES: u64 = 0x2_0000;
const HEAP: u64 = 0xa_0000;
const RAM_BYTES: usize = 0xc_0000;
/// In the image.
const TYPES_AT: u64 = 0x1000;
const OWN_ROOT_AT: u64 = 0x8000;
const INIT_TASK_AT: u64 = 0xa240;
/// Where address randomisation has put the image.
pub(super) const TEXT: u64 = 0xffff_ffff_8ae0_0000;

/// How far the first task is from `_text`.
#[cfg(test)]
pub(super) const INIT_TASK_OFFSET: u64 = INIT_TASK_AT;

/// Where all RAM is mapped for the kernel.
pub(super) fn direct_map(levels: Levels) -> u64 {
    if levels == Levels::Four { 0xffff_9a80_0000_0000 } else { 0xff2a_0000_0000_0000 }
}

impl SampleGuest {
    pub(super) fn new(kind: Kind, wanted: &[Wanted]) -> Self {
        let (layout, base) = (SAMPLE_LAYOUT, direct_map(kind.levels));
        let ram = GuestRam::new(RAM_BYTES);
        let own_root = Gpa(if kind.own_root { IMAGE + OWN_ROOT_AT } else { TABLES });
        let mut tables = Tables { root: own_root, next: TABLES + 0x2000, levels: kind.levels };
        for page in (0..IMAGE_BYTES).step_by(0x1000) {
            tables.map(&ram, TEXT + page, IMAGE + page, 0x1000);
        }
        tables.map(&ram, base, 0, 2 << 20);
        let mut upper = vec![0; 2048];
        upper.copy_from_slice(&ram.bytes.borrow()[own_root.0 as usize + 2048..][..2048]);
        // What only looks like something.
        ram.write(IMAGE + 0x100, b"swapper\0");
        ram.write(IMAGE + 0x200, &[0x9f, 0xeb, 1, 0, 24, 0, 0, 0]);
        ram.write(IMAGE + 0x7f8, b"kthreadd\0swapper/0\0");
        ram.write(IMAGE + 0x300, b"Linux version 6.1.0-dunlin (nobody@nowhere)");
        if kind.with_types {
            ram.write(IMAGE + TYPES_AT, &types(&[]));
        }
        let put = |at: u64, value: u64| ram.write(at, &value.to_le_bytes());
        let init_task = TEXT + INIT_TASK_AT;
        let (mut tasks, mut addresses, mut roots) = (vec![Gpa(IMAGE + INIT_TASK_AT)], vec![init_task], Vec::new());
        ram.write(tasks[0].0 + u64::from(layout.comm), b"swapper/0");
        let mut next_root = tables.next.next_multiple_of(0x2000);
        for (index, process) in wanted.iter().enumerate() {
            let task = HEAP + index as u64 * 0x1000;
            let (mm, signal) = (task + 0x400, task + 0x800);
            ram.write(task + u64::from(layout.pid), &process.pid.to_le_bytes());
            ram.write(task + u64::from(layout.tgid), &process.pid.to_le_bytes());
            ram.write(task + u64::from(layout.comm), process.name);
            put(task + u64::from(layout.signal), base + signal);
            let head = signal + 16;
            put(head, base + task + 64);
            put(task + 64, base + head);
            ram.write(signal + 8, &process.threads.max(1).to_le_bytes());
            if process.threads > 0 {
                put(task + u64::from(layout.mm), base + mm);
                put(mm + u64::from(layout.pgd), base + next_root);
                ram.write(next_root + 2048, &upper);
                // Its own program.
                put(next_root, (next_root + 0x1000) | 0x67 | 1 << 63);
                if kind.isolated {
                    put(next_root + 0x1000, (next_root + 0x1000) | 0x67);
                }
                roots.push(AddressSpace(next_root));
                next_root += if kind.isolated { 0x2000 } else { 0x1000 };
            }
            tasks.push(Gpa(task));
            addresses.push(base + task);
        }
        assert!(next_root <= IMAGE && HEAP as usize + wanted.len() * 0x1000 <= RAM_BYTES, "too many for this RAM");
        for (index, task) in tasks.iter().enumerate() {
            let links = |index: usize| addresses[index % addresses.len()] + u64::from(layout.tasks);
            put(task.0 + u64::from(layout.tasks), links(index + 1));
            put(task.0 + u64::from(layout.tasks) + 8, links(index + addresses.len() - 1));
        }
        Self { ram, roots, own_root: AddressSpace(own_root.0), tasks }
    }

    /// Where the links of the task at `index` lie.
    pub(super) fn links(&self, index: usize) -> u64 {
        self.tasks[index].0 + u64::from(SAMPLE_LAYOUT.tasks)
    }
}

/// Three processes and a thread of the kernel between them.
pub(super) fn some() -> Vec<Wanted> {
    let of = |pid, name: &'static [u8], threads| Wanted { pid, name, threads };
    vec![of(1, b"init", 1), of(2, b"kthreadd", 0), of(70, b"postgres", 4), of(71, b"ten chars\xff\x07", 1)]
}

/// Fuzzing: the kinds of guests.
fn kinds() -> [Kind; 4] {
    let kind = Kind::default();
    [kind, Kind { levels: Levels::Five, ..kind }, Kind { isolated: true, ..kind }, Kind { own_root: false, ..kind }]
}

/// Bytes of one change of the guest's memory: an address, and the word that is put there.
const CHANGE_BYTES: usize = 12;
const FUZZ_BYTES: u64 = 16 << 20;

/// Fuzzing: the first byte chooses a guest; what follows are changes of its memory, or for odd ones the memory itself. Promises: an end
/// within the budget, and names that are printable.
pub(crate) fn fuzz(input: &[u8]) {
    static SAMPLES: OnceLock<Vec<(Vec<u8>, AddressSpace)>> = OnceLock::new();
    let samples = SAMPLES.get_or_init(|| {
        let guests = kinds().map(|kind| SampleGuest::new(kind, &some()));
        guests.map(|guest| (guest.ram.bytes.borrow().clone(), guest.roots[0])).into()
    });
    let Some((&choice, rest)) = input.split_first() else { return };
    let (ram, root) = if choice & 1 == 0 {
        let (bytes, root) = &samples[usize::from(choice >> 1) % samples.len()];
        let ram = GuestRam::of(bytes.clone());
        for change in rest.chunks_exact(CHANGE_BYTES) {
            let at = u32::from_le_bytes([change[0], change[1], change[2], change[3]]) % (RAM_BYTES as u32 - 8);
            ram.write(u64::from(at), &change[4..]);
        }
        (ram, *root)
    } else {
        let mut bytes: Vec<u8> = rest.iter().copied().cycle().take(if rest.is_empty() { 0 } else { 0x8000 }).collect();
        bytes.resize(0x8000, 0);
        (GuestRam::of(bytes), AddressSpace(0x1000))
    };
    if let Ok(mut guest) = LinuxGuest::find_within(FUZZ_BYTES, &ram, &[root], &Hints::default())
        && let Ok(processes) = guest.processes_within(FUZZ_BYTES, &ram)
    {
        for (space, process) in processes.iter() {
            assert!(processes.get(space).is_some() || processes.is_isolated());
            assert!(!process.name.contains(char::is_control) && process.name.chars().count() <= 64);
        }
    }
    assert!(ram.bytes_read() <= 2 * FUZZ_BYTES, "{} bytes were read", ram.bytes_read());
}

/// Fuzzing: guests as they are, and with one word changed where it matters.
pub(crate) fn fuzz_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (index, kind) in kinds().into_iter().enumerate() {
        let guest = SampleGuest::new(kind, &some());
        let choice = (index as u8) << 1;
        let heap = direct_map(kind.levels) + HEAP;
        let change = |at: u64, word: u64| [&[choice][..], &(at as u32).to_le_bytes(), &word.to_le_bytes()].concat();
        seeds.push(vec![choice]);
        for task in 0..guest.tasks.len() {
            // A list that leads to itself, backwards, nowhere.
            seeds.push(change(guest.links(task), heap + 32));
            seeds.push(change(guest.links(task) + 8, heap + 32));
            seeds.push(change(guest.links(task), 0xdead_0000_0000_0122));
        }
        seeds.push(change(HEAP + 48, heap));
        seeds.push(change(HEAP + 56, heap));
        seeds.push(change(HEAP + 0x400 + 32, heap));
        seeds.push(change(HEAP + 80, 0x1b5b_3331_6d41_4141));
        seeds.push(change(guest.roots[0].0 + 511 * 8, guest.roots[0].0 | 0x67));
        seeds.push(change(guest.own_root.0 + 511 * 8, guest.own_root.0 | 0x67));
        for word in 0..40 {
            seeds.push(change(IMAGE + TYPES_AT + word * 8, 0x0400_0003_0000_0001));
        }
    }
    // Root tables that lead to themselves.
    seeds.push([&[1u8][..], &0x1067u64.to_le_bytes()].concat());
    seeds
}
