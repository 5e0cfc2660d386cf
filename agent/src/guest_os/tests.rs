//! Whole guests, made by hand, of which everything is known; and what a guest may do to whoever reads it.

use super::paging::Levels;
use super::testing::{INIT_TASK_OFFSET, Kind, SampleGuest, TEXT, Wanted, direct_map, some, types};
use super::*;
use crate::btf::KernelTypes;
use crate::model::{AddressSpace, GuestProcess};
use crate::port::GuestMemory;

fn process(pid: u32, name: &str, threads: u32) -> GuestProcess {
    GuestProcess { pid, name: name.to_owned(), threads: Some(threads) }
}

/// What [`some`] are.
fn names() -> [GuestProcess; 3] {
    [process(1, "init", 1), process(70, "postgres", 4), process(71, "ten chars??", 1)]
}

fn find(guest: &SampleGuest) -> LinuxGuest {
    LinuxGuest::find(&guest.ram, &guest.roots[..1], &Hints::default()).unwrap()
}

fn named(processes: &Processes, roots: &[AddressSpace]) -> Vec<Option<GuestProcess>> {
    roots.iter().map(|root| processes.get(*root).cloned()).collect()
}

#[test]
fn processes_are_named_with_no_help_in_every_kind_of_kernel() {
    for levels in [Levels::Four, Levels::Five] {
        for (isolated, own_root) in [(false, true), (true, true), (false, false), (true, false)] {
            let kind = Kind { levels, isolated, own_root, ..Kind::default() };
            let guest = SampleGuest::new(kind, &some());
            // Flag bits of CR3: a PCID, and "do not flush".
            let seen = AddressSpace(guest.roots[1].0 | 0x801 | 1 << 63);
            let mut linux = LinuxGuest::find(&guest.ram, &[seen], &Hints::default()).unwrap();
            assert_eq!(linux.release.as_deref(), Some("6.1.0-dunlin"));
            assert_eq!((linux.types_from, linux.first_task_from), (Origin::Guest, Origin::Guest));
            let processes = linux.processes(&guest.ram).unwrap();
            assert_eq!(named(&processes, &guest.roots), names().map(Some), "{levels:?} {isolated}");
            assert_eq!((processes.is_isolated(), processes.is_whole()), (isolated, true));
            assert_eq!(processes.get(seen), processes.get(guest.roots[1]));
            let twin = AddressSpace(guest.roots[1].0 ^ 0x1000);
            assert_eq!(processes.get(twin).is_some_and(|process| process.pid == 70), isolated);
            let kernel = processes.get(guest.own_root);
            assert_eq!(kernel.map(|kernel| (kernel.pid, kernel.name.as_str())), own_root.then_some((0, "swapper/0")));
            assert_eq!(processes.iter().count(), 3 + usize::from(own_root));
        }
    }
}

#[test]
fn user_mode_under_isolation_shows_the_other_half_of_the_pair() {
    let guest = SampleGuest::new(Kind { isolated: true, ..Kind::default() }, &some());
    let user = AddressSpace(guest.roots[0].0 | 0x1000);
    let mut linux = LinuxGuest::find(&guest.ram, &[user], &Hints::default()).unwrap();
    assert_eq!(linux.processes(&guest.ram).unwrap().get(user), Some(&names()[0]));
}

#[test]
fn the_process_that_the_kernel_was_found_by_may_end() {
    for own_root in [true, false] {
        let guest = SampleGuest::new(Kind { own_root, ..Kind::default() }, &some());
        let mut linux = LinuxGuest::find(&guest.ram, &guest.roots[2..], &Hints::default()).unwrap();
        if !own_root {
            // The oldest processes' tables are kept from here on.
            linux.processes(&guest.ram).unwrap();
            // Not even the first of them is needed.
            guest.ram.write(guest.roots[0].0, &[0; 4096]);
        }
        guest.ram.write(guest.roots[2].0, &[0; 4096]);
        assert_eq!(linux.processes(&guest.ram).unwrap().get(guest.roots[1]), Some(&names()[1]), "{own_root}");
        // A restart puts something else there, at last also where the tables were.
        guest.ram.write(guest.tasks[0].0 + 80, b"sleeper/0");
        assert_eq!(linux.processes(&guest.ram), Err(GuestOsError::Moved));
        guest.ram.write(guest.tasks[0].0 + 80, b"swapper/0");
        linux.processes(&guest.ram).unwrap();
        for root in guest.roots.iter().chain([&guest.own_root]) {
            guest.ram.write(root.0, &[0; 4096]);
        }
        assert_eq!(linux.processes(&guest.ram), Err(GuestOsError::Moved));
    }
}

#[test]
fn an_operator_can_give_what_the_kernel_does_not_show() {
    let guest = SampleGuest::new(Kind { with_types: false, ..Kind::default() }, &some());
    let find = |hints: &Hints<'_>| LinuxGuest::find(&guest.ram, &guest.roots, hints);
    assert_eq!(find(&Hints::default()), Err(GuestOsError::NoTypes { release: Some("6.1.0-dunlin".into()) }));
    let given = KernelTypes::parse(&types(&[])).unwrap();
    let hints = Hints { types: Some(&given), ..Hints::default() };
    let mut linux = find(&hints).unwrap();
    assert_eq!((linux.types_from, linux.first_task_from), (Origin::Operator, Origin::Guest));
    assert_eq!(named(&linux.processes(&guest.ram).unwrap(), &guest.roots), names().map(Some));

    let map = |init_task: u64| {
        // As it was linked, not where it lies now.
        let start = TEXT & !0xfff_ffff | 0x100_0000;
        Symbols::parse(format!("{start:x} T _text\n{:x} D init_task\n", start + init_task).as_bytes()).unwrap()
    };
    let symbols = map(INIT_TASK_OFFSET);
    // The name is no longer what is looked for.
    guest.ram.write(guest.tasks[0].0 + 80, b"swapper/000");
    assert_eq!(
        find(&hints),
        Err(GuestOsError::WrongHints { what: Given::Types, release: Some("6.1.0-dunlin".into()) })
    );
    let linux = find(&Hints { symbols: Some(&symbols), ..hints }).unwrap();
    assert_eq!(linux.first_task_from, Origin::Operator);
    let wrong = map(INIT_TASK_OFFSET + 64);
    let misled = |what| Err(GuestOsError::WrongHints { what, release: Some("6.1.0-dunlin".into()) });
    assert_eq!(find(&Hints { symbols: Some(&wrong), ..hints }), misled(Given::Both));
    let other = KernelTypes::parse(&types(&["task_struct.mm"])).unwrap();
    let error = find(&Hints { types: Some(&other), ..Hints::default() });
    assert_eq!(error, Err(GuestOsError::WrongTypes { missing: "task_struct.mm" }));
}

#[test]
fn what_is_no_linux_is_said_to_be_none() {
    let guest = SampleGuest::new(Kind::default(), &some());
    let find = |roots: &[AddressSpace]| LinuxGuest::find(&guest.ram, roots, &Hints::default());
    assert_eq!(find(&[]), Err(GuestOsError::NoAddressSpace));
    // No table, and none in RAM.
    assert_eq!(find(&[AddressSpace(0), AddressSpace(1 << 40)]), Err(GuestOsError::NoKernel));
    // One that has gone is no hindrance.
    find(&[AddressSpace(0), guest.roots[0]]).unwrap();
    guest.ram.write(guest.tasks[0].0 + 48, &[1]);
    assert_eq!(find(&guest.roots), Err(GuestOsError::NoProcesses));
}

#[test]
fn a_vm_that_ends_and_memory_that_cannot_be_read_are_told_as_such() {
    struct Refusing(GuestMemoryError);
    use crate::model::{Gpa, MemoryRange};
    use crate::port::GuestMemoryError;
    impl GuestMemory for Refusing {
        fn ranges(&self) -> &[MemoryRange] {
            &[]
        }
        fn read(&self, _: Gpa, _: &mut [u8]) -> Result<(), GuestMemoryError> {
            Err(self.0.clone())
        }
    }
    let guest = SampleGuest::new(Kind::default(), &some());
    let mut linux = find(&guest);
    for error in [GuestMemoryError::Gone, GuestMemoryError::Unreadable { at: Gpa(1), reason: "secret".into() }] {
        let memory = Refusing(error.clone());
        let found = LinuxGuest::find(&memory, &guest.roots, &Hints::default());
        assert_eq!(found, Err(GuestOsError::Memory(error.clone())));
        assert_eq!(linux.processes(&memory), Err(GuestOsError::Memory(error)));
    }
}

#[test]
fn a_process_whose_first_thread_has_ended_is_still_named() {
    let guest = SampleGuest::new(Kind::default(), &some());
    let base = direct_map(Levels::Four);
    let (task, mm) = (guest.tasks[3].0, guest.tasks[3].0 + 0x400);
    // Its second thread, which is in no list of processes.
    let thread = task + 0xc00;
    guest.ram.write(task + 48, &[0; 8]);
    guest.ram.write(thread + 48, &(base + mm).to_le_bytes());
    guest.ram.write(task + 64, &(base + thread + 64).to_le_bytes());
    let mut linux = find(&guest);
    assert_eq!(linux.processes(&guest.ram).unwrap().get(guest.roots[1]), Some(&names()[1]));
    // None of the threads has an address space: nothing is named, and nothing goes round for ever.
    guest.ram.write(thread + 48, &[0; 8]);
    guest.ram.write(thread + 64, &(base + task + 64).to_le_bytes());
    let processes = linux.processes(&guest.ram).unwrap();
    assert_eq!((processes.get(guest.roots[1]), processes.is_whole()), (None, true));
}

#[test]
fn processes_that_share_an_address_space_are_told_as_the_oldest() {
    let guest = SampleGuest::new(Kind::default(), &some());
    let base = direct_map(Levels::Four);
    guest.ram.write(guest.tasks[4].0 + 48, &(base + guest.tasks[1].0 + 0x400).to_le_bytes());
    let processes = find(&guest).processes(&guest.ram).unwrap();
    assert_eq!(named(&processes, &guest.roots), [Some(names()[0].clone()), Some(names()[1].clone()), None]);
}

#[test]
fn a_broken_list_is_read_from_both_ends_and_said_to_be_broken() {
    // Of ten processes, what the fifth leads to is changed to something that is no task.
    let many: Vec<Wanted> = (1..=10).map(|pid| Wanted { pid, name: b"many", threads: 1 }).collect();
    let base = direct_map(Levels::Four);
    for wrong in [0, 0xdead_0000_0000_0122, base + (1 << 40), base + 0x1000, 0x7fff_ffff_f000, u64::MAX, u64::MAX - 40]
    {
        let guest = SampleGuest::new(Kind::default(), &many);
        guest.ram.write(guest.links(5), &u64::to_le_bytes(wrong));
        let processes = find(&guest).processes(&guest.ram).unwrap();
        assert!(!processes.is_whole(), "{wrong:#x}");
        for (index, root) in guest.roots.iter().enumerate() {
            assert_eq!(processes.get(*root).map(|found| found.pid), Some(index as u32 + 1), "{wrong:#x}");
        }
    }
    // A circle without its head, in both directions.
    let guest = SampleGuest::new(Kind::default(), &many);
    guest.ram.write(guest.links(5), &(base + guest.links(3)).to_le_bytes());
    guest.ram.write(guest.links(6) + 8, &(base + guest.links(8)).to_le_bytes());
    let processes = find(&guest).processes(&guest.ram).unwrap();
    assert_eq!((processes.is_whole(), processes.iter().count()), (false, 11));
}

#[test]
fn a_list_that_changes_while_it_is_read_is_read_again() {
    let many: Vec<Wanted> = (1..=10).map(|pid| Wanted { pid, name: b"many", threads: 1 }).collect();
    let guest = SampleGuest::new(Kind::default(), &many);
    let mut linux = find(&guest);
    let (base, broken) = (direct_map(Levels::Four), guest.links(5) as usize);
    let right = (base + guest.links(6)).to_le_bytes();
    // Leads past a process for a while, and is right again when the walk has gone by.
    guest.ram.write(broken as u64, &(base + guest.links(8)).to_le_bytes());
    let mut since = None;
    guest.ram.meanwhile(move |bytes, read| {
        if read > *since.get_or_insert(read) + 80 {
            bytes[broken..broken + 8].copy_from_slice(&right);
        }
    });
    let processes = linux.processes(&guest.ram).unwrap();
    assert_eq!((processes.is_whole(), processes.iter().count()), (true, 11));
}

#[test]
fn a_guest_that_has_no_end_costs_its_budget_and_no_more() {
    let guest = SampleGuest::new(Kind::default(), &some());
    let mut linux = find(&guest);
    let before = guest.ram.bytes_read();
    assert_eq!(linux.processes_within(20_000, &guest.ram).map(|found| found.iter().count()), Ok(4));
    for budget in (0..10_000).step_by(77) {
        let before = guest.ram.bytes_read();
        let found = linux.processes_within(budget, &guest.ram);
        assert!(guest.ram.bytes_read() - before <= budget);
        assert!(found.is_ok() || found == Err(GuestOsError::TooMuch), "{found:?}");
    }
    assert!(guest.ram.bytes_read() > before);
    let found = LinuxGuest::find_within(10_000, &guest.ram, &guest.roots, &Hints::default());
    assert_eq!(found, Err(GuestOsError::TooMuch));
}
