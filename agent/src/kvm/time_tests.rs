//! The guest's time through pauses, moves and resets, on a real KVM.
//!
//! Time is read as a saved machine has it, which is how KVM tells it. Bounds are wide enough for KVM in an emulated CPU.

use std::sync::Arc;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::machine::{HostedError, Machine};
use super::testing::{Code, PAGES, boot, hosting, kvm_or_skip, wait_for, writer, written};
use super::x86::state::SavedTime;
use crate::model::DirtyLogKind;
use crate::model::shape::ShapeError;

/// What may lie between two readings, or between a reading and its use.
const SLACK: Duration = Duration::from_millis(2);

fn time_of(machine: &Machine) -> SavedTime {
    SavedTime::of(&machine.save_state().unwrap())
}

fn incoming(source: &Machine) -> Arc<Machine> {
    Machine::incoming(source.shape().clone(), &hosting(), Box::new(|_| Ok(Vec::new()))).unwrap()
}

fn move_to(source: &Machine, target: &Machine) {
    let mut bytes = vec![0; source.shape().memory_bytes as usize];
    source.memory().ram().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    target.memory().ram().write_slice(&bytes, GuestAddress(0)).unwrap();
    target.restore_state(&source.save_state().unwrap()).unwrap();
}

/// Between two readings counter, clock and the host's real time went on alike.
fn assert_in_step(what: &str, machine: &Machine, before: &SavedTime, after: &SavedTime) {
    let host = after.realtime_ns - before.realtime_ns;
    let clock = after.clock_ns.checked_sub(before.clock_ns).expect("the clock does not go back");
    for ((then, _), (now, offset)) in before.counters.iter().zip(&after.counters) {
        let ticks = now.checked_sub(*then).expect("the counter does not go back");
        let counter = (u128::from(ticks) * 1_000_000 / u128::from(machine.shape().tsc_khz)) as u64;
        for (name, span) in [("clock", clock), ("counter", counter)] {
            let apart = span.abs_diff(host);
            assert!(apart < SLACK.as_nanos() as u64, "{what}: {name} went on {span} ns, the host {host} ns");
        }
        assert!(clock.abs_diff(counter) < 200_000, "{what}: clock {clock} ns, counter {counter} ns");
        assert_eq!(*offset, after.counters[0].1, "{what}: the vCPUs have one offset");
        assert!(now.abs_diff(after.counters[0].0) < 1_000_000, "{what}: the vCPUs have one counter");
    }
}

#[test]
fn counter_and_clock_go_on_together_through_a_pause_a_return_and_moves() {
    if !kvm_or_skip("counter_and_clock_go_on_together_through_a_pause_a_return_and_moves") {
        return;
    }
    let alone = boot(writer(4), 1, DirtyLogKind::Bitmap);
    alone.resume().unwrap();
    wait_for("a write", || written(&alone, 0) > 0);
    alone.pause().unwrap();
    let stable = time_of(&alone).stable;

    let mut machine = boot(writer(4), 2, DirtyLogKind::Bitmap);
    machine.resume().unwrap();
    wait_for("a write", || written(&machine, 0) > 0);
    machine.pause().unwrap();
    let mut before = time_of(&machine);
    println!("stable: {stable}, offsets: {}", before.counters[0].1.is_some());
    assert_eq!(before.stable, stable, "two vCPUs have a clock as stable as one");
    for hop in 0..4 {
        // A pause, and a state that nobody takes: the machine goes on where it is.
        std::thread::sleep(Duration::from_millis(30));
        machine.resume().unwrap();
        machine.pause().unwrap();
        let after = time_of(&machine);
        assert_in_step(&format!("pause {hop}"), &machine, &before, &after);
        before = after;

        machine.resume().unwrap();
        let target = incoming(&machine);
        std::thread::sleep(Duration::from_millis(20));
        machine.pause().unwrap();
        let stood = written(&machine, 0);
        move_to(&machine, &target);
        target.resume().unwrap();
        wait_for("the guest to go on", || written(&target, 0) > stood);
        target.pause().unwrap();
        let after = time_of(&target);
        assert_in_step(&format!("move {hop}"), &target, &before, &after);
        assert_eq!(after.stable, stable, "move {hop}");
        (machine, before) = (target, after);
    }
}

/// A guest that sets up the KVM clock at [`PAGES`] and the wall clock in the page behind, then waits.
fn clock_user() -> super::boot::BootImage {
    let wrmsr = |code: Code, index, value| {
        // mov ecx, INDEX; mov eax, VALUE; xor edx, edx; wrmsr
        code.with(&[0xb9], index).with(&[0xb8], value).bytes(&[0x31, 0xd2, 0x0f, 0x30])
    };
    let code = wrmsr(wrmsr(Code::default(), 0x4b56_4d00, PAGES + 4096), 0x4b56_4d01, PAGES | 1);
    let again = code.here();
    code.bytes(&[0xf3, 0x90]).back(0xeb, again).image() // pause; jmp
}

/// `struct pvclock_vcpu_time_info`: system time, flags.
fn clock_page(machine: &Machine) -> (u64, u8) {
    let at = |offset: u32| GuestAddress(u64::from(PAGES + offset));
    let ram = machine.memory().ram();
    (ram.read_obj(at(16)).unwrap(), ram.read_obj(at(29)).unwrap())
}

/// PVCLOCK_GUEST_STOPPED.
const STOPPED: u8 = 2;

#[test]
fn a_guest_with_a_clock_is_told_that_it_stood_and_its_clock_page_moves() {
    if !kvm_or_skip("a_guest_with_a_clock_is_told_that_it_stood_and_its_clock_page_moves") {
        return;
    }
    let source = boot(clock_user(), 1, DirtyLogKind::Bitmap);
    source.resume().unwrap();
    wait_for("a clock", || clock_page(&source).0 > 0);
    assert_eq!(clock_page(&source).1 & STOPPED, 0);
    let clear = |machine: &Machine| {
        machine.memory().ram().write_obj(0u8, GuestAddress(u64::from(PAGES + 29))).unwrap();
    };
    source.pause().unwrap();
    source.resume().unwrap();
    wait_for("word of the pause", || clock_page(&source).1 & STOPPED != 0);

    let target = incoming(&source);
    source.pause().unwrap();
    clear(&source);
    let wall = GuestAddress(u64::from(PAGES + 4096));
    assert_ne!(source.memory().ram().read_obj::<u32>(wall).unwrap(), 0, "a wall clock");
    // The guest has done with its wall clock, and keeps something else there.
    source.memory().ram().write_obj(0x1234_5678u32, wall).unwrap();
    move_to(&source, &target);
    assert_eq!(target.memory().ram().read_obj::<u32>(wall).unwrap(), 0x1234_5678);
    let then = clock_page(&target).0;
    target.resume().unwrap();
    wait_for("word of the pause", || clock_page(&target).1 & STOPPED != 0);
    assert!(clock_page(&target).0 >= then, "the clock does not go back");
    assert_eq!(target.memory().ram().read_obj::<u32>(wall).unwrap(), 0x1234_5678);
}

#[test]
fn a_frequency_that_this_host_has_not_is_refused_before_anything_is_made() {
    if !kvm_or_skip("a_frequency_that_this_host_has_not_is_refused_before_anything_is_made") {
        return;
    }
    let machine = boot(writer(4), 1, DirtyLogKind::Bitmap);
    let refused = |tsc_khz| {
        let mut shape = machine.shape().clone();
        shape.tsc_khz = tsc_khz;
        let by_check = Machine::check(&shape).unwrap_err();
        let by_making =
            Machine::incoming(shape, &hosting(), Box::new(|_| unreachable!("no device is made"))).err().unwrap();
        assert_eq!(by_check.to_string(), by_making.to_string());
        by_check
    };
    for absurd in [0, 9_999, u32::MAX] {
        assert!(matches!(refused(absurd), HostedError::Shape(ShapeError::Tsc(khz)) if khz == absurd));
    }
    let near = u64::from(machine.shape().tsc_khz) * 1_000_200 / 1_000_000;
    let mut shape = machine.shape().clone();
    shape.tsc_khz = near as u32;
    Machine::check(&shape).unwrap();
    let can_scale = kvm_ioctls::Kvm::new().unwrap().check_extension(kvm_ioctls::Cap::TscControl);
    shape.tsc_khz = shape.tsc_khz / 10 * 11;
    if can_scale {
        Machine::check(&shape).unwrap();
    } else {
        assert!(matches!(refused(shape.tsc_khz), HostedError::TscFrequency(_)));
    }
}
