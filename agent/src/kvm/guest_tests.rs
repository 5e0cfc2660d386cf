//! The test guest (`tests/guest`) in hosted machines: it must have been built (`cargo xtask test` does).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::boot::BootImage;
use super::bus::Device;
use super::hurry::Hurry;
use super::machine::{BootConfig, DeviceMaker, Machine};
use super::memory::Memory;
use super::testing::{config, hosting, kvm_or_skip, wait_for};
use super::virtio::VirtioBlk;
use crate::block::raw::RawDisk;
use crate::model::{DirtyLogKind, DiskSpec, PAGE_SIZE, PageBitmap, PageRun};

/// The guest's ELF, if it has been built. On a build machine it must have been.
pub(super) fn guest(test: &str) -> Option<PathBuf> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/guest/target/release/dunlin-guest");
    let path = std::env::var_os("DUNLIN_TEST_GUEST").map_or(built, PathBuf::from);
    if !kvm_or_skip(test) {
        return None;
    }
    let there = path.is_file();
    assert!(there || std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{test} needs {}", path.display());
    if !there {
        println!("SKIP {test}: {} has not been built", path.display());
    }
    there.then_some(path)
}

/// A machine that runs the guest.
pub(super) fn boot_guest(path: &Path, memory_bytes: u64, cpus: u32, kind: DirtyLogKind, cmdline: &str) -> Arc<Machine> {
    let image = BootImage::read(path, None, cmdline).unwrap();
    let config = BootConfig { memory_bytes, ..config(image, cpus, kind) };
    Machine::boot(config, &hosting(), Box::new(|_| Ok(Vec::new()))).unwrap()
}

/// The console as text.
pub(super) fn console(machine: &Machine) -> String {
    String::from_utf8_lossy(&machine.console().history()).into_owned()
}

/// A field of the guest's last status line.
fn status(machine: &Machine, field: &str) -> Option<u64> {
    let text = console(machine);
    let line = text.lines().rev().skip(1).find(|line| line.starts_with("STAT "))?;
    let value = line.split_ascii_whitespace().find_map(|word| word.strip_prefix(field)?.strip_prefix('='))?;
    value.parse().ok()
}

#[test]
fn the_guest_boots_small_and_large_with_one_and_two_vcpus() {
    let Some(path) = guest("the_guest_boots_small_and_large_with_one_and_two_vcpus") else { return };
    for (memory_bytes, cpus) in [(256 << 20, 1), (256 << 20, 2), (6 << 30, 2)] {
        let machine = boot_guest(&path, memory_bytes, cpus, DirtyLogKind::Bitmap, "dunlin.heartbeat=5ms");
        machine.resume().unwrap();
        wait_for("READY", || console(&machine).contains(&format!(" cpus={cpus} tsc_hz=")));
        wait_for("heartbeats", || console(&machine).contains("\nHB 5 "));
        assert_eq!(machine.exit(), None);
    }
}

/// One round: what is due is protected, then copied.
fn copy(source: &Machine, target: &Machine, due: &PageBitmap) {
    let (from, to) = (source.memory(), target.memory());
    let mut buffer = vec![0; 64 * PAGE_SIZE];
    for run in due.runs(64) {
        source.log().protect(run).unwrap();
        let buffer = &mut buffer[..run.byte_len()];
        rustix::io::pread(from.file(), &mut *buffer, run.byte_offset()).unwrap();
        rustix::io::pwrite(to.file(), buffer, run.byte_offset()).unwrap();
    }
}

fn harvest(machine: &Machine) -> PageBitmap {
    let mut due = PageBitmap::new(machine.memory().pages());
    machine.log().harvest().unwrap();
    machine.memory().dirty().take(&mut due);
    due
}

/// One move as a migration does it: the log on, everything once, two rounds, then the rest and the state of the paused
/// machine.
fn pre_copy(machine: &Machine, target: &Machine) {
    machine.log().start().unwrap();
    copy(machine, target, &PageBitmap::full(machine.memory().pages()));
    for _ in 0..2 {
        copy(machine, target, &harvest(machine));
    }
    machine.pause().unwrap();
    copy(machine, target, &harvest(machine));
    target.restore_state(&machine.save_state().unwrap()).unwrap();
}

#[test]
fn the_guest_moves_while_it_writes_memory_and_disk_and_loses_nothing() {
    let Some(path) = guest("the_guest_moves_while_it_writes_memory_and_disk_and_loses_nothing") else { return };
    let directory = tempfile::tempdir().unwrap();
    let disk = DiskSpec { path: directory.path().join("disk"), readonly: false };
    std::fs::File::create(&disk.path).unwrap().set_len(8 << 20).unwrap();
    for kind in [DirtyLogKind::Bitmap, DirtyLogKind::Ring] {
        let devices = || -> Box<DeviceMaker<'_>> {
            Box::new(|memory: &Memory| {
                let disk = RawDisk::open(&disk).unwrap();
                Ok(vec![Arc::new(VirtioBlk::new(0, memory.ram().clone(), disk)?) as Arc<dyn Device>])
            })
        };
        let cmdline =
            "dunlin.heartbeat=5ms dunlin.wl=ws:8M,rate:10000,pattern:random,share:10 dunlin.blk=rate:500,span:4M";
        let image = BootImage::read(&path, None, cmdline).unwrap();
        let config = BootConfig { memory_bytes: 64 << 20, ..config(image, 2, kind) };
        let mut machine = Machine::boot(config, &hosting(), devices()).unwrap();
        machine.resume().unwrap();
        wait_for("READY", || console(&machine).contains(" block=true "));
        for hop in 0..10 {
            let target = Machine::incoming(machine.shape().clone(), &hosting(), devices()).unwrap();
            pre_copy(&machine, &target);
            target.resume().unwrap();
            machine = target;
            wait_for("heartbeats after the move", || console(&machine).matches("HB ").count() > 5);
            assert_eq!(machine.exit(), None, "hop {hop}, {kind:?}: {}", console(&machine));
        }
        wait_for("a status line", || status(&machine, "pages_written").is_some());
        for field in [
            "page_mismatches",
            "ipi_lost",
            "ipi_doubled",
            "timer_stalls",
            "address_space_mismatches",
            "irq_lost",
            "block_mismatches",
            "block_errors",
        ] {
            assert_eq!(status(&machine, field), Some(0), "{kind:?} {field}: {}", console(&machine));
        }
        assert!(status(&machine, "pages_written").is_some_and(|pages| pages > 1000));
    }
    let written = std::fs::read(&disk.path).unwrap();
    assert!(written.iter().any(|&byte| byte != 0), "the guest wrote to its disk");
}

/// Samples by what was measured.
#[derive(Default)]
struct Times(BTreeMap<&'static str, Vec<Duration>>);

impl Times {
    fn note(&mut self, what: &'static str, sample: Duration) {
        self.0.entry(what).or_default().push(sample);
    }

    fn of(&mut self, what: &'static str, step: &mut dyn FnMut()) {
        let start = Instant::now();
        step();
        self.note(what, start.elapsed());
    }
}

/// Not a test: prints how long each step takes on this host, medians of many.
#[test]
#[ignore = "a measurement"]
fn measure_the_steps_of_a_switch() {
    let Some(path) = guest("measure_the_steps_of_a_switch") else { return };
    for kind in [DirtyLogKind::Bitmap, DirtyLogKind::Ring] {
        let cmdline = "dunlin.heartbeat=5ms dunlin.wl=ws:32M,rate:25000,pattern:random,share:10";
        let mut machine = boot_guest(&path, 256 << 20, 2, kind, cmdline);
        machine.resume().unwrap();
        wait_for("READY", || console(&machine).contains("\nREADY "));
        let mut times = Times::default();
        for _ in 0..15 {
            let none = Box::new(|_: &Memory| Ok(Vec::new()));
            let target = Machine::incoming(machine.shape().clone(), &hosting(), none).unwrap();
            times.of("1 log start", &mut || machine.log().start().unwrap());
            let all = PageBitmap::full(machine.memory().pages());
            for run in all.runs(512) {
                times.of("2 protect 2 MiB, round 1", &mut || machine.log().protect(run).unwrap());
            }
            copy(&machine, &target, &all);
            for _ in 0..5 {
                std::thread::sleep(Duration::from_millis(20));
                let mut due = PageBitmap::new(machine.memory().pages());
                times.of("3 harvest after 20 ms", &mut || due = harvest(&machine));
                times.note("4 pages of it (as µs)", Duration::from_micros(due.count().0));
                times.of("5 protect it by 2 MiB", &mut || {
                    for first in (0..machine.memory().pages().0).step_by(512) {
                        if due.runs_within(first, first + 512, 512).next().is_some() {
                            machine.log().protect(PageRun::new(first, 512)).unwrap();
                        }
                    }
                });
                copy(&machine, &target, &due);
            }
            // As whoever leads a blackout does.
            let hurry = Hurry::here();
            times.of("6 pause", &mut || _ = machine.pause().unwrap());
            let mut due = PageBitmap::new(machine.memory().pages());
            times.of("7 last harvest", &mut || due = harvest(&machine));
            copy(&machine, &target, &due);
            let mut state = Vec::new();
            times.of("8 save", &mut || state = machine.save_state().unwrap());
            times.of("9 restore", &mut || target.restore_state(&state).unwrap());
            times.of("a resume", &mut || target.resume().unwrap());
            drop(hurry);
            times.of("b log stop", &mut || machine.log().stop().unwrap());
            times.note("c state bytes (as µs)", Duration::from_micros(state.len() as u64));
            machine = target;
            // Quick pauses of a machine whose vCPUs have run for a while.
            std::thread::sleep(Duration::from_millis(20));
        }
        for _ in 0..300 {
            std::thread::sleep(Duration::from_millis(7));
            let _hurry = Hurry::here();
            times.of("d pause alone", &mut || _ = machine.pause().unwrap());
            times.of("e resume alone", &mut || machine.resume().unwrap());
        }
        println!("{kind:?}, 2 vCPUs, 256 MiB, 2 x 25 000 pages/s; {:?}", machine.shortcomings());
        for (what, mut samples) in times.0 {
            samples.sort();
            let at = |share: usize| samples[(samples.len() - 1) * share / 100];
            println!(
                "{what:32} n={:5} min {:?} median {:?} p99 {:?} max {:?}",
                samples.len(),
                at(0),
                at(50),
                at(99),
                at(100)
            );
        }
    }
}
