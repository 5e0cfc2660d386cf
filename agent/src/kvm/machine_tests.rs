//! Whole machines on a real KVM.

use std::sync::Arc;
use std::time::Duration;

use super::boot::{BootImage, sample};
use super::control::MachineExit;
use super::hurry;
use super::machine::{HostedError, Machine};
use super::ports::SLEEP_CONTROL_PORT;
use super::testing::{boot, hosting, kvm_or_skip, policy_in_front, printer, wait_for, writer, written};
use crate::model::DirtyLogKind;

/// mov al, BYTE; mov dx, PORT; out dx, al
fn out(port: u16, byte: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0xb0, byte, 0x66, 0xba, low, high, 0xee]
}

#[test]
fn a_guest_prints_and_switches_itself_off() {
    if !kvm_or_skip("a_guest_prints_and_switches_itself_off") {
        return;
    }
    let machine = boot(printer(b"hello from the guest\n", &out(0x600, 5)), 1, DirtyLogKind::Bitmap);
    assert_eq!(machine.wait_exit(Duration::ZERO), None);
    machine.resume().unwrap();
    assert_eq!(machine.wait_exit(Duration::from_secs(10)), Some(MachineExit::PowerOff));
    assert_eq!(machine.console().history(), b"hello from the guest\n");
    assert!(matches!(machine.resume(), Err(HostedError::Ended(MachineExit::PowerOff))));
}

#[test]
fn a_paused_guest_stands_still_and_goes_on() {
    if !kvm_or_skip("a_paused_guest_stands_still_and_goes_on") {
        return;
    }
    let machine = boot(writer(8), 1, DirtyLogKind::Bitmap);
    machine.resume().unwrap();
    let mut last = 0;
    for _ in 0..20 {
        wait_for("a write", || written(&machine, 0) > last);
        machine.pause().unwrap();
        last = written(&machine, 0);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(written(&machine, 0), last);
        machine.resume().unwrap();
    }
    machine.stop();
    assert_eq!(machine.wait_exit(Duration::from_secs(1)), Some(MachineExit::Stopped));
}

/// The number of the thread of the only vCPU.
fn started_thread(machine: &Machine) -> i32 {
    let thread = || machine.vcpu_threads()[0];
    wait_for("the vCPU's thread", || thread() != 0);
    thread()
}

#[test]
fn the_vcpus_of_a_vm_that_comes_are_in_front_for_a_moment_and_after_a_pause_they_are_not() {
    if !kvm_or_skip("the_vcpus_of_a_vm_that_comes_are_in_front_for_a_moment_and_after_a_pause_they_are_not") {
        return;
    }
    let in_front = policy_in_front();
    // It never leaves guest code by itself. Who looks may be held up for longer than the moment lasts, but not each time.
    let (machine, thread) = (0..20)
        .find_map(|_| {
            let machine = boot(writer(8), 1, DirtyLogKind::Bitmap);
            let thread = started_thread(&machine);
            let policy = {
                let _hurry = hurry::Hurry::here();
                machine.resume().unwrap();
                hurry::policy_of(thread)
            };
            (policy == in_front).then_some((machine, thread))
        })
        .expect("a vCPU in front");
    wait_for("the end of its moment", || hurry::policy_of(thread) == libc::SCHED_OTHER);
    let before = written(&machine, 0);
    wait_for("a write", || written(&machine, 0) > before);
    machine.pause().unwrap();
    // Put in front to stand at once, it is an ordinary one as soon as it goes on.
    assert_eq!(hurry::policy_of(thread), in_front);
    machine.resume().unwrap();
    wait_for("its going on", || hurry::policy_of(thread) == libc::SCHED_OTHER);
    machine.stop();
}

#[test]
fn a_vcpu_that_may_wait_for_a_page_is_in_front_for_a_moment_to_come_to_stand_and_never_else() {
    if !kvm_or_skip("a_vcpu_that_may_wait_for_a_page_is_in_front_for_a_moment_to_come_to_stand_and_never_else") {
        return;
    }
    let machine = boot(writer(8), 1, DirtyLogKind::Bitmap);
    let thread = started_thread(&machine);
    machine.pages_come_later(true);
    {
        let _hurry = hurry::Hurry::here();
        machine.resume().unwrap();
        assert_eq!(hurry::policy_of(thread), libc::SCHED_OTHER);
    }
    wait_for("a write", || written(&machine, 0) > 0);
    machine.pause().unwrap();
    assert_eq!(hurry::policy_of(thread), libc::SCHED_OTHER);
    machine.stop();
}

#[test]
fn a_triple_fault_ends_the_machine_with_a_reason() {
    if !kvm_or_skip("a_triple_fault_ends_the_machine_with_a_reason") {
        return;
    }
    // ud2, with no interrupt table.
    let machine = boot(printer(b"x", &[0x0f, 0x0b]), 1, DirtyLogKind::Bitmap);
    machine.resume().unwrap();
    let exit = machine.wait_exit(Duration::from_secs(10)).unwrap();
    assert!(matches!(&exit, MachineExit::Error(text) if text.contains("vCPU 0")), "{exit:?}");
}

#[test]
fn a_reset_boots_the_guest_again() {
    if !kvm_or_skip("a_reset_boots_the_guest_again") {
        return;
    }
    let machine = boot(printer(b"again ", &out(0x64, 0xfe)), 2, DirtyLogKind::Bitmap);
    machine.resume().unwrap();
    wait_for("three boots", || machine.console().history().starts_with(b"again again again "));
    assert_eq!(machine.exit(), None);
    machine.pause().unwrap();
}

/// Copies memory as a migration would, and the state.
fn move_to(source: &Arc<Machine>, target: &Arc<Machine>) -> Vec<u8> {
    use vm_memory::{Bytes, GuestAddress};
    let mut bytes = vec![0; source.shape().memory_bytes as usize];
    source.memory().ram().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    target.memory().ram().write_slice(&bytes, GuestAddress(0)).unwrap();
    let state = source.save_state().unwrap();
    target.restore_state(&state).unwrap();
    state
}

#[test]
fn a_guest_goes_on_in_another_machine_where_it_stood() {
    if !kvm_or_skip("a_guest_goes_on_in_another_machine_where_it_stood") {
        return;
    }
    for kind in [DirtyLogKind::Bitmap, DirtyLogKind::Ring] {
        let mut machine = boot(writer(16), 2, kind);
        for _ in 0..5 {
            machine.resume().unwrap();
            let before = written(&machine, 3);
            wait_for("a round", || written(&machine, 3) > before + 32);
            assert!(matches!(machine.save_state(), Err(HostedError::Phase(_))));
            machine.pause().unwrap();
            let target = incoming(&machine);
            let state = move_to(&machine, &target);
            // Nothing is lost on the way through KVM: what was written reads the same.
            let again = target.save_state().unwrap();
            assert_eq!(state.len(), again.len());
            let stood = written(&machine, 3);
            target.resume().unwrap();
            wait_for("the guest to go on", || written(&target, 3) > stood + 32);
            assert_eq!(written(&machine, 3), stood);
            assert!(matches!(target.restore_state(&state), Err(HostedError::Phase(_))));
            target.pause().unwrap();
            machine = target;
        }
    }
}

#[test]
fn a_state_of_another_machine_or_a_damaged_one_is_refused_and_the_machine_still_takes_the_right_one() {
    if !kvm_or_skip("a_state_of_another_machine") {
        return;
    }
    let machine = boot(writer(4), 1, DirtyLogKind::Bitmap);
    let state = machine.save_state().unwrap();
    let wider = boot(writer(4), 2, DirtyLogKind::Bitmap);
    assert!(matches!(wider.restore_state(&state), Err(HostedError::State(_))));
    let target = incoming(&machine);
    assert!(matches!(target.restore_state(&wider.save_state().unwrap()), Err(HostedError::State(_))));
    for damaged in [&state[..state.len() - 1], &[], &b"DUNLINMS"[..]] {
        assert!(matches!(target.restore_state(damaged), Err(HostedError::State(_))));
    }
    target.restore_state(&state).unwrap();
}

#[test]
fn a_host_that_lacks_a_feature_or_the_frequency_refuses() {
    if !kvm_or_skip("a_host_that_lacks_a_feature_or_the_frequency_refuses") {
        return;
    }
    let machine = boot(writer(4), 1, DirtyLogKind::Bitmap);
    Machine::check(machine.shape()).unwrap();
    let mut shape = machine.shape().clone();
    for leaf in shape.cpuid.iter_mut().filter(|leaf| leaf.function == 7) {
        leaf.registers = [u32::MAX; 4];
    }
    assert!(matches!(Machine::check(&shape), Err(HostedError::Cpuid(_))));
    assert!(Machine::incoming(shape, &hosting(), Box::new(|_| Ok(Vec::new()))).is_err());
    let mut shape = machine.shape().clone();
    shape.cpus = 0;
    assert!(matches!(Machine::check(&shape), Err(HostedError::Shape(_))));
    shape.cpus = 1000;
    assert!(matches!(Machine::check(&shape), Err(HostedError::Cpus { asked: 1000, .. })));
}

/// A bzImage that prints its initrd, then does what `then` says: in long mode, at privilege level 0.
fn initrd_printer(initrd: &[u8], then: &[u8]) -> BootImage {
    let code = [
        &[0x8b, 0x8e, 0x1c, 0x02, 0, 0][..],   // mov ecx, [rsi + 0x21c]
        &[0x8b, 0xb6, 0x18, 0x02, 0, 0],       // mov esi, [rsi + 0x218]
        &[0x66, 0xba, 0xf8, 0x03, 0xf3, 0x6e], // mov dx, 0x3f8; rep outsb
        then,
        &[0xf4, 0xeb, 0xfd], // hlt; jmp to the hlt
    ];
    let kernel = sample::bzimage(&code.concat());
    BootImage { kernel: kernel.into(), initrd: Some(initrd.into()), cmdline: String::new() }
}

#[test]
fn a_bzimage_starts_in_long_mode_reads_its_initrd_and_switches_off_by_acpi() {
    if !kvm_or_skip("a_bzimage_starts_in_long_mode") {
        return;
    }
    // Another sleep type first, which is none that the machine has: it goes on.
    let (sleep, off) = (out(SLEEP_CONTROL_PORT, 0x2c), out(SLEEP_CONTROL_PORT, 0x34));
    // mov eax, cs; add al, 'A' - 0x10; out to the console: the selector that the boot protocol wants, as a letter.
    let selector = [0x8c, 0xc8, 0x04, b'A' - 0x10, 0x66, 0xba, 0xf8, 0x03, 0xee];
    let image = initrd_printer(b"from the initrd ", &[&sleep[..], &selector, &off].concat());
    let machine = boot(image, 2, DirtyLogKind::Bitmap);
    machine.resume().unwrap();
    assert_eq!(machine.wait_exit(Duration::from_secs(10)), Some(MachineExit::PowerOff));
    assert_eq!(machine.console().history(), b"from the initrd A");
}

#[test]
fn a_bzimage_with_its_initrd_boots_again_after_a_reset_here_and_where_it_has_moved() {
    if !kvm_or_skip("a_bzimage_with_its_initrd_boots_again") {
        return;
    }
    let machine = boot(initrd_printer(b"again ", &out(0x64, 0xfe)), 2, DirtyLogKind::Bitmap);
    machine.resume().unwrap();
    wait_for("three boots", || machine.console().history().starts_with(b"again again again "));
    machine.pause().unwrap();
    let target = incoming(&machine);
    assert_eq!(target.image(), machine.image());
    move_to(&machine, &target);
    target.resume().unwrap();
    wait_for("two boots there", || target.console().history().starts_with(b"again again "));
    assert_eq!(target.exit(), None);
    target.pause().unwrap();
}

#[test]
fn a_jump_to_the_reset_vector_resets() {
    if !kvm_or_skip("a_jump_to_the_reset_vector_resets") {
        return;
    }
    // mov eax, 0xffff0; jmp eax: the code there is the same in protected mode.
    let machine = boot(printer(b"again ", &[0xb8, 0xf0, 0xff, 0x0f, 0, 0xff, 0xe0]), 1, DirtyLogKind::Bitmap);
    machine.resume().unwrap();
    wait_for("three boots", || machine.console().history().starts_with(b"again again again "));
    machine.pause().unwrap();
}

#[test]
fn linux_is_told_of_devices_by_acpi_alone() {
    if !kvm_or_skip("linux_is_told_of_devices_by_acpi_alone") {
        return;
    }
    let mut image = initrd_printer(b"x", &[]);
    image.cmdline = " console=ttyS0 ".into();
    let machine = boot(image, 1, DirtyLogKind::Bitmap);
    assert_eq!(machine.image().unwrap().cmdline, "console=ttyS0");
    let other = boot(writer(4), 1, DirtyLogKind::Bitmap);
    assert!(other.image().unwrap().cmdline.starts_with("dunlin.cpus=1 "));
}

fn incoming(source: &Machine) -> Arc<Machine> {
    let target = bare(source);
    target.set_image(BootImage::from_bytes(&source.image().unwrap().to_bytes()).unwrap());
    target
}

/// A target that was not given the boot image.
fn bare(source: &Machine) -> Arc<Machine> {
    Machine::incoming(source.shape().clone(), &hosting(), Box::new(|_| Ok(Vec::new()))).unwrap()
}

#[test]
fn a_migrated_guest_can_reset_and_one_without_its_image_ends_with_the_reason() {
    if !kvm_or_skip("a_migrated_guest_can_reset") {
        return;
    }
    let machine = boot(printer(b"once ", &out(0x64, 0xfe)), 1, DirtyLogKind::Bitmap);
    let target = incoming(&machine);
    move_to(&machine, &target);
    target.resume().unwrap();
    wait_for("a reset", || target.console().history().starts_with(b"once once "));
    target.pause().unwrap();

    let bare = bare(&machine);
    move_to(&machine, &bare);
    bare.resume().unwrap();
    let exit = bare.wait_exit(Duration::from_secs(10)).unwrap();
    assert!(matches!(&exit, MachineExit::Error(text) if text.contains("boot image")), "{exit:?}");
}
